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
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

import pytest
from conftest import DEADLINE, XS, environment, start_server, until
from handling import program
from stores import problems
from test_alone import POINTS as POINTS_ALONE
from test_chunked import make_older

import xs
from xs import backup, tokens
from xs.address import open_transport
from xs.bulk import ALIKE_MIN
from xs.client import Client
from xs.content import INLINE_MAX, small
from xs.errors import BrokenBody, NoStore, Unavailable, XsError
from xs.store import Store
from xs.transport import HttpTransport

ROOT = Path(__file__).resolve().parent.parent

LARGE = b"large" * INLINE_MAX
OTHER = b"other" * INLINE_MAX
PIECES = b"0123456789abcdef" * 4096  # four pieces of a chunked content

BEFORE, AFTER = "before", "after"
PART = "part"  # of what is done in several commits, some, in order
# What the store shows, but for ids: topic, meta, ttl and content of each frame.
Shown = list[tuple[str, Any, Union[str, None], Union[str, bytes, None]]]


class Deed(NamedTuple):
    """Something that a process does to a store; `prepare` gives what stands for ID, if anything."""

    command: str
    stdin: bytes = b""
    prepare: Callable[[str], Union[str, None]] = lambda _: None
    program: str = ""  # in Python, which is given the command's words; else they are for xs
    again: bool = False  # doing it again completes it, and changes nothing if it was done


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


def with_a_token(store_dir: str) -> None:
    with_frames(store_dir)
    tokens.add(store_dir, "desk", append="notes.*")


def a_source(store_dir: str) -> str:
    """A store that is to be backed up to `store_dir`, where there is nothing yet."""
    source = f"{store_dir}-source"
    with_frames(source)
    with xs.open(source) as client:
        client.append("run", ["one", "two"], chunked=True)
    return source


def with_an_older_copy(store_dir: str) -> str:
    """A store that is to be backed up to `store_dir`, where a copy is from before some changes."""
    source = a_source(store_dir)
    backup.run(source, store_dir)
    with xs.open(source) as client:
        client.append("gone", LARGE + b"newer", ttl="last:1")  # whose content it now has alone
        client.append("new.topic", OTHER + b"new", meta={"n": 2})
        client.append("new.topic", "small")
    return source


def an_exported_folder(store_dir: str) -> str:
    """A folder to be imported into `store_dir`, where there is nothing yet, by several commits."""
    source, folder = f"{store_dir}-source", f"{store_dir}-folder"
    with xs.open(source) as client:
        client.append("in.index", b"i" * 5000)
        client.append("in.file", LARGE)
        client.append("in.file", LARGE, meta={"same": True})
        client.append("in.file", OTHER)
        events = [{"topic": "many", "content": f"{n} " * 50, "meta": n} for n in range(300)]
        client.append_many(events)
        client.append("in.parts", [PIECES], chunked=True)
        client.append_many(events)
        client.append("last", "one", ttl="last:1")
    command = [*XS, "export", source, folder]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return folder


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
ONCE = b'{"topic":"once","if_last":"none","content":"0"}\n'  # so that it is refused when done again
NEVER = b'{"topic":"kept","if_last":"none"}\n'
ATOMICALLY = """
import sys, xs
with xs.open(sys.argv[1]) as client:
    try:
        client.append_many(sys.stdin.buffer.read().splitlines(), atomic=True)
    except xs.errors.Conflict:
        pass
"""
ALIKE = b"".join([b'{"topic":"a.b","content":"%d"}\n' % n for n in range(2 * ALIKE_MIN)])
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
    "batch alike": Deed("append STORE --json", ALIKE, with_frames),
    "atomic": Deed("STORE", ONCE + BATCH, with_frames, ATOMICALLY, again=True),
    "atomic in vain": Deed("STORE", ONCE + BATCH + NEVER, with_frames, ATOMICALLY, again=True),
    "remove": Deed("remove STORE ID", b"", with_frames, again=True),
    "expire": Deed("append STORE a", b"small", with_an_expired_frame),
    "trim": Deed("append STORE gone --ttl last:1", b"newer", with_frames),
    "put": Deed("cas-post STORE", LARGE + b"put", with_frames, again=True),
    "put small": Deed("cas-post STORE", b"put", with_frames, again=True),
    "gc": Deed("gc STORE --age 0s", b"", with_leftovers, again=True),
    "migrate": Deed("append STORE a.b", b"new", make_older),  # type: ignore[arg-type]
    "import": Deed("import STORE", HISTORY, with_frames, again=True),
    "import folder": Deed("import STORE ID", b"", an_exported_folder, again=True),
    "first backup": Deed("backup ID STORE", b"", a_source, again=True),
    "backup": Deed("backup ID STORE", b"", with_an_older_copy, again=True),
    "add token": Deed("token add STORE phone --read", b"", with_a_token, again=True),
    "remove token": Deed("token remove STORE desk", b"", with_a_token, again=True),
    "expose": Deed("serve STORE --expose 127.0.0.1:0", b"", with_a_token),
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
    ("batch.alike-added", "batch alike", BEFORE),
    ("commit.before-fsync", "batch", BEFORE),
    ("commit.before-unlink", "batch", AFTER),
    ("commit.before-answers", "batch", AFTER),
    ("batch.part-begun", "atomic", BEFORE),
    ("batch.run-added", "atomic", BEFORE),
    ("batch.frame-added:3", "atomic", BEFORE),
    ("expiry.trimmed", "atomic", BEFORE),
    ("batch.part-done", "atomic", BEFORE),
    ("commit.unlinked", "atomic", AFTER),
    ("batch.part-undone", "atomic in vain", BEFORE),
    ("commit.before-unlink", "atomic in vain", BEFORE),
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
    ("content.placed", "import folder", BEFORE),
    ("import.content-put:2", "import folder", BEFORE),
    ("import.contents-put", "import folder", BEFORE),
    ("import.frame-added:7", "import folder", BEFORE),
    ("commit.durable:3", "import folder", PART),  # two contents, and the first of the frames
    ("import.frame-added:306", "import folder", PART),  # amid the content in parts
    ("commit.durable:7", "import folder", AFTER),
    ("backup.folder-made", "first backup", BEFORE),
    ("backup.marked", "first backup", BEFORE),
    ("backup.content-named:2", "first backup", BEFORE),
    ("backup.before-snapshot", "first backup", BEFORE),
    ("backup.before-folders-fsync", "first backup", BEFORE),
    ("backup.contents-kept", "first backup", BEFORE),
    ("backup.pages-copied", "first backup", BEFORE),
    ("backup.signed", "first backup", BEFORE),
    ("backup.before-rename", "first backup", BEFORE),
    ("backup.before-folder-fsync", "first backup", AFTER),
    ("backup.done", "first backup", AFTER),
    ("backup.locked", "backup", BEFORE),
    ("backup.content-linked", "backup", BEFORE),
    ("backup.table-done:4", "backup", BEFORE),
    ("backup.before-commit", "backup", BEFORE),
    ("backup.committed", "backup", AFTER),
    ("backup.before-unlink", "backup", AFTER),
    ("backup.unlinked", "backup", AFTER),
    ("token.before-fsync", "add token", BEFORE),
    ("token.before-rename", "add token", BEFORE),
    ("token.before-folder-fsync", "add token", AFTER),
    ("token.done", "add token", AFTER),
    ("token.before-rename", "remove token", BEFORE),
    ("token.before-folder-fsync", "remove token", AFTER),
    ("token.before-rename", "expose", BEFORE),
]

# In a repair.
POINTS_OF_REPAIRS = [
    "repair.begun",
    "repair.content-aside",
    "repair.folder-made",
    "repair.frames-saved",
    "repair.built",
    "repair.named",
    "repair.database-aside",
    "repair.log-aside",
    "repair.log-aside:2",
    "repair.before-folder-fsync",
    "repair.done",
]

# In a content that is written piece by piece: the point, and how much of it is there then.
NOTHING, SOME, ALL, WHOLE = "nothing", "some", "all, without the end", "whole"
POINTS_OF_RUNS = [
    ("run.before-claim", NOTHING),
    ("run.claimed", NOTHING),
    ("run.begun", NOTHING),
    ("run.extended", NOTHING),
    ("commit.before-fsync", NOTHING),
    ("commit.durable", SOME),
    ("run.step-done", SOME),
    ("run.extended:2", SOME),
    ("run.before-end", ALL),
    ("run.ended", WHOLE),
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
    others = (*POINTS_OF_HANDLERS, *POINTS_OF_REPAIRS)
    in_tests = {point.partition(":")[0] for point in (*tables, *others)}
    alone = {point for point, _ in POINTS_ALONE}
    assert sorted(in_code) == sorted({*in_tests, *POINTS_OF_SERVERS, *alone})


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
    head = ["-c", deed.program] if deed.program else XS[1:]
    return subprocess.run(
        [sys.executable, *head, *(words.get(word, word) for word in deed.command.split())],
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
    ] + [(f"token {each.name}", each.rights, None, None) for each in tokens.listed(store_dir)]


def wrong_in(store_dir: str) -> list[str]:
    store = Store(store_dir)
    try:
        return problems(store)
    finally:
        store.close()


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


# A deed's cases are run by one process, for which it is prepared and done unharmed once.
@pytest.mark.parametrize(
    ("point", "name", "then"),
    [pytest.param(*each, marks=pytest.mark.xdist_group(f"deed {each[1]}")) for each in POINTS],
)
def test_a_process_that_dies_at_any_step_leaves_all_of_it_or_nothing(
    point: str, name: str, then: str, store_dir: str, known: Callable[[str], Known]
) -> None:
    folder, id_text, shown = known(name)
    copy(folder, store_dir)
    done = carry_out(name, store_dir, id_text, XS_FAULT=point)
    assert done.returncode == -signal.SIGKILL, "the point was not come to"
    left = show(store_dir)
    if then == PART:
        assert left == shown[AFTER][: len(left)] and 0 < len(left) < len(shown[AFTER])
    else:
        assert left == shown[then]
    for answered in re.findall(rb'^\{.*"id":"(\w+)"', done.stdout, re.MULTILINE):
        with xs.open(store_dir) as client:
            assert client.get(answered.decode()), "it was answered"
    if DEEDS[name].again:
        if left:
            assert wrong_in(store_dir) == []
        done = carry_out(name, store_dir, id_text)
        assert done.returncode == 0 or then == AFTER, done.stderr
        assert show(store_dir) == shown[AFTER]
    check_and_go_on(store_dir)


# ---- Repairs -----------------------------------------------------------------------------------


class Ruined(NamedTuple):
    """A damaged store, to be copied, and what a repair leaves of it."""

    folder: str
    shown: Shown


@pytest.fixture(scope="module")
def ruined() -> Iterator[Ruined]:
    with tempfile.TemporaryDirectory() as made:
        folder, unharmed = f"{made}/before", f"{made}/unharmed"
        with_frames(folder)
        with xs.open(folder) as client:
            client.append("lost", b"damaged" * 100)
            client.append("lost", LARGE + b"damaged")
        (path,) = [
            path for path in Path(folder, "cas").glob("??/*") if path.read_bytes().endswith(b"ged")
        ]
        for file, old in ((path, b"large"), (Path(folder, "xs.db"), b"damageddamaged")):
            data = file.read_bytes()
            file.write_bytes(data.replace(old, old.upper(), 1))
        copy(folder, unharmed)
        assert repair(unharmed).returncode == 0
        shown = show(unharmed)
        assert [each[0] for each in shown] == ["kept", "kept", "gone", "after"]
        yield Ruined(folder, shown)


def repair(store_dir: str, **changes: str) -> subprocess.CompletedProcess[bytes]:
    command = [*XS, "check", store_dir, "--repair"]
    return subprocess.run(
        command, capture_output=True, env=environment(**changes), timeout=DEADLINE
    )


@pytest.mark.parametrize("point", POINTS_OF_REPAIRS)
def test_a_repair_that_dies_at_any_step_is_finished_by_the_next_and_loses_nothing(
    point: str, store_dir: str, ruined: Ruined
) -> None:
    copy(ruined.folder, store_dir)
    with contextlib.closing(sqlite3.connect(f"{store_dir}/xs.db")) as reader:
        # Who has it open keeps its log, which has something in it.
        reader.execute("SELECT count(*) FROM frame").fetchone()
        with xs.open(store_dir) as client:
            client.append("in.log", "it")
        assert repair(store_dir, XS_FAULT=point).returncode == -signal.SIGKILL
    if not os.path.exists(f"{store_dir}/xs.db"):
        for use in (
            lambda: xs.open(store_dir).append("other", "store"),
            lambda: open_transport(store_dir),
            lambda: Store(store_dir, exclusive=True, create=True),
            lambda: Store(store_dir),
            lambda: backup.run(store_dir, f"{store_dir}-copy"),
        ):
            with pytest.raises(Unavailable, match=f"xs check --repair {store_dir} finishes it"):
                use()
    done = repair(store_dir)
    assert done.returncode == 0, done.stderr
    shown = [*ruined.shown, ("in.log", None, "forever", "it")]
    assert show(store_dir) == shown
    aside = list(Path(store_dir).glob("aside-*"))
    assert len([path for each in aside for path in each.glob("cas/*")]) == 1
    lost = {line for each in aside for path in each.glob("*.jsonl") for line in path.open()}
    assert [json.loads(line)["topic"] for line in lost] == ["lost", "lost"]
    assert len([each for each in aside if Path(each, "xs.db").exists()]) == 1
    assert not {"xs.db.new", "repair"} & set(os.listdir(store_dir))
    check_and_go_on(store_dir)


# ---- Contents that are written piece by piece --------------------------------------------------


@contextlib.contextmanager
def writing(store_dir: str, **changes: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that writes a content in parts to the files, and has written the half of it."""
    command = subprocess.Popen(
        [*XS, "append", store_dir, "slow", "--chunked"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment(**changes),
    )
    assert command.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it is dead already
            command.stdin.write(PIECES[: len(PIECES) // 2])
            command.stdin.flush()
        until(
            lambda: command.poll() is not None or bytes_of("slow", store_dir) == len(PIECES) // 2,
            "the half of it came",
        )
        yield command
        with contextlib.suppress(BrokenPipeError):
            command.stdin.write(PIECES[len(PIECES) // 2 :])
            command.stdin.close()
        command.wait(DEADLINE)
    finally:
        command.kill()
        command.wait()
        with contextlib.suppress(BrokenPipeError):
            command.stdin.close()


def bytes_of(topic: str, store_dir: str) -> int:
    return sum(len(each[3] or "") for each in show(store_dir) if each[0] == topic)


@pytest.mark.parametrize(("point", "then"), POINTS_OF_RUNS)
def test_a_chunked_content_whose_writer_dies_at_any_step_is_never_taken_for_whole(
    point: str, then: str, store_dir: str
) -> None:
    with_frames(store_dir)
    before = show(store_dir)
    with writing(store_dir, XS_FAULT=point) as command:
        pass
    assert command.returncode == -signal.SIGKILL, "the point was not come to"
    came = bytes_of("slow", store_dir)
    if then == ALL:  # but what may have come together with the end
        assert len(PIECES) // 2 <= came <= len(PIECES)
    elif then == SOME:
        assert 0 < came < len(PIECES)
    else:
        assert came == {NOTHING: 0, WHOLE: len(PIECES)}[then]
    for again in ("run.before-end", "commit.before-fsync"):  # dies while it marks it
        done = carry_out("append", store_dir, "", XS_FAULT=again)
        assert (done.returncode == 0) == (again == "run.before-end" and then in (NOTHING, WHOLE))
    with xs.open(store_dir) as client:
        client.append("next", "writer")
        runs = list(client.cat(topic="slow"))
        assert bool(runs) == (then != NOTHING)
        assert sum("error" in each.meta for each in runs) == (then in (SOME, ALL)), "it is marked"
        if then == WHOLE:
            assert client.content(runs[0]) == PIECES
        elif runs:
            with pytest.raises(BrokenBody):
                client.content(runs[0])
    assert bytes_of("slow", store_dir) == came
    assert show(store_dir)[: len(before)] == before
    check_and_go_on(store_dir)


@pytest.mark.parametrize("point", ["run.extended", "run.before-end", "commit.begun:4"])
def test_a_server_that_dies_at_a_step_of_a_command_s_content_leaves_the_command_to_go_on(
    point: str, store_dir: str
) -> None:
    with_frames(store_dir)
    with writing(store_dir) as command:
        server = start_server(store_dir, "--no-scripts", XS_FAULT=point)
    try:
        assert server.process.wait(DEADLINE) == -signal.SIGKILL, "the point was not come to"
    finally:
        server.stop()
    assert command.returncode == 0
    with xs.open(store_dir) as client:
        first, *others = client.cat(topic="slow")
        assert client.content(first) == PIECES
        assert [each.meta.get("more") for each in others] == [True] * (len(others) - 1) + [False]
    check_and_go_on(store_dir)


# ---- Servers -----------------------------------------------------------------------------------


def serve_until_it_dies(store_dir: str, point: str) -> None:
    done = subprocess.run(
        [*XS, "serve", store_dir],
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
            [*XS, "serve", store_dir],
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
