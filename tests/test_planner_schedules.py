"""Schedules: every named one passes all common tests, and its closed forms hold exactly."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.schedules import SCHEDULES
from planner.schedules.torch_csv import from_torch_csv
from simulator.deadlock import DeadlockError
from simulator.engine import Simulation, simulate_step
from simulator.schedule import KINDS, MICROBATCH_SHIFT, Codes, Schedule, parse_schedule
from simulator.step import Convention, StepTimes, step_times


class Case(NamedTuple):
    """p ranks, v stages a rank where the schedule leaves that open, m micro-batches; rank r."""

    p: int
    v: int
    m: int
    r: int = 0


Formula = Callable[[Case], int]

NAMES = sorted(SCHEDULES)
SPLIT = ("dual_pipe_v", "zb_h1", "zb_h2", "zb_v")
every = pytest.mark.parametrize("name", NAMES)
whole = pytest.mark.parametrize("name", sorted({*NAMES} - {*SPLIT}))
split = pytest.mark.parametrize("name", SPLIT)
cases = st.builds(Case, p=st.integers(1, 8), v=st.integers(2, 4), m=st.integers(1, 20))
seeds, times_ns = st.integers(0, 2**32), st.integers(0, 99)
often, seldom = settings(max_examples=25, deadline=None), settings(max_examples=12, deadline=None)

# The step in units of F = I = W, with B = I + W.
STEP: dict[str, Formula] = {
    "gpipe": lambda n: 3 * (n.m + n.p - 1),
    "1f1b": lambda n: 3 * (n.m + n.p - 1),
    "interleaved": lambda n: 3 * (n.m * n.v + n.p - 1 + (n.v - 1) * max(0, n.p - n.m)),
    "breadth_first": lambda n: 3 * (n.m * n.v + n.p - 1 + (n.v - 1) * max(0, n.p - n.m)),
    "zb_h1": lambda n: 3 * n.m + n.p - 1 + max(0, n.p - n.m),
    "zb_h2": lambda n: 3 * n.m + n.p - 1 + max(0, (2 * n.p - 1 - n.m) // 2),
    "zb_v": lambda n: 6 * n.m + n.p - 1 + max(0, 3 * n.p - 1 - 2 * n.m),
    "dual_pipe_v": lambda n: (
        6 * n.m + n.p - 1 + (2 * (2 * n.p - n.m - (n.m <= n.p)) if n.m < 2 * n.p else 0)
    ),
}
# Micro-batches of one stage that rank r keeps alive at most.
PEAK: dict[str, Formula] = {
    "gpipe": lambda n: n.m,
    "1f1b": lambda n: min(n.p - n.r, n.m),
    "interleaved": lambda n: min(
        2 * (n.p - 1 - n.r) + (n.v - 1) * -(-n.m // max(1, n.m // n.p)) + 1, n.m * n.v
    ),
    "breadth_first": lambda n: n.m * n.v,
    "zb_h1": lambda n: min(n.p, n.m),
    "zb_h2": lambda n: min(2 * n.p - 1, n.m),
    "zb_v": lambda n: min(n.m + n.r + 1, 2 * n.m, 2 * n.p),
    "dual_pipe_v": lambda n: min(n.m + n.r + 1, 2 * n.m, 2 * n.p + 1),
}
# Units for which rank r waits between its first and its last action, once m is `FILLED`.
IDLE: dict[str, Formula] = {
    "zb_h1": lambda n: n.p - 1 - n.r,
    "zb_h2": lambda _: 0,
    "zb_v": lambda _: 0,
    "dual_pipe_v": lambda n: n.p - 1 - n.r,
}
FILLED: dict[str, Formula] = {
    "zb_h1": lambda n: n.p,
    "zb_h2": lambda n: 2 * n.p - 1,
    "zb_v": lambda n: 2 * n.p - 1,
    "dual_pipe_v": lambda n: 2 * n.p,
}


def home(name: str, p: int, stage: int) -> int:
    """Return the rank of a stage: straight on, round and round, or out and back."""
    return min(stage, 2 * p - 1 - stage) if name in ("zb_v", "dual_pipe_v") else stage % p


def build(name: str, case: Case) -> Schedule:
    family = SCHEDULES[name]
    return family.build(case.p, case.m, None if family.stages_per_rank else case.v)


def uniform(schedule: Schedule, forward: int, input_: int, weight: int, send: int = 0) -> StepTimes:
    return step_times(
        schedule.num_stages,
        forward=forward,
        backward=input_ + weight,
        weight=weight,
        send_forward=send,
        send_backward=send,
    )


def uneven(schedule: Schedule, seed: int, longest_send: int) -> StepTimes:
    draw, size = np.random.default_rng(seed).integers, schedule.num_stages
    weight = draw(0, 60, size)
    return step_times(
        size,
        forward=draw(1, 100, size),
        backward=weight + draw(1, 100, size),
        weight=weight,
        send_forward=draw(0, longest_send + 1, size),
        send_backward=draw(0, longest_send + 1, size),
    )


def peak_alive(order: Codes) -> int:
    """Return how many activations an order keeps at most: F makes one, B or W frees it."""
    change = np.array([{"F": 1, "B": -1, "I": 0, "W": -1}[kind] for kind in KINDS])
    return int(change[order & 3].cumsum().max())


@every
@given(case=cases)
@often
def test_text_and_csv_read_back(name: str, case: Case) -> None:
    schedule = build(name, case)
    assert parse_schedule(str(schedule), name) == schedule
    assert parse_schedule(schedule.to_csv(), name) == schedule
    assert from_torch_csv(schedule.to_csv(), name) == schedule


@every
@given(case=cases)
@often
def test_stages_lie_where_the_schedule_says(name: str, case: Case) -> None:
    schedule = build(name, case)
    assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == (name, case.p, case.m)
    assert schedule.homes.tolist() == [home(name, case.p, s) for s in range(schedule.num_stages)]
    # DualPipeV splits the backwards of its second half; of one micro-batch, none may be there.
    assert schedule.splits_backward == (name in SPLIT) or (
        name == "dual_pipe_v" and case.m < 2 * case.p
    )


@every
@given(case=cases)
@often
def test_activation_peak_is_its_closed_form(name: str, case: Case) -> None:
    peaks = [peak_alive(order) for order in build(name, case).orders]
    assert peaks == [PEAK[name](case._replace(r=rank)) for rank in range(case.p)]


@every
@given(case=cases)
@often
def test_uniform_step_is_its_closed_form(name: str, case: Case) -> None:
    schedule = build(name, case)
    step = simulate_step(schedule, uniform(schedule, 7, 7, 7))
    assert step.makespan_ns == 7 * STEP[name](case)


@whole
@given(case=cases, forward=times_ns, backward=times_ns)
@often
def test_step_of_whole_backwards_for_any_times(
    name: str, case: Case, forward: int, backward: int
) -> None:
    schedule = build(name, case)
    step = simulate_step(schedule, uniform(schedule, forward, backward, 0))
    assert step.makespan_ns == STEP[name](case) // 3 * (forward + backward)


@pytest.mark.parametrize(("name", "lead"), [("zb_h1", 1), ("zb_h2", 2)])
@given(case=cases, times=st.tuples(times_ns, times_ns, times_ns))
@often
def test_zero_bubble_step_for_any_times(
    name: str, lead: int, case: Case, times: tuple[int, int, int]
) -> None:
    case = case._replace(m=FILLED[name](case) + case.m - 1)
    (input_, forward), weight = sorted(times[:2]), times[2]
    schedule = build(name, case)
    step = simulate_step(schedule, uniform(schedule, forward, input_, weight))
    assert step.makespan_ns == case.m * (forward + input_ + weight) + (case.p - 1) * max(
        forward, forward + input_ - lead * weight
    )


@split
@given(case=cases)
@often
def test_ranks_idle_as_long_as_is_known(name: str, case: Case) -> None:
    case = case._replace(m=FILLED[name](case) + case.m - 1)
    schedule = build(name, case)
    step = simulate_step(schedule, uniform(schedule, 1, 1, 1))
    work = 3 * case.m * (schedule.num_stages // case.p)
    for rank, (first, end) in enumerate(pairwise(schedule.offsets.tolist())):
        span = int(step.ends_ns[end - 1] - step.starts_ns[first])
        assert span - work == IDLE[name](case._replace(r=rank))


@every
@given(case=cases, seed=seeds, longest_send=st.sampled_from((0, 80)))
@seldom
def test_uneven_stages_run_and_engines_agree(
    name: str, case: Case, seed: int, longest_send: int
) -> None:
    schedule = build(name, case)
    times = uneven(schedule, seed, longest_send)
    eager = agreed(schedule, times, "eager")
    assert agreed(schedule, times, "rendezvous").makespan_ns >= eager.makespan_ns


def agreed(schedule: Schedule, times: StepTimes, convention: Convention) -> Simulation:
    step = simulate_step(schedule, times, convention=convention)
    reference = simulate_step(schedule, times, convention=convention, oracle=True)
    assert np.array_equal(step.starts_ns, reference.starts_ns)
    assert np.array_equal(step.ends_ns, reference.ends_ns)
    return step


@every
@given(case=cases, seed=seeds)
@often
def test_uneven_step_lies_between_its_bounds(name: str, case: Case, seed: int) -> None:
    # No rank is faster than its own work. A fixed order is monotone in its times, so the closed
    # form with every action as long as the longest of its kind is never exceeded.
    schedule = build(name, case)
    times = uneven(schedule, seed, 0)
    forward, backward, input_, weight = times.ns[:4, :, 0]
    work = np.bincount(schedule.homes, case.m * (forward + backward)).max()
    if name in SPLIT:
        longest = max(forward.max(), input_.max(), weight.max(), -(-backward.max() // 2))
        most = STEP[name](case) * longest
    else:
        most = STEP[name](case) // 3 * (forward.max() + backward.max())
    assert work <= simulate_step(schedule, times).makespan_ns <= most


@pytest.mark.parametrize("name", [name for name in NAMES if SCHEDULES[name].period(4)])
@given(case=cases)
@often
def test_a_period_more_is_a_block_more(name: str, case: Case) -> None:
    family = SCHEDULES[name]
    period = family.period(case.p)
    missing = max(0, family.steady_from(case.p, case.m) - case.m)
    case = case._replace(m=case.m + -(-missing // period) * period)
    longer = build(name, case._replace(m=case.m + period))
    for short, long in zip(build(name, case).orders, longer.orders, strict=True):
        cut = int(np.append(short == long[: len(short)], False).argmin())
        after = long[cut + len(long) - len(short) :]
        assert np.array_equal(short[cut:] + (period << MICROBATCH_SHIFT), after)


@pytest.mark.parametrize("name", ["gpipe", "breadth_first"])
def test_all_forwards_first_has_no_period(name: str) -> None:
    assert SCHEDULES[name].period(4) == 0


@given(case=cases)
@often
def test_zb_h1_fills_no_rank_more_than_1f1b_fills_its_first(case: Case) -> None:
    first = peak_alive(build("1f1b", case).orders[0])
    assert max(map(peak_alive, build("zb_h1", case).orders)) == first


@given(m=st.integers(1, 20))
@often
def test_one_f_one_b_pays_for_messages_both_ways(m: int) -> None:
    # In 1F1B two stages wait for a message there and back once in every two micro-batches (the
    # mean over both stages of the ring F, message, F + B, message, B); GPipe hides all but the
    # first and the last message behind other micro-batches.
    in_turn, all_then_all = build("1f1b", Case(2, 1, m)), build("gpipe", Case(2, 1, m))
    compute_ns, send_ns = (m + 1) * (70 + 130), 10
    times = uniform(in_turn, 70, 130, 0, send_ns)
    assert simulate_step(in_turn, times).makespan_ns == compute_ns + 2 * send_ns * ((m + 1) // 2)
    assert simulate_step(all_then_all, times).makespan_ns == compute_ns + 2 * send_ns


def test_one_f_one_b_order() -> None:
    assert str(build("1f1b", Case(2, 1, 3))) == (
        "0F0 0F1 0B0 0F2 0B1 0B2\n"
        "1F0 1B0 1F1 1B1 1F2 1B2"
    )  # fmt: skip


def test_groups_of_interleaved_never_go_short_of_the_ranks() -> None:
    # Seven micro-batches on three ranks are a group of four and one of three.
    assert str(build("interleaved", Case(3, 2, 7))).splitlines()[2] == (
        "2F0 2F1 2F2 2F3 5F0 5B0 5F1 5B1 5F2 5B2 5F3 5B3 2F4 2B0 2F5 2B1 2F6 2B2 5F4 2B3 "
        "5F5 5B4 5F6 5B5 5B6 2B4 2B5 2B6"
    )


def test_an_order_that_blocks_is_named() -> None:
    schedule = parse_schedule("0F0 0B0 0F1 0B1\n1F1 1F0 1B0 1B1")
    with pytest.raises(DeadlockError) as raised:
        simulate_step(schedule, uniform(schedule, 1, 1, 1))
    assert str(raised.value) == (
        "deadlock with 10 ops left: "
        "0B0 (rank 0, compute) waits for 1B0 to 0 (rank 1, to 0); "
        "1B0 to 0 (rank 1, to 0) waits for 1B0 (rank 1, compute), which stands behind 1F1; "
        "1F1 (rank 1, compute) waits for 0F1 to 1 (rank 0, to 1); "
        "0F1 to 1 (rank 0, to 1) waits for 0F1 (rank 0, compute), which stands behind 0B0"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0X0", "line 1: '0X0' is not an action"),
        ("0F0", "stage 0 has F for micro-batch 0; it needs F and B"),
        ("0F0 0B0 0B0", "stage 0 has BBF"),
        ("0F0 0B0\n0F1 0B1", "stage 0 is on rank 0 and on rank 1"),
        ("1F0 1B0", "stage 0 has nothing"),
    ],
)
def test_bad_text_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_schedule(text)


@every
def test_sizes_that_no_schedule_has_are_refused_before_it_is_built(name: str) -> None:
    with pytest.raises(ValueError, match=f"schedule {name} has 0 micro-batches"):
        build(name, Case(2, 2, 0))
    with pytest.raises(ValueError, match=f"schedule {name} has .000000000 stages"):
        build(name, Case(10**9, 2, 1))


def test_a_family_refuses_stages_that_it_does_not_have() -> None:
    for name, wrong in (("1f1b", 2), ("zb_v", 1), ("dual_pipe_v", 4), ("interleaved", 1)):
        assert not SCHEDULES[name].takes(wrong)
        with pytest.raises(ValueError, match=f"layout.stages_per_rank is {wrong}"):
            SCHEDULES[name].build(2, 4, wrong)
    assert [SCHEDULES[name].build(2, 4).num_stages for name in NAMES] == [2, 4, 4, 2, 4, 2, 2, 4]
