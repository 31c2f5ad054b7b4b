"""The HTTP gateway: requests from the web become frames, and answers that come as frames go back.

Each request is appended as `http.request`, and its connection waits for `http.response`
(docs/protocol.md, HTTP gateway; `exchange` has the form of both, `answers` who waits for what).

It has front doors, and whoever can reach their addresses may ask: `door` has what happens there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Optional

from xs import chunked, exchange, frame, tokens
from xs.access import tokens_of
from xs.activation import Sockets
from xs.address import is_socket_path, parse_host, without_token
from xs.answers import Answers, Found, RequestWork
from xs.commit import Append
from xs.content import Content
from xs.door import Door, Limits
from xs.errors import Invalid, Unavailable, Usage, XsError
from xs.hangups import Hangups
from xs.http1 import RequestHead
from xs.listener import Connections
from xs.log import ERROR, WARNING, log_of
from xs.store import Store
from xs.work import AppendWork, Work

_TIMEOUT_MAX = 10**9  # seconds; the system knows no wait of more than nine times that


class Options(NamedTuple):
    """How `xs serve` was told to answer the web."""

    timeout: float = Limits.answer_seconds
    most: int = Limits.waiting
    ttl: str = frame.FOREVER  # of what the gateway appends
    body_bytes: int = Limits.body_bytes
    certificate: Optional[str] = None  # a file; with it TCP addresses speak TLS
    key: Optional[str] = None  # a file; None: it is in that of the certificate


def options_of(get: Callable[[str], Optional[str]]) -> Options:
    """The options that a command line gives by their names. Raises `Usage`."""
    numbers = {}
    for name, default in (
        ("http-timeout", int(Limits.answer_seconds)),
        ("http-max", Limits.waiting),
        ("http-body", Limits.body_bytes),
    ):
        given = get(name)
        numbers[name] = default if given is None else int(given[:18])
        if not numbers[name]:
            raise Usage(f"--{name} takes a number above 0")
    if numbers["http-timeout"] > _TIMEOUT_MAX:
        raise Usage(f"--http-timeout takes at most {_TIMEOUT_MAX} seconds")
    if get("tls-key") is not None and get("tls-cert") is None:
        raise Usage("--tls-key goes with --tls-cert FILE")
    try:
        ttl = frame.parse_ttl(get("http-ttl"))
    except Invalid as error:
        raise Usage(f"--http-ttl: {error}") from None
    return Options(
        numbers["http-timeout"],
        numbers["http-max"],
        ttl,
        numbers["http-body"],
        get("tls-cert"),
        get("tls-key"),
    )


class Gateway:
    """The front doors of one store, and who waits behind them.

    It can `listen` before there is a store: who comes by then waits until it starts.
    """

    store: Store  # this and the next two from the start on
    answers: Answers
    hangups: Hangups

    def __init__(
        self,
        options: Options,
        log: Callable[[str], None],
        room: int,
        within: Connections | None = None,
        sockets: Optional[Sockets] = None,
    ) -> None:
        """`room`: connections that the system has room for; `within` are all that count for that.

        `sockets` has those that were handed down to this process. Raises `Usage` for what can't be.
        """
        self.options = options
        self.log = log_of(log)
        self.connections = Connections(room, within)
        self._tls = None
        if options.certificate is not None:
            from xs.certificate import server_context  # here: most stores are served without

            self._tls = server_context(options.certificate, options.key)
        self._doors: list[Door] = []
        self._sockets = sockets or Sockets()

    def listen(self, address: str) -> str:
        """Opens a door, and gives its address as a client may write it. Raises `XsError`.

        HOST:PORT or :PORT (this machine's loopback), after `http://` or `https://` if it is to be
        just that; or a path, for a Unix socket.
        """
        if is_socket_path(address):
            try:
                address.encode()
            except UnicodeEncodeError:  # `xs.start` tells it, in JSON
                raise Usage(f"can't answer the web at {address!r}: it is not UTF-8") from None
            sock = self._sockets.listen_unix_for_all(address)
            path = None if self._sockets.is_handed(address) else os.path.abspath(address)
            self._doors.append(Door(sock, self, None, path))
            return address
        # :0 lets the system choose a port.
        any_port = address.endswith(":0")
        shown = without_token(address)
        try:
            (kind, host, *port), token = parse_host(address[:-1] + "1" if any_port else address)
        except Invalid as error:
            raise Usage(f"can't answer the web at {shown!r}: {error}") from None
        if token is not None or not port:
            raise Usage(f"can't answer the web at {shown!r}: use HOST:PORT, or a socket's path")
        is_tls = kind == "tls" or (self._tls is not None and not address.startswith("http://"))
        if is_tls and self._tls is None:
            raise Usage(f"{address} needs a certificate: give --tls-cert, and --tls-key")
        host = "127.0.0.1" if host == "localhost" else host
        sock = self._sockets.listen_tcp(host, 0 if any_port else port[0])
        self._doors.append(Door(sock, self, self._tls if is_tls else None, None))
        name, number = sock.getsockname()[:2]
        scheme = "https" if is_tls else "http"
        return f"{scheme}://[{name}]:{number}" if ":" in name else f"{scheme}://{name}:{number}"

    def start(self, store: Store) -> None:
        """Answers requests. Raises `OSError`, `RuntimeError`, and leaves nothing open then."""
        self.store = store
        self._tokens = tokens.Finder(store.folder)
        self.hangups = Hangups()
        self.answers = Answers(store, self.options.most)
        try:
            self.hangups.start()
            self.answers.start()
            for door in self._doors:
                door.start()
        except BaseException:
            self.stop(0.0)
            raise

    def stop(self, seconds: float) -> None:
        """Accepts no more, lets who waits be answered for so long, and ends all connections.

        The store must take appends until this returns.
        """
        for door in self._doors:
            door.stop()
        self.connections.end(seconds)
        self.answers.stop()
        self.connections.wait(_GOODBYE_SECONDS)
        self.hangups.stop()

    def abandon(self) -> None:
        """Closes what `listen` has opened, when nothing has started."""
        for door in self._doors:
            door.stop()

    # What a connection asks of the store

    def is_misdirected(self, head: RequestHead) -> bool:
        """Whether a request has a token of the store's: it is for the API, and not to be stored."""
        return any(token and self._tokens.knows(token) for token in tokens_of(head))

    def take(self, body: Iterable[bytes]) -> Content | None:
        """A request's body, taken in. Raises `XsError`."""
        try:
            return self.store.cas.take(body)
        except Unavailable as error:
            self.log(f"gateway: a request's body can't be stored: {error}", ERROR)
            raise Unavailable("the request can't be stored just now") from None

    def submit(self, work: RequestWork) -> None:
        try:
            self.store.submit(work)
        except XsError as error:
            work.error = error
            work.discard()
            work.finish()

    def open(self, found: Found, part: exchange.Part) -> tuple[Optional[int], Iterator[bytes]]:
        """Size and blocks of the content that an answer's frame brings. Raises `XsError`.

        If the frame is the first of a run, they are those of `chunked.content`: the size is None.
        """
        if part.hash is not None:
            return self.store.content(part.hash)
        size, blocks = self._own(found)
        if part.more and self._begins_run(found):
            return None, chunked.run_content(self.store, found.id, blocks)
        return size, blocks

    def _begins_run(self, found: Found) -> bool:
        """Whether `more` was said of its content; mostly it is said of the answer."""
        if found.begins is not None:
            return found.begins
        return self.store.index.run(found.id, found.id, self.store.clock()) is not None

    def _own(self, found: Found) -> tuple[int, Iterator[bytes]]:
        if found.hash is None:
            return 0, iter(())
        if found.content is not None:
            return len(found.content), iter((found.content,))
        if found.stored is not None:
            return self.store.stored_content(found.stored)
        return self.store.content_of(found.id)

    def tell_disconnect(self, request_id: str) -> None:
        """Appends that nobody hears the (rest of the) answer any more."""
        meta = exchange.disconnect_meta(request_id)
        append = Append(exchange.DISCONNECT, meta=meta, ttl=self.options.ttl)
        try:
            self.store.submit(AppendWork(append, self._log_error))
        except XsError:
            pass  # the store is closing: who comes after it asks nobody of before

    def _log_error(self, work: Work) -> None:
        if work.error is not None:
            self.log(f"gateway: {exchange.DISCONNECT} can't be appended: {work.error}", WARNING)


_GOODBYE_SECONDS = 1.0  # for what is said at the end
