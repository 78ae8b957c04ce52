"""Planning for a cluster that is not at hand: the search over the reference cost model."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.bounds import ROUNDING_NS, pipelines
from planner.cost import NOTHING
from planner.evaluate import basis_of, evaluate
from planner.lower import predict_step, simulation_of
from planner.plan import Plan, StageCost
from planner.predict import memory_of, predict
from planner.reference.costs import ReferenceCosts, reference_costs, reference_data
from planner.reference.step import built
from planner.search import SearchResult, make_plan, search
from planner.setup import Setup
from profiles.cluster import ClusterSpec
from profiles.errors import UnsupportedError
from profiles.files import canonical_json
from profiles.job import Job, SearchLimits
from profiles.model import ModelSpec
from profiles.presets import cluster_preset, gpu_preset, model_preset, stack_preset, stack_presets
from profiles.stack import Sharding
from profiles.workload import DType, Workload
from tests.setups import SMALL, scalars, setup_of, setups

COLLECTIVES = ("intra", "inter", "crossing", "spanning")


def job(
    model: ModelSpec = SMALL,
    stack: str = "layline-nccl",
    cluster: ClusterSpec | None = None,
    global_batch: int = 64,
    dtype: DType = "bf16",
    **limits: object,
) -> Job:
    """Return a job on two nodes of eight H100, unless it is told otherwise."""
    named = {"schedule": ("1f1b", "interleaved")} | limits
    return Job(
        seed=0,
        model=model,
        workload=Workload(
            seq_len=min(4096, model.max_seq_len), global_batch=global_batch, dtype=dtype
        ),
        cluster=cluster or cluster_preset("h100-sxm", num_nodes=2),
        stack=stack_preset(stack),
        profile_path="",
        search=SearchLimits(**named),  # type: ignore[arg-type]
    )


def found(asked: Job) -> SearchResult:
    return search(asked, reference_costs(asked))


def planned(asked: Job) -> Plan:
    costs = reference_costs(asked)
    return make_plan(asked, costs, search(asked, costs), 0, "0")


def costs_of(setup: Setup) -> ReferenceCosts:
    return ReferenceCosts(
        model=setup.model, workload=setup.workload, stack=setup.stack, cluster=setup.cluster
    )


@settings(max_examples=40)
@given(setups())
def test_the_stages_of_any_layout_make_the_step_that_is_predicted(setup: Setup) -> None:
    assume(setup.model.vocab % setup.layout.tp == 0)
    layout, expected = setup.layout, predict(setup).step
    stages = costs_of(setup).stages(layout)
    step = predict_step(built(layout), stages)
    # Without a pipeline the prediction is rounded once, the stages once a micro-batch.
    slack_ns = 2 + layout.num_microbatches * layout.num_stages
    assert step.p50_ns == pytest.approx(expected.p50_ns, abs=slack_ns)
    assert step.p10_ns == pytest.approx(expected.p10_ns, abs=2 * slack_ns)
    assert step.p90_ns == pytest.approx(expected.p90_ns, abs=2 * slack_ns)
    assert step.is_extrapolated == expected.is_extrapolated


def alone(setup: Setup) -> tuple[StageCost, ...]:
    """Return the stages of `setup` on links that take no time, of the device and of the host."""
    values = {name: scalar.value for name, scalar in setup.stack.scalars.items()}
    idle = replace(setup.stack, scalars=scalars(values | dict.fromkeys(COLLECTIVES, 0.0)))
    return costs_of(replace(setup, stack=idle)).stages(setup.layout)


@settings(max_examples=40)
@given(setups())
def test_the_exchange_is_what_links_that_take_no_time_would_save(setup: Setup) -> None:
    whole = costs_of(setup).stages(setup.layout)
    for cost, without in zip(whole, alone(setup), strict=True):
        for way in ("forward", "backward"):
            saved = getattr(cost, f"tensor_parallel_{way}_ns")
            left = getattr(cost, way).p50_ns - getattr(without, way).p50_ns
            assert 0 <= saved <= getattr(cost, way).p50_ns
            assert saved == pytest.approx(left, abs=1)


def test_without_company_inside_a_layer_there_is_no_exchange() -> None:
    for tp, sharding, is_there in ((1, "zero1", False), (2, "none", True), (1, "zero3", True)):
        setup = setup_of(tp=tp, dp=8, sharding=sharding)
        (cost,) = costs_of(setup).stages(setup.layout)
        assert (cost.tensor_parallel_forward_ns > 0) == is_there
        assert (cost.tensor_parallel_backward_ns > 0) == is_there


def test_messages_go_where_there_is_a_neighbour() -> None:
    setup = setup_of(pp=4)
    costs = costs_of(setup).stages(setup.layout)
    assert [cost.send_forward == NOTHING for cost in costs] == [False, False, False, True]
    assert [cost.send_backward == NOTHING for cost in costs] == [True, False, False, False]
    assert {cost.wait for cost in costs} == {NOTHING}
    assert costs[1] is costs[2]


def test_parts_are_what_further_layers_and_the_edges_take() -> None:
    # The host takes nothing, so that stages are sums of their parts.
    setup = setup_of(pp=2, tp=2, stage_layers=(5, 3), num_microbatches=1)
    parts = costs_of(setup).parts(setup.layout)
    first, last = costs_of(setup).stages(setup.layout)
    for way in ("forward", "backward", "weight"):
        layer, begin, end = (getattr(parts, f"{each}_{way}") for each in ("layer", "first", "last"))
        assert getattr(first, way).p50_ns == pytest.approx(5 * layer + begin, abs=2)
        assert getattr(last, way).p50_ns == pytest.approx(3 * layer + end, abs=2)
    assert (first.send_forward.p50_ns, first.other.p50_ns) == (round(parts.send), parts.step)
    assert (parts.again, parts.again_host, parts.message_host) == (0, 0, 0)


@settings(max_examples=40)
@given(setups(), st.data())
def test_columns_are_the_medians_of_stages_side_by_side(setup: Setup, data: st.DataObject) -> None:
    """Of layouts that differ in their sharding, and in how it is grouped."""
    assume(setup.model.vocab % setup.layout.tp == 0)
    replicas, ep = setup.layout.replicas, setup.layout.ep
    groups = [n for n in range(2, replicas) if replicas % n == 0 and n % ep == 0]
    kinds = st.sampled_from(get_args(Sharding)), st.sampled_from([0, *groups])
    drawn = data.draw(st.lists(st.tuples(*kinds), min_size=1, max_size=5))
    layouts = [replace(setup.layout, sharding=kind, shard_group=n) for kind, n in drawn]
    beside = costs_of(setup).columns(layouts)
    for row, layout in enumerate(layouts):
        stages = costs_of(setup).stages(layout)
        for name, column in beside._asdict().items():
            medians = [getattr(stage, name).p50_ns for stage in stages]
            assert column[row].tolist() == pytest.approx(medians, abs=1), name


@settings(max_examples=40)
@given(setups())
def test_no_stage_takes_less_than_its_parts(setup: Setup) -> None:
    """However it is sharded, and to the rounding that bounds allow for."""
    assume(setup.model.vocab % setup.layout.tp == 0)
    layout, costs = setup.layout, costs_of(setup)
    parts = np.array([costs.parts(layout)])
    again = np.array([[layout.recomputed(stage) for stage in range(layout.num_stages)]])
    least = pipelines(parts, np.array([layout.stage_layers]), again)
    for stage, cost in enumerate(costs.stages(layout)):
        assert least.forward[0, stage] <= cost.forward.p50_ns + ROUNDING_NS
        assert least.backward[0, stage] <= cost.backward.p50_ns + ROUNDING_NS
        inputs = least.backward[0, stage] - least.weight[0, stage]
        assert inputs <= cost.backward.p50_ns - cost.weight.p50_ns + ROUNDING_NS


def test_a_plan_elsewhere_is_whole_and_always_the_same() -> None:
    asked = job()
    plan = planned(asked)
    assert canonical_json(plan) == canonical_json(planned(asked))
    assert plan.step.p10_ns < plan.step.p50_ns == simulation_of(plan).makespan_ns < plan.step.p90_ns
    setup = Setup(model=asked.model, workload=asked.workload, layout=plan.layout,
                  cluster=asked.cluster, stack=asked.stack)  # fmt: skip
    assert plan.memory == memory_of(setup)
    assert plan.step.p50_ns == pytest.approx(predict(setup).step.p50_ns, abs=100)
    assert max(rank.total for rank in plan.memory) == plan.ranking[0].peak_bytes
    origin = plan.profile
    assert origin.is_reference
    assert (origin.path, origin.reference_ns) == ("", 0)
    assert (origin.digest, origin.measured_at) == reference_data()
    assert (origin.device.kind, origin.device.name, origin.device.backend) == (
        "cuda", "h100-sxm", "nccl",
    )  # fmt: skip


@pytest.mark.parametrize("name", stack_presets())
def test_what_nobody_says_is_as_the_stack_does_it(name: str) -> None:
    stack = stack_preset(name)
    for dp, tp in ((1, 1), (1, 4), (8, 1), (2, 4)):
        setup = setup_of(dp=dp, tp=tp, stack=stack)
        layout = costs_of(setup).completed(setup.layout)
        assert layout.sharding == (stack.sharding if dp > 1 else "none")
        assert layout.recompute == stack.recompute
        assert layout.sequence_parallel == (tp > 1 and stack.shards_sequence)


def test_what_the_job_says_is_searched_alone() -> None:
    asked = job(
        tp=(8,), micro_batch=(1,), sharding=("zero1",), recompute=("full",),
        sequence_parallel=(False,), schedule=("1f1b",),
    )  # fmt: skip
    for candidate in found(asked).ranking:
        layout = candidate.layout
        assert (layout.tp, layout.micro_batch, layout.sharding) == (8, 1, "zero1")
        assert (layout.recompute, layout.sequence_parallel) == ("full", False)


def test_a_model_with_tied_embeddings_and_an_odd_vocabulary_is_split_as_megatron_does() -> None:
    gpt = replace(model_preset("gpt-3-175b"), num_layers=8)
    asked = job(gpt, "megatron-2023", tp=(8,), pp=(2,), global_batch=8)
    plan = planned(asked)
    assert gpt.tied_embeddings
    assert gpt.vocab % 8
    assert (plan.layout.tp, plan.layout.pp) == (8, 2)
    # The odd vocabulary takes what the next one takes that gives each rank a multiple of 128 rows.
    padded = replace(gpt, vocab=51200)
    assert reference_costs(replace(asked, model=padded)).stages(plan.layout) == plan.costs


def test_what_was_not_published_is_refused_by_name() -> None:
    cluster = cluster_preset("h100-sxm", num_nodes=2)
    (pool,) = cluster.pools
    unknown = replace(pool, gpu=replace(pool.gpu, name="abacus"))
    for pools in ((unknown,), (pool, unknown)):
        with pytest.raises(UnsupportedError, match="abacus, of which no measurements"):
            reference_costs(job(cluster=replace(cluster, pools=pools)))
    assert "layline profile" in refusal(job(cluster=replace(cluster, pools=(unknown,))))


def refusal(asked: Job) -> str:
    with pytest.raises(UnsupportedError) as caught:
        reference_costs(asked)
    return str(caught.value)


def test_a_known_gpu_with_other_memory_takes_its_curves() -> None:
    cluster = cluster_preset("h100-sxm")
    half = replace(gpu_preset("h100-sxm"), memory_bytes=gpu_preset("h100-sxm").memory_bytes // 2)
    small = job(cluster=replace(cluster, pools=(replace(cluster.pools[0], gpu=half),)))
    asked = job(cluster=cluster)
    assert basis_of(small, reference_costs(small)).limit_bytes == half.memory_bytes
    assert basis_of(asked, reference_costs(asked)).limit_bytes == 2 * half.memory_bytes
    few = [replace(candidate, jittered_ns=0) for candidate in found(small).ranking[:10]]
    wide = evaluate(basis_of(asked, reference_costs(asked)), [c.layout for c in few])
    assert few == wide
    assert found(small).ranking[0].step.p50_ns >= found(asked).ranking[0].step.p50_ns
