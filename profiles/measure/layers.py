"""Times whole transformer layers: the witness of what kernels cost when they run one after another.

A kernel timed alone finds its code and its allocator warm, and no other tensor in the caches. The
planner sums kernels, and multiplies the sum by what these layers took over the sum of theirs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from profiles.measure.buffers import TORCH_DTYPES
from profiles.measure.kernels import KernelPoint, merged
from profiles.measure.ops import rotate
from profiles.measure.timing import Budget, OnPoint, cuda_events
from profiles.profile import KernelSample
from profiles.surface import Shape

LAYER_OPS = ("layer_forward", "layer_backward")
NUM_LAYERS = 2

# Shapes as in `profiles.profile`: one micro-batch, and four.
LAYER_SHAPES: Mapping[str, tuple[Shape, ...]] = {
    "cpu": ((1, 256, 256, 8, 32, 768), (4, 256, 256, 8, 32, 768)),
    "cuda": ((1, 4096, 4096, 32, 128, 11008), (4, 4096, 4096, 32, 128, 11008)),
}
QUICK = Budget(time_ns=900_000_000, min_samples=3, max_samples=60)
FULL = Budget(time_ns=2_500_000_000, min_samples=3, max_samples=100)


class _Layer(nn.Module):
    """A LLaMA layer of `shape` (batch, seq, hidden, heads, head, ffn), as the executor runs it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        _, _, hidden, heads, head, ffn = shape
        self._heads = (heads, head)
        self.before_attention, self.before_mlp = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v = (nn.Linear(hidden, heads * head, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head, hidden, bias=False)
        self.gate, self.up = (nn.Linear(hidden, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return [batch, seq, hidden] for `x` of that shape, `cos` and `sin` [seq, head / 2]."""
        inner = self.before_attention(x)
        q, k, v = (
            linear(inner).unflatten(-1, self._heads).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        inner = self.before_mlp(x)
        out: Tensor = x + self.down(F.silu(self.gate(inner)) * self.up(inner))
        return out


def time_layers(
    device: torch.device, dtypes: Sequence[str], quick: bool, report: OnPoint
) -> list[KernelSample]:
    """Return one pass over the layers of `LAYER_SHAPES`, the same on all ranks."""
    times: dict[KernelPoint, list[int]] = {}
    budget = QUICK if quick else FULL
    for dtype in dtypes:
        for shape in LAYER_SHAPES[device.type]:
            report("layer")
            dist.barrier()
            point = KernelPoint(op=LAYER_OPS[0], dtype=dtype, shape=shape)
            both = _time_layers(point, device, budget)
            for op, found in zip(LAYER_OPS, both, strict=True):
                times[replace(point, op=op)] = found
    return merged(times, device)


def warm_up(device: torch.device) -> None:
    """Run a tiny layer: libraries load their code, and keep work space, at the first call."""
    tiny = KernelPoint(op=LAYER_OPS[0], dtype="fp32", shape=(1, 16, 16, 1, 16, 16))
    _time_layers(tiny, device, Budget(time_ns=0, min_samples=3, max_samples=3))


def _time_layers(
    point: KernelPoint, device: torch.device, budget: Budget
) -> tuple[list[int], list[int]]:
    """Return the times in ns of one layer's forward and of its backward, in a stack of two."""
    batch, seq, hidden, _, head, _ = point.shape
    dtype = TORCH_DTYPES[point.dtype]
    with torch.device(device):
        layers = nn.ModuleList(_Layer(point.shape) for _ in range(NUM_LAYERS)).to(dtype)
        x, gradient = (torch.randn(batch, seq, hidden, dtype=dtype) for _ in range(2))
        cos, sin = (torch.randn(seq, head // 2, dtype=dtype) for _ in range(2))
    x.requires_grad_()

    def forward() -> Tensor:
        layers.zero_grad(set_to_none=True)
        out = x
        for layer in layers:
            out = layer(out, cos, sin)
        return out

    _time_once(forward, gradient, device)
    times: list[tuple[int, int]] = []
    deadline = time.perf_counter_ns() + budget.time_ns
    while len(times) < budget.min_samples or (
        len(times) < budget.max_samples and time.perf_counter_ns() < deadline
    ):
        times.append(_time_once(forward, gradient, device))
    return [forward_ns for forward_ns, _ in times], [backward_ns for _, backward_ns in times]


def _time_once(
    forward: Callable[[], Tensor], gradient: Tensor, device: torch.device
) -> tuple[int, int]:
    """Return the forward and the backward time of one layer of the stack, in ns."""
    if device.type == "cuda":
        start, middle, end = cuda_events(3)
        start.record()
        out = forward()
        middle.record()
        out.backward(gradient)  # type: ignore[no-untyped-call]
        end.record()
        end.synchronize()
        pair_ms = start.elapsed_time(middle), middle.elapsed_time(end)
        return round(1e6 * pair_ms[0] / NUM_LAYERS), round(1e6 * pair_ms[1] / NUM_LAYERS)
    begin = time.perf_counter_ns()
    out = forward()
    between = time.perf_counter_ns()
    out.backward(gradient)  # type: ignore[no-untyped-call]
    end_ns = time.perf_counter_ns()
    return (between - begin) // NUM_LAYERS, (end_ns - between) // NUM_LAYERS
