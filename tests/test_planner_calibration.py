"""Calibration: closed forms of the fit, scalars recovered from made-up runs, and the bands."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import log
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.calibration import OWN, SHARED, Calibration, calibrate
from planner.fit import (
    HOLD,
    HUBER,
    SPREADS,
    Fit,
    Sample,
    fit,
    inward,
    predicted_ns,
    scalars_of,
)
from planner.interval import FEWEST, UNSEEN, Pair, conformal_bands
from planner.predict import step_model
from planner.reference.program import MATMUL, MEMORY, Floats, Lanes, lanes_of
from planner.reference.step import StepModel
from planner.setup import Setup
from profiles.files import plain
from profiles.presets import calibrated, stack_preset, stack_presets
from profiles.stack import SCALARS
from tests.setups import SMALL, setup_of

NEUTRAL = {name: meaning.neutral for name, meaning in SCALARS.items()}
NAMES = tuple(SCALARS)
FREE = ("matmul", "attention", "memory", "launch", "intra", "inter")
TRUTH = {"matmul": 1.2, "attention": 1.3, "memory": 1.5, "launch": 12.0, "intra": 1.4,
         "inter": 1.7}  # fmt: skip
START = Fit(
    place=np.array([inward(name, value) for name, value in NEUTRAL.items()]),
    spread=np.array([SPREADS[name] for name in NAMES]),
)


class Stretched:
    """A step of a second that one category of kernels is all of."""

    def __init__(self, category: int = MATMUL) -> None:
        self.category = category

    def step_ns(self, lanes: Lanes) -> Floats:
        """Return the time of the step, float64 [L]."""
        return np.asarray(1e9 * lanes.factor[self.category])


def sample(
    ratio: float, group: str = "lab", stack: str = "made up", category: int = MATMUL
) -> Sample:
    """Return a run that took `ratio` seconds where a second is expected at neutral scalars."""
    return Sample(
        group=group, stack=stack, gpu="h100-sxm", calibrates=("matmul",),
        model=cast(StepModel, Stretched(category)), measured_ns=1e9 * ratio,
    )  # fmt: skip


def found_log(samples: Sequence[Sample]) -> float:
    """Return ln of the scalar of products that fits `samples`."""
    return float(fit(samples, START, ("matmul",)).place[NAMES.index("matmul")])


def held(name: str = "matmul") -> float:
    """Return how much what was known before weighs, in runs of no outlier."""
    return HOLD / SPREADS[name] ** 2 * HUBER**2


# Closed forms.


@given(st.integers(1, 50), st.floats(-0.07, 0.07))
def test_few_runs_stay_near_what_was_known_and_many_do_not(count: int, error: float) -> None:
    """n errors e of one sign: n e / (n + h)."""
    expected = count * error / (count + held())
    assert found_log([sample(np.exp(error))] * count) == pytest.approx(expected, abs=1e-6)


def test_a_group_weighs_the_square_root_of_its_runs() -> None:
    """Sixteen runs against one: four to one, in all as many as there are."""
    samples = [sample(np.exp(0.03), "one"), *[sample(np.exp(-0.03), "many")] * 16]
    weights = np.array([1.0, 4.0]) * 17 / 5
    expected = 0.03 * (weights[0] - weights[1]) / (17 + held())
    assert found_log(samples) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("ratio", [2.0, 1e6])
def test_an_outlier_pulls_no_harder_the_farther_it_lies(ratio: float) -> None:
    """As hard as an error of `HUBER`, and the runs that agree pull back: n p = H."""
    samples = [*[sample(1.0)] * 30, sample(ratio)]
    assert found_log(samples) == pytest.approx(HUBER / (30 + held()), rel=0.01)


@given(st.integers(1, 30))
def test_the_spread_is_the_curvature_of_the_loss(count: int) -> None:
    spread = fit([sample(1.0)] * count, START, ("matmul",)).spread
    expected = (count / HUBER**2 + HOLD / SPREADS["matmul"] ** 2) ** -0.5
    assert spread[NAMES.index("matmul")] == pytest.approx(expected)
    assert np.count_nonzero(spread) == 1


@pytest.mark.parametrize(("ratio", "bound"), [(50.0, "at_most"), (0.01, "at_least")])
def test_no_scalar_leaves_its_bounds(ratio: float, bound: str) -> None:
    found = fit([sample(ratio)] * 400, START, ("matmul",))
    limit = getattr(SCALARS["matmul"], bound)
    assert found.place[NAMES.index("matmul")] == pytest.approx(log(limit))
    scalar = scalars_of(found, ("matmul",))["matmul"]
    assert scalar.value == pytest.approx(limit)
    assert SCALARS["matmul"].at_least <= scalar.low <= scalar.value
    assert scalar.value <= scalar.high <= SCALARS["matmul"].at_most


def test_scalars_that_a_stack_does_not_calibrate_stay() -> None:
    found = fit([sample(1.5, category=MEMORY)] * 50, START, ("matmul", "launch"))
    moved = found.place != START.place
    assert not moved[NAMES.index("memory")]
    assert not any(moved[NAMES.index(name)] for name in NAMES if name not in ("matmul", "launch"))
    assert list(scalars_of(found, ("matmul", "launch"))) == ["matmul", "launch"]


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=9))
def test_predictions_are_those_of_each_sample_alone(ratios: list[float]) -> None:
    samples = [sample(ratio, category=i % 2) for i, ratio in enumerate(ratios)]
    place = START.place.copy()
    place[NAMES.index("matmul")] = log(1.25)
    expected = [1.25e9 if i % 2 == MATMUL else 1e9 for i in range(len(ratios))]
    assert predicted_ns(samples, Fit(place, START.spread)) == pytest.approx(expected)


# Made-up runs of known scalars.


def _setups() -> Iterable[Setup]:
    """Yield runs that together tell the scalars apart: small and large, alone and far apart."""
    for hidden in (512, 2048, 8192):
        model = replace(SMALL, hidden=hidden, num_heads=max(8, hidden // 128), ffn=4 * hidden)
        for seq_len, micro_batch in ((1024, 1), (4096, 4), (16384, 1)):
            for dp, tp, pp in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (16, 1, 1), (8, 4, 1),
                               (1, 16, 1), (64, 1, 1)):  # fmt: skip
                if model.num_heads % tp == 0:
                    yield setup_of(
                        model, seq_len=seq_len, micro_batch=micro_batch, num_microbatches=2,
                        dp=dp, tp=tp, pp=pp, sequence_parallel=tp > 1,
                    )  # fmt: skip


def made_up(
    truth: Mapping[str, float], stack: str = "made up", noise: Sequence[float] = (0.0,)
) -> list[Sample]:
    """Return runs that took what is predicted for `truth`, but for `noise` in turn (ln)."""
    lanes = lanes_of(NEUTRAL | dict(truth))
    samples = []
    for number, setup in enumerate(_setups()):
        model = step_model(setup)
        ns = float(model.step_ns(lanes)[0]) * np.exp(noise[number % len(noise)])
        samples.append(
            Sample(group=f"{stack} {'ab'[number % 2]}", stack=stack, gpu="h100-sxm",
                   calibrates=FREE, model=model, measured_ns=ns)
        )  # fmt: skip
    return samples


def no_words(_: str) -> None:
    """Hear nothing."""


@pytest.fixture(scope="module")
def found() -> Calibration:
    """The calibration on runs of two stacks with different hosts."""
    other = TRUTH | {"launch": 25.0, "matmul": 1.3}
    return calibrate([*made_up(TRUTH), *made_up(other, "other")], no_words)


def test_known_scalars_are_recovered_within_two_percent(found: Calibration) -> None:
    values = {name: scalar.value for name, scalar in found.scalars["made up"].items()}
    assert values == pytest.approx(TRUTH, rel=0.02)
    assert found.scalars["other"]["launch"].value == pytest.approx(25, rel=0.02)
    assert found.scalars["other"]["matmul"].value == pytest.approx(1.3, rel=0.02)


def test_errors_of_a_perfect_model_vanish(found: Calibration) -> None:
    assert [score.group for score in found.scores] == sorted(
        f"{stack} {half}" for stack in ("made up", "other") for half in "ab"
    )
    for score in found.scores:
        assert score.in_sample[0] < 0.005
        assert score.in_sample[1] < 0.02
        assert score.left_out[0] < 0.01


def test_noise_leaves_a_few_percent() -> None:
    noisy = made_up(TRUTH, noise=(0.05, -0.02, 0.0, -0.05, 0.02))
    start = fit(noisy, START, FREE)
    values = {name: scalar.value for name, scalar in scalars_of(start, FREE).items()}
    assert values == pytest.approx(TRUTH, rel=0.08)
    for name, scalar in scalars_of(start, FREE).items():
        assert scalar.low < scalar.value < scalar.high, name


def test_what_stacks_share_lies_between_them_and_holds_nothing_of_their_hosts(
    found: Calibration,
) -> None:
    shared = found.scalars[SHARED]
    assert list(shared) == list(NAMES)
    assert 1.2 < shared["matmul"].value < 1.3
    assert {name: shared[name].value for name in OWN} == {name: NEUTRAL[name] for name in OWN}


def test_stacks_have_only_what_they_calibrate(found: Calibration) -> None:
    assert list(found.scalars) == [SHARED, "made up", "other"]
    assert [list(found.scalars[name]) for name in ("made up", "other")] == [list(FREE)] * 2


def test_the_same_runs_give_the_same_bytes() -> None:
    once, twice = (
        json.dumps(plain(calibrate(made_up(TRUTH, noise=(0.1, -0.2))[::3], no_words).shipped()))
        for _ in range(2)
    )
    assert once == twice


def test_a_stack_with_one_run_stays_near_the_others() -> None:
    """Its single run, half as slow again, cannot tell which of six scalars is to blame."""
    (lone,) = made_up(TRUTH, "lone", noise=(0.4,))[:1]
    samples = [*made_up(TRUTH)[::3], lone]
    scalars = calibrate(samples, no_words).scalars
    for name in ("matmul", "attention", "memory", "intra", "inter"):
        assert scalars["lone"][name].value == pytest.approx(scalars[SHARED][name].value, rel=0.15)


# What is shipped.


def test_shipped_scalars_are_within_bounds_and_eight_at_most() -> None:
    for name, scalars in calibrated()["scalars"].items():
        own = tuple(scalars)
        assert name == SHARED or len(own) <= 8
        assert name == SHARED or set(own) <= set(stack_preset(name).calibrates)
        for scalar, (value, low, high) in scalars.items():
            meaning = SCALARS[scalar]
            assert meaning.at_least <= low <= value <= high <= meaning.at_most, (name, scalar)


@pytest.mark.parametrize("name", stack_presets())
def test_a_stack_has_its_own_scalars_and_shares_the_others(name: str) -> None:
    shipped = calibrated()["scalars"]
    for scalar in SCALARS:
        value = shipped.get(name, {}).get(scalar, shipped[SHARED][scalar])[0]
        assert stack_preset(name).scalar(scalar) == value


# Bands.


def pairs(ratios: Iterable[float], group: str = "lab") -> list[Pair]:
    """Return predictions beside runs that took `ratios` of them."""
    return [Pair(group, "made up", "h100-sxm", 1 / ratio) for ratio in ratios]


@settings(max_examples=200)
@given(st.lists(st.floats(0.3, 3.0), min_size=10, max_size=120))
def test_a_band_holds_four_of_five_runs_and_the_median(ratios: list[float]) -> None:
    """Of those it is made from, but for the run at either end and what the median adds."""
    (band,) = conformal_bands(pairs(ratios), []).values()
    assert band.low <= 1 <= band.high
    # Four digits are kept.
    outside = [sum(ratio < 0.999 * band.low for ratio in ratios),
               sum(ratio > 1.001 * band.high for ratio in ratios)]  # fmt: skip
    assert max(outside) <= 0.1 * len(ratios) + 1


def test_a_band_takes_eight_runs() -> None:
    assert conformal_bands(pairs([1.1] * (FEWEST - 1)), []) == {}
    assert list(conformal_bands(pairs([1.1] * FEWEST), [])) == ["made up h100-sxm"]


def test_a_few_runs_count_beside_many_in_a_band() -> None:
    """Ten runs of one group against a thousand of another weigh a tenth, not a hundredth."""
    many, few = pairs(np.linspace(0.99, 1.01, 1000)), pairs([1.5] * 25, "few")
    (alone,), (both,) = (conformal_bands(each, []).values() for each in (many, [*many, *few]))
    assert alone.high < 1.01
    assert both.high == 1.5


def test_among_the_unseen_each_group_counts_alike() -> None:
    """Above 1 + x lies ((0.2 - x) / 0.4 + (0.4 - x) / 0.8) / 3, a tenth at x = 0.187."""
    groups = [pairs(np.linspace(1 - width, 1 + width, count), f"group {width}")
              for width, count in ((0.1, 101), (0.2, 1001), (0.4, 301))]  # fmt: skip
    found = conformal_bands([], [pair for group in groups for pair in group])[UNSEEN]
    assert (found.low, found.high) == pytest.approx((0.813, 1.187), abs=0.005)
