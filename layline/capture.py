"""`layline capture`: what one rank does and holds, as values and as text."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layline.walk import load_plan, require_torch
from planner.plan import PeakMemory, Plan
from reports.words import size

if TYPE_CHECKING:
    from executor.capture import Capture
    from executor.capture_trace import Event

HELD = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "temporary": "temporary",
    "messages": "buffers",
    "inputs": "",
}
"""What holds memory at the peak, and the part of the plan's estimate that stands for it."""


def captured(path: Path, rank: int) -> tuple[dict[str, Any], str]:
    """Return what `rank` of the plan in `path` does in a step, as plain values and as text."""
    require_torch("capture")
    from executor.capture import capture

    plan = load_plan(path)
    found = capture(plan, rank)
    return capture_json(plan, found), capture_text(plan, found)


def capture_json(plan: Plan, found: "Capture") -> dict[str, Any]:
    """Return a capture as plain values.

    `segments` are the step in order; each names its events by their place in `lists`, since most
    are alike.
    """
    lists: dict[tuple[Event, ...], int] = {}
    segments = [
        {
            "phase": part.phase,
            "action": part.action,
            "list": lists.setdefault(part.events, len(lists)),
        }
        for part in found.segments
    ]
    return {
        "plan_digest": found.plan_digest,
        "rank": found.rank,
        "place": found.place._asdict(),
        "stages": found.stages,
        "num_microbatches": found.num_microbatches,
        "num_traced": found.num_traced,
        "lists": list(lists),
        "segments": segments,
        "ops": [
            {"phase": phase, "op": op, "count": count}
            for (phase, op), count in found.op_counts().items()
        ],
        "collectives": [
            {"phase": phase, "collective": collective, "count": count}
            for (phase, collective), count in found.collective_counts().items()
        ],
        "peak": found.peak,
        "peak_bytes": found.peak.total,
        "peak_phase": found.peak_phase,
        "peak_action": found.peak_action,
        "estimate": plan.memory[found.place.pp],
    }


def capture_text(plan: Plan, found: "Capture") -> str:
    """Return a capture for a terminal: ops by kind, collectives by kind, memory beside the plan."""
    place = found.place
    stages = "+".join(map(str, found.stages))
    return "\n".join(
        [
            f"{plan.layout}   rank {found.rank} of {plan.layout.num_ranks}: pp {place.pp}, "
            f"dp {place.dp}, tp {place.tp}, stage {stages}",
            f"one step, {found.num_microbatches} micro-batches, of which {found.num_traced} were "
            "traced and stand for the others",
            "",
            *_op_table(found),
            "",
            *_collective_table(found),
            "",
            *_memory_table(plan.memory[place.pp], found),
        ]
    )


def _op_table(found: "Capture") -> list[str]:
    from executor.capture import flops

    calls: Counter[tuple[str, str]] = Counter()
    work: Counter[tuple[str, str]] = Counter()
    for (phase, op), count in found.op_counts().items():
        calls[phase, op.name] += count
        work[phase, op.name] += count * flops(op)
    order = sorted(calls, key=lambda key: (-work[key], -calls[key], key))
    wide = max(len(name) for _, name in order)
    lines = [f"{'op':{wide}} {'phase':10} {'calls':>9} {'Tflop':>10}"]
    lines += [
        f"{name:{wide}} {phase:10} {calls[phase, name]:>9,} "
        + (f"{work[phase, name] / 1e12:>10,.3f}" if work[phase, name] else f"{'-':>10}")
        for phase, name in order
    ]
    total = sum(work.values())
    return [*lines, f"{'all':{wide}} {'':10} {calls.total():>9,} {total / 1e12:>10,.3f}"]


def _collective_table(found: "Capture") -> list[str]:
    counts = found.collective_counts()
    if not counts:
        return ["no collectives: the rank is alone"]
    lines = [f"{'collective':14} {'phase':10} {'ranks':>12} {'calls':>7} {'each':>10} {'all':>10}"]
    for (phase, one), count in sorted(
        counts.items(), key=lambda row: -row[1] * row[0][1].size_bytes
    ):
        ranks = f"{one.axis} {one.group_size}"
        lines.append(
            f"{one.kind:14} {phase:10} {ranks:>12} {count:>7,} {size(one.size_bytes):>10} "
            f"{size(count * one.size_bytes):>10}"
        )
    return lines


def _memory_table(estimate: PeakMemory, found: "Capture") -> list[str]:
    """Return what is held at the peak, beside what the plan says of the same."""
    where = found.peak_action or found.peak_phase
    lines = [f"{f'memory at the peak, in {where}':34} {'captured':>10} {'planned':>10}"]
    for name, part in HELD.items():
        planned = size(getattr(estimate, part)) if part else "-"
        lines.append(f"  {name:32} {size(getattr(found.peak, name)):>10} {planned:>10}")
    ratio = estimate.allocated / found.peak.total - 1
    return [
        *lines,
        f"  {'all':32} {size(found.peak.total):>10} {size(estimate.allocated):>10} "
        f"({100 * ratio:+.1f} %)",
        f"the plan adds {size(estimate.reserve)} of reserve and {size(estimate.context)} of "
        "context; neither has the private work space of kernels",
    ]
