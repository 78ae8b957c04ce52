"""Variants of a job: other numerics, or another place for the optimizer, searched in turn.

They are no fields of a layout but of what is trained, and by what software: a variant is a job with
another workload or another stack.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from planner.evaluate import Costs
from planner.plan import Certificate, Variant
from planner.search import (
    Effort,
    InfeasibleError,
    Progress,
    SearchResult,
    ignore_progress,
    search,
)
from profiles.choices import AS_SAID
from profiles.job import Job
from profiles.stack import changed_stack

INTERRUPTED = "not searched: interrupted"
USUAL_EFFORT = Effort()


class Chosen(NamedTuple):
    """The variant that is best, what its layouts take, and the outcome of all searches."""

    job: Job
    costs: Costs
    result: SearchResult


def variants_of(job: Job) -> tuple[Job, ...]:
    """Return the jobs that the choices of `job` leave, `job` itself first; no two are alike.

    >>> from profiles.choices import Choices
    >>> from profiles.job import SearchLimits
    >>> from profiles.presets import cluster_preset, model_preset, stack_preset
    >>> from profiles.workload import Workload
    >>> job = Job(seed=0, model=model_preset("llama-3-8b"), cluster=cluster_preset("h100-sxm"),
    ...           workload=Workload(seq_len=8192, global_batch=128, dtype="bf16"),
    ...           stack=stack_preset("nemo"), profile_path="", search=SearchLimits(),
    ...           choices=Choices(dtype=("bf16", "fp8"), optimizer_offload=(False, True)))
    >>> [variant_name(job, each) for each in variants_of(job)]  # doctest: +NORMALIZE_WHITESPACE
    ['bf16, optimizer on the GPU', 'bf16, optimizer on the host',
     'fp8, optimizer on the GPU', 'fp8, optimizer on the host']
    """
    choices, found = job.choices, [job]
    for dtype, gradient_dtype, offload in product(
        choices.dtype or (job.workload.dtype,),
        choices.gradient_dtype or (None,),
        choices.optimizer_offload or (None,),
    ):
        workload = replace(job.workload, dtype=dtype)
        stack = changed_stack(
            job.stack, dtype, gradient_dtype=gradient_dtype, optimizer_offload=offload
        )
        if all((workload, stack) != (each.workload, each.stack) for each in found):
            found.append(replace(job, workload=workload, stack=stack, choices=AS_SAID))
    return tuple(found)


def variant_name(job: Job, variant: Job) -> str:
    """Return in words what the choices of `job` left open and `variant` fixes."""
    choices, workload, stack = job.choices, variant.workload, variant.stack
    words = [
        (choices.dtype, workload.dtype),
        (choices.gradient_dtype, f"{stack.gradient_dtype(workload.dtype)} gradients"),
        (
            choices.optimizer_offload,
            f"optimizer on the {'host' if stack.offloads_optimizer else 'GPU'}",
        ),
    ]
    return ", ".join(word for values, word in words if len(values) > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What became of one variant; without a result, `reason` says why."""

    variant: Job
    costs: Costs | None = None
    result: SearchResult | None = None
    reason: str = ""


def search_variants(
    job: Job,
    costs_of: Callable[[Job], Costs],
    effort: Effort = USUAL_EFFORT,
    progress: Progress = ignore_progress,
) -> Chosen:
    """Return the best of the variants of `job` by the first objective, with its own layouts ranked.

    Each gets an equal share of the time that is left, and what was found by then is what it has to
    be better than. The certificate is of all variants together. Ties go to the variant named first.
    Raises InfeasibleError where nothing fits under any, and UnsupportedError where `costs_of` knows
    nothing of one.
    """
    variants = variants_of(job)
    if len(variants) == 1:
        costs = costs_of(job)
        return Chosen(job, costs, search(job, costs, effort, progress))
    outcomes = _searched(job, variants, costs_of, effort, progress)
    best: _Outcome | None = None
    for outcome in outcomes:
        if outcome.result is not None and (best is None or _value(outcome) < _value(best)):
            best = outcome
    if best is None or best.result is None or best.costs is None:
        told = "; ".join(f"{variant_name(job, each.variant)}: {each.reason}" for each in outcomes)
        raise InfeasibleError(f"none of {len(variants)} variants of the job fits: {told}")
    whole = replace(
        best.result,
        certificate=_merged(best.result.certificate, outcomes),
        variants=tuple(_line(job, each, each is best) for each in outcomes),
        is_interrupted=any(_is_interrupted(each) for each in outcomes),
    )
    return Chosen(best.variant, best.costs, whole)


def _searched(
    job: Job, variants: Sequence[Job], costs_of: Callable[[Job], Costs], effort: Effort,
    progress: Progress,
) -> list[_Outcome]:  # fmt: skip
    """Return what becomes of each variant; of those after an interruption, nothing."""
    started, outcomes = time.monotonic(), list[_Outcome]()
    # Known before a search is spent on the others: a variant that the models do not cover.
    costs = [costs_of(variant) for variant in variants]
    for place, variant in enumerate(variants):
        if any(_is_interrupted(each) for each in outcomes):
            outcomes.append(_Outcome(variant=variant, reason=INTERRUPTED))
            continue
        share = _shared(progress, place, len(variants), variant_name(job, variant))
        left = _left(effort, started, len(variants) - place)
        found = [_value(each) for each in outcomes if each.result is not None]
        try:
            result = search(variant, costs[place], left, share, min(found, default=math.inf))
            outcomes.append(_Outcome(variant=variant, costs=costs[place], result=result))
        except InfeasibleError as error:
            reason = str(error).partition(";")[0]  # the nearest miss; the others are alike
            outcomes.append(_Outcome(variant=variant, reason=reason))
        except KeyboardInterrupt:
            if not found:
                raise
            outcomes.append(_Outcome(variant=variant, reason=INTERRUPTED))
    return outcomes


def _left(effort: Effort, started: float, num_variants: int) -> Effort:
    """Return an equal share of the time that is left of `effort`."""
    if effort.budget_s is None:
        return effort
    left_s = max(0.0, effort.budget_s - (time.monotonic() - started))
    return replace(effort, budget_s=left_s / num_variants)


def _shared(progress: Progress, place: int, count: int, name: str) -> Progress:
    return lambda share, what: progress((place + share) / count, f"{name}: {what}")


def _is_interrupted(outcome: _Outcome) -> bool:
    if outcome.result is None:
        return outcome.reason == INTERRUPTED
    return outcome.result.is_interrupted


def _value(outcome: _Outcome) -> float:
    assert outcome.result is not None, "only a variant with layouts has a value"
    return outcome.result.certificate.value


def _merged(best: Certificate, outcomes: Sequence[_Outcome]) -> Certificate:
    """Return what is known of the layouts of all variants, beside the `best` of them.

    Of a variant that was not searched nothing is known, so that nothing bounds the whole. One in
    which nothing fits has nothing to bound.
    """
    known = [each.result.certificate for each in outcomes if each.result is not None]
    lower_bound = min(each.lower_bound for each in known)
    if any(each.reason == INTERRUPTED for each in outcomes):
        lower_bound = 0.0
    # What a worse variant has left open is not open any more where all of it is worse.
    num_open = sum(each.num_open for each in known if each.lower_bound < best.value)
    rejected: Counter[str] = Counter()
    for each in known:
        rejected.update(each.num_rejected)
    return replace(
        best,
        lower_bound=lower_bound,
        gap=(best.value - lower_bound) / best.value,
        num_layouts=sum(each.num_layouts for each in known),
        num_rejected=dict(sorted(rejected.items())),
        num_bounded=sum(each.num_bounded + each.num_open for each in known) - num_open,
        num_timed=sum(each.num_timed for each in known),
        num_open=num_open,
    )


def _line(job: Job, outcome: _Outcome, is_chosen: bool) -> Variant:
    return Variant(
        name=variant_name(job, outcome.variant),
        is_chosen=is_chosen,
        best=outcome.result.ranking[0] if outcome.result is not None else None,
        reason=outcome.reason,
    )


def variant_text(variant: Variant) -> str:
    """Return one line on a variant, for a person.

    >>> variant_text(Variant(name="fp8", is_chosen=False, best=None, reason="memory binds"))
    '  variant fp8: none, memory binds'
    """
    mark = ">" if variant.is_chosen else " "
    if variant.best is None:
        return f"{mark} variant {variant.name}: none, {variant.reason}"
    step = variant.best.step
    unsure = " extrapolated" if step.is_extrapolated else ""
    return (
        f"{mark} variant {variant.name}: {step.p50_ns / 1e9:.3f} s{unsure}, {variant.best.layout}"
    )
