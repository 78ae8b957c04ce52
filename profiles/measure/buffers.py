"""Operands for kernels: random tensors, cheap to make, and enough of them to outgrow the caches."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from profiles.measure.timing import Call
from profiles.surface import Shape

TORCH_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}

# Elements between two tensors of an arena: without a gap, tensors whose sizes are powers of two
# would share the low bits of their addresses and push each other out of the caches.
_STAGGER = 320
_ARENA_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
_SEED_ELEMENTS = 1 << 20
# A tensor larger than this part of an arena has memory of its own: the others are to stay apart.
_LARGEST_PART = 4

_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_L2_BYTES = 512 << 10
# On a GPU a set is read once and nothing of it is left: more sets than timed calls are no use. On a
# CPU a handful is as many as turn over in the caches of one core.
_MAX_SETS = {"cpu": 6, "cuda": 24}


class Arena:
    """Random tensors of one dtype: views that move through one block, or fresh if large."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, most_elements: int = 1 << 28
    ) -> None:
        self.device, self.dtype = device, dtype
        seed = torch.randn(_SEED_ELEMENTS, device=device).to(dtype)
        elements = min(most_elements, _ARENA_ELEMENTS.get(device.type, _SEED_ELEMENTS))
        self._block = seed.repeat(max(1, elements // _SEED_ELEMENTS))
        self._offset = 0
        self.taken_bytes = 0

    def take(self, *shape: int) -> Tensor:
        """Return a tensor of `shape` with random values; its memory is lent, do not write."""
        size = math.prod(shape)
        if size > len(self._block) // _LARGEST_PART:
            return self.fresh(*shape)
        if self._offset + size > len(self._block):
            self._offset = 0
        view = self._block[self._offset : self._offset + size].view(shape)
        self._offset += -(-size // 64) * 64 + _STAGGER
        self.taken_bytes += size * self.dtype.itemsize
        return view

    def fresh(self, *shape: int) -> Tensor:
        """Return a tensor of `shape` with random values and memory of its own."""
        size = math.prod(shape)
        values = torch.empty(size, device=self.device, dtype=self.dtype)
        for begin in range(0, size, len(self._block)):
            part = values[begin : begin + len(self._block)]
            part.copy_(self._block[: len(part)])
        self.taken_bytes += size * self.dtype.itemsize
        return values.view(shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return random whole numbers below `high`."""
        return torch.randint(high, shape, device=self.device)


def rotation_bytes(device: torch.device) -> int:
    """Return how many bytes the sets of operands exceed together, so that caches hold none.

    On a GPU twice its L2, which is its last level. On a CPU 16 times the L2 of a core, which is
    less than the last level: a step of training finds what the kernel before it has left in the
    cache that all cores share, but little in those of one core. Operands that all came from DRAM
    would make kernels slower than a whole layer is.
    """
    if device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 16 * core_cache_bytes()


def core_cache_bytes(caches: Path = _CPU_CACHES) -> int:
    """Return the size of a core's L2 as Linux tells it, 512 KiB where nothing does."""
    for level in sorted(caches.glob("index*/level")):
        text = level.with_name("size").read_text(encoding="ascii").strip()
        if level.read_text(encoding="ascii").strip() == "2" and text.endswith("K"):
            return int(text[:-1]) << 10
    return _USUAL_L2_BYTES


def buffer_sets(build: Callable[[Arena, Shape], Call], arena: Arena, shape: Shape) -> list[Call]:
    """Return the calls that `build` makes, over enough sets of operands to outgrow the caches.

    Two at least, but one if it alone is twice what the sets are to exceed.
    """
    arena.taken_bytes = 0
    calls = [build(arena, shape)]
    enough = rotation_bytes(arena.device)
    if arena.taken_bytes >= 2 * enough:
        return calls
    num_sets = max(2, -(-enough // max(1, arena.taken_bytes)))
    calls += [build(arena, shape) for _ in range(min(num_sets, _MAX_SETS[arena.device.type]) - 1)]
    return calls
