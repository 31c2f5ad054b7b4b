"""kill -9 at any moment: what was answered is there with its content, and the store is sound."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from typing import Union

import pytest
from conftest import DEADLINE, XS, Server, environment, start_server

import xs
from xs.client import Client
from xs.content import INLINE_MAX
from xs.errors import XsError
from xs.frame import Frame
from xs.local import Local
from xs.transport import HttpTransport

ROUNDS = 25  # of each test; two of them make the fifty

Content = Union[str, bytes]


class Writers:
    """Clients that append until their server is gone, and keep what they were answered."""

    def __init__(self) -> None:
        self.answered: dict[str, Content] = {}  # the id of each append, and its content
        self.in_batches: list[list[str]] = []  # contents of each batch that was answered
        self.count = 0

    def start(self, store_dir: str, turn: int) -> list[threading.Thread]:
        path = os.path.join(store_dir, "sock")
        acts = [self.append_small, self.append_small, self.append_large, self.append_batches,
                self.append_batches, self.append_and_remove]  # fmt: skip
        threads = [
            threading.Thread(target=self._run, args=(act, path, f"{turn}.{n}"), daemon=True)
            for n, act in enumerate(acts)
        ]
        for thread in threads:
            thread.start()
        return threads

    def _run(self, act: object, path: str, name: str) -> None:
        try:
            client = Client(HttpTransport(("unix", path), None, None).open())
            n = 0
            while True:
                act(client, f"{name}.{n}")  # type: ignore[operator]
                self.count += 1
                n += 1
        except (OSError, XsError):
            pass  # the server is gone

    def append_small(self, client: Client, name: str) -> None:
        self.answered[client.append("small.one", name).id] = name

    def append_large(self, client: Client, name: str) -> None:
        data = (name.encode() + b"\xff") * (INLINE_MAX // 2)
        self.answered[client.append("large.one", data).id] = data

    def append_batches(self, client: Client, name: str) -> None:
        contents = [f"{name}.{n}" for n in range(40)]
        contents[20] = contents[20] * 4000
        events = [{"topic": "batch.many", "content": each} for each in contents]
        summary = client.append_many(events)
        if summary["appended"] == 40:
            self.in_batches.append(contents)

    def append_and_remove(self, client: Client, name: str) -> None:
        data = name * 4000
        made = client.append("short.lived", data)
        again = client.append("short.kept", data)
        self.answered[again.id] = data
        client.remove(made)


def kill(server: Server) -> None:
    server.process.send_signal(signal.SIGKILL)
    server.process.communicate(timeout=DEADLINE)


def check(store_dir: str) -> None:
    done = subprocess.run(
        [*XS, "check", store_dir],
        capture_output=True,
        env=environment(),
        timeout=DEADLINE * 2,
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


@pytest.mark.long
@pytest.mark.parametrize("half", [1, 2])
def test_every_answered_append_is_there_after_a_server_is_killed(store_dir: str, half: int) -> None:
    seed = random.randrange(10**6)
    print("seed:", seed)
    chance = random.Random(seed)
    writers = Writers()
    for turn in range(ROUNDS):
        server = start_server(store_dir)
        before = writers.count
        threads = writers.start(store_dir, turn)
        deadline = time.monotonic() + DEADLINE
        wanted = before + chance.randrange(1, 120)
        while writers.count < wanted and time.monotonic() < deadline:
            threading.Event().wait(chance.random() * 0.01)
        kill(server)
        for thread in threads:
            thread.join(DEADLINE)
            assert not thread.is_alive(), "a client of a killed server hangs"
    assert writers.count > ROUNDS
    with Client(Local(store_dir)) as client:
        found: dict[str, Frame] = {}
        by_content = set()
        for each in client.cat(with_content=True):
            assert each.id not in found
            found[each.id] = each
            by_content.add(each.content)
            assert (each.hash is None) == (each.content is None), each
    assert list(found) == sorted(found)
    for id_text, content in writers.answered.items():
        assert found[id_text].content == content, id_text
    for batch in writers.in_batches:
        assert by_content.issuperset(batch)
    check(store_dir)
    print(len(found), "frames,", len(writers.answered), "answers")


@pytest.mark.long
def test_lines_appended_to_the_files_are_kept_in_order_when_the_command_is_killed(
    store_dir: str,
) -> None:
    chance = random.Random(7)
    for turn in range(8):
        command = subprocess.Popen(
            [*XS, "append", store_dir, f"lines.{turn}", "--lines"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        assert command.stdin is not None
        stop = threading.Event()

        fed = [0]

        def feed(pipe: object = command.stdin, stop: threading.Event = stop) -> None:
            try:
                while not stop.is_set():
                    block = "".join([f"line {k}\n" for k in range(fed[0], fed[0] + 50)])  # noqa: B023
                    pipe.write(block.encode())  # type: ignore[attr-defined]
                    pipe.flush()  # type: ignore[attr-defined]
                    fed[0] += 50  # noqa: B023
            except OSError:
                pass  # killed

        thread = threading.Thread(target=feed, daemon=True)
        thread.start()
        deadline = time.monotonic() + DEADLINE
        wanted = 8000 + chance.randrange(20_000)  # the pipe alone holds some 6,000
        while fed[0] < wanted and time.monotonic() < deadline:
            threading.Event().wait(0.003)
        command.kill()
        stop.set()
        command.wait(DEADLINE)
        thread.join(DEADLINE)
        try:
            command.stdin.close()
        except OSError:
            pass  # what it still held is lost with the command
    stored = 0
    with xs.open(store_dir) as client:
        for turn in range(12):
            seen = [each.content for each in client.cat(topic=f"lines.{turn}", with_content=True)]
            assert seen == [f"line {n}" for n in range(len(seen))]
            stored += len(seen)
        assert stored > 12_000
        client.append("after", "the crashes")
    check(store_dir)


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.1, 0.15, 0.2, 0.3])
def test_a_store_whose_making_was_killed_can_be_used(store_dir: str, moment: float) -> None:
    """Killed while it makes the directory, the database, its tables, or the first frame."""
    command = subprocess.Popen(
        [*XS, "append", store_dir, "a"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    threading.Event().wait(moment)
    command.kill()
    command.wait(DEADLINE)
    done = subprocess.run(
        [*XS, "append", store_dir, "b"],
        input=b"x",
        capture_output=True,
        env=environment(),
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr.decode()
    check(store_dir)
