"""What two ranks do in the tests of the kernel timer: one cannot run what the other can."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from profiles.files import canonical_json, write_text
from profiles.measure import sweep
from profiles.measure.buffers import Arena
from profiles.measure.kernels import repeat
from profiles.measure.ops import builder
from profiles.measure.ranks import joined
from profiles.measure.sweep import KernelPoint
from profiles.measure.timing import Call, Clock
from profiles.surface import Shape

POINTS = [KernelPoint(op="add_forward", dtype="fp32", shape=(size,)) for size in (4096, 8192)]


def lame_builder(op: str, variant: str = "") -> object:
    """Return the builder of `op`, which on the second rank is out of memory at 8192 elements."""

    def build(arena: Arena, shape: Shape) -> Call:
        if dist.get_rank() == 1 and shape == (8192,):
            raise torch.OutOfMemoryError("no more")
        return builder(op, variant)(arena, shape)

    return build


def main(folder: Path) -> None:
    """Time both points as one rank, and write what this rank found."""
    vars(sweep)["builder"] = lame_builder
    with joined(device_kind="cpu") as device:
        clock = Clock(60.0, device)
        found = repeat(device, POINTS, True, clock, lambda _: None, lambda _: None)
        write_text(folder / f"{dist.get_rank()}.json", canonical_json(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
