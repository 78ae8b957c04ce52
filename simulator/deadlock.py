"""The name of a deadlock: which op at the head of which stream waits for whom, around the ring."""

from collections.abc import Sequence

import numpy as np

from simulator.checks import Int64
from simulator.graph import TaskGraph


class DeadlockError(ValueError):
    """Nothing can start and something is left; the message says who waits for whom."""


class StalledError(ValueError):
    """Something began and can never end: its link or its rank stands still for ever."""


def stalled(graph: TaskGraph, op_ids: Sequence[int]) -> StalledError:
    """Return the error for ops that began and never ended, the lowest id named first."""
    shown = ", ".join(graph.label(op_id) for op_id in op_ids[:3])
    more = f" and {len(op_ids) - 3} more" if len(op_ids) > 3 else ""
    return StalledError(
        f"{shown}{more} began and never ended: a link of its path carries nothing, or its rank "
        "has speed 0, until the end; let a later change bring it back"
    )


def deadlock(graph: TaskGraph, starts_ns: Int64) -> DeadlockError:
    """Return the error for a simulation that ended with ops that never started (start -1).

    Each blocked stream has a head, its first op that never started. A head waits for an op that
    is the head of its stream or stands behind it; following these arrows leads into a ring. Any op
    of a queue may be its next, so each of them counts as a head.
    """
    import networkx as nx  # a fifth of a second that only an error is worth

    left = np.flatnonzero(starts_ns < 0)
    heads: dict[int, int] = {}
    for op_id in left.tolist():
        heads.setdefault(int(graph.stream[op_id]), op_id)

    def head_of(op_id: int) -> int:
        stream = int(graph.stream[op_id])
        return op_id if graph.streams[stream].is_queue else heads[stream]

    waits: nx.DiGraph[int] = nx.DiGraph()
    for head in sorted({head_of(op_id) for op_id in left.tolist()}):
        for blocker in _blockers(graph, head, starts_ns):
            waits.add_edge(head, head_of(blocker), blocker=blocker)
    ring = nx.find_cycle(waits, source=min(heads.values()))
    sentences = []
    for head, other in ring:
        blocker = waits.edges[head, other]["blocker"]
        behind = "" if blocker == other else f", which stands behind {graph.names[other]}"
        sentences.append(f"{graph.label(head)} waits for {graph.label(blocker)}{behind}")
    return DeadlockError(f"deadlock with {len(left)} ops left: {'; '.join(sentences)}")


def _blockers(graph: TaskGraph, head: int, starts_ns: Int64) -> list[int]:
    """Return the ops that never started and keep `head` from starting, lowest id first."""
    meet = int(graph.meet[head])
    partners = np.flatnonzero(graph.meet == meet).tolist() if meet >= 0 else []
    waited = {*graph.deps_of(head).tolist(), *partners} - {head}
    return sorted(other for other in waited if starts_ns[other] < 0)
