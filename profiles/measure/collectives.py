"""The collectives and messages that are timed, as calls of one rank in its group."""

from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce, wait_tensor

from profiles.measure.timing import Call

COLLECTIVES = (
    "all_reduce", "all_reduce_copy", "all_gather", "reduce_scatter", "all_to_all", "broadcast",
)  # fmt: skip
MESSAGES = ("send_recv", "exchange")


def own_group(size: int, stride: int = 1) -> dist.ProcessGroup | None:
    """Return this rank's group of `size` ranks, `stride` apart; None for a rank left over.

    Every rank must ask for the same shapes in the same order.
    """
    own, num_ranks = None, dist.get_world_size()
    if size == num_ranks:
        return dist.group.WORLD
    for first in range(0, num_ranks - size * stride + 1, size * stride):
        for offset in range(stride):
            members = [first + offset + i * stride for i in range(size)]
            group = dist.new_group(members)
            if dist.get_rank() in members:
                own = group
    return own


def buffer(size_bytes: int, device: torch.device) -> Tensor:
    """Return at least `size_bytes` of random fp32, which repeat every 4 MiB."""
    seed = torch.randn(1 << 20, device=device)
    return seed.repeat(-(-size_bytes // (4 << 20)))


def collective_call(
    kind: str, group: dist.ProcessGroup | None, full: Tensor, other: Tensor
) -> Call:
    """Return this rank's part in one collective over `full` (for `send_recv`: there and back).

    `other` is a second buffer of that size. A rank without a group has nothing to do.
    """
    if group is None:
        return lambda: None
    part = other[: len(full) // dist.get_world_size(group)]
    if kind == "send_recv":
        return ping_pong(full, group)
    if kind == "exchange":
        return _exchange(full, other, group)
    if kind == "all_reduce":
        # Zeros stay zeros; other values would grow with every call.
        zeros = other.zero_()
        return lambda: dist.all_reduce(zeros, group=group)
    if kind == "all_reduce_copy":
        return reduced_copy(full, group)
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(full, part, group=group)
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, full, group=group)
    if kind == "all_to_all":
        return lambda: dist.all_to_all_single(other, full, group=group)
    if kind == "broadcast":
        return _broadcast(full, group)
    raise ValueError(f"no collective {kind}; known: {', '.join(COLLECTIVES + MESSAGES)}")


def reduced_copy(values: Tensor, group: dist.ProcessGroup) -> Call:
    """Return the call that reduces `values` into a new tensor, as DTensor does it."""
    return lambda: wait_tensor(all_reduce(values, "sum", group))  # type: ignore[no-untyped-call]


def _broadcast(full: Tensor, group: dist.ProcessGroup) -> Call:
    """Return the call whose root moves on: one that stayed would run ahead of its receivers."""
    members = dist.get_process_group_ranks(group)
    turn = count()
    return lambda: dist.broadcast(full, members[next(turn) % len(members)], group=group)


def ping_pong(message: Tensor, group: dist.ProcessGroup) -> Call:
    """Return the call in which one of a pair sends and then receives, the other the reverse."""
    other_rank, is_first = peer(group)
    operations = (dist.isend, dist.irecv) if is_first else (dist.irecv, dist.isend)

    def call() -> None:
        for operation in operations:
            request = dist.P2POp(operation, message, other_rank, group=group)
            for work in dist.batch_isend_irecv([request]):
                work.wait()

    return call


def _exchange(sent: Tensor, received: Tensor, group: dist.ProcessGroup) -> Call:
    """Return the call in which both of a pair send and receive at once."""
    other_rank, _ = peer(group)

    def call() -> None:
        requests = [
            dist.P2POp(dist.isend, sent, other_rank, group=group),
            dist.P2POp(dist.irecv, received, other_rank, group=group),
        ]
        for work in dist.batch_isend_irecv(requests):
            work.wait()

    return call


def peer(group: dist.ProcessGroup) -> tuple[int, bool]:
    """Return the other rank of a pair, and whether this one is its first."""
    first, second = dist.get_process_group_ranks(group)
    is_first = dist.get_rank() == first
    return (second if is_first else first), is_first
