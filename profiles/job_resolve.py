"""From the tables of a job file to specs: presets looked up, single fields changed."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from profiles.cluster import ClusterSpec, GpuSpec, LinkSpec, Operation, PoolSpec, UplinkSpec
from profiles.errors import InvalidInputError, Problem, UnsupportedError
from profiles.goal import Goal
from profiles.huggingface import read_hf_config
from profiles.job_schema import (
    ClusterTable,
    FabricTable,
    GoalTable,
    GpuTable,
    LinkTable,
    ModelTable,
    PoolTable,
    RopeScalingTable,
    Table,
)
from profiles.machine import local_cluster
from profiles.model import ModelSpec, RopeScaling
from profiles.presets import (
    closest,
    cluster_preset,
    cluster_presets,
    fabric_preset,
    gpu_preset,
    host_preset,
    link_preset,
    model_preset,
)
from profiles.quantity import format_quantity


@dataclass(slots=True)
class Found:
    """The problems found so far in the job file at `path` and in its overrides."""

    path: Path
    problems: list[Problem | str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    overridden: list[str] = field(default_factory=list)

    def where(self, dotted: str) -> str:
        """Return who said `dotted`: the file, or an override."""
        for path in self.overridden:
            if dotted == path or dotted.startswith(f"{path}."):
                return f"--set {dotted}"
        return f"{self.path}: {dotted}"

    def add(self, dotted: str, found: str, rule: str, fix: str) -> None:
        """Note one problem."""
        at = dotted if dotted.startswith("--set") else self.where(dotted)
        self.problems.append(Problem(where=at, found=found, rule=rule, fix=fix))

    @contextmanager
    def collecting(self, dotted: str) -> Iterator[None]:
        """Note the errors raised inside, as being about `dotted`, and go on."""
        try:
            yield
        except InvalidInputError as error:
            for problem in error.problems:
                is_preset = isinstance(problem, Problem) and problem.where.endswith(" preset")
                if is_preset and isinstance(problem, Problem):
                    problem = dataclasses.replace(problem, where=self.where(dotted))
                self.problems.append(problem)
        except UnsupportedError as error:
            self.unsupported.append(str(error))
        except ValueError as error:
            self.problems.append(f"{self.path}: {error}")


Fact = TypeVar("Fact", GpuSpec, LinkSpec)
_REQUIRED_OF_MODEL = ("num_layers", "hidden", "num_heads", "ffn", "vocab", "max_seq_len")


def resolve_model(table: ModelTable, found: Found) -> ModelSpec | None:
    """Return the model of `[model]`, None where `found` got a problem."""
    changes: dict[str, Any] = table.given()
    for key in ("preset", "hf_config"):
        changes.pop(key, None)
    if isinstance(scaling := changes.get("rope_scaling"), RopeScalingTable):
        changes["rope_scaling"] = RopeScaling(**scaling.given())
    if table.preset is not None and table.hf_config is not None:
        found.add("model.hf_config", f'"{table.hf_config[:60]}"',
                  "must be absent where a preset is named", "remove one of the two")  # fmt: skip
        return None
    base: ModelSpec | None = None
    if table.preset is not None:
        with found.collecting("model.preset"):
            base = model_preset(table.preset)
    elif table.hf_config is not None:
        with found.collecting("model.hf_config"):
            base = read_hf_config(found.path.parent / table.hf_config)
    else:
        return _written_model(table, changes, found)
    if base is None or not changes:
        return base
    changes.setdefault("name", f"{base.name}-changed")
    with found.collecting("model"):
        return dataclasses.replace(base, **changes)
    return None


def _written_model(table: ModelTable, changes: dict[str, Any], found: Found) -> ModelSpec | None:
    if not _has_all(table, _REQUIRED_OF_MODEL, "model", "or name a preset or an hf_config", found):
        return None
    changes.setdefault("name", "custom")
    changes.setdefault("num_kv_heads", table.num_heads)
    if "head_size" not in changes:
        if table.hidden % table.num_heads:
            found.add("model.num_heads", str(table.num_heads),
                      f"must divide model.hidden ({table.hidden}) where head_size is missing",
                      "add head_size")  # fmt: skip
            return None
        changes["head_size"] = table.hidden // table.num_heads
    with found.collecting("model"):
        return ModelSpec(**changes)
    return None


def _has_all(table: Table, keys: tuple[str, ...], at: str, else_fix: str, found: Found) -> bool:
    missing = [key for key in keys if not table.has(key)]
    for key in missing:
        found.add(f"{at}.{key}", "missing", "must be given", f"add it, {else_fix}")
    return not missing


_OF_UPLINKS = ("pod_nodes", "oversubscription")
_OF_ANY_CLUSTER = ("price_per_gpu_hour", "power_per_gpu", "pue", "failures")


def _check_form(table: ClusterTable, found: Found) -> None:
    """Check that `[cluster]` has the keys of one form: local, a preset, or pools written out."""
    allowed: tuple[str, ...]
    required: tuple[str, ...] = ()
    if table.preset == "local":
        allowed, required, form = ("preset", "ranks", "device"), ("ranks",), "the preset is local"
    elif table.preset is not None:
        allowed, form = ("preset", "name", "nodes", "fabric"), "a preset is named"
    elif table.has("pools"):
        allowed, form = ("name", "fabric", "pools"), "pools are written out"
    else:
        names = ", ".join(("local", *cluster_presets()))
        found.add("cluster.preset", "missing", "must be given where no pools are written out",
                  f"use one of {names}")  # fmt: skip
        return
    _has_all(table, required, "cluster", "for example ranks = 2", found)
    allowed = (*allowed, *_OF_ANY_CLUSTER)
    for key in table.given():
        if key not in allowed:
            found.add(f"cluster.{key}", "given", f"must be absent where {form}",
                      f"use only {', '.join(allowed)}")  # fmt: skip


def resolve_cluster(table: ClusterTable, found: Found) -> ClusterSpec | None:
    """Return the cluster of `[cluster]`, None where `found` got a problem."""
    operation = _resolve_operation(table, found)
    uplinks = _resolve_uplinks(table.fabric, found)
    cluster = _resolve_machines(table, found)
    if cluster is None:
        return None
    if cluster.inter_node is None:
        uplinks = None
    return dataclasses.replace(cluster, operation=operation, uplinks=uplinks)


def _resolve_operation(table: ClusterTable, found: Found) -> Operation:
    names = {
        "price_per_gpu_hour": "dollars_per_gpu_hour",
        "power_per_gpu": "watts_per_gpu",
        "pue": "pue",
        "per_gpu_day": "interruptions_per_gpu_day",
        "restart": "restart_ns",
        "checkpoint_rate": "checkpoint_bytes_per_s",
        "checkpoint_stall": "checkpoint_stall_ns",
    }
    if table.failures.has("checkpoint_rate") and table.failures.has("checkpoint_stall"):
        found.add("cluster.failures.checkpoint_stall", "given",
                  "must be absent where a checkpoint_rate is given",
                  "keep the stall if training goes on meanwhile, else the rate")  # fmt: skip
    given = table.given() | table.failures.given()
    return Operation(**{names[key]: value for key, value in given.items() if key in names})


def _resolve_machines(table: ClusterTable, found: Found) -> ClusterSpec | None:
    before = len(found.problems)
    _check_form(table, found)
    fabric = _resolve_link(table.fabric, "cluster.fabric", found, is_fabric=True)
    pools = [_resolve_pool(pool, f"cluster.pools.{i}", found) for i, pool in enumerate(table.pools)]
    if table.preset is not None and table.preset != "local":
        return _preset_cluster(table, table.preset, fabric, found)
    if len(found.problems) > before:
        return None
    with found.collecting("cluster"):
        if table.preset == "local":
            return local_cluster(table.ranks, table.device)
        whole = tuple(pool for pool in pools if pool is not None)
        is_one = sum(pool.num_nodes for pool in whole) == 1
        return ClusterSpec(name=table.name, pools=whole, inter_node=None if is_one else fabric)
    return None


def _preset_cluster(
    table: ClusterTable, preset: str, fabric: LinkSpec | None, found: Found
) -> ClusterSpec | None:
    if preset not in cluster_presets():
        names = ("local", *cluster_presets())
        found.add("cluster.preset", f'"{preset[:60]}"', "must be the name of a known cluster",
                  closest(preset[:60], names, "cluster"))  # fmt: skip
        return None
    cluster = cluster_preset(preset, num_nodes=table.nodes)
    is_joined = cluster.inter_node is not None
    return dataclasses.replace(
        cluster,
        name=table.name if table.has("name") else cluster.name,
        inter_node=fabric if is_joined and fabric is not None else cluster.inter_node,
    )


def _resolve_pool(table: PoolTable, at: str, found: Found) -> PoolSpec | None:
    gpu = _resolve_gpu(table.gpu, f"{at}.gpu", found)
    link = _resolve_link(table.intra_node, f"{at}.intra_node", found, is_fabric=False)
    host = None
    if table.host is not None:
        with found.collecting(f"{at}.host"):
            host = host_preset(table.host)
    if gpu is None or link is None:
        return None
    return PoolSpec(
        gpu=gpu, gpus_per_node=table.gpus_per_node, num_nodes=table.nodes, intra_node=link,
        host=host,
    )  # fmt: skip


def _resolve_gpu(table: GpuTable, at: str, found: Found) -> GpuSpec | None:
    names = {
        "memory": "memory_bytes",
        "memory_rate": "memory_bytes_per_s",
        "peak": "peak_flops_per_s",
        "power": "max_power_watts",
    }
    given: dict[str, Any] = table.given()
    if "peak" in given:
        given["peak"] = table.peak.given()
    given.pop("preset", None)
    changes = {names.get(key, key): value for key, value in given.items()}
    if table.preset is None:
        if not _has_all(table, ("name", *names), at, "or name a preset", found):
            return None
        facts = {"source": table.source, "date": table.date}
        return GpuSpec(**(facts | changes))
    with found.collecting(f"{at}.preset"):
        return _changed(gpu_preset(table.preset), changes)
    return None


def _resolve_link(
    table: LinkTable | None, at: str, found: Found, *, is_fabric: bool
) -> LinkSpec | None:
    if table is None:
        return None
    names = {"rate": "bytes_per_s", "latency": "latency_ns"}
    given: dict[str, Any] = table.given()
    given.pop("preset", None)
    pods = set(_OF_UPLINKS) & given.keys()
    if pods and given.keys() <= pods | {"source", "date"}:
        pods = set(given)  # source and date tell of the pods then
    given = {key: value for key, value in given.items() if key not in pods}
    changes = {names.get(key, key): value for key, value in given.items()}
    if table.preset is None:
        if not _has_all(table, tuple(names), at, "or name a preset", found):
            return None
        facts = {"name": at.rpartition(".")[2], "source": table.source, "date": table.date}
        return LinkSpec(**(facts | changes))
    with found.collecting(at):
        base = fabric_preset(table.preset) if is_fabric else link_preset(table.preset)
        return _changed(base, changes)
    return None


def _resolve_uplinks(table: FabricTable | None, found: Found) -> UplinkSpec | None:
    if table is None or not any(table.has(key) for key in _OF_UPLINKS):
        return None
    else_fix = "or leave the other out, for a fabric at full rate"
    if not _has_all(table, _OF_UPLINKS, "cluster.fabric", else_fix, found):
        return None
    return UplinkSpec(
        pod_nodes=table.pod_nodes,
        oversubscription=table.oversubscription,
        source=table.source,
        date=table.date,
    )


def _changed(base: Fact, changes: dict[str, Any]) -> Fact:
    if not changes:
        return base
    changes.setdefault("name", f"{base.name}-changed")
    changes.setdefault("source", f"{base.source}; changed in the job file")
    return dataclasses.replace(base, **changes)


def resolve_goal(table: GoalTable, cluster: ClusterSpec | None, found: Found) -> Goal:
    """Return the goal of `[goal]`; notes what it needs that the cluster does not say or have."""
    limits = {name: float(limit) for name, limit in table.limits.given().items()}
    if "step_time" in limits:
        limits["step_time"] /= 1e9
    goal = Goal(objectives=table.optimize, limits=limits)
    if cluster is not None:
        _check_goal(goal, cluster, found)
    return goal


def _check_goal(goal: Goal, cluster: ClusterSpec, found: Found) -> None:
    asked, operation = goal.asks_for, cluster.operation
    if "dollars_per_mtoken" in asked and operation.dollars_per_gpu_hour is None:
        found.add("cluster.price_per_gpu_hour", "missing",
                  "must be given where the goal has dollars_per_mtoken",
                  "add what a GPU costs an hour in $, for example 2.5")  # fmt: skip
    is_rated = all(pool.gpu.max_power_watts for pool in cluster.pools)
    if "joules_per_token" in asked and operation.watts_per_gpu is None and not is_rated:
        found.add("cluster.power_per_gpu", "missing",
                  "must be given where the goal has joules_per_token and a GPU's power is unknown",
                  'add what a GPU and its share of a node draw, for example "970 W"')  # fmt: skip
    smallest = min((pool.gpu for pool in cluster.pools), key=lambda gpu: gpu.memory_bytes)
    headroom = goal.limits.get("memory_headroom", 0.0)
    if headroom >= smallest.memory_bytes:
        memory = format_quantity(smallest.memory_bytes, "bytes")
        found.add("goal.limits.memory_headroom", f'"{format_quantity(headroom, "bytes")}"',
                  f"must be below the memory of {smallest.name} ({memory}); else nothing fits",
                  "lower it, or choose a GPU with more memory")  # fmt: skip
