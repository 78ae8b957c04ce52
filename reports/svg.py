"""One look for every figure, and clean inline SVG out of matplotlib: the same input, same bytes.

Colours of lines and text are CSS variables with a fallback, so that a page can turn a figure dark;
colours of data are fixed. Text stays text, in the fonts of the reader's system.
"""

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

KIND_COLOURS = {
    "forward": "#8db8dd",
    "backward": "#2a6299",
    "send": "#f0b441",
    "all_reduce": "#c4552d",
    "all_gather": "#d9824a",
    "reduce_scatter": "#8f3f22",
    "all_to_all": "#e2a27c",
    "push": "#9a7a1f",
    "pull": "#d8c06a",
    "optimizer": "#3f9b78",
    "data": "#b87fae",
    "other": "#8c8984",
    "wait": "#cfc8ba",
    "idle": "#e3dfd6",
}
"""Blues compute, warm colours communicate; told apart by lightness too, for grey print."""

MEMORY_COLOURS = {
    "parameters": "#2a6299",
    "gradients": "#8db8dd",
    "optimizer": "#3f9b78",
    "buffers": "#8f3f22",
    "activations": "#f0b441",
    "temporary": "#c4552d",
    "update": "#b87fae",
    "reserve": "#cfc8ba",
    "context": "#8c8984",
}
"""What a rank's memory holds, in the order in which the parts of a plan lie on each other."""

PART_COLOURS = {
    "peak": KIND_COLOURS["backward"],
    "recompute": "#5d8dbc",
    "kernels": KIND_COLOURS["forward"],
    "work": KIND_COLOURS["backward"],
    "exchange": KIND_COLOURS["all_gather"],
    "pipeline": KIND_COLOURS["send"],
    "reduction": KIND_COLOURS["all_reduce"],
    "optimizer": KIND_COLOURS["optimizer"],
    "host": KIND_COLOURS["other"],
}
"""What a step is lost to, part by part: as the kinds of time that it is."""

PREDICTED, MEASURED, LIMIT, LABEL_DARK = "#2a6299", "#c4552d", "#9b1c31", "#16324a"
PAPER, INK, FAINT, RULE, BAND = "#fdfdfc", "#22211f", "#6b6862", "#d8d4ca", "#d9e5f0"
WIDTH = 760
_BOX = re.compile(r"M (\S+) (\S+)\s+L (\S+) \2\s+L \3 (\S+)\s+L \1 \4\s+(?:L \1 \2\s+)?z ?\n?")

_THEMED = {PAPER: "paper", INK: "ink", FAINT: "faint", RULE: "rule", BAND: "band",
           KIND_COLOURS["idle"]: "idle", PREDICTED: "predicted", LIMIT: "limit"}  # fmt: skip
_FONT = "'Helvetica Neue', 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "layline",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": FAINT,
    "axes.labelsize": 11,
    "axes.edgecolor": RULE,
    "axes.linewidth": 1,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.solid_capstyle": "butt",
    "path.simplify": False,
}


class Sheet:
    """An empty figure of the page's width and `height` px; drawn on inside a `with` block.

    Entering gives the figure; `svg` is the text, ready once the block has ended. `name` prefixes
    the ids inside, which must differ between the figures of one page; `label` is read out to those
    who cannot see it.
    """

    def __init__(self, name: str, label: str, height: float) -> None:
        self.svg = ""
        self._name, self._label, self._height = name, label, height
        self._style = matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]

    def __enter__(self) -> Figure:
        """Return the figure; matplotlib's settings are ours until the block ends."""
        self._style.__enter__()
        figure = Figure(figsize=(WIDTH / 72, self._height / 72))
        FigureCanvasSVG(figure)
        self._figure = figure
        return figure

    def __exit__(self, *error: object) -> None:
        """Render the figure, unless drawing it failed."""
        try:
            if error[0] is None:
                buffer = io.StringIO()
                with warnings.catch_warnings():
                    # The reader's fonts draw the text: what ours lack does not matter.
                    warnings.filterwarnings("ignore", "Glyph .* missing from font")
                    self._figure.savefig(buffer, format="svg", metadata={"Date": None})
                self.svg = clean(buffer.getvalue(), self._name, self._label)
        finally:
            self._style.__exit__(None, None, None)


def clean(text: str, name: str, label: str) -> str:
    """Return matplotlib's SVG `text` as a small element that can stand inside a page.

    The prolog and the metadata, which name outside addresses, go; so does the style sheet, which
    would rule the whole page. Ids that nobody refers to go, the others get the prefix `name`.
    Coordinates keep a hundredth of a px, and boxes are written shorter.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*</defs>\s*", "", text)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(
        r' id="([^"]*)"', lambda at: f' id="{name}-{at[1]}"' if at[1] in used else "", text
    )
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", _FONT, text)
    text = re.sub(r"-?\d+\.\d{3,}", lambda at: f"{float(at[0]):.2f}", text)
    text = _BOX.sub(r"M\1 \2H\3V\4H\1z", text)
    for colour, variable in _THEMED.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    box = re.search(r'viewBox="[^"]*"', text)
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box[0] if box else ""} role="img" aria-label="{escape(label)}">'
    )
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    return re.sub(r"\n\s*", "\n", text).strip()


def legend(
    figure: Figure, entries: Iterable[tuple[str, str]], *, left: float, top_px: float = 6
) -> None:
    """Write one row of coloured squares with words, `entries` of (word, colour), from `left` px."""
    height_px = figure.get_size_inches()[1] * 72
    axes = figure.add_axes((0, 1 - (top_px + 14) / height_px, 1, 14 / height_px))
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(14, 0)
    for word, colour in entries:
        axes.add_patch(_square(left, colour))
        axes.text(left + 15, 7.2, word, va="center", fontsize=10.5, color=INK)
        left += 15 + 5.5 * len(word) + 20


def _square(left: float, colour: str) -> Rectangle:
    return Rectangle((left, 2), 10, 10, facecolor=colour, edgecolor="none")


def panel(figure: Figure, *, left: float, top: float, width: float, height: float) -> Axes:
    """Return axes at these px, counted from the upper left corner of the figure."""
    total = figure.get_size_inches()[1] * 72
    return figure.add_axes(
        (left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total)
    )


def time_unit(largest_ns: float) -> tuple[float, str]:
    """Return the unit for an axis that goes up to `largest_ns`: its length in ns and its name.

    >>> time_unit(3_200_000_000), time_unit(45_000_000)
    ((1000000000.0, 's'), (1000000.0, 'ms'))
    """
    for length, name in ((1e9, "s"), (1e6, "ms"), (1e3, "us")):
        if largest_ns >= 2 * length:
            return length, name
    return 1.0, "ns"


def add_boxes(
    axes: Axes,
    boxes: Sequence[tuple[float, float, float, float]],
    colour: str,
    *,
    gap: float = 0.6,
) -> None:
    """Draw all boxes (x, y, width, height) as one path: a hundredth of the bytes of patches."""
    vertices: list[tuple[float, float]] = []
    for x, y, width, height in boxes:
        corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
        vertices += corners
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
    axes.add_patch(
        PathPatch(
            Path(vertices, codes),
            facecolor=colour,
            edgecolor=PAPER if gap else "none",
            linewidth=gap,
            clip_on=False,
            zorder=2,
        )
    )
