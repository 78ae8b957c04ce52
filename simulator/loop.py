"""The event loop: placeholder in Python until the compiled one stands."""

import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from simulator.checks import Int64
from simulator.deadlock import deadlock
from simulator.graph import OpCosts, TaskGraph
from simulator.network import Change, Link


def run_loop(
    graph: TaskGraph, costs: OpCosts, links: Sequence[Link], changes: Sequence[Change]
) -> tuple[Int64, Int64]:
    """Return starts and ends of every op in ns; raises DeadlockError."""
    assert not links and not changes
    num_ops = len(graph)
    durations = costs.ns.tolist()
    starts = [-1] * num_ops
    groups = [(i,) for i in range(num_ops)]
    meets: dict[int, list[int]] = {}
    for i, meet in enumerate(graph.meet.tolist()):
        if meet >= 0:
            meets.setdefault(meet, []).append(i)
    for ids in meets.values():
        for i in ids:
            groups[i] = tuple(ids)
    waiting = [0] * num_ops
    followers: list[list[int]] = [[] for _ in range(num_ops)]
    by_stream: dict[int, list[int]] = {}
    for i in range(num_ops):
        by_stream.setdefault(int(graph.stream[i]), []).append(i)
        for dep in graph.deps_of(i).tolist():
            followers[dep].append(i)
            waiting[groups[i][0]] += 1
    for ids in by_stream.values():
        for a, b in itertools.pairwise(ids):
            followers[a].append(b)
            waiting[groups[b][0]] += 1
    running: list[tuple[int, int]] = []

    def start(group: tuple[int, ...], now: int) -> None:
        for i in group:
            starts[i] = now
            heapq.heappush(running, (now + durations[i], i))

    for group in sorted(set(groups)):
        if waiting[group[0]] == 0:
            start(group, 0)
    while running:
        now, i = heapq.heappop(running)
        for f in followers[i]:
            leader = groups[f][0]
            waiting[leader] -= 1
            if waiting[leader] == 0:
                start(groups[f], now)
    begun = np.array(starts, np.int64)
    if (begun < 0).any():
        raise deadlock(graph, begun)
    return begun, begun + costs.ns
