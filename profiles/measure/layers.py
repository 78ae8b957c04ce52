"""Times whole transformer layers: the witness of what kernels cost when they run one after another.

A kernel timed alone finds its code and its allocator warm, and no other tensor in the caches. The
planner sums kernels, and multiplies the sum by what these layers took over the sum of theirs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from profiles.measure.grids import Shape
from profiles.measure.kernels import TORCH_DTYPES, KernelPoint, merged, rotate
from profiles.measure.timing import Budget, cuda_events
from profiles.profile import KernelSample

LAYER_OPS = ("layer_forward", "layer_backward")
NUM_LAYERS = 2


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


class LayerTimer:
    """Collects times of whole layers pass by pass; every rank has the same shapes."""

    def __init__(
        self, shapes: Sequence[Shape], dtypes: Sequence[str], device: torch.device, budget: Budget
    ) -> None:
        self._passes: dict[KernelPoint, list[list[int]]] = {
            KernelPoint(op=op, dtype=dtype, shape=shape): []
            for dtype in dtypes
            for shape in shapes
            for op in LAYER_OPS
        }
        self._device, self._budget = device, budget

    def run_pass(self, on_point: Callable[[str], None]) -> None:
        """Time every layer once more; `on_point` is told what comes next."""
        for point in self._passes:
            on_point(point.op)
            if point.op == LAYER_OPS[0]:
                dist.barrier()
                both = _time_layers(point, self._device, self._budget)
                for op, found in zip(LAYER_OPS, both, strict=True):
                    self._passes[replace(point, op=op)].append(found)

    def samples(self) -> list[KernelSample]:
        """Return what was found, the same on all ranks.

        The passes are moved to one median: what changes between them changes for all ranks, while
        the spread of a layer is to tell by how much equal ranks differ at one time.
        """
        return merged({point: _level(found) for point, found in self._passes.items()}, self._device)


def _level(passes: Sequence[Sequence[int]]) -> list[int]:
    """Return the times of all `passes`, each scaled to the median of their medians.

    >>> _level([[10, 10, 20], [30, 30, 30]])
    [20, 20, 40, 20, 20, 20]
    """
    middle = median(median(times) for times in passes) if passes else 0.0
    return [round(time * middle / median(times)) for times in passes for time in times]


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
