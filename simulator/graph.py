"""`TaskGraph`: what must happen, without times. `OpCosts` stands beside it, an entry an op.

Meaning: every op belongs to one stream of one rank. A stream runs its ops one at a time, in the
order in which the graph lists them; a *queue* is a stream that runs them in the order in which
they become ready instead (ties: the lower id). `deps` name ops that must have ended; ops that
share a `meet` start together, once all of them may, and each runs for its own time. An op with a
`path` first takes its own time (latency), then moves its bytes over all links of the path at
once, at the max-min fair rate of everything that crosses them. An op starts as soon as these
rules allow it.

A graph is columns, one row an op, so that a hundred thousand ops are built and run as arrays;
`Op` is a row of it to read or to write by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64, whole_numbers
from simulator.timeline import Kind

KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_RANK = (1 << 24) - 1

Int32 = npt.NDArray[np.int32]


class Stream(NamedTuple):
    """An ordered queue of ops; `is_queue`: served in order of arrival, not of listing."""

    rank: int
    name: str
    is_queue: bool = False


class Crossing(NamedTuple):
    """One link of a path. `weight` flows like this one cross it: the op stands for so many."""

    link: int
    weight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One piece of work. `id` is its place in the graph.

    `meet` is -1 for an op on its own; `meet_size` says how many ops the meet must have (0: two or
    more, as many as there are).
    """

    id: int
    rank: int
    stream: str
    name: str
    kind: Kind
    deps: tuple[int, ...] = ()
    meet: int = -1
    meet_size: int = 0
    path: tuple[Crossing, ...] = ()
    is_queued: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskGraph:
    """Ops in the order of their ids, as columns of length N.

    Op i runs on `streams[stream[i]]`, is of kind `KINDS[kind[i]]`, waits for the ops
    `deps[dep_offsets[i]:dep_offsets[i + 1]]`, belongs to meet `meet[i]` (-1: none) and crosses
    `paths[path[i]]` (-1: none).

    Raises ValueError that names the op for a dependency on no op or on itself, a rank out of
    range, a meet without a partner, a message that nobody receives, and a path without a link.
    """

    streams: tuple[Stream, ...]
    names: Sequence[str]
    stream: Int32
    kind: npt.NDArray[np.int8]
    deps: Int32
    dep_offsets: Int32
    meet: Int32
    path: Int32
    paths: tuple[tuple[Crossing, ...], ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        return len(self.stream)

    def op(self, op_id: int) -> Op:
        """Return row `op_id` as a value."""
        stream = self.streams[self.stream[op_id]]
        path = int(self.path[op_id])
        return Op(
            id=op_id,
            rank=stream.rank,
            stream=stream.name,
            name=self.names[op_id],
            kind=KINDS[self.kind[op_id]],
            deps=tuple(self.deps_of(op_id).tolist()),
            meet=int(self.meet[op_id]),
            path=self.paths[path] if path >= 0 else (),
            is_queued=stream.is_queue,
        )

    def deps_of(self, op_id: int) -> Int32:
        """Return the ids of the ops that `op_id` waits for."""
        return self.deps[self.dep_offsets[op_id] : self.dep_offsets[op_id + 1]]

    def label(self, op_id: int) -> str:
        """Return the op as errors name it: `0F1 (rank 0, compute)`."""
        stream = self.streams[self.stream[op_id]]
        return f"{self.names[op_id]} (rank {stream.rank}, {stream.name})"


def task_graph(ops: Sequence[Op]) -> TaskGraph:
    """Return the graph of `ops`, in the order of their ids.

    Raises ValueError for an id out of place, a meet of another size than its ops say, a stream that
    is a queue for some ops only, and what `TaskGraph` raises.

    >>> forward = Op(id=0, rank=0, stream="compute", name="0F0", kind="forward")
    >>> message = Op(id=1, rank=0, stream="to 1", name="0F0 to 1", kind="send", deps=(0,))
    >>> after = Op(id=2, rank=1, stream="compute", name="1F0", kind="forward", deps=(1,))
    >>> len(task_graph([forward, message, after]))
    3
    """
    streams: dict[tuple[int, str], int] = {}
    is_queue: dict[int, bool] = {}
    paths: dict[tuple[Crossing, ...], int] = {}
    for place, op in enumerate(ops):
        if op.id != place:
            raise ValueError(f"op {op.name} has id {op.id}; it stands at place {place}")
        stream = streams.setdefault((op.rank, op.stream), len(streams))
        if is_queue.setdefault(stream, op.is_queued) != op.is_queued:
            raise ValueError(f"op {op.name}: stream {op.stream} is a queue for some of its ops")
        if op.path:
            paths.setdefault(op.path, len(paths))
    _check_meet_sizes(ops)
    return TaskGraph(
        streams=tuple(
            Stream(rank, name, is_queue[stream]) for (rank, name), stream in streams.items()
        ),
        names=tuple(op.name for op in ops),
        stream=np.array([streams[op.rank, op.stream] for op in ops], np.int32),
        kind=np.array([KINDS.index(op.kind) for op in ops], np.int8),
        deps=np.array([dep for op in ops for dep in op.deps], np.int64)
        .clip(-1, 1 << 30)
        .astype(np.int32),
        dep_offsets=np.cumsum([0, *(len(op.deps) for op in ops)]).astype(np.int32),
        meet=np.array([op.meet for op in ops], np.int32),
        path=np.array([paths[op.path] if op.path else -1 for op in ops], np.int32),
        paths=tuple(paths),
    )


def _check_meet_sizes(ops: Sequence[Op]) -> None:
    found: dict[int, int] = {}
    for op in ops:
        found[op.meet] = found.get(op.meet, 0) + 1
    for op in ops:
        if op.meet >= 0 and op.meet_size and op.meet_size != found[op.meet]:
            raise ValueError(
                f"op {op.name} meets {op.meet_size - 1} others in meet {op.meet}; "
                f"{found[op.meet] - 1} are there"
            )


def _check(graph: TaskGraph) -> None:
    """Raise ValueError for a graph that no engine could run; see `TaskGraph`."""
    num_ops = len(graph)
    for stream in graph.streams:
        if not 0 <= stream.rank <= MAX_RANK:
            raise ValueError(
                f"stream {stream.name} is of rank {stream.rank}; ranks go from 0 to {MAX_RANK}"
            )
    columns = (graph.names, graph.kind, graph.meet, graph.path, graph.dep_offsets[1:])
    if any(len(column) != num_ops for column in columns):
        raise ValueError(f"columns of {[len(c) for c in columns]} rows for {num_ops} ops")
    owners = np.repeat(np.arange(num_ops), np.diff(graph.dep_offsets))
    outside = np.flatnonzero((graph.deps < 0) | (graph.deps >= num_ops))
    if len(outside):
        op_id = int(owners[outside[0]])
        raise ValueError(
            f"op {graph.label(op_id)} depends on {tuple(graph.deps_of(op_id).tolist())}; "
            f"there are {num_ops} ops"
        )
    selves = np.flatnonzero(graph.deps == owners)
    if len(selves):
        raise ValueError(f"op {graph.label(int(owners[selves[0]]))} depends on itself")
    meets, first, counts = np.unique(graph.meet, return_index=True, return_counts=True)
    alone = first[(meets >= 0) & (counts == 1)]
    if len(alone):
        op_id = int(alone[0])
        raise ValueError(
            f"op {graph.label(op_id)} is alone in meet {graph.meet[op_id]}; its partner is missing"
        )
    is_queue = np.array([stream.is_queue for stream in graph.streams], np.bool_)
    queued = np.flatnonzero((graph.meet >= 0) & is_queue[graph.stream])
    if len(queued):
        raise ValueError(
            f"op {graph.label(int(queued[0]))} queues and meets; it can do one of both"
        )
    for place, path in enumerate(graph.paths):
        crossed = [crossing.link for crossing in path]
        if not path or min(crossed) < 0 or len(set(crossed)) < len(path):
            user = graph.label(int(np.argmax(graph.path == place)))
            raise ValueError(f"op {user} crosses links {crossed}; it needs some, each only once")
    is_received = np.zeros(num_ops, np.bool_)
    is_received[graph.deps] = True
    is_message = (graph.kind == KINDS.index("send")) & (graph.meet < 0)
    lost = np.flatnonzero(is_message & ~is_received)
    if len(lost):
        raise ValueError(f"op {graph.label(int(lost[0]))} is a send that nothing receives")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpCosts:
    """What each op takes: its own time, then the bytes that it moves over its path; int64 [N]."""

    ns: Int64
    size_bytes: Int64


def op_costs(graph: TaskGraph, ns: npt.ArrayLike, size_bytes: npt.ArrayLike = 0) -> OpCosts:
    """Return the costs of `graph`; arguments are one number, or one an op.

    Raises ValueError that names the op for a number that is not whole, negative, not finite or too
    large, and for bytes without a path.
    """

    def name(op_id: int) -> str:
        return f"op {graph.label(op_id)}"

    costs = OpCosts(
        ns=whole_numbers(ns, len(graph), name, "takes", "ns"),
        size_bytes=whole_numbers(size_bytes, len(graph), name, "moves", "bytes"),
    )
    stray = np.flatnonzero((costs.size_bytes > 0) & (graph.path < 0))
    if len(stray):
        raise ValueError(f"op {graph.label(int(stray[0]))} moves bytes but crosses no link")
    return costs
