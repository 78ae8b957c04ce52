"""What `layline plan` prints: what was searched, what is certain of it, and the ranking."""

from collections.abc import Callable, Mapping
from textwrap import wrap

from layline.show import bottleneck
from planner.facts import Facts, facts_of
from planner.lower import simulate_plan
from planner.objectives import figure, told
from planner.plan import Candidate, Certificate, Plan
from planner.search import Effort
from planner.variants import variant_text
from profiles.goal import BEST_IS_HIGH
from reports.certificate import (
    front_text,
    gain_text,
    jitter_text,
    proof_text,
    rejected,
    searched_text,
)
from reports.words import band, count, duration, origin_text, size

WIDTH = 110
COLUMNS: Mapping[str, tuple[str, int, Callable[[float], str]]] = {
    "dollars_per_mtoken": ("$ a Mtoken", 10, lambda value: f"{value:,.4g}"),
    "joules_per_token": ("J a token", 9, lambda value: f"{value:,.4g}"),
    "memory_headroom": ("free", 10, size),
    "goodput": ("goodput", 9, count),
}
"""The objectives that have a column of their own where a job asks for them: head, width, form."""


def plan_text(
    plan: Plan, num_shown: int, effort: Effort | None = None, *, is_interrupted: bool = False
) -> str:
    """Return the outcome of a search; `effort` is what it was allowed, if that is known."""
    facts = facts_of(plan)
    lines = [
        *_header(plan),
        *_wrapped("best of ", searched_text(plan.certificate)),
        *_wrapped("", certainty(plan.certificate, effort, is_interrupted=is_interrupted)),
        "",
        *_table(plan, facts, shown_places(plan, num_shown)),
        *(line for each in plan.variants for line in _wrapped("", variant_text(each))),
        "",
        *_wrapped("bottleneck: ", bottleneck(plan, simulate_plan(plan))),
    ]
    lines += [line for note in facts.assumptions for line in _wrapped("note: ", note)]
    lines += _rejections(plan)
    return "\n".join(lines)


def _header(plan: Plan) -> list[str]:
    work, goal = plan.workload, plan.goal
    lines = [
        f"model {plan.model.name}  {plan.model.num_parameters / 1e6:,.1f} M parameters   "
        f"workload {work.global_batch} x {work.seq_len} tokens a step, {work.dtype}",
        f"cluster {plan.cluster.name}  {count(plan.cluster.num_ranks)} ranks of "
        f"{plan.profile.device.name}",
        f"costs: {origin_text(plan)}",
    ]
    limits = [
        f"{name} at {'least' if name in BEST_IS_HIGH else 'most'} {told(name, limit)}"
        for name, limit in sorted(goal.limits.items())
    ]
    if limits or goal.objectives != ("step_time",):
        asked = " and ".join(goal.objectives)
        lines.append(f"goal: {asked}" + (f"; limits: {', '.join(limits)}" if limits else ""))
    return lines


def certainty(
    certificate: Certificate, effort: Effort | None, *, is_interrupted: bool = False
) -> str:
    """Return the certificate in plain words: proved, within a gap, or how far off at most.

    >>> open_end = Certificate(
    ...     objective="step_time", value=2.0, lower_bound=1.82, gap=0.09, num_layouts=9,
    ...     num_rejected={}, num_bounded=0, num_timed=4, num_open=5)
    >>> certainty(open_end, Effort(budget_s=2.0, gap=0.01))
    'stopped after 2 s: a layout may be better by up to 9.0 %'
    """
    why = ""
    if is_interrupted:
        why = "interrupted"
    elif effort is not None and effort.budget_s is not None and certificate.gap > effort.gap:
        why = f"stopped after {effort.budget_s:g} s"
    if why and certificate.gap > 0:
        return f"{why}: a layout may be better by up to {gain_text(certificate)}"
    return proof_text(certificate)


def shown_places(plan: Plan, num_shown: int) -> tuple[int, ...]:
    """Return the places of the ranking that the table lists.

    These are the best, the chosen one, and of several objectives first of all the front: both its
    ends, and of a long one as many in between as there is room for, evenly.
    """
    places = {plan.chosen, 0}
    if len(plan.goal.objectives) > 1:
        step = max(1.0, (len(plan.front) - 1) / max(1, num_shown - 1))
        spread = (round(number * step) for number in range(num_shown))
        places |= {plan.front[index] for index in spread if index < len(plan.front)}
    rest = (place for place in range(len(plan.ranking)) if place not in places)
    room = num_shown - len(places)
    places |= {place for place, _ in zip(rest, range(max(0, room)), strict=False)}
    return tuple(sorted(place for place in places if place < len(plan.ranking)))


def _table(plan: Plan, facts: Facts, places: tuple[int, ...]) -> list[str]:
    """Return the ranking, a line a place."""
    asked = [name for name in plan.goal.asks_for if name in COLUMNS]
    width = max([len("layout"), *(len(str(plan.ranking[place].layout)) for place in places)])
    marks = _marks(plan)
    head = (
        f"{'':7} {'layout':{width}} {'step':>10} {'P10 to P90':>18} {'tokens/s':>11} {'memory':>10}"
    )
    head += "".join(f" {COLUMNS[name][0]:>{COLUMNS[name][1]}}" for name in asked)
    has_jitter = sum(plan.ranking[place].jittered_ns > 0 for place in places) > 1
    lines = [head + (f" {'jittered':>10}" if has_jitter else "")]
    for place in places:
        candidate = plan.ranking[place]
        lines.append(
            f"{marks(place)} {candidate.layout!s:{width}} {_figures(facts, candidate)}"
            + "".join(f" {_cell(name, facts, candidate)}" for name in asked)
            + (f" {_jittered(candidate):>10}" if has_jitter else "")
            + (" extrapolated" if candidate.step.is_extrapolated else "")
        )
    hidden = len(plan.ranking) - len(places)
    if hidden > 0:
        lines.append(f"{'':7} and {count(hidden)} more, in the plan file")
    if has_jitter:
        lines += _wrapped(f"{'':7} ", f"jittered: {jitter_text()}")
    if len(plan.goal.objectives) > 1:
        on_front = f"* on the front: {front_text(plan.goal.objectives)}"
        lines += _wrapped(f"{'':7} ", f"{on_front}; it has {count(len(plan.front))}")
    return lines


def _marks(plan: Plan) -> Callable[[int], str]:
    front = set(plan.front) if len(plan.goal.objectives) > 1 else set()

    def marks(place: int) -> str:
        chosen = ">" if place == plan.chosen else " "
        return f"{chosen}{'*' if place in front else ' '} {place + 1:>4}"

    return marks


def _figures(facts: Facts, candidate: Candidate) -> str:
    step = candidate.step
    rate = figure("tokens_per_s", facts, step.p50_ns, candidate.peak_bytes)
    return (
        f"{duration(step.p50_ns):>10} {band(step.p10_ns, step.p90_ns):>18} {rate:>11,.0f} "
        f"{size(candidate.peak_bytes):>10}"
    )


def _jittered(candidate: Candidate) -> str:
    return duration(candidate.jittered_ns) if candidate.jittered_ns else "-"


def _cell(name: str, facts: Facts, candidate: Candidate) -> str:
    _, width, form = COLUMNS[name]
    return f"{form(figure(name, facts, candidate.step.p50_ns, candidate.peak_bytes)):>{width}}"


def _rejections(plan: Plan) -> list[str]:
    """Return a line or two a rule: how many it rejected, and one of them with the reason."""
    examples = {rejection.rule: rejection for rejection in reversed(plan.rejections)}
    lines = []
    for rule, number in rejected(plan.certificate):
        text = f"{count(number)} by {rule}"
        if rule in examples:
            text += f", such as {examples[rule].layout}: {examples[rule].reason}"
        lines += _wrapped("rejected: ", text)
    return lines


def _wrapped(head: str, text: str) -> list[str]:
    return wrap(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * max(2, len(head)),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
