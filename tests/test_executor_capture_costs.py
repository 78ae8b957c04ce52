"""The cost and memory models against captures of LLaMA-3 8B and 70B on 8 to 1,024 ranks."""

import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import cast

import pytest
import torch

from executor.capture import Capture, capture
from planner.buckets import bucket_counts
from planner.cost import CostModel
from planner.kernels import (
    Kernel,
    StageShape,
    first_stage,
    last_stage,
    layer_backward,
    layer_forward,
    stage_parameters,
)
from planner.plan import Plan, StageCost
from planner.witness import Witness
from profiles.lookup import CostTable
from profiles.profile import Cost
from tests.captures import cut, large_plan, llama


@dataclass(frozen=True, slots=True)
class Bytes:
    """A table in which a collective takes a nanosecond a byte, or one a call, and all else none."""

    is_counted: bool
    profile: object = None

    def kernel(self, *_: object) -> Cost:
        return self.collective("", 0, 0)

    def host(self, _: str) -> int:
        return 0

    def collective(self, _kind: str, _group_size: int, size_bytes: int, *_: object) -> Cost:
        ns = int(size_bytes > 0) if self.is_counted else size_bytes
        return Cost(p10_ns=ns, p50_ns=ns, p90_ns=ns)


def stage_costs(plan: Plan, is_counted: bool) -> tuple[StageCost, ...]:
    model = CostModel(
        model=plan.model, workload=plan.workload, stack=plan.stack, witness=Witness(),
        table=cast(CostTable, Bytes(is_counted)),
    )  # fmt: skip
    return model.stages(plan.layout)


def expected_ops(plan: Plan, found: Capture) -> Counter[tuple[str, object]]:
    """Return the ops of a step as the cost model has them, in the words of a capture."""
    layout = plan.layout
    shape = StageShape(
        model=plan.model, tp=layout.tp, micro_batch=layout.micro_batch,
        seq_len=plan.workload.seq_len,
    )  # fmt: skip
    kernels: list[Kernel] = []
    for stage in found.stages:
        kernels += layout.stage_layers[stage] * (layer_forward(shape) + layer_backward(shape))
        for is_here, edge in (
            (stage == 0, first_stage(shape)), (stage == layout.num_stages - 1, last_stage(shape))
        ):  # fmt: skip
            kernels += [kernel for half in edge if is_here for kernel in half]
    counts: Counter[tuple[str, object]] = Counter()
    for kernel in kernels:
        counts[in_words_of_a_capture(kernel)] += layout.num_microbatches
    held = sum(stage_parameters(shape, layout.stage_layers, stage) for stage in found.stages)
    counts["adamw", (held,)] += 1
    return counts


def in_words_of_a_capture(kernel: Kernel) -> tuple[str, object]:
    if not kernel.op.startswith("linear"):
        return kernel.op, kernel.shape
    m, n, k = kernel.shape
    left, right = {
        "linear_forward": ((m, k), (k, n)),
        "linear_dgrad": ((m, n), (n, k)),
        "linear_wgrad": ((n, m), (m, k)),
    }[kernel.op]
    return "mm", (left, right)


def captured_ops(plan: Plan, found: Capture) -> Counter[tuple[str, object]]:
    """Return the ops of a step as they were captured, in the words of the cost model."""
    batch, seq_len = plan.layout.micro_batch, plan.workload.seq_len
    hidden = (batch, seq_len, plan.model.hidden)
    counts: Counter[tuple[str, object]] = Counter()
    rope: Counter[str] = Counter()
    for (phase, op), count in found.op_counts().items():
        first = op.shapes[0]
        size = torch.Size(first).numel()
        if op.name in ("mm", "addmm_"):
            counts["mm", op.shapes[-2:]] += count
        elif op.name.startswith("_fused_rms_norm"):
            counts[f"norm_{phase}", (batch * seq_len, first[-1])] += count
        elif op.name.startswith("_scaled_dot_product"):
            queries, keys = op.shapes[0], op.shapes[-1 if phase == "forward" else 2]
            counts[f"attention_{phase}", (*queries[:2], keys[1], *queries[2:])] += count
        elif op.name == "cat":
            rope[phase] += count * sum(torch.Size(shape).numel() for shape in op.shapes)
        elif op.name in ("silu", "silu_backward"):
            counts[f"swiglu_{phase}", (size,)] += count
        elif op.name == "add" and first == hidden:
            counts[f"add_{phase}", (size,)] += count
        elif op.name == "embedding":
            counts["embedding_forward", (batch * seq_len, first[1], first[0])] += count
        elif op.name == "embedding_dense_backward":
            vocab = plan.model.vocab // plan.layout.tp
            counts["embedding_backward", (batch * seq_len, first[2], vocab)] += count
        elif op.name in ("_log_softmax", "log", "_log_softmax_backward_data") or (
            op.name == "where" and phase == "backward" and len(op.shapes[1]) == 0
        ):
            vocab = plan.model.vocab // plan.layout.tp
            counts[f"cross_entropy_{phase}", (batch * seq_len, vocab)] += count
        elif op.name == "_fused_adamw_":
            counts["adamw", (sum(torch.Size(shape).numel() for shape in op.shapes),)] += count
    for direction, elements in rope.items():
        layers = sum(plan.layout.stage_layers[stage] for stage in found.stages)
        count = layers * found.num_microbatches
        counts[f"rope_{direction}", (elements // count,)] += count
    return counts


def check_against_cost_model(plan: Plan, rank: int) -> Capture:
    """Compare ops and collectives exactly, and the states, and the whole peak within 3 %."""
    found = capture(plan, rank)
    assert captured_ops(plan, found) == expected_ops(plan, found)
    check_collectives(plan, found)
    estimate, peak = plan.memory[found.place.pp], found.peak
    assert peak.parameters == estimate.parameters
    assert peak.gradients == estimate.gradients
    assert peak.optimizer == pytest.approx(estimate.optimizer, rel=1e-6)  # and a count a tensor
    assert peak.total == pytest.approx(estimate.allocated, rel=0.03)
    return found


def check_collectives(plan: Plan, found: Capture) -> None:
    """Compare the bytes and the number of collectives of every kind."""
    bytes_of, calls_of = (stage_costs(plan, is_counted) for is_counted in (False, True))
    total, calls = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for (phase, one), count in found.collective_counts().items():
        assert one.axis == "all" or one.group_size == getattr(plan.layout, one.axis)
        if phase == "other":  # the loss of a step, which is for the log
            continue
        key = (one.kind, "" if one.axis != "tp" else phase, one.axis)
        total[key] += count * one.size_bytes
        calls[key] += count
    many, homes = found.num_microbatches, plan.parsed_schedule().homes

    def is_sent(stage: int, other: int) -> bool:
        return 0 <= other < len(homes) and homes[stage] != homes[other]

    for costs, of in ((bytes_of, total), (calls_of, calls)):
        mine = [costs[stage] for stage in found.stages]
        assert of["all_reduce", "forward", "tp"] == many * sum(
            cost.tensor_parallel_forward_ns for cost in mine
        )
        assert of["all_reduce", "backward", "tp"] == many * sum(
            cost.tensor_parallel_backward_ns for cost in mine
        )
        assert of["send", "", "pp"] == many * sum(
            costs[stage].send_forward.p50_ns * is_sent(stage, stage + 1)
            + costs[stage].send_backward.p50_ns * is_sent(stage, stage - 1)
            for stage in found.stages
        )
        assert of["recv", "", "pp"] == many * sum(
            costs[stage - 1].send_forward.p50_ns * is_sent(stage, stage - 1)
            + (costs[stage + 1].send_backward.p50_ns if is_sent(stage, stage + 1) else 0)
            for stage in found.stages
        )
        assert of["all_reduce", "", "dp"] == sum(cost.all_reduce.p50_ns for cost in mine)
    assert buckets_of(found) == modelled_buckets(plan, found)


def buckets_of(found: Capture) -> Counter[int]:
    """Return the sizes of the gradients' all-reduces."""
    sizes = Counter[int]()
    for (phase, one), count in found.collective_counts().items():
        if phase != "other" and one.axis == "dp":
            sizes[one.size_bytes] += count
    return sizes


def modelled_buckets(plan: Plan, found: Capture) -> Counter[int]:
    """Return the sizes of the buckets that the cost model has."""
    layout = plan.layout
    shape = StageShape(
        model=plan.model, tp=layout.tp, micro_batch=layout.micro_batch,
        seq_len=plan.workload.seq_len,
    )  # fmt: skip
    sizes = Counter[int]()
    for stage in found.stages if layout.dp > 1 else ():
        sizes.update(dict(bucket_counts(
            shape, layout.stage_layers[stage], is_first=stage == 0,
            is_last=stage == layout.num_stages - 1, element_bytes=2,
            closing_bytes=plan.stack.gradient_bucket_bytes,
        )))  # fmt: skip
    return sizes


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_the_cost_model_has_the_ops_of_a_small_model(rank: int) -> None:
    model = replace(llama("8b"), num_layers=8)
    found = check_against_cost_model(large_plan(model, cut(model, 4, dp=2, tp=2, pp=2)), rank)
    assert found.num_traced == 3


LARGE = [  # micro-batches, dp, tp, pp and stages a rank; the rank
    ("8b", (4, 8, 1, 1), 5),
    ("8b", (16, 64, 2, 4, 2), 511),
    ("8b", (8, 256, 4, 1), 0),
    ("70b", (2, 1, 8, 1), 0),
    ("70b", (64, 16, 8, 8), 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes", "rank"), LARGE, ids=str)
def test_the_cost_model_has_the_ops_of_a_large_job(
    name: str, sizes: tuple[int, ...], rank: int
) -> None:
    start_ns = time.perf_counter_ns()
    model = llama(name)
    check_against_cost_model(large_plan(model, cut(model, *sizes)), rank)
    assert time.perf_counter_ns() - start_ns < 120e9
