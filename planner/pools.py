"""Pools of unlike nodes: which of them each rank of a pipeline lies in.

Ranks are counted pool by pool. Where the pipeline is the outermost axis of the mesh, each of its
ranks is a block of n = dp * cp * tp neighbours; where n divides the GPUs of every pool, none of
these blocks lies in two, and a pool of g GPUs holds g / n pipeline ranks, one after the other.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from planner.layout import DEFAULT_ORDER
from profiles.cluster import ClusterSpec, PoolSpec

OUTERMOST = DEFAULT_ORDER.rpartition("-")[2]
"""The axis along which a mesh may go from pool to pool."""


def unlike_pools(cluster: ClusterSpec) -> tuple[PoolSpec, ...]:
    """Return the pools of `cluster`; neighbours that differ in nothing but their size are one.

    >>> from profiles.presets import cluster_preset
    >>> two = cluster_preset("h100-sxm", num_nodes=2)
    >>> [p.num_nodes for p in unlike_pools(replace(two, pools=two.pools * 2))]
    [4]
    """
    found: list[PoolSpec] = []
    for pool in cluster.pools:
        if found and replace(found[-1], num_nodes=pool.num_nodes) == pool:
            found[-1] = replace(pool, num_nodes=found[-1].num_nodes + pool.num_nodes)
        else:
            found.append(pool)
    return tuple(found)


def misfit(pools: Sequence[PoolSpec], stage_ranks: int, order: str) -> str:
    """Return why stages of `stage_ranks` do not each lie in one of `pools`, empty if they do.

    `order` is that of the axes of the mesh. Without unlike pools any layout does.
    """
    if not pools:
        return ""
    if order.rpartition("-")[2] != OUTERMOST:
        return (
            f"order is {order}; over unlike pools {OUTERMOST} must be its last axis, as in "
            f"{DEFAULT_ORDER}"
        )
    sizes = [pool.num_gpus for pool in pools]
    if all(size % stage_ranks == 0 for size in sizes):
        return ""
    return (
        f"dp x cp x tp is {stage_ranks}, but the pools have {' and '.join(map(str, sizes))} GPUs; "
        f"a stage lies in one pool, so that it must divide {math.gcd(*sizes)}"
    )


def limits_bytes(cluster: ClusterSpec, pp: int) -> tuple[int, ...]:
    """Return the memory of the GPUs of each of `pp` pipeline ranks, in bytes.

    It is that of the smallest GPU wherever a rank need not lie in one pool.
    """
    pools, stage_ranks = unlike_pools(cluster), cluster.num_ranks // pp
    least = min(pool.gpu.memory_bytes for pool in pools)
    if len(pools) == 1 or misfit(pools, stage_ranks, DEFAULT_ORDER):
        return (least,) * pp
    return tuple(pools[place].gpu.memory_bytes for place in pools_of_ranks(pools, pp))


def pools_of_ranks(pools: Sequence[PoolSpec], pp: int) -> tuple[int, ...]:
    """Return the place of the pool of each of `pp` pipeline ranks.

    >>> from profiles.presets import cluster_preset
    >>> few, many = (cluster_preset(name).pools[0] for name in ("h100-sxm", "a100-sxm-80gb"))
    >>> pools_of_ranks((few, replace(many, num_nodes=2)), 6)
    (0, 0, 1, 1, 1, 1)
    """
    num_ranks = sum(pool.num_gpus for pool in pools)
    return tuple(
        place for place, pool in enumerate(pools) for _ in range(pp * pool.num_gpus // num_ranks)
    )
