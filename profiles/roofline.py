"""What kernels and collectives need at the least, and the ceilings that nothing can pass.

Time is at least flops over the peak rate of arithmetic, and bytes over the rate of memory. Source:
Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52 (2009).
"""

import math
from dataclasses import dataclass

from profiles.cluster import GpuSpec
from profiles.lookup import ring_traffic
from profiles.machine import known_gpu
from profiles.presets import cluster_preset, cluster_presets
from profiles.profile import CollectiveSample, DeviceFacts, KernelSample

ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}

BEYOND_CACHES_BYTES = 1_000_000_000
"""Data of this size streams from memory: four times the largest cache of a known GPU, 256 MB.

Source: AMD Instinct MI300X data sheet, December 2023 (Infinity Cache).
"""

# Flops an element, an exponential or a root counted as one; elements read and written at the least.
_ELEMENTWISE = {
    "norm_forward": (4, 2),
    "norm_backward": (8, 3),
    "rope_forward": (3, 2),
    "rope_backward": (3, 2),
    "swiglu_forward": (5, 3),
    "swiglu_backward": (9, 5),
    "add_forward": (1, 3),
    "add_backward": (1, 3),
    "cross_entropy_forward": (4, 1),
    "cross_entropy_backward": (3, 2),
    "adamw": (13, 7),
    "clip": (3, 3),
    "copy": (0, 2),
}
# Copies to and from the host pass another link than the memory's; the reference is a product that
# is there already.
_APART = ("to_host", "from_host", "reference")


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one call needs at the least: flops, and bytes read from and written to memory once."""

    flops: float
    size_bytes: float

    @property
    def flops_per_byte(self) -> float:
        """The arithmetic intensity; 0 for a copy."""
        return self.flops / self.size_bytes if self.size_bytes else 0.0


def kernel_need(op: str, dtype: str, shape: tuple[int, ...]) -> Need | None:
    """Return what one call of `op` needs at the least, None for an op or dtype that has no count.

    linear: 2 m n k flops over its three matrices. attention forward: two products of 2 head flops
    for each of batch * heads * seq (seq + 1) / 2 pairs that a causal mask leaves, over q, k, v and
    the output; backward: 2.5 times the flops, over these and their gradients. Others: a few flops
    an element, over each operand once; look-ups and copies none. Whole layers and copies over the
    bus have no count.

    >>> kernel_need("linear_forward", "bf16", (2, 3, 4))
    Need(flops=48.0, size_bytes=52.0)
    """
    element = ELEMENT_BYTES.get(dtype)
    if element is None or op.startswith("layer_") or op in _APART:
        return None
    if op.startswith("linear_"):
        m, n, k = shape
        result = {"linear_forward": m * n, "linear_dgrad": m * k}.get(op, n * k)
        # The result of an 8-bit product has 16 bits.
        operands = m * n + m * k + n * k - result
        return Need(flops=2.0 * m * n * k,
                    size_bytes=float(operands * element + result * max(element, 2)))  # fmt: skip
    if op.startswith("attention_"):
        batch, heads, kv_heads, seq, head = shape
        flops = 2.0 * batch * heads * seq * (seq + 1) * head
        moved = 2.0 * batch * seq * head * (heads + kv_heads) * element
        if op == "attention_backward":
            return Need(flops=2.5 * flops, size_bytes=2 * moved)
        return Need(flops=flops, size_bytes=moved)
    return _streaming_need(op, element, shape)


def _streaming_need(op: str, element: int, shape: tuple[int, ...]) -> Need | None:
    if op == "embedding_forward":
        rows, width, vocab = shape
        # What is looked up twice may be read once.
        return Need(flops=0.0, size_bytes=float((rows + min(rows, vocab)) * width * element))
    if op == "embedding_backward":
        rows, width, vocab = shape
        return Need(flops=0.0, size_bytes=float((rows + vocab) * width * element))
    count = float(math.prod(shape))
    if op == "cast":
        # From fp32; to fp32 from bf16.
        return Need(flops=0.0, size_bytes=count * (element + (2 if element == 4 else 4)))
    if op not in _ELEMENTWISE:
        return None
    flops, moved = _ELEMENTWISE[op]
    return Need(flops=flops * count, size_bytes=moved * count * element)


def kernel_rates(sample: KernelSample) -> tuple[float, float]:
    """Return the flops and the bytes a second of `sample`, by its median; 0 where not counted."""
    need = kernel_need(sample.op, sample.dtype, sample.shape)
    if need is None:
        return 0.0, 0.0
    return 1e9 * need.flops / sample.p50_ns, 1e9 * need.size_bytes / sample.p50_ns


def bus_bytes_per_s(sample: CollectiveSample) -> float:
    """Return the bandwidth of the link that a ring would need for `sample`, by its median.

    rate = traffic * size / time, with `profiles.lookup.ring_traffic`. Source: nccl-tests,
    doc/PERFORMANCE.md (bus bandwidth); an exchange counts both ways.
    """
    traffic = ring_traffic(sample.kind, sample.group_size)
    return 1e9 * traffic * sample.size_bytes / sample.p50_ns


def least_traffic(kind: str, group_size: int) -> float:
    """Return how often the buffer passes one way of a rank's link at the least.

    A switch that reduces halves the traffic of an all-reduce; an exchange takes both ways at once.

    >>> least_traffic("all_reduce", 8), least_traffic("all_gather", 4)
    (1.0, 0.75)
    """
    return min(1.0, ring_traffic(kind, group_size))


def data_sheet(device: DeviceFacts) -> GpuSpec | None:
    """Return what the maker says of the GPU that was measured; None for a CPU or an unknown GPU."""
    return known_gpu(device.name) if device.kind == "cuda" else None


def link_bytes_per_s(device: DeviceFacts) -> float:
    """Return the rate of the link inside a node of this GPU, one way; 0 where it is not known."""
    sheet = data_sheet(device)
    if sheet is None:
        return 0.0
    pools = [cluster_preset(name).pools[0] for name in cluster_presets()]
    return max(
        (pool.intra_node.bytes_per_s for pool in pools if pool.gpu.name == sheet.name), default=0.0
    )
