"""Surfaces: laws are found again, what they leave is interpolated, and errors are honest."""

import math
import random
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.published.interpolation import held_out_errors
from profiles.surface import Surface, fit_law

Shape = tuple[int, ...]


def works(shape: Shape) -> tuple[float, ...]:
    return 2.0 * math.prod(shape), float(sum(shape))


def bent_ns(shape: Shape) -> int:
    """A law with a smooth bend that it does not know of, as caches make one."""
    rows, width = shape
    return round((2_000 + 0.5 * rows * width) * (1.0 + 0.5 * math.tanh(math.log(rows / 300))))


def lattice(low: int, high: int) -> list[Shape]:
    sizes = [1 << i for i in range(low, high)]
    return [(rows, width) for rows in sizes for width in sizes]


@given(
    constant=st.floats(0, 1e5),
    rate=st.floats(1e-3, 10.0),
    other=st.floats(0, 100.0),
    seed=st.integers(0, 99),
)
def test_a_law_is_found_again_anywhere(
    constant: float, rate: float, other: float, seed: int
) -> None:
    chance = random.Random(seed)
    shapes = {(chance.randint(1, 500), chance.randint(1, 500)) for _ in range(12)}

    def law_ns(shape: Shape) -> float:
        return constant + rate * works(shape)[0] + other * works(shape)[1]

    table = np.array([(1.0, *works(shape)) for shape in shapes])
    found = fit_law(table, np.array([law_ns(shape) for shape in shapes]))
    assert (found >= 0).all()
    for shape in ((1000, 2000), (7, 5)):
        assert float(np.dot(found, (1.0, *works(shape)))) == pytest.approx(law_ns(shape), rel=1e-4)


def test_a_law_without_a_negative_part_is_the_best_of_those() -> None:
    """Times that fall with size: a constant is all that a law may say, the mean of 1/t weights."""
    table, times = np.array([[1.0, 1.0], [1.0, 10.0]]), np.array([20.0, 10.0])
    constant = (1 / 20 + 1 / 10) / (1 / 20**2 + 1 / 10**2)
    assert fit_law(table, times) == pytest.approx([constant, 0.0])


def test_what_the_law_leaves_is_interpolated() -> None:
    surface = Surface({shape: bent_ns(shape) for shape in lattice(5, 12)}, works)
    for shape in ((100, 700), (300, 100), (600, 1500), (1500, 48)):
        time_ns, deviation = surface.at(shape)
        assert time_ns == pytest.approx(bent_ns(shape), rel=0.04)
        assert 0 < deviation < 0.15


def test_far_away_the_law_holds_and_nothing_is_sure() -> None:
    surface = Surface({shape: bent_ns(shape) for shape in lattice(5, 12)}, works)
    assert surface.at((1 << 30, 64))[1] > 2 * surface.at((100, 64))[1]
    assert surface.covers((2048, 32))
    assert not surface.covers((2049, 32))


def test_leaving_out_in_closed_form_is_leaving_out() -> None:
    """A shape whose time is not known at all, in place of one that is left out."""
    chance = random.Random(1)
    times = {s: round(bent_ns(s) * math.exp(chance.gauss(0, 0.05))) for s in lattice(5, 9)}
    surface = Surface(times, works)
    errors, deviations = surface.left_out()
    for i, shape in enumerate(surface.shapes):
        blind = Surface(times, works, {shape: 1e6})
        blind.law, blind._left = surface.law, surface._left
        matrix = blind._matrix(surface._lengths, surface._nugget)
        blind._inverse = np.asarray(np.linalg.inv(matrix), np.float64)
        blind._lengths, blind._nugget = surface._lengths, surface._nugget
        blind._weights = blind._inverse @ blind._left
        left = math.log(times[shape] / blind.at(shape)[0])
        assert errors[i] == pytest.approx(left, abs=1e-6)
        assert deviations[i] > 0


def test_the_stated_deviation_is_that_of_the_errors() -> None:
    """Of shapes that were not measured, about two of three lie within one deviation."""
    chance = random.Random(2)
    times = {s: round(1e6 * math.exp(chance.gauss(0, 0.1))) for s in lattice(4, 14)}
    surface = Surface(times, works)
    errors, deviations = surface.left_out()
    assert 0.55 <= float((np.abs(errors) <= deviations).mean()) <= 0.8


def test_near_shapes_tell_most() -> None:
    surface = Surface({shape: bent_ns(shape) for shape in lattice(5, 12)}, works)
    share = surface.nearness((70, 70))
    assert share.sum() == pytest.approx(1.0)
    assert surface.shapes[int(share.argmax())] == (64, 64)


@pytest.mark.parametrize("shape", [(1,), (0, 5), (1, 2, 3)])
def test_a_shape_of_another_kind_is_refused(shape: Shape) -> None:
    with pytest.raises(ValueError, match="it must be 2 sizes of at least 1"):
        Surface({(2, 2): 5, (4, 4): 9}, works).at(shape)


def test_one_time_is_enough_and_none_is_not() -> None:
    assert Surface({(2, 2): 500}, works).at((2, 2))[0] == pytest.approx(500)
    with pytest.raises(ValueError, match="at least one measured time"):
        Surface({}, works)


def test_the_likelihood_is_that_of_its_formula() -> None:
    surface = Surface({shape: bent_ns(shape) for shape in lattice(5, 9)}, works)
    lengths, left = np.array([2.0, 4.0]), surface._left
    matrix = surface._matrix(lengths, 0.1)
    variance = float(left @ np.linalg.solve(matrix, left)) / len(left)
    expected = len(left) * math.log(variance) + float(np.linalg.slogdet(matrix)[1])
    assert surface._unlikelihood(lengths, 0.1) == pytest.approx(expected)


def test_published_products_of_an_h100_are_foretold() -> None:
    """Held out by quarters: at most 5 % at the median and 12 % at P90, as a profile promises."""
    table = Path(__file__).parent / "golden" / "h100_products_bf16.csv"
    rows = [line.split(",") for line in table.read_text().splitlines() if line[0] != "#"]
    times: dict[Shape, int] = {(int(m), int(n), int(k)): int(ns) for m, n, k, ns in rows}
    errors = held_out_errors(times)
    assert len(errors) == len(rows) == 300
    assert median(errors) <= 0.05
    assert np.quantile(errors, 0.9) <= 0.12
