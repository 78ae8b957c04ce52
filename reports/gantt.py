"""The Gantt chart of a step: what each rank does when, predicted above measured."""

import re
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes

from planner.plan import Plan
from reports.figures import MAX_ROWS, shown_ranks
from reports.svg import (
    FAINT,
    INK,
    KIND_COLOURS,
    LABEL_DARK,
    WIDTH,
    Sheet,
    add_boxes,
    legend,
    panel,
    time_unit,
)
from reports.words import KIND_NAMES, duration, stages_text
from simulator.timeline import Span, Timeline

_ROW, _RIGHT = 26, 18
_MICROBATCH = re.compile(r"\d+[FBIW](\d+)")


def names_actions(plan: Plan) -> bool:
    """Return whether a micro-batch alone does not say what an action is."""
    return plan.layout.stages_per_rank > 1 or plan.parsed_schedule().splits_backward


def gantt(name: str, plan: Plan, predicted: Timeline, measured: Timeline | None) -> str:
    """Return one step, predicted above measured on one time axis, a row a rank.

    A predicted row is a pipeline rank, named by its stages; a measured one is a rank of the run.
    """
    rows = tuple(range(plan.layout.pp))[:MAX_ROWS]
    parts = [("Predicted", predicted, rows, [stages_text(plan.stages_of(rank)) for rank in rows])]
    if measured is not None:
        ranks = shown_ranks(plan.layout)
        parts.append(("Measured", measured, ranks, [f"rank {rank}" for rank in ranks]))
    heights = [len(ranks) * _ROW for _, _, ranks, _ in parts]
    longest = max(len(label) for _, _, _, labels in parts for label in labels)
    left, gap, top = 20 + 6 * max(7, longest), 30, 54
    end_ns = max(max(line.makespan_ns for _, line, _, _ in parts), 1)
    unit_ns, unit = time_unit(end_ns)
    used = {span.kind for _, line, _, _ in parts for span in line.spans}
    sheet = Sheet(name, "Gantt chart of one step", top + sum(heights) + gap * len(parts) + 12)
    with sheet as figure:
        entries = [(KIND_NAMES[kind], KIND_COLOURS[kind]) for kind in KIND_NAMES if kind in used]
        legend(figure, entries, left=left)
        for number, ((title, line, ranks, labels), height) in enumerate(
            zip(parts, heights, strict=True), start=1
        ):
            axes = panel(figure, left=left, top=top, width=WIDTH - left - _RIGHT, height=height)
            axes.set_xlim(0, 1.04 * end_ns / unit_ns)
            axes.set_ylim(len(ranks) - 0.5, -0.5)
            axes.set_yticks(range(len(ranks)), labels, color=FAINT)
            axes.tick_params(length=0, labelbottom=number == len(parts))
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
            axes.spines["bottom"].set_visible(False)
            noun = "pipeline rank" if labels[0].startswith("stages") else labels[0].split()[0]
            text = f"{title}: {duration(line.makespan_ns)}, a row a {noun}"
            axes.set_title(text, loc="left", fontsize=11, color=INK, pad=6)
            _draw_rows(axes, line, ranks, end_ns, unit_ns, is_named=names_actions(plan))
            axes.axvline(line.makespan_ns / unit_ns, color=INK, linewidth=1.2)
            if number > 1:
                axes.axvline(predicted.makespan_ns / unit_ns, color=FAINT, linewidth=1,
                             linestyle=(0, (2, 2)), zorder=3)  # fmt: skip
            if number == len(parts):
                axes.set_xlabel(f"time in the step [{unit}]")
            top += height + gap
    return sheet.svg


def _draw_rows(
    axes: Axes,
    line: Timeline,
    ranks: Sequence[int],
    end_ns: int,
    unit_ns: float,
    *,
    is_named: bool,
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
                y = row + (low + high) / 2
                _label_actions(axes, own, y, px_ns, unit_ns, is_named=is_named)
    # Gaps between boxes of a few pixels would bleach them.
    widths = sorted(box[2] for row in boxes.values() for box in row)
    is_dense = bool(widths) and widths[len(widths) // 2] * unit_ns < 5 * px_ns
    for kind in KIND_NAMES:
        if kind in boxes:
            add_boxes(axes, boxes[kind], KIND_COLOURS[kind], gap=0 if is_dense else 0.6)


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


def _label_actions(
    axes: Axes,
    spans: Iterable[Span],
    y: float,
    px_ns: float,
    unit_ns: float,
    *,
    is_named: bool,
) -> None:
    """Write into each action its micro-batch, or the whole of its name, where there is room."""
    for span in spans:
        if (found := _MICROBATCH.fullmatch(span.name)) is None:
            continue
        texts = [span.name, found[1]] if is_named else [found[1]]
        room = (span.duration_ns / px_ns - 5) / 6
        if text := next((text for text in texts if len(text) <= room), ""):
            axes.text(
                (span.start_ns + span.end_ns) / 2 / unit_ns,
                y,
                text,
                ha="center",
                va="center_baseline",
                fontsize=9.5,
                color=LABEL_DARK if span.kind == "forward" else "#ffffff",
            )
