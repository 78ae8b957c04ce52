"""The order of a step: the schedule on PyTorch's pipeline runtime, or a loop for one stage."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, Work
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_send_recv,
    _batch_p2p,
    _PipelineScheduleRuntime,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from executor.model import LlamaStage
from executor.recipe import Recipe
from executor.recorder import Recorder
from simulator.schedule import Action, ActionKind, Schedule


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
    recipe: Recipe,
    stages: Mapping[int, LlamaStage],
    group: ProcessGroup | None,
    recorder: Recorder,
) -> Runner:
    """Return what runs `recipe` on this rank, which has `stages`.

    `group` holds the ranks of one pipeline, if there are several.
    """
    if group is None:
        return LoopRunner(recipe, stages[0], recorder)
    return PipelineRunner(recipe, stages, group, recorder)


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
        weight_halves: dict[int, Callable[[], None]] = {}
        total = torch.zeros((), device=tokens.device)
        with _sharded_loss(self._layout.tp):
            for action in self._actions:
                index, start = action.microbatch, recorder.mark()
                if action.kind == "F":
                    logits = self._stage(inputs[index])
                    losses[index] = token_loss(logits, labels[index], self._num_tokens)
                    del logits  # backward frees it in time only if nobody else holds it
                    recorder.add("forward", start, action)
                    continue
                if action.kind in "BI":
                    loss = losses.pop(index)
                    loss.backward()  # type: ignore[no-untyped-call]
                    total += loss.detach()
                    weight_halves[index] = self._stage.weight_half.take()
                if action.kind in "BW":
                    weight_halves.pop(index)()
                recorder.add("backward", start, action)
        return total


class _LeanStage(PipelineStage):
    """A pipeline stage that notes its forwards and backwards, and holds messages while it must.

    Waits for messages lie outside of what is noted. PyTorch's stage has a buffer for each message
    of a step from the first step on, and its runtime holds each that it sends until the end of the
    step: as many as there are micro-batches. Here a buffer is made when its receive is posted. That
    of an input lives on as what autograd saves, that of a gradient until its backward has ended. A
    message that is sent goes when its backend says that it is out; gloo says so at the end alone.
    """

    recorder: Recorder
    message: Tensor

    def prepare(self, recorder: Recorder, message: Tensor) -> None:
        """Set where actions are noted, and a tensor on meta that is like all that is received."""
        self.recorder, self.message = recorder, message
        self._sends: list[Work] = []

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_storage():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_storage():
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextmanager
    def _without_storage(self) -> Iterator[None]:
        """Let PyTorch make its buffers for all micro-batches on meta."""
        device, self.device = self.device, self.message.device
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        """Return the receive of a forward's input, into a buffer of its own."""
        for info in self.args_recv_info[fwd_chunk_id]:
            info.buffer = torch.empty_like(self.message, device=self.device, requires_grad=True)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        """Return the receive of the gradient of a forward's output, into a buffer of its own."""
        for info in self.grad_recv_info[bwd_chunk_id]:
            info.buffer = torch.empty_like(self.message, device=self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        """Send a forward's output; nothing is left to send."""
        return self._send(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        """Send the gradient of a forward's input; nothing is left to send."""
        return self._send(super().get_bwd_send_ops(bwd_chunk_id))

    def _send(self, messages: list[P2POp]) -> list[P2POp]:
        self._sends = [work for work in self._sends if not work.is_completed()]
        self._sends += _batch_p2p(messages)
        return []

    def finish_sends(self) -> None:
        """Return when all that was sent is out."""
        while self._sends:
            self._sends.pop().wait()

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward; the first argument is the micro-batch."""
        start = self.recorder.mark()
        output = super().forward_one_chunk(*args, **kwargs)
        if not self.is_first:
            self._drop(self.args_recv_info[args[0]])
        if self.is_last:  # the loss has what it needs of the logits, and is what backward starts at
            self.fwd_cache[args[0]] = ((), self.fwd_cache[args[0]][1])
        self.recorder.add("forward", start, Action(self.stage_index, "F", args[0]))
        return output

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run one backward, or its input half; the first argument is the micro-batch."""
        start = self.recorder.mark()
        super().backward_one_chunk(*args, **kwargs)
        self._drop(self.grad_recv_info[args[0]])
        if (loss := kwargs.get("loss")) is not None:
            loss.detach_()  # the runtime keeps it, and so its graph with the stage's input
        kind: ActionKind = "B" if kwargs.get("full_backward", True) else "I"
        self.recorder.add("backward", start, Action(self.stage_index, kind, args[0]))

    def _drop(self, received: Sequence[Any]) -> None:
        for info in received:
            info.buffer = self.message

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run the weight half of one backward; the first argument is the micro-batch."""
        start = self.recorder.mark()
        super().backward_weight_one_chunk(*args, **kwargs)
        self.recorder.add("backward", start, Action(self.stage_index, "W", args[0]))

    def _get_init_p2p_neighbors_ops(self) -> list[P2POp]:
        """Return the messages that warm up the links to the neighbours on other ranks.

        PyTorch 2.11 also sends one from a rank to itself, on which gloo fails.
        """
        messages: list[P2POp] = super()._get_init_p2p_neighbors_ops()
        return [message for message in messages if message.group_peer != self.group_rank]


class PipelineRunner:
    """Several ranks: PyTorch's pipeline runtime, fed with the text of the recipe's schedule.

    The runtime reads from the text which rank has which stage, and passes what a stage makes on to
    the next one without a message where both are on one rank.
    """

    def __init__(
        self,
        recipe: Recipe,
        stages: Mapping[int, LlamaStage],
        group: ProcessGroup,
        recorder: Recorder,
    ) -> None:
        self._layout, self._recorder = recipe.layout, recorder
        self._num_tokens = recipe.workload.tokens_per_step
        self._stages = [
            _lean_stage(recipe, number, stage, group, recorder) for number, stage in stages.items()
        ]
        self._has_first = any(stage.is_first for stage in self._stages)
        self._has_last = any(stage.is_last for stage in self._stages)
        self._runtime = _PipelineScheduleRuntime(  # type: ignore[no-untyped-call]
            self._stages, recipe.layout.num_microbatches, loss_fn=self._loss, scale_grads=False
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
        """Return this rank's part of the loss, 0 without the last stage (see `Runner`)."""
        losses: list[Tensor] = []
        with _sharded_loss(self._layout.tp):
            self._runtime.step(
                *((tokens,) if self._has_first else ()),
                target=targets if self._has_last else None,
                losses=losses,
                return_outputs=False,
            )
        for stage in self._stages:
            stage.finish_sends()
        if not losses:
            return torch.zeros((), device=tokens.device)
        return torch.stack([loss.detach() for loss in losses]).sum()


def actions_with_messages(schedule: Schedule) -> tuple[tuple[str, ...], ...]:
    """Return what PyTorch's runtime makes of `schedule`: each rank's actions and messages, as text.

    >>> from simulator.schedule import parse_schedule
    >>> actions_with_messages(parse_schedule("0F0 0B0\\n1F0 1B0"))[1]
    ('1RECV_F0', '1F0', '1B0', '1SEND_B0')
    """
    orders: dict[int, list[_Action]] = {
        rank: [_Action.from_str(str(action)) for action in actions]
        for rank, actions in enumerate(schedule.ranks)
    }
    homes = schedule.homes.tolist()
    lowered = _add_send_recv(orders, homes.__getitem__, schedule.num_stages)
    return tuple(tuple(map(str, lowered[rank])) for rank in range(schedule.num_ranks))


def _lean_stage(
    recipe: Recipe, number: int, stage: LlamaStage, group: ProcessGroup, recorder: Recorder
) -> _LeanStage:
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
    lean = _LeanStage(
        stage,
        number,
        layout.num_stages,
        stage.cos.device,
        input_args=ids if number == 0 else hidden,
        output_args=logits if number == layout.num_stages - 1 else hidden,
        group=group,
        dw_builder=stage.weight_half.take,
    )
    lean.prepare(recorder, hidden.detach())
    return lean
