"""Published runs against predictions: files in, a table, JSON and a page of the docs out."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from layline.walk import Progress, ignore_progress
from planner.predict import predict as reference_predict
from planner.published.runs import development_runs, development_table, load_runs
from profiles.errors import InvalidInputError
from profiles.files import canonical_json, write_text
from reports.accuracy import accuracy_page
from reports.validation import Outcome, Predict, score, validation_json

SCHEMA_VERSION = 1
PAGE, FIGURE = "accuracy.md", "accuracy.svg"
_ROWS_BETWEEN_REPORTS = 25


def validate(
    paths: Sequence[Path],
    progress: Progress = ignore_progress,
    *,
    predict: Predict | None = None,
) -> tuple[Outcome, ...]:
    """Return each run in the CSV files `paths` beside its prediction, or why there is none.

    Without files, the runs of the development set. `predict` is the reference model unless another
    one is to be scored.
    Raises InvalidInputError for a file that cannot be read, lacks a needed column or has no rows.
    """
    runs = [run for path in paths for run in load_runs(path)] if paths else development_runs()
    if not runs:
        raise InvalidInputError(
            [f"{paths[0]}: has no rows; name a CSV file of runs (docs/validation.md)"]
        )
    outcomes: list[Outcome] = []
    for number, run in enumerate(runs):
        if number % _ROWS_BETWEEN_REPORTS == 0:
            progress(number / len(runs), f"{run.group} {number} of {len(runs)}")
        outcomes.append(score(run, predict or reference_predict))
    return tuple(outcomes)


def validation_file(paths: Sequence[Path], outcomes: Sequence[Outcome]) -> str:
    """Return what `--json` writes, as canonical JSON: the scores, and what was read."""
    files = [(path.name, path.read_bytes()) for path in paths]
    inputs = [
        {"name": name, "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files or [("the development set", development_table())]
    ]
    value = {"schema_version": SCHEMA_VERSION, "inputs": inputs, **validation_json(outcomes)}
    return canonical_json(value)


def write_page(folder: Path, outcomes: Sequence[Outcome], command: str) -> None:
    """Write the accuracy page of the docs and its figure into `folder`."""
    # The figure costs half a second of imports that nobody else pays.
    from reports.accuracy_figure import accuracy_figure

    write_text(folder / FIGURE, accuracy_figure(outcomes) + "\n")
    write_text(folder / PAGE, accuracy_page(outcomes, command, FIGURE))
