"""The search, the cost and the memory model: closed forms on a made-up machine."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost import cost_model
from planner.kernels import StageShape, layer_backward, layer_forward, stage_parameters
from planner.layout import Layout
from planner.memory import stage_memory
from planner.partition import balanced_stages
from planner.plan import load_plan, save_plan
from planner.schedule import one_f_one_b
from planner.search import (
    InfeasibleError,
    best_of_each_kind,
    make_plan,
    search,
)
from profiles.errors import UnsupportedError
from profiles.job import Job, SearchLimits
from profiles.model import ModelSpec
from tests.machine import FLOPS_PER_NS, RATE_BYTES_PER_NS, TINY, made_up_job, made_up_profile

PROFILE = made_up_profile(num_ranks=8)


def job(**changes: object) -> Job:
    return replace(made_up_job(num_ranks=4), **changes)  # type: ignore[arg-type]


def brute_force(num_layers: int, costs: tuple[int, ...], layer_ns: int) -> int:
    """Return the least possible bottleneck, by trying every split."""
    if len(costs) == 1:
        return costs[0] + num_layers * layer_ns
    return min(
        max(costs[0] + n * layer_ns, brute_force(num_layers - n, costs[1:], layer_ns))
        for n in range(1, num_layers - len(costs) + 2)
    )


@given(st.integers(1, 4), st.integers(0, 6), st.integers(1, 9), st.integers(0, 40),
       st.integers(0, 40))  # fmt: skip
def test_partition_is_the_best_of_all(p: int, more: int, layer: int, first: int, last: int) -> None:
    layers = balanced_stages(p + more, p, layer, first, last)
    extra = [0] * p
    extra[0] += first
    extra[-1] += last
    assert sum(layers) == p + more
    bottleneck = max(n * layer + e for n, e in zip(layers, extra, strict=True))
    assert bottleneck == brute_force(p + more, tuple(extra), layer)


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


def test_every_layout_is_ranked_or_rejected_once() -> None:
    result = search(job(), PROFILE)
    seen = [str(c.layout) for c in result.ranking] + [r.layout for r in result.rejections]
    assert len(seen) == len(set(seen))
    degrees = {(c.layout.dp, c.layout.tp, c.layout.pp) for c in result.ranking}
    assert degrees == {(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)}
    assert [r.layout for r in result.rejections] == ["dp=1,tp=4,pp=1"]
    assert "the model has 2 kv heads; tp must divide them (1, 2)" in result.rejections[0].reason
    assert all(c.layout.global_batch == job().workload.global_batch for c in result.ranking)
    times = [c.step.p50_ns for c in result.ranking]
    assert times == sorted(times)
    assert result == search(job(), PROFILE)


def test_limits_hold_and_reasons_name_them() -> None:
    limits = SearchLimits(tp=(1,), schedule=("gpipe",), micro_batch=(2,))
    result = search(job(search=limits), PROFILE)
    assert all(c.layout.tp == 1 and c.layout.micro_batch == 2 for c in result.ranking)
    assert {c.layout.schedule for c in result.ranking if c.layout.pp > 1} == {"gpipe"}
    assert any("search.tp allows 1" in r.reason for r in result.rejections)


def test_kinds_are_told_apart() -> None:
    result = search(job(), PROFILE)
    places = best_of_each_kind(result)
    kinds = [(result.ranking[p].layout.pp, result.ranking[p].layout.schedule) for p in places]
    assert places[0] == 0
    assert len(places) == 5 + 3
    assert {"gpipe", "1f1b"} == {name for pp, name in kinds if pp > 1}


def test_nothing_fits_names_the_constraint_and_the_way_out() -> None:
    small = replace(job().cluster.pools[0].gpu, memory_bytes=300_000)
    pool = replace(job().cluster.pools[0], gpu=small)
    with pytest.raises(InfeasibleError, match=r"memory binds\. The smallest, .* needs .* a rank"):
        search(job(cluster=replace(job().cluster, pools=(pool,))), PROFILE)
    odd = replace(job().workload, global_batch=3)
    limits = SearchLimits(dp=(4,))
    with pytest.raises(InfeasibleError, match=r"no layout of 4 ranks is legal: .*dp must divide"):
        search(job(workload=odd, search=limits), PROFILE)


def test_a_model_that_is_no_llama_is_refused_by_name() -> None:
    gpt = ModelSpec(name="gpt", num_layers=2, hidden=64, num_heads=4, num_kv_heads=4, head_size=16,
                    ffn=256, vocab=256, max_seq_len=64, norm="layernorm", mlp="gelu",
                    positions="learned", has_biases=True)  # fmt: skip
    with pytest.raises(UnsupportedError, match="layernorm, gelu and learned"):
        search(job(model=gpt), PROFILE)


def test_a_profile_of_another_machine_is_refused_by_name() -> None:
    elsewhere = replace(job().cluster, local_device="")
    with pytest.raises(
        UnsupportedError, match=r"measured made-up \(cpu\), the cluster has made-up"
    ):
        search(job(cluster=elsewhere), PROFILE)
    h200 = replace(PROFILE, device=replace(PROFILE.device, kind="cuda", name="NVIDIA H200"))
    with pytest.raises(UnsupportedError, match="measured NVIDIA H200"):
        search(job(cluster=elsewhere), h200)
    with pytest.raises(UnsupportedError, match="measured cuda, the job asks for cpu"):
        search(job(), h200)


def test_memory_of_a_stage() -> None:
    layout = Layout(dp=1, tp=2, pp=2, micro_batch=1, num_microbatches=4, stage_layers=(2, 2))
    schedule = one_f_one_b(2, 4)
    first, last = stage_memory(
        TINY, job().workload, layout, schedule, job().stack, context_bytes=1000
    )
    shape = StageShape(model=TINY, tp=2, micro_batch=1, seq_len=job().workload.seq_len)
    assert first.parameters == first.gradients == 4 * stage_parameters(shape, (2, 2), 0)
    assert first.optimizer == 2 * first.parameters
    # Stage 0 of 1F1B holds two micro-batches, the last stage one, plus the head.
    assert first.activations > last.activations * 0.9
    assert first.total == sum(
        (first.parameters, first.gradients, first.optimizer, first.activations, first.temporary,
         first.context)
    )  # fmt: skip


@given(st.sampled_from([1, 2, 4]), st.sampled_from([8, 16, 32]))
def test_memory_grows_with_batch_and_sequence(micro_batch: int, seq_len: int) -> None:
    def total(micro_batch: int, seq_len: int) -> int:
        layout = Layout(
            dp=1, tp=1, pp=2, micro_batch=micro_batch, num_microbatches=2, stage_layers=(2, 2)
        )
        work = replace(job().workload, seq_len=seq_len)
        return max(
            m.total for m in stage_memory(TINY, work, layout, one_f_one_b(2, 2), job().stack, 0)
        )

    assert total(2 * micro_batch, seq_len) > total(micro_batch, seq_len)
    assert total(micro_batch, 2 * seq_len) > total(micro_batch, seq_len)


def test_plan_file_reads_back(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "plan.json"
    plan = make_plan(job(), PROFILE, "profile.json", search(job(), PROFILE), 0, "0.0.0")
    save_plan(plan, path)
    first = path.read_bytes()
    assert load_plan(path) == plan
    save_plan(load_plan(path), path)
    assert path.read_bytes() == first
