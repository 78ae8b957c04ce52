"""What the commands print: tables on stdout, progress on stderr. Decides nothing."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from planner.plan import Plan
from reports.words import KIND_NAMES, stages_text
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
