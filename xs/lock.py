"""The store's one writer: a lock file that says who holds it.

The lock itself is flock(2), which the kernel gives back however its holder ended. The file's text
is for people and for those who wait: `<pid> serve` or `<pid> append`.
"""

from __future__ import annotations

import fcntl
import time

from xs.errors import Locked, Unavailable, replaced
from xs.system import os

FILENAME = "lock"
WAIT_SECONDS = 10.0  # how long a writer waits for another one
_LOOK_SECONDS = 0.005  # between two looks: flock has no time limit of its own

SERVE = "serve"
WRITE = "append"


class Served(Locked):
    """A server holds the store: use its socket."""


class Lock:
    """One process's handle on the lock of one store. Not shared between threads."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._path = os.path.join(folder, FILENAME)
        self._file = self._open()
        self._is_held = False

    def _open(self) -> int:
        # Not through a link: the file is emptied, and may be anybody's in a store that was sent.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        return os.open(self._path, flags, 0o600)

    def acquire(self, purpose: str, *, wait: float = WAIT_SECONDS) -> None:
        """Takes the lock for SERVE or WRITE.

        Raises `Served` at once if a server has it, `Locked` if another writer keeps it for longer
        than `wait` seconds, `Unavailable` if its file is gone for good.
        """
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, holder = self.holder()
                if holder == SERVE and _is_alive(pid):
                    raise Served(
                        f"store locked: {self._folder} is served by process {pid}"
                    ) from None
                if time.monotonic() > deadline:
                    raise Locked(
                        f"store locked: {self._folder} is being written to by process {pid}"
                    ) from None
                time.sleep(_LOOK_SECONDS)
            else:
                found = os.fstat(self._file)
                if self._is_at_its_path(found):
                    break
                self._open_anew()
        self._is_held = True
        try:
            if found.st_size:
                os.ftruncate(self._file, 0)  # of one who was killed
            os.pwrite(self._file, f"{os.getpid()} {purpose}\n".encode(), 0)
        except OSError:
            pass  # the disk is full: it is held all the same, and nobody is told by whom

    def _is_at_its_path(self, held: os.stat_result) -> bool:
        """Whether others will find the file that is locked; else it keeps nobody out."""
        try:
            found = os.lstat(self._path)
        except OSError:
            return False
        return (found.st_ino, found.st_dev) == (held.st_ino, held.st_dev)

    def _open_anew(self) -> None:
        """Another file has come in the place of the one that was locked, or none."""
        fcntl.flock(self._file, fcntl.LOCK_UN)
        try:
            file = self._open()
        except (FileNotFoundError, NotADirectoryError):
            raise replaced(self._folder) from None
        except OSError as error:
            raise Unavailable(
                f"the store at {self._folder} can't be locked: {error.strerror}"
            ) from None
        os.close(self._file)
        self._file = file

    def holder(self) -> tuple[int, str]:
        """Pid and purpose of who took the lock last; (0, "") if nobody has."""
        return _holder(self._file)

    def release(self) -> None:
        try:
            os.ftruncate(self._file, 0)
        except OSError:
            pass  # then it says who had it last
        self._is_held = False
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def leave_to_parent(self) -> None:
        """In a process that was forked: the lock, which both would have, is the parent's alone."""
        self._is_held = False
        self.close()

    def close(self) -> None:
        """Gives the lock back, if it is held."""
        if self._is_held:
            self.release()
        if self._file >= 0:
            os.close(self._file)
        self._file = -1  # closing it again would close whatever has the number by then


def server_of(folder: str) -> int | None:
    """The process that serves a store, for who wants nothing of it; None if there is none."""
    try:
        file = os.open(os.path.join(folder, FILENAME), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pid, purpose = _holder(file)
        return pid if purpose == SERVE else None
    finally:
        os.close(file)
    return None


def _holder(file: int) -> tuple[int, str]:
    words = os.pread(file, 64, 0).decode("ascii", "replace").split()
    if len(words) == 2 and words[0].isdigit():
        return int(words[0]), words[1]
    return 0, ""


def _is_alive(pid: int) -> bool:
    # The text may be a dead server's while its successor, a writer, has not yet put its own.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
