"""A pipeline on a fabric: which links its messages cross, and with how many equal replicas."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64, whole_numbers
from simulator.fabric import Fabric
from simulator.graph import OpCosts, TaskGraph
from simulator.network import Link
from simulator.step import SEND_B, SEND_F, LoweredStep


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Where a pipeline stands: pipeline rank r is rank `ranks[r]` of `fabric`.

    `forward_bytes` and `backward_bytes` are what a message of each stage [S], or of all, carries.
    `replicas` equal pipelines stand side by side and send over the same links at the same time;
    one of them is simulated, and each of its messages weighs that much.
    """

    fabric: Fabric
    ranks: Sequence[int]
    forward_bytes: npt.ArrayLike
    backward_bytes: npt.ArrayLike
    replicas: int = 1


def place(
    step: LoweredStep, costs: OpCosts, placement: Placement
) -> tuple[TaskGraph, OpCosts, tuple[Link, ...]]:
    """Return the graph and the costs of `step` with its messages on the links of a fabric.

    Raises ValueError for another number of ranks than the pipeline has, for bytes that are not
    whole and non-negative, and for less than one replica.
    """
    graph, ranks = step.graph, list(placement.ranks)
    num_ranks = len({stream.rank for stream in graph.streams})
    if len(ranks) != num_ranks or len(set(ranks)) != num_ranks:
        raise ValueError(f"placement.ranks is {ranks}; it needs {num_ranks} different ranks")
    if placement.replicas < 1:
        raise ValueError(f"placement.replicas is {placement.replicas}; it must be at least 1")
    is_message = (step.part == SEND_F) | (step.part == SEND_B)
    used = np.unique(graph.stream[is_message])
    ways = [(graph.streams[i].rank, int(graph.streams[i].name.split()[-1])) for i in used]
    paths = tuple(
        placement.fabric.path(ranks[here], ranks[there], placement.replicas) for here, there in ways
    )
    # Ranks that nothing limits between them need no path; the latency is all there is.
    numbers = np.cumsum([bool(path) for path in paths]) - 1
    place_of = np.full(len(graph.streams), -1, np.int32)
    place_of[used] = [number if path else -1 for number, path in zip(numbers, paths, strict=True)]
    path = np.where(is_message, place_of[graph.stream], -1).astype(np.int32)
    num_stages = int(step.stage.max()) + 1
    sizes = np.stack(
        [
            _by_stage("forward", placement.forward_bytes, num_stages),
            _by_stage("backward", placement.backward_bytes, num_stages),
        ]
    )
    way = (step.part == SEND_B).astype(np.int64)
    size_bytes = np.where(path >= 0, sizes[way, step.stage], 0)
    placed = replace(graph, path=path, paths=tuple(filter(None, paths)))
    return placed, OpCosts(ns=costs.ns, size_bytes=size_bytes), placement.fabric.links


def _by_stage(name: str, size_bytes: npt.ArrayLike, num_stages: int) -> Int64:
    def name_of(stage: int) -> str:
        return f"placement: the {name} message of stage {stage}"

    return whole_numbers(size_bytes, num_stages, name_of, "has", "bytes")
