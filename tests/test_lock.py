"""The lock: one writer at a time, and a file that says who it is."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import DEADLINE, XS, environment, start_server

from xs.errors import Locked, Unavailable
from xs.lock import SERVE, WRITE, Lock, Served


def test_the_file_says_who_holds_it_while_they_do(tmp_path: Path) -> None:
    lock = Lock(str(tmp_path))
    lock.acquire(WRITE)
    assert (tmp_path / "lock").read_text() == f"{os.getpid()} append\n"
    assert Lock(str(tmp_path)).holder() == (os.getpid(), WRITE)
    lock.release()
    assert (tmp_path / "lock").read_text() == ""
    assert lock.holder() == (0, "")
    lock.close()


def test_another_writer_waits_and_is_told_whom_for(tmp_path: Path) -> None:
    first, second = Lock(str(tmp_path)), Lock(str(tmp_path))
    first.acquire(WRITE)
    with pytest.raises(Locked, match=f"is being written to by process {os.getpid()}"):
        second.acquire(WRITE, wait=0.05)
    timer = threading.Timer(0.05, first.release)
    timer.start()
    second.acquire(WRITE, wait=DEADLINE)
    timer.join()
    second.close()
    first.close()


def test_a_server_is_named_at_once(tmp_path: Path) -> None:
    first, second = Lock(str(tmp_path)), Lock(str(tmp_path))
    first.acquire(SERVE)
    start = time.monotonic()
    for purpose in (WRITE, SERVE):
        with pytest.raises(Served, match=f"store locked: .* is served by process {os.getpid()}"):
            second.acquire(purpose)
    assert time.monotonic() - start < 5
    first.close()
    second.acquire(SERVE)
    second.close()


@pytest.mark.parametrize(
    "text", [b"", b"999999999 serve\n", b"nonsense", b"\xff\xfe", b"1 2 3", b"-1 serve", b"x" * 99]
)
def test_text_that_was_left_behind_keeps_nobody_out(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "lock").write_bytes(text)
    lock = Lock(str(tmp_path))
    lock.acquire(WRITE, wait=0)
    assert lock.holder() == (os.getpid(), WRITE)
    other = Lock(str(tmp_path))
    with pytest.raises(Locked):
        other.acquire(WRITE, wait=0.01)
    other.close()
    lock.close()


def test_a_dead_servers_text_does_not_stand_for_a_writer(tmp_path: Path) -> None:
    """The writer has the lock, and has not put its own text there yet."""
    held, other = Lock(str(tmp_path)), Lock(str(tmp_path))
    held.acquire(WRITE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(DEADLINE)
    (tmp_path / "lock").write_text(f"{dead.pid} serve\n")
    with pytest.raises(Locked) as found:
        other.acquire(WRITE, wait=0.02)
    assert not isinstance(found.value, Served)
    held.close()
    other.close()


def test_a_lock_whose_file_was_deleted_is_taken_where_others_look(tmp_path: Path) -> None:
    early, late = Lock(str(tmp_path)), Lock(str(tmp_path))
    os.unlink(tmp_path / "lock")
    other = Lock(str(tmp_path))
    other.acquire(WRITE)
    with pytest.raises(Locked):
        early.acquire(WRITE, wait=0.02)
    other.release()
    early.acquire(WRITE, wait=0)
    for each in (other, late):
        with pytest.raises(Locked):
            each.acquire(WRITE, wait=0.02)
    for each in (early, late, other):
        each.close()


def test_who_waits_for_a_lock_whose_file_is_replaced_meanwhile_waits_for_the_new_one(
    tmp_path: Path,
) -> None:
    first, waiting = Lock(str(tmp_path)), Lock(str(tmp_path))
    first.acquire(WRITE)
    os.unlink(tmp_path / "lock")
    second = Lock(str(tmp_path))
    second.acquire(WRITE)
    timer = threading.Timer(0.05, first.release)
    timer.start()
    with pytest.raises(Locked):
        waiting.acquire(WRITE, wait=0.2)
    timer.join()
    for each in (first, waiting, second):
        each.close()


def test_a_lock_in_a_folder_that_is_gone_is_not_taken(tmp_path: Path) -> None:
    lock = Lock(str(tmp_path / "." / ""))
    (tmp_path / "lock").unlink()
    tmp_path.rmdir()
    with pytest.raises(Unavailable, match="replaced or removed"):
        lock.acquire(WRITE)
    tmp_path.mkdir()
    (tmp_path / "lock").mkdir()
    with pytest.raises(Unavailable, match="can't be locked: Is a directory"):
        lock.acquire(WRITE)
    (tmp_path / "lock").rmdir()
    lock.acquire(WRITE, wait=0)
    lock.close()


def test_closing_twice_closes_nobody_elses_file(tmp_path: Path) -> None:
    lock = Lock(str(tmp_path))
    lock.acquire(WRITE)
    lock.close()
    with open(tmp_path / "other", "w") as other:
        lock.close()
        other.write("x")


def test_the_lock_of_a_killed_process_is_free(store_dir: str) -> None:
    server = start_server(store_dir)
    server.process.kill()
    server.process.communicate(timeout=DEADLINE)
    lock = Lock(store_dir)
    lock.acquire(WRITE, wait=0)
    lock.close()


def test_a_second_server_says_who_serves(store_dir: str) -> None:
    server = start_server(store_dir)
    done = subprocess.run(
        [*XS, "serve", store_dir],
        capture_output=True,
        env=environment(),
        timeout=DEADLINE,
    )
    assert done.returncode == 3 and done.stdout == b""
    assert f"is served by process {server.process.pid}" in done.stderr.decode()
    assert b"store locked: " in done.stderr
    server.stop()


def test_a_server_waits_for_a_writer(store_dir: str) -> None:
    os.makedirs(store_dir)
    lock = Lock(store_dir)
    lock.acquire(WRITE)
    timer = threading.Timer(0.25, lock.close)
    timer.start()
    server = start_server(store_dir)
    timer.join()
    server.stop()
