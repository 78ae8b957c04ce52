"""`Job`: everything that a TOML job file says, read, checked and resolved."""

from dataclasses import dataclass

from profiles.cluster import ClusterSpec
from profiles.model import ModelSpec
from profiles.stack import StackSpec
from profiles.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """The values that the search may take on each axis; an empty tuple leaves the axis free."""

    dp: tuple[int, ...] = ()
    tp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()
    micro_batch: tuple[int, ...] = ()
    schedule: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One planning question. `profile_path` is empty for `auto`: this machine's own profile."""

    seed: int
    model: ModelSpec
    workload: Workload
    cluster: ClusterSpec
    stack: StackSpec
    profile_path: str
    search: SearchLimits
