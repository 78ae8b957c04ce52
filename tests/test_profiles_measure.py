"""Measuring: passes of real ranks give a sound profile; one that breaks off says what it lacks."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

import torch

from layline import walk
from layline.cli import main
from profiles.errors import IncompleteProfileError, UnsupportedError
from profiles.files import canonical_json, from_plain, write_text
from profiles.lookup import CostTable
from profiles.measure import run
from profiles.measure.reference import reference_ns
from profiles.measure.run import measure
from profiles.measure.verify import compared, held_out, verified_text
from profiles.profile import CollectiveSample, KernelSample, Profile
from profiles.store import load_profile
from profiles.validity import errors
from tests.machine import made_up_profile

CPU = torch.device("cpu")
ONLY = (
    "add_forward", "norm_backward", "send_recv", "all_gather", "dtensor_linear", "pipeline_action",
    "step", "layer",
)  # fmt: skip


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give passes a few seconds: what they find does not matter, only that they find it."""
    monkeypatch.setattr(run, "_QUICK", (3.0, 2.0))


def test_the_reference_kernel_is_quick() -> None:
    assert reference_ns(CPU) > 0


def test_a_gpu_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UnsupportedError, match="2 asked for, 0 found"):
        measure(2, "cuda", quick=True, on_progress=lambda *_: None)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timed
def test_two_ranks_give_a_sound_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_QUICK", (7.0, 7.0))
    seen: list[float] = []
    profile = measure(
        2, "cpu", quick=True, on_progress=lambda fraction, _: seen.append(fraction), only=ONLY
    )
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    samples: list[KernelSample | CollectiveSample] = [*profile.kernels, *profile.collectives]
    ops = {"add_forward", "norm_backward", "layer_forward", "layer_backward", "reference"}
    assert {sample.op for sample in profile.kernels} == ops
    assert {sample.kind for sample in profile.collectives} == {"send_recv", "all_gather"}
    assert profile.host_ns.keys() == {"dtensor_linear", "pipeline_action", "step"}
    assert profile.host_ns["dtensor_linear"] > 0
    assert not errors(profile)
    twice = [sample for sample in samples if len(sample.medians_ns) == 2]
    assert len(twice) > 0.8 * len(samples)
    assert all(sample.band > 0 for sample in twice)
    assert profile.context_bytes > 0
    assert profile.device.num_ranks == 2
    assert profile.versions["torch"] == torch.__version__
    path = tmp_path / "profile.json"
    write_text(path, canonical_json(profile))
    assert load_profile(path) == profile
    cost = CostTable(profile).kernel("add_forward", "fp32", (100_000,))
    assert cost.p10_ns <= cost.p50_ns <= cost.p90_ns


def _workers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "profiles.measure.worker" in process.cmdline() and "--nnodes=1" not in process.cmdline()
    ]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("end", ["interrupt", "killed rank"])
def test_what_there_is_of_a_measurement_that_broke_off(end: str) -> None:
    """The second pass ends early; the first one is whole."""

    def on_progress(_share: float, what: str) -> None:
        if not what.startswith("pass 2"):
            return
        if end == "interrupt":
            raise KeyboardInterrupt
        for process in _workers()[-1:]:
            process.send_signal(signal.SIGKILL)

    with pytest.raises(IncompleteProfileError) as caught:
        measure(2, "cpu", quick=True, on_progress=on_progress, only=("add_forward", "copy"))
    found = caught.value.profile
    assert {kernel.op for kernel in found.kernels} == {"add_forward", "copy"}
    why = "interrupted" if end == "interrupt" else "was killed by SIGKILL"
    assert why in str(caught.value)
    assert any(line.startswith("broke off: ") and "of 2" in line for line in found.missing)
    assert not _workers()


def test_a_partial_profile_is_written_and_the_exit_code_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    partial = replace(made_up_profile(num_ranks=2), missing=("broke off: interrupted",))

    def broken(*_: object, **__: object) -> Profile:
        raise IncompleteProfileError(partial, "interrupted, in pass 1 of 2")

    monkeypatch.setattr(walk, "measure_profile", broken)
    output = tmp_path / "profile.json"
    result = CliRunner().invoke(main, ["profile", "-o", str(output)])
    assert result.exit_code == 6
    assert f"interrupted, in pass 1 of 2; wrote {output} with what there is" in result.stderr
    assert load_profile(output) == partial


@pytest.mark.slow
@pytest.mark.dist
def test_two_nodes_are_profiled_by_one_command(tmp_path: Path) -> None:
    """Two agents of torchrun on this machine, a rank each; the first rank writes the profile."""
    output = tmp_path / "profile.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", "--rdzv-id=two", f"--rdzv-endpoint={tmp_path}/agents",
        "--local-addr=127.0.0.1",
    ]  # fmt: skip
    script = (
        "from profiles.measure import run; run._QUICK = (6.0,); "
        "from layline.cli import main; main()"
    )
    (tmp_path / "hurried.py").write_text(script)
    agents = [
        subprocess.Popen(
            [*command, f"--rdzv-conf=store_type=file,is_host={is_host}",
             str(tmp_path / "hurried.py"), "profile", "--device=cpu", "--quick", "-o", str(output)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent),
                              "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for is_host in (1, 0)
    ]  # fmt: skip
    try:
        said = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum(f"wrote {output}" in text for text in said) == 1
    profile = from_plain(Profile, json.loads(output.read_text()), "profile", "measure again")
    assert (profile.device.num_ranks, profile.device.ranks_per_node) == (2, 1)
    named = {node.name for node in profile.fabric.nodes if node.kind == "node"}
    assert named == {"node0", "node1", "network"}
    assert {sample.kind for sample in profile.collectives} >= {"all_reduce", "send_recv"}
    assert all(sample.p50_ns > 0 for sample in profile.collectives)


def test_shapes_that_are_held_out_are_within_and_new() -> None:
    """On a machine that follows a law, what was not measured is known to the nanosecond."""
    profile = made_up_profile(num_ranks=2)
    unseen = held_out(profile, 5, random.Random(0))
    known = {kernel.key for kernel in profile.kernels}
    assert not known & {kernel.key for kernel in unseen}
    by_op = {kernel.op for kernel in unseen}
    assert by_op >= {"linear_forward", "attention_backward", "norm_forward", "adamw"}
    found = compared(profile, profile, replace(profile, kernels=tuple(unseen)))
    assert found.within_band == 1.0
    assert max(row.p90_error for row in found.held_out) < 1e-6
    slower = replace(profile, kernels=tuple(replace(k, p50_ns=2 * k.p50_ns, p90_ns=2 * k.p90_ns)
                                            for k in profile.kernels))  # fmt: skip
    moved = compared(profile, slower, replace(profile, kernels=tuple(unseen)))
    assert moved.within_band == pytest.approx(
        len(profile.collectives) / (len(profile.kernels) + len(profile.collectives))
    )
    assert "held out" in verified_text(moved)
