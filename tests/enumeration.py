"""Every layout of a job, one by one: slow, and plain to see through.

What the search leaves out by bounds is timed here as well, each layout by the walk of its full
schedule, and stages and recomputed layers are found by hand.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from typing import NamedTuple

from planner.evaluate import Costs
from planner.layout import DEFAULT_ORDER, Layout
from planner.lower import predict_steps
from planner.memory import peak_memory
from planner.objectives import broken_limit, cost, facts_of
from planner.plan import StageCost
from planner.schedules import SCHEDULES
from profiles.job import Job
from profiles.stack import Recompute, Sharding
from simulator.schedule import Schedule

EVERY_SHARDING: tuple[Sharding, ...] = ("none", "zero1", "zero2", "zero3")
BOTH_ORDERS = (DEFAULT_ORDER, "tp-cp-pp-dp")


class Exact(NamedTuple):
    """A layout that fits, with its step and the peak memory of its worst rank."""

    layout: Layout
    step_ns: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Enumeration:
    """All layouts of a job: how many there are, and those that fit and break no limit."""

    num_layouts: int
    fitting: tuple[Exact, ...]
    objectives: tuple[tuple[float, ...], ...]

    @property
    def best(self) -> int:
        """The place of the best; ties go to the shorter step, to less memory, to the text."""
        return min(
            range(len(self.fitting)),
            key=lambda n: (
                self.objectives[n][0],
                self.fitting[n].step_ns,
                self.fitting[n].peak_bytes,
                str(self.fitting[n].layout),
            ),
        )

    @property
    def front(self) -> set[tuple[float, ...]]:
        """What those are worth that no other is at least as good as in all, and better in one."""
        every = set(self.objectives)
        return {
            one
            for one in every
            if not any(other != one and all(map(float.__le__, other, one)) for other in every)
        }


def enumerated(job: Job, costs: Costs) -> Enumeration:
    """Return all layouts of `job`, timed by `costs`."""
    facts, goal = facts_of(job), job.goal
    num_layouts, found = 0, dict[Exact, tuple[float, ...]]()
    # Costs do not depend on the schedule, so that layouts of several share them.
    stages = cache(costs.stages)
    for start in starts(job, costs):
        for made in _of_start(job, costs, stages, start):
            num_layouts += 1
            if made is not None and not broken_limit(goal, facts, made.step_ns, made.peak_bytes):
                found[made] = tuple(
                    cost(name, facts, made.step_ns, made.peak_bytes) for name in goal.objectives
                )
    return Enumeration(
        num_layouts=num_layouts, fitting=tuple(found), objectives=tuple(found.values())
    )


def starts(job: Job, costs: Costs) -> Iterator[Layout]:
    """Yield every legal layout of `job` whose sharding, recomputation and stages are open."""
    asked, model, work = job.search, job.model, job.workload
    num_ranks, is_ours = job.cluster.num_ranks, costs.is_of_executor
    for tp, cp, pp, ep in product(*_sizes(job, is_ours=is_ours)):
        dp = num_ranks // (tp * cp * pp)
        degrees = {"dp": dp, "tp": tp, "cp": cp, "pp": pp, "ep": ep}
        counts = (model.num_heads, model.num_kv_heads, model.ffn) + (model.vocab,) * is_ours
        is_legal = (
            dp * tp * cp * pp == num_ranks
            and all(value in (getattr(asked, axis) or [value]) for axis, value in degrees.items())
            and not any(count % tp for count in counts)
            and work.global_batch % dp == 0
            and (cp == 1 or work.seq_len % (2 * cp) == 0)
            and (dp * cp) % ep == 0
            and not (is_ours and model.tied_embeddings and tp * pp > 1)
        )
        if not is_legal:
            continue
        share = work.global_batch // dp
        batches = [n for n in asked.micro_batch or range(1, share + 1) if share % n == 0]
        sequence = (
            (asked.sequence_parallel or (True, False)) if tp > 1 and not is_ours else (False,)
        )
        for n, sp, order, (v, name) in product(
            batches, sequence, _orders(job, degrees, is_ours=is_ours), _pipelines(job, pp)
        ):
            yield Layout(
                dp=dp, tp=tp, cp=cp, pp=pp, ep=ep, micro_batch=n, num_microbatches=share // n,
                sequence_parallel=sp, order=order, schedule=name, stages_per_rank=v,
                stage_layers=(1,) * (pp * v),
            )  # fmt: skip


def _sizes(job: Job, *, is_ours: bool) -> tuple[list[int], ...]:
    """Return the sizes of tp, cp, pp and ep that divide what they must."""
    ranks = [n for n in range(1, job.cluster.num_ranks + 1) if job.cluster.num_ranks % n == 0]
    experts = job.model.num_experts
    return (
        ranks,
        [1] if is_ours else ranks,
        ranks,
        [n for n in range(1, experts + 1) if experts % n == 0] or [1],
    )


def _orders(job: Job, degrees: Mapping[str, int], *, is_ours: bool) -> list[str]:
    """Return the orders that differ: with stages and replicas, some of which share a node."""
    asked, (pool,) = job.search.order or BOTH_ORDERS, job.cluster.pools
    fills = degrees["tp"] * degrees["cp"] % pool.gpus_per_node == 0
    differ = not fills or job.cluster.uplinks is not None
    if degrees["pp"] > 1 and degrees["dp"] > 1 and pool.num_nodes > 1 and differ and not is_ours:
        return list(asked)
    return [DEFAULT_ORDER if DEFAULT_ORDER in asked else asked[0]]


def _pipelines(job: Job, pp: int) -> list[tuple[int, str]]:
    """Return the stages a rank and the schedules that there are with so many of them."""
    counts = job.search.stages_per_rank or (1, 2, 4)
    names = job.search.schedule
    assert names, "say which schedules: orders of their own are not enumerated"
    found = [
        (v, name)
        for v in counts
        for name in names
        if SCHEDULES[name].takes(v) and pp * v <= job.model.num_layers
    ]
    if pp > 1:
        return found
    # One stage on one rank: all orders are one.
    alone = [name for v, name in found if v == 1]
    return [(1, "1f1b" if "1f1b" in alone else alone[0])] if alone else []


def _of_start(
    job: Job, costs: Costs, stages: Callable[[Layout], tuple[StageCost, ...]], start: Layout
) -> Iterator[Exact | None]:
    """Yield the layouts of one start and schedule; None for one that does not fit."""
    order = schedule_of(start)
    base = replace(start, stage_layers=dealt(costs, start, order))
    is_ours = costs.is_of_executor
    saves = costs.stack.selective == "operators" or costs.stack.attention == "unfused"
    kinds: Sequence[Recompute] = job.search.recompute or (
        ("none", "selective", "full") if saves else ("none", "full")
    )
    if is_ours:
        kinds = ("none",)
    for sharding, group in _shardings(job, base, is_ours=is_ours):
        sharded = replace(base, sharding=sharding, shard_group=group)
        for kind in kinds:
            layout = _squeezed(job, costs, replace(sharded, recompute=kind), order, kinds)
            if layout is None:
                yield None
                continue
            (step,) = predict_steps(order, [stages(replace(layout, schedule=""))])
            yield Exact(layout, step.p50_ns, max(_totals(costs, layout, order)))


def _shardings(job: Job, base: Layout, *, is_ours: bool) -> list[tuple[Sharding, int]]:
    """Return each sharding that replicas may have, with each group that it may have."""
    kinds = job.search.sharding or EVERY_SHARDING
    found: list[tuple[Sharding, int]] = []
    for kind in kinds:
        if kind == "none":
            found.append((kind, 0))
        for group in range(2, base.replicas + 1):
            fits = base.replicas % group == 0 and group % base.ep == 0
            if kind != "none" and fits and group in (job.search.shard_group or [group]):
                found.append((kind, 0 if group == base.replicas else group))
    if is_ours or base.replicas == 1:
        return [each for each in found if each[0] == "none"]
    return found


def dealt(costs: Costs, start: Layout, order: Schedule) -> tuple[int, ...]:
    """Return the layers of each stage: one after the other goes where it is done first.

    A rank has a layer for each of its stages; then the rank that stays fastest gets the next one,
    the last among equals, and so do its stages.
    """
    parts, homes = costs.parts(start), order.homes.tolist()
    extra = [0.0] * len(homes)
    extra[0] += parts.first_forward + parts.first_backward
    extra[-1] += parts.last_forward + parts.last_backward
    layer = parts.layer_forward + parts.layer_backward

    def by_hand(count: int, least: int, more: Sequence[float]) -> list[int]:
        held = [least] * len(more)
        for _ in range(count - sum(held)):
            held[min(range(len(more)), key=lambda n: (held[n] * layer + more[n], -n))] += 1
        return held

    own = [[s for s, home in enumerate(homes) if home == rank] for rank in range(start.pp)]
    works = [sum(extra[stage] for stage in stages) for stages in own]
    layers = [0] * len(homes)
    for stages, count in zip(
        own, by_hand(costs.model.num_layers, start.stages_per_rank, works), strict=True
    ):
        counts = by_hand(count, 1, [extra[stage] for stage in stages])
        for stage, number in zip(stages, counts, strict=True):
            layers[stage] = number
    return tuple(layers)


def _squeezed(
    job: Job, costs: Costs, layout: Layout, order: Schedule, kinds: Sequence[Recompute]
) -> Layout | None:
    """Return `layout` with as few recomputed layers as make it fit, None where none do.

    Where nothing needs to be recomputed it is the layout that recomputes nothing.
    """
    (pool,) = job.cluster.pools
    room = pool.gpu.memory_bytes
    if "none" not in kinds or layout.recompute == "none":
        return layout if max(_totals(costs, layout, order)) <= room else None
    plain = replace(layout, recompute="none")
    if max(_totals(costs, plain, order)) <= room:
        return plain
    counts = [-1] * layout.pp
    for count in range(max(layout.stage_layers) + 1):
        again = tuple(min(count, held) for held in layout.stage_layers)
        totals = _totals(costs, replace(layout, recompute_layers=again), order)
        for rank, total in enumerate(totals):
            if counts[rank] < 0 and total <= room:
                counts[rank] = count
    if min(counts) < 0:
        return None
    return replace(
        layout,
        recompute_layers=tuple(
            min(counts[home], held)
            for home, held in zip(order.homes.tolist(), layout.stage_layers, strict=True)
        ),
    )


def _totals(costs: Costs, layout: Layout, order: Schedule) -> list[int]:
    context = costs.context_bytes(layout)
    ranks = peak_memory(costs.model, costs.workload, layout, order, costs.stack, context)
    return [rank.total for rank in ranks]


@lru_cache(maxsize=4096)
def _built(name: str, pp: int, num_microbatches: int, v: int) -> Schedule:
    return SCHEDULES[name].build(pp, num_microbatches, v)


def schedule_of(layout: Layout) -> Schedule:
    """Return the schedule of a layout in full."""
    return _built(layout.schedule, layout.pp, layout.num_microbatches, layout.stages_per_rank)
