"""Measures this machine from outside: starts ranks, follows their progress, reads the result."""

import json
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

import torch

from profiles.errors import UnsupportedError
from profiles.files import load
from profiles.measure.ranks import launched
from profiles.profile import Profile

Device = Literal["auto", "cpu", "cuda"]

_POLL_S = 0.2


def measure(
    num_ranks: int,
    device: Device = "auto",
    *,
    quick: bool,
    on_progress: Callable[[float, str], None],
    only: Collection[str] = (),
) -> Profile:
    """Return the profile of this machine with `num_ranks` ranks at work at once.

    `on_progress` is told the fraction done, in [0, 1], and what is being measured. `only` names
    the ops, collective kinds and host costs to measure; empty stands for all. Raises
    UnsupportedError without the GPUs asked for, RanksFailedError when a rank fails.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; it must be at least 1")
    if device == "cuda" and (num_gpus := torch.cuda.device_count()) < num_ranks:
        raise UnsupportedError(
            f"device cuda needs one GPU a rank: {num_ranks} asked for, {num_gpus} found; "
            "use --device cpu or fewer ranks"
        )
    on_progress(0.0, "starting ranks")
    with tempfile.TemporaryDirectory(prefix="layline-measure-") as folder:
        output, progress = Path(folder, "profile.json"), Path(folder, "progress.jsonl")
        arguments = [f"--output={output}", f"--progress={progress}", f"--device={device}"]
        arguments += ["--quick"] * quick + [f"--only={name}" for name in only]
        with launched("profiles.measure.worker", arguments, num_ranks) as process:
            reported = ""
            while process.poll() is None:
                time.sleep(_POLL_S)
                if (line := _last_line(progress)) and line != reported:
                    reported = line
                    message = json.loads(line)
                    on_progress(float(message["fraction"]), str(message["what"]))
        profile = load(Profile, output, "profile", "measure again with this version")
    on_progress(1.0, "done")
    return profile


def _last_line(path: Path) -> str:
    """Return the last whole line of a file that is being written, empty if there is none."""
    if not path.exists():
        return ""
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines[-2] if len(lines) > 1 else ""
