"""A request's body as blocks, read from its connection as they are asked for."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Optional, Protocol, Union

from xs import framing, http1
from xs.errors import BrokenBody
from xs.sockets import set_timeout

_RECEIVE = 256 * 1024


class Source(Protocol):
    """The connection that a body comes on."""

    sock: socket.socket
    buffer: bytearray  # what has come and is not read yet

    def say_continue(self) -> None:
        """Tells a client that waits for it that its body is wanted."""

    def check_grant(self) -> None:
        """Raises `BrokenBody` if the client may not send it any more."""

    def broken_off(self) -> BrokenBody:
        """What to say of a body that ends before it is whole: it may be this end that closes."""

    def end_after_this(self) -> None:
        """No other request can follow: nobody knows where it would begin."""


class RequestBody:
    """What follows a head. Iterating over it raises `BrokenBody` if it breaks off, or is no HTTP.

    A body may be slow: `tail -f | xs append --lines` sends for days. There is no time limit.
    """

    __slots__ = ("_connection", "_deadline", "_head", "_reader", "_started")

    def __init__(self, connection: Source, head: http1.RequestHead) -> None:
        self._connection = connection
        self._head = head
        self._reader: Optional[Union[framing.LengthBody, framing.ChunkedBody]] = (
            None if head.length == 0 else framing.body_reader(head)
        )
        self._started = False
        self._deadline: Optional[float] = None

    @property
    def is_read(self) -> bool:
        return self._reader is None or self._reader.done

    @property
    def came_whole(self) -> bool:
        """Whether all of it, if it is read, came with its head."""
        return self._reader is None

    def __iter__(self) -> Iterator[bytes]:
        length, buffer = self._head.length, self._connection.buffer
        if self._started or length is None or len(buffer) < length:
            return self._blocks()
        # All of it has come with its head: the usual append (bench/append.py).
        self._started = True
        if not length:
            return iter(())
        whole = bytes(memoryview(buffer)[:length])
        del buffer[:length]
        self._reader = None
        return iter((whole,))

    def _blocks(self) -> Iterator[bytes]:
        reader = self._reader
        if reader is None:
            return
        connection = self._connection
        buffer = connection.buffer
        if not self._started:
            self._started = True
            if self._head.expects_continue and not buffer:
                connection.say_continue()
        try:
            while True:
                data = reader.read(buffer)
                if data:
                    yield data
                if reader.done:
                    return
                if data is None or not buffer:
                    self._receive(buffer)
        except http1.Refusal as refused:
            connection.end_after_this()
            broken = BrokenBody(f"the body is broken: {refused}")
            broken.status = refused.status
            raise broken from None

    def _receive(self, buffer: bytearray) -> None:
        while True:
            try:
                data = self._connection.sock.recv(_RECEIVE)
            except BlockingIOError:
                if self._deadline is None:
                    continue
                data = b""
            except OSError:
                data = b""
            if not data or (self._deadline is not None and time.monotonic() > self._deadline):
                broken = self._connection.broken_off()
                self._connection.end_after_this()
                raise broken
            self._connection.check_grant()
            buffer += data
            return

    def drain(self, most: int, seconds: float) -> bool:
        """Reads what is left of a short body that nobody wanted.

        False if it has more than `most` bytes, or takes longer. The socket's time limit is another
        one then.
        """
        if self._head.expects_continue and not self._started:
            return False  # nobody can tell whether the body comes
        length = self._head.length
        if length is None or length > most:
            return False
        self._deadline = time.monotonic() + seconds
        set_timeout(self._connection.sock, seconds)
        try:
            for _ in self:
                pass
        except BrokenBody:
            return False
        return True
