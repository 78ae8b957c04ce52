"""What ops share beside their streams: links with a capacity, and what changes while they run."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from simulator.graph import TaskGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction of a link, a NIC, or a switch's uplink: `bytes_per_s` shared by its flows."""

    name: str
    bytes_per_s: float

    def __post_init__(self) -> None:
        _check_rate(f"link {self.name}", self.bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityChange:
    """From `at_ns` on link `link` (its place among the links) carries `bytes_per_s`; 0: outage."""

    at_ns: int
    link: int
    bytes_per_s: float

    def __post_init__(self) -> None:
        _check_moment(self.at_ns)
        if self.bytes_per_s != 0:
            _check_rate(f"link {self.link} from {self.at_ns} ns on", self.bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedChange:
    """From `at_ns` on rank `rank` works at `speed` times its usual speed; 0: it stands still.

    It holds for the ops of the rank that cross no link, also for those under way.
    """

    at_ns: int
    rank: int
    speed: float

    def __post_init__(self) -> None:
        _check_moment(self.at_ns)
        if not (isfinite(self.speed) and 0 <= self.speed <= 1e6):
            raise ValueError(f"rank {self.rank} gets speed {self.speed}; it must be from 0 to 1e6")


Change = CapacityChange | SpeedChange


def check_network(graph: TaskGraph, links: Sequence[Link], changes: Sequence[Change]) -> None:
    """Raise ValueError for a path or a change that names no link, or no rank of `graph`."""
    ranks = {stream.rank for stream in graph.streams}
    for path in graph.paths:
        for crossing in path:
            if crossing.link >= len(links):
                op_id = next(i for i in range(len(graph)) if graph.path[i] >= 0
                             and graph.paths[graph.path[i]] == path)  # fmt: skip
                raise ValueError(
                    f"op {graph.label(op_id)} crosses link {crossing.link}; "
                    f"there are {len(links)} links"
                )
    for change in changes:
        if isinstance(change, CapacityChange) and not 0 <= change.link < len(links):
            raise ValueError(
                f"a change at {change.at_ns} ns names link {change.link}; "
                f"there are {len(links)} links"
            )
        if isinstance(change, SpeedChange) and change.rank not in ranks:
            raise ValueError(
                f"a change at {change.at_ns} ns names rank {change.rank}, which does nothing"
            )


def _check_rate(what: str, bytes_per_s: float) -> None:
    if not (isfinite(bytes_per_s) and 1 <= bytes_per_s <= 1e18):
        raise ValueError(f"{what} carries {bytes_per_s} bytes/s; it must be from 1 to 1e18")


def _check_moment(at_ns: int) -> None:
    if type(at_ns) is not int or not 0 <= at_ns <= 1 << 56:
        raise ValueError(f"a change is set for {at_ns!r} ns; it must be a whole number >= 0")
