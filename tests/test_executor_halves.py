"""A backward in halves: the same gradients, the matrices' at the second half and not before."""

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from executor.data import load_stream
from executor.gradients import GradientBuckets
from executor.halves import Linear
from executor.model import LlamaStage
from executor.recipe import recipe_of
from executor.train import Trainer, run_steps
from planner.kernels import StageShape
from planner.memory import layer_activation_bytes
from profiles.model import ModelSpec
from tests.plans import TINY, tiny_layout, tiny_plan

SEQ_LEN = 32
NUM_BACKWARDS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny kernels on several threads of a busy machine wait for seconds
    yield
    torch.set_num_threads(before)


def stage(splits_backward: bool, spec: ModelSpec = TINY, is_last: bool = True) -> LlamaStage:
    with torch.device("meta"):
        built = LlamaStage(spec, range(spec.num_layers), is_last, is_last, splits_backward)
    built.materialise(0, SEQ_LEN, torch.device("cpu"), torch.float32)
    return built


def losses(of: LlamaStage) -> Iterator[Tensor]:
    for seed in range(NUM_BACKWARDS):
        tokens = torch.randint(256, (2, SEQ_LEN), generator=torch.Generator().manual_seed(seed))
        yield of(tokens).square().mean()


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def matrices(of: LlamaStage) -> list[Tensor]:
    return [module.weight for module in of.modules() if isinstance(module, Linear)]


def test_both_halves_together_are_the_whole() -> None:
    whole, split = stage(splits_backward=False), stage(splits_backward=True)
    for loss in losses(whole):
        backward(loss)
    late = []
    for loss in losses(split):
        backward(loss)
        late.append(split.weight_half.take())
    assert all(weight.grad is None for weight in matrices(split))
    assert all(p.grad is not None for name, p in split.named_parameters() if "norm" in name)
    for weight_half in late:
        weight_half()
    expected = dict(whole.named_parameters())
    for name, parameter in split.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-8)


def test_a_tied_head_is_not_split_from_its_embedding() -> None:
    split = stage(splits_backward=True, spec=replace(TINY, tied_embeddings=True))
    assert split.lm_head is not None and split.lm_head.weight_half is None
    backward(next(losses(split)))
    assert split.lm_head.weight.grad is not None


def test_what_waits_is_less_than_the_memory_model_holds_until_the_weight_half() -> None:
    split = stage(splits_backward=True, is_last=False)
    x = torch.randn(2, SEQ_LEN, TINY.hidden, requires_grad=True)
    backward(split(x).square().sum())
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for product in split.weight_half._waiting
        for tensor in (product.x, product.gradient)
    }
    shape = StageShape(model=TINY, tp=1, micro_batch=2, seq_len=SEQ_LEN)
    widths = 4 * TINY.hidden + 2 * shape.q_width + 2 * shape.kv_width + 3 * TINY.ffn
    assert sum(held.values()) == TINY.num_layers * shape.rows * widths * 4
    activations = layer_activation_bytes(shape, 4, fuses_norms=True)
    assert sum(held.values()) < TINY.num_layers * activations


def test_buckets_overlap_with_weight_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    split = stage(splits_backward=True)
    all_reduce = Mock(return_value=Mock())
    monkeypatch.setattr("executor.gradients.dist.all_reduce", all_reduce)
    buckets = GradientBuckets(
        [split], Mock(), num_backwards=NUM_BACKWARDS, bucket_bytes=100_000, overlaps=True
    )
    launched = []
    for loss in losses(split):
        backward(loss)
        launched.append(all_reduce.call_count)
        split.weight_half.take()()
    assert launched == [0] * NUM_BACKWARDS
    num_buckets = all_reduce.call_count
    assert num_buckets > 1
    buckets.reduce()
    assert all_reduce.call_count == num_buckets


def test_one_rank_trains_the_same_in_halves() -> None:
    found, stream = [], load_stream(None)
    for schedule in ("1f1b", "zb_h1"):
        layout = tiny_layout(schedule=schedule, global_batch=4)
        recipe = recipe_of(tiny_plan(layout, seq_len=8))
        trainer = Trainer(recipe, stream, torch.device("cpu"), rank=0)
        found.append(run_steps(trainer, 2))
    assert found[1].losses == pytest.approx(found[0].losses, rel=1e-6)
    names = [str(piece.action) for piece in found[1].traces[-1].pieces if piece.action]
    assert names == [str(action) for action in recipe.schedule.ranks[0]]
