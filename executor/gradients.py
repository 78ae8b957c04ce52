"""Gradients of one rank: kept in flat buckets and summed over the data-parallel axis.

PyTorch's DDP always launches its all-reduces inside the last backward. A plan says whether the
stack overlaps (`StackSpec.overlaps_gradients`), and on CPU ranks it must not: the collective runs
on the core of the backward, so that neither could be measured. The buckets here do what the plan
says, and hold DTensor gradients as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from executor.model import LlamaStage
from executor.shards import as_parameter_shard, local


@dataclass(slots=True)
class _Bucket:
    """Some parameters' gradients, one behind the other in `flat`; `missing` are still to come."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    flat: Tensor = field(default_factory=lambda: torch.empty(0))
    missing: int = 0


class GradientBuckets:
    """Gradients of some stages, in buckets of about `bucket_bytes`, that are summed over `group`.

    Backwards add into views of the buckets, so a gradient exists once. Where `overlaps` is true, a
    bucket's all-reduce starts when its last gradient of the `num_backwards` backwards is there;
    otherwise `reduce` does all of them. Buckets are reduced in one order on every rank: that in
    which the backwards of a step are mostly done with them, the last stage first.
    """

    def __init__(
        self,
        stages: Sequence[LlamaStage],
        group: dist.ProcessGroup,
        num_backwards: int,
        bucket_bytes: int,
        overlaps: bool,
    ) -> None:
        self._group = group
        self._num_backwards = num_backwards
        self._buckets = [
            _filled(members)
            for stage in reversed(stages)
            for members in _partition(list(stage.parameters()), bucket_bytes)
        ]
        self._bucket_of: dict[Tensor, _Bucket] = {
            p: bucket for bucket in self._buckets for p in bucket.parameters
        }
        self._works: list[dist.Work] = []
        if overlaps:
            for parameter in self._bucket_of:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    self._one_more
                )
            for stage in stages:
                stage.weight_half.on_gradient = self._one_more
        self.zero()

    def zero(self) -> None:
        """Set every gradient to zero for the next step."""
        for bucket in self._buckets:
            bucket.flat.zero_()
            bucket.missing = len(bucket.parameters) * self._num_backwards

    def _one_more(self, parameter: Tensor) -> None:
        self._bucket_of[parameter].missing -= 1
        # A bucket waits for those in front of it: collectives must have one order on all ranks.
        while len(self._works) < len(self._buckets):
            if self._buckets[len(self._works)].missing:
                return
            self._launch()

    def _launch(self) -> None:
        flat = self._buckets[len(self._works)].flat
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None  # only a rank outside the group gets None
        self._works.append(work)

    def reduce(self) -> None:
        """Return when every gradient is the sum over the group."""
        while len(self._works) < len(self._buckets):
            self._launch()
            self._works[-1].wait()
        for work in self._works:
            work.wait()
        self._works.clear()


def _partition(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Return the parameters in the order in which backward reaches them, cut into buckets."""
    buckets: list[list[nn.Parameter]] = []
    size = bucket_bytes
    for parameter in reversed(parameters):
        tensor = local(parameter)
        if size >= bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += tensor.numel() * tensor.element_size()
    return buckets


def _filled(parameters: list[nn.Parameter]) -> _Bucket:
    """Return the bucket of `parameters`, whose gradients become views of it."""
    shards = [local(parameter).detach() for parameter in parameters]
    flat = shards[0].new_zeros(sum(shard.numel() for shard in shards))
    start = 0
    for parameter, shard in zip(parameters, shards, strict=True):
        view = flat[start : start + shard.numel()].view(shard.shape)
        start += shard.numel()
        parameter.grad = as_parameter_shard(view, parameter)
    return _Bucket(parameters=parameters, flat=flat)
