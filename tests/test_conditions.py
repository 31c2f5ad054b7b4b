"""Two writers can't both win, and a retry can't double, however many try at once."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from typing import Callable

import pytest
from conftest import DEADLINE, XS, Server, environment, start_server
from stores import together
from test_model import InProcess, Opened

import xs
from xs.client import Client
from xs.errors import Conflict, Invalid
from xs.frame import Frame
from xs.local import Local
from xs.store import Store

WRITERS = 50
Opener = Callable[[], Client]


@pytest.fixture(params=["server", "in process", "files"])
def opener(request: pytest.FixtureRequest, store_dir: str) -> Iterator[Opener]:
    """A function that gives one more client of the same store."""
    if request.param == "server":
        server: Server = start_server(store_dir)
        yield lambda: xs.open(store_dir)
        server.stop()
    elif request.param == "in process":
        store = Opened(store_dir, exclusive=True, create=True)
        yield lambda: Client(InProcess(store))
        store.close()
    else:
        Store(store_dir, create=True).close()
        yield lambda: Client(Local(store_dir))


def race(opener: Opener, act: Callable[[Client, int], Frame]) -> tuple[list[Frame], list[Conflict]]:
    won: list[Frame] = []
    lost: list[Conflict] = []

    def run(n: int) -> None:
        with opener() as client:
            try:
                won.append(act(client, n))
            except Conflict as conflict:
                lost.append(conflict)

    together(WRITERS, run)
    return won, lost


def test_of_all_that_expect_the_same_newest_frame_exactly_one_wins(opener: Opener) -> None:
    with opener() as client:
        newest = "none"
        for turn in range(4):
            won, lost = race(
                opener, lambda c, n: c.append("t", f"{turn} {n}", if_last=newest)  # noqa: B023
            )  # fmt: skip
            assert len(won) == 1 and len(lost) == WRITERS - 1
            for conflict in lost:
                assert conflict.frame is not None
                assert json.loads(conflict.frame)["id"] == won[0].id
            newest = won[0].id
            client.append("other", "does not matter")
        assert [each.topic for each in client.cat(topic="t,other")] == ["t", "other"] * 4


def test_all_retries_with_one_key_make_one_frame(opener: Opener) -> None:
    with opener() as client:
        for key in ("k", "κλειδί", "x" * 255):
            won, lost = race(opener, lambda c, n: c.append("t", f"{n}", key=key))  # noqa: B023
            assert not lost and len(won) == WRITERS
            assert len(set(won)) == 1
            assert client.append("t", key=key) == won[0]
            assert client.append("u", key=key) != won[0]
        assert len(list(client.cat(topic="t"))) == 3


def test_large_contents_of_retries_leave_one(opener: Opener) -> None:
    with opener() as client:
        won, _ = race(opener, lambda c, n: c.append("t", b"%d" % n * 20_000, key="k"))
        assert len({each.id for each in won}) == 1
        content = client.content(won[0])
        assert content in [b"%d" % n * 20_000 for n in range(WRITERS)]


def test_a_key_answers_its_first_frame_even_when_that_is_removed(opener: Opener) -> None:
    with opener() as client:
        made = client.append("t", "x", key="k")
        assert client.remove(made)
        assert client.append("t", "y", key="k") == made
        assert list(client.cat(topic="t")) == []


def test_conditions_in_batches_are_judged_line_by_line(opener: Opener) -> None:
    with opener() as client:
        lines = [
            {"topic": "t", "if_last": "none", "content": "1"},
            {"topic": "t", "if_last": "none", "content": "2"},
            {"topic": "t", "key": "k", "content": "3"},
            {"topic": "t", "key": "k", "content": "4"},
        ]
        summary = client.append_many(lines)
        assert summary["appended"] == 3
        assert [each["line"] for each in summary["errors"]] == [2]
        with pytest.raises((Conflict, Invalid)):
            client.append_many([{"topic": "u"}, lines[0]], atomic=True)
        seen = [each.content for each in client.cat(topic="t,u", with_content=True)]
        assert seen == ["1", "3"]


def test_an_expired_or_removed_frame_is_no_newest_one(opener: Opener) -> None:
    with opener() as client:
        first = client.append("t", "stays")
        client.append("t", "goes", ttl="time:1")
        removed = client.append("t", "removed")
        client.remove(removed)
        deadline = threading.Event()
        while client.last("t") != first:
            deadline.wait(0.005)
        assert client.append("t", "next", if_last=first).topic == "t"


def test_of_commands_that_race_one_wins(store_dir: str) -> None:
    commands = [
        subprocess.Popen(
            [*XS, "append", store_dir, "t", "--if-last", "none"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        for _ in range(10)
    ]
    done = [command.communicate(timeout=DEADLINE) for command in commands]
    assert sorted(command.returncode for command in commands) == [0] + [1] * 9, done
    with xs.open(store_dir) as client:
        assert len(list(client.cat())) == 1


def test_twelve_commands_at_once_make_one_store_with_all_their_frames(store_dir: str) -> None:
    commands = [
        subprocess.Popen(
            [*XS, "append", store_dir, f"t.{n}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        for n in range(12)
    ]
    for command in commands:
        _, err = command.communicate(timeout=DEADLINE)
        assert command.returncode == 0, err.decode()
    with xs.open(store_dir) as client:
        assert len(list(client.cat())) == 12
