"""A service manager as a test plays it: it starts a server, hands it sockets, and hears it."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Optional

from conftest import DEADLINE, environment


class Ear:
    """The socket of NOTIFY_SOCKET. `address` is what that variable says."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + address[1:] if address.startswith("@") else address)

    def hear(self, seconds: float = DEADLINE) -> dict[str, str]:
        """The next message. Raises `TimeoutError` (of `socket.timeout`'s kind) if none comes."""
        self.sock.settimeout(seconds)
        lines = self.sock.recv(65536).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def hear_of(self, name: str) -> dict[str, str]:
        """The next message with that in it."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            said = self.hear()
            if name in said:
                return said
        raise AssertionError(f"{name} did not come")

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing comes for so long."""
        try:
            self.hear(seconds)
        except socket.timeout:
            return True
        return False

    def close(self) -> None:
        self.sock.close()


def launch(
    arguments: Sequence[str],
    sockets: Sequence[socket.socket] = (),
    *,
    names: Optional[str] = None,
    pid: str = "$$",
    **variables: str,
) -> subprocess.Popen[bytes]:
    """Starts `xs` as systemd does: sockets from file descriptor 3 on, and variables that tell.

    `pid` is what LISTEN_PID and WATCHDOG_PID say; by default the process's own.
    """
    tell = ""
    if sockets:
        tell = f"LISTEN_PID={pid} LISTEN_FDS={len(sockets)} "
        tell += f"LISTEN_FDNAMES={names} " if names is not None else ""
    if "WATCHDOG_USEC" in variables:
        tell += f"WATCHDOG_PID={pid} "
    # The shell moves each to its place, closes where it was, and becomes the server.
    high = [fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, 20) for sock in sockets]
    places = " ".join(f"{3 + n}<&{number} {number}<&-" for n, number in enumerate(high))
    command = ["bash", "-c", f'{tell} exec "$@" {places}', "launch"]
    process = subprocess.Popen(
        [*command, sys.executable, "-m", "xs", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(**variables),
        pass_fds=high,
    )
    for number in high:
        os.close(number)
    return process


def serving(process: subprocess.Popen[bytes]) -> str:
    """The line that tells where the server serves, once it does."""
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    if not line:
        _, err = process.communicate(timeout=DEADLINE)
        raise AssertionError(err.decode())
    return line


def end(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Ends a server in good order: as `ended`."""
    process.terminate()
    return ended(process)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The status of a server that ends by itself, and what it had said on standard error."""
    try:
        _, err = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, err.decode()
