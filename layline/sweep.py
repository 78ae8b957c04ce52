"""`layline plan --sweep`: one job with many values, each case planned by a worker of a farm.

The job file and its profile are read here, once; a worker needs no file, and is told all that it
plans from. So the plans are the same wherever they are made.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from layline import __version__
from layline.exits import DONE, INFEASIBLE, INTERRUPTED, INVALID, UNSUPPORTED
from layline.farm import Farm, Lost
from layline.walk import (
    Measured,
    Progress,
    ignore_progress,
    measured_for,
    plan_with,
)
from planner.search import Effort, InfeasibleError
from planner.sweep import (
    Axis,
    Case,
    Failure,
    FailureKind,
    PlanSummary,
    Row,
    Sweep,
    cases_of,
    headings,
    summary_of,
)
from profiles.errors import InvalidInputError, UnsupportedError
from profiles.files import canonical_json, check_writable, from_plain, write_text
from profiles.job import Job, read_job
from reports.words import count, duration, size

_EXPECTED = (InvalidInputError, InfeasibleError, UnsupportedError)
_CODES: Mapping[FailureKind, int] = {
    "invalid": INVALID,
    "infeasible": INFEASIBLE,
    "unsupported": UNSUPPORTED,
    "lost": 1,
    "interrupted": INTERRUPTED,
}
_NOT_DONE = Failure(kind="interrupted", problem="not planned before the sweep was stopped")
_TOGETHER = "the worker has another layline; each one needs the same version as the command"


Known = tuple[Job, Measured | None]
"""What a case is planned from: a job, and the profile that its costs rest on, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a worker is told of a case; `keeps_plan` asks for the whole plan beside its summary."""

    version: str
    job: Job
    measured: Measured | None
    effort: Effort
    keeps_plan: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a worker tells; `plan` is the text of the plan file, empty where none was asked for."""

    outcome: PlanSummary | Failure
    plan: str


def answer(task: str) -> str:
    """Return the `Answer` to a `Question`, both as canonical JSON; this is what workers run.

    A question of another version is not read, and answered by the version alone.
    """
    asked = json.loads(task)
    if asked["version"] != __version__:
        return canonical_json({"version": __version__})
    question = from_plain(Question, asked, "sweep", _TOGETHER)
    job = question.job
    try:
        plan = plan_with(job, question.measured, question.effort)
    except _EXPECTED as error:
        return canonical_json(Answer(outcome=_failure(error), plan=""))
    kept = canonical_json(plan) if question.keeps_plan else ""
    return canonical_json(Answer(outcome=summary_of(plan), plan=kept))


def sweep(
    job_path: Path,
    axes: Sequence[Axis],
    farm: Farm,
    effort: Effort,
    *,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    progress: Progress = ignore_progress,
) -> Sweep:
    """Plan the job once for each case of `axes`, and write the plans into `folder`, if any.

    A case without a plan is a row with the reason, and does not stop the others. After an interrupt
    the rows of what was not done say so. Raises the error itself where no case can be read, and
    all for one reason; and what `layline.farm.Farm.map` raises. The rows are the same for any farm,
    unless a budget of time ends the searches.
    """
    cases = cases_of(axes, overrides)
    if folder is not None:
        _make_folder(folder)
    outcomes: dict[int, PlanSummary | Failure] = {}
    try:
        read = _read(job_path, cases, overrides, progress)
        outcomes |= {place: found for place, found in read.items() if isinstance(found, Failure)}
        known = {place: found for place, found in read.items() if not isinstance(found, Failure)}
        places, questions = list(known), Questions(list(known.values()), effort, folder is not None)
        with closing(farm.map(answer, questions)) as arriving:
            for num_done, (number, told) in enumerate(arriving, start=1):
                case = cases[places[number]]
                outcomes[case.place] = _taken(case, told, folder, len(cases))
                progress(num_done / len(places), f"{num_done} of {len(places)} cases")
    except KeyboardInterrupt:
        # The rows tell what was done; a plan that was written and not yet noted is none of it.
        for case in cases:
            if folder is not None and case.place not in outcomes:
                (folder / case.file_name(len(cases))).unlink(missing_ok=True)
    rows = (Row(case=case, outcome=outcomes.get(case.place, _NOT_DONE)) for case in cases)
    return Sweep(axes=tuple(axes), rows=tuple(rows))


class Questions(Sequence[str]):
    """The tasks of a farm, each written when it is sent: a profile may be a megabyte of text."""

    def __init__(self, known: Sequence[Known], effort: Effort, keeps_plan: bool) -> None:
        self._known, self._effort, self._keeps_plan = known, effort, keeps_plan

    def __len__(self) -> int:
        return len(self._known)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> "Questions": ...
    def __getitem__(self, number: int | slice) -> "str | Questions":
        if isinstance(number, slice):
            return Questions(self._known[number], self._effort, self._keeps_plan)
        job, measured = self._known[number]
        question = Question(
            version=__version__, job=job, measured=measured, effort=self._effort,
            keeps_plan=self._keeps_plan,
        )  # fmt: skip
        return canonical_json(question)


def _read(
    job_path: Path, cases: Sequence[Case], overrides: Sequence[str], progress: Progress
) -> dict[int, Known | Failure]:
    """Return what is to be planned in each case, by its place, or why that cannot be read.

    A profile is measured here and now if it must be: not by several workers at a time, nor by one
    on another machine.
    """
    found: dict[int, Known | Failure] = {}
    errors: list[Exception] = []
    profiles: dict[tuple[str, int, str], Measured | None] = {}
    for case in cases:
        try:
            job = read_job(job_path, (*overrides, *case.overrides))
            key = (job.profile_path, job.cluster.num_ranks, job.cluster.local_device)
            if key not in profiles:
                profiles[key] = measured_for(job, progress)
            found[case.place] = job, profiles[key]
        except _EXPECTED as error:
            errors.append(error)
            found[case.place] = _failure(error)
    if len(errors) == len(cases) and len({str(error) for error in errors}) == 1:
        raise errors[0]
    return found


def _taken(
    case: Case, told: str | Lost, folder: Path | None, num_cases: int
) -> PlanSummary | Failure:
    """Return what became of a case, by what its worker told, with its plan written."""
    if isinstance(told, Lost):
        return Failure(kind="lost", problem=told.reason)
    found = json.loads(told)
    if "version" in found:
        raise UnsupportedError(
            f"a worker has layline {found['version']}, and this is {__version__}; "
            f"install the same there: pip install layline=={__version__}"
        )
    heard = from_plain(Answer, found, "the answer of a worker", _TOGETHER)
    if folder is not None and heard.plan:
        write_text(folder / case.file_name(num_cases), heard.plan)
    return heard.outcome


def _failure(error: Exception) -> Failure:
    kind: FailureKind = "unsupported"
    if isinstance(error, InvalidInputError):
        kind = "invalid"
    elif isinstance(error, InfeasibleError):
        kind = "infeasible"
    return Failure(kind=kind, problem=str(error))


def _make_folder(folder: Path) -> None:
    """Make the folder for the plans: a new one, so that none of another sweep is among them."""
    try:
        folder.mkdir(exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InvalidInputError(
            [f"{folder}: cannot be made ({reason}); name a folder for the plans"]
        ) from None
    if not is_empty:
        raise InvalidInputError([f"{folder}: is not empty; name a new folder for the plans"])
    check_writable(folder / "plan.json")


def exit_code(found: Sweep) -> int:
    """Return the exit code of the contract: 0 where a case has a plan, else that of the first."""
    return DONE if found.num_planned else _CODES[found.failures[0].kind]


def sweep_text(found: Sweep) -> str:
    """Return a table with a row for each case: its values, and its plan in short or the reason."""
    names = headings(found.axes)
    values = [[text for _, text in row.case.settings] for row in found.rows]
    widths = [
        max(len(heading), *(len(texts[column]) for texts in values))
        for column, heading in enumerate(names.values())
    ]
    plans = [row.outcome for row in found.rows if isinstance(row.outcome, PlanSummary)]
    width = max([len("best layout"), *(len(plan.layout) for plan in plans)])
    lines = [
        f"{len(found.rows)} cases, {found.num_planned} planned",
        "",
        _line(
            ["case", *names.values()], widths,
            f"{'best layout':{width}} {'step':>10} {'tokens/s':>12} {'a GPU':>9} {'memory':>10} "
            f"{'gap':>7}",
        ),
    ]  # fmt: skip
    for row, texts in zip(found.rows, values, strict=True):
        lines.append(_line([str(row.case.place + 1), *texts], widths, _told(row.outcome, width)))
    return "\n".join(lines)


def _line(texts: Sequence[str], widths: Sequence[int], rest: str) -> str:
    cells = [f"{text:>{width}}" for text, width in zip(texts, (5, *widths), strict=True)]
    return "  ".join([*cells, rest])


def _told(outcome: PlanSummary | Failure, width: int) -> str:
    if isinstance(outcome, Failure):
        return f"{outcome.kind}: {'; '.join(outcome.problem.splitlines())}"
    return (
        f"{outcome.layout:{width}} {duration(outcome.step.p50_ns):>10} "
        f"{count(outcome.tokens_per_s):>12} {count(outcome.tokens_per_s_per_gpu):>9} "
        f"{size(outcome.peak_bytes):>10} {100 * outcome.certificate.gap:>5.2f} %"
    )
