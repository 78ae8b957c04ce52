"""Times a kernel and a collective at once: how much each slows the other down.

In training they run side by side: gradients are reduced while the backward goes on. On a GPU they
share the memory and the multiprocessors, on a CPU the threads that move the bytes take cores from
the computation.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from statistics import fmean, median

import torch
import torch.distributed as dist
from torch.nn import functional as F  # noqa: N812

from profiles.measure.collectives import buffer, collective_call, own_group
from profiles.measure.timing import Call, Clock, OnPoint, cuda_events, cuda_head_start
from profiles.profile import Interference
from profiles.surface import Shape

Span = tuple[float, float]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# One kernel bound by compute, of a size as in training, and one bound by memory.
_KERNELS: Mapping[str, tuple[tuple[str, Shape], ...]] = {
    "cpu": (("linear_forward", (512, 256, 256)), ("add_forward", (1 << 20,))),
    "cuda": (("linear_forward", (4096, 4096, 4096)), ("add_forward", (1 << 26,))),
}
# A bucket of gradients, a message between stages, and a smaller all-reduce, by importance.
_LINKS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "cpu": (("all_reduce", 4 << 20), ("send_recv", 1 << 20), ("all_reduce", 256 << 10)),
    "cuda": (("all_reduce", 64 << 20), ("send_recv", 16 << 20), ("all_reduce", 4 << 20)),
}
_MAX_ROUNDS = 7
_WINDOW_NS = {"cpu": 25_000_000, "cuda": 10_000_000}
_LEAST_CALLS = 4
# On a GPU nothing tells when the other side is done; kernels are enqueued for so many windows.
_CUDA_MARGIN = 3
_NUM_SETS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """When the calls of each side began and ended, in ns on one clock."""

    kernel: tuple[Span, ...] = ()
    link: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A kernel and a collective, how many calls of each fill a window, and their sample so far."""

    sample: Interference
    kernel: Call
    link: Call
    num_kernels: int
    num_links: int


def time_interference(
    device: torch.device, dtype: str, group_size: int, clock: Clock, report: OnPoint
) -> tuple[Interference, ...]:
    """Return how two kernels in `dtype` and messages, or all-reduces of `group_size`, interfere.

    Each side is timed alone and then both at once, in rounds over all pairs for as long as the
    clock goes. What counts is the median over these of time under overlap over time alone: for the
    kernel the mean of the ranks, for the collective its slowest rank. Every rank calls this alike;
    pairs for which there is no time are left out, as is all if `group_size` does not split the
    ranks.
    """
    num_ranks = dist.get_world_size()
    if group_size < 2 or num_ranks % group_size:
        return ()
    pairs = _pairs(device, dtype, group_size)
    slowdowns: dict[int, list[tuple[float, float]]] = {i: [] for i in range(len(pairs))}
    for _ in range(_MAX_ROUNDS):
        for i, pair in enumerate(pairs):
            if clock.is_over():
                break
            report("interference")
            if (found := _slowdowns(pair, device)) is not None:
                slowdowns[i].append(found)
    return tuple(
        replace(
            pair.sample,
            compute_slowdown=round(median(compute for compute, _ in slowdowns[i]), 4),
            communication_slowdown=round(median(link for _, link in slowdowns[i]), 4),
        )
        for i, pair in enumerate(pairs)
        if slowdowns[i]
    )


def _pairs(device: torch.device, dtype: str, group_size: int) -> list[_Pair]:
    """Return the pairs of a kernel and a collective, the most telling first."""
    groups = {"all_reduce": own_group(group_size)}
    if dist.get_world_size() % 2 == 0:
        groups["send_recv"] = groups["all_reduce"] if group_size == 2 else own_group(2)
    kernels = [
        (op, shape, _kernel(op, shape, device, _DTYPES[dtype]))
        for op, shape in _KERNELS[device.type]
    ]
    pairs = []
    for kind, size_bytes in _LINKS[device.type]:
        if kind not in groups:
            continue
        full, other = (buffer(size_bytes, device)[: size_bytes // 4] for _ in range(2))
        link = collective_call(kind, groups[kind], full, other)
        num_links = _num_calls(_spans(device, None, link, 0, _LEAST_CALLS).link, device)
        for op, shape, kernel in kernels:
            alone = _spans(device, kernel, None, _LEAST_CALLS, 0).kernel
            sample = Interference(
                op=op,
                dtype=dtype,
                shape=shape,
                kind=kind,
                group_size=2 if kind == "send_recv" else group_size,
                size_bytes=size_bytes,
                compute_slowdown=1.0,
                communication_slowdown=1.0,
            )
            pairs.append(
                _Pair(
                    sample=sample,
                    kernel=kernel,
                    link=link,
                    num_kernels=_num_calls(alone, device),
                    num_links=num_links,
                )
            )
    return pairs


def _kernel(op: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """Return the op over several sets of operands in turn, as when it was timed alone."""
    sizes = [(shape[0], shape[2]), (shape[1], shape[2])] if op == "linear_forward" else [shape] * 2
    sets = [
        [torch.randn(size, device=device, dtype=dtype) for size in sizes] for _ in range(_NUM_SETS)
    ]
    turn = cycle(sets)
    if op == "linear_forward":
        return lambda: F.linear(*next(turn))
    return lambda: torch.add(*next(turn))


def _slowdowns(pair: _Pair, device: torch.device) -> tuple[float, float] | None:
    """Return one pair's slow-downs, kernel and collective; None if they never overlapped."""
    kernel_alone = _spans(device, pair.kernel, None, pair.num_kernels, 0)
    link_alone = _spans(device, None, pair.link, 0, pair.num_links)
    both = _spans(device, pair.kernel, pair.link, _CUDA_MARGIN * pair.num_kernels, pair.num_links)
    own = [
        _median_ns(kernel_alone.kernel),
        _median_ns(overlapping(both.kernel, both.link)),
        # The first call waits for the ranks that begin later.
        _median_ns(link_alone.link[1:]),
        _median_ns(overlapping(both.link, both.kernel)[1:]),
    ]
    table = torch.zeros(dist.get_world_size(), 4, dtype=torch.float64, device=device)
    table[dist.get_rank()] = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(table)
    return _ratios(table.tolist())


def _num_calls(spans: Sequence[Span], device: torch.device) -> int:
    """Return how many calls fill a window, the same on all ranks."""
    longest = torch.tensor([_median_ns(spans)], dtype=torch.float64, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return max(_LEAST_CALLS, round(_WINDOW_NS[device.type] / max(1.0, float(longest.item()))))


def overlapping(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Return those of `spans` that lie within the time in which `others` ran without a break.

    >>> overlapping([(0, 2), (3, 5), (6, 9)], [(2, 5), (5, 8)])
    [(3, 5)]
    """
    if not others:
        return []
    begin, end = others[0][0], others[-1][1]
    return [span for span in spans if begin <= span[0] and span[1] <= end]


def _median_ns(spans: Sequence[Span]) -> float:
    """Return the median length, 0 for none."""
    return median(end - begin for begin, end in spans) if spans else 0.0


def _ratios(table: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Return both slow-downs from kernel alone, kernel under overlap, and link likewise, by rank.

    A rank on which nothing overlapped has zeros and does not count.

    >>> _ratios([[10, 20, 4, 5], [10, 10, 2, 6], [10, 0, 9, 0]])
    (1.5, 1.5)
    """
    sound = [row for row in table if all(row)]
    if not sound:
        return None
    compute = fmean(row[1] / row[0] for row in sound)
    return compute, max(row[3] for row in sound) / max(row[2] for row in sound)


def _spans(
    device: torch.device, kernel: Call | None, link: Call | None, num_kernels: int, num_links: int
) -> Spans:
    """Return when the calls ran: one side alone if the other is None, else both at once."""
    dist.barrier()
    if device.type == "cuda":
        return _cuda_spans(kernel, link, num_kernels, num_links)
    if link is None or kernel is None:
        alone = kernel or link
        assert alone is not None
        spans = tuple(_timed(alone) for _ in range(num_kernels or num_links))
        return Spans(kernel=spans) if link is None else Spans(link=spans)
    kernels: list[Span] = []
    with ThreadPoolExecutor(1) as pool:
        # A collective gives the interpreter away while it waits, as it does in a hook of autograd.
        links: Future[list[Span]] = pool.submit(lambda: [_timed(link) for _ in range(num_links)])
        while not links.done():
            kernels.append(_timed(kernel))
        return Spans(kernel=tuple(kernels), link=tuple(links.result()))


def _timed(call: Call) -> Span:
    begin = time.perf_counter_ns()
    call()
    return begin, time.perf_counter_ns()


def _cuda_spans(kernel: Call | None, link: Call | None, num_kernels: int, num_links: int) -> Spans:
    """Return the spans on the device; each side has a stream, and both begin together."""
    torch.cuda.synchronize()
    cuda_head_start()
    (zero,) = cuda_events(1)
    zero.record()
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_event(zero)
    kernels, links = cuda_events(num_kernels + 1), cuda_events(num_links + 1)
    if link is not None:
        with torch.cuda.stream(beside):
            links[0].record()
            for event in links[1:]:
                link()
                event.record()
    if kernel is not None:
        kernels[0].record()
        for event in kernels[1:]:
            kernel()
            event.record()
    torch.cuda.synchronize()
    return Spans(
        kernel=_between(zero, kernels) if kernel is not None else (),
        link=_between(zero, links) if link is not None else (),
    )


def _between(zero: torch.cuda.Event, events: Sequence[torch.cuda.Event]) -> tuple[Span, ...]:
    """Return the spans between neighbours of `events`, in ns since `zero`."""
    times = [1e6 * zero.elapsed_time(event) for event in events]
    return tuple(pairwise(times))
