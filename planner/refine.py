"""The last part of the search: orders that are made for the best few pipelines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from planner.evaluate import Basis
from planner.layout import Layout
from planner.lower import MEDIAN, predict_step, stage_times
from planner.memory import stage_activation_bytes
from planner.plan import Candidate, PeakMemory, Rejection
from planner.schedules import SCHEDULES
from planner.space import SYNTHESISED
from planner.synthesis import DEFAULT_TRIALS, ActivationCap, synthesise
from simulator.schedule import Schedule

NUM_REFINED = 3
"""Pipelines to make an order for. An order gains some percent, which lets a pipeline pass those
just in front of it; from further behind none comes to the top."""
MAX_WORK = 2_000_000
"""Actions to put in place, for all pipelines together: less than a second."""
NUM_BEGUN = 350
"""Orders that `synthesise` begins with, at most: those of its rules and of the named schedules."""


_Pipeline = tuple[int | str, ...]


class Refined(NamedTuple):
    """What became of synthesised layouts: of each candidate that fits, `orders` has the order."""

    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    orders: Mapping[Layout, Schedule]


NOTHING_REFINED = Refined((), (), {})


class _Placement(NamedTuple):
    """Where stages live: a schedule of one micro-batch, and what each rank holds under it.

    `need_bytes` is the least that any order needs on the fullest rank.
    """

    single: Schedule
    memory: tuple[PeakMemory, ...]
    need_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A layout to make an order for, in any of `placements`."""

    layout: Layout
    placements: tuple[_Placement, ...]

    @property
    def num_actions(self) -> int:
        """Actions of an order that splits every backward, in all placements."""
        layout = self.layout
        return 3 * layout.num_stages * layout.num_microbatches * len(self.placements)


def refine(basis: Basis, named: Sequence[Candidate], asked: Sequence[str], seed: int) -> Refined:
    """Return what orders of their own make of the best pipelines among `named`.

    Such a layout is a candidate where it is faster than all schedules `asked` for under which its
    pipeline fits. Pipelines that fit under no named one come last, since an order made for a cap
    can do with less; one that cannot hold even a micro-batch at a time is returned with what that
    needs, and with its named step.
    """
    cases, needs = _cases(basis, named)
    fastest_ns = _fastest_ns(basis, named, asked)
    found: list[Candidate] = []
    rejections: list[Rejection] = []
    orders: dict[Layout, Schedule] = {}
    work = MAX_WORK
    for place, case in enumerate(cases):
        num_trials = _num_trials(case, work, len(cases) - place)
        if num_trials < 0:
            rejections.append(_too_long(case))
            continue
        work -= case.num_actions * (NUM_BEGUN + num_trials)
        best, schedule = _made(basis, case, num_trials, seed)
        to_beat_ns = fastest_ns.get(_pipeline(case.layout))
        if to_beat_ns is None or best.step.p50_ns < to_beat_ns:
            found.append(best)
            orders[case.layout] = schedule
    return Refined((*found, *needs), tuple(rejections), orders)


def _cases(basis: Basis, named: Sequence[Candidate]) -> tuple[list[_Case], list[Candidate]]:
    """Return the best pipelines that have room for a micro-batch, and those before them without."""
    cases: list[_Case] = []
    needs: list[Candidate] = []
    for start in _best_of_each_pipeline(basis, named):
        layout = replace(start.layout, schedule=SYNTHESISED)
        placements = _placements(basis, layout)
        fitting = tuple(each for each in placements if each.need_bytes <= basis.limit_bytes)
        if fitting:
            cases.append(_Case(layout=layout, placements=fitting))
        else:
            least_bytes = min(each.need_bytes for each in placements)
            needs.append(replace(start, layout=layout, peak_bytes=least_bytes))
        if len(cases) == NUM_REFINED:
            break
    return cases, needs


def _best_of_each_pipeline(basis: Basis, named: Sequence[Candidate]) -> list[Candidate]:
    """Return the fastest of each pipeline, those that fit in front."""
    found: dict[_Pipeline, Candidate] = {}
    for each in sorted(
        (each for each in named if each.layout.pp > 1),
        key=lambda c: (
            c.peak_bytes > basis.limit_bytes,
            c.step.p50_ns,
            c.peak_bytes,
            str(c.layout),
        ),
    ):
        found.setdefault(_pipeline(each.layout), each)
    return list(found.values())


def _fastest_ns(
    basis: Basis, named: Sequence[Candidate], asked: Sequence[str]
) -> dict[_Pipeline, int]:
    """Return the step of each pipeline under the best schedule asked for that fits."""
    fastest_ns: dict[_Pipeline, int] = {}
    for each in named:
        if each.layout.schedule in asked and each.peak_bytes <= basis.limit_bytes:
            key, ns = _pipeline(each.layout), each.step.p50_ns
            fastest_ns[key] = min(ns, fastest_ns.get(key, ns))
    return fastest_ns


def _pipeline(layout: Layout) -> _Pipeline:
    """Return what layouts have in common that differ in schedule and recomputation alone."""
    return (
        layout.dp, layout.tp, layout.cp, layout.ep, layout.pp, layout.stages_per_rank,
        layout.micro_batch, layout.sequence_parallel, layout.order, layout.sharding,
        layout.shard_ranks,
    )  # fmt: skip


def _placements(basis: Basis, layout: Layout) -> list[_Placement]:
    """Return each way in which a named schedule places the stages of `layout`."""
    found: dict[bytes, _Placement] = {}
    for family in SCHEDULES.values():
        if family.takes(layout.stages_per_rank):
            single = family.build(layout.pp, 1, layout.stages_per_rank)
            key = single.homes.tobytes()
            if key not in found:
                memory = basis.memory(layout, single)
                found[key] = _Placement(single, memory, basis.peak_bytes(memory))
    return list(found.values())


def _num_trials(case: _Case, work: int, num_cases: int) -> int:
    """Return the trials for `case`, negative if `work` does not do to begin with it.

    A case may begin with more than its share of the work, but takes no trials from others.
    """
    if NUM_BEGUN * case.num_actions > work:
        return -1
    share = work // num_cases // case.num_actions - NUM_BEGUN
    return min(max(share, 0), DEFAULT_TRIALS)


def _made(basis: Basis, case: _Case, num_trials: int, seed: int) -> tuple[Candidate, Schedule]:
    """Return the fastest order of `case`, and what the layout is under it."""
    activations = stage_activation_bytes(
        basis.costs.model, basis.costs.workload, case.layout, basis.costs.stack
    )
    more_bytes, found = basis.more_bytes(case.layout.pp), []
    for single, memory, _ in case.placements:
        costs = basis.costs.stages(case.layout, single.homes.tolist())
        room = (
            basis.limit_bytes + more - rank.total + rank.activations
            for rank, more in zip(memory, more_bytes, strict=True)
        )
        schedule = synthesise(
            stage_times(single, [costs]).lane(MEDIAN),
            case.layout.num_microbatches,
            homes=single.homes.tolist(),
            cap=ActivationCap(activation_bytes=activations, cap_bytes=tuple(room)),
            seed=seed,
            num_trials=num_trials,
        )
        step = predict_step(schedule, costs)
        found.append((basis.candidate(case.layout, schedule, step), schedule))
    return min(found, key=lambda made: (made[0].step.p50_ns, made[0].peak_bytes))


def _too_long(case: _Case) -> Rejection:
    return Rejection(
        layout=str(case.layout),
        rule="length",
        reason=(
            f"an order of its own has up to {case.num_actions} actions to put in place; the best "
            f"{NUM_REFINED} pipelines may have {MAX_WORK // NUM_BEGUN} together; take a larger "
            "micro-batch"
        ),
    )
