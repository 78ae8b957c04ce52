"""Mixed GPU types: pipelines that run from pool to pool, and replicas each in a pool of its own.

A pipeline over unlike pools has uneven stages: every stage takes what its own pool does, and slower
GPUs get fewer layers (`planner.partition.deal`). Replicas on unlike pools have uneven batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from planner.bounds import Columns, Parts
from planner.evaluate import Costs
from planner.layout import Layout
from planner.partition import deal, homes_of
from planner.plan import ProfileReference, StageCost
from planner.pools import misfit, pools_of_ranks
from planner.schedules import SCHEDULES
from profiles.cluster import PoolSpec
from profiles.errors import UnsupportedError
from profiles.model import ModelSpec
from profiles.stack import StackSpec
from profiles.workload import Workload


@final
@dataclass(frozen=True, kw_only=True)
class MixedCosts:
    """The costs of pipelines over `pools`: `by_pool` holds those of a cluster of each pool alone.

    A stage takes what it does in the pool of its rank, its exchange and its reduction included,
    which stay inside of it. A message to the next stage takes what it does from the pool that it
    leaves, over the fabric that all share.
    """

    pools: tuple[PoolSpec, ...]
    by_pool: tuple[Costs, ...]

    @property
    def model(self) -> ModelSpec:
        """The model that is trained."""
        return self.by_pool[0].model

    @property
    def workload(self) -> Workload:
        """What a step trains on."""
        return self.by_pool[0].workload

    @property
    def stack(self) -> StackSpec:
        """The software that trains it, the same in all pools."""
        return self.by_pool[0].stack

    @property
    def is_of_executor(self) -> bool:
        """Plans for unlike pools are not run here."""
        return False

    @property
    def origin(self) -> ProfileReference:
        """Where the costs of all pools come from, as of one machine with all their GPUs."""
        origins = [costs.origin for costs in self.by_pool]
        device = replace(
            origins[0].device,
            name=" and ".join(dict.fromkeys(each.device.name for each in origins)),
            num_ranks=sum(each.device.num_ranks for each in origins),
            memory_bytes=min(each.device.memory_bytes for each in origins),
        )
        return replace(origins[0], device=device)

    def completed(self, layout: Layout) -> Layout:
        """Return `layout` as the stack runs it unless it is told otherwise."""
        return self.by_pool[0].completed(layout)

    def context_bytes(self, layout: Layout, /) -> int:
        """Return what a process holds on its GPU outside of the framework's allocator."""
        return self.by_pool[0].context_bytes(layout)

    def parts(self, layout: Layout, rank: int = 0) -> Parts:
        """Return what a micro-batch takes on a pipeline rank; see `Costs.parts`."""
        return self.by_pool[self._pools_of(layout)[rank]].parts(layout)

    def columns(self, layouts: Sequence[Layout]) -> Columns:
        """Return the medians of `stages` of layouts that differ in their sharding alone."""
        where = self._pools_of_stages(layouts[0])
        own = [costs.columns(layouts) for costs in self.by_pool]
        stages = np.arange(len(where))
        return Columns(*(np.stack(each)[where, :, stages].T for each in zip(*own, strict=True)))

    def stages(self, layout: Layout, homes: Sequence[int] = ()) -> tuple[StageCost, ...]:
        """Return what every stage of `layout` takes, each in the pool of its home."""
        own = [costs.stages(layout) for costs in self.by_pool]
        where = self._pools_of_stages(layout, homes)
        return tuple(own[pool][stage] for stage, pool in enumerate(where))

    def _pools_of_stages(self, layout: Layout, homes: Sequence[int] = ()) -> list[int]:
        """Return the pool of each stage; without `homes` they live as the schedule has them."""
        if not len(homes):
            shape = SCHEDULES[layout.schedule].homes
            homes = homes_of(layout.pp, layout.stages_per_rank, shape).tolist()
        ranks = self._pools_of(layout)
        return [ranks[home] for home in homes]

    def _pools_of(self, layout: Layout) -> tuple[int, ...]:
        """Return the pool of each pipeline rank; raises UnsupportedError where one lies in two."""
        if reason := misfit(self.pools, layout.replicas * layout.tp, layout.order):
            raise UnsupportedError(f"layout {layout}: {reason}")
        return pools_of_ranks(self.pools, layout.pp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What each replica takes of a batch: its micro-batches, and when the last replica is done."""

    num_microbatches: tuple[int, ...]
    end_ns: float


def shares_of(
    num_microbatches: int, microbatch_ns: Sequence[float], extra_ns: Sequence[float] = ()
) -> Shares:
    """Return how replicas of unlike speed share the micro-batches of a step.

    Replica r takes m_r micro-batches of t_r each, and e_r beside (filling its pipeline, updating
    its weights): T_r = m_r t_r + e_r. Cut at will, all would end at the same time,
    T = (M + sum e_r / t_r) / sum 1 / t_r, with shares m_r = (T - e_r) / t_r in proportion to their
    speed. Whole micro-batches are dealt as layers are to places (`planner.partition.deal`): no
    other division ends earlier, and it ends less than the longest micro-batch after T where every
    replica is worth one. All get one at least, since all hold gradients to be reduced. Gradients
    must be summed, and divided by the batch of all, not averaged over replicas.

    >>> shares_of(12, (10.0, 20.0))
    Shares(num_microbatches=(8, 4), end_ns=80.0)
    """
    each = np.array(microbatch_ns, np.float64)
    extra = np.array(extra_ns, np.float64) if len(extra_ns) else np.zeros_like(each)
    counts = deal(num_microbatches, each[None, :], extra[None, :])[0]
    return Shares(
        num_microbatches=tuple(counts.tolist()), end_ns=float((counts * each + extra).max())
    )
