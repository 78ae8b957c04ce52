"""The candidates: every layout of the ranks that is legal, and the reason why others are not."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from math import isqrt
from typing import NamedTuple

from planner.evaluate import Costs
from planner.layout import LOCAL_SCHEDULES, Layout
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
    """How a pipeline may run: the stages of each rank, and the names of their orders."""

    stages_per_rank: int
    schedules: tuple[str, ...]


class _Degrees(NamedTuple):
    """The size of the mesh along each axis."""

    dp: int
    tp: int
    pp: int

    def __str__(self) -> str:
        return f"dp={self.dp},tp={self.tp},pp={self.pp}"


def schedules_of(job: Job) -> tuple[str, ...]:
    """Return the schedules that the ranking may hold.

    Without a limit, they are `LOCAL_SCHEDULES` where the job is for this machine, and all that have
    a name and the synthesised where it is not.
    """
    everything = (*SCHEDULES, SYNTHESISED)
    return job.search.schedule or (LOCAL_SCHEDULES if job.cluster.is_local else everything)


def candidates(job: Job, costs: Costs) -> tuple[list[Layout], list[Rejection]]:
    """Return the legal layouts of the job's ranks, and why the others are not.

    The axes are dp x tp x pp, the stages of a rank, the schedules and the micro-batches. Schedules
    are named ones: those of `schedules_of`, and all of them where orders are to be synthesised,
    which needs every layout that there is to start from.
    """
    # The pipelines of a start differ in their stages, not in what a layer takes.
    balance_ns = cache(costs.balance_ns)
    layouts: list[Layout] = []
    rejections: list[Rejection] = []
    for degrees in _degrees(job.cluster.num_ranks):
        if rejection := _rejection(job, degrees, is_of_executor=costs.is_of_executor):
            rejections.append(rejection)
            continue
        pipelines, refused = _pipelines(job, degrees)
        rejections += refused
        share = job.workload.global_batch // degrees.dp
        for micro_batch in _micro_batches(share, job.search.micro_batch):
            start = costs.completed(_start(degrees, micro_batch, share // micro_batch))
            for pipeline in pipelines:
                if rejection := _too_long(start, pipeline):
                    rejections.append(rejection)
                    continue
                layouts += _layouts(costs.model, start, pipeline, balance_ns)
    return layouts, rejections


def _start(degrees: _Degrees, micro_batch: int, num_microbatches: int) -> Layout:
    """Return a layout of `degrees` whose stages are still to be dealt out."""
    return Layout(
        dp=degrees.dp,
        tp=degrees.tp,
        pp=degrees.pp,
        micro_batch=micro_batch,
        num_microbatches=num_microbatches,
        stage_layers=(0,) * degrees.pp,
    )


def _layouts(
    model: ModelSpec,
    start: Layout,
    pipeline: _Pipeline,
    balance_ns: Callable[[Layout], tuple[int, int, int]],
) -> list[Layout]:
    """Return one layout for each order of the pipeline, the slowest stage as fast as it can be."""
    num_stages = start.pp * pipeline.stages_per_rank
    layers: tuple[int, ...] = (model.num_layers,)
    if num_stages > 1:
        layers = balanced_stages(model.num_layers, num_stages, *balance_ns(start))
    return [
        replace(
            start,
            stage_layers=layers,
            schedule=schedule,
            stages_per_rank=pipeline.stages_per_rank,
        )
        for schedule in pipeline.schedules
    ]


def _degrees(num_ranks: int) -> Iterator[_Degrees]:
    """Yield all degrees whose product is `num_ranks`."""
    divisors = _divisors(num_ranks)
    for tp in divisors:
        for pp in divisors:
            if num_ranks % (tp * pp) == 0:
                yield _Degrees(num_ranks // (tp * pp), tp, pp)


def _divisors(number: int) -> list[int]:
    """Return the divisors of `number`, in rising order."""
    low = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def _rejection(job: Job, degrees: _Degrees, *, is_of_executor: bool) -> Rejection | None:
    """Return why no layout of these degrees is legal, or None."""
    model, name, (dp, tp, pp) = job.model, str(degrees), degrees
    for axis, value in degrees._asdict().items():
        allowed = getattr(job.search, axis)
        if allowed and value not in allowed:
            reason = f"{axis} is {value}; search.{axis} allows {_options(allowed)}"
            return Rejection(layout=name, rule="search limits", reason=reason)
    for what, count in _tp_divides(model, pads_vocabulary=not is_of_executor):
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
    if model.tied_embeddings and is_of_executor and (pp > 1 or tp > 1):
        reason = "tied embeddings need both ends of the model on one rank; use tp=1 and pp=1"
        return Rejection(layout=name, rule="tied embeddings", reason=reason)
    return None


def _tp_divides(model: ModelSpec, *, pads_vocabulary: bool) -> tuple[tuple[str, int], ...]:
    counts = (
        ("kv heads", model.num_kv_heads),
        ("heads", model.num_heads),
        ("MLP columns", model.ffn),
        ("vocabulary rows", model.vocab),
    )
    return counts[:-1] if pads_vocabulary else counts


def _options(values: Iterable[object]) -> str:
    found = [str(value) for value in values]
    return ", ".join(found if len(found) <= 8 else [*found[:7], "...", found[-1]])


def _pipelines(job: Job, degrees: _Degrees) -> tuple[list[_Pipeline], list[Rejection]]:
    """Return the pipelines to try at these degrees, and why others are not."""
    limits, names = job.search, schedules_of(job)
    counts = limits.stages_per_rank or DEFAULT_STAGES_PER_RANK
    if degrees.pp == 1:
        return _without_pipeline(names, counts, str(degrees))
    starts = tuple(SCHEDULES) if SYNTHESISED in names else names
    pipelines, refused = [], []
    for count in counts:
        taken = tuple(name for name in starts if SCHEDULES[name].takes(count))
        if not taken and limits.stages_per_rank:
            rule = "search limits"
            reason = f"no schedule among {_options(names)} has {count} stages a rank"
        elif taken and degrees.pp * count > job.model.num_layers:
            rule = "divisibility"
            reason = (
                f"pp is {degrees.pp} with {count} stages a rank, but the model has "
                f"{job.model.num_layers} layers; a stage needs one"
            )
        else:
            pipelines += [_Pipeline(count, taken)] if taken else []
            continue
        refused.append(Rejection(layout=f"{degrees},v={count}", rule=rule, reason=reason))
    return pipelines, refused


def _without_pipeline(
    names: tuple[str, ...], counts: tuple[int, ...], layout: str
) -> tuple[list[_Pipeline], list[Rejection]]:
    """Return the one order of one stage on one rank: all are alike, and 1F1B holds least."""
    taken = [name for name in names if name in SCHEDULES and SCHEDULES[name].takes(1)]
    if taken and 1 in counts:
        return [_Pipeline(1, ("1f1b" if "1f1b" in taken else taken[0],))], []
    what, allowed = ("stages_per_rank", counts) if taken else ("schedule", names)
    reason = f"pp is 1, which is one stage a rank; search.{what} allows {_options(allowed)} only"
    return [], [Rejection(layout=layout, rule="search limits", reason=reason)]


def _too_long(start: Layout, pipeline: _Pipeline) -> Rejection | None:
    """Return why no plan can write out the orders of a pipeline, or None."""
    num_microbatches = start.num_microbatches
    num_stages = start.pp * pipeline.stages_per_rank
    if num_stages <= MAX_STAGES and num_stages * num_microbatches <= MAX_CELLS:
        return None
    stages = f",v={pipeline.stages_per_rank}" if pipeline.stages_per_rank > 1 else ""
    reason = (
        f"{num_microbatches} micro-batches on {num_stages} stages; a plan writes out what each "
        f"stage does with each, for {MAX_STAGES} stages and {MAX_CELLS} pairs of the two at most; "
        "take a larger micro-batch"
    )
    degrees = _Degrees(start.dp, start.tp, start.pp)
    return Rejection(
        layout=f"{degrees}{stages},mb={start.micro_batch}x{num_microbatches}",
        rule="length",
        reason=reason,
    )


def _micro_batches(share: int, allowed: tuple[int, ...]) -> list[int]:
    """Return the micro-batches that divide the sequences of a replica, smallest first."""
    return [n for n in allowed or _divisors(share) if share % n == 0]
