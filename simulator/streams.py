"""A short program on the streams of one rank, walked for many candidates side by side."""

import numpy as np

from simulator.checks import Int64
from simulator.compiled import compiled
from simulator.graph import Int32


@compiled
def walk_streams(stream: Int32, after: Int32, ns: Int64, num_streams: int) -> Int64:
    """Return when each op ends, int64 [N, L], of N ops that take `ns` [N, L] in L candidates.

    Ops stand in program order: each starts when the op before it on its `stream` [N] has ended
    and, unless -1, the earlier op `after` [N]. `simulator.engine.simulate` gives the same ends.

    >>> ends = walk_streams(np.array([0, 1, 0], np.int32), np.array([-1, 0, 1], np.int32),
    ...                     np.array([[5], [7], [2]]), 2)
    >>> ends.ravel().tolist()
    [5, 12, 14]
    """
    num_ops, num_lanes = ns.shape
    ends = np.empty((num_ops, num_lanes), np.int64)
    free = np.zeros((num_streams, num_lanes), np.int64)
    for op in range(num_ops):
        own, other = stream[op], after[op]
        for lane in range(num_lanes):
            start = free[own, lane]
            if other >= 0 and ends[other, lane] > start:
                start = ends[other, lane]
            ends[op, lane] = start + ns[op, lane]
            free[own, lane] = ends[op, lane]
    return ends
