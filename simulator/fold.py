"""The micro-batch fold: a long deterministic step told from a short one, with a certificate.

Schedules such as 1F1B repeat: with `period` more micro-batches each rank does one more *block* of
actions in the middle of its order, the same one `period` micro-batches on. Times are sums and
maxima of other times, so they repeat too once a *window* of blocks does: if every end in `reach`
consecutive blocks is that of `cycle` blocks before plus one constant `shift`, so is every later
one, for an action of a block waits for nothing outside of the `reach` blocks around it. Then
`cycle` more blocks make the step longer by `shift`, exactly. Where no window is found the step is
walked in full.

The certificate holds for the orders that were built; that longer ones of the same family only gain
blocks is the promise of `period` and `steady_from`, which tests hold every family to.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64
from simulator.schedule import MICROBATCH_SHIFT, Schedule
from simulator.step import Convention, StepTimes, dataflow
from simulator.walk import walk_step

WORTH = 128
"""A certificate costs as much as walking about so many times its own micro-batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A step length in ns; `num_walked` micro-batches were walked for it, `cycle` blocks repeat.

    `cycle` is 0 where nothing was certified and the whole step was walked.
    """

    makespan_ns: int
    num_walked: int
    cycle: int


def folded_step(
    build: Callable[[int], Schedule],
    num_microbatches: int,
    period: int,
    steady_from: int,
    times: StepTimes,
    lane: int = 0,
    convention: Convention = "eager",
) -> Fold:
    """Return the length of the step of `build(num_microbatches)`, walking as little as it can.

    `period` micro-batches are one block, from `steady_from` micro-batches on; period 0: never.
    """
    m = num_microbatches
    num_walked = steady_from + 4 * period
    while period and num_walked * WORTH <= m:
        # As many beyond whole blocks as the long step has.
        short = num_walked + (m - num_walked) % period
        found = _certify(build(short), period, times, lane, convention)
        if found is not None:
            cycle, shift_ns = found
            num_more, rest = divmod((m - short) // period, cycle)
            walked = short + rest * period
            step = walk_step(build(walked), times, lane, convention)
            return Fold(
                makespan_ns=step.makespan_ns + num_more * shift_ns, num_walked=walked, cycle=cycle
            )
        num_walked *= 2
    step = walk_step(build(m), times, lane, convention)
    return Fold(makespan_ns=step.makespan_ns, num_walked=m, cycle=0)


def _certify(
    schedule: Schedule, period: int, times: StepTimes, lane: int, convention: Convention
) -> tuple[int, int] | None:
    """Return the smallest cycle in blocks and its shift in ns, or None where none is certain."""
    if (blocks := _blocks(schedule, period)) is None:
        return None
    first, length, num_blocks = blocks
    reach = _reach(schedule, blocks)
    if reach < 1:
        return None
    ends = walk_step(schedule, times, lane, convention).action_ends_ns
    rows = np.concatenate(
        [
            ends[start : start + num_blocks * size].reshape(num_blocks, size)
            for start, size in zip(first.tolist(), length.tolist(), strict=True)
        ],
        axis=1,
    )
    # The cyclicity of a 1F1B pipeline is at most its number of ranks.
    for cycle in range(1, schedule.num_ranks + 1):
        shifts = rows[cycle:] - rows[:-cycle]
        level = shifts[:, 0]
        # A window that begins at i is good if none of its blocks is uneven and no two differ; the
        # last `reach` blocks touch the drain, so it must end before them.
        num_uneven = _counts(shifts.min(axis=1) != shifts.max(axis=1))
        num_differing = _counts(level[1:] != level[:-1])
        begin = np.arange(max(len(level) - 2 * reach, 0))
        is_good = (num_uneven[begin + reach] == num_uneven[begin]) & (
            num_differing[begin + reach - 1] == num_differing[begin]
        )
        if is_good.any():
            return cycle, int(level[np.argmax(is_good)])
    return None


def _counts(flags: npt.NDArray[np.bool_]) -> Int64:
    """Return how many of the first 0, 1, 2, ... flags are set."""
    return np.concatenate(([0], np.cumsum(flags)))


def _blocks(schedule: Schedule, period: int) -> tuple[Int64, Int64, int] | None:
    """Return where the blocks of each rank begin [p], their lengths [p], and how many all have."""
    first, length, counts = [], [], []
    for start, order in zip(schedule.offsets[:-1].tolist(), schedule.orders, strict=True):
        size, rest = divmod(len(order) * period, schedule.num_microbatches)
        if rest or size >= len(order):
            return None
        repeats = order[size:] - order[:-size] == period << MICROBATCH_SHIFT
        # The longest stretch of actions that come again one block later.
        edges = np.flatnonzero(np.diff(np.concatenate(([0], repeats.astype(np.int8), [0]))))
        if not len(edges):
            return None
        longest = int(np.argmax(edges[1::2] - edges[::2]))
        begin, end = int(edges[2 * longest]), int(edges[2 * longest + 1])
        first.append(start + begin)
        length.append(size)
        counts.append((end - begin) // size + 1)
    return np.array(first), np.array(length), min(counts)


def _reach(schedule: Schedule, blocks: tuple[Int64, Int64, int]) -> int:
    """Return how many blocks around its own an action can depend on; 0 where that is unclear.

    One more than the largest distance between the blocks of an action and of its input: messages
    wait in line behind those of one block before.
    """
    first, length, num_blocks = blocks
    rank = np.repeat(np.arange(schedule.num_ranks), np.diff(schedule.offsets))
    block = (np.arange(schedule.num_actions) - first[rank]) // length[rank]
    flows = dataflow(schedule)
    readers = np.concatenate((flows.reader, flows.receiver, flows.receiver))
    sources = np.concatenate((flows.source, flows.sender, flows.posts()))
    distance = np.abs(block[readers] - block[sources])
    middle = (block[readers] >= 0) & (block[readers] < num_blocks)
    reach = int(distance[middle].max(initial=0)) + 1
    # What comes after the blocks must not look back further than that either.
    after = block[readers] >= num_blocks
    if (distance[after] > reach).any() or 3 * reach >= num_blocks:
        return 0
    return reach
