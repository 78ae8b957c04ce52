"""What a job changes of a stack, what it leaves to the search, and the hosts of its nodes."""

from dataclasses import replace
from pathlib import Path

import pytest

from profiles.choices import AS_SAID, Choices
from profiles.errors import InvalidInputError, UnsupportedError
from profiles.job import Job, read_job
from profiles.presets import host_preset, host_presets, stack_preset
from profiles.stack import changed_stack

JOB = """
[model]
preset = "llama-3-8b"
[workload]
seq_len = 4096
global_batch = 64
dtype = "bf16"
[cluster]
preset = "h100-sxm"
[stack]
preset = "megatron-2023"
"""


def read(tmp_path: Path, *overrides: str, text: str = JOB) -> Job:
    path = tmp_path / "job.toml"
    path.write_text(text)
    return read_job(path, overrides)


def test_single_facts_of_a_stack_are_overridden(tmp_path: Path) -> None:
    preset = stack_preset("megatron-2023")
    job = read(tmp_path, "stack.gradient_dtype=bf16", "stack.master_weights=none",
               "stack.moments_dtype=bf16", "stack.optimizer_offload=true")  # fmt: skip
    assert job.stack == replace(
        preset, name="megatron-2023-changed", source=f"{preset.source}; changed in the job",
        gradient_bytes=2, reduction_bytes=2, master_bytes=0, moment_bytes=4,
        offloads_optimizer=True,
    )  # fmt: skip
    apart = read(tmp_path, "stack.gradient_dtype=bf16", "stack.reduction_dtype=fp32").stack
    assert (apart.gradient_bytes, apart.reduction_bytes) == (2, 4)
    assert read(tmp_path, "stack.reduction_dtype=bf16").stack.gradient_bytes == 4


def test_what_is_said_but_not_changed_changes_nothing(tmp_path: Path) -> None:
    job = read(tmp_path, "stack.gradient_dtype=fp32", "stack.reduction_dtype=fp32",
               "stack.master_weights=fp32", "stack.moments_dtype=fp32",
               "stack.optimizer_offload=false")  # fmt: skip
    assert job.stack == stack_preset("megatron-2023")
    plain = read(tmp_path, "stack.gradient_dtype=bf16", text=JOB.replace("megatron-2023", "nemo"))
    assert plain.stack == stack_preset("nemo")
    own = changed_stack(stack_preset("layline-nccl"), "bf16", gradient_dtype="bf16",
                        moments_dtype="bf16", master_weights="none")  # fmt: skip
    assert own == stack_preset("layline-nccl")


def test_a_stack_without_a_preset_is_our_own(tmp_path: Path) -> None:
    text = JOB.replace('preset = "megatron-2023"', "optimizer_offload = true")
    assert read(tmp_path, text=text).stack.name == "layline-nccl-changed"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('search.dtype=["fp8"]', 'search.dtype is ["fp8"]; it must hold workload.dtype ("bf16")'),
        ('search.gradient_dtype=["bf16"]', "must hold the dtype of stack's gradients"),
        ("search.optimizer_offload=[true]", "must hold stack.optimizer_offload (false)"),
        ("search.dtype=[]", "it must hold at least one value"),
        ('search.dtype=["fp4"]', 'it must be "fp32", "bf16", "fp16" or "fp8"'),
        ('search.master_weights=["none"]', "no such key is known here"),
        ("stack.gradient_dtype=fp8", 'it must be "fp32", "bf16" or "fp16"'),
        ("stack.momentum=1", "no such key is known here"),
    ],
)
def test_what_contradicts_itself_is_told(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read(tmp_path, override)
    assert words in str(caught.value)


def test_choices_need_peaks_and_one_dtype_of_reduction(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="what a100-sxm-80gb has a peak for"):
        read(tmp_path, 'search.dtype=["bf16", "fp8"]', 'cluster.preset="a100-sxm-80gb"')
    with pytest.raises(InvalidInputError, match=r"stack\.reduction_dtype is"):
        read(tmp_path, 'search.gradient_dtype=["fp32", "bf16"]', "stack.reduction_dtype=fp32")


def test_a_pool_names_its_host(tmp_path: Path) -> None:
    pools = '[[cluster.pools]]\ngpu = "h100-sxm"\ngpus_per_node = 8\nintra_node = "nvlink4"\n'
    text = JOB.replace('[cluster]\npreset = "h100-sxm"\n', pools + 'host = "dgx-h100"\n')
    assert read(tmp_path, text=text).cluster.pools[0].host == host_preset("dgx-h100")
    assert read(tmp_path, text=text.replace("host = ", "#")).cluster.pools[0].host is None
    with pytest.raises(InvalidInputError, match=r"cluster\.pools\.0\.host is .*did you mean"):
        read(tmp_path, text=text.replace("dgx-h100", "dgx-h10"))


def test_choices_are_kept_as_they_are_written(tmp_path: Path) -> None:
    job = read(
        tmp_path, 'search.dtype=["bf16", "fp8", "bf16"]', "search.optimizer_offload=[true, false]"
    )
    assert job.choices == Choices(dtype=("bf16", "fp8"), optimizer_offload=(True, False))
    assert read(tmp_path).choices == AS_SAID


def test_what_runs_here_is_as_it_was_measured(tmp_path: Path) -> None:
    local = JOB.replace('preset = "h100-sxm"', 'preset = "local"\nranks = 2')
    local = local.replace('preset = "megatron-2023"', "")
    assert read(tmp_path, text=local).stack == stack_preset("layline-gloo")
    with pytest.raises(UnsupportedError, match=r"stack\.optimizer_offload is given"):
        read(tmp_path, "stack.optimizer_offload=true", text=local)


@pytest.mark.parametrize("name", host_presets())
def test_hosts_are_slower_than_the_memory_of_a_gpu(name: str) -> None:
    host = host_preset(name)
    assert 10e9 < host.link.bytes_per_s < host.memory_bytes_per_s
    assert 100 * 2**30 * 8 < host.memory_bytes < 20e12
    assert host.source
    assert host.date
