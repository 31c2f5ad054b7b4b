"""The system fails a running server: one request is refused, the server goes on.

strace makes system calls of a server fail that runs already, and lets them succeed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, XS, Server, environment, start_server
from stores import Clock, add, all_ids, content, in_one_batch, lines, problems, taken

import xs
from xs.client import Client
from xs.commit import Append
from xs.errors import Damaged, Full, Unavailable, XsError
from xs.lock import WRITE, Lock
from xs.store import Store
from xs.work import AppendWork

LARGE = b"large " * 10_000


@contextlib.contextmanager
def failing(server: Server, calls: str, error: str, path: str = "") -> Iterator[None]:
    """A block in which these system calls of the server fail, on one file alone if it is given."""
    pid = server.process.pid
    command = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={calls}"]
    command += ["-e", f"inject={calls}:error={error}", *(["-P", path] if path else [])]
    strace = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE)
    try:
        wait_until_traced(pid, True)
        yield
    finally:
        strace.send_signal(signal.SIGINT)
        strace.communicate(timeout=DEADLINE)
        wait_until_traced(pid, False)


def wait_until_traced(pid: int, wanted: bool) -> None:
    deadline = time.monotonic() + DEADLINE
    while set(tracers(pid)) not in ({wanted}, set()):
        assert time.monotonic() < deadline, "strace comes to nothing"
        threading.Event().wait(0.01)


def tracers(pid: int) -> Iterator[bool]:
    """Of each thread, whether somebody traces it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            yield "\nTracerPid:\t0\n" not in (task / "status").read_text()


def check_after_a_kill(server: Server, answered: dict[str, bytes]) -> None:
    """What was answered is there, and nothing is wrong, when the server is killed now."""
    server.process.kill()
    server.process.communicate()
    done = subprocess.run(
        [*XS, "check", server.directory],
        capture_output=True, env=environment(), timeout=DEADLINE,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1])["problems"] == 0, done.stdout
    store = xs.open(server.directory)
    found = {each.id: each.content for each in store.cat(with_content=True) if each.content}
    texts = {
        key: value.encode() if isinstance(value, str) else value for key, value in found.items()
    }
    assert answered.items() <= texts.items()


def append(client: Client, answered: dict[str, bytes], data: bytes) -> None:
    answered[client.append("a", data).id] = data


@pytest.mark.parametrize(
    ("calls", "error", "small", "large"),
    [
        ("fsync,fdatasync", "EIO", "I/O error", "can't be written: Input/output error"),
        ("pwrite64", "EIO", "I/O error", "I/O error"),
        ("pwrite64", "ENOSPC", "the disk is full", "the disk is full"),
        ("rename,renameat,renameat2", "EIO", None, "can't be written: Input/output error"),
        ("openat", "EACCES", None, "can't be written: Permission denied"),
    ],
)
def test_what_can_not_be_written_is_refused_and_the_server_goes_on(
    server: Server, calls: str, error: str, small: str | None, large: str
) -> None:
    client = xs.open(server.directory)
    answered: dict[str, bytes] = {}
    append(client, answered, b"before")
    append(client, answered, b"before" + LARGE)
    with failing(server, calls, error):
        for number in range(3):
            data = b"%d" % number
            if small is None:
                append(client, answered, data)
            else:
                with pytest.raises((Unavailable, Full), match=small):
                    client.append("a", data)
            with pytest.raises((Unavailable, Full), match=large):
                client.append("a", data + LARGE)
        assert [each.id for each in client.cat(topic="a")] == list(answered)
    append(client, answered, b"after")
    append(client, answered, b"0" + LARGE)  # as was refused before
    append(xs.open(server.directory), answered, b"anew")
    assert [each.id for each in client.cat(topic="a")] == list(answered)
    check_after_a_kill(server, answered)


def test_while_fsync_fails_nothing_is_answered_or_delivered_however_many_append(
    server: Server,
) -> None:
    answered: dict[str, bytes] = {}
    refused: list[XsError] = []
    followed: list[str] = []
    client = xs.open(server.directory)

    def follow() -> None:
        for each in xs.open(server.directory).cat(follow=True, topic="a"):
            if each.topic == "a":
                followed.append(each.id)
                if len(followed) == 2:
                    return

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    append(client, answered, b"before")

    def write(number: int) -> None:
        mine = xs.open(server.directory)
        for n in range(5):
            data = b"%d %d" % (number, n)
            try:
                append(mine, answered, data + (LARGE if n % 2 else b""))
            except XsError as error:
                refused.append(error)

    with failing(server, "fsync,fdatasync", "EIO"):
        writers = [threading.Thread(target=write, args=(n,)) for n in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(DEADLINE)
    assert len(refused) == 40 and len(answered) == 1
    append(client, answered, b"after")
    follower.join(DEADLINE)
    assert followed == list(answered)
    check_after_a_kill(server, answered)


def test_a_name_that_was_not_made_durable_is_not_relied_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an fsync that failed, the next one may succeed without the bytes being there."""
    store = Store(str(tmp_path / "store"), exclusive=True, create=True)
    fsync = os.fsync
    synced: list[str] = []

    def fail_once(file: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{file}"))
        synced.append(name)
        if len(name) == 2 and [len(each) for each in synced].count(2) == 1:
            raise OSError(5, "Input/output error")
        fsync(file)

    works = [AppendWork(Append("a", taken(store, b"%d" % n + LARGE))) for n in range(3)]
    monkeypatch.setattr(os, "fsync", fail_once)
    one, *others = in_one_batch(store, works)
    assert isinstance(one, Unavailable) and "send it again" in str(one)
    assert all(isinstance(each, bytes) for each in others)
    assert content(store, add(store, "a", b"0" + LARGE)) == b"0" + LARGE
    assert problems(store) == []
    store.close()


def test_a_disk_that_can_not_be_read_is_an_error_and_no_other_bytes(server: Server) -> None:
    client = xs.open(server.directory)
    id_text = client.append("a", LARGE).id
    (path,) = Path(server.directory, "cas").glob("??/*")
    with failing(server, "read", "EIO", str(path)):
        with pytest.raises(XsError, match="can't be read"):
            client.content(id_text)
        client.append("a", b"others go on")
    assert client.content(id_text) == LARGE


@pytest.mark.parametrize("error", ["EIO", "ENXIO", "EACCES"])
def test_an_index_that_can_not_be_read_is_no_damaged_one_and_can_be_read_again_later(
    store_dir: str, error: str
) -> None:
    answered: dict[str, bytes] = {}
    with xs.open(store_dir) as files:
        for n in range(800):  # more than SQLite keeps in memory
            append(files, answered, b"%d " % n * 1500)
    server = start_server(store_dir)
    try:
        client = xs.open(server.directory)
        index = os.path.join(server.directory, "xs.db")
        with failing(server, "pread64", error, index):
            for act in (
                lambda: list(client.cat(topic="a", with_content=True)),
                lambda: client.append_many([{"topic": f"n.{n}"} for n in range(50)], atomic=True),
            ):
                with pytest.raises(XsError) as raised:
                    act()
                assert "disk" in str(raised.value) and "malformed" not in str(raised.value)
                assert not isinstance(raised.value, Damaged) and raised.value.status >= 500
            done = subprocess.run(
                [*XS, "check", server.directory],
                capture_output=True, env=environment(), timeout=DEADLINE,
            )  # fmt: skip
            said = done.stdout + done.stderr
            assert done.returncode == 1 and b"disk" in said and b"malformed" not in said, said
        assert [each.id for each in client.cat(topic="a")] == list(answered)
        append(client, answered, b"after")
        check_after_a_kill(server, answered)
    finally:
        server.stop()


def test_a_limit_on_files_refuses_what_is_larger_until_it_is_lifted(server: Server) -> None:
    client = xs.open(server.directory)
    answered: dict[str, bytes] = {}
    append(client, answered, b"before")
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (20_000, limits[1]))
    for data in (b"small", LARGE):
        with pytest.raises((Full, Unavailable)):
            client.append("a", data)
    assert [each.id for each in client.cat(topic="a")] == list(answered)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
    append(client, answered, b"small")
    append(client, answered, LARGE)
    check_after_a_kill(server, answered)


def test_a_server_whose_lock_was_deleted_and_another_writer_keep_one_order(server: Server) -> None:
    client = xs.open(server.directory)
    first = client.append("a", b"server").id
    seen: list[str] = []

    def follow() -> None:
        for each in xs.open(server.directory).cat(follow=True, topic="a"):
            if each.topic == "a":
                seen.append(each.id)
                if len(seen) == 5:
                    return

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    os.unlink(os.path.join(server.directory, "lock"))
    lock = Lock(server.directory)
    lock.acquire(WRITE)  # nothing of the server's is left to hold
    lock.release()
    lock.close()
    other = Store(server.directory)
    expected = [first]
    for _ in range(2):
        expected.append(add(other, "a", b"other"))
        expected.append(client.append("a", b"server").id)
    other.close()
    follower.join(DEADLINE)
    assert seen == expected == sorted(expected)
    assert [each.id for each in client.cat(topic="a")] == expected


def test_a_folder_whose_own_name_was_not_made_durable_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "store"), exclusive=True, create=True)
    fsync = os.fsync
    results: list[bool] = []

    def fail_once(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith("/cas"):
            results.append(bool(results))
            if results == [False]:
                raise OSError(5, "Input/output error")
        fsync(file)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(Unavailable, match="Input/output error"):
        add(store, "a", LARGE)
    assert content(store, add(store, "a", LARGE)) == LARGE
    assert results == [False, True]
    store.close()


@pytest.mark.parametrize("hours", [1, -1, 87_600, -87_600])
def test_a_clock_that_is_off_and_is_set_right_again_costs_nothing(
    tmp_path: Path, hours: int
) -> None:
    clock = Clock()
    folder = str(tmp_path / "store")
    expected = []
    for step in (0, hours, 0, -hours, 0):
        clock.now += step * 3_600_000
        store = Store(folder, exclusive=True, create=True, clock=clock)
        expected += [add(store, "a", b"%d" % step), add(store, "a", LARGE)]
        clock.now += 5
        expected.append(add(store, "b"))
        assert all_ids(store) == expected == sorted(expected)
        assert len(lines(store, last=2)) == 2
        assert problems(store) == []
        store.close()


# In this process


def test_one_whose_disk_is_slow_keeps_no_other_store_from_being_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other = str(tmp_path / "slow"), str(tmp_path / "other")
    for folder in (slow, other):
        server = start_server(folder)
        with xs.open(folder) as client:
            client.append("a", "x")
        server.process.kill()  # so that a log is left to be looked at
        server.process.communicate()
    begun, goes_on = threading.Event(), threading.Event()
    open_file = os.open

    def open_slowly(path: str, *rest: Any, **more: Any) -> int:
        if str(path).startswith(slow) and str(path).endswith("-wal"):
            begun.set()
            assert goes_on.wait(DEADLINE)
        return open_file(path, *rest, **more)

    monkeypatch.setattr(os, "open", open_slowly)
    opened: list[Store] = []
    waiting = threading.Thread(target=lambda: opened.append(Store(slow)), daemon=True)
    waiting.start()
    assert begun.wait(DEADLINE)
    for _ in range(2):
        Store(other).close()
    assert not opened
    goes_on.set()
    waiting.join(DEADLINE)
    assert problems(opened[0]) == []
    opened[0].close()


def test_a_damaged_frame_is_told_of_without_a_look_at_the_whole_disk(
    store_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(store_dir, exclusive=True, create=True)
    id_text = add(store, "a", b"x")
    add(store, "b", b"x")
    with store.index.reading() as reader:
        reader.execute("COMMIT")
        reader.execute("UPDATE frame SET sum = sum + 1 WHERE row = (SELECT min(row) FROM frame)")
        reader.execute("BEGIN")
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("nobody needs that"))
    for act in (
        lambda: add(store, "a", if_last=id_text),
        lambda: store.index.last(frozenset(("a",)), 0),
    ):
        with pytest.raises(Damaged, match="is damaged: it is not what was stored"):
            act()
    monkeypatch.undo()
    store.close()
