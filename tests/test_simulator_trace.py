"""Perfetto traces: integer ids, same bytes, every span once, and all that is laid over them."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.schedules.flush import one_f_one_b
from simulator.critical import critical_path
from simulator.engine import Simulation, simulate, simulate_step
from simulator.graph import KINDS
from simulator.memory import MemoryCurve, activation_changes, memory_curves
from simulator.step import lower, step_times
from simulator.timeline import Span, Timeline
from simulator.trace import Overlay, overlay, perfetto_trace
from tests.graphs import Drawn, graphs

Event = dict[str, Any]

LINE = Timeline(
    source="simulated",
    spans=(
        Span(rank=0, stream="compute", name="0F0", kind="forward", start_ns=0, end_ns=1500),
        Span(rank=0, stream="to 1", name="0F0 to 1", kind="send", start_ns=1500, end_ns=1700),
        Span(rank=1, stream="compute", name="1F0", kind="forward", start_ns=1700, end_ns=3000),
    ),
)
CURVE = MemoryCurve(times_ns=np.array([0, 1234567]), alive_bytes=np.array([5, 1 << 40]))
COMMON: dict[str, type] = {"name": str, "ph": str, "pid": int, "tid": int}
FIELDS: dict[str, dict[str, type]] = {
    "M": {"args": dict},
    "X": {"cat": str, "ts": float, "dur": float},
    "C": {"ts": float, "args": dict},
    "s": {"cat": str, "id": int, "ts": float},
    "f": {"cat": str, "id": int, "ts": float, "bp": str},
}


def read(trace: bytes) -> list[Event]:
    """Return the events of a trace that has the form that the viewer asks for."""
    opened = json.loads(gzip.decompress(trace))
    assert list(opened) == ["traceEvents"]
    events: list[Event] = opened["traceEvents"]
    for event in events:
        assert {name: type(value) for name, value in event.items()} == COMMON | FIELDS[event["ph"]]
        assert all(event.get(field, 0) >= 0 for field in ("ts", "dur"))
        assert all(0 < event[field] < 1 << 32 for field in ("pid", "tid"))
    return events


def bound(events: list[Event]) -> list[tuple[str, str]]:
    """Return the spans at both ends of each arrow, found as the viewer finds them.

    It takes events by time, those of one time in the order of the file; the end of an arrow binds
    to the span of its thread that began last and is not over.
    """
    open_spans: dict[int, Event] = {}
    arrows: dict[tuple[int, str, str], str] = {}
    found = []
    for event in sorted((e for e in events if e["ph"] in "Xsf"), key=lambda e: e["ts"]):
        here = open_spans.get(event["tid"])
        over = here is None or round((here["ts"] + here["dur"] - event["ts"]) * 1000) <= 0
        if event["ph"] == "X":
            assert over, "a span begins inside another one"
            open_spans[event["tid"]] = event
            continue
        assert here is not None
        assert not over
        key = (event["id"], event["name"], event["cat"])
        if event["ph"] == "s":
            assert key not in arrows
            arrows[key] = here["name"]
        else:
            found.append((arrows.pop(key), here["name"]))
    assert not arrows
    return found


def test_every_span_is_there_with_integer_ids() -> None:
    events = read(perfetto_trace([LINE]))
    spans = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"]) for event in spans] == [
        ("0F0", 0.0, 1.5),
        ("0F0 to 1", 1.5, 0.2),
        ("1F0", 1.7, 1.3),
    ]
    names = {event["args"]["name"] for event in events if event["name"].endswith("_name")}
    assert names == {"rank 0 (simulated)", "rank 1 (simulated)", "compute", "to 1"}


def test_same_timeline_same_bytes() -> None:
    shown = Overlay(critical=(0, 1, 2), arrows=((1, 2),), memory={0: CURVE})
    first, second = (perfetto_trace([LINE, LINE], overlays=[shown, Overlay()]) for _ in range(2))
    assert first == second


def test_the_trace_of_a_message_is_this_text() -> None:
    shown = Overlay(critical=(1, 2), arrows=((1, 2),), memory={0: CURVE})
    events = read(perfetto_trace([LINE], overlays=[shown]))
    lines = [
        f"{e['ph']} {e['pid']}.{e['tid']} {e['name']}"
        f"{' @' + str(e['ts']) if 'ts' in e else ''}{' ' + str(e['args']) if 'args' in e else ''}"
        for e in events
    ]
    assert lines == [
        "M 1.1 process_name {'name': 'rank 0 (simulated)'}",
        "M 1.1 process_sort_index {'sort_index': 1}",
        "M 1.2 thread_name {'name': 'compute'}",
        "M 1.3 thread_name {'name': 'to 1'}",
        "C 1.1 memory @0.0 {'bytes': 5}",
        "C 1.1 memory @1234.567 {'bytes': 1099511627776}",
        "M 4.4 process_name {'name': 'rank 1 (simulated)'}",
        "M 4.4 process_sort_index {'sort_index': 4}",
        "M 4.5 thread_name {'name': 'compute'}",
        "X 1.2 0F0 @0.0",
        "X 1.3 0F0 to 1 @1.5",
        "X 4.5 1F0 @1.7",
        "M 6.6 process_name {'name': 'critical path (simulated)'}",
        "M 6.6 process_sort_index {'sort_index': 6}",
        "M 6.7 thread_name {'name': 'critical path'}",
        "X 6.7 0F0 to 1 (rank 0) @1.5",
        "X 6.7 1F0 (rank 1) @1.7",
        "s 1.3 feeds @1.699",
        "f 4.5 feeds @1.7",
    ]


def test_timelines_stand_side_by_side_and_share_no_number() -> None:
    measured = Timeline(source="measured", spans=LINE.spans)
    events = read(perfetto_trace([LINE, measured]))
    processes = {
        event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"
    }
    assert list(processes) == [
        f"rank {rank} ({source})" for source in ("simulated", "measured") for rank in (0, 1)
    ]
    places = [e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"]
    assert places == list(processes.values()) == sorted(places)
    threads = Counter(event["tid"] for event in events if event["name"] == "thread_name")
    assert set(threads.values()) == {1}
    assert not threads.keys() & set(processes.values())
    assert len(set(processes.values())) == 4
    with pytest.raises(ValueError, match="1 overlays for 2 timelines"):
        perfetto_trace([LINE, measured], overlays=[Overlay()])


@given(st.integers(0, (1 << 51) - 2))
def test_nanoseconds_survive_for_weeks(moment_ns: int) -> None:
    span = Span(rank=0, stream="compute", name="0F0", kind="forward", start_ns=moment_ns,
                end_ns=moment_ns + 1)  # fmt: skip
    *_, event = read(perfetto_trace([Timeline(source="simulated", spans=(span,))]))
    # What the viewer does: a double of microseconds, times 1000, rounded.
    assert (round(event["ts"] * 1000.0), round(event["dur"] * 1000.0)) == (moment_ns, 1)


def pipeline() -> tuple[Simulation, dict[int, MemoryCurve]]:
    schedule = one_f_one_b(3, 5)
    step = lower(schedule)
    times = step_times(3, forward=1001, backward=1999, send_forward=7, send_backward=1)
    simulation = simulate_step(schedule, times)
    return simulation, memory_curves(simulation, *activation_changes(step, 100), 1000)


def test_a_step_shows_its_messages_path_and_memory() -> None:
    simulation, memory = pipeline()
    shown = overlay(simulation, memory)
    events = read(perfetto_trace([simulation.timeline], overlays=[shown]))
    graph = simulation.graph
    messages = {i for i in range(len(graph)) if graph.op(i).kind == "send"}
    assert sorted(bound(events)) == sorted(
        (graph.names[dep], graph.names[i])
        for i in range(len(graph))
        for dep in graph.op(i).deps
        if dep in messages
    )
    assert len(bound(events)) == len(messages) == 20
    track = next(e["tid"] for e in events if e.get("args") == {"name": "critical path"})
    path = [e["name"] for e in events if e["ph"] == "X" and e["tid"] == track]
    assert path == [
        f"{op.name} (rank {op.rank})" for op in map(graph.op, critical_path(simulation).op_ids)
    ]
    peaks = Counter[int]()
    for event in events:
        if event["ph"] == "C":
            peaks[event["pid"]] = max(peaks[event["pid"]], event["args"]["bytes"])
    assert list(peaks.values()) == [1300, 1200, 1100]


@settings(deadline=None, max_examples=50)
@given(graphs(queues=True))
def test_an_overlay_names_the_spans_of_the_timeline(drawn: Drawn) -> None:
    """Every second op is a message, and every arrow finds its spans."""
    kinds = np.resize(np.array([KINDS.index("push"), 0], np.int8), len(drawn.graph))
    simulation = simulate(replace(drawn.graph, kind=kinds), drawn.costs)
    spans = simulation.timeline.spans
    lengths = simulation.ends_ns - simulation.starts_ns
    shown = overlay(simulation)
    assert [spans[place].name for place in shown.critical] == [
        f"op{i}" for i in critical_path(simulation).op_ids if lengths[i]
    ]
    assert sorted(bound(read(perfetto_trace([simulation.timeline], overlays=[shown])))) == sorted(
        (f"op{dep}", f"op{i}")
        for i in np.flatnonzero(lengths).tolist()
        for dep in drawn.graph.op(i).deps
        if dep % 2 == 0 and lengths[dep]
    )
