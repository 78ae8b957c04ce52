"""The search: every layout of the ranks, timed by its full schedule or rejected with a reason."""

from collections.abc import Mapping
from dataclasses import dataclass

from planner.candidates import SYNTHESISED, candidates, schedules_of
from planner.evaluate import Costs, basis_of, evaluate
from planner.layout import Layout
from planner.orders import order_of
from planner.plan import PLAN_SCHEMA_VERSION, Candidate, Plan, Rejection, seal
from planner.refine import NOTHING_REFINED, refine
from profiles.job import Job
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


def search(job: Job, costs: Costs) -> SearchResult:
    """Return every layout of the job's ranks, timed by `costs` or rejected.

    First come the layouts with a named schedule; then, where that is asked for, the best of them
    with an order of their own. Ties go to less memory, then to the layout's text. Raises
    InfeasibleError when nothing fits.
    """
    basis, asked = basis_of(job, costs), schedules_of(job)
    layouts, rejections = candidates(job, costs)
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


def make_plan(job: Job, costs: Costs, result: SearchResult, chosen: int, version: str) -> Plan:
    """Return the plan of the `chosen` place of the ranking, sealed."""
    layout = result.ranking[chosen].layout
    schedule = result.schedule(chosen)
    return seal(
        schema_version=PLAN_SCHEMA_VERSION,
        tool_version=version,
        seed=job.seed,
        model=job.model,
        workload=job.workload,
        cluster=job.cluster,
        stack=job.stack,
        profile=costs.origin,
        layout=layout,
        schedule=tuple(str(schedule).splitlines()),
        costs=costs.stages(layout),
        memory=basis_of(job, costs).memory(layout, schedule),
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
