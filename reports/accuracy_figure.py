"""Measured against predicted steps of published runs, as a figure."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.svg import BAND, FAINT, INK, PREDICTED, WIDTH, Sheet, add_boxes, panel
from reports.validation import Outcome, Scored, by_group

_COLUMNS, _PANEL, _GAP, _LEFT, _TOP = 4, 144, 40, 44, 30


def accuracy_figure(outcomes: Sequence[Outcome]) -> str:
    """Return a figure as SVG: measured against predicted step, a panel a group, both log axes.

    The line is where both are equal, the band 15 % to either side.
    """
    groups = {
        name: [one for one in group if isinstance(one, Scored) and one.run.measured.step_ns]
        for name, group in by_group(outcomes).items()
    }
    drawn = {name: group for name, group in groups.items() if group}
    num_rows = max(1, math.ceil(len(drawn) / _COLUMNS))
    sheet = Sheet("accuracy", "Measured and predicted step time by group",
                  _TOP + num_rows * (_PANEL + _GAP) + 12)  # fmt: skip
    with sheet as figure:
        for place, (name, group) in enumerate(drawn.items()):
            _draw_group(figure, place, name[:24], group)
        figure.text(0.5, 0.008, "measured step [s]", ha="center", fontsize=10.5, color=FAINT)
        figure.text(0.004, 0.5, "predicted step [s]", va="center", rotation=90, fontsize=10.5,
                    color=FAINT)  # fmt: skip
    return sheet.svg


def _draw_group(figure: Figure, place: int, name: str, group: Sequence[Scored]) -> None:
    row, column = divmod(place, _COLUMNS)
    step = (WIDTH - _LEFT - 10) / _COLUMNS
    axes = panel(figure, left=_LEFT + column * step, top=_TOP + row * (_PANEL + _GAP),
                 width=_PANEL, height=_PANEL)  # fmt: skip
    points = [
        (math.log10(one.run.measured.step_ns / 1e9),
         math.log10(max(one.prediction.step.p50_ns, 1) / 1e9))
        for one in group
    ]  # fmt: skip
    low = min(min(point) for point in points) - 0.15
    high = max(max(point) for point in points) + 0.15
    off = math.log10(1.15)
    axes.fill_between([low, high], [low - off, high - off], [low + off, high + off],
                      color=BAND, linewidth=0)  # fmt: skip
    axes.plot([low, high], [low, high], color=FAINT, linewidth=0.8)
    size = (high - low) / 70
    add_boxes(axes, [(x - size / 2, y - size / 2, size, size) for x, y in points], PREDICTED, gap=0)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    _decades(axes, low, high)
    axes.set_title(f"{name}  ({len(group)})", fontsize=10.5, color=INK, loc="left", pad=4)


def _decades(axes: Axes, low: float, high: float) -> None:
    """Mark the decades, or where there are less than two also their halves and fifths."""
    for steps in ((1,), (1, 2, 5), (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)):
        marks = [
            power + math.log10(step)
            for power in range(math.floor(low), math.ceil(high))
            for step in steps
            if low <= power + math.log10(step) <= high
        ]
        if len(marks) > 1:
            break
    labels = [f"{10**mark:.3g}" for mark in marks]
    axes.set_xticks(marks, labels)
    axes.set_yticks(marks, labels)
