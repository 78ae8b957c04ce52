"""Interleaved 1F1B and breadth-first: stage c * p + r is the c-th of rank r, v stages a rank.

Legend: p ranks, v stages a rank, m micro-batches; F and B are the times of one stage.
"""

import numpy as np

from planner.schedules.order import rounds_of_ranks
from simulator.schedule import B, F, Schedule, check_size, encode


def interleaved(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return interleaved 1F1B: groups of micro-batches go round all stages of a rank, 1F1B in turn.

    The micro-batches fall into max(1, m // p) groups of equal size or, where that does not divide
    m, one more in the first ones; g is the size of the largest: p where p divides m. A rank takes
    a group through its first stage, then through its second, and so on; backwards the other way
    round. Rank r warms up with 2 (p - 1 - r) + (v - 1) g forwards.

    Step of uniform stages: (m v + p - 1 + (v - 1) max(0, p - m)) * (F + B), whether p divides m or
    not: a group never goes short of p, so its first micro-batch is back when its last has left.
    Rank r keeps min(2 (p - 1 - r) + (v - 1) g + 1, m v) micro-batches of a stage alive.
    Source: Narayanan et al. (arXiv:2104.04473), section 2.2; the groups are those of PyTorch's
    `ScheduleInterleaved1F1B`, which takes only m that max(1, m // p) divides.

    >>> print(interleaved(2, 2, 4))
    0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3
    1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3
    """
    num_stages = num_ranks * stages_per_rank
    check_size("interleaved", num_stages, num_microbatches, num_ranks)
    num_groups = max(1, num_microbatches // num_ranks)
    size, num_larger = divmod(num_microbatches, num_groups)
    sizes = np.full(num_groups, size)
    sizes[:num_larger] += 1
    # Of every entry of the walk: the size of its group, where the group begins, its place in it.
    size_of = np.repeat(sizes, sizes * stages_per_rank)
    begin_of = np.repeat(np.cumsum(sizes) - sizes, sizes * stages_per_rank)
    chunks, places = np.divmod(np.arange(len(size_of)) - begin_of * stages_per_rank, size_of)
    microbatches = begin_of + places
    columns = (
        encode(F, chunks * num_ranks, microbatches),
        encode(B, (stages_per_rank - 1 - chunks) * num_ranks, microbatches),
    )
    num_warmup = (stages_per_rank - 1) * int(sizes[0])
    return Schedule(
        name="interleaved",
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        orders=rounds_of_ranks(
            num_ranks, columns, lambda rank: (0, 2 * (num_ranks - 1 - rank) + num_warmup)
        ),
    )


def breadth_first(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the breadth-first loop: all micro-batches through a stage before the next stage.

    Step of uniform stages: (m v + p - 1 + (v - 1) max(0, p - m)) * (F + B), as interleaved 1F1B;
    every rank keeps m v micro-batches of a stage alive, but with sharded weights gathers those of
    a stage once a step. Source: Lamy-Poirier (arXiv:2211.05953), section 4. Backwards go in
    reverse, the last micro-batch first, as in PyTorch's `ScheduleLoopedBFS`.

    >>> print(breadth_first(2, 2, 2))
    0F0 0F1 2F0 2F1 2B1 2B0 0B1 0B0
    1F0 1F1 3F0 3F1 3B1 3B0 1B1 1B0
    """
    num_stages = num_ranks * stages_per_rank
    check_size("breadth_first", num_stages, num_microbatches, num_ranks)
    chunks = np.repeat(np.arange(stages_per_rank), num_microbatches)
    microbatches = np.tile(np.arange(num_microbatches), stages_per_rank)
    columns = (
        encode(F, chunks * num_ranks, microbatches),
        encode(B, chunks * num_ranks, microbatches)[::-1],
    )
    return Schedule(
        name="breadth_first",
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        orders=rounds_of_ranks(num_ranks, columns, lambda _: (0, len(chunks))),
    )
