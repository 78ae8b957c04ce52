"""Timelines as Perfetto traces: Chrome's JSON, gzipped; opens at ui.perfetto.dev.

Times are microseconds, as the format asks. A double carries them to the nanosecond for 26 days
(2^51 ns), and the viewer rounds them back. There is no `displayTimeUnit`: the viewer ignores it, or
in old versions takes it for the unit of the times. Source: the Trace Event Format, and the importer
of Perfetto (`json_trace_tokenizer.cc`, `flow_tracker.cc`) where the format leaves it open.
"""

import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from simulator.critical import critical_path
from simulator.engine import Simulation
from simulator.graph import KINDS
from simulator.idle import COMMUNICATION
from simulator.memory import MemoryCurve
from simulator.timeline import Span, Timeline

Event = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """What a trace shows of a timeline beside its spans; spans are named by their place in it.

    `critical` is a track of its own. An arrow leads from the end of a message to the start of what
    it feeds. `memory` becomes a counter of each rank.
    """

    critical: tuple[int, ...] = ()
    arrows: tuple[tuple[int, int], ...] = ()
    memory: Mapping[int, MemoryCurve] = field(default_factory=dict)


def overlay(simulation: Simulation, memory: Mapping[int, MemoryCurve] | None = None) -> Overlay:
    """Return the overlay of `simulation.timeline`: critical path, arrows of messages, and `memory`.

    Ops without length have no span: the path skips them, and they have no arrows.
    """
    graph, starts = simulation.graph, simulation.starts_ns
    shown = np.flatnonzero(simulation.ends_ns > starts)
    # The order of the spans in `Simulation.timeline`.
    shown = shown[np.lexsort((shown, starts[shown]))]
    place = np.full(len(graph), -1, np.int64)
    place[shown] = np.arange(len(shown))
    fed = np.repeat(np.arange(len(graph)), np.diff(graph.dep_offsets))
    is_message = np.isin(graph.kind, [KINDS.index(kind) for kind in COMMUNICATION])[graph.deps]
    drawn = is_message & (place[fed] >= 0) & (place[graph.deps] >= 0)
    arrows = zip(place[graph.deps[drawn]].tolist(), place[fed[drawn]].tolist(), strict=True)
    path = place[list(critical_path(simulation).op_ids)] if len(graph) else place
    return Overlay(
        critical=tuple(path[path >= 0].tolist()), arrows=tuple(arrows), memory=memory or {}
    )


def perfetto_trace(timelines: Sequence[Timeline], *, overlays: Sequence[Overlay] = ()) -> bytes:
    """Return the gzipped trace of `timelines`: a process per rank and source, a thread per stream.

    `overlays` belong to the timelines one by one; without any, only spans are shown. Equal input
    gives equal bytes. Raises ValueError for overlays of another number than the timelines.
    """
    if overlays and len(overlays) != len(timelines):
        raise ValueError(
            f"{len(overlays)} overlays for {len(timelines)} timelines; give one each, or none"
        )
    # No two processes, threads or arrows share a number: some importers look threads up by their
    # number alone, and the thread with the number of its process is the main one.
    numbers = count(1)
    events: list[Event] = []
    for line, shown in zip(timelines, overlays or [Overlay()] * len(timelines), strict=True):
        events += _events(line, shown, numbers)
    text = json.dumps({"traceEvents": events}, sort_keys=True, allow_nan=False)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write(text.encode())
    return packed.getvalue()


def _events(line: Timeline, shown: Overlay, numbers: Iterator[int]) -> Iterator[Event]:
    """Yield the events of one timeline.

    Spans come before arrows: at equal times the viewer takes events in the order of the file, and
    an arrow binds to the span that is open on its thread at that moment.
    """
    streams: dict[int, list[str]] = {}
    for rank, stream in sorted({(span.rank, span.stream) for span in line.spans}):
        streams.setdefault(rank, []).append(stream)
    tracks: dict[tuple[int, str], Event] = {}
    for rank in sorted({*line.ranks, *shown.memory}):
        process = _process(numbers)
        yield from _shown_as(process, f"rank {rank} ({line.source})")
        for stream in streams.get(rank, []):
            tracks[rank, stream] = {**process, "tid": next(numbers)}
            yield _told("thread_name", tracks[rank, stream], name=stream)
        if rank in shown.memory:
            yield from _memory(process, shown.memory[rank])
    for span in line.spans:
        yield _complete(tracks[span.rank, span.stream], span, span.name)
    if shown.critical:
        process = _process(numbers)
        track = {**process, "tid": next(numbers)}
        yield from _shown_as(process, f"critical path ({line.source})")
        yield _told("thread_name", track, name="critical path")
        for place in shown.critical:
            span = line.spans[place]
            yield _complete(track, span, f"{span.name} (rank {span.rank})")
    for source, target in shown.arrows:
        ends = line.spans[source], line.spans[target]
        yield from _arrow(next(numbers), *((tracks[s.rank, s.stream], s) for s in ends))


def _process(numbers: Iterator[int]) -> Event:
    """Return a new process, in the words of an event: as its main thread."""
    number = next(numbers)
    return {"pid": number, "tid": number}


def _shown_as(process: Event, name: str) -> Iterator[Event]:
    """Yield the name of a process and its place: processes stand in the order of their numbers.

    Without a place Perfetto puts those with more spans first; versions before 53 always do.
    """
    yield _told("process_name", process, name=name)
    yield _told("process_sort_index", process, sort_index=process["pid"])


def _told(what: str, track: Event, **args: str | int) -> Event:
    return {"ph": "M", **track, "name": what, "args": args}


def _complete(track: Event, span: Span, name: str) -> Event:
    return {
        "ph": "X",
        **track,
        "name": name,
        "cat": span.kind,
        "ts": span.start_ns / 1000,
        "dur": span.duration_ns / 1000,
    }


def _memory(process: Event, curve: MemoryCurve) -> Iterator[Event]:
    for moment, alive in zip(curve.times_ns.tolist(), curve.alive_bytes.tolist(), strict=True):
        yield {
            "ph": "C",
            **process,
            "name": "memory",
            "ts": moment / 1000,
            "args": {"bytes": alive},
        }


def _arrow(number: int, source: tuple[Event, Span], target: tuple[Event, Span]) -> Iterator[Event]:
    """Yield both ends of an arrow: the last nanosecond of one span, the first of the other."""
    common = {"id": number, "name": "feeds", "cat": "message"}
    yield {"ph": "s", **source[0], **common, "ts": (source[1].end_ns - 1) / 1000}
    yield {"ph": "f", "bp": "e", **target[0], **common, "ts": target[1].start_ns / 1000}
