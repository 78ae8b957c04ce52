"""`Profile`: what was measured on one machine, and how sure each number is.

Kernel shapes, by op (all sizes are those of one rank):

=====================  =================================  ====================================
op                     shape                              meaning
=====================  =================================  ====================================
linear_forward         (m, n, k)                          y[m, n] = x[m, k] w[n, k]^T
linear_dgrad           (m, n, k)                          dx[m, k] = dy[m, n] w[n, k]
linear_wgrad           (m, n, k)                          dw[n, k] = dy[m, n]^T x[m, k]
attention_forward      (batch, heads, kv heads, seq,      causal attention
                       head)
attention_backward     (as forward)                       its backward
norm_*                 (rows, width)                      RMSNorm; `*` is forward or backward
rope_*                 (elements,)                        rotary embedding of that many elements
swiglu_*               (elements,)                        silu(gate) * up, elements of one operand
add_*                  (elements,)                        residual sum; backward sums two gradients
embedding_*            (rows, width, vocab)               look-up; backward makes a dense gradient
cross_entropy_*        (rows, vocab)                      mean cross-entropy in fp32
layer_*                (batch, seq, hidden, heads,        a whole layer with equal heads: the
                       head, ffn)                         witness of what its kernels cost in a row
reference              (m, n, k)                          what runs repeat, to tell how fast the
                                                          machine is then
adamw                  (elements,)                        one AdamW update of that many weights
clip                   (elements,)                        norm of a gradient, and its scaling
copy                   (elements,)                        copy on the device
cast                   (elements,)                        from fp32 to the dtype; for fp32 from bf16
to_host, from_host     (elements,)                        copies between a GPU and pinned memory
=====================  =================================  ====================================

A `variant` is how an op was made: empty is PyTorch's own choice, which is what the executor runs;
`flash`, `cudnn`, `efficient` and `math` name the kernel of an attention, `compiled` what
`torch.compile` makes of a memory-bound op, `foreach` the optimizer without its fused kernel.

Collective kinds: `all_reduce`, `all_reduce_copy` (into a new tensor, as DTensor does it),
`all_gather`, `reduce_scatter`, `all_to_all`, `broadcast`, `send_recv`, `exchange`; `size_bytes` is
the full buffer (what every rank holds after an all-gather). Members of a group are `stride` ranks
apart. `send_recv` has a group of 2 and is the one-way time of a message, on a CPU while the sender
computes; `exchange` is two ranks that send and receive at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from profiles.fabric import Fabric

PROFILE_SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSample:
    """Time quantiles of one kernel at one shape, in ns, over `num_samples` timed calls.

    `medians_ns` holds the median of each pass; passes run in processes of their own, minutes apart.
    `p50_ns` is their median. `band` is a share of it: measured again on this machine, the median is
    within `p50_ns * (1 +- band)` in 95 of 100 cases. `num_outliers` calls took over twice the
    median of their pass; they are kept, and in the quantiles.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    variant: str = ""
    p10_ns: int
    p50_ns: int
    p90_ns: int
    num_samples: int
    num_outliers: int = 0
    medians_ns: tuple[int, ...] = ()
    band: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, tuple[int, ...]]:
        """What was timed: two samples of one key are of the same thing."""
        return self.op, self.dtype, self.variant, self.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveSample:
    """Time quantiles of one collective at one size, in ns, as seen by the slowest member.

    All disjoint groups of `group_size` ranks, `stride` apart, ran at once, as they do in training.
    The other fields are those of a `KernelSample`.
    """

    kind: str
    group_size: int
    stride: int = 1
    size_bytes: int
    p10_ns: int
    p50_ns: int
    p90_ns: int
    num_samples: int
    num_outliers: int = 0
    medians_ns: tuple[int, ...] = ()
    band: float = 0.0

    @property
    def key(self) -> tuple[str, int, int, int]:
        """What was timed: two samples of one key are of the same thing."""
        return self.kind, self.group_size, self.stride, self.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """How a kernel and a collective slow each other down while both run.

    `compute_slowdown` is the time of the kernel while the collective runs over the time of the
    kernel alone; `communication_slowdown` is the same for the collective. Both are medians over
    passes, and may be below 1 by noise.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    group_size: int
    size_bytes: int
    compute_slowdown: float
    communication_slowdown: float

    @property
    def key(self) -> tuple[str, str, tuple[int, ...], str, int, int]:
        """What was timed: two samples of one key are of the same thing."""
        return self.op, self.dtype, self.shape, self.kind, self.group_size, self.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """The machine that was measured; `kind` is `cpu` or `cuda`, `backend` `gloo` or `nccl`.

    `ranks_per_node` is 0 where all ranks are on one node. `capability` is the GPU's compute
    capability ("9.0"), empty for a CPU.
    """

    kind: str
    name: str
    backend: str
    num_ranks: int
    memory_bytes: int
    driver: str
    ranks_per_node: int = 0
    capability: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """The device's clock in MHz as it was seen while measuring: least, median, most.

    All 0 where nothing tells it. `drift` is the median over kernels of last over first pass.
    """

    least_mhz: int = 0
    median_mhz: int = 0
    most_mhz: int = 0
    drift: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Measured kernels, collectives and host costs of one machine.

    `host_ns` holds costs of the software itself, in ns a call:

    launch            what the host takes to launch one kernel of many in a row
    launch_gap        time from kernel to kernel on the device, of kernels that do nothing
    dtensor_linear    what DTensor adds to one tensor-parallel linear, forward plus backward,
                      without the all-reduces themselves
    pipeline_action   what the pipeline runtime adds to one forward or backward of a rank; it posts
                      and awaits the messages, but their time on the way (`send_recv`) is not in it
    step              `zero_grad` and one fused AdamW step over 50 tensors, without their kernels

    `context_bytes` is the resident memory of a rank that has done nothing yet. `scales` holds the
    factors that `layline compare --recalibrate` found, by cost kind; 1.0 where absent. `missing`
    says what was asked for and is not here, and why: a line each.
    """

    schema_version: int
    device: DeviceFacts
    kernels: tuple[KernelSample, ...]
    collectives: tuple[CollectiveSample, ...]
    interference: tuple[Interference, ...] = ()
    host_ns: Mapping[str, int]
    context_bytes: int
    versions: Mapping[str, str]
    measured_at: str
    scales: Mapping[str, float]
    clocks: Clocks = field(default_factory=Clocks)
    fabric: Fabric = field(default_factory=Fabric)
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A duration with its band, in ns; `is_extrapolated` when it left the measured range."""

    p10_ns: int
    p50_ns: int
    p90_ns: int
    is_extrapolated: bool = False
