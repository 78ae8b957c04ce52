"""Intervals of predictions: how far published runs lay from them.

Conformal prediction (Vovk et al., 2005) by kinds of runs: P10 and P90 are those of measured over
predicted among the runs of a stack on a GPU. The scalars, at most eight, were fitted to the same
runs. What nothing was fitted to takes the band of predictions made without their own group,
each group counting alike, and where its curves are extrapolated the band is wider still.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from profiles.presets import calibrated

FEWEST = 8
"""Runs that a band takes."""
WIDER = 1.5
"""How much wider, in logarithms, a band is that rests on extrapolated curves."""
UNSEEN = "unseen"


class Band(NamedTuple):
    """P10 and P90 over the median."""

    low: float
    high: float


class Pair(NamedTuple):
    """A prediction beside its run: predicted over measured step."""

    group: str
    stack: str
    gpu: str
    ratio: float


def conformal_bands(pairs: Sequence[Pair], unseen: Sequence[Pair]) -> dict[str, Band]:
    """Return the bands by stack and GPU, and the one of what nothing was fitted to.

    `pairs` were predicted by scalars that had seen their group, `unseen` without. A stack on a GPU
    with less than `FEWEST` runs has none of its own. Among the unseen each group counts alike.
    """
    known: dict[str, list[Pair]] = {}
    for pair in pairs:
        known.setdefault(f"{pair.stack} {pair.gpu}", []).append(pair)
    bands = {name: _band(found) for name, found in sorted(known.items()) if len(found) >= FEWEST}
    if unseen:
        bands[UNSEEN] = _band(unseen, power=1.0)
    return bands


def _band(pairs: Sequence[Pair], power: float = 0.5) -> Band:
    """Return P10 and P90 of measured over predicted, never so that the median lies outside.

    A group of n runs weighs n to the power of 1 - `power`: the root of its runs, as in the fits, or
    as much as any other.
    """
    counts = Counter(pair.group for pair in pairs)
    ratios = np.array([1 / pair.ratio for pair in pairs])
    weights = np.array([counts[pair.group] ** -power for pair in pairs])
    order = np.argsort(ratios, kind="stable")
    places = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    low, high = (ratios[order][int(np.argmin(np.abs(places - level)))] for level in (0.1, 0.9))
    return Band(min(1.0, _digits(low, math.floor)), max(1.0, _digits(high, math.ceil)))


def _digits(value: float, towards: Callable[[float], int]) -> float:
    """Return `value` with four digits behind the point, outwards so that its run stays inside."""
    return towards(value * 1e4) / 1e4


def band_of(stack: str, gpu: str, is_extrapolated: bool) -> Band:
    """Return the band of a prediction for `stack` on `gpu`."""
    bands = _bands()
    own = bands.get(f"{stack} {gpu}")
    band = own or bands[UNSEEN]
    if own or not is_extrapolated:
        return band
    return Band(band.low**WIDER, band.high**WIDER)


@cache
def _bands() -> Mapping[str, Band]:
    found = calibrated().get("bands", {})
    return {name: Band(*found[name]) for name in sorted(found)}
