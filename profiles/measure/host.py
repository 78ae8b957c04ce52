"""Times what the software itself costs beside its kernels, in ns a call, by key of `host_ns`."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F  # noqa: N812

from profiles.measure.collectives import ping_pong, reduced_copy
from profiles.measure.timing import Call, OnPoint, cuda_events, cuda_head_start

_WIDTH = 16
_NUM_MICROBATCHES = 24
_STEP_TENSORS = 50
# As many as the host can enqueue during the head start of a device.
_NUM_LAUNCHES = 200

# Rounds over all costs, and runs of each cost in a round.
_QUICK, _FULL = (1, 16), (2, 40)


def _usual_ns(call: Call, device: torch.device, repeats: int, calls_each: int = 1) -> float:
    """Return the lower quartile of one call's time, over `repeats` runs of `calls_each`.

    Other programs can only add to what the host takes, and what is sought here is often a small
    difference: the quartile stays where it is under a load that moves the median.
    """
    times = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for _ in range(calls_each):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter_ns() - begin) / calls_each)
    return sorted(times[3:])[repeats // 4]


def _forward_backward(module: nn.Module, x: Tensor) -> Call:
    def call() -> None:
        module(x).sum().backward()

    return call


class _Linears(nn.Module):
    """Two linears side by side into a third, as in an MLP."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(_WIDTH, inner, bias=False)
        self.up = nn.Linear(_WIDTH, inner, bias=False)
        self.down = nn.Linear(inner, _WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [rows, width] for `x` [rows, width]."""
        down: Tensor = self.down(self.gate(x) + self.up(x))
        return down


def dtensor_linear(device: torch.device, repeats: int) -> float:
    """What DTensor adds to one linear layer, forward plus backward.

    Two column-parallel layers feed a row-parallel one, as in an MLP. Off go the same layers
    without DTensor, and its two all-reduces (one forward, one backward); the rest is shared by
    three layers.
    """
    num_ranks = dist.get_world_size()
    mesh = init_device_mesh(device.type, (num_ranks,))
    x = torch.randn(_WIDTH, _WIDTH, device=device, requires_grad=True)
    sharded, plain = _Linears(_WIDTH * num_ranks).to(device), _Linears(_WIDTH).to(device)
    whole = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    styles = {
        "": whole,
        "gate": ColwiseParallel(),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
    }
    parallelize_module(sharded, mesh, styles)
    with_ns = _usual_ns(_forward_backward(sharded, x), device, repeats)
    without_ns = _usual_ns(_forward_backward(plain, x), device, repeats)
    reduced = torch.zeros(_WIDTH, _WIDTH, device=device)
    reduce_ns = 0.0
    if num_ranks > 1:
        assert dist.group.WORLD is not None
        reduce_ns = _usual_ns(reduced_copy(reduced, dist.group.WORLD), device, repeats)
    return (with_ns - without_ns - 2 * reduce_ns) / 3


def _write_schedule(path: Path, num_stages: int, num_microbatches: int) -> None:
    """Write 1F1B, one stage a rank, in PyTorch's compute-only CSV."""
    rows = []
    for stage in range(num_stages):
        ahead = min(num_stages - 1 - stage, num_microbatches)
        row = [f"{stage}F{i}" for i in range(ahead)]
        for i in range(num_microbatches):
            if i + ahead < num_microbatches:
                row.append(f"{stage}F{i + ahead}")
            row.append(f"{stage}B{i}")
        rows.append(",".join(row))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _pipeline_step(
    device: torch.device, group: dist.ProcessGroup, num_microbatches: int, folder: Path
) -> Call:
    stage, num_stages = dist.get_rank(group), dist.get_world_size(group)
    module = nn.Linear(_WIDTH, _WIDTH, bias=False).to(device)
    runtime = _PipelineScheduleRuntime(  # type: ignore[no-untyped-call]
        [PipelineStage(module, stage, num_stages, device, group=group)],
        num_microbatches,
        loss_fn=F.mse_loss,
    )
    file = folder / f"{num_microbatches}.csv"
    _write_schedule(file, num_stages, num_microbatches)
    runtime._load_csv(str(file), format="compute_only")
    x = torch.randn(num_microbatches, _WIDTH, device=device)
    arguments = (x,) if stage == 0 else ()
    target = x if stage == num_stages - 1 else None
    return lambda: runtime.step(*arguments, target=target)


def pipeline_action(device: torch.device, repeats: int) -> float:
    """What the pipeline runtime spends on one forward or backward action of a rank.

    Two stages (one, if alone) run 1F1B on a tiny layer with few and with many micro-batches; the
    difference, per action, less the layer's own forward and backward. With two stages a micro-batch
    also waits for one message on its way (strict 1F1B runs at 2 actions + 1 message a
    micro-batch), which is a cost of its own and comes off.
    """
    group = _pair()
    with tempfile.TemporaryDirectory(prefix="layline-host-") as folder:
        few, many = (
            _usual_ns(_pipeline_step(device, group, count, Path(folder)), device, repeats)
            for count in (4, 4 + _NUM_MICROBATCHES)
        )
    x = torch.randn(1, _WIDTH, device=device, requires_grad=True)
    own_ns = _usual_ns(
        _forward_backward(nn.Linear(_WIDTH, _WIDTH, bias=False).to(device), x), device, repeats, 10
    )
    message_ns = 0.0
    if dist.get_world_size(group) > 1:
        there_and_back = ping_pong(torch.zeros(1, _WIDTH, device=device), group)
        message_ns = _usual_ns(there_and_back, device, repeats) / 2
    return (many - few) / (2 * _NUM_MICROBATCHES) - own_ns / 2 - message_ns / 2


def _pair() -> dist.ProcessGroup:
    """Return the pair of ranks this one belongs to; the last of an odd count is alone."""
    num_ranks, own = dist.get_world_size(), dist.group.WORLD
    for first in range(0, num_ranks, 2):
        members = list(range(first, min(first + 2, num_ranks)))
        group = dist.new_group(members)
        if dist.get_rank() in members:
            own = group
    assert own is not None
    return own


def optimizer_step(device: torch.device, repeats: int) -> float:
    """`zero_grad` and a fused AdamW step over 50 tensors so small that only the host counts."""
    weights = [nn.Parameter(torch.randn(8, device=device)) for _ in range(_STEP_TENSORS)]
    optimizer = torch.optim.AdamW(weights, fused=True)
    gradients = [torch.randn_like(weight) for weight in weights]

    def call() -> None:
        optimizer.zero_grad()
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()

    return _usual_ns(call, device, repeats)


def launch(device: torch.device, repeats: int) -> float:
    """What the host takes to launch one of many tiny kernels in a row; it never waits for them."""
    x = torch.ones(1, device=device)
    times = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for _ in range(_NUM_LAUNCHES):
            torch.add(x, x)
        times.append((time.perf_counter_ns() - begin) / _NUM_LAUNCHES)
    return sorted(times[3:])[repeats // 4]


def launch_gap(device: torch.device, repeats: int) -> float:
    """Time from kernel to kernel on the device, of kernels that do nothing; on a CPU: `launch`.

    The kernels are enqueued while the device is still busy, so that it never waits for the host.
    """
    if device.type == "cpu":
        return launch(device, repeats)
    times: list[float] = []
    for _ in range(repeats + 3):
        start, end = cuda_events(2)
        cuda_head_start()
        start.record()
        for _ in range(_NUM_LAUNCHES):
            torch.cuda._sleep(0)  # type: ignore[no-untyped-call]
        end.record()
        end.synchronize()
        times.append(1e6 * start.elapsed_time(end) / _NUM_LAUNCHES)
    return sorted(times[3:])[repeats // 4]


HOST_COSTS: Mapping[str, Callable[[torch.device, int], float]] = {
    "dtensor_linear": dtensor_linear,
    "launch": launch,
    "launch_gap": launch_gap,
    "pipeline_action": pipeline_action,
    "step": optimizer_step,
}


def time_host(
    device: torch.device, keys: Sequence[str], quick: bool, report: OnPoint
) -> dict[str, int]:
    """Return one pass over the costs `keys`, in ns by key, the same on all ranks.

    A cost is the median of its rounds (one, if `quick`), and the mean of the ranks.
    """
    if not keys:
        return {}
    num_rounds, repeats = _QUICK if quick else _FULL
    found: dict[str, list[float]] = {key: [] for key in keys}
    for _ in range(num_rounds):
        for key, costs in found.items():
            report(key)
            dist.barrier()
            costs.append(HOST_COSTS[key](device, repeats))
    medians = [median(costs) for costs in found.values()]
    total = torch.tensor(medians, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    num_ranks = dist.get_world_size()
    return {
        key: max(0, round(cost / num_ranks))
        for key, cost in zip(found, total.tolist(), strict=True)
    }
