"""What data parallelism adds to a step: closed forms, and the engine on graphs of the same work."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.predict import step_model
from planner.setup import Setup
from profiles.presets import cluster_preset
from profiles.stack import Sharding
from simulator.engine import simulate
from simulator.graph import Op, task_graph
from tests.setups import (
    IDLE_HOST,
    STACK,
    group_ns,
    model_of,
    pass_ns,
    scalars,
    setup_of,
    stage,
)

SHARDED: tuple[Sharding, ...] = ("zero1", "zero2", "zero3")


@pytest.mark.parametrize("dp", [2, 8, 32])
def test_gradients_that_nothing_hides_take_the_collective_s_own_time(dp: int) -> None:
    setup = setup_of(dp=dp)
    size_bytes = step_model(setup).parameters(8, True, True) * 4
    assert stage(setup).reduction[0] == group_ns("all_reduce", dp, min(dp, 8), size_bytes)


@pytest.mark.parametrize("dp", [2, 8, 32])
def test_a_sharded_optimizer_scatters_gradients_and_gathers_parameters(dp: int) -> None:
    setup = setup_of(dp=dp, sharding="zero1")
    count = step_model(setup).parameters(8, True, True)
    expected = group_ns("reduce_scatter", dp, min(dp, 8), 4 * count)
    expected += group_ns("all_gather", dp, min(dp, 8), 2 * count)
    assert stage(setup).reduction[0] == pytest.approx(expected)


@pytest.mark.parametrize("bucket_bytes", [25 << 20, 1 << 30])
def test_gradients_go_bucket_after_bucket(bucket_bytes: int) -> None:
    """Equal buckets, as few as there must be: each pays the latency again."""
    setup = setup_of(dp=16, stack=replace(STACK, gradient_bucket_bytes=bucket_bytes))
    size_bytes = step_model(setup).parameters(8, True, True) * 4
    count = -(-size_bytes // bucket_bytes)
    expected = count * group_ns("all_reduce", 16, 8, size_bytes / count)
    assert stage(setup).reduction[0] == pytest.approx(expected, rel=1e-6)
    assert expected > group_ns("all_reduce", 16, 8, size_bytes)


def test_hybrid_sharding_reduces_shards_between_its_groups() -> None:
    """Inside the nodes scatter and gather; between them an all-reduce of each rank's eighth."""
    setup = setup_of(dp=32, sharding="zero1", shard_group=8)
    count = step_model(setup).parameters(8, True, True)
    expected = group_ns("reduce_scatter", 8, 8, 4 * count) + group_ns("all_gather", 8, 8, 2 * count)
    expected += group_ns("all_reduce", 4, 1, 4 * count / 8)
    assert stage(setup).reduction[0] == pytest.approx(expected)


@pytest.mark.parametrize(("fabric", "hides_all"), [("xdr800", True), ("roce100", False)])
def test_overlapped_gradients_leave_the_last_layer_or_what_the_backward_is_too_short_for(
    fabric: str, hides_all: bool
) -> None:
    """Layer by layer behind the backward: e / L is left of e, or c / L + e - c if e > c."""
    cluster = cluster_preset("h100-sxm", num_nodes=2, fabric=fabric)
    axes: Any = {
        "dp": 16,
        "micro_batch": 4 if hides_all else 1,
        "seq_len": 2048,
        "cluster": cluster,
    }
    hidden = stage(setup_of(stack=replace(STACK, overlaps_gradients=True), **axes))
    alone = stage(setup_of(**axes))
    compute, exchange = hidden.backward[0], alone.reduction[0]
    assert (exchange < compute) == hides_all
    left = exchange / 8 if hides_all else compute / 8 + exchange - compute
    assert hidden.reduction[0] == pytest.approx(left, abs=20)


@given(st.floats(0, 1))
def test_exposed_is_the_least_part_that_is_left(exposed: float) -> None:
    stack = replace(STACK, overlaps_gradients=True,
                    scalars=scalars(IDLE_HOST | {"exposed": exposed}))  # fmt: skip
    alone = stage(setup_of(dp=8, micro_batch=4)).reduction[0]
    left = stage(setup_of(dp=8, micro_batch=4, stack=stack)).reduction[0]
    assert left == pytest.approx(max(alone / 8, exposed * alone), abs=20)


@given(st.floats(0, 1))
def test_exposed_is_added_to_sharded_layers(exposed: float) -> None:
    """That part of what the exchange could have hidden."""
    stack = replace(STACK, scalars=scalars(IDLE_HOST | {"exposed": exposed}))
    setup = setup_of(dp=8, sharding="zero3", micro_batch=4)
    hidden, shown = stage(setup), stage(replace(setup, stack=stack))
    _, _, gather, scatter = _sharded_parts(setup)
    added = {
        way: getattr(shown, way)[0] - getattr(hidden, way)[0] for way in ("forward", "backward")
    }
    assert added["forward"] == pytest.approx(exposed * 9 * gather, abs=20)
    assert added["backward"] == pytest.approx(exposed * 9 * (gather + scatter), abs=20)


@pytest.mark.parametrize("sharding", SHARDED)
def test_each_owner_updates_its_share(sharding: Sharding) -> None:
    """38 bytes a parameter, and 8 of each gradient that it keeps, for the norm and zeroing."""
    setup = setup_of(dp=8, sharding=sharding)
    count = step_model(setup).parameters(8, True, True)
    whole = count if sharding == "zero1" else count / 8
    assert stage(setup).optimizer[0] == pytest.approx(pass_ns(count / 8 * 38 + whole * 8))


def _sharded_parts(setup: Setup) -> tuple[float, float, float, float]:
    """Return forward and backward of one of 9 units, its gather and its scatter, each alone."""
    plain = stage(replace(setup, layout=replace(setup.layout, sharding="none")))
    found, lanes = model_of(setup)
    count = found.parameters(8, True, True)
    times = []
    for kind, width in (("all_gather", 2), ("reduce_scatter", 4)):
        category, time = found.places.replicas(kind, count * width / 9)
        times.append(time.ns * lanes.factor[category, 0])
    return plain.forward[0] / 9, plain.backward[0] / 9, times[0], times[1]


@pytest.mark.parametrize("fabric", ["xdr800", "roce100"])
@pytest.mark.parametrize("seq_len", [512, 8192])
def test_sharded_layers_are_gathered_one_ahead(fabric: str, seq_len: int) -> None:
    """Gather the first, then the slower of gather and layer, then the last layer."""
    cluster = cluster_preset("h100-sxm", num_nodes=2, fabric=fabric)
    setup = setup_of(dp=16, sharding="zero3", cluster=cluster, seq_len=seq_len)
    unit, _, gather, _ = _sharded_parts(setup)
    assert stage(setup).forward[0] == pytest.approx(gather + 8 * max(unit, gather) + unit, rel=1e-6)


def test_a_backward_that_binds_hides_all_but_the_first_gather_and_the_last_scatter() -> None:
    setup = setup_of(dp=8, sharding="zero3", micro_batch=8)
    _, unit, gather, scatter = _sharded_parts(setup)
    assert unit > gather + scatter
    expected = gather + 9 * unit + scatter
    assert stage(setup).backward[0] == pytest.approx(expected, rel=1e-6)


def test_traffic_that_binds_hides_the_backward() -> None:
    cluster = cluster_preset("h100-sxm", num_nodes=2, fabric="roce100")
    setup = setup_of(dp=16, sharding="zero3", seq_len=512, cluster=cluster)
    _, unit, gather, scatter = _sharded_parts(setup)
    assert unit < min(gather, scatter)
    assert stage(setup).backward[0] == pytest.approx(9 * (gather + scatter), rel=1e-6)


@settings(max_examples=40)
@given(
    seq_len=st.sampled_from((512, 1024, 2048, 4096, 8192)),
    fabric=st.sampled_from(("xdr800", "ndr400", "roce100")),
    inter=st.floats(0.5, 6.0),
)
def test_the_engine_times_the_same_sharded_backward(
    seq_len: int, fabric: str, inter: float
) -> None:
    """Unit u + 1 is gathered once unit u - 1 is done; each scatter comes behind its unit."""
    cluster = cluster_preset("h100-sxm", num_nodes=2, fabric=fabric)
    stack = replace(STACK, scalars=scalars(IDLE_HOST | {"inter": inter}))
    setup = setup_of(dp=16, sharding="zero3", seq_len=seq_len, cluster=cluster, stack=stack)
    _, unit, gather, scatter = (round(part) for part in _sharded_parts(setup))
    ops, times = list[Op](), list[int]()

    def add(stream: str, ns: int, *deps: int) -> int:
        known = tuple(dep for dep in deps if dep >= 0)
        ops.append(Op(id=len(ops), rank=0, stream=stream, name="op", kind="other", deps=known))
        times.append(ns)
        return len(ops) - 1

    gathered, done = add("exchange", gather), [-1]
    for number in range(9):
        own = gathered
        if number < 8:
            gathered = add("exchange", gather, done[-1])
        done.append(add("compute", unit, own))
        add("exchange", scatter, done[-1])
    expected = simulate(task_graph(ops), times).makespan_ns
    assert stage(setup).backward[0] == pytest.approx(expected, abs=20)
