"""The witness: neutral without layers, exact on layers that were made up, bounded."""

from dataclasses import replace

import pytest

from planner.kernels import StageShape, layer_backward, layer_forward
from planner.witness import BOUNDS, Witness, expected, read_witness
from profiles.lookup import CostTable
from profiles.model import ModelSpec
from profiles.profile import Cost, KernelSample, Profile
from tests.machine import made_up_profile

SHAPE = (4, 256, 256, 8, 32, 768)
LOCAL = StageShape(
    model=ModelSpec(
        name="layer",
        num_layers=1,
        hidden=256,
        num_heads=8,
        num_kv_heads=8,
        head_size=32,
        ffn=768,
        vocab=1,
        max_seq_len=256,
    ),
    tp=1,
    micro_batch=4,
    seq_len=256,
)


def with_layers(forward: float, backward: float, spread: float) -> Profile:
    """Return a profile in which a layer takes so many times the sum of its kernels."""
    profile = made_up_profile(num_ranks=2)
    table = CostTable(profile)
    layers = []
    for op, parts, factor in (
        ("layer_forward", layer_forward(LOCAL), forward),
        ("layer_backward", layer_backward(LOCAL), backward),
    ):
        ns = factor * sum(table.kernel(part.op, "fp32", part.shape).p50_ns for part in parts)
        quantiles = [round(ns * (1 + side * 1.2815 * spread)) for side in (-1, 0, 1)]
        layers.append(
            KernelSample(
                op=op,
                dtype="fp32",
                shape=SHAPE,
                p10_ns=quantiles[0],
                p50_ns=quantiles[1],
                p90_ns=quantiles[2],
                num_samples=9,
            )
        )
    return replace(profile, kernels=(*profile.kernels, *layers))


def test_no_layers_no_correction() -> None:
    assert read_witness(CostTable(made_up_profile(2)), "fp32") == Witness()


def test_ratios_and_spread_are_read_back() -> None:
    witness = read_witness(CostTable(with_layers(1.2, 1.1, 0.05)), "fp32")
    assert witness.forward == pytest.approx(1.2, rel=1e-4)
    assert witness.backward == pytest.approx(1.1, rel=1e-4)
    assert witness.spread == pytest.approx(0.05, rel=1e-3)


def test_a_broken_layer_stops_at_the_bounds() -> None:
    witness = read_witness(CostTable(with_layers(40.0, 0.01, 0.0)), "fp32")
    assert (witness.forward, witness.backward) == (BOUNDS[1], BOUNDS[0])


def test_groups_wait_longer_the_larger_they_are() -> None:
    waits = [Witness(spread=0.1).skew_ns(1_000_000, n) for n in (1, 2, 4, 8)]
    assert waits == sorted(waits)
    # E[max] of 2, 4 and 8 standard normals: 0.564, 1.029, 1.424 (tables of order statistics).
    assert waits[1:] == pytest.approx([56_400, 102_900, 142_400], rel=0.05)


def test_the_mean_of_a_symmetric_cost_is_its_median() -> None:
    assert expected(Cost(p10_ns=10, p50_ns=20, p90_ns=30)).p50_ns == 20
