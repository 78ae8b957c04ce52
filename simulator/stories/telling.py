"""The world of a story in SimPy: the job, the weather that strikes it, nodes that return."""

from collections import Counter, deque
from collections.abc import Generator
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import simpy

from simulator.stories.checkpoints import Progress
from simulator.stories.job import Cause, Phase, PhaseSpan, Story, StorySpec, Strike
from simulator.stories.strikes import NEVER_NS, Clocks, Outage, Slowdown

Process = Generator[simpy.Event, Any, None]
FixedPhase = Literal["detection", "restart", "maintenance"]


class Notice(NamedTuple):
    """A node that says when it will go."""

    kind: int
    deadline_ns: int


class Alarm:
    """Lets one process sleep until a moment, or until somebody rings.

    An interrupt is cheaper than waiting for two events, and here it cannot be lost or come twice:
    who is awake is not woken, and looks at the world before it sleeps again.
    """

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._sleeper: simpy.Process | None = None

    def sleep(self, ns: int) -> Process:
        """Let the process that asks sleep for at most `ns`."""
        self._sleeper = self._env.active_process
        with suppress(simpy.Interrupt):
            yield self._env.timeout(ns)
        self._sleeper = None

    def ring(self) -> None:
        """Wake the sleeper, if there is one."""
        if self._sleeper is not None:
            self._sleeper.interrupt()
            self._sleeper = None


class Telling:
    """One story under way.

    The job is one process that sleeps until its next own event or until its alarm rings; then it
    looks at the world. Whoever changes the world in a way that may concern it rings.
    """

    def __init__(self, spec: StorySpec, seed: int, num_kept: int) -> None:
        self._spec = spec
        self._seed = seed
        self._env = simpy.Environment()
        self._job_alarm, self._weather_alarm = Alarm(self._env), Alarm(self._env)
        self._clocks = Clocks(spec.disturbances, spec.num_nodes, seed)
        self._awaited_ns = 0
        self._phase: Phase = "waiting"
        self._phase_began_ns = 0
        self._progress = Progress(
            step_ns=spec.step_ns, num_steps=spec.num_steps, checkpoints=spec.checkpoints
        )
        self._lost_ns: dict[Cause, int] = dict.fromkeys(
            ("checkpoint", "rework", "slow", "detection", "waiting", "restart", "maintenance"), 0
        )
        self._is_dead = False
        self._detection_ns = 0
        self._is_maintenance_due = False
        self._num_spares = spec.num_spares
        self._num_away = self._most_away = 0
        self._num_starts = 0
        self._vacant: deque[int] = deque()
        self._leaving: dict[int, Notice] = {}
        self._slow: dict[tuple[int, int], int] = {}
        self._num_strikes = Counter({kind.name: 0 for kind in spec.disturbances})
        self._num_kept = num_kept
        self._spans: list[PhaseSpan] = []
        self._strikes: list[Strike] = []

    def story(self) -> Story:
        """Tell it to its end."""
        job = self._env.process(self._job())
        self._env.process(self._weather())
        if self._spec.maintenance:
            self._env.process(self._plan_maintenance())
        self._env.run(until=job)
        progress, wall_ns = self._progress, self._now_ns
        self._lost_ns["checkpoint"], self._lost_ns["slow"] = progress.stall_ns, progress.slow_ns
        return Story(
            seed=self._seed,
            is_finished=progress.is_finished,
            wall_ns=wall_ns,
            useful_ns=progress.work_ns,
            lost_ns=self._lost_ns,
            num_strikes=dict(self._num_strikes),
            num_restarts=max(0, self._num_starts - 1),
            num_checkpoints=progress.num_checkpoints,
            most_away=self._most_away,
            spans=tuple(self._spans),
            strikes=tuple(self._strikes),
        )

    @property
    def _now_ns(self) -> int:
        # Integer delays keep SimPy's clock an integer; its type says float.
        return int(self._env.now)

    @property
    def _is_over(self) -> bool:
        return self._now_ns >= self._spec.horizon_ns

    # The job: one phase after the other.

    def _job(self) -> Process:
        while not (self._is_over or self._progress.is_finished):
            yield from self._gather()
            yield from self._restart()
            yield from self._train()
            yield from self._detect()

    def _gather(self) -> Process:
        while (self._vacant or self._is_maintenance_due) and not self._is_over:
            if self._is_maintenance_due:
                assert self._spec.maintenance
                yield from self._spend("maintenance", self._spec.maintenance.takes_ns)
                self._is_maintenance_due = False
            else:
                self._enter("waiting")
                yield from self._sleep(self._spec.horizon_ns)
                self._lost_ns["waiting"] += self._leave()

    def _restart(self) -> Process:
        self._is_dead, self._detection_ns = False, 0
        if not self._is_over:
            self._num_starts += 1
            yield from self._spend("restart", self._spec.restart_ns)

    def _detect(self) -> Process:
        yield from self._spend("detection", self._detection_ns)

    def _train(self) -> Process:
        if self._is_dead or self._is_over:
            return
        progress = self._progress
        self._enter("training")
        progress.restart(self._now_ns)
        while not (self._is_dead or self._is_over or progress.is_saved(self._now_ns)):
            begin_ns, pace_ns = self._now_ns, self._pace_ns()
            left_ns = progress.time_left_ns(begin_ns, pace_ns=pace_ns)
            yield from self._sleep(begin_ns + left_ns)
            progress.advance(begin_ns, self._now_ns, pace_ns=pace_ns)
            self._heed_notices()
        lost_ns, saved = progress.fall_back(self._now_ns)
        self._lost_ns["rework"] += lost_ns
        self._leave(saved.at_ns if lost_ns else None)
        for node, notice in list(self._leaving.items()):
            self._take_down(notice.kind, node)

    def _heed_notices(self) -> None:
        """Plan to save and stop where the next node to go, or maintenance, leaves time for it."""
        if self._leaving or self._is_maintenance_due:
            deadlines = [notice.deadline_ns for notice in self._leaving.values()]
            deadline_ns = min(deadlines, default=NEVER_NS)
            self._progress.stop_within(self._now_ns, self._pace_ns(), deadline_ns)

    def _pace_ns(self) -> int:
        return max((self._spec.pace_ns(kind) for kind, _ in self._slow), default=self._spec.step_ns)

    def _spend(self, phase: FixedPhase, ns: int) -> Process:
        """Pass a phase of fixed length; a restart is cut short when the job dies in it."""
        self._enter(phase)
        end_ns = self._now_ns + ns
        while self._now_ns < end_ns and not self._is_over:
            yield from self._sleep(end_ns)
            if phase == "restart" and self._is_dead:
                break
        self._lost_ns[phase] += self._leave()

    def _sleep(self, until_ns: int) -> Process:
        """Sleep until a moment, the horizon or the alarm."""
        until_ns = min(until_ns, self._spec.horizon_ns)
        yield from self._job_alarm.sleep(until_ns - self._now_ns)

    def _enter(self, phase: Phase) -> None:
        self._phase, self._phase_began_ns = phase, self._now_ns

    def _leave(self, saved_at_ns: int | None = None) -> int:
        """Note the phase that ends; of training, what came after `saved_at_ns` is lost."""
        begin_ns, end_ns = self._phase_began_ns, self._now_ns
        pieces = [PhaseSpan(self._phase, begin_ns, end_ns)]
        if saved_at_ns is not None:
            pieces = [
                PhaseSpan("training", begin_ns, saved_at_ns),
                PhaseSpan("lost", saved_at_ns, end_ns),
            ]
        for span in pieces:
            if span.begin_ns < span.end_ns and len(self._spans) < self._num_kept:
                self._spans.append(span)
        return end_ns - begin_ns

    # The weather: strikes, notices, and nodes that go and return.

    def _weather(self) -> Process:
        while True:
            self._awaited_ns, kind, node = self._clocks.first()
            if self._awaited_ns <= self._now_ns:
                self._strike(kind, node)
                continue
            until_ns = min(self._awaited_ns, self._spec.horizon_ns + 1)
            yield from self._weather_alarm.sleep(until_ns - self._now_ns)

    def _strike(self, kind: int, node: int) -> None:
        disturbance = self._spec.disturbances[kind]
        self._num_strikes[disturbance.name] += 1
        if len(self._strikes) < self._num_kept:
            self._strikes.append(Strike(self._now_ns, disturbance.name, node, self._phase))
        if isinstance(disturbance, Slowdown):
            self._clocks.stop(kind, node)
            self._env.process(self._slow_spell(kind, node, disturbance.lasts_ns))
        elif disturbance.notice_ns and self._phase == "training":
            self._clocks.stop(kind, node)
            # A node that is about to go already goes then, whatever else is announced.
            if node not in self._leaving:
                self._env.process(self._go_after(kind, node, disturbance.notice_ns))
        else:
            self._take_down(kind, node)
            self._die(disturbance.detection_ns)

    def _slow_spell(self, kind: int, node: int, lasts_ns: int) -> Process:
        end_ns = self._slow[kind, node] = self._now_ns + lasts_ns
        self._job_alarm.ring()
        yield self._env.timeout(lasts_ns)
        # The node may have been replaced since, and its successor may be slow again.
        if self._slow.get((kind, node)) == end_ns:
            del self._slow[kind, node]
            self._await(self._clocks.begin(kind, node, self._now_ns))
            self._job_alarm.ring()

    def _go_after(self, kind: int, node: int, notice_ns: int) -> Process:
        notice = self._leaving[node] = Notice(kind, self._now_ns + notice_ns)
        self._job_alarm.ring()
        yield self._env.timeout(notice_ns)
        if self._leaving.get(node) is notice:
            self._take_down(kind, node)
            self._die(0)

    def _plan_maintenance(self) -> Process:
        assert self._spec.maintenance
        while True:
            yield self._env.timeout(self._spec.maintenance.every_ns)
            self._is_maintenance_due = True
            if self._phase == "restart":
                self._die(0)
            self._job_alarm.ring()

    def _die(self, detection_ns: int) -> None:
        """Kill the job where it is alive; among deaths of one moment the slowest to see counts."""
        if self._phase in ("training", "restart"):
            self._is_dead = True
            self._detection_ns = max(self._detection_ns, detection_ns)
            self._job_alarm.ring()

    def _take_down(self, kind: int, node: int) -> None:
        outage = self._spec.disturbances[kind]
        assert isinstance(outage, Outage)
        if not outage.away_ns:
            self._await(self._clocks.begin(kind, node, self._now_ns))
            return
        self._clocks.stop_node(node)
        self._leaving.pop(node, None)
        for key in [key for key in self._slow if key[1] == node]:
            del self._slow[key]
        self._vacant.append(node)
        self._num_away += 1
        self._most_away = max(self._most_away, self._num_away)
        self._env.process(self._come_back(outage.away_ns))
        self._fill_places()

    def _come_back(self, away_ns: int) -> Process:
        yield self._env.timeout(away_ns)
        self._num_away -= 1
        self._num_spares += 1
        self._fill_places()

    def _fill_places(self) -> None:
        while self._vacant and self._num_spares:
            self._num_spares -= 1
            node = self._vacant.popleft()
            self._await(self._clocks.begin_node(node, self._now_ns))
        if not self._vacant and self._phase == "waiting":
            self._job_alarm.ring()

    def _await(self, strike_ns: int) -> None:
        """Let the weather look again if this strike comes before the one that it waits for."""
        if strike_ns < self._awaited_ns:
            self._weather_alarm.ring()
