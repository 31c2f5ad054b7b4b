"""What the benchmarks share: servers, lean clients, floors, rounds, the table and its JSON.

A figure means little by itself on a machine that has other work to do. So each has a floor: the
least that any program would need for the same, measured in the same run, in rounds that alternate
with the subject's. What counts is the median of the rounds' ratios. Goals that are absolute are
marked so by their unit.

Clients here are as lean as Python allows: requests made beforehand, raw sockets, answers read up to
their end and thrown away. They run in the benchmark's own process, apart from the server's. Where
there are many, one selector serves them all: its loop takes some 10 µs a request.
"""

from __future__ import annotations

import json
import os
import platform
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional

from _plot import Plot

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are of this clone, whatever is installed

OUT = ROOT / "bench" / "out"
XS = str(ROOT / "tools" / "xs")
PYTHON = str(ROOT / ".venv" / "bin" / "python")

SHORT = "--short" in sys.argv[1:]
DEADLINE = 60.0  # seconds that a server may take for anything
CONTENT = b"0123456789" * 10  # an event of 100 bytes


def pick(full: Any, short: Any) -> Any:
    """What to use in a full run, and what with --short."""
    return short if SHORT else full


# Figures


class Goal(NamedTuple):
    text: str
    is_met: bool


def at_least(value: float, bound: float, unit: str = "×") -> Goal:
    return Goal(f"≥ {bound:,} {unit}", value >= bound)


def at_most(value: float, bound: float, unit: str = "×") -> Goal:
    return Goal(f"≤ {bound:,} {unit}", value <= bound)


WIDTHS = {"script": 8, "what": 44, "measured": 18, "floor": 34, "ratio": 6, "goal": 24, "": 5}


def line(*cells: str) -> None:
    """A table's line: the last columns of `WIDTHS`, as Markdown."""
    widths = list(WIDTHS.values())[-len(cells) :]
    fitted = [cell.ljust(width) for cell, width in zip(cells, widths)]
    print("| " + " | ".join(fitted) + " |", flush=True)


def rule(first: str) -> None:
    """The line below a table's head that begins with this column."""
    names = list(WIDTHS)
    columns = names[names.index(first) :]
    print("|" + "|".join("-" * (WIDTHS[name] + 2) for name in columns) + "|")


def row(entry: dict[str, Any]) -> list[str]:
    """The cells of one row of a report's JSON."""
    goals = [Goal(**goal) for goal in entry["goals"]]
    floor, ratio = entry["floor"], entry["ratio"]
    return [
        entry["what"],
        f"{_number(entry['value'])} {entry['unit']}",
        "" if floor is None else f"{_number(floor)} {entry['floor_unit'] or entry['unit']}",
        "" if ratio is None else f"{ratio:.2f}",
        ", ".join(goal.text for goal in goals),
        "" if not goals else "met" if all(goal.is_met for goal in goals) else "SHORT",
    ]


class Report:
    """A benchmark's table: printed row by row as Markdown, and written to bench/out/NAME.json."""

    def __init__(self, name: str, question: str) -> None:
        self._name = name
        self._rows: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._plots: dict[str, Plot] = {}
        self._started = time.monotonic()
        print(f"{question}\n")
        line("what", "measured", "floor", "ratio", "goal", "")
        rule("what")

    def add(
        self,
        what: str,
        value: float,
        unit: str,
        *goals: Goal,
        floor: Optional[float] = None,
        floor_unit: str = "",
        ratio: Optional[float] = None,
    ) -> None:
        """One figure. `floor_unit` says what the floor is; `ratio` is of the figure to it."""
        entry = {
            "what": what,
            "value": value,
            "unit": unit,
            "floor": floor,
            "floor_unit": floor_unit,
            "ratio": ratio,
            "goals": [goal._asdict() for goal in goals],
        }
        line(*row(entry))
        self._rows.append(entry)

    def note(self, text: str) -> None:
        """Something to be known of these figures, or why there is none."""
        print(f"\n{text}\n", flush=True)
        self._notes.append(text)

    def plot(self, name: str, plot: Plot) -> None:
        """To be drawn as docs/plots/NAME.svg, if this is a full run."""
        self._plots[name] = plot

    def end(self) -> None:
        """Writes the JSON."""
        seconds = time.monotonic() - self._started
        OUT.mkdir(exist_ok=True)
        found = {
            "name": self._name,
            "short": SHORT,
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 1),
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
            "rows": self._rows,
            "notes": self._notes,
            "plots": {name: plot._asdict() for name, plot in self._plots.items()},
        }
        text = json.dumps(found, ensure_ascii=False, indent=1)
        (OUT / f"{self._name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"\n{seconds:.0f} s\n", flush=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Rounds(NamedTuple):
    """Medians over the rounds."""

    subject: float
    floor: float
    ratio: float


def alternate(count: int, subject: Callable[[], float], floor: Callable[[], float]) -> Rounds:
    """Runs both in turn, each first in every other round."""
    subjects, floors = [], []
    for n in range(count):
        if n % 2:
            floors.append(floor())
            subjects.append(subject())
        else:
            subjects.append(subject())
            floors.append(floor())
    return Rounds(
        statistics.median(subjects),
        statistics.median(floors),
        statistics.median(s / f for s, f in zip(subjects, floors)),
    )


def percentile(values: Iterable[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def seconds(act: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


# Stores and servers


@contextmanager
def folder() -> Iterator[str]:
    """A temporary folder, where the stores and the floors' files lie: one disk for all."""
    path = tempfile.mkdtemp(prefix="xs-bench-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def populate(path: str, topics: Iterable[str], content: Optional[bytes] = CONTENT) -> list[str]:
    """Makes a store with a frame for each topic given, in this process; gives every 97th id."""
    from xs import frame
    from xs.bulk import BatchWork
    from xs.commit import Append
    from xs.content import small
    from xs.store import Store

    store = Store(path, exclusive=True, create=True)
    taken = None if content is None else small(content)
    found: list[str] = []
    count = 0
    batch: list[Any] = []

    def commit() -> None:
        nonlocal count
        for line in store.run(BatchWork(batch)):
            if count % 97 == 0:
                found.append(frame.id_of(line))
            count += 1
        batch.clear()

    for topic in topics:
        batch.append(Append(topic, taken))
        if len(batch) == 10_000:
            commit()
    commit()
    store.close()
    return found


class Server:
    """A running `xs serve`, started by tools/xs."""

    def __init__(self, path: str, *options: str) -> None:
        """Returns when the socket answers; `start_seconds` is how long that took."""
        self.path = path
        self.socket_path = os.path.join(path, "sock")
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [XS, "serve", path, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=ENVIRON,
        )
        while not self._answers():
            if self.process.poll() is not None:
                raise SystemExit(f"xs serve {path} ended with {self.process.returncode}")
            if time.perf_counter() - started > DEADLINE:
                self.process.kill()
                raise SystemExit(f"xs serve {path} does not answer")
            time.sleep(0.001)
        self.start_seconds = time.perf_counter() - started

    def _answers(self) -> bool:
        try:
            client = Client(self.socket_path)
        except OSError:
            return False
        client.ask(request("GET", "/version"))
        client.close()
        return True

    def memory(self) -> int:
        """Bytes that are resident."""
        return resident(self.process.pid)

    def peak_memory(self) -> int:
        """Bytes that were resident at most; 0 where the system doesn't say."""
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        return int(text.split("VmHWM:")[1].split()[0]) * 1024

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


ENVIRON = {  # without the user's own settings of xs, but for which Nushell it is
    name: value
    for name, value in os.environ.items()
    if not name.startswith("XS_") or name == "XS_NU"
}


@contextmanager
def server(path: str, *options: str) -> Iterator[Server]:
    running = Server(path, *options)
    try:
        yield running
    finally:
        running.stop()


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # not Linux
        found = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], stdout=subprocess.PIPE)
        return int(found.stdout) * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


# Clients


def request(method: str, target: str, body: bytes = b"", *fields: str) -> bytes:
    """A request's bytes."""
    length = [f"Content-Length: {len(body)}"] if method == "POST" else []
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *fields, *length, "", ""]
    return "\r\n".join(lines).encode() + body


class Client:
    """A keep-alive connection that waits for each answer."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self.sock.connect(path)
        except OSError:
            self.sock.close()
            raise

    def ask(self, data: bytes) -> bytes:
        """Sends a request and gives its whole answer, which has to be of status 200."""
        self.sock.sendall(data)
        answer = self.sock.recv(65536)
        while not is_whole(answer):
            more = self.sock.recv(65536)
            if not more:
                raise SystemExit(f"an answer broke off: {answer[:200]!r}")
            answer += more
        return answer

    def close(self) -> None:
        self.sock.close()


def is_whole(answer: bytes) -> bool:
    """Whether an answer with a Content-Length is there to its end."""
    if answer and not answer.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"not the answer that was expected: {answer[:200]!r}")
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    at = answer.find(b"ontent-length: ", 0, end)
    if at < 0:
        at = answer.find(b"ontent-Length: ", 0, end)
    return len(answer) >= end + 4 + int(answer[at + 15 : answer.index(b"\r", at)])


class Crowd:
    """Many keep-alive connections in one loop, each with one request under way."""

    def __init__(self, path: str, count: int) -> None:
        self._clients = [Client(path) for _ in range(count)]
        self._selector = selectors.DefaultSelector()
        for client in self._clients:
            self._selector.register(client.sock, selectors.EVENT_READ, client.sock)

    def rate(self, data: bytes, length: float, delays: Optional[list[float]] = None) -> float:
        """Answers a second to that request, over some seconds.

        `delays` is given how long each answer took, in ms.
        """
        select = self._selector.select
        clock = time.perf_counter
        sent: dict[socket.socket, float] = {}
        for client in self._clients:
            sent[client.sock] = clock()
            client.sock.send(data)
        waiting = len(self._clients)
        partial: dict[socket.socket, bytes] = {}
        answered = 0
        started = time.perf_counter()
        until = started + length
        ended = 0.0
        while waiting:
            for key, _ in select():
                sock: socket.socket = key.data
                data_in = sock.recv(65536)
                if not data_in:
                    raise EOFError("the server has closed a connection")
                answer = partial.pop(sock, b"") + data_in
                if not is_whole(answer):
                    partial[sock] = answer
                    continue
                answered += 1
                if delays is not None:
                    now = clock()
                    delays.append((now - sent[sock]) * 1e3)
                    sent[sock] = now
                if ended:
                    waiting -= 1
                else:
                    sock.send(data)
            if not ended and time.perf_counter() >= until:
                ended = time.perf_counter()
                answered_in_time = answered
        return answered_in_time / (ended - started)

    def close(self) -> None:
        self._selector.close()
        for client in self._clients:
            client.close()


def rate_of_one(client: Client, data: bytes, length: float) -> float:
    """Answers a second that one connection gets, over some seconds."""
    ask = client.ask
    count = 0
    started = time.perf_counter()
    until = started + length
    now = started
    while now < until:
        ask(data)
        count += 1
        now = time.perf_counter()
    return count / (now - started)


def discard(path: str, data: bytes) -> tuple[int, float]:
    """Sends a request, throws its answer away; its bytes, and seconds to its first byte.

    The request has to ask for the connection's end.
    """
    buffer = bytearray(1 << 20)
    client = Client(path)
    started = time.perf_counter()
    client.sock.sendall(data)
    total = client.sock.recv_into(buffer)
    first = time.perf_counter() - started
    if not bytes(buffer[:12]) == b"HTTP/1.1 200":
        raise SystemExit(f"not the answer that was expected: {bytes(buffer[:200])!r}")
    while True:
        size = client.sock.recv_into(buffer)
        if not size:
            break
        total += size
    client.close()
    return total, first


# The floor of writing


Row = tuple[int, str, bytes]


class Floor:
    """Bare SQLite: one table with what a frame can't do without."""

    def __init__(self, where: str, name: str = "floor.db") -> None:
        self._connection = sqlite3.connect(os.path.join(where, name), isolation_level=None)
        for setting in ("journal_mode = WAL", "synchronous = FULL", "fullfsync = ON"):
            self._connection.execute(f"PRAGMA {setting}").fetchall()
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS frame (row INTEGER PRIMARY KEY, json TEXT, content BLOB)"
        )
        self._next = int(
            self._connection.execute("SELECT coalesce(max(row), 0) FROM frame").fetchone()[0]
        )

    def rows(self, count: int, content: bytes = CONTENT) -> list[Row]:
        """Rows to be inserted, made beforehand."""
        first = self._next + 1
        self._next += count
        return [(first + n, json_line(first + n), content) for n in range(count)]

    def commit_rate(self, length: float) -> float:
        """Commits a second of one row each, over some seconds."""
        execute = self._connection.execute
        made = iter(self.rows(int(length * 40_000)))
        count = 0
        started = time.perf_counter()
        until = started + length
        now = started
        while now < until:
            execute("INSERT INTO frame VALUES (?, ?, ?)", next(made))  # its own transaction
            count += 1
            now = time.perf_counter()
        return count / (now - started)

    def insert(self, rows: list[Row], batch: int = 1000) -> None:
        """One transaction for each batch."""
        for start in range(0, len(rows), batch):
            self._connection.execute("BEGIN")
            self._connection.executemany(
                "INSERT INTO frame VALUES (?, ?, ?)", rows[start : start + batch]
            )
            self._connection.execute("COMMIT")

    def close(self) -> None:
        self._connection.close()


def json_line(number: int, topic: str = "events") -> str:
    """A frame's JSON, as long as a real one."""
    return (
        f'{{"topic":"{topic}","id":"{number:025d}",'
        '"hash":"sha256-2fVQbs8D+wkPqLOXc5L9wp4sXF7QS9nZ5dp5bw0jT3k=","meta":null,"ttl":"forever"}'
    )
