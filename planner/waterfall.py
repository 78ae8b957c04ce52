"""Where a predicted step goes: from the arithmetic at peak rate to all that is lost.

A step lasts as long on every rank. Its parts are those of the mean pipeline rank, and sum to it:

* peak: the flops of the model (`planner.flops`) at the dense peak rate of all ranks;
* recompute: at that rate too, the flops that the backward makes again;
* kernels: what else forwards and backwards take, exchanges left out: products below the peak rate,
  memory-bound kernels, launches that the device waits for;
* exchange: collectives in forwards and backwards that the layers wait for;
* pipeline: idle time, waiting for messages and for the work of other ranks;
* reduction: what is not hidden of the gradients' way through the replicas;
* optimizer: the update;
* host: work of the host, and the wait for the slowest of equal ranks.

MFU = flops of the model / (step * ranks * peak rate), which is peak / step. HFU counts what is made
again as well: (peak + recompute) / step. Where no peak rate is known the first three parts are one,
`work`, and there is neither.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from planner.flops import peak_flops_per_s, step_flops
from planner.plan import Plan, StageCost
from planner.setup import Setup
from simulator.idle import COMMUNICATION, HOST, StreamUse

PARTS = ("peak", "recompute", "kernels", "exchange", "pipeline", "reduction", "optimizer", "host")
PARTS_WITHOUT_PEAK = ("work", *PARTS[3:])
REDUCTIONS = tuple(kind for kind in COMMUNICATION if kind != "send")


class Utilization(NamedTuple):
    """Shares of the peak rate: what the model needs, and what the hardware is made to compute."""

    mfu: float
    hfu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    """The parts of a step by name, in ns and in order; `mfu` and `hfu` are None without a peak."""

    parts_ns: Mapping[str, int]
    mfu: float | None
    hfu: float | None

    @property
    def step_ns(self) -> int:
        """The whole step."""
        return sum(self.parts_ns.values())


def waterfall(plan: Plan, uses: Sequence[StreamUse]) -> Waterfall:
    """Return where the step of `plan` goes, of whose simulation `uses` tell."""
    compute = [use for use in uses if use.stream == "compute"]
    step_ns = sum(compute[0].busy_ns.values()) + compute[0].idle_ns
    used = utilization(plan, step_ns)
    sums: dict[str, float] = dict(sums_of(uses, plan.costs, plan.layout.num_microbatches))
    if used is not None:
        peak_ns, hardware_ns = (share * step_ns * len(compute) for share in used)
        kernels_ns = sums.pop("work") - hardware_ns
        at_peak = {"peak": peak_ns, "recompute": hardware_ns - peak_ns, "kernels": kernels_ns}
        sums = at_peak | sums
    # Rounded where they end, so that the rounded parts sum to the step as well.
    ends = [round(end / len(compute)) for end in accumulate(sums.values())]
    parts_ns = {
        name: end - start for name, start, end in zip(sums, [0, *ends[:-1]], ends, strict=True)
    }
    mfu, hfu = used or (None, None)
    return Waterfall(parts_ns=parts_ns, mfu=mfu, hfu=hfu)


def sums_of(
    uses: Sequence[StreamUse], costs: Sequence[StageCost], num_microbatches: int
) -> Mapping[str, int]:
    """Return `PARTS_WITHOUT_PEAK` in ns, summed over the pipeline ranks that `uses` tell of.

    `costs` are those of the simulated step, an entry a stage.
    """
    compute = [use for use in uses if use.stream == "compute"]
    exchange_ns = num_microbatches * sum(
        cost.tensor_parallel_forward_ns + cost.tensor_parallel_backward_ns for cost in costs
    )
    work_ns = sum(_busy_ns(use, ("forward", "backward")) for use in compute) - exchange_ns
    return {"work": work_ns, "exchange": exchange_ns, **_lost_ns(compute)}


def _lost_ns(compute: Sequence[StreamUse]) -> dict[str, int]:
    """Return what is spent beside forwards and backwards, summed over the streams."""
    lost = dict.fromkeys(PARTS[4:], 0)
    for use in compute:
        lost["pipeline"] += use.bubble_ns + use.held_ns + use.exposed_ns.get("send", 0)
        waits_ns = sum(use.exposed_ns.get(kind, 0) for kind in REDUCTIONS)
        lost["reduction"] += _busy_ns(use, REDUCTIONS) + waits_ns
        lost["optimizer"] += _busy_ns(use, ("optimizer",))
        lost["host"] += _busy_ns(use, HOST) + use.host_ns + use.straggler_ns
    return lost


def utilization(plan: Plan, step_ns: int) -> Utilization | None:
    """Return MFU and HFU of `plan` at a step of `step_ns`, None where no peak rate is known."""
    pools, dtype = plan.cluster.pools, plan.workload.dtype
    if step_ns <= 0 or not all(pool.gpu.peak_flops_per_s.get(dtype) for pool in pools):
        return None
    setup = Setup(
        model=plan.model,
        workload=plan.workload,
        layout=plan.layout,
        cluster=plan.cluster,
        stack=plan.stack,
    )
    most = step_ns / 1e9 * plan.layout.num_ranks * peak_flops_per_s(setup)
    return Utilization(
        mfu=step_flops(setup, causal=True, recomputed=False) / most,
        hfu=step_flops(setup, causal=True, recomputed=True) / most,
    )


def _busy_ns(use: StreamUse, kinds: Sequence[str]) -> int:
    return sum(ns for kind, ns in use.busy_ns.items() if kind in kinds)
