"""Rows of published runs: what each text means, what contradicts, and that no row ends a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import published
from planner.published import NEEDED_COLUMNS, PublishedRun, UnreadRun, load_runs, read_run
from planner.published_layout import split_layers
from planner.published_machine import read_machine
from planner.published_metric import step_flops
from planner.published_model import read_model
from planner.published_words import (
    read_attention,
    read_framework,
    read_precision,
    read_recompute,
    read_schedule,
    read_sharding,
)
from profiles.errors import InvalidInputError, UnsupportedError
from profiles.model import ModelSpec
from profiles.presets import model_preset
from profiles.stack import StackSpec

ROW = {
    "id": "lab-0007", "framework": "Megatron-LM", "date": "2024-05", "model": "Llama-3-8B",
    "params_b": "8.03", "hidden": "4096", "ffn": "14336", "layers": "32", "heads": "32",
    "kv_heads": "8", "head_dim": "128", "vocab": "128256", "tie_embeddings": "false",
    "seq_len": "8192", "gpu": "H100-SXM5-80GB", "gpu_mem_gb": "80", "gpus": "16",
    "gpus_per_node": "8", "intra_node_link": "NVLink4 900GB/s (bidir)",
    "inter_node_link": "NDR InfiniBand 400 Gb/s per GPU", "tp": "2", "sp": "true", "cp": "1",
    "ep": "", "pp": "2", "vpp": "1", "schedule": "1F1B", "dp": "4",
    "zero_stage_or_sharding": "distributed optimizer", "micro_batch": "1", "global_batch": "128",
    "grad_accum": "32", "recompute": "none", "attention_kernel": "FlashAttention-2",
    "precision": "bf16", "compile": "", "metric": "step_time_s", "value": "12.5", "unit": "s",
    "peak_mem_gb": "", "notes": "",
}  # fmt: skip


@pytest.fixture(autouse=True)
def made_up_stacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any stack exists; what it does matters to none of these tests."""

    def stack(name: str) -> StackSpec:
        return StackSpec(
            name=name, overlaps_gradients=True, gradient_bucket_bytes=1, fuses_norms=True,
            source="made up", date="2026-01-01", sharding="zero3" if name == "fsdp" else "none",
        )  # fmt: skip

    monkeypatch.setattr(published, "stack_preset", stack)
    published._stack.cache_clear()
    yield
    published._stack.cache_clear()


def read(**changes: str) -> PublishedRun:
    run = read_run(ROW | changes)
    assert isinstance(run, PublishedRun), run.reason
    return run


def refused(**changes: str) -> str:
    run = read_run(ROW | changes)
    assert isinstance(run, UnreadRun)
    return run.reason


def test_a_complete_row_is_read_without_a_remark() -> None:
    run = read()
    (setup,) = run.setups
    layout = setup.layout
    assert (run.id, run.group, run.remarks) == ("lab-0007", "lab", ())
    assert str(layout) == "dp=4,tp=2,pp=2,1f1b,zero1,mb=1x32"
    assert (layout.sequence_parallel, layout.stage_layers) == (True, (16, 16))
    assert (setup.model.num_parameters, setup.model.vocab) == (8_030_261_248, 128_256)
    assert (setup.workload.dtype, setup.stack.name) == ("bf16", "megatron-2023")
    assert (setup.cluster.num_ranks, setup.cluster.pools[0].gpu.name) == (16, "h100-sxm")
    assert run.measured.step_ns == 12_500_000_000


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dp": "3"}, "gpus is 16, but tp 2 x cp 1 x pp 2 x dp 3 is 12"),
        ({"gpus": "17", "dp": ""}, "gpus is 17, but tp 2 x cp 1 x pp 2 x dp 4 is 16"),
        ({"gpus": "1000000000"}, 'gpus is "1000000000"; it must be above 0 and at most 1e+06'),
        ({"grad_accum": "31"}, "micro_batch 1 x grad_accum 31 x dp 4 is 124"),
        ({"global_batch": "127"}, "global_batch is 127, no multiple of dp (4)"),
        ({"global_batch": "", "grad_accum": ""}, "global_batch not stated"),
        ({"tp": "3", "gpus": "24"}, "heads is 32, no multiple of tp (3)"),
        ({"ep": "3"}, "ep is 3; it must divide dp x cp (4)"),
        ({"ep": "2"}, 'experts of "Llama-3-8B" are not known (ep > 1)'),
        ({"layers": "1", "params_b": ""}, "layers is 1, fewer than the 2 stages"),
        ({"gpu": "TPU v5p"}, 'gpu is "TPU v5p"; known are '),
        ({"gpu": ""}, 'gpu is ""; known are '),
        ({"precision": "nvfp4"}, 'precision is "nvfp4"; modelled are '),
        ({"precision": "fp8", "gpu": "A100-SXM4-80GB"}, "precision is fp8; a100-sxm-80gb has "),
        ({"recompute": "full (CPU offload)"}, "without offload"),
        ({"recompute": "full, 10 of 32 layers"}, "full in all layers"),
        ({"schedule": "DualPipe"}, 'schedule is "DualPipe"; modelled are '),
        ({"model": "DeepSeek-V3"}, 'model "DeepSeek-V3" is no decoder of plain attention'),
        ({"model": "Llama-3-8B LoRA"}, "is no pre-training (lora)"),
        ({"params_b": "46.7"}, "params_b is 46.7, but the columns make 8.03; experts"),
        ({"hidden": "", "model": "mine"}, "hidden not stated"),
        ({"hidden": "nan"}, 'hidden is "nan"; it must be above 0'),
        ({"layers": "-4"}, 'layers is "-4"; it must be above 0'),
        ({"layers": "32.5"}, 'layers is "32.5"; it must be a whole number'),
        ({"layers": "many"}, 'layers is "many"; it must be a number'),
        ({"value": "inf"}, 'value is "inf"; it must be above 0'),
        ({"value": ""}, 'value is ""; it must be a number'),
        ({"value": "1e300"}, "value is 1e+300 s, a step of "),
        ({"metric": "loss", "unit": ""}, 'metric is "loss"; known are step_time_s, '),
        ({"micro_batch": "1", "grad_accum": "250000", "global_batch": "1000000"}, "above 100,000"),
        ({"zero_stage_or_sharding": "FSDP=3 x DP=1"}, "a shard group of 3 must divide dp x cp (4)"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why(changes: dict[str, str], reason: str) -> None:
    assert reason in refused(**changes)


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"inter_node_link": ""}, "fabric not stated: ndr400, the usual one"),
        ({"precision": ""}, "precision not stated: bf16 assumed"),
        ({"vocab": "", "params_b": ""}, "vocab not stated: 128256, as its family has"),
        ({"framework": "NewThing"}, 'framework "NewThing" is taken as megatron-2023, the nearest'),
        ({"framework": ""}, "framework not stated: it is taken as megatron-2023, the nearest"),
        ({"micro_batch": "", "grad_accum": ""}, "micro_batch not stated: 1 assumed"),
        ({"vpp": "", "schedule": "interleaved 1F1B"}, "vpp not stated: 2 assumed"),
        ({"vpp": "", "notes": "title (TP=4, VP=8)"}, "vpp not stated: 8 as in the notes"),
        ({"hidden": "", "heads": ""}, "hidden not stated: as in llama-3-8b"),
        ({"params_b": "9.2"}, "params_b is 9.2, but the columns make 8.03; the columns are taken"),
        ({"gpu": "GH200", "gpu_mem_gb": ""}, "GH200 is taken as H100 SXM, the same silicon"),
        ({"gpus": "12", "dp": "3", "global_batch": "96"}, "12 GPUs do not fill nodes of 8"),
    ],
)
def test_what_is_assumed_is_said(changes: dict[str, str], remark: str) -> None:
    assert any(said.startswith(remark) for said in read(**changes).remarks)


def test_empty_cells_are_the_usual() -> None:
    needed = {name: text for name, text in ROW.items() if name in NEEDED_COLUMNS}
    run = read_run(needed)
    assert isinstance(run, PublishedRun)
    assert str(run.setups[0].layout) == "dp=16,tp=1,pp=1,mb=1x8"
    assert [setup.layout.recompute for setup in run.setups] == ["none", "selective", "full"]


def test_batches_follow_from_one_another() -> None:
    assert read(grad_accum="").setups[0].layout.num_microbatches == 32
    assert read(micro_batch="").setups[0].layout.micro_batch == 1
    assert read(global_batch="").setups[0].workload.global_batch == 128


def test_the_assumed_micro_batch_is_that_of_the_authors() -> None:
    """`examples/sc21/run_table_1.sh` of NVIDIA/Megatron-LM, all but the 18B model (8 there)."""
    table = (("2304", "24", "24", 1, 1, 512, 32, 16), ("8192", "48", "64", 8, 2, 1536, 512, 4),
             ("10240", "60", "80", 8, 4, 1792, 1024, 2), ("12288", "80", "96", 8, 8, 2304, 1536, 2),
             ("16384", "96", "128", 8, 16, 2160, 1920, 1),
             ("20480", "105", "128", 8, 35, 2520, 2520, 1))  # fmt: skip
    for hidden, layers, heads, tp, pp, batch, gpus, micro in table:
        run = read(
            model="GPT", params_b="", hidden=hidden, ffn="", layers=layers, heads=heads,
            kv_heads="", head_dim="", vocab="51200", tie_embeddings="true", seq_len="2048",
            tp=str(tp), pp=str(pp), vpp="", dp="", gpus=str(gpus), global_batch=str(batch),
            micro_batch="", grad_accum="", recompute="full", gpu="A100-SXM4-80GB",
        )  # fmt: skip
        assert run.setups[0].layout.micro_batch == micro


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("bf16 mixed", "bf16"), ("fp16 (per section text)", "fp16"), ("FP8-CS", "fp8"),
     ("mxfp8", "fp8"), ("fp8 finer granularity (mx/128-block)", "fp8"), ("mixed", "bf16"),
     ("float32", "fp32"), ("", None)],
)  # fmt: skip
def test_precision(text: str, dtype: str | None) -> None:
    assert read_precision(text) == dtype


@pytest.mark.parametrize(
    ("text", "mode"),
    [("none", "none"), ("full (inferred)", "full"), ("selective", "selective"), ("false", "none"),
     ("activation checkpointing", "full"), ("selective op", "selective"), ("", None)],
)  # fmt: skip
def test_recompute(text: str, mode: str | None) -> None:
    assert read_recompute(text) == mode


@pytest.mark.parametrize(
    ("text", "meant"),
    [("ZeRO-0", ("none", 0)), ("ZeRO-1", ("zero1", 0)), ("zero stage 3", ("zero3", 0)),
     ("FSDP FULL_SHARD (MP PURE)", ("zero3", 0)), ("FSDP SHARD_GRAD_OP", ("zero2", 0)),
     ("BF16 optimizer (own ZeRO-1 equivalent)", ("zero1", 0)), ("none", ("none", 0)),
     ("distributed optimizer (inferred)", ("zero1", 0)), ("HSDP (shard 32)", ("zero3", 32)),
     ("DDP+distributed optimizer (inferred)", ("zero1", 0)), ("DDP", ("none", 0)),
     ("_HYBRID_SHARD_ZERO2", ("zero2", "node")), ("FSDP=128 x DP=16", ("zero3", 128)),
     ("FSDP+DP (split not given)", ("zero3", 0)), ("FSDP2", ("zero3", 0)), ("", None)],
)  # fmt: skip
def test_sharding(text: str, meant: tuple[str, int | str] | None) -> None:
    assert read_sharding(text) == meant


def test_hybrid_sharding_stays_inside_a_node() -> None:
    assert (
        read(zero_stage_or_sharding="HSDP", pp="1", dp="8", grad_accum="16")
        .setups[0]
        .layout.shard_group
        == 4
    )


@pytest.mark.parametrize(
    ("text", "gpu", "kernel"),
    [("FlashAttention-3", "h100-sxm", "flash3"), ("FlashAttention-3", "a100-sxm-80gb", "flash2"),
     ("unfused/fused softmax (no flash)", "h100-sxm", "unfused"), ("SDPA", "h100-sxm", "flash2"),
     ("Transformer Engine", "gb200", "flash3"), ("", "h100-sxm", None)],
)  # fmt: skip
def test_attention(text: str, gpu: str, kernel: str | None) -> None:
    assert read_attention(text, gpu) == kernel


@pytest.mark.parametrize(
    ("text", "stages", "name"),
    [("1F1B (DeepSpeed pipeline)", 1, "1f1b"), ("interleaved 1F1B", 5, "interleaved"),
     ("", 1, "1f1b"), ("1F1B", 2, "interleaved"), ("GPipe", 1, "gpipe"), ("ZB-V", 2, "zb_v"),
     ("zero bubble", 1, "zb_h1"), ("ZB2", 1, "zb_h2"), ("DualPipeV", 2, "dual_pipe_v")],
)  # fmt: skip
def test_schedules(text: str, stages: int, name: str) -> None:
    assert read_schedule(text, stages) == name


@pytest.mark.parametrize(
    ("framework", "date", "stack"),
    [("nanotron v0.5", "2025", "nanotron"), ("Megatron-LM", "2020-09-11", "megatron-2021"),
     ("Megatron-LM", "2024", "megatron-2023"), ("Megatron-DeepSpeed", "", "megatron-deepspeed"),
     ("NeMo 24.07/Megatron-Core", "", "nemo"), ("Megatron-Bridge", "", "nemo"),
     ("llm-foundry/Composer + PyTorch FSDP", "", "llm-foundry"), ("torchtitan", "", "torchtitan"),
     ("PyTorch FSDP2", "", "fsdp"), ("HF Accelerate", "", "fsdp"), ("MaxText (JAX)", "", "fsdp"),
     ("layline", "", "layline-nccl"), ("DeepSpeed ZeRO-3", "", "fsdp")],
)  # fmt: skip
def test_frameworks(framework: str, date: str, stack: str) -> None:
    assert read_framework(framework, date, cuts_layers=False, sharding="").name == stack


@pytest.mark.parametrize(
    ("cuts_layers", "sharding", "stack"),
    [(True, "zero3", "megatron-2023"), (False, "zero3", "fsdp"), (False, "", "torchtitan")],
)
def test_an_unknown_framework_is_told_by_its_use(
    cuts_layers: bool, sharding: str, stack: str
) -> None:
    known = read_framework("Brand New", "2026", cuts_layers=cuts_layers, sharding=sharding)
    assert known.name == stack
    assert known.remark == f'framework "Brand New" is taken as {stack}, the nearest'


@pytest.mark.parametrize(
    ("text", "memory_gb", "name", "memory_gib"),
    [("A100", 0, "a100-sxm-80gb", 79), ("A100", 40, "a100-sxm-40gb", 39),
     ("A100-SXM4-40GB", 0, "a100-sxm-40gb", 39), ("NVIDIA H100 80GB HBM3", 80, "h100-sxm", 79),
     ("H200", 141, "h200-sxm", 140), ("B200-SXM-180GB", 180, "b200-sxm", 179),
     ("GB200", 186, "gb200", 185), ("V100-SXM2-16GB", 16, "v100-sxm2-32gb", 15),
     ("GH200", 96, "h100-sxm", 94), ("MI300X", 192, "mi300x", 191), ("L40S", 48, "l40s", 44)],
)  # fmt: skip
def test_gpus(text: str, memory_gb: float, name: str, memory_gib: int) -> None:
    gpu = read_machine(text, memory_gb, 8, 8, "", "").cluster.pools[0].gpu
    assert (gpu.name, gpu.memory_bytes >> 30) == (name, memory_gib)


@pytest.mark.parametrize("text", ["H20", "A10G", "RTX 4090", "TPUv4", "MI250X", "Trainium2", "L40"])
def test_unknown_gpus_are_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match="known are "):
        read_machine(text, 0, 8, 8, "", "")


@pytest.mark.parametrize(
    ("text", "gigabits", "name"),
    [("NDR InfiniBand 400 Gb/s per GPU (inferred)", 400, "ndr400"), ("400Gbps IB", 400, "ndr400"),
     ("800 Gb/s per node", 100, "ndr400"), ("4x Omni-Path 100 Gb/s per node", 50, "opa100-4"),
     ("AWS EFA 3200 Gb/s per node", 400, "efa-p5"), ("8x200 Gb/s HDR InfiniBand", 200, "hdr200"),
     ("1600 Gb/s RoCE per node", 200, "roce200"), ("3.2 Tb/s RDMA over InfiniBand", 400, "ndr400"),
     ("HDR", 200, "hdr200"), ("Slingshot-11 4x200 Gb/s per node", 100, "slingshot11"),
     ("50 GB/s per GPU InfiniBand", 400, "ndr400"), ("100 GbE TCP", 100, "roce100")],
)  # fmt: skip
def test_fabrics(text: str, gigabits: float, name: str) -> None:
    link = read_machine("H100", 80, 64, 8, "", text).cluster.inter_node
    assert link is not None
    assert (link.bytes_per_s * 8e-9, link.name) == (pytest.approx(gigabits), name)
    assert link.uses_host == ("TCP" in text)


@pytest.mark.parametrize(
    ("gpu", "text", "gigabytes", "name"),
    [("H100", "NVLink4 900GB/s (bidir)", 450, "nvlink4"), ("H100", "", 450, "nvlink4"),
     ("H100", "PCIe Gen5", 63, "pcie5"), ("A100", "NVLink3", 300, "nvlink3"),
     ("H800", "", 200, "nvlink4"), ("H800", "NVLink 400 GB/s", 200, "nvlink4"),
     ("A100", "NVLink 300 GB/s one way", 300, "nvlink3"), ("A100-PCIe", "", 31, "pcie4")],
)  # fmt: skip
def test_links_inside_a_node(gpu: str, text: str, gigabytes: float, name: str) -> None:
    link = read_machine(gpu, 80, 8, 8, text, "").cluster.pools[0].intra_node
    assert (link.bytes_per_s / 1e9, link.name) == (gigabytes, name)


@pytest.mark.parametrize(("gpus", "per_node"), [(64, 64), (72, 72), (128, 64), (144, 72), (4, 4)])
def test_racks_of_gb200_are_one_node(gpus: int, per_node: int) -> None:
    pool = read_machine("GB200", 0, gpus, 4, "", "").cluster.pools[0]
    assert (pool.gpus_per_node, pool.num_gpus) == (per_node, gpus)


def shape_of(**changes: str) -> ModelSpec:
    return read_model({**ROW, "vocab": "", "kv_heads": "", "tie_embeddings": "", **changes}).model


@pytest.mark.parametrize(
    "name",
    ["llama-2-7b", "llama-2-70b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b", "gpt-3-175b"],
)
def test_open_columns_are_told_by_the_parameters(name: str) -> None:
    """Gated or not, tied or not, shared key heads or not: the published shape comes out."""
    preset = model_preset(name)
    shape = shape_of(
        model=name, params_b=f"{preset.num_parameters / 1e9:.2f}", hidden=str(preset.hidden),
        ffn=str(preset.ffn), layers=str(preset.num_layers), heads=str(preset.num_heads),
        head_dim="", seq_len=str(preset.max_seq_len),
    )  # fmt: skip
    assert shape.num_parameters == pytest.approx(preset.num_parameters, rel=0.001)
    assert (shape.mlp, shape.num_kv_heads, shape.tied_embeddings) == (
        preset.mlp, preset.num_kv_heads, preset.tied_embeddings,
    )  # fmt: skip


def test_mixtral_has_its_experts() -> None:
    shape = shape_of(model="Mixtral-8x7B", params_b="46.7", vocab="32000", kv_heads="8")
    assert (shape.num_experts, shape.experts_per_token) == (8, 2)
    assert shape.num_parameters == pytest.approx(46.7e9, rel=0.01)


def test_a_vocabulary_follows_from_exact_parameters() -> None:
    shape = shape_of(model="mine", params_b="8.030", kv_heads="8", tie_embeddings="false")
    assert shape.vocab == pytest.approx(128_256, rel=0.01)


@pytest.mark.parametrize(
    ("layers", "stages", "counts"),
    [(126, 64, (1, *[2] * 62, 1)), (30, 32, (0, *[1] * 30, 0)), (78, 12, (7,) * 6 + (6,) * 6),
     (80, 40, (2,) * 40)],
)  # fmt: skip
def test_stages(layers: int, stages: int, counts: tuple[int, ...]) -> None:
    assert split_layers(shape_of(layers=str(layers), params_b=""), stages, "even") == counts


def test_nanotron_cuts_by_weight() -> None:
    """What the peak memory of the published runs shows: 10 layers and the embedding of 16."""
    model = shape_of(
        model="Llama-like", params_b="1.34", layers="16", hidden="2048", heads="16", ffn="8192",
        vocab="131072", head_dim="", tie_embeddings="true",
    )  # fmt: skip
    assert split_layers(model, 2, "cost") == (10, 6)


def test_hardware_flops_are_those_of_megatron() -> None:
    run = read(
        model="GPT-3", params_b="", hidden="12288", ffn="49152", layers="96", heads="96",
        kv_heads="96", seq_len="2048", vocab="51200", tie_embeddings="true", recompute="full",
        metric="hw_tflops_per_gpu", value="140", unit="TFLOP/s/GPU",
    )  # fmt: skip
    layers, h, s, v, batch = 96, 12288, 2048, 51200, 128
    flops = 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert step_flops(run.setups[0], causal=False, recomputed=True) == pytest.approx(
        flops, rel=1e-4
    )
    assert run.measured.step_ns == pytest.approx(flops / (140e12 * 16) * 1e9, rel=1e-4)


def test_every_unit_means_the_same_step() -> None:
    tokens, sequences, gpus = 128 * 8192, 128, 16
    flops = step_flops(read().setups[0], causal=False, recomputed=False)
    for metric, value, unit in (
        ("step_time_s", 20.0, "s"), ("step_time_ms", 20000.0, ""), ("iteration_time", 20.0, "s"),
        ("tokens_per_s_per_gpu", tokens / 20 / gpus, "tokens/s/GPU"),
        ("tokens_per_s", tokens / 20, "tokens/s"), ("samples_per_s", sequences / 20, "samples/s"),
        ("model_tflops_per_gpu", flops / 20e12 / gpus, "TFLOP/s/GPU"),
        ("mfu_percent", 100 * flops / 20 / gpus / 989e12, "%"),
    ):  # fmt: skip
        measured = read(metric=metric, value=repr(value), unit=unit).measured
        assert measured.step_ns == pytest.approx(20e9), metric
        assert measured.in_unit(measured.step_ns) == pytest.approx(value)
        assert measured.is_rate == ("time" not in metric)


def test_memory_is_what_the_source_says() -> None:
    assert read(peak_mem_gb="24.5").peak_bytes == 24.5 * 2**30
    logs = {"": "device", "peak_mem=max allocated": "allocated", "nvidia-smi": "device",
            "mem reserved 42 GB; peak_mem=max allocated": "allocated",
            "peak_mem = max reserved": "reserved"}  # fmt: skip
    assert {notes: read(notes=notes).memory_log for notes in logs} == logs


def test_out_of_memory_is_no_time() -> None:
    measured = read(metric="oom", value="1", unit="bool").measured
    assert (measured.ran_out_of_memory, measured.step_ns) == (True, 0)


def write(path: Path, *records: dict[str, str], header: list[str] | None = None) -> Path:
    names = header or list(ROW)
    lines = [",".join(names), *(",".join(record[name] for name in names) for record in records)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_file_is_read_row_by_row(tmp_path: Path) -> None:
    runs = load_runs(write(tmp_path / "runs.csv", ROW, ROW | {"id": "x-1", "gpus": "?"}, ROW))
    assert [type(run).__name__ for run in runs] == ["PublishedRun", "UnreadRun", "PublishedRun"]
    assert [run.group for run in runs] == ["lab", "x", "lab"]
    assert isinstance(runs[2], PublishedRun)
    assert runs[2].remarks == ("id stands in the file before",)


def test_only_the_needed_columns_are_needed(tmp_path: Path) -> None:
    (run,) = load_runs(write(tmp_path / "runs.csv", ROW, header=list(NEEDED_COLUMNS)))
    assert isinstance(run, PublishedRun)


@pytest.mark.parametrize("missing", NEEDED_COLUMNS)
def test_a_missing_column_is_named(tmp_path: Path, missing: str) -> None:
    path = write(tmp_path / "runs.csv", ROW, header=[name for name in ROW if name != missing])
    with pytest.raises(InvalidInputError, match=f"the header is without {missing}; it must name"):
        load_runs(path)


def test_marks_line_ends_and_spaces_do_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", ROW | {"gpus": " 16 ", "notes": "5 \N{MICRO SIGN}s"})
    text = path.read_text(encoding="utf-8").replace("id,", " ID ,", 1).replace("\n", "\r\n")
    for data in (
        b"\xef\xbb\xbf" + text.encode(),
        text.encode("latin-1"),
        text.encode() + b"\n,,\n",
    ):
        path.write_bytes(data)
        (run,) = load_runs(path)
        assert isinstance(run, PublishedRun)


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"hello\n", b"\x00" * 4096, b"\xff\xfe" + "id,model".encode("utf-16-le"),
     b"id;model;hidden;layers\n", (",".join([*ROW, "id"]) + "\n").encode()],
)  # fmt: skip
def test_what_is_no_table_of_runs_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(data)
    with pytest.raises(InvalidInputError, match="the header is"):
        load_runs(path)


def test_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(InvalidInputError, match="name a CSV file"):
            load_runs(path)


def test_short_long_and_huge_rows_cost_only_themselves(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", ROW | {"notes": "x" * 1_000_000})
    with path.open("a", encoding="utf-8") as file:
        file.write("cut-1,only,a,start\n")
        file.write(",".join([*ROW.values(), "beyond"]) + "\n")
        file.write('open-1,"quote that never ends\n')
    runs = load_runs(path)
    assert [type(run).__name__ for run in runs] == ["PublishedRun"] + ["UnreadRun"] * 3
    assert isinstance(runs[2], UnreadRun)
    assert runs[2].reason == "the row has more cells than the header"


CELLS = st.one_of(
    st.text(max_size=12),
    st.sampled_from([text for text in ROW.values() if text]),
    st.sampled_from(["0", "-1", "nan", "inf", "1e309", "9" * 400, "1e5", "0.5", "true", "7" * 5]),
    st.integers(-5, 10**9).map(str),
)


@given(changes=st.dictionaries(st.sampled_from(sorted(ROW)), CELLS, max_size=8))
def test_no_row_raises(changes: dict[str, str]) -> None:
    run = read_run(ROW | changes)
    if isinstance(run, UnreadRun):
        assert run.reason
        assert len(run.reason) < 2000
    else:
        for setup in run.setups:
            assert setup.layout.num_ranks == setup.cluster.num_ranks
            assert setup.layout.global_batch == setup.workload.global_batch
            assert sum(setup.layout.stage_layers) == setup.model.num_layers
        assert run.measured.step_ns > 0 or run.measured.unit == "bool"
