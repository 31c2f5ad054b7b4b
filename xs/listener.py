"""Listeners: connections accepted, each given a thread, up to a bound; an orderly end.

What is spoken on a connection, its handler class knows: `httpd` (the API), `door` (the web).
"""

from __future__ import annotations

import errno
import select
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from xs import http1, threads
from xs.log import Seldom, log_of
from xs.sockets import BACKLOG, accept

_SENTENCE = b"too many connections are open here: try again in a moment\n"
_FIELDS = [
    ("content-type", "text/plain; charset=utf-8"),
    ("content-length", str(len(_SENTENCE))),
    ("retry-after", "1"),
    ("connection", "close"),
]
_TOO_MANY = http1.response_head(503, _FIELDS) + _SENTENCE


class Connection(Protocol):
    """What is open on a listener."""

    def end(self) -> None:
        """Lets the request under way be answered, and reads no other."""

    def drop(self) -> None:
        """Closes it, whatever is under way."""


class Handler(socketserver.BaseRequestHandler):
    """A connection with a thread, which ends it in any case: also where memory is short."""

    server: Listener

    def __init__(self, request: Any, client_address: Any, server: Listener) -> None:
        self.request = request
        self.client_address = client_address
        self.server = server
        self.setup()
        try:
            server.opened(self)
            self.handle()
        finally:
            # By a frame that is there already: a call may be what there is no memory for.
            while True:
                try:
                    self.finish()
                    break
                except MemoryError:
                    time.sleep(threads.PAUSE_SECONDS)

    def setup(self) -> None:
        """Makes what the connection needs; nobody knows of it yet."""

    def finish(self) -> None:
        """Closes the connection. It is called again if it finds no memory."""
        raise NotImplementedError

    def end(self) -> None:
        """As in `Connection`."""
        raise NotImplementedError

    def drop(self) -> None:
        """As in `Connection`."""
        raise NotImplementedError


class Listener(socketserver.TCPServer):
    """One address. Its connections are handled by `handler`, each in a thread of its own."""

    request_queue_size = BACKLOG

    def __init__(
        self,
        sock: socket.socket,
        handler: type[socketserver.BaseRequestHandler],
        connections: Connections,
        log: Callable[[str], None],
    ) -> None:
        """`sock` listens, or, if it was handed down, may be only bound."""
        socketserver.BaseServer.__init__(self, sock.getsockname(), handler)
        self.socket = sock
        self.log = log_of(log)
        self._connections = connections
        self._warn_of_refusal = Seldom(self.log)
        self._has_started = False
        self._thread = threads.Thread(self._accept, "xs-accept", insists=True)
        # A client that has gone by the time it is accepted must not hold up those behind it, nor
        # does one whom another process has accepted that shares the socket.
        sock.setblocking(False)
        self.server_activate()

    @property
    def most(self) -> int:
        """Connections at once; above it one is asked to come back."""
        raise NotImplementedError

    @property
    def uses_kept_room(self) -> bool:
        """Whether the room that is kept for the owner is for its clients, too."""
        return False

    def prepare(self, sock: socket.socket) -> None:
        """Sets what a new connection needs."""
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def refuse(self, sock: socket.socket) -> None:
        """Says to a client for whom there is no room that it may come back; doesn't wait for it."""
        sock.send(_TOO_MANY, socket.MSG_DONTWAIT)

    def start(self) -> None:
        self._wakened, self._waker = socket.socketpair()
        try:
            self._thread.start()
        except BaseException:
            self._wakened.close()
            self._waker.close()
            raise
        self._has_started = True

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        poll.register(self._wakened, select.POLLIN)

        def accept() -> bool:
            seconds = self.look_around()
            ready = poll.poll(None if seconds is None else seconds * 1000)
            if any(number == self._wakened.fileno() for number, _ in ready):
                return not self._wakened.recv(1)  # its end, or a `wake`
            self._handle_request_noblock()  # type: ignore[attr-defined]
            return False

        threads.keep_on(accept)

    def look_around(self) -> float | None:
        """What else the thread that accepts has to do; in so many seconds it is called again.

        None: not before somebody calls, or `wake` is called.
        """
        return None

    def wake(self) -> None:
        """Has `look_around` called now."""
        try:
            self._waker.send(b".")
        except OSError:
            pass  # it has stopped

    def stop(self) -> None:
        """Accepts no more, if it has begun to, and closes the socket.

        Whoever calls from now on is left to those with whom the socket is shared, if it is: so it
        is neither shut down nor called from here.
        """
        if not self._has_started:
            self.socket.close()
            return
        self._waker.close()
        self._thread.join()
        self._wakened.close()
        self.socket.close()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            sock, address = accept(self.socket)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                time.sleep(0.05)  # until something is closed, mostly: the listener stays readable
            raise
        self.prepare(sock)
        return sock, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        if self._connections.has_room(self.most, for_owner=self.uses_kept_room):
            return True
        count = self._connections.count
        self._turn_away(
            request, f"too many connections: {count} are open, and no more are accepted"
        )
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        # Waited for, so that a server on its way out answers who has been accepted.
        try:
            thread = threads.Thread(
                lambda: self._process(request, client_address), "xs-connection", insists=True
            )
            thread.start()
        except (MemoryError, RuntimeError):  # no more threads
            self._turn_away(request, "no room for the thread of another connection")

    def _process(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:
            self.handle_error(request, client_address)

    def _turn_away(self, request: Any, why: str) -> None:
        try:
            self.refuse(request)
        except (OSError, MemoryError):
            pass  # it did not wait for the refusal, or there is no memory to tell it
        request.close()
        self._warn_of_refusal(why)

    def shutdown_request(self, request: Any) -> None:
        """Nothing: a connection closes its socket itself, or has handed it on."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        request.close()  # first: there may be no memory to tell of it
        error = sys.exc_info()[1]
        if error is not None:
            self.log.defect("a connection ended", error)

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)


class Connections:
    """Those that are open, on all listeners of a kind, or of one store `within` those."""

    def __init__(self, room: int, within: Connections | None = None, kept: int = 0) -> None:
        """`room`: as many as the system lets this process have; `kept` of them for the owner.

        What is kept is that of those `within` which it is, if it is.
        """
        self._room = room
        self._within = within
        self._kept: int = kept if within is None else within._kept
        self._lock = threading.Condition(threading.Lock())  # guards the set; taken last
        self._open: set[Connection] = set()
        self._ending = False

    @property
    def count(self) -> int:
        """How many are open, on other stores too."""
        return len(self._open) if self._within is None else self._within.count

    def has_room(self, most: int, *, for_owner: bool = False) -> bool:
        """Whether one more may be opened, where `most` are allowed."""
        room = min(most, self._room)
        return self.count < (room if for_owner else room - self._kept)

    def add(self, connection: Connection) -> None:
        if self._within is not None:
            self._within.add(connection)
        with self._lock:
            self._open.add(connection)
            ending = self._ending
        if ending:  # its thread has started only now
            connection.end()

    def discard(self, connection: Connection) -> None:
        if self._within is not None:
            self._within.discard(connection)
        with self._lock:
            self._open.discard(connection)
            self._lock.notify_all()

    def end(self, seconds: float) -> None:
        """Lets requests under way be answered, for so long at most, and closes all connections."""
        self.begin_end()
        self.finish_end(seconds)

    def begin_end(self) -> None:
        """The first half of `end`: no further request is read."""
        with self._lock:
            self._ending = True
            connections = list(self._open)
        for connection in connections:
            connection.end()

    def finish_end(self, seconds: float) -> None:
        """The other half: waits, and closes what is left."""
        with self._lock:
            self._lock.wait_for(lambda: not self._open, seconds)
            connections = list(self._open)
        for connection in connections:
            connection.drop()

    def wait(self, seconds: float) -> None:
        """Waits until all are closed, for so long at most."""
        with self._lock:
            self._lock.wait_for(lambda: not self._open, seconds)
