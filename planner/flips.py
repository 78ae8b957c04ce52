"""What would flip the choice: one input at a time is scaled, and the search asked again.

An input flips the choice at the factor nearest to 1 at which keeping the chosen layout would cost
more than `MARGIN` of the objective, or at which it does not fit any more. Towards each side the
walk ends there, after one more try half-way (in the logarithm) to the factor before.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from planner.account import World, dealt
from planner.evaluate import basis_of, evaluate
from planner.facts import facts_of
from planner.layout import Layout
from planner.objectives import cost
from planner.plan import Candidate
from planner.schedules import SCHEDULES
from planner.search import InfeasibleError
from profiles.cluster import ClusterSpec, PoolSpec
from profiles.errors import UnsupportedError
from profiles.job import Job
from profiles.quantity import format_quantity

Knob = Literal["inter_node_rate", "intra_node_rate", "memory", "global_batch", "seq_len"]
KNOBS: tuple[Knob, ...] = (
    "inter_node_rate",
    "intra_node_rate",
    "memory",
    "global_batch",
    "seq_len",
)
SIDES: tuple[tuple[float, ...], ...] = ((0.5, 0.25), (2.0, 4.0))
MARGIN = 0.01
"""Part of the objective that keeping the chosen layout must cost before that is called a flip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is best with one input at `factor` times what it is, and what the choice is worth there.

    `best` is None where nothing is; `kept` is the chosen layout, None where it cannot be laid out.
    `reason` says why one of them is not, or why the input cannot be so.
    """

    factor: float
    value: str
    best: Candidate | None
    kept: Candidate | None
    is_flip: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """One input with the points that were tried, in rising order of the factor.

    `base_ns` is the step of what is kept, as things are. `reason` says why there are no points.
    """

    knob: Knob
    value: str
    base_ns: int
    points: tuple[Point, ...]
    reason: str = ""

    @property
    def flips(self) -> tuple[Point, ...]:
        """The points nearest to 1 at which the choice changes, one below and one above at most."""
        below = [point for point in self.points if point.is_flip and point.factor < 1]
        above = [point for point in self.points if point.is_flip and point.factor > 1]
        return (*below[-1:], *above[:1])


def sensitivities(
    job: Job,
    world: World,
    chosen: Layout,
    *,
    knobs: Sequence[Knob] = KNOBS,
    progress: Callable[[float, str], None] = lambda _share, _what: None,
) -> tuple[Sensitivity, ...]:
    """Return for each of `knobs` what becomes of the choice as it grows and shrinks.

    Every point is a search of `world`, four of them a knob, and one where the choice flips. A knob
    that the job does not have, as the links between nodes of a single node, has no points.
    """
    found = []
    for place, knob in enumerate(knobs):
        progress(place / len(knobs), f"what if: {KNOB_WORDS[knob]}")
        found.append(_sensitivity(job, world, chosen, knob))
    return tuple(found)


KNOB_WORDS: dict[Knob, str] = {
    "inter_node_rate": "rate between nodes",
    "intra_node_rate": "rate inside a node",
    "memory": "memory of a GPU",
    "global_batch": "global batch",
    "seq_len": "sequence length",
}


def _sensitivity(job: Job, world: World, chosen: Layout, knob: Knob) -> Sensitivity:
    costs, value, points, reason = world.costs(job), "", list[Point](), ""
    (base,) = evaluate(basis_of(job, costs), [chosen])
    try:
        if knob.endswith("_rate") and not costs.origin.is_reference:
            raise UnsupportedError("the links were measured as they are, and have no other rate")
        value = _told(job, knob)
        points = [point for side in SIDES for point in _side(job, world, chosen, knob, side)]
    except UnsupportedError as error:
        reason = str(error)
    return Sensitivity(
        knob=knob,
        value=value,
        base_ns=base.step.p50_ns,
        points=tuple(sorted(points, key=lambda point: point.factor)),
        reason=reason,
    )


def _side(
    job: Job, world: World, chosen: Layout, knob: Knob, factors: tuple[float, ...]
) -> list[Point]:
    """Return the points on one side of 1, up to the first flip and with one inside of it."""
    points, before = list[Point](), 1.0
    for factor in factors:
        points.append(_point(job, world, chosen, knob, factor))
        if points[-1].is_flip:
            between = math.sqrt(before * factor)
            if knob not in ("global_batch", "seq_len"):
                points.append(_point(job, world, chosen, knob, between))
            break
        if points[-1].best is None:
            break
        before = factor
    return points


def _point(job: Job, world: World, chosen: Layout, knob: Knob, factor: float) -> Point:
    value, best, kept, reason = "", None, None, ""
    try:
        other = varied(job, knob, factor)
        value = _told(other, knob)
        best = world.search(other).ranking[0]
        kept, reason = _kept(other, world, chosen)
        if kept is not None and is_better(other, kept, best):
            # A search that was cut short need not have come to it.
            best = kept
    except (InfeasibleError, UnsupportedError) as error:
        reason = str(error).splitlines()[0]
    is_flip = best is not None and (kept is None or is_better(other, best, kept, MARGIN))
    return Point(factor=factor, value=value, best=best, kept=kept, is_flip=is_flip, reason=reason)


def is_better(job: Job, candidate: Candidate, other: Candidate, margin: float = 0.0) -> bool:
    """Return whether `candidate` is better than `other` by more than a `margin` of the objective.

    What does not fit in the memory of `job` is never better, and always worse.
    """
    limit_bytes = min(pool.gpu.memory_bytes for pool in job.cluster.pools)
    facts, name = facts_of(job), job.goal.objectives[0]
    mine, others = (
        cost(name, facts, each.step.p50_ns, each.peak_bytes)
        if each.peak_bytes <= limit_bytes
        else math.inf
        for each in (candidate, other)
    )
    return mine * (1 + margin) < others


def _kept(job: Job, world: World, chosen: Layout) -> tuple[Candidate | None, str]:
    """Return what the chosen layout takes in `job`, or why it cannot be laid out there."""
    share, rest = divmod(job.workload.global_batch, chosen.dp * chosen.micro_batch)
    if rest:
        return None, f"dp x micro-batch of the choice do not divide {job.workload.global_batch}"
    if job.workload.seq_len % chosen.cp:
        return None, f"cp of the choice does not divide {job.workload.seq_len} tokens"
    costs = world.costs(job)
    (kept,) = evaluate(basis_of(job, costs), [replace(chosen, num_microbatches=share)])
    return kept, ""


def named(chosen: Layout, num_layers: int, world: World, job: Job) -> Layout:
    """Return `chosen` under an order that has a name: itself, or with the nearest named one.

    An order that was made for the case at hand cannot be asked for in another.
    """
    if chosen.schedule in SCHEDULES:
        return chosen
    name = "interleaved" if chosen.stages_per_rank > 1 else "zb_h1"
    return dealt(replace(chosen, schedule=name), num_layers, world.costs(job))


def varied(job: Job, knob: Knob, factor: float) -> Job:
    """Return `job` with one input `factor` times what it is.

    Raises UnsupportedError for an input that the job does not have, or that it cannot take.
    """
    workload, cluster = job.workload, job.cluster
    if knob == "global_batch":
        batch = _whole(workload.global_batch, factor, "sequences")
        return replace(job, workload=replace(workload, global_batch=batch))
    if knob == "seq_len":
        seq_len = _whole(workload.seq_len, factor, "tokens")
        if seq_len > job.model.max_seq_len:
            raise UnsupportedError(f"{job.model.name} takes {job.model.max_seq_len} tokens at most")
        return replace(job, workload=replace(workload, seq_len=seq_len))
    if knob == "memory":
        return replace(job, cluster=with_memory(cluster, factor))
    if knob == "intra_node_rate":
        if max(pool.gpus_per_node for pool in cluster.pools) == 1:
            raise UnsupportedError("a node has one GPU")
        faster = _with_pools(cluster, lambda pool: replace(
            pool, intra_node=replace(
                pool.intra_node, bytes_per_s=factor * pool.intra_node.bytes_per_s
            ),
        ))  # fmt: skip
        return replace(job, cluster=faster)
    if cluster.inter_node is None:
        raise UnsupportedError("the cluster is one node")
    link = replace(cluster.inter_node, bytes_per_s=factor * cluster.inter_node.bytes_per_s)
    return replace(job, cluster=replace(cluster, inter_node=link))


def with_memory(cluster: ClusterSpec, factor: float) -> ClusterSpec:
    """Return `cluster` with GPUs of `factor` times the memory.

    >>> from profiles.presets import cluster_preset
    >>> node = cluster_preset("h100-sxm")
    >>> with_memory(node, 2.0).pools[0].gpu.memory_bytes / node.pools[0].gpu.memory_bytes
    2.0
    """
    return _with_pools(
        cluster,
        lambda pool: replace(
            pool, gpu=replace(pool.gpu, memory_bytes=round(factor * pool.gpu.memory_bytes))
        ),
    )


def _with_pools(cluster: ClusterSpec, change: Callable[[PoolSpec], PoolSpec]) -> ClusterSpec:
    return replace(cluster, pools=tuple(change(pool) for pool in cluster.pools))


def _whole(value: int, factor: float, unit: str) -> int:
    scaled = value * Fraction(factor)
    if scaled.denominator != 1 or scaled < 1:
        raise UnsupportedError(f"{float(scaled):g} {unit} are no whole number")
    return int(scaled)


def _told(job: Job, knob: Knob) -> str:
    """Return the value of a knob in words."""
    pool, fabric = job.cluster.pools[0], job.cluster.inter_node
    if knob == "global_batch":
        return f"{job.workload.global_batch} sequences"
    if knob == "seq_len":
        return f"{job.workload.seq_len} tokens"
    if knob == "memory":
        return format_quantity(min(p.gpu.memory_bytes for p in job.cluster.pools), "bytes")
    if knob == "intra_node_rate":
        if max(each.gpus_per_node for each in job.cluster.pools) == 1:
            raise UnsupportedError("a node has one GPU")
        return format_quantity(pool.intra_node.bytes_per_s, "bytes/s")
    if fabric is None:
        raise UnsupportedError("the cluster is one node")
    return format_quantity(fabric.bytes_per_s, "bytes/s")
