"""Tier 1: the walk equals the graph of the same step, lane by lane, with and without chance."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simulator.fold
from planner.schedules import SCHEDULES
from simulator.deadlock import DeadlockError
from simulator.engine import simulate, simulate_step, step_ns
from simulator.fabric import star
from simulator.fold import folded_step
from simulator.jitter import Jitter, draws, quantile_table, scaled
from simulator.placement import Placement
from simulator.schedule import Schedule, parse_schedule
from simulator.step import Convention, StepTimes, lower, step_times
from simulator.walk import LANES, walk_step

CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


@st.composite
def steps(draw: st.DrawFn, num_lanes: int = 1) -> tuple[Schedule, StepTimes]:
    """Draw a named schedule and uneven times for it; equal numbers are frequent."""
    family = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    schedule = family.build(draw(st.integers(1, 6)), draw(st.integers(1, 12)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    most = draw(st.sampled_from([1, 3, 100, 10**6]))

    def some(high: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        return rng.integers(0, high + 1, (schedule.num_stages, num_lanes))

    backward = some(2 * most)
    return schedule, step_times(
        schedule.num_stages, forward=some(most), backward=backward, weight=backward // 3,
        send_forward=some(most), send_backward=some(most), before={"other": some(most)},
        after={"all_reduce": some(most), "optimizer": some(most)},
    )  # fmt: skip


@settings(max_examples=250)
@given(steps(), st.sampled_from(CONVENTIONS), st.integers(0, 2**32 - 1))
def test_walk_event_loop_and_simpy_agree(
    drawn: tuple[Schedule, StepTimes], convention: Convention, seed: int
) -> None:
    schedule, times = drawn
    jitter = Jitter(seed=seed, compute_spread=0.3, message_spread=0.5)
    for chance in (None, jitter):
        walked = walk_step(schedule, times, convention=convention, jitter=chance)
        step = lower(schedule, times.before, times.after, convention)
        costs = step.costs(times, jitter=chance)
        told = [
            simulate_step(schedule, times, convention=convention, jitter=chance),
            simulate(step.graph, costs),
            simulate(step.graph, costs, oracle=True),
        ]
        assert told[0].ends_ns.tolist() == told[1].ends_ns.tolist() == told[2].ends_ns.tolist()
        assert told[0].starts_ns.tolist() == told[1].starts_ns.tolist()
        assert walked.makespan_ns == told[2].makespan_ns


@given(steps(num_lanes=LANES + 3), st.sampled_from(CONVENTIONS))
def test_lanes_are_candidates_side_by_side(
    drawn: tuple[Schedule, StepTimes], convention: Convention
) -> None:
    schedule, times = drawn
    alone = [
        walk_step(schedule, times, lane, convention).makespan_ns for lane in range(times.num_lanes)
    ]
    assert step_ns(schedule, times, convention=convention).tolist() == alone
    jitters = [Jitter(seed=i, compute_spread=0.1) for i in range(times.num_lanes)]
    drawn_alone = [
        walk_step(schedule, times, lane, convention, jitter).makespan_ns
        for lane, jitter in enumerate(jitters)
    ]
    assert step_ns(schedule, times, convention=convention, jitters=jitters).tolist() == drawn_alone


PERIODIC = [name for name, family in sorted(SCHEDULES.items()) if family.period(4)]


@settings(max_examples=120)
@given(
    st.sampled_from(PERIODIC), st.integers(1, 6), st.integers(2, 3), st.integers(0, 60),
    st.sampled_from(CONVENTIONS), st.integers(0, 2**32), st.sampled_from([1, 10, 10**6]),
)  # fmt: skip
def test_the_fold_equals_the_whole(
    name: str, p: int, v: int, more: int, convention: Convention, seed: int, most: int
) -> None:
    family, rng = SCHEDULES[name], np.random.default_rng(seed)
    v = family.stages_per_rank or v
    m = 20 * p * v + more
    forward, backward, sends = rng.integers(0, most + 1, (3, p * v))
    times = step_times(
        p * v, forward=forward, backward=backward, weight=backward // 2, send_forward=sends,
        send_backward=sends,
    )  # fmt: skip
    with patch.object(simulator.fold, "WORTH", 2):
        fold = folded_step(
            lambda num: family.build(p, num, v), m, family.period(p), family.steady_from(p, m),
            times, convention=convention,
        )  # fmt: skip
    assert fold.makespan_ns == walk_step(family.build(p, m, v), times, 0, convention).makespan_ns
    assert (fold.cycle == 0) == (fold.num_walked == m)


def test_most_long_steps_fold() -> None:
    # Deterministic 1F1B repeats within a few blocks; 371 of 400 random pipelines did in a study.
    rng, family, num_folded = np.random.default_rng(7), SCHEDULES["1f1b"], 0
    for _ in range(100):
        p = int(rng.integers(1, 9))
        times = step_times(p, forward=rng.integers(1, 99, p), backward=rng.integers(1, 99, p),
                           send_forward=rng.integers(0, 50, p))  # fmt: skip
        with patch.object(simulator.fold, "WORTH", 2):
            fold = folded_step(partial(family.build, p), 1000, 1, p, times)
        num_folded += fold.num_walked < 200
    assert num_folded >= 90


def test_a_million_microbatches_are_one_short_walk() -> None:
    family = SCHEDULES["1f1b"]
    times = step_times(4, forward=70, backward=130)
    fold = folded_step(lambda m: family.build(4, m), 10**6, 1, 4, times)
    assert fold.makespan_ns == (10**6 + 3) * 200
    assert fold.num_walked < 100


def test_rendezvous_waits_for_the_receiver() -> None:
    # Rank 1 is busy until 50 with what came before: an eager message travels meanwhile, one that
    # must meet its receive cannot. The receive is posted when the action before the reader ends.
    schedule = parse_schedule("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1")
    times = step_times(2, forward=[10, 20], backward=30, send_forward=5)
    eager, meeting = (
        simulate_step(schedule, times, convention=convention) for convention in CONVENTIONS
    )
    starts = [{span.name: span.start_ns for span in run.timeline.spans} for run in (eager, meeting)]
    assert [start["0F1 to 1"] for start in starts] == [20, 65]
    assert [start["1F1"] for start in starts] == [65, 70]


def test_receives_take_the_order_of_the_sends() -> None:
    # Rank 1 reads the second message first. Its receives are posted as rank 0 sends: both in front
    # of 1F1, so that nobody waits for ever.
    schedule = parse_schedule("0F0 0F1 0B0 0B1\n1F1 1B1 1F0 1B0")
    times = step_times(2, forward=10, backward=20, send_forward=5)
    for convention in CONVENTIONS:
        spans = simulate_step(schedule, times, convention=convention).timeline.spans
        ends = {span.name: span.end_ns for span in spans}
        assert (ends["0F0 to 1"], ends["0F1 to 1"]) == (15, 25)


def test_a_message_charges_its_link_one_at_a_time() -> None:
    # Three forwards of 1 ns, messages of 10 ns: they queue for the link, the sender goes on.
    schedule = parse_schedule("0F0 0F1 0F2 0B0 0B1 0B2\n1F0 1F1 1F2 1B0 1B1 1B2")
    spans = simulate_step(
        schedule, step_times(2, forward=1, backward=1, send_forward=10)
    ).timeline.spans
    messages = [(span.start_ns, span.end_ns) for span in spans if span.kind == "send"]
    assert messages == [(1, 11), (11, 21), (21, 31)]
    assert [span.start_ns for span in spans if span.name in ("0F1", "0F2")] == [1, 2]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_an_order_that_blocks_is_named(convention: Convention) -> None:
    schedule = parse_schedule("0F0 0B0 0F1 0B1\n1F1 1F0 1B0 1B1")
    times = step_times(2, forward=1, backward=1)
    with pytest.raises(DeadlockError) as raised:
        step_ns(schedule, times, convention=convention)
    assert "0B0 (rank 0, compute) waits for 1B0 to 0 (rank 1, to 0)" in str(raised.value)
    with pytest.raises(DeadlockError) as again:
        simulate_step(schedule, times, convention=convention)
    assert str(raised.value) == str(again.value)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2), st.integers(0, 60))
def test_chance_has_the_spread_that_it_says(seed: int, tenths: int, bits: int) -> None:
    table = quantile_table(tenths / 10)
    assert abs(int(table.mean()) - (1 << 20)) <= 1
    assert abs(float(np.log(table / 2**20).std()) - tenths / 10) < 0.001
    places = draws(seed, *np.broadcast_arrays(0, np.arange(8)[:, None], np.arange(4096)))
    # 32,768 draws over 4,096 places, 8 each; a chi-square of a fair draw lies within these.
    counts = np.bincount(places.ravel(), minlength=4096)
    assert 3600 < float(((counts - 8.0) ** 2 / 8.0).sum()) < 4600
    ns = np.array([1 << min(bits, 40)], np.int64)
    assert scaled(ns, table[:1]).tolist() == [int(ns[0]) * int(table[0]) >> 20]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"forward": -1}, "forward of stage 0 takes -1 ns"),
        ({"forward": [1, float("nan")]}, "forward of stage 1 takes nan ns"),
        ({"backward": float("inf")}, "backward of stage 0 takes inf ns"),
        ({"send_forward": [1, 2, 3]}, r"send_forward has times of shape \(3, 1\); 2 stages"),
        ({"weight": 99}, "stage 0: the weight half takes longer than the whole backward"),
        ({"before": {"other": 1 << 60}}, "other of stage 0 takes"),
    ],
)
def test_bad_times_are_refused(times: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_times(2, **({"forward": 1, "backward": 2} | times))  # type: ignore[arg-type]


def test_times_of_other_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="times of 3 stages for schedule custom of 1"):
        step_ns(parse_schedule("0F0 0B0"), step_times(3, forward=1, backward=1))


def test_a_schedule_of_a_billion_ranks_is_refused_at_once() -> None:
    for p, m in ((10**9, 1), (1, 10**9), (10**5, 10**5)):
        for family in SCHEDULES.values():
            with pytest.raises(ValueError, match=f"schedule {family.name} has"):
                family.build(p, m)


def test_without_compilation_the_same() -> None:
    code = "from tests.test_simulator_walk import compiled_and_plain; print(compiled_and_plain())"
    plain = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent, env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
    )  # fmt: skip
    assert plain.stdout.strip() == str(compiled_and_plain())


def compiled_and_plain() -> list[int]:
    """Return what both engines of a small step say; run in both modes by the test above."""
    schedule = SCHEDULES["interleaved"].build(3, 5)
    times = step_times(6, forward=[1, 2, 3, 4, 5, 6], backward=[[7, 9]], weight=2, send_forward=3)
    jitter = Jitter(seed=3, compute_spread=0.5)
    found = [*step_ns(schedule, times), *step_ns(schedule, times.lane(0), jitters=[jitter])]
    for convention in CONVENTIONS:
        found.append(simulate_step(schedule, times, convention=convention).makespan_ns)
        found.append(walk_step(schedule, times, 1, convention).makespan_ns)
    return [int(value) for value in found]


def test_replicas_behind_one_nic_wait_for_it_together() -> None:
    # Two ranks, one message of 1,000 bytes at 1 byte/ns after 5 ns of latency; with 4 replicas
    # behind the same NICs everything on the links takes 4 times as long.
    schedule = parse_schedule("0F0 0B0\n1F0 1B0")
    times = step_times(2, forward=10, backward=20, send_forward=5, send_backward=5)
    for replicas, flow_ns in ((1, 1000), (4, 4000)):
        placement = Placement(
            fabric=star([1e9, 1e9]), ranks=(0, 1), forward_bytes=1000, backward_bytes=[0, 500],
            replicas=replicas,
        )  # fmt: skip
        for oracle in (False, True):
            run = simulate_step(schedule, times, placement=placement, oracle=oracle)
            assert run.makespan_ns == 10 + 5 + flow_ns + 30 + 5 + flow_ns // 2 + 20


def test_a_placement_must_fit() -> None:
    schedule, times = parse_schedule("0F0 0B0\n1F0 1B0"), step_times(2, forward=1, backward=1)
    fits: dict[str, Any] = {"ranks": (0, 1), "forward_bytes": 1, "backward_bytes": 1}
    for wrong, message in (
        ({"ranks": (0, 0)}, r"placement.ranks is \[0, 0\]; it needs 2 different ranks"),
        ({"replicas": 0}, "placement.replicas is 0"),
        ({"forward_bytes": [1, float("nan")]}, "the forward message of stage 1 has nan bytes"),
    ):
        placement = Placement(fabric=star([1e9, 1e9]), **(fits | wrong))
        with pytest.raises(ValueError, match=message):
            simulate_step(schedule, times, placement=placement)
