"""`Workload`: what one optimizer step trains on, and with which optimizer."""

from dataclasses import dataclass
from typing import Literal

DType = Literal["fp32", "bf16", "fp16", "fp8"]
DTYPE_BYTES: dict[DType, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""Bytes of a stored element; fp8 is a dtype of matrix products, whose operands are kept in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained in one step; `global_batch` counts sequences, `tokens` counts tokens.

    `tokens` is the whole of the training run and is 0 where nobody asked for one.

    >>> Workload(seq_len=128, global_batch=8).tokens_per_step
    1024
    """

    seq_len: int
    global_batch: int
    dtype: DType = "fp32"
    optimizer: Literal["adamw"] = "adamw"
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    tokens: int = 0

    def __post_init__(self) -> None:
        for field in ("seq_len", "global_batch"):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"workload.{field} is {value}; it must be at least 1")

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step."""
        return self.seq_len * self.global_batch
