"""SQLite, as the standard library has it, with no more of that than a command needs.

The package `sqlite3` is `_sqlite3` and, around it, how dates are stored, which brings `datetime`.
And `_sqlite3` looks into `functools` for one function, with which it keeps its statements. Either
takes a millisecond to load, of the few that a command may take (bench/start.py).
"""

from __future__ import annotations

import sys
from _functools import _lru_cache_wrapper  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from sqlite3 import Error, OperationalError, connect, sqlite_version
    from typing import Any, TypeVar

    Function = TypeVar("Function", bound=Callable[..., Any])


def lru_cache(maxsize: int) -> Callable[[Function], Function]:
    """That of `functools`, made of what that makes it of: for statements, SQLite's and ours."""

    def keep(function: Function) -> Function:
        kept: Function = _lru_cache_wrapper(function, maxsize, False, tuple)
        return kept

    return keep


class _StandIn:
    """What `_sqlite3` wants of `functools`."""

    lru_cache = staticmethod(lru_cache)


def _load() -> Any:
    if "functools" in sys.modules:
        import _sqlite3
    else:
        # No other thread can meet the stand-in: `threading` itself would have brought `functools`.
        sys.modules["functools"] = _StandIn  # type: ignore[assignment]
        try:
            import _sqlite3
        finally:
            del sys.modules["functools"]
    return _sqlite3


if not TYPE_CHECKING:
    _module = _load()
    Error, OperationalError = _module.Error, _module.OperationalError
    connect, sqlite_version = _module.connect, _module.sqlite_version

VERSION = tuple(map(int, sqlite_version.split(".")))

__all__ = ["VERSION", "Error", "OperationalError", "connect", "lru_cache"]
