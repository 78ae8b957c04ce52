"""Recomputation by need: as few layers as make layouts fit, on each pipeline rank its own.

A rank recomputes equally many layers of each of its stages, and no more than it must: it then holds
as much as it can.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.memory import alive_by_rank
from simulator.checks import Int64
from simulator.schedule import Schedule


class Needs(NamedTuple):
    """What P ranks keep of activations when K layers of each of their stages are recomputed.

    `peaks` is [P, K] bytes, falling along K; `layers` [S] are those of the stages, `homes` [S]
    their ranks.
    """

    peaks: Int64
    layers: Int64
    homes: Int64

    @property
    def least(self) -> int:
        """What the fullest rank keeps when all is recomputed."""
        return int(self.peaks[:, -1].max())

    def fewest(self, rooms: Int64) -> tuple[Int64, npt.NDArray[np.bool_]]:
        """Return recomputed layers of each stage, [R, S], and whether they do, [R], for R cases.

        `rooms` [R, P] are the bytes that the ranks of each case have for activations.
        """
        is_over = self.peaks[None, :, :] > rooms[:, :, None]
        counts = is_over.sum(axis=2)
        fits = counts.max(axis=1) < self.peaks.shape[1]
        return np.minimum(counts[:, self.homes], self.layers), fits


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
    peaks = np.array(
        [(held[:, stages] @ alive.T).max(axis=1) for stages, alive in alive_by_rank(schedule)]
    )
    return Needs(peaks, layers, schedule.homes.astype(np.int64))
