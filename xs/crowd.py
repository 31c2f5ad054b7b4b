"""Appends of many clients, taken from their connections by one thread.

Where many clients append side by side, most of what an append costs is to wake a thread for it: all
of them want the interpreter at once, and each has one small request to read. So a connection whose
last requests were appends waits here for the next one, if there are others. One thread reads what
has come on all of them, and commits it together: twice as many appends as with a thread for each
(bench/append.py). For whatever else a client sends, its connection's own thread is woken.

Lock: `_changed` guards who waits here. Nothing else is taken under it.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from typing import Protocol

from xs import threads
from xs.content import INLINE_MAX
from xs.errors import XsError
from xs.http1 import RequestHead
from xs.store import Store
from xs.work import Work

GATHER_SECONDS = 0.005  # that those who were just answered are waited for, at most
_LOOKS = 20  # for them before a pause after each: some 100 microseconds
_NAP_SECONDS = 20e-6


class Member(Protocol):
    """A connection that waits here."""

    sock: socket.socket
    seen: float  # when something came last, by the monotonic clock

    def take(self, works: list[Work]) -> bool:
        """Reads what has come, without blocking, and adds what is to be done for it to `works`.

        False, and the same again if it is asked again: the connection's own thread has to go on.
        """


def can_take(head: RequestHead, there: int) -> bool:
    """Whether the crowd's thread can take a request; `there`: the bytes behind its head."""
    return (
        head.method == "POST"
        and head.path.startswith("/append/")
        # Content in parts takes a thread until it is whole, whatever the words that ask for it.
        and "chunked" not in head.query
        and "%" not in head.query
        and head.get("xs-run") is None
        and head.length is not None
        and head.length <= min(there, INLINE_MAX)
        and head.keep_alive
    )


class Crowd:
    """Connections to one store on which appends are awaited. Its thread starts with the first."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = threading.Condition(threading.Lock())  # guards the next four
        self._waiting: dict[Member, threading.Lock] = {}  # each held until its thread has to go on
        self._selector: selectors.BaseSelector | None = None
        self._thread: threads.Thread | None = None
        self._stopping = False
        self._works: list[Work] = []  # taken, and not yet submitted; the thread's alone, as these:
        self._answered = 0  # works of the last commit
        self._commit_seconds = 0.0  # that it took

    @property
    def count(self) -> int:
        """How many connections wait here."""
        return len(self._waiting)

    def wait(self, member: Member, idle_seconds: float) -> None:
        """Returns when there is something for the thread of `member` to do.

        If nothing comes for so long, that is the end of what can be read. Where there is no room
        for a crowd, its own thread has to do all.
        """
        called = threading.Lock()
        called.acquire()
        with self._changed:
            if not self._begin():
                return
            assert self._selector is not None
            self._waiting[member] = called
            try:
                self._selector.register(member.sock, selectors.EVENT_READ, member)
            except BaseException:
                del self._waiting[member]
                raise
            self._changed.notify()
        member.seen = time.monotonic()
        left = idle_seconds
        while not called.acquire(timeout=left):
            left = member.seen + idle_seconds - time.monotonic()
            if left <= 0:
                member.sock.shutdown(socket.SHUT_RD)  # seen by the thread here, as a client's end
                called.acquire()
                return

    def _begin(self) -> bool:
        """Whether there is a thread and a selector, made now or before."""
        if self._stopping:
            return False
        try:
            if self._selector is None:
                self._selector = selectors.DefaultSelector()
            if self._thread is None:
                thread = threads.Thread(
                    lambda: threads.keep_on(self._serve), "xs-crowd", insists=True
                )
                thread.start()
                self._thread = thread
        except (OSError, RuntimeError):
            return False
        return True

    def stop(self) -> None:
        """Once no connection waits here any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        if self._selector is not None:
            self._selector.close()

    def _serve(self) -> bool:
        """The thread: takes what has come, and commits it; True when all is over."""
        if not self._works:  # some may be left where memory was short
            with self._changed:
                while not self._waiting:
                    if self._stopping:
                        return True
                    self._changed.wait()
            self._take(None)
            self._gather()
        count, started = len(self._works), time.monotonic()
        if count:
            last = self._works[-1]
            try:
                self._store.submit_all(self._works)
            except XsError as error:  # it is closing
                while self._works:
                    self._works.pop().fail(error)
            self._answered = count if last.finished else 0
            self._commit_seconds = time.monotonic() - started
        return False

    def _gather(self) -> None:
        """Waits until those who were just answered are back, but no longer than a commit takes.

        Most who append side by side go on at once: in one commit all of them are answered sooner
        than in two (bench/append.py, 8 clients: a third more). Who appends alone is not waited for.
        """
        if self._answered < 2:
            return
        deadline = time.monotonic() + min(self._commit_seconds, GATHER_SECONDS)
        looks = 0
        while len(self._works) < self._answered and time.monotonic() < deadline:
            if looks == _LOOKS:  # the disk is slow: they have a while to come
                time.sleep(_NAP_SECONDS)
            else:
                looks += 1
            self._take(0)

    def _take(self, timeout: float | None) -> None:
        assert self._selector is not None
        for key, _ in self._selector.select(timeout):
            member: Member = key.data
            if not member.take(self._works):
                self._call(member)

    def _call(self, member: Member) -> None:
        """Lets the connection's own thread go on. It is called again if it finds no memory."""
        assert self._selector is not None
        try:
            self._selector.unregister(member.sock)
        except KeyError:
            pass  # it was, before that
        with self._changed:
            self._waiting.pop(member).release()
