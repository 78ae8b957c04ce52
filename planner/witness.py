"""What kernels cost in a row, and how unevenly: read off the whole layers of a profile.

Three corrections lead from kernels that were timed one by one to a layer of a training step. Each
is measured on the machine of the profile; none is tuned.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist, fmean

from planner.kernels import StageShape, layer_backward, layer_forward
from profiles.lookup import CostTable
from profiles.model import ModelSpec
from profiles.profile import Cost

BOUNDS = (0.5, 2.0)
"""A layer that takes more than twice the sum of its kernels, or less than half, is a broken
measurement; the factor stops there."""


def expected(cost: Cost) -> Cost:
    """Return `cost` with its middle moved from the median to the mean.

    A step sums hundreds of parts, and a sum of many parts is near the sum of their means, whatever
    their medians are. The mean of a skewed quantity from three quantiles is
    0.3 P10 + 0.4 P50 + 0.3 P90. Source: Swanson's rule, as in Hurst, Brown and Swanson,
    "Swanson's 30-40-30 rule", AAPG Bulletin 84 (2000).

    >>> expected(Cost(p10_ns=10, p50_ns=20, p90_ns=80)).p50_ns
    35
    """
    mean_ns = round(0.3 * cost.p10_ns + 0.4 * cost.p50_ns + 0.3 * cost.p90_ns)
    return Cost(
        p10_ns=cost.p10_ns,
        p50_ns=mean_ns,
        p90_ns=cost.p90_ns,
        is_extrapolated=cost.is_extrapolated,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """How a layer differs from the sum of its kernels.

    `forward` and `backward` are ratios of the layer to the sum; `spread` is the standard deviation
    of a layer's time as a share of its mean.
    """

    forward: float = 1.0
    backward: float = 1.0
    spread: float = 0.0

    def skew_ns(self, work_ns: int, group_size: int) -> int:
        """Return how long a group waits for its slowest member after `work_ns` of work each.

        Equal ranks are never equal: after work of standard deviation s they meet when the last of
        n is done, E[max of n normals] * s after the mean. What disturbs a rank (another program, a
        clock) is taken to outlast the work between two meetings, so s = spread * work. E[max] is
        Blom's approximation, quantile((n - 0.375) / (n + 0.25)). Source: Blom, "Statistical
        estimates and transformed beta-variables" (1958).

        >>> Witness(spread=0.1).skew_ns(1_000_000, 2), Witness(spread=0.1).skew_ns(1_000_000, 1)
        (58946, 0)
        """
        if group_size == 1:
            return 0
        lateness = NormalDist().inv_cdf((group_size - 0.375) / (group_size + 0.25))
        return round(lateness * self.spread * work_ns)


def read_witness(table: CostTable, dtype: str) -> Witness:
    """Return the witness of the profile behind `table`, or the neutral one if it holds no layers.

    The ratio of a direction is the geometric mean over the measured shapes of mean layer time over
    the sum of mean kernel times.
    """
    layers = [
        kernel
        for kernel in table.profile.kernels
        if kernel.op in ("layer_forward", "layer_backward") and kernel.dtype == dtype
    ]
    if not layers:
        return Witness()
    logs: dict[str, list[float]] = {"layer_forward": [], "layer_backward": []}
    spreads = []
    for kernel in layers:
        layer = expected(table.kernel(kernel.op, dtype, kernel.shape))
        parts = (layer_forward if kernel.op == "layer_forward" else layer_backward)(
            _shape(kernel.shape)
        )
        sum_ns = sum(expected(table.kernel(part.op, dtype, part.shape)).p50_ns for part in parts)
        logs[kernel.op].append(math.log(layer.p50_ns / sum_ns))
        # P10 and P90 of a normal lie 2.563 standard deviations apart.
        spreads.append((layer.p90_ns - layer.p10_ns) / 2.563 / layer.p50_ns)
    low, high = BOUNDS
    forward, backward = (
        min(max(math.exp(fmean(logs[op])), low), high) for op in ("layer_forward", "layer_backward")
    )
    return Witness(forward=forward, backward=backward, spread=fmean(spreads))


def _shape(shape: tuple[int, ...]) -> StageShape:
    batch, seq, hidden, heads, head, ffn = shape
    model = ModelSpec(
        name="witness", num_layers=1, hidden=hidden, num_heads=heads, num_kv_heads=heads,
        head_size=head, ffn=ffn, vocab=1, max_seq_len=seq,
    )  # fmt: skip
    return StageShape(model=model, tp=1, micro_batch=batch, seq_len=seq)
