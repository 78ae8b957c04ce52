"""What a simulation tells: closed forms, and random graphs explained a second time, op by op."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.schedules.flush import gpipe, one_f_one_b
from simulator.critical import bindings, critical_path
from simulator.engine import Simulation, simulate, simulate_step
from simulator.graph import KINDS, Op, task_graph
from simulator.idle import COMMUNICATION, HOST, StreamUse, stream_uses
from simulator.memory import activation_changes, memory_curves
from simulator.schedule import Schedule, parse_schedule
from simulator.step import lower, step_times
from simulator.timeline import Kind
from tests.graphs import Drawn, graphs

F_NS, B_NS = 10, 20
RANDOM_KINDS = [KINDS.index(kind) for kind in ("forward", "all_reduce", "other", "wait", "push")]


def simulated(drawn: Drawn, kinds: Sequence[int]) -> Simulation:
    """Run a drawn graph whose ops are of `kinds`, again and again."""
    column = np.resize(np.array(kinds, np.int8), len(drawn.graph))
    graph = replace(drawn.graph, kind=column)
    return simulate(graph, drawn.costs, links=drawn.links, changes=drawn.changes)


# The first example loads the compiled engine.
random_runs = settings(deadline=None, max_examples=40)

simulations = st.builds(
    simulated,
    st.one_of(
        graphs(queues=True),
        graphs(queues=True, flows=True),
        graphs(queues=True, flows=True, changes=True),
    ),
    st.lists(st.sampled_from(RANDOM_KINDS), min_size=1, max_size=30),
)


def by_hand(ops: Sequence[Op], starts: list[int], ends: list[int]) -> Simulation:
    return Simulation(
        graph=task_graph(ops), starts_ns=np.array(starts), ends_ns=np.array(ends, np.int64)
    )


def compute(simulation: Simulation) -> tuple[StreamUse, ...]:
    return tuple(use for use in stream_uses(simulation) if use.stream == "compute")


def op(op_id: int, kind: Kind, *deps: int, rank: int = 0, stream: str = "compute") -> Op:
    return Op(id=op_id, rank=rank, stream=stream, name=f"op{op_id}", kind=kind, deps=deps)


# The critical path


@random_runs
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_the_critical_path_of_a_chain_is_the_chain(durations: list[int]) -> None:
    kinds: tuple[Kind, ...] = ("forward", "backward")
    ops = [
        op(i, kinds[i % 2], *([i - 1] if i else []), rank=i % 3, stream=f"stream {i % 2}")
        for i in range(len(durations))
    ]
    path = critical_path(simulate(task_graph(ops), durations))
    assert path.op_ids == tuple(range(len(durations)))
    assert path.busy_ns.get("forward", 0) == sum(durations[::2])
    assert path.busy_ns.get("backward", 0) == sum(durations[1::2])


@random_runs
@given(simulations)
def test_the_critical_path_is_contiguous_and_as_long_as_the_step(simulation: Simulation) -> None:
    path = critical_path(simulation)
    starts, ends = simulation.starts_ns, simulation.ends_ns
    assert starts[path.op_ids[0]] == 0
    assert all(ends[a] == starts[b] for a, b in pairwise(path.op_ids))
    assert sum(path.busy_ns.values()) == simulation.makespan_ns
    assert path.held_ns == 0
    assert len(set(path.op_ids)) == len(path.op_ids)


def test_ties_go_to_a_dependency_then_to_the_lowest_id() -> None:
    ops = (
        op(0, "forward", rank=1),
        op(1, "forward", rank=2),
        op(2, "forward"),
        op(3, "forward", 1),
        op(4, "forward", 0, 1, rank=3),
    )
    simulation = simulate(task_graph(ops), [5, 5, 5, 1, 1])
    assert bindings(simulation).op.tolist() == [-1, -1, -1, 1, 0]
    assert critical_path(simulation).op_ids == (1, 3)


def test_a_queue_is_left_in_the_order_of_arrival() -> None:
    queued = [replace(op(i, "push", stream="nic"), is_queued=True) for i in range(3)]
    ops = (*queued, op(3, "forward", 1))
    path = critical_path(by_hand(ops, [4, 0, 2, 2], [7, 2, 4, 3]))
    assert path.op_ids == (1, 2, 0)


def test_ops_without_length_hold_up_no_queue() -> None:
    """Ops 0 and 1 leave the queue at one instant, 1 before 0, against the order of their ids."""
    first, second, fourth = (
        replace(op(i, "push", *deps, stream="nic"), is_queued=True)
        for i, deps in zip((0, 1, 3), ([2], [4], []), strict=True)
    )
    ops = (first, second, op(2, "forward", 1), fourth, op(4, "forward", rank=1))
    assert critical_path(simulate(task_graph(ops), [0, 0, 0, 5, 3])).op_ids == (3, 1, 2, 0)


def test_a_pause_that_nothing_explains_is_held() -> None:
    simulation = by_hand((op(0, "forward"), op(1, "backward", 0)), [3, 15], [10, 20])
    path, (use,) = critical_path(simulation), stream_uses(simulation)
    assert (path.busy_ns, path.held_ns) == ({"forward": 7, "backward": 5}, 8)
    assert (use.held_ns, use.idle_ns) == (8, 8)


def test_nothing_takes_nothing() -> None:
    empty = by_hand((), [], [])
    assert critical_path(empty).op_ids == ()
    assert stream_uses(empty) == ()
    assert memory_curves(empty, 0, 0) == {}


# Idle time and its causes


@random_runs
@given(p=st.integers(1, 6), m=st.integers(1, 12))
def test_a_uniform_pipeline_without_messages_has_the_known_bubble(p: int, m: int) -> None:
    times = step_times(p, forward=F_NS, backward=B_NS)
    for use in compute(simulate_step(one_f_one_b(p, m), times)):
        assert use.busy_ns == {"forward": m * F_NS, "backward": m * B_NS}
        assert use.bubble_ns == use.idle_ns == (p - 1) * (F_NS + B_NS)


@random_runs
@given(p=st.integers(1, 6), m=st.integers(1, 12), send=st.integers(1, F_NS))
def test_messages_of_gpipe_are_exposed_once_there_and_once_back(p: int, m: int, send: int) -> None:
    """With messages no longer than an action each rank waits for s of them in front, for two on
    each of the p - 1 - s links behind it between its forwards and its backwards, and for s more
    while the ranks before it drain: 2 (p - 1) on every rank, which is also what the step grows by.
    """
    times = step_times(p, forward=F_NS, backward=B_NS, send_forward=send, send_backward=send)
    simulation = simulate_step(gpipe(p, m), times)
    growth = simulation.makespan_ns - (m + p - 1) * (F_NS + B_NS)
    for use in compute(simulation):
        assert sum(use.exposed_ns.values()) == growth == 2 * (p - 1) * send
        assert use.bubble_ns == (p - 1) * (F_NS + B_NS)
    assert critical_path(simulation).busy_ns.get("send", 0) == growth


@random_runs
@given(m=st.integers(1, 12), send=st.integers(1, F_NS // 2))
def test_messages_of_1f1b_on_the_last_of_two_ranks(m: int, send: int) -> None:
    """In front the last rank waits for a forward and its message, in the end for a message and a
    backward. Between them it waits 2 c before every second forward, which the first rank could
    only start when a backward had come back, c behind the last rank: c of it in that rank's
    forward, c in the message.
    """
    times = step_times(2, forward=F_NS, backward=B_NS, send_forward=send, send_backward=send)
    simulation = simulate_step(one_f_one_b(2, m), times)
    num_waits = (m - 1) // 2
    use = compute(simulation)[1]
    assert use.exposed_ns == {"send": (2 + num_waits) * send}
    assert use.bubble_ns == F_NS + B_NS + num_waits * send
    growth = (2 + 2 * num_waits) * send
    assert simulation.makespan_ns == (m + 1) * (F_NS + B_NS) + growth
    assert critical_path(simulation).busy_ns["send"] == growth


def all_reduce(kind: Kind) -> Simulation:
    """Rank 1 computes 35 ns longer than rank 0; then both meet."""
    meeting = [replace(op(2 + r, kind, rank=r), meet=7) for r in range(2)]
    ops = (op(0, "forward"), op(1, "forward", rank=1), *meeting, op(4, "optimizer", 3))
    return simulate(task_graph(ops), [5, 40, 8, 10, 1])


def test_waiting_for_a_late_member_is_waiting_for_a_straggler() -> None:
    early, late = stream_uses(all_reduce("all_reduce"))
    assert (early.straggler_ns, early.bubble_ns) == (35, 0)
    assert early.exposed_ns == {"all_reduce": 2}
    assert (late.straggler_ns, late.bubble_ns) == (0, 1)


def test_a_receiver_that_waits_for_its_sender_is_in_the_bubble() -> None:
    early, _ = stream_uses(all_reduce("send"))
    assert (early.straggler_ns, early.bubble_ns) == (0, 35)


def test_members_that_come_together_wait_for_nobody() -> None:
    meeting = [replace(op(2 + r, "all_reduce", rank=r), meet=7) for r in range(2)]
    ops = (op(0, "forward"), op(1, "forward", rank=1), *meeting, op(4, "forward", 2, 3, rank=2))
    use = stream_uses(simulate(task_graph(ops), [40, 40, 8, 8, 1]))[2]
    assert (use.bubble_ns, use.straggler_ns, use.exposed_ns) == (40, 0, {"all_reduce": 8})


def test_what_comes_after_a_meet_is_no_straggler() -> None:
    """Rank 2 waits for rank 0, which computes 4 ns after it has met the late rank 1."""
    meeting = [replace(op(2 + r, "all_reduce", rank=r), meet=7) for r in range(2)]
    ops = (
        op(0, "forward"),
        op(1, "other", rank=1),
        *meeting,
        op(4, "forward", rank=0),
        op(5, "forward", 4, rank=2),
        op(6, "forward", rank=1),
    )
    done = simulate(task_graph(ops), [5, 40, 8, 10, 4, 1, 1])
    use = stream_uses(done)[2]
    assert (use.host_ns, use.straggler_ns, use.bubble_ns) == (40, 0, 4)
    assert use.exposed_ns == {"all_reduce": 8}
    busy = replace(done, graph=replace(done.graph, kind=np.zeros(7, np.int8)))
    assert stream_uses(busy)[2].straggler_ns == 40


def test_a_wait_is_a_straggler_for_its_own_stream_and_for_others() -> None:
    ops = (op(0, "forward"), op(1, "wait"), op(2, "forward", 1, rank=1))
    first, second = stream_uses(simulate(task_graph(ops), [5, 6, 7]))
    assert (first.busy_ns, first.straggler_ns, first.bubble_ns) == ({"forward": 5}, 6, 7)
    assert (second.busy_ns, second.straggler_ns, second.bubble_ns) == ({"forward": 7}, 6, 5)


def test_overlapped_communication_is_exposed_only_where_it_sticks_out() -> None:
    ops = (
        op(0, "backward"),
        op(1, "reduce_scatter", 0, stream="communication"),
        op(2, "backward"),
        op(3, "optimizer", 1),
    )
    use, link = stream_uses(simulate(task_graph(ops), [10, 12, 7, 4]))
    assert use.exposed_ns == {"reduce_scatter": 5}
    assert (link.busy_ns, link.bubble_ns) == ({"reduce_scatter": 12}, 14)


def test_a_message_behind_others_on_its_link_is_exposed_all_along() -> None:
    sends = [op(1 + i, "send", 0, stream="to 1") for i in range(3)]
    ops = (op(0, "forward"), *sends, op(4, "forward", 1, 2, 3, rank=1))
    use = stream_uses(simulate(task_graph(ops), [10, 4, 4, 4, 1]))[2]
    assert (use.exposed_ns, use.bubble_ns) == ({"send": 12}, 10)


@random_runs
@given(simulations)
def test_busy_and_idle_add_up_and_a_second_telling_agrees(simulation: Simulation) -> None:
    for stream, use in enumerate(stream_uses(simulation)):
        assert sum(use.busy_ns.values()) + use.idle_ns == simulation.makespan_ns
        told = Counter[str](use.exposed_ns)
        told.update(bubble=use.bubble_ns, straggler=use.straggler_ns, host=use.host_ns)
        assert use.held_ns == 0
        assert told == retold(simulation, stream)


def retold(simulation: Simulation, stream: int) -> Counter[str]:
    """Explain the gaps of one stream nanosecond by nanosecond, from the words of the definition."""
    starts: list[int] = simulation.starts_ns.tolist()
    ends: list[int] = simulation.ends_ns.tolist()
    kinds = [KINDS[kind] for kind in simulation.graph.kind.tolist()]
    ids: list[int] = np.flatnonzero(simulation.graph.stream == stream).tolist()
    own = sorted((starts[i], ends[i], i) for i in ids)
    last = min(range(len(ends)), key=lambda i: (-ends[i], i))
    told: Counter[str] = Counter()
    free = 0
    for start, end, op_id in [*own, (simulation.makespan_ns, 0, -1)]:
        if op_id >= 0 and kinds[op_id] == "wait":
            told["straggler"] += end - start
        link, came_late = (last, False) if op_id < 0 else waited_for(simulation, op_id)
        came_late &= op_id >= 0 and kinds[op_id] != "push"
        for moment in range(start - 1, free - 1, -1):
            while starts[link] > moment:
                partner_message = kinds[link] == "push"
                link, is_partners = waited_for(simulation, link)
                came_late |= is_partners and not partner_message
            told[cause(kinds[link], came_late)] += 1
        free = end
    return told


def cause(kind: Kind, came_late: bool) -> str:
    if kind in COMMUNICATION:
        return kind
    if kind in HOST:
        return "host"
    return "straggler" if kind == "wait" or came_late else "bubble"


def waited_for(simulation: Simulation, op_id: int) -> tuple[int, bool]:
    """Return what an op waited for last, and whether it was a partner that waited for it."""
    graph, found = simulation.graph, []
    ends: list[int] = simulation.ends_ns.tolist()
    meet = int(graph.meet[op_id])
    members: list[int] = np.flatnonzero(graph.meet == meet).tolist() if meet >= 0 else [op_id]
    for member in members:
        for tie_break, other in candidates(simulation, member):
            # What ends at 0 delays nobody: nobody waits for a partner for its sake.
            if member == op_id or ends[other] > 0:
                found.append((-ends[other], member != op_id, tie_break, other))
    if not found:
        return -1, False
    _, is_partner, _, other = min(found)
    return other, is_partner


def candidates(simulation: Simulation, op_id: int) -> list[tuple[int, int]]:
    graph = simulation.graph
    starts, ends = simulation.starts_ns, simulation.ends_ns
    neighbours = [i for i in np.flatnonzero(graph.stream == graph.stream[op_id]) if i != op_id]
    if graph.streams[graph.stream[op_id]].is_queue:
        before = [i for i in neighbours if starts[i] < ends[i] <= starts[op_id]]
        before.sort(key=lambda i: int(ends[i]))
    else:
        before = [i for i in neighbours if i < op_id]
    deps = graph.deps_of(op_id).tolist()
    return [(1, int(i)) for i in before[-1:]] + [(0, dep) for dep in deps]


# Memory


def peaks(schedule: Schedule, weight_bytes: int | None = None) -> list[int]:
    """Return the most micro-batches alive on each rank, by byte: 100 of them are static."""
    step = lower(schedule)
    times = step_times(schedule.num_stages, forward=F_NS, backward=B_NS, weight=B_NS // 2)
    simulation = simulate(step.graph, step.costs(times))
    curves = memory_curves(simulation, *activation_changes(step, 4, weight_bytes), 100)
    assert all(curve.alive_bytes[-1] == 100 for curve in curves.values())
    return [(curve.peak_bytes - 100) // 4 for curve in curves.values()]


@random_runs
@given(p=st.integers(1, 6), m=st.integers(1, 12))
def test_peaks_are_the_known_ones(p: int, m: int) -> None:
    assert peaks(gpipe(p, m)) == [m] * p
    assert peaks(one_f_one_b(p, m)) == [min(p - stage, m) for stage in range(p)]


@pytest.mark.parametrize(("weight_bytes", "expected"), [(None, 3), (4, 3), (0, 1)])
def test_an_input_half_frees_what_the_weight_half_does_not_need(
    weight_bytes: int | None, expected: int
) -> None:
    schedule = parse_schedule("0F0 0I0 0F1 0I1 0F2 0I2 0W0 0W1 0W2")
    assert peaks(schedule, weight_bytes) == [expected]


def test_what_is_freed_makes_room_at_the_same_moment() -> None:
    ops = [op(i, "forward") for i in range(4)]
    curve = memory_curves(simulate(task_graph(ops), [0, 5, 0, 3]), [7, 0, 6, 0], [0, 7, 0, 6])[0]
    assert curve.times_ns.tolist() == [0, 5, 8]
    assert curve.alive_bytes.tolist() == [7, 6, 0]


@random_runs
@given(simulations, st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_a_curve_is_the_sum_of_what_has_happened(simulation: Simulation, sizes: list[int]) -> None:
    graph = simulation.graph
    allocated = np.resize(sizes, len(graph))
    freed = np.roll(allocated, 1) // 2
    static = {0: 1000, 1: 2000, 2: 3000}
    ranks = np.array([stream.rank for stream in graph.streams])[graph.stream]
    curves = memory_curves(simulation, allocated, freed, static)
    assert list(curves) == sorted(set(ranks.tolist()))
    for rank, curve in curves.items():
        for moment in np.unique((simulation.starts_ns, simulation.ends_ns)).tolist():
            begun = allocated[(simulation.starts_ns <= moment) & (ranks == rank)].sum()
            ended = freed[(simulation.ends_ns <= moment) & (ranks == rank)].sum()
            place = np.searchsorted(curve.times_ns, moment, side="right") - 1
            assert curve.alive_bytes[place] == static[rank] + begun - ended


def test_bad_bytes_are_refused() -> None:
    simulation = simulate(task_graph([op(0, "forward")]), [5])
    with pytest.raises(ValueError, match=r"op0 \(rank 0, compute\) allocates nan bytes"):
        memory_curves(simulation, float("nan"), 0)
    with pytest.raises(ValueError, match="rank 0 frees 1 bytes more than it holds at 5 ns"):
        memory_curves(simulation, 3, 4)
    step = lower(gpipe(2, 1))
    with pytest.raises(ValueError, match="forward of stage 1 keeps -1 bytes"):
        activation_changes(step, [1, -1])
    with pytest.raises(ValueError, match="stage 1 keeps 3 bytes for the weight half; its forward"):
        activation_changes(step, 2, [1, 3])
