"""Large content that arrives over hours: what has come of it is its writer's while that lives."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator

from conftest import DEADLINE, XS, RunXs, Server, environment, start_server

import xs
from xs.cas import STALE_SECONDS

BEGINNING = os.urandom(400_000)


def arriving(folder: str) -> str:
    """The temporary file to which a body goes, once all of BEGINNING is in it."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        for entry in os.scandir(f"{folder}/cas"):
            if entry.name.startswith("new-") and entry.stat().st_size >= len(BEGINNING):
                return entry.path
        threading.Event().wait(0.01)
    raise AssertionError(os.listdir(f"{folder}/cas"))


def let_hours_pass(path: str) -> None:
    long_ago = time.time() - 2 * STALE_SECONDS
    os.utime(path, (long_ago, long_ago))


def slow_command(folder: str) -> subprocess.Popen[bytes]:
    with xs.open(folder) as store:
        store.append("a", "first")
    command = subprocess.Popen(
        [*XS, "append", folder, "slow"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert command.stdin is not None
    command.stdin.write(BEGINNING)
    command.stdin.flush()
    return command


def test_a_body_that_was_silent_for_hours_is_kept_from_gc(server: Server, run_xs: RunXs) -> None:
    def body() -> Iterator[bytes]:
        yield BEGINNING
        path = arriving(server.directory)
        let_hours_pass(path)
        assert run_xs(["gc", server.directory, "--age", "0s"]).returncode == 0
        assert os.path.exists(path)
        let_hours_pass(path)
        yield b"the end"

    with xs.open(server.directory) as store:
        made = store.append("slow", body())
        assert store.content(made) == BEGINNING + b"the end"


def test_what_a_command_has_taken_in_for_hours_is_kept_when_a_server_starts(store_dir: str) -> None:
    command = slow_command(store_dir)
    path = arriving(store_dir)
    let_hours_pass(path)
    server = start_server(store_dir)
    assert os.path.exists(path)
    out, err = command.communicate(b"the end", timeout=DEADLINE)
    assert command.returncode == 0, err
    with xs.open(store_dir) as store:
        (made,) = store.cat(topic="slow")
        assert made.id.encode() in out
        assert store.content(made) == BEGINNING + b"the end"
    server.stop()


def test_what_a_command_had_taken_in_goes_when_it_was_killed(store_dir: str, run_xs: RunXs) -> None:
    command = slow_command(store_dir)
    path = arriving(store_dir)
    command.kill()
    command.communicate()
    assert run_xs(["gc", store_dir]).returncode == 0
    assert os.path.exists(path)  # it is young
    let_hours_pass(path)
    assert run_xs(["gc", store_dir]).returncode == 0
    assert not os.path.exists(path)
