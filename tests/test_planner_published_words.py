"""The free texts of published runs: precision, sharding, stacks, GPUs and links."""

import pytest

from planner.published.machine import read_machine
from planner.published.words import (
    read_attention,
    read_framework,
    read_precision,
    read_recompute,
    read_schedule,
    read_sharding,
)
from profiles.errors import UnsupportedError
from profiles.presets import stack_presets


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
     ("PyTorch FSDP2", "", "fsdp"), ("HF Accelerate", "", "fsdp"), ("MaxText (JAX)", "", "maxtext"),
     ("layline", "", "layline-nccl"), ("DeepSpeed ZeRO-3", "", "fsdp")],
)  # fmt: skip
def test_frameworks(framework: str, date: str, stack: str) -> None:
    assert read_framework(framework, date, cuts_layers=False, sharding="").name == stack
    assert stack in stack_presets()


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
    assert link.bytes_per_s * 8e-9 == pytest.approx(gigabits)
    assert link.name == name
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
