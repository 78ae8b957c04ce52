"""What a published run measured, as the time of one step, whatever unit its source chose."""

import math
import re
from typing import NamedTuple

from planner.flops import peak_flops_per_s, step_flops
from planner.published.words import shown
from planner.setup import Setup
from profiles.errors import UnsupportedError

_TIME_UNITS = {"s": 1e9, "sec": 1e9, "seconds": 1e9, "ms": 1e6, "us": 1e3, "min": 60e9}
_KNOWN = "step_time_s, tokens_per_s_per_gpu, samples_per_s, *_tflops_per_gpu, mfu_percent and oom"
_LONGEST_STEP_NS, _SHORTEST_STEP_NS = 10**16, 10**3


class Measured(NamedTuple):
    """A measured value in its own unit, and the step it means: 0 ns where nothing was timed."""

    value: float
    unit: str
    step_ns: int = 0
    is_rate: bool = False
    ran_out_of_memory: bool = False

    def in_unit(self, step_ns: int) -> float:
        """Return a step in the unit of the measured value.

        >>> Measured(200.0, "tokens/s", 1000, is_rate=True).in_unit(2000)
        100.0
        """
        return self.value * (
            self.step_ns / step_ns if self.is_rate and step_ns else step_ns / self.step_ns
        )


def read_metric(metric: str, text: str, unit: str, setup: Setup) -> Measured:
    """Return what was measured of `setup`; raises UnsupportedError for a metric not known.

    Flops are counted as `planner.flops` says, with all of the attention: hardware flops (`hw` in
    the name) with what is recomputed, model flops without. MFU and HFU are of the dense peak of the
    dtype of the run.
    """
    name = f"{metric} {unit}".lower()
    if metric.lower() == "oom":
        ran_out = _number(text, allow_zero=True) != 0
        return Measured(float(ran_out), unit or "bool", ran_out_of_memory=ran_out)
    value = _number(text)
    if re.search(r"time|(sec\w*|ms|\bs)(/|_per_)(step|it)", name):
        return _measured(value, unit or "s", value * _time_unit(metric, unit), is_rate=False)
    step_seconds = _seconds_of_rate(name, value, setup)
    return _measured(value, unit or metric, step_seconds * 1e9, is_rate=True)


def _seconds_of_rate(name: str, value: float, setup: Setup) -> float:
    """Return the step time that a rate means, in seconds."""
    gpus = setup.layout.num_ranks
    each = gpus if re.search(r"gpu|device|chip|accelerator", name) else 1
    if "token" in name:
        scale = 1e3 if re.search(r"\bktok", name) else 1.0
        return setup.workload.tokens_per_step / (value * scale * each)
    if re.search(r"sample|sequence|\bseqs?\b", name):
        return setup.workload.global_batch / (value * each)
    is_hardware = bool(re.search(r"hw|hardware|hfu", name))
    flops = step_flops(setup, causal=False, recomputed=is_hardware)
    if "tflop" in name:
        return flops / (value * 1e12 * gpus)
    if re.search(r"mfu|hfu|utili", name):
        share = value / 100 if value > 1 or re.search(r"%|percent", name) else value
        if share > 1:
            raise UnsupportedError(f"value is {value:g} of the peak; it must be at most all of it")
        return flops / (share * peak_flops_per_s(setup) * gpus)
    raise UnsupportedError(f"metric is {shown(name.strip())}; known are {_KNOWN}")


def _measured(value: float, unit: str, step_ns: float, *, is_rate: bool) -> Measured:
    if not _SHORTEST_STEP_NS <= step_ns <= _LONGEST_STEP_NS:
        raise UnsupportedError(f"value is {value:g} {unit}, a step of {step_ns / 1e9:.3g} s")
    return Measured(value, unit, round(step_ns), is_rate)


def _time_unit(metric: str, unit: str) -> float:
    """Return the ns of the unit of a time: as stated, else as the metric's name ends."""
    stated = unit.lower() or metric.lower().rpartition("_")[2]
    return _TIME_UNITS.get(stated.partition("/")[0].strip(), 1e9)


def _number(text: str, *, allow_zero: bool = False) -> float:
    try:
        value = float({"true": "1", "false": "0"}.get(text.lower(), text))
    except ValueError:
        raise UnsupportedError(f"value is {shown(text)}; it must be a number") from None
    if not math.isfinite(value) or value < 0 or (value == 0 and not allow_zero):
        raise UnsupportedError(f"value is {shown(text)}; it must be above 0")
    return value
