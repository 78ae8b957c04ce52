"""Measures this machine from outside: starts ranks, follows their progress, reads the result."""

import json
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from profiles.errors import IncompleteProfileError
from profiles.files import canonical_json, load, write_text
from profiles.measure.ranks import RanksFailedError, check_device, joined, launched, was_launched
from profiles.measure.worker import Asked, one_pass
from profiles.merge import merge
from profiles.profile import Profile

Device = Literal["auto", "cpu", "cuda"]
OnProgress = Callable[[float, str], None]

# Passes, and seconds of each: two within a minute, or three within ten.
_QUICK, _FULL = (22.0, 15.0), (170.0, 150.0, 150.0)

# Passes over shapes that a profile is held against: their truth must be surer than the profile.
_AGAIN = 4

_POLL_S = 0.2


def measure(
    num_ranks: int,
    device: Device = "auto",
    *,
    quick: bool,
    on_progress: OnProgress,
    only: Collection[str] = (),
) -> Profile:
    """Return the profile of this machine with `num_ranks` ranks at work at once.

    `on_progress` is told the fraction done, in [0, 1], and what is being measured. `only` names
    the ops, collective kinds and host costs to measure; empty stands for all. Raises
    UnsupportedError without the GPUs asked for, RanksFailedError when a rank fails at once, and
    IncompleteProfileError, which holds what there is, when one fails later or on an interrupt.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; it must be at least 1")
    check_device(device, num_ranks)
    on_progress(0.0, "starting ranks")
    passes: list[Profile] = []
    seconds = _QUICK if quick else _FULL
    with tempfile.TemporaryDirectory(prefix="layline-measure-") as folder:
        for number, limit in enumerate(seconds):
            output = Path(folder, f"{number}.json")
            arguments = [f"--seconds={limit}", f"--output={output}", f"--device={device}"]
            arguments += ["--quick"] * quick + [f"--only={name}" for name in only]
            arguments += [f"--repeat={folder}/0.json"] * (number > 0)
            follow = _Follower(Path(folder, f"{number}.jsonl"), on_progress, number, seconds)
            try:
                _launch([*arguments, f"--progress={follow.path}"], num_ranks, follow)
            except (KeyboardInterrupt, RanksFailedError) as error:
                if output.exists():
                    passes.append(load(Profile, output, "pass", "measure again"))
                if not passes:
                    raise
                raise _incomplete(passes, len(seconds), error) from None
            passes.append(load(Profile, output, "pass", "measure again with this version"))
    on_progress(1.0, "done")
    return merge(passes)


def measure_again(
    profile: Profile, num_ranks: int, device: Device, *, quick: bool, on_progress: OnProgress
) -> Profile:
    """Return passes that time the entries of `profile` and no others, merged."""
    passes: list[Profile] = []
    seconds = [(_QUICK if quick else _FULL)[-1]] * _AGAIN
    with tempfile.TemporaryDirectory(prefix="layline-measure-") as folder:
        earlier = Path(folder, "earlier.json")
        write_text(earlier, canonical_json(profile))
        for number, limit in enumerate(seconds):
            output = Path(folder, f"{number}.json")
            follow = _Follower(Path(folder, f"{number}.jsonl"), on_progress, number, seconds)
            arguments = [f"--seconds={limit}", f"--output={output}", f"--device={device}",
                         f"--repeat={earlier}", f"--progress={follow.path}"]  # fmt: skip
            arguments += [f"--only={op}" for op in sorted({k.op for k in profile.kernels})]
            _launch([*arguments, *["--quick"] * quick], num_ranks, follow)
            passes.append(load(Profile, output, "pass", "measure again with this version"))
    return merge(passes)


def _incomplete(
    passes: Sequence[Profile], num_passes: int, error: BaseException
) -> IncompleteProfileError:
    """Return the error that holds the merged `passes`, the last of which broke off."""
    why = str(error) if isinstance(error, RanksFailedError) else "interrupted"
    reason = f"{why.splitlines()[-1]}, in pass {len(passes)} of {num_passes}"
    found = merge(passes)
    missing = (*found.missing, f"broke off: {reason}")
    return IncompleteProfileError(replace(found, missing=missing), reason)


def _launch(arguments: Sequence[str], num_ranks: int, follow: "_Follower") -> None:
    with launched("profiles.measure.worker", arguments, num_ranks) as process:
        while process.poll() is None:
            time.sleep(_POLL_S)
            follow()


class _Follower:
    """Tells of the progress that the first rank of a pass writes down."""

    def __init__(
        self, path: Path, on_progress: OnProgress, number: int, seconds: Sequence[float]
    ) -> None:
        self.path, self._on_progress, self._reported = path, on_progress, ""
        self._done, self._share = (sum(part) / sum(seconds) for part in
                                   (seconds[:number], seconds[number : number + 1]))  # fmt: skip
        self._what = f"pass {number + 1} of {len(seconds)}: "

    def __call__(self) -> None:
        """Pass the last line on, if it is a new one."""
        if (line := _last_line(self.path)) and line != self._reported:
            self._reported = line
            message = json.loads(line)
            fraction = self._done + self._share * float(message["fraction"])
            self._on_progress(fraction, self._what + str(message["what"]))


def measure_as_rank(
    device: Device, *, quick: bool, only: Collection[str] = ()
) -> tuple[Profile, bool]:
    """Return the profile that the ranks started by the user's torchrun measure, this being one.

    All passes run in these processes. The flag tells whether this is the rank that writes it.
    """
    assert was_launched(), "this process is no rank of torchrun"
    passes: list[Profile] = []
    with joined(device_kind=device) as own:
        for seconds in _QUICK if quick else _FULL:
            earlier = passes[0] if passes else None
            asked = Asked(quick=quick, seconds=seconds, only=tuple(only), earlier=earlier)
            passes.append(one_pass(own, asked))
        is_first = dist.get_rank() == 0
    return merge(passes), is_first


def _last_line(path: Path) -> str:
    """Return the last whole line of a file that is being written, empty if there is none."""
    if not path.exists():
        return ""
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines[-2] if len(lines) > 1 else ""
