"""The schema of a job file: what each table may hold, and how a breach of it is told."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from profiles.errors import Problem
from profiles.goal import MAX_OBJECTIVES, OBJECTIVES
from profiles.model import Mlp, Norm, Positions
from profiles.presets import closest
from profiles.quantity import Dimension, parse_quantity, quantity_example, quantity_rule
from profiles.stack import GradientDType, MasterWeights, MomentsDType, Recompute, Sharding
from profiles.workload import DType

MAX_RANKS = 2_000_000
ScheduleName = Literal[
    "gpipe",
    "1f1b",
    "interleaved",
    "breadth_first",
    "zb_h1",
    "zb_h2",
    "zb_v",
    "dual_pipe_v",
    "synthesised",
]
"""The schedules of `planner.schedules`, which this package may not import, and the one that
`planner.synthesis` makes for the case at hand; a test compares them."""

AxisOrder = Literal["tp-cp-dp-pp", "tp-cp-pp-dp"]
"""The orders of axes that are searched, of those that `planner.layout` knows."""

# Far above any real value; they keep a slip of the pen from becoming an endless computation.
Count = Annotated[int, Field(ge=1, le=10**9)]
NodeCount = Annotated[int, Field(ge=1, le=MAX_RANKS)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
Share = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]


def _quantity(dimension: Dimension, *, allows_zero: bool = False) -> BeforeValidator:
    def check(value: object) -> float:
        example = f'for example "{quantity_example(dimension)}"'
        try:
            found: float = parse_quantity(value, dimension)
        except ValueError:
            context = {"rule": quantity_rule(dimension), "fix": example}
            raise PydanticCustomError("quantity", "{rule}", context) from None
        if not found and not allows_zero:
            context = {"rule": "must be above 0", "fix": example}
            raise PydanticCustomError("quantity", "{rule}", context)
        return found

    return BeforeValidator(check)


Bytes = Annotated[int, _quantity("bytes")]
BytesPerS = Annotated[float, _quantity("bytes/s")]
Nanoseconds = Annotated[int, _quantity("ns", allows_zero=True)]
FlopsPerS = Annotated[float, _quantity("flop/s")]
Tokens = Annotated[int, _quantity("tokens", allows_zero=True)]
Watts = Annotated[float, _quantity("watts", allows_zero=True)]
SomeNanoseconds = Annotated[int, _quantity("ns")]
SomeWatts = Annotated[float, _quantity("watts")]


def _objectives(value: object) -> tuple[str, ...]:
    """Let `"goodput"` stand for `["goodput"]`."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and 1 <= len(names) <= MAX_OBJECTIVES:
        unknown = [name for name in names if name not in OBJECTIVES]
        if not unknown and len(set(names)) == len(names):
            return tuple(names)
        fix = closest(str(unknown[0])[:60], OBJECTIVES, "objective") if unknown else "name it once"
    else:
        fix = f"use {', '.join(OBJECTIVES)}"
    rule = "must be an objective, or a list of two or three different ones"
    raise PydanticCustomError("quantity", "{rule}", {"rule": rule, "fix": fix})


Objectives = Annotated[tuple[str, ...], BeforeValidator(_objectives)]


def _named(value: object) -> object:
    """Let `"ndr400"` stand for `{ preset = "ndr400" }`."""
    return {"preset": value} if isinstance(value, str) else value


class Table(BaseModel):
    """A table of the file: no coercion, no unknown keys, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    def given(self) -> dict[str, Any]:
        """Return the keys that the file has, with their values."""
        return {key: getattr(self, key) for key in type(self).model_fields if self.has(key)}

    def has(self, key: str) -> bool:
        """Return whether the file has `key`."""
        return key in self.model_fields_set


class RopeScalingTable(Table):
    """`[model.rope_scaling]`: the scaling of LLaMA 3.1 and later."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_seq_len: Count


class ModelTable(Table):
    """`[model]`: a preset or an HF config with single fields changed, or every field."""

    preset: Text | None = None
    hf_config: Text | None = None
    name: Text = "custom"
    num_layers: Count = 1
    hidden: Count = 1
    num_heads: Count = 1
    num_kv_heads: Count = 1
    head_size: Count = 1
    ffn: Count = 1
    vocab: Count = 1
    max_seq_len: Count = 1
    tied_embeddings: bool = False
    norm: Norm = "rmsnorm"
    norm_eps: Positive = 1e-5
    mlp: Mlp = "swiglu"
    positions: Positions = "rope"
    rope_theta: Positive = 10_000.0
    rope_scaling: RopeScalingTable | None = None
    has_biases: bool = False


class WorkloadTable(Table):
    """`[workload]`: what one optimizer step trains on."""

    seq_len: Count
    global_batch: Count
    dtype: DType = "fp32"
    optimizer: Literal["adamw"] = "adamw"
    learning_rate: Positive = 3e-4
    weight_decay: Annotated[float, Field(ge=0, le=1e12)] = 0.1
    beta1: Share = 0.9
    beta2: Share = 0.95
    tokens: Tokens = 0


class PeakTable(Table):
    """Dense peaks, one per dtype."""

    fp32: FlopsPerS = 0.0
    tf32: FlopsPerS = 0.0
    fp16: FlopsPerS = 0.0
    bf16: FlopsPerS = 0.0
    fp8: FlopsPerS = 0.0


class GpuTable(Table):
    """One accelerator: a preset with single facts changed, or every fact."""

    preset: Text | None = None
    name: Text = "custom"
    memory: Bytes = 0
    memory_rate: BytesPerS = 0.0
    peak: PeakTable = PeakTable()
    power: Watts = 0.0
    source: Text = "written in the job file"
    date: Text = "not given"


class LinkTable(Table):
    """One link or fabric: a preset with single facts changed, or every fact."""

    preset: Text | None = None
    name: Text = "custom"
    rate: BytesPerS = 0.0
    latency: Nanoseconds = 0
    source: Text = "written in the job file"
    date: Text = "not given"


class FabricTable(LinkTable):
    """`[cluster.fabric]`: what joins the nodes, and the layer over its pods where it has some."""

    pod_nodes: NodeCount = 1
    oversubscription: Annotated[float, Field(ge=1, le=1e6)] = 1.0


class PoolTable(Table):
    """`[[cluster.pools]]`: equal nodes."""

    gpu: Annotated[GpuTable, BeforeValidator(_named)]
    gpus_per_node: NodeCount
    nodes: NodeCount = 1
    intra_node: Annotated[LinkTable, BeforeValidator(_named)]
    host: Text | None = None


class FailuresTable(Table):
    """`[cluster.failures]`: how often a job is interrupted, and what a checkpoint takes."""

    per_gpu_day: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    restart: Nanoseconds = 0
    checkpoint_rate: BytesPerS = 0.0
    checkpoint_stall: Nanoseconds = 0


class ClusterTable(Table):
    """`[cluster]`: this machine, nodes of a preset, or pools written out."""

    preset: Text | None = None
    name: Text = "custom"
    ranks: NodeCount = 1
    device: Literal["cpu", "cuda"] = "cpu"
    nodes: NodeCount = 1
    fabric: Annotated[FabricTable | None, BeforeValidator(_named)] = None
    pools: Annotated[list[PoolTable], Field(min_length=1)] = []
    price_per_gpu_hour: Positive = 0.0
    power_per_gpu: SomeWatts = 0.0
    pue: Annotated[float, Field(ge=1, le=10)] = 1.0
    failures: FailuresTable = FailuresTable()


class StackTable(Table):
    """`[stack]`: the software that runs the plan: a preset with single facts changed."""

    preset: Text | None = None
    gradient_dtype: GradientDType = "fp32"
    reduction_dtype: GradientDType = "fp32"
    master_weights: MasterWeights = "fp32"
    moments_dtype: MomentsDType = "fp32"
    optimizer_offload: bool = False


class SearchTable(Table):
    """`[search]`: the values that the search may take on each axis."""

    dp: Annotated[list[NodeCount], Field(min_length=1)] = []
    tp: Annotated[list[NodeCount], Field(min_length=1)] = []
    pp: Annotated[list[NodeCount], Field(min_length=1)] = []
    micro_batch: Annotated[list[Count], Field(min_length=1)] = []
    cp: Annotated[list[NodeCount], Field(min_length=1)] = []
    ep: Annotated[list[NodeCount], Field(min_length=1)] = []
    schedule: Annotated[list[ScheduleName], Field(min_length=1)] = []
    stages_per_rank: Annotated[list[Count], Field(min_length=1)] = []
    sequence_parallel: Annotated[list[bool], Field(min_length=1)] = []
    sharding: Annotated[list[Sharding], Field(min_length=1)] = []
    shard_group: Annotated[list[NodeCount], Field(min_length=1)] = []
    recompute: Annotated[list[Recompute], Field(min_length=1)] = []
    order: Annotated[list[AxisOrder], Field(min_length=1)] = []
    dtype: Annotated[list[DType], Field(min_length=1)] = []
    gradient_dtype: Annotated[list[GradientDType], Field(min_length=1)] = []
    optimizer_offload: Annotated[list[bool], Field(min_length=1)] = []


class LimitsTable(Table):
    """`[goal.limits]`: what no choice may break, in the unit of each objective."""

    step_time: SomeNanoseconds = 0
    tokens_per_s: Positive = 0.0
    dollars_per_mtoken: Positive = 0.0
    joules_per_token: Positive = 0.0
    memory_headroom: Bytes = 0
    goodput: Positive = 0.0


class GoalTable(Table):
    """`[goal]`: what the search is to make best."""

    optimize: Objectives = ("step_time",)
    limits: LimitsTable = LimitsTable()


class JobTable(Table):
    """The whole file."""

    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    profile: Text = "auto"
    foreign_profile: bool = False
    model: ModelTable
    workload: WorkloadTable
    cluster: ClusterTable
    stack: StackTable | None = None
    search: SearchTable = SearchTable()
    goal: GoalTable = GoalTable()


Says = Callable[[str], str]
Place = tuple[int | str, ...]


def schema_problems(
    table: type[Table], data: object, where: Says
) -> tuple[list[Problem], tuple[Place, ...]]:
    """Return every breach of `table` in `data`, and the places that have one.

    `where` turns a dotted path into the words that begin the error.
    """
    try:
        table.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = [_problem(table, detail, where) for detail in details]
        return problems, tuple(detail["loc"] for detail in details)
    return [], ()


_SIMPLE_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text in quotes",
    "string_too_short": "must not be empty",
    "string_too_long": "must be at most 4096 characters",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "too_short": "must hold at least one value",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
}


def _problem(table: type[Table], detail: ErrorDetails, where: Says) -> Problem:
    place = detail["loc"]
    context = detail.get("ctx", {})
    at = where(".".join(map(str, place)))
    kind = detail["type"]
    if kind == "missing":
        return Problem(where=at, found="missing", rule="must be given", fix=f"add {place[-1]}")
    found = shown(detail["input"])
    if kind == "extra_forbidden":
        fields = fields_at(table, place[:-1])
        return Problem(where=at, found=found, rule="must be absent: no such key is known here",
                       fix=closest(str(place[-1]), fields, "key"))  # fmt: skip
    if kind == "quantity":
        return Problem(where=at, found=found, rule=context["rule"], fix=context["fix"])
    if kind == "literal_error":
        expected = context["expected"].replace("'", '"')
        return Problem(where=at, found=found, rule=f"must be {expected}", fix="use one of these")
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for bound, words in bounds.items():
        if bound in context:
            rule = f"must be {words} {context[bound]:,}"
            return Problem(where=at, found=found, rule=rule, fix="correct the value")
    rule = _SIMPLE_RULES.get(kind, f"must satisfy: {detail['msg'].lower()}")
    return Problem(where=at, found=found, rule=rule, fix="correct the value")


def shown(value: object) -> str:
    """Return `value` as a person would find it in the file, cut to 60 characters.

    >>> shown("80"), shown(True), shown([1, 2])
    ('"80"', 'true', '[1, 2]')
    """
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def fields_at(table: type[Table], place: Sequence[int | str]) -> tuple[str, ...]:
    """Return the keys that the table at `place` may have.

    >>> fields_at(JobTable, ("cluster", "pools", 0, "gpu", "peak"))
    ('fp32', 'tf32', 'fp16', 'bf16', 'fp8')
    """
    found: type[Table] = table
    for part in place:
        if isinstance(part, str) and part in found.model_fields:
            found = _table_in(found.model_fields[part].annotation) or found
    return tuple(found.model_fields)


def _table_in(annotation: Any) -> type[Table] | None:
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation
    for inner in get_args(annotation):
        if (found := _table_in(inner)) is not None:
            return found
    return None


def as_mapping(value: object) -> Mapping[str, Any]:
    """Return `value` where it is a table, else an empty one."""
    return value if isinstance(value, dict) else {}
