"""Calibration: the scalars of stacks that make published runs come out right, and their bands."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from planner.fit import SPREADS, Fit, Sample, fit, inward, predicted_ns, scalars_of
from planner.interval import Band, Pair, conformal_bands
from planner.predict import likeliest, step_model
from planner.published.runs import PublishedRun, UnreadRun
from profiles.errors import UnsupportedError
from profiles.files import plain
from profiles.presets import calibrated
from profiles.stack import SCALARS, Scalar

SCHEMA_VERSION = 1
SHARED = "shared"
"""The name under which the scalars that all stacks share are kept."""
OWN = ("launch", "step", "message", "crossing", "spanning")
"""Scalars of the host, which stacks do not share: those of a stack say nothing of another."""
SHARED_RUNS = 60
"""Runs of each group that the shared scalars are found from."""
STACK_RUNS = 400
"""Runs of each group that the scalars of a stack are found from."""


class Scores(NamedTuple):
    """Errors of one group, in sample and predicted without it: median and P90 of each."""

    group: str
    num_runs: int
    in_sample: tuple[float, float]
    left_out: tuple[float, float]


class Calibration(NamedTuple):
    """The scalars of each stack by name, the bands of predictions, and the errors by group."""

    scalars: Mapping[str, Mapping[str, Scalar]]
    bands: Mapping[str, Band]
    scores: Sequence[Scores]

    def shipped(self) -> dict[str, Any]:
        """Return what the package keeps of it, in profiles/data/scalars.json."""
        return {"schema_version": SCHEMA_VERSION, "scalars": self.scalars, "bands": self.bands}

    @property
    def is_shipped(self) -> bool:
        """Whether the package ships these scalars and bands, to the digit."""
        return bool(plain(self.shipped()) == calibrated())


def samples_of(runs: Sequence[PublishedRun | UnreadRun]) -> list[Sample]:
    """Return the runs that were timed and can be predicted, ready to be fitted to."""
    samples = []
    for run in runs:
        if isinstance(run, UnreadRun) or not run.measured.step_ns:
            continue
        try:
            setup = likeliest(run.setups)
            model = step_model(setup)
        except UnsupportedError:
            continue
        samples.append(
            Sample(
                group=run.group,
                stack=setup.stack.name,
                gpu=setup.cluster.pools[0].gpu.name,
                calibrates=setup.stack.calibrates,
                model=model,
                measured_ns=float(run.measured.step_ns),
            )
        )
    return samples


def calibrate(samples: Sequence[Sample], tell: Callable[[str], None]) -> Calibration:
    """Return the calibration on `samples`; `tell` hears what is being fitted."""
    tell("what all stacks share")
    shared = shared_scalars(samples)
    scalars = {SHARED: scalars_of(shared, tuple(SCALARS))}
    pairs = list[Pair]()
    for stack in sorted({sample.stack for sample in samples}):
        tell(f"stack {stack}")
        own = [sample for sample in samples if sample.stack == stack]
        found = stack_fit(own, shared)
        scalars[stack] = scalars_of(found, own[0].calibrates)
        pairs += _pairs(own, found)
    unseen = {}
    for group in sorted({sample.group for sample in samples}):
        tell(f"all without {group}")
        unseen[group] = left_out(samples, group)
    return Calibration(
        scalars=scalars,
        bands=conformal_bands(pairs, [pair for found in unseen.values() for pair in found]),
        scores=[_scores(group, pairs, unseen[group]) for group in unseen],
    )


def left_out(samples: Sequence[Sample], group: str) -> list[Pair]:
    """Return the samples of `group` with the step that is predicted without it.

    Neither the shared scalars nor those of the stack have seen the group. What is left of a stack
    is fitted to its other groups; a stack without any takes what all others share.
    """
    others = [sample for sample in samples if sample.group != group]
    shared, pairs = shared_scalars(others), list[Pair]()
    own = [sample for sample in samples if sample.group == group]
    for stack in sorted({sample.stack for sample in own}):
        rest = [sample for sample in others if sample.stack == stack]
        here = [sample for sample in own if sample.stack == stack]
        pairs += _pairs(here, stack_fit(rest, shared) if rest else shared)
    return pairs


def shared_scalars(samples: Sequence[Sample]) -> Fit:
    """Return what all stacks share: a fit to a few runs of every group, neutral without any."""
    neutral = Fit(
        place=np.array([inward(name, meaning.neutral) for name, meaning in SCALARS.items()]),
        spread=np.array([SPREADS[name] for name in SCALARS]),
    )
    if not samples:
        return neutral
    usual = tuple(name for name in SCALARS if name not in OWN)
    return fit(_thinned(samples, SHARED_RUNS), neutral, usual)


def stack_fit(samples: Sequence[Sample], shared: Fit) -> Fit:
    """Return the fit of one stack to its own runs."""
    return fit(_thinned(samples, STACK_RUNS), shared, samples[0].calibrates)


def _pairs(samples: Sequence[Sample], found: Fit) -> list[Pair]:
    ratios = predicted_ns(samples, found) / np.array([sample.measured_ns for sample in samples])
    return [
        Pair(sample.group, sample.stack, sample.gpu, float(ratio))
        for sample, ratio in zip(samples, ratios, strict=True)
    ]


def _scores(group: str, pairs: Sequence[Pair], unseen: Sequence[Pair]) -> Scores:
    own = [pair for pair in pairs if pair.group == group]
    return Scores(group, len(own), _errors(own), _errors(unseen))


def _errors(pairs: Sequence[Pair]) -> tuple[float, float]:
    errors = [abs(pair.ratio - 1) for pair in pairs]
    return float(np.median(errors)), float(np.quantile(errors, 0.9))


def _thinned(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Return every k-th sample of each group, so that at most `most` are left of it."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    return [sample for group in sorted(groups) for sample in _spaced(groups[group], most)]


def _spaced(samples: list[Sample], most: int) -> list[Sample]:
    return samples[:: max(1, -(-len(samples) // most))]
