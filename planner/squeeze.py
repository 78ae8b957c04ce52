"""Recomputation by need: as few layers as make a layout fit, on each pipeline rank its own."""

from dataclasses import replace

import numpy as np

from planner.evaluate import Basis
from planner.layout import Layout
from planner.memory import alive_by_rank, stage_activation_bytes
from simulator.checks import Int64
from simulator.schedule import Schedule


def squeezed(basis: Basis, layout: Layout, schedule: Schedule) -> Layout | int:
    """Return `layout` with as few recomputed layers as fit, or the bytes that it needs at least.

    `layout.recompute` says what a layer makes again. A rank recomputes equally many layers of each
    of its stages, and no more than it must: it then holds as much as it can.
    """
    kept = stage_activation_bytes(
        basis.costs.model, basis.costs.workload, replace(layout, recompute="none"),
        basis.costs.stack,
    )  # fmt: skip
    least = stage_activation_bytes(
        basis.costs.model, basis.costs.workload, layout, basis.costs.stack
    )
    layers = np.array(layout.stage_layers)
    held = basis.held(layout, schedule)
    again = np.zeros(len(layers), np.int64)
    for (stages, alive), rank in zip(alive_by_rank(schedule), held, strict=True):
        again[stages] = _fewest(
            alive, layers[stages], np.array(kept)[stages], np.array(least)[stages],
            rank.room(basis.limit_bytes),
        )  # fmt: skip
    found = replace(layout, recompute_layers=tuple(again.tolist()))
    # Rounding, and gradients that wait in full precision, may take a layer more.
    while (need := _need(basis, found, schedule)) > basis.limit_bytes:
        more = np.minimum(np.array(found.recompute_layers) + 1, layers)
        if tuple(more.tolist()) == found.recompute_layers:
            return need
        found = replace(found, recompute_layers=tuple(more.tolist()))
    return found


def _fewest(alive: Int64, layers: Int64, kept: Int64, least: Int64, room: int) -> Int64:
    """Return how many layers of each stage of a rank are recomputed, [v].

    `alive` [A, v] are the micro-batches that it holds together, of stages that keep `kept` [v] when
    nothing is recomputed and `least` [v] when all `layers` [v] are; `room` is for all of it.

    >>> _fewest(np.array([[3]]), np.array([4]), np.array([40]), np.array([8]), 80)
    array([2])
    """
    counts = np.minimum(np.arange(int(layers.max()) + 1)[:, None], layers)
    saved = (kept - least) * counts // np.maximum(layers, 1)
    peaks = ((kept - saved) @ alive.T).max(axis=1)
    fits = np.flatnonzero(peaks <= room)
    return np.asarray(counts[fits[0]] if len(fits) else layers)


def _need(basis: Basis, layout: Layout, schedule: Schedule) -> int:
    return max(rank.total for rank in basis.memory(layout, schedule))
