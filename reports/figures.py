"""The figures of a report, each an SVG element as text: same input, same bytes, nothing outside.

Every figure takes values and returns text. Times are in ns and sizes in bytes; axes choose a unit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from planner.layout import Layout
from planner.plan import PeakMemory, Plan
from planner.record import RunRecord
from planner.waterfall import Waterfall
from reports.compare import Comparison
from reports.svg import (
    BAND,
    FAINT,
    INK,
    KIND_COLOURS,
    LIMIT,
    MEASURED,
    MEMORY_COLOURS,
    PAPER,
    PART_COLOURS,
    PREDICTED,
    RULE,
    WIDTH,
    Sheet,
    add_boxes,
    legend,
    panel,
    time_unit,
)
from reports.words import KIND_NAMES, PART_NAMES, duration, size, stages_text

MAX_ROWS = 16
"""Above this many ranks a figure shows one of the equal ranks of each place in the pipeline."""
_ROW, _RIGHT, _LONGEST_LABEL = 26, 18, 56
_TOLD = 132


def shown_ranks(layout: Layout) -> tuple[int, ...]:
    """Return the ranks that figures and tables show: all, or the first of each pipeline rank."""
    if layout.num_ranks <= MAX_ROWS:
        return tuple(range(layout.num_ranks))
    return tuple(rank * layout.dp * layout.tp for rank in range(layout.pp))[:MAX_ROWS]


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
            add_boxes(axes, boxes[kind], KIND_COLOURS[kind])
        axes.set_xlim(0, 1.02 * max(x + width for row in boxes.values() for x, _, width, _ in row))
        _bar_axes(axes, labels, positions)
        axes.set_xlabel(f"time in a step [{unit}]")
    return sheet.svg


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One rank of a run, or of the pipeline: predicted parts in bytes, the measured peak or -1."""

    label: str
    parts: tuple[tuple[str, int], ...]
    measured_bytes: int


def memory_rows(plan: Plan, record: RunRecord | None) -> tuple[MemoryRow, ...]:
    """Return a row a shown rank of the run, or a row a pipeline rank where there is none."""
    layout = plan.layout
    if record is None:
        places = [(stages_text(plan.stages_of(rank)), rank, -1) for rank in range(layout.pp)]
    else:
        places = [
            (f"rank {rank}", layout.place(rank).pp, record.memory[rank].peak_bytes)
            for rank in shown_ranks(layout)
        ]
    return tuple(
        MemoryRow(
            label=label,
            parts=_held_at_peak(plan.memory[place]),
            measured_bytes=peak,
        )
        for label, place, peak in places
    )


def _held_at_peak(memory: PeakMemory) -> tuple[tuple[str, int], ...]:
    """Return what makes up the peak: in the forwards and backwards, or in the update of weights."""
    is_in_update = memory.update > memory.activations + memory.temporary
    gone = ("activations", "temporary") if is_in_update else ("update",)
    return tuple((part, 0 if part in gone else getattr(memory, part)) for part in MEMORY_COLOURS)


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
    top, height = 44, (36 if has_measured else 30) * len(rows)
    left = 20 + 6 * max(10, *(len(row.label) for row in rows))
    sheet = Sheet(name, "Memory per rank", top + height + 44)
    with sheet as figure:
        used = {part for row in rows for part, part_bytes in row.parts if part_bytes}
        colours = {part: colour for part, colour in MEMORY_COLOURS.items() if part in used}
        entries = [*colours.items(), *([("measured peak", INK)] if has_measured else [])]
        legend(figure, entries, left=left)
        axes = panel(figure, left=left, top=top, width=WIDTH - left - _RIGHT, height=height)
        for part, colour in colours.items():
            boxes = []
            for y, row in enumerate(rows):
                names = [part_name for part_name, _ in row.parts]
                start = sum(n for _, n in row.parts[: names.index(part)]) / unit_bytes
                width = dict(row.parts)[part] / unit_bytes
                boxes.append((start, y - 0.38, width, 0.52 if has_measured else 0.76))
            add_boxes(axes, boxes, colour)
        peaks = [
            (0.0, y + 0.19, row.measured_bytes / unit_bytes, 0.14)
            for y, row in enumerate(rows)
            if row.measured_bytes >= 0
        ]
        if peaks:
            add_boxes(axes, peaks, INK)
        axes.set_xlim(0, 1.03 * end)
        _bar_axes(axes, [row.label for row in rows], range(len(rows)))
        if has_limit:
            axes.axvline(limit_bytes / unit_bytes, color=LIMIT, linewidth=1.5, zorder=3)
            axes.annotate(f"limit {size(limit_bytes)}", (limit_bytes / unit_bytes, 1),
                          xycoords=("data", "axes fraction"), xytext=(0, 4), ha="right",
                          textcoords="offset points", fontsize=10.5, color=LIMIT)  # fmt: skip
        axes.set_xlabel(f"memory [{unit}]")
    return sheet.svg


def cascade(name: str, found: Waterfall) -> str:
    """Return the parts of a step from the top down, each bar where the one above it ends."""
    total_ns = found.step_ns
    unit_ns, unit = time_unit(total_ns)
    parts = list(found.parts_ns.items())
    left, top, height = 20 + round(5.8 * max(map(len, PART_NAMES.values()))), 8, _ROW * len(parts)
    sheet = Sheet(name, "What the predicted step goes to", top + height + 44)
    with sheet as figure:
        axes = panel(figure, left=left, top=top, width=WIDTH - left - _TOLD, height=height)
        end = 0.0
        for y, (part, ns) in enumerate(parts):
            start, end = end, end + ns / unit_ns
            add_boxes(axes, [(start, y - 0.36, end - start, 0.72)], PART_COLOURS[part], gap=0)
            if y + 1 < len(parts):
                axes.plot([end, end], [y, y + 1], color=FAINT, linewidth=0.8, zorder=1)
            for text, right in ((duration(ns), 76), (f"{100 * ns / total_ns:.1f} %", _TOLD - 8)):
                axes.annotate(text, (1, y), xycoords=("axes fraction", "data"), xytext=(right, 0),
                              textcoords="offset points", ha="right", va="center",
                              fontsize=10.5, color=INK)  # fmt: skip
        axes.set_xlim(0, total_ns / unit_ns)
        _bar_axes(axes, [PART_NAMES[part] for part, _ in parts], range(len(parts)))
        axes.set_xlabel(f"time in the step [{unit}]")
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
    """Return `label` cut in its middle: layouts that are long often differ at their end."""
    label = "".join(letter if letter.isprintable() else "?" for letter in label)
    if len(label) <= _LONGEST_LABEL:
        return label
    return f"{label[: _LONGEST_LABEL - 15]}...{label[-12:]}"
