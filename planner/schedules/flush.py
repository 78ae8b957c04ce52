"""GPipe and 1F1B: one stage a rank, drained at the end of every step."""

import numpy as np

from simulator.schedule import B, Codes, F, Schedule, check_size, encode


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
    return Schedule(
        name="gpipe",
        num_stages=num_ranks,
        num_microbatches=num_microbatches,
        orders=tuple(
            np.concatenate((encode(F, stage, microbatches), encode(B, stage, microbatches)))
            for stage in range(num_ranks)
        ),
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
    return Schedule(
        name="1f1b",
        num_stages=num_ranks,
        num_microbatches=num_microbatches,
        orders=tuple(
            in_turn(
                encode(F, stage, microbatches),
                encode(B, stage, microbatches),
                num_ranks - 1 - stage,
            )
            for stage in range(num_ranks)
        ),
    )


def in_turn(forwards: Codes, backwards: Codes, num_warmup: int) -> Codes:
    """Return `num_warmup` forwards, then a forward and a backward in turn, then what is left.

    >>> in_turn(np.array([1, 2, 3]), np.array([10, 20, 30]), 1).tolist()
    [1, 2, 10, 3, 20, 30]
    """
    num_warmup = min(num_warmup, len(forwards))
    num_pairs = len(forwards) - num_warmup
    pairs = np.stack((forwards[num_warmup:], backwards[:num_pairs]), axis=1)
    return np.concatenate((forwards[:num_warmup], pairs.ravel(), backwards[num_pairs:]))
