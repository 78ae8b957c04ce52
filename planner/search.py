"""The search: the best layouts of a job, and what is known of all the others.

Best-first branch and bound. Every start of the space gets a lower bound of its step; starts are
tried in the order of their bounds, until nothing that is left can be better than what was found by
more than the gap that was asked for. What was not tried is bounded by the start that is next.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from planner.evaluate import Basis, Costs, basis_of
from planner.finalists import with_jitter
from planner.frontier import Bounded, Tally, frontier
from planner.judge import Judge
from planner.layout import Layout
from planner.lower import predict_order, predict_steps
from planner.objectives import front
from planner.orders import order_of, sample_of
from planner.plan import PLAN_SCHEMA_VERSION, Candidate, Certificate, Plan, Rejection, Variant, seal
from planner.refine import NOTHING_REFINED, refine
from planner.space import SYNTHESISED, Space
from planner.trial import Timed, Trials
from profiles.job import Job
from profiles.profile import Cost
from profiles.quantity import format_quantity
from simulator.schedule import Schedule

FEW = 16
"""Layouts that are timed in any case, so that the short list is of use."""
PROMISING = 16
"""Starts that are tried first, so that a good layout is there at once."""
MANY = 256
"""Starts that are tried before the search is content with its gap: a small space is searched to
the end."""
MAX_RANKED = 100
"""Places of the ranking: the best of what was timed; a front may have more behind them."""
FOR_BOUNDS = 0.5
"""The part of a budget of time that bounds may take; meshes that they do not reach stay open."""
Progress = Callable[[float, str], None]
"""Told of progress: a share of the work from 0 to 1, and what is going on."""


class InfeasibleError(ValueError):
    """No layout fits; the message names the binding constraint and the smallest relaxation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to search: until the best is known to within `gap`, or for `budget_s` seconds."""

    budget_s: float | None = None
    gap: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The best layouts that fit, best first, what is known of the others, and why some are none.

    `orders` holds the schedules that were made for a layout; all others are built by their name.
    `front` are the places that no other betters in all objectives; `is_interrupted` says that the
    search was stopped by hand. `variants` are told of where there were several, of which these are
    the layouts of the chosen one.
    """

    ranking: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    certificate: Certificate
    front: tuple[int, ...] = (0,)
    orders: Mapping[Layout, Schedule] = field(default_factory=dict)
    is_interrupted: bool = False
    variants: tuple[Variant, ...] = ()

    def schedule(self, place: int) -> Schedule:
        """Return the schedule of a place in the ranking."""
        layout = self.ranking[place].layout
        made = self.orders.get(layout)
        return order_of(layout).whole() if made is None else made


def ignore_progress(_share: float, _what: str) -> None:
    """Tell nobody."""


def search(
    job: Job, costs: Costs, effort: Effort = Effort(), progress: Progress = ignore_progress,
    at_most: float = math.inf,
) -> SearchResult:  # fmt: skip
    """Return the best layouts of the job's ranks by its goal, timed by `costs`.

    First come the layouts with a named schedule; then, where that is asked for, the best of them
    with an order of their own. Ties go to the shorter step, then to less memory, then to the
    layout's text. The same job gives the same result unless a budget of time ends it. What another
    job has reached of the first objective, `at_most`, saves the search for what is worse. Raises
    InfeasibleError when nothing fits.
    """
    started = time.monotonic()
    basis, tally, judge = basis_of(job, costs), Tally(), Judge(job, at_most)
    space = Space(job, costs)
    trials = Trials(space, basis, tally)
    size = sum(map(space.num_layouts, space.degrees()))
    progress(0.0, f"bounds of about {size:,} layouts")
    until = started + FOR_BOUNDS * (effort.budget_s or math.inf)
    bounded = frontier(space, basis, tally, lambda: time.monotonic() > until)
    queue = _in_turn(_by_cost(bounded, judge), job)
    left, is_interrupted = _tried(queue, trials, judge, effort, started, progress)
    return _result(job, basis, space, trials, judge, left, is_interrupted=is_interrupted)


class _Queued(NamedTuple):
    """A start, and what its layouts cost at least, by the first objective."""

    least: float
    bounded: Bounded


def _by_cost(bounded: Sequence[Bounded], judge: Judge) -> list[_Queued]:
    """Return the starts in the order in which they are tried."""
    queue = [_Queued(judge.costs(each.bound_ns, each.least_bytes)[0], each) for each in bounded]
    return sorted(queue, key=lambda each: each.least)


def _in_turn(queue: Sequence[_Queued], job: Job) -> list[_Queued]:
    """Return the starts with a few promising ones in front: by a guess, which is no bound.

    Bounds know nothing yet of what replicas exchange. The guess adds their gradients, once around
    a ring of the slowest links, so that the first layouts timed are good ones.
    """
    link = job.cluster.inter_node or job.cluster.pools[0].intra_node
    # This machine has no data sheet: nobody knows a rate before the profile is asked.
    bytes_per_s = link.bytes_per_s or math.inf
    size_bytes = job.model.num_parameters * (job.stack.reduction_bytes or 4)

    def guess(place: int) -> tuple[int, int]:
        """Return the guess in whole percent, and among equals how much is cut."""
        bounded = queue[place].bounded
        dp, tp, pp, cp, ep = bounded.start.degrees
        share = 0 if dp * cp == 1 else 2 * size_bytes / (tp * pp)
        guess_ns = max(1.0, bounded.bound_ns + 1e9 * share / bytes_per_s)
        return round(100 * math.log(guess_ns)), tp * pp * cp * ep

    places = sorted(range(len(queue)), key=guess)[:PROMISING]
    promising = frozenset(places)
    return [
        *(queue[place] for place in places),
        *(queued for place, queued in enumerate(queue) if place not in promising),
    ]


def _tried(
    queue: Sequence[_Queued], trials: Trials, judge: Judge, effort: Effort, started: float,
    progress: Progress,
) -> tuple[Sequence[_Queued], bool]:  # fmt: skip
    """Try starts in turn; return those that are left, and whether it was stopped by hand."""
    tally, is_one = trials.tally, len(judge.goal.objectives) == 1
    lowest = min((each.least for each in queue), default=0.0)
    place = num_before = 0
    try:
        for place, (least, bounded) in enumerate(queue):
            num_before = tally.num_layouts
            is_near = is_one and least >= judge.best * (1 - effort.gap)
            if is_near and place >= max(MANY, PROMISING):
                return queue[place:], False
            if judge.found and time.monotonic() - started > (effort.budget_s or math.inf):
                return queue[place:], False
            known = least if place >= PROMISING else lowest
            progress(*_progress(judge.best, known, place / len(queue), tally.num_timed))
            _try_start(bounded, trials, judge, effort.gap if len(queue) > MANY else 0.0)
    except KeyboardInterrupt:
        if not judge.found:
            raise
        least, bounded = queue[place]
        num_open = bounded.num_layouts - (tally.num_layouts - num_before)
        half = _Queued(least, bounded._replace(num_layouts=num_open))
        return [half, *queue[place + 1 :]], True
    return [], False


def _try_start(bounded: Bounded, trials: Trials, judge: Judge, gap: float) -> None:
    """Time the layouts of one start; a few are timed whatever they can be worth."""
    tally = trials.tally
    if reason := judge.breaks_limit(bounded.bound_ns, bounded.least_bytes):
        rejection = Rejection(layout=str(bounded.start), rule="limits", reason=reason)
        tally.reject(rejection, bounded.num_layouts)
        return
    if tally.num_timed >= FEW and judge.is_hopeless(bounded.bound_ns, bounded.least_bytes):
        tally.num_bounded += bounded.num_layouts
        return

    def is_hopeless(step_ns: float, peak_bytes: float) -> bool:
        if tally.num_timed < FEW:
            return bool(judge.breaks_limit(step_ns, peak_bytes))
        return judge.is_hopeless(step_ns, peak_bytes, gap)

    for timed in trials.of(bounded, is_hopeless):
        if reason := judge.breaks_limit(timed.step_ns, timed.peak_bytes):
            tally.reject(Rejection(layout=str(timed.layout), rule="limits", reason=reason))
        else:
            tally.num_timed += 1
            judge.add(timed)


def _progress(best: float, least: float, share: float, num_timed: int) -> tuple[float, str]:
    if best == math.inf:
        return share, f"{num_timed:,} layouts timed"
    gap = max(0.0, 1 - least / best)
    return max(share, 1 - gap), f"{num_timed:,} layouts timed, gap {100 * gap:.1f} %"


def _result(
    job: Job, basis: Basis, space: Space, trials: Trials, judge: Judge, left: Sequence[_Queued],
    *, is_interrupted: bool,
) -> SearchResult:  # fmt: skip
    """Return what was found, with orders made for the best pipelines where they are asked for."""
    tally, asked = trials.tally, space.schedules
    found = sorted(judge.found, key=lambda timed: _rank(judge, timed))
    refined = NOTHING_REFINED
    if SYNTHESISED in asked and not is_interrupted:
        named = [_plain(timed) for timed in (*found, *trials.short)]
        refined = refine(basis, named, asked, job.seed)
    for rejection in refined.rejections:
        tally.reject(rejection)
    made = []
    for each in refined.candidates:
        if each.peak_bytes > basis.limit_bytes:
            trials.refuse(each.layout, each.step.p50_ns, each.peak_bytes)
        else:
            made.append(Timed(each.layout, each.step.p50_ns, each.peak_bytes))
    tally.num_timed += len(made)
    ranked = sorted(
        [*(timed for timed in found if timed.layout.schedule in asked), *made],
        key=lambda timed: _rank(judge, timed),
    )
    if not ranked:
        short = [timed for timed in trials.short if timed.layout.schedule in asked]
        raise _infeasible(job, tally, short)
    banded = [_banded(basis, timed, refined.orders) for timed in _short_list(judge, ranked)]
    ranking = with_jitter(basis, banded, refined.orders, job.seed)
    return SearchResult(
        ranking=ranking,
        rejections=tuple(tally.examples),
        certificate=_certificate(judge, tally, ranked[0], left),
        front=_front(judge, ranking),
        orders=refined.orders,
        is_interrupted=is_interrupted,
    )


def _short_list(judge: Judge, ranked: Sequence[Timed]) -> list[Timed]:
    """Return the best of what was timed, and further behind all of the front."""
    found = list(ranked[:MAX_RANKED])
    if len(judge.goal.objectives) > 1:
        places = front([judge.costs(each.step_ns, each.peak_bytes) for each in ranked])
        found += [ranked[place] for place in places if place >= MAX_RANKED]
    return found


def _rank(judge: Judge, timed: Timed) -> tuple[float, int, int, str]:
    first = judge.costs(timed.step_ns, timed.peak_bytes)[0]
    return first, timed.step_ns, timed.peak_bytes, str(timed.layout)


def _plain(timed: Timed) -> Candidate:
    ns = timed.step_ns
    return Candidate(
        layout=timed.layout, step=Cost(p10_ns=ns, p50_ns=ns, p90_ns=ns),
        peak_bytes=timed.peak_bytes,
    )  # fmt: skip


def _banded(basis: Basis, timed: Timed, orders: Mapping[Layout, Schedule]) -> Candidate:
    """Return `timed` with the band of its step."""
    made = orders.get(timed.layout)
    if made is not None:
        stages = basis.costs.stages(timed.layout, made.homes.tolist())
        (step,) = predict_steps(made, [stages])
    else:
        stages = basis.costs.stages(timed.layout)
        (step,) = predict_order(order_of(timed.layout), sample_of(timed.layout), [stages])
    return Candidate(layout=timed.layout, step=step, peak_bytes=timed.peak_bytes)


def _front(judge: Judge, ranking: Sequence[Candidate]) -> tuple[int, ...]:
    """Return the places of the ranking that no other betters in all objectives."""
    if len(judge.goal.objectives) == 1:
        return (0,)
    return front([judge.costs(each.step.p50_ns, each.peak_bytes) for each in ranking])


def _certificate(judge: Judge, tally: Tally, best: Timed, left: Sequence[_Queued]) -> Certificate:
    """Return what is known of all layouts: what is left is no better than the next start.

    Nothing is known of meshes that nobody looked at.
    """
    value = judge.costs(best.step_ns, best.peak_bytes)[0]
    unseen = [0.0] if tally.num_unseen else []
    least = (each.least for each in left)
    lower_bound = min(value, judge.at_most, judge.let_go, *unseen, *least)
    num_open = tally.num_unseen + sum(
        each.bounded.num_layouts for each in left if each.least < value
    )
    num_bounded = tally.num_bounded + sum(
        each.bounded.num_layouts for each in left if each.least >= value
    )
    rejected = dict(sorted(tally.rejected.items()))
    return Certificate(
        objective=judge.goal.objectives[0],
        value=value,
        lower_bound=lower_bound,
        gap=(value - lower_bound) / value,
        num_layouts=tally.num_layouts
        + tally.num_unseen
        + sum(each.bounded.num_layouts for each in left),
        num_rejected=rejected,
        num_bounded=num_bounded,
        num_timed=tally.num_timed,
        num_open=num_open,
    )


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
        goal=job.goal,
        profile=costs.origin,
        layout=layout,
        schedule=tuple(str(schedule).splitlines()),
        costs=costs.stages(layout, schedule.homes.tolist()),
        memory=basis_of(job, costs).memory(layout, schedule),
        step=result.ranking[chosen].step,
        ranking=result.ranking,
        chosen=chosen,
        front=result.front,
        rejections=result.rejections,
        certificate=result.certificate,
        variants=result.variants,
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


def _infeasible(job: Job, tally: Tally, short: Sequence[Timed]) -> InfeasibleError:
    """Return the error that names what binds and the least that would have to give."""
    num_ranks = job.cluster.num_ranks
    if tally.num_unseen:
        return InfeasibleError(
            f"no layout was found in the time given, and about {tally.num_unseen:,} were not "
            "looked at; give the search more time"
        )
    if short:
        least = min(short, key=lambda timed: timed.peak_bytes)
        need = format_quantity(least.peak_bytes, "bytes")
        return InfeasibleError(
            f"no layout of {num_ranks} ranks fits: memory binds. The smallest, {least.layout}, "
            f"needs {need} a rank; give a rank that much, add ranks, or shorten workload.seq_len"
        )
    if tally.too_large[1]:
        need = format_quantity(tally.too_large[0], "bytes")
        return InfeasibleError(
            f"no layout of {num_ranks} ranks fits: memory binds. The smallest, "
            f"{tally.too_large[1]}, needs {need} a rank at least, however it is sharded; give a "
            "rank more than that, add ranks, or shorten workload.seq_len"
        )
    # Limits are what the job asked for; what lies behind them says more.
    by_rule = {each.rule: each for each in reversed(tally.examples)}
    rules = sorted(by_rule, key=lambda rule: (rule in ("limits", "search limits"), rule))
    told = [
        f"{tally.rejected[rule]:,} by {rule}, such as {by_rule[rule].layout}: "
        f"{by_rule[rule].reason}"
        for rule in rules
    ]
    return InfeasibleError(f"no layout of {num_ranks} ranks will do: {'; '.join(told)}")
