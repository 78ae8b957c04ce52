"""Two profiles of one machine entry by entry: what moved by more than its band."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from profiles.profile import Profile
from profiles.validity import Sample, place

STATED = 0.95
"""The share of entries that stay within their bands when a machine is measured again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The medians of one entry in two profiles, and the band that the first states."""

    where: str
    first_ns: int
    second_ns: int
    band: float

    @property
    def ratio(self) -> float:
        """The second time over the first."""
        return self.second_ns / self.first_ns

    @property
    def is_beyond(self) -> bool:
        """Whether it moved, either way, by more than its band."""
        return max(self.ratio, 1 / self.ratio) - 1 > self.band


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What two profiles tell of the same entries, the largest change first.

    `differs` names the facts (device, driver, versions, scales) that are not the same: then the
    bands, which are those of one machine, promise nothing.
    """

    changes: tuple[Change, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    differs: tuple[str, ...]

    @property
    def beyond(self) -> tuple[Change, ...]:
        """The entries that moved by more than their bands, the largest change first."""
        return tuple(change for change in self.changes if change.is_beyond)

    @property
    def share_within(self) -> float | None:
        """The share of entries that stayed within their bands; None without a common one."""
        return 1 - len(self.beyond) / len(self.changes) if self.changes else None


def difference(first: Profile, second: Profile) -> Difference:
    """Return how the entries of `second` differ from those of `first`."""
    before, after = _entries(first), _entries(second)
    changes = [
        Change(
            where=place(one),
            first_ns=one.p50_ns,
            second_ns=after[key].p50_ns,
            band=one.band,
        )
        for key, one in before.items()
        if key in after
    ]
    changes.sort(key=lambda change: (-abs(math.log(change.ratio)), change.where))
    return Difference(
        changes=tuple(changes),
        only_first=tuple(sorted(place(one) for key, one in before.items() if key not in after)),
        only_second=tuple(sorted(place(one) for key, one in after.items() if key not in before)),
        differs=_differing_facts(first, second),
    )


def _entries(profile: Profile) -> Mapping[tuple[object, ...], Sample]:
    samples: list[Sample] = [*profile.kernels, *profile.collectives]
    return {(type(sample).__name__, *sample.key): sample for sample in samples}


def _differing_facts(first: Profile, second: Profile) -> tuple[str, ...]:
    facts: list[tuple[str, object, object]] = [
        (f"device.{name}", getattr(first.device, name), getattr(second.device, name))
        for name in ("kind", "name", "backend", "num_ranks", "driver")
    ]
    for name in ("versions", "scales"):
        one: Mapping[str, object] = getattr(first, name)
        two: Mapping[str, object] = getattr(second, name)
        facts += [
            (f"{name}.{key}", one.get(key, "-"), two.get(key, "-")) for key in sorted({*one, *two})
        ]
    return tuple(f"{name}: {one} and {two}" for name, one, two in facts if one != two)
