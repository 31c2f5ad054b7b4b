"""A store that is served: its lock, its socket, its delivery, its scripts, its gateway.

The order of starting: lock and open the store, listen, append `xs.start`, accept, start scripts.
The order of stopping: answer who waits at the gateway, accept no more, end the scripts, append
`xs.stop` as the last frame, give followers what is still theirs and end them, answer the requests
under way, close the store, give the lock back.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from xs import meta
from xs.access import Access, access
from xs.commit import Append
from xs.delivery import Delivery
from xs.errors import NotAStore
from xs.httpd import Others, Served, Server
from xs.listener import Connections
from xs.scripts import Scripts
from xs.sockets import listen_tcp, listen_unix
from xs.store import Store
from xs.version import VERSION

if TYPE_CHECKING:
    from xs.gateway import Gateway, Options

SOCKET = "sock"
TOKEN = "token"


class Web(NamedTuple):
    """What is to answer the web: on which addresses, and how."""

    addresses: list[str]
    options: Options


class Mount:
    """One store, mounted. `start` serves it, `stop` ends that."""

    def __init__(
        self,
        folder: str,
        room: int,
        log: Callable[[str], None],
        *,
        scripts: bool = True,
        within: Connections | None = None,
    ) -> None:
        """Takes the store in `folder`, which is made if there is none, and listens on its socket.

        `room`: as many connections as the system has room for; `within` are those of all stores
        of this process. Raises `XsError`, and leaves nothing open then.
        """
        self.folder = os.path.abspath(folder)
        self.socket_path = os.path.join(self.folder, SOCKET)
        self.exposed: list[str] = []
        self.web: list[str] = []
        self._room = room
        self._connections = Connections(room, within)
        self._log = log
        self._others: Others | None = None
        self._servers: list[Server] = []
        self._gateway: Gateway | None = None
        self.store = Store(self.folder, exclusive=True, create=True)
        try:
            os.chmod(self.folder, 0o700)
            sock = listen_unix(self.socket_path)
        except OSError as error:
            self.store.close()
            raise NotAStore(f"can't serve {folder}: {error.strerror}") from None
        except BaseException:
            self.store.close()
            raise
        self._delivery = Delivery(self.store)
        self._scripts = Scripts(self.store, log) if scripts else None
        self.served = Served(self.store, self._delivery, self._scripts)
        self._add(sock, None)

    def lead_to(self, others: Others) -> None:
        """These are reached through this store's addresses, too."""
        self._others = others
        for server in self._servers:
            server.others = others

    def expose(self, host: str, port: int, hosts: list[str]) -> None:
        """Listens on a TCP address too; `hosts` are further names of this machine."""
        sock = listen_tcp(host, port)
        name, number = sock.getsockname()[:2]
        self.exposed.append(f"[{name}]:{number}" if ":" in name else f"{name}:{number}")
        names = [host.lower(), *(each.lower() for each in hosts)]
        self._add(sock, access(owner_token(self.folder), names))

    def _add(self, sock: socket.socket, asked: Access | None) -> None:
        self._servers.append(
            Server(sock, self.served, self._connections, asked, self._others, self._log)
        )

    @property
    def connections(self) -> Connections:
        return self._connections

    def open_gateway(self, web: Web) -> None:
        """Answers the web on these addresses."""
        from xs.gateway import Gateway

        self._gateway = Gateway(self.store, web.options, self._log, self._room)
        for address in web.addresses:
            self.web.append(self._gateway.listen(address))

    def start(self) -> None:
        told: dict[str, object] = {"version": VERSION, "expose": self.exposed}
        if self.web:
            told["http"] = self.web
        self.store.append(Append("xs.start", meta=as_meta(told)))
        self.store.start_sweeping()
        self._delivery.start()
        for server in self._servers:
            server.start()
        if self._scripts is not None:
            self._scripts.start()
        if self._gateway is not None:
            self._gateway.start()

    def abandon(self) -> None:
        """Gives everything back, when it can't be started."""
        if self._gateway is not None:
            self._gateway.abandon()
        for server in self._servers:
            server.socket.close()
        os.unlink(self.socket_path)
        if self._scripts is not None:
            self._scripts.abandon()
        self._delivery.abandon()
        self.store.close()

    def stop(self, seconds: float) -> None:
        """Ends everything in good order; what clients wait for gets so many seconds."""
        if self._gateway is not None:  # first: answers are appended like anything else
            self._gateway.stop(seconds)
        for server in self._servers:
            server.stop()
        if self._scripts is not None:
            self._scripts.stop()
        self.store.refuse_more(Append("xs.stop"))
        self._delivery.stop()
        self._connections.end(seconds)
        try:
            os.unlink(self.socket_path)
        except FileNotFoundError:
            pass  # somebody has tidied up already
        self.store.close()


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


def as_meta(value: object) -> str:
    """A value as a frame's meta."""
    return meta.compact_meta(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
