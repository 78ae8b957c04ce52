"""Published runs against their predictions: error by group, null model, plan regret, memory.

All errors are of the step time, predicted over measured less one, whatever unit a source printed.
Groups are never pooled: they are of different size and trust.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from planner.flops import peak_flops_per_s, step_flops
from planner.predict import Prediction, likeliest
from planner.published.runs import PublishedRun, UnreadRun
from planner.setup import Setup
from profiles.errors import UnsupportedError

Predict = Callable[[Setup], Prediction]
LOW_MFU = 0.05
"""Below this a run is bound by something else than its work: reported apart from the rest."""
_GIB = 2.0**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One run beside its prediction; `setup` is the one of the run's that is meant."""

    run: PublishedRun
    setup: Setup
    prediction: Prediction

    @property
    def fits(self) -> bool:
        """Whether each rank is predicted to fit in the memory of its GPU."""
        return _fits(self.setup, self.prediction)

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of the worst rank, as the source counts it."""
        return max(rank.logged(self.run.memory_log) for rank in self.prediction.memory)

    @property
    def error(self) -> float:
        """Predicted over measured step time, less one; of a run that was timed."""
        return self.prediction.step.p50_ns / self.run.measured.step_ns - 1

    @property
    def memory_error(self) -> float:
        """Predicted over measured peak memory, less one; of a run whose memory was measured."""
        return self.peak_bytes / self.run.peak_bytes - 1

    @property
    def is_covered(self) -> bool:
        """Whether the measured step lies from P10 to P90."""
        step = self.prediction.step
        return step.p10_ns <= self.run.measured.step_ns <= step.p90_ns

    def utilization(self, flops: float) -> float:
        """Return `flops` a step over what the GPUs could have done in the measured step."""
        seconds = self.run.measured.step_ns / 1e9
        return flops / (seconds * self.setup.layout.num_ranks * peak_flops_per_s(self.setup))

    @property
    def mfu(self) -> float:
        """The measured model-flop utilization, of causal attention."""
        return self.utilization(step_flops(self.setup, causal=True, recomputed=False))

    @property
    def hfu(self) -> float:
        """The measured hardware-flop utilization: an unfused attention computes all of it."""
        causal = self.setup.stack.attention != "unfused"
        return self.utilization(step_flops(self.setup, causal=causal, recomputed=True))


Outcome = Scored | UnreadRun


def score(run: PublishedRun | UnreadRun, predict: Predict) -> Outcome:
    """Return `run` beside its prediction, or why there is none.

    Of several setups the likeliest is meant.
    """
    if isinstance(run, UnreadRun):
        return run
    try:
        setup = likeliest(run.setups)
        prediction = predict(setup)
    except UnsupportedError as error:
        return UnreadRun(id=run.id, group=run.group, reason=str(error))
    except Exception as error:
        # One row must not cost the others: what failed is said of it, where it is seen.
        reason = f"the model failed: {type(error).__name__}: {error}"
        return UnreadRun(id=run.id, group=run.group, reason=reason[:500])
    if len(run.setups) > 1:
        assumed = f"recompute not stated: {setup.layout.recompute} assumed"
        run = replace(run, remarks=(*run.remarks, assumed))
    return Scored(run=run, setup=setup, prediction=prediction)


def _fits(setup: Setup, prediction: Prediction) -> bool:
    limit = setup.cluster.pools[0].gpu.memory_bytes
    return all(rank.total <= limit for rank in prediction.memory)


def by_group(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes of each group, in the order in which groups come up."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        group = outcome.run.group if isinstance(outcome, Scored) else outcome.group
        groups.setdefault(group, []).append(outcome)
    return groups


def validation_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what `layline validate --json` writes: groups, rows, and memory over all of them."""
    return {
        "groups": {name: group_json(group) for name, group in by_group(outcomes).items()},
        "out_of_memory": told_json([one for one in outcomes if isinstance(one, Scored)]),
        "rows": [row_json(outcome) for outcome in outcomes],
    }


def group_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the scores of one group; None where there is nothing to score."""
    scored = [outcome for outcome in outcomes if isinstance(outcome, Scored)]
    timed = [one for one in scored if one.run.measured.step_ns]
    low = [one for one in timed if one.mfu < LOW_MFU]
    scores: dict[str, Any] = {
        "n": len(outcomes),
        "scored": len(scored),
        **_scores(timed),
        "null_model": _null_model(timed),
        "regret": _regret(timed),
        "out_of_memory": told_json(scored),
    }
    if low and len(low) < len(timed):
        rest = [one for one in timed if one.mfu >= LOW_MFU]
        for name, part in (("mfu_below_5_percent", low), ("mfu_from_5_percent", rest)):
            scores[name] = {"n": len(part), **_scores(part), "null_model": _null_model(part)}
    return scores


def _scores(timed: Sequence[Scored]) -> dict[str, float | None]:
    errors = [abs(one.error) for one in timed]
    memory = [abs(one.memory_error) for one in timed if one.run.peak_bytes]
    return {
        "median_abs_rel_err": _rounded(median(errors)) if errors else None,
        "p90_abs_rel_err": _rounded(quantile(errors, 0.9)) if errors else None,
        "mem_median_abs_rel_err": _rounded(median(memory)) if memory else None,
        "coverage_p10_p90": _share([one.is_covered for one in timed]),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Return the quantile of `values`, linear between the two nearest.

    >>> quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.9), quantile([7.0], 0.9)
    (4.6, 7.0)
    """
    ranked, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def _null_model(timed: Sequence[Scored]) -> dict[str, float] | None:
    """Return the errors of the model that knows no topology.

    It predicts flops / (GPUs * peak * e) with one hardware-flop utilization e, the median of those
    measured in the group: its error is the run's utilization over e, less one.
    """
    if not timed:
        return None
    utilizations = [one.hfu for one in timed]
    constant = median(utilizations)
    errors = [abs(utilization / constant - 1) for utilization in utilizations]
    return {"median": _rounded(median(errors)), "p90": _rounded(quantile(errors, 0.9))}


def _regret(timed: Sequence[Scored]) -> dict[str, float] | None:
    """Return how much slower the layout predicted fastest was than the best one, as measured.

    Over the sets of runs that differ in nothing but the layout: mean and worst; None without any.
    """
    sets: dict[object, list[Scored]] = {}
    for one in timed:
        work, cluster = one.setup.workload, one.setup.cluster
        shape = replace(one.setup.model, name="", vocab=1)  # padded by tp
        key = (shape, cluster.num_ranks, cluster.pools[0].gpu.name, one.run.framework,
               work.global_batch, work.seq_len, work.dtype)  # fmt: skip
        sets.setdefault(key, []).append(one)
    regrets = [
        _set_regret(members)
        for members in sets.values()
        if len({member.setup.layout for member in members}) > 1
    ]
    if not regrets:
        return None
    return {
        "sets": len(regrets),
        "mean": _rounded(sum(regrets) / len(regrets)),
        "worst": _rounded(max(regrets)),
    }


def _set_regret(members: Sequence[Scored]) -> float:
    # Of layouts predicted equal the slowest counts: there is no credit for the order in a file.
    first = min(members, key=lambda one: (one.prediction.step.p50_ns, -one.run.measured.step_ns))
    return first.run.measured.step_ns / min(one.run.measured.step_ns for one in members) - 1


def told_json(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return how many runs that ran are told to fit, and how many that ran out of memory not to."""
    ran = [one.fits for one in scored if not one.run.measured.ran_out_of_memory]
    ran_out = [not one.fits for one in scored if one.run.measured.ran_out_of_memory]
    return {
        "ran": len(ran),
        "ran_told": sum(ran),
        "ran_out": len(ran_out),
        "ran_out_told": sum(ran_out),
        "accuracy": _share([*ran, *ran_out]),
    }


def row_json(outcome: Outcome) -> dict[str, Any]:
    """Return one row of `layline validate --json`, of the same keys whatever came of it."""
    row: dict[str, Any] = dict.fromkeys(
        ("measured", "predicted", "unit", "predicted_p10", "predicted_p90", "rel_err",
         "measured_peak_mem_gb", "predicted_peak_mem_gb", "fits")
    )  # fmt: skip
    if isinstance(outcome, UnreadRun):
        about = {"id": outcome.id, "group": outcome.group, "reason": outcome.reason}
        return {**about, "status": "unsupported", **row}
    run, step = outcome.run, outcome.prediction.step
    row.update(measured=run.measured.value, unit=run.measured.unit, fits=outcome.fits)
    if run.measured.step_ns:
        ends = [run.measured.in_unit(ns) for ns in (step.p10_ns, step.p90_ns)]
        row.update(
            predicted=run.measured.in_unit(step.p50_ns),
            predicted_p10=min(ends),
            predicted_p90=max(ends),
            rel_err=outcome.error,
        )
    else:
        row.update(predicted=float(not outcome.fits))
    if outcome.prediction.memory:
        row.update(predicted_peak_mem_gb=round(outcome.peak_bytes / _GIB, 3))
    if run.peak_bytes:
        row.update(measured_peak_mem_gb=round(run.peak_bytes / _GIB, 3))
    about = {"id": run.id, "group": run.group, "reason": "; ".join(run.remarks)}
    return {**about, "status": "scored", **row}


def unread_reasons(outcomes: Iterable[Outcome]) -> Mapping[str, int]:
    """Return how often each reason to leave a run out was given, the most frequent first."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if isinstance(outcome, UnreadRun):
            counts[outcome.reason] = counts.get(outcome.reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _share(claims: Sequence[bool]) -> float | None:
    return _rounded(sum(claims) / len(claims)) if claims else None


def _rounded(value: float) -> float:
    return round(value, 5)
