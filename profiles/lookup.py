"""Costs read out of a `Profile`: kernels and collectives interpolated, scaled, with their band."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import final

from profiles.errors import UnsupportedError
from profiles.profile import Cost, Profile

Shape = tuple[int, ...]
Times = tuple[float, float, float]

# The kernel that `profiles.measure.reference` repeats, by kind of device; a point of every grid.
REFERENCE_OP = "linear_forward"
REFERENCE_SHAPES: Mapping[str, Shape] = {"cpu": (512, 256, 256), "cuda": (4096, 4096, 4096)}


def kernel_work(op: str, shape: Shape) -> float:
    """Return the work of a kernel, the quantity that its time is taken to grow with.

    linear: 2 m n k flops. attention: batch * heads * seq^2 * head. embedding_backward:
    (rows + vocab) * width, since the gradient is dense. embedding_forward: rows * width. All
    others: the product of the shape, which is the number of elements.

    >>> kernel_work("linear_forward", (2, 3, 4))
    48.0
    """
    if op.startswith("linear_"):
        return 2.0 * math.prod(shape)
    if op.startswith("attention_"):
        batch, heads, seq, head = shape
        return float(batch * heads * seq * seq * head)
    if op.startswith("embedding_"):
        rows, width, vocab = shape
        return float((rows + vocab if op == "embedding_backward" else rows) * width)
    return float(math.prod(shape))


def ring_traffic(kind: str, group_size: int) -> float:
    """Return how often the full buffer passes one rank's link in a ring of `group_size` n.

    2 (n - 1) / n for an all-reduce, (n - 1) / n for an all-gather or reduce-scatter, 1 for a
    message. Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", JPDC 69 (2009).

    >>> ring_traffic("all_reduce", 4)
    1.5
    """
    if kind == "send_recv":
        return 1.0
    return (2 if kind == "all_reduce" else 1) * (group_size - 1) / group_size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Measured times on a full product of axes, as logarithms of time per work.

    `axes` holds the measured sizes, ascending; `values` maps a point's indices to the logarithms
    for p10, p50 and p90.
    """

    axes: tuple[tuple[int, ...], ...]
    logs: tuple[tuple[float, ...], ...]
    values: Mapping[Shape, Times]
    filled: frozenset[Shape]

    def at(self, shape: Shape, work: Callable[[Shape], float]) -> tuple[Times, bool]:
        """Return the times in ns at `shape`, and whether it left the measured range.

        t(s) = work(s) * exp(sum_c weight_c * ln(t_c / work_c)) over the corners c of the cell
        that holds s, weights multilinear in ln(s). Beyond the last size of an axis the edge's
        time per work holds; below the first its time holds.
        """
        is_outside = False
        sides: list[tuple[tuple[int, float], ...]] = []
        for axis, logs, size in zip(self.axes, self.logs, shape, strict=True):
            high = bisect_right(axis, size)
            if high == 0 or size > axis[-1]:
                is_outside = True
            if high in (0, len(axis)) or axis[high - 1] == size:
                sides.append(((max(0, high - 1), 1.0),))
                continue
            part = (math.log(size) - logs[high - 1]) / (logs[high] - logs[high - 1])
            sides.append(((high - 1, 1.0 - part), (high, part)))
        totals = [0.0, 0.0, 0.0]
        for corner in product(*sides):
            place = tuple(index for index, _ in corner)
            weight = math.prod(part for _, part in corner)
            is_outside = is_outside or place in self.filled
            for quantile, value in enumerate(self.values[place]):
                totals[quantile] += weight * value
        raised = tuple(max(size, axis[0]) for axis, size in zip(self.axes, shape, strict=True))
        amount = work(raised)
        p10, p50, p90 = (amount * math.exp(total) for total in totals)
        return (p10, p50, p90), is_outside


def _grid(times: Mapping[Shape, Times], work: Callable[[Shape], float]) -> _Grid:
    """Return the grid of `times`; a point that was left out has its nearest neighbour's rate."""
    axes = tuple(tuple(sorted(set(sizes))) for sizes in zip(*times, strict=True))
    values: dict[Shape, Times] = {}
    filled = set()
    for place in product(*(range(len(axis)) for axis in axes)):
        shape = tuple(axis[index] for axis, index in zip(axes, place, strict=True))
        source = shape
        if shape not in times:
            source = min(times, key=lambda other: (_distance(other, shape), other))
            filled.add(place)
        p10, p50, p90 = (math.log(max(t, 1.0) / work(source)) for t in times[source])
        values[place] = (p10, p50, p90)
    return _Grid(
        axes=axes,
        logs=tuple(tuple(map(math.log, axis)) for axis in axes),
        values=values,
        filled=frozenset(filled),
    )


def _distance(left: Shape, right: Shape) -> float:
    return sum(abs(math.log(a / b)) for a, b in zip(left, right, strict=True))


@final
class CostTable:
    """The costs of one profile, made ready once and then looked up thousands of times.

    Recalibration's factors, `profile.scales`, are applied: `compute` to kernels, `optimizer` to
    adamw, `communication` to collectives, `host` to host costs.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._kernels: dict[tuple[str, str], _Grid] = {}
        self._collectives: dict[tuple[str, int], _Grid] = {}
        self._costs: dict[tuple[str, str, Shape], Cost] = {}
        self._messages: dict[tuple[str, int, int], Cost] = {}
        kernels: dict[tuple[str, str], dict[Shape, Times]] = {}
        for kernel in profile.kernels:
            found = kernels.setdefault((kernel.op, kernel.dtype), {})
            found[kernel.shape] = (kernel.p10_ns, kernel.p50_ns, kernel.p90_ns)
        for (op, dtype), times in kernels.items():
            self._kernels[op, dtype] = _grid(times, partial(kernel_work, op))
        collectives: dict[tuple[str, int], dict[Shape, Times]] = {}
        for sample in profile.collectives:
            found = collectives.setdefault((sample.kind, sample.group_size), {})
            found[(sample.size_bytes,)] = (sample.p10_ns, sample.p50_ns, sample.p90_ns)
        for key, times in collectives.items():
            self._collectives[key] = _grid(times, _size)

    def kernel(self, op: str, dtype: str, shape: Shape) -> Cost:
        """Return the time of one call of `op` at `shape` (see `profiles.profile`).

        Raises UnsupportedError when no shape of this op and dtype was measured.
        """
        key = (op, dtype, shape)
        if key not in self._costs:
            self._costs[key] = self._kernel(op, dtype, shape)
        return self._costs[key]

    def _kernel(self, op: str, dtype: str, shape: Shape) -> Cost:
        grid = self._kernels.get((op, dtype))
        if grid is None:
            known = sorted({f"{name} {kind}" for name, kind in self._kernels})
            raise UnsupportedError(_missing(f"kernel {op} in {dtype}", known))
        if len(shape) != len(grid.axes) or min(shape) < 1:
            raise ValueError(
                f"the shape of {op} is {shape}; it must be {len(grid.axes)} sizes of at least 1"
            )
        times, is_outside = grid.at(shape, partial(kernel_work, op))
        return self._cost(times, "optimizer" if op == "adamw" else "compute", is_outside)

    def collective(self, kind: str, group_size: int, size_bytes: int) -> Cost:
        """Return the time of one collective (or message) over the full buffer `size_bytes`.

        A group of one needs no traffic. A group size that was not measured takes the curve of
        the nearest one, by the ratio of `ring_traffic`, and counts as extrapolated. Raises
        UnsupportedError when this kind was not measured at all.
        """
        key = (kind, group_size, size_bytes)
        if key not in self._messages:
            self._messages[key] = self._collective(kind, group_size, size_bytes)
        return self._messages[key]

    def _collective(self, kind: str, group_size: int, size_bytes: int) -> Cost:
        if group_size < 1 or size_bytes < 0:
            raise ValueError(
                f"{kind} has group_size {group_size} and size_bytes {size_bytes}; "
                "they must be at least 1 and 0"
            )
        if group_size == 1:
            return Cost(p10_ns=0, p50_ns=0, p90_ns=0)
        measured = [size for name, size in self._collectives if name == kind]
        if not measured:
            known = sorted({name for name, _ in self._collectives})
            raise UnsupportedError(_missing(f"collective {kind}", known))
        nearest = min(measured, key=lambda size: (abs(math.log(size / group_size)), size))
        times, is_outside = self._collectives[kind, nearest].at((max(1, size_bytes),), _size)
        factor = ring_traffic(kind, group_size) / ring_traffic(kind, nearest)
        p10, p50, p90 = (factor * t for t in times)
        return self._cost((p10, p50, p90), "communication", is_outside or nearest != group_size)

    def host(self, key: str) -> int:
        """Return a host cost in ns (see `Profile`); raises UnsupportedError if not measured."""
        if key not in self.profile.host_ns:
            raise UnsupportedError(_missing(f"host cost {key}", sorted(self.profile.host_ns)))
        return round(self.profile.host_ns[key] * self.profile.scales.get("host", 1.0))

    def reference(self, dtype: str = "fp32") -> Cost:
        """Return the time that the reference kernel had when this machine was measured."""
        return self.kernel(REFERENCE_OP, dtype, REFERENCE_SHAPES[self.profile.device.kind])

    def _cost(self, times: Times, scale: str, is_extrapolated: bool) -> Cost:
        factor = self.profile.scales.get(scale, 1.0)
        p10, p50, p90 = sorted(max(1, round(factor * t)) for t in times)
        return Cost(p10_ns=p10, p50_ns=p50, p90_ns=p90, is_extrapolated=is_extrapolated)


def _size(shape: Shape) -> float:
    """Return the work of a collective: its bytes."""
    return float(shape[0])


def _missing(what: str, known: Sequence[str]) -> str:
    return (
        f"the profile has no {what} (it has: {', '.join(known) or 'none'}); "
        "`layline profile` measures it"
    )
