"""Predicted against measured: where one run of a plan left it, and what explains the difference."""

from dataclasses import dataclass, replace

from planner.plan import Plan
from planner.record import RunRecord
from profiles.profile import Profile
from reports.words import KIND_NAMES, change, count, duration, signed_duration, size, stages_text
from simulator.timeline import Timeline

COMPUTE_KINDS = ("forward", "backward", "optimizer")
"""Kinds whose time follows the speed of the machine."""

_SCALED_BY = {
    "compute": ("forward", "backward"),
    "host": ("forward", "backward"),
    "optimizer": ("optimizer",),
    "communication": (
        "all_reduce",
        "send",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "push",
        "pull",
    ),
}
_WORK_KINDS = (*COMPUTE_KINDS, "data", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class KindTime:
    """Time that one rank is seen spending on one kind in a step, in ns.

    Work hidden behind other work does not count; `idle` is the time in which nothing runs.
    """

    kind: str
    predicted_ns: int
    measured_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankComparison:
    """One rank of the run beside the pipeline rank that stands for it in the prediction.

    `stages` are those that it holds.
    """

    rank: int
    stages: tuple[int, ...]
    kinds: tuple[KindTime, ...]
    predicted_peak_bytes: int
    measured_peak_bytes: int

    @property
    def predicted_busy_ns(self) -> int:
        """Predicted time in which something runs."""
        return sum(time.predicted_ns for time in self.kinds if time.kind != "idle")

    @property
    def measured_busy_ns(self) -> int:
        """Measured time in which something runs."""
        return sum(time.measured_ns for time in self.kinds if time.kind != "idle")

    @property
    def measured_idle_ns(self) -> int:
        """Measured time in which nothing runs."""
        return sum(time.measured_ns for time in self.kinds if time.kind == "idle")

    @property
    def measured_work_ns(self) -> int:
        """Measured time of the spans that no other rank can lengthen: all but messages."""
        return sum(time.measured_ns for time in self.kinds if time.kind in _WORK_KINDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One reason why the step is longer (positive) or shorter than predicted, in ns.

    `name` is `machine`, a span kind, `idle` or `unexplained`; `text` says it to a person.
    """

    name: str
    contribution_ns: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One run beside its plan.

    `ratio` is the measured over the predicted median step; `explanations` are those of the rank
    `critical_rank`, largest first, and predicted_ns plus all contributions is measured_ns.
    """

    plan_digest: str
    layout: str
    num_steps: int
    num_warmup: int
    predicted_ns: int
    predicted_p10_ns: int
    predicted_p90_ns: int
    measured_ns: int
    measured_p10_ns: int
    measured_p90_ns: int
    ratio: float
    is_within_band: bool
    is_extrapolated: bool
    machine_slowdown: float
    first_loss: float | None
    last_loss: float | None
    critical_rank: int
    ranks: tuple[RankComparison, ...]
    explanations: tuple[Explanation, ...]

    @property
    def critical(self) -> RankComparison:
        """The rank that the explanations speak of."""
        return self.ranks[self.critical_rank]


def compare(plan: Plan, record: RunRecord, predicted: Timeline) -> Comparison:
    """Return `record` beside the `predicted` timeline of its `plan`.

    `predicted` has one rank a pipeline rank. The critical rank is the one with the most measured
    work of its own, the first of equals: the others wait for it. Messages do not count as work,
    since their measured time includes the wait for the partner.
    Raises ValueError when the record belongs to another plan or to another number of ranks.
    """
    if record.plan_digest != plan.plan_digest:
        raise ValueError(
            f"the record belongs to plan {record.plan_digest[:12]}, not to {plan.plan_digest[:12]}"
        )
    found = (len(record.kind_ns), len(record.memory))
    if found != (plan.layout.num_ranks,) * 2:
        raise ValueError(
            f"the record has times of {found[0]} and memory of {found[1]} ranks; "
            f"the layout has {plan.layout.num_ranks}"
        )
    ranks = tuple(
        _compare_rank(plan, record, predicted, rank) for rank in range(plan.layout.num_ranks)
    )
    critical = max(ranks, key=lambda rank: (rank.measured_work_ns, -rank.rank))
    measured_ns, step = record.median_step_ns, plan.step
    return Comparison(
        plan_digest=plan.plan_digest,
        layout=str(plan.layout),
        num_steps=len(record.steps),
        num_warmup=record.num_warmup,
        predicted_ns=step.p50_ns,
        predicted_p10_ns=step.p10_ns,
        predicted_p90_ns=step.p90_ns,
        measured_ns=measured_ns,
        measured_p10_ns=record.p10_step_ns,
        measured_p90_ns=record.p90_step_ns,
        ratio=measured_ns / max(step.p50_ns, 1),
        is_within_band=step.p10_ns <= measured_ns <= step.p90_ns,
        is_extrapolated=step.is_extrapolated,
        machine_slowdown=record.machine_slowdown,
        first_loss=record.steps[0].loss if record.steps else None,
        last_loss=record.steps[-1].loss if record.steps else None,
        critical_rank=critical.rank,
        ranks=ranks,
        explanations=_explain(critical, record, step.p50_ns),
    )


def exposed_ns(timeline: Timeline, rank: int) -> dict[str, int]:
    """Return the time of `rank` by kind in ns, each instant counted once, and `idle`.

    While the stream `compute` works, the instant is its; otherwise it belongs to the first other
    stream, by name, that works. The sum is the makespan of the whole timeline.

    >>> from simulator.timeline import Span
    >>> a = Span(rank=0, stream="compute", name="0F0", kind="forward", start_ns=0, end_ns=5)
    >>> b = Span(rank=0, stream="to 1", name="0F0 to 1", kind="send", start_ns=3, end_ns=9)
    >>> exposed_ns(Timeline(source="simulated", spans=(a, b)), 0)
    {'forward': 5, 'send': 4, 'idle': 0}
    """
    edges: list[tuple[int, int, tuple[bool, str, str]]] = []
    for span in timeline.spans:
        if span.rank == rank:
            claim = (span.stream != "compute", span.stream, str(span.kind))
            edges += [(span.start_ns, 1, claim), (span.end_ns, -1, claim)]
    exposed: dict[str, int] = {}
    active: dict[tuple[bool, str, str], int] = {}
    before_ns = 0
    for at_ns, sign, claim in sorted(edges):
        if active and at_ns > before_ns:
            kind = min(active)[2]
            exposed[kind] = exposed.get(kind, 0) + at_ns - before_ns
        before_ns = at_ns
        active[claim] = active.get(claim, 0) + sign
        if not active[claim]:
            del active[claim]
    return {**exposed, "idle": timeline.makespan_ns - sum(exposed.values())}


def _compare_rank(plan: Plan, record: RunRecord, predicted: Timeline, rank: int) -> RankComparison:
    pipeline_rank = plan.layout.place(rank).pp
    predicted_ns = exposed_ns(predicted, pipeline_rank)
    predicted_ns["idle"] += predicted_ns.pop("wait", 0)
    if not any(times.get("send") for times in record.kind_ns):
        # A run whose runtime hides its messages measures them as idle; so is the prediction read.
        predicted_ns["idle"] += predicted_ns.pop("send", 0)
    busy_ns = record.kind_ns[rank]
    # Streams that overlap can be busy for longer than the step lasts; that is no idle time.
    idle_ns = max(0, record.median_step_ns - sum(busy_ns.values()))
    measured_ns = {**busy_ns, "idle": idle_ns}
    return RankComparison(
        rank=rank,
        stages=plan.stages_of(pipeline_rank),
        kinds=tuple(
            KindTime(
                kind=kind,
                predicted_ns=predicted_ns.get(kind, 0),
                measured_ns=measured_ns.get(kind, 0),
            )
            for kind in KIND_NAMES
        ),
        predicted_peak_bytes=plan.memory[pipeline_rank].total,
        measured_peak_bytes=record.memory[rank].peak_bytes,
    )


def _explain(
    critical: RankComparison, record: RunRecord, predicted_step_ns: int
) -> tuple[Explanation, ...]:
    """Return the contributions of `critical` that lead from the predicted to the measured step.

    machine = sum over compute kinds of (slowdown - 1) * predicted; each kind = what is left of
    measured - predicted; unexplained = what the kinds leave open: overlapping streams, medians
    that do not add up, and a band whose middle is not the timeline without chance.
    """
    slowdown = record.machine_slowdown
    slower_ns = {
        time.kind: round((slowdown - 1) * time.predicted_ns)
        for time in critical.kinds
        if time.kind in COMPUTE_KINDS
    }
    word = "slower" if slowdown > 1 else "faster"
    found = [
        Explanation(
            name="machine",
            contribution_ns=sum(slower_ns.values()),
            text=f"the machine ran {_times(slowdown)} {word} than when it was profiled",
        )
    ]
    for time in critical.kinds:
        expected_ns = time.predicted_ns + slower_ns.get(time.kind, 0)
        at_speed = " at that speed" if slower_ns.get(time.kind) else ""
        noun = "idle (waiting, or not traced)" if time.kind == "idle" else KIND_NAMES[time.kind]
        found.append(
            Explanation(
                name=time.kind,
                contribution_ns=time.measured_ns - expected_ns,
                text=f"{noun}: {duration(expected_ns)} expected{at_speed}, "
                f"{duration(time.measured_ns)} measured",
            )
        )
    explained_ns = sum(explanation.contribution_ns for explanation in found)
    found.append(
        Explanation(
            name="unexplained",
            contribution_ns=record.median_step_ns - predicted_step_ns - explained_ns,
            text="unexplained: overlap, medians that do not add up, chance in the estimate",
        )
    )
    # The sort is stable: equal contributions keep the order of the kinds.
    found.sort(key=lambda explanation: -abs(explanation.contribution_ns))
    return tuple(explanation for explanation in found if explanation.contribution_ns)


def _times(slowdown: float) -> str:
    return f"{max(slowdown, 1 / slowdown if slowdown > 0 else 1):.2f} x"


def scales_from(profile: Profile, comparison: Comparison) -> Profile:
    """Return `profile` with the factors that make its prediction fit the run of `comparison`.

    Each factor is multiplied by measured / predicted time, summed over all ranks: `compute` and
    `host` by forward and backward, in which both are mixed, `optimizer` by the optimizer,
    `communication` by the all-reduce and the messages. What was predicted or measured as nothing
    keeps its factor. A machine that was slower during the run is part of the fit.
    """
    totals = {
        kind: (
            sum(t.predicted_ns for rank in comparison.ranks for t in rank.kinds if t.kind == kind),
            sum(t.measured_ns for rank in comparison.ranks for t in rank.kinds if t.kind == kind),
        )
        for kind in KIND_NAMES
    }
    scales = dict(profile.scales)
    for scale, kinds in _SCALED_BY.items():
        predicted_ns, measured_ns = (sum(totals[kind][side] for kind in kinds) for side in (0, 1))
        if predicted_ns and measured_ns:
            scales[scale] = scales.get(scale, 1.0) * measured_ns / predicted_ns
    return replace(profile, scales=scales)


def format_comparison(comparison: Comparison) -> str:
    """Return the comparison as text for a terminal of 100 columns, with a newline at the end."""
    difference_ns = comparison.measured_ns - comparison.predicted_ns
    lines = [
        *_headline(comparison),
        "",
        *_kind_table(comparison),
        "",
        *_rank_table(comparison),
        "",
        f"what explains {signed_duration(difference_ns)}, on rank {comparison.critical_rank}",
        *(
            f"  {signed_duration(explanation.contribution_ns):>10}  {explanation.text}"
            for explanation in comparison.explanations
        ),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _headline(comparison: Comparison) -> list[str]:
    inside = "inside" if comparison.is_within_band else "outside"
    kind = " (extrapolated)" if comparison.is_extrapolated else ""
    lines = [
        f"{comparison.layout}   {count(comparison.num_steps)} steps, "
        f"{count(comparison.num_warmup)} of them warm-up",
        f"step  predicted {duration(comparison.predicted_ns)}{kind}, P10 to P90 "
        f"{duration(comparison.predicted_p10_ns)} to {duration(comparison.predicted_p90_ns)}",
        f"      measured  {duration(comparison.measured_ns)}, "
        f"{change(comparison.measured_ns, comparison.predicted_ns)}, {inside} the predicted band",
    ]
    if comparison.first_loss is not None and comparison.last_loss is not None:
        lines.append(f"loss  {comparison.first_loss:.4f} to {comparison.last_loss:.4f}")
    return lines


def _kind_table(comparison: Comparison) -> list[str]:
    critical = comparison.critical
    lines = [
        f"rank {critical.rank} ({stages_text(critical.stages)}), the one with most work; its step",
        f"  {'kind':<12}{'predicted':>12}{'measured':>12}{'difference':>12}{'':>10}",
    ]
    rows = (
        f"  {KIND_NAMES[time.kind]:<12}{duration(time.predicted_ns):>12}"
        f"{duration(time.measured_ns):>12}"
        f"{signed_duration(time.measured_ns - time.predicted_ns):>12}"
        f"{change(time.measured_ns, time.predicted_ns):>10}"
        for time in critical.kinds
        if time.predicted_ns or time.measured_ns
    )
    return [*lines, *rows]


def _rank_table(comparison: Comparison) -> list[str]:
    head = ("rank", "stage", "busy predicted", "busy measured", "peak predicted", "peak measured")
    held = [stages_text(rank.stages).split()[1] for rank in comparison.ranks]
    width = max(5, *map(len, held)) + 1
    lines = [f"  {head[0]:<5}{head[1]:<{width}}" + "".join(f"{title:>16}" for title in head[2:])]
    for rank, stages in zip(comparison.ranks, held, strict=True):
        cells = (
            duration(rank.predicted_busy_ns),
            duration(rank.measured_busy_ns),
            size(rank.predicted_peak_bytes),
            size(rank.measured_peak_bytes),
            change(rank.measured_peak_bytes, rank.predicted_peak_bytes),
        )
        lines.append(
            f"  {rank.rank:<5}{stages:<{width}}" + "".join(f"{cell:>16}" for cell in cells)
        )
    return lines
