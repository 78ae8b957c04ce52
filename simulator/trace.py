"""Timelines as Perfetto traces: Chrome's JSON, gzipped; opens at ui.perfetto.dev."""

import gzip
import io
import json
from collections.abc import Sequence
from typing import Any

from simulator.timeline import Timeline


def perfetto_trace(timelines: Sequence[Timeline]) -> bytes:
    """Return the gzipped trace of `timelines`: a process per rank and source, a thread per stream.

    Times are microseconds, as the format asks; ids are integers. Equal input gives equal bytes.
    Source: the Trace Event Format, "complete events" (ph X).
    """
    events: list[dict[str, Any]] = []
    processes = [(line, rank) for line in timelines for rank in line.ranks]
    for pid, (line, rank) in enumerate(processes, start=1):
        events.append(_name("process_name", pid, 0, f"rank {rank} ({line.source})"))
        spans = [span for span in line.spans if span.rank == rank]
        streams = sorted({span.stream for span in spans})
        for tid, stream in enumerate(streams, start=1):
            events.append(_name("thread_name", pid, tid, stream))
        events += [
            {
                "ph": "X",
                "pid": pid,
                "tid": streams.index(span.stream) + 1,
                "name": span.name,
                "cat": span.kind,
                "ts": span.start_ns / 1000,
                "dur": span.duration_ns / 1000,
            }
            for span in spans
        ]
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, sort_keys=True)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write(text.encode())
    return packed.getvalue()


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}
