"""Times given kernels on all ranks at once, and makes one sample of what all ranks found.

All ranks run the same op at the same time: on shared cores and memory, contention is part of the
truth. What becomes of the speed of a shared CPU meanwhile is not (`timing.Yardstick`).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import final

import torch
import torch.distributed as dist

from profiles.measure.buffers import TORCH_DTYPES, Arena, buffer_sets
from profiles.measure.links import free_bytes, slowest
from profiles.measure.ops import builder, refusal, selected, variants
from profiles.measure.shapes import Limits, flop, moved_elements
from profiles.measure.timing import (
    Budget,
    Clock,
    OnPoint,
    Yardstick,
    num_outliers,
    quantiles,
    time_calls,
)
from profiles.profile import KernelSample
from profiles.surface import Shape

# On a CPU, where other work comes and goes, a point is timed in several bursts, with all points of
# its round between them: one that was disturbed is not the median of three.
_BURSTS = {"cpu": 3, "cuda": 1}

# Of the yardstick's times one part in so many is cut off at both ends before their mean is taken.
_TRIMMED = 10

# What tells how fast a device is, before it is known which shapes it can do in time.
_PROBES: Mapping[str, tuple[Shape, Shape]] = {
    "cpu": ((256, 256, 256), (1 << 22,)),
    "cuda": ((4096, 4096, 4096), (1 << 26,)),
}
# Most elements that an arena takes of a device's free memory, one part in so many.
_ARENA_PART = 16

Keep = Callable[[Sequence[KernelSample]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPoint:
    """One variant of one op at one shape and dtype."""

    op: str
    dtype: str
    shape: Shape
    variant: str = ""

    def __str__(self) -> str:
        """Return the point as a message names it."""
        return " ".join(filter(None, (self.op, self.dtype, self.variant, str(self.shape))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """The samples of one pass; `missing` says what was to be measured and is not here, and why."""

    samples: tuple[KernelSample, ...]
    missing: tuple[str, ...]


@final
class Sweep:
    """Times points on all ranks together; every rank makes the same calls of it."""

    def __init__(
        self, device: torch.device, budget: Budget, clock: Clock, report: OnPoint, keep: Keep
    ) -> None:
        self.device, self.budget, self.is_over = device, budget, False
        self._bursts: dict[KernelPoint, list[Row]] = {}
        self._found: dict[KernelPoint, _Found] = {}
        self.samples: dict[KernelPoint, KernelSample] = {}
        self.failed: dict[KernelPoint, str] = {}
        self._yardstick = Yardstick() if device.type == "cpu" else None
        self._clock, self._report, self._keep = clock, report, keep
        self._free_bytes = free_bytes(device)
        self._arenas: dict[str, Arena] = {}
        self._refused: list[str] = []

    def can_run(self, op: str, dtype: str, variant: str = "") -> bool:
        """Return whether this device can run a variant at all; if not, it is missing."""
        known = variant in variants(op, self.device.type)
        reason = refusal(variant, dtype, self.device) if known else "this device has no such kernel"
        if reason:
            self._refused.append(" ".join(filter(None, (op, dtype, variant))) + f": {reason}")
        return not reason

    def limits(self, dtype: str, longest_ns: int) -> Limits:
        """Return what bounds shapes of `dtype` here, by a product and a copy on the slowest rank.

        fp8 is copied as bf16 is: nothing but products is measured of it.
        """
        product, copy = _PROBES[self.device.type]
        took = [self._probe_ns("linear_forward", dtype, product)]
        took.append(self._probe_ns("copy", "bf16" if dtype == "fp8" else dtype, copy))
        product_ns, copy_ns = slowest(took, self.device)
        copy_bytes = moved_elements("copy", copy) * TORCH_DTYPES[dtype].itemsize
        return Limits(
            flop_per_s=1e9 * flop("linear_forward", product) / product_ns,
            bytes_per_s=1e9 * copy_bytes / copy_ns,
            longest_ns=longest_ns,
            memory_bytes=self._free_bytes,
        )

    def _probe_ns(self, op: str, dtype: str, shape: Shape) -> int:
        calls = buffer_sets(builder(op), self._arena(dtype), shape)
        return min(time_calls(calls, self.device, Budget(time_ns=0, min_samples=2, max_samples=2)))

    def run(self, points: Sequence[KernelPoint], until: float = 1.0) -> None:
        """Time `points`, as far as the clock's share `until` allows, and keep what is found.

        Points that were timed before are surer afterwards: the bursts of all runs count.
        """
        timed: dict[KernelPoint, None] = {}
        for point in [*points] * _BURSTS[self.device.type]:
            if self._clock.is_over(until):
                self.is_over = self._clock.is_over()
                break
            self._report(point.op)
            times = self._times(point)
            self._bursts.setdefault(point, []).append(_row(times, self._speed_ns()))
            timed[point] = None
        rows = [_middle(self._bursts[point]) for point in timed]
        for point, found in zip(timed, _gathered(rows, self.device), strict=True):
            if found is None:
                self.failed.setdefault(point, "it did not run on another rank")
            else:
                self._found[point] = found
        if timed:
            self._settle()
        self._keep(tuple(self.samples.values()))

    def _speed_ns(self) -> float:
        return self._yardstick.read_ns() if self._yardstick else 1.0

    def _settle(self) -> None:
        """Make samples of all that was found, at the mean speed of the machine so far."""
        speeds = sorted(found.speed_ns for found in self._found.values())
        cut = len(speeds) // _TRIMMED
        speed_ns = mean(speeds[cut : len(speeds) - cut]) if speeds else 1.0
        self.samples = {
            point: found.sample(point, speed_ns) for point, found in self._found.items()
        }

    def _times(self, point: KernelPoint) -> list[int]:
        dist.barrier()
        try:
            with selected(point.variant):
                build = builder(point.op, point.variant)
                calls = buffer_sets(build, self._arena(point.dtype), point.shape)
                return time_calls(calls, self.device, self.budget, self._yardstick)
        except (RuntimeError, MemoryError) as error:
            # After a fault of the device itself nothing that it says is to be trusted.
            if isinstance(error, torch.AcceleratorError):
                raise
            self.failed[point] = _reason(error)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return []

    def _arena(self, dtype: str) -> Arena:
        if dtype not in self._arenas:
            most = self._free_bytes // _ARENA_PART // TORCH_DTYPES[dtype].itemsize
            self._arenas[dtype] = Arena(self.device, TORCH_DTYPES[dtype], most)
        return self._arenas[dtype]

    def finished(self, asked: Sequence[KernelPoint]) -> Exploration:
        """Return all samples, and what of `asked` is missing: what failed, and what had no time."""
        missing = [*self._refused, *(f"{point}: {why}" for point, why in self.failed.items())]
        left = Counter(
            " ".join(filter(None, (point.op, point.dtype, point.variant)))
            for point in asked
            if point not in self.samples and point not in self.failed
        )
        if left:
            names = ", ".join(f"{name} ({count})" for name, count in sorted(left.items()))
            missing.append(f"{left.total()} shapes, the time was over: {names}")
        return Exploration(samples=tuple(self.samples.values()), missing=tuple(missing))


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text:
        return "out of memory"
    return text.splitlines()[0][:200] if text else type(error).__name__


def merged(times: Mapping[KernelPoint, list[int]], device: torch.device) -> list[KernelSample]:
    """Return the samples of one pass, the same on all ranks, without points that failed on any.

    A sample's quantiles are the means of the ranks' quantiles; it has as many calls as the rank
    with the fewest, and as many outliers as the one with the most.
    """
    found = _gathered([_row(taken, 1.0) for taken in times.values()], device)
    return [each.sample(point, 1.0) for point, each in zip(times, found, strict=True) if each]


# Quantiles over the yardstick, calls, outliers, and the yardstick in ns; zeros if it failed.
Row = tuple[float, float, float, float, float, float]


def _middle(bursts: Sequence[Row]) -> Row:
    """Return one row for all bursts of a point: the medians, and calls and outliers in all."""
    if not all(burst[3] for burst in bursts):
        return _row([], 1.0)
    p10, p50, p90, _, _, speed_ns = (median(column) for column in zip(*bursts, strict=True))
    num_calls, num_outlying = (sum(burst[i] for burst in bursts) for i in (3, 4))
    return p10, p50, p90, num_calls, num_outlying, speed_ns


def _row(times: Sequence[int], yardstick_ns: float) -> Row:
    if not times:
        return (0.0,) * 6
    p10, p50, p90 = (time_ns / yardstick_ns for time_ns in quantiles(times))
    return p10, p50, p90, len(times), num_outliers(times), yardstick_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What all ranks found at one point: quantiles over their yardsticks, and those in ns."""

    quantiles: tuple[float, float, float]
    num_samples: int
    num_outliers: int
    speed_ns: float

    def sample(self, point: KernelPoint, speed_ns: float) -> KernelSample:
        """Return the times that this takes where the yardstick takes `speed_ns`."""
        p10_ns, p50_ns, p90_ns = (max(1, round(time * speed_ns)) for time in self.quantiles)
        return KernelSample(
            op=point.op,
            dtype=point.dtype,
            shape=point.shape,
            variant=point.variant,
            p10_ns=p10_ns,
            p50_ns=p50_ns,
            p90_ns=p90_ns,
            num_samples=self.num_samples,
            num_outliers=self.num_outliers,
            medians_ns=(p50_ns,),
        )


def _gathered(rows: Sequence[Row], device: torch.device) -> list[_Found | None]:
    """Return what the ranks found together, None where one of them has no times."""
    if not rows:
        return []
    total = torch.tensor(rows, dtype=torch.float64, device=device)
    fewest, most = total[:, 3].clone(), total[:, 4].clone()
    dist.all_reduce(total)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    means = (total / dist.get_world_size()).tolist()
    return [
        _Found(
            quantiles=(p10, p50, p90),
            num_samples=round(few),
            num_outliers=min(round(many), round(few)),
            speed_ns=speed_ns,
        )
        if few
        else None
        for (p10, p50, p90, _, _, speed_ns), few, many in zip(
            means, fewest.tolist(), most.tolist(), strict=True
        )
    ]
