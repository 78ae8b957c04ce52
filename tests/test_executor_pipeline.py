"""The pipeline stage: what a rank holds of the messages of a step, and for how long."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import UntypedStorage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import PipelineStage

from executor import pipeline
from executor.capture_trace import Trace, pretended_group
from executor.data import TokenStream
from executor.parallel import DTYPES
from executor.pipeline import PipelineRunner, _LeanStage, actions_with_messages
from executor.recipe import recipe_of
from executor.run import RUNNABLE_DTYPES
from executor.train import Trainer
from planner.layout import Layout
from tests.plans import tiny_layout, tiny_plan

CASES = (
    (tiny_layout(pp=2, global_batch=6), 1),
    (tiny_layout(pp=2, schedule="zb_h1", global_batch=6), 0),
    (tiny_layout(pp=2, schedule="interleaved", stages_per_rank=2, global_batch=6), 0),
    (tiny_layout(pp=2, schedule="zb_v", stages_per_rank=2, global_batch=6), 0),
)
TOKENS = np.zeros(33, np.uint8)
Held = list[weakref.ref[UntypedStorage]]


def rank_of(
    layout: Layout,
    rank: int,
    allocating: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Trainer:
    recipe, text = recipe_of(tiny_plan(layout)), TokenStream(name="no text", tokens=TOKENS)
    return Trainer(recipe, text, torch.device("cpu"), rank, allocating=allocating)


def alive(held: Held) -> int:
    return sum(storage() is not None for storage in held)


@pytest.mark.parametrize(("layout", "rank"), CASES, ids=str)
def test_a_buffer_is_there_from_its_receive_to_its_use(
    layout: Layout, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is received is counted by kind, and how much of it is alive in front of a receive."""
    received: dict[str, Held] = {"F": [], "B": []}
    most = Counter[str]()
    original = PipelineStage._get_recv_ops

    def counted(stage: _LeanStage, infos: tuple[Mock, ...]) -> object:
        kind = "F" if any(infos is known for known in stage.args_recv_info.values()) else "B"
        received[kind] += (weakref.ref(info.buffer.untyped_storage()) for info in infos)
        most[kind] = max(most[kind], alive(received[kind]))
        return original(stage, infos)

    monkeypatch.setattr(_LeanStage, "_get_recv_ops", counted)
    trace, fake = Trace(), FakeTensorMode(allow_non_fake_inputs=True)
    with pretended_group(rank, 2):
        trainer = rank_of(layout, rank, lambda: fake)
        with fake, trace:
            trainer.step(0)
    messages = actions_with_messages(tiny_plan(layout).parsed_schedule())[rank]
    for kind, held in received.items():
        assert len(held) == sum(f"RECV_{kind}" in text for text in messages)
        assert most[kind] <= len(held) // 2 + 1
    gc.collect()
    assert alive(received["F"] + received["B"]) == 0
    runner = trainer._runner
    assert isinstance(runner, PipelineRunner)
    for stage in runner._stages:
        known = (*stage.args_recv_info.values(), *stage.grad_recv_info.values())
        buffers = [info.buffer for infos in known for info in infos if not info.is_root_arg]
        assert len(buffers) == (2 - stage.is_first - stage.is_last) * layout.num_microbatches
        assert all(buffer.is_meta for buffer in buffers)
        assert stage.device.type == "cpu"


def test_a_message_is_let_go_when_it_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_group(0, 2):
        runner = rank_of(tiny_layout(pp=2), 0)._runner
    assert isinstance(runner, PipelineRunner)
    (stage,) = runner._stages
    works = [Mock(), Mock(), Mock()]
    monkeypatch.setattr(pipeline, "_batch_p2p", lambda messages: messages)
    for work, is_out in zip(works, (True, False, False), strict=True):
        work.is_completed.return_value = is_out
        assert stage._send([work]) == []
    assert stage._sends == works[1:]
    stage.finish_sends()
    assert stage._sends == []
    works[0].wait.assert_not_called()
    works[1].wait.assert_called_once_with()
    works[2].wait.assert_called_once_with()


def test_dtypes_by_name_are_those_of_pytorch() -> None:
    assert tuple(DTYPES) == RUNNABLE_DTYPES
