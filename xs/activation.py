"""Sockets that were handed down by whoever started this process (sd_listen_fds(3)), and new ones.

A service manager may listen before the server runs, and go on when it ends: then no client is ever
refused, and each waits at most. Such a socket is known by its address: who asks for a socket there
gets it, and it is neither made nor removed here. A Unix socket is the store's, a TCP one an exposed
address; one that is named `http` is for the web.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

from xs import sockets
from xs.errors import Usage
from xs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

WEB = "http"  # the name of a socket for the web
_FIRST = 3  # SD_LISTEN_FDS_START
_VARIABLES = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")


class Handed(NamedTuple):
    """A socket that was handed down: `path` is a Unix socket's, else `host` and `port` are there.

    `name` is what the service manager calls it; "" if it has no name.
    """

    sock: socket.socket
    name: str
    path: Optional[str]
    host: str
    port: int

    @property
    def address(self) -> str:
        """As it is written on a command line."""
        if self.path is not None:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def handed_down(environ: MutableMapping[str, str]) -> list[Handed]:
    """The sockets that were handed to this process. Raises `Usage` for what can't be used.

    They and the variables that tell of them are ours alone: scripts don't get them.
    """
    pid, _, count, names = [environ.pop(variable, "") for variable in _VARIABLES]
    if not pid.isdigit() or int(pid) != os.getpid():
        return []  # they were for a process that has started us, or there are none
    if not count.isdigit():
        raise Usage(f"LISTEN_FDS is a number of sockets, not {count!r}")
    numbers = range(_FIRST, _FIRST + int(count[:6]))
    for number in numbers:
        try:
            os.set_inheritable(number, False)
        except OSError:
            raise Usage(f"LISTEN_FDS tells of file descriptor {number}, which is closed") from None
    named = dict(zip(numbers, names.split(":")))
    return [_handed(number, named.get(number, "")) for number in numbers]


def _handed(number: int, name: str) -> Handed:
    who = f"the socket that was handed down as file descriptor {number}"
    try:
        sock = socket.socket(fileno=number)
    except OSError:
        raise Usage(f"{who} is no socket") from None
    if sock.type != socket.SOCK_STREAM or _is_connected(sock):
        raise Usage(f"{who} is none to accept connections on (ListenStream=, with Accept=no)")
    address = sock.getsockname()
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return Handed(sock, name, None, address[0], address[1])
    if sock.family != socket.AF_UNIX or not address or not isinstance(address, str):
        raise Usage(f"{who} has no address that can be used: a Unix socket has a path")
    return Handed(sock, name, os.path.abspath(address), "", 0)


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def expects_web(environ: Mapping[str, str]) -> bool:
    """Whether `handed_down` will give a socket that is for the web."""
    named = environ.get("LISTEN_FDNAMES", "").split(":")
    return WEB in named and environ.get("LISTEN_PID") == str(os.getpid())


class Sockets:
    """Where to listen: on what was handed down, once each, and on new sockets.

    `warnings` says what may not be as it was meant to be, a sentence each.
    """

    def __init__(self, handed: list[Handed] | None = None) -> None:
        # One whose file is gone can't be called any more: another has to take its place.
        gone = [each for each in handed or [] if each.path and not os.path.exists(each.path)]
        self._left = [each for each in handed or [] if each not in gone]  # nobody has these yet
        self.warnings = [f"nobody can call {each.path} any more: it was removed" for each in gone]
        self.warnings += [
            f"everybody on this machine can call {each.path}, and do anything: set SocketMode=0600"
            for each in self._left
            if each.path and each.name != WEB and _is_for_all(each.path)
        ]
        self._taken: set[str] = set()  # the paths of those that somebody has asked for

    @property
    def web(self) -> list[str]:
        """The addresses left on which requests from the web are to be answered."""
        return [each.address for each in self._left if each.name == WEB]

    @property
    def exposed(self) -> list[tuple[str, int]]:
        """Host and port of those left on which the store is to be served over TCP."""
        return [(each.host, each.port) for each in self._left if _is(each, tcp=True)]

    @property
    def unix(self) -> list[str]:
        """The paths of those left on which the store is to be served."""
        return [each.address for each in self._left if _is(each, tcp=False)]

    def listen_unix(self, path: str) -> socket.socket:
        """As `sockets.listen_unix`."""
        place = place_of(path)
        for each in self._left:
            if _is(each, tcp=False) and place_of(each.address) == place:
                return self._take(each)
        return sockets.listen_unix(path)

    def listen_unix_for_all(self, path: str) -> socket.socket:
        """As `sockets.listen_unix_for_all`; who may call one that exists isn't ours to say."""
        place = place_of(path)
        for each in self._left:
            if each.path is not None and each.name == WEB and place_of(each.path) == place:
                return self._take(each)
        return sockets.listen_unix_for_all(path)

    def listen_tcp(self, host: str, port: int) -> socket.socket:
        """As `sockets.listen_tcp`."""
        for each in self._left:
            if each.path is None and (each.host, each.port) == (host, port):
                return self._take(each)
        return sockets.listen_tcp(host, port)

    def is_handed(self, path: str) -> bool:
        """Whether the socket at `path`, on which we listen, is another's: it stays where it is."""
        return place_of(path) in self._taken

    def _take(self, handed: Handed) -> socket.socket:
        self._left.remove(handed)
        if handed.path is not None:
            self._taken.add(place_of(handed.path))
        return handed.sock


def _is(handed: Handed, *, tcp: bool) -> bool:
    """Whether it is for the store itself, over TCP or not."""
    return handed.name != WEB and (handed.path is None) == tcp


def _is_for_all(path: str) -> bool:
    """Whether other users can get to a socket, and may connect to it (unix(7))."""
    if not os.stat(path).st_mode & 0o002:
        return False
    folder = os.path.dirname(os.path.realpath(path))
    while os.stat(folder).st_mode & 0o001:
        if folder == os.path.dirname(folder):
            return True
        folder = os.path.dirname(folder)
    return False


def place_of(path: str) -> str:
    """The path of a socket, without links on the way to it."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)
