"""The last part of the search: orders that are made for the best few pipelines."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from planner.candidates import SYNTHESISED
from planner.evaluate import Basis
from planner.layout import Layout
from planner.lower import MEDIAN, predict_step, stage_times
from planner.memory import stage_activation_bytes
from planner.plan import Candidate, PeakMemory, Rejection
from planner.schedules import SCHEDULES
from planner.synthesis import DEFAULT_TRIALS, MAX_BYTES, ActivationCap, synthesise
from simulator.schedule import Schedule

NUM_REFINED = 3
"""Pipelines to make an order for. An order gains some percent, which lets a pipeline pass those
just in front of it; from further behind none comes to the top."""
MAX_WORK = 5_000_000
"""Actions to put in place, for all pipelines together: about two seconds."""
NUM_BEGUN = 350
"""Orders that `synthesise` begins with, at most: those of its rules and of named schedules."""
_ACTIONS_PER_CELL = 3


class Refined(NamedTuple):
    """What became of the synthesised layouts, and the orders of those that are candidates."""

    outcomes: tuple[Candidate | Rejection, ...]
    schedules: Mapping[Layout, Schedule]


class _Placement(NamedTuple):
    """Where stages live: a schedule of one micro-batch, and what each rank holds under it."""

    single: Schedule
    memory: tuple[PeakMemory, ...]

    @property
    def need_bytes(self) -> int:
        """The least that any order needs on every rank."""
        return max(rank.total for rank in self.memory)


def refine(basis: Basis, named: Sequence[Candidate], asked: Sequence[str], seed: int) -> Refined:
    """Return what an order of its own makes of the best pipelines among `named`.

    It is a candidate where it is faster than every schedule `asked` for that this pipeline fits.
    Pipelines that fit no named schedule come last: an order made for a cap can do with less. What
    cannot hold one micro-batch at a time is returned with what that needs, and the named step.
    """
    to_beat_ns = _fastest_ns(basis, (each for each in named if each.layout.schedule in asked))
    outcomes: list[Candidate | Rejection] = []
    schedules: dict[Layout, Schedule] = {}
    work, num_left = MAX_WORK, NUM_REFINED
    for start in _starts(basis, named):
        layout = replace(start.layout, schedule=SYNTHESISED)
        placements = _placements(basis, layout)
        fitting = [place for place in placements if place.need_bytes <= basis.limit_bytes]
        if not fitting:
            least_bytes = min(place.need_bytes for place in placements)
            outcomes.append(replace(start, layout=layout, peak_bytes=least_bytes))
            continue
        size = layout.num_stages * layout.num_microbatches * _ACTIONS_PER_CELL * len(fitting)
        num_trials = _num_trials(size, work, work // num_left)
        if num_trials < 0:
            outcomes.append(_too_long(layout, size))
        else:
            work -= (NUM_BEGUN + num_trials) * size
            best, schedule = min(
                (_made(basis, layout, place, num_trials, seed) for place in fitting),
                key=lambda made: (made[0].step.p50_ns, made[0].peak_bytes),
            )
            if best.step.p50_ns < to_beat_ns.get(_pipeline(layout), best.step.p50_ns + 1):
                outcomes.append(best)
                schedules[layout] = schedule
        num_left -= 1
        if not num_left:
            break
    return Refined(tuple(outcomes), schedules)
