"""Recomputation by need: as few layers as make layouts fit, on each pipeline rank its own.

A rank recomputes equally many layers of each of its stages, and no more than it must: it then holds
as much as it can.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from planner.memory import Held, alive_by_rank
from simulator.checks import Int64
from simulator.schedule import Schedule


class Rooms(NamedTuple):
    """What P ranks of R cases hold beside activations, and have left for them, [R, P] each.

    See `planner.memory.Held`; `more` [P] is the memory of each rank beyond that of the smallest.
    """

    left: Int64
    static: Int64
    working: Int64
    made: Int64
    update: Int64
    more: Int64
    context: int
    slack: float

    @classmethod
    def of(cls, held: Sequence[Sequence[Held]], alike: Int64, limits: Int64, host: int) -> Self:
        """Return the rooms of ranks that have `limits` [P] bytes each, and `host` of the host's.

        `held` are R rows of kinds of ranks; `alike` [P] says which of them each rank is.
        """
        places = list(zip(alike.tolist(), limits.tolist(), strict=True))
        unlike = {place: column for column, place in enumerate(dict.fromkeys(places))}
        table = [
            [
                (row[kind].left(limit, host), row[kind].static, row[kind].working, row[kind].made,
                 row[kind].update)
                for kind, limit in unlike
            ]
            for row in held
        ]  # fmt: skip
        own = [unlike[place] for place in places]
        left, static, working, made, update = np.moveaxis(np.array(table, np.int64)[:, own], 2, 0)
        any_rank = held[0][0]
        return cls(
            left=left, static=static, working=working, made=made, update=update,
            more=limits - limits.min(), context=any_rank.context, slack=any_rank.slack,
        )  # fmt: skip

    def rows(self, which: Int64) -> Self:
        """Return some of the cases."""
        left, static, working, made, update = (column[which] for column in self[:5])
        return self._replace(left=left, static=static, working=working, made=made, update=update)


class Needs(NamedTuple):
    """What P ranks keep of activations when K layers of each of their stages are recomputed.

    `peaks` is [P, K] bytes, `single` what they keep of one micro-batch of each stage; `layers` [S]
    are those of the stages, `homes` [S] their ranks.
    """

    peaks: Int64
    single: Int64
    layers: Int64
    homes: Int64

    def fewest(self, rooms: Rooms) -> tuple[Int64, npt.NDArray[np.bool_]]:
        """Return recomputed layers of each stage, [R, S], and whether they do, [R], for R cases."""
        is_over = self.peaks > (rooms.left - rooms.working)[:, :, None]
        if (rooms.made > rooms.working).any():
            is_over |= self.peaks - self.single > (rooms.left - rooms.made)[:, :, None]
        counts = np.argmin(is_over, axis=2)
        does = np.logical_not(np.min(is_over, axis=2))
        fits = np.asarray(np.min(does, axis=1))
        return np.minimum(counts[:, self.homes], self.layers), fits

    def least_bytes(self, rooms: Rooms) -> Int64:
        """Return what the worst rank of each case holds when all is recomputed, [R].

        What a rank has beyond the memory of the smallest is taken off.
        """
        peaks, single = self.peaks[:, -1], self.single[:, -1]
        held = np.maximum(peaks + rooms.working, peaks - single + rooms.made)
        in_use = rooms.static + np.maximum(held, rooms.update)
        reserve = np.rint(rooms.slack * in_use).astype(np.int64)
        return np.asarray((in_use + reserve + rooms.context - rooms.more).max(axis=1))


def needs_of(schedule: Schedule, layers: Int64, kept: Int64, least: Int64) -> Needs:
    """Return the needs of stages that keep `kept` bytes of a micro-batch and `least` at least.

    All are [S]; `least` is what is kept when every one of the `layers` is recomputed.

    >>> from planner.schedules import SCHEDULES
    >>> one = np.array([2, 2])
    >>> needs_of(SCHEDULES["1f1b"].build(2, 4), one, 40 * one, 10 * one).peaks.tolist()
    [[160, 100, 40], [80, 50, 20]]
    """
    counts = np.minimum(np.arange(int(layers.max()) + 1)[:, None], layers)
    held = kept - (kept - least) * counts // np.maximum(layers, 1)
    ranks = alive_by_rank(schedule)
    peaks = np.array([(held[:, stages] @ alive.T).max(axis=1) for stages, alive in ranks])
    single = np.array([held[:, stages].sum(axis=1) for stages, _ in ranks])
    return Needs(peaks, single, layers, schedule.homes.astype(np.int64))
