"""Quantities: known values, refusals with their texts, and the round trip of whole numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.quantity import (
    Dimension,
    format_quantity,
    parse_quantity,
    quantity_example,
    quantity_rule,
)

DIMENSIONS: tuple[Dimension, ...] = ("bytes", "bytes/s", "ns", "flop/s", "tokens", "watts")


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("80 GiB", "bytes", 80 * 2**30),
        ("80 GB", "bytes", 80 * 10**9),
        ("80GiB", "bytes", 80 * 2**30),
        ("9007199254740993 B", "bytes", 9007199254740993),
        ("400 Gb/s", "bytes/s", 50e9),
        ("400 GB/s", "bytes/s", 400e9),
        ("1 GiB/s", "bytes/s", 2.0**30),
        ("4 us", "ns", 4_000),
        ("1.5 ms", "ns", 1_500_000),
        ("0 ns", "ns", 0),
        ("2 h", "ns", 7_200 * 10**9),
        ("989 TFLOP/s", "flop/s", 989e12),
        ("1.5 Ttokens", "tokens", 1_500_000_000_000),
        ("15e12 tokens", "tokens", 15_000_000_000_000),
        ("700 W", "watts", 700.0),
        ("10.2 kW", "watts", 10_200.0),
    ],
)
def test_known_quantities(text: str, dimension: Dimension, value: float) -> None:
    found: float = parse_quantity(text, dimension)
    assert found == value
    assert isinstance(found, int) is (dimension in ("bytes", "ns", "tokens"))


@pytest.mark.parametrize(
    ("value", "dimension", "reason"),
    [
        ("80", "bytes", "'80' has no unit"),
        ("4e3", "ns", "'4e3' has no unit"),
        (80, "bytes", "80 is a bare number, not text"),
        (1.5, "watts", "1.5 is a bare number, not text"),
        (math.nan, "bytes", "nan is a bare number, not text"),
        (True, "bytes", "True is a boolean, not text"),
        (None, "bytes", "None is a value of type NoneType, not text"),
        ("", "bytes", "'' is empty"),
        ("-3 GiB", "bytes", "'-3 GiB' is negative"),
        ("nan GiB", "bytes", "'nan GiB' is not a finite number"),
        ("inf s", "ns", "'inf s' is not a finite number"),
        ("80 gib", "bytes", "'80 gib' has the unit 'gib'"),
        ("80 Gb", "bytes", "'80 Gb' has the unit 'Gb'"),
        ("3 s", "bytes", "'3 s' has the unit 's', which is a time"),
        ("3.35 TB", "bytes/s", "'3.35 TB' has the unit 'TB', which is a size"),
        ("1e999 W", "watts", "'1e999 W' is too large"),
        ("9" * 5000 + " B", "bytes", "is too large"),
        ("1e19 B", "bytes", "'1e19 B' is too large"),
        ("0.1 ns", "ns", "'0.1 ns' is less than one ns"),
        ("80 GiB\n", "bytes", "is not a number and a unit"),
        ("\u0663 GiB", "bytes", "is not a number and a unit"),
        ("1 GiB; rm", "bytes", "is not a number and a unit"),
    ],
)
def test_refusals_say_what_was_found_and_what_is_needed(
    value: object, dimension: Dimension, reason: str
) -> None:
    with pytest.raises(ValueError, match="it must be") as caught:
        parse_quantity(value, dimension)
    message = str(caught.value)
    assert reason in message
    assert quantity_rule(dimension) in message
    assert quantity_example(dimension) in message
    assert len(message) < 400


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_every_example_is_read(dimension: Dimension) -> None:
    value: float = parse_quantity(quantity_example(dimension), dimension)
    assert value > 0


@pytest.mark.parametrize(
    ("value", "dimension", "text"),
    [
        (0, "bytes", "0 B"),
        (1023, "bytes", "1,023 B"),
        (1024, "bytes", "1.0 KiB"),
        (2**30 - 1, "bytes", "1.0 GiB"),
        (-(2**30), "bytes", "-1.0 GiB"),
        (0, "ns", "0 ns"),
        (999, "ns", "999 ns"),
        (1_000, "ns", "1.0 us"),
        (59_500_000_000, "ns", "59.500 s"),
        (7_200 * 10**9, "ns", "2.0 h"),
        (10 * 86_400 * 10**9, "ns", "10.0 d"),
        (3.35e12, "bytes/s", "3.4 TB/s"),
        (1_500_000_000_000, "tokens", "1.5 Ttokens"),
        (700.0, "watts", "700.0 W"),
    ],
)
def test_known_renderings(value: float, dimension: Dimension, text: str) -> None:
    assert format_quantity(value, dimension) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_finite_values_have_a_text(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        format_quantity(value, "bytes")


@given(st.integers(0, 2**62))
def test_whole_numbers_survive_their_base_unit(number: int) -> None:
    assert parse_quantity(f"{number} B", "bytes") == number
    assert parse_quantity(f"{number} ns", "ns") == number
    assert parse_quantity(f"{number} tokens", "tokens") == number


@given(st.sampled_from(DIMENSIONS), st.floats(1, 1e17))
def test_a_rendering_is_read_back_to_its_digits(dimension: Dimension, number: float) -> None:
    value = round(number) if dimension in ("bytes", "ns", "tokens") else number
    text = format_quantity(value, dimension).replace(",", "")
    back: float = parse_quantity(text, dimension)
    assert back == pytest.approx(value, rel=0.051)


@given(st.text(max_size=12), st.sampled_from(DIMENSIONS))
def test_any_text_is_read_or_refused_in_words(text: str, dimension: Dimension) -> None:
    try:
        value: float = parse_quantity(text, dimension)
    except ValueError as error:
        assert "it must be" in str(error)
    else:
        assert math.isfinite(value)
        assert value >= 0
