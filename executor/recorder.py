"""What one rank did and when: marks on the host's clock or the GPU's stream, step by step."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, get_args

import torch

from simulator.schedule import Action
from simulator.timeline import Kind, Span

KINDS: tuple[Kind, ...] = get_args(Kind)

Mark = int | torch.cuda.Event
"""A moment: nanoseconds of the host's monotonic clock, or an event on the current CUDA stream."""


_Marked = tuple[Kind, Action | None, Mark, Mark]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One piece of work, if part of the schedule with its action; in ns from the step's start."""

    kind: Kind
    action: Action | None
    start_ns: int
    end_ns: int

    def span(self, rank: int, offset_ns: int) -> Span:
        """Return the piece as a span of `rank`, moved by `offset_ns`."""
        return Span(
            rank=rank,
            stream="compute",
            name=str(self.action or self.kind),
            kind=self.kind,
            start_ns=self.start_ns + offset_ns,
            end_ns=self.end_ns + offset_ns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """The pieces of one step; `start_ns` is on the clock that all ranks of one host share."""

    start_ns: int
    step_ns: int
    pieces: tuple[Piece, ...]

    def kind_ns(self) -> dict[Kind, int]:
        """Return the time by kind of span; every kind is there."""
        total = dict.fromkeys(KINDS, 0)
        for piece in self.pieces:
            total[piece.kind] += piece.end_ns - piece.start_ns
        return total


class Recorder:
    """Collects marks; `begin` starts a step, `end` closes it, `trace` gives its times.

    On CUDA the marks are events, which cost a host about a microsecond and no synchronisation;
    `trace` waits for the last of them and is therefore called one step late. Elsewhere they are
    read off `clock`, which need not tell the time: a capture counts ops.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        self._is_cuda, self._clock = device.type == "cuda", clock
        self._start: Mark = 0
        self._host_ns = 0
        self._pieces: list[_Marked] = []
        self._done: tuple[int, Mark, Mark, list[_Marked]] | None = None

    def mark(self) -> Mark:
        """Return this moment."""
        if not self._is_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, kind: Kind, start: Mark, action: Action | None = None) -> None:
        """Note a piece of work that began at `start` and has ended now."""
        self._pieces.append((kind, action, start, self.mark()))

    def extend(self) -> None:
        """Let the last piece end now."""
        kind, action, start, _ = self._pieces[-1]
        self._pieces[-1] = (kind, action, start, self.mark())

    def begin(self) -> None:
        """Start the clock of a step that follows on nothing: the first, or one after a barrier."""
        self._start, self._host_ns = self.mark(), time.perf_counter_ns()

    def end(self) -> None:
        """End the step; the next one starts at the same moment."""
        end = self.mark()
        self._done = (self._host_ns, self._start, end, self._pieces)
        self._start, self._host_ns, self._pieces = end, time.perf_counter_ns(), []

    def trace(self) -> StepTrace:
        """Return the times of the last step that has ended."""
        assert self._done is not None
        host_ns, start, end, pieces = self._done
        if isinstance(end, torch.cuda.Event):
            end.synchronize()
        return StepTrace(
            start_ns=host_ns,
            step_ns=_between_ns(start, end),
            pieces=tuple(
                Piece(
                    kind=kind,
                    action=action,
                    start_ns=_between_ns(start, first),
                    end_ns=_between_ns(start, last),
                )
                for kind, action, first, last in pieces
            ),
        )


def _between_ns(start: Mark, end: Mark) -> int:
    if isinstance(start, int):
        return cast(int, end) - start
    milliseconds: float = start.elapsed_time(cast(torch.cuda.Event, end))
    return round(1e6 * milliseconds)
