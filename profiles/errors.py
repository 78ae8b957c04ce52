"""The subject errors of this package: facts that cannot be used, or could not all be had."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profiles.profile import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong in one file: where, what was found, what is needed, and a way out.

    >>> print(Problem(where="job.toml: layout.tp", found="3", rule="must divide 8 kv heads",
    ...               fix="use 1, 2, 4 or 8"))
    job.toml: layout.tp is 3; it must divide 8 kv heads; use 1, 2, 4 or 8
    """

    where: str
    found: str
    rule: str
    fix: str

    def __str__(self) -> str:
        """Return the problem as one line."""
        rule = self.rule if self.rule.startswith("it ") else f"it {self.rule}"
        return f"{self.where} is {self.found}; {rule}; {self.fix}"


class InvalidInputError(ValueError):
    """A user's file or value breaks rules; `problems` names all of them at once."""

    def __init__(self, problems: Sequence[Problem | str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UnsupportedError(ValueError):
    """The input is well formed, but this version cannot model or run it."""


class IncompleteProfileError(RuntimeError):
    """A measurement broke off; `profile` holds what there is, and says what is missing."""

    def __init__(self, profile: "Profile", reason: str) -> None:
        self.profile = profile
        super().__init__(reason)
