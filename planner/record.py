"""`RunRecord`: what one real run of a plan measured.

It stands beside `Plan`, on the floor that both the executor (which writes it) and the reports
(which lay it over the plan) can see. A run directory holds `plan.json`, `steps.jsonl` (a line a
step, written as the run goes) and `record.json` (written last, so that its presence says that the
run is whole).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from planner.plan import Plan, load_plan
from profiles.errors import InvalidInputError
from profiles.files import load
from simulator.timeline import Timeline

RECORD_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step: mean loss over its tokens, wall time of the slowest rank."""

    step: int
    loss: float
    step_ns: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Measured memory of one rank, in bytes: before the model was made, and at its peak."""

    context_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The summary of one run.

    The first `num_warmup` steps are left out of `median_step_ns`, `p10_step_ns` and `p90_step_ns`.
    `timeline` is one traced step, `kind_ns` the median over the timed steps of the time that each
    rank spent by span kind. `machine_slowdown` is the time of a reference kernel during the run
    over its time in the profile that the plan was made from: above 1, the machine was slower.
    """

    schema_version: int
    plan_digest: str
    started_at: str
    versions: Mapping[str, str]
    data: str
    data_digest: str
    num_warmup: int
    steps: tuple[StepRecord, ...]
    median_step_ns: int
    p10_step_ns: int
    p90_step_ns: int
    memory: tuple[RankMemory, ...]
    timeline: Timeline
    kind_ns: tuple[Mapping[str, int], ...]
    machine_slowdown: float


def load_run(directory: Path) -> tuple[Plan, RunRecord]:
    """Return the plan and the record of the run in `directory`.

    Raises InvalidInputError for a directory that holds no whole run, StalePlanError for an edited
    plan.
    """
    if not (directory / "record.json").is_file():
        state = "has not finished" if (directory / "plan.json").is_file() else "is not there"
        raise InvalidInputError(
            [f"{directory}: the run {state}; name a directory that `layline run -o` has filled"]
        )
    plan = load_plan(directory / "plan.json")
    record = load(
        RunRecord, directory / "record.json", "run record", "run the plan again with `layline run`"
    )
    if record.plan_digest != plan.plan_digest:
        raise InvalidInputError(
            [f"{directory}: record.json belongs to another plan; run the plan again"]
        )
    return plan, record


def read_steps(directory: Path, start_bytes: int = 0) -> tuple[list[str], int]:
    """Return the whole lines of `steps.jsonl` from `start_bytes` on, and where they end in bytes.

    A line that is still being written is left for the next call.
    """
    path = directory / "steps.jsonl"
    if not path.exists():
        return [], start_bytes
    with path.open("rb") as file:
        file.seek(start_bytes)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode().splitlines(), start_bytes + len(whole)
