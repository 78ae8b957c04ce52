"""`ClusterSpec`: pools of nodes, their GPUs and links, and the fabric that joins them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
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
class HostSpec:
    """The host of a node, as far as the states of an optimizer can live there.

    `link` joins one GPU to it, at the rate of one direction. Its memory, all of it `memory_bytes`
    and `memory_bytes_per_s` at peak, is shared by the GPUs of the node.
    """

    name: str
    link: LinkSpec
    memory_bytes: int
    memory_bytes_per_s: float
    source: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """Equal nodes: `num_nodes` of `gpus_per_node` GPUs, joined inside a node by `intra_node`.

    `host` is None where nobody said what the nodes are built of.
    """

    gpu: GpuSpec
    gpus_per_node: int
    num_nodes: int
    intra_node: LinkSpec
    host: HostSpec | None = None

    @property
    def num_gpus(self) -> int:
        """GPUs in the pool."""
        return self.gpus_per_node * self.num_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What a cluster costs to run and how often it breaks; None where nobody said.

    `dollars_per_gpu_hour` is the mean over all GPUs where pools differ. `watts_per_gpu` is what one
    GPU in training draws, with its share of host, fans and fabric; `pue` is what the facility draws
    over that. `interruptions_per_gpu_day` counts all that stop the job unexpectedly, and
    `restart_ns` lasts until it trains again: found, diagnosed, replaced, loaded.

    The job stands still for a checkpoint while storage takes it at `checkpoint_bytes_per_s`, of the
    whole cluster; or for `checkpoint_stall_ns` where it is written behind the job's back.
    """

    dollars_per_gpu_hour: float | None = None
    watts_per_gpu: float | None = None
    pue: float | None = None
    interruptions_per_gpu_day: float | None = None
    restart_ns: int | None = None
    checkpoint_bytes_per_s: float | None = None
    checkpoint_stall_ns: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UplinkSpec:
    """The layer of a fabric over its pods, each of `pod_nodes` nodes that are joined at full rate.

    The uplinks of a pod carry what the NICs of its nodes do, divided by `oversubscription`, and
    all traffic of the pod shares them.
    """

    pod_nodes: int
    oversubscription: float
    source: str
    date: str

    def __post_init__(self) -> None:
        if self.pod_nodes < 1:
            raise ValueError(f"uplinks.pod_nodes is {self.pod_nodes}; it must be at least 1")
        if not (isfinite(self.oversubscription) and self.oversubscription >= 1):
            raise ValueError(
                f"uplinks.oversubscription is {self.oversubscription}; it must be at least 1"
            )

    def share(self, nic: LinkSpec) -> LinkSpec:
        """Return what one GPU has of the uplinks where all of its pod use them, of its `nic`.

        >>> nic = LinkSpec(name="nic", bytes_per_s=50e9, latency_ns=0, source="-", date="-")
        >>> uplinks = UplinkSpec(pod_nodes=4, oversubscription=4.0, source="-", date="-")
        >>> uplinks.share(nic).bytes_per_s
        12500000000.0
        """
        return replace(
            nic,
            name=f"{nic.name}-uplink",
            bytes_per_s=nic.bytes_per_s / self.oversubscription,
            source=self.source,
            date=self.date,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Pools of nodes joined by one fabric; `inter_node` is the rate of one GPU's NIC share.

    Ranks are counted pool by pool, node by node; where the fabric has `uplinks`, nodes fill one pod
    after the other. A cluster of one node has no `inter_node`. `local_device` is empty unless the
    cluster is this very machine: then it says what its ranks compute on.
    """

    name: str
    pools: tuple[PoolSpec, ...]
    inter_node: LinkSpec | None = None
    uplinks: UplinkSpec | None = None
    local_device: Literal["", "cpu", "cuda"] = ""
    operation: Operation = Operation()

    def __post_init__(self) -> None:
        if not self.pools:
            raise ValueError("cluster.pools is empty; it must name at least one pool")
        if self.inter_node is None and self.num_nodes > 1:
            raise ValueError("cluster.fabric is missing; several nodes need one")

    @property
    def is_local(self) -> bool:
        """Whether the cluster is this machine."""
        return self.local_device != ""

    @property
    def num_nodes(self) -> int:
        """Nodes of the whole cluster."""
        return sum(pool.num_nodes for pool in self.pools)

    @property
    def num_ranks(self) -> int:
        """GPUs (ranks) of the whole cluster."""
        return sum(pool.num_gpus for pool in self.pools)

    @property
    def host_bytes_per_gpu(self) -> int:
        """Host memory for each GPU where it is scarcest; 0 where nobody said what hosts there are.

        >>> from profiles.presets import cluster_preset
        >>> cluster_preset("h100-sxm").host_bytes_per_gpu
        250000000000
        """
        return min(
            0 if pool.host is None else pool.host.memory_bytes // pool.gpus_per_node
            for pool in self.pools
        )

    def fabric(self) -> "nx.Graph[int | str]":
        """Return the fabric as a graph: rank nodes 0..n-1, a switch per node, one spine.

        Where there is more than one pod, each has a switch between its nodes and the spine. Edges
        carry `link`, the `LinkSpec` crossed, at the rate of one GPU's share. The path between two
        ranks is unique, so the tiers that a message crosses are the links on it.
        """
        graph: nx.Graph[int | str] = nx.Graph()
        rank = node = 0
        for pool in self.pools:
            for _ in range(pool.num_nodes):
                for _ in range(pool.gpus_per_node):
                    graph.add_edge(rank, f"node{node}", link=pool.intra_node)
                    rank += 1
                if self.inter_node is not None:
                    self._join(graph, node, self.inter_node)
                node += 1
        return graph

    def _join(self, graph: "nx.Graph[int | str]", node: int, nic: LinkSpec) -> None:
        """Add the way from `node` to the spine, through its pod where there are several."""
        uplinks, above = self.uplinks, "spine"
        if uplinks is not None and self.num_nodes > uplinks.pod_nodes:
            above = f"pod{node // uplinks.pod_nodes}"
            graph.add_edge(above, "spine", link=uplinks.share(nic))
        graph.add_edge(f"node{node}", above, link=nic)
