"""The schedules that have a name: one table, every member of which passes the same tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from planner.partition import Homes
from planner.schedules.flush import gpipe, one_f_one_b
from planner.schedules.looped import breadth_first, interleaved
from planner.schedules.v_shape import dual_pipe_v, zb_v
from planner.schedules.zero_bubble import zb_h1, zb_h2
from simulator.schedule import Schedule

Repeats = Literal["microbatch", "group", "nothing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One named schedule for any number of ranks and micro-batches.

    `builder(num_ranks, stages_per_rank, num_microbatches)` returns it. `stages_per_rank` is 1, 2,
    or 0 where any number from 2 on will do. `repeats_by` is what its steady part repeats by: a
    micro-batch, a group of as many as there are ranks, or nothing. `homes` says on which ranks the
    stages live, and `splits` whether some backwards are done in halves.
    """

    name: str
    builder: Callable[[int, int, int], Schedule]
    stages_per_rank: int
    repeats_by: Repeats
    homes: Homes = "loop"
    splits: bool = False

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

    def period(self, num_ranks: int) -> int:
        """Return by how many micro-batches the steady part repeats; 0: there is none.

        The order of each rank for m + period micro-batches is the one for m with a block put in;
        behind the block, micro-batches are raised by the period. See `steady_from` for which m.
        """
        return {"microbatch": 1, "group": num_ranks, "nothing": 0}[self.repeats_by]

    def steady_from(self, num_ranks: int, num_microbatches: int) -> int:
        """Return from which m on `period` holds, for m that differ from `num_microbatches` by it.

        Twice the ranks fill every warm-up. Groups come behind those that have one micro-batch more
        each, one such group for each micro-batch that is left over.
        """
        num_left_over = num_microbatches % num_ranks if self.repeats_by == "group" else 0
        return 2 * num_ranks + num_left_over * (num_ranks + 1)


def _fixed(
    name: str, builder: Callable[[int, int], Schedule], stages_per_rank: int, repeats_by: Repeats,
    homes: Homes = "loop", *, splits: bool = False,
) -> Family:  # fmt: skip
    """Return the row of a schedule that has so many stages a rank and no other number."""
    return Family(
        name=name,
        builder=lambda num_ranks, _, num_microbatches: builder(num_ranks, num_microbatches),
        stages_per_rank=stages_per_rank,
        repeats_by=repeats_by,
        homes=homes,
        splits=splits,
    )


_FAMILIES = (
    _fixed("gpipe", gpipe, 1, "nothing"),
    _fixed("1f1b", one_f_one_b, 1, "microbatch"),
    Family(name="interleaved", builder=interleaved, stages_per_rank=0, repeats_by="group"),
    Family(name="breadth_first", builder=breadth_first, stages_per_rank=0, repeats_by="nothing"),
    _fixed("zb_h1", zb_h1, 1, "microbatch", splits=True),
    _fixed("zb_h2", zb_h2, 1, "microbatch", splits=True),
    _fixed("zb_v", zb_v, 2, "microbatch", "v", splits=True),
    _fixed("dual_pipe_v", dual_pipe_v, 2, "microbatch", "v", splits=True),
)
SCHEDULES = {family.name: family for family in _FAMILIES}
"""Every named schedule."""
