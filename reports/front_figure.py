"""The front as a figure: what one objective gains, and what that costs in another."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from reports.certificate import OBJECTIVE_WORDS
from reports.svg import FAINT, INK, PAPER, PREDICTED, WIDTH, Sheet, panel, time_unit

MAX_NUMBERED = 12
"""Layouts of a front that bear their place; more would lie on each other."""
_HEIGHT, _LEFT, _GAP, _TOP = 240, 74, 84, 16


class Point(NamedTuple):
    """A layout of the ranking with its figures of the objectives."""

    place: int
    figures: tuple[float, ...]
    is_on_front: bool
    is_chosen: bool


def front_figure(name: str, objectives: Sequence[str], points: Sequence[Point]) -> str:
    """Return the first objective over each other one, the layouts on the front filled.

    The figures are in base units: seconds, bytes, and otherwise as the objective is named.
    """
    others = range(1, len(objectives))
    width = (WIDTH - _LEFT - 18 - _GAP * (len(others) - 1)) / len(others)
    sheet = Sheet(name, "Layouts by the objectives of the job", _TOP + _HEIGHT + 46)
    scales = [_scale(each, [p.figures[i] for p in points]) for i, each in enumerate(objectives)]
    with sheet as figure:
        for number, other in enumerate(others):
            left = _LEFT + number * (width + _GAP)
            axes = panel(figure, left=left, top=_TOP, width=width, height=_HEIGHT)
            across, up = scales[other], scales[0]
            _draw(axes, [
                (point, point.figures[other] / across.unit, point.figures[0] / up.unit)
                for point in points
            ], joins=len(others) == 1)  # fmt: skip
            axes.set_xlabel(across.label)
            axes.set_ylabel(up.label if number == 0 else "")
    return sheet.svg


class _Scale(NamedTuple):
    """The unit of an axis in base units, and what is written beside it."""

    unit: float
    label: str


def _scale(objective: str, values: Sequence[float]) -> _Scale:
    if objective == "step_time":
        unit_ns, unit = time_unit(1e9 * max(values))
        return _Scale(unit_ns / 1e9, f"step time [{unit}]")
    found = _SCALES[objective](max(values))
    return _Scale(found[0], f"{_NAMES.get(objective, OBJECTIVE_WORDS[objective])} [{found[1]}]")


_NAMES: Mapping[str, str] = {"memory_headroom": "free on the fullest rank"}


def _rate(most: float) -> tuple[float, str]:
    return (1e3, "1,000 tokens/s") if most >= 1e4 else (1.0, "tokens/s")


_SCALES: Mapping[str, Callable[[float], tuple[float, str]]] = {
    "tokens_per_s": _rate,
    "dollars_per_mtoken": lambda most: (1.0, "$ a million") if most > 2 else (0.01, "ct a million"),
    "joules_per_token": lambda _most: (1.0, "J"),
    "memory_headroom": lambda most: (2.0**30, "GiB") if most >= 2**30 else (2.0**20, "MiB"),
    "goodput": _rate,
}


def _draw(axes: Axes, points: Sequence[tuple[Point, float, float]], *, joins: bool) -> None:
    """Draw the layouts, those on the front with their places; `joins` draws a line from each."""
    rest = [(x, y) for point, x, y in points if not point.is_on_front]
    axes.plot([x for x, _ in rest], [y for _, y in rest], "o", markersize=4, color=FAINT,
              markerfacecolor=PAPER, markeredgewidth=1)  # fmt: skip
    front = sorted(((x, y, point) for point, x, y in points if point.is_on_front))
    if joins:  # seen from one side, a front in space is no line
        axes.plot([x for x, *_ in front], [y for _, y, _ in front], "-", color=PREDICTED)
    every = -(-len(front) // MAX_NUMBERED)
    for number, (x, y, point) in enumerate(front):
        axes.plot([x], [y], "o", markersize=9 if point.is_chosen else 6.5, color=PREDICTED,
                  markeredgecolor=INK if point.is_chosen else PAPER)  # fmt: skip
        if number % every == 0 or point.is_chosen:
            axes.annotate(str(point.place), (x, y), xytext=(6, 6), textcoords="offset points",
                          fontsize=10.5, color=INK)  # fmt: skip
    axes.grid(True)
    axes.tick_params(length=0, labelcolor=FAINT)
    axes.margins(0.08)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
