"""Programs: the ops of one rank for one part of a step, and what they take.

An op belongs to a category, which says whose scalar stretches it, and to a stream: kernels follow
each other on the compute stream, collectives on the exchange stream. The host launches all of them
and runs ahead of the device as far as it can.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.bounds import elapsed
from profiles.kernel_curves import Estimate
from profiles.stack import SCALARS, StackSpec
from simulator.checks import Int64
from simulator.graph import Int32
from simulator.streams import walk_streams

Floats = npt.NDArray[np.float64]

MATMUL, ATTENTION, MEMORY, INTRA, INTER = CATEGORIES = range(5)
CATEGORY_NAMES = ("matmul", "attention", "memory", "intra", "inter")
COMPUTE, EXCHANGE = STREAMS = range(2)
US, MS = 1e3, 1e6


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """Scalars of a stack for L candidates side by side: `factor` [5, L] by category, others [L].

    `launch`, `step`, `message`, `crossing` and `spanning` are in ns, `exposed` is a part of one.
    """

    factor: Floats
    launch: Floats
    exposed: Floats
    step: Floats
    message: Floats
    crossing: Floats
    spanning: Floats

    @property
    def num_lanes(self) -> int:
        """Candidates side by side."""
        return int(self.launch.shape[0])


def lanes_of(values: Mapping[str, npt.ArrayLike]) -> Lanes:
    """Return the lanes of `values`, by the names of `SCALARS`, each one number or [L]."""
    rows = np.broadcast_arrays(*(np.atleast_1d(np.asarray(values[n], float)) for n in SCALARS))
    by_name = dict(zip(SCALARS, rows, strict=True))
    return Lanes(
        factor=np.stack([by_name[name] for name in CATEGORY_NAMES]),
        launch=by_name["launch"] * US,
        exposed=by_name["exposed"],
        step=by_name["step"] * MS,
        message=by_name["message"] * US,
        crossing=by_name["crossing"] * US,
        spanning=by_name["spanning"] * US,
    )


def stack_lanes(stack: StackSpec) -> Lanes:
    """Return the one lane of the scalars of `stack`."""
    return lanes_of({name: stack.scalar(name) for name in SCALARS})


class Duration(NamedTuple):
    """What a part takes the device and the host, in ns, float64 [L] each."""

    device: Floats
    host: Floats

    def __add__(self, other: "Duration") -> "Duration":  # type: ignore[override]
        """Return both parts, one behind the other."""
        return Duration(self.device + other.device, self.host + other.host)

    def times(self, count: float | Int64) -> "Duration":
        """Return the part `count` times in a row."""
        return Duration(self.device * count, self.host * count)

    @property
    def elapsed(self) -> Floats:
        """Return the time of the slower of the two, which run ahead of each other."""
        return elapsed(self.device, self.host)


@dataclass
class Program:
    """Ops in program order, while they are written down.

    `calls` counts what the host launches, `tensor_calls` the tensor-parallel collectives among it;
    `weight_ns` sums the products that make weight gradients, `unsure_ns` what was extrapolated.
    """

    stream: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    category: list[int] = field(default_factory=list)
    ns: list[float] = field(default_factory=list)
    calls: float = 0.0
    tensor_calls: int = 0
    weight_ns: float = 0.0
    unsure_ns: float = 0.0
    _awaited: int = -1
    _last: list[int] = field(default_factory=lambda: [-1, -1])

    def compute(self, category: int, time: Estimate, calls: float = 1.0) -> None:
        """Add a kernel; it waits for the exchange that `wait` named, if any."""
        self.calls += calls
        self._add(COMPUTE, category, time, self._awaited)
        self._awaited = -1

    def exchange(self, category: int, time: Estimate, calls: float = 1.0) -> None:
        """Add a collective on the output of the kernel before it; no kernel waits for it yet."""
        self.calls += calls
        if time.ns > 0:
            self._add(EXCHANGE, category, time, self._last[COMPUTE])

    def wait(self) -> None:
        """Let the next kernel wait for the last exchange."""
        self._awaited = self._last[EXCHANGE]

    def _add(self, stream: int, category: int, time: Estimate, after: int) -> None:
        self._last[stream] = len(self.ns)
        self.stream.append(stream)
        self.after.append(after)
        self.category.append(category)
        self.ns.append(time.ns)
        self.unsure_ns += time.ns * time.is_extrapolated

    def block(self) -> "Block":
        """Return the program, ready to be timed."""
        return Block(
            stream=np.array(self.stream, np.int32),
            after=np.array(self.after, np.int32),
            category=np.array(self.category, np.intp),
            ns=np.array(self.ns),
            calls=self.calls,
            tensor_calls=self.tensor_calls,
            weight_ns=self.weight_ns,
            unsure_ns=self.unsure_ns,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """A finished program of N ops: `stream`, `after`, `category` and `ns` are [N]."""

    stream: Int32
    after: Int32
    category: npt.NDArray[np.intp]
    ns: Floats
    calls: float
    tensor_calls: int
    weight_ns: float
    unsure_ns: float

    def timed(self, lanes: Lanes, tensor_call_ns: Floats) -> Duration:
        """Return what the block takes; the host pays `tensor_call_ns` for each tensor collective.

        Ops that no scalar leaves anything of take nothing, so that a part can be looked at alone.
        """
        host = self.calls * lanes.launch + self.tensor_calls * tensor_call_ns
        if not len(self.ns):
            return Duration(np.zeros(lanes.num_lanes), host)
        ns: Int64 = np.rint(self.ns[:, None] * lanes.factor[self.category]).astype(np.int64)
        ends = walk_streams(self.stream, self.after, ns, len(STREAMS))
        return Duration(ends.max(axis=0).astype(np.float64), host)
