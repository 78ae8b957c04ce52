"""One self-contained HTML page out of plans and runs: it opens offline and prints."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from planner.lower import simulate_plan
from planner.plan import load_plan
from planner.record import load_run
from reports import decision, evidence, provenance
from reports.document import Section
from reports.views import PlanView, RunView, Study, View, studies
from reports.words import count

_TEMPLATES = Path(__file__).parent / "templates"


def build_report(paths: Sequence[Path]) -> str:
    """Return the page about these plan files and run directories: same files, same bytes.

    Raises InvalidInputError for a path that holds neither, StalePlanError for an edited plan, and
    ValueError for no path at all.
    """
    runs: list[RunView] = []
    plans: list[PlanView] = []
    for path in paths:
        # A file name may hold anything but a slash; a page is UTF-8 that a person reads.
        name = "".join(letter if letter.isprintable() else "?" for letter in str(path))
        if path.is_dir():
            plan, record = load_run(path)
            runs.append(RunView(path=name, plan=plan, predicted=simulate_plan(plan), record=record))
        else:
            plan = load_plan(path)
            plans.append(PlanView(path=name, plan=plan, predicted=simulate_plan(plan)))
    return render_report(runs, plans)


def render_report(runs: Sequence[RunView], plans: Sequence[PlanView] = ()) -> str:
    """Return the page about `runs` and about `plans` that nobody has run.

    Plans made from the same inputs share their sections. Raises ValueError for nothing to report.
    """
    views: list[View] = [*runs, *plans]
    if not views:
        raise ValueError("a report needs at least one plan or run")
    found = studies(views)
    sections = [evidence.overview(runs)] if len(runs) > 1 else []
    for number, study in enumerate(found):
        prefix = f"s{number + 1}-" if len(found) > 1 else ""
        sections += _sections(study, prefix)
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(_TEMPLATES),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    first = found[0].best.plan
    num_plans = sum(isinstance(view, PlanView) for study in found for view in study.views)
    digests = {view.plan.plan_digest: None for study in found for view in study.views}
    return environment.get_template("report.html.j2").render(
        title=" and ".join(dict.fromkeys(map(_title, found))),
        eyebrow=_eyebrow(len(runs), num_plans),
        sections=sections,
        footer=(
            f"layline {first.tool_version}. All numbers follow from the files named above.",
            *(f"Plan {digest}" for digest in digests),
        ),
    )


def _sections(study: Study, prefix: str) -> list[Section]:
    sections = [
        decision.decided(study, prefix),
        decision.layouts(study, prefix),
        decision.others(study, prefix),
        evidence.step(study, prefix),
        evidence.memory(study, prefix),
    ]
    if study.runs:
        sections.append(evidence.run(study, prefix))
    sections += [provenance.made_of(study, prefix), provenance.reproduce(study, prefix)]
    if not prefix:
        return sections
    # Several studies ask the same questions: each question says whom it is about.
    return [
        replace(section, question=f"{_title(study)}: {section.question}") for section in sections
    ]


def _title(study: Study) -> str:
    plan = study.best.plan
    return f"{plan.model.name} on {plan.cluster.name}"


def _eyebrow(num_runs: int, num_plans: int) -> str:
    parts = [
        f"{count(number)} {noun}{'s' if number > 1 else ''}"
        for number, noun in ((num_runs, "run"), (num_plans, "plan"))
        if number
    ]
    return f"layline report: {' and '.join(parts)}"
