"""Long stories of parameter servers: throughput and staleness over hours, with preempted workers.

An event is a step of one worker or an update of the servers, never a message: a day of 32 workers
is some million events. Contention on links belongs to the event loop over a graph, see `engine`.
"""

from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from math import fsum
from typing import Any, Literal

import numpy as np
import simpy

from simulator.jitter import MASK, Jitter
from simulator.stories.strikes import HOUR_NS, Clocks, Outage, check_names, check_whole

Sync = Literal["bsp", "ssp", "asp"]
"""Who waits for whom before a step.

`bsp`, bulk synchronous: everybody for everybody; the gradients of one round make one update.
`ssp`, stale synchronous: nobody begins a step that lies more than `slack` steps ahead of what the
slowest has done. `asp`, asynchronous: nobody for anybody.
"""

MAX_WORKERS, MAX_STEPS = 100_000, 20_000_000
DRAWN_AT_ONCE = 256

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """`num_servers` hold a share of the weights each; worker i needs `step_ns[i]` for a step.

    A worker pulls the weights (`pull_ns`), computes, and pushes its gradient (`push_ns`). Adding a
    gradient to all weights is work of `update_ns` that the servers share evenly; gradients queue in
    order of arrival, and all servers see the same queue. `spread` is the standard deviation of the
    logarithm of a step's noise, of mean 1.

    An outage takes one worker away: what it was computing is lost, and whoever waits for it waits
    in vain for `detection_ns`. It rejoins after `away_ns`, but not before it was missed, level with
    the slowest. There is no notice, as there is nothing to save: the weights are at the servers.

    Source of the bound: Ho et al., "More effective distributed ML via a stale synchronous parallel
    parameter server", NIPS 2013.
    """

    step_ns: tuple[int, ...]
    num_servers: int
    update_ns: int
    sync: Sync
    slack: int = 0
    pull_ns: int = 0
    push_ns: int = 0
    spread: float = 0.0
    outages: tuple[Outage, ...] = ()
    duration_ns: int = HOUR_NS

    def __post_init__(self) -> None:
        check_whole("servers: number of workers", len(self.step_ns), least=1, most=MAX_WORKERS)
        for worker, step_ns in enumerate(self.step_ns):
            check_whole(f"servers: step_ns of worker {worker}", step_ns, least=1)
        for name in ("update_ns", "slack", "pull_ns", "push_ns"):
            check_whole(f"servers: {name}", getattr(self, name))
        check_whole("servers: num_servers", self.num_servers, least=1)
        check_whole("servers: duration_ns", self.duration_ns, least=1)
        Jitter(seed=0, compute_spread=self.spread)
        if self.sync not in ("bsp", "ssp", "asp"):
            raise ValueError(f"servers: sync is {self.sync!r}; it must be bsp, ssp or asp")
        if self.slack and self.sync != "ssp":
            raise ValueError(
                f"servers: slack is {self.slack}, but sync is {self.sync}; only ssp has slack"
            )
        check_names(self.outages)
        for outage in self.outages:
            if outage.notice_ns:
                raise ValueError(
                    f"servers: outage {outage.name} gives notice; a worker has nothing to save: "
                    "set notice_ns to 0"
                )
        num_steps = self.duration_ns * fsum(1 / step_ns for step_ns in self.step_ns)
        if num_steps > MAX_STEPS:
            raise ValueError(
                f"servers: about {num_steps:.3g} steps; at most {MAX_STEPS} are told: "
                "shorten duration_ns"
            )

    @property
    def serve_ns(self) -> int:
        """How long one gradient occupies the servers: update_ns / num_servers, rounded up."""
        return -(-self.update_ns // self.num_servers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStory:
    """What came of it. Gradients count when they are added; rates are means over the duration.

    `staleness[k]` gradients were computed on weights that k updates had changed meanwhile. In asp
    its mean tends to (number of workers - 1), whatever their speeds: between two gradients of one
    worker lies each gradient of the others once. `waiting_share` is the workers' time at the gate,
    `serving_share` the servers' time at work.
    """

    duration_ns: int
    num_gradients: int
    num_updates: int
    num_lost: int
    gradients_of: tuple[int, ...]
    staleness: tuple[int, ...]
    waiting_share: float
    serving_share: float
    num_strikes: Mapping[str, int]

    @property
    def gradients_per_s(self) -> float:
        """Throughput: in bsp an update adds up many of them."""
        return self.num_gradients * 1e9 / self.duration_ns

    @property
    def updates_per_s(self) -> float:
        """New versions of the weights."""
        return self.num_updates * 1e9 / self.duration_ns

    @property
    def mean_staleness(self) -> float:
        """Mean over all gradients; 0 where there were none."""
        total = sum(k * number for k, number in enumerate(self.staleness))
        return total / max(1, self.num_gradients)

    def staleness_quantile(self, quantile: float) -> int:
        """Return the staleness that at least the share `quantile` of gradients does not exceed."""
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile is {quantile}; it must be above 0 and at most 1")
        reached = np.cumsum(self.staleness) >= quantile * self.num_gradients
        return int(np.argmax(reached)) if self.num_gradients else 0


def tell_servers(spec: ServerSpec, seed: int = 0) -> ServerStory:
    """Return the story of `spec` from empty queues on; equal arguments give equal stories.

    >>> second = 10**9
    >>> spec = ServerSpec(step_ns=(second, second), num_servers=2, update_ns=0, sync="asp",
    ...                   duration_ns=100 * second)
    >>> story = tell_servers(spec)
    >>> story.gradients_per_s, story.staleness
    (2.0, (1, 199))
    """
    check_whole("seed", seed, most=MASK)
    return _Telling(spec, seed).story()


class _Telling:
    """One story under way: a process per worker, and one per worker for what befalls it."""

    def __init__(self, spec: ServerSpec, seed: int) -> None:
        num_workers = len(spec.step_ns)
        self._spec = spec
        self._env = simpy.Environment()
        self._jitter = Jitter(seed=seed, compute_spread=spec.spread)
        self._clocks = Clocks(spec.outages, num_workers, seed)
        self._lead = {"bsp": 0, "ssp": spec.slack, "asp": MAX_STEPS}[spec.sync]
        self._version = 0
        self._free_at_ns = self._served_ns = 0
        # Steps done by each worker, how many members have done so many, and the least of them.
        self._done = [0] * num_workers
        self._num_at = Counter({0: num_workers})
        self._floor = 0
        self._num_members = num_workers
        self._gate: dict[int, tuple[simpy.Event, int]] = {}
        self._waited_ns = 0
        self._lives = [0] * num_workers
        self._durations = [self._draw(worker) for worker in range(num_workers)]
        self._gradients_of = [0] * num_workers
        self._staleness: Counter[int] = Counter()
        self._num_lost = 0
        self._num_strikes = Counter({outage.name: 0 for outage in spec.outages})

    def story(self) -> ServerStory:
        """Tell it to its end, events of the last ns included."""
        spec, num_workers = self._spec, len(self._spec.step_ns)
        for worker in range(num_workers):
            self._env.process(self._work(worker))
        for worker in range(num_workers):
            self._env.process(self._befall(worker))
        self._env.run(until=spec.duration_ns + 1)
        still_ns = sum(spec.duration_ns - since_ns for _, since_ns in self._gate.values())
        queued_ns = max(0, self._free_at_ns - spec.duration_ns)
        return ServerStory(
            duration_ns=spec.duration_ns,
            num_gradients=sum(self._gradients_of),
            num_updates=self._version,
            num_lost=self._num_lost,
            gradients_of=tuple(self._gradients_of),
            staleness=tuple(
                self._staleness[k] for k in range(max(self._staleness, default=-1) + 1)
            ),
            waiting_share=(self._waited_ns + still_ns) / (num_workers * spec.duration_ns),
            serving_share=(self._served_ns - queued_ns) / spec.duration_ns,
            num_strikes=dict(self._num_strikes),
        )

    @property
    def _now_ns(self) -> int:
        return int(self._env.now)

    def _draw(self, worker: int) -> Iterator[int]:
        """Yield what the steps of `worker` take, drawn by (seed, worker, step)."""
        base_ns = np.full(DRAWN_AT_ONCE, self._spec.step_ns[worker], np.int64)
        for first in count(0, DRAWN_AT_ONCE):
            steps = np.arange(first, first + DRAWN_AT_ONCE)
            yield from self._jitter.apply(base_ns, 0, worker, steps).tolist()

    def _work(self, worker: int) -> Process:
        """One life of a worker."""
        spec, env, life = self._spec, self._env, self._lives[worker]
        there_and_back_ns = spec.pull_ns + spec.push_ns
        while True:
            if self._done[worker] - self._floor > self._lead:
                yield self._wait(worker)
                if self._lives[worker] != life:
                    return
            read_version = self._version
            yield env.timeout(there_and_back_ns + next(self._durations[worker]))
            if self._lives[worker] != life:
                self._num_lost += 1
                return
            self._free_at_ns = max(self._free_at_ns, self._now_ns) + spec.serve_ns
            self._served_ns += spec.serve_ns
            if self._free_at_ns > self._now_ns:
                yield env.timeout(self._free_at_ns - self._now_ns)
            self._add_gradient(worker, read_version)
            if self._lives[worker] != life:
                return
            self._advance(worker)

    def _add_gradient(self, worker: int, read_version: int) -> None:
        self._gradients_of[worker] += 1
        self._staleness[self._version - read_version] += 1
        if self._spec.sync != "bsp":
            self._version += 1

    def _advance(self, worker: int) -> None:
        done = self._done[worker]
        self._done[worker] = done + 1
        self._num_at[done] -= 1
        self._num_at[done + 1] += 1
        self._raise_floor()

    def _raise_floor(self) -> None:
        """Let those go who waited for the slowest member, if it has moved on or left."""
        if self._num_at[self._floor] or not self._num_members:
            return
        while not self._num_at[self._floor]:
            del self._num_at[self._floor]
            self._floor += 1
        if self._spec.sync == "bsp":
            self._version += 1
        for worker in [w for w in self._gate if self._done[w] - self._floor <= self._lead]:
            self._release(worker)

    def _wait(self, worker: int) -> simpy.Event:
        event = self._env.event()
        self._gate[worker] = event, self._now_ns
        return event

    def _release(self, worker: int) -> None:
        event, since_ns = self._gate.pop(worker)
        self._waited_ns += self._now_ns - since_ns
        event.succeed()

    def _befall(self, worker: int) -> Process:
        """Take `worker` away and bring it back, as long as the story lasts."""
        while True:
            strike_ns, kind = self._clocks.first_of(worker)
            if strike_ns > self._spec.duration_ns:
                return
            yield self._env.timeout(strike_ns - self._now_ns)
            outage = self._spec.outages[kind]
            self._num_strikes[outage.name] += 1
            self._lives[worker] += 1
            if worker in self._gate:
                self._release(worker)
            yield self._env.timeout(outage.detection_ns)
            self._num_members -= 1
            self._num_at[self._done[worker]] -= 1
            self._raise_floor()
            yield self._env.timeout(max(0, outage.away_ns - outage.detection_ns))
            self._num_members += 1
            self._done[worker] = self._floor
            self._num_at[self._floor] += 1
            self._clocks.begin_node(worker, self._now_ns)
            self._env.process(self._work(worker))
