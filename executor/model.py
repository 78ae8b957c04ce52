"""LLaMA in plain PyTorch, cut into stages that keep the parameter names of the whole model.

Shape letters in comments: B sequences, S positions, D hidden, H heads, K key-value heads,
E head size, F feed-forward width, V vocabulary. Under tensor parallelism H, K, F and V are the
local counts of one rank: no layer needs to know its rank. Names of modules are those of Hugging
Face's LLaMA.
"""

import hashlib
import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from executor.halves import Linear, WeightHalf
from executor.shards import as_parameter_shard, local, shard_like
from profiles.errors import UnsupportedError
from profiles.model import ModelSpec, RopeScaling

INIT_STD = 0.02
"""Standard deviation of every matrix at the start, as in GPT-2 and LLaMA's public re-trainings."""


def rope_frequencies(spec: ModelSpec) -> Tensor:
    """Return the angular frequencies [E / 2] of RoPE in radians per position, in float64.

    f_i = theta^(-2 i / E); with `rope_scaling` the long wavelengths are stretched by `factor` and
    those between the two thresholds blended. Source: LLaMA 3.1's `apply_scaling`.
    """
    exponents = torch.arange(0, spec.head_size, 2, dtype=torch.float64) / spec.head_size
    frequencies = spec.rope_theta**-exponents
    if spec.rope_scaling is None:
        return frequencies
    return _scaled(frequencies, spec.rope_scaling)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 0 where a wavelength is long (stretched in full), 1 where it is short (left alone).
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rope_table(spec: ModelSpec, seq_len: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [S, 1, E / 2] of every position, in float64."""
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), rope_frequencies(spec))
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` [B, S, H, E] with its halves rotated by the angles of `cos`, `sin` [S, 1, E / 2].

    The convention is Hugging Face's: element i turns together with element i + E / 2.
    """
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


class Attention(nn.Module):
    """Causal self-attention with RoPE and shared key-value heads."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_size = spec.head_size
        self.has_groups = spec.num_kv_heads < spec.num_heads
        q_width = spec.num_heads * spec.head_size
        kv_width = spec.num_kv_heads * spec.head_size
        self.q_proj = Linear(spec.hidden, q_width)
        self.k_proj = Linear(spec.hidden, kv_width)
        self.v_proj = Linear(spec.hidden, kv_width)
        self.o_proj = Linear(q_width, spec.hidden)

    def forward(self, x: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the attention's output [B, S, D] for `x` [B, S, D]."""
        batch, seq_len, _ = x.shape
        heads = (batch, seq_len, -1, self.head_size)
        q = rotate(self.q_proj(x).view(heads), cos, sin).transpose(1, 2)  # [B, H, S, E]
        k = rotate(self.k_proj(x).view(heads), cos, sin).transpose(1, 2)  # [B, K, S, E]
        v = self.v_proj(x).view(heads).transpose(1, 2)  # [B, K, S, E]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.has_groups)
        return self.o_proj(out.transpose(1, 2).reshape(batch, seq_len, -1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = Linear(spec.hidden, spec.ffn)
        self.up_proj = Linear(spec.hidden, spec.ffn)
        self.down_proj = Linear(spec.ffn, spec.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward output [B, S, D] for `x` [B, S, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One decoder layer with its two residual sums."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.hidden, eps=spec.norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden, eps=spec.norm_eps)
        self.mlp = Mlp(spec)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the hidden states [B, S, D] after this layer for `x` [B, S, D]."""
        x = x + self.self_attn(self.input_layernorm(x), cos=cos, sin=sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class LlamaStage(nn.Module):
    """The layers `layers` of a LLaMA, with the embedding if first and the LM head if last.

    If `splits_backward`, backwards leave the gradients of linears in `weight_half`; a tied LM head
    is no such linear, because its gradient and that of the embedding are one.
    Raises UnsupportedError for a model that is not LLaMA-like, and for tied embeddings that lie on
    two different stages.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        spec: ModelSpec,
        layers: range,
        is_first: bool,
        is_last: bool,
        splits_backward: bool = False,
    ) -> None:
        super().__init__()
        check_model(spec, is_cut=not (is_first and is_last))
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab, spec.hidden) if is_first else None
        # Keys are the layer's number in the whole model, so that names do not depend on the cut.
        self.layers = nn.ModuleDict({str(number): Layer(spec) for number in layers})
        self.norm = nn.RMSNorm(spec.hidden, eps=spec.norm_eps) if is_last else None
        self.lm_head = Linear(spec.hidden, spec.vocab) if is_last else None
        self.tie()
        self.weight_half = WeightHalf()
        for module in self.modules():
            is_tied = module is self.lm_head and spec.tied_embeddings
            if splits_backward and isinstance(module, Linear) and not is_tied:
                module.weight_half = self.weight_half

    def tie(self) -> None:
        """Make LM head and embedding one parameter again, if the model ties them."""
        if self.spec.tied_embeddings and self.embed_tokens and self.lm_head:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return hidden states [B, S, D], or logits [B, S, V] on the last stage.

        `x` holds token ids [B, S] on the first stage, hidden states [B, S, D] on the others.
        """
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        for layer in self.layers.values():
            x = layer(x, cos, sin)
        if self.norm is not None and self.lm_head is not None:
            x = self.lm_head(self.norm(x))
        return x

    def materialise(
        self, seed: int, seq_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Give every parameter its storage on `device` and its first value.

        Each parameter is drawn in full, in fp32 on the CPU, from a generator seeded by `seed` and
        its name, and then cut to the shard of this rank: all layouts start bit-equal.
        """
        self._allocate(device, dtype)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                local(parameter).copy_(shard_like(self._first_value(name, seed, parameter.shape),
                                                  parameter))  # fmt: skip
        cos, sin = rope_table(self.spec, seq_len)
        self.register_buffer("cos", cos.to(device=device, dtype=dtype), persistent=False)
        self.register_buffer("sin", sin.to(device=device, dtype=dtype), persistent=False)

    def _allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                shard = torch.empty(local(parameter).shape, device=device, dtype=dtype)
                setattr(module, name, nn.Parameter(as_parameter_shard(shard, parameter)))
        self.tie()

    def _first_value(self, name: str, seed: int, shape: torch.Size) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        std = INIT_STD
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            # The residual stream sums 2 * layers such outputs (GPT-2, section 2.3).
            std /= math.sqrt(2 * self.spec.num_layers)
        return torch.empty(shape).normal_(std=std, generator=generator)


def check_model(spec: ModelSpec, is_cut: bool = False) -> None:
    """Raise UnsupportedError unless `spec` can be built; `is_cut`: in several stages."""
    if not spec.is_llama_like:
        raise UnsupportedError(
            f"model {spec.name}: norm {spec.norm}, mlp {spec.mlp}, positions {spec.positions}"
            f"{', biases' if spec.has_biases else ''}: only rmsnorm, swiglu, rope without biases "
            "can be run; use a LLaMA-like model, or only simulate this one"
        )
    if spec.tied_embeddings and is_cut:
        raise UnsupportedError(
            f"model {spec.name}: tied_embeddings cannot be cut into pipeline stages, because the "
            "first and the last stage would share a parameter; use pp = 1"
        )
