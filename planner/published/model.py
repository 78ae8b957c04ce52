"""The model of a published run: its shape out of the columns, checked against its parameters."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from planner.published.words import shown
from profiles.errors import UnsupportedError
from profiles.model import Mlp, ModelSpec, Norm, Positions
from profiles.presets import model_preset, model_presets

MODEL_COLUMNS = ("model", "params_b", "hidden", "ffn", "layers", "heads", "kv_heads", "head_dim",
                 "vocab", "tie_embeddings", "seq_len", "ep")  # fmt: skip
_FITS, _SAID = 1.06, 1.20
"""How far the counted parameters may be from the stated ones: in silence, and with a remark."""


class Shape(NamedTuple):
    """A model, and what was assumed on the way to it."""

    model: ModelSpec
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What models of a name have in common, where the columns do not say."""

    pattern: str
    vocab: int = 0
    tied: bool = False
    norm: Norm = "rmsnorm"
    mlp: Mlp = "swiglu"
    positions: Positions = "rope"
    has_biases: bool = False


_GPT = _Family(
    pattern=r"gpt|megatron|turing|mt-?nlg|opt\b|cerebras", vocab=51200, tied=True,
    norm="layernorm", mlp="gelu", positions="learned", has_biases=True,
)  # fmt: skip
_LLAMA = _Family(pattern=r"llama", vocab=32000)
_FAMILIES = (
    _Family(pattern=r"mpt", vocab=50368, tied=True, norm="layernorm", mlp="gelu",
            positions="learned"),
    # Squared ReLU has two matrices, as GELU has.
    _Family(pattern=r"nemotron|minitron", vocab=256000, norm="layernorm", mlp="gelu"),
    _Family(pattern=r"bloom", vocab=250880, tied=True, norm="layernorm", mlp="gelu",
            positions="learned", has_biases=True),
    _Family(pattern=r"falcon", vocab=65024, tied=True, norm="layernorm", mlp="gelu"),
    _Family(pattern=r"neox|pythia", vocab=50432, norm="layernorm", mlp="gelu", has_biases=True),
    _Family(pattern=r"llama[-_ ]?3", vocab=128256),
    _LLAMA,
    _Family(pattern=r"mistral|mixtral|tinyllama", vocab=32000),
    _Family(pattern=r"qwen[-_ ]?[23]", vocab=151936),
    _Family(pattern=r"gemma", vocab=256000, tied=True),
    _GPT,
)  # fmt: skip
"""The first whose pattern is in the model's name; vocabularies as in the released config files."""

_EXPERTS = (
    (r"(mixtral|\b)\D*8x7b", 8, 2, 14336),
    (r"8x22b", 8, 2, 16384),
    (r"qwen3.*30b.?a3b", 128, 8, 768),
    (r"qwen3.*235b.?a22b", 128, 8, 1536),
)
"""Experts, experts a token and the width of one; config.json of each on Hugging Face, 2025-05."""

_UNKNOWN = (
    r"\bbert|\bt5\b|\bul2\b|\bvit\b|swin|diffusion|\bdit\b|mamba|jamba|rwkv|hyena|whisper|clip"
    r"|llava|vision|vlm|[-_ ]vl\b|deepseek|kimi|minimax|nemotron-?h\b|gpt-?oss|flux"
)
_TUNED = r"\bq?lora\b|peft|\bdpo\b|\bppo\b|\bgrpo\b|rlhf|adapter|pruned|distil"


def whole(cells: Mapping[str, str], column: str, at_most: int, default: int = 0) -> int:
    """Return the whole positive number in a cell, `default` where it is empty.

    Raises UnsupportedError for anything else, and for more than `at_most`.

    >>> whole({"tp": " 8.0 "}, "tp", 64), whole({"tp": ""}, "tp", 64, 1)
    (8, 1)
    """
    value = positive(cells, column, at_most)
    if value != int(value):
        raise UnsupportedError(f"{column} is {shown(cells[column])}; it must be a whole number")
    return int(value) or default


def positive(cells: Mapping[str, str], column: str, at_most: float) -> float:
    """Return the positive number in a cell, 0 where it is empty; raises as `whole` does."""
    text = cells.get(column, "").strip()
    if not text:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        raise UnsupportedError(f"{column} is {shown(text)}; it must be a number") from None
    if not 0 < value <= at_most:
        raise UnsupportedError(
            f"{column} is {shown(text)}; it must be above 0 and at most {at_most:g}"
        )
    return value


def read_model(cells: Mapping[str, str]) -> Shape:
    """Return the model that the columns of a row describe, and what was assumed.

    Where the columns leave something open (gated or plain MLP, shared key heads, tied embeddings),
    the variant is taken that the model's name tells, or the one whose parameters are nearest to
    the stated ones. Raises UnsupportedError for missing or contradictory columns and for models
    that are no decoder-only transformer.
    """
    return _read_model(tuple(cells.get(column, "").strip() for column in MODEL_COLUMNS))


@lru_cache(maxsize=4096)
def _read_model(texts: tuple[str, ...]) -> Shape:
    cells = dict(zip(MODEL_COLUMNS, texts, strict=True))
    name = cells["model"].lower()
    for pattern, what in ((_UNKNOWN, "no decoder of plain attention"), (_TUNED, "no pre-training")):
        if found := re.search(pattern, name):
            raise UnsupportedError(f"model {shown(cells['model'])} is {what} ({found[0].strip()})")
    family = _family(cells)
    cells, remarks = _filled(cells, name)
    variants = list(_variants(cells, family, name))
    vocab = whole(cells, "vocab", 4_000_000)
    if not vocab:
        vocab, said = _vocab(cells, family, variants[0])
        remarks += (said,)
    variants = [replace(variant, vocab=vocab) for variant in variants]
    chosen, said = _matching(variants, cells["params_b"], positive(cells, "params_b", 1e5) * 1e9)
    return Shape(chosen, remarks + ((said,) if said else ()))


def _family(cells: Mapping[str, str]) -> _Family:
    """Return the family of a name; of an unknown one, the family that the MLP's width tells."""
    name = cells["model"].lower()
    for family in _FAMILIES:
        if re.search(family.pattern, name):
            return family
    is_plain = positive(cells, "ffn", 1e7) == 4 * positive(cells, "hidden", 1e6)
    return replace(_GPT if is_plain else _LLAMA, vocab=0)


def _filled(cells: Mapping[str, str], name: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the cells with missing widths from the preset of that name, or by the usual rule."""
    filled, remarks = dict(cells), []
    found = re.search(r"llama[-_ ]?(\d(?:\.\d)?)[-_ ]?(\d{1,3})b", name)
    known = f"llama-{found[1]}-{found[2]}b" if found else name.replace("_", "-").replace(" ", "-")
    preset = model_preset(known) if known in model_presets() else None
    for column, field in (("layers", "num_layers"), ("hidden", "hidden"), ("heads", "num_heads"),
                          ("ffn", "ffn"), ("kv_heads", "num_kv_heads")):  # fmt: skip
        if not filled[column] and preset is not None:
            filled[column] = str(getattr(preset, field))
            remarks.append(f"{column} not stated: as in {known}")
    hidden = whole(filled, "hidden", 1_000_000)
    if not filled["heads"] and hidden:
        heads = _heads(hidden, whole(filled, "head_dim", 4096))
        filled["heads"] = str(heads)
        remarks.append(f"heads not stated: {heads} of {hidden // heads} assumed")
    missing = [name for name in ("layers", "hidden", "heads", "seq_len") if not filled[name]]
    if missing:
        raise UnsupportedError(f"{' and '.join(missing)} not stated")
    return filled, tuple(remarks)


def _heads(hidden: int, size: int) -> int:
    """Return how many heads there are of `size`; where 0, by eights, of a size nearest to 128.

    >>> _heads(4096, 0), _heads(13824, 0), _heads(768, 64)
    (32, 96, 12)
    """
    counts = [count for count in range(8, hidden // 16, 8) if hidden % count == 0]
    if size or not counts:
        return max(1, hidden // (size or 128))
    return min(counts, key=lambda count: abs(hidden // count - 128))


def _variants(cells: Mapping[str, str], family: _Family, name: str) -> Iterator[ModelSpec]:
    """Yield the models that the cells allow, the likeliest first."""
    hidden, heads = whole(cells, "hidden", 1_000_000), whole(cells, "heads", 10_000)
    size = whole(cells, "head_dim", 4096) or hidden // heads
    if size == 0 or (not cells["head_dim"] and hidden % heads):
        raise UnsupportedError(f"hidden ({hidden}) is no multiple of heads ({heads})")
    ffn, seq_len = whole(cells, "ffn", 10_000_000), whole(cells, "seq_len", 10_000_000)
    kv_heads = whole(cells, "kv_heads", heads)
    tied = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
        cells["tie_embeddings"].lower()
    )
    expert = next((row[1:] for row in _EXPERTS if re.search(row[0], name)), None)
    if expert is None and whole(cells, "ep", 100_000, 1) > 1:
        raise UnsupportedError(f"experts of {shown(cells['model'])} are not known (ep > 1)")
    gated = -(-8 * hidden // 3 // 256) * 256
    mlps: tuple[Mlp, Mlp] = ("swiglu", "gelu") if family.mlp == "swiglu" else ("gelu", "swiglu")
    key_heads = (kv_heads,) if kv_heads else (heads, 8) if heads % 8 == 0 < heads - 8 else (heads,)
    ties = (tied,) if tied is not None else (family.tied, not family.tied)
    for mlp, kv, is_tied in product(mlps, key_heads, ties):
        yield ModelSpec(
            name=cells["model"][:80] or "unnamed",
            num_layers=whole(cells, "layers", 10_000),
            hidden=hidden,
            num_heads=heads,
            num_kv_heads=kv,
            head_size=size,
            ffn=expert[2] if expert else ffn or (gated if mlp == "swiglu" else 4 * hidden),
            vocab=1,
            max_seq_len=seq_len,
            tied_embeddings=is_tied,
            norm=family.norm,
            mlp=mlp,
            positions=family.positions,
            has_biases=family.has_biases,
            num_experts=expert[0] if expert else 0,
            experts_per_token=expert[1] if expert else 0,
        )


def _vocab(cells: Mapping[str, str], family: _Family, model: ModelSpec) -> tuple[int, str]:
    """Return the vocabulary of a name; of an unknown one, what the parameters leave for it."""
    if family.vocab:
        return family.vocab, f"vocab not stated: {family.vocab}, as its family has"
    stated = positive(cells, "params_b", 1e5) * 1e9
    copies = 1 if model.tied_embeddings else 2
    left = (stated - model.num_parameters) / (copies * model.hidden)
    blur = _half_digit(cells["params_b"]) / (copies * model.hidden)
    if 1000 < left < 1_000_000 and blur < 0.05 * left:
        vocab = round(left / 128) * 128
        return vocab, f"vocab not stated: {vocab} follows from params_b"
    raise UnsupportedError("vocab not stated; neither model nor params_b tells it")


def _half_digit(text: str) -> float:
    """Return half a unit of the last digit of a number of billions, as a count.

    >>> _half_digit("7.5"), _half_digit("175")
    (50000000.0, 500000000.0)
    """
    digits = re.fullmatch(r"\d+(?:\.(\d+))?", text.strip())
    return 0.5e9 * 10.0 ** -len(digits[1] or "") if digits else 0.0


def _matching(variants: list[ModelSpec], text: str, stated: float) -> tuple[ModelSpec, str]:
    """Return the variant that has the stated parameters, the likeliest kind of MLP first."""
    first = variants[0]
    if not stated:
        return first, ""
    blur = _half_digit(text)

    def distance(model: ModelSpec) -> float:
        count = model.num_parameters
        nearest = min(max(count, stated - blur), stated + blur)
        return abs(math.log(count / nearest)) if nearest > 0 else math.inf

    alike = [variant for variant in variants if variant.mlp == first.mlp]
    others = [variant for variant in variants if variant.mlp != first.mlp]
    for group, said in ((alike, ""), (others, f"params_b tells the MLP: {others[0].mlp}")):
        best = min(group, key=distance)
        if distance(best) <= math.log(_FITS):
            return best, said
    best = min(alike, key=distance)
    counted = f"params_b is {text}, but the columns make {best.num_parameters / 1e9:.3g}"
    if distance(best) <= math.log(_SAID):
        return best, f"{counted}; the columns are taken"
    raise UnsupportedError(f"{counted}; experts, or a shape that is not modelled")
