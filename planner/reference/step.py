"""One optimizer step: stages of layers, the pipeline over them, and what data parallelism adds."""

import math
from functools import lru_cache
from typing import NamedTuple, final

import numpy as np

from planner.layout import Layout
from planner.reference.places import Places
from planner.reference.program import COMPUTE, EXCHANGE, MATMUL, MEMORY, Duration, Floats, Lanes
from planner.reference.work import RankWork
from planner.schedules import SCHEDULES
from planner.setup import Setup
from profiles.kernel_curves import memory_pass
from simulator.checks import Int64
from simulator.engine import step_ns
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
    """The step of one setup, for the scalars of many candidates side by side."""

    def __init__(self, setup: Setup) -> None:
        self.model, self.workload, self.layout = setup.model, setup.workload, setup.layout
        self.stack, inter = setup.stack, setup.cluster.inter_node
        self.work = RankWork(setup)
        self.places: Places = self.work.places
        self.blocks = self.work.blocks()
        self.stored = self.work.element
        self.gradient_bytes = self.stack.gradient_bytes or self.stored
        self.reduction_bytes = self.stack.reduction_bytes or self.stored
        self.uses_host = inter is not None and inter.uses_host

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
        layer = self.blocks["layer_forward"], self.blocks["layer_backward"]
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
        call_ns = self._tensor_call_ns(lanes)
        parts = {name: block.timed(lanes, call_ns) for name, block in self.blocks.items()}
        last = layout.num_stages - 1
        alike: dict[tuple[int, bool, bool], StageNs] = {}
        found = []
        for stage, num_layers in enumerate(layout.stage_layers):
            key = (num_layers, stage == 0, stage == last)
            if key not in alike:
                alike[key] = self._stage(parts, lanes, *key)
            found.append(alike[key])
        return tuple(found)

    def _tensor_call_ns(self, lanes: Lanes) -> Floats:
        """Return what a tensor-parallel collective costs the host, beside its launch.

        It grows with the members where they are not in one node; and where the host's cores also
        move the bytes of the network, every collective of the job waits for them.
        """
        tp = self.layout.tp
        each = lanes.crossing * self.uses_host + lanes.spanning * (tp > self.places.node_ranks)
        return np.asarray(tp * each)

    def _stage(
        self, parts: dict[str, Duration], lanes: Lanes, num_layers: int, is_first: bool,
        is_last: bool,
    ) -> StageNs:  # fmt: skip
        """Return what a stage of `num_layers` takes."""
        forward = parts["layer_forward"].times(num_layers)
        backward = parts["layer_backward"].times(num_layers)
        weight_ns = num_layers * self.blocks["layer_backward"].weight_ns
        for edge, is_here in (("embedding", is_first), ("head", is_last)):
            if is_here:
                forward += parts[f"{edge}_forward"]
                backward += parts[f"{edge}_backward"]
                weight_ns += self.blocks[f"{edge}_backward"].weight_ns
        parameters = self.parameters(num_layers, is_first, is_last)
        backward += self._accumulation(parameters, num_layers, lanes)
        if self.layout.num_stages > 1:
            forward += self._messages(lanes, 2 - is_first - is_last)
            backward += self._messages(lanes, 2 - is_first - is_last)
        if self.layout.sharding == "zero3":
            forward_ns, backward_ns, reduction = self._fully_sharded(
                parameters, num_layers, forward, backward, lanes
            )
        else:
            forward_ns, backward_ns = forward.elapsed, backward.elapsed
            reduction = self._reduction(parameters, num_layers, forward_ns, backward_ns, lanes)
        return StageNs(
            forward=forward_ns,
            backward=backward_ns,
            weight=weight_ns * lanes.factor[MATMUL],
            reduction=reduction,
            optimizer=self._optimizer(parameters, self._experts(num_layers), lanes),
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

    def _messages(self, lanes: Lanes, count: int) -> Duration:
        """Return the host's share of `count` messages; inside a node it is a few launches."""
        host = lanes.message if self.places.crosses_nodes else np.minimum(lanes.message, 1e5)
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

    def _fully_sharded(
        self, parameters: int, num_layers: int, forward: Duration, backward: Duration, lanes: Lanes
    ) -> tuple[Floats, Floats, Floats]:
        """Return forward, backward and what is left of a step where parameters are sharded.

        Layer after layer is gathered one ahead of its use, in the backward again, and its gradient
        is scattered when it is there.
        """
        units = num_layers + 1
        category, time = self.places.replicas("all_gather", parameters * self.stored / units)
        gather = time.ns * lanes.factor[category]
        category, time = self.places.replicas(
            "reduce_scatter", parameters * self.reduction_bytes / units
        )
        scatter = time.ns * lanes.factor[category]
        calls = num_layers * lanes.launch
        forward += Duration(np.zeros_like(gather), GATHER_CALLS * calls)
        backward += Duration(np.zeros_like(gather), REDUCE_CALLS * calls)
        forward_ns = _prefetched(forward.elapsed / units, gather, None, units)
        backward_ns = _prefetched(backward.elapsed / units, gather, scatter, units)
        hidden_f = np.minimum(forward.elapsed, units * gather)
        hidden_b = np.minimum(backward.elapsed, units * (gather + scatter))
        category, between = self.places.shard_groups(
            "all_reduce", parameters / self.layout.shard_ranks * self.reduction_bytes
        )
        return (
            forward_ns + lanes.exposed * hidden_f,
            backward_ns + lanes.exposed * hidden_b,
            between.ns * lanes.factor[category],
        )

    def _reduction(
        self, parameters: int, num_layers: int, forward_ns: Floats, backward_ns: Floats,
        lanes: Lanes,
    ) -> Floats:  # fmt: skip
        """Return what is left of the data-parallel traffic of a step, gradients and parameters."""
        layout, stack = self.layout, self.stack
        is_sharded = layout.sharding != "none"
        experts = self._experts(num_layers)

        def exchange(kind: str, bytes_each: int) -> Floats:
            shared = self._in_buckets(kind, (parameters - experts) * bytes_each, 1, lanes)
            return shared + self._in_buckets(kind, experts * bytes_each, layout.ep, lanes)

        kind = "reduce_scatter" if is_sharded else "all_reduce"
        left = _left(
            exchange(kind, self.reduction_bytes), backward_ns, num_layers,
            stack.overlaps_gradients, lanes.exposed,
        )  # fmt: skip
        if is_sharded:
            left = left + _left(
                exchange("all_gather", self.stored), forward_ns, num_layers,
                stack.overlaps_parameters, lanes.exposed,
            )  # fmt: skip
            if layout.shard_ranks < layout.replicas:
                category, time = self.places.shard_groups(
                    "all_reduce", parameters / layout.shard_ranks * self.reduction_bytes
                )
                left = left + time.ns * lanes.factor[category]
        return left

    def _in_buckets(self, kind: str, size_bytes: float, copies: int, lanes: Lanes) -> Floats:
        """Return a collective among the replicas, bucket after bucket; see `Places.replicas`."""
        count = max(1, math.ceil(size_bytes / self.stack.gradient_bucket_bytes))
        category, time = self.places.replicas(kind, size_bytes / count, copies)
        return np.asarray(count * time.ns * lanes.factor[category])

    def _optimizer(self, parameters: int, experts: int, lanes: Lanes) -> Floats:
        """Return clipping, AdamW and zeroing: what each must read and write of its owner's share.

        AdamW reads the gradient, reads and writes the master copy and two moments, and writes the
        parameter; the norm reads the gradients, and zeroing writes those that are kept whole.
        """
        stack, layout = self.stack, self.layout
        owned = (parameters - experts) / layout.shard_ranks
        owned += experts / max(1, layout.shard_ranks // layout.ep)
        moments = stack.moment_bytes or 2 * self.stored
        update = 2 * self.gradient_bytes + 2 * (stack.master_bytes or self.stored) + 2 * moments
        update += self.gradient_bytes + (self.stored if stack.master_bytes else 0)
        whole = parameters if layout.sharding in ("none", "zero1") else owned
        size_bytes = owned * update + whole * 2 * self.gradient_bytes
        return np.asarray(self._pass_ns(size_bytes, lanes) + OPTIMIZER_CALLS * lanes.launch)

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


def _prefetched(unit: Floats, gather: Floats, scatter: Floats | None, units: int) -> Floats:
    """Return `units` equal computations, each gathered while the one before it runs.

    The exchange stream gathers unit u + 1 when unit u starts, and scatters u behind it.
    """
    stream, after, ns = [EXCHANGE], [-1], [gather]
    gathered, computed = 0, -1
    for number in range(units):
        compute_after, before = gathered, computed
        if number + 1 < units:
            stream.append(EXCHANGE)
            after.append(before)
            ns.append(gather)
            gathered = len(ns) - 1
        stream.append(COMPUTE)
        after.append(compute_after)
        ns.append(unit)
        computed = len(ns) - 1
        if scatter is not None:
            stream.append(EXCHANGE)
            after.append(computed)
            ns.append(scatter)
    return _walked(stream, after, ns)


def _left(exchange: Floats, compute: Floats, units: int, overlaps: bool, exposed: Floats) -> Floats:
    """Return what of `exchange` is left behind `compute`, of which it takes a share unit by unit.

    Never less than the part that experience says is not hidden.
    """
    if not overlaps or units == 0:
        return exchange
    stream, after, ns = list[int](), list[int](), list[Floats]()
    for _ in range(units):
        stream += [COMPUTE, EXCHANGE]
        after += [-1, len(ns)]
        ns += [compute / units, exchange / units]
    return np.asarray(np.maximum(_walked(stream, after, ns) - compute, exposed * exchange))


def _walked(stream: list[int], after: list[int], ns: list[Floats]) -> Floats:
    ends = walk_streams(
        np.array(stream, np.int32), np.array(after, np.int32), _whole(np.stack(ns)), 2
    )
    return np.asarray(ends.max(axis=0), np.float64)
