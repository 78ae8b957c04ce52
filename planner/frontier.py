"""The frontier: every start of the space with a lower bound of its step, best first."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from planner.bounds import ROUNDING_NS, Parts, parts_of_stages, pipelines, ranks_ns
from planner.evaluate import Basis
from planner.memory import least_memory
from planner.partition import dealt_stages, homes_of
from planner.plan import Rejection
from planner.space import Pipeline, Space, Start
from profiles.quantity import format_quantity

FEWEST_STARTS = 1024
"""Starts that are looked at however little time there is."""
MAX_EXAMPLES = 50
"""Rejections by one rule that are told in words; all are counted."""


@dataclass
class Tally:
    """What became of the layouts: rejected by a rule, bounded away, timed, or not even looked at.

    `told` counts the examples of each rule; `too_large` is the start that needs least of those that
    no rank can hold, and what that is.
    """

    rejected: Counter[str] = field(default_factory=Counter)
    examples: list[Rejection] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    num_bounded: int = 0
    num_timed: int = 0
    num_unseen: int = 0
    too_large: tuple[float, str] = (math.inf, "")

    @property
    def num_layouts(self) -> int:
        """Layouts that are accounted for."""
        return sum(self.rejected.values()) + self.num_bounded + self.num_timed

    def reject(self, rejection: Rejection, count: int = 1) -> None:
        """Count `count` layouts that are no choice, for the reason of `rejection`."""
        self.rejected[rejection.rule] += count
        if self.told[rejection.rule] < MAX_EXAMPLES:
            self.told[rejection.rule] += 1
            self.examples.append(rejection)

    def reject_more(self, rule: str, count: int) -> None:
        """Count more layouts that are no choice by `rule`."""
        self.rejected[rule] += count


class Bounded(NamedTuple):
    """A start with the layers of its stages; what each layout of it takes at least."""

    bound_ns: float
    least_bytes: int
    start: Start
    stage_layers: tuple[int, ...]
    num_layouts: int


class _Row(NamedTuple):
    """A start on its way to a bound."""

    start: Start
    parts: tuple[Parts, ...]
    least_bytes: int
    num_layouts: int


def frontier(
    space: Space, basis: Basis, tally: Tally, is_late: Callable[[], bool] = lambda: False
) -> list[Bounded]:
    """Return every start whose ranks can hold it at all, the one with the lowest bound first.

    The stages of all starts of a shape are dealt, timed and bounded side by side. Once there are
    some and `is_late` says so, further degrees are left unseen.
    """
    alike: dict[tuple[int, Pipeline], list[_Row]] = {}
    parts: dict[tuple[object, ...], tuple[Parts, ...]] = {}
    for start, least_bytes, num_layouts in _possible(space, basis, tally, is_late):
        if start.work not in parts:
            parts[start.work] = basis.parts(start.layout())
        row = _Row(start, parts[start.work], least_bytes, num_layouts)
        alike.setdefault((start.degrees.pp, start.pipeline), []).append(row)
    found: list[Bounded] = []
    for (pp, pipeline), rows in alike.items():
        found += _bounded(basis, pp, pipeline, rows)
    return sorted(found, key=_turn)


def _turn(bounded: Bounded) -> tuple[float, int, str, str]:
    """Return the place of a start: the lowest bound first, and of equals what cuts least."""
    start = bounded.start
    _, tp, pp, cp, ep = start.degrees
    return bounded.bound_ns, tp * pp * cp * ep, str(start), start.order


def _possible(
    space: Space, basis: Basis, tally: Tally, is_late: Callable[[], bool]
) -> Iterator[tuple[Start, int, int]]:
    """Yield the legal starts whose ranks can hold them: the least bytes, and how many layouts."""
    known: dict[tuple[object, ...], int] = {}
    num_found = 0
    for degrees in space.degrees():
        if num_found >= FEWEST_STARTS and is_late():
            tally.num_unseen += space.num_layouts(degrees)
            continue
        if rejection := space.rejection(degrees):
            tally.reject(rejection, space.num_layouts(degrees))
            continue
        shardings = len(space.shardings(degrees)) * len(space.recomputations)
        if not shardings:
            tally.reject(space.no_sharding(degrees), space.num_layouts(degrees))
            continue
        # The fullest rank may be one of those with most memory.
        more_bytes = max(basis.more_bytes(degrees.pp))
        pipelines_of, unlike = space.pipelines(degrees)
        for rejection, count in unlike:
            tally.reject(rejection, count)
        for pipeline in pipelines_of:
            starts, refused = space.starts(degrees, pipeline)
            num_layouts = shardings * len(pipeline.schedules)
            for rejection in refused:
                tally.reject(rejection, num_layouts)
            for start in starts:
                need_bytes = _least_bytes(basis, space, start, known) - more_bytes
                if need_bytes > basis.limit_bytes:
                    tally.reject(_too_large(start, need_bytes, basis.limit_bytes), num_layouts)
                    tally.too_large = min(tally.too_large, (need_bytes, str(start)))
                else:
                    num_found += 1
                    yield start, need_bytes, num_layouts


def _too_large(start: Start, need_bytes: int, limit_bytes: int) -> Rejection:
    need, have = (format_quantity(n, "bytes") for n in (need_bytes, limit_bytes))
    return Rejection(
        layout=str(start),
        rule="memory",
        reason=f"needs {need} a rank at least, however it is sharded; has {have}",
    )


def _bounded(basis: Basis, pp: int, pipeline: Pipeline, rows: Sequence[_Row]) -> Iterator[Bounded]:
    """Yield the starts of one pipeline with their stages and bounds."""
    parts = np.array([row.parts for row in rows])
    of = dict(zip(Parts._fields, np.moveaxis(parts, 2, 0), strict=True))
    homes = homes_of(pp, pipeline.stages_per_rank, pipeline.homes)
    last = homes[-1] % parts.shape[1]
    layers = dealt_stages(
        basis.costs.model.num_layers,
        homes,
        of["layer_forward"] + of["layer_backward"],
        (of["first_forward"] + of["first_backward"])[:, 0],
        (of["last_forward"] + of["last_backward"])[:, last],
    )
    m = np.array([row.start.num_microbatches for row in rows])
    stages = pipelines(parts_of_stages(parts, homes), layers)
    ends = ranks_ns(homes, stages, m, splits=pipeline.splits)
    bounds = ends.max(axis=1) + of["step"].min(axis=1) - ROUNDING_NS * len(homes) * m
    for row, bound, held in zip(rows, bounds.tolist(), layers.tolist(), strict=True):
        yield Bounded(bound, row.least_bytes, row.start, tuple(held), row.num_layouts)


def _least_bytes(
    basis: Basis, space: Space, start: Start, known: dict[tuple[object, ...], int]
) -> int:
    """Return what the fullest rank of a start holds at least, sharded and recomputed at will."""
    key = (start.degrees, start.micro_batch, start.sequence_parallel,
           start.pipeline.stages_per_rank)  # fmt: skip
    if key not in known:
        kinds, shardings = space.recomputations, space.shardings(start.degrees)
        layout = replace(start.layout(), sharding=shardings[-1][0])
        known[key] = least_memory(
            basis.costs.model, basis.costs.workload, layout, kinds, basis.costs.stack,
            basis.costs.context_bytes(layout),
        )  # fmt: skip
    return known[key]
