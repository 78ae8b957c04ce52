"""Times what stands beside the kernels all along a pass: whole layers, and the reference kernel.

Layers are the witness of what kernels cost when they run one after another.

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

from profiles.lookup import REFERENCE_OP, REFERENCE_SHAPES
from profiles.measure.buffers import TORCH_DTYPES
from profiles.measure.ops import rotate
from profiles.measure.reference import reference_ns
from profiles.measure.sweep import KernelPoint, merged
from profiles.measure.timing import cuda_events, first_says
from profiles.profile import KernelSample
from profiles.surface import Shape

LAYER_OPS = ("layer_forward", "layer_backward")
ALONG_OPS = (*LAYER_OPS, REFERENCE_OP)
NUM_LAYERS = 2

# Shapes as in `profiles.profile`: one micro-batch, and four.
LAYER_SHAPES: Mapping[str, tuple[Shape, ...]] = {
    "cpu": ((1, 256, 256, 8, 32, 768), (4, 256, 256, 8, 32, 768)),
    "cuda": ((1, 4096, 4096, 32, 128, 11008), (4, 4096, 4096, 32, 128, 11008)),
}
_LEAST_SAMPLES = 5


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


class _Stack:
    """A few layers of one shape and dtype on this rank, forward and backward as in training."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        batch, seq, hidden, _, head, _ = shape
        self._device = device
        with torch.device(device):
            self._layers = nn.ModuleList(_Layer(shape) for _ in range(NUM_LAYERS)).to(dtype)
            self._x, self._gradient = (torch.randn(batch, seq, hidden, dtype=dtype) for _ in "xg")
            self._angles = tuple(torch.randn(seq, head // 2, dtype=dtype) for _ in range(2))
        self._x.requires_grad_()
        self.time()

    def _forward(self) -> Tensor:
        self._layers.zero_grad(set_to_none=True)
        out = self._x
        for layer in self._layers:
            out = layer(out, *self._angles)
        return out

    def time(self) -> tuple[int, int]:
        """Return the time of one layer's forward and of its backward now, in ns."""
        return _time_once(self._forward, self._gradient, self._device)


class LayerTimer:
    """Times whole layers a few at a time, all along a pass; every rank makes the same calls.

    What disturbs a machine lasts for seconds. Layers that were timed in one go would see another
    machine than the kernels that they are laid beside.
    """

    def __init__(self, dtypes: Sequence[str], device: torch.device, share: float) -> None:
        self._device, self._share = device, share
        self._stacks = {
            KernelPoint(op=LAYER_OPS[0], dtype=dtype, shape=shape): _Stack(
                shape, TORCH_DTYPES[dtype], device
            )
            for dtype in dtypes
            for shape in LAYER_SHAPES[device.type]
        }
        self._times: dict[KernelPoint, list[int]] = {
            replace(point, op=op): [] for point in self._stacks for op in LAYER_OPS
        }
        self._references = [
            KernelPoint(op=REFERENCE_OP, dtype=dtype, shape=REFERENCE_SHAPES[device.type])
            for dtype in dtypes
        ]
        self._times |= {point: [] for point in self._references}
        self._begin_ns, self._spent_ns = time.perf_counter_ns(), 0

    def keep_pace(self) -> None:
        """Time layers until they have had their share of the time since the beginning."""
        while self._stacks and self._is_due():
            self._take_turn()

    def _is_due(self) -> bool:
        """Return whether the first rank's layers lag behind; it decides for all."""
        elapsed_ns = time.perf_counter_ns() - self._begin_ns
        return first_says(self._spent_ns < self._share * elapsed_ns, self._device)

    def _take_turn(self) -> None:
        """Time every stack once, and the reference kernel."""
        begin_ns = time.perf_counter_ns()
        for point in self._references:
            dist.barrier()
            self._times[point].append(reference_ns(self._device, point.dtype))
        for point, stack in self._stacks.items():
            dist.barrier()
            for op, time_ns in zip(LAYER_OPS, stack.time(), strict=True):
                self._times[replace(point, op=op)].append(time_ns)
        self._spent_ns += time.perf_counter_ns() - begin_ns

    def samples(self) -> list[KernelSample]:
        """Return what was found, the same on all ranks."""
        fewest = min((len(times) for times in self._times.values()), default=_LEAST_SAMPLES)
        for _ in range(_LEAST_SAMPLES - fewest):
            self._take_turn()
        return merged(self._times, self._device)


def warm_up(device: torch.device) -> None:
    """Run a tiny layer: libraries load their code, and keep work space, at the first call."""
    stack = _Stack((1, 16, 16, 1, 16, 16), torch.float32, device)
    for _ in range(3):
        stack.time()


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
