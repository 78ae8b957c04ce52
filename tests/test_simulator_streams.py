"""Programs on the streams of one rank: closed forms, and the engine on a graph of the same ops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.checks import Int64
from simulator.engine import simulate
from simulator.graph import Int32, Op, task_graph
from simulator.streams import walk_streams

NUM_STREAMS = 3


@st.composite
def programs(draw: st.DrawFn) -> tuple[Int32, Int32, Int64]:
    """Draw a program of up to 24 ops for up to 3 candidates; short times make many ties."""
    num_ops, num_lanes = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    stream = draw(st.lists(st.integers(0, NUM_STREAMS - 1), min_size=num_ops, max_size=num_ops))
    after = [draw(st.integers(-1, op - 1)) for op in range(num_ops)]
    most = draw(st.sampled_from((1, 5, 10**12)))
    cells = st.lists(st.integers(0, most), min_size=num_lanes, max_size=num_lanes)
    ns = draw(st.lists(cells, min_size=num_ops, max_size=num_ops))
    return np.array(stream, np.int32), np.array(after, np.int32), np.array(ns, np.int64)


def ends_of(stream: list[int], after: list[int], ns: list[int]) -> list[int]:
    """Return the ends of one candidate."""
    table = np.array(ns, np.int64)[:, None]
    ends = walk_streams(np.array(stream, np.int32), np.array(after, np.int32), table, NUM_STREAMS)
    return [int(end) for end in ends[:, 0]]


@given(programs())
def test_the_engine_ends_every_op_at_the_same_nanosecond(
    program: tuple[Int32, Int32, Int64],
) -> None:
    stream, after, ns = program
    ops = [
        Op(id=op, rank=0, stream=f"stream {own}", name=f"op{op}", kind="other",
           deps=(other,) if other >= 0 else ())
        for op, (own, other) in enumerate(zip(stream.tolist(), after.tolist(), strict=True))
    ]  # fmt: skip
    graph, walked = task_graph(ops), walk_streams(stream, after, ns, NUM_STREAMS)
    for lane in range(ns.shape[1]):
        np.testing.assert_array_equal(walked[:, lane], simulate(graph, ns[:, lane]).ends_ns)


@given(programs())
def test_lanes_side_by_side_equal_one_by_one(program: tuple[Int32, Int32, Int64]) -> None:
    stream, after, ns = program
    together = walk_streams(stream, after, ns, NUM_STREAMS)
    for lane in range(ns.shape[1]):
        alone = walk_streams(stream, after, np.ascontiguousarray(ns[:, lane : lane + 1]), 3)
        np.testing.assert_array_equal(together[:, lane : lane + 1], alone)


@given(programs())
def test_the_end_lies_between_the_busiest_stream_and_all_in_a_row(
    program: tuple[Int32, Int32, Int64],
) -> None:
    stream, after, ns = program
    last = walk_streams(stream, after, ns, NUM_STREAMS).max(axis=0)
    busiest = max(ns[stream == own].sum(axis=0).tolist() for own in range(NUM_STREAMS))
    assert (last >= busiest).all()
    assert (last <= ns.sum(axis=0)).all()


@given(programs(), st.data())
def test_an_op_that_takes_longer_ends_nothing_earlier(
    program: tuple[Int32, Int32, Int64], data: st.DataObject
) -> None:
    stream, after, ns = program
    slower = ns.copy()
    slower[data.draw(st.integers(0, len(ns) - 1))] += data.draw(st.integers(1, 10))
    before = walk_streams(stream, after, ns, NUM_STREAMS)
    assert (walk_streams(stream, after, slower, NUM_STREAMS) >= before).all()


def test_one_stream_is_a_sum() -> None:
    assert ends_of([1, 1, 1], [-1, 0, 0], [5, 7, 2]) == [5, 12, 14]


def test_streams_without_waits_run_at_once() -> None:
    assert ends_of([0, 1, 2, 0], [-1, -1, -1, -1], [5, 7, 2, 1]) == [5, 7, 2, 6]


def test_an_op_waits_for_its_stream_and_for_what_it_is_after() -> None:
    """The second exchange waits for the first, the last kernel for the second exchange."""
    assert ends_of([0, 1, 0, 1, 0], [-1, 0, -1, 0, 3], [4, 10, 3, 5, 1]) == [4, 14, 7, 19, 20]


def test_a_chain_over_two_streams_hides_nothing() -> None:
    assert ends_of([0, 1] * 3, [-1, 0, 1, 2, 3, 4], [3, 4] * 3)[-1] == 21


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_a_program_without_ops_has_no_ends(num_lanes: int) -> None:
    none = np.zeros(0, np.int32)
    assert walk_streams(none, none, np.zeros((0, num_lanes), np.int64), 2).shape == (0, num_lanes)
