"""How far predictions are from published runs: the table of the terminal and of the docs."""

from collections.abc import Mapping, Sequence
from typing import Any

from reports.validation import Outcome, unread_reasons, validation_json

HEADINGS = ("group", "n", "scored", "median", "p90", "null median", "null p90", "memory",
            "P10-P90", "regret mean", "regret worst")  # fmt: skip
_PARTS = (
    ("mfu_from_5_percent", "MFU from 5 %"),
    ("mfu_below_5_percent", "MFU below 5 %"),
)


def accuracy_rows(groups: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the cells of the table by group, as `HEADINGS` names them.

    A group with runs below 5 % MFU has its two parts below it.
    """
    rows: list[tuple[str, ...]] = []
    for name, scores in groups.items():
        regret = scores["regret"] or {}
        ends = (percent(regret.get("mean")), percent(regret.get("worst")))
        rows.append((name, str(scores["n"]), str(scores["scored"]), *_errors(scores), *ends))
        for part, words in _PARTS:
            if part in scores:
                count = str(scores[part]["n"])
                rows.append((f"{name}, {words}", count, count, *_errors(scores[part]), "-", "-"))
    return rows


def _errors(scores: Mapping[str, Any]) -> tuple[str, ...]:
    null = scores["null_model"] or {}
    values = (
        scores["median_abs_rel_err"], scores["p90_abs_rel_err"], null.get("median"),
        null.get("p90"), scores["mem_median_abs_rel_err"], scores["coverage_p10_p90"],
    )  # fmt: skip
    return tuple(percent(value) for value in values)


def percent(share: float | None) -> str:
    """Return a share in percent, `-` where there is none.

    >>> percent(0.0512), percent(None), percent(12.3)
    ('5.1 %', '-', '1,230.0 %')
    """
    return "-" if share is None else f"{100 * share:,.1f} %"


def accuracy_text(outcomes: Sequence[Outcome]) -> str:
    """Return the table for a terminal, and what was left out."""
    validation = validation_json(outcomes)
    rows = [HEADINGS, *accuracy_rows(validation["groups"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines += ["", memory_sentence(validation["out_of_memory"])]
    reasons = unread_reasons(outcomes)
    lines += [f"unsupported: {count} x {reason}" for reason, count in list(reasons.items())[:10]]
    if (left := len(reasons) - 10) > 0:
        lines.append(f"unsupported: and {left} more reasons, all in --json")
    return "\n".join(lines)


def memory_sentence(told: Mapping[str, Any]) -> str:
    """Return how well runs that fit are told from runs that do not."""
    parts = [f"{told['ran_told']} of {told['ran']} runs that ran are predicted to fit"]
    if told["ran_out"]:
        parts.append(f"{told['ran_out_told']} of {told['ran_out']} that ran out of memory not to")
    return f"memory: {', '.join(parts)} (right: {percent(told['accuracy'])})"


def accuracy_page(outcomes: Sequence[Outcome], command: str, figure: str) -> str:
    """Return the page of the docs as Markdown: table, figure, memory, and what was left out."""
    validation = validation_json(outcomes)
    rows = accuracy_rows(validation["groups"])
    lines = [
        "# Accuracy on published runs",
        "",
        f"Written by `{command}`; do not edit. Errors are of the step time, predicted over",
        "measured less one, by group (the id of a run without its number), never pooled. The null",
        "model is one constant hardware-flop utilization a group. P10-P90 is the share of measured",
        "steps inside the predicted band. Regret: how much slower the layout predicted fastest",
        "was, as measured, than the best, over sets of runs that differ only in layout. What is",
        "read from each column is in validation.md.",
        "",
        _markdown(HEADINGS),
        "| --- |" + " ---: |" * (len(HEADINGS) - 1),
        *(_markdown(row) for row in rows),
        "",
        f"{memory_sentence(validation['out_of_memory']).capitalize()}.",
        "",
        f"![Measured and predicted step of each run, by group]({figure})",
    ]
    if reasons := unread_reasons(outcomes):
        lines += ["", "Left out, by reason:", ""]
        lines += [f"* {count} x {_escaped(reason)}" for reason, count in reasons.items()]
    return "\n".join(lines) + "\n"


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Return `text` so that a table keeps its columns and a browser sees no tags."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").replace("\r", " ")
