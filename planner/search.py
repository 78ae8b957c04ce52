"""The search: every layout of the ranks, timed by its full schedule or rejected with a reason."""

from collections.abc import Iterator
from dataclasses import dataclass

from planner.cost import CostModel, cost_model, total
from planner.layout import Layout, ScheduleName
from planner.lower import predict_step
from planner.memory import stage_memory
from planner.partition import balanced_stages
from planner.plan import (
    PLAN_SCHEMA_VERSION,
    Candidate,
    Plan,
    ProfileReference,
    Rejection,
    seal,
)
from planner.schedule import SCHEDULES
from profiles.errors import UnsupportedError
from profiles.files import digest
from profiles.job import Job, SearchLimits
from profiles.machine import known_gpu
from profiles.model import ModelSpec
from profiles.profile import Profile
from profiles.quantity import format_quantity


class InfeasibleError(ValueError):
    """No layout fits; the message names the binding constraint and the smallest relaxation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """All layouts that fit, fastest first, and all others with the reason of each."""

    ranking: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]


def search(job: Job, profile: Profile) -> SearchResult:
    """Return every layout of the job's ranks over dp x tp x pp, micro-batches and schedules.

    Ties go to less memory, then to the layout's text. Raises UnsupportedError for a model that
    the cost model does not cover, and InfeasibleError when nothing fits.
    """
    _check_supported(job, profile)
    costs = cost_model(job.model, job.workload, job.stack, profile)
    ranking, rejections, needs = [], [], []
    for degrees in _degrees(job.cluster.num_ranks):
        if rejection := _rejection(job, *degrees):
            rejections.append(rejection)
            continue
        for layout in _layouts(job, costs, *degrees):
            candidate = _evaluate(job, costs, layout, profile.context_bytes)
            limit_bytes = min(pool.gpu.memory_bytes for pool in job.cluster.pools)
            if candidate.peak_bytes > limit_bytes:
                needs.append(candidate)
                rejections.append(_out_of_memory(candidate, limit_bytes))
            else:
                ranking.append(candidate)
    if not ranking:
        raise _infeasible(job, rejections, needs)
    ranking.sort(key=lambda c: (c.step.p50_ns, c.peak_bytes, str(c.layout)))
    return SearchResult(ranking=tuple(ranking), rejections=tuple(rejections))


def make_plan(
    job: Job, profile: Profile, profile_path: str, result: SearchResult, chosen: int, version: str
) -> Plan:
    """Return the plan of the `chosen` place of the ranking, sealed."""
    layout = result.ranking[chosen].layout
    schedule = SCHEDULES[layout.schedule](layout.pp, layout.num_microbatches)
    costs = cost_model(job.model, job.workload, job.stack, profile)
    return seal(
        schema_version=PLAN_SCHEMA_VERSION,
        tool_version=version,
        seed=job.seed,
        model=job.model,
        workload=job.workload,
        cluster=job.cluster,
        stack=job.stack,
        profile=ProfileReference(
            path=profile_path,
            digest=digest(profile),
            device=profile.device,
            versions=profile.versions,
            measured_at=profile.measured_at,
            reference_ns=costs.table.reference(job.workload.dtype).p50_ns,
        ),
        layout=layout,
        schedule=tuple(str(schedule).splitlines()),
        costs=costs.stages(layout),
        memory=stage_memory(
            job.model, job.workload, layout, schedule, job.stack, profile.context_bytes
        ),
        step=result.ranking[chosen].step,
        ranking=result.ranking,
        chosen=chosen,
        num_layouts=len(result.ranking) + len(result.rejections),
        rejections=result.rejections,
    )


def best_of_each_kind(result: SearchResult) -> tuple[int, ...]:
    """Return the places of the best layout of each (dp, tp, pp, schedule), best first."""
    seen: dict[tuple[int, int, int, str], int] = {}
    for place, candidate in enumerate(result.ranking):
        layout = candidate.layout
        schedule = layout.schedule if layout.pp > 1 else ""
        seen.setdefault((layout.dp, layout.tp, layout.pp, schedule), place)
    return tuple(sorted(seen.values()))


def _check_supported(job: Job, profile: Profile) -> None:
    if not job.model.is_llama_like:
        raise UnsupportedError(
            f"model {job.model.name} has {job.model.norm}, {job.model.mlp} and "
            f"{job.model.positions} positions; the cost model covers LLaMA-like decoders "
            "(rmsnorm, swiglu, rope, no biases)"
        )
    wanted = job.cluster.local_device
    if not wanted:
        _check_same_gpu(job, profile)
    elif profile.device.kind != wanted:
        raise UnsupportedError(
            f"the profile measured {profile.device.kind}, the job asks for {wanted}; measure it "
            f"with `layline profile --device {wanted}`, or set cluster.device"
        )
    if profile.device.num_ranks < job.cluster.num_ranks:
        raise UnsupportedError(
            f"the profile measured {profile.device.num_ranks} ranks of {profile.device.name}, the "
            f"job asks for {job.cluster.num_ranks}; profile as many, or set cluster.ranks lower"
        )


def _check_same_gpu(job: Job, profile: Profile) -> None:
    """Raise UnsupportedError when the profile is known to be of other GPUs than the cluster's."""
    measured = known_gpu(profile.device.name)
    for pool in job.cluster.pools:
        is_other = measured is not None and measured.name != pool.gpu.name
        if profile.device.kind == "cpu" or is_other:
            raise UnsupportedError(
                f"the profile measured {profile.device.name} ({profile.device.kind}), the cluster "
                f"has {pool.gpu.name}; run `layline profile -o FILE` on one of its nodes and set "
                "profile to that file"
            )


def _degrees(num_ranks: int) -> Iterator[tuple[int, int, int]]:
    """Yield every (dp, tp, pp) whose product is `num_ranks`."""
    divisors = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
    for tp in divisors:
        for pp in divisors:
            if num_ranks % (tp * pp) == 0:
                yield num_ranks // (tp * pp), tp, pp


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


def _options(values: Iterator[int] | tuple[int, ...]) -> str:
    found = [str(value) for value in values]
    return ", ".join(found if len(found) <= 8 else [*found[:7], "...", found[-1]])


def _layouts(job: Job, costs: CostModel, dp: int, tp: int, pp: int) -> Iterator[Layout]:
    """Yield the layouts of these degrees: every micro-batch that divides, every schedule."""
    share = job.workload.global_batch // dp
    limits = job.search
    for micro_batch in range(1, share + 1):
        if share % micro_batch or not _allowed(limits.micro_batch, micro_batch):
            continue
        layers = _partition(costs, tp, micro_batch, pp)
        for schedule in _schedules(limits, pp):
            yield Layout(
                dp=dp,
                tp=tp,
                pp=pp,
                micro_batch=micro_batch,
                num_microbatches=share // micro_batch,
                stage_layers=layers,
                schedule=schedule,
            )


def _schedules(limits: SearchLimits, pp: int) -> list[ScheduleName]:
    """Return the schedules to try; without a pipeline all orders are one, and 1F1B holds least."""
    names: list[ScheduleName] = ["1f1b", "gpipe"]
    allowed = [name for name in names if not limits.schedule or name in limits.schedule]
    return allowed if pp > 1 else allowed[:1]


def _allowed(limit: tuple[int, ...], value: int) -> bool:
    return not limit or value in limit


def _partition(costs: CostModel, tp: int, micro_batch: int, pp: int) -> tuple[int, ...]:
    """Return the layers of each stage, so that the slowest stage is as fast as it can be."""
    num_layers = costs.model.num_layers
    if pp == 1:
        return (num_layers,)
    shape = costs.shape(tp, micro_batch)
    first, last = (total(edge).p50_ns for edge in costs.edges(shape))
    return balanced_stages(num_layers, pp, total(costs.layer(shape)).p50_ns, first, last)


def _evaluate(job: Job, costs: CostModel, layout: Layout, context_bytes: int) -> Candidate:
    schedule = SCHEDULES[layout.schedule](layout.pp, layout.num_microbatches)
    memory = stage_memory(job.model, job.workload, layout, schedule, job.stack, context_bytes)
    return Candidate(
        layout=layout,
        step=predict_step(schedule, costs.stages(layout)),
        peak_bytes=max(stage.total for stage in memory),
    )


def _out_of_memory(candidate: Candidate, limit_bytes: int) -> Rejection:
    need, have = (format_quantity(n, "bytes") for n in (candidate.peak_bytes, limit_bytes))
    return Rejection(
        layout=str(candidate.layout), rule="memory", reason=f"needs {need} a rank, has {have}"
    )


def _infeasible(job: Job, rejections: list[Rejection], needs: list[Candidate]) -> InfeasibleError:
    """Return the error that names what binds and the least that would have to give."""
    if needs:
        least = min(needs, key=lambda c: c.peak_bytes)
        need = format_quantity(least.peak_bytes, "bytes")
        return InfeasibleError(
            f"no layout of {job.cluster.num_ranks} ranks fits: memory binds. The smallest, "
            f"{least.layout}, needs {need} a rank; give a rank that much, add ranks, or shorten "
            "workload.seq_len"
        )
    reasons = "; ".join(f"{r.layout}: {r.reason}" for r in rejections[:4])
    more = f" (and {len(rejections) - 4} more)" if len(rejections) > 4 else ""
    return InfeasibleError(
        f"no layout of {job.cluster.num_ranks} ranks is legal: {reasons or 'search limits'}{more}"
    )
