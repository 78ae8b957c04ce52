"""`ClusterSpec`: pools of nodes, their GPUs and links, and the fabric that joins them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import networkx as nx


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One accelerator (or one CPU core set) as its maker describes it.

    `peak_flops_per_s` is dense, per dtype; `memory_bytes` is what a process can be given.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    peak_flops_per_s: Mapping[str, float]
    max_power_watts: float
    source: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One direction of one rank's link: bytes per second and the latency of one message.

    `uses_host` says that the host's cores move the bytes (TCP sockets instead of RDMA): they are
    then missing where kernels are launched.
    """

    name: str
    bytes_per_s: float
    latency_ns: int
    source: str
    date: str
    uses_host: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """Equal nodes: `num_nodes` of `gpus_per_node` GPUs, joined inside a node by `intra_node`."""

    gpu: GpuSpec
    gpus_per_node: int
    num_nodes: int
    intra_node: LinkSpec

    @property
    def num_gpus(self) -> int:
        """GPUs in the pool."""
        return self.gpus_per_node * self.num_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Pools of nodes joined by one fabric; `inter_node` is the rate of one GPU's NIC share.

    Ranks are counted pool by pool, node by node. A cluster of one node has no `inter_node`.
    `local_device` is empty unless the cluster is this very machine: then it says what its ranks
    compute on.
    """

    name: str
    pools: tuple[PoolSpec, ...]
    inter_node: LinkSpec | None = None
    local_device: Literal["", "cpu", "cuda"] = ""

    def __post_init__(self) -> None:
        if not self.pools:
            raise ValueError("cluster.pools is empty; it must name at least one pool")
        if self.inter_node is None and sum(pool.num_nodes for pool in self.pools) > 1:
            raise ValueError("cluster.fabric is missing; several nodes need one")

    @property
    def is_local(self) -> bool:
        """Whether the cluster is this machine."""
        return self.local_device != ""

    @property
    def num_ranks(self) -> int:
        """GPUs (ranks) of the whole cluster."""
        return sum(pool.num_gpus for pool in self.pools)

    def fabric(self) -> "nx.Graph[int | str]":
        """Return the fabric as a graph: rank nodes 0..n-1, a switch per node, one spine.

        Edges carry `link`, the `LinkSpec` crossed. The path between two ranks is unique, so the
        tiers that a message crosses are the links on it.
        """
        graph: nx.Graph[int | str] = nx.Graph()
        rank = node = 0
        for pool in self.pools:
            for _ in range(pool.num_nodes):
                for _ in range(pool.gpus_per_node):
                    graph.add_edge(rank, f"node{node}", link=pool.intra_node)
                    rank += 1
                if self.inter_node is not None:
                    graph.add_edge(f"node{node}", "spine", link=self.inter_node)
                node += 1
        return graph
