"""What does it cost to look up one frame, and does it stay the same as the store grows?

One connection, one request at a time, ids chosen at random. Stores of all sizes are served at the
same time and asked in turn. Floor: `GET /version`. Flat: the rate at each size against 10,000.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Iterator

from _measure import Client, Report, at_least, at_most, folder, pick, populate, request, server

SIZES = pick([10_000, 100_000, 1_000_000], [10_000, 200_000])
TOPICS = 10_000  # below one prefix
ROUNDS = pick(15, 5)
REQUESTS = pick(200, 100)  # in each round
FLAT = 0.8  # of the rate at 10,000 frames: the goal
WELL_UNDER = 500.0  # µs: the goal


def topics(frames: int) -> Iterator[str]:
    """Those of the frames: `TOPICS` in turn, and in the middle one that comes once."""
    for n in range(frames):
        if n == frames // 2:
            yield "rare.one"
        yield f"many.t{n % TOPICS:04d}"


@contextlib.contextmanager
def on_processor(which: int) -> Iterator[None]:
    """Keeps this process, and those that it starts, on the first or the last processor (Linux).

    Servers then share one and the client has another: the way between two processes takes half as
    long on one processor, and which it is would be left to chance for each server.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [sorted(before)[which]])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


TARGETS = {
    "GET /version": "/version",
    "GET /last": "/last",
    "GET /last/:topic": "/last/many.t{topic:04d}",
    "GET /head/:topic, one frame among all": "/head/rare.one",
    "GET /last/many.*, 10,000 topics": "/last/many.*",
    "GET /:id": "/{id}",
    "GET /next/:id": "/next/{id}",
    "GET /prev/:id": "/prev/{id}",
    "GET /next/:id?topic=many.*": "/next/{id}?topic=many.*",
    "GET /prev/:id?topic=rare.*": "/prev/{newest}?topic=rare.*",
    "GET /first/:topic": "/first/many.t{topic:04d}",
    "GET /content/:id": "/content/{id}",
}


def main() -> None:
    report = Report("lookup", "One frame looked up, on one connection")
    chance = random.Random(1)
    with folder() as where, contextlib.ExitStack() as running:
        ids: dict[int, list[str]] = {}
        clients: dict[int, Client] = {}
        for size in SIZES:
            path = os.path.join(where, str(size))
            ids[size] = populate(path, topics(size))
            with on_processor(-1):
                clients[size] = Client(running.enter_context(server(path)).socket_path)
        running.enter_context(on_processor(0))
        took: dict[tuple[str, int], list[float]] = {}
        for _ in range(ROUNDS):
            for what, target in TARGETS.items():
                for size in SIZES:
                    inner = ids[size][1:-1]
                    made = [
                        request(
                            "GET",
                            target.format(
                                id=chance.choice(inner),
                                topic=chance.randrange(TOPICS),
                                newest=inner[-1],
                            ),
                        )
                        for _ in range(REQUESTS)
                    ]
                    ask = clients[size].ask
                    started = time.perf_counter()
                    for each in made:
                        ask(each)
                    spent = (time.perf_counter() - started) / REQUESTS * 1e6
                    took.setdefault((what, size), []).append(spent)
        for client in clients.values():
            client.close()
        report_all(report, took)
    report.end()


def report_all(report: Report, took: dict[tuple[str, int], list[float]]) -> None:
    for what in TARGETS:
        for size in SIZES:
            found = took[what, size]
            floor = took["GET /version", size]
            median = statistics.median(found)
            goals = []
            if what != "GET /version":
                goals.append(at_most(median, WELL_UNDER, "µs"))
                if size != SIZES[0]:
                    flat = statistics.median(
                        small / large for small, large in zip(took[what, SIZES[0]], found)
                    )
                    goals.append(at_least(round(flat, 2), FLAT, f"of {SIZES[0]:,}"))
            report.add(
                f"{what}; {size:,}",
                median,
                "µs",
                *goals,
                floor=statistics.median(floor),
                floor_unit="µs, GET /version",
                ratio=statistics.median(a / b for a, b in zip(found, floor)),
            )


if __name__ == "__main__":
    main()
