"""`StackSpec`: the software that runs a layout, as far as it changes time or memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from profiles.workload import DTYPE_BYTES, DType

Attention = Literal["unfused", "flash2", "flash3"]
Fusion = Literal["eager", "fused", "compiled"]
Sharding = Literal["none", "zero1", "zero2", "zero3"]
Partition = Literal["even", "slots", "cost"]
Recompute = Literal["none", "selective", "full"]
Selective = Literal["scores", "operators"]
TensorOverlap = Literal["none", "backward", "all"]
MemoryLog = Literal["device", "reserved", "allocated", "update"]
GradientDType = Literal["fp32", "bf16", "fp16"]
MasterWeights = Literal["none", "fp32"]
MomentsDType = Literal["fp32", "bf16"]


class Scalar(NamedTuple):
    """One calibrated number of a stack: its value and the band that the data leaves open."""

    value: float
    low: float
    high: float


class Meaning(NamedTuple):
    """What a scalar stands for, its neutral value, and the bounds outside which it is absurd."""

    text: str
    unit: str
    neutral: float
    at_least: float
    at_most: float


SCALARS: Mapping[str, Meaning] = {
    "matmul": Meaning("matrix products in training over the same ones alone", "", 1.0, 0.7, 2.0),
    "attention": Meaning("attention in training over the kernel alone", "", 1.0, 0.5, 3.0),
    "memory": Meaning("memory-bound kernels over the bytes they must move", "", 1.0, 0.5, 4.0),
    "launch": Meaning("host time of one call", "us", 15.0, 1.0, 60.0),
    "intra": Meaning("collectives inside a node over the same ones alone", "", 1.0, 0.5, 4.0),
    "inter": Meaning("collectives between nodes over the same ones alone", "", 1.0, 0.5, 6.0),
    "exposed": Meaning("part of overlapped communication that is not hidden", "", 0.1, 0.0, 1.0),
    "step": Meaning("host time of one optimizer step", "ms", 5.0, 0.0, 500.0),
    "message": Meaning("host time of one pipeline message", "us", 100.0, 1.0, 1e6),
    "crossing": Meaning(
        "host time of a tensor-parallel collective, per member, where the host moves the network's",
        "us", 1.0, 0.0, 1e3,
    ),
    "spanning": Meaning(
        "host time of a tensor-parallel collective over nodes, per member", "us", 1.0, 0.0, 1e3
    ),
}  # fmt: skip
"""The scalars of all stacks, of which each calibrates at most eight (docs/reference.md)."""

USUAL_SCALARS = ("matmul", "attention", "memory", "launch", "intra", "inter", "exposed", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSpec:
    """What the training software fuses, overlaps and keeps; sizes in bytes.

    `overlaps_gradients` says whether the gradient reduction hides behind the last backward, and
    `overlaps_parameters` whether the gathering of sharded parameters hides behind the computation.
    `tensor_overlap` says which tensor-parallel collectives hide behind matrix products: none, those
    of the backward (each behind the product of the weight gradient), or all. On CPU ranks nothing
    is hidden: the collective is computed by the very core that runs the backward.

    `fuses_norms` says whether a norm is one kernel; composed of several, it keeps the normalised
    input for its backward. `fuses_loss` says whether the loss turns the logits into their gradient
    in place; else it makes them again in fp32. `fusion` says of all memory-bound work between the
    matrix products whether it is one kernel an operator, hand-fused, or what a compiler makes. With
    `uses_cuda_graphs` the host launches a layer at once.

    A parameter takes its compute dtype, and of each of its owners `master_bytes` for a copy in full
    precision and `moment_bytes` for the optimizer's moments; its gradient is kept in
    `gradient_bytes` and reduced in `reduction_bytes`. 0 stands for the compute dtype's own size (in
    `moment_bytes`: of both moments). With `offloads_optimizer` master copy and moments live in the
    memory of the host, whose cores do the update.

    `uses_flat_buffers` says whether gradients lie in the buffers that are reduced and parameters in
    those that are gathered; without them the buckets of the gradients are a second copy of them,
    and sharded parameters are gathered into one. `allocator_slack` is what the caching allocator
    reserves beyond what is in use at the peak, as part of it. `logs_memory` says what the stack
    itself logs as its peak (`PeakMemory.logged`).

    `partition` is the rule by which layers are dealt to pipeline stages (`planner.partition`).
    `sharding`, `recompute` and `interleaves` (several stages a pipeline rank) are what it does
    unless told otherwise; so is `shards_sequence`, sequence parallelism where there is tensor
    parallelism. `pads_vocabulary` says whether each rank's part of it is always a multiple of 128
    rows, or only where the ranks could not share it else. `selective` says what selective
    recomputation makes again: the attention scores (Megatron), or all operators but the attention
    and every second product (torchtitan).

    `scalars` holds what `layline calibrate` found, by the names in `SCALARS`: of those that the
    stack `calibrates`, at most eight; the others have the value that all stacks share.
    """

    name: str
    overlaps_gradients: bool
    gradient_bucket_bytes: int
    fuses_norms: bool
    source: str
    date: str
    overlaps_parameters: bool = False
    tensor_overlap: TensorOverlap = "none"
    fusion: Fusion = "eager"
    attention: Attention = "flash2"
    fuses_loss: bool = False
    uses_cuda_graphs: bool = False
    gradient_bytes: int = 0
    reduction_bytes: int = 0
    master_bytes: int = 0
    moment_bytes: int = 0
    offloads_optimizer: bool = False
    uses_flat_buffers: bool = True
    allocator_slack: float = 0.0
    logs_memory: MemoryLog = "device"
    sharding: Sharding = "none"
    recompute: Recompute = "none"
    selective: Selective = "scores"
    partition: Partition = "even"
    interleaves: bool = False
    shards_sequence: bool = False
    pads_vocabulary: bool = False
    calibrates: tuple[str, ...] = USUAL_SCALARS
    scalars: Mapping[str, Scalar] = field(default_factory=dict)

    def scalar(self, name: str) -> float:
        """Return the value of scalar `name`, neutral where it was not calibrated.

        >>> StackSpec(name="s", overlaps_gradients=True, gradient_bucket_bytes=1, fuses_norms=True,
        ...           source="made up", date="2026-01-01").scalar("matmul")
        1.0
        """
        return self.scalars[name].value if name in self.scalars else SCALARS[name].neutral

    @property
    def is_changed(self) -> bool:
        """Whether it is another than its preset, to which nothing was calibrated then."""
        return self.name.endswith(CHANGED)

    def gradient_dtype(self, dtype: DType) -> GradientDType:
        """Return what gradients are kept in where the compute dtype is `dtype`."""
        if (self.gradient_bytes or DTYPE_BYTES[dtype]) == DTYPE_BYTES["fp32"]:
            return "fp32"
        return "fp16" if dtype == "fp16" else "bf16"


CHANGED = "-changed"


def changed_stack(
    stack: StackSpec,
    dtype: DType,
    *,
    gradient_dtype: GradientDType | None = None,
    reduction_dtype: GradientDType | None = None,
    master_weights: MasterWeights | None = None,
    moments_dtype: MomentsDType | None = None,
    optimizer_offload: bool | None = None,
) -> StackSpec:
    """Return `stack` with single facts changed; None leaves one as it is.

    Where the compute dtype is `dtype` and nothing is in fact another, it is `stack` itself. What
    gradients are kept in they are also reduced in, unless `reduction_dtype` says otherwise.

    >>> from profiles.presets import stack_preset
    >>> halved = changed_stack(stack_preset("torchtitan"), "bf16", gradient_dtype="bf16")
    >>> halved.name, halved.gradient_bytes, halved.reduction_bytes, halved.master_bytes
    ('torchtitan-changed', 2, 2, 4)
    >>> changed_stack(halved, "bf16", gradient_dtype="bf16") is halved
    True
    """
    element = DTYPE_BYTES[dtype]
    if gradient_dtype == stack.gradient_dtype(dtype):
        gradient_dtype = None
    sizes: dict[str, int] = {}
    if gradient_dtype is not None:
        sizes["gradient_bytes"] = sizes["reduction_bytes"] = DTYPE_BYTES[gradient_dtype]
    if reduction_dtype is not None:
        sizes["reduction_bytes"] = DTYPE_BYTES[reduction_dtype]
    if master_weights is not None:
        sizes["master_bytes"] = 4 if master_weights == "fp32" else 0
    if moments_dtype is not None:
        sizes["moment_bytes"] = 2 * DTYPE_BYTES[moments_dtype]
    own = {"gradient_bytes": element, "reduction_bytes": element, "moment_bytes": 2 * element}
    found: dict[str, Any] = {
        name: size
        for name, size in sizes.items()
        if size != (getattr(stack, name) or own.get(name, 0))
    }
    offloads = stack.offloads_optimizer if optimizer_offload is None else optimizer_offload
    if not found and offloads == stack.offloads_optimizer:
        return stack
    return replace(
        stack,
        name=stack.name if stack.is_changed else stack.name + CHANGED,
        source=stack.source if stack.is_changed else f"{stack.source}; changed in the job",
        offloads_optimizer=offloads,
        **found,
    )
