"""Trials: the layouts of one start, timed by their full schedules unless a bound rules them out."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from planner.bounds import Columns, Floats
from planner.evaluate import Basis
from planner.frontier import Bounded, Tally
from planner.layout import Layout
from planner.lower import median_step
from planner.orders import sample_of
from planner.partition import homes_of
from planner.plan import Rejection
from planner.schedules import SCHEDULES
from planner.space import Space
from planner.squeeze import squeezed
from profiles.quantity import format_quantity
from profiles.stack import Recompute
from simulator.schedule import Schedule

IsHopeless = Callable[[float, int], bool]
"""Whether a layout whose step takes so many ns and whose rank holds so many bytes at least is
worse than what was found."""


class Timed(NamedTuple):
    """A layout with the median of its step and the peak memory of its worst rank."""

    layout: Layout
    step_ns: int
    peak_bytes: int


class _Case(NamedTuple):
    """A layout without its schedule: its stages' times, and bounds of its step.

    `bounds_ns` are of schedules with whole backwards, and of those that split them.
    """

    layout: Layout
    columns: Columns
    bounds_ns: tuple[float, float]

    @property
    def least_ns(self) -> float:
        """The bound under any schedule."""
        return min(self.bounds_ns)


class Trials:
    """The trials of one search."""

    def __init__(self, space: Space, basis: Basis, tally: Tally) -> None:
        self.space, self.basis, self.tally = space, basis, tally
        self.short: list[Timed] = []
        """Layouts that do not fit, with a bound of their step and what they would need."""

    def of(self, bounded: Bounded, is_hopeless: IsHopeless) -> Iterator[Timed]:
        """Yield the layouts of a start that fit, timed; `is_hopeless` is asked before each."""
        start = bounded.start
        base = start.layout(bounded.stage_layers)
        kinds = self.space.shardings(start.degrees)
        layouts = [replace(base, sharding=kind, shard_group=group) for kind, group in kinds]
        cases = sorted(self._cases(layouts), key=lambda case: case.least_ns)
        for place, case in enumerate(cases):
            if is_hopeless(case.least_ns, 0):
                num_kinds = len(start.pipeline.schedules) * len(self.space.recomputations)
                self.tally.num_bounded += (len(cases) - place) * num_kinds
                return
            for name in start.pipeline.schedules:
                yield from self._scheduled(case, name, is_hopeless)

    def _cases(self, layouts: list[Layout]) -> Iterator[_Case]:
        """Yield the cases of layouts that differ in their sharding alone."""
        columns = self.basis.costs.columns(layouts)
        whole, halves = _bounds(layouts[0], columns)
        for row, layout in enumerate(layouts):
            yield _Case(layout, columns.row(row), (float(whole[row]), float(halves[row])))

    def _scheduled(self, case: _Case, name: str, is_hopeless: IsHopeless) -> Iterator[Timed]:
        """Yield what the layout is under one schedule, with each kind of recomputation."""
        splits, kinds = SCHEDULES[name].splits, self.space.recomputations
        bound_ns = case.bounds_ns[splits]
        if is_hopeless(bound_ns, 0):
            self.tally.num_bounded += len(kinds)
            return
        layout = replace(case.layout, schedule=name)
        sample = sample_of(layout)
        for place, kind in enumerate(kinds):
            made = self._made(layout, sample, kind)
            if isinstance(made, int):
                self._refuse(layout, kind, bound_ns, made)
                continue
            columns, peak_bytes = case.columns, self._peak(made, sample)
            if made.recompute != "none":
                columns = self.basis.costs.columns([made])
                if is_hopeless(float(_bounds(made, columns)[splits][0]), peak_bytes):
                    self.tally.num_bounded += 1
                    continue
            self.tally.num_timed += 1
            yield Timed(made, median_step(made, sample, columns), peak_bytes)
            if kind == "none":
                # What recomputes has nothing to gain where nothing needs to.
                self.tally.num_bounded += len(kinds) - place - 1
                return

    def _made(self, layout: Layout, sample: Schedule, kind: Recompute) -> Layout | int:
        """Return the layout made to fit by this kind of recomputation, or the bytes it needs."""
        basis = self.basis
        if kind == "none":
            need = self._peak(layout, sample)
            return layout if need <= basis.limit_bytes else need
        if "none" not in self.space.recomputations:
            whole = replace(layout, recompute=kind)
            need = self._peak(whole, sample)
            return whole if need <= basis.limit_bytes else need
        return squeezed(basis, replace(layout, recompute=kind), sample)

    def _peak(self, layout: Layout, sample: Schedule) -> int:
        return max(rank.total for rank in self.basis.memory(layout, sample))

    def _refuse(self, layout: Layout, kind: Recompute, bound_ns: float, need_bytes: int) -> None:
        """Count a layout that does not fit."""
        tried = layout if kind == "none" else replace(layout, recompute=kind)
        need, have = (format_quantity(n, "bytes") for n in (need_bytes, self.basis.limit_bytes))
        reason = f"needs {need} a rank, has {have}"
        self.tally.reject(Rejection(layout=str(tried), rule="memory", reason=reason))
        self.short.append(Timed(tried, round(bound_ns), need_bytes))


def _bounds(layout: Layout, columns: Columns) -> tuple[Floats, Floats]:
    """Return the bounds of layouts of these stages, with whole backwards and with split ones."""
    homes = homes_of(layout.pp, layout.stages_per_rank, SCHEDULES[layout.schedule].homes)
    whole, halves = (
        columns.bounds_ns(homes, layout.num_microbatches, splits=splits) for splits in (False, True)
    )
    return whole, halves
