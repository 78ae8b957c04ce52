"""What the figures of a profile share: families of ops with their marks, legends, log axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from profiles.profile import CollectiveSample
from profiles.validity import Sample
from reports.svg import FAINT, INK, PAPER, WIDTH, add_boxes, panel
from reports.words import size

Place = tuple[float, float]


class Family(NamedTuple):
    """Ops that are drawn alike: what they are called, and their mark."""

    word: str
    colour: str
    marker: str


_LINEAR = Family("linears", "#2a6299", "o")
_ATTENTION = Family("attention", "#c4552d", "s")
_NORM = Family("norms", "#3f9b78", "^")
_ELEMENTWISE = Family("RoPE, SwiGLU, sums", "#f0b441", "D")
_LOSS = Family("cross-entropy", "#b87fae", "v")
_LOOKUP = Family("embedding", "#8f3f22", "P")
_OPTIMIZER = Family("optimizer", "#8c8984", "X")
_COPY = Family("copies", "#5bb5c4", "<")
_LAYER = Family("whole layers", "#7a6cb0", "*")
_EXCHANGE = Family("collectives", "#d9824a", ">")
FAMILIES = (_LINEAR, _ATTENTION, _NORM, _ELEMENTWISE, _LOSS, _LOOKUP, _OPTIMIZER, _COPY, _LAYER,
            _EXCHANGE)  # fmt: skip
"""In the order of every legend; told apart by shape too, for grey print."""

_OF_OP = {
    "linear": _LINEAR, "attention": _ATTENTION, "norm": _NORM, "rope": _ELEMENTWISE,
    "swiglu": _ELEMENTWISE, "add": _ELEMENTWISE, "cross": _LOSS, "embedding": _LOOKUP,
    "adamw": _OPTIMIZER, "clip": _OPTIMIZER, "layer": _LAYER,
}  # fmt: skip


def family(sample: Sample) -> Family:
    """Return what `sample` is drawn as."""
    if isinstance(sample, CollectiveSample):
        return _EXCHANGE
    return _OF_OP.get(sample.op.split("_")[0], _COPY)


def plot_families(axes: Axes, places: Mapping[Family, Sequence[Place]]) -> None:
    """Draw the places of each family with its mark, the family of the most below the others."""
    count = sum(map(len, places.values()))
    px = 4.2 if count < 400 else 3.2
    for each in sorted(places, key=lambda each: (-len(places[each]), each)):
        xs, ys = zip(*places[each], strict=True)
        axes.plot(xs, ys, each.marker, markersize=px, color=each.colour, linestyle="none",
                  markeredgecolor=PAPER, markeredgewidth=0.4, zorder=2)  # fmt: skip


def squares(axes: Axes, places: Sequence[Place], colour: str, px: float) -> None:
    """Draw `places` as squares of `px` px, as one path; the limits of `axes` must be set."""
    if not places:
        return
    half = px / 2 * axes.figure.dpi / 72
    to_px, from_px = axes.transData, axes.transData.inverted()
    low = from_px.transform(to_px.transform(places) - half)
    high = from_px.transform(to_px.transform(places) + half)
    boxes = [(x, y, right - x, top - y) for (x, y), (right, top) in zip(low, high, strict=True)]
    add_boxes(axes, boxes, colour, gap=0)


def dress(
    axes: Axes, title: str, xlabel: str, ylabel: str, formatter: Callable[[float], str]
) -> None:
    """Give both axes logarithms, quiet ticks and words."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 40 else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatter(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(axis="both")
    axes.tick_params(length=0, labelcolor=FAINT)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)


def size_axis(axes: Axes, samples: Sequence[CollectiveSample]) -> None:
    """Mark sizes in powers of 32."""
    sizes = [sample.size_bytes for sample in samples]
    marks = [1 << power for power in range(0, 60, 5) if min(sizes) <= 1 << power <= max(sizes)]
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
    if len(marks) > 1:
        axes.set_xticks(marks, [size(mark).replace(".0", "") for mark in marks])


def time_axis(axes: Axes, *, narrow: bool = False) -> None:
    """Write times with their units; on a narrow axis every second decade."""
    axes.xaxis.set_major_locator(LogLocator(base=100 if narrow else 10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _time(value)))


def _time(value_ns: float) -> str:
    for length, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "us")):
        if value_ns >= length * 0.999:
            return f"{value_ns / length:,.3g} {unit}"
    return f"{value_ns:,.3g} ns"


def flops_text(value: float) -> str:
    """Return a rate of arithmetic in few digits."""
    return f"{_scaled(value)}FLOP/s"


def bytes_text(value: float) -> str:
    """Return a rate of transfer in few digits."""
    return f"{_scaled(value)}B/s" if value else "0"


def _scaled(value: float) -> str:
    for length, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= length * 0.999:
            return f"{value / length:,.3g} {unit}"
    return f"{value:,.3g} "


def percent_text(value: float) -> str:
    """Return a share in percent, in few digits."""
    return f"{100 * value:,.3g} %"


def legend_px(entries: Sequence[Family]) -> int:
    """Return the height of the legend of `entries`."""
    return 18 * len(_legend_rows(entries))


def _legend_rows(entries: Sequence[Family]) -> list[list[tuple[float, Family]]]:
    """Return the entries with their places in px from the left, in rows that fit the page."""
    rows: list[list[tuple[float, Family]]] = [[]]
    at = 0.0
    for each in entries:
        width = 16 + 5.6 * len(each.word) + 14
        if rows[-1] and at + width > WIDTH - 60:
            rows.append([])
            at = 0.0
        rows[-1].append((at, each))
        at += width
    return rows


def family_legend(figure: Figure, entries: Sequence[Family], *, left: float) -> None:
    """Write marks with words at the top of `figure`, from `left` px, in as many rows as needed."""
    rows = _legend_rows(entries)
    axes = panel(figure, left=0, top=4, width=WIDTH, height=18 * len(rows))
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(18 * len(rows), 0)
    for number, row in enumerate(rows):
        for at, each in row:
            axes.plot([left + at + 5], [18 * number + 9], each.marker, color=each.colour,
                      markersize=7, markeredgewidth=0)  # fmt: skip
            axes.text(left + at + 16, 18 * number + 9.4, each.word, va="center", fontsize=10.5,
                      color=INK)  # fmt: skip
