"""`Layout`: how a model is laid out over ranks, and which rank sits where on the mesh."""

import math
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from profiles.stack import Recompute, Sharding

LOCAL_SCHEDULES = ("1f1b", "gpipe")
"""What is searched on this machine unless the job asks for others, all of which can be run too.

Few, so that the best of each kind, trained in turn by the demo, differ in more than their order.
"""


AXES = ("tp", "cp", "dp", "pp")
DEFAULT_ORDER = "tp-cp-dp-pp"
"""Axes of the mesh from the innermost on, as ranks are counted: neighbours on the first axis are
neighbours on the cluster."""


_ORDERS = frozenset("-".join(axes) for axes in permutations(AXES))
_COUNTS = ("dp", "tp", "pp", "micro_batch", "num_microbatches", "stages_per_rank", "cp", "ep")


class MeshPlace(NamedTuple):
    """The place of a rank on the (pp, dp, cp, tp) mesh."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees per axis, the micro-batch in sequences, and the layers of each pipeline stage.

    A pipeline rank holds `stages_per_rank` stages; which ones, the schedule says. Ranks are
    numbered along the axes of `order` in turn. By the usual one tensor-parallel groups are
    neighbours and stages lie farthest apart: rank = ((pp_index * dp + dp_index) * cp + cp_index) *
    tp + tp_index; by "tp-cp-pp-dp" stages are neighbours, and replicas far apart.

    `cp` ranks share each sequence, `ep` of the dp * cp ranks share the experts of a layer.
    `sequence_parallel` shards what lies between the tensor-parallel blocks over `tp`. `sharding`
    says what the dp * cp replicas of a stage divide among themselves: the optimizer state (zero1),
    the gradients too (zero2), the parameters too (zero3); with `shard_group` in groups of so many
    replicas (hybrid sharding), 0 for all of them.

    `recompute` says what a layer's backward makes again; with `recompute_layers` it is done in so
    many layers of each stage, in all of them where it is empty.

    >>> layout = Layout(dp=2, tp=2, pp=2, micro_batch=1, num_microbatches=4, stage_layers=(3, 3))
    >>> layout.place(5), layout.num_ranks, str(layout)
    (MeshPlace(pp=1, dp=0, cp=0, tp=1), 8, 'dp=2,tp=2,pp=2,1f1b,mb=1x4')
    """

    dp: int
    tp: int
    pp: int
    micro_batch: int
    num_microbatches: int
    stage_layers: tuple[int, ...]
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    sharding: Sharding = "none"
    shard_group: int = 0
    recompute: Recompute = "none"
    recompute_layers: tuple[int, ...] = ()
    order: str = DEFAULT_ORDER

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"layout.{name} is {value}; it must be at least 1")
        if len(self.stage_layers) != self.num_stages or min(self.stage_layers) < 0:
            raise ValueError(
                f"layout.stage_layers is {self.stage_layers}; "
                f"it needs one count for each of {self.num_stages} stages"
            )
        if self.order not in _ORDERS:
            raise ValueError(
                f'layout.order is "{self.order}"; it must name {", ".join(AXES)} once each, '
                f"as {DEFAULT_ORDER} does"
            )
        if again := self.recompute_layers:
            all_fit = len(again) == self.num_stages and all(
                0 <= made <= held for made, held in zip(again, self.stage_layers, strict=True)
            )
            if self.recompute == "none" or not all_fit:
                raise ValueError(
                    f"layout.recompute_layers is {again} with recompute {self.recompute}; "
                    f"it needs a kind of recomputation, and at most {self.stage_layers} layers"
                )

    @property
    def num_ranks(self) -> int:
        """Ranks that the layout occupies."""
        return self.replicas * self.tp * self.pp

    @property
    def replicas(self) -> int:
        """Ranks that hold, or share, one and the same part of the model."""
        return self.dp * self.cp

    @property
    def shard_ranks(self) -> int:
        """Ranks that share what `sharding` shards; 1 without sharding."""
        return 1 if self.sharding == "none" else self.shard_group or self.replicas

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline, on all of its ranks."""
        return self.pp * self.stages_per_rank

    @property
    def global_batch(self) -> int:
        """Sequences in one optimizer step."""
        return self.dp * self.micro_batch * self.num_microbatches

    def stride(self, axis: str) -> int:
        """Return how many ranks neighbours on `axis` lie apart.

        >>> layout = Layout(dp=2, tp=4, pp=3, micro_batch=1, num_microbatches=1,
        ...                 stage_layers=(1, 1, 1), order="tp-cp-pp-dp")
        >>> layout.stride("tp"), layout.stride("pp"), layout.stride("dp")
        (1, 4, 12)
        """
        inner = self.order.split("-")
        return math.prod(getattr(self, each) for each in inner[: inner.index(axis)])

    def place(self, rank: int) -> MeshPlace:
        """Return where `rank` sits on the mesh."""
        return MeshPlace(
            *(rank // self.stride(axis) % getattr(self, axis) for axis in MeshPlace._fields)
        )

    def recomputed(self, stage: int) -> int:
        """Return in how many layers of `stage` the backward makes something again."""
        if self.recompute == "none":
            return 0
        return (self.recompute_layers or self.stage_layers)[stage]

    def __str__(self) -> str:
        """Return the layout in the words of `layline plan`."""
        stages = f"v={self.stages_per_rank}," if self.stages_per_rank > 1 else ""
        schedule = f"{self.schedule}," if self.pp > 1 else ""
        cp = f"cp={self.cp}," if self.cp > 1 else ""
        ep = f"ep={self.ep}," if self.ep > 1 else ""
        sharding = f"{self.sharding}," if self.sharding != "none" else ""
        recompute = f"recompute={self.recompute}," if self.recompute != "none" else ""
        if self.recompute_layers:
            recompute = f"recompute={self.recompute}:{sum(self.recompute_layers)},"
        order = f"order={self.order}," if self.order != DEFAULT_ORDER else ""
        if self.sharding != "none" and self.shard_ranks < self.replicas:
            sharding = f"{self.sharding}:{self.shard_ranks},"
        sp = "sp," if self.sequence_parallel else ""
        return (
            f"dp={self.dp},tp={self.tp},{sp}{cp}{ep}pp={self.pp},{stages}{schedule}{sharding}"
            f"{recompute}{order}mb={self.micro_batch}x{self.num_microbatches}"
        )
