"""Layers of pipeline stages: as software deals them, by what each rule says, and as is best."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.partition import Homes, deal, dealt_stages, homes_of, stages_by_rule
from planner.published.layout import split_layers
from profiles.errors import UnsupportedError
from profiles.model import ModelSpec
from profiles.presets import model_preset
from profiles.stack import Partition
from tests.setups import GPT, SMALL

RULES: tuple[Partition, ...] = get_args(Partition)
SWEEP_1B = ModelSpec(
    name="1.34B of the Ultra-Scale Playbook", num_layers=16, hidden=2048, num_heads=32,
    num_kv_heads=32, head_size=64, ffn=8192, vocab=131072, max_seq_len=4096, tied_embeddings=True,
)  # fmt: skip
"""Its head has exactly the parameters of four layers."""


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """Draw a model whose head has the parameters of a layer, a part of it, or many times them."""
    return replace(
        draw(st.sampled_from((SMALL, GPT, SWEEP_1B))),
        num_layers=draw(st.integers(1, 60)),
        vocab=draw(st.sampled_from((1, 8192, 24576, 32768, 50257, 131072, 1_000_000))),
    )


def filled(model: ModelSpec, num_stages: int) -> tuple[int, ...]:
    """Return the layers of each stage, each ended by the first layer that reaches its share.

    Exact, from the running count of layers c behind stage s = 1, 2, ...: the least one with
    c * layer >= s * (all layers + head) / stages, one layer a stage at the least.
    """
    layer = 4 * model.num_heads * model.head_size * model.hidden + model.num_mlp_parameters
    share = Fraction(model.num_layers * layer + model.vocab * model.hidden, num_stages)
    ends = [0]
    for stage in range(1, num_stages):
        reached = -(-stage * share // layer)
        ends.append(min(model.num_layers, max(ends[-1] + 1, int(reached))))
    return tuple(right - left for left, right in pairwise([*ends, model.num_layers]))


@given(models(), st.integers(1, 64), st.sampled_from(RULES))
def test_every_rule_deals_all_layers(model: ModelSpec, num_stages: int, rule: Partition) -> None:
    if rule == "slots":
        num_stages = min(num_stages, model.num_layers + 2)
    found = stages_by_rule(model, num_stages, rule)
    assert (len(found), sum(found), min(found) >= 0) == (num_stages, model.num_layers, True)


@given(models(), st.integers(1, 64))
def test_even_stages_differ_by_a_layer_and_the_first_have_more(
    model: ModelSpec, num_stages: int
) -> None:
    found = stages_by_rule(model, num_stages, "even")
    assert max(found) - min(found) <= 1
    assert list(found) == sorted(found, reverse=True)


@given(models(), st.integers(2, 62))
def test_slots_count_embedding_and_head_as_a_layer_each(model: ModelSpec, num_stages: int) -> None:
    num_stages = min(num_stages, model.num_layers + 2)
    first, *middle, last = stages_by_rule(model, num_stages, "slots")
    slots = [first + 1, *middle, last + 1]
    assert max(slots) - min(slots) <= 1
    assert slots == sorted(slots, reverse=True)


def test_llama_405b_as_it_was_trained() -> None:
    """126 layers on 16 stages of 8 slots (arXiv:2407.21783, section 3.3.2)."""
    model = model_preset("llama-3.1-405b")
    assert stages_by_rule(model, 16, "slots") == (7, *(8,) * 14, 7)
    assert split_layers(model, 16, "even") == (7, *(8,) * 14, 7)
    # Layers that divide evenly are not dealt by slots.
    assert split_layers(model, 14, "even") == (9,) * 14


@settings(max_examples=300)
@given(models(), st.integers(1, 64))
def test_cost_ends_a_stage_with_the_layer_that_reaches_its_share(
    model: ModelSpec, num_stages: int
) -> None:
    assert stages_by_rule(model, num_stages, "cost") == filled(model, num_stages)


@pytest.mark.parametrize(
    ("num_stages", "layers"),
    [(2, (10, 6)), (4, (5, 5, 5, 1)), (8, (3, 2, 3, 2, 3, 2, 1, 0))],
)
def test_cost_where_a_layer_reaches_a_share_exactly(
    num_stages: int, layers: tuple[int, ...]
) -> None:
    """Twenty layers' worth: a share of ten, or of five, is reached and not passed.

    So the peak memory of the sweep's runs of this model has it (HF Ultra-Scale Playbook, 2025-02).
    """
    assert stages_by_rule(SWEEP_1B, num_stages, "cost") == layers


@pytest.mark.parametrize("rule", RULES)
def test_one_stage_has_all_layers(rule: Partition) -> None:
    assert stages_by_rule(SMALL, 1, rule) == (8,)


def test_more_stages_than_layers_are_refused_where_only_layers_are_cut() -> None:
    with pytest.raises(UnsupportedError, match="layers is 8, fewer than the 9 stages"):
        split_layers(SMALL, 9, "even")
    assert split_layers(SMALL, 10, "even") == (0, *(1,) * 8, 0)
    assert sum(split_layers(SMALL, 9, "cost")) == 8


# As is best: against every division.

TIMES = st.integers(0, 40)
HOMES: tuple[Homes, ...] = get_args(Homes)


def divisions(num_layers: int, places: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    """Yield every way to deal `num_layers` to `places` of at least `least`."""
    if places == 1:
        yield (num_layers,)
        return
    for count in range(least, num_layers - least * (places - 1) + 1):
        for rest in divisions(num_layers - count, places - 1, least):
            yield (count, *rest)


@given(
    places=st.integers(1, 5),
    more=st.integers(0, 6),
    layer=st.integers(1, 9),
    extra=st.lists(TIMES, min_size=5, max_size=5),
    least=st.integers(0, 2),
)
def test_no_division_has_a_faster_slowest_place(
    places: int, more: int, layer: int, extra: list[int], least: int
) -> None:
    def slowest(counts: tuple[int, ...]) -> int:
        return max(n * layer + own for n, own in zip(counts, extra, strict=False))

    num_layers = least * places + more
    (found,) = deal(
        num_layers, np.array([layer], float), np.array([extra[:places]], float), least
    ).tolist()
    assert (sum(found), min(found) >= least) == (num_layers, True)
    assert slowest(tuple(found)) == min(map(slowest, divisions(num_layers, places, least)))


def test_fewer_layers_than_places_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers for 2 places of 2 layers at least"):
        deal(3, np.ones(1), np.zeros((1, 2)), 2)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[int, tuple[int, int, Homes]]:
    """Draw layers and a pipeline of ranks, stages a rank and where these live."""
    ranks, chunks = draw(st.sampled_from(((1, 1), (2, 1), (4, 1), (2, 2), (3, 2), (2, 3))))
    return ranks * chunks + draw(st.integers(0, 5)), (ranks, chunks, draw(st.sampled_from(HOMES)))


@settings(max_examples=60)
@given(pipelines(), st.integers(1, 9), TIMES, TIMES)
def test_no_stages_have_a_faster_slowest_rank(
    case: tuple[int, tuple[int, int, Homes]], layer: int, first: int, last: int
) -> None:
    num_layers, shape = case
    homes = homes_of(*shape)
    extra = np.zeros(len(homes))
    extra[0] += first
    extra[-1] += last

    def slowest(counts: tuple[int, ...]) -> tuple[float, list[float]]:
        works = np.array(counts) * layer + extra
        ranks = np.bincount(homes, works)
        own = [float(works[homes == rank].max()) for rank in range(len(ranks))]
        return float(ranks.max()), own

    one = np.ones(1)
    (found,) = dealt_stages(num_layers, homes, layer * one, first * one, last * one).tolist()
    assert (sum(found), min(found) >= 1) == (num_layers, True)
    every = list(divisions(num_layers, len(homes)))
    ranks, own = slowest(tuple(found))
    assert ranks == min(slowest(each)[0] for each in every)
    # Of what leaves each rank as many layers, none has a faster slowest stage on any rank.
    held = np.bincount(homes, found).tolist()
    alike = [slowest(each)[1] for each in every if np.bincount(homes, each).tolist() == held]
    assert own == [min(stages) for stages in zip(*alike, strict=True)]


@given(
    pipelines(),
    st.lists(st.tuples(st.integers(1, 9), TIMES, TIMES), min_size=1, max_size=6),
)
def test_cases_side_by_side_are_dealt_as_one_by_one(
    case: tuple[int, tuple[int, int, Homes]], rows: list[tuple[int, int, int]]
) -> None:
    num_layers, shape = case
    homes = homes_of(*shape)
    columns = np.array(rows, float).T
    beside = dealt_stages(num_layers, homes, *columns)
    for row, found in zip(columns.T, beside, strict=True):
        (alone,) = dealt_stages(num_layers, homes, *row[:, None])
        assert found.tolist() == alone.tolist()
