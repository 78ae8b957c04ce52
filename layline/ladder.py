"""`layline bench models`: one device alone, predicted against measured, for models of rising size.

The profile is measured, the models are planned from it and trained for a few steps, and nothing is
adjusted in between: what the table shows is what a newcomer would get.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layline import __version__
from layline.walk import Progress, load_run, measure_profile, run_series
from planner.cost import measured_costs
from planner.plan import Plan
from planner.search import InfeasibleError, make_plan, search
from profiles.files import canonical_json, write_text
from profiles.job import Job, SearchLimits
from profiles.machine import local_cluster
from profiles.model import ModelSpec
from profiles.presets import stack_preset
from profiles.profile import Profile
from profiles.workload import Workload
from reports.words import count, duration, size

NUM_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One model of the ladder, alone on its device."""

    model: str
    parameters: int
    predicted_step_ns: int
    measured_step_ns: int
    predicted_peak_bytes: int
    measured_peak_bytes: int


def climb(device: Literal["cpu", "cuda"], profile: Path | None, progress: Progress) -> list[Rung]:
    """Return predicted and measured step time and memory of each model that fits the device.

    `profile` holds a profile of one rank; without it one is measured.
    """
    measured = _profile(device, profile, progress)
    with tempfile.TemporaryDirectory(prefix="layline-ladder-") as name:
        folder = Path(name)
        kept = folder / "profile.json"
        write_text(kept, canonical_json(measured))
        plans = [_plan(model, device, measured, kept) for model in LADDERS[device]]
        fitting = [plan for plan in plans if plan is not None]
        runs = [folder / plan.model.name for plan in fitting]
        run_series(
            fitting, runs, num_steps=NUM_STEPS,
            on_step=lambda run, step: progress(
                0.5 + 0.5 * (run * NUM_STEPS + step.step) / (NUM_STEPS * len(runs)),
                fitting[run].model.name,
            ),
        )  # fmt: skip
        return [_rung(plan, run) for plan, run in zip(fitting, runs, strict=True)]


def _profile(device: Literal["cpu", "cuda"], path: Path | None, progress: Progress) -> Profile:
    if path is not None:
        from profiles.store import load_profile

        return load_profile(path)
    # A CPU has one dtype to be measured here, which a quick profile is about.
    return measure_profile(
        1, device, quick=device == "cpu", progress=lambda share, what: progress(0.5 * share, what)
    )


def _model(name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int
           ) -> ModelSpec:  # fmt: skip
    return ModelSpec(
        name=name, num_layers=layers, hidden=hidden, num_heads=heads, num_kv_heads=kv_heads,
        head_size=hidden // heads, ffn=ffn, vocab=vocab, max_seq_len=8192,
    )  # fmt: skip


LADDERS: Mapping[str, tuple[ModelSpec, ...]] = {
    "cpu": (
        _model("3m", 4, 192, 6, 6, 512, 4096),
        _model("7m", 4, 320, 10, 5, 864, 4096),
        _model("18m", 6, 448, 7, 7, 1184, 4096),
        _model("32m", 8, 512, 8, 4, 1376, 8192),
    ),
    "cuda": (
        _model("0.2b", 12, 1024, 16, 16, 2816, 32000),
        _model("0.5b", 24, 1280, 20, 4, 3456, 32000),
        _model("1.1b", 22, 2048, 32, 4, 5632, 32000),
        _model("3b", 28, 3072, 24, 8, 8192, 128256),
        _model("7b", 32, 4096, 32, 32, 11008, 32000),
        _model("8b", 32, 4096, 32, 8, 14336, 128256),
    ),
}
"""LLaMA-like shapes: for a CPU those that a core trains in seconds a step, for a GPU 0.2 to 8 B."""


def _plan(
    model: ModelSpec, device: Literal["cpu", "cuda"], profile: Profile, path: Path
) -> Plan | None:
    """Return the plan of `model` alone on one device, None where its memory is too small."""
    is_cpu = device == "cpu"
    job = Job(
        seed=0,
        model=model,
        workload=Workload(
            seq_len=256 if is_cpu else 2048, global_batch=4, dtype="fp32" if is_cpu else "bf16"
        ),
        cluster=local_cluster(1, device),
        stack=stack_preset("layline-gloo" if is_cpu else "layline-nccl"),
        profile_path=str(path),
        search=SearchLimits(micro_batch=(2,)),
    )
    costs = measured_costs(job, profile, str(path))
    try:
        return make_plan(job, costs, search(job, costs), 0, __version__)
    except InfeasibleError:
        return None


def _rung(plan: Plan, directory: Path) -> Rung:
    _, record = load_run(directory)
    return Rung(
        model=plan.model.name,
        parameters=plan.model.num_parameters,
        predicted_step_ns=plan.step.p50_ns,
        measured_step_ns=record.median_step_ns,
        predicted_peak_bytes=max(memory.total for memory in plan.memory),
        measured_peak_bytes=max(memory.peak_bytes for memory in record.memory),
    )


def ladder_text(rungs: list[Rung]) -> str:
    """Return a table, a line a model."""
    lines = [f"{'model':>6} {'parameters':>11}   {'step':>10} {'predicted':>10} {'error':>7}   "
             f"{'memory':>10} {'predicted':>10} {'error':>7}"]  # fmt: skip
    for rung in rungs:
        step = rung.predicted_step_ns / rung.measured_step_ns - 1
        memory = rung.predicted_peak_bytes / rung.measured_peak_bytes - 1
        lines.append(
            f"{rung.model:>6} {count(rung.parameters):>11}   "
            f"{duration(rung.measured_step_ns):>10} {duration(rung.predicted_step_ns):>10} "
            f"{100 * step:>+6.1f}%   {size(rung.measured_peak_bytes):>10} "
            f"{size(rung.predicted_peak_bytes):>10} {100 * memory:>+6.1f}%"
        )
    return "\n".join(lines)
