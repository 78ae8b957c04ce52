"""Parameter servers over hours: arithmetic for equal workers, queues, staleness, preemption."""

from collections.abc import Callable
from itertools import pairwise
from math import exp
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.jitter import FACTOR_BITS, quantile_table
from simulator.stories.job import mean, standard_error
from simulator.stories.servers import ServerSpec, Sync, tell_servers
from simulator.stories.strikes import HOUR_NS, Clocks, Outage

SECOND_NS = 10**9
SYNCS: list[tuple[Sync, int]] = [("bsp", 0), ("ssp", 0), ("ssp", 3), ("asp", 0)]
each_sync = pytest.mark.parametrize(("sync", "slack"), SYNCS)


def servers(**fields: Any) -> ServerSpec:
    """Return four workers of one second a step at two servers that cost nothing."""
    base: dict[str, Any] = {
        "step_ns": (SECOND_NS,) * 4,
        "num_servers": 2,
        "update_ns": 0,
        "sync": "asp",
        "duration_ns": 100 * SECOND_NS,
    }
    return ServerSpec(**(base | fields))


times = st.integers(0, 1000)


@each_sync
@settings(max_examples=30, deadline=None)
@given(step_ns=st.integers(5, 1000), pull_ns=times, push_ns=times, update_ns=times)
def test_one_worker_is_a_sum(
    sync: Sync, slack: int, step_ns: int, pull_ns: int, push_ns: int, update_ns: int
) -> None:
    spec = servers(
        step_ns=(step_ns,), pull_ns=pull_ns, push_ns=push_ns, update_ns=update_ns, num_servers=3,
        sync=sync, slack=slack, duration_ns=4_000,
    )  # fmt: skip
    cycle_ns = pull_ns + step_ns + push_ns + -(-update_ns // 3)
    story = tell_servers(spec)
    assert story.num_gradients == story.num_updates == 4_000 // cycle_ns
    assert story.staleness == (story.num_gradients,)[: story.num_gradients]
    assert story.waiting_share == 0


@each_sync
@settings(max_examples=30, deadline=None)
@given(num_workers=st.integers(1, 12), step_ns=st.integers(1, 500))
def test_equal_workers_with_free_servers_march_in_step(
    sync: Sync, slack: int, num_workers: int, step_ns: int
) -> None:
    spec = servers(
        step_ns=(step_ns,) * num_workers, sync=sync, slack=slack, pull_ns=7, duration_ns=2_000
    )  # fmt: skip
    rounds = 2_000 // (step_ns + 7)
    story = tell_servers(spec)
    assert story.num_gradients == num_workers * rounds
    if sync == "bsp":
        assert story.num_updates == rounds
        assert sum(story.staleness[1:]) == 0
    elif rounds and sync == "asp":
        # In the first round gradient k meets the k before it, later the W - 1 of the others.
        last = 1 + (rounds - 1) * num_workers
        assert story.staleness == (*[1] * (num_workers - 1), last)


@settings(deadline=None)
@given(num_workers=st.integers(2, 10), serve_ns=st.integers(100, 300))
def test_busy_servers_set_the_pace(num_workers: int, serve_ns: int) -> None:
    cycle_ns = 90
    spec = servers(
        step_ns=(cycle_ns - 20,) * num_workers, pull_ns=15, push_ns=5, update_ns=4 * serve_ns,
        num_servers=4, duration_ns=10_000,
    )  # fmt: skip
    story = tell_servers(spec)
    assert story.num_gradients == (10_000 - cycle_ns) // serve_ns
    assert story.serving_share == (10_000 - cycle_ns) / 10_000
    twice = tell_servers(servers(**fields_of(spec) | {"num_servers": 8}))
    assert twice.num_gradients > story.num_gradients


def fields_of(spec: ServerSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in ServerSpec.__slots__}


step_lists = st.lists(st.integers(1, 50), min_size=1, max_size=8).map(tuple)


@settings(deadline=None)
@given(step_lists)
def test_a_barrier_waits_for_the_slowest(step_ns: tuple[int, ...]) -> None:
    story = tell_servers(servers(step_ns=step_ns, sync="bsp", duration_ns=1_000))
    rounds, rest_ns = divmod(1_000, max(step_ns))
    assert story.num_updates == rounds
    assert story.num_gradients == rounds * len(step_ns) + sum(rest_ns >= ns for ns in step_ns)
    idle_ns = rounds * sum(max(step_ns) - ns for ns in step_ns)
    idle_ns += sum(max(0, rest_ns - ns) for ns in step_ns)
    assert story.waiting_share == pytest.approx(idle_ns / 1_000 / len(step_ns))


@settings(deadline=None)
@given(step_lists, st.integers(0, 30), st.floats(0, 1), st.integers(0, 9))
def test_asynchronous_staleness_is_that_of_the_others(
    step_ns: tuple[int, ...], serve_ns: int, spread: float, seed: int
) -> None:
    # Between two gradients of one worker lies each gradient of the others exactly once, but for
    # those that are under way at the end: the total is (W - 1) * gradients less at most a round of
    # each worker against each.
    spec = servers(
        step_ns=step_ns, update_ns=2 * serve_ns, spread=spread, duration_ns=2_000
    )  # fmt: skip
    story = tell_servers(spec, seed)
    others = len(step_ns) - 1
    total = sum(k * number for k, number in enumerate(story.staleness))
    in_flight = others * story.num_gradients - total
    longest_gap = max(story.gradients_of) + 1
    assert 0 <= in_flight <= others * len(step_ns) * longest_gap
    if serve_ns == 0 and spread == 0 and others:
        slowest_ns = max(step_ns)
        missed = sum(-(-slowest_ns // ns) for ns in step_ns)
        assert in_flight <= len(step_ns) * missed


@settings(max_examples=50, deadline=None)
@given(step_lists, st.floats(0, 1), st.integers(0, 9))
def test_more_slack_never_costs_throughput(
    step_ns: tuple[int, ...], spread: float, seed: int
) -> None:
    def gradients_of(sync: Sync, slack: int = 0) -> tuple[int, ...]:
        spec = servers(step_ns=step_ns, spread=spread, sync=sync, slack=slack, duration_ns=1_000)
        story = tell_servers(spec, seed)
        if sync != "asp":
            assert max(story.gradients_of) - min(story.gradients_of) <= slack + 1
        return story.gradients_of

    options = [gradients_of("bsp"), gradients_of("ssp", 1), gradients_of("ssp", 5)]
    assert gradients_of("ssp") == options[0]
    options.append(gradients_of("asp"))
    for fewer, more in pairwise(options):
        assert all(a <= b for a, b in zip(fewer, more, strict=True))


def test_a_noisy_barrier_takes_the_mean_of_the_maximum() -> None:
    num_workers, spread = 16, 0.3
    factors = quantile_table(spread) / (1 << FACTOR_BITS)
    # The k-th smallest of 4,096 equally likely factors is the maximum with (k^W - (k-1)^W) / N^W.
    ranks = np.arange(4097) / 4096
    expected = float((factors * np.diff(ranks**num_workers)).sum())
    spec = servers(
        step_ns=(SECOND_NS,) * num_workers, sync="bsp", spread=spread,
        duration_ns=600 * SECOND_NS,
    )  # fmt: skip
    rounds_s = [1 / tell_servers(spec, seed).updates_per_s for seed in range(20)]
    assert abs(mean(rounds_s) - expected) < 4 * standard_error(rounds_s) + expected / 600


SPOT = Outage(name="spot", per_node_hour=2, away_ns=HOUR_NS // 4)


def test_preempted_workers_take_their_share_along() -> None:
    # Up for U, exponential of mean M = 30 min, then away for 15: floor(U / step) steps are done in
    # each life, 1 / (e^(step / M) - 1) on average.
    spec = servers(
        step_ns=(100 * SECOND_NS,) * 8, outages=(SPOT,), duration_ns=48 * HOUR_NS
    )  # fmt: skip
    stories = [tell_servers(spec, seed) for seed in range(20)]
    rates = [story.gradients_per_s for story in stories]
    expected = 8 / (exp(100 / 1800) - 1) / 2700
    # All workers are there at the beginning, which is worth a third of an absence.
    assert abs(mean(rates) - expected) < 4 * standard_error(rates) + expected * 300 / 172_800
    strikes = [story.num_strikes["spot"] for story in stories]
    assert abs(mean(strikes) - 8 * 48 / 0.75) < 4 * standard_error(strikes) + 8 / 3
    # A strike loses the step under way, known when its gradient does not arrive.
    for story, number in zip(stories, strikes, strict=True):
        assert number - 8 <= story.num_lost <= number


@pytest.mark.parametrize(("sync", "slack"), [("bsp", 0), ("ssp", 2)])
@pytest.mark.parametrize(("step_s", "update_s"), [(10, 0), (1, 10)])
def test_a_barrier_survives_who_comes_and_goes(
    sync: Sync, slack: int, step_s: int, update_s: int
) -> None:
    def told(sync: Sync, slack: int) -> int:
        spec = servers(
            step_ns=(step_s * SECOND_NS,) * 8, update_ns=2 * update_s * SECOND_NS, sync=sync,
            slack=slack, outages=(SPOT,), duration_ns=8 * HOUR_NS,
        )  # fmt: skip
        return tell_servers(spec, seed=7).num_gradients

    # Whoever rejoins makes the others wait for less than a round, some twenty times an hour.
    assert 0.9 * told("asp", 0) < told(sync, slack) <= told("asp", 0) * 1.001


def test_who_is_away_does_not_wait() -> None:
    # The first worker does a step in a second, then waits for the other until it is taken away.
    gone = Outage(name="spot", per_node_hour=1, away_ns=24 * HOUR_NS)
    step_ns = (SECOND_NS, 10 * HOUR_NS)
    spec = servers(step_ns=step_ns, sync="bsp", outages=(gone,), duration_ns=8 * HOUR_NS)
    clocks = Clocks(spec.outages, num_nodes=2, seed=9)
    first_ns, second_ns = clocks.first_of(0)[0], clocks.first_of(1)[0]
    assert SECOND_NS < first_ns < second_ns < spec.duration_ns
    story = tell_servers(spec, seed=9)
    assert story.waiting_share == (first_ns - SECOND_NS) / (2 * spec.duration_ns)
    # Who waits loses nothing, and a step under way counts as lost when it would have ended.
    assert (story.num_lost, story.num_strikes["spot"]) == (0, 2)


def test_who_is_missed_late_holds_up_the_barrier() -> None:
    def story(detection_ns: int) -> Callable[[Sync], float]:
        lost = Outage(
            name="crash", per_node_hour=1, away_ns=HOUR_NS, detection_ns=detection_ns
        )  # fmt: skip
        return lambda sync: (
            tell_servers(
                servers(sync=sync, outages=(lost,), duration_ns=4 * HOUR_NS), seed=4
            ).gradients_per_s
        )

    assert story(0)("asp") == story(HOUR_NS // 6)("asp")
    prompt, late = story(0)("bsp"), story(HOUR_NS // 6)("bsp")
    # Until it is missed, and no longer.
    assert 0.8 * prompt < late < 0.9 * prompt


def test_a_server_story_is_repeatable() -> None:
    spec = servers(spread=0.5, outages=(SPOT,), sync="ssp", slack=2, duration_ns=HOUR_NS)
    assert tell_servers(spec, 1) == tell_servers(spec, 1) != tell_servers(spec, 2)


def test_quantiles_of_staleness() -> None:
    story = tell_servers(servers())
    assert story.staleness == (1, 1, 1, 397)
    assert [story.staleness_quantile(q) for q in (0.001, 0.0075, 0.0076, 1)] == [0, 2, 3, 3]
    assert story.mean_staleness == (0 + 1 + 2 + 3 * 397) / 400
    with pytest.raises(ValueError, match="quantile is 2"):
        story.staleness_quantile(2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_ns": ()}, "servers: number of workers is 0"),
        ({"step_ns": (1, float("nan"))}, "servers: step_ns of worker 1 is nan"),
        ({"update_ns": -1}, "servers: update_ns is -1"),
        ({"num_servers": 0}, "servers: num_servers is 0"),
        ({"sync": "async"}, "servers: sync is 'async'; it must be bsp, ssp or asp"),
        ({"slack": 2}, "slack is 2, but sync is asp"),
        ({"spread": float("nan")}, "compute_spread is nan"),
        ({"step_ns": (1,), "duration_ns": 10**9}, r"about 1e\+09 steps; at most 20000000"),
        ({"outages": (SPOT, SPOT)}, "two disturbances are called 'spot'"),
        (
            {"outages": (Outage(name="x", per_node_hour=1, away_ns=1, notice_ns=1),)},
            "outage x gives notice",
        ),
    ],
)
def test_servers_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        servers(**fields)
