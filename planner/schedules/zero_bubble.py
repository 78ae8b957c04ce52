"""The zero-bubble schedules of one stage a rank: weight gradients wait until a rank would idle.

Legend: p ranks, m micro-batches; F, I and W are the times of a stage's actions. Both put down
their `W` from the same round on on every rank: rank r then holds back as many as it has idle slots
at the end. That evens out the memory too: what a rank warms up with less, it holds back more.
Source: Qi et al., Zero Bubble Pipeline Parallelism (arXiv:2401.10241), section 2.
"""

import numpy as np

from planner.schedules.order import rounds_of_ranks
from simulator.schedule import F, I, Schedule, W, check_size, encode


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """Return ZB-H1: the forwards of 1F1B, and the memory of its first rank on every rank.

    Step of uniform stages with I <= F, m >= p: m (F + I + W) + (p - 1) max(F, F + I - W); at
    F = I = W it is 3 m + p - 1 + max(0, p - m) units for any m, and from m = p on rank r idles for
    p - 1 - r of them. Alive until their `W`: min(p, m) on every rank, where 1F1B has min(p - r, m).

    >>> print(zb_h1(2, 3))
    0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2
    1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """
    return _zero_bubble("zb_h1", 1, num_ranks, num_microbatches)


def zb_h2(num_ranks: int, num_microbatches: int) -> Schedule:
    """Return ZB-H2: no rank idles between its first and its last action, for twice the memory.

    Step of uniform stages with I <= F, m >= 2 p - 1: m (F + I + W) + (p - 1) max(F, F + I - 2 W);
    at F = I = W it is 3 m + p - 1 + max(0, (2 p - 1 - m) // 2) units for any m, and from
    m = 2 p - 1 on each rank is busy for 3 m units on end. Alive until their `W`: min(2 p - 1, m) on
    every rank; until their `I`: min(2 (p - r) - 1, m) on rank r.

    >>> print(zb_h2(2, 3))
    0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2
    1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2
    """
    return _zero_bubble("zb_h2", 2, num_ranks, num_microbatches)


def _zero_bubble(name: str, lead: int, num_ranks: int, num_microbatches: int) -> Schedule:
    """Return the schedule in which each rank makes `lead` forwards more than its successor."""
    check_size(name, num_ranks, num_microbatches, num_ranks)
    columns = [encode(kind, 0, np.arange(num_microbatches)) for kind in (F, I, W)]
    first_weight = lead * (num_ranks - 1)
    return Schedule(
        name=name,
        num_stages=num_ranks,
        num_microbatches=num_microbatches,
        orders=rounds_of_ranks(
            num_ranks, columns, lambda rank: (0, first_weight - lead * rank, first_weight)
        ),
    )
