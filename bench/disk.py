"""How many bytes on disk does an event of 100 bytes take?

All files of the store's folder after its server has stopped, against the event's JSON and content.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from _measure import CONTENT, Client, Report, at_most, folder, pick, populate, request, server

FRAMES = pick(300_000, 30_000)
SINGLE = pick(20_000, 2_000)
GOAL = 2.0


def size_of(path: str) -> int:
    """Bytes that the files' blocks take."""
    total = 0
    for parent, _, names in os.walk(path):
        for name in names:
            total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total


def lines_of(path: str) -> Iterable[bytes]:
    from xs import frame, ids
    from xs.store import Store

    store = Store(path)
    position = -1
    walk = store.index.walk(None)
    while True:
        page, count = walk.page(position, None, 1000, store.clock())
        if not count:
            break
        lines = page.split(b"\n")[:-1]
        position = ids.parse(frame.id_of(lines[-1]))
        yield from lines
    store.close()


def add(report: Report, what: str, path: str) -> None:
    frames = json = content = 0
    for line in lines_of(path):
        frames += 1
        json += len(line)
        content += len(CONTENT) if b'"hash":null' not in line else 0
    disk = size_of(path)
    ratio = disk / (json + content)
    report.add(
        what,
        disk / frames,
        "bytes a frame",
        at_most(round(ratio, 2), GOAL),
        floor=(json + content) / frames,
        floor_unit="bytes, JSON + content",
        ratio=ratio,
    )


def main() -> None:
    report = Report("disk", "Bytes on disk for an event of 100 bytes")
    with folder() as where:
        for name, topics in (
            ("one topic", ("events" for _ in range(FRAMES))),
            ("a dotted topic", ("app.events" for _ in range(FRAMES))),
            ("1,000 dotted topics", (f"app.t{n % 1000}" for n in range(FRAMES))),
            ("1,000 topics of three parts", (f"app.a{n % 10}.t{n % 100}" for n in range(FRAMES))),
        ):
            path = os.path.join(where, name.split(",")[-1].replace(" ", "-"))
            populate(path, topics)
            add(report, f"{FRAMES:,} frames, {name}", path)
        path = os.path.join(where, "single")
        with server(path) as running:
            client = Client(running.socket_path)
            data = request("POST", "/append/events", CONTENT)
            for _ in range(SINGLE):
                client.ask(data)
            client.close()
        add(report, f"{SINGLE:,} frames, one append each", path)
    report.end()


if __name__ == "__main__":
    main()
