"""A database that is read without SQLite's locks, by who may not write to its folder.

Where nobody has it open there is no shared memory for those locks, and who may only read can't make
any. Such a reader has to look himself: whether the file `is_unchanged`, whenever he has read
something, and before that whether `when_still` gives the same as before, as the file stays as it is
while others write to its log.
"""

from __future__ import annotations

import os
import time

from xs.errors import Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Result = TypeVar("Result")
    Still = tuple[int, int, int]  # a file's inode, size and time

_TICK_NS = 50_000_000  # longer than the steps in which a file's time goes on
_TRIES = 20
_RETRY_SECONDS = 0.002
_OPENING_SECONDS = 10.0  # that another process takes, which may have to read a large log
_CLOSING_SECONDS = 1.0  # a log alone, without a lock of who has it, may also be all that was copied


def when_still(path: str) -> Still | None:
    """What tells that a database has been written to; None: SQLite sees to that by itself."""
    if os.access(os.path.dirname(path) or ".", os.W_OK):
        return None
    for _ in range(_TRIES):
        found = _still(path)  # before the look at the log: what is folded back later is noticed
        if _size(path + "-wal") > 0 or (_size(path + "-wal") == 0 and _size(path + "-shm") > 0):
            return None
        # A file that is written to twice within a tick of the system's clock does not show it.
        if found is None or not 0 <= time.time_ns() - found[2] < _TICK_NS:
            break
        time.sleep(_TICK_NS / 1e9)
    return found


def is_unchanged(path: str, still: Still | None) -> bool:
    """Whether what was read of a database that is `still` is what was there at one moment."""
    return still is None or _still(path) == still


def once_settled(path: str, work: Callable[[], Result]) -> Result:
    """Does what opens that database or begins to read it, waiting for who is amid a change of it.

    While another process opens or closes it the log may be gone that was just there, or what tells
    where frames lie in it is still to be made, which SQLite refuses to who may only read.
    """
    begun = time.monotonic()
    while True:
        try:
            return work()
        except Unavailable as error:
            if time.monotonic() > begun + _seconds_to_settle(path, str(error.__cause__)):
                raise
        time.sleep(_RETRY_SECONDS)


def _seconds_to_settle(path: str, error: str) -> float:
    if "readonly database" in error:
        return _OPENING_SECONDS
    there = [each for each in (path, path + "-wal", path + "-shm") if os.path.exists(each)]
    if "unable to open" in error and all(os.access(each, os.R_OK) for each in there):
        return _CLOSING_SECONDS
    return 0


def _still(path: str) -> Still | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _size(path: str) -> int:
    """Bytes of a file; -1 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
