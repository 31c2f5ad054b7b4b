"""A mixed load on many stores for a long time: `tools/soak [SECONDS]` (see there).

One server with twenty stores beside its root, and four that come and go. All at once, on its
sockets: appends small and large, alone and in batches, followers that come and go, handlers,
generators, requests from the web, scripts run for a request, stores added and removed. Half of it
goes through the root's own socket.

What is looked at: that nothing is lost, doubled or out of order, that every answer is the right
one, that the server's log has nothing to tell, and that its memory, its open files and its threads
do not grow from the second third of the time to the last. At the end each store is checked.

The load fills each store's ring of recent frames first, which would else take minutes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600.0
STORES = 20
DEADLINE = 60.0  # seconds that anything may take, on a machine that has much else to do
SAMPLE_SECONDS = 0.25
RING_FRAMES = 9_500  # a little more than a ring holds (xs/bus.py)
KEPT = "last:200"  # of each topic: else the disk would fill, and caches with it

# What may come on top from the second third of the time to the last: measures swing a little.
MEMORY_GROWTH = 0.03
MEMORY_SWING = 8_000_000  # bytes
FILES_SWING = 40  # connections under way, and readers of the indexes, four a store at most
THREADS_SWING = 20


class Wrong(Exception):
    """The server has not done what it promises."""


# A client


class Connection:
    """A keep-alive connection to a Unix socket."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE)
        try:
            self.sock.connect(path)
        except OSError:
            self.sock.close()
            raise
        self._rest = b""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, method: str, target: str, body: bytes = b"", *fields: str) -> None:
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *fields]
        if method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def answer(self) -> tuple[int, bytes]:
        """Status and body of the next answer."""
        status, fields = self.head()
        if "content-length" in fields:
            return status, self._exactly(int(fields["content-length"]))
        if "chunked" in fields.get("transfer-encoding", ""):
            return status, b"".join(iter(self.chunk, b""))
        return status, b""

    def ask(self, method: str, target: str, body: bytes = b"", *fields: str) -> bytes:
        """The body of an answer that has to be a good one."""
        self.send(method, target, body, *fields)
        status, found = self.answer()
        if status not in (200, 204):
            raise Wrong(f"{method} {target}: {status} {found[:200]!r}")
        return found

    def head(self) -> tuple[int, dict[str, str]]:
        first, *lines = self._until(b"\r\n\r\n")[:-4].decode("latin-1").split("\r\n")
        pairs = [line.partition(": ") for line in lines]
        return int(first.split()[1]), {name.lower(): value for name, _, value in pairs}

    def chunk(self) -> bytes:
        data = self._exactly(int(self._until(b"\r\n"), 16))
        self._exactly(2)
        return data

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._rest:
            self._receive()
        found, mark, self._rest = self._rest.partition(mark)
        return found + mark

    def _exactly(self, size: int) -> bytes:
        while len(self._rest) < size:
            self._receive()
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    def _receive(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise Wrong(f"a connection ended after {self._rest[-100:]!r}")
        self._rest += data


class Store(NamedTuple):
    """A store, as a client may reach it."""

    name: str
    path: str
    root: str

    def open(self, chance: random.Random) -> tuple[Connection, str]:
        """A connection, and what its targets begin with: its own socket, or the root's."""
        if chance.random() < 0.5:
            return Connection(os.path.join(self.root, "sock")), f"/store/{self.name}"
        return Connection(os.path.join(self.path, "sock")), ""

    @property
    def web(self) -> str:
        return self.path + ".web"


def script(text: str) -> bytes:
    return f"#!/bin/sh\n{text}\n".encode()


def handlers(name: str) -> list[tuple[str, dict[str, Any], bytes]]:
    """What runs in each store: topics, their meta and the scripts."""
    seen = f'{{"out":{{"content":"seen","ttl":"{KEPT}"}}}}'
    meta = r'{"frame_id":"\1"}'
    answer = f'{{"topic":"http.response","content":"{name}","ttl":"{KEPT}","meta":{meta}}}'
    find = r's/.*"id": *"\([^"]*\)".*'
    return [
        ("echo.register", {"topic": "in"}, script(f"exec sed -u 's/.*/{seen}/'")),
        (
            "web.register",
            {"topic": "http.request"},
            script(f"exec sed -u '{find}/{{\"append\":[{answer}]}}/'"),
        ),
        ("tick.spawn", {}, script("while sleep 1; do echo tick; done")),
    ]


# The server


class Server:
    def __init__(self, folder: str, program: Sequence[str] = ("-m", "xs")) -> None:
        """`program`: what the interpreter is to run, to which the command's words are given."""
        self.root = os.path.join(folder, "root")
        self.log = open(os.path.join(folder, "log"), "w+b")  # noqa: SIM115
        environ = {k: v for k, v in os.environ.items() if not k.startswith("XS_")}
        options = ["--http", self.root + ".web", "--http-ttl", KEPT]
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", self.root, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.log,
            env={**environ, "PYTHONPATH": str(ROOT)},
        )
        deadline = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(OSError), self.connect() as connection:
                connection.ask("GET", "/version")
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Wrong("the server does not come up")
            time.sleep(0.01)

    def connect(self) -> Connection:
        return Connection(os.path.join(self.root, "sock"))

    def order(self, what: str, store: Store) -> None:
        """Has a store added or removed, and waits for the answer."""
        asked = {"path": store.path, "name": store.name}
        meta = json.dumps({**asked, "http": store.web} if what == "add" else asked)
        with self.connect() as connection:
            line = connection.ask("POST", f"/append/xs.store.{what}", b"", f"xs-meta: {meta}")
            source = json.loads(line)["id"]
            connection.send("GET", f"/?follow&after={source}&topic=xs.store.*")
            connection.head()
            while True:
                for line in connection.chunk().splitlines():
                    frame = json.loads(line)
                    if (frame["meta"] or {}).get("source_id") != source:
                        continue
                    if frame["topic"] == "xs.store.error":
                        raise Wrong(f"{what} {store.path}: {frame['meta']['reason']}")
                    return

    def sample(self) -> Sample:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in text.splitlines())
        return Sample(
            int(fields["VmRSS"].split()[0]) * 1024,
            len(os.listdir(f"/proc/{self.process.pid}/fd")),
            int(fields["Threads"]),
        )

    def stop(self) -> float:
        """Ends it in good order; how long that took, in seconds."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Wrong("the server does not stop") from None
        return time.monotonic() - started

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode("utf-8", "replace")


class Sample(NamedTuple):
    memory: int  # bytes that are resident
    files: int
    threads: int


# The load


class Load:
    """Threads that each do one kind of thing, again and again, until `stop`."""

    def __init__(self, server: Server, stores: list[Store], seed: int) -> None:
        self._server = server
        self._stores = stores
        self._seed = seed
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards the next
        self.counts: dict[str, int] = {}
        self.failure: Optional[str] = None

    def start(self) -> None:
        root = self._server.root
        for n in range(3):
            self._begin("appends", n, self._append)
        self._begin("batches", 0, self._batch)
        for n in range(3):
            self._begin("followers", n, self._follow)
        for n in range(2):
            self._begin("handled", n, self._handle)
        for n in range(2):
            self._begin("from the web", n, self._web)
        self._begin("scripts", 0, self._evaluate)
        for n in range(2):
            names = [f"coming{2 * n + k}" for k in range(2)]
            come = [Store(name, f"{root}.{name}", root) for name in names]
            self._begin("added and removed", n, functools.partial(self._come, come))
        for n in range(4):
            self._begin("in order", n, self._sequence(self._stores[n::4]))

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(2 * DEADLINE)
            if thread.is_alive():
                self._fail(f"{thread.name}: hangs")

    def _begin(self, kind: str, number: int, act: Callable[[random.Random], None]) -> None:
        chance = random.Random(f"{self._seed} {kind} {number}")

        def run() -> None:
            while not self._stopping.is_set():
                try:
                    act(chance)
                except (Wrong, OSError, ValueError, KeyError) as error:
                    self._fail(f"{kind}: {type(error).__name__}: {error}")
                    return
                with self._lock:
                    self.counts[kind] = self.counts.get(kind, 0) + 1

        thread = threading.Thread(target=run, name=kind, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _fail(self, what: str) -> None:
        with self._lock:
            self.failure = self.failure or what
        self._stopping.set()

    @property
    def has_failed(self) -> bool:
        return self.failure is not None

    def _append(self, chance: random.Random) -> None:
        connection, via = chance.choice(self._stores).open(chance)
        with connection:
            for _ in range(chance.randrange(1, 30)):
                size = chance.choice([0, 10, 100, 1000, 1000, 40_000])
                topic = chance.choice(["load", "load.a", "load.b.c"])
                meta = json.dumps({"size": size})
                target = f"{via}/append/{topic}?ttl={KEPT}"
                connection.send("POST", target, os.urandom(size), f"xs-meta: {meta}")
                status, line = connection.answer()
                if status != 200 or json.loads(line)["meta"] != {"size": size}:
                    raise Wrong(f"an append was answered {status}: {line!r}")

    def _batch(self, chance: random.Random) -> None:
        connection, via = chance.choice(self._stores).open(chance)
        count = chance.randrange(1, 300)
        with connection:
            found = connection.ask(
                "POST", f"{via}/append", batch("load.batch", count, KEPT), "Content-Type: " + NDJSON
            )
        if json.loads(found)["appended"] != count:
            raise Wrong(f"of {count} lines: {found!r}")
        time.sleep(0.1)

    def _follow(self, chance: random.Random) -> None:
        """A follower for a while, that leaves without a word, or at its limit."""
        connection, via = chance.choice(self._stores).open(chance)
        limit = chance.choice(["", "&limit=20"])
        with connection:
            start = chance.choice(["new", "last=50", "topic=load.*&last=10"])
            connection.send("GET", f"{via}/?follow=100&{start}{limit}")
            connection.head()
            until = time.monotonic() + chance.random() * 2
            newest = ""
            while time.monotonic() < until:
                block = connection.chunk()
                if not block:
                    return
                for line in block.splitlines():
                    frame = json.loads(line)
                    if frame["topic"] in ("xs.pulse", "xs.threshold"):
                        continue
                    if frame["id"] <= newest:
                        raise Wrong(f"{frame['id']} came after {newest}")
                    newest = frame["id"]

    def _handle(self, chance: random.Random) -> None:
        """A frame for a handler, whose output has to come, and once."""
        connection, via = chance.choice(self._stores).open(chance)
        with connection:
            line = connection.ask("POST", f"{via}/append/in?ttl={KEPT}")
            source = json.loads(line)["id"]
            connection.send("GET", f"{via}/?follow&after={source}&topic=echo")
            connection.head()
            while True:
                for each in connection.chunk().splitlines():
                    if (json.loads(each)["meta"] or {}).get("frame_id") == source:
                        return

    def _web(self, chance: random.Random) -> None:
        store = chance.choice(self._stores)
        with Connection(store.web) as connection:
            for _ in range(chance.randrange(1, 10)):
                body = os.urandom(chance.choice([0, 100, 20_000]))
                found = connection.ask("POST", f"/page?n={chance.random()}", body)
                if found != store.name.encode():
                    raise Wrong(f"{store.name} has answered {found!r}")

    def _evaluate(self, chance: random.Random) -> None:
        store = chance.choice(self._stores)
        connection, via = store.open(chance)
        with connection:
            found = connection.ask("POST", f"{via}/eval", script("echo $XS_ADDR"))
        if found.decode() != f"{store.path}\n":
            raise Wrong(f"a script in {store.path} has said {found!r}")
        time.sleep(0.3)

    def _come(self, stores: list[Store], chance: random.Random) -> None:
        """A store comes, is used and goes; half of the time its files go, too."""
        store = chance.choice(stores)
        self._server.order("add", store)
        connection, via = store.open(chance)
        follower, its_via = store.open(chance)
        with connection, follower:
            follower.send("GET", f"{its_via}/?follow&new")
            follower.head()
            append_scripts(connection, via, store.name)
            for _ in range(10):
                connection.ask("POST", f"{via}/append/load?ttl={KEPT}", b"x" * 100)
            self._server.order("remove", store)
            told = b"".join(iter(follower.chunk, b""))  # to its end
        topics = [json.loads(line)["topic"] for line in told.splitlines()]
        if topics.count("load") != 10 or topics[-1] != "xs.stop":
            raise Wrong(f"a follower of a store that was removed got {topics}")
        if os.path.exists(os.path.join(store.path, "sock")) or os.path.exists(store.web):
            raise Wrong(f"{store.path} was removed, and its sockets are there")
        if chance.random() < 0.5:
            shutil.rmtree(store.path)

    def _sequence(self, stores: list[Store]) -> Callable[[random.Random], None]:
        """Numbers that are appended to some stores, each of which one follower has to be given."""
        numbers = dict.fromkeys(stores, 0)
        followers: dict[Store, Connection] = {}
        writers: dict[Store, tuple[Connection, str]] = {}

        def act(chance: random.Random) -> None:
            for store in stores:
                if store not in followers:
                    follower, via = store.open(chance)
                    follower.send("GET", f"{via}/?follow&new&topic=number")
                    follower.head()
                    followers[store] = follower
                    writers[store] = store.open(chance)
                writer, via = writers[store]
                for n in range(numbers[store], numbers[store] + 5):
                    target = f"{via}/append/number?ttl={KEPT}"
                    writer.send("POST", target, b"", f"xs-meta: {n}")
            for store in stores:
                sent = [json.loads(writers[store][0].answer()[1])["meta"] for _ in range(5)]
                got: list[int] = []
                while len(got) < 5:
                    got += [json.loads(x)["meta"] for x in followers[store].chunk().splitlines()]
                expected = list(range(numbers[store], numbers[store] + 5))
                if sent != expected or got != expected:
                    raise Wrong(f"{store.name}: {expected} became {sent} and {got}")
                numbers[store] += 5

        return act


NDJSON = "application/x-ndjson"


def batch(topic: str, count: int, ttl: str) -> bytes:
    line = json.dumps({"topic": topic, "meta": {"n": "m" * 100}, "ttl": ttl, "content": "x" * 50})
    return (line + "\n").encode() * count


def append_scripts(connection: Connection, via: str, name: str) -> None:
    for topic, meta, text in handlers(name):
        connection.ask("POST", f"{via}/append/{topic}", text, f"xs-meta: {json.dumps(meta)}")


# The whole


def prepare(server: Server) -> list[Store]:
    """Adds the stores, fills their rings, and starts their scripts."""
    stores = []
    for n in range(STORES):
        store = Store(f"s{n}", f"{server.root}.s{n}", server.root)
        server.order("add", store)
        stores.append(store)
    with server.connect() as connection:
        for via, name in [("", ""), *((f"/store/{store.name}", store.name) for store in stores)]:
            body = batch("load.fill", RING_FRAMES, "forever")
            connection.ask("POST", f"{via}/append", body, "Content-Type: " + NDJSON)
            if name:
                append_scripts(connection, via, name)
    return stores


def soak(length: float, seed: int) -> Iterator[str]:
    """Runs the load; gives what there is to tell, line by line. Raises `Wrong`."""
    folder = tempfile.mkdtemp(prefix="xs-soak-")
    server = Server(folder)
    try:
        stores = prepare(server)
        load = Load(server, stores, seed)
        load.start()
        yield f"{STORES} stores, seed {seed}"
        samples: list[Sample] = []
        started = time.monotonic()
        shown = started
        while time.monotonic() - started < length and not load.has_failed:
            time.sleep(SAMPLE_SECONDS)
            samples.append(server.sample())
            if time.monotonic() - shown >= 30:
                shown = time.monotonic()
                yield f"{shown - started:5.0f} s: {_shown(samples[-1])}"
        load.stop()
        if load.failure:
            status = server.process.poll()
            state = "runs" if status is None else f"has ended with {status}"
            raise Wrong(f"{load.failure}; the server {state}; its log: {server.said()[-2000:]!r}")
        yield "done: " + ", ".join(f"{n} {kind}" for kind, n in sorted(load.counts.items()))
        yield from judge(samples)
        yield f"stopped in {server.stop():.1f} s"
        if server.said():
            raise Wrong(f"the log has: {server.said()[:2000]}")
        for store in (server.root, *(store.path for store in stores)):
            check(store)
        yield "checked: each store is whole"
    finally:
        server.process.kill()
        server.process.wait()
        server.log.close()
        shutil.rmtree(folder, ignore_errors=True)


def judge(samples: list[Sample]) -> Iterator[str]:
    """Compares the last third of the time with the one before it. Raises `Wrong`."""
    third = len(samples) // 3
    middle, last = most(samples[third : 2 * third]), most(samples[2 * third :])
    yield f"second third, the most: {_shown(middle)}"
    yield f"last third, the most:   {_shown(last)}"
    if last.memory > middle.memory * (1 + MEMORY_GROWTH) + MEMORY_SWING:
        raise Wrong("memory grows")
    if last.files > middle.files + FILES_SWING:
        raise Wrong("open files grow")
    if last.threads > middle.threads + THREADS_SWING:
        raise Wrong("threads grow")


def most(samples: list[Sample]) -> Sample:
    return Sample(*(max(values) for values in zip(*samples)))


def _shown(sample: Sample) -> str:
    memory = sample.memory / 1e6
    return f"{memory:.1f} MB, {sample.files} files, {sample.threads} threads"


def check(path: str) -> None:
    """Reads all of a store. Raises `Wrong` if anything is wrong with it."""
    done = subprocess.run(
        [sys.executable, "-m", "xs", "check", path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    if done.returncode:
        raise Wrong(f"xs check {path}: {(done.stdout + done.stderr).decode()}")


def told(lines: Iterable[str]) -> int:
    """Prints what a run says as it goes; the exit status."""
    try:
        for line in lines:
            print(line, flush=True)
    except Wrong as error:
        print(f"WRONG: {error}", flush=True)
        return 1
    return 0


def main() -> int:
    length = float(sys.argv[1]) if sys.argv[1:] else SECONDS
    seed = int(sys.argv[2]) if sys.argv[2:] else int.from_bytes(os.urandom(3), "big")
    return told(soak(length, seed))


if __name__ == "__main__":
    sys.exit(main())
