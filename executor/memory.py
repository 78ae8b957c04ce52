"""Memory of one rank: resident on a CPU, allocated on a GPU; its peak since a moment, in bytes."""

import ctypes
import gc
import sys
from pathlib import Path

import torch

from planner.record import RankMemory

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryMeter:
    """Notes what is resident when it is made, and the peak from then on.

    On a CPU the peak is the kernel's high-water mark of resident memory, which Linux lets a process
    reset; where it may not, the peak is that of the whole process. On a GPU it is what the
    allocator handed out at most, and the context is what the device holds outside of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        free_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            free, total = torch.cuda.mem_get_info(device)
            self._context_bytes = total - free - torch.cuda.memory_reserved(device)
            return
        self._context_bytes = _status_bytes("VmRSS")
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:  # a sandbox without it: the peak is an upper bound
            return

    def read(self) -> RankMemory:
        """Return the context and the peak (context included)."""
        if self._device.type == "cuda":
            peak = self._context_bytes + torch.cuda.max_memory_allocated(self._device)
        else:
            peak = max(_status_bytes("VmHWM"), self._context_bytes)
        return RankMemory(context_bytes=self._context_bytes, peak_bytes=peak)


def free_memory() -> None:
    """Hand back what earlier work left behind, so that the next peak is its own."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        # Ranks keep freed memory on purpose (profiles.measure.ranks); between plans it must go.
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    """Return a memory field of this process in bytes, 0 where the system does not tell."""
    if not _STATUS.exists():
        return 0
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
