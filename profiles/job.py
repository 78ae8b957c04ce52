"""`Job`: everything that a TOML job file says, read, checked and resolved."""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from profiles.choices import AS_SAID, Choices
from profiles.cluster import ClusterSpec
from profiles.errors import InvalidInputError, Problem, UnsupportedError
from profiles.files import read_text
from profiles.goal import FASTEST, Goal
from profiles.job_resolve import Found, resolve_cluster, resolve_goal, resolve_model
from profiles.job_schema import (
    MAX_RANKS,
    ClusterTable,
    GoalTable,
    JobTable,
    ModelTable,
    Place,
    SearchTable,
    StackTable,
    Table,
    WorkloadTable,
    as_mapping,
    schema_problems,
)
from profiles.job_variants import resolve_choices, resolve_stack
from profiles.model import ModelSpec
from profiles.stack import Recompute, Sharding, StackSpec
from profiles.workload import DTYPE_BYTES, Workload

__all__ = ["Goal", "Job", "SearchLimits", "read_job"]

MAX_JOB_BYTES = 8_000_000
MAX_DEPTH = 20
# The parser takes quadratic time for a key of very many parts; no job file has one.
MAX_DOTS = 100
AnyTable = TypeVar("AnyTable", bound=Table)
Spec = TypeVar("Spec", ModelSpec, ClusterSpec)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """The values that the search may take on each axis; an empty tuple leaves the axis free."""

    dp: tuple[int, ...] = ()
    tp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()
    micro_batch: tuple[int, ...] = ()
    cp: tuple[int, ...] = ()
    ep: tuple[int, ...] = ()
    schedule: tuple[str, ...] = ()
    stages_per_rank: tuple[int, ...] = ()
    sequence_parallel: tuple[bool, ...] = ()
    sharding: tuple[Sharding, ...] = ()
    shard_group: tuple[int, ...] = ()
    recompute: tuple[Recompute, ...] = ()
    order: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One planning question. `profile_path` is empty for `auto`: this machine's own profile.

    `foreign_profile` says that the profile may be one of another device than the cluster's.
    """

    seed: int
    model: ModelSpec
    workload: Workload
    cluster: ClusterSpec
    stack: StackSpec
    profile_path: str
    search: SearchLimits
    foreign_profile: bool = False
    goal: Goal = FASTEST
    choices: Choices = AS_SAID


def read_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Return the job in the TOML file `path`, with `overrides` such as `workload.seq_len=512`.

    The value of an override is TOML; a bare word is text. Paths in the file are relative to it.

    Raises InvalidInputError with every problem of the file and the overrides at once, each with
    its place, what was found, the rule and a way out; UnsupportedError where the only problem is a
    model that is no LLaMA.
    """
    data = _read_toml(path)
    found = Found(path)
    for override in overrides:
        _apply(data, override, found)
    if _is_deeper(data, MAX_DEPTH):
        raise InvalidInputError([f"{path}: nested too deeply; not a job file"])
    problems, places = schema_problems(JobTable, data, found.where)
    found.problems.extend(problems)
    broken = {place[0] for place in places if place}
    model = _resolve(data, "model", ModelTable, resolve_model, places, found)
    cluster = _resolve(data, "cluster", ClusterTable, resolve_cluster, places, found)
    workload = None
    if "workload" not in broken:
        workload = Workload(**WorkloadTable.model_validate(data["workload"]).given())
    said = StackTable() if "stack" in broken else StackTable(**data.get("stack", {}))
    search = SearchTable() if "search" in broken else SearchTable(**data.get("search", {}))
    stack = None if "stack" in broken else resolve_stack(said, data, found)
    choices = resolve_choices(search, said, workload, stack, cluster, found)
    wanted = GoalTable() if "goal" in broken else GoalTable(**data.get("goal", {}))
    goal = resolve_goal(wanted, cluster, found)
    profile_path = "" if "profile" in broken else _resolve_profile(data, found)
    _check_together(data, model, cluster, found)
    if found.problems:
        raise InvalidInputError([*found.problems, *found.unsupported])
    if found.unsupported:
        raise UnsupportedError("\n".join(found.unsupported))
    assert model and workload and cluster and stack, "a table without a problem must be resolved"
    return Job(
        seed=data.get("seed", 0),
        model=model,
        workload=workload,
        cluster=cluster,
        stack=stack,
        profile_path=profile_path,
        foreign_profile=data.get("foreign_profile", False),
        search=SearchLimits(
            dp=_unique(search.dp), tp=_unique(search.tp), pp=_unique(search.pp),
            cp=_unique(search.cp), ep=_unique(search.ep), micro_batch=_unique(search.micro_batch),
            stages_per_rank=_unique(search.stages_per_rank),
            shard_group=_unique(search.shard_group),
            **{
                name: tuple(dict.fromkeys(getattr(search, name)))
                for name in ("schedule", "sequence_parallel", "sharding", "recompute", "order")
            },
        ),
        goal=goal,
        choices=choices,
    )  # fmt: skip


def _resolve(
    data: dict[str, Any],
    key: str,
    table: type[AnyTable],
    resolve: Callable[[AnyTable, Found], Spec | None],
    places: Sequence[Place],
    found: Found,
) -> Spec | None:
    """Return what `resolve` makes of the table `key`, None where the table itself is wrong.

    Keys with a problem are left out, so that the problems of the others are told in the same run;
    what is then missing is not.
    """
    if (key,) in places or not isinstance(data.get(key), dict):
        return None
    wrong = {place[1] for place in places if place[0] == key and len(place) > 1}
    rest = {name: value for name, value in data[key].items() if name not in wrong}
    aside = Found(found.path, overridden=found.overridden)
    spec = resolve(table.model_validate(rest), aside)
    found.unsupported += aside.unsupported
    found.problems += [
        problem
        for problem in aside.problems
        if not wrong or (isinstance(problem, Problem) and problem.found != "missing")
    ]
    return spec


def _unique(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        is_too_large = path.stat().st_size > MAX_JOB_BYTES
    except OSError:
        is_too_large = False  # read_text names the reason
    if is_too_large:
        raise InvalidInputError([f"{path}: over {MAX_JOB_BYTES // 10**6} MB; not a job file"])
    text = read_text(path, "job file")
    if any(line.count(".") > MAX_DOTS for line in text.splitlines()):
        raise InvalidInputError([f"{path}: a line has over {MAX_DOTS} dots; not a job file"])
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InvalidInputError([f"{path}: nested too deeply; not a job file"]) from None
    except ValueError as error:
        reason = str(error)
        raise InvalidInputError(
            [f"{path}: not TOML: {reason[:1].lower()}{reason[1:200]}; correct that line"]
        ) from None


def _is_deeper(data: object, limit: int) -> bool:
    """Return whether tables and lists in `data` are nested more than `limit` times."""
    level: list[object] = [data]
    for _ in range(limit):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        level = below
    return any(isinstance(value, dict | list) for value in level)


def _apply(data: dict[str, Any], override: str, found: Found) -> None:
    """Set one `path=value` in `data`; the schema is checked afterwards, with the rest."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    parts = dotted.split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        found.add(f"--set {override[:60]}", "no setting", "must be path=value",
                  "for example --set workload.seq_len=512")  # fmt: skip
        return
    found.overridden.append(dotted)
    holder: Any = data
    for depth, part in enumerate(parts):
        here = ".".join(parts[:depth])
        key: Any = part
        if isinstance(holder, list):
            if not part.isdecimal() or int(part[:9]) >= len(holder):
                found.add(f"--set {dotted}", f'"{part[:60]}"',
                          f"must be a number below {len(holder)} in {here}",
                          "name an entry that the file has")  # fmt: skip
                return
            key = int(part)
        elif not isinstance(holder, dict):
            found.add(f"--set {dotted}", f'"{part[:60]}"', f"must be absent: {here} is no table",
                      "set the value itself")  # fmt: skip
            return
        if depth == len(parts) - 1:
            holder[key] = _toml_value(text.strip())
        else:
            if isinstance(holder, dict) and key not in holder:
                holder[key] = {}
                found.overridden.append(".".join(parts[: depth + 1]))
            holder = holder[key]


def _toml_value(text: str) -> Any:
    """Return `text` as a TOML value, or as the text itself where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _resolve_profile(data: dict[str, Any], found: Found) -> str:
    given = data.get("profile", "auto")
    if given == "auto":
        return ""
    path = found.path.parent / given
    try:
        is_file = "\0" not in given and path.is_file()
    except OSError:  # a name that is too long
        is_file = False
    if not is_file:
        found.add("profile", f'"{given[:60]}"', 'must be "auto" or a file, seen from the job file',
                  "measure one with: layline profile -o FILE")  # fmt: skip
        return ""
    return str(path)


def _check_together(
    data: dict[str, Any], model: ModelSpec | None, cluster: ClusterSpec | None, found: Found
) -> None:
    """Check what two tables say of each other; a table with a problem is left out."""
    work = as_mapping(data.get("workload"))
    seq_len, dtype = work.get("seq_len"), work.get("dtype", "fp32")
    if model is not None and type(seq_len) is int and seq_len > model.max_seq_len:
        found.add("workload.seq_len", str(seq_len),
                  f"must be at most model.max_seq_len ({model.max_seq_len})",
                  "shorten the sequences, or choose a model with a longer context")  # fmt: skip
    if cluster is None:
        return
    if cluster.num_ranks > MAX_RANKS:
        found.add("cluster", f"{cluster.num_ranks:,} ranks", f"must have at most {MAX_RANKS:,}",
                  "use fewer nodes")  # fmt: skip
    for pool in cluster.pools:
        peaks = pool.gpu.peak_flops_per_s
        if not cluster.is_local and dtype in DTYPE_BYTES and dtype not in peaks:
            found.add("workload.dtype", f'"{dtype}"',
                      f"must be one that {pool.gpu.name} has a peak for ({', '.join(peaks)})",
                      "choose another dtype or GPU, or add the peak")  # fmt: skip
