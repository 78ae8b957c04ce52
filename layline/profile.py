"""What `layline profile --show` prints: one profile in tables, several compared with the first."""

from collections.abc import Sequence
from pathlib import Path

from layline.show import progress_bar
from profiles.difference import Difference, difference
from profiles.files import check_writable, write_text
from profiles.lookup import CostTable
from profiles.store import load_profile
from profiles.summary import summarize
from reports import profile_tables as tables
from reports.document import Table

MOST_CHANGES = 20
"""How many of the entries that moved are printed; --json has all."""

_NOTES = (
    "band: a second profile of this machine is within it for 95 % of the entries, by its median",
    "error, P90: the time of each shape foretold by the others, median and P90; stated: what they",
    "say their standard deviation is. rate, bus: of the fitted law, latency + bytes / rate",
)


def show(paths: Sequence[Path], page: Path | None, as_json: bool) -> tuple[object, str]:
    """Return what is printed of the profiles in `paths`, as a value or as a text; write `page`.

    Raises InvalidInputError for a file that is no profile, and for a page that cannot be written.
    """
    if page is not None:
        check_writable(page)
    profiles = load_all(paths)
    with progress_bar("profile") as progress:
        progress(0.0, "fitting")
        value = shown_json(paths, profiles) if as_json else None
        text = "" if as_json else shown_text(paths, profiles)
        if page is not None:
            # matplotlib is half a second of import that a table does not need.
            from reports.profile_page import build_profile_page

            progress(0.6, "drawing")
            write_text(page, build_profile_page([str(path) for path in paths], profiles))
    return value, text


def load_all(paths: Sequence[Path]) -> tuple[CostTable, ...]:
    """Return the profiles in `paths`; raises InvalidInputError as `load_profile` does."""
    return tuple(CostTable(load_profile(path)) for path in paths)


def differences(profiles: Sequence[CostTable]) -> tuple[Difference, ...]:
    """Return what each of `profiles` but the first changes against the first."""
    return tuple(difference(profiles[0].profile, other.profile) for other in profiles[1:])


def shown_json(paths: Sequence[Path], profiles: Sequence[CostTable]) -> dict[str, object]:
    """Return what `--json` prints: a summary of each file, and the changes against the first."""
    return {
        "profiles": [
            {"path": str(path), "summary": summarize(profile)}
            for path, profile in zip(paths, profiles, strict=True)
        ],
        "differences": [
            {
                "first": str(paths[0]),
                "second": str(path),
                "num_common": len(told.changes),
                "num_beyond": len(told.beyond),
                "share_within": told.share_within,
                "beyond": [{"change": each, "ratio": each.ratio} for each in told.beyond],
                "only_first": told.only_first,
                "only_second": told.only_second,
                "differs": told.differs,
            }
            for path, told in zip(paths[1:], differences(profiles), strict=True)
        ],
    }


def shown_text(paths: Sequence[Path], profiles: Sequence[CostTable]) -> str:
    """Return the tables about one profile; of several, the facts and what moved."""
    if len(profiles) == 1:
        return "\n".join(_whole(profiles[0]))
    lines: list[str] = []
    for path, profile in zip(paths, profiles, strict=True):
        lines += [str(path), *table_lines(tables.facts(summarize(profile))), ""]
    for path, told in zip(paths[1:], differences(profiles), strict=True):
        lines += [f"{paths[0]} (first) and {path} (second)", tables.moved_text(told)]
        lines += [text for text in [tables.differing_text(told)] if text]
        if told.beyond:
            lines += ["", *table_lines(tables.moved(told, MOST_CHANGES))]
        if (left := len(told.beyond) - MOST_CHANGES) > 0:
            lines.append(f"and {left} more, all in --json")
        lines.append("")
    return "\n".join(lines[:-1])


def _whole(profile: CostTable) -> list[str]:
    summary = summarize(profile)
    parts = [
        tables.facts(summary),
        tables.ceilings(summary),
        tables.kernels(summary),
        tables.collectives(summary),
        tables.host(summary),
        tables.interference(summary),
        tables.found(summary.findings),
    ]
    lines = [line for part in parts if part.rows for line in (*table_lines(part), "")]
    return [*lines, *_NOTES]


def table_lines(table: Table) -> list[str]:
    """Return the lines of `table` in columns.

    >>> print("\\n".join(table_lines(Table(head=("a", "b"), align="lr", rows=(("x", "10"),)))))
    a   b
    x  10
    """
    rows = [table.head, *table.rows] if any(table.head) else list(table.rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if how == "r" else cell.ljust(width)
            for cell, width, how in zip(row, widths, table.align, strict=True)
        ).rstrip()
        for row in rows
    ]
