"""Wiring: matrices of `nvidia-smi topo -m` as they are printed, a made-up /sys, nodes joined."""

import os
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.fabric import Fabric, FabricLink, FabricNode, graph, merged
from profiles.files import canonical_json, from_plain, plain
from profiles.topology import TopoMatrix, local_fabric, parse_topo

GOLDEN = Path(__file__).parent / "golden"

# Which port is the default RDMA device of each GPU. Source: NVIDIA DGX H100 User Guide, network
# modules, table 6.
DGX_H100_PORTS = {
    "GPU0": "mlx5_0", "GPU1": "mlx5_3", "GPU2": "mlx5_4", "GPU3": "mlx5_5",
    "GPU4": "mlx5_6", "GPU5": "mlx5_9", "GPU6": "mlx5_10", "GPU7": "mlx5_11",
}  # fmt: skip


def topo(name: str) -> str:
    return (GOLDEN / f"topo_{name}.txt").read_text(encoding="ascii")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def two_sockets(system: Path) -> None:
    """Write the part of /sys that tells of two sockets, each with a NUMA node and a port."""
    for cpu in range(4):
        folder = f"devices/system/cpu/cpu{cpu}/topology"
        write(system, {f"{folder}/physical_package_id": f"{cpu // 2}\n"})
    write(
        system,
        {
            "devices/system/node/node0/cpulist": "0-1\n",
            "devices/system/node/node1/cpulist": "2-3\n",
            "devices/system/node/node2/cpulist": "\n",  # the memory of a GPU, or of a CXL card
            "class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
            "class/infiniband/mlx5_0/ports/1/link_layer": "InfiniBand\n",
            "class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
            "class/infiniband/mlx5_0/device/numa_node": "0\n",
            "class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
            "class/infiniband/mlx5_1/device/numa_node": "1\n",
            "class/net/eth0/speed": "25000\n",
            "class/net/eth0/operstate": "up\n",
            "class/net/eth0/device/numa_node": "-1\n",
            "class/net/lo/operstate": "unknown\n",
        },
    )
    # The Ethernet name of the same port: one device, drawn once.
    (system / "class/net/ib0").mkdir()
    (system / "class/net/ib0/device").symlink_to(system / "class/infiniband/mlx5_0/device")


@pytest.fixture
def dgx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fabric:
    """The wiring of a DGX H100 as a program named nvidia-smi tells it, over two sockets."""
    tools = tmp_path / "bin"
    names = "NVIDIA H100 80GB HBM3, 81559, 700.00, 580.95.05\n" * 8
    write(tools, {"topo": topo("dgx_h100"), "names": names})
    script = f'#!/bin/sh\ncase "$1" in topo) cat {tools}/topo;; *) cat {tools}/names;; esac\n'
    write(tools, {"nvidia-smi": script})
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    two_sockets(tmp_path / "sys")
    return local_fabric("node0", tmp_path / "sys")


def test_a_dgx_h100_is_read_as_its_manual_draws_it() -> None:
    matrix = parse_topo(topo("dgx_h100"))
    assert matrix.gpus == tuple(f"GPU{i}" for i in range(8))
    assert matrix.nics == tuple(f"mlx5_{i}" for i in range(12))
    assert matrix.numa == {f"GPU{i}": (i // 4,) for i in range(8)}
    assert len(matrix.hops) == 8 * 7 // 2 + 8 * 12
    nearest = {gpu: nic for (gpu, nic), hop in matrix.hops.items() if hop == "PXB"}
    assert nearest == DGX_H100_PORTS
    between = {hop for pair, hop in matrix.hops.items() if pair[1].startswith("GPU")}
    assert between == {"NV18"}


def test_older_output_names_its_ports_and_underlines_its_header() -> None:
    matrix = parse_topo(topo("a100_pcie"))
    assert matrix.nics == ("mlx5_0", "mlx5_1")
    assert matrix.numa == {"GPU0": (0,), "GPU1": (0,), "GPU2": (1,), "GPU3": (1,)}
    assert matrix.hops == {
        ("GPU0", "GPU1"): "NV12", ("GPU0", "GPU2"): "SYS", ("GPU0", "GPU3"): "SYS",
        ("GPU0", "mlx5_0"): "PXB", ("GPU0", "mlx5_1"): "SYS",
        ("GPU1", "GPU2"): "SYS", ("GPU1", "GPU3"): "SYS",
        ("GPU1", "mlx5_0"): "NODE", ("GPU1", "mlx5_1"): "SYS",
        ("GPU2", "GPU3"): "PHB", ("GPU2", "mlx5_0"): "SYS", ("GPU2", "mlx5_1"): "PIX",
        ("GPU3", "mlx5_0"): "SYS", ("GPU3", "mlx5_1"): "PHB",
    }  # fmt: skip


def test_a_single_gpu_has_no_hops_and_an_unknown_numa_node() -> None:
    matrix = parse_topo(topo("single_gpu"))
    assert matrix == TopoMatrix(gpus=("GPU0",), nics=(), numa={"GPU0": ()}, hops={})


@pytest.mark.parametrize("text", ["", "Failed to initialize NVML: Driver/library version mismatch"])
def test_what_is_no_matrix_has_no_gpus(text: str) -> None:
    assert parse_topo(text) == TopoMatrix(gpus=(), nics=(), numa={}, hops={})


@given(st.text(max_size=200))
def test_no_text_breaks_the_parser(text: str) -> None:
    parse_topo(text)
    parse_topo(f"\tGPU0\tGPU1\n{text}\nGPU0\t{text}")


def test_a_node_is_drawn_with_sockets_memory_gpus_and_ports(dgx: Fabric) -> None:
    kinds = [node.kind for node in dgx.nodes]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "node": 1, "cpu": 2, "numa": 3, "gpu": 8, "nic": 12 + 1,
    }  # fmt: skip
    labels = {node.name: node.label for node in dgx.nodes}
    assert labels["node0/gpu7"] == "NVIDIA H100 80GB HBM3"
    assert labels["node0/mlx5_0"] == "400 Gb/s InfiniBand"
    assert labels["node0/mlx5_1"] == "down"
    assert labels["node0/eth0"] == "25 Gb/s Ethernet"
    assert (labels["node0/numa1"], labels["node0/numa2"]) == ("cpus 2-3", "no cpus")
    assert nx.is_connected(graph(dgx))
    assert list(dgx.nodes) == sorted(dgx.nodes, key=lambda node: node.name)
    edges = {(link.first, link.second): link.kind for link in dgx.links}
    assert edges["node0/gpu4", "node0/numa1"] == "PCIe"
    assert edges["node0/mlx5_0", "node0/numa0"] == "PCIe"
    assert edges["node0", "node0/eth0"] == "PCIe"
    assert edges["node0", "node0/numa2"] == "memory"
    assert from_plain(Fabric, plain(dgx), "found", "run again") == dgx


def test_the_graph_has_the_links_of_the_matrix(dgx: Fabric) -> None:
    edges = graph(dgx).edges
    assert edges["node0/gpu0", "node0/gpu7"]["kind"] == "NV18"
    assert edges["node0/gpu1", "node0/mlx5_3"]["kind"] == "PXB"
    assert edges["node0/gpu0", "node0/numa0"]["kind"] == "PCIe"


def test_nodes_meet_in_the_network_through_the_ports_that_are_up(
    dgx: Fabric, tmp_path: Path
) -> None:
    other = local_fabric("node1", tmp_path / "sys")
    both = merged([dgx, other])
    ports = {link.first for link in both.links if link.second == "network"}
    # The made-up /sys knows two ports that are up or down; what it does not tell of counts as up.
    assert ports == {
        f"node{i}/{port}" for i in (0, 1)
        for port in ("eth0", *(f"mlx5_{n}" for n in range(12) if n != 1))
    }  # fmt: skip
    assert len(both.nodes) == len(dgx.nodes) + len(other.nodes) + 1
    way = nx.shortest_path(graph(both), "node0/gpu0", "node1/gpu0")
    assert way[2] == "network"
    assert canonical_json(merged([other, dgx])) == canonical_json(both)


def test_a_node_alone_stays_as_it_is_and_names_must_differ(dgx: Fabric) -> None:
    assert merged([dgx]) == dgx
    assert merged([]) == Fabric()
    with pytest.raises(ValueError, match="two fabrics have a vertex node0"):
        merged([dgx, dgx])


def test_a_machine_that_tells_nothing_is_one_vertex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert local_fabric("n", tmp_path) == Fabric(
        nodes=(FabricNode(name="n", kind="node", label="n"),)
    )


def test_edges_keep_their_kind_in_the_graph() -> None:
    ends = tuple(FabricNode(name=name, kind="gpu", label=name) for name in "ab")
    drawn = graph(Fabric(nodes=ends, links=(FabricLink(first="a", second="b", kind="PIX"),)))
    assert drawn.edges["a", "b"] == {"kind": "PIX"}
    assert drawn.nodes["a"] == {"kind": "gpu", "label": "a"}
