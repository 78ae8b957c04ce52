"""Trials: the layouts of one start, timed by their full schedules unless a bound rules them out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.bounds import ROUNDING_NS, Columns, Floats, parts_of_stages, pipelines
from planner.evaluate import Basis
from planner.frontier import Bounded, Tally
from planner.layout import Layout
from planner.lower import median_step
from planner.memory import MemoryModel, stage_activation_bytes
from planner.orders import sample_of
from planner.partition import homes_of
from planner.plan import Rejection
from planner.schedules import SCHEDULES
from planner.space import Space
from planner.squeeze import Rooms, needs_of
from profiles.quantity import format_quantity
from profiles.stack import Recompute
from simulator.checks import Int64
from simulator.schedule import Schedule

IsHopeless = Callable[[float, int], bool]
"""Whether a layout whose step takes so many ns and whose rank holds so many bytes at least is
worse than what was found."""


class Timed(NamedTuple):
    """A layout with the median of its step and the peak memory of its worst rank."""

    layout: Layout
    step_ns: int
    peak_bytes: int


class Trials:
    """The trials of one search.

    `short` are layouts that do not fit, with a bound of their step and what they would need.
    """

    def __init__(self, space: Space, basis: Basis, tally: Tally) -> None:
        self.space, self.basis, self.tally = space, basis, tally
        self.short: list[Timed] = []

    def of(self, bounded: Bounded, is_hopeless: IsHopeless) -> Iterator[Timed]:
        """Yield the layouts of a start that fit, timed; `is_hopeless` is asked before each."""
        cases, kinds = _Cases(self.space, self.basis, bounded), self.space.recomputations
        num_orders = len(bounded.start.pipeline.schedules) * len(kinds)
        rows = cases.holding(kinds[-1])
        columns = cases.columns_of(rows)
        if not len(rows):
            self._refuse_start(cases, bounded.start.pipeline.schedules, columns)
            return
        self.tally.reject_more("memory", num_orders * (len(cases.layouts) - len(rows)))
        # The last in the table idle least: what they reach rules most of the others out.
        for name in reversed(bounded.start.pipeline.schedules):
            least = cases.bounds_ns(columns, splits=SCHEDULES[name].splits)
            left = np.array([row for row in rows if not is_hopeless(float(least[row]), 0)], int)
            self.tally.num_bounded += (len(rows) - len(left)) * len(kinds)
            for kind in kinds if len(left) else ():
                tried = cases.tried(name, kind, left, columns)
                self._refuse_all(cases, tried)
                yield from self._scheduled(cases, tried.only(tried.fits), columns, is_hopeless)
                if kind == "none":
                    # What recomputes has nothing to gain where nothing needs to.
                    self.tally.num_bounded += int(tried.fits.sum()) * (len(kinds) - 1)
                    left = left[~tried.fits]

    def _scheduled(
        self, cases: "_Cases", tried: "_Tried", columns: Columns, is_hopeless: IsHopeless
    ) -> Iterator[Timed]:
        """Yield those of `tried` that are worth it with all that they exchange."""
        sample, bounds = sample_of(cases.layout(0, tried.schedule)), tried.bounds
        for place in np.argsort(bounds, kind="stable").tolist():
            row, bound_ns = int(tried.rows[place]), float(bounds[place])
            if is_hopeless(bound_ns, 0):
                self.tally.num_bounded += 1
                continue
            layout = cases.layout(
                row, tried.schedule, tried.kind, tuple(tried.again[place].tolist())
            )
            yield from self._timed(layout, columns.row(row), sample, bound_ns)

    def _refuse_start(self, cases: "_Cases", schedules: Sequence[str], columns: Columns) -> None:
        """Count a start of which nothing fits; what needs least by each schedule is remembered."""
        kinds, rows = self.space.recomputations, np.arange(len(cases.layouts))
        self.tally.reject_more("memory", len(rows) * len(schedules) * (len(kinds) - 1))
        for name in schedules:
            self._refuse_all(cases, cases.tried(name, kinds[-1], rows, columns))

    def _refuse_all(self, cases: "_Cases", tried: "_Tried") -> None:
        """Count what does not fit; the one that needs least is remembered."""
        short = np.flatnonzero(~tried.fits)
        if len(short):
            self.tally.reject_more("memory", len(short) - 1)
            least = int(short[np.argmin(tried.needs[short])])
            layout = cases.layout(int(tried.rows[least]), tried.schedule, tried.kind)
            self.refuse(layout, float(tried.bounds[least]), int(tried.needs[least]))

    def _timed(
        self, layout: Layout, columns: Columns, sample: Schedule, bound_ns: float
    ) -> Iterator[Timed]:
        """Yield a layout that should fit, timed; rounding may take it a layer more to."""
        while (peak_bytes := self._peak(layout, sample)) > self.basis.limit_bytes:
            more = tuple(map(min, (n + 1 for n in layout.recompute_layers), layout.stage_layers))
            if more == layout.recompute_layers:
                self.refuse(layout, bound_ns, peak_bytes)
                return
            layout = replace(layout, recompute_layers=more)
        if layout.recompute != "none":
            columns = self.basis.costs.columns([layout])
        yield Timed(layout, median_step(layout, sample, columns), peak_bytes)

    def _peak(self, layout: Layout, sample: Schedule) -> int:
        return self.basis.peak_bytes(self.basis.memory(layout, sample))

    def refuse(self, layout: Layout, bound_ns: float, need_bytes: int) -> None:
        """Count a layout that does not fit."""
        need, have = (format_quantity(n, "bytes") for n in (need_bytes, self.basis.limit_bytes))
        reason = f"needs {need} a rank, has {have}"
        self.tally.reject(Rejection(layout=str(layout), rule="memory", reason=reason))
        self.short.append(Timed(layout, round(bound_ns), need_bytes))


class _Tried(NamedTuple):
    """Layouts of one start under one schedule and kind of recomputation: R rows of its cases.

    `again` [R, S] are the layers that each stage recomputes, `fits` [R] says whether that does,
    `needs` [R] what the fullest rank holds with nothing kept, and `bounds` [R] are of their work.
    """

    schedule: str
    kind: Recompute
    rows: Int64
    again: Int64
    fits: npt.NDArray[np.bool_]
    needs: Int64
    bounds: Floats

    def only(self, which: npt.NDArray[np.bool_]) -> "_Tried":
        """Return some of the rows."""
        return self._replace(
            rows=self.rows[which], again=self.again[which], fits=self.fits[which],
            needs=self.needs[which], bounds=self.bounds[which],
        )  # fmt: skip


class _Cases:
    """The layouts of one start, which differ in their sharding, side by side."""

    def __init__(self, space: Space, basis: Basis, bounded: Bounded) -> None:
        self.basis, start = basis, bounded.start
        base = start.layout(bounded.stage_layers)
        self.layouts = [
            replace(base, sharding=kind, shard_group=group)
            for kind, group in space.shardings(start.degrees)
        ]
        self._base, self._m = base, base.num_microbatches
        self._layers = np.array(bounded.stage_layers)
        self._homes = homes_of(base.pp, base.stages_per_rank, start.pipeline.homes)
        self._more_bytes = basis.more_bytes(base.pp)
        self._is_whole = "none" not in space.recomputations
        # By kinds of recomputation: what does not depend on the schedule.
        self._room: dict[Recompute, Rooms] = {}
        self._kept: dict[Recompute, Int64] = {}
        self._parts: dict[Recompute, Floats] = {}

    def layout(
        self, row: int, schedule: str, kind: Recompute = "none", again: tuple[int, ...] = ()
    ) -> Layout:
        """Return the layout of a row under a schedule, `again` layers of each stage recomputed."""
        kept = again if kind != "none" and not self._is_whole else ()
        return replace(self.layouts[row], schedule=schedule, recompute=kind, recompute_layers=kept)

    def holding(self, kind: Recompute) -> Int64:
        """Return the rows whose ranks hold a micro-batch of one stage that recomputes all."""
        rooms = self._rooms(kind)
        room = (rooms.left - rooms.working).min(axis=1)
        return np.flatnonzero(room >= self._activations(kind).min())

    def columns_of(self, rows: Int64) -> Columns:
        """Return columns of all layouts, of which those of `rows` alone are filled in."""
        shape = len(self.layouts), len(self._layers)
        found = Columns(*(np.zeros(shape, np.int64) for _ in Columns._fields))
        if len(rows):
            some = self.basis.costs.columns([self.layouts[row] for row in rows.tolist()])
            for column, filled in zip(found, some, strict=True):
                column[rows] = filled
        return found

    def bounds_ns(self, columns: Columns, *, splits: bool) -> Floats:
        """Return bounds of the steps of `columns`."""
        return columns.bounds_ns(self._homes, self._m, splits=splits)

    def tried(self, schedule: str, kind: Recompute, rows: Int64, columns: Columns) -> _Tried:
        """Return what these rows are under one schedule, recomputing as much as they must."""
        sample = sample_of(replace(self._base, schedule=schedule))
        least = self._activations(kind)
        kept = least if self._is_whole else self._activations("none")
        needs = needs_of(sample, self._layers, kept, least)
        rooms = self._rooms(kind).rows(rows)
        counts, fits = needs.fewest(rooms)
        own = Columns(*(column[rows] for column in columns))
        if kind == "none":
            fits, counts = fits & (counts.max(axis=1, initial=0) == 0), np.zeros_like(counts)
        else:
            if self._is_whole:
                counts = np.broadcast_to(self._layers, counts.shape)
            own = own._replace(backward=np.maximum(own.backward, self._recomputing(kind, counts)))
        bounds = self.bounds_ns(own, splits=SCHEDULES[schedule].splits)
        return _Tried(schedule, kind, rows, counts, fits, needs.least_bytes(rooms), bounds)

    def _recomputing(self, kind: Recompute, again: Int64) -> Int64:
        """Return backwards, [R, S], that are no longer than those that recompute so much."""
        if kind not in self._parts:
            parts = np.array([self.basis.parts(replace(self._base, recompute=kind))])
            self._parts[kind] = parts_of_stages(parts, self._homes)
        own = self._parts[kind]
        table = np.broadcast_to(own, (len(again), *own.shape[1:]))
        backward = pipelines(table, self._layers[None, :], again).backward
        return np.floor(backward).astype(np.int64) - ROUNDING_NS

    def _rooms(self, kind: Recompute) -> Rooms:
        """Return what the ranks of all layouts have left for activations."""
        if kind not in self._room:
            costs = self.basis.costs
            layout = replace(self._base, recompute=kind)
            ranks = MemoryModel(
                costs.model, costs.workload, layout, self._homes.tolist(), costs.stack
            )
            context = costs.context_bytes(layout)
            held = [ranks.held(each, context) for each in self.layouts]
            limits = self.basis.limit_bytes + np.array(self._more_bytes)
            self._room[kind] = Rooms.of(held, ranks.alike, limits, self.basis.host_bytes)
        return self._room[kind]

    def _activations(self, kind: Recompute) -> Int64:
        """Return what each stage keeps of a micro-batch, [S]."""
        if kind not in self._kept:
            costs, layout = self.basis.costs, replace(self._base, recompute=kind)
            self._kept[kind] = np.array(
                stage_activation_bytes(costs.model, costs.workload, layout, costs.stack)
            )
        return self._kept[kind]
