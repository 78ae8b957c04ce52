"""Where groups sit: every rank looked at, published layouts, and flows of all groups at once."""

import math
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from itertools import pairwise, permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.layout import AXES, DEFAULT_ORDER, Layout
from planner.published.runs import PublishedRun, development_runs
from planner.reference.places import NOTHING, REPLICAS, Places
from planner.reference.program import INTER, INTRA
from planner.reference.spread import Mesh, Slice, fewest_together, ranks_per_leaver
from profiles.cluster import ClusterSpec, UplinkSpec
from profiles.errors import UnsupportedError
from profiles.presets import cluster_preset
from simulator.engine import simulate
from simulator.fabric import Fabric, fabric
from simulator.graph import Op, op_costs, task_graph
from tests.setups import group_ns

ORDERS = tuple("-".join(axes) for axes in permutations(AXES))
MEASURED = tomllib.loads(
    resources.files("profiles").joinpath("data", "collectives.toml").read_text("utf-8")
)
SHARE = MEASURED["families"]["infiniband"]["efficiency"]
MESSAGE_SHARE = MEASURED["messages"]["send_recv_share"]
"""Of the wire's rate, what collectives get and what a message alone gets."""
HUGE = 1 << 46
"""Bytes beside which no latency counts."""
RATE = 12.5e9
"""Of one NIC: slow enough that no node is busier with a collective than its NICs are."""


def layout_of(order: str = DEFAULT_ORDER, **degrees: int) -> Layout:
    tp, cp, dp, pp = (degrees.get(axis, 1) for axis in AXES)
    return Layout(tp=tp, cp=cp, dp=dp, pp=pp, micro_batch=1, num_microbatches=1,
                  stage_layers=(1,) * pp, order=order)  # fmt: skip


def mesh_of(layout: Layout) -> Mesh:
    return tuple((axis, getattr(layout, axis)) for axis in layout.order.split("-"))


def groups_of(layout: Layout, group: Slice) -> list[list[int]]:
    """Return the ranks of every group, by the places of the ranks on the mesh."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.num_ranks):
        place = layout.place(rank)._asdict()
        alike.setdefault(tuple(place[axis] for axis in AXES if axis not in group.axes), []).append(
            rank
        )
    span = group.size * group.step
    return [
        ranks[start + offset : start + span : group.step]
        for ranks in alike.values()
        for start in range(0, len(ranks) - span + 1, span)
        for offset in range(group.step)
    ]


@st.composite
def meshes(draw: st.DrawFn, degrees: st.SearchStrategy[int]) -> Layout:
    axes = {axis: draw(degrees) for axis in AXES}
    return layout_of(draw(st.sampled_from(ORDERS)), **axes)


@st.composite
def slices(draw: st.DrawFn, layout: Layout) -> Slice:
    """Draw a group of more than one rank, whole or every so many of the replicas."""
    axes = draw(st.sampled_from((*((axis,) for axis in AXES), REPLICAS)))
    whole = math.prod(getattr(layout, axis) for axis in axes)
    assume(whole > 1)
    step = draw(st.integers(1, whole // 2))
    return Slice(axes, draw(st.integers(2, whole // step)), step)


# How groups spread over blocks.


@settings(max_examples=300)
@given(st.data(), meshes(st.sampled_from((1, 2, 3, 4, 6))), st.integers(1, 40))
def test_the_spread_is_what_looking_at_every_rank_finds(
    data: st.DataObject, layout: Layout, block: int
) -> None:
    group = data.draw(slices(layout))
    together, leavers = group.size, Counter[int]()
    for ranks in groups_of(layout, group):
        members = Counter(rank // block for rank in ranks)
        if len(members) > 1:
            together = min(together, *members.values())
            leavers.update(members.keys())
    held = Counter(rank // block for rank in range(layout.num_ranks))
    assert fewest_together(mesh_of(layout), group, block) == together
    assert ranks_per_leaver(mesh_of(layout), group, block) == min(
        (held[place] / count for place, count in leavers.items()), default=math.inf
    )


@given(st.data(), meshes(st.sampled_from((1, 2, 4, 8))), st.sampled_from((2, 4, 8, 64)))
def test_where_all_is_even_both_ways_to_count_agree(
    data: st.DataObject, layout: Layout, block: int
) -> None:
    axes = data.draw(st.sampled_from((*((axis,) for axis in AXES), REPLICAS)))
    size = math.prod(getattr(layout, axis) for axis in axes)
    assume(size > 1)
    mesh, group = mesh_of(layout), Slice(axes, size)
    together = fewest_together(mesh, group, block)
    each = ranks_per_leaver(mesh, group, block)
    assert together == (each if each < math.inf else size)


# What that means for collectives.


def test_by_the_usual_order_published_layouts_sit_as_a_division_says() -> None:
    """Of a group whose members lie `stride` apart, a node has the ranks of one over it."""
    runs = [run for run in development_runs() if isinstance(run, PublishedRun)]
    cases = {
        (setup.layout.tp, setup.layout.cp, setup.layout.dp, setup.layout.pp,
         setup.layout.shard_ranks, setup.layout.ep, setup.cluster.pools[0].gpus_per_node)
        for run in runs for setup in run.setups
    }  # fmt: skip
    assert len(cases) > 200
    for tp, cp, dp, pp, shards, ep, node in cases:
        mesh = (("tp", tp), ("cp", cp), ("dp", dp), ("pp", pp))
        for group, stride in (
            (Slice(("tp",), tp), 1), (Slice(("cp",), cp), tp), (Slice(REPLICAS, cp * dp), tp),
            (Slice(REPLICAS, shards), tp), (Slice(REPLICAS, ep), tp),
            (Slice(REPLICAS, cp * dp // shards, shards), tp * shards),
        ):  # fmt: skip
            if group.size > 1:
                expected = max(1, min(group.size, node // stride))
                assert fewest_together(mesh, group, node) == expected
        if pp > 1:
            crosses = fewest_together(mesh, Slice(("pp",), pp), node) < pp
            assert crosses == (tp * cp * dp * pp > node)


def test_the_order_says_what_stays_in_a_node() -> None:
    cluster = cluster_preset("h100-sxm", num_nodes=8)
    usual = Places(layout=layout_of(dp=16, tp=2, pp=2), cluster=cluster)
    stages_first = Places(layout=layout_of("tp-pp-cp-dp", dp=16, tp=2, pp=2), cluster=cluster)
    replicas_first = Places(layout=layout_of("dp-cp-tp-pp", dp=16, tp=2, pp=2), cluster=cluster)
    size = 1 << 26
    for places, category, per_node in ((usual, INTER, 1), (stages_first, INTRA, 2)):
        found, time = places.message(size)
        assert (found, time.ns) == (category, group_ns("send_recv", 2, per_node, size))
    assert (usual.message_crosses, stages_first.message_crosses) == (True, False)
    assert (usual.tensor_crosses, replicas_first.tensor_crosses) == (False, True)
    for places, per_node in ((usual, 4), (stages_first, 2), (replicas_first, 8)):
        _, time = places.replicas("all_gather", size)
        assert time.ns == group_ns("all_gather", 16, per_node, size)
    assert replicas_first.tensor("all_reduce", size)[1].ns == group_ns("all_reduce", 2, 1, size)


def test_shards_are_the_innermost_replicas() -> None:
    cluster = cluster_preset("h100-sxm", num_nodes=8)
    layout = replace(layout_of(dp=16, cp=2, tp=2), sharding="zero3", shard_group=8)
    apart = replace(layout, order="tp-dp-pp-cp", shard_group=4, ep=4)
    size = 1 << 26
    found = Places(layout=layout, cluster=cluster)
    assert found.replicas("all_gather", size)[1].ns == group_ns("all_gather", 8, 4, size)
    assert found.shard_groups("all_reduce", size)[1].ns == group_ns("all_reduce", 4, 1, size)
    found = Places(layout=apart, cluster=cluster)
    assert found.replicas("all_gather", size)[0] == INTRA
    assert found.experts("all_to_all", size)[1].ns == group_ns("all_to_all", 4, 4, size)
    assert found.replicas("all_gather", size, copies=4) == (INTRA, NOTHING)


def test_what_does_not_fit_in_the_one_node_is_refused() -> None:
    places = Places(layout=layout_of(tp=16), cluster=cluster_preset("h100-sxm"))
    with pytest.raises(UnsupportedError, match="a group of 16 ranks does not fit in the one node"):
        places.tensor("all_reduce", 1024)
    assert places.replicas("all_reduce", 1024) == (INTRA, NOTHING)


# Pods under an oversubscribed layer, against flows of all groups at once.


def podded(layout: Layout, gpus: int, pod_nodes: int, oversubscription: float) -> ClusterSpec:
    """Return just the nodes that `layout` fills, `pod_nodes` of them to a pod."""
    base = cluster_preset("h100-sxm", num_nodes=2, fabric="hdr100")
    pool = replace(base.pools[0], gpus_per_node=gpus, num_nodes=layout.num_ranks // gpus)
    uplinks = UplinkSpec(
        pod_nodes=pod_nodes, oversubscription=oversubscription, source="made up", date="2026-01-01"
    )
    return replace(base, pools=(pool,), uplinks=uplinks)


def flows_over(cluster: ClusterSpec) -> Fabric:
    """Return the fabric of `cluster` for the event loop: shares of GPUs added up to links."""
    graph = cluster.fabric()
    per_node = cluster.pools[0].gpus_per_node
    for one, other, edge in graph.edges(data=True):
        below = {str(one), str(other)} - {"spine"}
        pod = next((int(name[3:]) for name in below if name.startswith("pod")), -1)
        num_gpus = per_node
        if "spine" in (one, other) and pod >= 0 and cluster.uplinks is not None:
            pod_nodes = cluster.uplinks.pod_nodes
            num_gpus *= min(pod_nodes, cluster.num_nodes - pod * pod_nodes)
        if not isinstance(one, int) and not isinstance(other, int):
            edge["bytes_per_s"] = num_gpus * edge["link"].bytes_per_s
    return fabric(graph)


def seconds(cluster: ClusterSpec, messages: Iterator[tuple[int, int, float]]) -> float:
    """Return when the last of these messages ends, (from, to, bytes), that start together."""
    of, shared = flows_over(cluster), Counter[tuple[int, int]]()
    for source, target, size_bytes in messages:
        shared[source, target] += round(size_bytes)
    ops = [
        Op(id=i, rank=source, stream=f"to {target}", name=f"message {i}", kind="other",
           path=of.path(source, target))
        for i, (source, target) in enumerate(shared)
    ]  # fmt: skip
    graph = task_graph(ops)
    sizes = [size * bool(op.path) for op, size in zip(ops, shared.values(), strict=True)]
    costs = op_costs(graph, 0, sizes)
    return int(simulate(graph, costs, links=of.links).ends_ns.max()) / 1e9


def ring(cluster: ClusterSpec, ranks: list[int], size: float) -> Iterator[tuple[int, int, float]]:
    """Yield what members pass on from node to node: a ring for each member of a node."""
    per_node = cluster.pools[0].gpus_per_node
    nodes: dict[int, list[int]] = {}
    for rank in ranks:
        nodes.setdefault(rank // per_node, []).append(rank)
    members = list(nodes.values())
    num_rings = min(map(len, members))
    passed = (len(ranks) - 1) / len(ranks) * size / num_rings
    for here, there in pairwise([*members, members[0]]):
        for source, target in zip(here[:num_rings], there[:num_rings], strict=True):
            yield source, target, passed


@st.composite
def spread_groups(draw: st.DrawFn, degrees: tuple[int, ...]) -> tuple[Places, Slice]:
    """Draw a layout on nodes with as many members each of the group, in pods of any size."""
    layout = draw(meshes(st.sampled_from(degrees)))
    gpus = draw(st.sampled_from((1, 2, 4)))
    assume(layout.num_ranks % gpus == 0 and gpus < layout.num_ranks <= 96)
    axes = draw(st.sampled_from((*((axis,) for axis in AXES), REPLICAS)))
    group = Slice(axes, math.prod(getattr(layout, axis) for axis in axes))
    nodes = [Counter(rank // gpus for rank in ranks) for ranks in groups_of(layout, group)]
    assume(len(nodes[0]) > 1 and len({count for node in nodes for count in node.values()}) == 1)
    cluster = podded(
        layout, gpus, draw(st.integers(1, 6)), draw(st.sampled_from((1.0, 2.0, 3.0, 7.0)))
    )
    return Places(layout=layout, cluster=cluster), group


@settings(max_examples=60, deadline=None)
@given(spread_groups((1, 1, 2, 3, 4)))
def test_rings_over_pods_take_what_the_flow_engine_says(drawn: tuple[Places, Slice]) -> None:
    places, group = drawn
    rings = (ring(places.cluster, ranks, HUGE) for ranks in groups_of(places.layout, group))
    flows_s = seconds(places.cluster, (message for each in rings for message in each))
    found_ns = places.among("all_gather", group, HUGE)[1].ns
    assert found_ns / 1e9 == pytest.approx(flows_s / SHARE, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(spread_groups((1, 1, 2, 4)), st.sampled_from((1, 2, 4)))
def test_all_to_alls_over_pods_take_what_the_flow_engine_says(
    drawn: tuple[Places, Slice], pod_nodes: int
) -> None:
    (places, group), oversubscription = drawn, 7.0
    cluster = podded(
        places.layout, places.node_ranks, pod_nodes=pod_nodes, oversubscription=oversubscription
    )
    pod_ranks = pod_nodes * places.node_ranks
    assume(places.layout.num_ranks % pod_ranks == 0)
    assume(ranks_per_leaver(mesh_of(places.layout), group, pod_ranks) < group.size)
    flows_s = seconds(
        cluster,
        (
            (source, target, HUGE / group.size)
            for ranks in groups_of(places.layout, group)
            for source, target in permutations(ranks, 2)
        ),
    )
    found_ns = Places(layout=places.layout, cluster=cluster).among("all_to_all", group, HUGE)[1].ns
    assert found_ns / 1e9 == pytest.approx(flows_s / SHARE, rel=1e-3)


@pytest.mark.parametrize(("order", "stages_in_a_pod"), [("tp-cp-dp-pp", 2), ("tp-cp-pp-dp", 8)])
def test_messages_over_pods_take_what_the_flow_engine_says(
    order: str, stages_in_a_pod: int
) -> None:
    layout = layout_of(order, tp=2, dp=4, pp=8)
    places = Places(layout=layout, cluster=podded(layout, 2, 8, 4.0))
    flows_s = seconds(
        places.cluster,
        (
            (source, target, HUGE)
            for ranks in groups_of(layout, Slice(("pp",), 8))
            for source, target in pairwise(ranks)
        ),
    )
    nic_s = HUGE / RATE
    assert flows_s == pytest.approx(nic_s * max(1.0, 4.0 / stages_in_a_pod), rel=1e-6)
    # One message does not fill a NIC; many fill an uplink.
    category, time = places.message(HUGE)
    assert category == INTER
    assert time.ns / 1e9 == pytest.approx(max(nic_s / MESSAGE_SHARE, flows_s / SHARE), rel=1e-3)


def test_two_trees_between_two_pods_take_what_the_flow_engine_says() -> None:
    """Half of the buffer each, up one tree and down again; the roots are in different pods."""
    layout = layout_of(dp=8)
    places = Places(layout=layout, cluster=podded(layout, 1, 4, 8.0))
    edges = [(1, 0), (3, 2), (2, 0), (5, 4), (7, 6), (6, 4), (4, 0)]
    mirrored = [(7 - child, 7 - parent) for child, parent in edges]
    both_ways = [
        way for child, parent in edges + mirrored for way in ((child, parent), (parent, child))
    ]
    flows_s = seconds(places.cluster, ((one, other, HUGE / 2) for one, other in both_ways))
    assert flows_s == pytest.approx(HUGE / (4 * RATE / 8), rel=1e-6)
    found_ns = places.replicas("all_reduce", HUGE)[1].ns
    assert found_ns / 1e9 == pytest.approx(flows_s / SHARE, rel=1e-3)


def test_the_order_in_which_llama_3_was_trained_loses_nothing_to_its_pods() -> None:
    """Pipelines of 128 ranks: a pod holds 24, so that its 24 ranks of a ring have rate to spare.

    Stages of 1,024 ranks one after the other are cut by pods of 3,072: the last holds one of them.
    """
    flat = cluster_preset("h100-sxm", num_nodes=2048, fabric="roce400")
    uplinks = UplinkSpec(pod_nodes=384, oversubscription=7.0, source="made up", date="2026-01-01")
    trained, usual = (
        tuple(
            Places(layout=layout_of(order, tp=8, pp=16, dp=128), cluster=cluster)
            for cluster in (flat, replace(flat, uplinks=uplinks))
        )
        for order in ("tp-cp-pp-dp", DEFAULT_ORDER)
    )
    size = 1 << 30
    for without, with_pods in (trained, usual):
        for kind in ("all_gather", "reduce_scatter", "all_reduce"):
            assert without.replicas(kind, size)[1].ns == with_pods.replicas(kind, size)[1].ns
    as_trained, by_default = (
        with_pods.message(size)[1].ns / without.message(size)[1].ns
        for without, with_pods in (trained, usual)
    )
    assert as_trained == 1
    assert by_default == pytest.approx(7 * MESSAGE_SHARE / SHARE, rel=1e-3)
