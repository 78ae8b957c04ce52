"""Where a predicted step goes: from the arithmetic at peak rate to all that is lost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from planner.flops import peak_flops_per_s, step_flops
from planner.reference.program import INTER, INTRA, MEMORY, Floats, Lanes
from planner.reference.step import StageNs, built
from planner.setup import Setup

PARTS = ("peak", "recompute", "kernels", "memory", "exchange", "launch", "pipeline", "reduction",
         "optimizer", "host")  # fmt: skip
"""The parts of a step, in the order in which they are added; docs/models.md says what each is."""
_LANES = ("kernels", "memory", "exchange", "launch")


def waterfall(
    setup: Setup, stages: tuple[StageNs, ...], host_ns: float, step_ns: int
) -> Mapping[str, int]:
    """Return the parts of a step of `step_ns` by name, in ns; they sum to it.

    `stages` are timed in the lanes of `growing`: products and attention alone, then with
    memory-bound kernels, collectives between ranks of a stage, host launches. Of these the mean
    over the pipeline's ranks counts; what the pipeline adds to it is idling. `host_ns` is the
    host's own part of the step.
    """
    peak = step_flops(setup, causal=True, recomputed=False)
    again = step_flops(setup, causal=True, recomputed=True)
    rate = setup.layout.num_ranks * peak_flops_per_s(setup) / 1e9
    each = setup.layout.num_microbatches / setup.layout.pp
    work = each * np.sum([stage.forward + stage.backward for stage in stages], axis=0)
    reduction, optimizer = _busiest(built(setup.layout).homes.tolist(), stages)
    optimized = step_ns - host_ns
    reduced = optimized - optimizer
    sums = [peak / rate, again / rate, *work, reduced - reduction, reduced, optimized, step_ns]
    rounded = [round(float(value)) for value in sums]
    return {
        name: high - low for name, low, high in zip(PARTS, [0, *rounded[:-1]], rounded, strict=True)
    }


def _busiest(homes: Sequence[int], stages: Sequence[StageNs]) -> tuple[float, float]:
    """Return reduction and optimizer of the rank that spends most on those of its stages."""
    tails = np.zeros((max(homes) + 1, 2))
    for home, stage in zip(homes, stages, strict=True):
        tails[home] += stage.reduction[-1], stage.optimizer[-1]
    reduction, optimizer = tails[np.argmax(tails.sum(axis=1))]
    return float(reduction), float(optimizer)


def growing(lanes: Lanes) -> Lanes:
    """Return lanes of one candidate with one more loss each, in the order of `_LANES`.

    The last one has all of them: it is the candidate itself.
    """
    count = len(_LANES)
    factor: Floats = np.repeat(lanes.factor, count, axis=1)
    factor[MEMORY, :1] = 0.0
    factor[INTRA, :2] = factor[INTER, :2] = 0.0

    def last_only(values: Floats) -> Floats:
        return np.concatenate((np.zeros(count - 1), values))

    return replace(
        lanes,
        factor=factor,
        launch=last_only(lanes.launch),
        message=last_only(lanes.message),
        crossing=last_only(lanes.crossing),
        spanning=last_only(lanes.spanning),
        exposed=np.repeat(lanes.exposed, count),
        step=np.repeat(lanes.step, count),
    )
