"""Times every op of the table in `profiles.profile`, as PyTorch's autograd runs it.

All ranks run the same op at the same time: on shared cores and memory, contention is part of the
truth.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.optim.adamw import adamw

from profiles.measure.grids import Shape
from profiles.measure.timing import Budget, Call, quantiles, time_calls
from profiles.profile import KernelSample

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Input sets are rotated until together they exceed this; L1 and L2 then hold none of them.
_ROTATION_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
_MAX_SETS = 6

# Elements between two tensors of an arena: without a gap, tensors whose sizes are powers of two
# would share the low bits of their addresses and push each other out of the caches.
_STAGGER = 320
_ARENA_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}


class Arena:
    """Random tensors of one dtype: views that move through one block, or fresh if large."""

    def __init__(self, device: torch.device, dtype: torch.dtype, num_elements: int = 0) -> None:
        self.device, self.dtype = device, dtype
        seed = torch.randn(1 << 20, device=device, dtype=dtype)
        self._block = seed.repeat((num_elements or _ARENA_ELEMENTS[device.type]) >> 20)
        self._offset = 0
        self.taken_bytes = 0

    def take(self, *shape: int) -> Tensor:
        """Return a tensor of `shape` with random values; its memory is lent, do not write."""
        size = math.prod(shape)
        if size > len(self._block) // 16:
            return self.fresh(*shape)
        if self._offset + size > len(self._block):
            self._offset = 0
        view = self._block[self._offset : self._offset + size].view(shape)
        self._offset += -(-size // 64) * 64 + _STAGGER
        self.taken_bytes += size * self.dtype.itemsize
        return view

    def fresh(self, *shape: int) -> Tensor:
        """Return a tensor of `shape` with random values and memory of its own."""
        size = math.prod(shape)
        values = torch.empty(size, device=self.device, dtype=self.dtype)
        for begin in range(0, size, len(self._block)):
            part = values[begin : begin + len(self._block)]
            part.copy_(self._block[: len(part)])
        self.taken_bytes += size * self.dtype.itemsize
        return values.view(shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return random whole numbers below `high`."""
        return torch.randint(high, shape, device=self.device)


def _backward(output: Tensor, inputs: Sequence[Tensor], gradient: Tensor) -> Call:
    """Return a call of the backward alone, over a graph that stays."""
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)


def _linear_forward(arena: Arena, shape: Shape) -> Call:
    m, n, k = shape
    x, w = arena.take(m, k), arena.take(n, k)
    return lambda: F.linear(x, w)


def _linear_dgrad(arena: Arena, shape: Shape) -> Call:
    m, n, k = shape
    dy, w = arena.take(m, n), arena.take(n, k)
    return lambda: dy @ w


def _linear_wgrad(arena: Arena, shape: Shape) -> Call:
    m, n, k = shape
    dy, x = arena.take(m, n), arena.take(m, k)
    return lambda: dy.t() @ x


def _heads(arena: Arena, shape: Shape) -> Tensor:
    """Return [batch, heads, seq, head], strided as a projection's output is."""
    batch, heads, seq, head = shape
    return arena.take(batch, seq, heads, head).transpose(1, 2)


def _attention_forward(arena: Arena, shape: Shape) -> Call:
    q, k, v = (_heads(arena, shape).detach().requires_grad_() for _ in range(3))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _attention_backward(arena: Arena, shape: Shape) -> Call:
    q, k, v = (_heads(arena, shape).detach().requires_grad_() for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return _backward(out, (q, k, v), _heads(arena, shape))


def _norm_operands(arena: Arena, shape: Shape) -> tuple[Tensor, Tensor]:
    x, weight = arena.take(*shape), arena.take(shape[1])
    return x.detach().requires_grad_(), weight.detach().requires_grad_()


def _norm_forward(arena: Arena, shape: Shape) -> Call:
    x, weight = _norm_operands(arena, shape)
    return lambda: F.rms_norm(x, (shape[1],), weight, 1e-5)


def _norm_backward(arena: Arena, shape: Shape) -> Call:
    x, weight = _norm_operands(arena, shape)
    return _backward(F.rms_norm(x, (shape[1],), weight, 1e-5), (x, weight), arena.take(*shape))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` [..., head] rotated by position, as the executor does it."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def _rope_operands(arena: Arena, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    seq, heads, head = shape[0] // 512, 8, 64
    x = arena.take(seq, heads, head).detach().requires_grad_()
    return x, arena.take(seq, 1, head // 2), arena.take(seq, 1, head // 2)


def _rope_forward(arena: Arena, shape: Shape) -> Call:
    x, cos, sin = _rope_operands(arena, shape)
    return lambda: rotate(x, cos, sin)


def _rope_backward(arena: Arena, shape: Shape) -> Call:
    x, cos, sin = _rope_operands(arena, shape)
    return _backward(rotate(x, cos, sin), (x,), arena.take(*x.shape))


def _swiglu_forward(arena: Arena, shape: Shape) -> Call:
    gate, up = (arena.take(*shape).detach().requires_grad_() for _ in range(2))
    return lambda: F.silu(gate) * up


def _swiglu_backward(arena: Arena, shape: Shape) -> Call:
    gate, up = (arena.take(*shape).detach().requires_grad_() for _ in range(2))
    return _backward(F.silu(gate) * up, (gate, up), arena.take(*shape))


def _add(arena: Arena, shape: Shape) -> Call:
    """Forward adds two branches, backward the gradients of two branches: one kernel."""
    left, right = arena.take(*shape), arena.take(*shape)
    return lambda: left + right


def _embedding_forward(arena: Arena, shape: Shape) -> Call:
    rows, width, vocab = shape
    weight, tokens = arena.take(vocab, width).detach(), arena.integers(vocab, rows)
    weight.requires_grad_()
    return lambda: F.embedding(tokens, weight)


def _embedding_backward(arena: Arena, shape: Shape) -> Call:
    rows, width, vocab = shape
    weight, tokens = arena.take(vocab, width).detach(), arena.integers(vocab, rows)
    weight.requires_grad_()
    return _backward(F.embedding(tokens, weight), (weight,), arena.take(rows, width))


def _cross_entropy_forward(arena: Arena, shape: Shape) -> Call:
    logits, targets = arena.take(*shape).detach(), arena.integers(shape[1], shape[0])
    logits.requires_grad_()
    return lambda: F.cross_entropy(logits.float(), targets)


def _cross_entropy_backward(arena: Arena, shape: Shape) -> Call:
    logits, targets = arena.take(*shape).detach(), arena.integers(shape[1], shape[0])
    logits.requires_grad_()
    loss = F.cross_entropy(logits.float(), targets)
    return _backward(loss, (logits,), torch.ones_like(loss))


def _adamw(arena: Arena, shape: Shape) -> Call:
    """The fused kernel without the optimizer object, whose cost is `host_ns["step"]`."""
    weight, gradient, mean, square = (arena.fresh(*shape) for _ in range(4))
    square.abs_()
    count = torch.ones((), dtype=torch.float32, device=arena.device)

    def call() -> None:
        adamw(
            [weight], [gradient], [mean], [square], [], [count], fused=True, amsgrad=False,
            beta1=0.9, beta2=0.95, lr=1e-5, weight_decay=0.1, eps=1e-8, maximize=False,
        )  # fmt: skip

    return call


OPS: Mapping[str, Callable[[Arena, Shape], Call]] = {
    "linear_forward": _linear_forward,
    "linear_dgrad": _linear_dgrad,
    "linear_wgrad": _linear_wgrad,
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "norm_forward": _norm_forward,
    "norm_backward": _norm_backward,
    "rope_forward": _rope_forward,
    "rope_backward": _rope_backward,
    "swiglu_forward": _swiglu_forward,
    "swiglu_backward": _swiglu_backward,
    "add_forward": _add,
    "add_backward": _add,
    "embedding_forward": _embedding_forward,
    "embedding_backward": _embedding_backward,
    "cross_entropy_forward": _cross_entropy_forward,
    "cross_entropy_backward": _cross_entropy_backward,
    "adamw": _adamw,
}


def buffer_sets(op: str, arena: Arena, shape: Shape) -> list[Call]:
    """Return the op at `shape` over several sets of inputs, so that none is found in L1 or L2."""
    arena.taken_bytes = 0
    calls = [OPS[op](arena, shape)]
    num_sets = -(-_ROTATION_BYTES[arena.device.type] // max(1, arena.taken_bytes))
    calls += [OPS[op](arena, shape) for _ in range(min(max(2, num_sets), _MAX_SETS) - 1)]
    return calls


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPoint:
    """One op at one shape and dtype."""

    op: str
    dtype: str
    shape: Shape


class KernelTimer:
    """Collects times of `points` pass by pass; every rank has the same points."""

    def __init__(self, points: Sequence[KernelPoint], device: torch.device, budget: Budget) -> None:
        self._times: dict[KernelPoint, list[int]] = {point: [] for point in points}
        self._device, self._budget = device, budget
        self._chance = random.Random(0)

    def run_pass(self, on_point: Callable[[str], None]) -> None:
        """Time every point once more; `on_point` is told what comes next.

        The order is shuffled, the same on all ranks: a disturbance then hits some points of all
        ops, and not one op at all its shapes.
        """
        order = list(self._times)
        self._chance.shuffle(order)
        for dtype in sorted({point.dtype for point in order}):
            arena = Arena(self._device, TORCH_DTYPES[dtype])
            for point in order:
                if point.dtype == dtype:
                    on_point(point.op)
                    dist.barrier()
                    self._times[point] += self._sample(point, arena)

    def _sample(self, point: KernelPoint, arena: Arena) -> list[int]:
        try:
            calls = buffer_sets(point.op, arena, point.shape)
            return time_calls(calls, self._device, self._budget)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return []

    def samples(self) -> list[KernelSample]:
        """Return what was found; all ranks together, and all get the same.

        A sample's quantiles are the means of the ranks' quantiles. A point that does not fit into
        some rank's memory is left out.
        """
        return merged(self._times, self._device)


def merged(times: Mapping[KernelPoint, list[int]], device: torch.device) -> list[KernelSample]:
    """Return the samples of `times`, the same on all ranks, as `KernelTimer.samples` says."""
    if not times:
        return []
    rows = [(*quantiles(found), len(found)) if found else (0, 0, 0, 0) for found in times.values()]
    total = torch.tensor(rows, dtype=torch.float64, device=device)
    fewest = total[:, 3].clone()
    dist.all_reduce(total)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    num_ranks = dist.get_world_size()
    return [
        KernelSample(
            op=point.op,
            dtype=point.dtype,
            shape=point.shape,
            p10_ns=max(1, round(p10 / num_ranks)),
            p50_ns=max(1, round(p50 / num_ranks)),
            p90_ns=max(1, round(p90 / num_ranks)),
            num_samples=round(count),
        )
        for point, (p10, p50, p90, count), few in zip(
            times, total.tolist(), fewest.tolist(), strict=True
        )
        if few
    ]
