"""The sections about the plan: what was decided, against what, and why not the others."""

from collections.abc import Mapping, Sequence

from planner.flops import mean_peak_flops_per_s
from planner.layout import Layout
from planner.objectives import cost, figure, told
from planner.plan import Candidate, Plan, Rejection
from planner.pools import limits_bytes
from planner.waterfall import utilization
from profiles.quantity import format_quantity
from reports.certificate import (
    OBJECTIVE_WORDS,
    front_text,
    jitter_text,
    proof_text,
    rejected,
    stages,
)
from reports.document import Block, Drawing, Section, Table, Text
from reports.figures import IntervalRow, intervals
from reports.front_figure import Point, front_figure
from reports.views import RunView, Study, View
from reports.words import band, change, count, duration, gpus_text, joined, origin_text, size

_MAX_RANKED, _MAX_SHOWN = 12, 40
_IN_EVERY_TABLE = ("step_time", "memory_headroom")
_COMPARED = "Which layouts were compared?"
_ALONE = "The plan holds no ranking: its layout was given, not searched for."
_COSTS = (
    "forward", "backward", "send_forward", "send_backward", "all_reduce", "optimizer", "other",
    "wait",
)  # fmt: skip


def tightest(plan: Plan) -> tuple[int, int]:
    """Return the peak of the pipeline rank that has least left, and its GPU's memory, in bytes."""
    limits = limits_bytes(plan.cluster, plan.layout.pp)
    ranks = zip((rank.total for rank in plan.memory), limits, strict=True)
    return min(ranks, key=lambda rank: rank[1] - rank[0])


def tokens_per_s(plan: Plan, step_ns: int) -> str:
    """Return the training rate at this step time as text, all ranks together."""
    return count(plan.workload.tokens_per_step * 1e9 / max(step_ns, 1))


def decided(study: Study, prefix: str) -> Section:
    """Return the first section: the choice in few sentences, the headline numbers, the trust."""
    view = study.best
    plan = view.plan
    place = f"{count(plan.layout.num_ranks)} rank{'s' if plan.layout.num_ranks > 1 else ''}"
    first = f"Train {plan.model.name} on {place} as {plan.layout}, {_rank(plan)}."
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
    proof = proof_text(plan.certificate)
    third = f" {proof[:1].upper()}{proof[1:]}." if plan.ranking else ""
    blocks = (
        Text(text=f"{first} {second}{third}", role="lead"),
        _headline(view),
        Text(text=_confidence(view), role="note"),
    )
    return Section(question="What was decided?", anchor=f"{prefix}decided", blocks=blocks)


def _rank(plan: Plan) -> str:
    """Return the place of a plan among all layouts, as part of a sentence."""
    if not plan.ranking:
        return "a layout that was given, not searched for"
    best = "the best" if plan.certificate.gap == 0 else "the best found"
    rank = best if plan.chosen == 0 else f"number {plan.chosen + 1}"
    num_layouts = plan.certificate.num_layouts
    return f"{rank} of {count(num_layouts)} layout{'s' if num_layouts > 1 else ''}"


def _headline(view: View) -> Table:
    """Return step time, tokens per second and memory, and the time for all tokens if asked for."""
    plan = view.plan
    low_ns, mid_ns, high_ns = plan.step.p10_ns, plan.step.p50_ns, plan.step.p90_ns
    peak, limit = tightest(plan)
    rates = f"{tokens_per_s(plan, high_ns)} to {tokens_per_s(plan, low_ns)}"
    rows = [
        ("step", duration(mid_ns), band(low_ns, high_ns)),
        ("tokens per second", tokens_per_s(plan, mid_ns), rates),
        ("peak memory, worst rank", size(peak), f"of {size(limit)}"),
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
    num_ranks, dtype = plan.layout.num_ranks, plan.workload.dtype
    rate = used.mfu * num_ranks * mean_peak_flops_per_s(plan.cluster, dtype)
    return (
        f"The model should do {format_quantity(rate, 'flop/s')}, {100 * used.mfu:.1f} % of the "
        f"peak of {count(num_ranks)} x {gpus_text(plan)} in {dtype}."
    )


def layouts(study: Study, prefix: str) -> Section:
    """Return the section that says what was searched, what is certain of it, and the ranking."""
    ranking = study.ranking()
    if not ranking:
        return Section(question=_COMPARED, anchor=f"{prefix}layouts", blocks=(Text(text=_ALONE),))
    measured = {
        candidate.layout: tuple(
            run.record.median_step_ns for run in study.runs if run.plan.layout == candidate.layout
        )
        for candidate in ranking
    }
    blocks: list[Block] = [
        *_searched(study),
        *_front(study, ranking, prefix),
        *_ranked(study, ranking, measured),
        _bands(study, ranking[:_MAX_RANKED], measured, prefix),
    ]
    return Section(question=_COMPARED, anchor=f"{prefix}layouts", blocks=tuple(blocks))


def _searched(study: Study) -> list[Block]:
    """Return what is certain of all layouts, and what became of them."""
    certificate = study.best.plan.certificate
    proof = proof_text(certificate)
    text = (
        f"Every one of the {count(certificate.num_layouts)} layouts of the space is accounted for, "
        "and of each that was not timed a bound says how good it can be at most. "
        f"{proof[:1].upper()}{proof[1:]}."
    )
    head = ("layouts", "", "share")
    return [Text(text=text), Table(head=head, align="lrr", rows=stages(certificate))]


def _front(study: Study, ranking: Sequence[Candidate], prefix: str) -> list[Block]:
    """Return the front as a figure; nothing where the job has one objective."""
    objectives, front = study.best.plan.goal.objectives, study.front()
    if not front:
        return []
    facts, chosen = study.facts(), study.best.plan.layout
    points = [
        Point(
            place=place,
            figures=tuple(
                figure(name, facts, each.step.p50_ns, each.peak_bytes) for name in objectives
            ),
            is_on_front=each.layout in front,
            is_chosen=each.layout == chosen,
        )
        for place, each in enumerate(ranking, start=1)
    ]
    caption = (
        f"The front of {count(len(front))} layouts, filled, with their places in the ranking; the "
        f"one decided on is larger: {front_text(objectives)}."
    )
    return [Drawing(svg=front_figure(f"{prefix}front", objectives, points), caption=caption)]


def _ranked(
    study: Study, ranking: Sequence[Candidate], measured: Mapping[Layout, tuple[int, ...]]
) -> list[Block]:
    """Return the table of the best layouts, and of those on the front."""
    plan, facts, front = study.best.plan, study.facts(), study.front()
    shown = [
        (place, candidate)
        for place, candidate in enumerate(ranking)
        if place < _MAX_RANKED or candidate.layout in front
    ][:_MAX_SHOWN]
    objective, best = study.objective, ranking[0]
    has_jitter = sum(each.jittered_ns > 0 for _, each in shown) > 1
    asked = [name for name in plan.goal.asks_for if name not in _IN_EVERY_TABLE]
    least = cost(objective, facts, best.step.p50_ns, best.peak_bytes)
    rows = tuple(
        (
            f"{place + 1}{' *' if each.layout in front else ''}",
            str(each.layout),
            duration(each.step.p50_ns) + (" ~" if each.step.is_extrapolated else ""),
            band(each.step.p10_ns, each.step.p90_ns),
            change(cost(objective, facts, each.step.p50_ns, each.peak_bytes), least)
            if place
            else "-",
            size(each.peak_bytes),
            *(told(name, figure(name, facts, each.step.p50_ns, each.peak_bytes)) for name in asked),
            *([duration(each.jittered_ns) if each.jittered_ns else "-"] if has_jitter else []),
            *([", ".join(map(duration, measured[each.layout])) or "-"] if study.runs else []),
        )
        for place, each in shown
    )
    head = (
        "", "layout", "step", "P10 to P90", "over best", "peak memory",
        *(OBJECTIVE_WORDS[name] for name in asked), *(["jittered"] if has_jitter else []),
        *(["measured"] if study.runs else []),
    )  # fmt: skip
    marked = tuple(i for i, (_, each) in enumerate(shown) if each.layout == plan.layout)
    notes = []
    if len(shown) < len(ranking):
        notes.append(f"{count(len(shown))} of the best {count(len(ranking))} are shown.")
    if has_jitter:
        notes.append(f"Jittered: {jitter_text()}.")
    if front:
        notes.append("* on the front.")
    if any(each.step.is_extrapolated for _, each in shown):
        notes.append("~ extrapolated: some cost lies outside what was profiled.")
    table = Table(head=head, align="rb" + "r" * (len(head) - 2), rows=rows, marked=marked)
    return [table, *([Text(text=" ".join(notes), role="note")] if notes else [])]


def _bands(
    study: Study,
    ranking: Sequence[Candidate],
    measured: Mapping[Layout, tuple[int, ...]],
    prefix: str,
) -> Drawing:
    """Return the steps of the best layouts as a figure."""
    chosen = study.best.plan.layout
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
    caption = "Predicted step time of the best layouts; the one decided on is shaded."
    if any(candidate.step.is_extrapolated for candidate in ranking):
        caption += " An open circle is extrapolated: some cost lies outside what was profiled."
    return Drawing(svg=drawing, caption=caption)


def others(study: Study, prefix: str) -> Section:
    """Return the section that says why layouts were rejected, grouped by rule."""
    ranking = study.ranking()
    blocks: list[Block] = []
    if len(ranking) > 1:
        blocks.append(Text(text=_runner_up(*ranking[:2])))
    by_rule = rejected(study.best.plan.certificate)
    examples = {rejection.rule: rejection for rejection in reversed(study.rejections())}
    if not by_rule:
        blocks.append(Text(text="No layout was rejected: every one of the space would fit."))
    else:
        num_rejected = sum(number for _, number in by_rule)
        noun = "layout was" if num_rejected == 1 else "layouts were"
        blocks.append(Text(text=f"{count(num_rejected)} {noun} rejected before being timed."))
        rows = tuple(
            (rule, count(number), *_example(examples.get(rule))) for rule, number in by_rule
        )
        head = ("rule", "layouts", "for example", "because")
        blocks.append(Table(head=head, align="nrbl", rows=rows))
    return Section(question="Why not the others?", anchor=f"{prefix}others", blocks=tuple(blocks))


def _runner_up(best: Candidate, second: Candidate) -> str:
    share = f"{100 * second.step.p50_ns / max(best.step.p50_ns, 1):.1f} %"
    overlap = "overlap" if second.step.p10_ns <= best.step.p90_ns else "do not overlap"
    return (
        f"The runner-up, {second.layout}, is predicted to take {share} of the step time of "
        f"{best.layout}; their bands {overlap}."
    )


def _example(rejection: Rejection | None) -> tuple[str, str]:
    return ("-", "-") if rejection is None else (rejection.layout, rejection.reason)
