"""How long does it take from an append to its delivery, with 1, 100 and 1,000 followers?

From sending the append to a follower's having read it: of all deliveries (p50, p99), and of the
last follower of each append, which is what the goals are for. One append is under way at a time.
This process is the writer and all followers, in one selector's loop.

Floor: a bare process that, asked over a socket, commits one row (SQLite) and writes it to one
socket; and to as many sockets as there are followers.
"""

from __future__ import annotations

import os
import resource
import selectors
import socket
import statistics
import time
from collections.abc import Callable

from _measure import (
    CONTENT,
    Client,
    Floor,
    Report,
    Server,
    alternate,
    at_most,
    folder,
    is_whole,
    json_line,
    percentile,
    pick,
    request,
    server,
)
from _plot import Plot

GOALS = {1: 0.6, 100: 1.2, 1000: 8.0}  # ms, p50 until the last of them has it
OWN_TOPICS = 1.3  # of the time with 1 follower
APPENDS = {1: pick(600, 200), 100: pick(150, 50), 1000: pick(40, 15)}  # in each round
ROUNDS = pick(5, 3)


class Readers:
    """Sockets that are all to get the same, in one loop."""

    def __init__(self, socks: list[socket.socket]) -> None:
        self.socks = socks
        self._selector = selectors.DefaultSelector()
        for sock in socks:
            self._selector.register(sock, selectors.EVENT_READ, sock)

    def wait(self, count: int, started: float, delays: list[float]) -> None:
        """Until `count` sockets have read something; adds how long each took, in ms."""
        while count:
            for key, _ in self._selector.select():
                if not key.data.recv(65536):
                    raise SystemExit("a follower's answer ended")
                delays.append((time.perf_counter() - started) * 1e3)
                count -= 1

    def close(self) -> None:
        self._selector.close()
        for sock in self.socks:
            sock.close()


def follow(running: Server, count: int, topic: Callable[[int], str]) -> Readers:
    """Followers that have caught up: each has had its threshold."""
    socks = []
    for n in range(count):
        client = Client(running.socket_path)
        client.sock.sendall(request("GET", f"/?follow&after={0:025d}&last=1&topic={topic(n)}"))
        socks.append(client.sock)
    for sock in socks:
        data = b""
        while b"xs.threshold" not in data:
            data += sock.recv(65536)
    return Readers(socks)


class Latency:
    """Of appends to followers, with all delays of all rounds."""

    def __init__(self, running: Server, readers: Readers, count: int, each: int) -> None:
        """`each`: how many of the readers get an append."""
        self.delays: list[float] = []
        self._writer = Client(running.socket_path)
        self._readers = readers
        self._count = count
        self._each = each
        self._next = 0

    def round(self, topic: Callable[[int], str]) -> float:
        """The median, in ms, until the last follower has it."""
        lasts = []
        for _ in range(self._count):
            data = request("POST", f"/append/{topic(self._next)}", CONTENT)
            self._next += 1
            delays: list[float] = []
            started = time.perf_counter()
            self._writer.sock.sendall(data)
            self._readers.wait(self._each, started, delays)
            lasts.append(delays[-1])
            self.delays += delays
            answer = b""
            while not is_whole(answer):
                answer += self._writer.sock.recv(65536)
        return statistics.median(lasts)

    def close(self) -> None:
        self._writer.close()


class Bare:
    """The floor's process."""

    def __init__(self, where: str, count: int) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        self._asked, asks = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            self._asked.close()
            for ours, _ in pairs:
                ours.close()
            self._serve(where, asks, [sock for _, sock in pairs])
        asks.close()
        for _, theirs in pairs:
            theirs.close()
        self._readers = Readers([sock for sock, _ in pairs])

    def _serve(self, where: str, asks: socket.socket, socks: list[socket.socket]) -> None:
        floor = Floor(where)
        rows = floor.rows(10_000)
        data = json_line(1).encode() + b"\n"
        while asks.recv(65536):
            floor.insert([rows.pop()])
            for sock in socks:
                sock.send(data)
        os._exit(0)

    def round(self, count: int) -> float:
        """The median, in ms, until the last socket has been read."""
        lasts = []
        for _ in range(count):
            delays: list[float] = []
            started = time.perf_counter()
            self._asked.sendall(CONTENT)
            self._readers.wait(len(self._readers.socks), started, delays)
            lasts.append(delays[-1])
        return statistics.median(lasts)

    def stop(self) -> None:
        self._asked.close()
        os.waitpid(self._pid, 0)
        self._readers.close()


def allow_sockets() -> None:
    """Lets this process have as many sockets as followers need."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = 8192 if hard == resource.RLIM_INFINITY else min(hard, 8192)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def main() -> None:
    allow_sockets()
    report = Report("follow", "From an append to its delivery to followers (Unix socket)")
    with folder() as where:
        one = Bare(where, 1)
        medians: dict[str, list[tuple[float, float]]] = {"xs": [], "a commit, 1 write": []}
        for count, goal in GOALS.items():
            many = one if count == 1 else Bare(where, count)
            with server(os.path.join(where, f"store-{count}")) as running:
                readers = follow(running, count, lambda _: "events")
                latency = Latency(running, readers, APPENDS[count], count)
                floors: list[float] = []

                def floor(many: Bare = many, floors: list[float] = floors) -> float:
                    floors.append(many.round(APPENDS[count]))  # noqa: B023
                    return one.round(APPENDS[count])  # noqa: B023

                found = alternate(ROUNDS, lambda: latency.round(lambda _: "events"), floor)  # noqa: B023
                name = f"{count:,} followers" if count > 1 else "1 follower"
                report.add(
                    f"{name}: the last has it, p50",
                    found.subject,
                    "ms",
                    at_most(found.subject, goal, "ms"),
                    floor=found.floor,
                    floor_unit="ms, commit + 1 write",
                    ratio=found.ratio,
                )
                if count > 1:
                    report.add(
                        f"{name}: the last has it, p50",
                        found.subject,
                        "ms",
                        floor=statistics.median(floors),
                        floor_unit=f"ms, commit + {count:,} writes",
                        ratio=found.subject / statistics.median(floors),
                    )
                report.add(f"{name}: all deliveries, p50", percentile(latency.delays, 50), "ms")
                report.add(f"{name}: all deliveries, p99", percentile(latency.delays, 99), "ms")
                medians["xs"].append((count, found.subject))
                medians["a commit, 1 write"].append((count, found.floor))
                latency.close()
                readers.close()
            if many is not one:
                many.stop()
        one.stop()
        own_topics(report, where)
    title = "From an append until the last follower has it, p50"
    report.plot("follow", Plot(title, "followers", "ms", medians))
    report.end()


def own_topics(report: Report, where: str) -> None:
    """1,000 followers, each on a topic of its own, against one alone."""
    with server(os.path.join(where, "alone")) as alone, server(os.path.join(where, "own")) as own:

        def topic(n: int) -> str:
            return f"own.t{n % 1000:03d}"

        one = Latency(alone, follow(alone, 1, lambda _: "events"), APPENDS[1], 1)
        thousand = Latency(own, follow(own, 1000, topic), APPENDS[1], 1)
        found = alternate(
            ROUNDS, lambda: thousand.round(topic), lambda: one.round(lambda _: "events")
        )
        report.add(
            "1,000 followers, each on its own topic, p50",
            found.subject,
            "ms",
            at_most(round(found.ratio, 2), OWN_TOPICS),
            floor=found.floor,
            floor_unit="ms, 1 follower alone",
            ratio=found.ratio,
        )


if __name__ == "__main__":
    main()
