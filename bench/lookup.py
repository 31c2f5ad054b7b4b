"""What does it cost to look up one frame, or to append one, as the store grows?

One connection, one request at a time, ids chosen at random. Stores of all sizes are served at the
same time and asked in turn. Floor: `GET /version`. Flat: the rate at each size against 10,000.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator

from _measure import (
    CONTENT,
    Client,
    Goal,
    Report,
    at_least,
    folder,
    pick,
    populate,
    rate_of_one,
    request,
    server,
)
from _plot import Plot

SIZES = pick([10_000, 100_000, 1_000_000], [10_000, 200_000])
if "--huge" in sys.argv[1:]:
    SIZES = [*SIZES, 10_000_000]
TOPICS = 10_000  # below one prefix
ROUNDS = pick(15, 5)
REQUESTS = pick(200, 100)  # in each round
APPENDING = pick(0.2, 0.1)  # seconds in each round
FLAT = 0.8  # of the rate at 10,000 frames: the goal
GOALS = {"GET /last/:topic": 0.6, "GET /:id": 0.6, "GET /next/:id": 0.6}  # of GET /version
WILDCARD = 0.3  # of the rate of `GET /last/:topic`: the goal of a wildcard over all topics


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


VERSION, LAST, LAST_OF_ALL = "GET /version", "GET /last/:topic", "GET /last/many.*, 10,000 topics"
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
        report_all(report, {key: [1e6 / each for each in found] for key, found in took.items()})
        appends(report, clients)
        for client in clients.values():
            client.close()
    report.end()


def report_all(report: Report, rates: dict[tuple[str, int], list[float]]) -> None:
    """`rates`: requests a second, one for each round."""
    flat_lines = {}
    for what in TARGETS:
        if what == VERSION:
            continue
        flat_lines[what] = [(size, statistics.median(rates[what, size])) for size in SIZES]
        for size in SIZES:
            found = rates[what, size]
            ratio = median_ratio(found, rates[VERSION, size])
            goals = []
            if what in GOALS:
                goals.append(at_least(round(ratio, 2), GOALS[what]))
            if what == LAST_OF_ALL:
                share = median_ratio(found, rates[LAST, size])
                goals.append(at_least(round(share, 2), WILDCARD, "of one topic"))
            goals += flat(found, rates[what, SIZES[0]], size)
            report.add(
                f"{what}; {size:,}",
                statistics.median(found),
                "requests/s",
                *goals,
                floor=statistics.median(rates[VERSION, size]),
                floor_unit="/s, GET /version",
                ratio=ratio,
            )
    plotted = {what: flat_lines[what] for what in (*GOALS, LAST_OF_ALL)}
    report.plot("lookup", Plot("Look-ups on one connection", "frames", "requests/s", plotted))


def appends(report: Report, clients: dict[int, Client]) -> None:
    """Last of all, since it makes the stores grow."""
    data = request("POST", "/append/many.t0001", CONTENT)
    rates: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(ROUNDS):
        for size in SIZES:
            rates[size].append(rate_of_one(clients[size], data, APPENDING))
    for size in SIZES:
        report.add(
            f"POST /append/:topic; {size:,}",
            statistics.median(rates[size]),
            "appends/s",
            *flat(rates[size], rates[SIZES[0]], size),
        )
    line = [(size, statistics.median(rates[size])) for size in SIZES]
    title = "Durable appends of one client"
    report.plot("growth", Plot(title, "frames in the store", "appends/s", {"a dotted topic": line}))


def flat(found: list[float], smallest: list[float], size: int) -> list[Goal]:
    if size == SIZES[0]:
        return []
    return [at_least(round(median_ratio(found, smallest), 2), FLAT, f"of {SIZES[0]:,}")]


def median_ratio(found: list[float], floor: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(found, floor))


if __name__ == "__main__":
    main()
