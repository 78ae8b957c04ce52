"""Memory-bound work between the matrix products: bytes that move and kernels that move them.

Counted from what each operator must read and write, in elements of two bytes; RMSNorm composed of
single operators goes over its input five times, fused once. `eager` is one kernel an operator,
`fused` the hand-written kernels of Megatron and FlashAttention, `compiled` what a compiler leaves.
"""

from collections.abc import Mapping
from typing import NamedTuple

from profiles.stack import Fusion


class Pass(NamedTuple):
    """Bytes an element and kernel launches, of the forward and of the backward."""

    forward: tuple[float, float]
    backward: tuple[float, float]


PASSES: Mapping[str, Mapping[Fusion, Pass]] = {
    "norm": {
        "eager": Pass((20, 6), (30, 12)),
        "fused": Pass((4, 1), (8, 2)),
        "compiled": Pass((4, 1), (8, 2)),
    },
    "residual": {
        "eager": Pass((6, 1), (6, 1)),
        "fused": Pass((6, 1), (4, 1)),
        "compiled": Pass((3, 0.5), (4, 0.5)),
    },
    "rope": {
        "eager": Pass((16, 8), (16, 8)),
        "fused": Pass((4, 2), (4, 2)),
        "compiled": Pass((4, 1), (4, 1)),
    },
    "swiglu": {
        "eager": Pass((10, 2), (18, 4)),
        "fused": Pass((6, 1), (10, 1)),
        "compiled": Pass((6, 1), (10, 1)),
    },
    "gelu": {
        "eager": Pass((8, 2), (12, 2)),
        "fused": Pass((4, 1), (6, 1)),
        "compiled": Pass((4, 1), (6, 1)),
    },
    "loss": {
        "eager": Pass((26, 8), (16, 4)),
        "fused": Pass((14, 3), (8, 2)),
        "compiled": Pass((8, 2), (6, 1)),
    },
}

LAYER_CALLS: Mapping[Fusion, float] = {"eager": 45.0, "fused": 35.0, "compiled": 12.0}
"""Calls of a layer, in each direction, that make no kernel: views, casts, autograd's own."""
RECOMPUTE_CALLS = 40.0
"""Calls of one recomputed layer: saving and restoring the random states, a second graph."""
CAST_BYTES = 4.0
"""Bytes an element to make an fp8 operand and its transpose from bf16, with its maximum."""
