"""How a published run was laid out: degrees, batches, schedule and stages out of its columns."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from planner.layout import Layout
from planner.partition import stages_by_rule
from planner.published.model import whole
from planner.published.words import (
    SharedStates,
    read_schedule,
)
from planner.schedules import SCHEDULES
from profiles.errors import UnsupportedError
from profiles.model import ModelSpec
from profiles.stack import Partition, Recompute, StackSpec

MAX_RANKS = 1_000_000
_MAX_MICROBATCHES, _MAX_ACTIONS = 100_000, 4_000_000
_MOST_SEQUENCES, _FEWEST_PER_STAGE = 16, 5
_MOST_TOKENS = {"none": 8192, "selective": 8192, "full": 32768}


class Laid(NamedTuple):
    """A layout, and what was assumed on the way to it."""

    layout: Layout
    remarks: tuple[str, ...]


class Degrees(NamedTuple):
    """Ranks along each axis; `ep` of the dp * cp replicas share experts."""

    dp: int
    tp: int
    cp: int
    pp: int
    ep: int


def read_degrees(cells: Mapping[str, str]) -> Degrees:
    """Return the degrees of a row, 1 where an axis is empty, `dp` from `gpus`.

    Raises UnsupportedError where they do not make up the GPUs of the run.

    >>> read_degrees({"gpus": "16", "tp": "4", "pp": "2"})
    Degrees(dp=2, tp=4, cp=1, pp=2, ep=1)
    """
    tp, cp, pp, ep = (whole(cells, axis, MAX_RANKS, 1) for axis in ("tp", "cp", "pp", "ep"))
    gpus, dp = (whole(cells, column, MAX_RANKS) for column in ("gpus", "dp"))
    dp = dp or max(1, gpus // (tp * cp * pp))
    if (product := tp * cp * pp * dp) != (gpus or product):
        raise UnsupportedError(
            f"gpus is {gpus}, but tp {tp} x cp {cp} x pp {pp} x dp {dp} is {product}"
        )
    if product > MAX_RANKS:
        raise UnsupportedError(f"tp x cp x pp x dp is {product}, above {MAX_RANKS:,}")
    if dp * cp % ep:
        raise UnsupportedError(f"ep is {ep}; it must divide dp x cp ({dp * cp})")
    return Degrees(dp, tp, cp, pp, ep)


def read_layout(
    cells: Mapping[str, str],
    degrees: Degrees,
    model: ModelSpec,
    stack: StackSpec,
    shared: SharedStates | None,
    recompute: Recompute,
    gpus_per_node: int,
) -> Laid:
    """Return the layout of a row; raises UnsupportedError where its columns contradict."""
    dp, tp, cp, pp, ep = degrees
    for count, what, by, axis in (
        (model.num_heads, "heads", tp, "tp"), (model.ffn, "ffn", tp, "tp"),
        (model.max_seq_len, "seq_len", cp, "cp"),
    ):  # fmt: skip
        if count % by:
            raise UnsupportedError(f"{what} is {count}, no multiple of {axis} ({by})")
    stages_per_rank, schedule, remarks = _read_schedule(cells, model, pp, stack)
    micro_batch, num_microbatches, said = _read_batches(cells, degrees, model, recompute)
    if (actions := pp * stages_per_rank * num_microbatches) > _MAX_ACTIONS:
        raise UnsupportedError(f"stages x micro-batches are {actions}, above {_MAX_ACTIONS:,}")
    sharding = shared.sharding if shared else stack.sharding
    if sharding == "zero3" and pp > 1:
        sharding = "zero2"
        remarks += ("parameters stay gathered through a pipeline's step",)
    stated = shared.group if shared else 0
    group = max(1, gpus_per_node // tp) if stated == "node" else stated
    if group and dp * cp % group:
        raise UnsupportedError(f"a shard group of {group} must divide dp x cp ({dp * cp})")
    layout = Layout(
        dp=dp, tp=tp, pp=pp, cp=cp, ep=ep,
        micro_batch=micro_batch,
        num_microbatches=num_microbatches,
        stage_layers=split_layers(model, pp * stages_per_rank, stack.partition),
        schedule=schedule,
        stages_per_rank=stages_per_rank,
        sequence_parallel=_is_sequence_parallel(cells, tp, stack),
        sharding=sharding,
        shard_group=0 if group >= dp * cp else group,
        recompute=recompute,
    )  # fmt: skip
    return Laid(layout, (*remarks, *said))


def _is_sequence_parallel(cells: Mapping[str, str], tp: int, stack: StackSpec) -> bool:
    text = cells.get("sp", "").lower()
    if text in ("true", "yes", "1", "false", "no", "0"):
        return tp > 1 and text in ("true", "yes", "1")
    return tp > 1 and stack.shards_sequence


def _read_schedule(
    cells: Mapping[str, str], model: ModelSpec, pp: int, stack: StackSpec
) -> tuple[int, str, tuple[str, ...]]:
    """Return the stages a rank, the schedule, and what was assumed.

    Where `vpp` is empty the notes may tell it (VP=12); a schedule that is interleaved without a
    number, or a stack that interleaves unless told otherwise, has the fewest stages that divide the
    layers of a rank.
    """
    if pp == 1:
        return 1, "1f1b", ()
    text, stages = cells.get("schedule", "")[:200], whole(cells, "vpp", 10_000)
    remarks: tuple[str, ...] = ()
    if not stages and (noted := re.search(r"\bVP *= *(\d{1,3})\b", cells.get("notes", ""))):
        stages, remarks = max(1, int(noted[1])), (f"vpp not stated: {noted[1]} as in the notes",)
    is_usual = bool(re.search(r"^$|1f1b", text.lower()))
    if not stages and ("interleav" in text.lower() or (stack.interleaves and is_usual)):
        layers = model.num_layers // pp
        stages = next((size for size in range(2, layers + 1) if layers % size == 0), 1)
        remarks = (f"vpp not stated: {stages} assumed",)
    stages = max(1, stages)
    name = read_schedule(text, stages)
    family = SCHEDULES[name]
    return stages if family.takes(stages) else family.stages_per_rank or 2, name, remarks


def _read_batches(
    cells: Mapping[str, str], degrees: Degrees, model: ModelSpec, recompute: Recompute
) -> tuple[int, int, tuple[str, ...]]:
    """Return the micro-batch, the micro-batches of a step, and what was assumed."""
    dp, pp = degrees.dp, degrees.pp
    batch, micro, accumulated = (
        whole(cells, column, 100_000_000)
        for column in ("global_batch", "micro_batch", "grad_accum")
    )
    if not batch and not (micro and accumulated):
        raise UnsupportedError("global_batch not stated")
    batch = batch or micro * accumulated * dp
    if batch % dp:
        raise UnsupportedError(f"global_batch is {batch}, no multiple of dp ({dp})")
    replica, remarks = batch // dp, tuple[str, ...]()
    if not micro and not accumulated:
        micro = _usual_micro_batch(replica, pp, model.max_seq_len, recompute)
        remarks = (f"micro_batch not stated: {micro} assumed",)
    micro = micro or max(1, replica // accumulated)
    accumulated = accumulated or max(1, replica // micro)
    if micro * accumulated != replica:
        raise UnsupportedError(
            f"global_batch is {batch}, but micro_batch {micro} x grad_accum {accumulated} "
            f"x dp {dp} is {micro * accumulated * dp}"
        )
    if accumulated > _MAX_MICROBATCHES:
        raise UnsupportedError(f"grad_accum is {accumulated}, above {_MAX_MICROBATCHES:,}")
    return micro, accumulated, remarks


def _usual_micro_batch(replica: int, pp: int, seq_len: int, recompute: Recompute) -> int:
    """Return the micro-batch that is assumed for `replica` sequences where none is stated.

    The largest power of two, up to 16, that leaves a pipeline at least 5 micro-batches a stage and
    a micro-batch at most 8192 tokens (32768 where all is recomputed): pipelines need many, kernels
    large ones. It gives nine of the ten of examples/sc21/run_table_1.sh (NVIDIA/Megatron-LM).

    >>> [_usual_micro_batch(*case, 2048, "full") for case in ((16, 1), (48, 2), (56, 4), (512, 64))]
    [16, 4, 2, 1]
    """
    size = 1
    while (
        2 * size <= _MOST_SEQUENCES
        and replica % (2 * size) == 0
        and 2 * size * seq_len <= _MOST_TOKENS[recompute]
        and (pp == 1 or replica // (2 * size) >= _FEWEST_PER_STAGE * pp)
    ):
        size *= 2
    return size


def split_layers(model: ModelSpec, num_stages: int, partition: Partition) -> tuple[int, ...]:
    """Return the layers of each pipeline stage.

    Where they do not divide evenly but would with embedding and head counted as a layer each, that
    is how they were cut: LLaMA 3 405B has 126 layers on 64 stages. Raises UnsupportedError where
    there are fewer layers than stages, and nothing but layers is cut.

    >>> from profiles.presets import model_preset
    >>> sum(split_layers(model_preset("llama-3.1-405b"), 64, "even")[:2])
    3
    """
    layers, rule = model.num_layers, partition
    if partition != "cost":
        fills_slots = layers % num_stages != 0 == (layers + 2) % num_stages
        rule = "slots" if fills_slots else "even"
        if layers < num_stages and not fills_slots:
            raise UnsupportedError(f"layers is {layers}, fewer than the {num_stages} stages")
    return stages_by_rule(model, num_stages, rule)
