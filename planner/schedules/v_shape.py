"""Schedules in the shape of a V: rank r has stages r and 2 p - 1 - r, the way out and the way back.

Legend: p ranks, m micro-batches; F, I and W are the times of one stage's actions; in the phases
below, 0 is the stage on the way out, 1 the one on the way back. The last rank turns a micro-batch
round without a message, and the first one has both ends of the model.
"""

from collections.abc import Callable

from planner.schedules.order import numbered, phase
from simulator.schedule import Schedule, check_size


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """Return ZB-V: the memory of 1F1B, and no rank idles between its first and last action.

    Step of uniform stages with F = I = W: 6 m + p - 1 + max(0, 3 p - 1 - 2 m) units; from
    m = 2 p - 1 on each rank is busy for 6 m units on end. Rank r keeps min(m + r + 1, 2 m, 2 p)
    micro-batches of one of its stages alive; two stages of the V hold what one of 1F1B does.
    Fewer than 2 p - 1 micro-batches leave gaps in the order of 2 p - 1.
    Source: Qi et al., Pipeline Parallelism with Controllable Memory (arXiv:2405.15362) and
    arXiv:2401.10241, section 6; the order is that of PyTorch's `ScheduleZBVZeroBubble`.

    >>> print(zb_v(2, 3))
    0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
    1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """
    return _v_shaped("zb_v", _zb_v_letters, num_ranks, num_microbatches, 2 * num_ranks - 1)


def _zb_v_letters(rank: int, num_ranks: int, num_microbatches: int) -> bytes:
    rest = num_ranks - rank
    return (
        phase(2 * rest - 1, "F0")
        + phase(rank, "F1 F0")
        + phase(rest, "F1 I1 W1")
        + phase(num_microbatches - num_ranks - rest + 1, "F0 I0 W0 F1 I1 W1")
        + phase(rest - 1, "I0 W0 F1 I1 W1")
        + phase(rank, "I0 I1")
        + phase(rest, "I0 W0")
        + phase(rank, "W1")
        + phase(rank, "W0")
    )


def dual_pipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """Return DualPipeV: a forward of one way is followed at once by a backward of the other.

    Such a pair is made to overlap: each hides the messages of the other. It stands here as two
    actions in a row. Step of uniform stages with F = I = W: 6 m + p - 1 units from m = 2 p on, with
    p - 1 - r of them idle on rank r; for fewer micro-batches, which leave gaps in the order of 2 p,
    2 (2 p - m - (1 if m <= p else 0)) more. Rank r keeps min(m + r + 1, 2 m, 2 p + 1) micro-batches
    of one of its stages alive.
    Source: DeepSeek-V3 (arXiv:2412.19437), section 3.2.1, cut in half as Sea AI Lab proposed;
    the order is that of PyTorch's `ScheduleDualPipeV`, which takes only m >= 2 p.

    >>> print(dual_pipe_v(2, 4))
    0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3
    1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3
    """
    return _v_shaped(
        "dual_pipe_v", _dual_pipe_v_letters, num_ranks, num_microbatches, 2 * num_ranks
    )


def _dual_pipe_v_letters(rank: int, num_ranks: int, num_microbatches: int) -> bytes:
    ahead, (half, odd) = num_ranks - 1 - rank, divmod(rank + 1, 2)
    # The last backwards are split; their weight halves come oldest first, the first of them each
    # before one of the last input halves.
    weights = phase(odd, "W0") + phase(half, "W1 W0") + phase(ahead, "W0")
    last = bytearray(phase(2 * ahead, "I0"))
    last[::2] = weights[:ahead]
    return (
        phase(2 * ahead, "F0")
        + phase(rank + 1, "F0 F1")
        + phase(ahead, "I1 W1 F1")
        + phase(num_microbatches - num_ranks - ahead, "F0 B1 F1 B0")
        + phase(ahead, "B1 F1 B0")
        + phase(half, "B1 B0")
        + phase(odd, "B1 I0")
        + phase(half, "I1 I0")
        + bytes(last)
        + weights[ahead:]
    )


def _v_shaped(
    name: str,
    letters: Callable[[int, int, int], bytes],
    num_ranks: int,
    num_microbatches: int,
    fewest: int,
) -> Schedule:
    """Return the schedule whose rank r does `letters(r, num_ranks, m)`, which is for m >= `fewest`.

    An order stays legal when all actions of some micro-batches are taken out of it.
    """
    num_stages = 2 * num_ranks
    check_size(name, num_stages, num_microbatches, num_ranks)
    written = max(num_microbatches, fewest)
    return Schedule(
        name=name,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        orders=tuple(
            numbered(
                letters(rank, num_ranks, written), (rank, num_stages - 1 - rank), num_microbatches
            )
            for rank in range(num_ranks)
        ),
    )
