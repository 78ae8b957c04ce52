"""What the commands print: tables on stdout, progress on stderr. Decides nothing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from planner.plan import Plan
from planner.search import SearchResult
from profiles.quantity import format_quantity
from simulator.timeline import Timeline


def duration(value_ns: float) -> str:
    """Return a time for people."""
    return format_quantity(round(value_ns), "ns")


def size(value_bytes: int) -> str:
    """Return a size for people."""
    return format_quantity(value_bytes, "bytes")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[float, str], None]]:
    """Show a bar with ETA on stderr while the block runs; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _share, _what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share, now: bar.update(task, completed=share, description=f"{what}: {now}")


def plan_text(plan: Plan, num_shown: int) -> str:
    """Return the outcome of a search: counts, ranking, bottleneck, rejections."""
    num_rejected, rules = len(plan.rejections), _count_rules(plan)
    lines = [
        f"model {plan.model.name}  {plan.model.num_parameters / 1e6:,.1f} M parameters   "
        f"workload {plan.workload.global_batch} x {plan.workload.seq_len} tokens a step, "
        f"{plan.workload.dtype}",
        f"cluster {plan.cluster.name}  {plan.cluster.num_ranks} ranks of "
        f"{plan.profile.device.name}   profile of {plan.profile.measured_at}",
        f"best of {plan.num_layouts} layouts ({num_rejected} rejected{rules})",
        "",
        f"{'':2} {'layout':34} {'step':>10} {'P10 to P90':>21} {'tokens/s':>9} {'memory':>10}",
    ]
    for place, candidate in enumerate(plan.ranking[:num_shown]):
        step = candidate.step
        rate = plan.workload.tokens_per_step / step.p50_ns * 1e9
        band = f"{duration(step.p10_ns)} to {duration(step.p90_ns)}"
        mark = ">" if place == plan.chosen else ""
        lines.append(
            f"{mark:2} {candidate.layout!s:34} {duration(step.p50_ns):>10} {band:>21} "
            f"{rate:>9,.0f} {size(candidate.peak_bytes):>10}"
            + (" extrapolated" if step.is_extrapolated else "")
        )
    lines += ["", f"bottleneck: {bottleneck(plan)}"]
    lines += [f"rejected: {r.layout}: {r.reason}" for r in plan.rejections[:num_shown]]
    if num_rejected > num_shown:
        lines.append(f"rejected: and {num_rejected - num_shown} more, all in the plan file")
    return "\n".join(lines)


def bottleneck(plan: Plan) -> str:
    """Return one sentence on the stage that sets the pace, and what it spends the step on."""
    from planner.lower import simulate_plan

    timeline = simulate_plan(plan)
    slowest = max(timeline.ranks, key=lambda rank: sum(_compute(timeline, rank).values()))
    shares = _compute(timeline, slowest) | {
        "idle": timeline.makespan_ns - sum(_compute(timeline, slowest).values())
    }
    parts = sorted(shares.items(), key=lambda item: -item[1])
    text = ", ".join(
        f"{kind.replace('_', '-')} {100 * ns / timeline.makespan_ns:.0f} %"
        for kind, ns in parts
        if ns > 0
    )
    cost = plan.costs[slowest]
    sharing = cost.tensor_parallel_forward_ns + cost.tensor_parallel_backward_ns
    if sharing:
        share = 100 * sharing * plan.layout.num_microbatches / timeline.makespan_ns
        text += f" (tensor-parallel all-reduce inside: {share:.0f} %)"
    return f"stage {slowest}: {text}"


def _compute(timeline: Timeline, rank: int) -> dict[str, int]:
    return {kind: ns for kind, ns in timeline.busy_ns(rank).items() if kind not in ("send", "wait")}


def _count_rules(plan: Plan) -> str:
    counts: dict[str, int] = {}
    for rejection in plan.rejections:
        counts[rejection.rule] = counts.get(rejection.rule, 0) + 1
    text = ", ".join(f"{count} {rule}" for rule, count in sorted(counts.items()))
    return f": {text}" if text else ""


def simulation_text(plan: Plan, timeline: Timeline) -> str:
    """Return the simulated step: breakdown by rank, memory by stage."""
    lines = [
        f"{plan.layout}   step {duration(timeline.makespan_ns)}   "
        f"{plan.workload.tokens_per_step / timeline.makespan_ns * 1e9:,.0f} tokens/s",
        "",
        f"{'stage':>5} {'layers':>6} {'forward':>10} {'backward':>10} {'all-reduce':>10} "
        f"{'optimizer':>10} {'other':>10} {'idle':>10}   {'memory':>10}",
    ]
    for stage, layers in enumerate(plan.layout.stage_layers):
        busy = _compute(timeline, stage)
        idle = timeline.makespan_ns - sum(busy.values())
        cells = [
            duration(busy.get(kind, 0))
            for kind in ("forward", "backward", "all_reduce", "optimizer", "other")
        ]
        row = " ".join(f"{cell:>10}" for cell in [*cells, duration(idle)])
        lines.append(f"{stage:>5} {layers:>6} {row}   {size(plan.memory[stage].total):>10}")
    lines += ["", f"bottleneck: {bottleneck(plan)}", "schedule:", *plan.schedule]
    return "\n".join(lines)


def search_summary(result: SearchResult) -> str:
    """Return how many layouts were timed and how many rejected."""
    return f"{len(result.ranking)} layouts timed, {len(result.rejections)} rejected"
