"""Published runs: rows of a CSV file, each read into the `Setup` that it measured, or refused.

A row is read alone: what is wrong with it is said of it, and never ends the file. The columns are
those of docs/validation.md; where a cell is empty, the usual is assumed and said.
"""

import csv
import gzip
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import resources
from itertools import islice
from pathlib import Path

from planner.published.layout import read_degrees, read_layout
from planner.published.machine import Machine, as_logged, read_machine
from planner.published.metric import Measured, read_metric
from planner.published.model import positive, read_model, whole
from planner.published.words import (
    StackName,
    read_attention,
    read_framework,
    read_precision,
    read_recompute,
    read_sharding,
)
from planner.setup import Setup, padded
from profiles.errors import InvalidInputError, Problem, UnsupportedError
from profiles.files import MAX_FILE_BYTES
from profiles.presets import stack_preset
from profiles.stack import Attention, MemoryLog, Recompute, StackSpec
from profiles.workload import DType, Workload

NEEDED_COLUMNS = ("id", "model", "hidden", "layers", "heads", "seq_len", "gpu", "gpus",
                  "global_batch", "metric", "value")  # fmt: skip
"""Without these no row can be read; an empty cell of them is a matter of its row."""
_RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
_SURPLUS = "(cells beyond the header)"
_MAX_ROWS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRun:
    """One measured run: what ran, what was measured, and what had to be assumed.

    `setups` is one, or, where the row does not say what was recomputed, one for each mode, least
    first: the first that fits in memory is meant. `peak_bytes` is 0 where no memory was measured;
    `memory_log` says what the source calls peak memory.
    """

    id: str
    group: str
    framework: str
    setups: tuple[Setup, ...]
    measured: Measured
    peak_bytes: int
    memory_log: MemoryLog
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadRun:
    """One row that no `Setup` stands for, and why."""

    id: str
    group: str
    reason: str


def load_runs(path: Path) -> tuple[PublishedRun | UnreadRun, ...]:
    """Return the runs in the CSV file `path`, in its order.

    Raises InvalidInputError for a file that cannot be read or lacks a needed column.
    """
    return _parsed(_bytes(path), str(path))


@cache
def development_runs() -> tuple[PublishedRun | UnreadRun, ...]:
    """Return the runs that the scalars of the stacks were calibrated on, shipped with the package.

    >>> len(development_runs())
    3942
    """
    return _parsed(development_table(), "the development set")


def development_table() -> bytes:
    """Return the table of `development_runs`, as CSV."""
    packed = resources.files("profiles").joinpath("data", "published_runs.csv.gz").read_bytes()
    return gzip.decompress(packed)


def _parsed(data: bytes, name: str) -> tuple[PublishedRun | UnreadRun, ...]:
    runs, seen = list[PublishedRun | UnreadRun](), set[str]()
    for number, cells in _rows(data, name):
        run = read_run(cells, number)
        if run.id in seen and isinstance(run, PublishedRun):
            run = replace(run, remarks=(*run.remarks, "id stands in the file before"))
        seen.add(run.id)
        runs.append(run)
    return tuple(runs)


def group_of(run_id: str) -> str:
    """Return the group of a run: its id without the trailing number.

    >>> group_of("vtrain-single-0017"), group_of("42")
    ('vtrain-single', '42')
    """
    return re.sub(r"[-_. ]*[0-9]+$", "", run_id) or run_id


def read_run(cells: Mapping[str, str], number: int = 1) -> PublishedRun | UnreadRun:
    """Return the run that row `number` of a file describes; `cells` are its texts by column."""
    run_id = cells.get("id", "").strip()[:200] or f"row {number}"
    group = group_of(run_id)
    try:
        return _read_run({name: text.strip() for name, text in cells.items()}, run_id, group)
    except (UnsupportedError, InvalidInputError, ValueError) as error:
        return UnreadRun(id=run_id, group=group, reason=str(error))


def _read_run(cells: Mapping[str, str], run_id: str, group: str) -> PublishedRun:
    if _SURPLUS in cells:
        raise UnsupportedError("the row has more cells than the header")
    setups, remarks = _read_setups(cells)
    get = cells.get
    measured = read_metric(get("metric", ""), get("value", ""), get("unit", ""), setups[0])
    stack = setups[0].stack
    return PublishedRun(
        id=run_id,
        group=group,
        framework=get("framework", "")[:200],
        setups=setups,
        measured=measured,
        # torch and nvidia-smi count in units of 1024: a published "GB" of memory is a GiB.
        peak_bytes=round(positive(cells, "peak_mem_gb", 10_000) * 2**30),
        memory_log=_memory_log(get("notes", ""), stack),
        remarks=remarks,
    )


def _read_setups(cells: Mapping[str, str]) -> tuple[tuple[Setup, ...], tuple[str, ...]]:
    get = cells.get
    degrees, shape = read_degrees(cells), read_model(cells)
    machine = read_machine(
        get("gpu", "")[:200],
        positive(cells, "gpu_mem_gb", 10_000),
        degrees.dp * degrees.tp * degrees.cp * degrees.pp,
        whole(cells, "gpus_per_node", 1024),
        get("intra_node_link", "")[:200],
        get("inter_node_link", "")[:200],
    )
    machine = as_logged(machine, get("notes", ""))
    shared = read_sharding(get("zero_stage_or_sharding", "")[:200])
    named = read_framework(
        get("framework", "")[:200],
        get("date", "")[:100],
        cuts_layers=degrees.tp * degrees.pp > 1,
        sharding=shared.sharding if shared else "",
    )
    named = _before_fix(named, degrees.pp, get("notes", ""))
    stack = _read_stack(cells, named.name, machine)
    recompute = read_recompute(get("recompute", "")[:200])
    model = padded(shape.model, stack.pads_vocabulary, degrees.tp)
    layout, said = read_layout(
        cells, degrees, model, stack, shared, recompute or stack.recompute,
        machine.cluster.pools[0].gpus_per_node,
    )  # fmt: skip
    dtype, dtype_said = _read_dtype(cells, machine)
    setup = Setup(
        model=model,
        workload=Workload(seq_len=model.max_seq_len, global_batch=layout.global_batch, dtype=dtype),
        layout=layout,
        cluster=machine.cluster,
        stack=stack,
    )
    modes = _RECOMPUTES[_RECOMPUTES.index(stack.recompute) :] if recompute is None else ()
    remarks = (named.remark, dtype_said, *shape.remarks, *machine.remarks, *said)
    return (
        tuple(replace(setup, layout=replace(layout, recompute=mode)) for mode in modes) or (setup,),
        tuple(remark for remark in remarks if remark),
    )


def _before_fix(named: StackName, pp: int, notes: str) -> StackName:
    """Return the stack of a pipeline of the Ultra-Scale Playbook that ran before nanotron's fix."""
    words = notes.lower()
    is_fixed = "ultrascale" not in words or "after_pp_fix=true" in words
    if named.name != "nanotron" or pp == 1 or is_fixed:
        return named
    return StackName("nanotron-unfixed", "measured before nanotron's pipeline fix")


def _read_stack(cells: Mapping[str, str], name: str, machine: Machine) -> StackSpec:
    gpu = machine.cluster.pools[0].gpu.name
    return _stack(
        name,
        read_attention(cells.get("attention_kernel", "")[:200], gpu),
        cells.get("compile", "").lower()[:20],
        "PURE" in cells.get("zero_stage_or_sharding", "")[:200],
    )


@lru_cache(maxsize=1024)
def _stack(name: str, attention: Attention | None, is_compiled: str, is_pure: bool) -> StackSpec:
    """Return a stack as a run used it.

    PURE is llm-foundry's word for gradients that are reduced in bf16 instead of fp32.
    """
    stack = stack_preset(name)
    if attention is not None:
        stack = replace(stack, attention=attention)
    if is_compiled in ("true", "yes", "1"):
        stack = replace(stack, fusion="compiled")
    elif is_compiled in ("false", "no", "0") and stack.fusion == "compiled":
        stack = replace(stack, fusion="eager")
    return replace(stack, reduction_bytes=2) if is_pure else stack


def _read_dtype(cells: Mapping[str, str], machine: Machine) -> tuple[DType, str]:
    """Return the dtype of the matrix products, and what was assumed of it."""
    gpu = machine.cluster.pools[0].gpu
    dtype = read_precision(cells.get("precision", "")[:200])
    if dtype is None:
        assumed: DType = "bf16" if "bf16" in gpu.peak_flops_per_s else "fp16"
        return assumed, f"precision not stated: {assumed} assumed"
    if dtype not in gpu.peak_flops_per_s:
        raise UnsupportedError(
            f"precision is {dtype}; {gpu.name} has {', '.join(gpu.peak_flops_per_s)}"
        )
    return dtype, ""


def _memory_log(notes: str, stack: StackSpec) -> MemoryLog:
    """Return what a source calls peak memory: as its notes say, else as its stack logs it."""
    words = notes.lower()
    if re.search(r"peak_?mem\w* *= *(max )?reserved|max_memory_reserved", words):
        return "reserved"
    if "nvidia-smi" in words:
        return "device"
    if re.search(r"max.allocated|max_memory_allocated", words):
        return stack.logs_memory if stack.logs_memory in ("allocated", "update") else "allocated"
    return stack.logs_memory


def _rows(data: bytes, path: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line number and the cells by column of each row that is not empty."""
    records = _records(data, path)
    header = [name.strip().lower() for name in records[0][1]] if records else []
    missing = [name for name in NEEDED_COLUMNS if name not in header]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if missing or twice:
        raise InvalidInputError(
            [
                Problem(
                    where=f"{path}: the header",
                    found=f"without {', '.join(missing)}" if missing else f"twice {twice[0][:60]}",
                    rule=f"must name each column once, among them {', '.join(NEEDED_COLUMNS)}",
                    fix="name a CSV file with commas between the columns (docs/validation.md)",
                )
            ]
        )
    for number, record in records[1:]:
        if not any(cell.strip() for cell in record):
            continue
        cells = dict(zip(header, record, strict=False))
        if any(cell.strip() for cell in record[len(header) :]):
            cells[_SURPLUS] = ""
        yield number, cells


def _records(data: bytes, path: str) -> list[tuple[int, list[str]]]:
    """Return the line number and the cells of every record of a CSV file."""
    # A stray byte in a note must not cost the file: what matters is ASCII.
    text = data.decode("utf-8-sig", errors="replace")
    usual = csv.field_size_limit(MAX_FILE_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        records = [(reader.line_num, record) for record in islice(reader, _MAX_ROWS + 1)]
    except csv.Error as error:
        raise InvalidInputError([f"{path}: line {reader.line_num}: {error}; not CSV"]) from None
    finally:
        csv.field_size_limit(usual)
    if len(records) > _MAX_ROWS:
        raise InvalidInputError([f"{path}: over {_MAX_ROWS:,} rows; split it"])
    return records


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInputError([f"{path}: over {MAX_FILE_BYTES >> 20} MiB; split it"])
        return path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InvalidInputError(
            [f"{path}: {reason}; name a CSV file of runs that exists and can be read"]
        ) from None
