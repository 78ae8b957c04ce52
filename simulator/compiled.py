"""How loops over arrays are compiled, and that they need not be.

Compiled functions are plain Python over arrays of numbers. Without numba, or with
NUMBA_DISABLE_JIT=1 set, the same lines run interpreted and give the same result, hundreds of times
slower. A module of compiled functions calls none of another module: a change there would not be
noticed by the compile cache.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

try:
    from numba import njit
except ImportError:

    def compiled(function: F) -> F:
        """Return `function` as it is: interpreted, and equal."""
        return function

    inlined = compiled
else:

    def compiled(function: F) -> F:
        """Return `function` compiled at its first call; the compiled code is kept on disk."""
        return cast(F, njit(cache=True, nogil=True, error_model="numpy")(function))

    def inlined(function: F) -> F:
        """Return `function` to be copied into the compiled functions that call it.

        A call passes seven words an array. What is only a part of others needs no code of its own
        on disk, and each kept function costs milliseconds at every start.
        """
        return cast(F, njit(nogil=True, error_model="numpy", forceinline=True)(function))


NEVER = 1 << 62
"""A time that does not come."""
