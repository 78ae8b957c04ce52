"""Timing of calls: warm up, rotate over buffer sets, stop at a time budget; quantiles in ns.

Outliers stay in the quantiles: what disturbs a measurement disturbs a training step as well.
"""

import itertools
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
import torch.distributed as dist

Call = Callable[[], object]
OnPoint = Callable[[str], None]

# In clock cycles; long enough for the host to enqueue a batch of samples.
_CUDA_HEAD_START_CYCLES = 4_000_000
_CUDA_BATCH = 10

# About 60 microseconds, and within the L2 of a core.
_YARDSTICK_WIDTH, _YARDSTICK_RUNS, _YARDSTICK_EVERY_NS = 128, 3, 1_000_000

_MAX_WARM_UPS = 8
_SETTLED = 0.05
# A call that took more than this times the median of its pass was disturbed.
_OUTLYING = 2


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

    def is_over(self, at_share: float = 1.0) -> bool:
        """Return whether `at_share` of the first rank's time is up; all ranks must ask together."""
        return first_says(self.share >= at_share, self._device)


def first_says(claim: bool, device: torch.device) -> bool:
    """Return what the first rank claims; all ranks must ask together, whatever they claim."""
    answer = torch.tensor([claim], dtype=torch.int64, device=device)
    dist.broadcast(answer, 0)
    return bool(answer.item())


class Yardstick:
    """A product that is always the same: it tells how fast a CPU is while something is timed.

    A core that is shared, by hyper-threads or by virtual machines, goes at one of several speeds
    for tenths of a second: longer than a kernel is timed, and shorter than a step of training,
    which sees their mean. Divided by what the yardstick took beside it, a time is free of that.
    """

    def __init__(self) -> None:
        self._operands = torch.randn(2, _YARDSTICK_WIDTH, _YARDSTICK_WIDTH)
        self._seen: list[int] = []

    def measure(self) -> None:
        """Note the speed of this moment: the least of a few, as the first finds caches cold."""
        left, right = self._operands
        times = []
        for _ in range(_YARDSTICK_RUNS):
            begin = time.perf_counter_ns()
            left @ right
            times.append(time.perf_counter_ns() - begin)
        self._seen.append(min(times))

    def read_ns(self) -> float:
        """Return the median of what was noted since this was last asked, 1 if nothing was."""
        seen, self._seen = self._seen, []
        return float(median(seen)) if seen else 1.0


def time_calls(
    calls: Sequence[Call], device: torch.device, budget: Budget, yardstick: Yardstick | None = None
) -> list[int]:
    """Return the time in ns of single calls, taken from `calls` in rotation.

    On CUDA the times are those of the device, without the launch: the host runs ahead. On a CPU
    the `yardstick` measures between calls, once a millisecond.
    """
    rotation = itertools.cycle(calls)
    warm_ns = _warm_up(rotation, device, budget)
    if device.type == "cuda":
        return _time_cuda(rotation, budget, warm_ns)
    clock = time.perf_counter_ns
    samples: list[int] = []
    begin = clock()
    deadline, next_measure = begin + budget.time_ns, begin
    while True:
        call = next(rotation)
        if yardstick is not None and clock() >= next_measure:
            yardstick.measure()
            next_measure = clock() + _YARDSTICK_EVERY_NS
        start = clock()
        call()
        end = clock()
        samples.append(end - start)
        enough = len(samples) >= budget.min_samples and end >= deadline
        if enough or len(samples) >= budget.max_samples:
            if yardstick is not None:
                yardstick.measure()
            return samples


def _warm_up(rotation: "itertools.cycle[Call]", device: torch.device, budget: Budget) -> int:
    """Call until two times in a row are within 5 %, at most 8 times, or for the budget's time.

    Return the last time in ns.
    """
    begin, previous_ns = time.perf_counter_ns(), 0
    for _ in range(_MAX_WARM_UPS):
        took_ns = _host_ns(next(rotation), device)
        is_settled = abs(took_ns - previous_ns) <= _SETTLED * previous_ns
        previous_ns = took_ns
        if is_settled or time.perf_counter_ns() - begin > budget.time_ns:
            break
    return previous_ns


def _host_ns(call: Call, device: torch.device) -> int:
    """Return the time of a call as the host sees it, to its end on the device."""
    begin = time.perf_counter_ns()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter_ns() - begin


def _time_cuda(rotation: "itertools.cycle[Call]", budget: Budget, warm_ns: int) -> list[int]:
    """Return times in batches that the host runs ahead of, short ones if calls are long."""
    most = min(_CUDA_BATCH, max(budget.min_samples, budget.time_ns // max(1, warm_ns)))
    samples: list[int] = []
    deadline = time.perf_counter_ns() + budget.time_ns
    while len(samples) < budget.max_samples:
        batch = min(most, budget.max_samples - len(samples))
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


def num_outliers(samples: Sequence[int]) -> int:
    """Return how many of `samples` are over twice their median.

    >>> num_outliers([10, 11, 12, 25]), num_outliers([10, 10, 20]), num_outliers([])
    (1, 0, 0)
    """
    middle = median(samples) if samples else 0.0
    return sum(sample > _OUTLYING * middle for sample in samples)


def seen_mhz(device: torch.device) -> int:
    """Return the clock of `device` at this moment in MHz, 0 where nothing tells it.

    Of a GPU that of its multiprocessors, from `nvidia-smi`; of a CPU the mean over its cores.
    """
    if device.type == "cuda":
        return _gpu_mhz(str(torch.cuda.get_device_properties(device).uuid))
    return cpu_mhz(Path("/"))


def _gpu_mhz(uuid: str) -> int:
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    query = ["--query-gpu=clocks.sm", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    try:
        found = subprocess.run(
            [program, *query], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    text = found.stdout.strip()
    return int(text) if found.returncode == 0 and text.isdigit() else 0


def cpu_mhz(root: Path) -> int:
    """Return the mean clock of all cores as Linux tells it below `root`, 0 where it does not."""
    files = root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    try:
        found = [int(file.read_text(encoding="ascii")) / 1000 for file in sorted(files)]
        if not found:
            lines = (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            found = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return 0
    return round(mean(found)) if found else 0
