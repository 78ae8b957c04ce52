"""The commands as a user meets them: what they print, and what they say of bad input."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from click.testing import CliRunner, Result

from layline import walk
from layline.cli import main
from planner.plan import PLAN_SCHEMA_VERSION, load_plan
from planner.record import load_run
from profiles.files import canonical_json
from tests.machine import made_up_profile

Call = Callable[..., Result]

JOB = """\
profile = "profile.json"
foreign_profile = true

[model]
preset = "llama-demo"

[workload]
seq_len = 32
global_batch = 8

[cluster]
preset = "local"
ranks = 4
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """A command in a folder that holds a job and a made-up profile of four ranks."""
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(JOB)
    Path("profile.json").write_text(canonical_json(made_up_profile(num_ranks=4)))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments), catch_exceptions=False)

    return run


def test_plan_simulate_and_report(call: Call) -> None:
    planned = call("plan", "job.toml", "-o", "plan.json", "--top", "3")
    assert planned.exit_code == 0, planned.output
    assert "best of" in planned.stdout
    assert "bottleneck: stage" in planned.stdout
    simulated = call("simulate", "plan.json", "--json", "--trace", "trace.json.gz")
    assert simulated.exit_code == 0, simulated.output
    told = json.loads(simulated.stdout)
    step_ns = json.loads(Path("plan.json").read_text())["step"]["p50_ns"]
    assert told["step_ns"] == step_ns == sum(told["waterfall"]["parts_ns"].values())
    assert told["waterfall"]["mfu"] is None
    assert "in fp32 is known: the parts begin at the work" in call("simulate", "plan.json").stdout
    assert Path("trace.json.gz").stat().st_size > 100
    reported = call("report", "plan.json", "-o", "report.html")
    assert reported.exit_code == 0, reported.output
    assert "llama-demo" in Path("report.html").read_text()


@pytest.mark.dist
@pytest.mark.slow
def test_a_plan_with_several_stages_a_rank_is_run_and_compared(call: Call) -> None:
    edit("job.toml", "ranks = 4", 'ranks = 2\n[search]\nschedule = ["zb_v"]\npp = [2]')
    assert call("plan", "job.toml", "-o", "plan.json").exit_code == 0
    ran = call("run", "plan.json", "--steps", "1", "-o", "out")
    assert ran.exit_code == 0, ran.output
    record = load_run(Path("out"))[1]
    assert len(record.steps) == 1
    assert record.timeline.makespan_ns > 0
    compared = call("compare", "out")
    assert compared.exit_code == 0, compared.output
    assert "v=2,zb_v" in compared.stdout


def test_the_same_input_gives_the_same_bytes(call: Call) -> None:
    for name in ("a", "b"):
        assert call("plan", "job.toml", "-o", f"{name}.json").exit_code == 0
        call("simulate", f"{name}.json", "--trace", f"{name}.gz")
        call("report", f"{name}.json", "-o", f"{name}.html")
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert Path("a.gz").read_bytes() == Path("b.gz").read_bytes()
    pages = [Path(f"{name}.html").read_text().replace("b.json", "a.json") for name in "ab"]
    assert pages[0] == pages[1]


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))


def test_a_missing_file(call: Call) -> None:
    for command in (["plan", "no.toml"], ["simulate", "no.json"], ["report", "no", "-o", "r.html"]):
        result = call(*command)
        assert result.exit_code == 3
        assert command[1] in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not Path("r.html").exists()


def test_all_errors_of_a_job_at_once(call: Call) -> None:
    edit("job.toml", "seq_len = 32", "seq_len = 0")
    edit("job.toml", "ranks = 4", "ranks = -1")
    edit("job.toml", '"llama-demo"', '"lama-demo"')
    result = call("plan", "job.toml", "-o", "plan.json")
    assert result.exit_code == 3
    for word in ("seq_len", "ranks", "llama-demo"):
        assert word in result.stderr
    assert not Path("plan.json").exists()


@pytest.mark.parametrize("value", ["nan", "80", '"80"', '"80 apples"'])
def test_a_quantity_without_its_unit(call: Call, value: str) -> None:
    edit("job.toml", "global_batch = 8", f"global_batch = 8\ntokens = {value}")
    result = call("plan", "job.toml")
    assert result.exit_code == 3
    assert "workload.tokens" in result.stderr
    assert "tokens" in result.stderr


def test_tp_that_does_not_divide_is_infeasible_by_name(call: Call) -> None:
    edit("job.toml", "ranks = 4", "ranks = 3\n[search]\ntp = [3]")
    result = call("plan", "job.toml", "-o", "plan.json")
    assert result.exit_code == 4
    assert "tp is 3, but the model has 4 kv heads; tp must divide them (1, 2, 4)" in result.stderr
    assert not Path("plan.json").exists()


def test_more_ranks_than_were_measured(call: Call) -> None:
    result = call("plan", "job.toml", "--set", "cluster.ranks=8")
    assert result.exit_code == 5
    assert "measured 4 ranks" in result.stderr


def test_an_unknown_override_is_an_error(call: Call) -> None:
    result = call("plan", "job.toml", "--set", "cluster.rnaks=8")
    assert result.exit_code == 3
    assert "rnaks" in result.stderr


def test_a_plan_edited_by_hand_names_the_section(call: Call) -> None:
    call("plan", "job.toml", "-o", "plan.json")
    edit("plan.json", '"learning_rate": 0.0003', '"learning_rate": 0.0004')
    for command in (["simulate", "plan.json"], ["run", "plan.json", "-o", "out"]):
        result = call(*command)
        assert result.exit_code == 7
        assert "changed by hand since it was planned: workload" in result.stderr
    assert not Path("out").exists()


def test_a_plan_of_an_older_version_is_stale(call: Call) -> None:
    call("plan", "job.toml", "-o", "plan.json")
    edit("plan.json", f'"schema_version": {PLAN_SCHEMA_VERSION}', '"schema_version": 2')
    result = call("simulate", "plan.json")
    assert result.exit_code == 7
    reads = f"this version reads {PLAN_SCHEMA_VERSION}"
    assert f"plan.json: schema_version is 2; {reads}" in result.stderr


def test_a_plan_whose_profile_changed_is_stale(call: Call) -> None:
    call("plan", "job.toml", "-o", "plan.json")
    edit("profile.json", '"context_bytes": 1000', '"context_bytes": 2000')
    result = call("run", "plan.json", "-o", "out")
    assert result.exit_code == 7
    assert "profile.json was changed since the plan was made" in result.stderr
    assert not Path("out").exists()


def test_a_config_that_is_not_llama_like(call: Call) -> None:
    config = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12}
    Path("config.json").write_text(json.dumps(config))
    edit("job.toml", 'preset = "llama-demo"', 'hf_config = "config.json"')
    result = call("plan", "job.toml", "-o", "plan.json")
    assert result.exit_code in (3, 5)
    assert "gpt2" in result.stderr
    assert not Path("plan.json").exists()


def test_usage_errors_are_two(call: Call) -> None:
    assert call("plan").exit_code == 2
    assert call("plan", "job.toml", "--frobnicate").exit_code == 2
    assert call("sail").exit_code == 2


def test_compare_of_no_run(call: Call) -> None:
    Path("out").mkdir()
    result = call("compare", "out")
    assert result.exit_code == 3
    assert "`layline run -o`" in result.stderr


def test_doctor_says_what_works(call: Call) -> None:
    findings = json.loads(call("doctor", "--json").stdout)
    assert findings["can"]["plan"]
    assert findings["num_ranks"] >= 2


def test_a_job_in_another_folder(call: Call, tmp_path: Path) -> None:
    Path("deep").mkdir()
    for name in ("job.toml", "profile.json"):
        Path(name).rename(f"deep/{name}")
    result = call("plan", "deep/job.toml", "-o", "plan.json")
    assert result.exit_code == 0, result.output
    assert load_plan(Path("plan.json")).profile.path == str(tmp_path / "deep" / "profile.json")


def test_what_cannot_be_written(call: Call) -> None:
    call("plan", "job.toml", "-o", "plan.json")
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for target, word in {
        "folder": "is a folder or a device",
        "pipe": "is a folder or a device",
        "none/x": "no such file or directory",
        "plan.json/x": "not a directory",
    }.items():
        for command in (
            ["plan", "job.toml", "-o"],
            ["simulate", "plan.json", "--trace"],
            ["report", "plan.json", "-o"],
            ["profile", "-o"],
        ):
            result = call(*command, target)
            assert result.exit_code == 3
            assert f"{target}: " in result.stderr
            assert word in result.stderr
    left = {path.name for path in Path().iterdir()}
    assert left == {"folder", "job.toml", "pipe", "plan.json", "profile.json"}
    assert Path("pipe").is_fifo()


def test_an_input_is_not_overwritten(call: Call) -> None:
    call("plan", "job.toml", "-o", "plan.json")
    Path("run").mkdir()
    Path("run/plan.json").write_bytes(Path("plan.json").read_bytes())
    for command in (
        ["plan", "job.toml", "-o", "job.toml"],
        ["simulate", "plan.json", "--trace", "run/../plan.json"],
        ["report", "plan.json", "run", "-o", "run/plan.json"],
        ["compare", "run", "--recalibrate", "run/record.json"],
    ):
        result = call(*command)
        assert result.exit_code == 3
        assert "is also read; name another file to write" in result.stderr
    assert Path("job.toml").read_text() == JOB
    assert load_plan(Path("run/plan.json"))


def test_a_file_of_another_kind(call: Call) -> None:
    call("plan", "job.toml", "-o", "plan.json")
    Path("list.json").write_text("[]")
    Path("inf.json").write_text('{"schema_version": 1, "seed": 1e999}')
    edit("profile.json", '"schema_version": ', '"schema_version": 9')
    for command, words in {
        ("simulate", "list.json"): "list.json: holds no Plan",
        ("simulate", "inf.json"): "1e999 is too large",
        ("plan", "job.toml"): "this version reads",
        ("plan", "job.toml", "--set", "profile=plan.json"): (
            f"plan.json: schema_version is {PLAN_SCHEMA_VERSION}"
        ),
        ("plan", "job.toml", "--set", f"profile={'a' * 3000}"): 'must be "auto" or a file',
    }.items():
        result = call(*command)
        assert result.exit_code == 3
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_byte_order_mark_is_read_over(call: Call) -> None:
    Path("job.toml").write_text(JOB, encoding="utf-8-sig")
    assert call("plan", "job.toml").exit_code == 0


def test_a_profile_that_cannot_be_kept_is_not_measured(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "measure_profile", lambda *_, **__: pytest.fail("measured"))
    edit("job.toml", '"profile.json"', '"auto"')
    monkeypatch.setenv("XDG_CACHE_HOME", "job.toml")
    result = call("plan", "job.toml")
    assert result.exit_code == 3
    assert "a profile cannot be kept there; set XDG_CACHE_HOME" in result.stderr
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    result = call("plan", "job.toml")
    assert result.exit_code == 3
    assert "there is no home folder to keep a profile in" in result.stderr
    assert call("doctor").exit_code == 0


def test_bad_folders_and_text_for_a_run(call: Call) -> None:
    call("plan", "job.toml", "-o", "plan.json")
    Path("empty").mkdir()
    for arguments, words in {
        ("-o", "plan.json/x"): "cannot be made (not a directory)",
        ("-o", "out", "--data", "empty"): "empty: holds no text",
        ("-o", "out", "--data", "n" * 300): "file name too long",
    }.items():
        result = call("run", "plan.json", *arguments)
        assert result.exit_code == 3
        assert words in result.stderr
    assert call("demo", "-o", "plan.json").exit_code == 3
    assert not Path("out").exists()


@pytest.mark.usefixtures("call")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = layline("plan", "job.toml", stdout=full)
    assert done.returncode == 1
    assert done.stderr.strip() == "layline: [Errno 28] No space left on device"


@pytest.mark.usefixtures("call")
def test_a_closed_pipe_is_no_error_of_ours() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = layline("plan", "job.toml", "--json", stdout=writing)
    os.close(writing)
    assert done.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_interrupt(call: Call, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(walk, "search_layouts", lambda *_: signal.raise_signal(number))
    result = call("plan", "job.toml", "-o", "plan.json")
    assert result.exit_code == 6
    assert result.stderr == "layline: interrupted\n"
    assert not Path("plan.json").exists()


def layline(*arguments: str, stdout: IO[str] | int) -> "subprocess.CompletedProcess[str]":
    """Return how a real process of the command ended."""
    return subprocess.run(
        [sys.executable, "-m", "layline", *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=stdout, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
