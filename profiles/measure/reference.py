"""Repeats one kernel of the profile, so that a run can tell how fast the machine is today."""

import torch

from profiles.lookup import REFERENCE_SHAPES
from profiles.measure.buffers import TORCH_DTYPES, Arena
from profiles.measure.ops import OPS
from profiles.measure.timing import Budget, quantiles, time_calls

_BUDGET = Budget(time_ns=20_000_000, min_samples=5, max_samples=50)
_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def reference_ns(device: torch.device, dtype: str = "fp32") -> int:
    """Return the median time in ns of the reference kernel now, within about 50 ms.

    `CostTable.reference(dtype)` is the same kernel when the profile was measured, with all ranks
    at work; so let all ranks call this at once. The ratio tells how much slower the machine is.
    """
    arena = Arena(device, TORCH_DTYPES[dtype], _ELEMENTS[device.type])
    shape = REFERENCE_SHAPES[device.type]
    calls = [OPS["linear_forward"](arena, shape) for _ in range(4)]
    return quantiles(time_calls(calls, device, _BUDGET))[1]
