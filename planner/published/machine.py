"""The machine of a published run: its GPU, nodes and links out of the texts that sources write."""

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

from planner.published.words import shown
from profiles.cluster import ClusterSpec, GpuSpec, LinkSpec, PoolSpec
from profiles.errors import UnsupportedError
from profiles.presets import (
    cluster_preset,
    cluster_presets,
    fabric_preset,
    fabric_presets,
    gpu_preset,
    gpu_presets,
    link_preset,
)


class Machine(NamedTuple):
    """A cluster, and what was assumed on the way to it."""

    cluster: ClusterSpec
    remarks: tuple[str, ...]


class _Relative(NamedTuple):
    """A pattern of a GPU's name, the presets it may be (the first that exists), and a remark."""

    pattern: str
    presets: tuple[str, ...]
    remark: str = ""
    link_bytes_per_s: float = 0.0


_GPUS = (
    _Relative(r"gb300", ("gb300",)),
    _Relative(r"gb200", ("gb200",)),
    _Relative(r"b300", ("b300-sxm",)),
    _Relative(r"b200", ("b200-sxm",)),
    _Relative(r"gh200", ("gh200", "h100-sxm"), "GH200 is taken as H100 SXM, the same silicon"),
    _Relative(r"h200", ("h200-sxm",)),
    _Relative(
        r"h800", ("h800", "h100-sxm"), "H800 is taken as H100 SXM with 400 GB/s NVLink", 2e11
    ),
    _Relative(r"h100.*(pcie|nvl\b)", ("h100-pcie",)),
    _Relative(r"h100", ("h100-sxm",)),
    _Relative(
        r"a800", ("a800", "a100-sxm-80gb"), "A800 is taken as A100 SXM with 400 GB/s NVLink", 2e11
    ),
    _Relative(
        r"a100.*pcie.*40|a100.*40.*pcie",
        ("a100-pcie-40gb", "a100-sxm-40gb"),
        "A100 PCIe is taken as A100 SXM on PCIe 4, the same silicon at less power",
        31e9,
    ),
    _Relative(
        r"a100.*pcie",
        ("a100-pcie-80gb", "a100-sxm-80gb"),
        "A100 PCIe is taken as A100 SXM on PCIe 4, the same silicon at less power",
        31e9,
    ),
    _Relative(r"a100.*40 ?g", ("a100-sxm-40gb",)),
    _Relative(r"a100", ("a100-sxm-80gb",)),
    _Relative(r"l40s", ("l40s",)),
    _Relative(r"v100", ("v100-sxm2-32gb",)),
    _Relative(r"mi300x", ("mi300x",)),
)
_RATE = re.compile(r"(\d{1,5}(?:\.\d{1,3})?) ?([TG])(B|b)?(?:it|ps|/s|p/s|E\b| ?/ ?s)?")
_COUNT = re.compile(r"\b(\d{1,3}) ?x")
_FAMILIES = (
    (r"\befa\b|\baws\b", r"efa"),
    (r"slingshot|cray", r"slingshot"),
    (r"tcpx", r"tcpxo"),
    (r"roce|ethernet|gbe|tcp|gvnic", r"roce"),
    (r"omni.?path|\bopa\b", r"opa"),
    (r"infiniband|\bib\b|[hexn]dr|connectx", r"ndr|hdr|edr|xdr"),
)
"""A pattern of a fabric's text, and of the presets that have its latency."""
_GENERATIONS = ((r"xdr", 800.0), (r"ndr", 400.0), (r"hdr", 200.0), (r"edr|omni.?path", 100.0))
_LOGGED = re.compile(r"NCCL busbw logged AR/AG/RS = [0-9.]+/([0-9]+(?:\.[0-9]+)?)/")
_ON_HOST = re.compile(r"^(?!.*(roce|rdma|tcpx)).*(tcp|socket|gvnic|ethernet|gbe)", re.DOTALL)
"""Ethernet without RDMA: the cores of the host move the bytes."""
_MESHES = {"nvlink3": "nvlink3-mesh4", "nvlink4": "nvlink4-mesh4"}
"""Nodes of four GPUs have no switch: the link of such a node."""
_NVLINK_DOMAIN = 72


@lru_cache(maxsize=4096)
def read_machine(
    gpu: str, gpu_mem_gb: float, gpus: int, gpus_per_node: int, intra: str, inter: str
) -> Machine:
    """Return the cluster of `gpus` GPUs; 0 and empty texts stand for what is not stated.

    Nodes are full: where the GPUs are fewer than a node has, or do not fill the nodes, a node is
    taken to have the largest number that does. Raises UnsupportedError for an unknown GPU.

    >>> machine = read_machine("H100-SXM5-80GB", 80.0, 16, 8, "NVLink4 900GB/s (bidir)",
    ...                        "AWS EFA 3200 Gb/s per node")
    >>> machine.cluster.inter_node.bytes_per_s, machine.remarks
    (50000000000.0, ())
    """
    spec, relative, remarks = _read_gpu(gpu, gpu_mem_gb)
    node, usual = _node(spec.name)
    wanted = node.gpus_per_node
    if gpus_per_node and node.gpus_per_node < _NVLINK_DOMAIN:
        wanted = gpus_per_node
    per_node = max(size for size in range(1, min(wanted, gpus) + 1) if gpus % size == 0)
    if per_node < min(wanted, gpus):
        remarks += (f"{gpus} GPUs do not fill nodes of {wanted}: taken as nodes of {per_node}",)
    link, said = _read_intra(intra, node.intra_node, relative.link_bytes_per_s)
    if gpus_per_node == 4 and link.name in _MESHES:
        link = replace(link_preset(_MESHES[link.name]), bytes_per_s=link.bytes_per_s)
    num_nodes, fabric = gpus // per_node, None
    if num_nodes > 1:
        fabric, more = _read_inter(inter, gpus_per_node or node.gpus_per_node, usual)
        said += more
    pool = PoolSpec(gpu=spec, gpus_per_node=per_node, num_nodes=num_nodes, intra_node=link)
    cluster = ClusterSpec(name=f"{num_nodes} x {spec.name}", pools=(pool,), inter_node=fabric)
    return Machine(cluster, remarks + said)


def _read_gpu(text: str, memory_gb: float) -> tuple[GpuSpec, _Relative, tuple[str, ...]]:
    words = text.lower()
    found = next((gpu for gpu in _GPUS if re.search(rf"(?<![a-z0-9]){gpu.pattern}", words)), None)
    name = next((name for name in found.presets if name in gpu_presets()), "") if found else ""
    if found is None or not name:
        raise UnsupportedError(f"gpu is {shown(text)}; known are {', '.join(gpu_presets())}")
    remarks: tuple[str, ...] = ()
    if name.startswith("a100") and not memory_gb and not re.search(r"[48]0 ?g", words):
        remarks += ("memory of the A100 not stated: 80 GB assumed",)
    if name == "a100-sxm-80gb" and 0 < memory_gb < 60:
        name = "a100-sxm-40gb"
    if found.remark and name != found.presets[0]:
        remarks += (found.remark,)
    spec = gpu_preset(name)
    if memory_gb and not any(
        abs(memory_gb * unit / spec.memory_bytes - 1) < 0.1 for unit in (1e9, 2.0**30)
    ):
        # A driver reports about 1.5 % less than the round number that a maker prints.
        memory = round(0.985 * memory_gb * 2**30)
        spec = replace(spec, memory_bytes=memory, source=f"{spec.source}; memory as stated")
        remarks += (f"{name} with {memory_gb:g} GB as stated",)
    return spec, found, remarks


@cache
def _node(gpu: str) -> tuple[PoolSpec, LinkSpec]:
    """Return the node that has `gpu`, and the fabric that joins such nodes."""
    for name in cluster_presets():
        cluster = cluster_preset(name, num_nodes=2)
        if cluster.pools[0].gpu.name == gpu and cluster.inter_node is not None:
            return cluster.pools[0], cluster.inter_node
    # Cards on PCIe stand in servers of many makers: such a node is taken as one of L40S.
    node, fabric = _node("l40s")
    link = link_preset("pcie5" if gpu.startswith("h") else "pcie4")
    return replace(node, gpu=gpu_preset(gpu), intra_node=link), fabric


def _read_intra(text: str, usual: LinkSpec, relative: float) -> tuple[LinkSpec, tuple[str, ...]]:
    """Return the link inside a node; a rate is both ways added up unless the text says one way."""
    words = text.lower()
    if "pcie" in words and "nvlink" not in words:
        return link_preset("pcie5" if re.search(r"(gen|pcie) ?\.?5", words) else "pcie4"), ()
    one_way = relative or usual.bytes_per_s
    if rate := _rate(text):
        is_one_way = re.search(r"one.?way|unidir|per direction|each (way|direction)", words)
        one_way = rate[1] if is_one_way else rate[1] / 2
    elif (version := re.search(r"nvlink ?([2-5])", words)) and not relative:
        usual = link_preset("nvlink" + version[1])
        one_way = usual.bytes_per_s
    if abs(one_way / usual.bytes_per_s - 1) < 0.05:
        return usual, ()
    link_spec = replace(usual, bytes_per_s=one_way, source=f"intra_node_link {shown(text)}")
    return link_spec, (f"link inside a node at {one_way / 1e9:.0f} GB/s one way",)


def _rate(text: str) -> tuple[int, float] | None:
    """Return how many links a text counts (0: it does not say) and the bytes/s of each.

    >>> _rate("4x Omni-Path 100 Gb/s"), _rate("3.2 Tbps"), _rate("900GB/s"), _rate("fast")
    ((4, 12500000000.0), (0, 400000000000.0), (0, 900000000000.0), None)
    """
    if (found := _RATE.search(text)) is None:
        return None
    rate = float(found[1]) * (1e12 if found[2] == "T" else 1e9) / (1 if found[3] == "B" else 8)
    count = _COUNT.search(text)
    return (int(count[1]) if count else 0, rate) if rate else None


def _read_inter(text: str, gpus_per_node: int, usual: LinkSpec) -> tuple[LinkSpec, tuple[str, ...]]:
    """Return one GPU's share of its node's NICs, and what was assumed.

    A count of links, or a rate above 400 Gb/s that does not say of what it is, is a node's.
    """
    words = text.lower()
    if not words:
        return usual, (f"fabric not stated: {usual.name}, the usual one",)
    family = next((names for pattern, names in _FAMILIES if re.search(pattern, words)), "")
    remarks: tuple[str, ...] = ()
    if rate := _rate(text):
        num_links, share = max(1, rate[0]), rate[1]
        is_of_gpu = bool(re.search(r"(per|/) ?gpu|per rank", words))
        is_of_node = bool(re.search(r"(per|/) ?(node|server|host|instance)|node.node", words))
        if not is_of_gpu and (is_of_node or rate[0] or share > 50e9):
            share *= num_links / gpus_per_node
    else:
        generation = next((gb for name, gb in _GENERATIONS if re.search(name, words)), 0.0)
        share = generation * 1e9 / 8 or usual.bytes_per_s
        remarks = (f"rate of {shown(text)} not stated: {share * 8 / 1e9:g} Gb/s a GPU assumed",)
    nearest = _nearest_fabric(family, share) if family else usual
    uses_host = bool(_ON_HOST.search(words))
    if abs(share / nearest.bytes_per_s - 1) < 0.02 and uses_host == nearest.uses_host:
        return nearest, remarks
    source = f"inter_node_link {shown(text)}"
    return replace(nearest, bytes_per_s=share, uses_host=uses_host, source=source), remarks


def _nearest_fabric(family: str, bytes_per_s: float) -> LinkSpec:
    names: Iterable[str] = (name for name in fabric_presets() if re.match(family, name))
    return min(
        (fabric_preset(name) for name in names),
        key=lambda link: abs(link.bytes_per_s - bytes_per_s),
    )


_BETWEEN_GB_PER_S = {2: 191.0, 4: 150.0, 8: 97.0, 16: 58.0}
"""Bus bandwidth of an all-gather over so many nodes of 8 H100 on EFA that lies between two kinds of
jobs of the HF sweep: medians 222, 228, 175 and 125 GB/s of one, 164, 99, 54 and 27 of the other.
"""


def as_logged(machine: Machine, notes: str) -> Machine:
    """Return the machine with the fabric that the run itself saw, where its notes log it.

    Jobs of the slower kind launch kernels as if cores were missing, so the host is taken to move
    the bytes.
    """
    cluster, found = machine.cluster, _LOGGED.search(notes)
    if found is None or cluster.inter_node is None:
        return machine
    num_nodes = cluster.pools[0].num_nodes
    between = _BETWEEN_GB_PER_S[min(_BETWEEN_GB_PER_S, key=lambda nodes: abs(nodes - num_nodes))]
    if float(found[1]) >= between:
        return machine
    slower = replace(cluster.inter_node, uses_host=True)
    remark = f"all-gathers logged at {found[1]} GB/s: the host moves what crosses nodes"
    return Machine(replace(cluster, inter_node=slower), (*machine.remarks, remark))
