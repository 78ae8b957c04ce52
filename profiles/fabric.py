"""How the devices of a machine are wired: a graph of GPUs, NICs, NUMA nodes and nodes.

Read from the operating system and from `nvidia-smi topo -m`; nothing here was timed.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx


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
