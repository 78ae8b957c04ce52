"""The schedule language: per pipeline rank the order of actions, as arrays, values and text.

An action is written `<stage><kind><micro-batch>`: `2F0` is the forward of micro-batch 0 on stage
2. `F` is a forward, `B` a full backward, `I` the half of it that makes the input gradient, `W`
the half that makes the weight gradient. One line is one rank. The words are those of PyTorch's
pipeline schedule CSV, so a schedule that the simulator times is one that the executor runs.

Inside, an action is one int64, so that orders of a million actions are built, checked and walked
as arrays: `microbatch << 24 | stage << 2 | kind`, with F, B, I, W as 0 to 3.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

ActionKind = Literal["F", "B", "I", "W"]
Codes = npt.NDArray[np.int64]

KINDS: tuple[ActionKind, ...] = ("F", "B", "I", "W")
F, B, I, W = range(4)  # noqa: E741  (the letters of the language)
STAGE_SHIFT, MICROBATCH_SHIFT, STAGE_MASK = 2, 24, (1 << 22) - 1
MAX_STAGES, MAX_MICROBATCHES = 1 << 16, 1 << 24
MAX_ACTIONS = 1 << 30
_ACTION = re.compile(r"(\d{1,9})([FBIW])(\d{1,9})")


class Action(NamedTuple):
    """One computation of one micro-batch on one stage."""

    stage: int
    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        """Return the action as text, `2F0`."""
        return f"{self.stage}{self.kind}{self.microbatch}"


def encode(kind: npt.ArrayLike, stage: npt.ArrayLike, microbatch: npt.ArrayLike) -> Codes:
    """Return packed actions; arguments are numbers or arrays that broadcast, kinds are F, B, I, W.

    >>> [str(action) for action in decode(encode(F, 2, np.arange(3)))]
    ['2F0', '2F1', '2F2']
    """
    kinds, stages, microbatches = (np.asarray(a, np.int64) for a in (kind, stage, microbatch))
    codes: Codes = np.bitwise_or(microbatches << MICROBATCH_SHIFT, stages << STAGE_SHIFT)
    return np.bitwise_or(codes, kinds)


def decode(codes: Codes) -> tuple[Action, ...]:
    """Return the actions that `codes` [N] stand for."""
    stages = ((codes >> STAGE_SHIFT) & STAGE_MASK).tolist()
    microbatches = (codes >> MICROBATCH_SHIFT).tolist()
    kinds = [KINDS[kind] for kind in (codes & 3).tolist()]
    return tuple(map(Action, stages, kinds, microbatches))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """The order of actions of each pipeline rank; `orders[r]` is what rank r does, packed.

    `codes` [A] is all orders end to end, that of rank r from `offsets[r]` to `offsets[r + 1]`;
    `homes[s]` is the rank of stage s. Raises ValueError unless every stage sits on one rank, does
    each micro-batch exactly once forward and once backward (a `B`, or an `I` and a `W`), and does
    them in that order.

    >>> schedule = parse_schedule("0F0 0F1 0B0 0B1")
    >>> schedule.num_microbatches, str(schedule)
    (2, '0F0 0F1 0B0 0B1')
    """

    name: str
    num_stages: int
    num_microbatches: int
    codes: Codes
    offsets: Codes
    homes: npt.NDArray[np.int32]

    def __init__(
        self, *, name: str, num_stages: int, num_microbatches: int, orders: tuple[Codes, ...]
    ) -> None:
        check_size(name, num_stages, num_microbatches, len(orders))
        codes = np.concatenate(orders).astype(np.int64, copy=False)
        offsets = np.cumsum([0, *map(len, orders)])
        homes = _homes(name, num_stages, codes, offsets)
        _check_complete(name, num_stages, num_microbatches, codes)
        for array in (codes, offsets, homes):
            array.flags.writeable = False
        for field, value in (
            ("name", name), ("num_stages", num_stages), ("num_microbatches", num_microbatches),
            ("codes", codes), ("offsets", offsets), ("homes", homes),
        ):  # fmt: skip
            object.__setattr__(self, field, value)

    @property
    def orders(self) -> tuple[Codes, ...]:
        """What each rank does, packed."""
        return tuple(np.split(self.codes, self.offsets[1:-1]))

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.offsets) - 1

    @property
    def num_actions(self) -> int:
        """Actions of all ranks."""
        return len(self.codes)

    @property
    def ranks(self) -> tuple[tuple[Action, ...], ...]:
        """The orders as values to read; for work on many actions take `orders`."""
        return tuple(decode(order) for order in self.orders)

    @property
    def splits_backward(self) -> bool:
        """Whether some backward is an input half and a weight half."""
        return bool(((self.codes & 3) >= I).any())

    def __eq__(self, other: object) -> bool:
        """Return whether both name and do the same, in the same order."""
        return (
            isinstance(other, Schedule)
            and (self.name, self.num_stages, self.num_microbatches, self.num_ranks)
            == (other.name, other.num_stages, other.num_microbatches, other.num_ranks)
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.codes, other.codes)
        )

    def __hash__(self) -> int:
        return hash((self.name, self.num_stages, self.num_microbatches, self.num_actions))

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
    """
    orders, num_stages, num_microbatches = [], 0, 0
    for row, line in enumerate(text.strip().splitlines(), start=1):
        codes = []
        for word in line.replace(",", " ").split():
            if (match := _ACTION.fullmatch(word)) is None:
                raise ValueError(
                    f"schedule {name}, line {row}: {word!r} is not an action; "
                    "write <stage><F, B, I or W><micro-batch>, as in 2F0"
                )
            stage, microbatch = int(match[1]), int(match[3])
            num_stages = max(num_stages, stage + 1)
            num_microbatches = max(num_microbatches, microbatch + 1)
            kind = "FBIW".index(match[2])
            codes.append(microbatch << MICROBATCH_SHIFT | stage << STAGE_SHIFT | kind)
        orders.append(np.array(codes, np.int64))
    return Schedule(
        name=name,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        orders=tuple(orders),
    )


def check_size(name: str, num_stages: int, num_microbatches: int, num_ranks: int) -> None:
    """Raise ValueError for counts that no schedule can have, before anything of that size exists.

    Builders call it first, so that a slip such as 1e9 ranks ends in a sentence.
    """
    for what, value, most in (
        ("stages", num_stages, MAX_STAGES),
        ("pipeline ranks", num_ranks, MAX_STAGES),
        ("micro-batches", num_microbatches, MAX_MICROBATCHES),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"schedule {name} has {value} {what}; it can have 1 to {most}")
    if num_stages * num_microbatches * 2 > MAX_ACTIONS:
        raise ValueError(
            f"schedule {name} has {num_stages} stages and {num_microbatches} micro-batches; "
            f"their product can be {MAX_ACTIONS // 2} at most"
        )


def _homes(name: str, num_stages: int, codes: Codes, offsets: Codes) -> npt.NDArray[np.int32]:
    """Return the rank of each stage; raise ValueError for a stage on two ranks, or out of range."""
    stages = (codes >> STAGE_SHIFT) & STAGE_MASK
    if len(codes) and int(stages.max()) >= num_stages:
        raise _outside(name, codes, int(stages.argmax()), f"{num_stages} stages")
    ranks = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    homes = np.full(num_stages, -1, np.int32)
    homes[stages] = ranks
    is_astray = homes[stages] != ranks
    if is_astray.any():
        place = int(is_astray.argmax())
        stage, rank = int(stages[place]), int(ranks[place])
        raise ValueError(
            f"schedule {name}: stage {stage} is on rank {rank} and on rank {homes[stage]}; "
            "a stage has one home"
        )
    return homes


def _check_complete(name: str, num_stages: int, num_microbatches: int, codes: Codes) -> None:
    """Raise ValueError unless every stage does F and B, or F, I and W, once each micro-batch.

    And in that order: all of a cell stand on one rank, so their places tell who comes first.
    """
    microbatches = codes >> MICROBATCH_SHIFT
    if len(codes) and int(microbatches.max()) >= num_microbatches:
        limit = f"{num_microbatches} micro-batches"
        raise _outside(name, codes, int(microbatches.argmax()), limit)
    num_cells = num_stages * num_microbatches
    cells = ((codes >> STAGE_SHIFT) & STAGE_MASK) * num_microbatches + microbatches
    cells += (codes & 3) * num_cells
    places = np.full((len(KINDS), num_cells), -1, np.int64)
    places.ravel()[cells] = np.arange(len(codes))
    f, b, i, w = places
    is_good = (f >= 0) & ((b > f) ^ ((i > f) & (w > i)))
    if is_good.all() and np.count_nonzero(places >= 0) == len(codes):
        return
    counts = np.bincount(cells, minlength=places.size).reshape(places.shape)
    is_whole = (counts[F] == 1) & (counts[B] + counts[I] == 1) & (counts[I] == counts[W])
    cell = int(np.argmin(is_good if is_whole.all() else is_whole))
    stage, microbatch = divmod(cell, num_microbatches)
    if is_whole.all():
        raise _unordered(name, codes, *places[:, cell].tolist())
    kinds = "".join(
        kind * int(n) for kind, n in sorted(zip(KINDS, counts[:, cell].tolist(), strict=True))
    )
    raise ValueError(
        f"schedule {name}: stage {stage} has {kinds or 'nothing'} for "
        f"micro-batch {microbatch}; it needs F and B, or F, I and W, once each"
    )


def _unordered(name: str, codes: Codes, f: int, b: int, i: int, w: int) -> ValueError:
    """Return the error for one cell whose actions stand at these places, -1 for none."""
    early, needed = (w, i) if i > f else (max(b, i), f)
    action, other = (decode(codes[place : place + 1])[0] for place in (early, needed))
    return ValueError(f"schedule {name}: {action} stands before {other}, which it needs")


def _outside(name: str, codes: Codes, place: int, limit: str) -> ValueError:
    action = decode(codes[place : place + 1])[0]
    return ValueError(
        f"schedule {name}: stage {action.stage}, micro-batch {action.microbatch} "
        f"lies outside of {limit}"
    )
