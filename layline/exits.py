"""Exit codes of the contract, and which error leads to which."""

import errno
import signal
import threading
from typing import NoReturn

import click

DONE, USAGE, INVALID, INFEASIBLE, UNSUPPORTED, INTERRUPTED, STALE = 0, 2, 3, 4, 5, 6, 7

_CODES = {
    "StalePlanError": STALE,
    "InfeasibleError": INFEASIBLE,
    "UnsupportedError": UNSUPPORTED,
    "InvalidInputError": INVALID,
    "IncompleteProfileError": INTERRUPTED,
}


class CleanGroup(click.Group):
    """A command group that turns the subject errors into one message and the contract's code."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; errors are told apart by class name, so that none must be imported."""
        if threading.current_thread() is threading.main_thread():
            # Batch systems end a job with SIGTERM; it must end the ranks too.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort) as error:
            _leave(": ".join(filter(None, ("interrupted", str(error)))), INTERRUPTED)
        except Exception as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            code = next((_CODES[name] for name in names if name in _CODES), None)
            if code is None and "RanksFailedError" in names:
                _leave(f"a rank failed:\n{error}", 1)
            if isinstance(error, OSError) and error.errno != errno.EPIPE:
                _leave(str(error), 1)
            if code is None:
                raise
            _leave(str(error), code)


def _leave(message: str, code: int) -> NoReturn:
    click.echo(f"layline: {message}", err=True)
    raise SystemExit(code)
