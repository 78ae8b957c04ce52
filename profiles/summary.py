"""What a profile says in a few tables: ceilings, errors of its interpolation, links, findings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from profiles.files import digest
from profiles.lookup import CostTable, ring_traffic
from profiles.profile import (
    Clocks,
    CollectiveSample,
    DeviceFacts,
    Interference,
    KernelSample,
    Profile,
)
from profiles.roofline import bus_bytes_per_s, data_sheet, kernel_rates, link_bytes_per_s
from profiles.surface import Shape, Surface
from profiles.validity import Finding, findings, place


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The best rate that was achieved, in flops or bytes a second, and what the data sheet says.

    `what` is a dtype, `memory`, or a collective kind; `sheet_per_s` is 0 where nothing is known.
    """

    what: str
    unit: Literal["flop/s", "bytes/s"]
    best_per_s: float
    where: str
    sheet_per_s: float

    @property
    def share(self) -> float | None:
        """The best rate over the data sheet's; None where that is not known."""
        return self.best_per_s / self.sheet_per_s if self.sheet_per_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sureness:
    """How well times between the measured ones are told, tried by leaving each out of the fit.

    `error_*` are absolute relative errors of the time so predicted, `stated` is the median
    standard deviation that the others state for it, a share too; None where too few shapes were
    measured to leave one out. `band` is the median band of the entries themselves.
    """

    band: float
    error_median: float | None
    error_p90: float | None
    stated: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One op in one dtype and variant: its shapes, from the least work to the most."""

    op: str
    dtype: str
    variant: str
    num_shapes: int
    least: Shape
    most: Shape
    sureness: Sureness


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveRow:
    """One collective in one group, with the law `latency_ns + size_bytes / bytes_per_s`.

    `bus_bytes_per_s` is that rate times `profiles.lookup.ring_traffic`. Both rates are 0 where the
    time does not grow with the size.
    """

    kind: str
    group_size: int
    stride: int
    num_sizes: int
    least_bytes: int
    most_bytes: int
    latency_ns: float
    bytes_per_s: float
    bus_bytes_per_s: float
    sureness: Sureness


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All that `layline profile --show` tells of one profile; `digest` is the whole profile's."""

    schema_version: int
    digest: str
    measured_at: str
    device: DeviceFacts
    versions: Mapping[str, str]
    clocks: Clocks
    context_bytes: int
    num_kernels: int
    num_collectives: int
    ceilings: tuple[Ceiling, ...]
    kernels: tuple[KernelRow, ...]
    collectives: tuple[CollectiveRow, ...]
    host_ns: Mapping[str, int]
    scales: Mapping[str, float]
    interference: tuple[Interference, ...]
    missing: tuple[str, ...]
    findings: tuple[Finding, ...]


def summarize(table: CostTable) -> Summary:
    """Return what the profile of `table`, which has no errors (`profiles.validity`), says."""
    profile = table.profile
    return Summary(
        schema_version=profile.schema_version,
        digest=digest(profile),
        measured_at=profile.measured_at,
        device=profile.device,
        versions=profile.versions,
        clocks=profile.clocks,
        context_bytes=profile.context_bytes,
        num_kernels=len(profile.kernels),
        num_collectives=len(profile.collectives),
        ceilings=ceilings(profile),
        kernels=_kernel_rows(table),
        collectives=_collective_rows(table),
        host_ns=profile.host_ns,
        scales=profile.scales,
        interference=profile.interference,
        missing=profile.missing,
        findings=findings(profile),
    )


def ceilings(profile: Profile) -> tuple[Ceiling, ...]:
    """Return the best rates of `profile`: arithmetic by dtype, memory, and the links by kind.

    Arithmetic is the best matrix product. Memory is the largest copy (where none was measured, the
    largest sum), since smaller ones may stay in a cache. A link's rate is its bus bandwidth.
    """
    sheet, link = data_sheet(profile.device), link_bytes_per_s(profile.device)
    found = []
    products = [sample for sample in profile.kernels if sample.op.startswith("linear_")]
    for dtype in sorted({sample.dtype for sample in products}):
        best = max((sample for sample in products if sample.dtype == dtype), key=_flops_per_s)
        peak = sheet.peak_flops_per_s.get(dtype, 0.0) if sheet else 0.0
        found.append(Ceiling(what=dtype, unit="flop/s", best_per_s=_flops_per_s(best),
                             where=place(best), sheet_per_s=peak))  # fmt: skip
    if (streamed := _largest_copy(profile.kernels)) is not None:
        found.append(Ceiling(what="memory", unit="bytes/s", best_per_s=kernel_rates(streamed)[1],
                             where=place(streamed),
                             sheet_per_s=sheet.memory_bytes_per_s if sheet else 0.0))  # fmt: skip
    for kind in sorted({sample.kind for sample in profile.collectives}):
        alike = [sample for sample in profile.collectives if sample.kind == kind]
        fastest = max(alike, key=bus_bytes_per_s)
        # An exchange fills both ways of a link, whose rate is that of one.
        found.append(Ceiling(what=kind, unit="bytes/s", best_per_s=bus_bytes_per_s(fastest),
                             where=place(fastest),
                             sheet_per_s=link * (2 if kind == "exchange" else 1)))  # fmt: skip
    return tuple(found)


def _flops_per_s(sample: KernelSample) -> float:
    return kernel_rates(sample)[0]


def _largest_copy(kernels: Sequence[KernelSample]) -> KernelSample | None:
    for op in ("copy", "add_forward"):
        # The faster one of equal bytes.
        sizes = [
            (kernel_rates(sample)[1] * sample.p50_ns, -sample.p50_ns, place(sample), sample)
            for sample in kernels
            if sample.op == op and not sample.variant
        ]
        if sizes:
            return max(sizes, key=lambda row: row[:3])[3]
    return None


def sureness(surface: Surface, bands: Sequence[float]) -> Sureness:
    """Return how sure times on `surface` are, given the bands of what was measured."""
    band = median(bands)
    if not can_leave_out(surface):
        return Sureness(band=band, error_median=None, error_p90=None, stated=None)
    left, stated = surface.left_out()
    # Left is ln(measured) - ln(predicted).
    errors = np.abs(np.expm1(-left))
    return Sureness(
        band=band,
        error_median=float(np.quantile(errors, 0.5)),
        error_p90=float(np.quantile(errors, 0.9)),
        stated=float(np.median(np.expm1(stated))),
    )


def can_leave_out(surface: Surface) -> bool:
    """Return whether enough was measured: a law through all points leaves nothing to be tried."""
    return len(surface.shapes) > max(2, int(np.count_nonzero(surface.law)))


def _kernel_rows(table: CostTable) -> tuple[KernelRow, ...]:
    alike: dict[tuple[str, str, str], list[KernelSample]] = {}
    for sample in table.profile.kernels:
        alike.setdefault((sample.op, sample.dtype, sample.variant), []).append(sample)
    rows = []
    for (op, dtype, variant), samples in sorted(alike.items()):
        ordered = sorted((sample.shape for sample in samples), key=lambda s: (math.prod(s), s))
        surface = table.kernel_surface(op, dtype, variant).surface
        rows.append(
            KernelRow(
                op=op,
                dtype=dtype,
                variant=variant,
                num_shapes=len(ordered),
                least=ordered[0],
                most=ordered[-1],
                sureness=sureness(surface, [sample.band for sample in samples]),
            )
        )
    return tuple(rows)


def _collective_rows(table: CostTable) -> tuple[CollectiveRow, ...]:
    alike: dict[tuple[str, int, int], list[CollectiveSample]] = {}
    for sample in table.profile.collectives:
        alike.setdefault((sample.kind, sample.group_size, sample.stride), []).append(sample)
    rows = []
    for (kind, group_size, stride), samples in sorted(alike.items()):
        surface = table.collective_surface(kind, group_size, stride).surface
        latency_ns, byte_ns = surface.law
        rate = float(1e9 / byte_ns) if byte_ns else 0.0
        rows.append(
            CollectiveRow(
                kind=kind,
                group_size=group_size,
                stride=stride,
                num_sizes=len(samples),
                least_bytes=min(sample.size_bytes for sample in samples),
                most_bytes=max(sample.size_bytes for sample in samples),
                latency_ns=float(latency_ns),
                bytes_per_s=rate,
                bus_bytes_per_s=rate * ring_traffic(kind, group_size),
                sureness=sureness(surface, [sample.band for sample in samples]),
            )
        )
    return tuple(rows)
