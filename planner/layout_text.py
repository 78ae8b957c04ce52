"""A layout that a person names, `dp=8,tp=4,pp=2,zero1,mb=1x16`: read, checked, completed.

It reads what `str(Layout)` writes. What a text leaves out is taken as the planner would take it: dp
from the ranks, micro-batches from the batch, the split into stages by the partition, sharding,
recomputation and sequence parallelism as the stack does them unless told otherwise.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, get_args

from planner.account import dealt
from planner.evaluate import Costs, basis_of
from planner.layout import AXES, DEFAULT_ORDER, Layout
from planner.orders import MAX_CELLS
from planner.pools import misfit
from planner.schedules import SCHEDULES
from planner.space import SYNTHESISED, divisors, options
from profiles.errors import InvalidInputError, Problem
from profiles.job import Job
from profiles.presets import closest
from profiles.stack import Recompute, Sharding
from simulator.schedule import MAX_STAGES

COUNTS = {"dp": "dp", "tp": "tp", "pp": "pp", "cp": "cp", "ep": "ep", "v": "stages_per_rank"}
"""The words of numbers, and the fields of a layout that they stand for."""
SHARDINGS = {f"zero{stage}": name for stage, name in enumerate(get_args(Sharding))}
KNOWN = (*COUNTS, "mb", "recompute", "order", "sp", "nosp", *SHARDINGS, *SCHEDULES)
"""Every word, as far as its first `=` or `:`."""
MAX_TEXT = 400


@dataclass
class _Words:
    """What a text says, while it is read: numbers and choices by field of the layout."""

    numbers: dict[str, int] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)

    def number(self, name: str, otherwise: int = 1) -> int:
        return self.numbers.get(name, otherwise)


class _Finding(NamedTuple):
    """One thing wrong: the word, what it was found to be, the rule and a way out."""

    word: str
    found: str
    rule: str
    fix: str


def parse_layout(text: str, job: Job, costs: Costs, known: Iterable[Layout] = ()) -> Layout:
    """Return the layout of `job` that `text` names.

    A layout of `known` whose text it is, word for word, is returned as it is: what a text does not
    say, as its split into stages, is then that of the known one. Raises InvalidInputError with
    every word that is wrong, its rule and a way out.
    """
    text = text.strip()
    for layout in known:
        if str(layout) == text:
            return layout
    words, findings = _read(text)
    _refuse(text, findings)
    for check in (_degrees, _pools, _sizes, _batch, _pipeline, _options):
        _refuse(text, list(check(words, job, costs)))
    return _completed(words, job, costs)


def _refuse(text: str, findings: list[_Finding]) -> None:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    if findings:
        raise InvalidInputError(
            [
                Problem(where=f'layout "{shown}": {f.word}', found=f.found, rule=f.rule, fix=f.fix)
                for f in findings
            ]
        )


def _read(text: str) -> tuple[_Words, list[_Finding]]:
    """Return the words of `text`, and those that are none."""
    words, findings, seen = _Words(), list[_Finding](), set[str]()
    if not text or len(text) > MAX_TEXT:
        found = "empty" if not text else f"{len(text)} letters long"
        fix = "for example dp=8,tp=4,pp=2"
        return words, [_Finding("it", found, f"must have 1 to {MAX_TEXT} letters", fix)]
    for word in (part.strip() for part in text.split(",")):
        key, _, value = word.partition("=")
        topic = _topic(word)
        if topic in seen:
            findings.append(_Finding(word or "a word", "said twice", "must stand once", "drop one"))
        elif problem := _take(words, key.strip(), value.strip(), word):
            findings.append(problem)
        seen.add(topic)
    return words, findings


def _topic(word: str) -> str:
    """Return what a word is about: two words about one thing contradict each other."""
    key = word.partition("=")[0].strip()
    if key.partition(":")[0] in SHARDINGS:
        return "sharding"
    if key in SCHEDULES:
        return "schedule"
    return "sp" if key == "nosp" else key


def _take(words: _Words, key: str, value: str, word: str) -> _Finding | None:
    """Put one word into `words`, or return what is wrong with it."""
    name, _, group = key.partition(":")
    if key in COUNTS:
        return _number(words, COUNTS[key], value, word, f"{key}=4")
    if key == "mb":
        size, times, count = value.partition("x")
        wrong = _number(words, "micro_batch", size, word, "mb=1 or mb=1x16")
        if times and not wrong:
            wrong = _number(words, "num_microbatches", count, word, "mb=1 or mb=1x16")
        return wrong
    if key == "recompute":
        how, colon, layers = value.partition(":")
        if how not in get_args(Recompute):
            kinds = ", ".join(get_args(Recompute))
            return _Finding(key, f'"{value}"', f"must be {kinds}", "for example recompute=full")
        words.choices["recompute"] = how
        sample = "recompute=full:8, for 8 layers"
        return _number(words, "recomputed", layers, word, sample) if colon else None
    if key == "order":
        if sorted(value.split("-")) != sorted(AXES):
            rule = f"must name {', '.join(AXES)} once each"
            return _Finding(key, f'"{value}"', rule, f"for example order={DEFAULT_ORDER}")
        words.choices["order"] = value
    elif name in SHARDINGS and "=" not in word:
        words.choices["sharding"] = SHARDINGS[name]
        if ":" in key:
            return _number(words, "shard_group", group, word, f"{name}:8, for groups of 8")
    elif word in ("sp", "nosp"):
        words.choices["sequence_parallel"] = word == "sp"
    elif word in SCHEDULES:
        words.choices["schedule"] = word
    elif word == SYNTHESISED:
        rule = "must be an order with a name: a synthesised one is made for the case at hand"
        return _Finding("schedule", word, rule, f"use one of {', '.join(SCHEDULES)}")
    else:
        rule = "must be a word of a layout"
        return _Finding("a word", f'"{word[:40]}"', rule, closest(name[:40], KNOWN, "word"))
    return None


def _number(words: _Words, name: str, text: str, word: str, sample: str) -> _Finding | None:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:12]) <= 10**9:
        found = f'"{word[:40]}"'
        return _Finding(
            "a word", found, "must be a whole number from 1 on", f"for example {sample}"
        )
    words.numbers[name] = int(text)
    return None


# What a layout of the job must be. Each check may rely on those before it.
_Findings = Iterable[_Finding]


def _degrees(words: _Words, job: Job, _costs: Costs) -> _Findings:
    """Check that the degrees multiply to the ranks, and take dp from them where it is left out."""
    ranks = job.cluster.num_ranks
    others = math.prod(words.number(axis) for axis in ("tp", "pp", "cp"))
    names = " x ".join(a for a in ("tp", "pp", "cp") if a != "cp" or words.number("cp") > 1)
    if ranks % others:
        rule = f"must divide the {ranks} ranks of cluster {job.cluster.name}"
        yield _Finding(names, str(others), rule, f"use {options(divisors(ranks))}")
    elif words.number("dp", ranks // others) * others != ranks:
        found = str(words.number("dp") * others)
        rule = f"must multiply to the {ranks} ranks of cluster {job.cluster.name}"
        fix = f"write dp={ranks // others}, or leave dp out"
        yield _Finding(f"dp x {names}", found, rule, fix)
    words.numbers.setdefault("dp", max(1, ranks // others))


def _pools(words: _Words, job: Job, costs: Costs) -> _Findings:
    """Check that every stage lies in one pool of GPUs, where these differ."""
    stage_ranks = math.prod(words.number(axis) for axis in ("dp", "cp", "tp"))
    order = words.choices.get("order", DEFAULT_ORDER)
    if reason := misfit(basis_of(job, costs).pools, stage_ranks, order):
        rule = f"must keep every stage in one pool of cluster {job.cluster.name}: {reason}"
        yield _Finding("pp", str(words.number("pp")), rule, "take more stages, and the usual order")


def _sizes(words: _Words, job: Job, costs: Costs) -> _Findings:
    """Check that the model can be cut as many times as each axis says."""
    model, replicas = job.model, words.number("dp") * words.number("cp")
    # A rank takes one part from either end of a sequence, so that all have as much to attend to.
    half = 1 if job.workload.seq_len % 2 else job.workload.seq_len // 2
    experts = f"experts of {model.name}"
    cuts = [
        ("tp", model.num_kv_heads, "kv heads"), ("tp", model.num_heads, "heads"),
        ("tp", model.ffn, "MLP columns"), ("cp", half, "tokens of half a sequence"),
        ("ep", model.num_experts or 1, experts), ("ep", replicas, "replicas (dp x cp)"),
    ]  # fmt: skip
    if costs.is_of_executor:
        cuts.append(("tp", model.vocab, "vocabulary rows"))
    wrong = set[str]()
    for axis, count, what in cuts:
        if count % words.number(axis) and axis not in wrong:
            wrong.add(axis)
            rule = f"must divide the {count} {what}"
            yield _Finding(axis, str(words.number(axis)), rule, f"use {options(divisors(count))}")


def _batch(words: _Words, job: Job, _costs: Costs) -> _Findings:
    """Check that the micro-batches make up the batch."""
    batch, dp, size = job.workload.global_batch, words.number("dp"), words.number("micro_batch")
    if batch % dp:
        rule = f"must divide workload.global_batch ({batch} sequences)"
        yield _Finding("dp", str(dp), rule, f"use {options(divisors(batch))}")
        return
    if (share := batch // dp) % size:
        rule = f"must divide the {share} sequences of a replica (global batch {batch} over dp {dp})"
        yield _Finding("mb", str(size), rule, f"use {options(divisors(share))}")
    elif (count := words.number("num_microbatches", share // size)) * size != share:
        rule = f"must be {share} sequences a replica (global batch {batch} over dp {dp})"
        fix = f"write mb={size}x{share // size}, or mb={size} alone"
        yield _Finding("mb", f"{size}x{count}, {size * count} sequences", rule, fix)
    words.numbers.setdefault("num_microbatches", max(1, share // size))


def _pipeline(words: _Words, job: Job, costs: Costs) -> _Findings:
    """Check that the schedule exists for these stages; choose it where it is left out."""
    pp, numbers, choices = words.number("pp"), words.numbers, words.choices
    if pp == 1:
        name = choices.setdefault("schedule", "1f1b")
        if words.number("stages_per_rank") > 1 or not SCHEDULES[name].takes(1):
            word = f"{name} with v={words.number('stages_per_rank')}"
            rule = "must be left out with pp=1, which is one stage a rank"
            yield _Finding("the schedule", word, rule, "drop it, or set pp")
        return
    if "schedule" not in choices:
        choices["schedule"] = "interleaved" if words.number("stages_per_rank") > 1 else "1f1b"
    name = choices["schedule"]
    family = SCHEDULES[name]
    count = numbers.setdefault("stages_per_rank", family.stages_per_rank or 2)
    if not family.takes(count):
        has = str(family.stages_per_rank) if family.stages_per_rank else "2 or more"
        fits = [other for other, each in SCHEDULES.items() if each.takes(count)]
        rule = f"must be {has} with {name}"
        yield _Finding("v", str(count), rule, f"set v, or use {' or '.join(fits)}")
    num_stages, num_microbatches = pp * count, words.number("num_microbatches")
    if num_stages > min(MAX_STAGES, job.model.num_layers):
        rule = f"must be at most the {job.model.num_layers} layers of {job.model.name}"
        yield _Finding("pp x v", str(num_stages), rule, "use fewer stages")
    if num_stages * num_microbatches > MAX_CELLS:
        rule = f"must be at most {MAX_CELLS}, since a plan writes out what each does with each"
        found = str(num_stages * num_microbatches)
        yield _Finding("stages x micro-batches", found, rule, "take a larger micro-batch")
    if job.model.tied_embeddings and costs.is_of_executor:
        rule = "must be 1: tied embeddings need both ends of the model on one rank"
        yield _Finding("pp", str(pp), rule, "use pp=1")


def _options(words: _Words, job: Job, costs: Costs) -> _Findings:
    """Check what the replicas share and what is made again."""
    numbers, choices = words.numbers, words.choices
    replicas = words.number("dp") * words.number("cp")
    if costs.is_of_executor:
        rule = "must be left out: our own executor, whose costs were measured, does not do it"
        foreign = [w for w in ("cp", "ep") if words.number(w) > 1]
        foreign += [f"{key} {choices[key]}" for key in ("sharding", "recompute")
                    if choices.get(key, "none") != "none"]  # fmt: skip
        foreign += ["sp"] if choices.get("sequence_parallel") else []
        foreign += ["order"] if choices.get("order", DEFAULT_ORDER) != DEFAULT_ORDER else []
        for word in foreign:
            yield _Finding(word, "set", rule, "drop it")
        if job.model.tied_embeddings and words.number("tp") > 1:
            rule = "must be 1: tied embeddings need both ends of the model on one rank"
            yield _Finding("tp", str(words.number("tp")), rule, "use tp=1")
    group = numbers.get("shard_group", 1)
    if replicas % group or ("shard_group" in numbers and choices["sharding"] == "none"):
        rule = f"must divide the {replicas} replicas (dp x cp), and shard something"
        fix = f"use zero1 to zero3 with {options(divisors(replicas))}"
        yield _Finding("the shard group", str(group), rule, fix)
    if choices.get("sequence_parallel") and words.number("tp") == 1:
        yield _Finding("sp", "set with tp=1", "must have ranks to share sequences", "set tp")
    again = numbers.get("recomputed", 1)
    if choices.get("recompute") == "none" and "recomputed" in numbers:
        yield _Finding(
            "recompute", f"none:{again}", "must name what is made again", "drop the count"
        )
    elif again > job.model.num_layers:
        rule = f"must be at most the {job.model.num_layers} layers of {job.model.name}"
        yield _Finding("recompute", f"of {again} layers", rule, "use fewer")


def _completed(words: _Words, job: Job, costs: Costs) -> Layout:
    """Return the layout of words that passed every check."""
    numbers, choices = dict(words.numbers), words.choices
    recomputed = numbers.pop("recomputed", 0)
    if numbers.get("shard_group") == words.number("dp") * words.number("cp"):
        numbers["shard_group"] = 0
    whole: dict[str, Any] = {"tp": 1, "pp": 1, "micro_batch": 1, **numbers}
    num_stages = words.number("pp") * words.number("stages_per_rank")
    start = Layout(**whole, stage_layers=(0,) * num_stages, schedule=choices["schedule"])
    said = {key: value for key, value in choices.items() if key != "schedule"}
    layout = dealt(replace(costs.completed(start), **said), job.model.num_layers, costs)
    if not recomputed or recomputed == job.model.num_layers:
        return layout
    return replace(layout, recompute_layers=spread(layout.stage_layers, recomputed))


def spread(stage_layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Return in how many layers of each stage something is made again, of `num_layers` in all.

    The same share of each stage, as far as layers go; early stages, which keep most micro-batches,
    come first.

    >>> spread((3, 3, 3, 2), 6)
    (2, 2, 1, 1)
    """
    again = [0] * len(stage_layers)
    for _ in range(num_layers):
        free = [stage for stage, held in enumerate(stage_layers) if again[stage] < held]
        stage = min(free, key=lambda s: ((again[s] + 1) / stage_layers[s], s))
        again[stage] += 1
    return tuple(again)
