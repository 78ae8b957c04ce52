"""Explanations: layouts by their text, accounts by part, flips, relaxations, the rule of thumb."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.account import Tightest, account_of, dealt, differences, parts_ns, traits
from planner.cost import measured_costs
from planner.evaluate import Costs, basis_of, evaluate
from planner.explain import HOLDING_WORDS, Comparison, Searches, explain, runner_up, why
from planner.flips import KNOBS, MARGIN, Knob, Sensitivity, is_better, sensitivities, varied
from planner.layout import Layout
from planner.layout_text import parse_layout, spread
from planner.orders import order_of
from planner.plan import PeakMemory
from planner.reference.costs import reference_costs
from planner.relax import lifted, near_misses, smallest_relaxation
from planner.schedules import SCHEDULES
from planner.search import Effort, search
from planner.thumb import rule_of_thumb, thumb_rule
from profiles.collective_curves import Group, collective
from profiles.errors import InvalidInputError, UnsupportedError
from profiles.files import canonical_json
from profiles.goal import Goal
from profiles.job import Job, SearchLimits
from profiles.presets import cluster_preset, link_preset, model_preset, stack_preset
from profiles.quantity import format_quantity
from profiles.workload import Workload
from tests.machine import made_up_job, made_up_profile
from tests.setups import MOE, SMALL
from tests.worlds import EXCHANGE_NS, LAYER_NS, MS, REDUCTION_NS, UPDATE_NS, PaperWorld, paper_job

WORLD = PaperWorld()
GIB = 1 << 30


def reference_job(
    model: str = "", nodes: int = 2, global_batch: int = 64, seq_len: int = 4096,
    stack: str = "nemo", **limits: Any,
) -> Job:  # fmt: skip
    """Return a job on nodes of H100, of a small model unless one is named."""
    return Job(
        seed=0,
        model=model_preset(model) if model else SMALL,
        workload=Workload(seq_len=seq_len, global_batch=global_batch, dtype="bf16"),
        cluster=cluster_preset("h100-sxm", num_nodes=nodes),
        stack=stack_preset(stack),
        profile_path="",
        search=SearchLimits(**limits),
    )


def read(text: str, job: Job | None = None) -> Layout:
    job = job or paper_job()
    return parse_layout(text, job, WORLD.costs(job))


# A layout by its text.


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Draw words of a layout of 16 ranks and 32 sequences, in any order; some are left out."""
    tp, pp, cp = draw(
        st.sampled_from([(1, 1, 1), (2, 1, 1), (4, 2, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1)])
    )
    dp = 16 // (tp * pp * cp)
    words = [f"tp={tp}", f"pp={pp}", f"cp={cp}", f"mb={draw(st.sampled_from((1, 2)))}"]
    words += draw(st.sampled_from(([], [f"dp={dp}"])))
    if pp > 1:
        name = draw(st.sampled_from(sorted(SCHEDULES)))
        count = SCHEDULES[name].stages_per_rank or 2
        words += draw(st.sampled_from(([name], [name, f"v={count}"], [f"v={count}", name])))
    words += draw(st.sampled_from(([], ["zero1"], ["zero3"], [f"zero2:{dp * cp}"], ["zero0"])))
    again = draw(st.sampled_from(("", "none", "full", "selective", "full:5", "full:8")))
    words += [f"recompute={again}"] if again else []
    words += ["sp"] if tp > 1 and draw(st.booleans()) else []
    words += draw(st.sampled_from(([], ["order=tp-cp-pp-dp"], ["order=tp-cp-dp-pp"])))
    return draw(st.sampled_from((",", ", "))).join(draw(st.permutations(words)))


@settings(max_examples=60)
@given(texts())
def test_what_a_layout_prints_is_read_again(text: str) -> None:
    # A stack that shards and recomputes nothing, so that what is not printed is nothing.
    layout = read(text)
    assert read(str(layout)) == layout
    assert (layout.num_ranks, layout.global_batch, sum(layout.stage_layers)) == (16, 32, 8)


def test_what_is_left_out_is_completed_as_ranks_batch_and_stack_have_it() -> None:
    job = reference_job()
    costs = reference_costs(job)
    layout = parse_layout("tp=2,pp=2", job, costs)
    assert str(layout) == "dp=4,tp=2,sp,pp=2,1f1b,zero1,mb=1x16"
    assert layout == dealt(layout, 8, costs)
    assert (job.stack.sharding, job.stack.shards_sequence) == ("zero1", True)
    told = parse_layout("tp=2,pp=2,nosp,zero0,v=2,mb=2", job, costs)
    assert str(told) == "dp=4,tp=2,pp=2,v=2,interleaved,mb=2x8"
    searched = search(
        replace(job, search=SearchLimits(tp=(2,), pp=(2,), schedule=("1f1b",))), costs
    )
    assert searched.ranking
    for candidate in searched.ranking:
        again = dealt(candidate.layout, 8, costs)
        assert again.stage_layers == candidate.layout.stage_layers


def test_a_layout_of_the_ranking_is_found_by_its_whole_text() -> None:
    # Its text does not say what a synthesised order or an odd split is; the ranking does.
    odd = replace(read("tp=2,pp=2"), stage_layers=(7, 1), schedule="synthesised")
    job = paper_job()
    assert parse_layout(f" {odd} ", job, WORLD.costs(job), known=[odd]) is odd


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tp=3", "tp x pp is 3; it must divide the 16 ranks of cluster h100-sxm; use 1, 2, 4, 8"),
        ("dp=3,tp=4", "dp x tp x pp is 12; it must multiply to the 16 ranks"),
        ("dp=3,tp=4", "write dp=4, or leave dp out"),
        ("tp=16", "tp is 16; it must divide the 8 kv heads; use 1, 2, 4, 8"),
        ("tq=4", 'a word is "tq=4"; it must be a word of a layout; use a known word: dp, tp'),
        ("interleave", 'did you mean "interleaved"?'),
        ("tp=four", 'a word is "tp=four"; it must be a whole number from 1 on; for example tp=4'),
        ("tp=2,tp=4", "tp=4 is said twice; it must stand once; drop one"),
        ("1f1b,gpipe,pp=2", "gpipe is said twice"),
        ("tp=2,mb=3", "mb is 3; it must divide the 4 sequences of a replica"),
        ("tp=2,mb=2x8", "mb is 2x8, 16 sequences; it must be 4 sequences a replica"),
        ("tp=2,mb=2x8", "write mb=2x2, or mb=2 alone"),
        ("pp=2,v=3,1f1b", "v is 3; it must be 1 with 1f1b; set v, or use interleaved"),
        ("interleaved", "the schedule is interleaved with v=1; it must be left out with pp=1"),
        ("pp=16", "pp x v is 16; it must be at most the 8 layers of small"),
        ("pp=2,synthesised", "must be an order with a name"),
        ("cp=16,dp=1,ep=2", "ep is 2; it must divide the 1 experts of small"),
        ("zero1:3", "the shard group is 3; it must divide the 16 replicas (dp x cp)"),
        ("zero0:4", "and shard something"),
        ("zero4", 'a word is "zero4"; it must be a word of a layout; did you mean "zero3"'),
        ("sp", "sp is set with tp=1; it must have ranks to share sequences"),
        ("recompute=some", 'recompute is "some"; it must be none, selective, full'),
        ("recompute=full:9", "recompute is of 9 layers; it must be at most the 8 layers"),
        ("recompute=none:2", "recompute is none:2; it must name what is made again"),
        ("order=tp-dp", 'order is "tp-dp"; it must name tp, cp, dp, pp once each'),
        ("", "it is empty; it must have 1 to 400 letters; for example dp=8,tp=4,pp=2"),
        ("tp=1," * 200, "letters long"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_named_with_its_rule_and_a_way_out(text: str, said: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read(text)
    assert said in str(caught.value)


def test_all_words_that_are_none_are_told_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        read("dq=2,tp=x,zero9")
    assert len(caught.value.problems) == 3


def test_batch_and_length_bound_a_layout_too() -> None:
    with pytest.raises(InvalidInputError, match=r"dp is 16; it must divide workload.global_batch"):
        read("tp=1", paper_job(global_batch=24))
    with pytest.raises(InvalidInputError, match="stages x micro-batches"):
        read("tp=2,pp=8", paper_job(global_batch=1 << 17))
    with pytest.raises(InvalidInputError, match="half a sequence"):
        read("cp=16", replace(paper_job(), workload=Workload(seq_len=4104, global_batch=32)))
    experts = replace(paper_job(), model=MOE)
    assert read("tp=2,ep=4", experts).ep == 4
    with pytest.raises(InvalidInputError, match="the 8 experts of small"):
        read("tp=1,ep=16", experts)


@pytest.mark.parametrize(
    "word", ["cp=2", "zero1", "recompute=full", "tp=2,sp", "order=tp-cp-pp-dp"]
)
def test_what_our_executor_does_not_do_is_refused(word: str) -> None:
    job = made_up_job(num_ranks=4)
    costs = measured_costs(job, made_up_profile(num_ranks=4))
    assert str(parse_layout("tp=2", job, costs)).startswith("dp=2,tp=2,pp=1,mb=1x")
    with pytest.raises(InvalidInputError, match="our own executor"):
        parse_layout(word, job, costs)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_recomputed_layers_are_spread_evenly(held: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(held)))
    again = spread(tuple(held), total)
    assert sum(again) == total
    assert all(0 <= made <= layers for made, layers in zip(again, held, strict=True))
    shares = [(made / layers, layers) for made, layers in zip(again, held, strict=True) if layers]
    for low, layers in shares:
        assert all(high <= low + 1 / layers + 1e-9 for high, _ in shares)


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
    assert slow.broken == ("step_time is 0.101 s, goal.limits allows at most 0.060 s",)
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


# What keeps better layouts out.


def test_the_nearest_miss_of_memory_is_told_to_the_byte() -> None:
    ample = WORLD.search(paper_job()).ranking
    best = ample[0]
    job = paper_job(gib=(best.peak_bytes - 1) / GIB)
    chosen = WORLD.search(job).ranking[0]
    assert chosen.layout != best.layout
    misses = near_misses(job, WORLD, chosen)
    if is_better(paper_job(), best, chosen, MARGIN):
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
    costs = WORLD.costs(paper_job())
    plain = [c.peak_bytes for c in WORLD.search(paper_job(recompute=("none",))).ranking]
    tight = paper_job(gib=0.97 * min(plain) / GIB)
    found = rule_of_thumb(tight, costs)
    assert rule_of_thumb(paper_job(), costs).recompute == "none"
    if found.recompute != "none":
        assert not WORLD.search(replace(tight, search=SearchLimits(recompute=("none",)))).ranking


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
    found = runner_up(job, WORLD, best)
    expected = next(c for c in ranking if (c.layout.tp, c.layout.pp) != (best.tp, best.pp))
    assert found is not None and found.step == expected.step
    only = paper_job(tp=(1,), pp=(1,))
    assert runner_up(only, WORLD, WORLD.search(only).ranking[0].layout) is None
