"""A file that says: who made it still lives. For those who write to a store without its lock.

A run of frames is written over minutes, and its writer holds the store's lock only for moments of
that, or has left it to a server meanwhile. When it is killed, somebody else has to end its run, and
must not end that of a living one. So each writer holds a file of its own, `DIR/run-TOKEN`, locked
with flock(2), which the kernel gives back however its holder ended; the index has the token.

A process id would not do: it is given again, and means nothing in another container.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os

from xs import fault

_PREFIX = "run-"
_TOKEN_BYTES = 16  # in hexadecimal
_HEXADECIMAL = frozenset("0123456789abcdef")


_held: set[Claim] = set()


@atexit.register
def _give_back() -> None:
    """For who ends without closing what he has opened."""
    for claim in list(_held):
        claim.close()


class Claim:
    """Held until `close`, or the end of the process. Raises `OSError` where nothing can be made."""

    def __init__(self, folder: str) -> None:
        self._process = os.getpid()
        while True:
            self.token = os.urandom(_TOKEN_BYTES).hex()
            self._path = os.path.join(folder, _PREFIX + self.token)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            self._file = os.open(self._path, flags, 0o600)
            fault.at("run.before-claim")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            fault.at("run.claimed")
            # Between these two somebody who tidies up may have found it free, and removed it.
            if os.path.exists(self._path):
                break
            os.close(self._file)
        _held.add(self)

    def close(self) -> None:
        """Gives it back: what its holder has not ended is nobody's."""
        _held.discard(self)
        if self._file >= 0:
            if self._process == os.getpid():  # else it is the parent's still
                _unlink(self._path)
            os.close(self._file)
        self._file = -1


def is_held(folder: str, token: str) -> bool:
    """Whether the writer with that token still lives. The file of one that does not is removed."""
    if len(token) != 2 * _TOKEN_BYTES or not _HEXADECIMAL.issuperset(token):
        return False  # nothing that could lead to another file
    path = os.path.join(folder, _PREFIX + token)
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:
        # A link is nobody's claim. Else it is another user's, or there are no descriptors left to
        # look at it: nobody here can tell.
        return error.errno != errno.ELOOP
    try:
        # Shared: two who look at once must not take each other for the writer.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        _unlink(path)
        return False
    finally:
        os.close(file)


def remove_stale(folder: str) -> None:
    """Removes the files of writers that live no more."""
    for name in os.listdir(folder):
        if name.startswith(_PREFIX):
            is_held(folder, name[len(_PREFIX) :])


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # gone already, or not ours to remove
