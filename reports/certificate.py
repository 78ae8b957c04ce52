"""A certificate in words: what became of every layout, and how much better any could be."""

import math

from planner.finalists import SPREAD
from planner.plan import Certificate
from reports.words import count

OBJECTIVE_WORDS = {
    "step_time": "step time",
    "tokens_per_s": "tokens per second",
    "dollars_per_mtoken": "price of a token",
    "joules_per_token": "energy of a token",
    "memory_headroom": "memory of the fullest rank",
    "goodput": "goodput",
}
"""What the objectives are called in a sentence."""


def searched_text(certificate: Certificate) -> str:
    """Return in one sentence what became of all layouts.

    >>> searched_text(Certificate(
    ...     objective="step_time", value=2.0, lower_bound=1.9, gap=0.05, num_layouts=2210,
    ...     num_rejected={"memory": 900, "divisibility": 110}, num_bounded=1100, num_timed=90,
    ...     num_open=10))
    '2,210 layouts: 90 timed, 1,100 bounded away, 1,010 rejected (900 memory, 110 divisibility), \
10 left open'
    """
    told = [f"{count(certificate.num_timed)} timed"]
    if certificate.num_bounded:
        told.append(f"{count(certificate.num_bounded)} bounded away")
    if by_rule := rejected(certificate):
        rules = ", ".join(f"{count(number)} {rule}" for rule, number in by_rule)
        told.append(f"{count(sum(number for _, number in by_rule))} rejected ({rules})")
    if certificate.num_open:
        told.append(f"{count(certificate.num_open)} left open")
    noun = "layout" if certificate.num_layouts == 1 else "layouts"
    return f"{count(certificate.num_layouts)} {noun}: {', '.join(told)}"


def rejected(certificate: Certificate) -> list[tuple[str, int]]:
    """Return the rules that rejected layouts with their counts, the largest first."""
    found = [(rule, number) for rule, number in certificate.num_rejected.items() if number]
    return sorted(found, key=lambda each: (-each[1], each[0]))


def proof_text(certificate: Certificate) -> str:
    """Return what is certain of all layouts, those included that nobody timed.

    >>> proof_text(Certificate(
    ...     objective="step_time", value=2.0, lower_bound=1.985, gap=0.0075, num_layouts=9,
    ...     num_rejected={}, num_bounded=0, num_timed=9, num_open=0))
    'no layout of this space is better in step time by more than 0.8 %'
    """
    name = OBJECTIVE_WORDS[certificate.objective]
    if certificate.gap == 0:
        return f"proved best: no layout of this space is better in {name}"
    return f"no layout of this space is better in {name} by more than {gain_text(certificate)}"


def gain_text(certificate: Certificate) -> str:
    """Return how much better a layout could be at most, rounded up, to stay true.

    Of rates it is a share of the rate, and so not the gap itself: half the time a token is twice
    the tokens per second.

    >>> gain_text(Certificate(
    ...     objective="tokens_per_s", value=2e-6, lower_bound=1e-6, gap=0.5, num_layouts=9,
    ...     num_rejected={}, num_bounded=0, num_timed=9, num_open=0))
    '100.0 %'
    """
    share, bound = certificate.gap, certificate.lower_bound
    if certificate.objective in ("tokens_per_s", "goodput"):
        share = certificate.value / bound - 1 if bound > 0 else math.inf
    if share == math.inf:
        return "any amount"
    return f"{math.ceil(1000 * share) / 10:,.1f} %"


def stages(certificate: Certificate) -> tuple[tuple[str, str, str], ...]:
    """Return what became of the layouts as rows of a table: the stage, how many, which share."""
    rejections = [(f"rejected: {rule}", number) for rule, number in rejected(certificate)]
    found = [
        ("accounted for", certificate.num_layouts),
        *rejections,
        ("bounded away, never timed", certificate.num_bounded),
        ("timed by their full schedule", certificate.num_timed),
        ("left open when the search ended: the bound holds", certificate.num_open),
    ]
    return tuple(
        (name, count(number), f"{100 * number / max(1, certificate.num_layouts):.1f} %")
        for name, number in found
        if number
    )


def jitter_text() -> str:
    """Return what a jittered step is.

    >>> jitter_text()
    'until the slowest replica is done, where every kernel and message varies by 2 %'
    """
    varies = f"every kernel and message varies by {100 * SPREAD:g} %"
    return f"until the slowest replica is done, where {varies}"


def front_text(objectives: tuple[str, ...]) -> str:
    """Return what the front of these objectives is.

    >>> front_text(("step_time", "memory_headroom"))
    'of all that was timed, what betters step time or memory of the fullest rank worsens another'
    """
    *first, last = (OBJECTIVE_WORDS[name] for name in objectives)
    return f"of all that was timed, what betters {', '.join(first)} or {last} worsens another"
