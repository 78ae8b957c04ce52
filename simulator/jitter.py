"""Chance without order: every duration is drawn from what it belongs to, not from when it is asked.

A factor is looked up in a table of 4,096 quantiles by a hash of (seed, part, stage, micro-batch).
Whoever asks, in whatever order, gets the same number, so all engines draw alike, bit for bit.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import exp
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64

FACTOR_BITS = 20
"""Factors are whole multiples of 2^-20: products are exact, and the same on every machine."""
TABLE_BITS = 12
MASK = 0xFFFFFFFF
MULTIPLIER_1, MULTIPLIER_2, STRIDE = 0x7FEB352D, 0x45D9F3B, 0x1E3779B9


@dataclass(frozen=True, slots=True, kw_only=True)
class Jitter:
    """Log-normal noise of mean 1: `compute_spread` and `message_spread` are standard deviations
    of the logarithm, for actions and for messages.
    """

    seed: int
    compute_spread: float
    message_spread: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MASK:
            raise ValueError(f"jitter.seed is {self.seed}; it must be from 0 to {MASK}")
        for name in ("compute_spread", "message_spread"):
            if not 0 <= (value := getattr(self, name)) <= 2:
                raise ValueError(f"jitter.{name} is {value}; it must be from 0 to 2")

    def tables(self) -> Int64:
        """Return the quantile tables [2, 4096] of compute and messages, in units of 2^-20."""
        return np.stack((quantile_table(self.compute_spread), quantile_table(self.message_spread)))

    def apply(
        self, ns: Int64, part: npt.ArrayLike, stage: npt.ArrayLike, microbatch: npt.ArrayLike
    ) -> Int64:
        """Return the times `ns` [N], each multiplied by its factor and rounded down.

        `part` is 0 to 3 for the actions F, B, I, W and 4 or 5 for the messages of a forward and of
        a backward; anything above is left as it is.
        """
        part = np.asarray(part, np.int64)
        stage, microbatch = np.asarray(stage, np.int64), np.asarray(microbatch, np.int64)
        place = draws(self.seed, part, stage, microbatch)
        factor = self.tables()[(part >= 4).astype(np.int64), place]
        return np.where(part < 6, scaled(ns, factor), ns)


def scaled(ns: Int64, factor: Int64) -> Int64:
    """Return `ns` times `factor` / 2^20, rounded down, without leaving int64."""
    low = ns & ((1 << FACTOR_BITS) - 1)
    return (ns >> FACTOR_BITS) * factor + ((low * factor) >> FACTOR_BITS)


def draws(seed: int, part: Int64, stage: Int64, microbatch: Int64) -> Int64:
    """Return a place from 0 to 4095 for each (part, stage, micro-batch).

    Two rounds of a 32-bit multiply-and-shift hash; every product stays below 2^63, so that the
    same lines give the same numbers compiled, interpreted and vectorised.

    >>> draws(1, *np.array([[0, 0], [3, 3], [0, 1]])).tolist()
    [2789, 2317]
    """
    key = mix(mix((seed ^ (part * STRIDE)) & MASK) ^ stage)
    place: Int64 = mix(key ^ (microbatch & MASK)) >> (32 - TABLE_BITS)
    return place


def mix(x: Int64) -> Int64:
    """Return 32 bits that depend on all 32 bits of `x`."""
    x = ((x ^ (x >> 16)) * MULTIPLIER_1) & MASK
    x = ((x ^ (x >> 15)) * MULTIPLIER_2) & MASK
    mixed: Int64 = x ^ (x >> 16)
    return mixed


@lru_cache(maxsize=256)
def quantile_table(spread: float) -> Int64:
    """Return 4,096 equally likely factors of a log-normal of mean 1, in units of 2^-20."""
    normal = NormalDist()
    factors = np.array([exp(spread * normal.inv_cdf((i + 0.5) / 4096)) for i in range(4096)])
    table: Int64 = np.round(factors / factors.mean() * (1 << FACTOR_BITS)).astype(np.int64)
    table.flags.writeable = False
    return table
