"""A client that is alone appends in the same words again and again: the short way of that.

It gives, stores and delivers what the way of all others does; what it can't do, that one does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from conftest import DEADLINE, Server, start_server, until
from stores import Gate, add, content, lines, problems
from test_disk_faults import failing, wait_until_traced
from wire import Answer, Wire, request

import xs
from xs import frame, ids, tokens
from xs.commit import Append, is_plain
from xs.content import small
from xs.errors import NoMemory, Unavailable
from xs.store import Store

PLAIN = Append("a.b.c")

# Where a server dies on this way, and how many frames there are then that it has not answered.
POINTS = [
    ("alone.begun", 0),
    ("alone.applied", 0),
    ("alone.before-fsync", 0),
    ("alone.durable", 1),
    ("alone.before-delivery", 1),
    ("alone.before-answer", 1),
]


@pytest.fixture
def store(store_dir: str) -> Iterator[Store]:
    with contextlib.closing(Store(store_dir, exclusive=True, create=True)) as found:
        yield found


def alone(store: Store, data: bytes = b"", append: Append = PLAIN) -> bytes | None:
    return store.group.append_alone(append, small(data) if data else None)


# In a store


def test_what_is_appended_alone_is_stored_and_delivered_as_all_else_is(store: Store) -> None:
    add(store, "a.b.c", b"first")
    before = store.bus.newest
    with_meta = Append("other", None, '{"n":[1,2]}')
    made = [alone(store, b"second"), alone(store, b""), alone(store, b"x", with_meta)]
    assert None not in made
    assert lines(store)[1:] == made
    assert lines(store, topic="a.b.*")[1:] == made[:2]
    entries = store.bus.after(before)
    assert entries is not None and [entry.line for entry in entries] == made
    assert [entry.topic for entry in entries] == ["a.b.c", "a.b.c", "other"]
    second, empty, third = (json.loads(line) for line in made if line)
    assert (second["meta"], second["ttl"], empty["hash"]) == (None, "forever", None)
    assert third["meta"] == {"n": [1, 2]}
    assert content(store, second["id"]) == b"second" and content(store, third["id"]) == b"x"
    assert second["id"] < empty["id"] < third["id"]
    assert b"".join(store.content(second["hash"])[1]) == b"second"
    assert problems(store) == []


def test_it_is_alone_or_nothing_is_done(store: Store) -> None:
    assert alone(store, b"too early") is None  # nobody has opened the store for writing
    add(store, "a")
    gate = Gate()
    thread = threading.Thread(target=store.run, args=(gate,))
    thread.start()
    assert gate.entered.wait(DEADLINE)
    assert alone(store, b"beside another") is None
    gate.opened.set()
    thread.join(DEADLINE)
    assert alone(store, b"alone") is not None
    assert len(lines(store)) == 2
    store.close()
    assert alone(store, b"too late") is None


def test_those_who_come_meanwhile_are_done_behind_it(store: Store) -> None:
    """Many threads at once, each in either way."""
    add(store, "a")
    made: list[bytes] = []

    def append(n: int) -> None:
        for k in range(60):
            line = alone(store, b"%d.%d" % (n, k)) if (n + k) % 2 else None
            made.append(line or store.append(Append("a", small(b"%d.%d" % (n, k)))))

    threads = [threading.Thread(target=append, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE * 3)
        assert not thread.is_alive()
    assert sorted(made) == sorted(lines(store)[1:]) and len(made) == 240
    assert [frame.id_of(line) for line in lines(store)] == sorted(map(frame.id_of, lines(store)))
    assert problems(store) == []


@pytest.mark.parametrize("ahead", [0, 50_000], ids=["before", "behind"])
def test_what_another_process_has_written_is_acted_upon_by_the_next(
    store: Store, store_dir: str, ahead: int
) -> None:
    """Somebody has removed the lock's file, and so another one could write."""
    add(store, "a")
    os.unlink(os.path.join(store_dir, "lock"))
    with contextlib.closing(Store(store_dir, clock=lambda: store.clock() + ahead)) as other:
        theirs = add(other, "theirs")
    assert alone(store, b"mine") is None
    assert alone(store, b"mine") is None
    mine = add(store, "mine")
    assert mine > theirs
    assert [frame.id_of(line) for line in lines(store)][1:] == [theirs, mine]
    assert store.bus.after(ids.parse(theirs) - 1) is None  # who follows goes to the index
    assert alone(store, b"again") is not None


def test_what_another_process_has_written_is_remembered_until_a_commit_is_through(
    store: Store, store_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, "a")
    os.unlink(os.path.join(store_dir, "lock"))
    with contextlib.closing(Store(store_dir)) as other:
        theirs = add(other, "theirs")
    writer = store.group._committer._writer
    assert writer is not None
    monkeypatch.setattr(writer, "append", without_memory(writer.append))
    with pytest.raises(NoMemory):
        add(store, "mine")
    assert alone(store, b"mine") is None
    add(store, "mine")
    assert [frame.topic_of(line) for line in lines(store)] == ["a", "theirs", "mine"]
    assert store.bus.after(ids.parse(theirs) - 1) is None  # who follows goes to the index
    assert alone(store, b"again") is not None


def test_a_store_that_was_replaced_is_not_written_to(store: Store, store_dir: str) -> None:
    add(store, "a")
    path = os.path.join(store_dir, "xs.db")
    os.rename(path, path + ".away")
    assert alone(store, b"lost") is None
    with pytest.raises(Unavailable):
        add(store, "a")
    os.rename(path + ".away", path)
    assert alone(store, b"kept") is not None


def without_memory(act: Callable[..., Any], *, behind: bool = False) -> Callable[..., Any]:
    """The same, but for the first time: then there is no memory, before it is done or behind."""
    is_first = [True]

    def fails(*asked: Any, **more: Any) -> Any:
        if is_first and is_first.pop():
            if behind:
                act(*asked, **more)
            raise MemoryError
        return act(*asked, **more)

    return fails


@pytest.mark.parametrize(
    "what",
    [
        "xs.committer.Entry",
        "xs.frame.encode",
        "xs.ids.text",
        "xs.sums.of",
        "xs.writer.Writer.append_now",
        "xs.writer.Writer.begins_again",
        "xs.bus.Bus.publish",
    ],
)
@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_where_no_memory_is_left_for_a_moment_it_is_stored_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, what: str, behind: bool
) -> None:
    add(store, "a.b.c")
    position = store.bus.newest
    monkeypatch.setattr(what, without_memory(resolve_name(what), behind=behind))
    line = alone(store, b"once") or store.append(Append("a.b.c", small(b"once")))
    monkeypatch.undo()
    assert lines(store)[1:] == [line]
    entries = store.bus.after(position)
    assert entries is None or [entry.line for entry in entries] == [line]
    assert store.bus.newest == ids.parse(frame.id_of(line))
    assert problems(store) == []


@pytest.mark.parametrize("way", ["alone", "with others"])
@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_where_the_commit_finds_no_memory_it_is_stored_once_or_not_at_all(
    store: Store, monkeypatch: pytest.MonkeyPatch, behind: bool, way: str
) -> None:
    """Nor is there any, at first, to find out whether it was stored."""
    add(store, "a.b.c")
    writer = store.group._committer._writer
    assert writer is not None
    execute, commit = writer.execute, without_memory(writer.execute, behind=behind)

    def fails(statement: str, *values: Any) -> Any:
        return (commit if statement == "COMMIT" else execute)(statement, *values)

    monkeypatch.setattr(writer, "execute", fails)
    seen = "xs.writer.Writer.has_committed"
    monkeypatch.setattr(seen, without_memory(resolve_name(seen)))
    if way == "alone":
        line = alone(store, b"once")
        assert (line is not None) is behind
    else:
        with contextlib.nullcontext() if behind else pytest.raises(NoMemory):
            line = store.append(Append("a.b.c", small(b"once")))
    monkeypatch.undo()
    assert lines(store)[1:] == ([line] if behind else [])
    assert problems(store) == []


@pytest.mark.parametrize(
    ("asked", "plain"),
    [
        ({}, True),
        ({"meta": '{"a":1}'}, True),
        ({"meta": '{"chunk":1}'}, False),
        ({"ttl": "ephemeral"}, False),
        ({"ttl": "time:5"}, False),
        ({"ttl": "last:1"}, False),
        ({"if_last": "none"}, False),
        ({"key": "k"}, False),
    ],
)
def test_an_append_is_plain_if_it_asks_for_a_frame_that_stays(
    asked: dict[str, str], plain: bool
) -> None:
    assert is_plain(Append("a", **asked)) is plain  # type: ignore[arg-type]


# On a connection


def whole(answer: Answer) -> dict[str, object]:
    assert answer.status == 200, answer
    assert set(answer.fields) == {"date", "content-type", "xs-version", "content-length"}
    assert answer.body.endswith(b"}\n")
    found: dict[str, object] = json.loads(answer.body)
    return found


def test_a_connection_answers_the_same_however_its_requests_differ(server: Server) -> None:
    """Words, lengths, and how they are sent: what is stored is what was answered, in order."""
    chance = random.Random(5)
    made = []
    with Wire(server.directory) as wire:
        for n in range(300):
            data = b"%06d" % n * chance.choice([0, 1, 1, 1, 1, 2])
            fields = {"xs-meta": "e30="} if chance.random() < 0.05 else {}
            target = chance.choice(
                ["/append/a"] * 9 + ["/a", "/append/a.b", "/append/a?ttl=last:900"]
            )
            sent = request("POST", target, data, **fields)
            way = chance.random()
            if way < 0.7:
                wire.send(sent)
            elif way < 0.8:
                cut = chance.randrange(1, len(sent))
                wire.send(sent[:cut])
                wire.send(sent[cut:])
            else:
                wire.send(sent + request("GET", "/last/a,a.b"))
            found = whole(wire.answer())
            made.append((found["id"], data))
            if way >= 0.8:
                assert whole(wire.answer()) == found
            if n % 50 == 9:
                with Wire(server.directory) as other:  # for a while it is not alone
                    made.append((whole(other.ask("POST", "/append/a", b"other"))["id"], b"other"))
    with xs.open(server.directory) as client:
        stored = client.cat(topic="a,a.b", with_content=True)
        assert [(each.id, (each.content or "").encode()) for each in stored] == made


def test_one_that_asks_for_another_store_is_answered_by_that(
    server: Server, tmp_path: Path
) -> None:
    other = str(tmp_path / "other")
    with xs.open(server.directory) as client:
        client.append("xs.store.add", meta={"path": other, "name": "other"})
        until(lambda: client.last("xs.store.added"), "it is served")
    with Wire(server.directory) as wire:
        for name, target in (("here", "/append/a"), ("there", "/store/other/append/a")):
            for n in range(4):
                whole(wire.ask("POST", target, f"{name}{n}".encode()))
    for name, directory in (("here", server.directory), ("there", other)):
        with xs.open(directory) as client:
            found = [each.content for each in client.cat(topic="a", with_content=True)]
            assert found == [f"{name}{n}" for n in range(4)]


def test_a_server_that_stops_answers_what_it_has_taken(server: Server) -> None:
    answered = []
    with Wire(server.directory) as wire:
        wire.ask("POST", "/append/a", b"000000")
        threading.Timer(0.1, server.process.send_signal, (signal.SIGTERM,)).start()
        with contextlib.suppress(EOFError, ConnectionError):
            for n in range(10**6):
                answer = wire.ask("POST", "/append/a", b"%06d" % n)
                if answer.status != 200:
                    break
                answered.append(json.loads(answer.body)["id"])
    server.process.wait(DEADLINE)
    with xs.open(server.directory) as client:
        assert [each.id for each in client.cat(topic="a")][1:] == answered


def left_of(store_dir: str, answered: list[tuple[str, bytes]]) -> int:
    """How many frames there are of a client that was answered so; they are whole, and its."""
    with xs.open(store_dir) as client:
        stored = [(each.id, each.content) for each in client.cat(topic="a", with_content=True)]
    assert stored[: len(answered)] == [(id_text, data.decode()) for id_text, data in answered]
    with contextlib.closing(Store(store_dir)) as store:
        assert problems(store) == []
    return len(stored)


def append_until_it_ends(server: Server) -> list[tuple[str, bytes]]:
    answered: list[tuple[str, bytes]] = []
    with Wire(server.directory) as wire, contextlib.suppress(EOFError, ConnectionError):
        for n in range(10**6):
            data = b"%06d" % n
            found = whole(wire.ask("POST", "/append/a", data))
            answered.append((str(found["id"]), data))
    server.process.wait(DEADLINE)
    return answered


@pytest.mark.parametrize(("point", "more"), POINTS)
def test_a_server_that_dies_at_any_step_has_all_it_has_answered(
    store_dir: str, point: str, more: int
) -> None:
    server = start_server(store_dir, XS_FAULT=f"{point}:20")
    answered = append_until_it_ends(server)
    assert server.process.returncode == -signal.SIGKILL
    assert len(answered) >= 20
    assert left_of(store_dir, answered) == len(answered) + more


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.5])
def test_a_server_that_is_killed_has_all_it_has_answered(store_dir: str, seconds: float) -> None:
    server = start_server(store_dir)
    threading.Timer(seconds, server.process.kill).start()
    answered = append_until_it_ends(server)
    assert left_of(store_dir, answered) - len(answered) in (0, 1)


def test_over_tcp_each_append_is_asked_for_its_token(store_dir: str) -> None:
    server = start_server(store_dir, "--expose", ":0")
    try:
        with Wire(server.directory) as wire:
            (address,) = json.loads(wire.ask("GET", "/last/xs.start").body)["meta"]["expose"]
        owners = Path(store_dir, "token").read_text().strip()
        desks = tokens.add(store_dir, "desk", append="*")
        with Wire(int(address.rpartition(":")[2])) as wire:
            for token in (owners, desks):
                for n in range(5):
                    whole(wire.ask("POST", "/append/a", b"%d" % n, authorization=f"Bearer {token}"))
            assert wire.ask("POST", "/append/a", b"5", authorization="Bearer x").status == 401
            tokens.remove(store_dir, "desk")
            answer = wire.ask("POST", "/append/a", b"5", authorization=f"Bearer {desks}")
            assert answer.status == 401
        with xs.open(store_dir) as client:
            found = [each.content for each in client.cat(topic="a", with_content=True)]
            assert found == [str(n) for n in range(5)] * 2
    finally:
        server.stop()


def test_an_fsync_that_fails_is_told_and_nothing_of_it_is_stored(server: Server) -> None:
    answered = []
    with Wire(server.directory) as wire:
        for n in range(10):
            if n == 5:
                with failing(server, "fsync,fdatasync", "EIO"):
                    refused = wire.ask("POST", "/append/a", b"%06d" % n)
                assert refused.status >= 500, refused
                continue
            data = b"%06d" % n
            answered.append((str(whole(wire.ask("POST", "/append/a", data))["id"]), data))
    server.process.kill()
    server.process.wait(DEADLINE)
    assert left_of(server.directory, answered) == len(answered)


def test_each_is_synced_before_it_is_answered(server: Server, tmp_path: Path) -> None:
    """As the kernel is asked."""
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,sendto"
    with Wire(server.directory) as wire:
        wire.ask("POST", "/append/a", b"000000")
        strace = subprocess.Popen(
            ["strace", "-f", "-qq", "-o", trace, "-e", calls, "-p", str(server.process.pid)]
        )
        wait_until_traced(server.process.pid, True)
        for n in range(20):
            whole(wire.ask("POST", "/append/a", b"%06d" % n))
        strace.send_signal(signal.SIGINT)
        strace.wait(DEADLINE)
    ended = re.compile(r"\d+ +(?:<\.\.\. (\w+) resumed>|(\w+)\((?!.*<unfinished))")
    found = map(ended.match, trace.read_text().splitlines())
    done = [each[1] or each[2] for each in found if each is not None]
    assert done.count("sendto") == 20
    for before, call in zip(done, done[1:]):
        assert call != "sendto" or before in ("fsync", "fdatasync"), done
