"""What autograd keeps of one layer, and of the head, for one micro-batch, by what keeps it.

Sources: the count by op of Korthikanti et al. (arXiv:2205.05198, section 4), with FlashAttention
(arXiv:2205.14135) in the place of the scores; tests hold it to what autograd saves.
"""

from typing import NamedTuple, Self

from planner.kernels import StageShape
from planner.layout import Layout
from profiles.model import ModelSpec
from profiles.stack import Attention, Fusion, Recompute, Selective, StackSpec
from profiles.workload import DTYPE_BYTES, Workload


class Sizes(NamedTuple):
    """The sizes on one rank that activations are made of.

    `rows` are the tokens of a micro-batch and `between` those that the rank holds between the
    tensor-parallel blocks: all of them or, with sequence parallelism, its share. Widths are local.
    """

    rows: int
    between: int
    seq_len: int
    heads: int
    q_width: int
    kv_width: int
    ffn: int
    vocab: int
    element: int

    @classmethod
    def of(cls, model: ModelSpec, workload: Workload, layout: Layout) -> Self:
        """Return the sizes on each rank of `layout`."""
        tp, rows = layout.tp, layout.micro_batch * workload.seq_len // layout.cp
        return cls(
            rows=rows,
            between=rows // tp if layout.sequence_parallel else rows,
            seq_len=workload.seq_len,
            heads=max(model.num_heads // tp, 1),
            q_width=model.num_heads * model.head_size // tp,
            kv_width=max(model.num_kv_heads // tp, 1) * model.head_size,
            ffn=model.ffn // tp,
            vocab=model.vocab // tp,
            element=DTYPE_BYTES[workload.dtype],
        )

    @classmethod
    def of_shape(cls, shape: StageShape, element_bytes: int) -> Self:
        """Return the sizes of `shape`, without sequence and context parallelism."""
        heads = shape.model.num_heads // shape.tp
        return cls(
            shape.rows, shape.rows, shape.seq_len, heads, shape.q_width, shape.kv_width,
            shape.ffn, shape.vocab, element_bytes,
        )  # fmt: skip


class LayerActivations(NamedTuple):
    """Bytes that one layer keeps of one micro-batch, by what keeps them.

    `inputs` are those of the two norms, that is the residual stream; `norms` is what norms and the
    dropouts of the residuals keep else; `scores` are the attention probabilities, where they are
    materialised. `operators` is not a part of the rest but what stays of it when operators are
    recomputed selectively: the layer's input, query, value and gate, and the outputs of attention
    and MLP.
    """

    inputs: int
    norms: int
    attention: int
    scores: int
    mlp: int
    operators: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.inputs + self.norms + self.attention + self.scores + self.mlp

    def kept(self, recompute: Recompute, selective: Selective = "scores") -> int:
        """Return what is kept when the backward makes the rest again.

        Full recomputation keeps the layer's input, selective one all but the scores.

        >>> LayerActivations(2, 4, 8, 16, 32, 5).kept("selective")
        46
        """
        if recompute == "full":
            return self.inputs // 2
        if recompute == "none":
            return self.total
        return self.operators if selective == "operators" else self.total - self.scores


def layer_activations(
    model: ModelSpec, size: Sizes, *, fusion: Fusion, attention: Attention, fuses_norms: bool
) -> LayerActivations:
    """Return what autograd keeps of one layer of one micro-batch, without recomputation.

    Norms keep their inputs, their outputs for the linears behind them, where a norm is not one
    kernel also its normalised inputs, and an inverse deviation; what a compiler made makes the
    outputs again. Attention keeps q, k, v and its output, and a log-sum-exp in fp32 or, unfused, of
    every pair of tokens the probability, the mask of a dropout and the dropped probability: such
    stacks are of the time of dropout, and keep two more masks of the hidden width.
    """
    is_unfused, wide = attention == "unfused", model.hidden * size.element
    norms = (0 if fusion == "compiled" else 2) + (0 if fuses_norms else 2)
    masks = 2 * model.hidden if is_unfused else 0
    log_sums = 0 if is_unfused else 4 * size.heads
    pairs = size.rows * size.seq_len * size.heads if is_unfused else 0
    return LayerActivations(
        inputs=size.between * 2 * wide,
        norms=size.between * (norms * wide + masks + 8),
        attention=size.rows * ((2 * size.q_width + 2 * size.kv_width) * size.element + log_sums),
        scores=pairs * (2 * size.element + 1),
        mlp=_mlp_bytes(model, size, fusion),
        operators=2 * size.between * wide
        + size.rows * ((2 * size.q_width + size.kv_width + size.ffn) * size.element + log_sums),
    )


def _mlp_bytes(model: ModelSpec, size: Sizes, fusion: Fusion) -> int:
    """Return what the MLP keeps beside its input.

    SwiGLU keeps gate, up, silu(gate) and the product; as one kernel not silu(gate), compiled not
    the product either. GELU keeps its input and output, compiled its input. Of experts, each one
    that a token goes through keeps its copy of the token and its output, which the router weighs,
    and the router its fp32 logits.
    """
    eager, fused, compiled = (4, 3, 2) if model.mlp == "swiglu" else (2, 2, 1)
    width = {"eager": eager, "fused": fused, "compiled": compiled}[fusion] * size.ffn
    if not model.num_experts:
        return size.rows * width * size.element
    widths = model.experts_per_token * (width + 2 * model.hidden) + model.num_shared_experts * width
    return size.rows * (widths * size.element + 4 * model.num_experts)


def head_activations(
    model: ModelSpec, size: Sizes, *, fusion: Fusion, fuses_norms: bool, fuses_loss: bool = False
) -> int:
    """Return what the last stage keeps beside its layers: its norm's, and an fp32 softmax.

    A fused loss keeps the gradient of the logits in the place of the logits instead.
    """
    norms = (1 if fusion == "compiled" else 2) + (0 if fuses_norms else 1)
    norm = size.between * (norms * model.hidden * size.element + 4)
    return norm + size.rows * (size.element if fuses_loss else 4) * size.vocab


def layer_activation_bytes(shape: StageShape, element_bytes: int, *, fuses_norms: bool) -> int:
    """Return what one layer keeps in eager PyTorch with FlashAttention, without recomputation."""
    size = Sizes.of_shape(shape, element_bytes)
    return layer_activations(
        shape.model, size, fusion="eager", attention="flash2", fuses_norms=fuses_norms
    ).total


def head_activation_bytes(shape: StageShape, element_bytes: int, *, fuses_norms: bool) -> int:
    """Return what the last stage keeps beside its layers in eager PyTorch."""
    size = Sizes.of_shape(shape, element_bytes)
    return head_activations(shape.model, size, fusion="eager", fuses_norms=fuses_norms)


def layer_of(model: ModelSpec, size: Sizes, stack: StackSpec) -> LayerActivations:
    """Return what one layer keeps under `stack`, without recomputation."""
    return layer_activations(
        model, size, fusion=stack.fusion, attention=stack.attention, fuses_norms=stack.fuses_norms
    )


def stage_activation_bytes(
    model: ModelSpec, workload: Workload, layout: Layout, stack: StackSpec
) -> tuple[int, ...]:
    """Return what each stage keeps of one micro-batch from its forward to its backward."""
    size = Sizes.of(model, workload, layout)
    layer = layer_of(model, size, stack)
    again = layer.kept(layout.recompute, stack.selective)
    head = head_activations(
        model, size, fusion=stack.fusion, fuses_norms=stack.fuses_norms, fuses_loss=stack.fuses_loss
    )
    stages = [
        num_layers * layer.total - layout.recomputed(stage) * (layer.total - again)
        for stage, num_layers in enumerate(layout.stage_layers)
    ]
    return (*stages[:-1], stages[-1] + head)
