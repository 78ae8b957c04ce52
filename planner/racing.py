"""Racing: which of several plans is fastest, from measurements that come round by round.

In a round every plan that is still in the race is measured once, one after another, so that a
machine that grows slower is slower for all. Plans are compared by the logarithms of their times in
the rounds that both were in: a drift that all share cancels. A plan is out as soon as it is slower
than another one with confidence (a race in the sense of Maron and Moore, "The racing algorithm",
Artificial Intelligence Review 11, 1997), and who looks after every round must not be fooled by
looking often: the intervals here hold at all times at once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from statistics import fmean
from typing import Literal, NamedTuple

ERROR = 0.05
"""Chance that any comparison of a race is ever wrong."""
TIE = 0.01
"""Plans whose times differ by less than this share are equally good."""
EXPECTED_EFFECT = 4.0
"""Square of the differences looked for, in standard deviations of a round: see `critical_t`."""

_MOST_LOG = 700.0  # the exponential of a little more is too large for a float

Outcome = Literal["best", "tie", "open", "none"]
"""How a race stands: one plan is left, all that are left are equal, more rounds, or all failed."""


class Interval(NamedTuple):
    """A closed interval; infinite ends say that too little is known."""

    low: float
    high: float


def evidence(t: float, num_values: int) -> float:
    """Return the evidence of Student's `t` over `num_values` n against a mean of 0.

    If the mean is 0 it is 1 on average, whatever n and the noise are, and the chance that it ever
    reaches 1 / a is at most a. With c = 1 / EXPECTED_EFFECT and x = t^2 / (n - 1):

        sqrt(c / (n + c)) * ((1 + x) / (1 + x c / (n + c)))^(n / 2)

    Source: Wang and Ramdas, "Anytime-valid t-tests and confidence sequences for Gaussian means
    with unknown variance", Sequential Analysis 44 (2025), arXiv 2310.03722: the Gaussian mixture
    of scale-invariant likelihood ratios, a test martingale.

    >>> round(evidence(0.0, 5), 3), round(evidence(5.4, 5), 1)
    (0.218, 20.5)
    """
    shrunk = 1 / (1 + num_values * EXPECTED_EFFECT)
    x = t * t / (num_values - 1)
    growth = num_values / 2 * (math.log1p(x) - math.log1p(x * shrunk))
    return math.exp(growth + math.log(shrunk) / 2)


@lru_cache(maxsize=1024)
def critical_t(num_values: int, error: float) -> float:
    """Return the |t| at which `evidence` is 1 / `error`, infinite where it never is.

    With A = (1 / (error sqrt(s)))^(2 / n) and s = c / (n + c): t^2 = (n - 1) (A - 1) / (1 - A s).
    The effect that is expected decides which rounds are served best, not what is true: with two
    standard deviations four rounds can be enough, and few are lost where the plans are close.

    >>> [round(critical_t(n, 0.05), 1) for n in (2, 3, 5, 10, 20)]
    [inf, inf, 5.4, 4.0, 3.6]
    """
    if num_values < 2:
        return math.inf
    shrunk = 1 / (1 + num_values * EXPECTED_EFFECT)
    grown = (1 / (error * math.sqrt(shrunk))) ** (2 / num_values)
    if grown * shrunk >= 1:
        return math.inf
    return math.sqrt((num_values - 1) * (grown - 1) / (1 - grown * shrunk))


def mean_interval(values: Sequence[float], error: float) -> Interval:
    """Return where the mean behind `values` lies, wrong with a chance of `error` at any time.

    >>> [round(end, 2) for end in mean_interval([0.9, 1.1, 1.0, 1.05, 0.95], 0.05)]
    [0.81, 1.19]
    """
    critical = critical_t(len(values), error)
    if math.isinf(critical):
        return Interval(-math.inf, math.inf)
    mean = fmean(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    radius = critical * math.sqrt(squares / (len(values) - 1) / len(values))
    return Interval(mean - radius, mean + radius)


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """What was measured of each plan; the plans stand in their predicted order.

    `times_ns` has by plan the time in each round that it was measured in. `failed` plans are out,
    whatever was measured of them. `error` is shared among all pairs of plans (Bonferroni), so that
    it bounds the chance that any of the intervals ever misses.

    >>> race = Race.of(2)
    >>> for number, times_ns in enumerate([(100, 131), (102, 135), (99, 129), (101, 133)]):
    ...     race = race.measured(0, number, times_ns[0]).measured(1, number, times_ns[1])
    >>> race.outcome, race.chosen, race.slower_than(1)
    ('best', 0, 0)
    """

    times_ns: tuple[Mapping[int, int], ...]
    failed: frozenset[int] = field(default_factory=frozenset)
    error: float = ERROR
    tie: float = TIE

    @staticmethod
    def of(num_plans: int) -> "Race":
        """Return the race of `num_plans` plans before its first round."""
        return Race(times_ns=tuple({} for _ in range(num_plans)))

    def measured(self, plan: int, number: int, time_ns: int) -> "Race":
        """Return the race with the time of `plan` in round `number`."""
        times = list(self.times_ns)
        times[plan] = {**times[plan], number: time_ns}
        return replace(self, times_ns=tuple(times))

    def without(self, plan: int) -> "Race":
        """Return the race after `plan` has failed."""
        return replace(self, failed=self.failed | {plan})

    def ratio(self, plan: int, other: int) -> Interval:
        """Return the interval of the time of `plan` over that of `other`."""
        mine, theirs = self.times_ns[plan], self.times_ns[other]
        shared = sorted(mine.keys() & theirs.keys())
        logs = [math.log(mine[number] / theirs[number]) for number in shared]
        num_pairs = max(1, math.comb(len(self.times_ns), 2))
        low, high = mean_interval(logs, self.error / num_pairs)
        return _exp(low, high)

    def slower_than(self, plan: int) -> int | None:
        """Return the plan that `plan` is furthest behind with confidence, None if there is none."""
        rivals = [other for other in self._unfailed if other != plan]
        behind = {other: self.ratio(plan, other).low for other in rivals}
        return max((o for o in rivals if behind[o] > 1), key=lambda o: behind[o], default=None)

    @property
    def standing(self) -> tuple[int, ...]:
        """The plans that neither failed nor are slower than another with confidence."""
        beaten = set()
        for one, other in combinations(self._unfailed, 2):
            low, high = self.ratio(one, other)
            beaten |= {one} if low > 1 else {other} if high < 1 else set()
        return tuple(plan for plan in self._unfailed if plan not in beaten)

    @property
    def leader(self) -> int:
        """The standing plan with the least mean in the rounds that all standing ones share.

        Without such a round it is the first in predicted order. There must be a standing plan.
        """
        standing = self.standing
        shared = sorted(set.intersection(*(set(self.times_ns[plan]) for plan in standing)))
        return min(
            standing,
            key=lambda plan: (sum(math.log(self.times_ns[plan][n]) for n in shared), plan),
        )

    @property
    def outcome(self) -> Outcome:
        """How the race stands; it is no tie in the middle of a round."""
        return self._outcome_of(self.standing)

    @property
    def chosen(self) -> int:
        """The leader; among plans that are all equally good the first in predicted order."""
        return self.standing[0] if self.outcome == "tie" else self.leader

    def level_ns(self, plan: int) -> tuple[float, Interval]:
        """Return the geometric mean of the times of `plan`, and the interval that it is known to.

        Unlike a ratio it holds what the machine did meanwhile.
        """
        logs = [math.log(time_ns) for time_ns in self.times_ns[plan].values()]
        low, high = mean_interval(logs, self.error)
        return math.exp(fmean(logs)), _exp(low, high)

    def to_measure(self, max_rounds: int) -> tuple[tuple[int, int], ...]:
        """Return the (round, plan) that are still to be measured, in order; none once decided.

        A round that broke off is made whole first. Every second round goes backwards, so that a
        steady drift favours nobody in the long run. One plan alone is measured once.
        """
        standing, first = self.standing, max(0, self.num_rounds - 1)
        if self._outcome_of(standing) != "open":
            return ()
        end = max_rounds if len(standing) > 1 else first + 1
        return tuple(
            (number, plan)
            for number in range(first, end)
            for plan in standing[:: 1 if number % 2 == 0 else -1]
            if number not in self.times_ns[plan]
        )

    @property
    def num_rounds(self) -> int:
        """The rounds that were begun."""
        return max((number + 1 for times in self.times_ns for number in times), default=0)

    def _outcome_of(self, standing: tuple[int, ...]) -> Outcome:
        if not standing:
            return "none"
        if len(standing) == 1:
            return "best" if self.times_ns[standing[0]] else "open"
        last, most = self.num_rounds - 1, 1 + self.tie
        if not all(last in self.times_ns[plan] for plan in standing):
            return "open"
        ratios = (self.ratio(one, other) for one, other in combinations(standing, 2))
        return "tie" if all(1 / most < low and high < most for low, high in ratios) else "open"

    @property
    def _unfailed(self) -> tuple[int, ...]:
        return tuple(plan for plan in range(len(self.times_ns)) if plan not in self.failed)


def _exp(low: float, high: float) -> Interval:
    """Return the interval of what has its logarithm in `low` to `high`."""
    return Interval(math.exp(low), math.inf if high > _MOST_LOG else math.exp(high))
