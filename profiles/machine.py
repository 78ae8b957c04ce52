"""This machine: its CPU, memory and GPUs as the operating system reports them, without torch."""

import csv
import datetime
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from profiles.cluster import ClusterSpec, GpuSpec, LinkSpec, PoolSpec
from profiles.errors import InvalidInputError, Problem
from profiles.presets import gpu_preset, gpu_presets

SOURCE = "read from this machine"
NVIDIA_SMI_SECONDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """One GPU of this machine, as its driver reports it; 0 W where it reports no limit."""

    name: str
    memory_bytes: int
    max_power_watts: float
    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What `layline doctor` prints about this machine."""

    cpu_name: str
    num_cores: int
    memory_bytes: int
    gpus: tuple[GpuFacts, ...]
    python_version: str
    system: str


def machine_facts() -> MachineFacts:
    """Return what this machine is; asks `nvidia-smi` about GPUs where it is installed.

    >>> machine_facts().num_cores >= 1
    True
    """
    return MachineFacts(
        cpu_name=cpu_name(),
        num_cores=num_usable_cores(),
        memory_bytes=total_memory_bytes(),
        gpus=read_gpus(),
        python_version=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
    )


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the model name of the CPU, or its architecture where the system tells no more."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def num_usable_cores() -> int:
    """Return how many cores this process may run on, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Return the memory of this machine, or the limit of the container when that is less."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = cgroup.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return total
    return min(total, int(limit)) if limit.isdigit() and int(limit) > 0 else total


def read_gpus() -> tuple[GpuFacts, ...]:
    """Return the NVIDIA GPUs of this machine, none where `nvidia-smi` is absent or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = "--query-gpu=name,memory.total,power.limit,driver_version"
    try:
        done = subprocess.run(
            [command, query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> tuple[GpuFacts, ...]:
    """Return the GPUs in the CSV that `read_gpus` asks for: name, MiB, watts, driver.

    >>> parse_nvidia_smi("NVIDIA H100 80GB HBM3, 81559, 700.00, 580.95.05")[0].memory_bytes
    85520809984
    """
    found = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != 4 or not row[1].strip().isdigit():
            continue
        try:
            watts = float(row[2])
        except ValueError:
            watts = 0.0
        found.append(
            GpuFacts(
                name=row[0].strip(),
                memory_bytes=int(row[1]) << 20,
                max_power_watts=watts if 0 <= watts < 1e6 else 0.0,
                driver=row[3].strip(),
            )
        )
    return tuple(found)


def driver_version(device_kind: str) -> str:
    """Return what drives the devices now: the GPUs' driver, for a CPU the operating system.

    >>> driver_version("cpu") == f"{platform.system()} {platform.release()}"
    True
    """
    if device_kind == "cpu":
        return f"{platform.system()} {platform.release()}"
    gpus = read_gpus()
    return gpus[0].driver if gpus else "unknown"


def local_cluster(num_ranks: int, device_kind: Literal["cpu", "cuda"] = "cpu") -> ClusterSpec:
    """Return this machine as a cluster of one node with `num_ranks` ranks.

    CPU ranks share memory and cores evenly; their rates are 0 and their peaks empty, since nothing
    was measured: a `Profile` has them. CUDA ranks take one GPU each.
    Raises InvalidInputError for less than one rank, or more CUDA ranks than GPUs.

    >>> local_cluster(2).num_ranks, local_cluster(2).is_local
    (2, True)
    """
    if num_ranks < 1:
        raise _too_few(num_ranks)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    gpu = _cpu_rank(num_ranks, today) if device_kind == "cpu" else _cuda_rank(num_ranks, today)
    link = LinkSpec(
        name="shared memory" if device_kind == "cpu" else "not measured",
        bytes_per_s=0.0, latency_ns=0, source=f"{SOURCE}: not measured", date=today,
    )  # fmt: skip
    pool = PoolSpec(gpu=gpu, gpus_per_node=num_ranks, num_nodes=1, intra_node=link)
    return ClusterSpec(name="local", pools=(pool,), local_device=device_kind)


def _too_few(num_ranks: int) -> InvalidInputError:
    return InvalidInputError(
        [Problem(where="cluster.ranks", found=str(num_ranks), rule="must be at least 1",
                 fix="use 1 or more")]
    )  # fmt: skip


def _cpu_rank(num_ranks: int, today: str) -> GpuSpec:
    return GpuSpec(
        name=cpu_name(),
        memory_bytes=total_memory_bytes() // num_ranks,
        memory_bytes_per_s=0.0,
        peak_flops_per_s={},
        max_power_watts=0.0,
        source=SOURCE,
        date=today,
    )


def _cuda_rank(num_ranks: int, today: str) -> GpuSpec:
    gpus = read_gpus()
    if num_ranks > len(gpus):
        raise InvalidInputError(
            [Problem(where="cluster.ranks", found=str(num_ranks),
                     rule=f"must be at most the number of GPUs here ({len(gpus)})",
                     fix='use fewer ranks, or device = "cpu"')]
        )  # fmt: skip
    gpu = min(gpus[:num_ranks], key=lambda facts: facts.memory_bytes)
    known = known_gpu(gpu.name)
    return GpuSpec(
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        memory_bytes_per_s=known.memory_bytes_per_s if known else 0.0,
        peak_flops_per_s=known.peak_flops_per_s if known else {},
        max_power_watts=gpu.max_power_watts,
        source=SOURCE + (f"; rates and peaks: {known.source}" if known else ""),
        date=today,
    )


def known_gpu(name: str) -> GpuSpec | None:
    """Return the preset whose every word stands in the driver's `name`, or None.

    "NVIDIA H100 80GB HBM3" is the SXM part: only PCIe and NVL boards have those words in the name.
    """
    words = name.lower().replace("-", " ").split()
    if "pcie" in words or "nvl" in words:
        return None
    for preset in gpu_presets():
        wanted = [word for word in preset.split("-") if not word.startswith("sxm")]
        if all(word in words for word in wanted):
            return gpu_preset(preset)
    return None


def default_ranks() -> tuple[int, Literal["cpu", "cuda"]]:
    """Return how many ranks this machine is used with unless told, and what they compute on.

    All GPUs where there are some, else one rank a core, but two at least and four at most.
    """
    if gpus := read_gpus():
        return len(gpus), "cuda"
    return min(max(2, num_usable_cores()), 4), "cpu"
