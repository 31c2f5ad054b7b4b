"""The API on sockets: a thread for each connection, time limits, bounds, an orderly end.

A connection's thread reads requests and finds their answers; `outbox` writes them in that order.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional, Protocol

from xs import api, framing, http1, lookups
from xs.access import Access, Grant, rights_of, token_of
from xs.body import RequestBody
from xs.content import small
from xs.crowd import Crowd, can_take
from xs.delivery import Delivery
from xs.errors import BrokenBody, Unavailable, XsError
from xs.following import Following
from xs.grants import Grants
from xs.listener import Connections, Handler, Listener
from xs.log import DEBUG, WARNING, Seldom
from xs.messages import TEXT, Answer, Request, decode, error_answer
from xs.outbox import NO_ANSWER, Outbox
from xs.reader import Reader
from xs.repeats import HEAD_BYTES, LastRequest
from xs.responses import CLOSE, head_of, kept, of_frame, signed, whole
from xs.rights import EVERYTHING, Rights
from xs.scripts import Scripts
from xs.sockets import is_gone, peer_user, set_timeout
from xs.store import Store
from xs.work import Work

api.load()


class Limits:
    """What a client can make a server spend. One place; docs/protocol.md lists it.

    A head on a TCP address gets little room until the token has come in it.
    """

    connections = 4096  # at once, on all listeners of a server; above it: 503
    connections_kept = 64  # of them, for who comes by a Unix socket; a quarter, where there are few
    head_bytes = 1_500_000  # room for the largest meta, in base64; above it: 431
    head_bytes_tcp = 65_536  # the same on a TCP address, while the token is not in it
    head_seconds = 30.0  # from a head's first byte to its last: 408
    idle_seconds = 600.0  # without a request: the connection is closed
    written_seconds = 600.0  # for a client to take some of an answer that is in memory: closed
    answers_waiting = 128  # appends on one connection that are not answered yet
    drained_bytes = 262_144  # of a body that nobody wants, before the connection is closed instead
    linger_seconds = 2.0  # for a client that still sends while it is being refused
    stack_bytes = 256 * 1024  # of each thread


_RECEIVE = 256 * 1024
_RECEIVE_HEAD = 16 * 1024
_LOOKS = 20  # for the next request before the thread sleeps: some 40 microseconds
_SHORT_WAIT = 0.001  # seconds: a limit of none would be for ever
_STEADY = 2  # appends of a client that are taken for the first of many
_LOGGED = 128  # characters of a path: who has no token yet can send long ones, without end
_CLOSING = "the store is closing"


_Found = tuple[RequestBody, Answer]  # an answer, and what is left of the request
_Taken = tuple[http1.RequestHead, Optional[_Found]]


class Served(NamedTuple):
    """A store that is served, with what requests to it need.

    `visitors` are connections to the root store's addresses, while a request on them is about this
    store: it waits for them when it stops.
    """

    store: Store
    delivery: Delivery
    crowd: Crowd
    scripts: Optional[Scripts]
    visitors: Connections


class Others(Protocol):
    """Further stores of the same process, by name."""

    def find(self, name: str) -> Served:
        """The store of that name. Raises `NotFound`, `Unavailable`."""

    def status(self) -> list[dict[str, Any]]:
        """What is served, for `GET /stores`."""


OTHERS_WORD = "store"  # of a path, before a name and a path of that store's API


class Connection(Handler):
    """One client's connection. Its `handle` is the connection's own thread."""

    server: Server
    request: socket.socket

    def setup(self) -> None:
        self.sock = self.request
        self.buffer = bytearray()
        self._served = self.server.served  # what the request under way is about
        self._visits = False  # … another store than this address is of
        self._grant: Grant | None = None  # … with which token, if it is somebody else's
        self._last = LastRequest()
        self._out = Outbox(self.sock, Limits.answers_waiting)
        self._handed_on = False
        self._ending = False
        self.seen = 0.0
        self._appends = 0  # how many in a row, up to the last request, each of which came whole
        self._in_crowd = False  # from there on until its own thread is called for
        self._left: _Taken | Exception | None = None  # by the crowd's thread to this one

    def handle(self) -> None:
        try:
            self._serve_requests()
        except (OSError, BrokenBody):
            self._out.give_up()  # the client is gone

    def finish(self) -> None:
        if not self._handed_on:
            self._close()

    def _serve_requests(self) -> None:
        if self.server.is_for_owner and peer_user(self.sock) not in (None, 0, os.geteuid()):
            self._refuse(403, "this socket is for the store's owner alone")
            return
        while not self._ending:
            try:
                taken = self._next()
            except http1.Refusal as refused:
                self._refuse(refused.status, str(refused))
                return
            if taken is None:
                self._out.settle()  # a client that only sends no more still hears its answers
                return
            if not self._serve(*taken):
                return

    def _next(self) -> _Taken | None:
        """The next request; None if the client ends, or stays idle, before it."""
        if self.buffer:
            self._look_up()
        head = self._read_head() if self.buffer else None
        if (
            head is None
            and self._appends >= _STEADY
            and not self.buffer
            and not self.server.is_quiet
        ):
            self._in_crowd = True
            self.server.served.crowd.wait(self, Limits.idle_seconds)
            self._in_crowd = False
            left, self._left = self._left, None
            if isinstance(left, Exception):
                raise left
            if left is not None:
                return left
        if head is None:
            head = self._await_head()
        return None if head is None else (head, None)

    def take(self, works: list[Work]) -> bool:
        """See `crowd.Member`."""
        if self._in_crowd:
            try:
                self._in_crowd = self._take(works)
            except BlockingIOError:
                pass  # not yet
            except Exception as error:
                self._left = error
                self._in_crowd = False
        return self._in_crowd

    def _take(self, works: list[Work]) -> bool:
        data = self.sock.recv(_RECEIVE_HEAD, socket.MSG_DONTWAIT)
        if not data:
            return False
        self.seen = time.monotonic()
        self.buffer += data
        head = self._read_head()
        if head is None:
            return False
        if not can_take(head, len(self.buffer)) or not self._out.is_settled():
            self._left = (head, None)
            return False
        body, found = self._find_answer(head)
        if found.work is None or self.buffer:
            self._left = (head, (body, found))
            return False
        works.append(self._expected(head, found, keep=True))
        return True

    def _read_head(self) -> http1.RequestHead | None:
        """The head in the buffer, if it is whole."""
        head = self._last.take_head(self.buffer)
        if head is not None:
            return head
        access = self.server.access
        limit = Limits.head_bytes
        if access is not None and access.token.encode() not in self.buffer:
            limit = Limits.head_bytes_tcp
        start = bytes(self.buffer[:HEAD_BYTES])
        head = http1.read_request_head(self.buffer, limit, self._last.head)
        if head is not None:
            self._last.remember(start, head)
        return head

    def _await_head(self) -> http1.RequestHead | None:
        """Reads until there is a whole head; None if the client ends, or stays idle, before it."""
        started = 0.0
        while True:
            if self.buffer:
                started = started or time.monotonic()
                left = started + Limits.head_seconds - time.monotonic()
                set_timeout(self.sock, max(left, _SHORT_WAIT))
            try:
                data = self._receive_head()
            except BlockingIOError:
                data = b""
            if started and (not data or time.monotonic() - started > Limits.head_seconds):
                if self._ending:
                    self._refuse(Unavailable.status, _CLOSING)
                elif not data and time.monotonic() - started < Limits.head_seconds:
                    self._refuse(400, "the connection ended within a request's head")
                else:
                    self._refuse(408, f"no whole request within {Limits.head_seconds:.0f} s")
                return None
            if not data:
                return None
            self.buffer += data
            if not started and (self._append_alone() or self._look_up()) and not self.buffer:
                continue
            head = self._read_head()
            if head is not None:
                if started:
                    set_timeout(self.sock, Limits.idle_seconds)
                return head

    def _append_alone(self) -> bool:
        """Answers the append in the buffer, if its words are those of the last one, and it is all.

        The way of all others begins with `_read_head`, and finds out what is wrong with the rest.
        """
        append = self._last.lone_append(self.buffer)
        server = self.server
        if (
            append is None
            or not server.is_quiet
            or server.log.is_debug
            or self._ending
            or not self._out.is_settled()
            or not self._is_owners(self._last.head)
        ):
            return False
        try:
            data = self._last.body(self.buffer)
            content = small(data) if data else None
        except MemoryError:
            return False
        line = server.served.store.group.append_alone(append, content)
        if line is None:
            return False
        self.buffer.clear()
        self._appends += 1
        self._out.write(of_frame(line))
        return True

    def _look_up(self) -> bool:
        """Answers requests at the start of the buffer that are of `lookups`; whether one was."""
        server, like = self.server, self._last.head
        if like is None or server.access is not None or server.log.is_debug:
            return False
        there = len(self.buffer)
        while not self._ending:
            found = lookups.path_in(self.buffer, like)
            if found is None:
                break
            path, size = found
            self._out.settle()  # it reads what the requests before it have appended
            try:
                line = lookups.line_of(server.served.store, path)
            except Exception as error:  # a defect of ours, and no more than the whole way lost
                server.log.defect(path[:_LOGGED].decode("latin-1"), error)
                break
            if line is None:
                break
            del self.buffer[:size]
            self._out.write(of_frame(line))
            self._appends = 0
        return len(self.buffer) < there

    def _receive_head(self) -> bytes:
        """What has come, or comes next. Raises `BlockingIOError` when the time is over.

        A client that works alone is mostly back within microseconds, sooner than a thread that
        sleeps is woken up. Looking for it a few times first takes a tenth off each of its requests
        (bench/append.py, bench/lookup.py); with others there, their threads have the better use of
        that time.
        """
        if self.server.is_quiet:
            for _ in range(_LOOKS):
                try:
                    return self.sock.recv(_RECEIVE_HEAD, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    pass  # not yet
        return self.sock.recv(_RECEIVE_HEAD)

    def _serve(self, head: http1.RequestHead, found: Optional[_Found]) -> bool:
        """Answers a request, if its answer is not yet found; whether the connection goes on."""
        try:
            body, answer = found or self._find_answer(head)
            try:
                return self._give(head, body, answer)
            finally:
                close = getattr(answer.blocks, "close", None)
                if close is not None:  # what makes the blocks ends with who reads them, or doesn't
                    close()
        finally:
            if self._grant is not None and not self._handed_on:
                self.server.grants.unguard(self)
            if self._visits and not self._handed_on:
                self._visits = False
                self._served.visitors.discard(self)

    def _find_answer(self, head: http1.RequestHead) -> _Found:
        body = RequestBody(self, head)
        self._grant = None
        try:
            rights = rights_of(head, self.server.access)
        except XsError as refused:
            found = error_answer(refused)
            path = head.path[:_LOGGED]
            self.server.warn_of_stranger(f"{self._who}: {head.method} {path}: {refused}")
        else:
            if rights is not EVERYTHING:
                self._grant = Grant(token_of(head) or "", rights)
            if head.method in ("GET", "HEAD"):
                self._out.settle()  # it reads what the requests before it have appended
            found = self._ask(head, body, rights)
        return body, found

    def _give(self, head: http1.RequestHead, body: RequestBody, found: Answer) -> bool:
        """Writes an answer, or lets an append's commit do it; whether the connection goes on."""
        is_one = found.work is not None and body.came_whole and not self._visits
        self._appends = self._appends + 1 if is_one else 0
        if self.server.log.is_debug and found.work is None:
            self._note(head, found.status)
        if found.reader is not None or found.blocks is not None:
            self._guard()
        keep = head.keep_alive and not self._ending
        if not body.is_read and found.blocks is None:
            keep = self._drain_body(body) and keep
        if found.work is not None:
            self._answer_later(head, found, keep)
            if keep:
                return True
            self._out.settle()
        elif found.reader is not None:
            self._out.settle()
            self._follow(head, found, found.reader)
            return False
        else:
            self._out.settle()
            keep = self._answer(head, found, keep)
            if not body.is_read:  # not before: POST /append?each reads while it answers
                keep = self._drain_body(body) and keep
        if not keep:
            self._linger(body)
        return keep

    def _drain_body(self, body: RequestBody) -> bool:
        """Reads what is left of it, so that the connection can go on; False if it can't."""
        if not body.drain(Limits.drained_bytes, Limits.linger_seconds):
            return False
        set_timeout(self.sock, Limits.idle_seconds)
        return True

    def _ask(self, head: http1.RequestHead, body: RequestBody, rights: Rights) -> Answer:
        try:
            path = self._find_store(head.path, rights)
        except XsError as error:
            return error_answer(error)
        same = self._last.append_of(head, self.buffer) if rights is EVERYTHING else None
        if same is not None:
            return api.appended_again(same, body)
        request = Request(head.method, path, head.query, head.fields, body)
        request.rights = rights
        request.scripts = self._served.scripts
        if not self._visits:
            request.stores = self.server.others
        request.is_wanted = lambda: not is_gone(self.sock) and not self._ending
        request.will_run = self._guard
        try:
            found = api.answer(self._served.store, request)
            self._last.learn(head, found)
            return found
        except Exception as error:  # a defect of ours: this request fails, the server goes on
            self.server.log.defect(f"{head.method} {head.path[:_LOGGED]}", error)
            return Answer(500, TEXT, b"the server met an error of its own; see its log\n")

    def _is_owners(self, head: http1.RequestHead | None) -> bool:
        """Whether a request comes from who may do everything, now as before."""
        try:
            return head is not None and rights_of(head, self.server.access) is EVERYTHING
        except XsError:
            return False

    # For the body (see `body.Source`)

    def say_continue(self) -> None:
        self._out.settle()
        self._out.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def end_after_this(self) -> None:
        self._ending = True

    def broken_off(self) -> BrokenBody:
        """See `body.Source`."""
        if not self._ending:
            return BrokenBody("the body broke off before its end")
        closing = BrokenBody(_CLOSING)
        closing.status = Unavailable.status
        return closing

    def check_grant(self) -> None:
        """Raises `BrokenBody` if the token of the request under way is good no more."""
        access, grant = self.server.access, self._grant
        if grant is not None and access is not None and not access.holds(grant):
            self._ending = True
            broken = BrokenBody("the token was removed, or changed, while the body came")
            broken.status = 401
            raise broken

    def _guard(self) -> None:
        """From now on the response breaks off when the token that it hangs on is good no more."""
        if self._grant is not None:
            self.server.grants.guard(self, self._grant)

    def _note(self, head: http1.RequestHead, status: int) -> None:
        self.server.log(f"{self._who}: {head.method} {head.target}: {status}", DEBUG)

    @property
    def _who(self) -> str:
        """The client, for the log."""
        address = self.client_address
        return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "socket"

    def _find_store(self, path: str, rights: Rights) -> str:
        """Finds the store that a path is about; the path within it. Raises `NotFound`, …

        Answers come in the order of their requests, and another store commits when it likes: so
        what was asked of the one before is answered first.
        """
        found = self.server.served
        others = self.server.others
        word, slash, rest = path[1:].partition("/")
        if others is not None and slash and decode(word) == OTHERS_WORD:
            rights.check_admin("use another store than its own")
            name, slash, rest = rest.partition("/")
            found, path = others.find(decode(name)), slash + rest or "/"
        if found is not self._served:
            self._out.settle()
            self._served = found
        if found is not self.server.served:
            self._visits = True
            found.visitors.add(self)
        return path

    # Answers

    def _answer(self, head: http1.RequestHead, found: Answer, keep: bool) -> bool:
        """Writes an answer; whether another one can follow it on the connection."""
        if found.blocks is None:
            self._out.write(whole(head, found, keep))
            return keep
        fields = signed(found)
        chunked = found.length is None and head.minor == 1
        if found.length is not None:
            fields.append(("content-length", str(found.length)))
        elif chunked:
            fields.append(("transfer-encoding", "chunked"))
        else:
            keep = False
        start = head_of(found.status, [*fields, *kept(head, keep)])
        if head.method == "HEAD":
            self._out.write(start)
            return keep
        return self._write_blocks(head, start, found.blocks, chunked) and keep

    def _write_blocks(
        self, head: http1.RequestHead, start: bytes, blocks: Iterator[bytes], chunked: bool
    ) -> bool:
        """Writes a body as it comes, its head with the first of it; False if it broke off."""
        try:
            for block in blocks:
                if block:
                    self._out.write_body(
                        start, *(framing.chunk_parts(block) if chunked else (block,))
                    )
                    start = b""
                    del block  # before the next one is made
                elif start:  # nothing comes for a while: that it will is an answer already
                    self._out.write_body(start)
                    start = b""
                elif is_gone(self.sock):
                    raise BrokenPipeError
        except XsError as error:
            # The head is out: a body that breaks off is all that can still be said.
            if start:
                self._out.write_body(start)
            self.server.log(f"{head.method} {head.path[:_LOGGED]}: broke off: {error}", WARNING)
            return False
        self._out.write_body(start + (framing.LAST_CHUNK if chunked else b""))
        return True

    def _answer_later(self, head: http1.RequestHead, found: Answer, keep: bool) -> None:
        work = self._expected(head, found, keep)
        try:
            self._served.store.submit(work)
        except XsError as error:
            work.fail(error)

    def _expected(self, head: http1.RequestHead, found: Answer, keep: bool) -> Work:
        """What is to be submitted for an append, which is then answered in its turn."""
        work, finish = found.work, found.finish
        assert work is not None and finish is not None

        def done(work: Work) -> None:
            try:
                answer = finish(work)
                data = whole(head, answer, keep)
                if self.server.log.is_debug:
                    self._note(head, answer.status)
            except MemoryError:
                data = NO_ANSWER
            self._out.deliver(work, data)

        self._out.expect(work)
        work.done = done
        return work

    def _refuse(self, status: int, sentence: str) -> None:
        self.server.log(f"{self._who}: no request: {status}: {sentence}", DEBUG)
        self._out.settle()
        found = Answer(status, TEXT, f"{sentence}\n".encode())
        data = head_of(status, [*found.fields, ("content-length", str(len(found.body))), CLOSE])
        self._out.write(data + found.body)
        self._linger(None)

    def _linger(self, body: Optional[RequestBody]) -> None:
        """Lets a client that still sends read the answer: closing at once would reset it."""
        if body is not None and body.is_read and not self.buffer:
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + Limits.linger_seconds
            set_timeout(self.sock, Limits.linger_seconds)
            while time.monotonic() < deadline and self.sock.recv(_RECEIVE):
                pass
        except OSError:
            pass  # it is gone, or silent: either way there is nobody to wait for

    def _follow(self, head: http1.RequestHead, found: Answer, reader: Reader) -> None:
        chunked = head.minor == 1
        fields = [*signed(found), ("cache-control", "no-store"), CLOSE]
        if chunked:
            fields.append(("transfer-encoding", "chunked"))
        # Before the first frame: who sees the head knows that nothing from now on is missed.
        self._out.write_body(head_of(found.status, fields))
        if head.method == "HEAD":
            return
        store, delivery = self._served.store, self._served.delivery
        following = Following(self.sock, self._out, store, delivery, self._close, chunked=chunked)
        try:
            self._handed_on = following.run(reader)
        except XsError as error:
            self.server.log(f"{head.method} {head.path[:_LOGGED]}: broke off: {error}", WARNING)

    # The end

    def revoke(self) -> None:
        """The token of the request under way is good no more: its response breaks off.

        Whoever has the connection, its thread or the delivery's, finds it as if the client had
        gone.
        """
        self._out.break_off()

    def end(self) -> None:
        """Lets the request under way be answered, and reads no other."""
        self._ending = True
        try:
            self.sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # it has ended by itself

    def drop(self) -> None:
        """Its time is up."""
        if not self._in_crowd:  # else its own thread is about to close it
            self._close()

    def _close(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other end was first
        self._out.close()
        if self._visits:
            self._served.visitors.discard(self)
        self.server.closed(self)


# A listener


class Server(Listener):
    """One listener of one store's API."""

    def __init__(
        self,
        sock: socket.socket,
        served: Served,
        connections: Connections,
        access: Optional[Access] = None,
        others: Optional[Others] = None,
        log: Any = None,
        *,
        is_for_owner: bool = False,
    ) -> None:
        """`sock` is bound; a TCP address has `access`, the Unix socket none.

        `is_for_owner`: whoever else can connect, for instance since somebody has changed the
        socket's mode, is refused all the same.
        """
        super().__init__(sock, Connection, connections, log or (lambda text: None))
        self.served = served
        self.others = others
        self.access = access
        self.is_for_owner = is_for_owner
        self.grants = Grants(access, self.wake)
        self.warn_of_stranger = Seldom(self.log)

    def closed(self, connection: Any) -> None:
        self.grants.unguard(connection)
        super().closed(connection)

    def look_around(self) -> Optional[float]:
        revoked, seconds = self.grants.look()
        if revoked:
            self.log(
                f"responses that broke off, their tokens being removed or changed: {revoked}",
                WARNING,
            )
        return seconds

    @property
    def most(self) -> int:
        return Limits.connections

    def prepare(self, sock: socket.socket) -> None:
        # Time limits are the kernel's: Python's own would cost a second system call for each read.
        sock.setblocking(True)
        set_timeout(sock, Limits.idle_seconds)
        set_timeout(sock, Limits.written_seconds, socket.SO_SNDTIMEO)
        super().prepare(sock)

    @property
    def uses_kept_room(self) -> bool:
        # Whoever can connect over TCP, with a token or without, may not lock the owner out.
        return self.access is None

    @property
    def is_quiet(self) -> bool:
        """Whether there is one connection, or none beside the one that asks."""
        return self._connections.count <= 1
