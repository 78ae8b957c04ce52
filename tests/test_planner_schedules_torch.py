"""PyTorch as judge: it reads every schedule of ours, finds no deadlock in it, and we read its own.

The order builders of its schedule classes are called without their constructors, which would want
models and processes.
"""

import csv
import io
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from planner.schedules import SCHEDULES
from planner.schedules.torch_csv import from_torch_csv
from planner.synthesis import ActivationCap, synthesise
from simulator.engine import simulate_step
from simulator.schedule import Schedule
from simulator.step import step_times

torch_schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")

NAMES = sorted(SCHEDULES)
# Ranks and micro-batches: one rank, fewer micro-batches than ranks, as many, more, not a multiple.
SIZES = ((1, 3), (2, 5), (4, 1), (4, 3), (4, 4), (4, 10), (5, 16), (8, 16), (8, 21))

Order = dict[int, list[Any]]


def read_by_torch(schedule: Schedule) -> Order:
    rows = csv.reader(io.StringIO(schedule.to_csv()))
    return {
        rank: [torch_schedules._Action.from_str(cell) for cell in row]
        for rank, row in enumerate(rows)
    }


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_torch_reads_lowers_and_runs_every_schedule(name: str, p: int, m: int) -> None:
    accept(SCHEDULES[name].build(p, m))


@pytest.mark.parametrize("seed", range(4))
def test_torch_accepts_what_is_synthesised(seed: int) -> None:
    rng = np.random.default_rng(seed)
    homes = ((0, 1, 2, 3), (0, 1, 2, 0, 1, 2), (0, 1, 2, 2, 1, 0), (0, 1))[seed]
    forward, weight, send = rng.integers(5, 50, (3, len(homes)))
    times = step_times(
        len(homes), forward=forward, backward=forward + weight, weight=weight, send_forward=send,
        send_backward=send,
    )  # fmt: skip
    cap = ActivationCap(activation_bytes=(1,) * len(homes), cap_bytes=(5,) * (max(homes) + 1))
    accept(synthesise(times, 7, homes=homes, cap=cap, num_trials=100))


def accept(schedule: Schedule) -> None:
    """Let PyTorch read, lower and run `schedule`; its own deadlock check raises in the last."""
    order = read_by_torch(schedule)
    homes, p, m = schedule.homes.tolist(), schedule.num_ranks, schedule.num_microbatches
    assert torch_schedules._validate_schedule(order, p, schedule.num_stages, m) == dict(
        enumerate(homes)
    )
    num_actions = sum(len(actions) for actions in order.values())
    assert num_actions == schedule.num_actions
    with_messages = torch_schedules._add_send_recv(order, homes.__getitem__, schedule.num_stages)
    num_hops = sum(a != b for a, b in pairwise(homes))
    assert sum(map(len, with_messages.values())) == num_actions + 4 * m * num_hops
    steps = torch_schedules._simulate_comms_compute(
        with_messages, homes.__getitem__, schedule.num_stages
    )
    assert sum(action is not None for row in steps.values() for action in row) == (
        num_actions + 4 * m * num_hops
    )


def test_the_deadlock_check_of_torch_can_fail() -> None:
    order = read_by_torch(from_torch_csv("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n"))
    with pytest.raises(AssertionError, match="can't schedule sends/recvs"):
        torch_schedules._add_send_recv(order, int, 2)


def built_by_torch(name: str, p: int, v: int, m: int) -> Order:
    """Return the order of PyTorch's class of that name, idle slots and all."""
    lone = SimpleNamespace(_num_stages=p, _n_microbatches=m)
    if name == "gpipe":
        return dict(torch_schedules.ScheduleGPipe._get_pipeline_order(lone))
    if name == "1f1b":
        order = torch_schedules.Schedule1F1B._get_pipeline_order(lone)
        return {rank: forwards_from_0(actions) for rank, actions in order.items()}
    num_rounds = max(1, m // p)
    several = SimpleNamespace(
        _stages=[None] * v,
        _n_microbatches=m,
        pp_group_size=p,
        n_local_stages=v,
        num_stages=p * v,
        microbatches_per_round=m // num_rounds,
    )
    kind = {
        "interleaved": torch_schedules.ScheduleInterleaved1F1B,
        "breadth_first": torch_schedules.ScheduleLoopedBFS,
        "zb_v": torch_schedules.ScheduleZBVZeroBubble,
        "dual_pipe_v": torch_schedules.ScheduleDualPipeV,
    }[name]
    return {rank: kind._calculate_single_rank_operations(several, rank) for rank in range(p)}


def forwards_from_0(actions: list[Any]) -> list[Any]:
    """Return `actions` with forwards counted from 0: PyTorch 2.13 begins at 1 on the last rank."""
    first = min(a.microbatch_index for a in actions if a and a.computation_type == "F")
    return [
        a._replace(microbatch_index=a.microbatch_index - first)
        if a and a.computation_type == "F"
        else a
        for a in actions
    ]


def takes(name: str, p: int, m: int) -> bool:
    """Return whether PyTorch has an order for these sizes.

    The order of its 1F1B for fewer micro-batches than warm-up forwards has forwards that are not
    there; its constructors refuse the others.
    """
    if name == "1f1b":
        return m >= p - 1
    if name == "interleaved":
        return m % max(1, m // p) == 0
    return name != "dual_pipe_v" or m >= 2 * p


BUILT = [
    (name, p, v, m)
    for name in ("1f1b", "breadth_first", "dual_pipe_v", "gpipe", "interleaved", "zb_v")
    for p, m in SIZES
    for v in ((2, 3) if SCHEDULES[name].takes(3) else (SCHEDULES[name].stages_per_rank or 2,))
    if takes(name, p, m)
]


@pytest.mark.parametrize(("name", "p", "v", "m"), BUILT)
def test_orders_equal_those_of_torch(name: str, p: int, v: int, m: int, tmp_path: Path) -> None:
    # Through the file that PyTorch itself writes.
    path = tmp_path / "order.csv"
    writer = SimpleNamespace(pipeline_order=built_by_torch(name, p, v, m))
    torch_schedules.PipelineScheduleMulti._dump_csv(writer, str(path))
    theirs = from_torch_csv(path.read_text(), name)
    assert str(theirs) == str(SCHEDULES[name].build(p, m, v))


def test_every_class_of_torch_is_compared() -> None:
    assert {name for name, *_ in BUILT} == {*NAMES} - {"zb_h1", "zb_h2"}
    assert min(sum(name == other for other, *_ in BUILT) for name in {b[0] for b in BUILT}) >= 3


def test_a_lowered_order_of_torch_is_read_without_its_messages() -> None:
    schedule = SCHEDULES["zb_v"].build(4, 8)
    with_messages = torch_schedules._add_send_recv(
        read_by_torch(schedule), schedule.homes.tolist().__getitem__, 8
    )
    rows = [
        ",".join(map(str, torch_schedules._add_reduce_grad(row, 8)))
        for row in with_messages.values()
    ]
    assert "SEND_F" in rows[0] and "REDUCE_GRAD" in rows[0]
    assert from_torch_csv("\n".join(rows), "zb_v") == schedule


def test_interleaved_zero_bubble_of_torch_is_read_and_timed() -> None:
    # A schedule that has no name here still runs here.
    p, m = 4, 8
    several = SimpleNamespace(
        _n_microbatches=m, pp_group_size=p, n_local_stages=2, microbatches_per_round=p
    )
    kind = torch_schedules.ScheduleInterleavedZeroBubble
    order = {rank: kind._calculate_single_rank_operations(several, rank) for rank in range(p)}
    text = "\n".join(",".join("" if a is None else str(a) for a in row) for row in order.values())
    schedule = from_torch_csv(text, "interleaved_zero_bubble")
    assert schedule.splits_backward
    step = simulate_step(schedule, step_times(8, forward=1, backward=2, weight=1))
    assert 3 * 2 * m + p - 1 <= step.makespan_ns < 3 * (2 * m + p - 1)


@pytest.mark.parametrize("text", ["0F0,0X0", "0F0,0B0,(0F1;0B1)", "0F0,0B0,0SEND"])
def test_what_torch_would_not_write_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"line 1: .* is not an action"):
        from_torch_csv(text)
