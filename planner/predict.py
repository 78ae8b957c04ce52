"""Predicted steps of training runs on clusters that are not at hand, from reference profiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.interval import band_of
from planner.memory import context_bytes, peak_memory
from planner.plan import PeakMemory
from planner.reference.program import stack_lanes
from planner.reference.step import StageNs, StepModel, built
from planner.reference.waterfall import growing, waterfall
from planner.schedules import SCHEDULES
from planner.setup import Setup
from profiles.errors import UnsupportedError
from profiles.profile import Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a run is predicted to take: one step with its band, and each pipeline rank's memory.

    `parts` says where the step goes, in ns, from the arithmetic at peak rate up to all that is lost
    (`planner.reference.waterfall`); its values sum to the median step.
    """

    step: Cost
    memory: tuple[PeakMemory, ...]
    parts: Mapping[str, int]


def predict(setup: Setup) -> Prediction:
    """Return the predicted step and memory of `setup`.

    Raises UnsupportedError for what the models of time and memory do not cover.

    >>> from planner.layout import Layout
    >>> from profiles.presets import cluster_preset, model_preset, stack_preset
    >>> from profiles.workload import Workload
    >>> found = predict(Setup(
    ...     model=model_preset("llama-3-8b"), cluster=cluster_preset("h100-sxm"),
    ...     workload=Workload(seq_len=8192, global_batch=128, dtype="bf16"),
    ...     layout=Layout(dp=8, tp=1, pp=1, micro_batch=1, num_microbatches=16, stage_layers=(32,),
    ...                   sharding="zero1"), stack=stack_preset("nemo")))
    >>> 8 < found.step.p50_ns / 1e9 < 20, sum(found.parts.values()) == found.step.p50_ns
    (True, True)
    """
    model, lanes = step_model(setup), stack_lanes(setup.stack)
    grown = model.stages(growing(lanes))
    whole = tuple(StageNs(*(part[-1:] for part in stage)) for stage in grown)
    step_ns = round(float(model.step_of(whole, lanes)[0]))
    band = band_of(setup.stack.name, setup.cluster.pools[0].gpu.name, model.is_extrapolated)
    return Prediction(
        step=Cost(
            p10_ns=round(band.low * step_ns),
            p50_ns=step_ns,
            p90_ns=round(band.high * step_ns),
            is_extrapolated=model.is_extrapolated,
        ),
        memory=memory_of(setup),
        parts=waterfall(setup, grown, float(lanes.step[0]), step_ns),
    )


def memory_of(setup: Setup) -> tuple[PeakMemory, ...]:
    """Return the peak memory of each pipeline rank of `setup`."""
    layout = setup.layout
    return peak_memory(
        setup.model, setup.workload, layout, built(layout), setup.stack, context_bytes(layout)
    )


def likeliest(setups: Sequence[Setup]) -> Setup:
    """Return the first of `setups` whose ranks fit in memory, or the very first if none does.

    The allocator's reserve does not count: where memory is short it is given back.
    """
    if len(setups) == 1:
        return setups[0]
    for setup in setups:
        limit = setup.cluster.pools[0].gpu.memory_bytes
        if all(rank.allocated + rank.context <= limit for rank in memory_of(setup)):
            return setup
    return setups[0]


def step_model(setup: Setup) -> StepModel:
    """Return the model of the step of `setup`, for any scalars.

    Raises UnsupportedError for a setup that it does not cover.
    """
    _check(setup)
    return StepModel(setup)


def _check(setup: Setup) -> None:
    """Raise UnsupportedError for a setup that the models do not cover."""
    layout, model = setup.layout, setup.model
    family = SCHEDULES.get(layout.schedule)
    if family is None:
        raise UnsupportedError(
            f"schedule is {layout.schedule}; known are {', '.join(sorted(SCHEDULES))}"
        )
    if layout.num_stages > 1 and not family.takes(layout.stages_per_rank):
        raise UnsupportedError(
            f"schedule {layout.schedule} does not have {layout.stages_per_rank} stages a rank"
        )
    if sum(layout.stage_layers) != model.num_layers:
        raise UnsupportedError(
            f"the stages have {sum(layout.stage_layers)} layers, the model {model.num_layers}"
        )
    if len(setup.cluster.pools) > 1:
        raise UnsupportedError(
            "pools of several GPUs are not covered here; name one pool, or let `layline plan` lay "
            "a pipeline over them"
        )
    if layout.num_ranks > setup.cluster.num_ranks:
        raise UnsupportedError(
            f"the layout has {layout.num_ranks} ranks, the cluster {setup.cluster.num_ranks}"
        )
    _check_shares(setup)


def _check_shares(setup: Setup) -> None:
    """Raise UnsupportedError where ranks would not have equal shares, or work of no meaning."""
    layout, model, gpu = setup.layout, setup.model, setup.cluster.pools[0].gpu
    if setup.workload.dtype not in gpu.peak_flops_per_s:
        raise UnsupportedError(
            f"dtype is {setup.workload.dtype}; {gpu.name} has {', '.join(gpu.peak_flops_per_s)}"
        )
    if layout.global_batch != setup.workload.global_batch:
        raise UnsupportedError(
            f"the layout trains on {layout.global_batch} sequences a step, "
            f"the workload on {setup.workload.global_batch}"
        )
    for count, what, by, axis in (
        (model.num_heads, "heads", layout.tp, "tp"), (model.ffn, "ffn", layout.tp, "tp"),
        (setup.workload.seq_len, "seq_len", layout.cp, "cp"),
        (model.num_experts or 1, "experts", layout.ep, "ep"),
        (layout.replicas, "dp x cp", layout.ep, "ep"),
        (layout.replicas, "dp x cp", layout.shard_ranks, "the shard group"),
    ):  # fmt: skip
        if count % by:
            raise UnsupportedError(f"{what} is {count}, no multiple of {axis} ({by})")


__all__ = ["Prediction", "Setup", "likeliest", "memory_of", "predict", "step_model"]
