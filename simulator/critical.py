"""What each op waited for last, and the chain of such ops that sets the length of the step.

It reads only the graph, the starts and the ends, so it explains the run of any engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64
from simulator.engine import Simulation
from simulator.graph import KINDS
from simulator.timeline import Kind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bindings:
    """For each op the one that it waited for last, [N] each.

    `op` is that op, or -1 where an op waited for none. `is_partners` says that not the op itself
    waited for it but another member of its meet, which therefore came later.
    """

    op: Int64
    is_partners: npt.NDArray[np.bool_]


def bindings(simulation: Simulation) -> Bindings:
    """Return what each op waited for last: among its dependencies, the op before it on its stream,
    and the same of all members of its meet, the one that ended last.

    Ties: what the op waited for itself goes before what a partner waited for, for then nobody was
    late; a dependency before the op before it on the stream, so that a message that came at the
    last moment shows; then the lowest id. Following `op` never comes back to an op, also through
    ops that take no time.
    """
    graph, ends = simulation.graph, simulation.ends_ns
    previous = _previous_on_stream(simulation)
    follower = np.flatnonzero(previous >= 0)
    owner = np.repeat(np.arange(len(graph)), np.diff(graph.dep_offsets))
    own = _last_awaited(
        np.concatenate((follower, owner)),
        np.concatenate((previous[follower], graph.deps)),
        np.repeat([1, 0], [len(follower), len(owner)]),
        ends,
        len(graph),
    )
    member = np.flatnonzero(graph.meet >= 0)
    meets, meet = np.unique(graph.meet[member], return_inverse=True)
    waits = own[member] >= 0
    of_meet = _last_awaited(
        meet[waits], own[member[waits]], np.zeros(int(waits.sum()), np.int64), ends, len(meets)
    )
    partners = np.full(len(graph), -1, np.int64)
    partners[member] = of_meet[meet]
    is_partners = _ends_of(partners, ends) > _ends_of(own, ends)
    return Bindings(op=np.where(is_partners, partners, own), is_partners=is_partners)


def _previous_on_stream(simulation: Simulation) -> Int64:
    """Return the op that had to leave the stream before each op could start, [N]; -1: none.

    On a stream that is the op listed before. On a queue it is the last one that ran before; ops
    without length hold up nobody there, and their order among themselves says nothing.
    """
    graph, starts, ends = simulation.graph, simulation.starts_ns, simulation.ends_ns
    is_queue = np.array([stream.is_queue for stream in graph.streams], np.bool_)[graph.stream]
    ids = np.arange(len(graph))
    order = np.lexsort((ids, np.where(is_queue, ends, 0), np.where(is_queue, starts, 0),
                        graph.stream))  # fmt: skip
    stream = graph.stream[order]
    holds = ~is_queue[order] | (ends > starts)[order]
    # The place of the last op that holds the stream, before each place.
    place = np.maximum.accumulate(np.where(holds, ids, -1))
    place = np.concatenate(([-1], place[:-1]))[: len(graph)]
    has_previous = (place >= 0) & (stream[place] == stream)
    previous = np.full(len(graph), -1, np.int64)
    previous[order] = np.where(has_previous, order[place], -1)
    return previous


def _last_awaited(
    waiter: Int64, awaited: Int64, tie_break: Int64, ends_ns: Int64, num_waiters: int
) -> Int64:
    """Return for each waiter the awaited op that ended last; of several the one with the lowest
    `tie_break`, then the lowest id.

    The first three arguments are pairs, entry by entry; a waiter without a pair gets -1.
    """
    order = np.lexsort((awaited, tie_break, -ends_ns[awaited], waiter))
    first = order[np.flatnonzero(np.diff(waiter[order], prepend=-1))]
    last = np.full(num_waiters, -1, np.int64)
    last[waiter[first]] = awaited[first]
    return last


def _ends_of(op_ids: Int64, ends_ns: Int64) -> Int64:
    """Return the ends of the ops, and 0, the start of the step, in place of -1."""
    return np.where(op_ids >= 0, ends_ns[op_ids], 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalPath:
    """The ops that set the length of a step, first to last, and the time on them by kind.

    Each op starts when the one before it ends. `held_ns` is the sum of the pauses where one started
    later than that; the engines here start an op as soon as they may, so that it is 0. `busy_ns`
    and `held_ns` add up to the makespan.
    """

    op_ids: tuple[int, ...]
    busy_ns: Mapping[Kind, int]
    held_ns: int


def critical_path(simulation: Simulation) -> CriticalPath:
    """Return the chain of ops, each the last that the next one waited for, to the end of the step.

    It ends with the op that ends last (ties: the lowest id). Ops without length are on it too.

    >>> from simulator.engine import simulate
    >>> from simulator.graph import Op, task_graph
    >>> forward = Op(id=0, rank=0, stream="compute", name="0F0", kind="forward")
    >>> send = Op(id=1, rank=0, stream="to 1", name="0F0 to 1", kind="send", deps=(0,))
    >>> beside = Op(id=2, rank=1, stream="compute", name="load", kind="data")
    >>> after = Op(id=3, rank=1, stream="compute", name="1F0", kind="forward", deps=(1,))
    >>> path = critical_path(simulate(task_graph((forward, send, beside, after)), [10, 3, 9, 10]))
    >>> path.op_ids, path.busy_ns
    ((0, 1, 3), {'forward': 20, 'send': 3})
    """
    if len(simulation.graph) == 0:
        return CriticalPath(op_ids=(), busy_ns={}, held_ns=0)
    awaited = bindings(simulation).op.tolist()
    op_id = int(np.argmax(simulation.ends_ns))
    path = []
    while op_id >= 0:
        path.append(op_id)
        op_id = awaited[op_id]
    path.reverse()
    lengths = (simulation.ends_ns - simulation.starts_ns)[path].tolist()
    busy: dict[Kind, int] = {}
    for kind, length in zip(simulation.graph.kind[path].tolist(), lengths, strict=True):
        busy[KINDS[kind]] = busy.get(KINDS[kind], 0) + length
    return CriticalPath(
        op_ids=tuple(path), busy_ns=busy, held_ns=simulation.makespan_ns - sum(lengths)
    )
