"""`TaskGraph`: what must happen, without times. The times stand beside it, one per op.

Meaning: every op belongs to one stream of one rank; a stream runs its ops one at a time in the
order in which the graph lists them; `deps` name ops that must have ended; ops that share a `meet`
start together, once all of them may, and each runs for its own time. An op starts as soon as
these rules allow it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from simulator.timeline import Kind, Span, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One piece of work. `id` is its place in the graph; `meet` is -1 for an op on its own."""

    id: int
    rank: int
    stream: str
    name: str
    kind: Kind
    deps: tuple[int, ...] = ()
    meet: int = -1


@dataclass(frozen=True, kw_only=True)
class TaskGraph:
    """Ops in the order of their ids.

    Raises ValueError for an id out of place and for a dependency on no op or on the op itself.
    """

    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        for place, op in enumerate(self.ops):
            if op.id != place:
                raise ValueError(f"op {op.name} has id {op.id}; it stands at place {place}")
            if any(not 0 <= dep < len(self.ops) for dep in op.deps):
                raise ValueError(f"op {op.name} depends on {op.deps}; there are {len(self.ops)}")
            if op.id in op.deps:
                raise ValueError(f"op {op.name} depends on itself")

    @cached_property
    def streams(self) -> dict[tuple[int, str], tuple[int, ...]]:
        """Op ids of each (rank, stream), in the order in which the stream runs them."""
        streams: dict[tuple[int, str], list[int]] = {}
        for op in self.ops:
            streams.setdefault((op.rank, op.stream), []).append(op.id)
        return {key: tuple(ids) for key, ids in streams.items()}

    @cached_property
    def meets(self) -> dict[int, tuple[int, ...]]:
        """Op ids of each meet."""
        meets: dict[int, list[int]] = {}
        for op in self.ops:
            if op.meet >= 0:
                meets.setdefault(op.meet, []).append(op.id)
        return {meet: tuple(ids) for meet, ids in meets.items()}

    def timeline(self, starts_ns: Sequence[int], durations_ns: Sequence[int]) -> Timeline:
        """Return the simulated timeline of ops that start at `starts_ns`; empty ops are left out.

        Spans are sorted by start, then by op id.
        """
        spans = [
            Span(
                rank=op.rank,
                stream=op.stream,
                name=op.name,
                kind=op.kind,
                start_ns=starts_ns[op.id],
                end_ns=starts_ns[op.id] + durations_ns[op.id],
            )
            for op in sorted(self.ops, key=lambda op: (starts_ns[op.id], op.id))
            if durations_ns[op.id] > 0
        ]
        return Timeline(source="simulated", spans=tuple(spans))
