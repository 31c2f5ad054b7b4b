"""Nothing leaks; for want of descriptors or threads nothing is taken for damaged, dead or gone."""

from __future__ import annotations

import _thread
import contextlib
import fcntl
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Server, environment, start_server, until
from stores import add

import xs
from xs import threads
from xs.cas import BLOCK, VERIFIED_WHOLE_MAX
from xs.claim import Claim, is_held
from xs.commit import Append
from xs.errors import Damaged, DiskError, Unavailable
from xs.evaluation import Evaluation
from xs.forward import forward
from xs.gateway import Gateway, Options
from xs.hangups import Hangups
from xs.process import Processes, command_of
from xs.reader import CONTENT_INLINE_MAX
from xs.store import Store
from xs.transport import HttpTransport
from xs.work import PinWork

LARGE = VERIFIED_WHOLE_MAX + 1  # bytes: content that is read while it is sent


def files_of(pid: int | str = "self") -> list[str]:
    """What a process has open, by what it is."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}").partition(":")[0])
    return sorted(found)


def contents_open(store_dir: str, pid: int | str = "self") -> list[str]:
    return [name for name in files_of(pid) if name.startswith(os.path.join(store_dir, "cas", ""))]


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """A block in which this process can open nothing."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def starved(server: Server) -> Iterator[None]:
    """A block in which that server can open nothing."""
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The system has no room for another thread."""

    def refuse(act: object, args: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", refuse)
    yield
    monkeypatch.undo()


@pytest.fixture
def store(store_dir: str) -> Iterator[Store]:
    found = Store(store_dir, exclusive=True, create=True)
    yield found
    found.close()


# Contents that are opened and not read


def test_content_that_is_opened_and_not_read_is_closed(store: Store, store_dir: str) -> None:
    id_text = add(store, "a", b"x" * LARGE)
    value = int(id_text, 36)
    for how in ("dropped", "begun", "read"):
        size, blocks = store.content_of(value)
        assert len(contents_open(store_dir)) == 1
        if how == "begun":
            next(blocks)
        elif how == "read":
            assert sum(map(len, blocks)) == size == LARGE
            assert contents_open(store_dir) == []
        del blocks
        assert contents_open(store_dir) == []


def test_content_for_a_server_that_goes_away_amid_it_is_closed(
    store: Store, store_dir: str
) -> None:
    """What a command on the files was about to write, and now sends to who has taken the store."""
    content = store.cas.spill([], iter([b"x" * (4 << 20)]))  # more than a socket's buffers take

    def hang_up() -> None:
        with listener.accept()[0] as sock:
            sock.recv(BLOCK)
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            sock.recv(BLOCK, socket.MSG_WAITALL)  # and no more of the content

    with socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(store_dir, "gone")
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=hang_up)
        thread.start()
        transport = HttpTransport(("unix", path), None, None)
        with pytest.raises(Unavailable) as raised:  # which keeps the frames that it has passed
            forward(transport, PinWork(content))
        thread.join()
        assert contents_open(store_dir) == [], raised
        transport.close()


@pytest.mark.parametrize("way", ["HEAD", "with-content", "a script that is too long"])
def test_a_server_closes_what_it_does_not_send(server: Server, way: str) -> None:
    with xs.open(server.directory) as client:
        hash_ = client.append("a", b"x" * (CONTENT_INLINE_MAX + 1)).hash
        client.append("one.spawn", b"x" * LARGE)
        until(lambda: client.last("one.spawn.error"))
    pid = server.process.pid

    def ask(n: int) -> None:
        if way == "HEAD":
            request = f"HEAD /cas/{hash_}"
        elif way == "with-content":
            request = "GET /?with-content&topic=a"
        else:
            with xs.open(server.directory) as client:
                client.append(f"s{n}.spawn", b"x" * LARGE)
                until(lambda: client.last(f"s{n}.spawn.error"))
            return
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(os.path.join(server.directory, "sock"))
            sock.sendall(f"{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            while sock.recv(65536):
                pass

    for n in range(5):
        ask(n)
    until(
        lambda: contents_open(server.directory, pid) == [],
        lambda: contents_open(server.directory, pid),
    )


def test_scripts_that_were_asked_for_by_who_has_gone_are_ended(server: Server) -> None:
    pid = server.process.pid
    with xs.open(server.directory) as client:
        client.append("a", "x")
    script = b"#!/bin/sh\necho one; exec sleep 1000"
    # Some of the answers find that the client has gone.
    ask = b"POST /append/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx" * 100
    ask += b"POST /eval HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(script) + script
    before = len(files_of(pid))
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(os.path.join(server.directory, "sock"))
            sock.sendall(ask)
    until(lambda: len(files_of(pid)) <= before, lambda: files_of(pid))
    run = Path(server.directory, "run")
    until(lambda: [each.name for each in run.iterdir()] == ["lock"], lambda: list(run.iterdir()))


# For want of descriptors


def test_content_that_can_not_be_opened_is_not_called_damaged(store: Store) -> None:
    add(store, "a", b"x" * 100_000)
    (digest,) = store.cas.digests()
    with no_descriptors(), pytest.raises(DiskError, match="can't be read: Too many open files"):
        store.cas.open(digest)
    assert b"".join(store.cas.open(digest)[1]) == b"x" * 100_000


def test_what_lies_in_place_of_a_content_is_damage(store: Store, store_dir: str) -> None:
    value = int(add(store, "a", b"x" * 100_000), 36)
    (path,) = Path(store_dir, "cas").glob("??/*")
    path.unlink()
    path.mkdir()
    with pytest.raises(Damaged, match="there is no file where it should be"):
        store.content_of(value)


def test_a_writer_that_nobody_can_look_at_is_not_taken_for_dead(tmp_path: Path) -> None:
    claim = Claim(str(tmp_path))
    with no_descriptors():
        assert is_held(str(tmp_path), claim.token)
    assert is_held(str(tmp_path), claim.token)
    claim.close()
    assert not is_held(str(tmp_path), claim.token)


def test_a_script_that_can_not_be_run_gives_its_place_back(tmp_path: Path) -> None:
    processes = Processes(str(tmp_path / "run"), dict(os.environ))
    given_back = []
    before = files_of()
    with no_descriptors(), pytest.raises(Unavailable, match="Too many open files"):
        Evaluation(
            processes, lambda text: None, b"#!/bin/sh", None, bool, lambda: given_back.append(1)
        )
    assert given_back == [1] and files_of() == before
    processes.close()


def test_a_client_that_can_not_be_watched_leaves_nothing_behind() -> None:
    hangups = Hangups()
    sock = socket.socket(socket.AF_UNIX)
    os.close(sock.fileno())
    with pytest.raises(OSError):
        hangups.watch(sock, lambda: None)
    hangups.unwatch(sock)
    sock.detach()
    hangups.start()
    hangups.stop()


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_gateway_for_which_there_are_too_few_threads_leaves_nothing_behind(
    store: Store, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """It is tried again every minute, for as long as the shortage lasts."""
    left = iter([True] * (nth - 1) + [False])
    start = _thread.start_new_thread

    def start_or_refuse(act: Callable[..., object], args: tuple[object, ...]) -> int:
        if next(left):
            return start(act, args)
        raise RuntimeError("can't start new thread")

    before = files_of(), sorted(threads.running.values())
    gateway = Gateway(Options(), lambda _: None, 100)
    gateway.listen(":0")
    monkeypatch.setattr("_thread.start_new_thread", start_or_refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        gateway.start(store)
    gateway.abandon()
    assert (files_of(), sorted(threads.running.values())) == before


@pytest.mark.parametrize("files", [11, 14, 16])
def test_a_server_for_which_there_are_too_few_descriptors_may_be_started_again(
    store_dir: str, files: int
) -> None:
    """Its service is: not after a 4, which no later start could mend."""
    done = subprocess.run(
        [sys.executable, "-m", "xs", "serve", store_dir],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(),
        timeout=DEADLINE,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count(b"\n") == 1 and done.stderr.startswith(b"xs: ")


def test_a_place_for_scripts_for_which_there_are_too_few_descriptors_leaves_none_open(
    tmp_path: Path,
) -> None:
    before = files_of()
    failed = 0
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in range(3, 1000):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
            processes = Processes(str(tmp_path / "run"), {})
        except OSError:
            failed += 1
        else:
            processes.close()
            break
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert files_of() == before, most
    assert failed > 3 and files_of() == before


def test_scripts_are_started_when_there_are_descriptors_again(tmp_path: Path) -> None:
    directory = str(tmp_path / "store")
    server = start_server(directory)
    try:
        with xs.open(directory) as client:
            client.append("before", "x")
            with starved(server):
                client.append("one.spawn", b"#!/bin/sh\necho came")
                client.append("two.spawn", b"#!/bin/sh\necho came")
                # It has been tried: what it says goes to the log, which is open.
                assert server.process.stderr is not None
                line = b""
                while b"Too many open files" not in line:
                    line = server.process.stderr.readline()
                    assert line, "the server has ended"
            for name in ("one", "two"):
                until(lambda name=name: client.last(f"{name}.recv"))  # type: ignore[misc]
    finally:
        server.stop()


def test_scripts_are_started_though_there_were_no_descriptors_when_an_earlier_server_s_were_gone(
    store_dir: str,
) -> None:
    folder = Path(store_dir, "run")
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as processes of an earlier server hold it
        server = start_server(store_dir)
        assert server.process.stderr is not None
        try:
            with xs.open(store_dir) as client:
                client.append("one.spawn", b"#!/bin/sh\necho came")
                with starved(server):
                    fcntl.flock(lock, fcntl.LOCK_UN)
                    line = b""
                    while b"Too many open files" not in line:
                        line = server.process.stderr.readline()
                        assert line, "the server has ended"
                until(lambda: client.last("one.recv"))
        finally:
            server.stop()


# For want of threads


def test_a_process_that_nobody_can_wait_for_is_ended_at_once(
    tmp_path: Path, no_threads: None
) -> None:
    processes = Processes(str(tmp_path / "run"), dict(os.environ))
    begun = tmp_path / "begun"
    before = files_of()
    command = command_of(f"#!/bin/sh\necho > {begun}\nexec sleep 1000".encode())
    for _ in range(3):
        with pytest.raises(OSError, match="temporarily unavailable"):
            processes.start(command, lambda: pytest.fail("nobody was given it"))
    assert files_of() == before
    assert os.listdir(processes.folder) == ["lock"]
    processes.close()


def test_a_script_s_files_go_when_they_can_not_all_be_written(tmp_path: Path) -> None:
    processes = Processes(str(tmp_path / "run"), dict(os.environ))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            processes.start(command_of(b"#!/bin/sh\n" + b"#" * 100), lambda: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(processes.folder) == ["lock"]
    processes.close()


def test_no_thread_is_left_of_a_chunked_append_that_was_made_before(store: Store) -> None:
    from xs import chunked

    append = Append("a", key="k")
    first = chunked.append(store, append, [b"whole"])
    for _ in range(3):
        assert chunked.append(store, append, [b"a character in part: \xc3"]) == first
    until(lambda: "xs-gather" not in [name for name, _ in threads.running.values()])
