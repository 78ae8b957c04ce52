"""Presets: published parameter counts, dense peaks, sources, and the facts of this machine."""

import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from profiles import machine, presets
from profiles.errors import InvalidInputError
from profiles.machine import local_cluster, machine_facts, parse_nvidia_smi
from profiles.presets import (
    cluster_preset,
    cluster_presets,
    fabric_preset,
    fabric_presets,
    gpu_preset,
    gpu_presets,
    model_preset,
    model_presets,
    published_parameters,
    stack_preset,
    stack_presets,
)

# Counts as the safetensors indices of the published checkpoints give them.
EXACT_PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
}


@pytest.mark.parametrize("name", model_presets())
def test_models_have_the_published_number_of_parameters(name: str) -> None:
    model = model_preset(name)
    assert model.name == name
    assert model.num_parameters == pytest.approx(published_parameters(name), rel=0.01)
    assert model.num_parameters == EXACT_PARAMETERS.get(name, model.num_parameters)


def test_families_differ_as_published() -> None:
    assert all(model_preset(n).is_llama_like for n in model_presets() if "llama" in n)
    assert not model_preset("gpt-3-175b").is_llama_like
    assert model_preset("gpt-3-175b").num_parameters == pytest.approx(174.6e9, rel=1e-3)
    scaling = model_preset("llama-3.2-1b").rope_scaling
    assert scaling is not None
    assert (scaling.factor, scaling.original_max_seq_len) == (32.0, 8192)
    assert model_preset("llama-3-8b").rope_scaling is None


def _sourced(tables: dict[str, Any]) -> list[dict[str, Any]]:
    data = resources.files("profiles").joinpath("data")
    found: list[dict[str, Any]] = []
    for file in ("models.toml", "stacks.toml"):
        found += tomllib.loads(data.joinpath(file).read_text(encoding="utf-8")).values()
    for key in ("gpus", "links", "fabrics", "assumed"):
        found += tables[key].values()
    return found


def test_every_fact_has_a_source_and_a_date() -> None:
    text = resources.files("profiles").joinpath("data", "clusters.toml").read_text("utf-8")
    for table in _sourced(tomllib.loads(text)):
        assert len(table["source"]) > 20
        year, month, day = map(int, table["date"].split("-"))
        assert (2018, 1, 1) <= (year, month, day) <= (2026, 11, 20)


@pytest.mark.parametrize(
    ("name", "bf16", "memory_gb", "watts"),
    [
        ("a100-sxm-40gb", 312e12, 42.4, 400),
        ("a100-sxm-80gb", 312e12, 85.2, 400),
        ("a100-pcie-80gb", 312e12, 85.9, 300),
        ("h100-pcie", 756e12, 85.5, 350),
        ("h100-sxm", 989e12, 85.5, 700),
        ("h200-sxm", 989e12, 150.8, 700),
        ("b200-sxm", 2250e12, 192.3, 1000),
        ("gb200", 2500e12, 198.7, 1200),
        ("b300-sxm", 2250e12, 288.4, 1100),
        ("gb300", 2500e12, 298.0, 1400),
        ("l40s", 362.05e12, 48.3, 350),
        ("mi300x", 1307.4e12, 206.1, 750),
    ],
)
def test_peaks_are_dense(name: str, bf16: float, memory_gb: float, watts: float) -> None:
    gpu = gpu_preset(name)
    assert gpu.peak_flops_per_s["bf16"] == bf16
    assert gpu.memory_bytes / 1e9 == pytest.approx(memory_gb, abs=0.1)
    assert gpu.max_power_watts == watts


@pytest.mark.parametrize("name", gpu_presets())
def test_peaks_rise_as_dtypes_shrink(name: str) -> None:
    peaks = gpu_preset(name).peak_flops_per_s
    order = [peaks[dtype] for dtype in ("fp32", "tf32", "fp16", "fp8") if dtype in peaks]
    assert order == sorted(order)
    assert 30 < peaks["fp16"] / gpu_preset(name).memory_bytes_per_s < 1000


@pytest.mark.parametrize("name", cluster_presets())
def test_clusters_can_be_built(name: str) -> None:
    one, four = cluster_preset(name), cluster_preset(name, num_nodes=4)
    assert one.inter_node is None
    assert four.num_ranks == 4 * one.num_ranks
    assert four.inter_node is not None
    assert four.inter_node.bytes_per_s <= four.pools[0].intra_node.bytes_per_s
    assert not four.is_local


def test_fabrics_are_the_share_of_one_gpu() -> None:
    assert fabric_preset("ndr400").bytes_per_s == 50e9
    assert fabric_preset("efa-p4d").bytes_per_s == 400e9 / 8 / 8
    assert fabric_preset("efa-p5").bytes_per_s == 3200e9 / 8 / 8
    assert all(1_000 <= fabric_preset(name).latency_ns <= 50_000 for name in fabric_presets())
    joined = cluster_preset("a100-sxm-80gb", num_nodes=2, fabric="efa-p4d").inter_node
    assert joined == fabric_preset("efa-p4d")


def test_stacks_say_what_they_overlap() -> None:
    overlaps = {name: stack_preset(name).overlaps_gradients for name in stack_presets()}
    assert overlaps["layline-gloo"] is False
    assert overlaps["layline-nccl"] is True
    assert overlaps["megatron-2021"] is False
    assert all(len(stack_preset(name).calibrates) <= 8 for name in overlaps)
    assert stack_preset("layline-nccl").gradient_bucket_bytes == 25 * 2**20


def test_an_unknown_name_gets_the_nearest_known_ones() -> None:
    with pytest.raises(InvalidInputError) as caught:
        model_preset("Llama-3_8B")
    assert str(caught.value).startswith(
        'model preset is "Llama-3_8B"; it must be the name of a known model; '
        'did you mean "llama-3-8b"'
    )
    assert "known: llama-1-7b, " in str(caught.value)
    with pytest.raises(InvalidInputError, match="it must be at least 1"):
        cluster_preset("h100-sxm", num_nodes=0)
    with pytest.raises(InvalidInputError, match="use a known stack: layline-gloo, layline-nccl"):
        stack_preset("zzz")


def test_this_machine_is_a_cluster_of_one_node() -> None:
    two, one = local_cluster(2), local_cluster(1)
    assert (two.name, two.is_local, two.num_ranks, two.inter_node) == ("local", True, 2, None)
    assert two.pools[0].gpu.memory_bytes == one.pools[0].gpu.memory_bytes // 2
    assert two.pools[0].gpu.peak_flops_per_s == {}
    assert two.pools[0].gpu.source == "read from this machine"
    assert machine_facts().memory_bytes == one.pools[0].gpu.memory_bytes
    with pytest.raises(InvalidInputError, match=r"cluster\.ranks is 0"):
        local_cluster(0)


def test_cuda_ranks_need_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    smi = "NVIDIA H100 80GB HBM3, 81559, 700.00, 580.95.05\n" * 2
    monkeypatch.setattr(machine, "read_gpus", lambda: parse_nvidia_smi(smi))
    gpu = local_cluster(2, "cuda").pools[0].gpu
    assert (gpu.name, gpu.memory_bytes) == ("NVIDIA H100 80GB HBM3", 81559 << 20)
    assert gpu.peak_flops_per_s == gpu_preset("h100-sxm").peak_flops_per_s
    with pytest.raises(InvalidInputError, match=r"at most the number of GPUs here \(2\)"):
        local_cluster(3, "cuda")
    monkeypatch.setattr(machine, "read_gpus", tuple)
    with pytest.raises(InvalidInputError, match=r"at most the number of GPUs here \(0\)"):
        local_cluster(1, "cuda")


def test_driver_listings_are_read_with_care(tmp_path: Path) -> None:
    text = "NVIDIA B200, 183359, [N/A], 580.1\n\nNo devices were found\nX, many, 1, 2\n"
    (gpu,) = parse_nvidia_smi(text)
    assert (gpu.name, gpu.max_power_watts) == ("NVIDIA B200", 0.0)
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert machine.cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert machine.cpu_name(tmp_path / "absent")
    (tmp_path / "max").write_text("1048576\n")
    assert machine.total_memory_bytes(tmp_path / "max") == 1_048_576
    (tmp_path / "max").write_text("max\n")
    assert machine.total_memory_bytes(tmp_path / "max") > 2**28


def test_an_absent_driver_means_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert machine.read_gpus() == ()
    monkeypatch.setattr("shutil.which", lambda _: "/no/such/nvidia-smi")
    assert machine.read_gpus() == ()


def test_no_reader_imports_torch() -> None:
    code = (
        "import sys, profiles.job, profiles.machine, profiles.huggingface;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert presets.closest("x", ["a"], "thing") == "use a known thing: a"
