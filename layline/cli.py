"""The command line: names, flags and exit codes are a contract (docs/design.md, Commands).

Imports of the packages stand inside the commands, so that `layline --help` needs click alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from layline import __version__
from layline.exits import CleanGroup
from layline.options import FILE, as_json, output_file, print_as, spare
from layline.plan import plan

if TYPE_CHECKING:
    from layline.walk import Device
    from profiles.profile import Profile


@click.group(cls=CleanGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="layline")
def main() -> None:
    """Plan, simulate, run and explain distributed LLaMA training.

    \b
    profile -> plan -> simulate -> run -> compare -> report
    """


@main.command()
@as_json
def doctor(as_json: bool) -> None:
    """Say what this machine is, what it can measure and run, and what is missing."""
    from layline.doctor import examine, findings_text

    findings = examine()
    print_as(findings, findings_text(findings), as_json)


@main.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--ranks", type=click.IntRange(1, 1024), help="Ranks to measure; all by default.")
@click.option("--quick", is_flag=True, help="A coarse grid, within 60 seconds.")
@click.option("--show", type=FILE, multiple=True, metavar="FILE",
              help="Measure nothing: tell of this profile; of several, what changed.")  # fmt: skip
@click.option("--merge", type=FILE, multiple=True, metavar="FILE",
              help="Measure nothing: make one profile of several of one machine.")  # fmt: skip
@output_file("The profile to write; with --show, an HTML page.", required=False)
@as_json
def profile(
    device: "Device",
    ranks: int | None,
    quick: bool,
    show: tuple[Path, ...],
    merge: tuple[Path, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure kernels, links and host costs here, or show what was measured."""
    if (show or merge) and (quick or ranks or device != "auto" or (show and merge)):
        raise click.UsageError("--show and --merge measure nothing, and one is enough at a time")
    if show:
        _show_profiles(show, output, as_json)
        return
    if output is None or as_json:
        raise click.UsageError("a profile goes into a file: -o FILE, without --json")
    from profiles.files import canonical_json, check_writable, write_text

    spare(merge, output)
    check_writable(output)
    found, is_ours = _merged(merge) if merge else _measured(device, ranks, quick, output)
    if not is_ours:
        return
    write_text(output, canonical_json(found))
    click.echo(
        f"{len(found.kernels)} kernels and {len(found.collectives)} collectives on "
        f"{found.device.num_ranks} ranks of {found.device.name}"
    )
    for line in found.missing:
        click.echo(f"missing: {line}")
    click.echo(f"wrote {output}")


def _merged(files: Sequence[Path]) -> tuple["Profile", bool]:
    from layline.walk import merge_profiles

    return merge_profiles(files), True


def _measured(
    device: "Device", ranks: int | None, quick: bool, output: Path
) -> tuple["Profile", bool]:
    """Return the profile of this machine, and whether this process is the one to write it.

    What there is of one that broke off is written before the error goes on.
    """
    from layline.show import progress_bar
    from layline.walk import is_rank_of_torchrun, measure_as_rank, measure_profile
    from profiles.errors import IncompleteProfileError
    from profiles.files import canonical_json, write_text
    from profiles.machine import default_ranks

    if is_rank_of_torchrun():
        return measure_as_rank(device, quick=quick)
    try:
        with progress_bar("profile") as progress:
            found = measure_profile(
                ranks or default_ranks()[0], device, quick=quick, progress=progress
            )
    except IncompleteProfileError as error:
        write_text(output, canonical_json(error.profile))
        raise IncompleteProfileError(
            error.profile, f"{error}; wrote {output} with what there is"
        ) from None
    return found, True


main.add_command(plan)


@main.command()
@click.argument("plan", type=FILE)
@click.option("--trace", type=FILE, help="Write a Perfetto trace (FILE.json.gz).")
@as_json
def simulate(plan: Path, trace: Path | None, as_json: bool) -> None:
    """Time one plan: where the step goes, idle time by cause, memory, critical path, a trace."""
    from layline.step import predicted_step, step_json, step_text, step_trace
    from layline.walk import load_plan
    from profiles.files import write_bytes

    spare([plan], trace)
    step = predicted_step(load_plan(plan))
    if trace is not None:
        write_bytes(trace, step_trace(step))
    print_as(step_json(step), step_text(step), as_json)
    if trace is not None:
        click.echo(f"wrote {trace}", err=as_json)


@main.command()
@click.argument("plan", type=FILE)
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True,
              help="The rank of the job to trace.")  # fmt: skip
@output_file("Write every op and collective, in order.", required=False)
@as_json
def capture(plan: Path, rank: int, output: Path | None, as_json: bool) -> None:
    """Trace one rank of PLAN.json without its hardware: ops, collectives and peak memory."""
    from layline.capture import captured
    from profiles.files import canonical_json, check_writable, write_text

    if output is not None:
        spare([plan], output)
        check_writable(output)
    value, text = captured(plan, rank)
    if output is not None:
        write_text(output, canonical_json(value))
    print_as(value, text, as_json)
    if output is not None:
        click.echo(f"wrote {output}", err=as_json)


@main.command()
@click.argument("plan", type=FILE)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True)
@click.option("--data", type=FILE, help="Text file or folder; the Python sources by default.")
@output_file("A new directory for the run.")
def run(plan: Path, steps: int, data: Path | None, output: Path) -> None:
    """Train PLAN.json for real on this machine's ranks and record what it took."""
    from layline.show import progress_bar
    from layline.walk import load_plan, load_run, run_series
    from reports.words import duration

    loaded = load_plan(plan)
    predicted = duration(loaded.step.p50_ns)
    try:
        with progress_bar("run") as progress:
            run_series(
                [loaded], [output], data=data, num_steps=steps,
                on_step=lambda _, step: progress(
                    step.step / steps,
                    f"step {step.step} loss {step.loss:.3f} {duration(step.step_ns)} "
                    f"(predicted {predicted})",
                ),
            )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(output, steps)) from None
    _, record = load_run(output)
    click.echo(
        f"{loaded.layout}   {len(record.steps)} steps, loss {record.steps[0].loss:.4f} -> "
        f"{record.steps[-1].loss:.4f}\nstep {duration(record.median_step_ns)} measured, "
        f"{predicted} predicted\nwrote {output}"
    )


@main.command()
@click.argument("directory", type=FILE)
@click.option("--recalibrate", type=FILE, metavar="PROFILE",
              help="Write the profile with factors that make this prediction fit.")  # fmt: skip
@as_json
def compare(directory: Path, recalibrate: Path | None, as_json: bool) -> None:
    """Lay the run in DIRECTORY over its prediction, and explain the difference."""
    from layline.walk import load_run, recalibrated, simulate_plan
    from profiles.files import canonical_json, write_text
    from reports.compare import compare as compare_run
    from reports.compare import format_comparison

    spare([directory], recalibrate)
    planned, record = load_run(directory)
    comparison = compare_run(planned, record, simulate_plan(planned))
    print_as(comparison, format_comparison(comparison), as_json)
    if recalibrate is not None:
        write_text(recalibrate, canonical_json(recalibrated(directory)))
        click.echo(f"wrote {recalibrate}", err=as_json)


@main.command()
@click.argument("inputs", type=FILE, nargs=-1, required=True)
@output_file("The HTML file to write.")
def report(inputs: tuple[Path, ...], output: Path) -> None:
    """Write one self-contained HTML page on plans and run directories; several are compared."""
    from profiles.files import write_text
    from reports.page import build_report

    spare(inputs, output)
    write_text(output, build_report(inputs))
    click.echo(f"wrote {output}")


@main.command()
@click.argument("runs", type=FILE, nargs=-1)
@click.option("--json", "json_file", type=FILE, help="Write scores by group and every row.")
@click.option("--page", type=FILE, metavar="FOLDER", help="Write the table and figure of the docs.")
def validate(runs: tuple[Path, ...], json_file: Path | None, page: Path | None) -> None:
    """Score predictions against published runs in CSV files, or those shipped here.

    What is read from each column is in docs/validation.md.
    """
    from layline.show import progress_bar
    from layline.validate import FIGURE, PAGE, validation_file, write_page
    from layline.validate import validate as validate_runs
    from profiles.files import check_writable, write_text
    from reports.accuracy import accuracy_text

    written = [json_file, *((page / PAGE, page / FIGURE) if page else ())]
    for file in filter(None, written):
        spare(runs, file)
        check_writable(file)
    with progress_bar("validate") as progress:
        outcomes = validate_runs(runs, progress)
    click.echo(accuracy_text(outcomes))
    if json_file is not None:
        write_text(json_file, validation_file(runs, outcomes))
    if page is not None:
        names = "".join(f" {path.name}" for path in runs)
        write_page(page, outcomes, f"layline validate{names} --page {page.name}")
    for file in filter(None, written):
        click.echo(f"wrote {file}")


@main.command()
@click.argument("runs", type=FILE, nargs=-1)
@output_file("Write the scalars and bands here, as they are shipped.", required=False)
def calibrate(runs: tuple[Path, ...], output: Path | None) -> None:
    """Fit the scalars of the stacks to published runs; without files, to those shipped here."""
    from layline.calibrate import calibrate as calibrate_runs
    from layline.calibrate import calibration_text
    from layline.show import progress_bar
    from profiles.files import canonical_json, check_writable, write_text

    if output is not None:
        spare(runs, output)
        check_writable(output)
    with progress_bar("calibrate") as progress:
        found = calibrate_runs(runs, progress)
    click.echo(calibration_text(found))
    if output is not None:
        write_text(output, canonical_json(found.shipped()))
        click.echo(f"wrote {output}")


@main.command()
@click.argument("what", type=click.Choice(["engines", "executor", "models", "planner", "profile"]))
@as_json
def bench(what: str, as_json: bool) -> None:
    """Measure the project's own speed, or how well it foretells this machine."""
    from layline.bench import BENCHES
    from layline.show import progress_bar

    with progress_bar("bench") as progress:
        figures, text = BENCHES[what](progress)
    print_as(figures, text, as_json)


@main.command()
@output_file("A new directory for everything that the demo makes.", required=False)
def demo(output: Path | None) -> None:
    """Walk the whole loop on this machine, small, on real text, ending with the report."""
    from layline.demo import demonstrate

    demonstrate(output or Path("layline-demo"))


def _show_profiles(files: Sequence[Path], output: Path | None, as_json: bool) -> None:
    """Print what the profiles in `files` say, and write a page about them to `output`."""
    from layline.profile import show

    spare(files, output)
    value, text = show(files, output, as_json)
    print_as(value, text, as_json)
    if output is not None:
        click.echo(f"wrote {output}", err=as_json)


def _kept(directory: Path, num_steps: int) -> str:
    """Return what an interrupted run has left in `directory`, and how to go on."""
    from planner.record import read_steps

    if not (num_done := len(read_steps(directory)[0])):
        return "no step was done yet; run it again, with a new folder for -o"
    return (
        f"{num_done} of {num_steps} steps are in {directory}/steps.jsonl, and there is no record; "
        "run it again, with a new folder for -o"
    )
