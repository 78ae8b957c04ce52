"""The engines behind one door: the caller says what happens and what it wants to know.

* How long is one step of a schedule, for many candidates or many draws of chance? `step_ns`: the
  compiled walk (tier 1), no graph built.
* When does everything in one step happen? `simulate_step`: the walk again; with shared links,
  degraded links or slow ranks the compiled event loop (tier 2).
* When does everything in any graph happen, queues and collectives too? `simulate`: the event loop.
* The same, told by SimPy in other words: `oracle=True` (tier 3). All agree to the nanosecond.
* What do weeks of failures, restarts and checkpoints do to a run? `simulator.stories.job` (tier 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64
from simulator.graph import KINDS, OpCosts, TaskGraph, op_costs
from simulator.jitter import Jitter
from simulator.network import Change, Link, check_network
from simulator.placement import Placement, place
from simulator.schedule import Schedule
from simulator.step import Convention, StepTimes, lower
from simulator.timeline import Span, Timeline
from simulator.walk import check_times, ends_of_ops, step_ns, walk_step


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
    """When each op of `graph` started and ended, in ns, [N] each; every op has run."""

    graph: TaskGraph
    starts_ns: Int64
    ends_ns: Int64

    @property
    def makespan_ns(self) -> int:
        """The end of the last op."""
        return int(self.ends_ns.max(initial=0))

    @cached_property
    def timeline(self) -> Timeline:
        """The spans in order of start, then of op id; ops that take no time are left out."""
        graph, starts, ends = self.graph, self.starts_ns, self.ends_ns
        shown = np.flatnonzero(ends > starts)
        shown = shown[np.lexsort((shown, starts[shown]))]
        spans = tuple(
            Span(
                rank=graph.streams[stream].rank,
                stream=graph.streams[stream].name,
                name=graph.names[op_id],
                kind=KINDS[kind],
                start_ns=start,
                end_ns=end,
            )
            for op_id, stream, kind, start, end in zip(
                shown.tolist(), graph.stream[shown].tolist(), graph.kind[shown].tolist(),
                starts[shown].tolist(), ends[shown].tolist(), strict=True,
            )
        )  # fmt: skip
        return Timeline(source="simulated", spans=spans)


def simulate(
    graph: TaskGraph,
    costs: OpCosts | Sequence[int] | npt.NDArray[np.int64],
    *,
    links: Sequence[Link] = (),
    changes: Sequence[Change] = (),
    oracle: bool = False,
) -> Simulation:
    """Return when each op of `graph` runs; `costs` are `OpCosts`, or the ops' own times in ns.

    Paths of the graph are places in `links`. Raises ValueError for costs that are not whole and
    non-negative, for a path or change that names no link or rank, and DeadlockError that names who
    waits for whom if nothing can start while something is left.

    >>> from simulator.graph import Op, task_graph
    >>> forward = Op(id=0, rank=0, stream="compute", name="0F0", kind="forward")
    >>> send = Op(id=1, rank=0, stream="to 1", name="0F0 to 1", kind="send", deps=(0,))
    >>> after = Op(id=2, rank=1, stream="compute", name="1F0", kind="forward", deps=(1,))
    >>> simulate(task_graph((forward, send, after)), [10, 3, 10]).makespan_ns
    23
    """
    if not isinstance(costs, OpCosts):
        costs = op_costs(graph, costs)
    if oracle:
        from simulator.oracle import run_oracle as run
    else:
        from simulator.loop import run_loop as run
    check_network(graph, links, changes)
    starts, ends = run(graph, costs, tuple(links), tuple(changes))
    return Simulation(graph=graph, starts_ns=starts, ends_ns=ends)


def simulate_step(
    schedule: Schedule,
    times: StepTimes,
    *,
    lane: int = 0,
    convention: Convention = "eager",
    jitter: Jitter | None = None,
    placement: Placement | None = None,
    changes: Sequence[Change] = (),
    oracle: bool = False,
) -> Simulation:
    """Return when everything in one step of `schedule` happens, for one lane of `times`.

    With a `placement` messages share the links of a fabric: the times of `send_forward` and
    `send_backward` are then their latency, and their bytes take as long as the links allow.

    Raises ValueError for times or a placement of another size, and DeadlockError for an order that
    blocks itself.
    """
    check_times(schedule, times)
    step = lower(schedule, times.before, times.after, convention)
    graph, costs = step.graph, step.costs(times, lane, jitter)
    if placement is not None:
        graph, costs, links = place(step, costs, placement)
        return simulate(graph, costs, links=links, changes=changes, oracle=oracle)
    if changes or oracle:
        return simulate(graph, costs, changes=changes, oracle=oracle)
    ends = ends_of_ops(walk_step(schedule, times, lane, convention, jitter), step, costs)
    return Simulation(graph=graph, starts_ns=ends - costs.ns, ends_ns=ends)


__all__ = ["Simulation", "simulate", "simulate_step", "step_ns"]
