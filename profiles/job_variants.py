"""From `[stack]` and `[search]` to a stack with single facts changed, and the choices beside it."""

from typing import Any

from profiles.choices import Choices
from profiles.cluster import ClusterSpec
from profiles.job_resolve import Found
from profiles.job_schema import SearchTable, StackTable, as_mapping, shown
from profiles.presets import stack_preset
from profiles.stack import StackSpec, changed_stack
from profiles.workload import DTYPE_BYTES, Workload


def resolve_stack(table: StackTable, data: dict[str, Any], found: Found) -> StackSpec | None:
    """Return the stack of `[stack]`, None where `found` got a problem.

    Without a preset it is our own executor, on the backend of the cluster of the job in `data`.
    """
    cluster = as_mapping(data.get("cluster"))
    is_local = cluster.get("preset") == "local"
    is_cpu = is_local and cluster.get("device", "cpu") == "cpu"
    changes: dict[str, Any] = table.given()
    name = changes.pop("preset", None) or ("layline-gloo" if is_cpu else "layline-nccl")
    if changes and (is_local or data.get("profile", "auto") != "auto"):
        found.unsupported.append(
            f"stack.{next(iter(changes))} is given, but the kernels of our own executor are "
            "measured, which keeps all in the dtype of the run and on its device; leave it out, or "
            "plan for a cluster preset without a profile"
        )
        return None
    dtype = as_mapping(data.get("workload")).get("dtype", "fp32")
    with found.collecting("stack.preset"):
        stack = stack_preset(name)
        return changed_stack(stack, dtype, **changes) if dtype in DTYPE_BYTES else stack
    return None


def resolve_choices(
    search: SearchTable,
    said: StackTable,
    workload: Workload | None,
    stack: StackSpec | None,
    cluster: ClusterSpec | None,
    found: Found,
) -> Choices:
    """Return the choices of `[search]`; notes where they contradict what the job itself says."""
    if workload is None or stack is None:
        return Choices()
    own = {
        "dtype": (workload.dtype, "workload.dtype"),
        "gradient_dtype": (stack.gradient_dtype(workload.dtype), "the dtype of stack's gradients"),
        "optimizer_offload": (stack.offloads_optimizer, "stack.optimizer_offload"),
    }
    for key, (value, whose) in own.items():
        if search.has(key) and value not in getattr(search, key):
            found.add(f"search.{key}", shown(getattr(search, key)),
                      f"must hold {whose} ({shown(value)})",
                      "add it to the list, or have the job itself say another")  # fmt: skip
    if search.has("gradient_dtype") and said.has("reduction_dtype"):
        found.add("stack.reduction_dtype", shown(said.reduction_dtype),
                  "must be absent where search.gradient_dtype is given, that of the reduction too",
                  "remove one of the two")  # fmt: skip
    if cluster is not None and not cluster.is_local:
        _check_peaks(search, workload, cluster, found)
    return Choices(
        dtype=tuple(dict.fromkeys(search.dtype)),
        gradient_dtype=tuple(dict.fromkeys(search.gradient_dtype)),
        optimizer_offload=tuple(dict.fromkeys(search.optimizer_offload)),
    )


def _check_peaks(
    search: SearchTable, workload: Workload, cluster: ClusterSpec, found: Found
) -> None:
    """Check that every GPU has a peak for every dtype; that of the workload is checked with it."""
    for pool in cluster.pools:
        peaks = pool.gpu.peak_flops_per_s
        for dtype in search.dtype:
            if dtype not in peaks and dtype != workload.dtype:
                found.add("search.dtype", shown(search.dtype),
                          f"must hold what {pool.gpu.name} has a peak for ({', '.join(peaks)})",
                          f"remove {dtype}, choose another GPU, or add the peak")  # fmt: skip
