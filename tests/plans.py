"""Small plans for tests, with made-up costs."""

from planner.layout import Layout
from planner.plan import (
    PLAN_SCHEMA_VERSION,
    Certificate,
    PeakMemory,
    Plan,
    ProfileReference,
    StageCost,
    seal,
)
from planner.schedules import SCHEDULES
from profiles.cluster import ClusterSpec, GpuSpec, LinkSpec, PoolSpec
from profiles.goal import FASTEST
from profiles.model import ModelSpec
from profiles.profile import Cost, DeviceFacts
from profiles.stack import StackSpec
from profiles.workload import Workload

TINY = ModelSpec(
    name="tiny", num_layers=4, hidden=64, num_heads=4, num_kv_heads=2, head_size=16,
    ffn=128, vocab=256, max_seq_len=128,
)  # fmt: skip

COST = Cost(p10_ns=1, p50_ns=1, p90_ns=1)
TWICE = Cost(p10_ns=2, p50_ns=2, p90_ns=2)


def tiny_layout(
    dp: int = 1,
    tp: int = 1,
    pp: int = 1,
    schedule: str = "1f1b",
    global_batch: int = 8,
    stages_per_rank: int = 1,
) -> Layout:
    """Return a layout of `global_batch` sequences, one a micro-batch, over four equal layers."""
    num_stages = pp * stages_per_rank
    return Layout(
        dp=dp, tp=tp, pp=pp, micro_batch=1, num_microbatches=global_batch // dp,
        stage_layers=(4 // num_stages,) * num_stages, schedule=schedule,
        stages_per_rank=stages_per_rank,
    )  # fmt: skip


def tiny_cluster(num_ranks: int = 8) -> ClusterSpec:
    """Return one node of `num_ranks` small CPU ranks."""
    note = {"source": "made up for tests", "date": "2026-01-01"}
    gpu = GpuSpec(
        name="cpu", memory_bytes=1 << 30, memory_bytes_per_s=1e10,
        peak_flops_per_s={"fp32": 1e11}, max_power_watts=10.0, **note,
    )  # fmt: skip
    link = LinkSpec(
        name="loopback", bytes_per_s=1e9, latency_ns=1000, source=note["source"], date=note["date"]
    )
    pool = PoolSpec(gpu=gpu, gpus_per_node=num_ranks, num_nodes=1, intra_node=link)
    return ClusterSpec(name="here", pools=(pool,), local_device="cpu")


def tiny_stack(overlaps_gradients: bool = False) -> StackSpec:
    """Return a stack with buckets so small that a tiny model fills several."""
    return StackSpec(
        name="torch", overlaps_gradients=overlaps_gradients, gradient_bucket_bytes=100_000,
        fuses_norms=False,
        source="made up for tests", date="2026-01-01",
    )  # fmt: skip


def tiny_plan(
    layout: Layout | None = None,
    model: ModelSpec = TINY,
    seed: int = 0,
    seq_len: int = 32,
    **changed: object,
) -> Plan:
    """Return a sealed plan of `layout`; `changed` replaces whole sections."""
    layout = layout or tiny_layout()
    sizes = layout.pp, layout.num_microbatches, layout.stages_per_rank
    family = SCHEDULES.get(layout.schedule)  # None: the order is among `changed`
    costs = StageCost(
        forward=COST, backward=TWICE, weight=COST, send_forward=COST, send_backward=COST,
        all_reduce=COST, optimizer=COST, other=COST, wait=COST, tensor_parallel_forward_ns=0,
        tensor_parallel_backward_ns=0,
    )  # fmt: skip
    memory = PeakMemory(
        parameters=1, gradients=1, optimizer=1, activations=1, temporary=1, context=1
    )
    device = DeviceFacts(
        kind="cpu", name="cpu", backend="gloo", num_ranks=8, memory_bytes=1 << 30, driver=""
    )
    sections: dict[str, object] = {
        "schema_version": PLAN_SCHEMA_VERSION,
        "tool_version": "0",
        "seed": seed,
        "model": model,
        "workload": Workload(seq_len=seq_len, global_batch=layout.global_batch),
        "cluster": tiny_cluster(),
        "stack": tiny_stack(),
        "goal": FASTEST,
        "profile": ProfileReference(
            path="", digest="", device=device, versions={}, measured_at="2026-01-01T00:00:00Z"
        ),
        "layout": layout,
        "schedule": tuple(str(family.build(*sizes)).splitlines()) if family else (),
        "costs": (costs,) * layout.num_stages,
        "memory": (memory,) * layout.pp,
        "step": COST,
        "ranking": (),
        "chosen": 0,
        "front": (),
        "rejections": (),
        "certificate": Certificate(
            objective="step_time", value=1e-9, lower_bound=1e-9, gap=0.0, num_layouts=1,
            num_rejected={}, num_bounded=0, num_timed=1, num_open=0,
        ),
        "variants": (),
    }  # fmt: skip
    return seal(**(sections | changed))
