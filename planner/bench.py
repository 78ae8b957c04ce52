"""The speed of the engines on this machine, with the yardsticks measured beside them.

A task is an action or a message. Rates are of processor time, medians of several rounds; what is
timed is the engine as a search calls it, checks included, unless a row says otherwise.
"""

import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median

import networkx as nx
import numpy as np

from planner.parameter_server import server_graph
from planner.schedules import SCHEDULES
from simulator.engine import simulate, step_ns
from simulator.event_kernels import run
from simulator.fabric import star
from simulator.fold import folded_step
from simulator.graph import OpCosts, TaskGraph
from simulator.jitter import Jitter
from simulator.loop import prepare, wire
from simulator.network import Link
from simulator.placement import Placement, place
from simulator.schedule import Schedule
from simulator.step import StepTimes, dataflow, lower, step_times
from simulator.walk import walk_step

_ROUNDS = 5
_ROUND_S = 0.15
_START_UP = """
from planner.schedules import SCHEDULES
from simulator.engine import simulate, step_ns
from simulator.step import lower, step_times
schedule, times = SCHEDULES["1f1b"].build(4, 8), step_times(4, forward=1, backward=[[2, 3]])
step = lower(schedule)
step_ns(schedule, times), simulate(step.graph, step.costs(times))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure; `goal` is what it should reach, 0 where it is only told."""

    name: str
    value: float
    unit: str
    goal: float = 0.0
    is_better_low: bool = False

    @property
    def reaches_goal(self) -> bool:
        """Whether the goal is reached."""
        return self.value <= self.goal if self.is_better_low else self.value >= self.goal


def bench_engines(on_progress: Callable[[float, str], None] = lambda *_: None) -> list[Figure]:
    """Return the speed of every engine; takes about half a minute with a warm compile cache."""
    parts: list[tuple[str, Callable[[], list[Figure]]]] = [
        ("yardsticks", _yardsticks), ("the walk", _walks), ("a large step", _large_step),
        ("a search", _search), ("the event loop", _event_loop), ("start-up", _start_up),
    ]  # fmt: skip
    figures: list[Figure] = []
    for number, (what, measure) in enumerate(parts):
        on_progress(number / len(parts), what)
        figures += measure()
    walked = next(figure.value for figure in figures if figure.name.startswith("walk, 1F1B"))
    simpy = next(figure.value for figure in figures if figure.name.startswith("yardstick: SimPy"))
    ratio = Figure(name="walk over SimPy", value=walked / simpy, unit="times", goal=1000)
    return [*figures, ratio]


def figures_text(figures: Sequence[Figure]) -> str:
    """Return the figures as a table."""
    lines = [f"{'':52} {'measured':>12} {'goal':>12}"]
    for figure in figures:
        sign = "<=" if figure.is_better_low else ">="
        goal = f"{sign} {figure.goal:,.6g}" if figure.goal else ""
        mark = "" if not figure.goal or figure.reaches_goal else "  missed"
        lines.append(f"{figure.name:52} {figure.value:>12,.4g} {goal:>12} {figure.unit}{mark}")
    return "\n".join(lines)


def num_tasks(schedule: Schedule) -> int:
    """Return the actions and messages of one step."""
    return schedule.num_actions + len(dataflow(schedule).sender)


def uneven_times(num_stages: int, num_lanes: int = 1) -> StepTimes:
    """Return times of stages that differ by up to a half, always the same ones."""
    rng = np.random.default_rng(0)
    shape = (num_stages, num_lanes)
    backward = rng.integers(200_000, 300_000, shape)
    return step_times(
        num_stages, forward=rng.integers(100_000, 150_000, shape), backward=backward,
        weight=backward // 2, send_forward=rng.integers(5_000, 10_000, shape),
        send_backward=rng.integers(5_000, 10_000, shape),
    )  # fmt: skip


def cpu_s(call: Callable[[], object]) -> float:
    """Return the processor seconds of one call: the median of rounds of many."""
    call()
    start, count = time.process_time(), 0
    while time.process_time() - start < _ROUND_S:
        call()
        count += 1
    rounds = []
    for _ in range(_ROUNDS):
        start = time.process_time()
        for _ in range(count):
            call()
        rounds.append((time.process_time() - start) / count)
    return median(rounds)


def _rate(name: str, tasks: int, call: Callable[[], object], goal: float = 0.0) -> Figure:
    value = tasks / cpu_s(call) / 1e6
    return Figure(name=name, value=value, unit="M tasks/CPU-s", goal=goal)


def _yardsticks() -> list[Figure]:
    schedule = SCHEDULES["1f1b"].build(16, 64)
    step, times = lower(schedule), uneven_times(16)
    costs, tasks = step.costs(times), num_tasks(schedule)
    return [
        _rate(
            "yardstick: SimPy, 1F1B p=16 m=64", tasks,
            lambda: simulate(step.graph, costs, oracle=True),
        ),
        _rate(
            "yardstick: networkx longest path, the same", tasks,
            partial(nx.dag_longest_path_length, _weighted(step.graph, costs)),
        ),
    ]  # fmt: skip


def _weighted(graph: TaskGraph, costs: OpCosts) -> "nx.DiGraph[int]":
    """Return `graph` with what each op takes on the edges that lead to it, streams included."""
    edges: nx.DiGraph[int] = nx.DiGraph()
    last: dict[int, int] = {}
    for op_id in range(len(graph)):
        stream = int(graph.stream[op_id])
        sources = [*graph.deps_of(op_id).tolist(), *([last[stream]] if stream in last else [])]
        edges.add_weighted_edges_from((source, op_id, int(costs.ns[op_id])) for source in sources)
        last[stream] = op_id
    return edges


def _walks() -> list[Figure]:
    plain = SCHEDULES["1f1b"].build(16, 64)
    looped = SCHEDULES["interleaved"].build(16, 64, 4)
    jitter = Jitter(seed=1, compute_spread=0.05, message_spread=0.1)
    one, four, lanes = uneven_times(16), uneven_times(64), uneven_times(64, 65)
    return [
        _rate("walk, 1F1B p=16 m=64", num_tasks(plain), lambda: step_ns(plain, one)),
        _rate(
            "walk, interleaved p=16 v=4 m=64", num_tasks(looped), lambda: step_ns(looped, four),
            goal=80,
        ),
        _rate(
            "the same, every duration drawn", num_tasks(looped),
            lambda: step_ns(looped, four, jitters=[jitter]),
        ),
        _rate(
            "the same, 65 candidates side by side", 65 * num_tasks(looped),
            lambda: step_ns(looped, lanes),
        ),
    ]  # fmt: skip


def _large_step() -> list[Figure]:
    family, times = SCHEDULES["interleaved"], uneven_times(256)
    schedule = family.build(64, 2048, 4)
    tasks = num_tasks(schedule)
    walked = walk_step(schedule, times)
    num_bytes = schedule.codes.nbytes + sum(
        array.nbytes for array in (walked.action_ends_ns, walked.inputs_ns, walked.sequence)
    )

    def folded() -> object:
        one = SCHEDULES["1f1b"]
        return folded_step(
            partial(one.build, 16), 100_000, one.period(16), one.steady_from(16, 100_000),
            uneven_times(16),
        )  # fmt: skip

    name = "p=64 v=4 m=2,048"
    return [
        Figure(
            name=f"walk, interleaved {name}, {tasks / 1e6:.1f} M tasks", unit="CPU-s", goal=0.1,
            value=cpu_s(lambda: step_ns(schedule, times)), is_better_low=True,
        ),
        Figure(
            name="the same, order built and checked first",
            value=cpu_s(lambda: step_ns(family.build(64, 2048, 4), times)),
            unit="CPU-s",
        ),
        Figure(name="fold, 1F1B p=16 m=100,000, 6.2 M tasks", value=cpu_s(folded), unit="CPU-s"),
        Figure(name="memory of the walk", value=num_bytes / tasks, unit="bytes/task", goal=64,
               is_better_low=True),
    ]  # fmt: skip


def _search() -> list[Figure]:
    """Measure candidates by the clock, a process a core: order built and checked, step walked."""
    num_processes, num_candidates = os.cpu_count() or 1, 2000
    # Spawned, since a fork of a process with threads may hang.
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_candidate, range(100 * num_processes), chunksize=50))
        rates = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(_candidate, range(num_candidates), chunksize=50))
            rates.append(60 * num_candidates / (time.perf_counter() - start))
    name = f"1F1B and interleaved v=4, p=16 m=64, {num_processes} cores"
    return [Figure(name=name, value=median(rates), unit="schedules/min", goal=100_000)]


def _candidate(number: int) -> int:
    """Return the step of one candidate of a search, from nothing; every other is interleaved."""
    name, v = (("1f1b", 1), ("interleaved", 4))[number % 2]
    schedule = SCHEDULES[name].build(16, 64, v)
    forward = 100_000 + (number * np.arange(16 * v)) % 50_000
    times = step_times(16 * v, forward=forward, backward=2 * forward, send_forward=9_000)
    return int(step_ns(schedule, times)[0])


def _event_loop() -> list[Figure]:
    pipeline = shared_pipeline()
    servers = async_servers()
    figures = []
    for name, (graph, costs, links), goal in (
        ("event loop, 1F1B p=16 m=64, 8 replicas folded", pipeline, 5.0),
        ("event loop, async servers 32 x 8", servers, 1.0),
    ):
        wiring = wire(graph)
        # Tables are filled beforehand, as many as one round needs: what is timed is the loop.
        seconds = []
        for _ in range(_ROUNDS):
            tables = [prepare(wiring, costs, links, ()) for _ in range(40)]
            start = time.process_time()
            for table in tables:
                run(*table)
            seconds.append((time.process_time() - start) / len(tables))
        rate = len(graph) / median(seconds) / 1e6
        figures += [
            Figure(name=name, value=rate, unit="M tasks/CPU-s", goal=goal),
            _rate("the same, tables filled each time", len(graph),
                  partial(simulate, graph, costs, links=links)),
            Figure(name="the same, memory", value=tables[0].num_bytes / len(graph),
                   unit="bytes/task", goal=64, is_better_low=True),
        ]  # fmt: skip
    return figures


def shared_pipeline() -> tuple[TaskGraph, OpCosts, tuple[Link, ...]]:
    """Return 1F1B of 16 stages, each of 8 replicas behind one NIC, as one replica that weighs 8."""
    step = lower(SCHEDULES["1f1b"].build(16, 64))
    forward, backward = 40 * uneven_times(16).ns[:2]
    times = step_times(
        16, forward=forward, backward=backward, send_forward=5_000, send_backward=5_000
    )
    placement = Placement(
        fabric=star([50e9] * 16), ranks=range(16), forward_bytes=1 << 24, backward_bytes=1 << 24,
        replicas=8,
    )  # fmt: skip
    return place(step, step.costs(times), placement)


def async_servers() -> tuple[TaskGraph, OpCosts, tuple[Link, ...]]:
    """Return 20 steps of 32 workers of unequal speed and 8 servers, a NIC each, without a bound."""
    num_workers, num_servers = 32, 8
    speeds = np.random.default_rng(0).integers(60, 90, num_workers)
    served = server_graph(
        star([12.5e9] * (num_workers + num_servers)), num_steps=20, staleness=None,
        compute_ns=speeds * 1_000_000, update_ns=[300_000] * num_servers, latency_ns=5_000,
        push_bytes=[16 << 20] * num_servers, pull_bytes=[16 << 20] * num_servers,
    )  # fmt: skip
    return served.graph, served.costs, served.links


def _start_up() -> list[Figure]:
    """Measure a fresh process that asks both engines; the compile cache is warm by now."""
    seconds = []
    for _ in range(_ROUNDS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", _START_UP], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return [
        Figure(name="start-up, both engines asked once", value=median(seconds), unit="CPU-s",
               goal=1.0, is_better_low=True)
    ]  # fmt: skip
