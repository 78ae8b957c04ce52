"""The compiled loop of the schedule synthesiser: one order of all ranks, built forward in time.

Each stage does its micro-batches in turn, so a rank has at most three actions to choose from for
each of its stages: the next forward, the next backward (whole, or its input half) and the next
weight half. Which one it takes is the caller's wish, `priority`: the lower goes first. An order
that is built in time is legal by its making. It also reads the messages of each link in the order
in which they were sent, so that it is legal under a rendezvous as well, and no rank ever holds
more than its cap. Callers check everything; nothing here does.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from simulator.compiled import NEVER, compiled, inlined

Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FORWARD, BACKWARD, WEIGHT = range(3)
"""Rows of actions; a backward is a `B` where it is whole, else an `I`."""
CLOCK, ALIVE, FIRST_START, FIRST_END = range(4)
"""Rows of what is known of the ranks."""


class Pipeline(NamedTuple):
    """What is to be ordered; nothing here changes. S stages on p ranks.

    The stages of rank r are `stages[offsets[r]:offsets[r + 1]]`.
    """

    ns: Int64  # [6, S]: F, B, I, W, and the messages of a forward and of a backward
    homes: Int64  # [S]
    stages: Int64  # [S]
    offsets: Int64  # [p + 1]
    edges_ns: Int64  # [2, p]: before the first action, and after the last one
    alive_bytes: Int64  # [2, S]: of a micro-batch until its backward, and then until its W
    room_bytes: Int64  # [2, p]: the cap, and one micro-batch on all stages of the rank


@compiled
def place(
    pipeline: Pipeline, priority: Int64, is_whole: Bools, patience: int, max_in_flight: int,
    starts_ns: Int64, codes: Int64,
) -> int:  # fmt: skip
    """Order all actions; return the length of the step in ns, or -1 if it got stuck.

    priority [3, S, m]; is_whole [S, m]: this backward is not split. A rank waits for an action that
    it prefers, but no longer than `patience` / 256 of the time until the first of its choices could
    have ended. Stage 0 starts a micro-batch only while fewer than `max_in_flight` have not come
    back to it. Filled are starts_ns [3, S, m], and codes [A]: the actions as `simulator.schedule`
    packs them, each behind all that it waits for. Stuck: what the ranks must read next needs memory
    that only later messages would free.

    Of all next actions, the one that could end first names the rank to serve: nothing that is not
    known yet can reach that rank before. These are the active schedules of Giffler and Thompson
    (1960), some of which are optimal; patience is a dial between them and never waiting.
    """
    ns, homes, edges_ns = pipeline.ns, pipeline.homes, pipeline.edges_ns
    num_stages, m, num_ranks = len(homes), is_whole.shape[1], edges_ns.shape[1]
    done, choices = np.zeros((3, num_stages), np.int64), np.empty((3, num_stages), np.int64)
    arrivals = np.full((2, num_stages, m), -1, np.int64)
    turns = np.full((2, num_stages, m), -1, np.int64)
    num_sent = np.zeros((num_ranks, num_ranks), np.int64)
    num_read = np.zeros((num_ranks, num_ranks), np.int64)
    free_ns = np.zeros((num_ranks, num_ranks), np.int64)
    ranks = np.zeros((4, num_ranks), np.int64)
    for k in range(m):
        arrivals[FORWARD, 0, k] = arrivals[BACKWARD, num_stages - 1, k] = 0
    for rank in range(num_ranks):
        ranks[CLOCK, rank] = edges_ns[0, rank]
        look(rank, pipeline, is_whole, max_in_flight, done, arrivals, turns, num_read, ranks,
             choices)  # fmt: skip
    for position in range(len(codes)):
        rank = int(np.argmin(ranks[FIRST_END]))
        first_start, first_end = ranks[FIRST_START, rank], ranks[FIRST_END, rank]
        if first_end == NEVER:
            return -1
        limit = first_start + (first_end - first_start) * patience // 256
        row, stage = wanted(rank, pipeline, priority, limit, done, choices)
        k, start = done[row, stage], choices[row, stage]
        kind = row if row == FORWARD or (row == BACKWARD and is_whole[stage, k]) else row + 1
        starts_ns[row, stage, k] = start
        codes[position] = k << 24 | stage << 2 | kind
        end = ranks[CLOCK, rank] = start + ns[kind, stage]
        done[row, stage] += 1
        held, kept = pipeline.alive_bytes[0, stage], pipeline.alive_bytes[1, stage]
        ranks[ALIVE, rank] += (held, -held, kept - held, -kept)[kind]
        if row != WEIGHT:
            if turns[row, stage, k] >= 0:
                num_read[homes[stage - 1 + 2 * row], rank] += 1
            there = send(rank, row, stage, k, end, pipeline, arrivals, turns, num_sent, free_ns)
            if there >= 0 and there != rank:
                look(there, pipeline, is_whole, max_in_flight, done, arrivals, turns, num_read,
                     ranks, choices)  # fmt: skip
        look(rank, pipeline, is_whole, max_in_flight, done, arrivals, turns, num_read, ranks,
             choices)  # fmt: skip
    longest = 0
    for rank in range(num_ranks):
        longest = max(longest, ranks[CLOCK, rank] + edges_ns[1, rank])
    return longest


@inlined
def send(
    rank: int, row: int, stage: int, k: int, end: int, pipeline: Pipeline, arrivals: Int64,
    turns: Int64, num_sent: Int64, free_ns: Int64,
) -> int:  # fmt: skip
    """Pass an output that is there at `end` on; return the rank that reads it, or -1."""
    reader = stage + 1 - 2 * row
    if not 0 <= reader < len(pipeline.homes):
        return -1
    there = pipeline.homes[reader]
    if there != rank:
        end = max(end, free_ns[rank, there]) + pipeline.ns[4 + row, stage]
        free_ns[rank, there] = end
        turns[row, reader, k] = num_sent[rank, there]
        num_sent[rank, there] += 1
    arrivals[row, reader, k] = end
    return there  # type: ignore[no-any-return]


@inlined
def wanted(
    rank: int, pipeline: Pipeline, priority: Int64, limit: int, done: Int64, choices: Int64
) -> tuple[int, int]:
    """Return row and stage of the action that is wanted most of those that can start by `limit`."""
    best, best_row, best_stage = NEVER, -1, -1
    for index in range(pipeline.offsets[rank], pipeline.offsets[rank + 1]):
        stage = pipeline.stages[index]
        for row in range(3):
            if choices[row, stage] <= limit and priority[row, stage, done[row, stage]] < best:
                best, best_row, best_stage = priority[row, stage, done[row, stage]], row, stage
    return best_row, best_stage


@inlined
def look(
    rank: int, pipeline: Pipeline, is_whole: Bools, max_in_flight: int, done: Int64, arrivals:
    Int64, turns: Int64, num_read: Int64, ranks: Int64, choices: Int64,
) -> None:  # fmt: skip
    """Note when the next actions of a rank could start (NEVER: not as things are), and the first.

    A forward must leave a way out: beside all that is held by micro-batches behind the oldest one
    that has forwards left here, a whole one must have room. Then the oldest can always end, and
    after it the next.
    """
    ns, homes, stages, offsets, _, alive_bytes, room_bytes = pipeline
    clock, cap, m = ranks[CLOCK, rank], room_bytes[0, rank], is_whole.shape[1]
    first, last = offsets[rank], offsets[rank + 1]
    oldest, needed, first_start, first_end = m, room_bytes[1, rank], NEVER, NEVER
    for index in range(first, last):
        oldest = min(oldest, done[FORWARD, stages[index]])
    for index in range(first, last):
        num_behind = max(0, done[FORWARD, stages[index]] - oldest - 1)
        needed += alive_bytes[0, stages[index]] * num_behind
    for index in range(first, last):
        stage = stages[index]
        # A weight half that was done in a whole backward is none to wait for.
        while done[WEIGHT, stage] < done[BACKWARD, stage] and is_whole[stage, done[WEIGHT, stage]]:
            done[WEIGHT, stage] += 1
        for row in range(3):
            k, held, start, kind = done[row, stage], alive_bytes[0, stage], NEVER, row
            if row == WEIGHT:
                kind = 3
                if k < done[BACKWARD, stage]:
                    start = clock
            elif row == BACKWARD:
                if k < done[FORWARD, stage]:
                    kind = 1 if is_whole[stage, k] else 2
                    start = max(clock, arrivals[row, stage, k])
            elif (
                k < m
                and ranks[ALIVE, rank] + held <= cap
                and (k == oldest or needed + held <= cap)
                and (stage > 0 or k - done[BACKWARD, 0] < max_in_flight)
            ):
                start = max(clock, arrivals[row, stage, k])
            if row != WEIGHT and start < NEVER:
                turn = turns[row, stage, k]
                is_next = turn < 0 or turn == num_read[homes[stage - 1 + 2 * row], rank]
                if arrivals[row, stage, k] < 0 or not is_next:
                    start = NEVER
            choices[row, stage] = start
            if start < NEVER:
                first_start = min(first_start, start)
                first_end = min(first_end, start + ns[kind, stage])
    ranks[FIRST_START, rank], ranks[FIRST_END, rank] = first_start, first_end
