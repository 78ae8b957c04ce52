"""The cost model: what each stage of a layout takes, summed from measured kernels and links.

Equations and sources: docs/models.md.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.kernels import (
    LINEARS_PER_LAYER,
    Kernel,
    StageShape,
    first_stage,
    last_stage,
    layer_backward,
    layer_forward,
    stage_parameters,
)
from planner.layout import Layout
from planner.plan import StageCost
from planner.witness import Witness, expected, read_witness
from profiles.lookup import CostTable
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


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The costs of one model and workload under a software stack, from one profile's table.

    Raises UnsupportedError where a kernel or a collective is needed that nobody has measured.
    """

    model: ModelSpec
    workload: Workload
    stack: StackSpec
    table: CostTable
    witness: Witness

    def shape(self, layout_tp: int, micro_batch: int) -> StageShape:
        """Return the local shapes of one rank."""
        return StageShape(
            model=self.model, tp=layout_tp, micro_batch=micro_batch, seq_len=self.workload.seq_len
        )

    def stages(self, layout: Layout) -> tuple[StageCost, ...]:
        """Return the costs of every stage of `layout`."""
        shape = self.shape(layout.tp, layout.micro_batch)
        return tuple(self._stage(shape, layout, stage) for stage in range(layout.pp))

    def layer(self, shape: StageShape) -> tuple[Cost, Cost]:
        """Return one layer of one micro-batch, forward and backward, without its messages.

        The sum of its kernels, times what a real layer takes over such a sum; with tp > 1 also
        what DTensor adds to each linear, a third of it in the forward.
        """
        host_ns = LINEARS_PER_LAYER * self.table.host("dtensor_linear") if shape.tp > 1 else 0
        forward = times(self._sum(layer_forward(shape)), self.witness.forward)
        backward = times(self._sum(layer_backward(shape)), self.witness.backward)
        return (
            total((forward, certain(host_ns // 3))),
            total((backward, certain(host_ns - host_ns // 3))),
        )

    def edges(self, shape: StageShape) -> tuple[tuple[Cost, Cost], tuple[Cost, Cost]]:
        """Return what the first and the last stage do beside their layers: (forward, backward)."""
        (first_f, first_b), (last_f, last_b) = first_stage(shape), last_stage(shape)
        head_ns = self.table.host("dtensor_linear") if shape.tp > 1 else 0
        return (
            (self._sum(first_f), self._sum(first_b)),
            (self._sum(last_f), total((self._sum(last_b), certain(head_ns)))),
        )

    def _stage(self, shape: StageShape, layout: Layout, stage: int) -> StageCost:
        num_layers = layout.stage_layers[stage]
        is_first, is_last = stage == 0, stage == layout.pp - 1
        layer_f, layer_b = self.layer(shape)
        forward, backward = [times(layer_f, num_layers)], [times(layer_b, num_layers)]
        for is_here, edge in zip((is_first, is_last), self.edges(shape), strict=True):
            if is_here:
                forward.append(edge[0])
                backward.append(edge[1])
        parameters = stage_parameters(shape, layout.stage_layers, stage)
        # Each micro-batch adds its weight gradients to those of the micro-batches before it.
        if layout.num_microbatches > 1:
            backward.append(self._sum((Kernel("add_backward", (parameters,)),)))
        if layout.pp > 1:
            action = certain(self.table.host("pipeline_action"))
            forward.append(action)
            backward.append(action)
        sync_f, sync_b = self._tensor_parallel(shape, num_layers, is_first, is_last)
        send = self._message(shape) if layout.pp > 1 else NOTHING
        work_ns = total((*forward, *backward)).p50_ns * layout.num_microbatches
        return StageCost(
            forward=total((*forward, sync_f)),
            backward=total((*backward, sync_b)),
            send_forward=NOTHING if is_last else send,
            send_backward=NOTHING if is_first else send,
            all_reduce=self._gradients(parameters, layout.dp),
            optimizer=self._sum((Kernel("adamw", (parameters,)),)),
            other=certain(self.table.host("step")),
            wait=certain(self.witness.skew_ns(work_ns, layout.dp * layout.pp)),
            tensor_parallel_forward_ns=sync_f.p50_ns,
            tensor_parallel_backward_ns=sync_b.p50_ns,
        )

    def _sum(self, kernels: Sequence[Kernel]) -> Cost:
        dtype = self.workload.dtype
        return total(expected(self.table.kernel(k.op, dtype, k.shape)) for k in kernels)

    def _collective(self, kind: str, group_size: int, size_bytes: int) -> Cost:
        return expected(self.table.collective(kind, group_size, size_bytes))

    def _message(self, shape: StageShape) -> Cost:
        """Return the time of one micro-batch's activations, or their gradient, on their way."""
        size_bytes = shape.rows * self.model.hidden * DTYPE_BYTES[self.workload.dtype]
        return self._collective("send_recv", 2, size_bytes)

    def _tensor_parallel(
        self, shape: StageShape, num_layers: int, is_first: bool, is_last: bool
    ) -> tuple[Cost, Cost]:
        """Return the tensor-parallel collectives of a stage for one micro-batch.

        Forward: one all-reduce of the activations behind the attention and one behind the MLP of
        each layer, one behind the vocabulary-sharded embedding. Backward: one in front of each
        attention and MLP, and one in front of the LM head. Each is made out of place, which costs a
        pass over the activations, and waits for the slowest member. The sharded loss reduces three
        values a token (the largest logit, the sum of exponentials, the target's logit) in fp32.
        """
        if shape.tp == 1:
            return NOTHING, NOTHING
        elements = shape.rows * self.model.hidden
        reduce = self._collective(
            "all_reduce", shape.tp, elements * DTYPE_BYTES[self.workload.dtype]
        )
        copy = self._sum((Kernel("add_forward", (elements,)),))
        values = self._collective("all_reduce", shape.tp, 4 * shape.rows)
        layer_f, layer_b = self.layer(shape)
        late_f, late_b = (
            certain(self.witness.skew_ns(layer.p50_ns // 2, shape.tp))
            for layer in (layer_f, layer_b)
        )
        forward = times(total((reduce, copy, late_f)), 2 * num_layers + is_first)
        backward = times(total((reduce, copy, late_b)), 2 * num_layers + is_last)
        return total((forward, times(values, 3 * is_last))), backward

    def _gradients(self, parameters: int, dp: int) -> Cost:
        """Return the all-reduce of one step's gradients, bucket by bucket."""
        if dp == 1:
            return NOTHING
        bucket_bytes = self.stack.gradient_bucket_bytes
        num_full, rest_bytes = divmod(parameters * DTYPE_BYTES[self.workload.dtype], bucket_bytes)
        full = times(self._collective("all_reduce", dp, bucket_bytes), num_full)
        rest = self._collective("all_reduce", dp, rest_bytes) if rest_bytes else NOTHING
        return total((full, rest))


def cost_model(
    model: ModelSpec, workload: Workload, stack: StackSpec, profile: Profile
) -> CostModel:
    """Return the cost model of `model` on the machine of `profile`."""
    table = CostTable(profile)
    witness = read_witness(table, workload.dtype)
    return CostModel(model=model, workload=workload, stack=stack, table=table, witness=witness)
