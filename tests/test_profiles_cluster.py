"""Clusters with pods: the graph of the fabric, collectives over it, and what a job file says."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.cluster import ClusterSpec, LinkSpec, UplinkSpec
from profiles.collective_curves import KINDS, Group, collective
from profiles.errors import InvalidInputError
from profiles.job import read_job
from profiles.presets import cluster_preset, fabric_preset, link_preset

UPLINKS = UplinkSpec(pod_nodes=2, oversubscription=4.0, source="made up", date="2026-01-01")
JOB = """
[model]
preset = "llama-3-8b"
[workload]
seq_len = 8192
global_batch = 128
dtype = "bf16"
[cluster]
preset = "h100-sxm"
nodes = 16
"""


def crossed(cluster: ClusterSpec, source: int, target: int) -> list[LinkSpec]:
    graph = cluster.fabric()
    way = nx.shortest_path(graph, source, target)
    return [graph.edges[edge]["link"] for edge in nx.utils.pairwise(way)]


# The graph.


def test_a_message_crosses_the_tiers_between_its_ends() -> None:
    cluster = replace(cluster_preset("h100-sxm", num_nodes=5), uplinks=UPLINKS)
    link, nic = cluster.pools[0].intra_node, fabric_preset("ndr400")
    uplink = replace(nic, name="ndr400-uplink", bytes_per_s=nic.bytes_per_s / 4,
                     source="made up", date="2026-01-01")  # fmt: skip
    assert crossed(cluster, 0, 7) == [link, link]
    assert crossed(cluster, 0, 15) == [link, nic, nic, link]
    assert crossed(cluster, 0, 39) == [link, nic, uplink, uplink, nic, link]
    assert nx.is_tree(cluster.fabric())
    assert set(cluster.fabric()["spine"]) == {"pod0", "pod1", "pod2"}


def test_a_cluster_that_fits_in_one_pod_has_no_tier_more() -> None:
    flat = cluster_preset("h100-sxm", num_nodes=2)
    podded = replace(flat, uplinks=UPLINKS).fabric()
    assert nx.utils.graphs_equal(flat.fabric(), podded)
    assert set(podded["spine"]) == {"node0", "node1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pod_nodes": 0}, "uplinks.pod_nodes is 0; it must be at least 1"),
        ({"oversubscription": 0.5}, "uplinks.oversubscription is 0.5; it must be at least 1"),
        ({"oversubscription": math.nan}, "uplinks.oversubscription is nan"),
        ({"oversubscription": math.inf}, "uplinks.oversubscription is inf"),
    ],
)
def test_uplinks_that_cannot_be_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(UPLINKS, **change)  # type: ignore[arg-type]


# Collectives.


def ns(kind: str, group: Group, size_bytes: int, oversubscription: float = 1.0) -> float:
    links = link_preset("nvlink4"), fabric_preset("hdr100")
    return collective(kind, group, size_bytes, *links, oversubscription).ns


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """Draw a group over at least two pods, whole in each."""
    per_node = draw(st.sampled_from((1, 2, 4, 8)))
    per_pod = per_node * draw(st.integers(1, 16))
    return Group(per_pod * draw(st.integers(2, 8)), per_node, per_pod)


SIZES = st.integers(0, 40).map(lambda power: 1 << power)
RATIOS = st.floats(1, 64)


@given(st.sampled_from(KINDS), groups(), SIZES, RATIOS, RATIOS)
def test_less_uplink_is_never_faster(
    kind: str, group: Group, size_bytes: int, one: float, other: float
) -> None:
    if kind == "send_recv":
        group = Group(2, 1, group.per_pod)
    inside = ns(kind, group._replace(per_pod=math.inf), size_bytes)
    less, more = (ns(kind, group, size_bytes, each) for each in sorted((one, other)))
    assert inside <= less <= more < math.inf
    assert ns(kind, group, size_bytes, 1.0) == inside


@given(st.sampled_from(("all_reduce", "all_gather", "reduce_scatter")), groups(), SIZES, RATIOS)
def test_rings_with_members_enough_in_a_pod_lose_nothing(
    kind: str, group: Group, size_bytes: int, oversubscription: float
) -> None:
    """As many as NICs on a node times the oversubscription."""
    found = ns(kind, group, size_bytes, oversubscription)
    flat = ns(kind, group, size_bytes)
    if group.per_pod >= oversubscription * group.per_node:
        assert found == flat
    elif kind != "all_reduce":
        large = 1 << 50
        slower = oversubscription * group.per_node / group.per_pod
        ratio = ns(kind, group, large, oversubscription) / ns(kind, group, large)
        assert ratio == pytest.approx(slower, rel=1e-3)


@pytest.mark.parametrize(("per_pod", "slower"), [(1, 7.0), (2, 3.5), (4, 1.75), (7, 1.0), (8, 1.0)])
def test_rings_of_one_member_a_node_share_the_uplinks(per_pod: int, slower: float) -> None:
    group = Group(8 * per_pod, 1, per_pod)
    flat = ns("all_gather", group._replace(per_pod=math.inf), 1 << 50)
    assert ns("all_gather", group, 1 << 50, 7.0) / flat == pytest.approx(slower, rel=1e-4)


# Job files.


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], ClusterSpec]:
    def read_with(fabric: str) -> ClusterSpec:
        path = tmp_path / "job.toml"
        path.write_text(f"{JOB}fabric = {fabric}\n", encoding="ascii")
        return read_job(path).cluster

    return read_with


def test_a_job_file_names_the_pods_of_a_fabric(read: Callable[[str], ClusterSpec]) -> None:
    found = read(
        '{ preset = "efa-p5", pod_nodes = 4, oversubscription = 7, source = "floor plan" }'
    )
    assert found.inter_node == fabric_preset("efa-p5")
    assert found.uplinks == UplinkSpec(
        pod_nodes=4, oversubscription=7.0, source="floor plan", date="not given"
    )
    slower = read('{ preset = "efa-p5", rate = "200 Gb/s", pod_nodes = 4, oversubscription = 1.5 }')
    assert slower.inter_node is not None
    assert (slower.inter_node.name, slower.inter_node.bytes_per_s) == ("efa-p5-changed", 25e9)
    assert read('"efa-p5"').uplinks is None


@pytest.mark.parametrize(
    ("fabric", "problem"),
    [
        ('{ preset = "ndr400", pod_nodes = 4 }',
         "cluster.fabric.oversubscription is missing; it must be given"),
        ('{ preset = "ndr400", oversubscription = 2.0 }',
         "cluster.fabric.pod_nodes is missing; it must be given"),
        ('{ preset = "ndr400", pod_nodes = 0, oversubscription = 2.0 }',
         "cluster.fabric.pod_nodes is 0; it must be at least 1"),
        ('{ preset = "ndr400", pod_nodes = 4, oversubscription = 0.5 }',
         "cluster.fabric.oversubscription is 0.5; it must be at least 1"),
        ('{ preset = "ndr400", pods = 4 }', "cluster.fabric.pods is 4; it must be absent"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_pods_is_told(
    read: Callable[[str], ClusterSpec], fabric: str, problem: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read(fabric)
    assert problem in str(caught.value)
