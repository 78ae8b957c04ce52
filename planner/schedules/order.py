"""Two ways to write down what a rank does: columns that it goes round, or a sequence of phases."""

from collections.abc import Callable, Sequence

import numpy as np

from simulator.schedule import KINDS, MICROBATCH_SHIFT, STAGE_SHIFT, B, Codes, F, I, W, encode

LETTERS = {f"{kind}{chunk}": chunk << 2 | k for k, kind in enumerate(KINDS) for chunk in (0, 1)}
"""The words of a phase: a kind of action on the first (0) or the second (1) stage of the rank."""


def rounds_of_ranks(
    num_ranks: int, columns: Sequence[Codes], first_rounds: Callable[[int], Sequence[int]]
) -> tuple[Codes, ...]:
    """Return the orders of ranks that go round their columns, one action of each in a round.

    `columns` are those of rank 0; rank r has the same, r stages further on. `first_rounds(rank)`
    says in which round each begins; it is passed over before that and once it is used up.

    >>> from simulator.schedule import decode
    >>> columns = encode(F, 0, np.arange(3)), encode(B, 0, np.arange(3))
    >>> for order in rounds_of_ranks(2, columns, lambda rank: (0, 1 - rank)):
    ...     print(" ".join(map(str, decode(order))))
    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 1B0 1F1 1B1 1F2 1B2
    """
    firsts = [first_rounds(rank) for rank in range(num_ranks)]
    num_rounds = max(
        first + len(codes) for rank in firsts for codes, first in zip(columns, rank, strict=True)
    )
    table = np.full((num_ranks, num_rounds, len(columns)), -1, np.int64)
    for rank, rounds in enumerate(firsts):
        for place, (codes, first) in enumerate(zip(columns, rounds, strict=True)):
            table[rank, first : first + len(codes), place] = codes + (rank << STAGE_SHIFT)
    codes = table.ravel()
    return tuple(codes[codes >= 0].reshape(num_ranks, -1))


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
