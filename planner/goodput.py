"""How much of its time a job that is interrupted and writes checkpoints has to show for.

Interruptions strike at random, M apart on average, and during restarts and checkpoints too. After
one the job restarts for R and does again what no checkpoint held. Source: J. T. Daly, "A higher
order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006. The stories
of `simulator.stories` tell the same by simulation, with more that may befall a job.
"""

from functools import lru_cache
from math import expm1, sqrt
from typing import overload

import numpy as np
from numpy.typing import NDArray

from profiles.model import ModelSpec
from profiles.stack import StackSpec
from profiles.workload import DTYPE_BYTES, Workload

Seconds = NDArray[np.float64]


def mean_between_interruptions_s(per_gpu_day: float, num_gpus: int) -> float:
    """Return M of a job on `num_gpus` GPUs that stops when one of them does.

    M = 86400 / (rate * GPUs). Llama 3 405B was interrupted every 3.09 hours.

    >>> round(mean_between_interruptions_s(419 / 54 / 16384, 16384) / 3600, 2)
    3.09
    """
    return 86_400 / (per_gpu_day * num_gpus)


def checkpoint_bytes(model: ModelSpec, workload: Workload, stack: StackSpec) -> int:
    """Return the size of a checkpoint: weights, their master copy and the optimizer's moments.

    NVIDIA's recipes give 920 GB for LLaMA 3.1 70B, which is 14 bytes a parameter in GiB.

    >>> from profiles.presets import model_preset, stack_preset
    >>> work = Workload(seq_len=1, global_batch=1, dtype="bf16")
    >>> checkpoint_bytes(model_preset("llama-3.1-70b"), work, stack_preset("nemo")) // 2**30
    919
    """
    element = DTYPE_BYTES[workload.dtype]
    moments = stack.moment_bytes or 2 * element
    return model.num_parameters * (element + stack.master_bytes + moments)


def young_interval_s(checkpoint_s: float, mean_s: float) -> float:
    """Return Young's interval of work between checkpoints: sqrt(2 C M), good where C << M.

    Source: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM
    17(9), 1974.

    >>> round(young_interval_s(60, 3.09 * 3600) / 60, 1)
    19.3
    """
    return sqrt(2 * checkpoint_s * mean_s)


@lru_cache(maxsize=1024)
def best_interval_s(checkpoint_s: float, mean_s: float) -> float:
    """Return the interval t of work between checkpoints that leaves the most useful time.

    Where the derivative of `useful_share` is 0, u = t / M solves u = 1 - e^-(u + C / M): the larger
    root of a convex function, which Newton's steps reach from Young's interval, or from u = 1,
    without overshooting. Restarts do not matter. It is 0 where a checkpoint is free.

    >>> round(best_interval_s(60, 3.09 * 3600) / 60, 1)
    18.6
    """
    delay = checkpoint_s / mean_s
    u = min(1.0, sqrt(2 * delay))
    while u > 0:
        smaller = u + (u + expm1(-u - delay)) / expm1(-u - delay)
        if smaller >= u:
            break
        u = smaller
    return u * mean_s


@overload
def wall_per_useful(
    interval_s: float, checkpoint_s: float, restart_s: float, mean_s: float
) -> float: ...
@overload
def wall_per_useful(
    interval_s: Seconds, checkpoint_s: float, restart_s: float, mean_s: float
) -> Seconds: ...
def wall_per_useful(
    interval_s: float | Seconds, checkpoint_s: float, restart_s: float, mean_s: float
) -> float | Seconds:
    """Return the time that passes for each second of work that lasts, at least 1.

    A segment of work t and its checkpoint C must pass without an interruption, and each
    interruption starts R and the segment anew: M e^(R/M) (e^((t + C)/M) - 1) / t on average (Daly,
    eq. for the total wall clock time). It is infinite where it cannot be counted.

    >>> round(wall_per_useful(18.6 * 60, 60, 600, 3.09 * 3600), 3)
    1.173
    """
    with np.errstate(over="ignore"):
        segment = np.expm1(np.add(interval_s, checkpoint_s) / mean_s)
        wall = mean_s * np.exp(restart_s / mean_s) * segment / interval_s
    return wall if isinstance(interval_s, np.ndarray) else float(wall)


def useful_share(interval_s: float, checkpoint_s: float, restart_s: float, mean_s: float) -> float:
    """Return the part of all time that does work that lasts, the reciprocal of `wall_per_useful`.

    Without checkpoints that take time it tends to e^(-R/M) as they come closer.

    >>> round(useful_share(18.6 * 60, 60, 600, 3.09 * 3600), 4)
    0.8525
    """
    return 1 / wall_per_useful(interval_s, checkpoint_s, restart_s, mean_s)
