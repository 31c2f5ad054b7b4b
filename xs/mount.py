"""A store that is served: its lock, its socket, its delivery, its scripts, its gateway.

The order of starting: lock and open the store, listen, append `xs.start`, accept, start scripts.
Where the store is yet to be made, it is listened for the web before that.
The order of stopping: answer who waits at the gateway, accept no more, end the scripts, append
`xs.stop` as the last frame, give followers what is still theirs and end them, answer the requests
under way, close the store, give the lock back.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from xs.access import Access, access
from xs.activation import Sockets
from xs.address import is_socket_path
from xs.commit import Append
from xs.connections import has_index
from xs.crowd import Crowd
from xs.delivery import Delivery
from xs.disk import refusal
from xs.errors import Full, Unavailable
from xs.httpd import Others, Served, Server
from xs.listener import Connections
from xs.log import WARNING, log_of
from xs.meta import as_meta
from xs.scripts import Scripts
from xs.sockets import file_at, remove_unix
from xs.store import Store
from xs.tokens import Finder, owner_token
from xs.version import VERSION

if TYPE_CHECKING:
    from xs.gateway import Gateway, Options

SOCKET = "sock"
_WEB_GRACE = 0.5  # of the time that a store has to end, at most, is for requests from the web
_VISITORS_SECONDS = 0.5  # for their requests under way, before their connections are to be ended


class Room(NamedTuple):
    """How many connections of each kind a process has room for, and those that it has."""

    most: int
    api: Connections
    web: Connections


class Web(NamedTuple):
    """What is to answer the web: on which addresses, and how."""

    addresses: list[str]
    options: Options


class Mount:
    """One store, mounted. `start` serves it, `stop` ends that."""

    def __init__(
        self,
        folder: str,
        room: Room,
        log: Callable[[str], None],
        *,
        scripts: bool = True,
        create: bool = True,
        sockets: Sockets | None = None,
        web: Web | None = None,
    ) -> None:
        """Takes the store in `folder`, and listens on its socket, and where it answers the `web`.

        `create`: it is made if there is none. `sockets` has those that were handed down for it.
        Raises `XsError`, and leaves nothing open then.
        """
        self.folder = os.path.abspath(folder)
        self.socket_path = os.path.join(self.folder, SOCKET)
        self.exposed: list[str] = []
        self.web: list[str] = []
        self._connections = Connections(room.most, room.api)
        self._visitors = Connections(room.most)
        self._log = log
        self._sockets = sockets or Sockets()
        self._others: Others | None = None
        self._servers: list[Server] = []
        self._gateway: Gateway | None = None
        self._scripts: Scripts | None = None
        self._socket_file: tuple[int, int] | None = None
        self._is_announced = self._has_scripts = self._has_gateway = False
        addresses = [] if web is None else web.addresses
        try:
            if web is not None:
                self._gateway = _gateway(web.options, log, room, self._sockets)
            if create and not has_index(self.folder):
                # Nothing is made for an address that can't be had. A store that is there is opened
                # first: it may be another server's, and the addresses with it.
                self._answer_web([each for each in addresses if not self._has_within(each)])
                addresses = [each for each in addresses if self._has_within(each)]
            self.store = Store(self.folder, exclusive=True, create=create)
        except BaseException:
            if self._gateway is not None:
                self._gateway.abandon()
            raise
        self._delivery = Delivery(self.store)
        self._crowd = Crowd(self.store)
        try:
            os.chmod(self.folder, 0o700)
            if scripts:
                self._scripts = Scripts(self.store, log)
            self.served = Served(
                self.store, self._delivery, self._crowd, self._scripts, self._visitors
            )
            sock = self._sockets.listen_unix(self.socket_path)
            self._socket_file = file_at(self.socket_path)
            # Who may call one that was handed down is for who made it to say.
            self._add(sock, None, is_for_owner=not self._sockets.is_handed(self.socket_path))
            for path in self._sockets.unix:
                self._add(self._sockets.listen_unix(path), None)
            self._answer_web(addresses)
            self._answer_web(self._sockets.web)  # what is left of those that were handed down
        except BaseException as error:
            self.abandon()
            if isinstance(error, OSError):
                raise refusal(f"can't serve {folder}", error) from None
            raise

    def lead_to(self, others: Others) -> None:
        """These are reached through this store's addresses, too."""
        self._others = others
        for server in self._servers:
            server.others = others

    def expose(self, host: str, port: int, hosts: list[str]) -> None:
        """Listens on a TCP address too; `hosts`, in lower case, name this machine, too."""
        try:
            token = owner_token(self.folder)
        except OSError as error:
            raise refusal(f"can't read the owner's token in {self.folder}", error) from None
        sock = self._sockets.listen_tcp(host, port)
        name, number = sock.getsockname()[:2]
        self.exposed.append(f"[{name}]:{number}" if ":" in name else f"{name}:{number}")
        self._add(sock, access(token, [host.lower(), *hosts], Finder(self.folder)))

    def _add(
        self, sock: socket.socket, asked: Access | None, *, is_for_owner: bool = False
    ) -> None:
        try:
            server = Server(
                sock,
                self.served,
                self._connections,
                asked,
                self._others,
                self._log,
                is_for_owner=is_for_owner,
            )
        except BaseException:
            sock.close()
            raise
        self._servers.append(server)

    def _answer_web(self, addresses: list[str]) -> None:
        """Listens on these addresses of the gateway. Raises `XsError`."""
        if self._gateway is not None:
            self.web += [self._gateway.listen(address) for address in addresses]

    def _has_within(self, address: str) -> bool:
        """Whether an address of the gateway is a path in the store's own folder."""
        folder = f"{os.path.realpath(self.folder)}/"
        return is_socket_path(address) and os.path.realpath(address).startswith(folder)

    def start(self) -> None:
        """Serves it. Raises `XsError`, and leaves nothing open then."""
        try:
            self._start()
        except BaseException as error:
            self.abandon()
            if isinstance(error, (OSError, RuntimeError)):  # no more files, or threads
                reason = getattr(error, "strerror", None) or error
                raise Unavailable(f"can't serve {self.folder} just now: {reason}") from None
            raise

    def _start(self) -> None:
        told: dict[str, object] = {"version": VERSION, "expose": self.exposed}
        if self.web:
            told["http"] = self.web
        self.store.runs.end_abandoned()
        try:
            self.store.append(Append("xs.start", meta=as_meta(told)))
            self._is_announced = True
        except Full as error:  # it can be read, and room be made in it
            log_of(self._log)(f"xs.start is not appended: {error}", WARNING)
        self.store.start_sweeping()
        for server in self._servers:
            server.start()
        if self._scripts is not None:
            self._scripts.start()
            self._has_scripts = True
        if self._gateway is not None:
            self._gateway.start(self.store)
            self._has_gateway = True

    def abandon(self) -> None:
        """Gives everything back at once, started or not."""
        self.stop(0.0)

    def stop(self, seconds: float) -> None:
        """Ends everything in good order; what clients wait for gets so many seconds."""
        deadline = time.monotonic() + seconds
        with contextlib.ExitStack() as then:  # from the last line up, whatever fails on the way
            then.callback(self.store.close)
            then.callback(self._remove_socket)
            then.callback(self._crowd.stop)
            then.callback(self._end_connections, deadline)
            then.callback(self._delivery.stop)
            then.callback(self.store.refuse_more, Append("xs.stop") if self._is_announced else None)
            if self._scripts is not None:
                end = self._scripts.stop if self._has_scripts else self._scripts.abandon
                then.callback(end)
            for server in self._servers:
                then.callback(server.stop)
            if self._gateway is not None:  # first: answers are appended like anything else
                if self._has_gateway:
                    then.callback(self._gateway.stop, seconds * _WEB_GRACE)
                else:
                    then.callback(self._gateway.abandon)

    def _end_connections(self, deadline: float) -> None:
        # A visitor's connection is also for other stores: it is ended only if it has to be.
        self._visitors.wait(min(max(0.0, deadline - time.monotonic()), _VISITORS_SECONDS))
        kinds = (self._connections, self._visitors)
        for connections in kinds:
            connections.begin_end()
        for connections in kinds:
            connections.finish_end(max(0.0, deadline - time.monotonic()))

    def _remove_socket(self) -> None:
        if self._sockets.is_handed(self.socket_path):
            return  # who has handed it down goes on with it
        # Not another server's, which took the store when its lock's file was deleted.
        remove_unix(self.socket_path, self._socket_file)


def _gateway(options: Options, log: Callable[[str], None], room: Room, sockets: Sockets) -> Gateway:
    from xs.gateway import Gateway  # here: most stores have none

    return Gateway(options, log, room.most, room.web, sockets)
