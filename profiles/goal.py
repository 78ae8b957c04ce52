"""`Goal`: what the search is to make best, and the limits that no choice may break."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

ObjectiveName = Literal[
    "step_time",
    "tokens_per_s",
    "dollars_per_mtoken",
    "joules_per_token",
    "memory_headroom",
    "goodput",
]
"""What a layout can be judged by; the equations are in `planner.objectives`.

`step_time` in seconds; `tokens_per_s` of the undisturbed job; `dollars_per_mtoken`: $ a million
tokens; `joules_per_token` of the whole facility; `memory_headroom`: bytes free on the fullest rank;
`goodput`: tokens a second that last, failures and checkpoints taken off.
"""
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)
BEST_IS_HIGH = frozenset({"tokens_per_s", "memory_headroom", "goodput"})
"""Objectives of which more is better; a limit on them is a least value, on the others a most."""
MAX_OBJECTIVES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One objective to be made best, or the Pareto front of two or three, within `limits`.

    Limits are in seconds, bytes, and otherwise in the unit of their name.

    >>> Goal(objectives=("tokens_per_s", "memory_headroom"), limits={"step_time": 12.0}).asks_for
    ('step_time', 'tokens_per_s', 'memory_headroom')
    """

    objectives: tuple[str, ...] = ("step_time",)
    limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = len(set(self.objectives))
        if not 1 <= named <= MAX_OBJECTIVES or named < len(self.objectives):
            raise ValueError(
                f"goal.objectives is {self.objectives}; it must name one, two or three different "
                f"ones of {', '.join(OBJECTIVES)}"
            )
        for name in (*self.objectives, *self.limits):
            if name not in OBJECTIVES:
                known = ", ".join(OBJECTIVES)
                raise ValueError(f'goal: "{name}" is no objective; use one of {known}')
        for name, limit in self.limits.items():
            if not (limit > 0 and math.isfinite(limit)):
                raise ValueError(f"goal.limits.{name} is {limit}; it must be above 0 and finite")

    @property
    def asks_for(self) -> tuple[str, ...]:
        """The objectives that it names or limits, in the order of `OBJECTIVES`."""
        asked = {*self.objectives, *self.limits}
        return tuple(name for name in OBJECTIVES if name in asked)


FASTEST = Goal()
"""The goal of a job that names none: the shortest step, without limits."""
