"""Numbers in words: the few formats that the terminal and the page share."""

from collections.abc import Sequence

from planner.flops import mean_peak_flops_per_s
from planner.plan import Plan
from planner.waterfall import Waterfall
from profiles.quantity import format_quantity

KIND_NAMES = {
    "forward": "forward",
    "backward": "backward",
    "send": "send",
    "all_reduce": "all-reduce",
    "optimizer": "optimizer",
    "data": "data",
    "other": "other",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "push": "push",
    "pull": "pull",
    "wait": "wait",
    "idle": "idle",
}
"""What a time is spent on, in the order of every table and legend; `idle` is no span kind."""

PART_NAMES = {
    "peak": "arithmetic at peak rate",
    "recompute": "recomputation, at that rate",
    "kernels": "kernels below the peak rate",
    "work": "forward and backward",
    "exchange": "exchange inside the layers",
    "pipeline": "pipeline, idle and messages",
    "reduction": "gradient reduction",
    "optimizer": "optimizer",
    "host": "host and wait",
}
"""What the parts of a `planner.waterfall.Waterfall` are called."""


def duration(time_ns: float) -> str:
    """Return a time in ns with its unit, `412 ms`."""
    return format_quantity(time_ns, "ns")


def band(low_ns: int, high_ns: int) -> str:
    """Return a band of times in ns as text, the unit once where both ends share it.

    >>> band(298_900_000, 346_600_000), band(900_000, 1_100_000)
    ('298.9 to 346.6 ms', '900.0 us to 1.1 ms')
    """
    low, high = duration(low_ns), duration(high_ns)
    if low.split()[-1] == high.split()[-1]:
        low = low.split()[0]
    return f"{low} to {high}"


def size(size_bytes: float) -> str:
    """Return a size in bytes with its unit, `71.3 GiB`."""
    return format_quantity(size_bytes, "bytes")


def signed_duration(time_ns: int) -> str:
    """Return a difference of times in ns with its sign; an exact zero has none.

    >>> signed_duration(0)
    '0'
    """
    if time_ns == 0:
        return "0"
    return f"{'+' if time_ns > 0 else '-'}{duration(abs(time_ns))}"


def change(measured: float, predicted: float) -> str:
    """Return how far `measured` lies from `predicted`, in percent; as a factor from 10 x on.

    >>> change(105, 100), change(100, 100), change(1, 0), change(2500, 100)
    ('+5.0 %', '0.0 %', '-', '25 x')
    """
    if predicted <= 0:
        return "-"
    if (ratio := measured / predicted) >= 10:
        return f"{ratio:,.0f} x" if ratio < 10_000 else "> 10,000 x"
    percent = round(100 * (measured - predicted) / predicted, 1)
    return f"{percent:+.1f} %" if percent else "0.0 %"


def count(number: float) -> str:
    """Return a whole number in groups of three.

    >>> count(1234567)
    '1,234,567'
    """
    return f"{round(number):,}"


def stages_text(stages: Sequence[int]) -> str:
    """Return what a pipeline rank is called by: the stages that it holds.

    >>> stages_text([3]), stages_text([0, 4]), stages_text(range(0, 32, 4))
    ('stage 3', 'stages 0,4', 'stages 0,4,..,28')
    """
    shown = [str(stage) for stage in stages]
    if len(shown) > 4:
        shown = [*shown[:2], "..", shown[-1]]
    return f"stage{'s' if len(shown) > 1 else ''} {','.join(shown)}"


def joined(words: list[str]) -> str:
    """Return words as a list in a sentence.

    >>> joined(["a"]), joined(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def origin_text(plan: Plan) -> str:
    """Return where the costs of `plan` come from, in a few words."""
    profile = plan.profile
    if not profile.is_reference:
        return f"profile of {profile.measured_at}"
    return (
        f"stack {plan.stack.name}, from reference profiles of {profile.measured_at}, nothing was "
        "measured there"
    )


def gpus_text(plan: Plan) -> str:
    """Return the GPUs of the cluster by name, each once."""
    return joined(list(dict.fromkeys(pool.gpu.name for pool in plan.cluster.pools)))


def utilization_text(plan: Plan, found: Waterfall) -> str:
    """Return MFU and HFU as a sentence with their formula, or why there is neither."""
    dtype = plan.workload.dtype
    if found.mfu is None or found.hfu is None:
        return (
            f"No peak rate of {gpus_text(plan)} in {dtype} is known: the parts begin at the work "
            "itself, and there is no MFU."
        )
    peak = format_quantity(mean_peak_flops_per_s(plan.cluster, dtype), "flop/s")
    return (
        f"MFU {100 * found.mfu:.1f} %, HFU {100 * found.hfu:.1f} % = model flops (HFU: and "
        f"recomputed ones) / (step x {count(plan.layout.num_ranks)} ranks x {peak} dense {dtype})"
    )
