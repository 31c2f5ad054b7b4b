"""What do many stores in one process cost: to start, when idle, and to reach through the root?

Each store is new, with its `xs.start` and `xs.stop` alone: what it holds makes no difference to its
start (bench/start.py). Floor of a start: this process opens as many bare SQLite databases, and
commits a row to each. Floor of a request through the root's socket: the same on the store's own.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import statistics
import sys
import time
from contextlib import closing

from _measure import (
    CONTENT,
    Client,
    Floor,
    Report,
    Rounds,
    Server,
    alternate,
    at_most,
    folder,
    pick,
    rate_of_one,
    request,
    seconds,
)
from memory import settled

COUNTS = (100, 1000) if "--huge" in sys.argv[1:] else (100,)
ROUNDS = pick(3, 1)
SECONDS = pick(0.5, 0.2)
START = 2.0  # s for the first of COUNTS: the goal
IDLE = 2.0  # MB a store, idle: the goal
MB = 1e6


def ask_for(running: Server, paths: list[str]) -> None:
    lines = [{"topic": "xs.store.add", "meta": {"path": path}} for path in paths]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with closing(Client(running.socket_path)) as client:
        client.ask(request("POST", "/append", body, "Content-Type: application/x-ndjson"))


def wait_for_all(running: Server, count: int) -> None:
    """Until so many are served."""
    with closing(Client(running.socket_path)) as client:
        while True:
            answer = client.ask(request("GET", "/stores"))
            stores = [json.loads(line) for line in answer.partition(b"\r\n\r\n")[2].splitlines()]
            if sum(each["since"] is not None for each in stores) == count:
                return
            time.sleep(0.002)


def start(root: str, count: int) -> tuple[Server, float]:
    """A server of a root with so many stores, and how long it took until all were served."""
    started = time.perf_counter()
    running = Server(root)
    wait_for_all(running, count)
    return running, time.perf_counter() - started


def start_and_end(root: str, count: int, number: int) -> float:
    running, took = start(root, count)
    running.process.send_signal(number)
    running.process.wait()
    return took


def open_bare(where: str, count: int) -> float:
    """Seconds to open so many bare databases, with a commit to each."""
    for n in range(count):
        Floor(where, f"bare{n}.db").close()

    def act() -> None:
        opened = []
        for n in range(count):
            path = os.path.join(where, f"bare{n}.db")
            connection = sqlite3.connect(path, isolation_level=None)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("INSERT INTO frame VALUES (NULL, '', NULL)")
            opened.append(connection)
        for connection in opened:
            connection.close()

    return seconds(act)


def starts_and_idles(report: Report, where: str, count: int) -> None:
    root = os.path.join(where, f"root{count}")
    paths = [f"{root}.{n}" for n in range(count)]
    running = Server(root)
    alone = settled(running)

    def add() -> None:
        ask_for(running, paths)
        wait_for_all(running, count)

    report.add(f"{count:,} stores are added, and made", seconds(add), "s")
    running.stop()
    ends = ((signal.SIGTERM, "stopped"), (signal.SIGKILL, "killed"))
    for number, what in ends:
        start_and_end(root, count, number)
        found = alternate(
            ROUNDS if count == COUNTS[0] else 1,
            lambda number=number: start_and_end(root, count, number),
            lambda: open_bare(where, count),
        )
        goals = (at_most(found.subject, START, "s"),) if count == COUNTS[0] else ()
        report.add(
            f"xs serve until {count:,}, {what}, are served",
            found.subject,
            "s",
            *goals,
            floor=found.floor,
            floor_unit=f"s, {count:,} bare databases",
            ratio=found.ratio,
        )
    running, _ = start(root, count)
    each = (settled(running) - alone) / count
    report.add("each of them, idle", each / MB, "MB", at_most(each / MB, IDLE, "MB"))
    pid = running.process.pid
    files = len(os.listdir(f"/proc/{pid}/fd")) if os.path.isdir("/proc/self/fd") else 0
    report.add("files open for each", files / count, "files")
    before = processor_seconds(pid)
    time.sleep(2)
    used = (processor_seconds(pid) - before) / 2
    report.add("all of them, idle: processor time", used * 1e3, "ms/s")
    report.add(f"{count:,} are stopped", seconds(running.stop), "s")


def processor_seconds(pid: int) -> float:
    """What a process has used of the processor; 0 where the system doesn't say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(") ")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def through_the_root(report: Report, where: str) -> None:
    count = COUNTS[0]
    root = os.path.join(where, f"root{count}")
    running, _ = start(root, count)
    own, through = Client(f"{root}.7/sock"), Client(running.socket_path)
    via = f"/store/root{count}.7"

    def compare(what: str, method: str, target: str, body: bytes = b"") -> None:
        found: Rounds = alternate(
            ROUNDS,
            lambda: rate_of_one(through, request(method, via + target, body), SECONDS),
            lambda: rate_of_one(own, request(method, target, body), SECONDS),
        )
        report.add(
            what,
            found.subject,
            "requests/s",
            floor=found.floor,
            floor_unit="on its own socket",
            ratio=found.ratio,
        )

    compare("GET /store/NAME/version", "GET", "/version")
    compare("POST /store/NAME/append/TOPIC", "POST", "/append/events", CONTENT)
    with closing(Client(running.socket_path)) as client:
        times = [seconds(lambda: client.ask(request("GET", "/stores"))) for _ in range(50)]
    report.add(f"GET /stores, {count:,} of them", statistics.median(times) * 1e3, "ms")
    own.close()
    through.close()
    running.stop()


def main() -> None:
    report = Report("stores", "Many stores in one process")
    with folder() as where:
        for count in COUNTS:
            starts_and_idles(report, where, count)
        through_the_root(report, where)
    report.end()


if __name__ == "__main__":
    main()
