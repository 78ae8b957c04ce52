"""`layline demo`: the whole loop on this machine, small in every dimension, real in every part."""

import time
from importlib.resources import files
from pathlib import Path

import click

from layline import __version__
from layline.plan_text import plan_text
from layline.show import progress_bar
from layline.walk import load_run, measure_profile, run_series
from planner.cost import measured_costs
from planner.plan import Plan, save_plan
from planner.search import best_of_each_kind, make_plan, search
from profiles.errors import InvalidInputError
from profiles.files import canonical_json, write_text
from profiles.job import read_job
from profiles.machine import default_ranks
from reports.words import duration

NUM_STEPS = 25
MAX_RUNS = 6


def demonstrate(directory: Path) -> None:
    """Profile, plan, run the best layout of each kind, compare, and report, into `directory`.

    Raises InvalidInputError when `directory` holds something already.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        is_empty = not any(directory.iterdir())
    except OSError as error:
        raise InvalidInputError(
            [f"{directory}: {(error.strerror or str(error)).lower()}; name a new folder with -o"]
        ) from None
    if not is_empty:
        raise InvalidInputError(
            [f"{directory}: holds files already; remove it or name another with -o"]
        )
    began = time.monotonic()
    plans = _plan(directory)
    _train(directory, plans)
    _report(directory, plans)
    click.echo(
        f"the whole loop took {time.monotonic() - began:.0f} s; open {directory}/report.html"
    )


def _plan(directory: Path) -> list[Plan]:
    """Measure this machine, search, and return the best plan of each kind, best first."""
    num_ranks, device = default_ranks()
    click.echo(f"1. profile: kernels and links of {num_ranks} ranks, measured here")
    with progress_bar("profile") as progress:
        profile = measure_profile(num_ranks, device, quick=True, progress=progress)
    profile_path = directory.resolve() / "profile.json"
    write_text(profile_path, canonical_json(profile))
    job_path = directory / "job.toml"
    write_text(job_path, (files("profiles") / "data" / "demo.toml").read_text(encoding="utf-8"))
    job = read_job(job_path, [f"cluster.ranks={num_ranks}", f"cluster.device={device}"])
    costs = measured_costs(job, profile, str(profile_path))
    with progress_bar("plan") as progress:
        result = search(job, costs, progress=progress)
    places = best_of_each_kind(result)[:MAX_RUNS]
    plans = [make_plan(job, costs, result, place, __version__) for place in places]
    save_plan(plans[0], directory / "plan.json")
    click.echo(f"2. plan: the layouts of {num_ranks} ranks\n\n{plan_text(plans[0], 8)}\n")
    return plans


def _train(directory: Path, plans: list[Plan]) -> None:
    """Train every plan on real text, one after another on the same ranks."""
    click.echo(f"3. run: {NUM_STEPS} steps of each of {len(plans)} layouts, on the Python sources")
    directories = [directory / "runs" / _slug(plan) for plan in plans]
    total = NUM_STEPS * len(plans)
    with progress_bar("run") as progress:
        run_series(
            plans, directories, num_steps=NUM_STEPS,
            on_step=lambda run, step: progress(
                (run * NUM_STEPS + step.step) / total,
                f"{plans[run].layout} step {step.step} loss {step.loss:.3f}",
            ),
        )  # fmt: skip


def _report(directory: Path, plans: list[Plan]) -> None:
    """Print predicted against measured for each run, and write the page."""
    from reports.page import build_report

    width = max(34, *(len(str(plan.layout)) for plan in plans))
    click.echo(f"\n{'layout':{width}} {'predicted':>10} {'measured':>10} {'error':>7}   loss")
    directories = [directory / "runs" / _slug(plan) for plan in plans]
    for plan, run in zip(plans, directories, strict=True):
        _, record = load_run(run)
        error = plan.step.p50_ns / record.median_step_ns - 1
        click.echo(
            f"{plan.layout!s:{width}} {duration(plan.step.p50_ns):>10} "
            f"{duration(record.median_step_ns):>10} {100 * error:>+6.1f}%   "
            f"{record.steps[0].loss:.3f} -> {record.steps[-1].loss:.3f}"
        )
    write_text(directory / "report.html", build_report(directories))
    click.echo(f"\n4. report: {directory}/report.html")


def _slug(plan: Plan) -> str:
    return str(plan.layout).replace("=", "").replace(",", "-")
