"""A process dies at each step that it takes, by name (xs/fault.py), and nothing comes of it.

What is done is done by commands and servers as they are: each is prepared once, and once done
unharmed, so that it is known how the store is before and after. Then, on a copy, it is killed at a
point: the store must be the one or the other, whole, as the point says.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

import pytest
from conftest import DEADLINE, environment, start_server
from handling import program, until
from stores import problems
from test_chunked import make_older

import xs
from xs.cas import INLINE_MAX, small
from xs.client import Client
from xs.errors import BrokenBody, NoStore, XsError
from xs.store import Store
from xs.transport import HttpTransport

ROOT = Path(__file__).resolve().parent.parent

LARGE = b"large" * INLINE_MAX
OTHER = b"other" * INLINE_MAX
PIECES = b"0123456789abcdef" * 4096  # four pieces of a chunked content

BEFORE, AFTER = "before", "after"
# What the store shows, but for ids: topic, meta, ttl and content of each frame.
Shown = list[tuple[str, Any, Union[str, None], Union[str, bytes, None]]]


class Deed(NamedTuple):
    """Something that a process does to a store; `prepare` gives what stands for ID, if anything."""

    command: str
    stdin: bytes = b""
    prepare: Callable[[str], Union[str, None]] = lambda _: None


def with_frames(store_dir: str) -> str:
    """A store with some frames in it; the id of one with large content."""
    with xs.open(store_dir) as client:
        client.append("kept", "small", meta={"n": 1})
        client.append("kept", OTHER)
        made = client.append("gone", LARGE, ttl="last:1")
        client.append("after", "it")
    return made.id


def with_an_expired_frame(store_dir: str) -> None:
    with_frames(store_dir)
    with xs.open(store_dir) as client:
        client.append("expired.one", LARGE + b"!", ttl="time:1")


def with_leftovers(store_dir: str) -> None:
    """Contents that were put by themselves, small and large, and a file that nothing names."""
    with_frames(store_dir)
    with xs.open(store_dir) as client:
        client.cas_post(b"pinned")
        client.cas_post(LARGE + b"pinned")
    store = Store(store_dir)
    made = store.cas.take([LARGE + b"orphan"])
    assert made is not None
    store.cas.place(made)
    store.close()


def with_a_handler(store_dir: str) -> None:
    """A handler that counts, and three frames for it to be given."""
    counter = program(
        """
        for given in frames():
            n = given["state"]
            answer({"state": n + 1, "out": n, "append": [{"topic": "seen", "content": n}]})
        """
    )
    meta = {"run-from": "start", "topic": "in", "stateful": True, "initial_state": 0}
    with xs.open(store_dir) as client:
        for n in range(3):
            client.append("in", str(n))
        client.append("count.register", counter, meta=meta)


BATCH = b"".join(
    json.dumps(event).encode() + b"\n"
    for event in (
        {"topic": "a", "content": "1"},
        {"topic": "b", "content": "2"},
        {"topic": "b", "content": "3", "key": "k"},
        {"topic": "c.d", "content": "4" * (INLINE_MAX + 1)},
        {"topic": "gone", "content": "5", "ttl": "last:1"},
        {"topic": "a", "content": "6"},
    )
)
OLD = {"topic": "old", "meta": None, "ttl": "forever"}
HISTORY = b"".join(
    json.dumps({**OLD, "id": id_text, "hash": small(data).hash, "content": data.decode()}).encode()
    + b"\n"
    for id_text, data in (("03a".ljust(25, "1"), b"x"), ("03a".ljust(25, "2"), b"y" * 20_000))
)

DEEDS = {
    "make": Deed("append STORE a", b"first"),
    "append": Deed("append STORE a", b"small", with_frames),
    "append large": Deed("append STORE a", LARGE + b"new", with_frames),
    "batch": Deed("append STORE --json", BATCH, with_frames),
    "remove": Deed("remove STORE ID", b"", with_frames),
    "expire": Deed("append STORE a", b"small", with_an_expired_frame),
    "trim": Deed("append STORE gone --ttl last:1", b"newer", with_frames),
    "put": Deed("cas-post STORE", LARGE + b"put", with_frames),
    "put small": Deed("cas-post STORE", b"put", with_frames),
    "gc": Deed("gc STORE --age 0s", b"", with_leftovers),
    "migrate": Deed("append STORE a.b", b"new", make_older),  # type: ignore[arg-type]
    "import": Deed("import STORE", HISTORY, with_frames),
    "sweep": Deed("serve STORE", b"", with_an_expired_frame),
}

# The point, with a count where it is not the first time; what is done; how the store is then.
POINTS = [
    ("store.locked", "make", BEFORE),
    ("store.folders-made", "make", BEFORE),
    ("migration.before-log", "make", BEFORE),
    ("migration.before-steps", "make", BEFORE),
    ("migration.step-done", "make", BEFORE),
    ("migration.step-done:3", "make", BEFORE),
    ("migration.before-commit", "make", BEFORE),
    ("migration.done", "make", BEFORE),
    ("store.before-folder-fsync", "make", BEFORE),
    ("commit.before-fsync", "make", BEFORE),
    ("commit.durable", "make", AFTER),
    ("commit.begun", "append", BEFORE),
    ("commit.applied", "append", BEFORE),
    ("commit.before-fsync", "append", BEFORE),
    ("commit.durable", "append", AFTER),
    ("commit.before-delivery", "append", AFTER),
    ("commit.before-answers", "append", AFTER),
    ("commit.answered", "append", AFTER),
    ("content.block-written", "append large", BEFORE),
    ("content.before-fsync", "append large", BEFORE),
    ("content.folder-made", "append large", BEFORE),
    ("content.before-rename", "append large", BEFORE),
    ("content.before-folder-fsync", "append large", BEFORE),
    ("content.placed", "append large", BEFORE),
    ("commit.before-fsync", "append large", BEFORE),
    ("commit.durable", "append large", AFTER),
    ("batch.run-added", "batch", BEFORE),
    ("batch.run-added:2", "batch", BEFORE),
    ("batch.frame-added", "batch", BEFORE),
    ("batch.frame-added:2", "batch", BEFORE),
    ("commit.before-fsync", "batch", BEFORE),
    ("commit.before-unlink", "batch", AFTER),
    ("commit.before-answers", "batch", AFTER),
    ("removal.done", "remove", BEFORE),
    ("commit.before-fsync", "remove", BEFORE),
    ("commit.before-unlink", "remove", AFTER),
    ("commit.unlinked", "remove", AFTER),
    ("expiry.removed", "expire", BEFORE),
    ("commit.before-fsync", "expire", BEFORE),
    ("commit.before-unlink", "expire", AFTER),
    ("commit.unlinked", "expire", AFTER),
    ("expiry.removed", "sweep", BEFORE),
    ("commit.before-unlink", "sweep", AFTER),
    ("expiry.trimmed", "trim", BEFORE),
    ("commit.before-fsync", "trim", BEFORE),
    ("commit.before-unlink", "trim", AFTER),
    ("content.before-pin", "put", BEFORE),
    ("content.before-pin", "put small", BEFORE),
    ("commit.durable", "put", AFTER),
    ("gc.pins-taken", "gc", BEFORE),
    ("commit.before-unlink", "gc", BEFORE),
    ("gc.unpinned", "gc", BEFORE),
    ("gc.orphan-found", "gc", BEFORE),
    ("commit.unlinked:2", "gc", AFTER),
    ("gc.orphans-removed", "gc", AFTER),
    ("gc.done", "gc", AFTER),
    ("migration.before-log", "migrate", BEFORE),
    ("migration.before-steps", "migrate", BEFORE),
    ("migration.step-done", "migrate", BEFORE),
    ("migration.step-done:2", "migrate", BEFORE),
    ("migration.before-commit", "migrate", BEFORE),
    ("migration.done", "migrate", BEFORE),
    ("import.frame-added", "import", BEFORE),
    ("import.frame-added:2", "import", BEFORE),
    ("commit.before-fsync", "import", BEFORE),
    ("commit.durable", "import", AFTER),
]

# In a content that is written piece by piece: the point, and how many pieces are there then.
POINTS_OF_RUNS = [
    ("run.before-claim", 0),
    ("run.claimed", 0),
    ("run.begun", 0),
    ("run.extended", 0),
    ("run.step-done", 1),
    ("run.extended:2", 1),
    ("run.before-end", 1),
    ("commit.durable", 1),
]

# In the life of a handler.
POINTS_OF_HANDLERS = [
    "handler.effects-added",
    "handler.effects-added:2",
    "handler.position-kept",
    "handler.position-kept:2",
    "handler.committed",
]

# In each commit of a server, its first one on.
POINTS_OF_SERVERS = [
    "commit.before-fsync",
    "commit.before-delivery",
    "commit.before-answers",
    "commit.answered",
]


def test_each_point_in_the_code_is_one_at_which_a_test_dies() -> None:
    in_code = []
    for path in (ROOT / "xs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "fault.at":
                assert isinstance(node.args[0], ast.Constant)
                in_code.append(node.args[0].value)
    tables = [row[0] for row in (*POINTS, *POINTS_OF_RUNS)]
    in_tests = {point.partition(":")[0] for point in (*tables, *POINTS_OF_HANDLERS)}
    assert sorted(in_code) == sorted({*in_tests, *POINTS_OF_SERVERS})


# ---- What is done by a command, or by a server by itself ---------------------------------------


class Known(NamedTuple):
    """A deed's store before it, to be copied, and what it shows before and after."""

    folder: str
    id: str
    shown: dict[str, Shown]


@pytest.fixture(scope="module")
def known() -> Iterator[Callable[[str], Known]]:
    folder = tempfile.mkdtemp()
    yield functools.lru_cache(None)(functools.partial(make_known, folder))
    shutil.rmtree(folder)


def make_known(folder: str, name: str) -> Known:
    deed = DEEDS[name]
    made = tempfile.mkdtemp(dir=folder)
    before, unharmed = f"{made}/before", f"{made}/unharmed"
    id_text = str(deed.prepare(before))
    copy(before, unharmed)
    shown = {BEFORE: [], AFTER: []} if not os.path.exists(before) else {}
    if not shown:
        shown[BEFORE] = show(unharmed)
        shutil.rmtree(unharmed)
        copy(before, unharmed)
    if not deed.command.startswith("serve"):
        done = carry_out(name, unharmed, id_text)
        assert done.returncode == 0, done.stderr.decode()
    shown[AFTER] = show(unharmed)
    return Known(before, id_text, shown)


def copy(source: str, target: str) -> None:
    if os.path.exists(source):
        shutil.copytree(source, target)


def carry_out(
    name: str, store_dir: str, id_text: str, **changes: str
) -> subprocess.CompletedProcess[bytes]:
    deed = DEEDS[name]
    words = {"STORE": store_dir, "ID": id_text}
    return subprocess.run(
        [sys.executable, "-m", "xs", *(words.get(word, word) for word in deed.command.split())],
        input=deed.stdin,
        capture_output=True,
        env=environment(**changes),
        timeout=DEADLINE,
    )


def show(store_dir: str) -> Shown:
    """What is there; nothing, where no store was made. Who reads makes no difference to it."""
    try:
        with xs.open(store_dir) as client:
            frames = list(client.cat(with_content=True))
    except NoStore:
        return []
    return [
        (each.topic, each.meta, each.ttl, each.content)
        for each in frames
        if not each.topic.startswith("xs.")
    ]


def check_and_go_on(store_dir: str) -> None:
    """`xs check` finds nothing, gc takes what was left over, and the store is as good as new."""
    with xs.open(store_dir) as client:
        client.append("afterwards", LARGE + b"afterwards")
    shown = show(store_dir)
    store = Store(store_dir, exclusive=True)
    try:
        assert problems(store) == []
        for path in Path(store_dir, "cas").glob("new-*"):
            os.utime(path, (0, 0))  # as old as if its writer had been dead for long
        store.gc(0)
        assert list(Path(store_dir, "cas").glob("new-*")) == []
        assert list(store.cas.digests()) == list(store.index.file_digests())
        assert problems(store) == []
    finally:
        store.close()
    assert show(store_dir) == shown


@pytest.mark.parametrize(("point", "name", "then"), POINTS)
def test_a_process_that_dies_at_any_step_leaves_all_of_it_or_nothing(
    point: str, name: str, then: str, store_dir: str, known: Callable[[str], Known]
) -> None:
    folder, id_text, shown = known(name)
    copy(folder, store_dir)
    done = carry_out(name, store_dir, id_text, XS_FAULT=point)
    assert done.returncode == -signal.SIGKILL, "the point was not come to"
    assert show(store_dir) == shown[then]
    with xs.open(store_dir) as client:
        for answered in re.findall(rb'^\{.*"id":"(\w+)"', done.stdout, re.MULTILINE):
            assert client.get(answered.decode()), "it was answered"
    check_and_go_on(store_dir)


# ---- Contents that are written piece by piece --------------------------------------------------


@pytest.mark.parametrize(("point", "count"), POINTS_OF_RUNS)
def test_a_chunked_content_whose_writer_dies_at_any_step_is_never_taken_for_whole(
    point: str, count: int, store_dir: str
) -> None:
    with_frames(store_dir)
    before = show(store_dir)
    command = subprocess.Popen(
        [sys.executable, "-m", "xs", "append", store_dir, "slow", "--chunked"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment(XS_FAULT=point),
    )
    assert command.stdin is not None
    try:
        for start in range(0, len(PIECES), len(PIECES) // 2):
            command.stdin.write(PIECES[start : start + len(PIECES) // 2])
            command.stdin.flush()
            until(
                lambda: command.poll() is not None or len(show(store_dir)) > len(before), "it came"
            )
        command.stdin.close()
    except OSError:
        pass  # it is dead already
    assert command.wait(DEADLINE) == -signal.SIGKILL, "the point was not come to"
    with xs.open(store_dir) as client:
        client.append("next", "writer")
        runs = list(client.cat(topic="slow"))
        assert bool(runs) == bool(count)
        if runs:
            assert runs[-1].meta["error"], "it is marked"
            with pytest.raises(BrokenBody):
                client.content(runs[0])
    assert show(store_dir)[: len(before)] == before
    check_and_go_on(store_dir)


# ---- Servers -----------------------------------------------------------------------------------


def serve_until_it_dies(store_dir: str, point: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xs", "serve", store_dir],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(XS_FAULT=point),
        timeout=DEADLINE,
    )
    assert done.returncode == -signal.SIGKILL, "the point was not come to"


@pytest.mark.parametrize("point", POINTS_OF_HANDLERS)
def test_a_handler_whose_server_dies_at_any_step_of_a_commit_has_each_effect_once(
    point: str, store_dir: str
) -> None:
    with_a_handler(store_dir)
    serve_until_it_dies(store_dir, point)
    shown = show(store_dir)
    outputs = [each[3] for each in shown if each[0] == "count"]
    assert outputs == [each[3] for each in shown if each[0] == "seen"], "all of a frame, or nothing"
    server = start_server(store_dir)
    try:
        with connected(store_dir) as client:
            until(lambda: len(list(client.cat(topic="count"))) == 3, "all are answered")
    finally:
        server.stop()
    shown = show(store_dir)
    for topic in ("count", "seen"):
        assert [each[3] for each in shown if each[0] == topic] == ["0", "1", "2"]
    assert [each[3] for each in shown if each[0] == "count.state"] == ["3"]
    check_and_go_on(store_dir)


@pytest.mark.parametrize("point", POINTS_OF_SERVERS)
def test_a_server_that_dies_in_any_of_its_commits_has_all_that_it_answered_and_delivered(
    point: str, store_dir: str
) -> None:
    with_frames(store_dir)
    seen: list[str] = []
    for count in (1, 3, 4):  # when it starts, and in the first and the second append after that
        server = subprocess.Popen(
            [sys.executable, "-m", "xs", "serve", store_dir],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(XS_FAULT=f"{point}:{count}"),
        )
        try:
            while server.poll() is None:
                seen += append_until_it_dies(store_dir)
                threading.Event().wait(0.01)  # it may not be up yet
            assert server.wait(DEADLINE) == -signal.SIGKILL
        finally:
            server.kill()
            server.wait()
        with xs.open(store_dir) as client:
            found = {each.id: each.content for each in client.cat(with_content=True)}
        for id_text in seen:
            assert found.get(id_text) == LARGE.decode(), id_text
    assert seen, "it has answered something before it died"
    check_and_go_on(store_dir)


def append_until_it_dies(store_dir: str) -> list[str]:
    """Appends a frame whenever one was delivered; the ids of all that were, or were answered."""
    seen: list[str] = []
    gone = (OSError, XsError)
    with contextlib.suppress(*gone), connected(store_dir) as one, connected(store_dir) as other:
        for each in one.cat(follow=True, topic="live"):
            if each.topic == "live":
                seen.append(each.id)
            with contextlib.suppress(*gone):
                seen.append(other.append("live", LARGE).id)
    return seen


def connected(store_dir: str) -> Client:
    return Client(HttpTransport(("unix", f"{store_dir}/sock"), None, None).open())
