"""The engines: closed forms, agreement on random graphs, and the name of a deadlock."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.deadlock import DeadlockError
from simulator.engine import simulate
from simulator.graph import Op, TaskGraph

Drawn = tuple[TaskGraph, list[int]]


@st.composite
def graphs(draw: st.DrawFn, *, can_block: bool = False) -> Drawn:
    """Draw a graph of up to 30 ops; without `can_block` every dependency looks back."""
    num_ops = draw(st.integers(1, 30))
    ops = []
    for op_id in range(num_ops):
        last = num_ops - 1 if can_block else op_id - 1
        deps = draw(st.sets(st.integers(0, last), max_size=3)) if last >= 0 else set()
        deps.discard(op_id)
        ops.append(
            Op(
                id=op_id,
                rank=draw(st.integers(0, 2)),
                stream=draw(st.sampled_from(["compute", "link"])),
                name=f"op{op_id}",
                kind="other",
                deps=tuple(sorted(deps)),
                # Neighbours may meet; a pair on one stream can never start together.
                meet=op_id // 2 if draw(st.booleans()) else -1,
            )
        )
    durations = draw(st.lists(st.integers(0, 50), min_size=num_ops, max_size=num_ops))
    return TaskGraph(ops=tuple(ops)), durations


@given(graphs(can_block=True))
def test_engines_agree_to_the_nanosecond(drawn: Drawn) -> None:
    graph, durations = drawn
    outcomes = []
    for engine in ("loop", "simpy"):
        try:
            outcomes.append(str(simulate(graph, durations, engine=engine)))
        except DeadlockError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@given(graphs())
def test_rules_of_the_graph_hold(drawn: Drawn) -> None:
    graph, durations = drawn
    try:
        timeline = simulate(graph, durations)
    except DeadlockError:
        return
    start = {span.name: span.start_ns for span in timeline.spans}
    end = {span.name: span.end_ns for span in timeline.spans}
    for op in graph.ops:
        if op.name not in start:
            continue
        for dep in op.deps:
            assert end.get(f"op{dep}", 0) <= start[op.name]
        for other in graph.meets.get(op.meet, ()):
            assert start.get(f"op{other}", start[op.name]) == start[op.name]
    for ids in graph.streams.values():
        spans = [f"op{i}" for i in ids if f"op{i}" in start]
        assert all(end[a] <= start[b] for a, b in pairwise(spans))


def test_a_stream_is_a_sum_and_streams_are_a_maximum() -> None:
    ops = [Op(id=i, rank=i % 2, stream="compute", name=f"op{i}", kind="other") for i in range(6)]
    assert simulate(TaskGraph(ops=tuple(ops)), [1, 10, 2, 20, 3, 30]).makespan_ns == 60


def test_a_meet_starts_with_its_last_member() -> None:
    ops = (
        Op(id=0, rank=0, stream="compute", name="early", kind="other"),
        Op(id=1, rank=1, stream="compute", name="late", kind="other"),
        Op(id=2, rank=0, stream="compute", name="reduce 0", kind="all_reduce", meet=7),
        Op(id=3, rank=1, stream="compute", name="reduce 1", kind="all_reduce", meet=7),
    )
    timeline = simulate(TaskGraph(ops=ops), [5, 40, 10, 10])
    assert [span.start_ns for span in timeline.spans if span.kind == "all_reduce"] == [40, 40]
    assert timeline.makespan_ns == 50


def test_deadlock_names_who_waits_for_whom() -> None:
    ops = (
        Op(id=0, rank=0, stream="compute", name="0B0", kind="backward", deps=(3,)),
        Op(id=1, rank=0, stream="compute", name="0F1", kind="forward"),
        Op(id=2, rank=1, stream="compute", name="1F1", kind="forward", deps=(1,)),
        Op(id=3, rank=1, stream="compute", name="1B0", kind="backward"),
    )
    with pytest.raises(DeadlockError) as raised:
        simulate(TaskGraph(ops=ops), [1, 1, 1, 1])
    assert str(raised.value) == (
        "deadlock with 4 ops left: "
        "0B0 (rank 0, compute) waits for 1B0 (rank 1, compute), which stands behind 1F1; "
        "1F1 (rank 1, compute) waits for 0F1 (rank 0, compute), which stands behind 0B0"
    )


@pytest.mark.parametrize("duration", [-1, 1.5, float("nan"), True])
def test_a_duration_that_is_no_whole_number_is_refused(duration: int) -> None:
    graph = TaskGraph(ops=(Op(id=0, rank=0, stream="compute", name="0F0", kind="forward"),))
    with pytest.raises(ValueError, match="0F0 takes"):
        simulate(graph, [duration])
