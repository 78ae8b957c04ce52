"""How the devices of a machine are wired: a graph of GPUs, NICs, NUMA nodes and nodes.

`profiles.topology` reads it from the operating system and `nvidia-smi`; nothing here was timed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx

NETWORK = "network"
# How the label of a NIC ends that has no link.
DOWN = "down"


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricNode:
    """One vertex: `kind` is `gpu`, `cpu`, `numa`, `nic` or `node`; `name` is unique."""

    name: str
    kind: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricLink:
    """One edge between two vertices by name; `kind` in the words of its source (NV18, PIX, SYS)."""

    first: str
    second: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """The vertices and edges, both sorted."""

    nodes: tuple[FabricNode, ...] = ()
    links: tuple[FabricLink, ...] = ()


def graph(fabric: Fabric) -> "nx.Graph[str]":
    """Return `fabric` as a graph whose vertices have `kind` and `label`, and whose edges `kind`.

    >>> ends = tuple(FabricNode(name=name, kind="gpu", label=name) for name in ("gpu0", "gpu1"))
    >>> link = FabricLink(first="gpu0", second="gpu1", kind="NV18")
    >>> graph(Fabric(nodes=ends, links=(link,))).edges["gpu0", "gpu1"]
    {'kind': 'NV18'}
    """
    import networkx as nx

    drawn: nx.Graph[str] = nx.Graph()
    for node in fabric.nodes:
        drawn.add_node(node.name, kind=node.kind, label=node.label)
    for link in fabric.links:
        drawn.add_edge(link.first, link.second, kind=link.kind)
    return drawn


def merged(fabrics: Sequence[Fabric]) -> Fabric:
    """Return the fabrics of several nodes as one, joined where their NICs meet in a network.

    The network is one vertex, since nothing here tells its switches; a node without a NIC that is
    up meets it itself. Raises ValueError if two fabrics have a vertex of one name.

    >>> one, two = (Fabric(nodes=(FabricNode(name=n, kind="node", label=n),)) for n in "ab")
    >>> [(link.first, link.second, link.kind) for link in merged([one, two]).links]
    [('a', 'network', 'network'), ('b', 'network', 'network')]
    """
    if len(fabrics) == 1:
        return fabrics[0]
    nodes = sorted((node for fabric in fabrics for node in fabric.nodes), key=attrgetter("name"))
    for node, following in pairwise(nodes):
        if node.name == following.name:
            raise ValueError(f"two fabrics have a vertex {node.name}; give each node its own name")
    ports = []
    for fabric in fabrics:
        nics = [n for n in fabric.nodes if n.kind == "nic" and not n.label.endswith(DOWN)]
        ports += nics or [n for n in fabric.nodes if n.kind == "node"]
    links = [link for fabric in fabrics for link in fabric.links]
    links += [FabricLink(first=port.name, second=NETWORK, kind="network") for port in ports]
    if nodes:
        nodes.append(FabricNode(name=NETWORK, kind="node", label="network"))
    return ordered(nodes, links)


def ordered(nodes: Iterable[FabricNode], links: Iterable[FabricLink]) -> Fabric:
    """Return the fabric of these vertices and edges, sorted."""
    return Fabric(
        nodes=tuple(sorted(nodes, key=attrgetter("name"))),
        links=tuple(sorted(links, key=attrgetter("first", "second", "kind"))),
    )
