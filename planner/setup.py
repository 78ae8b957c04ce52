"""`Setup`: one training run as it would be started."""

from dataclasses import dataclass, replace
from functools import lru_cache

from planner.layout import Layout
from profiles.cluster import ClusterSpec
from profiles.model import ModelSpec
from profiles.stack import StackSpec
from profiles.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is trained, how it is laid out, on which machine and by what software."""

    model: ModelSpec
    workload: Workload
    layout: Layout
    cluster: ClusterSpec
    stack: StackSpec


VOCABULARY_ROWS = 128
"""What a rank's part of a vocabulary is a multiple of, where it is padded."""


@lru_cache(maxsize=4096)
def padded(model: ModelSpec, pads_vocabulary: bool, tp: int) -> ModelSpec:
    """Return the model with the vocabulary that `tp` ranks hold: a whole number of rows each.

    >>> from profiles.presets import model_preset
    >>> padded(model_preset("gpt-3-175b"), True, 8).vocab
    51200
    """
    if not pads_vocabulary and model.vocab % tp == 0:
        return model
    unit = VOCABULARY_ROWS * tp
    return replace(model, vocab=-(-model.vocab // unit) * unit)
