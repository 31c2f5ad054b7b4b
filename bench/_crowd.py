"""A crowd on one store: `tools/soak --crowd [SECONDS [FOLLOWERS [WRITERS [CONNECTIONS]]]]`.

1,000 followers and 50 writers, for ten minutes unless told otherwise. A third of the followers,
always others, stop reading for seconds. At the end each has been given the very bytes that the
store then gives for a read of everything: nothing lost, repeated or out of order. The server's
memory does not grow meanwhile. Then 10,000 connections are opened and dropped, silent, amid a head
or amid a follow, and its open files and threads return to where they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import selectors
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from _soak import (
    DEADLINE,
    MEMORY_GROWTH,
    MEMORY_SWING,
    Sample,
    Server,
    Wrong,
    check,
    most,
    told,
)

from xs import framing, http1

SECONDS, FOLLOWERS, WRITERS, CONNECTIONS = 600.0, 1000, 50, 10_000
APPENDS_A_SECOND = 100.0  # of all writers: each goes to every follower
STALL_SECONDS = 6.0  # at most
SAMPLE_SECONDS = 0.5
THREAD_BYTES = 100_000  # of memory that a thread's stack takes, about
WAVE = 1000  # connections that are open at once, beside the others


class Follower:
    """What has come to one follower: how many frames, and the hash of their bytes."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.sock.sendall(b"GET /?follow&topic=crowd.* HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.sock.setblocking(False)
        self.frames = 0
        self.digest = hashlib.sha256()
        self.stalled_until = 0.0
        self._buffer = bytearray()
        self._body: framing.LengthBody | framing.ChunkedBody | framing.UntilCloseBody | None = None
        self.has_caught_up = False

    def take(self) -> None:
        try:
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return
        if not data:
            raise Wrong("a follower was ended")
        self._buffer += data
        if self._body is None:
            head = http1.read_response_head(self._buffer, "GET")
            if head is None:
                return
            self._body = framing.response_body_reader(head)
        while True:
            block = self._body.read(self._buffer)
            if block is None:
                return
            self._count(block)

    def _count(self, block: bytes) -> None:
        if not self.has_caught_up:
            line, _, block = block.partition(b"\n")
            if b'"xs.threshold"' not in line:
                raise Wrong(f"a follower of an empty store begins with {line!r}")
            self.has_caught_up = True
        self.frames += block.count(b"\n")
        self.digest.update(block)


class Crowd:
    """All followers, read by one thread, and the writers."""

    def __init__(self, path: str, followers: int, chance: random.Random) -> None:
        self._chance = chance
        self._selector = selectors.DefaultSelector()
        self.followers = [Follower(path) for _ in range(followers)]
        self._stalled: list[Follower] = []
        for follower in self.followers:
            self._register(follower)
        self.appended = 0
        self.stalls = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()  # guards the three above

    def _register(self, follower: Follower) -> None:
        self._selector.register(follower.sock, selectors.EVENT_READ, follower)

    def read(self, seconds: float) -> None:
        """What has come, of those who don't stall; waits for at most `seconds`."""
        for key, _ in self._selector.select(seconds):
            key.data.take()

    def stall(self) -> None:
        """Lets a third of them not read for a while, and those go on whose time is over."""
        now = time.monotonic()
        for follower in [each for each in self._stalled if each.stalled_until < now]:
            self._stalled.remove(follower)
            self._register(follower)
        while len(self._stalled) < len(self.followers) // 3:
            follower = self._chance.choice(self.followers)
            if follower not in self._stalled:
                follower.stalled_until = now + self._chance.uniform(0.1, STALL_SECONDS)
                self._stalled.append(follower)
                self._selector.unregister(follower.sock)
                self.stalls += 1

    def go_on(self) -> None:
        for follower in self._stalled:
            self._register(follower)
        self._stalled.clear()

    def write(self, server: Server, name: int, pause: float, end: float) -> None:
        try:
            with server.connect() as connection:
                number = 0
                while time.monotonic() < end:
                    body = b"x" * (40_000 if number % 100 == 99 else number % 50)
                    meta = json.dumps({"writer": name, "number": number})
                    connection.ask("POST", f"/append/crowd.w{name}", body, f"xs-meta: {meta}")
                    number += 1
                    with self._lock:
                        self.appended += 1
                    time.sleep(pause)
        except Exception as error:
            self.errors.append(f"writer {name}: {type(error).__name__}: {error}")

    def close(self) -> None:
        self._selector.close()
        for follower in self.followers:
            follower.sock.close()


def follow(server: Server, seconds: float, followers: int, writers: int) -> Iterator[str]:
    crowd = Crowd(os.path.join(server.root, "sock"), followers, random.Random())
    samples: list[Sample] = []
    try:
        deadline = time.monotonic() + DEADLINE
        while not all(each.has_caught_up for each in crowd.followers):
            crowd.read(0.1)
            if time.monotonic() > deadline:
                raise Wrong("a follower of an empty store is not told that it has caught up")
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(
                target=crowd.write,
                args=(server, name, writers / APPENDS_A_SECOND, end),
                daemon=True,
            )
            for name in range(writers)
        ]
        for thread in threads:
            thread.start()
        due = 0.0
        while time.monotonic() < end:
            crowd.read(0.05)
            crowd.stall()
            if time.monotonic() >= due:
                samples.append(server.sample())
                due = time.monotonic() + SAMPLE_SECONDS
        for thread in threads:
            thread.join(DEADLINE)
        if crowd.errors:
            raise Wrong(crowd.errors[0])
        crowd.go_on()
        deadline = time.monotonic() + DEADLINE + seconds
        while any(each.frames < crowd.appended for each in crowd.followers):
            crowd.read(0.5)
            if time.monotonic() > deadline:
                raise Wrong("a follower has not been given all that was appended")
        crowd.read(0.2)  # nothing more is to come
        yield f"{crowd.appended} appends by {writers} writers, to {followers} followers each"
        yield f"{crowd.stalls} times one of them read nothing for a while"
        compare(server, crowd)
        yield "each was given what the store has, in its order and once"
        yield from judge_memory(samples)
    finally:
        crowd.close()


def judge_memory(samples: list[Sample]) -> Iterator[str]:
    """Compares the last third of the time with the one before. Raises `Wrong` if it has grown.

    A follower that stalls has a thread until it has caught up: how many there are swings.
    """
    third = len(samples) // 3
    middle, last = most(samples[third : 2 * third]), most(samples[2 * third :])
    yield (
        f"memory: {middle.memory / 1e6:.1f} MB in the second third, {last.memory / 1e6:.1f} MB in "
        f"the last; at most {max(middle.threads, last.threads)} threads"
    )
    stacks = max(0, last.threads - middle.threads) * THREAD_BYTES
    if last.memory > middle.memory * (1 + MEMORY_GROWTH) + MEMORY_SWING + stacks:
        raise Wrong("memory grows")


def compare(server: Server, crowd: Crowd) -> None:
    """Holds each follower's bytes against those of a read of everything. Raises `Wrong`."""
    with server.connect() as connection:
        stored = connection.ask("GET", "/?topic=crowd.*")
    numbers: dict[int, int] = {}
    for line in stored.splitlines():
        meta = json.loads(line)["meta"]
        if meta["number"] != numbers.get(meta["writer"], -1) + 1:
            raise Wrong(f"writer {meta['writer']}: {meta['number']} is out of order")
        numbers[meta["writer"]] = meta["number"]
    if stored.count(b"\n") != crowd.appended:
        raise Wrong(f"{crowd.appended} appends were answered, {stored.count(10)} are stored")
    expected = hashlib.sha256(stored).digest()
    for follower in crowd.followers:
        if follower.digest.digest() != expected:
            raise Wrong(f"a follower was given {follower.frames} frames, and other ones")


def come_and_go(server: Server, connections: int) -> Iterator[str]:
    settle(server, None)
    before = server.sample()
    path = os.path.join(server.root, "sock")
    halves = (b"", b"GET / HTTP/1.1\r\n", b"GET /?follow&new HTTP/1.1\r\nHost: localhost\r\n\r\n")
    opened = 0
    while opened < connections:
        wave = [socket.socket(socket.AF_UNIX) for _ in range(min(WAVE, connections - opened))]
        for number, sock in enumerate(wave):
            sock.connect(path)  # without a timeout, which would make it fail in a crowd
            sock.sendall(halves[number % len(halves)])
        opened += len(wave)
        for sock in wave:
            sock.close()
    settle(server, before)
    after = server.sample()
    yield f"{opened} connections opened and dropped: {before.files} open files, then {after.files}"
    yield f"{before.threads} threads, then {after.threads}"


def settle(server: Server, before: Sample | None) -> None:
    """Waits until files and threads are where they were, or (None) until they stay the same."""
    deadline = time.monotonic() + DEADLINE
    last = server.sample()
    while True:
        time.sleep(0.3)
        now = server.sample()
        same = (
            now[1:] == last[1:]
            if before is None
            else all(a <= b for a, b in zip(now[1:], before[1:]))
        )
        if same:
            return
        if time.monotonic() > deadline:
            raise Wrong(f"before {before}, and now {now}")
        last = now


def crowd(
    seconds: float = SECONDS,
    followers: float = FOLLOWERS,
    writers: float = WRITERS,
    connections: float = CONNECTIONS,
) -> Iterator[str]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    folder = tempfile.mkdtemp(prefix="xs-crowd-")
    server = Server(folder)
    try:
        yield from follow(server, seconds, int(followers), int(writers))
        yield from come_and_go(server, int(connections))
        server.stop()
        if server.said():
            raise Wrong(f"the log says: {server.said()}")
        check(server.root)
        yield "checked: the store is whole"
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.process.kill()
        server.process.wait()
        server.log.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(told(crowd(*map(float, sys.argv[1:]))))
