"""Read a Hugging Face `config.json` of a LLaMA-like decoder; nothing is fetched, nothing is run."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiles.errors import InvalidInputError, Problem, UnsupportedError
from profiles.files import read_json
from profiles.model import ModelSpec, RopeScaling

# Families whose decoder is RMSNorm, RoPE, SwiGLU, without biases, when the fields below agree.
LLAMA_LIKE = ("llama", "mistral")
_LARGEST = 10**9
_WAY_OUT = "use a LLaMA-like model, or write the shape out in [model]"
# Fields that change the mathematics; any other value than these is not a LLaMA.
_MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "quantization_config": (None,),
    "logit_scale": (None, 1, 1.0),
    "partial_rotary_factor": (None, 1, 1.0),
}


@dataclass(slots=True)
class _Reader:
    """Takes typed fields out of one config and collects what is wrong with them."""

    path: Path
    config: Mapping[str, Any]
    invalid: list[Problem] = field(default_factory=list)
    unsupported: list[Problem] = field(default_factory=list)

    def reject(self, key: str, found: object, rule: str, fix: str, *, invalid: bool = True) -> None:
        shown = json.dumps(found, default=str)[:60]
        problem = Problem(where=f"{self.path}: {key}", found=shown, rule=rule, fix=fix)
        (self.invalid if invalid else self.unsupported).append(problem)

    def count(self, key: str, default: int | None = None) -> int:
        """Return a whole number of at least 1; 1 stands in for a wrong one until all is read."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if key not in self.config or value is None:
            self.invalid.append(
                Problem(where=f"{self.path}: {key}", found="missing",
                        rule="must be a whole number from 1", fix=_WAY_OUT)
            )  # fmt: skip
        elif isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
            self.reject(key, value, f"must be a whole number from 1 to {_LARGEST:,}", "correct it")
        else:
            return value
        return 1

    def number(self, table: Mapping[str, Any], key: str, name: str, default: float | None) -> float:
        """Return a finite positive number; 1.0 stands in for a wrong one until all is read."""
        value = table.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and 0 < value < math.inf:
            return float(value)
        self.reject(name, value, "must be a number above 0", "correct it")
        return 1.0

    def is_sound(self, *keys: str) -> bool:
        """Return whether no problem with any of `keys` was found so far."""
        wrong = {problem.where for problem in self.invalid}
        return not any(f"{self.path}: {key}" in wrong for key in keys)

    def flag(self, key: str) -> bool:
        value = self.config.get(key, False)
        if not isinstance(value, bool):
            self.reject(key, value, "must be true or false", "correct it")
        return value is True


def read_hf_config(path: Path) -> ModelSpec:
    """Return the shape in `path`, a `config.json` of a LLaMA-like decoder.

    Older and newer forms are read: `num_key_value_heads` and `head_dim` may be missing, RoPE is in
    `rope_theta` and `rope_scaling` or in `rope_parameters`. `auto_map` and the like are ignored:
    no code of the model is loaded. The name is that of `_name_or_path`, else of the folder.

    Raises InvalidInputError for fields that are missing or wrong, and UnsupportedError for a
    well-formed model that is no LLaMA; either message has all problems, one a line.
    """
    config = read_json(path, "Hugging Face config.json")
    if not isinstance(config, dict):
        raise InvalidInputError([f"{path}: not a Hugging Face config.json: it holds no object"])
    reader = _Reader(path, config)
    _check_family(reader)
    if reader.unsupported and not (config.keys() & {"hidden_size", "num_hidden_layers"}):
        # Another family names its fields otherwise; that they are missing says nothing more.
        raise UnsupportedError("\n".join(map(str, reader.unsupported)))
    fields = _shape(reader)
    theta, scaling = _rope(reader)
    epsilon = reader.number(config, "rms_norm_eps", "rms_norm_eps", 1e-6)
    is_tied = reader.flag("tie_word_embeddings")
    if reader.invalid:
        raise InvalidInputError(reader.invalid + reader.unsupported)
    if reader.unsupported:
        raise UnsupportedError("\n".join(map(str, reader.unsupported)))
    return ModelSpec(
        name=_name(path, config),
        **fields,
        tied_embeddings=is_tied,
        norm_eps=epsilon,
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _name(path: Path, config: Mapping[str, Any]) -> str:
    given = config.get("_name_or_path")
    if isinstance(given, str) and given.strip("/ "):
        return given.rstrip("/ ").rsplit("/", 1)[-1][:100]
    return path.resolve().parent.name or path.stem


def _check_family(reader: _Reader) -> None:
    config = reader.config
    family = config.get("model_type", "llama")
    if family not in LLAMA_LIKE:
        why = " (its query, key and value have biases)" if family == "qwen2" else ""
        reader.reject("model_type", family, f"must be one of {', '.join(LLAMA_LIKE)}{why}",
                      _WAY_OUT, invalid=False)  # fmt: skip
    for key, allowed in _MUST_BE.items():
        value = config.get(key, allowed[0])
        is_same = any(value == each and type(value) is type(each) for each in allowed)
        if not is_same:
            needed = "absent" if allowed[0] is None else json.dumps(allowed[0])
            reader.reject(key, value, f"must be {needed} in a LLaMA", _WAY_OUT, invalid=False)
    kinds = config.get("layer_types")
    if kinds is not None and not (
        isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    ):
        reader.reject("layer_types", kinds, "must be full_attention in every layer", _WAY_OUT,
                      invalid=False)  # fmt: skip
    window, reach = config.get("sliding_window"), config.get("max_position_embeddings")
    uses_window = config.get("use_sliding_window", True) is not False
    if window is not None and uses_window and not (
        isinstance(window, int) and isinstance(reach, int) and window >= reach
    ):  # fmt: skip
        reader.reject("sliding_window", window,
                      "must be absent, or at least max_position_embeddings",
                      "attention over a window is not modelled; " + _WAY_OUT,
                      invalid=False)  # fmt: skip


def _shape(reader: _Reader) -> dict[str, Any]:
    hidden = reader.count("hidden_size")
    heads = reader.count("num_attention_heads")
    kv_heads = reader.count("num_key_value_heads", default=heads)
    is_derived = reader.config.get("head_dim") is None
    if is_derived and hidden % heads and reader.is_sound("hidden_size", "num_attention_heads"):
        reader.reject("num_attention_heads", heads,
                      f"must divide hidden_size ({hidden}) where head_dim is missing",
                      "add head_dim")  # fmt: skip
    head_size = reader.count("head_dim", default=max(1, hidden // heads))
    if heads % kv_heads and reader.is_sound("num_attention_heads", "num_key_value_heads"):
        reader.reject("num_key_value_heads", kv_heads,
                      f"must divide num_attention_heads ({heads})", "correct it")  # fmt: skip
    if head_size % 2 and reader.is_sound("hidden_size", "num_attention_heads", "head_dim"):
        reader.reject("head_dim", head_size, "must be even for RoPE", "correct it")
    return {
        "num_layers": reader.count("num_hidden_layers"),
        "hidden": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_size": head_size,
        "ffn": reader.count("intermediate_size"),
        "vocab": reader.count("vocab_size"),
        "max_seq_len": reader.count("max_position_embeddings", default=2048),
    }


def _rope(reader: _Reader) -> tuple[float, RopeScaling | None]:
    """Return theta and the scaling, from `rope_parameters` or from the two older fields."""
    config = reader.config
    where = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    table = config.get(where)
    theta_table: Mapping[str, Any] = config
    theta_name = "rope_theta"
    if isinstance(table, dict) and "rope_theta" in table:
        theta_table, theta_name = table, f"{where}.rope_theta"
    theta = reader.number(theta_table, "rope_theta", theta_name, 10_000.0)
    if table is None:
        return theta, None
    if not isinstance(table, dict):
        reader.reject(where, table, "must be an object or null", "correct it")
        return theta, None
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        reader.reject(f"{where}.rope_type", kind, "must be default or llama3",
                      "remove the scaling to plan for the shorter sequence; other kinds are not "
                      "modelled", invalid=False)  # fmt: skip
        return theta, None
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (reader.number(table, key, f"{where}.{key}", None) for key in keys)
    original = table.get("original_max_position_embeddings")
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        reader.reject(f"{where}.original_max_position_embeddings", original,
                      "must be a whole number from 1", "correct it")  # fmt: skip
        original = 1
    return theta, RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_seq_len=original
    )
