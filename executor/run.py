"""Running plans from a parent process: checks first, then ranks, then their steps as they come."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from executor.job import RunJob, first_failure
from planner.layout import DEFAULT_ORDER
from planner.plan import Plan, save_plan
from planner.record import StepRecord, read_steps
from profiles.errors import InvalidInputError, UnsupportedError
from profiles.files import canonical_json, write_text

MIN_VOCAB = 256
RUNNABLE_DTYPES = ("fp32", "bf16")
"""Workload dtypes, by name; `executor.parallel` has those of PyTorch, and the parent does not."""
_POLL_S = 0.05

OnStep = Callable[[int, StepRecord], None]


def check_runnable(plan: Plan) -> None:
    """Raise UnsupportedError, by name, for what the executor cannot run.

    Raises InvalidInputError for a plan at odds with itself.
    """
    model, layout, work = plan.model, plan.layout, plan.workload
    if not model.is_llama_like:
        raise UnsupportedError(
            f"model {model.name}: norm {model.norm}, mlp {model.mlp}, positions {model.positions}: "
            "only LLaMA-like models can be run; it can still be simulated"
        )
    if model.tied_embeddings and layout.pp > 1:
        raise UnsupportedError(
            f"model {model.name}: tied_embeddings with layout.pp {layout.pp}: the first and the "
            "last stage would share a parameter; use pp = 1"
        )
    if model.vocab < MIN_VOCAB:
        raise UnsupportedError(
            f"model.vocab is {model.vocab}; text is read as bytes, which need at least {MIN_VOCAB}"
        )
    _check_supported(plan)
    for name in ("num_heads", "num_kv_heads", "ffn", "vocab"):
        if (count := getattr(model, name)) % layout.tp:
            raise UnsupportedError(
                f"layout.tp is {layout.tp}; it must divide model.{name} ({count}) to be run"
            )
    problems = []
    schedule = plan.parsed_schedule()
    found = (schedule.num_stages, schedule.num_ranks, schedule.num_microbatches)
    if found != (layout.num_stages, layout.pp, layout.num_microbatches):
        problems.append(
            f"plan: the schedule has {found[0]} stages, {found[1]} pipeline ranks and {found[2]} "
            f"micro-batches, which is not layout {layout}; plan again"
        )
    if sum(layout.stage_layers) != model.num_layers:
        problems.append(
            f"plan: layout.stage_layers is {layout.stage_layers}; "
            f"it must sum to model.num_layers ({model.num_layers}); plan again"
        )
    if layout.global_batch != work.global_batch:
        problems.append(
            f"plan: layout {layout} makes {layout.global_batch} sequences a step; "
            f"it must make workload.global_batch ({work.global_batch}); plan again"
        )
    if layout.num_ranks > plan.cluster.num_ranks:
        problems.append(
            f"plan: layout {layout} needs {layout.num_ranks} ranks; "
            f"cluster {plan.cluster.name} has {plan.cluster.num_ranks}; plan again"
        )
    if problems:
        raise InvalidInputError(problems)
    _check_schedule(plan)


def _check_supported(plan: Plan) -> None:
    """Raise UnsupportedError for an axis, a saving of memory or a dtype that no rank knows."""
    for name, neutral in (("cp", 1), ("ep", 1), ("sequence_parallel", False),
                          ("sharding", "none"), ("recompute", "none"),
                          ("order", DEFAULT_ORDER)):  # fmt: skip
        if (value := getattr(plan.layout, name)) != neutral:
            raise UnsupportedError(
                f"layout.{name} is {value}; the executor knows {name} {neutral} alone: plan for "
                'its own stack, with stack.preset = "layline-nccl", or "layline-gloo" on CPU ranks'
            )
    if plan.workload.dtype not in RUNNABLE_DTYPES:
        raise UnsupportedError(
            f"workload.dtype is {plan.workload.dtype}; the executor computes in "
            f"{' and '.join(RUNNABLE_DTYPES)} alone: set one of them and plan again"
        )


def _check_schedule(plan: Plan) -> None:
    """Raise UnsupportedError for an order of actions that PyTorch's pipeline runtime cannot run."""
    schedule, layout = plan.parsed_schedule(), plan.layout
    if layout.pp == 1 and schedule.num_stages > 1:
        raise UnsupportedError(
            f"schedule {schedule.name}: {schedule.num_stages} stages on the only pipeline rank; "
            "with layout.pp 1 one stage can be run"
        )
    last = schedule.num_stages - 1
    actions = schedule.ranks[schedule.homes[last]]
    entered = [action.microbatch for action in actions if action[:2] == (last, "F")]
    if entered != sorted(entered):
        raise UnsupportedError(
            f"schedule {schedule.name}: forwards of stage {last}, the last one, are out of order; "
            "micro-batches must enter it as 0, 1, 2, ..."
        )


def run_plans(
    plans: Sequence[Plan],
    directories: Sequence[Path],
    data: Path | None,
    num_steps: int,
    reference_ns: int = 0,
    on_step: OnStep | None = None,
    worker: str = "executor.worker",
) -> None:
    """Run `plans`, all of one number of ranks, one after another in one launch of local ranks.

    Plan i is recorded in `directories[i]`, which must be new or empty; its `record.json` is there
    when the run is whole. `data` is a text file, a folder of them, or None for the standard
    library's sources. `on_step` is called with the plan's index and each step as it comes.
    `worker` is the module of a rank.

    Raises UnsupportedError and InvalidInputError before anything is started or written, and
    RanksFailedError when a rank fails. An interrupt ends the ranks.
    """
    _check_run(plans, directories, data, num_steps)
    for plan, directory in zip(plans, directories, strict=True):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InvalidInputError(
                [f"{directory}: cannot be made ({reason}); name a new folder with -o"]
            ) from None
        save_plan(plan, directory / "plan.json")
    job = RunJob(
        directories=tuple(str(directory.resolve()) for directory in directories),
        data=str(data.resolve()) if data else "",
        num_steps=num_steps,
        reference_ns=reference_ns,
    )
    with tempfile.TemporaryDirectory(prefix="layline-run-") as folder:
        path = Path(folder, "job.json")
        write_text(path, canonical_json(job))
        _launch(path, plans[0].layout.num_ranks, worker, _Follower(directories, on_step))


def _launch(job: Path, num_ranks: int, worker: str, follower: "_Follower") -> None:
    """Start the ranks on `job`, follow their steps, and wait for them."""
    # This imports torch, which takes a second, and is only needed here.
    from profiles.measure.ranks import RanksFailedError, launched

    try:
        with launched(worker, [str(job)], num_ranks) as ranks:
            while ranks.poll() is None:
                follower.follow()
                time.sleep(_POLL_S)
    except RanksFailedError as error:
        if "was killed" not in str(error) and (cause := first_failure(job, num_ranks)):
            raise RanksFailedError(cause) from error
        raise
    follower.follow()


def _check_run(
    plans: Sequence[Plan], directories: Sequence[Path], data: Path | None, num_steps: int
) -> None:
    from executor.data import check_stream, load_stream

    if not plans or len(plans) != len(directories):
        raise ValueError(f"{len(plans)} plans for {len(directories)} directories")
    if len({plan.layout.num_ranks for plan in plans}) > 1:
        raise ValueError("plans of one launch must have one number of ranks")
    if num_steps < 1:
        raise InvalidInputError([f"--steps is {num_steps}; it must be at least 1"])
    stream = load_stream(data)
    for plan in plans:
        check_runnable(plan)
        check_stream(stream, plan.model.vocab, plan.workload.seq_len)
    problems = []
    for directory in directories:
        if directory.exists() and not directory.is_dir():
            problems.append(f"{directory}: is a file; name a new or empty folder with -o")
        elif directory.exists() and any(directory.iterdir()):
            problems.append(
                f"{directory}: is not empty, and nothing is overwritten; name a new folder with -o"
            )
    if len({directory.resolve() for directory in directories}) < len(directories):
        problems.append("one folder is named for two plans; each needs its own")
    if problems:
        raise InvalidInputError(problems)


class _Follower:
    """Reads the step logs of the plans in turn and passes every new line on."""

    def __init__(self, directories: Sequence[Path], on_step: OnStep | None) -> None:
        self._directories, self._on_step = directories, on_step
        self._index = self._read_bytes = 0

    def follow(self) -> None:
        """Pass on what has come since the last call."""
        if self._on_step is None:
            return
        while self._index < len(self._directories):
            directory = self._directories[self._index]
            is_whole = (directory / "record.json").exists()  # looked at first: the log is then too
            lines, self._read_bytes = read_steps(directory, self._read_bytes)
            for line in lines:
                self._on_step(self._index, _step_record(line))
            if not is_whole:
                return
            self._index, self._read_bytes = self._index + 1, 0


def _step_record(line: str) -> StepRecord:
    import json

    return StepRecord(**json.loads(line))
