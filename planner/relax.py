"""What would have to give: the nearest layouts that memory or a limit keeps out.

Where there is a choice, these are layouts that would be better than it; where there is none, the
single change that would give one, with as little of it as does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from planner.account import World
from planner.flips import MARGIN, is_better, with_memory
from planner.layout import Layout
from planner.objectives import cost, facts_of, figure, front, told
from planner.plan import Candidate
from planner.search import InfeasibleError
from profiles.errors import UnsupportedError
from profiles.goal import Goal
from profiles.job import Job, SearchLimits
from profiles.presets import cluster_preset, cluster_presets
from profiles.quantity import format_quantity

MEMORY_FACTORS = (1.1, 1.25, 1.5, 2.0)
MAX_MISSES = 3
DOUBLINGS = 10
"""How often memory is doubled before it is no remedy: a thousand times as much."""
HALVINGS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class NearMiss:
    """A layout that is better than the choice and was no candidate: `what` keeps it out.

    `now` is what that is, and `needed` what it would have to be, in words; `saves_ns` is what the
    step would get shorter by, and `more_bytes` what a rank would need beyond its memory.
    """

    what: str
    now: str
    needed: str
    candidate: Candidate
    saves_ns: int
    more_bytes: int = 0


def near_misses(job: Job, world: World, chosen: Candidate) -> tuple[NearMiss, ...]:
    """Return the layouts better than `chosen` that memory or one limit of the job keeps out.

    Of those that memory keeps out, the ones that no other betters with less; of each limit, the
    best layout without it. Better is what betters the objective by more than `flips.MARGIN`.
    """
    return (*_by_memory(job, world, chosen), *_by_limits(job, world, chosen))


def _by_memory(job: Job, world: World, chosen: Candidate) -> list[NearMiss]:
    """Return the near misses of memory: searches with ever more of it find them."""
    limit_bytes = memory_of(job)
    found: dict[Layout, Candidate] = {}
    for factor in MEMORY_FACTORS:
        wide = replace(job, cluster=with_memory(job.cluster, factor))
        for each in _ranking(wide, world):
            if each.peak_bytes > limit_bytes and is_better(wide, each, chosen, MARGIN):
                found.setdefault(each.layout, each)
        if len(found) >= MAX_MISSES:
            break
    by_need = sorted(found.values(), key=lambda c: (c.peak_bytes, c.step.p50_ns, str(c.layout)))
    kept = front([(float(c.peak_bytes), float(c.step.p50_ns)) for c in by_need])
    return [
        NearMiss(
            what="memory",
            now=format_quantity(limit_bytes, "bytes"),
            needed=format_quantity(by_need[place].peak_bytes, "bytes"),
            candidate=by_need[place],
            saves_ns=chosen.step.p50_ns - by_need[place].step.p50_ns,
            more_bytes=by_need[place].peak_bytes - limit_bytes,
        )
        for place in kept[:MAX_MISSES]
    ]


def _by_limits(job: Job, world: World, chosen: Candidate) -> list[NearMiss]:
    """Return the near misses of limits: one is lifted at a time."""
    found = []
    for loosened in lifted(job):
        best = _best(loosened.job, world)
        if best is not None and is_better(job, best, chosen, MARGIN):
            found.append(
                NearMiss(
                    what=loosened.what,
                    now=loosened.now,
                    needed=_needed(job, loosened.what, best),
                    candidate=best,
                    saves_ns=chosen.step.p50_ns - best.step.p50_ns,
                )
            )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifted:
    """A job without one of its limits: which, and what it was."""

    what: str
    now: str
    job: Job


def lifted(job: Job) -> Iterator[Lifted]:
    """Yield `job` without each of its limits in turn, those of the search first."""
    free = SearchLimits()
    for entry in fields(SearchLimits):
        value, default = getattr(job.search, entry.name), getattr(free, entry.name)
        if value != default:
            search: SearchLimits = replace(job.search, **{entry.name: default})
            yield Lifted(
                what=f"search.{entry.name}", now=_words(value), job=replace(job, search=search)
            )
    for name, limit in job.goal.limits.items():
        rest = {other: value for other, value in job.goal.limits.items() if other != name}
        goal = Goal(objectives=job.goal.objectives, limits=rest)
        yield Lifted(what=f"goal.limits.{name}", now=told(name, limit), job=replace(job, goal=goal))


def memory_of(job: Job) -> int:
    """Return the memory of the smallest GPU, in bytes."""
    return min(pool.gpu.memory_bytes for pool in job.cluster.pools)


def smallest_relaxation(job: Job, world: World) -> str:
    """Return what binds a job for which nothing is found, and what else would do, as sentences.

    One thing gives at a time: a limit of the job, the batch, the memory of a GPU, the length of a
    sequence, the number of nodes; each as little as does. What is named first binds: those that
    cost nothing come before those that cost money. Where no single one helps, all limits are lifted
    together, and then memory is looked at.
    """
    if remedies := list(_remedies(job, world)):
        return _told(remedies)
    free = replace(job, search=SearchLimits(), goal=Goal(objectives=job.goal.objectives))
    names = " and ".join(each.what for each in lifted(job))
    if best := _best(free, world):
        return f"{names} bind together: without them {best.layout} fits"
    if names and (remedies := list(_remedies(free, world))):
        return f"{_told(remedies)}; {names} would have to be lifted too"
    return "no single change of limits, batch, memory, sequence length or ranks gives a layout"


def _told(remedies: Sequence["_Remedy"]) -> str:
    others = "".join(f"; or {each.text}" for each in remedies[1:])
    return f"{remedies[0].binds} binds: {remedies[0].text}{others}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Remedy:
    """What binds, and the least change of it that gives a layout, as part of a sentence."""

    binds: str
    text: str


def _remedies(job: Job, world: World) -> Iterator[_Remedy]:
    for loosened in lifted(job):
        if best := _nearest(loosened, world):
            needed = _needed(job, loosened.what, best)
            text = f"lift {loosened.what} (it is {loosened.now}): {needed} fits, as {best.layout}"
            yield _Remedy(binds=loosened.what, text=text)
    yield from _batch(job, world)
    yield from _memory(job, world)
    yield from _sequences(job, world)
    yield from _nodes(job, world)


def _batch(job: Job, world: World) -> Iterator[_Remedy]:
    """Yield the nearest batch that divides better, within a fourth of what it is."""
    batch, ranks = job.workload.global_batch, job.cluster.num_ranks
    units = [2**power for power in range(1, ranks.bit_length()) if ranks % 2**power == 0]
    near = {max(1, (batch + up * (unit - 1)) // unit) * unit for unit in units for up in (0, 1)}
    for other in sorted(near - {batch}, key=lambda n: (abs(n - batch), n))[:4]:
        if abs(other - batch) > batch / 4:
            return
        changed = replace(job, workload=replace(job.workload, global_batch=other))
        if best := _best(changed, world):
            text = f"workload.global_batch {other} instead of {batch} lets {best.layout} fit"
            yield _Remedy(binds="workload.global_batch", text=text)
            return


def _memory(job: Job, world: World) -> Iterator[_Remedy]:
    """Yield the least memory that does, found by doubling and then halving the interval."""

    def least(factor: float) -> Candidate | None:
        wide = replace(job, cluster=with_memory(job.cluster, factor))
        return min(_ranking(wide, world), key=lambda c: c.peak_bytes, default=None)

    low = high = 1.0
    best = None
    for _ in range(DOUBLINGS):
        low, high = high, 2 * high
        if best := least(high):
            break
    if best is None:
        return
    has = memory_of(job)
    for _ in range(HALVINGS):
        # What was found needs less than what was offered.
        high = min(high, best.peak_bytes / has)
        middle = (low * high) ** 0.5
        if found := least(middle):
            best, high = found, middle
        else:
            low = middle
    need, now = format_quantity(best.peak_bytes, "bytes"), format_quantity(has, "bytes")
    text = (
        f"{best.layout} needs {need} a rank, which has {now}: "
        f"{format_quantity(best.peak_bytes - has, 'bytes')} more"
    )
    yield _Remedy(binds="memory", text=text)


def _sequences(job: Job, world: World) -> Iterator[_Remedy]:
    """Yield the longest sequence that does, of those half as long time and again."""
    seq_len = job.workload.seq_len
    while seq_len % 2 == 0 and seq_len > 128:
        seq_len //= 2
        shorter = replace(job, workload=replace(job.workload, seq_len=seq_len))
        if best := _best(shorter, world):
            text = (
                f"workload.seq_len {seq_len} instead of {job.workload.seq_len} lets "
                f"{best.layout} fit"
            )
            yield _Remedy(binds="workload.seq_len", text=text)
            return


def _nodes(job: Job, world: World) -> Iterator[_Remedy]:
    """Yield the fewest nodes that do, of those twice as many time and again."""
    cluster, fabric = job.cluster, job.cluster.inter_node
    if fabric is None and cluster.name in cluster_presets():
        fabric = cluster_preset(cluster.name, num_nodes=2).inter_node
    if cluster.is_local or fabric is None:
        return
    for times in (2, 4, 8):
        pools = tuple(replace(pool, num_nodes=times * pool.num_nodes) for pool in cluster.pools)
        larger = replace(job, cluster=replace(cluster, pools=pools, inter_node=fabric))
        if best := _best(larger, world):
            ranks = f"{larger.cluster.num_ranks} ranks instead of {cluster.num_ranks}"
            text = f"{ranks} let {best.layout} fit"
            yield _Remedy(binds="the number of ranks", text=text)
            return


def _best(job: Job, world: World) -> Candidate | None:
    return next(iter(_ranking(job, world)), None)


def _ranking(job: Job, world: World) -> tuple[Candidate, ...]:
    """Return what a search finds, nothing where nothing fits or is covered."""
    try:
        return world.search(job).ranking
    except (InfeasibleError, UnsupportedError):
        return ()


def _nearest(loosened: Lifted, world: World) -> Candidate | None:
    """Return the best layout without a limit; of one on an objective that which breaks it least."""
    ranking = _ranking(loosened.job, world)
    kind, _, name = loosened.what.rpartition(".")
    if kind != "goal.limits":
        return next(iter(ranking), None)
    facts = facts_of(loosened.job)
    return min(ranking, key=lambda c: cost(name, facts, c.step.p50_ns, c.peak_bytes), default=None)


def _needed(job: Job, what: str, candidate: Candidate) -> str:
    """Return what a limit would have to allow for a layout."""
    kind, _, name = what.rpartition(".")
    if kind == "goal.limits":
        found = figure(name, facts_of(job), candidate.step.p50_ns, candidate.peak_bytes)
        return f"{name} {told(name, found)}"
    value: Any = getattr(candidate.layout, name, None)
    return f"{name} {_words(value)}" if value is not None else "more"


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else f"{value}"
