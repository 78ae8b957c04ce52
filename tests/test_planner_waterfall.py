"""The waterfall of a step: its parts sum to it, each is known on paper, one formula for MFU."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.layout import Layout
from planner.lower import simulation_of
from planner.plan import Plan, StageCost
from planner.predict import predict
from planner.reference.costs import ReferenceCosts
from planner.reference.step import built
from planner.schedules import SCHEDULES
from planner.setup import Setup
from planner.waterfall import PARTS, PARTS_WITHOUT_PEAK, Waterfall, utilization, waterfall
from profiles.profile import Cost
from profiles.workload import Workload
from simulator.idle import stream_uses
from tests.plans import TINY, tiny_cluster, tiny_layout, tiny_plan
from tests.setups import setup_of, setups

US = 1_000
PEAK = 1e11
"""Flops per second of a rank of `tiny_cluster`, in fp32."""


def cost(us: int) -> Cost:
    return Cost(p10_ns=us * US, p50_ns=us * US, p90_ns=us * US)


def stage(**us: int) -> StageCost:
    """Return a stage whose parts take so many us, all others nothing."""
    parts = ("forward", "backward", "weight", "send_forward", "send_backward", "all_reduce",
             "optimizer", "other", "wait")  # fmt: skip
    return StageCost(
        **{part: cost(us.get(part, 0)) for part in parts},
        tensor_parallel_forward_ns=US * us.get("tensor_forward", 0),
        tensor_parallel_backward_ns=US * us.get("tensor_backward", 0),
    )


def of(plan: Plan) -> Waterfall:
    return waterfall(plan, stream_uses(simulation_of(plan)))


def without_peak(**changed: object) -> Plan:
    """Return a tiny plan on ranks of which no peak is known."""
    cluster = tiny_cluster()
    (pool,) = cluster.pools
    cpu = replace(pool, gpu=replace(pool.gpu, peak_flops_per_s={}))
    return tiny_plan(**{"cluster": replace(cluster, pools=(cpu,)), **changed})  # type: ignore[arg-type]


def test_one_rank_is_the_sum_of_its_parts() -> None:
    only = stage(forward=100, backward=200, all_reduce=30, optimizer=7, other=5, wait=3,
                 tensor_forward=10, tensor_backward=20)  # fmt: skip
    found = of(without_peak(layout=tiny_layout(global_batch=8), costs=(only,)))
    assert dict(found.parts_ns) == {
        "work": 8 * 270 * US,
        "exchange": 8 * 30 * US,
        "pipeline": 0,
        "reduction": 30 * US,
        "optimizer": 7 * US,
        "host": 8 * US,
    }
    assert tuple(found.parts_ns) == PARTS_WITHOUT_PEAK
    assert found.step_ns == (8 * 300 + 30 + 7 + 8) * US
    assert (found.mfu, found.hfu) == (None, None)


@given(p=st.integers(2, 4).filter(lambda p: p != 3), m=st.integers(1, 16))
def test_an_even_pipeline_idles_for_its_filling_and_draining(p: int, m: int) -> None:
    layout = tiny_layout(pp=p, global_batch=m)
    found = of(without_peak(layout=layout, costs=(stage(forward=10, backward=20),) * p))
    assert found.parts_ns["pipeline"] == (p - 1) * 30 * US
    assert found.parts_ns["work"] == m * 30 * US


def test_what_is_waited_for_tells_the_part() -> None:
    # One micro-batch: each rank waits for the other's work and for both messages, 4 us each.
    layout = tiny_layout(pp=2, global_batch=1)
    first = stage(forward=10, backward=20, send_forward=4)
    last = stage(forward=10, backward=20, send_backward=4, all_reduce=6, optimizer=2)
    found = of(without_peak(layout=layout, costs=(first, last)))
    assert found.step_ns == 68 * US
    # Of 68 us the first rank is busy for 30, the last for 38, and starts and ends in between.
    assert dict(found.parts_ns) == {
        "work": 30 * US,
        "exchange": 0,
        "pipeline": (38 + 30) * US // 2,
        "reduction": 3 * US,
        "optimizer": 1 * US,
        "host": 0,
    }
    late = replace(last, all_reduce=cost(100))
    found = of(without_peak(layout=layout, costs=(first, late)))
    # The step ends with the last rank's reduction and update; the first rank waits for them.
    assert found.step_ns == (10 + 4 + 10 + 20 + 100 + 2) * US
    assert found.parts_ns["reduction"] == (100 + 100 - 24) * US // 2


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(sorted(SCHEDULES)), m=st.integers(1, 9))
def test_the_parts_sum_to_the_step_whatever_it_is(data: st.DataObject, name: str, m: int) -> None:
    family, pp = SCHEDULES[name], data.draw(st.sampled_from((1, 2)))
    stages_per_rank = family.stages_per_rank or data.draw(st.sampled_from((1, 2)))
    if pp == 1 or not family.takes(stages_per_rank):
        pp, stages_per_rank, name = 1, 1, "1f1b"
    layout = tiny_layout(pp=pp, schedule=name, global_batch=m, stages_per_rank=stages_per_rank)
    odd = st.integers(0, 10**7 + 1)

    def some() -> Cost:
        ns = data.draw(odd)
        return Cost(p10_ns=ns, p50_ns=ns, p90_ns=ns)

    costs = tuple(
        replace(
            stage(backward=10**5), forward=some(), send_forward=some(), send_backward=some(),
            all_reduce=some(), optimizer=some(), other=some(), wait=some(), weight=some(),
            tensor_parallel_forward_ns=data.draw(odd),
        )
        for _ in range(layout.num_stages)
    )  # fmt: skip
    has_peak = data.draw(st.booleans())
    plan = (tiny_plan if has_peak else without_peak)(layout=layout, costs=costs)
    found = of(plan)
    assert tuple(found.parts_ns) == (PARTS if has_peak else PARTS_WITHOUT_PEAK)
    assert sum(found.parts_ns.values()) == found.step_ns == simulation_of(plan).makespan_ns
    if found.mfu is not None:
        assert found.parts_ns["peak"] == pytest.approx(found.mfu * found.step_ns, abs=1)


def test_mfu_and_hfu_are_flops_over_what_all_ranks_could_do() -> None:
    layout = Layout(dp=2, tp=1, pp=2, micro_batch=1, num_microbatches=4, stage_layers=(2, 2),
                    recompute="full")  # fmt: skip
    plan = tiny_plan(layout, seq_len=32, costs=(stage(forward=10**4, backward=2 * 10**4),) * 2)
    found = of(plan)
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    layers, head = 4 * (attention + 3 * 64 * 128), 256 * 64
    scores = 4 * 64 * 32
    tokens = 8 * 32
    model = tokens * (6 * (layers + head) + 6 * scores)
    again = tokens * (2 * layers + 2 * scores)
    assert found.step_ns == (4 + 1) * 3 * 10**4 * US
    most = found.step_ns / 1e9 * 4 * PEAK
    assert found.mfu == pytest.approx(model / most)
    assert found.hfu == pytest.approx((model + again) / most)
    assert found.parts_ns["recompute"] == pytest.approx(again / (4 * PEAK) * 1e9, abs=1)
    assert plan.model is TINY
    assert utilization(plan, 0) is None
    fp8 = replace(plan.workload, dtype="fp8")
    assert utilization(tiny_plan(layout, workload=fp8), 10**9) is None


def plan_of(setup: Setup) -> Plan:
    """Return a plan of `setup` with the costs of the reference model."""
    costs = ReferenceCosts(
        model=setup.model, workload=setup.workload, stack=setup.stack, cluster=setup.cluster
    )
    return tiny_plan(
        setup.layout, setup.model, workload=setup.workload, cluster=setup.cluster,
        stack=setup.stack, costs=costs.stages(setup.layout), profile=costs.origin,
        schedule=tuple(str(built(setup.layout)).splitlines()),
    )  # fmt: skip


@settings(max_examples=30)
@given(setups())
def test_a_prediction_and_a_plan_lose_the_step_to_the_same(setup: Setup) -> None:
    setup = replace(setup, model=replace(setup.model, vocab=51200))
    found, expected = of(plan_of(setup)).parts_ns, predict(setup).parts
    slack_ns = 2 + setup.layout.num_microbatches * setup.layout.num_stages
    assert sum(found.values()) == pytest.approx(sum(expected.values()), abs=slack_ns)
    for part in ("peak", "recompute"):
        assert found[part] == pytest.approx(expected[part], abs=2)
    if setup.layout.pp == 1:
        kernels = expected["kernels"] + expected["memory"] + expected["launch"]
        inside = kernels + expected["exchange"]
        assert found["kernels"] + found["exchange"] == pytest.approx(inside, abs=2 * slack_ns)
        for part in ("reduction", "optimizer", "host"):
            assert found[part] == pytest.approx(expected[part], abs=2 * slack_ns)


def test_full_recomputation_is_hardware_that_the_model_has_nothing_of() -> None:
    # All of the forward but the head is made again: HFU / MFU is a little below 4 / 3.
    setup = setup_of(dp=2, tp=8, pp=2, recompute="full", sequence_parallel=True)
    found = of(plan_of(setup))
    assert found.mfu is not None
    assert found.hfu is not None
    assert 1.25 < found.hfu / found.mfu < 4 / 3
    assert all(ns >= 0 for ns in found.parts_ns.values())
    assert found.parts_ns["exchange"] > found.parts_ns["reduction"] > 0


def test_a_workload_in_another_dtype_has_another_peak() -> None:
    plan = plan_of(setup_of(dtype="bf16"))
    fp8 = Workload(seq_len=plan.workload.seq_len, global_batch=plan.workload.global_batch,
                   dtype="fp8")  # fmt: skip
    bf16_share, fp8_share = (
        utilization(tiny_plan(plan.layout, plan.model, cluster=plan.cluster, workload=work), 10**9)
        for work in (plan.workload, fp8)
    )
    assert bf16_share is not None
    assert fp8_share is not None
    assert bf16_share.mfu / fp8_share.mfu == pytest.approx(1979 / 989)
