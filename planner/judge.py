"""The judge of a search: what is better by the goal of a job, and what cannot be."""

import math

from planner.objectives import broken_limit, cost, facts_of
from planner.trial import Timed
from profiles.job import Job


class Judge:
    """Says what is better, and what cannot be: the goal of a job, and the best found so far.

    Of one objective `at_most` is what is reached elsewhere: once something is found, nothing above
    it is of use.
    """

    def __init__(self, job: Job, at_most: float = math.inf) -> None:
        self.goal, self.facts = job.goal, facts_of(job)
        self.at_most = at_most if len(job.goal.objectives) == 1 else math.inf
        self.found: list[Timed] = []
        self.let_go = math.inf
        self._costs: list[tuple[float, ...]] = []

    def costs(self, step_ns: float, peak_bytes: float) -> tuple[float, ...]:
        """Return what each objective makes of a step and a peak."""
        return tuple(cost(name, self.facts, step_ns, peak_bytes) for name in self.goal.objectives)

    def breaks_limit(self, step_ns: float, peak_bytes: float) -> str:
        """Return which limit of the job is broken, empty if none."""
        return broken_limit(self.goal, self.facts, step_ns, peak_bytes)

    def is_hopeless(self, step_ns: float, peak_bytes: float, gap: float = 0.0) -> bool:
        """Return whether what takes so much at least can be left out.

        Of one objective also what could be better by no more than `gap`; the least of it is
        remembered, since it is all that is known of the best.
        """
        asked = self.costs(step_ns, peak_bytes)
        if any(all(map(float.__lt__, best, asked)) for best in self._costs):
            return True
        if self._costs and asked[0] > self.at_most:
            return True
        if gap and len(asked) == 1 and asked[0] >= (1 - gap) * self.best:
            self.let_go = min(self.let_go, asked[0])
            return True
        return bool(self.breaks_limit(step_ns, peak_bytes))

    def add(self, timed: Timed) -> None:
        """Take a layout in; what it is better than in everything no longer counts."""
        self.found.append(timed)
        asked = self.costs(timed.step_ns, timed.peak_bytes)
        if not any(all(map(float.__le__, best, asked)) for best in self._costs):
            self._costs = [
                best for best in self._costs if not all(map(float.__le__, asked, best))
            ] + [asked]

    @property
    def best(self) -> float:
        """The first objective of the best layout, infinite where there is none."""
        found = min((costs[0] for costs in self._costs), default=math.inf)
        return min(found, self.at_most) if self._costs else math.inf
