"""Orders of their own in the search, and long orders told from short ones."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layline.step import predicted_step, step_text, step_trace
from planner import orders as named_orders
from planner.cost import measured_costs
from planner.lower import memory_of, predict_order, predict_steps, simulation_of
from planner.memory import peak_activations
from planner.orders import NamedOrder, order_of
from planner.plan import Candidate, Plan, StageCost, load_plan, save_plan
from planner.refine import NUM_BEGUN
from planner.schedules import SCHEDULES
from planner.search import InfeasibleError, SearchResult, make_plan
from planner.search import search as search_costs
from planner.space import SYNTHESISED
from planner.synthesis import ActivationCap, pipeline_of
from planner.synthesis_search import rules
from profiles.files import canonical_json
from profiles.job import Job, SearchLimits
from profiles.profile import Cost, Profile
from simulator.schedule import Schedule
from simulator.step import step_times
from tests.machine import TINY, made_up_job, made_up_profile

MEASURED = made_up_profile(num_ranks=4)
PROFILE = replace(MEASURED, device=replace(MEASURED.device, kind="cuda"))
PERIODIC = sorted(name for name, family in SCHEDULES.items() if family.period(4))
WON_BY_ITS_OWN = SearchLimits(dp=(2,), pp=(2,))
ONE_STAGE = SearchLimits(pp=(4,), stages_per_rank=(1,), micro_batch=(1,))


def uneven(limits: SearchLimits, memory_bytes: int = 1 << 30, global_batch: int = 8) -> Job:
    """Return a job elsewhere whose six layers do not divide into four equal stages."""
    here = made_up_job(num_ranks=4)
    (pool,) = here.cluster.pools
    pool = replace(pool, gpu=replace(pool.gpu, memory_bytes=memory_bytes))
    return replace(
        here,
        model=replace(TINY, num_layers=6),
        workload=replace(here.workload, global_batch=global_batch),
        cluster=replace(here.cluster, local_device="", pools=(pool,)),
        search=limits,
    )


def search(job: Job, profile: Profile = PROFILE) -> SearchResult:
    return search_costs(job, measured_costs(job, profile))


def planned(job: Job, result: SearchResult) -> Plan:
    return make_plan(job, measured_costs(job, PROFILE, "profile.json"), result, 0, "0")


def schedules_of(result: SearchResult) -> set[str]:
    return {candidate.layout.schedule for candidate in result.ranking}


def synthesised(result: SearchResult) -> list[Candidate]:
    return [c for c in result.ranking if c.layout.schedule == SYNTHESISED]


def without_schedule(candidate: Candidate) -> tuple[int, ...]:
    layout = candidate.layout
    return layout.dp, layout.tp, layout.pp, layout.stages_per_rank, layout.micro_batch


def test_uneven_stages_are_won_by_an_order_of_their_own(tmp_path: Path) -> None:
    job = uneven(WON_BY_ITS_OWN, global_batch=12)
    result = search(job)
    best, second = result.ranking[:2]
    assert best.layout.schedule == SYNTHESISED
    assert second.layout.schedule in SCHEDULES
    assert best.step.p10_ns <= best.step.p50_ns < second.step.p50_ns
    plan = planned(job, result)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert plan.parsed_schedule() == result.schedule(0)
    simulation = simulation_of(plan)
    assert simulation.makespan_ns == plan.step.p50_ns
    peaks = [curve.peak_bytes for curve in memory_of(plan, simulation).values()]
    assert peaks == [rank.total for rank in plan.memory]
    assert max(peaks) == best.peak_bytes
    step = predicted_step(plan)
    assert f"v=2,{SYNTHESISED},mb=2x3" in step_text(step)
    assert step_trace(step)


def test_the_same_job_gives_the_same_bytes() -> None:
    job = uneven(WON_BY_ITS_OWN, global_batch=12)
    one, other = (planned(job, search(job)) for _ in range(2))
    assert one.layout.schedule == SYNTHESISED
    assert canonical_json(one) == canonical_json(other)


def test_an_order_of_its_own_is_ranked_only_where_it_is_faster() -> None:
    everything = search(uneven(WON_BY_ITS_OWN, global_batch=12))
    limits = replace(WON_BY_ITS_OWN, schedule=tuple(SCHEDULES))
    named_alone = search(uneven(limits, global_batch=12))
    assert synthesised(everything)
    assert [c.layout for c in everything.ranking if c not in synthesised(everything)] == [
        c.layout for c in named_alone.ranking
    ]
    for made in synthesised(everything):
        same = [c for c in named_alone.ranking if without_schedule(c) == without_schedule(made)]
        assert made.step.p50_ns < min(c.step.p50_ns for c in same)


def test_schedules_that_were_not_asked_for_are_starts_alone() -> None:
    alone = search(uneven(SearchLimits(schedule=(SYNTHESISED,))))
    assert schedules_of(alone) == {SYNTHESISED}
    assert {r.layout for r in alone.rejections} >= {"dp=4,tp=1,pp=1", "dp=2,tp=2,pp=1"}
    assert not any(name in r.layout for r in alone.rejections for name in SCHEDULES)
    beside = search(uneven(SearchLimits(schedule=("1f1b", SYNTHESISED))))
    assert schedules_of(beside) == {"1f1b", SYNTHESISED}
    assert max(c.layout.stages_per_rank for c in synthesised(beside)) > 1
    assert {c.layout for c in synthesised(beside)} == {c.layout for c in alone.ranking}


def test_on_this_machine_orders_are_made_where_that_is_asked_for() -> None:
    here = made_up_job(num_ranks=4)
    named = replace(here, search=SearchLimits(schedule=("1f1b", "gpipe")))
    assert SYNTHESISED not in schedules_of(search(named, MEASURED))
    asked = replace(here, search=SearchLimits(schedule=("1f1b", SYNTHESISED)))
    assert SYNTHESISED in schedules_of(search(asked, MEASURED))


def test_an_order_made_for_the_memory_fits_where_no_named_one_does() -> None:
    limits = replace(ONE_STAGE, micro_batch=())
    with pytest.raises(InfeasibleError, match="The smallest, dp=1,tp=1,pp=4,synthesised,mb=1x8"):
        search(uneven(limits, memory_bytes=1_200_000))
    named = replace(limits, schedule=tuple(SCHEDULES))
    with pytest.raises(InfeasibleError, match="The smallest, dp=1,tp=1,pp=4,1f1b,mb=1x8"):
        search(uneven(named, memory_bytes=1_400_000))
    result = search(uneven(limits, memory_bytes=1_400_000))
    (only,) = result.ranking
    assert (only.layout.schedule, only.layout.micro_batch) == (SYNTHESISED, 1)
    assert only.peak_bytes <= 1_400_000
    rejected = [r.layout for r in result.rejections]
    assert len(rejected) == len(set(rejected))
    assert "dp=1,tp=1,pp=4,synthesised,mb=2x4" in rejected


def test_what_the_smallest_layout_needs_is_enough() -> None:
    (tight,) = search(uneven(ONE_STAGE, memory_bytes=1_357_544)).ranking
    assert tight.peak_bytes == 1_357_544
    with pytest.raises(InfeasibleError):
        search(uneven(ONE_STAGE, memory_bytes=1_357_543))


def test_orders_too_long_to_be_made_are_rejections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.refine.MAX_WORK", NUM_BEGUN * 95)
    result = search(uneven(ONE_STAGE))
    assert SYNTHESISED not in schedules_of(result)
    (rejection,) = [r for r in result.rejections if r.rule == "length"]
    assert rejection.layout == "dp=1,tp=1,pp=4,synthesised,mb=1x8"
    assert rejection.reason == (
        "an order of its own has up to 96 actions to put in place; the best 3 pipelines may have "
        "95 together; take a larger micro-batch"
    )


def test_a_search_begins_with_no_more_orders_than_are_counted() -> None:
    times = step_times(8, forward=3, backward=5, weight=2, send_forward=1, send_backward=1)
    cap = ActivationCap(activation_bytes=(1,) * 8, cap_bytes=(16,) * 4)
    pipeline = pipeline_of(times, 64, tuple(range(4)) * 2, cap)
    assert sum(1 for _ in rules(pipeline, 64, splits_backward=True)) + len(SCHEDULES) <= NUM_BEGUN


@st.composite
def orders(draw: st.DrawFn) -> NamedOrder:
    name = draw(st.sampled_from(PERIODIC))
    num_ranks = draw(st.integers(1, 4))
    stages_per_rank = SCHEDULES[name].stages_per_rank or draw(st.integers(2, 3))
    return NamedOrder(name, num_ranks, stages_per_rank, draw(st.integers(1, 150)))


@settings(max_examples=60)
@given(orders(), st.integers(0, 2**32))
def test_a_long_order_is_as_its_sample_tells(order: NamedOrder, seed: int) -> None:
    random = np.random.default_rng(seed)
    whole = order.whole()
    held = random.integers(0, 10**9, whole.num_stages).tolist()
    candidates = [[_cost(random) for _ in held] for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.orders.LONG", 1)
        sample = order.sample()
        steps = predict_order(order, sample, candidates)
    assert sample.homes.tolist() == whole.homes.tolist()
    assert peak_activations(sample, held) == peak_activations(whole, held)
    assert steps == predict_steps(whole, candidates)


def _cost(random: np.random.Generator) -> StageCost:
    def some(least_ns: int = 0) -> Cost:
        p10, p50, p90 = sorted((least_ns + random.integers(0, 100, 3)).tolist())
        return Cost(p10_ns=p10, p50_ns=p50, p90_ns=p90)

    return StageCost(
        forward=some(), backward=some(100), weight=some(), send_forward=some(),
        send_backward=some(), all_reduce=some(), optimizer=some(), other=some(), wait=some(),
        tensor_parallel_forward_ns=0, tensor_parallel_backward_ns=0,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_samples_are_left() -> Iterator[None]:
    yield
    named_orders._sampled.cache_clear()


def fold_from(num_warmups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold orders of so many warm-ups; samples that were made before are of no use then."""
    monkeypatch.setattr("planner.orders.LONG", num_warmups)
    named_orders._sampled.cache_clear()


def test_folding_changes_no_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    job = uneven(SearchLimits(schedule=tuple(SCHEDULES)), global_batch=96)
    walked = search(job)
    fold_from(1, monkeypatch)
    is_folded = [order_of(c.layout).is_long for c in walked.ranking]
    assert any(is_folded)
    assert not all(is_folded)
    assert search(job) == walked


def test_very_many_micro_batches_build_nothing_long(monkeypatch: pytest.MonkeyPatch) -> None:
    job = uneven(replace(ONE_STAGE, schedule=("1f1b",)), global_batch=100_000)
    built, build = [], NamedOrder.build

    def spy(order: NamedOrder, num_microbatches: int) -> Schedule:
        built.append(num_microbatches)
        return build(order, num_microbatches)

    monkeypatch.setattr(NamedOrder, "build", spy)
    folded = search(job)
    assert 0 < max(built) < 200
    fold_from(10**6, monkeypatch)
    assert search(job) == folded
    assert max(built) == 100_000
