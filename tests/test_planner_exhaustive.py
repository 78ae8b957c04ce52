"""The search against enumeration: the best of every small job is the best of all its layouts."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from planner.bounds import ROUNDING_NS
from planner.cost import measured_costs
from planner.evaluate import Costs, basis_of
from planner.frontier import Tally, frontier
from planner.layout import Layout
from planner.lower import median_step, predict_step
from planner.plan import Certificate
from planner.reference.costs import reference_costs
from planner.schedules import SCHEDULES
from planner.search import Effort, SearchResult, make_plan, search
from planner.space import Space
from profiles.cluster import UplinkSpec
from profiles.files import canonical_json
from profiles.goal import FASTEST, Goal
from profiles.job import Job, SearchLimits
from profiles.model import ModelSpec
from profiles.presets import cluster_preset, stack_preset
from profiles.workload import Workload
from tests.enumeration import BOTH_ORDERS, Enumeration, enumerated, schedule_of
from tests.machine import MADE_UP, TINY, made_up_job, made_up_profile

GIB = 1 << 30
LLAMA = ModelSpec(
    name="llama", num_layers=5, hidden=2048, num_heads=16, num_kv_heads=4, head_size=128,
    ffn=5632, vocab=32000, max_seq_len=4096,
)  # fmt: skip
ODD = replace(LLAMA, num_layers=6, num_heads=12, num_kv_heads=6, ffn=5376, vocab=50257)
"""Heads that 4 does not divide, an odd vocabulary."""
GPT = replace(LLAMA, num_layers=4, num_kv_heads=16, norm="layernorm", mlp="gelu",
              positions="learned", has_biases=True, tied_embeddings=True, vocab=50257)  # fmt: skip
MOE = replace(LLAMA, num_layers=4, ffn=1536, num_experts=4, experts_per_token=2)
DEEP = replace(LLAMA, num_layers=9, hidden=1024, num_heads=8, head_size=128, ffn=2816)
TIED = replace(LLAMA, tied_embeddings=True, vocab=128256)


def elsewhere(
    model: ModelSpec = LLAMA, *, ranks: int = 8, node: int = 8, stack: str = "torchtitan",
    memory_gib: float = 80, batch: int = 8, seq_len: int = 2048, pod_nodes: int = 0,
    goal: Goal = FASTEST, gpu: str = "h100-sxm", **limits: Any,
) -> Job:  # fmt: skip
    """Return a job on nodes of `node` GPUs each that have so much memory."""
    cluster = cluster_preset(gpu, num_nodes=max(2, ranks // node))
    (pool,) = cluster.pools
    small = replace(pool.gpu, memory_bytes=int(memory_gib * GIB))
    pool = replace(pool, gpu=small, gpus_per_node=node, num_nodes=ranks // node)
    pods = UplinkSpec(pod_nodes=pod_nodes, oversubscription=4.0, **MADE_UP) if pod_nodes else None
    return Job(
        seed=0, model=model, stack=stack_preset(stack), profile_path="", goal=goal,
        workload=Workload(seq_len=seq_len, global_batch=batch, dtype="bf16"),
        cluster=replace(cluster, pools=(pool,), uplinks=pods),
        search=SearchLimits(**{"schedule": ("1f1b", "zb_h1", "interleaved"), **limits}),
    )  # fmt: skip


def here(model: ModelSpec = TINY, *, ranks: int = 4, memory_mib: float = 1024, batch: int = 8,
         goal: Goal = FASTEST, **limits: Any) -> Job:  # fmt: skip
    """Return a job on a made-up machine that was measured."""
    job = made_up_job(num_ranks=ranks)
    (pool,) = job.cluster.pools
    pool = replace(pool, gpu=replace(pool.gpu, memory_bytes=int(memory_mib * 2**20)))
    return replace(
        job, model=model, workload=replace(job.workload, global_batch=batch), goal=goal,
        cluster=replace(job.cluster, pools=(pool,)),
        search=SearchLimits(**{"schedule": tuple(SCHEDULES), **limits}),
    )  # fmt: skip


NO_ZERO2 = ("none", "zero1", "zero3")
PLAIN: dict[str, Any] = {"sharding": ("none", "zero1"), "cp": (1,), "sequence_parallel": (True,)}
WIDE: dict[str, Any] = {"micro_batch": (1,), "cp": (1,), "sequence_parallel": (True,)}
LIGHT, SPACE = Goal(objectives=("memory_headroom",)), ("step_time", "memory_headroom")
EVERY: dict[str, Any] = {"schedule": tuple(SCHEDULES)}
JOBS: dict[str, Job] = {
    "one GPU": elsewhere(ranks=1, node=1, **EVERY),
    "one GPU that recomputes": elsewhere(ranks=1, node=1, memory_gib=9, seq_len=4096),
    "two GPUs, every option": elsewhere(ranks=2, node=2, batch=4, **EVERY),
    "two nodes of one GPU": elsewhere(ranks=2, node=1, memory_gib=7, batch=4),
    "four GPUs, every schedule": elsewhere(
        ranks=4, node=4, batch=4, sharding=("none", "zero3"), **WIDE, **EVERY
    ),
    "megatron": elsewhere(stack="megatron-2023", micro_batch=(1,), cp=(2,)),
    "megatron, tight": elsewhere(
        stack="megatron-2023", memory_gib=5, micro_batch=(2, 4), cp=(1,), seq_len=4096
    ),
    "gradients of the last backward": elsewhere(
        replace(LLAMA, num_layers=12),
        ranks=4,
        node=4,
        stack="megatron-2023",
        memory_gib=10,
        seq_len=4096,
        dp=(2,),
        tp=(1,),
        pp=(2,),
        micro_batch=(1,),
        sharding=("zero1",),
        cp=(1,),
    ),
    "nemo": elsewhere(stack="nemo", **WIDE, sharding=NO_ZERO2),
    "nemo, experts, tight": elsewhere(MOE, stack="nemo", memory_gib=3.5, **WIDE),
    "nanotron": elsewhere(stack="nanotron", micro_batch=(1, 4), cp=(1,), schedule=("gpipe",)),
    "nanotron, tight": elsewhere(stack="nanotron", memory_gib=4, micro_batch=(1, 2), cp=(1,)),
    "experts": elsewhere(MOE, ranks=4, node=4, batch=4, schedule=("zb_v",), sharding=NO_ZERO2),
    "experts on two nodes": elsewhere(MOE, node=4, **WIDE, sharding=("zero1",)),
    "heads that four does not divide": elsewhere(ODD, **WIDE, schedule=("1f1b",)),
    "odd batch and sequence": elsewhere(ODD, batch=6, seq_len=1022, ranks=4, node=4),
    "twelve GPUs": elsewhere(ODD, ranks=12, node=4, batch=12, **WIDE, sharding=("zero1",)),
    "learned positions and tied embeddings": elsewhere(
        GPT, ranks=4, node=4, stack="megatron-2023", schedule=("1f1b", "zb_v"), cp=(1,)
    ),
    "tied embeddings, tight": elsewhere(TIED, node=4, memory_gib=5, **WIDE),
    "two nodes": elsewhere(node=4, **WIDE),
    "nodes in pods": elsewhere(ranks=16, node=2, pod_nodes=2, **WIDE, sharding=("zero1",)),
    "pods, one order": elsewhere(
        ranks=16, node=4, pod_nodes=2, **WIDE, order=("tp-cp-pp-dp",), sharding=("zero3",)
    ),
    "shard groups": elsewhere(
        node=4, **WIDE, sharding=("zero3", "zero1"), shard_group=(2, 4), schedule=("zb_h2",)
    ),
    "shards in another order, tight": elsewhere(
        dp=(8,), **WIDE, sharding=("zero3", "none"), memory_gib=5
    ),
    "deep, every v": elsewhere(
        DEEP, ranks=4, node=4, **PLAIN, **EVERY, stages_per_rank=(1, 2, 3), micro_batch=(1, 2)
    ),
    "breadth first or nothing": elsewhere(DEEP, **PLAIN, schedule=("breadth_first",), pp=(2, 4)),
    "limits on every axis": elsewhere(
        dp=(2, 4),
        tp=(1, 2),
        pp=(1, 2),
        cp=(1,),
        micro_batch=(1, 2),
        sequence_parallel=(False,),
        sharding=("zero2",),
        recompute=("selective",),
    ),
    "all recomputed": elsewhere(**WIDE, recompute=("full",), memory_gib=6),
    "kinds in another order, tight": elsewhere(**WIDE, recompute=("full", "none"), memory_gib=3),
    "A100": elsewhere(gpu="a100-sxm-80gb", **WIDE, memory_gib=5, stack="megatron-2023"),
    "32 GPUs": elsewhere(DEEP, ranks=32, batch=16, **WIDE, sharding=("zero1",), tp=(2, 4, 8)),
    "64 GPUs": elsewhere(DEEP, ranks=64, batch=32, **WIDE, sharding=("zero1",), tp=(4, 8)),
    "a limit on the memory left": elsewhere(
        **WIDE, memory_gib=8, goal=Goal(limits={"memory_headroom": 3 * GIB})
    ),
    "a limit on the step": elsewhere(**WIDE, goal=replace(LIGHT, limits={"step_time": 0.03})),
    "memory": elsewhere(ranks=4, node=4, **WIDE, goal=LIGHT),
    "memory, tight": elsewhere(ranks=4, node=4, memory_gib=5, **WIDE, goal=LIGHT),
    "tokens": elsewhere(**WIDE, memory_gib=5, goal=Goal(objectives=("tokens_per_s",))),
    "goodput": elsewhere(ranks=4, node=4, **WIDE, goal=Goal(objectives=("goodput",))),
    "a front": elsewhere(ranks=4, node=4, memory_gib=8, **WIDE, goal=Goal(objectives=SPACE)),
    "a front the other way round": elsewhere(
        node=4, **PLAIN, schedule=("1f1b",), goal=Goal(objectives=SPACE[::-1])
    ),
    "measured": here(),
    "measured, tight": here(memory_mib=1.6),
    "measured, eight ranks": here(replace(TINY, num_layers=9), ranks=8, micro_batch=(1,)),
    "measured, memory": here(memory_mib=2, goal=LIGHT),
    "steps alike": here(pp=(4,), schedule=("gpipe", "1f1b"), micro_batch=(1,)),
    "memory alike": elsewhere(node=4, pp=(2,), dp=(4,), **WIDE, goal=LIGHT),
}
LARGE: dict[str, Job] = {
    "eight GPUs, every option": elsewhere(**EVERY, batch=4),
    "eight GPUs, tight": elsewhere(node=4, memory_gib=4, seq_len=4096),
    "experts, tight": elsewhere(MOE, memory_gib=4, seq_len=4096, micro_batch=(1, 2)),
    "64 GPUs on eight nodes": elsewhere(DEEP, ranks=64, batch=64, micro_batch=(1,), cp=(1, 2)),
    "64 GPUs in pods": elsewhere(
        DEEP, ranks=64, node=4, pod_nodes=4, batch=32, memory_gib=4, **WIDE, seq_len=4096
    ),
    "a front of 64": elsewhere(
        DEEP,
        ranks=64,
        batch=64,
        micro_batch=(1, 2, 4),
        cp=(1,),
        sharding=("zero1", "zero3"),
        schedule=("1f1b",),
        goal=Goal(objectives=SPACE),
    ),
}


def costs_of(job: Job) -> Costs:
    if job.cluster.is_local:
        return measured_costs(job, made_up_profile(job.cluster.num_ranks))
    return reference_costs(job)


@cache
def everything(name: str) -> Enumeration:
    job = (JOBS | LARGE)[name]
    return enumerated(job, costs_of(job))


def found(job: Job, gap: float = 0.0) -> SearchResult:
    return search(job, costs_of(job), Effort(gap=gap))


def num_legal(certificate: Certificate) -> int:
    """Return how many layouts are none that a rule of the space or the job forbids."""
    known = {"divisibility", "search limits", "tied embeddings", "memory", "limits"}
    assert set(certificate.num_rejected) <= known
    asked = sum(certificate.num_rejected.get(rule, 0) for rule in ("memory", "limits"))
    return asked + certificate.num_bounded + certificate.num_timed + certificate.num_open


def check(job: Job, every: Enumeration) -> None:
    """Hold the search to the enumeration: its best, its front, and its accounts."""
    result = found(job)
    best, first = every.fitting[every.best], result.ranking[0]
    assert first.layout == best.layout
    assert (first.step.p50_ns, first.peak_bytes) == (best.step_ns, best.peak_bytes)
    certificate = result.certificate
    assert certificate.value == certificate.lower_bound == every.objectives[every.best][0]
    assert (certificate.gap, certificate.num_open) == (0, 0)
    assert num_legal(certificate) == every.num_layouts
    assert certificate.num_layouts == num_legal(certificate) + sum(
        count
        for rule, count in certificate.num_rejected.items()
        if rule not in ("memory", "limits")
    )
    exact = {each.layout: (each.step_ns, each.peak_bytes) for each in every.fitting}
    worth = dict(zip(exact, every.objectives, strict=True))
    for each in result.ranking:
        assert exact[each.layout] == (each.step.p50_ns, each.peak_bytes)
    if len(job.goal.objectives) > 1:
        assert {worth[result.ranking[place].layout] for place in result.front} == every.front


@pytest.mark.parametrize("name", JOBS)
def test_the_best_is_the_best_of_all(name: str) -> None:
    check(JOBS[name], everything(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_best_of_many_is_the_best_of_all(name: str) -> None:
    check(LARGE[name], everything(name))


@pytest.mark.parametrize("gap", [0.01, pytest.param(0.2, marks=pytest.mark.slow)])
def test_with_a_gap_the_best_is_within_it(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.search.MANY", 0)
    monkeypatch.setattr("planner.search.FEW", 1)
    monkeypatch.setattr("planner.search.PROMISING", 3)
    is_left = False
    for name, job in list(JOBS.items())[:: 2 if gap == 0.01 else 1]:
        every, certificate = everything(name), found(job, gap).certificate
        best = every.objectives[every.best][0]
        assert certificate.lower_bound <= best <= certificate.value, name
        part = 1 - certificate.lower_bound / certificate.value
        assert certificate.gap == pytest.approx(part, abs=1e-12)
        assert certificate.gap <= gap + 1e-12, name
        assert num_legal(certificate) == every.num_layouts, name
        is_left |= certificate.lower_bound < certificate.value
    assert is_left


@pytest.mark.parametrize("name", JOBS)
def test_no_layout_is_below_its_bounds(name: str) -> None:
    job, every = JOBS[name], everything(name)
    costs = costs_of(job)
    bounded = {
        each.start.layout(each.stage_layers): each
        for each in frontier(Space(job, costs), basis_of(job, costs), Tally())
    }
    for layout, step_ns, peak_bytes in every.fitting[::5]:
        family = SCHEDULES[layout.schedule]
        (start,) = [
            each
            for plain, each in bounded.items()
            if layout.schedule in each.start.pipeline.schedules and plain == _plain(layout, plain)
        ]
        assert start.bound_ns <= step_ns
        assert start.least_bytes <= peak_bytes
        homes = schedule_of(layout).homes.astype(np.int64)
        columns = costs.columns([layout])
        (bound,) = columns.bounds_ns(homes, layout.num_microbatches, splits=family.splits)
        assert start.bound_ns <= bound + ROUNDING_NS * len(homes) * layout.num_microbatches
        assert bound <= step_ns


def _plain(layout: Layout, like: Layout) -> Layout:
    """Return `layout` without what its start leaves open, under the schedule of `like`."""
    return replace(
        layout, schedule=like.schedule, sharding="none", shard_group=0, recompute="none",
        recompute_layers=(),
    )  # fmt: skip


def test_the_jobs_differ_where_it_matters() -> None:
    """Some are so tight that layouts recompute in part, one layout fits, or several are best."""
    every = [everything(name) for name in JOBS]
    assert len(JOBS) >= 30
    assert {job.cluster.num_ranks for job in JOBS.values()} >= {1, 2, 4, 8, 12, 16, 32, 64}
    best = [each.fitting[each.best].layout for each in every]
    assert sum(any(layout.recompute_layers) for layout in best) >= 3
    assert {layout.recompute for layout in best} == {"none", "selective", "full"}
    fitting = [exact.layout for each in every for exact in each.fitting]
    assert sum(any(layout.recompute_layers) for layout in fitting) >= 50
    assert {layout.sharding for layout in best} >= {"none", "zero1", "zero3"}
    assert min(len(each.fitting) for each in every) == 1
    alike = [each.objectives.count(each.objectives[each.best]) > 1 for each in every]
    assert alike[-2:] == [True, True]
    assert {layout.order for layout in best} == set(BOTH_ORDERS)


# Anytime: what is found when the search is stopped.

STOPPED = JOBS["tied embeddings, tight"], JOBS["experts on two nodes"], JOBS["a front"]


@pytest.mark.parametrize("job", STOPPED)
def test_no_time_at_all_gives_a_plan_with_its_gap(job: Job) -> None:
    costs, whole = costs_of(job), found(job)
    result = search(job, costs, Effort(budget_s=1e-9))
    certificate = result.certificate
    assert not result.is_interrupted
    assert certificate.num_open > 0
    assert 0 < certificate.num_timed <= 12
    assert certificate.num_layouts == whole.certificate.num_layouts
    assert certificate.value >= whole.certificate.value
    assert certificate.lower_bound == pytest.approx(lowest_but(result.ranking[0].layout, job))
    part = 1 - certificate.lower_bound / certificate.value
    assert certificate.gap == pytest.approx(part, abs=1e-12)
    plan = make_plan(job, costs, result, 0, "0")
    assert predict_step(plan.parsed_schedule(), plan.costs) == plan.step == result.ranking[0].step


def lowest_but(layout: Layout, job: Job) -> float:
    """Return the lowest bound of all starts but the one of `layout`, in seconds."""
    costs = costs_of(job)
    return min(
        each.bound_ns / 1e9
        for each in frontier(Space(job, costs), basis_of(job, costs), Tally())
        if (plain := each.start.layout(each.stage_layers)) != _plain(layout, plain)
    )


@pytest.mark.parametrize("job", STOPPED)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_stopped_by_hand_it_tells_what_it_found(
    job: Job, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(num_steps))

    def interrupted(*args: Any) -> int:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return median_step(*args)

    whole = found(job)
    monkeypatch.setattr("planner.trial.median_step", interrupted)
    result = search(job, costs_of(job))
    assert result.is_interrupted
    assert len(result.ranking) == result.certificate.num_timed == num_steps
    assert result.certificate.num_open > 0
    assert result.certificate.num_layouts == whole.certificate.num_layouts
    assert result.certificate.lower_bound <= whole.certificate.value <= result.certificate.value
    exact = {each.layout for each in everything_of(job).fitting}
    assert {each.layout for each in result.ranking} <= exact


def everything_of(job: Job) -> Enumeration:
    (name,) = [name for name, each in JOBS.items() if each is job]
    return everything(name)


def test_stopped_before_anything_was_found_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("planner.trial.median_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found(STOPPED[0])


@pytest.mark.parametrize("job", STOPPED)
def test_the_same_job_gives_the_same_bytes(job: Job) -> None:
    one, other = (make_plan(job, costs_of(job), found(job), 0, "0") for _ in range(2))
    assert canonical_json(one) == canonical_json(other)


def test_a_front_beyond_the_short_list_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.search.MAX_RANKED", 1)
    check(JOBS["a front"], everything("a front"))
