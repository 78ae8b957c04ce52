"""One optimizer step: stages of layers, the pipeline over them, and what data parallelism adds."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, final, overload

import numpy as np
import numpy.typing as npt

from planner.layout import Layout
from planner.reference.overlap import left_over, prefetched
from planner.reference.places import Places
from planner.reference.program import INTRA, MATMUL, MEMORY, Duration, Floats, Lanes
from planner.reference.update import Widths, host_of
from planner.reference.work import RankWork
from planner.schedules import SCHEDULES
from planner.setup import Setup
from profiles.kernel_curves import Estimate, memory_curve
from simulator.checks import Int64
from simulator.engine import step_ns
from simulator.schedule import Schedule
from simulator.step import StepTimes, step_times

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


Count = int | Int64
_Collectives = dict[tuple[str, float], tuple[Floats, npt.NDArray[np.intp]]]


@final
class Traffic:
    """What collectives of replicas take on each mesh: it does not depend on the work of a rank."""

    def __init__(self) -> None:
        self._by_mesh: dict[tuple[object, ...], _Collectives] = {}

    def of(self, layouts: Sequence[Layout]) -> _Collectives:
        """Return the collectives of layouts that differ in their sharding alone."""
        first = layouts[0]
        shardings = tuple((each.sharding, each.shard_group) for each in layouts)
        key = (first.dp, first.tp, first.cp, first.pp, first.ep, first.order, shardings)
        return self._by_mesh.setdefault(key, {})


class _Kinds(NamedTuple):
    """Stages of K kinds, [K, 1] each: their layers, those that recompute, and their ends."""

    num_layers: Int64
    num_again: Int64
    is_first: Int64
    is_last: Int64


@final
class StepModel:
    """The step of one setup, for L candidates side by side.

    They differ in the scalars of the stack, or they are `layouts` that differ in their sharding
    alone, all of them under zero3 or none.
    """

    def __init__(
        self,
        setup: Setup,
        work: RankWork | None = None,
        layouts: Sequence[Layout] = (),
        traffic: "Traffic | None" = None,
    ) -> None:
        """Make the model of `setup`; `work` is that of a setup whose ranks have the same work.

        What collectives of `layouts` take is kept in `traffic`, for other work on the same mesh.
        """
        self.model, self.workload, self.layout = setup.model, setup.workload, setup.layout
        self.stack = setup.stack
        self.work = work or RankWork(setup)
        self.places = Places(layout=setup.layout, cluster=setup.cluster)
        self._layouts = tuple(layouts) or (setup.layout,)
        self._places = [Places(layout=layout, cluster=setup.cluster) for layout in self._layouts]
        self._known = {} if traffic is None else traffic.of(self._layouts)
        self.blocks = self.work.blocks
        self.stored = self.work.element
        self._host = host_of(setup) if self.stack.offloads_optimizer else None
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
        """Whether much of a layer's time rests on curves of other GPUs or other sizes.

        An update on the host was never compared with runs.
        """
        if self._host is not None:
            return True
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
        """Return the time of a message between stages."""
        return message_ns(self.work, self.places, lanes)[0]

    def stages(self, lanes: Lanes) -> tuple[StageNs, ...]:
        """Return what each stage takes; stages that are alike are timed once."""
        layout, last = self.layout, self.layout.num_stages - 1
        known: dict[tuple[int, int, bool, bool], int] = {}
        alike = [
            known.setdefault(
                (num_layers, layout.recomputed(stage), stage == 0, stage == last), len(known)
            )
            for stage, num_layers in enumerate(layout.stage_layers)
        ]
        columns = np.array(list(known), np.int64).T[:, :, None]
        kinds = self._kinds(lanes, _Kinds(*columns))
        stages = [StageNs(*(part[kind] for part in kinds)) for kind in range(len(known))]
        return tuple(stages[kind] for kind in alike)

    def _kinds(self, lanes: Lanes, of: "_Kinds") -> StageNs:
        """Return what K kinds of stages take, [K, L] each."""
        parts = self.work.timed(lanes)
        forward = parts["layer_forward"].times(of.num_layers)
        backward = parts["layer_backward"].times(of.num_layers - of.num_again)
        if of.num_again.any():
            backward += parts["layer_again"].times(of.num_again)
        weight_ns = of.num_layers * self.blocks["layer_backward"].weight_ns
        for edge, is_here in (("embedding", of.is_first), ("head", of.is_last)):
            forward += parts[f"{edge}_forward"].times(is_here)
            backward += parts[f"{edge}_backward"].times(is_here)
            weight_ns = weight_ns + is_here * self.blocks[f"{edge}_backward"].weight_ns
        parameters = np.asarray(self.parameters(of.num_layers, of.is_first, of.is_last))
        experts = np.asarray(self._experts(of.num_layers))
        backward += self._accumulation(parameters, of.num_layers, lanes)
        if self.layout.num_stages > 1:
            messages = self.messages(lanes, 1).times(2 - of.is_first - of.is_last)
            forward, backward = forward + messages, backward + messages
        if self.layout.sharding == "zero3":
            forward_ns, backward_ns, reduction = self._fully_sharded(
                parameters, of.num_layers, forward, backward, lanes
            )
        else:
            forward_ns, backward_ns = forward.elapsed, backward.elapsed
            reduction = self._reduction(parameters, of.num_layers, forward_ns, backward_ns, lanes)
        optimizer = self._optimizer(parameters, experts, lanes)
        weight = weight_ns * lanes.factor[MATMUL]
        return StageNs(*np.broadcast_arrays(forward_ns, backward_ns, weight, reduction, optimizer))

    @overload
    def parameters(self, num_layers: int, is_first: int, is_last: int) -> int: ...
    @overload
    def parameters(self, num_layers: Int64, is_first: Int64, is_last: Int64) -> Int64: ...
    def parameters(self, num_layers: Count, is_first: Count, is_last: Count) -> Count:
        """Return the parameters on one rank of a stage, as they are computed with."""
        work, model = self.work, self.model
        mlp = self._mlp_parameters
        if model.num_experts:
            mlp *= max(1, model.num_experts // self.layout.ep) + model.num_shared_experts
        layer = work.h * (2 * work.q + 2 * work.kv) + mlp + 4 * work.h
        is_tied = model.tied_embeddings * is_first * is_last
        return num_layers * layer + (is_first + is_last - is_tied) * work.v * work.h

    def _experts(self, num_layers: Count) -> Count:
        """Return those parameters of a rank that fewer ranks hold than the rest: cut experts."""
        ep, model = self.layout.ep, self.model
        if ep == 1:
            return 0 * num_layers
        return num_layers * max(1, model.num_experts // ep) * self._mlp_parameters

    @property
    def _mlp_parameters(self) -> int:
        """Parameters of one MLP, or of one expert, on one rank."""
        return self.work.h * (self.work.fan_in + self.work.f)

    def messages(self, lanes: Lanes, count: int) -> Duration:
        """Return the host's share of `count` messages."""
        host_ns = message_ns(self.work, self.places, lanes)[1]
        return Duration(np.zeros(lanes.num_lanes), count * host_ns)

    def _accumulation(
        self, parameters: int | Int64, num_layers: int | Int64, lanes: Lanes
    ) -> Duration:
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
            self._accumulation(self.parameters(count, 0, 0), count, lanes) for count in (1, 2)
        )
        return Duration(two.device - one.device, two.host - one.host)

    def _fully_sharded(
        self, parameters: Int64, num_layers: Int64, forward: Duration, backward: Duration,
        lanes: Lanes,
    ) -> tuple[Floats, Floats, Floats]:  # fmt: skip
        """Return forward, backward and what is left of a step where parameters are sharded.

        Layer after layer is gathered one ahead of its use, in the backward again, and its gradient
        is scattered when it is there.
        """
        units = num_layers + 1
        gather = self._traffic(lanes, "all_gather", parameters * self.stored / units)
        scatter = self._traffic(lanes, "reduce_scatter", parameters * self.reduction_bytes / units)
        calls = num_layers * lanes.launch
        forward += Duration(0 * calls, GATHER_CALLS * calls)
        backward += Duration(0 * calls, REDUCE_CALLS * calls)
        forward_ns = prefetched(forward.elapsed / units, gather, np.zeros(1), units)
        backward_ns = prefetched(backward.elapsed / units, gather, scatter, units)
        hidden_f = np.minimum(forward.elapsed, units * gather)
        hidden_b = np.minimum(backward.elapsed, units * (gather + scatter))
        return (
            forward_ns + lanes.exposed * hidden_f,
            backward_ns + lanes.exposed * hidden_b,
            self._traffic(lanes, "between", parameters),
        )

    def _reduction(
        self, parameters: Int64, num_layers: Int64, forward_ns: Floats, backward_ns: Floats,
        lanes: Lanes,
    ) -> Floats:  # fmt: skip
        """Return what is left of the data-parallel traffic of a step, gradients and parameters."""
        stack, experts = self.stack, np.asarray(self._experts(num_layers))

        def exchange(what: str, bytes_each: int) -> Floats:
            shared = self._traffic(lanes, what, (parameters - experts) * bytes_each)
            if self.layout.ep == 1:
                return shared
            return shared + self._traffic(lanes, f"{what} of experts", experts * bytes_each)

        reduced = exchange("reduction", self.reduction_bytes)
        left = left_over(reduced, backward_ns, num_layers, stack.overlaps_gradients, lanes.exposed)
        if all(at.layout.sharding == "none" for at in self._places):
            return left
        gathered = exchange("gathering", self.stored)
        return (
            left
            + left_over(gathered, forward_ns, num_layers, stack.overlaps_parameters, lanes.exposed)
            + self._traffic(lanes, "between", parameters)
        )

    def _traffic(self, lanes: Lanes, what: str, sizes: Floats | Int64) -> Floats:
        """Return what a collective of replicas takes, [K, L], of K `sizes` [K, 1].

        `what` is a method of `_COLLECTIVES`; either there is one layout or one lane.
        """
        rows = []
        for size in sizes[:, 0].tolist():
            if (known := self._known.get((what, size))) is None:
                found = [_COLLECTIVES[what](self, at, size) for at in self._places]
                ns, tiers = np.array([each.ns for _, each in found]), [tier for tier, _ in found]
                known = self._known[what, size] = ns[:, None], np.array(tiers)
            ns_of, tiers_of = known
            rows.append((ns_of * lanes.factor[tiers_of]).ravel())
        return np.stack(rows)

    def _between(self, at: Places, parameters: float) -> tuple[int, Estimate]:
        """Return the reduction of shards between the groups of hybrid sharding."""
        if at.layout.shard_ranks in (1, at.layout.replicas):
            return INTRA, Estimate(0.0)
        return at.shard_groups(
            "all_reduce", parameters / at.layout.shard_ranks * self.reduction_bytes
        )

    def _reduced(self, at: Places, size_bytes: float, copies: int = 1) -> tuple[int, Estimate]:
        """Return the reduction of gradients, whole or scattered, bucket after bucket."""
        kind = "reduce_scatter" if at.layout.sharding != "none" else "all_reduce"
        return self._in_buckets(at, kind, size_bytes, copies)

    def _gathered(self, at: Places, size_bytes: float, copies: int = 1) -> tuple[int, Estimate]:
        """Return the gathering of updated parameters; what is not sharded is not gathered."""
        if at.layout.sharding == "none":
            return INTRA, Estimate(0.0)
        return self._in_buckets(at, "all_gather", size_bytes, copies)

    def _in_buckets(
        self, at: Places, kind: str, size_bytes: float, copies: int
    ) -> tuple[int, Estimate]:
        """Return a collective among the replicas, bucket after bucket; see `Places.replicas`."""
        count = max(1, math.ceil(size_bytes / self.stack.gradient_bucket_bytes))
        tier, time = at.replicas(kind, size_bytes / count, copies)
        return tier, time._replace(ns=count * time.ns)

    def _optimizer(self, parameters: Int64, experts: Int64, lanes: Lanes) -> Floats:
        """Return clipping, AdamW and zeroing: what each must read and write of its owner's share.

        The norm reads the gradients, and zeroing writes those that are kept whole. AdamW may be the
        host's, which gets what is clipped and comes before the next step.
        """
        ep, widths = self.layout.ep, Widths.of(self.stack, self.stored)
        shards = np.array([at.layout.shard_ranks for at in self._places])
        is_whole = np.array([at.layout.sharding in ("none", "zero1") for at in self._places])
        owned = (parameters - experts) / shards + experts / np.maximum(1, shards // ep)
        update = 2 * widths.gradient + (0 if self._host else widths.adam)
        size_bytes = owned * update + np.where(is_whole, parameters, owned) * (2 * widths.gradient)
        here = self._pass_ns(size_bytes, lanes) + OPTIMIZER_CALLS * lanes.launch
        if self._host is None:
            return here
        return here + self._host.update_ns(owned, widths, self.stack.gradient_bucket_bytes)

    def _pass_ns(self, size_bytes: Floats | Int64 | int, lanes: Lanes) -> Floats:
        """Return `memory_pass` of sizes."""
        curve = memory_curve(self.work.gpu)
        ns = curve.launch_ns + 1e9 * np.floor(size_bytes) / curve.bytes_per_s
        return np.asarray(ns * lanes.factor[MEMORY])


_COLLECTIVES: Mapping[str, Callable[[StepModel, Places, float], tuple[int, Estimate]]] = {
    "all_gather": lambda _, at, size: at.replicas("all_gather", size),
    "reduce_scatter": lambda _, at, size: at.replicas("reduce_scatter", size),
    "between": lambda step, at, size: step._between(at, size),
    "reduction": lambda step, at, size: step._reduced(at, size),
    "reduction of experts": lambda step, at, size: step._reduced(at, size, step.layout.ep),
    "gathering": lambda step, at, size: step._gathered(at, size),
    "gathering of experts": lambda step, at, size: step._gathered(at, size, step.layout.ep),
}
"""The data-parallel traffic by name, of so many bytes (of parameters: between)."""


def message_ns(work: RankWork, places: Places, lanes: Lanes) -> tuple[Floats, Floats]:
    """Return what a message between stages takes the link and the host, [L] each.

    Each tensor rank sends its share of it; inside a node it costs the host a few launches.
    """
    tier, time = places.message(work.m * work.h * work.element / places.layout.tp)
    host = lanes.message if places.message_crosses else np.minimum(lanes.message, 1e5)
    return time.ns * lanes.factor[tier], host


def built(layout: Layout) -> Schedule:
    """Return the schedule of `layout`; without a pipeline all are one."""
    name = layout.schedule if layout.num_stages > 1 else "1f1b"
    return _schedule(name, layout.pp, layout.num_microbatches, layout.stages_per_rank)


@lru_cache(maxsize=512)
def _schedule(name: str, pp: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    return SCHEDULES[name].build(pp, num_microbatches, stages_per_rank)


def _whole(ns: Floats) -> Int64:
    return np.rint(ns).astype(np.int64)
