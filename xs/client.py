"""The other end of the API: requests over a socket, and the store's methods on top of them.

`HttpTransport` speaks HTTP/1.1 to a server; `Client` has the words of the store (append, cat, get,
…) and works on any transport, so the same calls go to a server or, with no server, to the store's
files (`local.Local`). This module knows no addresses (`address`), no grammar of HTTP (`http1`) and
nothing of how a store keeps its frames.

Its strategy is one connection, one exchange at a time, and no threads: while a body is on its way,
what the server says meanwhile is read (`_Connection.move`), so that neither end can wait for the
other for ever, and an answer that comes early is heard.
"""

from __future__ import annotations

# `socket` costs 7 ms to import (selectors, enum); the command line starts in about 10 altogether.
import _socket
import os

from xs import errors, http1

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any, BinaryIO, Protocol, Union, overload

    from xs.frame import Frame

    Fields = Iterable[tuple[str, str]]
    Body = Union[None, bytes, Iterable[bytes]]
    Content = Union[None, str, bytes, BinaryIO, Iterable[bytes]]
    Address = Union[tuple[str, str], tuple[str, str, int]]

    class Response(Protocol):
        """An answer: its status, its fields (names in lower case), and its body as it arrives."""

        status: int
        fields: list[tuple[str, str]]

        def get(self, name: str, default: str | None = None) -> str | None: ...
        def __iter__(self) -> Iterator[bytes]: ...
        def read(self) -> bytes: ...
        def close(self) -> None: ...

    class Transport(Protocol):
        """Whatever can take a request to a store: `HttpTransport`, or `local.Local`."""

        def request(
            self, method: str, target: str, fields: Fields = (), body: Body = None
        ) -> Response: ...
        def close(self) -> None: ...

else:
    Response = Transport = object  # for who names them at run time; `typing` costs 9 ms

BLOCK = 256 * 1024  # bytes read at once, from the socket and from files
_SMALL = 64 * 1024  # a body up to this size goes out with its head in one call
_KEPT_CONNECTIONS = 4  # idle ones, kept for the next requests
_SENTENCE_MAX = 64 * 1024  # bytes read of an error's sentence, or of a conflict's frame
_SUN_PATH = 103  # bytes of a socket's path that every system takes (Linux 107, macOS 103)
_LINES = ("content-type", "application/x-ndjson")


# What an answer's status means


def error_from(response: Response) -> errors.XsError:
    """The error that an answer with a status of 400 or above stands for; reads and ends it."""
    text = bytearray()
    try:
        for block in response:
            text += block
            if len(text) > _SENTENCE_MAX:
                break
    except errors.BrokenBody:
        pass  # half a sentence says more than that it broke off
    finally:
        response.close()
    status = response.status
    kind = (response.get("content-type") or "").partition(";")[0].strip().lower()
    if status == 409 and kind == "application/json":
        frame = bytes(text).strip()
        return errors.Conflict(response.get("xs-error") or _newest_is(frame), frame=frame)
    sentence = text.decode("utf-8", "replace").strip() or f"the server answered {status}"
    if status == 405:
        return errors.MethodNotAllowed(sentence, response.get("allow") or "")
    return _type_of(status)(sentence)


def _type_of(status: int) -> type[errors.XsError]:
    by_status: dict[int, type[errors.XsError]] = {
        400: errors.Invalid,
        401: errors.Unauthorized,
        403: errors.Forbidden,
        404: errors.NotFound,
        409: errors.Conflict,
        413: errors.TooLarge,
        421: errors.Misdirected,
        431: errors.TooLarge,
        503: errors.Unavailable,
        507: errors.Full,
    }
    return by_status.get(status) or (errors.Invalid if status < 500 else errors.XsError)


def _newest_is(frame: bytes) -> str:
    if frame == b"null":
        return "not appended: the topic has no frame"
    import json

    try:
        newest = json.loads(frame)["id"]
    except (ValueError, TypeError, KeyError):
        newest = "another one"
    return f"not appended: the topic's newest frame is {newest}"


# The wire


class _Closed(Exception):
    """The connection ended before a byte of the answer came."""


class _Connection:
    """One socket, with what has come in and what is still to go out."""

    __slots__ = (
        "_again",
        "_is_last",
        "_outgoing",
        "_pending",
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

    def use_tls(self, wrapped: ssl.SSLSocket) -> None:
        import ssl

        self.sock = wrapped
        self._again = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

    def is_open(self) -> bool:
        """Whether a connection that was kept may be used again: not closed, nothing unasked for."""
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

    def _too_slow(self) -> errors.Unavailable:
        return errors.Unavailable(f"no answer from {self._who} within {self._timeout:g} s")

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
    """

    __slots__ = ("_authority", "_connect", "_idle", "_timeout", "_token", "who")

    def __init__(
        self, connect: Address, token: str | None = None, timeout: float | None = None
    ) -> None:
        self._connect = connect
        self._token = token
        self._timeout = timeout
        self._idle: list[_Connection] = []
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

    def request(
        self, method: str, target: str, fields: Fields = (), body: Body = None
    ) -> HttpResponse:
        """Sends a request and returns its answer as soon as its head is there.

        `target` is in origin form, percent-encoded already (RFC 9112 §3.2.1). A `body` of bytes is
        sent with its length, an iterable of bytes chunked, as it comes (RFC 9112 §7.1). Raises
        `Unavailable` when the server can't be reached or goes away before it answers.
        """
        fields = list(fields)
        if self._token is not None:
            fields.append(("authorization", "Bearer " + self._token))
        if body is None:
            if method == "POST":
                fields.append(("content-length", "0"))
        elif isinstance(body, bytes):
            fields.append(("content-length", str(len(body))))
        else:
            fields.append(("transfer-encoding", "chunked"))
        try:
            head = http1.request_head(method, target, self._authority, fields)
        except ValueError as error:
            raise errors.Invalid(f"that can't be sent: {error}") from None

        connection = self._kept()
        if connection is not None:
            try:
                return self._exchange(connection, method, head, body)
            except _Closed:
                # It was open a moment ago, and idle for as long as the server keeps one. Whether
                # it saw the request, nobody knows: only what may be done twice is done again.
                if not _may_repeat(method, fields, body):
                    raise self._gone() from None
        try:
            return self._exchange(self._fresh(), method, head, body)
        except _Closed:
            raise self._gone() from None

    def close(self) -> None:
        """Closes the connections that are kept. The transport can be used again all the same."""
        while self._idle:
            self._idle.pop().close()

    def _gone(self) -> errors.Unavailable:
        return errors.Unavailable(f"{self.who} closed the connection before it answered")

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
            raise errors.Unavailable(
                f"can't connect to {self.who}: {error.strerror or error}"
            ) from None

    def _connected(self) -> _Connection:
        connect = self._connect
        if len(connect) == 2:
            return _Connection(_unix(connect[1], self._timeout), self._timeout, self.who)
        sock = _tcp(connect[1], connect[2], self._timeout)
        connection = _Connection(sock, self._timeout, self.who)
        if connect[0] == "tls":
            connection.use_tls(_tls(sock, connect[1], self._timeout))
        return connection

    def _exchange(
        self, connection: _Connection, method: str, head: bytes, body: Body
    ) -> HttpResponse:
        try:
            if isinstance(body, bytes) and len(body) <= _SMALL:
                connection.send(head + body)
            elif body is None:
                connection.send(head)
            elif isinstance(body, bytes):
                connection.send_while_reading(_sized(head, body))
            else:
                connection.send_while_reading(_chunked(head, body))
            answer = self._answer(connection, method)
        except BaseException:
            connection.close()
            raise
        if answer.status >= 300 and connection.is_sending:
            connection.stop_sending()  # refused: the rest of the body would be read by nobody
            answer.keep_alive = False
        keep = self._keep if answer.keep_alive else None
        return HttpResponse(connection, answer, keep)

    def _answer(self, connection: _Connection, method: str) -> http1.ResponseHead:
        while True:
            try:
                answer = http1.read_response_head(connection.buffer, method)
            except http1.Refusal as refusal:
                raise errors.Unavailable(f"no xs server is at {self.who}: {refusal}") from None
            if answer is not None:
                return answer
            if not connection.move():
                if connection.buffer:
                    raise errors.BrokenBody(f"the answer of {self.who} broke off in its head")
                raise _Closed

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
        self._reader = http1.response_body_reader(head)
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
        except (http1.Refusal, http1.BrokenOff) as error:
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
            yield http1.chunk(block), False
    yield http1.LAST_CHUNK, True


# Sockets


def _unix(path: str, timeout: float | None) -> _socket.socket:
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


def _tls(sock: _socket.socket, host: str, timeout: float | None) -> ssl.SSLSocket:
    import socket
    import ssl

    plain = socket.socket(fileno=sock.detach())
    plain.settimeout(timeout)
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


# Targets and fields

_UNRESERVED = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~")


def quote(text: str) -> str:
    """`text` percent-encoded for one segment of a path or a query's value (RFC 3986 §2.1)."""
    encoded = os.fsencode(text)  # arguments that aren't UTF-8 come as surrogates: their own bytes
    if _UNRESERVED.issuperset(encoded):
        return text
    return "".join(chr(b) if b in _UNRESERVED else f"%{b:02X}" for b in encoded)


def with_query(path: str, parameters: Iterable[tuple[str, object]]) -> str:
    """`path` and those parameters that aren't None: `("last", 3)` becomes `last=3`."""
    query = "&".join(f"{name}={quote(str(v))}" for name, v in parameters if v is not None)
    return f"{path}?{query}" if query else path


def meta_field(text: str) -> tuple[str, str]:
    """The field that carries meta given as JSON text: as it is, or base64 where a head can't."""
    if text.isascii() and text.isprintable():
        return "xs-meta", text
    import binascii

    encoded = text.encode("utf-8", "surrogateescape")
    return "xs-meta", binascii.b2a_base64(encoded, newline=False).decode("ascii")


def key_field(key: str) -> tuple[str, str]:
    """The field that carries an idempotency key. Raises `Invalid` for what a field can't hold."""
    if not key or key != key.strip() or not all(c.isprintable() for c in key):
        raise errors.Invalid("not a key: give 1 to 255 bytes, without control characters")
    return "idempotency-key", os.fsencode(key).decode("latin-1")


# The store's words


class Client:
    """A store, at any address and with or without a server: what `xs.open` gives.

    >>> import xs
    >>> store = xs.open(directory)
    >>> store.append("notes", "first", meta={"tag": "a"}).topic
    'notes'
    >>> newest = store.append("notes", "second")
    >>> [frame.meta for frame in store.cat()]
    [{'tag': 'a'}, None]
    >>> store.content(newest)
    b'second'
    >>> store.last("notes") == newest == store.get(newest.id)
    True
    >>> store.remove(newest)
    True
    >>> store.close()

    Frames come as `xs.Frame`. Where a frame or an id is asked for, either will do. Every method
    raises a subclass of `XsError` whose text is one sentence: `Invalid` for a wrong argument,
    `Unavailable` when the store can't be reached or is busy, … (`xs.errors`). It may be used by
    several threads; an iterator belongs to one.
    """

    __slots__ = ("_transport",)

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def append(
        self,
        topic: str,
        content: Content = None,
        *,
        meta: Any = None,
        ttl: str | int | None = None,
        if_last: Frame | str | None = None,
        key: str | None = None,
    ) -> Frame:
        """Appends one frame, and returns it once it is on disk.

        `content` is str (stored as UTF-8), bytes, a file open for reading bytes, or an iterable of
        bytes; the last two are sent as they are read. `meta` is any JSON value. `ttl`: "forever",
        "ephemeral", "time:<ms>" (or the number alone) or "last:<n>". With `if_last` (a frame, an
        id, or "none") it appends only if that is the topic's newest frame, else raises `Conflict`,
        whose `frame` is the newest one as JSON. The same `key` again on the same topic appends
        nothing, and returns the frame that it made the first time.
        """
        fields = []
        if meta is not None:
            fields.append(meta_field(_json(meta)))
        if key is not None:
            fields.append(key_field(key))
        if not topic:
            raise errors.Invalid("the topic is empty: give one such as notes or notes.add")
        target = with_query(
            "/append/" + quote(topic),
            [("ttl", ttl), ("if-last", None if if_last is None else _id(if_last))],
        )
        return self._frame(self._ask("POST", target, fields, _body(content)))

    def append_many(
        self, events: Iterable[Mapping[str, Any] | bytes | str], *, atomic: bool = False
    ) -> dict[str, Any]:
        """Appends many, in batches as they come: `{"appended", "first", "last", "errors"}`.

        Each event is a mapping of `topic`, and as needed `content` (str or bytes), `meta`, `ttl`,
        `if_last` and `key`, or such a line of JSON. `errors` holds `{"line", "error"}` of those
        that were refused (line 1 is the first); with `atomic`, one that is refused raises
        `Invalid`, and none is appended.
        """
        target = "/append?atomic=true" if atomic else "/append"
        summary: dict[str, Any] = self._value(self._ask("POST", target, [_LINES], _blocks(events)))
        return summary

    def cat(
        self,
        *,
        topic: str | None = None,
        follow: bool | int = False,
        new: bool = False,
        after: Frame | str | None = None,
        from_: Frame | str | None = None,
        until: Frame | str | None = None,
        last: int | None = None,
        limit: int | None = None,
        with_timestamp: bool = False,
        with_content: bool = False,
    ) -> Iterator[Frame]:
        """The frames of the stream, in order of id, as they are read.

        `topic`: one, `prefix.*`, or several with commas between. `after` (exclusive), `from_` and
        `until` (inclusive) are frames, ids, times (RFC 3339) or ago ("2h"). `last`: the newest n
        of these. With `follow` it goes on with live frames, after one `xs.threshold`, until its
        iterator is closed; a number asks for an `xs.pulse` that often, in ms. `new`: live only.
        `with_timestamp` and `with_content` fill in those attributes.
        """
        pulse = None if follow is False else "true" if follow is True else follow
        parameters = [
            ("follow", pulse),
            ("new", "true" if new else None),
            ("after", None if after is None else _id(after)),
            ("from", None if from_ is None else _id(from_)),
            ("until", None if until is None else _id(until)),
            ("topic", topic),
            ("last", last),
            ("limit", limit),
            ("with-timestamp", "true" if with_timestamp else None),
            ("with-content", "true" if with_content else None),
        ]
        # Asked here, not in a generator: a wrong argument raises at the call, and what is appended
        # after the call of a `new` reader is read by it.
        return self._frames(self._ask("GET", with_query("/", parameters)))

    def get(self, id: Frame | str) -> Frame | None:
        """The frame with that id, or None."""
        return self._frame_or_none("/" + quote(_id(id)))

    def next(self, id: Frame | str, topic: str | None = None) -> Frame | None:
        """The frame after that one (of `topic`), or None. The id need not be stored."""
        return self._frame_or_none(with_query("/next/" + quote(_id(id)), [("topic", topic)]))

    def prev(self, id: Frame | str, topic: str | None = None) -> Frame | None:
        """The frame before that one (of `topic`), or None. The id need not be stored."""
        return self._frame_or_none(with_query("/prev/" + quote(_id(id)), [("topic", topic)]))

    if TYPE_CHECKING:

        @overload
        def first(self, topic: str | None = None, n: None = None) -> Frame | None: ...
        @overload
        def first(self, topic: str | None = None, *, n: int) -> list[Frame]: ...
        @overload
        def first(self, topic: str | None, n: int) -> list[Frame]: ...

    def first(self, topic: str | None = None, n: int | None = None) -> Frame | list[Frame] | None:
        """The oldest frame (of `topic`) or None; with `n`, a list of the oldest n."""
        return self._end("first", topic, n)

    if TYPE_CHECKING:

        @overload
        def last(self, topic: str | None = None, n: None = None) -> Frame | None: ...
        @overload
        def last(self, topic: str | None = None, *, n: int) -> list[Frame]: ...
        @overload
        def last(self, topic: str | None, n: int) -> list[Frame]: ...

    def last(self, topic: str | None = None, n: int | None = None) -> Frame | list[Frame] | None:
        """The newest frame (of `topic`) or None; with `n`, a list of the newest n, oldest first."""
        return self._end("last", topic, n)

    def head(self, topic: str) -> Frame | None:
        """The newest frame of `topic`, or None."""
        return self._frame_or_none("/head/" + quote(topic))

    def content(self, frame: Frame | str) -> bytes:
        """A frame's content. Raises `NotFound` when it has none, or there is no such frame."""
        return b"".join(self.content_blocks(frame))

    def content_blocks(self, frame: Frame | str) -> Iterator[bytes]:
        """A frame's content in blocks, as they arrive."""
        return iter(self._ask("GET", "/content/" + quote(_id(frame))))

    def cas(self, hash: str) -> bytes:
        """The content with that hash. Raises `NotFound` when there is none."""
        return b"".join(self.cas_blocks(hash))

    def cas_blocks(self, hash: str) -> Iterator[bytes]:
        """The content with that hash in blocks, as they arrive."""
        return iter(self._ask("GET", "/cas/" + quote(hash)))

    def cas_post(self, content: Content) -> str:
        """Stores content with no frame, and returns its hash."""
        answer = self._ask("POST", "/cas", (), _body(content))
        return answer.read().decode("ascii", "replace").strip()

    def remove(self, frame: Frame | str) -> bool:
        """Removes a frame; False if there is none with that id."""
        try:
            self._ask("DELETE", "/" + quote(_id(frame))).read()
        except errors.NotFound:
            return False
        return True

    def import_(self, frames: Iterable[Frame | Mapping[str, Any] | bytes | str]) -> dict[str, Any]:
        """Stores frames as they are, ids included, and returns the server's summary.

        Each is a `Frame`, a mapping or a line of JSON. Content must be there already (`cas_post`),
        or come with it, as `cat(with_content=True)` gives it.
        """
        summary: dict[str, Any] = self._value(
            self._ask("POST", "/import", [_LINES], _blocks(frames))
        )
        return summary

    def version(self) -> str:
        """The version of the server, or of this package when there is no server."""
        return str(self._value(self._ask("GET", "/version"))["version"])

    def close(self) -> None:
        """Closes what is open to the store. Iterators that are in use stay."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, target: str, fields: Fields = (), body: Body = None) -> Response:
        response = self._transport.request(method, target, fields, body)
        if response.status >= 400:
            raise error_from(response)
        return response

    def _value(self, response: Response) -> Any:
        import json

        return json.loads(response.read())

    def _frame(self, response: Response) -> Frame:
        from xs.frame import Frame

        return Frame.from_json(response.read())

    def _frame_or_none(self, target: str) -> Frame | None:
        try:
            return self._frame(self._ask("GET", target))
        except errors.NotFound:
            return None

    def _frames(self, response: Response) -> Iterator[Frame]:
        from xs.frame import Frame

        try:
            for line in split_lines(response):
                yield Frame.from_json(line)
        finally:
            response.close()

    def _end(self, which: str, topic: str | None, n: int | None) -> Frame | list[Frame] | None:
        target = f"/{which}/{quote(topic)}" if topic is not None else f"/{which}"
        if n is None:
            return self._frame_or_none(target)
        try:
            return list(self._frames(self._ask("GET", with_query(target, [(which, n)]))))
        except errors.NotFound:
            return []


def _id(frame: Frame | str) -> str:
    return frame if isinstance(frame, str) else frame.id


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines in a body that comes in blocks, without their ends; empty ones are left out."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line:
                yield line
    if rest.strip():
        yield rest


def _json(value: object) -> str:
    import json

    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.Invalid(f"can't be written as JSON: {error}") from None


def _body(content: Content) -> Body:
    if content is None or isinstance(content, bytes):
        return content
    if isinstance(content, str):
        try:
            return content.encode("utf-8")
        except UnicodeEncodeError:
            raise errors.Invalid("content has half of a surrogate pair: give bytes") from None
    if isinstance(content, (bytearray, memoryview)):
        return bytes(content)
    if hasattr(content, "read"):
        file: Any = content
        return _only_bytes(iter(lambda: file.read(BLOCK) or None, None))
    return _only_bytes(content)


def _only_bytes(blocks: Iterable[bytes]) -> Iterator[bytes]:
    for block in blocks:
        if not isinstance(block, (bytes, bytearray, memoryview)):
            raise errors.Invalid("content comes in bytes: open a file in binary mode, encode text")
        yield bytes(block)


def _blocks(events: Iterable[Any]) -> Iterator[bytes]:
    """Lines of JSON, several in a block: each block is a system call and a chunk."""
    lines: list[bytes] = []
    size = 0
    for event in events:
        line = _line(event)
        lines.append(line)
        size += len(line)
        if size >= _SMALL:
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _line(event: Frame | Mapping[str, Any] | bytes | str) -> bytes:
    if isinstance(event, bytes):
        return event.rstrip(b"\r\n") + b"\n"
    if isinstance(event, str):
        return event.rstrip("\r\n").encode("utf-8") + b"\n"
    if isinstance(event, tuple):
        names = ("topic", "id", "hash", "meta", "ttl", "content")
        fields = {name: getattr(event, name) for name in names}
    else:
        fields = dict(event)
    content = fields.get("content")
    if content is None:
        fields.pop("content", None)
    elif isinstance(content, (bytes, bytearray, memoryview)):
        import binascii

        del fields["content"]
        fields["content_base64"] = binascii.b2a_base64(content, newline=False).decode("ascii")
    if "if_last" in fields and fields["if_last"] is not None:
        fields["if_last"] = _id(fields["if_last"])
    return _json(fields).encode("utf-8", "surrogatepass") + b"\n"
