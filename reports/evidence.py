"""The sections about a step and a run: where time and memory go, predicted and measured."""

from collections.abc import Sequence

from planner.lower import simulation_of
from planner.plan import Plan
from planner.waterfall import waterfall
from reports.compare import Comparison, exposed_ns
from reports.decision import tightest, tokens_per_s
from reports.document import Block, Drawing, Section, Table, Text
from reports.figures import (
    MAX_ROWS,
    IntervalRow,
    cascade,
    intervals,
    kind_bars,
    memory_bars,
    memory_rows,
    shown_ranks,
    shows_limit,
    step_curves,
)
from reports.gantt import gantt, names_actions
from reports.views import MIN_GAP, PlanView, RunView, Study, View, order_agreement
from reports.words import (
    KIND_NAMES,
    band,
    change,
    count,
    duration,
    joined,
    signed_duration,
    size,
    stages_text,
    utilization_text,
)
from simulator.idle import stream_uses


def heading(study: Study, view: View) -> list[Block]:
    """Return a heading that names `view`, where the study has several."""
    if len(study.views) == 1:
        return []
    text = str(view.plan.layout)
    if isinstance(view, RunView):
        text += f"   ({view.path})"
    return [Text(text=text, role="heading")]


def step(study: Study, prefix: str) -> Section:
    """Return the section that shows one step: Gantt, and time by kind."""
    blocks: list[Block] = []
    for number, view in enumerate(study.views):
        record = view.record if isinstance(view, RunView) else None
        drawing = gantt(
            f"{prefix}gantt{number}",
            view.plan,
            view.predicted,
            record.timeline if record is not None else None,
        )
        blocks += heading(study, view)
        blocks.append(Drawing(svg=drawing, caption=_gantt_caption(view)))
        blocks += _parts(f"{prefix}parts{number}", view.plan)
        if isinstance(view, RunView):
            comparison = view.comparison()
            blocks += _kinds_measured(comparison)
            if view.plan.layout.num_ranks > 1:
                ranks = shown_ranks(view.plan.layout)
                bars = kind_bars(f"{prefix}kinds{number}", comparison, ranks)
                caption = "Time in a step by kind, predicted above measured, rank by rank."
                blocks.append(Drawing(svg=bars, caption=caption))
        else:
            blocks += _kinds_predicted(view)
    return Section(question="Where does a step go?", anchor=f"{prefix}step", blocks=tuple(blocks))


def _parts(name: str, plan: Plan) -> list[Block]:
    """Return what the predicted step goes to, and the shares of the peak that follow from it."""
    found = waterfall(plan, stream_uses(simulation_of(plan)))
    caption = (
        "What the predicted step goes to, from what the model's arithmetic would take at the peak "
        "rate down to the whole step; the mean over the pipeline's ranks."
    )
    return [
        Drawing(svg=cascade(name, found), caption=caption),
        Text(text=utilization_text(plan, found), role="note"),
    ]


def _gantt_caption(view: View) -> str:
    layout = view.plan.layout
    text = "One step. Numbers are micro-batches; blanks are waiting."
    if names_actions(view.plan):
        text += " Where there is room the whole action stands: 4F0 is the forward of 0 on stage 4."
    if layout.pp > MAX_ROWS:
        text += f" The first {MAX_ROWS} of {layout.pp} pipeline ranks are shown."
    if layout.num_ranks > layout.pp:
        text += f" Each predicted row stands for the {layout.dp * layout.tp} equal ranks of it."
    if isinstance(view, RunView):
        text += (
            " The measured half is one traced step, which need not be the median one; the dotted "
            "line is the predicted end."
        )
        if len(shown_ranks(layout)) < layout.num_ranks:
            text += " Of equal ranks the first is shown."
    return text


def _kinds_measured(comparison: Comparison) -> list[Block]:
    critical = comparison.critical
    rows = [
        (
            KIND_NAMES[time.kind],
            duration(time.predicted_ns),
            duration(time.measured_ns),
            signed_duration(time.measured_ns - time.predicted_ns),
            change(time.measured_ns, time.predicted_ns),
        )
        for time in critical.kinds
        if time.predicted_ns or time.measured_ns
    ]
    difference_ns = comparison.measured_ns - comparison.predicted_ns
    rows.append(
        (
            "step",
            duration(comparison.predicted_ns),
            duration(comparison.measured_ns),
            signed_duration(difference_ns),
            change(comparison.measured_ns, comparison.predicted_ns),
        )
    )
    idle = 100 * critical.measured_idle_ns / max(comparison.measured_ns, 1)
    text = (
        f"Rank {critical.rank} ({stages_text(critical.stages)}) had the most work of its own; in "
        f"the median step it was idle for {idle:.1f} %."
    )
    head = ("kind", "predicted", "measured", "difference", "")
    table = Table(head=head, align="lrrrr", rows=tuple(rows), marked=(len(rows) - 1,))
    return [Text(text=text), table]


def _kinds_predicted(view: PlanView) -> list[Block]:
    times = [exposed_ns(view.predicted, rank) for rank in range(view.plan.layout.pp)]
    total = max(view.predicted.makespan_ns, 1)
    rows = tuple(
        (
            stages_text(view.plan.stages_of(rank)).split()[1],
            *(duration(time.get(kind, 0)) for kind in _used(times)),
            f"{100 * time['idle'] / total:.1f} %",
        )
        for rank, time in enumerate(times)
    )
    head = ("stage", *(KIND_NAMES[kind] for kind in _used(times)), "idle share")
    return [Table(head=head, align="l" + "r" * (len(head) - 1), rows=rows)]


def _used(times: Sequence[dict[str, int]]) -> list[str]:
    return [kind for kind in KIND_NAMES if any(time.get(kind) for time in times)]


def memory(study: Study, prefix: str) -> Section:
    """Return the section that shows memory per rank against the limit."""
    blocks: list[Block] = []
    for number, view in enumerate(study.views):
        record = view.record if isinstance(view, RunView) else None
        rows = memory_rows(view.plan, record)
        peak, limit = tightest(view.plan)
        verdict = "fits" if peak <= limit else "does not fit"
        text = f"It {verdict}: the worst rank should hold {size(peak)} of {size(limit)}"
        if record is not None:
            measured = max(rank.peak_bytes for rank in record.memory)
            text += f", and held {size(measured)} ({change(measured, peak)})"
        blocks += heading(study, view)
        blocks.append(Text(text=text + "."))
        drawing = memory_bars(f"{prefix}memory{number}", rows, limit)
        caption = "Peak memory by what holds it."
        if record is not None:
            caption += " The dark line below each bar is the measured peak of that rank."
        if not shows_limit(rows, limit):
            caption += f" The limit of {size(limit)} lies far to the right."
        blocks.append(Drawing(svg=drawing, caption=caption))
    return Section(question="Does it fit?", anchor=f"{prefix}memory", blocks=tuple(blocks))


def run(study: Study, prefix: str) -> Section:
    """Return the section that holds the run against the prediction; the study has a run."""
    blocks: list[Block] = []
    for number, view in enumerate(study.runs):
        comparison = view.comparison()
        blocks += heading(study, view)
        blocks.append(Text(text=_run_sentence(view, comparison)))
        if view.record.steps:
            curves = step_curves(f"{prefix}steps{number}", comparison, view.record)
            caption = (
                "Step time of the slowest rank in front of the predicted band, and the loss. "
                "Warm-up steps do not count; a triangle lies above the frame."
            )
            blocks.append(Drawing(svg=curves, caption=caption))
        blocks += _explanations(comparison)
    return Section(
        question="Did the run do what was predicted?", anchor=f"{prefix}run", blocks=tuple(blocks)
    )


def _run_sentence(view: RunView, comparison: Comparison) -> str:
    num_timed = comparison.num_steps - comparison.num_warmup
    inside = "inside" if comparison.is_within_band else "outside"
    text = (
        f"The median of {count(num_timed)} timed steps took {duration(comparison.measured_ns)}, "
        f"{change(comparison.measured_ns, comparison.predicted_ns)} against the predicted "
        f"{duration(comparison.predicted_ns)} and {inside} the band of "
        f"{band(comparison.predicted_p10_ns, comparison.predicted_p90_ns)}: "
        f"{tokens_per_s(view.plan, comparison.measured_ns)} tokens per second."
    )
    if comparison.first_loss is not None and comparison.last_loss is not None:
        text += (
            f" The loss went from {comparison.first_loss:.3f} to {comparison.last_loss:.3f} over "
            f"{count(comparison.num_steps)} steps."
        )
    return text


def _explanations(comparison: Comparison) -> list[Block]:
    if not comparison.explanations:
        return [Text(text="Predicted and measured step agree to the nanosecond.")]
    rows = [(duration(comparison.predicted_ns), "predicted")]
    rows += [(signed_duration(p.contribution_ns), p.text) for p in comparison.explanations]
    rows.append((duration(comparison.measured_ns), "measured"))
    text = (
        f"What lies between the two, on rank {comparison.critical_rank}, largest part first; the "
        "parts add up exactly:"
    )
    marked = (0, len(rows) - 1)
    table = Table(head=("time", "why"), align="rl", rows=tuple(rows), marked=marked)
    return [Text(text=text), table]


def _names(runs: Sequence[RunView]) -> list[str]:
    """Return the shortest name of each run that tells them apart: layout, model, directory."""
    parts = [(str(r.plan.layout), r.plan.model.name, r.path.rstrip("/").split("/")[-1])
             for r in runs]  # fmt: skip
    shown = [0, *(part for part in (1, 2) if len({names[part] for names in parts}) > 1)]
    if len({names[0] for names in parts}) == len(parts):
        shown = shown[: 2 if 1 in shown else 1]
    return [", ".join(names[part] for part in shown) for names in parts]


def overview(runs: Sequence[RunView]) -> Section:
    """Return the section over several runs: did they come out in the predicted order?"""
    named = [(view, view.comparison()) for view in runs]
    named.sort(key=lambda pair: pair[1].predicted_ns)
    names = _names([view for view, _ in named])
    agreement = order_agreement(
        [(name, c.predicted_ns, c.measured_ns) for name, (_, c) in zip(names, named, strict=True)]
    )
    num_right = agreement.num_pairs - len(agreement.wrong)
    num_inside = sum(c.is_within_band for _, c in named)
    if agreement.num_pairs:
        text = (
            f"{num_right} of {agreement.num_pairs} pairs of runs whose measured steps differ by "
            f"more than {100 * MIN_GAP:.0f} % came out in the predicted order."
        )
    else:
        text = f"No two measured steps differ by more than {100 * MIN_GAP:.0f} %."
    text += f" {num_inside} of {len(named)} runs lie inside their predicted band."
    if agreement.wrong:
        pairs = [f"{fast} was faster than {slow}" for fast, slow in agreement.wrong]
        text += f" Against the prediction, {joined(pairs)}."
    rows = tuple(
        (
            name,
            duration(c.predicted_ns) + ("*" if c.is_extrapolated else ""),
            duration(c.measured_ns),
            change(c.measured_ns, c.predicted_ns),
            "yes" if c.is_within_band else "no",
        )
        for name, (_, c) in zip(names, named, strict=True)
    )
    head = ("run", "predicted", "measured", "difference", "in band")
    drawing = intervals(
        "runs",
        "Predicted and measured step time of each run",
        [
            IntervalRow(
                label=name,
                p10_ns=c.predicted_p10_ns,
                p50_ns=c.predicted_ns,
                p90_ns=c.predicted_p90_ns,
                is_extrapolated=c.is_extrapolated,
                is_chosen=False,
                measured_ns=(c.measured_ns,),
            )
            for name, (_, c) in zip(names, named, strict=True)
        ],
    )
    caption = "Each run, in the predicted order: the band, and where the measured median fell."
    return Section(
        question="Did the runs come out as predicted?",
        anchor="runs",
        blocks=(
            Text(text=text, role="lead"),
            Table(head=head, align="nrrrr", rows=rows),
            Drawing(svg=drawing, caption=caption),
        ),
    )
