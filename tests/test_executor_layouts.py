"""Every layout trains like one process: same losses, same gradients."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from executor.data import load_stream
from executor.model import LlamaStage
from executor.recipe import recipe_of
from executor.run import run_plans
from executor.train import Trainer, run_steps
from planner.layout import Layout
from planner.record import load_run
from tests.plans import tiny_layout, tiny_plan, tiny_stack

NUM_STEPS = 10
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-5
BATCH = 4
OVERLAPPED = tiny_stack(overlaps_gradients=True)
# Neighbouring stages on one rank, whole and split backwards, weight halves late and out of turn.
BY_HAND = (
    "0F0 1F0 0F1 1F1 0F2 1F2 0F3 1F3 1B0 0B0 1I1 0I1 1I2 1W1 0B2 0W1 1B3 0I3 0W3 1W2",
    "2F0 3F0 3B0 2B0 2F1 3F1 3I1 2I1 2F2 3F2 3W1 3I2 2I2 2W2 2W1 3W2 2F3 3F3 3B3 2B3",
)


def looped(name: str, dp: int = 1, tp: int = 1) -> Layout:
    """Return a layout of two pipeline ranks with two stages each."""
    return tiny_layout(dp=dp, tp=tp, pp=2, schedule=name, stages_per_rank=2, global_batch=BATCH)


PLANS = {
    2: [
        tiny_plan(looped("interleaved")),
        tiny_plan(looped("breadth_first")),
        tiny_plan(looped("zb_v")),
        tiny_plan(looped("dual_pipe_v")),
        tiny_plan(looped("synthesised"), schedule=BY_HAND),
        tiny_plan(tiny_layout(pp=2, schedule="zb_h1", global_batch=BATCH)),
    ],
    4: [
        tiny_plan(tiny_layout(dp=4, global_batch=BATCH)),
        tiny_plan(tiny_layout(pp=4, schedule="gpipe", global_batch=BATCH)),
        tiny_plan(tiny_layout(pp=4, global_batch=BATCH)),
        tiny_plan(tiny_layout(dp=2, tp=2, global_batch=BATCH)),
        tiny_plan(tiny_layout(dp=2, pp=2, global_batch=BATCH)),
        tiny_plan(tiny_layout(dp=2, pp=2, global_batch=BATCH), stack=OVERLAPPED),
        tiny_plan(tiny_layout(tp=2, pp=2, global_batch=BATCH)),
        tiny_plan(looped("interleaved", dp=2)),
        tiny_plan(looped("zb_v", dp=2), stack=OVERLAPPED),
        tiny_plan(looped("zb_v", tp=2)),
    ],
    8: [tiny_plan(tiny_layout(dp=2, tp=2, pp=2, global_batch=BATCH), stack=OVERLAPPED)],
}

Gradients = dict[str, npt.NDArray[np.float32]]


def run_all(
    num_ranks: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[list[float], Gradients]]:
    """Return losses and whole gradients of every layout of `num_ranks`, run in one launch."""
    monkeypatch.setenv("LAYLINE_TEST_FOLDER", str(folder))
    plans = PLANS[num_ranks]
    directories = [folder / f"run{index}" for index in range(len(plans))]
    run_plans(plans, directories, None, NUM_STEPS, worker="tests.executor_ranks")
    return [
        (
            [step.loss for step in load_run(directory)[1].steps],
            whole_gradients(plan.layout, folder, index),
        )
        for index, (plan, directory) in enumerate(zip(plans, directories, strict=True))
    ]


def whole_gradients(layout: Layout, folder: Path, index: int) -> Gradients:
    """Return the gradients put together from the shards of all ranks; dp replicas must agree."""
    shards: dict[str, dict[tuple[int, int], npt.NDArray[np.float32]]] = {}
    for rank in range(layout.num_ranks):
        place = layout.place(rank)
        with np.load(folder / f"gradients-{index}-{rank}.npz", allow_pickle=False) as file:
            for name in file.files:
                shards.setdefault(name, {})[place.dp, place.tp] = file[name]
    whole = {}
    for name, parts in shards.items():
        for (_, tp), shard in parts.items():
            assert np.array_equal(shard, parts[0, tp]), name
        row = [parts[0, tp] for tp in range(layout.tp)]
        if "norm" in name:
            for shard in row:
                np.testing.assert_allclose(shard, row[0], rtol=1e-5, atol=1e-8)
            whole[name] = row[0]
        else:
            is_rowwise = name.endswith(("o_proj.weight", "down_proj.weight"))
            whole[name] = np.concatenate(row, axis=1 if is_rowwise else 0)
    return whole


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny kernels on several threads of a busy machine wait for seconds
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_process() -> tuple[list[float], Gradients]:
    """Return losses and gradients of the same training without any rank but this process."""
    recipe = recipe_of(tiny_plan(tiny_layout(global_batch=BATCH)))
    trainer = Trainer(recipe, load_stream(None), torch.device("cpu"), rank=0)
    gradients: Gradients = {}

    def save(stages: Sequence[LlamaStage]) -> None:
        (stage,) = stages
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None
            gradients[name] = parameter.grad.numpy().copy()

    return run_steps(trainer, NUM_STEPS, on_gradients=save).losses, gradients


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", PLANS)
def test_layouts_train_like_one_process(
    num_ranks: int,
    one_process: tuple[list[float], Gradients],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses, gradients = one_process
    assert losses[-1] < losses[0] - 0.2
    results = run_all(num_ranks, tmp_path, monkeypatch)
    for plan, (found_losses, found) in zip(PLANS[num_ranks], results, strict=True):
        worst_loss = max(abs(a / b - 1) for a, b in zip(found_losses, losses, strict=True))
        assert found.keys() == gradients.keys(), plan.layout
        worst = max(
            float(np.linalg.norm(found[name] - gradients[name]) / np.linalg.norm(gradients[name]))
            for name in gradients
        )
        print(f"{plan.layout}: loss {worst_loss:.1e}, gradients {worst:.1e}")  # noqa: T201
        assert worst_loss < LOSS_TOLERANCE, plan.layout
        assert worst < GRADIENT_TOLERANCE, plan.layout
