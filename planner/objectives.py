"""What layouts are judged by: time, money, energy, memory and goodput, as costs to be minimised.

Every objective is a cost that never falls when a step takes longer or a rank holds more: a layout
is as good at most as a bound on its step and one on its memory make it. A test holds each to that.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from planner.facts import Facts, facts_of
from planner.goodput import best_interval_s, wall_per_useful
from profiles.goal import BEST_IS_HIGH, OBJECTIVES, Goal
from profiles.quantity import format_quantity

__all__ = [
    "Facts",
    "broken_limit",
    "cost",
    "dollars_per_mtoken",
    "facts_of",
    "figure",
    "figure_of",
    "front",
    "joules_per_token",
    "seconds_per_useful_token",
    "told",
]

Values = NDArray[np.float64]
Amount = float | Values
Counts = NDArray[np.int64] | NDArray[np.float64]


def dollars_per_mtoken(
    step_s: Amount, *, tokens_per_step: int, num_gpus: int, dollars_per_gpu_hour: float
) -> Amount:
    """Return what a million tokens cost: step * GPUs * price an hour / 3600 / tokens * 10^6.

    Every GPU is paid for as long as the step lasts. Interruptions are not in it: divide by
    `planner.goodput.useful_share` for the price of tokens that last.

    >>> dollars_per_mtoken(1.0, tokens_per_step=10**6, num_gpus=3600, dollars_per_gpu_hour=2.5)
    2.5
    """
    dollars_per_s = num_gpus * dollars_per_gpu_hour / 3600
    return step_s * (dollars_per_s * 1e6 / tokens_per_step)


def joules_per_token(
    step_s: Amount, *, tokens_per_step: int, num_gpus: int, watts_per_gpu: float, pue: float
) -> Amount:
    """Return the energy of a token at the facility's meter: step * GPUs * watts * PUE / tokens.

    Power is taken as constant, that of busy training; a node that mostly waits draws less.

    >>> joules_per_token(2.0, tokens_per_step=1000, num_gpus=8, watts_per_gpu=969.0, pue=1.25)
    19.38
    """
    return step_s * (num_gpus * watts_per_gpu * pue / tokens_per_step)


def seconds_per_useful_token(facts: Facts, step_s: Amount) -> Amount:
    """Return the time a token takes with all that befalls the job, the reciprocal of goodput.

    Checkpoints come at the best interval, but one step apart at least.
    """
    seconds = step_s * (1 / facts.tokens_per_step)
    if not facts.mean_s:
        return seconds
    best = best_interval_s(facts.checkpoint_s, facts.mean_s)
    if not isinstance(step_s, np.ndarray):
        interval = max(best, step_s, 1e-9)
        return seconds * wall_per_useful(
            interval, facts.checkpoint_s, facts.restart_s, facts.mean_s
        )
    apart = np.maximum(step_s, max(best, 1e-9))
    return seconds * wall_per_useful(apart, facts.checkpoint_s, facts.restart_s, facts.mean_s)


def _dollars(facts: Facts, step_s: Amount, _: Amount) -> Amount:
    if not facts.dollars_per_gpu_hour:
        raise ValueError("facts.dollars_per_gpu_hour is 0; dollars_per_mtoken needs a price")
    return dollars_per_mtoken(
        step_s,
        tokens_per_step=facts.tokens_per_step,
        num_gpus=facts.num_gpus,
        dollars_per_gpu_hour=facts.dollars_per_gpu_hour,
    )


def _joules(facts: Facts, step_s: Amount, _: Amount) -> Amount:
    if not facts.watts_per_gpu:
        raise ValueError("facts.watts_per_gpu is 0; joules_per_token needs a power")
    return joules_per_token(
        step_s,
        tokens_per_step=facts.tokens_per_step,
        num_gpus=facts.num_gpus,
        watts_per_gpu=facts.watts_per_gpu,
        pue=facts.pue,
    )


class _Objective(NamedTuple):
    """How to come from seconds and bytes to a cost, and how its figure is written."""

    cost: Callable[[Facts, Amount, Amount], Amount]
    text: str


_TABLE: dict[str, _Objective] = {
    "step_time": _Objective(lambda _, step_s, __: step_s, ""),
    "tokens_per_s": _Objective(
        lambda facts, step_s, _: step_s * (1 / facts.tokens_per_step), "{:,.0f} tokens/s"
    ),
    "dollars_per_mtoken": _Objective(_dollars, "${:,.4g} a Mtoken"),
    "joules_per_token": _Objective(_joules, "{:,.4g} J/token"),
    "memory_headroom": _Objective(lambda _, __, peak_bytes: peak_bytes, ""),
    "goodput": _Objective(
        lambda facts, step_s, _: seconds_per_useful_token(facts, step_s), "{:,.0f} tokens/s"
    ),
}


@overload
def cost(name: str, facts: Facts, step_ns: float, peak_bytes: float) -> float: ...
@overload
def cost(name: str, facts: Facts, step_ns: Counts, peak_bytes: Counts) -> Values: ...
def cost(
    name: str, facts: Facts, step_ns: float | Counts, peak_bytes: float | Counts
) -> float | Values:
    """Return what objective `name` is minimised as; arrays give an array.

    Seconds a step, seconds a token, $ a million tokens, joules a token, bytes held on the fullest
    rank, or seconds a useful token: never negative, and never falling in either argument.

    >>> facts = Facts(tokens_per_step=1000, num_gpus=8, memory_bytes=80 * 2**30)
    >>> cost("tokens_per_s", facts, 2 * 10**9, 0), cost("memory_headroom", facts, 0, 2**30)
    (0.002, 1073741824.0)
    """
    return _TABLE[name].cost(facts, _amount(step_ns) / 1e9, _amount(peak_bytes))


@overload
def figure(name: str, facts: Facts, step_ns: float, peak_bytes: float) -> float: ...
@overload
def figure(name: str, facts: Facts, step_ns: Counts, peak_bytes: Counts) -> Values: ...
def figure(
    name: str, facts: Facts, step_ns: float | Counts, peak_bytes: float | Counts
) -> float | Values:
    """Return objective `name` in its own unit, the one of the limits on it.

    >>> facts = Facts(tokens_per_step=1000, num_gpus=8, memory_bytes=80 * 2**30)
    >>> figure("tokens_per_s", facts, 2 * 10**9, 0), figure("step_time", facts, 2 * 10**9, 0)
    (500.0, 2.0)
    """
    value = _TABLE[name].cost(facts, _amount(step_ns) / 1e9, _amount(peak_bytes))
    return _figure_of(name, facts, value)


@overload
def figure_of(name: str, facts: Facts, value: float) -> float: ...
@overload
def figure_of(name: str, facts: Facts, value: Values) -> Values: ...
def figure_of(name: str, facts: Facts, value: float | Values) -> float | Values:
    """Return the figure of objective `name` at a cost of `value`, such as a bound on it.

    >>> facts = Facts(tokens_per_step=1000, num_gpus=8, memory_bytes=80 * 2**30)
    >>> figure_of("memory_headroom", facts, 79 * 2**30) == 2**30
    True
    """
    return _figure_of(name, facts, value)


def _figure_of(name: str, facts: Facts, value: Amount) -> Amount:
    if name not in BEST_IS_HIGH:
        return value
    if name == "memory_headroom":
        return facts.memory_bytes - value
    with np.errstate(divide="ignore"):
        found = np.divide(1.0, value)
    return found if isinstance(value, np.ndarray) else float(found)


def _amount(counts: float | Counts) -> Amount:
    return counts.astype(np.float64) if isinstance(counts, np.ndarray) else float(counts)


def told(name: str, value: float) -> str:
    """Return a figure of objective `name` for a person.

    >>> told("dollars_per_mtoken", 0.3125), told("memory_headroom", 2.0**32), told("goodput", 1e5)
    ('$0.3125 a Mtoken', '4.0 GiB', '100,000 tokens/s')
    """
    if name == "step_time":
        return format_quantity(1e9 * value, "ns")
    if name == "memory_headroom":
        return format_quantity(value, "bytes")
    return _TABLE[name].text.format(value)


def broken_limit(goal: Goal, facts: Facts, step_ns: float, peak_bytes: float) -> str:
    """Return the first limit that a step and a peak break, as part of a sentence; empty if none.

    What the limits say of bounds on both holds of every layout above them.

    >>> facts = Facts(tokens_per_step=1000, num_gpus=8, memory_bytes=80 * 2**30)
    >>> broken_limit(Goal(limits={"step_time": 1.5}), facts, 2 * 10**9, 0)
    'step_time is 2.000 s, goal.limits allows at most 1.500 s'
    """
    for name in OBJECTIVES:
        if name not in goal.limits:
            continue
        limit, value = goal.limits[name], figure(name, facts, step_ns, peak_bytes)
        is_high = name in BEST_IS_HIGH
        if value < limit if is_high else value > limit:
            bound = "needs at least" if is_high else "allows at most"
            return f"{name} is {told(name, value)}, goal.limits {bound} {told(name, limit)}"
    return ""


def front(costs: Iterable[Sequence[float]]) -> tuple[int, ...]:
    """Return the places of the points that no other dominates, in rising order.

    A point dominates another that it exceeds in no cost and undercuts in one; equal points share
    their fate. Points may have one, two or three costs. They are passed in lexicographic order, so
    that only a point seen earlier can dominate; of those, a staircase in the last two costs keeps
    what matters: O(N log N) comparisons.

    >>> front([(1, 5), (2, 2), (3, 3), (2, 2), (5, 1)])
    (0, 1, 3, 4)
    """
    points = [tuple(float(value) for value in (*point, 0.0, 0.0)[:3]) for point in costs]
    if any(value != value for point in points for value in point):
        raise ValueError("front: a cost is NaN; only numbers can be compared")
    seconds: list[float] = []
    thirds: list[float] = []
    kept: list[int] = []
    last: tuple[float, ...] = ()
    is_kept = False
    for place in sorted(range(len(points)), key=points.__getitem__):
        point = points[place]
        if point != last:
            _, second, third = last = point
            below = bisect_right(seconds, second)
            is_kept = not below or thirds[below - 1] > third
            if is_kept:
                begin = end = bisect_left(seconds, second)
                while end < len(thirds) and thirds[end] >= third:
                    end += 1
                seconds[begin:end], thirds[begin:end] = [second], [third]
        if is_kept:
            kept.append(place)
    return tuple(sorted(kept))
