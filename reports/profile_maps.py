"""Figures of a profile as maps: efficiency of matrix products, and the fabric as a graph."""

import cmath
import math
from collections.abc import Mapping, Sequence

import networkx as nx
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from profiles.fabric import NETWORK, Fabric, graph
from profiles.lookup import CostTable, kernel_works
from profiles.profile import KernelSample
from profiles.summary import Ceiling
from profiles.surface import Surface
from reports.profile_axes import squares
from reports.svg import FAINT, INK, PAPER, WIDTH, Sheet, panel

PRODUCTS = ("linear_forward", "linear_dgrad", "linear_wgrad")
_SHADES = LinearSegmentedColormap.from_list("shades", ("#f3f1ec", "#8db8dd", "#2a6299", "#0f2438"))
_LEVELS = 10
_STEPS = 28
_LEAST_SHAPES = 6
_LONGEST_LABEL = 12
# The px of a unit of a drawn fabric, whose inmost ring has a radius of one.
_UNIT = 120

# From the middle of a drawing outwards.
RINGS = ("gpu", "nic", "numa", "cpu", "node")
_KIND_COLOURS = {"gpu": "#2a6299", "nic": "#c4552d", "numa": "#3f9b78", "cpu": "#b87fae",
                 "node": "#8c8984"}  # fmt: skip
# The wires, those of `nvidia-smi topo -m` in the words of its legend: width, colour, what it says.
_WIRES = {
    "NV": (2.2, "#2a6299", "NVLink"),
    "PIX": (1.8, "#c4552d", "PIX: one PCIe bridge"),
    "PXB": (1.5, "#d9824a", "PXB: several PCIe bridges"),
    "PHB": (1.2, "#e2a27c", "PHB: a PCIe host bridge"),
    "NODE": (0.8, "#b5ada0", "NODE: between host bridges"),
    "SYS": (0.5, "#cfc8ba", "SYS: between NUMA nodes"),
    "PCIe": (0.7, "#8c8984", "PCIe"),
    "memory": (1.2, "#3f9b78", "memory"),
    "socket": (1.2, "#b87fae", "socket"),
    "network": (0.8, "#5bb5c4", "network"),
}
_OTHER_COLOURS = ("#7a6cb0", "#9a7a1f", "#16324a")
_OTHER_PX = 1.2


def efficiency(name: str, table: CostTable, ceilings: Sequence[Ceiling]) -> str:
    """Return maps of the rate of products, a share of the best in their dtype.

    Over the rows m and the side sqrt(n k) of the weight, with n = k between the measured shapes,
    which are the dots. Empty where no dtype has enough shapes.
    """
    best = {each.what: each.best_per_s for each in ceilings if each.unit == "flop/s"}
    maps = {
        (dtype, op): alike
        for dtype in best
        for op in PRODUCTS
        if _spans(alike := [k for k in table.profile.kernels if (k.op, k.dtype) == (op, dtype)])
    }
    if not maps:
        return ""
    dtypes = [dtype for dtype in best if any(key[0] == dtype for key in maps)]
    left, gap, top, height = 66, 34, 64, 150
    width = (WIDTH - left - 18 - 2 * gap) / 3
    sheet = Sheet(name, "Efficiency of matrix products", top + len(dtypes) * (height + 52) + 2)
    with sheet as figure:
        _shade_key(figure, left)
        for row, dtype in enumerate(dtypes):
            for column, op in enumerate(PRODUCTS):
                if (dtype, op) not in maps:
                    continue
                axes = panel(figure, left=left + column * (width + gap),
                             top=top + row * (height + 52), width=width, height=height)  # fmt: skip
                surface = table.kernel_surface(op, dtype).surface
                _map(axes, surface, op, best[dtype], maps[dtype, op])
                axes.set_title(f"{dtype}  {op}", loc="left", fontsize=11, color=INK, pad=6)
                if row == len(dtypes) - 1:
                    axes.set_xlabel("rows m")
                if column == 0:
                    axes.set_ylabel("sqrt(n k)")
                else:
                    axes.tick_params(labelleft=False)
    return sheet.svg


def _spans(samples: Sequence[KernelSample]) -> bool:
    """Return whether `samples` lie on an area and are enough to fill it."""
    sides = {sample.shape[1] * sample.shape[2] for sample in samples}
    rows = {sample.shape[0] for sample in samples}
    return len(samples) >= _LEAST_SHAPES and len(sides) > 1 and len(rows) > 1


def _map(
    axes: Axes, surface: Surface, op: str, best_per_s: float, samples: Sequence[KernelSample]
) -> None:
    xs = np.array([math.log2(sample.shape[0]) for sample in samples])
    ys = np.array([math.log2(sample.shape[1] * sample.shape[2]) / 2 for sample in samples])
    rows = np.linspace(xs.min(), xs.max(), _STEPS)
    sides = np.linspace(ys.min(), ys.max(), _STEPS)
    shares = np.zeros((_STEPS, _STEPS))
    for down, side in enumerate(sides):
        for across, row in enumerate(rows):
            shape = (round(2**row), round(2**side), round(2**side))
            rate = 1e9 * kernel_works(op, shape)[0] / surface.at(shape)[0]
            shares[down, across] = min(rate / best_per_s, 1.0)
    axes.contourf(rows, sides, shares, levels=np.linspace(0, 1, _LEVELS + 1),
                  colors=[_shade(level) for level in range(_LEVELS)])  # fmt: skip
    for axis, ends in ((axes.xaxis, xs), (axes.yaxis, ys)):
        low, high = math.ceil(ends.min()), math.floor(ends.max())
        step = 2 if high - low > 3 else 1
        marks = list(range(low, high + 1, step))
        axis.set_ticks(marks, [f"{1 << mark:,}" for mark in marks])
        axis.set_minor_locator(NullLocator())
    axes.set_xlim(xs.min(), xs.max())
    axes.set_ylim(ys.min(), ys.max())
    # The many shapes of one place are one dot.
    places = sorted(set(zip(xs.tolist(), ys.tolist(), strict=True)))
    squares(axes, places, INK, 4.2)
    squares(axes, places, PAPER, 2.8)
    axes.tick_params(length=0, labelcolor=FAINT, pad=6)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _shade(level: int) -> str:
    return to_hex(_SHADES((level + 0.5) / _LEVELS))


def _shade_key(figure: Figure, left: float) -> None:
    """Draw what the shades of the maps say, at the top of the figure."""
    axes = panel(figure, left=left, top=6, width=300, height=12)
    axes.set_axis_off()
    axes.set_xlim(0, _LEVELS)
    axes.set_ylim(0, 1)
    for level in range(_LEVELS):
        axes.fill_between([level, level + 1], 0, 1, color=_shade(level), linewidth=0)
    for level in (0, 5, 10):
        axes.annotate(f"{100 * level // _LEVELS} %", (level, 0), xytext=(0, -5), ha="center",
                      va="top", textcoords="offset points", fontsize=10.5, color=FAINT,
                      annotation_clip=False)  # fmt: skip
    axes.annotate("of the best product in this dtype", (_LEVELS, 0.5), xytext=(18, 0), va="center",
                  textcoords="offset points", fontsize=10.5, color=INK,
                  annotation_clip=False)  # fmt: skip


def drawn_fabric(figure_name: str, fabric: Fabric) -> str:
    """Return `fabric` as a graph: a ring a kind of vertex, GPUs inside; empty for no vertex."""
    if not fabric.nodes:
        return ""
    whole = graph(fabric)
    places = fabric_places(whole)
    wires = {link.kind: _wire(link.kind) for link in fabric.links}
    others = sorted(kind for kind in wires if wires[kind][1] == _OTHER_COLOURS[0])
    for number, kind in enumerate(others):
        wires[kind] = _OTHER_PX, _OTHER_COLOURS[number % len(_OTHER_COLOURS)], kind
    words = list(dict.fromkeys(
        (word, colour, width)
        for kind, (width, colour, word) in sorted(wires.items(), key=lambda w: (-w[1][0], w[0]))
    ))  # fmt: skip
    every = list(places.values())
    across = max(place.real for place in every) - min(place.real for place in every) + 1.2
    down = max(place.imag for place in every) - min(place.imag for place in every) + 0.7
    height = down * min(_UNIT, (WIDTH - 20) / across)
    top = 10 + 18 * math.ceil(len(words) / 3)
    sheet = Sheet(figure_name, "The fabric of the machine", top + height + 8)
    with sheet as figure:
        _wire_key(figure, words)
        axes = panel(figure, left=10, top=top, width=WIDTH - 20, height=height)
        axes.set_axis_off()
        # The farthest first: the near ones are drawn over them.
        for link in sorted(fabric.links, key=lambda link: (wires[link.kind][0], link.first)):
            width, colour, _ = wires[link.kind]
            ends = places[link.first], places[link.second]
            axes.plot([end.real for end in ends], [end.imag for end in ends], color=colour,
                      linewidth=width, zorder=1)  # fmt: skip
        for node in fabric.nodes:
            # The vertex of the node says on which one the others are.
            name = node.name.rpartition("/")[2]
            is_told = node.label.lower() not in ("", name) and len(node.label) <= _LONGEST_LABEL
            axes.text(places[node.name].real, places[node.name].imag,
                      f"{name}\n{node.label}" if is_told else name, ha="center",
                      va="center", fontsize=9.5, color=INK, zorder=3, linespacing=1.25,
                      bbox={"boxstyle": "round,pad=0.4", "facecolor": PAPER, "linewidth": 1.4,
                            "edgecolor": _KIND_COLOURS.get(node.kind, FAINT)})  # fmt: skip
        middle = (min(p.real for p in every) + max(p.real for p in every)) / 2
        reach = max(across, down * (WIDTH - 20) / height) / 2
        axes.set_xlim(middle - reach, middle + reach)
        axes.set_ylim(min(p.imag for p in every) - 0.35, max(p.imag for p in every) + 0.35)
    return sheet.svg


def _wire(kind: str) -> tuple[float, str, str]:
    """Return the width, the colour and the words of a wire of `kind`."""
    found = _WIRES.get("NV" if kind.startswith("NV") else kind)
    if found is None:
        return _OTHER_PX, _OTHER_COLOURS[0], kind
    width, colour, word = found
    return width, colour, f"{kind}: {word}" if kind.startswith("NV") else word


def _wire_key(figure: Figure, words: Sequence[tuple[str, str, float]]) -> None:
    rows = math.ceil(len(words) / 3)
    axes = panel(figure, left=0, top=4, width=WIDTH, height=18 * max(rows, 1))
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(18 * max(rows, 1), 0)
    for number, (word, colour, width) in enumerate(words):
        row, column = divmod(number, 3)
        left, middle = 20 + 245 * column, 18 * row + 9
        axes.plot([left, left + 22], [middle, middle], color=colour, linewidth=width + 0.6)
        axes.text(left + 30, middle + 0.4, word, va="center", fontsize=10.5, color=INK)


def fabric_places(whole: "nx.Graph[str]") -> dict[str, complex]:
    """Return where each vertex is drawn, as a complex number.

    A cell is what hangs together without the network between nodes; cells lie
    below each other, and the network beside them. Inside a cell
    each kind has a ring, whose vertices are turned towards what they are wired to.
    """
    inside = whole.copy()
    inside.remove_edges_from(pair for pair in whole.edges if whole.edges[pair]["kind"] == NETWORK)
    kinds = nx.get_node_attributes(whole, "kind")
    # What nothing but networks join is between the cells.
    hubs = [vertex for vertex in sorted(nx.isolates(inside)) if whole.degree(vertex)]
    inside.remove_nodes_from(hubs)
    parts = sorted(sorted(part) for part in nx.connected_components(inside))
    cells = [_rings(inside.subgraph(part), kinds) for part in parts]
    reach = max((abs(place) for cell in cells for place in cell.values()), default=1.0)
    places = {}
    for number, cell in enumerate(cells):
        for vertex, place in cell.items():
            down = number * (2 * reach + 0.6)
            places[vertex] = complex(_WIDER * place.real, place.imag - down)
    middle = -(len(cells) - 1) * (reach + 0.3)
    for number, vertex in enumerate(hubs):
        places[vertex] = complex(_WIDER * reach + 1.0, middle - number)
    return places


# The page is wider than high.
_WIDER = 1.5


def _rings(part: "nx.Graph[str]", kinds: Mapping[str, str]) -> dict[str, complex]:
    places: dict[str, complex] = {}
    radius = 0.0
    for kind in [*RINGS, *sorted({kinds[v] for v in part} - {*RINGS})]:
        ring = [vertex for vertex in part if kinds[vertex] == kind]
        if not ring:
            continue
        ideal = {vertex: _towards(part, vertex, places) for vertex in ring}
        ring.sort(key=lambda vertex: (cmath.phase(ideal[vertex]) % (2 * math.pi), vertex))
        # A single vertex in the middle has no radius; beside something, each ring is wider.
        radius = (0.0 if len(ring) == 1 else 1.0) if not places else radius + 0.75
        even: dict[str, npt.NDArray[np.float64]] = nx.circular_layout(nx.empty_graph(ring))
        spots = {vertex: complex(*even[vertex]) if len(ring) > 1 else 1 + 0j for vertex in ring}
        turn = sum(ideal[vertex] * spots[vertex].conjugate() for vertex in ring)
        turned = turn / abs(turn) if abs(turn) > 1e-6 else 1 + 0j
        places |= {vertex: radius * turned * spots[vertex] for vertex in ring}
    return places


def _towards(part: "nx.Graph[str]", vertex: str, places: Mapping[str, complex]) -> complex:
    """Return the direction of what `vertex` is wired to, the close wires above all."""
    ends = [(places[other], _wire(part.edges[vertex, other]["kind"])[0])
            for other in sorted(part[vertex]) if other in places]  # fmt: skip
    pull = sum((place * width**4 for place, width in ends), 0j)
    return pull / abs(pull) if abs(pull) > 1e-6 else 0j


def first_nodes(fabric: Fabric, most: int) -> tuple[Fabric, int]:
    """Return `fabric` with its first `most` nodes and their network, and how many were left out.

    The vertices of a node begin with its name and a slash.
    """
    names = [v.name for v in fabric.nodes if v.kind == "node" and v.name != NETWORK]
    left = tuple(names[most:])
    inside = {vertex.name for vertex in fabric.nodes if vertex.name.partition("/")[0] not in left}
    kept = Fabric(
        nodes=tuple(vertex for vertex in fabric.nodes if vertex.name in inside),
        links=tuple(link for link in fabric.links if {link.first, link.second} <= inside),
    )
    return kept, len(left)
