"""Fit how fabrics carry published collectives: share of the wire rate, hop of a tree, ring step.

A part of `profiles.published.collectives`, which reads the measurements and writes the
result.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from profiles.lookup import ring_traffic
from profiles.presets import fabric_preset

# The smallest size in bytes and the times in us at its doublings.
Curve = tuple[int, list[float]]
Curves = Mapping[tuple[str, str, int], Curve]

# NCCL v2.30's tuner: a ring step over a network in the bulk protocol, Simple.
TUNER_STEP_US = 14.0
# Beyond it a hop drowns in the time for bytes and is not read.
_MOST_HOP_EXPONENT = 28


class Crossing(NamedTuple):
    """One published time of a collective whose group crosses nodes."""

    family: str
    system: str
    fabric: str
    link: str
    kind: str
    size: int
    per_node: int
    size_bytes: int
    time_us: float
    source: str

    @property
    def num_nodes(self) -> int:
        """Nodes that the group touches."""
        return math.ceil(self.size / self.per_node)


class Family(NamedTuple):
    """Fabrics that behave alike: share of the wire rate, ring step, and hop by message size."""

    efficiency: float
    step_us: float
    sizes_bytes: list[int]
    hops_us: list[float]
    most_nodes: int
    kinds: list[str]
    sources: list[str]


def never_falling(values: Sequence[float]) -> list[float]:
    """Return the nearest sequence that never falls: neighbours that fall share their mean.

    Source: pool adjacent violators (Ayer and others, Ann. Math. Statist. 26, 1955).

    >>> never_falling([1.0, 4.0, 2.0, 5.0])
    [1.0, 3.0, 3.0, 5.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, number = pools.pop()
            mean = (mean * count + before * number) / (count + number)
            count += number
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def wire_bytes(crossing: Crossing) -> float:
    """Return what one NIC share carries: the ring's traffic, or S in the tree of two nodes.

    The per_node shares of a node split it. Source of the tree: with two nodes each of the two
    trees sends half of S up and half down the same wire, once.
    """
    is_tree = crossing.kind == "all_reduce" and crossing.num_nodes == 2
    passes = 1.0 if is_tree else ring_traffic(crossing.kind, crossing.size)
    return passes * crossing.size_bytes / crossing.per_node


def _shares(crossings: Iterable[Crossing]) -> Iterator[tuple[int, float]]:
    """Yield (nodes, share of the wire rate) from the two largest sizes of each all-reduce."""
    runs: dict[tuple[str, int], list[Crossing]] = defaultdict(list)
    for crossing in crossings:
        if crossing.kind == "all_reduce":
            runs[crossing.system, crossing.size].append(crossing)
    for run in runs.values():
        run.sort(key=lambda crossing: crossing.size_bytes)
        if len(run) < 2 or run[-1].size_bytes < 1 << 30 or run[-1].time_us <= run[-2].time_us:
            continue
        more_bytes = wire_bytes(run[-1]) - wire_bytes(run[-2])
        rate = 1e6 * more_bytes / (run[-1].time_us - run[-2].time_us)
        yield run[-1].num_nodes, rate / fabric_preset(run[-1].fabric).bytes_per_s


def _efficiency(crossings: Sequence[Crossing]) -> float:
    """Return the median share of the wire rate, from more than two nodes where there are such."""
    found = [pair for pair in _shares(crossings) if pair[1] < 1.0]
    many = [share for nodes, share in found if nodes > 2]
    return statistics.median(many or [share for _, share in found])


def _bytes_us(crossing: Crossing, curves: Curves, efficiency: float) -> float:
    """Return the time of the slower tier for the bytes, without the steps between nodes."""
    rate = efficiency * fabric_preset(crossing.fabric).bytes_per_s
    wire_us = 1e6 * wire_bytes(crossing) / rate
    if crossing.per_node == 1:
        return wire_us
    smallest, times = curves[crossing.link, crossing.kind, crossing.per_node]
    place = max(0, round(math.log2(crossing.size_bytes / smallest)))
    beyond = max(0, place - len(times) + 1)
    inside_us = times[min(place, len(times) - 1)] * 2.0**beyond
    if crossing.kind != "all_reduce" or crossing.num_nodes > 2:
        inside_us *= ring_traffic("all_gather", crossing.size)
        inside_us /= ring_traffic("all_gather", crossing.per_node)
    return max(wire_us, inside_us)


def _hops(crossings: Iterable[Crossing], curves: Curves, efficiency: float) -> dict[int, float]:
    """Return a hop's time by size: what is left over the bytes, over 2 log2(nodes) hops.

    The median over systems of their medians, at powers of four.
    """
    found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for crossing in crossings:
        exponent = 2 * round(math.log2(crossing.size_bytes) / 2)
        if crossing.kind == "all_reduce" and exponent <= _MOST_HOP_EXPONENT:
            left_us = crossing.time_us - _bytes_us(crossing, curves, efficiency)
            hop_us = left_us / (2 * math.log2(crossing.num_nodes))
            found[exponent][crossing.system].append(hop_us)
    medians = {
        1 << exponent: statistics.median(map(statistics.median, systems.values()))
        for exponent, systems in sorted(found.items())
    }
    return {size: hop for size, hop in medians.items() if hop > 0}


def _step_us(
    crossings: Iterable[Crossing], curves: Curves, efficiency: float, inside_step_us: float
) -> list[float]:
    """Return the ring steps between nodes that all-gathers and reduce-scatters show.

    A ring makes a step out of each node and the others inside: what is left over the bytes is
    nodes * step + (n - nodes - (g - 1)) * the step inside. More than two nodes are needed.
    """
    steps = []
    for crossing in crossings:
        nodes = crossing.num_nodes
        if crossing.kind in ("all_gather", "reduce_scatter") and nodes > 2:
            left_us = crossing.time_us - _bytes_us(crossing, curves, efficiency)
            num_inside = crossing.size - nodes - (crossing.per_node - 1)
            steps.append((left_us - num_inside * inside_step_us) / nodes)
    return steps


def fit(crossings: Sequence[Crossing], curves: Curves, inside_step_us: float) -> dict[str, Family]:
    """Return each family of fabrics as its published collectives show it.

    Where no all-gather shows the ring step it is the tuner's, or the smallest hop if that is more.
    """
    found: dict[str, list[Crossing]] = defaultdict(list)
    for crossing in crossings:
        found[crossing.family].append(crossing)
    families = {}
    for name, members in sorted(found.items()):
        share = _efficiency(members)
        hops = _hops(members, curves, share)
        steps = _step_us(members, curves, share, inside_step_us)
        hops_us = never_falling(list(hops.values()))
        families[name] = Family(
            efficiency=share,
            step_us=statistics.median(steps) if steps else max(TUNER_STEP_US, hops_us[0]),
            sizes_bytes=list(hops),
            hops_us=hops_us,
            most_nodes=max(crossing.num_nodes for crossing in members),
            kinds=sorted({crossing.kind for crossing in members}),
            sources=sorted({crossing.source for crossing in members}),
        )
    return families
