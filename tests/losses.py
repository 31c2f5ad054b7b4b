"""Runs of xs that are recorded, and what is left of each when the power goes at any moment.

`power` records them, and makes the disks that they may leave. What is left is opened, while the
power goes again: that, too, is recorded and replayed. So it is when a process was killed, and
nothing of what it had asked for is lost until the power goes.

tests/test_power.py looks at some moments of each run, `tools/powerloss` at all of them, as often
as it is told to.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, NamedTuple, Optional

from conftest import until
from handling import Stream
from power import Call, Disk, calls, plain_environment, recorded, traced
from stores import add
from test_chunked import make_older

from xs import backup, frame, ids, query, repair, tokens
from xs.client import Client
from xs.content import INLINE_MAX
from xs.errors import NotFound, XsError
from xs.frame import Frame
from xs.local import Local
from xs.reader import Reader
from xs.store import Store
from xs.transfer import file_name
from xs.transport import HttpTransport

LARGE = INLINE_MAX + 100  # bytes of a content that is a file
SECONDS = 20.0  # that anything recorded may take
HANDLED_EVERY = 40  # after so many losses a server goes on with the handler
OPENED_AT_ONCE = 60  # stores that are opened by one process, which is recorded

# ---- A run, and what it was to leave -----------------------------------------------------------

# Contents by id, and those that were put by themselves by hash.
Contents = dict[str, Optional[bytes]]

# It counts the frames that it is given; what each causes belongs together.
COUNTER = f"""#!{sys.executable} -ISu
import json, sys
for line in iter(sys.stdin.readline, ""):
    n = json.loads(line)["state"] + 1
    print(json.dumps({{"out": n, "state": n, "append": [{{"topic": "seen", "content": n}}]}}))
"""
COUNTED = {"run-from": "start", "topic": "in", "stateful": True, "initial_state": 0}

# A process that goes on with what is left, one after the other. It finds each where it was made.
GOING_ON = """
import os, sys
root = sys.argv[1]
store_dir = root + "/store"
{do}
for number, line in enumerate(sys.stdin):
    left, *more = line.split()
    os.unlink(root)
    os.symlink(left, root)
    os.write(1, b"next")
    made = go_on(number, *more)
    os.write(1, b"afterwards: " + made)
"""

# A store is opened as a server does or as a command does, and gets what may just have been
# appended.
OPENING = f"""
from xs.client import Client
from xs.commit import Append
from xs.local import Local
from xs.store import Store
def go_on(number, byte):
    data = byte.encode() * {LARGE}
    if number % 2:
        store = Store(store_dir, exclusive=True, create=True)
        store.runs.end_abandoned()
        made = store.append(Append("afterwards", store.cas.take([data])))
        store.close()
        return made
    with Client(Local(store_dir, create=True)) as client:
        return client.append("afterwards", data).id.encode()
"""


class Promise(NamedTuple):
    """Once `told` was told, all of this is there."""

    told: bytes
    contents: Contents
    unended: Optional[str] = None  # the first frame of what is being written piece by piece


class Run:
    """Processes that did something to a store, one after the other."""

    going_on = OPENING  # what comes next
    has_handlers = False

    def __init__(self, folder: str) -> None:
        """`folder` is there, and empty."""
        self.root = os.path.join(os.path.realpath(folder), "root")
        os.mkdir(self.root)
        self.store_dir = os.path.join(self.root, "store")
        self.promises = [Promise(b"", self._prepare())]
        self.processes: list[list[Call]] = []
        self._before = Disk(self.root)
        self._traces = tempfile.mkdtemp()
        try:
            self._make()
        finally:
            shutil.rmtree(self._traces)
        shutil.rmtree(self.root)
        os.symlink("nothing", self.root)

    def place(self, left: str) -> None:
        """Puts what is left where it was made: some files say of which folder they are."""
        os.unlink(self.root)
        os.symlink(left, self.root)

    def check(
        self, made: int, *, afterwards: Optional[bytes] = None, decided: Optional[Any] = None
    ) -> Any:
        """Looks at what is left, which has been placed, after so many promises. Raises `Wrong`.

        Each of them has to be kept; of what was under way when the power went all is there, or
        nothing. It gives what it has found. Once who goes on has told something (`afterwards`), it
        is to stay what was found, without loss of power, at their end (`decided`).
        """
        found = open_again(self.store_dir, self)
        if afterwards is not None and decided is not None:
            if re.findall("[0-9a-z]{25}", afterwards.decode())[0] not in found.afterwards:
                raise Wrong("it was opened, and the frame that was appended then is lost")
            if (found.contents, found.broken_off) != (decided.contents, decided.broken_off):
                raise Wrong("it was opened, and is another one now")
            return found
        for promise in self.promises[made : made + 2]:
            unended = [] if promise.unended is None else [promise.unended]
            if (found.contents, found.broken_off) == (promise.contents, unended):
                return found
        wanted = self.promises[made].contents
        lost = [name for name in wanted if name not in found.contents]
        more = [name for name in found.contents if name not in wanted]
        raise Wrong(
            f"it is neither as before nor as after: without {lost}, with {more}, "
            f"broken off: {found.broken_off}"
        )

    def under_way(self, made: int) -> str:
        """What who goes on is told: a byte of the large content that may just have been made."""
        before = self.promises[made].contents
        after = self.promises[min(made + 1, len(self.promises) - 1)].contents
        new = [each for name, each in after.items() if name not in before]
        return next((each[:1].decode() for each in new if each and len(each) == LARGE), "x")

    def _prepare(self) -> Contents:
        """Makes what is there before anything is recorded."""
        return {}

    def _make(self) -> None:
        raise NotImplementedError

    def _promise(
        self,
        told: str,
        added: Contents,
        *,
        without: Optional[str] = None,
        unended: Optional[str] = None,
    ) -> None:
        contents = {**self.promises[-1].contents, **added}
        if without is not None:
            del contents[without]
        self.promises.append(Promise(told.encode(), contents, unended))

    def _newest(self, data: bytes) -> str:
        """The id of the newest frame with that content."""
        return max(id_ for id_, each in self.promises[-1].contents.items() if each == data)

    def _command(self, data: bytes, *more: str) -> None:
        command = [sys.executable, "-m", "xs", "append", self.store_dir, "notes", *more]
        done = self._run(command, data)
        made = frame.id_of(done)
        self._promise(f'"id":"{made}"', {made: data})

    def _run(self, command: list[str], data: bytes, *, dies_at: str = "") -> bytes:
        trace = os.path.join(self._traces, "trace")
        told, _ = recorded(command, data, trace, dies_at=dies_at)
        self._note(trace)
        return told

    def _note(self, trace: str) -> None:
        """Adds what a process has done, when it has ended."""
        self.processes.append(calls(trace, self.end))

    @property
    def end(self) -> int:
        """A time after all that was recorded."""
        return self.processes[-1][-1].left + 1 if self.processes else 0

    def disks(self) -> Iterator[tuple[Disk, int]]:
        """The disk after each call that matters, and how many promises had been made by then.

        It is one and the same, which goes on: look at it before the next one is asked for.
        """
        disk, made = copy.deepcopy(self._before), 0
        for process in self.processes:
            disk.start_process()
            for call in process:
                if not disk.do(call):
                    continue
                while made + 1 < len(self.promises) and any(
                    self.promises[made + 1].told in each for each in disk.told
                ):
                    made += 1
                    # An answer has one promise; what was told with it may hold the next one.
                    disk.told = [disk.told[-1].partition(self.promises[made].told)[2]]
                yield disk, made


class Life(Run):
    """A store from its making on: commands and a server, and all that can be asked of them."""

    has_handlers = True

    def _make(self) -> None:
        large = [byte * LARGE for byte in (b"a", b"b", b"c", b"d")]
        self._command(large[0])
        trace = os.path.join(self._traces, "serve")
        with served(self.store_dir, trace) as client, served_too(self.store_dir) as follower:
            self._followed = follower.cat(follow=True, with_content=True)
            while next(self._followed).topic != "xs.threshold":
                pass
            self._append(client, b"small")
            first = self._append(client, large[1])
            self._append(client, b"small too")
            self._append(client, large[2], topic="last", ttl="last:1")
            self._append_batch(client, [b"1", b"2", large[3], b"3"])
            self._remove(client, first)
            self._append(client, large[1])  # its file was just unlinked
            self._append(client, b"newer", topic="last", ttl="last:1", instead=large[2])
            self._remove(client, self._newest(b"newer"))  # the head of its topic, and of all
            self._append_under_a_key(client)
            self._put_and_collect(client, large[2] + b"pinned")
            self._write_piece_by_piece(client)
            self._break_off(client)
            self._let_expire(client, large[2] + b"brief")
            self._handle(client)
        self._note(trace)
        self._command(b"on the files")
        self._command(large[2])
        self._command(b"under a key", "--key", "of a command")
        self._program()  # which folds the log back while it runs, so that it begins anew

    def _next(self) -> Frame:
        """The next frame that is delivered, but for the server's own, and what is just expiring."""
        return next(
            each
            for each in self._followed
            if not each.topic.startswith("xs.") and each.topic != "brief"
        )

    def _append(
        self,
        client: Client,
        data: bytes,
        topic: str = "notes",
        ttl: str = "forever",
        instead: Optional[bytes] = None,
        **more: Any,
    ) -> str:
        old = None if instead is None else self._newest(instead)
        made = client.append(topic, data, ttl=ttl, **more).id
        assert self._next().id == made
        self._promise(f'"id":"{made}"', {made: data}, without=old)
        return made

    def _append_batch(self, client: Client, contents: list[bytes]) -> None:
        events = [{"topic": "many", "content": each.decode()} for each in contents]
        client.append_many(events, atomic=True)
        made = [self._next().id for _ in contents]
        self._promise(f'"id":"{made[0]}"', dict(zip(made, contents)))

    def _remove(self, client: Client, id_text: str) -> None:
        assert client.remove(id_text)
        self._promise("HTTP/1.1 204 ", {}, without=id_text)

    def _append_under_a_key(self, client: Client) -> None:
        made = self._append(client, b"once", topic="keyed", key="k")
        assert client.append("keyed", b"once", key="k").id == made

    def _put_and_collect(self, client: Client, data: bytes) -> None:
        hash_ = client.cas_post(data)
        self._promise(hash_, {hash_: data})
        small_one = client.cas_post(b"pinned")
        self._promise(small_one, {small_one: b"pinned"})
        collected = json.loads(client._ask("POST", "/gc?age=0s").read())
        assert collected["removed"] == 2
        contents = dict(self.promises[-1].contents)
        del contents[hash_], contents[small_one]
        self.promises.append(Promise(b'{"removed":2,', contents))

    def _pieces(self, count: int) -> Iterator[bytes]:
        """Each when the one before has been delivered."""
        first = None
        for number in range(count):
            yield b"%d" % number * 1000
            made = self._next()
            first = first or made.id
            assert isinstance(made.content, str)
            data = made.content.encode()
            self._promise(f'"id":"{made.id}"', {made.id: data}, unended=first)

    def _write_piece_by_piece(self, client: Client) -> None:
        client.append("parts", self._pieces(3), chunked=True)
        made = self._next()
        assert made.meta["more"] is False and "error" not in made.meta
        self._promise(f'"id":"{made.id}"', {made.id: None})

    def _break_off(self, client: Client) -> None:
        def source() -> Iterator[bytes]:
            yield from self._pieces(2)
            raise ValueError

        with contextlib.suppress(ValueError):
            client.append("parts", source(), chunked=True)
        made = self._next()
        assert made.meta["error"]
        self._promise(f'"id":"{made.id}"', {made.id: None})

    def _let_expire(self, client: Client, data: bytes) -> None:
        """Whenever a store is looked at, its time has passed: nothing is promised of it."""
        made = client.append("brief", data, ttl="time:1")
        assert made.hash is not None
        digest = frame.parse_integrity(made.hash).hex()
        path = os.path.join(self.store_dir, "cas", digest[:2], digest[2:])
        until(lambda: not os.path.exists(path), "it is swept, with its content")

    def _handle(self, client: Client) -> None:
        """Frames that are handled one by one; what each causes is there at once."""
        self._append(client, COUNTER.encode(), topic="count.register", meta=COUNTED)
        made = self._next()
        assert made.topic == "count.registered", made
        self._promise(f'"id":"{made.id}"', {made.id: None})
        state = None
        for number in range(1, 4):
            self._append(client, b"%d" % number, topic="in")
            caused = [self._next() for _ in range(3)]
            assert sorted(each.topic for each in caused) == ["count", "count.state", "seen"]
            added: Contents = {each.id: b"%d" % number for each in caused}
            self._promise(f'"id":"{caused[0].id}"', added, without=state)
            state = next(each.id for each in caused if each.topic == "count.state")

    def _program(self) -> None:
        text = (
            "import sys\n"
            "from xs.content import small\n"
            "from xs.commit import Append\n"
            "from xs.store import Store\n"
            "store = Store(sys.argv[1], exclusive=True)\n"
            "for n in range(6):\n"
            "    data = b'%d' % n * 3000\n"
            "    print(store.append(Append('notes', small(data))).decode(), flush=True)\n"
            "    if n % 2:\n"
            "        writing = store.database.writing()\n"
            "        writing.execute('PRAGMA wal_checkpoint(PASSIVE)').fetchall()\n"
            "store.close()\n"
        )
        told = self._run([sys.executable, "-c", text, self.store_dir], b"")
        for n, line in enumerate(told.splitlines()):
            made = frame.id_of(line)
            self._promise(f'"id":"{made}"', {made: b"%d" % n * 3000})


class Migration(Run):
    """An older store, which is brought up to today's format by the first command."""

    def _prepare(self) -> Contents:
        make_older(self.store_dir)
        connection = sqlite3.connect(f"{self.store_dir}/xs.db")
        found = connection.execute("SELECT json, content FROM frame").fetchall()
        connection.close()
        return {frame.id_of(line.encode()): content for line, content in found}

    def _make(self) -> None:
        self._command(b"newer")
        self._command(b"newer" * INLINE_MAX)


class Killed(Run):
    """A command that is killed at a point while it makes a store, and one that does it again."""

    def __init__(self, folder: str, point: str) -> None:
        self._point = point
        super().__init__(folder)

    def _make(self) -> None:
        command = [sys.executable, "-m", "xs", "append", self.store_dir, "killed"]
        self._run(command, b"a" * LARGE, dies_at=self._point)
        self._command(b"a" * LARGE)


class Backup(Run):
    """A store is copied, changes, and the copy is brought up to date, twice."""

    going_on = """
from xs import backup
def go_on(number, byte):
    return backup.run(store_dir, root + "/copy")
"""

    def _prepare(self) -> Contents:
        self.copy_dir = os.path.join(self.root, "copy")
        self._copies: list[Optional[Contents]] = [None]  # with each promise: what the copy has
        return make_some(self.store_dir)

    def _make(self) -> None:
        text = f"""
import sys
from xs import backup
from xs.client import Client
from xs.local import Local
root = sys.argv[1]
def copy():
    print("copied " + backup.run(root + "/store", root + "/copy").decode(), flush=True)
copy()
with Client(Local(root + "/store")) as client:
    print("appended " + client.append("notes", "c" * {LARGE}).id, flush=True)
    print("appended " + client.append("notes", "small").id, flush=True)
    first = next(client.cat(limit=1)).id
    client.remove(first)
    print("removed " + first, flush=True)
copy()
copy()
"""
        told = self._run([sys.executable, "-c", text, self.root], b"")
        data = iter((b"c" * LARGE, b"small"))
        for line in told.decode().splitlines():
            what, _, rest = line.partition(" ")
            copy = self._copies[-1]
            if what == "copied":
                self._promise(line, {})
                copy = self.promises[-1].contents
            elif what == "appended":
                self._promise(line, {rest: next(data)})
            else:
                self._promise(line, {}, without=rest)
            self._copies.append(copy)

    def check(
        self, made: int, *, afterwards: Optional[bytes] = None, decided: Optional[Any] = None
    ) -> Any:
        """The store is whole, and so is its copy, or there is none; it can be made anew.

        What was being appended may be in a copy that was made since, and gone from the store.
        """
        source = read(self.store_dir)
        if source not in [each.contents for each in self.promises[made : made + 2]]:
            raise Wrong(f"the store has {list(source)}")
        is_there = os.path.exists(os.path.join(self.copy_dir, "xs.db"))
        copy = read(self.copy_dir) if is_there else None
        before = [] if afterwards is not None else self._copies[made : made + 2]
        if copy not in [*before, decided or source]:
            raise Wrong(f"the store has {list(source)}, its copy has {list(copy or ())}")
        backup.run(self.store_dir, self.copy_dir)
        if read(self.copy_dir) != source:
            raise Wrong("the next backup has something else")
        return copy


class Repair(Run):
    """A damaged store is repaired."""

    going_on = """
from xs import repair
def go_on(number, byte):
    return list(repair.run(store_dir))[-1]
"""

    def _prepare(self) -> Contents:
        self._damage()
        self._kept = [data for _, data in files_of(self.store_dir) if data]
        trial = os.path.join(self.root, "trial")
        shutil.copytree(self.store_dir, trial)
        lines = [json.loads(line) for line in repair.run(trial)]
        assert lines[-1]["repaired"], lines
        (self._aside,) = [data for path, data in files_of(trial) if path.endswith("frames.jsonl")]
        found = read(trial)
        shutil.rmtree(trial)
        return found

    def _damage(self) -> None:
        """A content file, and the lines of frames, have other bytes."""
        with Client(Local(self.store_dir, create=True)) as client:
            made = [client.append("notes", b"%d" % n * LARGE) for n in range(3)]
            for n in range(20):
                client.append("notes", b"%d" % n, key=f"key {n}")
            client.append("notes", [b"1", b"2"], chunked=True)
        assert made[1].hash is not None
        digest = frame.parse_integrity(made[1].hash).hex()
        _flip(os.path.join(self.store_dir, "cas", digest[:2], digest[2:]), 100)
        connection = sqlite3.connect(f"{self.store_dir}/xs.db")
        connection.execute(
            "UPDATE frame SET json = replace(json, 'null', '1234') WHERE row % 3 = 0"
        )
        connection.commit()
        connection.close()

    def _make(self) -> None:
        text = (
            "import sys\n"
            "from xs import repair\n"
            "for line in repair.run(sys.argv[1]):\n"
            "    print(line.decode(), end='', flush=True)\n"
        )
        self._run([sys.executable, "-c", text, self.store_dir], b"")
        self._promise('{"repaired":{"frames"', {})

    def check(
        self, made: int, *, afterwards: Optional[bytes] = None, decided: Optional[Any] = None
    ) -> Any:
        """It is as before or repaired, and what was damaged is still there as it was."""
        repaired = self.promises[0].contents
        try:
            found = read(self.store_dir)
        except Wrong as error:
            if made or afterwards is not None:
                raise Wrong(f"it was repaired, and is not whole: {error}") from error
            found = None
        if found not in (None, repaired):
            raise Wrong(f"it seems whole, with {list(found or ())}")
        self._check_kept(is_repaired=found is not None)
        list(repair.run(self.store_dir))
        if read(self.store_dir) != repaired:
            raise Wrong("the next repair has saved something else")
        self._check_kept(is_repaired=True)

    def _check_kept(self, *, is_repaired: bool) -> None:
        there = list(files_of(self.store_dir))
        for data in self._kept:
            if data not in [each for _, each in there]:
                raise Wrong(f"{len(data)} bytes that were there before are gone: {data[:50]!r}")
        put_aside = [data for path, data in there if path.endswith("frames.jsonl")]
        if is_repaired and self._aside not in put_aside:
            raise Wrong("the frames that are lost are not named any more")


class RepairOfLog(Repair):
    """… whose write-ahead log has another byte."""

    def _damage(self) -> None:
        whole = os.path.join(self.root, "whole")
        store = Store(whole, create=True)
        for n in range(8):
            add(store, "notes", b"%d" % n * (LARGE if n == 4 else 1000))
        shutil.copytree(whole, self.store_dir, ignore=shutil.ignore_patterns("xs.db-shm"))
        store.close()  # which folds the log back
        shutil.rmtree(whole)
        log = os.path.join(self.store_dir, "xs.db-wal")
        _flip(log, os.path.getsize(log) // 2)


class Tokens(Run):
    """Tokens are made and removed: the owner's, and those of others."""

    going_on = """
from xs import tokens
def go_on(number, byte):
    return tokens.owner_token(store_dir).encode()
"""

    def _prepare(self) -> Contents:
        os.mkdir(self.store_dir)
        return {}

    def _make(self) -> None:
        text = """
import sys
from xs import tokens
folder = sys.argv[1]
print(f"owner {tokens.owner_token(folder)}", flush=True)
for name in ("a", "b", "c"):
    print(f"{name} {tokens.add(folder, name, read=True)}", flush=True)
tokens.remove(folder, "b")
print("b gone", flush=True)
"""
        told = self._run([sys.executable, "-c", text, self.store_dir], b"")
        for line in told.decode().splitlines():
            name, token = line.split()
            if token == "gone":
                self._promise(line, {}, without=name)
            elif name == "owner":
                self._promise(line, {name: f"{token}\n".encode()})
            else:
                self._promise(line, {name: sha256(token.encode()).hexdigest().encode()})

    def check(
        self, made: int, *, afterwards: Optional[bytes] = None, decided: Optional[Any] = None
    ) -> Any:
        """Each file is as before or as after, never half, and can be changed again."""
        found = self._found()
        allowed = [promise.contents for promise in self.promises[made : made + 2]]
        if afterwards is not None:  # there is an owner's token in any case
            allowed = [decided or {"owner": found.get("owner"), **each} for each in allowed]
        elif decided:
            allowed.append(decided)
        if found not in allowed:
            raise Wrong(f"there are tokens of {list(found)}, with {found.get('owner')!r}")
        tokens.add(self.store_dir, "more", read=True)
        tokens.owner_token(self.store_dir)
        if self._found().keys() != {*found, "owner", "more"}:
            raise Wrong("they can't be changed any more")
        return found

    def _found(self) -> Contents:
        try:
            found: Contents = {
                each.name: each.hash.encode() for each in tokens.listed(self.store_dir)
            }
        except XsError as error:
            raise Wrong(str(error)) from error
        with contextlib.suppress(FileNotFoundError), open(f"{self.store_dir}/token", "rb") as file:
            found["owner"] = file.read()
        return found


class Export(Run):
    """A store is exported to a folder."""

    going_on = """
from xs import cli
def go_on(number, byte):
    assert cli.run(["export", store_dir, root + "/again"]) == 0
    return b"exported"
"""

    def _prepare(self) -> Contents:
        return make_some(self.store_dir)

    def _make(self) -> None:
        out = os.path.join(self.root, "out")
        self._run([sys.executable, "-c", XS, "export", self.store_dir, out], b"")
        self._promise("done: 0", {})

    def check(
        self, made: int, *, afterwards: Optional[bytes] = None, decided: Optional[Any] = None
    ) -> Any:
        """A folder with a `frames.jsonl` has everything, and the store has nothing else."""
        stored = self.promises[0].contents
        if read(self.store_dir) != stored:
            raise Wrong("the store has something else")
        for name, is_told in (("out", made > 0), ("again", afterwards is not None)):
            out = os.path.join(self.root, name)
            if os.path.exists(os.path.join(out, "frames.jsonl")):
                if _exported(out) != stored:
                    raise Wrong(f"{name} seems to be complete, and is not")
            elif is_told:
                raise Wrong(f"{name} is not there")


class Import(Run):
    """An exported folder is imported into a new store."""

    going_on = """
from xs import cli
def go_on(number, byte):
    assert cli.run(["import", store_dir, root + "/out"]) == 0
    return b"imported"
"""

    def _prepare(self) -> Contents:
        source, out = (os.path.join(self.root, name) for name in ("source", "out"))
        self._all = make_some(source)
        subprocess.run([sys.executable, "-m", "xs", "export", source, out], check=True)
        return {}

    def _make(self) -> None:
        out = os.path.join(self.root, "out")
        self._run([sys.executable, "-c", XS, "import", self.store_dir, out], b"")
        self._promise("done: 0", self._all)

    def check(
        self, made: int, *, afterwards: Optional[bytes] = None, decided: Optional[Any] = None
    ) -> Any:
        """All of it is there, or nothing; all, if it was said so or done again."""
        is_there = os.path.exists(os.path.join(self.store_dir, "xs.db"))
        found = read(self.store_dir) if is_there else {}
        if found != self._all and (found or made or afterwards is not None):
            raise Wrong(f"of {list(self._all)} there is {list(found)}")
        return found


# The program, which says at its end how that was.
XS = "import sys; from xs import cli; print(f'done: {cli.run(sys.argv[1:])}')"


def make_some(store_dir: str) -> Contents:
    """A new store, with contents large and small."""
    with Client(Local(store_dir, create=True)) as client:
        for byte in (b"a", b"b"):
            client.append("notes", byte * LARGE)
            client.append("notes", byte)
        client.append("notes")
        client.append("parts", [b"1", b"2"], chunked=True)
    return read(store_dir)


def _exported(out: str) -> Contents:
    with open(os.path.join(out, "frames.jsonl"), "rb") as lines:
        frames = [Frame.from_json(line) for line in lines]
    contents = dict.fromkeys(each.id for each in frames)
    for each in frames:
        if each.hash:
            with open(os.path.join(out, "cas", file_name(each.hash)), "rb") as file:
                contents[each.id] = file.read()
    return contents


def files_of(folder: str) -> Iterator[tuple[str, bytes]]:
    """The files of a store that say what is stored, with their bytes."""
    for where, _, names in os.walk(folder):
        for name in names:
            if name not in ("lock", "xs.db-shm"):
                path = os.path.join(where, name)
                with open(path, "rb") as file:
                    yield path, file.read()


def _flip(path: str, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@contextlib.contextmanager
def served(store_dir: str, trace: str) -> Iterator[Client]:
    """A client of a server that is recorded; at the end it has stopped in good order."""
    process = subprocess.Popen(
        traced([sys.executable, "-m", "xs", "serve", store_dir], trace),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=plain_environment(),
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while (client := connected(store_dir)) is None:
            assert time.monotonic() < deadline and process.poll() is None, "it doesn't come up"
            time.sleep(0.01)
        with client:
            yield client
        with open(os.path.join(store_dir, "lock")) as file:
            os.kill(int(file.read().split()[0]), signal.SIGTERM)
        process.wait(SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def connected(store_dir: str) -> Optional[Client]:
    """A client of the server that is there, if it is."""
    try:
        client = Client(HttpTransport(("unix", f"{store_dir}/sock"), None, None).open())
        client.version()
    except (OSError, XsError):
        return None
    return client


def served_too(store_dir: str) -> Client:
    """A further client of the server that is there."""
    client = connected(store_dir)
    assert client is not None
    return client


# ---- What is left ------------------------------------------------------------------------------


class Wrong(Exception):
    """What is wrong with a store that is left."""


class Found(NamedTuple):
    """What is in a store that was opened, and to which something was appended."""

    contents: Contents
    broken_off: list[str]  # first frames of what was marked so since
    afterwards: list[str]


def open_again(store_dir: str, run: Run) -> Found:
    """Opens a store that is left, as whoever comes next. Raises `Wrong`."""
    try:
        with Client(Local(store_dir, create=True)) as client:
            client.append("afterwards", b"x" * (INLINE_MAX + 1))
            keyed = client.append("keyed", b"once", key="k").id
        store = Store(store_dir)
    except (OSError, XsError) as error:
        raise Wrong(f"it can't be opened and written to: {error}") from error
    try:
        shown = _shown(store)
        _check_heads(store, shown)
        _check_effects(store, shown)
        if [each.id for each in shown if each.topic == "keyed"] != [keyed]:
            raise Wrong("what a key makes is there twice")
        return _found(store, run, shown, keyed)
    finally:
        store.close()


def read(store_dir: str) -> Contents:
    """All that is in a store, which is whole, by id. Raises `Wrong`."""
    try:
        store = Store(store_dir)
        try:
            return {each.id: _content(each) for each in _shown(store)}
        finally:
            store.close()
    except (OSError, XsError) as error:
        raise Wrong(f"it can't be read: {error}") from error


def _shown(store: Store) -> list[Frame]:
    """All of its frames with their contents, but for the server's own. Raises `Wrong`."""
    problems = [each for each in store.check() if isinstance(each, str)]
    if problems:
        raise Wrong("; ".join(problems))
    lines = b"".join(Reader(store, query.ReadOptions(with_content=True)).history())
    shown = [Frame.from_json(line) for line in lines.splitlines()]
    return [each for each in shown if not each.topic.startswith("xs.")]


def _content(shown: Frame) -> Optional[bytes]:
    return shown.content.encode() if isinstance(shown.content, str) else shown.content


def _found(store: Store, run: Run, shown: list[Frame], keyed: str) -> Found:
    known = {name for promise in run.promises for name in promise.contents}
    contents: Contents = {}
    broken_off, afterwards = [], []
    for each in shown:
        if each.topic == "afterwards":
            afterwards.append(each.id)
        elif each.id not in known and isinstance(each.meta, dict) and "error" in each.meta:
            broken_off.append(each.meta["chunk"])
        elif each.id != keyed or keyed in known:
            contents[each.id] = _content(each)
    for name in known:
        if not ids.is_id(name):
            with contextlib.suppress(NotFound):
                contents[name] = b"".join(store.content(name)[1])
    return Found(contents, broken_off, afterwards)


def _check_heads(store: Store, shown: list[Frame]) -> None:
    """The newest of each topic is found by its index as well."""
    newest = {each.topic: each.id for each in shown if "chunk" not in (each.meta or {})}
    for topic, id_text in newest.items():
        line = store.index.last(frame.parse_patterns(topic), store.clock())
        if line is None or frame.id_of(line) != id_text:
            raise Wrong(f"the head of {topic} is not {id_text}")


def _check_effects(store: Store, shown: list[Frame]) -> None:
    """What a handler has finished has had its effects, and nothing else has."""
    kept = [each for each in store.index.scripts("handler", "count") if each.active]
    given = [each.id for each in shown if each.topic == "in"]
    finished = [each for each in given if kept and each <= kept[0].position]
    for topic in ("count", "seen"):
        if [each.meta["frame_id"] for each in shown if each.topic == topic] != finished:
            raise Wrong(f"what a handler has finished and its frames on {topic} don't agree")
    states = [each.content for each in shown if each.topic == "count.state"]
    if states != [str(len(finished))] * bool(finished):
        raise Wrong(f"what a handler has finished and its state don't agree: {states}")


def handle_the_rest(store_dir: str) -> None:
    """A server goes on with the handler; each frame has had its effects once then."""
    stream = Stream(store_dir)
    try:
        if stream.frames("count.register"):
            for topic in ("count", "seen"):
                stream.wait_for(topic, len(stream.frames("in")))
                assert stream.causes(topic) == [each.id for each in stream.frames("in")]
    finally:
        stream.close()


def look(run: Run, seed: int, samples: Optional[int] = None) -> int:
    """Loses power at `samples` moments and the last one, or at all; how often it did.

    Raises `Wrong`.
    """
    chance = random.Random(seed)
    done = 0
    with _folder() as folder:
        for moment, disk, made in _moments(run, chance, samples):
            for each in (None, chance):
                target = os.path.join(folder, "left")
                disk.lose_power(target, each)
                how = "with parts of what was not fsynced" if each else "with what was fsynced"
                with _said(f"seed {seed}, moment {moment}, {how}"):
                    run.place(target)
                    run.check(made)
                    if run.has_handlers and done % HANDLED_EVERY == 0:
                        handle_the_rest(run.store_dir)
                shutil.rmtree(target)
                done += 1
    return done


def look_again(run: Run, seed: int, samples: Optional[int], moments: Optional[int]) -> int:
    """Loses power a second time, while what is left is opened; how often it did.

    At each of `samples` moments, or at all, the power goes, or the process is killed; then it goes
    at `moments` moments of the opening, or at all. Raises `Wrong`.
    """
    chance = random.Random(seed)
    done = 0
    with _folder() as folder:
        lefts: list[tuple[str, Disk, int]] = []
        for moment, disk, made in _moments(run, chance, samples):
            for how in ("nothing but what was fsynced", "parts", "killed"):
                target = os.path.join(folder, f"{len(lefts)}")
                if how == "killed":
                    disk_left = disk.kill(target)
                else:
                    disk.lose_power(target, chance if how == "parts" else None)
                    disk_left = Disk(target, run.root)
                lefts.append((f"seed {seed}, moment {moment}, {how}", disk_left, made))
            if len(lefts) >= OPENED_AT_ONCE:
                done += _open_all(run, lefts, chance, moments)
                lefts.clear()
                for name in os.listdir(folder):
                    shutil.rmtree(os.path.join(folder, name))
        return done + _open_all(run, lefts, chance, moments)


def _open_all(
    run: Run, lefts: list[tuple[str, Disk, int]], chance: random.Random, moments: Optional[int]
) -> int:
    """Has all of them opened by one process, which is recorded."""
    lines = [f"{disk.root} {run.under_way(made)}\n" for _, disk, made in lefts]
    program = GOING_ON.format(do=run.going_on)
    with tempfile.TemporaryDirectory() as traces:
        trace = os.path.join(traces, "trace")
        try:
            recorded([sys.executable, "-c", program, run.root], "".join(lines).encode(), trace)
        except AssertionError:
            raise Wrong(f"one of {[how for how, _, _ in lefts]} can't be opened") from None
        opening: list[list[Call]] = []
        for call in calls(trace, run.end):
            if call.strings and call.strings[0].startswith(b"next"):
                opening.append([])
            if opening:
                opening[-1].append(call)
    assert len(opening) == len(lefts)
    done = 0
    for (how, disk, made), steps in zip(lefts, opening):
        with _said(how):
            run.place(disk.root)
            decided = run.check(made, afterwards=b"")
        done += _lose_again(run, disk, made, steps, decided, how, chance, moments)
    return done


def _lose_again(
    run: Run,
    disk: Disk,
    made: int,
    steps: list[Call],
    decided: Any,
    how: str,
    chance: random.Random,
    moments: Optional[int],
) -> int:
    disk.start_process()
    count, done = len(steps), 0
    chosen = set(range(count) if moments is None else chance.sample(range(count), moments))
    target = disk.root + "-again"
    for number, call in enumerate(steps):
        if disk.do(call) and number in chosen:
            told = [each for each in disk.told if each.startswith(b"afterwards: ")]
            afterwards = told[-1] if told else None
            for each in (None, chance):
                disk.lose_power(target, each)
                with _said(f"{how}, and again at step {number} of {count} of what came next"):
                    run.place(target)
                    run.check(made, afterwards=afterwards, decided=decided)
                shutil.rmtree(target)
                done += 1
    return done


def _moments(
    run: Run, chance: random.Random, samples: Optional[int]
) -> Iterator[tuple[int, Disk, int]]:
    count = sum(1 for _ in run.disks())
    chosen = set(range(count) if samples is None else chance.sample(range(count), samples))
    chosen.add(count - 1)
    for moment, (disk, made) in enumerate(run.disks()):
        if moment in chosen:
            yield moment, disk, made


@contextlib.contextmanager
def _said(where: str) -> Iterator[None]:
    try:
        yield
    except (Wrong, XsError, OSError, ValueError, AssertionError) as error:
        raise Wrong(f"{where}: {error}") from error


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Where stores that are left lie: in memory, if that can be, since nothing of it is to last."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield os.path.realpath(folder)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    second = None if sys.argv[3:] == ["all"] else int(sys.argv[3]) if len(sys.argv) > 3 else 2
    for kind in (Migration, Backup, Repair, RepairOfLog, Tokens, Export, Import, Life):
        with tempfile.TemporaryDirectory() as folder:
            run = kind(folder)
            moments = sum(1 for _ in run.disks())
            print(f"{kind.__name__}: {moments} moments, {len(run.promises) - 1} promises")
            for each in range(seed, seed + rounds):
                print(f"seed {each}: {look(run, each)} times without power", end=", ", flush=True)
                print(f"{look_again(run, each, None, second)} times again: each store whole")


if __name__ == "__main__":
    main()
