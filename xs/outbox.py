"""The answers of one connection, in the order of its requests, up to the one that is a follow.

An append is answered by whoever led its commit, not by the connection's own thread, which has gone
back to reading by then (docs/architecture.md, The way of an append). Any other answer is written by
that thread, which waits until the appends before it are answered. What a leader can't write without
blocking is left to a thread that can.
"""

from __future__ import annotations

import socket
import threading

from xs import threads
from xs.work import Work

NO_ANSWER = b""  # there is no memory to make one


class Outbox:
    """What is written on a connection. Raises `OSError` when its client is gone."""

    def __init__(self, sock: socket.socket, most_waiting: int) -> None:
        """`most_waiting`: appends that are not answered yet, before the next one has to wait."""
        self._sock = sock
        self._most = most_waiting
        self._changed = threading.Condition(threading.Lock())  # guards the next four; taken last
        self._awaited: set[Work] = set()  # appends whose answers are still to come
        self._unsent: list[bytes] = []
        self._draining = False
        self._broken = False

    # By who has the connection

    def expect(self, work: Work) -> None:
        """From now on the answer to this append is awaited; there may have to be room for it."""
        with self._changed:
            while len(self._awaited) >= self._most or self._draining:
                self._changed.wait()
            self._awaited.add(work)

    def is_settled(self) -> bool:
        """Whether every append so far is answered."""
        return not (self._awaited or self._draining or self._broken)

    def settle(self) -> None:
        """Waits until every append so far is answered."""
        if self._awaited or self._draining:
            with self._changed:
                while self._awaited or self._draining:
                    self._changed.wait()
        if self._broken:
            raise BrokenPipeError

    def write(self, data: bytes) -> None:
        """Writes all of it. Nothing else does meanwhile: everything is settled.

        A client that takes nothing for as long as the socket has a limit for is as good as gone.
        """
        sent = self._sock.send(data)
        if sent < len(data):
            self._write_rest((data,), sent, is_patient=False)

    def write_body(self, *parts: bytes | memoryview) -> None:
        """The same of a body that is made as it is read: its reader may be as slow as it likes.

        To make one of a long part and short ones is to copy it (bench/replay.py, one topic: 6 %),
        which nobody who is slow to read may make us do.
        """
        try:
            sent = self._sock.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        if sent < sum(map(len, parts)):
            self._write_rest(parts, sent, is_patient=True)

    def _write_rest(
        self, parts: tuple[bytes | memoryview, ...], sent: int, *, is_patient: bool
    ) -> None:
        for part in parts:
            rest = memoryview(part)[sent:]
            sent = max(0, sent - len(part))
            while rest:
                try:
                    rest = rest[self._sock.send(rest) :]
                except BlockingIOError:
                    if not is_patient:
                        raise

    def give_up(self) -> None:
        """The client is gone: no answer is written any more."""
        self._broken = True

    def close(self) -> None:
        """Closes the socket, and lets go who waits for something to be written."""
        with self._changed:
            self._broken = True
            self._sock.close()
            self._changed.notify_all()

    # By any thread, none of which it blocks

    def deliver(self, work: Work, data: bytes) -> None:
        """Writes an append's answer.

        It may be called again if it has found no memory. An answer that can't be made, or of which
        nobody knows how far it was sent, ends the connection, lest another one be taken for it.
        """
        with self._changed:
            if work in self._awaited:
                try:
                    if data is NO_ANSWER:
                        self._broken = True
                    elif not self._broken:
                        self._send(data)
                except (OSError, MemoryError):
                    self._broken = True
                if self._broken:
                    self._break()
                self._awaited.discard(work)
            self._changed.notify_all()

    def break_off(self) -> None:
        """Lets whoever has the connection find its end, as if the client had gone."""
        with self._changed:
            self._break()

    def _break(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended by itself

    def _send(self, data: bytes) -> None:
        """Sends what can be sent at once, and leaves the rest to another thread; locked."""
        if self._unsent:
            self._unsent.append(data)
            return
        try:
            sent = self._sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._unsent.append(data[sent:])
            self._draining = True
            try:
                threads.Thread(self._drain, "xs-drain", insists=True).start()
            except (MemoryError, RuntimeError):  # no more threads: it can't be told the rest
                self._broken = True
                self._unsent.clear()
                self._draining = False

    # By a thread that this takes

    def _drain(self) -> None:
        """Writes what a leader could not, for a client that is slow to read its answers."""
        is_done = False
        while not is_done:
            try:
                is_done = self._drain_some()
            except (OSError, MemoryError):
                self._broken = True

    def _drain_some(self) -> bool:
        with self._changed:
            if self._broken:
                self._break()
                self._unsent.clear()
            if not self._unsent:
                self._changed.notify_all()
                self._draining = False
                return True
            data = b"".join(self._unsent)
            self._unsent = [b""]  # not empty: what comes meanwhile queues up behind
        self._sock.sendall(data)
        with self._changed:
            self._unsent.pop(0)
        return False
