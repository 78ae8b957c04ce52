"""Presets: models, clusters, fabrics and stacks by name, from the data files of this package."""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from profiles.cluster import ClusterSpec, GpuSpec, HostSpec, LinkSpec, PoolSpec
from profiles.errors import InvalidInputError, Problem
from profiles.model import ModelSpec, RopeScaling
from profiles.quantity import parse_quantity
from profiles.stack import USUAL_SCALARS, Scalar, StackSpec


@cache
def _tables(file: str) -> Mapping[str, Any]:
    data = resources.files("profiles").joinpath("data", file).read_text(encoding="utf-8")
    return tomllib.loads(data)


def model_presets() -> tuple[str, ...]:
    """Return the names of all model presets, smallest model first within a family.

    >>> "llama-2-7b" in model_presets()
    True
    """
    return tuple(_tables("models.toml"))


def cluster_presets() -> tuple[str, ...]:
    """Return the names of all node presets; each can be taken any number of times.

    >>> "h100-sxm" in cluster_presets()
    True
    """
    return tuple(_tables("clusters.toml")["nodes"])


def gpu_presets() -> tuple[str, ...]:
    """Return the names of all accelerators.

    >>> "h100-sxm" in gpu_presets()
    True
    """
    return tuple(_tables("clusters.toml")["gpus"])


def fabric_presets() -> tuple[str, ...]:
    """Return the names of all fabrics that can join nodes.

    >>> "ndr400" in fabric_presets()
    True
    """
    return tuple(_tables("clusters.toml")["fabrics"])


def host_presets() -> tuple[str, ...]:
    """Return the names of all hosts that a node can have.

    >>> "dgx-h100" in host_presets()
    True
    """
    return tuple(_tables("clusters.toml")["hosts"])


def stack_presets() -> tuple[str, ...]:
    """Return the names of all software stacks.

    >>> "torchtitan" in stack_presets()
    True
    """
    return tuple(_tables("stacks.toml"))


def closest(name: str, known: Iterable[str], what: str) -> str:
    """Return a way out for an unknown `name`: the nearest known ones, or all that there are.

    >>> closest("llama-3-8", ["llama-3-8b", "gpt-3-175b"], "model")
    'did you mean "llama-3-8b"? known: llama-3-8b, gpt-3-175b'
    """
    names = list(known)
    meant = {known_name.replace("_", "-"): known_name for known_name in names}
    text = name.lower().replace("_", "-")
    parts = [whole for whole in meant if len(text) > 2 and text in whole]
    alike = difflib.get_close_matches(text, list(meant), n=3, cutoff=0.7)
    near = [meant[whole] for whole in dict.fromkeys([*parts, *alike])][:3]
    every = ", ".join(names)
    if not near:
        return f"use a known {what}: {every}"
    return f"did you mean {' or '.join(f'{match!r}' for match in near)}? known: {every}".replace(
        "'", '"'
    )


def _find(tables: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in tables:
        raise InvalidInputError(
            [
                Problem(
                    where=f"{what} preset",
                    found=f'"{name[:60]}"',
                    rule=f"must be the name of a known {what}",
                    fix=closest(name[:60], tables, what),
                )
            ]
        )
    return tables[name]


def model_preset(name: str) -> ModelSpec:
    """Return the published model shape called `name`.

    Raises InvalidInputError for an unknown name, with the nearest known ones.

    >>> model_preset("llama-3-8b").num_parameters
    8030261248
    """
    table = dict(_find(_tables("models.toml"), name, "model"))
    for fact in ("published_parameters", "source", "date"):
        del table[fact]
    if "rope_scaling" in table:
        table["rope_scaling"] = RopeScaling(**table["rope_scaling"])
    return ModelSpec(name=name, **table)


def published_parameters(name: str) -> int:
    """Return the parameter count that the source of model preset `name` prints.

    >>> published_parameters("llama-3-8b")
    8030261248
    """
    return int(_find(_tables("models.toml"), name, "model")["published_parameters"])


def gpu_preset(name: str) -> GpuSpec:
    """Return the accelerator called `name`, with dense peaks.

    >>> gpu_preset("h100-sxm").peak_flops_per_s["bf16"]
    989000000000000.0
    """
    table = _find(_tables("clusters.toml")["gpus"], name, "GPU")
    return GpuSpec(
        name=name,
        memory_bytes=parse_quantity(table["memory"], "bytes"),
        memory_bytes_per_s=parse_quantity(table["memory_rate"], "bytes/s"),
        peak_flops_per_s={
            dtype: parse_quantity(peak, "flop/s") for dtype, peak in table["peak"].items()
        },
        max_power_watts=parse_quantity(table["power"], "watts"),
        source=table["source"],
        date=table["date"],
    )


def _link(name: str, table: Mapping[str, str]) -> LinkSpec:
    return LinkSpec(
        name=name,
        bytes_per_s=parse_quantity(table["rate"], "bytes/s"),
        latency_ns=parse_quantity(table["latency"], "ns"),
        source=table["source"],
        date=table["date"],
    )


def link_preset(name: str) -> LinkSpec:
    """Return the link inside a node called `name`: one GPU's rate one way, latency of a message.

    >>> link_preset("nvlink4").bytes_per_s
    450000000000.0
    """
    return _link(name, _find(_tables("clusters.toml")["links"], name, "link"))


def host_preset(name: str) -> HostSpec:
    """Return the host of a node called `name`: a GPU's link to it, and the memory of the node.

    >>> host_preset("dgx-h100").link.name
    'pcie5'
    """
    table = _find(_tables("clusters.toml")["hosts"], name, "host")
    return HostSpec(
        name=name,
        link=link_preset(table["link"]),
        memory_bytes=parse_quantity(table["memory"], "bytes"),
        memory_bytes_per_s=parse_quantity(table["memory_rate"], "bytes/s"),
        source=table["source"],
        date=table["date"],
    )


def fabric_preset(name: str) -> LinkSpec:
    """Return the fabric called `name`: one GPU's NIC share one way, latency of a message.

    >>> fabric_preset("ndr400").bytes_per_s
    50000000000.0
    """
    return _link(name, _find(_tables("clusters.toml")["fabrics"], name, "fabric"))


def cluster_preset(name: str, *, num_nodes: int = 1, fabric: str = "") -> ClusterSpec:
    """Return `num_nodes` nodes of the preset `name`, joined by `fabric` (default: the usual one).

    Raises InvalidInputError for an unknown name or less than one node.

    >>> cluster_preset("h100-sxm", num_nodes=4).num_ranks
    32
    """
    tables = _tables("clusters.toml")
    node = _find(tables["nodes"], name, "cluster")
    if num_nodes < 1:
        raise InvalidInputError(
            [Problem(where="cluster nodes", found=str(num_nodes), rule="must be at least 1",
                     fix="name how many nodes the cluster has")]
        )  # fmt: skip
    pool = PoolSpec(
        gpu=gpu_preset(node["gpu"]),
        gpus_per_node=node["gpus_per_node"],
        num_nodes=num_nodes,
        intra_node=link_preset(node["link"]),
        host=host_preset(node["host"]) if "host" in node else None,
    )
    joined = fabric_preset(fabric or node["fabric"])
    return ClusterSpec(name=name, pools=(pool,), inter_node=joined if num_nodes > 1 else None)


class Assumption(NamedTuple):
    """What is assumed of a cluster that nobody described, and who measured it where."""

    value: float
    source: str
    date: str


def assumption(name: str) -> Assumption:
    """Return what is assumed of any cluster as its `name`, in the base unit of the name.

    >>> round(1 / assumption("interruptions_per_gpu_day").value)
    2112
    """
    return Assumption(**_tables("clusters.toml")["assumed"][name])


def stack_preset(name: str) -> StackSpec:
    """Return the software stack called `name`.

    Raises InvalidInputError for an unknown name.

    >>> stack_preset("layline-gloo").gradient_bucket_bytes
    26214400
    """
    table = dict(_find(_tables("stacks.toml"), name, "stack"))
    if "like" in table:
        table = {**_tables("stacks.toml")[table.pop("like")], **table}
    bucket = parse_quantity(table.pop("gradient_bucket"), "bytes")
    calibrates = tuple(table.pop("calibrates", USUAL_SCALARS))
    return StackSpec(
        name=name,
        gradient_bucket_bytes=bucket,
        calibrates=calibrates,
        scalars=stack_scalars(name),
        **table,
    )


@cache
def stack_scalars(name: str) -> Mapping[str, Scalar]:
    """Return the calibrated scalars of stack `name`, and for the others what all stacks share.

    Empty where nothing was calibrated at all.
    """
    found = calibrated().get("scalars")
    if not found:
        return {}
    scalars = {**found["shared"], **found.get(name, {})}
    return {key: Scalar(*scalars[key]) for key in sorted(scalars)}


@cache
def calibrated() -> Mapping[str, Any]:
    """Return what `layline calibrate` found and the package ships; empty before that."""
    path = resources.files("profiles").joinpath("data", "scalars.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
