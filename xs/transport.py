"""The wire: requests to a server over a socket, and its answers as they arrive.

`HttpTransport` speaks HTTP/1.1 on Unix sockets, TCP and TLS. It is one kind of `Transport`, what
takes a request to a store; the other is `local.Local`. Both promise the same `Response`,
which `request` tells of. This module knows no addresses (`address`), no grammar of HTTP (`http1`)
and none of the store's words (`client`).

Its strategy is one connection, one exchange at a time, and no threads: while a body is on its way,
what the server says meanwhile is read (`_Connection.move`), so that neither end can wait for the
other for ever, and an answer that comes early is heard.
"""

from __future__ import annotations

# `socket` costs 7 ms to import (selectors, enum); the command line starts in about 10 altogether.
import _socket

from xs import errors, framing, http1
from xs.request import BLOCK, EXPECT, SMALL
from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, Union

    from xs.request import Body, Fields, Response, Transport

    Address = Union[tuple[str, str], tuple[str, str, int]]

_KEPT_CONNECTIONS = 4  # idle ones, kept for the next requests
_SUN_PATH = 103  # bytes of a socket's path that every system takes (Linux 107, macOS 103)


# Connections


class _Closed(Exception):
    """The connection ended before a byte of the answer came."""


class _Connection:
    """One socket, with what has come in and what is still to go out."""

    __slots__ = (
        "_again",
        "_is_last",
        "_outgoing",
        "_pending",
        "_process",
        "_timeout",
        "_who",
        "buffer",
        "sock",
    )

    def __init__(self, sock: _socket.socket, timeout: float | None, who: str) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self._timeout = timeout
        self._who = who
        self._outgoing: Iterator[tuple[bytes, bool]] | None = None
        self._is_last = False  # whether `_pending` ends the request
        self._pending = memoryview(b"")
        self._again: tuple[type[Exception], ...] = (BlockingIOError,)
        self._process = os.getpid()

    def use_tls(self, wrapped: ssl.SSLSocket) -> None:
        import ssl

        self.sock = wrapped
        self._again = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

    def is_open(self) -> bool:
        """Whether a connection that was kept may be used again: not closed, nothing unasked for.

        Not in another process, which was forked: each would be given the other's answers.
        """
        if self._process != os.getpid():
            return False
        try:
            self.sock.setblocking(False)
            self.sock.recv(1)  # b"" at its end; and what nobody asked for makes it unusable too
        except self._again:
            self.sock.settimeout(self._timeout)
            return True
        except OSError:
            pass
        return False

    def send(self, data: bytes) -> None:
        """A head, or a head with a small body: it fits the socket's buffers, so it may block."""
        try:
            self.sock.sendall(data)
        except _socket.timeout:
            raise self._too_slow() from None
        except OSError:
            pass  # closed or reset: an answer may have come before; the reading will tell

    def send_while_reading(self, blocks: Iterator[tuple[bytes, bool]]) -> None:
        """From now on `move` sends these too, as they become ready: (block, is the last one)."""
        self._outgoing = blocks
        self.sock.setblocking(False)

    @property
    def is_sending(self) -> bool:
        return self._outgoing is not None

    def stop_sending(self) -> None:
        outgoing, self._outgoing = self._outgoing, None
        self._pending = memoryview(b"")
        self.sock.settimeout(self._timeout)
        close = getattr(outgoing, "close", None)
        if close is not None:
            close()

    def move(self) -> bool:
        """Takes in what has come, sending meanwhile; waits for something. False: no more will."""
        while self._outgoing is not None:
            sent = self._send_some()
            if self._outgoing is None:
                break
            try:
                return self._take(self.sock.recv(BLOCK))
            except self._again:
                pass
            except OSError:
                return False
            if not sent:
                self._wait()
        try:
            return self._take(self.sock.recv(BLOCK))
        except _socket.timeout:
            raise self._too_slow() from None
        except OSError:
            return False

    def _take(self, data: bytes) -> bool:
        self.buffer += data
        return bool(data)

    def _send_some(self) -> bool:
        assert self._outgoing is not None
        if not self._pending:
            block, self._is_last = next(self._outgoing)
            self._pending = memoryview(block)
        try:
            sent = self.sock.send(self._pending)
        except self._again:
            return False
        except OSError:
            # The other end takes no more (EPIPE, ECONNRESET). What it said before is still to be
            # read: most likely an error's status, and why.
            self.stop_sending()
            return True
        self._pending = self._pending[sent:]
        if self._is_last and not self._pending:
            self.stop_sending()
        return True

    def _wait(self) -> None:
        import select

        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLIN | select.POLLOUT)
        if not poll.poll(None if self._timeout is None else self._timeout * 1000):
            raise self._too_slow()

    def _too_slow(self) -> errors.Lost:
        return errors.Lost(f"no answer from {self._who} within {self._timeout:g} s")

    def close(self) -> None:
        if self._outgoing is not None:
            self.stop_sending()
        self.sock.close()


class HttpTransport:
    """Requests to a server on a Unix socket, or on a TCP address with or without TLS.

    `connect` is `("unix", path)`, `("tcp", host, port)` or `("tls", host, port)`; `timeout` is in
    seconds, for each wait on the server (None: no limit). A connection whose answer was read to
    its end is kept and used again. It may be used by several threads: each request has a
    connection of its own while it lasts.

    `instead` opens what takes requests where nobody answers, as the server has ended meanwhile.
    """

    __slots__ = (
        "_authority",
        "_connect",
        "_idle",
        "_instead",
        "_others",
        "_timeout",
        "_token",
        "who",
    )

    def __init__(
        self,
        connect: Address,
        token: str | None = None,
        timeout: float | None = None,
        instead: Callable[[], Transport] | None = None,
    ) -> None:
        self._connect = connect
        self._token = token
        self._timeout = timeout
        self._idle: list[_Connection] = []
        self._instead = instead
        self._others: list[Transport] = []  # what that has opened
        if len(connect) == 3:
            host = f"[{connect[1]}]" if ":" in connect[1] else connect[1]
            self._authority = self.who = f"{host}:{connect[2]}"
        else:
            self._authority, self.who = "localhost", connect[1]

    def open(self) -> HttpTransport:
        """Connects now, so that an address where nobody answers is noticed here.

        Raises `FileNotFoundError`, `ConnectionRefusedError`, … as `connect(2)` does.
        """
        self._idle.append(self._connected())
        return self

    def request(self, method: str, target: str, fields: Fields = (), body: Body = None) -> Response:
        """Sends a request and returns its answer as soon as its head is there.

        `target` is in origin form, percent-encoded already (RFC 9112 §3.2.1). A `body` of bytes is
        sent with its length, an iterable of bytes chunked, as it comes (RFC 9112 §7.1); with EXPECT
        among the fields not before the server asks for it (RFC 9110 §10.1.1). Raises `Unreached`
        when the server can't be reached, or goes away before that, `Lost` when it goes away before
        it answers.
        """
        asked = list(fields)
        fields = list(asked)
        if self._token is not None:
            # First: until it has come a head gets little room (docs/protocol.md, Limits).
            fields.insert(0, ("authorization", "Bearer " + self._token))
        if body is None:
            if method == "POST":
                fields.append(("content-length", "0"))
        elif isinstance(body, bytes):
            fields.append(("content-length", str(len(body))))
        else:
            fields.append(("transfer-encoding", "chunked"))
        try:
            head = http1.request_head(method, target, self._authority, fields)
        except UnicodeEncodeError:
            raise errors.Invalid("a token, or the name of a host, is plain ASCII") from None
        except ValueError as error:
            raise errors.Invalid(f"that can't be sent: {error}") from None

        waits = EXPECT in asked
        connection = self._kept()
        if connection is not None:
            try:
                return self._exchange(connection, method, head, body, waits)
            except _Closed:
                # It was open a moment ago, and idle for as long as the server keeps one. Whether
                # it saw the request, nobody knows: only what may be done twice is done again.
                if not _may_repeat(method, fields, body):
                    raise self._gone() from None
        try:
            connection = self._fresh()
        except errors.Unreached:
            if self._instead is None:
                raise
            if not self._others:
                self._others.append(self._instead())
            return self._others[-1].request(method, target, asked, body)
        try:
            return self._exchange(connection, method, head, body, waits)
        except _Closed:
            raise self._gone() from None

    def close(self) -> None:
        """Closes the connections that are kept. The transport can be used again all the same."""
        for kept in (self._idle, self._others):
            while kept:
                kept.pop().close()

    def _gone(self) -> errors.Lost:
        return errors.Lost(f"{self.who} closed the connection before it answered")

    def _kept(self) -> _Connection | None:
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was quicker
                break
            if connection.is_open():
                return connection
            connection.close()
        return None

    def _fresh(self) -> _Connection:
        try:
            return self._connected()
        except OSError as error:
            raise errors.Unreached(
                f"can't connect to {self.who}: {error.strerror or error}"
            ) from None

    def _connected(self) -> _Connection:
        connect = self._connect
        if len(connect) == 2:
            return _Connection(connect_unix(connect[1], self._timeout), self._timeout, self.who)
        sock = _tcp(connect[1], connect[2], self._timeout)
        connection = _Connection(sock, self._timeout, self.who)
        if connect[0] == "tls":
            connection.use_tls(_tls(sock, connect[1], self._timeout))
        return connection

    def _exchange(
        self, connection: _Connection, method: str, head: bytes, body: Body, waits: bool
    ) -> HttpResponse:
        early = None
        try:
            if isinstance(body, bytes) and len(body) <= SMALL:
                connection.send(head + body)
            elif body is None:
                connection.send(head)
            elif isinstance(body, bytes):
                connection.send_while_reading(_sized(head, body))
            elif waits:
                connection.send(head)
                early = self._early_answer(connection, method)
                if early is None:
                    connection.send_while_reading(_chunked(b"", body))
            else:
                connection.send_while_reading(_chunked(head, body))
            answer = early or self._answer(connection, method)
            self._check_is_ours(answer)
        except BaseException:
            connection.close()
            raise
        if answer.status >= 300 and connection.is_sending:
            connection.stop_sending()  # refused: the rest of the body would be read by nobody
            answer.keep_alive = False
        if early is not None:
            answer.keep_alive = False  # the server may still wait for the body
        keep = self._keep if answer.keep_alive else None
        return HttpResponse(connection, answer, keep)

    def _early_answer(self, connection: _Connection, method: str) -> http1.ResponseHead | None:
        """The answer to a head without its body; None if the server asks for that."""
        while connection.move():
            answer = self._head_in(connection, method)
            if answer is not None or not connection.buffer:
                return answer
        raise errors.Unreached(f"{self.who} closed the connection before it asked for the body")

    def _head_in(self, connection: _Connection, method: str) -> http1.ResponseHead | None:
        try:
            return http1.read_response_head(connection.buffer, method)
        except http1.Refusal as refusal:
            raise errors.Unavailable(f"no xs server is at {self.who}: {refusal}") from None

    def _answer(self, connection: _Connection, method: str) -> http1.ResponseHead:
        while True:
            answer = self._head_in(connection, method)
            if answer is not None:
                return answer
            if not connection.move():
                if connection.buffer:
                    raise errors.BrokenBody(f"the answer of {self.who} broke off in its head")
                raise _Closed

    def _check_is_ours(self, answer: http1.ResponseHead) -> None:
        """Raises `Unavailable` for an answer such as others give and no xs does.

        What is stored is known by the answer: so another program's must not be taken for one.
        """
        kind = dict(answer.fields).get("content-type", "")
        if 300 <= answer.status < 400 or kind.startswith("text/html"):
            raise errors.Unavailable(
                f"no xs server is at {self.who}: what answers there is a web site"
            )
        if answer.status < 300 and answer.get("xs-version") is None:
            raise errors.Unavailable(
                f"no xs server is at {self.who}: what answers there is another program"
            )

    def _keep(self, connection: _Connection) -> None:
        if len(self._idle) < _KEPT_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()


class HttpResponse:
    """An answer on its way. Iterating gives the blocks of its body as they arrive, once."""

    __slots__ = ("_connection", "_keep", "_reader", "fields", "status")

    def __init__(
        self,
        connection: _Connection,
        head: http1.ResponseHead,
        keep: Callable[[_Connection], None] | None,
    ) -> None:
        self.status = head.status
        self.fields = head.fields
        self._connection: _Connection | None = connection
        self._keep = keep
        self._reader = framing.response_body_reader(head)
        if self._reader.done:
            self._finish()

    def get(self, name: str, default: str | None = None) -> str | None:
        """The value of a field (its name in lower case), or `default`."""
        for field, value in self.fields:
            if field == name:
                return value
        return default

    def __iter__(self) -> Iterator[bytes]:
        """The body's blocks. Raises `BrokenBody` if it ends before it is whole."""
        reader = self._reader
        try:
            while self._connection is not None and not reader.done:
                block = reader.read(self._connection.buffer)
                if block:
                    yield block
                elif block is None and not self._connection.move():
                    self._keep = None
                    reader.eof()
        except (http1.Refusal, framing.BrokenOff) as error:
            raise errors.BrokenBody(f"the answer is not whole: {error}") from None
        finally:
            if reader.done:
                self._finish()
            else:
                self.close()  # what is left of it must not be taken for the next answer

    def read(self) -> bytes:
        """The whole body."""
        return b"".join(self)

    def close(self) -> None:
        """Gives the answer up; its connection is closed if there was more to come."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _finish(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._keep is not None and not connection.is_sending and not connection.buffer:
            self._keep(connection)
        else:
            connection.close()


def _may_repeat(method: str, fields: list[tuple[str, str]], body: Body) -> bool:
    if body is not None and not isinstance(body, bytes):
        return False  # an iterable is used up
    return method == "GET" or any(name == "idempotency-key" for name, _ in fields)


def _sized(head: bytes, body: bytes) -> Iterator[tuple[bytes, bool]]:
    yield head, False
    yield body, True


def _chunked(head: bytes, body: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    yield head, False  # at once, however long the body's first block takes
    for block in body:
        if block:  # an empty chunk would end the body
            yield framing.chunk(block), False
    yield framing.LAST_CHUNK, True


# Sockets


def connect_unix(path: str, timeout: float | None) -> _socket.socket:
    """A connection to the socket at `path`, whatever its length. Raises `OSError`."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        if len(os.fsencode(path)) <= _SUN_PATH:
            sock.connect(path)
        else:
            _connect_far(sock, path)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_far(sock: _socket.socket, path: str) -> None:
    """Connects to a socket whose path doesn't fit `sun_path`: by a short name for its directory."""
    directory, name = os.path.split(path)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        short = f"/proc/self/fd/{descriptor}"
        if os.path.isdir(short):  # Linux
            sock.connect(f"{short}/{name}")
            return
    finally:
        os.close(descriptor)
    import tempfile  # elsewhere a link; changing the directory would change it for all threads

    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, "d")
        os.symlink(os.path.abspath(directory), link)
        sock.connect(f"{link}/{name}")


def _tcp(host: str, port: int, timeout: float | None) -> _socket.socket:
    if host == "localhost":  # the usual case, with no resolver asked
        found: list[Any] = [
            (_socket.AF_INET, ("127.0.0.1", port)),
            (_socket.AF_INET6, ("::1", port)),
        ]
    else:
        try:
            answers = _socket.getaddrinfo(host, port, 0, _socket.SOCK_STREAM)
        except UnicodeError:
            raise OSError(None, "not a host's name") from None
        found = [(family, address) for family, _, _, _, address in answers]
    first: OSError | None = None
    for family, address in found:
        sock = _socket.socket(family, _socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(address)
            # A request is one write; it must not wait for the answer to an earlier one.
            sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            first = first or error
        except BaseException:
            sock.close()
            raise
    raise first or OSError(None, f"{host} has no address")


# What OpenSSL calls an answer that isn't TLS, by its versions.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")


def _tls(sock: _socket.socket, host: str, timeout: float | None) -> ssl.SSLSocket:
    import socket
    import ssl

    plain = socket.socket(fileno=sock.detach())
    plain.settimeout(timeout)
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException as error:
        plain.close()
        if getattr(error, "reason", None) in _NO_TLS:
            hint = "what answers there speaks no TLS: use http:// in place of https://"
            raise OSError(None, hint) from None
        raise
