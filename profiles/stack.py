"""`StackSpec`: the software that runs a layout, as far as it changes time or memory."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSpec:
    """What the training software fuses and overlaps; sizes in bytes.

    `overlaps_gradients` says whether the gradient all-reduce hides behind the last backward. On
    CPU ranks it does not: the collective is computed by the very core that runs the backward.
    `fuses_norms` says whether RMSNorm is one kernel; composed of several, it keeps the normalised
    input for its backward.
    """

    name: str
    overlaps_gradients: bool
    gradient_bucket_bytes: int
    fuses_norms: bool
    source: str
    date: str
