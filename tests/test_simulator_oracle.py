"""The event loop against SimPy on random graphs, and both against what a pencil says."""

from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.deadlock import DeadlockError, StalledError
from simulator.engine import simulate
from simulator.graph import Crossing, Op, op_costs, task_graph
from simulator.network import CapacityChange, Change, Link, SpeedChange
from simulator.oracle import max_min_rates
from simulator.timeline import Kind
from tests.graphs import Drawn, graphs

Outcome = tuple[object, object]
both = pytest.mark.parametrize("oracle", [False, True], ids=["loop", "oracle"])


def outcome(drawn: Drawn, *, oracle: bool) -> Outcome:
    try:
        simulation = simulate(
            drawn.graph, drawn.costs, links=drawn.links, changes=drawn.changes, oracle=oracle
        )
    except (DeadlockError, StalledError) as error:
        return type(error), str(error)
    return simulation.starts_ns.tolist(), simulation.ends_ns.tolist()


@given(graphs(can_block=True))
def test_loop_equals_oracle_without_contention(drawn: Drawn) -> None:
    assert outcome(drawn, oracle=False) == outcome(drawn, oracle=True)


@given(graphs(queues=True, changes=True))
def test_loop_equals_oracle_with_queues_and_slow_ranks(drawn: Drawn) -> None:
    assert outcome(drawn, oracle=False) == outcome(drawn, oracle=True)


@given(graphs(flows=True, queues=True, changes=True))
def test_loop_equals_oracle_with_everything(drawn: Drawn) -> None:
    assert outcome(drawn, oracle=False) == outcome(drawn, oracle=True)


@given(graphs(can_block=True, flows=True, queues=True, changes=True))
def test_loop_and_oracle_name_the_same_blocked_ops(drawn: Drawn) -> None:
    assert outcome(drawn, oracle=False) == outcome(drawn, oracle=True)


@given(st.data())
def test_max_min_rates_fill_a_bottleneck_of_every_flow(data: st.DataObject) -> None:
    """The mark of max-min fairness: on some full link no flow is faster than this one.

    Source: Bertsekas and Gallager, Data Networks, section 6.5.2.
    """
    capacity = data.draw(st.lists(st.fractions(0, 9, max_denominator=4), min_size=1, max_size=4))
    link = st.integers(0, len(capacity) - 1)
    crossings = st.dictionaries(link, st.integers(1, 8), min_size=1)
    weights = dict(enumerate(data.draw(st.lists(crossings, max_size=6))))
    rates = max_min_rates(weights, capacity)
    used = [
        sum(rates[flow] * crossed.get(link, 0) for flow, crossed in weights.items())
        for link in range(len(capacity))
    ]
    fastest = [
        max((rates[flow] for flow, crossed in weights.items() if link in crossed), default=0)
        for link in range(len(capacity))
    ]
    assert all(u <= c for u, c in zip(used, capacity, strict=True))
    for flow, crossed in weights.items():
        assert any(used[i] == capacity[i] and rates[flow] == fastest[i] for i in crossed)


def links_of(*bytes_per_ns: float) -> tuple[Link, ...]:
    return tuple(
        Link(name=f"link {place}", bytes_per_s=rate * 1e9)
        for place, rate in enumerate(bytes_per_ns)
    )


def op(
    place: int,
    *crossed: int,
    rank: int | None = None,
    deps: Sequence[int] = (),
    weight: int = 1,
    is_queued: bool = False,
    kind: Kind = "other",
) -> Op:
    """Return an op that is alone on its rank, unless told otherwise, and crosses some links."""
    return Op(
        id=place,
        rank=place if rank is None else rank,
        stream="compute",
        name=f"op{place}",
        kind=kind,
        deps=tuple(deps),
        path=tuple(Crossing(link, weight) for link in crossed),
        is_queued=is_queued,
    )


def ends_of(
    ops: Sequence[Op],
    ns: Sequence[int],
    size_bytes: Sequence[int],
    links: Sequence[Link],
    *changes: Change,
    oracle: bool,
) -> list[int]:
    graph = task_graph(ops)
    costs = op_costs(graph, ns, size_bytes)
    ends: list[int] = simulate(
        graph, costs, links=links, changes=changes, oracle=oracle
    ).ends_ns.tolist()
    return ends


@both
def test_two_flows_share_a_link_until_one_ends(oracle: bool) -> None:
    # 5 bytes/ns each for 20 ns end the small one; the other moves its last 200 bytes alone.
    ops, links = [op(0, 0), op(1, 0)], links_of(10)
    assert ends_of(ops, [0, 0], [100, 300], links, oracle=oracle) == [20, 40]


@both
def test_a_flow_starts_after_its_latency_and_ends_at_the_next_whole_ns(oracle: bool) -> None:
    ops, links = [op(0, 0), op(1, 0)], links_of(3)
    # Alone 3 ns for 9 bytes, then shared at 1.5: 11 / 1.5 = 7.33 ns; the last 9 bytes alone.
    assert ends_of(ops, [7, 10], [20, 20], links, oracle=oracle) == [18, 21]


@both
def test_three_links_in_a_row(oracle: bool) -> None:
    """A long flow over all of three links and a short one on each.

    The first link is the narrowest: 3 to each flow there; the second leaves 6 - 3, the third 9 - 3.
    """
    ops, links = [op(0, 0, 1, 2), op(1, 0), op(2, 1), op(3, 2)], links_of(6, 8, 9)
    assert ends_of(ops, [0] * 4, [300, 300, 500, 600], links, oracle=oracle) == [100] * 4


@both
def test_a_flow_that_is_held_back_leaves_its_share_to_the_others(oracle: bool) -> None:
    # Link 1 holds the long flow at 1; link 0 gives the rest of its 10 to the other.
    ops, links = [op(0, 0, 1), op(1, 0)], links_of(10, 1)
    assert ends_of(ops, [0, 0], [50, 450], links, oracle=oracle) == [50, 50]


@both
def test_a_link_degrades_at_t(oracle: bool) -> None:
    change = CapacityChange(at_ns=30, link=0, bytes_per_s=2e9)
    # 300 of 400 bytes in 30 ns, the last 100 at 2 bytes/ns.
    assert ends_of([op(0, 0)], [0], [400], links_of(10), change, oracle=oracle) == [80]


@both
def test_an_outage_delays_by_its_length(oracle: bool) -> None:
    outage = CapacityChange(at_ns=10, link=0, bytes_per_s=0)
    recovery = CapacityChange(at_ns=1010, link=0, bytes_per_s=1e9)
    ops, links = [op(0, 0), op(1, 0, deps=[0])], links_of(1)
    ends = ends_of(ops, [0, 0], [25, 5], links, outage, recovery, oracle=oracle)
    assert ends == [1025, 1030]


@both
def test_a_slow_rank_takes_longer_and_one_that_stands_still_waits(oracle: bool) -> None:
    changes = (
        SpeedChange(at_ns=0, rank=0, speed=0.5),
        SpeedChange(at_ns=10, rank=1, speed=0.0),
        SpeedChange(at_ns=60, rank=1, speed=2.0),
    )
    ends = ends_of([op(0), op(1)], [40, 40], [0, 0], (), *changes, oracle=oracle)
    assert ends == [80, 75]


@both
def test_latency_does_not_depend_on_the_speed_of_the_rank(oracle: bool) -> None:
    slow = SpeedChange(at_ns=0, rank=0, speed=0.1)
    assert ends_of([op(0, 0)], [10], [10], links_of(1), slow, oracle=oracle) == [20]


@both
def test_what_is_due_when_its_rank_stops_is_done(oracle: bool) -> None:
    stop = SpeedChange(at_ns=40, rank=0, speed=0.0)
    assert ends_of([op(0)], [40], [0], (), stop, oracle=oracle) == [40]


@both
def test_of_changes_at_one_instant_the_last_in_the_list_holds(oracle: bool) -> None:
    changes = [CapacityChange(at_ns=0, link=0, bytes_per_s=rate) for rate in (0.0, 5e9, 2e9)]
    assert ends_of([op(0, 0)], [0], [10], links_of(1), *changes, oracle=oracle) == [5]


@both
def test_a_weight_of_eight_is_eight_flows(oracle: bool) -> None:
    links = links_of(8, 3)
    eight = [*(op(i, 0) for i in range(8)), op(8, 0, 1)]
    unfolded = ends_of(eight, [3] * 9, [70] * 8 + [20], links, oracle=oracle)
    folded = ends_of(
        [op(0, 0, weight=8), op(1, 0, 1)], [3, 3], [70, 20], links, oracle=oracle
    )  # fmt: skip
    assert unfolded == [folded[0]] * 8 + [folded[1]]


@both
@pytest.mark.parametrize("num_replicas", [2, 8])
def test_equal_replicas_in_full_equal_one_with_weights(num_replicas: int, oracle: bool) -> None:
    """Replicas of a little pipeline share a NIC; each has a link of its own behind it."""

    def run(copies: int, weight: int) -> list[list[int]]:
        ops: list[Op] = []
        for copy in range(copies):
            for microbatch in range(6):
                first = len(ops)
                before = () if microbatch == 0 else (first - 1,)
                ops.append(op(first, rank=2 * copy, deps=before if microbatch % 2 else ()))
                path = (Crossing(0, weight), Crossing(1 + copy))
                ops.append(
                    Op(
                        id=first + 1, rank=2 * copy, stream="to 1", name="message", kind="send",
                        deps=(first,), path=path,
                    )
                )  # fmt: skip
                ops.append(op(first + 2, rank=2 * copy + 1, deps=(first + 1,)))
        ns = [10 + i % 18 for i in range(len(ops))]
        size_bytes = [77 + i % 18 if o.path else 0 for i, o in enumerate(ops)]
        links = links_of(num_replicas * 1.25, *[3.0] * copies)
        ends = ends_of(ops, ns, size_bytes, links, oracle=oracle)
        return [ends[i : i + 18] for i in range(0, len(ends), 18)]

    assert run(num_replicas, 1) == run(1, num_replicas) * num_replicas


@both
def test_a_queue_serves_by_arrival_then_by_id(oracle: bool) -> None:
    producers = [op(0, rank=0), op(1, rank=1), op(2, rank=2)]
    served = [op(3 + i, rank=9, deps=[i], is_queued=True) for i in range(3)]
    # Op 5 arrives first; while it is served ops 3 and 4 arrive together.
    ends = ends_of([*producers, *served], [7, 7, 3, 10, 10, 10], [0] * 6, (), oracle=oracle)
    assert ends[3:] == [23, 33, 13]


@both
def test_a_queue_chooses_when_all_else_of_the_instant_is_done(oracle: bool) -> None:
    # Op 2 has waited for nothing; op 1 is ready at the same instant, after a chain of no length.
    ops = [op(0), op(1, rank=9, deps=[0], is_queued=True), op(2, rank=9, is_queued=True)]
    assert ends_of(ops, [0, 5, 5], [0] * 3, (), oracle=oracle) == [0, 5, 10]


@both
def test_an_op_on_a_dead_link_is_named(oracle: bool) -> None:
    outage = CapacityChange(at_ns=3, link=0, bytes_per_s=0)
    ops = [op(0, 0), op(1, deps=[0])]
    with pytest.raises(StalledError, match=r"^op0 \(rank 0, compute\) began and never ended"):
        ends_of(ops, [0, 1], [9, 0], links_of(1), outage, oracle=oracle)


@both
def test_a_flow_of_two_years_ends_in_time(oracle: bool) -> None:
    size_bytes = 1 << 56
    end = ends_of([op(0, 0)], [0], [size_bytes], links_of(1), oracle=oracle)[0]
    assert abs(Fraction(end, size_bytes) - 1) < 1e-11
