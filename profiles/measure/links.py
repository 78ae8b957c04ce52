"""Times collectives and messages between the ranks, over the backend that training uses."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from profiles.measure.timing import Budget, Call, cuda_events, cuda_head_start, quantiles
from profiles.profile import CollectiveSample

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "send_recv")

# How long the sender of a message computes on a CPU; several time slices of the scheduler.
_BUSY_NS = 8_000_000

# Calls behind one sample on CUDA: its ranks enter a collective askew, and more calls even it out.
_CUDA_RUN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPoint:
    """One collective in groups of `group_size` at one size of the full buffer."""

    kind: str
    group_size: int
    size_bytes: int


def group_sizes(num_ranks: int) -> tuple[int, ...]:
    """Return the group sizes above 1 that divide `num_ranks`.

    >>> group_sizes(4)
    (2, 4)
    """
    return tuple(size for size in range(2, num_ranks + 1) if num_ranks % size == 0)


def link_points(num_ranks: int, sizes: Sequence[int]) -> list[LinkPoint]:
    """Return all points; messages go between the neighbours of pairs, so they need two ranks."""
    points = [
        LinkPoint(kind=kind, group_size=group_size, size_bytes=size)
        for kind in KINDS[:-1]
        for group_size in group_sizes(num_ranks)
        for size in sizes
        if size % (4 * group_size) == 0
    ]
    if num_ranks >= 2:
        points += [LinkPoint(kind="send_recv", group_size=2, size_bytes=size) for size in sizes]
    return points


class LinkTimer:
    """Collects times of `points` pass by pass; every rank has the same points.

    All disjoint groups of a size run at once; the slowest rank's time counts, sample by sample.
    A kind that the backend refuses is left out.
    """

    def __init__(self, points: Sequence[LinkPoint], device: torch.device, budget: Budget) -> None:
        self._times: dict[LinkPoint, list[int]] = {point: [] for point in points}
        self._device, self._budget = device, budget
        self._refused: set[str] = set()
        self._groups = {size: _own_group(size) for size in sorted({p.group_size for p in points})}

    def run_pass(self, on_point: Callable[[str], None]) -> None:
        """Time every point once more; `on_point` is told what comes next."""
        for point, times in self._times.items():
            on_point(point.kind)
            if point.kind in self._refused:
                continue
            group = self._groups[point.group_size]
            try:
                if point.kind == "send_recv" and self._device.type == "cpu":
                    times += _message_times(point.size_bytes, group, self._budget)
                else:
                    times += _times(_call(point, group, self._device), self._device, self._budget)
            except (RuntimeError, NotImplementedError) as error:
                if not any(word in str(error).lower() for word in ("support", "implement")):
                    raise
                self._refused.add(point.kind)

    def samples(self) -> list[CollectiveSample]:
        """Return what was found, the same on all ranks; on CUDA a message is half a round trip."""
        found = []
        for point, times in self._times.items():
            if point.kind in self._refused:
                continue
            halves = 2 if point.kind == "send_recv" and self._device.type == "cuda" else 1
            p10_ns, p50_ns, p90_ns = (max(1, t // halves) for t in quantiles(times))
            found.append(
                CollectiveSample(
                    kind=point.kind,
                    group_size=point.group_size,
                    size_bytes=point.size_bytes,
                    p10_ns=p10_ns,
                    p50_ns=p50_ns,
                    p90_ns=p90_ns,
                    num_samples=len(times),
                )
            )
        return found


def _own_group(size: int) -> dist.ProcessGroup | None:
    """Return this rank's group of `size` consecutive ranks, None for a rank left over."""
    own, num_ranks = None, dist.get_world_size()
    for first in range(0, num_ranks - size + 1, size):
        members = list(range(first, first + size))
        group = dist.new_group(members)
        if dist.get_rank() in members:
            own = group
    return own


def _call(point: LinkPoint, group: dist.ProcessGroup | None, device: torch.device) -> Call:
    """Return this rank's part in one collective (for `send_recv`: there and back)."""
    full = torch.randn(point.size_bytes // 4, device=device)
    if group is None:
        return lambda: None
    if point.kind == "send_recv":
        return ping_pong(full, group)
    if point.kind == "all_reduce":
        full.zero_()
        return lambda: dist.all_reduce(full, group=group)
    part = torch.randn(len(full) // point.group_size, device=device)
    if point.kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(full, part, group=group)
    return lambda: dist.reduce_scatter_tensor(part, full, group=group)


def _message_times(size_bytes: int, group: dist.ProcessGroup | None, budget: Budget) -> list[int]:
    """Return one-way times in ns of messages of a pair whose sender goes on computing.

    So it is in a pipeline, and on a CPU it matters: the message is moved by a thread that must get
    a core from the computation. The ranks of one host share the clock; the slowest pair counts.
    """
    count = min(max(8, budget.time_ns // _BUSY_NS), budget.max_samples)
    stamps = torch.zeros(count, dtype=torch.int64)
    if group is not None:
        message, weights = torch.randn(size_bytes // 4), torch.randn(128, 128)
        # As long as a small forward, and long enough for the message to arrive.
        busy_ns = _BUSY_NS + size_bytes
        rank = dist.get_rank()
        for i in range(-1, count):
            is_sender = rank % 2 == i % 2
            request = dist.P2POp(dist.isend if is_sender else dist.irecv, message, rank ^ 1, group)
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
    return _slowest(stamps.tolist(), torch.device("cpu"))


def ping_pong(message: Tensor, group: dist.ProcessGroup) -> Call:
    """Return the call in which one of a pair sends and then receives, the other the reverse."""
    rank = dist.get_rank()
    peer = rank ^ 1
    operations = (dist.isend, dist.irecv) if rank < peer else (dist.irecv, dist.isend)

    def call() -> None:
        for operation in operations:
            request = dist.P2POp(operation, message, peer, group=group)
            for work in dist.batch_isend_irecv([request]):
                work.wait()

    return call


def _times(call: Call, device: torch.device, budget: Budget) -> list[int]:
    """Return times in ns of one call, on the slowest rank.

    All ranks make the same number of calls: they agree on it after two calls to warm up.
    """
    dist.barrier()
    call()
    warm_ns = _slowest([_run_ns(call, device)], device)[0]
    count = budget.time_ns // max(1, warm_ns)
    count = min(max(count, budget.min_samples), budget.max_samples)
    return _slowest([_run_ns(call, device) for _ in range(count)], device)


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


def _slowest(times: Sequence[int], device: torch.device) -> list[int]:
    """Return the largest of all ranks' times, place by place."""
    vector = torch.tensor(times, dtype=torch.int64, device=device)
    dist.all_reduce(vector, dist.ReduceOp.MAX)
    slowest: list[int] = vector.tolist()
    return slowest
