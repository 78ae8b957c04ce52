"""Strikes: Weibull gaps, no repetition, and refusals of what makes no sense."""

from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
import pytest

from simulator.stories.strikes import HOUR_NS, Clocks, Outage, Slowdown

NAN = float("nan")


@pytest.mark.parametrize("shape", [0.5, 1.0, 3.0])
def test_gaps_are_weibull(shape: float) -> None:
    rate, num_nodes = 0.01, 20_000
    clocks = Clocks([Outage(name="gpu", per_node_hour=rate, shape=shape)], num_nodes, seed=9)
    gaps = np.array([clocks.first_of(node)[0] for node in range(num_nodes)]) / HOUR_NS
    assert abs(gaps.mean() - 1 / rate) < 4 * gaps.std() / sqrt(num_nodes)
    scale = gaps.mean() / gamma_of(1 + 1 / shape)
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        quantile = scale * (-np.log(1 - share)) ** (1 / shape)
        assert abs((gaps < quantile).mean() - share) < 0.02 * sqrt(share * (1 - share)) + 0.005


def gamma_of(x: float) -> float:
    """Return Gamma(x) by summing its integral, apart from the library that the clocks use."""
    t = np.linspace(-40, 6, 200_001)
    return float(np.exp(x * t - np.exp(t)).sum() * (t[1] - t[0]))


def test_repaired_nodes_do_not_repeat_their_past() -> None:
    clocks = Clocks([Outage(name="gpu", per_node_hour=1)], 50, seed=0)
    lives = np.array([[clocks.begin_node(node, 0) for _ in range(50)] for node in range(50)])
    assert len(np.unique(lives)) == lives.size
    for rows in (lives, lives.T):
        later = np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]
        assert abs(later) < 4 / sqrt(lives.size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"per_node_hour": NAN}, "outage x: per_node_hour is nan"),
        ({"per_node_hour": -1}, "outage x: per_node_hour is -1"),
        ({"shape": 0}, "outage x: shape is 0"),
        ({"away_ns": NAN}, "outage x: away_ns is nan"),
        ({"detection_ns": -5}, "outage x: detection_ns is -5"),
        ({"notice_ns": 1}, "gives notice goes; its away_ns must not be 0"),
        ({"notice_ns": 1, "detection_ns": 1}, "needs no detection"),
    ],
)
def test_an_outage_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Outage(name="x", per_node_hour=1.0), **fields)


def test_a_slowdown_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="slowdown x: factor is nan"):
        Slowdown(name="x", per_node_hour=1, factor=NAN, lasts_ns=1)
    with pytest.raises(ValueError, match="slowdown x: lasts_ns is 0"):
        Slowdown(name="x", per_node_hour=1, factor=2, lasts_ns=0)
