"""What one rank holds of a tensor: the tensor itself, or its part of a DTensor."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of `tensor`: the tensor itself, or the shard of a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of `full` that this rank holds of `parameter`, which is cut evenly."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis, placement in enumerate(parameter.placements):
            if placement.is_shard():
                dim: int = placement.dim  # type: ignore[attr-defined]
                full = full.chunk(mesh.size(axis), dim)[mesh.get_local_rank(axis)]
    return full


def as_parameter_shard(shard: Tensor, parameter: Tensor) -> Tensor:
    """Return `shard` in the form of `parameter`: itself, or as this rank's part of a DTensor."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
