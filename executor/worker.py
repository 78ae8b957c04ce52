"""The entry of one rank: `python -m executor.worker JOB.json`, started by torchrun."""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from executor.data import load_stream
from executor.job import RunJob, failure_path
from executor.memory import free_memory
from executor.train import GradientHook, train
from planner.plan import load_plan
from profiles.files import load, write_text
from profiles.measure.ranks import joined
from profiles.measure.reference import reference_ns


def run_job(path: Path, on_gradients: GradientHook | None = None) -> None:
    """Run every plan of the job in `path` as this rank, each in a process group of its own."""
    job = load(RunJob, path, "run job", "start runs with `layline run`")
    stream = load_stream(Path(job.data) if job.data else None)
    for index, name in enumerate(job.directories):
        directory = Path(name)
        plan = load_plan(directory / "plan.json")
        with joined(f"plan{index}", plan.profile.device.kind) as device:
            slowdown = _slowdown(device, plan.workload.dtype, job.reference_ns)
            train(plan, directory, stream, job.num_steps, device, slowdown, on_gradients)
        free_memory()


def _slowdown(device: torch.device, dtype: str, known_ns: int) -> Callable[[], float]:
    """Return what measures the reference kernel now, as a multiple of its time in the profile."""
    if not known_ns:
        return lambda: 1.0
    measure = partial(reference_ns, device, dtype)
    return lambda: measure() / known_ns


def main(path: Path, on_gradients: GradientHook | None = None) -> None:
    """Run the job in `path`; the parent finds out from a file why this rank failed, if it does."""
    try:
        run_job(path, on_gradients)
    except Exception as error:
        rank = int(os.environ["RANK"])
        cause = f"{time.monotonic_ns():020} rank {rank}: {type(error).__name__}: {error}"
        write_text(failure_path(path, rank), cause)
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
