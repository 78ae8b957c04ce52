"""SimPy tells the story of a graph in other words: the reference that every engine must equal.

Written to be read and to be right, in exact fractions, and as unlike the engines as can be: they
keep tables of ops, here every stream, op and flow is a process that waits for events.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from math import ceil

import numpy as np
import simpy
from simpy.events import EventPriority

from simulator.checks import Int64
from simulator.deadlock import deadlock, stalled
from simulator.graph import OpCosts, TaskGraph, op_costs
from simulator.network import CapacityChange, Change, Link

Play = Generator[simpy.Event, object, None]
Action = Callable[[], None]

CHANGE, SERVE, SHARE = EventPriority(-1), EventPriority(2), EventPriority(3)
"""Places within an instant. SimPy's own events have 0 and 1: changes of speed and capacity come
before everything, queues choose when all else has come to rest, flows share the links last."""

SLACK, SLACK_NS = Fraction(1, 10**12), Fraction(1, 10**6)
"""A piece of work that is over the next whole nanosecond by less than this part of itself, or this
part of a nanosecond, ends there: engines count in floats, and what is a whole number may come out a
hair above it, the more so after many changes of rate."""


def run_oracle(
    graph: TaskGraph, costs: OpCosts, links: Sequence[Link], changes: Sequence[Change]
) -> tuple[Int64, Int64]:
    """Return starts and ends of every op in ns.

    Raises DeadlockError if ops wait for each other, and StalledError if ops started that a dead
    link or rank keeps from ending.
    """
    story = _Story(graph, costs, links, changes)
    story.env.run()
    if never_ended := np.flatnonzero((story.starts >= 0) & (story.ends < 0)).tolist():
        # A ring of ops would block in any weather, and is named first.
        run_oracle(graph, op_costs(graph, 0), links, ())
        raise stalled(graph, never_ended)
    if (story.starts < 0).any():
        raise deadlock(graph, story.starts)
    return story.starts, story.ends


class _Moment(simpy.Event):
    """An event at a chosen place within its instant, which SimPy's timeouts do not offer."""

    def __init__(
        self, env: simpy.Environment, place: EventPriority, delay_ns: int, action: Action
    ) -> None:
        super().__init__(env)
        self._ok, self._value = True, None
        self.callbacks.append(lambda _: action())
        env.schedule(self, place, delay_ns)


class _Work:
    """So much work `left`, done at a `rate` per ns that may change while it lasts."""

    def __init__(self, env: simpy.Environment, left: int, rate: Fraction) -> None:
        self.env, self.left, self.rate, self.since_ns = env, Fraction(left), rate, int(env.now)
        self.changed = env.event()

    @property
    def due_ns(self) -> int | None:
        """The first whole ns by which all is done; None if that is never."""
        if self.rate == 0 and self.left > 0:
            return None
        rest = self.left / self.rate if self.left else self.left
        is_whole = rest.denominator == 1
        return self.since_ns + ceil(rest if is_whole else rest * (1 - SLACK) - SLACK_NS)

    def set_rate(self, rate: Fraction) -> None:
        """Go on at another rate; work that is due at this instant is done already."""
        now = int(self.env.now)
        if rate == self.rate or self.due_ns == now:
            return
        self.left -= self.rate * (now - self.since_ns)
        self.rate, self.since_ns = rate, now
        changed, self.changed = self.changed, self.env.event()
        changed.succeed()

    def play(self) -> Play:
        """Wait until the work is done, however its rate changes."""
        while (due := self.due_ns) != self.env.now:
            events = [self.changed]
            if due is not None:
                events.append(self.env.timeout(due - int(self.env.now)))
            yield self.env.any_of(events)


class _Story:
    """One run: the clock, the processes, and what they share."""

    def __init__(
        self, graph: TaskGraph, costs: OpCosts, links: Sequence[Link], changes: Sequence[Change]
    ) -> None:
        self.env = simpy.Environment()
        self.graph, self.costs = graph, costs
        num_ops = len(graph)
        self.starts, self.ends = np.full(num_ops, -1, np.int64), np.full(num_ops, -1, np.int64)
        self.ended = [self.env.event() for _ in range(num_ops)]
        self.meets = graph.meet.tolist()
        self.gathered = {meet: self.env.event() for meet in set(self.meets)}
        self.missing = {meet: self.meets.count(meet) for meet in set(self.meets)}
        self.capacity = [_per_ns(link.bytes_per_s) for link in links]
        self.flows: dict[int, _Work] = {}
        self.speed: dict[int, Fraction] = defaultdict(lambda: Fraction(1))
        self.computing: dict[int, list[_Work]] = defaultdict(list)
        self.waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.serving: set[int] = set()
        self.called: set[EventPriority] = set()
        for change in changes:
            _Moment(self.env, CHANGE, change.at_ns, partial(self.apply, change))
        self.start_processes()

    def start_processes(self) -> None:
        """Start a process for each stream; in a queue, for each op."""
        for stream, (_, _, is_queue) in enumerate(self.graph.streams):
            ids = np.flatnonzero(self.graph.stream == stream).tolist()
            for process in map(self.arrive, ids) if is_queue else [self.play_stream(ids)]:
                self.env.process(process)

    def play_stream(self, ids: list[int]) -> Play:
        """Do the ops of a stream one by one."""
        for op_id in ids:
            yield from self.wait_for_deps(op_id)
            if (meet := self.meets[op_id]) >= 0:
                self.missing[meet] -= 1
                if self.missing[meet] == 0:
                    self.gathered[meet].succeed()
                yield self.gathered[meet]
            yield from self.play_op(op_id)

    def arrive(self, op_id: int) -> Play:
        """Line up in a queue, once the dependencies allow it."""
        yield from self.wait_for_deps(op_id)
        self.waiting[int(self.graph.stream[op_id])].append((int(self.env.now), op_id))
        self.call(SERVE, self.serve)

    def serve(self) -> None:
        """Let every idle queue begin its first op, by time of arrival, then by id."""
        for stream, line in self.waiting.items():
            if line and stream not in self.serving:
                self.serving.add(stream)
                first = min(line)
                line.remove(first)
                self.env.process(self.play_queued(stream, first[1]))

    def play_queued(self, stream: int, op_id: int) -> Play:
        """Do one op of a queue, then let the queue choose again."""
        yield from self.play_op(op_id)
        self.serving.remove(stream)
        self.call(SERVE, self.serve)

    def wait_for_deps(self, op_id: int) -> Play:
        """Wait until all that the op depends on has ended."""
        for dep in self.graph.deps_of(op_id).tolist():
            yield self.ended[dep]

    def play_op(self, op_id: int) -> Play:
        """Do one op: work at the speed of its rank, or latency and then bytes over its path."""
        self.starts[op_id] = self.env.now
        own_ns, size_bytes = int(self.costs.ns[op_id]), int(self.costs.size_bytes[op_id])
        if self.graph.path[op_id] < 0:
            rank = self.graph.streams[self.graph.stream[op_id]].rank
            work = _Work(self.env, own_ns, self.speed[rank])
            self.computing[rank].append(work)
            yield from work.play()
            self.computing[rank].remove(work)
        else:
            yield self.env.timeout(own_ns)
            self.flows[op_id] = _Work(self.env, size_bytes, Fraction(0))
            self.call(SHARE, self.share)
            yield from self.flows[op_id].play()
            del self.flows[op_id]
            self.call(SHARE, self.share)
        self.ends[op_id] = self.env.now
        self.ended[op_id].succeed()

    def apply(self, change: Change) -> None:
        """Change the capacity of a link or the speed of a rank."""
        if isinstance(change, CapacityChange):
            self.capacity[change.link] = _per_ns(change.bytes_per_s)
            self.call(SHARE, self.share)
        else:
            self.speed[change.rank] = Fraction(change.speed)
            for work in self.computing[change.rank]:
                work.set_rate(self.speed[change.rank])

    def share(self) -> None:
        """Give every flow its max-min fair rate."""
        weights = {op_id: self.link_weights(op_id) for op_id in self.flows}
        for op_id, rate in max_min_rates(weights, self.capacity).items():
            self.flows[op_id].set_rate(rate)

    def link_weights(self, op_id: int) -> dict[int, int]:
        """Return how many flows the op puts on each link of its path."""
        weights: dict[int, int] = defaultdict(int)
        for link, weight in self.graph.paths[self.graph.path[op_id]]:
            weights[link] += weight
        return weights

    def call(self, place: EventPriority, action: Action) -> None:
        """Do `action` at its place within this instant, once, however often it is called for."""

        def act() -> None:
            self.called.remove(place)
            action()

        if place not in self.called:
            self.called.add(place)
            _Moment(self.env, place, 0, act)


def _per_ns(per_s: float) -> Fraction:
    return Fraction(per_s) / 10**9


def max_min_rates(
    weights: Mapping[int, Mapping[int, int]], capacity: Sequence[Fraction]
) -> dict[int, Fraction]:
    """Return the max-min fair rate of each flow; `weights[flow][link]` is how often it crosses.

    All flows rise together; where a link is full, its flows stop there and the others rise on.
    Source: Bertsekas and Gallager, Data Networks, section 6.5.2 (progressive filling).

    >>> rates = max_min_rates({0: {0: 1}, 1: {0: 1, 1: 1}}, [Fraction(10), Fraction(4)])
    >>> rates[0], rates[1]
    (Fraction(6, 1), Fraction(4, 1))
    """
    rates: dict[int, Fraction] = {}
    while rising := weights.keys() - rates.keys():
        full_at = {}
        for link in {link for flow in rising for link in weights[flow]}:
            taken = sum(rate * weights[flow].get(link, 0) for flow, rate in rates.items())
            shares = sum(weights[flow].get(link, 0) for flow in rising)
            full_at[link] = (capacity[link] - taken) / shares
        level = min(full_at.values())
        full = {link for link, at in full_at.items() if at == level}
        rates.update({flow: level for flow in rising if full & weights[flow].keys()})
    return rates
