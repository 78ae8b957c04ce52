"""Where a predicted step goes: parts that sum to it, each in closed form where there is one."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.flops import peak_flops_per_s, step_flops
from planner.predict import predict, step_model
from planner.reference.program import stack_lanes
from planner.reference.step import built
from planner.reference.waterfall import PARTS
from planner.schedules import SCHEDULES
from planner.setup import Setup
from profiles.stack import SCALARS
from tests.setups import BUSY, GPT, IDLE_HOST, SMALL, STACK, scalars, setup_of, setups

STRETCHED = ("matmul", "attention", "memory", "intra", "inter")
UNFUSED = replace(STACK, attention="unfused")


def parts_of(setup: Setup) -> dict[str, int]:
    return dict(predict(setup).parts)


def not_faster_than_alone(setup: Setup) -> Setup:
    """Return `setup` in bf16 or fp16 and on kernels that are not faster than measured alone.

    Attention is timed in 16 bits whatever the products are in, and may then beat a peak of fp32.
    """
    values = {name: scalar.value for name, scalar in setup.stack.scalars.items()}
    slower = values | {name: max(1.0, values[name]) for name in STRETCHED}
    dtype: Any = setup.workload.dtype if setup.workload.dtype != "fp32" else "fp16"
    return replace(
        setup,
        workload=replace(setup.workload, dtype=dtype),
        stack=replace(setup.stack, scalars=scalars(slower)),
    )


@settings(max_examples=40)
@given(setups())
def test_parts_sum_to_the_step_and_none_is_negative(setup: Setup) -> None:
    """Of a part one ns may be lost to rounding, and one for each stage that was timed."""
    found = predict(not_faster_than_alone(setup))
    assert tuple(found.parts) == PARTS
    assert sum(found.parts.values()) == found.step.p50_ns
    assert min(found.parts.values()) >= -1 - setup.layout.num_stages


@settings(max_examples=40)
@given(setups())
def test_peak_is_the_model_s_flops_at_the_peak_rate_of_all_ranks(setup: Setup) -> None:
    flops = step_flops(setup, causal=True, recomputed=False)
    rate = peak_flops_per_s(setup) * setup.layout.num_ranks
    assert parts_of(setup)["peak"] == pytest.approx(1e9 * flops / rate, abs=1)


def test_peak_of_a_published_model_by_hand() -> None:
    """6 N for the matrices of 8 layers and the head, 6 L s a for the causal attention; 989 TF/s."""
    matrices = 8 * (2048 * (2048 + 2 * 1024) + 2048 * 2048 + 3 * 2048 * 8192) + 2048 * 32768
    flops = (6 * matrices + 6 * 8 * 4096 * 2048) * 4096 * 4
    assert parts_of(setup_of())["peak"] == round(1e9 * flops / 989e12)


@pytest.mark.parametrize("stack", [STACK, UNFUSED])
def test_what_is_recomputed_is_what_the_backward_does_again(stack: Any) -> None:
    """Nothing, the scores where there are any, or a third of the layers' own flops."""
    none, selective, full = (
        parts_of(setup_of(GPT, stack=stack, recompute=mode))
        for mode in ("none", "selective", "full")
    )
    attention = 2 * 8 * 4096 * 2048 * 4 * 4096 / 989e3
    layers = 2 * 8 * (4 * 2048 * 2048 + 2 * 2048 * 8192 + 7 * 2048 + 8192) * 4 * 4096 / 989e3
    assert none["recompute"] == 0
    assert selective["recompute"] == pytest.approx(attention * (stack is UNFUSED), abs=1)
    assert full["recompute"] == pytest.approx(attention + layers, rel=0.001)
    assert none["peak"] == selective["peak"] == full["peak"]


def test_one_gpu_without_a_host_is_kernels_memory_and_update() -> None:
    found = parts_of(setup_of())
    for nothing in ("recompute", "exchange", "launch", "pipeline", "reduction", "host"):
        assert found[nothing] == 0
    model, lanes = step_model(setup_of()), stack_lanes(STACK)
    assert found["optimizer"] == pytest.approx(model.stages(lanes)[0].optimizer[0], abs=2)
    alone = {name: (0.0 if name in ("memory", *IDLE_HOST) else 1.0) for name in SCALARS}
    products = model.step_ns(stack_lanes(replace(STACK, scalars=scalars(alone))))[0]
    assert found["peak"] + found["kernels"] == pytest.approx(products, abs=2)


@pytest.mark.parametrize(
    ("part", "slower", "axes"),
    [
        ("kernels", "matmul", {}),
        ("kernels", "attention", {}),
        ("memory", "memory", {}),
        ("exchange", "intra", {"tp": 8}),
        ("exchange", "inter", {"tp": 16}),
        ("reduction", "intra", {"dp": 8}),
        ("reduction", "inter", {"dp": 16}),
        ("launch", "launch", {"seq_len": 128}),
        ("host", "step", {}),
    ],
)
def test_what_a_scalar_adds_stands_in_its_part(
    part: str, slower: str, axes: dict[str, Any]
) -> None:
    """The update streams memory too."""
    values = {name: scalar.value for name, scalar in BUSY.scalars.items()}
    values |= {"launch": 10.0} if slower == "launch" else IDLE_HOST
    more = values | {slower: 2 * values[slower] or 10.0}
    found = [parts_of(setup_of(stack=replace(STACK, scalars=scalars(each)), **axes))
             for each in (values, more)]  # fmt: skip
    added = {name: found[1][name] - found[0][name] for name in PARTS}
    assert added[part] > 0
    grown = {name for name, ns in added.items() if abs(ns) > 2}
    assert grown <= {part, *(("optimizer",) if slower in ("memory", "launch") else ())}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_reduction_and_update_are_those_of_all_stages_of_a_rank(name: str) -> None:
    """Which rank they are of is said by what is left for the pipeline: it is none of both."""
    family = SCHEDULES[name]
    per_rank = family.stages_per_rank or 4
    model = replace(SMALL, num_layers=4 * per_rank)
    setup = setup_of(model, pp=4, dp=8, tp=2, schedule=name, stages_per_rank=per_rank,
                     num_microbatches=8)  # fmt: skip
    stages = step_model(setup).stages(stack_lanes(STACK))
    tails = [[0.0, 0.0] for _ in range(4)]
    for home, stage in zip(built(setup.layout).homes.tolist(), stages, strict=True):
        tails[home][0] += stage.reduction[0]
        tails[home][1] += stage.optimizer[0]
    found = parts_of(setup)
    busiest = max(tails, key=sum)
    assert [found["reduction"], found["optimizer"]] == pytest.approx(busiest, abs=10)


@given(st.sampled_from((2, 4, 8)), st.integers(1, 32))
def test_the_pipeline_s_part_is_its_bubble(pp: int, num_microbatches: int) -> None:
    """Of 1F1B (p - 1) / m of the work; the head, the embedding and messages shift it a little."""
    setup = setup_of(pp=pp, num_microbatches=num_microbatches)
    found = parts_of(setup)
    work = sum(found[name] for name in ("peak", "kernels", "memory", "exchange", "launch"))
    bubble = (pp - 1) / num_microbatches * work
    stages = step_model(setup).stages(stack_lanes(STACK))
    busy = [float(each.forward[0] + each.backward[0]) for each in stages]
    uneven = num_microbatches * (max(busy) - sum(busy) / pp)
    assert bubble * 0.6 <= found["pipeline"] <= bubble * 1.25 + uneven + 1e6 * pp
