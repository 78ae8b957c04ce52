"""What each stream spent the step on, and what it was idle for: every nanosecond has one cause.

A gap on a stream is explained by the op that ends it, or by the end of the step: what that op
waited for last, what this waited for last, and so on back to the start of the gap. The part of the
gap in which this chain is

* in a message or a collective is *exposed* communication of that kind; a message that waits for
  its link stands behind earlier messages of the link, so that this too is exposed communication;
* in work of the host (`data`, `other`) is *host*;
* in computing is *bubble*, or *straggler* where the chain has come through a meet to the member
  that arrived last; a message is no such meet, since its receiver always waits for its sender;
* in a `wait` is *straggler*, for this is what a `wait` stands for. A stream's own `wait` counts as
  idle for the same reason: a measured wait is a gap;
* nowhere, because an op started later than it might have, is *held*. The engines here start an op
  as soon as they may, so that it is 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64
from simulator.critical import bindings
from simulator.engine import Simulation
from simulator.graph import KINDS, Int32, Stream
from simulator.timeline import Kind

COMMUNICATION: tuple[Kind, ...] = (
    "send", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "push", "pull",
)  # fmt: skip
MESSAGES: tuple[Kind, ...] = ("send", "push", "pull")
HOST: tuple[Kind, ...] = ("data", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamUse:
    """Where the step went on one stream; `busy_ns` and the causes add up to the makespan.

    Kinds without time are left out of the mappings.
    """

    rank: int
    stream: str
    busy_ns: Mapping[Kind, int]
    exposed_ns: Mapping[Kind, int]
    bubble_ns: int
    straggler_ns: int
    host_ns: int
    held_ns: int

    @property
    def idle_ns(self) -> int:
        """All that is not busy."""
        causes = (self.bubble_ns, self.straggler_ns, self.host_ns, self.held_ns)
        return sum(self.exposed_ns.values()) + sum(causes)


def stream_uses(simulation: Simulation) -> tuple[StreamUse, ...]:
    """Return the use of each stream of the graph, in the order of `graph.streams`.

    >>> from simulator.engine import simulate
    >>> from simulator.graph import Op, task_graph
    >>> forward = Op(id=0, rank=0, stream="compute", name="0F0", kind="forward")
    >>> send = Op(id=1, rank=0, stream="to 1", name="0F0 to 1", kind="send", deps=(0,))
    >>> after = Op(id=2, rank=1, stream="compute", name="1F0", kind="forward", deps=(1,))
    >>> use = stream_uses(simulate(task_graph((forward, send, after)), [10, 3, 7]))[2]
    >>> use.busy_ns, use.exposed_ns, use.bubble_ns
    ({'forward': 7}, {'send': 3}, 10)
    """
    graph = simulation.graph
    busy = np.zeros((len(graph.streams), len(KINDS)), np.int64)
    np.add.at(busy, (graph.stream, graph.kind), simulation.ends_ns - simulation.starts_ns)
    gaps = _gaps(simulation)
    waited, late = _Chains(simulation).explain(gaps)
    causes = np.zeros_like(busy)
    np.add.at(causes, gaps.stream, waited)
    stragglers = _sum_by(gaps.stream, late, len(busy))
    held = _sum_by(gaps.stream, gaps.until_ns - gaps.since_ns - waited.sum(axis=1), len(busy))
    rows = zip(
        graph.streams, busy.tolist(), causes.tolist(), stragglers.tolist(), held.tolist(),
        strict=True,
    )  # fmt: skip
    return tuple(_use(*row) for row in rows)


def _use(
    stream: Stream, busy: list[int], causes: list[int], late_partners_ns: int, held_ns: int
) -> StreamUse:
    """Return the use of one stream from its busy and idle time by kind, [K] each."""
    own = dict(zip(KINDS, busy, strict=True))
    idle = dict(zip(KINDS, causes, strict=True))
    waits_ns = own.pop("wait") + idle.pop("wait")
    exposed = {kind: idle.pop(kind) for kind in COMMUNICATION}
    host_ns = sum(idle.pop(kind) for kind in HOST)
    return StreamUse(
        rank=stream.rank,
        stream=stream.name,
        busy_ns={kind: ns for kind, ns in own.items() if ns},
        exposed_ns={kind: ns for kind, ns in exposed.items() if ns},
        bubble_ns=sum(idle.values()) - late_partners_ns,
        straggler_ns=waits_ns + late_partners_ns,
        host_ns=host_ns,
        held_ns=held_ns,
    )


def _sum_by(group: npt.NDArray[np.integer], values: Int64, num_groups: int) -> Int64:
    sums = np.zeros(num_groups, np.int64)
    np.add.at(sums, group, values)
    return sums


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Gaps:
    """Idle times [G]: on which stream, from when to when, and the node of the op that ends each."""

    stream: Int64
    since_ns: Int64
    until_ns: Int64
    node: Int64


def _gaps(simulation: Simulation) -> _Gaps:
    graph, starts, ends = simulation.graph, simulation.starts_ns, simulation.ends_ns
    order = np.lexsort((ends, starts, graph.stream))
    stream = graph.stream[order].astype(np.int64)
    free = np.concatenate(([0], ends[order][:-1]))[: len(order)]
    free[np.diff(stream, prepend=-1) > 0] = 0
    inner = np.flatnonzero(starts[order] > free)
    left = np.zeros(len(graph.streams), np.int64)
    np.maximum.at(left, graph.stream, ends)
    outer = np.flatnonzero(left < simulation.makespan_ns)
    return _Gaps(
        stream=np.concatenate((stream[inner], outer)),
        since_ns=np.concatenate((free[inner], left[outer])),
        until_ns=np.concatenate(
            (starts[order][inner], np.full(len(outer), simulation.makespan_ns, np.int64))
        ),
        node=np.concatenate((order[inner], np.full(len(outer), len(graph), np.int64))),
    )


class _Chains:
    """The forest of what each op waited for last.

    Its nodes are the N ops, then the end of the step (N), then the root of all chains (N + 1), so
    that every walk ends. All gaps are explained at once: sums along the chains, and the ancestor
    at a moment, come from tables of the 1st, 2nd, 4th, ... node before each node. A walk gap by
    gap would be quadratic where many streams wait for one long chain.
    """

    def __init__(self, simulation: Simulation) -> None:
        graph, num_ops = simulation.graph, len(simulation.graph)
        root, makespan = num_ops + 1, simulation.makespan_ns
        bound = bindings(simulation)
        last = int(np.argmax(simulation.ends_ns)) if num_ops else root
        awaited = np.where(bound.op >= 0, bound.op, root)
        self.starts_ns = np.concatenate((simulation.starts_ns, [makespan, 0]))
        self.ends_ns = np.concatenate((simulation.ends_ns, [makespan, 0]))
        self.kind = np.concatenate((graph.kind, [-1, -1]))
        is_message = np.isin(graph.kind, [KINDS.index(kind) for kind in MESSAGES])
        self.is_late = np.concatenate((bound.is_partners & ~is_message, [False, False]))
        self.before = np.concatenate((awaited, [last, root])).astype(np.int32)
        self.jumps: list[Int32] = [self.before]
        while (self.jumps[-1] != root).any():
            self.jumps.append(self.jumps[-1][self.jumps[-1]])

    def explain(self, gaps: _Gaps) -> tuple[Int64, Int64]:
        """Return what the chain of each gap was in, by kind [G, K], and how much of its computing
        was that of a member that came late to a meet [G].
        """
        since = self._reached(gaps.node, gaps.since_ns)
        cut_ns = np.maximum(gaps.since_ns - self.starts_ns[since], 0)
        partner = self._late_member(gaps.node)
        waited = np.zeros((len(gaps.node), len(KINDS)), np.int64)
        late = np.zeros(len(gaps.node), np.int64)
        for kind in np.unique(self.kind[:-2]).tolist():
            total = self._totals(kind)
            skipped = total[self.before[since]] + np.where(self.kind[since] == kind, cut_ns, 0)
            waited[:, kind] = total[self.before[gaps.node]] - skipped
            if KINDS[kind] not in (*COMMUNICATION, *HOST, "wait"):
                late += np.maximum(total[self.before[partner]] - skipped, 0)
        return waited, late

    def _totals(self, kind: int) -> Int64:
        """Return the time of ops of `kind` from the root to each node, itself included."""
        total = np.where(self.kind == kind, self.ends_ns - self.starts_ns, 0)
        for jump in self.jumps:
            total = total + total[jump]
        return total

    def _reached(self, node: Int64, moment_ns: Int64) -> Int64:
        """Return for each node the first one of its chain, root first, that ends after a moment."""
        for jump in reversed(self.jumps):
            further = jump[node]
            node = np.where(self.ends_ns[further] > moment_ns, further, node)
        return node

    def _late_member(self, node: Int64) -> Int64:
        """Return the nearest node of each chain that waited for a partner, or the root."""
        nearest = np.where(self.is_late, np.arange(len(self.before)), self.before)
        for _ in self.jumps:
            nearest = nearest[nearest]
        return nearest[node]
