"""Schedules: every named one passes all common tests; closed forms hold exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.lower import lower, simulate_step
from planner.memory import peak_alive
from planner.plan import StageCost
from planner.schedule import SCHEDULES, Action, Schedule, gpipe, one_f_one_b, parse_schedule
from profiles.profile import Cost
from simulator.deadlock import DeadlockError
from simulator.engine import simulate

F_NS, B_NS = 70, 130
NAMES = sorted(SCHEDULES)
stages, microbatches = st.integers(1, 8), st.integers(1, 16)


def cost(ns: int) -> Cost:
    return Cost(p10_ns=ns, p50_ns=ns, p90_ns=ns)


def uniform(num_stages: int, send_ns: int = 0) -> list[StageCost]:
    return [
        StageCost(
            forward=cost(F_NS), backward=cost(B_NS), send_forward=cost(send_ns),
            send_backward=cost(send_ns), all_reduce=cost(0), optimizer=cost(0), other=cost(0),
            wait=cost(0),
            tensor_parallel_forward_ns=0, tensor_parallel_backward_ns=0,
        )
        for _ in range(num_stages)
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@given(p=stages, m=microbatches)
def test_text_and_csv_read_back(name: str, p: int, m: int) -> None:
    schedule = SCHEDULES[name](p, m)
    assert parse_schedule(str(schedule), name) == schedule
    assert parse_schedule(schedule.to_csv(), name) == schedule


@pytest.mark.parametrize("name", NAMES)
@given(p=stages, m=microbatches)
def test_uniform_step_is_closed_form(name: str, p: int, m: int) -> None:
    timeline = simulate_step(SCHEDULES[name](p, m), uniform(p))
    assert timeline.makespan_ns == (m + p - 1) * (F_NS + B_NS)


@pytest.mark.parametrize("name", NAMES)
@given(p=stages, m=microbatches, send_ns=st.integers(0, 200))
def test_engines_agree_on_schedules(name: str, p: int, m: int, send_ns: int) -> None:
    step = lower(SCHEDULES[name](p, m))
    durations = step.durations_ns(uniform(p, send_ns), "p50_ns")
    assert simulate(step.graph, durations) == simulate(step.graph, durations, engine="simpy")


@given(m=microbatches)
def test_one_f_one_b_pays_for_messages_both_ways(m: int) -> None:
    # In 1F1B two stages wait for a message there and back once in every two micro-batches (the
    # mean over both stages of the ring F, message, F + B, message, B); GPipe hides all but the
    # first and the last message behind other micro-batches.
    send_ns = 10
    one = simulate_step(one_f_one_b(2, m), uniform(2, send_ns)).makespan_ns
    assert one == (m + 1) * (F_NS + B_NS) + 2 * send_ns * ((m + 1) // 2)
    all_then_all = simulate_step(gpipe(2, m), uniform(2, send_ns)).makespan_ns
    assert all_then_all == (m + 1) * (F_NS + B_NS) + 2 * send_ns


@given(p=stages, m=microbatches)
def test_activation_peaks(p: int, m: int) -> None:
    assert [peak_alive(gpipe(p, m), rank) for rank in range(p)] == [m] * p
    assert [peak_alive(one_f_one_b(p, m), r) for r in range(p)] == [min(p - r, m) for r in range(p)]


def test_one_f_one_b_order() -> None:
    assert str(one_f_one_b(2, 3)) == "0F0 0F1 0B0 0F2 0B1 0B2\n1F0 1B0 1F1 1B1 1F2 1B2"


def test_an_order_that_blocks_is_named() -> None:
    schedule = parse_schedule("0F0 0B0 0F1 0B1\n1F1 1F0 1B0 1B1")
    with pytest.raises(DeadlockError) as raised:
        simulate_step(schedule, uniform(2))
    assert "0B0 (rank 0, compute) waits for 1B0 to 0 (rank 1, to 0)" in str(raised.value)
    assert "1F1 (rank 1, compute) waits for 0F1 to 1 (rank 0, to 1)" in str(raised.value)


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


def test_a_split_backward_is_a_schedule_but_has_no_cost_yet() -> None:
    schedule = parse_schedule("0F0 0I0 0W0")
    assert isinstance(schedule, Schedule)
    assert schedule.ranks[0][1] == Action(0, "I", 0)
    with pytest.raises(ValueError, match="cannot be timed yet"):
        lower(schedule)
