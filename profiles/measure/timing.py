"""Timing of calls: warm up, rotate over buffer sets, stop at a time budget; quantiles in ns."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

Call = Callable[[], object]
OnPoint = Callable[[str], None]

# In clock cycles; long enough for the host to enqueue a batch of samples.
_CUDA_HEAD_START_CYCLES = 4_000_000
_CUDA_BATCH = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long one point is timed: `time_ns`, yet at least and at most so many samples."""

    time_ns: int
    min_samples: int
    max_samples: int


class Clock:
    """The time that some part of a measurement has; all ranks ask it together.

    Ranks that looked at clocks of their own would part ways: the first rank decides for all.
    """

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._device, self._begin_ns = device, time.perf_counter_ns()
        self._duration_ns = round(1e9 * seconds)

    @property
    def share(self) -> float:
        """The share of the time that has passed on this rank, 1 at most."""
        return min(1.0, (time.perf_counter_ns() - self._begin_ns) / max(1, self._duration_ns))

    def is_over(self) -> bool:
        """Return whether the first rank's time is up; every rank must ask the same times."""
        answer = torch.tensor([self.share >= 1.0], dtype=torch.int64, device=self._device)
        dist.broadcast(answer, 0)
        return bool(answer.item())


def time_calls(calls: Sequence[Call], device: torch.device, budget: Budget) -> list[int]:
    """Return the time in ns of single calls, taken from `calls` in rotation.

    On CUDA the times are those of the device, without the launch: the host runs ahead.
    """
    rotation = itertools.cycle(calls)
    if device.type == "cuda":
        return _time_cuda(rotation, budget)
    _warm_up(rotation, budget)
    clock = time.perf_counter_ns
    samples: list[int] = []
    deadline = clock() + budget.time_ns
    while True:
        call = next(rotation)
        start = clock()
        call()
        end = clock()
        samples.append(end - start)
        enough = len(samples) >= budget.min_samples and end >= deadline
        if enough or len(samples) >= budget.max_samples:
            return samples


def _warm_up(rotation: "itertools.cycle[Call]", budget: Budget) -> None:
    """Call until two times in a row are within 20 %, at most 5 times."""
    clock = time.perf_counter_ns
    begin, previous_ns = clock(), math.inf
    for _ in range(5):
        start = clock()
        next(rotation)()
        end = clock()
        if abs(end - start - previous_ns) < 0.2 * previous_ns or end - begin > budget.time_ns:
            return
        previous_ns = end - start


def _time_cuda(rotation: "itertools.cycle[Call]", budget: Budget) -> list[int]:
    for _ in range(3):
        next(rotation)()
    torch.cuda.synchronize()
    samples: list[int] = []
    deadline = time.perf_counter_ns() + budget.time_ns
    while len(samples) < budget.max_samples:
        batch = min(_CUDA_BATCH, budget.max_samples - len(samples))
        starts, ends = cuda_events(batch), cuda_events(batch)
        cuda_head_start()
        for start, end in zip(starts, ends, strict=True):
            start.record()
            next(rotation)()
            end.record()
        torch.cuda.synchronize()
        samples += [
            round(1e6 * start.elapsed_time(end)) for start, end in zip(starts, ends, strict=True)
        ]
        if len(samples) >= budget.min_samples and time.perf_counter_ns() >= deadline:
            break
    return samples


def cuda_events(count: int) -> list[torch.cuda.Event]:
    """Return `count` CUDA events that keep the time."""
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]


def cuda_head_start() -> None:
    """Keep the device busy for about two milliseconds, while the host enqueues what is timed."""
    torch.cuda._sleep(_CUDA_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]


def quantiles(samples: Sequence[int]) -> tuple[int, int, int]:
    """Return the 10th, 50th and 90th percentile of `samples`, linear between ranks.

    >>> quantiles([10, 20, 30, 40, 50])
    (14, 30, 46)
    """
    ordered = sorted(samples)

    def at(fraction: float) -> int:
        place = fraction * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return round(ordered[low] + (place - low) * (ordered[high] - ordered[low]))

    return at(0.1), at(0.5), at(0.9)
