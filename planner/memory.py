"""The memory model: what each pipeline rank holds at its peak, by what holds it.

Equations and sources: docs/models.md.
"""

from collections.abc import Sequence

import numpy as np

from planner.kernels import StageShape, stage_parameters
from planner.layout import Layout
from planner.plan import PeakMemory
from profiles.model import ModelSpec
from profiles.stack import StackSpec
from profiles.workload import DTYPE_BYTES, Workload
from simulator.schedule import STAGE_MASK, STAGE_SHIFT, Schedule


def layer_activation_bytes(shape: StageShape, element_bytes: int, *, fuses_norms: bool) -> int:
    """Return what autograd keeps of one layer of one micro-batch, without recomputation.

    Per token: both norm inputs and both norm outputs (4 h), where norms are not fused also the
    normalised inputs (2 h); queries, keys, values and the attention's output (2 q + 2 kv); gate,
    up, silu(gate) and the product, input of the down projection (4 f); one fp32 log-sum-exp per
    head and one inverse deviation per norm. A test holds this to what autograd saves.
    """
    norms = (4 if fuses_norms else 6) * shape.model.hidden
    widths = norms + 2 * shape.q_width + 2 * shape.kv_width + 4 * shape.ffn
    statistics = 4 * (shape.model.num_heads // shape.tp + 2)
    return shape.rows * (widths * element_bytes + statistics)


def head_activation_bytes(shape: StageShape, element_bytes: int, *, fuses_norms: bool) -> int:
    """Return what the last stage keeps beside its layers: its norm's, and an fp32 log-softmax."""
    norm = (2 if fuses_norms else 3) * shape.model.hidden * element_bytes + 4
    return shape.rows * (norm + 4 * shape.vocab)


def peak_alive(schedule: Schedule, rank: int) -> int:
    """Return how many micro-batches' activations pipeline rank `rank` holds at most.

    >>> from planner.schedules import SCHEDULES
    >>> gpipe, one_f_one_b = (SCHEDULES[name].build(4, 8) for name in ("gpipe", "1f1b"))
    >>> peak_alive(gpipe, 0), [peak_alive(one_f_one_b, r) for r in range(4)]
    (8, [4, 3, 2, 1])
    """
    return peak_activations(schedule, [1] * schedule.num_stages)[rank]


def peak_activations(schedule: Schedule, stage_bytes: Sequence[int]) -> tuple[int, ...]:
    """Return the most bytes of activations that each pipeline rank holds at once.

    `stage_bytes` is what one micro-batch keeps on each stage: a forward allocates it; a backward,
    or the weight half of one, frees it.
    """
    held = np.asarray(stage_bytes, np.int64)
    change = np.array([1, -1, 0, -1])
    return tuple(
        int(np.cumsum(change[order & 3] * held[(order >> STAGE_SHIFT) & STAGE_MASK]).max())
        for order in schedule.orders
    )


def stage_activation_bytes(
    model: ModelSpec, workload: Workload, layout: Layout, stack: StackSpec
) -> tuple[int, ...]:
    """Return what each stage keeps of one micro-batch from its forward to its backward."""
    element, shape = DTYPE_BYTES[workload.dtype], _shape(model, workload, layout)
    layer = layer_activation_bytes(shape, element, fuses_norms=stack.fuses_norms)
    head = head_activation_bytes(shape, element, fuses_norms=stack.fuses_norms)
    stages = [num_layers * layer for num_layers in layout.stage_layers]
    return (*stages[:-1], stages[-1] + head)


def peak_memory(
    model: ModelSpec,
    workload: Workload,
    layout: Layout,
    schedule: Schedule,
    stack: StackSpec,
    context_bytes: int,
) -> tuple[PeakMemory, ...]:
    """Return the peak memory of each pipeline rank, over all of its stages.

    The optimizer holds AdamW's two moments in the dtype of the parameters. `temporary` is the
    largest short-lived working set: the gradient of the logits beside the logits themselves where
    the last stage is, else the gradients that flow through one MLP.
    """
    element, shape = DTYPE_BYTES[workload.dtype], _shape(model, workload, layout)
    activations = peak_activations(schedule, stage_activation_bytes(model, workload, layout, stack))
    parameters = [0] * layout.pp
    temporary = [3 * shape.rows * shape.ffn * element] * layout.pp
    for stage, rank in enumerate(schedule.homes.tolist()):
        parameters[rank] += stage_parameters(shape, layout.stage_layers, stage)
    last = int(schedule.homes[-1])
    temporary[last] = max(temporary[last], 2 * shape.rows * shape.vocab * 4)
    return tuple(
        PeakMemory(
            parameters=parameters[rank] * element,
            gradients=parameters[rank] * element,
            optimizer=2 * parameters[rank] * element,
            activations=activations[rank],
            temporary=temporary[rank],
            context=context_bytes,
        )
        for rank in range(layout.pp)
    )


def _shape(model: ModelSpec, workload: Workload, layout: Layout) -> StageShape:
    return StageShape(
        model=model, tp=layout.tp, micro_batch=layout.micro_batch, seq_len=workload.seq_len
    )
