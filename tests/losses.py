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
from typing import Any, NamedTuple, Optional

from handling import Stream, until
from power import Call, Disk, calls, plain_environment, recorded, traced
from test_chunked import make_older

from xs import frame, ids, query
from xs.cas import INLINE_MAX
from xs.client import Client
from xs.errors import NotFound, XsError
from xs.frame import Frame
from xs.local import Local
from xs.reader import Reader
from xs.store import Store
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

# A process that opens stores, one after the other, as a server does or as a command does, and
# appends to them what may just have been appended: each is given as a folder and a byte.
OPENING = f"""
import os, sys
from xs.client import Client
from xs.commit import Append
from xs.local import Local
from xs.store import Store
for number, line in enumerate(sys.stdin):
    folder, byte = line.split()
    data = byte.encode() * {LARGE}
    os.write(1, b"next")
    if number % 2:
        store = Store(folder, exclusive=True, create=True)
        store.runs.end_abandoned()
        made = store.append(Append("afterwards", store.cas.take([data])))
        store.close()
    else:
        with Client(Local(folder, create=True)) as client:
            made = client.append("afterwards", data).id.encode()
    os.write(1, b"afterwards: " + made)
"""


class Promise(NamedTuple):
    """Once `told` was told, all of this is there."""

    told: bytes
    contents: Contents
    unended: Optional[str] = None  # the first frame of what is being written piece by piece


class Run:
    """Processes that did something to a store, one after the other."""

    def __init__(self, folder: str) -> None:
        """`folder` is there, and empty."""
        self.root = os.path.realpath(folder)
        self.store_dir = os.path.join(self.root, "store")
        self.promises = [Promise(b"", self._prepare())]
        self.processes: list[list[Call]] = []
        self._before = Disk(self.root)
        self._traces = tempfile.mkdtemp()
        try:
            self._make()
        finally:
            shutil.rmtree(self._traces)

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
            "from xs.cas import small\n"
            "from xs.commit import Append\n"
            "from xs.store import Store\n"
            "store = Store(sys.argv[1], exclusive=True)\n"
            "for n in range(6):\n"
            "    data = b'%d' % n * 3000\n"
            "    print(store.append(Append('notes', small(data))).decode(), flush=True)\n"
            "    if n % 2:\n"
            "        store.index.checkpoint()\n"
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
        problems = [each for each in store.check() if isinstance(each, str)]
        if problems:
            raise Wrong("; ".join(problems))
        lines = b"".join(Reader(store, query.ReadOptions(with_content=True)).history())
        shown = [Frame.from_json(line) for line in lines.splitlines()]
        shown = [each for each in shown if not each.topic.startswith("xs.")]
        _check_heads(store, shown)
        _check_effects(store, shown)
        if [each.id for each in shown if each.topic == "keyed"] != [keyed]:
            raise Wrong("what a key makes is there twice")
        return _found(store, run, shown, keyed)
    finally:
        store.close()


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
            data = each.content
            contents[each.id] = data.encode() if isinstance(data, str) else data
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


def check(
    folder: str,
    run: Run,
    made: int,
    *,
    afterwards: Optional[str] = None,
    decided: Optional[Found] = None,
) -> Found:
    """Looks at what is left in `folder`, after so many promises. Raises `Wrong`.

    Each of them has to be kept; of what was under way when the power went all is there, or nothing.
    That was `decided`, if somebody was told of the frame `afterwards` since.
    """
    found = open_again(os.path.join(folder, "store"), run)
    if afterwards is not None and decided is not None:
        if afterwards not in found.afterwards:
            raise Wrong("it was opened, and the frame that was appended then is lost")
        if (found.contents, found.broken_off) != (decided.contents, decided.broken_off):
            raise Wrong("it was opened, and is another one now")
        return found
    for promise in run.promises[made : made + 2]:
        unended = [] if promise.unended is None else [promise.unended]
        if (found.contents, found.broken_off) == (promise.contents, unended):
            return found
    wanted = run.promises[made].contents
    lost = [name for name in wanted if name not in found.contents]
    more = [name for name in found.contents if name not in wanted]
    raise Wrong(
        f"it is neither as before nor as after: without {lost}, with {more}, "
        f"broken off: {found.broken_off}"
    )


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
                    check(target, run, made)
                    if done % HANDLED_EVERY == 0:
                        handle_the_rest(os.path.join(target, "store"))
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
                    disk_left = Disk(target)
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
    stores = []
    for _, disk, made in lefts:
        after = run.promises[min(made + 1, len(run.promises) - 1)].contents
        under_way = [
            each for name, each in after.items() if name not in run.promises[made].contents
        ]
        byte = next((each[:1].decode() for each in under_way if each and len(each) == LARGE), "x")
        stores.append(f"{disk.root}/store {byte}\n")
    with tempfile.TemporaryDirectory() as traces:
        trace = os.path.join(traces, "trace")
        try:
            recorded([sys.executable, "-c", OPENING], "".join(stores).encode(), trace)
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
            decided = check(disk.root, run, made)
        done += _lose_again(run, disk, made, steps, decided, how, chance, moments)
    return done


def _lose_again(
    run: Run,
    disk: Disk,
    made: int,
    steps: list[Call],
    decided: Found,
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
            after = None
            if told:
                after = re.findall(rb"[0-9a-z]{25}", told[-1])[0].decode()
            for each in (None, chance):
                disk.lose_power(target, each)
                with _said(f"{how}, and again at step {number} of {count} of the opening"):
                    check(target, run, made, afterwards=after, decided=decided)
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
    except (Wrong, AssertionError) as error:
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
    for kind in (Migration, Life):
        with tempfile.TemporaryDirectory() as folder:
            run = kind(folder)
            moments = sum(1 for _ in run.disks())
            print(f"{kind.__name__}: {moments} moments, {len(run.promises) - 1} promises")
            for each in range(seed, seed + rounds):
                print(f"seed {each}: {look(run, each)} times without power", end=", ", flush=True)
                print(f"{look_again(run, each, None, second)} times again: each store whole")


if __name__ == "__main__":
    main()
