"""The candidates: every layout of the ranks that is legal, and the reason why others are not."""

from collections.abc import Iterable, Iterator
from functools import cache
from math import isqrt
from typing import NamedTuple

from planner.cost import CostModel, total
from planner.layout import RUNNABLE_SCHEDULES, Layout
from planner.orders import MAX_CELLS
from planner.partition import balanced_stages
from planner.plan import Rejection
from planner.schedules import SCHEDULES
from profiles.job import Job
from profiles.model import ModelSpec
from simulator.schedule import MAX_STAGES

SYNTHESISED = "synthesised"
"""The schedule of a layout whose order was made for it, beside those that have a name."""
DEFAULT_STAGES_PER_RANK = (1, 2, 4)


class _Pipeline(NamedTuple):
    """How a pipeline runs: the name of its order, and the stages of each rank."""

    schedule: str
    stages_per_rank: int


def schedules_of(job: Job) -> tuple[str, ...]:
    """Return the schedules that the ranking may hold.

    Without a limit, they are those that can be run where the job is for this machine, and all that
    have a name and the synthesised where it is not.
    """
    everything = (*SCHEDULES, SYNTHESISED)
    return job.search.schedule or (RUNNABLE_SCHEDULES if job.cluster.is_local else everything)


def candidates(job: Job, costs: CostModel) -> tuple[list[Layout], list[Rejection]]:
    """Return the legal layouts of the job's ranks, and why the others are not.

    The axes are dp x tp x pp, the stages of a rank, the schedules and the micro-batches. Schedules
    are named ones: those of `schedules_of`, and all of them where orders are to be synthesised,
    which needs every layout that there is to start from.
    """
    partition = cache(lambda *key: _partition(costs, *key))
    layouts: list[Layout] = []
    rejections: list[Rejection] = []
    for dp, tp, pp in _degrees(job.cluster.num_ranks):
        if rejection := _rejection(job, dp, tp, pp):
            rejections.append(rejection)
            continue
        pipelines, refused = _pipelines(job, dp, tp, pp)
        rejections += refused
        share = job.workload.global_batch // dp
        for micro_batch in _micro_batches(share, job.search.micro_batch):
            num_microbatches = share // micro_batch
            for stages_per_rank, schedules in pipelines.items():
                num_stages = pp * stages_per_rank
                if reason := _too_long(num_stages, num_microbatches):
                    name = _name(dp, tp, pp, stages_per_rank)
                    layout = f"{name},mb={micro_batch}x{num_microbatches}"
                    rejections.append(Rejection(layout=layout, rule="length", reason=reason))
                    continue
                layouts += [
                    Layout(
                        dp=dp,
                        tp=tp,
                        pp=pp,
                        micro_batch=micro_batch,
                        num_microbatches=num_microbatches,
                        stage_layers=partition(tp, micro_batch, num_stages),
                        schedule=schedule,
                        stages_per_rank=stages_per_rank,
                    )
                    for schedule in schedules
                ]
    return layouts, rejections


def _degrees(num_ranks: int) -> Iterator[tuple[int, int, int]]:
    """Yield every (dp, tp, pp) whose product is `num_ranks`."""
    divisors = _divisors(num_ranks)
    for tp in divisors:
        for pp in divisors:
            if num_ranks % (tp * pp) == 0:
                yield num_ranks // (tp * pp), tp, pp


def _divisors(number: int) -> list[int]:
    """Return the divisors of `number`, in rising order."""
    low = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def _rejection(job: Job, dp: int, tp: int, pp: int) -> Rejection | None:
    """Return why no layout of these degrees is legal, or None."""
    model, name = job.model, f"dp={dp},tp={tp},pp={pp}"
    limits = (("dp", dp, job.search.dp), ("tp", tp, job.search.tp), ("pp", pp, job.search.pp))
    for axis, value, allowed in limits:
        if allowed and value not in allowed:
            reason = f"{axis} is {value}; search.{axis} allows {_options(allowed)}"
            return Rejection(layout=name, rule="search limits", reason=reason)
    for what, count in _tp_divides(model):
        if count % tp:
            options = _options(n for n in range(1, count + 1) if count % n == 0)
            reason = (
                f"tp is {tp}, but the model has {count} {what}; tp must divide them ({options})"
            )
            return Rejection(layout=name, rule="divisibility", reason=reason)
    if pp > model.num_layers:
        reason = f"pp is {pp}, but the model has {model.num_layers} layers; a stage needs one"
        return Rejection(layout=name, rule="divisibility", reason=reason)
    if job.workload.global_batch % dp:
        reason = (
            f"dp is {dp}, but workload.global_batch is {job.workload.global_batch} sequences; "
            "dp must divide them"
        )
        return Rejection(layout=name, rule="divisibility", reason=reason)
    if model.tied_embeddings and (pp > 1 or tp > 1):
        reason = "tied embeddings need both ends of the model on one rank; use tp=1 and pp=1"
        return Rejection(layout=name, rule="tied embeddings", reason=reason)
    return None


def _tp_divides(model: ModelSpec) -> tuple[tuple[str, int], ...]:
    return (
        ("kv heads", model.num_kv_heads),
        ("heads", model.num_heads),
        ("MLP columns", model.ffn),
        ("vocabulary rows", model.vocab),
    )


def _options(values: Iterable[object]) -> str:
    found = [str(value) for value in values]
    return ", ".join(found if len(found) <= 8 else [*found[:7], "...", found[-1]])


def _pipelines(job: Job, dp: int, tp: int, pp: int) -> tuple[list[_Pipeline], list[Rejection]]:
    """Return the pipelines to try at these degrees, and why others are not."""
    limits, degrees = job.search, f"dp={dp},tp={tp},pp={pp}"
    names = limits.schedule or (RUNNABLE_SCHEDULES if job.cluster.is_local else tuple(SCHEDULES))
    counts = limits.stages_per_rank or DEFAULT_STAGES_PER_RANK
    if pp == 1:
        return _without_pipeline(names, counts, degrees)
    pipelines, refused = [], []
    for count in counts:
        taken = [_Pipeline(name, count) for name in names if SCHEDULES[name].takes(count)]
        if not taken and limits.stages_per_rank:
            rule = "search limits"
            reason = f"no schedule among {_options(names)} has {count} stages a rank"
        elif taken and pp * count > job.model.num_layers:
            rule = "divisibility"
            reason = (
                f"pp is {pp} with {count} stages a rank, but the model has "
                f"{job.model.num_layers} layers; a stage needs one"
            )
        else:
            pipelines += taken
            continue
        refused.append(Rejection(layout=f"{degrees},v={count}", rule=rule, reason=reason))
    return pipelines, refused


def _without_pipeline(
    names: tuple[str, ...], counts: tuple[int, ...], layout: str
) -> tuple[list[_Pipeline], list[Rejection]]:
    """Return the one order of one stage on one rank: all are alike, and 1F1B holds least."""
    taken = [name for name in names if SCHEDULES[name].takes(1)]
    if taken and 1 in counts:
        return [_Pipeline("1f1b" if "1f1b" in taken else taken[0], 1)], []
    what, allowed = ("stages_per_rank", counts) if taken else ("schedule", names)
    reason = f"pp is 1, which is one stage a rank; search.{what} allows {_options(allowed)} only"
    return [], [Rejection(layout=layout, rule="search limits", reason=reason)]


def _micro_batches(share: int, allowed: tuple[int, ...]) -> list[int]:
    """Return the micro-batches that divide the sequences of a replica, smallest first."""
    return [n for n in allowed or range(1, share + 1) if share % n == 0]


def _partition(costs: CostModel, tp: int, micro_batch: int, num_stages: int) -> tuple[int, ...]:
    """Return the layers of each stage, so that the slowest stage is as fast as it can be."""
    num_layers = costs.model.num_layers
    if num_stages == 1:
        return (num_layers,)
    shape = costs.shape(tp, micro_batch)
    layer, first, last = (
        total((work.forward, work.backward)).p50_ns
        for work in (costs.layer(shape), *costs.edges(shape))
    )
    return balanced_stages(num_layers, num_stages, layer, first, last)
