"""Which shapes and sizes are measured: full products, so that a look-up can interpolate.

Shapes are those of `profiles.profile`. Element counts are multiples of 512, as RoPE's buffers are.
"""

from itertools import product

from profiles.measure.timing import Budget

Shape = tuple[int, ...]

_LINEAR = ("linear_forward", "linear_dgrad", "linear_wgrad")
_ATTENTION = ("attention_forward", "attention_backward")
_NORM = ("norm_forward", "norm_backward")
_ELEMENTWISE = ("rope_forward", "rope_backward", "swiglu_forward", "swiglu_backward")
_ADD = ("add_forward", "add_backward")
_EMBEDDING = ("embedding_forward", "embedding_backward")
_CROSS_ENTROPY = ("cross_entropy_forward", "cross_entropy_backward")
_FAMILIES = {
    "linear": _LINEAR,
    "attention": _ATTENTION,
    "norm": _NORM,
    "elementwise": _ELEMENTWISE,
    "add": _ADD,
    "embedding": _EMBEDDING,
    "cross_entropy": _CROSS_ENTROPY,
    "adamw": ("adamw",),
}


def _doublings(first: int, last: int) -> Shape:
    """Return 2^first, ..., 2^last: sweeps of one axis are cheap, and caches make them bend."""
    return tuple(1 << exponent for exponent in range(first, last + 1))


# One row of axes per family of ops; the reference kernel of `profiles.lookup` is in each.
_AXES: dict[tuple[str, bool], dict[str, tuple[tuple[int, ...], ...]]] = {
    ("cpu", True): {
        "linear": ((128, 512, 2048), (64, 256, 512, 1024), (64, 256, 512, 1024)),
        "attention": ((1, 8), (2, 8), (64, 128, 256, 512), (32, 64)),
        "norm": ((128, 256, 512, 1024, 2048), (128, 256, 512, 1024)),
        "elementwise": (_doublings(12, 21),),
        "add": (_doublings(12, 23),),
        "embedding": ((256, 1024, 2048), (128, 256, 512), (64, 8192)),
        "cross_entropy": ((128, 512, 2048), (128, 256, 512, 4096)),
        "adamw": (_doublings(12, 23),),
    },
    ("cpu", False): {
        "linear": (
            (64, 128, 256, 512, 1024, 2048),
            (64, 128, 256, 384, 512, 768, 1024, 2048),
            (64, 128, 256, 384, 512, 768, 1024, 2048),
        ),
        "attention": ((1, 8), (2, 8), (64, 128, 256, 512, 1024), (32, 64, 128)),
        "norm": ((64, 256, 1024, 2048, 4096), (64, 128, 256, 512, 1024, 2048)),
        "elementwise": (_doublings(12, 23),),
        "add": (_doublings(12, 25),),
        "embedding": ((64, 256, 1024, 4096), (64, 256, 1024), (256, 4096, 32768)),
        "cross_entropy": ((64, 256, 1024, 2048), (128, 256, 512, 2048, 8192, 32768)),
        "adamw": (_doublings(12, 25),),
    },
    ("cuda", True): {
        "linear": ((512, 4096, 16384), (1024, 4096, 16384), (1024, 4096, 16384)),
        "attention": ((1, 4), (8, 32), (1024, 4096), (64, 128)),
        "norm": ((512, 4096, 16384), (1024, 4096, 16384)),
        "elementwise": (_doublings(14, 28),),
        "add": (_doublings(14, 28),),
        "embedding": ((512, 4096, 16384), (1024, 4096), (32768, 131072)),
        "cross_entropy": ((512, 4096, 16384), (8192, 32768, 131072)),
        "adamw": (_doublings(14, 28),),
    },
    ("cuda", False): {
        "linear": (
            (64, 256, 1024, 4096, 16384),
            (512, 1024, 2048, 4096, 8192, 16384),
            (512, 1024, 2048, 4096, 8192, 16384),
        ),
        "attention": ((1, 4), (2, 8, 32), (512, 1024, 2048, 4096, 8192), (64, 128)),
        "norm": ((64, 256, 1024, 4096, 16384), (512, 1024, 2048, 4096, 8192, 16384)),
        "elementwise": (_doublings(12, 29),),
        "add": (_doublings(12, 29),),
        "embedding": ((64, 1024, 16384), (512, 2048, 8192), (8192, 32768, 131072)),
        "cross_entropy": ((64, 256, 1024, 4096, 16384), (8192, 32768, 65536, 131072)),
        "adamw": (_doublings(12, 29),),
    },
}


_LAYERS: dict[str, tuple[Shape, ...]] = {
    "cpu": ((1, 256, 256, 8, 32, 768), (4, 256, 256, 8, 32, 768)),
    "cuda": ((1, 4096, 4096, 32, 128, 11008), (4, 4096, 4096, 32, 128, 11008)),
}


def layer_shapes(device: str) -> tuple[Shape, ...]:
    """Return the whole layers to measure, (batch, seq, hidden, heads, head, ffn)."""
    return _LAYERS[device]


def kernel_shapes(device: str, quick: bool) -> dict[str, tuple[Shape, ...]]:
    """Return the shapes of every op to measure on `device` (cpu or cuda), by op.

    >>> kernel_shapes("cpu", True)["adamw"][0]
    (4096,)
    """
    return {
        op: tuple(product(*axes))
        for family, axes in _AXES[device, quick].items()
        for op in _FAMILIES[family]
    }


def dtypes(device: str, quick: bool) -> tuple[str, ...]:
    """Return the dtypes to measure: both, but fp32 alone on a CPU in a hurry."""
    return ("fp32",) if device == "cpu" and quick else ("fp32", "bf16")


def collective_sizes(quick: bool) -> tuple[int, ...]:
    """Return the buffer sizes in bytes: 1 KiB to 32 MiB by 4 and 8, or to 64 MiB by 2."""
    if quick:
        # 32 MiB bounds a gradient bucket of 25 MiB, the default of PyTorch's DDP.
        return (*(1 << i for i in range(10, 23, 2)), 1 << 25)
    return tuple(1 << i for i in range(10, 27))


def kernel_budget(quick: bool) -> Budget:
    """Return the time for one pass over one kernel at one shape."""
    if quick:
        return Budget(time_ns=5_000_000, min_samples=2, max_samples=17)
    return Budget(time_ns=12_000_000, min_samples=2, max_samples=17)


def collective_budget(quick: bool) -> Budget:
    """Return the time for one pass over one collective at one size."""
    time_ns = 12_000_000 if quick else 50_000_000
    return Budget(time_ns=time_ns, min_samples=2, max_samples=17)


def layer_budget(quick: bool) -> Budget:
    """Return the time for one pass over one whole layer."""
    return Budget(time_ns=600_000_000 if quick else 1_500_000_000, min_samples=3, max_samples=40)
