"""The sections about the plan: what was decided, against what, and why not the others."""

from planner.plan import Plan, Rejection
from planner.waterfall import utilization
from profiles.quantity import format_quantity
from reports.document import Block, Drawing, Section, Table, Text
from reports.figures import IntervalRow, intervals
from reports.views import RunView, Study, View
from reports.words import change, count, duration, joined, origin_text, size

_MAX_RANKED = 12
_COMPARED = "Which layouts were compared?"
_ALONE = "The plan holds no ranking: its layout was given, not searched for."
_COSTS = (
    "forward", "backward", "send_forward", "send_backward", "all_reduce", "optimizer", "other",
    "wait",
)  # fmt: skip


def memory_limit(plan: Plan) -> int:
    """Return the memory in bytes that the smallest GPU of the cluster gives to a rank."""
    return min(pool.gpu.memory_bytes for pool in plan.cluster.pools)


def tokens_per_s(plan: Plan, step_ns: int) -> str:
    """Return the training rate at this step time as text, all ranks together."""
    return count(plan.workload.tokens_per_step * 1e9 / max(step_ns, 1))


def band(low_ns: int, high_ns: int) -> str:
    """Return a band of times in ns as text, the unit once where both ends share it.

    >>> band(298_900_000, 346_600_000), band(900_000, 1_100_000)
    ('298.9 to 346.6 ms', '900.0 us to 1.1 ms')
    """
    low, high = duration(low_ns), duration(high_ns)
    if low.split()[-1] == high.split()[-1]:
        low = low.split()[0]
    return f"{low} to {high}"


def decided(study: Study, prefix: str) -> Section:
    """Return the first section: the choice in two sentences, the headline numbers, the trust."""
    view = study.best
    plan = view.plan
    place = f"{count(plan.layout.num_ranks)} rank{'s' if plan.layout.num_ranks > 1 else ''}"
    rank = "the fastest" if plan.chosen == 0 else f"number {plan.chosen + 1} by predicted step time"
    fit = plan.num_layouts - len(plan.rejections)
    first = (
        f"Train {plan.model.name} on {place} as {plan.layout}, {rank} of {count(fit)} layouts that "
        f"fit out of {count(plan.num_layouts)} considered."
    )
    predicted = f"A step should take {duration(plan.step.p50_ns)}"
    if isinstance(view, RunView):
        comparison = view.comparison()
        inside = "inside" if comparison.is_within_band else "outside"
        second = (
            f"{predicted}; it took {duration(comparison.measured_ns)}, {inside} the predicted "
            f"band of {band(plan.step.p10_ns, plan.step.p90_ns)}."
        )
    else:
        second = (
            f"{predicted} (P10 to P90: {band(plan.step.p10_ns, plan.step.p90_ns)}); nobody has run "
            "it yet."
        )
    blocks = (
        Text(text=f"{first} {second}", role="lead"),
        _headline(view),
        Text(text=_confidence(view), role="note"),
    )
    return Section(question="What was decided?", anchor=f"{prefix}decided", blocks=blocks)


def _headline(view: View) -> Table:
    """Return step time, tokens per second and memory, and the time for all tokens if asked for."""
    plan = view.plan
    low_ns, mid_ns, high_ns = plan.step.p10_ns, plan.step.p50_ns, plan.step.p90_ns
    peak = max(rank.total for rank in plan.memory)
    rates = f"{tokens_per_s(plan, high_ns)} to {tokens_per_s(plan, low_ns)}"
    rows = [
        ("step", duration(mid_ns), band(low_ns, high_ns)),
        ("tokens per second", tokens_per_s(plan, mid_ns), rates),
        ("peak memory, worst rank", size(peak), f"of {size(memory_limit(plan))}"),
    ]
    num_steps = -(-plan.workload.tokens // plan.workload.tokens_per_step)
    if num_steps:
        span = band(num_steps * low_ns, num_steps * high_ns)
        rows.append((f"{count(num_steps)} steps, all tokens", duration(num_steps * mid_ns), span))
    head: tuple[str, ...] = ("", "predicted", "P10 to P90")
    cells: list[tuple[str, ...]] = list(rows)
    if isinstance(view, RunView):
        comparison = view.comparison()
        step_ns = comparison.measured_ns
        held = max(rank.measured_peak_bytes for rank in comparison.ranks)
        error, rate_error = change(step_ns, mid_ns), change(mid_ns, step_ns)
        measured = [
            (duration(step_ns), error),
            (tokens_per_s(plan, step_ns), rate_error),
            (size(held), change(held, peak)),
            (duration(num_steps * step_ns), error),
        ]
        head = (*head, "measured", "difference")
        cells = [(*row, *extra) for row, extra in zip(rows, measured, strict=False)]
    return Table(head=head, align="l" + "r" * (len(head) - 1), rows=tuple(cells), role="headline")


def _confidence(view: View) -> str:
    """Return what the numbers rest on: costs measured or published, and how far these reach."""
    plan = view.plan
    device = plan.profile.device.name
    if plan.profile.is_reference:
        text = f"Confidence: reference. The costs are those of {origin_text(plan)}."
        if plan.step.is_extrapolated:
            text += f" Much of a layer lies beyond what was published of {device}: extrapolated."
    elif plan.step.is_extrapolated:
        parts = {
            name.replace("_", " ").replace("all reduce", "all-reduce"): None
            for cost in plan.costs
            for name in _COSTS
            if getattr(cost, name).is_extrapolated
        }
        what = joined(list(parts)) or "some costs"
        text = f"Confidence: extrapolated. Beyond what was profiled on {device}: {what}."
    else:
        text = f"Confidence: measured. Every cost lies inside what was profiled on {device}."
    return f"{text} {mfu}" if (mfu := _mfu(plan)) else text


def _mfu(plan: Plan) -> str:
    """Return the predicted model flops utilisation as a sentence, empty where no peak is known."""
    if (used := utilization(plan, plan.step.p50_ns)) is None:
        return ""
    num_ranks, gpu = plan.layout.num_ranks, plan.cluster.pools[0].gpu
    rate = used.mfu * num_ranks * gpu.peak_flops_per_s[plan.workload.dtype]
    return (
        f"The model should do {format_quantity(rate, 'flop/s')}, {100 * used.mfu:.1f} % of the "
        f"peak of {count(num_ranks)} x {gpu.name} in {plan.workload.dtype}."
    )


def layouts(study: Study, prefix: str) -> Section:
    """Return the section that ranks the layouts."""
    ranking = study.ranking()[:_MAX_RANKED]
    if not ranking:
        return Section(question=_COMPARED, anchor=f"{prefix}layouts", blocks=(Text(text=_ALONE),))
    chosen = study.best.plan.layout
    measured = {
        candidate.layout: tuple(
            run.record.median_step_ns for run in study.runs if run.plan.layout == candidate.layout
        )
        for candidate in ranking
    }
    fastest_ns = ranking[0].step.p50_ns
    rows = tuple(
        (
            str(number),
            str(candidate.layout),
            duration(candidate.step.p50_ns) + ("*" if candidate.step.is_extrapolated else ""),
            band(candidate.step.p10_ns, candidate.step.p90_ns),
            change(candidate.step.p50_ns, fastest_ns) if number > 1 else "-",
            size(candidate.peak_bytes),
            ", ".join(map(duration, measured[candidate.layout])) or "-",
        )
        for number, candidate in enumerate(ranking, start=1)
    )
    has_stars = any(candidate.step.is_extrapolated for candidate in ranking)
    plan = study.best.plan
    fit = plan.num_layouts - len(plan.rejections)
    intro = f"Of {count(plan.num_layouts)} layouts considered, {count(fit)} fit."
    if len(rows) < fit:
        intro += f" The best {count(len(rows))} are shown."
    marked = tuple(i for i, candidate in enumerate(ranking) if candidate.layout == chosen)
    drawing = intervals(
        f"{prefix}ranking",
        "Predicted and measured step time of each layout",
        [
            IntervalRow(
                label=str(candidate.layout),
                p10_ns=candidate.step.p10_ns,
                p50_ns=candidate.step.p50_ns,
                p90_ns=candidate.step.p90_ns,
                is_extrapolated=candidate.step.is_extrapolated,
                is_chosen=candidate.layout == chosen,
                measured_ns=measured[candidate.layout],
            )
            for candidate in ranking
        ],
    )
    caption = "Predicted step time of each layout that fits; the one decided on is shaded."
    if has_stars:
        caption += " An open circle is extrapolated: some cost lies outside what was profiled."
    head = ("", "layout", "step", "P10 to P90", "over best", "peak memory", "measured")
    blocks: list[Block] = [
        Text(text=intro),
        Table(head=head, align="rnrrrrr", rows=rows, marked=marked),
        Drawing(svg=drawing, caption=caption),
    ]
    if has_stars:
        blocks.insert(2, Text(text="* extrapolated", role="note"))
    return Section(question=_COMPARED, anchor=f"{prefix}layouts", blocks=tuple(blocks))


def others(study: Study, prefix: str) -> Section:
    """Return the section that says why layouts were rejected, grouped by rule."""
    groups: dict[str, list[Rejection]] = {}
    for rejection in study.rejections():
        groups.setdefault(rejection.rule, []).append(rejection)
    ranked = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    ranking = study.ranking()
    blocks: list[Block] = []
    if len(ranking) > 1:
        best, second = ranking[:2]
        gap = f"{100 * second.step.p50_ns / max(best.step.p50_ns, 1):.1f} %"
        overlap = "overlap" if second.step.p10_ns <= best.step.p90_ns else "do not overlap"
        blocks.append(
            Text(
                text=f"The runner-up, {second.layout}, is predicted to take {gap} of the step time "
                f"of {best.layout}; their bands {overlap}."
            )
        )
    if not ranked:
        blocks.append(Text(text="No layout was rejected: every one considered would fit."))
    else:
        noun = "layout was" if len(study.rejections()) == 1 else "layouts were"
        blocks.append(
            Text(text=f"{count(len(study.rejections()))} {noun} rejected before being timed.")
        )
        rows = tuple(
            (rule, count(len(found)), found[0].layout, found[0].reason) for rule, found in ranked
        )
        head = ("rule", "layouts", "for example", "because")
        blocks.append(Table(head=head, align="nrnl", rows=rows))
    return Section(question="Why not the others?", anchor=f"{prefix}others", blocks=tuple(blocks))
