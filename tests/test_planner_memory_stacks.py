"""The memory of published stacks: the models by hand, by property, and against published runs."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.activations import LayerActivations, Sizes, layer_activations, stage_activation_bytes
from planner.layout import Layout
from planner.memory import context_bytes, peak_memory
from planner.plan import PeakMemory
from planner.schedules import SCHEDULES
from profiles.model import ModelSpec
from profiles.stack import Attention, Fusion, Recompute, Sharding, StackSpec
from profiles.workload import Workload

GIB = 1 << 30
LLAMA = ModelSpec(
    name="llama", num_layers=8, hidden=1024, num_heads=16, num_kv_heads=8, head_size=64,
    ffn=4096, vocab=32768, max_seq_len=2048,
)  # fmt: skip
GPT = replace(LLAMA, num_kv_heads=16, norm="layernorm", mlp="gelu", positions="learned",
              has_biases=True, tied_embeddings=True)  # fmt: skip
MOE = replace(LLAMA, num_experts=8, experts_per_token=2, num_shared_experts=1)
WORK = Workload(seq_len=2048, global_batch=64, dtype="bf16")
STACK = StackSpec(
    name="made up", overlaps_gradients=True, gradient_bucket_bytes=25 << 20, fuses_norms=True,
    fusion="fused", gradient_bytes=4, reduction_bytes=4, master_bytes=4, moment_bytes=8,
    source="made up", date="2026-01-01",
)  # fmt: skip
NANOTRON = replace(STACK, fusion="eager", uses_flat_buffers=False, allocator_slack=0.24)
DEEPSPEED = replace(STACK, attention="unfused", gradient_bytes=2, gradient_bucket_bytes=10**9,
                    allocator_slack=0.24)  # fmt: skip
LAYOUT = Layout(dp=4, tp=2, pp=1, micro_batch=1, num_microbatches=16, stage_layers=(8,))


def memory(
    layout: Layout, stack: StackSpec = STACK, model: ModelSpec = LLAMA
) -> tuple[PeakMemory, ...]:
    schedule = SCHEDULES[layout.schedule].build(layout.pp, layout.num_microbatches)
    return peak_memory(model, WORK, layout, schedule, stack, context_bytes(layout))


def layer(
    layout: Layout, model: ModelSpec, fusion: Fusion, attention: Attention
) -> LayerActivations:
    size = Sizes.of(model, WORK, layout)
    return layer_activations(model, size, fusion=fusion, attention=attention, fuses_norms=True)


def parameters(model: ModelSpec, tp: int) -> int:
    """Return what a rank holds: all matrices cut by tp, norms and positions whole."""
    norms = model.hidden * (2 if model.norm == "layernorm" else 1) * (2 * model.num_layers + 1)
    positions = model.num_embedding_parameters - model.vocab * model.hidden
    return (model.num_parameters - norms - positions) // tp + norms + positions


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("model", [LLAMA, GPT])
def test_states_of_a_rank_by_hand(model: ModelSpec, tp: int) -> None:
    (rank,) = memory(replace(LAYOUT, tp=tp), model=model)
    count = parameters(model, tp)
    assert (rank.parameters, rank.gradients) == (2 * count, 4 * count)
    assert rank.optimizer == 12 * count


@pytest.mark.parametrize(
    ("sharding", "bytes_each"),
    [("none", (2, 4, 12)), ("zero1", (2, 4, 3)), ("zero2", (2, 1, 3)), ("zero3", (0, 1, 3))],
)
def test_zero_divides_what_it_shards(sharding: Sharding, bytes_each: tuple[int, int, int]) -> None:
    """With a master copy in full precision zero3 shards that copy (FSDP's mixed precision)."""
    (rank,) = memory(replace(LAYOUT, sharding=sharding))
    count = parameters(LLAMA, 2)
    assert (rank.parameters, rank.gradients, rank.optimizer) == tuple(n * count for n in bytes_each)


def test_hybrid_sharding_divides_by_its_group() -> None:
    (whole,) = memory(replace(LAYOUT, dp=16, sharding="zero3", shard_group=4))
    (group,) = memory(replace(LAYOUT, dp=4, sharding="zero3"))
    assert (whole.gradients, whole.optimizer) == (group.gradients, group.optimizer)


def test_zero3_without_a_master_copy_shards_the_parameters() -> None:
    (rank,) = memory(replace(LAYOUT, sharding="zero3"), replace(STACK, master_bytes=0))
    assert rank.parameters == 2 * parameters(LLAMA, 2) // 4
    # Two layers at a time in bf16, and their gradients in the fp32 they are reduced in.
    assert rank.buffers == 2 * (2 + 4) * max(2 * LLAMA.vocab // 2 * LLAMA.hidden + LLAMA.hidden,
                                             LLAMA.num_layer_parameters // 2)  # fmt: skip


def test_experts_are_shared_by_the_expert_parallel_ranks() -> None:
    (alone,) = memory(LAYOUT, model=MOE)
    (shared,) = memory(replace(LAYOUT, ep=4), model=MOE)
    experts = MOE.num_layers * MOE.num_experts * MOE.num_mlp_parameters
    assert alone.parameters - shared.parameters == 2 * experts * 3 // 4 // 2
    assert alone.activations == shared.activations > memory(LAYOUT)[0].activations


def test_the_count_by_op_of_korthikanti() -> None:
    """A GPT layer keeps s b h (34 + 5 a s / h) bytes, and 10 + 24 / t + 5 a s / h t under tp.

    Source: arXiv:2205.05198, equations 1 and 2. A norm's two deviations a token are on top.
    """
    m, h, scores = WORK.seq_len, GPT.hidden, 5 * GPT.num_heads * WORK.seq_len
    for tp in (1, 2, 8):
        found = layer(replace(LAYOUT, tp=tp), GPT, "fused", "unfused")
        # Their linear inputs count the attention's output and q, k and v apart, as here.
        assert found.total == m * (10 * h + 24 * h // tp + scores // tp + 8)
    found = layer(replace(LAYOUT, tp=8, sequence_parallel=True), GPT, "fused", "unfused")
    assert found.total == m * (34 * h + scores + 8) // 8


def test_what_recomputation_keeps() -> None:
    found = layer(LAYOUT, GPT, "fused", "unfused")
    assert found.kept("none") == found.total
    assert found.kept("selective") == found.total - found.scores
    assert found.kept("full") == 2 * WORK.seq_len * GPT.hidden
    flash = layer(LAYOUT, GPT, "fused", "flash2")
    assert flash.scores == 0
    assert flash.total < found.kept("selective") + 4 * WORK.seq_len * GPT.num_heads


@given(
    recompute=st.sampled_from(["none", "selective", "full"]),
    attention=st.sampled_from(["unfused", "flash2"]),
    fusion=st.sampled_from(["eager", "fused", "compiled"]),
    tp=st.sampled_from([1, 2, 4, 8]),
    model=st.sampled_from([LLAMA, GPT, MOE]),
    cp=st.sampled_from([1, 2]),
)
def test_every_knob_saves_what_it_is_for(
    recompute: Recompute, attention: Attention, fusion: Fusion, tp: int, model: ModelSpec, cp: int
) -> None:
    stack = replace(STACK, attention=attention, fusion=fusion)
    layout = replace(LAYOUT, tp=tp, cp=cp, recompute=recompute)
    kept = sum(stage_activation_bytes(model, WORK, layout, stack))
    less: Sequence[tuple[Layout, StackSpec]] = (
        (replace(layout, recompute="full"), stack),
        (replace(layout, sequence_parallel=True), stack),
        (replace(layout, cp=2 * cp), stack),
        (layout, replace(stack, attention="flash3")),
        (layout, replace(stack, fusion="compiled")),
    )
    for other, other_stack in less:
        assert sum(stage_activation_bytes(model, WORK, other, other_stack)) <= kept
    (rank,) = memory(layout, stack, model)
    assert rank.activations == kept
    assert rank.total == rank.allocated + rank.reserve + rank.context


def test_first_middle_and_last_stages_differ() -> None:
    layout = replace(LAYOUT, pp=4, stage_layers=(2, 2, 2, 2))
    first, second, third, last = memory(layout, model=GPT)
    table = 2 * GPT.vocab // 2 * GPT.hidden
    assert (
        second.parameters
        == third.parameters
        == first.parameters - table - (2 * GPT.max_seq_len * GPT.hidden)
    )
    # Tied embeddings on two stages are two copies; the last stage has the final norm on top.
    assert last.parameters == second.parameters + table + 2 * 2 * GPT.hidden
    assert first.activations == 4 * second.activations // 3 == 2 * third.activations
    assert last.temporary == 6 * WORK.seq_len * GPT.vocab // 2 > first.temporary


def test_the_two_peaks_of_a_step_and_what_stacks_log() -> None:
    layout = replace(LAYOUT, sharding="zero1")
    (rank,) = memory(layout, NANOTRON)
    count = parameters(LLAMA, 2)
    # Gradient buckets are a copy in bf16; the update gathers parameters and its own shard.
    assert rank.buffers == 2 * count
    assert rank.update == 2 * count + 2 * count // 4
    assert rank.logged("update") == (2 + 4 + 3 + 2 + 2) * count + 2 * count // 4
    assert rank.logged("allocated") == rank.allocated > rank.logged("update")
    assert rank.logged("reserved") == round(1.24 * rank.allocated)
    assert rank.logged("device") == rank.total == rank.logged("reserved") + rank.context
    (idle,) = memory(replace(layout, dp=1), NANOTRON)
    assert (idle.buffers, idle.update) == (0, 0)
    long_update = replace(rank, update=10 * rank.update)
    assert long_update.allocated == long_update.logged("update")


def test_communication_holds_buffers() -> None:
    whole = 2 * WORK.seq_len * LLAMA.hidden
    plain, gathered = memory(LAYOUT)[0], memory(replace(LAYOUT, sequence_parallel=True))[0]
    assert (plain.buffers, gathered.buffers) == (0, 2 * whole)
    (ring,) = memory(replace(LAYOUT, cp=2))
    assert ring.buffers == 4 * (WORK.seq_len // 2) * (LLAMA.num_kv_heads // 2) * 64 * 2
    (bucket,) = memory(replace(LAYOUT, sharding="zero1"))
    assert bucket.buffers == 2 * STACK.gradient_bucket_bytes


def test_an_accumulator_in_another_dtype_holds_the_gradients_of_a_backward() -> None:
    layout = replace(LAYOUT, pp=2, stage_layers=(4, 4), recompute="full")
    count = memory(layout)[0].parameters // 2
    kept = stage_activation_bytes(LLAMA, WORK, layout, STACK)[0]
    assert memory(layout)[0].temporary == 2 * count - kept
    assert memory(layout, replace(STACK, gradient_bytes=2))[0].temporary < 2 * count - kept


SWEEP = replace(LLAMA, hidden=2048, ffn=8192, num_layers=16, num_heads=32, num_kv_heads=32,
                vocab=131072, max_seq_len=4096, tied_embeddings=True)  # fmt: skip


@pytest.mark.parametrize(
    ("dp", "tp", "sharding", "micro_batch", "logged_gib"),
    [
        (8, 1, "none", 2, 25.07),
        (8, 1, "zero1", 1, 14.76),
        (64, 1, "zero1", 2, 12.84),
        (4, 2, "none", 8, 12.82),
        (8, 2, "zero1", 8, 7.67),
        (4, 4, "zero1", 16, 4.79),
    ],
)
def test_the_logged_peaks_of_a_published_sweep(
    dp: int, tp: int, sharding: Sharding, micro_batch: int, logged_gib: float
) -> None:
    """Nanotron's benchmark of a LLaMA of 1.34e9 parameters logs the peak of the update, in GiB.

    Source: the benchmark table of the Ultra-Scale Playbook (Hugging Face, 2025-02).
    """
    work = replace(WORK, seq_len=4096)
    layout = Layout(dp=dp, tp=tp, pp=1, micro_batch=micro_batch, num_microbatches=4,
                    stage_layers=(16,), sequence_parallel=tp > 1, sharding=sharding)  # fmt: skip
    schedule = SCHEDULES["1f1b"].build(1, 4)
    (rank,) = peak_memory(SWEEP, work, layout, schedule, NANOTRON, context_bytes=0)
    assert rank.logged("update") / GIB == pytest.approx(logged_gib, rel=0.02)


@pytest.mark.parametrize(
    ("pp", "tp", "dp", "layers", "micro_batch", "measured_gib"),
    [(6, 8, 8, 78, 1, 39), (6, 8, 8, 78, 4, 56), (12, 8, 4, 72, 1, 30), (4, 8, 12, 80, 1, 47)],
)
def test_the_device_memory_of_a_published_tuning(
    pp: int, tp: int, dp: int, layers: int, micro_batch: int, measured_gib: int
) -> None:
    """BLOOM's tuning runs on A100s with 80 GB, full recomputation; their table is in whole GB.

    Source: BigScience, chronicles-prequel of tr11-176B-ml, "Choosing the fastest 3D Topology".
    """
    model = replace(GPT, hidden=14400, ffn=57600, num_layers=layers, num_heads=96, num_kv_heads=96,
                    head_size=150, vocab=250880, max_seq_len=2048)  # fmt: skip
    layout = Layout(dp=dp, tp=tp, pp=pp, micro_batch=micro_batch, num_microbatches=64,
                    stage_layers=(layers // pp,) * pp, sharding="zero1",
                    recompute="full")  # fmt: skip
    largest = max(rank.total for rank in memory(layout, DEEPSPEED, model))
    assert largest / GIB == pytest.approx(measured_gib, rel=0.08)
