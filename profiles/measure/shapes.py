"""Candidate shapes: where a kernel may be measured, of which a design chooses some.

On a GPU the layers of every LLaMA preset at every degree of tensor parallelism, and a lattice
around them; on a CPU a lattice over what a CPU can train. Shapes are those of `profiles.profile`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from profiles.lookup import REFERENCE_SHAPES
from profiles.model import ModelSpec
from profiles.presets import model_preset, model_presets
from profiles.surface import Shape

_TENSOR_PARALLEL = (1, 2, 4, 8, 16)
# RoPE's operands are heads of 64, eight at a position; other ops take as many for likeness.
_ELEMENT_STEP = 512

# For each family: elements read or written in a forward, by element of the largest operand, as
# PyTorch's eager kernels do; and elements that are kept at once, operands and results. A backward
# has twice both, for its two gradients. Exponentials count as if they were memory.
_TRAFFIC: Mapping[str, tuple[float, float]] = {
    "linear": (1.0, 1.0),
    "attention": (1.0, 3.0),
    "norm": (16.0, 9.0),
    "rope": (14.0, 8.0),
    "swiglu": (8.0, 6.0),
    "add": (3.0, 3.0),
    "embedding": (2.0, 2.0),
    "cross_entropy": (16.0, 8.0),
    "adamw": (8.0, 8.0),
    "clip": (4.0, 3.0),
    "copy": (2.0, 2.0),
    "cast": (3.0, 4.0),
    # Host and device meet on a bus that is some fifty times slower than the device's own memory.
    "to_host": (100.0, 2.0),
    "from_host": (100.0, 3.0),
}
# An attention computes about as fast as half of what a large product does.
_ATTENTION_SLOWNESS = 2.0
# Above this head size no fused kernel takes an attention.
_LARGEST_FUSED_HEAD = 256
_PART_OF_MEMORY = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds a shape: about how fast the device is, how long a call may take, its memory."""

    flop_per_s: float
    bytes_per_s: float
    longest_ns: int
    memory_bytes: int

    def allow(self, op: str, element_bytes: int, shape: Shape, variant: str = "") -> bool:
        """Return whether one call at `shape` is short enough, and its operands small enough."""
        moved_bytes = moved_elements(op, shape) * element_bytes
        slowness = _ATTENTION_SLOWNESS if op.startswith("attention_") else 1.0
        seconds = slowness * flop(op, shape) / self.flop_per_s + moved_bytes / self.bytes_per_s
        kept_bytes = working_bytes(op, element_bytes, shape, variant)
        return (
            1e9 * seconds <= self.longest_ns and kept_bytes * _PART_OF_MEMORY <= self.memory_bytes
        )


def flop(op: str, shape: Shape) -> float:
    """Return the flops of a product or an attention, and 0 of what memory bounds.

    An attention without a mask has 4 batch heads seq^2 head, and its backward 2.5 times that: five
    products instead of two. Source: Dao, "FlashAttention-2" (arXiv:2307.08691), section 4.1.
    """
    if op.startswith("linear_"):
        return 2.0 * math.prod(shape)
    if op.startswith("attention_"):
        batch, heads, _, seq, head = shape
        direction = 2.5 if op.endswith("_backward") else 1.0
        return direction * 4.0 * batch * heads * seq * seq * head
    return 0.0


def _elements(op: str, shape: Shape) -> int:
    """Return the elements of the largest operand; of products and attentions, of all operands."""
    if op.startswith("linear_"):
        m, n, k = shape
        return m * n + m * k + n * k
    if op.startswith("attention_"):
        batch, heads, kv_heads, seq, head = shape
        return batch * seq * head * (2 * heads + 2 * kv_heads)
    if op.startswith("embedding_"):
        rows, width, vocab = shape
        return width * (rows + vocab) if op.endswith("_backward") else width * rows
    return math.prod(shape)


def _direction(op: str) -> float:
    return 2.0 if op.endswith("_backward") else 1.0


def moved_elements(op: str, shape: Shape) -> float:
    """Return about how many elements a call reads and writes."""
    return _direction(op) * _TRAFFIC[_family(op)][0] * _elements(op, shape)


def working_bytes(op: str, element_bytes: int, shape: Shape, variant: str = "") -> int:
    """Return a bound on the memory of one set of operands, results, and what lies between.

    Attention's `math` keeps its scores, several times and in fp32; ops on bf16 whose sums are in
    fp32 keep as much as those on fp32.
    """
    wide_bytes = max(element_bytes, 4)
    if op.startswith("linear_"):
        # Products of fp8 come out in bf16.
        return _elements(op, shape) * max(element_bytes, 2)
    kept = _direction(op) * _TRAFFIC[_family(op)][1] * _elements(op, shape)
    if op.startswith("embedding_"):
        kept += math.prod(shape[1:])
    if op.startswith("attention_"):
        batch, heads, _, seq, head = shape
        kept *= heads / shape[2] if variant in ("math", "efficient") else 1.0
        kept += batch * heads * seq
        if variant == "math" or head > _LARGEST_FUSED_HEAD:
            kept += 6.0 * batch * heads * seq * seq
    return round(kept * wide_bytes)


def _family(op: str) -> str:
    family, _, direction = op.rpartition("_")
    return family if direction in ("forward", "backward", "dgrad", "wgrad") else op


def _sizes(low: int, high: int) -> tuple[int, ...]:
    """Return low, 1.5 low, 2 low, 3 low, ..., high: what lies between is between neighbours.

    >>> _sizes(64, 300)
    (64, 96, 128, 192, 256)
    """
    doublings = [low << i for i in range((high // low).bit_length())]
    return tuple(
        sorted({*doublings, *(3 * size // 2 for size in doublings if 3 * size // 2 <= high)})
    )


def anchors(op: str, device_kind: str) -> tuple[Shape, ...]:
    """Return the shapes of `op` that are measured whatever a design thinks of them.

    They are the reference kernel of `profiles.lookup`, and what is taken for the ceilings of the
    device: a large square product, a large copy.
    """
    on_cpu = device_kind == "cpu"
    if op == "linear_forward":
        square = 1024 if on_cpu else 8192
        return REFERENCE_SHAPES[device_kind], (square, square, square)
    return ((1 << (24 if on_cpu else 28),),) if op == "copy" else ()


def candidates(
    op: str, element_bytes: int, device_kind: str, limits: Limits, quick: bool, variant: str = ""
) -> tuple[Shape, ...]:
    """Return the shapes of `op` that are worth measuring and within `limits`, in order.

    Anchors are in whatever the limits of time are.
    """
    make = _cuda_shapes if device_kind == "cuda" else _cpu_shapes
    allowed = {
        shape for shape in make(op, quick) if limits.allow(op, element_bytes, shape, variant)
    }
    for shape in anchors(op, device_kind):
        kept_bytes = working_bytes(op, element_bytes, shape, variant)
        if kept_bytes * _PART_OF_MEMORY <= limits.memory_bytes:
            allowed.add(shape)
    return tuple(sorted(allowed))


def _cpu_shapes(op: str, quick: bool) -> Iterable[Shape]:
    """Return what a CPU can train: hidden 64 to 2048, 64 to 4096 tokens at a time."""
    rows = _sizes(64, 4096)
    if op.startswith("linear_"):
        inner = _sizes(64, 4096 if quick else 8192)
        return product(rows, (*inner, *(() if quick else (16384, 32768))), inner)
    if op.startswith("attention_"):
        return _attentions(
            ((heads, heads // share, head) for heads in (1, 2, 4, 8, 16)
             for share in (1, 2, 4) if heads % share == 0 for head in (32, 64, 128)),
            (1, 2, 4, 8, 16), _sizes(64, 1024 if quick else 4096),
        )  # fmt: skip
    if op.startswith("norm_"):
        return product(_sizes(64, 8192), _sizes(64, 4096))
    if op.startswith("embedding_"):
        return product(rows, _sizes(64, 2048), _sizes(256, 8192 if quick else 131072))
    if op.startswith("cross_entropy_"):
        return product(rows, _sizes(256, 16384 if quick else 131072))
    return ((size,) for size in _sizes(8 * _ELEMENT_STEP, 1 << (24 if quick else 26)))


def _cuda_shapes(op: str, quick: bool) -> Iterable[Shape]:
    """Return the shapes of LLaMA layers from 512 tokens at a time to 64 k, and a lattice."""
    rows = _sizes(512, 1 << 16) if quick else _sizes(64, 1 << 16)
    models = [spec for name in model_presets() if (spec := model_preset(name)).is_llama_like]
    if op.startswith("linear_"):
        lattice = product(_sizes(512, 16384), repeat=2)
        widths = {*lattice, *(pair for spec in models for pair in _linear_widths(spec))}
        return ((m, n, k) for m in rows for n, k in widths if min(n, k) >= 64)
    if op.startswith("attention_"):
        return _attentions(
            {heads for spec in models for heads in _local_heads(spec)},
            (1, 2, 4, 8, 16), _sizes(512, 1 << (14 if quick else 16)),
        )  # fmt: skip
    widths_of_models = {spec.hidden for spec in models if spec.hidden >= 1024}
    vocabularies = {spec.vocab // tp for spec in models for tp in _TENSOR_PARALLEL}
    if op.startswith("norm_"):
        return product(rows, {*_sizes(1024, 16384), *widths_of_models})
    if op.startswith("embedding_"):
        return product(rows, {*_sizes(1024, 16384), *widths_of_models}, vocabularies - {16, 32})
    if op.startswith("cross_entropy_"):
        return product(rows, {size for size in vocabularies if size >= 2000})
    return ((size,) for size in _sizes(1 << 14, 1 << (28 if quick else 30)))


def _linear_widths(spec: ModelSpec) -> Iterator[tuple[int, int]]:
    """Yield (n, k) of every linear of a model at every degree that divides it."""
    hidden = spec.hidden
    for tp in _TENSOR_PARALLEL:
        if spec.num_heads % tp == 0:
            q = spec.num_heads * spec.head_size // tp
            kv = max(spec.num_kv_heads // tp, 1) * spec.head_size
            yield from ((q, hidden), (kv, hidden), (hidden, q))
        if spec.ffn % (16 * tp) == 0:
            yield from ((spec.ffn // tp, hidden), (hidden, spec.ffn // tp))
        if spec.vocab % (16 * tp) == 0:
            yield spec.vocab // tp, hidden


def _local_heads(spec: ModelSpec) -> Iterator[tuple[int, int, int]]:
    """Yield (heads, kv heads, head) of one rank at every degree that divides the heads."""
    for tp in _TENSOR_PARALLEL:
        heads, kv_heads = spec.num_heads // tp, max(spec.num_kv_heads // tp, 1)
        if spec.num_heads % tp == 0 and heads % kv_heads == 0 and spec.head_size >= 64:
            yield heads, kv_heads, spec.head_size


def _attentions(
    heads: Iterable[tuple[int, int, int]], batches: Iterable[int], seqs: Iterable[int]
) -> Iterator[Shape]:
    for (num_heads, kv_heads, head), batch, seq in product(heads, batches, seqs):
        yield batch, num_heads, kv_heads, seq, head
