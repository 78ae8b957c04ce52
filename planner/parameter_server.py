"""Training with parameter servers, as a task graph: workers compute, push, wait and pull.

In each step a worker computes its gradients and pushes a shard of them to each server, all shards
at once. A server takes the shards in one by one, in the order in which they arrive, then sends the
worker its shard of the new parameters; with all of them the worker begins its next step. How long
a server holds a pull back is the *staleness* s:

| staleness | mode | what a worker pulls after step t holds the gradients of |
| --- | --- | --- |
| 0 | bulk synchronous (BSP) | all workers up to step t |
| s > 0 | stale synchronous (SSP) | itself up to step t, all workers up to step t - s at least |
| None | asynchronous (ASP) | itself up to step t, the others as they come |

Thus no worker begins step t before all have finished step t - s - 1. Source: Ho et al., More
Effective Distributed ML via a Stale Synchronous Parallel Parameter Server (NIPS 2013).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64
from simulator.fabric import Fabric
from simulator.graph import KINDS, Int32, OpCosts, Stream, TaskGraph, op_costs
from simulator.network import Link

Column = npt.NDArray[Any]
MAX_MESSAGES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServerGraph:
    """What `simulate` takes: `num_steps` steps of W workers and S servers.

    `compute` [num_steps, W] are the ids of the ops in which the workers compute, `updates`
    [num_steps, W, S] of those in which the servers take their gradients in.
    """

    graph: TaskGraph
    costs: OpCosts
    links: tuple[Link, ...]
    compute: Int64
    updates: Int64


def server_graph(
    fabric: Fabric,
    *,
    num_steps: int,
    compute_ns: npt.ArrayLike,
    push_bytes: npt.ArrayLike,
    pull_bytes: npt.ArrayLike,
    update_ns: npt.ArrayLike,
    latency_ns: int,
    staleness: int | None,
) -> ServerGraph:
    """Return training with parameter servers over `fabric`, with workers as its ranks 0 to W - 1
    and servers as ranks W to W + S - 1.

    `compute_ns` has a number for each worker [W], or for each step too [num_steps, W]. For each
    server [S], `push_bytes` are the gradients that one worker pushes to it, `pull_bytes` the
    parameters that one worker pulls from it, and `update_ns` is the time in which it takes in the
    gradients of one worker. Every message has a latency of `latency_ns`.

    Raises ValueError for counts that do not fit together, for a negative staleness, for a rank
    that the fabric lacks and, with the op, for a time or size that is not whole and non-negative.

    >>> from simulator.engine import simulate
    >>> from simulator.fabric import star
    >>> training = server_graph(
    ...     star([1e9, 1e9]), num_steps=3, compute_ns=[100], push_bytes=[40], pull_bytes=[20],
    ...     update_ns=[5], latency_ns=0, staleness=0,
    ... )
    >>> simulate(training.graph, training.costs, links=training.links).makespan_ns
    495
    """
    compute, push, pull, update = map(np.asarray, (compute_ns, push_bytes, pull_bytes, update_ns))
    shards = {"push_bytes": push, "pull_bytes": pull, "update_ns": update}
    _check(num_steps, compute, shards, staleness)
    step = _step(compute.shape[-1], len(update), staleness)
    graph = _graph(fabric, step, num_steps)
    ns = np.zeros((num_steps, step.num_ops), np.result_type(compute, update, latency_ns))
    ns[:, step.compute] = compute
    ns[:, step.push] = ns[:, step.pull] = latency_ns
    ns[:, step.update] = update
    size_bytes = np.zeros(step.num_ops, np.result_type(push, pull))
    size_bytes[step.push], size_bytes[step.pull] = push, pull
    firsts = step.num_ops * np.arange(num_steps)
    return ServerGraph(
        graph=graph,
        costs=op_costs(graph, ns.ravel(), np.tile(size_bytes, num_steps)),
        links=fabric.links,
        compute=firsts[:, None] + step.compute,
        updates=firsts[:, None, None] + step.update,
    )


class _Step(NamedTuple):
    """The ops of one step, counted from its first, and what they wait for.

    `compute` is [W], `push`, `update` and `pull` are [W, S]. `applied` [S] ends when a server has
    taken in the gradients of all workers; it takes no time, and saves W dependencies a pull. Edge
    e says that op `waiter[e]` waits for op `dep[e]` of the step that lies `lag[e]` steps back.
    """

    compute: Int64
    push: Int64
    update: Int64
    applied: Int64
    pull: Int64
    waiter: Int64
    dep: Int64
    lag: Int64

    @property
    def num_ops(self) -> int:
        return int(self.pull[-1, -1]) + 1


def _step(num_workers: int, num_servers: int, staleness: int | None) -> _Step:
    shards = np.arange(num_workers * num_servers).reshape(num_workers, num_servers)
    compute = np.arange(num_workers)
    push = num_workers + shards
    update = push + shards.size
    applied = update[-1, -1] + 1 + np.arange(0 if staleness is None else num_servers)
    pull = update + shards.size + len(applied)
    each = np.broadcast_to
    edges = [
        (each(compute[:, None], push.shape), pull, 1),
        (push, each(compute[:, None], push.shape), 0),
        (update, push, 0),
        (pull, update, 0),
    ]
    if staleness is not None:
        edges += [
            (each(applied, update.shape), update, 0),
            (pull, each(applied, pull.shape), staleness),
        ]
    waiter = np.concatenate([waiters.ravel() for waiters, _, _ in edges])
    order = np.argsort(waiter, kind="stable")
    return _Step(
        compute=compute, push=push, update=update, applied=applied, pull=pull,
        waiter=waiter[order],
        dep=np.concatenate([deps.ravel() for _, deps, _ in edges])[order],
        lag=np.repeat([lag for _, _, lag in edges], shards.size)[order],
    )  # fmt: skip


def _graph(fabric: Fabric, step: _Step, num_steps: int) -> TaskGraph:
    num_workers, num_servers = step.push.shape
    workers, servers = range(num_workers), range(num_workers, num_workers + num_servers)
    pairs = [(worker, server) for worker in workers for server in servers]
    shards = np.arange(len(pairs))
    counts = [len(workers), len(pairs), len(pairs), len(step.applied), len(pairs)]
    # Every op of a step has a stream of its own, but for the updates: a server has one queue.
    first = np.cumsum([0, len(workers), len(pairs), len(servers), len(step.applied)])
    stream = np.repeat(first, counts)
    stream[step.compute] += np.arange(num_workers)
    stream[step.push] += step.push - step.push[0, 0]
    stream[step.update] += np.arange(num_servers)
    stream[step.applied] += np.arange(len(step.applied))
    stream[step.pull] += step.pull - step.pull[0, 0]
    kinds = [KINDS.index(kind) for kind in ("backward", "push", "optimizer", "other", "pull")]
    path = np.full(step.num_ops, -1, np.int32)
    path[step.push] = shards.reshape(num_servers, num_workers).T
    path[step.pull] = len(pairs) + shards.reshape(num_workers, num_servers)
    deps, dep_offsets = _dependencies(step, num_steps)
    return TaskGraph(
        streams=(
            *(Stream(worker, "compute") for worker in workers),
            *(Stream(worker, f"to {server}") for worker, server in pairs),
            *(Stream(server, "update", is_queue=True) for server in servers),
            *(Stream(server, "applied") for server in servers[: len(step.applied)]),
            *(Stream(server, f"to {worker}") for worker, server in pairs),
        ),
        names=_Names(step, num_steps),
        stream=np.tile(stream.astype(np.int32), num_steps),
        kind=np.tile(np.repeat(np.array(kinds, np.int8), counts), num_steps),
        deps=deps,
        dep_offsets=dep_offsets,
        meet=np.full(num_steps * step.num_ops, -1, np.int32),
        path=np.tile(path, num_steps),
        paths=(
            *(fabric.path(worker, server) for server in servers for worker in workers),
            *(fabric.path(server, worker) for worker, server in pairs),
        ),
    )


def _dependencies(step: _Step, num_steps: int) -> tuple[Int32, Int32]:
    """Return dependencies and offsets of all ops; those on steps before the first fall away."""
    steps = np.arange(num_steps)[:, None]
    exists = steps >= step.lag
    deps = ((steps - step.lag) * step.num_ops + step.dep)[exists]
    waiters = (steps * step.num_ops + step.waiter)[exists]
    counts = np.bincount(waiters, minlength=num_steps * step.num_ops)
    offsets = np.concatenate(([0], np.cumsum(counts)))
    return deps.astype(np.int32), offsets.astype(np.int32)


class _Names(Sequence[str]):
    """Names of the ops, made when they are asked for."""

    def __init__(self, step: _Step, num_steps: int) -> None:
        self._step, self._num_steps = step, num_steps

    def __len__(self) -> int:
        return self._step.num_ops * self._num_steps

    def __getitem__(self, op_id):  # type: ignore[no-untyped-def]
        if isinstance(op_id, slice):
            return [self[i] for i in range(*op_id.indices(len(self)))]
        step = self._step
        number, place = divmod(range(len(self))[op_id], step.num_ops)
        if place < step.push[0, 0]:
            return f"step {number}"
        if place < step.update[0, 0]:
            return f"push {number}"
        if place <= step.update[-1, -1]:
            worker = (place - step.update[0, 0]) // step.update.shape[1]
            return f"update {number} of {worker}"
        return f"applied {number}" if place < step.pull[0, 0] else f"pull {number}"


def _check(
    num_steps: int, compute: Column, shards: Mapping[str, Column], staleness: int | None
) -> None:
    """Raise ValueError for counts that do not fit together; see `server_graph`."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if staleness is not None and staleness < 0:
        raise ValueError(f"staleness is {staleness}; it must be at least 0, or None for no bound")
    is_per_step = compute.ndim == 2 and len(compute) == num_steps
    if not compute.size or not (compute.ndim == 1 or is_per_step):
        raise ValueError(
            f"compute_ns has shape {compute.shape}; it needs a number for each worker, or "
            f"{num_steps} rows of them, one a step"
        )
    if {(column.ndim, bool(column.size)) for column in shards.values()} != {(1, True)} or (
        len({column.size for column in shards.values()}) > 1
    ):
        found = ", ".join(f"{name} has shape {column.shape}" for name, column in shards.items())
        raise ValueError(f"{found}; each needs a number for each server")
    num_messages = num_steps * compute.shape[-1] * shards["push_bytes"].size
    if num_messages > MAX_MESSAGES:
        raise ValueError(
            f"{num_steps} steps of {compute.shape[-1]} workers and {shards['push_bytes'].size} "
            f"servers are {num_messages} pushes; simulate {MAX_MESSAGES} at most"
        )
