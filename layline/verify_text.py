"""What `layline plan --verify` prints: a table of predicted and measured, and a sentence."""

from layline.verify import Verification, VerifiedPlan
from reports.words import change, duration


def verification_text(found: Verification) -> str:
    """Return the race as a table, one plan a line, with what follows from it."""
    width = max(len("layout"), *(len(plan.layout) for plan in found.plans))
    confidence = 100 * (1 - found.error)
    head = f"{confidence:g} % interval"
    lines = [
        f"verified here: {_counted(len(found.plans), 'layout')}, "
        f"{_counted(found.num_rounds, 'round')} of {found.num_steps} steps, "
        f"{_counted(found.num_launches, 'launch', 'launches')}, {found.duration_ns / 1e9:.0f} s",
        "",
        f"{'':2} {'layout':{width}} {'predicted':>10} {'measured':>10} {head:>21} {'off by':>8}"
        "   verdict",
    ]
    for plan in found.plans:
        mark = ">" if plan.place == found.chosen else ""
        is_measured = plan.measured_ns > 0
        lines.append(
            f"{mark:2} {plan.layout:{width}} {duration(plan.predicted_ns):>10} "
            f"{duration(plan.measured_ns) if is_measured else '-':>10} {_interval(plan):>21} "
            f"{change(plan.measured_ns, plan.predicted_ns) if is_measured else '-':>8}   "
            f"{_verdict(plan, found)}"
        )
    return "\n".join([*lines, "", _conclusion(found)])


def interrupted_text(found: Verification) -> str:
    """Return what an interrupted race leaves, and how to go on."""
    return (
        f"{_counted(found.num_rounds, 'round')} of the race begun; the choice is the best that is "
        "known so far; run it again to let the race end"
    )


def _conclusion(found: Verification) -> str:
    """Return which plan is chosen, and why."""
    chosen = found.plans[found.chosen]
    rivals = [p for p in found.plans if p.place != found.chosen and p.verdict != "failed"]
    ranked = (
        "as the model predicted"
        if found.is_as_predicted
        else f"against the model, which has it as number {found.chosen + 1}"
    )
    if not chosen.blocks_ns:
        why = "the model's choice, as nothing was measured yet"
    elif not rivals:
        why = "the only one that was trained"
    elif found.outcome == "tie":
        why = (
            f"those that are left differ by less than {100 * found.tie:g} %, and it was predicted "
            "the fastest of them"
        )
    elif found.outcome == "best":
        why = f"the fastest, {ranked}"
    else:
        rounds = _counted(found.num_rounds, "round")
        why = f"the fastest on average, {ranked}; not certain after {rounds}"
    return f"chosen: {chosen.layout}: {why}"


def _verdict(plan: VerifiedPlan, found: Verification) -> str:
    """Return the verdict on `plan` in words."""
    if plan.verdict == "failed":
        return f"failed: {_brief(plan.reason)}"
    if plan.verdict in ("best", "tie") or plan.place == found.chosen:
        return {"tie": f"tie, within {100 * found.tie:g} %", "open": "fastest so far"}.get(
            plan.verdict, "best"
        )
    if plan.slower_by is None:
        return "too few rounds to tell"
    low, high = (100 * share for share in plan.slower_by)
    if plan.verdict == "open":
        return f"not told apart: {low:+.1f} to {high:+.1f} %"
    than = "" if plan.rival == found.chosen else f" than {found.plans[plan.rival].layout}"
    return f"slower by {low:.1f} to {high:.1f} %{than}"


def _interval(plan: VerifiedPlan) -> str:
    if plan.interval_ns is None:
        return "-"
    low, high = plan.interval_ns
    return f"{duration(low)} to {duration(high)}"


def _brief(reason: str) -> str:
    """Return the line of `reason` that says it: the last where it is a rank's whole traceback.

    >>> _brief("rank 1: ValueError: a\\nmore"), _brief("Traceback (most recent ...\\nError: b")
    ('rank 1: ValueError: a', 'Error: b')
    """
    lines = reason.splitlines()
    return lines[-1] if "Traceback" in reason else lines[0]


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
