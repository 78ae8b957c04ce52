"""What a rank does, op by op, and what is alive meanwhile: a trace that needs no memory of its own.

Tensors are fake: they have shapes, dtypes and storages of a size, but no contents. They are fake
*CPU* tensors on any machine, since autograd needs the driver of a GPU even for fake tensors on one.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._op_schema import OpSchema
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WRAPPERS = (DTensor, AsyncCollectiveTensor)
_DEVICE = torch.ops.prim.device.default
_WAIT = torch.ops._c10d_functional.wait_tensor.default
_READ = torch.ops.aten._local_scalar_dense.default
_COLLECTIVES = collective_ops - sync_ops
_EMPTY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
                    "lift_fresh"})  # fmt: skip
"""Ops that make a tensor and launch nothing."""
_KINDS = {
    "allreduce_": "all_reduce", "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter", "recv_": "recv", "broadcast_": "broadcast",
}  # fmt: skip
"""What the dispatcher calls otherwise than a profile does."""
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One op as it reaches the device: its name, the shapes of its inputs, the dtype of the first.

    Of a list of tensors (the fused optimizer takes several) the shapes are those of the first list.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective or message; `size_bytes` is the buffer of one rank.

    `axis` is that of the mesh, "all" for all ranks of the job.
    """

    kind: str
    axis: str
    group_size: int
    size_bytes: int
    dtype: str


Event = Op | Collective


class Life(NamedTuple):
    """A storage: its size, the calls that it began and ended with, and the moments of that.

    Calls are counted from 1, and 0 is before the first; -1 stands for never.
    """

    size_bytes: int
    call: int
    last_call: int
    born: int
    ended: int

    def is_alive(self, moment: int) -> bool:
        """Return whether it is there right after `moment`."""
        return self.born <= moment and not 0 <= self.ended <= moment


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects events, each with the number of its call, and storages; make it before these are.

    A storage counts once, from the op that first shows it until nothing refers to it any more. That
    is what a caching allocator is asked for, without the private work space of kernels, which no
    dispatcher sees, and without rounding.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, Event]] = []
        self.lives: list[Life] = []
        self.alive_bytes = self.peak_bytes = self.peak_moment = self.peak_call = 0
        self._moment = self._calls = 0
        self._is_paused = False
        self._known: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._axes: Mapping[str, str] = {}

    def name_groups(self, axes: Mapping[str, str]) -> None:
        """Tell which process group is which axis."""
        self._axes = axes

    def clock(self) -> int:
        """Return how many calls there were."""
        return self._calls

    def place(self, tensor: Tensor) -> int:
        """Return the place in `lives` of the storage of `tensor`, which is noted if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (place := self._known.get(key)) is not None:
            return place
        place, self._moment = len(self.lives), self._moment + 1
        self._known[key] = place
        self.lives.append(Life(storage.nbytes(), self._calls, -1, self._moment, -1))
        self._watches[key] = weakref.ref(storage, partial(self._end, key))
        self.alive_bytes += storage.nbytes()
        if self.alive_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_moment = self.alive_bytes, self._moment
            self.peak_call = self._calls
        return place

    @contextmanager
    def without_propagation(self) -> Iterator[None]:
        """Leave out the ops by which DTensor finds the shapes of its results.

        It runs each op on fake tensors of whole size, once and for all in training, but every time
        under a fake mode.
        """
        original = ShardingPropagator._propagate_tensor_meta_non_cached

        def unseen(propagator: ShardingPropagator, schema: OpSchema) -> Any:
            was_paused, self._is_paused = self._is_paused, True
            try:
                return original(propagator, schema)
            finally:
                self._is_paused = was_paused

        ShardingPropagator._propagate_tensor_meta_non_cached = unseen  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            ShardingPropagator._propagate_tensor_meta_non_cached = original  # type: ignore[method-assign]

    def _end(self, key: int, _: object) -> None:
        place = self._known.pop(key)
        del self._watches[key]
        self._moment += 1
        life = self.lives[place]
        self.lives[place] = life._replace(last_call=self._calls, ended=self._moment)
        self.alive_bytes -= life.size_bytes

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, and note it; a tensor that wraps others is left to unwrap itself first."""
        if any(issubclass(kind, _WRAPPERS) for kind in types):
            return NotImplemented
        if func is _WAIT and isinstance(args[0], FakeTensor):
            return args[0]  # a real one waits in place, a fake one would make another tensor
        if func is _READ and isinstance(args[0], FakeTensor):
            return 1  # the pipeline runtime asks whether all ranks agree on the shapes: they do
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for with every op: the dispatcher would take long
        if self._is_paused:
            return func(*args, **(kwargs or {}))
        self._calls += 1
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, _WRAPPERS) and _is_held(leaf):
                self.place(leaf)
        if (event := self._event(func, args, result)) is not None:
            self.events.append((self._calls, event))
        return result

    def _event(self, func: OpOverload, args: tuple[Any, ...], result: object) -> Event | None:
        """Return what is noted of a call, None of what launches nothing."""
        namespace, name = _names(func)
        tensors = _tensors(args)
        if func in _COLLECTIVES:
            group = CollectiveOp.get_process_group(func, args)
            return Collective(
                kind=_KINDS.get(name, name),
                axis=self._axes.get(group.group_name, "all"),
                group_size=group.size(),
                size_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                dtype=dtype_name(tensors[0]),
            )
        if namespace != "aten" or name in _EMPTY or _is_view(func, tensors, result):
            return None
        if not tensors and isinstance(result, Tensor):
            tensors = [result]
        return Op(
            name=name,
            shapes=tuple(tuple(tensor.shape) for tensor in tensors),
            dtype=dtype_name(tensors[0]) if tensors else "",
        )


def _is_held(tensor: Tensor) -> bool:
    """Return whether `tensor` takes memory, as one on meta does not."""
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return bool(device.type != "meta")


def dtype_name(tensor: Tensor) -> str:
    """Return the dtype of `tensor` in the words of a workload, or in PyTorch's."""
    return _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors among `args`; of several lists of them those of the first."""
    found: list[Tensor] = []
    has_list = False
    for argument in args:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)) and not has_list:
            found += (leaf for leaf in argument if isinstance(leaf, Tensor))
            has_list = bool(found)
    return found


def _is_view(func: OpOverload, tensors: Sequence[Tensor], result: object) -> bool:
    """Return whether a call only made another view of the storage of its first tensor."""
    if isinstance(result, (list, tuple)) and result:
        result = result[0]
    if func._schema.is_mutable or not tensors or not isinstance(result, Tensor):
        return False
    return bool(result.untyped_storage()._cdata == tensors[0].untyped_storage()._cdata)


@cache
def _names(func: OpOverload) -> tuple[str, str]:
    """Return namespace and name of an op, without its overload."""
    namespace, _, name = func._schema.name.partition("::")
    return namespace, name


@contextmanager
def pretended_group(rank: int, num_ranks: int) -> Iterator[None]:
    """Be `rank` of `num_ranks` whose messages go nowhere; alone, there is no group.

    Raises RuntimeError in a process that is a member of a real group.
    """
    if dist.is_initialized():
        raise RuntimeError("a rank of a real job cannot capture; capture in a process of its own")
    if num_ranks == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # DTensor keeps what it found for equal meshes, whose groups have other names next time.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]


@contextmanager
def fused_norms() -> Iterator[None]:
    """Let a fake CPU run a norm as one kernel, as a GPU does; alone it composes a norm of several.

    With a kernel for the CPU, which a fake tensor never calls, PyTorch's dispatcher takes the path
    of a GPU, and so does autograd.
    """
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        for name in ("_fused_rms_norm", "_fused_rms_norm_backward"):
            library.impl(name, _never_called, "CPU")  # type: ignore[no-untyped-call]
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _never_called(*_: object) -> None:
    raise AssertionError("a norm of real tensors while a rank is captured")
