"""The search, the cost and the memory model: closed forms on a made-up machine."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost import cost_model, measured_costs
from planner.kernels import StageShape, layer_backward, layer_forward, stage_parameters
from planner.layout import LOCAL_SCHEDULES, Layout
from planner.lower import (
    QUANTILES,
    memory_of,
    predict_step,
    predict_steps,
    simulate_plan,
    simulation_of,
    stage_times,
)
from planner.memory import layer_activation_bytes, peak_activations, peak_memory
from planner.orders import MAX_CELLS
from planner.plan import Plan, StageCost, load_plan, save_plan
from planner.schedules import SCHEDULES
from planner.schedules.flush import one_f_one_b
from planner.search import InfeasibleError, SearchResult, best_of_each_kind, make_plan
from planner.search import search as search_costs
from planner.space import SYNTHESISED, Degrees, Space
from profiles.errors import UnsupportedError
from profiles.job import Job, SearchLimits
from profiles.job_schema import ScheduleName
from profiles.model import ModelSpec
from profiles.profile import Cost, Profile
from tests.machine import FLOPS_PER_NS, RATE_BYTES_PER_NS, TINY, made_up_job, made_up_profile

PROFILE = made_up_profile(num_ranks=8)
CUDA_PROFILE = replace(PROFILE, device=replace(PROFILE.device, kind="cuda"))
ONE_STAGE_A_RANK = SearchLimits(schedule=("1f1b", "gpipe"))


def job(**changes: object) -> Job:
    return replace(made_up_job(num_ranks=4), **changes)  # type: ignore[arg-type]


def search(job: Job, profile: Profile = PROFILE) -> SearchResult:
    return search_costs(job, measured_costs(job, profile))


def planned(job: Job, profile: Profile, result: SearchResult, place: int = 0) -> Plan:
    return make_plan(job, measured_costs(job, profile, "profile.json"), result, place, "0.0.0")


def test_layer_kernels_count_the_flops_of_the_model() -> None:
    shape = StageShape(model=TINY, tp=2, micro_batch=2, seq_len=16)
    kernels = (*layer_forward(shape), *layer_backward(shape))
    flops = sum(2 * m * n * k for _, (m, n, k) in
                ((x.op, x.shape) for x in kernels if x.op.startswith("linear")))  # fmt: skip
    matrices = TINY.num_layer_parameters - 2 * TINY.hidden
    assert flops * 2 == 6 * matrices * shape.rows


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("stage_layers", [(4,), (2, 2), (1, 2, 1)])
def test_stage_parameters_add_up_to_the_model(tp: int, stage_layers: tuple[int, ...]) -> None:
    shape = StageShape(model=TINY, tp=tp, micro_batch=1, seq_len=16)
    held = sum(stage_parameters(shape, stage_layers, s) for s in range(len(stage_layers)))
    norms = (2 * TINY.num_layers + 1) * TINY.hidden
    assert (held - norms) * tp + norms == TINY.num_parameters


def test_forward_of_a_stage_is_its_flops_over_the_rate() -> None:
    # On the made-up machine only flops and bytes cost, so a stage is a sum that fits on paper.
    layout = Layout(dp=1, tp=1, pp=1, micro_batch=2, num_microbatches=4, stage_layers=(4,))
    (cost,) = cost_model(TINY, job().workload, job().stack, PROFILE).stages(layout)
    rows = 2 * job().workload.seq_len
    matrices = TINY.num_layers * (TINY.num_layer_parameters - 2 * TINY.hidden)
    matrices += TINY.vocab * TINY.hidden
    linear_ns = 2 * rows * matrices / FLOPS_PER_NS
    assert cost.forward.p50_ns == pytest.approx(linear_ns, rel=0.02)
    assert cost.all_reduce.p50_ns == cost.send_forward.p50_ns == 0


def test_gradient_reduction_is_the_ring_formula() -> None:
    layout = Layout(dp=4, tp=1, pp=1, micro_batch=1, num_microbatches=2, stage_layers=(4,))
    (cost,) = cost_model(TINY, job().workload, job().stack, PROFILE).stages(layout)
    expected = 2 * 3 / 4 * 4 * TINY.num_parameters / RATE_BYTES_PER_NS
    assert cost.all_reduce.p50_ns == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_weight_half_of_a_backward_is_its_weight_gradients(tp: int) -> None:
    layout = Layout(dp=1, tp=tp, pp=4, micro_batch=2, num_microbatches=1,
                    stage_layers=(1, 1, 1, 1))  # fmt: skip
    costs = cost_model(TINY, job().workload, job().stack, PROFILE).stages(layout)
    rows = 2 * job().workload.seq_len
    layer = (TINY.num_layer_parameters - 2 * TINY.hidden) // tp
    head = TINY.vocab * TINY.hidden // tp
    for cost, parameters in zip(costs, (layer, layer, layer, layer + head), strict=True):
        assert cost.weight.p50_ns == pytest.approx(2 * rows * parameters / FLOPS_PER_NS, rel=0.02)
        for quantile in QUANTILES:
            assert 0 < getattr(cost.weight, quantile) < getattr(cost.backward, quantile)


def test_a_step_has_three_lanes_a_candidate_and_host_work_once_a_rank() -> None:
    def cost(ns: int) -> StageCost:
        some = Cost(p10_ns=ns, p50_ns=2 * ns, p90_ns=3 * ns)
        return StageCost(forward=some, backward=some, weight=some, send_forward=some,
                         send_backward=some, all_reduce=some, optimizer=some, other=some, wait=some,
                         tensor_parallel_forward_ns=0, tensor_parallel_backward_ns=0)  # fmt: skip

    schedule = SCHEDULES["interleaved"].build(2, 4)
    two = [[cost(10)] * 4, [cost(700)] * 4]
    times = stage_times(schedule, two)
    assert times.num_lanes == 6
    before, after = times.edge_ns()
    assert before[:, 1].tolist() == [20, 20, 0, 0]
    assert after[:, 5].tolist() == [3 * 2100] * 4
    assert predict_steps(schedule, two) == [predict_step(schedule, costs) for costs in two]


def test_every_named_schedule_is_in_the_job_file_and_the_other_way_round() -> None:
    assert set(get_args(ScheduleName)) == {*SCHEDULES, SYNTHESISED}
    assert set(LOCAL_SCHEDULES) <= set(get_args(ScheduleName))


def elsewhere(**limits: object) -> Job:
    """Return a job for a cluster that is not this machine."""
    cluster = replace(job().cluster, local_device="")
    return job(cluster=cluster, search=SearchLimits(**limits))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_named_schedule_is_searched_where_it_is_asked_for(name: str, tmp_path: Path) -> None:
    asked = elsewhere(schedule=(name,), pp=(2,))
    result = search(asked, CUDA_PROFILE)
    assert {c.layout.schedule for c in result.ranking} == {name}
    for place, candidate in enumerate(result.ranking):
        layout = candidate.layout
        assert SCHEDULES[name].takes(layout.stages_per_rank)
        assert sum(layout.stage_layers) == TINY.num_layers
        plan = planned(asked, CUDA_PROFILE, result, place)
        assert (len(plan.memory), len(plan.costs)) == (2, 2 * layout.stages_per_rank)
        save_plan(plan, tmp_path / "plan.json")
        assert load_plan(tmp_path / "plan.json") == plan
        simulation = simulation_of(plan)
        assert simulation.makespan_ns == plan.step.p50_ns
        curves = memory_of(plan, simulation)
        peaks = {rank: curve.peak_bytes for rank, curve in curves.items()}
        assert peaks == simulate_plan(plan).peak_bytes
        assert max(peaks.values()) == candidate.peak_bytes


def test_here_only_what_can_be_run_is_searched_elsewhere_all() -> None:
    here = search(job())
    assert {c.layout.schedule for c in here.ranking} == set(LOCAL_SCHEDULES)
    there = search(elsewhere(), CUDA_PROFILE)
    assert {c.layout.schedule for c in there.ranking} - {*LOCAL_SCHEDULES}
    costs = measured_costs(elsewhere(), CUDA_PROFILE)
    assert Space(elsewhere(), costs).schedules == (*SCHEDULES, SYNTHESISED)
    seen = [str(c.layout) for c in there.ranking] + [r.layout for r in there.rejections]
    assert len(seen) == len(set(seen))
    assert "dp=1,tp=1,pp=4,v=2" in {r.layout for r in there.rejections}


def test_limits_on_stages_name_themselves() -> None:
    result = search(elsewhere(stages_per_rank=(2, 3)), CUDA_PROFILE)
    assert {c.layout.stages_per_rank for c in result.ranking} == {2}
    reasons = {r.layout: r.reason for r in result.rejections}
    assert reasons["dp=4,tp=1,pp=1"] == (
        "pp is 1, which is one stage a rank; search.stages_per_rank allows 2, 3 only"
    )
    assert reasons["dp=2,tp=1,pp=2,v=3"] == (
        "pp is 2 with 3 stages a rank, but the model has 4 layers; a stage needs one"
    )
    with pytest.raises(InfeasibleError, match="search limits, such as dp=4,tp=1,pp=1: pp is 1; "):
        search(job(search=replace(ONE_STAGE_A_RANK, pp=(2,), stages_per_rank=(2,))))
    asked = job(search=replace(ONE_STAGE_A_RANK, stages_per_rank=(2,)))
    space = Space(asked, measured_costs(asked, PROFILE))
    none, [(refused, num_layouts)] = space.pipelines(Degrees(1, 1, 4))
    assert not none
    assert refused.reason == "no schedule among 1f1b, gpipe has 2 stages a rank"
    assert num_layouts == 4  # micro-batches
    alone = search(elsewhere(schedule=("interleaved",)), CUDA_PROFILE)
    assert all(c.layout.pp > 1 for c in alone.ranking)
    assert "search.schedule allows interleaved only" in alone.rejections[0].reason


def test_more_than_a_plan_can_write_out_is_a_rejection_with_a_way_out() -> None:
    most = MAX_CELLS // 4
    limits = SearchLimits(dp=(1,), tp=(1,), pp=(4,), micro_batch=(1, 2), schedule=("1f1b",))
    work = replace(job().workload, global_batch=2 * most)
    result = search(job(workload=work, search=limits))
    assert [c.layout.num_microbatches for c in result.ranking] == [most]
    assert [(r.layout, r.reason) for r in result.rejections if r.rule == "length"] == [
        (
            "dp=1,tp=1,pp=4,mb=1x262144",
            "262144 micro-batches on 4 stages; a plan writes out what each stage does with each, "
            "for 65536 stages and 524288 pairs of the two at most; take a larger micro-batch",
        )
    ]
    work = replace(job().workload, global_batch=1 << 26)
    with pytest.raises(InfeasibleError, match="67108864 micro-batches on 4 stages; a plan writes"):
        search(job(workload=work, search=limits))


def test_every_layout_is_ranked_or_rejected_once() -> None:
    asked = job(search=ONE_STAGE_A_RANK)
    result = search(asked)
    seen = [str(c.layout) for c in result.ranking] + [r.layout for r in result.rejections]
    assert len(seen) == len(set(seen))
    degrees = {(c.layout.dp, c.layout.tp, c.layout.pp) for c in result.ranking}
    assert degrees == {(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)}
    assert [r.layout for r in result.rejections] == ["dp=1,tp=4,pp=1"]
    assert "the model has 2 kv heads; tp must divide them (1, 2)" in result.rejections[0].reason
    assert all(c.layout.global_batch == job().workload.global_batch for c in result.ranking)
    times = [c.step.p50_ns for c in result.ranking]
    assert times == sorted(times)
    assert result == search(asked)


def test_limits_hold_and_reasons_name_them() -> None:
    limits = SearchLimits(tp=(1,), schedule=("gpipe",), micro_batch=(2,))
    result = search(job(search=limits))
    assert all(c.layout.tp == 1 and c.layout.micro_batch == 2 for c in result.ranking)
    assert {c.layout.schedule for c in result.ranking if c.layout.pp > 1} == {"gpipe"}
    assert any("search.tp allows 1" in r.reason for r in result.rejections)


def test_kinds_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.search.FEW", 100)
    result = search(job(search=ONE_STAGE_A_RANK))
    places = best_of_each_kind(result)
    kinds = [(result.ranking[p].layout.pp, result.ranking[p].layout.schedule) for p in places]
    assert places[0] == 0
    assert len(places) == 5 + 3
    assert {"gpipe", "1f1b"} == {name for pp, name in kinds if pp > 1}


def test_nothing_fits_names_the_constraint_and_the_way_out() -> None:
    small = replace(job().cluster.pools[0].gpu, memory_bytes=300_000)
    pool = replace(job().cluster.pools[0], gpu=small)
    with pytest.raises(InfeasibleError, match=r"memory binds\. The smallest, .* needs .* a rank"):
        search(job(cluster=replace(job().cluster, pools=(pool,))))
    odd = replace(job().workload, global_batch=3)
    limits = SearchLimits(dp=(4,))
    with pytest.raises(InfeasibleError, match=r"no layout of 4 ranks will do: .*dp must divide"):
        search(job(workload=odd, search=limits))


def test_a_model_that_is_no_llama_is_refused_by_name() -> None:
    gpt = ModelSpec(name="gpt", num_layers=2, hidden=64, num_heads=4, num_kv_heads=4, head_size=16,
                    ffn=256, vocab=256, max_seq_len=64, norm="layernorm", mlp="gelu",
                    positions="learned", has_biases=True)  # fmt: skip
    with pytest.raises(UnsupportedError, match="layernorm, gelu and learned"):
        search(job(model=gpt))


def test_a_profile_of_another_machine_is_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedError, match=r"measured made-up \(cpu\), the cluster has made-up"
    ):
        search(elsewhere())
    h200 = replace(PROFILE, device=replace(PROFILE.device, kind="cuda", name="NVIDIA H200"))
    with pytest.raises(UnsupportedError, match="measured NVIDIA H200"):
        search(elsewhere(), h200)
    with pytest.raises(UnsupportedError, match="measured cuda, the job asks for cpu"):
        search(job(), h200)


def test_a_profile_of_another_cpu_is_refused_unless_told() -> None:
    other = replace(PROFILE, device=replace(PROFILE.device, name="another CPU"))
    with pytest.raises(UnsupportedError, match=r"another CPU \(cpu\).*foreign_profile = true"):
        search(job(), other)
    told = search(replace(job(), foreign_profile=True), other)
    assert told.ranking == search(job()).ranking


def test_memory_of_a_stage() -> None:
    layout = Layout(dp=1, tp=2, pp=2, micro_batch=1, num_microbatches=4, stage_layers=(2, 2))
    schedule = one_f_one_b(2, 4)
    first, last = peak_memory(
        TINY, job().workload, layout, schedule, job().stack, context_bytes=1000
    )
    shape = StageShape(model=TINY, tp=2, micro_batch=1, seq_len=job().workload.seq_len)
    assert first.parameters == first.gradients == 4 * stage_parameters(shape, (2, 2), 0)
    assert first.optimizer == 2 * first.parameters
    # Stage 0 of 1F1B holds two micro-batches, the last stage one, plus the head.
    assert first.activations > last.activations * 0.9
    # A message in use and one on its way, in fp32.
    assert first.buffers == last.buffers == 2 * shape.rows * TINY.hidden * 4
    assert first.total == sum(
        (first.parameters, first.gradients, first.optimizer, first.activations, first.temporary,
         first.buffers, first.context)
    )  # fmt: skip


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    p=st.integers(1, 4),
    m=st.integers(1, 9),
    stage_bytes=st.lists(st.integers(0, 10**12), min_size=8, max_size=8),
)
def test_activations_peak_as_a_walk_over_the_schedule_says(
    name: str, p: int, m: int, stage_bytes: list[int]
) -> None:
    schedule = SCHEDULES[name].build(p, m)
    expected = []
    for actions in schedule.ranks:
        held = most = 0
        for action in actions:
            sign = {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
            held += sign * stage_bytes[action.stage]
            most = max(most, held)
        assert held == 0
        expected.append(most)
    assert peak_activations(schedule, stage_bytes[: schedule.num_stages]) == tuple(expected)


def test_a_rank_holds_all_of_its_stages() -> None:
    layout = Layout(dp=1, tp=1, pp=2, micro_batch=1, num_microbatches=4, stage_layers=(1, 1, 1, 1),
                    schedule="interleaved", stages_per_rank=2)  # fmt: skip
    schedule = SCHEDULES["interleaved"].build(2, 4)
    memory = peak_memory(TINY, job().workload, layout, schedule, job().stack, context_bytes=7)
    shape = StageShape(model=TINY, tp=1, micro_batch=1, seq_len=job().workload.seq_len)
    assert schedule.homes.tolist() == [0, 1, 0, 1]
    held = [stage_parameters(shape, layout.stage_layers, stage) for stage in range(4)]
    assert [rank.parameters for rank in memory] == [4 * (held[0] + held[2]),
                                                    4 * (held[1] + held[3])]  # fmt: skip
    assert [rank.context for rank in memory] == [7, 7]
    # Rank 0 of interleaved 1F1B keeps 2 (p - 1) + (v - 1) p + 1 micro-batches of a stage alive.
    layer = layer_activation_bytes(shape, 4, fuses_norms=False)
    assert memory[0].activations == 5 * layer


@given(st.sampled_from([1, 2, 4]), st.sampled_from([8, 16, 32]))
def test_memory_grows_with_batch_and_sequence(micro_batch: int, seq_len: int) -> None:
    def total(micro_batch: int, seq_len: int) -> int:
        layout = Layout(
            dp=1, tp=1, pp=2, micro_batch=micro_batch, num_microbatches=2, stage_layers=(2, 2)
        )
        work = replace(job().workload, seq_len=seq_len)
        return max(
            m.total for m in peak_memory(TINY, work, layout, one_f_one_b(2, 2), job().stack, 0)
        )

    assert total(2 * micro_batch, seq_len) > total(micro_batch, seq_len)
    assert total(micro_batch, 2 * seq_len) > total(micro_batch, seq_len)


def test_plan_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = planned(job(), PROFILE, search(job()))
    save_plan(plan, path)
    first = path.read_bytes()
    assert load_plan(path) == plan
    save_plan(load_plan(path), path)
    assert path.read_bytes() == first
