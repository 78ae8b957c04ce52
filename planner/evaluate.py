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
from planner.pools import pools_of_ranks, unlike_pools
from planner.schedules import SCHEDULES
from planner.synthesis import MAX_BYTES
from profiles.cluster import PoolSpec
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

    def parts(self, layout: Layout, rank: int = 0, /) -> Parts:
        """Return what a micro-batch takes a layer, at the ends of the model and between stages.

        It is that of a pipeline rank, which matters where GPUs differ. How `layout` splits its
        layers into stages and shards its states does not.
        """

    def columns(self, layouts: Sequence[Layout]) -> Columns:
        """Return the medians of `stages` of layouts that differ in their sharding alone."""

    def stages(self, layout: Layout, homes: Sequence[int] = (), /) -> tuple[StageCost, ...]:
        """Return what every stage of `layout` takes; its schedule does not matter.

        Where GPUs differ it does, by where stages live: `homes` are their pipeline ranks, those of
        the schedule that `layout` names if there are none.
        """

    def context_bytes(self, layout: Layout, /) -> int:
        """Return what a process holds before anything is allocated."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What layouts are judged by: their costs, and the memory that a rank has.

    It is that of the smallest, and `host_bytes` its share of the host's memory. `pools` are unlike
    ones between which costs tell; none where all ranks count alike.
    """

    costs: Costs
    limit_bytes: int
    pools: tuple[PoolSpec, ...] = ()
    host_bytes: int = 0

    def more_bytes(self, pp: int) -> tuple[int, ...]:
        """Return the memory that each of `pp` pipeline ranks has beyond that of the smallest."""
        if not self.pools:
            return (0,) * pp
        more = [min(MAX_BYTES, each.gpu.memory_bytes) - self.limit_bytes for each in self.pools]
        return tuple(more[pool] for pool in pools_of_ranks(self.pools, pp))

    def peak_bytes(self, memory: Sequence[PeakMemory]) -> int:
        """Return the peak of the worst rank: the one that has least left.

        What it has beyond the memory of the smallest is taken off, so that a layout fits in
        `limit_bytes`, and leaves of it, just what it does of each rank's own.
        """
        return max(
            rank.total - more
            for rank, more in zip(memory, self.more_bytes(len(memory)), strict=True)
        )

    def parts(self, layout: Layout) -> tuple[Parts, ...]:
        """Return `Costs.parts` of each pipeline rank of `layout`, or of one for all alike."""
        ranks = range(layout.pp) if self.pools else range(1)
        return tuple(self.costs.parts(layout, rank) for rank in ranks)

    def memory(self, layout: Layout, schedule: Schedule) -> tuple[PeakMemory, ...]:
        """Return the peak memory of each pipeline rank of `layout` under `schedule`."""
        costs = self.costs
        return peak_memory(
            costs.model, costs.workload, layout, schedule, costs.stack, costs.context_bytes(layout)
        )

    def candidate(self, layout: Layout, schedule: Schedule, step: Cost) -> Candidate:
        """Return `layout` with its step and the peak memory of its worst rank."""
        peak_bytes = self.peak_bytes(self.memory(layout, schedule))
        return Candidate(layout=layout, step=step, peak_bytes=peak_bytes)


def basis_of(job: Job, costs: Costs) -> Basis:
    """Return the basis of `job`.

    The limit is the memory of the smallest rank, but never more than can be counted with. Costs of
    our own executor are the same on all ranks.
    """
    limit_bytes = min(MAX_BYTES, *(pool.gpu.memory_bytes for pool in job.cluster.pools))
    pools = unlike_pools(job.cluster)
    is_mixed = len(pools) > 1 and not costs.is_of_executor
    return Basis(
        costs=costs,
        limit_bytes=limit_bytes,
        pools=pools if is_mixed else (),
        host_bytes=job.cluster.host_bytes_per_gpu,
    )


def evaluate(basis: Basis, layouts: Sequence[Layout]) -> list[Candidate]:
    """Return `layouts` of named schedules, timed; those of one order are timed side by side."""
    # Of a schedule it matters alone where it puts the stages: layouts of several share them.
    stages = cache(basis.costs.stages)
    alike = {family.homes: name for name, family in SCHEDULES.items()}
    groups: dict[NamedOrder, list[Layout]] = {}
    for layout in layouts:
        groups.setdefault(order_of(layout), []).append(layout)
    timed: dict[Layout, Candidate] = {}
    for order, group in groups.items():
        sample = order.sample()
        name = alike[SCHEDULES[order.schedule].homes]
        costs = [stages(replace(each, schedule=name)) for each in group]
        steps = predict_order(order, sample, costs)
        for layout, step in zip(group, steps, strict=True):
            timed[layout] = basis.candidate(layout, sample, step)
    return [timed[layout] for layout in layouts]
