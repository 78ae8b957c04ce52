"""One rank of one pass: `python -m profiles.measure.worker --output FILE` under torchrun.

The first pass explores: it chooses shapes as it goes. Later passes, in processes of their own,
repeat what it found, so that what changes from process to process is seen and not taken for truth.
"""

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.distributed as dist

from profiles.fabric import Fabric
from profiles.files import canonical_json, load, write_text
from profiles.machine import cpu_name, driver_version, total_memory_bytes
from profiles.measure.host import HOST_COSTS, time_host
from profiles.measure.interference import time_interference
from profiles.measure.kernels import explore, repeat
from profiles.measure.layers import ALONG_OPS, LayerTimer, warm_up
from profiles.measure.links import LinkPoint, free_bytes, link_points, time_links
from profiles.measure.ops import OPS
from profiles.measure.ranks import gathered_fabric, joined, nodes
from profiles.measure.sweep import KernelPoint
from profiles.measure.timing import Clock, seen_mhz
from profiles.profile import (
    PROFILE_SCHEMA_VERSION,
    Clocks,
    CollectiveSample,
    DeviceFacts,
    Interference,
    KernelSample,
    Profile,
)

# Shares of a pass; what is left over of one goes to those behind it, the kernels last, of whose
# time the layers take a share.
_LINKS, _INTERFERENCE, _LAYERS = 0.25, 0.08, 0.2

_SAVE_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one pass is to measure, the same on all ranks.

    `only` names ops, collective kinds and host costs, all if empty; `earlier` is the pass whose
    points are repeated, None for one that explores.
    """

    quick: bool
    seconds: float
    only: tuple[str, ...] = ()
    earlier: Profile | None = None

    def wants(self, name: str) -> bool:
        """Return whether `name` is to be measured."""
        return not self.only or name in self.only


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one pass as one rank; rank 0 writes it to `--output`, unfinished ones too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--only", action="append", default=[], help="op, collective or host cost")
    parser.add_argument("--repeat", type=Path, help="an earlier pass, whose points to repeat")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--progress", type=Path)
    options = parser.parse_args(arguments)
    earlier = load(Profile, options.repeat, "pass", "measure again") if options.repeat else None
    asked = Asked(
        quick=options.quick, seconds=options.seconds, only=tuple(options.only), earlier=earlier
    )
    with joined(device_kind=options.device) as device:
        one_pass(device, asked, options.output, options.progress)


def one_pass(
    device: torch.device, asked: Asked, output: Path | None = None, progress: Path | None = None
) -> Profile:
    """Return what the joined ranks measure in one pass; every rank calls this alike.

    The first rank keeps `output` up to date, as far as it has come.
    """
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    gc.disable()  # a collection inside a timed call would be charged to the kernel
    made = _Pass(device, asked, output, progress)
    made.host_costs()
    made.links()
    made.slowdowns()
    made.kernels()
    return made.finished()


class _Pass:
    """A pass in the making: the profile of what is done so far, and where it is kept."""

    def __init__(
        self, device: torch.device, asked: Asked, output: Path | None, progress: Path | None
    ) -> None:
        self._device, self._asked = device, asked
        self._output, self._progress = output, progress
        self._clock = Clock(asked.seconds, device)
        self._reported = self._saved = 0.0
        self._seen_mhz = [seen_mhz(device)]
        facts = _device_facts(device)
        self._dtypes = _dtypes(device.type, asked.quick)
        self._profile = Profile(
            schema_version=PROFILE_SCHEMA_VERSION,
            device=facts,
            kernels=(),
            collectives=(),
            host_ns={},
            context_bytes=_context_bytes(device),
            versions=_versions(facts.backend),
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            scales={},
            fabric=gathered_fabric(device) if not asked.only else Fabric(),
        )

    def host_costs(self) -> None:
        """Time what the software itself costs."""
        keys = [key for key in HOST_COSTS if self._asked.wants(key)]
        found = time_host(self._device, keys, self._asked.quick, self._report)
        self._profile = replace(self._profile, host_ns=found)
        self._save()

    def links(self) -> None:
        """Time collectives and messages."""
        earlier = self._asked.earlier
        if earlier is None:
            points = link_points(dist.get_world_size(), self._asked.quick, free_bytes(self._device))
        else:
            points = [
                LinkPoint(kind=c.kind, group_size=c.group_size, stride=c.stride,
                          size_bytes=c.size_bytes)
                for c in earlier.collectives
            ]  # fmt: skip
        points = [point for point in points if self._asked.wants(point.kind)]
        timed = time_links(
            self._device, points, self._asked.quick, self._part(_LINKS), self._report,
            self._keep_collectives,
        )  # fmt: skip
        self._keep_collectives(timed.samples)
        self._miss(timed.missing)

    def slowdowns(self) -> None:
        """Time kernels and collectives that run at once."""
        if self._asked.quick:
            # Two seconds of every pass, which kernels need more.
            self._miss(["interference: --quick leaves it out"])
            return
        found: tuple[Interference, ...] = ()
        dtype = "fp32" if self._device.type == "cpu" else "bf16"
        if self._asked.wants("interference") and dist.get_world_size() > 1:
            found = time_interference(
                self._device, dtype, dist.get_world_size(), self._part(_INTERFERENCE),
                self._report,
            )  # fmt: skip
        self._profile = replace(self._profile, interference=found)

    def kernels(self) -> None:
        """Time kernels for what time is left: explore, or repeat the shapes of an earlier pass.

        Whole layers are timed in between.
        """
        dtypes = self._dtypes if self._asked.wants("layer") else ()
        layers = LayerTimer([d for d in dtypes if d != "fp8"], self._device, _LAYERS)

        def keep(samples: Sequence[KernelSample]) -> None:
            layers.keep_pace()
            self._profile = replace(self._profile, kernels=tuple(samples))
            self._save()

        clock = self._part(1.0)
        if (earlier := self._asked.earlier) is not None:
            points = [
                KernelPoint(op=k.op, dtype=k.dtype, shape=k.shape, variant=k.variant)
                for k in earlier.kernels
                if k.op not in ALONG_OPS
            ]
            found = repeat(self._device, points, self._asked.quick, clock, self._report, keep)
        else:
            ops = [op for op in OPS if self._asked.wants(op)]
            found = explore(
                self._device, self._dtypes, ops, self._asked.quick, clock, self._report, keep
            )
        kernels = (*found.samples, *layers.samples())
        self._profile = replace(self._profile, kernels=kernels)
        self._miss(found.missing)

    def finished(self) -> Profile:
        """Return the pass, written once more."""
        self._save(last=True)
        return self._profile

    def _part(self, share: float) -> Clock:
        """Return the clock of a part that has `share` of the pass, or what is left of it."""
        left = 1.0 - self._clock.share
        return Clock(self._asked.seconds * min(share, left), self._device)

    def _keep_collectives(self, samples: Sequence[CollectiveSample]) -> None:
        self._profile = replace(self._profile, collectives=tuple(samples))
        self._save()

    def _miss(self, lines: Sequence[str]) -> None:
        self._profile = replace(self._profile, missing=(*self._profile.missing, *lines))

    def _report(self, what: str) -> None:
        """Append a line of progress, a few each second."""
        now = time.monotonic()
        if self._progress is not None and dist.get_rank() == 0 and now - self._reported > 0.2:
            self._reported = now
            with self._progress.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"fraction": self._clock.share, "what": what}) + "\n")

    def _save(self, *, last: bool = False) -> None:
        """Write the pass as it stands; between parts, and at most every two seconds."""
        now = time.monotonic()
        if dist.get_rank() != 0 or not (last or now - self._saved > _SAVE_SECONDS):
            return
        self._saved = now
        self._seen_mhz.append(seen_mhz(self._device))
        seen = sorted(mhz for mhz in self._seen_mhz if mhz)
        if seen:
            clocks = Clocks(least_mhz=seen[0], median_mhz=round(median(seen)), most_mhz=seen[-1])
            self._profile = replace(self._profile, clocks=clocks)
        if self._output is not None:
            write_text(self._output, canonical_json(self._profile))


def _dtypes(device: str, quick: bool) -> tuple[str, ...]:
    """Return the dtypes to measure: those one trains in; a CPU in a hurry has fp32 alone."""
    if device == "cpu":
        return ("fp32",) if quick else ("fp32", "bf16")
    if quick:
        return ("fp32", "bf16")
    has_fp8 = torch.cuda.get_device_capability() >= (8, 9)
    return ("fp32", "fp16", "bf16", *(("fp8",) if has_fp8 else ()))


def _device_facts(device: torch.device) -> DeviceFacts:
    num_ranks, where = dist.get_world_size(), nodes(device)
    ranks_per_node = num_ranks // len(set(where))
    facts = DeviceFacts(
        kind=device.type,
        name=cpu_name(),
        backend=dist.get_backend(),
        num_ranks=num_ranks,
        memory_bytes=total_memory_bytes() // ranks_per_node,
        driver=driver_version(device.type),
        ranks_per_node=ranks_per_node if len(set(where)) > 1 else 0,
    )
    if device.type == "cpu":
        return facts
    properties = torch.cuda.get_device_properties(device)
    return replace(
        facts,
        name=properties.name,
        memory_bytes=properties.total_memory,
        capability=f"{properties.major}.{properties.minor}",
    )


def _context_bytes(device: torch.device) -> int:
    """Return what this rank holds before any work: resident memory, or device memory on CUDA."""
    warm_up(device)
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
    versions = {
        "backend": backend,
        "layline": layline,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if backend == "nccl":
        found = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        versions["nccl"] = ".".join(map(str, found))
        versions["cuda"] = str(torch.version.cuda)
    return versions


if __name__ == "__main__":
    main()
