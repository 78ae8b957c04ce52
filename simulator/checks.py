"""Whole numbers: times and sizes are refused before any engine runs, with the place named."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

MAX_NS = 1 << 56
"""The longest single time, over two years, and the largest size; sums of many stay in int64."""


def whole_numbers(
    values: npt.ArrayLike, count: int, name_of: Callable[[int], str], verb: str, unit: str
) -> Int64:
    """Return `values` as int64 [count]; a single number stands for all.

    Raises ValueError for a wrong count and for a value that is not whole, negative, not finite or
    above `MAX_NS`; `name_of` names the place. A bool is an int and a NaN compares false: both
    would slip through a bare `< 0`.
    """
    array = np.asarray(values)
    if array.ndim and array.shape != (count,):
        raise ValueError(f"{array.size} numbers where {count} are due")
    array = np.broadcast_to(array, (count,))
    if array.dtype.kind in "iu":
        good = (array >= 0) & (array <= MAX_NS)
    elif array.dtype.kind == "f":
        good = np.isfinite(array) & (array >= 0) & (array <= MAX_NS) & (array == np.floor(array))
    else:
        good = np.array([type(v) is int and 0 <= v <= MAX_NS for v in array.tolist()], np.bool_)
    if not good.all():
        place = int(np.argmin(good))
        found = array[place].item() if hasattr(array[place], "item") else array[place]
        raise ValueError(
            f"{name_of(place)} {verb} {found!r} {unit}; "
            f"it must be a whole number from 0 to {MAX_NS}"
        )
    return np.array(array, np.int64)
