"""Times kernels on all ranks at once: at shapes that designs choose, or those of an earlier pass.

All ranks run the same op at the same time: on shared cores and memory, contention is part of the
truth.
"""

import random
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import final

import torch
import torch.distributed as dist

from profiles.lookup import kernel_works
from profiles.measure.buffers import TORCH_DTYPES
from profiles.measure.design import Design
from profiles.measure.ops import ops_of, variants
from profiles.measure.shapes import anchors, candidates
from profiles.measure.sweep import Exploration, Keep, KernelPoint, Sweep
from profiles.measure.timing import Budget, Clock, OnPoint
from profiles.profile import KernelSample
from profiles.surface import Shape

# For one burst of calls.
QUICK = Budget(time_ns=3_000_000, min_samples=2, max_samples=60)
FULL = Budget(time_ns=8_000_000, min_samples=2, max_samples=60)
# Of one call, by whether in a hurry: what takes longer is interpolated well by its law alone.
_LONGEST_NS = {True: 20_000_000, False: 60_000_000}

# A round is so many surfaces, and so many shapes of each: few enough to follow what was found,
# many enough that fitting does not take the time of measuring.
_SURFACES_A_ROUND, _SHAPES_A_ROUND = 4, 3

# Other variants are there to be compared with the default, at few shapes.
_VARIANT_SHAPES, _VARIANTS_UNTIL = 3, 0.5
_REPEATS_TO_KEEP, _MOST_REPEATS = 40, 8


def explore(
    device: torch.device, dtypes: Sequence[str], ops: Sequence[str], quick: bool, clock: Clock,
    report: OnPoint, keep: Keep,
) -> Exploration:  # fmt: skip
    """Return the times of `ops` at shapes chosen as it goes; all ranks call this alike.

    First every op has the seeds of its design, in turns, so that an early end finds all of them;
    then each round goes to the surfaces that state the largest error, until all are settled or the
    clock is over. `keep` is told of all samples after each round, on all ranks.
    """
    sweep = Sweep(device, QUICK if quick else FULL, clock, report, keep)
    surfaces = _designs(sweep, dtypes, ops, quick)
    asked = _in_turns([surface.seeds() for surface in surfaces])
    sweep.run(asked)
    if not quick:
        rare = _in_turns([
            surface.other_variants(variant)
            for surface in surfaces
            for variant in variants(surface.op, device.type)[1:]
            if sweep.can_run(surface.op, surface.dtype, variant)
        ])  # fmt: skip
        sweep.run(rare, until=_VARIANTS_UNTIL)
        asked += rare
    while not sweep.is_over and (points := _next_round(surfaces, sweep)):
        sweep.run(points)
    return sweep.finished(asked)


def repeat(
    device: torch.device, points: Sequence[KernelPoint], quick: bool, clock: Clock,
    report: OnPoint, keep: Keep, seed: int = 0,
) -> Exploration:  # fmt: skip
    """Return the times of `points` again, and again while there is time; all ranks call this alike.

    The order is shuffled by `seed`: a disturbance then hits some points of all ops, and not one op
    at all its shapes.
    """
    sweep = Sweep(device, QUICK if quick else FULL, clock, report, keep)
    order = [point for point in points if sweep.can_run(point.op, point.dtype, point.variant)]
    random.Random(seed).shuffle(order)
    for _ in range(_MOST_REPEATS):
        for begin in range(0, len(order), _REPEATS_TO_KEEP):
            sweep.run(order[begin : begin + _REPEATS_TO_KEEP])
            if sweep.is_over:
                return sweep.finished(order)
    return sweep.finished(order)


@final
class _Explored:
    """One op in one dtype, with the design of its default variant."""

    def __init__(self, op: str, dtype: str, design: Design) -> None:
        self.op, self.dtype, self.design = op, dtype, design

    def seeds(self) -> list[KernelPoint]:
        """Return the points to begin with."""
        return [self.point(shape) for shape in self.design.seeds()]

    def other_variants(self, variant: str) -> list[KernelPoint]:
        """Return points of another variant: seeds from the least to the most work."""
        seeds = sorted(self.design.seeds(), key=lambda shape: kernel_works(self.op, shape)[0])
        step = max(1, (len(seeds) - 1) // (_VARIANT_SHAPES - 1))
        return [self.point(shape, variant) for shape in seeds[::step]][:_VARIANT_SHAPES]

    def point(self, shape: Shape, variant: str = "") -> KernelPoint:
        """Return the point of this op at `shape`."""
        return KernelPoint(op=self.op, dtype=self.dtype, shape=shape, variant=variant)

    def worth(self, samples: Mapping[KernelPoint, KernelSample]) -> float:
        """Return what another sample is worth: stated error over target, less where many are.

        What many samples have not settled is noise of the machine, which more would not settle.
        """
        times = self.times(samples)
        excess = self.design.error(times).excess if times else 0.0
        return excess / len(times) if excess > 1.0 else 0.0

    def times(self, samples: Mapping[KernelPoint, KernelSample]) -> dict[Shape, int]:
        """Return the medians of this op's default variant by shape."""
        return {
            point.shape: sample.p50_ns
            for point, sample in samples.items()
            if (point.op, point.dtype, point.variant) == (self.op, self.dtype, "")
        }


def _in_turns(rows: Sequence[Sequence[KernelPoint]]) -> list[KernelPoint]:
    """Return the first of every row, then the second of every row, and so on."""
    return [point for turn in zip_longest(*rows) for point in turn if point is not None]


def _next_round(surfaces: Sequence[_Explored], sweep: Sweep) -> list[KernelPoint]:
    """Return what to measure next, empty when all is settled.

    The same samples give the same choice but for the last bits of unlike processors, so the first
    rank chooses for all.
    """
    rows = torch.full((_SURFACES_A_ROUND * _SHAPES_A_ROUND, 2), -1, dtype=torch.int64)
    if dist.get_rank() == 0:
        chosen: list[tuple[int, int]] = []
        worths = {i: surface.worth(sweep.samples) for i, surface in enumerate(surfaces)}
        for i in sorted(worths, key=lambda i: (-worths[i], i)):
            if not worths[i] or len(chosen) + _SHAPES_A_ROUND > len(rows):
                break
            surface, design = surfaces[i], surfaces[i].design
            failed = [point.shape for point in sweep.failed if surface.point(point.shape) == point]
            found = design.next(surface.times(sweep.samples), _SHAPES_A_ROUND, failed)
            chosen += [(i, design.candidates.index(shape)) for shape in found]
        rows[: len(chosen)] = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
    rows = rows.to(sweep.device)
    dist.broadcast(rows, 0)
    return [surfaces[i].point(surfaces[i].design.candidates[j]) for i, j in rows.tolist() if i >= 0]


def _designs(
    sweep: Sweep, dtypes: Sequence[str], ops: Sequence[str], quick: bool
) -> list[_Explored]:
    explored = []
    for dtype in dtypes:
        known = [op for op in ops_of(sweep.device.type, dtype) if op in ops]
        known = [op for op in known if sweep.can_run(op, dtype)]
        limits = sweep.limits(dtype, _LONGEST_NS[quick]) if known else None
        for op in known:
            assert limits is not None
            shapes = candidates(op, TORCH_DTYPES[dtype].itemsize, sweep.device.type, limits, quick)
            fixed = [shape for shape in anchors(op, sweep.device.type) if shape in shapes]
            design = Design(
                shapes, partial(kernel_works, op), anchors=fixed, longest_ns=limits.longest_ns,
                overhead_ns=sweep.budget.time_ns,
            )  # fmt: skip
            explored.append(_Explored(op, dtype, design))
    return explored
