"""`ModelSpec`: the shape of a decoder-only transformer, and the counts that follow from it."""

from dataclasses import dataclass
from typing import Literal

Norm = Literal["rmsnorm", "layernorm"]
Mlp = Literal["swiglu", "gelu"]
Positions = Literal["rope", "learned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """The frequency scaling of LLaMA 3.1 and later (`rope_type: llama3`); factors are ratios."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape of one decoder-only transformer.

    A LLaMA has `norm="rmsnorm"`, `mlp="swiglu"`, `positions="rope"` and no biases; the GPT-3 and
    Megatron shapes have `layernorm`, `gelu`, `learned` and biases. With `num_experts` the MLP of
    every layer is that many experts of inner width `ffn`, of which a router gives each token
    `experts_per_token`, and `num_shared_experts` more through which every token goes.

    >>> tiny = ModelSpec(name="tiny", num_layers=2, hidden=64, num_heads=4, num_kv_heads=2,
    ...                  head_size=16, ffn=128, vocab=256, max_seq_len=128)
    >>> tiny.num_parameters
    106816
    """

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    max_seq_len: int
    tied_embeddings: bool = False
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-5
    mlp: Mlp = "swiglu"
    positions: Positions = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    has_biases: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    num_shared_experts: int = 0

    def __post_init__(self) -> None:
        for field in ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_size", "ffn",
                      "vocab", "max_seq_len"):  # fmt: skip
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"model.{field} is {value}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads is {self.num_kv_heads}; "
                f"it must divide model.num_heads ({self.num_heads})"
            )
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(f"model.head_size is {self.head_size}; RoPE needs it to be even")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model.experts_per_token is {self.experts_per_token}; "
                f"it must be from 1 to model.num_experts ({self.num_experts})"
            )

    @property
    def is_llama_like(self) -> bool:
        """Whether the decoder is RMSNorm, RoPE, SwiGLU without biases and experts."""
        return (self.norm, self.mlp, self.positions, self.has_biases, self.num_experts) == (
            "rmsnorm", "swiglu", "rope", False, 0,
        )  # fmt: skip

    @property
    def num_mlp_parameters(self) -> int:
        """Parameters of the matrices of one MLP, or of one expert."""
        return (3 if self.mlp == "swiglu" else 2) * self.hidden * self.ffn

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one transformer layer."""
        q_width, kv_width = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        attention = self.hidden * (q_width + 2 * kv_width) + q_width * self.hidden
        mlp = self.num_mlp_parameters
        if self.num_experts:
            copies = self.num_experts + self.num_shared_experts
            mlp = copies * mlp + self.hidden * self.num_experts
        norms = 2 * self.hidden * (2 if self.norm == "layernorm" else 1)
        biases = 0
        if self.has_biases:
            biases = q_width + 2 * kv_width + self.hidden + self.ffn + self.hidden
        return attention + mlp + norms + biases

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters in front of the first layer: token (and learned position) embeddings."""
        positions = self.max_seq_len if self.positions == "learned" else 0
        return (self.vocab + positions) * self.hidden

    @property
    def num_head_parameters(self) -> int:
        """Parameters behind the last layer: the final norm and the LM head, 0 for a tied one."""
        head = 0 if self.tied_embeddings else self.vocab * self.hidden
        return head + self.hidden * (2 if self.norm == "layernorm" else 1)

    @property
    def num_parameters(self) -> int:
        """All parameters of the model."""
        return (
            self.num_layers * self.num_layer_parameters
            + self.num_embedding_parameters
            + self.num_head_parameters
        )

    def train_flops_per_token(self, seq_len: int) -> int:
        """Return the model flops of one token, forward and backward, for MFU.

        6 per matrix parameter that the token meets (the LM head counts; the embedding look-up and
        the experts it is not given to do not) plus causal
        attention, 6 * layers * heads * head_size * seq_len: half of the full 12, since a token
        attends to the tokens before it. Source: PaLM (arXiv:2204.02311), appendix B, with the
        causal half taken as in Megatron-LM's later reports.
        """
        norms = 2 * self.hidden * (2 if self.norm == "layernorm" else 1)
        idle = max(0, self.num_experts - self.experts_per_token) * self.num_mlp_parameters
        layer = self.num_layer_parameters - norms - idle
        matrices = self.num_layers * layer + self.vocab * self.hidden
        return 6 * matrices + 6 * self.num_layers * self.num_heads * self.head_size * seq_len
