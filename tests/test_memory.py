"""No memory is left: a request is refused in one sentence, or its connection is closed.

The limit on a server's address space is lowered while it runs and raised again, so that what it
asks the system for fails for real: stacks of threads, blocks of bytes, SQLite's pages.
"""

from __future__ import annotations

import _thread
import collections
import contextlib
import json
import os
import random
import resource
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional

import pytest
from conftest import DEADLINE, XS, Peer, Server, environment, until
from stores import all_ids, in_one_batch

import xs
from xs import fault, frame, threads
from xs.commit import Append
from xs.content import small
from xs.errors import XsError
from xs.store import Store
from xs.work import AppendWork, Work

MEGABYTE = 1 << 20
SILENCE = 10.0  # s without a word: then the other end is taken to have forgotten who waits
SILENT = 2  # of them in a run that has hundreds: that it is rare is all that can be promised


@pytest.fixture
def server(server: Server) -> Server:
    """One that is all up: it answers before that, and what it still does takes memory too."""
    assert server.process.stdout is not None
    assert server.process.stdout.readline().startswith(b"serving")
    return server


def size_of(pid: int, what: str = "VmSize") -> int:
    """A process's address space, or what else it has of memory, in bytes."""
    words = Path(f"/proc/{pid}/status").read_text().split()
    return int(words[words.index(f"{what}:") + 1]) * 1024


@contextlib.contextmanager
def little_room(server: Server, room: int) -> Iterator[None]:
    """A block in which the server's address space can grow by so many bytes, and no more."""
    pid = server.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (size_of(pid) + room, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, limits)


class Client(Peer):
    """A connection on which requests are made one by one, as far as it goes."""

    def __init__(self, server: Server) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(SILENCE)
        sock.connect(os.path.join(server.directory, "sock"))
        super().__init__(sock)

    def ask(self, target: str, body: bytes, *fields: str) -> tuple[int, bytes]:
        """Status and body of the answer; (0, b"") if the connection ends before that is whole.

        Raises `socket.timeout`.
        """
        lines = [f"POST {target} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        # What has been answered can still be read.
        with contextlib.suppress(ConnectionError):
            self.send("\r\n".join([*lines, *fields, "", ""]).encode() + body)
        with contextlib.suppress(ConnectionError, EOFError):
            head = self.head()
            if head:
                return int(head[9:12]), self.body(head)
        return 0, b""


class Load:
    """Clients that append on connections of their own, old ones and new ones, until `stop`."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards the next four
        self.answered: dict[str, bytes] = {}  # each content that was appended, by its frame's id
        self.refusals: collections.Counter[bytes] = collections.Counter()
        self.failures: list[BaseException] = []
        self.silent = 0
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {n}"), n), daemon=True)
            for n in range(6)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, chance: random.Random, name: int) -> None:
        try:
            client: Optional[Client] = None
            number = 0
            while not self._stopping.wait(0.01):
                number += 1
                goes_on = False
                try:
                    client = client or Client(self._server)
                    goes_on = self._act(client, chance, b"%d %d" % (name, number))
                except socket.timeout:
                    with self._lock:
                        self.silent += 1
                if client is not None and (number % 20 == 0 or not goes_on):
                    client.sock.close()
                    client = None
            if client is not None:
                client.sock.close()
        except BaseException as error:
            self.failures.append(error)

    def _act(self, client: Client, chance: random.Random, data: bytes) -> bool:
        """One request; whether the connection goes on."""
        kind = chance.choice(["small", "meta", "large", "lines", "atomic"])
        large = kind in ("large", "atomic")
        data += b" " + b"x" * (
            chance.choice([20_000, 20_000, 20_000, 3_000_000]) if kind == "large" else 0
        )
        if kind in ("lines", "atomic"):
            line = {"topic": "a", "meta": "y" * chance.choice([10, 100_000])}
            lines = [{**line, "content": f"{data.decode()}{n}"} for n in range(30)]
            body = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
            query = "?atomic" if kind == "atomic" else ""
            status, told = client.ask(f"/append{query}", body, "Content-Type: application/x-ndjson")
        else:
            meta = json.dumps("z" * (800_000 if kind == "meta" else 10))
            status, told = client.ask("/append/a", data, f"xs-meta: {meta}")
        with self._lock:
            if status == 200 and kind in ("small", "meta", "large"):
                self.answered[json.loads(told)["id"]] = data
            elif status not in (0, 200):
                assert status in (503, 507), (status, told[:200])
                assert told.count(b"\n") <= 1, told[:200]
                self.refusals[told[:200]] += 1
            elif status == 0:
                self.refusals[b"closed"] += 1
        return status == 200 or (status != 0 and not large)

    def pause(self, seconds: float) -> None:
        """Lets so much time pass, unless one of them fails."""
        ended = time.monotonic() + seconds
        until(lambda: time.monotonic() > ended or bool(self.failures))

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(SILENCE + DEADLINE)
        assert not self.failures, self.failures
        assert not any(thread.is_alive() for thread in self._threads)


class Follower:
    """Follows topic `a` from the start; when it is cut off, from where it was."""

    def __init__(self, server: Server) -> None:
        self._directory = server.directory
        self.seen: list[str] = []
        self.silent = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            after = self.seen[-1] if self.seen else None
            try:
                # With a pulse, so that it knows when nothing comes any more.
                client = xs.open(self._directory, timeout=SILENCE)
                for each in client.cat(follow=500, topic="a", after=after):
                    if each.topic == "a":
                        self.seen.append(each.id)
                        if each.meta == "the last":
                            return
            except (XsError, OSError) as error:
                self.silent += f"within {SILENCE:g} s" in str(error)
            time.sleep(0.05)

    def join(self) -> None:
        self._thread.join(SILENCE + DEADLINE)
        assert not self._thread.is_alive()


@pytest.mark.parametrize("megabytes", [1, 40])
def test_where_no_memory_is_left_requests_are_refused_and_the_server_goes_on(
    server: Server, megabytes: int
) -> None:
    client = xs.open(server.directory)
    client.append("expired", b"x", ttl="time:1")
    follower = Follower(server)
    load = Load(server, megabytes)
    try:
        for _ in range(3):
            with little_room(server, megabytes * MEGABYTE):
                load.pause(1.0)
            before = len(load.answered)
            until(lambda n=before: len(load.answered) > n or has_ended(server))
            assert not has_ended(server), server.process.communicate()[1][-2000:]
    finally:
        load.stop()
    if megabytes <= 1:
        assert load.refusals  # else there was memory
    # Every thread that matters is there: those that accept, commit, deliver and sweep.
    client.append("expired", b"x", ttl="time:200")
    client.append("a", b"x", meta="the last")
    follower.join()
    assert load.silent + follower.silent <= SILENT
    assert follower.seen == [each.id for each in client.cat(topic="a")]
    until(lambda: not rows_of(server, "expired"))
    server.process.kill()
    server.process.communicate()
    stored = {each.id: each.content for each in xs.open(server.directory).cat(with_content=True)}
    for id_text, data in load.answered.items():
        assert stored[id_text] == data.decode()
    done = subprocess.run(
        [*XS, "check", server.directory],
        capture_output=True, env=environment(), timeout=3 * DEADLINE,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1])["problems"] == 0, done.stdout


def test_a_content_of_which_memory_has_no_room_for_all_is_given_in_parts(server: Server) -> None:
    plain, wants, writer = Client(server), Client(server), Client(server)
    plain.send(b"GET /?follow&new&topic=a HTTP/1.1\r\nHost: localhost\r\n\r\n")
    wants.send(b"GET /?follow&new&with-content HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert plain.head() and wants.head()
    assert writer.ask("/append/a", b"x") == (200, plain.chunk())
    assert wants.chunk()
    with little_room(server, 20 * MEGABYTE):  # as JSON it has 48
        assert writer.ask("/append/large", b"\1" * 8_000_000)[0] == 200
        assert writer.ask("/append/a", b"x") == (200, plain.chunk())
        data = b""
        while not data.endswith(b"}\n"):
            data += wants.chunk()
        assert json.loads(data)["content"] == "\1" * 8_000_000
    assert writer.ask("/append/a", b"x") == (200, plain.chunk())
    for client in (plain, wants, writer):
        client.sock.close()


@pytest.mark.parametrize("target", ["/?with-content", "/?with-content&follow", "/ID?with-content"])
def test_who_stalls_amid_a_large_content_costs_little(server: Server, target: str) -> None:
    with xs.open(server.directory) as store:
        made = store.append("large", b"\1" * 8_000_000)  # as JSON it has 48 MB
    head = f"GET {target.replace('ID', made.id)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    before = size_of(server.process.pid, "VmRSS")
    clients = [Client(server) for _ in range(20)]
    for client in clients:
        client.send(head)
    for client in clients:
        assert client.sock.recv(4096).startswith(b"HTTP/1.1 200 OK")
    assert size_of(server.process.pid, "VmRSS") - before < 100 * MEGABYTE
    for client in clients:
        client.sock.close()


def has_ended(server: Server) -> bool:
    return server.process.poll() is not None


def rows_of(server: Server, topic: str) -> int:
    """How many frames of a topic lie in the index, expired or not."""
    path = os.path.join(server.directory, "xs.db")
    with contextlib.closing(sqlite3.connect(path)) as index:
        query = "SELECT count(*) FROM frame JOIN topic ON topic = number WHERE name = ?"
        return int(index.execute(query, (topic,)).fetchone()[0])


@pytest.mark.parametrize("megabytes", [24, 32, 40, 48])
def test_a_server_that_finds_too_little_memory_to_start_says_so_in_one_line(
    store_dir: str, megabytes: int
) -> None:
    """There may be enough: how much it takes is for the interpreter and its libraries to say."""
    server = subprocess.Popen(
        [*XS, "serve", store_dir],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes * MEGABYTE,) * 2),
    )  # fmt: skip
    assert server.stdout is not None and server.stderr is not None
    if server.stdout.readline():
        server.terminate()
        assert server.wait(DEADLINE) == 0
    else:
        assert server.wait(DEADLINE) in (1, 3, 4, 5)
        said = server.stderr.read().decode()
        assert said.count("\n") == 1 and said.startswith("xs: "), said
    server.communicate()


def test_a_thread_that_never_comes_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """So does one that finds no memory for its first step: CPython says nothing of it."""
    monkeypatch.setattr(_thread, "start_new_thread", lambda act, args: 1)
    thread = threads.Thread(lambda: None, "a thread")
    with pytest.raises(RuntimeError, match="can't start new thread"):
        thread.start()
    assert thread.join(DEADLINE)


def test_what_has_to_go_on_does_where_even_a_call_finds_no_memory(tmp_path: Path) -> None:
    """A step that is called again goes on, and whoever waits for a commit is told of it."""
    took: list[int] = []

    def step() -> bool:
        took.append(len(took))
        if len(took) in (1, 3):
            raise MemoryError
        return len(took) > 4

    thread = threads.Thread(lambda: threads.keep_on(step), "a thread", insists=True)
    thread.start()
    assert thread.join(DEADLINE)
    assert took == [0, 1, 2, 3, 4]
    once = threads.Thread(step, "a thread", insists=True)  # not even its first step
    took.clear()
    once.start()
    assert once.join(DEADLINE)
    assert took == [0, 1]

    told: list[bool] = []

    def done(work: Work) -> None:
        told.append(work.finished)
        if len(told) < 3:
            raise MemoryError

    store = Store(str(tmp_path / "store"), exclusive=True, create=True)
    store.submit(AppendWork(Append("a"), done))
    assert told == [True, True, True]
    store.refuse_more(Append("xs.stop"))
    store.close()


@pytest.mark.parametrize("point", ["commit.begun", "commit.durable", "commit.before-answers"])
@pytest.mark.parametrize("count", [1, 3])
def test_what_was_durable_by_the_time_that_memory_was_short_is_answered_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, count: int
) -> None:
    """Memory is short at one step of a commit: each append is there, or was refused, not both."""
    store = Store(str(tmp_path / "store"), exclusive=True, create=True)
    points = [point]

    def at(name: str) -> None:
        if name in points:
            points.clear()
            raise MemoryError

    monkeypatch.setattr(fault, "at", at)
    answered: list[Work] = []
    store.submit_all([AppendWork(Append("a"), answered.append) for _ in range(count)])
    store.close()
    told = [work.result for work in answered if work.error is None]
    assert len(answered) == count and all(work.finished for work in answered)
    reopened = Store(str(tmp_path / "store"))
    assert told == reopened.index.walk(None).page(-1, None, 10, 0)[0].splitlines()
    reopened.close()
    if point != "commit.begun":
        assert len(told) == count


def test_a_thread_that_comes_up_too_late_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Callable[[], None]] = []
    did: list[str] = []
    monkeypatch.setattr(_thread, "start_new_thread", lambda act, args: late.append(act))
    with pytest.raises(RuntimeError):
        threads.Thread(lambda: did.append("it"), "a thread").start()
    late[0]()
    assert did == []


def test_without_room_for_another_thread_who_commits_goes_on_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(act: object, args: object) -> int:
        raise RuntimeError("can't start new thread")

    store = Store(str(tmp_path / "store"), exclusive=True, create=True)
    answered: list[str] = []
    barrier = threading.Barrier(8)

    def write() -> None:
        barrier.wait(DEADLINE)
        for _ in range(25):
            answered.append(frame.id_of(store.append(Append("a", small(b"x")))))

    writers = [threading.Thread(target=write, daemon=True) for _ in range(8)]
    for writer in writers:
        writer.start()
    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    works = in_one_batch(store, [AppendWork(Append("b")) for _ in range(20)])
    assert all(isinstance(each, bytes) for each in works)
    for writer in writers:
        writer.join(DEADLINE)
    assert len(answered) == 200
    monkeypatch.undo()
    assert sorted(answered) == [each for each in all_ids(store) if each in set(answered)]
    store.refuse_more(Append("xs.stop"))
    store.close()
