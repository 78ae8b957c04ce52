"""The walk of the project, as functions: plan -> simulate -> run -> compare -> report.

Each step takes and returns values; files are touched where a path is an argument. The command
line is a thin layer over this module, and a program can call it as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from layline import __version__
from planner.cost import measured_costs
from planner.evaluate import Costs
from planner.explain import Searches
from planner.lower import simulate_plan
from planner.plan import Plan, StalePlanError, load_plan
from planner.record import StepRecord, load_run
from planner.reference.costs import reference_costs
from planner.relax import smallest_relaxation
from planner.search import Effort, InfeasibleError, SearchResult, make_plan
from planner.variants import search_variants
from profiles.errors import InvalidInputError, UnsupportedError
from profiles.files import canonical_json, digest, write_text
from profiles.job import Job, read_job
from profiles.merge import merge
from profiles.profile import Profile
from profiles.store import load_profile, make_room, stored_profile, stored_profile_path

Device = Literal["auto", "cpu", "cuda"]
Progress = Callable[[float, str], None]
"""Told of progress: a share of the work from 0 to 1, and what is going on."""
DEFAULT_EFFORT = Effort()
RELAXING = Effort(gap=0.5)
"""Of searches that need to know only whether anything fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A profile, and where it is kept."""

    profile: Profile
    where: str


def ignore_progress(_share: float, _what: str) -> None:
    """Tell nobody."""


def measure_profile(
    num_ranks: int, device: Device = "auto", *, quick: bool, progress: Progress = ignore_progress
) -> Profile:
    """Return the measured kernels, links and host costs of `num_ranks` ranks of this machine."""
    require_torch("profile")
    from profiles.measure.run import measure

    return measure(num_ranks, device, quick=quick, on_progress=progress)


def is_rank_of_torchrun() -> bool:
    """Return whether the user's own torchrun started this process, as one rank of several nodes."""
    require_torch("profile")
    from profiles.measure.ranks import was_launched

    return was_launched()


def measure_as_rank(device: Device = "auto", *, quick: bool) -> tuple[Profile, bool]:
    """Return the profile that all ranks of the user's torchrun measure, and if this one writes."""
    from profiles.measure import run

    return run.measure_as_rank(device, quick=quick)


def merge_profiles(paths: Sequence[Path]) -> Profile:
    """Return the profiles in `paths`, all of one machine, as one."""
    return merge([load_profile(path) for path in paths])


def profile_for(job: Job, progress: Progress = ignore_progress) -> tuple[Profile, Path]:
    """Return the profile that `job` names, and where it is; without one the job is for here.

    `auto` is this machine's own: measured quickly and kept the first time, read afterwards.
    """
    if job.profile_path:
        path = Path(job.profile_path)  # seen from the job file already
        return load_profile(path), path
    num_ranks, device = job.cluster.num_ranks, job.cluster.local_device
    assert device, "a cluster elsewhere has no profile of its own"
    path = stored_profile_path(num_ranks, device)
    if (profile := stored_profile(num_ranks, device)) is None:
        make_room(path)
        profile = measure_profile(num_ranks, device, quick=True, progress=progress)
        write_text(path, canonical_json(profile))
    return profile, path


def costs_for(job: Job, progress: Progress = ignore_progress) -> Costs:
    """Return what the layouts of `job` take.

    Measured where the job names a profile or is for this machine; elsewhere from published
    measurements.
    """
    return grounds_of(job, progress).costs


def measured_for(job: Job, progress: Progress = ignore_progress) -> Measured | None:
    """Return the profile that the costs of `job` rest on; None where nothing was measured."""
    if not job.profile_path and not job.cluster.is_local:
        return None
    profile, path = profile_for(job, progress)
    # Whole, since the plan may be read in another folder; and UTF-8, since JSON is.
    where = str(path.resolve()).encode(errors="replace").decode()
    return Measured(profile=profile, where=where)


def costs_from(job: Job, measured: Measured | None) -> Costs:
    """Return what the layouts of `job` take, by what `measured_for` found; reads no file."""
    if measured is None:
        return reference_costs(job)
    return measured_costs(job, measured.profile, measured.where)


@dataclass(frozen=True, kw_only=True)
class Grounds:
    """A job with what its layouts take, and the profile that this rests on, if any."""

    job: Job
    costs: Costs
    measured: Measured | None

    def costs_of(self, job: Job) -> Costs:
        """Return what the layouts of this job take, or of another variant of it."""
        return self.costs if job is self.job else costs_from(job, self.measured)

    def plan(self, result: SearchResult, place: int = 0) -> Plan:
        """Return the plan of a place of what was found."""
        return make_plan(self.job, self.costs, result, place, __version__)

    def world(self, effort: Effort) -> Searches:
        """Return where layouts of this job, and of others like it, can be tried."""
        return Searches(costs_of=lambda job: costs_from(job, self.measured), effort=effort)


def grounds_of(job: Job, progress: Progress = ignore_progress) -> Grounds:
    """Return what the layouts of `job` take; where no profile is kept, it is measured first."""
    measured = measured_for(job, progress)
    return Grounds(job=job, costs=costs_from(job, measured), measured=measured)


def search_layouts(
    grounds: Grounds, effort: Effort = DEFAULT_EFFORT, progress: Progress = ignore_progress
) -> tuple[Grounds, SearchResult]:
    """Return the best layouts of a job, on the grounds of the best of its variants.

    Where there are none, the error says what else would do.
    """
    job = grounds.job
    try:
        found = search_variants(job, grounds.costs_of, effort, progress)
        return replace(grounds, job=found.job, costs=found.costs), found.result
    except KeyboardInterrupt:
        raise KeyboardInterrupt("no layout was timed yet; there is no plan") from None
    except InfeasibleError as error:
        progress(0.0, "nothing fits; what would")
        try:
            relaxed = smallest_relaxation(job, grounds.world(RELAXING))
        except KeyboardInterrupt:
            raise error from None
        raise InfeasibleError(f"{error}\nwhat would do: {relaxed}") from None


def plan_job(
    job_path: Path,
    overrides: Sequence[str] = (),
    progress: Progress = ignore_progress,
    effort: Effort = DEFAULT_EFFORT,
) -> Plan:
    """Return the best plan for a job file; its ranking and rejections are in it."""
    grounds = grounds_of(read_job(job_path, overrides), progress)
    chosen, result = search_layouts(grounds, effort, progress)
    return chosen.plan(result)


def plan_with(
    job: Job, measured: Measured | None, effort: Effort, progress: Progress = ignore_progress
) -> Plan:
    """Return the best plan for `job`, by costs that rest on what was measured; reads no file."""
    found = search_variants(job, lambda each: costs_from(each, measured), effort, progress)
    return make_plan(found.job, found.costs, found.result, 0, __version__)


def run_series(
    plans: Sequence[Plan],
    directories: Sequence[Path],
    *,
    data: Path | None = None,
    num_steps: int = 20,
    on_step: Callable[[int, StepRecord], None] | None = None,
) -> None:
    """Train each plan for real, one after another on the same ranks, and write a run directory.

    Raises StalePlanError for a plan whose profile was measured again since, and UnsupportedError
    for one that this machine cannot run.
    """
    require_torch("run")
    from executor.run import run_plans

    for plan in plans:
        _check_fresh(plan)
    run_plans(plans, directories, data, num_steps, plans[0].profile.reference_ns, on_step)


def recalibrated(directory: Path) -> Profile:
    """Return the plan's profile with the factors that make its prediction fit the run there."""
    from reports.compare import compare, scales_from

    plan, record = load_run(directory)
    profile = load_profile(Path(plan.profile.path))
    if digest(profile) != plan.profile.digest:
        raise StalePlanError(f"{directory}: {_profile_changed(plan)}")
    return scales_from(profile, compare(plan, record, simulate_plan(plan)))


def require_torch(command: str) -> None:
    """Raise UnsupportedError where PyTorch is not installed."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise UnsupportedError(
            f"`layline {command}` needs PyTorch; install it with: pip install torch==2.13.0"
        )


def _check_fresh(plan: Plan) -> None:
    if not plan.cluster.is_local:
        raise UnsupportedError(
            f"the plan is for cluster {plan.cluster.name}, not for this machine; "
            'plan again with cluster.preset = "local" to run here'
        )
    path = Path(plan.profile.path)
    try:
        is_changed = path.is_file() and digest(load_profile(path)) != plan.profile.digest
    except InvalidInputError:
        is_changed = True
    if is_changed:
        raise StalePlanError(_profile_changed(plan))


def _profile_changed(plan: Plan) -> str:
    return (
        f"the profile {plan.profile.path} was changed since the plan was made from it "
        f"(measured {plan.profile.measured_at}); run `layline plan` again"
    )


__all__ = [
    "costs_for",
    "grounds_of",
    "ignore_progress",
    "load_plan",
    "is_rank_of_torchrun",
    "load_run",
    "measure_as_rank",
    "merge_profiles",
    "measure_profile",
    "plan_job",
    "profile_for",
    "recalibrated",
    "require_torch",
    "run_series",
    "search_layouts",
    "simulate_plan",
]
