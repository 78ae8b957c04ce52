"""The buckets in which the executor sums a stage's gradients over the data-parallel axis."""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from planner.kernels import StageShape


def parameters_backward(
    shape: StageShape, num_layers: int, *, is_first: bool, is_last: bool
) -> Iterator[int]:
    """Yield how many elements each parameter of a stage has, as backward reaches them."""
    table, norm = shape.vocab * shape.model.hidden, shape.model.hidden
    if is_last:
        if not shape.model.tied_embeddings:
            yield table
        yield norm
    q, k, v, o, gate, up, down = (n * k for _, n, k in shape.layer_linears)
    for _ in range(num_layers):
        yield from (down, up, gate, norm, o, v, k, q, norm)
    if is_first:
        yield table


@lru_cache(maxsize=4096)
def bucket_counts(
    shape: StageShape,
    num_layers: int,
    *,
    is_first: bool,
    is_last: bool,
    element_bytes: int,
    closing_bytes: int,
) -> tuple[tuple[int, int], ...]:
    """Return the sizes in bytes of a stage's buckets, ascending, each with how many there are.

    Parameters go into a bucket one after another, in the order in which backward reaches them. It
    closes when it holds `closing_bytes` or more: a matrix that is larger is not cut, and only the
    last bucket may be smaller.

    >>> from profiles.presets import model_preset
    >>> shape = StageShape(model=model_preset("llama-3-8b"), tp=1, micro_batch=1, seq_len=4096)
    >>> bucket_counts(shape, 2, is_first=False, is_last=False, element_bytes=2,
    ...               closing_bytes=25 << 20)
    ((8192, 1), (33562624, 2), (50331648, 2), (117440512, 5), (117448704, 1))
    """
    counts, held_bytes = Counter[int](), 0
    for elements in parameters_backward(shape, num_layers, is_first=is_first, is_last=is_last):
        held_bytes += elements * element_bytes
        if held_bytes >= closing_bytes:
            counts[held_bytes] += 1
            held_bytes = 0
    if held_bytes:
        counts[held_bytes] += 1
    return tuple(sorted(counts.items()))
