"""The search: every layout of the ranks, timed by its full schedule or rejected with a reason."""

from collections.abc import Mapping
from dataclasses import dataclass

from planner.candidates import SYNTHESISED, candidates, schedules_of
from planner.cost import cost_model
from planner.evaluate import basis_of, evaluate
from planner.layout import Layout
from planner.memory import peak_memory
from planner.orders import order_of
from planner.plan import (
    PLAN_SCHEMA_VERSION,
    Candidate,
    Plan,
    ProfileReference,
    Rejection,
    seal,
)
from planner.refine import NOTHING_REFINED, refine
from profiles.errors import UnsupportedError
from profiles.files import digest
from profiles.job import Job
from profiles.machine import known_gpu
from profiles.profile import Profile
from profiles.quantity import format_quantity
from simulator.schedule import Schedule


class InfeasibleError(ValueError):
    """No layout fits; the message names the binding constraint and the smallest relaxation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """All layouts that fit, fastest first, and all others with the reason of each.

    `orders` holds the schedules that were made for a layout; all others are built by their name.
    """

    ranking: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    orders: Mapping[Layout, Schedule]

    def schedule(self, place: int) -> Schedule:
        """Return the schedule of a place in the ranking."""
        layout = self.ranking[place].layout
        made = self.orders.get(layout)
        return order_of(layout).whole() if made is None else made


def search(job: Job, profile: Profile) -> SearchResult:
    """Return every layout of the job's ranks, timed or rejected.

    First come the layouts with a named schedule; then, where that is asked for, the best of them
    with an order of their own. Ties go to less memory, then to the layout's text. Raises
    UnsupportedError for a model that the cost model does not cover, and InfeasibleError when
    nothing fits.
    """
    _check_supported(job, profile)
    basis, asked = basis_of(job, profile), schedules_of(job)
    layouts, rejections = candidates(job, basis.costs)
    named = evaluate(basis, layouts)
    refined = refine(basis, named, asked, job.seed) if SYNTHESISED in asked else NOTHING_REFINED
    rejections += refined.rejections
    ranking, needs = [], []
    for candidate in (*(c for c in named if c.layout.schedule in asked), *refined.candidates):
        if candidate.peak_bytes > basis.limit_bytes:
            needs.append(candidate)
            rejections.append(_out_of_memory(candidate, basis.limit_bytes))
        else:
            ranking.append(candidate)
    if not ranking:
        raise _infeasible(job, rejections, needs)
    ranking.sort(key=lambda c: (c.step.p50_ns, c.peak_bytes, str(c.layout)))
    return SearchResult(ranking=tuple(ranking), rejections=tuple(rejections), orders=refined.orders)


def make_plan(
    job: Job, profile: Profile, profile_path: str, result: SearchResult, chosen: int, version: str
) -> Plan:
    """Return the plan of the `chosen` place of the ranking, sealed."""
    layout = result.ranking[chosen].layout
    schedule = result.schedule(chosen)
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
        memory=peak_memory(
            job.model, job.workload, layout, schedule, job.stack, profile.context_bytes
        ),
        step=result.ranking[chosen].step,
        ranking=result.ranking,
        chosen=chosen,
        num_layouts=len(result.ranking) + len(result.rejections),
        rejections=result.rejections,
    )


def best_of_each_kind(result: SearchResult) -> tuple[int, ...]:
    """Return the places of the best layout of each (dp, tp, pp, v, schedule), best first."""
    seen: dict[tuple[int, int, int, int, str], int] = {}
    for place, candidate in enumerate(result.ranking):
        layout = candidate.layout
        schedule = layout.schedule if layout.pp > 1 else ""
        kind = (layout.dp, layout.tp, layout.pp, layout.stages_per_rank, schedule)
        seen.setdefault(kind, place)
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
    # Limits are what the job asked for; what lies behind them says more.
    told = sorted(rejections, key=lambda r: r.rule == "search limits")[:4]
    reasons = "; ".join(f"{r.layout}: {r.reason}" for r in told)
    more = f" (and {len(rejections) - 4} more)" if len(rejections) > 4 else ""
    return InfeasibleError(
        f"no layout of {job.cluster.num_ranks} ranks is legal: {reasons or 'search limits'}{more}"
    )
