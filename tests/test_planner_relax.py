"""What keeps better layouts out, what would give one at all, and the rule of thumb."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from planner.account import account_of
from planner.cost import measured_costs
from planner.evaluate import basis_of, evaluate
from planner.flips import MARGIN, is_better
from planner.layout_text import parse_layout
from planner.reference.costs import reference_costs
from planner.relax import lifted, near_misses, smallest_relaxation
from planner.thumb import rule_of_thumb, thumb_rule
from profiles.errors import UnsupportedError
from profiles.goal import Goal
from profiles.job import Job, SearchLimits
from profiles.presets import cluster_preset
from profiles.quantity import format_quantity
from profiles.workload import Workload
from tests.machine import made_up_job, made_up_profile
from tests.setups import SMALL
from tests.worlds import WORLD, paper_job, read, reference_job, texts

GIB = 1 << 30


# What keeps better layouts out.


def test_the_nearest_miss_of_memory_is_told_to_the_byte() -> None:
    ample = WORLD.search(paper_job()).ranking
    best = ample[0]
    job = paper_job(gib=(best.peak_bytes - 1) / GIB)
    chosen = WORLD.search(job).ranking[0]
    assert chosen.layout != best.layout
    assert is_better(paper_job(), best, chosen, MARGIN)
    misses = near_misses(job, WORLD, chosen)
    nearest = misses[0]
    assert (nearest.what, nearest.candidate, nearest.more_bytes) == ("memory", best, 1)
    assert nearest.saves_ns == chosen.step.p50_ns - best.step.p50_ns > 0
    assert [m.more_bytes for m in misses] == sorted(m.more_bytes for m in misses)
    assert [m.saves_ns for m in misses] == sorted(m.saves_ns for m in misses)


def test_a_limit_that_costs_time_is_a_near_miss() -> None:
    job = paper_job(tp=(8,))
    chosen = WORLD.search(job).ranking[0]
    free = WORLD.search(paper_job()).ranking[0]
    (miss,) = near_misses(job, WORLD, chosen)
    assert (miss.what, miss.now, miss.needed) == ("search.tp", "8", f"tp {free.layout.tp}")
    assert miss.candidate == free
    assert near_misses(paper_job(), WORLD, free) == ()


def test_each_limit_is_lifted_alone() -> None:
    goal = Goal(limits={"step_time": 3.0, "memory_headroom": 2.0**30})
    job = paper_job(goal=goal, tp=(1, 2), recompute=("none",))
    found = {each.what: each for each in lifted(job)}
    assert list(found) == [
        "search.tp", "search.recompute", "goal.limits.step_time", "goal.limits.memory_headroom",
    ]  # fmt: skip
    assert found["search.tp"].job.search == SearchLimits(recompute=("none",))
    assert found["goal.limits.step_time"].job.goal.limits == {"memory_headroom": 2.0**30}


def test_the_least_memory_that_does_is_named() -> None:
    job = paper_job(gib=0.5)
    least = min(c.peak_bytes for c in WORLD.search(paper_job()).ranking)
    assert least > GIB // 2
    said = smallest_relaxation(job, WORLD)
    assert said.startswith("memory binds: ")
    assert f"needs {format_quantity(least, 'bytes')} a rank, which has 512.0 MiB" in said


def test_the_limit_that_binds_comes_first() -> None:
    need = min(c.peak_bytes for c in WORLD.search(paper_job(tp=(1,), pp=(1,))).ranking)
    job = paper_job(gib=0.9 * need / GIB, tp=(1,), pp=(1,))
    said = smallest_relaxation(job, WORLD)
    assert said.startswith("search.tp binds: lift search.tp (it is 1): tp ")
    assert "or lift search.pp (it is 1)" in said
    assert "a rank, which has" in said


def test_a_batch_that_does_not_divide_is_rounded() -> None:
    job = paper_job(global_batch=31, tp=(1,), pp=(1,))
    said = smallest_relaxation(job, WORLD)
    assert "workload.global_batch 32 instead of 31 lets dp=16,tp=1,pp=1,mb=1x2 fit" in said


def test_limits_that_bind_together_are_named_together() -> None:
    job = paper_job(tp=(3,), pp=(3,))
    assert smallest_relaxation(job, WORLD).startswith("search.tp and search.pp bind together")
    hopeless = replace(paper_job(), workload=replace(job.workload, global_batch=1))
    narrow = replace(hopeless, model=replace(SMALL, num_heads=1, num_kv_heads=1, num_layers=1))
    assert smallest_relaxation(narrow, WORLD).startswith("no single change")


# The rule of thumb.


@pytest.mark.parametrize(
    ("job", "layout"),
    [
        (reference_job("llama-3-8b", 4, 128, 8192), "dp=16,tp=2,sp,pp=1,zero1,mb=1x8"),
        (reference_job("llama-3-70b", 16, 128, 8192), "dp=16,tp=8,sp,pp=1,zero1,mb=1x8"),
        (reference_job(), "dp=16,tp=1,pp=1,zero1,mb=1x4"),
    ],
)
def test_the_rule_takes_no_more_tensor_parallelism_than_memory_needs(job: Job, layout: str) -> None:
    costs = reference_costs(job)
    found = rule_of_thumb(job, costs)
    assert str(found) == layout
    if found.tp > 1:
        half = parse_layout(f"tp={found.tp // 2},pp=1", job, costs)
        assert not account_of(job, costs, half).fits


def test_the_rule_of_long_sequences_cuts_them_to_8192_tokens() -> None:
    job = reference_job("llama-3.1-405b", 2048, 128, 131072)
    found = rule_of_thumb(job, reference_costs(job))
    # The published run of 16,384 GPUs has tp 8, cp 16 and pp 16 too, and dp 8 (arXiv:2407.21783).
    assert (found.tp, found.cp, found.sequence_parallel) == (8, 16, True)
    assert found.schedule == "interleaved"


def test_recomputation_is_the_last_resort_of_the_rule() -> None:
    # Sequences so long that activations decide, on two GPUs: the less is made again, the better.
    job = replace(
        paper_job(), cluster=replace(cluster_preset("h100-sxm"), inter_node=None),
        workload=Workload(seq_len=8192, global_batch=64, dtype="bf16"),
    )  # fmt: skip
    costs = WORLD.costs(job)
    kinds, needs = list[str](), list[int]()
    for gib in (80.0, 2.5, 1.6):
        (pool,) = job.cluster.pools
        gpu = replace(pool.gpu, memory_bytes=round(gib * GIB))
        tight = replace(job, cluster=replace(job.cluster, pools=(replace(pool, gpu=gpu),)))
        layout = rule_of_thumb(tight, costs)
        kinds.append(layout.recompute)
        needs.append(account_of(tight, costs, layout).tightest.memory.total)
    assert kinds[0] == "none"
    assert kinds[-1] == "full"
    assert needs == sorted(needs, reverse=True)


def test_our_executor_gets_a_rule_that_it_can_run() -> None:
    job = made_up_job(num_ranks=4)
    costs = measured_costs(job, made_up_profile(num_ranks=4))
    found = rule_of_thumb(job, costs)
    assert (found.sharding, found.sequence_parallel, found.num_ranks) == ("none", False, 4)
    odd = replace(job, workload=replace(job.workload, global_batch=7))
    assert rule_of_thumb(odd, costs).dp == 1
    with pytest.raises(UnsupportedError, match="the rule of thumb has no layout"):
        rule_of_thumb(replace(odd, model=replace(job.model, tied_embeddings=True)), costs)


@settings(max_examples=15)
@given(texts())
def test_the_way_from_the_rule_to_the_choice_adds_up(text: str) -> None:
    job = paper_job()
    chosen = read(text)
    found = thumb_rule(job, WORLD.costs(job), chosen)
    (step,) = evaluate(basis_of(job, WORLD.costs(job)), [chosen])
    saved = sum(change.saves_ns for change in found.changes)
    assert saved == found.account.step.p50_ns - step.step.p50_ns
    if found.account.layout != chosen:
        assert found.changes[-1].layout == str(chosen)
    assert all(change.axes for change in found.changes)
