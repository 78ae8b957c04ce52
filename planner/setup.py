"""`Setup`: one training run as it would be started."""

from dataclasses import dataclass

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
