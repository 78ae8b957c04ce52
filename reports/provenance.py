"""The sections that make a report repeatable: what went into it, and the commands to redo it."""

import shlex
from collections.abc import Mapping

from planner.facts import facts_of
from planner.objectives import told
from planner.plan import Plan
from profiles.cluster import ClusterSpec, LinkSpec, Operation
from profiles.goal import BEST_IS_HIGH
from profiles.quantity import format_quantity
from reports.certificate import OBJECTIVE_WORDS
from reports.document import Block, Commands, Section, Table, Text
from reports.views import RunView, Study
from reports.words import count, duration, joined, origin_text, size


def made_of(study: Study, prefix: str) -> Section:
    """Return the section that lists every input with its origin."""
    plan = study.best.plan
    work = plan.workload
    tokens = f", {format_quantity(work.tokens, 'tokens')} in all" if work.tokens else ""
    rows = [
        ("model", _model(plan)),
        (
            "workload",
            f"{count(work.global_batch)} sequences of {count(work.seq_len)} tokens a step{tokens}; "
            f"{work.dtype}; {work.optimizer}, learning rate {work.learning_rate:g}",
        ),
        *(("cluster", line) for line in _cluster(plan.cluster)),
        *_operation(plan.cluster.operation),
        ("goal", _goal(plan)),
        *(("note", note) for note in facts_of(plan).assumptions),
        (
            "stack",
            f"{plan.stack.name}; {_origin(plan.stack.source, plan.stack.date)}",
        ),
        *_costs(plan),
    ]
    blocks: list[Block] = [Table(head=("", ""), align="nl", rows=tuple(rows))]
    details = []
    for view in study.views:
        layout, digest = view.plan.layout, view.plan.plan_digest[:12]
        if isinstance(view, RunView):
            record = view.record
            details.append(
                (
                    str(layout),
                    digest,
                    f"{view.path}, started {record.started_at}; {_versions(record.versions)}; data "
                    f"{record.data}, SHA-256 {record.data_digest[:12]}",
                )
            )
        else:
            details.append((str(layout), digest, "not run"))
    head = ("layout", "plan digest", "run")
    blocks.append(Table(head=head, align="nnl", rows=tuple(details)))
    return Section(question="What is it made of?", anchor=f"{prefix}made", blocks=tuple(blocks))


def _costs(plan: Plan) -> list[tuple[str, str]]:
    """Return where the costs come from: a measured profile, or published measurements."""
    profile, device = plan.profile, plan.profile.device
    digest = f"SHA-256 {profile.digest[:12]}"
    if profile.is_reference:
        return [("costs", f"{device.name}, {origin_text(plan)}; {digest}")]
    backend = f", {device.backend}" if device.backend else ""
    return [
        (
            "profile",
            f"{device.name}, {count(device.num_ranks)} ranks{backend}, measured "
            f"{profile.measured_at}; {profile.path or 'not in a file'}; {digest}",
        ),
        ("profiled with", _versions(profile.versions)),
    ]


def _model(plan: Plan) -> str:
    model = plan.model
    heads = f"{model.num_heads} heads of {model.head_size}, {model.num_kv_heads} kv heads"
    return (
        f"{model.name}: {model.num_parameters / 1e6:,.1f} M parameters; {model.num_layers} layers, "
        f"hidden {count(model.hidden)}, {heads}, ffn {count(model.ffn)}, "
        f"vocabulary {count(model.vocab)}"
    )


def _cluster(cluster: ClusterSpec) -> list[str]:
    lines = []
    for pool in cluster.pools:
        nodes = f"{count(pool.num_nodes)} node{'s' if pool.num_nodes > 1 else ''}"
        lines.append(
            f"{cluster.name}: {nodes} of {pool.gpus_per_node} x {pool.gpu.name}, "
            f"{size(pool.gpu.memory_bytes)} a rank ({_origin(pool.gpu.source, pool.gpu.date)}); "
            f"inside a node {_link(pool.intra_node)}"
        )
    if (link := cluster.inter_node) is not None:
        lines.append(f"between nodes {_link(link)}")
    if (uplinks := cluster.uplinks) is not None:
        lines.append(
            f"over pods of {count(uplinks.pod_nodes)} nodes at full rate, uplinks of 1 / "
            f"{uplinks.oversubscription:g} of their NICs ({_origin(uplinks.source, uplinks.date)})"
        )
    return lines


def _operation(operation: Operation) -> list[tuple[str, str]]:
    """Return what the job file says of money, power and failures; it is its own source."""
    rows = []
    if operation.dollars_per_gpu_hour is not None:
        rows.append(("price", f"${operation.dollars_per_gpu_hour:,.4g} a GPU-hour"))
    if operation.watts_per_gpu is not None:
        watts = format_quantity(operation.watts_per_gpu, "watts")
        rows.append(("power", f"{watts} a GPU with its share of the node"))
    if operation.pue is not None:
        rows.append(("power", f"PUE {operation.pue:g}"))
    if operation.interruptions_per_gpu_day is not None:
        rate = operation.interruptions_per_gpu_day
        rows.append(("failures", f"{rate:.3g} interruptions per GPU-day"))
    if operation.restart_ns is not None:
        rows.append(("failures", f"{duration(operation.restart_ns)} to restart"))
    if operation.checkpoint_bytes_per_s is not None:
        rate_text = format_quantity(operation.checkpoint_bytes_per_s, "bytes/s")
        rows.append(("checkpoints", f"written at {rate_text}, all ranks together"))
    if operation.checkpoint_stall_ns is not None:
        stall = duration(operation.checkpoint_stall_ns)
        rows.append(("checkpoints", f"stop the job for {stall} each"))
    return [(name, f"{text} (source: the job file)") for name, text in rows]


def _goal(plan: Plan) -> str:
    """Return what the search was to make best, within which limits."""
    goal = plan.goal
    limits = [
        f"{OBJECTIVE_WORDS[name]} {'at least' if name in BEST_IS_HIGH else 'at most'} "
        f"{told(name, goal.limits[name])}"
        for name in goal.asks_for
        if name in goal.limits
    ]
    best = f"{'best' if len(goal.objectives) == 1 else 'the front of'} " + joined(
        [OBJECTIVE_WORDS[name] for name in goal.objectives]
    )
    return "; ".join([best, *limits])


def _link(link: LinkSpec) -> str:
    if link.bytes_per_s <= 0:
        # A local cluster has no data sheet: the profile's collectives stand for its links.
        return "as measured in the profile"
    rate = format_quantity(link.bytes_per_s, "bytes/s")
    return f"{rate}, {duration(link.latency_ns)} ({_origin(link.source, link.date)})"


def _origin(source: str, date: str) -> str:
    return f"source: {source}, {date}" if date else f"source: {source}"


def _versions(versions: Mapping[str, str]) -> str:
    return joined([f"{name} {versions[name]}" for name in sorted(versions)]) or "versions unknown"


def reproduce(study: Study, prefix: str) -> Section:
    """Return the section with the commands that repeat each run, or run each plan."""
    blocks: list[Block] = []
    lines: list[str] = []
    for view in study.views:
        path = shlex.quote(view.path)
        if isinstance(view, RunView):
            again = shlex.quote(f"{view.path.rstrip('/')}-again")
            plan_path = shlex.quote(f"{view.path.rstrip('/')}/plan.json")
            num_steps = len(view.record.steps)
            lines += [
                f"layline simulate {plan_path}",
                f"layline run {plan_path} --steps {num_steps} -o {again}",
                f"layline compare {again}",
                f"layline report {again} -o report.html",
            ]
        elif view.plan.cluster.is_local:
            lines += [
                f"layline simulate {path}",
                f"layline run {path} -o run",
                "layline compare run",
                "layline report run -o report.html",
            ]
        else:
            lines += [f"layline simulate {path}", f"layline report {path} -o report.html"]
    text = (
        f"The plan file holds everything: inputs, layout, schedule, costs and the seed "
        f"({study.best.plan.seed}). No command takes one that was edited."
    )
    blocks += [Text(text=text), Commands(lines=tuple(lines))]
    return Section(
        question="How can it be repeated?", anchor=f"{prefix}repeat", blocks=tuple(blocks)
    )
