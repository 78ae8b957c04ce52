"""The cases of a sweep, each a value on every axis, and what becomes of each."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

from planner.plan import Certificate, Plan
from profiles.errors import InvalidInputError, Problem
from profiles.files import plain
from profiles.profile import Cost

MAX_CASES = 10_000
MAX_NAME = 120
"""What a file's name has room for beside its number, in characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One value of the job file, by its path, and the values that it takes, as TOML texts."""

    path: str
    values: tuple[str, ...]

    @property
    def key(self) -> str:
        """The last word of the path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One job of a sweep: its place among all, and the TOML text of each swept path."""

    place: int
    settings: tuple[tuple[str, str], ...]

    @property
    def overrides(self) -> tuple[str, ...]:
        """The settings as `profiles.job.read_job` takes them."""
        return tuple(f"{path}={text}" for path, text in self.settings)

    @property
    def values(self) -> dict[str, object]:
        """The settings as values of JSON; what JSON has no value for is its text."""
        return {path: _value(text) for path, text in self.settings}

    def file_name(self, num_cases: int) -> str:
        """Return a name for the plan of this case, in a folder of `num_cases`.

        >>> Case(place=1, settings=(("cluster.nodes", "4"), ("model.preset", '"a/b"'))).file_name(9)
        '2-nodes=4-preset=a_b.json'
        """
        axes = "-".join(
            f"{path.rpartition('.')[2]}={text.strip(_QUOTES)}" for path, text in self.settings
        )
        number = f"{self.place + 1:0{len(str(num_cases))}}"
        return f"{number}-{re.sub(r'[^A-Za-z0-9._=-]+', '_', axes)[:MAX_NAME]}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """A plan in short: its layout, what it does in a second, and how good it is proved to be."""

    layout: str
    num_ranks: int
    step: Cost
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    peak_bytes: int
    certificate: Certificate
    plan_digest: str


FailureKind = Literal["invalid", "infeasible", "unsupported", "lost", "interrupted"]
"""Why there is no plan; `lost` where the process that was to make it was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a case has no plan, in a word and in a sentence."""

    kind: FailureKind
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case and what became of it."""

    case: Case
    outcome: PlanSummary | Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All cases of a sweep in their order, whichever was done first."""

    axes: tuple[Axis, ...]
    rows: tuple[Row, ...]

    @property
    def num_planned(self) -> int:
        """How many cases have a plan."""
        return sum(isinstance(row.outcome, PlanSummary) for row in self.rows)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Why the others have none."""
        return tuple(row.outcome for row in self.rows if isinstance(row.outcome, Failure))

    @property
    def is_interrupted(self) -> bool:
        """Whether it was stopped before every case was done."""
        return any(failure.kind == "interrupted" for failure in self.failures)

    def as_json(self) -> dict[str, object]:
        """Return the rows as values of JSON: `set`, and `plan` or `problem`."""
        return {"cases": [_row_json(row) for row in self.rows]}


def _row_json(row: Row) -> dict[str, object]:
    if isinstance(row.outcome, Failure):
        told: dict[str, object] = {"problem": row.outcome.problem, "kind": row.outcome.kind}
    else:
        told = {"plan": plain(row.outcome)}
    return {"set": row.case.values} | told


def summary_of(plan: Plan) -> PlanSummary:
    """Return `plan` in short."""
    tokens_per_s = plan.workload.tokens_per_step / plan.step.p50_ns * 1e9
    return PlanSummary(
        layout=str(plan.layout),
        num_ranks=plan.layout.num_ranks,
        step=plan.step,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=tokens_per_s / plan.layout.num_ranks,
        peak_bytes=max(rank.total for rank in plan.memory),
        certificate=plan.certificate,
        plan_digest=plan.plan_digest,
    )


_QUOTES = "\"' "


def parse_axis(text: str) -> Axis:
    """Return the axis that `text` names: a path of the job file, `=`, and values with commas.

    A comma inside quotes, brackets or braces belongs to its value. Raises InvalidInputError for
    what is no axis.

    >>> parse_axis("search.pp=[1, 2],[4]")
    Axis(path='search.pp', values=('[1, 2]', '[4]'))
    """
    path, equals, listed = text.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise _no_axis(text, "no axis", "must be path=value,value,..")
    values = tuple(value.strip() for value in _split(text, listed))
    if not all(values):
        raise _no_axis(text, "an axis with an empty value", "must have a value at each comma")
    told = [json.dumps(_value(value), sort_keys=True) for value in values]
    if twice := [value for value, one in zip(values, told, strict=True) if told.count(one) > 1]:
        raise _no_axis(text, f"an axis with {twice[0][:60]} twice", "must name each value once")
    return Axis(path=path, values=values)


def cases_of(axes: Sequence[Axis], overrides: Sequence[str] = ()) -> tuple[Case, ...]:
    """Return the product of `axes`, the last one running fastest.

    Raises InvalidInputError where an axis would overwrite another one, or one of the `overrides`
    that every case has, and where there would be too many cases.

    >>> [case.overrides for case in cases_of([parse_axis("a=1,2"), parse_axis("b=3")])]
    [('a=1', 'b=3'), ('a=2', 'b=3')]
    """
    before = [override.partition("=")[0].strip() for override in overrides]
    for axis in axes:
        for path in before:
            if f"{path}.".startswith(f"{axis.path}."):
                raise _no_axis(axis.path, f"set again, after {path}", "must be set in one place")
        before.append(axis.path)
    num_cases = prod(len(axis.values) for axis in axes)
    if num_cases > MAX_CASES:
        counts = " x ".join(str(len(axis.values)) for axis in axes)
        raise InvalidInputError(
            [
                f"--sweep: {counts} values are {num_cases:,} cases; at most {MAX_CASES:,} are "
                "planned at once; name fewer values, or sweep one axis after another"
            ]
        )
    paths = [axis.path for axis in axes]
    return tuple(
        Case(place=place, settings=tuple(zip(paths, texts, strict=True)))
        for place, texts in enumerate(product(*(axis.values for axis in axes)))
    )


def headings(axes: Sequence[Axis]) -> Mapping[str, str]:
    """Return what a table calls each path: its last word, or all of it where two share that.

    >>> headings([parse_axis("cluster.nodes=1"), parse_axis("search.pp=1")])
    {'cluster.nodes': 'nodes', 'search.pp': 'pp'}
    """
    keys = [axis.key for axis in axes]
    return {axis.path: axis.key if keys.count(axis.key) == 1 else axis.path for axis in axes}


def _split(axis: str, listed: str) -> list[str]:
    """Return the parts of `listed` between commas that stand in no quotes and no brackets."""
    values, quote, num_open, start = [], "", 0, 0
    # A pair of a backslash and what it escapes is one sign, which is none of those asked for.
    for found in re.finditer(r"\\.|.", listed, re.DOTALL):
        sign = found.group()
        if quote:
            # In single quotes a backslash is a sign like any other.
            if sign == quote or (quote == "'" and sign == "\\'"):
                quote = ""
        elif sign in "\"'":
            quote = sign
        elif sign in "[{":
            num_open += 1
        elif sign in "]}":
            num_open -= 1
        elif sign == "," and not num_open:
            values.append(listed[start : found.start()])
            start = found.end()
    if quote or num_open:
        what = "quote" if quote else "bracket"
        raise _no_axis(axis, f"an axis with a {what} that has no other", "must be closed")
    return [*values, listed[start:]]


def _value(text: str) -> object:
    """Return the TOML value `text` as one of JSON; what is none of both is text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
        json.dumps(parsed, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _no_axis(text: str, found: str, rule: str) -> InvalidInputError:
    return InvalidInputError(
        [
            Problem(
                where=f"--sweep {text[:60]}", found=found, rule=rule,
                fix="for example --sweep cluster.nodes=1,2,4",
            )
        ]
    )  # fmt: skip
