"""One optimizer step: stages of layers, the pipeline over them, and what data parallelism adds."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from planner.layout import Layout
from planner.reference.places import Places
from planner.reference.program import (
    COMPUTE,
    EXCHANGE,
    INTRA,
    MATMUL,
    MEMORY,
    Duration,
    Floats,
    Lanes,
)
from planner.reference.work import RankWork
from planner.schedules import SCHEDULES
from planner.setup import Setup
from profiles.kernel_curves import Estimate, memory_pass
from simulator.checks import Int64
from simulator.engine import step_ns
from simulator.graph import Int32
from simulator.schedule import Schedule
from simulator.step import StepTimes, step_times
from simulator.streams import walk_streams

GATHER_CALLS, REDUCE_CALLS = 10.0, 16.0
"""Host calls that fully sharded data parallelism adds to a layer's forward and backward."""
OPTIMIZER_CALLS = 20.0
UNSURE = 0.2
"""From which part of a layer's time on it counts as extrapolated."""


class StageNs(NamedTuple):
    """What a stage takes, in ns, float64 [L] each; `weight` is part of `backward`.

    `forward` and `backward` are of one micro-batch; `reduction` is what is left of the
    data-parallel traffic of a step behind the last backward, `optimizer` the update.
    """

    forward: Floats
    backward: Floats
    weight: Floats
    reduction: Floats
    optimizer: Floats


@final
class StepModel:
    """The step of one setup, for L candidates side by side.

    They differ in the scalars of the stack, or they are `layouts` that differ in their sharding
    alone, all of them under zero3 or none.
    """

    def __init__(
        self, setup: Setup, work: RankWork | None = None, layouts: Sequence[Layout] = ()
    ) -> None:
        """Make the model of `setup`; `work` is that of a setup whose ranks have the same work."""
        self.model, self.workload, self.layout = setup.model, setup.workload, setup.layout
        self.stack = setup.stack
        self.work = work or RankWork(setup)
        self.places = Places(layout=setup.layout, cluster=setup.cluster)
        self._places = [
            Places(layout=layout, cluster=setup.cluster) for layout in layouts or (setup.layout,)
        ]
        self.blocks = self.work.blocks
        self.stored = self.work.element
        self.gradient_bytes = self.stack.gradient_bytes or self.stored
        self.reduction_bytes = self.stack.reduction_bytes or self.stored

    def step_ns(self, lanes: Lanes) -> Floats:
        """Return the time of the step, float64 [L]."""
        return self.step_of(self.stages(lanes), lanes)

    def step_of(self, stages: tuple[StageNs, ...], lanes: Lanes) -> Floats:
        """Return the time of the step whose stages take `stages`, float64 [L]."""
        layout = self.layout
        if layout.num_stages == 1:
            (only,) = stages
            microbatches = layout.num_microbatches * (only.forward + only.backward)
            return microbatches + only.reduction + only.optimizer + lanes.step
        return np.asarray(step_ns(built(layout), self.times(lanes, stages)) + lanes.step)

    @property
    def is_extrapolated(self) -> bool:
        """Whether much of a layer's time rests on curves of other GPUs or other sizes."""
        again = "layer_again" if "layer_again" in self.blocks else "layer_backward"
        layer = self.blocks["layer_forward"], self.blocks[again]
        whole = sum(float(block.ns.sum()) for block in layer)
        return sum(block.unsure_ns for block in layer) > UNSURE * whole

    def times(self, lanes: Lanes, stages: tuple[StageNs, ...]) -> StepTimes:
        """Return the times of a step of `stages`, ready for the engines; the host's are not in."""
        columns = {
            name: _whole(np.stack([getattr(stage, name) for stage in stages]))
            for name in StageNs._fields
        }
        send = _whole(self.send_ns(lanes))[None, :]
        return step_times(
            len(stages),
            forward=columns["forward"],
            backward=columns["backward"],
            weight=np.minimum(columns["weight"], columns["backward"]),
            send_forward=send,
            send_backward=send,
            after={"all_reduce": columns["reduction"], "optimizer": columns["optimizer"]},
        )

    def send_ns(self, lanes: Lanes) -> Floats:
        """Return the time of a message between stages; each tensor rank sends its share of it."""
        size_bytes = self.work.m * self.work.h * self.stored / self.layout.tp
        category, time = self.places.message(size_bytes)
        return np.asarray(time.ns * lanes.factor[category])

    def stages(self, lanes: Lanes) -> tuple[StageNs, ...]:
        """Return what each stage takes; stages that are alike are timed once."""
        layout = self.layout
        parts = self.work.timed(lanes)
        last = layout.num_stages - 1
        alike: dict[tuple[int, int, bool, bool], StageNs] = {}
        found = []
        for stage, num_layers in enumerate(layout.stage_layers):
            key = (num_layers, layout.recomputed(stage), stage == 0, stage == last)
            if key not in alike:
                alike[key] = self._stage(parts, lanes, *key)
            found.append(alike[key])
        return tuple(found)

    def _stage(
        self, parts: dict[str, Duration], lanes: Lanes, num_layers: int, num_again: int,
        is_first: bool, is_last: bool,
    ) -> StageNs:  # fmt: skip
        """Return what a stage of `num_layers` takes, `num_again` of which recompute."""
        forward = parts["layer_forward"].times(num_layers)
        backward = parts["layer_backward"].times(num_layers - num_again)
        if num_again:
            backward += parts["layer_again"].times(num_again)
        weight_ns = num_layers * self.blocks["layer_backward"].weight_ns
        for edge, is_here in (("embedding", is_first), ("head", is_last)):
            if is_here:
                forward += parts[f"{edge}_forward"]
                backward += parts[f"{edge}_backward"]
                weight_ns += self.blocks[f"{edge}_backward"].weight_ns
        parameters = self.parameters(num_layers, is_first, is_last)
        backward += self._accumulation(parameters, num_layers, lanes)
        if self.layout.num_stages > 1:
            forward += self.messages(lanes, 2 - is_first - is_last)
            backward += self.messages(lanes, 2 - is_first - is_last)
        if self.layout.sharding == "zero3":
            forward_ns, backward_ns, reduction = self._fully_sharded(
                parameters, num_layers, forward, backward, lanes
            )
        else:
            forward_ns, backward_ns = forward.elapsed, backward.elapsed
            reduction = self._reduction(parameters, num_layers, forward_ns, backward_ns, lanes)
        optimizer = self._optimizer(parameters, self._experts(num_layers), lanes)
        return StageNs(
            *np.broadcast_arrays(
                forward_ns, backward_ns, weight_ns * lanes.factor[MATMUL], reduction, optimizer
            )
        )

    def parameters(self, num_layers: int, is_first: bool, is_last: bool) -> int:
        """Return the parameters on one rank of a stage, as they are computed with."""
        work, model = self.work, self.model
        mlp = self._mlp_parameters
        if model.num_experts:
            mlp *= max(1, model.num_experts // self.layout.ep) + model.num_shared_experts
        layer = work.h * (2 * work.q + 2 * work.kv) + mlp + 4 * work.h
        is_tied = model.tied_embeddings and is_first and is_last
        return num_layers * layer + (is_first + is_last - is_tied) * work.v * work.h

    def _experts(self, num_layers: int) -> int:
        """Return those parameters of a rank that fewer ranks hold than the rest: cut experts."""
        ep, model = self.layout.ep, self.model
        if ep == 1:
            return 0
        return num_layers * max(1, model.num_experts // ep) * self._mlp_parameters

    @property
    def _mlp_parameters(self) -> int:
        """Parameters of one MLP, or of one expert, on one rank."""
        return self.work.h * (self.work.fan_in + self.work.f)

    def messages(self, lanes: Lanes, count: int) -> Duration:
        """Return the host's share of `count` messages; inside a node it is a few launches."""
        host = lanes.message if self.places.message_crosses else np.minimum(lanes.message, 1e5)
        return Duration(np.zeros(lanes.num_lanes), count * host)

    def _accumulation(self, parameters: int, num_layers: int, lanes: Lanes) -> Duration:
        """Return the addition of a micro-batch's weight gradients to those before it.

        Kept in the dtype of the products, or added by them to fp32 sums, a gradient is read and
        written once more; an eager stack adds fp32 sums by kernels of their own.
        """
        is_apart = self.stack.fusion == "eager" and self.gradient_bytes > self.stored
        if self.layout.num_microbatches == 1:
            return Duration(np.zeros(lanes.num_lanes), np.zeros(lanes.num_lanes))
        each = self.stored + 2 * self.gradient_bytes if is_apart else 2 * self.gradient_bytes
        time = self._pass_ns(each * parameters, lanes)
        return Duration(time, (8 * num_layers if is_apart else 0) * lanes.launch)

    def accumulated_layer(self, lanes: Lanes) -> Duration:
        """Return what a layer more in a stage adds to its accumulation."""
        one, two = (
            self._accumulation(self.parameters(count, False, False), count, lanes)
            for count in (1, 2)
        )
        return Duration(two.device - one.device, two.host - one.host)

    def _fully_sharded(
        self, parameters: int, num_layers: int, forward: Duration, backward: Duration, lanes: Lanes
    ) -> tuple[Floats, Floats, Floats]:
        """Return forward, backward and what is left of a step where parameters are sharded.

        Layer after layer is gathered one ahead of its use, in the backward again, and its gradient
        is scattered when it is there.
        """
        units = num_layers + 1
        stored = parameters * self.stored / units
        gather = self._traffic(lanes, lambda at: at.replicas("all_gather", stored))
        reduced = parameters * self.reduction_bytes / units
        scatter = self._traffic(lanes, lambda at: at.replicas("reduce_scatter", reduced))
        calls = num_layers * lanes.launch
        forward += Duration(np.zeros_like(gather), GATHER_CALLS * calls)
        backward += Duration(np.zeros_like(gather), REDUCE_CALLS * calls)
        forward_ns = _prefetched(forward.elapsed / units, gather, None, units)
        backward_ns = _prefetched(backward.elapsed / units, gather, scatter, units)
        hidden_f = np.minimum(forward.elapsed, units * gather)
        hidden_b = np.minimum(backward.elapsed, units * (gather + scatter))
        return (
            forward_ns + lanes.exposed * hidden_f,
            backward_ns + lanes.exposed * hidden_b,
            self._between(parameters, lanes),
        )

    def _reduction(
        self, parameters: int, num_layers: int, forward_ns: Floats, backward_ns: Floats,
        lanes: Lanes,
    ) -> Floats:  # fmt: skip
        """Return what is left of the data-parallel traffic of a step, gradients and parameters."""
        stack, experts = self.stack, self._experts(num_layers)

        def exchange(kind: str | None, bytes_each: int) -> Floats:
            shared = self._in_buckets(kind, (parameters - experts) * bytes_each, 1, lanes)
            return shared + self._in_buckets(kind, experts * bytes_each, self.layout.ep, lanes)

        reduced = exchange(None, self.reduction_bytes)
        left = _left(reduced, backward_ns, num_layers, stack.overlaps_gradients, lanes.exposed)
        if all(at.layout.sharding == "none" for at in self._places):
            return left
        gathered = exchange("all_gather", self.stored)
        return (
            left
            + _left(gathered, forward_ns, num_layers, stack.overlaps_parameters, lanes.exposed)
            + self._between(parameters, lanes)
        )

    def _between(self, parameters: int, lanes: Lanes) -> Floats:
        """Return the reduction of shards between the groups of hybrid sharding."""

        def reduced(at: Places) -> tuple[int, Estimate]:
            if at.layout.shard_ranks in (1, at.layout.replicas):
                return INTRA, Estimate(0.0)
            share = parameters / at.layout.shard_ranks
            return at.shard_groups("all_reduce", share * self.reduction_bytes)

        return self._traffic(lanes, reduced)

    def _traffic(self, lanes: Lanes, time: Callable[[Places], tuple[int, Estimate]]) -> Floats:
        """Return what a collective takes, [L], that is `time` of a layout alone, and its tier."""
        found = [time(places) for places in self._places]
        ns = np.array([estimate.ns for _, estimate in found])
        tiers = [tier for tier, _ in found]
        # Either there is one layout or one lane.
        return np.asarray((ns[:, None] * lanes.factor[tiers]).ravel())

    def _in_buckets(self, kind: str | None, size_bytes: float, copies: int, lanes: Lanes) -> Floats:
        """Return a collective among the replicas, bucket after bucket; see `Places.replicas`.

        Without a `kind` it is the reduction of gradients, whole or scattered; what is not sharded
        is not gathered.
        """
        count = max(1, math.ceil(size_bytes / self.stack.gradient_bucket_bytes))

        def bucket(at: Places) -> tuple[int, Estimate]:
            is_sharded = at.layout.sharding != "none"
            if kind is not None and not is_sharded:
                return INTRA, Estimate(0.0)
            reduction = "reduce_scatter" if is_sharded else "all_reduce"
            return at.replicas(kind or reduction, size_bytes / count, copies)

        return count * self._traffic(lanes, bucket)

    def _optimizer(self, parameters: int, experts: int, lanes: Lanes) -> Floats:
        """Return clipping, AdamW and zeroing: what each must read and write of its owner's share.

        AdamW reads the gradient, reads and writes the master copy and two moments, and writes the
        parameter; the norm reads the gradients, and zeroing writes those that are kept whole.
        """
        stack, ep = self.stack, self.layout.ep
        shards = np.array([at.layout.shard_ranks for at in self._places])
        is_whole = np.array([at.layout.sharding in ("none", "zero1") for at in self._places])
        owned = (parameters - experts) / shards + experts / np.maximum(1, shards // ep)
        moments = stack.moment_bytes or 2 * self.stored
        update = 2 * self.gradient_bytes + 2 * (stack.master_bytes or self.stored) + 2 * moments
        update += self.gradient_bytes + (self.stored if stack.master_bytes else 0)
        size_bytes = owned * update + np.where(is_whole, parameters, owned) * (
            2 * self.gradient_bytes
        )
        passes = [memory_pass(self.work.gpu, int(each)).ns for each in size_bytes]
        return np.asarray(passes * lanes.factor[MEMORY] + OPTIMIZER_CALLS * lanes.launch)

    def _pass_ns(self, size_bytes: float, lanes: Lanes) -> Floats:
        return np.asarray(memory_pass(self.work.gpu, int(size_bytes)).ns * lanes.factor[MEMORY])


def built(layout: Layout) -> Schedule:
    """Return the schedule of `layout`; without a pipeline all are one."""
    name = layout.schedule if layout.num_stages > 1 else "1f1b"
    return _schedule(name, layout.pp, layout.num_microbatches, layout.stages_per_rank)


@lru_cache(maxsize=512)
def _schedule(name: str, pp: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    return SCHEDULES[name].build(pp, num_microbatches, stages_per_rank)


def _whole(ns: Floats) -> Int64:
    return np.rint(ns).astype(np.int64)


class _Program(NamedTuple):
    """A program of `walk_streams`; `which` [N] says whose time each op takes."""

    stream: Int32
    after: Int32
    which: npt.NDArray[np.intp]

    def walked(self, *times: Floats) -> Floats:
        """Return when the program ends, [L], of ops that take `times`, [L] each."""
        ns = _whole(np.stack(np.broadcast_arrays(*times)))
        ends = walk_streams(self.stream, self.after, ns[self.which], 2)
        return np.asarray(ends.max(axis=0), np.float64)


def _program(ops: Sequence[tuple[int, int, int]]) -> _Program:
    """Return the program of `ops`: the stream, what it comes after and whose time it takes."""
    stream, after, which = np.array(ops, np.int32).T
    return _Program(np.ascontiguousarray(stream), np.ascontiguousarray(after), which.astype(int))


@lru_cache(maxsize=1024)
def _prefetch(units: int, *, scatters: bool) -> _Program:
    """Return `units` computations (0), each gathered (1) while the one before it runs.

    The exchange stream gathers unit u + 1 when unit u starts, and scatters (2) u behind it.
    """
    ops = [(EXCHANGE, -1, 1)]
    gathered, computed = 0, -1
    for number in range(units):
        compute_after, before = gathered, computed
        if number + 1 < units:
            gathered = len(ops)
            ops.append((EXCHANGE, before, 1))
        computed = len(ops)
        ops.append((COMPUTE, compute_after, 0))
        if scatters:
            ops.append((EXCHANGE, computed, 2))
    return _program(ops)


def _prefetched(unit: Floats, gather: Floats, scatter: Floats | None, units: int) -> Floats:
    """Return `units` equal computations, each gathered while the one before it runs."""
    if scatter is None:
        return _prefetch(units, scatters=False).walked(unit, gather)
    return _prefetch(units, scatters=True).walked(unit, gather, scatter)


@lru_cache(maxsize=1024)
def _overlap(units: int) -> _Program:
    """Return `units` computations (0), behind each of which an exchange (1) starts."""
    return _program(
        [op for unit in range(units) for op in ((COMPUTE, -1, 0), (EXCHANGE, 2 * unit, 1))]
    )


def _left(exchange: Floats, compute: Floats, units: int, overlaps: bool, exposed: Floats) -> Floats:
    """Return what of `exchange` is left behind `compute`, of which it takes a share unit by unit.

    Never less than the part that experience says is not hidden.
    """
    if not overlaps or units == 0:
        return exchange
    end = _overlap(units).walked(compute / units, exchange / units)
    return np.asarray(np.maximum(end - compute, exposed * exchange))
