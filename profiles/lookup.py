"""Costs read out of a `Profile`: kernels and collectives interpolated, scaled, with their band."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from profiles.errors import UnsupportedError
from profiles.profile import CollectiveSample, Cost, KernelSample, Profile
from profiles.surface import Shape, Surface, Works

# The kernel that `profiles.measure.reference` repeats, by kind of device: all along a profile, and
# in every run.
REFERENCE_OP = "reference"
REFERENCE_SHAPES: Mapping[str, Shape] = {"cpu": (512, 256, 256), "cuda": (4096, 4096, 4096)}

# From a quantile of 10 or 90 % to the middle of a normal, in standard deviations.
_DEVIATIONS = 1.2816
# An estimate less sure than this is no interpolation any more.
UNSURE = 0.25


def kernel_works(op: str, shape: Shape) -> tuple[float, ...]:
    """Return the works of a kernel: the quantities that its time grows with.

    linear: 2 m n k flops, and the elements of its three matrices. attention: its two products,
    batch * heads * seq^2 * head, the scores alone, batch * heads * seq^2, and the elements of q,
    k, v and the output. embedding_backward: rows * width, and width * vocab, since the gradient is
    dense. embedding_forward: rows * width. norm: rows * width, and rows. All others: the product of
    the shape, which is the number of elements.

    >>> kernel_works("linear_forward", (2, 3, 4))
    (48.0, 26.0)
    """
    if op.startswith("linear_") or op == REFERENCE_OP:
        m, n, k = shape
        return 2.0 * m * n * k, float(m * k + n * k + m * n)
    if op.startswith("attention_"):
        batch, heads, kv_heads, seq, head = shape
        scores = float(batch * heads * seq * seq)
        return scores * head, scores, 2.0 * batch * seq * head * (heads + kv_heads)
    if op.startswith("embedding_"):
        rows, width, vocab = shape
        looked_up = float(rows * width)
        return (looked_up, float(width * vocab)) if op == "embedding_backward" else (looked_up,)
    if op.startswith("norm_"):
        return float(math.prod(shape)), float(shape[0])
    return (float(math.prod(shape)),)


def collective_works(shape: Shape) -> tuple[float, ...]:
    """Return the works of a collective: its bytes."""
    return (float(shape[0]),)


def ring_traffic(kind: str, group_size: int) -> float:
    """Return how often the full buffer passes one rank's link in a group of `group_size` n.

    2 (n - 1) / n for an all-reduce, (n - 1) / n for an all-gather, reduce-scatter or all-to-all,
    1 for a broadcast or a message, 2 for an exchange. Source: Patarasuk and Yuan, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations", JPDC 69 (2009).

    >>> ring_traffic("all_reduce", 4), ring_traffic("broadcast", 4)
    (1.5, 1.0)
    """
    if kind in ("send_recv", "broadcast"):
        return 1.0
    if kind == "exchange":
        return 2.0
    return (2 if kind.startswith("all_reduce") else 1) * (group_size - 1) / group_size


class _Measured(NamedTuple):
    """One surface, and the spread of its samples in the surface's order of shapes.

    `below` and `above` are ln(p50 / p10) and ln(p90 / p50).
    """

    surface: Surface
    samples: Mapping[Shape, KernelSample | CollectiveSample]
    below: npt.NDArray[np.float64]
    above: npt.NDArray[np.float64]


@final
class CostTable:
    """Look-ups in one profile. The profile must not change; costs that were asked for are kept.

    A measured shape has its measured quantiles. Between shapes the median is the surface's, and P10
    and P90 hold both the spread of the calls, as near shapes have it, and the uncertainty of the
    interpolation. A cost is extrapolated outside of the measured sizes, and where the surface
    is not sure of it within a quarter.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._kernels: dict[tuple[str, str, str], dict[Shape, KernelSample]] = {}
        self._collectives: dict[tuple[str, int, int], dict[Shape, CollectiveSample]] = {}
        self._surfaces: dict[tuple[str | int, ...], _Measured] = {}
        self._costs: dict[tuple[object, ...], Cost] = {}
        for kernel in profile.kernels:
            key = (kernel.op, kernel.dtype, kernel.variant)
            self._kernels.setdefault(key, {})[kernel.shape] = kernel
        for sample in profile.collectives:
            place = (sample.kind, sample.group_size, sample.stride)
            self._collectives.setdefault(place, {})[(sample.size_bytes,)] = sample

    def kernel(self, op: str, dtype: str, shape: Shape, variant: str = "") -> Cost:
        """Return the time of one call of `op` at `shape` (see `profiles.profile`).

        Raises UnsupportedError when no shape of this op, dtype and variant was measured.
        """
        key = (op, dtype, variant, shape)
        if key not in self._costs:
            self._costs[key] = self._kernel(op, dtype, variant, shape)
        return self._costs[key]

    def _kernel(self, op: str, dtype: str, variant: str, shape: Shape) -> Cost:
        measured = self.kernel_surface(op, dtype, variant)
        scale = "optimizer" if op in ("adamw", "clip") else "compute"
        return self._cost(*_quantiles(measured, shape), self.profile.scales.get(scale, 1.0))

    def kernel_surface(self, op: str, dtype: str, variant: str = "") -> _Measured:
        """Return the surface of one op, fitted at the first call; raises as `kernel` does."""
        key = (op, dtype, variant)
        if key not in self._kernels:
            known = sorted({" ".join(filter(None, key)) for key in self._kernels})
            name = " ".join(filter(None, (f"kernel {op} in {dtype}", variant)))
            raise UnsupportedError(_missing(name, known))
        if key not in self._surfaces:
            self._surfaces[key] = _measured(self._kernels[key], partial(kernel_works, op))
        return self._surfaces[key]

    def collective_surface(self, kind: str, group_size: int, stride: int = 1) -> _Measured:
        """Return the surface of one collective in a group that was measured, over its bytes."""
        key = (kind, group_size, stride)
        if key not in self._surfaces:
            self._surfaces[key] = _measured(self._collectives[key], collective_works)
        return self._surfaces[key]

    def collective(self, kind: str, group_size: int, size_bytes: int, stride: int = 1) -> Cost:
        """Return the time of one collective (or message) over the full buffer `size_bytes`.

        A group of one needs no traffic. A group that was not measured takes the curve of the
        nearest one, by size and then by stride, by the ratio of `ring_traffic`, and counts as
        extrapolated if its size is another. Raises UnsupportedError when this kind was not
        measured at all.
        """
        key = (kind, group_size, size_bytes, stride)
        if key not in self._costs:
            self._costs[key] = self._collective(kind, group_size, size_bytes, stride)
        return self._costs[key]

    def _collective(self, kind: str, group_size: int, size_bytes: int, stride: int) -> Cost:
        if group_size < 1 or size_bytes < 0:
            raise ValueError(
                f"{kind} has group_size {group_size} and size_bytes {size_bytes}; "
                "they must be at least 1 and 0"
            )
        if group_size == 1:
            return Cost(p10_ns=0, p50_ns=0, p90_ns=0)
        groups = [key[1:] for key in self._collectives if key[0] == kind]
        if not groups:
            known = sorted({name for name, _, _ in self._collectives})
            raise UnsupportedError(_missing(f"collective {kind}", known))
        nearest = min(groups, key=lambda group: (_apart(group[0], group_size),
                                                 _apart(group[1], stride), group))  # fmt: skip
        times, is_outside = _quantiles(
            self.collective_surface(kind, *nearest), (max(1, size_bytes),)
        )
        ratio = ring_traffic(kind, group_size) / ring_traffic(kind, nearest[0])
        factor = ratio * self.profile.scales.get("communication", 1.0)
        return self._cost(times, is_outside or nearest[0] != group_size, factor)

    def host(self, key: str) -> int:
        """Return a host cost in ns (see `Profile`); raises UnsupportedError if not measured."""
        if key not in self.profile.host_ns:
            raise UnsupportedError(_missing(f"host cost {key}", sorted(self.profile.host_ns)))
        return round(self.profile.host_ns[key] * self.profile.scales.get("host", 1.0))

    def reference(self, dtype: str = "fp32") -> Cost:
        """Return the time that the reference kernel had when this machine was measured."""
        shape = REFERENCE_SHAPES[self.profile.device.kind]
        is_kept = (REFERENCE_OP, dtype, "") in self._kernels
        return self.kernel(REFERENCE_OP if is_kept else "linear_forward", dtype, shape)

    @staticmethod
    def _cost(times: tuple[float, float, float], is_extrapolated: bool, factor: float) -> Cost:
        p10, p50, p90 = sorted(max(1, round(factor * t)) for t in times)
        return Cost(p10_ns=p10, p50_ns=p50, p90_ns=p90, is_extrapolated=is_extrapolated)


def _measured(
    samples: Mapping[Shape, KernelSample] | Mapping[Shape, CollectiveSample], works: Works
) -> _Measured:
    surface = Surface(
        {shape: sample.p50_ns for shape, sample in samples.items()}, works,
        # A band of 95 % is that of a difference of two medians.
        {shape: sample.band / (1.96 * math.sqrt(2.0)) for shape, sample in samples.items()},
    )  # fmt: skip
    ordered = [samples[shape] for shape in surface.shapes]
    below = np.log([sample.p50_ns / sample.p10_ns for sample in ordered])
    above = np.log([sample.p90_ns / sample.p50_ns for sample in ordered])
    return _Measured(surface, dict(samples), below, above)


def _quantiles(measured: _Measured, shape: Shape) -> tuple[tuple[float, float, float], bool]:
    """Return P10, P50 and P90 at `shape` in ns, and whether they are extrapolated."""
    if (sample := measured.samples.get(shape)) is not None:
        return (sample.p10_ns, sample.p50_ns, sample.p90_ns), False
    middle, deviation = measured.surface.at(shape)
    near = measured.surface.nearness(shape)
    below, above = (
        math.hypot(float(near @ spread), _DEVIATIONS * deviation)
        for spread in (measured.below, measured.above)
    )
    is_outside = not measured.surface.covers(shape) or deviation > UNSURE
    return (middle * math.exp(-below), middle, middle * math.exp(above)), is_outside


def _apart(left: int, right: int) -> float:
    """Return how far two sizes are from each other, on a logarithmic scale."""
    return abs(math.log(left / right))


def _missing(what: str, known: Sequence[str]) -> str:
    return (
        f"the profile has no {what} (it has: {', '.join(known) or 'none'}); "
        "`layline profile` measures it"
    )
