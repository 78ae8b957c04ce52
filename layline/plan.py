"""`layline plan`: the best layout of a job, with what is certain of all others, and why it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from layline.options import (
    FILE,
    Finite,
    as_json,
    is_given,
    output_file,
    overrides,
    print_as,
    spare,
)

if TYPE_CHECKING:
    from layline.farm import Farm
    from layline.verify import Verification
    from layline.walk import Grounds, Progress
    from planner.search import Effort, SearchResult


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What a user wants of one job beside its best plan."""

    output: Path | None
    num_shown: int
    num_verified: int
    whys: Sequence[str]
    explains: bool
    as_json: bool


OF_ONE_JOB = ("top", "num_verified", "whys", "explains")
OF_A_SWEEP = ("jobs", "farm")
EXPLAINING_GAP = 0.05
"""How closely explanations search: what flips a choice is worth more than that."""


@click.command()
@click.argument("job", type=FILE)
@output_file("The plan to write.", required=False)
@click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True,
              help="Layouts to list.")  # fmt: skip
@click.option("--budget-s", type=Finite(min=0, min_open=True), metavar="SECONDS",
              help="Search no longer than that.")  # fmt: skip
@click.option("--gap", "gap_percent", type=Finite(min=0, max=100), default=1.0, show_default=True,
              metavar="PERCENT", help="Stop once no layout can be better by more; 0 finds the "
              "proven best.")  # fmt: skip
@click.option("--verify", "num_verified", type=click.IntRange(1, 32), metavar="K",
              help="Train the best K here, and choose by what they take.")  # fmt: skip
@click.option("--why", "whys", multiple=True, metavar="LAYOUT",
              help="Say why this layout was not chosen, as in --why dp=4,tp=2,pp=1.")  # fmt: skip
@click.option("--explain", "explains", is_flag=True,
              help="Say what is next best, and what would flip the choice.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="Override the job's seed.")
@overrides
@click.option("--sweep", "sweeps", multiple=True, metavar="PATH=V1,V2,..",
              help="Plan for each of these values; several axes give their product.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1, 1024),
              help="With --sweep: cases at a time; one a core by default.")  # fmt: skip
@click.option("--farm", metavar="NAME",
              help="With --sweep: processes, dask, dask=ADDRESS, ray or ray=ADDRESS.")  # fmt: skip
@as_json
def plan(
    job: Path,
    output: Path | None,
    top: int,
    budget_s: float | None,
    gap_percent: float,
    num_verified: int | None,
    whys: tuple[str, ...],
    explains: bool,
    seed: int | None,
    overrides: tuple[str, ...],
    sweeps: tuple[str, ...],
    jobs: int | None,
    farm: str | None,
    as_json: bool,
) -> None:
    """Search the layouts of JOB.toml; print the ranking and why others were rejected.

    With --sweep, print the best plan of each case; -o is then a folder for the plans.
    """
    _check_options(bool(sweeps))
    from planner.search import Effort

    effort = Effort(budget_s=budget_s, gap=gap_percent / 100)
    seeded = overrides if seed is None else (*overrides, f"seed={seed}")
    if sweeps:
        from layline.farm import farm_named

        _sweep(job, sweeps, seeded, farm_named(farm or "", jobs or 0), effort, output, as_json)
        return
    spare([job], output)
    asked = _Asked(
        output=output, num_shown=top, num_verified=num_verified or 0, whys=whys,
        explains=explains, as_json=as_json,
    )  # fmt: skip
    _plan(job, seeded, effort, asked)


def _check_options(is_sweep: bool) -> None:
    """Raise UsageError for options that do not go together."""
    for name in OF_ONE_JOB if is_sweep else OF_A_SWEEP:
        if is_given(name):
            parameters = click.get_current_context().command.params
            (flag,) = (each.opts[0] for each in parameters if each.name == name)
            raise click.UsageError(
                f"{flag} is about one job; leave it out with --sweep" if is_sweep
                else f"{flag} is for the cases of --sweep"
            )  # fmt: skip


def _plan(job_path: Path, overrides: Sequence[str], effort: "Effort", asked: _Asked) -> None:
    """Plan one job; print and write what is found, and leave with the code for it.

    The ranking is printed before what takes longer; as JSON all is one object, at the end.
    """
    from layline import walk
    from layline.plan_text import plan_text
    from layline.show import progress_bar
    from layline.verify import check_verifiable
    from planner.plan import save_plan
    from profiles.files import check_writable, plain
    from profiles.job import read_job

    job = read_job(job_path, overrides)
    if asked.output is not None:
        check_writable(asked.output)
    if asked.num_verified:
        check_verifiable(job)
    with progress_bar("plan") as progress:
        grounds = walk.grounds_of(job, progress)
        for text in asked.whys:
            _check_layout(text, grounds)
        grounds, result = walk.search_layouts(grounds, effort, progress)
        race = _raced(grounds, result, asked.num_verified, progress)
    plan = grounds.plan(result, race.chosen if race else 0)
    if asked.output is not None:
        save_plan(plan, asked.output)
    told = plain(plan)
    if not asked.as_json:
        click.echo(plan_text(plan, asked.num_shown, effort, is_interrupted=result.is_interrupted))
    interrupted = _interrupted(result, race)
    try:
        with progress_bar("explain") as progress:
            for name, value, text in _answers(grounds, result, race, asked, progress):
                told[name] = plain(value)
                if not asked.as_json:
                    click.echo(f"\n{text}")
    except KeyboardInterrupt:
        interrupted = interrupted or "the plan is whole, its explanation is not"
    if asked.as_json:
        print_as(told, "", as_json=True)
    if asked.output is not None:
        click.echo(f"wrote {asked.output}", err=asked.as_json)
    if interrupted:
        raise KeyboardInterrupt(interrupted)


def _check_layout(text: str, grounds: "Grounds") -> None:
    """Raise InvalidInputError, before any search, for a layout that there cannot be."""
    from planner.layout_text import parse_layout
    from planner.space import SYNTHESISED

    # An order without a name is known only once the search has made it.
    if SYNTHESISED not in text:
        parse_layout(text, grounds.job, grounds.costs)


def _raced(
    grounds: "Grounds", result: "SearchResult", num_plans: int, progress: "Progress"
) -> "Verification | None":
    """Return the race of the best layouts, None where nobody asked for one."""
    from layline.verify import verify_best

    if not num_plans or result.is_interrupted:  # who stops a search does not wait for a race
        return None
    _, race = verify_best(grounds.job, grounds.costs, result, num_plans, progress)
    return race


def _interrupted(result: "SearchResult", race: "Verification | None") -> str:
    """Return what an interrupt left undone, empty where there was none."""
    from layline.verify_text import interrupted_text

    if result.is_interrupted:
        return (
            f"{result.certificate.num_timed:,} layouts were timed; the plan is the best of them; "
            "run it again to let the search end"
        )
    return interrupted_text(race) if race and race.is_interrupted else ""


def _answers(
    grounds: "Grounds",
    result: "SearchResult",
    race: "Verification | None",
    asked: _Asked,
    progress: "Progress",
) -> Iterator[tuple[str, object, str]]:
    """Yield what else was asked for: its name in JSON, its value and its text."""
    from layline.explain import comparison_text, explanation_text
    from layline.verify_text import verification_text
    from planner.explain import explain, why
    from planner.layout_text import parse_layout
    from planner.search import Effort

    chosen = 0
    if race:
        chosen = race.chosen
        yield "verification", race, verification_text(race)
    job, known = grounds.job, [candidate.layout for candidate in result.ranking]
    layouts = [parse_layout(text, job, grounds.costs, known) for text in asked.whys]
    whys = [why(job, grounds.costs, result, layout, chosen) for layout in layouts]
    if whys:
        yield "why", whys, "\n\n".join(comparison_text(found) for found in whys)
    if asked.explains and not _interrupted(result, race):
        world = grounds.world(Effort(gap=EXPLAINING_GAP))
        found = explain(job, world, result, chosen, progress)
        yield "explanation", found, explanation_text(found)


def _sweep(
    job: Path,
    axes: Sequence[str],
    overrides: Sequence[str],
    farm: "Farm",
    effort: "Effort",
    folder: Path | None,
    as_json: bool,
) -> None:
    """Plan the cases of a sweep; print the table of them, and leave with the code for it."""
    from layline.show import progress_bar
    from layline.sweep import exit_code, sweep, sweep_text
    from planner.sweep import parse_axis

    with progress_bar("plan") as progress:
        found = sweep(
            job,
            [parse_axis(axis) for axis in axes],
            farm,
            effort,
            overrides=overrides,
            folder=folder,
            progress=progress,
        )
    print_as(found.as_json(), sweep_text(found), as_json)
    if folder is not None and found.num_planned:
        click.echo(f"wrote {found.num_planned} plans into {folder}", err=as_json)
    if found.is_interrupted:
        raise KeyboardInterrupt(f"{found.num_planned} of {len(found.rows)} cases have a plan")
    if code := exit_code(found):
        raise SystemExit(code)
