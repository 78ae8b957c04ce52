"""Jobs for clusters that are not at hand: with a profile from there, or from reference profiles."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from layline import walk
from layline.cli import main
from planner.plan import load_plan
from planner.reference.costs import reference_data
from profiles.files import canonical_json
from tests.machine import made_up_profile

Call = Callable[..., Result]

ELSEWHERE = """\
profile = "profile.json"

[model]
preset = "llama-demo"

[workload]
seq_len = 32
global_batch = 8

[cluster]
name = "rented"

[[cluster.pools]]
gpus_per_node = 4
intra_node = { name = "made-up", rate = "100 GB/s", latency = "5 us", source = "-", date = "-" }

[cluster.pools.gpu]
name = "made-up"
memory = "80 GiB"
memory_rate = "2 TB/s"
peak = { fp32 = "10 TFLOP/s" }
power = "700 W"
source = "made up"
date = "2026-11-20"

[search]
schedule = ["interleaved"]
"""

RENTED = """\
[model]
preset = "llama-3-8b"

[workload]
seq_len = 8192
global_batch = 128
dtype = "bf16"

[cluster]
preset = "h100-sxm"
nodes = 4

[search]
schedule = ["1f1b"]
micro_batch = [1]
"""
NOT_MEASURED = f"from reference profiles of {reference_data()[1]}, nothing was measured there"


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """A command in a folder that holds two jobs, and the profile of one; nothing is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(walk, "measure_profile", lambda *_, **__: pytest.fail("measured"))
    Path("job.toml").write_text(ELSEWHERE)
    Path("rented.toml").write_text(RENTED)
    profile = canonical_json(made_up_profile(num_ranks=4))
    Path("profile.json").write_text(profile.replace('"kind": "cpu"', '"kind": "cuda"'))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments), catch_exceptions=False)

    return run


def test_interleaved_stages_from_job_to_trace(call: Call) -> None:
    planned = call("plan", "job.toml", "-o", "plan.json", "--set", "search.stages_per_rank=[2]")
    assert planned.exit_code == 0, planned.output
    plan = load_plan(Path("plan.json"))
    assert (plan.layout.schedule, plan.layout.stages_per_rank) == ("interleaved", 2)
    assert f",v=2,interleaved,mb={plan.layout.micro_batch}x" in planned.stdout
    simulated = call("simulate", "plan.json", "--trace", "trace.json.gz")
    assert simulated.exit_code == 0, simulated.output
    for words in ("bottleneck: stages ", "critical path: ", "bubble"):
        assert words in simulated.stdout
    told = json.loads(call("simulate", "plan.json", "--json").stdout)
    assert told["step_ns"] == plan.step.p50_ns
    assert sum(told["critical_path"]["busy_ns"].values()) == plan.step.p50_ns
    peaks = [max(alive for _, alive in told["memory"][rank]) for rank in sorted(told["memory"])]
    assert peaks == [memory.total for memory in plan.memory]
    events = json.loads(gzip.decompress(Path("trace.json.gz").read_bytes()))["traceEvents"]
    names = {event["args"].get("name") if event["ph"] == "M" else event["name"] for event in events}
    assert {"0F0", f"{plan.layout.num_stages - 1}B0", "memory", "critical path"} <= names
    reported = call("report", "plan.json", "-o", "report.html")
    assert reported.exit_code == 0, reported.output
    assert f"stages 0,{plan.layout.pp}" in Path("report.html").read_text()
    result = call("run", "plan.json", "-o", "out")
    assert result.exit_code == 5
    assert "the plan is for cluster rented, not for this machine" in result.stderr


def test_a_cluster_without_a_profile_is_planned_from_reference_profiles(call: Call) -> None:
    planned = call("plan", "rented.toml", "-o", "plan.json")
    assert planned.exit_code == 0, planned.output
    assert f"32 ranks of h100-sxm\ncosts: stack layline-nccl, {NOT_MEASURED}" in planned.stdout
    plan = load_plan(Path("plan.json"))
    assert plan.profile.is_reference
    assert plan.step.p10_ns < plan.step.p50_ns < plan.step.p90_ns
    simulated = call("simulate", "plan.json").stdout
    for words in (NOT_MEASURED, "arithmetic at peak rate", "32 ranks x 989.0 TFLOP/s dense bf16)"):
        assert words in simulated
    told = json.loads(call("simulate", "plan.json", "--json").stdout)
    assert sum(told["waterfall"]["parts_ns"].values()) == told["step_ns"] == plan.step.p50_ns
    assert 0.2 < told["waterfall"]["mfu"] <= told["waterfall"]["hfu"] < 0.8
    assert call("report", "plan.json", "-o", "report.html").exit_code == 0
    page = " ".join(Path("report.html").read_text().split())
    assert page.count(NOT_MEASURED) == 2
    assert "Confidence: reference." in page
    assert "<pre>layline simulate plan.json layline report plan.json -o report.html</pre>" in page
    result = call("run", "plan.json", "-o", "out")
    assert result.exit_code == 5
    assert "the plan is for cluster h100-sxm, not for this machine" in result.stderr
    assert not Path("out").exists()


def test_any_stack_and_model_can_be_planned_from_reference_profiles(call: Call) -> None:
    changes = ["model.preset=gpt-3-175b", "workload.seq_len=2048", "stack.preset=megatron-2023",
               "cluster.nodes=16", "search.tp=[8]", 'search.sharding=["zero1"]',
               'search.recompute=["selective"]']  # fmt: skip
    planned = call(
        "plan", "rented.toml", *(part for change in changes for part in ("--set", change))
    )
    assert planned.exit_code == 0, planned.output
    assert "gpt-3-175b" in planned.stdout
    assert "stack megatron-2023, from reference" in planned.stdout
    assert ",zero1,recompute=selective,mb=1x" in planned.stdout


@pytest.mark.parametrize(
    ("code", "changes", "words"),
    [
        (5, ["profile=auto"], "the GPU made-up, of which no measurements are known; there are of"),
        (3, ["profile=auto", "cluster.pools.0.gpu.name=a100-sxm-80gb", "workload.dtype=fp8"],
         'workload.dtype is "fp8"; it must be one that a100-sxm-80gb has a peak for'),
    ],
)  # fmt: skip
def test_what_nobody_published_is_refused_with_a_way_out(
    call: Call, code: int, changes: list[str], words: str
) -> None:
    result = call("plan", "job.toml", *(part for change in changes for part in ("--set", change)))
    assert result.exit_code == code
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
