"""`xs serve`: a root store and those that are added to it, in one process; start, signals, stop."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import time

from xs import liveness, log
from xs.activation import Sockets, handed_down
from xs.asked import Asked
from xs.connections import has_index
from xs.errors import Damaged, Invalid, Locked, NoAddress, NoStore, NotAStore, Usage, XsError
from xs.httpd import Limits
from xs.listener import Connections
from xs.log import Log
from xs.mount import Mount, Room, Web
from xs.notify import Manager, Watchdog
from xs.signals import Signals
from xs.sockets import listen_tcp
from xs.stores import STORES_MAX, Stores

_OWN_FILES = 256  # of the server itself: the index, content, listeners
_STORE_FILES = 16  # of each further store: 10 when it is idle
_GC_THRESHOLD = 50_000  # objects made, less those that went, between two looks for garbage
GRACE_SECONDS = 10  # for what is under way when the server stops, unless --grace says otherwise
_STORES_GRACE = 0.5  # of it, at most, is for further stores, which end before the root store

# Exit statuses of a server that can't start, for whoever has to decide whether to try again.
_EXITS = ((Locked, 3), ((NotAStore, NoStore, Damaged), 4), (NoAddress, 5))
# What a Host field can name (RFC 9110 §7.2), less what no resolver knows; case doesn't matter.
_LABEL = r"[A-Za-z0-9_-]{1,63}"
_HOST_NAME = re.compile(rf"(?!.{{254}}){_LABEL}(\.{_LABEL})*\.?")
_TO_STANDARD_ERROR = log.Options()

_log = Log()  # of this process; `serve` says where it goes


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
        grace: float = GRACE_SECONDS,
        sockets: Sockets | None = None,
        insecure: bool = False,
    ) -> None:
        """Starts to serve the store in `folder`. If it raises `XsError`, nothing is left open.

        `grace`: seconds for what is under way in a store that ends. `sockets` has those that were
        handed down to this process; they are the root store's.
        """
        sockets = sockets or Sockets()
        self._grace = grace
        self._room = _make_room(web is not None)
        self._scripts = scripts
        self._options = None if web is None else web.options
        addresses = [exposed_address(each, insecure=insecure) for each in expose]
        hosts = [host_name(each) for each in hosts]
        for host, port in sockets.exposed:
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            _check_is_private(address, host, port, insecure=insecure)
        if not has_index(folder):  # nothing is made for an address that can't be had: each is tried
            for each in addresses:
                if each not in sockets.exposed:
                    listen_tcp(*each).close()
        self.root = Mount(folder, self._room, _log, scripts=scripts, sockets=sockets, web=web)
        try:
            self.stores = Stores(self.root.store, self._mount, self._unmount, _log)
            self.root.lead_to(self.stores)
            for host, port in addresses:
                self.root.expose(host, port, hosts)
            for host, port in sockets.exposed:
                self.root.expose(host, port, hosts)
        except BaseException:
            self.root.abandon()
            raise
        self.root.start()  # whatever was asked of its stream so far waits for the next line
        self.stores.start()

    def check(self, seconds: float) -> None:
        """Looks whether it can commit and answer. Raises `XsError`, or hangs, if it can't.

        It is the root store that is looked at: what is wrong with another disturbs no other.
        """
        liveness.check_commit(self.root.store)
        liveness.check_answer(self.root.socket_path, seconds)

    def stop(self) -> None:
        """Ends everything in good order. What is under way when the grace is over is broken off."""
        deadline = time.monotonic() + self._grace
        self._grace *= _STORES_GRACE
        self.stores.stop()
        self.root.stop(max(0.0, deadline - time.monotonic()))

    def _mount(self, asked: Asked, create: bool) -> Mount:
        web = None
        if asked.http is not None:
            from xs.gateway import Options  # here: most servers have none

            web = Web([asked.http], self._options or Options())
        mount = Mount(
            asked.path,
            self._room,
            _log.for_store(asked.name),
            scripts=self._scripts,
            create=create,
            web=web,
        )
        mount.start()
        return mount

    def _unmount(self, mount: Mount) -> None:
        mount.stop(self._grace)


def serve(
    folder: str,
    *,
    expose: list[str] | None = None,
    hosts: list[str] | None = None,
    insecure: bool = False,
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
        running = Running(
            folder,
            expose or [],
            hosts or [],
            web,
            scripts=scripts,
            grace=grace,
            sockets=sockets,
            insecure=insecure,
        )
    except XsError as error:
        error.exit = next((exit for kind, exit in _EXITS if isinstance(error, kind)), error.exit)
        manager.failed(str(error))
        _note(f"can't start: {error}", log.ERROR)
        if _log.output.options.is_json and _log.output.options.path is None:
            return error.exit  # standard error has it, as it wants it
        raise
    root = running.root
    where = ", ".join([root.socket_path, *(f"http://{each}" for each in root.exposed)])
    serving = f"serving {folder} at {where}"
    _announce(serving)
    if root.web:
        _announce(f"answering the web at {', '.join(root.web)}")
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
    running.stop()
    _note("stopped")
    return 0 if number == signal.SIGTERM else 128 + number


def _announce(text: str) -> None:
    """Says in a log of its own, and then on standard output, what is served from now on."""
    _note(text)
    try:
        line = text.replace("\n", "\\n")  # of a path: who waits for the line has it whole
        os.write(1, f"{line}\n".encode("utf-8", "surrogateescape"))
    except OSError:
        pass  # whoever started it has gone meanwhile, and may not be who uses it


def _note(text: str, level: int = log.INFO) -> None:
    """Logs what a person at a terminal is told anyhow."""
    if not _log.output.is_plain:
        _log(text, level)


def exposed_address(address: str, *, insecure: bool) -> tuple[str, int]:
    """Host and port of an address that was given to `--expose`. Raises `Usage`.

    What goes over it is not encrypted, tokens included: so it is for this machine alone, unless
    `insecure` says that somebody knows what he does.
    """
    from xs.address import parse_host, without_token

    # :0 lets the system choose a port; the line that the server prints says which.
    any_port = address.endswith(":0")
    try:
        place, token = parse_host(address[:-1] + "1" if any_port else address)
    except Invalid:
        place, token = ("unix", address), None  # what else there is of addresses is of no use here
    shown = without_token(address)
    if token is not None:
        raise Usage(f"can't expose {shown!r} with a token: give that to whoever calls it")
    if place[0] != "tcp" or len(place) != 3:
        raise Usage(
            f"can't expose {shown!r}: use HOST:PORT, or :PORT for this machine "
            "alone, with a port from 0 to 65535 ([ADDRESS]:PORT for IPv6)"
        )
    _, host, port = place
    port = 0 if any_port else port
    _check_is_private(address, host, port, insecure=insecure)
    return ("127.0.0.1" if host == "localhost" else host), port


def host_name(name: str) -> str:
    """A name that was given to `--host`, as requests are compared with it. Raises `Usage`."""
    if not _HOST_NAME.fullmatch(name):
        raise Usage(
            f"--host takes a name such as xs.example, not {name!r}: letters, digits, - and _ with "
            "dots between, without a port (an IP address needs no --host)"
        )
    return name.rstrip(".").lower()


def _check_is_private(address: str, host: str, port: int, *, insecure: bool) -> None:
    if not (insecure or _is_loopback(host)):
        raise Usage(
            f"can't expose {address!r}: others could read along, tokens too. Expose :{port} and "
            "lead to it by ssh -L or a proxy that speaks TLS, or say --insecure"
        )


def _is_loopback(host: str) -> bool:
    import ipaddress  # here: most servers have no TCP address

    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _make_room(for_the_web: bool) -> Room:
    """How many connections of a kind the system allows; threads get small enough for them."""
    threading.stack_size(Limits.stack_bytes)
    # What is here by now stays, and what requests make has no circles: looking through it all for
    # garbage, again and again, cost a tenth of a batch (bench/batch.py).
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    kinds = 2 if for_the_web else 1  # one can't take the other's room
    needed = kinds * Limits.connections + _OWN_FILES
    most = _allow_files(needed + STORES_MAX * _STORE_FILES, needed)
    room = Limits.connections
    if most < needed:
        # The store needs files too, or those who are connected could do nothing.
        room = (most - min(_OWN_FILES, most // 2)) // kinds
    api = Connections(room, kept=min(Limits.connections_kept, room // 4))
    return Room(room, api, Connections(room) if for_the_web else api)


def _allow_files(*wanted: int) -> int:
    """Asks the system for the first of these numbers of files that it allows; how many it does."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in wanted:
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        if soft == resource.RLIM_INFINITY or soft >= most:
            return most if soft == resource.RLIM_INFINITY else soft
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
        except (OSError, ValueError):
            continue  # macOS says no to more than a limit of its own
    return soft
