"""Sweeps: axes read back from what was written, cases as a product, and every bad axis."""

import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.sweep import (
    MAX_CASES,
    Axis,
    Case,
    Failure,
    Row,
    Sweep,
    cases_of,
    headings,
    parse_axis,
)
from profiles.errors import InvalidInputError

# What both JSON and TOML write in the same way.
PLAIN = st.one_of(
    st.integers(-(2**60), 2**60),
    st.booleans(),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8),
)
VALUES = st.lists(st.one_of(PLAIN, st.lists(PLAIN, max_size=3)), min_size=1, max_size=6)


@given(VALUES)
def test_an_axis_is_read_as_it_was_written(values: list[object]) -> None:
    texts = list(dict.fromkeys(map(json.dumps, values)))
    axis = parse_axis(f" a.b = {' , '.join(texts)}")
    assert (axis.path, list(axis.values)) == ("a.b", texts)
    cases = cases_of([axis])
    assert [case.values["a.b"] for case in cases] == [json.loads(text) for text in texts]


@pytest.mark.parametrize(
    ("listed", "values"),
    [
        ("1,2,4", ("1", "2", "4")),
        ("zb_v", ("zb_v",)),
        ("'a,b',c", ("'a,b'", "c")),
        ("'a\\',b", ("'a\\'", "b")),
        ('"a\\",b",c', ('"a\\",b"', "c")),
        ("[1, [2, 3]],{a = 1, b = 2}", ("[1, [2, 3]]", "{a = 1, b = 2}")),
        ("400 Gb/s,800 Gb/s", ("400 Gb/s", "800 Gb/s")),
    ],
)
def test_a_comma_inside_a_value_parts_nothing(listed: str, values: tuple[str, ...]) -> None:
    assert parse_axis(f"a={listed}").values == values


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("cluster.nodes", "is no axis; it must be path=value,value,.."),
        ("=1,2", "is no axis"),
        ("a..b=1", "is no axis"),
        ("a=", "an axis with an empty value"),
        ("a=1,,2", "an axis with an empty value"),
        ("a=1,2, 1", "an axis with 1 twice"),
        ("a='x',\"x\"", "an axis with 'x' twice"),
        ("a=[1,2", "a bracket that has no other; it must be closed"),
        ("a=1],2", "a bracket that has no other"),
        ('a="1,2', "a quote that has no other"),
    ],
)
def test_what_is_no_axis(text: str, word: str) -> None:
    with pytest.raises(InvalidInputError) as told:
        parse_axis(text)
    assert word in str(told.value)
    assert str(told.value).endswith("for example --sweep cluster.nodes=1,2,4")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_cases_are_the_product_of_the_axes(lengths: list[int]) -> None:
    axes = [
        Axis(path=f"t.k{place}", values=tuple(map(str, range(length))))
        for place, length in enumerate(lengths)
    ]
    cases = cases_of(axes)
    assert [case.place for case in cases] == list(range(len(cases)))
    assert [tuple(case.values.values()) for case in cases] == list(product(*map(range, lengths)))
    names = [case.file_name(len(cases)) for case in cases]
    assert names == sorted(set(names))


@pytest.mark.parametrize(
    ("axes", "overrides"),
    [
        (["a.b=1", "a.b=2"], []),
        (["a.b=1"], ["a.b=2"]),
        (["a={b = 1}"], ["a.b=2"]),
        (["a.b=1", "a={b = 2}"], []),
    ],
)
def test_no_axis_overwrites_what_was_set(axes: list[str], overrides: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="it must be set in one place"):
        cases_of([parse_axis(axis) for axis in axes], overrides)


def test_an_axis_may_change_a_part_of_another_one() -> None:
    cases = cases_of([parse_axis("a={b = 1},{b = 2}"), parse_axis("a.c=3")], ["aa.b=1", "d=2"])
    assert [case.overrides for case in cases] == [("a={b = 1}", "a.c=3"), ("a={b = 2}", "a.c=3")]


def test_too_many_cases_are_counted_and_not_made() -> None:
    axis = ",".join(map(str, range(101)))
    with pytest.raises(
        InvalidInputError, match=f"101 x 101 .* 10,201 cases; at most {MAX_CASES:,}"
    ):
        cases_of([parse_axis(f"a={axis}"), parse_axis(f"b={axis}")])
    endless = [Axis(path=f"k{place}", values=("1", "2")) for place in range(500)]
    with pytest.raises(InvalidInputError, match="cases; at most"):
        cases_of(endless)


@given(st.text(max_size=200))
def test_a_file_name_is_one_on_every_system(text: str) -> None:
    name = Case(place=8, settings=(("model.hf_config", text),)).file_name(10)
    assert name.startswith("09-hf_config=")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=-")
    assert len(name) < 150


@pytest.mark.parametrize("text", ["nan", "inf", "2026-01-01", "zb_v", "1 GiB", "[nan]", "1 = 2"])
def test_what_json_has_no_value_for_is_its_text(text: str) -> None:
    case = Case(place=0, settings=(("a", text),))
    assert json.loads(json.dumps(case.values, allow_nan=False)) == {"a": text}


def test_headings_are_short_where_they_can_be() -> None:
    axes = [parse_axis(text) for text in ("a.size=1", "b.size=2", "c.nodes=3")]
    assert list(headings(axes).values()) == ["a.size", "b.size", "nodes"]


def test_an_interrupted_sweep_says_so() -> None:
    axis = parse_axis("a=1,2")
    first, second = cases_of([axis])
    rows = (
        Row(case=first, outcome=Failure(kind="infeasible", problem="too small")),
        Row(case=second, outcome=Failure(kind="interrupted", problem="not planned")),
    )
    found = Sweep(axes=(axis,), rows=rows)
    assert found.is_interrupted
    assert found.num_planned == 0
    assert found.as_json() == {
        "cases": [
            {"set": {"a": 1}, "problem": "too small", "kind": "infeasible"},
            {"set": {"a": 2}, "problem": "not planned", "kind": "interrupted"},
        ]
    }
