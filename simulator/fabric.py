"""The fabric: which links join the ranks, and which of them a message from one to another crosses.

A fabric is drawn as a graph of ranks (whole numbers) and switches (names). An edge carries the
`bytes_per_s` of one direction and becomes two links, one each way. An edge without it never limits
anyone and becomes none, such as the slot between a GPU and a NIC of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING

from simulator.graph import Crossing
from simulator.network import Link

if TYPE_CHECKING:
    import networkx as nx  # a fifth of a second that only drawing a fabric is worth

Node = int | str

MAX_FABRIC_RANKS = 1 << 17
"""More ranks are folded: equal ones are simulated once, with a weight."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fabric:
    """`links` for `simulate`, and the way between any two ranks over them; made by `fabric`.

    `ways[node]` has the nodes beside it, each with the place in `links` of the link that goes
    there, or -1 where nothing limits.
    """

    links: tuple[Link, ...]
    ways: Mapping[Node, Mapping[Node, int]]

    def path(self, source_rank: int, target_rank: int, weight: int = 1) -> tuple[Crossing, ...]:
        """Return the links that a message crosses; `weight` equal messages cross them together.

        It takes the fewest hops; of several such ways, hop by hop, the one that the fabric's graph
        lists first. From a rank to itself it crosses nothing.

        Raises ValueError for a rank that is not there, and for two that nothing joins.
        """
        for rank in (source_rank, target_rank):
            if rank not in self.ways:
                known = [node for node in self.ways if isinstance(node, int)]
                raise ValueError(
                    f"rank {rank} is not in the fabric; "
                    f"its {len(known)} ranks go from {min(known)} to {max(known)}"
                )
        hops = _hops_to(self, target_rank)
        if source_rank not in hops:
            raise ValueError(
                f"nothing joins rank {source_rank} to rank {target_rank}; "
                "add the switch or the link between them to the fabric"
            )
        node: Node = source_rank
        crossings = []
        for left in range(hops[source_rank] - 1, -1, -1):
            node, place = next(way for way in self.ways[node].items() if hops[way[0]] == left)
            if place >= 0:
                crossings.append(Crossing(place, weight))
        return tuple(crossings)


@lru_cache(maxsize=64)
def _hops_to(fabric: Fabric, target_rank: int) -> dict[Node, int]:
    """Return how many hops each node that anything joins to `target_rank` is away from it."""
    hops: dict[Node, int] = {target_rank: 0}
    nearest: list[Node] = [target_rank]
    for node in nearest:  # grows while it is read: a search in breadth
        for other in fabric.ways[node]:
            if other not in hops:
                hops[other] = hops[node] + 1
                nearest.append(other)
    return hops


def fabric(graph: "nx.Graph[Node]") -> Fabric:
    """Return the fabric that `graph` draws; its links are in the order of the graph's edges.

    Raises ValueError for a graph without a rank, for one with directed or parallel edges, and for
    a rate that no link can have, which it names.

    >>> import networkx as nx
    >>> pair = fabric(nx.Graph([(0, "switch", {"bytes_per_s": 2e9}), (1, "switch", {})]))
    >>> [link.name for link in pair.links], pair.path(1, 0)
    (['rank 0 to switch', 'switch to rank 0'], (Crossing(link=1, weight=1),))
    """
    if graph.is_directed() or graph.is_multigraph():
        raise ValueError("a fabric's graph has one edge, for both directions, between two nodes")
    if not any(isinstance(node, int) for node in graph):
        raise ValueError("the fabric has no rank; ranks are the nodes that are whole numbers")
    ways: dict[Node, dict[Node, int]] = {
        node: dict.fromkeys(others, -1) for node, others in graph.adjacency()
    }
    links: list[Link] = []
    for one, other, attributes in graph.edges(data=True):
        if "bytes_per_s" in attributes:
            for source, target in ((one, other), (other, one)):
                ways[source][target] = len(links)
                name = f"{_name(source)} to {_name(target)}"
                links.append(Link(name=name, bytes_per_s=float(attributes["bytes_per_s"])))
    return Fabric(links=tuple(links), ways=ways)


def _name(node: Node) -> str:
    return f"rank {node}" if isinstance(node, int) else node


def star(bytes_per_s: Sequence[float]) -> Fabric:
    """Return ranks that one switch joins without limits of its own; `bytes_per_s` has a NIC each.

    >>> [link.name for link in star([1e9, 2e9]).links][:2]
    ['rank 0 to switch', 'switch to rank 0']
    """
    import networkx as nx

    edges = [(rank, "switch", {"bytes_per_s": rate}) for rank, rate in enumerate(bytes_per_s)]
    return fabric(nx.Graph(edges))


def clos(
    *,
    num_nodes: int,
    gpus_per_node: int,
    nics_per_node: int,
    gpu_bytes_per_s: float,
    nic_bytes_per_s: float,
    nodes_per_leaf: int,
    oversubscription: float = 1.0,
) -> Fabric:
    """Return a two-tier fabric with a rail for each NIC of a node.

    The GPUs of a node share a switch, each at `gpu_bytes_per_s`. NIC r of `nodes_per_leaf` nodes
    joins one leaf switch, and all leaves join a spine, over uplinks that carry what their NICs
    carry, divided by `oversubscription`. GPUs of a node share its NICs out evenly, in order.

    A message to another rail of the same leaves' nodes goes to the GPU of that rail inside its own
    node first, and so stays off the spine, as NCCL's PXN does; see NVIDIA, "Doubling all2all
    Performance with NVIDIA Collective Communication Library 2.12" (2022).

    >>> small = clos(num_nodes=2, gpus_per_node=2, nics_per_node=2, gpu_bytes_per_s=450e9,
    ...              nic_bytes_per_s=50e9, nodes_per_leaf=2)
    >>> [small.links[crossing.link].name for crossing in small.path(0, 3)]
    ['rank 0 to node 0', 'node 0 to rank 1', 'nic 0.1 to leaf 0.1', 'leaf 0.1 to nic 1.1']
    """
    _check_counts(num_nodes, gpus_per_node, nics_per_node, nodes_per_leaf)
    if not (isfinite(oversubscription) and oversubscription > 0):
        raise ValueError(f"oversubscription is {oversubscription}; it must be above 0")
    import networkx as nx

    graph: nx.Graph[Node] = nx.Graph()
    for node in range(num_nodes):
        gpus = range(gpus_per_node)
        # The node's switch is listed before the NIC: messages that may take either stay inside.
        for gpu in gpus:
            graph.add_edge(node * gpus_per_node + gpu, f"node {node}", bytes_per_s=gpu_bytes_per_s)
        for gpu in gpus:
            nic = gpu * nics_per_node // gpus_per_node
            graph.add_edge(node * gpus_per_node + gpu, f"nic {node}.{nic}")
        for nic in range(nics_per_node):
            leaf = f"leaf {node // nodes_per_leaf}.{nic}"
            graph.add_edge(f"nic {node}.{nic}", leaf, bytes_per_s=nic_bytes_per_s)
    uplink_bytes_per_s = nodes_per_leaf * nic_bytes_per_s / oversubscription
    for group in range(-(-num_nodes // nodes_per_leaf)):
        for nic in range(nics_per_node):
            graph.add_edge(f"leaf {group}.{nic}", "spine", bytes_per_s=uplink_bytes_per_s)
    return fabric(graph)


def _check_counts(
    num_nodes: int, gpus_per_node: int, nics_per_node: int, nodes_per_leaf: int
) -> None:
    for name, count in (
        ("num_nodes", num_nodes), ("gpus_per_node", gpus_per_node),
        ("nics_per_node", nics_per_node), ("nodes_per_leaf", nodes_per_leaf),
    ):  # fmt: skip
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")
    if gpus_per_node % nics_per_node:
        raise ValueError(
            f"{gpus_per_node} GPUs cannot share {nics_per_node} NICs evenly; nics_per_node must "
            "divide gpus_per_node"
        )
    if num_nodes * gpus_per_node > MAX_FABRIC_RANKS:
        raise ValueError(
            f"a fabric of {num_nodes * gpus_per_node} ranks is above {MAX_FABRIC_RANKS}; "
            "fold equal ranks, with weights"
        )
