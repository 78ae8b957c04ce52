"""What holds for every test: none fails for being slow, since a first call may compile.

A bare `pytest` is spread over processes. A run of named files is not, so that a debugger, `-s` and
figures in seconds mean what they say there. A test that is marked `timed` measures the machine:
while it runs, no other process runs any.
"""

import fcntl
import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("all", deadline=None)
settings.register_profile("few", deadline=None, max_examples=30)

gc.disable()  # until all is imported: what imports make lives as long as the process

_MAX_PROCESSES = 4

# Any two files will do, to be locked.
_GATE, _ROOM = Path(__file__), Path(__file__).parent.parent / "pyproject.toml"


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Choose the processes of a bare run, before pytest-xdist reads its options."""
    option, num_processes = config.option, min(os.cpu_count() or 1, _MAX_PROCESSES)
    is_bare = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    is_open = getattr(option, "numprocesses", 0) is None and not option.usepdb
    # A worker comes here as well, and is to start no workers of its own.
    if is_bare and is_open and num_processes > 1 and not _is_worker(config):
        option.numprocesses, option.dist = num_processes, "worksteal"
        # Threads of several processes on the same cores would wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Try fewer examples where slow tests are left out."""
    settings.load_profile("few" if config.option.markexpr == "not slow" else "all")


def pytest_collection_finish() -> None:
    """Look for garbage from now on, but not among what is imported, which would take seconds."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest, so that no process ends long after the others."""
    if _is_worker(config):
        items.sort(key=lambda item: [not item.get_closest_marker(n) for n in ("timed", "slow")])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let tests of all processes run side by side, but one that is timed alone.

    Who waits to be alone holds the gate, so that tests of others cannot follow on each other.
    """
    if not _is_worker(item.config):
        return (yield)
    is_timed = item.get_closest_marker("timed") is not None
    with _GATE.open() as gate, _ROOM.open() as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if is_timed else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)
