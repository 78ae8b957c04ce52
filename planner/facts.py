"""`Facts`: what the objectives need to know of a job, and what of it nobody said."""

from dataclasses import dataclass
from typing import Protocol

from planner.goodput import (
    best_interval_s,
    checkpoint_bytes,
    mean_between_interruptions_s,
    useful_share,
)
from profiles.cluster import ClusterSpec
from profiles.errors import InvalidInputError, Problem
from profiles.goal import Goal
from profiles.model import ModelSpec
from profiles.presets import assumption
from profiles.quantity import format_quantity
from profiles.stack import StackSpec
from profiles.workload import Workload

LEAST_USEFUL_SHARE = 1e-3
"""With less than that the job does not train, and its goodput is no number to search by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the objectives need beside a layout's step and peak memory.

    `watts_per_gpu` is drawn by a GPU and its share of the node, before the facility's `pue`;
    `mean_s` lies between two interruptions of the whole job, and is 0 where it never is. Money and
    power are 0 where nobody said them: objectives that need them are then errors. `assumptions` has
    a sentence for each fact that the goal needs and nobody gave, and one for objectives that cannot
    differ.
    """

    tokens_per_step: int
    num_gpus: int
    memory_bytes: int
    dollars_per_gpu_hour: float = 0.0
    watts_per_gpu: float = 0.0
    pue: float = 1.0
    mean_s: float = 0.0
    restart_s: float = 0.0
    checkpoint_s: float = 0.0
    assumptions: tuple[str, ...] = ()

    def interval_s(self, step_ns: float) -> float:
        """Return the work between two checkpoints that is best: one step at least.

        It is 0 where nothing ever interrupts the job, and no checkpoint is needed.
        """
        if not self.mean_s:
            return 0.0
        return max(best_interval_s(self.checkpoint_s, self.mean_s), step_ns / 1e9)


class Asked(Protocol):
    """What is to be trained, where, and to what end: a job, or the plan of one."""

    @property
    def model(self) -> ModelSpec:
        """The model that is trained."""

    @property
    def workload(self) -> Workload:
        """What a step trains on."""

    @property
    def cluster(self) -> ClusterSpec:
        """The machines."""

    @property
    def stack(self) -> StackSpec:
        """The software that trains it."""

    @property
    def goal(self) -> Goal:
        """What is to be made best."""


def facts_of(job: Asked) -> Facts:
    """Return the facts of `job`; what it does not say of its cluster is assumed, and told.

    A checkpoint stops the job for as long as storage takes, unless the job says for how long.
    Raises InvalidInputError where the goal is goodput and interruptions leave next to none.
    """
    cluster, operation = job.cluster, job.cluster.operation
    rate = _given_or_assumed(operation.interruptions_per_gpu_day, "interruptions_per_gpu_day")
    is_interrupted = rate > 0
    facts = Facts(
        tokens_per_step=job.workload.tokens_per_step,
        num_gpus=cluster.num_ranks,
        memory_bytes=min(pool.gpu.memory_bytes for pool in cluster.pools),
        dollars_per_gpu_hour=operation.dollars_per_gpu_hour or 0.0,
        watts_per_gpu=watts_per_gpu(cluster),
        pue=_given_or_assumed(operation.pue, "pue"),
        mean_s=mean_between_interruptions_s(rate, cluster.num_ranks) if is_interrupted else 0.0,
        restart_s=_restart_s(cluster),
        checkpoint_s=checkpoint_s(job),
        assumptions=(*_assumptions(job.goal, cluster), *_remarks(job.goal)),
    )
    if "goodput" in job.goal.asks_for and is_interrupted:
        _check_share(facts)
    return facts


def watts_per_gpu(cluster: ClusterSpec) -> float:
    """Return what a GPU of `cluster` draws in training with its share of the node, on average.

    As the job says, or its board's power times what nodes of 8 H100 were measured to draw over the
    power of their boards; 0 where neither is known.

    >>> from profiles.presets import cluster_preset
    >>> round(watts_per_gpu(cluster_preset("h100-sxm")))
    969
    """
    if cluster.operation.watts_per_gpu is not None:
        return cluster.operation.watts_per_gpu
    if not all(pool.gpu.max_power_watts for pool in cluster.pools):
        return 0.0
    board = sum(pool.num_gpus * pool.gpu.max_power_watts for pool in cluster.pools)
    return board / cluster.num_ranks * assumption("watts_per_board_watt").value


def checkpoint_s(job: Asked) -> float:
    """Return how long `job` stands still for a checkpoint: its size over the rate of storage.

    Where the job says for how long itself, it is that.
    """
    cluster, operation = job.cluster, job.cluster.operation
    if operation.checkpoint_stall_ns is not None:
        return operation.checkpoint_stall_ns / 1e9
    a_gpu = assumption("checkpoint_bytes_per_s_per_gpu").value
    rate = operation.checkpoint_bytes_per_s or a_gpu * cluster.num_ranks
    return checkpoint_bytes(job.model, job.workload, job.stack) / rate


def _restart_s(cluster: ClusterSpec) -> float:
    given = cluster.operation.restart_ns
    return assumption("restart_s").value if given is None else given / 1e9


def _given_or_assumed(given: float | None, name: str) -> float:
    return assumption(name).value if given is None else given


def _assumptions(goal: Goal, cluster: ClusterSpec) -> list[str]:
    """Return a sentence for each fact of `cluster` that `goal` needs and nobody gave."""
    operation, needed = cluster.operation, []
    if "joules_per_token" in goal.asks_for:
        if operation.watts_per_gpu is None:
            watts = f"{watts_per_gpu(cluster):,.0f} W a GPU with its share of the node"
            needed.append(("watts_per_board_watt", watts, "power_per_gpu"))
        if operation.pue is None:
            needed.append(("pue", f"PUE {assumption('pue').value}", "pue"))
    if "goodput" in goal.asks_for:
        if operation.interruptions_per_gpu_day is None:
            rate = assumption("interruptions_per_gpu_day").value
            words = f"{rate:.3g} interruptions per GPU-day"
            needed.append(("interruptions_per_gpu_day", words, "failures.per_gpu_day"))
        if operation.restart_ns is None:
            words = f"{assumption('restart_s').value:.0f} s to restart"
            needed.append(("restart_s", words, "failures.restart"))
        if operation.checkpoint_bytes_per_s is None and operation.checkpoint_stall_ns is None:
            storage = "checkpoint_bytes_per_s_per_gpu"
            words = f"checkpoints at {format_quantity(assumption(storage).value, 'bytes/s')} a GPU"
            needed.append((storage, words, "failures.checkpoint_rate"))
    return [
        f"assumed {words}: {fact.source} ({fact.date}); say otherwise with cluster.{key}"
        for fact, words, key in ((assumption(name), words, key) for name, words, key in needed)
    ]


def _remarks(goal: Goal) -> list[str]:
    """Return a sentence where objectives cannot differ: of these a front has no choice to show."""
    alike = [name for name in goal.objectives if name != "memory_headroom"]
    if len(alike) < 2:
        return []
    names = f"{', '.join(alike[:-1])} and {alike[-1]}"
    return [f"on one cluster {names} are all best where the step is shortest"]


def _check_share(facts: Facts) -> None:
    interval_s = max(best_interval_s(facts.checkpoint_s, facts.mean_s), 1e-9)
    share = useful_share(interval_s, facts.checkpoint_s, facts.restart_s, facts.mean_s)
    if share >= LEAST_USEFUL_SHARE:
        return
    raise InvalidInputError(
        [
            Problem(
                where="cluster.failures",
                found=f"an interruption every {facts.mean_s:,.3g} s, {facts.restart_s:,.3g} s to "
                f"restart and {facts.checkpoint_s:,.3g} s a checkpoint",
                rule=f"must leave {LEAST_USEFUL_SHARE:.1%} of the time for training",
                fix="lower per_gpu_day, or shorten the restart or the checkpoint",
            )
        ]
    )
