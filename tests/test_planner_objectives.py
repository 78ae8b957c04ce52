"""Objectives: equations against published figures, monotone costs, limits and Pareto fronts."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.goodput import (
    best_interval_s,
    checkpoint_bytes,
    mean_between_interruptions_s,
    useful_share,
    young_interval_s,
)
from planner.objectives import (
    Facts,
    broken_limit,
    cost,
    dollars_per_mtoken,
    facts_of,
    figure,
    figure_of,
    front,
    joules_per_token,
    told,
)
from profiles.cluster import Operation
from profiles.errors import InvalidInputError
from profiles.goal import BEST_IS_HIGH, OBJECTIVES, Goal
from profiles.job import Job, read_job
from profiles.presets import assumption, cluster_preset, model_preset, stack_preset
from profiles.workload import Workload
from simulator.stories.checkpoints import Checkpoints
from simulator.stories.job import mean, replicate, standard_error
from simulator.stories.strikes import Outage
from tests.stories import MINUTE_NS, SECOND_NS, steady

LLAMA_RATE = 419 / 54 / 16_384
FACTS = Facts(
    tokens_per_step=1_000_000, num_gpus=1024, memory_bytes=80 << 30, dollars_per_gpu_hour=2.5,
    watts_per_gpu=969.0, pue=1.3, mean_s=3.09 * 3600, restart_s=600.0, checkpoint_s=60.0,
)  # fmt: skip
STEPS_NS = st.integers(0, 10**13)
PEAKS_BYTES = st.integers(0, 1 << 40)


# Equations worked out by hand for R = 10 min; intervals in minutes.
@pytest.mark.parametrize(
    ("mean_hours", "checkpoint", "young", "best", "useful"),
    [
        (3.09, 60, 19.3, 18.6, 0.8525),
        (3.09, 5, 5.6, 5.5, 0.9194),
        (28.85, 60, 58.8, 58.2, 0.9608),
        (49.5, 60, 77.1, 76.4, 0.9710),
        (mean_between_interruptions_s(LLAMA_RATE, 100_000) / 3600, 60, 7.8, 7.15, 0.5506),
    ],
)
def test_goodput_is_dalys(
    mean_hours: float, checkpoint: float, young: float, best: float, useful: float
) -> None:
    mean_s = mean_hours * 3600
    interval_s = best_interval_s(checkpoint, mean_s)
    assert young_interval_s(checkpoint, mean_s) / 60 == pytest.approx(young, abs=0.06)
    assert interval_s / 60 == pytest.approx(best, abs=0.06)
    assert useful_share(interval_s, checkpoint, 600, mean_s) == pytest.approx(useful, abs=6e-4)


@pytest.mark.parametrize(("mean_minutes", "best"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_the_best_interval_is_that_of_dalys_figures(mean_minutes: float, best: float) -> None:
    # Figures 3 to 5 of the paper: checkpoints of 5 minutes. Its series is an approximation.
    assert best_interval_s(300, mean_minutes * 60) / 60 == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize(
    ("checkpoint", "restart_minutes"), [(30, 5.8), (10, 11.6), (5, 14.0), (1, 17.1)]
)
def test_a_restart_may_last_so_long_at_nine_tenths(
    checkpoint: float, restart_minutes: float
) -> None:
    mean_s = 3.09 * 3600
    interval_s = best_interval_s(checkpoint, mean_s)
    share = useful_share(interval_s, checkpoint, restart_minutes * 60, mean_s)
    assert share == pytest.approx(0.9, abs=5e-4)


@given(delay=st.floats(1e-9, 1e3), off=st.floats(-0.9, 10))
def test_no_interval_is_better_than_the_best(delay: float, off: float) -> None:
    best = best_interval_s(delay * 3600, 3600)
    shares = [useful_share(t, delay * 3600, 0, 3600) for t in (best, best * (1 + off))]
    assert shares[0] >= shares[1] * (1 - 1e-12)


@given(rate=st.floats(1e-6, 1), restart=st.floats(0, 3600), checkpoint=st.floats(0.1, 600))
def test_the_useful_share_falls_with_every_trouble(
    rate: float, restart: float, checkpoint: float
) -> None:
    def best_share(restart: float, checkpoint: float, rate: float) -> float:
        mean_s = mean_between_interruptions_s(rate, 64)
        return useful_share(best_interval_s(checkpoint, mean_s), checkpoint, restart, mean_s)

    share = best_share(restart, checkpoint, rate)
    assert 0 < share < 1
    assert best_share(restart + 60, checkpoint, rate) < share
    assert best_share(restart, checkpoint * 2, rate) < share
    assert best_share(restart, checkpoint, rate * 2) < share


@pytest.mark.parametrize(
    ("mean_s", "checkpoint_s", "step_s"), [(3000, 20, 10), (600, 5, 120)],
    ids=["many steps between checkpoints", "a step longer than the best interval"],
)  # fmt: skip
def test_goodput_is_that_of_simulated_stories(mean_s: int, checkpoint_s: int, step_s: int) -> None:
    facts = replace(FACTS, mean_s=mean_s, checkpoint_s=checkpoint_s, restart_s=60.0)
    every = max(1, round(facts.interval_s(step_s * SECOND_NS) / step_s))
    spec = steady(
        step_ns=step_s * SECOND_NS,
        num_steps=every * 100,
        restart_ns=MINUTE_NS,
        checkpoints=Checkpoints(every_steps=every, blocking_ns=checkpoint_s * SECOND_NS),
        disturbances=(Outage(name="any", per_node_hour=3600 / mean_s / 8),),
    )
    walls = [story.wall_ns for story in replicate(spec, range(150)).stories]
    # A story begins with a start, which may be interrupted too: M (e^(R/M) - 1).
    start_s = mean_s * np.expm1(60 / mean_s)
    tokens = spec.num_steps * facts.tokens_per_step
    expected = tokens / figure("goodput", facts, spec.step_ns, 0) + start_s
    # An interval of whole steps is a little off the best one.
    assert abs(mean(walls) / 1e9 - expected) < 4 * standard_error(walls) / 1e9 + 1e-3 * expected


def test_money_is_gpu_hours_at_their_price() -> None:
    # LLaMA 3.1 405B took 30.84 M GPU-hours for 15.6 T tokens.
    tokens_per_s = 15.6e12 / (30.84e6 / 16_384 * 3600)
    million = dollars_per_mtoken(
        16e6 / tokens_per_s, tokens_per_step=16_000_000, num_gpus=16_384, dollars_per_gpu_hour=2.5
    )
    assert million == pytest.approx(30.84e6 * 2.5 / 15.6e6)


@pytest.mark.parametrize(("parameters", "joules"), [(8e9, 0.15), (70e9, 1.35), (405e9, 7.75)])
def test_energy_is_that_of_nodes_at_three_quarters_of_their_rating(
    parameters: float, joules: float
) -> None:
    # At 40 % of an H100's peak, 76 % of 10.2 kW a node and PUE 1.3.
    seconds = 6 * parameters / (0.4 * 989e12)
    energy = joules_per_token(
        seconds, tokens_per_step=1, num_gpus=1, watts_per_gpu=0.76 * 10_200 / 8, pue=1.3
    )
    assert energy == pytest.approx(joules, rel=0.02)


@pytest.mark.parametrize(
    ("name", "num_nodes", "least_kw", "most_kw"),
    [("h100-sxm", 1, 7.7, 8.4), ("b200-sxm", 1, 10.2, 14.3), ("gb200-nvl72", 1, 115, 132)],
)
def test_power_of_nodes_is_near_what_is_known(
    job: Job, name: str, num_nodes: int, least_kw: float, most_kw: float
) -> None:
    # An H100 node draws 76 % of 10.2 kW and 8.4 kW at most; a DGX B200 is rated at 14.3 kW, an
    # NVL72 rack at 120 to 132.
    cluster = cluster_preset(name, num_nodes=num_nodes)
    facts = facts_of(replace(job, cluster=cluster))
    assert least_kw < facts.num_gpus * facts.watts_per_gpu / 1000 < most_kw


@pytest.mark.parametrize(
    ("model", "gib"), [("llama-3.1-8b", 105), ("llama-3.1-70b", 920), ("llama-3.1-405b", 5200)]
)
def test_checkpoints_have_their_published_size(model: str, gib: float) -> None:
    # NVIDIA dgxc-benchmarking, llama3.1/README.md (25.04), "approximate", with optimizer state.
    work = Workload(seq_len=8192, global_batch=128, dtype="bf16")
    size = checkpoint_bytes(model_preset(model), work, stack_preset("nemo"))
    assert size / 2**30 == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(
    steps=st.tuples(STEPS_NS, STEPS_NS),
    peaks=st.tuples(PEAKS_BYTES, PEAKS_BYTES),
    checkpoint_s=st.sampled_from([0.0, 3.0, 60.0]),
    mean_s=st.sampled_from([0.0, 60.0, 1e4]),
)
def test_a_cost_never_falls_with_time_or_memory(
    name: str, steps: tuple[int, int], peaks: tuple[int, int], checkpoint_s: float, mean_s: float
) -> None:
    facts = replace(FACTS, mean_s=mean_s, checkpoint_s=checkpoint_s)
    (quick, slow), (small, large) = sorted(steps), sorted(peaks)
    costs = [cost(name, facts, step, peak) for step in (quick, slow) for peak in (small, large)]
    assert 0 <= costs[0] <= min(costs[1:])
    assert costs[3] >= max(costs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_cost_rises_from_one_ns_to_the_next_where_goodput_changes_its_rule(name: str) -> None:
    turn_ns = round(FACTS.interval_s(0) * 1e9)
    costs = [cost(name, FACTS, turn_ns + ns, 1) for ns in range(-500, 500)]
    assert all(first <= second for first, second in pairwise(costs))


@pytest.mark.parametrize("name", OBJECTIVES)
@given(
    points=st.lists(st.tuples(STEPS_NS, PEAKS_BYTES), min_size=1, max_size=8),
    checkpoint_s=st.sampled_from([0.0, 60.0]),
)
def test_arrays_give_what_scalars_do(
    name: str, points: list[tuple[int, int]], checkpoint_s: float
) -> None:
    facts = replace(FACTS, checkpoint_s=checkpoint_s)
    steps, peaks = np.array(points, np.int64).T
    for function in (cost, figure):
        together = function(name, facts, steps, peaks)
        alone = [function(name, facts, step, peak) for step, peak in points]
        # To the last bit: bounds come in arrays, and what they are compared with does not.
        np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step_time", 2.0),
        ("tokens_per_s", 500_000.0),
        ("dollars_per_mtoken", 2 * 1024 * 2.5 / 3600),
        ("joules_per_token", 2 * 1024 * 969 * 1.3 / 1e6),
        ("memory_headroom", 2.0**34),
        ("goodput", 500_000 * 0.8525),
    ],
)
def test_figures_are_in_their_own_units(name: str, expected: float) -> None:
    found = figure(name, FACTS, 2 * 10**9, 64 << 30)
    assert found == pytest.approx(expected, rel=1e-4)
    assert figure_of(name, FACTS, cost(name, FACTS, 2 * 10**9, 64 << 30)) == found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_limit_is_broken_on_its_wrong_side_only(name: str) -> None:
    at = (2 * 10**9, 64 << 30)
    value = figure(name, FACTS, *at)
    wrong = 1.01 if name in BEST_IS_HIGH else 0.99
    for factor in (1.0, 2 - wrong):
        assert broken_limit(Goal(limits={name: value * factor}), FACTS, *at) == ""
    words = broken_limit(Goal(limits={name: value * wrong}), FACTS, *at)
    assert words.startswith(f"{name} is {told(name, value)}, goal.limits ")
    assert words.endswith(told(name, value * wrong))
    assert ("at least" in words) is (name in BEST_IS_HIGH)


def test_the_first_broken_limit_is_told() -> None:
    goal = Goal(limits={"goodput": 1e9, "memory_headroom": 2.0**34, "step_time": 3.0})
    assert "goodput is 426,230 tokens/s" in broken_limit(goal, FACTS, 2 * 10**9, 64 << 30)
    assert "memory_headroom is 15.0 GiB" in broken_limit(goal, FACTS, 2 * 10**9, 65 << 30)
    assert broken_limit(Goal(), FACTS, 10**13, 1 << 50) == ""


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


# Few values, so that costs are often equal.
VALUES = st.sampled_from([0.0, 1.0, 2.5, 3.0, 7.0])


@given(
    st.integers(1, 3).flatmap(lambda num: st.lists(st.tuples(*[VALUES] * num), max_size=40)),
)
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, ...]]) -> None:
    expected = tuple(
        place
        for place, point in enumerate(points)
        if not any(_dominates(other, point) for other in points)
    )
    assert front(points) == expected


def test_a_front_of_many_is_quick_and_whole() -> None:
    # A circle and a sphere seen from the origin dominate nothing of themselves, and all beyond.
    angles = np.linspace(0.01, 1.56, 20_000)
    circle = 1 - np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert front(circle.tolist()) == tuple(range(20_000))
    ball = np.random.default_rng(0).normal(size=(5_000, 3))
    ball = 2 - np.abs(ball) / np.linalg.norm(ball, axis=1, keepdims=True)
    assert front([*ball.tolist(), *(ball + 0.5).tolist()]) == tuple(range(5_000))


def test_a_front_of_what_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="a cost is NaN"):
        front([(1.0, float("nan"))])
    assert front([]) == ()
    assert front([(float("inf"), 1.0), (2.0, 1.0)]) == (1,)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text(
        '[model]\npreset = "llama-3.1-405b"\n[workload]\nseq_len = 8192\nglobal_batch = 2048\n'
        'dtype = "bf16"\n[stack]\npreset = "torchtitan"\n'
        '[cluster]\npreset = "h100-sxm"\nnodes = 2048\n'
    )
    return read_job(path)


def test_what_is_assumed_is_told_and_agrees_with_llama_3(job: Job) -> None:
    facts = facts_of(replace(job, goal=Goal(objectives=("goodput", "joules_per_token"))))
    words = "\n".join(facts.assumptions)
    assert "assumed 969 W a GPU with its share of the node: nodes of 8 H100" in words
    assert "PUE 1.54: mean of the Uptime" in words
    assert "0.000474 interruptions per GPU-day: Llama 3 405B" in words
    assert "say otherwise with cluster.failures.checkpoint_rate" in words
    assert "(2024-07-31)" in words
    # 54 days with an effective training time above 90 %; 2 TB/s of storage.
    assert facts.mean_s / 3600 == pytest.approx(3.09, abs=0.01)
    assert facts.checkpoint_s == pytest.approx(14 * 405.85e9 / 2e12, rel=0.001)
    share = figure("goodput", facts, 10**10, 0) / figure("tokens_per_s", facts, 10**10, 0)
    assert 0.9 < share < 0.95
    assert facts_of(job).assumptions == ()


def test_what_is_given_is_not_assumed(job: Job) -> None:
    operation = Operation(
        dollars_per_gpu_hour=2.0, watts_per_gpu=1000.0, pue=1.1, interruptions_per_gpu_day=0.0,
        restart_ns=60 * SECOND_NS, checkpoint_stall_ns=5 * SECOND_NS,
    )  # fmt: skip
    cluster = replace(job.cluster, operation=operation)
    goal = Goal(objectives=("goodput", "memory_headroom"), limits={"joules_per_token": 9.0})
    facts = facts_of(replace(job, cluster=cluster, goal=goal))
    assert facts.assumptions == ()
    assert (facts.watts_per_gpu, facts.pue, facts.dollars_per_gpu_hour) == (1000.0, 1.1, 2.0)
    assert (facts.restart_s, facts.checkpoint_s, facts.mean_s) == (60.0, 5.0, 0.0)
    assert facts.interval_s(10**9) == 0.0
    assert figure("goodput", facts, 10**9, 0) == figure("tokens_per_s", facts, 10**9, 0)
    rated = replace(operation, checkpoint_stall_ns=None, checkpoint_bytes_per_s=1e12)
    facts = facts_of(replace(job, cluster=replace(job.cluster, operation=rated)))
    assert facts.checkpoint_s == pytest.approx(5.682, abs=0.001)


def test_objectives_that_cannot_differ_are_told(job: Job) -> None:
    goal = Goal(objectives=("step_time", "memory_headroom", "tokens_per_s"))
    (remark,) = facts_of(replace(job, goal=goal)).assumptions
    assert (
        remark
        == "on one cluster step_time and tokens_per_s are all best where the step is shortest"
    )


def test_a_cluster_that_never_trains_is_an_error(job: Job) -> None:
    operation = Operation(interruptions_per_gpu_day=100.0)
    hopeless = replace(job, cluster=replace(job.cluster, operation=operation))
    assert facts_of(hopeless).mean_s == pytest.approx(86_400 / 1_638_400)
    with pytest.raises(
        InvalidInputError, match=r"cluster.failures is an interruption every 0.0527"
    ):
        facts_of(replace(hopeless, goal=Goal(objectives=("goodput",))))


def test_facts_that_nobody_gave_are_errors_where_they_are_needed() -> None:
    bare = Facts(tokens_per_step=1000, num_gpus=8, memory_bytes=80 << 30)
    with pytest.raises(ValueError, match="needs a price"):
        cost("dollars_per_mtoken", bare, 1, 1)
    with pytest.raises(ValueError, match="needs a power"):
        cost("joules_per_token", bare, 1, 1)


def test_assumed_values_follow_from_their_sources() -> None:
    assert assumption("interruptions_per_gpu_day").value == pytest.approx(LLAMA_RATE, rel=1e-4)
    assert assumption("checkpoint_bytes_per_s_per_gpu").value == pytest.approx(
        2e12 / 16_384, rel=1e-4
    )
    assert assumption("watts_per_board_watt").value == pytest.approx(
        0.76 * 10_200 / 5_600, rel=1e-3
    )
