"""The name of a deadlock: which op at the head of which stream waits for whom, around the ring."""

from collections.abc import Sequence

import networkx as nx

from simulator.graph import Op, TaskGraph


class DeadlockError(ValueError):
    """Nothing can start and something is left; the message says who waits for whom."""


def deadlock(graph: TaskGraph, starts_ns: Sequence[int]) -> DeadlockError:
    """Return the error for a simulation that ended with ops that never started (start -1).

    Each blocked stream has a head, its first op that never started. A head waits for an op that
    is the head of its stream or stands behind it; following these arrows leads into a ring.
    """
    heads = {
        key: next(op_id for op_id in ids if starts_ns[op_id] < 0)
        for key, ids in graph.streams.items()
        if any(starts_ns[op_id] < 0 for op_id in ids)
    }
    waits: nx.DiGraph[int] = nx.DiGraph()
    for head in sorted(heads.values()):
        for blocker in _blockers(graph, head, starts_ns):
            other = heads[graph.ops[blocker].rank, graph.ops[blocker].stream]
            waits.add_edge(head, other, blocker=blocker)
    ring = nx.find_cycle(waits, source=min(heads.values()))
    sentences = []
    for head, other in ring:
        blocker = waits.edges[head, other]["blocker"]
        behind = "" if blocker == other else f", which stands behind {graph.ops[other].name}"
        sentences.append(f"{_name(graph.ops[head])} waits for {_name(graph.ops[blocker])}{behind}")
    num_left = sum(start < 0 for start in starts_ns)
    return DeadlockError(f"deadlock with {num_left} ops left: {'; '.join(sentences)}")


def _blockers(graph: TaskGraph, head: int, starts_ns: Sequence[int]) -> list[int]:
    """Return the ops that never started and keep `head` from starting, lowest id first."""
    op = graph.ops[head]
    partners = graph.meets.get(op.meet, ()) if op.meet >= 0 else ()
    return sorted({other for other in (*op.deps, *partners) if starts_ns[other] < 0} - {op.id})


def _name(op: Op) -> str:
    return f"{op.name} (rank {op.rank}, {op.stream})"
