"""Explanations: what a layout takes part by part, why not another, what would flip the choice."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.account import Tightest, account_of, differences, parts_ns, traits
from planner.cost import measured_costs
from planner.evaluate import Costs, basis_of, evaluate
from planner.explain import HOLDING_WORDS, Comparison, Searches, explain, runner_up, why
from planner.flips import KNOBS, Knob, Sensitivity, sensitivities, varied
from planner.layout import Layout
from planner.layout_text import parse_layout
from planner.orders import order_of
from planner.plan import PeakMemory
from planner.reference.costs import reference_costs
from planner.schedules import SCHEDULES
from planner.search import Effort
from profiles.collective_curves import Group, collective
from profiles.errors import UnsupportedError
from profiles.files import canonical_json
from profiles.goal import Goal
from profiles.job import Job
from profiles.presets import cluster_preset, link_preset
from tests.machine import made_up_job, made_up_profile
from tests.worlds import (
    EXCHANGE_NS,
    LAYER_NS,
    MS,
    REDUCTION_NS,
    UPDATE_NS,
    WORLD,
    PaperWorld,
    paper_job,
    read,
    reference_job,
    texts,
)

GIB = 1 << 30


# Accounts: what one layout takes.


@pytest.mark.parametrize(("text", "m", "p"), [("tp=4,pp=4", 32, 4), ("tp=8,pp=2", 32, 2)])
def test_the_parts_of_a_pipeline_are_known_on_paper(text: str, m: int, p: int) -> None:
    job = paper_job()
    layout = read(f"{text},mb=1")
    account = account_of(job, WORLD.costs(job), layout)
    layers = 8 // p
    work, exchange = 3 * layers * LAYER_NS // layout.tp, 2 * layers * EXCHANGE_NS
    assert account.parts_ns == {
        "work": m * work,
        "exchange": m * exchange,
        "pipeline": (p - 1) * (work + exchange),
        "reduction": 0,
        "optimizer": UPDATE_NS,
        "host": 0,
    }
    assert sum(account.parts_ns.values()) == account.step.p50_ns
    assert account.fits


def test_replicas_reduce_what_they_hold() -> None:
    job = paper_job()
    account = account_of(job, WORLD.costs(job), read("tp=2,mb=1"))
    assert account.parts_ns == {
        "work": 4 * 3 * 8 * LAYER_NS // 2,
        "exchange": 4 * 2 * 8 * EXCHANGE_NS,
        "pipeline": 0,
        "reduction": 8 * REDUCTION_NS // 2,
        "optimizer": UPDATE_NS,
        "host": 0,
    }


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(SCHEDULES)), m=st.integers(1, 200), layers=st.integers(1, 3),
)  # fmt: skip
def test_a_long_order_has_the_parts_of_all_of_its_micro_batches(
    name: str, m: int, layers: int
) -> None:
    v = SCHEDULES[name].stages_per_rank or 2
    layout = Layout(
        dp=1, tp=2, pp=2, micro_batch=1, num_microbatches=m, stages_per_rank=v, schedule=name,
        stage_layers=(layers, *[1] * (2 * v - 1)),
    )  # fmt: skip
    job = paper_job()
    costs = WORLD.costs(job)
    (found,) = evaluate(basis_of(job, costs), [layout])
    step_ns, stages = found.step.p50_ns, costs.stages(layout)
    whole = parts_ns(layout, stages, step_ns, order_of(layout).whole())
    assert parts_ns(layout, stages, step_ns) == pytest.approx(whole, abs=2)


@given(st.lists(st.integers(0, 1 << 40), min_size=9, max_size=9))
def test_what_holds_the_memory_sums_to_it(sizes: list[int]) -> None:
    names = [entry.name for entry in fields(PeakMemory)]
    memory = PeakMemory(**dict(zip(names, sizes, strict=True)))
    tightest = Tightest(rank=0, stages=(0,), memory=memory, limit_bytes=1 << 40)
    held = [size for _, size in tightest.holdings]
    assert sum(held) == memory.total == tightest.excess_bytes + (1 << 40)
    assert held == sorted(held, reverse=True)


def test_differences_are_told_axis_by_axis_and_none_is_missed() -> None:
    old = read("tp=2,pp=2,mb=1,zero1,recompute=full:3")
    new = read("tp=4,pp=1,cp=2,mb=2,zero2:2,sp,order=tp-cp-pp-dp")
    assert differences(old, old) == ()
    assert differences(old, new) == (
        "tp 2 -> 4", "pp 2 -> 1", "cp 1 -> 2", "dp 4 -> 2", "micro-batch 1 -> 2",
        "schedule 1f1b -> none", "sharding zero1 -> zero2:2", "recompute full:3 -> none",
        "sequence parallelism off -> on", "order tp-cp-dp-pp -> tp-cp-pp-dp",
    )  # fmt: skip
    # Every field shows, but for the split and what follows from batch and degrees.
    told = {"stage_layers", "num_microbatches", "stages_per_rank", "shard_group"}
    told |= {"recompute_layers", "micro_batch", "sequence_parallel"}
    assert {entry.name for entry in fields(Layout)} <= told | set(traits(old))


# Why not another layout.


def named(text: str, job: Job | None = None) -> Comparison:
    job = job or paper_job()
    return why(job, WORLD.costs(job), WORLD.search(job), read(text, job))


@settings(max_examples=20)
@given(texts())
def test_the_difference_of_two_steps_is_made_of_its_parts(text: str) -> None:
    found = named(text)
    assert sum(found.more_ns.values()) == found.step_more_ns
    assert found.step_more_ns == found.account.step.p50_ns - found.chosen.step.p50_ns
    ranking = WORLD.search(paper_job()).ranking
    assert found.place == 1 + sum(c.step.p50_ns < found.account.step.p50_ns for c in ranking)


def test_a_slower_layout_is_told_with_what_makes_it_slower() -> None:
    found = named("tp=2,pp=1,mb=1")
    assert str(found.chosen.layout) == "dp=16,tp=1,pp=1,mb=1x2"
    # Both compute 48 ms; four micro-batches of tp=2 exchange for 3.2 ms each, and half is reduced.
    assert found.conclusion == (
        "It is 8.8 ms (15.4 %) slower than the choice: 12.8 ms more for exchange inside the "
        "layers, 4.0 ms less for the gradients' reduction."
    )
    assert (found.broken, found.differs) == ((), ("tp 1 -> 2", "dp 16 -> 8"))


def test_a_layout_that_memory_keeps_out_says_by_how_much_and_what_holds_it() -> None:
    ample = named("tp=1,pp=1,mb=2")
    need = ample.account.tightest.memory.total
    job = paper_job(gib=(need - 1000) / GIB)
    found = named("tp=1,pp=1,mb=2", job)
    assert found.account.tightest.excess_bytes == pytest.approx(1000, abs=1)
    assert not found.account.fits
    name, held = found.account.tightest.holdings[0]
    assert "It does not fit: pipeline rank 0 lacks 1,000 B" in found.conclusion
    assert f"{HOLDING_WORDS[name]} alone being {held / GIB:.1f} GiB" in found.conclusion


def test_limits_of_the_job_that_a_layout_breaks_are_named() -> None:
    job = paper_job(tp=(1,), micro_batch=(1,))
    found = named("tp=2,mb=2", job)
    assert found.broken == ("search.micro_batch allows 1 only", "search.tp allows 1 only")[::-1]
    assert "It is no candidate: search.tp allows 1 only" in found.conclusion
    slow = named("tp=8", paper_job(goal=Goal(limits={"step_time": 0.06})))
    assert slow.broken == ("step_time is 101.2 ms, goal.limits allows at most 60.0 ms",)
    assert named("tp=1", paper_job(schedule=("gpipe",), shard_group=(4,))).broken == ()


def test_a_better_layout_than_the_choice_is_owned_up_to() -> None:
    job = paper_job()
    result = WORLD.search(job)
    best = result.ranking[0].layout
    found = why(job, WORLD.costs(job), result, best, chosen=5)
    assert found.conclusion.endswith("or does not look there.")
    assert why(job, WORLD.costs(job), result, best).conclusion == "It is the chosen layout."


# What would flip the choice.


def sensitivity(job: Job, knob: Knob) -> Sensitivity:
    chosen = WORLD.search(job).ranking[0].layout
    (found,) = sensitivities(job, WORLD, chosen, knobs=(knob,))
    return found


def test_the_rate_at_which_the_reduction_is_too_dear_is_known_on_paper() -> None:
    # At a rate of f, replicas on all ranks take 49 + 8 / f ms; eight stages 70 + 1 / f with two
    # replicas of 16 micro-batches, four 67 + 2 / f: the replicas lose their place below f = 0.34.
    found = sensitivity(paper_job(), "inter_node_rate")
    steps = {
        round(p.factor, 2): (str(p.best.layout), p.best.step.p50_ns, p.kept.step.p50_ns, p.is_flip)
        for p in found.points
        if p.best and p.kept
    }
    all_ranks = "dp=16,tp=1,pp=1,mb=1x2"
    assert steps == {
        0.25: ("dp=2,tp=1,pp=8,1f1b,mb=1x16", 74 * MS, 81 * MS, True),
        0.35: (all_ranks, round((49 + 8 * 8**0.5) * MS), round((49 + 8 * 8**0.5) * MS), False),
        0.5: (all_ranks, 65 * MS, 65 * MS, False),
        2.0: (all_ranks, 53 * MS, 53 * MS, False),
        4.0: (all_ranks, 51 * MS, 51 * MS, False),
    }
    assert [point.value for point in found.flips] == ["12.5 GB/s"]
    assert found.value == "50.0 GB/s"


def test_less_memory_flips_the_choice_where_it_no_longer_fits() -> None:
    ample = WORLD.search(paper_job()).ranking[0]
    job = paper_job(gib=1.5 * ample.peak_bytes / GIB)
    found = sensitivity(job, "memory")
    below = found.flips[0]
    assert below.factor == 0.5
    assert below.kept is not None and below.best is not None
    assert below.kept.peak_bytes > 0.5 * 1.5 * ample.peak_bytes >= below.best.peak_bytes
    # The walk ends at the flip, with one more try half-way: it fits at 0.71 of 1.5 times its need.
    assert [round(p.factor, 2) for p in found.points if p.factor < 1] == [0.5, 0.71]
    assert not found.points[1].is_flip


@pytest.mark.parametrize("knob", KNOBS)
def test_an_input_is_varied_alone(knob: Knob) -> None:
    job = paper_job()
    for factor in (0.5, 2.0):
        other = varied(job, knob, factor)
        assert varied(other, knob, 1 / factor) == job
        assert other != job
    assert varied(job, knob, 1.0) == job


def test_what_a_job_does_not_have_is_not_varied() -> None:
    job = paper_job()
    one = replace(job, cluster=cluster_preset("h100-sxm"))
    alone = replace(one.cluster.pools[0], gpus_per_node=1)
    for asked, knob, factor, words in (
        (one, "inter_node_rate", 2.0, "the cluster is one node"),
        (replace(one, cluster=replace(one.cluster, pools=(alone,))), "intra_node_rate", 2.0, "one"),
        (job, "seq_len", 4.0, "8192 tokens at most"),
        (
            replace(job, workload=replace(job.workload, global_batch=3)),
            "global_batch",
            0.5,
            "whole",
        ),
    ):
        with pytest.raises(UnsupportedError, match=words):
            varied(asked, knob, factor)  # type: ignore[arg-type]
    chosen = WORLD.search(job).ranking[0].layout
    (found,) = sensitivities(one, WORLD, chosen, knobs=("inter_node_rate",))
    assert (found.points, found.reason) == ((), "the cluster is one node")


def test_links_that_were_measured_have_one_rate() -> None:
    class Measured(PaperWorld):
        def costs(self, job: Job) -> Costs:
            return measured_costs(job, made_up_profile(num_ranks=4))

    job = made_up_job(num_ranks=4)
    chosen = parse_layout("tp=1", job, Measured().costs(job))
    (found,) = sensitivities(job, Measured(), chosen, knobs=("intra_node_rate",))
    assert found.reason.startswith("the links were measured as they are")


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_link_of_twice_the_rate_carries_twice_as_much_in_the_same_time(kind: str) -> None:
    link = link_preset("nvlink4")
    fast = replace(link, bytes_per_s=2 * link.bytes_per_s)
    usual = collective(kind, Group(8, 8), 1 << 27, link, None)
    double = collective(kind, Group(8, 8), 1 << 28, fast, None)
    assert (usual.ns, usual.is_extrapolated, double.is_extrapolated) == (double.ns, False, True)


# All of it.


def test_an_explanation_is_whole_and_always_the_same() -> None:
    job = paper_job(gib=40.0, recompute=("none",))
    result = WORLD.search(job)
    found = explain(job, WORLD, result)
    assert found.chosen.step == result.ranking[0].step
    assert {each.knob for each in found.sensitivities} == set(KNOBS)
    assert found.runner_up is not None and found.thumb is not None
    text = canonical_json(found)
    assert json.loads(text)["chosen"]["text"] == str(result.ranking[0].layout)
    assert canonical_json(explain(job, PaperWorld(), result)) == text


def test_a_real_search_is_explained_and_asked_once_for_each_job() -> None:
    job = reference_job(nodes=1, global_batch=8, sharding=("zero1",), schedule=("1f1b",), cp=(1,))
    world = Searches(costs_of=reference_costs, effort=Effort(gap=0.0))
    result = world.search(job)
    assert world.search(job) is result
    best = result.ranking[0]
    found = explain(job, world, result)
    assert found.chosen.step == best.step
    assert found.chosen.tightest.memory.total == best.peak_bytes
    assert found.runner_up is not None
    rivals = [
        c.step.p50_ns
        for c in result.ranking
        if (c.layout.tp, c.layout.pp) != (best.layout.tp, best.layout.pp)
    ]
    assert found.runner_up.account.step.p50_ns <= min(rivals)
    for each in found.sensitivities:
        for point in each.points:
            # What is kept was within reach of the search: nothing that fits is better than it.
            if point.best and point.kept and not point.is_flip:
                assert point.kept.step.p50_ns >= point.best.step.p50_ns


def test_the_runner_up_is_the_best_of_all_other_degrees() -> None:
    job = paper_job()
    ranking = WORLD.search(job).ranking
    best = ranking[0].layout
    found = runner_up(job, WORLD, ranking[0])
    expected = next(c for c in ranking if (c.layout.tp, c.layout.pp) != (best.tp, best.pp))
    assert found is not None and found.step == expected.step
    only = paper_job(tp=(1,), pp=(1,))
    assert runner_up(only, WORLD, WORLD.search(only).ranking[0]) is None
