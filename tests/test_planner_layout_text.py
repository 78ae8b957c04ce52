"""Layouts that people name: read as they are printed, completed, refused with a way out."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.account import dealt
from planner.cost import measured_costs
from planner.layout_text import parse_layout, spread
from planner.reference.costs import reference_costs
from planner.search import search
from profiles.errors import InvalidInputError
from profiles.job import SearchLimits
from profiles.workload import Workload
from tests.machine import made_up_job, made_up_profile
from tests.setups import MOE
from tests.worlds import WORLD, paper_job, read, reference_job, texts


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
