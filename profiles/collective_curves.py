"""Collective times on clusters that are not at hand, from published measurements.

Inside a node a time is read from the measured curve of its link, kind and number of ranks. Between
nodes it is what the slower of the two tiers needs for the bytes, and the steps of a ring or the
hops of a tree on top. The equations, their sources and errors are in docs/reference.md.
"""

import math
import tomllib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any, NamedTuple

from profiles.cluster import LinkSpec
from profiles.kernel_curves import Estimate
from profiles.lookup import ring_traffic

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")

# Groups of one node in which NVLink 4 and later reduce in the switch (NVLS), by what was measured.
_NVLS_LINKS = ("nvlink4", "nvlink5")
_NVLS_RANKS = 8
# Where the switch does not reduce, a tree moves bytes inside a node at most at this share of the
# ring's rate: over two nodes of A100, 188 of 235 GB/s, microsoft/mscclpp@85e664c2.
_TREE_SHARE = 0.8
# The latency in ns that the wires of all measured fabrics are given (profiles/data/clusters.toml).
_MEASURED_LATENCY_NS = 14_000


class Group(NamedTuple):
    """Where the members of a collective sit: `size` ranks, `per_node` on each node they touch.

    `per_pod` is how many ranks a pod of the fabric has for each such group that leaves it: the
    members in a pod, where all pods have as many. Infinite: no group leaves its pod.
    """

    size: int
    per_node: int
    per_pod: float = math.inf


@dataclass(frozen=True, slots=True)
class _Curve:
    """Times in ns at sizes, all as logarithms, and what each byte beyond the last size costs."""

    log_sizes: tuple[float, ...]
    log_times: tuple[float, ...]
    ns_per_byte: float

    def at(self, size_bytes: float) -> float:
        """Return the time: the first below the first size, log-log between, a line beyond."""
        place = math.log(size_bytes)
        high = bisect_right(self.log_sizes, place)
        if high == 0:
            return math.exp(self.log_times[0])
        if high == len(self.log_sizes):
            more_bytes = size_bytes - math.exp(self.log_sizes[-1])
            return math.exp(self.log_times[-1]) + self.ns_per_byte * max(0.0, more_bytes)
        start, end = self.log_sizes[high - 1], self.log_sizes[high]
        left, right = self.log_times[high - 1], self.log_times[high]
        return math.exp(left + (right - left) * (place - start) / (end - start))


def _curve(sizes_bytes: Sequence[int], times_us: Sequence[float], *, grows: bool) -> _Curve:
    """Return the curve; one that grows goes on as its last segment does."""
    slope = 1e3 * (times_us[-1] - times_us[-2]) / (sizes_bytes[-1] - sizes_bytes[-2])
    return _Curve(
        log_sizes=tuple(map(math.log, sizes_bytes)),
        log_times=tuple(math.log(1e3 * time) for time in times_us),
        ns_per_byte=slope if grows else 0.0,
    )


@dataclass(frozen=True, slots=True)
class _Relative:
    """Whose curves a link without its own takes, at which share of that link's use of the wire.

    In a mesh of `mesh` members a group of n has (n - 1) / (mesh - 1) of the links; 0: a switch.
    """

    of: str
    share: float
    mesh: int


@dataclass(frozen=True, slots=True)
class _Family:
    """Fabrics that behave alike: the share of the wire rate, ring steps and a tree's hops."""

    efficiency: float
    step_ns: float
    hops: _Curve
    most_nodes: int
    kinds: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Data:
    """profiles/data/collectives.toml, made ready."""

    curves: Mapping[tuple[str, str], Mapping[int, _Curve]]
    relatives: Mapping[str, _Relative]
    families: Mapping[str, _Family]
    fabrics: Mapping[str, tuple[str, bool]]
    inside_step_ns: float
    all_to_all_share: float
    all_to_all_post_ns: float
    send_recv_share: float
    used_nics: float


@cache
def _data() -> _Data:
    text = resources.files("profiles").joinpath("data", "collectives.toml").read_text("utf-8")
    tables: Mapping[str, Any] = tomllib.loads(text)
    curves: dict[tuple[str, str], dict[int, _Curve]] = {}
    for table in tables["curves"]:
        times = table["times_us"]
        sizes = [table["smallest_bytes"] << place for place in range(len(times))]
        found = curves.setdefault((table["link"], table["kind"]), {})
        found[table["ranks"]] = _curve(sizes, times, grows=True)
    messages = tables["messages"]
    return _Data(
        curves=curves,
        relatives={
            table["link"]: _Relative(table["of"], table["share"], table["mesh"])
            for table in tables["relatives"]
        },
        families={name: _family(table) for name, table in tables["families"].items()},
        fabrics={
            name: (table["family"], table["is_measured"])
            for name, table in tables["fabrics"].items()
        },
        inside_step_ns=1e3 * tables["inside"]["step_us"],
        all_to_all_share=messages["all_to_all_share"],
        all_to_all_post_ns=1e3 * messages["all_to_all_post_us"],
        send_recv_share=messages["send_recv_share"],
        used_nics=messages["used_nics"],
    )


def _family(table: Mapping[str, Any]) -> _Family:
    return _Family(
        efficiency=table["efficiency"],
        step_ns=1e3 * table["step_us"],
        hops=_curve(table["sizes_bytes"], table["hops_us"], grows=False),
        most_nodes=table["most_nodes"],
        kinds=frozenset(table["kinds"]),
    )


# The wire rate of one GPU one way that a measured link's curves stand for, in bytes per second.
_WIRES = {
    "nvlink2": 150e9,
    "nvlink3": 300e9,
    "nvlink4": 450e9,
    "nvlink5": 900e9,
}


def _traffic(kind: str, ranks: int) -> float:
    """Return how often the buffer passes a rank's link; an all-to-all keeps 1 / n of it."""
    return ring_traffic("all_gather" if kind == "all_to_all" else kind, ranks)


def _curves_of(kind: str, ranks: int, link: LinkSpec) -> tuple[Mapping[int, _Curve], float, bool]:
    """Return curves by ranks, the factor on sizes before they are looked up, and if they are kin.

    A link without curves takes its relative's (unknown names: those of the nearest rate), at
    sizes as many times larger as its wire is slower, and so does one with curves that is given
    another rate; a kind without curves takes the all-reduce, by the ratio of the rings' traffic.
    """
    data = _data()
    name = link.name
    if name in _WIRES:
        factor = _WIRES[name] / link.bytes_per_s
        is_kin = factor != 1.0
    else:
        relative = data.relatives.get(name)
        if relative is None:
            rate = link.bytes_per_s
            near = min(_WIRES, key=lambda known: abs(math.log(_WIRES[known] / rate)))
            relative = _Relative(near, 1.0, 0)
        name, is_kin = relative.of, True
        factor = _WIRES[name] / (relative.share * link.bytes_per_s)
        if relative.mesh:
            factor *= max(1.0, (relative.mesh - 1) / (ranks - 1))
    found = data.curves.get((name, kind))
    if found is not None:
        return found, factor, is_kin
    factor *= _traffic(kind, ranks) / _traffic("all_reduce", ranks)
    return data.curves[name, "all_reduce"], factor, True


def _inside(kind: str, ranks: int, size_bytes: float, link: LinkSpec) -> Estimate:
    """Return the time in a node: measured for 2, 4 and 8 ranks, log-log between these.

    A message is half of an all-to-all of two ranks. Below the smallest measured group and beyond
    the largest the bytes follow the ring's traffic; beyond it each further rank adds its steps,
    and an all-reduce costs at most what a tree, which grows as log2(ranks), would.
    """
    if kind == "send_recv":
        return Estimate(_inside("all_to_all", 2, 2.0 * size_bytes, link).ns, True)
    curves, factor, is_kin = _curves_of(kind, ranks, link)
    size = factor * size_bytes
    if ranks in curves:
        return Estimate(curves[ranks].at(size), is_kin)
    least, most = min(curves), max(curves)
    if ranks < least:
        ratio = _traffic(kind, ranks) / _traffic(kind, least)
        return Estimate(curves[least].at(ratio * size), True)
    if ranks < most:
        low = max(known for known in curves if known < ranks)
        high = min(known for known in curves if known > ranks)
        part = math.log(ranks / low) / math.log(high / low)
        left, right = curves[low].at(size), curves[high].at(size)
        return Estimate(left * (right / left) ** part, True)
    base = curves[most].at(size)
    num_steps = (2 if kind == "all_reduce" else 1) * (ranks - most)
    time = base * _traffic(kind, ranks) / _traffic(kind, most)
    time += num_steps * _data().inside_step_ns
    if kind == "all_reduce":
        time = min(time, base * math.log2(ranks) / math.log2(most))
    return Estimate(time, True)


@dataclass(frozen=True, slots=True)
class _Wire:
    """One rank's NIC share on a fabric: its family, how much slower its hops are, its rate.

    The uplinks of a pod carry the NIC shares of its ranks, divided by `oversubscription`.
    """

    family: _Family
    slowness: float
    bytes_per_s: float
    is_measured: bool
    oversubscription: float


@lru_cache(maxsize=256)
def _wire(fabric: LinkSpec, oversubscription: float) -> _Wire:
    """Return how `fabric` is used; one of an unknown name is InfiniBand, slower by its latency."""
    data = _data()
    family, is_measured = data.fabrics.get(fabric.name, ("infiniband", False))
    is_known = fabric.name in data.fabrics
    return _Wire(
        family=data.families[family],
        slowness=1.0 if is_known else fabric.latency_ns / _MEASURED_LATENCY_NS,
        bytes_per_s=fabric.bytes_per_s,
        is_measured=is_measured,
        oversubscription=oversubscription,
    )


def _carried(kind: str, group: Group, passes: float, size: float, link: LinkSpec) -> Estimate:
    """Return what a node needs to pass the buffer `passes` times through each member's link.

    A member that is alone on its node counts as two: its bytes go to the NIC over a link too.
    """
    ranks = max(2, group.per_node)
    time = _inside(kind, ranks, passes / _traffic(kind, ranks) * size, link)
    return time if group.per_node > 1 else Estimate(time.ns)


def _wire_ns(group: Group, passes: float, size: float, wire: _Wire) -> float:
    """Return the time to pass the buffer `passes` times through the NIC shares of a group."""
    rate = wire.family.efficiency * wire.bytes_per_s * min(group.per_node, _data().used_nics)
    return 1e9 * passes * size / rate


def _uplink_ns(group: Group, passes: float, size: float, wire: _Wire) -> float:
    """Return the time to pass the buffer `passes` times over a pod's uplinks, all groups at once.

    Of P ranks of a pod each has a NIC share of rate r, and the uplinks carry P r / o; o is the
    oversubscription. A ring in the order of the ranks enters and leaves a pod once, and so passes
    the uplinks as often as a NIC, however many members k it has there; a tree of pods no oftener.
    The P / k groups share the uplinks, k / o shares of a NIC each: t = passes * size * o / (k r).
    With g members a node a group has g NICs, and so loses nothing from k = g o on.
    """
    rate = wire.family.efficiency * wire.bytes_per_s * group.per_pod / wire.oversubscription
    return 1e9 * passes * size / rate


def _ring(kind: str, group: Group, size: float, intra: LinkSpec, wire: _Wire) -> Estimate:
    """Return the time of rings through all members: the slower tier's bytes, then the steps.

    With N nodes, g members on each and n in all, a round is N steps between nodes and n - N
    inside, of which the time inside a node has g - 1; an all-reduce goes round twice.
    """
    n, g, _ = group
    num_nodes = math.ceil(n / g)
    passes = ring_traffic(kind, n)
    inside = _carried(kind, group, passes, size, intra)
    step_ns = wire.slowness * min(wire.family.step_ns, wire.family.hops.at(size))
    round_ns = num_nodes * step_ns + max(0, n - num_nodes - (g - 1)) * _data().inside_step_ns
    num_rounds = 2 if kind == "all_reduce" else 1
    wire_ns = max(_wire_ns(group, passes, size, wire), _uplink_ns(group, passes, size, wire))
    bytes_ns = max(inside.ns, wire_ns)
    return Estimate(bytes_ns + num_rounds * round_ns, inside.is_extrapolated)


def _tree_ns(group: Group, size: float, intra: LinkSpec, wire: _Wire) -> float:
    """Return the time of an all-reduce by trees: bytes, and 2 log2(nodes) hops.

    With more than two nodes the inner nodes of a tree pass as many bytes as a ring does. With two
    each of the two trees sends half of the buffer up and half down a NIC once: S where the ring
    passes 2 (n - 1) / n of S. So it is with pods and their uplinks.
    """
    n, g, per_pod = group
    num_nodes = math.ceil(n / g)
    passes = ring_traffic("all_reduce", n)
    inside_passes = ring_traffic("all_reduce", max(2, g)) if num_nodes == 2 else passes
    if g != _NVLS_RANKS or intra.name not in _NVLS_LINKS:
        inside_passes /= _TREE_SHARE
    inside = _carried("all_reduce", group, inside_passes, size, intra)
    wire_ns = _wire_ns(group, 1.0 if num_nodes == 2 else passes, size, wire)
    wire_ns = max(wire_ns, _uplink_ns(group, 1.0 if 2 * per_pod >= n else passes, size, wire))
    hop_ns = wire.slowness * wire.family.hops.at(size)
    return max(inside.ns, wire_ns) + 2 * math.log2(num_nodes) * hop_ns


def _all_to_all(group: Group, size: float, intra: LinkSpec, wire: _Wire) -> Estimate:
    """Return the time of an all-to-all: each member's remote part over its own NIC share.

    The remote part passes the link in the node too, on its way to the NIC (PXN). Each remote
    member costs one post, and the last message one hop. Over the uplinks of a pod k members send
    (n - k) / n of their buffers each; where groups are cut unevenly, at most what two halves do.
    """
    n, g, per_pod = group
    data = _data()
    wire_ns = 1e9 * (n - g) / n * size / (data.all_to_all_share * wire.bytes_per_s)
    leaving = min(per_pod, n / 2)
    wire_ns = max(wire_ns, _uplink_ns(group, leaving * (n - leaving) / n, size, wire))
    inside = _carried("all_to_all", group, _traffic("all_to_all", n), size, intra)
    late_ns = wire.family.hops.at(1.0) + (n - g) * data.all_to_all_post_ns
    return Estimate(max(inside.ns, wire_ns) + wire.slowness * late_ns, inside.is_extrapolated)


def _across(kind: str, group: Group, size: float, intra: LinkSpec, wire: _Wire) -> Estimate:
    """Return the time between nodes, marked where the fabric, kind or number of nodes is new."""
    is_new = not wire.is_measured or kind not in wire.family.kinds or group.per_pod < math.inf
    is_new = is_new or math.ceil(group.size / group.per_node) > wire.family.most_nodes
    if kind == "send_recv":
        rate = _data().send_recv_share * wire.bytes_per_s
        wire_ns = max(1e9 * size / rate, _uplink_ns(group, 1.0, size, wire))
        return Estimate(wire_ns + wire.slowness * wire.family.hops.at(1.0), is_new)
    if kind == "all_to_all":
        time = _all_to_all(group, size, intra, wire)
    else:
        time = _ring(kind, group, size, intra, wire)
        if kind == "all_reduce":
            tree_ns = _tree_ns(group, size, intra, wire)
            time = Estimate(min(time.ns, tree_ns), time.is_extrapolated)
    return Estimate(time.ns, time.is_extrapolated or is_new)


@lru_cache(maxsize=65536)
def collective(
    kind: str, group: Group, size_bytes: int, intra: LinkSpec, inter: LinkSpec | None,
    oversubscription: float = 1.0,
) -> Estimate:  # fmt: skip
    """Return the time of one collective over the full buffer `size_bytes` (`profiles.profile`).

    Kinds: all_reduce, all_gather, reduce_scatter, all_to_all, send_recv (a group of two). Every
    rank of a node takes part in such a collective at the same time, each group in its own: `inter`
    is what one rank's share of the NICs gives, and a group has `per_node` of them. Crossing nodes
    is never faster than staying inside with as many ranks, up to eight. On the uplinks of a pod a
    group that leaves it has `per_pod` / `oversubscription` such shares.

    >>> from profiles.presets import fabric_preset, link_preset
    >>> links = link_preset("nvlink4"), fabric_preset("ndr400")
    >>> inside = collective("all_gather", Group(8, 8), 1 << 29, *links)
    >>> round(inside.ns / 1e3), inside.is_extrapolated
    (1398, False)
    >>> collective("all_gather", Group(8, 1), 1 << 29, *links).ns > 5 * inside.ns
    True
    >>> one, four = (collective("all_gather", Group(8, 1, k), 1 << 29, *links, 7) for k in (1, 4))
    >>> round(one.ns / four.ns, 1)
    4.0
    """
    if kind not in KINDS:
        raise ValueError(f'the collective is "{kind}"; it must be one of {", ".join(KINDS)}')
    if group.size == 1 or size_bytes == 0:
        return Estimate(0.0)
    if group.size <= group.per_node:
        return _inside(kind, group.size, size_bytes, intra)
    if inter is None:
        raise ValueError(
            f"a group of {group.size} ranks with {group.per_node} on a node crosses nodes, but the "
            "cluster has no fabric; name one"
        )
    crossed = _across(kind, group, size_bytes, intra, _wire(inter, oversubscription))
    if group.size > _NVLS_RANKS:
        return crossed
    inside = _inside(kind, group.size, size_bytes, intra)
    return Estimate(max(crossed.ns, inside.ns), crossed.is_extrapolated)
