"""Where the groups of a layout sit on a cluster, and what their collectives take there."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from planner.layout import Layout
from planner.reference.program import INTER, INTRA
from planner.reference.spread import Mesh, Slice, fewest_together, ranks_per_leaver
from profiles.cluster import ClusterSpec, LinkSpec, UplinkSpec
from profiles.collective_curves import Group, collective
from profiles.errors import UnsupportedError
from profiles.kernel_curves import Estimate

NOTHING = Estimate(0.0)
REPLICAS = ("cp", "dp")
"""The axes whose ranks hold, or share, one and the same part of the model."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """The groups of `layout` on `cluster`; ranks are numbered as `Layout.place` reads them.

    A group is what its axes and their order make it: how many of its members share a node, and how
    many such groups the uplinks of a pod, is counted for the worst node and the worst pod.
    """

    layout: Layout
    cluster: ClusterSpec

    @property
    def node_ranks(self) -> int:
        """Ranks of one node."""
        return self.cluster.pools[0].gpus_per_node

    @property
    def tensor_crosses(self) -> bool:
        """Whether a tensor-parallel group needs more than one node."""
        return self._crosses(Slice(("tp",), self.layout.tp))

    @property
    def message_crosses(self) -> bool:
        """Whether a message to the next stage goes to another node, in any of the pipelines."""
        return self._crosses(Slice(("pp",), self.layout.pp))

    def tensor(self, kind: str, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a collective of a tensor-parallel group."""
        return self.among(kind, Slice(("tp",), self.layout.tp), size_bytes)

    def context(self, kind: str, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a collective of a context-parallel group, or its message."""
        return self.among(kind, Slice(("cp",), self.layout.cp), size_bytes)

    def experts(self, kind: str, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a collective among the ranks that share the experts."""
        return self.among(kind, Slice(REPLICAS, self.layout.ep), size_bytes)

    def replicas(self, kind: str, size_bytes: float, copies: int = 1) -> tuple[int, Estimate]:
        """Return category and time of a collective among the ranks that share shards.

        Of a part that is cut over `copies` of them, those that hold the same take part.
        """
        size = self.layout.replicas
        if self.layout.sharding != "none":
            size = self.layout.shard_ranks
        return self.among(kind, Slice(REPLICAS, max(1, size // copies), copies), size_bytes)

    def shard_groups(self, kind: str, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a collective between hybrid sharding's groups."""
        shards = self.layout.shard_ranks
        group = Slice(REPLICAS, self.layout.replicas // shards, shards)
        return self.among(kind, group, size_bytes)

    def message(self, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a message to the next stage, over the slowest hop."""
        return self.among("send_recv", Slice(("pp",), self.layout.pp), size_bytes)

    def among(self, kind: str, group: Slice, size_bytes: float) -> tuple[int, Estimate]:
        """Return category and time of a collective of `group`, or of a message to its next member.

        The slowest of all groups of the kind counts, and of all messages.
        """
        if group.size <= 1 or size_bytes <= 0:
            return INTRA, NOTHING
        inter, intra, uplinks = self._links
        crosses, where = _place(
            self._mesh, group, self.node_ranks, uplinks.pod_nodes if uplinks else 0,
            is_message=kind == "send_recv",
        )  # fmt: skip
        if crosses and inter is None:
            raise UnsupportedError(
                f"a group of {group.size} ranks does not fit in the one node of {self.node_ranks} "
                "GPUs; name the fabric that joins the nodes"
            )
        oversubscription = uplinks.oversubscription if uplinks else 1.0
        time = collective(kind, where, int(size_bytes), intra, inter, oversubscription)
        return (INTER if crosses else INTRA), time

    @cached_property
    def _links(self) -> tuple[LinkSpec | None, LinkSpec, UplinkSpec | None]:
        """The fabric between nodes, the links inside one, and the uplinks of a pod."""
        return self.cluster.inter_node, self.cluster.pools[0].intra_node, self.cluster.uplinks

    @cached_property
    def _mesh(self) -> Mesh:
        return tuple((axis, getattr(self.layout, axis)) for axis in self.layout.order.split("-"))

    def _crosses(self, group: Slice) -> bool:
        return _place(self._mesh, group, self.node_ranks, 0, is_message=False)[0]


@lru_cache(maxsize=1 << 16)
def _place(
    mesh: Mesh, group: Slice, node_ranks: int, pod_nodes: int, *, is_message: bool
) -> tuple[bool, Group]:
    """Return whether `group` leaves its node and where its members sit; 0 `pod_nodes`: one pod."""
    if group.size <= 1:
        return False, Group(size=group.size, per_node=1)
    size, per_node = group.size, fewest_together(mesh, group, node_ranks)
    crosses = per_node < size
    if is_message:
        size, per_node = 2, 1 if crosses else 2
    per_pod = ranks_per_leaver(mesh, group, pod_nodes * node_ranks) if pod_nodes else math.inf
    return crosses, Group(size=size, per_node=per_node, per_pod=per_pod)
