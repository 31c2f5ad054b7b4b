"""Chunked content: an event that can be read while it is still being written.

Over real sockets and with real processes, where it is about what arrives when; on a store in this
process, where it is about what counts, what goes together, and what a copy keeps.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

import pytest
from conftest import DEADLINE, ROOT, XS, Server, environment, start_server, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import (
    NOON,
    Clock,
    add,
    all_ids,
    import_all,
    imported,
    in_one_batch,
    lines,
    problems,
    remove,
    steps_of,
    together,
)
from wire import Answer, Wire, request

import xs
from xs import chunked, claim, connections, frame, ids, runs, runsteps, schema, walk
from xs.client import Client
from xs.commit import Append, Commit
from xs.content import small
from xs.errors import BrokenBody, Conflict, Invalid, NotFound, Unavailable, XsError
from xs.expiry import SweepWork
from xs.imports import Imported
from xs.runs import PIECE_MAX, Run
from xs.store import Store
from xs.work import AppendWork, Work

FIRST_IDS = itertools.count(ids.first_of(NOON - 1_000_000), 1 << 40)


@pytest.fixture
def store(store_dir: str, clock: Clock) -> Iterator[Store]:
    """A store that this process has for itself."""
    opened = Store(store_dir, exclusive=True, create=True, clock=clock)
    yield opened
    found = problems(opened)
    opened.close()
    assert found == []
    assert no_claims(store_dir)


# ---- The words of these tests ------------------------------------------------------------------


class Writing:
    """A chunked append under way on a connection of its own."""

    def __init__(self, server: Server, topic: str = "a", query: str = "", **fields: str) -> None:
        self.wire = Wire(server.directory)
        target = f"/append/{topic}?chunked{query}"
        self.wire.send(request("POST", target, transfer_encoding="chunked", **fields))

    def send(self, *blocks: bytes) -> Writing:
        for block in blocks:
            self.wire.send(b"%x\r\n%b\r\n" % (len(block), block))
        return self

    def answer(self) -> Answer:
        """Before the end, if it is refused; or after `end`."""
        with self.wire:
            return self.wire.answer()

    def end(self) -> Any:
        """Ends the body; the frame that is answered."""
        self.wire.send(b"0\r\n\r\n")
        found = self.answer()
        assert found.status == 200, found
        return json.loads(found.body)

    def vanish(self) -> None:
        self.wire.sock.close()


class Reading:
    """A `GET /content/:id` under way; what came is in `data`."""

    def __init__(self, server: Server, id_text: str) -> None:
        self.wire = Wire(server.directory)
        self.wire.send(request("GET", f"/content/{id_text}"))
        self.status, self.fields = self.wire.head()
        self.data = b""

    def until(self, wanted: bytes) -> bytes:
        """Reads until that has come: what the content has so far, and no more."""
        while len(self.data) < len(wanted):
            block = self.wire.block()
            assert block, f"it ended after {self.data!r}"
            self.data += block
        assert self.data == wanted
        return self.data

    def rest(self) -> bytes:
        """All of it. Raises `EOFError` if it breaks off."""
        with self.wire:
            while block := self.wire.block():
                self.data += block
        return self.data

    def breaks_off(self) -> bytes:
        """What had come when it broke off."""
        with pytest.raises(EOFError):
            self.rest()
        return self.data


def following(server: Server, query: str = "follow&new") -> Wire:
    wire = Wire(server.directory)
    wire.send(request("GET", f"/?{query}"))
    assert wire.head()[0] == 200
    return wire


def next_frames(wire: Wire, count: int) -> list[Any]:
    """So many live frames, however they come together."""
    found: list[Any] = []
    while len(found) < count:
        found += [json.loads(line) for line in wire.block().splitlines()]
    assert len(found) == count
    return found


def frames(server: Server, query: str = "") -> list[Any]:
    with Wire(server.directory) as wire:
        return [json.loads(line) for line in wire.ask("GET", f"/?{query}").body.splitlines()]


def ask(server: Server, method: str, target: str, **fields: str) -> Answer:
    with Wire(server.directory) as wire:
        return wire.ask(method, target, b"" if method == "POST" else None, **fields)


def first_of(server: Server, topic: str = "a") -> str:
    """The id of the newest event, as soon as there is one."""
    answer = until(lambda: (a := ask(server, "GET", f"/last/{topic}")).status == 200 and a)
    return str(json.loads(answer.body)["id"])


def begin(store: Store, topic: str = "a", meta: str = "null", **more: Any) -> Run:
    return store.runs.begin(Append(topic, None, meta, **more))


def written(store: Store, *blocks: bytes, topic: str = "a", **more: Any) -> str:
    """A whole run, a frame for each block; its first frame's id."""
    run = begin(store, topic, **more)
    for block in blocks[:-1]:
        run.write(block)
    return frame.id_of(run.end(blocks[-1] if blocks else b""))


def first_text(run: Run) -> str:
    assert run.first is not None
    return ids.text(run.first)


def pieces_of(store: Store, id_text: str) -> list[Any]:
    """The frames of a run, its first included, as their JSON says it."""
    found = [json.loads(line) for line in lines(store)]
    return [f for f in found if f["id"] == id_text or chunk_of(f) == id_text]


def chunk_of(found: Any) -> Any:
    return found["meta"].get("chunk") if isinstance(found["meta"], dict) else None


def whole(store: Store, id_text: str) -> bytes:
    """What GET /content/:id gives: raises `BrokenBody` where that breaks off."""
    return b"".join(chunked.content(store, ids.parse(id_text))[1])


def so_far(store: Store, id_text: str) -> bytes:
    """What there is to read of a run now, whether or not it goes on."""
    blocks = chunked.content(store, ids.parse(id_text))[1]
    found = b""
    patience, chunked.IDLE_SECONDS = chunked.IDLE_SECONDS, 0.0
    try:
        for block in blocks:
            if not block:
                break
            found += block
    except BrokenBody:
        pass
    finally:
        chunked.IDLE_SECONDS = patience
    return found


def ends_of(store: Store, id_text: str) -> Any:
    return pieces_of(store, id_text)[-1]["meta"]


# ---- From a body to frames, and back -----------------------------------------------------------


def test_a_body_becomes_a_run_of_frames_as_it_arrives(server: Server) -> None:
    with following(server) as live:
        writing = Writing(server, query="&ttl=time:600000", xs_meta='{"q": 1.10}').send(b"one ")
        (first,) = next_frames(live, 1)
        assert first["meta"] == {"q": 1.10, "more": True}
        assert (first["topic"], first["ttl"]) == ("a", "time:600000")
        assert first["hash"] == frame.integrity(hashlib.sha256(b"one ").digest())
        writing.send(b"two ")
        (second,) = next_frames(live, 1)
        assert second["meta"] == {"chunk": first["id"], "more": True}
        assert (second["topic"], second["ttl"]) == ("a", "time:600000")
        assert writing.end() == first
        (last,) = next_frames(live, 1)
    assert last["meta"] == {"chunk": first["id"], "more": False}
    assert last["hash"] is None
    assert frames(server, "topic=a") == [first, second, last]
    texts = [ask(server, "GET", f"/cas/{f['hash']}").body for f in (first, second)]
    assert texts == [b"one ", b"two "]
    assert ask(server, "GET", f"/content/{first['id']}").body == b"one two "
    assert ask(server, "GET", f"/content/{second['id']}").body == b"two "


@pytest.mark.parametrize("form", ["/append/a?chunked", "/stream/a?chunked=true", "/a?chunked=1"])
def test_each_form_of_an_append_can_be_chunked(server: Server, form: str) -> None:
    with Wire(server.directory) as wire:
        made = json.loads(wire.ask("POST", form, b"text").body)
        plain = json.loads(wire.ask("POST", form.partition("?")[0] + "?chunked=no", b"text").body)
    assert made["meta"] == {"more": True} and plain["meta"] is None
    assert ask(server, "GET", f"/content/{made['id']}").body == b"text"


def test_a_reader_gets_each_byte_while_the_writer_still_writes(server: Server) -> None:
    writing = Writing(server).send(b"a")
    reading = Reading(server, first_of(server))
    assert reading.status == 200 and "content-length" not in reading.fields
    so_far = b""
    for n in range(20):
        so_far = reading.until(b"a" * (n + 1))
        writing.send(b"a")
    writing.end()
    assert reading.rest() == so_far + b"a"


def test_what_comes_soon_after_is_gathered_and_not_held_until_more_comes(server: Server) -> None:
    writing = Writing(server).send(b"0")
    first = first_of(server)
    reading = Reading(server, first)
    reading.until(b"0")
    started = time.monotonic()
    count = 0
    while time.monotonic() < started + 0.5:
        writing.send(b".")
        count += 1
        threading.Event().wait(0.001)
    # Nothing further is sent, and nothing ends: what was gathered has to come by itself.
    reading.until(b"0" + b"." * count)
    passed = time.monotonic() - started
    assert len(frames(server, "topic=a")) <= passed / chunked.GATHER_SECONDS + 3
    writing.end()
    reading.rest()


def test_a_slow_writer_never_waits_to_be_gathered(server: Server) -> None:
    """A byte that comes later than the gathering is readable at once: in far less than that."""
    writing = Writing(server).send(b"a")
    reading = Reading(server, first_of(server))
    reading.until(b"a")
    took = []
    for n in range(15):
        threading.Event().wait(chunked.GATHER_SECONDS * 1.5)
        before = time.monotonic()
        writing.send(b"a")
        reading.until(b"a" * (n + 2))
        took.append(time.monotonic() - before)
    assert sorted(took)[3] < chunked.GATHER_SECONDS / 2  # the others: a machine that is busy
    writing.end()
    reading.rest()


def test_the_pieces_of_a_fast_body_are_bounded_and_their_bytes_are_the_body_s(
    server: Server,
) -> None:
    data = random.Random(1).randbytes(3_000_000)
    with Wire(server.directory) as wire:
        made = json.loads(wire.ask("POST", "/append/a?chunked", data).body)
        assert wire.ask("GET", f"/content/{made['id']}").body == data
        found = [json.loads(line) for line in wire.ask("GET", "/?with-content").body.splitlines()]
    contents = [base64.b64decode(f["content_base64"]) for f in found if "content_base64" in f]
    assert b"".join(contents) == data
    assert max(map(len, contents)) <= PIECE_MAX
    assert not os.listdir(os.path.join(server.directory, "cas"))


def test_text_is_cut_between_its_characters(server: Server) -> None:
    text = "ä€😀x" * 20_000
    for shift in range(4):
        data = b"-" * shift + text.encode()
        with Wire(server.directory) as wire:
            wire.ask("POST", f"/append/t{shift}?chunked", data)
            answer = wire.ask("GET", f"/?topic=t{shift}&with-content")
        found = [json.loads(line) for line in answer.body.splitlines()]
        assert "".join(f.get("content", "") for f in found) == "-" * shift + text


def test_a_body_without_a_byte_is_an_event_all_the_same(server: Server) -> None:
    made = json.loads(ask(server, "POST", "/append/a?chunked").body)
    assert made["hash"] is None and made["meta"] == {"more": True}
    assert [f["meta"] for f in frames(server, "topic=a")][1:] == [
        {"chunk": made["id"], "more": False}
    ]
    assert ask(server, "GET", f"/content/{made['id']}").body == b""


@pytest.mark.parametrize(
    ("query", "fields", "sentence"),
    [
        ("", {"xs_meta": "[1]"}, "the meta of a chunked append is an object"),
        ("", {"xs_meta": '"text"'}, "the meta of a chunked append is an object"),
        ("", {"xs_meta": '{"more": false}'}, "a chunked append says by itself what more is"),
        ("", {"xs_meta": '{"\\u0063hunk": 1}'}, "a chunked append says by itself what chunk is"),
        ("&ttl=ephemeral", {}, "a chunked content can't be ephemeral"),
        ("&ttl=soon", {}, "not a ttl"),
        ("=perhaps", {}, "chunked='perhaps'"),
        ("&chunk=1", {}, "unknown parameter"),
        ("", {"xs_run": "more 0123.1"}, "no other process on this machine writes"),
        ("", {"xs_run": "more ../lock.1"}, "no other process on this machine writes"),
        ("", {"xs_run": "new"}, "for commands that go on through a server"),
    ],
)
def test_what_is_wrong_is_refused_before_the_body_ends(
    shared: Server, query: str, fields: dict[str, str], sentence: str
) -> None:
    answer = Writing(shared, "a", query, **fields).send(b"text").answer()
    assert answer.status == 400
    assert sentence in answer.body.decode()
    assert frames(shared, "topic=a") == []


def test_the_meta_of_a_chunked_append_keeps_its_text_and_its_limit(store: Store) -> None:
    given = '{"b":1.10,"a":[12345678901234567890123],"ü":"\\u00fc"}'
    id_text = written(store, b"x", meta=given)
    (line,) = lines(store, no_chunks=True)
    assert f'"meta":{given[:-1]},"more":true}}'.encode() in line
    assert whole(store, id_text) == b"x"
    room = (1 << 20) - len('{"x":"","more":true}')
    fits = '{"x":"' + "x" * room + '"}'
    assert len(begin(store, meta=fits).append.meta) == 1 << 20
    with pytest.raises(Invalid, match="meta is too large"):
        begin(store, meta=fits.replace("x" * 9, "x" * 10, 1))


def test_a_long_body_costs_little_memory(server: Server) -> None:
    """As it goes in, and as it comes out."""
    block = random.Random(2).randbytes(1 << 20)
    count = 100
    before = resident(server)
    writing = Writing(server)
    digest = hashlib.sha256()
    for n in range(count):
        writing.send(block[n:])
        digest.update(block[n:])
    made = writing.end()
    reading = Reading(server, made["id"])
    seen = hashlib.sha256()
    while data := reading.wire.block():
        seen.update(data)
    assert seen.digest() == digest.digest()
    assert resident(server) - before < 50_000


def resident(server: Server) -> int:
    """Kilobytes of memory."""
    return status_of(server, "VmRSS")


def status_of(server: Server, name: str) -> int:
    """A line of proc(5)'s status."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0])


# ---- Readers -----------------------------------------------------------------------------------


def test_readers_that_come_early_late_slowly_and_all_at_once_get_every_byte(
    server: Server,
) -> None:
    chance = random.Random(3)
    blocks = [chance.randbytes(chance.choice([1, 7, 100, 5000, 40_000])) for _ in range(120)]
    data = b"".join(blocks)
    writing = Writing(server).send(blocks[0])
    id_text = first_of(server)
    started = threading.Semaphore(0)

    def read(n: int) -> None:
        if n:
            assert started.acquire(timeout=DEADLINE)  # each some blocks after the one before
        reading = Reading(server, id_text)
        if n % 3 == 2:
            found = b""
            with reading.wire:
                reading.wire.sock.setsockopt(1, 8, 4096)  # SO_RCVBUF: it takes little at a time
                while block := reading.wire.block():
                    found += block
                    threading.Event().wait(0.001)
            reading.data = found
        else:
            reading.rest()
        assert reading.data == data

    failures: list[BaseException] = []

    def write() -> None:
        try:
            for n, block in enumerate(blocks[1:]):
                writing.send(block)
                if n % 10 == 0:
                    started.release()
                threading.Event().wait(chance.choice([0, 0, 0.001, 0.02]))
            writing.end()
        except BaseException as error:
            failures.append(error)
        for _ in range(20):
            started.release()

    writer = threading.Thread(target=write)
    writer.start()
    together(15, read)
    writer.join(DEADLINE)
    assert not failures, failures


def test_a_reader_that_went_away_leaves_nothing_behind_though_nothing_is_written(
    server: Server,
) -> None:
    writing = Writing(server).send(b"x")
    id_text = first_of(server)
    until(lambda: threads_of(server) <= 9)
    before = threads_of(server)
    readings = [Reading(server, id_text) for _ in range(20)]
    for reading in readings:
        reading.until(b"x")
    assert threads_of(server) > 20
    readings[0].wire.half_close()  # one only sends no more: it still reads
    for reading in readings[1:]:
        reading.wire.sock.close()
    until(lambda: threads_of(server) <= before + 1)
    writing.send(b"y").end()
    assert readings[0].rest() == b"xy"


def threads_of(server: Server) -> int:
    return status_of(server, "Threads")


def test_a_reader_is_woken_by_its_own_run_alone(store: Store) -> None:
    mine, other = begin(store), begin(store)
    mine.write(b"1")
    other.write(b"1")
    assert mine.first is not None
    woken = threading.Event()
    position = store.bus.newest

    def wait() -> None:
        assert store.bus.wait_for_run(mine.first or 0, position, DEADLINE)
        woken.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: store.bus._run_changed)
    condition = store.bus._run_changed[mine.first][0]
    for _ in range(50):
        add(store, "b")
        other.write(b"2")
        with condition:
            assert len(condition._waiters) == 1  # type: ignore[attr-defined]
    assert not woken.is_set()
    mine.write(b"2")
    waiting.join(DEADLINE)
    assert woken.is_set() and not store.bus._run_changed
    mine.end()
    other.end()


def test_a_head_request_answers_before_the_content_is_whole(server: Server) -> None:
    writing = Writing(server).send(b"x")
    assert ask(server, "HEAD", f"/content/{first_of(server)}").status == 200
    writing.end()


def test_a_run_that_begins_with_no_bytes_lets_its_reader_see_that_it_is_there(
    store: Store, clock: Clock
) -> None:
    run = begin(store)
    run.write(b"")
    blocks = chunked.content(store, run.first or 0)[1]
    got: list[bytes] = []
    waiting = threading.Thread(target=lambda: got.append(next(b for b in blocks if b)))
    waiting.start()
    run.write(b"late")
    waiting.join(DEADLINE)
    assert got == [b"late"]
    run.end()


# ---- Writers that break off --------------------------------------------------------------------


def test_a_writer_that_vanishes_leaves_a_run_that_is_marked_and_readers_are_told(
    server: Server,
) -> None:
    with following(server, "follow") as live:
        next_frames(live, 2)  # xs.start, xs.threshold
        writing = Writing(server).send(b"half a ")
        (first,) = next_frames(live, 1)
        early = Reading(server, first["id"])
        early.until(b"half a ")
        writing.vanish()
        (last,) = next_frames(live, 1)
    assert last["meta"] == {"chunk": first["id"], "more": False, "error": chunked.BROKE_OFF}
    assert early.breaks_off() == b"half a "
    assert Reading(server, first["id"]).breaks_off() == b"half a "
    check(server.directory)


def test_a_body_that_is_no_body_is_kept_up_to_there_and_its_sender_is_told(server: Server) -> None:
    writing = Writing(server).send(b"fine")
    id_text = first_of(server)
    writing.wire.send(b"this is no chunk\r\n")
    answer = writing.answer()
    assert answer.status == 400
    assert f"{id_text} has what came before" in answer.body.decode()
    assert Reading(server, id_text).breaks_off() == b"fine"


def test_a_writer_that_vanishes_before_its_first_byte_leaves_nothing(server: Server) -> None:
    writing = Writing(server)
    writing.vanish()
    made = json.loads(ask(server, "POST", "/append/b").body)
    assert [f["id"] for f in frames(server)][1:] == [made["id"]]


def test_a_server_that_stops_ends_what_was_being_written_before_its_last_frame(
    store_dir: str,
) -> None:
    server = start_server(store_dir)
    writing = Writing(server).send(b"so far")
    id_text = first_of(server)
    reading = Reading(server, id_text)
    reading.until(b"so far")
    server.stop()
    assert reading.breaks_off() == b"so far"
    writing.vanish()
    with xs.open(store_dir) as client:
        *_, end, stop = client.cat()
        assert end.meta == {"chunk": id_text, "more": False, "error": runs.STOPPED}
        assert stop.topic == "xs.stop"
        with pytest.raises(BrokenBody):
            client.content(id_text)
    assert no_claims(store_dir)


def test_an_iterable_that_raises_leaves_a_run_that_is_marked(store_dir: str) -> None:
    class Failed(Exception):
        pass

    def tokens() -> Iterator[str]:
        yield "Once "
        yield "upon "
        raise Failed

    def check_marked(client: Client, topic: str) -> None:
        with pytest.raises(Failed):
            client.append(topic, tokens(), chunked=True)
        until(lambda: any(ended(each) for each in client.cat(topic=topic)))
        first = client.last(topic)
        assert first is not None
        assert list(client.cat(topic=topic))[-1].meta["error"] == chunked.BROKE_OFF
        found = b""
        with pytest.raises(BrokenBody):
            for block in client.content_blocks(first):
                found += block
        assert found in (b"Once ", b"Once upon ")

    with xs.open(store_dir) as client:
        check_marked(client, "files")
    server = start_server(store_dir)
    try:
        with xs.open(store_dir) as client:
            check_marked(client, "server")
    finally:
        server.stop()


def test_what_can_not_be_ended_now_is_ended_later(store: Store) -> None:
    """The disk may be full when a writer breaks off: readers must not wait for ever."""
    run = begin(store)
    run.write(b"x")
    do = store.runs.do
    refusals = [2]

    def refuse(work: Any) -> Any:
        if refusals[0]:
            refusals[0] -= 1
            raise Unavailable("not now")
        return do(work)

    store.runs.do = refuse  # type: ignore[method-assign]
    run.break_off("it was enough")
    store.runs.do = do  # type: ignore[method-assign]
    until(lambda: ends_of(store, first_text(run))["more"] is False)
    assert ends_of(store, first_text(run))["error"] == "it was enough"


# ---- Kills -------------------------------------------------------------------------------------


def check(store_dir: str) -> None:
    done = subprocess.run(
        [*XS, "check", store_dir],
        capture_output=True,
        env=environment(),
        timeout=DEADLINE * 2,
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


def claims(store_dir: str) -> list[str]:
    return [name for name in os.listdir(store_dir) if name.startswith("run-")]


def no_claims(store_dir: str) -> bool:
    return not claims(store_dir)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE)


def appending(store_dir: str, *options: str, topic: str = "a") -> subprocess.Popen[bytes]:
    """`xs append --chunked`, whose input is a pipe, to a store that there is."""
    if not os.path.exists(store_dir):
        add_to(store_dir)
    return subprocess.Popen(
        [*XS, "append", store_dir, topic, "--chunked", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        bufsize=0,
    )


def feed(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)


def finish(process: subprocess.Popen[bytes]) -> Any:
    """Ends its input; the frame that it prints."""
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    return json.loads(out)


def wait_for(client: Client, id_text: str, data: bytes) -> None:
    """Waits until the content has begun with that, whether or not it goes on."""
    found = b""
    for block in client.content_blocks(id_text):
        found += block
        if len(found) >= len(data):
            break
    assert found == data


def newest(client: Client, topic: str = "a") -> str:
    return str(until(lambda: client.last(topic)).id)


@pytest.mark.long
def test_a_server_that_is_killed_leaves_a_run_that_the_next_one_ends(store_dir: str) -> None:
    """Killed at any moment of it, again and again: every byte that a reader saw is there."""
    chance = random.Random(5)
    kept: dict[str, bytes] = {}
    for turn in range(8):
        server = start_server(store_dir)
        writing = Writing(server, f"t{turn}").send(b"first ")
        id_text = first_of(server, f"t{turn}")
        reading = Reading(server, id_text)
        seen = [b""]

        def read(reading: Reading = reading, seen: list[bytes] = seen) -> None:
            try:
                while block := reading.wire.block():
                    seen[0] += block
            except (EOFError, OSError, ValueError):
                pass  # killed

        def write(writing: Writing = writing) -> None:
            try:
                for n in itertools.count():
                    writing.send(b"%d " % n * (1000 if n % 7 == 0 else 1))
            except OSError:
                pass  # killed

        both = [threading.Thread(target=act, daemon=True) for act in (read, write)]
        for thread in both:
            thread.start()
        wanted = chance.randrange(1, 300_000)
        until(lambda seen=seen, wanted=wanted: len(seen[0]) >= wanted)  # type: ignore[misc]
        kill(server.process)
        for thread in both:
            thread.join(DEADLINE)
            assert not thread.is_alive()
        kept[id_text] = seen[0]
    server = start_server(store_dir)
    try:
        with xs.open(store_dir) as client:
            order = [f.topic for f in client.cat() if f.topic == "xs.start" or ended(f)]
            assert order == ["xs.start"] + [t for n in range(8) for t in (f"t{n}", "xs.start")]
            for id_text, data in kept.items():
                found = b""
                with pytest.raises(BrokenBody):
                    for block in client.content_blocks(id_text):
                        found += block
                assert found.startswith(data)
                expected = b"first " + b"".join(
                    b"%d " % n * (1000 if n % 7 == 0 else 1) for n in range(len(found) // 2 + 1)
                )
                assert expected.startswith(found)
                topic = client.get(id_text).topic  # type: ignore[union-attr]
                assert list(client.cat(topic=topic))[-1].meta["error"] == runs.KILLED
    finally:
        server.stop()
    check(store_dir)
    assert no_claims(store_dir)


def ended(found: frame.Frame) -> bool:
    return isinstance(found.meta, dict) and found.meta.get("more") is False


def test_the_run_of_a_command_that_is_killed_is_ended_by_the_next_writer(store_dir: str) -> None:
    chance = random.Random(6)
    made = []
    for turn in range(6):
        process = appending(store_dir, topic=f"t{turn}")
        feed(process, b"begun ")
        with xs.open(store_dir) as client:
            id_text = newest(client, f"t{turn}")
            for n in range(chance.randrange(0, 20)):
                feed(process, b"%d " % n * 100)
                threading.Event().wait(chance.random() * 0.02)
            kill(process)
            made.append(id_text)
            # Nobody has ended it yet; nobody waits for its end either.
            with pytest.raises(BrokenBody, match="nobody goes on with it"):
                client.content(id_text)
            client.append("b", "the next writer")
            end = list(client.cat(topic=f"t{turn}"))[-1]
            assert end.meta == {"chunk": id_text, "more": False, "error": runs.KILLED}
    assert no_claims(store_dir)
    check(store_dir)


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_server_ends_no_run_that_a_living_command_writes_and_the_command_goes_on(
    store_dir: str, end: str
) -> None:
    """Files, a server, files again: the run is one, and readers on either side get all of it."""
    process = appending(store_dir)
    feed(process, b"1 ")
    with xs.open(store_dir) as files:
        id_text = newest(files)
        feed(process, b"2 ")
        wait_for(files, id_text, b"1 2 ")
        server = start_server(store_dir)
        reading = Reading(server, id_text)
        reading.until(b"1 2 ")
        feed(process, b"3 ")
        reading.until(b"1 2 3 ")
        feed(process, b"4 " * 20_000)
        reading.until(b"1 2 3 " + b"4 " * 20_000)
        if end == "stopped":
            server.stop()
        else:
            kill(server.process)
        assert reading.breaks_off()
        feed(process, b"5 ")
        wait_for(files, id_text, b"1 2 3 " + b"4 " * 20_000 + b"5 ")
        server = start_server(store_dir)
        feed(process, b"6 ")
        assert finish(process)["id"] == id_text
        assert Reading(server, id_text).rest() == b"1 2 3 " + b"4 " * 20_000 + b"5 6 "
        server.stop()
    found = [each for each in xs.open(store_dir).cat(topic="a") if ended(each)]
    assert [each.meta for each in found] == [{"chunk": id_text, "more": False}]
    assert no_claims(store_dir)
    check(store_dir)


def test_a_run_begun_on_the_files_may_begin_at_a_server_that_has_just_come(
    store_dir: str,
) -> None:
    """The command has opened the files, and its first byte comes when a server has them."""
    add_to(store_dir)
    process = appending(store_dir, "--meta", '{"q":1}', "--ttl", "last:3", "--key", "k")
    until(lambda: is_reading(process.pid))
    server = start_server(store_dir)
    feed(process, b"late ")
    first = first_of(server, "a")
    reading = Reading(server, first)
    reading.until(b"late ")
    feed(process, b"later")
    made = finish(process)
    assert (made["id"], made["meta"], made["ttl"]) == (first, {"q": 1, "more": True}, "last:3")
    assert reading.rest() == b"late later"
    # The same again, under the key, is answered and makes nothing.
    again = json.loads(ask(server, "POST", "/append/a?chunked", idempotency_key="k").body)
    assert again == made
    server.stop()
    check(store_dir)


def add_to(store_dir: str) -> None:
    with xs.open(store_dir) as client:
        client.append("b", "there is a store")


def is_reading(pid: int) -> bool:
    """Whether the process waits in a read of its input."""
    try:
        return "pipe" in Path(f"/proc/{pid}/wchan").read_text() or (
            Path(f"/proc/{pid}/syscall").read_text().split()[:2] == ["0", "0x0"]
        )
    except OSError:
        return True


def test_a_server_ends_the_run_of_a_command_that_is_killed_while_it_serves(store_dir: str) -> None:
    for moment in ("before", "after"):  # the command is killed before, or after it met the server
        process = appending(store_dir, topic=moment)
        feed(process, b"1 ")
        with xs.open(store_dir) as files:
            id_text = newest(files, moment)
        server = start_server(store_dir)
        try:
            reading = Reading(server, id_text)
            reading.until(b"1 ")
            if moment == "after":
                feed(process, b"2 ")
                reading.until(b"1 2 ")
            kill(process)
            assert reading.breaks_off() == (b"1 " if moment == "before" else b"1 2 ")
            (end,) = [f for f in frames(server, f"topic={moment}") if f["meta"]["more"] is False]
            assert end["meta"] == {"chunk": id_text, "more": False, "error": runs.KILLED}
        finally:
            server.stop()
    assert no_claims(store_dir)
    check(store_dir)


def test_two_commands_and_the_python_api_write_their_own_runs_at_once(store_dir: str) -> None:
    add_to(store_dir)
    one, two = appending(store_dir), appending(store_dir)
    with xs.open(store_dir) as client:
        for n in range(10):
            feed(one, b"one%d " % n)
            feed(two, b"two%d " % n)
            client.append("a", [f"py{n} ", "th", "on"], chunked=True)
        found = sorted(client.content(finish(process)["id"]) for process in (one, two))
        assert found == [
            b"".join(b"%b%d " % (name, n) for n in range(10)) for name in (b"one", b"two")
        ]
        contents = [client.content(each) for each in client.cat(topic="a", no_chunks=True)]
        assert [c for c in contents if c not in found] == [b"py%d thon" % n for n in range(10)]
    check(store_dir)


def test_ctrl_c_ends_a_run_as_broken_off(store_dir: str) -> None:
    process = appending(store_dir)
    feed(process, b"so far")
    with xs.open(store_dir) as client:
        id_text = newest(client)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130
        process.communicate()
        assert list(client.cat())[-1].meta == {
            "chunk": id_text, "more": False, "error": chunked.BROKE_OFF,
        }  # fmt: skip
    assert no_claims(store_dir)


def test_a_claim_whose_writer_was_killed_before_it_wrote_is_left_to_gc(store_dir: str) -> None:
    process = appending(store_dir)
    until(lambda: not no_claims(store_dir))
    kill(process)
    living = appending(store_dir)
    feed(living, b"so far")
    with xs.open(store_dir) as client:
        newest(client)
    assert len(claims(store_dir)) == 2
    collect = [*XS, "gc", store_dir]
    subprocess.run(collect, check=True, stdout=subprocess.DEVNULL, env=environment())
    (left,) = claims(store_dir)
    assert claim.is_held(store_dir, left[len("run-") :])
    living.communicate(timeout=DEADLINE)
    assert no_claims(store_dir)


def test_who_ends_without_closing_a_store_leaves_no_claim_and_keeps_that_of_its_parent(
    store_dir: str,
) -> None:
    code = (
        "import os, sys, xs\n"
        "client = xs.open(sys.argv[1])\n"
        "client.append('a', ['one', 'two'], chunked=True)\n"
        "held = lambda: [name for name in os.listdir(sys.argv[1]) if name.startswith('run-')]\n"
        "if not os.fork(): sys.exit()\n"
        "os.wait()\n"
        "assert len(held()) == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, store_dir], env=environment(), capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert no_claims(store_dir)


def test_a_claim_is_held_while_its_holder_lives_and_told_from_a_dead_one_s(tmp_path: Path) -> None:
    folder = str(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from xs.claim import Claim; "
        "print(Claim(sys.argv[2]).token, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    token = process.stdout.readline().decode().strip()
    assert all(claim.is_held(folder, token) for _ in range(3))
    together(8, lambda _: check_held(folder, token))
    own = claim.Claim(folder)
    assert claim.is_held(folder, own.token)
    process.kill()
    process.communicate()
    together(8, lambda _: check_free(folder, token))
    (tmp_path / "run-").write_text("")
    (tmp_path / ("run-" + "0" * 32)).write_text("")
    claim.remove_stale(folder)
    assert sorted(os.listdir(folder)) == sorted(["run-", f"run-{own.token}"])
    own.close()
    assert not claim.is_held(folder, own.token)
    assert not claim.is_held(folder, "../" + "0" * 29)


def check_held(folder: str, token: str) -> None:
    for _ in range(50):
        assert claim.is_held(folder, token)


def check_free(folder: str, token: str) -> None:
    assert not claim.is_held(folder, token)


# ---- What counts once --------------------------------------------------------------------------


def test_a_run_counts_once_as_its_first_frame(store: Store) -> None:
    before = add(store)
    run = written(store, b"1", b"2", b"3")
    after = add(store)
    now = store.clock()

    def id_of(line: Optional[bytes]) -> Optional[str]:
        return None if line is None else frame.id_of(line)

    for patterns in (None, frozenset(("a",))):
        pieces = [f["id"] for f in pieces_of(store, run)][1:]
        assert id_of(store.index.next(ids.parse(before), patterns, now)) == run
        assert id_of(store.index.next(ids.parse(run), patterns, now)) == after
        assert id_of(store.index.prev(ids.parse(after), patterns, now)) == run
        assert id_of(store.index.last(patterns, now)) == after
        for piece in pieces:  # a place like any other
            assert id_of(store.index.next(ids.parse(piece), patterns, now)) == after
            assert id_of(store.index.prev(ids.parse(piece), patterns, now)) == run
    remove(store, after)
    assert id_of(store.index.last(None, now)) == run
    remove(store, before)
    assert id_of(store.index.first(None, now)) == run


def test_the_routes_of_a_run_s_neighbours_count_it_once(server: Server) -> None:
    def got(target: str) -> list[str]:
        body = ask(server, "GET", target).body
        return [json.loads(line)["id"] for line in body.splitlines()]

    with Wire(server.directory) as wire:
        one, two = (
            json.loads(wire.ask("POST", "/append/a.b?chunked", b"x" * 50_000).body)["id"]
            for _ in range(2)
        )
    for topic in ("a.b", "a.*"):
        assert got(f"/first/{topic}") == [one]
        assert got(f"/first/{topic}?first=5") == [one, two]
        assert got(f"/last/{topic}") == got(f"/head/{topic}") == [two]
        assert got(f"/last/{topic}?last=2") == [one, two]
        assert got(f"/next/{one}?topic={topic}") == [two]
        assert got(f"/prev/{two}?topic={topic}") == [one]
    last = frames(server, "topic=a.b")[-1]["id"]
    assert got(f"/prev/{last}") == [two]
    assert ask(server, "GET", f"/next/{last}").status == 404
    with Wire(server.directory) as wire:
        wire.send(request("GET", "/last/a.b?follow&last=1"))
        wire.head()
        assert [f["id"] for f in next_frames(wire, 1)] == [two]
        three = Writing(server, "a.b").send(b"1", b"2" * 40_000).end()["id"]
        four = json.loads(ask(server, "POST", "/append/a.b").body)["id"]
        assert [f["id"] for f in next_frames(wire, 2)] == [three, four]


def test_no_chunks_leaves_the_rest_of_a_run_out_of_history_and_of_what_is_live(
    server: Server,
) -> None:
    with Wire(server.directory) as wire:
        old = json.loads(wire.ask("POST", "/append/a?chunked", b"x" * 100_000).body)["id"]
        assert len(frames(server, "topic=a")) > 6
        plain, sse = Wire(server.directory), Wire(server.directory)
        plain.send(request("GET", "/?follow&no-chunks&topic=a"))
        sse.send(request("GET", "/?follow&no-chunks&topic=a", accept="text/event-stream"))
        everything = following(server, "follow&new&topic=a&with-content")
        for each in (plain, sse):
            each.head()
        history = plain.lines(2)
        assert [json.loads(line)["topic"] for line in history] == ["a", "xs.threshold"]
        assert json.loads(history[0])["id"] == old
        new = Writing(server).send(b"1", b"2" * 40_000).end()["id"]
        wire.ask("POST", "/append/a?chunked", b"y" * 40_000)
        after = json.loads(wire.ask("POST", "/append/a", b"z").body)
        live = next_frames(plain, 3)
        assert live[0]["id"] == new and live[-1] == after
        text = b""
        while after["id"].encode() not in text:
            text += sse.block()
        assert b'"chunk"' not in text and text.count(b"\nid: ") + text.startswith(b"id: ") == 4
        # Those that want all of it get all of it, with the content of each.
        seen: list[Any] = []
        while not seen or seen[-1]["id"] != after["id"]:
            seen += [json.loads(line) for line in everything.block().splitlines()]
        assert "".join(f.get("content", "") for f in seen) == (
            "1" + "2" * 40_000 + "y" * 40_000 + "z"
        )
        for each in (plain, sse, everything):
            each.sock.close()
    assert [f["id"] for f in frames(server, "topic=a&no-chunks&last=2")][1] == after["id"]
    assert len(frames(server, "topic=a&no-chunks=false&limit=9")) == 9


def test_a_follower_without_chunks_that_fell_behind_gets_every_event_once(server: Server) -> None:
    """What is missed is read from the index, where pieces are left out as well."""
    with Wire(server.directory) as follower, Wire(server.directory) as wire:
        follower.sock.setsockopt(1, 8, 4096)  # SO_RCVBUF
        follower.send(request("GET", "/?follow&new&no-chunks"))
        follower.head()
        expected = []
        for n in range(60):
            data = bytes([n]) * 400_000
            expected.append(json.loads(wire.ask("POST", "/append/a?chunked", data).body)["id"])
            meta = json.dumps({"pad": "x" * 50_000})
            answer = wire.ask("POST", "/append/b", b"", xs_meta=meta)
            expected.append(json.loads(answer.body)["id"])
        seen = b""
        while expected[-1].encode() not in seen:
            seen += follower.block()
    found = [json.loads(line)["id"] for line in seen.splitlines()]
    assert found == expected


def test_if_last_takes_a_run_for_its_first_frame(server: Server) -> None:
    first = Writing(server, query="&if-last=none").send(b"1", b"2").end()["id"]
    refused = Writing(server, query="&if-last=none").send(b"1").answer()
    assert refused.status == 409 and json.loads(refused.body)["id"] == first
    piece = frames(server, "topic=a")[-1]["id"]
    assert ask(server, "POST", f"/append/a?if-last={piece}").status == 409
    assert ask(server, "POST", f"/append/a?if-last={first}").status == 200


def test_a_key_makes_one_run_and_one_that_broke_off_frees_it(server: Server) -> None:
    writing = Writing(server, idempotency_key="k").send(b"half")
    id_text = first_of(server)
    other = Writing(server, idempotency_key="k").send(b"half").answer()
    assert other.status == 409 and id_text in other.body.decode()
    writing.vanish()
    until(lambda: any(f["meta"].get("error") for f in frames(server, "topic=a")))
    made = Writing(server, idempotency_key="k").send(b"whole").end()
    assert made["id"] != id_text
    again = Writing(server, idempotency_key="k").send(b"whole").answer()  # no end is waited for
    assert again.status == 200 and json.loads(again.body) == made
    assert json.loads(ask(server, "POST", "/append/a", idempotency_key="k").body) == made
    assert len(frames(server, "topic=a&no-chunks")) == 2


@pytest.mark.parametrize("way", ["removed", "superseded", "expired"])
def test_a_key_of_a_run_that_went_before_it_was_whole_is_free_again(
    store: Store, clock: Clock, way: str
) -> None:
    ttl = "time:1000" if way == "expired" else "last:1"
    run = begin(store, key="k", ttl=ttl)
    run.write(b"half")
    if way == "removed":
        remove(store, first_text(run))
    elif way == "superseded":
        add(store, ttl=ttl)
    else:
        clock.now += 2000
        assert store.run(SweepWork()) == 1
    with pytest.raises(NotFound):
        run.write(b" of it")
    made = written(store, b"all ", b"of it", key="k", ttl=ttl)
    assert made != first_text(run) and whole(store, made) == b"all of it"
    # That of one which was whole stays, as that of any frame does.
    remove(store, made)
    assert written(store, b"again", key="k", ttl=ttl) == made


def test_a_run_that_broke_off_does_not_free_its_key_again_when_it_goes(store: Store) -> None:
    broken = begin(store, key="k")
    broken.write(b"half")
    broken.break_off("it rained")
    made = written(store, b"whole", key="k")
    remove(store, first_text(broken))
    assert written(store, b"again", key="k") == made


def test_a_key_of_a_killed_writer_s_run_is_free_again(store_dir: str) -> None:
    server = start_server(store_dir)
    Writing(server, idempotency_key="k").send(b"half")
    id_text = first_of(server)
    kill(server.process)
    server = start_server(store_dir)
    assert Writing(server, idempotency_key="k").send(b"whole").end()["id"] != id_text
    server.stop()


# ---- What goes together ------------------------------------------------------------------------


def rows_of(store_dir: str) -> dict[str, int]:
    """How many rows each table has."""
    connection = sqlite3.connect(f"file:{store_dir}/xs.db?mode=ro", uri=True)
    tables = ("frame", "below", "large", "file", "run", "piece", "listed", "answered")
    found = {t: connection.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in tables}
    connection.close()
    return found


def test_removing_the_first_frame_removes_all_of_it(store: Store) -> None:
    kept = add(store, "a.b", b"kept")
    run = written(store, b"1", b"2" * PIECE_MAX, b"3", topic="a.b")
    other = written(store, b"1", b"other", topic="a.b")
    before = rows_of(store.folder)
    pieces = [f["id"] for f in pieces_of(store, run)][1:]
    for piece in pieces:
        with pytest.raises(Invalid, match=f"a part of the content that begins with {run}"):
            remove(store, piece)
    assert rows_of(store.folder) == before
    remove(store, run)
    assert [f for f in all_ids(store) if f in (run, *pieces)] == []
    for gone in (run, *pieces):
        with pytest.raises(NotFound):
            store.get(ids.parse(gone))
    with pytest.raises(NotFound):
        whole(store, run)
    assert whole(store, other) == b"1other" and whole(store, kept) == b"kept"
    remove(store, other)
    remove(store, kept)
    after = rows_of(store.folder)
    assert not any(after.values()), after


def test_a_removed_run_is_not_delivered_any_more(store: Store) -> None:
    run = begin(store)
    run.write(b"1")
    run.write(b"2")
    assert [e.line for e in store.bus.after(-1) or [] if e.line] or store.bus.after(-1) is None
    seen = [e for e in store.bus._entries if e.line]
    assert len(seen) == 2
    remove(store, first_text(run))
    assert [e for e in store.bus._entries if e.line] == []
    with pytest.raises(NotFound, match="is gone: it was removed"):
        run.write(b"3")


def test_who_writes_what_was_removed_is_told_and_readers_break_off(server: Server) -> None:
    writing = Writing(server).send(b"1")
    id_text = first_of(server)
    reading = Reading(server, id_text)
    reading.until(b"1")
    assert ask(server, "DELETE", f"/{id_text}").status == 204
    threading.Event().wait(2 * chunked.GATHER_SECONDS)
    writing.send(b"2")
    answer = writing.answer()
    assert answer.status == 404 and f"{id_text} is gone" in answer.body.decode()
    assert reading.breaks_off() == b"1"
    assert frames(server, "topic=a") == []
    assert ask(server, "DELETE", f"/{id_text}").status == 404
    check(server.directory)


def test_a_piece_can_not_be_removed_over_the_wire_and_it_is_said_why(server: Server) -> None:
    made = Writing(server).send(b"1").end()
    piece = frames(server, "topic=a")[-1]["id"]
    answer = ask(server, "DELETE", f"/{piece}")
    assert answer.status == 400 and f"begins with {made['id']}" in answer.body.decode()


def test_when_the_first_frame_s_time_has_passed_all_of_it_is_gone(
    store: Store, clock: Clock
) -> None:
    run = begin(store, ttl="time:1000", topic="a.b")
    run.write(b"1")
    clock.now += 900
    run.write(b"2")
    value = run.first or 0
    assert so_far(store, first_text(run)) == b"12"
    piece = pieces_of(store, first_text(run))[1]
    clock.now += 100
    # Nothing was swept yet, and nothing is given any more.
    assert lines(store) == lines(store, topic="a.*") == lines(store, topic="a.b") == []
    assert rows_of(store.folder)["piece"] == 1
    for gone in (value, ids.parse(piece["id"])):
        with pytest.raises(NotFound):
            store.get(gone)
    with pytest.raises(NotFound):
        store.content(piece["hash"])
    with pytest.raises(NotFound, match="its time has passed"):
        run.write(b"3")
    store.start_sweeping()
    until(lambda: not any(rows_of(store.folder).values()))


def test_last_n_takes_and_counts_whole_runs(store: Store) -> None:
    made = [written(store, b"1", b"%d" % n, b"3", ttl="last:2") for n in range(5)]
    assert all_ids(store, no_chunks=True) == made[-2:]
    assert [whole(store, each) for each in made[-2:]] == [b"133", b"143"]
    assert rows_of(store.folder)["piece"] == 4 and rows_of(store.folder)["run"] == 2
    writing = begin(store, ttl="last:2")
    writing.write(b"open")
    last = add(store, ttl="last:2")
    assert all_ids(store, no_chunks=True) == [first_text(writing), last]
    newest = add(store, ttl="last:1")
    assert all_ids(store) == [newest]
    with pytest.raises(NotFound):
        writing.end()


def test_a_run_that_is_superseded_in_its_own_commit_is_never_delivered(store: Store) -> None:
    run = begin(store, ttl="last:1")
    run.write(b"0")
    position = store.bus.newest
    extend = runsteps.RunWork(run.append, run.writer, run.first, run.last, [chunked.small(b"1")])
    found = in_one_batch(store, [extend, AppendWork(Append("a", ttl="last:1"))])
    delivered = [entry for entry in store.bus.after(position) or [] if entry.line]
    assert [entry.line for entry in delivered] == [found[1]]


def test_ids_stay_above_those_of_a_run_that_was_removed(store_dir: str) -> None:
    with xs.open(store_dir) as client:
        made = client.append("a", ["1", "2", "3"], chunked=True)
        last = list(client.cat())[-1].id
        assert client.remove(made)
        assert list(client.cat()) == []
    with xs.open(store_dir) as client:
        assert client.append("a").id > last


class Effects(Work):
    """What a handler does with one frame: a whole run, another frame, and perhaps it fails."""

    def __init__(self, store: Store, *, fails: bool) -> None:
        super().__init__()
        self.writer = store.runs.new_writer()
        self.fails = fails

    def apply(self, commit: Commit) -> str:
        commit.start_part()
        begun = Append("a", chunked.small(b"1"), '{"handler_id":"h","more":true}')
        line, is_new = runsteps.begin_run(commit, begun, self.writer)
        first = ids.parse(frame.id_of(line))
        runsteps.extend_run(commit, first, self.writer, [chunked.small(b"2"), chunked.small(b"3")])
        commit.append(Append("state"))
        runsteps.end_run(commit, first, self.writer, chunked.small(b"4"))
        if self.fails:
            commit.undo_part([])
            raise Invalid("the handler failed")
        commit.end_part()
        assert is_new
        return frame.id_of(line)


def test_a_run_may_share_its_transaction_with_other_frames_and_be_undone_with_them(
    store: Store,
) -> None:
    with pytest.raises(Invalid):
        store.run(Effects(store, fails=True))
    assert lines(store) == [] and not any(rows_of(store.folder).values())
    made = store.run(Effects(store, fails=False))
    assert whole(store, made) == b"1234"
    assert [frame.topic_of(line) for line in lines(store)] == ["a", "a", "a", "state", "a"]
    with pytest.raises(Invalid, match="ends with"):
        store.run(runsteps.RunWork(Append("a"), store.runs.new_writer(), None, None, []))


# ---- Whose a run is: the store's tables, not what a frame looks like ---------------------------


def test_a_frame_made_by_hand_is_no_part_of_a_run(store: Store) -> None:
    run = written(store, b"1", b"2")
    more = f'{{"chunk":"{run}","more":true}}'
    by_hand = add(store, data=b"forged", meta=more)
    elsewhere = add(store, "b", data=b"forged", meta=more)
    assert whole(store, run) == b"12"
    assert all_ids(store, no_chunks=True) == [run, by_hand, elsewhere]
    assert frame.id_of(store.index.last(frozenset("a"), store.clock()) or b"") == by_hand
    alone = add(store, data=b"no run", meta='{"more":true}')
    assert whole(store, alone) == b"no run"
    nested = add(store, meta='{"x":{"more":true}}', data=b"no run")
    assert whole(store, nested) == b"no run"
    remove(store, run)
    assert set(all_ids(store)) == {by_hand, elsewhere, alone, nested}
    remove(store, by_hand)


def test_by_hand_nothing_is_appended_that_looks_like_part_of_what_is_not_whole(
    store: Store,
) -> None:
    run = begin(store)
    run.write(b"1")
    for text in (
        f'{{"chunk":"{first_text(run)}","more":true}}',
        f'{{"more":false,"x":1,"chunk":"{first_text(run).upper()}"}}',
    ):
        with pytest.raises(Invalid, match="is not whole yet"):
            add(store, meta=text)
        add(store, "b", meta=text)  # on another topic it is nothing
        results = store.run(chunked_batch([Append("a", meta=text), Append("a")]))
        assert isinstance(results[0], Invalid) and isinstance(results[1], bytes)
    for text in (f'{{"chunk":"{first_text(run)}"}}', '{"chunk":"x","more":true}', '["chunk"]'):
        add(store, meta=text)
    run.end(b"2")
    assert whole(store, first_text(run)) == b"12"


def test_by_hand_nothing_is_appended_that_would_make_a_run_of_another_frame_in_a_copy(
    store: Store, other: Store
) -> None:
    """A copy knows runs by their frames' meta, also those that nobody has written as one."""
    alone = add(store, data=b"A", meta='{"x":"y","more":true}')
    for more in ("true", "false"):
        with pytest.raises(Invalid, match="leave chunk out of meta"):
            add(store, data=b"B", meta=f'{{"chunk":"{alone}","more":{more}}}')
    elsewhere = add(store, "b", b"B", meta=f'{{"chunk":"{alone}","more":false}}')
    plain = add(store, meta='{"more":false}')
    of_plain = add(store, meta=f'{{"chunk":"{plain}","more":true}}')
    assert import_lines(other, exported(store)) == []
    assert lines(other, no_chunks=True) == lines(store, no_chunks=True) == lines(store)
    for each in (alone, plain):
        remove(other, each)
    assert all_ids(other) == [elsewhere, of_plain]


def test_a_refused_import_makes_no_run_of_the_frame_that_it_names(store: Store) -> None:
    alone = add(store, data=b"A", meta='{"more":true}')
    value = ids.parse(alone)
    meta = f'{{"chunk":"{alone}","more":true}}'
    missing = imported(value + 5, data=b"missing", meta=meta)._replace(content=None)
    wrong = imported(value + 6, data=b"right", meta=meta)._replace(content=small(b"wrong"))
    assert all(isinstance(each, Invalid) for each in import_all(store, [missing, wrong]))
    assert whole(store, alone) == b"A"
    assert rows_of(store.folder)["run"] == 0
    (joined,) = import_all(store, [imported(value + 7, data=b"B", meta=meta)])
    assert isinstance(joined, bytes)
    assert so_far(store, alone) == b"AB"


def chunked_batch(appends: list[Append]) -> Any:
    from xs.bulk import BatchWork

    return BatchWork(list(appends))


def test_a_step_that_is_done_again_does_nothing(store: Store) -> None:
    """As after a server that has done it, and was killed before it could say so."""
    run = begin(store, key="k")
    two = [chunked.small(b"2"), chunked.small(b"3")]

    def work(*args: Any, **more: Any) -> runsteps.RunWork:
        return runsteps.RunWork(run.append, run.writer, *args, **more)

    def step(*args: Any, **more: Any) -> Any:
        found = store.run(work(*args, **more))
        before = lines(store)
        assert store.run(work(*args, **more)) == found
        assert lines(store) == before
        return found

    begun = step(None, None, [chunked.small(b"1")])
    assert begun.first == begun.last
    more = step(begun.first, begun.last, two)
    step(begun.first, more.last, [], ended=True)
    assert whole(store, ids.text(begun.first)) == b"123"
    with pytest.raises(Conflict):  # it has ended, and not like that
        step(begun.first, more.last, [], ended=True, error_text="no")
    with pytest.raises(Conflict):
        step(begun.first, more.last, two)


def test_another_writer_can_not_go_on_with_a_run(store: Store) -> None:
    run = begin(store)
    run.write(b"1")
    work = runsteps.RunWork(run.append, "0" * 32, run.first, run.last, [chunked.small(b"2")])
    with pytest.raises(Conflict, match="is not being written any more"):
        store.run(work)
    run.end()
    with pytest.raises(Conflict, match="is not being written any more"):
        run.write(b"2")
    assert whole(store, first_text(run)) == b"1"


# ---- Copies ------------------------------------------------------------------------------------


def exported(store: Store) -> list[bytes]:
    return lines(store, with_content=True)


def import_lines(store: Store, given: list[bytes]) -> list[Any]:
    from xs import batch

    answer = json.loads(batch.import_lines(store, [b"\n".join(given) + b"\n"]))
    return list(answer["errors"])


@pytest.fixture
def other(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    opened = Store(str(tmp_path / "other"), exclusive=True, create=True, clock=clock)
    yield opened
    found = problems(opened)
    opened.close()
    assert found == []


def test_a_copy_has_the_same_runs(store: Store, other: Store) -> None:
    add(store, "a")
    one = written(store, b"1", b"2", b"3", topic="a.b", meta='{"q":1}')
    broken = begin(store, "a.b")
    broken.write(b"half")
    broken.write(b" of")
    broken.break_off("it rained")
    forged = add(store, "a.b", b"forged", meta=f'{{"chunk":"{one}","more":true}}')
    two = begin(store, "a")
    two.write(b"not ")
    two.write(b"whole")
    given = exported(store)
    for _ in range(2):  # the same again changes nothing
        assert import_lines(other, given) == []
        assert lines(other) == lines(store)
        assert lines(other, no_chunks=True) == lines(store, no_chunks=True)
        for pattern in ("a", "a.*", "a.b"):
            assert lines(other, topic=pattern) == lines(store, topic=pattern)
    assert whole(other, one) == b"123" and whole(other, forged) == b"forged"
    for copy, said in ((first_text(broken), "broke off"), (first_text(two), "nobody goes on")):
        with pytest.raises(BrokenBody, match=said):
            whole(other, copy)
    assert so_far(other, first_text(broken)) == b"half of"
    assert so_far(other, first_text(two)) == b"not whole"
    # What was not whole is completed by a later copy, also when it was looked at meanwhile.
    other.runs.end_abandoned()
    two.end(b" now")
    assert import_lines(other, exported(store)) == []
    assert lines(other) == lines(store)
    assert whole(other, first_text(two)) == b"not whole now"
    remove(other, one)
    assert one not in str(lines(other, topic="a.b", no_chunks=True)[0])
    assert problems(other) == []


def test_an_exported_folder_keeps_runs(tmp_path: Path, run_xs: Any) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    with xs.open(one) as client:
        run = client.append("a", ["tok", b"en\xff", "s" * 70_000], chunked=True)
        client.append("b", "plain")
    for args in (["export", one, str(tmp_path / "out")], ["import", two, str(tmp_path / "out")]):
        done = run_xs(args)
        assert done.returncode == 0, done.stderr
    with xs.open(one) as old, xs.open(two) as new:
        assert list(old.cat()) == list(new.cat())
        assert new.content(run) == old.content(run) == b"token\xff" + b"s" * 70_000
        assert new.last("a") == run
    check(two)


def test_a_run_may_be_imported_with_contents_of_any_size_and_bits_at_a_time(store: Store) -> None:
    """Pieces that another program made: with files for contents, and long words for errors."""
    large = b"L" * 100_000
    value = next(FIRST_IDS)
    first = ids.text(value)
    metas = ['{"more":true}'] + [f'{{"chunk":"{first}","more":true}}'] * 3
    metas.append(f'{{"error":"{"e" * 9000}","chunk":"{first.upper()}","more":false}}')
    made = []
    for n, (meta, data) in enumerate(zip(metas, [large, b"1", large, b"2", b"end"])):
        content = store.cas.take([data])
        assert content is not None
        made.append(Imported(value + (n << 33), "a.b", content.hash, meta, "time:5000000", content))
    for each in made:
        (result,) = import_all(store, [each])
        assert isinstance(result, bytes)
    assert so_far(store, first) == large + b"1" + large + b"2" + b"end"
    assert problems(store) == []
    assert len(lines(store, topic="a.*")) == 5 and len(lines(store, no_chunks=True)) == 1
    piece = frame.hash_text(lines(store)[2])
    assert b"".join(store.content(piece or "")[1]) == large
    assert store.gc(0.0) == (0, 0)
    remove(store, first)
    assert not any(rows_of(store.folder).values())
    assert list(store.cas.digests()) == []


def test_an_imported_frame_joins_a_run_only_in_its_place(store: Store) -> None:
    value = next(FIRST_IDS)
    first = ids.text(value)

    def give(at: int, meta: str, topic: str = "a") -> None:
        (result,) = import_all(store, [imported(value + at, topic, b"%d" % at, meta=meta)])
        assert isinstance(result, bytes), result

    more, end = f'{{"chunk":"{first}","more":true}}', f'{{"chunk":"{first}","more":false}}'
    give(10, more)  # before its first frame is here: it is no part of it
    give(0, '{"more":true}')
    give(20, more)
    give(30, more, "b")  # another topic
    give(40, end)
    give(50, more)  # behind the end
    give(15, more)
    give(-5, more)  # before the beginning
    assert whole(store, first) == b"0" + b"15" + b"20" + b"40"
    assert len(lines(store, no_chunks=True)) == 5
    plain = next(FIRST_IDS)
    assert isinstance(import_all(store, [imported(plain, meta='{"more":false}')])[0], bytes)
    meta = f'{{"chunk":"{ids.text(plain)}","more":true}}'
    assert isinstance(import_all(store, [imported(plain + 1, meta=meta)])[0], bytes)
    assert whole(store, ids.text(plain)) == b""


def test_nothing_is_imported_into_a_run_while_it_is_written_here(store: Store) -> None:
    run = begin(store)
    run.write(b"1")
    meta = f'{{"chunk":"{first_text(run)}","more":true}}'
    (result,) = import_all(store, [imported((run.first or 0) + 5, data=b"x", meta=meta)])
    assert isinstance(result, Conflict) and "is being written here" in str(result)
    run.end()
    assert whole(store, first_text(run)) == b"1"


def test_imports_amid_a_run_find_their_place_and_move_it(store: Store) -> None:
    """Frames of one millisecond are spread anew, those of runs with them."""
    run = begin(store, "a.b")
    for n in range(20):
        run.write(b"%d " % n)
    value = run.first or 0
    chance = random.Random(7)
    others = []
    for _ in range(200):
        new = value + chance.randrange(1, 25 << 32)
        (result,) = import_all(store, [imported(new, "a.c")])
        if isinstance(result, bytes):
            others.append(new)
    run.end(b"end")
    expected = b"".join(b"%d " % n for n in range(20)) + b"end"
    assert whole(store, first_text(run)) == expected
    found = [ids.parse(each) for each in all_ids(store)]
    assert found == sorted(found) and set(others) <= set(found)
    assert all_ids(store, topic="a.*") == all_ids(store)
    assert len(all_ids(store, topic="a.b")) == 21
    for count in (1, 7, 100):
        assert all_ids(store, last=count) == [ids.text(each) for each in found[-count:]]


# ---- Check -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DELETE FROM run", "continues a run that is not there"),
        ("DELETE FROM frame WHERE row IN (SELECT row FROM run)", "a run has no first frame"),
        ("DELETE FROM listed", "is not listed under its topics"),
        ("INSERT INTO listed VALUES (1, 5)", "is listed as one that continues a run, and is none"),
        ("UPDATE piece SET expires = 1", "with another time to live"),
        ("UPDATE piece SET json = replace(json, 'chunk', 'hunk')", "without naming it"),
        ("UPDATE piece SET content = x'00' WHERE content IS NOT NULL", "don't match"),
        ("UPDATE piece SET digest = NULL", "neither beside it nor named as a file"),
        ("UPDATE run SET writer = 'x'", "is being written and has ended"),
        ("INSERT OR REPLACE INTO frame SELECT row, 1, NULL, sum, json, NULL, NULL FROM piece",
         "has the place of another"),
    ],
)  # fmt: skip
def test_check_finds_what_is_wrong_with_a_run(store_dir: str, damage: str, said: str) -> None:
    store = Store(store_dir, exclusive=True, create=True)
    written(store, b"1", b"2", b"3")
    assert problems(store) == []
    store.close()
    connection = sqlite3.connect(f"{store_dir}/xs.db")
    connection.execute(damage)
    connection.commit()
    connection.close()
    store = Store(store_dir)
    assert said in " ".join(problems(store))
    store.close()


def test_a_flipped_byte_in_a_piece_is_never_served(server: Server) -> None:
    made = Writing(server).send(b"first").end()
    writing = Writing(server, "b").send(b"first")
    damaged = first_of(server, "b")
    Reading(server, damaged).until(b"first")
    threading.Event().wait(2 * chunked.GATHER_SECONDS)
    writing.send(b"second")
    writing.end()
    server.stop()
    connection = sqlite3.connect(f"{server.directory}/xs.db")
    connection.execute("UPDATE piece SET content = x'78' WHERE content = ?", (b"second",))
    connection.commit()
    connection.close()
    with xs.open(server.directory) as client:
        assert client.content(made["id"]) == b"first"
        found = b""
        with pytest.raises(XsError, match="damaged"):
            for block in client.content_blocks(damaged):
                found += block
        assert found == b"first"


# ---- The command line and Python ---------------------------------------------------------------


def test_a_command_makes_a_run_on_files_and_at_a_server(store_dir: str, run_xs: Any) -> None:
    for turn in ("files", "server"):
        server = start_server(store_dir) if turn == "server" else None
        try:
            meta = '{"model": "m"}'
            done = run_xs(["append", store_dir, turn, "--chunked", "--meta", meta], stdin="a\nb\n")
            assert done.returncode == 0, done.stderr
            made = json.loads(done.stdout)
            assert made["meta"] == {"model": "m", "more": True}
            assert run_xs(["content", store_dir, made["id"]]).stdout == b"a\nb\n"
            lines = run_xs(["cat", store_dir, "--no-chunks", "-T", turn]).stdout.splitlines()
            assert [json.loads(line) for line in lines] == [made]
            assert json.loads(run_xs(["last", store_dir, turn]).stdout) == made
            assert len(run_xs(["cat", store_dir, "-T", turn]).stdout.splitlines()) == 2
            piece = json.loads(run_xs(["cat", store_dir, "-T", turn]).stdout.splitlines()[-1])
            refused = run_xs(["remove", store_dir, piece["id"]])
            assert refused.returncode == 1 and b"a part of the content" in refused.stderr
            assert run_xs(["remove", store_dir, made["id"]]).returncode == 0
            assert run_xs(["cat", store_dir, "-T", turn]).stdout == b""
        finally:
            if server is not None:
                server.stop()


@pytest.mark.parametrize("with_server", [False, True])
def test_the_output_of_a_command_comes_as_the_input_of_another_does(
    store_dir: str, with_server: bool
) -> None:
    add_to(store_dir)
    server = start_server(store_dir) if with_server else None
    try:
        writer = appending(store_dir)
        feed(writer, b"one ")
        with xs.open(store_dir) as client:
            id_text = newest(client)
        readers = [
            subprocess.Popen(
                [*XS, "content", store_dir, id_text],
                stdout=subprocess.PIPE,
                env=environment(),
                bufsize=0,
            )
            for _ in range(2)
        ]
        for reader in readers:
            assert reader.stdout is not None and reader.stdout.read(4) == b"one "
        feed(writer, b"two ")
        for reader in readers:
            assert reader.stdout is not None and reader.stdout.read(4) == b"two "
        # One that reads no more ends, though nothing is written that it would notice by.
        assert readers[1].stdout is not None
        readers[1].stdout.close()
        assert readers[1].wait(DEADLINE) == 0
        feed(writer, b"three")
        assert finish(writer)["id"] == id_text
        assert readers[0].communicate(timeout=DEADLINE)[0] == b"three"
        assert readers[0].returncode == 0
    finally:
        if server is not None:
            server.stop()


def test_a_content_that_broke_off_is_an_error_after_what_came(store_dir: str, run_xs: Any) -> None:
    with xs.open(store_dir) as client:
        with pytest.raises(ZeroDivisionError):
            client.append("a", (b"x" if n else 1 // 0 for n in (1, 0)), chunked=True)  # type: ignore[misc]
        id_text = newest(client)
    for _ in range(2):
        done = run_xs(["content", store_dir, id_text])
        assert (done.stdout, done.returncode) == (b"x", 1)
        assert b"broke off" in done.stderr
        server = start_server(store_dir)
        done = run_xs(["content", store_dir, id_text])
        assert (done.stdout, done.returncode) == (b"x", 1)
        server.stop()


@pytest.mark.parametrize("way", ["--lines", "--json"])
def test_chunked_goes_with_no_other_way_to_append(store_dir: str, run_xs: Any, way: str) -> None:
    done = run_xs(["append", store_dir, "a", "--chunked", way], stdin="x")
    assert done.returncode == 2 and b"can't go together" in done.stderr


def test_what_is_refused_makes_no_store(store_dir: str, run_xs: Any) -> None:
    for options in (["--meta", "[]"], ["--meta", '{"more":1}'], ["--ttl", "ephemeral"]):
        done = run_xs(["append", store_dir, "a", "--chunked", *options], stdin="x")
        assert done.returncode == 1, done.stdout
        assert not os.path.exists(os.path.join(store_dir, "xs.db"))


@pytest.mark.parametrize("with_server", [False, True])
def test_python_writes_as_it_has_something_and_reads_as_it_comes(
    store_dir: str, with_server: bool
) -> None:
    add_to(store_dir)
    server = start_server(store_dir) if with_server else None
    said = threading.Semaphore(1)

    def tokens() -> Iterator[Union[str, bytes]]:
        for n in range(10):
            assert said.acquire(timeout=DEADLINE)
            yield f"tökén{n} " if n % 2 else f"tökén{n} ".encode()

    try:
        with xs.open(store_dir) as client, xs.open(store_dir) as reader:
            made: list[Any] = []
            writing = threading.Thread(
                target=lambda: made.append(client.append("a", tokens(), chunked=True))  # type: ignore[arg-type]
            )
            writing.start()
            id_text = newest(reader)
            text = b""
            for block in reader.content_blocks(id_text):
                assert block
                text += block
                said.release()  # the next one comes only when this one was read
            writing.join(DEADLINE)
            assert text.decode() == "".join(f"tökén{n} " for n in range(10))
            assert made[0].id == id_text and made[0].meta == {"more": True}
            assert reader.content(made[0]) == text
            assert list(reader.cat(topic="a", no_chunks=True)) == made
            assert len(list(reader.cat(topic="a"))) > 5
    finally:
        if server is not None:
            server.stop()


def test_python_gives_every_kind_of_content_chunked(store_dir: str, tmp_path: Path) -> None:
    with xs.open(store_dir) as client:
        path = tmp_path / "file"
        path.write_bytes(b"file" * 50_000)
        pipe = subprocess.Popen(["printf", "pi\npe"], stdout=subprocess.PIPE)
        text = subprocess.Popen(["printf", "te\nxt"], stdout=subprocess.PIPE, text=True)
        assert pipe.stdout is not None and text.stdout is not None
        with open(path, "rb") as file, open(path, "rb", buffering=0) as raw:
            given: list[tuple[Any, bytes]] = [
                (None, b""), ("text", b"text"), (b"bytes", b"bytes"), (bytearray(b"x"), b"x"),
                (file, b"file" * 50_000), (raw, b"file" * 50_000), (pipe.stdout, b"pi\npe"),
                (text.stdout, b"te\nxt"), ([b"", "ü", b"\xff"], "ü".encode() + b"\xff"), ([], b""),
            ]  # fmt: skip
            for content, data in given:
                made = client.append("a", content, chunked=True)
                assert client.content(made) == data
        for process in (pipe, text):
            process.communicate()
        with pytest.raises(Invalid, match="an iterable of bytes, not 1"):
            client.append("a", [1], chunked=True)  # type: ignore[list-item]
    check(store_dir)


# ---- Formats -----------------------------------------------------------------------------------


def make_older(store_dir: str) -> list[bytes]:
    """A store as it was before there were scripts, runs and sums; its lines."""
    with xs.open(store_dir) as client:
        for n in range(5):
            client.append("a.b", f"content {n}")
        before = [json.dumps(each._asdict()).encode() for each in client.cat()]
    connection = sqlite3.connect(f"{store_dir}/xs.db")
    connection.execute("DROP INDEX topic_script")
    for table in ("script", "run", "piece", "listed"):
        connection.execute(f"DROP TABLE {table}")
    for table in ("frame", "answered"):
        connection.execute(f"ALTER TABLE {table} RENAME TO made_{table}")
    for name in ("frame_topic", "frame_digest", "frame_expires"):
        connection.execute(f"DROP INDEX {name}")
    for statement in schema._SCHEMA_1.split(";\n"):
        if "TABLE answered" in statement or " frame" in statement:
            connection.execute(statement)
    connection.execute(
        "INSERT INTO frame SELECT row, topic, digest, json, content, expires FROM made_frame"
    )
    connection.execute("INSERT INTO answered SELECT topic, key, json FROM made_answered")
    for table in ("frame", "answered"):
        connection.execute(f"DROP TABLE made_{table}")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    return before


def test_a_store_of_the_format_before_is_brought_up_and_keeps_everything(store_dir: str) -> None:
    before = make_older(store_dir)
    with xs.open(store_dir) as client:
        assert [json.dumps(each._asdict()).encode() for each in client.cat()] == before
        made = client.append("a.b", ["1", "2"], chunked=True)
        assert client.content(made) == b"12"
    check(store_dir)
    connection = sqlite3.connect(f"{store_dir}/xs.db")
    assert connection.execute("PRAGMA user_version").fetchone() == (schema.FORMAT,)
    connection.close()


def test_an_older_store_that_may_only_be_read_is_refused_with_what_would_help(
    store_dir: str,
) -> None:
    make_older(store_dir)
    with pytest.raises(XsError, match="open it once where it can"):
        connections.Connections(store_dir, read_only=True)


# ---- The cost ----------------------------------------------------------------------------------


def test_nothing_that_counts_a_run_once_goes_through_its_frames(store: Store) -> None:
    """Neither do reads that pass over its topic, however long it is."""
    before = add(store, "a.b")
    run = begin(store, "a.b")
    pieces = [chunked.small(b"x")] * 2000
    run.write(b"x")
    for _ in range(10):
        work = runsteps.RunWork(run.append, run.writer, run.first, run.last, pieces)
        run.last = store.run(work).last
    now = store.clock()
    first = run.first or 0
    for patterns in (None, frozenset(("a.b",)), frozenset(("a.*",)), frozenset(("a.b", "a.*"))):
        for act in (
            lambda p=patterns: store.index.last(p, now),
            lambda p=patterns: store.index.first(p, now),
            lambda p=patterns: store.index.next(ids.parse(before), p, now),
            lambda p=patterns: store.index.next(first, p, now),
            lambda p=patterns: store.index.prev(ids.MAX, p, now),
            lambda p=patterns: store.index.start_of_last(p, 5, -1, None, now, chunks=False),
            lambda p=patterns: store.index.start_of_last(p, 5, -1, None, now),
            lambda p=patterns: store.index.walk(p, chunks=False).page(-1, None, 1000, now),
            lambda p=patterns: store.index.walk(p).page(first + 1, None, 5, now),
        ):  # type: ignore[misc]
            assert steps_of(store, act) < 20
    assert steps_of(store, lambda: store.index.walk(frozenset("b")).page(-1, None, 1000, now)) < 20
    # And a whole read costs each frame about once.
    whole = steps_of(store, lambda: lines(store))
    assert whole < 20_000
    assert len(lines(store)) == 20_002
    remove(store, first_text(run))
    assert all_ids(store) == [before]


# ---- Against a model ---------------------------------------------------------------------------

TOPICS = ["a", "a.b", "b"]
PATTERNS = [None, "a", "a.b", "a.*", "b", "a.b,a.*", "a.*,b", "c"]


class Model:
    """A store in plain words: a list of events, each a list of frames."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def live(self, now: int) -> list[dict[str, Any]]:
        return [e for e in self.events if e["expires"] is None or e["expires"] > now]

    def selected(self, pattern: Optional[str], now: int) -> list[dict[str, Any]]:
        patterns = None if pattern is None else frame.parse_patterns(pattern)
        return [e for e in self.live(now) if frame.matches(patterns, e["topic"])]

    def events_of(self, pattern: Optional[str], now: int) -> list[int]:
        return sorted(e["frames"][0] for e in self.selected(pattern, now))

    def frames_of(self, pattern: Optional[str], now: int) -> list[int]:
        return sorted(f for e in self.selected(pattern, now) for f in e["frames"])


ACTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["plain", "begin", "begin", "write", "write", "write", "end", "break", "remove",
             "last", "tick", "import", "reopen"]
        ),
        st.integers(0, 5),
    ),
    min_size=5,
    max_size=60,
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(ACTS, st.integers(0, 3))
def test_every_read_agrees_with_a_plain_model(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, int]], page_rows: int
) -> None:
    folder = str(tmp_path_factory.mktemp("model") / "store")
    clock = Clock()
    model = Model()
    writing: list[tuple[Run, dict[str, Any]]] = []
    store = Store(folder, exclusive=True, create=True, clock=clock)
    kept = walk.PAGE_ROWS
    walk.PAGE_ROWS = [kept, 1, 2, 3][page_rows]  # pages end amid runs
    try:
        for act, n in acts:
            store = do(store, clock, model, writing, act, n)
            compare(store, clock.now, model, n)
        found = problems(store)
        assert found == []
    finally:
        walk.PAGE_ROWS = kept
        store.close()


def do(
    store: Store,
    clock: Clock,
    model: Model,
    writing: list[tuple[Run, dict[str, Any]]],
    act: str,
    n: int,
) -> Store:
    topic = TOPICS[n % 3]
    newest = store.newest()
    event: dict[str, Any] = {"topic": topic, "expires": None, "frames": [], "data": b"%d" % n}
    if act in ("plain", "last"):
        ttl = f"last:{n + 1}" if act == "last" else "forever"
        event["frames"] = [ids.parse(add(store, topic, b"%d" % n, ttl=ttl))]
        model.events.append(event)
        if act == "last":
            mine = [e for e in model.live(clock.now) if e["topic"] == topic]
            for gone in sorted(mine, key=lambda e: e["frames"][0])[: -(n + 1)]:
                model.events.remove(gone)
    elif act == "begin":
        ttl = "time:30" if n == 5 else "forever"
        run = begin(store, topic, ttl=ttl)
        run.write(b"%d" % n)
        event["frames"] = [run.first]
        event["expires"] = clock.now + 30 if n == 5 else None
        model.events.append(event)
        writing.append((run, event))
    elif act in ("write", "end", "break") and writing:
        run, event = writing[n % len(writing)]
        try:
            if act == "write":
                run.write(b"w%d" % n)
            elif act == "end":
                run.end(b"e%d" % n)
            else:
                run.break_off("no more")
        except NotFound:
            assert event not in model.live(clock.now)
            writing.remove((run, event))
            return store
        if event not in model.live(clock.now):
            assert act == "break"  # of what is gone, nothing is said
            writing.remove((run, event))
            return store
        event["frames"].append(store.newest())
        assert store.newest() > newest
        event["data"] += {"write": b"w%d" % n, "end": b"e%d" % n, "break": b""}[act]
        if act != "write":
            writing.remove((run, event))
    elif act == "remove" and model.live(clock.now):
        event = model.live(clock.now)[n % len(model.live(clock.now))]
        if n % 2 and len(event["frames"]) > 1:
            with pytest.raises(Invalid):
                remove(store, ids.text(event["frames"][-1]))
        remove(store, ids.text(event["frames"][0]))
        model.events.remove(event)
    elif act == "tick":
        clock.now += n
    elif act == "import":
        base = store.newest() if n % 2 else ids.first_of(clock.now - 7 * n)
        value = base + n * 1000 + 1
        meta = '{"more":true}'
        data = [b"i", b"m", b"p"][: n % 3 + 1]
        for each in data:
            if any(value == f for e in model.events for f in e["frames"]):
                break
            (result,) = import_all(store, [imported(value, topic, each, meta=meta)])
            assert isinstance(result, bytes), result
            event["frames"].append(value)
            meta = f'{{"chunk":"{ids.text(event["frames"][0])}","more":true}}'
            value += 7
        event["data"] = b"".join(data[: len(event["frames"])])
        if event["frames"]:
            model.events.append(event)
    elif act == "reopen":
        for run, event in writing:
            if event in model.live(clock.now):
                run.break_off("closed")
                event["frames"].append(store.newest())
        writing.clear()
        store.close()
        store = Store(store.folder, exclusive=True, clock=clock)
        store.runs.end_abandoned()
    return store


def compare(store: Store, now: int, model: Model, n: int) -> None:
    for pattern in PATTERNS:
        patterns = None if pattern is None else frame.parse_patterns(pattern)
        events, everything = model.events_of(pattern, now), model.frames_of(pattern, now)
        first = store.index.first(patterns, now)
        last = store.index.last(patterns, now)
        assert [ids.parse(frame.id_of(line)) for line in (first, last) if line] == (
            [events[0], events[-1]] if events else []
        )
        options = {} if pattern is None else {"topic": pattern}
        assert [ids.parse(each) for each in all_ids(store, **options)] == everything
        assert [ids.parse(each) for each in all_ids(store, no_chunks=True, **options)] == events
        count = n + 1
        assert [ids.parse(i) for i in all_ids(store, last=count, **options)] == everything[-count:]
        newest = all_ids(store, last=count, no_chunks=True, **options)
        assert [ids.parse(each) for each in newest] == events[-count:]
        with_content = [frame.id_of(x) for x in lines(store, with_content=True, **options)]
        assert [ids.parse(each) for each in with_content] == everything
        places = model.frames_of(None, now)
        for place in places[:: max(1, len(places) // 5)]:
            for line, expected in (
                (store.index.next(place, patterns, now), [e for e in events if e > place][:1]),
                (store.index.prev(place, patterns, now), [e for e in events if e < place][-1:]),
            ):
                assert ([] if line is None else [ids.parse(frame.id_of(line))]) == expected
    for event in model.live(now)[-3:]:
        assert so_far(store, ids.text(event["frames"][0])) == event["data"]


def test_whose_a_run_is_can_be_asked_while_the_store_closes(tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            found = runs.Runs(str(tmp_path), lambda work: None)
            writer = found.new_writer()
            together(2, lambda n, found=found, w=writer: found.close() if n else found.is_own(w))
    finally:
        sys.setswitchinterval(interval)
