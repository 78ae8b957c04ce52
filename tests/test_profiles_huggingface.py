"""Hugging Face configs: old and new forms, and models that are no LLaMA."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from profiles.errors import InvalidInputError, UnsupportedError
from profiles.huggingface import read_hf_config
from profiles.presets import model_preset

LLAMA_3_2_1B: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-3.2-1B",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_2_13B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GPT_2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "vocab_size": 50257,
}


def _write(tmp_path: Path, config: object) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def _same_shape(config: dict[str, Any], preset: str, tmp_path: Path) -> None:
    model = read_hf_config(_write(tmp_path, config))
    assert dataclasses.replace(model, name=preset) == model_preset(preset)


def test_configs_give_the_shape_of_their_preset(tmp_path: Path) -> None:
    _same_shape(LLAMA_3_2_1B, "llama-3.2-1b", tmp_path)
    _same_shape(LLAMA_2_13B, "llama-2-13b", tmp_path)
    assert read_hf_config(_write(tmp_path, LLAMA_3_2_1B)).name == "Llama-3.2-1B"
    assert read_hf_config(_write(tmp_path, LLAMA_2_13B)).name == tmp_path.name


def test_rope_parameters_replace_the_two_older_fields(tmp_path: Path) -> None:
    config = dict(LLAMA_3_2_1B)
    config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": 500000.0}
    del config["rope_theta"]
    _same_shape(config, "llama-3.2-1b", tmp_path)
    plain = {**LLAMA_2_13B, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}}
    _same_shape(plain, "llama-2-13b", tmp_path)


def test_no_code_of_the_model_counts(tmp_path: Path) -> None:
    config = {**LLAMA_2_13B, "auto_map": {"AutoConfig": "evil.Config"}}
    _same_shape(config, "llama-2-13b", tmp_path)


def test_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    mistral = {**LLAMA_2_13B, "model_type": "mistral", "sliding_window": None}
    assert read_hf_config(_write(tmp_path, mistral)).is_llama_like
    with pytest.raises(UnsupportedError, match="sliding_window is 1024"):
        read_hf_config(_write(tmp_path, {**mistral, "sliding_window": 1024}))
    read_hf_config(_write(tmp_path, {**mistral, "sliding_window": 4096}))
    read_hf_config(
        _write(tmp_path, {**mistral, "sliding_window": 1024, "use_sliding_window": False})
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2"}, "its query, key and value have biases"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "num_local_experts is 8"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; it must be "silu"'),
        ({"attention_bias": True}, "attention_bias is true; it must be false"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type is "linear"'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 'rope_type is "yarn"'),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_other_mathematics_is_unsupported(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_hf_config(_write(tmp_path, {**LLAMA_2_13B, **change}))
    assert words in str(caught.value)


def test_another_family_is_named_without_noise(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_hf_config(_write(tmp_path, GPT_2))
    assert "\n" not in str(caught.value)
    assert 'model_type is "gpt2"; it must be one of llama, mistral' in str(caught.value)


def test_all_wrong_fields_are_told_at_once(tmp_path: Path) -> None:
    config = {
        **LLAMA_2_13B,
        "hidden_size": "5120",
        "num_hidden_layers": 0,
        "num_key_value_heads": 7,
        "rms_norm_eps": -1,
        "hidden_act": "relu",
        "rope_scaling": {"rope_type": "llama3", "factor": True},
        "tie_word_embeddings": 1,
    }
    del config["vocab_size"]
    with pytest.raises(InvalidInputError) as caught:
        read_hf_config(_write(tmp_path, config))
    names = [str(problem).partition(": ")[2].split(" ")[0] for problem in caught.value.problems]
    assert names == [
        "hidden_size", "num_key_value_heads", "num_hidden_layers", "vocab_size",
        "rope_scaling.factor", "rope_scaling.low_freq_factor", "rope_scaling.high_freq_factor",
        "rope_scaling.original_max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        "hidden_act",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000])
def test_what_is_no_config_is_one_clear_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=r"config\.json: ") as caught:
        read_hf_config(path)
    assert len(caught.value.problems) == 1


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no such file"):
        read_hf_config(tmp_path / "config.json")


def test_odd_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="must divide hidden_size"):
        read_hf_config(_write(tmp_path, {**LLAMA_2_13B, "num_attention_heads": 3}))
    with pytest.raises(InvalidInputError, match="must be even for RoPE"):
        read_hf_config(_write(tmp_path, {**LLAMA_2_13B, "head_dim": 65}))
