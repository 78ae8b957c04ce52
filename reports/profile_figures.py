"""Figures of a profile over time and size: roofline, bandwidth, errors, repeatability, changes."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from profiles.difference import Difference
from profiles.lookup import CostTable
from profiles.profile import CollectiveSample, KernelSample, Profile
from profiles.roofline import bus_bytes_per_s, data_sheet, kernel_need, link_bytes_per_s
from profiles.summary import Ceiling, can_leave_out
from profiles.surface import Floats
from profiles.validity import Sample
from reports.profile_axes import (
    FAMILIES,
    Family,
    Place,
    bytes_text,
    dress,
    family,
    family_legend,
    flops_text,
    legend_px,
    percent_text,
    plot_families,
    size_axis,
    squares,
    time_axis,
)
from reports.profile_tables import KIND_WORDS, group_text
from reports.svg import FAINT, INK, LIMIT, PAPER, PREDICTED, WIDTH, Sheet, panel

_GROUP_COLOURS = ("#2a6299", "#c4552d", "#3f9b78", "#f0b441", "#8db8dd", "#b87fae", "#8f3f22",
                  "#8c8984")  # fmt: skip
MOST_GROUPS = len(_GROUP_COLOURS)
"""So many groups of ranks are drawn; of more, the larger groups and the nearer members."""

_RIGHT, _LEAST_SHARE, _LEAST_NEAR = 18, 1e-3, 8


def roofline(name: str, profile: Profile, ceilings: Sequence[Ceiling]) -> str:
    """Return achieved flops a second over arithmetic intensity, a panel a dtype, both log.

    The full lines are the measured ceilings, the best product and the largest copy; the dotted
    ones the data sheet's. Empty where no arithmetic was measured.
    """
    peaks = {each.what: each for each in ceilings if each.unit == "flop/s"}
    memory = next((each for each in ceilings if each.what == "memory"), None)
    drawn = {dtype: places for dtype in peaks if (places := _intensities(profile.kernels, dtype))}
    if not drawn:
        return ""
    columns = min(2, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    used = [each for each in FAMILIES if any(each in places for places in drawn.values())]
    left, gap = 72, 82
    width = (WIDTH - left - _RIGHT - gap * (columns - 1)) / columns
    height = 300 if columns == 1 else 220
    top = 8 + legend_px(used) + 30
    sheet = Sheet(name, "Roofline: flops a second over flops a byte",
                  top + rows * (height + 76) - 26)  # fmt: skip
    with sheet as figure:
        family_legend(figure, used, left=left)
        sheet_of = data_sheet(profile.device)
        for number, (dtype, places) in enumerate(drawn.items()):
            row, column = divmod(number, columns)
            axes = panel(figure, left=left + column * (width + gap),
                         top=top + row * (height + 76), width=width, height=height)  # fmt: skip
            plot_families(axes, places)
            measured = peaks[dtype].best_per_s, memory.best_per_s if memory else 0.0
            lines = [(*measured, "-", INK)]
            if sheet_of is not None and peaks[dtype].sheet_per_s:
                lines.append((peaks[dtype].sheet_per_s, sheet_of.memory_bytes_per_s, ":", LIMIT))
            _roofs(axes, places, lines)
            title = f"{dtype}: best product {flops_text(peaks[dtype].best_per_s)}"
            if memory is not None:
                title += f", copy {bytes_text(memory.best_per_s)}"
            dress(axes, title, "flops a byte", "", flops_text)
    return sheet.svg


def _intensities(kernels: Iterable[KernelSample], dtype: str) -> dict[Family, list[Place]]:
    places: dict[Family, list[Place]] = {}
    for sample in kernels:
        need = kernel_need(sample.op, sample.dtype, sample.shape)
        if sample.dtype == dtype and need is not None and need.flops:
            rate = 1e9 * need.flops / sample.p50_ns
            places.setdefault(family(sample), []).append((need.flops_per_byte, rate))
    return places


def _roofs(
    axes: Axes,
    places: Mapping[Family, Sequence[Place]],
    lines: Sequence[tuple[float, float, str, str]],
) -> None:
    """Draw the lines min(peak, intensity * memory rate) of (peak, memory rate, style, colour)."""
    every = [place for family_places in places.values() for place in family_places]
    low, high = min(x for x, _ in every) / 1.6, max(x for x, _ in every) * 1.6
    for peak, memory, style, colour in lines:
        ridge = peak / memory if memory else low
        xs = [low, min(max(low, ridge), high), high]
        ys = [min(peak, x * memory) if memory else peak for x in xs]
        axes.plot(xs, ys, linestyle=style, color=colour, linewidth=1.3, zorder=1)
    axes.set_xlim(low, high)
    top = max(*(y for _, y in every), *(peak for peak, _, _, _ in lines))
    axes.set_ylim(min(y for _, y in every) / 1.6, top * 1.6)


def bandwidth(name: str, table: CostTable) -> str:
    """Return bus bandwidth over size, a panel a kind: medians, P10 to P90, and the fitted law."""
    samples = table.profile.collectives
    groups = shown_groups(samples)
    kinds = [
        kind for kind in KIND_WORDS
        if any(s.kind == kind and (s.group_size, s.stride) in groups for s in samples)
    ]  # fmt: skip
    if not kinds:
        return ""
    shown = [s for s in samples if (s.group_size, s.stride) in groups]
    link = link_bytes_per_s(table.profile.device)
    most = max(link, *(_one_way(s) * s.p50_ns / s.p10_ns for s in shown if s.kind in kinds))
    columns = min(3 if len(kinds) > 4 else 2, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    left, gap, top = 78, 22, 60
    width, height = (WIDTH - left - _RIGHT - gap * (columns - 1)) / columns, 168
    sheet = Sheet(name, "Bus bandwidth of collectives over size",
                  top + rows * (height + 58) - 8)  # fmt: skip
    with sheet as figure:
        entries = [
            Family(f"{group_text(*group)} ranks" if group[1] == 1 else group_text(*group),
                   colour, "o")
            for group, colour in groups.items()
        ]  # fmt: skip
        family_legend(figure, entries, left=left)
        for number, kind in enumerate(kinds):
            row, column = divmod(number, columns)
            axes = panel(figure, left=left + column * (width + gap),
                         top=top + row * (height + 58), width=width, height=height)  # fmt: skip
            for group, colour in groups.items():
                alike = [s for s in shown if s.kind == kind and (s.group_size, s.stride) == group]
                if alike:
                    law = table.collective_surface(kind, *group).surface.law
                    _draw_group(axes, alike, law, colour)
            dress(axes, KIND_WORDS[kind], "size" if number + columns >= len(kinds) else "",
                  "" if column else "bus bandwidth", bytes_text)  # fmt: skip
            axes.set_yscale("linear")
            if link:
                axes.axhline(link, color=LIMIT, linewidth=1.3, linestyle=":", zorder=1)
            axes.set_ylim(0, 1.08 * most)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
            size_axis(axes, shown)
            if column:
                axes.tick_params(labelleft=False)
    return sheet.svg


def shown_groups(collectives: Iterable[CollectiveSample]) -> dict[tuple[int, int], str]:
    """Return the groups (size, stride) that are drawn, each with its colour."""
    every = sorted({(s.group_size, s.stride) for s in collectives}, key=lambda g: (-g[0], g[1]))
    return dict(zip(sorted(every[:MOST_GROUPS]), _GROUP_COLOURS, strict=False))


def _one_way(sample: CollectiveSample) -> float:
    """Return the bus bandwidth; of an exchange, which fills both ways of a link, that of one."""
    return bus_bytes_per_s(sample) / (2 if sample.kind == "exchange" else 1)


def _draw_group(axes: Axes, samples: Sequence[CollectiveSample], law: Floats, colour: str) -> None:
    ordered = sorted(samples, key=lambda sample: sample.size_bytes)
    sizes = [sample.size_bytes for sample in ordered]
    middle = [_one_way(sample) for sample in ordered]
    low = [y * s.p50_ns / s.p90_ns for y, s in zip(middle, ordered, strict=True)]
    high = [y * s.p50_ns / s.p10_ns for y, s in zip(middle, ordered, strict=True)]
    axes.fill_between(sizes, low, high, color=colour, alpha=0.16, linewidth=0, zorder=1)
    axes.plot(sizes, middle, "o", markersize=3.2, color=colour, markeredgewidth=0, zorder=3)
    traffic = 1e-9 * middle[0] * ordered[0].p50_ns / sizes[0]
    xs = np.geomspace(sizes[0], sizes[-1], 48)
    axes.plot(xs, 1e9 * traffic * xs / (law[0] + law[1] * xs), color=colour, linewidth=1.2,
              zorder=2)  # fmt: skip


def uncertainty(name: str, table: CostTable) -> str:
    """Return how far each entry is foretold wrong by the others, over its time; both log.

    A panel a family. The lines are the median and P90 of the entries within a factor of three of
    each time. Empty where there are too few shapes to leave one out.
    """
    places = _by_family(
        (sample, (sample.p50_ns, max(error, _LEAST_SHARE))) for sample, error in _left_out(table)
    )
    if not places:
        return ""
    every = [place for each in places.values() for place in each]
    columns, left, gap, top, height = 3, 58, 24, 26, 104
    rows = math.ceil(len(places) / columns)
    width = (WIDTH - left - _RIGHT - gap * (columns - 1)) / columns
    sheet = Sheet(name, "Error of the interpolation over time", top + rows * (height + 54) - 2)
    with sheet as figure:
        for number, (each, shown) in enumerate(places.items()):
            row, column = divmod(number, columns)
            axes = panel(figure, left=left + column * (width + gap),
                         top=top + row * (height + 54), width=width, height=height)  # fmt: skip
            errors = [error for _, error in shown]
            half, most = (f"{100 * np.quantile(errors, q):.2g} %" for q in (0.5, 0.9))
            axes.set_xlim(min(x for x, _ in every) / 1.5, max(x for x, _ in every) * 1.5)
            axes.set_ylim(_LEAST_SHARE / 1.4, max(1.0, *(y for _, y in every)) * 1.4)
            dress(axes, f"{each.word}: {half}, P90 {most}",
                  "time" if number + columns >= len(places) else "", "" if column else "error",
                  percent_text)  # fmt: skip
            time_axis(axes, narrow=True)
            squares(axes, shown, each.colour, 2.6)
            for share, style in ((0.5, "-"), (0.9, "--")):
                axes.plot(*_running(sorted(shown), share), linestyle=style, color=INK,
                          linewidth=1.3, zorder=4)  # fmt: skip
            if column:
                axes.tick_params(labelleft=False)
    return sheet.svg


def _by_family(places: Iterable[tuple[Sample, Place]]) -> dict[Family, list[Place]]:
    """Return `places` by the family of their samples, in the order of `FAMILIES`."""
    found: dict[Family, list[Place]] = {each: [] for each in FAMILIES}
    for sample, place in places:
        found[family(sample)].append(place)
    return {each: shown for each, shown in found.items() if shown}


def _left_out(table: CostTable) -> list[tuple[Sample, float]]:
    """Return each entry of a surface with shapes to spare, and its absolute relative error."""
    kernels = sorted({(s.op, s.dtype, s.variant) for s in table.profile.kernels})
    groups = sorted({(s.kind, s.group_size, s.stride) for s in table.profile.collectives})
    measured = [table.kernel_surface(*key) for key in kernels]
    measured += [table.collective_surface(*key) for key in groups]
    return [
        (each.samples[shape], float(abs(math.expm1(-left))))
        for each in measured
        if can_leave_out(each.surface)
        for shape, left in zip(each.surface.shapes, each.surface.left_out()[0], strict=True)
    ]


def _running(places: Sequence[Place], share: float) -> tuple[list[float], list[float]]:
    """Return the quantile `share` of the values near each of many times."""
    times = np.array([x for x, _ in places])
    values = np.array([y for _, y in places])
    xs, ys = [], []
    for time in np.geomspace(times[0], times[-1], 40):
        near = values[(times >= time / 3) & (times <= time * 3)]
        if near.size >= _LEAST_NEAR:
            xs.append(float(time))
            ys.append(float(np.quantile(near, share)))
    return xs, ys


def repeatability(name: str, profile: Profile) -> str:
    """Return how far passes lie from the median of their entry: by family, and pass by pass.

    Empty where no entry has two passes.
    """
    every: list[Sample] = [*profile.kernels, *profile.collectives]
    repeated = [sample for sample in every if len(sample.medians_ns) > 1]
    if not repeated:
        return ""
    furthest = _by_family(
        (s, (max(abs(ns / s.p50_ns - 1) for ns in s.medians_ns), 0.0)) for s in repeated
    )
    left, beside, top = 136, 200, 34
    height = max(150, 30 * len(furthest))
    width = WIDTH - left - _RIGHT - beside - 76
    sheet = Sheet(name, "Spread of the passes", top + height + 44)
    with sheet as figure:
        axes = panel(figure, left=left, top=top, width=width, height=height)
        _draw_furthest(axes, furthest)
        passes = panel(figure, left=WIDTH - _RIGHT - beside, top=top, width=beside, height=height)
        _draw_passes(passes, repeated)
    return sheet.svg


def _draw_furthest(axes: Axes, furthest: Mapping[Family, Sequence[Place]]) -> None:
    """Draw each entry in the row of its family, and the row's median and P90."""
    every = [max(x, _LEAST_SHARE) for each in furthest.values() for x, _ in each]
    axes.set_xlim(min(every) / 1.3, max(every) * 1.3)
    axes.set_ylim(len(furthest) - 0.5, -0.5)
    dress(axes, "furthest pass from its entry's median", "share of the median", "", percent_text)
    axes.set_yscale("linear")
    axes.set_ylim(len(furthest) - 0.5, -0.5)
    for row, (each, shown) in enumerate(furthest.items()):
        # Rows of dots would lie on each other: the golden ratio spreads them, always alike.
        spread = [0.5 * ((number * 0.618034) % 1 - 0.5) for number in range(len(shown))]
        places = [(max(x, _LEAST_SHARE), row + y)
                  for (x, _), y in zip(shown, spread, strict=True)]  # fmt: skip
        squares(axes, places, each.colour, 2.2)
        for share, length in ((0.5, 0.4), (0.9, 0.28)):
            at = float(np.quantile([x for x, _ in places], share))
            axes.plot([at, at], [row - length, row + length], color=INK, linewidth=1.6, zorder=3)
    axes.set_yticks(range(len(furthest)), [each.word for each in furthest])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent_text(value)))


def _draw_passes(axes: Axes, samples: Sequence[Sample]) -> None:
    """Draw the spread of all entries pass by pass: P10 to P90, the quarters, the median."""
    count = max(len(sample.medians_ns) for sample in samples)
    for number in range(count):
        ratios = [100 * (sample.medians_ns[number] / sample.p50_ns - 1) for sample in samples
                  if number < len(sample.medians_ns)]  # fmt: skip
        p10, p25, p50, p75, p90 = np.quantile(ratios, (0.1, 0.25, 0.5, 0.75, 0.9))
        x = number + 1
        axes.plot([x, x], [p10, p90], color=PREDICTED, linewidth=1.5)
        axes.plot([x, x], [p25, p75], color=PREDICTED, linewidth=6)
        axes.plot([x], [p50], "o", markersize=6.5, color=PAPER, markeredgecolor=PREDICTED,
                  markeredgewidth=1.5, zorder=3)  # fmt: skip
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
    axes.set_xlim(0.4, count + 0.6)
    axes.set_xticks(range(1, count + 1) if count <= 12 else range(1, count + 1, count // 6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g} %"))
    axes.set_title("all entries, pass by pass", loc="left", fontsize=11, color=INK, pad=10)
    axes.set_xlabel("pass")
    axes.grid(axis="y")
    axes.tick_params(length=0, labelcolor=FAINT)
    axes.spines["left"].set_visible(False)


def changes(name: str, told: Difference) -> str:
    """Return how far each entry moved between two profiles, over its band; both log."""
    if not told.changes:
        return ""
    places: dict[Family, list[Place]] = {}
    stayed, beyond = Family("within its band", "#8db8dd", "o"), Family("beyond", "#c4552d", "s")
    for each in told.changes:
        moved = max(each.ratio, 1 / each.ratio) - 1
        place = (max(each.band, _LEAST_SHARE), max(moved, _LEAST_SHARE))
        places.setdefault(beyond if each.is_beyond else stayed, []).append(place)
    used = [each for each in (stayed, beyond) if each in places]
    left, height, top = 66, 250, 34
    sheet = Sheet(name, "Changes between two profiles over their bands", top + height + 46)
    with sheet as figure:
        family_legend(figure, used, left=left)
        axes = panel(figure, left=left, top=top, width=WIDTH - left - _RIGHT, height=height)
        plot_families(axes, places)
        every = [place for each in places.values() for place in each]
        low, high = min(map(min, every)) / 1.5, max(map(max, every)) * 1.5
        axes.plot([low, high], [low, high], color=INK, linewidth=1, zorder=1)
        axes.set_xlim(min(x for x, _ in every) / 1.3, max(x for x, _ in every) * 1.3)
        axes.set_ylim(min(y for _, y in every) / 1.3, max(y for _, y in every) * 1.5)
        dress(axes, "", "band", "change either way", percent_text)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent_text(value)))
    return sheet.svg
