"""Which layers go to which pipeline stage."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from profiles.model import ModelSpec
from profiles.stack import Partition
from simulator.checks import Int64

Homes = Literal["loop", "v"]
"""Where stages live: stage s on rank s modulo the ranks, or down the ranks and up again."""
Floats = npt.NDArray[np.float64]


def homes_of(num_ranks: int, stages_per_rank: int, shape: Homes) -> Int64:
    """Return the rank of each stage.

    >>> homes_of(3, 2, "loop").tolist(), homes_of(3, 2, "v").tolist()
    ([0, 1, 2, 0, 1, 2], [0, 1, 2, 2, 1, 0])
    """
    turns = np.tile(np.arange(num_ranks), (stages_per_rank, 1))
    if shape == "v":
        turns[1::2] = turns[1::2, ::-1]
    return np.ascontiguousarray(turns.ravel(), np.int64)


def deal(num_layers: int, layer_ns: Floats, extra_ns: Floats, least: int = 1) -> Int64:
    """Return how many of `num_layers` equal layers each of P places takes, [R, P], for R cases.

    A place with n layers takes n `layer_ns` [R], or [R, P] where places differ, + `extra_ns`
    [R, P], and has `least` layers at least. The slowest place is as fast as it can be: the counts
    start where all would be equal if layers could be cut, at (layers + sum of extra / layer) / (sum
    of 1 / layer), and each further layer goes where the place stays fastest (or leaves the
    slowest). In the end no place that could have fewer layers is slower than any other with a layer
    more, which no other division betters. Ties go to later places, which keep fewer micro-batches
    alive under 1F1B.

    >>> deal(9, np.array([10.0]), np.array([[0.0, 0.0, 0.0, 12.0]])).tolist()
    [[2, 3, 3, 1]]
    >>> deal(9, np.array([[10.0, 20.0]]), np.zeros((1, 2))).tolist()
    [[6, 3]]
    """
    cases, places = np.arange(len(extra_ns)), extra_ns.shape[1]
    if num_layers < least * places:
        raise ValueError(f"{num_layers} layers for {places} places of {least} layers at least")
    layer = np.maximum(layer_ns, 1e-9).reshape(len(extra_ns), -1)
    layer = np.broadcast_to(layer, extra_ns.shape)
    # In layers of the first place, of which others count for more or less.
    first, worth, longer = layer[:, :1], layer[:, :1] / layer, layer - layer[:, :1]
    level = (num_layers * first + (extra_ns * worth).sum(axis=1, keepdims=True)) / worth.sum(
        axis=1, keepdims=True
    )
    most = num_layers - least * (places - 1)
    counts = np.clip(np.floor((level - extra_ns) / layer), least, most).astype(np.int64)
    while (missing := num_layers - counts.sum(axis=1)).any():
        cost = counts * layer + extra_ns
        gains, loses = missing > 0, missing < 0
        # The last place among equals, in the order of the places.
        fastest = places - 1 - np.argmin((cost + longer)[:, ::-1], axis=1)
        slowest = np.argmax(np.where(counts > least, cost, -np.inf), axis=1)
        counts[cases[gains], fastest[gains]] += 1
        counts[cases[loses], slowest[loses]] -= 1
    return np.asarray(counts)


def dealt_stages(
    num_layers: int,
    homes: Int64,
    layer_ns: Floats,
    first_ns: Floats,
    last_ns: Floats,
    least: int = 1,
) -> Int64:
    """Return the layers of each stage, [R, S], for R cases of stages that live at `homes` [S].

    The slowest rank is as fast as it can be, and so is the slowest stage of each rank. The first
    stage also takes `first_ns` [R], the last one `last_ns` [R]; `layer_ns` is [R], or [R, P] where
    the P ranks differ.

    >>> one = np.ones(1)
    >>> dealt_stages(9, homes_of(2, 2, "v"), one, 0 * one, 2 * one).tolist()
    [[2, 3, 3, 1]]
    """
    num_ranks = int(homes.max()) + 1
    chunks = len(homes) // num_ranks
    extra = np.zeros((len(layer_ns), len(homes)))
    extra[:, 0] += first_ns
    extra[:, -1] += last_ns
    stages = np.argsort(homes, kind="stable").reshape(num_ranks, chunks)
    by_rank = extra[:, stages]
    layer_ns = np.broadcast_to(layer_ns.reshape(len(layer_ns), -1), by_rank.shape[:2])
    totals = deal(num_layers, layer_ns, by_rank.sum(axis=2), least * chunks)
    counts = np.empty((len(layer_ns), len(homes)), np.int64)
    for rank, own in enumerate(stages):
        for total in np.unique(totals[:, rank]):
            cases = totals[:, rank] == total
            counts[np.ix_(cases, own)] = deal(
                int(total), layer_ns[cases, rank], by_rank[cases, rank], least
            )
    return counts


def stages_by_rule(model: ModelSpec, num_stages: int, rule: Partition) -> tuple[int, ...]:
    """Return the layers of each stage as software that follows `rule` splits them.

    `even` gives the first stages one more where the layers do not divide; `slots` counts the
    embedding and the head as a layer each (Megatron-Core's account_for_embedding_in_pipeline_split,
    DeepSpeed's `type:transformer|embedding`); `cost` fills stage after stage until its share of all
    matrix parameters, the head's included, is reached (nanotron's build_model).

    >>> from profiles.presets import model_preset
    >>> model = model_preset("llama-3.1-405b")
    >>> stages_by_rule(model, 64, "slots")[:2], stages_by_rule(model, 64, "slots")[-1]
    ((1, 2), 1)
    """
    if num_stages == 1:
        return (model.num_layers,)
    if rule == "slots":
        base, more = divmod(model.num_layers + 2, num_stages)
        slots = [base + (stage < more) for stage in range(num_stages)]
        return (slots[0] - 1, *slots[1:-1], slots[-1] - 1)
    if rule == "cost":
        return _filled(model, num_stages)
    base, more = divmod(model.num_layers, num_stages)
    return tuple(base + (stage < more) for stage in range(num_stages))


def _filled(model: ModelSpec, num_stages: int) -> tuple[int, ...]:
    attention = 4 * model.num_heads * model.head_size * model.hidden
    layer = attention + model.num_mlp_parameters
    whole = model.num_layers * layer + model.vocab * model.hidden
    counts, stage, passed = [0] * num_stages, 0, 0
    for _ in range(model.num_layers):
        counts[stage] += 1
        passed += layer
        if passed * num_stages >= whole * (stage + 1) and stage < num_stages - 1:
            stage += 1
    return tuple(counts)
