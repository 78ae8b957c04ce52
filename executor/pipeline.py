"""The order of a step: the schedule on PyTorch's pipeline runtime, or a loop for one stage."""

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from executor.model import LlamaStage
from executor.recipe import Recipe
from executor.recorder import Recorder
from simulator.schedule import Action


class Runner(Protocol):
    """Runs the forwards and backwards of one step on this rank."""

    def run(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return this rank's part of the mean loss of the step, a scalar without graph.

        `tokens` and `targets` are ids [M * B, S] of all M micro-batches. Gradients are added to
        the parameters' `grad`; summed over the data-parallel axis they are those of the mean loss.
        """


def token_loss(logits: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
    """Return sum(cross-entropy) / `num_tokens` for logits [B, S, V] and targets [B, S], in fp32.

    With `num_tokens` the tokens of the whole global batch, the sum of this over micro-batches and
    data-parallel ranks is the mean loss, and so are the gradients: no layout scales anything.
    """
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return (loss.to_local() if isinstance(loss, DTensor) else loss) / num_tokens


def make_runner(
    recipe: Recipe, stage: LlamaStage, pp_index: int, group: ProcessGroup | None, recorder: Recorder
) -> Runner:
    """Return what runs `recipe` on this rank; `group` holds the ranks of one pipeline, if any."""
    if group is None:
        return LoopRunner(recipe, stage, recorder)
    return PipelineRunner(recipe, stage, pp_index, group, recorder)


def _sharded_loss(tp: int) -> AbstractContextManager[Any]:
    """Return the context in which a loss over sharded logits, and its backward, may run."""
    return loss_parallel() if tp > 1 else nullcontext()


class LoopRunner:
    """One stage: the actions of the schedule one after another."""

    def __init__(self, recipe: Recipe, stage: LlamaStage, recorder: Recorder) -> None:
        self._stage, self._recorder, self._layout = stage, recorder, recipe.layout
        self._num_tokens = recipe.workload.tokens_per_step
        self._actions: Sequence[Action] = recipe.schedule.ranks[0]

    def run(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return this rank's part of the loss (see `Runner`)."""
        recorder = self._recorder
        inputs = torch.split(tokens, self._layout.micro_batch)
        labels = torch.split(targets, self._layout.micro_batch)
        losses: dict[int, Tensor] = {}
        total = torch.zeros((), device=tokens.device)
        with _sharded_loss(self._layout.tp):
            for _, kind, index in self._actions:
                start = recorder.mark()
                if kind == "F":
                    logits = self._stage(inputs[index])
                    losses[index] = token_loss(logits, labels[index], self._num_tokens)
                    del logits  # backward frees it in time only if nobody else holds it
                    recorder.add("forward", start, 0, index)
                else:
                    loss = losses.pop(index)
                    loss.backward()  # type: ignore[no-untyped-call]
                    total += loss.detach()
                    recorder.add("backward", start, 0, index)
        return total


class _TimedStage(PipelineStage):
    """A pipeline stage that notes its forwards and backwards; waits for messages lie outside."""

    recorder: Recorder

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward; the first argument is the micro-batch."""
        start = self.recorder.mark()
        output = super().forward_one_chunk(*args, **kwargs)
        self.recorder.add("forward", start, self.stage_index, args[0])
        return output

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run one backward; the first argument is the micro-batch."""
        start = self.recorder.mark()
        super().backward_one_chunk(*args, **kwargs)
        self.recorder.add("backward", start, self.stage_index, args[0])


class PipelineRunner:
    """Several stages: PyTorch's pipeline runtime, fed with the text of the recipe's schedule."""

    def __init__(
        self,
        recipe: Recipe,
        stage: LlamaStage,
        pp_index: int,
        group: ProcessGroup,
        recorder: Recorder,
    ) -> None:
        self._layout, self._recorder = recipe.layout, recorder
        self._num_tokens = recipe.workload.tokens_per_step
        self._is_first, self._is_last = pp_index == 0, pp_index == recipe.layout.pp - 1
        timed = _timed_stage(recipe, stage, pp_index, group)
        timed.recorder = recorder
        self._runtime = _PipelineScheduleRuntime(  # type: ignore[no-untyped-call]
            [timed], recipe.layout.num_microbatches, loss_fn=self._loss, scale_grads=False
        )
        with tempfile.TemporaryDirectory(prefix="layline-schedule-") as folder:
            path = Path(folder, "schedule.csv")
            path.write_text(recipe.schedule.to_csv(), encoding="ascii")
            self._runtime._load_csv(str(path), format="compute_only")

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = token_loss(logits, targets, self._num_tokens)
        self._recorder.extend()  # the loss belongs to the forward that has just ended
        return loss

    def run(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return this rank's part of the loss, 0 before the last stage (see `Runner`)."""
        losses: list[Tensor] = []
        with _sharded_loss(self._layout.tp):
            self._runtime.step(
                *((tokens,) if self._is_first else ()),
                target=targets if self._is_last else None,
                losses=losses,
                return_outputs=False,
            )
        if not losses:
            return torch.zeros((), device=tokens.device)
        return torch.stack([loss.detach() for loss in losses]).sum()


def _timed_stage(
    recipe: Recipe, stage: LlamaStage, pp_index: int, group: ProcessGroup
) -> _TimedStage:
    """Return the pipeline stage with the shapes of its messages, which need not be exchanged."""
    model, layout = recipe.model, recipe.layout
    batch, seq_len = layout.micro_batch, recipe.workload.seq_len
    dtype = next(stage.parameters()).dtype
    hidden = torch.empty(
        batch, seq_len, model.hidden, dtype=dtype, device="meta", requires_grad=True
    )
    ids = torch.empty(batch, seq_len, dtype=torch.int64, device="meta")
    logits = torch.empty(
        batch, seq_len, model.vocab, dtype=dtype, device="meta", requires_grad=True
    )
    return _TimedStage(
        stage,
        pp_index,
        layout.pp,
        stage.cos.device,
        input_args=ids if pp_index == 0 else hidden,
        output_args=logits if pp_index == layout.pp - 1 else hidden,
        group=group,
    )
