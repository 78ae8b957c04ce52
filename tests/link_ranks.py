"""A rank for tests of links, and of what ranks agree on: `python -m tests.link_ranks FILE WHAT...`.

It does each of WHAT, and rank 0 writes what was found, by name. A check that fails ends the rank,
and with it the test.
"""

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from profiles.files import canonical_json, write_text
from profiles.measure import sweep
from profiles.measure.buffers import Arena
from profiles.measure.collectives import COLLECTIVES, MESSAGES, collective_call, own_group
from profiles.measure.host import time_host
from profiles.measure.interference import time_interference
from profiles.measure.kernels import repeat
from profiles.measure.links import LinkPoint, free_bytes, group_shapes, link_points, time_links
from profiles.measure.ops import builder
from profiles.measure.ranks import gathered_fabric, gathered_texts, joined, nodes
from profiles.measure.sweep import KernelPoint
from profiles.measure.timing import Call, Clock
from profiles.profile import CollectiveSample
from profiles.surface import Shape

NUM_ELEMENTS = 48


def ignore(_: object) -> None:
    """Be told, and do nothing."""


def check_calls(_: torch.device) -> object:
    """Each collective must move what its name says, in groups of every shape."""
    num_calls = 0
    for shape in group_shapes(dist.get_world_size()):
        group = own_group(*shape)
        assert group is not None
        members = dist.get_process_group_ranks(group)
        gaps = {b - a for a, b in pairwise(members)}
        assert (len(members), gaps) == (shape[0], {shape[1]})
        for kind in COLLECTIVES + MESSAGES * (shape[0] == 2):
            check_call(kind, group, members)
            num_calls += 1
    return num_calls


def check_call(kind: str, group: dist.ProcessGroup, members: Sequence[int]) -> None:
    """Run one collective over buffers that hold the rank, and compare with the closed form."""
    rank, each = dist.get_rank(), NUM_ELEMENTS // len(members)
    full, other = torch.empty(NUM_ELEMENTS), torch.empty(NUM_ELEMENTS)
    call = collective_call(kind, group, full, other)
    full.fill_(rank)
    other.fill_(rank)
    made = call()
    parts = torch.tensor(members, dtype=torch.float32).repeat_interleave(each)
    expected = {
        "all_reduce": (full, other.new_full((NUM_ELEMENTS,), sum(members))),
        "all_reduce_copy": (other.new_full((NUM_ELEMENTS,), rank), None),
        "all_gather": (parts, None),
        "reduce_scatter": (None, other.new_full((each,), sum(members))),
        "all_to_all": (None, parts),
        "broadcast": (other.new_full((NUM_ELEMENTS,), members[0]), None),
        "send_recv": (other.new_full((NUM_ELEMENTS,), members[0]), None),
        "exchange": (None, other.new_full((NUM_ELEMENTS,), sum(members) - rank)),
    }
    for found, wanted in zip((full, other), expected[kind], strict=True):
        assert wanted is None or torch.equal(found[: len(wanted)], wanted), (kind, found, wanted)
    if kind == "all_reduce_copy":
        assert isinstance(made, torch.Tensor)
        assert torch.equal(made, other.new_full((NUM_ELEMENTS,), sum(members)))


def time_few(device: torch.device) -> object:
    """Time three sizes, with one kind that the backend refuses."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("this backend does not support alltoall\nand says more")

    points = link_points(dist.get_world_size(), True, 4 << 14)
    kept: list[int] = []
    with patch.object(dist, "all_to_all_single", refuse):
        timed = time_links(
            device, points, True, Clock(100, device), ignore, lambda s: kept.append(len(s))
        )
    texts = gathered_texts(canonical_json(timed), device)
    return {"timed": timed, "kept": kept, "is_same": len(set(texts)) == 1}


def time_nothing(device: torch.device) -> object:
    """Have a clock that is over at once: the smallest size alone is timed, of all kinds."""
    points = link_points(dist.get_world_size(), True, 4 << 14)
    return time_links(device, points, True, Clock(0, device), ignore, ignore)


def meet(device: torch.device) -> object:
    """Say where the ranks are, how the nodes are wired, and how long one message takes."""
    kept: list[CollectiveSample] = []
    points = [
        LinkPoint(kind=kind, group_size=2, size_bytes=4096) for kind in ("all_reduce", "send_recv")
    ]
    time_links(device, points, True, Clock(10, device), ignore, kept.extend)
    return {
        "nodes": nodes(device),
        "fabric": gathered_fabric(device),
        "samples": kept,
        "free_bytes": free_bytes(device),
    }


def interfere(device: torch.device) -> object:
    """Time kernels and collectives at once, and the host's launches."""
    return {
        "interference": time_interference(device, "fp32", 2, Clock(2, device), ignore),
        "odd": time_interference(device, "fp32", 3, Clock(2, device), ignore),
        "host": time_host(device, ("launch", "launch_gap"), True, ignore),
    }


def lame_builder(op: str, variant: str = "") -> object:
    """Return the builder of `op`, which on the second rank is out of memory at 8192 elements."""

    def build(arena: Arena, shape: Shape) -> Call:
        if dist.get_rank() == 1 and shape == (8192,):
            raise torch.OutOfMemoryError("no more")
        return builder(op, variant)(arena, shape)

    return build


def time_lame(device: torch.device) -> object:
    """Time two kernels, one of which the second rank cannot run; what each rank found."""
    points = [KernelPoint(op="add_forward", dtype="fp32", shape=(size,)) for size in (4096, 8192)]
    with patch.object(sweep, "builder", lame_builder):
        found = repeat(device, points, True, Clock(60.0, device), ignore, ignore)
    return [json.loads(text) for text in gathered_texts(canonical_json(found), device)]


WHAT = {f.__name__: f for f in (check_calls, time_few, time_nothing, time_lame, meet, interfere)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as own:
        FOUND = {what: WHAT[what](own) for what in sys.argv[2:]}
        if dist.get_rank() == 0:
            write_text(Path(sys.argv[1]), canonical_json(FOUND))
