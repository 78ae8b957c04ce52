"""Figures: equal bytes for equal input, valid XML, nothing from outside, one colour a kind."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import get_args
from xml.etree import ElementTree

import pytest

from planner.lower import simulate_plan
from planner.waterfall import PARTS, PARTS_WITHOUT_PEAK, Waterfall
from reports.compare import compare
from reports.figures import (
    MAX_ROWS,
    IntervalRow,
    cascade,
    intervals,
    kind_bars,
    memory_bars,
    memory_rows,
    shown_ranks,
    step_curves,
)
from reports.gantt import gantt
from reports.svg import KIND_COLOURS, MEMORY_COLOURS, PART_COLOURS
from reports.words import KIND_NAMES, PART_NAMES, duration
from simulator.timeline import Kind, Span, Timeline
from tests.machine import interleaved_plan
from tests.runs import MIB, MS, make_layout, make_plan, make_record, predict

PLAN = make_plan(make_layout(dp=2, pp=2))
RECORD = make_record(PLAN, slowdown=1.1, scale={"all_reduce": 2.0})
PREDICTED = predict(PLAN.layout)
COMPARISON = compare(PLAN, RECORD, PREDICTED)
ROWS = (
    IntervalRow(
        label="<one> & 'two' \u4e09",
        p10_ns=9 * MS,
        p50_ns=10 * MS,
        p90_ns=12 * MS,
        is_extrapolated=True,
        is_chosen=True,
        measured_ns=(11 * MS, 14 * MS),
    ),
    IntervalRow(
        label="x" * 300,
        p10_ns=900 * MS,
        p50_ns=1000 * MS,
        p90_ns=1200 * MS,
        is_extrapolated=False,
        is_chosen=False,
        measured_ns=(),
    ),
)
LOST = Waterfall(
    parts_ns={part: (place + 1) * MS for place, part in enumerate(PARTS)}, mfu=0.4, hfu=0.5
)
PEAKLESS = dict.fromkeys(PARTS_WITHOUT_PEAK, 0) | {"work": 5 * MS, "host": MS}
FIGURES: dict[str, Callable[[], str]] = {
    "gantt": lambda: gantt("a", PLAN, PREDICTED, RECORD.timeline),
    "gantt of a plan": lambda: gantt("a", PLAN, PREDICTED, None),
    "kinds": lambda: kind_bars("a", COMPARISON, shown_ranks(PLAN.layout)),
    "memory": lambda: memory_bars("a", memory_rows(PLAN, RECORD), 2048 * MIB),
    "memory of a plan": lambda: memory_bars("a", memory_rows(PLAN, None), 10**12),
    "steps": lambda: step_curves("a", COMPARISON, RECORD),
    "intervals": lambda: intervals("a", "a <label>", ROWS),
    "cascade": lambda: cascade("a", LOST),
    "cascade without a peak": lambda: cascade("a", replace(LOST, parts_ns=PEAKLESS)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_the_same_valid_self_contained_bytes(name: str) -> None:
    svg = FIGURES[name]()
    assert svg == FIGURES[name]()
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["aria-label"]
    assert not list(root.iter("{http://www.w3.org/2000/svg}style"))
    references = re.findall(r'(?:href=|url\()"?([^")]+)', svg)
    assert all(reference.startswith("#a-") for reference in references)
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert {reference[1:] for reference in references} == set(ids)
    assert len(ids) == len(set(ids))
    assert svg.replace("http://www.w3.org/", "").count("http") == 0


def test_every_kind_and_every_part_of_memory_has_its_own_colour() -> None:
    assert set(KIND_COLOURS) == {*get_args(Kind), "idle"} == set(KIND_NAMES)
    assert len(set(KIND_COLOURS.values())) == len(KIND_COLOURS)
    assert sum(dict(memory_rows(PLAN, None)[0].parts).values()) == PLAN.memory[0].total
    assert len(set(MEMORY_COLOURS.values())) == len(MEMORY_COLOURS)


def test_memory_is_drawn_as_it_lies_at_the_peak() -> None:
    (memory, *_) = PLAN.memory
    memory = replace(memory, buffers=3 * MIB, reserve=5 * MIB, update=7 * MIB)
    for update, shown in ((7, {"activations", "temporary"}), (999, {"update"})):
        rank = replace(memory, update=update * MIB)
        parts = dict(memory_rows(replace(PLAN, memory=(rank, rank)), None)[0].parts)
        assert sum(parts.values()) == rank.total
        drawn = {part for part, size_bytes in parts.items() if size_bytes}
        assert drawn & {"activations", "temporary", "update"} == shown
    svg = memory_bars("a", memory_rows(replace(PLAN, memory=(memory, memory)), None), 10**12)
    assert ">buffers<" in svg and ">reserve<" in svg and ">update<" not in svg


def test_the_parts_of_a_step_are_named_one_below_the_other() -> None:
    assert set(PART_NAMES) == {*PARTS, *PARTS_WITHOUT_PEAK} == set(PART_COLOURS)
    svg = cascade("a", LOST)
    for part in PARTS:
        assert f">{PART_NAMES[part]}<" in svg
        assert PART_COLOURS[part] in svg
    # The 8 ms of the last part are 8 / 36 of the step.
    assert f">{duration(8 * MS)}<" in svg
    assert ">22.2 %<" in svg
    # A part that the peak was not enough for goes back to the left.
    negative = {**LOST.parts_ns, "kernels": -MS}
    ElementTree.fromstring(cascade("a", replace(LOST, parts_ns=negative)))


def test_a_long_label_keeps_both_of_its_ends() -> None:
    one, other = (f"dp=2,tp=8,pp=8,{'v' * 60},recompute=full,mb={n}x384" for n in (1, 2))
    svg = intervals("a", "a", [replace(ROWS[0], label=one), replace(ROWS[0], label=other)])
    assert len(re.findall(r">dp=2,tp=8,pp=8,v+\.\.\.[a-z=,]*,mb=[12]x384<", svg)) == 2


def test_every_kind_of_a_timeline_is_drawn_and_named() -> None:
    kinds = get_args(Kind)
    spans = tuple(
        Span(rank=0, stream="compute", name=kind, kind=kind, start_ns=i * MS, end_ns=(i + 1) * MS)
        for i, kind in enumerate(kinds)
    )
    svg = gantt("a", make_plan(make_layout(pp=1)), Timeline(source="simulated", spans=spans), None)
    for kind in kinds:
        assert svg.count(KIND_COLOURS[kind]) >= 2
        assert f">{KIND_NAMES[kind]}<" in svg


def test_a_rank_with_several_stages_is_named_by_them() -> None:
    plan = interleaved_plan()
    svg = gantt("a", plan, simulate_plan(plan), None)
    assert ">stages 0,2<" in svg and ">stages 1,3<" in svg
    assert "a row a pipeline rank" in svg
    assert re.search(r">3B\d<", svg)
    rows = memory_rows(plan, None)
    assert [row.label for row in rows] == ["stages 0,2", "stages 1,3"]
    assert [sum(dict(row.parts).values()) for row in rows] == [rank.total for rank in plan.memory]


def test_many_short_spans_stay_small() -> None:
    spans = tuple(
        Span(rank=0, stream="compute", name="0F0", kind="forward", start_ns=i, end_ns=i + 1)
        for i in range(20_000)
    )
    svg = gantt("a", make_plan(make_layout(pp=1)), Timeline(source="simulated", spans=spans), None)
    assert len(svg) < 200_000


def test_a_wide_layout_shows_one_rank_a_stage() -> None:
    layout = make_layout(dp=8, pp=4)
    assert layout.num_ranks > MAX_ROWS
    assert shown_ranks(layout) == (0, 8, 16, 24)
    assert [layout.place(rank).pp for rank in shown_ranks(layout)] == [0, 1, 2, 3]


def test_an_empty_timeline_is_an_empty_figure() -> None:
    empty = Timeline(source="simulated", spans=())
    ElementTree.fromstring(gantt("a", make_plan(make_layout(pp=1)), empty, empty))
