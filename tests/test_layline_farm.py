"""Farms: one contract that all of them keep, the processes here, and clusters where they are.

Dask and Ray are no dependencies; their tests run where the libraries are installed, each against a
real cluster on loopback.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from layline.farm import Farm, Lost, ProcessFarm, WorkerError, farm_named
from layline.farm_clusters import DaskFarm
from profiles.errors import InvalidInputError, UnsupportedError
from tests import farm_work

ROOT = Path(__file__).parent.parent


@contextmanager
def processes() -> Iterator[str]:
    yield "processes"


@contextmanager
def dask() -> Iterator[str]:
    """A Dask cluster of two workers on loopback."""
    distributed = pytest.importorskip("distributed")
    once = {"distributed.scheduler.allowed-failures": 0}
    with (
        import_module("dask").config.set(once),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        ) as cluster,
    ):
        yield f"dask={cluster.scheduler_address}"


@contextmanager
def ray() -> Iterator[str]:
    """A Ray cluster of two cores on loopback."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster  # type: ignore[import-not-found, unused-ignore]

    # Ray takes 127.0.0.1 for a name of the address that others reach this machine by.
    head = {"num_cpus": 2, "include_dashboard": False, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield f"ray={cluster.address}"
    finally:
        cluster.shutdown()


@pytest.fixture(
    scope="module",
    params=[
        processes,
        # What the libraries themselves warn of is theirs.
        pytest.param(dask, marks=pytest.mark.filterwarnings("ignore")),
        pytest.param(ray, marks=[pytest.mark.filterwarnings("ignore"), pytest.mark.slow]),
    ],
    ids=["processes", "dask", "ray"],
)
def farm(request: pytest.FixtureRequest) -> Iterator[Farm]:
    with request.param() as name:
        yield farm_named(name, 2)


def test_every_task_is_done_once_whichever_is_first(farm: Farm) -> None:
    tasks = ["0.5", "0.0", "0.1", "0.0", "0.05"]
    assert sorted(farm.map(farm_work.nap, tasks)) == list(enumerate(tasks))


def test_no_tasks(farm: Farm) -> None:
    assert list(farm.map(farm_work.shout, [])) == []


def test_any_text_crosses(farm: Farm) -> None:
    tasks = ["", "!", "?", "+", "zwei Wörter\n\0", "long" * 500_000]
    assert dict(farm.map(farm_work.shout, tasks)) == {
        place: task.upper() for place, task in enumerate(tasks)
    }


def test_an_exception_comes_with_its_trace(farm: Farm) -> None:
    with pytest.raises(WorkerError, match="cannot do sums") as told:
        list(farm.map(farm_work.fail, ["sums"]))
    assert "farm_work.py" in str(told.value)


def test_who_finds_no_memory_is_lost_alone(farm: Farm) -> None:
    assert [outcome for _, outcome in farm.map(farm_work.no_memory, ["", ""])] == [
        Lost(reason="its process found no more memory")
    ] * 2


def test_a_killed_worker_takes_its_own_task_alone(farm: Farm) -> None:
    done = dict(farm.map(farm_work.die_of, ["a", "kill", "b", "c"]))
    assert isinstance(done.pop(1), Lost)
    assert done == {0: "a", 2: "b", 3: "c"}


def test_workers_are_held_to_one_thread(farm: Farm) -> None:
    assert [json.loads(str(told)) for _, told in farm.map(farm_work.threads, [""])] == [
        {"OMP_NUM_THREADS": "1"}
    ]


def test_what_is_left_can_be_dropped(farm: Farm) -> None:
    started = time.monotonic()
    with closing(farm.map(farm_work.nap, ["0", "600", "600"])) as arriving:
        assert next(arriving) == (0, "0")
    assert time.monotonic() - started < 60


def test_what_is_done_is_told_at_once() -> None:
    done = ProcessFarm(num_jobs=2).map(farm_work.nap, ["2", "0", "0"])
    assert [place for place, _ in done] == [1, 2, 0]


def test_who_was_killed_among_others_is_tried_alone(tmp_path: Path) -> None:
    markers = [str(tmp_path / "first"), str(tmp_path / "second")]
    done = dict(ProcessFarm(num_jobs=2).map(farm_work.die_once, markers))
    assert done == {0: "alive", 1: "alive"}


def test_how_a_process_ended_is_told() -> None:
    done = ProcessFarm(num_jobs=1).map(farm_work.die_of, ["kill"])
    reason = "its process was killed by SIGKILL; the machine may lack memory"
    assert list(done) == [(0, Lost(reason=reason))]


def test_a_process_does_several_tasks_and_then_ends() -> None:
    pids = [int(str(told)) for _, told in ProcessFarm(num_jobs=2).map(farm_work.pid, ["0.1"] * 6)]
    assert len(set(pids)) == 2
    assert os.getpid() not in pids
    assert not any(psutil.pid_exists(each) for each in pids)


def test_the_environment_is_as_it_was() -> None:
    before = dict(os.environ)
    list(ProcessFarm(num_jobs=1).map(farm_work.shout, ["a"]))
    assert dict(os.environ) == before


def test_workers_end_with_a_program_that_was_killed() -> None:
    code = (
        "from layline.farm import ProcessFarm\n"
        "from tests import farm_work\n"
        "for _, told in ProcessFarm(num_jobs=2).map(farm_work.pid, ['0', '0', '600', '600']):\n"
        "    print(told, flush=True)\n"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert program.stdout is not None
    with program.stdout:
        pids = {int(program.stdout.readline()) for _ in range(2)}
        program.kill()
        program.wait()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["slurm", "processes=4", "dask=", "ray=", "=x"])
def test_a_farm_that_there_is_not(name: str) -> None:
    with pytest.raises(InvalidInputError, match="it must be processes, dask, dask=ADDRESS, ray"):
        farm_named(name)


@pytest.mark.parametrize(("name", "library"), [("dask", "distributed"), ("ray", "ray")])
def test_a_library_that_is_not_installed(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UnsupportedError, match=f"install it with: pip install {library}"):
        list(farm_named(f"{name}=127.0.0.1:1").map(farm_work.shout, ["a"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dask", "ray"])
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1:99999", "nonsense"])
def test_nobody_answers(name: str, address: str) -> None:
    if find_spec("distributed" if name == "dask" else name) is None:
        pytest.skip(f"{name} is not installed")
    with pytest.raises(UnsupportedError, match=f"can be used at {address}"):
        list(farm_named(f"{name}={address}").map(farm_work.shout, ["a"]))


@pytest.mark.filterwarnings("ignore")
def test_no_cluster_is_started_where_dask_knows_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    with pytest.raises(UnsupportedError, match="or set DASK_SCHEDULER_ADDRESS"):
        list(DaskFarm(address="", num_jobs=0).map(farm_work.shout, ["a"]))
