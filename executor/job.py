"""`RunJob`: what the parent tells its ranks, as a JSON file between `run` and `worker`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RunJob:
    """Plans to run one after another, each in a directory that holds its `plan.json`.

    `data` is a path or empty for the default text; `reference_ns` is the time of the reference
    kernel in the profile that the plans were made from, 0 where it is not known.
    """

    directories: tuple[str, ...]
    data: str
    num_steps: int
    reference_ns: int


def failure_path(job: Path, rank: int) -> Path:
    """Return where `rank` writes why it failed, for the parent to read: a time, then the cause."""
    return job.with_name(f"failed-{rank}.txt")


def first_failure(job: Path, num_ranks: int) -> str:
    """Return the cause of the rank that failed first, empty where none could tell.

    The ranks that lose it fail too, a moment later, and their messages say nothing.
    """
    paths = [failure_path(job, rank) for rank in range(num_ranks)]
    causes = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    return min(causes, default="").partition(" ")[2]
