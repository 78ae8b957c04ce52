"""What one layout takes, part by part: its step, and the rank where memory is tightest.

Accounts are what explanations lay side by side. Their parts are those of `planner.waterfall`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from planner.evaluate import Basis, Costs, basis_of, evaluate
from planner.layout import Layout
from planner.lower import MEDIAN, predict_step, stage_times
from planner.orders import order_of
from planner.partition import dealt_stages, homes_of
from planner.plan import Candidate, PeakMemory, StageCost
from planner.schedules import SCHEDULES
from planner.search import SearchResult
from planner.waterfall import PARTS_WITHOUT_PEAK, sums_of
from profiles.job import Job
from profiles.profile import Cost
from simulator.engine import simulate_step
from simulator.idle import stream_uses
from simulator.schedule import Schedule

SHORT = 4
"""Times its warm-up, from which on an order is simulated short, and the rest of it counted."""


class World(Protocol):
    """Where layouts can be tried: costs and searches of this job, and of any other."""

    def costs(self, job: Job, /) -> Costs:
        """Return the costs of `job`."""

    def search(self, job: Job, /) -> SearchResult:
        """Return what is found for `job`; raises InfeasibleError where nothing fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tightest:
    """The pipeline rank of a layout that needs most memory, and what it has."""

    rank: int
    stages: tuple[int, ...]
    memory: PeakMemory
    limit_bytes: int

    @property
    def excess_bytes(self) -> int:
        """What it needs beyond what it has; negative where it fits."""
        return self.memory.total - self.limit_bytes

    @property
    def holdings(self) -> tuple[tuple[str, int], ...]:
        """What its memory is held by at the peak, the largest first, in bytes.

        >>> held = PeakMemory(parameters=5, gradients=1, optimizer=2, activations=9, temporary=1,
        ...                   context=3)
        >>> Tightest(rank=0, stages=(0,), memory=held, limit_bytes=20).holdings[:2]
        (('activations', 9), ('parameters', 5))
        """
        memory = self.memory
        at_peak = {"activations": memory.activations, "temporary": memory.temporary}
        if memory.update > sum(at_peak.values()):
            at_peak = {"update": memory.update}
        names = ("parameters", "gradients", "optimizer", "buffers", "reserve", "context")
        held = at_peak | {name: getattr(memory, name) for name in names}
        return tuple(sorted(((n, b) for n, b in held.items() if b), key=lambda part: -part[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One layout with its step, the parts of the step in ns, and its tightest rank."""

    text: str
    layout: Layout
    step: Cost
    parts_ns: Mapping[str, int]
    tightest: Tightest

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory that it needs."""
        return self.tightest.excess_bytes <= 0


def account_of(job: Job, costs: Costs, layout: Layout, schedule: Schedule | None = None) -> Account:
    """Return the account of `layout`; `schedule` is its order where that has no name.

    Raises UnsupportedError where nobody knows what it takes.
    """
    basis = basis_of(job, costs)
    stages = costs.stages(layout, () if schedule is None else schedule.homes.tolist())
    if schedule is None:
        (found,) = evaluate(basis, [layout])
        step, order = found.step, order_of(layout).sample()
    else:
        step, order = timed(basis, layout, schedule).step, schedule
    return Account(
        text=str(layout),
        layout=layout,
        step=step,
        parts_ns=parts_ns(layout, stages, step.p50_ns, schedule),
        tightest=_tightest(basis, layout, order),
    )


def timed(basis: Basis, layout: Layout, schedule: Schedule) -> Candidate:
    """Return `layout` under an order that was made for it."""
    stages = basis.costs.stages(layout, schedule.homes.tolist())
    return basis.candidate(layout, schedule, predict_step(schedule, stages))


def parts_ns(
    layout: Layout, stages: tuple[StageCost, ...], step_ns: int, schedule: Schedule | None = None
) -> Mapping[str, int]:
    """Return the parts of a step of `step_ns` by name, those of the mean pipeline rank.

    They sum to the step. An order that repeats is simulated as far as it takes to repeat; each
    micro-batch more is as much work and exchange again, and what is left of the step is the
    pipeline's.
    """
    order = _short(layout) if schedule is None else schedule
    simulation = simulate_step(order, stage_times(order, [stages]), lane=MEDIAN)
    sums = dict(sums_of(stream_uses(simulation), stages, order.num_microbatches))
    more = layout.num_microbatches - order.num_microbatches
    for cost in stages:
        exchange_ns = cost.tensor_parallel_forward_ns + cost.tensor_parallel_backward_ns
        sums["exchange"] += more * exchange_ns
        sums["work"] += more * (cost.forward.p50_ns + cost.backward.p50_ns - exchange_ns)
    parts = {name: round(sums[name] / layout.pp) for name in PARTS_WITHOUT_PEAK}
    parts["pipeline"] += step_ns - sum(parts.values())
    return parts


def _short(layout: Layout) -> Schedule:
    """Return the order of `layout`, with fewer micro-batches where it repeats."""
    order = order_of(layout)
    if not order.period or order.num_microbatches < SHORT * order.steady_from:
        return order.whole()
    num_left_over = (order.num_microbatches - order.steady_from) % order.period
    return order.build(order.steady_from + order.period + num_left_over)


def _tightest(basis: Basis, layout: Layout, schedule: Schedule) -> Tightest:
    memory = basis.memory(layout, schedule)
    more = basis.more_bytes(layout.pp)
    rank = max(range(len(memory)), key=lambda each: (memory[each].total - more[each], -each))
    homes = schedule.homes.tolist()
    return Tightest(
        rank=rank,
        stages=tuple(stage for stage, home in enumerate(homes) if home == rank),
        memory=memory[rank],
        limit_bytes=basis.limit_bytes + more[rank],
    )


def dealt(layout: Layout, num_layers: int, costs: Costs) -> Layout:
    """Return `layout` with its layers dealt to its stages so that the slowest rank is fastest."""
    if layout.num_stages == 1:
        return replace(layout, stage_layers=(num_layers,), recompute_layers=())
    layout = replace(layout, stage_layers=(0,) * layout.num_stages, recompute_layers=())
    homes = homes_of(layout.pp, layout.stages_per_rank, SCHEDULES[layout.schedule].homes)
    parts = [costs.parts(layout, rank) for rank in range(layout.pp)]
    layer_ns, first_ns, last_ns = (
        np.array([[getattr(each, f"{where}_forward") + getattr(each, f"{where}_backward")
                   for each in parts]])
        for where in ("layer", "first", "last")
    )  # fmt: skip
    first_ns, last_ns = first_ns[:, 0], last_ns[:, homes[-1]]
    layers = dealt_stages(num_layers, homes, layer_ns, first_ns, last_ns)[0].tolist()
    return replace(layout, stage_layers=tuple(layers))


_TRAITS: Mapping[str, Callable[[Layout], object]] = {
    "tp": lambda layout: layout.tp,
    "pp": lambda layout: layout.pp,
    "cp": lambda layout: layout.cp,
    "ep": lambda layout: layout.ep,
    "dp": lambda layout: layout.dp,
    "micro-batch": lambda layout: layout.micro_batch,
    "schedule": lambda layout: _schedule_words(layout),
    "sharding": lambda layout: _sharding_words(layout),
    "recompute": lambda layout: _recompute_words(layout),
    "sequence parallelism": lambda layout: "on" if layout.sequence_parallel else "off",
    "order": lambda layout: layout.order,
}


def traits(layout: Layout) -> Mapping[str, str]:
    """Return what there is to tell of a layout, in words, by axis.

    >>> sample = Layout(dp=2, tp=2, pp=2, micro_batch=1, num_microbatches=4, stage_layers=(3, 3))
    >>> found = traits(sample)
    >>> found["schedule"], found["sharding"], found["sequence parallelism"]
    ('1f1b', 'none', 'off')
    """
    return {name: str(read(layout)) for name, read in _TRAITS.items()}


def differences(old: Layout, new: Layout) -> tuple[str, ...]:
    """Return in words where `new` is another than `old`; the split into stages does not count.

    >>> sample = Layout(dp=4, tp=2, pp=1, micro_batch=1, num_microbatches=4, stage_layers=(6,))
    >>> differences(sample, replace(sample, dp=2, tp=4))
    ('tp 2 -> 4', 'dp 4 -> 2')
    """
    before, after = traits(old), traits(new)
    return tuple(f"{n} {before[n]} -> {after[n]}" for n in before if before[n] != after[n])


def _schedule_words(layout: Layout) -> str:
    if layout.pp == 1:
        return "none"
    has_several = layout.schedule not in SCHEDULES or not SCHEDULES[layout.schedule].stages_per_rank
    return f"{layout.schedule} v={layout.stages_per_rank}" if has_several else layout.schedule


def _sharding_words(layout: Layout) -> str:
    is_whole = layout.sharding == "none" or layout.shard_ranks == layout.replicas
    return layout.sharding if is_whole else f"{layout.sharding}:{layout.shard_ranks}"


def _recompute_words(layout: Layout) -> str:
    again = sum(layout.recompute_layers)
    return f"{layout.recompute}:{again}" if layout.recompute_layers else layout.recompute
