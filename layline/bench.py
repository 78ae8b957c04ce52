"""`layline bench`: this project's own speed, and how well it foretells the machine it runs on."""

from collections.abc import Callable, Mapping

from layline.walk import Progress, require_torch


def _engines(progress: Progress) -> tuple[object, str]:
    """Time the search and the simulation engines beside a yardstick in the same run."""
    from planner.bench import bench_engines, figures_text

    measured = bench_engines(progress)
    return {"figures": measured}, figures_text(measured)


def _executor(_progress: Progress) -> tuple[object, str]:
    """Time the executor beside a plain loop in the same run."""
    require_torch("bench")
    from executor.bench import bench_executor, bench_text

    figures = bench_executor()
    return figures, bench_text(figures)


def _models(progress: Progress) -> tuple[object, str]:
    """Train models of rising size on one device, predicted against measured."""
    require_torch("bench")
    from layline.ladder import climb, ladder_text
    from profiles.machine import default_ranks

    rungs = climb(default_ranks()[1], None, progress)
    return {"models": rungs}, ladder_text(rungs)


def _planner(progress: Progress) -> tuple[object, str]:
    """Search three jobs of the field, from 8 GPUs to 16,384."""
    from planner.bench import figures_text
    from planner.bench_search import bench_search

    measured = bench_search(progress)
    return {"figures": measured}, figures_text(measured)


def _profile(progress: Progress) -> tuple[object, str]:
    """Measure this machine twice, and shapes that the profile does not hold."""
    require_torch("bench")
    from profiles.machine import default_ranks
    from profiles.measure.verify import verified_text, verify

    num_ranks, device = default_ranks()
    verified = verify(num_ranks, device, quick=True, on_progress=progress)
    return verified, verified_text(verified)


BENCHES: Mapping[str, Callable[[Progress], tuple[object, str]]] = {
    "engines": _engines,
    "executor": _executor,
    "models": _models,
    "planner": _planner,
    "profile": _profile,
}
"""What can be measured, by name: each returns its figures and their text."""
