"""From which size on is content better off in a file of its own than in the index?

Appends a second of one writer, in this process, with `cas.INLINE_MAX` set so that all content is inline,
or all of it is in files; written one after another, and by eight threads that share commits.
Floor: bare SQLite with the same content in its row. What is chosen is `cas.INLINE_MAX`.
"""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time

from _measure import Floor, Report, folder, pick

from xs import cas
from xs.commit import Append
from xs.store import Store

SIZES = [1024 << n for n in range(9)]  # 1 KiB … 256 KiB
SECONDS = pick(0.6, 0.15)  # of each round
ROUNDS = pick(5, 3)


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


def main() -> None:
    chosen = cas.INLINE_MAX
    report = Report("content", f"Content inline or in a file (INLINE_MAX is {chosen:,} bytes)")
    with folder() as where:
        for writers in (1, 8):
            for size in SIZES:
                rates: dict[str, list[float]] = {"inline": [], "file": [], "bare": []}
                path = os.path.join(where, "store")
                stores = {
                    kind: Store(f"{path}-{kind}", exclusive=True, create=True)
                    for kind in ("inline", "file")
                }
                floor = Floor(where)
                for _ in range(ROUNDS):
                    for kind, limit in (("inline", 1 << 40), ("file", 0)):
                        cas.INLINE_MAX = limit
                        rates[kind].append(appends(stores[kind], size, writers))
                    rates["bare"].append(bare(floor, size))
                cas.INLINE_MAX = chosen
                floor.close()
                for kind, store in stores.items():
                    store.close()
                    shutil.rmtree(f"{path}-{kind}")
                os.unlink(os.path.join(where, "floor.db"))
                for kind in ("inline", "file"):
                    pairs = zip(rates[kind], rates["bare"])
                    kinds = ("inline", "file") if kind == "inline" else ("file", "inline")
                    wins = statistics.median(
                        a / b for a, b in zip(rates[kinds[0]], rates[kinds[1]])
                    )
                    mark = " (as chosen)" if (size <= chosen) == (kind == "inline") else ""
                    report.add(
                        f"{size // 1024} KiB, {writers} writer{'s'[: writers > 1]}, {kind}{mark}",
                        statistics.median(rates[kind]),
                        f"/s, {wins:.2f} × {kinds[1]}",
                        floor=statistics.median(rates["bare"]),
                        floor_unit="commits/s, bare SQLite",
                        ratio=statistics.median(a / b for a, b in pairs),
                    )
    report.end()


if __name__ == "__main__":
    main()
