"""How the groups of a mesh of ranks spread over blocks of neighbouring ranks: nodes, or pods.

Blocks are filled with ranks one after the other, and of all groups of a kind, which all ranks
belong to, the worst counts. Legend: a group of n ranks that lie s apart spreads over a run of
L = n s ranks, which is that of s groups; such runs fill the mesh, and a border between blocks may
cut one, at a distance x from its start.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

Mesh = tuple[tuple[str, int], ...]
"""The axes of a mesh with their degrees, from the innermost on."""


class Slice(NamedTuple):
    """Which ranks form a group: of those that differ on `axes` only, in order, each `step`-th.

    `size` of them do, and the next begin another group.
    """

    axes: tuple[str, ...]
    size: int
    step: int = 1


class _Level(NamedTuple):
    """So many ranks, or equal parts of a group, that lie `stride` apart."""

    size: int
    stride: int

    @property
    def run(self) -> int:
        return self.size * self.stride


@lru_cache(maxsize=1 << 16)
def fewest_together(mesh: Mesh, group: Slice, block: int) -> int:
    """Return how many members a group has at least in a block of so many ranks, if it has any.

    All of them where no group leaves its block. Else, of the groups whose run is cut at x, the
    worst has floor(min(x, L - x) / s) of them on one side, but at least one.

    >>> mesh = (("tp", 2), ("cp", 1), ("dp", 12), ("pp", 4))
    >>> [fewest_together(mesh, Slice(("dp",), 12), block) for block in (8, 12, 16, 48)]
    [4, 6, 4, 12]
    """
    num_ranks, levels = _num_ranks(mesh), _levels(mesh, group)
    if len(levels) == 1:
        return _fewest(levels[0], block, num_ranks)
    if levels and block % levels[0].run == 0:
        part = levels[0].run
        return levels[0].size * _fewest(_of_parts(levels), block // part, num_ranks // part)
    if levels and levels[0].run % block == 0:
        return _fewest(levels[0], block, num_ranks)
    return _counted(mesh, group, block)[0]


@lru_cache(maxsize=1 << 16)
def ranks_per_leaver(mesh: Mesh, group: Slice, block: int) -> float:
    """Return how many ranks a block has at least for each of its groups that leave it.

    Infinite where no group leaves its block; the members of a group in a block, where all do and
    all blocks are alike. Of a piece of a run, of l < L ranks, min(s, l, L - l) groups have members
    in it and outside of it.

    >>> mesh = (("tp", 2), ("cp", 1), ("dp", 12), ("pp", 4))
    >>> [ranks_per_leaver(mesh, Slice(("dp",), 12), block) for block in (8, 12, 16, 48)]
    [4.0, 6.0, 4.0, inf]
    """
    num_ranks, levels = _num_ranks(mesh), _levels(mesh, group)
    if len(levels) == 1:
        return _per_leaver(levels[0], block, num_ranks)
    if levels and block % levels[0].run == 0:
        part = levels[0].run
        return levels[0].size * _per_leaver(_of_parts(levels), block // part, num_ranks // part)
    if levels and levels[0].run % block == 0:
        return block / min(levels[0].stride, block)
    return _counted(mesh, group, block)[1]


def _num_ranks(mesh: Mesh) -> int:
    return math.prod(degree for _, degree in mesh)


def _levels(mesh: Mesh, group: Slice) -> tuple[_Level, ...]:
    """Return the group as one level, or as two of which the outer joins runs of the inner.

    Nothing where it is neither: a group that ends within an axis and goes on on the next.
    """
    levels: list[_Level] = []
    stride = 1
    for axis, degree in mesh:
        if axis in group.axes and degree > 1:
            if levels and levels[-1].run == stride:
                levels[-1] = _Level(levels[-1].size * degree, levels[-1].stride)
            else:
                levels.append(_Level(degree, stride))
        stride *= degree
    _, size, step = group
    inner = levels[0]
    if inner.size % (size * step) == 0:
        return (_Level(size, inner.stride * step),)
    if len(levels) != 2 or inner.size * levels[1].size % (size * step):
        return ()
    if step % inner.size == 0:
        return (_Level(size, levels[1].stride * step // inner.size),)
    if inner.size % step or size * step % inner.size:
        return ()
    outer = _Level(size * step // inner.size, levels[1].stride)
    return _Level(inner.size // step, inner.stride * step), outer


def _of_parts(levels: tuple[_Level, ...]) -> _Level:
    """Return the outer level where the runs of the inner one are the ranks."""
    return _Level(levels[1].size, levels[1].stride // levels[0].run)


def _fewest(level: _Level, block: int, num_ranks: int) -> int:
    """Return `fewest_together` of a group of one level."""
    run = level.run
    if run % block == 0:
        return min(level.size, max(1, block // level.stride))
    borders = range(block, num_ranks, block)[: run // math.gcd(run, block)]
    cuts = [border % run for border in borders if border % run]
    if not cuts:
        return level.size
    nearest = min(min(cut, run - cut) for cut in cuts)
    return max(1, min(nearest, block) // level.stride)


def _per_leaver(level: _Level, block: int, num_ranks: int) -> float:
    """Return `ranks_per_leaver` of a group of one level."""
    run, least = level.run, math.inf
    starts = range(0, num_ranks, block)
    for start in {*starts[: run // math.gcd(run, block)], starts[-1]}:
        end = min(start + block, num_ranks)
        is_inside = start // run == (end - 1) // run
        pieces = (end - start,) if is_inside else (-start % run, end % run)
        leavers = sum(min(level.stride, piece, run - piece) for piece in pieces)
        if leavers:
            least = min(least, (end - start) / leavers)
    return least


def _counted(mesh: Mesh, group: Slice, block: int) -> tuple[int, float]:
    """Return `fewest_together` and `ranks_per_leaver` by looking at every rank."""
    places = [place for place, (axis, _) in enumerate(reversed(mesh)) if axis in group.axes]
    ranks = np.arange(_num_ranks(mesh)).reshape([degree for _, degree in reversed(mesh)])
    rows = np.moveaxis(ranks, places, range(-len(places), 0))
    rows = rows.reshape(-1, math.prod(ranks.shape[place] for place in places))
    whole = rows.shape[1] // (group.size * group.step) * group.size * group.step
    rows = rows[:, :whole].reshape(-1, group.size, group.step).swapaxes(1, 2)
    blocks = rows.reshape(-1, group.size) // block
    leaving = blocks[blocks[:, 0] != blocks[:, -1]]
    if not len(leaving):
        return group.size, math.inf
    begins = np.ones(leaving.shape, np.bool_)
    begins[:, 1:] = leaving[:, 1:] != leaving[:, :-1]
    members = np.diff(np.flatnonzero(begins), append=leaving.size)
    leavers = np.bincount(leaving[begins])
    held = np.bincount(ranks.ravel() // block)[: len(leavers)]
    is_left = leavers > 0
    return int(members.min()), float((held[is_left] / leavers[is_left]).min())
