"""`layline bench profile`: does a profile hold what it says, on this machine, today.

Two questions are asked of a profile that was just measured. Measured again, do its entries stay
within their own bands? And are shapes that it has not seen what its interpolation says?
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from profiles.difference import difference
from profiles.lookup import CostTable
from profiles.measure.layers import ALONG_OPS
from profiles.measure.run import Device, OnProgress, measure, measure_again
from profiles.profile import KernelSample, Profile
from profiles.surface import Shape

# A shape that takes longer than this, in ns, would eat the time of the others.
_LONGEST_NS = 60_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Error of the interpolation of one op at shapes that the profile does not hold."""

    op: str
    dtype: str
    num_shapes: int
    median_error: float
    p90_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found; `within_band` is the share of entries that a repeat left in their band."""

    num_entries: int
    within_band: float
    median_change: float
    median_band: float
    held_out: tuple[HeldOut, ...]


def verify(
    num_ranks: int, device: Device, *, quick: bool, on_progress: OnProgress, per_op: int = 24
) -> Verified:
    """Return how a new profile of this machine does against a second one and at unseen shapes."""
    first = measure(num_ranks, device, quick=quick, on_progress=_part(on_progress, 0.0, 0.4))
    second = measure(num_ranks, device, quick=quick, on_progress=_part(on_progress, 0.4, 0.8))
    unseen = replace(
        first, collectives=(), kernels=tuple(held_out(first, per_op, random.Random(0)))
    )
    seen = measure_again(
        unseen, num_ranks, device, quick=quick, on_progress=_part(on_progress, 0.8, 1.0)
    )
    return compared(first, second, seen)


def _part(on_progress: OnProgress, begin: float, end: float) -> OnProgress:
    return lambda share, what: on_progress(begin + (end - begin) * share, what)


def compared(first: Profile, second: Profile, unseen: Profile) -> Verified:
    """Return how `first` does against a repeat, and against `unseen` shapes."""
    told = difference(first, second)
    table = CostTable(first)
    errors: dict[tuple[str, str], list[float]] = {}
    for kernel in unseen.kernels:
        cost = table.kernel(kernel.op, kernel.dtype, kernel.shape, kernel.variant)
        error = abs(cost.p50_ns / kernel.p50_ns - 1)
        errors.setdefault((kernel.op, kernel.dtype), []).append(error)
    return Verified(
        num_entries=len(told.changes),
        within_band=told.share_within or 0.0,
        median_change=median(abs(change.ratio - 1) for change in told.changes),
        median_band=median(change.band for change in told.changes),
        held_out=tuple(
            HeldOut(op=op, dtype=dtype, num_shapes=len(found), median_error=median(found),
                    p90_error=float(np.quantile(found, 0.9)))
            for (op, dtype), found in sorted(errors.items())
        ),
    )  # fmt: skip


def held_out(profile: Profile, per_op: int, chance: random.Random) -> list[KernelSample]:
    """Return up to `per_op` random shapes for each op, within what was measured but not of it.

    Their times are the predicted ones.
    """
    table, samples = CostTable(profile), []
    by_op: dict[tuple[str, str], list[KernelSample]] = {}
    for kernel in profile.kernels:
        if kernel.op not in ALONG_OPS and not kernel.variant:
            by_op.setdefault((kernel.op, kernel.dtype), []).append(kernel)
    for (op, dtype), measured in sorted(by_op.items()):
        known = {kernel.shape for kernel in measured}
        found: set[Shape] = set()
        for _ in range(20 * per_op):
            shape = _random_shape(op, sorted(known), chance)
            if len(found) == per_op:
                break
            if shape not in known | found:
                cost = table.kernel(op, dtype, shape)
                if cost.p50_ns < _LONGEST_NS:
                    found.add(shape)
                    sample = replace(measured[0], shape=shape, p10_ns=cost.p10_ns,
                                     p50_ns=cost.p50_ns, p90_ns=cost.p90_ns)  # fmt: skip
                    samples.append(sample)
    return samples


def _random_shape(op: str, known: Sequence[Shape], chance: random.Random) -> Shape:
    """Return sizes between the least and the most known, evenly on a logarithmic scale.

    Widths are multiples of 16, as those of models are; the heads of an attention are of a shape
    that is known.
    """
    axes = list(zip(*known, strict=True))
    if op.startswith("attention_"):
        _, heads, kv_heads, _, head = chance.choice(known)
        batch, seq = _between(axes[0], 1, chance), _between(axes[3], 16, chance)
        return batch, heads, kv_heads, seq, head
    step = 512 if len(axes) == 1 else 16
    return tuple(_between(axis, step, chance) for axis in axes)


def _between(axis: Sequence[int], step: int, chance: random.Random) -> int:
    low, high = min(axis), max(axis)
    size = math.exp(chance.uniform(math.log(low), math.log(high)))
    return min(max(round(size / step) * step, -(-low // step) * step), high // step * step)


def verified_text(found: Verified) -> str:
    """Return the figures as lines."""
    lines = [
        f"repeated: {100 * found.within_band:.1f} % of {found.num_entries} entries stay within "
        f"their band (median change {100 * found.median_change:.1f} %, "
        f"median band {100 * found.median_band:.1f} %)",
        "held out: error of the interpolation at shapes that were not measured",
        f"  {'op':24} {'dtype':5} {'shapes':>6} {'median':>7} {'P90':>7}",
    ]
    lines += [
        f"  {row.op:24} {row.dtype:5} {row.num_shapes:>6} {100 * row.median_error:>6.1f}% "
        f"{100 * row.p90_error:>6.1f}%"
        for row in found.held_out
    ]
    return "\n".join(lines)
