import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from executor.model import LlamaStage, rope_frequencies
from profiles.errors import UnsupportedError
from profiles.model import ModelSpec, RopeScaling
from tests.plans import TINY

SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64
)
SPECS = {
    "grouped": TINY,
    "all_heads": replace(TINY, num_kv_heads=4),
    "tied": replace(TINY, tied_embeddings=True),
    "wide_heads": replace(TINY, head_size=32, rope_theta=500_000.0, norm_eps=1e-6),
    "scaled": replace(TINY, rope_scaling=SCALING),
}


def stage(
    spec: ModelSpec, layers: range | None = None, is_first: bool = True, is_last: bool = True
) -> LlamaStage:
    with torch.device("meta"):
        built = LlamaStage(spec, layers or range(spec.num_layers), is_first, is_last)
    built.materialise(0, 32, torch.device("cpu"), torch.float64)
    return built


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def frequency(spec: ModelSpec, pair: int) -> float:
    """The frequency of one pair, after Meta's `apply_scaling` of LLaMA 3.1, branch by branch."""
    value = spec.rope_theta ** (-2 * pair / spec.head_size)
    scaling = spec.rope_scaling
    if scaling is None:
        return float(value)
    wavelength = 2 * math.pi / value
    if wavelength < scaling.original_max_seq_len / scaling.high_freq_factor:
        return float(value)
    if wavelength > scaling.original_max_seq_len / scaling.low_freq_factor:
        return float(value / scaling.factor)
    smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return float((1 - smooth) * value / scaling.factor + smooth * value)


def turned(vector: Tensor, position: int, spec: ModelSpec) -> Tensor:
    """One head's vector [E] at one position, turned pair by pair."""
    half = spec.head_size // 2
    out = torch.empty_like(vector)
    for pair in range(half):
        angle = position * frequency(spec, pair)
        a, b = vector[pair], vector[pair + half]
        out[pair] = a * math.cos(angle) - b * math.sin(angle)
        out[pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def reference_logits(weights: dict[str, Tensor], spec: ModelSpec, ids: list[int]) -> Tensor:
    """Logits [S, V] of one sequence, formula by formula, without batches and without fusing."""
    size, group = spec.head_size, spec.num_heads // spec.num_kv_heads
    x = torch.stack([weights["embed_tokens.weight"][token] for token in ids])
    for number in range(spec.num_layers):
        w = {
            key.removeprefix(f"layers.{number}."): value
            for key, value in weights.items()
            if key.startswith(f"layers.{number}.")
        }
        y = norm(x, w["input_layernorm.weight"], spec.norm_eps)
        heads = []
        for head in range(spec.num_heads):
            own, shared = slice(head * size, (head + 1) * size), head // group
            kv = slice(shared * size, (shared + 1) * size)
            q = y @ w["self_attn.q_proj.weight"][own].T
            k = y @ w["self_attn.k_proj.weight"][kv].T
            v = y @ w["self_attn.v_proj.weight"][kv].T
            q = torch.stack([turned(row, i, spec) for i, row in enumerate(q)])
            k = torch.stack([turned(row, i, spec) for i, row in enumerate(k)])
            rows = []
            for i in range(len(ids)):
                scores = (k[: i + 1] @ q[i]) / math.sqrt(size)
                share = scores.exp() / scores.exp().sum()
                rows.append(share @ v[: i + 1])
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, -1) @ w["self_attn.o_proj.weight"].T
        y = norm(x, w["post_attention_layernorm.weight"], spec.norm_eps)
        gate = y @ w["mlp.gate_proj.weight"].T
        inner = gate / (1 + (-gate).exp()) * (y @ w["mlp.up_proj.weight"].T)
        x = x + inner @ w["mlp.down_proj.weight"].T
    head_name = "embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"
    return norm(x, weights["norm.weight"], spec.norm_eps) @ weights[head_name].T


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_those_of_the_formulas(name: str) -> None:
    spec = SPECS[name]
    model = stage(spec)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # large weights, so that every term counts
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise
    ids = [3, 255, 0, 17, 17, 90, 4, 128, 31, 7, 64, 2] * 2
    with torch.no_grad():
        found = model(torch.tensor([ids]))[0]
        expected = reference_logits(dict(model.named_parameters()), spec, ids)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_scaled_frequencies_take_all_three_branches() -> None:
    spec = SPECS["scaled"]
    expected = [frequency(spec, pair) for pair in range(spec.head_size // 2)]
    plain = rope_frequencies(TINY)
    ratios = torch.tensor(expected, dtype=torch.float64) / plain
    assert ratios[0] == 1 and ratios[-1] == 1 / 8
    assert any(1 / 8 < ratio < 1 for ratio in ratios.tolist())
    assert torch.allclose(rope_frequencies(spec), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", SPECS)
def test_parameters_are_as_many_as_the_spec_says(name: str) -> None:
    spec = SPECS[name]
    with torch.device("meta"):
        model = LlamaStage(spec, range(spec.num_layers), True, True)
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.num_parameters


def test_stages_are_the_whole_model_cut() -> None:
    whole = dict(stage(TINY).named_parameters())
    cut: dict[str, Tensor] = {}
    for first, last in ((0, 1), (1, 4)):
        part = stage(TINY, range(first, last), first == 0, last == 4)
        cut |= dict(part.named_parameters())
    assert list(cut) and cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_tied_embeddings_stay_one_parameter() -> None:
    model = stage(SPECS["tied"])
    assert model.embed_tokens is not None and model.lm_head is not None
    assert model.lm_head.weight is model.embed_tokens.weight


def test_what_cannot_be_built_is_named() -> None:
    gpt = replace(TINY, norm="layernorm", mlp="gelu", positions="learned", has_biases=True)
    with pytest.raises(UnsupportedError, match=r"layernorm.*gelu.*learned.*biases"):
        LlamaStage(gpt, range(4), True, True)
    with pytest.raises(UnsupportedError, match="tied_embeddings"):
        LlamaStage(SPECS["tied"], range(2), True, False)
