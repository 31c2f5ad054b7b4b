"""What the service manager is told: that the server is ready, reloads, stops, and is alive.

The protocol is sd_notify(3)'s: datagrams of `NAME=value` lines to the socket that $NOTIFY_SOCKET
names. Without one nobody is told, and no call here ever fails.

That it is alive is told only after it was seen (sd_watchdog_enabled(3)): a thread looks, twice in
each span that the manager allows, and tells when it has found all well. A server that hangs, or
can't do any more what it is there for, goes silent, and the manager starts another.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import time
from collections.abc import Callable, MutableMapping

from xs import threads
from xs.log import ERROR, WARNING, Log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

_TELL_SECONDS = 5.0  # for the manager to take a message


class Manager:
    """The service manager, if there is one."""

    def __init__(self, environ: MutableMapping[str, str], log: Log) -> None:
        """Takes from `environ` what is meant for us alone: scripts don't get it."""
        self._log = log
        self._address = _address(environ.pop("NOTIFY_SOCKET", ""))
        self._socket: Optional[socket.socket] = None
        self.watchdog_seconds = _watchdog_seconds(
            environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        )

    def ready(self, status: str) -> None:
        """The server serves (or has reloaded); `status` is a line for people."""
        self._tell("READY=1", _status(status))

    def reloading(self) -> None:
        """Until `ready` it reloads."""
        # Type=notify-reload takes no message that is older than its signal (sd_notify(3)).
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._tell("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self, status: str) -> None:
        self._tell("STOPPING=1", _status(status))

    def failed(self, why: str) -> None:
        """It can't start."""
        self._tell(_status(why))

    def alive(self) -> None:
        self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if self._address is None:
            return
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.settimeout(_TELL_SECONDS)
            self._socket.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError as error:
            self._log(f"the service manager can't be told {lines[0]}: {error}", WARNING)


def _address(given: str) -> bytes | None:
    """A Unix socket's address; `@` begins one that is abstract. None for what is none."""
    if given[:1] == "@":
        return b"\0" + os.fsencode(given[1:])
    return os.fsencode(given) if given[:1] == "/" else None


def _status(text: str) -> str:
    return f"STATUS={' '.join(text.split())}"


def _watchdog_seconds(microseconds: str, pid: str) -> float | None:
    """How long the manager waits for a sign of life; None if it doesn't."""
    if not microseconds.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(microseconds) / 1_000_000 or None


class Watchdog:
    """Tells the manager that the server is alive, whenever `check` says so by not raising."""

    def __init__(self, manager: Manager, check: Callable[[float], None], log: Log) -> None:
        """`check` is given the seconds that it may take."""
        self._manager = manager
        self._check: Optional[Callable[[float], None]] = check
        self._log = log
        self._thread = threads.Thread(self._main, "xs-watchdog")

    def start(self) -> None:
        """Does nothing if the manager doesn't wait for signs of life."""
        if self._manager.watchdog_seconds is not None:
            # A server that has gone silent is ended with SIGABRT: then it tells where it hangs.
            faulthandler.enable(self._log.output.descriptor)
            self._thread.start()

    def let_stop(self) -> None:
        """The server stops, which takes a bounded time: from now on nothing is checked."""
        self._check = None

    def _main(self) -> None:
        assert self._manager.watchdog_seconds is not None
        every = self._manager.watchdog_seconds / 2
        due = time.monotonic()
        while True:
            check = self._check
            try:
                if check is not None:
                    check(every)
                self._manager.alive()
            except Exception as error:
                if check is self._check:  # else it stops meanwhile
                    self._log(f"the server is not well: {error}", ERROR)
            now = time.monotonic()
            due = max(due + every, now)
            time.sleep(due - now)
