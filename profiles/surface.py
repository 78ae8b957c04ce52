"""Interpolation of measured times over shapes: a law of few parts, and kriging of what it leaves.

    ln t(s) = ln law(s) + r(s),        law(s) = c_0 + c_1 w_1(s) + c_2 w_2(s) + ...,   c >= 0

The law is what a kernel or a collective obeys in the large: a constant time and a time for each
unit of its works w_k (flops, bytes). What it leaves over, r, is caches, tiles and waves; it is
interpolated as a Gaussian process over the logarithms of the sizes, which also tells how sure it
is, and where the next measurement would teach most. Source: Rasmussen and Williams, "Gaussian
processes for machine learning" (2006), sections 2.2 and 5.4.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import final

import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]
Floats = npt.NDArray[np.float64]
Works = Callable[[Shape], tuple[float, ...]]

# In natural logarithms of a size: from less than a doubling to more than the whole range.
_LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_NUGGETS = (1e-4, 1e-2, 0.1, 0.4)
# A law that fits this well leaves nothing to interpolate.
_EXACT = 1e-6


@final
class Surface:
    """Times of one kernel or collective over its shapes, as a function that knows its error.

    >>> times = {(size,): 5_000 + 2 * size for size in (1_000, 10_000, 100_000)}
    >>> surface = Surface(times, lambda shape: (float(shape[0]),))
    >>> time_ns, deviation = surface.at((30_000,))
    >>> round(time_ns), deviation
    (65000, 0.0)
    """

    def __init__(
        self,
        times_ns: Mapping[Shape, int],
        works: Works,
        deviations: Mapping[Shape, float] | None = None,
    ) -> None:
        """Fit `times_ns`; `deviations` holds the standard deviation of the logarithm of each.

        Raises ValueError without a time.
        """
        if not times_ns:
            raise ValueError("a surface needs at least one measured time")
        self.shapes = tuple(sorted(times_ns))
        self._works = works
        times = np.array([times_ns[shape] for shape in self.shapes], np.float64)
        self.law = fit_law(np.array([(1.0, *works(shape)) for shape in self.shapes]), times)
        self._places = np.log(np.array(self.shapes, np.float64))
        self._left = np.log(times) - np.log([self._law_ns(shape) for shape in self.shapes])
        noise = [(deviations or {}).get(shape, 0.0) for shape in self.shapes]
        self._noise = np.square(np.array(noise, np.float64))
        self._axes = self._places.min(axis=0), self._places.max(axis=0)
        self._is_exact = bool(np.abs(self._left).max() < _EXACT)
        if not self._is_exact:
            self._krige()

    def _law_ns(self, shape: Shape) -> float:
        return float(np.dot(self.law, (1.0, *self._works(shape))))

    def _krige(self) -> None:
        """Choose the lengths and the nugget of greatest likelihood, and solve for the weights."""
        self._lengths, self._nugget = self._likeliest()
        self._inverse = np.asarray(
            np.linalg.inv(self._matrix(self._lengths, self._nugget)), np.float64
        )
        self._weights = self._inverse @ self._left
        self._scale = max(float(self._left @ self._weights) / len(self._left), 1e-12)

    def _likeliest(self) -> tuple[Floats, float]:
        num_axes = self._places.shape[1]
        _, length, nugget = min(
            (self._unlikelihood(np.full(num_axes, length), nugget), length, nugget)
            for length in _LENGTHS
            for nugget in _NUGGETS
        )
        lengths = np.full(num_axes, length)
        for axis in range(num_axes if num_axes > 1 else 0):
            tried = []
            for length in _LENGTHS:
                lengths[axis] = length
                tried.append((self._unlikelihood(lengths, nugget), length))
            lengths[axis] = min(tried)[1]
        return lengths, nugget

    def _matrix(self, lengths: Floats, nugget: float) -> Floats:
        """Return the correlations plus the nugget, the share that no neighbour can tell: R."""
        matrix = _correlation(self._places, self._places, lengths)
        spread = float(np.square(self._left).mean())
        matrix[np.diag_indices(len(matrix))] += nugget + self._noise / spread
        return matrix

    def _unlikelihood(self, lengths: Floats, nugget: float) -> float:
        """Return n ln(variance) + ln det R, which the greatest likelihood has least.

        The variance of greatest likelihood is r^T R^-1 r / n. One factorisation tells both: the
        last row of the Cholesky factor of [[R, r], [r^T, c]] begins with L^-1 r, where R = L L^T.
        """
        count = len(self._left)
        bordered = np.empty((count + 1, count + 1))
        bordered[:count, :count] = self._matrix(lengths, nugget)
        bordered[count, :count] = bordered[:count, count] = self._left
        # No eigenvalue of R is below the nugget, so r^T R^-1 r is below this corner.
        bordered[count, count] = 2.0 * float(self._left @ self._left) / nugget
        factor = np.linalg.cholesky(bordered)
        solved, diagonal = factor[count, :count], np.diag(factor)[:count]
        variance = max(float(solved @ solved) / count, 1e-12)
        return count * math.log(variance) + 2.0 * float(np.log(diagonal).sum())

    def at(self, shape: Shape) -> tuple[float, float]:
        """Return the time in ns at `shape`, and the standard deviation of its logarithm.

        Raises ValueError for a shape of the wrong length.
        """
        self._check(shape)
        law_ns = self._law_ns(shape)
        if self._is_exact:
            return law_ns, 0.0
        near = _correlation(np.log([shape]), self._places, self._lengths)[0]
        variance = self._scale * max(1.0 + self._nugget - float(near @ self._inverse @ near), 0.0)
        return law_ns * math.exp(float(near @ self._weights)), math.sqrt(variance)

    def times(self, shapes: Sequence[Shape]) -> Floats:
        """Return the times in ns at many shapes; those of `at`, at once."""
        laws = np.array([self._law_ns(shape) for shape in shapes])
        if self._is_exact:
            return laws
        near = _correlation(np.log(np.array(shapes, np.float64)), self._places, self._lengths)
        times: Floats = laws * np.exp(near @ self._weights)
        return times

    def deviations(self, shapes: Sequence[Shape], also: Sequence[Shape] = ()) -> Floats:
        """Return the standard deviations of the logarithm at many shapes.

        With `also` it is as if those shapes had been measured too: the variance of kriging depends
        on where was measured, not on what was found.
        """
        if self._is_exact:
            return np.zeros(len(shapes))
        places = np.log(np.array(shapes, np.float64))
        near = _correlation(places, self._places, self._lengths)
        explained = ((near @ self._inverse) * near).sum(axis=1)
        if also:
            more = np.log(np.array(also, np.float64))
            known = self._inverse @ _correlation(self._places, more, self._lengths)
            left = _correlation(places, more, self._lengths) - near @ known
            own = _correlation(more, more, self._lengths) + self._nugget * np.eye(len(more))
            own -= _correlation(more, self._places, self._lengths) @ known
            explained += ((left @ np.linalg.inv(own)) * left).sum(axis=1)
        variance: Floats = self._scale * np.maximum(1.0 + self._nugget - explained, 0.0)
        return np.asarray(np.sqrt(variance), np.float64)

    def nearest(self, shapes: Sequence[Shape]) -> npt.NDArray[np.intp]:
        """Return the index in `self.shapes` of the measured shape most like each of `shapes`."""
        places = np.log(np.array(shapes, np.float64))
        lengths = np.ones(places.shape[1]) if self._is_exact else self._lengths
        return np.asarray(_correlation(places, self._places, lengths).argmax(axis=1), np.intp)

    def nearness(self, shape: Shape) -> Floats:
        """Return how much each measured shape, in the order of `shapes`, tells of `shape`."""
        self._check(shape)
        lengths = np.ones(len(shape)) if self._is_exact else self._lengths
        weights = _correlation(np.log([shape]), self._places, lengths)[0] ** 2 + 1e-12
        share: Floats = weights / weights.sum()
        return share

    def covers(self, shape: Shape) -> bool:
        """Return whether every size of `shape` lies between the least and the most measured."""
        self._check(shape)
        place, (low, high) = np.log(shape), self._axes
        return bool((place >= low - 1e-9).all() and (place <= high + 1e-9).all())

    def left_out(self) -> tuple[Floats, Floats]:
        """Return, in the order of `shapes`, how far each is predicted wrong by all others, as the
        difference of logarithms, and the standard deviation that the others state for it.

        In closed form: e_i = [R^-1 r]_i / [R^-1]_ii and s_i^2 = variance / [R^-1]_ii. Source:
        Rasmussen and Williams, equations 5.10 to 5.12. The law stays that of all shapes.
        """
        if self._is_exact:
            return np.zeros(len(self.shapes)), np.zeros(len(self.shapes))
        diagonal = np.diag(self._inverse)
        return self._weights / diagonal, np.sqrt(self._scale / diagonal)

    def _check(self, shape: Shape) -> None:
        if len(shape) != len(self.shapes[0]) or min(shape) < 1:
            raise ValueError(
                f"the shape is {shape}; it must be {len(self.shapes[0])} sizes of at least 1"
            )


def _correlation(left: Floats, right: Floats, lengths: Floats) -> Floats:
    """Return exp(-d) (1 + d) of the scaled distances d: Matern's correlation of smoothness 3/2.

    Source: Rasmussen and Williams, equation 4.17.
    """
    apart = (left[:, None, :] - right[None, :, :]) / lengths
    distance = np.sqrt(3.0 * np.square(apart).sum(axis=2))
    correlation: Floats = np.exp(-distance) * (1.0 + distance)
    return correlation


def fit_law(works: Floats, times_ns: Floats) -> Floats:
    """Return the coefficients c >= 0 [k] of the law `works` [n, k] c = `times_ns` [n].

    Least squares of the relative errors, over every choice of columns that are not 0 (the columns
    are few): the best without a negative coefficient.

    >>> fit_law(np.array([[1.0, 10.0], [1.0, 20.0]]), np.array([25.0, 45.0])).round(6).tolist()
    [5.0, 2.0]
    """
    count = works.shape[1]
    relative = works / times_ns[:, None]
    best = (math.inf, np.zeros(count))
    for size in range(1, count + 1):
        for columns in combinations(range(count), size):
            part = relative[:, columns]
            scale = np.abs(part).max(axis=0)
            if (scale == 0).any():
                continue
            found = np.linalg.lstsq(part / scale, np.ones(len(part)), rcond=None)[0] / scale
            error = float(np.square(part @ found - 1.0).sum())
            if (found > 0).all() and error < best[0] * (1 - 1e-9):
                law = np.zeros(count)
                law[list(columns)] = found
                best = (error, law)
    return best[1]
