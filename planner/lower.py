"""Lowering: a schedule becomes a task graph once, and stage costs become its durations.

The graph holds one data-parallel replica; a tensor-parallel group is one rank of it. The
convention of messages: the sender's compute goes on at once; a message occupies one direction of
the link between two neighbours for latency plus size over rate, one message at a time, in the
order of the sends; the receiver's action waits for its end.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from planner.plan import Plan, StageCost
from planner.schedule import Action, Schedule
from profiles.profile import Cost
from simulator.engine import simulate
from simulator.graph import Op, TaskGraph
from simulator.timeline import Kind, Timeline

Part = Literal[
    "forward",
    "backward",
    "send_forward",
    "send_backward",
    "all_reduce",
    "optimizer",
    "other",
    "wait",
]
Quantile = Literal["p10_ns", "p50_ns", "p90_ns"]

_KIND: dict[Part, Kind] = {
    "forward": "forward", "backward": "backward", "send_forward": "send",
    "send_backward": "send", "all_reduce": "all_reduce", "optimizer": "optimizer", "other": "other",
    "wait": "wait",
}  # fmt: skip


_AFTER_THE_LAST_ACTION: dict[str, Part] = {
    "reduce": "all_reduce",
    "update": "optimizer",
    "wait": "wait",
}


@dataclass(frozen=True, kw_only=True)
class LoweredStep:
    """A graph and, for each op, the stage and the part of its cost that the op stands for."""

    graph: TaskGraph
    roles: tuple[tuple[int, Part], ...]

    def durations_ns(self, costs: Sequence[StageCost], quantile: Quantile) -> list[int]:
        """Return the time of each op at one quantile of the stage costs."""
        return [getattr(getattr(costs[stage], part), quantile) for stage, part in self.roles]


class _Row(NamedTuple):
    """One op to be: `key` is what other rows name it by, `needs` the keys that it waits for."""

    rank: int
    stream: str
    name: str
    role: tuple[int, Part]
    key: Hashable
    needs: tuple[Hashable, ...] = ()


def lower(schedule: Schedule) -> LoweredStep:
    """Return the task graph of one optimizer step under `schedule`.

    Each pipeline rank starts with its host work, walks its actions on the stream `compute`, then
    reduces its gradients, updates its weights and waits for the slowest of its equals. Raises
    ValueError for a split backward (I, W), which costs of whole backwards cannot time.
    """
    homes = schedule.homes()
    rows: list[_Row] = []
    messages: list[_Row] = []
    for rank, actions in enumerate(schedule.ranks):
        rows.append(_Row(rank, "compute", "step", (actions[0].stage, "other"), ("step", rank)))
        for action in actions:
            if action.kind in "IW":
                raise ValueError(f"schedule {schedule.name}: {action} cannot be timed yet; use B")
            needs = tuple(
                source if homes[source.stage] == rank else ("message", source)
                for source in _inputs(action, schedule.num_stages)
            )
            part: Part = "forward" if action.kind == "F" else "backward"
            role = (action.stage, part)
            rows.append(_Row(rank, "compute", str(action), role, action, needs))
            messages += _message(schedule, homes, action)
        for stage in sorted({action.stage for action in actions}):
            for name, last in _AFTER_THE_LAST_ACTION.items():
                key = (name, stage)
                rows.append(_Row(rank, "compute", f"{name} {stage}", (stage, last), key))
    rows += messages
    place = {row.key: op_id for op_id, row in enumerate(rows)}
    ops = tuple(
        Op(
            id=op_id,
            rank=row.rank,
            stream=row.stream,
            name=row.name,
            kind=_KIND[row.role[1]],
            deps=tuple(sorted(place[key] for key in row.needs)),
        )
        for op_id, row in enumerate(rows)
    )
    return LoweredStep(graph=TaskGraph(ops=ops), roles=tuple(row.role for row in rows))


def _inputs(action: Action, num_stages: int) -> list[Action]:
    """Return the actions whose outputs `action` reads.

    A forward reads the forward of the stage before it; a backward reads what its own forward
    kept and the backward of the stage behind it.
    """
    step = -1 if action.kind == "F" else 1
    own = [] if action.kind == "F" else [action._replace(kind="F")]
    neighbour = action._replace(stage=action.stage + step)
    return own + ([neighbour] if 0 <= neighbour.stage < num_stages else [])


def _message(schedule: Schedule, homes: tuple[int, ...], action: Action) -> list[_Row]:
    """Return the message that carries the output of `action` to another rank, if one is needed."""
    follower = action.stage + (1 if action.kind == "F" else -1)
    here = homes[action.stage]
    if not 0 <= follower < schedule.num_stages or homes[follower] == here:
        return []
    part: Part = "send_forward" if action.kind == "F" else "send_backward"
    there, role = homes[follower], (action.stage, part)
    key = ("message", action)
    return [_Row(here, f"to {there}", f"{action} to {there}", role, key, (action,))]


def simulate_step(
    schedule: Schedule, costs: Sequence[StageCost], quantile: Quantile = "p50_ns"
) -> Timeline:
    """Return the simulated timeline of one step at one quantile of all costs."""
    step = lower(schedule)
    return simulate(step.graph, step.durations_ns(costs, quantile))


def predict_step(schedule: Schedule, costs: Sequence[StageCost]) -> Cost:
    """Return the step time with its band: all costs at their P10, median and P90."""
    step = lower(schedule)
    p10, p50, p90 = (
        simulate(step.graph, step.durations_ns(costs, quantile)).makespan_ns
        for quantile in ("p10_ns", "p50_ns", "p90_ns")
    )
    extrapolated = any(getattr(cost, part).is_extrapolated for cost in costs for part in _KIND)
    return Cost(p10_ns=p10, p50_ns=p50, p90_ns=p90, is_extrapolated=extrapolated)


def simulate_plan(plan: Plan) -> Timeline:
    """Return the predicted timeline of `plan` with the predicted peak memory of each rank.

    Its ranks are pipeline ranks: each stands for the dp * tp equal ranks of its stage.
    """
    schedule = plan.parsed_schedule()
    peaks = {rank: plan.memory[stage].total for stage, rank in enumerate(schedule.homes())}
    return replace(simulate_step(schedule, plan.costs), peak_bytes=peaks)
