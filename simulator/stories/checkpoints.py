"""How far a job that writes checkpoints has come: weeks of steps in closed form, to the ns."""

from dataclasses import dataclass
from typing import NamedTuple

from simulator.stories.strikes import check_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """A checkpoint every `every_steps` steps and one after the last step.

    Each stops the job for `blocking_ns` (a snapshot is taken), then drains to storage for
    `drain_ns` while the job goes on; until it has drained, a failure falls back to the one before.
    One drains at a time: a snapshot that comes too early waits, and the wait stalls the job.
    """

    every_steps: int
    blocking_ns: int = 0
    drain_ns: int = 0

    def __post_init__(self) -> None:
        check_whole("checkpoints: every_steps", self.every_steps, least=1)
        check_whole("checkpoints: blocking_ns", self.blocking_ns)
        check_whole("checkpoints: drain_ns", self.drain_ns)


class Snapshot(NamedTuple):
    """The work that a checkpoint holds, and the moment at which the job went on, in ns."""

    work_ns: int
    at_ns: int


class Progress:
    """The way through `num_steps` steps. Work is measured in ns at full speed.

    A cycle of k steps at a pace of s ns each, with blocking part C and drain D, takes
    max(k s, D) + C. Times in which nothing happens but such cycles are skipped by one division.

    >>> saves = Checkpoints(every_steps=10, blocking_ns=3)
    >>> way = Progress(step_ns=5, num_steps=100, checkpoints=saves)
    >>> way.time_left_ns(0, pace_ns=5)
    530
    >>> way.advance(0, 119, pace_ns=5)
    >>> way.fall_back(119)
    (13, Snapshot(work_ns=100, at_ns=106))
    """

    def __init__(self, *, step_ns: int, num_steps: int, checkpoints: Checkpoints) -> None:
        self.slow_ns = 0
        self.stall_ns = 0
        self.num_checkpoints = 0
        self._step_ns = step_ns
        self._total_ns = step_ns * num_steps
        self._steps = checkpoints.every_steps
        self._block_ns = checkpoints.blocking_ns
        self._drain_ns = checkpoints.drain_ns
        self._begin_at(Snapshot(0, 0))

    def _begin_at(self, saved: Snapshot) -> None:
        self._end_ns = self._total_ns
        self.work_ns = saved.work_ns
        self._latest = self._previous = saved
        self._drained_at_ns = saved.at_ns
        self._block_ends_ns = -1

    def restart(self, now_ns: int) -> None:
        """Go on from the checkpoint that is loaded."""
        self._begin_at(Snapshot(self.work_ns, now_ns))

    def is_saved(self, now_ns: int) -> bool:
        """Whether all work up to the end, or up to the planned stop, is safe on storage."""
        return self._latest.work_ns == self._end_ns and self._drained_at_ns <= now_ns

    @property
    def is_finished(self) -> bool:
        """Whether all work is done; after `fall_back` it is safe on storage, too."""
        return self.work_ns == self._total_ns

    def fall_back(self, now_ns: int) -> tuple[int, Snapshot]:
        """Lose what no checkpoint on storage holds; returns the loss and that checkpoint."""
        is_drained = self._drained_at_ns <= now_ns
        saved = self._latest if is_drained else self._previous
        lost_ns = self.work_ns - saved.work_ns
        self.work_ns = saved.work_ns
        return lost_ns, saved

    def stop_within(self, now_ns: int, pace_ns: int, deadline_ns: int) -> None:
        """Plan to save at the end of this step and to stop, if that is done by the deadline."""
        boundary_ns = -(-self.work_ns // self._step_ns) * self._step_ns
        if now_ns + self._time_to_ns(boundary_ns, now_ns, pace_ns) <= deadline_ns:
            self._end_ns = boundary_ns

    def time_left_ns(self, now_ns: int, *, pace_ns: int) -> int:
        """Return how long it takes, undisturbed, until `is_saved`."""
        return self._time_to_ns(self._end_ns, now_ns, pace_ns)

    def _time_to_ns(self, end_ns: int, now_ns: int, pace_ns: int) -> int:
        if self._latest.work_ns == end_ns:
            return max(0, self._drained_at_ns - now_ns)
        goal_ns = self._goal_ns(end_ns)
        block_ends_ns = self._block_ends_ns
        if block_ends_ns < 0:
            block_ends_ns = self._block_after_ns(self._arrival_ns(goal_ns, now_ns, pace_ns))
        num_cycles, rest_ns = divmod(end_ns - goal_ns, self._steps * self._step_ns)
        left_ns = block_ends_ns - now_ns + num_cycles * self._cycle_ns(self._steps, pace_ns)
        if rest_ns:
            left_ns += self._cycle_ns(rest_ns // self._step_ns, pace_ns)
        return left_ns + self._drain_ns

    def advance(self, begin_ns: int, end_ns: int, *, pace_ns: int) -> None:
        """Let the job work from `begin_ns` to `end_ns` with steps of `pace_ns`."""
        now_ns = begin_ns
        while self._latest.work_ns < self._end_ns:
            if self._block_ends_ns < 0:
                goal_ns = self._goal_ns(self._end_ns)
                arrival_ns = self._arrival_ns(goal_ns, now_ns, pace_ns)
                if arrival_ns > end_ns:
                    gained_ns = (end_ns - now_ns) * self._step_ns // pace_ns
                    self._work(gained_ns, end_ns - now_ns)
                    return
                self._work(goal_ns - self.work_ns, arrival_ns - now_ns)
                now_ns = arrival_ns
                self._block_ends_ns = self._block_after_ns(now_ns)
            if self._block_ends_ns > end_ns:
                break
            self.stall_ns += self._block_ends_ns - now_ns
            now_ns = self._block_ends_ns
            self._block_ends_ns = -1
            self._save(self._latest, Snapshot(self.work_ns, now_ns), 1)
            now_ns = self._skip_cycles(now_ns, end_ns, pace_ns)
        self.stall_ns += end_ns - now_ns

    def _skip_cycles(self, now_ns: int, end_ns: int, pace_ns: int) -> int:
        """Pass all whole cycles that fit before `end_ns`; returns the moment reached.

        Work stands at a snapshot: at a multiple of a cycle's, or at its end with no room left.
        """
        cycle_ns, cycle_work_ns = self._cycle_ns(self._steps, pace_ns), self._steps * self._step_ns
        room_ns = self._end_ns - self.work_ns
        num_cycles = min((end_ns - now_ns) // cycle_ns, room_ns // cycle_work_ns)
        if num_cycles:
            worked_ns = num_cycles * self._steps * pace_ns
            self._work(num_cycles * cycle_work_ns, worked_ns)
            self.stall_ns += num_cycles * cycle_ns - worked_ns
            now_ns += num_cycles * cycle_ns
            latest = Snapshot(self.work_ns, now_ns)
            before = Snapshot(latest.work_ns - cycle_work_ns, now_ns - cycle_ns)
            self._save(before, latest, num_cycles)
        return now_ns

    def _work(self, gained_ns: int, passed_ns: int) -> None:
        self.work_ns += gained_ns
        self.slow_ns += passed_ns - gained_ns

    def _save(self, previous: Snapshot, latest: Snapshot, count: int) -> None:
        self._previous, self._latest = previous, latest
        self._drained_at_ns = latest.at_ns + self._drain_ns
        self.num_checkpoints += count

    def _goal_ns(self, end_ns: int) -> int:
        cycle_work_ns = self._steps * self._step_ns
        return min((self._latest.work_ns // cycle_work_ns + 1) * cycle_work_ns, end_ns)

    def _arrival_ns(self, goal_ns: int, now_ns: int, pace_ns: int) -> int:
        return now_ns - (self.work_ns - goal_ns) * pace_ns // self._step_ns

    def _block_after_ns(self, arrival_ns: int) -> int:
        return max(arrival_ns, self._drained_at_ns) + self._block_ns

    def _cycle_ns(self, num_steps: int, pace_ns: int) -> int:
        return max(num_steps * pace_ns, self._drain_ns) + self._block_ns
