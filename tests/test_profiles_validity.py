"""What no machine can have measured is refused; what a reader should know is found."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.difference import difference
from profiles.errors import InvalidInputError
from profiles.fabric import Fabric, FabricLink, FabricNode
from profiles.files import canonical_json
from profiles.lookup import CostTable
from profiles.merge import with_bands
from profiles.profile import Clocks, CollectiveSample, Interference, KernelSample, Profile
from profiles.roofline import Need, kernel_need, link_bytes_per_s
from profiles.store import load_profile
from profiles.summary import ceilings, summarize
from profiles.validity import MEANINGS, errors, findings, warnings
from tests.machine import made_up_profile

GIB = 1 << 30


def kernel(op: str, shape: tuple[int, ...], time_ns: int, **facts: object) -> KernelSample:
    sample = KernelSample(op=op, dtype="bf16", shape=shape, p10_ns=time_ns, p50_ns=time_ns,
                          p90_ns=time_ns, num_samples=9)  # fmt: skip
    return replace(sample, **facts)  # type: ignore[arg-type]


def message(kind: str, size: int, time_ns: int, ranks: int = 8) -> CollectiveSample:
    return CollectiveSample(kind=kind, group_size=ranks, size_bytes=size, p10_ns=time_ns,
                            p50_ns=time_ns, p90_ns=time_ns, num_samples=9)  # fmt: skip


def h100(*kernels: KernelSample, collectives: tuple[CollectiveSample, ...] = ()) -> Profile:
    made_up = made_up_profile(num_ranks=8)
    device = replace(made_up.device, kind="cuda", name="NVIDIA H100 80GB HBM3", backend="nccl")
    return replace(made_up, device=device, kernels=kernels, collectives=collectives)


def test_made_up_profiles_have_no_errors() -> None:
    assert errors(made_up_profile(num_ranks=4)) == ()
    told = findings(made_up_profile(num_ranks=4))
    # Its kernels of 1 ns are the clock that does not tick.
    assert {finding.kind for finding in told} == {"constant"}
    assert list(told) == sorted(told)


GOOD = kernel("linear_forward", (64, 64, 64), 1000)
WIRE = FabricLink(first="gpu0", second="gpu1", kind="NV18")
GPU0 = FabricNode(name="gpu0", kind="gpu", label="")
BOTH = Interference(op="linear_forward", dtype="bf16", shape=(64, 64, 64), kind="all_reduce",
                    group_size=2, size_bytes=64, compute_slowdown=0.0,
                    communication_slowdown=1.0)  # fmt: skip
IMPOSSIBLE: dict[str, tuple[str, Profile]] = {
    "no time": ("positive", h100(replace(GOOD, p10_ns=0))),
    "a median of no time": ("positive", h100(replace(GOOD, medians_ns=(1000, 0)))),
    "no calls": ("positive", h100(replace(GOOD, num_samples=0))),
    "a negative band": ("positive", h100(replace(GOOD, band=-0.1))),
    "a size of nothing": ("positive", h100(replace(GOOD, shape=(64, 0, 64)))),
    "a slow-down of nothing": ("positive", replace(h100(GOOD), interference=(BOTH,))),
    "a negative host cost": ("positive", replace(h100(GOOD), host_ns={"step": -1})),
    "a scale of nothing": ("positive", replace(h100(GOOD), scales={"compute": 0.0})),
    "P10 above P50": ("order", h100(replace(GOOD, p10_ns=1001))),
    "P50 above P90": ("order", h100(replace(GOOD, p90_ns=999))),
    "two sizes of a product": ("shape", h100(replace(GOOD, shape=(64, 64)))),
    "no shape": ("shape", h100(replace(GOOD, op="new", shape=()))),
    "a group of one": ("shape", h100(collectives=(message("all_reduce", 8, 9, ranks=1),))),
    "twice the same": ("duplicate", h100(GOOD, replace(GOOD, p90_ns=2000))),
    "a wire to nowhere": ("fabric", replace(h100(), fabric=Fabric(nodes=(GPU0,), links=(WIRE,)))),
    "two of a name": ("duplicate", replace(h100(), fabric=Fabric(nodes=(GPU0, GPU0)))),
    # 8192^3 products of 2 flops at twice the 989 TFLOP/s of the sheet.
    "too many flops": ("ceiling", h100(kernel("linear_forward", (8192,) * 3, 555_900))),
    # A copy of 2 GiB read and written within 1 ms: 4.3 TB/s of the sheet's 3.35.
    "too many bytes": ("ceiling", h100(kernel("copy", (GIB,), 1_000_000))),
    # 7/8 of 1 GiB within 1 ms: 940 GB/s of NVLink's 450.
    "too quick a link": ("ceiling", h100(collectives=(message("all_gather", GIB, 1_000_000),))),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_is_impossible_is_an_error_and_refused(name: str, tmp_path: Path) -> None:
    kind, profile = IMPOSSIBLE[name]
    found = errors(profile)
    assert {finding.kind for finding in found} == {kind}
    assert all(finding.is_error for finding in found)
    assert findings(profile) == found
    path = tmp_path / "profile.json"
    path.write_text(canonical_json(profile))
    with pytest.raises(InvalidInputError) as refused:
        load_profile(path)
    lines = str(refused.value).splitlines()
    assert len(lines) == len(found)
    assert all(line.startswith(f"{path}: ") and "layline profile" in line for line in lines)


def test_many_errors_are_told_in_few_lines(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    bad = [kernel("copy", (size,), 10, p10_ns=11) for size in range(1, 101)]
    path.write_text(canonical_json(h100(*bad)))
    with pytest.raises(InvalidInputError) as refused:
        load_profile(path)
    assert len(refused.value.problems) == 21
    assert "and 80 more like these" in str(refused.value)


@pytest.mark.parametrize(
    "sample",
    [
        # 8 % above the sheet's peak: a GPU at its highest clock.
        kernel("linear_forward", (8192,) * 3, 1_030_000),
        # 20 TB/s out of a cache.
        kernel("copy", (1 << 22,), 800),
        # The sheet has no fp64.
        kernel("linear_forward", (8192,) * 3, 700_000, dtype="fp64"),
        # fp32 on the tensor cores, above the 67 TFLOP/s of the vector units.
        kernel("linear_forward", (8192,) * 3, 3_000_000, dtype="fp32"),
    ],
    ids=["boost", "cache", "unknown dtype", "tf32"],
)
def test_what_is_possible_is_no_error(sample: KernelSample) -> None:
    assert errors(h100(sample)) == ()


def test_a_switch_that_reduces_is_no_error() -> None:
    """NVLS reaches a bus bandwidth above the link's rate; the time of the bytes is the bound."""
    quick = message("all_reduce", GIB, round(1e9 * GIB / 450e9))
    assert errors(h100(collectives=(quick,))) == ()
    assert link_bytes_per_s(h100().device) == 450e9
    assert errors(h100(collectives=(replace(quick, p10_ns=1, p50_ns=quick.p50_ns // 2),)))


def test_nothing_is_known_of_a_cpu() -> None:
    profile = h100(kernel("linear_forward", (8192,) * 3, 1000))
    assert errors(replace(profile, device=replace(profile.device, kind="cpu"))) == ()


def line(*times_ns: int, band: float = 0.0) -> Profile:
    """A sum of 1000, 2000, 4000, ... elements that took these times."""
    return h100(
        *(
            kernel("add_forward", (1000 << number,), time_ns, band=band)
            for number, time_ns in enumerate(times_ns)
        )
    )


WARNED: dict[str, tuple[str | None, Profile]] = {
    "nothing": (None, line(1000, 2000, 4000)),
    "a larger one is faster": ("monotone", line(1000, 2000, 1400)),
    "a little faster": (None, line(1000, 2000, 1600)),
    # 1400 of 2000 is 0.36 in logarithms; bands of 30 % are 3 * sqrt(2) * 0.095 = 0.40.
    "faster within the bands": (None, line(1000, 2000, 1400, band=0.3)),
    "faster beyond the bands": ("monotone", line(1000, 2000, 1400, band=0.2)),
    "a clock that does not tick": ("constant", line(*[1000] * 8)),
    "the same over 64 x": (None, line(*[1000] * 7)),
    "one call": ("single", h100(replace(GOOD, num_samples=1))),
    "a wide band": ("band", h100(replace(GOOD, band=0.31))),
    "a band": (None, h100(replace(GOOD, band=0.3))),
    "one pass": ("repeat", h100(replace(GOOD, medians_ns=(1000,)))),
    "drift": ("drift", replace(line(1000), clocks=Clocks(drift=0.94))),
    "a little drift": (None, replace(line(1000), clocks=Clocks(drift=1.04))),
    "missing": ("missing", replace(line(1000), missing=("fp8: not here",))),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_a_reader_should_know(name: str) -> None:
    kind, profile = WARNED[name]
    assert errors(profile) == ()
    assert [finding.kind for finding in warnings(profile)] == ([kind] if kind else [])
    assert not any(finding.is_error for finding in warnings(profile))


def test_a_product_is_compared_along_one_axis_only() -> None:
    slim, fat = kernel("linear_forward", (64, 4096, 64), 9000), (4096, 64, 128)
    other = kernel("linear_forward", fat, 1000)
    assert warnings(h100(slim, other)) == ()
    told = warnings(h100(slim, other, kernel("linear_forward", (64, 4096, 128), 1000)))
    assert [finding.where for finding in told] == ["linear_forward bf16 64 x 4096 x 128"]
    assert "takes 1.0 us; 64 x 4096 x 64 takes 9.0 us" in told[0].what


def test_every_kind_that_is_tested_has_a_meaning() -> None:
    tested = {kind for kind, _ in IMPOSSIBLE.values()} | {k for k, _ in WARNED.values() if k}
    assert tested == set(MEANINGS)


@given(st.integers(1, 512), st.integers(1, 512), st.integers(1, 512))
def test_the_three_products_need_the_same_and_each_operand_once(m: int, n: int, k: int) -> None:
    needs = [
        kernel_need(f"linear_{way}", "bf16", (m, n, k)) for way in ("forward", "dgrad", "wgrad")
    ]
    assert needs == [Need(flops=2.0 * m * n * k, size_bytes=2.0 * (m * n + n * k + m * k))] * 3


def test_causal_attention_needs_half_of_the_pairs() -> None:
    """Against a count of pairs: position i looks at i + 1 others, 4 head flops a pair."""
    batch, heads, kv_heads, seq, head = 2, 4, 2, 16, 8
    pairs = batch * heads * sum(position + 1 for position in range(seq))
    forward = kernel_need("attention_forward", "bf16", (batch, heads, kv_heads, seq, head))
    backward = kernel_need("attention_backward", "bf16", (batch, heads, kv_heads, seq, head))
    assert forward is not None
    assert backward is not None
    assert forward.flops == 4 * head * pairs
    assert forward.size_bytes == 2 * batch * seq * head * (2 * heads + 2 * kv_heads)
    assert backward.flops == 2.5 * forward.flops


@pytest.mark.parametrize("op", ["layer_forward", "to_host", "from_host", "unheard_of"])
def test_what_has_no_count(op: str) -> None:
    assert kernel_need(op, "bf16", (4096,)) is None
    assert kernel_need("copy", "int3", (4096,)) is None


def test_ceilings_are_the_best_rates_beside_the_sheet() -> None:
    # Half of the peak: 2 * 8192^3 / 494.5 TFLOP/s. The large copy runs at half the memory rate; the
    # small one ran in a cache.
    half = round(2e9 * 8192**3 / 494.5e12)
    profile = h100(
        kernel("linear_forward", (8192,) * 3, half),
        kernel("linear_wgrad", (8192,) * 3, 2 * half),
        kernel("copy", (1 << 20,), 500),
        kernel("copy", (GIB,), round(4e9 * GIB / 1.675e12)),
        collectives=(
            message("all_gather", GIB, round(0.875e9 * GIB / 225e9)),
            message("exchange", GIB, round(2e9 * GIB / 450e9), ranks=2),
        ),
    )
    told = {ceiling.what: ceiling for ceiling in ceilings(profile)}
    assert list(told) == ["bf16", "memory", "all_gather", "exchange"]
    for what, best in (("bf16", 494.5e12), ("memory", 1.675e12), ("all_gather", 225e9),
                       ("exchange", 450e9)):  # fmt: skip
        assert told[what].best_per_s == pytest.approx(best, rel=1e-4)
        assert told[what].share == pytest.approx(0.5, rel=1e-4)
    assert told["memory"].where == "copy bf16 1073741824"


def test_the_law_of_a_link_is_found_and_foretells_it() -> None:
    """20 us and 100 GB/s: 10^8 bytes take 1.02 ms; a law that holds leaves nothing out."""
    samples = tuple(
        message("all_reduce", 10**e, 20_000 + 10**e // 100, ranks=4) for e in range(3, 9)
    )
    row = summarize(CostTable(h100(GOOD, collectives=samples))).collectives[0]
    assert row.latency_ns == pytest.approx(20_000, rel=1e-3)
    assert row.bytes_per_s == pytest.approx(100e9, rel=1e-3)
    assert row.bus_bytes_per_s == pytest.approx(150e9, rel=1e-3)
    assert row.sureness.error_p90 == pytest.approx(0.0, abs=1e-3)


def test_a_single_shape_tells_nothing_of_others() -> None:
    row = summarize(CostTable(h100(GOOD))).kernels[0]
    assert row.sureness.error_median is None
    assert row.sureness.stated is None


def test_a_profile_does_not_differ_from_itself() -> None:
    told = difference(made_up_profile(4), made_up_profile(4))
    assert told.share_within == 1.0
    assert not (told.beyond or told.only_first or told.only_second or told.differs)


@pytest.mark.parametrize(
    ("time_ns", "is_beyond"), [(1199, False), (1201, True), (834, False), (833, True)]
)
def test_what_moves_beyond_the_band_of_the_first(time_ns: int, is_beyond: bool) -> None:
    """A band of 20 % reaches from 1000 / 1.2 to 1000 * 1.2."""
    first, second = replace(GOOD, band=0.2), kernel("linear_forward", (64,) * 3, time_ns, band=0.1)
    told = difference(h100(first), h100(second))
    assert bool(told.beyond) is is_beyond
    assert told.share_within == (0.0 if is_beyond else 1.0)


def test_what_stands_in_one_profile_alone() -> None:
    other = replace(h100(kernel("copy", (8,), 1)), versions={"torch": "2.12.0"})
    told = difference(h100(GOOD), other)
    assert told.share_within is None
    assert told.only_first == ("linear_forward bf16 64 x 64 x 64",)
    assert told.only_second == ("copy bf16 8",)
    assert told.differs == ("versions.torch: 2.13.0 and 2.12.0",)


@given(st.lists(st.integers(-50, 50), min_size=8, max_size=8))
def test_the_largest_change_comes_first_and_all_are_counted(shifts: list[int]) -> None:
    """Passes that never differ have no band: whatever moves at all is beyond it."""
    before = with_bands(
        [kernel("copy", (1 << n,), 10_000, medians_ns=(10_000,) * 3) for n in range(8)]
    )
    after = [
        replace(sample, p50_ns=sample.p50_ns + shift, p10_ns=1, p90_ns=20_000)
        for sample, shift in zip(before, shifts, strict=True)
    ]
    told = difference(h100(*before), h100(*after))
    assert len(told.beyond) == sum(shift != 0 for shift in shifts)
    moved = [max(change.ratio, 1 / change.ratio) for change in told.changes]
    assert moved == sorted(moved, reverse=True)
