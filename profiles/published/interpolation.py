"""How well a profile's interpolation foretells products of GPUs that were published.

    python -m profiles.published.interpolation FOLDER

reads kernels.csv of FOLDER and prints, for each GPU and dtype, the error at shapes that were held
out: a quarter of them, four times over, each foretold from the other three quarters.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from profiles.lookup import kernel_works
from profiles.published.devices import MATMULS
from profiles.published.rows import matmul_rows
from profiles.surface import Shape, Surface

NUM_PARTS = 4


def held_out_errors(times_ns: Mapping[Shape, int]) -> list[float]:
    """Return the absolute relative errors of all shapes, each foretold without its quarter."""
    shapes, errors = sorted(times_ns), []
    for part in range(NUM_PARTS):
        known = {shape: times_ns[shape] for i, shape in enumerate(shapes) if i % NUM_PARTS != part}
        surface = Surface(known, partial(kernel_works, "linear_forward"))
        errors += [
            abs(surface.at(shape)[0] / times_ns[shape] - 1) for shape in shapes[part::NUM_PARTS]
        ]
    return errors


def main(arguments: Sequence[str]) -> None:
    """Print the table of all published products."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m profiles.published.interpolation FOLDER")
    print(f"{'GPU':15} {'dtype':5} {'shapes':>6} {'median':>7} {'P90':>7}")  # noqa: T201
    for gpu, source in MATMULS.items():
        for dtype in source.dtypes:
            rows = matmul_rows(Path(arguments[0]), source.name, dtype)
            times: dict[Shape, int] = {(row.m, row.n, row.k): max(1, round(row.ns)) for row in rows}
            errors = held_out_errors(times)
            print(  # noqa: T201
                f"{gpu:15} {dtype:5} {len(errors):>6} {100 * median(errors):>6.1f}% "
                f"{100 * float(np.quantile(errors, 0.9)):>6.1f}%"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
