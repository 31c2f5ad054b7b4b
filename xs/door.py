"""A front door of a gateway: one address, and the connections that come through it.

A connection has a thread of its own, which reads a request, waits for its answer, and writes that.
Everything that a client can make a server spend is bounded, in `Limits`, and a client that is slow,
or gone, costs others nothing.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional

from xs import exchange, framing, http1, ids, times
from xs.answers import Found, Gone, Lost, RequestWork, Stopped, Waiter
from xs.commit import Append
from xs.content import Content, discard
from xs.errors import BrokenBody, Invalid, TooLarge, XsError
from xs.exchange import NotHttp
from xs.listener import Handler, Listener
from xs.log import DEBUG, WARNING
from xs.sockets import file_at, remove_unix, set_timeout

if TYPE_CHECKING:
    import ssl

    from xs.gateway import Gateway


class Limits:
    """What a client from the web can make a server spend. One place; docs/protocol.md lists it."""

    connections = 4096  # at once, on all addresses of the gateway; above it: 503
    waiting = 1024  # requests that wait for their answers, unless --http-max says otherwise: 503
    answer_seconds = 30.0  # for an answer to begin, unless --http-timeout says otherwise: 504
    handshake_seconds = 10.0  # for that of TLS
    head_bytes = 65_536  # above it: 431
    head_seconds = 30.0  # from a head's first byte to its last: 408
    idle_seconds = 75.0  # without a request: the connection is closed
    body_bytes = 1 << 30  # unless --http-body says otherwise: 413
    body_seconds = 30.0  # for a body to come: 408 …
    body_rate = 1000  # … and a second more for each so many bytes that have come
    written_bytes = 65_536  # that a client has to take …
    written_seconds = 30.0  # … within this time: else its connection is closed
    linger_seconds = 2.0  # for a client that still sends while it is being refused


_RECEIVE = 256 * 1024
_RECEIVE_HEAD = 16 * 1024
_TLS_HANDSHAKE = b"\x16"  # RFC 8446 §5.1: the type of a connection's first record
_CLOSE = ("connection", "close")
_TEXT = ("content-type", "text/plain; charset=utf-8")
_STOPPING = "the server is stopping"
_MISDIRECTED = (
    "this address is for requests from the web, whose headers become events: commands and tokens "
    "are for the store's own address (xs serve --expose)"
)
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection


class Connection(Handler):
    """One client's connection. Its `handle` is the connection's own thread."""

    server: Door
    request: socket.socket

    def setup(self) -> None:
        self.gateway = self.server.gateway
        self.sock = self.request
        self.buffer = bytearray()
        self._limit = 0.0  # seconds that the system waits in a read
        self._is_tls = False
        self._is_gone = False
        self._waiter: Optional[Waiter] = None
        self._has_more = False  # whether frames of the answer under way may still come
        self._ending = False
        self._is_refused = False  # whether the client is told no, and may still be sending
        self._broken = False  # whether the end of what is sent is not where it should be
        self._said_goodbye = True  # the end of TLS; there is none yet

    def handle(self) -> None:
        try:
            if self.server.tls is None or self._shake_hands(self.server.tls):
                self.gateway.hangups.watch(self.sock, self._tell_gone)
                self._serve_requests()
        except (OSError, Gone):
            self._broken = True  # the client is gone, or too slow to be waited for

    def finish(self) -> None:
        if not self._broken:
            self._end_output()
        self.gateway.hangups.unwatch(self.sock)
        self.sock.close()
        self.server.closed(self)

    def _tell_gone(self) -> None:
        """The client has closed its end: nobody waits any more."""
        self._is_gone = True
        waiter = self._waiter
        if waiter is not None:
            waiter.fail(Gone())

    def _end_output(self) -> None:
        """Nothing more is sent. With TLS that is said, so that nobody can have cut it short."""
        if not self._said_goodbye:
            self._said_goodbye = True
            self.sock.settimeout(0.0)  # for the other end's goodbye nobody waits
            try:
                self.sock.unwrap()  # type: ignore[attr-defined]
            except (OSError, ValueError):
                pass
        _shut_quietly(self.sock, socket.SHUT_WR)

    def _shake_hands(self, context: ssl.SSLContext) -> bool:
        self._allow(Limits.handshake_seconds)
        first = self.sock.recv(1, socket.MSG_PEEK)
        if first and first != _TLS_HANDSHAKE:
            self._refuse(400, "this address speaks TLS: use https")
            return False
        self.sock = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        self.sock.settimeout(Limits.handshake_seconds)
        self.sock.do_handshake()
        self._is_tls = True
        self._said_goodbye = False
        return True

    # Requests

    def _serve_requests(self) -> None:
        while not self._ending:
            try:
                head = self._next_head()
            except http1.Refusal as refused:
                self._refuse(refused.status, str(refused))
                return
            if head is None:
                return
            if not self._serve(head):
                if (self.buffer or self._is_refused) and not self._broken:
                    self._linger()
                return

    def _next_head(self) -> http1.RequestHead | None:
        """The next request's head; None if the client ends, or asks for nothing for too long."""
        started: Optional[float] = None
        while True:
            if self.buffer:
                head = http1.read_request_head(self.buffer, Limits.head_bytes)
                if head is not None:
                    return head
                if started is None:
                    started = time.monotonic()
            seconds = Limits.idle_seconds
            if started is not None:
                seconds = started + Limits.head_seconds - time.monotonic()
            data = self._receive(_RECEIVE_HEAD, seconds)
            if not data:
                if started is None:
                    return None
                if data is None:
                    raise http1.Refusal(408, f"no whole head within {Limits.head_seconds:.0f} s")
                if self._ending:
                    raise http1.Refusal(503, _STOPPING)
                raise http1.Refusal(400, "the connection ended within a request's head")
            self.buffer += data

    def _receive(self, size: int, seconds: float) -> bytes | None:
        """What has come, or comes within that time; None if nothing does, b"" at the end."""
        if seconds <= 0:
            return None
        self._allow(seconds)
        try:
            return self.sock.recv(size)
        except (socket.timeout, BlockingIOError):
            return None

    def _allow(self, seconds: float) -> None:
        """Sets the limit for the next read, and for writes.

        Without TLS the system keeps it: Python's own costs another system call for each.
        """
        if self._is_tls:
            self.sock.settimeout(seconds)
        elif seconds != self._limit:
            set_timeout(self.sock, max(seconds, 0.001))  # 0 would be no limit at all
            self._limit = seconds

    def _serve(self, head: http1.RequestHead) -> bool:
        """Answers one request; whether the connection goes on."""
        gateway = self.gateway
        if gateway.is_misdirected(head):
            return self._say(head, 421, _MISDIRECTED, keep=False)
        body = _Body(self, head, gateway.options.body_bytes)
        content: Content | None = None
        try:
            gateway.answers.check_room()  # before the body is taken in
            content = gateway.take(body)
            waiter = gateway.answers.expect()
        except XsError as error:
            discard(content)
            keep = head.keep_alive and body.is_read and not self._ending
            return self._say(head, error.status, str(error), keep=keep)
        self._waiter = waiter
        if self._is_gone:
            waiter.fail(Gone())
        try:
            return self._exchange(head, content, waiter)
        finally:
            self._waiter = None
            gateway.answers.forget(waiter)

    def _exchange(self, head: http1.RequestHead, content: Content | None, waiter: Waiter) -> bool:
        meta = exchange.request_meta(waiter.request_id, head, _ip(self.client_address))
        append = Append(exchange.REQUEST, content, meta, self.gateway.options.ttl)
        work = RequestWork(append, waiter)
        self._has_more = True
        try:
            self.gateway.submit(work)
            return self._answer(head, waiter)
        except (OSError, Gone):
            self._has_more = True  # or as good as that: not all of it has been heard
            raise
        finally:
            if self._has_more and work.error is None:
                self.gateway.tell_disconnect(waiter.request_id)

    # Answers

    def _answer(self, head: http1.RequestHead, waiter: Waiter) -> bool:
        """Waits for the answer and writes it; whether the connection goes on."""
        try:
            found = waiter.next(self.gateway.options.timeout)
        except TimeoutError:
            # Whoever begins an answer from now on is to learn that nobody hears it: `_has_more`.
            self.gateway.answers.forget(waiter)  # who hears of it finds its place free
            seconds = self.gateway.options.timeout
            return self._say(head, 504, f"nobody answered within {seconds:g} s")
        except Stopped:
            return self._say(head, 503, _STOPPING, keep=False)
        except XsError as error:  # the request could not be appended
            self._has_more = False
            if isinstance(error, Invalid):  # the one rule that it can break
                error = TooLarge(f"the request's body is too large for this server: {error}")
            return self._say(head, error.status, str(error))
        try:
            part, framed, blocks = self._framed(head, found, waiter)
        except (NotHttp, XsError) as error:
            self._has_more = found.meta.get("more") is True
            self._log(head, found, f"is not sent: {error}")
            return self._say(head, 502, "the answer to this request was not HTTP; see the log")
        self._has_more = part.more
        if not framed.has_body:
            self._write(framed.head)
            return framed.keep
        return self._send(head, found, framed, blocks, waiter)

    def _framed(
        self, head: http1.RequestHead, found: Found, waiter: Waiter
    ) -> tuple[exchange.Part, exchange.Framed, Iterator[bytes]]:
        """What an answer's first frame makes of it. Raises `NotHttp`, `XsError`."""
        part = exchange.part_of(found.meta, found.hash)
        response = exchange.response_of(found.meta)
        size, blocks = self._content(found, part, waiter)
        keep = head.keep_alive and not self._ending
        framed = exchange.framed(response, size or 0, head, time.time(), more=part.more, keep=keep)
        if size is not None:
            blocks = _chained(next(blocks, b""), blocks)  # damage shows here, unless it is large
        self._note(head, response.status)
        return part, framed, blocks

    def _content(
        self, found: Found, part: exchange.Part, waiter: Waiter
    ) -> tuple[Optional[int], Iterator[bytes]]:
        """As `Gateway.open`; the waiter knows of it if it is a run. Raises `XsError`."""
        size, blocks = self.gateway.open(found, part)
        if size is None:
            waiter.reads(found.id)
            blocks = self._as_it_comes(waiter, blocks)
        return size, blocks

    def _as_it_comes(self, waiter: Waiter, blocks: Iterator[bytes]) -> Iterator[bytes]:
        """The blocks of a run, without empty ones, while there is somebody to read them."""
        for block in blocks:
            if self._is_gone:
                raise Gone
            if block:
                yield block
            else:  # nothing has come for a while
                waiter.check()

    def _send(
        self,
        head: http1.RequestHead,
        found: Found,
        framed: exchange.Framed,
        blocks: Iterator[bytes],
        waiter: Waiter,
    ) -> bool:
        start = framed.head
        try:
            while True:
                if start and waiter.run is not None:  # its first piece may be a long time coming
                    self._write(start)
                    start = b""
                for block in blocks:
                    self._write(start + (framing.chunk(block) if framed.is_chunked else block))
                    start = b""
                if start:
                    self._write(start)
                    start = b""
                if waiter.run is not None:  # `more` was said of the run, which has ended
                    self._has_more = False
                if not self._has_more:
                    break
                found = waiter.next()
                part = exchange.part_of(found.meta, found.hash)
                _, blocks = self._content(found, part, waiter)
                self._has_more = part.more
        except Stopped:
            return self._break_off(framed)
        except (NotHttp, Lost, XsError) as error:
            # The head is out: a body that breaks off is all that can still be said.
            self._log(head, found, f"breaks off: {error}")
            return self._break_off(framed)
        if framed.is_chunked:
            self._write(framing.LAST_CHUNK)
        return framed.keep

    def _break_off(self, framed: exchange.Framed) -> bool:
        self._has_more = self._broken = True
        if not framed.is_chunked:
            # Without chunks the end of the connection may be taken for the body's own.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        return False

    def _log(self, head: http1.RequestHead, found: Found, what: str) -> None:
        self.server.log(
            f"gateway: {head.method} {head.path[:128]}: the answer {ids.text(found.id)} {what}",
            WARNING,
        )

    def _note(self, head: http1.RequestHead | None, status: int, why: str = "") -> None:
        # Whatever it is that clients from the web do, only who looks for it wants to be told.
        if self.server.log.is_debug:
            who = _ip(self.client_address) or "socket"
            what = f"{head.method} {head.target}" if head is not None else "no request"
            self.server.log(f"gateway: {who}: {what}: {status}{why}", DEBUG)

    def _say(
        self, head: http1.RequestHead | None, status: int, sentence: str, *, keep: bool = True
    ) -> bool:
        """Answers for itself, with one sentence; whether the connection goes on."""
        self._note(head, status, f": {sentence}")
        body = f"{sentence}\n".encode("utf-8", "replace")
        keep = keep and head is not None and head.keep_alive and not self._ending
        fields = [
            _TEXT,
            ("date", times.http_date(int(time.time()))),
            ("content-length", str(len(body))),
        ]
        if status == 503:
            fields.append(("retry-after", "1"))
        if not keep:
            fields.append(_CLOSE)
        elif head is not None and head.minor == 0:
            fields.append(("connection", "keep-alive"))
        data = http1.response_head(status, fields)
        self._write(data if head is not None and head.method == "HEAD" else data + body)
        self._is_refused = not keep
        return keep

    def _refuse(self, status: int, sentence: str) -> None:
        """Answers what is no request, and lets the client hear it."""
        self._say(None, status, sentence, keep=False)
        self._linger()

    def _write(self, data: bytes) -> None:
        """Writes all of it. Raises `OSError` if the client is gone, or takes it too slowly."""
        if self._is_tls:
            self.sock.settimeout(Limits.written_seconds)
        view = memoryview(data)
        for start in range(0, len(data), Limits.written_bytes):
            part = view[start : start + Limits.written_bytes]
            deadline = time.monotonic() + Limits.written_seconds
            sent = self.sock.send(part)
            if sent < len(part):
                self._write_rest(part[sent:], deadline)
            if time.monotonic() > deadline:  # the system counts anew with each bit that is taken
                raise TimeoutError

    def _write_rest(self, part: memoryview, deadline: float) -> None:
        while part:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._limit_sends(left)
            part = part[self.sock.send(part) :]
        self._limit_sends(Limits.written_seconds)

    def _limit_sends(self, seconds: float) -> None:
        """How long a `send` may take."""
        if self._is_tls:
            self.sock.settimeout(seconds)
        else:
            set_timeout(self.sock, seconds, socket.SO_SNDTIMEO)

    def _linger(self) -> None:
        """Lets a client that still sends read the answer: closing at once would reset it."""
        self._end_output()
        deadline = time.monotonic() + Limits.linger_seconds
        left = Limits.linger_seconds
        try:
            while left > 0:
                self.sock.settimeout(left)
                if not socket.socket.recv(self.sock, _RECEIVE):  # of TLS as it is
                    return
                left = deadline - time.monotonic()
        except OSError:
            pass  # it is gone, or silent: either way there is nobody to wait for

    # The end

    def end(self) -> None:
        """Lets a request that waits be answered, ends a run of frames, and reads no other head."""
        self._ending = True
        waiter = self._waiter
        if waiter is None:
            _shut_quietly(self.sock, socket.SHUT_RD)
        elif waiter.has_begun:
            waiter.fail(Stopped())

    def drop(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.has_begun:
            waiter.fail(Stopped())
        else:
            _shut_quietly(self.sock, socket.SHUT_RDWR)


class _Body:
    """A request's body as blocks, read from the socket as they are asked for.

    Its errors are `XsError`s, which have their status: whoever takes the body in may fail as well.
    """

    def __init__(self, connection: Connection, head: http1.RequestHead, most: int) -> None:
        self._connection = connection
        self._head = head
        self._most = most
        self._reader = framing.body_reader(head)

    @property
    def is_read(self) -> bool:
        return self._reader.done

    def __iter__(self) -> Iterator[bytes]:
        if self._reader.done:
            return
        if (self._head.length or 0) > self._most:
            raise self._too_large()
        buffer = self._connection.buffer
        if self._head.expects_continue and not buffer:
            self._write_continue()
        started = time.monotonic()
        size = 0
        try:
            while True:
                data = self._reader.read(buffer)
                if data:
                    size += len(data)
                    if size > self._most:
                        raise self._too_large()
                    yield data
                if self._reader.done:
                    return
                if data is None or not buffer:
                    allowed = Limits.body_seconds + size / Limits.body_rate
                    self._receive(buffer, started + allowed - time.monotonic())
        except http1.Refusal as refused:
            raise _broken_body(refused.status, str(refused)) from None

    def _write_continue(self) -> None:
        try:
            self._connection._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        except OSError:
            raise _broken_body(400, "the client is gone") from None

    def _receive(self, buffer: bytearray, seconds: float) -> None:
        try:
            data = self._connection._receive(_RECEIVE, seconds)
        except OSError:
            data = b""
        if data is None:
            raise _broken_body(408, "the request's body comes too slowly")
        if not data and self._connection._ending:
            raise _broken_body(503, _STOPPING)
        if not data:
            raise _broken_body(400, "the request's body broke off before its end")
        buffer += data

    def _too_large(self) -> XsError:
        return TooLarge(f"the request's body is too large: at most {self._most} bytes")


def _broken_body(status: int, sentence: str) -> BrokenBody:
    error = BrokenBody(sentence)
    error.status = status
    return error


class Door(Listener):
    """One address of a gateway."""

    def __init__(
        self,
        sock: socket.socket,
        gateway: Gateway,
        tls: Optional[ssl.SSLContext],
        path: Optional[str],
    ) -> None:
        """`path`: that of a Unix socket which goes with the listener."""
        super().__init__(sock, Connection, gateway.connections, gateway.log)
        self.gateway = gateway
        self.tls = tls
        self._path = path
        self._file = None if path is None else file_at(path)

    def stop(self) -> None:
        """As in `Listener`, and first removes what is at its path, unless that is another's."""
        path, self._path = self._path, None
        if path is not None:
            remove_unix(path, self._file)
        super().stop()

    @property
    def most(self) -> int:
        return Limits.connections

    def prepare(self, sock: socket.socket) -> None:
        super().prepare(sock)
        sock.setblocking(True)
        set_timeout(sock, Limits.written_seconds, socket.SO_SNDTIMEO)
        if sock.family != socket.AF_UNIX:
            # A client whose machine is gone says nothing, and a stream of events may have no end.
            for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
                option = getattr(socket, name, None)
                if option is not None:
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def refuse(self, sock: socket.socket) -> None:
        if self.tls is None:
            super().refuse(sock)


def _ip(address: Any) -> Optional[str]:
    """The IP address of a client; None on a Unix socket."""
    if not isinstance(address, tuple):
        return None
    ip: str = address[0]
    return ip[7:] if ip.startswith("::ffff:") and "." in ip else ip  # IPv4 on an IPv6 socket


def _chained(first: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
        yield from blocks


def _shut_quietly(sock: socket.socket, how: int) -> None:
    """Shuts the socket itself: TLS above it, which another thread may be using, isn't asked."""
    try:
        socket.socket.shutdown(sock, how)
    except OSError:
        pass  # the other end was first
