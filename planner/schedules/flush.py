"""GPipe and 1F1B: one stage a rank, drained at the end of every step."""

import numpy as np

from planner.schedules.order import rounds_of_ranks
from simulator.schedule import B, F, Schedule, check_size, encode


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Return GPipe: all forwards, then all backwards.

    Step of uniform stages: (m + p - 1) * (F + B); every stage keeps m micro-batches alive.
    Source: Huang et al., GPipe (arXiv:1811.06965). Backwards go in the order of the forwards, as
    in PyTorch's `ScheduleGPipe`.

    >>> print(gpipe(2, 2))
    0F0 0F1 0B0 0B1
    1F0 1F1 1B0 1B1
    """
    check_size("gpipe", num_ranks, num_microbatches, num_ranks)
    microbatches = np.arange(num_microbatches)
    columns = (encode(F, 0, microbatches), encode(B, 0, microbatches))
    return Schedule(
        name="gpipe",
        num_stages=num_ranks,
        num_microbatches=num_microbatches,
        orders=rounds_of_ranks(num_ranks, columns, lambda _: (0, num_microbatches)),
    )


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Return 1F1B: a warm-up of forwards, then one forward and one backward in turn.

    Step of uniform stages: (m + p - 1) * (F + B), as GPipe; stage s keeps min(p - s, m) alive.
    Source: Narayanan et al., PipeDream-Flush (arXiv:2104.04473), section 2.2.

    >>> print(one_f_one_b(2, 3))
    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 1B0 1F1 1B1 1F2 1B2
    """
    check_size("1f1b", num_ranks, num_microbatches, num_ranks)
    microbatches = np.arange(num_microbatches)
    columns = (encode(F, 0, microbatches), encode(B, 0, microbatches))
    return Schedule(
        name="1f1b",
        num_stages=num_ranks,
        num_microbatches=num_microbatches,
        orders=rounds_of_ranks(num_ranks, columns, lambda rank: (0, num_ranks - 1 - rank)),
    )
