"""The schedule synthesiser: an order of actions made for given times, transfers and memory.

Named schedules are made for stages that are alike. Where stages, halves of backwards or links are
not, or where memory is short, an order made for the case at hand is faster. It is found by list
scheduling with many simple rules, by giving the orders of all named schedules to the same list
scheduler, and by a local search from the best of them; the best named schedule itself is kept in
the race, so that the result is never worse.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from planner.schedules import SCHEDULES
from planner.synthesis_kernels import Pipeline
from planner.synthesis_search import fulfil, improve, join_halves, rules, schedule_of, wish_of
from simulator.checks import Int64
from simulator.compiled import NEVER
from simulator.deadlock import DeadlockError
from simulator.engine import step_ns
from simulator.schedule import STAGE_MASK, STAGE_SHIFT, Schedule, check_size
from simulator.step import Convention, StepTimes

DEFAULT_TRIALS = 1_000
"""Enough to come within 1 or 2 % of what 20 times as many reach."""
MAX_BYTES = 1 << 50
"""The largest cap; sums over the micro-batches of a step stay in int64."""


class CapError(ValueError):
    """Not even one micro-batch at a time fits; the message names rank and smallest relaxation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationCap:
    """What each pipeline rank may hold of activations, and what each stage holds.

    A forward holds `activation_bytes` of its stage until the backward of its micro-batch has ended.
    Of a backward in halves the input half frees all but `weight_bytes`, the weight half the rest;
    without `weight_bytes` the weight half frees all, as it does in PyTorch. `cap_bytes` is one
    number a rank. Raises ValueError for a number that is not whole or negative.
    """

    activation_bytes: tuple[int, ...]
    cap_bytes: tuple[int, ...]
    weight_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("activation_bytes", "cap_bytes", "weight_bytes"):
            for place, number in enumerate(getattr(self, name)):
                if type(number) is not int or not 0 <= number <= MAX_BYTES:
                    raise ValueError(
                        f"cap.{name}[{place}] is {number!r}; "
                        f"it must be a whole number of bytes from 0 to {MAX_BYTES}"
                    )
        if self.weight_bytes and len(self.weight_bytes) != len(self.activation_bytes):
            raise ValueError(
                f"cap.weight_bytes has {len(self.weight_bytes)} stages, cap.activation_bytes "
                f"{len(self.activation_bytes)}; give one number a stage to both"
            )
        for stage, kept in enumerate(self.weight_bytes):
            if kept > self.activation_bytes[stage]:
                raise ValueError(
                    f"cap.weight_bytes[{stage}] is {kept}, cap.activation_bytes[{stage}] is "
                    f"{self.activation_bytes[stage]}; a weight half can keep that at most"
                )

    @property
    def kept_bytes(self) -> tuple[int, ...]:
        """What each stage holds between the halves of a backward."""
        return self.weight_bytes or self.activation_bytes

    def peak_bytes(self, schedule: Schedule) -> tuple[int, ...]:
        """Return the most that each rank holds under `schedule`.

        >>> from simulator.schedule import parse_schedule
        >>> cap = ActivationCap(activation_bytes=(10,), cap_bytes=(20,), weight_bytes=(4,))
        >>> cap.peak_bytes(parse_schedule("0F0 0I0 0F1 0W0 0B1"))
        (14,)
        """
        held, kept = (np.array(n, np.int64) for n in (self.activation_bytes, self.kept_bytes))
        changes = np.stack((held, -held, kept - held, -kept))
        return tuple(
            int(changes[order & 3, (order >> STAGE_SHIFT) & STAGE_MASK].cumsum().max())
            for order in schedule.orders
        )

    def admits(self, schedule: Schedule) -> bool:
        """Return whether no rank holds more than its cap under `schedule`."""
        return all(
            peak <= cap for peak, cap in zip(self.peak_bytes(schedule), self.cap_bytes, strict=True)
        )


def synthesise(
    times: StepTimes,
    num_microbatches: int,
    *,
    homes: Sequence[int],
    cap: ActivationCap,
    splits_backward: bool = True,
    convention: Convention = "eager",
    seed: int = 0,
    num_trials: int = DEFAULT_TRIALS,
) -> Schedule:
    """Return an order for `times` under `cap`, no slower than any named schedule that fits.

    `homes[s]` is the rank of stage s. Backwards are split where that helps, or never. The work is
    `num_trials` whole schedules and some hundred for the start; the same input gives the same
    order. The search takes messages as eager. The last comparison is made under `convention`:
    under a rendezvous named schedules that block are out, and what the search makes never blocks,
    since each rank reads the messages of a link in the order of their sends.

    Raises ValueError for counts that do not fit together, and CapError where one micro-batch at a
    time breaks the cap.

    >>> from simulator.step import step_times
    >>> times = step_times(2, forward=10, backward=20, weight=10)
    >>> cap = ActivationCap(activation_bytes=(1, 1), cap_bytes=(2, 2))
    >>> print(synthesise(times, 3, homes=(0, 1), cap=cap))
    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """
    pipeline = pipeline_of(times, num_microbatches, homes, cap)
    named = [
        schedule
        for schedule in _named(tuple(homes), num_microbatches)
        if cap.admits(schedule) and (splits_backward or not schedule.splits_backward)
    ]
    wishes = chain(
        (wish_of(s.orders, s.num_stages, num_microbatches) for s in named),
        rules(pipeline, num_microbatches, splits_backward=splits_backward),
    )
    found = (order for wish in wishes if (order := fulfil(pipeline, wish)) is not None)
    best = improve(
        pipeline,
        min(found, key=lambda order: (order.length_ns, len(order.codes))),
        splits_backward=splits_backward,
        bound_ns=bound_ns(pipeline, num_microbatches, splits_backward=splits_backward),
        num_trials=num_trials,
        seed=seed,
    )
    best = join_halves(pipeline, best)
    made = schedule_of(pipeline, best)
    # Of equals the one that splits least: halves cost the host more than a whole.
    winner = min((*named, made), key=lambda s: (_length_ns(s, times, convention), s.num_actions))
    return Schedule(
        name=made.name,
        num_stages=made.num_stages,
        num_microbatches=num_microbatches,
        orders=winner.orders,
    )


def bound_ns(pipeline: Pipeline, num_microbatches: int, *, splits_backward: bool) -> int:
    """Return a time that no order can beat, for any memory.

    A rank begins when the first micro-batch reaches it, does all its work, and then, where
    backwards are whole, its last gradient travels to stage 0.
    """
    ns, homes = pipeline.ns, pipeline.homes
    work = ns[0] + (np.minimum(ns[1], ns[2] + ns[3]) if splits_backward else ns[1])
    crosses = homes[1:] != homes[:-1]
    there = np.append(0, np.cumsum(ns[0, :-1] + ns[4, :-1] * crosses))
    back = np.append(0, np.cumsum(ns[1, :-1] + ns[5, 1:] * crosses))
    first, last = pipeline.edges_ns
    longest = 0
    for rank in range(len(first)):
        own = homes == rank
        begin = max(first[rank], (first[homes[0]] + there[own]).min())
        end = begin + num_microbatches * work[own].sum()
        way_ns = 0 if splits_backward else (back[own] + last[homes[0]]).min()
        longest = max(longest, int(end + max(last[rank], way_ns)))
    return longest


def _length_ns(schedule: Schedule, times: StepTimes, convention: Convention) -> int:
    """Return the length of a step; longer than any if the schedule blocks itself."""
    try:
        return int(step_ns(schedule, times, convention=convention)[0])
    except DeadlockError:
        return NEVER


def _named(homes: tuple[int, ...], num_microbatches: int) -> Iterator[Schedule]:
    """Yield every named schedule whose stages live where `homes` says."""
    num_ranks = max(homes) + 1
    stages_per_rank, rest = divmod(len(homes), num_ranks)
    for family in SCHEDULES.values():
        if not rest and family.takes(stages_per_rank):
            schedule = family.build(num_ranks, num_microbatches, stages_per_rank)
            if tuple(schedule.homes.tolist()) == homes:
                yield schedule


def pipeline_of(
    times: StepTimes, num_microbatches: int, homes: Sequence[int], cap: ActivationCap
) -> Pipeline:
    """Return what the list scheduler reads; raise what `synthesise` raises."""
    num_stages, num_ranks = len(homes), len(cap.cap_bytes)
    check_size("synthesised", num_stages, num_microbatches, num_ranks)
    _check(times, homes, cap)
    home = np.array(homes, np.int64)
    before, after = (edge[:, 0] for edge in times.edge_ns())
    is_home = home == np.arange(num_ranks)[:, None]
    held = np.array((cap.activation_bytes, cap.kept_bytes), np.int64)
    needed = is_home @ held[0]
    _check_room(needed, np.array(cap.cap_bytes))
    return Pipeline(
        ns=np.ascontiguousarray(times.ns[:6, :, 0]),
        homes=home,
        stages=np.argsort(home, kind="stable"),
        offsets=np.append(0, np.cumsum(is_home.sum(axis=1))),
        edges_ns=np.stack((is_home @ before, is_home @ after)),
        alive_bytes=held,
        room_bytes=np.array((cap.cap_bytes, needed)),
    )


def _check(times: StepTimes, homes: Sequence[int], cap: ActivationCap) -> None:
    """Raise ValueError where times, homes and cap are not of the same stages and ranks."""
    if times.num_lanes != 1:
        raise ValueError(f"times have {times.num_lanes} lanes; take one of them, times.lane(0)")
    for what, count in (("times", times.num_stages), ("cap", len(cap.activation_bytes))):
        if count != len(homes):
            raise ValueError(f"{what} has {count} stages, homes has {len(homes)}")
    num_ranks = len(cap.cap_bytes)
    if missing := sorted(set(range(num_ranks)) - set(homes)):
        raise ValueError(f"rank {missing[0]} of {num_ranks} in cap is the home of no stage")
    for stage, rank in enumerate(homes):
        if not 0 <= rank < num_ranks:
            raise ValueError(f"homes[{stage}] is rank {rank}; cap has ranks 0 to {num_ranks - 1}")


def _check_room(needed: Int64, cap: Int64) -> None:
    """Raise CapError where a rank cannot hold one micro-batch on all its stages."""
    short = np.flatnonzero(needed > cap).tolist()
    if short:
        relaxation = ", ".join(f"cap_bytes[{r}] by {needed[r] - cap[r]}" for r in short[:8])
        more = f" and {len(short) - 8} more" if len(short) > 8 else ""
        raise CapError(
            f"rank {short[0]} holds {needed[short[0]]} bytes of activations with one micro-batch "
            f"in flight, its cap is {cap[short[0]]}; raise {relaxation}{more}"
        )
