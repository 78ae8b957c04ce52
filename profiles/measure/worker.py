"""One rank of a measurement: `python -m profiles.measure.worker --output FILE` under torchrun."""

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from profiles.files import canonical_json, write_text
from profiles.machine import cpu_name, total_memory_bytes
from profiles.measure import grids
from profiles.measure.host import HOST_COSTS, HostTimer
from profiles.measure.kernels import KernelPoint, KernelTimer
from profiles.measure.layers import LayerTimer
from profiles.measure.links import LinkTimer, link_points
from profiles.measure.ranks import joined
from profiles.profile import PROFILE_SCHEMA_VERSION, DeviceFacts, Profile

# Everything is measured in passes over the whole, so that a disturbance of a second or two, on a
# machine that others use too, does not own a point.
NUM_PASSES = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure as one rank; rank 0 writes the profile to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", default=[], help="op, collective or host cost")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--progress", type=Path)
    options = parser.parse_args(arguments)
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(int(os.environ["RANK"]))
    gc.disable()  # a collection inside a timed call would be charged to the kernel
    with joined(device_kind=options.device) as device:
        profile = measure_here(device, options.quick, options.only, options.progress)
        if dist.get_rank() == 0:
            write_text(options.output, canonical_json(profile))


def measure_here(
    device: torch.device, quick: bool, only: Sequence[str], progress: Path | None
) -> Profile:
    """Return the profile of the joined ranks; every rank calls this with the same arguments."""
    facts = _device_facts(device)
    context_bytes = _context_bytes(device)
    dtypes = grids.dtypes(device.type, quick)
    kernels = [
        KernelPoint(op=op, dtype=dtype, shape=shape)
        for dtype in dtypes
        for op, shapes in grids.kernel_shapes(device.type, quick).items()
        for shape in shapes
        if not only or op in only
    ]
    links = link_points(facts.num_ranks, grids.collective_sizes(quick))
    links = [point for point in links if not only or point.kind in only]
    layers = grids.layer_shapes(device.type) if not only or "layer" in only else ()
    hosts = [key for key in HOST_COSTS if not only or key in only]
    num_points = len(kernels) + 2 * len(dtypes) * len(layers) + len(links) + len(hosts)
    on_point = _reporter(progress, NUM_PASSES * num_points)
    host_timer = HostTimer(hosts, device, quick)
    link_timer = LinkTimer(links, device, grids.collective_budget(quick))
    kernel_timer = KernelTimer(kernels, device, grids.kernel_budget(quick))
    layer_timer = LayerTimer(layers, dtypes, device, grids.layer_budget(quick))
    for _ in range(NUM_PASSES):
        for timer in (host_timer, link_timer, layer_timer, kernel_timer):
            timer.run_pass(on_point)
    return Profile(
        schema_version=PROFILE_SCHEMA_VERSION,
        device=facts,
        kernels=(*kernel_timer.samples(), *layer_timer.samples()),
        collectives=tuple(link_timer.samples()),
        host_ns=host_timer.costs(),
        context_bytes=context_bytes,
        versions=_versions(facts.backend),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        scales={},
    )


def _reporter(progress: Path | None, num_points: int) -> Callable[[str], None]:
    """Return the function told of each point; rank 0 appends JSON lines, a few each second."""
    done, last = 0, 0.0

    def on_point(what: str) -> None:
        nonlocal done, last
        now = time.monotonic()
        if progress is not None and dist.get_rank() == 0 and now - last > 0.2:
            last = now
            with progress.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"fraction": done / num_points, "what": what}) + "\n")
        done += 1

    return on_point


def _device_facts(device: torch.device) -> DeviceFacts:
    num_ranks = dist.get_world_size()
    facts = DeviceFacts(
        kind=device.type,
        name=cpu_name(),
        backend=dist.get_backend(),
        num_ranks=num_ranks,
        memory_bytes=total_memory_bytes() // num_ranks,
        driver=f"{platform.system()} {platform.release()}",
    )
    if device.type == "cpu":
        return facts
    properties = torch.cuda.get_device_properties(device)
    return replace(
        facts,
        name=properties.name,
        memory_bytes=properties.total_memory,
        driver=f"CUDA {torch.version.cuda}",
    )


def _context_bytes(device: torch.device) -> int:
    """Return what this rank holds before any work: resident memory, or device memory on CUDA.

    A tiny layer runs first: libraries load their code, and keep work space, at the first call.
    """
    tiny = LayerTimer(((1, 16, 16, 1, 16, 16),), ("fp32",), device, grids.layer_budget(True))
    tiny.run_pass(lambda _: None)
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return total_bytes - free_bytes
    resident: int = psutil.Process().memory_info().rss
    return resident


def _versions(backend: str) -> dict[str, str]:
    try:
        layline = metadata.version("layline")
    except metadata.PackageNotFoundError:
        layline = "not installed"
    return {
        "backend": backend,
        "layline": layline,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
