"""Write profiles/data/kernels.toml from published kernel measurements.

Run as `python -m profiles.published.kernels FOLDER`; FOLDER holds kernels.csv and
ett_kernels.csv.gz. The same folder gives the same bytes. The formulas are those of
`profiles.kernel_curves`; here their numbers are found, by a search for the least mean of
|ln(predicted / measured)|, which outliers hardly move.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from profiles.kernel_curves import DTYPE_BYTES, AttentionCurve, MatmulCurve, fused_ns, matmul_ns
from profiles.presets import gpu_preset, gpu_presets
from profiles.published import devices as devices
from profiles.published import rows as published
from profiles.published.fit import Fit, Numbers, fit
from profiles.published.rows import AttentionRow, MatmulRow, MemoryRow

TARGET = Path(__file__).parent.parent / "data" / "kernels.toml"
HEADER = """\
# How fast published kernels ran: written by `python -m profiles.published.kernels FOLDER`.
#
# docs/reference.md has the formulas and the rules of extrapolation. `median` and `p90` are absolute
# relative errors over `rows` measurements, `cross_` the same over five folds, each predicted by
# a fit without it. `num_processors` counts streaming multiprocessors (compute units of MI300X).
"""

Table = dict[str, str | float | bool]
# No kernel that was timed ended sooner.
LEAST_LAUNCH_NS = 1500.0


def memory_curves(folder: Path) -> Iterator[tuple[str, Table]]:
    """Yield how each device streams memory.

    Additions give the share of the sheet's rate, GELUs the time to launch: theirs are the small
    sizes that the cache does not spoil.
    """
    found: dict[str, Table] = {}
    for gpu, (name, peak) in devices.OPERATOR_GPUS.items():

        def predict(at: Numbers, row: MemoryRow, peak: float = peak) -> float:
            return at["launch"] + 1e9 * row.size_bytes / (at[row.op] * peak)

        start = {"launch": 3000.0, "add": 0.8, "gelu_forward": 0.7, "gelu_backward": 0.7}
        result = fit(
            published.memory_rows(folder, name, devices.SMALLEST_ADD_BYTES), predict, start
        )
        found[gpu] = {
            "launch": f"{result.numbers['launch']:.0f} ns",
            "share": _digits(result.numbers["add"]),
            **result.errors,
            "source": f"{devices.OPERATORS} ({name}: additions and GELUs)",
            "date": "2025-01-01",
        }
    for gpu in gpu_presets():
        origin = devices.MEMORY_TWINS.get(gpu, devices.MEMORY_RELATIVES.get(gpu, gpu))
        yield (
            f"memory.{gpu}",
            {
                "num_processors": devices.NUM_PROCESSORS[gpu],
                **_told(found[origin], gpu, origin, gpu in devices.MEMORY_RELATIVES),
            },
        )


def matmul_curve(gpu: str, dtype: str, at: Numbers, memory_share: float) -> MatmulCurve:
    """Return the curve that the numbers `at` stand for."""
    value_bytes, result_bytes = DTYPE_BYTES[dtype]
    return MatmulCurve(
        launch_ns=max(LEAST_LAUNCH_NS, at["launch"]),
        flops_per_s=at["rate"],
        prologue=at["prologue"],
        small_tile=min(1.0, at["small_tile"]),
        throttle=at["throttle"],
        num_processors=devices.NUM_PROCESSORS[gpu],
        memory_bytes_per_s=memory_share * gpu_preset(gpu).memory_bytes_per_s,
        value_bytes=value_bytes,
        result_bytes=result_bytes,
    )


def fit_matmul(gpu: str, dtype: str, rows: Sequence[MatmulRow], share: float, launch: float) -> Fit:
    """Return the products of `gpu` in `dtype`; with `launch` 0 that is found, too.

    Rows of fp8 hold the cast of one operand: a second kernel, `cast_launch` and `cast` bytes a
    value. Those two are found along and left out of the curve.
    """

    def predict(at: Numbers, row: MatmulRow) -> float:
        curve = matmul_curve(gpu, dtype, {"launch": launch, **at}, share)
        ns = matmul_ns(curve, row.m, row.n, row.k)
        if row.has_cast:
            ns += at["cast_launch"] + 1e9 * at["cast"] * row.m * row.k / curve.memory_bytes_per_s
        return ns

    peak = gpu_preset(gpu).peak_flops_per_s[dtype]
    start = {"rate": 0.8 * peak, "prologue": 150.0, "small_tile": 0.9, "throttle": 0.05}
    start |= {"cast_launch": 8000.0, "cast": 6.0} if rows[0].has_cast else {}
    start |= {} if launch else {"launch": 2000.0}
    result = fit(rows, predict, start)
    return result._replace(numbers={"launch": launch, **result.numbers})


def matmul_curves(folder: Path, shares: Mapping[str, float]) -> dict[tuple[str, str], Table]:
    """Return the products of every device and dtype, by (device, dtype)."""
    found: dict[tuple[str, str], Table] = {}
    for gpu, origin in devices.MATMULS.items():
        launch = 0.0
        for dtype in origin.dtypes:
            rows = published.matmul_rows(folder, origin.name, dtype)
            result = fit_matmul(gpu, dtype, rows, shares[gpu], launch)
            launch = result.numbers["launch"]
            found[gpu, dtype] = {
                **_matmul_numbers(result.numbers),
                "smallest_dim": min(min(row[:3]) for row in rows),
                "most_flops": _digits(max(2.0 * row.m * row.n * row.k for row in rows)),
                **result.errors,
                "source": f"{origin.source} ({origin.name})",
                "date": origin.date,
                "is_extrapolated": False,
            }
    for gpu, twin in devices.MATMUL_TWINS.items():
        found[gpu, devices.WIDE] = _told(found[twin, devices.WIDE], gpu, twin, False)
    largest = {
        gpu: published.largest_tflops(folder, name, devices.WIDE)
        for gpu, name in devices.MAMF.items()
    }
    for gpu, relative in devices.MATMUL_RELATIVES.items():
        peaks, known = (gpu_preset(name).peak_flops_per_s for name in (gpu, relative))
        for dtype in ("fp8", "bf16", "fp16"):
            if dtype in peaks and (dtype != "fp16" or devices.WIDE not in peaks):
                origin_dtype = devices.WIDE if dtype == "fp16" else dtype
                ratio = peaks[dtype] / known[origin_dtype]
                if gpu in largest:
                    ratio = largest[gpu] / largest[relative]
                found[gpu, dtype] = _scaled(
                    found[relative, origin_dtype], gpu, relative, {"rate": ratio}
                )
    for gpu in gpu_presets():
        peaks = gpu_preset(gpu).peak_flops_per_s
        wide = devices.WIDE if devices.WIDE in peaks else "fp16"
        ratio = peaks["fp32"] / peaks[wide]
        found[gpu, "fp32"] = _scaled(found[gpu, wide], gpu, f"{gpu} in {wide}", {"rate": ratio})
    return found


def _matmul_numbers(at: Numbers) -> Table:
    return {
        "launch": f"{max(LEAST_LAUNCH_NS, at['launch']):.0f} ns",
        "rate": f"{at['rate'] / 1e12:.1f} TFLOP/s",
        "prologue": _digits(at["prologue"]),
        "small_tile": _digits(min(1.0, at["small_tile"])),
        "throttle": round(at["throttle"], 4),
    }


def attention_curve(gpu: str, direction: str, at: Numbers, share: float) -> AttentionCurve:
    """Return the curve of one direction that the numbers `at` stand for."""
    return AttentionCurve(
        launch_ns=at["launch"],
        flops_per_s=at[f"{direction}_rate"],
        scores_per_s=at[f"{direction}_scores"],
        overhead_keys=at[f"{direction}_overhead"],
        num_processors=devices.NUM_PROCESSORS[gpu],
        memory_bytes_per_s=share * gpu_preset(gpu).memory_bytes_per_s,
    )


def fit_attention(
    gpu: str, rows: Sequence[AttentionRow], share: float, launch: float, like: Numbers
) -> Fit:
    """Return the numbers of a fused kernel, forward and, where a row has it, backward.

    Rows that time both directions together cannot tell them apart: `like` has the numbers of the
    same kernel on another device, and two factors are found, one for each kind of rate.
    `torch_flow` times the host and helper kernels with the core: a constant, found along.
    """

    def predict(at: Numbers, row: AttentionRow) -> float:
        numbers = {"launch": launch, **(_times(like, at) if like else at)}
        ns = at["host"] if row.library == "torch_flow" else 0.0
        for direction in published.directions(row):
            ns += fused_ns(
                attention_curve(gpu, direction, numbers, share),
                published.DIRECTION_FLOPS[direction],
                batch=row.batch,
                heads=row.heads,
                kv_heads=row.kv_heads,
                queries=row.length,
                keys=row.length,
                head_size=row.head_size,
                causal=row.causal,
            )
        return ns

    peak = gpu_preset(gpu).peak_flops_per_s[devices.WIDE]
    start = {"host": 20_000.0} if rows[0].library == "torch_flow" else {}
    if like:
        start |= {"rate": 0.5, "scores": 0.5}
    for direction in sorted({part for row in rows for part in published.directions(row)}):
        if not like:
            start[f"{direction}_rate"] = 0.7 * peak
            start[f"{direction}_scores"] = 4e12
            start[f"{direction}_overhead"] = 200.0
    result = fit(rows, predict, start)
    found = _times(like, result.numbers) if like else result.numbers
    return result._replace(numbers={**found, "launch": launch})


def _times(like: Numbers, factors: Numbers) -> Numbers:
    return {name: value * factors.get(name.split("_")[-1], 1.0) for name, value in like.items()}


def attention_curves(
    folder: Path, shares: Mapping[str, float], launches: Mapping[str, float]
) -> dict[tuple[str, str], dict[str, Table]]:
    """Return the fused kernels of every device, by (device, kernel) and direction."""
    figures = partial(published.attention_rows, folder)
    a100, h100 = "A100-SXM4-80GB", "H100-SXM5-80GB"
    found: dict[tuple[str, str], dict[str, Table]] = {}
    hopper: Numbers = {}

    def add(
        gpu: str, kernel: str, rows: Sequence[AttentionRow], about: Table, like: Numbers
    ) -> Numbers:
        result = fit_attention(gpu, rows, shares[gpu], launches[gpu], like)
        found[gpu, kernel] = _directions(result.numbers, hopper, {**result.errors, **about})
        return result.numbers

    about: Table = {"source": f"{devices.FIGURES}; {devices.PAPER}", "date": "2024-07-01"}
    second, third = "FlashAttention-2", "FlashAttention-3"
    rows = [*figures(h100, second), *published.figure_rows(second)]
    flash2 = add("h100-sxm", "flash2", rows, about, {})
    rows = [*figures(h100, third), *published.figure_rows(third)]
    hopper = add("h100-sxm", "flash3", rows, about, {})
    about = {
        "source": f"{devices.FIGURES}; split by direction as on h100-sxm",
        "date": "2023-07-01",
    }
    add("a100-sxm-80gb", "flash2", figures(a100, second), about, flash2)
    for gpu in devices.BLACKWELL:
        name = devices.MATMULS[gpu].name
        about = {"source": f"{devices.AICONFIGURATOR} ({name})", "date": "2026-01-01"}
        add(gpu, "flash3", figures(name, "torch_flow"), about, {})
    return found


def _directions(at: Numbers, hopper: Numbers, about: Table) -> dict[str, Table]:
    """Return the tables of both directions.

    Where no backward was measured it stands to the forward as on Hopper with flash3.
    """
    tables: dict[str, Table] = {}
    for direction in ("forward", "backward"):
        is_measured = f"{direction}_rate" in at
        numbers = {
            name: at[f"{direction}_{name}"]
            if is_measured
            else at[f"forward_{name}"] * hopper[f"backward_{name}"] / hopper[f"forward_{name}"]
            for name in ("rate", "scores", "overhead")
        }
        tables[direction] = {
            "launch": f"{at['launch']:.0f} ns",
            "rate": f"{numbers['rate'] / 1e12:.1f} TFLOP/s",
            "scores_per_s": _digits(numbers["scores"]),
            "overhead_keys": _digits(numbers["overhead"]),
            **about,
            "is_extrapolated": not is_measured,
        }
        if not is_measured:
            tables[direction]["source"] = f"{about['source']}, forward x backward of h100-sxm"
    return tables


def spread_attention(
    found: Mapping[tuple[str, str], Mapping[str, Table]],
    matmuls: Mapping[tuple[str, str], Table],
) -> Iterator[tuple[str, Table]]:
    """Yield the attention of every device: its own, its twin's, or its relative's scaled.

    Both rates of a relative's kernel are scaled by the ratio of the rates of matrix products.
    """
    for (origin, kernel), tables in found.items():
        for direction, table in tables.items():
            yield f"attention.{origin}.{kernel}.{direction}", table
            for gpu, twin in devices.ATTENTION_TWINS.items():
                if twin == origin:
                    is_far = bool(table["is_extrapolated"])
                    yield f"attention.{gpu}.{kernel}.{direction}", _told(table, gpu, twin, is_far)
            for gpu, relative in devices.ATTENTION_RELATIVES.items():
                if relative == origin:
                    ratio = _rate(matmuls[gpu, devices.WIDE]) / _rate(
                        matmuls[relative, devices.WIDE]
                    )
                    factors = {"rate": ratio, "scores_per_s": ratio}
                    scaled = _scaled(table, gpu, relative, factors)
                    yield f"attention.{gpu}.{kernel}.{direction}", scaled


def _rate(table: Table) -> float:
    return float(str(table["rate"]).split()[0])


def _digits(value: float) -> float:
    """Return `value` with four significant digits."""
    return float(f"{value:.4g}")


def _told(table: Table, gpu: str, origin: str, is_extrapolated: bool) -> Table:
    told = {**table, "is_extrapolated": is_extrapolated}
    if gpu != origin:
        told["source"] = f"{table['source']}; {gpu} as {origin}"
    return told


def _scaled(table: Table, gpu: str, origin: str, factors: Mapping[str, float]) -> Table:
    scaled = _told(table, gpu, origin, True)
    for name, factor in factors.items():
        value = table[name]
        if isinstance(value, str):
            scaled[name] = f"{factor * float(value.split()[0]):.1f} {value.split()[1]}"
        else:
            scaled[name] = _digits(factor * value)
    ratio = next(iter(factors.values()))
    scaled["source"] = f"{table['source']}; {gpu} = {ratio:.3f} x {origin}"
    return scaled


def render(tables: Mapping[str, Table]) -> str:
    """Return the text of the data file; the numbers that are read back give it again."""
    parts = [HEADER]
    for name in sorted(tables):
        lines = [f"[{name}]"]
        for key, value in tables[name].items():
            text = f'"{value}"' if isinstance(value, str) else str(value).lower()
            lines.append(f"{key} = {text}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def kernel_tables(folder: Path) -> dict[str, Table]:
    """Return every table of kernels.toml by its name, found from the measurements in `folder`."""
    tables = dict(memory_curves(folder))
    shares = {gpu: float(tables[f"memory.{gpu}"]["share"]) for gpu in gpu_presets()}
    matmuls = matmul_curves(folder, shares)
    tables |= {f"matmul.{gpu}.{dtype}": table for (gpu, dtype), table in matmuls.items()}
    launches = {
        gpu: float(str(table["launch"]).split()[0])
        for (gpu, dtype), table in matmuls.items()
        if dtype == devices.WIDE
    }
    attention = attention_curves(folder, shares, launches)
    tables |= dict(spread_attention(attention, matmuls))
    return tables


def main() -> None:
    """Write the data file."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m profiles.published.kernels FOLDER")
    TARGET.write_text(render(kernel_tables(Path(sys.argv[1]))), encoding="utf-8")


if __name__ == "__main__":
    main()
