"""Several ranks on this machine: launched by torchrun, joined without a port beyond loopback.

Both of torchrun's usual ways to meet (`--standalone`, a static TCP store) listen on every network
interface. Here the agent and the ranks meet in files of a private folder instead, and gloo is
told to use the loopback interface.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

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
    """Return which rank was killed, else the last lines printed before torchrun's own report."""
    for rank, number in re.findall(r"rank\s+: (\d+).*\n\s*exitcode\s+: -(\d+)", log):
        # torchrun itself ends the ranks that are left over, with SIGTERM.
        if int(number) != signal.SIGTERM:
            name = signal.Signals(int(number)).name
            why = ", often for want of memory" if name == "SIGKILL" else ""
            return f"rank {rank} was killed by {name}{why}"
    lines = [line for line in log.splitlines() if line.strip()]
    own = [i for i, line in enumerate(lines) if "torch/distributed/elastic" in line]
    end = own[0] if own else len(lines)
    return "\n".join(lines[max(0, end - 15) : end] or lines[-15:])


@contextmanager
def joined(group: str = "world", device_kind: str = "auto") -> Iterator[torch.device]:
    """Join the process group of the launched ranks as this rank; yield the rank's device.

    `group` names the store, so that one launch can hold several groups one after another.
    `device_kind` is `cpu`, `cuda`, or `auto`: a GPU where there is one for each rank.
    """
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if device_kind == "cuda" or (device_kind == "auto" and torch.cuda.device_count() >= num_ranks):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store = FileStore(f"{os.environ[STORE_VARIABLE]}-{group}", num_ranks)
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
