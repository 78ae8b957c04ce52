"""What becomes of layouts: the step time and the peak memory of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from planner.cost import CostModel, cost_model
from planner.layout import Layout
from planner.lower import predict_order
from planner.memory import peak_memory
from planner.orders import NamedOrder, order_of
from planner.plan import Candidate, PeakMemory
from planner.synthesis import MAX_BYTES
from profiles.job import Job
from profiles.profile import Cost, Profile
from simulator.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What layouts are judged by: their costs, what a process holds in any case, and its limit."""

    costs: CostModel
    context_bytes: int
    limit_bytes: int

    def memory(self, layout: Layout, schedule: Schedule) -> tuple[PeakMemory, ...]:
        """Return the peak memory of each pipeline rank of `layout` under `schedule`."""
        costs = self.costs
        return peak_memory(
            costs.model, costs.workload, layout, schedule, costs.stack, self.context_bytes
        )

    def candidate(self, layout: Layout, schedule: Schedule, step: Cost) -> Candidate:
        """Return `layout` with its step and the peak memory of its worst rank."""
        peak_bytes = max(rank.total for rank in self.memory(layout, schedule))
        return Candidate(layout=layout, step=step, peak_bytes=peak_bytes)


def basis_of(job: Job, profile: Profile) -> Basis:
    """Return the basis of `job` on the machine of `profile`.

    The limit is the memory of the smallest rank, but never more than can be counted with.
    """
    return Basis(
        costs=cost_model(job.model, job.workload, job.stack, profile),
        context_bytes=profile.context_bytes,
        limit_bytes=min(MAX_BYTES, *(pool.gpu.memory_bytes for pool in job.cluster.pools)),
    )


def evaluate(basis: Basis, layouts: Sequence[Layout]) -> list[Candidate]:
    """Return `layouts` of named schedules, timed; those of one order are timed side by side."""
    # Costs do not depend on the schedule, so that layouts of several share them.
    stages = cache(basis.costs.stages)
    groups: dict[NamedOrder, list[Layout]] = {}
    for layout in layouts:
        groups.setdefault(order_of(layout), []).append(layout)
    timed: dict[Layout, Candidate] = {}
    for order, group in groups.items():
        sample = order.sample()
        steps = predict_order(order, sample, [stages(replace(each, schedule="")) for each in group])
        for layout, step in zip(group, steps, strict=True):
            timed[layout] = basis.candidate(layout, sample, step)
    return [timed[layout] for layout in layouts]
