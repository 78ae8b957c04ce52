"""Reference kernels: closed forms, properties at any size, published measurements, the fit."""

import csv
import gzip
import math
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import InvalidInputError
from profiles.kernel_curves import (
    AttentionCurve,
    MatmulCurve,
    attention,
    fused_ns,
    matmul,
    matmul_curve,
    matmul_ns,
    memory_pass,
)
from profiles.presets import gpu_preset, gpu_presets
from profiles.published import kernels as published_kernels
from profiles.published import rows as published_rows
from profiles.published.fit import Numbers, fit, search
from profiles.published.rows import MatmulRow

TEXT = resources.files("profiles").joinpath("data", "kernels.toml").read_text(encoding="utf-8")
TABLES: dict[str, Any] = tomllib.loads(TEXT)
PRODUCTS = [(gpu, dtype) for gpu, tables in TABLES["matmul"].items() for dtype in tables]
KERNELS = [(gpu, kernel) for gpu, tables in TABLES["attention"].items() for kernel in tables]
SIZES = st.integers(1, 200_000)

IDEAL = MatmulCurve(
    launch_ns=0.0,
    flops_per_s=1e12,
    prologue=0.0,
    small_tile=1.0,
    throttle=0.0,
    num_processors=1,
    memory_bytes_per_s=1e30,
    value_bytes=2,
    result_bytes=2,
)


def tflops(ns: float, flops: float) -> float:
    return flops / ns / 1e3


def attention_tflops(
    gpu: str, kernel: str, directions: str, length: int, head_size: int, *, causal: bool
) -> float:
    """Rate as FlashAttention's figures count it: 16k tokens, hidden 2048."""
    heads, batch = 2048 // head_size, 16384 // length
    flops = 4.0 * batch * heads * length**2 * head_size / (2 if causal else 1)
    ns, counted = 0.0, 0.0
    for direction in directions.split("+"):
        estimate = attention(
            gpu,
            kernel,
            direction,
            batch=batch,
            heads=heads,
            kv_heads=heads,
            queries=length,
            keys=length,
            head_size=head_size,
            causal=causal,
        )
        ns += estimate.ns
        counted += flops * (2.5 if direction == "backward" else 1.0)
    return tflops(ns, counted)


@given(m=st.integers(1, 20), n=st.integers(1, 20), k=st.integers(1, 9000))
def test_an_ideal_processor_takes_flops_over_rate(m: int, n: int, k: int) -> None:
    expected = 2.0 * 256 * m * 256 * n * k / 1e3
    assert matmul_ns(IDEAL, 256 * m, 256 * n, k) == pytest.approx(expected)


def test_one_tile_too_many_costs_a_wave() -> None:
    # A slow memory makes the partial sums of a split dearer than the wave.
    eight = IDEAL._replace(num_processors=8, small_tile=0.01, memory_bytes_per_s=4e10)
    one_wave = matmul_ns(eight, 8 * 256, 128, 100)
    assert one_wave == pytest.approx(2.0 * 256 * 128 * 100 * 8 / 1e3)
    assert matmul_ns(eight, 8 * 256 + 1, 128, 100) == pytest.approx(2 * one_wave)


def test_a_product_with_few_tiles_is_split_over_k() -> None:
    four = IDEAL._replace(num_processors=4, small_tile=0.01)
    whole = 2.0 * 256 * 128 * 40_000 * 4 / 1e3
    assert matmul_ns(four, 256, 128, 40_000) == pytest.approx(whole / 4)


def test_a_narrow_product_waits_for_memory() -> None:
    narrow = IDEAL._replace(memory_bytes_per_s=1e9, flops_per_s=1e18, launch_ns=7.0)
    moved = 2 * (4096 * 4096 + 4096 * 16) + 2 * 4096 * 16
    assert matmul_ns(narrow, 4096, 16, 4096) == pytest.approx(7.0 + moved, rel=1e-3)


def test_long_kernels_are_throttled() -> None:
    hot = IDEAL._replace(throttle=0.2)
    short, long = (256, 256, 1), (25_600, 25_600, 10_000)
    assert matmul_ns(hot, *short) == pytest.approx(matmul_ns(IDEAL, *short), rel=1e-2)
    assert matmul_ns(hot, *long) == pytest.approx(1.2 * matmul_ns(IDEAL, *long), rel=1e-2)


@pytest.mark.parametrize(("gpu", "dtype"), PRODUCTS)
def test_large_products_stay_below_the_peak(gpu: str, dtype: str) -> None:
    peak = gpu_preset(gpu).peak_flops_per_s[dtype]
    rate = 1e9 * 2.0 * 16384**3 / matmul(gpu, dtype, 16384, 16384, 16384).ns
    assert 0.4 * peak < rate < peak


@given(product=st.sampled_from(PRODUCTS), sizes=st.tuples(SIZES, SIZES, SIZES), more=SIZES)
def test_products_never_get_cheaper_as_they_grow(
    product: tuple[str, str], sizes: tuple[int, int, int], more: int
) -> None:
    ns = matmul(*product, *sizes).ns
    assert 1000 <= ns < math.inf
    for place in range(3):
        grown = [size + more if at == place else size for at, size in enumerate(sizes)]
        assert matmul(*product, *grown).ns >= ns


@given(
    kernel=st.sampled_from(KERNELS),
    direction=st.sampled_from(["forward", "backward"]),
    batch=st.integers(1, 64),
    heads=st.integers(1, 128),
    length=st.integers(1, 200_000),
    head_size=st.integers(1, 512),
)
def test_attention_grows_with_all_that_it_does(
    kernel: tuple[str, str], direction: str, batch: int, heads: int, length: int, head_size: int
) -> None:
    gpu, name = kernel

    def ns(direction: str, causal: bool = True, **more: int) -> float:
        shape = {"batch": batch, "heads": heads, "kv_heads": heads, "head_size": head_size}
        shape |= {"queries": length, "keys": length} | more
        return attention(gpu, name, direction, causal=causal, **shape).ns

    base = ns(direction)
    assert 1000 <= base < math.inf
    assert ns(direction, causal=False) >= base
    assert ns(direction, kv_heads=1) <= base
    assert ns(direction, batch=batch + 1) >= base
    assert ns(direction, heads=heads + 1) >= base
    assert ns(direction, keys=length + 1) >= base
    assert ns(direction, queries=length + 128) >= base
    assert ns(direction, head_size=head_size + 1) >= base
    assert ns("backward") >= ns("forward")


def test_fused_attention_is_products_plus_exponentials() -> None:
    curve = AttentionCurve(
        launch_ns=5.0,
        flops_per_s=1e12,
        scores_per_s=1e10,
        overhead_keys=0.0,
        num_processors=0,
        memory_bytes_per_s=1e30,
    )
    shape = {"batch": 1, "heads": 1, "kv_heads": 1, "queries": 256, "keys": 512, "head_size": 64}
    whole = 256 * 512 * (4 * 64 / 1e3 + 1 / 10)
    assert fused_ns(curve, 1.0, causal=False, **shape) == pytest.approx(5 + whole)
    causal = 256 * (512 + 128) / 2 * (2.5 * 4 * 64 / 1e3 + 1 / 10)
    assert fused_ns(curve, 2.5, causal=True, **shape) == pytest.approx(5 + causal)


def test_a_memory_pass_is_a_launch_and_a_rate() -> None:
    for gpu in gpu_presets():
        none, one, two = (memory_pass(gpu, size).ns for size in (0, 10**9, 2 * 10**9))
        assert two - one == pytest.approx(one - none)
        share = 1e18 / (one - none) / gpu_preset(gpu).memory_bytes_per_s
        assert 0.8 < share < 0.95
        assert 1000 < none < 6000


# FlashAttention's figures (github:Dao-AILab/flash-attention assets): rates in TFLOP/s.
@pytest.mark.parametrize(
    ("gpu", "kernel", "directions", "length", "head_size", "causal", "published"),
    [
        ("a100-sxm-80gb", "flash2", "forward+backward", 16384, 128, True, 189),
        ("a100-sxm-80gb", "flash2", "forward+backward", 2048, 64, True, 140),
        ("a100-sxm-80gb", "flash2", "forward+backward", 4096, 128, False, 196),
        ("h100-sxm", "flash2", "forward", 8192, 128, True, 333),
        ("h100-sxm", "flash2", "forward+backward", 8192, 64, True, 273),
        ("h100-sxm", "flash3", "forward", 16384, 128, False, 648),
        ("h100-sxm", "flash3", "forward", 8192, 64, True, 460),
        ("h100-sxm", "flash3", "forward", 4096, 256, False, 736),
        ("h100-sxm", "flash3", "backward", 8192, 128, False, 559),
    ],
)
def test_attention_runs_as_published(
    gpu: str, kernel: str, directions: str, length: int, head_size: int, *, causal: bool,
    published: float,
) -> None:  # fmt: skip
    found = attention_tflops(gpu, kernel, directions, length, head_size, causal=causal)
    assert found == pytest.approx(published, rel=0.06)


# stas00/ml-engineering, MAMF: the best shape of a search, in TFLOP/s; no curve saw these.
@pytest.mark.parametrize(
    ("gpu", "dtype", "shape", "largest"),
    [
        ("a100-sxm-80gb", "bf16", (1024, 10240, 5120), 271.2),
        ("a100-pcie-80gb", "bf16", (2048, 5120, 6144), 252.9),
        ("h100-sxm", "bf16", (2048, 2048, 13312), 794.5),
        ("h100-sxm", "fp8", (1024, 9216, 14336), 1402.6),
        ("h200-sxm", "fp8", (1280, 4096, 12032), 1453.4),
        ("b200-sxm", "bf16", (1792, 16128, 3072), 1745.0),
        ("b200-sxm", "fp8", (15360, 4096, 3072), 3432.5),
        ("gb200", "bf16", (4096, 9728, 2048), 1822.0),
        ("b300-sxm", "bf16", (12288, 18432, 1024), 1769.0),
    ],
)
def test_the_best_shapes_of_a_search_are_fast_here_too(
    gpu: str, dtype: str, shape: tuple[int, int, int], largest: float
) -> None:
    found = tflops(matmul(gpu, dtype, *shape).ns, 2.0 * math.prod(shape))
    assert found == pytest.approx(largest, rel=0.12)


def test_every_device_has_every_curve_with_its_source() -> None:
    for gpu in gpu_presets():
        peaks = gpu_preset(gpu).peak_flops_per_s
        for dtype in {"fp32", "fp16", "bf16", "fp8"} & set(peaks):
            assert matmul_curve(gpu, dtype).num_processors >= 80
    tables = [*TABLES["memory"].values()]
    tables += [table for group in TABLES["matmul"].values() for table in group.values()]
    tables += [
        table
        for kernels in TABLES["attention"].values()
        for directions in kernels.values()
        for table in directions.values()
    ]
    for table in tables:
        assert "github" in table["source"]
        assert "2023-01-01" <= table["date"] <= "2026-11-20"
        assert table["cross_median"] <= 0.08
        assert table["cross_p90"] <= 0.25


def test_what_was_not_measured_says_so() -> None:
    big = (8192, 8192, 8192)
    for gpu in ("a100-sxm-40gb", "a100-sxm-80gb", "h100-sxm", "h200-sxm", "b200-sxm", "l40s"):
        assert not matmul(gpu, "bf16", *big).is_extrapolated
        assert matmul(gpu, "fp32", *big).is_extrapolated
        assert matmul(gpu, "bf16", 8192, 64, 8192).is_extrapolated
    for gpu in ("v100-sxm2-32gb", "gb300", "mi300x", "h100-pcie"):
        assert matmul(gpu, "fp16", *big).is_extrapolated
    assert matmul("h100-sxm", "bf16", *(200_000,) * 3).is_extrapolated


def core(gpu: str, kernel: str, direction: str = "forward", head_size: int = 128) -> Any:
    return attention(
        gpu, kernel, direction, batch=1, heads=32, kv_heads=8, queries=4096, keys=4096,
        head_size=head_size,
    )  # fmt: skip


def test_a_device_takes_the_nearest_kernel_that_it_has() -> None:
    assert core("a100-sxm-80gb", "flash3") == core("a100-sxm-80gb", "flash2")
    assert core("b200-sxm", "flash2") == core("b200-sxm", "flash3")
    assert core("v100-sxm2-32gb", "flash2") == core("v100-sxm2-32gb", "unfused")
    assert core("h100-sxm", "flash3").ns < core("h100-sxm", "flash2").ns
    assert core("b200-sxm", "flash3", "backward").is_extrapolated
    assert not core("b200-sxm", "flash3").is_extrapolated
    assert core("h100-sxm", "flash3", head_size=32).is_extrapolated


@pytest.mark.parametrize(
    ("direction", "bytes_per_score"), [("forward", 4 + 5 + 2 + 2), ("backward", 6 + 5 + 4 * 2)]
)
@pytest.mark.parametrize("gpu", gpu_presets())
def test_unfused_attention_moves_its_scores(gpu: str, direction: str, bytes_per_score: int) -> None:
    moved = memory_pass(gpu, bytes_per_score * 32 * 4096**2).ns
    assert 0.95 * moved < core(gpu, "unfused", direction).ns < 1.7 * moved


def test_errors_name_the_way_out() -> None:
    with pytest.raises(ValueError, match=r'a100-sxm-80gb has dtype "fp8".*use one of bf16, fp32'):
        matmul("a100-sxm-80gb", "fp8", 8192, 8192, 8192)
    with pytest.raises(InvalidInputError, match="h100-sxm"):
        matmul("h100-smx", "bf16", 8192, 8192, 8192)


def test_the_data_file_is_as_the_module_writes_it() -> None:
    flat: dict[str, published_kernels.Table] = {}

    def walk(name: str, table: dict[str, Any]) -> None:
        if "source" in table:
            flat[name] = table
            return
        for key, value in table.items():
            walk(f"{name}.{key}" if name else key, value)

    walk("", TABLES)
    assert published_kernels.render(flat) == TEXT


def test_the_search_shrugs_off_outliers() -> None:
    data = [(x, 3.0 * x + 5.0) for x in range(1, 40)] + [(10, 5000.0), (20, 1.0)]
    found = search(
        lambda at: [math.log((at["slope"] * x + at["start"]) / y) for x, y in data],
        {"slope": 1.0, "start": 1.0},
    )
    assert found["slope"] == pytest.approx(3.0, rel=0.02)
    assert found["start"] == pytest.approx(5.0, rel=0.05)


def test_the_fit_finds_the_curve_behind_its_rows() -> None:
    truth = matmul_curve("h100-sxm", "bf16")
    shapes = [(1024 << a, 512 << b, 640 << c) for a in range(4) for b in range(4) for c in range(3)]
    rows = [MatmulRow(m, n, k, matmul_ns(truth, m, n, k)) for m, n, k in shapes]

    def predict(at: Numbers, row: MatmulRow) -> float:
        curve = truth._replace(flops_per_s=at["rate"], prologue=at["prologue"])
        return matmul_ns(curve, row.m, row.n, row.k)

    found = fit(rows, predict, {"rate": 5e14, "prologue": 50.0})
    assert found.numbers["rate"] == pytest.approx(truth.flops_per_s, rel=0.01)
    assert found.numbers["prologue"] == pytest.approx(truth.prologue, rel=0.03)
    assert found.errors["cross_p90"] <= 0.01


def test_rows_are_read_in_this_projects_terms(tmp_path: Path) -> None:
    fields = "kind source gpu dtype m n k batch seq heads kv_heads head_dim causal direction"
    names = [*fields.split(), "library", "value", "unit"]
    lines = [
        "gemm,AIC,G,fp8,1024,2048,4096,,,,,,,fwd,L,0.5,ms",
        "gemm,SimuMax,G,bf16,1000,1000,1000,1,,,,,,dgrad,L,2,TFLOP/s",
        "gemm,MAMF,G,bf16,1,1,1,,,,,,,fwd,L,700,TFLOP/s",
        "attention,Fig,G,fp16,,,,2,1000,4,4,64,True,fwd+bwd,FlashAttention-2,100,TFLOP/s",
        "attention,AIC,G,bf16,,,,1,512,8,0,64,True,fwd,torch_flow 1,0.25,ms",
    ]
    (tmp_path / "kernels.csv").write_text("\n".join([",".join(names), *lines]), encoding="utf-8")
    assert published_rows.matmul_rows(tmp_path, "G", "fp8") == [
        MatmulRow(1024, 2048, 4096, 500_000.0, True)
    ]
    assert published_rows.matmul_rows(tmp_path, "G", "bf16") == [MatmulRow(1000, 1000, 1000, 1e6)]
    assert published_rows.largest_tflops(tmp_path, "G", "bf16") == 700
    (both,) = published_rows.attention_rows(tmp_path, "G", "FlashAttention")
    assert both.ns == pytest.approx(3.5 * 4 * 2 * 4 * 1000**2 * 64 / 2 / 100e3)
    (flow,) = published_rows.attention_rows(tmp_path, "G", "torch_flow")
    assert (flow.kv_heads, flow.ns, flow.direction) == (8, 250_000.0, "forward")


def test_operators_are_read_as_bytes(tmp_path: Path) -> None:
    names = ["gpu", "kind", "op", "mp", "b", "l", "dim", "direction", "time_us"]
    table = [
        ["G", "operator", "res_add", "", "8", "5120", "8192", "fwd", "1134.8"],
        ["G", "operator", "res_add", "", "1", "8", "8", "fwd", "3"],
        ["G", "operator", "gelu", "2", "1", "1024", "2048", "bwd", "25"],
    ]
    with gzip.open(tmp_path / "ett_kernels.csv.gz", "wt", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *table])
    add, gelu = published_rows.memory_rows(tmp_path, "G", 10**6)
    assert (add.op, add.size_bytes, add.ns) == ("add", 6 * 8 * 5120 * 8192, 1_134_800.0)
    assert (gelu.op, gelu.size_bytes) == ("gelu_backward", 6 * 1024 * 2048 * 4 // 2)
