"""Find the numbers of a formula that predict published times best, robustly and repeatably."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from profiles.published.rows import AttentionRow, MatmulRow, MemoryRow

Numbers = dict[str, float]
Residuals = Callable[[Numbers], list[float]]
Vector = npt.NDArray[np.float64]
Row = TypeVar("Row", MatmulRow, AttentionRow, MemoryRow)

NUM_FOLDS = 5
# The search: the step of its differences, where a residual no longer counts as an outlier, the
# least gain of a step, and the damping at which no step helps any more.
DIFFERENCE = 0.02
LEAST_RESIDUAL = 0.01
LEAST_GAIN = 1e-4
MOST_DAMPING = 1e4


class Fit(NamedTuple):
    """Numbers that were found, with their errors in and out of the sample."""

    numbers: Numbers
    errors: Mapping[str, float]


def search(residuals: Residuals, start: Numbers) -> Numbers:
    """Return positive numbers near `start` that make the mean of |residuals| least.

    Levenberg and Marquardt's steps in the logarithms of the numbers, on squares weighted by
    1 / |residual|: the sum of these is the sum of |residuals|.

    >>> round(search(lambda at: [at["x"] - 3, at["x"] - 3, at["x"] - 9], {"x": 1.0})["x"], 1)
    3.0
    """
    names, damping = list(start), 1e-2

    def at(point: Vector) -> Numbers:
        return dict(zip(names, np.exp(point).tolist(), strict=True))

    point = np.log(np.array(list(start.values())))
    now = np.array(residuals(at(point)))
    while damping < MOST_DAMPING:
        slopes = np.stack(
            [
                (np.array(residuals(at(point + DIFFERENCE * unit))) - now) / DIFFERENCE
                for unit in np.eye(len(names))
            ]
        )
        weighted = slopes / np.maximum(np.abs(now), LEAST_RESIDUAL)
        square, pull = weighted @ slopes.T, weighted @ now
        while damping < MOST_DAMPING:
            ridge = damping * (np.diag(square) + 1e-9)
            step = -np.linalg.solve(square + np.diag(ridge), pull)
            tried = np.array(residuals(at(point + np.clip(step, -1.0, 1.0))))
            if np.abs(tried).mean() < np.abs(now).mean() * (1 - LEAST_GAIN):
                point, now, damping = point + np.clip(step, -1.0, 1.0), tried, damping / 4
                break
            damping *= 4
    return at(point)


def fit(rows: Sequence[Row], predict: Callable[[Numbers, Row], float], start: Numbers) -> Fit:
    """Return the numbers that predict `rows` best, and how well they do."""

    def residuals_over(part: Sequence[Row]) -> Residuals:
        return lambda at: [math.log(predict(at, row) / row.ns) for row in part]

    def errors(at: Numbers, part: Sequence[Row]) -> list[float]:
        return [abs(predict(at, row) / row.ns - 1) for row in part]

    found = search(residuals_over(rows), start)
    left_out: list[float] = []
    for fold in range(NUM_FOLDS):
        kept = [row for place, row in enumerate(rows) if place % NUM_FOLDS != fold]
        left_out += errors(search(residuals_over(kept), found), rows[fold::NUM_FOLDS])
    inside = errors(found, rows)
    return Fit(
        found,
        {
            "rows": len(rows),
            "median": round(statistics.median(inside), 3),
            "p90": round(statistics.quantiles(inside, n=10)[-1], 3),
            "cross_median": round(statistics.median(left_out), 3),
            "cross_p90": round(statistics.quantiles(left_out, n=10)[-1], 3),
        },
    )
