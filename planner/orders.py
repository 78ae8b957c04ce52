"""The orders of named layouts: what they depend on, how long they are, what a short one tells."""

from functools import lru_cache
from typing import NamedTuple

from planner.layout import Layout
from planner.schedules import SCHEDULES
from simulator.schedule import Schedule

MAX_CELLS = 1 << 19
"""Stages times micro-batches of a plan, at most: 64 ranks of 4 stages with 2,048 micro-batches.

A plan writes out two or three actions for each. Here that is a file of 8 to 12 MB; the timeline of
such a step takes half a minute and more than 1 GB, its trace three times as much.
"""
LONG = 512
"""Times its warm-up, from which on a step is folded; a shorter one is walked in less time."""


class NamedOrder(NamedTuple):
    """What the order of a layout with a named schedule depends on."""

    schedule: str
    num_ranks: int
    stages_per_rank: int
    num_microbatches: int

    @property
    def period(self) -> int:
        """By how many micro-batches the order repeats; 0: it does not."""
        return SCHEDULES[self.schedule].period(self.num_ranks)

    @property
    def steady_from(self) -> int:
        """From how many micro-batches on it repeats."""
        return SCHEDULES[self.schedule].steady_from(self.num_ranks, self.num_microbatches)

    @property
    def is_long(self) -> bool:
        """Whether the step repeats so often that folding it pays."""
        return self.period > 0 and self.num_microbatches >= LONG * self.steady_from

    def build(self, num_microbatches: int) -> Schedule:
        """Return the order for so many micro-batches."""
        return SCHEDULES[self.schedule].build(
            self.num_ranks, num_microbatches, self.stages_per_rank
        )

    def whole(self) -> Schedule:
        """Return the order in full."""
        return self.build(self.num_microbatches)

    def sample(self) -> Schedule:
        """Return a schedule with the homes and the peak of activations of this order.

        A long order is a short one with blocks put in. A block starts and ends as many micro-
        batches on each stage, so that all blocks begin with the same ones alive: the peak of the
        first is the peak of all.

        >>> len(NamedOrder("1f1b", 4, 1, 10**6).sample().codes)
        72
        """
        if not self.is_long:
            return self.whole()
        num_left_over = (self.num_microbatches - self.steady_from) % self.period
        return self.build(self.steady_from + self.period + num_left_over)


def order_of(layout: Layout) -> NamedOrder:
    """Return the order of a layout whose schedule has a name."""
    return NamedOrder(layout.schedule, layout.pp, layout.stages_per_rank, layout.num_microbatches)


def sample_of(layout: Layout) -> Schedule:
    """Return `NamedOrder.sample` of a layout; it is kept for others of the same order."""
    return _sampled(order_of(layout))


@lru_cache(maxsize=256)
def _sampled(order: NamedOrder) -> Schedule:
    return order.sample()
