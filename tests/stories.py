"""A job for stories, and its units."""

from typing import Any

from simulator.stories.checkpoints import Checkpoints
from simulator.stories.job import StorySpec
from simulator.stories.strikes import HOUR_NS

SECOND_NS = 10**9
MINUTE_NS = 60 * SECOND_NS
DAY_NS = 24 * HOUR_NS


def steady(**fields: Any) -> StorySpec:
    """Return a job of one-second steps and a checkpoint a minute, changed by `fields`."""
    base: dict[str, Any] = {
        "step_ns": SECOND_NS,
        "num_steps": 6_000,
        "num_nodes": 8,
        "restart_ns": 30 * SECOND_NS,
        "checkpoints": Checkpoints(every_steps=60, blocking_ns=SECOND_NS),
    }
    return StorySpec(**(base | fields))
