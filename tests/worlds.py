"""A world on paper, where every layout takes what a line of arithmetic says, and is searched whole.

A layer takes 1 ms a micro-batch of one sequence, its backward two, and three where it makes all of
the forward again. Tensor parallelism divides that, and adds an exchange at the rate inside a node;
replicas reduce gradients, a layer's in 1 ms, at the rate between nodes; the update takes 1 ms.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, cast

from hypothesis import strategies as st

from planner.bounds import Columns, Parts
from planner.cost import NOTHING
from planner.evaluate import Costs, basis_of, evaluate
from planner.facts import facts_of
from planner.layout import Layout
from planner.layout_text import parse_layout
from planner.objectives import broken_limit, cost
from planner.plan import Candidate, ProfileReference, StageCost
from planner.schedules import SCHEDULES
from planner.search import InfeasibleError, SearchResult
from profiles.cluster import ClusterSpec
from profiles.errors import InvalidInputError
from profiles.files import digest
from profiles.goal import Goal
from profiles.job import Job, SearchLimits
from profiles.model import ModelSpec
from profiles.presets import cluster_preset, model_preset, stack_preset
from profiles.profile import Cost, DeviceFacts
from profiles.stack import StackSpec
from profiles.workload import Workload
from tests.setups import SMALL, STACK

MS = 1_000_000
LAYER_NS, EXCHANGE_NS, REDUCTION_NS, UPDATE_NS = MS, 200_000, MS, MS
DEGREES = (1, 2, 4, 8)


def steady(ns: float) -> Cost:
    """Return a cost without a band."""
    return Cost(p10_ns=round(ns), p50_ns=round(ns), p90_ns=round(ns))


@dataclass(frozen=True, kw_only=True)
class PaperCosts:
    """What layouts of a job take on paper."""

    model: ModelSpec
    workload: Workload
    stack: StackSpec
    cluster: ClusterSpec
    is_of_executor: bool = False

    @property
    def origin(self) -> ProfileReference:
        """Nothing was measured anywhere."""
        device = DeviceFacts(
            kind="cuda", name="paper", backend="nccl", num_ranks=16, memory_bytes=1, driver=""
        )
        return ProfileReference(
            path="", digest="", device=device, versions={"reference": "paper"}, measured_at=""
        )

    def completed(self, layout: Layout) -> Layout:
        """Shard as the stack does."""
        return replace(layout, sharding=self.stack.sharding, recompute=self.stack.recompute)

    def context_bytes(self, _layout: Layout) -> int:
        """Nothing."""
        return 0

    def parts(self, layout: Layout, _rank: int = 0) -> Parts:
        """All layers alike, and nothing at the ends."""
        ns = {"layer_forward": LAYER_NS / layout.tp, "layer_backward": 2 * LAYER_NS / layout.tp}
        return Parts(**{name: ns.get(name, 0.0) for name in Parts._fields})

    def columns(self, layouts: Sequence[Layout]) -> Columns:
        """Nobody asks: layouts of this world are timed by their stages."""
        raise NotImplementedError(f"columns of {len(layouts)} layouts")

    def stages(self, layout: Layout, _homes: Sequence[int] = ()) -> tuple[StageCost, ...]:
        """Each stage by its layers."""
        return tuple(self._stage(layout, num_layers) for num_layers in layout.stage_layers)

    def _stage(self, layout: Layout, num_layers: int) -> StageCost:
        seqs = layout.micro_batch * self.workload.seq_len / 4096
        intra = 450e9 / self.cluster.pools[0].intra_node.bytes_per_s
        work_ns = seqs * num_layers * LAYER_NS / layout.tp
        exchange_ns = seqs * num_layers * EXCHANGE_NS * intra * (layout.tp > 1)
        fabric = self.cluster.inter_node
        inter = 50e9 / fabric.bytes_per_s if fabric else 0.0
        reduction_ns = REDUCTION_NS * inter * num_layers / layout.tp * (layout.replicas > 1)
        return StageCost(
            forward=steady(work_ns + exchange_ns),
            backward=steady((3 if layout.recompute == "full" else 2) * work_ns + exchange_ns),
            weight=steady(work_ns),
            send_forward=NOTHING,
            send_backward=NOTHING,
            all_reduce=steady(reduction_ns),
            optimizer=steady(UPDATE_NS),
            other=NOTHING,
            wait=NOTHING,
            tensor_parallel_forward_ns=round(exchange_ns),
            tensor_parallel_backward_ns=round(exchange_ns),
        )


def paper_job(
    *, global_batch: int = 32, goal: Goal | None = None, gib: float = 80.0, **limits: object
) -> Job:
    """Return a job on two nodes of eight GPUs of `gib` GiB."""
    cluster = cluster_preset("h100-sxm", num_nodes=2)
    (pool,) = cluster.pools
    gpu = replace(pool.gpu, memory_bytes=round(gib * 2**30))
    return Job(
        seed=0,
        model=replace(SMALL, max_seq_len=8192),
        workload=Workload(seq_len=4096, global_batch=global_batch, dtype="bf16"),
        cluster=replace(cluster, pools=(replace(pool, gpu=gpu),)),
        stack=STACK,
        profile_path="",
        search=SearchLimits(**limits),  # type: ignore[arg-type]
        goal=goal or Goal(),
    )


@dataclass(frozen=True)
class _Found:
    ranking: tuple[Candidate, ...]


@dataclass(frozen=True)
class PaperWorld:
    """Searches every layout of a small grid, each job once."""

    known: dict[str, SearchResult] = field(default_factory=dict)

    def costs(self, job: Job) -> Costs:
        """Return the costs on paper."""
        return PaperCosts(
            model=job.model, workload=job.workload, stack=job.stack, cluster=job.cluster
        )

    def search(self, job: Job) -> SearchResult:
        """Return all that fit, best first."""
        key = digest(job)
        if key not in self.known:
            self.known[key] = self._searched(job)
        return self.known[key]

    def _searched(self, job: Job) -> SearchResult:
        basis, facts = basis_of(job, self.costs(job)), facts_of(job)
        fits = [
            each
            for each in evaluate(basis, list(self.layouts(job)))
            if each.peak_bytes <= basis.limit_bytes
            and not broken_limit(job.goal, facts, each.step.p50_ns, each.peak_bytes)
        ]
        if not fits:
            raise InfeasibleError("nothing fits on paper")
        name = job.goal.objectives[0]
        ranking = sorted(
            fits,
            key=lambda c: (cost(name, facts, c.step.p50_ns, c.peak_bytes), c.peak_bytes,
                           str(c.layout)),
        )  # fmt: skip
        return cast(SearchResult, _Found(tuple(ranking)))

    def layouts(self, job: Job) -> Iterator[Layout]:
        """Yield the grid: degrees, micro-batches and recomputation of all layers or of none."""
        for tp, pp, size, again in product(DEGREES, DEGREES, (1, 2), ("none", "full")):
            text = f"tp={tp},pp={pp},mb={size},recompute={again}"
            try:
                layout = parse_layout(text, job, self.costs(job))
            except InvalidInputError:
                continue
            limits = job.search
            if all(
                not allowed or value in allowed
                for allowed, value in (
                    (limits.tp, tp), (limits.pp, pp), (limits.micro_batch, size),
                    (limits.dp, layout.dp), (limits.recompute, again), (limits.cp, 1),
                )
            ):  # fmt: skip
                yield layout


def reference_job(
    model: str = "", nodes: int = 2, global_batch: int = 64, seq_len: int = 4096,
    stack: str = "nemo", **limits: Any,
) -> Job:  # fmt: skip
    """Return a job on nodes of H100, of a small model unless one is named."""
    return Job(
        seed=0,
        model=model_preset(model) if model else SMALL,
        workload=Workload(seq_len=seq_len, global_batch=global_batch, dtype="bf16"),
        cluster=cluster_preset("h100-sxm", num_nodes=nodes),
        stack=stack_preset(stack),
        profile_path="",
        search=SearchLimits(**limits),
    )


WORLD = PaperWorld()


def read(text: str, job: Job | None = None) -> Layout:
    """Return the layout of `text` on paper."""
    job = job or paper_job()
    return parse_layout(text, job, WORLD.costs(job))


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Draw words of a layout of 16 ranks and 32 sequences, in any order; some are left out."""
    tp, pp, cp = draw(
        st.sampled_from([(1, 1, 1), (2, 1, 1), (4, 2, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1)])
    )
    dp = 16 // (tp * pp * cp)
    words = [f"tp={tp}", f"pp={pp}", f"cp={cp}", f"mb={draw(st.sampled_from((1, 2)))}"]
    words += draw(st.sampled_from(([], [f"dp={dp}"])))
    if pp > 1:
        name = draw(st.sampled_from(sorted(SCHEDULES)))
        count = SCHEDULES[name].stages_per_rank or 2
        words += draw(st.sampled_from(([name], [name, f"v={count}"], [f"v={count}", name])))
    words += draw(st.sampled_from(([], ["zero1"], ["zero3"], [f"zero2:{dp * cp}"], ["zero0"])))
    again = draw(st.sampled_from(("", "none", "full", "selective", "full:5", "full:8")))
    words += [f"recompute={again}"] if again else []
    words += ["sp"] if tp > 1 and draw(st.booleans()) else []
    words += draw(st.sampled_from(([], ["order=tp-cp-pp-dp"], ["order=tp-cp-dp-pp"])))
    return draw(st.sampled_from((",", ", "))).join(draw(st.permutations(words)))
