"""A disk that is full for real: a file system of four megabytes, of which something takes the rest.

It is mounted in a namespace of its own, which goes with the process that holds it. Servers run in
that namespace; the test looks into it through /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest
from conftest import DEADLINE, XS, Peer, answers, environment

import xs
from xs.errors import Full

LARGE = b"large " * 10_000


class Disk:
    """A small file system."""

    def __init__(self, place: Path, names: int = 1000) -> None:
        """`names` is how many files and folders it has room for, besides its own root."""
        own = [] if os.geteuid() == 0 else ["--map-root-user"]
        script = 'mount -t tmpfs -o "$2" none "$1" && echo mounted && exec cat'
        options = f"size=4m,nr_inodes={names + 1}"
        self._holder = subprocess.Popen(
            ["unshare", "--mount", *own, "sh", "-c", script, "sh", str(place), options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"mounted\n"
        self.folder = str(place / "store")  # as its own processes see it
        self.seen = Path(f"/proc/{self._holder.pid}/root{place}")  # and as this one does
        users = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        self._enter = ["nsenter", "--target", str(self._holder.pid), "--mount", *users, "--"]
        self._server: Optional[subprocess.Popen[bytes]] = None

    @property
    def store(self) -> str:
        return str(self.seen / "store")

    def serve(self) -> None:
        """Starts a server there."""
        self._server = server = subprocess.Popen(
            [*self._enter, *XS, "serve", self.folder],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        deadline = time.monotonic() + DEADLINE
        while not answers(os.path.join(self.store, "sock")):
            assert server.poll() is None and time.monotonic() < deadline, server.communicate()[1]
            threading.Event().wait(0.01)

    def end(self, number: int = signal.SIGTERM) -> str:
        """Ends the server by that signal; what it has said."""
        assert self._server is not None
        self._server.send_signal(number)
        said = self._server.communicate(timeout=DEADLINE)[1].decode()
        assert self._server.returncode == (0 if number == signal.SIGTERM else -number), said
        self._server = None
        return said

    def run(self, *words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """`xs` as a process there."""
        command = [*self._enter, *XS, *words]
        return subprocess.run(
            command, input=data, capture_output=True, env=environment(), timeout=DEADLINE
        )

    def fill(self) -> None:
        """Takes all the room that is left."""
        path = self.seen / f"rest-{time.monotonic_ns()}"
        with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def make_room(self) -> None:
        for path in self.seen.glob("rest-*"):
            path.unlink()

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.communicate()
        self._holder.communicate(timeout=DEADLINE)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path)
    try:
        yield found
    finally:
        found.close()


@pytest.mark.parametrize("names", [2, 3])
def test_a_disk_without_room_for_another_file_is_told_to_be_full(
    tmp_path: Path, names: int
) -> None:
    """It may pass: a service is started again after a 1, and not after a 4."""
    disk = Disk(tmp_path, names)  # for the store's folder, its lock, and that of large contents
    try:
        for words in (("append", disk.folder, "t"), ("serve", disk.folder)):
            done = disk.run(*words, data=b"x")
            assert done.returncode == 1
            assert re.fullmatch(rb"xs: .*(disk is full|No space left on device).*\n", done.stderr)
    finally:
        disk.close()


def append(client: xs.Client, answered: dict[str, bytes], data: bytes) -> None:
    answered[client.append("a", data).id] = data


def append_until_full(client: xs.Client, answered: dict[str, bytes]) -> None:
    """The log has some room of its own, from before."""
    with pytest.raises(Full, match="the disk is full: nothing of"):
        for number in range(10_000):
            append(client, answered, b"%d " % number + b"x" * 3000)


def post(disk: Disk, target: str, body: bytes, *fields: str) -> tuple[int, bytes]:
    """Status and body of the answer to a request, as they are on the wire."""
    lines = [f"POST {target} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(os.path.join(disk.store, "sock"))
        peer = Peer(sock)
        peer.send("\r\n".join([*lines, *fields, "", ""]).encode() + body)
        head = peer.head()
        return int(head[9:12]), peer.body(head)


def contents(client: xs.Client) -> dict[str, bytes]:
    found = {}
    for each in client.cat(topic="a", with_content=True):
        assert isinstance(each.content, (str, bytes))
        found[each.id] = each.content.encode() if isinstance(each.content, str) else each.content
    return found


def test_on_a_full_disk_each_write_is_refused_and_what_is_there_is_served(disk: Disk) -> None:
    disk.serve()
    client = xs.open(disk.store)
    answered: dict[str, bytes] = {}
    append(client, answered, b"before")
    append(client, answered, LARGE)
    unwanted = client.append("a", b"0" + LARGE)
    seen: list[str] = []

    def follow() -> None:
        for each in xs.open(disk.store).cat(follow=True, topic="a"):
            if each.topic == "a":
                seen.append(each.id)
                if each.meta == "the last":
                    return

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    disk.fill()
    append_until_full(client, answered)
    with pytest.raises(Full):
        client.append("a", b"1" + LARGE)
    lines = [{"topic": "a", "content": "y" * 3000, "meta": n} for n in range(300)]
    body = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
    told = json.loads(disk.run("append", disk.folder, "--json", data=body).stdout)
    assert told["appended"] == 0
    assert {each["error"] for each in told["errors"]} == {
        "the disk is full: nothing of this request was stored"
    }
    status, text = post(disk, "/append?atomic", body, "Content-Type: application/x-ndjson")
    assert (status, text) == (507, b"the disk is full: nothing of this request was stored\n")
    for words in (["gc", disk.folder], ["remove", disk.folder, unwanted.id]):
        done = disk.run(*words)
        assert done.returncode == 0 or b"xs: the disk is full" in done.stderr
    assert not list((disk.seen / "store/cas").glob("new-*"))
    known = contents(client)
    known.pop(unwanted.id, None)
    assert known == answered

    disk.make_room()
    append(client, answered, b"after")
    append(client, answered, b"1" + LARGE)  # as was refused before
    last = client.append("a", b"x", meta="the last").id
    follower.join(DEADLINE)
    assert seen == [*list(answered)[:2], unwanted.id, *list(answered)[2:], last]
    assert disk.run("gc", disk.folder).returncode == 0
    disk.end(signal.SIGKILL)
    assert json.loads(disk.run("check", disk.folder).stdout.splitlines()[-1])["problems"] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_on_a_full_disk_starts_on_it_and_can_be_read(
    disk: Disk, number: int
) -> None:
    disk.serve()
    client = xs.open(disk.store)
    answered: dict[str, bytes] = {}
    append(client, answered, b"before")
    append(client, answered, LARGE)
    disk.fill()
    append_until_full(client, answered)
    disk.end(number)
    assert disk.run("cat", disk.folder, "--topic", "a").stdout.count(b"\n") == len(answered)
    disk.serve()
    client = xs.open(disk.store)
    assert contents(client) == answered
    disk.make_room()
    append(client, answered, b"after")
    assert contents(client) == answered
    said = disk.end()
    assert said.count("\n") <= 1, said
    assert json.loads(disk.run("check", disk.folder).stdout.splitlines()[-1])["problems"] == 0


def test_a_store_that_was_closed_and_has_no_room_at_all_says_so(disk: Disk) -> None:
    disk.serve()
    client = xs.open(disk.store)
    answered: dict[str, bytes] = {}
    append(client, answered, b"before")
    disk.end()
    disk.fill()
    for words in (["cat"], ["append", "a"], ["serve"], ["check"]):
        done = disk.run(words[0], disk.folder, *words[1:])
        assert done.returncode != 0
        assert done.stderr == b"xs: the disk is full: even to read the store takes 64 KiB of it\n"
    disk.make_room()
    disk.serve()
    assert contents(xs.open(disk.store)) == answered


def test_a_checkpoint_for_which_there_is_no_room_is_made_later(disk: Disk) -> None:
    disk.serve()
    client = xs.open(disk.store)
    answered: dict[str, bytes] = {}
    for number in range(100):
        append(client, answered, b"%d " % number + b"x" * 5000)
    disk.fill()
    append_until_full(client, answered)
    disk.end()  # it would fold back the log, which is larger than the room that is left
    assert os.path.getsize(disk.seen / "store/xs.db-wal") > 0
    assert disk.run("cat", disk.folder, "--topic", "a").stdout.count(b"\n") == len(answered)
    disk.make_room()
    disk.serve()
    assert contents(xs.open(disk.store)) == answered
    disk.end()
    assert not os.path.exists(disk.seen / "store/xs.db-wal")
