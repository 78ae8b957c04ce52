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
Effective Distributed ML via a Stale Synchronous Parallel Parameter Server (NeurIPS 2013), section 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64
from simulator.fabric import Fabric
from simulator.graph import KINDS, OpCosts, Stream, TaskGraph, op_costs
from simulator.network import Link

MAX_OPS = 1 << 26


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
    _check(num_steps, compute, push, pull, update, staleness)
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
    workers, servers = range(len(step.compute)), range(step.push.shape[1])
    first_server = len(workers)
    shards = [(worker, first_server + server) for worker in workers for server in servers]
    # Each op of a step has a stream of its own, but for the updates: a server has one queue.
    streams = (
        *(Stream(worker, "compute") for worker in workers),
        *(Stream(worker, f"to {server}") for worker, server in shards),
        *(Stream(first_server + server, "update", is_queue=True) for server in servers),
        *(Stream(first_server + server, "applied") for server in servers[: len(step.applied)]),
        *(Stream(server, f"to {worker}") for worker, server in shards),
    )
    stream, kind, path = np.zeros((3, step.num_ops), np.int32)
    stream[step.compute] = np.arange(len(workers))
    ...
