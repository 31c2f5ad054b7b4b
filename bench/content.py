"""From which size on is content better off in a file of its own than in the index?

Appends a second in this process, with `content.INLINE_MAX` set so that all content is inline,
or all of it is in files; by one writer, and by eight threads that share commits.
Inline has bare SQLite as its floor, with the same content in its row; files have inline as theirs.
Pages of a replay are read from the index that results.
"""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time

from _measure import Floor, Report, folder, pick

from xs import content, frame, ids
from xs.commit import Append
from xs.store import Store

SIZES = [1024 << n for n in range(0, 11, 2)]  # 1 KiB … 1 MiB
SECONDS = pick(0.3, 0.1)  # of each round
ROUNDS = pick(3, 1)


def appends(store: Store, size: int, writers: int) -> float:
    """Appends a second."""
    counts = [0] * writers
    until = time.perf_counter() + SECONDS

    def write(n: int) -> None:
        tail = bytes(size - 8)
        while time.perf_counter() < until:
            data = os.urandom(8) + tail  # other bytes each time
            store.append(Append("events", store.cas.take([data])))
            counts[n] += 1

    started = time.perf_counter()
    threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


def bare(floor: Floor, size: int) -> float:
    """Commits a second, of a row each."""
    content = bytes(size)
    count = 0
    started = time.perf_counter()
    while time.perf_counter() < started + SECONDS:
        floor.insert(floor.rows(1, content))
        count += 1
    return count / (time.perf_counter() - started)


def replay(store: Store) -> float:
    """Frames a second that come out of the index, page after page."""
    count = found = 0
    position = -1
    walk = store.index.walk(None)
    started = time.perf_counter()
    while time.perf_counter() < started + SECONDS / 2:
        page, found = walk.page(position, None, 1 << 62, store.clock())
        count += found
        position = ids.parse(frame.id_of(page[page.rfind(b"\n", 0, -1) + 1 :])) if found else -1
    return count / (time.perf_counter() - started)


def main() -> None:
    chosen = content.INLINE_MAX
    report = Report("content", f"Content inline or in a file (INLINE_MAX is {chosen:,} bytes)")
    with folder() as where:
        for writers in (1, 8):
            for size in SIZES:
                compare(report, where, size, writers)
    report.end()


def compare(report: Report, where: str, size: int, writers: int) -> None:
    chosen = content.INLINE_MAX
    limits = {"inline": 1 << 40, "file": 0}
    stores = {
        kind: Store(os.path.join(where, f"{kind}-{size}-{writers}"), exclusive=True, create=True)
        for kind in limits
    }
    floor = Floor(where, f"floor-{size}-{writers}.db")
    rates: dict[str, list[float]] = {"inline": [], "file": [], "bare": []}
    reads: dict[str, list[float]] = {"inline": [], "file": []}
    for _ in range(ROUNDS):
        for kind, limit in limits.items():
            content.INLINE_MAX = limit
            rates[kind].append(appends(stores[kind], size, writers))
        rates["bare"].append(bare(floor, size))
    for _ in range(ROUNDS):
        for kind, store in stores.items():
            reads[kind].append(replay(store))
    content.INLINE_MAX = chosen
    floor.close()
    for store in stores.values():
        store.close()
        shutil.rmtree(store.folder)
    name = f"{size // 1024} KiB, {writers} writer{'s'[: writers > 1]}"
    kept = "inline" if size <= chosen else "a file"
    report.add(
        f"{name}, inline (now {kept})",
        statistics.median(rates["inline"]),
        "appends/s",
        floor=statistics.median(rates["bare"]),
        floor_unit="commits/s, bare SQLite",
        ratio=ratio(rates["inline"], rates["bare"]),
    )
    report.add(
        f"{name}, in files",
        statistics.median(rates["file"]),
        "appends/s",
        floor=statistics.median(rates["inline"]),
        floor_unit="appends/s, inline",
        ratio=ratio(rates["file"], rates["inline"]),
    )
    if writers == 1:
        report.add(
            f"{size // 1024} KiB, pages read beside inline content",
            statistics.median(reads["inline"]),
            "frames/s",
            floor=statistics.median(reads["file"]),
            floor_unit="frames/s, beside files",
            ratio=ratio(reads["inline"], reads["file"]),
        )


def ratio(subjects: list[float], floors: list[float]) -> float:
    return statistics.median(s / f for s, f in zip(subjects, floors))


if __name__ == "__main__":
    main()
