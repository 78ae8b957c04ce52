"""The space of layouts: what is legal, how much there is of it, and what counts as one."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from planner.evaluate import basis_of
from planner.frontier import Tally, frontier
from planner.layout import DEFAULT_ORDER, Layout
from planner.reference.costs import reference_costs
from planner.schedules import SCHEDULES
from planner.search import InfeasibleError, search
from planner.space import ORDERS, SYNTHESISED, Degrees, Space, Start
from profiles.cluster import UplinkSpec
from profiles.job import Job, SearchLimits
from profiles.presets import cluster_preset, stack_preset
from profiles.workload import Workload
from tests.enumeration import starts
from tests.machine import MADE_UP
from tests.setups import MOE, SMALL


def job(ranks: int = 8, node: int = 4, pod_nodes: int = 0, **limits: object) -> Job:
    """Return a job on nodes of a few H100, in pods where it says so."""
    cluster = cluster_preset("h100-sxm", num_nodes=2)
    pool = replace(cluster.pools[0], gpus_per_node=node, num_nodes=ranks // node)
    pods = UplinkSpec(pod_nodes=pod_nodes, oversubscription=4.0, **MADE_UP) if pod_nodes else None
    return Job(
        seed=0, model=SMALL, stack=stack_preset("torchtitan"), profile_path="",
        workload=Workload(seq_len=2048, global_batch=16, dtype="bf16"),
        cluster=replace(cluster, pools=(pool,), uplinks=pods),
        search=SearchLimits(**{"schedule": tuple(SCHEDULES)} | limits),  # type: ignore[arg-type]
    )  # fmt: skip


def space_of(asked: Job) -> Space:
    return Space(asked, reference_costs(asked))


@pytest.mark.parametrize("moe", [False, True])
def test_a_shape_has_as_many_layouts_as_there_are_one_by_one(moe: bool) -> None:
    """Where nothing stands against any: with eight layers for pipelines of two ranks at most."""
    asked = job(ranks=4, pp=(1, 2))
    asked = replace(asked, model=replace(MOE if moe else SMALL, num_kv_heads=16))
    space = space_of(asked)
    starts_of: Counter[Degrees] = Counter()
    for each in starts(asked, space.costs):
        starts_of[Degrees(each.dp, each.tp, each.pp, each.cp, each.ep)] += 1
    legal = [degrees for degrees in space.degrees() if not space.rejection(degrees)]
    assert {*legal} == {*starts_of}
    for degrees in legal:
        kinds = len(space.shardings(degrees)) * len(space.recomputations)
        assert space.num_layouts(degrees) == starts_of[degrees] * kinds


@pytest.mark.parametrize(
    ("ranks", "node", "pod_nodes"), [(8, 8, 0), (8, 4, 0), (8, 2, 0), (16, 4, 2), (16, 2, 4)]
)
def test_orders_that_count_as_one_take_the_same(ranks: int, node: int, pod_nodes: int) -> None:
    asked = job(ranks, node, pod_nodes, schedule=("1f1b",), micro_batch=(1,), cp=(1, 2))
    costs, space = reference_costs(asked), space_of(asked)
    are_two = False
    for degrees in space.degrees():
        if space.rejection(degrees):
            continue
        (pipeline,), _ = space.pipelines(degrees)
        found, _ = space.starts(degrees, pipeline)
        taken = {start.order for start in found}
        stage_layers = (8 // degrees.pp,) * degrees.pp
        for start, sharding in product(found, space.shardings(degrees)):
            layout = replace(
                start.layout(stage_layers), sharding=sharding[0], shard_group=sharding[1]
            )
            every = [costs.stages(replace(layout, order=order)) for order in ORDERS]
            assert every[0] == every[1] or taken == {*ORDERS}
            are_two |= every[0] != every[1]
    assert are_two == (ranks > node)


def test_one_order_is_the_usual_one_unless_it_is_not_asked_for() -> None:
    (alone, *_), (both, *_) = (
        _starts(job(order=(order,)), Degrees(8, 1, 1)) for order in (ORDERS[1], DEFAULT_ORDER)
    )
    assert (alone.order, both.order) == (ORDERS[1], DEFAULT_ORDER)
    assert {start.order for start in _starts(job(), Degrees(8, 1, 1))} == {DEFAULT_ORDER}
    assert {start.order for start in _starts(job(), Degrees(4, 1, 2))} == {*ORDERS}


def _starts(asked: Job, degrees: Degrees) -> list[Start]:
    space = space_of(asked)
    pipelines, _ = space.pipelines(degrees)
    return space.starts(degrees, pipelines[0])[0]


def test_what_shards_and_recomputes_most_comes_last_whatever_the_job_says() -> None:
    asked = job(sharding=("zero3", "none", "zero1"), recompute=("full", "none"))
    assert space_of(asked).recomputations == ("none", "full")
    assert space_of(asked).shardings(Degrees(4, 2, 1)) == [
        ("none", 0), ("zero1", 0), ("zero1", 2), ("zero3", 0), ("zero3", 2),
    ]  # fmt: skip
    grouped = job(shard_group=(2,), sharding=("zero3",))
    assert space_of(grouped).shardings(Degrees(4, 2, 1)) == [("zero3", 2)]
    assert space_of(grouped).shardings(Degrees(1, 8, 1)) == []


def test_a_micro_batch_that_divides_nothing_says_so() -> None:
    asked = job(micro_batch=(3, 5))
    rejection = space_of(asked).rejection(Degrees(8, 1, 1))
    assert rejection is not None
    assert (rejection.rule, rejection.reason) == (
        "search limits",
        "a replica has 2 sequences; search.micro_batch must divide them, and allows 3, 5",
    )
    with pytest.raises(InfeasibleError, match=r"search\.micro_batch must divide them"):
        search(asked, reference_costs(asked))


def test_one_stage_has_no_order_of_its_own() -> None:
    asked = job(schedule=(SYNTHESISED,))
    none, [(rejection, num_layouts)] = space_of(asked).pipelines(Degrees(8, 1, 1))
    assert not none
    assert rejection.reason == (
        "pp is 1, which is one stage a rank; search.schedule allows synthesised only"
    )
    assert num_layouts == space_of(asked).num_layouts(Degrees(8, 1, 1)) > 1


def test_every_start_is_bounded_or_rejected_once() -> None:
    asked = job()
    costs, tally = reference_costs(asked), Tally()
    found = frontier(Space(asked, costs), basis_of(asked, costs), tally)
    layouts = [each.start.layout(each.stage_layers) for each in found]
    assert len({*layouts}) == len({(each.start) for each in found}) == len(found)
    bounds = [each.bound_ns for each in found]
    assert bounds == sorted(bounds)
    assert all(sum(each.stage_layers) == asked.model.num_layers for each in found)
    named: Counter[Layout] = Counter()
    for each in found:
        named[_open(each.start.layout())] += len(each.start.pipeline.schedules)
    assert named == Counter(_open(each) for each in starts(asked, costs))


def _open(layout: Layout) -> Layout:
    """Return a layout whose stages and schedule are open."""
    return replace(layout, stage_layers=(0,) * layout.num_stages, schedule="")
