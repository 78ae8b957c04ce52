"""The fabric: which links a message crosses, and what that does to messages that share them."""

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine import simulate
from simulator.fabric import Fabric, Node, clos, fabric, star
from simulator.graph import Op, op_costs, task_graph


def two_tiers(num_nodes: int = 8, oversubscription: float = 1.0, nics_per_node: int = 2) -> Fabric:
    """Return nodes of four GPUs and two NICs, four nodes to a leaf."""
    return clos(
        num_nodes=num_nodes,
        gpus_per_node=4,
        nics_per_node=nics_per_node,
        gpu_bytes_per_s=400e9,
        nic_bytes_per_s=50e9,
        nodes_per_leaf=4,
        oversubscription=oversubscription,
    )


def names(of: Fabric, source_rank: int, target_rank: int) -> list[str]:
    return [of.links[link].name for link, _ in of.path(source_rank, target_rank)]


def ends_of_messages(of: Fabric, pairs: list[tuple[int, int]], size_bytes: int) -> list[int]:
    """Return when messages end that start together, one for each pair of ranks."""
    ops = [
        Op(id=i, rank=source, stream=f"to {target}", name=f"message {i}", kind="other",
           path=of.path(source, target))
        for i, (source, target) in enumerate(pairs)
    ]  # fmt: skip
    graph = task_graph(ops)
    costs = op_costs(graph, 0, size_bytes)
    ends: list[int] = simulate(graph, costs, links=of.links).ends_ns.tolist()
    return ends


def test_routes_of_a_clos_by_distance() -> None:
    of = two_tiers()
    assert names(of, 5, 5) == []
    assert names(of, 0, 3) == ["rank 0 to node 0", "node 0 to rank 3"]
    same_rail = ["nic 0.0 to leaf 0.0", "leaf 0.0 to nic 2.0"]
    assert names(of, 0, 9) == same_rail
    # To another rail of the same leaves: inside the node first, and off the spine.
    assert names(of, 0, 10) == [
        "rank 0 to node 0", "node 0 to rank 2", "nic 0.1 to leaf 0.1", "leaf 0.1 to nic 2.1",
    ]  # fmt: skip
    assert names(of, 0, 22) == [
        "nic 0.0 to leaf 0.0", "leaf 0.0 to spine", "spine to leaf 1.1", "leaf 1.1 to nic 5.1",
    ]  # fmt: skip


def test_rates_of_a_clos() -> None:
    of = two_tiers(oversubscription=4.0)
    rate = {link.name: link.bytes_per_s for link in of.links}
    assert rate["rank 0 to node 0"] == rate["node 0 to rank 0"] == 400e9
    assert rate["leaf 1.1 to nic 7.1"] == 50e9
    assert rate["leaf 1.1 to spine"] == rate["spine to leaf 0.0"] == 4 * 50e9 / 4
    assert len(of.links) == len(rate) == 2 * (32 + 16 + 4)


def test_gpus_share_the_nic_of_their_rail() -> None:
    # Ranks 0 and 1 have one NIC at 50 bytes/ns, rank 2 has the other for itself.
    ends = ends_of_messages(two_tiers(), [(0, 4), (1, 5), (2, 6)], 5000)
    assert ends == [200, 200, 100]


@pytest.mark.parametrize(("oversubscription", "end_ns"), [(1.0, 100), (2.0, 200), (4.0, 400)])
def test_oversubscription_slows_messages_that_cross_the_spine(
    oversubscription: float, end_ns: int
) -> None:
    # One GPU of each rail and node of the first four sends to the other four.
    pairs = [(4 * node + gpu, 4 * node + gpu + 16) for node in range(4) for gpu in (0, 2)]
    of = two_tiers(oversubscription=oversubscription)
    assert ends_of_messages(of, pairs, 5000) == [end_ns] * 8


def test_incast_shares_the_nic_of_the_receiver() -> None:
    assert ends_of_messages(star([1e9] * 5), [(i, 4) for i in range(4)], 30) == [120] * 4


def test_both_directions_of_a_link_are_apart() -> None:
    assert ends_of_messages(star([1e9, 1e9]), [(0, 1), (1, 0)], 30) == [30, 30]


@st.composite
def networks(draw: st.DrawFn) -> "nx.Graph[Node]":
    """Draw a graph that hangs together, of ranks and switches, some edges without a rate."""
    num_nodes = draw(st.integers(2, 12))
    nodes: list[Node] = [
        i if i < 2 or draw(st.booleans()) else f"switch {i}" for i in range(num_nodes)
    ]
    graph: nx.Graph[Node] = nx.Graph()
    for place in range(1, num_nodes):
        for other in {0, *draw(st.sets(st.integers(0, place - 1), min_size=1, max_size=3))}:
            rate = draw(st.sampled_from((None, 1e9, 2e9)))
            if draw(st.booleans()) or not graph.has_node(nodes[place]):
                graph.add_edge(
                    nodes[place], nodes[other], **({"bytes_per_s": rate} if rate else {})
                )
    return graph


@given(networks(), st.integers(1, 8))
def test_a_path_is_a_shortest_way_and_crosses_its_links_in_order(
    graph: "nx.Graph[Node]", weight: int
) -> None:
    of = fabric(graph)
    ranks = [node for node in graph if isinstance(node, int)]
    for source in ranks:
        for target in ranks:
            crossings = of.path(source, target, weight)
            assert all(crossing.weight == weight for crossing in crossings)
            found = [of.links[crossing.link].name for crossing in crossings]
            # networkx lists all shortest ways; the path must be the links of one of them.
            assert found in [
                [
                    f"{_name(one)} to {_name(other)}"
                    for one, other in nx.utils.pairwise(way)
                    if "bytes_per_s" in graph.edges[one, other]
                ]
                for way in nx.all_shortest_paths(graph, source, target)
            ]


def _name(node: Node) -> str:
    return f"rank {node}" if isinstance(node, int) else node


def test_of_equal_ways_the_first_listed_is_taken() -> None:
    for first, second in (("blue", "red"), ("red", "blue")):
        graph: nx.Graph[Node] = nx.Graph()
        for switch in (first, second):
            for rank in (0, 1):
                graph.add_edge(rank, switch, bytes_per_s=1e9)
        assert names(fabric(graph), 0, 1) == [f"rank 0 to {first}", f"{first} to rank 1"]


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (nx.Graph([("a", "b")]), "the fabric has no rank"),
        (nx.DiGraph([(0, 1)]), "one edge, for both directions"),
        (nx.MultiGraph([(0, 1), (0, 1)]), "one edge, for both directions"),
        (nx.Graph([(0, 1, {"bytes_per_s": float("nan")})]), "link rank 0 to rank 1 carries nan"),
        (nx.Graph([(0, 1, {"bytes_per_s": 0})]), "link rank 0 to rank 1 carries 0"),
    ],
)
def test_a_graph_that_is_no_fabric_is_refused(graph: "nx.Graph[Node]", message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fabric(graph)


@pytest.mark.parametrize(
    ("count", "value", "message"),
    [
        ("num_nodes", 0, "num_nodes is 0"),
        ("nics_per_node", 3, "4 GPUs cannot share 3 NICs evenly"),
        ("num_nodes", 10**9, "a fabric of 4000000000 ranks"),
        ("oversubscription", 0, "oversubscription is 0"),
        ("oversubscription", float("nan"), "oversubscription is nan"),
    ],
)
def test_a_clos_that_cannot_be_is_refused(count: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_tiers(**{count: value})  # type: ignore[arg-type]


def test_a_rank_that_is_not_joined_is_named() -> None:
    graph: nx.Graph[Node] = nx.Graph([(0, "a", {"bytes_per_s": 1e9}), (7, "b", {})])
    with pytest.raises(ValueError, match="rank 3 is not in the fabric; its 2 ranks go from 0 to 7"):
        fabric(graph).path(0, 3)
    with pytest.raises(ValueError, match="nothing joins rank 0 to rank 7"):
        fabric(graph).path(0, 7)
