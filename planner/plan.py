"""`Plan`: inputs, layout, schedule, costs and estimate in one canonical file, sealed by digests."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from planner.layout import Layout
from profiles.cluster import ClusterSpec
from profiles.errors import InvalidInputError
from profiles.files import canonical_json, digest, from_plain, read_json, write_text
from profiles.goal import Goal
from profiles.model import ModelSpec
from profiles.profile import Cost, DeviceFacts
from profiles.stack import MemoryLog, StackSpec
from profiles.workload import Workload
from simulator.schedule import Schedule, parse_schedule

PLAN_SCHEMA_VERSION = 4


class StalePlanError(ValueError):
    """The plan file, or something that it was made from, changed since it was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """Predicted costs of one pipeline stage on one rank.

    `forward` and `backward` are for one micro-batch with the collectives inside that its layers
    wait for (`tensor_parallel_*_ns` says how much of the median they are: those of tensor
    parallelism, and under zero3 those of the parameters); `weight` is the part of `backward` that
    makes weight gradients, which a schedule may do apart and later; `send_*` move one micro-batch's
    activations on to the next stage, or its gradient back to the previous one; `all_reduce` is the
    data-parallel gradient reduction of one step; `optimizer` updates the stage once; `other` is the
    host work of a rank in one step, whatever stages it holds; `wait` is what passes until the
    slowest of equal ranks is done.
    """

    forward: Cost
    backward: Cost
    weight: Cost
    send_forward: Cost
    send_backward: Cost
    all_reduce: Cost
    optimizer: Cost
    other: Cost
    wait: Cost
    tensor_parallel_forward_ns: int
    tensor_parallel_backward_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """Predicted peak memory of one pipeline rank, in bytes, by what holds it.

    A step has two peaks: in its forwards and backwards, where `activations` and `temporary` lie on
    top of the states and the communication `buffers`, and in the optimizer's update, where `update`
    does. `reserve` is what the allocator holds and nobody uses, `context` what the process holds
    before anything is allocated.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    context: int
    buffers: int = 0
    update: int = 0
    reserve: int = 0

    @property
    def updating(self) -> int:
        """What is allocated at the peak of the optimizer's update."""
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.update

    @property
    def allocated(self) -> int:
        """What is allocated at the peak of the step."""
        return self.updating - self.update + max(self.activations + self.temporary, self.update)

    @property
    def total(self) -> int:
        """All that the process occupies."""
        return self.allocated + self.reserve + self.context

    def logged(self, log: MemoryLog) -> int:
        """Return what a stack logs as its peak, by the word of `StackSpec.logs_memory`.

        "device" is all that the process occupies, "reserved" what its allocator holds, "allocated"
        what is in use of that, and "update" the same for a stack that resets the counter after each
        backward, and so sees the optimizer's update only.
        """
        if log == "update":
            return self.updating
        return {
            "device": self.total,
            "reserved": self.allocated + self.reserve,
            "allocated": self.allocated,
        }[log]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One layout that fits: its step time with its band and the peak memory of its worst rank.

    `jittered_ns` is its step where no two kernels take the same time, of the best few
    (`planner.finalists`); 0 of the others.
    """

    layout: Layout
    step: Cost
    peak_bytes: int
    jittered_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """One layout that does not: `rule` is a short name to count by, `reason` a sentence."""

    layout: str
    rule: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What is known of every layout of the space, those included that were never timed.

    `num_layouts` were accounted for: `num_rejected` says by rule how many of them are no choice,
    `num_bounded` could not have been better than what was found, `num_timed` went through their
    full schedule, and `num_open` were left when the search was stopped. No layout of the space is
    below `lower_bound`, in the unit of `objective`, of which the chosen one has `value`; `gap` is
    the part of `value` between the two, 0 where the best is proved to be the best.
    """

    objective: str
    value: float
    lower_bound: float
    gap: float
    num_layouts: int
    num_rejected: Mapping[str, int]
    num_bounded: int
    num_timed: int
    num_open: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One of the jobs that were searched where a job left numerics or software open.

    `best` is its best layout; where there is none, `reason` says why. The plan and its ranking are
    those of the chosen one.
    """

    name: str
    is_chosen: bool
    best: Candidate | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReference:
    """Which profile the costs came from, and where it is kept.

    `reference_ns` is the time of the profile's reference kernel; a run repeats that kernel to tell
    how fast the machine is by then. Where the machine is not at hand the costs come from published
    measurements: `versions` then has the version of that `reference`, and there is no file and no
    reference kernel.
    """

    path: str
    digest: str
    device: DeviceFacts
    versions: Mapping[str, str]
    measured_at: str
    reference_ns: int = 0

    @property
    def is_reference(self) -> bool:
        """Whether the costs are of published measurements, and nothing was measured there."""
        return "reference" in self.versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One chosen layout with everything that is needed to simulate, run and explain it.

    `schedule` is the text of the schedule, one line a pipeline rank; `costs` hold one entry a
    stage, `memory` one a pipeline rank; `ranking` is the short list, best first, `chosen` the place
    in it of this plan; `section_digests` holds a SHA-256 of every other field and `plan_digest` one
    of all of them.
    """

    schema_version: int
    tool_version: str
    seed: int
    model: ModelSpec
    workload: Workload
    cluster: ClusterSpec
    stack: StackSpec
    goal: Goal
    profile: ProfileReference
    layout: Layout
    schedule: tuple[str, ...]
    costs: tuple[StageCost, ...]
    memory: tuple[PeakMemory, ...]
    step: Cost
    ranking: tuple[Candidate, ...]
    chosen: int
    front: tuple[int, ...]
    rejections: tuple[Rejection, ...]
    certificate: Certificate
    variants: tuple[Variant, ...]
    section_digests: Mapping[str, str]
    plan_digest: str

    def parsed_schedule(self) -> Schedule:
        """Return the schedule as a value."""
        return _parsed(self.schedule, self.layout.schedule)

    def stages_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """Return the stages that a pipeline rank holds, in their order."""
        homes = self.parsed_schedule().homes.tolist()
        return tuple(stage for stage, home in enumerate(homes) if home == pipeline_rank)


@lru_cache(maxsize=16)
def _parsed(lines: tuple[str, ...], name: str) -> Schedule:
    """Return the schedule of `lines`; a long one takes seconds to read, and is asked for often."""
    return parse_schedule("\n".join(lines), name)


_SEALS = ("section_digests", "plan_digest")


def seal(**sections: object) -> Plan:
    """Return the plan of these fields, with its digests filled in."""
    digests = {name: digest(section) for name, section in sections.items()}
    return Plan(**sections, section_digests=digests, plan_digest=digest(digests))  # type: ignore[arg-type]


def save_plan(plan: Plan, path: Path) -> None:
    """Write `plan` to `path` as canonical JSON."""
    write_text(path, canonical_json(plan))


def load_plan(path: Path) -> Plan:
    """Return the plan in `path`.

    Raises InvalidInputError for a file that is no plan, and StalePlanError that names each section
    that was changed since `layline plan` wrote it.
    """
    data = read_json(path, "plan made by `layline plan`")
    fix = "make it again with `layline plan`"
    if isinstance(data, dict) and data.get("schema_version", PLAN_SCHEMA_VERSION) != (
        PLAN_SCHEMA_VERSION
    ):
        raise StalePlanError(
            f"{path}: schema_version is {json.dumps(data['schema_version'])}; "
            f"this version reads {PLAN_SCHEMA_VERSION}; {fix}"
        )
    plan = from_plain(Plan, data, str(path), fix)
    sections = [field.name for field in fields(Plan) if field.name not in _SEALS]
    changed = [
        name for name in sections if plan.section_digests.get(name) != digest(getattr(plan, name))
    ]
    if not changed and plan.plan_digest != digest(dict(plan.section_digests)):
        changed = ["plan_digest"]
    if changed:
        raise StalePlanError(
            f"{path}: changed by hand since it was planned: {', '.join(changed)}; "
            "change the job file instead and run `layline plan` again"
        )
    if problem := _inconsistency(plan):
        raise InvalidInputError([f"{path}: {problem}; {fix}"])
    return plan


def _inconsistency(plan: Plan) -> str:
    """Return what does not fit together in a plan whose digests hold, empty if all does."""
    layout = plan.layout
    if len(plan.costs) != layout.num_stages:
        return f"costs are of {len(plan.costs)} stages, the layout has {layout.num_stages}"
    if len(plan.memory) != layout.pp:
        return f"memory is of {len(plan.memory)} pipeline ranks, the layout has {layout.pp}"
    if sum(layout.stage_layers) != plan.model.num_layers:
        return f"layout.stage_layers does not sum to {plan.model.num_layers} layers"
    if plan.ranking and not 0 <= plan.chosen < len(plan.ranking):
        return f"chosen is {plan.chosen}; the ranking has {len(plan.ranking)} layouts"
    if not all(0 <= place < max(1, len(plan.ranking)) for place in plan.front):
        return f"front is {plan.front}; the ranking has {len(plan.ranking)} layouts"
    try:
        schedule = plan.parsed_schedule()
    except ValueError as error:
        return str(error)
    found = (schedule.num_stages, schedule.num_ranks, schedule.num_microbatches)
    if found != (layout.num_stages, layout.pp, layout.num_microbatches):
        return f"the schedule is not one of layout {layout}"
    return ""
