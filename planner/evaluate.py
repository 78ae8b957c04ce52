"""What becomes of layouts: the step time and the peak memory of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

from planner.bounds import Columns, Parts
from planner.layout import Layout
from planner.lower import predict_order
from planner.memory import peak_memory
from planner.orders import NamedOrder, order_of
from planner.plan import Candidate, PeakMemory, ProfileReference, StageCost
from planner.synthesis import MAX_BYTES
from profiles.job import Job
from profiles.model import ModelSpec
from profiles.profile import Cost
from profiles.stack import StackSpec
from profiles.workload import Workload
from simulator.schedule import Schedule


class Costs(Protocol):
    """What layouts of one model, workload and stack take, and who says so.

    The search does not know whether they rest on kernels measured on the machine itself
    (`planner.cost`) or on published ones (`planner.reference.costs`).
    """

    @property
    def model(self) -> ModelSpec:
        """The model that is trained."""

    @property
    def workload(self) -> Workload:
        """What a step trains on."""

    @property
    def stack(self) -> StackSpec:
        """The software that trains it."""

    @property
    def origin(self) -> ProfileReference:
        """Where the costs come from."""

    @property
    def is_of_executor(self) -> bool:
        """Whether layouts must be such as our executor can run.

        It ties no embeddings across ranks and pads no vocabulary; the stacks of the field do.
        """

    def completed(self, layout: Layout) -> Layout:
        """Return `layout` with what no search decides, but the stack: sharding, recomputation."""

    def parts(self, layout: Layout) -> Parts:
        """Return what a micro-batch takes a layer, at the ends of the model and between stages.

        How `layout` splits its layers into stages and shards its states does not matter.
        """

    def columns(self, layouts: Sequence[Layout]) -> Columns:
        """Return the medians of `stages` of layouts that differ in their sharding alone."""

    def stages(self, layout: Layout) -> tuple[StageCost, ...]:
        """Return what every stage of `layout` takes; its schedule does not matter."""

    def context_bytes(self, layout: Layout, /) -> int:
        """Return what a process holds before anything is allocated."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What layouts are judged by: their costs, and the memory that a rank has."""

    costs: Costs
    limit_bytes: int

    def memory(self, layout: Layout, schedule: Schedule) -> tuple[PeakMemory, ...]:
        """Return the peak memory of each pipeline rank of `layout` under `schedule`."""
        costs = self.costs
        return peak_memory(
            costs.model, costs.workload, layout, schedule, costs.stack, costs.context_bytes(layout)
        )

    def candidate(self, layout: Layout, schedule: Schedule, step: Cost) -> Candidate:
        """Return `layout` with its step and the peak memory of its worst rank."""
        peak_bytes = max(rank.total for rank in self.memory(layout, schedule))
        return Candidate(layout=layout, step=step, peak_bytes=peak_bytes)


def basis_of(job: Job, costs: Costs) -> Basis:
    """Return the basis of `job`.

    The limit is the memory of the smallest rank, but never more than can be counted with.
    """
    limit_bytes = min(MAX_BYTES, *(pool.gpu.memory_bytes for pool in job.cluster.pools))
    return Basis(costs=costs, limit_bytes=limit_bytes)


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
