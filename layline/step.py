"""`layline simulate`: one predicted step in full, as values, as text, and as a trace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layline.show import bottleneck, shares
from planner.lower import memory_of, simulation_of, timeline_of
from planner.plan import Plan
from planner.waterfall import Waterfall, waterfall
from reports.words import (
    KIND_NAMES,
    PART_NAMES,
    duration,
    origin_text,
    size,
    stages_text,
    utilization_text,
)
from simulator.critical import CriticalPath, critical_path
from simulator.engine import Simulation
from simulator.idle import COMMUNICATION, StreamUse, stream_uses
from simulator.memory import MemoryCurve
from simulator.timeline import Kind, Timeline
from simulator.trace import overlay, perfetto_trace

_MAX_LINE = 160
_BUSY: tuple[Kind, ...] = ("forward", "backward", "all_reduce", "optimizer", "other")


@dataclass(frozen=True, kw_only=True, eq=False)
class PredictedStep:
    """The median step of a plan: when everything happens, and what explains its length.

    `uses` are of all streams, `waterfall` says what they come to, `critical` is the chain of ops
    that sets the length, `memory` what is alive on each pipeline rank over time.
    """

    plan: Plan
    simulation: Simulation
    timeline: Timeline
    uses: tuple[StreamUse, ...]
    waterfall: Waterfall
    critical: CriticalPath
    memory: Mapping[int, MemoryCurve]

    @property
    def compute(self) -> tuple[StreamUse, ...]:
        """The use of each rank's compute stream, in the order of the ranks."""
        return tuple(use for use in self.uses if use.stream == "compute")


def predicted_step(plan: Plan) -> PredictedStep:
    """Return the predicted median step of `plan` in full."""
    simulation = simulation_of(plan)
    uses = stream_uses(simulation)
    return PredictedStep(
        plan=plan,
        simulation=simulation,
        timeline=timeline_of(plan, simulation),
        uses=uses,
        waterfall=waterfall(plan, uses),
        critical=critical_path(simulation),
        memory=memory_of(plan, simulation),
    )


def step_trace(step: PredictedStep) -> bytes:
    """Return the step as a Perfetto trace, with its critical path and its memory."""
    shown = overlay(step.simulation, step.memory)
    return perfetto_trace([step.timeline], overlays=[shown])


def step_json(step: PredictedStep) -> dict[str, Any]:
    """Return the step as plain values; `memory` holds [ns, bytes] wherever it changes."""
    names = step.simulation.graph.names
    curves = {
        str(rank): np.stack((curve.times_ns, curve.alive_bytes), axis=1).tolist()
        for rank, curve in step.memory.items()
    }
    return {
        "plan_digest": step.plan.plan_digest,
        "step_ns": step.timeline.makespan_ns,
        "timeline": step.timeline,
        "streams": step.uses,
        "waterfall": step.waterfall,
        "critical_path": {
            "busy_ns": step.critical.busy_ns,
            "held_ns": step.critical.held_ns,
            "ops": [names[op_id] for op_id in step.critical.op_ids],
        },
        "memory": curves,
    }


def step_text(step: PredictedStep) -> str:
    """Return the step for a terminal: busy time and memory, idle time by cause, what binds."""
    plan, total_ns = step.plan, step.timeline.makespan_ns
    return "\n".join(
        [
            f"{plan.layout}   step {duration(total_ns)}   "
            f"{plan.workload.tokens_per_step / total_ns * 1e9:,.0f} tokens/s",
            *([origin_text(plan)] if plan.profile.is_reference else []),
            "",
            *_busy_table(step),
            "",
            *_idle_table(step),
            *_waterfall_table(step),
            "",
            f"critical path: {shares(step.critical.busy_ns, total_ns)}",
            f"bottleneck: {bottleneck(plan, step.timeline)}",
            "schedule:",
            *(_cut(line) for line in plan.schedule),
        ]
    )


def _busy_table(step: PredictedStep) -> list[str]:
    rows = []
    for rank, use in enumerate(step.compute):
        stages = step.plan.stages_of(rank)
        layers = "+".join(str(step.plan.layout.stage_layers[stage]) for stage in stages)
        times = [duration(use.busy_ns.get(kind, 0)) for kind in _BUSY]
        peak = size(step.plan.memory[rank].total)
        rows.append([_held(stages), layers, *times, duration(use.idle_ns), f"  {peak}"])
    return _table(
        ["stage", "layers", *(KIND_NAMES[kind] for kind in _BUSY), "idle", "  memory"], rows
    )


def _idle_table(step: PredictedStep) -> list[str]:
    """Return idle time by cause; causes that no rank has are left out."""
    causes = [_causes(use) for use in step.compute]
    shown = [cause for cause in causes[0] if any(row[cause] for row in causes)]
    if not shown:
        return []
    rows = [
        [_held(step.plan.stages_of(rank)), *(duration(row[cause]) for cause in shown),
         f"{100 * use.idle_ns / step.timeline.makespan_ns:.1f} %"]
        for rank, (row, use) in enumerate(zip(causes, step.compute, strict=True))
    ]  # fmt: skip
    return ["idle, by cause", *_table(["stage", *shown, "all"], rows), ""]


def _waterfall_table(step: PredictedStep) -> list[str]:
    """Return the parts of the step, and the shares of the peak that follow from them."""
    total_ns, found = step.timeline.makespan_ns, step.waterfall
    rows = [
        f"  {PART_NAMES[part]:28} {duration(ns):>10} {100 * ns / total_ns:6.1f} %"
        for part, ns in found.parts_ns.items()
    ]
    title = "the step of the mean rank"
    return [title, *rows, utilization_text(step.plan, found)]


def _causes(use: StreamUse) -> dict[str, int]:
    exposed = {KIND_NAMES[kind]: use.exposed_ns.get(kind, 0) for kind in COMMUNICATION}
    return {
        "bubble": use.bubble_ns,
        **exposed,
        "straggler": use.straggler_ns,
        "host": use.host_ns,
        "held": use.held_ns,
    }


def _held(stages: Sequence[int]) -> str:
    return stages_text(stages).split()[1]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with every column as wide as its widest cell, and 10 at least but for two."""
    columns = list(zip(head, *rows, strict=True))
    least = [5, 6 if head[1] == "layers" else 10, *[10] * (len(head) - 2)]
    widths = [max(low, *(len(cell) for cell in column))
              for low, column in zip(least, columns, strict=True)]  # fmt: skip
    return [
        " ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    ]


def _cut(line: str) -> str:
    """Return one rank's actions, the first of many."""
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE].rsplit(' ', 1)[0]} ..."
