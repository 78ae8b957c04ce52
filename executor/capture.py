"""What one rank of a large job does and holds, found without hardware: `layline capture`.

The rank is built and stepped by the code that trains (`executor.train.Trainer`): stages, tensor
parallelism, pipeline runtime, gradient buckets, optimizer. Its tensors are fake and its process
group pretends (`executor.capture_trace`), so that a rank of 1,024 fits on any machine.

Of many micro-batches as few are traced as show all (`executor.capture_fold`). The step that is
captured is the second, and those after it: the optimizer's state is there from the start.
"""

import gc
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from executor.capture_fold import folded, situations
from executor.capture_trace import (
    Collective,
    Event,
    Life,
    Op,
    Trace,
    fused_norms,
    pretended_group,
)
from executor.data import TokenStream
from executor.model import LlamaStage
from executor.pipeline import actions_with_messages
from executor.recipe import Recipe, recipe_of
from executor.recorder import Piece
from executor.run import check_runnable
from executor.shards import local
from executor.train import PendingLoss, Trainer
from planner.layout import MeshPlace
from planner.plan import Plan
from profiles.errors import InvalidInputError
from simulator.schedule import Schedule
from simulator.timeline import Kind

_CPU = torch.device("cpu")
_SCALAR_BYTES = 8
"""Messages up to this, and integers between the actions, are the first step's hand-shake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What is done for one action of the schedule, or in one other part of the step, in order.

    `phase` is `send` for a message of the pipeline, whose `action` is written as in `1RECV_F0`.
    """

    phase: Kind
    action: str
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakStorages:
    """The bytes of all storages that are alive at the peak of a step, by what holds them.

    `activations` are what one action of the schedule leaves for a later one, `temporary` is what
    the action at the peak has made for itself, `messages` are the buffers that the pipeline runtime
    receives into, those that are inputs of stages until their backward, and `inputs` the tokens of
    the step and the tables of rotations.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    temporary: int = 0
    messages: int = 0
    inputs: int = 0

    @property
    def total(self) -> int:
        """All of it: what an allocator is asked for, without rounding."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """One step of one rank: what it does, in order, and its peak memory.

    `peak_phase` and `peak_action` say where the peak is. Of `num_microbatches` the first
    `num_traced` were traced, and stand for the others.
    """

    plan_digest: str
    rank: int
    place: MeshPlace
    stages: tuple[int, ...]
    num_microbatches: int
    num_traced: int
    segments: tuple[Segment, ...]
    peak: PeakStorages
    peak_phase: str
    peak_action: str

    def events(self) -> Iterator[tuple[Segment, Event]]:
        """Yield all ops and collectives of the step in order, each with its segment."""
        for segment in self.segments:
            for event in segment.events:
                yield segment, event

    def op_counts(self) -> Counter[tuple[Kind, Op]]:
        """Return how often each op runs at each shape in a step, by phase."""
        return Counter((part.phase, op) for part, op in self.events() if isinstance(op, Op))

    def collective_counts(self) -> Counter[tuple[Kind, Collective]]:
        """Return how often each collective, and each message, is in a step, by phase."""
        return Counter(
            (part.phase, event) for part, event in self.events() if isinstance(event, Collective)
        )


def flops(op: Op) -> int:
    """Return the flops of a matrix product or of an attention, 0 of any other op.

    A product of [m, k] and [k, n] takes 2 m k n. Causal attention of b sequences, h heads, s
    positions and head size e takes two products of half the s x s scores, 2 b h s^2 e, and its
    backward five (FlashAttention-2, arXiv:2307.08691, section 4.1).

    >>> flops(Op(name="mm", shapes=((2, 3), (3, 5)), dtype="bf16"))
    60
    """
    if op.name in ("mm", "addmm_"):  # the second adds the product to its first tensor
        (m, k), (_, n) = op.shapes[-2:]
        return 2 * m * k * n
    if "attention" not in op.name:
        return 0
    b, h, s, e = op.shapes[0]
    return (5 if op.name.endswith("backward") else 2) * b * h * s * s * e


def capture(plan: Plan, rank: int) -> Capture:
    """Return what `rank` of the job of `plan` does in a step, and what it holds at the peak.

    Raises UnsupportedError for a plan that the executor cannot run, and InvalidInputError for a
    rank that it does not have.
    """
    check_runnable(plan)
    if not 0 <= rank < (num_ranks := plan.layout.num_ranks):
        raise InvalidInputError(
            [f"--rank is {rank}; it must be from 0 to {num_ranks - 1}: {plan.layout} has "
             f"{num_ranks} ranks"]
        )  # fmt: skip
    return capture_recipe(recipe_of(plan), rank, plan.profile.device.kind, plan.plan_digest)


def capture_recipe(recipe: Recipe, rank: int, device_kind: str, plan_digest: str = "") -> Capture:
    """Return the capture of `rank` for a plan of `device_kind` ranks, `cpu` or `cuda`."""
    place, total = recipe.layout.place(rank), recipe.layout.num_microbatches
    traced = folded(recipe, place.pp)
    few = traced.layout.num_microbatches
    norms = fused_norms if device_kind == "cuda" else nullcontext
    with pretended_group(rank, recipe.layout.num_ranks), norms(), _no_collection():
        step = _fake_step(traced, rank)
    return Capture(
        plan_digest=plan_digest,
        rank=rank,
        place=place,
        stages=tuple(np.flatnonzero(recipe.schedule.homes == place.pp).tolist()),
        num_microbatches=total,
        num_traced=few,
        segments=unfolded(step, traced.schedule, recipe.schedule, place.pp),
        peak=replace(
            step.held,
            inputs=step.held.inputs + step.token_bytes // few * (total - few),
        ),
        peak_phase=step.peak_piece.phase,
        peak_action=step.peak_piece.action,
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from ending storages at moments of its own."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        gc.collect()


class TracedStep(NamedTuple):
    """A traced step: its pieces, what lies between them, and what is held at the peak.

    `token_bytes` are held for all micro-batches through the whole step.
    """

    pieces: list[Segment]
    between: list[list[Event]]
    held: PeakStorages
    peak_piece: Segment
    token_bytes: int


def _fake_step(recipe: Recipe, rank: int) -> TracedStep:
    """Return the second step of `rank` on fake tensors; its text is empty."""
    trace, mode = Trace(), FakeTensorMode(allow_non_fake_inputs=True)
    text = TokenStream(name="no text", tokens=np.zeros(recipe.workload.seq_len + 1, np.uint8))
    trainer = Trainer(recipe, text, _CPU, rank, trace.clock, lambda: mode)
    with mode:
        _make_states(trainer)
        return trace_step(trainer, trace)


def trace_step(trainer: Trainer, trace: Trace) -> TracedStep:
    """Return the next step of `trainer`, which has the clock of `trace`, on any tensors."""
    trace.name_groups(_axes(trainer))
    roles: dict[int, str] = {}
    _assign(roles, trace, _states(trainer))
    with trace, trace.without_propagation():
        trainer.recorder.begin()
        part = trainer.step(0, lambda stages: _assign(roles, trace, _gradients(stages)))
        start = trainer.recorder.mark()
        PendingLoss(part)
        trainer.recorder.add("other", start)
        trainer.recorder.end()
    return _cut(trace, trainer.recorder.trace().pieces, roles)


def _axes(trainer: Trainer) -> dict[str, str]:
    """Return the axis of each process group of the rank."""
    if trainer.mesh is None:
        return {}
    return {trainer.mesh.get_group(axis).group_name: axis for axis in ("pp", "dp", "tp")}


def _make_states(trainer: Trainer) -> None:
    """Let the optimizer make its state, as the first step does, from gradients of zero."""
    for stage in trainer.stages:
        for parameter in stage.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    trainer.update()


def _states(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Yield what is there before a step, with what it is."""
    for stage in trainer.stages:
        yield from (("parameters", local(parameter)) for parameter in stage.parameters())
        yield from (("inputs", table) for table in stage.buffers())
    yield from _gradients(trainer.stages)
    for state in trainer.optimizer.state.values():
        yield from (("optimizer", tensor) for tensor in state.values())


def _gradients(stages: Sequence[LlamaStage]) -> Iterator[tuple[str, Tensor]]:
    for stage in stages:
        for parameter in stage.parameters():
            if parameter.grad is not None:
                yield "gradients", local(parameter.grad)


def _assign(roles: dict[int, str], trace: Trace, tensors: Iterator[tuple[str, Tensor]]) -> None:
    for role, tensor in tensors:
        roles[trace.place(tensor)] = role


def _cut(trace: Trace, pieces: Sequence[Piece], roles: Mapping[int, str]) -> TracedStep:
    """Return what `trace` holds, cut by `pieces`, whose times are counts of calls."""
    ends = [piece.end_ns for piece in pieces]
    inside: list[list[Event]] = [[] for _ in pieces]
    between: list[list[Event]] = [[] for _ in range(len(pieces) + 1)]
    for call, event in trace.events:
        place = bisect_left(ends, call)
        is_inside = place < len(pieces) and pieces[place].start_ns < call
        (inside if is_inside else between)[place].append(event)
    found = [
        Segment(phase=piece.kind, action=str(piece.action or ""), events=tuple(events))
        for piece, events in zip(pieces, inside, strict=True)
    ]
    first = next(piece.start_ns for piece in pieces if piece.action is not None)
    held = dict.fromkeys((field.name for field in fields(PeakStorages)), 0)
    token_bytes = 0
    for place, life in enumerate(trace.lives):
        role = roles.get(place) or _role(life, pieces, ends)
        if life.is_alive(trace.peak_moment):
            held[role] += life.size_bytes
        if role == "inputs" and place not in roles and not 0 <= life.last_call <= first:
            token_bytes += life.size_bytes
    return TracedStep(
        pieces=found,
        between=between,
        held=PeakStorages(**held),
        peak_piece=found[min(bisect_left(ends, trace.peak_call), len(found) - 1)],
        token_bytes=token_bytes,
    )


def _role(life: Life, pieces: Sequence[Piece], ends: Sequence[int]) -> str:
    """Return what a storage is that was made in the step, and is no gradient."""
    place = bisect_left(ends, life.call)
    if place == len(pieces) or life.call <= pieces[place].start_ns:
        return "messages" if life.size_bytes > _SCALAR_BYTES else "temporary"
    piece = pieces[place]
    if piece.kind == "data":
        return "inputs"
    is_left = piece.action is not None and not 0 <= life.last_call <= piece.end_ns
    return "activations" if is_left else "temporary"


def unfolded(
    step: TracedStep, traced: Schedule, whole: Schedule, pp_index: int
) -> tuple[Segment, ...]:
    """Return the segments of the whole step: each action as the one that was traced in its place.

    Messages stand where the pipeline runtime puts them.
    """
    lists = {
        situation.list_key: piece
        for situation, piece in zip(
            situations(traced, pp_index), (p for p in step.pieces if p.action), strict=True
        )
    }
    messages = {
        event.kind: event
        for gap in step.between
        for event in gap
        if isinstance(event, Collective) and event.size_bytes > _SCALAR_BYTES
    }
    done = iter(situations(whole, pp_index))
    middle = []
    for action in actions_with_messages(whole)[pp_index]:
        kind = next((kind for kind in messages if kind.upper() in action), "")
        if kind:
            middle.append(Segment(phase="send", action=action, events=(messages[kind],)))
        else:
            middle.append(replace(lists[next(done).list_key], action=action))
    few, total = traced.num_microbatches, whole.num_microbatches
    ends = [index for index, piece in enumerate(step.pieces) if piece.action]
    before, behind = (
        Segment(
            phase="other",
            action="",
            events=tuple(
                _of_all(event, few, total)
                for event in step.between[gap]
                if isinstance(event, Op) and not event.dtype.startswith("int")
            ),
        )
        for gap in (ends[0], ends[-1] + 1)
    )
    data = [
        replace(piece, events=tuple(_of_all(event, few, total) for event in piece.events))
        for piece in step.pieces[: ends[0]]
    ]
    parts = (*data, before, *middle, behind, *step.pieces[ends[-1] + 1 :])
    return tuple(part for part in parts if part.events)


def _of_all(event: Event, few: int, total: int) -> Event:
    """Return an op on a `few` micro-batches at once, tokens or losses, as one on all of them."""
    if isinstance(event, Collective):
        return event
    if event.shapes == ((),) * few and few > 1:
        return replace(event, shapes=((),) * total)
    shapes = (
        (shape[0] // few * total, *shape[1:]) if shape and shape[0] % few == 0 else shape
        for shape in event.shapes
    )
    return replace(event, shapes=tuple(shapes))
