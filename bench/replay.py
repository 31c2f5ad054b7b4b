"""How many frames a second does a replay bring to a client that throws them away?

Floors: the same bytes from a process that does nothing but send them, and SQLite alone joining the
same pages. Half of the frames are of one topic, half of 1,000 topics below one prefix.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import statistics
from collections.abc import Iterator

from _measure import (
    Report,
    Server,
    alternate,
    at_least,
    at_most,
    discard,
    folder,
    percentile,
    pick,
    populate,
    request,
    seconds,
    server,
)

from xs.schema import PAGE_ROWS

FRAMES = pick(1_000_000, 200_000)
DRESSED = FRAMES // 5  # of those to which something is added
ROUNDS = pick(5, 3)
RATE, OF_SQLITE = 2_000_000, 0.6  # frames a second, and of what SQLite alone does: the goals
ONE_TOPIC, WILDCARD = 0.7, 0.3  # of the rate of all: the goals
FIRST_BYTE = 2.0  # ms: the goal
CLOSE = "Connection: close"

# As many rows as the pages of ours have.
PAGE = f"""
SELECT CAST(group_concat(json, '\n') AS BLOB), max(row) FROM frame WHERE row > ?1 AND row <= ifnull(
    (SELECT row FROM frame WHERE row > ?1 ORDER BY row LIMIT 1 OFFSET {PAGE_ROWS - 1}), 1 << 62)
"""


def topics() -> Iterator[str]:
    for n in range(FRAMES // 2):
        yield "one"
        yield f"many.t{n % 1000:03d}"


def replay(running: Server, target: str, frames: int) -> float:
    """Frames a second."""
    data = request("GET", target, b"", CLOSE)
    return frames / seconds(lambda: discard(running.socket_path, data))


def join_pages(store: str) -> int:
    """What SQLite needs for the pages, with nobody to send them to; their bytes."""
    connection = sqlite3.connect(f"file:{store}/xs.db?mode=ro", uri=True, isolation_level=None)
    row, size = -1, 0
    while True:
        page, last = connection.execute(PAGE, (row,)).fetchone()
        if page is None:
            break
        row = last
        size += len(page)
    connection.close()
    return size


class Sender:
    """A process that sends so many bytes to whoever connects and asks."""

    def __init__(self, where: str, size: int) -> None:
        self.path = os.path.join(where, "floor.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(1)
        self._pid = os.fork()
        if self._pid == 0:
            block = b"x" * 200_000
            while True:
                peer = listener.accept()[0]
                if not peer.recv(65536):
                    os._exit(0)
                peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for _ in range(size // len(block)):
                    peer.sendall(block)
                peer.sendall(block[: size % len(block)])
                peer.close()
        listener.close()

    def stop(self) -> None:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(self.path)
        os.waitpid(self._pid, 0)


def main() -> None:
    report = Report("replay", f"Replay of {FRAMES:,} frames over the Unix socket")
    with folder() as where:
        store = os.path.join(where, "store")
        known = populate(store, topics())
        with server(store) as running:
            size = join_pages(store)
            sender = Sender(where, size)
            ask = request("GET", "/", b"", CLOSE)
            floors = {
                "socket to socket": lambda: FRAMES / seconds(lambda: discard(sender.path, ask)),
                "SQLite joins pages": lambda: FRAMES / seconds(lambda: join_pages(store)),
            }
            for what, floor in floors.items():
                found = alternate(ROUNDS, lambda: replay(running, "/", FRAMES), floor)
                is_sqlite = what.startswith("SQLite")
                report.add(
                    "GET /",
                    found.subject,
                    "frames/s",
                    *([at_least(found.ratio, OF_SQLITE)] if is_sqlite else []),
                    *([at_least(found.subject, RATE, "/s")] if is_sqlite else []),
                    floor=found.floor,
                    floor_unit=f"frames/s, {what}",
                    ratio=found.ratio,
                )
            sender.stop()
            for what, target, goal in (
                ("one topic, half of all", "/?topic=one", ONE_TOPIC),
                ("a wildcard over 1,000 topics, the other half", "/?topic=many.*", WILDCARD),
                ("with-timestamp", f"/?with-timestamp&limit={DRESSED}", None),
                ("with-content", f"/?with-content&limit={DRESSED}", None),
                ("SSE", "/?topic=one", None),
            ):
                fields = ("Accept: text/event-stream", CLOSE) if what == "SSE" else (CLOSE,)
                data = request("GET", target, b"", *fields)
                frames = DRESSED if "limit" in target else FRAMES // 2
                found = alternate(
                    pick(5, 3),
                    lambda frames=frames, data=data: (
                        frames / seconds(lambda: discard(running.socket_path, data))
                    ),
                    lambda: replay(running, "/", FRAMES),
                )
                report.add(
                    what,
                    found.subject,
                    "frames/s",
                    *([] if goal is None else [at_least(found.ratio, goal)]),
                    floor=found.floor,
                    floor_unit="frames/s, all",
                    ratio=found.ratio,
                )
            version = request("GET", "/version", b"", CLOSE)
            near_end = request("GET", f"/?after={known[-1]}", b"", CLOSE)
            firsts, bare = [], []
            for _ in range(pick(300, 100)):
                firsts.append(discard(running.socket_path, near_end)[1] * 1e6)
                bare.append(discard(running.socket_path, version)[1] * 1e6)
            for what, of in (("p50", statistics.median), ("p99", lambda v: percentile(v, 99))):
                goals = [at_most(of(firsts) / 1e3, FIRST_BYTE, "ms")] if what == "p50" else []
                report.add(
                    f"after= near the end: first byte, {what}",
                    of(firsts),
                    "µs",
                    *goals,
                    floor=of(bare),
                    floor_unit="µs, GET /version",
                    ratio=of(firsts) / of(bare),
                )
    report.end()


if __name__ == "__main__":
    main()
