"""The schedule language: per pipeline rank the order of actions, as values and as text.

An action is written `<stage><kind><micro-batch>`: `2F0` is the forward of micro-batch 0 on stage
2. `F` is a forward, `B` a full backward, `I` the half of it that makes the input gradient, `W`
the half that makes the weight gradient. One line is one rank. The words are those of PyTorch's
pipeline schedule CSV, so a schedule that the simulator times is one that the executor runs.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

ActionKind = Literal["F", "B", "I", "W"]
_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


class Action(NamedTuple):
    """One computation of one micro-batch on one stage."""

    stage: int
    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        """Return the action as text, `2F0`."""
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The order of actions of each pipeline rank; `ranks[r]` is what rank r does, in order.

    Raises ValueError unless every stage sits on one rank and does each micro-batch exactly once
    forward and once backward (a `B`, or an `I` and a `W`).
    """

    name: str
    num_stages: int
    num_microbatches: int
    ranks: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        found: dict[tuple[int, int], list[str]] = {}
        homes: dict[int, int] = {}
        for rank, actions in enumerate(self.ranks):
            for action in actions:
                if homes.setdefault(action.stage, rank) != rank:
                    raise ValueError(
                        f"schedule {self.name}: stage {action.stage} is on rank "
                        f"{homes[action.stage]} and on rank {rank}; a stage has one home"
                    )
                found.setdefault((action.stage, action.microbatch), []).append(action.kind)
        for stage in range(self.num_stages):
            for microbatch in range(self.num_microbatches):
                kinds = "".join(sorted(found.pop((stage, microbatch), [])))
                if kinds not in ("BF", "FIW"):
                    raise ValueError(
                        f"schedule {self.name}: stage {stage} has {kinds or 'nothing'} for "
                        f"micro-batch {microbatch}; it needs F and B, or F, I and W, once each"
                    )
        if found:
            stage, microbatch = min(found)
            raise ValueError(
                f"schedule {self.name}: stage {stage}, micro-batch {microbatch} lies outside "
                f"{self.num_stages} stages and {self.num_microbatches} micro-batches"
            )

    def homes(self) -> tuple[int, ...]:
        """Return the pipeline rank of each stage."""
        homes = {action.stage: rank for rank, row in enumerate(self.ranks) for action in row}
        return tuple(homes[stage] for stage in range(self.num_stages))

    def __str__(self) -> str:
        """Return the text form: one line a rank, actions separated by blanks."""
        return "\n".join(" ".join(map(str, actions)) for actions in self.ranks)

    def to_csv(self) -> str:
        """Return the schedule as PyTorch's `compute_only` pipeline schedule CSV."""
        return "".join(",".join(map(str, actions)) + "\n" for actions in self.ranks)


def parse_schedule(text: str, name: str = "custom") -> Schedule:
    """Return the schedule written as `text`, blanks or commas between actions, a line a rank.

    Stages and micro-batches are counted from the text. Raises ValueError with the place of the
    first action that cannot be read, and what `Schedule` raises.

    >>> schedule = parse_schedule("0F0 0F1 0B0 0B1")
    >>> schedule.num_microbatches, str(schedule)
    (2, '0F0 0F1 0B0 0B1')
    """
    ranks = []
    for row, line in enumerate(text.strip().splitlines(), start=1):
        actions = []
        for word in line.replace(",", " ").split():
            if (match := _ACTION.fullmatch(word)) is None:
                raise ValueError(
                    f"schedule {name}, line {row}: {word!r} is not an action; "
                    "write <stage><F, B, I or W><micro-batch>, as in 2F0"
                )
            kind: ActionKind = match[2]  # type: ignore[assignment]
            actions.append(Action(int(match[1]), kind, int(match[3])))
        ranks.append(tuple(actions))
    every = [action for actions in ranks for action in actions]
    return Schedule(
        name=name,
        num_stages=1 + max((action.stage for action in every), default=-1),
        num_microbatches=1 + max((action.microbatch for action in every), default=-1),
        ranks=tuple(ranks),
    )


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """Return GPipe: all forwards, then all backwards.

    Step of uniform stages: (m + p - 1) * (F + B); every stage keeps m micro-batches alive.
    Source: Huang et al., GPipe (arXiv:1811.06965). Backwards go in the order of the forwards, as
    in PyTorch's `ScheduleGPipe`.

    >>> print(gpipe(2, 2))
    0F0 0F1 0B0 0B1
    1F0 1F1 1B0 1B1
    """
    ranks = tuple(
        tuple(
            Action(stage, kind, microbatch)
            for kind in ("F", "B")
            for microbatch in range(num_microbatches)
        )
        for stage in range(num_stages)
    )
    return Schedule(
        name="gpipe", num_stages=num_stages, num_microbatches=num_microbatches, ranks=ranks
    )


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """Return 1F1B: a warm-up of forwards, then one forward and one backward in turn.

    Step of uniform stages: (m + p - 1) * (F + B), as GPipe; stage s keeps min(p - s, m) alive.
    Source: Narayanan et al., PipeDream-Flush (arXiv:2104.04473), section 2.2.

    >>> print(one_f_one_b(2, 3))
    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 1B0 1F1 1B1 1F2 1B2
    """
    ranks = []
    for stage in range(num_stages):
        num_warmup = min(num_stages - 1 - stage, num_microbatches)
        actions = [Action(stage, "F", microbatch) for microbatch in range(num_warmup)]
        for microbatch in range(num_microbatches):
            if num_warmup + microbatch < num_microbatches:
                actions.append(Action(stage, "F", num_warmup + microbatch))
            actions.append(Action(stage, "B", microbatch))
        ranks.append(tuple(actions))
    return Schedule(
        name="1f1b", num_stages=num_stages, num_microbatches=num_microbatches, ranks=tuple(ranks)
    )


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}
"""Every named schedule: its builder takes the numbers of stages and of micro-batches."""
