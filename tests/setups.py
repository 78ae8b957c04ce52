"""Small setups of the reference cost model: round sizes, known scalars, any layout."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from hypothesis import strategies as st

from planner.layout import Layout
from planner.partition import stages_by_rule
from planner.predict import step_model
from planner.reference.program import Lanes, lanes_of, stack_lanes
from planner.reference.step import StageNs, StepModel
from planner.schedules import SCHEDULES
from planner.setup import Setup
from profiles.cluster import ClusterSpec
from profiles.collective_curves import Group, collective
from profiles.kernel_curves import memory_pass
from profiles.model import ModelSpec
from profiles.presets import cluster_preset, cluster_presets
from profiles.stack import SCALARS, Recompute, Scalar, Selective, Sharding, StackSpec
from profiles.workload import DType, Workload

SMALL = ModelSpec(
    name="small", num_layers=8, hidden=2048, num_heads=16, num_kv_heads=8, head_size=128,
    ffn=8192, vocab=32768, max_seq_len=4096,
)  # fmt: skip
GPT = replace(SMALL, num_kv_heads=16, norm="layernorm", mlp="gelu", positions="learned",
              has_biases=True, tied_embeddings=True)  # fmt: skip
MOE = replace(SMALL, ffn=2048, num_experts=8, experts_per_token=2)

IDLE_HOST = {
    "launch": 0.0, "exposed": 0.0, "step": 0.0, "message": 0.0, "crossing": 0.0, "spanning": 0.0,
}  # fmt: skip
"""A host that takes nothing, and overlap that is perfect: what is left is in closed form."""


def scalars(values: Mapping[str, float]) -> dict[str, Scalar]:
    """Return scalars of exactly these values, neutral where none is given."""
    every = {name: meaning.neutral for name, meaning in SCALARS.items()} | dict(values)
    return {name: Scalar(value, value, value) for name, value in every.items()}


STACK = StackSpec(
    name="made up", overlaps_gradients=False, gradient_bucket_bytes=1 << 40, fuses_norms=True,
    fusion="fused", gradient_bytes=4, reduction_bytes=4, master_bytes=4, moment_bytes=8,
    scalars=scalars(IDLE_HOST), source="made up for tests", date="2026-01-01",
)  # fmt: skip
BUSY = replace(STACK, scalars=scalars({}))
"""The same with a host as it usually is: all scalars neutral."""


def setup_of(
    model: ModelSpec = SMALL,
    *,
    stack: StackSpec = STACK,
    seq_len: int = 4096,
    dtype: DType = "bf16",
    node: str = "h100-sxm",
    cluster: ClusterSpec | None = None,
    **axes: Any,
) -> Setup:
    """Return a run of `model`, on as many nodes as it takes; `axes` are fields of its layout."""
    chosen = {"dp": 1, "tp": 1, "pp": 1, "micro_batch": 1, "num_microbatches": 4} | axes
    num_stages = chosen["pp"] * chosen.get("stages_per_rank", 1)
    layers = chosen.pop("stage_layers", stages_by_rule(model, num_stages, "even"))
    layout = Layout(stage_layers=layers, **chosen)
    return Setup(
        model=model,
        workload=Workload(seq_len=seq_len, global_batch=layout.global_batch, dtype=dtype),
        layout=layout,
        cluster=cluster or nodes_for(layout.num_ranks, node),
        stack=stack,
    )


def nodes_for(num_ranks: int, node: str = "h100-sxm") -> ClusterSpec:
    """Return as many of `node` as `num_ranks` ranks fill."""
    per_node = cluster_preset(node).num_ranks
    return cluster_preset(node, num_nodes=-(-num_ranks // per_node))


def model_of(setup: Setup) -> tuple[StepModel, Lanes]:
    """Return the model of the step of `setup`, and the scalars of its stack."""
    return step_model(setup), stack_lanes(setup.stack)


def step_ns(setup: Setup) -> float:
    """Return the step of `setup` in ns, without memory, band and waterfall."""
    model, lanes = model_of(setup)
    return float(model.step_ns(lanes)[0])


def stage(setup: Setup, lanes: Lanes | None = None) -> StageNs:
    """Return the only stage of `setup`."""
    (only,) = step_model(setup).stages(lanes or stack_lanes(setup.stack))
    return only


def pass_ns(size_bytes: float) -> float:
    """Return a pass over the memory of an H100."""
    return memory_pass("h100-sxm", int(size_bytes)).ns


def group_ns(kind: str, size: int, per_node: int, size_bytes: float) -> float:
    """Return a collective on H100 nodes, alone."""
    node = cluster_preset("h100-sxm", num_nodes=2)
    link, fabric = node.pools[0].intra_node, node.inter_node
    return collective(kind, Group(size, per_node), int(size_bytes), link, fabric).ns


@st.composite
def values_of_scalars(draw: st.DrawFn) -> dict[str, float]:
    """Draw a value within its bounds for each scalar; the bounds themselves are frequent."""
    return {
        name: draw(
            st.sampled_from((meaning.at_least, meaning.neutral, meaning.at_most))
            | st.floats(meaning.at_least, meaning.at_most)
        )
        for name, meaning in SCALARS.items()
    }


def lanes_by_value(values: list[dict[str, float]]) -> Lanes:
    """Return these scalars side by side."""
    return lanes_of({name: [each[name] for each in values] for name in SCALARS})


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """Draw a LLaMA, a GPT or a mixture of experts, small or as large as any."""
    kv_heads, group = draw(st.sampled_from(((8, 1), (8, 2), (8, 8), (16, 1))))
    head_size = draw(st.sampled_from((64, 80, 128, 256)))
    is_gpt, num_experts = draw(st.booleans()), draw(st.sampled_from((0, 0, 8)))
    return ModelSpec(
        name="drawn",
        num_layers=draw(st.integers(1, 9)),
        hidden=draw(st.sampled_from((256, 1024, 4096, 12288))),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_size=head_size,
        ffn=draw(st.sampled_from((512, 8192, 14336))),
        vocab=draw(st.sampled_from((1000, 50257, 128256))),
        max_seq_len=8192,
        tied_embeddings=draw(st.booleans()),
        norm="layernorm" if is_gpt else "rmsnorm",
        mlp="gelu" if is_gpt else "swiglu",
        positions="learned" if is_gpt else "rope",
        has_biases=is_gpt,
        num_experts=num_experts,
        experts_per_token=min(2, num_experts),
        num_shared_experts=draw(st.integers(0, 1)) if num_experts else 0,
    )


@st.composite
def stacks(draw: st.DrawFn) -> StackSpec:
    """Draw a stack with any habits and any scalars within their bounds."""
    return replace(
        STACK,
        overlaps_gradients=draw(st.booleans()),
        overlaps_parameters=draw(st.booleans()),
        tensor_overlap=draw(st.sampled_from(("none", "backward", "all"))),
        fusion=draw(st.sampled_from(("eager", "fused", "compiled"))),
        attention=draw(st.sampled_from(("unfused", "flash2", "flash3"))),
        selective=draw(st.sampled_from(get_args(Selective))),
        fuses_norms=draw(st.booleans()),
        gradient_bucket_bytes=draw(st.sampled_from((25 << 20, 1 << 30))),
        gradient_bytes=draw(st.sampled_from((0, 2, 4))),
        reduction_bytes=draw(st.sampled_from((0, 2, 4))),
        master_bytes=draw(st.sampled_from((0, 4))),
        moment_bytes=draw(st.sampled_from((0, 8))),
        scalars=scalars(draw(values_of_scalars())),
    )


@st.composite
def layouts(draw: st.DrawFn, model: ModelSpec) -> dict[str, Any]:
    """Draw the axes of a layout of `model`, with any schedule and any sharding."""
    pp = draw(st.integers(1, 4))
    family = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    stages_per_rank = (family.stages_per_rank or draw(st.integers(2, 3))) if pp > 1 else 1
    tp, cp, dp = (draw(st.sampled_from((1, 1, 2, 4, 8))) for _ in range(3))
    ep = draw(st.sampled_from([n for n in (1, 2, 4, 8) if (dp * cp) % n == 0 and model.num_experts]
                              or [1]))  # fmt: skip
    groups = [0, *(n for n in (2, 4) if n < dp * cp and (dp * cp) % n == 0)]
    return {
        "dp": dp, "tp": tp, "pp": pp, "cp": cp, "ep": ep,
        "micro_batch": draw(st.sampled_from((1, 1, 2, 4))),
        "num_microbatches": draw(st.integers(1, 9)),
        "schedule": family.name if pp > 1 else "1f1b",
        "stages_per_rank": stages_per_rank,
        "sequence_parallel": draw(st.booleans()) and tp > 1,
        "sharding": draw(st.sampled_from(get_args(Sharding))),
        "shard_group": draw(st.sampled_from(groups)),
        "recompute": draw(st.sampled_from(get_args(Recompute))),
    }  # fmt: skip


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """Draw a run that nothing speaks against: any model, machine, layout and software."""
    model = draw(models())
    node = draw(st.sampled_from(cluster_presets()))
    dtypes = [dtype for dtype in ("fp8", "bf16", "fp16", "fp32")
              if dtype in cluster_preset(node).pools[0].gpu.peak_flops_per_s]  # fmt: skip
    return setup_of(
        model,
        stack=draw(stacks()),
        seq_len=draw(st.sampled_from((512, 2048, 8192))),
        dtype=draw(st.sampled_from(dtypes)),
        node=node,
        **draw(layouts(model)),
    )
