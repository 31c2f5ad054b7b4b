"""Whether a server can still do what it is there for: commit, and answer."""

from __future__ import annotations

import contextlib
import socket

from xs.commit import Commit
from xs.errors import Unavailable
from xs.store import Store
from xs.transport import connect_unix
from xs.work import Work

_REQUEST = b"GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


class _Nothing(Work):
    """A place in the queue of commits, and a transaction that changes nothing."""

    def apply(self, commit: Commit) -> None:
        pass


def check_commit(store: Store) -> None:
    """Waits until a transaction has been through the store. Raises `XsError` if it fails.

    It goes the way of every append, behind those that wait; only the disk isn't written to, so one
    that is full is no failure: reading goes on.
    """
    store.run(_Nothing())


def check_answer(path: str, seconds: float) -> None:
    """Calls the server at the socket `path`. Raises `Unavailable` if nothing happens in that time.

    Anything that does is a sign of life: an answer, or that a crowd is there and this one is sent
    away. If nobody can call, because the socket's file was taken away, or there are no more file
    descriptors for the moment, that says nothing about who would answer.
    """
    try:
        with contextlib.closing(connect_unix(path, seconds)) as sock:
            sock.sendall(_REQUEST)
            sock.recv(1)
    except (socket.timeout, BlockingIOError):
        raise Unavailable(f"nobody answers on {path}") from None
    except OSError:
        return
