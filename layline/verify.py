"""`layline plan --verify K`: the best K layouts trained here for a few steps each.

The plans run in turn, a block of a few steps each, round after round, until one is left, all that
are left are equal, or the rounds are used up (`planner.racing` decides). One launch of the ranks
holds as many blocks as are left: a launch takes as long as many blocks, mostly to import PyTorch.
It is ended, and another one started, only when a plan drops out of the race.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Protocol

from layline import __version__
from layline.walk import Progress, ignore_progress, require_torch, run_series
from planner.evaluate import Costs
from planner.plan import Plan
from planner.racing import Interval, Outcome, Race
from planner.record import StepRecord, load_run
from planner.search import SearchResult, make_plan
from profiles.errors import InvalidInputError, UnsupportedError
from profiles.job import Job

MAX_ROUNDS = 20
BLOCK_NS = 2_000_000_000
MIN_STEPS, MAX_STEPS = 5, 24
"""A block takes about `BLOCK_NS`, within these steps; a fifth or a quarter of them warms up."""

Verdict = Literal["best", "tie", "open", "slower", "failed"]


class Runner(Protocol):
    """What trains plans for real, as `layline.walk.run_series` does."""

    def __call__(
        self,
        plans: Sequence[Plan],
        directories: Sequence[Path],
        *,
        num_steps: int,
        on_step: Callable[[int, StepRecord], None] | None,
    ) -> None:
        """Train each plan in turn and leave a run in each of `directories`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedPlan:
    """What the race found out about one place of the ranking.

    `blocks_ns` has the median step of each round that it was in, `measured_ns` their geometric mean
    (0 where there is none) and `interval_ns` what that is known to, None for too few blocks. It is
    slower than the place `rival` by `slower_by`, a share from and to, None for too few rounds; the
    chosen plan is its own rival. `reason` says why a plan failed.
    """

    place: int
    layout: str
    predicted_ns: int
    measured_ns: int
    interval_ns: tuple[int, int] | None
    blocks_ns: dict[int, int]
    verdict: Verdict
    rival: int
    slower_by: tuple[float, float] | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The outcome of a race of the best `plans`, in predicted order; `chosen` is a place.

    An `outcome` "best" or "tie" is wrong with a chance of at most `error`; "open" says that the
    rounds did not suffice. What is known when a user interrupts is told all the same.
    """

    plans: tuple[VerifiedPlan, ...]
    chosen: int
    outcome: Outcome
    is_interrupted: bool
    is_as_predicted: bool
    error: float
    tie: float
    num_rounds: int
    num_steps: int
    num_launches: int
    duration_ns: int


def check_verifiable(job: Job) -> None:
    """Raise UnsupportedError, before any search, where measuring here cannot decide `job`."""
    if not job.cluster.is_local:
        raise UnsupportedError(
            f"--verify runs layouts on this machine, not on cluster {job.cluster.name}; plan "
            'without it, or with cluster.preset = "local"'
        )
    if job.goal.objectives[0] == "memory_headroom":
        raise UnsupportedError(
            "--verify picks the fastest step, and the job's goal is memory_headroom; plan without "
            "it, or name another goal first"
        )
    require_torch("plan --verify")


def verify_best(
    job: Job,
    costs: Costs,
    result: SearchResult,
    num_plans: int,
    progress: Progress = ignore_progress,
    max_rounds: int = MAX_ROUNDS,
) -> tuple[Plan, Verification]:
    """Return the plan of the best `num_plans` places that is fastest here, and how they did.

    Raises what `check_verifiable` and `verify` raise.
    """
    check_verifiable(job)
    places = range(min(num_plans, len(result.ranking)))
    plans = [make_plan(job, costs, result, place, __version__) for place in places]
    found = verify(plans, max_rounds=max_rounds, progress=progress)
    return plans[found.chosen], found


def verify(
    plans: Sequence[Plan],
    *,
    max_rounds: int = MAX_ROUNDS,
    progress: Progress = ignore_progress,
    run: Runner = run_series,
) -> Verification:
    """Race `plans`, which stand in predicted order, on this machine, and return what came out.

    A plan that fails on the hardware is out with its reason. An interrupt ends the race with what
    is known. Raises UnsupportedError where none can be run at all, and RanksFailedError where all
    fail.
    """
    begin_ns = time.monotonic_ns()
    track = _Track(plans=plans, max_rounds=max_rounds, progress=progress, run=run)
    track.check()
    is_interrupted = False
    try:
        while track.race.to_measure(max_rounds):
            track.launch()
    except KeyboardInterrupt:
        is_interrupted = True
    race = track.race
    if race.outcome == "none":
        from profiles.measure.ranks import RanksFailedError

        raise RanksFailedError(
            "\n".join(f"{plans[plan].layout}: {why}" for plan, why in sorted(track.reasons.items()))
        )
    return Verification(
        plans=tuple(_found(track, plan) for plan in range(len(plans))),
        chosen=race.chosen,
        outcome=race.outcome,
        is_interrupted=is_interrupted,
        is_as_predicted=race.chosen == 0,
        error=race.error,
        tie=race.tie,
        num_rounds=race.num_rounds,
        num_steps=track.num_steps,
        num_launches=track.num_launches,
        duration_ns=time.monotonic_ns() - begin_ns,
    )


def block_steps(step_ns: int) -> int:
    """Return the steps of a block where the fastest plan is predicted to take `step_ns`.

    >>> block_steps(2_000_000), block_steps(200_000_000), block_steps(30_000_000_000)
    (24, 10, 5)
    """
    return min(MAX_STEPS, max(MIN_STEPS, math.ceil(BLOCK_NS / max(1, step_ns))))


class _ChangedError(Exception):
    """A plan has dropped out, or the race is decided: the launch must end."""


@dataclass(slots=True, kw_only=True)
class _Track:
    """A race while it is run."""

    plans: Sequence[Plan]
    max_rounds: int
    progress: Progress
    run: Runner
    race: Race = field(init=False)
    num_steps: int = field(init=False)
    reasons: dict[int, str] = field(default_factory=dict)
    num_launches: int = 0

    def __post_init__(self) -> None:
        self.race = Race.of(len(self.plans))
        self.num_steps = block_steps(min(plan.step.p50_ns for plan in self.plans))

    def check(self) -> None:
        """Take the plans out that the executor cannot run; raises UnsupportedError for all."""
        from executor.run import check_runnable

        for number, plan in enumerate(self.plans):
            try:
                check_runnable(plan)
            except (UnsupportedError, InvalidInputError) as error:
                self._fail(number, str(error))
        if not self.race.standing:
            raise UnsupportedError(
                f"none of the best {len(self.plans)} layouts can be run: {self.reasons[0]}"
            )

    def launch(self) -> None:
        """Start the ranks on all blocks that are left; end them when that changes."""
        from profiles.measure.ranks import RanksFailedError

        todo, standing = self.race.to_measure(self.max_rounds), self.race.standing
        with TemporaryDirectory(prefix="layline-verify-") as folder:
            blocks = _Blocks(todo, Path(folder))

            def on_step(index: int, step: StepRecord) -> None:
                number, plan = todo[index]
                self.progress(
                    number / self.max_rounds,
                    f"round {number + 1} of at most {self.max_rounds}: {self.plans[plan].layout} "
                    f"step {step.step}",
                )
                self.race = blocks.taken_into(self.race)
                if self.race.standing != standing or self.race.outcome != "open":
                    raise _ChangedError

            self.num_launches += 1
            try:
                self.run(
                    [self.plans[plan] for _, plan in todo], blocks.directories,
                    num_steps=self.num_steps, on_step=on_step,
                )  # fmt: skip
            except _ChangedError:
                return
            except RanksFailedError as error:
                self.race = blocks.taken_into(self.race)
                self._fail(blocks.running, str(error))
            finally:
                self.race = blocks.taken_into(self.race)

    def _fail(self, plan: int, reason: str) -> None:
        self.race = self.race.without(plan)
        self.reasons[plan] = reason


class _Blocks:
    """The blocks of one launch, each with its directory, and how many of them are in the race."""

    def __init__(self, todo: Sequence[tuple[int, int]], folder: Path) -> None:
        self._todo, self._num_taken = todo, 0
        self.directories = [folder / str(index) for index in range(len(todo))]

    @property
    def running(self) -> int:
        """The plan whose block runs, or has broken off."""
        return self._todo[min(self._num_taken, len(self._todo) - 1)][1]

    def taken_into(self, race: Race) -> Race:
        """Return `race` with the blocks that have become whole since the last call."""
        while self._num_taken < len(self._todo):
            directory = self.directories[self._num_taken]
            if not (directory / "record.json").exists():
                break
            number, plan = self._todo[self._num_taken]
            race = race.measured(plan, number, load_run(directory)[1].median_step_ns)
            self._num_taken += 1
        return race


def _found(track: _Track, number: int) -> VerifiedPlan:
    """Return what the race of `track` says of plan `number`."""
    race, plan = track.race, track.plans[number]
    rival = _rival(race, number)
    times_ns, by = dict(race.times_ns[number]), race.ratio(number, rival)
    level_ns, within = race.level_ns(number) if times_ns else (0.0, Interval(0, math.inf))
    is_known = number != rival and number not in race.failed and math.isfinite(by.high)
    return VerifiedPlan(
        place=number,
        layout=str(plan.layout),
        predicted_ns=plan.step.p50_ns,
        measured_ns=round(level_ns),
        interval_ns=(
            (round(within.low), round(within.high)) if math.isfinite(within.high) else None
        ),
        blocks_ns=times_ns,
        verdict=_verdict(race, number),
        rival=rival,
        slower_by=(by.low - 1, by.high - 1) if is_known else None,
        reason=track.reasons.get(number, ""),
    )


def _rival(race: Race, plan: int) -> int:
    """Return whom `plan` is laid beside: the chosen plan, unless it only lost to another one."""
    if plan in race.failed or (ahead := race.slower_than(plan)) is None:
        return race.chosen
    return race.chosen if race.ratio(plan, race.chosen).low > 1 else ahead


def _verdict(race: Race, plan: int) -> Verdict:
    if plan in race.failed:
        return "failed"
    if race.slower_than(plan) is not None:
        return "slower"
    outcome = race.outcome
    return "best" if outcome == "best" else "tie" if outcome == "tie" else "open"
