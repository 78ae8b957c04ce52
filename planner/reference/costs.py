"""What layouts take on a cluster that is not at hand: the costs of the search, from the step model.

The stages of a plan hold what `planner.reference.step` says of them, each with the band in which
published runs lay around such predictions.
"""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from typing import Any, final

import numpy as np

from planner.bounds import Columns, Parts
from planner.cost import NOTHING
from planner.interval import Band, band_of
from planner.layout import Layout
from planner.memory import context_bytes
from planner.mixed import MixedCosts
from planner.plan import ProfileReference, StageCost
from planner.pools import unlike_pools
from planner.reference.places import Places
from planner.reference.program import MATMUL, Lanes, lanes_of, stack_lanes
from planner.reference.step import StageNs, StepModel, Traffic, message_ns
from planner.reference.update import known_host
from planner.reference.work import RankWork
from planner.setup import Setup, padded
from profiles.cluster import ClusterSpec, GpuSpec
from profiles.errors import UnsupportedError
from profiles.files import digest
from profiles.job import Job
from profiles.model import ModelSpec
from profiles.presets import calibrated, gpu_presets
from profiles.profile import Cost, DeviceFacts
from profiles.stack import SCALARS, StackSpec
from profiles.workload import Workload
from simulator.checks import Int64

MEASUREMENTS = ("kernels.toml", "collectives.toml")
REAL, ALONE = range(2)
"""Lanes: a stage as it is, and without what its ranks exchange inside its layers."""
EXCHANGES = frozenset({"intra", "inter", "crossing", "spanning"})
"""The scalars of what such an exchange takes device and host."""


@final
@dataclass(frozen=True, kw_only=True)
class ReferenceCosts:
    """The costs of one model and workload on `cluster`, under any stack of the field."""

    model: ModelSpec
    workload: Workload
    stack: StackSpec
    cluster: ClusterSpec

    @property
    def is_of_executor(self) -> bool:
        """Any stack may run it; plans for other clusters are not run here."""
        return False

    @property
    def gpu(self) -> GpuSpec:
        """The GPU of every rank."""
        return self.cluster.pools[0].gpu

    @property
    def origin(self) -> ProfileReference:
        """The published measurements, as a profile of a cluster on which nothing was measured."""
        whole, newest = reference_data()
        return ProfileReference(
            path="",
            digest=whole,
            device=DeviceFacts(
                kind="cuda",
                name=self.gpu.name,
                backend="nccl",
                num_ranks=self.cluster.num_ranks,
                memory_bytes=self.gpu.memory_bytes,
                driver="",
            ),
            versions={"reference": whole[:12]},
            measured_at=newest,
        )

    def completed(self, layout: Layout) -> Layout:
        """Return `layout` as the stack runs it unless it is told otherwise."""
        return replace(
            layout,
            sharding=self.stack.sharding if layout.replicas > 1 else "none",
            recompute=self.stack.recompute,
            sequence_parallel=layout.tp > 1 and self.stack.shards_sequence,
        )

    def context_bytes(self, layout: Layout) -> int:
        """Return what a process holds on its GPU outside of the framework's allocator."""
        return context_bytes(layout)

    def parts(self, layout: Layout, _rank: int = 0) -> Parts:
        """Return what a micro-batch takes a layer, at the ends of the model and between stages.

        How `layout` splits its layers into stages and shards its states does not matter.
        """
        work = (*_work_key(layout), layout.num_microbatches > 1)
        if (found := self._parts.get(work)) is None:
            found = self._parts[work] = self._parts_of_work(self._step(layout))
        if layout.pp == 1:
            return found
        mesh = (*work, layout.pp, layout.dp, layout.order)
        if (whole := self._parts.get(mesh)) is None:
            places = Places(layout=layout, cluster=self.cluster)
            send, host = message_ns(self._works[work[:-1]], places, self._real)
            whole = self._parts[mesh] = found._replace(
                message_host=float(host[0]), send=float(send[0])
            )
        return whole

    def _parts_of_work(self, step: StepModel) -> Parts:
        """Return the parts of one rank's work, without messages."""
        timed, lanes = step.work.timed(self._real), self._real
        weight = {name: block.weight_ns for name, block in step.blocks.items()}
        factor = float(lanes.factor[MATMUL, 0])

        def pair(name: str) -> tuple[float, float]:
            return float(timed[name].device[0]), float(timed[name].host[0])

        layer = pair("layer_backward")
        again = pair("layer_again") if "layer_again" in timed else layer
        added = step.accumulated_layer(lanes)
        return Parts(
            *pair("layer_forward"),
            layer[0] + float(added.device[0]),
            layer[1] + float(added.host[0]),
            factor * weight["layer_backward"],
            *pair("embedding_forward"),
            *pair("embedding_backward"),
            factor * weight["embedding_backward"],
            *pair("head_forward"),
            *pair("head_backward"),
            factor * weight["head_backward"],
            message_host=0.0,
            send=0.0,
            step=float(lanes.step[0]),
            again=again[0] - layer[0],
            again_host=again[1] - layer[1],
        )

    def columns(self, layouts: Sequence[Layout]) -> Columns:
        """Return the medians of `stages` of layouts that differ in their sharding alone."""
        table = np.empty((len(Columns._fields), len(layouts), layouts[0].num_stages), np.int64)
        for is_gathered in (False, True):
            rows = [
                n for n, each in enumerate(layouts) if (each.sharding == "zero3") == is_gathered
            ]
            if rows:
                table[:, rows] = self._alike([layouts[row] for row in rows])
        return Columns(*table)

    def _alike(self, layouts: Sequence[Layout]) -> Columns:
        """Return the columns of layouts all of which gather their parameters, or none."""
        step = self._step(layouts[0], layouts)
        stages = step.stages(self._real)
        shape = len(layouts), len(stages)

        def column(name: str) -> Int64:
            ns = np.array([getattr(stage, name) for stage in stages])
            return np.broadcast_to(np.rint(ns).astype(np.int64).T, shape)

        send = np.zeros(shape, np.int64)
        if len(stages) > 1:
            send[:] = round(float(step.send_ns(self._real)[0]))
        other = np.full(shape, round(float(self._real.step[0])))
        is_last = np.arange(len(stages)) == len(stages) - 1
        return Columns(
            forward=column("forward"),
            backward=column("backward"),
            weight=np.minimum(column("weight"), column("backward")),
            send_forward=np.where(is_last, 0, send),
            send_backward=np.where(is_last[::-1], 0, send),
            all_reduce=column("reduction"),
            optimizer=column("optimizer"),
            other=other,
            wait=np.zeros(shape, np.int64),
        )

    def stages(self, layout: Layout, _homes: Sequence[int] = ()) -> tuple[StageCost, ...]:
        """Return what every stage of `layout` takes; those that are alike are one object."""
        step = self._step(layout)
        is_extrapolated = step.is_extrapolated
        spread = _Spread(band_of(self.stack.name, self.gpu.name, is_extrapolated), is_extrapolated)
        send_ns = float(step.send_ns(self._lanes)[REAL]) if layout.num_stages > 1 else 0.0
        found = step.stages(self._lanes)
        alike = {id(stage): stage for stage in found}
        costs = {
            key: self._stage_cost(stage, spread, send_ns, stage is found[0], stage is found[-1])
            for key, stage in alike.items()
        }
        return tuple(costs[id(stage)] for stage in found)

    def _stage_cost(
        self, stage: StageNs, spread: "_Spread", send_ns: float, is_first: bool, is_last: bool
    ) -> StageCost:
        ns = {name: float(getattr(stage, name)[REAL]) for name in StageNs._fields}
        forward, backward = (
            round(ns[name] - float(getattr(stage, name)[ALONE])) for name in ("forward", "backward")
        )
        return StageCost(
            forward=spread(ns["forward"]),
            backward=spread(ns["backward"]),
            weight=spread(min(ns["weight"], ns["backward"])),
            send_forward=spread(0.0 if is_last else send_ns),
            send_backward=spread(0.0 if is_first else send_ns),
            all_reduce=spread(ns["reduction"]),
            optimizer=spread(ns["optimizer"]),
            other=spread(float(self._lanes.step[REAL])),
            wait=NOTHING,
            tensor_parallel_forward_ns=forward,
            tensor_parallel_backward_ns=backward,
        )

    def _step(self, layout: Layout, layouts: Sequence[Layout] = ()) -> StepModel:
        """Return the step of `layout`, or of `layouts` that differ in their sharding alone.

        Ranks hold a whole number of vocabulary rows each.
        """
        setup = Setup(
            model=padded(self.model, self.stack.pads_vocabulary, layout.tp),
            workload=self.workload,
            layout=layout,
            cluster=self.cluster,
            stack=self.stack,
        )
        key = _work_key(layout)
        if (work := self._works.get(key)) is None:
            work = self._works[key] = RankWork(setup)
        return StepModel(setup, work, layouts, self._traffic if layouts else None)

    @cached_property
    def _works(self) -> dict[tuple[object, ...], RankWork]:
        """The work of ranks, by all that it depends on."""
        return {}

    @cached_property
    def _parts(self) -> dict[tuple[object, ...], Parts]:
        """The parts of layouts, by all that they depend on."""
        return {}

    @cached_property
    def _traffic(self) -> Traffic:
        """The collectives of meshes that were asked for."""
        return Traffic()

    @cached_property
    def _real(self) -> Lanes:
        """The scalars of the stack, without a second lane."""
        return stack_lanes(self.stack)

    @cached_property
    def _lanes(self) -> Lanes:
        values = {name: self.stack.scalar(name) for name in SCALARS}
        return lanes_of(
            {name: (value, 0.0 if name in EXCHANGES else value) for name, value in values.items()}
        )


@dataclass(frozen=True, slots=True)
class _Spread:
    """Makes a cost of a time: `band` is the same share of each, and so of their sum."""

    band: Band
    is_extrapolated: bool

    def __call__(self, ns: float) -> Cost:
        if round(ns) <= 0:
            return NOTHING
        return Cost(
            p10_ns=round(self.band.low * ns),
            p50_ns=round(ns),
            p90_ns=round(self.band.high * ns),
            is_extrapolated=self.is_extrapolated,
        )


def _work_key(layout: Layout) -> tuple[object, ...]:
    """Return what the work of a rank depends on.

    How many replicas and stages there are matters for the places of the groups alone, where a
    group of another axis lies inside.
    """
    inner = layout.order.split("-")
    ends = max(inner.index("tp"), inner.index("cp"), inner.index("dp") if layout.ep > 1 else 0)
    sizes = tuple(getattr(layout, axis) for axis in inner[: ends + 1])
    return (tuple(inner[: ends + 1]), sizes, layout.ep, layout.sequence_parallel,
            layout.micro_batch, layout.recompute)  # fmt: skip


def reference_costs(job: Job) -> ReferenceCosts | MixedCosts:
    """Return the costs of `job` on its cluster, of which nothing was measured.

    Of unlike pools they are those of each pool alone, with the fabric that all share. Raises
    UnsupportedError for GPUs that nobody published measurements of, and for optimizers on hosts of
    which nothing is known.
    """
    cluster, pools = job.cluster, unlike_pools(job.cluster)
    for pool in pools:
        if pool.gpu.name not in gpu_presets():
            raise UnsupportedError(
                f"cluster {cluster.name} has the GPU {pool.gpu.name}, of which no measurements are "
                f"known; there are of {', '.join(gpu_presets())}: name one that it stands for, or "
                "run `layline profile -o FILE` on one of its nodes and set profile to that file"
            )
        if job.stack.offloads_optimizer:
            known_host(pool)
    by_pool = tuple(
        ReferenceCosts(
            model=job.model,
            workload=job.workload,
            stack=job.stack,
            cluster=replace(cluster, pools=(pool,)),
        )
        for pool in pools
    )
    return by_pool[0] if len(by_pool) == 1 else MixedCosts(pools=pools, by_pool=by_pool)


@cache
def reference_data() -> tuple[str, str]:
    """Return the digest of all that reference costs rest on, and the date of its newest source.

    >>> len(reference_data()[0]), reference_data()[1] > "2026-01-01"
    (64, True)
    """
    folder = resources.files("profiles").joinpath("data")
    texts = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in MEASUREMENTS}
    newest = max(date for text in texts.values() for date in _dates(tomllib.loads(text)))
    return digest({"measurements": texts, "fitted": calibrated()}), newest


def _dates(table: Any) -> Iterator[str]:
    """Yield every `date` in `table`, however deep."""
    if isinstance(table, dict):
        if "date" in table:
            yield table["date"]
        table = list(table.values())
    if isinstance(table, list):
        for value in table:
            yield from _dates(value)
