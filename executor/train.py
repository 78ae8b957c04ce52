"""The training loop of one rank: steps, their times, loss, memory, and the record of the run."""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from executor.data import SampleOrder, TokenStream, check_stream, sample_numbers
from executor.memory import MemoryMeter
from executor.model import LlamaStage
from executor.parallel import DTYPES, axis_group, bucket_gradients, build_stages, make_mesh
from executor.pipeline import make_runner
from executor.recipe import Recipe, recipe_of
from executor.recorder import KINDS, Piece, Recorder, StepTrace
from executor.shards import local
from planner.plan import Plan
from planner.record import RECORD_SCHEMA_VERSION, RankMemory, RunRecord, StepRecord
from profiles.files import canonical_json, plain, write_text
from simulator.schedule import KINDS as ACTION_KINDS
from simulator.schedule import Action, decode, encode
from simulator.timeline import Timeline

MAX_WARMUP_STEPS = 5
MAX_TRACED_STEPS = 3
"""The last steps start together, behind a barrier; the one of median length is the timeline."""

GradientHook = Callable[[Sequence[LlamaStage]], None]


class Trainer:
    """The state of one rank: its stages, optimizer, share of the data, the schedule it runs.

    What a step does is noted in `recorder`. Data, forward, backward and optimizer are noted as
    they are. `all_reduce` is what remains of the data-parallel reduction after the last backward,
    waiting for slower members included: all of it where the stack does not overlap, the exposed
    rest where it does. Tensor-parallel collectives are part of forward and backward. Waiting for
    a message of another stage is a gap.
    """

    def __init__(
        self,
        recipe: Recipe,
        stream: TokenStream,
        device: torch.device,
        rank: int,
        clock: Callable[[], int] = time.perf_counter_ns,
        allocating: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        check_stream(stream, recipe.model.vocab, recipe.workload.seq_len)
        self.recipe, self.device = recipe, device
        self.place = recipe.layout.place(rank)
        self.recorder = Recorder(device, clock)
        self.mesh = make_mesh(recipe.layout, device)
        stages = build_stages(recipe, self.place.pp, self.mesh)
        self.stages = tuple(stages.values())
        with allocating():
            self._allocate(stages, stream)

    def _allocate(self, stages: Mapping[int, LlamaStage], stream: TokenStream) -> None:
        """Make everything that takes memory on the device."""
        recipe, work = self.recipe, self.recipe.workload
        for stage in self.stages:
            stage.materialise(recipe.seed, work.seq_len, self.device, DTYPES[work.dtype])
        self._buckets = bucket_gradients(recipe, self.stages, self.mesh)
        self._runner = make_runner(recipe, stages, axis_group(self.mesh, "pp"), self.recorder)
        self._order = SampleOrder(stream, work.seq_len, recipe.seed)
        self._parameters = [p for stage in self.stages for p in stage.parameters()]
        # The optimizer sees the plain shards: its update is element-wise, and DTensor's dispatch
        # would cost more than the update of a small one.
        self._shards = [nn.Parameter(local(parameter).detach()) for parameter in self._parameters]
        self.optimizer = torch.optim.AdamW(
            self._shards,
            lr=work.learning_rate,
            betas=(work.beta1, work.beta2),
            weight_decay=work.weight_decay,
            fused=True,
        )

    def step(self, step: int, on_gradients: GradientHook | None = None) -> Tensor:
        """Do optimizer step `step`; return this rank's part of its mean loss, a scalar."""
        recorder = self.recorder
        start = recorder.mark()
        tokens, targets = self._batch(step)
        recorder.add("data", start)
        loss = self._runner.run(tokens, targets)
        if self._buckets is not None:
            start = recorder.mark()
            self._buckets.reduce()
            recorder.add("all_reduce", start)
        if on_gradients is not None:
            on_gradients(self.stages)
        start = recorder.mark()
        self.update()
        recorder.add("optimizer", start)
        # Tensor-parallel ranks all hold the whole loss; the first one speaks for them.
        return loss if self.place.tp == 0 else torch.zeros_like(loss)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets [M * B, S] of this rank."""
        numbers = sample_numbers(self.recipe.layout, step, self.place.dp)
        windows = torch.from_numpy(self._order.windows(numbers)).to(self.device)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def update(self) -> None:
        """Let the optimizer take the gradients in; they are gone, or zero, afterwards."""
        for parameter, shard in zip(self._parameters, self._shards, strict=True):
            assert parameter.grad is not None
            shard.grad = local(parameter.grad)
        self.optimizer.step()
        if self._buckets is not None:
            self._buckets.zero()
            return
        for parameter, shard in zip(self._parameters, self._shards, strict=True):
            parameter.grad = shard.grad = None


@dataclass(slots=True)
class Measured:
    """What a rank collects while it runs: by step, and the traces of the last few."""

    losses: list[float] = field(default_factory=list)
    step_ns: list[int] = field(default_factory=list)
    kind_ns: list[list[int]] = field(default_factory=list)
    traces: list[StepTrace] = field(default_factory=list)


class PendingLoss:
    """The loss of a step on its way over the ranks; it is read one step later, so nobody waits."""

    def __init__(self, part: Tensor) -> None:
        self._loss = part.clone()
        self._work = dist.all_reduce(self._loss, async_op=True) if _num_ranks() > 1 else None

    def read(self, step: int) -> float:
        """Return the mean loss; raises ValueError when training has diverged."""
        if self._work is not None:
            self._work.wait()
        loss = self._loss.item()
        if not np.isfinite(loss):
            raise ValueError(f"the loss of step {step} is {loss}; lower workload.learning_rate")
        return loss


def train(
    plan: Plan,
    directory: Path,
    stream: TokenStream,
    num_steps: int,
    device: torch.device,
    reference: Callable[[], float] = lambda: 1.0,
    on_gradients: GradientHook | None = None,
) -> None:
    """Train `plan` for `num_steps` on the joined ranks, as this rank, and record it.

    Rank 0 writes `steps.jsonl` in `directory` as the run goes, a step late and with its own times,
    and `record.json` at the end, with those of the slowest rank. `reference` returns the slowdown
    of this machine now; it is asked before and after. `on_gradients` is called with the stages in
    the first step, when the gradients are complete.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    slowdowns = [_together(reference, device)]
    meter = MemoryMeter(device)
    trainer = Trainer(recipe_of(plan), stream, device, _rank())
    with _step_log(directory) as log, _frozen_garbage():
        measured = run_steps(trainer, num_steps, log, on_gradients)
    memory = meter.read()
    slowdowns.append(_together(reference, device))
    step_ns, kind_ns, memories, timeline = _gather(measured, memory, num_steps, device)
    if _rank() != 0:
        return
    tokens = plan.workload.tokens_per_step
    num_warmup = num_warmup_steps(num_steps)
    p10, median, p90 = np.percentile(step_ns[num_warmup:], (10, 50, 90))
    record = RunRecord(
        schema_version=RECORD_SCHEMA_VERSION,
        plan_digest=plan.plan_digest,
        started_at=started_at,
        versions=_versions(device),
        data=stream.name,
        data_digest=stream.digest(),
        num_warmup=num_warmup,
        steps=tuple(
            StepRecord(step=step, loss=loss, step_ns=time_ns, tokens=tokens)
            for step, (loss, time_ns) in enumerate(zip(measured.losses, step_ns, strict=True))
        ),
        median_step_ns=round(median),
        p10_step_ns=round(p10),
        p90_step_ns=round(p90),
        memory=memories,
        timeline=timeline,
        kind_ns=kind_ns,
        machine_slowdown=statistics.mean(slowdowns),
    )
    write_text(directory / "record.json", canonical_json(record))


def num_warmup_steps(num_steps: int) -> int:
    """Return how many of `num_steps` are left out of the medians."""
    return min(MAX_WARMUP_STEPS, num_steps // 4)


def num_traced_steps(num_steps: int) -> int:
    """Return how many of the last steps may become the timeline."""
    return min(MAX_TRACED_STEPS, num_steps - num_warmup_steps(num_steps))


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Keep what exists now out of garbage collection, which would stop a step to walk over it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _step_log(directory: Path) -> AbstractContextManager[TextIO | None]:
    if _rank() != 0:
        return nullcontext()
    return (directory / "steps.jsonl").open("x", encoding="utf-8")


def _together(reference: Callable[[], float], device: torch.device) -> float:
    """Return the median over ranks of `reference`, which all ranks measure at once."""
    _barrier(device)
    parts_per_million = np.array([round(1e6 * reference())])
    return float(np.median(_all_gather(parts_per_million, device))) / 1e6


def run_steps(
    trainer: Trainer,
    num_steps: int,
    log: TextIO | None = None,
    on_gradients: GradientHook | None = None,
) -> Measured:
    """Run `num_steps` steps from step 0 of the data; a line a step goes to `log`."""
    measured = Measured()
    recorder = trainer.recorder
    first_traced = num_steps - num_traced_steps(num_steps)
    pending: PendingLoss | None = None
    _barrier(trainer.device)
    recorder.begin()
    for step in range(num_steps):
        if step >= first_traced:
            _barrier(trainer.device)
            recorder.begin()
        part = trainer.step(step, on_gradients if step == 0 else None)
        start = recorder.mark()
        if pending is not None:
            _note(measured, trainer, pending, log)
        pending = PendingLoss(part)
        recorder.add("other", start)
        recorder.end()
    assert pending is not None
    _note(measured, trainer, pending, log)
    return measured


def _note(measured: Measured, trainer: Trainer, pending: PendingLoss, log: TextIO | None) -> None:
    """Take down the last step that has ended."""
    step = len(measured.losses)
    trace = trainer.recorder.trace()
    measured.losses.append(pending.read(step))
    measured.step_ns.append(trace.step_ns)
    kinds = trace.kind_ns()
    measured.kind_ns.append([kinds[kind] for kind in KINDS])
    measured.traces = [*measured.traces[-(MAX_TRACED_STEPS - 1) :], trace]
    if log is not None:
        record = StepRecord(
            step=step,
            loss=measured.losses[-1],
            step_ns=trace.step_ns,
            tokens=trainer.recipe.workload.tokens_per_step,
        )
        log.write(json.dumps(plain(record), sort_keys=True) + "\n")
        log.flush()


def _gather(
    measured: Measured, memory: RankMemory, num_steps: int, device: torch.device
) -> tuple[list[int], tuple[Mapping[str, int], ...], tuple[RankMemory, ...], Timeline]:
    """Return what all ranks measured: steps of the slowest one, medians, memory, a timeline."""
    steps = _all_gather(np.array(measured.step_ns), device).max(axis=0)
    timed = np.array(measured.kind_ns)[num_warmup_steps(num_steps) :]
    kinds = _all_gather(np.median(timed, axis=0).round().astype(np.int64), device)
    memories = _all_gather(np.array([memory.context_bytes, memory.peak_bytes]), device)
    num_traced = num_traced_steps(num_steps)
    chosen = int(np.argsort(steps[-num_traced:], kind="stable")[num_traced // 2])
    timeline = _timeline(measured.traces[-num_traced:][chosen], memories[:, 1], device)
    return (
        [int(value) for value in steps],
        tuple(
            {kind: int(value) for kind, value in zip(KINDS, row, strict=True) if value}
            for row in kinds
        ),
        tuple(RankMemory(context_bytes=int(a), peak_bytes=int(b)) for a, b in memories),
        timeline,
    )


def _timeline(trace: StepTrace, peaks: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
              device: torch.device) -> Timeline:  # fmt: skip
    """Return the spans of all ranks in the traced step, from the start of the first rank."""
    rows = [
        (KINDS.index(piece.kind), _packed(piece.action), piece.start_ns, piece.end_ns)
        for piece in trace.pieces
    ]
    heads = _all_gather(np.array([trace.start_ns, len(rows)]), device)
    table = np.zeros((int(heads[:, 1].max()), 4), dtype=np.int64)
    table[: len(rows)] = rows
    spans = [
        Piece(kind=KINDS[kind], action=_unpacked(code), start_ns=start, end_ns=end).span(
            rank, int(heads[rank, 0] - heads[:, 0].min())
        )
        for rank, part in enumerate(_all_gather(table, device).tolist())
        for kind, code, start, end in part[: heads[rank, 1]]
    ]
    spans.sort(key=lambda span: (span.start_ns, span.rank, span.end_ns))
    return Timeline(
        source="measured",
        spans=tuple(spans),
        peak_bytes={rank: int(peak) for rank, peak in enumerate(peaks)},
    )


def _packed(action: Action | None) -> int:
    """Return the action as one number, -1 for none."""
    if action is None:
        return -1
    return int(encode(ACTION_KINDS.index(action.kind), action.stage, action.microbatch))


def _unpacked(code: int) -> Action | None:
    return None if code < 0 else decode(np.array([code]))[0]


def _all_gather(
    values: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", device: torch.device
) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    """Return the `values` of every rank, stacked [R, ...]; all have one shape."""
    mine = torch.from_numpy(values).to(device)
    if _num_ranks() == 1:
        return values[None]
    parts = [torch.empty_like(mine) for _ in range(_num_ranks())]
    dist.all_gather(parts, mine)
    return torch.stack(parts).cpu().numpy()


def _barrier(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if _num_ranks() > 1:
        dist.barrier()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _versions(device: torch.device) -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": "gloo" if device.type == "cpu" else "nccl",
        "kernel": os.uname().release,
    }
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return versions
