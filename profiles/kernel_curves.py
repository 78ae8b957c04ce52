"""Kernel times of accelerators that are not at hand, from published measurements.

The numbers stand in `data/kernels.toml`; `profiles.published.kernels` fits them with the
very formulas below, so that what is shipped is what was compared with the measurements.
"""

import tomllib
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import resources
from typing import Any, NamedTuple

from profiles.presets import gpu_preset
from profiles.quantity import parse_quantity


class Estimate(NamedTuple):
    """A time in ns, and whether no measurement of this very device stands behind it."""

    ns: float
    is_extrapolated: bool = False


class MemoryCurve(NamedTuple):
    """How fast a device streams memory: time to launch, bytes per second that kernels reach."""

    launch_ns: float
    bytes_per_s: float
    is_extrapolated: bool = False


class MatmulCurve(NamedTuple):
    """The matrix products of one device in one dtype (`matmul_ns` says how they add up).

    `flops_per_s` is the rate of full tiles on all `num_processors`; `prologue` what filling and
    draining a tile costs, in steps of k; `small_tile` the efficiency of a tile of half the area;
    `throttle` the part by which a long kernel is slower than a short one, for want of power.
    Products with a dimension below `smallest_dim` or above `most_flops` were not measured.
    """

    launch_ns: float
    flops_per_s: float
    prologue: float
    small_tile: float
    throttle: float
    num_processors: int
    memory_bytes_per_s: float
    value_bytes: int
    result_bytes: int
    smallest_dim: int = 1
    most_flops: float = float("inf")
    is_extrapolated: bool = False


class AttentionCurve(NamedTuple):
    """One fused attention kernel in one direction on one device (`fused_ns`).

    `flops_per_s` is the rate of its two matrix products, `scores_per_s` that of the exponentials
    between them, `overhead_keys` what each block of queries costs beside its keys, in keys.
    """

    launch_ns: float
    flops_per_s: float
    scores_per_s: float
    overhead_keys: float
    num_processors: int
    memory_bytes_per_s: float
    is_extrapolated: bool = False


# How often the main loop over k may be split, and for how many waves of tiles at most.
SPLITS = (1, 2, 4)
MOST_SPLIT_WAVES = 4
THROTTLE_NS = 1e6
# Fused attention computes blocks of queries against blocks of keys, and pads its heads.
BLOCK = 128
HEAD_STEP = 32
# Bytes of an operand's value, and of the result's.
DTYPE_BYTES = {"fp32": (4, 4), "fp16": (2, 2), "bf16": (2, 2), "fp8": (1, 2)}
# Beside a forward's two matrix products a backward has three more.
BACKWARD_FLOPS = 2.5
# The head sizes and the least number of queries that the fused kernels were measured with.
MEASURED_HEADS = (64, 256)
MEASURED_QUERIES = 512


def matmul_ns(curve: MatmulCurve, m: int, n: int, k: int, batch: int = 1) -> float:
    """Return the time of `batch` products [m, k] x [k, n].

    t = launch + max(memory, main * (1 + throttle * main / (main + 1 ms)))
    main = min over tiles a x b and splits s of k of
           ceil(batch * ceil(m / a) * ceil(n / b) * s / P) * 2 a b (k / s + prologue) / (rate / P)
    memory = bytes of both operands and of the result, each once, over the memory rate

    with P processors and tiles from 256 x 128 to 64 x 128; at half the area the rate is times
    `small_tile`; a split writes and reads its partial sums in fp32. The time never falls when m,
    n or k grows.
    """
    processors = curve.num_processors
    full_ns = 2e9 * 256 * 128 * processors / curve.flops_per_s
    half_ns = full_ns / 2 / curve.small_tile
    quarter_ns = half_ns / 2 / curve.small_tile
    tiles = (
        (256, 128, full_ns),
        (128, 256, full_ns),
        (128, 128, half_ns),
        (128, 64, quarter_ns),
        (64, 128, quarter_ns),
    )
    partial_ns = 8e9 * batch * m * n / curve.memory_bytes_per_s
    main = float("inf")
    for rows, columns, step_ns in tiles:
        # Negated floor division is a ceiling, and quicker than `math.ceil`.
        num_tiles = batch * -(-m // rows) * -(-n // columns)
        for split in SPLITS if num_tiles < MOST_SPLIT_WAVES * processors else (1,):
            waves = -(-num_tiles * split // processors)
            time = waves * step_ns * (k / split + curve.prologue) + (split - 1) * partial_ns
            if time < main:
                main = time
    main *= 1.0 + curve.throttle * main / (main + THROTTLE_NS)
    moved = batch * ((m + n) * k * curve.value_bytes + m * n * curve.result_bytes)
    return curve.launch_ns + max(main, 1e9 * moved / curve.memory_bytes_per_s)


def fused_ns(
    curve: AttentionCurve,
    flops: float,
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_size: int,
    causal: bool,
) -> float:
    """Return the time of a fused attention kernel, of `flops` times its forward's two products.

    t = launch + max(pairs * (flops * 4 d / rate + 1 / scores), memory)
    pairs = batch * heads * queries * (seen + overhead) * (1 + P / blocks)

    d is the head size, which the kernels round up to 32 values. A causal query sees half of the
    keys and half a block more, since blocks on the diagonal are computed whole. `blocks` of 128
    queries are what P processors share, and the last of them runs while others wait.
    """
    seen = (keys + min(BLOCK, keys)) / 2 if causal else keys
    blocks = batch * heads * -(-queries // BLOCK)
    width = HEAD_STEP * -(-head_size // HEAD_STEP)
    pairs = batch * heads * queries * (seen + curve.overhead_keys)
    pairs *= 1.0 + curve.num_processors / blocks
    core = pairs * (flops * 4.0 * width / curve.flops_per_s + 1.0 / curve.scores_per_s)
    moved = 4.0 * flops * batch * head_size * (heads * queries + kv_heads * keys)
    return curve.launch_ns + 1e9 * max(core, moved / curve.memory_bytes_per_s)


@cache
def _tables() -> Mapping[str, Any]:
    data = resources.files("profiles").joinpath("data", "kernels.toml").read_text(encoding="utf-8")
    return tomllib.loads(data)


@cache
def memory_curve(gpu: str) -> MemoryCurve:
    """Return how `gpu` streams memory."""
    device = gpu_preset(gpu)
    table = _tables()["memory"][gpu]
    return MemoryCurve(
        launch_ns=parse_quantity(table["launch"], "ns"),
        bytes_per_s=table["share"] * device.memory_bytes_per_s,
        is_extrapolated=table["is_extrapolated"],
    )


@cache
def matmul_curve(gpu: str, dtype: str) -> MatmulCurve:
    """Return the matrix products of `gpu` in `dtype`; fp16 runs as bf16 does.

    Raises ValueError for a dtype that it lacks, InvalidInputError for an unknown device.
    """
    memory = memory_curve(gpu)
    tables = _tables()["matmul"][gpu]
    found = "bf16" if dtype == "fp16" and dtype not in tables else dtype
    if found not in tables:
        raise ValueError(
            f'a matrix product on {gpu} has dtype "{dtype}"; the device must support it: '
            f"use one of {', '.join(sorted(tables))}"
        )
    table = tables[found]
    value_bytes, result_bytes = DTYPE_BYTES[dtype]
    return MatmulCurve(
        launch_ns=parse_quantity(table["launch"], "ns"),
        flops_per_s=parse_quantity(table["rate"], "flop/s"),
        prologue=table["prologue"],
        small_tile=table["small_tile"],
        throttle=table["throttle"],
        num_processors=_tables()["memory"][gpu]["num_processors"],
        memory_bytes_per_s=memory.bytes_per_s,
        value_bytes=value_bytes,
        result_bytes=result_bytes,
        smallest_dim=table["smallest_dim"],
        most_flops=table["most_flops"],
        is_extrapolated=table["is_extrapolated"],
    )


@cache
def attention_curve(gpu: str, kernel: str, direction: str) -> AttentionCurve | None:
    """Return the fused `kernel` of `gpu` or the one that stands in for it; None without any.

    A device that cannot run flash3 takes flash2; one whose measured kernel is a later one
    (Blackwell) takes that for both names.
    """
    memory = memory_curve(gpu)
    tables = _tables()["attention"].get(gpu, {})
    if not tables or kernel == "unfused":
        return None
    table = tables[kernel if kernel in tables else min(tables)][direction]
    return AttentionCurve(
        launch_ns=parse_quantity(table["launch"], "ns"),
        flops_per_s=parse_quantity(table["rate"], "flop/s"),
        scores_per_s=table["scores_per_s"],
        overhead_keys=table["overhead_keys"],
        num_processors=_tables()["memory"][gpu]["num_processors"],
        memory_bytes_per_s=memory.bytes_per_s,
        is_extrapolated=table["is_extrapolated"],
    )


@lru_cache(maxsize=65536)
def matmul(gpu: str, dtype: str, m: int, n: int, k: int) -> Estimate:
    """Return the time of one product [m, k] x [k, n] in `dtype` on `gpu` alone.

    fp8 is the product itself: casts of its operands are passes of their own. Extrapolated where
    the curve is, and outside the sizes that were measured.

    >>> round(matmul("h100-sxm", "bf16", 8192, 8192, 8192).ns / 1e6, 1)
    1.4
    """
    curve = matmul_curve(gpu, dtype)
    is_outside = min(m, n, k) < curve.smallest_dim or 2.0 * m * n * k > curve.most_flops
    return Estimate(matmul_ns(curve, m, n, k), curve.is_extrapolated or is_outside)


@lru_cache(maxsize=65536)
def attention(
    gpu: str,
    kernel: str,
    direction: str,
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_size: int,
    causal: bool = True,
) -> Estimate:
    """Return the time of the attention core, `forward` or `backward`, in bf16 on `gpu` alone.

    `kernel` is a `profiles.stack.Attention`; each of `queries` positions looks at `keys`, of which
    a causal one skips half. A device without the kernel takes the nearest one that it has.

    >>> attention("h100-sxm", "flash3", "forward", batch=1, heads=16, kv_heads=16, queries=8192,
    ...           keys=8192, head_size=128).is_extrapolated
    False
    """
    curve = attention_curve(gpu, kernel, direction)
    if curve is None:
        return _unfused(gpu, direction, batch * heads, queries, keys, head_size)
    ns = fused_ns(
        curve,
        BACKWARD_FLOPS if direction == "backward" else 1.0,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_size=head_size,
        causal=causal,
    )
    is_outside = not MEASURED_HEADS[0] <= head_size <= MEASURED_HEADS[1]
    return Estimate(ns, curve.is_extrapolated or is_outside or queries < MEASURED_QUERIES)


def _unfused(
    gpu: str, direction: str, batch: int, queries: int, keys: int, head_size: int
) -> Estimate:
    """Return the time of attention as separate kernels: batched products, softmax, dropout.

    Every score is computed and passes through memory in 2 bytes, masked or not. Forward: the
    products q k and p v, the scaled and masked softmax (reads and writes: 4 bytes a score) and
    dropout (5, with its mask of one byte). Backward: four products, softmax (6), dropout (5).
    """
    curve = matmul_curve(gpu, "fp16")
    scores = batch * queries * keys
    outer = matmul_ns(curve, queries, keys, head_size, batch)
    inner = matmul_ns(curve, queries, head_size, keys, batch)
    if direction == "backward":
        products = outer + inner + 2 * matmul_ns(curve, keys, head_size, queries, batch)
        passes = memory_pass(gpu, 6 * scores), memory_pass(gpu, 5 * scores)
    else:
        products = outer + inner
        passes = memory_pass(gpu, 4 * scores), memory_pass(gpu, 5 * scores)
    return Estimate(products + sum(each.ns for each in passes), is_extrapolated=True)


@lru_cache(maxsize=65536)
def memory_pass(gpu: str, size_bytes: int) -> Estimate:
    """Return the time of one memory-bound kernel that reads and writes `size_bytes` in all.

    t = launch + size / rate

    >>> round(memory_pass("a100-sxm-80gb", 2_000_000_000).ns / 1e6, 1)
    1.1
    """
    curve = memory_curve(gpu)
    return Estimate(curve.launch_ns + 1e9 * size_bytes / curve.bytes_per_s, curve.is_extrapolated)
