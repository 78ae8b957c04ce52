"""The memory model: what each pipeline rank holds at its peak, by what holds it.

Equations and sources: docs/models.md.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from planner.activations import (
    Sizes,
    head_activation_bytes,
    layer_activation_bytes,
    layer_of,
    stage_activation_bytes,
)
from planner.layout import Layout
from planner.plan import PeakMemory
from planner.states import Shares, Weights, states_of
from profiles.model import ModelSpec
from profiles.stack import Recompute, Sharding, StackSpec
from profiles.workload import Workload
from simulator.schedule import STAGE_MASK, STAGE_SHIFT, Codes, Schedule

__all__ = [
    "Held",
    "MemoryModel",
    "alive_by_rank",
    "context_bytes",
    "head_activation_bytes",
    "layer_activation_bytes",
    "least_memory",
    "peak_activations",
    "peak_alive",
    "peak_memory",
    "stage_activation_bytes",
]


_GIB = 1 << 30
_CONTEXT_BYTES, _COMMUNICATOR_BYTES = _GIB // 2, 6 * _GIB // 10


def context_bytes(layout: Layout) -> int:
    """Return what a process holds on its GPU outside of the framework's allocator.

    The CUDA context and its kernels take half a GiB, NCCL's buffers 0.6 GiB on each axis of more
    than one rank. The most that a run on GPUs of 79.65 GiB could reserve with three such axes was
    77.4 GiB (nanotron sweep, 2025-02).

    >>> context_bytes(Layout(dp=8, tp=1, pp=1, micro_batch=1, num_microbatches=1,
    ...                      stage_layers=(2,))) // 2**20
    1126
    """
    axes = (layout.dp, layout.tp, layout.pp, layout.cp)
    return _CONTEXT_BYTES + _COMMUNICATOR_BYTES * sum(degree > 1 for degree in axes)


def peak_alive(schedule: Schedule, rank: int) -> int:
    """Return how many micro-batches' activations pipeline rank `rank` holds at most.

    >>> from planner.schedules import SCHEDULES
    >>> gpipe, one_f_one_b = (SCHEDULES[name].build(4, 8) for name in ("gpipe", "1f1b"))
    >>> peak_alive(gpipe, 0), [peak_alive(one_f_one_b, r) for r in range(4)]
    (8, [4, 3, 2, 1])
    """
    return peak_activations(schedule, [1] * schedule.num_stages)[rank]


def peak_activations(schedule: Schedule, stage_bytes: Sequence[int]) -> tuple[int, ...]:
    """Return the most bytes of activations that each pipeline rank holds at once.

    `stage_bytes` is what one micro-batch keeps on each stage: a forward allocates it; a backward,
    or the weight half of one, frees it.
    """
    held = np.asarray(stage_bytes, np.int64)
    return tuple(int((alive @ held[stages]).max()) for stages, alive in alive_by_rank(schedule))


@lru_cache(maxsize=512)
def alive_by_rank(schedule: Schedule) -> tuple[tuple[Codes, Codes], ...]:
    """Return per rank its stages [v] and, a row each [A, v], how many micro-batches they hold."""
    change = np.array([1, -1, 0, -1])
    ranks = []
    for order in schedule.orders:
        stages, place = np.unique((order >> STAGE_SHIFT) & STAGE_MASK, return_inverse=True)
        changes = np.zeros((len(order), len(stages)), np.int64)
        changes[np.arange(len(order)), place] = change[order & 3]
        alive = np.unique(np.cumsum(changes, axis=0), axis=0)
        ranks.append((stages, alive[-1:] if len(stages) == 1 else alive))
    return tuple(ranks)


def _working_bytes(model: ModelSpec, size: Sizes, layout: Layout, stack: StackSpec) -> int:
    """Return the largest short-lived working set of one layer's backward.

    What was not kept and is made again; the gradients that flow through the MLP, or through the
    scores; with sequence parallelism, inputs and gradients of the whole hidden width on their way
    to and from the sharded stream, two collectives of each of the layer's two blocks: they stay
    allocated until the exchange stream is done with them.
    """
    layer = layer_of(model, size, stack)
    pairs = layer.scores // (2 * size.element + 1)
    gradients = size.element * max(3 * size.rows * size.ffn, pairs)
    again = layer.total - layer.kept(layout.recompute, stack.selective)
    return again + gradients + 4 * _whole(model, size, layout)


def _exchange_bytes(model: ModelSpec, size: Sizes, layout: Layout) -> int:
    """Return the standing buffers of the exchanges inside a layer.

    With sequence parallelism the gathered input and the gathered gradient; with context parallelism
    keys and values of one peer in use and of one on their way.
    """
    ring = 4 * size.rows * size.kv_width * size.element if layout.cp > 1 else 0
    return 2 * _whole(model, size, layout) + ring


def _message_bytes(model: ModelSpec, size: Sizes, layout: Layout) -> int:
    """Return what a pipeline rank receives into beside its activations.

    A message in use, which is the gradient of a stage's output, and one on its way.
    """
    return 2 * size.between * model.hidden * size.element if layout.pp > 1 else 0


def _whole(model: ModelSpec, size: Sizes, layout: Layout) -> int:
    """Return a tensor of the whole hidden width where such are gathered, else 0."""
    is_gathered = layout.sequence_parallel and layout.tp > 1
    return size.rows * model.hidden * size.element if is_gathered else 0


def _loss_width(element: int, tp: int, stack: StackSpec) -> int:
    """Return the bytes that the loss takes for itself, for each logit of a rank.

    The logits in fp32 and their gradient; in eager PyTorch two gradients in fp32, those of the
    log-probabilities and of the logits, and a third tensor of that size over a sharded vocabulary.
    """
    if stack.fuses_loss:
        return 0
    return 4 + element if stack.fusion != "eager" else 8 if tp == 1 else 12


class Held(NamedTuple):
    """What one pipeline rank holds beside activations, in bytes; see `PeakMemory`.

    `working` is the largest short-lived working set: of one layer's backward, and on the last stage
    of the loss, logits in fp32 and their gradient. Where gradients are accumulated in another dtype
    than they are made in, `made` is all that the last backward has made by its end, when the
    activations of its micro-batch are gone, which were `kept`. `slack` is
    `StackSpec.allocator_slack`, and `host` what the host holds for the rank.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    working: int
    update: int
    context: int
    slack: float
    host: int = 0
    made: int = 0
    kept: int = 0

    @property
    def static(self) -> int:
        """What is held all through the step."""
        return self.parameters + self.gradients + self.optimizer + self.buffers

    @property
    def temporary(self) -> int:
        """What lies on top of the activations at their peak."""
        return max(self.working, self.made - self.kept)

    def peak(self, activations: int) -> PeakMemory:
        """Return the peak of a rank that holds `activations` at most."""
        in_use = self.static + max(activations + self.temporary, self.update)
        return PeakMemory(
            parameters=self.parameters,
            gradients=self.gradients,
            optimizer=self.optimizer,
            activations=activations,
            temporary=self.temporary,
            context=self.context,
            buffers=self.buffers,
            update=self.update,
            reserve=round(self.slack * in_use),
        )

    def left(self, limit_bytes: int, host_bytes: int = 0) -> int:
        """Return the bytes for activations and what is temporary, -1 where not even for the rest.

        `host_bytes` is its share of the host's memory.

        >>> held = Held(10, 10, 20, 0, 5, 0, 1, 0.1)
        >>> held.left(100), held.peak(held.left(100) - 5).total
        (50, 100)
        """
        most = limit_bytes - self.context
        in_use = int(most / (1 + self.slack)) + 1
        while in_use + round(self.slack * in_use) > most:
            in_use -= 1
        fits = in_use - self.static >= self.update and self.host <= host_bytes
        return in_use - self.static if fits else -1


class MemoryModel:
    """What the ranks of layouts hold that differ in their sharding alone.

    Ranks with as many layers and the same ends of the model are alike and are counted once; `alike`
    [P] says which of `held` each rank is.
    """

    def __init__(
        self,
        model: ModelSpec,
        workload: Workload,
        layout: Layout,
        homes: Sequence[int],
        stack: StackSpec,
    ) -> None:
        size = Sizes.of(model, workload, layout)
        self._element, self._stack = size.element, stack
        self._exchange = _exchange_bytes(model, size, layout) + _message_bytes(model, size, layout)
        working = _working_bytes(model, size, layout, stack)
        logits = size.rows * size.vocab * _loss_width(size.element, layout.tp, stack)
        kept = stage_activation_bytes(model, workload, layout, stack)
        known: dict[tuple[int, bool, bool, int], int] = {}
        self._kinds: list[tuple[Weights, int, int]] = []
        waits = (stack.gradient_bytes or size.element) != size.element
        self._waiting: tuple[Sharding, ...] = ("none", "zero1") if waits else ()
        alike = []
        for stages in _stages_of(homes, layout.pp):
            num_layers = sum(layout.stage_layers[stage] for stage in stages)
            is_first, is_last = 0 in stages, layout.num_stages - 1 in stages
            key = (num_layers, is_first, is_last, sum(kept[stage] for stage in stages))
            if key not in known:
                known[key] = len(self._kinds)
                weights = Weights.of(model, layout, num_layers, is_first=is_first, is_last=is_last)
                self._kinds.append((weights, max(working, logits if is_last else 0), key[3]))
            alike.append(known[key])
        self.alike = np.array(alike)

    def held(self, layout: Layout, context_bytes: int) -> tuple[Held, ...]:
        """Return what each kind of rank holds beside activations."""
        shares = Shares.of(layout, self._element, self._stack)
        found = []
        for weights, working, kept in self._kinds:
            states = states_of(weights, shares)
            found.append(
                Held(
                    parameters=states.parameters,
                    gradients=states.gradients,
                    optimizer=states.optimizer,
                    buffers=states.buffers + self._exchange,
                    working=working,
                    update=states.update,
                    context=context_bytes,
                    slack=self._stack.allocator_slack,
                    host=states.host,
                    made=self._element * weights.whole if layout.sharding in self._waiting else 0,
                    kept=kept,
                )
            )
        return tuple(found)


def peak_memory(
    model: ModelSpec,
    workload: Workload,
    layout: Layout,
    schedule: Schedule,
    stack: StackSpec,
    context_bytes: int,
) -> tuple[PeakMemory, ...]:
    """Return the peak memory of each pipeline rank, over all of its stages."""
    stage_bytes = stage_activation_bytes(model, workload, layout, stack)
    ranks = MemoryModel(model, workload, layout, schedule.homes.tolist(), stack)
    held = ranks.held(layout, context_bytes)
    return tuple(
        held[kind].peak(activations)
        for kind, activations in zip(
            ranks.alike.tolist(), peak_activations(schedule, stage_bytes), strict=True
        )
    )


def least_memory(
    model: ModelSpec,
    workload: Workload,
    layout: Layout,
    kinds: Sequence[Recompute],
    stack: StackSpec,
    context_bytes: int,
) -> int:
    """Return bytes that the fullest rank of `layout` holds at least, whatever its stages.

    Of L layers over p ranks one has L / p or more; of its stages one keeps a micro-batch with the
    `kinds` of recomputation that keep least, while the states of all of them are there.
    """
    size = Sizes.of(model, workload, layout)
    num_layers = model.num_layers // layout.pp
    layer = layer_of(model, size, stack)
    kept = min(layer.kept(kind, stack.selective) for kind in kinds)
    weights = Weights.of(model, layout, num_layers, is_first=False, is_last=False)
    states = states_of(weights, Shares.of(layout, size.element, stack))
    held = states.parameters + states.gradients + states.optimizer
    working = size.element * 3 * size.rows * size.ffn
    in_use = held + num_layers // layout.stages_per_rank * kept + working
    return int((1 + stack.allocator_slack) * in_use) + context_bytes


def _stages_of(homes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return the stages of each rank."""
    stages_of: list[list[int]] = [[] for _ in range(num_ranks)]
    for stage, rank in enumerate(homes):
        stages_of[rank].append(stage)
    return stages_of
