"""Predicted steps of training runs on clusters that are not at hand, from reference profiles."""

from collections.abc import Mapping
from dataclasses import dataclass

from planner.layout import Layout
from planner.plan import PeakMemory
from profiles.cluster import ClusterSpec
from profiles.model import ModelSpec
from profiles.profile import Cost
from profiles.stack import StackSpec
from profiles.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One training run as it would be started: what, how laid out, on which machine, by what."""

    model: ModelSpec
    workload: Workload
    layout: Layout
    cluster: ClusterSpec
    stack: StackSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a run is predicted to take: one step with its band, and each pipeline rank's memory.

    `parts` says where the step of the busiest rank goes, in ns, from the arithmetic at peak rate up
    to all that is lost (`planner.waterfall`); its values sum to the median step.
    """

    step: Cost
    memory: tuple[PeakMemory, ...]
    parts: Mapping[str, int]


def predict(setup: Setup) -> Prediction:
    """Return the predicted step and memory of `setup`.

    Raises UnsupportedError for what the model of time does not cover.
    """
    raise NotImplementedError
