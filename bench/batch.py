"""How many events a second does one connection bring in, as NDJSON and as `xs append --lines`?

Floor: bare SQLite, `executemany` of rows as large, in transactions of 1,000.
"""

from __future__ import annotations

import os
import subprocess
import threading

from _measure import (
    CONTENT,
    ENVIRON,
    XS,
    Client,
    Floor,
    Report,
    Server,
    alternate,
    at_least,
    folder,
    pick,
    request,
    seconds,
    server,
)

FRAMES = pick(200_000, 50_000)
LINES = pick(1_000_000, 50_000)
ROUNDS = pick(5, 3)
RATE = 150_000  # frames a second: the goal
BLOCK = 256 * 1024


def post(running: Server, data: bytes) -> None:
    """Sends a body and waits for its summary; what comes back meanwhile is read at the end."""
    client = Client(running.socket_path)
    # Sent from another thread, as a client that also reads does; sendall holds no interpreter lock.
    sender = threading.Thread(target=client.sock.sendall, args=(data,))
    sender.start()
    answer = client.sock.recv(65536)
    sender.join()
    client.close()
    if f'"appended":{FRAMES},'.encode() not in answer:
        raise SystemExit(f"not all were appended: {answer!r}")


def append_lines(running: Server, path: str) -> None:
    with open(path, "rb") as lines:
        done = subprocess.run(
            [XS, "append", running.path, "events", "--lines"],
            stdin=lines,
            stdout=subprocess.PIPE,
            env=ENVIRON,
        )
    if done.returncode or f'"appended":{LINES},'.encode() not in done.stdout:
        raise SystemExit(f"not all were appended: {done.stdout!r}")


def main() -> None:
    report = Report("batch", f"{FRAMES:,} events of 100 bytes over one connection")
    with folder() as where, server(os.path.join(where, "store")) as running:
        floor = Floor(where)

        def rate_of_floor() -> float:
            rows = floor.rows(FRAMES)
            return FRAMES / seconds(lambda: floor.insert(rows))

        text = CONTENT.decode()
        for topic in ("events", "app.events"):
            line = f'{{"topic":"{topic}","content":"{text}"}}\n'.encode()
            data = request("POST", "/append", line * FRAMES, "Content-Type: application/x-ndjson")
            found = alternate(
                ROUNDS,
                lambda data=data: FRAMES / seconds(lambda: post(running, data)),
                rate_of_floor,
            )
            report.add(
                f"NDJSON, topic {topic}",
                found.subject,
                "frames/s",
                at_least(found.ratio, 0.5),
                at_least(found.subject, RATE, "/s"),
                floor=found.floor,
                floor_unit="rows/s, bare SQLite",
                ratio=found.ratio,
            )
        path = os.path.join(where, "lines")
        with open(path, "wb") as lines:
            lines.write((CONTENT + b"\n") * LINES)
        found = alternate(
            pick(3, 3),
            lambda: LINES / seconds(lambda: append_lines(running, path)),
            rate_of_floor,
        )
        report.add(
            f"xs append --lines of {LINES:,}, the whole process",
            found.subject,
            "frames/s",
            at_least(found.ratio, 0.4),
            floor=found.floor,
            floor_unit="rows/s, bare SQLite",
            ratio=found.ratio,
        )
        floor.close()
    report.end()


if __name__ == "__main__":
    main()
