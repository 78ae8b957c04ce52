"""Made-up plans and runs for tests of the reports: small numbers, easy to check by hand."""

from collections.abc import Mapping

from planner.layout import Layout
from planner.plan import (
    PLAN_SCHEMA_VERSION,
    Candidate,
    Certificate,
    PeakMemory,
    Plan,
    ProfileReference,
    Rejection,
    StageCost,
    seal,
)
from planner.record import RECORD_SCHEMA_VERSION, RankMemory, RunRecord, StepRecord
from planner.schedules import SCHEDULES
from profiles.cluster import ClusterSpec, GpuSpec, LinkSpec, PoolSpec
from profiles.goal import FASTEST, Goal
from profiles.model import ModelSpec
from profiles.profile import Cost, DeviceFacts
from profiles.stack import StackSpec
from profiles.workload import Workload
from simulator.timeline import Kind, Span, Timeline

MS = 1_000_000
MIB = 1 << 20
VERSIONS = {"layline": "0.1.0", "python": "3.11.7", "torch": "2.13.0"}
MEMORY = PeakMemory(
    parameters=80 * MIB,
    gradients=80 * MIB,
    optimizer=160 * MIB,
    activations=120 * MIB,
    temporary=60 * MIB,
    context=210 * MIB,
)
PROFILE = ProfileReference(
    path="profile.json",
    digest="ab" * 32,
    device=DeviceFacts(
        kind="cpu",
        name="Some CPU",
        backend="gloo",
        num_ranks=4,
        memory_bytes=8192 * MIB,
        driver="",
    ),
    versions=VERSIONS,
    measured_at="2026-01-01T12:00:00Z",
)


def cost(p50_ns: int, *, is_extrapolated: bool = False) -> Cost:
    """Return a cost with a band of 6 % below and 9 % above."""
    return Cost(
        p10_ns=p50_ns - p50_ns * 6 // 100,
        p50_ns=p50_ns,
        p90_ns=p50_ns + p50_ns * 9 // 100,
        is_extrapolated=is_extrapolated,
    )


def make_layout(dp: int = 1, tp: int = 1, pp: int = 2, *, micro_batch: int = 1) -> Layout:
    """Return a layout of 8 sequences a step and 4 layers."""
    return Layout(
        dp=dp,
        tp=tp,
        pp=pp,
        micro_batch=micro_batch,
        num_microbatches=8 // (dp * micro_batch),
        stage_layers=tuple(4 // pp + (stage < 4 % pp) for stage in range(pp)),
    )


def make_cluster(name: str = "local") -> ClusterSpec:
    """Return a machine of four CPU ranks."""
    gpu = GpuSpec(
        name="CPU core",
        memory_bytes=2048 * MIB,
        memory_bytes_per_s=2e10,
        peak_flops_per_s={"fp32": 1e11},
        max_power_watts=0.0,
        source="made up",
        date="2026-01-01",
    )
    link = LinkSpec(
        name="loopback", bytes_per_s=2e9, latency_ns=20_000, source="made up", date="2026-01-01"
    )
    pool = PoolSpec(gpu=gpu, gpus_per_node=4, num_nodes=1, intra_node=link)
    return ClusterSpec(name=name, pools=(pool,), local_device="cpu")


def make_plan(
    layout: Layout | None = None,
    *,
    step_ns: int = 0,
    model_name: str = "llama-tiny",
    reason: str = "tp=8 does not divide 4 kv heads",
    is_extrapolated: bool = False,
    goal: Goal = FASTEST,
) -> Plan:
    """Return a sealed plan; its median step is that of `predict` unless `step_ns` says."""
    layout = layout or make_layout()
    step_ns = step_ns or predict(layout).makespan_ns
    layouts = (layout, make_layout(dp=4, pp=1), make_layout(dp=2, tp=2, pp=1), make_layout(pp=4))
    ranking = [
        Candidate(
            layout=other,
            step=cost(predict(other).makespan_ns, is_extrapolated=other.tp > 1),
            peak_bytes=700 * MIB,
        )
        for other in dict.fromkeys(layouts)
    ]
    ranking.sort(key=lambda candidate: candidate.step.p50_ns)
    return seal(
        schema_version=PLAN_SCHEMA_VERSION,
        tool_version="0.1.0",
        seed=7,
        model=ModelSpec(
            name=model_name,
            num_layers=4,
            hidden=256,
            num_heads=8,
            num_kv_heads=4,
            head_size=32,
            ffn=768,
            vocab=2048,
            max_seq_len=256,
        ),
        workload=Workload(seq_len=256, global_batch=8),
        cluster=make_cluster(),
        stack=StackSpec(
            name="torch-cpu",
            overlaps_gradients=False,
            gradient_bucket_bytes=25 * MIB,
            fuses_norms=False,
            source="made up",
            date="2026-01-01",
        ),
        goal=goal,
        profile=PROFILE,
        layout=layout,
        schedule=tuple(
            str(SCHEDULES[layout.schedule].build(layout.pp, layout.num_microbatches)).splitlines()
        ),
        costs=tuple(_stage_cost(layout) for _ in range(layout.pp)),
        memory=(MEMORY,) * layout.pp,
        step=cost(step_ns, is_extrapolated=is_extrapolated),
        ranking=tuple(ranking),
        chosen=[candidate.layout for candidate in ranking].index(layout),
        front=(0,),
        rejections=_rejections(reason),
        certificate=Certificate(
            objective="step_time",
            value=ranking[0].step.p50_ns / 1e9,
            lower_bound=ranking[0].step.p50_ns / 1e9,
            gap=0.0,
            num_layouts=len(ranking) + 3,
            num_rejected={"divisibility": 2, "memory": 1},
            num_bounded=0,
            num_timed=len(ranking),
            num_open=0,
        ),
        variants=(),
    )


def _rejections(reason: str) -> tuple[Rejection, ...]:
    return (
        Rejection(layout="dp=1,tp=8,pp=1,mb=8x1", rule="divisibility", reason=reason),
        Rejection(layout="dp=1,tp=8,pp=1,mb=4x2", rule="divisibility", reason=reason),
        Rejection(layout="dp=1,tp=1,pp=1,mb=8x1", rule="memory", reason="needs 2.4 of 2.0 GiB"),
    )


def _stage_cost(layout: Layout) -> StageCost:
    forward_ns = _forward_ns(layout)
    return StageCost(
        forward=cost(forward_ns),
        backward=cost(2 * forward_ns),
        weight=cost(forward_ns),
        send_forward=cost(MS),
        send_backward=cost(MS),
        all_reduce=cost(6 * MS * (layout.dp > 1)),
        optimizer=cost(8 * MS // layout.pp),
        other=cost(2 * MS),
        wait=cost(0),
        tensor_parallel_forward_ns=MS * (layout.tp > 1),
        tensor_parallel_backward_ns=MS * (layout.tp > 1),
    )


def _forward_ns(layout: Layout) -> int:
    return 40 * MS * layout.micro_batch // (layout.pp * layout.tp) + MS * (layout.tp > 1)


def predict(layout: Layout) -> Timeline:
    """Return the timeline of `layout` with the made-up costs: one rank a stage."""
    return walk(layout, source="simulated", scale={})


def walk(layout: Layout, *, source: str, scale: Mapping[str, float]) -> Timeline:
    """Return a step: every action as soon as its input is there; kinds scaled by `scale`."""
    stage_cost = _stage_cost(layout)
    base: dict[Kind, int] = {
        "forward": stage_cost.forward.p50_ns,
        "backward": stage_cost.backward.p50_ns,
        "send": MS,
        "all_reduce": stage_cost.all_reduce.p50_ns,
        "optimizer": stage_cost.optimizer.p50_ns,
        "data": MS,
        "other": 2 * MS,
    }
    lasts = {kind: round(scale.get(kind, 1.0) * time_ns) for kind, time_ns in base.items()}
    spans: list[Span] = []
    ready = [0] * layout.pp
    done: dict[tuple[str, int, int], int] = {}

    def add(stage: int, name: str, kind: Kind, start_ns: int) -> None:
        if lasts[kind]:
            end_ns = start_ns + lasts[kind]
            spans.append(Span(rank=stage, stream="compute", name=name, kind=kind,
                              start_ns=start_ns, end_ns=end_ns))  # fmt: skip
            ready[stage] = end_ns

    queues = [
        list(actions)
        for actions in SCHEDULES[layout.schedule].build(layout.pp, layout.num_microbatches).ranks
    ]
    for stage in range(layout.pp):
        add(stage, "data", "data", 0)
    while any(queues):
        for stage, queue in enumerate(queues):
            before = stage - 1 if queue and queue[0].kind == "F" else stage + 1
            needs = queue and 0 <= before < layout.pp
            if not queue or (needs and (queue[0].kind, before, queue[0].microbatch) not in done):
                continue
            action = queue.pop(0)
            arrival_ns = done[action.kind, before, action.microbatch] if needs else 0
            kind: Kind = "forward" if action.kind == "F" else "backward"
            add(stage, str(action), kind, max(ready[stage], arrival_ns))
            after = stage + 1 if kind == "forward" else stage - 1
            if 0 <= after < layout.pp:
                add(stage, f"send {action}", "send", ready[stage])
            done[action.kind, stage, action.microbatch] = ready[stage]
    for stage in range(layout.pp):
        add(stage, "all_reduce", "all_reduce", ready[stage])
        add(stage, "optimizer", "optimizer", ready[stage])
        add(stage, "other", "other", ready[stage])
    spans.sort(key=lambda span: (span.start_ns, span.rank))
    return Timeline(source="measured" if source == "measured" else "simulated", spans=tuple(spans))


def make_record(
    plan: Plan,
    *,
    slowdown: float = 1.0,
    scale: Mapping[str, float] | None = None,
    kind_ns: tuple[Mapping[str, int], ...] = (),
    step_ns: int = 0,
    num_steps: int = 24,
) -> RunRecord:
    """Return a run whose kinds took `scale` times as long, on a machine `slowdown` times slower."""
    layout = plan.layout
    factors = dict(scale or {})
    for kind in ("forward", "backward", "optimizer"):
        factors[kind] = slowdown * factors.get(kind, 1.0)
    stages = walk(layout, source="measured", scale=factors)
    spans = [
        Span(
            rank=rank,
            stream=span.stream,
            name=span.name,
            kind=span.kind,
            start_ns=span.start_ns,
            end_ns=span.end_ns,
        )
        for rank in range(layout.num_ranks)
        for span in stages.spans
        if span.rank == layout.place(rank).pp
    ]
    spans.sort(key=lambda span: (span.start_ns, span.rank))
    timeline = Timeline(source="measured", spans=tuple(spans))
    median_ns = step_ns or timeline.makespan_ns
    steps = tuple(
        StepRecord(
            step=step,
            loss=round(4.5 + 3.1 / (1 + step / 4) + 0.03 * (step % 3), 4),
            step_ns=median_ns * (160 - 20 * step if step < 3 else 98 + 2 * (step % 3)) // 100,
            tokens=plan.workload.tokens_per_step,
        )
        for step in range(num_steps)
    )
    return RunRecord(
        schema_version=RECORD_SCHEMA_VERSION,
        plan_digest=plan.plan_digest,
        started_at="2026-01-02T08:00:00Z",
        versions=VERSIONS,
        data="tiny text",
        data_digest="cd" * 32,
        num_warmup=3,
        steps=steps,
        median_step_ns=median_ns,
        p10_step_ns=median_ns * 98 // 100,
        p90_step_ns=median_ns * 102 // 100,
        memory=tuple(
            RankMemory(context_bytes=210 * MIB, peak_bytes=(700 + 13 * rank) * MIB)
            for rank in range(layout.num_ranks)
        ),
        timeline=timeline,
        kind_ns=kind_ns or tuple(timeline.busy_ns(rank) for rank in range(layout.num_ranks)),
        machine_slowdown=slowdown,
    )
