"""Whether a profile can be true: what is impossible in it, and what a reader should know of it.

A finding is an error where no machine can have measured that, or no look-up can read it:
`profiles.store.load_profile` refuses such a file. All other findings are warnings, shown by
`layline profile --show`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from profiles.lookup import kernel_works
from profiles.profile import CollectiveSample, KernelSample, Profile
from profiles.quantity import format_quantity
from profiles.roofline import (
    BEYOND_CACHES_BYTES,
    data_sheet,
    kernel_need,
    least_traffic,
    link_bytes_per_s,
)

Sample = KernelSample | CollectiveSample
Kind = Literal[
    "band", "ceiling", "constant", "drift", "duplicate", "fabric", "missing", "monotone", "order",
    "positive", "repeat", "shape", "single",
]  # fmt: skip

MEANINGS: dict[Kind, str] = {
    "ceiling": "faster than the hardware can be",
    "duplicate": "entries of the same thing",
    "fabric": "a wire without ends",
    "order": "quantiles out of order",
    "positive": "a value that must be above 0",
    "shape": "a shape that the op does not have",
    "missing": "asked for and not measured",
    "drift": "the machine changed while it was measured",
    "repeat": "single pass: how it repeats is not known",
    "band": "an uncertain time",
    "single": "a single call",
    "constant": "the same time over sizes far apart",
    "monotone": "a larger shape is faster",
}
"""What each kind of finding says: errors first, then warnings, the gravest first."""

ERRORS: frozenset[Kind] = frozenset(
    ("ceiling", "duplicate", "fabric", "order", "positive", "shape")
)

# GPUs boost above the clock of their sheet: the H100 SXM's tensor peaks are those of 1,830 MHz, and
# it runs at up to 1,980 MHz.
_BOOST = 1.1
_MOST_DRIFT = 0.05
_MOST_BAND = 0.3
# A faster larger shape is worth a word if it takes less than this share of the smaller one's time,
# and if that is beyond this many standard deviations of their difference.
_LESS, _DEVIATIONS = 0.75, 3.0
_CONSTANT_RANGE, _CONSTANT_SAMPLES = 100.0, 3

_NUM_SIZES = {"linear": 3, "attention": 5, "norm": 2, "rope": 1, "swiglu": 1, "add": 1,
              "embedding": 3, "cross_entropy": 2, "layer": 6, "adamw": 1, "clip": 1, "copy": 1,
              "cast": 1, "to_host": 1, "from_host": 1, "reference": 3}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Finding:
    """One thing about a profile: its kind, the entry it is about, and what was found."""

    kind: Kind
    where: str
    what: str

    @property
    def is_error(self) -> bool:
        """Whether no profile can have this."""
        return self.kind in ERRORS


def findings(profile: Profile) -> tuple[Finding, ...]:
    """Return the errors of `profile`; the warnings of one that has none."""
    return errors(profile) or warnings(profile)


def errors(profile: Profile) -> tuple[Finding, ...]:
    """Return what is impossible in `profile`, sorted; empty for one that can be used."""
    found = [*_bad_numbers(profile), *_duplicates(profile), *_loose_wires(profile)]
    for sample in profile.kernels:
        found += _bad_sample(sample) or _bad_shape(sample)
    for message in profile.collectives:
        found += _bad_sample(message) or _bad_group(message)
    # Rates need times and shapes that hold.
    return tuple(sorted(found or _above_ceilings(profile)))


def warnings(profile: Profile) -> tuple[Finding, ...]:
    """Return what a reader of `profile`, which has no errors, should know; sorted."""
    found = [Finding(kind="missing", where="profile", what=line) for line in profile.missing]
    if abs(profile.clocks.drift - 1.0) > _MOST_DRIFT:
        what = f"the last pass took {profile.clocks.drift:.3f} times the first, in the median"
        found.append(Finding(kind="drift", where="clocks", what=what))
    samples: list[Sample] = [*profile.kernels, *profile.collectives]
    for sample in samples:
        if sample.band > _MOST_BAND:
            what = f"measured again it may differ by {100 * sample.band:.0f} %"
            found.append(Finding(kind="band", where=place(sample), what=what))
        if sample.num_samples == 1:
            found.append(Finding(kind="single", where=place(sample), what="was timed once"))
    if alone := [sample for sample in samples if len(sample.medians_ns) == 1]:
        what = f"{len(alone)} of {len(samples)} entries have one pass"
        found.append(Finding(kind="repeat", where="profile", what=what))
    for family in families(samples):
        found += _constant(family)
        found += _falls(family)
    return tuple(sorted(found))


def place(sample: Sample) -> str:
    """Return which entry `sample` is, in words.

    >>> place(KernelSample(op="add_forward", dtype="fp32", shape=(8,), variant="compiled",
    ...                    p10_ns=1, p50_ns=1, p90_ns=1, num_samples=2))
    'add_forward fp32 compiled 8'
    """
    if isinstance(sample, CollectiveSample):
        apart = f", {sample.stride} apart" if sample.stride != 1 else ""
        return f"{sample.kind} of {sample.group_size} ranks{apart}, {_sizes_text(sample)}"
    return " ".join(filter(None, (sample.op, sample.dtype, sample.variant, _sizes_text(sample))))


def _sizes_text(sample: Sample) -> str:
    if isinstance(sample, CollectiveSample):
        return format_quantity(sample.size_bytes, "bytes")
    return " x ".join(map(str, sample.shape))


def families(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Return `samples` by all of their key but the size, each in order of size."""
    alike: dict[tuple[object, ...], list[Sample]] = {}
    for sample in samples:
        alike.setdefault((type(sample).__name__, *sample.key[:-1]), []).append(sample)
    return [sorted(family, key=sizes) for family in alike.values()]


def sizes(sample: Sample) -> tuple[int, ...]:
    """Return the axes along which alike samples differ."""
    return sample.shape if isinstance(sample, KernelSample) else (sample.size_bytes,)


def deviation(sample: Sample) -> float:
    """Return the standard deviation of the logarithm of a sample's median, by its band.

    The band is 1.96 standard deviations of the difference of two such medians.
    """
    return math.log1p(sample.band) / (1.96 * math.sqrt(2.0))


def _bad_numbers(profile: Profile) -> Iterator[Finding]:
    facts: list[tuple[str, float, bool]] = [
        ("device.num_ranks", profile.device.num_ranks, profile.device.num_ranks > 0),
        ("context_bytes", profile.context_bytes, profile.context_bytes >= 0),
        ("clocks.drift", profile.clocks.drift, profile.clocks.drift > 0),
    ]
    facts += [(f"host_ns.{key}", ns, ns >= 0) for key, ns in profile.host_ns.items()]
    facts += [(f"scales.{key}", scale, scale > 0) for key, scale in profile.scales.items()]
    for both in profile.interference:
        where = f"interference of {both.op} with {both.kind}"
        facts += [(f"{where}: {name}", value, value > 0)
                  for name, value in (("compute_slowdown", both.compute_slowdown),
                                      ("communication_slowdown", both.communication_slowdown))
                  ]  # fmt: skip
    for name, value, is_right in facts:
        if not is_right:
            least = "at least 0" if name.startswith(("host_ns", "context")) else "above 0"
            yield Finding(kind="positive", where=name, what=f"is {value}; it must be {least}")


def _bad_sample(sample: Sample) -> list[Finding]:
    """Return what is wrong with the numbers of one sample."""
    times = [("p10_ns", sample.p10_ns), ("p50_ns", sample.p50_ns), ("p90_ns", sample.p90_ns)]
    whole = [*times, *(("medians_ns", ns) for ns in sample.medians_ns),
             ("num_samples", sample.num_samples), *(("shape", size) for size in sizes(sample))
             ]  # fmt: skip
    found = [
        Finding(kind="positive", where=place(sample), what=f"{name} is {value}; it must be above 0")
        for name, value in whole
        if value < 1
    ]
    least = [("num_outliers", sample.num_outliers), ("band", sample.band)]
    found += [
        Finding(
            kind="positive", where=place(sample), what=f"{name} is {value}; it must be at least 0"
        )
        for name, value in least
        if value < 0
    ]
    if not sample.p10_ns <= sample.p50_ns <= sample.p90_ns:
        what = f"P10, P50 and P90 are {', '.join(str(ns) for _, ns in times)} ns; they must grow"
        found.append(Finding(kind="order", where=place(sample), what=what))
    return found


def _bad_shape(sample: KernelSample) -> list[Finding]:
    family = sample.op.removesuffix("_forward").removesuffix("_backward")
    wanted = _NUM_SIZES.get("linear" if family.startswith("linear_") else family)
    if not sample.shape or wanted not in (None, len(sample.shape)):
        what = f"has {len(sample.shape)} sizes; {sample.op} has {wanted or 'at least one'}"
        return [Finding(kind="shape", where=place(sample), what=what)]
    return []


def _bad_group(sample: CollectiveSample) -> list[Finding]:
    if sample.group_size >= 2 and sample.stride >= 1:
        return []
    what = (f"group_size is {sample.group_size} and stride {sample.stride}; they must be at least "
            "2 and 1")  # fmt: skip
    return [Finding(kind="shape", where=place(sample), what=what)]


def _duplicates(profile: Profile) -> Iterator[Finding]:
    counts: dict[tuple[object, ...], int] = {}
    entries: list[Sample] = [*profile.kernels, *profile.collectives]
    for sample in entries:
        counts[sample.key] = counts.get(sample.key, 0) + 1
        if counts[sample.key] == 2:
            yield Finding(kind="duplicate", where=place(sample),
                          what="stands in it more than once")  # fmt: skip


def _loose_wires(profile: Profile) -> Iterator[Finding]:
    names = [node.name for node in profile.fabric.nodes]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Finding(kind="duplicate", where=f"fabric: {name}", what="stands in it more than once")
    for link in profile.fabric.links:
        for end in {link.first, link.second} - set(names):
            where = f"fabric: {link.first} to {link.second}"
            yield Finding(kind="fabric", where=where, what=f"there is no {end}")


def _above_ceilings(profile: Profile) -> list[Finding]:
    """Return the entries that are faster than the data sheet of a known GPU allows.

    The products of linears and attention against the peak of their dtype, bytes of shapes that no
    cache holds against the rate of memory, and collectives against the link inside a node.
    """
    sheet, link = data_sheet(profile.device), link_bytes_per_s(profile.device)
    if sheet is None:
        return []
    found = []
    for sample in profile.kernels:
        need = kernel_need(sample.op, sample.dtype, sample.shape)
        if need is None:
            continue
        # The tensor cores may be told to compute fp32, too.
        dtypes = (sample.dtype, "tf32") if sample.dtype == "fp32" else (sample.dtype,)
        peak = max(sheet.peak_flops_per_s.get(dtype, 0.0) for dtype in dtypes)
        rate = 1e9 * need.flops / sample.p50_ns
        if sample.op.startswith(("linear_", "attention_")) and 0 < _BOOST * peak < rate:
            found.append(_too_fast(sample, rate, peak, "flop/s"))
        rate, most = 1e9 * need.size_bytes / sample.p50_ns, sheet.memory_bytes_per_s
        if need.size_bytes >= BEYOND_CACHES_BYTES and rate > _BOOST * most:
            found.append(_too_fast(sample, rate, most, "bytes/s"))
    for message in profile.collectives:
        least_bytes = least_traffic(message.kind, message.group_size) * message.size_bytes
        rate = 1e9 * least_bytes / message.p50_ns
        if 0 < _BOOST * link < rate:
            found.append(_too_fast(message, rate, link, "bytes/s"))
    return found


def _too_fast(
    sample: Sample, rate: float, most: float, unit: Literal["flop/s", "bytes/s"]
) -> Finding:
    told, limit = format_quantity(rate, unit), format_quantity(most, unit)
    return Finding(kind="ceiling", where=place(sample),
                   what=f"reaches {told}; the data sheet says {limit}")  # fmt: skip


def _constant(family: Sequence[Sample]) -> Iterator[Finding]:
    """Return the times that many shapes of one family have to the nanosecond."""
    same: dict[int, list[Sample]] = {}
    for sample in family:
        same.setdefault(sample.p50_ns, []).append(sample)
    for time_ns, alike in same.items():
        ordered = sorted(alike, key=_work)
        least, most = ordered[0], ordered[-1]
        if len(alike) >= _CONSTANT_SAMPLES and _work(most) >= _CONSTANT_RANGE * _work(least):
            what = (f"takes {format_quantity(time_ns, 'ns')}, as {len(alike) - 1} larger shapes up "
                    f"to {_sizes_text(most)}: the clock may not tick")  # fmt: skip
            yield Finding(kind="constant", where=place(least), what=what)


def _work(sample: Sample) -> float:
    if isinstance(sample, KernelSample):
        return kernel_works(sample.op, sample.shape)[0]
    return float(sample.size_bytes)


def _falls(family: Sequence[Sample]) -> Iterator[Finding]:
    """Return where the next larger size of one axis takes much less time, all else equal."""
    for axis in range(len(sizes(family[0]))):
        lines: dict[tuple[int, ...], list[tuple[int, Sample]]] = {}
        for sample in family:
            shape = sizes(sample)
            others = shape[:axis] + shape[axis + 1 :]
            lines.setdefault(others, []).append((shape[axis], sample))
        for line in lines.values():
            ordered = [sample for _, sample in sorted(line, key=lambda pair: pair[0])]
            yield from filter(None, map(_fall, ordered, ordered[1:]))


def _fall(small: Sample, large: Sample) -> Finding | None:
    fall = math.log(small.p50_ns / large.p50_ns)
    noise = math.hypot(deviation(small), deviation(large))
    if fall <= max(_DEVIATIONS * noise, -math.log(_LESS)):
        return None
    what = (
        f"takes {format_quantity(large.p50_ns, 'ns')}; {_sizes_text(small)} takes "
        f"{format_quantity(small.p50_ns, 'ns')}"
    )
    return Finding(kind="monotone", where=place(large), what=what)
