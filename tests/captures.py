"""Plans of large jobs to capture, with made-up costs."""

from dataclasses import replace

from planner.layout import Layout
from planner.memory import peak_memory
from planner.plan import Plan
from profiles.model import ModelSpec
from profiles.presets import model_preset, stack_preset
from profiles.workload import Workload
from tests.plans import tiny_plan
from tests.setups import nodes_for

NCCL = stack_preset("layline-nccl")


def large_plan(model: ModelSpec, layout: Layout) -> Plan:
    """Return a plan of `layout` on H100 nodes, as the executor would run it there."""
    work = Workload(seq_len=4096, global_batch=layout.global_batch, dtype="bf16")
    plain_plan = tiny_plan(layout, model=model)
    order = plain_plan.parsed_schedule()
    device = replace(plain_plan.profile.device, kind="cuda")
    return tiny_plan(
        layout, model=model, workload=work, stack=NCCL, cluster=nodes_for(layout.num_ranks),
        profile=replace(plain_plan.profile, device=device),
        memory=peak_memory(model, work, layout, order, NCCL, 0),
    )  # fmt: skip


def llama(name: str) -> ModelSpec:
    return model_preset(f"llama-3-{name}")


def cut(model: ModelSpec, num_microbatches: int, dp: int, tp: int, pp: int, v: int = 1) -> Layout:
    """Return a layout with stages of as many layers each."""
    return Layout(
        dp=dp, tp=tp, pp=pp, micro_batch=1, num_microbatches=num_microbatches,
        stage_layers=(model.num_layers // (pp * v),) * (pp * v), stages_per_rank=v,
        schedule="interleaved" if v > 1 else "1f1b",
    )  # fmt: skip
