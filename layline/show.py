"""What the commands print: tables on stdout, progress on stderr. Decides nothing."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from planner.plan import Plan
from planner.search import SearchResult
from reports.words import KIND_NAMES, duration, origin_text, size, stages_text
from simulator.timeline import Kind, Timeline


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
    from planner.lower import simulate_plan

    num_rejected, rules = len(plan.rejections), _count_rules(plan)
    shown = plan.ranking[:num_shown]
    width = max(34, *(len(str(candidate.layout)) for candidate in shown))
    lines = [
        f"model {plan.model.name}  {plan.model.num_parameters / 1e6:,.1f} M parameters   "
        f"workload {plan.workload.global_batch} x {plan.workload.seq_len} tokens a step, "
        f"{plan.workload.dtype}",
        f"cluster {plan.cluster.name}  {plan.cluster.num_ranks} ranks of "
        f"{plan.profile.device.name}   {origin_text(plan)}",
        f"best of {plan.num_layouts} layouts ({num_rejected} rejected{rules})",
        "",
        f"{'':2} {'layout':{width}} {'step':>10} {'P10 to P90':>21} {'tokens/s':>9} {'memory':>10}",
    ]
    for place, candidate in enumerate(shown):
        step = candidate.step
        rate = plan.workload.tokens_per_step / step.p50_ns * 1e9
        band = f"{duration(step.p10_ns)} to {duration(step.p90_ns)}"
        mark = ">" if place == plan.chosen else ""
        lines.append(
            f"{mark:2} {candidate.layout!s:{width}} {duration(step.p50_ns):>10} {band:>21} "
            f"{rate:>9,.0f} {size(candidate.peak_bytes):>10}"
            + (" extrapolated" if step.is_extrapolated else "")
        )
    lines += ["", f"bottleneck: {bottleneck(plan, simulate_plan(plan))}"]
    lines += [f"rejected: {r.layout}: {r.reason}" for r in plan.rejections[:num_shown]]
    if num_rejected > num_shown:
        lines.append(f"rejected: and {num_rejected - num_shown} more, all in the plan file")
    return "\n".join(lines)


def bottleneck(plan: Plan, timeline: Timeline) -> str:
    """Return one sentence on the rank that sets the pace, and what it spends the step on."""
    slowest = max(timeline.ranks, key=lambda rank: sum(_compute(timeline, rank).values()))
    busy_ns, step_ns = _compute(timeline, slowest), timeline.makespan_ns
    stages = plan.stages_of(slowest)
    text = shares({**busy_ns, "idle": step_ns - sum(busy_ns.values())}, step_ns)
    sharing_ns = sum(
        plan.costs[stage].tensor_parallel_forward_ns + plan.costs[stage].tensor_parallel_backward_ns
        for stage in stages
    )
    if sharing_ns:
        share = 100 * sharing_ns * plan.layout.num_microbatches / step_ns
        text += f" (exchange inside the layers: {share:.0f} %)"
    return f"{stages_text(stages)}: {text}"


def shares(parts_ns: Mapping[str, int] | Mapping[Kind, int], total_ns: int) -> str:
    """Return parts of a step in percent, the largest first.

    >>> shares({"send": 1, "all_reduce": 3, "wait": 0}, 4)
    'all-reduce 75 %, send 25 %'
    """
    parts = sorted(parts_ns.items(), key=lambda part: -part[1])
    return ", ".join(f"{KIND_NAMES[kind]} {100 * ns / total_ns:.0f} %" for kind, ns in parts if ns)


def _compute(timeline: Timeline, rank: int) -> dict[str, int]:
    return {kind: ns for kind, ns in timeline.busy_ns(rank).items() if kind not in ("send", "wait")}


def _count_rules(plan: Plan) -> str:
    counts: dict[str, int] = {}
    for rejection in plan.rejections:
        counts[rejection.rule] = counts.get(rejection.rule, 0) + 1
    text = ", ".join(f"{count} {rule}" for rule, count in sorted(counts.items()))
    return f": {text}" if text else ""


def search_summary(result: SearchResult) -> str:
    """Return how many layouts were timed and how many rejected."""
    return f"{len(result.ranking)} layouts timed, {len(result.rejections)} rejected"
