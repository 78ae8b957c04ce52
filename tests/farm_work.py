"""What workers of a farm do in tests: functions from text to text, which they import by name."""

import json
import os
import signal
import time
from pathlib import Path


def shout(text: str) -> str:
    return text.upper()


def nap(text: str) -> str:
    """Take as many seconds as `text` says."""
    time.sleep(float(text))
    return text


def fail(text: str) -> str:
    raise ValueError(f"cannot do {text}")


def threads(_text: str) -> str:
    """Tell how many threads numerical libraries are allowed."""
    return json.dumps({name: os.environ.get(name) for name in ("OMP_NUM_THREADS",)})


def die_of(text: str) -> str:
    """Be killed as the system kills who takes too much memory, where `text` says so."""
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return text


def die_once(marker: str) -> str:
    """Be killed the first time, which leaves a file of this name, and live the second."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def no_memory(_text: str) -> str:
    raise MemoryError


def pid(text: str) -> str:
    """Tell who is working, after as many seconds as `text` says."""
    time.sleep(float(text))
    return str(os.getpid())
