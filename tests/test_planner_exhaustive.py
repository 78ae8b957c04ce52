"""The search against enumeration: the best of every small job is the best of all its layouts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from planner.cost import measured_costs
from planner.evaluate import Costs, basis_of
from planner.frontier import Tally, frontier
from planner.plan import Certificate
from planner.reference.costs import reference_costs
from planner.schedules import SCHEDULES
from planner.search import Effort, SearchResult, search
from planner.space import Space
from profiles.cluster import UplinkSpec
from profiles.goal import Goal
from profiles.job import Job, SearchLimits
from profiles.model import ModelSpec
from profiles.presets import cluster_preset, stack_preset
from profiles.workload import Workload
from tests.enumeration import Enumeration, enumerated
from tests.machine import MADE_UP, TINY, made_up_job, made_up_profile

GIB = 1 << 30
LLAMA = ModelSpec(
    name="llama", num_layers=5, hidden=2048, num_heads=16, num_kv_heads=4, head_size=128,
    ffn=5632, vocab=32000, max_seq_len=4096,
)  # fmt: skip
ODD = replace(LLAMA, num_layers=6, num_heads=12, num_kv_heads=6, ffn=5376, vocab=50257)
"""Heads that 4 does not divide, an odd vocabulary."""
GPT = replace(LLAMA, num_layers=4, num_kv_heads=16, norm="layernorm", mlp="gelu",
              positions="learned", has_biases=True, tied_embeddings=True, vocab=50257)  # fmt: skip
MOE = replace(LLAMA, num_layers=4, ffn=1536, num_experts=4, experts_per_token=2)
DEEP = replace(LLAMA, num_layers=9, hidden=1024, num_heads=8, head_size=128, ffn=2816)
TIED = replace(LLAMA, tied_embeddings=True, vocab=128256)


def elsewhere(
    model: ModelSpec = LLAMA, *, ranks: int = 8, node: int = 8, stack: str = "torchtitan",
    memory_gib: float = 80, batch: int = 8, seq_len: int = 2048, pod_nodes: int = 0,
    goal: Goal = Goal(), gpu: str = "h100-sxm", **limits: Any,
) -> Job:  # fmt: skip
    """Return a job on nodes of `node` GPUs each that have so much memory."""
    cluster = cluster_preset(gpu, num_nodes=max(2, ranks // node))
    (pool,) = cluster.pools
    small = replace(pool.gpu, memory_bytes=int(memory_gib * GIB))
    pool = replace(pool, gpu=small, gpus_per_node=node, num_nodes=ranks // node)
    pods = UplinkSpec(pod_nodes=pod_nodes, oversubscription=4.0, **MADE_UP) if pod_nodes else None
    return Job(
        seed=0, model=model, stack=stack_preset(stack), profile_path="", goal=goal,
        workload=Workload(seq_len=seq_len, global_batch=batch, dtype="bf16"),
        cluster=replace(cluster, pools=(pool,), uplinks=pods),
        search=SearchLimits(**{"schedule": ("1f1b", "zb_h1", "interleaved"), **limits}),
    )  # fmt: skip


def here(model: ModelSpec = TINY, *, ranks: int = 4, memory_mib: float = 1024, batch: int = 8,
         goal: Goal = Goal(), **limits: Any) -> Job:  # fmt: skip
    """Return a job on a made-up machine that was measured."""
    job = made_up_job(num_ranks=ranks)
    (pool,) = job.cluster.pools
    pool = replace(pool, gpu=replace(pool.gpu, memory_bytes=int(memory_mib * 2**20)))
    return replace(
        job, model=model, workload=replace(job.workload, global_batch=batch), goal=goal,
        cluster=replace(job.cluster, pools=(pool,)),
        search=SearchLimits(**{"schedule": tuple(SCHEDULES), **limits}),
    )  # fmt: skip


NO_ZERO2 = ("none", "zero1", "zero3")
PLAIN = {"sharding": ("none", "zero1"), "cp": (1,), "sequence_parallel": (True,)}
WIDE = {"micro_batch": (1,), "cp": (1,), "sequence_parallel": (True,)}
JOBS: Mapping[str, Job] = {
    "one GPU": elsewhere(ranks=1, node=1),
    "one GPU, every schedule": elsewhere(ranks=1, node=1, schedule=tuple(SCHEDULES)),
    "one GPU that recomputes": elsewhere(ranks=1, node=1, memory_gib=9, seq_len=4096),
    "two GPUs, every option": elsewhere(ranks=2, node=2, schedule=tuple(SCHEDULES), batch=4),
    "two nodes of one GPU": elsewhere(ranks=2, node=1, memory_gib=7, batch=4),
    "four GPUs, every schedule": elsewhere(
        ranks=4, node=4, schedule=tuple(SCHEDULES), batch=4, sharding=("none", "zero3"), cp=(1,)
    ),
    "megatron": elsewhere(stack="megatron-2023", micro_batch=(1, 2), cp=(1, 2)),
    "megatron, tight": elsewhere(
        stack="megatron-2023", memory_gib=5, micro_batch=(2, 4), cp=(1,), seq_len=4096
    ),
    "megatron, gradients of the last backward": elsewhere(
        TIED, ranks=4, node=4, stack="megatron-2023", memory_gib=9, cp=(1,), tp=(1,),
        sharding=("none", "zero1"), seq_len=4096,
    ),
    "nemo": elsewhere(stack="nemo", micro_batch=(1,), sharding=NO_ZERO2),
    "nemo, experts, tight": elsewhere(
        MOE, stack="nemo", memory_gib=3.5, micro_batch=(1, 2), cp=(1,), schedule=("1f1b",)
    ),
    "nanotron": elsewhere(stack="nanotron", micro_batch=(1, 4), cp=(1,)),
    "nanotron, tight": elsewhere(stack="nanotron", memory_gib=4, micro_batch=(1, 2), cp=(1,)),
    "experts": elsewhere(MOE, ranks=4, node=4, batch=4, schedule=("1f1b", "zb_v")),
    "experts on two nodes": elsewhere(MOE, node=4, **WIDE, schedule=("1f1b",)),
    "heads that four does not divide": elsewhere(ODD, micro_batch=(1,), cp=(1, 2)),
    "odd batch and sequence": elsewhere(ODD, batch=6, seq_len=1022, ranks=4, node=4),
    "twelve GPUs": elsewhere(ODD, ranks=12, node=4, batch=12, **WIDE, sharding=("zero1",)),
    "learned positions and tied embeddings": elsewhere(
        GPT, ranks=4, node=4, stack="megatron-2023", schedule=("1f1b", "zb_v"), cp=(1,)
    ),
    "tied embeddings, tight": elsewhere(TIED, node=4, memory_gib=5, **WIDE),
    "two nodes": elsewhere(node=4, **WIDE),
    "nodes in pods": elsewhere(ranks=16, node=2, pod_nodes=2, **WIDE, sharding=("zero1",)),
    "pods, one order": elsewhere(
        ranks=16, node=4, pod_nodes=2, **WIDE, order=("tp-cp-pp-dp",), sharding=("zero3",)
    ),
    "shard groups": elsewhere(
        node=4, **WIDE, sharding=("zero3", "zero1"), shard_group=(2, 4), schedule=("zb_h2",)
    ),
    "deep, every v": elsewhere(
        DEEP, ranks=4, node=4, **PLAIN, schedule=tuple(SCHEDULES), stages_per_rank=(1, 2, 3),
    ),
    "breadth first or nothing": elsewhere(DEEP, **PLAIN, schedule=("breadth_first",), pp=(2, 4)),
    "limits on every axis": elsewhere(
        dp=(2, 4), tp=(1, 2), pp=(1, 2), cp=(1,), micro_batch=(1, 2), sequence_parallel=(False,),
        sharding=("zero2",), recompute=("selective",),
    ),
    "all recomputed": elsewhere(**WIDE, recompute=("full",), memory_gib=6),
    "kinds in another order": elsewhere(**WIDE, recompute=("full", "none"), memory_gib=4),
    "A100": elsewhere(gpu="a100-sxm-80gb", **WIDE, memory_gib=5, stack="megatron-2023"),
    "32 GPUs": elsewhere(DEEP, ranks=32, batch=16, **WIDE, sharding=("zero1",), tp=(2, 4, 8)),
    "64 GPUs": elsewhere(
        DEEP, ranks=64, batch=32, **WIDE, sharding=("zero1",), tp=(4, 8), schedule=("1f1b",)
    ),
    "a limit on the memory left": elsewhere(
        **WIDE, memory_gib=8, goal=Goal(limits={"memory_headroom": 3 * GIB})
    ),
    "a limit on the step": elsewhere(
        **WIDE, goal=Goal(objectives=("memory_headroom",), limits={"step_time": 0.03})
    ),
    "memory": elsewhere(ranks=4, node=4, **WIDE, goal=Goal(objectives=("memory_headroom",))),
    "memory, tight": elsewhere(
        ranks=4, node=4, memory_gib=5, **WIDE, goal=Goal(objectives=("memory_headroom",))
    ),
    "tokens": elsewhere(**WIDE, memory_gib=5, goal=Goal(objectives=("tokens_per_s",))),
    "goodput": elsewhere(ranks=4, node=4, **WIDE, goal=Goal(objectives=("goodput",))),
    "a front": elsewhere(
        ranks=4, node=4, memory_gib=8, **WIDE, goal=Goal(objectives=("step_time", "memory_headroom"))
    ),
    "a front the other way round": elsewhere(
        node=4, micro_batch=(1, 2), cp=(1,), schedule=("1f1b",),
        goal=Goal(objectives=("memory_headroom", "tokens_per_s")),
    ),
    "measured": here(),
    "measured, tight": here(memory_mib=1.6),
    "measured, eight ranks": here(replace(TINY, num_layers=9), ranks=8, batch=16),
    "measured, memory": here(memory_mib=2, goal=Goal(objectives=("memory_headroom",))),
}


def costs_of(job: Job) -> Costs:
    if job.cluster.is_local:
        return measured_costs(job, made_up_profile(job.cluster.num_ranks))
    return reference_costs(job)


@cache
def everything(name: str) -> Enumeration:
    return enumerated(JOBS[name], costs_of(JOBS[name]))


@pytest.mark.parametrize("name", JOBS)
def test_the_best_is_the_best_of_all(name: str) -> None:
    job, every = JOBS[name], everything(name)
    found = search(job, costs_of(job), Effort(gap=0.0))
    best = every.fitting[every.best]
    first = found.ranking[0]
    assert first.layout == best.layout
    assert (first.step.p50_ns, first.peak_bytes) == (best.step_ns, best.peak_bytes)
    certificate = found.certificate
    assert certificate.value == certificate.lower_bound == every.objectives[every.best][0]
    assert (certificate.gap, certificate.num_open) == (0, 0)
    print(name, every.num_layouts, len(every.fitting), certificate)
