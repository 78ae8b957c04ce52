"""Closed forms of overlap against the programs that they stand for, walked op by op."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.reference.overlap import left_over, prefetched
from simulator.streams import walk_streams

COMPUTE, EXCHANGE = range(2)
Ops = list[tuple[int, int, int]]
NS = st.integers(0, 1000)
UNITS = st.integers(1, 12)


def walked(ops: Ops) -> int:
    """Return when a program of (stream, after, ns) ends."""
    stream, after, ns = np.array(ops).T
    ends = walk_streams(
        stream.astype(np.int32), after.astype(np.int32), ns.astype(np.int64)[:, None], 2
    )
    return int(ends.max())


def gathered_ahead(unit: int, gather: int, scatter: int, units: int) -> Ops:
    """Unit u + 1 is gathered when u starts, and u is scattered behind it."""
    ops: Ops = [(EXCHANGE, -1, gather)]
    gathered, computed = 0, -1
    for number in range(units):
        needs, before = gathered, computed
        if number + 1 < units:
            gathered = len(ops)
            ops.append((EXCHANGE, before, gather))
        computed = len(ops)
        ops += [(COMPUTE, needs, unit), (EXCHANGE, computed, scatter)]
    return ops


def behind_each(unit: int, exchange: int, units: int) -> Ops:
    """Each unit's share of the exchange starts when it is done."""
    return [
        op
        for number in range(units)
        for op in ((COMPUTE, -1, unit), (EXCHANGE, 2 * number, exchange))
    ]


@given(NS, NS, NS, UNITS)
def test_gathering_ahead_takes_what_its_program_takes(
    unit: int, gather: int, scatter: int, units: int
) -> None:
    c, g, s = (np.array([float(ns)]) for ns in (unit, gather, scatter))
    (found,) = prefetched(c, g, s, np.array([units]))
    assert found == walked(gathered_ahead(unit, gather, scatter, units))


@given(NS, NS, UNITS)
def test_what_is_left_of_an_exchange_is_what_its_program_leaves(
    unit: int, exchange: int, units: int
) -> None:
    compute, whole = np.array([float(unit * units)]), np.array([float(exchange * units)])
    (left,) = left_over(whole, compute, np.array([units]), True, np.zeros(1))
    assert left == pytest.approx(walked(behind_each(unit, exchange, units)) - unit * units)


@given(NS, NS, st.floats(0, 1))
def test_some_is_always_exposed_and_nothing_is_hidden_without_overlap_or_layers(
    compute: int, exchange: int, exposed: float
) -> None:
    c, x, share = np.array([float(compute)]), np.array([float(exchange)]), np.array([exposed])
    (left,) = left_over(x, c, np.array([4]), True, share)
    assert exposed * exchange <= left <= exchange
    assert left_over(x, c, np.array([4]), False, share) == x
    assert left_over(x, c, np.array([0]), True, share) == x
