"""What `layline plan` says of a choice: why it, why not others, and what would change it."""

from collections.abc import Mapping, Sequence
from textwrap import fill

from planner.account import Account, differences
from planner.explain import HOLDING_WORDS, PART_WORDS, Comparison, Explanation
from planner.flips import KNOB_WORDS, Point, Sensitivity
from planner.relax import NearMiss
from planner.thumb import Change, ThumbRule
from reports.words import change, duration, joined, signed_duration, size

WIDTH = 100
BOUGHT = ("inter_node_rate", "intra_node_rate", "memory")
"""What money buys more of; another batch or sequence is another job."""


def comparison_text(found: Comparison) -> str:
    """Return what `--why` says of a layout: a paragraph, then both steps by part."""
    account, memory = found.account, found.account.tightest
    if account.layout == found.chosen.layout:
        told = f"{found.conclusion} {_step(account)}; {_memory(account)}."
        return "\n".join((f"why {account.text}", _wrapped(told), "", _table({"choice": account})))
    holders = joined([f"{HOLDING_WORDS[name]} {size(held)}" for name, held in memory.holdings[:3]])
    alone = "By its step alone it" if found.broken else "It"
    told = (
        f"{found.conclusion} {_step(account)}; {_memory(account)}, most of it {holders}. {alone} "
        f"would be number {found.place} among the layouts that were timed."
    )
    changes = ", ".join(found.differs) or "another split into stages"
    return "\n".join(
        (
            f"why not {account.text}",
            _wrapped(told),
            _wrapped(f"From the choice to it: {changes}."),
            "",
            _table({"choice": found.chosen, "this one": account}),
        )
    )


def explanation_text(found: Explanation) -> str:
    """Return what `--explain` says: the choice and its rival, what would flip it, what is near."""
    return "\n\n".join(
        (
            _wrapped(_choice(found)),
            _runner_up(found),
            _flips(found),
            _near(found.near_misses),
            _thumb(found.thumb, found.chosen),
        )
    )


def _choice(found: Explanation) -> str:
    account = found.chosen
    step_ns = account.step.p50_ns
    parts = sorted(account.parts_ns.items(), key=lambda part: (-part[1], part[0]))
    shares = [f"{100 * ns / step_ns:.1f} % {PART_WORDS[name]}" for name, ns in parts[:4] if ns]
    return (
        f"The choice is {account.text}. {_step(account)}, which is {joined(shares)}; "
        f"{_memory(account)}. {_what_helps(found)}"
    ).strip()


def _what_helps(found: Explanation) -> str:
    """Return what of the cluster would shorten the step most, were there twice of it."""
    now_ns, gains = found.chosen.step.p50_ns, list[tuple[int, str]]()
    for each in found.sensitivities:
        doubled = [p.best for p in each.points if p.factor == 2 and p.best is not None]
        if each.knob in BOUGHT and doubled:
            gains.append((each.base_ns - doubled[0].step.p50_ns, KNOB_WORDS[each.knob]))
    if not gains:
        return ""
    gain_ns, words = max(gains)
    if gain_ns < now_ns / 1000:
        return "Neither faster links nor more memory would shorten it by a thousandth."
    share = 100 * gain_ns / now_ns
    return f"Twice the {words} would shorten it most, by {duration(gain_ns)} ({share:.1f} %)."


def _runner_up(found: Explanation) -> str:
    other = found.runner_up
    if other is None:
        return "No layout with other degrees fits: there is no runner-up."
    return "\n".join(
        (
            _wrapped(
                f"The runner-up among other degrees is {other.account.text}. {other.conclusion}"
            ),
            "",
            _table({"choice": found.chosen, "runner-up": other.account}),
        )
    )


def _table(accounts: Mapping[str, Account]) -> str:
    """Return the parts of steps side by side; of two, with what the second takes more."""
    columns = [{**each.parts_ns, "step": each.step.p50_ns} for each in accounts.values()]
    heads = [*accounts, "difference"] if len(columns) == 2 else [*accounts]
    lines = [f"{'':26}" + "".join(f"{head:>12}" for head in heads)]
    for name in columns[0]:
        values = [column[name] for column in columns]
        cells = [duration(value) if value else "-" for value in values]
        if len(values) == 2:
            cells.append(signed_duration(values[1] - values[0]))
        words = PART_WORDS.get(name, name)
        lines.append(f"{words:26}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _flips(found: Explanation) -> str:
    lines = ["What would flip the choice, one input at a time:"]
    for each in found.sensitivities:
        head = f"{KNOB_WORDS[each.knob]}, {each.value}" if each.value else KNOB_WORDS[each.knob]
        lines.append(_item(f"{head}: {_holds(each)}"))
        lines += [_item(f"- {_flip(point, found.chosen)}") for point in each.flips]
    return "\n".join(lines)


def _holds(found: Sensitivity) -> str:
    """Return from where to where the choice holds, with the best step at either end."""
    if found.reason:
        return f"not tried, {found.reason}."
    held = [point for point in found.points if point.best is not None and not point.is_flip]
    here = ("x1", found.base_ns)
    ends = [here, *((_at(p), p.best.step.p50_ns) for p in held if p.best)]
    low = ends[1] if held and held[0].factor < 1 else here
    high = ends[-1] if held and held[-1].factor > 1 else here
    told = f"it holds from {low[0]}, {duration(low[1])} a step, to {high[0]}, {duration(high[1])}"
    if low == high:
        told = "it holds at x1 only, of what was tried"
    nothing = [f"nothing at {_at(p)}: {p.reason}" for p in found.points if p.best is None]
    return "; ".join([told, *nothing]) + "."


def _flip(point: Point, chosen: Account) -> str:
    """Return what the choice would be at a factor, and what staying would cost there."""
    assert point.best is not None, "a flip has a layout to flip to"
    new, kept = point.best, point.kept
    changes = ", ".join(differences(chosen.layout, new.layout)) or "another split into stages"
    if kept is None:
        stays = f"the choice does not exist there ({point.reason})"
    elif kept.step.p50_ns <= new.step.p50_ns:
        stays = f"the choice needs {size(kept.peak_bytes)}"
    else:
        more = change(kept.step.p50_ns, new.step.p50_ns)
        stays = f"staying would cost {more} of {duration(new.step.p50_ns)}"
    return f"at {_at(point)} {changes}; {stays}."


def _at(point: Point) -> str:
    """Return a factor as people say it, with the value that it gives.

    >>> _at(Point(factor=0.25, value="12.5 GB/s", best=None, kept=None, is_flip=False))
    'x1/4 (12.5 GB/s)'
    """
    known = {0.25: "x1/4", 0.5: "x1/2", 2.0: "x2", 4.0: "x4"}
    factor = known.get(point.factor, f"x{point.factor:.2f}")
    return f"{factor} ({point.value})" if point.value else factor


def _near(found: Sequence[NearMiss]) -> str:
    if not found:
        return "Nothing better is near: no limit and no memory keeps out a layout worth having."
    lines = ["Better, and kept out:"]
    for miss in found:
        what = f"without {miss.what} = {miss.now}"
        if miss.what == "memory":
            what = f"with {size(miss.more_bytes)} more a rank, {miss.needed} instead of {miss.now}"
        lines.append(
            _item(
                f"{what}: {miss.candidate.layout}, {duration(miss.candidate.step.p50_ns)}, "
                f"{duration(miss.saves_ns)} less."
            )
        )
    return "\n".join(lines)


def _thumb(found: ThumbRule | None, chosen: Account) -> str:
    if found is None:
        return "The field's rule of thumb has no layout for this job."
    rule = found.account
    if not found.changes:
        return "The field's rule of thumb takes the same layout."
    more_ns = rule.step.p50_ns - chosen.step.p50_ns
    head = (
        f"The field's rule of thumb would take {rule.text}, with a step of "
        f"{duration(rule.step.p50_ns)}: {_slower(more_ns)}"
        + ("" if rule.fits else ", and it does not fit in memory")
        + ". From it to the choice, one change after the other:"
    )
    return "\n".join([_wrapped(head), *(_item(_worth(each)) for each in found.changes)])


def _slower(more_ns: int) -> str:
    if more_ns == 0:
        return "as fast as the choice"
    return f"{duration(abs(more_ns))} {'slower' if more_ns > 0 else 'faster'} than the choice"


def _worth(step: Change) -> str:
    worth = f"{'saves' if step.saves_ns > 0 else 'costs'} {duration(abs(step.saves_ns))}"
    if step.saves_ns == 0:
        worth = "is worth nothing"
    return f"{step.text} {worth}" + ("." if step.fits else ", but does not fit in memory.")


def _step(account: Account) -> str:
    step = account.step
    sure = ", extrapolated" if step.is_extrapolated else ""
    return (
        f"A step takes {duration(step.p50_ns)} ({duration(step.p10_ns)} to "
        f"{duration(step.p90_ns)}{sure})"
    )


def _memory(account: Account) -> str:
    tightest = account.tightest
    needs = "holds" if account.fits else "needs"
    return (
        f"its fullest pipeline rank, {tightest.rank}, {needs} {size(tightest.memory.total)} of "
        f"{size(tightest.limit_bytes)}"
    )


def _wrapped(text: str) -> str:
    return fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _item(text: str) -> str:
    return fill(
        text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
