"""The finalists: what is left of the best layouts' order when no two kernels take the same time.

Equal replicas that never differ run in step; real ones do not. The best few are walked again with
durations that are drawn anew for every action, and a step ends when the slowest of the replicas is
done. The order of the ranking stays that of the medians, which the certificate is about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from planner.evaluate import Basis
from planner.layout import Layout
from planner.lower import MEDIAN, stage_times
from planner.orders import order_of
from planner.plan import Candidate
from simulator.engine import step_ns
from simulator.jitter import Jitter
from simulator.schedule import Schedule

NUM_FINALISTS = 8
NEAR = 0.01
"""How far behind the best a finalist may be, as part of its step."""
NUM_DRAWS = 16
SPREAD = 0.02
"""Standard deviation of a kernel's time from step to step and rank to rank, as part of it: the
throughput of 16,384 H100 went up and down by 1 to 2 % with the temperature of the day (The Llama 3
Herd of Models, arXiv:2407.21783, section 3.3.4)."""
MAX_ACTIONS = 1 << 17
"""Of an order that is walked again."""


def with_jitter(
    basis: Basis, ranking: Sequence[Candidate], orders: Mapping[Layout, Schedule], seed: int
) -> tuple[Candidate, ...]:
    """Return `ranking` with the mean jittered step of those that are within `NEAR` of the first."""
    best_ns = ranking[0].step.p50_ns
    return tuple(
        _jittered(basis, each, orders.get(each.layout), seed)
        if place < NUM_FINALISTS and each.step.p50_ns <= (1 + NEAR) * best_ns
        else each
        for place, each in enumerate(ranking)
    )


def _jittered(basis: Basis, candidate: Candidate, made: Schedule | None, seed: int) -> Candidate:
    """Return the candidate with the step in which the slowest of its replicas is done.

    The mean over draws m and their deviation s give m + E[max of n normals] s for n replicas, by
    Blom's approximation as in `planner.witness`.
    """
    layout = candidate.layout
    order = order_of(layout) if made is None else None
    if order is not None and 3 * layout.num_stages * layout.num_microbatches > MAX_ACTIONS:
        return candidate
    schedule = order.whole() if order is not None else made
    assert schedule is not None
    costs = basis.costs.stages(layout, schedule.homes.tolist())
    times = stage_times(schedule, [costs]).lane(MEDIAN)
    seeds = [(seed * NUM_DRAWS + draw) % (1 << 32) for draw in range(NUM_DRAWS)]
    jitters = [Jitter(seed=each, compute_spread=SPREAD, message_spread=SPREAD) for each in seeds]
    drawn = step_ns(schedule, times, jitters=jitters).astype(np.float64)
    late = 0.0
    if layout.dp > 1:
        late = NormalDist().inv_cdf((layout.dp - 0.375) / (layout.dp + 0.25))
    return replace(candidate, jittered_ns=round(float(drawn.mean() + late * drawn.std(ddof=1))))
