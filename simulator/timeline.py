"""`Timeline`: what ran where and when, simulated or measured; both sides of every comparison."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "forward", "backward", "send", "all_reduce", "optimizer", "data", "other", "wait",
    "all_gather", "reduce_scatter", "all_to_all", "push", "pull",
]  # fmt: skip
"""What a span spends its time on; the same words for simulated and measured ones.

`send` is a message of a pipeline, `push` and `pull` go to and from a parameter server, `other` is
work of the host.

`wait` is simulated only: what is expected to pass until the slowest of equal ranks is done. A
measured wait is a gap.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One piece of work on one stream of one rank; times in ns from the start of the step."""

    rank: int
    stream: str
    name: str
    kind: Kind
    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        """Length of the span."""
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The spans of one step, in order of start, and the peak memory of each rank in bytes.

    >>> a = Span(rank=0, stream="compute", name="0F0", kind="forward", start_ns=0, end_ns=5)
    >>> line = Timeline(source="simulated", spans=(a,))
    >>> line.makespan_ns, line.busy_ns(0)
    (5, {'forward': 5})
    """

    source: Literal["simulated", "measured"]
    spans: tuple[Span, ...]
    peak_bytes: Mapping[int, int] = field(default_factory=dict)

    @property
    def makespan_ns(self) -> int:
        """The end of the last span."""
        return max((span.end_ns for span in self.spans), default=0)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that appear, sorted."""
        return tuple(sorted({span.rank for span in self.spans}))

    def busy_ns(self, rank: int) -> dict[str, int]:
        """Return the time of `rank` by kind, in the order of first use; overlaps count twice."""
        busy: dict[str, int] = {}
        for span in self.spans:
            if span.rank == rank:
                busy[span.kind] = busy.get(span.kind, 0) + span.duration_ns
        return busy
