"""Pipelines over pools of unlike GPUs, and replicas of unlike speed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.account import account_of, dealt
from planner.bounds import Columns
from planner.evaluate import basis_of, evaluate
from planner.flops import mean_peak_flops_per_s, step_flops
from planner.frontier import Tally, frontier
from planner.layout import Layout
from planner.layout_text import parse_layout
from planner.lower import predict_step, simulate_plan, simulation_of
from planner.mixed import shares_of
from planner.orders import order_of
from planner.partition import Homes, deal, dealt_stages, homes_of
from planner.plan import PeakMemory, Plan, load_plan, save_plan
from planner.pools import limits_bytes, misfit, pools_of_ranks, unlike_pools
from planner.reference.costs import ReferenceCosts, reference_costs
from planner.schedules import SCHEDULES
from planner.search import Effort, SearchResult, make_plan, search
from planner.setup import Setup
from planner.space import Space
from planner.thumb import thumb_rule
from planner.waterfall import waterfall
from profiles.cluster import ClusterSpec, PoolSpec
from profiles.errors import InvalidInputError, UnsupportedError
from profiles.goal import Goal
from profiles.job import Job, SearchLimits, read_job
from profiles.presets import cluster_preset, stack_preset
from profiles.workload import Workload
from simulator.idle import stream_uses
from tests.setups import SMALL

GIB = 2**30
FAST, SLOW = "h100-sxm", "a100-sxm-80gb"
EXAMPLES = Path(__file__).parent.parent / "examples"


def pool_of(gpu: str, num_nodes: int, node: int = 4, gib: float = 80) -> PoolSpec:
    (pool,) = cluster_preset(gpu, num_nodes=2).pools
    small = replace(pool.gpu, memory_bytes=round(gib * GIB))
    return replace(pool, gpu=small, gpus_per_node=node, num_nodes=num_nodes)


def cluster_of(*pools: PoolSpec) -> ClusterSpec:
    return replace(cluster_preset(SLOW, num_nodes=2), pools=pools)


MIXED = cluster_of(pool_of(FAST, 1), pool_of(SLOW, 2))
PLAIN = {"schedule": ("1f1b", "zb_v"), "cp": (1,), "recompute": ("none",)}


def job_of(
    cluster: ClusterSpec = MIXED, *, batch: int = 8, goal: Goal | None = None, **limits: object
) -> Job:
    """Return a job on one node of four H100 and two of four A100, unless it is told otherwise."""
    return Job(
        seed=0,
        model=replace(SMALL, num_layers=9),
        workload=Workload(seq_len=2048, global_batch=batch, dtype="bf16"),
        cluster=cluster,
        stack=stack_preset("torchtitan"),
        profile_path="",
        search=SearchLimits(**PLAIN | limits),  # type: ignore[arg-type]
        goal=goal or Goal(),
    )


JOB = job_of()


def found(job: Job) -> SearchResult:
    return search(job, reference_costs(job), Effort(gap=0.0))


def planned(job: Job) -> Plan:
    return make_plan(job, reference_costs(job), found(job), 0, "0")


def layout_of(schedule: str = "1f1b", pp: int = 3, **axes: object) -> Layout:
    """Return a layout of the twelve GPUs, its nine layers dealt by the costs of `JOB`."""
    v = SCHEDULES[schedule].stages_per_rank or 2
    whole = {"dp": 12 // pp, "tp": 1, "sharding": "zero1"} | axes
    start = Layout(
        pp=pp, micro_batch=1, num_microbatches=8 // 4, schedule=schedule, stages_per_rank=v,
        stage_layers=(0,) * (pp * v), **whole,  # type: ignore[arg-type]
    )  # fmt: skip
    return dealt(start, 9, reference_costs(JOB))


# Dealing layers to places that take unlike times.


def splits(num_layers: int, places: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to give all places a layer at least."""
    for cuts in combinations(range(1, num_layers), places - 1):
        ends = (0, *cuts, num_layers)
        yield tuple(ends[n + 1] - ends[n] for n in range(places))


def slowest(counts: Sequence[int], layer: Sequence[int], extra: Sequence[int]) -> int:
    return max(n * each + more for n, each, more in zip(counts, layer, extra, strict=True))


@settings(max_examples=300)
@given(st.data(), st.integers(1, 4), st.integers(0, 7))
def test_no_other_split_over_unlike_places_is_faster(
    data: st.DataObject, places: int, more: int
) -> None:
    few, many = st.integers(1, 9), st.integers(0, 40)
    cases = [
        tuple(data.draw(st.lists(each, min_size=places, max_size=places)) for each in (few, many))
        for _ in range(3)
    ]
    layers, extras = (np.array([case[n] for case in cases], np.float64) for n in (0, 1))
    dealt = deal(places + more, layers, extras).tolist()
    for counts, (layer, extra) in zip(dealt, cases, strict=True):
        assert sum(counts) == places + more
        every = splits(places + more, places)
        assert slowest(counts, layer, extra) == min(slowest(n, layer, extra) for n in every)


@given(
    st.integers(1, 5), st.integers(0, 9), st.floats(1, 1e9),
    st.lists(st.floats(0, 1e9), min_size=5, max_size=5),
)  # fmt: skip
def test_places_that_are_told_apart_but_alike_get_the_same(
    places: int, more: int, layer: float, extra: list[float]
) -> None:
    extras = np.array([extra[:places]])
    one = deal(places + more, np.array([layer]), extras)
    assert one.tolist() == deal(places + more, np.full((1, places), layer), extras).tolist()


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 6), st.integers(0, 30),
    st.integers(0, 30), st.sampled_from(["loop", "v"]),
)  # fmt: skip
def test_stages_are_dealt_to_unlike_ranks_by_their_speed(
    layer: list[int], more: int, first: int, last: int, shape: Homes
) -> None:
    ranks, num_layers = len(layer), 2 * len(layer) + more
    homes = homes_of(ranks, 2, shape)
    ends = np.array([float(first)]), np.array([float(last)])
    (found,) = dealt_stages(num_layers, homes, np.array([layer], np.float64), *ends).tolist()
    extra = [0] * ranks
    extra[0] += first
    extra[homes[-1]] += last
    totals = [sum(found[s] for s in np.flatnonzero(homes == rank)) for rank in range(ranks)]
    assert min(found) >= 1 and sum(found) == num_layers
    every = (n for n in splits(num_layers, ranks) if min(n) >= 2)
    assert slowest(totals, layer, extra) == min(slowest(n, layer, extra) for n in every)


# Where the ranks of a pipeline lie.


def test_pools_that_differ_in_size_alone_are_one_cluster() -> None:
    apart = job_of(cluster_of(pool_of(FAST, 1), pool_of(FAST, 2)))
    one = job_of(cluster_of(pool_of(FAST, 3)))
    assert unlike_pools(apart.cluster) == one.cluster.pools
    assert isinstance(reference_costs(apart), ReferenceCosts)
    assert found(apart) == found(one)


def test_a_stage_lies_in_one_pool() -> None:
    pools = MIXED.pools
    for stage_ranks, pp in ((1, 12), (2, 6), (4, 3)):
        assert misfit(pools, stage_ranks, "tp-cp-dp-pp") == ""
        of_ranks = pools_of_ranks(pools, pp)
        assert of_ranks == tuple(int(rank * stage_ranks >= 4) for rank in range(pp))
    assert misfit(pools, 12, "tp-cp-dp-pp") == (
        "dp x cp x tp is 12, but the pools have 4 and 8 GPUs; a stage lies in one pool, so that it "
        "must divide 4"
    )
    assert "pp must be its last axis" in misfit(pools, 4, "tp-cp-pp-dp")
    assert misfit((), 12, "tp-cp-pp-dp") == ""


def test_what_no_pool_holds_is_rejected_by_that_reason() -> None:
    job = job_of(batch=24)
    result = found(job)
    assert {c.layout.pp for c in result.ranking} <= {3, 6}
    assert {c.layout.order for c in result.ranking} == {"tp-cp-dp-pp"}
    reasons = {r.layout: r.reason for r in result.rejections if r.rule == "pools"}
    assert reasons["dp=12,tp=1,pp=1"].startswith("dp x cp x tp is 12, but the pools have 4 and 8")
    assert result.certificate.num_rejected["pools"] > len(reasons)
    stages_first = Space(job_of(order=("tp-cp-pp-dp",)), reference_costs(JOB))
    rejections = [stages_first.rejection(each) for each in stages_first.degrees()]
    assert all(each is not None for each in rejections)
    assert any(each is not None and "last axis" in each.reason for each in rejections)


def test_a_layout_that_a_person_names_must_lie_in_the_pools() -> None:
    costs = reference_costs(JOB)
    assert parse_layout("tp=2,pp=6,dp=1", JOB, costs).stage_layers[0] > 1
    for text in ("tp=2,pp=2,dp=3", "tp=2,pp=3,dp=2,order=tp-cp-pp-dp"):
        with pytest.raises(InvalidInputError, match="must keep every stage in one pool"):
            parse_layout(text, job_of(batch=24), costs)
    with pytest.raises(UnsupportedError, match="a stage lies in one pool"):
        costs.stages(
            Layout(dp=6, tp=1, pp=2, micro_batch=1, num_microbatches=1, stage_layers=(5, 4))
        )


# What stages take.


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_v"])
@pytest.mark.parametrize("sharding", ["none", "zero1", "zero3"])
def test_a_stage_takes_what_it_does_in_a_cluster_of_its_own_gpus(
    schedule: str, sharding: str
) -> None:
    layout = layout_of(schedule, sharding=sharding)
    alone = [
        reference_costs(job_of(cluster_of(pool_of(gpu, 3)))).stages(layout) for gpu in (FAST, SLOW)
    ]
    homes = homes_of(3, layout.stages_per_rank, SCHEDULES[schedule].homes).tolist()
    expected = [alone[0 if home == 0 else 1][stage] for stage, home in enumerate(homes)]
    assert list(reference_costs(JOB).stages(layout)) == expected


def test_the_homes_of_a_made_order_say_where_its_stages_are() -> None:
    costs, layout = reference_costs(JOB), layout_of("interleaved")
    made = replace(layout, schedule="synthesised")
    for shape, name in (("loop", "interleaved"), ("v", "zb_v")):
        homes = homes_of(3, 2, shape).tolist()  # type: ignore[arg-type]
        assert costs.stages(made, homes) == costs.stages(replace(layout, schedule=name))


def test_columns_are_the_medians_of_the_stages() -> None:
    costs, layout = reference_costs(JOB), layout_of("zb_v")
    layouts = [replace(layout, sharding=kind) for kind in ("none", "zero1", "zero2", "zero3")]
    columns = costs.columns(layouts)
    for row, each in enumerate(layouts):
        for name in Columns._fields:
            medians = [getattr(cost, name).p50_ns for cost in costs.stages(each)]
            assert getattr(columns, name)[row] == pytest.approx(medians, abs=1)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved", "zb_h1", "zb_v"])
def test_a_mixed_step_lies_between_those_of_all_fast_and_all_slow(schedule: str) -> None:
    layout = layout_of(schedule)
    clusters = cluster_of(pool_of(FAST, 3)), MIXED, cluster_of(pool_of(SLOW, 3))
    steps = [
        predict_step(order_of(layout).whole(), reference_costs(job_of(each)).stages(layout)).p50_ns
        for each in clusters
    ]
    assert steps == sorted(steps)
    assert len(set(steps)) == 3


def test_no_layout_is_faster_than_the_bound_of_its_start() -> None:
    costs = reference_costs(JOB)
    basis, space = basis_of(JOB, costs), Space(JOB, costs)
    for bounded in frontier(space, basis, Tally()):
        for name in bounded.start.pipeline.schedules:
            layout = replace(bounded.start.layout(bounded.stage_layers), schedule=name)
            (candidate,) = evaluate(basis, [layout])
            assert bounded.bound_ns <= candidate.step.p50_ns
            assert bounded.least_bytes <= candidate.peak_bytes


# Memory of unlike GPUs.

UNEVEN = cluster_of(pool_of(FAST, 1, gib=24), pool_of(SLOW, 2, gib=5))


@given(st.lists(st.integers(0, 30), min_size=3, max_size=3))
def test_a_layout_fits_where_each_rank_does(held_gib: list[int]) -> None:
    memory = [
        PeakMemory(parameters=n * GIB, gradients=0, optimizer=0, activations=0, temporary=0,
                   context=0)
        for n in held_gib
    ]  # fmt: skip
    basis = basis_of(job_of(UNEVEN), reference_costs(job_of(UNEVEN)))
    left = [have - held for have, held in zip((24, 5, 5), held_gib, strict=True)]
    assert basis.limit_bytes - basis.peak_bytes(memory) == min(left) * GIB
    assert limits_bytes(UNEVEN, 3) == (24 * GIB, 5 * GIB, 5 * GIB)
    assert limits_bytes(UNEVEN, 2) == (5 * GIB, 5 * GIB)


def test_larger_gpus_may_hold_what_the_smallest_cannot() -> None:
    job = job_of(UNEVEN, tp=(1,), schedule=("1f1b",))
    result, basis = found(job), basis_of(job, reference_costs(job))
    totals = [rank.total for rank in planned(job).memory]
    assert totals[0] > 5 * GIB
    assert all(held <= limit for held, limit in zip(totals, limits_bytes(UNEVEN, 3), strict=True))
    rejected = [r for r in result.rejections if r.rule == "memory"]
    assert rejected and result.ranking[0].peak_bytes <= basis.limit_bytes


# The search.


def every_layout(job: Job) -> Iterator[Layout]:
    """Yield all layouts of `job`, which shards, recomputes and splits sequences as it is told."""
    costs = reference_costs(job)
    for tp, pp, name in product((1, 2, 4), (3, 6), ("1f1b", "zb_v")):
        dp, v = 12 // (tp * pp), SCHEDULES[name].stages_per_rank
        if tp * pp * dp != 12 or 4 % (dp * tp) or pp * v > job.model.num_layers:
            continue
        for sp, kind, size in product((False, True)[: 1 + (tp > 1)], ("none", "zero1"), (1, 2)):
            if kind != "none" and dp == 1:
                continue
            start = Layout(
                dp=dp, tp=tp, pp=pp, micro_batch=size, num_microbatches=8 // dp // size,
                stages_per_rank=v, stage_layers=(0,) * (pp * v), schedule=name,
                sequence_parallel=sp, sharding=kind,  # type: ignore[arg-type]
            )  # fmt: skip
            yield dealt(start, job.model.num_layers, costs)


@pytest.mark.parametrize("cluster", [MIXED, UNEVEN], ids=["mixed", "uneven"])
def test_the_search_finds_the_best_of_all_layouts(cluster: ClusterSpec) -> None:
    job = job_of(cluster, micro_batch=(1, 2), sharding=("none", "zero1"), shard_group=(2, 4))
    basis = basis_of(job, reference_costs(job))
    fitting = []
    for each in evaluate(basis, list(every_layout(job))):
        memory = basis.memory(each.layout, order_of(each.layout).sample())
        limits = limits_bytes(cluster, each.layout.pp)
        if all(rank.total <= limit for rank, limit in zip(memory, limits, strict=True)):
            fitting.append(each)
    best = min(fitting, key=lambda c: (c.step.p50_ns, c.peak_bytes, str(c.layout)))
    result = found(job)
    first = result.ranking[0]
    assert (first.layout, first.step, first.peak_bytes) == (best.layout, best.step, best.peak_bytes)
    assert result.certificate.gap == 0


def test_a_plan_over_unlike_pools_is_kept_and_simulated(tmp_path: Path) -> None:
    plan = planned(job_of(schedule=("synthesised",)))
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert simulate_plan(plan).makespan_ns == plan.step.p50_ns
    assert plan.profile.device.name == f"{FAST} and {SLOW}"
    assert plan.profile.device.num_ranks == 12
    parts = waterfall(plan, stream_uses(simulation_of(plan)))
    setup = Setup(model=plan.model, workload=plan.workload, layout=plan.layout,
                  cluster=plan.cluster, stack=plan.stack)  # fmt: skip
    # Four H100 and eight A100, at 989 and 312 TFLOP/s.
    peak = 4 * 989e12 + 8 * 312e12
    assert 12 * mean_peak_flops_per_s(MIXED, "bf16") == pytest.approx(peak)
    flops = step_flops(setup, causal=True, recomputed=False)
    assert parts.mfu == pytest.approx(flops / peak / (plan.step.p50_ns / 1e9))
    assert parts.step_ns == pytest.approx(plan.step.p50_ns, abs=8)


def test_plans_over_unlike_pools_are_explained() -> None:
    plan, costs = planned(JOB), reference_costs(JOB)
    account = account_of(JOB, costs, plan.layout)
    assert account.step == plan.step and account.fits
    assert sum(account.parts_ns.values()) == plan.step.p50_ns
    rule = thumb_rule(JOB, costs, plan.layout)
    assert not misfit(MIXED.pools, rule.account.layout.num_ranks // rule.account.layout.pp,
                      rule.account.layout.order)  # fmt: skip
    saved = sum(change.saves_ns for change in rule.changes)
    assert rule.account.step.p50_ns - saved == plan.step.p50_ns


def test_faster_gpus_hold_more_layers() -> None:
    job = read_job(EXAMPLES / "mixed.toml")
    few = SearchLimits(schedule=("1f1b", "zb_v"), cp=(1,), tp=(1, 2), recompute=("none",))
    plan = planned(replace(job, search=few))
    layers = [
        sum(plan.layout.stage_layers[stage] for stage in plan.stages_of(rank))
        for rank in range(plan.layout.pp)
    ]
    of_ranks = pools_of_ranks(job.cluster.pools, plan.layout.pp)
    fast, slow = ([n for n, pool in zip(layers, of_ranks, strict=True) if pool == p]
                  for p in (0, 1))  # fmt: skip
    assert min(fast) > max(slow)
    # A third of the GPUs, and more than half of the layers.
    assert len(slow) == 2 * len(fast) and sum(fast) > sum(slow)


# Replicas of unlike speed.


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=4),
    st.integers(0, 8),
)
def test_no_other_shares_end_earlier(replicas: list[tuple[int, int]], more: int) -> None:
    count = len(replicas) + more
    each, extra = ([pair[n] for pair in replicas] for n in (0, 1))
    found = shares_of(count, each, extra)
    assert sum(found.num_microbatches) == count
    assert found.end_ns == slowest(found.num_microbatches, each, extra)
    assert found.end_ns == min(slowest(n, each, extra) for n in splits(count, len(replicas)))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 40))
def test_shares_that_come_out_even_are_in_proportion_to_speed(
    speeds: list[int], times: int
) -> None:
    """T = M / sum of speeds, and each takes its speed times T."""
    found = shares_of(times * sum(speeds), [2520 / speed for speed in speeds])
    assert found.num_microbatches == tuple(times * speed for speed in speeds)
    assert found.end_ns == pytest.approx(2520 * times)


@given(st.lists(st.floats(1, 100), min_size=1, max_size=6), st.integers(0, 200))
def test_replicas_end_within_a_micro_batch_of_each_other(each: list[float], more: int) -> None:
    count = 100 * len(each) + more
    found = shares_of(count, each)
    ends = [n * ns for n, ns in zip(found.num_microbatches, each, strict=True)]
    level = count / sum(1 / ns for ns in each)
    assert level <= found.end_ns * (1 + 1e-9)
    assert found.end_ns < level + max(each)
    assert all(end + ns >= found.end_ns * (1 - 1e-9) for end, ns in zip(ends, each, strict=True))
