"""The speed of the search on this machine: three jobs of the field, from 8 GPUs to 16,384."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from planner.bench import Figure
from planner.reference.costs import reference_costs
from planner.search import Effort, SearchResult, search
from profiles.cluster import UplinkSpec
from profiles.job import Job, SearchLimits
from profiles.presets import cluster_preset, fabric_preset, model_preset, stack_preset
from profiles.workload import Workload

GAP = 0.01
MOST_BYTES = 2 * 2**30
_PODS = UplinkSpec(
    pod_nodes=384, oversubscription=7.0, source="arXiv:2407.21783, section 3.3.1",
    date="2024-07-31",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A job of the benchmark, and in how many seconds it should be answered."""

    name: str
    job: Job
    goal_s: float


def questions() -> tuple[Question, ...]:
    """Return the jobs, each with the batch and the sequence that its model is trained with.

    >>> [question.job.cluster.num_ranks for question in questions()]
    [8, 256, 16384]
    """
    return (
        Question(name="LLaMA 3 8B on 8 H100", job=_job("llama-3-8b", 1, 128), goal_s=1.0),
        Question(name="LLaMA 3 70B on 256 H100", job=_job("llama-3-70b", 32, 512), goal_s=3.0),
        Question(
            name="LLaMA 3.1 405B on 16,384 H100", job=_job("llama-3.1-405b", 2048, 2048),
            goal_s=10.0,
        ),
    )  # fmt: skip


def _job(model: str, num_nodes: int, global_batch: int) -> Job:
    node = cluster_preset("h100-sxm")
    cluster = replace(
        node,
        pools=(replace(node.pools[0], num_nodes=num_nodes),),
        inter_node=fabric_preset("roce400") if num_nodes > 1 else None,
        uplinks=_PODS if num_nodes > _PODS.pod_nodes else None,
    )
    return Job(
        seed=0,
        model=model_preset(model),
        workload=Workload(seq_len=8192, global_batch=global_batch, dtype="bf16"),
        cluster=cluster,
        stack=stack_preset("torchtitan"),
        profile_path="",
        search=SearchLimits(),
    )


def bench_search(on_progress: Callable[[float, str], None] = lambda *_: None) -> list[Figure]:
    """Return how long each question takes, how sure the answer is, and where the space went.

    The compiled kernels and the reference curves are warm, the costs of a question are not: they
    are made anew.
    """
    asked = questions()
    warm = asked[0].job
    search(warm, reference_costs(warm), Effort(gap=GAP))
    figures: list[Figure] = []
    for place, question in enumerate(asked):
        on_progress(place / len(asked), question.name)
        figures += _answered(question)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return [
        *figures,
        Figure(name="memory of the process", value=peak / 2**30, unit="GiB",
               goal=MOST_BYTES / 2**30, is_better_low=True),
    ]  # fmt: skip


def _answered(question: Question) -> list[Figure]:
    costs = reference_costs(question.job)
    wall, cpu = time.perf_counter(), time.process_time()
    result = search(question.job, costs, Effort(gap=GAP))
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    name = question.name
    return [
        Figure(name=name, value=wall_s, unit="s", goal=question.goal_s, is_better_low=True),
        Figure(name=f"{name}: certified gap", value=100 * result.certificate.gap, unit="%",
               goal=100 * GAP, is_better_low=True),
        Figure(name=f"{name}: accounted for", value=result.certificate.num_layouts / cpu_s,
               unit="layouts a CPU-s"),
        *_shares(name, result),
    ]  # fmt: skip


def _shares(name: str, result: SearchResult) -> list[Figure]:
    """Return what became of the space, in percent of its layouts."""
    found = result.certificate
    counts = {
        **{f"rejected, {rule}": count for rule, count in found.num_rejected.items()},
        "bounded away": found.num_bounded + found.num_open,
        "timed": found.num_timed,
    }
    return [
        Figure(name=f"{name}: {what}", value=100 * count / found.num_layouts, unit="%")
        for what, count in counts.items()
    ]


__all__ = ["Question", "bench_search", "questions"]
