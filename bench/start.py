"""How long do whole commands take, and a server's start?

Floor: the interpreter of the same environment that does nothing (`.venv/bin/python -c pass`).
Commands are started by tools/xs, as a user of a clone starts them: its shell is part of the time,
and it starts Python without site.py, which the floor imports.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

from _measure import (
    CONTENT,
    ENVIRON,
    PYTHON,
    XS,
    Report,
    Server,
    alternate,
    at_most,
    folder,
    pick,
    populate,
    server,
)

STARTS = pick(11, 6)  # in a round
ROUNDS = pick(7, 2)
FRAMES = pick(1_000_000, 200_000)
COMMAND, SERVER = 8.0, 120.0  # ms above the floor: the goals


def run(program: str, *words: str, stdin: int) -> None:
    """One process, from its start to its end, with nothing of our own in between."""
    pid = os.posix_spawn(
        program,
        [program, *words],
        ENVIRON,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, stdin, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        ],
    )
    status = os.waitpid(pid, 0)[1]
    if status:
        raise SystemExit(f"{program} {' '.join(words)} ended with wait status {status}")


def milliseconds(act: Callable[[], None]) -> float:
    """The median of some starts."""
    found = []
    for _ in range(STARTS):
        started = time.perf_counter()
        act()
        found.append((time.perf_counter() - started) * 1e3)
    return statistics.median(found)


def bare() -> float:
    """Milliseconds that the interpreter takes to do nothing."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    spent = milliseconds(lambda: run(PYTHON, "-c", "pass", stdin=nothing))
    os.close(nothing)
    return spent


def commands(report: Report, path: str, where: str) -> None:
    content = os.path.join(os.path.dirname(path), "content")
    with open(content, "wb") as file:
        file.write(CONTENT)
    nothing = os.open(os.devnull, os.O_RDONLY)

    def append() -> None:
        stdin = os.open(content, os.O_RDONLY)
        run(XS, "append", path, "events", stdin=stdin)
        os.close(stdin)

    acts: dict[str, Callable[[], None]] = {
        "xs append": append,
        "xs cat --limit 1": lambda: run(XS, "cat", path, "--limit", "1", stdin=nothing),
        "xs last": lambda: run(XS, "last", path, stdin=nothing),
    }
    for name, act in acts.items():
        found = alternate(ROUNDS, lambda act=act: milliseconds(act), bare)
        report.add(
            f"{name}, {where}",
            found.subject,
            "ms",
            at_most(round(found.subject - found.floor, 1), COMMAND, "ms more"),
            floor=found.floor,
            floor_unit="ms, python -c pass",
            ratio=found.ratio,
        )
    os.close(nothing)


def start_and_stop(path: str) -> float:
    """Milliseconds from a server's start to its first answer."""
    running = Server(path)
    running.stop()
    return running.start_seconds * 1e3


def main() -> None:
    report = Report("start", "Whole processes, from start to end")
    with folder() as where:
        path = os.path.join(where, "store")
        populate(path, ["events"] * 1000)
        with server(path):
            commands(report, path, "with a server")
        commands(report, path, "on the files")
        large = os.path.join(where, "large")
        populate(large, (f"app.t{n % 1000}" for n in range(FRAMES)))
        found = alternate(pick(9, 5), lambda: start_and_stop(large), lambda: start_and_stop(path))
        report.add(
            f"xs serve to its first answer, {FRAMES:,} frames",
            found.subject,
            "ms",
            floor=found.floor,
            floor_unit="ms, with 1,000 frames",
            ratio=found.ratio,
        )
        found = alternate(pick(5, 3), lambda: start_and_stop(large), bare)
        report.add(
            f"xs serve to its first answer, {FRAMES:,} frames",
            found.subject,
            "ms",
            at_most(round(found.subject - found.floor, 1), SERVER, "ms more"),
            floor=found.floor,
            floor_unit="ms, python -c pass",
            ratio=found.ratio,
        )
    report.end()


if __name__ == "__main__":
    main()
