"""Kernel times of accelerators that are not at hand, from published measurements."""

from functools import lru_cache
from typing import NamedTuple

from profiles.presets import gpu_preset


class Estimate(NamedTuple):
    """A time in ns, and whether no measurement of this very device stands behind it."""

    ns: float
    is_extrapolated: bool = False


@lru_cache(maxsize=65536)
def matmul(gpu: str, dtype: str, m: int, n: int, k: int) -> Estimate:
    """Return the time of one product [m, k] x [k, n] in `dtype` on `gpu` alone."""
    spec = gpu_preset(gpu)
    flops = 2.0 * m * n * k
    bytes_ = 2.0 * (m * n + n * k + m * k)
    peak = spec.peak_flops_per_s.get(dtype, spec.peak_flops_per_s["fp16"])
    return Estimate(
        4000 + 1e9 * max(flops / (0.75 * peak), bytes_ / (0.8 * spec.memory_bytes_per_s))
    )


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
    a causal one skips half.
    """
    spec = gpu_preset(gpu)
    flops = (
        (2.5 if direction == "backward" else 1.0) * 4.0 * batch * heads * queries * keys * head_size
    )
    if causal:
        flops /= 2
    rate = 0.5 if kernel != "unfused" else 0.15
    return Estimate(4000 + 1e9 * flops / (rate * spec.peak_flops_per_s["fp16"]))


@lru_cache(maxsize=65536)
def memory_pass(gpu: str, size_bytes: int) -> Estimate:
    """Return the time of one memory-bound kernel that reads and writes `size_bytes` in all."""
    return Estimate(2500 + 1e9 * size_bytes / (0.85 * gpu_preset(gpu).memory_bytes_per_s))
