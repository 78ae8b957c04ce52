"""Collective times on clusters that are not at hand, from published measurements."""

from functools import lru_cache
from typing import NamedTuple

from profiles.cluster import LinkSpec
from profiles.kernel_curves import Estimate
from profiles.lookup import ring_traffic


class Group(NamedTuple):
    """Where the members of a collective sit: `size` ranks, `per_node` on each node they touch."""

    size: int
    per_node: int


@lru_cache(maxsize=65536)
def collective(
    kind: str, group: Group, size_bytes: int, intra: LinkSpec, inter: LinkSpec | None
) -> Estimate:
    """Return the time of one collective over the full buffer `size_bytes` (`profiles.profile`).

    Kinds: all_reduce, all_gather, reduce_scatter, all_to_all, send_recv (a group of two). Every
    rank of a node takes part in such a collective at the same time, each group in its own: `inter`
    is what one rank's share of the NICs gives, and a group has `per_node` of them.
    """
    if group.size == 1 or size_bytes == 0:
        return Estimate(0.0)
    traffic = ring_traffic(kind if kind != "all_to_all" else "all_gather", group.size)
    crosses = group.size > group.per_node
    rate = intra.bytes_per_s * 0.8
    latency = intra.latency_ns
    if crosses:
        assert inter is not None
        rate = min(rate, inter.bytes_per_s * group.per_node * 0.85)
        latency = inter.latency_ns
    return Estimate(20_000 + latency * group.size**0.5 + 1e9 * traffic * size_bytes / rate)
