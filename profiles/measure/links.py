"""Times collectives and messages between the ranks, over the backend that training uses."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from profiles.measure.collectives import (
    COLLECTIVES,
    MESSAGES,
    buffer,
    collective_call,
    own_group,
    peer,
)
from profiles.measure.ranks import nodes
from profiles.measure.timing import (
    Budget,
    Call,
    Clock,
    OnPoint,
    cuda_events,
    cuda_head_start,
    first_says,
    quantiles,
)
from profiles.profile import CollectiveSample

# 32 MiB bounds a gradient bucket of 25 MiB, the default of PyTorch's DDP.
_QUICK_SIZES = (*(1 << i for i in range(10, 25, 2)), 1 << 25)

# Two buffers of the full size, what a backend copies beside them, and as much for all others.
_BUFFERS_A_SIZE = 4

_QUICK = Budget(time_ns=18_000_000, min_samples=2, max_samples=32)
_FULL = Budget(time_ns=60_000_000, min_samples=2, max_samples=128)

# How long the sender of a message computes on a CPU; several time slices of the scheduler.
_BUSY_NS = 8_000_000
_MIN_MESSAGES = 10
# Times of messages are scattered more than others: so many budgets go into them.
_MESSAGE_BUDGETS = 3

# Calls behind one sample on CUDA: its ranks enter a collective askew, and more calls even it out.
_CUDA_RUN = 4
_CUDA_HEAD_START_NS = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPoint:
    """One collective at one size of the full buffer, in all groups of one shape at once.

    A group has `group_size` ranks that are `stride` apart.
    """

    kind: str
    group_size: int
    stride: int = 1
    size_bytes: int


class Timed(NamedTuple):
    """What was timed in one pass, and a line for each thing that was not."""

    samples: tuple[CollectiveSample, ...]
    missing: tuple[str, ...]


def group_shapes(num_ranks: int) -> tuple[tuple[int, int], ...]:
    """Return each (group_size, stride) whose groups split `num_ranks` ranks without a rest.

    >>> group_shapes(4)
    ((2, 1), (2, 2), (4, 1))
    """
    return tuple(
        (size, stride)
        for size in range(2, num_ranks + 1)
        for stride in range(1, num_ranks // size + 1)
        if num_ranks % (size * stride) == 0
    )


def link_points(num_ranks: int, quick: bool, free_bytes: int) -> list[LinkPoint]:
    """Return all points, the small ones first.

    Messages go between the ranks of pairs; neighbours are such pairs even where a rank is left
    over. Sizes that no group can share evenly are rounded up; `free_bytes`, which must be the same
    on all ranks, bounds the largest.
    """
    shapes = group_shapes(num_ranks)
    pairs = [shape for shape in shapes if shape[0] == 2]
    if num_ranks >= 2 and not pairs:
        pairs = [(2, 1)]
    return [
        LinkPoint(
            kind=kind,
            group_size=group_size,
            stride=stride,
            size_bytes=-(-size // (4 * group_size)) * 4 * group_size,
        )
        for size in link_sizes(quick, free_bytes)
        for kinds, places in ((COLLECTIVES, shapes), (MESSAGES, pairs))
        for kind in kinds
        for group_size, stride in places
    ]


def link_sizes(quick: bool, free_bytes: int) -> tuple[int, ...]:
    """Return the sizes of the full buffer: 1 KiB to 1 GiB by doublings, or fewer in a hurry.

    >>> link_sizes(True, 8 << 20)
    (1024, 4096, 16384, 65536, 262144, 1048576)
    """
    sizes = _QUICK_SIZES if quick else [1 << i for i in range(10, 31)]
    return tuple(size for size in sizes if _BUFFERS_A_SIZE * size <= free_bytes)


def free_bytes(device: torch.device) -> int:
    """Return the memory in bytes that every rank may fill; all ranks call this together."""
    if device.type == "cuda":
        own = torch.cuda.mem_get_info(device)[0]
    else:
        where = nodes(device)
        own = psutil.virtual_memory().available // where.count(where[dist.get_rank()])
    return -slowest([-own], device)[0]


def time_links(
    device: torch.device,
    points: Sequence[LinkPoint],
    quick: bool,
    clock: Clock,
    report: OnPoint,
    keep: Callable[[Sequence[CollectiveSample]], None],
) -> Timed:
    """Return one pass over `points`; every rank calls this with the same points.

    All disjoint groups of a shape run at once; the slowest rank's time counts, sample by sample.
    Sizes come one after another, small ones first, and none is begun that would not end in time:
    whatever is left out is left out of all kinds alike. `keep` is told what there is after each.
    """
    samples: list[CollectiveSample] = []
    missing: list[str] = []
    links = _Links(device, points, _QUICK if quick else _FULL)
    last_bytes, last_share, begin = 1, 0.0, clock.share
    for _, found in groupby(sorted(points, key=_size_class), key=_size_class):
        size_round = list(found)
        most_bytes = max(point.size_bytes for point in size_round)
        end_share = clock.share + last_share * most_bytes / last_bytes
        if first_says(bool(samples) and end_share >= 1.0, device):
            missing.append(f"collectives and messages from {_mib(most_bytes)} on: out of time")
            break
        if not links.reserve(most_bytes):
            missing.append(f"collectives and messages from {_mib(most_bytes)} on: out of memory")
            break
        for point in size_round:
            report(point.kind)
            if times := links.times(point):
                samples.append(_sample(point, times))
        keep(tuple(samples))
        last_bytes, last_share, begin = most_bytes, clock.share - begin, clock.share
    links.close()
    return Timed(tuple(samples), (*links.refused.values(), *missing))


def _size_class(point: LinkPoint) -> int:
    """Return what the sizes of one round have in common: some were rounded up a little."""
    return point.size_bytes.bit_length()


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.3g} MiB"


def _sample(point: LinkPoint, times: Sequence[int]) -> CollectiveSample:
    p10_ns, p50_ns, p90_ns = (max(1, time_ns) for time_ns in quantiles(times))
    return CollectiveSample(
        kind=point.kind,
        group_size=point.group_size,
        stride=point.stride,
        size_bytes=point.size_bytes,
        p10_ns=p10_ns,
        p50_ns=p50_ns,
        p90_ns=p90_ns,
        num_samples=len(times),
        num_outliers=sum(time_ns > 2 * p50_ns for time_ns in times),
        medians_ns=(p50_ns,),
    )


class _Links:
    """The groups and buffers of one pass, and what the backend refused of it."""

    def __init__(self, device: torch.device, points: Sequence[LinkPoint], budget: Budget) -> None:
        self.refused: dict[str, str] = {}
        self._device, self._budget = device, budget
        self._nodes = nodes(device)
        shapes = sorted({(point.group_size, point.stride) for point in points})
        self._groups: Mapping[tuple[int, int], dist.ProcessGroup | None] = {
            shape: own_group(*shape) for shape in shapes
        }
        self._full = self._other = torch.empty(0)

    def reserve(self, size_bytes: int) -> bool:
        """Make the buffers at least so large; return whether every rank could."""
        if 4 * len(self._full) >= size_bytes:
            return True
        self._full = self._other = torch.empty(0)
        is_made = True
        try:
            self._full, self._other = (buffer(size_bytes, self._device) for _ in range(2))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and (
                "memory" not in str(error)
            ):
                raise
            is_made = False
        return -slowest([-int(is_made)], self._device)[0] == 1

    def times(self, point: LinkPoint) -> list[int]:
        """Return times in ns on the slowest rank, none if the backend refuses the kind."""
        if point.kind in self.refused:
            return []
        group = self._groups[point.group_size, point.stride]
        try:
            full, other = (b[: point.size_bytes // 4] for b in (self._full, self._other))
            if point.kind == "send_recv" and not self._needs_both_ways(point):
                return _message_times(full, group, self._budget)
            call = collective_call(point.kind, group, full, other)
            times = _times(call, self._device, self._budget)
        except (RuntimeError, NotImplementedError) as error:
            if not any(word in str(error).lower() for word in ("support", "implement")):
                raise
            reason = str(error).splitlines()[0]
            self.refused[point.kind] = f"{point.kind}: {dist.get_backend()} refuses it: {reason}"
            return []
        return [t // 2 for t in times] if point.kind == "send_recv" else times

    def _needs_both_ways(self, point: LinkPoint) -> bool:
        """Return whether half a round trip must stand for a message: no clock for both ends."""
        where = self._nodes
        block = 2 * point.stride
        return self._device.type == "cuda" or any(
            where[rank] != where[rank + point.stride]
            for rank in range(len(where) - point.stride)
            if rank % block < point.stride
        )

    def close(self) -> None:
        """Give the groups back."""
        for group in self._groups.values():
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def _message_times(message: Tensor, group: dist.ProcessGroup | None, budget: Budget) -> list[int]:
    """Return one-way times in ns of messages of a pair whose sender goes on computing.

    So it is in a pipeline, and on a CPU it matters: the message is moved by a thread that must get
    a core from the computation. The ranks of one host share the clock; the slowest pair counts.
    """
    # As long as a small forward, and long enough for the message to arrive.
    busy_ns = _BUSY_NS + 4 * len(message)
    least = _MIN_MESSAGES if busy_ns < 4 * _BUSY_NS else budget.min_samples
    num_messages = min(max(least, _MESSAGE_BUDGETS * budget.time_ns // busy_ns), budget.max_samples)
    stamps = torch.zeros(num_messages, dtype=torch.int64)
    if group is not None:
        weights = torch.randn(128, 128)
        partner, is_first = peer(group)
        for i in range(-1, num_messages):
            is_sender = is_first == (i % 2 == 0)
            request = dist.P2POp(dist.isend if is_sender else dist.irecv, message, partner, group)
            dist.barrier(group)
            begin = time.perf_counter_ns()
            works = dist.batch_isend_irecv([request])
            while is_sender and time.perf_counter_ns() - begin < busy_ns:
                torch.mm(weights, weights)
            for work in works:
                work.wait()
            if i >= 0:
                stamps[i] = -begin if is_sender else time.perf_counter_ns()
        dist.all_reduce(stamps, group=group)
    return slowest(stamps.tolist(), torch.device("cpu"))


def _times(call: Call, device: torch.device, budget: Budget) -> list[int]:
    """Return times in ns of one call, on the slowest rank.

    The first call warms up. All ranks make the same number of calls: they agree, after twice as
    many each time, on whether the budget is spent.
    """
    dist.barrier()
    _run_ns(call, device)
    calls_each, ahead_ns = (_CUDA_RUN, _CUDA_HEAD_START_NS) if device.type == "cuda" else (1, 0)
    times: list[int] = []
    spent_ns = 0
    while len(times) < budget.min_samples or (
        spent_ns < budget.time_ns and len(times) < budget.max_samples
    ):
        block = max(budget.min_samples, min(len(times), budget.max_samples - len(times)))
        found = slowest([_run_ns(call, device) for _ in range(block)], device)
        spent_ns += calls_each * sum(found) + ahead_ns * block
        times += found
    return times


def _run_ns(call: Call, device: torch.device) -> int:
    """Return the time of one call; on CUDA the mean of a few, enqueued ahead of the device."""
    if device.type == "cuda":
        start, end = cuda_events(2)
        cuda_head_start()
        start.record()
        for _ in range(_CUDA_RUN):
            call()
        end.record()
        end.synchronize()
        total_ns: int = round(1e6 * start.elapsed_time(end))
        return total_ns // _CUDA_RUN
    begin = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - begin


def slowest(times: Sequence[int], device: torch.device) -> list[int]:
    """Return the largest of all ranks' times, place by place."""
    vector = torch.tensor(times, dtype=torch.int64, device=device)
    dist.all_reduce(vector, dist.ReduceOp.MAX)
    largest: list[int] = vector.tolist()
    return largest
