"""Progress through checkpoints: closed forms against a walk from snapshot to snapshot."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.stories.checkpoints import Checkpoints, Progress, Snapshot


@dataclass(frozen=True)
class Job:
    step_ns: int
    num_steps: int
    checkpoints: Checkpoints

    def progress(self) -> Progress:
        return Progress(
            step_ns=self.step_ns, num_steps=self.num_steps, checkpoints=self.checkpoints
        )

    def walk(self) -> list[tuple[int, Snapshot]]:
        """Return when the work of each snapshot was there, and the snapshot, one by one."""
        saves, way = self.checkpoints, [(0, Snapshot(0, 0))]
        drained_ns = now_ns = done = 0
        while done < self.num_steps:
            steps = min(saves.every_steps, self.num_steps - done)
            done += steps
            arrival_ns = now_ns + steps * self.step_ns
            now_ns = max(arrival_ns, drained_ns) + saves.blocking_ns
            drained_ns = now_ns + saves.drain_ns
            way.append((arrival_ns, Snapshot(done * self.step_ns, now_ns)))
        return way


jobs = st.builds(
    Job,
    step_ns=st.integers(1, 9),
    num_steps=st.integers(1, 60),
    checkpoints=st.builds(
        Checkpoints,
        every_steps=st.integers(1, 12),
        blocking_ns=st.integers(0, 7),
        drain_ns=st.integers(0, 80),
    ),
)


@given(jobs, st.lists(st.integers(0, 1200), max_size=4))
def test_any_moment_is_that_of_the_walk(job: Job, cuts: list[int]) -> None:
    way, (*_, last) = job.progress(), job.walk()
    whole_ns = last[1].at_ns + job.checkpoints.drain_ns
    assert way.time_left_ns(0, pace_ns=job.step_ns) == whole_ns
    now_ns = 0
    for cut_ns in sorted(min(cut, whole_ns) for cut in cuts):
        way.advance(now_ns, cut_ns, pace_ns=job.step_ns)
        now_ns = cut_ns
        assert now_ns + way.time_left_ns(now_ns, pace_ns=job.step_ns) == whole_ns
        assert way.is_saved(now_ns) == (now_ns == whole_ns)
    taken = [snapshot for _, snapshot in job.walk() if snapshot.at_ns <= now_ns]
    arrivals = [arrival for arrival, _ in job.walk()]
    working_since_ns, at_work = taken[-1].at_ns, len(taken) < len(arrivals)
    worked_ns = min(now_ns, arrivals[len(taken)]) - working_since_ns if at_work else 0
    assert way.work_ns == taken[-1].work_ns + worked_ns
    assert way.stall_ns == now_ns - way.work_ns
    assert way.num_checkpoints == len(taken) - 1
    safe = [s for s in taken if s == way_start(s) or s.at_ns + job.checkpoints.drain_ns <= now_ns]
    lost_ns, saved = way.fall_back(now_ns)
    assert saved == safe[-1]
    assert lost_ns == taken[-1].work_ns + worked_ns - saved.work_ns


def way_start(snapshot: Snapshot) -> Snapshot | None:
    """Return `snapshot` if it is the start, which is safe from the beginning."""
    return snapshot if snapshot.work_ns == 0 else None


@given(jobs, st.lists(st.tuples(st.integers(0, 300), st.integers(1, 5)), max_size=5))
def test_slow_stretches_add_up(job: Job, stretches: list[tuple[int, int]]) -> None:
    way, now_ns = job.progress(), 0
    for length_ns, factor in stretches:
        pace_ns = factor * job.step_ns
        until_ns = now_ns + min(length_ns, way.time_left_ns(now_ns, pace_ns=pace_ns))
        way.advance(now_ns, until_ns, pace_ns=pace_ns)
        now_ns = until_ns
        assert now_ns == way.work_ns + way.slow_ns + way.stall_ns
    left_ns = way.time_left_ns(now_ns, pace_ns=job.step_ns)
    way.advance(now_ns, now_ns + left_ns, pace_ns=job.step_ns)
    assert way.is_finished
    assert way.is_saved(now_ns + left_ns)


def test_a_drain_that_fails_falls_back_to_the_checkpoint_before() -> None:
    job = Job(10, 100, Checkpoints(every_steps=10, blocking_ns=5, drain_ns=40))
    for moment_ns, saved in ((249, (100, 105)), (250, (200, 210)), (254, (200, 210))):
        way = job.progress()
        way.advance(0, moment_ns, pace_ns=10)
        assert way.fall_back(moment_ns)[1] == saved


def test_a_drain_longer_than_a_cycle_stalls_the_next_snapshot() -> None:
    way = Job(10, 40, Checkpoints(every_steps=10, blocking_ns=5, drain_ns=130)).progress()
    assert way.time_left_ns(0, pace_ns=10) == 100 + 5 + 3 * (130 + 5) + 130


@pytest.mark.parametrize(
    ("moment_ns", "deadline_ns", "end_ns"),
    [
        (33, 40 + 5 + 7, 52),  # the step ends at 40, then 5 of snapshot and 7 of drain
        (33, 40 + 5 + 6, 1000 + 10 * 5 + 7),  # one ns short: the job goes on
        (102, 105 + 7, 112),  # in the snapshot of step 10: that one will do
        (106, 115 + 5 + 7, 127),  # one step later
        (105, 112, 112),  # the snapshot is taken and need only drain
    ],
)
def test_a_planned_stop_saves_at_the_end_of_the_step(
    moment_ns: int, deadline_ns: int, end_ns: int
) -> None:
    way = Job(10, 100, Checkpoints(every_steps=10, blocking_ns=5, drain_ns=7)).progress()
    way.advance(0, moment_ns, pace_ns=10)
    way.stop_within(moment_ns, 10, deadline_ns)
    assert moment_ns + way.time_left_ns(moment_ns, pace_ns=10) == end_ns
    way.advance(moment_ns, end_ns, pace_ns=10)
    assert way.is_saved(end_ns)
    assert way.fall_back(end_ns)[0] == 0


@pytest.mark.parametrize("field", ["every_steps", "blocking_ns", "drain_ns"])
@pytest.mark.parametrize("value", [-1, 1.0, True, float("nan")])
def test_a_checkpoint_of_no_whole_length_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"checkpoints: {field} is {value}"):
        Checkpoints(**{"every_steps": 1, field: value})
