"""Read published kernel measurements: a row for each timed kernel, in the terms of this project.

What each source times, and its traps, stand in docs/reference.md under reference kernels.
"""

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from profiles.kernel_curves import BACKWARD_FLOPS

DIRECTIONS = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "both"}
DIRECTION_FLOPS = {"forward": 1.0, "backward": BACKWARD_FLOPS}

# The FlashAttention-3 paper, arXiv 2407.08608, July 2024, figure of the backward speed on H100 SXM5
# in fp16, not causal: TFLOP/s by kernel and head size; batch * length = 16k and heads * head size
# = 2048, as in the figures of its forward.
BACKWARD_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
BACKWARD_TFLOPS = {
    ("FlashAttention-2", 64): (198, 238, 264, 279, 287, 291),
    ("FlashAttention-2", 128): (214, 260, 291, 310, 318, 322),
    ("FlashAttention-3", 64): (272, 363, 422, 453, 472, 474),
    ("FlashAttention-3", 128): (316, 424, 501, 542, 559, 561),
}


class MatmulRow(NamedTuple):
    """A timed product [m, k] x [k, n]; `has_cast` when `ns` holds the cast of [m, k] to fp8."""

    m: int
    n: int
    k: int
    ns: float
    has_cast: bool = False


class AttentionRow(NamedTuple):
    """A timed attention core; `direction` is forward, backward or both."""

    library: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_size: int
    causal: bool
    direction: str
    ns: float


class MemoryRow(NamedTuple):
    """A timed kernel of the operator `op` that reads and writes `size_bytes` in all."""

    op: str
    size_bytes: int
    ns: float


def _kernels(folder: Path, kind: str) -> Iterator[dict[str, str]]:
    with (folder / "kernels.csv").open(encoding="utf-8") as file:
        yield from (row for row in csv.DictReader(file) if row["kind"] == kind)


def _operators(folder: Path, gpu: str) -> Iterator[dict[str, str]]:
    with gzip.open(folder / "ett_kernels.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["kind"] == "operator" and row["gpu"] == gpu:
                yield row


def matmul_rows(folder: Path, gpu: str, dtype: str) -> list[MatmulRow]:
    """Return the products of `gpu` in `dtype`: forward ones of inference, or all of training.

    The maxima of a search over shapes (MAMF) are left to `largest_tflops`.
    """
    found = []
    for row in _kernels(folder, "gemm"):
        if (row["gpu"], row["dtype"]) != (gpu, dtype) or "MAMF" in row["source"]:
            continue
        m, n, k = (int(float(row[name])) for name in ("m", "n", "k"))
        value = float(row["value"])
        ns = value * 1e6 if row["unit"] == "ms" else 2.0 * m * n * k / value / 1e3
        found.append(MatmulRow(m, n, k, ns, dtype == "fp8"))
    return found


def largest_tflops(folder: Path, gpu: str, dtype: str) -> float:
    """Return the largest rate that a search over shapes found on `gpu` (MAMF)."""
    return max(
        float(row["value"])
        for row in _kernels(folder, "gemm")
        if "MAMF" in row["source"] and (row["gpu"], row["dtype"]) == (gpu, dtype)
    )


def attention_rows(folder: Path, gpu: str, library: str) -> list[AttentionRow]:
    """Return the attention of `gpu` by `library` (the beginning of its name) in 16 bits.

    Rates in TFLOP/s count 4 s^2 d flops a head, half when causal, 2.5 times that backward.
    """
    found = []
    for row in _kernels(folder, "attention"):
        if row["gpu"] != gpu or not row["library"].startswith(library) or row["dtype"] == "fp8":
            continue
        batch, length, heads, head_size = (
            int(row[name]) for name in ("batch", "seq", "heads", "head_dim")
        )
        timed = AttentionRow(
            library=library,
            batch=batch,
            heads=heads,
            kv_heads=int(row["kv_heads"] or 0) or heads,
            length=length,
            head_size=head_size,
            causal=row["causal"] == "True",
            direction=DIRECTIONS[row["direction"]],
            ns=1e6 * float(row["value"]),
        )
        is_time = row["unit"] == "ms"
        found.append(timed if is_time else _from_rate(timed, float(row["value"])))
    return found


def figure_rows(library: str) -> list[AttentionRow]:
    """Return the backward of `library` on H100 SXM that its paper's figure gives."""
    found = []
    for (name, head_size), rates in BACKWARD_TFLOPS.items():
        for length, rate in zip(BACKWARD_LENGTHS, rates, strict=True):
            heads = 2048 // head_size
            timed = AttentionRow(
                library=library,
                batch=16384 // length,
                heads=heads,
                kv_heads=heads,
                length=length,
                head_size=head_size,
                causal=False,
                direction="backward",
                ns=0.0,
            )
            if name == library:
                found.append(_from_rate(timed, rate))
    return found


def directions(row: AttentionRow) -> tuple[str, ...]:
    """Return the directions that `row` times one after the other."""
    return ("forward", "backward") if row.direction == "both" else (row.direction,)


def _from_rate(row: AttentionRow, tflops: float) -> AttentionRow:
    """Return `row` with the time that its rate stands for."""
    pairs = row.batch * row.heads * row.length**2 / (2 if row.causal else 1)
    flops = sum(DIRECTION_FLOPS[direction] for direction in directions(row))
    return row._replace(ns=flops * 4.0 * pairs * row.head_size / tflops / 1e3)


def memory_rows(folder: Path, gpu: str, smallest_add_bytes: int) -> list[MemoryRow]:
    """Return residual additions and GELUs of the operator tables, in fp16.

    An addition moves 6 bytes a value, a GELU 4 and its backward 6. Additions under
    `smallest_add_bytes` find their operands in the cache and are left out.
    """
    found = []
    for row in _operators(folder, gpu):
        values = int(float(row["b"] or 0) * float(row["l"] or 0) * float(row["dim"] or 0))
        ns = 1e3 * float(row["time_us"])
        if row["op"] == "res_add" and row["direction"] == "fwd":
            if 6 * values >= smallest_add_bytes:
                found.append(MemoryRow("add", 6 * values, ns))
        elif row["op"] == "gelu":
            values = 4 * values // int(float(row["mp"]))
            is_forward = row["direction"] == "fwd"
            name = "gelu_forward" if is_forward else "gelu_backward"
            found.append(MemoryRow(name, (4 if is_forward else 6) * values, ns))
    return found
