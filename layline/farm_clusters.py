"""The farms that are a cluster which the user already has: Dask and Ray.

Neither is needed by this project; each is imported when it is asked for. No cluster is started
here, and none is stopped.
"""

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from layline import __version__
from layline.farm import ONE_THREAD, Arrivals, Lost, Work, heard, told
from profiles.errors import UnsupportedError

CONNECT_SECONDS = 15
MIN_IN_FLIGHT = 64
"""How many tasks are sent ahead at least: a cluster that grows does so for what it has to do."""

# Neither library has annotations that could be seen where it is not installed.
Handle = Any
"""What a library gives for a task that was sent: a Dask Future, a Ray ObjectRef."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaskFarm:
    """A Dask cluster, by the address of its scheduler, or else as Dask's own configuration says.

    Of `num_jobs` tasks at a time; 0 leaves that to the cluster.
    """

    address: str
    num_jobs: int

    def map(self, function: Work, tasks: Sequence[str]) -> Arrivals:
        """See `layline.farm.Farm.map`."""
        distributed = _library("distributed", "Dask")
        with self._client(distributed) as client:
            num_cores = sum(client.nthreads().values())

            def ready(sent: list[Handle]) -> Sequence[Handle]:
                try:
                    with client.as_current():
                        return list(distributed.wait(sent, return_when="FIRST_COMPLETED").done)
                except CancelledError:
                    return [future for future in sent if future.cancelled()]

            yield from _windowed(
                tasks,
                self.num_jobs or max(MIN_IN_FLIGHT, 2 * num_cores),
                # A pure function is not run again for what it was given before, whatever changed.
                send=lambda task: client.submit(told, function, task, pure=False),
                ready=ready,
                take=lambda future: _dask_outcome(distributed, future),
                drop=client.cancel,
            )

    @contextmanager
    def _client(self, distributed: Any) -> Iterator[Any]:
        address = self.address or import_module("dask").config.get("scheduler-address", None)
        if not address:
            # A client without an address would start a cluster of its own, and listen.
            raise UnsupportedError(
                "--farm dask: Dask's configuration names no scheduler; give its address, as in "
                "--farm dask=tcp://10.0.0.1:8786, or set DASK_SCHEDULER_ADDRESS"
            )
        _check_answered("Dask scheduler", address)
        try:
            client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise _unreachable("Dask scheduler", address, error) from None
        with client:
            yield client


def _dask_outcome(distributed: Any, future: Handle) -> str | Lost:
    try:
        text = future.result()
    except distributed.KilledWorker:
        return Lost(reason="its workers were killed; the machine may lack memory")
    except CancelledError:
        return Lost(reason="the connection to its cluster was lost")
    except Exception as error:  # not one of the function, which is told of in the text
        raise _without_us("Dask", error.__cause__ or error) from None
    return heard(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayFarm:
    """A Ray cluster, by its address, or else the one that this machine is a node of.

    Of `num_jobs` tasks at a time; 0 leaves that to the cluster.
    """

    address: str
    num_jobs: int

    def map(self, function: Work, tasks: Sequence[str]) -> Arrivals:
        """See `layline.farm.Farm.map`."""
        ray = _library("ray", "Ray")
        with self._connection(ray):
            num_cores = round(ray.cluster_resources().get("CPU", 0))
            remote = ray.remote(told).options(num_cpus=1, max_retries=1)
            yield from _windowed(
                tasks,
                self.num_jobs or max(MIN_IN_FLIGHT, 2 * num_cores),
                send=lambda task: remote.remote(function, task),
                ready=lambda sent: ray.wait(sent, num_returns=1)[0],
                take=lambda reference: _ray_outcome(ray, reference),
                drop=lambda sent: [ray.cancel(each, force=True) for each in sent],
            )

    @contextmanager
    def _connection(self, ray: Any) -> Iterator[None]:
        """Be connected in the block; a connection that the program has made is used, and left."""
        if ray.is_initialized():
            yield
            return
        address = self.address or os.environ.get("RAY_ADDRESS") or "auto"
        if address != "auto":
            _check_answered("Ray cluster", address)
        try:
            ray.init(
                address=address, log_to_driver=False, logging_level="ERROR",
                runtime_env={"env_vars": ONE_THREAD},
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreachable("Ray cluster", address, error) from None
        try:
            yield
        finally:
            ray.shutdown()


def _ray_outcome(ray: Any, reference: Handle) -> str | Lost:
    try:
        text = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise _without_us("Ray", error.cause) from None
    except ray.exceptions.RayError as error:
        return Lost(reason=f"its worker was lost ({type(error).__name__})")
    return heard(text)


def _windowed(
    tasks: Sequence[str],
    num_in_flight: int,
    *,
    send: Callable[[str], Handle],
    ready: Callable[[list[Handle]], Sequence[Handle]],
    take: Callable[[Handle], str | Lost],
    drop: Callable[[list[Handle]], object],
) -> Arrivals:
    """Yield what becomes of `tasks`, with `num_in_flight` of them sent and not yet taken.

    `ready` waits for one that was sent, or more; `drop` is told of all that nobody waits for.
    """
    waiting = iter(enumerate(tasks))
    sent: dict[Handle, int] = {}
    try:
        while True:
            for place, task in waiting:
                sent[send(task)] = place
                if len(sent) >= num_in_flight:
                    break
            if not sent:
                return
            for handle in ready(list(sent)):
                place = sent.pop(handle)
                yield place, take(handle)
    finally:
        drop(list(sent))


def _library(name: str, what: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UnsupportedError(
            f"--farm {what.lower()} needs {what}; install it with: pip install {name}"
        ) from None


def _check_answered(what: str, address: str) -> None:
    """Raise UnsupportedError where nobody listens: the libraries themselves try for minutes."""
    found = re.fullmatch(r"(?:[a-z]+://)?\[?([^][/]+)\]?:([0-9]+)", address)
    if not found:
        raise _unreachable(what, address, ValueError("no address, as host:port is one"))
    try:
        socket.create_connection((found[1], int(found[2])), CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise _unreachable(what, address, error) from None


def _unreachable(what: str, address: str, error: Exception) -> UnsupportedError:
    reason = " ".join(str(error).split())[:200]
    return UnsupportedError(
        f"--farm: no {what} can be used at {address} ({reason}); start one, or give its address"
    )


def _without_us(what: str, error: BaseException) -> UnsupportedError:
    reason = " ".join(str(error).split())[:200]
    return UnsupportedError(
        f"--farm: the {what} cluster cannot plan ({reason}); its scheduler and workers need the "
        f"same layline: pip install layline=={__version__}"
    )
