"""Tier 1: walks the orders of a schedule, without a graph, for one candidate or many side by side.

A replica is a chain of ranks and each rank a queue of actions, so one clock a rank and one arrival
an input are all that there is to know. The convention of messages is that of `simulator.step`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64
from simulator.deadlock import DeadlockError
from simulator.graph import OpCosts
from simulator.jitter import MASK, STRIDE, Jitter, mix
from simulator.schedule import Schedule
from simulator.step import (
    SEND_B,
    SEND_F,
    Convention,
    LoweredStep,
    StepTimes,
    dataflow,
    lower,
)
from simulator.walk_kernels import UNKNOWN, follow, walk

LANES = 16
"""Candidates timed side by side: enough to fill vector registers, few enough for the cache."""
_NO_TABLES, _NOTHING = np.zeros((2, 0), np.int64), np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Walk:
    """One walked step: the end of each action [A], rank by rank, and of each rank with its `after`.

    `inputs_ns` [2, S, m] is when the input of each forward, and of each backward, is there;
    `sequence` [A] lists the actions so that each comes after all that it waits for.
    """

    action_ends_ns: Int64
    inputs_ns: Int64
    rank_ends_ns: Int64
    sequence: npt.NDArray[np.int32]

    @property
    def makespan_ns(self) -> int:
        """Length of the step: no message outlasts the action that reads it."""
        return int(self.rank_ends_ns.max())


def walk_step(
    schedule: Schedule,
    times: StepTimes,
    lane: int = 0,
    convention: Convention = "eager",
    jitter: Jitter | None = None,
) -> Walk:
    """Return the walk of one lane of `times`; raises DeadlockError for an order that blocks itself.

    >>> from simulator.schedule import parse_schedule
    >>> from simulator.step import step_times
    >>> schedule = parse_schedule("0F0 0F1 0B0 0B1\\n1F0 1B0 1F1 1B1")
    >>> walk_step(schedule, step_times(2, forward=10, backward=20)).action_ends_ns.tolist()
    [10, 20, 60, 90, 20, 40, 50, 70]
    """
    return _walk(schedule, times, lane, convention, jitter, num_kept=schedule.num_actions)


def _walk(
    schedule: Schedule,
    times: StepTimes,
    lane: int,
    convention: Convention,
    jitter: Jitter | None,
    num_kept: int,
) -> Walk:
    """Return the walk with all ends and the sequence, or, where `num_kept` is 0, without them."""
    num_stages, m = schedule.num_stages, schedule.num_microbatches
    before, after = (_by_rank(schedule, edge[:, lane]) for edge in times.edge_ns())
    inputs = np.full(2 * num_stages * m, UNKNOWN, np.int64)
    inputs[:m] = inputs[-m:] = 0
    action_ends, sequence = np.empty(num_kept, np.int64), np.empty(num_kept, np.int32)
    keys = np.zeros((6, num_stages), np.int64) if jitter is None else _keys(jitter.seed, num_stages)
    num_done = walk(
        schedule.codes, schedule.offsets, schedule.homes, m,
        np.ascontiguousarray(times.ns[:6, :, lane]), keys,
        _NO_TABLES if jitter is None else jitter.tables(), before, inputs, action_ends, sequence,
        *_rendezvous(schedule, convention),
    )  # fmt: skip
    if num_done < schedule.num_actions:
        raise blocked(schedule, convention)
    return Walk(
        action_ends_ns=action_ends,
        inputs_ns=inputs.reshape(2, num_stages, m),
        rank_ends_ns=before + after,
        sequence=sequence,
    )


def step_ns(
    schedule: Schedule,
    times: StepTimes,
    *,
    convention: Convention = "eager",
    jitters: Sequence[Jitter] = (),
) -> Int64:
    """Return the length of one step in ns, for each lane of `times` [L].

    With `jitters`, one a lane, each lane draws its own durations; one lane of times serves them
    all. Raises ValueError for times of another number of stages, and DeadlockError for an order
    that blocks itself.

    >>> from simulator.schedule import parse_schedule
    >>> from simulator.step import step_times
    >>> schedule = parse_schedule("0F0 0F1 0B0 0B1\\n1F0 1B0 1F1 1B1")
    >>> step_ns(schedule, step_times(2, forward=[[10, 5, 0]], backward=20)).tolist()
    [90, 75, 60]
    """
    check_times(schedule, times)
    if jitters and times.num_lanes not in (1, len(jitters)):
        raise ValueError(f"{len(jitters)} jitters for {times.num_lanes} lanes; give as many")
    if jitters or convention == "rendezvous" or times.num_lanes == 1:
        # Posting receives takes the ends of the actions before.
        num_kept = schedule.num_actions if convention == "rendezvous" else 0
        chances: Sequence[Jitter | None] = jitters or [None] * times.num_lanes
        return np.array(
            [
                _walk(
                    schedule, times, i % times.num_lanes, convention, jitter, num_kept
                ).makespan_ns
                for i, jitter in enumerate(chances)
            ]
        )
    first = walk_step(schedule, times)
    rest = [
        _follow(schedule, times, start, first.sequence)
        for start in range(1, times.num_lanes, LANES)
    ]
    return np.concatenate([np.array([first.makespan_ns]), *rest])


def ends_of_ops(walked: Walk, step: LoweredStep, costs: OpCosts) -> Int64:
    """Return the end of each op [N] of the graph of a walked step."""
    ends = np.zeros(len(step.graph), np.int64)
    is_message = (step.part == SEND_F) | (step.part == SEND_B)
    way = step.part[is_message] - SEND_F
    reader = step.stage[is_message] + 1 - 2 * way
    ends[is_message] = walked.inputs_ns[way, reader, step.microbatch[is_message]]
    ends[step.action_op] = walked.action_ends_ns
    # What is left stands before the first action of a rank or behind its last one.
    is_action = np.zeros(len(ends), np.bool_)
    is_action[step.action_op] = True
    stream = step.graph.stream
    for rank in np.unique(stream[~is_message]).tolist():
        ops = np.flatnonzero((stream == rank) & ~is_message)
        first, last = np.flatnonzero(is_action[ops])[[0, -1]].tolist()
        before, after = ops[:first], ops[last + 1 :]
        ends[before] = np.cumsum(costs.ns[before])
        ends[after] = ends[ops[last]] + np.cumsum(costs.ns[after])
    return ends


def check_times(schedule: Schedule, times: StepTimes) -> None:
    """Raise ValueError where `times` are of another number of stages than `schedule`."""
    if times.num_stages != schedule.num_stages:
        raise ValueError(
            f"times of {times.num_stages} stages for schedule {schedule.name} "
            f"of {schedule.num_stages}"
        )


def blocked(schedule: Schedule, convention: Convention) -> DeadlockError:
    """Return the error that names who waits for whom in an order that blocks itself."""
    from simulator.loop import wire  # tier 2, which a walk does not need

    try:
        wire(lower(schedule, convention=convention).graph)
    except DeadlockError as error:
        return error
    raise AssertionError(f"the walk of schedule {schedule.name} ended early, its graph does not")


def _rendezvous(schedule: Schedule, convention: Convention) -> tuple[Int64, Int64, Int64, Int64]:
    """Return what each action reads, and senders, posts and first of the messages by link."""
    if convention == "eager":
        return _NOTHING, _NOTHING, _NOTHING, _NOTHING
    flows = dataflow(schedule)
    by_link = np.argsort(flows.link, kind="stable")
    reads = np.full(schedule.num_actions, -1, np.int64)
    reads[flows.receiver[by_link]] = np.arange(len(by_link))
    link = flows.links[:, 0] * schedule.num_ranks + flows.links[:, 1]
    counts = np.bincount(link[flows.link], minlength=schedule.num_ranks**2)
    first = np.concatenate(([0], np.cumsum(counts)[:-1]))
    return reads, flows.sender[by_link], flows.posts()[by_link], first


def _follow(
    schedule: Schedule,
    times: StepTimes,
    start: int,
    sequence: npt.NDArray[np.int32],
) -> Int64:
    lanes = slice(start, min(start + LANES, times.num_lanes))
    num_lanes = lanes.stop - lanes.start
    before, after = (_by_rank(schedule, edge[:, lanes]) for edge in times.edge_ns())
    inputs = np.zeros((2, schedule.num_stages * schedule.num_microbatches, num_lanes), np.int64)
    follow(
        schedule.codes, sequence, schedule.homes, schedule.num_microbatches,
        np.ascontiguousarray(times.ns[:6, :, lanes]), before, inputs,
    )  # fmt: skip
    ends: Int64 = (before + after).max(axis=0)
    return ends


def _by_rank(schedule: Schedule, stage_ns: Int64) -> Int64:
    """Return the sum of a time of stages [S] or [S, L] over the stages of each rank."""
    total = np.zeros((schedule.num_ranks, *stage_ns.shape[1:]), np.int64)
    np.add.at(total, schedule.homes, stage_ns)
    return total


def _keys(seed: int, num_stages: int) -> Int64:
    """Return the first half of `jitter.draws` for each part and stage [6, S]."""
    parts, stages = np.arange(6)[:, None], np.arange(num_stages)[None, :]
    return mix(mix((seed ^ (parts * STRIDE)) & MASK) ^ stages)
