"""Two ways to write down what a rank does: columns that it goes round, or a sequence of phases."""

from collections.abc import Callable, Sequence

import numpy as np

from simulator.schedule import KINDS, MICROBATCH_SHIFT, STAGE_SHIFT, B, Codes, F, I, W, encode

LETTERS = {f"{kind}{chunk}": chunk << 2 | k for k, kind in enumerate(KINDS) for chunk in (0, 1)}
"""The words of a phase: a kind of action on the first (0) or the second (1) stage of the rank."""


def in_rounds(*columns: tuple[Codes, int]) -> Codes:
    """Return what a rank does that goes round its `columns`, one action of each in a round.

    A column is its actions, in order, and the first round in which it takes part; it is passed
    over before that and once it is used up.

    >>> forwards, backwards = np.array([1, 2, 3]), np.array([10, 20, 30])
    >>> in_rounds((forwards, 0), (backwards, 1)).tolist()
    [1, 2, 10, 3, 20, 30]
    """
    num_rounds = max(first + len(codes) for codes, first in columns)
    table = np.full((num_rounds, len(columns)), -1, np.int64)
    for place, (codes, first) in enumerate(columns):
        table[first : first + len(codes), place] = codes
    order = table.ravel()
    return order[order >= 0]


def rounds_of_ranks(
    num_ranks: int, columns: Sequence[Codes], first_rounds: Callable[[int], Sequence[int]]
) -> tuple[Codes, ...]:
    """Return the orders of ranks that all go round the same `columns`, each r stages further on.

    `columns` are those of rank 0; `first_rounds(rank)` says when each of them begins.
    """
    return tuple(
        in_rounds(
            *(
                (codes + (rank << STAGE_SHIFT), first)
                for codes, first in zip(columns, first_rounds(rank), strict=True)
            )
        )
        for rank in range(num_ranks)
    )


def phase(times: int, pattern: str) -> bytes:
    """Return the letters of `pattern`, `times` times over.

    >>> list(phase(2, "F0 I1"))
    [0, 6, 0, 6]
    """
    return bytes([LETTERS[word] for word in pattern.split()]) * times


def numbered(letters: bytes, stages: tuple[int, int], num_microbatches: int) -> Codes:
    """Return the actions that `letters` stand for on the two `stages` of a rank.

    A stage takes the micro-batches in order, forward and backward (`B` or `I`), and its `W` in the
    order of its `I`. What falls on micro-batches from `num_microbatches` on is left out.

    >>> from simulator.schedule import decode
    >>> " ".join(map(str, decode(numbered(phase(2, "F0 F1 B1 I0 W0"), (3, 4), 1))))
    '3F0 4F0 4B0 3I0 3W0'
    """
    words = np.frombuffer(letters, np.uint8)
    microbatches = np.empty(len(words), np.int64)
    for chunk in (0, 1):
        forward, full, half, weight = (words == (chunk << 2 | kind) for kind in (F, B, I, W))
        for alike in (forward, full | half):
            microbatches[alike] = np.arange(np.count_nonzero(alike))
        microbatches[weight] = microbatches[half]
    codes = encode(words & 3, np.array(stages)[words >> 2], microbatches)
    return codes[codes < num_microbatches << MICROBATCH_SHIFT]
