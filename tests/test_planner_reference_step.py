"""The step of a setup: closed forms of one GPU and of pipelines, schedules, and the host."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.predict import memory_of, step_model
from planner.reference.program import INTER, INTRA, MEMORY, lanes_of, stack_lanes
from planner.reference.step import built
from planner.schedules import SCHEDULES
from planner.setup import Setup
from profiles.cluster import ClusterSpec
from profiles.presets import cluster_preset, fabric_preset
from profiles.stack import SCALARS, Recompute, Sharding
from simulator.engine import simulate, simulate_step
from tests.setups import (
    BUSY,
    GPT,
    IDLE_HOST,
    MOE,
    SMALL,
    STACK,
    group_ns,
    lanes_by_value,
    model_of,
    pass_ns,
    scalars,
    setup_of,
    setups,
    stage,
    step_ns,
)

NEUTRAL = {name: meaning.neutral for name, meaning in SCALARS.items()}
FREE = lanes_of(NEUTRAL | IDLE_HOST | {"intra": 0.0, "inter": 0.0, "memory": 0.0})
"""Products and attention alone: messages, passes and the host take nothing."""
SHARDED: tuple[Sharding, ...] = ("zero1", "zero2", "zero3")


# Closed forms: one GPU.


@pytest.mark.parametrize("num_microbatches", [1, 2, 7])
@pytest.mark.parametrize("model", [SMALL, GPT])
def test_one_gpu_runs_its_kernels_in_a_row(model: Any, num_microbatches: int) -> None:
    """No host, no collectives: kernels of each micro-batch, then the update.

    From the second micro-batch on gradients of 4 bytes are read and written again.
    """
    setup = setup_of(model, num_microbatches=num_microbatches)
    found, lanes = model_of(setup)
    parts = {name: np.rint(block.ns).sum() for name, block in found.blocks.items()}
    layers, edges = (
        sum(parts[f"{name}_{way}"] for name in names for way in ("forward", "backward"))
        for names in (("layer",), ("embedding", "head"))
    )
    count = found.parameters(8, True, True)
    sums = pass_ns(2 * 4 * count) if num_microbatches > 1 else 0.0
    # Gradient, master copy and both moments in, all but the gradient out; the norm of the
    # gradients and zeroing; the bf16 parameter.
    update = pass_ns(count * (4 + 2 * 4 + 2 * 8 + 2 + 4 + 4 + 2 * 4))
    expected = num_microbatches * (8 * layers + edges + sums) + update
    assert found.step_ns(lanes)[0] == pytest.approx(expected, rel=1e-12)


def test_a_host_that_binds_is_all_that_counts() -> None:
    """Calls of a millisecond each: the step is calls times launch, in every micro-batch."""
    setup = setup_of(stack=replace(STACK, scalars=scalars(IDLE_HOST | {"launch": 1000.0})))
    found, lanes = model_of(setup)
    calls = sum(block.calls * (8 if name.startswith("layer") else 1)
                for name, block in found.blocks.items())  # fmt: skip
    update = found.stages(lanes)[0].optimizer[0]
    assert found.step_ns(lanes)[0] == pytest.approx(4 * calls * 1e6 + update, rel=1e-9)


def test_work_of_the_host_comes_on_top_once() -> None:
    setup = setup_of(stack=replace(STACK, scalars=scalars(IDLE_HOST | {"step": 250.0})))
    assert step_ns(setup) - step_ns(replace(setup, stack=STACK)) == pytest.approx(250e6)


@given(st.integers(1, 30), st.sampled_from(("none", "full")))
def test_every_micro_batch_adds_as_much(num_microbatches: int, recompute: Recompute) -> None:
    """But the first, which adds its gradients to nothing."""
    one, more = (
        step_ns(setup_of(stack=BUSY, num_microbatches=n, recompute=recompute))
        for n in (num_microbatches + 1, num_microbatches + 2)
    )
    two, three = (step_ns(setup_of(stack=BUSY, num_microbatches=n, recompute=recompute))
                  for n in (2, 3))  # fmt: skip
    assert more - one == pytest.approx(three - two, rel=1e-9)


@pytest.mark.parametrize("model", [SMALL, GPT, replace(MOE, num_shared_experts=1)])
@pytest.mark.parametrize("tp", [1, 4])
def test_ranks_hold_the_parameters_of_the_model(model: Any, tp: int) -> None:
    """All but norms, biases, positions and the router, which are below two percent."""
    found = step_model(setup_of(model, tp=tp)).parameters(model.num_layers, True, True)
    assert found * tp == pytest.approx(model.num_parameters, rel=0.02)


# Closed forms: the pipeline.


@settings(max_examples=40)
@given(
    pp=st.sampled_from((2, 4, 8)),
    num_microbatches=st.integers(1, 20),
    schedule=st.sampled_from(("1f1b", "gpipe")),
)
def test_equal_stages_without_messages_are_closed_form(
    pp: int, num_microbatches: int, schedule: str
) -> None:
    """(p - 1) (F + B) to fill and drain, then m times the last stage, which has the head too."""
    setup = setup_of(pp=pp, num_microbatches=num_microbatches, schedule=schedule)
    found = step_model(setup)
    stages = found.stages(FREE)
    forward, backward = (
        [round(float(getattr(each, way)[0])) for each in stages] for way in ("forward", "backward")
    )
    assert len(set(forward[:-1])) == 1
    assert forward[0] < forward[-1]
    fill = (pp - 1) * (forward[0] + backward[0])
    assert found.step_ns(FREE)[0] == fill + num_microbatches * (forward[-1] + backward[-1])


@settings(max_examples=40)
@given(setups())
def test_the_engine_times_the_same_pipeline(setup: Setup) -> None:
    """The walk and the event loop, on the graph of the same step, agree to the nanosecond."""
    found, lanes = model_of(setup)
    assume(setup.layout.num_stages > 1 and setup.layout.num_microbatches < 6)
    times = found.times(lanes, found.stages(lanes))
    walked = simulate_step(built(setup.layout), times)
    graph_alone = simulate(walked.graph, walked.ends_ns - walked.starts_ns)
    assert graph_alone.makespan_ns + lanes.step[0] == found.step_ns(lanes)[0]


def test_a_message_carries_each_tensor_rank_s_share() -> None:
    whole, share = (model_of(setup_of(pp=2, tp=tp)) for tp in (1, 4))
    size_bytes = 4096 * SMALL.hidden * 2
    assert whole[0].send_ns(whole[1])[0] == group_ns("send_recv", 2, 8, size_bytes)
    assert share[0].send_ns(share[1])[0] == group_ns("send_recv", 2, 8, size_bytes / 4)


def test_a_message_between_nodes_takes_the_fabric() -> None:
    found, lanes = model_of(setup_of(pp=2, tp=8))
    assert found.send_ns(lanes)[0] == group_ns("send_recv", 2, 1, 4096 * SMALL.hidden * 2 / 8)


# Schedules and experts.


@pytest.mark.parametrize("sharding", SHARDED)
def test_experts_shared_by_more_ranks_take_less_memory(sharding: Sharding) -> None:
    """Where parameters are sharded anyway, every rank holds as much of them."""
    one, shared = (setup_of(MOE, dp=8, ep=ep, sharding=sharding) for ep in (1, 8))
    less, more = memory_of(shared)[0].total, memory_of(one)[0].total
    assert less == more if sharding == "zero3" else less < more
    # But their tokens are on the way.
    assert stage(shared).forward[0] > stage(one).forward[0] or sharding == "zero3"


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_runs_and_none_beats_its_work(name: str) -> None:
    """No rank can be done before its own work, nor a micro-batch before it went all the way."""
    family = SCHEDULES[name]
    for stages_per_rank in (1, 2, 3, 4):
        if not family.takes(stages_per_rank):
            continue
        model = replace(SMALL, num_layers=4 * stages_per_rank)
        setup = setup_of(model, pp=4, schedule=name, stages_per_rank=stages_per_rank,
                         num_microbatches=8, stack=BUSY)  # fmt: skip
        found, lanes = model_of(setup)
        stages = found.stages(lanes)
        homes = built(setup.layout).homes.tolist()
        work = [0.0] * 4
        for home, each in zip(homes, stages, strict=True):
            work[home] += 8 * (each.forward[0] + each.backward[0])
        ahead = sum(each.forward[0] + each.backward[0] - each.weight[0] for each in stages)
        step = found.step_ns(lanes)[0]
        assert step >= max(*work, ahead)
        assert step <= 2 * max(work) + 2 * ahead


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_the_weight_half_is_part_of_the_backward(recompute: Recompute) -> None:
    setup = setup_of(pp=4, recompute=recompute, stack=replace(STACK, attention="unfused"))
    for each in step_model(setup).stages(stack_lanes(STACK)):
        assert 0 < each.weight[0] < 0.6 * each.backward[0]


# Tiers of the machine and of its host.


def _with_host(cluster: ClusterSpec) -> ClusterSpec:
    """Return `cluster` with a fabric whose bytes the host's cores move."""
    fabric = replace(cluster.inter_node or fabric_preset("roce100"), uses_host=True)
    return replace(cluster, inter_node=fabric)


@pytest.mark.parametrize(
    ("tp", "uses_host", "crossing", "spanning"),
    [(8, False, 0, 0), (16, False, 0, 16), (8, True, 8, 0), (16, True, 16, 16)],
)
def test_the_host_pays_for_tensor_collectives_by_member(
    tp: int, uses_host: bool, crossing: int, spanning: int
) -> None:
    """Per member, where the group does not fit in a node and where the host moves the bytes."""
    model = replace(SMALL, num_heads=16, num_kv_heads=16)
    cluster = cluster_preset("h100-sxm", num_nodes=2)
    cluster = _with_host(cluster) if uses_host else cluster
    values = NEUTRAL | IDLE_HOST
    host = {}
    for name in ("crossing", "spanning"):
        lanes = lanes_by_value([values | {name: value} for value in (1e5, 2e5)])
        setup = setup_of(model, tp=tp, dp=16 // tp, cluster=cluster)
        found = stage(setup, lanes)
        host[name] = (found.forward[1] - found.forward[0]) / 1e8
    # Two collectives a layer and one behind the embedding.
    assert host["crossing"] == pytest.approx(17 * crossing, abs=0.01)
    assert host["spanning"] == pytest.approx(17 * spanning, abs=0.01)


def test_a_message_costs_the_host_of_a_node_at_most_a_tenth_of_a_millisecond() -> None:
    lanes = lanes_by_value([NEUTRAL | IDLE_HOST | {"message": us} for us in (0.0, 1e5)])
    for dp, most in ((1, 1e5), (8, 1e8)):
        found = step_model(setup_of(pp=2, dp=dp)).stages(lanes)
        assert found[0].forward[1] == pytest.approx(max(found[0].forward[0], most), rel=0.06)


def test_scalars_stretch_what_they_name() -> None:
    """A step of memory-bound work alone doubles with `memory`, and so on for the links."""
    setup = setup_of(tp=2, dp=16, sharding="zero1", stack=BUSY)
    for category, name in ((MEMORY, "memory"), (INTRA, "intra"), (INTER, "inter")):
        alone = dict.fromkeys(("matmul", "attention", "memory", "intra", "inter"), 0.0)
        values = [NEUTRAL | IDLE_HOST | alone | {name: factor} for factor in (1.0, 2.0)]
        one, two = step_model(setup).step_ns(lanes_by_value(values))
        assert two == pytest.approx(2 * one, rel=1e-3), category
