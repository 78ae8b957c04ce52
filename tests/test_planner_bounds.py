"""Bounds of a step, against the walk of every named schedule with any times."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.bounds import Columns, Pipelines, elapsed, ranks_ns
from planner.lower import AFTER
from planner.partition import homes_of
from planner.schedules import SCHEDULES, Family
from simulator.engine import step_ns
from simulator.schedule import Schedule
from simulator.step import step_times

Ns = st.integers(0, 50)


@st.composite
def orders(draw: st.DrawFn) -> tuple[Family, Schedule]:
    """Draw a schedule of any family, of few ranks and micro-batches."""
    family = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    chunks = family.stages_per_rank or draw(st.integers(2, 3))
    return family, family.build(draw(st.integers(1, 4)), draw(st.integers(1, 9)), chunks)


@st.composite
def columns(draw: st.DrawFn, num_stages: int) -> Columns:
    """Draw the times of one layout; a weight half is part of its backward."""

    def some() -> list[int]:
        return draw(st.lists(Ns, min_size=num_stages, max_size=num_stages))

    table = {name: np.array([some()]) for name in Columns._fields}
    table["weight"] = np.minimum(table["weight"], table["backward"])
    table["send_forward"][:, -1] = table["send_backward"][:, 0] = 0
    return Columns(**table)


def walked(schedule: Schedule, times: Columns) -> int:
    """Return the step of one layout, by the walk of its schedule."""
    ns = {name: column[0] for name, column in times._asdict().items()}
    is_first = np.zeros(schedule.num_stages, bool)
    is_first[np.unique(schedule.homes, return_index=True)[1]] = True
    other = np.where(is_first, ns.pop("other"), 0)
    after = {kind: ns.pop(kind) for kind in AFTER}
    return int(
        step_ns(
            schedule, step_times(schedule.num_stages, before={"other": other}, after=after, **ns)
        )[0]
    )


@settings(max_examples=300)
@given(st.data(), orders())
def test_no_schedule_is_faster_than_the_bound(
    data: st.DataObject, order: tuple[Family, Schedule]
) -> None:
    family, schedule = order
    times = data.draw(columns(schedule.num_stages))
    m, homes = schedule.num_microbatches, schedule.homes.astype(np.int64)
    step = walked(schedule, times)
    (bound,) = times.bounds_ns(homes, m, splits=family.splits)
    assert bound <= step
    # What may split its backwards can do all that what may not can do.
    (splitting,) = times.bounds_ns(homes, m, splits=True)
    assert splitting <= bound


@settings(max_examples=100)
@given(st.data(), orders())
def test_no_rank_is_done_before_its_bound(
    data: st.DataObject, order: tuple[Family, Schedule]
) -> None:
    family, schedule = order
    times = data.draw(columns(schedule.num_stages))
    nothing = np.zeros_like(times.other)
    bare = times._replace(all_reduce=nothing, optimizer=nothing, other=nothing, wait=nothing)
    message = data.draw(Ns)
    crossing = np.full_like(nothing, message)
    bare = bare._replace(send_forward=crossing, send_backward=crossing)
    forward, backward, weight = (column.astype(np.float64) for column in bare[:3])
    stages = Pipelines(forward, backward, weight, np.array([message], np.float64))
    m = np.array([schedule.num_microbatches])
    ends = ranks_ns(schedule.homes.astype(np.int64), stages, m, splits=family.splits)
    for rank in range(schedule.num_ranks):
        alone = np.where(schedule.homes == rank, 1 << 40, 0)[None, :]
        # With so long an epilogue the step is that of this rank.
        num_stages = int((schedule.homes == rank).sum())
        step = walked(schedule, bare._replace(all_reduce=alone))
        assert ends[0, rank] <= step - num_stages * (1 << 40)


@given(
    p=st.integers(1, 8), m=st.integers(1, 16), forward=st.integers(1, 50),
    backward=st.integers(1, 90),
)  # fmt: skip
def test_equal_stages_of_1f1b_take_just_their_bound(
    p: int, m: int, forward: int, backward: int
) -> None:
    """(m + p - 1) (F + B) without messages: the bound of every rank."""
    shape = 1, p
    stages = Pipelines(
        np.full(shape, float(forward)), np.full(shape, float(backward)), np.zeros(shape),
        np.zeros(1),
    )  # fmt: skip
    ends = ranks_ns(np.arange(p), stages, np.array([m]), splits=False)
    expected = (m + p - 1) * (forward + backward)
    assert ends.max() == expected
    schedule = SCHEDULES["1f1b"].build(p, m)
    times = step_times(
        p, forward=forward, backward=backward, weight=0, send_forward=0, send_backward=0
    )
    assert step_ns(schedule, times).tolist() == [expected]


@given(st.data(), st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4), st.integers(1, 5))
def test_layouts_side_by_side_are_bounded_as_one_by_one(
    data: st.DataObject, name: str, ranks: int, num_layouts: int
) -> None:
    family = SCHEDULES[name]
    chunks = family.stages_per_rank or 2
    homes = homes_of(ranks, chunks, family.homes)
    rows = [data.draw(columns(len(homes))) for _ in range(num_layouts)]
    beside = Columns(*(np.concatenate(each) for each in zip(*rows, strict=True)))
    found = beside.bounds_ns(homes, 3, splits=family.splits)
    alone = [row.bounds_ns(homes, 3, splits=family.splits)[0] for row in rows]
    assert found.tolist() == alone
    assert [beside.row(place).forward.tolist() for place in range(num_layouts)] == [
        row.forward.tolist() for row in rows
    ]


@given(st.floats(0, 1e12), st.floats(0, 1e12))
def test_what_runs_ahead_takes_no_less_than_the_slower_and_at_most_a_sixteenth_more(
    device: float, host: float
) -> None:
    (found,) = elapsed(np.array([device]), np.array([host])).tolist()
    slower = max(device, host)
    assert slower * (1 - 1e-12) <= found <= slower * 2 ** (1 / 12) * (1 + 1e-12)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_stages_live_where_the_family_says(name: str) -> None:
    family = SCHEDULES[name]
    for chunks in (family.stages_per_rank,) if family.stages_per_rank else (2, 4):
        schedule = family.build(3, 5, chunks)
        assert homes_of(3, chunks, family.homes).tolist() == schedule.homes.tolist()
        halves = any(action.kind == "W" for rank in schedule.ranks for action in rank)
        assert halves == family.splits
