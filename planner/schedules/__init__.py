"""The schedules that have a name: one table, every member of which passes the same tests."""

from collections.abc import Callable
from dataclasses import dataclass

from planner.schedules.flush import gpipe, one_f_one_b
from simulator.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One named schedule for any number of ranks and micro-batches.

    `builder(num_ranks, stages_per_rank, num_microbatches)` returns it. `stages_per_rank` is 1, 2,
    or 0 where any number from 2 on will do.
    """

    name: str
    builder: Callable[[int, int, int], Schedule]
    stages_per_rank: int

    def build(
        self, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None
    ) -> Schedule:
        """Return the schedule; raises ValueError for a number of stages that it does not have."""
        wanted = stages_per_rank if stages_per_rank is not None else self.stages_per_rank or 2
        if not self.takes(wanted):
            has = str(self.stages_per_rank) if self.stages_per_rank else "2 or more"
            raise ValueError(
                f"schedule {self.name} has {has} stages a rank; layout.stages_per_rank is {wanted}"
            )
        return self.builder(num_ranks, wanted, num_microbatches)

    def takes(self, stages_per_rank: int) -> bool:
        """Return whether the schedule exists with so many stages a rank."""
        if self.stages_per_rank:
            return stages_per_rank == self.stages_per_rank
        return stages_per_rank >= 2


_FAMILIES = (
    Family(name="gpipe", builder=lambda p, _, m: gpipe(p, m), stages_per_rank=1),
    Family(name="1f1b", builder=lambda p, _, m: one_f_one_b(p, m), stages_per_rank=1),
)
SCHEDULES = {family.name: family for family in _FAMILIES}
"""Every named schedule."""
