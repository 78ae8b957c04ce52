"""Look-ups in a profile: exact at grid points, close to a known law between, marked outside."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import UnsupportedError
from profiles.lookup import CostTable, kernel_works, ring_traffic
from profiles.profile import (
    CollectiveSample,
    DeviceFacts,
    KernelSample,
    Profile,
)

LAUNCH_NS = 5_000.0
RATE_PER_NS = 50.0
LINEAR_AXES = ((64, 256, 1024), (64, 128, 256, 512), (64, 128, 256, 512))
SIZES = tuple(1 << i for i in range(10, 25, 2))


def kernel_sample(op: str, shape: tuple[int, ...], time_ns: float) -> KernelSample:
    return KernelSample(
        op=op,
        dtype="fp32",
        shape=shape,
        p10_ns=round(0.9 * time_ns),
        p50_ns=round(time_ns),
        p90_ns=round(1.3 * time_ns),
        num_samples=10,
    )


def law_ns(op: str, shape: tuple[int, ...]) -> float:
    """The time of a kernel that has a launch cost and then a constant rate."""
    return LAUNCH_NS + kernel_works(op, shape)[0] / RATE_PER_NS


def message_ns(size_bytes: int) -> float:
    return 20_000 + size_bytes / 4


def make_profile(law: Callable[[str, tuple[int, ...]], float] = law_ns) -> Profile:
    axes = {
        "linear_forward": LINEAR_AXES,
        "attention_forward": ((1, 4), (2, 8), (2,), (64, 128, 256, 512), (32, 64)),
        "add_forward": (tuple(4**i for i in range(6, 12)),),
        "adamw": ((4096, 65536, 1 << 20),),
    }
    return Profile(
        schema_version=2,
        device=DeviceFacts(
            kind="cpu", name="test", backend="gloo", num_ranks=4, memory_bytes=1 << 30, driver=""
        ),
        kernels=tuple(
            kernel_sample(op, shape, law(op, shape))
            for op, sizes in axes.items()
            for shape in product(*sizes)
        ),
        collectives=tuple(
            CollectiveSample(
                kind=kind,
                group_size=2,
                size_bytes=size,
                p10_ns=round(0.9 * message_ns(size)),
                p50_ns=round(message_ns(size)),
                p90_ns=round(1.5 * message_ns(size)),
                num_samples=10,
            )
            for kind in ("all_reduce", "send_recv")
            for size in SIZES
        ),
        host_ns={"step": 1000},
        context_bytes=1 << 20,
        versions={},
        measured_at="2026-01-01T00:00:00+00:00",
        scales={},
    )


PROFILE = make_profile()
TABLE = CostTable(PROFILE)


def test_grid_points_are_exact() -> None:
    for sample in PROFILE.kernels:
        cost = TABLE.kernel(sample.op, sample.dtype, sample.shape)
        assert (cost.p10_ns, cost.p50_ns, cost.p90_ns, cost.is_extrapolated) == (
            sample.p10_ns,
            sample.p50_ns,
            sample.p90_ns,
            False,
        )
    for message in PROFILE.collectives:
        cost = TABLE.collective(message.kind, message.group_size, message.size_bytes)
        assert (cost.p10_ns, cost.p50_ns, cost.p90_ns, cost.is_extrapolated) == (
            message.p10_ns,
            message.p50_ns,
            message.p90_ns,
            False,
        )


@given(
    m=st.integers(64, 1024), n=st.integers(64, 512), k=st.integers(64, 512),
)  # fmt: skip
def test_a_launch_cost_and_a_rate_are_found_again(m: int, n: int, k: int) -> None:
    cost = TABLE.kernel("linear_forward", "fp32", (m, n, k))
    assert cost.p50_ns == pytest.approx(law_ns("linear_forward", (m, n, k)), rel=0.06)
    assert cost.p10_ns <= cost.p50_ns <= cost.p90_ns
    assert not cost.is_extrapolated


@given(seq=st.integers(64, 512), heads=st.integers(2, 8), batch=st.integers(1, 4))
def test_attention_grows_with_the_square_of_the_sequence(seq: int, heads: int, batch: int) -> None:
    shape = (batch, heads, 2, seq, 32)
    cost = TABLE.kernel("attention_forward", "fp32", shape)
    assert cost.p50_ns == pytest.approx(law_ns("attention_forward", shape), rel=0.1)


@given(size=st.integers(1, 1 << 26), more=st.integers(0, 1 << 26))
def test_more_elements_and_bytes_never_take_less(size: int, more: int) -> None:
    small, large = (TABLE.kernel("add_forward", "fp32", (n,)) for n in (size, size + more))
    assert small.p50_ns <= large.p50_ns
    small, large = (TABLE.collective("send_recv", 2, n) for n in (size, size + more))
    assert small.p50_ns <= large.p50_ns


@given(
    shape=st.tuples(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096)),
    axis=st.integers(0, 2),
    more=st.integers(1, 4096),
)
def test_a_larger_linear_never_takes_less(
    shape: tuple[int, int, int], axis: int, more: int
) -> None:
    larger = tuple(size + more * (i == axis) for i, size in enumerate(shape))
    before, after = (TABLE.kernel("linear_forward", "fp32", s) for s in (shape, larger))
    assert before.p50_ns <= after.p50_ns


@pytest.mark.parametrize("shape", [(4096, 512, 1024), (1, 8, 8), (2048, 32, 512)])
def test_outside_of_what_was_measured_the_law_holds_and_is_marked(
    shape: tuple[int, int, int],
) -> None:
    cost = TABLE.kernel("linear_forward", "fp32", shape)
    assert cost.p50_ns == pytest.approx(law_ns("linear_forward", shape), rel=1e-3)
    assert cost.is_extrapolated
    message = TABLE.collective("send_recv", 2, 4 * SIZES[-1])
    assert message.p50_ns == pytest.approx(message_ns(4 * SIZES[-1]), rel=1e-3)
    assert message.is_extrapolated


def test_a_group_that_was_not_measured_follows_the_ring() -> None:
    pair = TABLE.collective("all_reduce", 2, SIZES[-1])
    four = TABLE.collective("all_reduce", 4, SIZES[-1])
    assert four.p50_ns == pytest.approx(1.5 * pair.p50_ns, rel=1e-6)
    assert four.is_extrapolated


def test_one_rank_alone_sends_nothing() -> None:
    assert TABLE.collective("all_reduce", 1, 1 << 20).p90_ns == 0


@pytest.mark.parametrize(("kind", "traffic"), [("all_reduce", 1.75), ("all_gather", 0.875)])
def test_ring_traffic_of_eight(kind: str, traffic: float) -> None:
    assert ring_traffic(kind, 8) == traffic


def test_what_others_do_not_tell_is_marked() -> None:
    """Times that follow no law: far from all of them nobody can be sure."""
    jumps = {k.shape: 3 ** (i % 3) for i, k in enumerate(PROFILE.kernels)}
    kernels = tuple(
        replace(k, p50_ns=k.p50_ns * jumps[k.shape], p90_ns=k.p90_ns * jumps[k.shape])
        for k in PROFILE.kernels
        if k.op == "linear_forward"
    )
    table = CostTable(replace(PROFILE, kernels=kernels))
    assert not table.kernel("linear_forward", "fp32", kernels[0].shape).is_extrapolated
    assert table.kernel("linear_forward", "fp32", (500, 300, 300)).is_extrapolated


def test_scales_belong_to_their_kind() -> None:
    scales = {"compute": 2.0, "optimizer": 3.0, "communication": 5.0, "host": 7.0}
    scaled = CostTable(replace(PROFILE, scales=scales))
    for op, shape, factor in (("linear_forward", (64, 64, 64), 2), ("adamw", (4096,), 3)):
        plain = TABLE.kernel(op, "fp32", shape)
        assert scaled.kernel(op, "fp32", shape).p50_ns == pytest.approx(factor * plain.p50_ns)
    message = TABLE.collective("send_recv", 2, 1024)
    assert scaled.collective("send_recv", 2, 1024).p50_ns == pytest.approx(5 * message.p50_ns)
    assert scaled.host("step") == 7000


@pytest.mark.parametrize(
    ("look_up", "text"),
    [
        (lambda: TABLE.kernel("linear_dgrad", "fp32", (1, 1, 1)), "kernel linear_dgrad in fp32"),
        (lambda: TABLE.kernel("adamw", "bf16", (1,)), "kernel adamw in bf16"),
        (lambda: TABLE.collective("all_gather", 2, 1), "collective all_gather"),
        (lambda: TABLE.host("dtensor_linear"), "host cost dtensor_linear"),
    ],
)
def test_what_was_not_measured_is_named(look_up: Callable[[], object], text: str) -> None:
    with pytest.raises(UnsupportedError, match=text) as caught:
        look_up()
    assert "`layline profile` measures it" in str(caught.value)


def test_a_shape_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 3 sizes of at least 1"):
        TABLE.kernel("linear_forward", "fp32", (64, 64))
    with pytest.raises(ValueError, match="must be 3 sizes of at least 1"):
        TABLE.kernel("linear_forward", "fp32", (64, 64, 0))
