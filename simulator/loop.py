"""Tier 2: prepares a graph for the compiled event loop, runs it, and names what never ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from simulator.checks import Int64
from simulator.deadlock import deadlock, stalled
from simulator.event_kernels import (
    CHANGE,
    CROSSING,
    FLOW,
    LINK,
    MEET,
    NUM_COUNTS,
    OP,
    RUNNING_OP,
    SLOT,
    Table,
    reach,
    run,
)
from simulator.graph import Int32, OpCosts, TaskGraph
from simulator.network import CapacityChange, Change, Link


def run_loop(
    graph: TaskGraph, costs: OpCosts, links: Sequence[Link], changes: Sequence[Change]
) -> tuple[Int64, Int64]:
    """Return starts and ends of every op in ns.

    Raises DeadlockError and StalledError that name what waits for what.
    """
    tables = prepare(wire(graph), costs, links, changes)
    run(*tables)
    ops = tables.ops[:-1]
    if unfinished := sorted(op_id for op_id in tables.slots["op"].tolist() if op_id >= 0):
        raise stalled(graph, unfinished)
    starts, ends = ops["start_ns"].copy(), ops["end_ns"].copy()
    if (starts < 0).any():
        raise deadlock(graph, starts)
    return starts, ends


class Tables(NamedTuple):
    """The arguments of the compiled loop; it writes into all but the first few."""

    ops: Table
    followers: Int32
    meets: Table
    members: Int32
    slots: Table
    heap: Table
    agenda: Int32
    queues: Int32
    marked: Int32
    links: Table
    flows: Table
    dirty: Int32
    crossings: Table
    paths: Int32
    near_links: Int32
    near_slots: Int32
    changes: Table
    counts: Int64

    @property
    def num_bytes(self) -> int:
        """Bytes of all tables together."""
        return sum(table.nbytes for table in self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wiring:
    """A graph as the event loop wants it: who follows whom, and how much each op waits for."""

    ops: Table
    followers: Int32
    meets: Table
    members: Int32
    slots: Table
    crossings: Table
    paths: Int32
    first_flow: Int32
    agenda_room: int


@lru_cache(maxsize=8)
def wire(graph: TaskGraph) -> Wiring:
    """Return `graph` prepared; raises DeadlockError for one that waits in a circle.

    Kept for the last few graphs: a search asks for the same one with other costs.
    """
    meet, meets, members = _meets(graph)
    crossings, paths = _paths(graph)
    ops, followers = _ops(graph, meet)
    most_followers = int(np.diff(ops["first_follower"]).max(initial=0)) + 1
    wiring = Wiring(
        ops=ops,
        followers=followers,
        meets=meets,
        members=members,
        slots=_slots(graph),
        crossings=crossings,
        paths=paths,
        first_flow=_first_flows(graph, crossings, paths),
        # What one end can free, the meet that this completes, and all queues.
        agenda_room=most_followers + len(members) + len(graph.streams),
    )
    tried = ops.copy()
    reach(tried, followers, meets.copy(), members)
    if (tried["start_ns"][:-1] < 0).any():
        raise deadlock(graph, tried["start_ns"][:-1])
    return wiring


def prepare(
    wiring: Wiring, costs: OpCosts, links: Sequence[Link], changes: Sequence[Change]
) -> Tables:
    """Return fresh tables for one run of the compiled loop."""
    ops, slots = wiring.ops.copy(), wiring.slots.copy()
    ops["ns"][:-1], ops["end_ns"][:-1] = costs.ns, costs.size_bytes
    table = _table(LINK, len(links))
    table["capacity"] = [link.bytes_per_s / 1e9 for link in links]
    table["first_flow"] = np.resize(wiring.first_flow, len(links))
    num_queued = int(slots["num_queued"].sum())
    slots["num_queued"] = 0

    def empty(count: int) -> Int32:
        return np.zeros(count, np.int32)

    return Tables(
        ops=ops, followers=wiring.followers, meets=wiring.meets.copy(), members=wiring.members,
        slots=slots, heap=_table(RUNNING_OP, len(slots) + 1), agenda=empty(wiring.agenda_room),
        queues=empty(num_queued), marked=empty(len(slots)), links=table,
        flows=_table(FLOW, int(wiring.first_flow[-1])), dirty=empty(len(links)),
        crossings=wiring.crossings, paths=wiring.paths, near_links=empty(len(links)),
        near_slots=empty(len(slots)), changes=_changes(changes),
        counts=np.zeros(NUM_COUNTS, np.int64),
    )  # fmt: skip


def _table(dtype: np.dtype[np.void], count: int) -> Table:
    return np.zeros(count, dtype).view(np.recarray)


def _offsets(counts: Int64) -> Int32:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


def _ops(graph: TaskGraph, meet: Int32) -> tuple[Table, Int32]:
    """Return the ops, with one more that ends the last one's followers, and the followers."""
    num_ops = len(graph)
    is_queue = np.array([stream.is_queue for stream in graph.streams], np.bool_)
    order = np.argsort(graph.stream, kind="stable")
    follows = (np.diff(graph.stream[order]) == 0) & ~is_queue[graph.stream[order[1:]]]
    ops = _table(OP, num_ops + 1)
    for field in ("start_ns", "next_op", "path", "meet"):
        ops[field] = -1
    ops["slot"][:-1], ops["path"][:-1], ops["meet"][:-1] = graph.stream, graph.path, meet
    ops["next_op"][order[:-1][follows]] = order[1:][follows]
    ops["waiting"][:-1] = np.diff(graph.dep_offsets)
    ops["waiting"][order[1:][follows]] += 1
    ops["first_follower"] = _offsets(np.bincount(graph.deps, minlength=num_ops))
    owners = np.repeat(np.arange(num_ops, dtype=np.int32), np.diff(graph.dep_offsets))
    return ops, owners[np.argsort(graph.deps, kind="stable")]


def _slots(graph: TaskGraph) -> Table:
    """Return the streams, idle; `num_queued` is how many ops a queue may hold."""
    slots = _table(SLOT, len(graph.streams))
    slots["op"], slots["speed"] = -1, 1.0
    slots["rank"] = [stream.rank for stream in graph.streams]
    slots["is_queue"] = [stream.is_queue for stream in graph.streams]
    counts = np.bincount(graph.stream, minlength=len(slots)) * slots["is_queue"]
    slots["num_queued"] = counts
    slots["first_queued"] = _offsets(counts)[:-1]
    return slots


def _meets(graph: TaskGraph) -> tuple[Int32, Table, Int32]:
    """Return the meet of each op, renumbered from 0, the meets and their members."""
    members = np.flatnonzero(graph.meet >= 0)
    meet = np.full(len(graph), -1, np.int32)
    _, meet[members] = np.unique(graph.meet[members], return_inverse=True)
    sizes = np.bincount(meet[members])
    meets = _table(MEET, len(sizes))
    meets["first_member"], meets["num_members"] = _offsets(sizes)[:-1], sizes
    meets["missing"] = sizes
    return meet, meets, members[np.argsort(meet[members], kind="stable")].astype(np.int32)


def _paths(graph: TaskGraph) -> tuple[Table, Int32]:
    crossings = [crossing for path in graph.paths for crossing in path]
    table = _table(CROSSING, len(crossings) + 1)
    table["link"][1:] = [crossing.link for crossing in crossings]
    table["weight"][1:] = [crossing.weight for crossing in crossings]
    # An op without a path has the empty range from 0 to 0, so paths begin at 1.
    return table, 1 + _offsets(np.array([len(path) for path in graph.paths], np.int64))


def _first_flows(graph: TaskGraph, crossings: Table, paths: Int32) -> Int32:
    """Return where the flows of each link stand: a place for each stream that can cross it."""
    has_path = graph.path >= 0
    pairs = np.unique(np.stack((graph.stream[has_path], graph.path[has_path])), axis=1).T.tolist()
    crossed = {
        (link, stream)
        for stream, path in pairs
        for link in crossings["link"][paths[path] : paths[path + 1]].tolist()
    }
    links = np.array([link for link, _ in crossed], np.int64)
    return _offsets(np.bincount(links, minlength=1))


def _changes(changes: Sequence[Change]) -> Table:
    """Return the changes by time, then as given."""
    table = _table(CHANGE, len(changes))
    for place, change in enumerate(sorted(changes, key=lambda change: change.at_ns)):
        if isinstance(change, CapacityChange):
            table[place] = (change.at_ns, change.bytes_per_s / 1e9, change.link, False)
        else:
            table[place] = (change.at_ns, change.speed, change.rank, True)
    return table
