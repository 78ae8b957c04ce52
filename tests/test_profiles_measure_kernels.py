"""Kernels on a CPU: calls are what their names say, the timer keeps time, a sweep its word."""

import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.nn import functional as F  # noqa: N812

from planner.kernels import StageShape
from profiles.lookup import REFERENCE_SHAPES
from profiles.measure import buffers, kernels, ops, sweep, timing
from profiles.measure.buffers import TORCH_DTYPES, Arena, buffer_sets, core_cache_bytes
from profiles.measure.kernels import explore, repeat
from profiles.measure.ops import builder, ops_of, refusal, selected, variants
from profiles.measure.shapes import Limits, anchors, working_bytes
from profiles.measure.shapes import candidates as find_candidates
from profiles.measure.sweep import KernelPoint, merged
from profiles.measure.timing import Budget, Call, Clock, cpu_mhz, time_calls
from profiles.presets import model_preset, model_presets
from profiles.profile import KernelSample
from profiles.surface import Shape

CPU = torch.device("cpu")
FAST = Budget(time_ns=0, min_samples=2, max_samples=3)
LIMITS = Limits(flop_per_s=5e10, bytes_per_s=1e10, longest_ns=20_000_000, memory_bytes=8 << 30)
WIDE = Limits(flop_per_s=5e14, bytes_per_s=2e12, longest_ns=300_000_000, memory_bytes=70 << 30)

candidates = cache(find_candidates)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process, over the loopback interface."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def least(op: str) -> Shape:
    return min(candidates(op, 4, "cpu", LIMITS, True))


CPU_OPS = ops_of("cpu", "fp32")
EAGER = [(op, v) for op in CPU_OPS for v in variants(op, "cpu") if v != "compiled"]


@pytest.mark.parametrize(("op", "variant"), EAGER)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_op_runs_at_its_least_shape(op: str, variant: str, dtype: str) -> None:
    arena = Arena(CPU, TORCH_DTYPES[dtype], 1 << 20)
    with selected(variant):
        times = time_calls(buffer_sets(builder(op, variant), arena, least(op)), CPU, FAST)
    assert len(times) >= 2
    assert min(times) > 0


@pytest.mark.slow
@pytest.mark.parametrize("op", ["swiglu_forward", "norm_backward", "cross_entropy_forward"])
def test_compiled_ops_agree_with_eager_ones(op: str) -> None:
    if refusal("compiled", "fp32", CPU):
        pytest.skip(refusal("compiled", "fp32", CPU))
    found: list[object] = []
    for variant in ("", "compiled"):
        torch.manual_seed(0)
        arena = Arena(CPU, torch.float32, 1 << 20)
        with selected(variant):
            call = builder(op, variant)(arena, least(op))
            found.append(call())
            assert found[-1] is not call()
    eager, compiled = (each if isinstance(each, tuple) else (each,) for each in found)
    for left, right in zip(eager, compiled, strict=True):
        torch.testing.assert_close(left, right)


def arena_of(seed: int) -> Arena:
    torch.manual_seed(seed)
    return Arena(CPU, torch.float32, 1 << 20)


def result(op: str, shape: Shape, variant: str = "") -> Tensor:
    """What a call of `op` returns over the operands of `arena_of(1)`."""
    with selected(variant):
        found = builder(op, variant)(arena_of(1), shape)()
    first = found[0] if isinstance(found, tuple) else found
    assert isinstance(first, Tensor)
    return first


def test_the_halves_of_a_linear_are_those_of_autograd() -> None:
    m, n, k = shape = (64, 96, 80)
    arena = arena_of(1)
    dy, w = arena.take(m, n), arena.take(n, k)
    x = torch.zeros(m, k, requires_grad=True)
    dgrad = torch.autograd.grad(F.linear(x, w), x, dy)[0]
    torch.testing.assert_close(result("linear_dgrad", shape), dgrad)
    arena = arena_of(1)
    dy, x = arena.take(m, n), arena.take(m, k)
    weight = torch.zeros(n, k, requires_grad=True)
    wgrad = torch.autograd.grad(F.linear(x, weight), weight, dy)[0]
    torch.testing.assert_close(result("linear_wgrad", shape), wgrad)


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward"])
@pytest.mark.parametrize("shape", [(2, 4, 4, 48, 32), (1, 8, 2, 64, 32)])
def test_variants_of_attention_agree(op: str, shape: Shape) -> None:
    """Of a backward what is compared is the gradient of the query."""
    default = result(op, shape)
    assert default.shape == (*shape[:2], *shape[3:])
    for variant in ("flash", "math"):
        torch.testing.assert_close(result(op, shape, variant), default)


def test_the_optimizer_is_the_same_fused_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, list[Tensor]] = {"": [], "foreach": []}
    fresh, taken = Arena.fresh, found[""]

    def kept(arena: Arena, *shape: int) -> Tensor:
        taken.append(fresh(arena, *shape))
        return taken[-1]

    monkeypatch.setattr(Arena, "fresh", kept)
    for variant in found:
        taken = found[variant]
        builder("adamw", variant)(arena_of(1), (4096,))()
    for fused, foreach in zip(found[""], found["foreach"], strict=True):
        torch.testing.assert_close(fused, foreach)


@pytest.mark.usefixtures("alone")
def test_a_backend_that_the_device_refuses_is_a_reason() -> None:
    shape = (1, 2, 2, 64, 32)
    point = KernelPoint(op="attention_forward", dtype="fp32", shape=shape, variant="flash")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(ops)["BACKENDS"], "flash", ops.BACKENDS["cudnn"])
        found = repeat(CPU, [point], True, Clock(60.0, CPU), ignore, ignore)
    assert found.samples == ()
    assert found.missing[0].startswith("attention_forward fp32 flash (1, 2, 2, 64, 32): No viable")


def test_operands_differ_and_do_not_overlap() -> None:
    arena = Arena(CPU, torch.float32, 1 << 20)
    taken = [arena.take(100, 100) for _ in range(8)]
    starts = [tensor.data_ptr() for tensor in taken]
    assert all(b - a >= taken[0].nbytes for a, b in itertools.pairwise(starts))
    assert len({round(float(tensor.sum()), 3) for tensor in taken}) == 8
    large = arena.take(1 << 19)
    assert large.data_ptr() + large.nbytes < starts[0] or large.data_ptr() > starts[-1] + (4 << 20)


@pytest.mark.parametrize(("elements", "num_sets"), [(1000, 6), (600_000, 4), (5_000_000, 1)])
def test_sets_outgrow_the_caches(
    elements: int, num_sets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 MiB in all: 6 sets at most, and one alone if it is twice as much."""
    monkeypatch.setattr(buffers, "core_cache_bytes", lambda: 1 << 19)
    calls = buffer_sets(builder("copy"), Arena(CPU, torch.float32), (elements // 2,))
    assert len(calls) == num_sets


def test_the_cache_of_a_core_is_read_from_linux(tmp_path: Path) -> None:
    assert core_cache_bytes(tmp_path) == 512 << 10
    for index, (level, size) in enumerate((("1", "48K"), ("2", "2048K"), ("3", "105M"))):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    assert core_cache_bytes(tmp_path) == 2 << 20


def test_the_clock_of_a_cpu_is_read_from_linux(tmp_path: Path) -> None:
    assert cpu_mhz(tmp_path) == 0
    (tmp_path / "proc").mkdir()
    info = tmp_path / "proc/cpuinfo"
    info.write_text("processor : 0\ncpu MHz : 2400.5\nprocessor : 1\ncpu MHz : 2600.5\n")
    assert cpu_mhz(tmp_path) == 2500
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    folder.mkdir(parents=True)
    (folder / "scaling_cur_freq").write_text("3100000\n")
    assert cpu_mhz(tmp_path) == 3100


class FakeTime:
    """A clock that a call moves on by what it is to take."""

    def __init__(self, durations_ns: Sequence[int]) -> None:
        self.now_ns, self._left, self.num_calls = 0, list(durations_ns), 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def call(self) -> None:
        self.now_ns += self._left.pop(0) if len(self._left) > 1 else self._left[0]
        self.num_calls += 1


@pytest.mark.parametrize(
    ("durations_ns", "num_warm"),
    [
        ([100, 60, 50, 49, 48], 4),  # 49 is within 5 % of 50
        ([100, 99], 2),
        ([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024], 8),
        ([5000, 4000, 3000], 1),  # over the budget at once
    ],
)
def test_warm_up_ends_when_times_settle(
    durations_ns: list[int], num_warm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTime(durations_ns)
    monkeypatch.setattr(timing, "time", fake)
    budget = Budget(time_ns=1000, min_samples=2, max_samples=2)
    time_calls([fake.call], CPU, budget)
    assert fake.num_calls == num_warm + 2


def test_samples_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    for time_ns, expected in ((0, 5), (700, 7), (10**9, 50)):
        fake = FakeTime([100])
        monkeypatch.setattr(timing, "time", fake)
        budget = Budget(time_ns=time_ns, min_samples=5, max_samples=50)
        assert time_calls([fake.call], CPU, budget) == [100] * expected


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_candidates_keep_to_the_limits(kind: str, quick: bool) -> None:
    limits = LIMITS if kind == "cpu" else WIDE
    for op in ops_of(kind, "bf16"):
        shapes = candidates(op, 2, kind, limits, quick)
        free = {*shapes} - {*anchors(op, kind)}
        assert len(free) >= 8
        assert all(limits.allow(op, 2, shape) for shape in free)
        assert all(working_bytes(op, 2, shape) <= limits.memory_bytes for shape in shapes)
        assert list(shapes) == sorted(set(shapes))
    assert REFERENCE_SHAPES[kind] in candidates("linear_forward", 4, kind, limits, quick)
    slow = Limits(flop_per_s=1e6, bytes_per_s=1e6, longest_ns=1, memory_bytes=16 << 30)
    assert candidates("linear_forward", 4, kind, slow, quick) == tuple(
        sorted(anchors("linear_forward", kind))
    )


@pytest.mark.parametrize("name", [n for n in model_presets() if model_preset(n).is_llama_like][:-1])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_linears_of_a_layer_are_candidates_on_a_gpu(name: str, tp: int) -> None:
    """With a tp that divides kv heads; 13B has 40 heads, and 33B 52."""
    model = model_preset(name)
    if model.num_kv_heads % tp or model.ffn % (16 * tp):
        pytest.skip(f"{name} is not cut in {tp}")
    shape = StageShape(model=model, tp=tp, micro_batch=1, seq_len=4096)
    shapes = {s for s in candidates("linear_forward", 2, "cuda", WIDE, True) if s[0] == 4096}
    head = (4096, shape.vocab, model.hidden)
    assert {*shape.layer_linears, head} <= shapes
    if model.head_size >= 64:
        assert shape.attention in candidates("attention_forward", 2, "cuda", WIDE, True)


def ignore(_: object) -> None:
    """Be told, and do nothing."""


@pytest.mark.usefixtures("alone")
def test_exploring_finds_every_op_and_tells_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "QUICK", FAST)
    asked = ("linear_forward", "add_forward", "norm_backward", "to_host")
    kept: list[int] = []
    told: list[str] = []
    clock = Clock(3.0, CPU)
    found = explore(CPU, ["fp32"], asked, True, clock, told.append, lambda s: kept.append(len(s)))
    assert {s.op for s in found.samples} == set(asked) - {"to_host"} == set(told)
    assert kept == sorted(kept)
    assert kept[-1] == len(found.samples) == len({s.key for s in found.samples})
    assert REFERENCE_SHAPES["cpu"] in {s.shape for s in found.samples if s.op == "linear_forward"}
    for sample in found.samples:
        assert 0 < sample.p10_ns <= sample.p50_ns <= sample.p90_ns
        assert sample.medians_ns == (sample.p50_ns,)
        assert (sample.band, sample.variant) == (0.0, "")
        assert 0 <= sample.num_outliers <= sample.num_samples >= 2


@pytest.mark.usefixtures("alone")
def test_the_full_sweep_has_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FULL", FAST)
    monkeypatch.setattr(kernels, "_LONGEST_NS", {False: 1_000_000})
    found = explore(CPU, ["fp32"], ["adamw"], False, Clock(60.0, CPU), ignore, ignore)
    counts = [sum(s.variant == variant for s in found.samples) for variant in ("", "foreach")]
    assert counts[0] >= 6
    assert counts[1] == 3


@pytest.mark.usefixtures("alone")
def test_a_sweep_without_time_says_what_is_missing() -> None:
    found = explore(CPU, ["fp32"], ["add_forward", "copy"], True, Clock(0.0, CPU), ignore, ignore)
    assert found.samples == ()
    assert found.missing == ("12 shapes, the time was over: add_forward fp32 (6), copy fp32 (6)",)


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_a_repeat_times_the_same_points_in_another_order() -> None:
    points = [KernelPoint(op="copy", dtype="fp32", shape=(4096 * i,)) for i in range(1, 30)]
    orders = []
    for seed in (0, 0, 1):
        found = repeat(CPU, points, True, Clock(60.0, CPU), ignore, ignore, seed)
        orders.append([s.shape for s in found.samples])
        assert found.missing == ()
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [point.shape for point in points]


@pytest.mark.usefixtures("alone")
def test_ops_that_the_device_cannot_do_are_named() -> None:
    points = [
        KernelPoint(op="linear_forward", dtype="fp8", shape=(64, 64, 64)),
        KernelPoint(op="attention_forward", dtype="fp32", shape=(1, 1, 1, 64, 32), variant="cudnn"),
    ]
    found = repeat(CPU, points, True, Clock(60.0, CPU), ignore, ignore)
    assert found.samples == ()
    assert found.missing == (
        "linear_forward fp8: fp8 products need a GPU",
        "attention_forward fp32 cudnn: this device has no such kernel",
    )


@pytest.mark.usefixtures("alone")
def test_a_fault_of_the_device_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Call:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(sweep, "builder", lambda *_: broken)
    point = KernelPoint(op="copy", dtype="fp32", shape=(4096,))
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        repeat(CPU, [point], True, Clock(60.0, CPU), ignore, ignore)


@pytest.mark.usefixtures("alone")
def test_a_machine_that_slows_down_and_recovers_gives_the_same_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One time for all points, though every third burst is 1.5 times as slow: the mean speed."""
    slowness = itertools.cycle((1.0, 1.0, 1.5, 1.0))
    now = 1.0

    def times(*_: object) -> list[int]:
        nonlocal now
        now = next(slowness)
        return [round(10_000 * now)] * 5

    monkeypatch.setattr(sweep, "time_calls", times)
    monkeypatch.setattr(timing.Yardstick, "read_ns", lambda _: 60_000 * now)
    points = [KernelPoint(op="copy", dtype="fp32", shape=(512 * i,)) for i in range(1, 13)]
    found = repeat(CPU, points, True, Clock(60.0, CPU), ignore, ignore)
    medians = {sample.p50_ns for sample in found.samples}
    assert len(medians) == 1
    assert 10_000 <= medians.pop() <= 12_000
    assert {sample.num_samples for sample in found.samples} == {15 * kernels._MOST_REPEATS}


def test_a_yardstick_tells_the_median_of_its_least_times(monkeypatch: pytest.MonkeyPatch) -> None:
    yardstick = timing.Yardstick()
    assert yardstick.read_ns() == 1.0
    stamps = itertools.chain.from_iterable((0, took) for took in (9, 5, 6, 70, 8, 7, 30, 20, 90))
    fake = FakeTime([1])
    monkeypatch.setattr(fake, "perf_counter_ns", lambda: next(stamps))
    monkeypatch.setattr(timing, "time", fake)
    for _ in range(3):
        yardstick.measure()
    assert yardstick.read_ns() == 7.0
    assert yardstick.read_ns() == 1.0


@pytest.mark.usefixtures("alone")
def test_a_sample_is_the_mean_of_quantiles() -> None:
    points = [KernelPoint(op="copy", dtype="fp32", shape=(size,)) for size in (512, 1024)]
    times = {points[0]: [10, 20, 30, 40, 500], points[1]: []}
    (found,) = merged(times, CPU)
    assert found == KernelSample(
        op="copy", dtype="fp32", shape=(512,), p10_ns=14, p50_ns=30, p90_ns=316, num_samples=5,
        num_outliers=1, medians_ns=(30,),
    )  # fmt: skip
