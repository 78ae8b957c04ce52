"""Intervals of predictions: how far published runs lay from them.

Split conformal prediction (Vovk et al., 2005): P10 and P90 are those of measured over predicted
among runs of a stack on a GPU that the scalars were fitted to. Runs that nothing was fitted to take
the band of predictions made without their own group, and where a kernel or link was extrapolated
the band is wider still.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import NamedTuple

WIDER = 1.5
"""How much wider, in logarithms, a band is that rests on extrapolated curves."""
UNSEEN = "unseen"


class Band(NamedTuple):
    """P10 and P90 over the median."""

    low: float
    high: float


def band_of(stack: str, gpu: str, is_extrapolated: bool) -> Band:
    """Return the band of a prediction for `stack` on `gpu`."""
    bands = _bands()
    own = bands.get(f"{stack} {gpu}")
    band = own or bands.get(UNSEEN, Band(0.8, 1.25))
    if own or not is_extrapolated:
        return band
    return Band(band.low**WIDER, band.high**WIDER)


@cache
def _bands() -> Mapping[str, Band]:
    path = resources.files("profiles").joinpath("data", "scalars.json")
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))["bands"]
    return {name: Band(*found[name]) for name in sorted(found)}
