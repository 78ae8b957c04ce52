"""Reads how this machine is wired, from /sys and `nvidia-smi topo -m`, as a `Fabric`."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from profiles.fabric import DOWN, Fabric, FabricLink, FabricNode, ordered
from profiles.machine import NVIDIA_SMI_SECONDS, cpu_name, read_gpus

_AFFINITIES = ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID")


@dataclass(frozen=True, slots=True, kw_only=True)
class TopoMatrix:
    """What `nvidia-smi topo -m` tells: GPUs and NICs, NUMA nodes of GPUs, and the hop of pairs.

    NICs have the names of the operating system. `hops` holds each pair of GPUs, and each GPU and
    NIC, once.
    """

    gpus: tuple[str, ...]
    nics: tuple[str, ...]
    numa: Mapping[str, tuple[int, ...]]
    hops: Mapping[tuple[str, str], str]


def parse_topo(text: str) -> TopoMatrix:
    """Return the matrix in `text`, an empty one where there is none.

    Columns are GPUs, then NICs (NIC0 with a legend below, or mlx5_0 in older versions), then up to
    three affinities, of which NICs have none. A hop is X (itself), NV# (# NVLinks), PIX, PXB, PHB,
    NODE or SYS.

    >>> matrix = parse_topo("\\tGPU0\\tGPU1\\tCPU Affinity\\tNUMA Affinity\\n"
    ...                     "GPU0\\t X \\tNV12\\t0-31\\t0\\nGPU1\\tNV12\\t X \\t32-63\\t1\\n")
    >>> matrix.hops, matrix.numa
    ({('GPU0', 'GPU1'): 'NV12'}, {'GPU0': (0,), 'GPU1': (1,)})
    """
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    starts = [line for line in lines if line.split()[:1] == ["GPU0"] and "X" not in line.split()]
    header = starts[0] if starts else ""
    columns = header.split("CPU Affinity")[0].split()
    num_affinities = sum(name in header for name in _AFFINITIES)
    real_names = dict(re.findall(r"^\s*(NIC\d+):\s*(\S+)\s*$", "\n".join(lines), re.MULTILINE))
    numa: dict[str, tuple[int, ...]] = {}
    found: dict[tuple[str, str], str] = {}
    for line in lines:
        name, *cells = line.split() or [""]
        if name not in columns or line == header:
            continue
        affinities = cells[len(columns) :]
        if len(affinities) == num_affinities >= 2:
            numa[name] = _numbers(affinities[1])
        if name.startswith("GPU"):
            for other, hop in zip(columns, cells, strict=False):
                if columns.index(other) > columns.index(name):
                    found[name, real_names.get(other, other)] = hop
    return TopoMatrix(
        gpus=tuple(name for name in columns if name.startswith("GPU")),
        nics=tuple(real_names.get(name, name) for name in columns if not name.startswith("GPU")),
        numa=numa,
        hops=found,
    )


def _numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as 0-2,8; none for anything else.

    >>> _numbers("0-2,8"), _numbers("N/A")
    ((0, 1, 2, 8), ())
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        return ()
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def local_fabric(node: str = "node0", system: Path = Path("/sys")) -> Fabric:
    """Return the wiring of this machine; vertices are named `node`/gpu0, `node`/mlx5_0 and so on.

    A socket is an edge `socket` from its node, a NUMA node an edge `memory` from its socket, and a
    device that is known to be near a NUMA node an edge `PCIe` from there, else from its node. GPUs
    are joined with each other and with NICs by the hops of `nvidia-smi topo -m`.

    >>> local_fabric().nodes[0]
    FabricNode(name='node0', kind='node', label='node0')
    """
    drawing = _Drawing(node)
    _draw_numa(drawing, system / "devices/system")
    labels = [gpu.name for gpu in read_gpus()]
    matrix = parse_topo(_read_topo())
    for i, gpu in enumerate(matrix.gpus):
        drawing.device(gpu.lower(), "gpu", labels[i] if i < len(labels) else gpu)
        drawing.near_numa(gpu.lower(), matrix.numa.get(gpu, ()))
    for name, (label, numa) in (dict.fromkeys(matrix.nics, ("", -1)) | _read_nics(system)).items():
        drawing.device(name, "nic", label)
        drawing.near_numa(name, (numa,) if numa >= 0 else ())
    for (first, second), hop in matrix.hops.items():
        drawing.link(first.lower(), second.lower() if second in matrix.gpus else second, hop)
    return drawing.fabric()


@dataclass(slots=True)
class _Drawing:
    """The vertices and edges of one node so far."""

    node: str
    nodes: dict[str, FabricNode] = field(default_factory=dict)
    links: list[FabricLink] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes[""] = FabricNode(name=self.node, kind="node", label=self.node)

    def device(self, name: str, kind: str, label: str) -> None:
        """Add a vertex of this node."""
        self.nodes[name] = FabricNode(name=f"{self.node}/{name}", kind=kind, label=label)

    def link(self, first: str, second: str, kind: str) -> None:
        """Add an edge between two vertices of this node; "" is the node itself."""
        ends = sorted((self.nodes[first].name, self.nodes[second].name))
        self.links.append(FabricLink(first=ends[0], second=ends[1], kind=kind))

    def near_numa(self, name: str, numa: tuple[int, ...]) -> None:
        """Add the edges of a device to its NUMA nodes, or to the node where none is known."""
        known = [f"numa{i}" for i in numa if f"numa{i}" in self.nodes]
        for place in known or [""]:
            self.link(place, name, "PCIe")

    def fabric(self) -> Fabric:
        """Return what was drawn."""
        return ordered(self.nodes.values(), self.links)


def _draw_numa(drawing: _Drawing, folder: Path) -> None:
    """Add the sockets and NUMA nodes; one with memory alone hangs from the node."""
    sockets = {
        int(path.parts[-3].removeprefix("cpu")): int(_read(path) or 0)
        for path in folder.glob("cpu/cpu[0-9]*/topology/physical_package_id")
    }
    for socket in sorted(set(sockets.values())):
        drawing.device(f"cpu{socket}", "cpu", cpu_name())
        drawing.link("", f"cpu{socket}", "socket")
    for path in sorted(folder.glob("node/node[0-9]*/cpulist")):
        name = path.parent.name.replace("node", "numa")
        cpus = _read(path)
        drawing.device(name, "numa", f"cpus {cpus}" if cpus else "no cpus")
        places = {sockets[cpu] for cpu in _numbers(cpus) if cpu in sockets}
        for place in [f"cpu{socket}" for socket in sorted(places)] or [""]:
            drawing.link(place, name, "memory")


def _read_nics(system: Path) -> dict[str, tuple[str, int]]:
    """Return label and NUMA node (-1 if unknown) of each NIC that is a device, by name.

    A port of InfiniBand or RoCE has two names; that of the device counts, as in `nvidia-smi`.
    """
    found: dict[str, tuple[str, int]] = {}
    taken = set()
    for path in sorted(system.glob("class/infiniband/*")):
        port = path / "ports/1"
        rate = _read(port / "rate").partition(" (")[0].replace("Gb/sec", "Gb/s")
        label = " ".join(filter(None, (rate, _read(port / "link_layer"))))
        is_up = "ACTIVE" in _read(port / "state")
        found[path.name] = (label if is_up else f"{label} {DOWN}".strip(), _numa_of(path))
        taken.add((path / "device").resolve())
    for path in sorted(system.glob("class/net/*")):
        if not (path / "device").exists() or (path / "device").resolve() in taken:
            continue
        mbit = _read(path / "speed")
        label = f"{int(mbit) / 1000:g} Gb/s Ethernet" if mbit.isdigit() else "Ethernet"
        is_up = _read(path / "operstate") != "down"
        found[path.name] = (label if is_up else f"{label} {DOWN}", _numa_of(path))
    return found


def _numa_of(path: Path) -> int:
    """Return the NUMA node of a device, -1 where the system does not tell."""
    text = _read(path / "device/numa_node")
    return int(text) if text.isdigit() else -1


def _read(path: Path) -> str:
    """Return a file of /sys, empty where it cannot be read: many refuse, or are absent."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _read_topo() -> str:
    """Return what `nvidia-smi topo -m` prints, empty where it is absent or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        done = subprocess.run(
            [command, "topo", "-m"],
            capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout
