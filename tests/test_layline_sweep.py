"""`layline plan --sweep`: the same rows and files from any farm, and what stops none of them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result

from layline import sweep as sweep_module
from layline.cli import main
from layline.farm import Arrivals, Farm, Lost, ProcessFarm, Work
from layline.sweep import answer, exit_code, sweep, sweep_text
from layline.walk import plan_job
from planner.plan import load_plan, save_plan
from planner.search import Effort
from planner.sweep import PlanSummary, Sweep, parse_axis
from profiles.errors import InvalidInputError, UnsupportedError
from profiles.files import canonical_json
from tests.machine import made_up_profile
from tests.test_layline_cli import JOB
from tests.test_layline_farm import wait_until

AXES = ("cluster.ranks=4,2,3,8", "workload.seq_len=32,0")
"""Of two values each: good, bad in the job, and for 8 ranks bad by what was measured."""


class Backwards:
    """A farm without workers, which does the last task first."""

    def map(self, function: Work, tasks: Sequence[str]) -> Arrivals:
        for place in reversed(range(len(tasks))):
            yield place, function(tasks[place])


class Losing(Backwards):
    """A farm that loses the task at `place`, or is interrupted there."""

    def __init__(self, place: int, reason: str) -> None:
        self.place, self.reason = place, reason

    def map(self, function: Work, tasks: Sequence[str]) -> Arrivals:
        for place, told in super().map(function, tasks):
            if place == self.place and not self.reason:
                raise KeyboardInterrupt
            yield place, Lost(reason=self.reason) if place == self.place else told


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(JOB)
    Path("profile.json").write_text(canonical_json(made_up_profile(num_ranks=4)))


def swept(farm: Farm, *axes: str, folder: str = "", overrides: Sequence[str] = ()) -> Sweep:
    return sweep(
        Path("job.toml"), [parse_axis(axis) for axis in axes or AXES], farm, Effort(),
        overrides=overrides, folder=Path(folder) if folder else None,
    )  # fmt: skip


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def files_in(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_any_farm_gives_the_same_bytes() -> None:
    farms: dict[str, Farm] = {
        "backwards": Backwards(), "one": ProcessFarm(num_jobs=1), "three": ProcessFarm(num_jobs=3)
    }  # fmt: skip
    told = {
        name: canonical_json(swept(farm, "cluster.ranks=2,0,1,8", folder=name))
        for name, farm in farms.items()
    }
    assert told["one"] == told["three"] == told["backwards"]
    assert files_in("one") == files_in("three") == files_in("backwards")


def test_a_case_is_what_the_job_alone_would_be() -> None:
    found = swept(Backwards(), folder="plans", overrides=["seed=3"])
    save_plan(plan_job(Path("job.toml"), ["seed=3", "cluster.ranks=2"]), Path("alone.json"))
    written = Path("plans/3-ranks=2-seq_len=32.json")
    assert written.read_bytes() == Path("alone.json").read_bytes()
    plan, summary = load_plan(written), found.rows[2].outcome
    assert isinstance(summary, PlanSummary)
    assert (summary.layout, summary.plan_digest) == (str(plan.layout), plan.plan_digest)
    assert summary.tokens_per_s == pytest.approx(8 * 32 / plan.step.p50_ns * 1e9)
    assert summary.tokens_per_s_per_gpu == summary.tokens_per_s / 2
    assert summary.peak_bytes == plan.ranking[plan.chosen].peak_bytes


def test_a_case_without_a_plan_stops_no_other() -> None:
    kinds = [getattr(row.outcome, "kind", "") for row in swept(Backwards()).rows]
    assert kinds[1::2] == ["invalid"] * 4
    assert kinds[:6:2] == [""] * 3
    assert kinds[6] == "unsupported"


def test_a_lost_case_is_a_row() -> None:
    found = swept(Losing(1, "its process was killed"), "cluster.ranks=4,2,1")
    assert [failure.problem for failure in found.failures] == ["its process was killed"]
    assert found.num_planned == 2
    assert exit_code(found) == 0


def test_what_was_done_before_an_interrupt_is_kept() -> None:
    found = swept(Losing(0, ""), "cluster.ranks=4,2,1", folder="plans")
    assert found.is_interrupted
    assert [failure.kind for failure in found.failures] == ["interrupted"]
    assert sorted(files_in("plans")) == ["2-ranks=2.json", "3-ranks=1.json"]


def test_a_worker_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def old_answer(task: str) -> str:
        with monkeypatch.context() as then:
            then.setattr(sweep_module, "__version__", "0.0.1")
            return answer(task)

    class Old(Backwards):
        def map(self, _function: Work, tasks: Sequence[str]) -> Arrivals:
            yield from super().map(old_answer, tasks)

    with pytest.raises(UnsupportedError, match=r"a worker has layline 0\.0\.1, and this is"):
        swept(Old())


def test_a_profile_is_had_before_the_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def measure(num_ranks: int, _device: str, **_: object) -> object:
        measured.append(num_ranks)
        return made_up_profile(num_ranks)

    monkeypatch.setattr("layline.walk.measure_profile", measure)
    monkeypatch.setattr("layline.walk.stored_profile", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.cwd()))
    job = Path("job.toml")
    job.write_text(JOB.replace('profile = "profile.json"\n', ""))
    found = swept(Backwards(), "cluster.ranks=2,4", "workload.seq_len=16,32")
    assert found.num_planned == 4
    assert measured == [2, 4]


def test_one_reason_for_all_is_the_error_itself() -> None:
    with pytest.raises(InvalidInputError, match="rnaks"):
        swept(Backwards(), "seed=1,2", overrides=["cluster.rnaks=1"])
    Path("job.toml").unlink()
    with pytest.raises(InvalidInputError, match=r"job\.toml: no such file"):
        swept(Backwards())


@pytest.mark.parametrize(
    ("axes", "code"),
    [(("cluster.ranks=3,5", "search.tp=[3]"), 4), (("cluster.ranks=8,16",), 5),
     (("workload.seq_len=0,-1",), 3), (("workload.seq_len=0,32",), 0)],
)  # fmt: skip
def test_the_code_is_of_the_first_if_none_is_planned(axes: tuple[str, ...], code: int) -> None:
    assert exit_code(swept(Backwards(), *axes)) == code


def test_the_table() -> None:
    lines = sweep_text(swept(Backwards())).splitlines()
    assert lines[0] == "8 cases, 3 planned"
    assert lines[2].split()[:4] == ["case", "ranks", "seq_len", "best"]
    assert lines[3].split()[:3] == ["1", "4", "32"]
    assert lines[3].endswith(" %")
    assert lines[4].split()[:4] == ["2", "4", "0", "invalid:"]
    assert len(lines) == 11


def test_the_command() -> None:
    result = call("plan", "job.toml", "--sweep", "cluster.ranks=4,1", "--sweep",
                  "workload.seq_len=32,0", "--jobs", "2", "--json", "-o", "plans")  # fmt: skip
    assert result.exit_code == 0, result.output
    cases = json.loads(result.stdout)["cases"]
    assert [case["set"] for case in cases] == [
        {"cluster.ranks": ranks, "workload.seq_len": seq_len}
        for ranks in (4, 1)
        for seq_len in (32, 0)
    ]
    assert [sorted(case) for case in cases] == [["plan", "set"], ["kind", "problem", "set"]] * 2
    assert cases[0]["plan"]["certificate"]["gap"] <= 0.01
    assert result.stderr == "wrote 2 plans into plans\n"
    again = call("plan", "job.toml", "--sweep", "cluster.ranks=4", "-o", "plans")
    assert again.exit_code == 3
    assert "plans: is not empty; name a new folder" in again.stderr


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (("--jobs", "2"), 2, "--jobs is for the cases of --sweep"),
        (
            ("--sweep", "seed=1,2", "--top", "3"),
            2,
            "--top is about one job; leave it out with --sweep",
        ),
        (("--sweep", "seed"), 3, "--sweep seed is no axis"),
        (("--sweep", "seed=1,2", "--seed", "3"), 3, "set again, after seed"),
        (("--sweep", "seed=1,2", "--farm", "slurm"), 3, '--farm is "slurm"'),
        (("--sweep", "seed=1,2", "-o", "job.toml"), 3, "job.toml: cannot be made"),
    ],
)
def test_options_that_do_not_go_together(options: tuple[str, ...], code: int, word: str) -> None:
    result = call("plan", "job.toml", *options)
    assert result.exit_code == code
    assert word in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_tells_what_is_done_and_leaves_nobody(number: signal.Signals) -> None:
    seeds = ",".join(map(str, range(300)))
    program = subprocess.Popen(
        [sys.executable, "-m", "layline", "plan", "job.toml", "--sweep", f"seed={seeds}", "--jobs",
         "2", "--json", "-o", "plans"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with program:
        try:
            wait_until(lambda: any(Path("plans").glob("*.json")) or program.poll() is not None, 120)
            assert program.poll() is None, program.communicate()
            workers = psutil.Process(program.pid).children(recursive=True)
            # Ctrl-C goes to all processes of a terminal, a batch system's signal to the first.
            send: Callable[[int, int], None] = os.killpg if number == signal.SIGINT else os.kill
            send(program.pid, number)
            out, errors = program.communicate(timeout=60)
        finally:
            program.kill()
    assert program.returncode == 6, errors
    cases = json.loads(out)["cases"]
    num_planned = sum("plan" in case for case in cases)
    assert 0 < num_planned < 300
    assert len(files_in("plans")) == num_planned
    assert {case["kind"] for case in cases if "problem" in case} == {"interrupted"}
    assert errors.splitlines() == [
        f"wrote {num_planned} plans into plans",
        f"layline: interrupted: {num_planned} of 300 cases have a plan",
    ]
    assert len(workers) >= 2
    wait_until(lambda: not any(worker.is_running() for worker in workers))
