"""Several ranks: launched here by torchrun, or on several nodes by the user's own torchrun.

Both of torchrun's usual ways to meet (`--standalone`, a static TCP store) listen on every network
interface. On one machine the agent and the ranks meet in files of a private folder instead, and
gloo is told to use the loopback interface. Ranks that the user started meet as the user's torchrun
tells them, over the interface that the user chose.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from profiles.errors import UnsupportedError
from profiles.fabric import Fabric, merged
from profiles.files import canonical_json, from_plain
from profiles.machine import GpuFacts, read_gpus
from profiles.topology import local_fabric

STORE_VARIABLE = "LAYLINE_STORE"
JOIN_TIMEOUT = timedelta(seconds=120)

# A rank that maps a tensor when it is made and hands it back when it is freed pays for every page,
# every time. Without maps and without trimming, memory comes from a heap that stays warm.
_RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


# What PyTorch, Python and C++ say when memory runs out, on a GPU or beside it.
_OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|MemoryError|can't allocate memory|std::bad_alloc")


class RanksFailedError(RuntimeError):
    """The ranks ended with an error; the message holds the end of what they printed."""


@contextmanager
def launched(
    module: str, arguments: Sequence[str], num_ranks: int
) -> Iterator["subprocess.Popen[str]"]:
    """Run `python -m module arguments` on `num_ranks` ranks; yield the torchrun process.

    Leaving the context waits for the ranks to end; an exception inside it ends them. Raises
    RanksFailedError when a rank fails.
    """
    with tempfile.TemporaryDirectory(prefix="layline-ranks-") as folder:
        log = Path(folder, "log.txt")
        command = [
            sys.executable, "-m", "torch.distributed.run",
            "--nnodes=1", f"--nproc-per-node={num_ranks}", "--max-restarts=0",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={folder}/agent", "--rdzv-conf=store_type=file",
            "--local-addr=127.0.0.1", "--module", module, *arguments,
        ]  # fmt: skip
        environment = os.environ | _RANK_ENVIRONMENT | {STORE_VARIABLE: f"{folder}/ranks"}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, text=True
            )
            try:
                yield process
                process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if process.returncode:
            raise RanksFailedError(failure_reason(log.read_text(errors="replace")))


def failure_reason(log: str) -> str:
    """Return which rank was killed or short of memory, else the last lines before torchrun's own.

    >>> failure_reason("[rank1]: torch.OutOfMemoryError: CUDA out of memory.")[:68]
    'a rank ran out of memory ([rank1]: torch.OutOfMemoryError: CUDA out '
    """
    for rank, number in re.findall(r"rank\s+: (\d+).*\n\s*exitcode\s+: -(\d+)", log):
        # torchrun itself ends the ranks that are left over, with SIGTERM.
        if int(number) != signal.SIGTERM:
            name = signal.Signals(int(number)).name
            why = ", often for want of memory" if name == "SIGKILL" else ""
            return f"rank {rank} was killed by {name}{why}"
    lines = [line for line in log.splitlines() if line.strip()]
    for line in lines:
        if _OUT_OF_MEMORY.search(line):
            return (
                f"a rank ran out of memory ({line.strip()}); use fewer ranks, or a machine with "
                "more memory"
            )
    own = [i for i, line in enumerate(lines) if "torch/distributed/elastic" in line]
    end = own[0] if own else len(lines)
    return "\n".join(lines[max(0, end - 15) : end] or lines[-15:])


def was_launched() -> bool:
    """Return whether the user's own torchrun started this process as one of its ranks."""
    return STORE_VARIABLE not in os.environ and {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(
        os.environ
    )


@contextmanager
def joined(group: str = "world", device_kind: str = "auto") -> Iterator[torch.device]:
    """Join the process group of the launched ranks as this rank; yield the rank's device.

    `group` names the store, so that one launch can hold several groups one after another.
    `device_kind` is `cpu`, `cuda`, or `auto`: a GPU where there is one for each rank. Raises
    UnsupportedError without the GPUs asked for, and for a process that is no rank.
    """
    if STORE_VARIABLE not in os.environ and not was_launched():
        raise UnsupportedError(
            "this process is no rank: RANK, WORLD_SIZE and MASTER_ADDR are not set; start it with "
            "torchrun"
        )
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    is_cuda = device_kind == "cuda" or (
        device_kind == "auto" and torch.cuda.device_count() >= num_here
    )
    if is_cuda:
        check_device("cuda", num_here)
    if STORE_VARIABLE in os.environ:
        store: Store = FileStore(f"{os.environ[STORE_VARIABLE]}-{group}", num_ranks)
    else:
        found, _, _ = next(iter(rendezvous("env://", timeout=JOIN_TIMEOUT)))
        store = PrefixStore(f"layline-{group}", found)
        is_cuda = _all_agree(is_cuda, store, num_ranks)
    device = torch.device("cpu")
    if is_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=JOIN_TIMEOUT,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _all_agree(claim: bool, store: Store, num_ranks: int) -> bool:
    """Return whether all ranks claim; there is no process group yet, only the store."""
    store.add("claims", int(claim))
    if store.add("ranks", 1) == num_ranks:
        store.set("all", str(store.add("claims", 0)))
    answer: bytes = store.get("all")
    return int(answer) == num_ranks


def gathered_texts(text: str, device: torch.device) -> tuple[str, ...]:
    """Return the texts of all ranks, by rank; as bytes in tensors, so that nothing is unpickled."""
    own = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
    num_ranks = dist.get_world_size()
    sizes = torch.zeros(num_ranks, dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = len(own)
    dist.all_reduce(sizes)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=device)
    padded[: len(own)] = own.to(device)
    parts = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(parts, padded)
    return tuple(
        bytes(part[: size - 1].tolist()).decode()
        for part, size in zip(parts, sizes.tolist(), strict=True)
    )


def nodes(device: torch.device) -> tuple[int, ...]:
    """Return the node of each rank, counted in the order of the ranks; all ranks call together.

    A node is one agent of torchrun, or a host where there is no agent.
    """
    names = gathered_texts(os.environ.get("GROUP_RANK") or socket.gethostname(), device)
    order = list(dict.fromkeys(names))
    return tuple(order.index(name) for name in names)


def gathered_fabric(device: torch.device) -> Fabric:
    """Return the wiring of all nodes, which the first rank of each reads; all ranks call this."""
    where = nodes(device)
    rank = dist.get_rank()
    text = ""
    if where.index(where[rank]) == rank:
        text = canonical_json(local_fabric(f"node{where[rank]}"))
    texts = gathered_texts(text, device)
    return merged(
        [
            from_plain(Fabric, json.loads(found), "the wiring of a node", "measure again")
            for found in texts
            if found
        ]
    )


def check_device(kind: str, num_ranks: int) -> None:
    """Raise UnsupportedError if `num_ranks` ranks on this machine cannot have a GPU each.

    Kind `cuda` needs them; `auto` falls back to the CPU, but not where GPUs are there that PyTorch
    cannot use: that is a fault to be mended, or a choice to be stated.
    """
    if kind == "cpu":
        return
    num_usable, said = _usable_gpus()
    if num_usable >= num_ranks:
        return
    gpus = read_gpus()
    is_fault = num_usable == 0 and len(gpus) >= num_ranks and not _are_hidden()
    if kind == "cuda" or is_fault:
        raise UnsupportedError(gpu_problem(num_ranks, num_usable, gpus, torch.version.cuda, said))


def _are_hidden() -> bool:
    return "CUDA_VISIBLE_DEVICES" in os.environ


def _usable_gpus() -> tuple[int, str]:
    """Return how many GPUs PyTorch can use, and what it said when it looked."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Only this asks the driver; the count alone may come from a library that needs no CUDA.
        number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return number, " ".join(str(warning.message) for warning in caught)


def gpu_problem(
    num_ranks: int, num_usable: int, gpus: Sequence[GpuFacts], cuda: str | None, said: str
) -> str:
    """Return why `num_ranks` ranks cannot have a GPU each, and a way out.

    `gpus` are those that `nvidia-smi` sees, `num_usable` those that PyTorch can use; `cuda` is the
    version PyTorch was built for, None for a CPU build, and `said` what it said of the GPUs.
    """
    counted = f"device cuda needs one GPU a rank: {num_ranks} asked for, {num_usable} found"
    if num_usable or not gpus:
        return f"{counted}; use --device cpu or fewer ranks"
    seen = f"nvidia-smi sees {len(gpus)} {gpus[0].name} (driver {gpus[0].driver})"
    if cuda is None:
        return (
            f"{counted}: {seen}, but torch {torch.__version__} is built without CUDA; install a "
            "CUDA build of torch, or use --device cpu"
        )
    if "driver" in said.lower():
        return (
            f"{counted}: {seen}, but the driver does not fit torch {torch.__version__}, which is "
            f"built for CUDA {cuda}; update the driver, install a torch built for an older CUDA, "
            f"or use --device cpu (torch says: {said})"
        )
    hidden = "; CUDA_VISIBLE_DEVICES hides them: unset it" if _are_hidden() else ""
    return (
        f"{counted}: {seen}, but torch {torch.__version__} for CUDA {cuda} cannot use them"
        f"{hidden}, or use --device cpu (torch says: {said or 'nothing'})"
    )
