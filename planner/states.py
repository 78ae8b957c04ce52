"""The states of a rank: weights, gradients and optimizer, by how replicas share them."""

from functools import lru_cache
from typing import NamedTuple, Self

from planner.layout import Layout
from profiles.model import ModelSpec
from profiles.stack import Sharding, StackSpec


class Weights(NamedTuple):
    """Parameters on one rank, experts apart, and of its largest unit that is gathered at once."""

    dense: int
    experts: int
    largest_unit: int

    @property
    def whole(self) -> int:
        """All of them."""
        return self.dense + self.experts

    @classmethod
    def of(
        cls, model: ModelSpec, layout: Layout, num_layers: int, *, is_first: bool, is_last: bool
    ) -> Self:
        """Return what a rank of `num_layers` layers holds: matrices divided by tp, norms whole.

        Tied embeddings that lie on two ranks are two copies.
        """
        tp, norm = layout.tp, model.hidden * (2 if model.norm == "layernorm" else 1)
        expert = model.num_experts * model.num_mlp_parameters
        layer = (model.num_layer_parameters - expert - 2 * norm) // tp + 2 * norm
        routed = expert // layout.ep // tp
        table, ends = model.vocab // tp * model.hidden, 0
        if is_first:
            ends = table + model.num_embedding_parameters - model.vocab * model.hidden
        if is_last:
            ends += norm + (0 if model.tied_embeddings and is_first else table)
        return cls(num_layers * layer + ends, num_layers * routed, max(layer + routed, ends))


class Shares(NamedTuple):
    """How replicas share the states of a stage, of parameters of `element` bytes.

    The widths are those of `StackSpec`, in bytes a parameter, with the defaults filled in.
    """

    sharding: Sharding
    ranks: int
    replicas: int
    ep: int
    element: int
    gradient: int
    reduction: int
    master: int
    moments: int
    bucket_bytes: int
    is_flat: bool
    offloads: bool

    @classmethod
    def of(cls, layout: Layout, element: int, stack: StackSpec) -> Self:
        """Return the shares of `layout` under `stack`."""
        return cls(
            sharding=layout.sharding,
            ranks=layout.shard_ranks,
            replicas=layout.replicas,
            ep=layout.ep,
            element=element,
            gradient=stack.gradient_bytes or element,
            reduction=stack.reduction_bytes or element,
            master=stack.master_bytes,
            moments=stack.moment_bytes or 2 * element,
            bucket_bytes=stack.gradient_bucket_bytes,
            is_flat=stack.uses_flat_buffers,
            offloads=stack.offloads_optimizer,
        )


class States(NamedTuple):
    """What one rank holds in any case, and what its update of the weights takes on top.

    `host` is what the host holds for it.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    update: int
    host: int


@lru_cache(maxsize=1 << 16)
def states_of(weights: Weights, by: Shares) -> States:
    """Return the states of a rank with `weights`.

    Under zero3 the master copy is what is sharded and gathered, where there is one on the GPU. An
    update of a master copy from gradients in another dtype converts its shard of them. A host that
    does the update holds its own copy of parameters, moments and gradients.
    """
    stage = ("none", "zero1", "zero2", "zero3").index(by.sharding)
    whole = weights.whole
    share = weights.dense // by.ranks + weights.experts // max(by.ranks // by.ep, 1)
    is_master_here = by.master > 0 and not by.offloads
    parameters = whole if stage < 3 else 0 if is_master_here else share
    converted = 4 * share if is_master_here and by.gradient != 4 else 0
    host = share * ((by.master or by.element) + by.moments + by.gradient)
    return States(
        parameters=parameters * by.element,
        gradients=(whole if stage < 2 else share) * by.gradient,
        optimizer=0 if by.offloads else share * (by.master + by.moments),
        buffers=_bucket_bytes(weights, by) + _staging_bytes(share, by),
        update=converted + _gathered_bytes(whole, share, by),
        host=host if by.offloads else 0,
    )


def _bucket_bytes(weights: Weights, by: Shares) -> int:
    """Return the buffers of the traffic among replicas.

    Under zero2 and zero3 two units are in whole at a time, one in use and one on its way: their
    gradients, and under zero3 their parameters. Otherwise it is one bucket in each direction, or
    without flat buffers all buckets of the gradients.
    """
    if by.sharding in ("zero2", "zero3"):
        width = by.reduction + (by.element if by.sharding == "zero3" else 0)
        return 2 * weights.largest_unit * width
    if not by.is_flat:
        return weights.whole * by.element if by.replicas > 1 else 0
    if by.ranks == 1:
        return 0
    return 2 * min(by.bucket_bytes, weights.whole * by.element)


def _staging_bytes(share: int, by: Shares) -> int:
    """Return a bucket of gradients on its way to the host, and one of parameters on the way up."""
    if not by.offloads:
        return 0
    return min(by.bucket_bytes, share * by.gradient) + min(by.bucket_bytes, share * by.element)


def _gathered_bytes(whole: int, share: int, by: Shares) -> int:
    """Return the copy into which updated shards are gathered where buffers are not flat."""
    if by.is_flat or by.sharding in ("none", "zero3") or by.ranks == 1:
        return 0
    return (whole + share) * by.element
