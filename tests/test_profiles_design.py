"""The sampler fills the space, then goes where the surface errs, and stops when it does not."""

import math
import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.measure.design import MEDIAN_TARGET, P90_TARGET, Design
from profiles.surface import Shape, Surface

SIZES = tuple(1 << i for i in range(6, 15))
BOX = tuple(product(SIZES, SIZES))
ANCHOR = (512, 64)


def works(shape: Shape) -> tuple[float, ...]:
    return (float(math.prod(shape)),)


def straight_ns(shape: Shape) -> int:
    return round(3_000 + 0.25 * works(shape)[0])


def kinked_ns(shape: Shape) -> int:
    """A law that is three times as slow once a width no longer fits some cache."""
    return round(straight_ns(shape) * (3.0 if shape[1] > 3_000 else 1.0))


def measured(shapes: tuple[Shape, ...]) -> dict[Shape, int]:
    return {shape: kinked_ns(shape) for shape in shapes}


def grown(design: Design, count: int) -> dict[Shape, int]:
    """Measure the seeds, and then as many as the design likes best, one after another."""
    samples = measured(design.seeds())
    while len(samples) < count:
        samples |= measured(design.next(samples, 1))
    return samples


def held_out_errors(samples: dict[Shape, int]) -> tuple[float, float]:
    """Median and P90 of the relative error at random shapes of the box."""
    chance = random.Random(7)
    low, high = math.log(SIZES[0]), math.log(SIZES[-1])
    shapes = [
        (round(math.exp(chance.uniform(low, high))), round(math.exp(chance.uniform(low, high))))
        for _ in range(400)
    ]
    surface = Surface(samples, works)
    errors = [abs(surface.at(shape)[0] / kinked_ns(shape) - 1) for shape in shapes]
    return float(np.quantile(errors, 0.5)), float(np.quantile(errors, 0.9))


def test_adaptive_picks_beat_a_lattice_of_as_many() -> None:
    fine = tuple(product((*SIZES, *(3 * size // 2 for size in SIZES[:-1])), repeat=2))
    every = np.linspace(0, len(SIZES) - 1, 5).round().astype(int)
    lattice = tuple(product((SIZES[i] for i in every), repeat=2))
    even = held_out_errors(measured(lattice))
    adaptive = held_out_errors(grown(Design(fine, works), len(lattice)))
    assert adaptive[0] < even[0]
    assert adaptive[1] < 0.7 * even[1]


def test_picks_gather_at_the_kink() -> None:
    design = Design(BOX, works)
    seeds = design.seeds()
    picked = [shape for shape in grown(design, len(seeds) + 16) if shape not in seeds]
    beside_kink = sum(shape[1] in (2048, 4096) for shape in picked)
    assert beside_kink / len(picked) > 1.5 * 2 / len(SIZES)


def test_seeds_are_anchors_corners_the_centre_and_what_is_far_from_all() -> None:
    seeds = Design(BOX, works, anchors=[ANCHOR]).seeds()
    low, high = SIZES[0], SIZES[-1]
    assert seeds[:5] == (ANCHOR, (low, low), (low, high), (high, low), (high, high))
    assert seeds[5] == (SIZES[4], SIZES[4])
    assert len(seeds) == len(set(seeds)) == 9


def test_a_corner_that_is_no_candidate_is_left_out() -> None:
    allowed = [shape for shape in BOX if math.prod(shape) <= 1 << 20]
    seeds = Design(allowed, works).seeds()
    assert (SIZES[-1], SIZES[-1]) not in seeds
    assert set(seeds) <= set(allowed)


@given(seed=st.integers(0, 1000))
def test_the_order_of_candidates_and_samples_does_not_matter(seed: int) -> None:
    shuffled = list(BOX)
    random.Random(seed).shuffle(shuffled)
    one, other = Design(BOX, works), Design(shuffled, works)
    assert one.seeds() == other.seeds()
    samples = measured(one.seeds())
    backwards = dict(reversed(samples.items()))
    assert one.next(samples, 3) == other.next(backwards, 3)


def test_of_two_shapes_that_are_alike_only_one_is_chosen_at_once() -> None:
    twins = {shape: (shape[0], shape[1] + 1) for shape in BOX}
    design = Design([*BOX, *twins.values()], works)
    chosen = design.next(measured(BOX[::11]), 6)
    assert len(set(chosen)) == 6
    assert not {twins[shape] for shape in chosen if shape in twins} & set(chosen)


def test_what_takes_too_long_or_cannot_be_measured_is_not_chosen() -> None:
    longest_ns = 2_000_000
    design = Design(BOX, works, longest_ns=longest_ns)
    samples = measured(design.seeds())
    without = design.next(samples, 3)
    chosen = design.next(samples, 40, without)
    surface = Surface(samples, works)
    assert chosen
    assert not set(chosen) & {*without, *samples}
    assert all(surface.at(shape)[0] <= longest_ns for shape in chosen)


def test_a_design_ends_with_its_candidates() -> None:
    design = Design(BOX[:20], works)
    samples = measured(design.seeds())
    rest = design.next(samples, 1000)
    assert {*rest, *samples} == set(BOX[:20])
    assert design.next(samples | measured(rest), 3) == ()


def test_a_law_settles_with_its_seeds_and_not_before() -> None:
    design = Design(BOX, works)
    seeds = design.seeds()
    samples = {shape: straight_ns(shape) for shape in seeds}
    assert design.error({shape: samples[shape] for shape in seeds[:3]}).excess > 1
    assert design.error(samples).excess <= 1


def test_the_stated_error_is_that_of_leaving_out() -> None:
    design = Design(BOX, works)
    samples = measured(design.seeds())
    errors = np.abs(np.expm1(Surface(samples, works).left_out()[0]))
    stated = design.error(samples)
    assert tuple(stated) == (np.quantile(errors, 0.5), np.quantile(errors, 0.9))
    assert stated.excess == max(stated.median / MEDIAN_TARGET, stated.p90 / P90_TARGET)


def test_without_candidates_there_is_no_design() -> None:
    with pytest.raises(ValueError, match="at least one candidate"):
        Design([], works)


@given(seed=st.integers(0, 200))
def test_more_measured_shapes_leave_less_uncertain(seed: int) -> None:
    chance = random.Random(seed)
    surface = Surface(measured(tuple(chance.sample(BOX, 12))), works)
    asked, more = chance.sample(BOX, 10), chance.sample(BOX, 3)
    before = surface.deviations(asked)
    assert before == pytest.approx([surface.at(shape)[1] for shape in asked], abs=1e-9)
    one, three = surface.deviations(asked, more[:1]), surface.deviations(asked, more)
    assert (one <= before + 1e-9).all()
    assert (three <= one + 1e-9).all()
    assert three == pytest.approx(surface.deviations(asked, more[::-1]), abs=1e-9)


def test_times_at_many_shapes_are_those_at_each() -> None:
    surface = Surface(measured(BOX[::5]), works)
    each = [surface.at(shape)[0] for shape in BOX]
    assert surface.times(BOX) == pytest.approx(each)
    nearest = surface.nearest(BOX)
    assert all(surface.nearness(BOX[i]).argmax() == nearest[i] for i in range(len(BOX)))
