"""Measuring: the grids are products, two real ranks give a sound profile, and files keep it."""

from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from profiles.errors import UnsupportedError
from profiles.files import canonical_json, load, write_text
from profiles.lookup import REFERENCE_OP, REFERENCE_SHAPES, CostTable
from profiles.measure import grids
from profiles.measure.kernels import OPS, Arena, buffer_sets
from profiles.measure.reference import reference_ns
from profiles.measure.run import measure
from profiles.measure.timing import Budget, quantiles, time_calls
from profiles.profile import CollectiveSample, KernelSample, Profile

CPU = torch.device("cpu")
GRIDS = [(device, quick) for device in ("cpu", "cuda") for quick in (True, False)]


@pytest.mark.parametrize(("device", "quick"), GRIDS)
def test_every_op_has_a_full_product_grid(device: str, quick: bool) -> None:
    shapes = grids.kernel_shapes(device, quick)
    assert shapes.keys() == OPS.keys()
    for found in shapes.values():
        axes = [sorted(set(sizes)) for sizes in zip(*found, strict=True)]
        assert set(found) == set(product(*axes))
        assert len(found) == len(set(found))


@pytest.mark.parametrize(("device", "quick"), GRIDS)
def test_the_reference_kernel_is_measured(device: str, quick: bool) -> None:
    assert REFERENCE_SHAPES[device] in grids.kernel_shapes(device, quick)[REFERENCE_OP]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_op_runs_at_its_smallest_shape(op: str, dtype: torch.dtype) -> None:
    arena = Arena(CPU, dtype, 1 << 20)
    shape = min(grids.kernel_shapes("cpu", True)[op])
    times = time_calls(
        buffer_sets(op, arena, shape), CPU, Budget(time_ns=0, min_samples=2, max_samples=3)
    )
    assert len(times) >= 2
    assert min(times) > 0


def test_samples_keep_to_the_budget() -> None:
    calls = [lambda: None]
    few = time_calls(calls, CPU, Budget(time_ns=0, min_samples=5, max_samples=50))
    many = time_calls(calls, CPU, Budget(time_ns=10**9, min_samples=5, max_samples=50))
    assert (len(few), len(many)) == (5, 50)


def test_quantiles_of_one_sample_are_the_sample() -> None:
    assert quantiles([7]) == (7, 7, 7)


def test_the_reference_kernel_is_quick() -> None:
    assert reference_ns(CPU) > 0


def test_a_gpu_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UnsupportedError, match="2 asked for, 0 found"):
        measure(2, "cuda", quick=True, on_progress=lambda *_: None)


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_give_a_sound_profile(tmp_path: Path) -> None:
    seen: list[float] = []
    only = ("add_forward", "norm_backward", "send_recv", "all_gather", "step")
    profile = measure(
        2, "cpu", quick=True, on_progress=lambda fraction, _: seen.append(fraction), only=only
    )
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    samples: list[KernelSample | CollectiveSample] = [*profile.kernels, *profile.collectives]
    assert {sample.op for sample in profile.kernels} == {"add_forward", "norm_backward"}
    assert {sample.kind for sample in profile.collectives} == {"send_recv", "all_gather"}
    assert profile.host_ns.keys() == {"step"}
    assert all(0 < s.p10_ns <= s.p50_ns <= s.p90_ns and s.num_samples >= 5 for s in samples)
    assert profile.context_bytes > 0
    assert profile.device.num_ranks == 2
    assert profile.versions["torch"] == torch.__version__
    path = tmp_path / "profile.json"
    write_text(path, canonical_json(profile))
    assert load(Profile, path, "profile", "measure again") == profile
    cost = CostTable(profile).kernel("add_forward", "fp32", (100_000,))
    assert cost.p50_ns > 0
    assert not cost.is_extrapolated


@pytest.mark.slow
@pytest.mark.dist
def test_host_costs_of_ranks_that_talk() -> None:
    only = ("dtensor_linear", "pipeline_action")
    profile = measure(2, "cpu", quick=True, on_progress=lambda *_: None, only=only)
    assert profile.kernels == ()
    assert profile.host_ns.keys() == set(only)
    assert profile.host_ns["dtensor_linear"] > 0
