"""Where the cases of a sweep are worked on: processes here, or a Dask or Ray cluster at hand.

A farm maps a function over texts. Only text crosses to the workers and back, never a pickled value:
what the function is given and what it returns are strings, and so is the trace of its exception.
"""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ensure_running
from typing import Protocol

from profiles.errors import InvalidInputError
from profiles.machine import num_usable_cores

Work = Callable[[str], str]
"""What a worker does: a function that a module of it has, from text to text."""

ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
        "NUMBA_NUM_THREADS",
    ),
    "1",
)  # fmt: skip
"""What holds a worker to one thread: there is one for each core already."""


class WorkerError(RuntimeError):
    """The function raised an exception in a worker; the message holds the worker's traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A task that was not done, since the worker did not live to do it; `reason` is why."""

    reason: str


Arrivals = Generator[tuple[int, str | Lost], None, None]


class Farm(Protocol):
    """Workers that the cases of a sweep are given to."""

    def map(self, function: Work, tasks: Sequence[str]) -> Arrivals:
        """Yield the place of each of `tasks` and what `function` makes of it, as they are done.

        To close the iterator early is to drop what is not done. Raises WorkerError where the
        function raises, and UnsupportedError where the workers cannot be had.
        """


def farm_named(name: str = "", num_jobs: int = 0) -> Farm:
    """Return the farm of a name: `processes`, `dask`, `ray`, or the last two with `=ADDRESS`.

    `num_jobs` is how many cases are worked on at a time; 0 takes as many as there are cores.

    >>> farm_named("dask=tcp://10.0.0.1:8786")
    DaskFarm(address='tcp://10.0.0.1:8786', num_jobs=0)
    """
    kind, equals, address = name.partition("=")
    if kind in ("", "processes") and not equals:
        return ProcessFarm(num_jobs=num_jobs or num_usable_cores())
    if kind not in ("dask", "ray") or (equals and not address):
        raise InvalidInputError(
            [
                f'--farm is "{name[:60]}"; it must be processes, dask, dask=ADDRESS, ray or '
                "ray=ADDRESS; for example --farm dask=tcp://10.0.0.1:8786"
            ]
        )
    from layline.farm_clusters import DaskFarm, RayFarm

    cluster = DaskFarm if kind == "dask" else RayFarm
    return cluster(address=address, num_jobs=num_jobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFarm:
    """Processes of this machine, as many as `num_jobs`; a killed one takes one task with it.

    They are forked from a process that has imported the function's module once, and is otherwise
    as new: no threads, no locks. So a worker is there in milliseconds, and its memory is shared.
    """

    num_jobs: int

    def map(self, function: Work, tasks: Sequence[str]) -> Arrivals:
        """See `Farm.map`."""
        again = []
        with closing(_served(function, tasks, range(len(tasks)), self.num_jobs)) as arriving:
            for place, outcome in arriving:
                if isinstance(outcome, Lost):
                    again.append(place)
                else:
                    yield place, outcome
        # Whoever was killed for want of memory may find enough of it alone; so what becomes of a
        # task does not depend on how many are done at a time.
        yield from _served(function, tasks, again, 1)


def _served(
    function: Work, tasks: Sequence[str], places: Sequence[int], num_workers: int
) -> Arrivals:
    """Yield what becomes of the tasks at `places`, of which `num_workers` are done at a time."""
    waiting, idle = list(reversed(places)), list[_Worker]()
    busy: dict[Connection, tuple[_Worker, int]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < num_workers:
                worker = idle.pop() if idle else _Worker.start(function)
                place = waiting.pop()
                busy[worker.connection] = worker, place
                worker.give(tasks[place])
            done = [busy.pop(ready) for ready in wait(list(busy)) if isinstance(ready, Connection)]
            for worker, place in done:
                outcome = worker.take()
                if isinstance(outcome, str):
                    idle.append(worker)
                yield place, outcome
    finally:
        workers = [*idle, *(worker for worker, _ in busy.values())]
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.end()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
    """A process that answers each text that it is sent with one."""

    process: BaseProcess
    connection: Connection

    @classmethod
    def start(cls, function: Work) -> "_Worker":
        """Return a new process; the first one waits for the imports, the others do not."""
        context = get_context("forkserver")
        context.set_forkserver_preload([function.__module__])
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        ensure_running()  # it would let signals in again if it started in the block
        with _environment(ONE_THREAD), _held_back(signal.SIGINT):
            process.start()
        theirs.close()
        return cls(process=process, connection=ours)

    def give(self, task: str) -> None:
        """Send a task; where nobody is there to read it, `take` finds that out."""
        with suppress(OSError):
            self.connection.send_bytes(task.encode())

    def take(self) -> str | Lost:
        """Return the answer, or how the process ended instead."""
        try:
            return heard(self.connection.recv_bytes().decode())
        except (EOFError, OSError):
            return Lost(reason=_how_it_ended(self.end()))

    def end(self) -> int:
        """Wait for the process to end; return its exit code."""
        self.process.join()
        self.connection.close()
        return self.process.exitcode or 0


def _serve(connection: Connection, function: Work) -> None:
    """Answer texts until nobody sends any."""
    os.environ.update(ONE_THREAD)
    threading.Thread(target=_follow_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            task = connection.recv_bytes().decode()
            connection.send_bytes(told(function, task).encode())


def _follow_parent() -> None:
    """End this process with the one that started it, even one that was killed."""
    parent = parent_process()
    assert parent is not None, "a worker is started by another process"
    wait([parent.sentinel])
    os._exit(1)


def _how_it_ended(exit_code: int) -> str:
    """Return how a process ended, by its exit code.

    >>> _how_it_ended(-9)
    'its process was killed by SIGKILL; the machine may lack memory'
    """
    if exit_code == -signal.SIGKILL:
        return "its process was killed by SIGKILL; the machine may lack memory"
    if exit_code < 0:
        return f"its process was ended by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started in the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """Hold a signal back in the block, and for good in processes that are started there.

    Ctrl-C goes to every process of a terminal; only the one that was asked for should answer.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def told(function: Work, task: str) -> str:
    """Return what `function` makes of `task`, or how it failed, as one text; for workers."""
    try:
        return f"+{function(task)}"
    except MemoryError:
        return "?its process found no more memory"
    except Exception:
        return f"!{traceback.format_exc()}"


def heard(text: str) -> str | Lost:
    """Return what a worker told of a task. Raises WorkerError where the function failed."""
    if text.startswith("!"):
        raise WorkerError(f"a worker failed:\n{text[1:]}")
    return Lost(reason=text[1:]) if text.startswith("?") else text[1:]
