"""Calibration as a command: published runs in, the scalars of stacks and their bands out."""

from collections.abc import Sequence
from pathlib import Path

from layline.walk import Progress, ignore_progress
from planner.calibration import Calibration, samples_of
from planner.calibration import calibrate as calibrate_samples
from planner.published.runs import development_runs, load_runs
from profiles.errors import InvalidInputError
from profiles.stack import SCALARS


def calibrate(paths: Sequence[Path] = (), progress: Progress = ignore_progress) -> Calibration:
    """Return the calibration on the runs in `paths`; without any, on the development set.

    Raises InvalidInputError where none of the runs was timed and can be predicted.
    """
    runs = [run for path in paths for run in load_runs(path)] if paths else development_runs()
    samples = samples_of(runs)
    if not samples:
        raise InvalidInputError(
            [f"{paths[0]}: no run can be predicted; layline validate says why of each"]
        )
    fits = 1 + len({sample.stack for sample in samples}) + len({one.group for one in samples})
    told = 0

    def tell(what: str) -> None:
        nonlocal told
        progress(told / fits, what)
        told += 1

    return calibrate_samples(samples, tell)


def calibration_text(found: Calibration) -> str:
    """Return the scalars of each stack with their bands, and the errors of each group."""
    lines = ["scalars of each stack, each with the band of 80 % that the runs leave open"]
    for stack, scalars in found.scalars.items():
        lines += ["", stack]
        for name, scalar in scalars.items():
            meaning = SCALARS[name]
            value, band = f"{scalar.value:g} {meaning.unit}", f"{scalar.low:g} to {scalar.high:g}"
            lines.append(f"  {name:<10}{value:<14}{band:<22}{meaning.text}")
    lines += [
        "",
        "absolute relative error of the step, median and P90: with the group in the fits, and left",
        "out of them",
        "",
        f"{'group':<16}{'runs':>6}{'in':>10}{'':>8}{'out':>10}",
    ]
    for scores in found.scores:
        both = "".join(f"{a:>10.1%}{b:>8.1%}" for a, b in (scores.in_sample, scores.left_out))
        lines.append(f"{scores.group:<16}{scores.num_runs:>6}{both}")
    same = "the shipped ones, to the digit" if found.is_shipped else "not the shipped ones"
    return "\n".join([*lines, "", f"these scalars and bands are {same}"])
