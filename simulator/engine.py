"""The engines behind one door: `simulate(graph, durations_ns)` returns the `Timeline`.

Two of them stand here. `event_loop` is a plain heap of running ops; `simpy_story` lets one SimPy
process play each stream. They share no code below this door and agree to the nanosecond, which is
what the second is for.
"""

import heapq
import itertools
from collections.abc import Sequence
from typing import Literal

from simulator.deadlock import deadlock
from simulator.graph import TaskGraph
from simulator.timeline import Timeline

Engine = Literal["loop", "simpy"]


def simulate(graph: TaskGraph, durations_ns: Sequence[int], *, engine: Engine = "loop") -> Timeline:
    """Return the timeline of `graph` when op i takes `durations_ns[i]` nanoseconds.

    Raises ValueError unless there is one whole, non-negative duration for each op, and
    DeadlockError that names who waits for whom if nothing can start while something is left.

    >>> from simulator.graph import Op
    >>> forward = Op(id=0, rank=0, stream="compute", name="0F0", kind="forward")
    >>> send = Op(id=1, rank=0, stream="to 1", name="0F0 to 1", kind="send", deps=(0,))
    >>> after = Op(id=2, rank=1, stream="compute", name="1F0", kind="forward", deps=(1,))
    >>> simulate(TaskGraph(ops=(forward, send, after)), [10, 3, 10]).makespan_ns
    23
    """
    if len(durations_ns) != len(graph.ops):
        raise ValueError(f"{len(durations_ns)} durations for {len(graph.ops)} ops")
    for op, duration in zip(graph.ops, durations_ns, strict=True):
        # A bool is an int and a NaN compares false: both would slip through a bare `< 0`.
        if type(duration) is not int or duration < 0:
            raise ValueError(f"op {op.name} takes {duration!r}; it must be a whole number >= 0")
    run = event_loop if engine == "loop" else simpy_story
    starts = run(graph, durations_ns)
    if -1 in starts:
        raise deadlock(graph, starts)
    return graph.timeline(starts, durations_ns)


def event_loop(graph: TaskGraph, durations_ns: Sequence[int]) -> list[int]:
    """Return the start of each op in ns, -1 for one that can never start.

    An op, or all ops of a meet together, becomes ready when the number of things that it waits
    for (dependencies, and the op in front of it on its stream) falls to zero.
    """
    starts = [-1] * len(graph.ops)
    waiting, followers, groups = _wiring(graph)
    running: list[tuple[int, int]] = []

    def start(group: tuple[int, ...], now_ns: int) -> None:
        for op_id in group:
            starts[op_id] = now_ns
            heapq.heappush(running, (now_ns + durations_ns[op_id], op_id))

    for group in sorted(set(groups)):
        if waiting[group[0]] == 0:
            start(group, 0)
    while running:
        now_ns, op_id = heapq.heappop(running)
        for follower in followers[op_id]:
            leader = groups[follower][0]
            waiting[leader] -= 1
            if waiting[leader] == 0:
                start(groups[follower], now_ns)
    return starts


def _wiring(graph: TaskGraph) -> tuple[list[int], list[list[int]], list[tuple[int, ...]]]:
    """Return what each op waits for (counted at its group's first member), and who follows it."""
    groups = [graph.meets[op.meet] if op.meet >= 0 else (op.id,) for op in graph.ops]
    waiting = [0] * len(graph.ops)
    followers: list[list[int]] = [[] for _ in graph.ops]
    for op in graph.ops:
        for dep in op.deps:
            followers[dep].append(op.id)
            waiting[groups[op.id][0]] += 1
    for ids in graph.streams.values():
        for before, after in itertools.pairwise(ids):
            followers[before].append(after)
            waiting[groups[after][0]] += 1
    return waiting, followers, groups


def simpy_story(graph: TaskGraph, durations_ns: Sequence[int]) -> list[int]:
    """Return the start of each op in ns, -1 for one that can never start, as SimPy tells it.

    One process plays each stream: it waits for the dependencies of its next op, then for the
    other members of the op's meet, then works. Integer delays keep SimPy's clock an integer.
    """
    import simpy

    env = simpy.Environment()
    starts = [-1] * len(graph.ops)
    ended = [env.event() for _ in graph.ops]
    gathered = {meet: env.event() for meet in graph.meets}
    missing = {meet: len(ids) for meet, ids in graph.meets.items()}

    def play(ids: tuple[int, ...]) -> "simpy.events.ProcessGenerator":
        for op_id in ids:
            op = graph.ops[op_id]
            for dep in op.deps:
                yield ended[dep]
            if op.meet >= 0:
                missing[op.meet] -= 1
                if missing[op.meet] == 0:
                    gathered[op.meet].succeed()
                yield gathered[op.meet]
            starts[op_id] = int(env.now)
            yield env.timeout(durations_ns[op_id])
            ended[op_id].succeed()

    for ids in graph.streams.values():
        env.process(play(ids))
    env.run()
    return starts
