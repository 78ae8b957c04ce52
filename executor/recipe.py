"""`Recipe`: the part of a plan that ranks execute; costs, ranking and cluster are left behind."""

from dataclasses import dataclass

from planner.layout import Layout
from planner.plan import Plan
from profiles.model import ModelSpec
from profiles.stack import StackSpec
from profiles.workload import Workload
from simulator.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to train, how it is laid out, in which order; `seed` draws parameters and samples."""

    model: ModelSpec
    workload: Workload
    layout: Layout
    schedule: Schedule
    stack: StackSpec
    seed: int


def recipe_of(plan: Plan) -> Recipe:
    """Return what `plan` asks the ranks to do."""
    return Recipe(
        model=plan.model,
        workload=plan.workload,
        layout=plan.layout,
        schedule=plan.parsed_schedule(),
        stack=plan.stack,
        seed=plan.seed,
    )
