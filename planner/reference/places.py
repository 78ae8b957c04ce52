"""Where the groups of a layout sit on a cluster, and what their collectives take there."""

from dataclasses import dataclass

from planner.layout import Layout
from planner.reference.program import INTER, INTRA
from profiles.cluster import ClusterSpec
from profiles.collective_curves import Group, collective
from profiles.errors import UnsupportedError
from profiles.kernel_curves import Estimate

NOTHING = Estimate(0.0)


@dataclass(frozen=True, kw_only=True)
class Places:
    """The groups of `layout` on `cluster`; ranks are numbered as `Layout.place` reads them."""

    layout: Layout
    cluster: ClusterSpec

    @property
    def node_ranks(self) -> int:
        """Ranks of one node."""
        return self.cluster.pools[0].gpus_per_node

    @property
    def crosses_nodes(self) -> bool:
        """Whether the layout needs more than one node."""
        return self.layout.num_ranks > self.node_ranks

    def tensor(self, kind: str, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a collective among neighbours, the tensor-parallel group."""
        return self.among(kind, self.layout.tp, 1, size_bytes)

    def context(self, kind: str, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a collective of a context-parallel group, or its message."""
        size = 2 if kind == "send_recv" else self.layout.cp
        if kind == "send_recv" and self.layout.tp * self.layout.cp > self.node_ranks:
            return self.among(kind, size, self.node_ranks, size_bytes)
        return self.among(kind, size, self.layout.tp, size_bytes)

    def experts(self, kind: str, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a collective among the ranks that share the experts."""
        return self.among(kind, self.layout.ep, self.layout.tp, size_bytes)

    def replicas(self, kind: str, size_bytes: float, copies: int = 1) -> tuple[int, Estimate]:
        """Return category and time of a collective among the ranks that share shards.

        Of a part that is cut over `copies` of them, those that hold the same take part.
        """
        size = self.layout.replicas
        if self.layout.sharding != "none":
            size = self.layout.shard_ranks
        return self.among(kind, max(1, size // copies), copies * self.layout.tp, size_bytes)

    def shard_groups(self, kind: str, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a collective between hybrid sharding's groups."""
        shards = self.layout.shard_ranks
        return self.among(kind, self.layout.replicas // shards, shards * self.layout.tp, size_bytes)

    def message(self, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a message to the next stage, over the slowest hop."""
        stride = self.node_ranks if self.crosses_nodes else 1
        return self.among("send_recv", 2, stride, size_bytes)

    def among(self, kind: str, size: int, stride: int, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a collective of `size` ranks that lie `stride` apart."""
        if size <= 1 or size_bytes <= 0:
            return INTRA, NOTHING
        per_node = max(1, min(size, self.node_ranks // stride))
        inter = self.cluster.inter_node
        if size > per_node and inter is None:
            raise UnsupportedError(
                f"a group of {size} ranks does not fit in the one node of {self.node_ranks} GPUs; "
                "name the fabric that joins the nodes"
            )
        group = Group(size=size, per_node=per_node)
        time = collective(kind, group, int(size_bytes), self.cluster.pools[0].intra_node, inter)
        return (INTER if size > per_node else INTRA), time
