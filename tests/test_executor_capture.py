"""The capture against real runs, and the cost model against the capture."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.profiler import ProfilerActivity

from executor import capture as capture_module
from executor.capture import capture, trace_step, unfolded
from executor.capture_fold import folded
from executor.capture_trace import Trace
from executor.data import load_stream
from executor.recipe import recipe_of
from executor.run import run_plans
from executor.train import Trainer
from planner.layout import Layout
from planner.plan import Plan
from profiles.errors import InvalidInputError, UnsupportedError
from profiles.files import plain
from profiles.presets import stack_preset
from tests.plans import tiny_layout, tiny_plan, tiny_stack

NCCL = stack_preset("layline-nccl")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Real runs.


def real_trainer(plan: Plan, trace: Trace) -> Trainer:
    """Return the only rank of `plan`, on real tensors and after its first step."""
    trainer = Trainer(recipe_of(plan), load_stream(None), torch.device("cpu"), 0, trace.clock)
    trainer.recorder.begin()
    trainer.step(0)
    trainer.recorder.end()
    return trainer


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zb_h1", marks=pytest.mark.slow)])
def test_a_fake_step_is_a_real_step(schedule: str) -> None:
    plan = tiny_plan(tiny_layout(schedule=schedule, global_batch=5))
    order, trace = plan.parsed_schedule(), Trace()
    real, found = trace_step(real_trainer(plan, trace), trace), capture(plan, 0)
    assert found.segments == unfolded(real, order, order, 0)
    assert real.held.total == found.peak.total == trace.peak_bytes
    assert found.peak == real.held
    assert found.num_traced < found.num_microbatches


def test_the_peak_is_what_the_allocator_was_asked_for() -> None:
    plan = tiny_plan(tiny_layout(global_batch=2), seq_len=64)
    trainer = real_trainer(plan, Trace())
    kept = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    for stage in trainer.stages:
        kept += (*stage.parameters(), *stage.buffers())
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer.step(1)
    events = cast(Any, seen.profiler).kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    asked = max(accumulate(event.nbytes() for event in changes))
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    assert capture(plan, 0).peak.total == held + asked


@pytest.mark.dist
@pytest.mark.slow
def test_two_fake_ranks_are_two_real_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = [
        tiny_layout(dp=2, global_batch=4),
        tiny_layout(tp=2, global_batch=4),
        tiny_layout(pp=2, global_batch=4),
        tiny_layout(pp=2, schedule="zb_v", stages_per_rank=2, global_batch=4),
    ]
    plans = [tiny_plan(layout) for layout in layouts]
    plans.append(tiny_plan(layouts[0], stack=tiny_stack(overlaps_gradients=True)))
    monkeypatch.setenv("LAYLINE_TEST_FOLDER", str(tmp_path))
    folders = [tmp_path / f"run{index}" for index in range(len(plans))]
    run_plans(plans, folders, None, 2, worker="tests.capture_ranks")
    for index, plan in enumerate(plans):
        for rank in range(2):
            real = json.loads((tmp_path / f"trace-{index}-{rank}.json").read_text())
            found = capture(plan, rank)
            assert json.loads(json.dumps(plain(found.segments))) == real["segments"]
            # A real stage keeps what it sends until the message is there, which a fake one is.
            if plan.layout.pp == 1:
                assert plain(found.peak) == real["held"], plan.layout


# Few micro-batches for many.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        (tiny_layout(global_batch=6), 0),
        (tiny_layout(pp=2, dp=2, global_batch=12), 3),
        (tiny_layout(pp=2, schedule="interleaved", stages_per_rank=2, global_batch=8), 0),
        (tiny_layout(pp=2, schedule="zb_h1", global_batch=8), 0),
    ],
    ids=str,
)
def test_nothing_is_lost_by_folding(
    layout: Layout, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan(layout, seq_len=16, stack=tiny_stack(overlaps_gradients=True))
    few = capture(plan, rank)
    monkeypatch.setattr(capture_module, "folded", lambda recipe, _: recipe)
    every = capture(plan, rank)
    assert few.num_traced < every.num_traced == layout.num_microbatches
    assert few.segments == every.segments
    lost = every.peak.total - few.peak.total
    assert 0 <= lost <= 4 * (every.num_traced - few.num_traced)  # the losses, on the last stage
    assert (few.peak_phase, few.peak.parameters) == (every.peak_phase, every.peak.parameters)


def test_gpipe_cannot_be_folded() -> None:
    recipe = recipe_of(tiny_plan(tiny_layout(pp=2, schedule="gpipe", global_batch=8)))
    assert folded(recipe, 0) == recipe


# What cannot be captured.


def test_what_cannot_be_run_cannot_be_captured() -> None:
    with pytest.raises(UnsupportedError, match=r"layout\.recompute is full"):
        capture(tiny_plan(replace(tiny_layout(), recompute="full")), 0)
    with pytest.raises(InvalidInputError, match="--rank is 2; it must be from 0 to 1"):
        capture(tiny_plan(tiny_layout(dp=2)), 2)
