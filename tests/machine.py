"""A made-up machine whose kernels cost flops over a rate and nothing else: sums fit on paper."""

from dataclasses import replace
from itertools import product

from planner.cost import measured_costs
from planner.plan import Plan
from planner.search import make_plan, search
from profiles.cluster import ClusterSpec, GpuSpec, LinkSpec, PoolSpec
from profiles.job import Job, SearchLimits
from profiles.model import ModelSpec
from profiles.profile import (
    PROFILE_SCHEMA_VERSION,
    CollectiveSample,
    DeviceFacts,
    KernelSample,
    Profile,
)
from profiles.stack import StackSpec
from profiles.workload import Workload

FLOPS_PER_NS = 0.5
RATE_BYTES_PER_NS = 1.0
TINY = ModelSpec(
    name="tiny", num_layers=4, hidden=64, num_heads=4, num_kv_heads=2, head_size=16, ffn=128,
    vocab=256, max_seq_len=64,
)  # fmt: skip
MADE_UP = {"source": "made up for tests", "date": "2026-11-20"}

_AXES: dict[str, tuple[tuple[int, ...], ...]] = {
    "linear_forward": ((8, 4096), (16, 1024), (16, 1024)),
    "linear_dgrad": ((8, 4096), (16, 1024), (16, 1024)),
    "linear_wgrad": ((8, 4096), (16, 1024), (16, 1024)),
    "attention": ((1, 64), (1, 8), (1, 8), (8, 256), (16, 128)),
    "norm": ((8, 4096), (16, 1024)),
    "rope": ((64, 1 << 22),),
    "swiglu": ((64, 1 << 22),),
    "add": ((64, 1 << 22),),
    "embedding": ((8, 4096), (16, 1024), (16, 1024)),
    "cross_entropy": ((8, 4096), (16, 1024)),
    "adamw": ((64, 1 << 24),),
}


def _kernels() -> list[KernelSample]:
    samples = []
    for name, axes in _AXES.items():
        is_whole = name.startswith("linear") or name == "adamw"
        for op in [name] if is_whole else [f"{name}_forward", f"{name}_backward"]:
            for shape in product(*axes):
                work = 2.0
                for size in shape:
                    work *= size
                ns = round(work / FLOPS_PER_NS) if name.startswith("linear") else 1
                samples.append(
                    KernelSample(
                        op=op,
                        dtype="fp32",
                        shape=shape,
                        p10_ns=ns,
                        p50_ns=ns,
                        p90_ns=ns,
                        num_samples=5,
                    )
                )
    return samples


def _collectives(num_ranks: int) -> list[CollectiveSample]:
    factors = {
        "all_reduce": 2.0,
        "all_reduce_copy": 2.0,
        "all_gather": 1.0,
        "reduce_scatter": 1.0,
        "send_recv": None,
    }
    samples = []
    for kind, factor in factors.items():
        groups = [n for n in range(2, num_ranks + 1) if num_ranks % n == 0] if factor else [2]
        for n, size in product(groups, (1024, 1 << 20, 64 << 20)):
            share = factor * (n - 1) / n if factor else 1.0
            ns = round(share * size / RATE_BYTES_PER_NS)
            samples.append(
                CollectiveSample(
                    kind=kind,
                    group_size=n,
                    size_bytes=size,
                    p10_ns=ns,
                    p50_ns=ns,
                    p90_ns=ns,
                    num_samples=5,
                )
            )
    return samples


def made_up_profile(num_ranks: int) -> Profile:
    """Return a profile in which linears cost flops, links cost bytes, and all else one ns."""
    return Profile(
        schema_version=PROFILE_SCHEMA_VERSION,
        device=DeviceFacts(
            kind="cpu",
            name="made-up",
            backend="gloo",
            num_ranks=num_ranks,
            memory_bytes=1 << 30,
            driver="",
        ),
        kernels=tuple(_kernels()),
        collectives=tuple(_collectives(num_ranks)),
        host_ns={"dtensor_linear": 0, "pipeline_action": 0, "step": 0},
        context_bytes=1000,
        versions={"torch": "2.13.0"},
        measured_at="2026-11-20T00:00:00Z",
        scales={},
    )


def interleaved_plan() -> Plan:
    """Return a plan of two pipeline ranks with two stages each, for a cluster elsewhere."""
    here = made_up_job(num_ranks=2)
    job = replace(
        here,
        cluster=replace(here.cluster, local_device=""),
        search=SearchLimits(pp=(2,), schedule=("interleaved",), stages_per_rank=(2,)),
    )
    measured = made_up_profile(num_ranks=2)
    profile = replace(measured, device=replace(measured.device, kind="cuda"))
    costs = measured_costs(job, profile, "profile.json")
    return make_plan(job, costs, search(job, costs), 0, "0")


def made_up_job(num_ranks: int) -> Job:
    """Return a job of the tiny model on a made-up node."""
    gpu = GpuSpec(name="made-up", memory_bytes=1 << 30, memory_bytes_per_s=1e9,
                  peak_flops_per_s={}, max_power_watts=0.0, **MADE_UP)  # fmt: skip
    link = LinkSpec(
        name="made-up", bytes_per_s=1e9, latency_ns=0, source=MADE_UP["source"],
        date=MADE_UP["date"],
    )  # fmt: skip
    pool = PoolSpec(gpu=gpu, gpus_per_node=num_ranks, num_nodes=1, intra_node=link)
    return Job(
        seed=0,
        model=TINY,
        workload=Workload(seq_len=16, global_batch=8),
        cluster=ClusterSpec(name="made-up", pools=(pool,), local_device="cpu"),
        stack=StackSpec(
            name="made-up",
            overlaps_gradients=False,
            gradient_bucket_bytes=25 << 20,
            fuses_norms=False,
            source=MADE_UP["source"],
            date=MADE_UP["date"],
        ),
        profile_path="",
        search=SearchLimits(),
    )
