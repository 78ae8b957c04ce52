"""The CUDA path without a GPU: shapes and memory on `meta`, times with events that are not there.

What needs a real device is marked `gpu`.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from profiles.lookup import kernel_works
from profiles.measure import buffers, kernels, ops
from profiles.measure.buffers import TORCH_DTYPES, Arena, buffer_sets, rotation_bytes
from profiles.measure.design import Design
from profiles.measure.kernels import explore
from profiles.measure.ops import BACKENDS, OPS, builder, ops_of, refusal, variants
from profiles.measure.shapes import Limits, working_bytes
from profiles.measure.shapes import candidates as find_candidates
from profiles.measure.timing import Budget, Clock, seen_mhz, time_calls
from profiles.surface import Shape

META = torch.device("meta")
CUDA = torch.device("cuda")
# About an H100.
LIMITS = Limits(flop_per_s=5e14, bytes_per_s=2e12, longest_ns=50_000_000, memory_bytes=70 << 30)
DTYPES = ("fp32", "bf16", "fp16", "fp8")
POINTS = [(op, dtype) for dtype in DTYPES for op in ops_of("cuda", dtype)]

candidates = cache(find_candidates)


@cache
def seeds(op: str, dtype: str) -> tuple[Shape, ...]:
    """The seeds of a quick sweep: corners, centre and what is far from all."""
    shapes = candidates(op, TORCH_DTYPES[dtype].itemsize, "cuda", LIMITS, True)
    return Design(shapes, lambda shape: kernel_works(op, shape)).seeds()


def result_shape(op: str, shape: Shape) -> Shape:
    """What the table of ops in `profiles.profile` says of a result, the first of several."""
    if op.startswith("linear_"):
        m, n, k = shape
        return {"linear_forward": (m, n), "linear_dgrad": (m, k), "linear_wgrad": (n, k)}[op]
    if op.startswith("attention_"):
        batch, heads, _, seq, head = shape
        return batch, heads, seq, head
    if op.startswith("embedding_"):
        return shape[:2] if op == "embedding_forward" else (shape[2], shape[1])
    if op == "cross_entropy_forward" or op == "clip":
        return ()
    return (shape[0] // 512, 8, 64) if op.startswith("rope_") else shape


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every new storage while it is on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._found[storage._cdata] = storage
        return out

    def num_bytes(self, without: Tensor) -> int:
        """All that was seen but the storage of `without`."""
        self._found.pop(without.untyped_storage()._cdata, None)
        return sum(storage.nbytes() for storage in self._found.values())


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_pinned", lambda arena, shape: arena.fresh(*shape))


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize(("op", "dtype"), POINTS)
def test_every_op_has_the_result_that_the_table_says(
    op: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A block costs nothing on `meta`, and no operand outgrows this one.
    monkeypatch.setitem(vars(buffers)["_ARENA_ELEMENTS"], "meta", 1 << 40)
    arena = Arena(META, TORCH_DTYPES[dtype])
    for shape in seeds(op, dtype):
        found = OPS[op](arena, shape)()
        first = found[0] if isinstance(found, tuple) else found
        if op == "adamw":
            assert first is None
        else:
            assert isinstance(first, Tensor)
            assert tuple(first.shape) == result_shape(op, shape), shape


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize(("op", "dtype"), POINTS)
def test_memory_is_within_its_bound_and_not_far_below(op: str, dtype: str) -> None:
    """Operands, results and all that eager kernels make between them; an attention's are fused."""
    num_bytes = TORCH_DTYPES[dtype].itemsize
    shapes = candidates(op, num_bytes, "cuda", LIMITS, True)
    largest = max(shapes, key=lambda shape: working_bytes(op, num_bytes, shape))
    for shape in {*seeds(op, dtype), largest}:
        arena = Arena(META, TORCH_DTYPES[dtype])
        if op.startswith("attention_"):
            OPS[op](arena, shape)
            batch, heads, _, seq, head = shape
            needed = arena.taken_bytes + batch * heads * seq * head * num_bytes
        else:
            # Large operands of an arena on `meta` are fresh ones, so the mode sees them.
            with Allocated() as allocated:
                call = OPS[op](arena, shape)
                result = call()
            needed = allocated.num_bytes(without=arena._block)
            del result
        bound = working_bytes(op, num_bytes, shape)
        assert needed <= bound, shape
        assert shape != largest or bound <= 9 * needed


class FakeCuda:
    """Stands for `torch.cuda`: notes what is asked of it; the device takes 1 ms a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.now_ms = 0.0
        monkeypatch.setattr(torch.cuda, "Event", self._event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda _: self.log.append("sleep"))

    def _event(self, enable_timing: bool = False) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at_ms=math.nan)

        def record() -> None:
            event.at_ms = self.now_ms
            self.log.append("record")

        def elapsed_time(end: SimpleNamespace) -> float:
            assert self.log[-1] == "synchronize"
            return float(end.at_ms - event.at_ms)

        event.record, event.elapsed_time = record, elapsed_time
        return event

    def call(self) -> None:
        self.now_ms += 1.25
        self.log.append("call")


def test_device_times_are_taken_behind_a_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    budget = Budget(time_ns=10**12, min_samples=2, max_samples=13)
    assert time_calls([fake.call], CUDA, budget) == [1_250_000] * 13
    log = fake.log[fake.log.index("sleep") :]
    one = ["record", "call", "record"]
    assert log == ["sleep", *(one * 10), "synchronize", "sleep", *(one * 3), "synchronize"]
    warm_up = fake.log[: fake.log.index("sleep")]
    assert 2 <= warm_up.count("call") <= 8
    assert warm_up == ["call", "synchronize"] * warm_up.count("call")


def test_a_call_longer_than_the_budget_is_made_as_often_as_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda(monkeypatch)
    found = time_calls([fake.call], CUDA, Budget(time_ns=0, min_samples=2, max_samples=60))
    assert found == [1_250_000] * 2


def test_sets_of_operands_outgrow_the_l2_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    assert rotation_bytes(CUDA) == 100 << 20


@pytest.mark.parametrize(
    ("output", "code", "mhz"), [("1980\n", 0, 1980), ("[N/A]\n", 0, 0), ("No devices", 6, 0)]
)
def test_the_clock_of_a_gpu_is_that_of_nvidia_smi(
    output: str, code: int, mhz: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout=output, returncode=code)

    facts = SimpleNamespace(uuid="a1-b2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr("shutil.which", lambda _: "/bin/nvidia-smi")
    monkeypatch.setattr("subprocess.run", run)
    assert seen_mhz(CUDA) == mhz
    assert asked[0][1:] == [
        "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=GPU-a1-b2"
    ]  # fmt: skip
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert seen_mhz(CUDA) == 0


@pytest.mark.parametrize("op", ops_of("cuda", "fp8"))
def test_fp8_products_are_called_as_tensor_cores_take_them(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both operands with the summed dim innermost, gradients in E5M2, sizes multiples of 16."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    real = torch._scaled_mm

    def scaled_mm(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    m, n, k = 512, 1024, 2048
    out = OPS[op](Arena(META, torch.float8_e4m3fn), (m, n, k))()
    ((left, right, left_scale, right_scale), options) = calls[0]
    names = [argument.name for argument in torch.ops.aten._scaled_mm.default._schema.arguments]
    assert names[:4] == ["self", "mat2", "scale_a", "scale_b"]
    assert set(options) <= set(names)
    assert isinstance(out, Tensor)
    assert out.dtype == torch.bfloat16
    assert left.stride(1) == right.stride(0) == 1
    assert left.dtype == (torch.float8_e4m3fn if op == "linear_forward" else torch.float8_e5m2)
    assert right.dtype == torch.float8_e4m3fn
    assert left_scale.dtype == right_scale.dtype == torch.float32
    shapes = candidates(op, 1, "cuda", LIMITS, True)
    assert all(size % 16 == 0 for shape in shapes for size in shape)


@pytest.mark.parametrize(("capability", "is_able"), [((8, 0), False), ((8, 9), True)])
def test_fp8_needs_a_gpu_that_has_it(
    capability: tuple[int, int], is_able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert (refusal("", "fp8", CUDA) == "") == is_able


def test_backends_of_attention_are_there() -> None:
    assert variants("attention_forward", "cuda") == ("", *BACKENDS)
    assert {backend.name for backend in BACKENDS.values()} == {
        "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH",
    }  # fmt: skip
    assert all(isinstance(backend, SDPBackend) for backend in BACKENDS.values())


def test_without_triton_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert refusal("compiled", "bf16", CUDA) == "torch.compile needs triton"
    assert variants("cross_entropy_backward", "cuda") == ("", "compiled")


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """The first GPU, with a process group of this process."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    yield device
    dist.destroy_process_group()


@pytest.mark.gpu
def test_a_gpu_takes_time(gpu: torch.device) -> None:
    arena = Arena(gpu, torch.bfloat16)
    times = time_calls(buffer_sets(builder("linear_forward"), arena, (4096, 4096, 4096)), gpu,
                       Budget(time_ns=10**7, min_samples=5, max_samples=50))  # fmt: skip
    assert len(times) >= 10
    assert min(times) > 1000


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_op_runs_on_a_gpu(
    dtype: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := refusal("", dtype, gpu):
        pytest.skip(reason)
    ignore: Callable[[object], None] = lambda _: None  # noqa: E731
    # One round at most: the seeds are what is tried.
    monkeypatch.setattr(kernels, "_next_round", lambda *_: [])
    found = explore(gpu, [dtype], tuple(OPS), True, Clock(300.0, gpu), ignore, ignore)
    assert found.missing == ()
    assert {sample.op for sample in found.samples} == set(ops_of("cuda", dtype))
    assert seen_mhz(gpu) > 0
