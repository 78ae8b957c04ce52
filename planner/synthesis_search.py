"""The search behind the schedule synthesiser: wishes, the orders they lead to, and better wishes.

A wish is a moment at which each action would like to start. The compiled loop turns any wish into
an order that is legal and within the cap, and times it. So the search never meets an order that it
must throw away, and one wish is one whole schedule evaluated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random

import numpy as np

from planner.synthesis_kernels import BACKWARD, FORWARD, WEIGHT, Bools, Int64, Pipeline, place
from simulator.schedule import MICROBATCH_SHIFT, STAGE_MASK, STAGE_SHIFT, B, Codes, I, Schedule, W

PATIENCE = 255
"""Wait as long as an optimal order may have to; 0 never waits while there is something to do."""
STRETCHES = (1.0, 1.5, 2.0, 3.0)
"""How much slower than they could, gradients travel in a rule: the deeper the warm-up."""
WEIGHT_LAGS = (0, 1, 3)
"""How many micro-batches' work a weight half stays behind its input half in a rule."""
DEPTHS = (1, 2)
"""Micro-batches in flight in a rule, in multiples of those that fit whole on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wish:
    """What an order should look like; the fields are those of `synthesis_kernels.place`."""

    priority: Int64
    is_whole: Bools
    max_in_flight: int
    patience: int = PATIENCE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """What came of a wish: the length of the step, all starts [3, S, m], and the actions [A]."""

    wish: Wish
    length_ns: int
    starts_ns: Int64
    codes: Codes


def fulfil(pipeline: Pipeline, wish: Wish) -> Order | None:
    """Return the order that comes of `wish`, or None if it gets stuck."""
    starts = np.zeros(wish.priority.shape, np.int64)
    codes = np.empty(starts.size - int(wish.is_whole.sum()), np.int64)
    length = place(
        pipeline, wish.priority, wish.is_whole, wish.patience, wish.max_in_flight, starts, codes
    )
    if length < 0:
        return None
    return Order(wish=wish, length_ns=int(length), starts_ns=starts, codes=codes)


def schedule_of(pipeline: Pipeline, order: Order) -> Schedule:
    """Return `order` in the language of schedules."""
    num_stages, num_microbatches = order.wish.is_whole.shape
    rank_of = pipeline.homes[(order.codes >> STAGE_SHIFT) & STAGE_MASK]
    return Schedule(
        name="synthesised",
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        orders=tuple(order.codes[rank_of == rank] for rank in range(len(pipeline.offsets) - 1)),
    )


def rules(pipeline: Pipeline, num_microbatches: int, *, splits_backward: bool) -> Iterator[Wish]:
    """Yield the wishes of simple rules, those that split fewer backwards first.

    All are periodic: micro-batch k wants to start one period, the work of the busiest rank, after
    micro-batch k - 1. They differ in how late gradients and weight halves are due, in how many
    micro-batches are in flight, and in whether a rank waits. The first depth cannot get stuck.
    """
    m, num_stages = num_microbatches, len(pipeline.homes)
    cap, whole_bytes = pipeline.room_bytes
    fits = min([m, *(cap[whole_bytes > 0] // whole_bytes[whole_bytes > 0]).tolist()])
    depths = sorted({min(m, depth * fits) for depth in DEPTHS} | {m})
    for num_whole in (num_stages, 1, 0) if splits_backward else (num_stages,):
        is_whole = np.zeros((num_stages, m), np.bool_)
        is_whole[:num_whole] = True
        lags = (*WEIGHT_LAGS, m) if num_whole < num_stages else (0,)
        for priority in _periodic(pipeline, is_whole, lags):
            for depth, patience in product(depths, (PATIENCE, 0)):
                yield Wish(
                    priority=priority, is_whole=is_whole, max_in_flight=depth, patience=patience
                )


def _periodic(pipeline: Pipeline, is_whole: Bools, lags: Sequence[int]) -> Iterator[Int64]:
    """Yield priorities [3, S, m] of the rules: due times of micro-batch 0, then period by period.

    Gradients are due before everything, then ever later, and in the end behind all forwards.
    """
    ns, homes = pipeline.ns, pipeline.homes
    m = is_whole.shape[1]
    backward = np.where(is_whole[:, 0], ns[B], ns[I])
    work = ns[0] + backward + np.where(is_whole[:, 0], 0, ns[W])
    period = max(int(work[homes == rank].sum()) for rank in range(len(pipeline.offsets) - 1))
    crosses = homes[1:] != homes[:-1]
    forward = np.cumsum([0, *(ns[0, :-1] + ns[4, :-1] * crosses).tolist()])
    hops = backward[1:] + ns[5, 1:] * crosses
    way_back = np.append(np.cumsum(hops[::-1])[::-1], 0)
    turn = forward[-1] + ns[0, -1]
    dues = [turn + np.floor(stretch * way_back).astype(np.int64) for stretch in STRETCHES]
    later = period * np.arange(m)
    for due in (forward - m * period, *dues, forward + m * period):
        for lag in lags:
            first = np.stack((forward, due, due + backward + lag * period))
            yield first[:, :, None] + later


def wish_of(orders: Sequence[Codes], num_stages: int, num_microbatches: int) -> Wish:
    """Return the wish for given orders of the ranks: each action in its place."""
    priority = np.zeros((3, num_stages, num_microbatches), np.int64)
    is_whole = np.zeros((num_stages, num_microbatches), np.bool_)
    row_of = np.array([FORWARD, BACKWARD, BACKWARD, WEIGHT])
    for codes in orders:
        kind, stage = codes & 3, (codes >> STAGE_SHIFT) & STAGE_MASK
        microbatch = codes >> MICROBATCH_SHIFT
        priority[row_of[kind], stage, microbatch] = np.arange(len(codes))
        is_whole[stage, microbatch] |= kind == B
    return Wish(priority=priority, is_whole=is_whole, max_in_flight=num_microbatches)


def improve(
    pipeline: Pipeline,
    order: Order,
    *,
    splits_backward: bool,
    bound_ns: int,
    num_trials: int,
    seed: int,
) -> Order:
    """Return an order that is no longer than `order`, after `num_trials` changes of its wishes.

    The wish of an order is its own starts. Each trial changes the wishes of a few runs of actions;
    what is not longer is kept, so that the search wanders over orders of equal length. It ends
    early at `bound_ns`, which no order can beat.
    """
    random = Random(seed)
    work = (pipeline.ns[0] + pipeline.ns[1]).tolist()
    for _ in range(num_trials):
        if order.length_ns <= bound_ns:
            break
        wish = replace(order.wish, priority=order.starts_ns.copy())
        if splits_backward and random.random() < 0.2:
            wish = _split_or_join(wish, random, work)
        else:
            for _ in range(1 + int(3 * random.random())):
                _shift(wish, random, work, num_rows=3 if splits_backward else 2)
        found = fulfil(pipeline, wish)
        if found is not None and found.length_ns <= order.length_ns:
            order = found
    return order


def _run(random: Random, num_stages: int, num_microbatches: int) -> tuple[int, slice]:
    """Return a stage and a run of its micro-batches; short and long runs are equally likely."""
    stage = int(num_stages * random.random())
    first = int(num_microbatches * random.random())
    length = 1 << int((num_microbatches.bit_length() + 1) * random.random())
    return stage, slice(first, first + length)


def _shift(wish: Wish, random: Random, work_ns: Sequence[int], num_rows: int) -> None:
    """Let a run of one kind of action start earlier or later, by up to a few micro-batches' work.

    `wish.priority` is changed in place: it is the caller's own.
    """
    _, num_stages, m = wish.priority.shape
    row = int(num_rows * random.random())
    stage, run = _run(random, num_stages, m)
    scale_ns = work_ns[stage] * 2.0 ** int(5 * random.random() - 1)
    wish.priority[row, stage, run] += round((2 * random.random() - 1) * scale_ns)


def _split_or_join(wish: Wish, random: Random, work_ns: Sequence[int]) -> Wish:
    """Return `wish` with the backwards of a run split, or done whole."""
    stage, run = _run(random, *wish.is_whole.shape)
    is_whole = wish.is_whole.copy()
    is_whole[stage, run] = random.random() < 0.5
    delay_ns = round(3 * work_ns[stage] * random.random())
    wish.priority[WEIGHT, stage, run] = wish.priority[BACKWARD, stage, run] + delay_ns
    return replace(wish, is_whole=is_whole)


def join_halves(pipeline: Pipeline, order: Order) -> Order:
    """Return `order` with the halves that stand side by side joined, where that costs nothing."""
    stages = (order.codes >> STAGE_SHIFT) & STAGE_MASK
    for stage in range(len(pipeline.homes)):
        is_own = pipeline.homes[stages] == pipeline.homes[stage]
        own = order.codes[is_own]
        follows = (own[:-1] & 3 == I) & (own[1:] == own[:-1] + 1)
        of_stage = follows & ((own[:-1] >> STAGE_SHIFT) & STAGE_MASK == stage)
        if not of_stage.any():
            continue
        is_whole = order.wish.is_whole.copy()
        is_whole[stage, own[:-1][of_stage] >> MICROBATCH_SHIFT] = True
        wish = replace(order.wish, priority=order.starts_ns, is_whole=is_whole)
        joined = fulfil(pipeline, wish)
        if joined is not None and joined.length_ns <= order.length_ns:
            order = joined
            stages = (order.codes >> STAGE_SHIFT) & STAGE_MASK
    return order
