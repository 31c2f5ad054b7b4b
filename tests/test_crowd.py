"""Appends of many clients side by side, which one thread takes from all of their connections.

A real server in this process, so that a test can see who waits in its crowd.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEADLINE, open_files, until
from roots import Root
from wire import Wire, request

from xs import chunked, threads
from xs.crowd import Crowd
from xs.httpd import Limits
from xs.server import Running


def crowd_of(running: Running) -> Crowd:
    return running.root.served.crowd


def gather(running: Running, count: int) -> list[Wire]:
    """So many connections more, all of them waiting in the crowd."""
    there = crowd_of(running).count
    wires = [Wire(running.root.folder) for _ in range(count)]
    for _ in range(2):
        for wire in wires:
            assert wire.ask("POST", "/append/come").status == 200
    until(lambda: crowd_of(running).count == there + count)
    return wires


def close(wires: list[Wire]) -> None:
    for wire in wires:
        wire.sock.close()


def contents(running: Running, topic: str) -> list[bytes]:
    with Wire(running.root.folder) as wire:
        lines = wire.ask("GET", f"/?topic={topic}&with-content").body.splitlines()
    return [json.loads(line)["content"].encode() for line in lines]


def test_each_of_many_clients_hears_of_its_own_appends_in_order(running: Running) -> None:
    wires = gather(running, 20)
    chance = random.Random(5)
    seen: list[list[str]] = [[] for _ in wires]
    for turn in range(30):
        some = chance.sample(range(20), chance.randrange(1, 20))
        for n in some:
            wires[n].send(request("POST", f"/append/of.{n}", b"%d %d" % (n, turn)))
        for n in some:
            answer = wires[n].answer()
            found = json.loads(answer.body)
            assert answer.status == 200 and found["topic"] == f"of.{n}"
            seen[n].append(found["id"])
    assert crowd_of(running).count == 20
    for n in range(20):
        assert seen[n] == sorted(set(seen[n]))
        with Wire(running.root.folder) as wire:
            lines = wire.ask("GET", f"/?topic=of.{n}").body.splitlines()
        assert [json.loads(line)["id"] for line in lines] == seen[n]
        turns = [int(content.split()[1]) for content in contents(running, f"of.{n}")]
        assert turns == sorted(turns) and len(turns) == len(seen[n])
    close(wires)


def test_whatever_else_is_asked_is_answered_and_then_it_appends_again(running: Running) -> None:
    wires = gather(running, 3)
    wire = wires[0]
    for _ in range(3):
        made = wire.ask("POST", "/append/a", b"x")
        assert wire.ask("GET", "/last/a").body == made.body
        assert wire.ask("POST", "/append/a?chunked", b"in parts").status == 200
        assert wire.ask("POST", "/append/xs.mine").status == 400
        assert wire.ask("POST", "/append/a?ttl=never").status == 400
        assert wire.ask("POST", "/append/a?if-last=none", b"y").status == 409
        assert wire.ask("POST", "/append/a?ttl=last:9", b"z", xs_meta='{"n":1}').status == 200
        assert wire.ask("POST", "/append/a", b"l" * 20_000).status == 200
        assert wire.ask("HEAD", "/last/a").status == 200
        for _ in range(2):
            assert wire.ask("POST", "/append/a").status == 200
        until(lambda: crowd_of(running).count == 3)
    close(wires)


@pytest.mark.parametrize(
    ("query", "fields", "status"),
    [("?chunk%65d", {}, 200), ("", {"xs_run": "whole nobody"}, 400)],
)
def test_a_content_in_parts_is_not_taken_in_by_the_thread_that_is_for_all(
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
    query: str,
    fields: dict[str, str],
    status: int,
) -> None:
    """It takes a commit for each of its frames, which are to be waited for by who asked for it."""
    by: list[str] = []

    def seen(act: Callable[..., object]) -> Callable[..., object]:
        def acts(*given: object, **named: object) -> object:
            by.append(threads.running[threading.get_ident()][0])
            return act(*given, **named)

        return acts

    for name in ("append", "go_on"):
        monkeypatch.setattr(chunked, name, seen(getattr(chunked, name)))
    wires = gather(running, 3)
    assert wires[0].ask("POST", f"/append/parts{query}", b"x", **fields).status == status
    assert by and "xs-crowd" not in by
    close(wires)


@pytest.mark.parametrize("cuts", [[10], [60], [1, 2, 3], [-1], [-5, -1]])
def test_a_request_that_comes_in_parts_is_answered(running: Running, cuts: list[int]) -> None:
    wires = gather(running, 3)
    data = request("POST", "/append/parts", b"a whole body")
    places = [0, *(cut % len(data) for cut in cuts), len(data)]
    for start, end in zip(places, places[1:]):
        wires[1].send(data[start:end])
        assert wires[2].ask("POST", "/append/other").status == 200  # it is not waited for
    assert wires[1].answer().status == 200
    assert contents(running, "parts") == [b"a whole body"]
    close(wires)


def test_requests_that_come_at_once_are_answered_in_order(running: Running) -> None:
    wires = gather(running, 3)
    many = b"".join(request("POST", "/append/line", b"%d" % n) for n in range(300))
    wires[1].send(many + request("GET", "/last/line"))
    made = [wires[1].answer().body for _ in range(300)]
    assert wires[1].answer().body == made[-1]
    assert contents(running, "line") == [b"%d" % n for n in range(300)]
    close(wires)


def test_what_is_no_request_is_refused_and_the_others_go_on(running: Running) -> None:
    wires = gather(running, 4)
    for data, status in ((b"\x00\r\n\r\n", 400), (b"POST /append/a HTTP/2.0\r\n\r\n", 505)):
        wire = wires.pop()
        wire.send(data)
        assert wire.answer().status == status
        assert wire.is_ended()
        assert wires[0].ask("POST", "/append/a").status == 200
    until(lambda: crowd_of(running).count == 2)
    close(wires)


def test_connection_close_is_honoured(running: Running) -> None:
    wires = gather(running, 3)
    assert wires[1].ask("POST", "/append/a", b"x", connection="close").status == 200
    assert wires[1].is_ended()
    until(lambda: crowd_of(running).count == 2)
    close(wires)


def test_who_reads_no_answers_holds_nobody_up(running: Running) -> None:
    wires = gather(running, 3)
    silent = wires[1]
    silent.sock.settimeout(0.05)
    sent = 0
    data = request("POST", "/append/many", b"x", xs_meta=json.dumps("m" * 4000))
    with pytest.raises(socket.timeout):  # its answers fill what the system keeps, then its requests
        while True:
            silent.send(data)
            sent += 1
            assert wires[0].ask("POST", "/append/other").status == 200
    assert sent > 10
    for _ in range(20):
        assert wires[0].ask("POST", "/append/other").status == 200
    silent.sock.settimeout(DEADLINE)
    for _ in range(sent):
        assert silent.answer().status == 200
    close(wires)


def test_clients_that_go_away_leave_nothing_behind(running: Running) -> None:
    kept = gather(running, 2)
    before = open_files(os.getpid(), running.root.folder)
    for turn in range(3):
        wires = gather(running, 8)
        for wire in wires:
            wire.send(request("POST", "/append/last-words", b"%d" % turn))
        close(wires)
        until(lambda: crowd_of(running).count == 2)
        until(lambda: open_files(os.getpid(), running.root.folder) == before)
    assert contents(running, "last-words") == [b"0"] * 8 + [b"1"] * 8 + [b"2"] * 8
    close(kept)


def test_who_stays_idle_is_closed_without_a_word(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "idle_seconds", 0.4)
    wires = gather(running, 2)
    started = time.monotonic()
    while time.monotonic() < started + 0.8:  # busy for longer than the other may be idle
        assert wires[0].ask("POST", "/append/busy").status == 200
    assert wires[1].is_ended()
    assert wires[0].ask("POST", "/append/busy").status == 200
    close(wires)


def test_a_server_that_stops_closes_all_who_wait(store_dir: str) -> None:
    running = Running(store_dir, [], [])
    try:
        wires = gather(running, 10)
    finally:
        running.stop()
    assert all(wire.is_ended() for wire in wires)
    assert not any(name == "xs-crowd" for name, _ in threads.running.values())
    close(wires)


def test_appends_amid_a_stop_are_answered_or_their_connections_closed(store_dir: str) -> None:
    running = Running(store_dir, [], [])
    answered: list[bytes] = []
    lock = threading.Lock()

    def append(wire: Wire, name: int) -> None:
        number = 0
        while True:
            number += 1
            data = b"%d %d" % (name, number)
            try:
                answer = wire.ask("POST", "/append/a", data)
            except (EOFError, OSError):
                return
            if answer.status != 200:
                assert answer.status == 503, answer
                return
            with lock:
                answered.append(data)

    try:
        wires = gather(running, 8)
        appending = [
            threading.Thread(target=append, args=(wire, n)) for n, wire in enumerate(wires)
        ]
        for thread in appending:
            thread.start()
        until(lambda: len(answered) > 200)
    finally:
        running.stop()
    for thread in appending:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    close(wires)
    running = Running(store_dir, [], [])
    try:
        stored = contents(running, "a")
    finally:
        running.stop()
    assert len(stored) == len(set(stored)) and set(answered) <= set(stored)


@pytest.mark.parametrize(
    "between",
    [
        request("POST", "/store/one/append/other", b"x", xs_meta=json.dumps("y" * 3000)),
        b"\r\n" + request("GET", "/store/one/version"),
        request("GET", "/store/one/version"),
    ],
    ids=["a long head", "an empty line before it", "a usual head"],
)
def test_an_append_in_words_from_before_a_visit_to_another_store_gets_where_it_should(
    tmp_path: Path, between: bytes
) -> None:
    root = Root(str(tmp_path / "root"))
    try:
        root.add(tmp_path / "one")
        with Wire(root.directory) as wire:
            for n in range(6):
                wire.send(request("POST", "/append/mine", b"%d" % n))
                assert wire.answer().status == 200
                wire.send(between)
                assert wire.answer().status == 200
            assert wire.ask("GET", "/?topic=mine").body.count(b"\n") == 6
            assert wire.ask("GET", "/store/one/?topic=mine").body == b""
    finally:
        root.close()


def test_appends_to_two_stores_on_one_connection_get_where_they_should(tmp_path: Path) -> None:
    root = Root(str(tmp_path / "root"))
    try:
        root.add(tmp_path / "one")
        wires = [Wire(root.directory) for _ in range(3)]
        for turn in range(20):
            for n, wire in enumerate(wires):
                is_root = (turn >> n) & 1
                wire.send(request("POST", f"{'' if is_root else '/store/one'}/append/a{is_root}"))
            for wire in wires:
                assert wire.answer().status == 200
        expected = {
            is_root: sum(turn >> n & 1 == is_root for turn in range(20) for n in range(3))
            for is_root in (0, 1)
        }
        for is_root, count in expected.items():
            prefix = "" if is_root else "/store/one"
            assert wires[0].ask("GET", f"{prefix}/?topic=a{is_root}").body.count(b"\n") == count
            assert wires[0].ask("GET", f"{prefix}/?topic=a{1 - is_root}").body == b""
        close(wires)
    finally:
        root.close()
