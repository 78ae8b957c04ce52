"""The field's rule of thumb, and what each difference between it and the choice is worth.

The rule. Tensor parallelism grows first, inside a node only, and no further than memory needs; then
come pipeline stages; all other ranks are replicas (Narayanan et al., arXiv:2104.04473, takeaways 1
and 2 of section 3; Megatron Core, "Parallelism Strategies Guide", docs.nvidia.com). Norms are
sharded over the tensor-parallel ranks too (sequence parallelism, arXiv:2205.05198), replicas share
the optimizer's state (zero1), and pipelines are interleaved with as many stages a rank as the
layers divide into. Micro-batches are of one sequence. Context parallelism is for sequences of more
than 8,192 tokens (the guide again), as far as it leaves a rank no more; recomputation comes where
nothing fits without it; experts lie on ranks of one node.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from planner.account import Account, account_of, dealt, traits
from planner.evaluate import Costs, basis_of
from planner.layout import Layout
from planner.orders import MAX_CELLS, order_of
from planner.partition import stages_by_rule
from planner.pools import misfit
from profiles.errors import UnsupportedError
from profiles.job import Job
from profiles.model import ModelSpec
from profiles.stack import Partition, Recompute
from simulator.schedule import Schedule

LONG_TOKENS = 8192
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One step on the way from the rule's layout to the chosen one.

    `axes` are those that change, in words; `saves_ns` is what the step gets shorter by, negative
    where it gets longer, and `fits` says whether memory holds the layout behind it.
    """

    axes: tuple[str, ...]
    text: str
    layout: str
    saves_ns: int
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ThumbRule:
    """The layout that the rule of thumb would take, and how the choice differs from it.

    `changes` lead from it to the chosen layout one by one; what they save sums to the difference of
    the two. What a change is worth depends on those before it.
    """

    account: Account
    changes: tuple[Change, ...]


def rule_of_thumb(job: Job, costs: Costs) -> Layout:
    """Return the layout that the rule of thumb takes for `job`: the first that fits.

    Raises UnsupportedError where the model cannot be cut over the ranks by the rule at all. Where
    no layout of the rule fits, it is the one that comes nearest.
    """
    basis = basis_of(job, costs)
    least: tuple[int, Layout] | None = None
    for layout in _by_the_rule(job, costs):
        if misfit(basis.pools, layout.replicas * layout.tp, layout.order):
            continue
        peak_bytes = basis.peak_bytes(basis.memory(layout, order_of(layout).sample()))
        if peak_bytes <= basis.limit_bytes:
            return layout
        if least is None or peak_bytes < least[0]:
            least = peak_bytes, layout
    if least is None:
        raise UnsupportedError(
            f"the rule of thumb has no layout of {job.cluster.num_ranks} ranks for "
            f"{job.model.name} and {job.workload.global_batch} sequences a step"
        )
    return least[1]


def _by_the_rule(job: Job, costs: Costs) -> Iterator[Layout]:
    """Yield the layouts of the rule, those first that it would rather take."""
    ranks, model = job.cluster.num_ranks, job.model
    node = min(pool.gpus_per_node for pool in job.cluster.pools)
    heads = math.gcd(model.num_kv_heads, model.num_heads, model.ffn)
    if costs.is_of_executor:
        heads = math.gcd(heads, model.vocab)
    tensors = [n for n in range(1, min(node, ranks) + 1) if heads % n == 0 and ranks % n == 0]
    stages = [n for n in range(1, min(model.num_layers, ranks) + 1) if ranks % n == 0]
    contexts = [1]
    recomputes = RECOMPUTES
    if costs.is_of_executor:
        recomputes = RECOMPUTES[:1]
        if model.tied_embeddings:
            tensors, stages = [1], [1]
    else:
        contexts = _contexts(job)
    for recompute, cp, pp, tp in product(recomputes, contexts, stages, tensors):
        dp, rest = divmod(ranks, tp * pp * cp)
        if rest or job.workload.global_batch % dp:
            continue
        start = Layout(
            dp=dp, tp=tp, pp=pp, cp=cp, micro_batch=1, stage_layers=(0,) * pp,
            num_microbatches=job.workload.global_batch // dp,
        )  # fmt: skip
        if not costs.is_of_executor:
            start = replace(
                start,
                ep=_experts(model, start, node),
                sharding="zero1" if start.replicas > 1 else "none",
                sequence_parallel=tp > 1,
                recompute=recompute,
            )
        if (layout := _in_stages(start, model)) is not None:
            yield layout


def _contexts(job: Job) -> list[int]:
    """Return how many ranks may share a sequence: powers of two, each of which takes 2 chunks."""
    least = -(-job.workload.seq_len // LONG_TOKENS)
    powers = (2**power for power in range(job.cluster.num_ranks.bit_length()))
    able = [n for n in powers if n == 1 or job.workload.seq_len % (2 * n) == 0]
    return [n for n in able if n >= least] or able[-1:]


def _experts(model: ModelSpec, layout: Layout, node: int) -> int:
    """Return over how many ranks of a node the experts are cut."""
    together, within = math.gcd(model.num_experts, layout.replicas), max(1, node // layout.tp)
    if not model.num_experts:
        return 1
    return max(n for n in range(1, within + 1) if together % n == 0)


def _in_stages(layout: Layout, model: ModelSpec) -> Layout | None:
    """Return `layout` in as many stages a rank as its layers divide into, or None if none fits.

    Where the ranks do not divide the layers, embedding and head count as one layer each. The
    interleaved order asks for micro-batches in groups of the ranks.
    """
    pp, m = layout.pp, layout.num_microbatches
    rule: Partition = (
        "slots" if model.num_layers % pp and (model.num_layers + 2) % pp == 0 else "even"
    )
    chunks = [1]
    if pp > 1 and m % pp == 0:
        slots = model.num_layers + (2 if rule == "slots" else 0)
        chunks = [n for n in range(slots // pp, 0, -1) if slots % (pp * n) == 0] or [1]
    for count in chunks:
        layers = stages_by_rule(model, pp * count, rule)
        if min(layers) >= 0 and pp * count * m <= MAX_CELLS:
            return replace(
                layout,
                stages_per_rank=count,
                stage_layers=layers,
                schedule="interleaved" if count > 1 else "1f1b",
            )
    return None


_STEPS: tuple[tuple[str, ...], ...] = (
    ("tp", "sequence_parallel"), ("pp",), ("cp",), ("ep",), ("sharding", "shard_group"),
    ("recompute",), ("micro_batch",), ("order",),
)  # fmt: skip
"""The axes in the order in which the way to the choice takes them; schedule and stages are last."""


def thumb_rule(
    job: Job, costs: Costs, chosen: Layout, schedule: Schedule | None = None
) -> ThumbRule:
    """Return how `chosen` differs from the rule of thumb, change by change.

    `schedule` is the order of `chosen` where that has no name. A change that no layout can make
    alone, as one of degrees that then do not multiply to the ranks, is made with the next one.
    """
    start = account_of(job, costs, rule_of_thumb(job, costs))
    end = account_of(job, costs, chosen, schedule)
    changes, before = list[Change](), start
    for place in range(1, len(_STEPS) + 1):
        mixed = _mixed(start.layout, chosen, _STEPS[:place], job, costs)
        if mixed is not None and mixed != before.layout:
            after = account_of(job, costs, mixed)
            changes.append(_change(before, after))
            before = after
    if before.layout != chosen:
        changes.append(_change(before, end))
    return ThumbRule(account=start, changes=tuple(changes))


def _mixed(
    rule: Layout, chosen: Layout, steps: Sequence[Sequence[str]], job: Job, costs: Costs
) -> Layout | None:
    """Return `rule` with the axes of `steps` as `chosen` has them, or None if there is no such."""
    axes = [axis for step in steps for axis in step]
    values = {axis: getattr(chosen, axis) for axis in axes}
    if all(getattr(rule, axis) == value for axis, value in values.items()):
        return rule
    shape = {n: values.get(n, getattr(rule, n)) for n in ("tp", "pp", "cp", "ep", "micro_batch")}
    dp, rest = divmod(job.cluster.num_ranks, shape["tp"] * shape["pp"] * shape["cp"])
    share, over = divmod(job.workload.global_batch, dp * shape["micro_batch"]) if dp else (0, 1)
    if rest or over or (dp * shape["cp"]) % shape["ep"]:
        return None
    group = values.get("shard_group", rule.shard_group)
    if group and (dp * shape["cp"]) % group:
        return None
    pp, pools = shape["pp"], basis_of(job, costs).pools
    if misfit(pools, dp * shape["cp"] * shape["tp"], values.get("order", rule.order)):
        return None
    count = min(rule.stages_per_rank, job.model.num_layers // pp) if pp > 1 else 1
    layout = replace(
        rule,
        **{**values, **shape},
        dp=dp,
        num_microbatches=share,
        schedule="interleaved" if count > 1 else "1f1b",
        stages_per_rank=count,
        stage_layers=(0,) * (pp * count),
        recompute_layers=(),
    )
    return dealt(layout, job.model.num_layers, costs)


def _change(before: Account, after: Account) -> Change:
    old, new = traits(before.layout), traits(after.layout)
    axes = tuple(name for name in old if old[name] != new[name])
    told = [f"{name} {old[name]} -> {new[name]}" for name in axes]
    return Change(
        axes=axes or ("stages",),
        text=", ".join(told) or "the split into stages",
        layout=after.text,
        saves_ns=before.step.p50_ns - after.step.p50_ns,
        fits=after.fits,
    )
