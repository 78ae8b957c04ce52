"""Long stories: exact where nothing is left to chance, sums to the ns, equal seeds, refusals."""

import gzip
import json
from dataclasses import replace
from itertools import pairwise
from math import isclose
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.stories.checkpoints import Checkpoints
from simulator.stories.job import Maintenance, Story, StorySpec, replicate, tell
from simulator.stories.strikes import HOUR_NS, Outage, Slowdown
from simulator.trace import perfetto_trace
from tests.stories import DAY_NS, MINUTE_NS, SECOND_NS, steady


@given(
    step_ns=st.integers(1, 10**12),
    num_steps=st.integers(1, 1000),
    every=st.integers(1, 100),
    blocking_ns=st.integers(0, 10**10),
    restart_ns=st.integers(0, 10**12),
)
def test_without_failures_it_is_arithmetic(
    step_ns: int, num_steps: int, every: int, blocking_ns: int, restart_ns: int
) -> None:
    saves = Checkpoints(every_steps=every, blocking_ns=blocking_ns, drain_ns=step_ns)
    spec = steady(
        step_ns=step_ns, num_steps=num_steps, checkpoints=saves, restart_ns=restart_ns
    )  # fmt: skip
    num_saves = -(-num_steps // every)
    story = tell(spec)
    stall_ns = num_saves * blocking_ns + step_ns
    assert story.wall_ns == restart_ns + num_steps * step_ns + stall_ns
    assert story.lost_ns["checkpoint"] == stall_ns
    assert story.num_checkpoints == num_saves
    assert story.is_finished


def outage(name: str) -> st.SearchStrategy[Outage]:
    times = st.sampled_from([0, 1, SECOND_NS, 7 * MINUTE_NS, 2 * HOUR_NS])
    clocks = {"per_node_hour": st.floats(0, 1), "shape": st.sampled_from([0.5, 1.0, 3.0])}
    return st.one_of(
        st.builds(Outage, name=st.just(name), detection_ns=times, away_ns=times, **clocks),
        st.builds(
            Outage,
            name=st.just(name),
            away_ns=st.integers(1, HOUR_NS),
            notice_ns=st.integers(1, 3 * MINUTE_NS),
            **clocks,
        ),
    )


slowdown = st.builds(
    Slowdown,
    name=st.just("slow"),
    per_node_hour=st.floats(0, 1),
    factor=st.floats(1, 3),
    lasts_ns=st.integers(1, HOUR_NS),
)
specs = st.builds(
    StorySpec,
    step_ns=st.integers(1, 90 * SECOND_NS),
    num_steps=st.integers(1, 800),
    num_nodes=st.integers(1, 6),
    num_spares=st.integers(0, 3),
    restart_ns=st.integers(0, 10 * MINUTE_NS),
    checkpoints=st.builds(
        Checkpoints,
        every_steps=st.integers(1, 100),
        blocking_ns=st.integers(0, MINUTE_NS),
        drain_ns=st.integers(0, 20 * MINUTE_NS),
    ),
    disturbances=st.tuples(outage("a"), outage("b"), slowdown),
    maintenance=st.none() | st.just(Maintenance(every_ns=5 * HOUR_NS, takes_ns=HOUR_NS)),
    horizon_ns=st.integers(1, 2 * DAY_NS),
)


@settings(deadline=None)
@given(specs, st.integers(0, 2**32 - 1))
def test_causes_add_up_to_the_wall_time(spec: StorySpec, seed: int) -> None:
    story = tell(spec, seed)
    assert story.wall_ns == story.useful_ns + sum(story.lost_ns.values())
    assert min(story.useful_ns, *story.lost_ns.values()) >= 0
    assert story.is_finished == (story.useful_ns == spec.num_steps * spec.step_ns)
    assert story.is_finished or story.wall_ns == spec.horizon_ns
    # The phases follow each other without a gap, and agree with the causes.
    assert [span.begin_ns for span in story.spans] == [0, *(s.end_ns for s in story.spans[:-1])]
    assert story.spans[-1].end_ns == story.wall_ns
    for phase in ("detection", "waiting", "restart", "maintenance"):
        passed = sum(s.end_ns - s.begin_ns for s in story.spans if s.phase == phase)
        assert passed == story.lost_ns[phase]
    assert sum(story.num_strikes.values()) == len(story.strikes)
    assert tell(spec, seed) == story
    assert replace(story, spans=(), strikes=()) == tell(spec, seed, num_kept=0)


CRASHES = (Outage(name="gpu", per_node_hour=0.4), Outage(name="host", per_node_hour=0.2))


def test_equal_seeds_meet_equal_strikes() -> None:
    def moments(spec: StorySpec, seed: int = 5) -> list[tuple[int, str, int]]:
        return [s[:3] for s in tell(spec, seed).strikes if s.at_ns < HOUR_NS and s.node < 8]

    base = steady(disturbances=CRASHES)
    assert len(moments(base)) > 3
    assert moments(base, seed=6) != moments(base)
    longer = Checkpoints(every_steps=600, blocking_ns=MINUTE_NS)
    one_more = (Outage(name="link", per_node_hour=0.3), *CRASHES)
    for other in (
        replace(base, checkpoints=longer),
        replace(base, num_nodes=9),
        replace(base, num_steps=50_000),
        replace(base, disturbances=CRASHES[::-1]),
    ):
        assert sorted(moments(other)) == moments(base)
    with_links = moments(replace(base, disturbances=one_more))
    assert [strike for strike in with_links if strike[1] != "link"] == moments(base)


def test_without_spares_and_repair_the_job_waits_for_ever() -> None:
    gone = Outage(name="gpu", per_node_hour=0.5, away_ns=DAY_NS, detection_ns=MINUTE_NS)
    story = tell(steady(disturbances=(gone,), horizon_ns=HOUR_NS * 20), seed=1)
    dead_ns = story.strikes[0].at_ns + MINUTE_NS
    assert not story.is_finished
    assert story.lost_ns["waiting"] == 20 * HOUR_NS - dead_ns
    spared = tell(steady(disturbances=(gone,), num_spares=50, horizon_ns=HOUR_NS * 20), seed=1)
    assert spared.is_finished
    assert spared.lost_ns["waiting"] == 0
    assert spared.most_away == spared.num_strikes["gpu"] > 1


@pytest.mark.parametrize("replaced_per_hour", [0, 3])
def test_a_slow_node_slows_the_job_until_it_recovers_or_is_replaced(
    replaced_per_hour: float,
) -> None:
    lasts_ns = 20 * MINUTE_NS
    slow = Slowdown(name="hot", per_node_hour=3, factor=2, lasts_ns=lasts_ns)
    gone = Outage(name="gpu", per_node_hour=replaced_per_hour, away_ns=1)
    spec = steady(
        num_nodes=2, num_spares=9, disturbances=(slow, gone), restart_ns=0,
        num_steps=20_000, checkpoints=Checkpoints(every_steps=10),
    )  # fmt: skip
    story = tell(spec, seed=3)
    is_slow_ns, ends_ns = 0, [0, 0]
    moments = [0, *(strike.at_ns for strike in story.strikes), story.wall_ns]
    for strike, (_, now_ns, next_ns) in zip(
        story.strikes, zip(moments, moments[1:], moments[2:], strict=False), strict=True
    ):
        ends_ns[strike.node] = now_ns + lasts_ns if strike.name == "hot" else 0
        is_slow_ns += max(0, min(max(ends_ns), next_ns) - now_ns)
    assert story.num_strikes["hot"] > 10
    # Work is counted in whole ns, rounded at each change of pace.
    assert abs(story.lost_ns["slow"] - is_slow_ns / 2) <= 2 * len(moments)


def test_the_first_notice_counts() -> None:
    # No checkpoint is ever safe in time, so the only node goes when it first said it would.
    notices = {"soon": 10 * MINUTE_NS, "late": 30 * MINUTE_NS}
    kinds = tuple(
        Outage(name=name, per_node_hour=2, away_ns=1, notice_ns=ns) for name, ns in notices.items()
    )
    saves = Checkpoints(every_steps=10, drain_ns=DAY_NS)
    spec = steady(num_nodes=1, disturbances=kinds, checkpoints=saves, horizon_ns=20 * HOUR_NS)
    story = tell(spec, seed=1)
    deaths_ns = [0]
    for strike in story.strikes:
        if strike.phase == "training" and strike.at_ns > deaths_ns[-1]:
            deaths_ns.append(strike.at_ns + notices[strike.name])
        elif strike.phase == "restart":
            deaths_ns.append(strike.at_ns)
    ends_ns = [span.end_ns for span in story.spans if span.phase == "lost"]
    assert len(ends_ns) > 10
    assert set(ends_ns[:-1]) <= set(deaths_ns)
    assert len(story.strikes) > len(deaths_ns)


def test_enough_notice_saves_the_work() -> None:
    spot = Outage(name="spot", per_node_hour=0.3, away_ns=HOUR_NS, notice_ns=2 * MINUTE_NS)
    saves = Checkpoints(every_steps=900, blocking_ns=5 * SECOND_NS, drain_ns=20 * SECOND_NS)
    spec = steady(disturbances=(spot,), checkpoints=saves, num_spares=20)
    story = tell(spec, seed=2)
    assert story.num_restarts >= 3
    # The job trains on while the last checkpoint drains; that much is lost, and no more.
    assert story.lost_ns["rework"] <= story.num_restarts * 20 * SECOND_NS
    short = replace(spot, notice_ns=20 * SECOND_NS)
    hasty = tell(replace(spec, disturbances=(short,)), seed=2)
    assert hasty.lost_ns["rework"] > 10 * story.lost_ns["rework"]


def test_maintenance_saves_first() -> None:
    plan = Maintenance(every_ns=1_020, takes_ns=300)
    spec = StorySpec(
        step_ns=100, num_steps=20, num_nodes=1, restart_ns=40, maintenance=plan,
        checkpoints=Checkpoints(every_steps=8, blocking_ns=10, drain_ns=0),
        horizon_ns=10_000,
    )  # fmt: skip
    story = tell(spec)
    # Steps 1 to 8 are saved at 850; at 1,020 step 10 runs till 1,050 and is saved at 1,060. Steps
    # 11 to 16 begin at 1,400 and are saved at 2,010; at 2,040 step 17 runs till 2,110, saved 2,120.
    spans = [(span.phase, span.end_ns) for span in story.spans]
    assert spans == [
        ("restart", 40), ("training", 1_060), ("maintenance", 1_360), ("restart", 1_400),
        ("training", 2_120), ("maintenance", 2_420), ("restart", 2_460), ("training", 2_770),
    ]  # fmt: skip
    assert story.lost_ns["rework"] == 0


def test_maintenance_cuts_a_restart_short() -> None:
    spec = steady(
        restart_ns=1_200, horizon_ns=2_500, maintenance=Maintenance(every_ns=1_000, takes_ns=300)
    )
    assert [(span.phase, span.end_ns) for span in tell(spec).spans] == [
        ("restart", 1_000), ("maintenance", 1_300), ("restart", 2_000), ("maintenance", 2_300),
        ("restart", 2_500),
    ]  # fmt: skip


def test_quantiles_are_told_values() -> None:
    stories = replicate(steady(disturbances=CRASHES), range(20))
    walls = sorted(story.wall_ns for story in stories.stories)
    assert (stories.wall_ns(0.05), stories.wall_ns(0.5), stories.wall_ns(1)) == (
        walls[0], walls[9], walls[19],
    )  # fmt: skip
    assert stories.goodput(0.5) in [story.goodput for story in stories.stories]
    assert all(low <= high for low, high in pairwise([stories.goodput(q / 10) for q in (1, 5, 9)]))
    lost = stories.mean_lost_ns()
    assert isclose(stories.mean_wall_ns, 6_000 * SECOND_NS + sum(lost.values()))
    with pytest.raises(ValueError, match="quantile is 0; it must be above 0"):
        stories.wall_ns(0)


def test_weeks_open_in_the_trace_viewer() -> None:
    story: Story = tell(steady(disturbances=CRASHES, num_steps=60_000), seed=1)
    events = json.loads(gzip.decompress(perfetto_trace([story.timeline])))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(story.spans) > 50
    assert sum(event["dur"] for event in spans) == pytest.approx(story.wall_ns / 1000)
    assert any(event["name"].startswith("lost, until gpu on node ") for event in spans)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_ns": 0}, "story: step_ns is 0; it must be a whole number from 1"),
        ({"step_ns": NAN}, "story: step_ns is nan"),
        ({"step_ns": 1.5}, "story: step_ns is 1.5"),
        ({"num_steps": 10**12}, "story: num_steps is 1000000000000"),
        ({"num_nodes": True}, "story: num_nodes is True"),
        ({"num_nodes": 10**9}, "story: num_nodes is 1000000000; .* to 250000"),
        ({"restart_ns": -1}, "story: restart_ns is -1"),
        ({"horizon_ns": INF}, "story: horizon_ns is inf"),
        ({"disturbances": CRASHES[:1] * 2}, "two disturbances are called 'gpu'"),
        (
            {"disturbances": (Outage(name="x", per_node_hour=1e5),)},
            "about 7.01e[+]09 strikes are due before the horizon",
        ),
    ],
)
def test_a_story_that_cannot_be_told_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steady(**fields)


def test_other_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="maintenance: every_ns is 5; it must be a whole number"):
        Maintenance(every_ns=5, takes_ns=5)
    with pytest.raises(ValueError, match="seed is -1"):
        tell(steady(), seed=-1)
    with pytest.raises(ValueError, match="at least one seed"):
        replicate(steady(), [])
