"""The cost model: what each stage of a layout takes, summed from measured kernels and links.

Equations and sources: docs/models.md.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.bounds import Columns, Parts
from planner.buckets import bucket_counts
from planner.kernels import (
    LINEARS_PER_LAYER,
    Kernel,
    StageShape,
    first_stage,
    last_stage,
    layer_backward,
    layer_forward,
    stage_parameters,
    weight_half,
)
from planner.layout import Layout
from planner.plan import ProfileReference, StageCost
from planner.witness import Witness, expected, read_witness
from profiles.errors import UnsupportedError
from profiles.files import digest
from profiles.job import Job
from profiles.lookup import CostTable
from profiles.machine import known_gpu
from profiles.model import ModelSpec
from profiles.profile import Cost, Profile
from profiles.stack import StackSpec
from profiles.workload import DTYPE_BYTES, Workload

NOTHING = Cost(p10_ns=0, p50_ns=0, p90_ns=0)


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum; the bands add up as if all parts were slow together, which is the wide case.

    >>> total([Cost(p10_ns=1, p50_ns=2, p90_ns=4), Cost(p10_ns=1, p50_ns=1, p90_ns=1)]).p90_ns
    5
    """
    parts = tuple(costs)
    return Cost(
        p10_ns=sum(part.p10_ns for part in parts),
        p50_ns=sum(part.p50_ns for part in parts),
        p90_ns=sum(part.p90_ns for part in parts),
        is_extrapolated=any(part.is_extrapolated for part in parts),
    )


def times(cost: Cost, count: float) -> Cost:
    """Return the cost of `count` calls."""
    return Cost(
        p10_ns=round(cost.p10_ns * count),
        p50_ns=round(cost.p50_ns * count),
        p90_ns=round(cost.p90_ns * count),
        is_extrapolated=cost.is_extrapolated and count > 0,
    )


def certain(duration_ns: int) -> Cost:
    """Return a cost without a band."""
    return Cost(p10_ns=duration_ns, p50_ns=duration_ns, p90_ns=duration_ns)


class Work(NamedTuple):
    """One micro-batch through some part of a stage; `weight` is the part of `backward` that makes
    weight gradients.
    """

    forward: Cost
    backward: Cost
    weight: Cost


def work_of(parts: Sequence[Work]) -> Work:
    """Return the sum of `parts`."""
    return Work(*(total(costs) for costs in zip(*parts, strict=True)))


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The costs of one model and workload under a software stack, from one profile's table.

    They are those of our own executor. `profile_path` says where the profile is kept. Raises
    UnsupportedError where a kernel or a collective is needed that nobody has measured.
    """

    model: ModelSpec
    workload: Workload
    stack: StackSpec
    table: CostTable
    witness: Witness
    profile_path: str = ""

    @property
    def is_of_executor(self) -> bool:
        """Kernels are measured in our own executor."""
        return True

    @property
    def origin(self) -> ProfileReference:
        """The profile that the costs are from."""
        profile = self.table.profile
        return ProfileReference(
            path=self.profile_path,
            digest=digest(profile),
            device=profile.device,
            versions=profile.versions,
            measured_at=profile.measured_at,
            reference_ns=self.table.reference(self.workload.dtype).p50_ns,
        )

    def completed(self, layout: Layout) -> Layout:
        """Return `layout` as it is: our executor shards nothing and recomputes nothing."""
        return layout

    def context_bytes(self, _layout: Layout) -> int:
        """Return what a rank holds that has done nothing yet, as it was measured."""
        return self.table.profile.context_bytes

    def parts(self, layout: Layout, _rank: int = 0) -> Parts:
        """Return what a micro-batch takes a layer, at the ends of the model and between stages.

        How `layout` splits its layers into stages and shards its states does not matter.
        """
        shape = self.shape(layout.tp, layout.micro_batch)
        layer, (first, last) = self.layer(shape), self.edges(shape)
        # What a layer exchanges, what the first stage does beside, and the last.
        (layer_f, layer_b), (first_f, first_b), (last_f, last_b) = (
            self._tensor_parallel(shape, layer, num_layers, is_first, is_last)
            for num_layers, is_first, is_last in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
        )
        return Parts(
            layer_forward=layer.forward.p50_ns + layer_f.p50_ns,
            layer_forward_host=0.0,
            layer_backward=layer.backward.p50_ns + layer_b.p50_ns,
            layer_backward_host=0.0,
            layer_weight=layer.weight.p50_ns,
            first_forward=first.forward.p50_ns + first_f.p50_ns,
            first_forward_host=0.0,
            first_backward=first.backward.p50_ns + first_b.p50_ns,
            first_backward_host=0.0,
            first_weight=first.weight.p50_ns,
            last_forward=last.forward.p50_ns + last_f.p50_ns,
            last_forward_host=0.0,
            last_backward=last.backward.p50_ns + last_b.p50_ns,
            last_backward_host=0.0,
            last_weight=last.weight.p50_ns,
            message_host=0.0,
            send=self._message(shape, layout).p50_ns if layout.pp > 1 else 0.0,
            step=self.table.host("step"),
        )

    def columns(self, layouts: Sequence[Layout]) -> Columns:
        """Return the medians of `stages` of layouts that differ in their sharding alone."""
        stages = [self.stages(layout) for layout in layouts]
        return Columns(
            *(
                np.array([[getattr(cost, name).p50_ns for cost in costs] for costs in stages])
                for name in Columns._fields
            )
        )

    def shape(self, layout_tp: int, micro_batch: int) -> StageShape:
        """Return the local shapes of one rank."""
        return StageShape(
            model=self.model, tp=layout_tp, micro_batch=micro_batch, seq_len=self.workload.seq_len
        )

    def stages(self, layout: Layout, _homes: Sequence[int] = ()) -> tuple[StageCost, ...]:
        """Return the costs of every stage of `layout`."""
        shape = self.shape(layout.tp, layout.micro_batch)
        layer, edges = self.layer(shape), self.edges(shape)
        last = layout.num_stages - 1
        alike: dict[tuple[int, bool, bool], StageCost] = {}
        for stage, num_layers in enumerate(layout.stage_layers):
            key = (num_layers, stage == 0, stage == last)
            if key not in alike:
                parts = [Work(*(times(cost, num_layers) for cost in layer))]
                parts += [edge for edge, is_here in zip(edges, key[1:], strict=True) if is_here]
                alike[key] = self._stage(shape, layout, stage, layer, parts)
        return tuple(
            alike[num_layers, stage == 0, stage == last]
            for stage, num_layers in enumerate(layout.stage_layers)
        )

    def layer(self, shape: StageShape) -> Work:
        """Return one layer of one micro-batch, without its messages.

        The sum of its kernels, times what a real layer takes over such a sum; with tp > 1 also
        what DTensor adds to each linear, a third of it in the forward and in each half of the
        backward.
        """
        backward = layer_backward(shape)
        host_ns = LINEARS_PER_LAYER * self.table.host("dtensor_linear") if shape.tp > 1 else 0
        forward_ns, weight_ns = host_ns // 3, host_ns // 3
        return Work(
            self._scaled(layer_forward(shape), self.witness.forward, forward_ns),
            self._scaled(backward, self.witness.backward, host_ns - forward_ns),
            self._scaled(weight_half(backward), self.witness.backward, weight_ns),
        )

    def edges(self, shape: StageShape) -> tuple[Work, Work]:
        """Return what the first and the last stage do beside their layers."""
        (first_f, first_b), (last_f, last_b) = first_stage(shape), last_stage(shape)
        head_ns = self.table.host("dtensor_linear") if shape.tp > 1 else 0
        return (
            Work(self._sum(first_f), self._sum(first_b), self._sum(weight_half(first_b))),
            Work(
                self._sum(last_f),
                total((self._sum(last_b), certain(head_ns))),
                self._sum(weight_half(last_b)),
            ),
        )

    def _stage(
        self, shape: StageShape, layout: Layout, stage: int, layer: Work, parts: list[Work]
    ) -> StageCost:
        """Return the cost of `stage`, which does `parts` for each micro-batch."""
        is_first, is_last = stage == 0, stage == layout.num_stages - 1
        parameters = stage_parameters(shape, layout.stage_layers, stage)
        # Each micro-batch adds its weight gradients to those of the micro-batches before it.
        if layout.num_microbatches > 1:
            addition = self._sum((Kernel("add_backward", (parameters,)),))
            parts = [*parts, Work(NOTHING, addition, addition)]
        if layout.pp > 1:
            action = certain(self.table.host("pipeline_action"))
            parts = [*parts, Work(action, action, NOTHING)]
        work = work_of(parts)
        sync_f, sync_b = self._tensor_parallel(shape, layer, layout.stage_layers[stage], is_first,
                                               is_last)  # fmt: skip
        send = self._message(shape, layout) if layout.pp > 1 else NOTHING
        work_ns = total((work.forward, work.backward)).p50_ns * layout.num_microbatches
        return StageCost(
            forward=total((work.forward, sync_f)),
            backward=total((work.backward, sync_b)),
            weight=work.weight,
            send_forward=NOTHING if is_last else send,
            send_backward=NOTHING if is_first else send,
            all_reduce=self._gradients(
                shape, layout, layout.stage_layers[stage], is_first, is_last
            ),
            optimizer=self._sum((Kernel("adamw", (parameters,)),)),
            other=certain(self.table.host("step")),
            wait=certain(self.witness.skew_ns(work_ns, layout.dp * layout.pp)),
            tensor_parallel_forward_ns=sync_f.p50_ns,
            tensor_parallel_backward_ns=sync_b.p50_ns,
        )

    def _scaled(self, kernels: Sequence[Kernel], factor: float, host_ns: int) -> Cost:
        return total((times(self._sum(kernels), factor), certain(host_ns)))

    def _sum(self, kernels: Sequence[Kernel]) -> Cost:
        dtype = self.workload.dtype
        return total(expected(self.table.kernel(k.op, dtype, k.shape)) for k in kernels)

    def _collective(self, kind: str, group_size: int, size_bytes: int, stride: int = 1) -> Cost:
        """Return the time of a collective of ranks that are `stride` apart.

        Ranks are counted along tp first, then along dp, then along pp, as the executor does it.
        """
        return expected(self.table.collective(kind, group_size, size_bytes, stride))

    def _message(self, shape: StageShape, layout: Layout) -> Cost:
        """Return the time of one micro-batch's activations, or their gradient, on their way."""
        size_bytes = shape.rows * self.model.hidden * DTYPE_BYTES[self.workload.dtype]
        return self._collective("send_recv", 2, size_bytes, layout.tp * layout.dp)

    def _tensor_parallel(
        self, shape: StageShape, layer: Work, num_layers: int, is_first: int, is_last: int
    ) -> tuple[Cost, Cost]:
        """Return the tensor-parallel collectives of a stage for one micro-batch.

        Forward: one all-reduce of the activations behind the attention and one behind the MLP of
        each layer, one behind the vocabulary-sharded embedding. Backward: one in front of each
        attention and MLP, and one in front of the LM head. Each makes a new tensor, and waits for
        the slowest member. The sharded loss reduces three values a token (the largest logit, the
        sum of exponentials, the target's logit) in fp32.
        """
        if shape.tp == 1:
            return NOTHING, NOTHING
        elements = shape.rows * self.model.hidden
        size_bytes = elements * DTYPE_BYTES[self.workload.dtype]
        reduce = self._collective("all_reduce_copy", shape.tp, size_bytes)
        values = self._collective("all_reduce_copy", shape.tp, 4 * shape.rows)
        late_f, late_b = (
            certain(self.witness.skew_ns(cost.p50_ns // 2, shape.tp))
            for cost in (layer.forward, layer.backward)
        )
        forward = times(total((reduce, late_f)), 2 * num_layers + is_first)
        backward = times(total((reduce, late_b)), 2 * num_layers + is_last)
        return total((forward, times(values, 3 * is_last))), backward

    def _gradients(
        self, shape: StageShape, layout: Layout, num_layers: int, is_first: bool, is_last: bool
    ) -> Cost:
        """Return the all-reduce of one step's gradients, bucket by bucket."""
        if layout.dp == 1:
            return NOTHING
        counts = bucket_counts(
            shape,
            num_layers,
            is_first=is_first,
            is_last=is_last,
            element_bytes=DTYPE_BYTES[self.workload.dtype],
            closing_bytes=self.stack.gradient_bucket_bytes,
        )
        return total(
            times(self._collective("all_reduce", layout.dp, size_bytes, layout.tp), count)
            for size_bytes, count in counts
        )


def cost_model(
    model: ModelSpec, workload: Workload, stack: StackSpec, profile: Profile, profile_path: str = ""
) -> CostModel:
    """Return the cost model of `model` on the machine of `profile`."""
    table = CostTable(profile)
    return CostModel(
        model=model,
        workload=workload,
        stack=stack,
        table=table,
        witness=read_witness(table, workload.dtype),
        profile_path=profile_path,
    )


def measured_costs(job: Job, profile: Profile, profile_path: str = "") -> CostModel:
    """Return the costs of `job` on the machine of `profile`, which is kept at `profile_path`.

    Raises UnsupportedError for a model that they do not cover, and for a profile of other GPUs or
    of fewer ranks than the job asks for.
    """
    _check_supported(job, profile)
    return cost_model(job.model, job.workload, job.stack, profile, profile_path)


def _check_supported(job: Job, profile: Profile) -> None:
    if not job.model.is_llama_like:
        raise UnsupportedError(
            f"model {job.model.name} has {job.model.norm}, {job.model.mlp} and "
            f"{job.model.positions} positions; the cost model covers LLaMA-like decoders "
            "(rmsnorm, swiglu, rope, no biases)"
        )
    if job.stack.is_changed:
        raise UnsupportedError(
            f"stack {job.stack.name} keeps gradients, weights or moments otherwise, or elsewhere; "
            "measured are kernels of our own executor, which keeps all in the dtype of the run and "
            "on its device: leave these keys out of [stack] and [search], or plan for a cluster "
            "preset without a profile"
        )
    wanted = job.cluster.local_device
    if wanted and profile.device.kind != wanted:
        raise UnsupportedError(
            f"the profile measured {profile.device.kind}, the job asks for {wanted}; measure it "
            f"with `layline profile --device {wanted}`, or set cluster.device"
        )
    if not job.foreign_profile:
        _check_same_device(job, profile)
    if profile.device.num_ranks < job.cluster.num_ranks:
        raise UnsupportedError(
            f"the profile measured {profile.device.num_ranks} ranks of {profile.device.name}, the "
            f"job asks for {job.cluster.num_ranks}; profile as many, or set cluster.ranks lower"
        )


def _check_same_device(job: Job, profile: Profile) -> None:
    """Raise UnsupportedError when the profile is known to be of other devices than the cluster's.

    A cluster elsewhere has GPUs by the name of their preset, this machine by that of its driver.
    """
    measured = known_gpu(profile.device.name)
    names = {profile.device.name} | ({measured.name} if measured else set())
    for pool in job.cluster.pools:
        is_cpu_elsewhere = not job.cluster.is_local and profile.device.kind == "cpu"
        is_unknown = not job.cluster.is_local and measured is None
        if is_cpu_elsewhere or (pool.gpu.name not in names and not is_unknown):
            raise UnsupportedError(
                f"the profile measured {profile.device.name} ({profile.device.kind}), the cluster "
                f"has {pool.gpu.name}; run `layline profile -o FILE` on one of its nodes and set "
                "profile to that file, or set foreign_profile = true to plan with this one"
            )
