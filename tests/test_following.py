"""Following: each stored frame once, in order, however slow the reader is and whatever goes on."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import re
import resource
import selectors
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import DEADLINE, XS, Server, environment, start_server
from stores import (
    NOON,
    add,
    add_all,
    import_all,
    imported,
    remove,
)

import xs
from xs import frame, ids, query
from xs.bus import RING_FRAMES
from xs.client import Client
from xs.commit import Append
from xs.errors import BrokenBody, Unavailable, XsError
from xs.frame import Frame
from xs.reader import COMMIT_MS, Reader
from xs.server import Running
from xs.store import Store

ID = re.compile(rb'"topic":"([^"]+)","id":"([0-9a-z]{25})"')


class Follower:
    """A raw connection that follows, and reads only when it is told to."""

    def __init__(self, store_dir: str, query: str = "follow", path: str = "/") -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE * 2)
        self.sock.connect(os.path.join(store_dir, "sock"))
        self.sock.sendall(f"GET {path}?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        self.data = b""
        while b"\r\n\r\n" not in self.data:
            self.data += self.sock.recv(1)
        assert self.data.startswith(b"HTTP/1.1 200"), self.data
        self.data = b""

    def seen(self) -> list[tuple[str, str]]:
        """Topic and id of each frame that was read so far."""
        return [(topic.decode(), each.decode()) for topic, each in ID.findall(self.data)]

    def read_until(self, last: str) -> list[tuple[str, str]]:
        """Reads until the frame with that id has come."""
        while last.encode() not in self.data[-3_000_000:]:
            block = self.sock.recv(1 << 20)
            assert block, f"ended: {self.data[-200:]!r}"
            self.data += block
        return self.seen()

    def read_to_end(self) -> list[tuple[str, str]]:
        while not self.data.endswith(b"0\r\n\r\n"):
            block = self.sock.recv(1 << 20)
            assert block, f"broke off: {self.data[-200:]!r}"
            self.data += block
        return self.seen()

    def close(self) -> None:
        self.sock.close()


def topics(seen: list[tuple[str, str]]) -> list[str]:
    return [topic for topic, _ in seen]


def resident(process: int) -> int:
    """Bytes of memory that a process has."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def append_lines(client: Client, topic: str, count: int) -> list[str]:
    """Appends so many frames, and gives their ids."""
    line = b'{"topic":"' + topic.encode() + b'","content":"%d"}\n'
    body = b"".join([line % n for n in range(count)])
    fields = [("content-type", "application/x-ndjson")]
    answer = client._transport.request("POST", "/append?each", fields, body).read()
    return [frame.id_of(line) for line in answer.splitlines()]


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with xs.open(server.directory) as opened:
        yield opened


# Over the real socket


def test_a_slow_one_gets_all_that_came_before_until(server: Server, client: Client) -> None:
    bound = ids.milliseconds(ids.parse(client.append("first").id)) + 1000
    follower = Follower(server.directory, f"follow&until={ids.text(ids.last_of(bound))}")
    made = append_lines(client, "a", 30_000)
    clock = 0
    while clock <= bound + COMMIT_MS:
        clock = ids.milliseconds(ids.parse(client.append("b").id))
    made = [each for each in made if ids.milliseconds(ids.parse(each)) <= bound]
    assert len(made) > 5000
    seen = follower.read_to_end()
    assert [each for topic, each in seen if topic == "a"] == made
    follower.close()


def test_one_that_stops_reading_gets_all_of_a_hundred_thousand_frames_once(
    server: Server, client: Client
) -> None:
    follower = Follower(server.directory, "follow&new")
    quick = Follower(server.directory, "follow&new&topic=none")
    append_lines(client, "warm", 10_000)
    before = resident(server.process.pid)
    made = []
    most = before
    for _ in range(10):
        made += append_lines(client, "a", 10_000)
        most = max(most, resident(server.process.pid))
    assert most - before < 48 << 20, f"{(most - before) >> 20} MiB for one slow follower"
    seen = follower.read_until(made[-1])
    assert [each for topic, each in seen if topic == "a"] == made
    assert len(seen) == 110_000
    live = client.append("a")
    assert follower.read_until(live.id)[-1] == ("a", live.id)
    follower.close()
    quick.close()


def test_a_thousand_followers_get_every_frame_once_in_order(server: Server, client: Client) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    queries = ["follow&new", "follow", "follow&topic=a.*", "follow&new&limit=100000", "follow=5000"]
    followers = [Follower(server.directory, queries[n % 5]) for n in range(1000)]
    made = [client.append("a.b", f"{n}").id for n in range(20)]
    made += append_lines(client, "a.b", 200)
    last = made[-1]
    selector = selectors.DefaultSelector()
    for each in followers:
        each.sock.setblocking(False)
        selector.register(each.sock, selectors.EVENT_READ, each)
    left = set(followers)
    deadline = time.monotonic() + DEADLINE * 2
    while left:
        assert time.monotonic() < deadline, f"{len(left)} followers still wait"
        for key, _ in selector.select(1.0):
            block = key.fileobj.recv(1 << 20)  # type: ignore[union-attr]
            assert block
            key.data.data += block
            if last.encode() in key.data.data[-300:]:
                left.discard(key.data)
    for each in followers:
        assert [i for topic, i in each.seen() if topic == "a.b"] == made
        each.close()


def test_history_comes_first_then_one_threshold_then_what_is_live(
    server: Server, client: Client
) -> None:
    old = [client.append("a", f"{n}").id for n in range(3)]
    follower = Follower(server.directory, "follow&topic=a")
    live = [client.append("a", f"{n}").id for n in range(3)]
    client.append("b")
    seen = follower.read_until(live[-1])
    assert topics(seen) == ["a"] * 3 + ["xs.threshold"] + ["a"] * 3
    assert [each for topic, each in seen if topic == "a"] == old + live
    follower.close()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("follow&limit=2&topic=a", ["a0", "a1"]),
        ("follow&limit=5&topic=a", ["a0", "a1", "a2", "xs.threshold", "a3", "a4"]),
        ("follow&last=2&limit=3&topic=a", ["a1", "a2", "xs.threshold", "a3"]),
        ("follow&new&limit=2&topic=a", ["a3", "a4"]),
        ("follow&last=2&limit=4&topic=*,a", None),
        ("follow&last=9&topic=nothing,b&limit=1", ["xs.threshold", "b"]),
    ],
)
def test_limit_last_and_new_count_frames_and_end_the_stream(
    server: Server, client: Client, query: str, expected: list[str] | None
) -> None:
    names = {client.append("a").id: f"a{n}" for n in range(3)}
    follower = Follower(server.directory, query)
    for n in range(3, 6):
        names[client.append("a").id] = f"a{n}"
    names[client.append("b").id] = "b"
    # A synthetic frame's id is the reader's position: that of the frame before it.
    seen = [
        topic if topic.startswith("xs.") else names[each] for topic, each in follower.read_to_end()
    ]
    assert seen == (expected or ["a1", "a2", "xs.threshold", "a3", "a4"])
    follower.close()


def test_pulses_come_after_the_threshold_and_pass_every_filter(
    server: Server, client: Client
) -> None:
    client.append("a")
    follower = Follower(server.directory, "follow=10&topic=nothing&limit=1")
    while topics(follower.seen()).count("xs.pulse") < 3:
        follower.data += follower.sock.recv(65536)
    assert topics(follower.seen())[:2] == ["xs.threshold", "xs.pulse"]
    client.append("nothing")
    seen = topics(follower.read_to_end())
    assert seen[-1] == "nothing" and seen.count("nothing") == 1
    follower.close()


def test_ephemeral_frames_are_delivered_live_with_their_content_and_never_stored(
    server: Server, client: Client
) -> None:
    follower = Follower(server.directory, "follow&new&with-content")
    first = client.append("a", "kept")
    passing = client.append("a", "passing", ttl="ephemeral")
    last = client.append("a", "kept too")
    follower.read_until(last.id)
    assert [each for _, each in follower.seen()] == [first.id, passing.id, last.id]
    assert b'"content":"passing"' in follower.data
    assert client.content(passing) == b"passing"
    assert [each.id for each in client.cat(topic="a")] == [first.id, last.id]
    assert client.get(passing) is not None
    follower.close()


def test_what_was_removed_or_has_expired_before_a_reader_got_there_is_not_delivered(
    server: Server, client: Client
) -> None:
    follower = Follower(server.directory, "follow&new")
    pad = {"pad": "x" * 4000}
    for n in range(500):  # far more than a socket holds
        client.append("pad", f"{n}", meta=pad)
    made = [client.append("a", f"{n}") for n in range(10)]
    short = client.append("a", ttl="time:1")
    for each in made[::2]:
        client.remove(each)
    while client.get(short) is not None:
        pass
    last = client.append("a")
    seen = follower.read_until(last.id)
    expected = [each.id for each in made[1::2]] + [last.id]
    assert [each for topic, each in seen if topic == "a"] == expected
    assert topics(seen).count("pad") == 500
    follower.close()


def test_imports_meanwhile_neither_hide_nor_repeat_a_frame(server: Server, client: Client) -> None:
    followers = [Follower(server.directory, "follow&new") for _ in range(5)]
    made = []
    for n in range(60):
        made.append(client.append("a", f"{n}").id)
        now = time.time_ns() // 1_000_000
        back = [0, 1, 1000, -50][n % 4]
        client.import_([{"topic": "i", "id": ids.text(ids.first_of(now - back) + n), "meta": None}])
        made += append_lines(client, "a", 5)
    for each in followers:
        seen = each.read_until(made[-1])
        order = [i for _, i in seen]
        assert order == sorted(set(order))
        assert [i for topic, i in seen if topic == "a"] == made
        each.close()


def test_a_follower_from_the_middle_goes_on_into_what_is_live(
    server: Server, client: Client
) -> None:
    made = append_lines(client, "a", 5000)
    follower = Follower(server.directory, f"follow&after={made[2500]}&topic=a")
    made += append_lines(client, "a", 5000)
    seen = [each for topic, each in follower.read_until(made[-1]) if topic == "a"]
    assert seen == made[2501:]
    follower.close()


def test_last_with_follow_gives_what_is_last_and_each_newer_one(
    server: Server, client: Client
) -> None:
    client.append("a", "old")
    now = client.append("a", "now")
    follower = Follower(server.directory, "follow", "/last/a")
    newer = client.append("a", "newer")
    client.append("b")
    newest = client.append("a", "newest")
    seen = follower.read_until(newest.id)
    assert seen == [("a", each.id) for each in (now, newer, newest)]
    follower.close()


def test_followers_are_given_the_last_frame_of_a_server_that_stops(
    server: Server, client: Client
) -> None:
    follower = Follower(server.directory, "follow&new")
    made = client.append("a")
    server.process.terminate()
    seen = follower.read_to_end()
    assert topics(seen) == ["a", "xs.stop"] and seen[0][1] == made.id
    follower.close()


@pytest.mark.parametrize("over", ["the socket", "the process"])
def test_what_comes_between_two_looks_of_a_follower_is_given_though_the_server_stops_then(
    running: Running, over: str
) -> None:
    store, delivery = running.root.store, running.root._delivery
    looked, looks = store.bus.after, itertools.count(1)

    def after(position: int) -> Any:
        found = looked(position)
        if next(looks) == 1:  # it has found nothing, and has yet to wait, or to be parked
            add(store, "late")
            delivery.stop()
        return found

    store.bus.after = after  # type: ignore[method-assign]
    if over == "the socket":
        follower = Follower(running.root.folder, "follow&new")
        assert topics(follower.read_to_end()) == ["late"]
        follower.close()
    else:
        reader = Reader(store, query.ReadOptions(follow=True, new=True))
        assert b"".join(reader.follow()).count(b'"late"') == 1


def test_damaged_content_breaks_off_its_follower_and_no_other(
    server: Server, client: Client
) -> None:
    client.append("a", "the same")
    with contextlib.closing(sqlite3.connect(os.path.join(server.directory, "xs.db"))) as db:
        db.execute("UPDATE frame SET content = x'00' WHERE content IS NOT NULL")
        db.commit()
    hit = Follower(server.directory, "follow&new&with-content")
    other = Follower(server.directory, "follow&new")
    # Its content is looked for in the index first, and is damaged there.
    client.append("a", "the same", ttl="ephemeral")
    made = client.append("b")
    assert other.read_until(made.id)[-1] == ("b", made.id)
    again = client.append("c")
    assert other.read_until(again.id)[-1] == ("c", again.id)
    hit.close()
    other.close()


# In one process


def follow(store: Store, **options: object) -> tuple[threading.Thread, list[str]]:
    reader = Reader(store, query.ReadOptions(follow=True, **options))  # type: ignore[arg-type]
    seen: list[str] = []

    def run() -> None:
        for block in reader.follow():
            seen.extend([each.decode() for _, each in ID.findall(block)])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, seen


def test_fifty_followers_in_the_process_see_every_frame_of_many_writers_once(
    store: Store,
) -> None:
    followers = [follow(store, new=True, limit=2000) for _ in range(50)]
    made: list[str] = []

    def write(n: int) -> None:
        for k in range(25):
            made.append(add(store, f"t.{n}", b"%d" % k))
            if k % 5 == 0:
                made.extend(frame.id_of(line) for line in add_all(store, [Append("b")] * 15))

    writers = [threading.Thread(target=write, args=(n,)) for n in range(20)]
    for each in writers:
        each.start()
    for each in writers:
        each.join(DEADLINE)
    for thread, seen in followers:
        thread.join(DEADLINE)
        assert not thread.is_alive()
        assert seen == sorted(made)


def test_a_reader_whose_place_left_the_ring_reads_the_index(store: Store) -> None:
    reader = Reader(store, query.ReadOptions(follow=True, new=True, limit=3 * RING_FRAMES + 2))
    blocks = reader.follow()
    made = [frame.id_of(line) for line in add_all(store, [Append("a")] * RING_FRAMES * 2)]
    add(store, "e", ttl="ephemeral")
    made += [frame.id_of(line) for line in add_all(store, [Append("a")] * (RING_FRAMES + 2))]
    seen = [each.decode() for block in blocks for _, each in ID.findall(block)]
    assert seen == made  # only the ephemeral frame was passed over


@pytest.mark.parametrize("way", ["imported", "behind"])
def test_who_has_to_read_the_index_misses_no_ephemeral_frame_that_is_still_in_the_ring(
    store: Store, way: str
) -> None:
    many = 3 * RING_FRAMES if way == "behind" else 1
    reader = Reader(store, query.ReadOptions(follow=True, new=True, limit=many + 3))
    add(store, ttl="ephemeral")  # below what is imported, or left the ring: it is passed over
    if way == "behind":
        expected = [frame.id_of(line) for line in add_all(store, [Append("a")] * many)]
    else:
        expected = [ids.text(ids.last_of(NOON + 50))]
        import_all(store, [imported(ids.parse(expected[0]))])
    expected += [add(store, ttl="ephemeral"), add(store), add(store, ttl="ephemeral")]
    seen = b"".join(reader.follow()).splitlines()
    assert [frame.id_of(line) for line in seen] == expected


def test_a_live_frame_that_was_removed_before_it_was_read_is_left_out(store: Store) -> None:
    reader = Reader(store, query.ReadOptions(follow=True, new=True, limit=2))
    blocks = reader.follow()
    kept, gone = add(store), add(store)
    expired = add(store, ttl="time:10")
    remove(store, gone)
    store.clock.now += 20  # type: ignore[attr-defined]
    last = add(store)
    seen = [each.decode() for block in blocks for _, each in ID.findall(block)]
    assert seen == [kept, last] and expired not in seen


def test_imports_ahead_of_the_clock_do_not_stop_what_is_live(store: Store) -> None:
    reader = Reader(store, query.ReadOptions(follow=True, new=True, limit=20))
    blocks = reader.follow()
    made = []
    for n in range(10):
        made.append(add(store))
        import_all(store, [imported(ids.first_of(NOON + n * 1000 + 500))])
        made.append(add(store))
    seen = [each.decode() for block in blocks for _, each in ID.findall(block)]
    assert seen == sorted(set(seen))
    assert len(seen) == 20


# With no server, and between the files and a server


def test_a_follower_of_the_files_moves_to_a_server_and_back(store_dir: str) -> None:
    with xs.open(store_dir) as client:
        made = [client.append("a", "files").id]
        frames = client.cat(follow=True, topic="a")
        assert next(frames).id == made[0]
        assert next(frames).topic == "xs.threshold"
        for turn in range(3):
            server = start_server(store_dir)
            with xs.open(store_dir) as other:
                for _ in range(3):
                    made.append(other.append("a", f"server {turn}").id)
                    assert next(frames).id == made[-1]
                made.append(other.append("a", "just before the end").id)
            if turn == 1:
                server.process.kill()
            server.stop()
            with xs.open(store_dir) as other:
                made.append(other.append("a", f"files {turn}").id)
            assert next(frames).id == made[-2]
            assert next(frames).id == made[-1]


def test_a_follower_of_the_files_that_is_never_idle_moves_to_a_server(store_dir: str) -> None:
    with xs.open(store_dir) as client:
        client.append("a", "files")
    follower = subprocess.Popen(
        [*XS, "cat", store_dir, "--follow"],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert follower.stdout is not None
    given: list[bytes] = []
    while not given or b"xs.threshold" not in given[-1]:
        given.append(follower.stdout.readline())
    follower.send_signal(signal.SIGSTOP)  # until there are new frames whenever it looks
    server = start_server(store_dir)
    is_over = threading.Event()
    made: list[str] = []

    def write() -> None:
        with xs.open(store_dir) as client:
            while not is_over.wait(0.002):
                made.append(client.append("a").id)
                client.append("e", ttl="ephemeral")  # which the files don't have

    writer = threading.Thread(target=write)
    writer.start()
    while len(made) < 10:
        is_over.wait(0.01)
    follower.send_signal(signal.SIGCONT)
    watchdog = threading.Timer(DEADLINE, follower.kill)
    watchdog.start()
    while b'"topic":"e"' not in given[-1]:
        given.append(follower.stdout.readline())
        assert given[-1], "it never moved"
    is_over.set()
    writer.join()
    while made[-1] not in map(frame.id_of, given[-3:]):
        given.append(follower.stdout.readline())
        assert given[-1]
    watchdog.cancel()
    follower.kill()
    follower.communicate()
    server.stop()
    seen = [frame.id_of(line) for line in given]
    assert seen[3:] == sorted(set(seen[3:]))
    assert set(made) <= set(seen)
    assert sum(b"xs.threshold" in line for line in given) == 1


def test_last_with_follow_on_the_files_moves_to_a_server(store_dir: str) -> None:
    with xs.open(store_dir) as client:
        first = client.append("a.b", "1")
        client.append("c", "1")
        answer = client._transport.request("GET", "/last/a.b?follow")
        blocks = iter(answer)
        assert first.id.encode() in next(blocks)
        came: queue.Queue[bytes] = queue.Queue()

        def read() -> None:
            with contextlib.suppress(BrokenBody):  # the store is closed
                for block in blocks:
                    for line in block.splitlines():
                        came.put(line)

        threading.Thread(target=read, daemon=True).start()
        server = start_server(store_dir)
        try:
            with xs.open(store_dir) as other:
                other.append("c", "2")
                second = other.append("a.b", "2")
                assert second.id.encode() in came.get(timeout=DEADLINE)
                passing: list[str] = []
                while came.empty():  # the files have no such frame: only the server gives it
                    passing.append(other.append("a.b", "now", ttl="ephemeral").id)
                    threading.Event().wait(0.01)
        finally:
            server.stop()
        given = came.get(timeout=DEADLINE)
        assert any(each.encode() in given for each in passing)
        third = client.append("a.b", "3")
        while third.id.encode() not in given:
            given = came.get(timeout=DEADLINE)
            assert b'"topic":"a.b"' in given


def test_a_client_may_be_closed_under_its_followers_which_go_on(store_dir: str) -> None:
    with xs.open(store_dir) as client:
        client.append("a", "x")
    script = (
        "import sys, threading, time, xs\n"
        "for n in range(1, 21):\n"
        "    client = xs.open(sys.argv[1])\n"
        "    def follow(came):\n"
        "        for each in client.cat(follow=True, limit=n + 1): came.release()\n"
        "    came = threading.Semaphore(0)\n"
        "    threads = [threading.Thread(target=follow, args=(came,)) for _ in range(4)]\n"
        "    for each in threads: each.start()\n"
        "    for _ in range(4 * (n + 1)): came.acquire()\n"  # all frames, and the threshold
        "    client.close()\n"
        "    with xs.open(sys.argv[1]) as other: other.append('a', 'y')\n"
        "    for each in threads: each.join()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, store_dir],
        capture_output=True, env=environment(), timeout=DEADLINE,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_follower_of_the_files_moves_with_its_limit(store_dir: str) -> None:
    with xs.open(store_dir) as client:
        first = client.append("a", "1")
        frames = client.cat(follow=True, topic="a", limit=3)
        assert next(frames).id == first.id
        assert next(frames).topic == "xs.threshold"
        server = start_server(store_dir)
        with xs.open(store_dir) as other:
            made = [other.append("a", f"{n}").id for n in range(3)]
        assert [each.id for each in frames] == made[:2]
        server.stop()


def retried(act: Callable[[], Any]) -> Any:
    """A server that stops may close a connection unanswered; then a removal is tried again."""
    while True:
        try:
            return act()
        except Unavailable:
            continue


def test_direct_writers_go_on_when_a_server_takes_the_store(store_dir: str) -> None:
    """They wait for its socket, and send there what they were about to write."""
    stop = threading.Event()
    answered: list[tuple[Frame, bytes]] = []
    failures: list[BaseException] = []

    def write(n: int) -> None:
        try:
            with xs.open(store_dir) as client:
                k = 0
                while not stop.is_set():
                    data = b"%d.%d" % (n, k) * (5000 if k % 7 == 0 else 1)
                    meta = {"k": k, "big": 10**30}
                    made = client.append(f"w.{n}", data, meta=meta)
                    answered.append((made, data))
                    if k % 5 == 0:
                        good = {"topic": f"m.{n}", "content": f"{k}"}
                        wrong = {"topic": "..", "meta": 1}
                        summary = client.append_many([good, wrong])
                        assert summary["appended"] == 1 and len(summary["errors"]) == 1, summary
                    if k % 3 == 0:
                        retried(lambda: client.remove(made))  # noqa: B023
                        answered.remove((made, data))
                    k += 1
        except (XsError, AssertionError, ValueError) as error:
            failures.append(error)

    with xs.open(store_dir) as client:
        client.append("a")
    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            count = len(answered)
            server = start_server(store_dir)
            deadline = time.monotonic() + DEADLINE
            while len(answered) < count + 40 and time.monotonic() < deadline:
                stop.wait(0.01)
            server.stop()
            count = len(answered)
            while len(answered) < count + 20 and time.monotonic() < deadline:
                stop.wait(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE)
    assert failures == []
    with xs.open(store_dir) as client:
        stored = {each.id: each for each in client.cat()}
        assert len(stored) == len(list(client.cat(topic="m.*"))) + len(answered) + 7
        for made, data in answered:
            assert stored[made.id] == made
            assert client.content(made) == data
