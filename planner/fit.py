"""Fitting the scalars of stacks to measured runs.

Errors are taken in logarithms and weigh less the larger they are (Huber), each group of runs weighs
the square root of its runs, and every scalar is held near what all stacks share, those near their
neutral values. So a stack with few runs stays close to the others and one with none has theirs. The
search is Gauss-Newton with the best of four dampings, all candidates walked side by side; nothing
in it is random.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from planner.reference.program import Floats, lanes_of
from planner.reference.step import StepModel
from profiles.stack import SCALARS, Scalar

SPREADS: Mapping[str, float] = {
    "matmul": 0.15, "attention": 0.4, "memory": 0.4, "launch": 0.7, "intra": 0.4, "inter": 0.4,
    "exposed": 0.3, "step": 1.5, "message": 4.0, "crossing": 4.0, "spanning": 4.0,
}  # fmt: skip
"""How far a stack may lie from its neighbours: standard deviations of ln(scalar), of `exposed`
itself.
"""
STARTS: Mapping[str, tuple[float, ...]] = {
    "launch": (3.0, 5.0, 10.0, 20.0, 40.0),
    "message": (100.0, 1e4, 3e5),
    "crossing": (1.0, 200.0),
    "spanning": (1.0, 30.0),
}
"""Where the search may begin: what binds is either the host or the device, and a step downhill from
one side does not see the other.
"""
HOLD = 4.0
"""How many runs it takes to outweigh what is known before."""
HUBER = 0.08
"""From which error on (ln) a run counts as an outlier, and pulls no harder."""
MAX_ROUNDS = 25
DAMPINGS = (1e-3, 1e-1, 1.0, 10.0)
PROBE = 0.03
"""How far a scalar is moved (ln) to see what it changes."""
SMALLEST = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured run, ready to be predicted for any scalars."""

    group: str
    stack: str
    gpu: str
    calibrates: tuple[str, ...]
    model: StepModel
    measured_ns: float


class Fit(NamedTuple):
    """The scalars that were found, and the standard deviation of each in its own space."""

    place: Floats
    spread: Floats


def predicted_ns(samples: Sequence[Sample], found: Fit) -> Floats:
    """Return the step of each sample, float64 [N], under the scalars of `found`."""
    return np.exp(_logs(samples, found.place[:, None])[:, 0])


def fit(samples: Sequence[Sample], start: Fit, names: Sequence[str]) -> Fit:
    """Return the scalars `names` that fit `samples` best; the others stay at `start`."""
    free = np.array([list(SCALARS).index(name) for name in names], np.intp)
    low, high = _bounds()
    measured = np.log([sample.measured_ns for sample in samples])
    weights = _weights(samples)
    hold = HOLD / np.array([SPREADS[name] for name in SCALARS]) ** 2

    def loss(places: Floats, predicted: Floats) -> Floats:
        errors = np.abs(predicted - measured[:, None])
        huber = np.where(errors < HUBER, errors**2 / 2, HUBER * (errors - HUBER / 2))
        held = (hold[:, None] * (places - start.place[:, None]) ** 2).sum(axis=0) / 2
        return np.asarray((weights[:, None] * huber).sum(axis=0) / HUBER**2 + held)

    places = _starts(start, names)
    place = places[:, int(np.argmin(loss(places, _logs(samples, places))))]
    curvature = np.diag(hold)
    for _ in range(MAX_ROUNDS):
        curvature, slope, now = _linearised(
            samples, measured, weights, place, start.place, hold, free
        )
        tried = np.repeat(place[:, None], len(DAMPINGS), axis=1)
        for column, damping in enumerate(DAMPINGS):
            damped = curvature + damping * np.diag(np.diag(curvature))
            tried[free, column] += np.clip(np.linalg.solve(damped, slope), -1, 1)
        tried = np.clip(tried, low[:, None], high[:, None])
        losses = loss(tried, _logs(samples, tried))
        best, before = int(np.argmin(losses)), float(loss(place[:, None], now[:, None])[0])
        if losses[best] < before:
            place = tried[:, best]
        if losses[best] >= before * (1 - 1e-4):
            break
    spread = np.zeros_like(place)
    spread[free] = np.sqrt(np.diag(np.linalg.inv(curvature)))
    return Fit(place=place, spread=spread)


def _starts(start: Fit, names: Sequence[str]) -> Floats:
    """Return the places, [scalars, L], that the search may begin at."""
    grids = [STARTS[name] for name in SCALARS if name in STARTS and name in names]
    rows = [row for row, name in enumerate(SCALARS) if name in STARTS and name in names]
    corners = list(product(*grids))
    places = np.repeat(start.place[:, None], len(corners), axis=1)
    for column, corner in enumerate(corners):
        for row, value in zip(rows, corner, strict=True):
            places[row, column] = np.log(value)
    return places


def _linearised(
    samples: Sequence[Sample], measured: Floats, weights: Floats, place: Floats, start: Floats,
    hold: Floats, free: "np.ndarray[tuple[int], np.dtype[np.intp]]",
) -> tuple[Floats, Floats, Floats]:  # fmt: skip
    """Return curvature and slope of the loss over the free scalars, and the predictions there."""
    low, high = _bounds()
    probes = np.repeat(place[:, None], 1 + 2 * len(free), axis=1)
    for number, scalar in enumerate(free):
        probes[scalar, 1 + 2 * number] = min(place[scalar] + PROBE, high[scalar])
        probes[scalar, 2 + 2 * number] = max(place[scalar] - PROBE, low[scalar])
    logs = _logs(samples, probes)
    widths = probes[free, 1 + 2 * np.arange(len(free))] - probes[free, 2 + 2 * np.arange(len(free))]
    jacobian = (logs[:, 1::2] - logs[:, 2::2]) / widths
    errors = logs[:, 0] - measured
    pull = weights * np.minimum(1, HUBER / np.maximum(np.abs(errors), 1e-9)) / HUBER**2
    curvature = jacobian.T @ (pull[:, None] * jacobian) + np.diag(hold[free])
    slope = -jacobian.T @ (pull * errors) - hold[free] * (place - start)[free]
    return curvature, slope, logs[:, 0]


def _logs(samples: Sequence[Sample], places: Floats) -> Floats:
    """Return ln of the predicted steps in ns, [N, L], for `places` [scalars, L]."""
    values = {name: _outward(name, places[row]) for row, name in enumerate(SCALARS)}
    lanes = lanes_of(values)
    return np.log(np.stack([sample.model.step_ns(lanes) for sample in samples]))


def _weights(samples: Sequence[Sample]) -> Floats:
    counts = Counter(sample.group for sample in samples)
    weights = np.array([counts[sample.group] ** -0.5 for sample in samples])
    return np.asarray(weights * (len(weights) / weights.sum()))


def scalars_of(found: Fit, names: Sequence[str]) -> dict[str, Scalar]:
    """Return the scalars `names` with a band of 80 %, rounded to four digits."""
    low, high = _bounds()
    scalars = {}
    for row, name in enumerate(SCALARS):
        if name in names:
            place, reach = found.place[row], 1.2816 * found.spread[row]
            band = np.clip((place, place - reach, place + reach), low[row], high[row])
            scalars[name] = Scalar(*(float(f"{_outward(name, end):.4g}") for end in band))
    return scalars


def inward(name: str, value: float) -> float:
    """Return the place where the search holds a scalar: its logarithm, or a part itself."""
    return value if name == "exposed" else float(np.log(max(value, SMALLEST)))


def _outward(name: str, place: Floats) -> Floats:
    return np.asarray(place if name == "exposed" else np.exp(place))


def _bounds() -> tuple[Floats, Floats]:
    return (
        np.array([inward(name, meaning.at_least) for name, meaning in SCALARS.items()]),
        np.array([inward(name, meaning.at_most) for name, meaning in SCALARS.items()]),
    )
