"""Layouts on real ranks: the device mesh, tensor parallelism, pipeline stages, gradient buckets."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from executor.gradients import GradientBuckets
from executor.model import LlamaStage
from executor.recipe import Recipe
from executor.shards import local
from planner.layout import Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Workload dtypes: parameters, gradients, optimizer state and activations all have it."""


def make_mesh(layout: Layout, device: torch.device) -> DeviceMesh | None:
    """Return the (pp, dp, tp) mesh of the joined ranks in the rank order of `Layout`.

    One rank alone needs no mesh and gets None.
    """
    if layout.num_ranks == 1:
        return None
    return init_device_mesh(
        device.type, (layout.pp, layout.dp, layout.tp), mesh_dim_names=("pp", "dp", "tp")
    )


def axis_group(mesh: DeviceMesh | None, axis: str) -> dist.ProcessGroup | None:
    """Return the process group of this rank along `axis`, None where it would be alone."""
    if mesh is None or mesh[axis].size() == 1:
        return None
    return mesh[axis].get_group()


def build_stages(recipe: Recipe, pp_index: int, mesh: DeviceMesh | None) -> dict[int, LlamaStage]:
    """Return this rank's shards of the stages of pipeline rank `pp_index`, by number, in order.

    They are on the meta device, without storage and first values.
    """
    homes = recipe.schedule.homes.tolist()
    return {
        stage: _build_stage(recipe, stage, mesh)
        for stage, home in enumerate(homes)
        if home == pp_index
    }


def _build_stage(recipe: Recipe, number: int, mesh: DeviceMesh | None) -> LlamaStage:
    """Return this rank's shard of stage `number`, on the meta device."""
    layout = recipe.layout
    before = sum(layout.stage_layers[:number])
    with torch.device("meta"):
        stage = LlamaStage(
            recipe.model,
            range(before, before + layout.stage_layers[number]),
            is_first=number == 0,
            is_last=number == layout.num_stages - 1,
            splits_backward=recipe.schedule.splits_backward,
        )
    if mesh is not None and layout.tp > 1:
        shard_tensors(stage, mesh["tp"])
    return stage


def shard_tensors(stage: LlamaStage, mesh: DeviceMesh) -> None:
    """Turn the matrices of `stage` into DTensors over the one-dimensional `mesh`.

    Column-wise: q, k, v, gate, up and the LM head (each rank has some heads, some of the
    feed-forward width, some of the vocabulary). Row-wise: o and down. The embedding is cut by
    vocabulary. The input of an attention and of an MLP becomes a replicated DTensor once, so that
    the partial gradients of q, k and v (of gate and up) add up before one all-reduce: two
    all-reduces a layer forward, two backward. Norms are replicated plain tensors; their gradients
    are equal on all ranks because what flows into them has been reduced.
    """
    whole = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    styles: dict[str, ParallelStyle] = {
        "layers.*.self_attn": whole,
        "layers.*.self_attn.q_proj": ColwiseParallel(),
        "layers.*.self_attn.k_proj": ColwiseParallel(),
        "layers.*.self_attn.v_proj": ColwiseParallel(),
        "layers.*.self_attn.o_proj": RowwiseParallel(),
        "layers.*.mlp": whole,
        "layers.*.mlp.gate_proj": ColwiseParallel(),
        "layers.*.mlp.up_proj": ColwiseParallel(),
        "layers.*.mlp.down_proj": RowwiseParallel(),
        # The logits stay sharded: the loss is computed by all ranks (`loss_parallel`).
        "lm_head": ColwiseParallel(use_local_output=False),
    }
    if stage.lm_head is None:
        del styles["lm_head"]
    # Parameters are still on the meta device: there is nothing to scatter from a source rank.
    parallelize_module(stage, mesh, styles, src_data_rank=None)
    if stage.embed_tokens is not None:
        stage.embed_tokens = ShardedEmbedding(stage.embed_tokens, mesh)
    stage.tie()


class ShardedEmbedding(nn.Embedding):
    """An embedding that holds V / tp of the vocabulary on each rank of a one-dimensional mesh.

    PyTorch's RowwiseParallel does the same forward, but its backward makes the gradient of the
    whole vocabulary on every rank.
    """

    def __init__(self, whole: nn.Embedding, mesh: DeviceMesh) -> None:
        super().__init__(whole.num_embeddings, whole.embedding_dim, _weight=whole.weight)
        self._mesh = mesh
        shard = distribute_tensor(whole.weight, mesh, [Shard(0)], src_data_rank=None)
        self.weight = nn.Parameter(shard)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [B, S, D] of `ids` [B, S]: own rows, summed with those of the others."""
        table = local(self.weight)  # [V / tp, D]
        own = ids - self._mesh.get_local_rank() * table.shape[0]
        foreign = (own < 0) | (own >= table.shape[0])
        rows = F.embedding(own.masked_fill(foreign, 0), table)
        partial = rows.masked_fill(foreign.unsqueeze(-1), 0.0)
        whole = DTensor.from_local(partial, self._mesh, [Partial()], run_check=False)
        return whole.redistribute(placements=[Replicate()]).to_local()


def bucket_gradients(
    recipe: Recipe, stages: Sequence[LlamaStage], mesh: DeviceMesh | None
) -> GradientBuckets | None:
    """Return the gradient buckets of `stages` as the recipe's stack wants them, None without dp."""
    group = axis_group(mesh, "dp")
    if group is None:
        return None
    return GradientBuckets(
        stages,
        group,
        num_backwards=recipe.layout.num_microbatches,
        bucket_bytes=recipe.stack.gradient_bucket_bytes,
        overlaps=recipe.stack.overlaps_gradients,
    )
