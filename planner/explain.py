"""Why a layout was chosen, and why another was not: two accounts side by side, and what would flip.

`why` explains any layout that a person names; `explain` a choice: its runner-up, what would flip
it, what keeps better ones out, and how it differs from the field's rule of thumb.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, final

from planner.account import Account, World, account_of, differences
from planner.evaluate import Costs
from planner.facts import facts_of
from planner.flips import Sensitivity, named, sensitivities
from planner.layout import Layout
from planner.objectives import broken_limit, cost
from planner.plan import Candidate
from planner.relax import NearMiss, near_misses
from planner.schedules import SCHEDULES
from planner.search import Effort, InfeasibleError, SearchResult, search
from planner.space import SYNTHESISED, Space, divisors, options
from planner.thumb import ThumbRule, thumb_rule
from profiles.errors import UnsupportedError
from profiles.files import digest
from profiles.job import Job, SearchLimits
from profiles.quantity import format_quantity
from simulator.schedule import Schedule

Progress = Callable[[float, str], None]
PART_WORDS: Mapping[str, str] = {
    "work": "computing",
    "exchange": "exchange inside the layers",
    "pipeline": "idling in the pipeline",
    "reduction": "the gradients' reduction",
    "optimizer": "the optimizer",
    "host": "the host and waits",
}
"""What the parts of a step are called in a sentence."""
HOLDING_WORDS: Mapping[str, str] = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "the optimizer's state",
    "activations": "activations",
    "temporary": "working memory",
    "buffers": "communication buffers",
    "update": "copies of the update",
    "reserve": "what the allocator reserves",
    "context": "the process itself",
}
"""What memory is held by, in a sentence."""
MISSED = " Nothing keeps it out: the search ended within its gap, or does not look there."
NAMED_PARTS = 3
"""Parts that a conclusion names at most."""
SMALL = 0.05
"""Part of the largest difference below which another one is not named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A layout beside the chosen one.

    `broken` are the limits of the job that it breaks, as parts of a sentence; `differs` says where
    it is another than the choice, from the choice to it. `place` is where it would stand in the
    ranking if it kept to all of them, 1 for the best. `more_ns` is what each part of its step takes
    beyond the choice's, negative where it takes less; the values sum to the difference of the
    steps.
    """

    account: Account
    chosen: Account
    broken: tuple[str, ...]
    differs: tuple[str, ...]
    place: int
    more_ns: Mapping[str, int]
    conclusion: str

    @property
    def step_more_ns(self) -> int:
        """What its step takes beyond the choice's."""
        return self.account.step.p50_ns - self.chosen.step.p50_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A choice and all that there is to say of it.

    `runner_up` is the best layout with other degrees, None where there is none; `thumb` is None
    where the rule of thumb has no layout.
    """

    chosen: Account
    runner_up: Comparison | None
    sensitivities: tuple[Sensitivity, ...]
    near_misses: tuple[NearMiss, ...]
    thumb: ThumbRule | None


@final
@dataclass(frozen=True, kw_only=True)
class Searches:
    """The world as it is: costs by `costs_of`, and searches of it with one `effort` each.

    No orders are synthesised here: that takes longer than all the rest, and gains about as much
    whatever the input. A wide gap may miss that something flips, but makes nothing up: what is best
    was timed, and so is what is kept.
    """

    costs_of: Callable[[Job], Costs]
    effort: Effort = field(default_factory=Effort)
    _found: dict[str, SearchResult] = field(default_factory=dict, repr=False)

    def costs(self, job: Job) -> Costs:
        """Return the costs of `job`."""
        return self.costs_of(job)

    def search(self, job: Job) -> SearchResult:
        """Return what is found for `job`, at once where it was asked for before."""
        costs = self.costs_of(job)
        names = tuple(name for name in Space(job, costs).schedules if name != SYNTHESISED)
        job = replace(job, search=replace(job.search, schedule=names or job.search.schedule))
        key = digest(job)
        if key not in self._found:
            self._found[key] = search(job, costs, self.effort)
        return self._found[key]


def why(
    job: Job, costs: Costs, result: SearchResult, layout: Layout, chosen: int = 0
) -> Comparison:
    """Return how `layout` compares with the `chosen` place of what was found for `job`.

    Raises UnsupportedError where nobody knows what it takes.
    """
    best = result.ranking[chosen].layout
    return compare(
        job,
        account_of(job, costs, layout, _made(result, layout)),
        account_of(job, costs, best, _made(result, best)),
        result.ranking,
    )


def compare(
    job: Job, account: Account, chosen: Account, ranking: tuple[Candidate, ...]
) -> Comparison:
    """Return the comparison of two accounts; `ranking` says where the first would stand."""
    mine = _cost(job, account.step.p50_ns, account.tightest.memory.total)
    better = sum(_cost(job, c.step.p50_ns, c.peak_bytes) < mine for c in ranking)
    more_ns = {name: account.parts_ns[name] - chosen.parts_ns[name] for name in account.parts_ns}
    broken = _broken(job, account)
    is_missed = not broken and mine < _cost(job, chosen.step.p50_ns, chosen.tightest.memory.total)
    return Comparison(
        account=account,
        chosen=chosen,
        broken=broken,
        differs=differences(chosen.layout, account.layout),
        place=1 + better,
        more_ns=more_ns,
        conclusion=_conclusion(account, chosen, broken, more_ns) + (MISSED if is_missed else ""),
    )


def explain(
    job: Job,
    world: World,
    result: SearchResult,
    chosen: int = 0,
    progress: Progress = lambda _share, _what: None,
) -> Explanation:
    """Return all that there is to say of the `chosen` place of what was found for `job`."""
    costs, best = world.costs(job), result.ranking[chosen]
    made = _made(result, best.layout)
    account = account_of(job, costs, best.layout, made)
    progress(0.0, "runner-up")
    other = runner_up(job, world, best)
    progress(0.1, "rule of thumb")
    try:
        thumb = thumb_rule(job, costs, best.layout, made)
    except UnsupportedError:
        thumb = None
    progress(0.2, "what is near")
    near = near_misses(job, world, best)
    stand_in = named(best.layout, job.model.num_layers, world, job)
    return Explanation(
        chosen=account,
        runner_up=compare(job, other, account, result.ranking) if other else None,
        sensitivities=sensitivities(
            job, world, stand_in, progress=lambda share, what: progress(0.3 + 0.7 * share, what)
        ),
        near_misses=near,
        thumb=thumb,
    )


def runner_up(job: Job, world: World, chosen: Candidate) -> Account | None:
    """Return the best layout with other degrees than `chosen`, None if there is none.

    It differs in one degree at least: each in turn is kept from being what it is. The degree of
    data parallelism follows from the others. Twins that take as long to the nanosecond, as those
    that share sequences among replicas and take twice as many at a time, are no rivals.
    """
    ranks, experts = job.cluster.num_ranks, job.model.num_experts
    free = {axis: divisors(ranks) for axis in ("tp", "pp", "cp")} | {"ep": divisors(experts or 1)}
    rivals = list[tuple[Candidate, SearchResult]]()
    for axis, values in free.items():
        allowed = getattr(job.search, axis) or values
        others = tuple(value for value in allowed if value != getattr(chosen.layout, axis))
        if not others:
            continue
        limits: dict[str, Any] = {axis: others}
        try:
            result = world.search(replace(job, search=replace(job.search, **limits)))
        except (InfeasibleError, UnsupportedError):
            continue
        rivals += [(c, result) for c in result.ranking if c.step.p50_ns != chosen.step.p50_ns][:1]
    if not rivals:
        return None
    best, found = min(rivals, key=lambda pair: _cost(job, pair[0].step.p50_ns, pair[0].peak_bytes))
    return account_of(job, world.costs(job), best.layout, _made(found, best.layout))


def _made(result: SearchResult, layout: Layout) -> Schedule | None:
    """Return the order that was made for `layout`, None where it has one with a name."""
    if layout.schedule in SCHEDULES:
        return None
    places = [place for place, each in enumerate(result.ranking) if each.layout == layout]
    if not places:
        raise UnsupportedError(f"{layout} has an order that was made for another layout")
    return result.schedule(places[0])


def _cost(job: Job, step_ns: int, peak_bytes: int) -> float:
    return cost(job.goal.objectives[0], facts_of(job), step_ns, peak_bytes)


def _broken(job: Job, account: Account) -> tuple[str, ...]:
    """Return the limits of the job that a layout breaks: of memory, of the search, of the goal."""
    broken = []
    tightest = account.tightest
    if not account.fits:
        has, over = (
            format_quantity(n, "bytes") for n in (tightest.limit_bytes, tightest.excess_bytes)
        )
        broken.append(f"it needs {over} more than the {has} of a rank")
    layout = account.layout
    for entry in fields(SearchLimits):
        allowed, value = getattr(job.search, entry.name), getattr(layout, entry.name)
        if entry.name == "shard_group":
            value = layout.shard_ranks if layout.sharding != "none" else None
        elif entry.name == "schedule" and layout.pp == 1:
            value = None
        if allowed and value is not None and value not in allowed:
            broken.append(f"search.{entry.name} allows {options(allowed)} only")
    told = broken_limit(job.goal, facts_of(job), account.step.p50_ns, account.tightest.memory.total)
    return (*broken, told) if told else tuple(broken)


def _conclusion(
    account: Account, chosen: Account, broken: tuple[str, ...], more_ns: Mapping[str, int]
) -> str:
    """Return one or two sentences on how a layout compares with the choice, and why."""
    step_more_ns = account.step.p50_ns - chosen.step.p50_ns
    if account.layout == chosen.layout:
        return "It is the chosen layout."
    share = abs(step_more_ns) / chosen.step.p50_ns
    amount = f"{format_quantity(abs(step_more_ns), 'ns')} ({100 * share:.1f} %)"
    if step_more_ns == 0:
        text = "It takes as long as the choice"
    else:
        text = f"It is {amount} {'slower' if step_more_ns > 0 else 'faster'} than the choice"
    text += _made_of(more_ns) + "."
    if not account.fits:
        name, size_bytes = account.tightest.holdings[0]
        over, held = (
            format_quantity(n, "bytes") for n in (account.tightest.excess_bytes, size_bytes)
        )
        text += (
            f" It does not fit: pipeline rank {account.tightest.rank} lacks {over}, "
            f"{HOLDING_WORDS[name]} alone being {held}."
        )
        broken = broken[1:]
    if broken:
        text += f" It is no candidate: {'; '.join(broken)}."
    return text


def _made_of(more_ns: Mapping[str, int]) -> str:
    """Return the largest differences by part, as the end of a sentence."""
    by_size = sorted(more_ns.items(), key=lambda part: (-abs(part[1]), part[0]))
    largest = abs(by_size[0][1])
    named = [
        f"{format_quantity(abs(ns), 'ns')} {'more' if ns > 0 else 'less'} for {PART_WORDS[name]}"
        for name, ns in by_size[:NAMED_PARTS]
        if ns and abs(ns) >= SMALL * largest
    ]
    return f": {', '.join(named)}" if named else ""
