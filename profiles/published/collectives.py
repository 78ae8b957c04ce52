"""Write profiles/data/collectives.toml from published collective measurements.

Run as `python -m profiles.published.collectives FOLDER`; FOLDER holds nccl_measured.csv,
kernels.csv and ett_kernels.csv.gz. The same folder gives the same bytes.
"""

import csv
import gzip
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from profiles.lookup import ring_traffic
from profiles.presets import fabric_preset
from profiles.published.fabrics import Crossing, Curve, Curves, Family, fit, never_falling

TARGET = Path(__file__).parent.parent / "data" / "collectives.toml"
DATE = "2026-11-20"

KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}

# Device in kernels.csv -> link; GB200 and B300 have the link of B200, H200 that of H100.
KERNEL_LINKS = {
    "NVIDIA A100-SXM4-80GB": "nvlink3",
    "NVIDIA H100 80GB HBM3": "nvlink4",
    "NVIDIA H200": "nvlink4",
    "NVIDIA B200": "nvlink5",
    "NVIDIA GB200": "nvlink5",
    "NVIDIA B300 SXM6 AC": "nvlink5",
}

# System in nccl_measured.csv -> link, for groups in a node.
LINKS = {
    "DGX H100 (NVLink4 NVSwitch, NVLS)": "nvlink4",
    "p5.48xlarge H100 (NVLink4 NVSwitch, NVLS)": "nvlink4",
    "H200 HGX (NVLink4 NVSwitch, NVLS)": "nvlink4",
    "A100 HGX (NVLink3 NVSwitch)": "nvlink3",
    "A100 node (NVLink3)": "nvlink3",
    "V100 node (NVLink2)": "nvlink2",
    "p6-b200 B200 (NVLink5 NVSwitch)": "nvlink5",
}

# all_reduce_bench.py (stas00/ml-engineering) times the host's launch too: no small sizes of it.
_LAUNCH_SOURCE = "stas00"
_LAUNCH_BYTES = 64 << 20


class Net(NamedTuple):
    """What joins the nodes of a system: the family and name of its fabric, the link in a node."""

    family: str
    fabric: str
    link: str


# Alps was also run with NCCL_CROSS_NIC=1. That is not NCCL's default, and its large all-reduces
# fell apart from 64 nodes on. It is left out, as are forced algorithms, sockets and virtual NICs.
NETS = {
    "Alps GH200 (4/node NVLink4; 4x200G Slingshot)": Net("slingshot", "slingshot11", "nvlink4"),
    "Azure NDmv4 A100-80G (NVLink3; 8xHDR200 IB)": Net("infiniband", "hdr200", "nvlink3"),
    "H100 HGX (NVLink4; 8xNDR400 IB)": Net("infiniband", "ndr400", "nvlink4"),
    "H20 (NVLink4; RDMA) NVLS": Net("infiniband", "ndr400", "nvlink4"),
    "a3-mega H100 (NVLink4; 8x200G GPUDirect-TCPXO)": Net("tcpxo", "tcpxo200", "nvlink4"),
    "p4de.24xlarge A100-80G (NVLink3; 4x100G EFA)": Net("efa-v1", "efa-p4d", "nvlink3"),
    "p5.48xlarge H100 (NVLink4; 32x100G EFA)": Net("efa", "efa-p5", "nvlink4"),
    "p5en H200 (NVLink4; 16x200G EFA), ring": Net("efa", "efa-p5", "nvlink4"),
    "p6-b200 B200 (NVLink5; 8x400G EFAv4)": Net("efa", "efa-p6", "nvlink5"),
}

# The start-up test of nanotron in the HF playbook; its figure of bandwidth by nodes says 256 MB. In
# most runs of many nodes the logged bandwidth falls as 1 / ranks, for all kinds alike, which is the
# set-up of connections: equal jobs that logged 38 and 189 GB/s trained equally fast. So the 90th
# percentile over the runs is taken.
_LOGGED_BYTES = 256 << 20
_LOGGED = Net("efa", "efa-p5", "nvlink4")


# Its groups of 2 and 4 are wired as a cube mesh, which no cluster here has.
_CUBE_MESH = "V100 node (NVLink2)"

_SINGLE_OP_SOURCE = "DebarghaG/estimate-train-time@1ac4d5e"


class Sample(NamedTuple):
    """One published time of a collective in a node."""

    link: str
    kind: str
    ranks: int
    size_bytes: int
    time_us: float
    source: str


def _rows(path: Path) -> Iterator[dict[str, str]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    yield from csv.DictReader(text.splitlines())


def read_samples(folder: Path) -> Iterator[Sample]:
    """Yield the times in a node of all three files."""
    for row in _rows(folder / "kernels.csv"):
        link = KERNEL_LINKS.get(row["gpu"])
        if row["kind"] == "collective" and row["unit"] == "ms" and link is not None:
            size_bytes = int(float(row["message_bytes"]))
            time_us = 1e3 * float(row["value"])
            kind, ranks = KINDS[row["collective"]], int(row["gpus"])
            yield Sample(link, kind, ranks, size_bytes, time_us, "NVIDIA AIConfigurator")
    for row in _rows(folder / "nccl_measured.csv"):
        link = LINKS.get(row["system"])
        if link is None or row["nodes"] != "1" or row["collective"] not in KINDS:
            continue
        if row["system"] == _CUBE_MESH and row["gpus"] != "8":
            continue
        source, size_bytes = row["source"].split(":")[0], int(row["bytes"])
        if not source.startswith(_LAUNCH_SOURCE) or size_bytes >= _LAUNCH_BYTES:
            kind, ranks = KINDS[row["collective"]], int(row["gpus"])
            yield Sample(link, kind, ranks, size_bytes, float(row["time_us"]), source)


def read_crossings(folder: Path) -> Iterator[Crossing]:
    """Yield the times between nodes of all three files."""
    for row in _rows(folder / "nccl_measured.csv"):
        net, nodes, size = NETS.get(row["system"]), int(row["nodes"]), int(row["gpus"])
        if net is None or nodes < 2 or row["collective"] not in KINDS:
            continue
        yield Crossing(
            family=net.family,
            system=row["system"],
            fabric=net.fabric,
            link=net.link,
            kind=KINDS[row["collective"]],
            size=size,
            per_node=size // nodes,
            size_bytes=int(row["bytes"]),
            time_us=float(row["time_us"]),
            source=row["source"].split(":")[0],
        )
    yield from _logged(folder)
    yield from _vista(folder)


def _logged(folder: Path) -> Iterator[Crossing]:
    for row in _rows(folder / "kernels.csv"):
        best = re.search(r"p90=([\d.]+)", row["notes"])
        if row["source"].startswith("HF ultrascale") and best and int(row["gpus"]) > 8:
            kind, size = KINDS[row["collective"]], int(row["gpus"])
            passed = ring_traffic(kind, size) * _LOGGED_BYTES
            time_us = passed / (1e3 * float(best[1]))
            system, source = "HF playbook", row["source_url_or_repo_path"].split(":")[1]
            yield Crossing(*_LOGGED[:1], system, *_LOGGED[1:], kind, size, 8, _LOGGED_BYTES,
                           time_us, source)  # fmt: skip


def _vista(folder: Path) -> Iterator[Crossing]:
    """Yield the all-reduces of Vista, one GPU a node, in fp16; medians by powers of two.

    Its all-gathers of more than two nodes show impossible times, and so does Perlmutter between
    nodes, where the groups went over sockets (1.2 GB/s). These are left out.
    """
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in _rows(folder / "ett_kernels.csv.gz"):
        if row["system"] == "Vista" and row["op"] in ("allreduce", "allreduce_large"):
            size_bytes = 2 * float(row["elements"])
            exponent = round(math.log2(size_bytes))
            time_us = float(row["time_us"]) * 2.0**exponent / size_bytes
            found[int(row["nodes"]), exponent].append(time_us)
    for (ranks, exponent), times in sorted(found.items()):
        yield Crossing("infiniband", "Vista", "ndr400", "nvlink4", "all_reduce", ranks, 1,
                       1 << exponent, statistics.median(times), _SINGLE_OP_SOURCE)  # fmt: skip


def build_curves(samples: Iterable[Sample]) -> dict[tuple[str, str, int], Curve]:
    """Return of each (link, kind, ranks) its smallest size and the times at its doublings.

    A sample is moved to the nearest power of two by the ratio of the sizes; a source counts once
    a size (its median), and a size has the geometric mean of its sources.
    """
    found: dict[tuple[str, str, int], dict[int, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for sample in samples:
        exponent = round(math.log2(sample.size_bytes))
        # Below a MiB a time is latency and does not follow its size.
        ratio = 2.0**exponent / sample.size_bytes if exponent > 20 else 1.0
        sources = found[sample.link, sample.kind, sample.ranks][exponent]
        sources[sample.source].append(ratio * sample.time_us)
    result = {}
    for key, sizes in sorted(found.items()):
        exponents = sorted(sizes)
        if exponents != list(range(exponents[0], exponents[-1] + 1)):
            raise ValueError(f"{key} has sizes 2^{exponents}; a curve needs every doubling")
        times = [
            statistics.geometric_mean(map(statistics.median, sources.values()))
            for _, sources in sorted(sizes.items())
        ]
        result[key] = (1 << exponents[0], never_falling(times))
    return result


def inside_step_us(curves: Curves) -> float:
    """Return what one more rank of a node adds to a small all-gather or reduce-scatter.

    The median over links and kinds of (time of 8 - time of 2) / 6 at the smallest size.
    """
    return statistics.median(
        (times[0] - curves[link, kind, 2][1][0]) / 6
        for (link, kind, ranks), (_, times) in sorted(curves.items())
        if kind in ("all_gather", "reduce_scatter") and ranks == 8
    )


def _send_recv_share(folder: Path) -> float:
    """Return the share of the wire rate of messages of 16 MiB and more between two nodes."""
    rate = fabric_preset("ndr400").bytes_per_s
    shares = []
    for row in _rows(folder / "ett_kernels.csv.gz"):
        if row["system"] == "Vista" and row["op"] == "p2p":
            size_bytes = 2 * float(row["elements"])
            if size_bytes >= 16 << 20:
                shares.append(1e6 * size_bytes / (float(row["time_us"]) * rate))
    return statistics.median(shares)


def _all_to_all(
    crossings: Iterable[Crossing], curves: Curves, families: Mapping[str, Family]
) -> tuple[float, float]:
    """Return (share of the wire rate, us of each remote member) of whole-node all-to-alls.

    Each member sends (n - g) / n of its buffer over its own NIC share; a small one costs what
    it costs inside, a hop, and a post for each of the n - g remote members.
    """
    found = sorted(
        (crossing.size_bytes, crossing)
        for crossing in crossings
        if crossing.kind == "all_to_all" and crossing.per_node == 8
    )
    (_, small), (_, large) = found[0], found[-1]
    remote = large.size - large.per_node
    rate = 1e6 * remote / large.size * large.size_bytes / large.time_us
    inside_us = curves[small.link, small.kind, small.per_node][1][0]
    post_us = (small.time_us - inside_us - families[small.family].hops_us[0]) / remote
    return rate / fabric_preset(large.fabric).bytes_per_s, post_us


def _used_nics(folder: Path) -> float:
    """Return how many NIC shares of an NVL72 rack one all-reduce over racks fills.

    From the two largest sizes of two racks, each NIC share at the full wire rate.
    """
    points = sorted(
        (int(row["bytes"]), float(row["time_us"]))
        for row in _rows(folder / "nccl_measured.csv")
        if row["system"] == "GB200 NVL72 2 racks (MNNVL + IB)"
    )
    (few_bytes, few_us), (many_bytes, many_us) = points[-2:]
    rate = 1e6 * (many_bytes - few_bytes) / (many_us - few_us)
    return rate / fabric_preset("ndr400").bytes_per_s


_PCIE_SOURCE = "NVIDIA/nccl#1639: 8 GPUs on PCIe 5 reach 28 of 63 GB/s, on NVLink 3 235 of 300"
_XGMI_SOURCE = "oracle-quickstart/oci-hpc-oke@61d210a: 358 of 448 GB/s over two nodes, as A100"

# Links without curves of their own: whose curves they take, the share of the wire rate they reach
# beside that link's, and how many members a mesh needs to use all its links (0: a switch).
RELATIVES = (
    *((f"pcie{generation}", "nvlink3", 0.57, 0, _PCIE_SOURCE) for generation in (3, 4, 5)),
    ("xgmi-mi300x", "nvlink3", 1.0, 8, _XGMI_SOURCE),
    (
        "nvlink2-mesh4",
        "nvlink3",
        1.0,
        4,
        "definition: the mesh of nvlink3-mesh4, a generation before",
    ),
    ("nvlink3-mesh4", "nvlink3", 1.0, 4, f"Perlmutter in a node agrees: {_SINGLE_OP_SOURCE}"),
    (
        "nvlink4-mesh4",
        "nvlink4",
        1.0,
        4,
        "Alps in a node agrees: boeschf/nccl-benchmark-on-alps-2025",
    ),
)

# Fabric -> family, and whether the family was measured on that very fabric.
FABRICS = {
    "ndr400": ("infiniband", True),
    "hdr200": ("infiniband", True),
    "xdr800": ("infiniband", False),
    "hdr100": ("infiniband", False),
    "edr100-shared": ("infiniband", False),
    "opa100-4": ("infiniband", False),
    "roce400": ("infiniband", False),
    "roce200": ("infiniband", False),
    "roce100": ("infiniband", False),
    "efa-p5": ("efa", True),
    "efa-p6": ("efa", True),
    "efa-p4d": ("efa-v1", True),
    "slingshot11": ("slingshot", True),
    "tcpxo200": ("tcpxo", True),
}

HEAD = """\
# Collective times, written by `python -m profiles.published.collectives FOLDER`.
#
# inside: what a further rank of a node adds to a ring.
# messages: share of the wire rate in all-to-alls and messages between nodes, the post of an
# all-to-all for each remote member, and the NIC shares of a node that one group can fill.
# families: share of the wire rate, ring step between nodes, and a tree hop's time by message size.
# curves: us at doublings of `smallest_bytes`, for `ranks` of one node.
"""


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def main(folder: Path) -> None:
    """Write the data file from the published files in `folder`."""
    samples, crossings = list(read_samples(folder)), list(read_crossings(folder))
    curves = build_curves(samples)
    step_us = inside_step_us(curves)
    families = fit(crossings, curves, step_us)
    share, post_us = _all_to_all(crossings, curves, families)
    lines = [HEAD, "[inside]", f"step_us = {step_us:.4g}", "", "[messages]"]
    lines += [f"all_to_all_share = {share:.4g}", f"all_to_all_post_us = {post_us:.4g}"]
    lines += [f"send_recv_share = {_send_recv_share(folder):.4g}"]
    lines += [f"used_nics = {_used_nics(folder):.4g}"]
    lines += [
        f'source = "microsoft/mscclpp@85e664c2; {_SINGLE_OP_SOURCE}; coreweave/nccl-tests@cb86553"'
    ]
    lines += [f'date = "{DATE}"']
    for link, relative, share_of_rate, mesh, source in RELATIVES:
        lines += ["", "[[relatives]]", f'link = "{link}"', f'of = "{relative}"']
        lines += [f"share = {share_of_rate}", f"mesh = {mesh}"]
        lines += [f'source = "{source}"', f'date = "{DATE}"']
    lines += ["", "[fabrics]"]
    for name, (family, is_measured) in FABRICS.items():
        lines.append(
            f'{name} = {{ family = "{family}", is_measured = {str(is_measured).lower()} }}'
        )
    for name, found in families.items():
        kinds = ", ".join(f'"{kind}"' for kind in found.kinds)
        lines += ["", f"[families.{name}]", f"efficiency = {found.efficiency:.4g}"]
        lines += [f"step_us = {found.step_us:.4g}", f"sizes_bytes = {found.sizes_bytes}"]
        lines += [f"hops_us = {_rounded(found.hops_us)}", f"most_nodes = {found.most_nodes}"]
        lines += [
            f"kinds = [{kinds}]",
            f'source = "{"; ".join(found.sources)}"',
            f'date = "{DATE}"',
        ]
    sources: dict[tuple[str, str, int], set[str]] = defaultdict(set)
    for sample in samples:
        sources[sample.link, sample.kind, sample.ranks].add(sample.source)
    for key, (smallest, times) in curves.items():
        link, kind, ranks = key
        lines += ["", "[[curves]]", f'link = "{link}"', f'kind = "{kind}"', f"ranks = {ranks}"]
        lines += [f"smallest_bytes = {smallest}", f"times_us = {_rounded(times)}"]
        lines += [f'source = "{"; ".join(sorted(sources[key]))}"', f'date = "{DATE}"']
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
