"""What befalls the nodes of a cluster, and when: outages and slow spells, drawn by a counter hash.

Chance belongs to (seed, name of the disturbance, node, occurrence) and to nothing else. Another
checkpoint interval, one more node or one more disturbance leaves all other draws as they were, so
two stories with one seed differ by what was changed and not by luck (common random numbers).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gamma, inf, isfinite
from zlib import crc32

import numpy as np

from simulator.checks import MAX_NS, Int64
from simulator.jitter import MASK, mix

HOUR_NS = 3_600_000_000_000
NEVER_NS = 1 << 60
"""Later than any story can last; two of them still add up in int64."""
DRAWN_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """A failure or a preemption: it strikes a node, and the job on it dies.

    Times between two strikes of one node are Weibull with mean 1 / `per_node_hour` and the given
    `shape`: 1 is exponential (no memory), below 1 new nodes fail more often than old ones, above 1
    nodes wear out. It takes `detection_ns` until a dead job is seen to be dead. The node then
    returns after `away_ns`, as good as new: 0 is a crash of software, which the node survives; a
    week is a repair; for spot capacity it is the time until the market gives a node back.
    With `notice_ns` the node says so long before it goes, and a death foretold needs no detection.

    >>> Outage(name="spot", per_node_hour=0.01, away_ns=HOUR_NS, notice_ns=120_000_000_000).shape
    1.0
    """

    name: str
    per_node_hour: float
    shape: float = 1.0
    detection_ns: int = 0
    away_ns: int = 0
    notice_ns: int = 0

    def __post_init__(self) -> None:
        where = f"outage {self.name}"
        _check_clock(where, self.per_node_hour, self.shape)
        for name in ("detection_ns", "away_ns", "notice_ns"):
            check_whole(f"{where}: {name}", getattr(self, name))
        if self.notice_ns and self.detection_ns:
            raise ValueError(
                f"{where}: notice_ns is {self.notice_ns} and detection_ns is {self.detection_ns}; "
                "an outage that gives notice needs no detection: set one of them to 0"
            )
        if self.notice_ns and not self.away_ns:
            raise ValueError(f"{where}: a node that gives notice goes; its away_ns must not be 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """A straggler: a node works `factor` times as long on each step, for `lasts_ns`.

    The synchronous job is as slow as its slowest node. Strikes come as those of an `Outage`; the
    next one is awaited from the end of the last. A node that is replaced takes its slowness along.
    """

    name: str
    per_node_hour: float
    factor: float
    lasts_ns: int
    shape: float = 1.0

    def __post_init__(self) -> None:
        where = f"slowdown {self.name}"
        _check_clock(where, self.per_node_hour, self.shape)
        check_whole(f"{where}: lasts_ns", self.lasts_ns, least=1)
        if not (isfinite(self.factor) and 1 <= self.factor <= 1000):
            raise ValueError(f"{where}: factor is {self.factor}; it must be from 1 to 1000")


Disturbance = Outage | Slowdown


def check_whole(what: str, value: int, *, least: int = 0, most: int = MAX_NS) -> None:
    """Raise ValueError unless `value` is a whole number from `least` to `most`.

    A NaN or a negative delay would put SimPy's events out of order without a word.

    >>> check_whole("restart_ns", 1.5)
    Traceback (most recent call last):
    ValueError: restart_ns is 1.5; it must be a whole number from 0 to 72057594037927936
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {value!r}; it must be a whole number from {least} to {most}")


def _check_clock(where: str, per_node_hour: float, shape: float) -> None:
    if not (isfinite(per_node_hour) and 0 <= per_node_hour <= 1e6):
        raise ValueError(
            f"{where}: per_node_hour is {per_node_hour}; it must be from 0 (never) to 1e6"
        )
    if not (isfinite(shape) and 0.2 <= shape <= 20):
        raise ValueError(f"{where}: shape is {shape}; it must be from 0.2 to 20 (1: exponential)")


def check_names(disturbances: Sequence[Disturbance]) -> None:
    """Raise ValueError for a name that stands twice: both would strike at the same moments."""
    names = [disturbance.name for disturbance in disturbances]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two disturbances are called {name!r}; each needs its own name")


class Clocks:
    """The next strike of each disturbance on each node, in ns: int64 [num_kinds, num_nodes].

    A gap is scale * (-ln u)^(1 / shape) with scale = 1 / (rate * Gamma(1 + 1 / shape)), the
    inverse of the Weibull distribution; u is one of 2^32 equally spaced numbers between 0 and 1.

    >>> clocks = Clocks([Outage(name="gpu", per_node_hour=0.5)], num_nodes=3, seed=1)
    >>> when_ns, kind, node = clocks.first()
    >>> clocks.begin(kind, node, when_ns) > when_ns
    True
    """

    def __init__(self, disturbances: Sequence[Disturbance], num_nodes: int, seed: int) -> None:
        names = np.array([crc32(kind.name.encode()) for kind in disturbances], np.int64)
        keys = mix(mix(np.array([seed])) ^ names)[:, None]
        self._num_nodes = num_nodes
        self._kinds = np.arange(len(names))
        self._lives = mix(keys ^ np.arange(num_nodes))
        self._scale_ns = np.array([_scale_ns(kind) for kind in disturbances])[:, None]
        self._power = np.array([1 / kind.shape for kind in disturbances])[:, None]
        self._occurrence = np.zeros((len(names), num_nodes), np.int64)
        self._gaps_ns = self._draw(0)
        self._next_ns = self._gaps_ns[0].copy()

    def first(self) -> tuple[int, int, int]:
        """Return moment, disturbance and node of the next strike; the order given breaks ties."""
        if not self._next_ns.size:
            return NEVER_NS, 0, 0
        kind, node = divmod(int(self._next_ns.argmin()), self._num_nodes)
        return int(self._next_ns[kind, node]), kind, node

    def first_of(self, node: int) -> tuple[int, int]:
        """Return moment and disturbance of the next strike on `node`."""
        if not len(self._next_ns):
            return NEVER_NS, 0
        kind = int(self._next_ns[:, node].argmin())
        return int(self._next_ns[kind, node]), kind

    def stop(self, kind: int, node: int) -> None:
        """Let `kind` leave `node` alone until it begins anew."""
        self._next_ns[kind, node] = NEVER_NS

    def stop_node(self, node: int) -> None:
        """Let everything leave `node` alone: it is gone."""
        self._next_ns[:, node] = NEVER_NS

    def begin(self, kind: int, node: int, now_ns: int) -> int:
        """Await the next strike of `kind` on `node` from now on; returns its moment."""
        return self._begin(slice(kind, kind + 1), node, now_ns)

    def begin_node(self, node: int, now_ns: int) -> int:
        """Put a node that is as good as new in place `node`; returns the moment of its first."""
        return self._begin(slice(None), node, now_ns)

    def _begin(self, kinds: slice, node: int, now_ns: int) -> int:
        occurrence = self._occurrence[kinds, node]
        occurrence += 1
        while occurrence.max() >= len(self._gaps_ns):
            self._gaps_ns = np.concatenate((self._gaps_ns, self._draw(len(self._gaps_ns))))
        moments_ns = now_ns + self._gaps_ns[occurrence, self._kinds[kinds], node]
        self._next_ns[kinds, node] = moments_ns
        return int(moments_ns.min())

    def _draw(self, first: int) -> Int64:
        """Return gaps [occurrence, kind, node] from occurrence `first` on, as many as are cheap."""
        num_drawn = max(1, DRAWN_AT_ONCE // max(1, self._lives.size))
        occurrence = np.arange(first, first + num_drawn)[:, None, None]
        place = mix(self._lives ^ occurrence)
        exponential = -np.log((place + 0.5) / (MASK + 1))
        gaps_ns: Int64 = np.rint(self._scale_ns * exponential**self._power).clip(1, NEVER_NS)
        return gaps_ns.astype(np.int64)


def _scale_ns(kind: Disturbance) -> float:
    if not kind.per_node_hour:
        return inf
    return HOUR_NS / kind.per_node_hour / gamma(1 + 1 / kind.shape)
