"""What a service manager hears from a server; the test's own socket plays systemd's."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, start_server
from manager import Ear, end, ended, launch, serving
from stores import add, all_ids
from wire import Wire, request

from xs import liveness
from xs.errors import Unavailable
from xs.store import Store

SECOND = "1000000"  # as WATCHDOG_USEC has it


@pytest.fixture(params=["path", "abstract"])
def ear(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ear]:
    """A socket of each kind that systemd has."""
    where = str(tmp_path / "notify")
    heard = Ear(where if request.param == "path" else f"@{where}")
    yield heard
    heard.close()


@pytest.fixture
def near(tmp_path: Path) -> Iterator[Ear]:
    heard = Ear(str(tmp_path / "notify"))
    yield heard
    heard.close()


def test_it_is_told_when_the_server_is_ready_and_when_it_stops(ear: Ear, store_dir: str) -> None:
    process = launch(["serve", store_dir, "--grace", "7"], NOTIFY_SOCKET=ear.address)
    ready = ear.hear()
    assert ready == {"READY": "1", "STATUS": f"serving {store_dir} at {store_dir}/sock"}
    with Wire(store_dir) as wire:  # at once, with no second look
        assert wire.ask("GET", "/version").status == 200
    process.terminate()
    assert ear.hear() == {"STOPPING": "1", "STATUS": "stopping, within 7 s"}
    assert ended(process) == (0, "")
    assert ear.is_silent(0.1)


def test_it_hears_of_the_stop_before_anything_is_waited_for(near: Ear, store_dir: str) -> None:
    process = launch(["serve", store_dir, "--grace", "60"], NOTIFY_SOCKET=near.address)
    near.hear_of("READY")
    with Wire(store_dir) as slow:
        slow.send(request("GET", "/?follow"))
        slow.head()
        slow.lines(1)
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with Wire(store_dir) as wire:
            for _ in range(20):
                wire.ask("POST", "/append/t", xs_meta='"' + "m" * 100_000 + '"')
        process.terminate()
        assert near.hear()["STOPPING"] == "1"
        assert process.poll() is None
    assert ended(process)[0] == 0


def test_a_reload_is_told_from_its_begin_to_its_end(
    near: Ear, store_dir: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = launch(["serve", store_dir, "--log-file", str(log)], NOTIFY_SOCKET=near.address)
    near.hear_of("READY")
    log.rename(tmp_path / "log.1")
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    process.send_signal(signal.SIGHUP)
    reloading = near.hear()
    assert reloading["RELOADING"] == "1"
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert before <= int(reloading["MONOTONIC_USEC"]) <= after
    assert near.hear()["READY"] == "1"
    assert log.exists()
    assert end(process)[0] == 0


def test_why_it_can_not_start_is_its_status(near: Ear, store_dir: str) -> None:
    other = start_server(store_dir)
    process = launch(["serve", store_dir], NOTIFY_SOCKET=near.address)
    said = near.hear()
    assert said == {"STATUS": f"store locked: {store_dir} is served by process {other.process.pid}"}
    assert ended(process)[0] == 3
    assert near.is_silent(0.1)
    other.stop()


def test_scripts_are_not_told_what_is_the_server_s(near: Ear, store_dir: str) -> None:
    process = launch(
        ["serve", store_dir],
        [socket.create_server(("127.0.0.1", 0))],
        names="tcp",
        NOTIFY_SOCKET=near.address,
        WATCHDOG_USEC="60000000",
    )
    near.hear_of("READY")
    with Wire(store_dir) as wire:
        answer = wire.ask("POST", "/eval", b"#!/bin/sh\nenv; ls -l /proc/self/fd\n")
    said = answer.body.decode()
    assert "XS_ADDR=" in said
    for word in ("NOTIFY_SOCKET", "WATCHDOG", "LISTEN_", "socket:"):
        assert word not in said
    assert end(process)[0] == 0


def test_one_that_does_not_listen_ends_nothing(store_dir: str, tmp_path: Path) -> None:
    process = launch(["serve", store_dir], NOTIFY_SOCKET=str(tmp_path / "nobody"))
    serving(process)
    with Wire(store_dir) as wire:
        assert wire.ask("POST", "/append/t").status == 200
    status, err = end(process)
    assert status == 0
    assert err.startswith("xs: the service manager can't be told READY=1: ")


def test_an_address_of_another_kind_is_left_alone(store_dir: str) -> None:
    process = launch(["serve", store_dir], NOTIFY_SOCKET="vsock:2:1234")
    serving(process)
    assert end(process) == (0, "")


# Signs of life


def test_signs_of_life_come_twice_in_the_time_that_is_allowed(near: Ear, store_dir: str) -> None:
    process = launch(["serve", store_dir], NOTIFY_SOCKET=near.address, WATCHDOG_USEC=SECOND)
    near.hear_of("READY")
    near.hear_of("WATCHDOG")
    started = time.monotonic()
    for _ in range(4):
        assert near.hear(1.0) == {"WATCHDOG": "1"}
    assert 1.5 < time.monotonic() - started < 3.0
    with Wire(store_dir) as wire:  # looking leaves nothing behind
        frames = wire.ask("GET", "/").body
    assert frames.count(b"\n") == 1
    assert end(process)[0] == 0


def test_without_being_asked_it_gives_none(near: Ear, store_dir: str) -> None:
    process = launch(["serve", store_dir], NOTIFY_SOCKET=near.address)
    near.hear_of("READY")
    assert near.is_silent(0.5)
    assert end(process)[0] == 0


def test_what_is_asked_of_another_process_is_not_answered(near: Ear, store_dir: str) -> None:
    process = launch(
        ["serve", store_dir], pid="1", NOTIFY_SOCKET=near.address, WATCHDOG_USEC="100000"
    )
    near.hear_of("READY")
    assert near.is_silent(0.5)
    assert end(process)[0] == 0


def test_a_server_that_can_not_commit_goes_silent_until_it_can(near: Ear, store_dir: str) -> None:
    process = launch(["serve", store_dir], NOTIFY_SOCKET=near.address, WATCHDOG_USEC=SECOND)
    near.hear_of("WATCHDOG")
    index = sqlite3.connect(os.path.join(store_dir, "xs.db"), isolation_level=None)
    index.execute("BEGIN IMMEDIATE")  # no commit of the server's gets through
    deadline = time.monotonic() + DEADLINE
    while not near.is_silent(2.0):
        assert time.monotonic() < deadline
    with Wire(store_dir) as wire:  # though it answers
        assert wire.ask("GET", "/version").status == 200
    index.execute("ROLLBACK")
    index.close()
    for _ in range(3):
        near.hear_of("WATCHDOG")
    assert end(process)[0] == 0


def test_signs_of_life_go_on_while_it_stops(near: Ear, store_dir: str) -> None:
    process = launch(
        ["serve", store_dir, "--grace", "3"], NOTIFY_SOCKET=near.address, WATCHDOG_USEC=SECOND
    )
    near.hear_of("WATCHDOG")
    with Wire(store_dir) as stuck:  # reads nothing of what it is owed
        stuck.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.send(request("GET", "/?follow"))
        stuck.head()
        with Wire(store_dir) as wire:
            for _ in range(20):
                wire.ask("POST", "/append/t", xs_meta='"' + "m" * 100_000 + '"')
        process.terminate()
        near.hear_of("STOPPING")
        for _ in range(4):
            assert near.hear(1.0) == {"WATCHDOG": "1"}
            assert process.poll() is None
        assert ended(process) == (0, "")


def test_a_server_that_is_ended_for_its_silence_tells_where_it_hangs(
    near: Ear, store_dir: str
) -> None:
    process = launch(["serve", store_dir], NOTIFY_SOCKET=near.address, WATCHDOG_USEC="60000000")
    near.hear_of("READY")
    near.hear_of("WATCHDOG")
    process.send_signal(signal.SIGABRT)  # as systemd does
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == -signal.SIGABRT
    assert b"Fatal Python error: Aborted" in err
    assert b"listener.py" in err  # each thread, as far as it has begun


# What is looked at


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
        yield sock


def test_somebody_who_accepts_nobody_is_found_out(listener: socket.socket) -> None:
    listener.listen(1)
    with pytest.raises(Unavailable, match="nobody answers on"):
        liveness.check_answer(listener.getsockname(), 0.1)
    with pytest.raises(Unavailable):  # and when no more can even wait
        for _ in range(4):
            liveness.check_answer(listener.getsockname(), 0.1)


def test_that_nobody_can_call_says_nothing_of_who_would_answer(
    listener: socket.socket, tmp_path: Path
) -> None:
    liveness.check_answer(listener.getsockname(), 0.1)  # bound by who does not listen
    liveness.check_answer(str(tmp_path / "none"), 0.1)


def test_a_look_at_the_store_waits_behind_what_is_to_be_committed_and_changes_nothing(
    store_dir: str,
) -> None:
    store = Store(store_dir, exclusive=True, create=True)
    made = add(store, "a")
    before = os.stat(os.path.join(store_dir, "xs.db-wal")).st_size
    liveness.check_commit(store)
    assert os.stat(os.path.join(store_dir, "xs.db-wal")).st_size == before
    assert all_ids(store) == [made]
    store.close()
    with pytest.raises(Unavailable):
        liveness.check_commit(store)
