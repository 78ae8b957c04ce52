"""The memory model: what one rank of each stage holds at its peak, by what holds it.

Equations and sources: docs/models.md.
"""

from planner.kernels import StageShape, stage_parameters
from planner.layout import Layout
from planner.plan import StageMemory
from planner.schedule import Schedule
from profiles.model import ModelSpec
from profiles.stack import StackSpec
from profiles.workload import DTYPE_BYTES, Workload


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

    >>> from planner.schedule import gpipe, one_f_one_b
    >>> peak_alive(gpipe(4, 8), 0), [peak_alive(one_f_one_b(4, 8), r) for r in range(4)]
    (8, [4, 3, 2, 1])
    """
    alive = peak = 0
    for action in schedule.ranks[rank]:
        alive += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
        peak = max(peak, alive)
    return peak


def stage_memory(
    model: ModelSpec,
    workload: Workload,
    layout: Layout,
    schedule: Schedule,
    stack: StackSpec,
    context_bytes: int,
) -> tuple[StageMemory, ...]:
    """Return the peak memory of one rank of each stage.

    The optimizer holds AdamW's two moments in the dtype of the parameters. `temporary` is the
    largest short-lived working set: the gradient of the logits beside the logits themselves on
    the last stage, else the gradients that flow through one MLP.
    """
    element = DTYPE_BYTES[workload.dtype]
    shape = StageShape(
        model=model, tp=layout.tp, micro_batch=layout.micro_batch, seq_len=workload.seq_len
    )
    result, homes = [], schedule.homes()
    for stage, num_layers in enumerate(layout.stage_layers):
        is_last = stage == layout.pp - 1
        parameters = stage_parameters(shape, layout.stage_layers, stage)
        activations = num_layers * layer_activation_bytes(
            shape, element, fuses_norms=stack.fuses_norms
        )
        temporary = 3 * shape.rows * shape.ffn * element
        if is_last:
            activations += head_activation_bytes(shape, element, fuses_norms=stack.fuses_norms)
            temporary = max(temporary, 2 * shape.rows * shape.vocab * 4)
        result.append(
            StageMemory(
                parameters=parameters * element,
                gradients=parameters * element,
                optimizer=2 * parameters * element,
                activations=activations * peak_alive(schedule, homes[stage]),
                temporary=temporary,
                context=context_bytes,
            )
        )
    return tuple(result)
