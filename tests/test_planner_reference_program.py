"""Programs of a rank: what waits for what, whose scalar stretches it, and host against device."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.reference.program import (
    ATTENTION,
    CATEGORIES,
    CATEGORY_NAMES,
    INTER,
    INTRA,
    MATMUL,
    MEMORY,
    Duration,
    Lanes,
    Program,
    lanes_of,
    stack_lanes,
)
from profiles.kernel_curves import Estimate
from profiles.stack import SCALARS
from simulator.engine import simulate
from simulator.graph import Op, task_graph
from tests.setups import BUSY, IDLE_HOST, lanes_by_value, scalars, values_of_scalars

KERNELS, EXCHANGES = (MATMUL, ATTENTION, MEMORY), (INTRA, INTER)
NEUTRAL = {name: meaning.neutral for name, meaning in SCALARS.items()}
IDLE = lanes_of(NEUTRAL | IDLE_HOST)
NOTHING = np.zeros(1)


class Line(NamedTuple):
    """One line of a program as it is written down; a kind of -1 is a wait."""

    category: int
    ns: int


LINES = st.lists(
    st.builds(Line, st.sampled_from((*CATEGORIES, -1)), st.integers(0, 9)), min_size=1, max_size=30
)


def written(lines: Sequence[Line]) -> Program:
    program = Program()
    for category, ns in lines:
        if category < 0:
            program.wait()
        elif category in KERNELS:
            program.compute(category, Estimate(ns))
        else:
            program.exchange(category, Estimate(ns))
    return program


def elapsed_by_engine(lines: Sequence[Line]) -> int:
    """Return the end of the program as a graph, of which this is the meaning.

    A kernel follows the kernel before it and, where a wait stands in front of it, the exchanges so
    far; an exchange follows the exchange and the kernel before it. What takes nothing is not sent.
    """
    ops: list[Op] = []
    newest: dict[str, tuple[int, ...]] = {"compute": (), "exchange": ()}
    awaited: tuple[int, ...] = ()
    times = []
    for category, ns in lines:
        stream = "compute" if category in KERNELS else "exchange"
        if category < 0:
            awaited = newest["exchange"]
        elif stream == "compute" or ns > 0:
            deps = awaited if stream == "compute" else newest["compute"]
            ops.append(Op(id=len(ops), rank=0, stream=stream, name="op", kind="other", deps=deps))
            newest[stream] = (len(ops) - 1,)
            awaited = () if stream == "compute" else awaited
            times.append(ns)
    return simulate(task_graph(ops), times).makespan_ns


@given(LINES)
def test_a_program_takes_what_the_engine_says_of_its_graph(lines: list[Line]) -> None:
    found = written(lines).block().timed(IDLE, NOTHING)
    assert found.device.tolist() == [elapsed_by_engine(lines)]
    assert found.host.tolist() == [0]


@given(LINES, st.lists(values_of_scalars(), min_size=1, max_size=4))
def test_lanes_side_by_side_equal_one_by_one(
    lines: list[Line], values: list[dict[str, float]]
) -> None:
    block = written(lines).block()
    together = block.timed(lanes_by_value(values), np.arange(float(len(values))))
    for lane, one in enumerate(values):
        alone = block.timed(lanes_by_value([one]), np.array([float(lane)]))
        assert (together.device[lane], together.host[lane]) == (alone.device[0], alone.host[0])


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_scalar_stretches_its_own_category(category: int) -> None:
    lanes = lanes_of(NEUTRAL | IDLE_HOST | {CATEGORY_NAMES[category]: 3.0})
    for other in CATEGORIES:
        block = written([Line(other, 100)]).block()
        assert block.timed(lanes, NOTHING).device[0] == (300 if other == category else 100)


def test_the_host_pays_for_every_call_and_for_tensor_collectives_more() -> None:
    program = written([Line(MATMUL, 5), Line(INTRA, 0), Line(INTRA, 7)])
    program.compute(MEMORY, Estimate(1), calls=2.5)
    program.tensor_calls = 3
    lanes = lanes_of(NEUTRAL | {"launch": 2.0})
    assert program.block().timed(lanes, np.array([10.0])).host[0] == 5.5 * 2000 + 3 * 10


def test_what_was_extrapolated_is_summed() -> None:
    program = Program()
    program.compute(MATMUL, Estimate(100.0, True))
    program.exchange(INTRA, Estimate(30.0, True))
    program.compute(MATMUL, Estimate(7.0))
    assert program.block().unsure_ns == 130


def test_a_wait_lasts_for_one_kernel() -> None:
    """The second kernel waits for the exchange; the third only for the second."""
    lines = [Line(MATMUL, 1), Line(INTRA, 10), Line(-1, 0), Line(MATMUL, 1), Line(MATMUL, 1)]
    assert written(lines).block().timed(IDLE, NOTHING).device[0] == 13
    hidden = [line for line in lines if line.category >= 0]
    assert written(hidden).block().timed(IDLE, NOTHING).device[0] == 11


def test_a_program_without_ops_takes_its_calls() -> None:
    program = Program()
    program.calls = 4
    found = program.block().timed(stack_lanes(BUSY), NOTHING)
    assert (found.device[0], found.host[0]) == (0, 4e3 * NEUTRAL["launch"])


@given(st.floats(0, 1e12), st.floats(0, 1e12))
def test_host_and_device_run_ahead_of_each_other(device: float, host: float) -> None:
    """The slower of both, and at most the twelfth root of two more where they are alike."""
    elapsed = Duration(np.array([device]), np.array([host])).elapsed[0]
    assert elapsed == Duration(np.array([host]), np.array([device])).elapsed[0]
    slower = max(device, host)
    assert slower * (1 - 1e-12) <= elapsed <= 2 ** (1 / 12) * slower * (1 + 1e-12)


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.floats(1e-3, 1e9))
def test_more_work_never_takes_less(device: float, host: float, more: float) -> None:
    before = Duration(np.array([device]), np.array([host])).elapsed[0]
    after = Duration(np.array([device + more]), np.array([host])).elapsed[0]
    assert after >= before * (1 - 1e-12)


def test_parts_add_up_and_repeat() -> None:
    one, two = (Duration(np.array([d]), np.array([h])) for d, h in ((3.0, 5.0), (20.0, 1.0)))
    found = (one + two).times(2)
    assert (found.device[0], found.host[0]) == (46, 12)
    assert (one + one).elapsed[0] == pytest.approx(one.times(2).elapsed[0])


def test_units_of_the_scalars() -> None:
    values = {"launch": 2.0, "message": 3.0, "crossing": 4.0, "spanning": 5.0, "step": 6.0}
    lanes = lanes_of(NEUTRAL | values | {"exposed": 0.25})
    us = (lanes.launch[0], lanes.message[0], lanes.crossing[0], lanes.spanning[0])
    assert us == (2e3, 3e3, 4e3, 5e3)
    assert (lanes.step[0], lanes.exposed[0], lanes.factor.shape) == (6e6, 0.25, (5, 1))


def test_lanes_of_a_stack_hold_its_scalars_and_neutral_ones_else() -> None:
    lanes = stack_lanes(replace(BUSY, scalars={"matmul": scalars({"matmul": 1.5})["matmul"]}))
    assert lanes.factor[:, 0].tolist() == [1.5, 1, 1, 1, 1]
    assert lanes.launch[0] == 1e3 * NEUTRAL["launch"]


def test_one_number_goes_for_all_lanes() -> None:
    lanes: Lanes = lanes_of(NEUTRAL | {"matmul": [1.0, 2.0, 3.0]})
    assert lanes.num_lanes == 3
    assert lanes.step.tolist() == [1e6 * NEUTRAL["step"]] * 3
