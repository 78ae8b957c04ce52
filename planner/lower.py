"""Lowering: what the planner decides becomes the times of a step, and the step is simulated.

A step holds one data-parallel replica; a tensor-parallel group is one rank of it. What its parts
are, and what a message costs, is written in `simulator.step`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from planner.bounds import Columns
from planner.layout import Layout
from planner.memory import stage_activation_bytes
from planner.orders import NamedOrder, order_of
from planner.plan import Plan, StageCost
from profiles.profile import Cost
from simulator.checks import Int64
from simulator.engine import Simulation, simulate_step, step_ns
from simulator.fold import folded_step
from simulator.memory import MemoryCurve, activation_changes, memory_curves
from simulator.schedule import Schedule
from simulator.step import StepTimes, lower, step_times
from simulator.timeline import Kind, Timeline

QUANTILES = ("p10_ns", "p50_ns", "p90_ns")
MEDIAN = QUANTILES.index("p50_ns")
BEFORE: tuple[Kind, ...] = ("other",)
AFTER: tuple[Kind, ...] = ("all_reduce", "optimizer", "wait")
_TIMED = ("forward", "backward", "weight", "send_forward", "send_backward", *BEFORE, *AFTER)


def stage_times(schedule: Schedule, candidates: Sequence[Sequence[StageCost]]) -> StepTimes:
    """Return the times of a step under `schedule`: three lanes a candidate, P10, P50 and P90.

    A candidate is its costs, an entry a stage. The host work of a step is done once a rank; its
    first stage stands for it.
    """
    ns = {name: _lanes(candidates, name) for name in _TIMED}
    _, first_stages = np.unique(schedule.homes, return_index=True)
    is_later = np.ones((schedule.num_stages, 1), np.bool_)
    is_later[first_stages] = False
    return step_times(
        schedule.num_stages,
        forward=ns["forward"],
        backward=ns["backward"],
        weight=ns["weight"],
        send_forward=ns["send_forward"],
        send_backward=ns["send_backward"],
        before={kind: np.where(is_later, 0, ns[kind]) for kind in BEFORE},
        after={kind: ns[kind] for kind in AFTER},
    )


def _lanes(candidates: Sequence[Sequence[StageCost]], name: str) -> Int64:
    """Return one part of all costs, [S, 3 C]."""
    return np.array(
        [
            [getattr(getattr(cost, name), quantile) for cost in costs]
            for costs in candidates
            for quantile in QUANTILES
        ],
        np.int64,
    ).T


def predict_steps(schedule: Schedule, candidates: Sequence[Sequence[StageCost]]) -> list[Cost]:
    """Return the step time of each candidate with its band: all costs at P10, median and P90."""
    return _bands(step_ns(schedule, stage_times(schedule, candidates)).tolist(), candidates)


def predict_order(
    order: NamedOrder, sample: Schedule, candidates: Sequence[Sequence[StageCost]]
) -> list[Cost]:
    """Return what `predict_steps` returns of a whole order, from its sample.

    A long order is folded, and walked only where nothing certifies that it repeats.
    """
    if not order.is_long:
        return predict_steps(sample, candidates)
    times, build = stage_times(sample, candidates), cache(order.build)
    m, period, steady_from = order.num_microbatches, order.period, order.steady_from
    return _bands(
        [
            folded_step(build, m, period, steady_from, times, lane).makespan_ns
            for lane in range(times.num_lanes)
        ],
        candidates,
    )


def median_step(layout: Layout, sample: Schedule, columns: Columns) -> int:
    """Return the median step of `layout`, in ns, from the sample of its order.

    `columns` are those of this layout alone.
    """
    ns = {name: column[0] for name, column in columns._asdict().items()}
    first_stages = np.unique(sample.homes, return_index=True)[1]
    other = np.zeros_like(ns["other"])
    other[first_stages] = ns["other"][first_stages]
    times = step_times(
        sample.num_stages,
        forward=ns["forward"],
        backward=ns["backward"],
        weight=ns["weight"],
        send_forward=ns["send_forward"],
        send_backward=ns["send_backward"],
        before={"other": other},
        after={kind: ns[kind] for kind in AFTER},
    )
    order = order_of(layout)
    if not order.is_long:
        return int(step_ns(sample, times)[0])
    return folded_step(
        cache(order.build), order.num_microbatches, order.period, order.steady_from, times, 0
    ).makespan_ns


def _bands(lanes_ns: Sequence[int], candidates: Sequence[Sequence[StageCost]]) -> list[Cost]:
    """Return the step of each candidate; `lanes_ns` are those of `stage_times`."""
    bands = np.reshape(np.array(lanes_ns, np.int64), (-1, len(QUANTILES)))
    return [
        Cost(
            p10_ns=p10,
            p50_ns=p50,
            p90_ns=p90,
            is_extrapolated=any(getattr(cost, part).is_extrapolated for cost in costs
                                for part in _TIMED),
        )
        for (p10, p50, p90), costs in zip(bands.tolist(), candidates, strict=True)
    ]  # fmt: skip


def predict_step(schedule: Schedule, costs: Sequence[StageCost]) -> Cost:
    """Return the step time of one candidate with its band."""
    return predict_steps(schedule, [costs])[0]


def simulation_of(plan: Plan) -> Simulation:
    """Return when everything in the predicted median step of `plan` happens.

    Its ranks are pipeline ranks: each stands for the dp * tp equal ranks of its place.
    """
    schedule = plan.parsed_schedule()
    return simulate_step(schedule, stage_times(schedule, [plan.costs]), lane=MEDIAN)


def simulate_plan(plan: Plan) -> Timeline:
    """Return the predicted timeline of `plan` with the predicted peak memory of each rank."""
    return timeline_of(plan, simulation_of(plan))


def timeline_of(plan: Plan, simulation: Simulation) -> Timeline:
    """Return the timeline of `simulation`, which is of `plan`, with the peak of each rank."""
    peaks = {rank: memory.total for rank, memory in enumerate(plan.memory)}
    return replace(simulation.timeline, peak_bytes=peaks)


def memory_of(plan: Plan, simulation: Simulation) -> dict[int, MemoryCurve]:
    """Return what is alive on each pipeline rank over time in `simulation`, which is of `plan`.

    Activations come and go with the actions; all else counts from start to end, so that the peak
    of a curve is that of the plan.
    """
    step = lower(plan.parsed_schedule(), BEFORE, AFTER)
    activations = stage_activation_bytes(plan.model, plan.workload, plan.layout, plan.stack)
    allocated, freed = activation_changes(step, activations)
    static = {rank: memory.total - memory.activations for rank, memory in enumerate(plan.memory)}
    return memory_curves(simulation, allocated, freed, static)
