"""The kernels of a LLaMA stage: which ops run on one rank, at which shapes, for one micro-batch.

Legend: m = micro_batch * seq_len rows; h hidden; q and kv the local widths of the query and of the
key/value heads; f the local inner width of the MLP; v the local vocabulary. Tensor parallelism
divides q, kv, f and v, and leaves h whole (no sequence parallelism yet).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from profiles.model import ModelSpec


class Kernel(NamedTuple):
    """One call of one op at one shape; the table of ops is in `profiles.profile`."""

    op: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShape:
    """The local shapes of one rank: a model cut by `tp`, and a micro-batch of sequences."""

    model: ModelSpec
    tp: int
    micro_batch: int
    seq_len: int

    @property
    def rows(self) -> int:
        """Tokens of one micro-batch."""
        return self.micro_batch * self.seq_len

    @property
    def q_width(self) -> int:
        """Width of the local query heads."""
        return self.model.num_heads * self.model.head_size // self.tp

    @property
    def kv_width(self) -> int:
        """Width of the local key heads, and of the value heads."""
        return self.model.num_kv_heads * self.model.head_size // self.tp

    @property
    def ffn(self) -> int:
        """Local inner width of the MLP."""
        return self.model.ffn // self.tp

    @property
    def vocab(self) -> int:
        """Local rows of the embedding and of the LM head."""
        return self.model.vocab // self.tp

    @property
    def attention(self) -> tuple[int, int, int, int, int]:
        """(batch, heads, kv heads, seq, head) of the local attention."""
        heads, kv_heads = self.model.num_heads // self.tp, self.model.num_kv_heads // self.tp
        return (self.micro_batch, heads, max(1, kv_heads), self.seq_len, self.model.head_size)

    @property
    def layer_linears(self) -> tuple[tuple[int, int, int], ...]:
        """(m, n, k) of q, k, v, o, gate, up and down."""
        m, h, q, kv, f = self.rows, self.model.hidden, self.q_width, self.kv_width, self.ffn
        return ((m, q, h), (m, kv, h), (m, kv, h), (m, h, q), (m, f, h), (m, f, h), (m, h, f))

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one layer on one rank; norms are whole on each."""
        return sum(n * k for _, n, k in self.layer_linears) + 2 * self.model.hidden


LINEARS_PER_LAYER = 7


def layer_forward(shape: StageShape) -> tuple[Kernel, ...]:
    """Return the kernels of one layer's forward."""
    m, h = shape.rows, shape.model.hidden
    return (
        *(Kernel("linear_forward", linear) for linear in shape.layer_linears),
        Kernel("norm_forward", (m, h)),
        Kernel("norm_forward", (m, h)),
        Kernel("rope_forward", (m * (shape.q_width + shape.kv_width),)),
        Kernel("attention_forward", shape.attention),
        Kernel("swiglu_forward", (m * shape.ffn,)),
        Kernel("add_forward", (m * h,)),
        Kernel("add_forward", (m * h,)),
    )


def layer_backward(shape: StageShape) -> tuple[Kernel, ...]:
    """Return the kernels of one layer's backward.

    Sums of gradients, one `add_backward` each: two where q, k and v meet, one where gate and up
    meet, one at each of the two residuals.
    """
    m, h = shape.rows, shape.model.hidden
    return (
        *(Kernel("linear_dgrad", linear) for linear in shape.layer_linears),
        *(Kernel("linear_wgrad", linear) for linear in shape.layer_linears),
        Kernel("norm_backward", (m, h)),
        Kernel("norm_backward", (m, h)),
        Kernel("rope_backward", (m * (shape.q_width + shape.kv_width),)),
        Kernel("attention_backward", shape.attention),
        Kernel("swiglu_backward", (m * shape.ffn,)),
        *(Kernel("add_backward", (m * h,)) for _ in range(5)),
    )


WEIGHT_OPS = frozenset({"linear_wgrad", "embedding_backward"})
"""The ops of a backward that make weight gradients and nothing else: a schedule may do them later.

The backward of a norm makes the gradients of its input and of its weight at once.
"""


def weight_half(backward: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """Return the kernels of `backward` that make weight gradients only."""
    return tuple(kernel for kernel in backward if kernel.op in WEIGHT_OPS)


def first_stage(shape: StageShape) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Return what the first stage runs beside its layers, forward and backward: the embedding."""
    table = (shape.rows, shape.model.hidden, shape.vocab)
    return (Kernel("embedding_forward", table),), (Kernel("embedding_backward", table),)


def last_stage(shape: StageShape) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Return what the last stage runs beside its layers: final norm, LM head, cross-entropy."""
    m, h, v = shape.rows, shape.model.hidden, shape.vocab
    forward = (
        Kernel("norm_forward", (m, h)),
        Kernel("linear_forward", (m, v, h)),
        Kernel("cross_entropy_forward", (m, v)),
    )
    backward = (
        Kernel("cross_entropy_backward", (m, v)),
        Kernel("linear_dgrad", (m, v, h)),
        Kernel("linear_wgrad", (m, v, h)),
        Kernel("norm_backward", (m, h)),
    )
    return forward, backward


def stage_parameters(shape: StageShape, stage_layers: Sequence[int], stage: int) -> int:
    """Return the parameters that one rank of `stage` holds."""
    model = shape.model
    count = stage_layers[stage] * shape.num_layer_parameters
    if stage == 0:
        count += shape.vocab * model.hidden
    if stage == len(stage_layers) - 1:
        head = 0 if model.tied_embeddings else shape.vocab * model.hidden
        count += head + model.hidden
    return count
