"""The goal of a job, and what its cluster says of money, power and failures."""

from pathlib import Path

import pytest

from profiles.cluster import Operation
from profiles.errors import InvalidInputError
from profiles.goal import FASTEST, OBJECTIVES, Goal
from profiles.job import Job, read_job
from profiles.job_schema import GoalTable, LimitsTable

JOB = """
[model]
preset = "llama-3-8b"
[workload]
seq_len = 8192
global_batch = 128
dtype = "bf16"
[cluster]
preset = "h100-sxm"
nodes = 4
"""
PRICED = f"""{JOB}price_per_gpu_hour = 2.5
power_per_gpu = "970 W"
pue = 1.2
[cluster.failures]
per_gpu_day = 4.7e-4
restart = "10 min"
checkpoint_rate = "100 GB/s"
[goal]
optimize = ["dollars_per_mtoken", "memory_headroom"]
[goal.limits]
step_time = "12 s"
tokens_per_s = 100000
dollars_per_mtoken = 0.35
joules_per_token = 2.0
memory_headroom = "4 GiB"
goodput = 90000
"""


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A name for a job file in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return Path("job.toml")


def _read(path: Path, text: str, *overrides: str) -> Job:
    path.write_text(text)
    return read_job(path, overrides)


def _problems(path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InvalidInputError) as caught:
        _read(path, text, *overrides)
    return str(caught.value)


def test_a_job_without_a_goal_wants_the_shortest_step(job_file: Path) -> None:
    job = _read(job_file, JOB)
    assert job.goal == FASTEST == Goal(objectives=("step_time",), limits={})
    assert job.cluster.operation == Operation()


def test_a_goal_is_read_in_base_units(job_file: Path) -> None:
    job = _read(job_file, PRICED)
    assert job.goal.objectives == ("dollars_per_mtoken", "memory_headroom")
    assert job.goal.limits == {
        "step_time": 12.0,
        "tokens_per_s": 100_000.0,
        "dollars_per_mtoken": 0.35,
        "joules_per_token": 2.0,
        "memory_headroom": 4.0 * 2**30,
        "goodput": 90_000.0,
    }
    assert job.cluster.operation == Operation(
        dollars_per_gpu_hour=2.5,
        watts_per_gpu=970.0,
        pue=1.2,
        interruptions_per_gpu_day=4.7e-4,
        restart_ns=600 * 10**9,
        checkpoint_bytes_per_s=1e11,
    )


def test_every_form_of_a_cluster_may_have_a_price(job_file: Path) -> None:
    local = 'preset = "local"\nranks = 2'
    pools = """[[cluster.pools]]
gpu = "h100-sxm"
gpus_per_node = 8
intra_node = "nvlink4"
"""
    for cluster in (local, pools, 'preset = "h100-sxm"'):
        text = JOB.replace('preset = "h100-sxm"\nnodes = 4\n', cluster)
        failures = ("cluster.failures.per_gpu_day=0", "cluster.failures.checkpoint_stall=0 s")
        job = _read(
            job_file, text, "cluster.price_per_gpu_hour=2", "goal.optimize=goodput", *failures
        )
        assert job.cluster.operation == Operation(
            dollars_per_gpu_hour=2.0, interruptions_per_gpu_day=0.0, checkpoint_stall_ns=0
        )
        assert job.goal.objectives == ("goodput",)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["goal.optimize=speed"], '--set goal.optimize is "speed"; it must be an objective, or a '
         "list of two or three different ones; use a known objective: step_time"),
        (["goal.optimize=step_tine"], 'did you mean "step_time"'),
        (['goal.optimize=["goodput","goodput"]'], "name it once"),
        (["goal.optimize=[]"], "use step_time, tokens_per_s"),
        (["goal.optimize=3"], "use step_time, tokens_per_s"),
        (["goal.optimize=[[1]]"], "it must be an objective"),
        (['goal.optimize=["step_time","goodput","tokens_per_s","memory_headroom"]'],
         "two or three different ones"),
        (["goal.limits.step_time=12"], 'is 12; it must be a time as text with its unit (ns, us'),
        (["goal.limits.step_time=0 s"], 'is "0 s"; it must be above 0'),
        (["goal.limits.tokens_per_s=0"], "is 0; it must be above 0"),
        (["goal.limits.dollars_per_mtoken=-1"], "it must be above 0"),
        (["goal.limits.joules_per_token=nan"], "it must be a finite number"),
        (["goal.limits.goodput=fast"], "it must be a number"),
        (["goal.limits.memory_headroom=0 B"], "it must be above 0"),
        (["goal.limits.memory_headroom=80 GiB"], '--set goal.limits.memory_headroom is "80.0 GiB"; '
         "it must be below the memory of h100-sxm (79.6 GiB); else nothing fits; lower it"),
        (["goal.limits.memory_headroom=81559 MiB"], "else nothing fits"),
        (["goal.limits.latency=3"], "no such key is known here"),
        (["goal=3"], "goal is 3; it must be a table"),
        (["goal.optimize=dollars_per_mtoken"], "job.toml: cluster.price_per_gpu_hour is missing; "
         "it must be given where the goal has dollars_per_mtoken; add what a GPU costs an hour"),
        (["goal.limits.dollars_per_mtoken=1"], "cluster.price_per_gpu_hour is missing"),
        (["cluster.price_per_gpu_hour=0"], "it must be above 0"),
        (["cluster.pue=0.9"], "cluster.pue is 0.9; it must be at least 1"),
        (["cluster.power_per_gpu=970"], "must be a power as text with its unit"),
        (["cluster.failures.per_gpu_day=-1"], "it must be at least 0"),
        (["cluster.failures.restart=10"], "must be a time as text"),
        (["cluster.failures.mtbf=10"], "no such key is known here"),
        (["cluster.failures.checkpoint_rate=1 GB/s", "cluster.failures.checkpoint_stall=1 s"],
         "cluster.failures.checkpoint_stall is given; it must be absent where a checkpoint_rate"),
    ],
)  # fmt: skip
def test_a_goal_that_cannot_hold_is_an_error(
    job_file: Path, overrides: list[str], words: str
) -> None:
    assert words in _problems(job_file, JOB, *overrides)


def test_a_machine_of_unknown_power_has_no_joules(job_file: Path) -> None:
    text = JOB.replace('preset = "h100-sxm"\nnodes = 4', 'preset = "local"\nranks = 2')
    message = _problems(job_file, text, "goal.optimize=joules_per_token")
    assert "cluster.power_per_gpu is missing; it must be given where the goal has joules" in message
    assert _read(job_file, text, "goal.optimize=joules_per_token", "cluster.power_per_gpu=40 W")


def test_all_problems_of_a_goal_are_told_at_once(job_file: Path) -> None:
    message = _problems(job_file, PRICED.replace("price_per_gpu_hour = 2.5\n", ""),
                        "goal.limits.memory_headroom=1 TiB")  # fmt: skip
    assert "cluster.price_per_gpu_hour is missing" in message
    assert "memory_headroom is" in message


@pytest.mark.parametrize(
    ("objectives", "limits"),
    [
        ((), {}),
        (("step_time", "step_time"), {}),
        (("speed",), {}),
        (OBJECTIVES[:4], {}),
        (("step_time",), {"speed": 1.0}),
        (("step_time",), {"goodput": 0.0}),
        (("step_time",), {"goodput": float("inf")}),
        (("step_time",), {"goodput": float("nan")}),
    ],
)
def test_a_goal_is_whole_when_made(objectives: tuple[str, ...], limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^goal"):
        Goal(objectives=objectives, limits=limits)


def test_every_objective_can_be_limited() -> None:
    assert tuple(LimitsTable.model_fields) == OBJECTIVES
    assert GoalTable().optimize == FASTEST.objectives
