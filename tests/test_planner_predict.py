"""Predictions: what must hold for any setup, what is refused, and published runs by name."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.interval import WIDER, band_of
from planner.predict import likeliest, memory_of, predict, step_model
from planner.reference.program import stack_lanes
from planner.setup import Setup
from profiles.errors import UnsupportedError
from profiles.model import ModelSpec
from profiles.presets import cluster_preset, model_preset, stack_preset, stack_presets
from profiles.stack import SCALARS, Recompute, Sharding
from tests.setups import (
    IDLE_HOST,
    MOE,
    SMALL,
    lanes_by_value,
    model_of,
    nodes_for,
    scalars,
    setup_of,
    setups,
    step_ns,
    values_of_scalars,
)

SPLIT = ("zb_h1", "zb_h2", "zb_v", "dual_pipe_v")
"""Schedules that do the weight half of a backward apart."""
PLAIN_LINKS = ("v100-dgx2", "a100-sxm-40gb", "a100-sxm-80gb", "l40s")
"""Nodes whose links carry as much for any number of ranks.

Not so a mesh, which has more links the more ranks there are, nor a switch that sums (NVLink 4 and
later), which takes over from the ring between four ranks and eight.
"""


# What must hold for any setup.


@settings(max_examples=40)
@given(setups())
def test_every_time_is_a_number_and_the_step_is_positive(setup: Setup) -> None:
    found, lanes = model_of(setup)
    for each in found.stages(lanes):
        for name, ns in each._asdict().items():
            assert np.isfinite(ns).all(), name
            assert (ns >= 0).all(), name
        assert each.forward[0] > 0 or setup.model.num_layers < setup.layout.num_stages
    assert 0 < found.step_ns(lanes)[0] < 1e15


@settings(max_examples=40)
@given(setups(), st.lists(values_of_scalars(), min_size=2, max_size=5))
def test_lanes_side_by_side_equal_one_by_one(setup: Setup, values: list[dict[str, float]]) -> None:
    found = step_model(setup)
    together = found.step_ns(lanes_by_value(values))
    alone = [found.step_ns(lanes_by_value([one]))[0] for one in values]
    assert together.tolist() == alone


@settings(max_examples=60)
@given(setups(), values_of_scalars(), st.floats(1.01, 4))
def test_a_larger_scalar_never_makes_the_step_shorter(
    setup: Setup, values: dict[str, float], more: float
) -> None:
    """Each alone; but products not where the weight half of a backward is done apart.

    Of a backward that the host or the network binds, and which does not grow with them, a longer
    weight half leaves less for the half that the next stage waits for.
    """
    names = [name for name in SCALARS if name != "matmul" or setup.layout.schedule not in SPLIT]
    larger = [
        values | {name: min(more * max(values[name], 0.01), 1.0 if name == "exposed" else np.inf)}
        for name in names
    ]
    base, *steps = step_model(setup).step_ns(lanes_by_value([values, *larger]))
    for name, ns in zip(names, steps, strict=True):
        # What is lost to rounding, a nanosecond an action and a unit.
        assert ns >= base - 1000, name


@settings(max_examples=40)
@given(setups(), st.sampled_from(get_args(Sharding)))
def test_more_replicas_with_as_much_work_each_are_never_faster(
    setup: Setup, sharding: Sharding
) -> None:
    """But for the update, of a smaller share."""
    node = setup.cluster.name
    assume(node in PLAIN_LINKS)
    layout = replace(setup.layout, sharding=sharding, shard_group=0, ep=1)
    model = replace(setup.model, num_experts=0, experts_per_token=0, num_shared_experts=0)
    more = replace(layout, dp=2 * layout.dp)
    cluster = nodes_for(more.num_ranks, node)
    stack = replace(setup.stack, scalars=scalars(IDLE_HOST))
    few, many = (
        replace(setup, model=model, layout=each, cluster=cluster, stack=stack,
                workload=replace(setup.workload, global_batch=each.global_batch))
        for each in (layout, more)
    )  # fmt: skip
    saved = sum(float(each.optimizer[0]) for each in step_model(few).stages(stack_lanes(stack)))
    assert step_ns(many) >= step_ns(few) - (saved if sharding != "none" else 0) - 100


@settings(max_examples=40)
@given(setups())
def test_recomputing_more_takes_longer_and_keeps_less(setup: Setup) -> None:
    found = [
        replace(setup, layout=replace(setup.layout, recompute=mode)) for mode in get_args(Recompute)
    ]
    none, selective, full = map(step_ns, found)
    assert none <= selective + 100
    assert selective <= full + 100
    # A rank without layers is taken to need the working memory of one.
    assume(min(setup.layout.stage_layers) > 0)
    for least, some, most in zip(*(memory_of(each) for each in found), strict=True):
        assert least.activations >= some.activations >= most.activations
        assert least.allocated >= some.allocated >= most.allocated


# Bands, memory, and which setup is meant.


@settings(max_examples=40)
@given(setups())
def test_a_prediction_is_whole(setup: Setup) -> None:
    found = predict(setup)
    step = found.step
    assert 0 < step.p10_ns <= step.p50_ns <= step.p90_ns
    assert sum(found.parts.values()) == step.p50_ns
    assert step.p50_ns == round(step_ns(setup))
    assert len(found.memory) == setup.layout.pp
    for rank in found.memory:
        assert min(rank.parameters, rank.gradients, rank.optimizer, rank.activations) >= 0
        assert rank.temporary >= 0
        assert rank.total >= rank.allocated >= rank.parameters + rank.optimizer
    assert predict(setup) == found


@pytest.mark.parametrize("name", stack_presets())
@pytest.mark.parametrize("node", ["h100-sxm", "a100-sxm-40gb", "l40s"])
def test_every_stack_has_a_band_around_its_median(name: str, node: str) -> None:
    step = predict(setup_of(stack=stack_preset(name), node=node, dp=8)).step
    assert step.p10_ns < step.p50_ns < step.p90_ns
    assert 0.5 * step.p50_ns < step.p10_ns
    assert step.p90_ns < 2 * step.p50_ns


def test_a_band_that_rests_on_other_curves_is_wider() -> None:
    known, guessed = (band_of("no such stack", "h100-sxm", is_it) for is_it in (False, True))
    assert (guessed.low, guessed.high) == (known.low**WIDER, known.high**WIDER)
    assert guessed.low < known.low <= 1 <= known.high < guessed.high


def test_what_rests_on_other_curves_is_said() -> None:
    measured, scaled = (predict(setup_of(node=node)).step for node in ("h100-sxm", "b300-sxm"))
    assert (measured.is_extrapolated, scaled.is_extrapolated) == (False, True)


def test_the_likeliest_setup_is_the_first_that_fits() -> None:
    model = model_preset("llama-3-8b")
    modes = [
        setup_of(model, seq_len=8192, dp=8, sharding="zero3", micro_batch=batch, recompute=mode)
        for batch in (1, 4, 64)
        for mode in get_args(Recompute)
    ]
    assert likeliest(modes[:3]) == modes[0]
    assert likeliest(modes[3:6]) == modes[5]
    assert likeliest(modes[6:]) == modes[6]
    assert likeliest(modes[8:]) == modes[8]


# What is refused.


def _replaced(setup: Setup, **work: Any) -> Setup:
    return replace(setup, workload=replace(setup.workload, **work))


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        (setup_of(schedule="2f2b", pp=2), "schedule is 2f2b; known are 1f1b, breadth_first"),
        (setup_of(schedule="zb_v", pp=2), "schedule zb_v does not have 1 stages a rank"),
        (setup_of(stage_layers=(7,)), "the stages have 7 layers, the model 8"),
        (setup_of(dp=16, cluster=cluster_preset("h100-sxm")), "the layout has 16 ranks, the clust"),
        (_replaced(setup_of(), global_batch=5), "4 sequences a step, the workload on 5"),
        (setup_of(tp=3), "heads is 16, no multiple of tp (3)"),
        (setup_of(tp=32), "heads is 16, no multiple of tp (32)"),
        (setup_of(replace(SMALL, ffn=8190), tp=4), "ffn is 8190, no multiple of tp (4)"),
        (setup_of(cp=3), "seq_len is 4096, no multiple of cp (3)"),
        (setup_of(cp=8192), "seq_len is 4096, no multiple of cp (8192)"),
        (setup_of(dp=4, ep=4), "experts is 1, no multiple of ep (4)"),
        (setup_of(MOE, dp=16, ep=16), "experts is 8, no multiple of ep (16)"),
        (setup_of(MOE, dp=2, ep=4), "dp x cp is 2, no multiple of ep (4)"),
        (setup_of(dp=8, sharding="zero3", shard_group=5), "no multiple of the shard group (5)"),
        (setup_of(dp=8, sharding="zero3", shard_group=16), "no multiple of the shard group (16)"),
        (setup_of(node="a100-sxm-80gb", dtype="fp8"), "dtype is fp8; a100-sxm-80gb has fp32"),
        (setup_of(node="v100-dgx2"), "dtype is bf16; v100-sxm2-32gb has"),
    ],
)
def test_a_contradictory_setup_is_refused(setup: Setup, reason: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        predict(setup)
    assert reason in str(error.value)


def test_several_pools_are_refused() -> None:
    setup = setup_of(dp=16)
    pools = (cluster_preset("h100-sxm").pools[0], cluster_preset("a100-sxm-80gb").pools[0])
    with pytest.raises(UnsupportedError, match="pools of several GPUs"):
        predict(replace(setup, cluster=replace(setup.cluster, pools=pools)))


def test_nodes_without_a_fabric_are_refused() -> None:
    setup = setup_of(dp=16)
    pool = replace(setup.cluster.pools[0], gpus_per_node=8, num_nodes=2)
    assert predict(replace(setup, cluster=replace(setup.cluster, pools=(pool,)))).step.p50_ns > 0
    with pytest.raises(ValueError, match="several nodes need one"):
        replace(setup.cluster, inter_node=None)


# Published runs.

MPT_7B = ModelSpec(
    name="mpt-7b", num_layers=32, hidden=4096, num_heads=32, num_kv_heads=32, head_size=128,
    ffn=16384, vocab=50368, max_seq_len=2048, tied_embeddings=True, norm="layernorm", mlp="gelu",
    positions="learned",
)  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "seconds"),
    [
        # github:NVIDIA/dgxc-benchmarking@35a9aec, llama3.1/README_8b.md, release 24.11.1, 2024-11:
        # "Llama 3.1 8b 24.09 BF16 (TP=1, PP=1, CP=2, MBS=1, GA=32)" on 8 GPUs.
        (setup_of(model_preset("llama-3.1-8b"), stack=stack_preset("nemo"), seq_len=8192, dp=4,
                  cp=2, num_microbatches=32, sharding="zero1"), 12.91),
        # arXiv:2104.04473, table 1, last row: 163 TFLOP/s a GPU by the paper's own formula.
        (setup_of(model_preset("megatron-1t"), stack=stack_preset("megatron-2021"), seq_len=2048,
                  node="a100-sxm-80gb", dtype="fp16", dp=6, tp=8, pp=64, num_microbatches=512,
                  stage_layers=(1,) * 128, schedule="interleaved", stages_per_rank=2,
                  recompute="full"), 102.6),
        # github:mosaicml/llm-foundry, scripts/train/benchmarking, MPT-7B on 8 H100, 2023-2024.
        (setup_of(MPT_7B, stack=stack_preset("llm-foundry"), seq_len=2048, dp=8, micro_batch=32,
                  num_microbatches=2, sharding="zero3", recompute="full"), 14.13),
    ],
)  # fmt: skip
def test_published_steps_are_met_within_15_percent(setup: Setup, seconds: float) -> None:
    assert predict(setup).step.p50_ns / 1e9 == pytest.approx(seconds, rel=0.15)
