"""`Profile`: what was measured on one machine, and the costs read out of it.

Kernel shapes, by op (all sizes are those of one rank):

=====================  =============================  =========================================
op                     shape                          meaning
=====================  =============================  =========================================
linear_forward         (m, n, k)                      y[m, n] = x[m, k] w[n, k]^T
linear_dgrad           (m, n, k)                      dx[m, k] = dy[m, n] w[n, k]
linear_wgrad           (m, n, k)                      dw[n, k] = dy[m, n]^T x[m, k]
attention_forward      (batch, heads, seq, head)      causal attention, KV heads shared or not
attention_backward     (batch, heads, seq, head)      its backward
norm_*                 (rows, width)                  RMSNorm; `*` is forward or backward
rope_*                 (elements,)                    rotary embedding of that many elements
swiglu_*               (elements,)                    silu(gate) * up, elements of one operand
add_*                  (elements,)                    residual sum; backward sums two gradients
embedding_*            (rows, width, vocab)           look-up; backward makes a dense gradient
cross_entropy_*        (rows, vocab)                  mean cross-entropy in fp32
layer_*                (batch, seq, hidden,           a whole layer with equal heads: the witness of
                       heads, head, ffn)              what its kernels cost in a row
adamw                  (elements,)                    one fused AdamW update of that many weights
=====================  =============================  =========================================

Collective kinds: `all_reduce`, `all_gather`, `reduce_scatter`, `send_recv`; `size_bytes` is the
full buffer (what every rank holds after an all-gather); `send_recv` has a group of 2 and is the
one-way time of a message, on a CPU while the sender computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

PROFILE_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSample:
    """Time quantiles of one kernel at one shape, in ns, over `num_samples` timed calls."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    p10_ns: int
    p50_ns: int
    p90_ns: int
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveSample:
    """Time quantiles of one collective at one size, in ns, as seen by the slowest member.

    All disjoint groups of `group_size` ran at once, as they do in training.
    """

    kind: str
    group_size: int
    size_bytes: int
    p10_ns: int
    p50_ns: int
    p90_ns: int
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """The machine that was measured; `kind` is `cpu` or `cuda`, `backend` `gloo` or `nccl`."""

    kind: str
    name: str
    backend: str
    num_ranks: int
    memory_bytes: int
    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Measured kernels, collectives and host costs of one machine.

    `host_ns` holds costs of the software itself, in ns a call:

    dtensor_linear    what DTensor adds to one tensor-parallel linear, forward plus backward,
                      without the all-reduces themselves
    pipeline_action   what the pipeline runtime adds to one forward or backward of a rank; it posts
                      and awaits the messages, but their time on the way (`send_recv`) is not in it
    step              `zero_grad` and one fused AdamW step over 50 tensors, without their kernels

    `context_bytes` is the resident memory of a rank that has done nothing yet. `scales` holds the
    factors that `layline compare --recalibrate` found, by cost kind; 1.0 where absent.
    """

    schema_version: int
    device: DeviceFacts
    kernels: tuple[KernelSample, ...]
    collectives: tuple[CollectiveSample, ...]
    host_ns: Mapping[str, int]
    context_bytes: int
    versions: Mapping[str, str]
    measured_at: str
    scales: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A duration with its band, in ns; `is_extrapolated` when it left the measured range."""

    p10_ns: int
    p50_ns: int
    p90_ns: int
    is_extrapolated: bool = False
