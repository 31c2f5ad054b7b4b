"""Durable appends beside Redis streams and NATS JetStream: the same work, the same durability.

One client, a keep-alive connection over TCP on the loopback, 100 bytes an event, one append under
way, each answered when it is on the disk. xs is asked over TCP too. Redis: `XADD`, with
`appendfsync always`. NATS: a publish to a stream with file storage that is awaited, with
`sync_interval: always`, which nats-server has since 2.10; an older one acknowledges before it syncs
(every two minutes), and its row says so and has no goal.

The peers are found on PATH, or in .cache/peers, into which `--peers` unpacks the system's packages
(apt; nothing is installed or started in the system). Without them this measures nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Optional

from _measure import (
    CONTENT,
    DEADLINE,
    ROOT,
    Report,
    alternate,
    at_least,
    folder,
    is_whole,
    pick,
    request,
    server,
)

PEERS = ROOT / ".cache" / "peers"
PACKAGES = ("redis-server", "redis-tools", "nats-server", "libjemalloc2", "liblzf1")
REDIS_GOAL = 0.8
ROUNDS = pick(7, 3)
SECONDS = pick(1.0, 0.3)


class Link:
    """A TCP connection whose answers are lines, or are known to be whole otherwise."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, data: bytes, whole: Callable[[bytes], bool]) -> bytes:
        self.sock.sendall(data)
        answer = b""
        while not whole(answer):
            more = self.sock.recv(65536)
            if not more:
                raise SystemExit(f"an answer broke off: {answer[:200]!r}")
            answer += more
        return answer

    def rate(self, data: bytes, whole: Callable[[bytes], bool], sign: bytes) -> float:
        """Answers a second, each with `sign` in it."""
        count = 0
        started = now = time.perf_counter()
        while now < started + SECONDS:
            answer = self.ask(data, whole)
            if sign not in answer:
                raise SystemExit(f"not the answer that was expected: {answer[:200]!r}")
            count += 1
            now = time.perf_counter()
        return count / (now - started)


# The peers: each gives the rate of a round


@contextlib.contextmanager
def redis(program: str, where: str) -> Iterator[Callable[[], float]]:
    port = free_port()
    words = ["--port", str(port), "--bind", "127.0.0.1", "--dir", where, "--save", ""]
    words += ["--appendonly", "yes", "--appendfsync", "always"]
    with running([program, *words], port) as link:
        parts = (b"XADD", b"events", b"*", b"content", CONTENT)
        data = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)
        # An id as a bulk string: "$15\r\n1700000000000-0\r\n".
        yield lambda: link.rate(data, lambda answer: answer.count(b"\r\n") >= 2, b"-")


@contextlib.contextmanager
def nats(program: str, where: str, is_synced: bool) -> Iterator[Callable[[], float]]:
    port = free_port()
    store = os.path.join(where, f"nats-{is_synced}")
    settings = f"store_dir: {json.dumps(store)}" + ", sync_interval: always" * is_synced
    config = store + ".conf"
    with open(config, "w") as file:
        file.write(f'listen: "127.0.0.1:{port}"\njetstream {{ {settings} }}\n')
    with running([program, "--config", config], port) as link:

        def is_message(answer: bytes) -> bool:
            at = answer.find(b"MSG ")
            end = answer.find(b"\r\n", at)
            if at < 0 or end < 0:
                return False
            return len(answer) >= end + 4 + int(answer[at:end].split()[-1])

        def publish(subject: str, body: bytes) -> bytes:
            return b"PUB %s _INBOX.bench %d\r\n%s\r\n" % (subject.encode(), len(body), body)

        stream = {"name": "events", "subjects": ["events"], "storage": "file"}
        hello = b'CONNECT {"verbose":false}\r\nSUB _INBOX.bench 1\r\n'
        create = publish("$JS.API.STREAM.CREATE.events", json.dumps(stream).encode())
        made = link.ask(hello + create, is_message)
        if b'"error"' in made:
            raise SystemExit(f"nats-server refused the stream: {made!r}")
        yield lambda: link.rate(publish("events", CONTENT), is_message, b'"seq":')


@contextlib.contextmanager
def running(words: list[str], port: int) -> Iterator[Link]:
    """A server, once it takes connections, and one to it."""
    libraries = os.pathsep.join(str(path.parent) for path in PEERS.rglob("libjemalloc.so.*"))
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
    )
    try:
        yield connect(process, port)
    finally:
        process.terminate()
        process.wait(DEADLINE)


def connect(process: subprocess.Popen[bytes], port: int) -> Link:
    until = time.monotonic() + DEADLINE
    while time.monotonic() < until:
        with contextlib.suppress(ConnectionRefusedError):
            return Link(port)
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with {process.returncode}")
        time.sleep(0.01)
    raise SystemExit(f"{process.args!r} does not answer")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# Where they come from


def bring() -> None:
    """Unpacks the peers' packages into .cache/peers."""
    PEERS.mkdir(parents=True, exist_ok=True)
    if not shutil.which("apt-get"):
        raise SystemExit("peers: --peers needs apt-get; or install redis-server and nats-server")
    subprocess.run(["apt-get", "-qq", "download", *PACKAGES], cwd=PEERS, check=True)
    for package in PEERS.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(PEERS)], check=True)


def find(name: str) -> Optional[str]:
    unpacked = [str(PEERS / folder / name) for folder in ("usr/bin", "usr/sbin")]
    return shutil.which(name) or next(filter(os.path.exists, unpacked), None)


def syncs_each(program: str) -> bool:
    """Whether this nats-server can sync each message: it knows the setting since 2.10."""
    return b"sync_interval" in Path(program).read_bytes()


def main() -> None:
    report = Report("peers", "Durable appends a second beside peers: TCP, 1 client, 100 bytes")
    if "--peers" in sys.argv[1:] and not (find("redis-server") and find("nats-server")):
        bring()
    redis_server, nats_server = find("redis-server"), find("nats-server")
    for name, program in (("redis-server", redis_server), ("nats-server", nats_server)):
        if program is None:
            report.note(f"{name} isn't there: install it, or tools/bench --peers peers brings it")
    with folder() as where, contextlib.ExitStack() as stack:
        xs_port = free_port()
        stack.enter_context(
            server(os.path.join(where, "store"), "--expose", f"127.0.0.1:{xs_port}")
        )
        token = Path(where, "store", "token").read_text().strip()
        xs = Link(xs_port)
        data = request("POST", "/append/events", CONTENT, f"Authorization: Bearer {token}")

        def appends() -> float:
            return xs.rate(data, is_whole, b'"id"')

        if redis_server:
            floor = stack.enter_context(redis(redis_server, where))
            found = alternate(ROUNDS, appends, floor)
            report.add(
                "1 client, against Redis",
                found.subject,
                "appends/s",
                at_least(round(found.ratio, 2), REDIS_GOAL),
                floor=found.floor,
                floor_unit="/s, XADD, appendfsync always",
                ratio=found.ratio,
            )
        if nats_server:
            is_synced = syncs_each(nats_server)
            floor = stack.enter_context(nats(nats_server, where, is_synced))
            found = alternate(ROUNDS, appends, floor)
            kind = "JetStream, sync always" if is_synced else "JetStream, NOT synced"
            report.add(
                "1 client, against NATS",
                found.subject,
                "appends/s",
                floor=found.floor,
                floor_unit=f"/s, {kind}",
                ratio=found.ratio,
            )
            if not is_synced:
                report.note(
                    "This nats-server is older than 2.10 and can't sync each message: it answers"
                    " before the event is on the disk, which is less than xs promises."
                )
    report.end()


if __name__ == "__main__":
    main()
