"""The cost model: what each stage of a layout takes, summed from measured kernels and links.

Equations and sources: docs/models.md.
"""

from collections.abc import Callable, Iterable, Sequence

from planner.kernels import (
    LINEARS_IN_HEAD,
    LINEARS_PER_LAYER,
    MODULE_OPS_PER_LAYER,
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
from profiles.lookup import CostTable
from profiles.model import ModelSpec
from profiles.profile import Cost
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


def times(cost: Cost, count: int) -> Cost:
    """Return the cost of `count` calls."""
    return Cost(
        p10_ns=cost.p10_ns * count,
        p50_ns=cost.p50_ns * count,
        p90_ns=cost.p90_ns * count,
        is_extrapolated=cost.is_extrapolated and count > 0,
    )


def certain(duration_ns: int) -> Cost:
    """Return a cost without a band."""
    return Cost(p10_ns=duration_ns, p50_ns=duration_ns, p90_ns=duration_ns)


def stage_costs(
    model: ModelSpec, workload: Workload, layout: Layout, stack: StackSpec, table: CostTable
) -> tuple[StageCost, ...]:
    """Return the costs of every stage of `layout`, from the measurements behind `table`.

    Raises UnsupportedError for a kernel or collective that nobody has measured.
    """
    shape = StageShape(
        model=model, tp=layout.tp, micro_batch=layout.micro_batch, seq_len=workload.seq_len
    )
    stages = range(layout.pp)
    return tuple(_stage_cost(shape, workload, layout, stack, table, stage) for stage in stages)


def layer_cost(shape: StageShape, dtype: str, table: CostTable) -> tuple[Cost, Cost]:
    """Return the cost of one layer of one micro-batch, forward and backward, without messages.

    Beside its kernels a layer pays the host: autograd's bookkeeping of each op, and what DTensor
    adds to each linear when tp > 1; a third of both falls to the forward.
    """
    host_ns = MODULE_OPS_PER_LAYER * table.host("autograd_op")
    if shape.tp > 1:
        host_ns += LINEARS_PER_LAYER * table.host("dtensor_linear")
    forward = _kernels(layer_forward(shape), dtype, table)
    backward = _kernels(layer_backward(shape), dtype, table)
    host_forward_ns = host_ns // 3
    return (
        total((forward, certain(host_forward_ns))),
        total((backward, certain(host_ns - host_forward_ns))),
    )


def edge_cost(shape: StageShape, dtype: str, table: CostTable) -> tuple[Cost, Cost]:
    """Return what the first and the last stage do beside their layers, forward plus backward."""
    (first_f, first_b), (last_f, last_b) = first_stage(shape), last_stage(shape)
    return (
        _kernels((*first_f, *first_b), dtype, table),
        _kernels((*last_f, *last_b), dtype, table),
    )


def _stage_cost(
    shape: StageShape,
    workload: Workload,
    layout: Layout,
    stack: StackSpec,
    table: CostTable,
    stage: int,
) -> StageCost:
    dtype, num_layers = workload.dtype, layout.stage_layers[stage]
    is_first, is_last = stage == 0, stage == layout.pp - 1
    layer_f, layer_b = layer_cost(shape, dtype, table)
    forward, backward = [times(layer_f, num_layers)], [times(layer_b, num_layers)]
    if is_first:
        forward.append(_kernels(first_stage(shape)[0], dtype, table))
        backward.append(_kernels(first_stage(shape)[1], dtype, table))
    if is_last:
        forward.append(_kernels(last_stage(shape)[0], dtype, table))
        backward.append(_kernels(last_stage(shape)[1], dtype, table))
        if layout.tp > 1:
            backward.append(certain(LINEARS_IN_HEAD * table.host("dtensor_linear")))
    parameters = stage_parameters(shape, layout.stage_layers, stage)
    # Each micro-batch adds its weight gradients to those of the micro-batches before it.
    if layout.num_microbatches > 1:
        backward.append(_kernels((Kernel("add_backward", (parameters,)),), dtype, table))
    if layout.pp > 1:
        forward.append(certain(table.host("pipeline_action")))
        backward.append(certain(table.host("pipeline_action")))
    tp_forward, tp_backward = _tensor_parallel(shape, dtype, num_layers, is_first, is_last, table)
    message_bytes = shape.rows * shape.model.hidden * DTYPE_BYTES[dtype]
    send = NOTHING if layout.pp == 1 else table.collective("send_recv", 2, message_bytes)
    return StageCost(
        forward=total((*forward, tp_forward)),
        backward=total((*backward, tp_backward)),
        send_forward=NOTHING if is_last else send,
        send_backward=NOTHING if is_first else send,
        all_reduce=_gradient_reduction(parameters * DTYPE_BYTES[dtype], layout.dp, stack, table),
        optimizer=_kernels((Kernel("adamw", (parameters,)),), dtype, table),
        other=certain(table.host("step")),
        tensor_parallel_forward_ns=tp_forward.p50_ns,
        tensor_parallel_backward_ns=tp_backward.p50_ns,
    )


def _kernels(kernels: Sequence[Kernel], dtype: str, table: CostTable) -> Cost:
    return total(table.kernel(kernel.op, dtype, kernel.shape) for kernel in kernels)


def _tensor_parallel(
    shape: StageShape, dtype: str, num_layers: int, is_first: bool, is_last: bool, table: CostTable
) -> tuple[Cost, Cost]:
    """Return the tensor-parallel collectives of a stage for one micro-batch.

    Forward: one all-reduce of the activations behind the attention and one behind the MLP of each
    layer, one behind the vocabulary-sharded embedding. Backward: one in front of each attention
    and MLP, and one in front of the LM head. The sharded loss reduces three values a token (the
    largest logit, the sum of exponentials, the target's logit) in fp32.
    """
    if shape.tp == 1:
        return NOTHING, NOTHING
    size_bytes = (
        shape.rows * shape.model.hidden * DTYPE_BYTES["bf16" if dtype == "bf16" else "fp32"]
    )
    reduce: Callable[[int], Cost] = lambda size: table.collective("all_reduce", shape.tp, size)  # noqa: E731
    activations, values = reduce(size_bytes), reduce(4 * shape.rows)
    forward = total((times(activations, 2 * num_layers + is_first), times(values, 3 * is_last)))
    return forward, times(activations, 2 * num_layers + is_last)


def _gradient_reduction(size_bytes: int, dp: int, stack: StackSpec, table: CostTable) -> Cost:
    """Return the all-reduce of one step's gradients, bucket by bucket."""
    if dp == 1:
        return NOTHING
    num_full, rest_bytes = divmod(size_bytes, stack.gradient_bucket_bytes)
    full = table.collective("all_reduce", dp, stack.gradient_bucket_bytes)
    rest = table.collective("all_reduce", dp, rest_bytes) if rest_bytes else NOTHING
    return total((times(full, num_full), rest))
