"""The synthesiser: never worse than a named schedule, never above the cap, optimal where known."""

from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.schedules import SCHEDULES
from planner.synthesis import ActivationCap, CapError, bound_ns, pipeline_of, synthesise
from planner.synthesis_search import fulfil, rules, schedule_of
from simulator.checks import Int64
from simulator.compiled import NEVER
from simulator.deadlock import DeadlockError
from simulator.engine import step_ns
from simulator.schedule import B, I, Schedule, W, parse_schedule
from simulator.step import Convention, StepTimes, step_times

F_NS, HALF_NS = 100, 100
CONVENTIONS: tuple[Convention, ...] = ("eager", "rendezvous")


def units(homes: tuple[int, ...], *cap_bytes: int) -> ActivationCap:
    """Return a cap in a machine on which every stage holds one byte."""
    num_ranks = max(homes) + 1
    caps = cap_bytes if len(cap_bytes) == num_ranks else cap_bytes * num_ranks
    return ActivationCap(activation_bytes=(1,) * len(homes), cap_bytes=caps)


def uniform(num_stages: int, send_ns: int = 0) -> StepTimes:
    return step_times(
        num_stages, forward=F_NS, backward=2 * HALF_NS, weight=HALF_NS,
        send_forward=send_ns, send_backward=send_ns,
    )  # fmt: skip


def length(schedule: Schedule, times: StepTimes, convention: Convention = "eager") -> int:
    return int(step_ns(schedule, times, convention=convention)[0])


def named(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    return SCHEDULES[name].build(num_ranks, num_microbatches)


@st.composite
def homes_of(draw: st.DrawFn) -> tuple[int, ...]:
    num_ranks, stages_per_rank = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    ranks = tuple(range(num_ranks))
    is_v = stages_per_rank == 2 and draw(st.booleans())
    return ranks + ranks[::-1] if is_v else ranks * stages_per_rank


@st.composite
def times_of(draw: st.DrawFn, num_stages: int) -> StepTimes:
    def numbers(most: int) -> list[int]:
        return draw(st.lists(st.integers(0, most), min_size=num_stages, max_size=num_stages))

    weight = numbers(100)
    return step_times(
        num_stages,
        forward=numbers(100),
        backward=[w + extra for w, extra in zip(weight, numbers(100), strict=True)],
        weight=weight,
        send_forward=numbers(30),
        send_backward=numbers(30),
        before={"other": numbers(20)},
        after={"optimizer": numbers(20)},
    )


@st.composite
def caps_of(draw: st.DrawFn, homes: tuple[int, ...]) -> ActivationCap:
    held = [draw(st.integers(0, 9)) for _ in homes]
    need = [
        sum(b for b, home in zip(held, homes, strict=True) if home == rank)
        for rank in range(max(homes) + 1)
    ]
    return ActivationCap(
        activation_bytes=tuple(held),
        weight_bytes=tuple(draw(st.integers(0, most)) for most in held),
        cap_bytes=tuple(n + draw(st.integers(0, 6 * n)) for n in need),
    )


def fitting(
    homes: tuple[int, ...], m: int, cap: ActivationCap, *, splits_backward: bool
) -> list[Schedule]:
    """Return all named schedules that live on `homes` and fit."""
    num_ranks = max(homes) + 1
    every = [
        family.build(num_ranks, m, len(homes) // num_ranks)
        for family in SCHEDULES.values()
        if family.takes(len(homes) // num_ranks)
    ]
    return [
        schedule
        for schedule in every
        if tuple(schedule.homes.tolist()) == homes
        and all(
            peak <= most for peak, most in zip(peaks(schedule, cap), cap.cap_bytes, strict=True)
        )
        and (splits_backward or not schedule.splits_backward)
    ]


def peaks(schedule: Schedule, cap: ActivationCap) -> list[int]:
    """Count the bytes of each rank one action after the other."""
    result = []
    for actions in schedule.ranks:
        alive = peak = 0
        for stage, kind, _ in actions:
            held, kept = cap.activation_bytes[stage], cap.kept_bytes[stage]
            alive += {"F": held, "B": -held, "I": kept - held, "W": -kept}[kind]
            peak = max(peak, alive)
        assert alive == 0
        result.append(peak)
    return result


@settings(max_examples=40, deadline=None)
@given(data=st.data(), homes=homes_of(), m=st.integers(1, 12), splits_backward=st.booleans())
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_never_worse_than_a_named_one_that_fits(
    convention: Convention,
    data: st.DataObject,
    homes: tuple[int, ...],
    m: int,
    splits_backward: bool,
) -> None:
    times, cap = data.draw(times_of(len(homes))), data.draw(caps_of(homes))
    made = synthesise(
        times, m, homes=homes, cap=cap, splits_backward=splits_backward,
        convention=convention, num_trials=10,
    )  # fmt: skip
    assert made.name == "synthesised"
    assert made.num_microbatches == m
    assert tuple(made.homes.tolist()) == homes
    assert splits_backward or not made.splits_backward
    assert all(peak <= most for peak, most in zip(peaks(made, cap), cap.cap_bytes, strict=True))
    made_ns = length(made, times, convention)
    for schedule in fitting(homes, m, cap, splits_backward=splits_backward):
        try:
            assert made_ns <= length(schedule, times, convention), schedule.name
        except DeadlockError:
            assert convention == "rendezvous"


@settings(max_examples=30, deadline=None)
@given(data=st.data(), homes=homes_of(), m=st.integers(1, 8), splits_backward=st.booleans())
def test_every_listed_order_is_timed_as_the_engine_times_it(
    data: st.DataObject, homes: tuple[int, ...], m: int, splits_backward: bool
) -> None:
    times, cap = data.draw(times_of(len(homes))), data.draw(caps_of(homes))
    pipeline = pipeline_of(times, m, homes, cap)
    wishes = list(rules(pipeline, m, splits_backward=splits_backward))
    found = [order for wish in wishes if (order := fulfil(pipeline, wish)) is not None]
    assert found
    least_ns = bound_ns(pipeline, m, splits_backward=splits_backward)
    for order in found[:: 1 + len(found) // 8]:
        schedule = schedule_of(pipeline, order)
        assert order.length_ns == length(schedule, times) >= least_ns
        assert length(schedule, times, "rendezvous") >= order.length_ns
        assert all(a <= b for a, b in zip(peaks(schedule, cap), cap.cap_bytes, strict=True))


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 5), (4, 4), (4, 8), (6, 13), (8, 32)])
@pytest.mark.parametrize(("cap_in_p", "name"), [(1, "zb_h1"), (2, "zb_h2")])
def test_list_scheduling_alone_reaches_the_zero_bubble_step(
    p: int, m: int, cap_in_p: int, name: str
) -> None:
    # The last rank cannot begin before p - 1 forwards and has 3 m units of work. H1 gets there
    # with the memory of 1F1B only because messages are free: see the next test for those.
    homes = tuple(range(p))
    pipeline = pipeline_of(uniform(p), m, homes, units(homes, cap_in_p * p))
    found = [fulfil(pipeline, wish) for wish in rules(pipeline, m, splits_backward=True)]
    shortest = min(order.length_ns for order in found if order is not None)
    assert shortest == (p - 1) * F_NS + 3 * m * F_NS <= length(named(name, p, m), uniform(p))


@pytest.mark.parametrize(("p", "m"), [(2, 6), (4, 8), (8, 32)])
def test_with_twice_the_memory_of_1f1b_messages_make_no_bubble(p: int, m: int) -> None:
    homes, send_ns = tuple(range(p)), 15
    times = uniform(p, send_ns)
    least_ns = (p - 1) * (F_NS + send_ns) + 3 * m * F_NS
    tight = synthesise(times, m, homes=homes, cap=units(homes, p))
    ample = synthesise(times, m, homes=homes, cap=units(homes, 2 * p - 1))
    assert length(ample, times) == least_ns < length(tight, times)
    assert length(tight, times) <= length(named("zb_h1", p, m), times)
    assert length(ample, times) <= length(named("zb_h2", p, m), times)


@given(p=st.integers(1, 5), m=st.integers(1, 6), send_ns=st.integers(0, 40))
@settings(max_examples=20, deadline=None)
def test_room_for_one_micro_batch_takes_one_at_a_time(p: int, m: int, send_ns: int) -> None:
    homes = tuple(range(p))
    made = synthesise(
        uniform(p, send_ns), m, homes=homes, cap=units(homes, 1), splits_backward=False
    )
    round_trip_ns = p * (F_NS + 2 * HALF_NS) + 2 * (p - 1) * send_ns
    assert length(made, uniform(p, send_ns)) == m * round_trip_ns


# Forwards of the stages (backwards take twice as long, one half of them for weights), messages,
# whether backwards may be split, room in micro-batches; then what 1F1B takes, what the best named
# schedule takes that fits, and what is made.
GOLDEN = {
    "a slow second stage": ((100, 160, 100, 100), 10, True, 4, 4480, 4070, 3950),
    "a slow first stage": ((160, 100, 100, 100), 10, True, 5, 4320, 4020, 3860),
    "uneven": ((70, 130, 90, 120), 10, True, 4, 3910, 3400, 3280),
    "uneven, backwards whole": ((70, 130, 90, 120), 10, False, 4, 3910, 3910, 3850),
    "slow links, backwards whole": ((100, 160, 100, 100), 40, False, 5, 4780, 4780, 4340),
}


@pytest.mark.parametrize(
    ("forward", "send_ns", "splits", "room", "one_ns", "named_ns", "made_ns"),
    GOLDEN.values(),
    ids=GOLDEN.keys(),
)
def test_uneven_stages_beat_one_f_one_b(
    forward: tuple[int, ...],
    send_ns: int,
    splits: bool,
    room: int,
    one_ns: int,
    named_ns: int,
    made_ns: int,
) -> None:
    homes, m = (0, 1, 2, 3), 8
    times = step_times(
        4, forward=forward, backward=[2 * f for f in forward], weight=forward,
        send_forward=send_ns, send_backward=send_ns,
    )  # fmt: skip
    cap = units(homes, room)
    made = synthesise(times, m, homes=homes, cap=cap, splits_backward=splits)
    rivals = [length(s, times) for s in fitting(homes, m, cap, splits_backward=splits)]
    found = length(named("1f1b", 4, m), times), min(rivals), length(made, times)
    assert found == (one_ns, named_ns, made_ns)


def test_an_order_to_read() -> None:
    # Rank 0 has room for two. Rank 1 puts its weight halves behind the gradients that rank 0
    # waits for, and needs no more room for that than it has.
    times = step_times(2, forward=20, backward=40, weight=20, send_forward=5, send_backward=5)
    made = synthesise(times, 3, homes=(0, 1), cap=units((0, 1), 2))
    assert str(made) == "0F0 0F1 0B0 0F2 0B1 0B2\n1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2"


def orders_of(stage: int, chains: tuple[str, ...], *, in_turn: bool) -> list[str]:
    """Return all orders of one stage that do the kinds of each micro-batch in their order.

    `in_turn`: also every kind in the order of the micro-batches. Where all have the same chain no
    other order is better, since micro-batches are equal: exchange two that are out of turn.
    """
    if not any(chains):
        return [""]
    orders = []
    for k, chain in enumerate(chains):
        if chain and not (in_turn and any(len(other) >= len(chain) for other in chains[:k])):
            rest = (*chains[:k], chain[1:], *chains[k + 1 :])
            orders += [
                f"{stage}{chain[0]}{k} {order}" for order in orders_of(stage, rest, in_turn=in_turn)
            ]
    return orders


def shortest(times: StepTimes, caps: Sequence[ActivationCap], *every: list[str]) -> Int64:
    """Return the shortest steps [caps, lanes] of all orders of the ranks that fit and go through.

    `every` are the orders of each rank.
    """
    best = np.full((len(caps), times.num_lanes), NEVER)
    for orders in product(*every):
        schedule = parse_schedule("\n".join(orders))
        with suppress(DeadlockError):
            lengths = step_ns(schedule, times)
            for row, cap in enumerate(caps):
                if all(a <= b for a, b in zip(peaks(schedule, cap), cap.cap_bytes, strict=True)):
                    best[row] = np.minimum(best[row], lengths)
    return best


# Three machines side by side: messages that are cheap and dear, stages that are alike and not.
THREE = step_times(
    2,
    forward=[[20, 40, 11], [31, 15, 12]],
    backward=[[43, 60, 29], [50, 33, 27]],
    weight=[[24, 35, 11], [21, 14, 14]],
    input_=[[21, 27, 18], [31, 19, 15]],
    send_forward=[[7, 3, 19], [0, 0, 0]],
    send_backward=[[0, 0, 0], [4, 9, 14]],
)


def made_for_all(times: StepTimes, m: int, caps: Sequence[ActivationCap], *, splits: bool) -> Int64:
    return np.array(
        [
            [
                length(synthesise(lane, m, homes=(0, 1), cap=cap, splits_backward=splits), lane)
                for lane in map(times.lane, range(times.num_lanes))
            ]
            for cap in caps
        ]
    )


def test_two_micro_batches_are_ordered_best() -> None:
    caps = [units((0, 1), *cap_bytes) for cap_bytes in ((1, 1), (2, 1), (2, 2))]
    first, second = (
        [
            order
            for chains in product(("FB", "FIW"), repeat=2)
            for order in orders_of(stage, chains, in_turn=False)
        ]
        for stage in range(2)
    )
    assert len(first) == len(second) == 46
    # The micro-batch that rank 0 begins with may be called 0.
    first = [order for order in first if order.startswith("0F0")]
    best = shortest(THREE, caps, first, second)
    assert np.array_equal(made_for_all(THREE, 2, caps, splits=True), best)


@pytest.mark.parametrize(("chain", "count"), [("FB", 5), ("FIW", 42)])
def test_three_micro_batches_are_ordered_best(chain: str, count: int) -> None:
    caps = [units((0, 1), *cap_bytes) for cap_bytes in ((2, 1), (2, 2), (3, 3))]
    every = [orders_of(stage, (chain,) * 3, in_turn=True) for stage in range(2)]
    assert [len(orders) for orders in every] == [count, count]
    # Where halves cost no more than a whole, splitting all is as good as splitting some.
    ns = THREE.ns.copy()
    ns[B] = ns[I] + ns[W]
    times = StepTimes(ns=ns)
    best = shortest(times, caps, *every)
    assert np.array_equal(made_for_all(times, 3, caps, splits=chain == "FIW"), best)


def test_the_same_input_gives_the_same_order() -> None:
    times = step_times(3, forward=[10, 17, 12], backward=[23, 31, 20], weight=[9, 14, 11])
    cap = units((0, 1, 2), 2)

    def make(seed: int) -> Schedule:
        return synthesise(times, 6, homes=(0, 1, 2), cap=cap, seed=seed)

    assert make(0) == make(0)
    assert length(make(1), times) <= length(named("1f1b", 3, 6), times)


def test_too_little_room_is_named_with_the_way_out() -> None:
    cap = ActivationCap(activation_bytes=(30, 20, 30, 20), cap_bytes=(55, 39))
    with pytest.raises(CapError) as raised:
        synthesise(uniform(4), 8, homes=(0, 1, 0, 1), cap=cap)
    assert str(raised.value) == (
        "rank 0 holds 60 bytes of activations with one micro-batch in flight, its cap is 55; "
        "raise cap_bytes[0] by 5, cap_bytes[1] by 1"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"homes": (0, 2)}, "rank 1 of 2 in cap is the home of no stage"),
        ({"homes": (0, 1, 2)}, "times has 2 stages, homes has 3"),
        ({"homes": (0, 1, 1), "times": uniform(3)}, "cap has 2 stages, homes has 3"),
        ({"num_microbatches": 0}, "0 micro-batches; it can have 1 to"),
        ({"num_microbatches": 10**9}, "1000000000 micro-batches; it can have 1 to"),
        (
            {"times": step_times(2, forward=[[1, 2], [3, 4]], backward=5)},
            r"times have 2 lanes; take one of them, times.lane\(0\)",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {
        "times": uniform(2),
        "num_microbatches": 4,
        "homes": (0, 1),
        "cap": units((0, 1), 2),
    }
    given_ |= changes
    with pytest.raises(ValueError, match=message):
        synthesise(**given_)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"cap_bytes": (-1,)}, r"cap.cap_bytes\[0\] is -1; it must be a whole number"),
        ({"activation_bytes": (1.5,)}, r"cap.activation_bytes\[0\] is 1.5; it must be"),
        ({"activation_bytes": (True,)}, r"cap.activation_bytes\[0\] is True; it must be"),
        ({"weight_bytes": (1, 2)}, "cap.weight_bytes has 2 stages, cap.activation_bytes 1"),
        ({"weight_bytes": (7,)}, r"cap.weight_bytes\[0\] is 7, cap.activation_bytes\[0\] is 5"),
    ],
)
def test_a_cap_is_whole_when_made(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationCap(**({"activation_bytes": (5,), "cap_bytes": (9,)} | numbers))
