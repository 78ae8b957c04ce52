"""Long stories of one job: failures, restarts, checkpoints, spares and preemption, over weeks.

An event is a failure, a restart or a node that comes back, never a step: the steps between two
events pass in closed form. Every ns of a story has one cause, and the causes add up to its length.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, fsum, sqrt
from typing import Literal, NamedTuple

from simulator.checks import MAX_NS
from simulator.jitter import MASK
from simulator.stories.checkpoints import Checkpoints
from simulator.stories.strikes import HOUR_NS, Disturbance, Slowdown, check_names, check_whole
from simulator.timeline import Span, Timeline

Cause = Literal[
    "checkpoint", "rework", "slow", "detection", "waiting", "restart", "maintenance"
]  # fmt: skip
"""What a job loses time to.

`checkpoint`: it stands still for one; `rework`: work that no checkpoint held, at full speed;
`slow`: what stragglers added; `detection`: dead, and nobody knows; `waiting`: for nodes;
`restart`: starting, the first time too; `maintenance`: planned.
"""
Phase = Literal["training", "lost", "detection", "waiting", "restart", "maintenance"]

MAX_NODES, MAX_STRIKES = 250_000, 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Maintenance:
    """The whole cluster stops every `every_ns` for `takes_ns`; the job saves and stops before."""

    every_ns: int
    takes_ns: int

    def __post_init__(self) -> None:
        check_whole("maintenance: takes_ns", self.takes_ns, least=1)
        check_whole("maintenance: every_ns", self.every_ns, least=self.takes_ns + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StorySpec:
    """A synchronous job of `num_steps` steps on `num_nodes` nodes, and what may befall it.

    A step takes `step_ns` at full speed (its mean: over thousands of steps jitter averages out).
    A start, first or not, takes `restart_ns`. One dead node kills the job; a spare takes its place
    at once, and with none left the job waits until a node comes back. All nodes in their places
    age and fail in every phase, also while the job restarts (which begins anew) or waits. Spares do
    not. On a notice the job saves at the end of its step and goes on without the node, if the
    checkpoint will be safe before the node goes; while not training it lets the node go at once.

    The story ends when the last step is safe on storage, or unfinished at `horizon_ns`.
    """

    step_ns: int
    num_steps: int
    num_nodes: int
    checkpoints: Checkpoints
    restart_ns: int = 0
    num_spares: int = 0
    disturbances: tuple[Disturbance, ...] = ()
    maintenance: Maintenance | None = None
    horizon_ns: int = 365 * 24 * HOUR_NS

    def __post_init__(self) -> None:
        check_whole("story: step_ns", self.step_ns, least=1)
        check_whole("story: num_steps", self.num_steps, least=1, most=MAX_NS // self.step_ns)
        check_whole("story: num_nodes", self.num_nodes, least=1, most=MAX_NODES)
        check_whole("story: num_spares", self.num_spares, most=MAX_NODES)
        check_whole("story: restart_ns", self.restart_ns)
        check_whole("story: horizon_ns", self.horizon_ns, least=1)
        check_names(self.disturbances)
        num_strikes = self.failures_per_hour * self.horizon_ns / HOUR_NS
        if self.maintenance:
            num_strikes += self.horizon_ns / self.maintenance.every_ns
        if num_strikes > MAX_STRIKES:
            raise ValueError(
                f"story: about {num_strikes:.3g} strikes are due before the horizon; at most "
                f"{MAX_STRIKES} are told: lower per_node_hour, num_nodes or horizon_ns"
            )

    @property
    def failures_per_hour(self) -> float:
        """Strikes of all disturbances on all nodes, per hour in the long run."""
        return self.num_nodes * fsum(kind.per_node_hour for kind in self.disturbances)

    def pace_ns(self, kind: int) -> int:
        """Return what a step takes while a node is slow by slowdown number `kind`."""
        slowdown = self.disturbances[kind]
        assert isinstance(slowdown, Slowdown)
        return max(self.step_ns, round(self.step_ns * slowdown.factor))


class Strike(NamedTuple):
    """One disturbance that struck one node, and the phase in which it found the job."""

    at_ns: int
    name: str
    node: int
    phase: Phase


class PhaseSpan(NamedTuple):
    """The job was in `phase` from begin to end; `lost` is training that had to be done again."""

    phase: Phase
    begin_ns: int
    end_ns: int


@dataclass(frozen=True, kw_only=True)
class Story:
    """One story: `wall_ns` = `useful_ns` + the sum of `lost_ns`, to the ns.

    `useful_ns` is the work that is safe on storage at the end, at full speed. `num_strikes` counts
    by name of the disturbance; `num_restarts` leaves out the first start; `most_away` nodes were
    away at the worst moment. `spans` and `strikes` hold the first ones, up to what was asked for.
    """

    seed: int
    is_finished: bool
    wall_ns: int
    useful_ns: int
    lost_ns: Mapping[Cause, int]
    num_strikes: Mapping[str, int]
    num_restarts: int
    num_checkpoints: int
    most_away: int
    spans: tuple[PhaseSpan, ...]
    strikes: tuple[Strike, ...]

    @property
    def goodput(self) -> float:
        """Useful share of the time."""
        return self.useful_ns / self.wall_ns

    @cached_property
    def timeline(self) -> Timeline:
        """The phases as spans of rank 0, for the trace viewer; strikes stand in their names."""
        struck = {strike.at_ns: strike for strike in reversed(self.strikes)}
        return Timeline(
            source="simulated",
            spans=tuple(
                Span(
                    rank=0,
                    stream="job",
                    name=_span_name(span, struck.get(span.end_ns)),
                    kind="wait" if span.phase == "waiting" else "other",
                    start_ns=span.begin_ns,
                    end_ns=span.end_ns,
                )
                for span in self.spans
            ),
        )


def _span_name(span: PhaseSpan, strike: Strike | None) -> str:
    if strike is None or span.phase not in ("training", "lost", "restart"):
        return span.phase
    return f"{span.phase}, until {strike.name} on node {strike.node}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stories:
    """The same job told with many seeds. Quantiles are nearest-rank: each is one story's value."""

    stories: tuple[Story, ...]

    def __post_init__(self) -> None:
        if not self.stories:
            raise ValueError("stories: none were told; at least one seed is needed")

    @property
    def num_unfinished(self) -> int:
        """Stories that met their horizon: with these, times are lower bounds."""
        return sum(not story.is_finished for story in self.stories)

    @property
    def mean_wall_ns(self) -> float:
        """Effective time to train."""
        return mean([story.wall_ns for story in self.stories])

    @property
    def wall_error_ns(self) -> float:
        """Standard error of `mean_wall_ns`; 0 for a single story."""
        return standard_error([story.wall_ns for story in self.stories])

    @property
    def mean_goodput(self) -> float:
        """Useful share of the time, averaged over the stories."""
        return mean([story.goodput for story in self.stories])

    def wall_ns(self, quantile: float) -> int:
        """Return the time to train that this share of the stories keeps."""
        return int(nearest_rank([story.wall_ns for story in self.stories], quantile))

    def goodput(self, quantile: float) -> float:
        """Return the goodput that this share of the stories does not exceed."""
        return nearest_rank([story.goodput for story in self.stories], quantile)

    def mean_lost_ns(self) -> dict[Cause, float]:
        """Return the mean loss by cause."""
        causes = self.stories[0].lost_ns
        return {cause: mean([story.lost_ns[cause] for story in self.stories]) for cause in causes}


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard deviation of the mean, sqrt(sum (x - mean)^2 / (n (n - 1)))."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    squares = fsum((value - centre) ** 2 for value in values)
    return sqrt(squares / (len(values) * (len(values) - 1)))


def nearest_rank(values: Sequence[float], quantile: float) -> float:
    """Return the smallest value that at least the share `quantile` of all does not exceed.

    >>> nearest_rank([30, 10, 20], 0.5)
    20
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}; it must be above 0 and at most 1")
    return sorted(values)[ceil(quantile * len(values)) - 1]


def tell(spec: StorySpec, seed: int = 0, *, num_kept: int = 10_000) -> Story:
    """Return one story; it keeps its first `num_kept` spans and strikes.

    Equal arguments give equal stories. Two specs with one seed meet the same strikes on the same
    nodes as long as those nodes have lived alike: compare options with equal seeds.

    >>> spec = StorySpec(step_ns=1_000, num_steps=100, num_nodes=4, restart_ns=500,
    ...                  checkpoints=Checkpoints(every_steps=10, blocking_ns=30))
    >>> story = tell(spec)
    >>> story.wall_ns, story.useful_ns, story.lost_ns["checkpoint"], story.lost_ns["restart"]
    (100800, 100000, 300, 500)
    """
    from simulator.stories.telling import Telling

    check_whole("seed", seed, most=MASK)
    check_whole("num_kept", num_kept)
    return Telling(spec, seed, num_kept).story()


def replicate(spec: StorySpec, seeds: Iterable[int]) -> Stories:
    """Return the stories of all `seeds`, without their spans and strikes.

    >>> from simulator.stories.strikes import Outage
    >>> spec = StorySpec(step_ns=HOUR_NS // 360, num_steps=36_000, num_nodes=100,
    ...                  restart_ns=HOUR_NS // 6, checkpoints=Checkpoints(every_steps=180),
    ...                  disturbances=(Outage(name="gpu", per_node_hour=0.001),))
    >>> stories = replicate(spec, range(20))
    >>> stories.wall_ns(0.1) < stories.mean_wall_ns < stories.wall_ns(0.9)
    True
    """
    return Stories(stories=tuple(tell(spec, seed, num_kept=0) for seed in seeds))
