"""Several profiles of one machine into one: passes of one measurement, or files of several days.

The median of an entry is the median of its passes. What the passes differ by tells how far the
next profile of this machine may differ, which is the entry's band.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import NormalDist, fmean, median
from typing import TypeVar

from profiles.errors import InvalidInputError
from profiles.fabric import Fabric
from profiles.profile import Clocks, CollectiveSample, Interference, KernelSample, Profile

Sample = TypeVar("Sample", KernelSample, CollectiveSample)

# Passes that the pooled variance of alike entries counts for, beside those of the entry itself.
_PRIOR_DEGREES = 4

# Variance of the median of n normal values, as a share of the variance of one; from n = 6 on
# pi / 2 n. Source: the order statistics of Teichroew, Annals of Mathematical Statistics 27 (1956).
_MEDIAN_VARIANCE = (1.0, 0.5, 0.449, 0.298, 0.287)

# A single pass tells nothing of the next; so far pairs of passes differed here.
_UNKNOWN_BAND = 0.3


def merge(profiles: Sequence[Profile]) -> Profile:
    """Return one profile of all entries of `profiles`, with bands.

    Entries of one key become one entry: median of the medians of the passes, P10 and P90 likewise,
    counts added up. The newest date holds. Raises InvalidInputError for none, and for profiles of
    different devices, numbers of ranks, or versions, or with factors of a recalibration.
    """
    if not profiles:
        raise InvalidInputError(["there is no profile to merge; name at least one"])
    first = profiles[0]
    for other in profiles[1:]:
        _check_same(first, other)
    kernels = with_bands(_joined(k for p in profiles for k in p.kernels))
    collectives = with_bands(_joined(c for p in profiles for c in p.collectives))
    keys = sorted({key for p in profiles for key in p.host_ns})
    fabrics = [p.fabric for p in profiles if p.fabric.nodes]
    return replace(
        first,
        kernels=kernels,
        collectives=collectives,
        interference=_interference(i for p in profiles for i in p.interference),
        host_ns={
            key: round(median(p.host_ns[key] for p in profiles if key in p.host_ns)) for key in keys
        },
        context_bytes=round(median(p.context_bytes for p in profiles)),
        measured_at=max(p.measured_at for p in profiles),
        clocks=_clocks([p.clocks for p in profiles], kernels),
        fabric=fabrics[-1] if fabrics else Fabric(),
        missing=tuple(sorted({line for p in profiles for line in p.missing})),
    )


def _check_same(first: Profile, other: Profile) -> None:
    facts = [
        ("schema_version", first.schema_version, other.schema_version),
        ("device.kind", first.device.kind, other.device.kind),
        ("device.name", first.device.name, other.device.name),
        ("device.backend", first.device.backend, other.device.backend),
        ("device.driver", first.device.driver, other.device.driver),
        ("device.num_ranks", first.device.num_ranks, other.device.num_ranks),
        ("versions.torch", first.versions.get("torch"), other.versions.get("torch")),
        ("scales", dict(first.scales), dict(other.scales)),
    ]
    different = [f"{name} is {one} in one and {two} in another" for name, one, two in facts
                 if one != two]  # fmt: skip
    if different:
        raise InvalidInputError(
            [f"profiles to merge: {text}; merge profiles of one machine as it was set up once"
             for text in different]
        )  # fmt: skip


def _joined(samples: Iterable[Sample]) -> list[Sample]:
    """Return one sample for each key, sorted by key, without bands yet."""
    alike: dict[tuple[object, ...], list[Sample]] = {}
    for sample in samples:
        alike.setdefault(sample.key, []).append(sample)
    return sorted(map(_join, alike.values()), key=lambda sample: sample.key)


def _join(samples: Sequence[Sample]) -> Sample:
    medians = tuple(m for sample in samples for m in sample.medians_ns or (sample.p50_ns,))
    p50_ns = round(median(medians))
    return replace(
        samples[0],
        p10_ns=min(p50_ns, round(median(sample.p10_ns for sample in samples))),
        p50_ns=p50_ns,
        p90_ns=max(p50_ns, round(median(sample.p90_ns for sample in samples))),
        num_samples=sum(sample.num_samples for sample in samples),
        num_outliers=sum(sample.num_outliers for sample in samples),
        medians_ns=medians,
    )


def with_bands(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Return `samples` with the bands that their passes tell.

        band = t(d) * sqrt(2 v_n) * s,       s^2 = ((n - 1) s_entry^2 + d_0 s_alike^2) / d

    of the logarithms of the n passes' medians. s_alike^2 is the mean variance of the entries of the
    same op (or collective), which counts for d_0 passes: two or three passes of one entry alone
    tell little. v_n is the variance of a median of n values, t(d) Student's quantile of 97.5 % at
    d = n - 1 + d_0 degrees of freedom, and the 2 is for the difference of two profiles. Source:
    Smyth, "Linear models and empirical Bayes methods", Statistical Applications in Genetics and
    Molecular Biology 3 (2004), which calls s^2 moderated.
    """
    variances = [_variance(sample.medians_ns) for sample in samples]
    alike: dict[tuple[object, ...], list[float]] = {}
    for sample, variance in zip(samples, variances, strict=True):
        if len(sample.medians_ns) > 1:
            alike.setdefault(_family(sample), []).append(variance)
    return tuple(
        replace(sample, band=_band(sample, variance, alike.get(_family(sample), ())))
        for sample, variance in zip(samples, variances, strict=True)
    )


def _family(sample: Sample) -> tuple[object, ...]:
    """Return what the passes of alike entries have in common: all of the key but the size."""
    return sample.key[:-1]


def _variance(medians_ns: Sequence[int]) -> float:
    """Return the variance of the logarithms of `medians_ns`, 0 for less than two."""
    if len(medians_ns) < 2:
        return 0.0
    logs = [math.log(median_ns) for median_ns in medians_ns]
    middle = fmean(logs)
    return sum((log - middle) ** 2 for log in logs) / (len(logs) - 1)


def _band(sample: Sample, variance: float, alike: Sequence[float]) -> float:
    count = len(sample.medians_ns)
    if not alike:
        return _UNKNOWN_BAND
    degrees = count - 1 + _PRIOR_DEGREES
    moderated = ((count - 1) * variance + _PRIOR_DEGREES * fmean(alike)) / degrees
    of_median = (
        _MEDIAN_VARIANCE[count - 1] if count <= len(_MEDIAN_VARIANCE) else math.pi / (2 * count)
    )
    return round(math.expm1(student(degrees) * math.sqrt(2 * of_median * moderated)), 6)


def student(degrees: int) -> float:
    """Return the quantile of 97.5 % of Student's t at `degrees` of freedom.

    Its expansion around the normal quantile z: z + (z^3 + z) / 4 d + (5 z^5 + 16 z^3 + 3 z) / 96
    d^2 + (3 z^7 + 19 z^5 + 17 z^3 - 15 z) / 384 d^3. Source: Abramowitz and Stegun, 26.7.5.

    >>> round(student(5), 2), round(student(30), 3)
    (2.57, 2.042)
    """
    z, d = NormalDist().inv_cdf(0.975), degrees
    return (
        z
        + (z**3 + z) / (4 * d)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
    )


def _interference(samples: Iterable[Interference]) -> tuple[Interference, ...]:
    alike: dict[tuple[str, str, tuple[int, ...], str, int, int], list[Interference]] = {}
    for sample in samples:
        alike.setdefault(sample.key, []).append(sample)
    return tuple(
        replace(
            found[0],
            compute_slowdown=median(sample.compute_slowdown for sample in found),
            communication_slowdown=median(sample.communication_slowdown for sample in found),
        )
        for _, found in sorted(alike.items())
    )


def _clocks(clocks: Sequence[Clocks], kernels: Sequence[KernelSample]) -> Clocks:
    """Return the clocks of all passes; their drift is that of the kernels, last over first pass."""
    seen = [clock for clock in clocks if clock.most_mhz]
    ratios = [k.medians_ns[-1] / k.medians_ns[0] for k in kernels if len(k.medians_ns) > 1]
    return Clocks(
        least_mhz=min((clock.least_mhz for clock in seen), default=0),
        median_mhz=round(median(clock.median_mhz for clock in seen)) if seen else 0,
        most_mhz=max((clock.most_mhz for clock in seen), default=0),
        drift=round(median(ratios), 6) if ratios else 1.0,
    )
