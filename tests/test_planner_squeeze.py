"""Recomputation by need: as few layers as do, against counting up; and what ranks have left."""

from dataclasses import replace
from typing import get_args

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.layout import Layout
from planner.memory import Held, MemoryModel, peak_memory, stage_activation_bytes
from planner.schedules import SCHEDULES
from planner.setup import Setup
from planner.squeeze import Rooms, needs_of
from profiles.stack import Recompute, Sharding
from simulator.schedule import Schedule
from tests.setups import setups

Sizes = st.integers(0, 10**12)


def helds() -> st.SearchStrategy[Held]:
    """Draw what a rank holds, at any slack."""
    return st.builds(
        Held, parameters=Sizes, gradients=Sizes, optimizer=Sizes, buffers=Sizes, working=Sizes,
        update=Sizes, context=Sizes, slack=st.sampled_from((0.0, 0.02, 0.1)) | st.floats(0, 0.5),
        made=Sizes, kept=Sizes, host=st.just(0),
    )  # fmt: skip


@given(helds(), st.integers(0, 10**13))
def test_what_is_left_is_all_that_fits(held: Held, limit_bytes: int) -> None:
    left = held.left(limit_bytes)
    if left < 0:
        # Not even the update, or what is held all through.
        assert held._replace(working=0, made=0).peak(0).total > limit_bytes
    else:
        assert held.peak(left - held.temporary).total <= limit_bytes
        assert held.peak(max(left - held.temporary, held.update) + 1).total > limit_bytes


def fewest_by_counting(
    setup: Setup, layout: Layout, schedule: Schedule, limit_bytes: int
) -> list[int]:
    """Return the fewest recomputed layers of each stage that fit on each rank, -1 where none do."""
    found = [-1] * layout.pp
    for count in range(max(layout.stage_layers) + 1):
        again = tuple(min(count, held) for held in layout.stage_layers)
        memory = peak_memory(
            setup.model, setup.workload, replace(layout, recompute_layers=again), schedule,
            setup.stack, 10**9,
        )  # fmt: skip
        for rank, each in enumerate(memory):
            if found[rank] < 0 and each.total <= limit_bytes:
                found[rank] = count
    return found


@settings(max_examples=40)
@given(setups(), st.sampled_from(("selective", "full")), st.floats(-0.2, 1.2), st.integers(-1, 1))
def test_as_few_layers_are_recomputed_as_do(
    setup: Setup, kind: Recompute, share: float, off: int
) -> None:
    """Between what a layout holds as it is and with all recomputed, and a byte beside."""
    layout = replace(setup.layout, recompute=kind)
    assume(min(layout.stage_layers) > 0)
    schedule = SCHEDULES[layout.schedule].build(
        layout.pp, layout.num_microbatches, layout.stages_per_rank
    )
    everything = setup.model, setup.workload

    def worst(each: Layout) -> int:
        memory = peak_memory(*everything, each, schedule, setup.stack, 10**9)
        return max(rank.total for rank in memory)

    most, least = worst(replace(layout, recompute="none")), worst(layout)
    limit_bytes = round(least + share * (most - least)) + off
    homes = schedule.homes.tolist()
    held = MemoryModel(*everything, layout, homes, setup.stack)
    rooms = Rooms.of(
        [held.held(layout, 10**9)], held.alike, np.full(layout.pp, limit_bytes), host=1 << 60
    )
    kept, again = (
        np.array(stage_activation_bytes(*everything, each, setup.stack))
        for each in (replace(layout, recompute="none"), layout)
    )
    needs = needs_of(schedule, np.array(layout.stage_layers), kept, again)
    (counts,), (fits,) = needs.fewest(rooms)
    expected = fewest_by_counting(setup, layout, schedule, limit_bytes)
    assert fits == (min(expected) >= 0) == (least <= limit_bytes)
    assert needs.least_bytes(rooms).tolist() == [least]
    if fits:
        assert counts.tolist() == [
            min(expected[home], layers)
            for home, layers in zip(homes, layout.stage_layers, strict=True)
        ]


@settings(max_examples=20)
@given(setups(), st.lists(st.integers(10**9, 10**11), min_size=4, max_size=4))
def test_ranks_with_memories_of_their_own_are_as_each_alone(
    setup: Setup, limits: list[int]
) -> None:
    layout = setup.layout
    homes = np.tile(np.arange(layout.pp), layout.stages_per_rank)
    ranks = MemoryModel(setup.model, setup.workload, layout, homes.tolist(), setup.stack)
    held = [ranks.held(replace(layout, sharding=each), 10**9) for each in get_args(Sharding)]
    own = np.array(limits[: layout.pp])
    rooms = Rooms.of(held, ranks.alike, own, host=1 << 60)
    for row, kinds in enumerate(held):
        for rank, kind in enumerate(ranks.alike.tolist()):
            assert rooms.left[row, rank] == kinds[kind].left(limits[rank], 1 << 60)
            assert rooms.static[row, rank] == kinds[kind].static
    assert (rooms.more + own.min()).tolist() == own.tolist()
    assert rooms.rows(np.array([2])).made.tolist() == [rooms.made[2].tolist()]
