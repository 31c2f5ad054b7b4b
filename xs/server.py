"""`xs serve`: a store, its listeners, its delivery; start, signals, stop.

The order of starting: lock and open the store, listen, append `xs.start`, accept. The order of
stopping: append `xs.stop` as the last frame, give followers what is still theirs and end them,
answer the requests under way, close the store, give the lock back.
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import signal
import socket
import sys
import threading

from xs import meta
from xs.access import access
from xs.commit import Append
from xs.delivery import Delivery
from xs.errors import NotAStore, Usage
from xs.httpd import Connections, Limits, Server
from xs.sockets import listen_tcp, listen_unix
from xs.store import Store
from xs.version import VERSION

SOCKET = "sock"
TOKEN = "token"

_OWN_FILES = 256  # of the server itself: the index, content, listeners
_GC_THRESHOLD = 50_000  # objects made, less those that went, between two looks for garbage
_STOP_SECONDS = 5.0  # for requests under way, when the server stops


class Running:
    """A server that runs, with its threads. `stop` ends it."""

    def __init__(self, folder: str, expose: list[str], hosts: list[str]) -> None:
        """Starts to serve the store in `folder`. If it raises `XsError`, nothing is left open."""
        room = _make_room()
        self.folder = os.path.abspath(folder)
        self.socket_path = os.path.join(self.folder, SOCKET)
        self.addresses: list[str] = []
        addresses = [_host_and_port(each) for each in expose]
        self._servers: list[Server] = []
        self._connections = Connections(room)
        self._store = Store(self.folder, exclusive=True, create=True)
        try:
            self._delivery = Delivery(self._store)
            os.chmod(self.folder, 0o700)
            self._listen(listen_unix(self.socket_path))
            for host, port in addresses:
                self._expose(host, port, hosts)
        except OSError as error:
            self._abandon()
            raise NotAStore(f"can't serve {folder}: {error.strerror}") from None
        except BaseException:
            self._abandon()
            raise
        meta = {"version": VERSION, "expose": self.addresses}
        self._store.runs.end_abandoned()
        self._store.append(Append("xs.start", meta=_json(meta)))
        self._store.start_sweeping()
        self._delivery.start()
        for server in self._servers:
            server.start()

    def _listen(self, sock: socket.socket) -> None:
        self._servers.append(Server(sock, self._store, self._delivery, self._connections, log=_log))

    def _expose(self, host: str, port: int, hosts: list[str]) -> None:
        sock = listen_tcp(host, port)
        name, number = sock.getsockname()[:2]
        self.addresses.append(f"[{name}]:{number}" if ":" in name else f"{name}:{number}")
        asked = access(owner_token(self.folder), [host.lower(), *(h.lower() for h in hosts)])
        self._servers.append(
            Server(sock, self._store, self._delivery, self._connections, asked, log=_log)
        )

    def _abandon(self) -> None:
        for server in self._servers:
            server.socket.close()
        if self._servers:  # the first is the Unix socket's
            os.unlink(self.socket_path)
        self._store.close()

    def stop(self) -> None:
        """Ends everything in good order."""
        for server in self._servers:
            server.stop()
        self._store.refuse_more(Append("xs.stop"))
        self._delivery.stop()
        self._connections.end(_STOP_SECONDS)
        try:
            os.unlink(self.socket_path)
        except FileNotFoundError:
            pass  # somebody has tidied up already
        self._store.close()


def serve(folder: str, *, expose: list[str] | None = None, hosts: list[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; answers the exit status. Raises `XsError` on starting."""
    # A signal that comes just before a lock is waited for would not end the wait (CPython looks for
    # signals before and after). A pipe has no such moment: its byte, the signal's number, stays.
    received, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    running = Running(folder, expose or [], hosts or [])
    where = ", ".join([running.socket_path, *(f"http://{each}" for each in running.addresses)])
    print(f"serving {folder} at {where}", flush=True)
    first = os.read(received, 1)[0]
    running.stop()
    return 130 if first == signal.SIGINT else 0


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


def _host_and_port(address: str) -> tuple[str, int]:
    from xs.address import parse_host

    # :0 lets the system choose a port; the line that the server prints says which.
    any_port = address.endswith(":0")
    place, token = parse_host(address[:-1] + "1" if any_port else address)
    if place[0] != "tcp" or len(place) != 3 or token is not None:
        raise Usage(f"can't expose {address!r}: use HOST:PORT, or :PORT for this machine alone")
    _, host, port = place
    return ("127.0.0.1" if host == "localhost" else host), 0 if any_port else port


def _json(value: object) -> str:
    return meta.compact_meta(json.dumps(value, separators=(",", ":")))


def _log(text: str) -> None:
    print(f"xs: {text}", file=sys.stderr, flush=True)


def _make_room() -> int:
    """How many connections the system allows; threads get small enough for them."""
    import resource

    threading.stack_size(Limits.stack_bytes)
    # What is here by now stays, and what requests make has no circles: looking through it all for
    # garbage, again and again, cost a tenth of a batch (bench/batch.py).
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = Limits.connections + _OWN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return Limits.connections
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):
        most = soft  # then there is room for fewer connections
    # The store needs files too, or those who are connected could do nothing.
    return most - min(_OWN_FILES, most // 2)
