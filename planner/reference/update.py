"""The optimizer's update: what AdamW moves, and how long it takes on the host of a node.

Legend: N parameters of a GPU's own, g bytes of a gradient, e of a parameter as it is computed with,
M of its master copy, O of both moments; G GPUs share a host whose memory moves R bytes a second at
its peak.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from planner.reference.program import Floats
from planner.setup import Setup
from profiles.cluster import HostSpec, PoolSpec
from profiles.errors import UnsupportedError
from profiles.presets import host_presets
from profiles.stack import StackSpec


class Widths(NamedTuple):
    """Bytes of the forms of one parameter; `master` is 0 without a master copy."""

    stored: int
    gradient: int
    master: int
    moments: int

    @classmethod
    def of(cls, stack: StackSpec, stored: int) -> Self:
        """Return the widths under `stack` of parameters that are stored in so many bytes."""
        return cls(
            stored=stored,
            gradient=stack.gradient_bytes or stored,
            master=stack.master_bytes,
            moments=stack.moment_bytes or 2 * stored,
        )

    @property
    def adam(self) -> int:
        """Bytes that AdamW moves: g + 2 (M or e) + 2 O + e where there is a master copy.

        It reads the gradient, reads and writes the master copy and two moments, and writes the
        parameter.

        >>> Widths(stored=2, gradient=2, master=4, moments=8).adam
        28
        """
        copied = self.stored if self.master else 0
        return self.gradient + 2 * (self.master or self.stored) + 2 * self.moments + copied


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedHost:
    """A host, and how many GPUs of a job share it."""

    host: HostSpec
    num_sharing: int

    def update_ns(self, owned: Floats, widths: Widths, bucket_bytes: int) -> Floats:
        """Return the time of an update of `owned` parameters of each GPU, gradients to parameters.

        t = g N / r + (g + 2 M + 2 O + e) N / (R / G) + e N / r + latency of each bucket
        r = min(link, R / G)

        Gradients go down, the host's cores do AdamW, parameters come up; nothing is overlapped, and
        memory moves at its peak rate. The design is ZeRO-Offload (Ren et al. 2021,
        arXiv:2101.06840), whose own overlaps of traffic and computation are not counted on.

        >>> from profiles.presets import host_preset
        >>> shared = SharedHost(host=host_preset("dgx-a100"), num_sharing=8)
        >>> widths = Widths(stored=2, gradient=2, master=4, moments=8)
        >>> (shared.update_ns(np.array([1e9]), widths, 1 << 40) / 1e6).round().tolist()
        [676.0]
        """
        share = self.host.memory_bytes_per_s / self.num_sharing
        rate = min(self.host.link.bytes_per_s, share)
        down, up = widths.gradient * owned, widths.stored * owned
        messages = np.ceil(down / bucket_bytes) + np.ceil(up / bucket_bytes)
        seconds = (down + up) / rate + widths.adam * owned / share
        return np.asarray(1e9 * seconds + messages * self.host.link.latency_ns)


def host_of(setup: Setup) -> SharedHost:
    """Return the host of each node of `setup`, shared by all of its GPUs that the layout uses."""
    pool = setup.cluster.pools[0]
    num_sharing = min(pool.gpus_per_node, setup.layout.num_ranks)
    return SharedHost(host=known_host(pool), num_sharing=num_sharing)


def known_host(pool: PoolSpec) -> HostSpec:
    """Return the host of the nodes of `pool`; raises UnsupportedError where it is not known."""
    if pool.host is None:
        raise UnsupportedError(
            f"optimizer_offload is true, but nothing is known of the hosts of {pool.gpu.name}; "
            "write the cluster's pools out, each with its host (one of "
            f"{', '.join(host_presets())}), or keep the optimizer on the GPU"
        )
    return pool.host
