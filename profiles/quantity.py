"""Quantities with units: read from the text that people write, rendered for the text they read."""

import math
import re
from collections.abc import Mapping
from typing import Literal, overload

IntDimension = Literal["bytes", "ns", "tokens"]
FloatDimension = Literal["bytes/s", "flop/s", "watts"]
Dimension = IntDimension | FloatDimension

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}


def _prefixed(unit: str, scale: float = 1.0, prefixes: Mapping[str, float] = _DECIMAL,
              ) -> dict[str, float]:  # fmt: skip
    return {prefix + unit: factor * scale for prefix, factor in prefixes.items()}


_BITS_AND_BYTES = _prefixed("B") | _prefixed("B", 1.0, _BINARY)
_UNITS: dict[Dimension, dict[str, float]] = {
    "bytes": _BITS_AND_BYTES,
    "bytes/s": _prefixed("B/s") | _prefixed("B/s", 1.0, _BINARY) | _prefixed("b/s", 1 / 8),
    "ns": {"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9, "min": 60e9, "h": 3600e9, "d": 86400e9},
    "flop/s": _prefixed("FLOP/s"),
    "tokens": _prefixed("tokens"),
    "watts": {"W": 1.0, "kW": 1e3, "MW": 1e6},
}
_EXAMPLES: dict[Dimension, str] = {
    "bytes": "80 GiB",
    "bytes/s": "400 Gb/s",
    "ns": "4 us",
    "flop/s": "989 TFLOP/s",
    "tokens": "1.5 Ttokens",
    "watts": "700 W",
}
_KINDS: dict[Dimension, str] = {
    "bytes": "a size",
    "bytes/s": "a rate",
    "ns": "a time",
    "flop/s": "a compute rate",
    "tokens": "a number of tokens",
    "watts": "a power",
}
_INTEGER: tuple[Dimension, ...] = ("bytes", "ns", "tokens")
_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?) ?([A-Za-z]+(?:/s)?)", re.A)
# Above this a float no longer counts single units, and an int64 engine would overflow.
_LARGEST_INTEGER = 2**63 - 1


def quantity_rule(dimension: Dimension) -> str:
    """Return what a `dimension` must be, as the tail of an error.

    >>> quantity_rule("ns")
    'must be a time as text with its unit (ns, us, ms, s, min, h, d)'
    """
    units = _UNITS[dimension]
    if dimension in ("bytes", "bytes/s"):
        names = "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
        if dimension == "bytes/s":
            names = "GB/s, GiB/s, TB/s in bytes, Mb/s, Gb/s, Tb/s in bits"
    elif dimension == "ns":
        names = ", ".join(units)
    else:
        names = ", ".join(list(units)[:6])
    return f"must be {_KINDS[dimension]} as text with its unit ({names})"


def quantity_example(dimension: Dimension) -> str:
    """Return a quantity of `dimension` as a person would write it.

    >>> quantity_example("bytes/s")
    '400 Gb/s'
    """
    return _EXAMPLES[dimension]


@overload
def parse_quantity(text: object, dimension: IntDimension) -> int: ...
@overload
def parse_quantity(text: object, dimension: FloatDimension) -> float: ...
def parse_quantity(text: object, dimension: Dimension) -> int | float:
    """Return the quantity in `text`: bytes, ns and tokens as int, rates and watts as float.

    B is byte, b is bit, G is 10^9, Gi is 2^30. Raises ValueError for a bare number, a number that
    is no text, a negative or endless one, and a unit of another dimension; the message says what
    was found, what is needed, and gives an example.

    >>> parse_quantity("400 Gb/s", "bytes/s")
    50000000000.0
    >>> parse_quantity("80 GiB", "bytes") == 80 * 2**30
    True
    >>> parse_quantity("80", "bytes")
    Traceback (most recent call last):
    ...
    ValueError: '80' has no unit; it must be a size as text with its unit (B, kB, MB, GB, TB, \
KiB, MiB, GiB, TiB); for example "80 GiB"
    """
    if not isinstance(text, str):
        raise _error(f"{str(text)[:60]} is {_type_name(text)}, not text", dimension)
    shown = repr(text if len(text) <= 60 else text[:57] + "...")
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise _error(f"{shown} {_complaint(text)}", dimension)
    number, unit = match.groups()
    if unit not in _UNITS[dimension]:
        raise _error(f"{shown} has the unit {unit!r}{_owner(unit)}", dimension)
    value = float(number) * _UNITS[dimension][unit]
    if not math.isfinite(value):
        raise _error(f"{shown} is too large", dimension)
    if dimension not in _INTEGER:
        return value
    if value > _LARGEST_INTEGER:
        raise _error(f"{shown} is too large", dimension)
    # An integer times an integer factor stays exact; only fractions go through a float.
    factor = _UNITS[dimension][unit]
    whole = int(number) * int(factor) if number.isdigit() else round(value)
    if whole == 0 and float(number) > 0:
        raise _error(f"{shown} is less than one {_singular(dimension)}", dimension)
    return whole


def _error(found: str, dimension: Dimension) -> ValueError:
    return ValueError(
        f'{found}; it {quantity_rule(dimension)}; for example "{_EXAMPLES[dimension]}"'
    )


def _type_name(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a bare number"
    return f"a value of type {type(value).__name__}"


def _complaint(text: str) -> str:
    bare = text.strip().lower()
    if not bare:
        return "is empty"
    if bare.startswith("-"):
        return "is negative"
    if bare.lstrip("+").startswith(("nan", "inf")):
        return "is not a finite number"
    try:
        float(bare)
    except ValueError:
        return "is not a number and a unit"
    return "has no unit"


def _owner(unit: str) -> str:
    for dimension, units in _UNITS.items():
        if unit in units:
            return f", which is {_KINDS[dimension]}"
    return ""


def _singular(dimension: Dimension) -> str:
    return {"bytes": "byte", "ns": "ns", "tokens": "token"}.get(dimension, dimension)


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """Return `value` in the largest unit that leaves at least 1 of it after rounding."""
    for factor, unit in steps:
        if round(value / factor, 3) >= 1:
            return value / factor, unit
    return value / steps[-1][0], steps[-1][1]


_STEPS: dict[Dimension, tuple[tuple[float, str], ...]] = {
    "bytes": ((2.0**50, "PiB"), (2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"),
              (2.0**10, "KiB"), (1.0, "B")),
    "bytes/s": ((1e15, "PB/s"), (1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"),
                (1.0, "B/s")),
    "ns": ((86400e9, "d"), (3600e9, "h"), (1e9, "s"), (1e6, "ms"), (1e3, "us"), (1.0, "ns")),
    "flop/s": ((1e18, "EFLOP/s"), (1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"),
               (1e6, "MFLOP/s"), (1.0, "FLOP/s")),
    "tokens": ((1e12, "Ttokens"), (1e9, "Gtokens"), (1e6, "Mtokens"), (1e3, "ktokens"),
               (1.0, "tokens")),
    "watts": ((1e6, "MW"), (1e3, "kW"), (1.0, "W")),
}  # fmt: skip


def format_quantity(value: float, dimension: Dimension) -> str:
    """Return `value` for a person: three to four digits and a unit.

    Sizes use binary prefixes, all else decimal ones. Seconds carry three decimals, and whole
    bytes, ns and tokens none. Raises ValueError for NaN and infinities.

    >>> format_quantity(76_557_790_413, "bytes"), format_quantity(1_284_000_000, "ns")
    ('71.3 GiB', '1.284 s')
    >>> format_quantity(12_300_000, "ns"), format_quantity(4_000, "ns")
    ('12.3 ms', '4.0 us')
    >>> format_quantity(50e9, "bytes/s"), format_quantity(989e12, "flop/s")
    ('50.0 GB/s', '989.0 TFLOP/s')
    """
    if not math.isfinite(value):
        raise ValueError(f"{value} {dimension} is not finite; only a finite quantity has a text")
    sign, size = ("-" if value < 0 else ""), abs(value)
    number, unit = _scaled(size, _STEPS[dimension])
    if unit in ("B", "ns", "tokens"):
        return f"{sign}{round(number):,} {unit}"
    digits = 3 if unit == "s" and number < 100 else 1
    return f"{sign}{number:,.{digits}f} {unit}"
