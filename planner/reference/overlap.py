"""What traffic of replicas hides behind computation, in closed form; tests walk it op by op."""

import numpy as np

from planner.reference.program import Floats
from simulator.checks import Int64


def prefetched(unit: Floats, gather: Floats, scatter: Floats, units: Int64) -> Floats:
    """Return the time of `units` equal computations, each gathered while the one before it runs.

    On a second stream unit u + 1 is gathered when u starts, and u is scattered when it is done and
    that is gathered. With c, g and s for the three and U units, that is g + c + s for one and
    g + max(g, c) + (U - 2) max(c, g + s) + max(c, s) + s for more.

    >>> prefetched(np.array([5.0]), np.array([3.0]), np.array([4.0]), np.array([1, 2, 9])).tolist()
    [12.0, 17.0, 66.0]
    """
    steady = np.maximum(unit, gather + scatter)
    more = gather + np.maximum(gather, unit) + np.maximum(unit, scatter) + scatter
    return np.asarray(np.where(units == 1, gather + unit + scatter, more + (units - 2) * steady))


def left_over(
    exchange: Floats, compute: Floats, units: Int64, overlaps: bool, exposed: Floats
) -> Floats:
    """Return what of `exchange` is left behind `compute`, of which it takes a share unit by unit.

    Each share x waits for that of the computation c: max(c + U x, U c + x) in all. Never less than
    the part that experience says is not hidden.
    """
    if not overlaps:
        return exchange
    parts = np.maximum(units, 1)
    behind = np.maximum(exchange / parts, exchange - compute * (parts - 1) / parts)
    return np.asarray(np.where(units > 0, np.maximum(behind, exposed * exchange), exchange))
