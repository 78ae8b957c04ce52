"""What a report is given: plans and runs, gathered into studies that share their inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from planner.facts import Facts, facts_of
from planner.layout import Layout
from planner.objectives import cost
from planner.plan import Candidate, Plan, Rejection
from planner.record import RunRecord
from reports.compare import Comparison, compare
from simulator.timeline import Timeline

_SHARED = ("model", "workload", "cluster", "stack", "goal", "profile")
MIN_GAP = 0.10
"""Measured steps closer than this share of the shorter one are in no order worth predicting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    """A plan with its predicted timeline; `path` is what a person would type to name it."""

    path: str
    plan: Plan
    predicted: Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run of a plan; `path` is its directory as a person would type it."""

    path: str
    plan: Plan
    predicted: Timeline
    record: RunRecord

    def comparison(self) -> Comparison:
        """Return the run beside its plan."""
        return compare(self.plan, self.record, self.predicted)


View = PlanView | RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Views of plans made from the same inputs, best predicted layout first."""

    views: tuple[View, ...]

    @property
    def best(self) -> View:
        """The view of the best predicted layout."""
        return self.views[0]

    @property
    def runs(self) -> tuple[RunView, ...]:
        """The views that are runs."""
        return tuple(view for view in self.views if isinstance(view, RunView))

    @property
    def objective(self) -> str:
        """What the layouts are ranked by."""
        return self.best.plan.goal.objectives[0]

    def facts(self) -> Facts:
        """Return what the objectives need to know of the job that all the plans are of."""
        return facts_of(self.best.plan)

    def ranking(self) -> tuple[Candidate, ...]:
        """Return the candidates of all the plans, each layout once, best first."""
        found = {c.layout: c for view in reversed(self.views) for c in view.plan.ranking}
        facts = self.facts()

        def key(candidate: Candidate) -> tuple[float, int, int, str]:
            ns, held = candidate.step.p50_ns, candidate.peak_bytes
            return cost(self.objective, facts, ns, held), ns, held, str(candidate.layout)

        return tuple(sorted(found.values(), key=key))

    def front(self) -> frozenset[Layout]:
        """Return the layouts that the best plan has on its front; none for one objective."""
        plan = self.best.plan
        if len(plan.goal.objectives) == 1:
            return frozenset()
        return frozenset(plan.ranking[place].layout for place in plan.front if plan.ranking)

    def rejections(self) -> tuple[Rejection, ...]:
        """Return the rejections of all the plans, each once, in order."""
        return tuple(dict.fromkeys(r for view in self.views for r in view.plan.rejections))


def studies(views: Sequence[View]) -> tuple[Study, ...]:
    """Return `views` in studies, in the order of their first view.

    A plan that is also there as a run is left out: the run tells all of it.
    """
    was_run = {view.plan.plan_digest for view in views if isinstance(view, RunView)}
    groups: dict[tuple[str, ...], list[View]] = {}
    for view in views:
        if isinstance(view, RunView) or view.plan.plan_digest not in was_run:
            key = tuple(view.plan.section_digests[name] for name in _SHARED)
            groups.setdefault(key, []).append(view)
    return tuple(
        Study(views=tuple(sorted(group, key=lambda view: _cost(view.plan))))
        for group in groups.values()
    )


def _cost(plan: Plan) -> float:
    peak_bytes = max(rank.total for rank in plan.memory)
    return cost(plan.goal.objectives[0], facts_of(plan), plan.step.p50_ns, peak_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderAgreement:
    """Pairs of runs whose measured steps differ by more than `MIN_GAP`, and those out of order.

    A pair in `wrong` was predicted in the other order: (measured faster, measured slower).
    """

    num_pairs: int
    wrong: tuple[tuple[str, str], ...]


def order_agreement(runs: Sequence[tuple[str, int, int]]) -> OrderAgreement:
    """Return how well predicted steps order measured ones; a run is (name, predicted, measured).

    >>> order_agreement([("a", 10, 11), ("b", 20, 19), ("c", 15, 30)])
    OrderAgreement(num_pairs=3, wrong=(('b', 'c'),))
    """
    num_pairs = 0
    wrong = []
    for one, other in combinations(runs, 2):
        fast, slow = sorted((one, other), key=lambda run: run[2])
        if slow[2] > (1 + MIN_GAP) * fast[2]:
            num_pairs += 1
            if fast[1] >= slow[1]:
                wrong.append((fast[0], slow[0]))
    return OrderAgreement(num_pairs=num_pairs, wrong=tuple(wrong))
