"""`xs serve`: a store, its listeners, its delivery; start, signals, stop.

The order of starting: lock and open the store, listen, append `xs.start`, accept, start scripts.
The order of stopping: end the scripts, append `xs.stop` as the last frame, give followers what is
still theirs and end them, answer the requests under way, close the store, give the lock back.
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from xs import liveness, log, meta
from xs.access import Access, access
from xs.activation import Sockets, handed_down
from xs.commit import Append
from xs.delivery import Delivery
from xs.errors import Damaged, Invalid, Locked, NoAddress, NoStore, NotAStore, Usage, XsError
from xs.httpd import Limits, Server
from xs.listener import Connections
from xs.log import Log
from xs.notify import Manager, Watchdog
from xs.scripts import Scripts
from xs.signals import Signals
from xs.store import Store
from xs.version import VERSION

if TYPE_CHECKING:
    from xs.gateway import Gateway, Options

SOCKET = "sock"
TOKEN = "token"

_OWN_FILES = 256  # of the server itself: the index, content, listeners
_GC_THRESHOLD = 50_000  # objects made, less those that went, between two looks for garbage
GRACE_SECONDS = 10  # for what is under way when the server stops, unless --grace says otherwise
_WEB_GRACE = 0.5  # of it, at most, are for requests from the web

# Exit statuses of a server that can't start, for whoever has to decide whether to try again.
_EXITS = ((Locked, 3), ((NotAStore, NoStore, Damaged), 4), (NoAddress, 5))
_TO_STANDARD_ERROR = log.Options()

_log = Log()  # of this process; `serve` says where it goes


class Web(NamedTuple):
    """What is to answer the web: on which addresses, and how."""

    addresses: list[str]
    options: Options


class Running:
    """A server that runs, with its threads. `stop` ends it."""

    def __init__(
        self,
        folder: str,
        expose: list[str],
        hosts: list[str],
        web: Web | None = None,
        *,
        scripts: bool = True,
        sockets: Sockets | None = None,
    ) -> None:
        """Starts to serve the store in `folder`. If it raises `XsError`, nothing is left open.

        `sockets` has those that were handed down to this process.
        """
        room = _make_room(web is not None)
        self.folder = os.path.abspath(folder)
        self.socket_path = os.path.join(self.folder, SOCKET)
        self.addresses: list[str] = []
        self.web_addresses: list[str] = []
        addresses = [exposed_address(each) for each in expose]
        self._servers: list[Server] = []
        self._connections = Connections(room)
        self._gateway: Gateway | None = None
        self._sockets = sockets or Sockets()
        self._store = Store(self.folder, exclusive=True, create=True)
        try:
            self._delivery = Delivery(self._store)
            self._scripts = Scripts(self._store, _log) if scripts else None
            os.chmod(self.folder, 0o700)
            self._listen(self._sockets.listen_unix(self.socket_path))
            for path in self._sockets.unix:
                self._listen(self._sockets.listen_unix(path))
            for host, port in addresses:
                self._expose(host, port, hosts)
            for host, port in self._sockets.exposed:
                self._expose(host, port, hosts)
            if web is not None:
                self._open_gateway(web, room)
        except OSError as error:
            self._abandon()
            raise NotAStore(f"can't serve {folder}: {error.strerror}") from None
        except BaseException:
            self._abandon()
            raise
        meta: dict[str, object] = {"version": VERSION, "expose": self.addresses}
        if self.web_addresses:
            meta["http"] = self.web_addresses
        self._store.append(Append("xs.start", meta=_json(meta)))
        self._store.start_sweeping()
        self._delivery.start()
        for server in self._servers:
            server.start()
        if self._scripts is not None:
            self._scripts.start()
        if self._gateway is not None:
            self._gateway.start()

    def _listen(self, sock: socket.socket) -> None:
        self._add(sock, None)

    def _expose(self, host: str, port: int, hosts: list[str]) -> None:
        sock = self._sockets.listen_tcp(host, port)
        name, number = sock.getsockname()[:2]
        self.addresses.append(f"[{name}]:{number}" if ":" in name else f"{name}:{number}")
        asked = access(owner_token(self.folder), [host.lower(), *(h.lower() for h in hosts)])
        self._add(sock, asked)

    def _add(self, sock: socket.socket, asked: Access | None) -> None:
        server = Server(sock, self._store, self._delivery, self._connections, asked, log=_log)
        server.scripts = self._scripts
        self._servers.append(server)

    def _open_gateway(self, web: Web, room: int) -> None:
        from xs.gateway import Gateway

        self._gateway = Gateway(self._store, web.options, _log, room, self._sockets)
        for address in web.addresses:
            self.web_addresses.append(self._gateway.listen(address))
        for address in self._sockets.web:
            self.web_addresses.append(self._gateway.listen(address))

    def _abandon(self) -> None:
        if self._gateway is not None:
            self._gateway.abandon()
        for server in self._servers:
            server.socket.close()
        if self._servers:  # the first is the Unix socket's
            self._unlink_socket()
        self._store.close()

    def check(self, seconds: float) -> None:
        """Looks whether it can commit and answer. Raises `XsError`, or hangs, if it can't."""
        liveness.check_commit(self._store)
        liveness.check_answer(self.socket_path, seconds)

    def stop(self, seconds: float = GRACE_SECONDS) -> None:
        """Ends everything in good order. What is still under way after `seconds` is broken off."""
        deadline = time.monotonic() + seconds
        if self._gateway is not None:  # first: answers are appended like anything else
            self._gateway.stop(seconds * _WEB_GRACE)
        for server in self._servers:
            server.stop()
        if self._scripts is not None:
            self._scripts.stop()
        self._store.refuse_more(Append("xs.stop"))
        self._delivery.stop()
        self._connections.end(max(0.0, deadline - time.monotonic()))
        self._unlink_socket()
        self._store.close()

    def _unlink_socket(self) -> None:
        try:
            if not self._sockets.is_handed(self.socket_path):
                os.unlink(self.socket_path)
        except FileNotFoundError:
            pass  # somebody has tidied up already


def serve(
    folder: str,
    *,
    expose: list[str] | None = None,
    hosts: list[str] | None = None,
    scripts: bool = True,
    web: Web | None = None,
    grace: float = GRACE_SECONDS,
    log_options: log.Options = _TO_STANDARD_ERROR,
) -> int:
    """Serves until a signal ends it; answers the exit status. Raises `XsError` on starting.

    SIGTERM and SIGINT let what is under way come to its end, for `grace` seconds.
    """
    signals = Signals()
    manager = Manager(os.environ, _log)
    try:
        _log.output.open(log_options)
        _log.catch_threads()
        sockets = Sockets(handed_down(os.environ))
        for warning in sockets.warnings:
            _log(warning, log.WARNING)
        running = Running(folder, expose or [], hosts or [], web, scripts=scripts, sockets=sockets)
    except XsError as error:
        error.exit = next((exit for kind, exit in _EXITS if isinstance(error, kind)), error.exit)
        manager.failed(str(error))
        _note(f"can't start: {error}", log.ERROR)
        if _log.output.options.is_json and _log.output.options.path is None:
            return error.exit  # standard error has it, as it wants it
        raise
    where = ", ".join([running.socket_path, *(f"http://{each}" for each in running.addresses)])
    serving = f"serving {folder} at {where}"
    _announce(serving)
    if running.web_addresses:
        _announce(f"answering the web at {', '.join(running.web_addresses)}")
    manager.ready(serving)
    watchdog = Watchdog(manager, running.check, _log)
    watchdog.start()
    while not signals.ends(number := signals.wait()):
        manager.reloading()
        _log.reopen()
        manager.ready(serving)
    watchdog.let_stop()
    manager.stopping(f"stopping, within {grace:g} s")
    _note(f"stopping, within {grace:g} s: {signal.Signals(number).name}")
    running.stop(grace)
    _note("stopped")
    return 0 if number == signal.SIGTERM else 128 + number


def _announce(text: str) -> None:
    """Says on standard output, and to a log of its own, what is served from now on."""
    try:
        os.write(1, f"{text}\n".encode("utf-8", "surrogateescape"))
    except OSError:
        pass  # whoever started it has gone meanwhile, and may not be who uses it
    _note(text)


def _note(text: str, level: int = log.INFO) -> None:
    """Logs what a person at a terminal is told anyhow."""
    if not _log.output.is_plain:
        _log(text, level)


def owner_token(folder: str) -> str:
    """The owner's token: one line in `DIR/token`, made at the first need."""
    path = os.path.join(folder, TOKEN)
    try:
        with open(path, encoding="ascii") as file:
            token = file.readline().strip()
        if token:
            return token
    except FileNotFoundError:
        pass
    token = secrets.token_urlsafe(32)
    file_number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(file_number, "w", encoding="ascii") as file:
        file.write(token + "\n")
    return token


def exposed_address(address: str) -> tuple[str, int]:
    """Host and port of an address that was given to `--expose`. Raises `Usage`."""
    from xs.address import parse_host

    # :0 lets the system choose a port; the line that the server prints says which.
    any_port = address.endswith(":0")
    try:
        place, token = parse_host(address[:-1] + "1" if any_port else address)
    except Invalid as error:
        raise Usage(f"can't expose {address!r}: {error}") from None
    if place[0] != "tcp" or len(place) != 3 or token is not None:
        raise Usage(f"can't expose {address!r}: use HOST:PORT, or :PORT for this machine alone")
    _, host, port = place
    return ("127.0.0.1" if host == "localhost" else host), 0 if any_port else port


def _json(value: object) -> str:
    return meta.compact_meta(json.dumps(value, separators=(",", ":")))


def _make_room(for_the_web: bool) -> int:
    """How many connections of a kind the system allows; threads get small enough for them."""
    import resource

    threading.stack_size(Limits.stack_bytes)
    # What is here by now stays, and what requests make has no circles: looking through it all for
    # garbage, again and again, cost a tenth of a batch (bench/batch.py).
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kinds = 2 if for_the_web else 1  # one can't take the other's room
    wanted = kinds * Limits.connections + _OWN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return Limits.connections
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):
        most = soft  # then there is room for fewer connections
    # The store needs files too, or those who are connected could do nothing.
    return (most - min(_OWN_FILES, most // 2)) // kinds
