"""The space of layouts: what a job leaves free, what is legal, and how much there is of it.

A layout is chosen in three steps. `Degrees` cut the ranks into a mesh; a `Start` adds what decides
the work of a rank (micro-batch, sequence parallelism, the stages of a pipeline and where they
live); what is left, sharding, schedule and recomputation, is tried out on each start.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import NamedTuple

from planner.evaluate import Costs, basis_of
from planner.layout import DEFAULT_ORDER, LOCAL_SCHEDULES, Layout
from planner.orders import MAX_CELLS
from planner.partition import Homes
from planner.plan import Rejection
from planner.pools import misfit
from planner.schedules import SCHEDULES
from profiles.cluster import PoolSpec
from profiles.job import Job
from profiles.stack import Recompute, Sharding
from simulator.schedule import MAX_STAGES

SYNTHESISED = "synthesised"
"""The schedule of a layout whose order was made for it, beside those that have a name."""
DEFAULT_STAGES_PER_RANK = (1, 2, 4)
ORDERS = (DEFAULT_ORDER, "tp-cp-pp-dp")
"""Stages farthest apart, or replicas; tensor-parallel ranks are neighbours in both."""
SHARDINGS: tuple[Sharding, ...] = ("none", "zero1", "zero2", "zero3")
KINDS: tuple[Recompute, ...] = ("none", "selective", "full")


class Degrees(NamedTuple):
    """The size of the mesh along each axis; `ep` of the dp * cp replicas share experts."""

    dp: int
    tp: int
    pp: int
    cp: int = 1
    ep: int = 1

    def __str__(self) -> str:
        more = "".join(f",{axis}={n}" for axis, n in (("cp", self.cp), ("ep", self.ep)) if n > 1)
        return f"dp={self.dp},tp={self.tp},pp={self.pp}{more}"


class Pipeline(NamedTuple):
    """How a pipeline may run: stages a rank, where they live, and the names of its orders."""

    stages_per_rank: int
    homes: Homes
    schedules: tuple[str, ...]

    @property
    def splits(self) -> bool:
        """Whether some order does backwards in halves."""
        return any(SCHEDULES[name].splits for name in self.schedules)


class Start(NamedTuple):
    """A layout whose sharding, schedule, recomputation and stages are still open."""

    degrees: Degrees
    pipeline: Pipeline
    micro_batch: int
    num_microbatches: int
    sequence_parallel: bool
    order: str

    def layout(self, stage_layers: tuple[int, ...] = ()) -> Layout:
        """Return the layout with these stages, unsharded, under the first of its schedules."""
        (dp, tp, pp, cp, ep), v = self.degrees, self.pipeline.stages_per_rank
        return Layout(
            dp=dp, tp=tp, pp=pp, cp=cp, ep=ep, stages_per_rank=v, order=self.order,
            micro_batch=self.micro_batch, num_microbatches=self.num_microbatches,
            stage_layers=stage_layers or (0,) * (pp * v), schedule=self.pipeline.schedules[0],
            sequence_parallel=self.sequence_parallel,
        )  # fmt: skip

    @property
    def work(self) -> tuple[object, ...]:
        """What the work of a rank and its messages depend on, of as many ranks."""
        (_, tp, pp, cp, ep), m = self.degrees, self.num_microbatches
        return tp, pp, cp, ep, self.micro_batch, self.sequence_parallel, self.order, m > 1

    def __str__(self) -> str:
        v = self.pipeline.stages_per_rank
        stages = f",v={v}" if v > 1 else ""
        sp = ",sp" if self.sequence_parallel else ""
        return f"{self.degrees}{stages}{sp},mb={self.micro_batch}x{self.num_microbatches}"


@dataclass(frozen=True)
class Space:
    """All layouts of the ranks of `job`, as far as `costs` know what they take.

    Our own executor shards and recomputes nothing and ties no embeddings across ranks; stacks of
    the field do all of it, and pad vocabularies.
    """

    job: Job
    costs: Costs

    @cached_property
    def _pools(self) -> tuple[PoolSpec, ...]:
        """The unlike pools of the cluster, if there are any."""
        return basis_of(self.job, self.costs).pools

    @cached_property
    def _asked_orders(self) -> tuple[str, ...]:
        """The orders that the axes of a mesh may have; over unlike pools those that run there."""
        asked = self.job.search.order or ORDERS
        return tuple(order for order in asked if not misfit(self._pools, 1, order)) or asked

    @cached_property
    def schedules(self) -> tuple[str, ...]:
        """The schedules that the ranking may hold.

        Without a limit, they are `LOCAL_SCHEDULES` where the job is for this machine, and all that
        have a name and the synthesised where it is not.
        """
        everything = (*SCHEDULES, SYNTHESISED)
        asked = self.job.search.schedule
        return asked or (LOCAL_SCHEDULES if self.job.cluster.is_local else everything)

    @cached_property
    def named(self) -> tuple[str, ...]:
        """The schedules to time: where orders are to be synthesised, all of those that they start
        from.
        """
        return tuple(SCHEDULES) if SYNTHESISED in self.schedules else self.schedules

    @cached_property
    def recomputations(self) -> tuple[Recompute, ...]:
        """What may be recomputed, what keeps least last; without a limit kinds that save nothing
        under this stack are left out.
        """
        if self.costs.is_of_executor:
            return ("none",)
        stack = self.costs.stack
        saves = stack.selective == "operators" or stack.attention == "unfused"
        kinds: tuple[Recompute, ...] = ("none", "selective", "full") if saves else ("none", "full")
        asked = self.job.search.recompute or kinds
        return tuple(kind for kind in KINDS if kind in asked)

    def shardings(self, degrees: Degrees) -> list[tuple[Sharding, int]]:
        """Return what replicas may shard, and over how many of them; 0 stands for all.

        What shards most comes last.
        """
        limits, replicas = self.job.search, degrees.dp * degrees.cp
        if self.costs.is_of_executor or replicas == 1:
            return [("none", 0)] if "none" in (limits.sharding or SHARDINGS) else []
        groups = [n for n in divisors(replicas) if n > 1 and n % degrees.ep == 0]
        if limits.shard_group:
            groups = [n for n in groups if n in limits.shard_group]
        found: list[tuple[Sharding, int]] = []
        for kind in SHARDINGS:
            if limits.sharding and kind not in limits.sharding:
                continue
            if kind == "none":
                found.append((kind, 0))
            else:
                found += [(kind, 0 if n == replicas else n) for n in reversed(groups)]
        return found

    def degrees(self) -> Iterator[Degrees]:
        """Yield all degrees whose product is the number of ranks, legal or not."""
        num_ranks, model = self.job.cluster.num_ranks, self.job.model
        axes = divisors(num_ranks)
        contexts = [1] if self.costs.is_of_executor else axes
        for tp in axes:
            for cp in contexts:
                for pp in axes:
                    if num_ranks % (tp * cp * pp):
                        continue
                    dp = num_ranks // (tp * cp * pp)
                    for ep in divisors(model.num_experts) if model.num_experts else [1]:
                        yield Degrees(dp, tp, pp, cp, ep)

    def no_sharding(self, degrees: Degrees) -> Rejection:
        """Return why replicas of these degrees shard nothing that the job allows."""
        allowed = options(self.job.search.sharding)
        groups = options(self.job.search.shard_group or ["any"])
        return Rejection(
            layout=str(degrees), rule="search limits",
            reason=f"{degrees.dp * degrees.cp} replicas have no sharding {allowed} in groups of "
            f"{groups}; search.sharding and search.shard_group allow no other",
        )  # fmt: skip

    def num_layouts(self, degrees: Degrees, counts: tuple[int, ...] = ()) -> int:
        """Return how many layouts these degrees would have, were they legal; one at the least.

        Each is a choice of stages a rank (of `counts`, or as asked), schedule, micro-batch,
        sequence parallelism, order, sharding with its group, and kind of recomputation. The layers
        of its stages, and how many of them recompute, follow.
        """
        counts = counts or self.job.search.stages_per_rank or DEFAULT_STAGES_PER_RANK
        orders = sum(SCHEDULES[name].takes(count) for name in self.named for count in counts)
        starts = (
            max(1, len(self._micro_batches(degrees.dp)))
            * len(self._sequence_parallel(degrees.tp))
            * len(self._orders(degrees))
        )
        kinds = max(1, len(self.shardings(degrees))) * len(self.recomputations)
        return (1 if degrees.pp == 1 else max(1, orders)) * starts * kinds

    def rejection(self, degrees: Degrees) -> Rejection | None:
        """Return why no layout of these degrees is legal, or None."""
        for rule, reason in self._breaches(degrees):
            return Rejection(layout=str(degrees), rule=rule, reason=reason)
        return None

    def _breaches(self, degrees: Degrees) -> Iterator[tuple[str, str]]:
        model, (dp, tp, pp, cp, ep) = self.job.model, degrees
        for axis, value in degrees._asdict().items():
            allowed = getattr(self.job.search, axis)
            if allowed and value not in allowed:
                yield "search limits", f"{axis} is {value}; search.{axis} allows {options(allowed)}"
        for what, count in self._tp_divides():
            if count % tp:
                yield (
                    "divisibility",
                    (
                        f"tp is {tp}, but the model has {count} {what}; tp must divide them "
                        f"({options(divisors(count))})"
                    ),
                )
        if pp > model.num_layers:
            yield (
                "divisibility",
                (f"pp is {pp}, but the model has {model.num_layers} layers; a stage needs one"),
            )
        if self.job.workload.global_batch % dp:
            yield (
                "divisibility",
                (
                    f"dp is {dp}, but workload.global_batch is {self.job.workload.global_batch} "
                    "sequences; dp must divide them"
                ),
            )
        elif not self._micro_batches(dp):
            yield (
                "search limits",
                (
                    f"a replica has {self.job.workload.global_batch // dp} sequences; "
                    "search.micro_batch must divide them, and allows "
                    f"{options(self.job.search.micro_batch)}"
                ),
            )
        if self.job.workload.seq_len % (2 * cp if cp > 1 else 1):
            yield (
                "divisibility",
                (
                    f"cp is {cp}, but workload.seq_len is {self.job.workload.seq_len} tokens; each "
                    "rank takes two equal parts of it, one from either end"
                ),
            )
        if dp * cp % ep:
            yield "divisibility", f"ep is {ep}, but dp x cp is {dp * cp}; ep must divide it"
        if reason := misfit(self._pools, dp * cp * tp, self._asked_orders[0]):
            yield "pools", reason
        if model.tied_embeddings and self.costs.is_of_executor and (pp > 1 or tp > 1):
            yield (
                "tied embeddings",
                ("tied embeddings need both ends of the model on one rank; use tp=1 and pp=1"),
            )

    def _tp_divides(self) -> Iterator[tuple[str, int]]:
        model = self.job.model
        yield "kv heads", model.num_kv_heads
        yield "heads", model.num_heads
        yield "MLP columns", model.ffn
        if self.costs.is_of_executor:
            yield "vocabulary rows", model.vocab

    def pipelines(self, degrees: Degrees) -> tuple[list[Pipeline], list[tuple[Rejection, int]]]:
        """Return the pipelines to try at these degrees, and why so many layouts are not."""
        limits = self.job.search
        counts = limits.stages_per_rank or DEFAULT_STAGES_PER_RANK
        if degrees.pp == 1:
            return self._without_pipeline(counts, degrees)
        pipelines, refused = [], []
        for count in counts:
            taken = [name for name in self.named if SCHEDULES[name].takes(count)]
            if not taken and limits.stages_per_rank:
                rule = "search limits"
                reason = f"no schedule among {options(self.named)} has {count} stages a rank"
            elif taken and degrees.pp * count > self.job.model.num_layers:
                rule = "divisibility"
                reason = (
                    f"pp is {degrees.pp} with {count} stages a rank, but the model has "
                    f"{self.job.model.num_layers} layers; a stage needs one"
                )
            else:
                for homes in dict.fromkeys(SCHEDULES[name].homes for name in taken):
                    names = tuple(name for name in taken if SCHEDULES[name].homes == homes)
                    pipelines.append(Pipeline(count, homes, names))
                continue
            rejection = Rejection(layout=f"{degrees},v={count}", rule=rule, reason=reason)
            refused.append((rejection, self.num_layouts(degrees, (count,))))
        return pipelines, refused

    def _without_pipeline(
        self, counts: tuple[int, ...], degrees: Degrees
    ) -> tuple[list[Pipeline], list[tuple[Rejection, int]]]:
        """Return the one order of one stage on one rank: all are alike, and 1F1B holds least."""
        names = self.schedules
        taken = [name for name in names if name in SCHEDULES and SCHEDULES[name].takes(1)]
        if taken and 1 in counts:
            return [Pipeline(1, "loop", ("1f1b" if "1f1b" in taken else taken[0],))], []
        what, allowed = ("stages_per_rank", counts) if taken else ("schedule", names)
        reason = f"pp is 1, which is one stage a rank; search.{what} allows {options(allowed)} only"
        rejection = Rejection(layout=str(degrees), rule="search limits", reason=reason)
        return [], [(rejection, self.num_layouts(degrees))]

    def starts(self, degrees: Degrees, pipeline: Pipeline) -> tuple[list[Start], list[Rejection]]:
        """Return every start of one pipeline, and those that no plan can write out."""
        share = self.job.workload.global_batch // degrees.dp
        found, refused = [], []
        for micro_batch in self._micro_batches(degrees.dp):
            for sp in self._sequence_parallel(degrees.tp):
                for order in self._orders(degrees):
                    start = Start(degrees, pipeline, micro_batch, share // micro_batch, sp, order)
                    reason = _too_long(start)
                    if reason:
                        refused.append(Rejection(layout=str(start), rule="length", reason=reason))
                    else:
                        found.append(start)
        return found, refused

    def _micro_batches(self, dp: int) -> list[int]:
        """Return what divides the sequences of a replica, which are rounded down."""
        share = max(1, self.job.workload.global_batch // dp)
        return [n for n in self.job.search.micro_batch or divisors(share) if share % n == 0]

    def _sequence_parallel(self, tp: int) -> tuple[bool, ...]:
        if self.costs.is_of_executor or tp == 1:
            return (False,)
        return self.job.search.sequence_parallel or (True, False)

    def _orders(self, degrees: Degrees) -> tuple[str, ...]:
        """Return the orders that differ.

        None does with one stage, one replica or one node, nor where neither replicas nor stages
        share a node by any order, unless it matters which of them share a pod.
        """
        asked, cluster = self._asked_orders, self.job.cluster
        is_alone = (
            degrees.pp == 1 or degrees.dp == 1 or sum(p.num_nodes for p in cluster.pools) == 1
        )
        node_ranks = max(pool.gpus_per_node for pool in cluster.pools)
        fills_nodes = degrees.tp * degrees.cp % node_ranks == 0 and cluster.uplinks is None
        if self.costs.is_of_executor or is_alone or fills_nodes:
            return (DEFAULT_ORDER,) if DEFAULT_ORDER in asked else asked[:1]
        return asked


def _too_long(start: Start) -> str:
    """Return why no plan can write out the orders of a start, empty if one can."""
    num_stages = start.degrees.pp * start.pipeline.stages_per_rank
    if num_stages <= MAX_STAGES and num_stages * start.num_microbatches <= MAX_CELLS:
        return ""
    return (
        f"{start.num_microbatches} micro-batches on {num_stages} stages; a plan writes out what "
        f"each stage does with each, for {MAX_STAGES} stages and {MAX_CELLS} pairs of the two at "
        "most; take a larger micro-batch"
    )


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, in rising order."""
    low = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def options(values: Iterable[object]) -> str:
    """Return values in words, the middle left out where there are many."""
    found = [str(value) for value in values]
    return ", ".join(found if len(found) <= 8 else [*found[:7], "...", found[-1]])
