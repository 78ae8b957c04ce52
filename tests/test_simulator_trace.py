"""Perfetto traces: integer ids, same bytes, every span once."""

import gzip
import json

from simulator.timeline import Span, Timeline
from simulator.trace import perfetto_trace

LINE = Timeline(
    source="simulated",
    spans=(
        Span(rank=0, stream="compute", name="0F0", kind="forward", start_ns=0, end_ns=1500),
        Span(rank=0, stream="to 1", name="0F0 to 1", kind="send", start_ns=1500, end_ns=1700),
        Span(rank=1, stream="compute", name="1F0", kind="forward", start_ns=1700, end_ns=3000),
    ),
)


def test_every_span_is_there_with_integer_ids() -> None:
    events = json.loads(gzip.decompress(perfetto_trace([LINE])))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"]) for event in spans] == [
        ("0F0", 0.0, 1.5),
        ("0F0 to 1", 1.5, 0.2),
        ("1F0", 1.7, 1.3),
    ]
    assert all(type(event["pid"]) is int and type(event["tid"]) is int for event in events)
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"rank 0 (simulated)", "rank 1 (simulated)", "compute", "to 1"}


def test_same_timeline_same_bytes() -> None:
    assert perfetto_trace([LINE]) == perfetto_trace([LINE])
