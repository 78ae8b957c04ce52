"""The engines: closed forms, agreement on random graphs, and what is refused."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.deadlock import DeadlockError
from simulator.engine import simulate
from simulator.graph import Crossing, Op, TaskGraph, op_costs, task_graph
from simulator.network import CapacityChange, Link, SpeedChange
from tests.graphs import Drawn, graphs


def op(op_id: int, rank: int = 0, **more: Any) -> Op:
    fields: dict[str, Any] = {
        "id": op_id,
        "rank": rank,
        "stream": "compute",
        "name": f"op{op_id}",
        "kind": "other",
    }
    return Op(**(fields | more))


@settings(max_examples=500)
@given(graphs(can_block=True, queues=True))
def test_engines_agree_to_the_nanosecond(drawn: Drawn) -> None:
    outcomes: list[object] = []
    for oracle in (False, True):
        try:
            run = simulate(drawn.graph, drawn.costs, oracle=oracle)
            outcomes.append((run.starts_ns.tolist(), run.ends_ns.tolist()))
        except DeadlockError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@given(graphs())
def test_rules_of_the_graph_hold(drawn: Drawn) -> None:
    graph = drawn.graph
    run = simulate(graph, drawn.costs)
    starts, ends = run.starts_ns.tolist(), run.ends_ns.tolist()
    by_stream: dict[int, list[int]] = {}
    for op_id in range(len(graph)):
        assert ends[op_id] == starts[op_id] + drawn.costs.ns[op_id]
        assert all(ends[dep] <= starts[op_id] for dep in graph.deps_of(op_id))
        others = np.flatnonzero((graph.meet == graph.meet[op_id]) & (graph.meet >= 0))
        assert all(starts[other] == starts[op_id] for other in others)
        by_stream.setdefault(int(graph.stream[op_id]), []).append(op_id)
    for ids in by_stream.values():
        assert all(ends[a] <= starts[b] for a, b in pairwise(ids))


def test_a_stream_is_a_sum_and_streams_are_a_maximum() -> None:
    ops = [op(i, rank=i % 2) for i in range(6)]
    assert simulate(task_graph(ops), [1, 10, 2, 20, 3, 30]).makespan_ns == 60


def test_a_meet_starts_with_its_last_member() -> None:
    ops = (
        op(0), op(1, rank=1),
        op(2, kind="all_reduce", meet=7, meet_size=2),
        op(3, rank=1, kind="all_reduce", meet=7, meet_size=2),
    )  # fmt: skip
    run = simulate(task_graph(ops), [5, 40, 10, 10])
    assert run.starts_ns.tolist() == [0, 0, 40, 40]
    assert run.makespan_ns == 50


def test_a_queue_serves_by_arrival_then_by_id() -> None:
    queue: dict[str, Any] = {"stream": "server", "rank": 9, "is_queued": True}
    ops = (
        op(0), op(1, rank=1), op(2, rank=2),
        op(3, deps=(2,), **queue), op(4, deps=(1,), **queue), op(5, deps=(0,), **queue),
    )  # fmt: skip
    run = simulate(task_graph(ops), [4, 2, 4, 10, 10, 10])
    # Op 4 is there first; then 3 and 5 have both come at 4, and the lower id goes first.
    assert run.starts_ns[3:].tolist() == [12, 2, 22]


def test_two_flows_share_a_link() -> None:
    ops = [op(i, rank=i, path=(Crossing(0),)) for i in range(2)]
    graph, links = task_graph(ops), [Link(name="nic", bytes_per_s=1e9)]
    costs = op_costs(graph, [5, 5], [100, 300])
    # Both at half the rate until the short one is through at 205; then 200 bytes at the whole.
    assert simulate(graph, costs, links=links).ends_ns.tolist() == [205, 405]
    # The link at a tenth between 105 and 205.
    slow = [
        CapacityChange(at_ns=105, link=0, bytes_per_s=1e8),
        CapacityChange(at_ns=205, link=0, bytes_per_s=1e9),
    ]
    ends = simulate(graph, costs, links=links, changes=slow).ends_ns.tolist()
    assert ends == [295, 495]


def test_a_rank_slows_down_under_way() -> None:
    graph = task_graph([op(0), op(1, deps=(0,))])
    slow = [SpeedChange(at_ns=5, rank=0, speed=0.5), SpeedChange(at_ns=25, rank=0, speed=1.0)]
    assert simulate(graph, [10, 10], changes=slow).ends_ns.tolist() == [15, 30]


def test_deadlock_names_who_waits_for_whom() -> None:
    ops = (
        op(0, name="0B0", deps=(3,)), op(1, name="0F1"),
        op(2, rank=1, name="1F1", deps=(1,)), op(3, rank=1, name="1B0"),
    )  # fmt: skip
    with pytest.raises(DeadlockError) as raised:
        simulate(task_graph(ops), [1, 1, 1, 1])
    assert str(raised.value) == (
        "deadlock with 4 ops left: "
        "0B0 (rank 0, compute) waits for 1B0 (rank 1, compute), which stands behind 1F1; "
        "1F1 (rank 1, compute) waits for 0F1 (rank 0, compute), which stands behind 0B0"
    )


def test_what_never_ends_is_named() -> None:
    graph, links = task_graph([op(0, path=(Crossing(0),))]), [Link(name="nic", bytes_per_s=1e9)]
    dead = [CapacityChange(at_ns=10, link=0, bytes_per_s=0)]
    with pytest.raises(ValueError, match=r"op0 \(rank 0, compute\) began and never ended"):
        simulate(graph, op_costs(graph, 0, 100), links=links, changes=dead)


def test_what_waits_for_something_that_never_ends_is_not_called_a_deadlock() -> None:
    graph = task_graph([op(0), op(1, rank=1, deps=(0,)), op(2, rank=1, is_queued=False)])
    for oracle in (False, True):
        with pytest.raises(ValueError, match=r"^op0 \(rank 0, compute\) began and never ended"):
            simulate(graph, [9, 1, 1], changes=[SpeedChange(at_ns=3, rank=0, speed=0.0)],
                     oracle=oracle)  # fmt: skip


@pytest.mark.parametrize("duration", [-1, 1.5, float("nan"), float("inf"), True, "9", 1 << 60])
@pytest.mark.parametrize("oracle", [False, True])
def test_a_duration_that_is_no_whole_number_is_refused(duration: int, oracle: bool) -> None:
    with pytest.raises(ValueError, match=r"op0 \(rank 0, compute\) takes .* must be a whole"):
        simulate(task_graph([op(0)]), [duration], oracle=oracle)


def test_bytes_are_refused_like_times() -> None:
    graph = task_graph([op(0, path=(Crossing(0),)), op(1)])
    with pytest.raises(ValueError, match=r"op0 .* moves nan bytes"):
        op_costs(graph, 0, [float("nan"), 0])
    with pytest.raises(ValueError, match=r"op1 .* moves bytes but crosses no link"):
        op_costs(graph, 0, [0, 8])
    with pytest.raises(ValueError, match="crosses link 0; there are 0 links"):
        simulate(graph, [1, 1])


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([op(0, deps=(0,))], "op0 .* depends on itself"),
        ([op(0, deps=(4,))], r"op0 .* depends on \(4,\); there are 1 ops"),
        ([op(0, deps=(10**12,))], "op0 .* depends on"),
        ([op(1)], "op op1 has id 1; it stands at place 0"),
        ([op(0, rank=10**9)], "rank 1000000000; ranks go from 0 to 16777215"),
        ([op(0, rank=-1)], "rank -1"),
        ([op(0, meet=3)], "op0 .* is alone in meet 3; its partner is missing"),
        (
            [op(0, meet=3, meet_size=3), op(1, rank=1, meet=3, meet_size=3)],
            "op0 meets 2 others in meet 3; 1 are there",
        ),
        ([op(0, kind="send")], "op0 .* is a send that nothing receives"),
        ([op(0, path=(Crossing(1), Crossing(1)))], r"op0 .* crosses links \[1, 1\]"),
        (
            [op(0, is_queued=True, meet=1), op(1, rank=1, meet=1)],
            "op0 .* queues and meets",
        ),
        ([op(0, is_queued=True), op(1)], "stream compute is a queue for some"),
    ],
)
def test_a_graph_that_cannot_run_is_refused(ops: list[Op], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_graph(ops)


def test_changes_must_name_what_is_there() -> None:
    graph = task_graph([op(0)])
    for change, message in (
        (CapacityChange(at_ns=0, link=0, bytes_per_s=1.0), "names link 0; there are 0 links"),
        (SpeedChange(at_ns=0, rank=5, speed=1.0), "names rank 5, which does nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate(graph, [1], changes=[change])
    for bad in (float("nan"), -1.0, float("inf")):
        with pytest.raises(ValueError, match="must be from"):
            SpeedChange(at_ns=0, rank=0, speed=bad)
        with pytest.raises(ValueError, match="must be from"):
            Link(name="nic", bytes_per_s=bad)


@given(st.integers(1, 50))
def test_same_input_same_columns(num_ops: int) -> None:
    ops = [op(i, rank=i % 3, deps=(i - 1,) if i else ()) for i in range(num_ops)]
    first, second = task_graph(ops), task_graph(ops)
    assert isinstance(first, TaskGraph)
    assert [first.op(i) for i in range(num_ops)] == [second.op(i) for i in range(num_ops)] == ops
