"""The memory model's activations against what autograd really saves."""

import pytest
import torch
from torch import Tensor

from executor.model import LlamaStage
from planner.kernels import StageShape
from planner.memory import head_activation_bytes, layer_activation_bytes
from profiles.model import ModelSpec

SPEC = ModelSpec(
    name="tiny", num_layers=3, hidden=64, num_heads=4, num_kv_heads=2, head_size=16, ffn=160,
    vocab=256, max_seq_len=64,
)  # fmt: skip


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_activations_are_what_autograd_saves(micro_batch: int) -> None:
    with torch.device("meta"):
        stage = LlamaStage(SPEC, range(SPEC.num_layers), True, True)
    stage.materialise(0, 32, torch.device("cpu"), torch.float32)
    known = {tensor.untyped_storage().data_ptr() for tensor in stage.state_dict().values()}
    tokens = torch.randint(SPEC.vocab, (micro_batch, 32))
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = stage(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert loss.isfinite()
    shape = StageShape(model=SPEC, tp=1, micro_batch=micro_batch, seq_len=32)
    layers = SPEC.num_layers * layer_activation_bytes(shape, 4, fuses_norms=False)
    expected = layers + head_activation_bytes(shape, 4, fuses_norms=False)
    assert sum(saved.values()) == pytest.approx(expected, rel=0.02)
