"""What the free texts of a table of published runs stand for: precision, sharding, stack, ...

Every function takes one cell as its source wrote it and returns what it means, None where the cell
is empty. Raises UnsupportedError for what the model does not know, naming what it does.
"""

import re
from functools import lru_cache
from typing import Literal, NamedTuple, NoReturn

from profiles.errors import UnsupportedError
from profiles.stack import Attention, Recompute, Sharding
from profiles.workload import DType

_HOPPER_OR_LATER = re.compile(r"h[12]00|g?b[23]00")


class SharedStates(NamedTuple):
    """What replicas share, and in groups of how many: 0 for all, or those of one node."""

    sharding: Sharding
    group: int | Literal["node"] = 0


class StackName(NamedTuple):
    """The preset that stands for a framework, and what must be said of that choice."""

    name: str
    remark: str = ""


def shown(text: str) -> str:
    """Return `text` in quotes, short enough for a message.

    >>> shown("x" * 100)
    '"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..."'
    """
    return f'"{text if len(text) <= 60 else text[:57] + "..."}"'


def _refuse(column: str, text: str, known: str) -> NoReturn:
    raise UnsupportedError(f"{column} is {shown(text)}; modelled are {known}")


def _names(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


@lru_cache(maxsize=1024)
def read_precision(text: str) -> DType | None:
    """Return the dtype of the matrix products.

    >>> read_precision("fp8-mx"), read_precision("bf16 (fp32 grad accumulation)")
    ('fp8', 'bf16')
    """
    words = text.lower()
    if not words:
        return None
    if _names(r"fp[46]|int[48]|tf32|fp64", words):
        _refuse("precision", text, "bf16, fp16, fp8 and fp32")
    for pattern, dtype in (
        (r"fp8|float8|e4m3", "fp8"),
        (r"bf16|bfloat", "bf16"),
        (r"fp16|float16|half", "fp16"),
        (r"mixed|amp", "bf16"),
        (r"fp32|float32|single", "fp32"),
    ):
        if _names(pattern, words):
            return dtype  # type: ignore[return-value]
    _refuse("precision", text, "bf16, fp16, fp8 and fp32")


@lru_cache(maxsize=1024)
def read_recompute(text: str) -> Recompute | None:
    """Return what the backward computes again.

    >>> read_recompute("selective (core attn)"), read_recompute("full (inferred)")
    ('selective', 'full')
    """
    words, known = text.lower(), "none, selective, and full in all layers"
    if not words:
        return None
    if "offload" in words:
        _refuse("recompute", text, f"{known}, without offload")
    if _names(r"^(none|no\b|false|off|0$|disabled|without)", words):
        return "none"
    if _names(r"partial|block|\d+ *(of|/|layers|blocks)", words):
        _refuse("recompute", text, known)
    if _names(r"select|core.?att|\bsac\b|attention", words):
        return "selective"
    if _names(r"full|true|yes|^on|^1$|uniform|checkpoint|every", words):
        return "full"
    _refuse("recompute", text, known)


@lru_cache(maxsize=1024)
def read_sharding(text: str) -> SharedStates | None:
    """Return what the replicas share among themselves.

    >>> read_sharding("Megatron distributed optimizer (ZeRO-1) inferred")
    SharedStates(sharding='zero1', group=0)
    >>> read_sharding("FSDP=128 x DP=4"), read_sharding("HSDP").group
    (SharedStates(sharding='zero3', group=128), 'node')
    """
    words, known = text.lower(), "none, ZeRO-1 to 3, FSDP, HSDP and a distributed optimizer"
    if not words:
        return None
    if _names(r"offload|infinity", words):
        _refuse("zero_stage_or_sharding", text, f"{known}, without offload")
    if group := re.search(r"fsdp *= *(\d{1,6})\b", words):
        return SharedStates("zero3", int(group[1]))
    if _names(r"hsdp|hybrid", words):
        mode: Sharding = "zero2" if _names(r"zero.?2|grad_op", words) else "zero3"
        group = re.search(r"(?:shard|group|within|over|of)[ =:]+(\d{1,6})\b", words)
        return SharedStates(mode, int(group[1]) if group else "node")
    if stage := re.search(r"zero[ _-]*(?:stage)?[ _-]*([0-3])", words):
        stages: tuple[Sharding, ...] = ("none", "zero1", "zero2", "zero3")
        return SharedStates(stages[int(stage[1])])
    for pattern, sharding in (
        (r"shard_grad_op", "zero2"),
        (r"no_shard", "none"),
        (r"full_shard|fsdp|fully.?shard|full.?shard", "zero3"),
        (r"dist\w*.?opt|optimizer.?(state|shard)", "zero1"),
        (r"none|^no\b|ddp|replica|data.?parallel", "none"),
    ):
        if _names(pattern, words):
            return SharedStates(sharding)  # type: ignore[arg-type]
    _refuse("zero_stage_or_sharding", text, known)


@lru_cache(maxsize=1024)
def read_attention(text: str, gpu: str) -> Attention | None:
    """Return the kernel of the attention core on `gpu`; FlashAttention 3 needs a Hopper or later.

    >>> read_attention("fused softmax (no flash)", "a100-sxm-80gb")
    'unfused'
    >>> read_attention("cuDNN", "h100-sxm"), read_attention("cuDNN", "a100-sxm-80gb")
    ('flash3', 'flash2')
    """
    words = text.lower()
    if not words:
        return None
    if _names(r"(no|without|not) flash|unfused|eager|math|naive|fused softmax", words):
        return "unfused"
    if _names(r"flash\D{0,12}3|\bfa-?3|cudnn|transformer.?engine|\bte\b", words):
        return "flash3" if _HOPPER_OR_LATER.search(gpu) else "flash2"
    if _names(r"flash|\bfa-?[12]|sdpa|eff|xformers|triton|splash|fused", words):
        return "flash2"
    _refuse("attention_kernel", text, "FlashAttention, cuDNN, SDPA and unfused attention")


@lru_cache(maxsize=1024)
def read_schedule(text: str, stages_per_rank: int) -> str:
    """Return the name of the pipeline schedule (`planner.schedules`).

    >>> read_schedule("1F1B", 1), read_schedule("", 4), read_schedule("ZB-H1", 1)
    ('1f1b', 'interleaved', 'zb_h1')
    """
    words = text.lower()
    loops = "interleaved" if stages_per_rank > 1 else "1f1b"
    for pattern, name in (
        (r"dual.?pipe.?v", "dual_pipe_v"),
        (r"dual.?pipe|interleaved.?zero|hanayo|chimera", ""),
        (r"zb.?v", "zb_v"),
        (r"zb.?h?2", "zb_h2"),
        (r"zb|zero.?bubble", "zb_h1"),
        (r"g.?pipe|fill.?drain|afab", "gpipe"),
        (r"breadth|looped", "breadth_first" if stages_per_rank > 1 else "gpipe"),
        (r"interleav|virtual|1f1b|one.?forward", loops),
        (r"^$|^none|^n/?a", loops),
    ):
        if _names(pattern, words):
            if name:
                return name
            break
    _refuse("schedule", text, "1F1B, interleaved, GPipe, breadth first, ZB-H1/H2/V and DualPipeV")


_STACKS: tuple[tuple[str, str, bool], ...] = (
    (r"nanotron", "nanotron", True),
    (r"megatron.*deepspeed|deepspeed.*megatron", "megatron-deepspeed", True),
    (r"neox", "megatron-deepspeed", False),
    (r"llm.?foundry", "llm-foundry", True),
    (r"nemo|megatron.?bridge|megatron.?core|\bmcore\b", "nemo", True),
    (r"torch.?titan", "torchtitan", True),
    (r"layline", "layline-nccl", True),
    (r"fsdp|fully.?shard", "fsdp", True),
    (r"composer|accelerate|lightning|lit-?gpt|transformers|torchtune|axolotl", "fsdp", True),
    (r"maxtext|paxml|praxis", "maxtext", True),
    (r"axlearn|levanter|\bjax\b|\bxla\b", "maxtext", False),
)
"""A pattern of a framework's name, the stack that stands for it, and whether it is that stack."""


@lru_cache(maxsize=4096)
def read_framework(text: str, date: str, *, cuts_layers: bool, sharding: str) -> StackName:
    """Return the stack that stands for a framework: its own, or the nearest with the reason.

    `cuts_layers` says whether the run is tensor or pipeline parallel; with it and the `sharding`
    (empty: not stated), a framework nobody has heard of is told by the way it was used.

    >>> read_framework("Megatron-LM", "2021-04-08", cuts_layers=True, sharding="none").name
    'megatron-2021'
    >>> read_framework("InternEvo", "2024", cuts_layers=False, sharding="zero3").remark
    'framework "InternEvo" is taken as fsdp, the nearest'
    """
    words, year = text.lower(), re.search(r"20[0-9]{2}", date)
    for pattern, name, is_it in _STACKS:
        if _names(pattern, words):
            if name == "megatron-deepspeed" and year is not None and year[0] < "2023":
                name = "megatron-deepspeed-2022"
            return StackName(name, "" if is_it else _nearest(text, name))
    if "megatron" in words:
        if year is None:
            return StackName("megatron-2023", "date of Megatron-LM not stated: 2023 or later")
        return StackName("megatron-2021" if year[0] < "2023" else "megatron-2023")
    if cuts_layers:
        name = "megatron-deepspeed" if "deepspeed" in words else "megatron-2023"
    else:
        name = "fsdp" if sharding in ("zero2", "zero3") or "deepspeed" in words else "torchtitan"
    return StackName(name, _nearest(text, name))


def _nearest(text: str, name: str) -> str:
    stated = f"framework {shown(text)}" if text else "framework not stated: it"
    return f"{stated} is taken as {name}, the nearest"
