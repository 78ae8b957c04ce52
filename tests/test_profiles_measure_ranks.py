"""Ranks: what is said when they fail, and of GPUs that cannot be used."""

from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from profiles.errors import UnsupportedError
from profiles.machine import GpuFacts
from profiles.measure import ranks
from profiles.measure.ranks import (
    STORE_VARIABLE,
    RanksFailedError,
    check_device,
    failure_reason,
    gathered_fabric,
    gathered_texts,
    gpu_problem,
    joined,
    launched,
    nodes,
    was_launched,
)

CPU = torch.device("cpu")
H100 = GpuFacts(
    name="NVIDIA H100 80GB HBM3", memory_bytes=80 << 30, max_power_watts=700.0, driver="470.57.02"
)
# As PyTorch has said it since 1.7, but for the links.
TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). "
    "Please update your GPU driver"
)
COUNTED = "device cuda needs one GPU a rank: 2 asked for, 0 found"
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "GROUP_RANK", STORE_VARIABLE)


@pytest.fixture
def alone() -> Iterator[None]:
    """Be the only rank of a process group."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


def test_a_killed_rank_is_named_and_those_that_torchrun_ended_are_not() -> None:
    log = (
        "[rank0]: RuntimeError: Connection reset by peer\n"
        "  rank      : 0 (local_rank: 0)\n  exitcode  : -15 (pid: 7)\n"
        "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 8)\n"
    )
    assert failure_reason(log) == "rank 1 was killed by SIGKILL, often for want of memory"
    assert failure_reason("ValueError: sad\n") == "ValueError: sad"


@pytest.mark.parametrize(
    "line",
    [
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB.",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 4611686018427387904 bytes.",
        "MemoryError",
    ],
)
def test_want_of_memory_is_told_from_other_failures(line: str) -> None:
    reason = failure_reason(f"Traceback (most recent call last):\n{line}\n  at torch/other\n")
    assert reason == (
        f"a rank ran out of memory ({line}); use fewer ranks, or a machine with more memory"
    )


@pytest.mark.parametrize(
    ("usable", "gpus", "cuda", "said", "expected"),
    [
        (0, [], None, "", f"{COUNTED}; use --device cpu or fewer ranks"),
        (
            1, [H100] * 2, "13.0", "",
            "device cuda needs one GPU a rank: 2 asked for, 1 found; use --device cpu or fewer "
            "ranks",
        ),
        (
            0, [H100] * 2, None, "",
            f"{COUNTED}: nvidia-smi sees 2 NVIDIA H100 80GB HBM3 (driver 470.57.02), but torch "
            "2.x is built without CUDA; install a CUDA build of torch, or use --device cpu",
        ),
        (
            0, [H100] * 2, "13.0", TOO_OLD,
            f"{COUNTED}: nvidia-smi sees 2 NVIDIA H100 80GB HBM3 (driver 470.57.02), but the "
            "driver does not fit torch 2.x, which is built for CUDA 13.0; update the driver, "
            "install a torch built for an older CUDA, or use --device cpu (torch says: "
            f"{TOO_OLD})",
        ),
        (
            0, [H100] * 2, "13.0", "",
            f"{COUNTED}: nvidia-smi sees 2 NVIDIA H100 80GB HBM3 (driver 470.57.02), but torch "
            "2.x for CUDA 13.0 cannot use them; CUDA_VISIBLE_DEVICES hides them: unset it, or "
            "use --device cpu (torch says: nothing)",
        ),
    ],
)  # fmt: skip
def test_gpus_that_cannot_be_used_are_explained(
    usable: int,
    gpus: list[GpuFacts],
    cuda: str | None,
    said: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_problem(2, usable, gpus, cuda, said) == expected


@pytest.mark.parametrize(
    ("kind", "num_usable", "num_gpus", "is_hidden", "is_refused"),
    [
        ("cpu", 0, 2, False, False),
        ("cuda", 2, 2, False, False),
        ("cuda", 1, 1, False, True),
        ("cuda", 0, 0, False, True),
        ("auto", 0, 0, False, False),
        ("auto", 1, 1, False, False),  # too few for one each: the CPU, as documented
        ("auto", 0, 2, False, True),
        ("auto", 0, 2, True, False),
    ],
)
def test_only_gpus_at_fault_keep_auto_from_the_cpu(
    kind: str,
    num_usable: int,
    num_gpus: int,
    is_hidden: bool,
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_usable > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_usable)
    monkeypatch.setattr(ranks, "read_gpus", lambda: (H100,) * num_gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if is_hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if is_refused:
        with pytest.raises(UnsupportedError, match=f"2 asked for, {num_usable} found"):
            check_device(kind, 2)
    else:
        check_device(kind, 2)


@pytest.mark.usefixtures("not_launched")
def test_a_process_that_is_no_rank_says_so() -> None:
    assert not was_launched()
    with pytest.raises(UnsupportedError, match="is no rank"), joined():
        pass


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("text", ["", "a", "knoten-1.\u00f6rtlich", "\0\n", "x" * 100_000])
def test_texts_come_back_as_they_were(text: str) -> None:
    assert gathered_texts(text, CPU) == (text,)


@pytest.mark.usefixtures("alone", "not_launched")
def test_one_rank_is_on_one_node() -> None:
    assert nodes(CPU) == (0,)
    assert gathered_fabric(CPU).nodes[0].kind == "node"


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_that_fail_end_with_what_they_said() -> None:
    with (
        pytest.raises(RanksFailedError, match="no_such_module"),
        launched("no_such_module", [], 1),
    ):
        pass
