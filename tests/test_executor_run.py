import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from executor.run import check_runnable, run_plans
from planner.lower import simulate_plan
from planner.plan import Plan, save_plan
from planner.record import RunRecord, StepRecord, load_run
from profiles.errors import InvalidInputError, UnsupportedError
from profiles.measure.ranks import RanksFailedError
from profiles.workload import Workload
from reports.compare import compare
from tests.plans import TINY, tiny_cluster, tiny_layout, tiny_plan

ROOT = Path(__file__).parent.parent
GPT = replace(TINY, norm="layernorm", mlp="gelu", positions="learned", has_biases=True)
UNSUPPORTED = {
    "layernorm": tiny_plan(model=GPT),
    "tied_embeddings": tiny_plan(tiny_layout(pp=2), replace(TINY, tied_embeddings=True)),
    "vocab is 255": tiny_plan(model=replace(TINY, vocab=255)),
    "num_kv_heads": tiny_plan(tiny_layout(tp=4)),
    "model.ffn": tiny_plan(tiny_layout(tp=2), replace(TINY, ffn=129)),
    "with layout.pp 1 one stage": tiny_plan(tiny_layout(schedule="zb_v", stages_per_rank=2)),
    "out of order": tiny_plan(schedule=("0F1 0F0 0B0 0B1" + "".join(
        f" 0F{i} 0B{i}" for i in range(2, 8)),)),
    "layout.sharding is zero1": tiny_plan(replace(tiny_layout(dp=2), sharding="zero1")),
    "layout.recompute is full": tiny_plan(replace(tiny_layout(), recompute="full")),
    "layout.sequence_parallel is True": tiny_plan(replace(tiny_layout(tp=2),
                                                          sequence_parallel=True)),
    "layout.cp is 2": tiny_plan(replace(tiny_layout(), cp=2)),
    "layout.ep is 2": tiny_plan(replace(tiny_layout(dp=2), ep=2)),
    "workload.dtype is fp16": tiny_plan(workload=Workload(seq_len=32, global_batch=8,
                                                          dtype="fp16")),
}  # fmt: skip
INVALID = {
    "stage_layers": tiny_plan(model=replace(TINY, num_layers=5)),
    "global_batch": tiny_plan(workload=Workload(seq_len=32, global_batch=9)),
    "has 1 stages, 1 pipeline ranks and 1 micro-batches": tiny_plan(schedule=("0F0 0B0",)),
    "needs 4 ranks": tiny_plan(tiny_layout(dp=4), cluster=tiny_cluster(2)),
}


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_what_cannot_be_run_is_named(words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        check_runnable(UNSUPPORTED[words])


@pytest.mark.parametrize("words", INVALID)
def test_a_plan_at_odds_with_itself_is_invalid(words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        check_runnable(INVALID[words])


def test_nothing_is_overwritten_and_nothing_is_written_before_the_checks(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    plan = tiny_plan()
    with pytest.raises(InvalidInputError, match=r"full: is not empty.*name a new folder"):
        run_plans([plan, plan], [tmp_path / "new", tmp_path / "full"], None, 2)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InvalidInputError, match="each needs its own"):
        run_plans([plan, plan], [tmp_path / "new"] * 2, None, 2)
    with pytest.raises(InvalidInputError, match="--steps is 0"):
        run_plans([plan], [tmp_path / "new"], None, 0)


def test_importing_the_parent_does_not_import_torch() -> None:
    code = "import sys, executor.run; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def listening(process: psutil.Process) -> set[str]:
    """Return the addresses on which `process` and its children listen."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            connections = one.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        found |= {item.laddr.ip for item in connections if item.status == psutil.CONN_LISTEN}
    return found


NUM_STEPS = 8
PLANS = (
    tiny_plan(tiny_layout(dp=2)),
    tiny_plan(tiny_layout(pp=2, global_batch=4)),
    tiny_plan(tiny_layout(pp=2, schedule="zb_v", stages_per_rank=2, global_batch=4)),
)


class Runs(NamedTuple):
    """What a series of the plans `PLANS` in one launch left behind."""

    records: list[RunRecord]
    steps: list[tuple[int, StepRecord]]
    addresses: set[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    steps: list[tuple[int, StepRecord]] = []
    addresses: set[str] = set()

    def on_step(index: int, step: StepRecord) -> None:
        steps.append((index, step))
        addresses.update(listening(psutil.Process()))

    folder = tmp_path_factory.mktemp("runs")
    directories = [folder / str(index) for index in range(len(PLANS))]
    run_plans(PLANS, directories, None, NUM_STEPS, reference_ns=1_000_000, on_step=on_step)
    read = [load_run(directory) for directory in directories]
    assert tuple(plan for plan, _ in read) == PLANS
    return Runs([record for _, record in read], steps, addresses)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timed
def test_ranks_listen_on_loopback_only(runs: Runs) -> None:
    assert runs.addresses and runs.addresses <= {"127.0.0.1", "::1"}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timed
@pytest.mark.parametrize("index", range(len(PLANS)))
def test_a_record_is_whole(runs: Runs, index: int) -> None:
    record, plan = runs.records[index], PLANS[index]
    followed = [step for number, step in runs.steps if number == index]
    assert [step.step for step in followed] == list(range(NUM_STEPS))
    assert [step.loss for step in followed] == [step.loss for step in record.steps]
    assert record.num_warmup == 2
    assert record.p10_step_ns <= record.median_step_ns <= record.p90_step_ns
    assert len(record.memory) == plan.layout.num_ranks
    assert all(0 < memory.context_bytes < memory.peak_bytes for memory in record.memory)
    assert record.machine_slowdown > 0


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timed
@pytest.mark.parametrize("index", range(len(PLANS)))
def test_a_timeline_holds_the_actions_of_the_schedule(runs: Runs, index: int) -> None:
    record, plan = runs.records[index], PLANS[index]
    schedule = plan.parsed_schedule()
    for rank in range(plan.layout.num_ranks):
        spans = [span for span in record.timeline.spans if span.rank == rank]
        done = [span.name for span in spans if span.kind in ("forward", "backward")]
        assert done == [str(action) for action in schedule.ranks[plan.layout.place(rank).pp]]
        assert all(a.end_ns <= b.start_ns for a, b in pairwise(spans))
        kinds = {"forward", "backward", "optimizer", "data", "other"}
        assert record.kind_ns[rank].keys() == kinds | ({"all_reduce"} if index == 0 else set())
    assert record.timeline.makespan_ns < 2 * max(step.step_ns for step in record.steps)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timed
@pytest.mark.parametrize("index", range(len(PLANS)))
def test_a_run_can_be_laid_over_its_prediction(runs: Runs, index: int) -> None:
    record, plan = runs.records[index], PLANS[index]
    predicted = simulate_plan(plan)
    for found in compare(plan, record, predicted).ranks:
        pipeline_rank = plan.layout.place(found.rank).pp
        assert found.stages == plan.stages_of(pipeline_rank)
        measured = {span.name for span in record.timeline.spans if span.rank == found.rank}
        actions = {str(action) for action in plan.parsed_schedule().ranks[pipeline_rank]}
        assert actions <= measured
        assert actions <= {span.name for span in predicted.spans if span.rank == pipeline_rank}


def failing_plan() -> Plan:
    work = Workload(seq_len=32, global_batch=8, learning_rate=1e30)
    return tiny_plan(tiny_layout(dp=2), workload=work)


@pytest.mark.slow
@pytest.mark.dist
def test_a_failing_rank_is_a_clean_error_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_plans([failing_plan()], [tmp_path / "run"], None, 8)
    assert "ValueError: the loss of step" in str(caught.value).splitlines()[0]
    assert "lower workload.learning_rate" in str(caught.value)
    assert not (tmp_path / "run" / "record.json").exists()
    with pytest.raises(InvalidInputError, match="has not finished"):
        load_run(tmp_path / "run")


@pytest.mark.dist
@pytest.mark.slow
def test_an_interrupt_ends_the_ranks(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from executor.run import run_plans
        from tests.plans import tiny_layout, tiny_plan
        run_plans([tiny_plan(tiny_layout(dp=2))], [Path({str(tmp_path / "run")!r})], None, 10**6)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = tmp_path / "run" / "steps.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert parent.poll() is None
        time.sleep(0.1)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 3
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=30)
    assert errors.strip().endswith("KeyboardInterrupt")
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert not (tmp_path / "run" / "record.json").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_a_command_that_is_told_to_end_says_what_is_kept(tmp_path: Path) -> None:
    """Both signals that interrupt are tried where nothing runs; here the one without a terminal."""
    save_plan(tiny_plan(tiny_layout(dp=2)), tmp_path / "plan.json")
    command = ["run", str(tmp_path / "plan.json"), "--steps", "100000", "-o", str(tmp_path / "run")]
    parent = subprocess.Popen(
        [sys.executable, "-m", "layline", *command],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "run" / "steps.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert parent.poll() is None
        time.sleep(0.1)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGTERM)  # to the process alone, not to its group
    printed, errors = parent.communicate(timeout=30)
    assert parent.returncode == 6
    assert printed == ""
    assert errors.startswith("layline: interrupted: ")
    assert f"of 100000 steps are in {log}, and there is no record" in errors
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert not (tmp_path / "run" / "record.json").exists()
