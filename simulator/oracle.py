"""SimPy tells the story of a graph in other words: the reference that every engine must equal."""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from simulator.checks import Int64
from simulator.deadlock import deadlock
from simulator.graph import OpCosts, TaskGraph
from simulator.network import Change, Link


def run_oracle(
    graph: TaskGraph, costs: OpCosts, links: Sequence[Link], changes: Sequence[Change]
) -> tuple[Int64, Int64]:
    """Return starts and ends of every op in ns; raises DeadlockError.

    One process plays each stream: it waits for the dependencies of its next op, then for the
    other members of the op's meet, then works. Integer delays keep SimPy's clock an integer.
    """
    import simpy

    assert not links and not changes
    env = simpy.Environment()
    num_ops = len(graph)
    starts = np.full(num_ops, -1, np.int64)
    ended = [env.event() for _ in range(num_ops)]
    meets = graph.meet.tolist()
    gathered = {meet: env.event() for meet in set(meets)}
    missing = {meet: meets.count(meet) for meet in set(meets)}

    def play(ids: list[int]) -> Generator[Any, Any, None]:
        for op_id in ids:
            for dep in graph.deps_of(op_id).tolist():
                yield ended[dep]
            if (meet := meets[op_id]) >= 0:
                missing[meet] -= 1
                if missing[meet] == 0:
                    gathered[meet].succeed()
                yield gathered[meet]
            starts[op_id] = int(env.now)
            yield env.timeout(int(costs.ns[op_id]))
            ended[op_id].succeed()

    for stream in range(len(graph.streams)):
        env.process(play(np.flatnonzero(graph.stream == stream).tolist()))
    env.run()
    if (starts < 0).any():
        raise deadlock(graph, starts)
    return starts, starts + costs.ns
