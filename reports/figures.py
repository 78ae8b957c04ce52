"""The figures of a report, each an SVG element as text: same input, same bytes, nothing outside.

Every figure takes values and returns text. Times are in ns and sizes in bytes; axes choose a unit.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from planner.layout import Layout
from planner.plan import Plan
from planner.record import RunRecord
from reports.compare import Comparison
from reports.svg import (
    BAND,
    FAINT,
    INK,
    KIND_COLOURS,
    LABEL_DARK,
    LIMIT,
    MEASURED,
    MEMORY_COLOURS,
    PAPER,
    PREDICTED,
    RULE,
    WIDTH,
    Sheet,
    legend,
    panel,
    time_unit,
)
from reports.words import KIND_NAMES, duration, size
from simulator.timeline import Span, Timeline

MAX_ROWS = 16
"""Above this many ranks a figure shows one rank a pipeline stage."""
_ROW, _RIGHT, _LONGEST_LABEL = 26, 18, 56
_MICROBATCH = re.compile(r"\d+[FBIW](\d+)")


def shown_ranks(layout: Layout) -> tuple[int, ...]:
    """Return the ranks that figures and tables show: all, or the first of each pipeline stage."""
    if layout.num_ranks <= MAX_ROWS:
        return tuple(range(layout.num_ranks))
    return tuple(stage * layout.dp * layout.tp for stage in range(layout.pp))[:MAX_ROWS]


def gantt(name: str, layout: Layout, predicted: Timeline, measured: Timeline | None) -> str:
    """Return one step, predicted above measured on one time axis, a row a stage or rank."""
    parts = [("Predicted", predicted, tuple(range(layout.pp))[:MAX_ROWS], "stage")]
    if measured is not None:
        parts.append(("Measured", measured, shown_ranks(layout), "rank"))
    heights = [len(ranks) * _ROW for _, _, ranks, _ in parts]
    left, gap, top = 62, 30, 54
    end_ns = max(max(line.makespan_ns for _, line, _, _ in parts), 1)
    unit_ns, unit = time_unit(end_ns)
    used = {span.kind for _, line, _, _ in parts for span in line.spans}
    sheet = Sheet(name, "Gantt chart of one step", top + sum(heights) + gap * len(parts) + 12)
    with sheet as figure:
        entries = [(KIND_NAMES[kind], KIND_COLOURS[kind]) for kind in KIND_NAMES if kind in used]
        legend(figure, entries, left=left)
        for number, ((title, line, ranks, noun), height) in enumerate(
            zip(parts, heights, strict=True), start=1
        ):
            axes = panel(figure, left=left, top=top, width=WIDTH - left - _RIGHT, height=height)
            axes.set_xlim(0, 1.04 * end_ns / unit_ns)
            axes.set_ylim(len(ranks) - 0.5, -0.5)
            axes.set_yticks(range(len(ranks)), [f"{noun} {rank}" for rank in ranks], color=FAINT)
            axes.tick_params(length=0, labelbottom=number == len(parts))
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
            axes.spines["bottom"].set_visible(False)
            text = f"{title}: {duration(line.makespan_ns)}, a row a {noun}"
            axes.set_title(text, loc="left", fontsize=11, color=INK, pad=6)
            _draw_rows(axes, line, ranks, end_ns, unit_ns)
            axes.axvline(line.makespan_ns / unit_ns, color=INK, linewidth=1.2)
            if number > 1:
                axes.axvline(predicted.makespan_ns / unit_ns, color=FAINT, linewidth=1,
                             linestyle=(0, (2, 2)), zorder=3)  # fmt: skip
            if number == len(parts):
                axes.set_xlabel(f"time in the step [{unit}]")
            top += height + gap
    return sheet.svg


def _draw_rows(
    axes: Axes, line: Timeline, ranks: Sequence[int], end_ns: int, unit_ns: float
) -> None:
    """Draw each rank's spans in its row, the compute stream wide and the others below it."""
    px_ns = end_ns / (WIDTH - 100)
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for row, rank in enumerate(ranks):
        spans = [span for span in line.spans if span.rank == rank]
        streams = sorted(
            {span.stream for span in spans}, key=lambda name: (name != "compute", name)
        )
        edges = [-0.4, 0.4] if len(streams) < 2 else [-0.4, 0.22]
        edges += [0.22 + 0.2 * (i + 1) / (len(streams) - 1) for i in range(len(streams) - 1)]
        for stream, low, high in zip(streams, edges, edges[1:], strict=False):
            own = [span for span in spans if span.stream == stream]
            for kind, start_ns, stop_ns in _merged(own, px_ns):
                box = (start_ns / unit_ns, row + low, (stop_ns - start_ns) / unit_ns, high - low)
                boxes.setdefault(kind, []).append(box)
            if high - low > 0.4:
                _label_microbatches(axes, own, row + (low + high) / 2, px_ns, unit_ns)
    # Gaps between boxes of a few pixels would bleach them.
    widths = sorted(box[2] for row in boxes.values() for box in row)
    is_dense = bool(widths) and widths[len(widths) // 2] * unit_ns < 5 * px_ns
    for kind in KIND_NAMES:
        if kind in boxes:
            _add_boxes(axes, boxes[kind], KIND_COLOURS[kind], gap=0 if is_dense else 0.6)


def _merged(spans: Iterable[Span], px_ns: float) -> list[tuple[str, int, int]]:
    """Return (kind, start, end); neighbours of a kind under half a pixel apart become one box."""
    merged: list[tuple[str, int, int]] = []
    for span in spans:
        if merged and span.duration_ns < 2 * px_ns:
            kind, start_ns, end_ns = merged[-1]
            if kind == span.kind and 0 <= span.start_ns - end_ns < px_ns / 2:
                merged[-1] = (kind, start_ns, max(end_ns, span.end_ns))
                continue
        merged.append((span.kind, span.start_ns, span.end_ns))
    return merged


def _label_microbatches(
    axes: Axes, spans: Iterable[Span], y: float, px_ns: float, unit_ns: float
) -> None:
    for span in spans:
        found = _MICROBATCH.fullmatch(span.name)
        if found and span.duration_ns / px_ns >= 6 * len(found[1]) + 5:
            axes.text(
                (span.start_ns + span.end_ns) / 2 / unit_ns,
                y,
                found[1],
                ha="center",
                va="center_baseline",
                fontsize=9.5,
                color=LABEL_DARK if span.kind == "forward" else "#ffffff",
            )


def _add_boxes(
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


def _bar_axes(axes: Axes, labels: Sequence[str], positions: Sequence[float]) -> None:
    axes.set_ylim(max(positions) + 0.6, -0.6)
    axes.set_yticks(list(positions), labels)
    axes.tick_params(length=0)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=False))


def kind_bars(name: str, comparison: Comparison, ranks: Sequence[int]) -> str:
    """Return what a step is made of, per rank a predicted bar over a measured one."""
    unit_ns, unit = time_unit(max(comparison.predicted_ns, comparison.measured_ns))
    chosen = [comparison.ranks[rank] for rank in ranks]
    times = [time for rank in chosen for time in rank.kinds]
    used = [
        k for k in KIND_NAMES if any(t.kind == k and t.predicted_ns + t.measured_ns for t in times)
    ]
    left, top, height = 150, 34, 46 * len(chosen)
    sheet = Sheet(name, "Time by kind and rank, predicted and measured", top + height + 44)
    with sheet as figure:
        legend(figure, [(KIND_NAMES[kind], KIND_COLOURS[kind]) for kind in used], left=left)
        axes = panel(figure, left=left, top=top, width=WIDTH - left - _RIGHT, height=height)
        boxes: dict[str, list[tuple[float, float, float, float]]] = {}
        labels: list[str] = []
        positions: list[float] = []
        for row, rank in enumerate(chosen):
            labels += [f"rank {rank.rank}  predicted", "measured"]
            positions += [2.5 * row, 2.5 * row + 1]
            ends = [0.0, 0.0]
            for time in rank.kinds:
                for side, time_ns in enumerate((time.predicted_ns, time.measured_ns)):
                    width = time_ns / unit_ns
                    box = (ends[side], positions[2 * row + side] - 0.42, width, 0.84)
                    boxes.setdefault(time.kind, []).append(box)
                    ends[side] += width
        for kind in used:
            _add_boxes(axes, boxes[kind], KIND_COLOURS[kind])
        axes.set_xlim(0, 1.02 * max(x + width for row in boxes.values() for x, _, width, _ in row))
        _bar_axes(axes, labels, positions)
        axes.set_xlabel(f"time in a step [{unit}]")
    return sheet.svg


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One rank or stage: predicted parts in bytes, and the measured peak, or -1 without a run."""

    label: str
    parts: tuple[tuple[str, int], ...]
    measured_bytes: int


def memory_rows(plan: Plan, record: RunRecord | None) -> tuple[MemoryRow, ...]:
    """Return a row a shown rank of the run, or a row a stage where there is none."""
    layout = plan.layout
    if record is None:
        places = [(f"stage {stage}", stage, -1) for stage in range(layout.pp)]
    else:
        places = [
            (f"rank {rank}", layout.place(rank).pp, record.memory[rank].peak_bytes)
            for rank in shown_ranks(layout)
        ]
    return tuple(
        MemoryRow(
            label=label,
            parts=tuple((part, getattr(plan.memory[stage], part)) for part in MEMORY_COLOURS),
            measured_bytes=peak,
        )
        for label, stage, peak in places
    )


def _most_bytes(rows: Sequence[MemoryRow]) -> int:
    totals = [sum(part_bytes for _, part_bytes in row.parts) for row in rows]
    return max(1, *totals, *(row.measured_bytes for row in rows))


def shows_limit(rows: Sequence[MemoryRow], limit_bytes: int) -> bool:
    """Return whether `memory_bars` draws the limit; far off, it would squeeze all bars."""
    return limit_bytes <= 4 * _most_bytes(rows)


def memory_bars(name: str, rows: Sequence[MemoryRow], limit_bytes: int) -> str:
    """Return predicted memory in parts, the measured peak below it, and the limit as a line."""
    most = _most_bytes(rows)
    has_limit = shows_limit(rows, limit_bytes)
    unit_bytes, unit = (2.0**30, "GiB") if most >= 2**30 else (2.0**20, "MiB")
    end = max(most, limit_bytes if has_limit else 0) / unit_bytes
    has_measured = any(row.measured_bytes >= 0 for row in rows)
    left, top, height = 80, 44, (36 if has_measured else 30) * len(rows)
    sheet = Sheet(name, "Memory per rank", top + height + 44)
    with sheet as figure:
        entries = [*MEMORY_COLOURS.items(), *([("measured peak", INK)] if has_measured else [])]
        legend(figure, entries, left=left)
        axes = panel(figure, left=left, top=top, width=WIDTH - left - _RIGHT, height=height)
        for part, colour in MEMORY_COLOURS.items():
            boxes = []
            for y, row in enumerate(rows):
                names = [part_name for part_name, _ in row.parts]
                start = sum(n for _, n in row.parts[: names.index(part)]) / unit_bytes
                width = dict(row.parts)[part] / unit_bytes
                boxes.append((start, y - 0.38, width, 0.52 if has_measured else 0.76))
            _add_boxes(axes, boxes, colour)
        peaks = [
            (0.0, y + 0.19, row.measured_bytes / unit_bytes, 0.14)
            for y, row in enumerate(rows)
            if row.measured_bytes >= 0
        ]
        if peaks:
            _add_boxes(axes, peaks, INK)
        axes.set_xlim(0, 1.03 * end)
        _bar_axes(axes, [row.label for row in rows], range(len(rows)))
        if has_limit:
            axes.axvline(limit_bytes / unit_bytes, color=LIMIT, linewidth=1.5, zorder=3)
            axes.annotate(f"limit {size(limit_bytes)}", (limit_bytes / unit_bytes, 1),
                          xycoords=("data", "axes fraction"), xytext=(0, 4), ha="right",
                          textcoords="offset points", fontsize=10.5, color=LIMIT)  # fmt: skip
        axes.set_xlabel(f"memory [{unit}]")
    return sheet.svg


def step_curves(name: str, comparison: Comparison, record: RunRecord) -> str:
    """Return the step times over the run in front of the predicted band, and the loss."""
    warm, timed = record.steps[: record.num_warmup], record.steps[record.num_warmup :]
    band = (comparison.predicted_p10_ns, comparison.predicted_p90_ns)
    values = [*band, *(step.step_ns for step in timed)]
    low, high = 0.94 * min(values), 1.06 * max(values)
    unit_ns, unit = time_unit(high)
    left, top, width, height = 56, 62, 298, 190
    sheet = Sheet(name, "Step time and loss over the run", top + height + 42)
    with sheet as figure:
        entries = [("predicted median", PREDICTED), ("predicted P10 to P90", BAND)]
        legend(figure, [*entries, ("measured", MEASURED), ("warm-up", FAINT)], left=left)
        axes = panel(figure, left=left, top=top, width=width, height=height)
        axes.axhspan(band[0] / unit_ns, band[1] / unit_ns, color=BAND, linewidth=0)
        axes.axhline(comparison.predicted_ns / unit_ns, color=PREDICTED, linewidth=1.5)
        axes.plot([step.step for step in timed], [step.step_ns / unit_ns for step in timed],
                  "o", markersize=4, color=MEASURED, markeredgewidth=0)  # fmt: skip
        shown = [(step.step, min(step.step_ns, high) / unit_ns, step.step_ns) for step in warm]
        for step, y, true_ns in shown:
            marker = "^" if true_ns > high else "o"
            axes.plot([step], [y], marker, markersize=5, color=FAINT, fillstyle="none",
                      markeredgewidth=1, clip_on=False)  # fmt: skip
        axes.set_ylim(low / unit_ns, high / unit_ns)
        axes.set_title(f"step time [{unit}]", loc="left", fontsize=11, color=INK, pad=12)
        losses = panel(figure, left=left + width + 62, top=top, width=width + 26, height=height)
        losses.plot([step.step for step in record.steps], [step.loss for step in record.steps],
                    "-", linewidth=1.8, color=INK)  # fmt: skip
        losses.set_title("loss [nats a token]", loc="left", fontsize=11, color=INK, pad=12)
        for each in (axes, losses):
            each.grid(axis="y")
            each.tick_params(length=0, labelcolor=FAINT)
            each.spines["left"].set_visible(False)
            each.set_xlabel("step")
            each.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            each.yaxis.set_major_locator(MaxNLocator(nbins=6))
    return sheet.svg


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalRow:
    """One layout or run: its predicted band, and the measured medians of its runs, all in ns."""

    label: str
    p10_ns: int
    p50_ns: int
    p90_ns: int
    is_extrapolated: bool
    is_chosen: bool
    measured_ns: tuple[int, ...]


def intervals(name: str, label: str, rows: Sequence[IntervalRow]) -> str:
    """Return step times of layouts or runs as predicted bands with their measured marks."""
    ends = [value for row in rows for value in (row.p10_ns, row.p90_ns, *row.measured_ns)]
    unit_ns, unit = time_unit(max(ends))
    labels = [_short(row.label) for row in rows]
    left, top, height = 40 + round(6.1 * max(map(len, labels))), 38, _ROW * len(rows)
    sheet = Sheet(name, label, top + height + 44)
    with sheet as figure:
        entries = [("predicted median and P10 to P90", PREDICTED)]
        if any(row.measured_ns for row in rows):
            entries.append(("measured median", MEASURED))
        legend(figure, entries, left=left)
        axes = panel(figure, left=left, top=top, width=WIDTH - left - _RIGHT, height=height)
        for y, row in enumerate(rows):
            if row.is_chosen:
                axes.axhspan(y - 0.5, y + 0.5, color=BAND, linewidth=0, zorder=0)
            axes.plot([row.p10_ns / unit_ns, row.p90_ns / unit_ns], [y, y], color=PREDICTED,
                      linewidth=2.5, zorder=2)  # fmt: skip
            axes.plot([row.p50_ns / unit_ns], [y], "o", markersize=7, color=PREDICTED,
                      markerfacecolor=PAPER if row.is_extrapolated else PREDICTED,
                      markeredgewidth=1.6, zorder=3)  # fmt: skip
            for time_ns in row.measured_ns:
                axes.plot([row.p50_ns / unit_ns, time_ns / unit_ns], [y, y], color=MEASURED,
                          linewidth=0.8, zorder=1)  # fmt: skip
                axes.plot([time_ns / unit_ns], [y], "D", markersize=6, color=MEASURED,
                          markeredgecolor=PAPER, markeredgewidth=0.8, zorder=4)  # fmt: skip
        if max(ends) > 12 * min(ends) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlim(0.8 * min(ends) / unit_ns, 1.2 * max(ends) / unit_ns)
        else:
            axes.set_xlim(0, 1.05 * max(ends) / unit_ns)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), labels)
        axes.tick_params(length=0, which="both")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.set_xlabel(f"step time [{unit}]")
    return sheet.svg


def _short(label: str) -> str:
    label = "".join(letter if letter.isprintable() else "?" for letter in label)
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 3] + "..."
