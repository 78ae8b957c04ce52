"""Merging: medians of medians, bands that hold what they say, and no mixing of machines."""

import math
import random
from dataclasses import replace

import pytest

from profiles.errors import InvalidInputError
from profiles.merge import merge, student, with_bands
from profiles.profile import Clocks, Interference, KernelSample, Profile
from tests.machine import made_up_profile

FIRST = made_up_profile(num_ranks=2)


def one_pass(medians: dict[int, int], **changes: object) -> Profile:
    """A pass that measured additions of so many elements, in ns."""
    kernels = tuple(
        KernelSample(op="add_forward", dtype="fp32", shape=(size,), p10_ns=ns - 1, p50_ns=ns,
                     p90_ns=ns + 5, num_samples=10, num_outliers=1, medians_ns=(ns,))
        for size, ns in medians.items()
    )  # fmt: skip
    return replace(FIRST, kernels=kernels, collectives=(), **changes)  # type: ignore[arg-type]


def test_an_entry_is_the_median_of_its_passes() -> None:
    merged = merge([one_pass({64: 100}), one_pass({64: 130, 128: 7}), one_pass({64: 110})])
    small, large = merged.kernels
    assert (small.shape, small.medians_ns, small.p50_ns) == ((64,), (100, 130, 110), 110)
    assert (small.p10_ns, small.p90_ns) == (109, 115)
    assert (small.num_samples, small.num_outliers) == (30, 3)
    assert (large.shape, large.medians_ns) == ((128,), (7,))


def test_a_merge_of_merges_knows_all_passes() -> None:
    passes = [one_pass({64: ns, 128: 2 * ns}) for ns in (100, 120, 90, 105)]
    twice, once = merge([merge(passes[:2]), merge(passes[2:])]), merge(passes)
    for one, other in zip(twice.kernels, once.kernels, strict=True):
        assert one.medians_ns == other.medians_ns
        assert (one.p50_ns, one.band, one.num_samples) == (
            other.p50_ns,
            other.band,
            other.num_samples,
        )


def test_passes_that_agree_have_no_band_and_a_single_one_is_not_trusted() -> None:
    assert [k.band for k in merge([one_pass({64: 100})] * 3).kernels] == [0.0]
    assert [k.band for k in merge([one_pass({64: 100})]).kernels] == [0.3]


def test_the_band_of_one_entry_is_the_formula() -> None:
    """Alone, an entry's variance is that of its family: s^2 = var(ln 100, ln 110)."""
    (sample,) = merge([one_pass({64: 100}), one_pass({64: 110})]).kernels
    deviation = math.log(1.1) / math.sqrt(2)
    assert sample.band == pytest.approx(math.expm1(2.5706 * deviation), rel=3e-3)


@pytest.mark.parametrize("num_passes", [2, 3])
def test_ninety_five_repeats_of_a_hundred_stay_within_their_band(num_passes: int) -> None:
    """Passes with normal noise of unequal size: 4 % on average, from entry to entry 2 to 6 %."""
    chance = random.Random(0)
    noise = [chance.uniform(0.02, 0.06) for _ in range(3000)]

    def measured() -> list[KernelSample]:
        samples = []
        for i, deviation in enumerate(noise):
            medians = tuple(
                round(10**6 * math.exp(chance.gauss(0, deviation))) for _ in range(num_passes)
            )
            middle = sorted(medians)[num_passes // 2] if num_passes % 2 else sum(medians) // 2
            samples.append(
                KernelSample(op="copy", dtype="fp32", shape=(i + 1,), p10_ns=1, p50_ns=middle,
                             p90_ns=10**9, num_samples=1, medians_ns=medians)
            )  # fmt: skip
        return samples

    kept = [
        abs(later.p50_ns / first.p50_ns - 1) <= first.band
        for first, later in zip(with_bands(measured()), measured(), strict=True)
    ]
    assert 0.94 <= sum(kept) / len(kept) <= 0.99


def test_students_quantiles_are_those_of_the_tables() -> None:
    table = {5: 2.571, 6: 2.447, 10: 2.228, 100: 1.984}
    assert {d: student(d) for d in table} == pytest.approx(table, rel=2e-3)


def test_the_rest_of_a_profile_is_merged() -> None:
    slowed = Interference(op="add_forward", dtype="fp32", shape=(64,), kind="all_reduce",
                          group_size=2, size_bytes=4, compute_slowdown=1.2,
                          communication_slowdown=1.0)  # fmt: skip
    merged = merge(
        [
            one_pass({64: 100}, host_ns={"step": 10}, context_bytes=5, missing=("b: lost",),
                     clocks=Clocks(least_mhz=900, median_mhz=1000, most_mhz=1100),
                     interference=(slowed,)),
            one_pass({64: 110}, host_ns={"step": 14, "launch": 3}, context_bytes=7,
                     missing=("a: lost",), measured_at="2026-11-21T00:00:00Z",
                     clocks=Clocks(least_mhz=800, median_mhz=1200, most_mhz=1250),
                     interference=(replace(slowed, compute_slowdown=1.4),)),
        ]
    )  # fmt: skip
    assert merged.host_ns == {"launch": 3, "step": 12}
    assert (merged.context_bytes, merged.missing) == (6, ("a: lost", "b: lost"))
    assert merged.measured_at == "2026-11-21T00:00:00Z"
    assert merged.clocks == Clocks(least_mhz=800, median_mhz=1100, most_mhz=1250, drift=1.1)
    assert merged.interference[0].compute_slowdown == pytest.approx(1.3)
    assert replace(merged.interference[0], compute_slowdown=1.2) == slowed


def test_other_machines_are_not_mixed_in() -> None:
    h100 = replace(FIRST, device=replace(FIRST.device, name="NVIDIA H100", num_ranks=8))
    with pytest.raises(InvalidInputError) as caught:
        merge([FIRST, h100])
    assert len(caught.value.problems) == 2
    assert "device.name is made-up in one and NVIDIA H100 in another" in str(caught.value)
    with pytest.raises(InvalidInputError, match="scales is"):
        merge([FIRST, replace(FIRST, scales={"compute": 1.1})])
    with pytest.raises(InvalidInputError, match="no profile to merge"):
        merge([])
