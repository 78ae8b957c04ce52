"""The adaptive sampler: which shapes of a kernel to measure next, and when to stop.

A design starts with shapes that fill the space of its candidates, and goes on where the surface
through what was measured expects its largest error. It measures nothing and has no chance in it:
the same samples give the same choice, on any rank.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from profiles.surface import Shape, Surface, Works

Floats = npt.NDArray[np.float64]

# Corners and centre of the box are not all that is known to matter; by the number of sizes.
_NUM_SEEDS: Mapping[int, int] = {1: 6, 2: 9, 3: 12}
_MOST_SEEDS = 16

# The error of a dear shape weighs more in a step, by about its time; and for the same time more
# cheap shapes can be measured. Between power 1 of the time, which would only measure launches, and
# 0, which would spend all on a few large shapes: at 16 times the time, twice the variance.
_COST_POWER = 0.25

MEDIAN_TARGET, P90_TARGET = 0.04, 0.10


class Stated(NamedTuple):
    """The relative error of a surface by leave-one-out: its median, and its 90th percentile."""

    median: float
    p90: float

    @property
    def excess(self) -> float:
        """How many times the target this is; at most 1 when settled."""
        return max(self.median / MEDIAN_TARGET, self.p90 / P90_TARGET)


@final
class Design:
    """Chooses among `candidates` of one op, dtype and variant; `works` are those of the op.

    `anchors` are measured first, whatever else is. A candidate whose time is predicted to be over
    `longest_ns` is never chosen; `overhead_ns` is what measuring costs beside the calls.

    >>> design = Design([(2**i,) for i in range(20)], lambda shape: (float(shape[0]),))
    >>> design.seeds()[:3]
    ((1,), (524288,), (1024,))
    """

    def __init__(
        self,
        candidates: Iterable[Shape],
        works: Works,
        *,
        anchors: Sequence[Shape] = (),
        longest_ns: float = math.inf,
        overhead_ns: float = 5e6,
    ) -> None:
        self.candidates = tuple(sorted({*candidates, *anchors}))
        if not self.candidates:
            raise ValueError("a design needs at least one candidate shape")
        self._anchors, self._works = tuple(anchors), works
        self._longest_ns, self._overhead_ns = longest_ns, overhead_ns
        seeds = max(_NUM_SEEDS.get(len(self.candidates[0]), _MOST_SEEDS), len(self._anchors))
        self._num_seeds = min(seeds, len(self.candidates))
        self._seen: dict[Shape, int] = {}
        self._surface: Surface | None = None

    def seeds(self) -> tuple[Shape, ...]:
        """Return the shapes to begin with.

        Anchors; of the box of all candidates the corners that exist, low ones first, and what is
        nearest its centre; then again and again the candidate that is farthest from all chosen, on
        logarithmic scales (maximin). Source: Johnson, Moore and Ylvisaker, "Minimax and maximin
        distance designs", J. Stat. Planning and Inference 26 (1990).
        """
        places = _unit_box(self.candidates)
        num_axes = places.shape[1]
        chosen = [self.candidates.index(shape) for shape in self._anchors]
        for target in (*_corners(num_axes), np.full(num_axes, 0.5)):
            apart = np.square(places - target).sum(axis=1)
            index = int(apart.argmin())
            is_corner = bool(np.isin(target, (0.0, 1.0)).all())
            if index not in chosen and not (is_corner and apart[index] > 1e-9):
                chosen.append(index)
        chosen = chosen[: self._num_seeds]
        while len(chosen) < self._num_seeds:
            apart = np.square(places[:, None, :] - places[chosen]).sum(axis=2).min(axis=1)
            chosen.append(int(apart.argmax()))
        return tuple(self.candidates[index] for index in chosen)

    def next(
        self, samples: Mapping[Shape, int], count: int, without: Collection[Shape] = ()
    ) -> tuple[Shape, ...]:
        """Return up to `count` candidates with the largest expected error, given times in ns.

        Those in `without` cannot be measured.

        The expected squared error of the logarithm at x is the kriging variance s^2(x), corrected
        by how wrong the surface is of the measured shape i nearest to x when it is left out:

            s^2(x) (1 + e_i^2 / s_i^2)

        Source: Le Gratiet and Cannamela, "Cokriging-based sequential design strategies using fast
        cross-validation techniques for multi-fidelity computer codes", Technometrics 57 (2015),
        section 3. Of several, each counts those chosen before it as measured.
        """
        surface = self._fitted(samples)
        closed = {*samples, *without}
        open_shapes = [shape for shape in self.candidates if shape not in closed]
        times = surface.times(open_shapes) if open_shapes else np.zeros(0)
        is_short = times <= self._longest_ns
        shapes = [shape for shape, short in zip(open_shapes, is_short, strict=True) if short]
        costs = (times[is_short] + self._overhead_ns) ** _COST_POWER
        chosen: list[Shape] = []
        while shapes and len(chosen) < min(count, len(shapes)):
            scores = surface.deviations(shapes, chosen) ** 2 * self._doubts(surface, shapes) / costs
            scores[[shapes.index(shape) for shape in chosen]] = -1.0
            chosen.append(shapes[int(scores.argmax())])
        return tuple(chosen)

    @staticmethod
    def _doubts(surface: Surface, shapes: Sequence[Shape]) -> Floats:
        """Return 1 + e^2 / s^2 of the measured shape nearest to each of `shapes`."""
        errors, deviations = surface.left_out()
        ratios = np.square(errors) / np.maximum(np.square(deviations), 1e-12)
        doubts: Floats = 1.0 + ratios[surface.nearest(shapes)]
        return doubts

    def error(self, samples: Mapping[Shape, int]) -> Stated:
        """Return the stated error of the surface through `samples`; infinite with few."""
        if len(samples) <= self._num_seeds // 2:
            return Stated(math.inf, math.inf)
        errors = np.abs(np.expm1(self._fitted(samples).left_out()[0]))
        return Stated(float(np.quantile(errors, 0.5)), float(np.quantile(errors, 0.9)))

    def _fitted(self, samples: Mapping[Shape, int]) -> Surface:
        if self._surface is None or self._seen != samples:
            self._seen, self._surface = dict(samples), Surface(samples, self._works)
        return self._surface


def _unit_box(shapes: Sequence[Shape]) -> Floats:
    """Return the logarithms of `shapes`, from 0 at the least to 1 at the most of every size."""
    places = np.log(np.array(shapes, np.float64))
    low, high = places.min(axis=0), places.max(axis=0)
    scaled: Floats = (places - low) / np.where(high > low, high - low, 1.0)
    return scaled


def _corners(num_axes: int) -> list[Floats]:
    """Return the corners of the unit box, those with the fewest high sides first."""
    corners = sorted(product((0.0, 1.0), repeat=num_axes), key=lambda corner: (sum(corner), corner))
    return [np.array(corner) for corner in corners]
