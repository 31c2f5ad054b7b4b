"""`xs serve`: a root store and those that are added to it, in one process; start, signals, stop."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable

from xs.errors import Usage
from xs.gateway import Options
from xs.httpd import Limits
from xs.mount import Mount, Web
from xs.stores import Asked, Stores

_OWN_FILES = 256  # of the server itself: the index, content, listeners
_GC_THRESHOLD = 50_000  # objects made, less those that went, between two looks for garbage
_STOP_SECONDS = 5.0  # for requests under way, when the server stops


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
    ) -> None:
        """Starts to serve the store in `folder`. If it raises `XsError`, nothing is left open."""
        self._room = _make_room(web is not None)
        self._scripts = scripts
        self._options = web.options if web is not None else Options()
        addresses = [_host_and_port(each) for each in expose]
        self.root = Mount(folder, self._room, _log, scripts=scripts)
        try:
            self.stores = Stores(self.root.store, self._mount, self._unmount, _log)
            self.root.lead_to(self.stores)
            for host, port in addresses:
                self.root.expose(host, port, hosts)
            if web is not None:
                self.root.open_gateway(web)
        except BaseException:
            self.root.abandon()
            raise
        self.root.start()
        self.stores.start()

    def stop(self) -> None:
        """Ends everything in good order."""
        self.stores.stop()
        self.root.stop(_STOP_SECONDS)

    def _mount(self, asked: Asked) -> Mount:
        mount = Mount(
            asked.path,
            self._room,
            _named_log(asked.name),
            scripts=self._scripts,
            within=self.root.connections,
        )
        try:
            if asked.http is not None:
                mount.open_gateway(Web([asked.http], self._options))
        except BaseException:
            mount.abandon()
            raise
        mount.start()
        return mount

    def _unmount(self, mount: Mount) -> None:
        mount.stop(_STOP_SECONDS)


def serve(
    folder: str,
    *,
    expose: list[str] | None = None,
    hosts: list[str] | None = None,
    scripts: bool = True,
    web: Web | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT; answers the exit status. Raises `XsError` on starting."""
    # A signal that comes just before a lock is waited for would not end the wait (CPython looks for
    # signals before and after). A pipe has no such moment: its byte, the signal's number, stays.
    received, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    running = Running(folder, expose or [], hosts or [], web, scripts=scripts)
    root = running.root
    where = ", ".join([root.socket_path, *(f"http://{each}" for each in root.exposed)])
    print(f"serving {folder} at {where}", flush=True)
    if root.web:
        print(f"answering the web at {', '.join(root.web)}", flush=True)
    first = os.read(received, 1)[0]
    running.stop()
    return 130 if first == signal.SIGINT else 0


def _host_and_port(address: str) -> tuple[str, int]:
    from xs.address import parse_host

    # :0 lets the system choose a port; the line that the server prints says which.
    any_port = address.endswith(":0")
    place, token = parse_host(address[:-1] + "1" if any_port else address)
    if place[0] != "tcp" or len(place) != 3 or token is not None:
        raise Usage(f"can't expose {address!r}: use HOST:PORT, or :PORT for this machine alone")
    _, host, port = place
    return ("127.0.0.1" if host == "localhost" else host), 0 if any_port else port


def _log(text: str) -> None:
    text = text.replace("\n", "\nxs: ")  # each line says whose it is
    print(f"xs: {text}", file=sys.stderr, flush=True)


def _named_log(name: str) -> Callable[[str], None]:
    return lambda text: _log(f"{name}: {text}")


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
