"""The tables about a profile, the same in the terminal and on the page."""

import math
from collections.abc import Sequence
from itertools import groupby

from profiles.difference import Difference
from profiles.quantity import format_quantity
from profiles.summary import Summary, Sureness
from profiles.surface import Shape
from profiles.validity import MEANINGS, Finding
from reports.accuracy import percent
from reports.document import Table
from reports.words import change, count, duration, size

KIND_WORDS = {
    "all_reduce": "all-reduce",
    "all_reduce_copy": "all-reduce, copied",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "broadcast": "broadcast",
    "send_recv": "message",
    "exchange": "exchange",
}
"""What the kinds of collectives are called."""

HOST_WORDS = {
    "launch": "launch of a kernel, one of many in a row",
    "launch_gap": "gap between kernels that do nothing",
    "dtensor_linear": "DTensor, a linear forward and backward",
    "pipeline_action": "pipeline runtime, an action",
    "step": "zero_grad and the optimizer step of 50 tensors, without kernels",
}
"""What the host costs of a profile are."""

MOST_SHOWN = 8
_SURE = ("band", "error", "P90", "stated")


def facts(summary: Summary) -> Table:
    """Return what was measured: device, driver, versions, clocks, date, digest."""
    device, clocks = summary.device, summary.clocks
    ranks = f"{device.num_ranks} rank{'s' * (device.num_ranks != 1)} over {device.backend}"
    if device.ranks_per_node:
        ranks += f", {device.ranks_per_node} on a node"
    name = device.name + (f" (capability {device.capability})" if device.capability else "")
    versions = ", ".join(f"{name} {text}" for name, text in sorted(summary.versions.items()))
    seen = (
        f"{clocks.least_mhz:,} to {clocks.most_mhz:,} MHz, median {clocks.median_mhz:,}"
        if clocks.most_mhz
        else "not told by this device"
    )
    # A drift that rounds to nothing has no sign.
    moved = round(100 * (clocks.drift - 1), 1) or 0.0
    rows = [
        ("device", f"{name}, {size(device.memory_bytes)}"),
        ("ranks", ranks),
        ("driver", device.driver or "not told"),
        ("versions", versions),
        ("clocks", f"{seen}; last over first pass {moved:+.1f} %"),
        ("measured", summary.measured_at),
        ("entries", f"{count(summary.num_kernels)} kernels, {count(summary.num_collectives)} "
                    f"collectives; {size(summary.context_bytes)} held by an idle rank"),
        ("digest", summary.digest),
        *(("missing", line) for line in summary.missing),
    ]  # fmt: skip
    if scales := [f"{name} x {scale:g}" for name, scale in sorted(summary.scales.items())]:
        rows.append(("recalibrated", ", ".join(scales)))
    return Table(head=("", ""), align="nl", rows=tuple(rows))


def ceilings(summary: Summary) -> Table:
    """Return the best achieved rates beside the data sheet's."""
    rows = []
    for ceiling in summary.ceilings:
        sheet = format_quantity(ceiling.sheet_per_s, ceiling.unit) if ceiling.sheet_per_s else "-"
        rows.append(
            (
                KIND_WORDS.get(ceiling.what, ceiling.what),
                format_quantity(ceiling.best_per_s, ceiling.unit),
                sheet,
                "-" if ceiling.share is None else f"{100 * ceiling.share:.0f} %",
                ceiling.where,
            )
        )
    return Table(head=("", "best", "data sheet", "share", "reached by"), align="nrrrl",
                 rows=tuple(rows))  # fmt: skip


def kernels(summary: Summary) -> Table:
    """Return a row an op, dtype and variant: shapes, band, and how well others are told."""
    rows = tuple(
        (
            " ".join(filter(None, (row.op, row.variant))),
            row.dtype,
            count(row.num_shapes),
            shape_text(row.least),
            shape_text(row.most),
            *_sure(row.sureness),
        )
        for row in summary.kernels
    )
    head = ("op", "dtype", "shapes", "least", "most", *_SURE)
    return Table(head=head, align="nlrllrrrr", rows=rows)


def collectives(summary: Summary) -> Table:
    """Return a row a collective and group: latency, rates, band, errors."""
    rows = tuple(
        (
            KIND_WORDS.get(row.kind, row.kind),
            group_text(row.group_size, row.stride),
            f"{size(row.least_bytes)} to {size(row.most_bytes)}",
            duration(row.latency_ns),
            _rate(row.bytes_per_s),
            _rate(row.bus_bytes_per_s),
            *_sure(row.sureness),
        )
        for row in summary.collectives
    )
    head = ("kind", "ranks", "sizes", "latency", "rate", "bus", *_SURE)
    return Table(head=head, align="nnnrrrrrrr", rows=rows)


def group_text(group_size: int, stride: int) -> str:
    """Return a group of ranks in few words.

    >>> group_text(4, 1), group_text(2, 4)
    ('4', '2, 4 apart')
    """
    return str(group_size) if stride == 1 else f"{group_size}, {stride} apart"


def shape_text(shape: Shape) -> str:
    """Return the sizes of a shape, powers of two from 2^13 on as such.

    >>> shape_text((4, 4096, 1 << 20)), shape_text((12345678,))
    ('4 x 4096 x 2^20', '12,345,678')
    """
    return " x ".join(map(_size_text, shape))


def _size_text(number: int) -> str:
    exponent = number.bit_length() - 1
    if exponent >= 13 and number == 1 << exponent:
        return f"2^{exponent}"
    return str(number) if number < 1 << 17 else count(number)


def _rate(bytes_per_s: float) -> str:
    return format_quantity(bytes_per_s, "bytes/s") if bytes_per_s else "-"


def _sure(found: Sureness) -> tuple[str, ...]:
    return tuple(
        map(percent, (found.band or None, found.error_median, found.error_p90, found.stated))
    )


def host(summary: Summary) -> Table:
    """Return the costs of the host, a row each."""
    rows = [(HOST_WORDS.get(key, key), duration(ns)) for key, ns in sorted(summary.host_ns.items())]
    return Table(head=("host cost", "a call"), align="lr", rows=tuple(rows))


def interference(summary: Summary) -> Table:
    """Return how kernels and collectives slow each other, a row a pair."""
    rows = [
        (
            f"{both.op} {both.dtype} {shape_text(both.shape)}",
            f"{KIND_WORDS.get(both.kind, both.kind)} of {size(both.size_bytes)}, "
            f"{both.group_size} ranks",
            f"{both.compute_slowdown:.2f} x",
            f"{both.communication_slowdown:.2f} x",
        )
        for both in summary.interference
    ]
    head = ("kernel", "beside", "kernel takes", "collective takes")
    return Table(head=head, align="llrr", rows=tuple(rows))


def found(findings: Sequence[Finding]) -> Table:
    """Return the findings by kind, the gravest kind first; of many alike only some."""
    order = list(MEANINGS)
    rows: list[tuple[str, str, str]] = []
    ranked = sorted(findings, key=lambda finding: (order.index(finding.kind), finding))
    for kind, alike in groupby(ranked, key=lambda finding: finding.kind):
        each = list(alike)
        shown = each if len(each) <= MOST_SHOWN else each[: MOST_SHOWN - 1]
        rows += [(MEANINGS[kind], finding.where, finding.what) for finding in shown]
        if left := len(each) - len(shown):
            rows.append((MEANINGS[kind], f"and {count(left)} more", "all of them in --json"))
    return Table(head=("finding", "where", "what"), align="lll", rows=tuple(rows))


def moved(told: Difference, most: int) -> Table:
    """Return the entries that moved by more than their bands, the largest change first."""
    rows = [
        (
            each.where,
            duration(each.first_ns),
            duration(each.second_ns),
            change(each.second_ns, each.first_ns),
            percent(each.band),
        )
        for each in told.beyond[:most]
    ]
    head = ("entry", "first", "second", "change", "band")
    return Table(head=head, align="lrrrr", rows=tuple(rows))


def moved_text(told: Difference) -> str:
    """Return in a sentence how many entries moved by more than their bands."""
    if told.share_within is None:
        return "The two profiles have no entry in common."
    typical = math.fsum(abs(math.log(each.ratio)) for each in told.changes) / len(told.changes)
    return (
        f"{count(len(told.beyond))} of {count(len(told.changes))} common entries moved by more "
        f"than the band that the first states ({percent(told.share_within)} stayed within); the "
        f"mean change either way is {percent(math.expm1(typical))}."
    )


def differing_text(told: Difference) -> str:
    """Return what else differs between two profiles, empty for nothing."""
    parts = []
    if told.differs:
        parts.append(
            "Not the same machine or software, so the bands promise nothing: "
            + "; ".join(told.differs)
        )
    for which, only in (("first", told.only_first), ("second", told.only_second)):
        if only:
            shown = ", ".join(only[:3]) + (", .." if len(only) > 3 else "")
            parts.append(f"{count(len(only))} entries are in the {which} alone: {shown}")
    return ". ".join(parts) + "." * bool(parts)
