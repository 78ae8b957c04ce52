"""One optimizer step of a pipeline: what its parts take, what a message costs, and its graph.

**The message convention.** One message carries the output of one action to the rank of the stage
that reads it: of a forward `F` to the next stage, of a backward `B` or an input half `I` to the
previous one. Stages on one rank pass their outputs on for nothing. A message occupies one
direction of the link between two ranks, the stream `to <receiver>` of the sender, for its one-way
time, one message at a time, in the order in which the sender's actions stand in the schedule. The
sender's compute goes on at once and is charged nothing; the receiver's action starts no earlier
than the message ends; what a send or a receive costs the host belongs to the actions' own times.

* `eager`: the message starts when its action has ended and its link is free.
* `rendezvous`: it also waits until the receiver has posted the receive. Receives take the order of
  the sends, since two ends that disagree would wait for ever: a receive is posted in front of the
  action that reads it, or of the first one that reads a later message of the same link.

A rank does the `before` of its stages, walks its actions on its stream `compute`, then does the
`after` of its stages, kind by kind. All of it in one replica: a tensor-parallel group is one rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64, whole_numbers
from simulator.graph import KINDS, Int32, OpCosts, Stream, TaskGraph
from simulator.jitter import Jitter
from simulator.schedule import (
    MICROBATCH_SHIFT,
    STAGE_MASK,
    STAGE_SHIFT,
    B,
    F,
    I,
    Schedule,
    W,
    decode,
)
from simulator.timeline import Kind

Convention = Literal["eager", "rendezvous"]

SEND_F, SEND_B, FIRST_EXTRA = 4, 5, 6
"""Parts of a step: 0 to 3 are the actions F, B, I and W, then the two messages, then extras."""
_PARTS = ("forward", "backward", "input", "weight", "send_forward", "send_backward")
_PART_KINDS: tuple[Kind, ...] = ("forward", "backward", "backward", "backward", "send", "send")
_NAMES: dict[Kind, str] = {"other": "step", "all_reduce": "reduce", "optimizer": "update"}
EMPTY: dict[Kind, npt.ArrayLike] = {}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTimes:
    """What each part of a step takes on each stage, in ns: `ns` is int64 [num_parts, S, L].

    The first six parts are forward, backward, its input half, its weight half, and the messages
    of a forward and of a backward; then one part for each kind in `before` and one for each in
    `after`. The last axis holds L candidates (lanes) that are simulated side by side.
    """

    ns: Int64
    before: tuple[Kind, ...] = ()
    after: tuple[Kind, ...] = ()

    @property
    def num_stages(self) -> int:
        """Stages."""
        return int(self.ns.shape[1])

    @property
    def num_lanes(self) -> int:
        """Candidates side by side."""
        return int(self.ns.shape[2])

    def lane(self, lane: int) -> "StepTimes":
        """Return one candidate alone."""
        return StepTimes(ns=self.ns[:, :, lane : lane + 1], before=self.before, after=self.after)

    def edge_ns(self) -> tuple[Int64, Int64]:
        """Return all of `before` and all of `after` of each stage, [S, L] each."""
        split = FIRST_EXTRA + len(self.before)
        return self.ns[FIRST_EXTRA:split].sum(axis=0), self.ns[split:].sum(axis=0)


def step_times(
    num_stages: int,
    *,
    forward: npt.ArrayLike,
    backward: npt.ArrayLike,
    weight: npt.ArrayLike = 0,
    input_: npt.ArrayLike | None = None,
    send_forward: npt.ArrayLike = 0,
    send_backward: npt.ArrayLike = 0,
    before: Mapping[Kind, npt.ArrayLike] = EMPTY,
    after: Mapping[Kind, npt.ArrayLike] = EMPTY,
) -> StepTimes:
    """Return times of `num_stages` stages; each argument is one number, [S], or [S, L] for lanes.

    `weight` is the part of a backward that makes weight gradients, `input_` the rest of it unless
    splitting costs extra. Raises ValueError that names the part and the stage for a time that is
    negative, not whole, not finite or too large, and for a weight half longer than its backward.

    >>> times = step_times(2, forward=[10, 12], backward=20, weight=8, after={"optimizer": 5})
    >>> times.ns[:, 1, 0].tolist(), times.after
    ([12, 20, 12, 8, 0, 0, 5], ('optimizer',))
    """
    names = (*_PARTS, *before, *after)
    given = (
        forward, backward, 0 if input_ is None else input_, weight, send_forward, send_backward,
        *before.values(), *after.values(),
    )  # fmt: skip
    arrays = [_by_stage(name, value, num_stages) for name, value in zip(names, given, strict=True)]
    num_lanes = max(array.shape[1] for array in arrays)
    table = np.empty((len(arrays), num_stages, num_lanes), np.result_type(*arrays))
    for place, array in enumerate(arrays):
        table[place] = array
    ns = whole_numbers(
        table.ravel(), table.size,
        lambda i: f"{names[i // (num_stages * num_lanes)]} of stage {i // num_lanes % num_stages}",
        "takes", "ns",
    ).reshape(table.shape)  # fmt: skip
    if input_ is None:
        ns[I] = ns[B] - ns[W]
        if (ns[I] < 0).any():
            stage = int(np.argwhere(ns[I] < 0)[0, 0])
            raise ValueError(f"stage {stage}: the weight half takes longer than the whole backward")
    return StepTimes(ns=ns, before=tuple(before), after=tuple(after))


def _by_stage(name: str, value: npt.ArrayLike, num_stages: int) -> npt.NDArray[np.generic]:
    """Return `value` as [S, L] or [1, L]; L is 1 unless it has lanes."""
    array = np.asarray(value)
    array = array[:, None] if array.ndim == 1 else np.atleast_2d(array)
    if array.ndim > 2 or array.shape[0] not in (1, num_stages):
        raise ValueError(f"{name} has times of shape {array.shape}; {num_stages} stages are there")
    return array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoweredStep:
    """The graph of a step, and which time each op takes: part, stage and micro-batch, int [N].

    Ops are numbered rank by rank (before, actions, after), then the messages in the order of the
    actions that send them. `action_op` [A] is the op of each action in `schedule.codes`.
    """

    graph: TaskGraph
    action_op: Int64
    part: Int64
    stage: Int64
    microbatch: Int64

    def costs(self, times: StepTimes, lane: int = 0, jitter: Jitter | None = None) -> OpCosts:
        """Return what each op takes in one lane of `times`."""
        ns = times.ns[self.part, self.stage, lane]
        if jitter is not None:
            ns = jitter.apply(ns, self.part, self.stage, self.microbatch)
        return OpCosts(ns=np.ascontiguousarray(ns), size_bytes=np.zeros(len(ns), np.int64))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataflow:
    """Who reads whose output, as places in `schedule.codes`.

    `reader[i]` waits for `source[i]` on its own rank. Message j goes from `sender[j]` to
    `receiver[j]` over link `link[j]`, which leads from rank `links[link[j], 0]` to `links[link[j],
    1]`; messages stand in the order of their senders.
    """

    reader: Int64
    source: Int64
    sender: Int64
    receiver: Int64
    link: Int64
    links: Int64

    def posts(self) -> Int64:
        """Return the action in front of which each message's receive is posted (rendezvous)."""
        by_link = np.argsort(self.link, kind="stable")
        # The least reader from here on; a step between links keeps those of one apart.
        step = int(self.receiver.max(initial=0)) + 1
        key = self.receiver[by_link] + self.link[by_link] * step
        least = np.minimum.accumulate(key[::-1])[::-1] - self.link[by_link] * step
        posts = np.empty_like(self.receiver)
        posts[by_link] = least
        return posts


def dataflow(schedule: Schedule) -> Dataflow:
    """Return what the actions of `schedule` hand on, within a rank and between ranks."""
    codes, m, homes = schedule.codes, schedule.num_microbatches, schedule.homes
    kind, stage = codes & 3, (codes >> STAGE_SHIFT) & STAGE_MASK
    way = np.minimum(kind, 1)
    cell = stage * m + (codes >> MICROBATCH_SHIFT)
    # Where each output is made: the forward of a cell, and its whole or input-half backward.
    made = np.full((2, schedule.num_stages * m), -1, np.int64)
    maker = np.flatnonzero(kind != W)
    made[way[maker], cell[maker]] = maker
    own = np.flatnonzero(kind != F)
    own_source = made[(kind[own] == W).astype(np.int64), cell[own]]
    source_stage = stage[maker] + 2 * way[maker] - 1
    reader = maker[(source_stage >= 0) & (source_stage < schedule.num_stages)]
    source = made[way[reader], cell[reader] + (2 * way[reader] - 1) * m]
    crosses = homes[stage[reader]] != homes[stage[source]]
    by_sender = np.argsort(source[crosses], kind="stable")
    sender, receiver = source[crosses][by_sender], reader[crosses][by_sender]
    pair = homes[stage[sender]].astype(np.int64) * schedule.num_ranks + homes[stage[receiver]]
    used = np.flatnonzero(np.bincount(pair, minlength=1))
    return Dataflow(
        reader=np.concatenate((own, reader[~crosses])),
        source=np.concatenate((own_source, source[~crosses])),
        sender=sender,
        receiver=receiver,
        link=np.searchsorted(used, pair),
        links=np.stack(np.divmod(used, schedule.num_ranks), axis=1),
    )


def lower(
    schedule: Schedule,
    before: Sequence[Kind] = (),
    after: Sequence[Kind] = (),
    convention: Convention = "eager",
) -> LoweredStep:
    """Return the task graph of one step under `schedule` and the message `convention`."""
    rows = _action_rows(schedule, len(before), len(after))
    flows = dataflow(schedule)
    sender, receiver = flows.sender, flows.receiver
    num_ops = rows.num_ops
    message = num_ops + np.arange(len(sender))
    ends = [
        (rows.op[flows.reader], rows.op[flows.source]),
        (rows.op[receiver], message),
        (message, rows.op[sender]),
    ]
    if convention == "rendezvous":
        post = rows.op[flows.posts()]
        is_later = post > rows.first_op[rows.rank[receiver]]
        ends.append((message[is_later], post[is_later] - 1))
    deps, dep_offsets = _dependencies(ends, num_ops + len(message))
    sent = rows.code[sender]
    part = np.concatenate((rows.part, np.where(sent & 3 == F, SEND_F, SEND_B)))
    kinds = np.array([KINDS.index(k) for k in (*_PART_KINDS, *before, *after)], np.int8)
    graph = TaskGraph(
        streams=(
            *(Stream(rank, "compute") for rank in range(schedule.num_ranks)),
            *(Stream(there, f"to {here}") for there, here in flows.links.tolist()),
        ),
        names=_Names(schedule, rows, (*before, *after), sender, rows.rank[receiver]),
        stream=np.concatenate((rows.op_rank, schedule.num_ranks + flows.link)).astype(np.int32),
        kind=kinds[part],
        deps=deps,
        dep_offsets=dep_offsets,
        meet=np.full(len(part), -1, np.int32),
        path=np.full(len(part), -1, np.int32),
    )
    return LoweredStep(
        graph=graph,
        action_op=rows.op,
        part=part,
        stage=np.concatenate((rows.op_stage, (sent >> STAGE_SHIFT) & STAGE_MASK)),
        microbatch=np.concatenate((rows.op_microbatch, sent >> MICROBATCH_SHIFT)),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """The compute streams of all ranks, end to end: actions [A] and ops [N] of every kind."""

    code: Int64
    rank: Int64
    op: Int64
    first_op: Int64
    part: Int64
    op_rank: Int64
    op_stage: Int64
    op_microbatch: Int64

    @property
    def num_ops(self) -> int:
        return len(self.part)


def _action_rows(schedule: Schedule, num_before: int, num_after: int) -> _Rows:
    part, op_rank, op_stage, op_microbatch, op, rank = [], [], [], [], [], []
    first_op, count = [], 0
    for r, order in enumerate(schedule.orders):
        stages = np.flatnonzero(schedule.homes == r)
        before = FIRST_EXTRA + np.repeat(np.arange(num_before), len(stages))
        after = FIRST_EXTRA + num_before + np.repeat(np.arange(num_after), len(stages))
        part += [before, order & 3, after]
        op_stage += [
            np.tile(stages, num_before), (order >> STAGE_SHIFT) & STAGE_MASK,
            np.tile(stages, num_after),
        ]  # fmt: skip
        zeros = np.zeros_like
        op_microbatch += [zeros(before), order >> MICROBATCH_SHIFT, zeros(after)]
        first_op.append(count)
        op.append(count + len(before) + np.arange(len(order)))
        rank.append(np.full(len(order), r))
        length = len(before) + len(order) + len(after)
        op_rank.append(np.full(length, r))
        count += length
    join = np.concatenate
    return _Rows(
        code=schedule.codes, rank=join(rank), op=join(op), first_op=np.array(first_op),
        part=join(part), op_rank=join(op_rank), op_stage=join(op_stage),
        op_microbatch=join(op_microbatch),
    )  # fmt: skip


def _dependencies(pairs: list[tuple[Int64, Int64]], num_ops: int) -> tuple[Int32, Int32]:
    """Return dependencies and offsets of (op, dep) `pairs`, those of one op in rising order."""
    owner = np.concatenate([op for op, _ in pairs])
    dep = np.concatenate([source for _, source in pairs])
    order = np.lexsort((dep, owner))
    counts = np.bincount(owner, minlength=num_ops)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return dep[order].astype(np.int32), offsets


class _Names(Sequence[str]):
    """Names of a step's ops, made when they are asked for: most steps are never read by people."""

    def __init__(
        self,
        schedule: Schedule,
        rows: _Rows,
        extras: tuple[Kind, ...],
        sender: Int64,
        receiver_rank: Int64,
    ) -> None:
        self._schedule, self._rows, self._extras = schedule, rows, extras
        self._sender, self._receiver_rank = sender, receiver_rank

    def __len__(self) -> int:
        return self._rows.num_ops + len(self._sender)

    def __getitem__(self, op_id):  # type: ignore[no-untyped-def]
        if isinstance(op_id, slice):
            return [self[i] for i in range(*op_id.indices(len(self)))]
        rows = self._rows
        if op_id >= rows.num_ops:
            place = op_id - rows.num_ops
            code = rows.code[self._sender[place] : self._sender[place] + 1]
            return f"{decode(code)[0]} to {self._receiver_rank[place]}"
        part, stage = int(rows.part[op_id]), int(rows.op_stage[op_id])
        if part >= FIRST_EXTRA:
            kind = self._extras[part - FIRST_EXTRA]
            return f"{_NAMES.get(kind, kind)} {stage}"
        return f"{stage}{'FBIW'[part]}{rows.op_microbatch[op_id]}"
