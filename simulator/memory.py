"""Memory over time: what the ops of each rank allocate and free, along a simulation."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.checks import Int64, whole_numbers
from simulator.engine import Simulation
from simulator.schedule import B, F, I, W
from simulator.step import LoweredStep


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryCurve:
    """`alive_bytes[i]` are alive on a rank from `times_ns[i]` on; the first time is 0."""

    times_ns: Int64
    alive_bytes: Int64

    @property
    def peak_bytes(self) -> int:
        """The most that is ever alive."""
        return int(self.alive_bytes.max())


def memory_curves(
    simulation: Simulation,
    allocated_bytes: npt.ArrayLike,
    freed_bytes: npt.ArrayLike,
    static_bytes: Mapping[int, int] | int = 0,
) -> dict[int, MemoryCurve]:
    """Return what is alive on each rank over time, in rising order of ranks.

    An op holds `allocated_bytes` [N] more from its start on and `freed_bytes` [N] less from its
    end on; one number stands for all ops. `static_bytes` are there all the time: one number, or
    one a rank. What is freed at a moment makes room for what is allocated at the same moment.

    Raises ValueError for bytes that are no whole number from 0 on, and for a rank that frees what
    it does not hold.

    >>> from simulator.engine import simulate
    >>> from simulator.graph import Op, task_graph
    >>> forward = Op(id=0, rank=0, stream="compute", name="0F0", kind="forward")
    >>> backward = Op(id=1, rank=0, stream="compute", name="0B0", kind="backward")
    >>> done = simulate(task_graph((forward, backward)), [10, 20])
    >>> curve = memory_curves(done, [5, 0], [0, 5], static_bytes=100)[0]
    >>> curve.times_ns.tolist(), curve.alive_bytes.tolist()
    ([0, 30], [105, 100])
    """
    graph = simulation.graph
    allocated = whole_numbers(allocated_bytes, len(graph), graph.label, "allocates", "bytes")
    freed = whole_numbers(freed_bytes, len(graph), graph.label, "frees", "bytes")
    rank = np.tile(np.array([stream.rank for stream in graph.streams], np.int64)[graph.stream], 2)
    moment = np.concatenate((simulation.starts_ns, simulation.ends_ns))
    change = np.concatenate((allocated, -freed))
    changes = np.flatnonzero(change)
    changes = changes[np.lexsort((moment[changes], rank[changes]))]
    curves = {}
    for name in sorted({stream.rank for stream in graph.streams}):
        static = static_bytes if isinstance(static_bytes, int) else static_bytes.get(name, 0)
        own = changes[slice(*np.searchsorted(rank[changes], [name, name + 1]))]
        curves[name] = _curve(name, static, moment[own], change[own])
    return curves


def _curve(rank: int, static: int, moment_ns: Int64, change: Int64) -> MemoryCurve:
    """Return the curve of one rank, whose moments rise."""
    times, place = np.unique(np.concatenate(([0], moment_ns)), return_inverse=True)
    alive = np.zeros(len(times), np.int64)
    np.add.at(alive, place, np.concatenate(([static], change)))
    alive = np.cumsum(alive)
    if (alive < 0).any():
        first = int(np.argmax(alive < 0))
        raise ValueError(
            f"rank {rank} frees {-alive[first]} bytes more than it holds at {times[first]} ns"
        )
    is_new = np.diff(alive, prepend=-1) != 0
    return MemoryCurve(times_ns=times[is_new], alive_bytes=alive[is_new])


def activation_changes(
    step: LoweredStep,
    activation_bytes: npt.ArrayLike,
    weight_bytes: npt.ArrayLike | None = None,
) -> tuple[Int64, Int64]:
    """Return what each op of a step allocates and frees of activations, [N] each.

    A forward keeps `activation_bytes` of its stage, one number or [S], until the backward of its
    micro-batch has ended. Of a backward in halves the input half frees all but `weight_bytes` (all
    are kept if not given), and the weight half the rest. Raises ValueError that names the stage for
    a number that is not whole or negative, and for halves that keep more than there is.
    """
    num_stages = int(step.stage.max()) + 1

    def of_stages(values: npt.ArrayLike, verb: str) -> Int64:
        return whole_numbers(values, num_stages, lambda s: f"forward of stage {s}", verb, "bytes")

    whole = of_stages(activation_bytes, "keeps")
    kept = whole if weight_bytes is None else of_stages(weight_bytes, "keeps for the weight half")
    if (kept > whole).any():
        stage = int(np.argmax(kept > whole))
        raise ValueError(
            f"stage {stage} keeps {kept[stage]} bytes for the weight half; "
            f"its forward keeps {whole[stage]}"
        )
    whole, kept = whole[step.stage], kept[step.stage]
    nothing = np.zeros_like(whole)
    allocated = np.where(step.part == F, whole, nothing)
    is_end = [step.part == part for part in (B, I, W)]
    return allocated, np.select(is_end, [whole, whole - kept, kept], nothing)
