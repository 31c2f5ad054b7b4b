"""Power loss, simulated: what a run of xs told the kernel, and the disks that it may leave.

The system calls of real processes are recorded by strace, with their data. Replayed up to any
moment, they give a `Disk`: what was made durable, and what was only asked for. `Disk.lose_power`
writes into a folder what may be left: of all that was not fsynced any part, in any order, writes
cut off at a sector; a name is durable once its folder was fsynced, and not when its file was.
That is less than what any file system of today promises.

tests/test_power.py looks at some moments of a run, `tools/powerloss` at all of them, as often as
it is told to.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple, Optional, Union

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from xs import frame, query  # noqa: E402  (the path comes first)
from xs.cas import INLINE_MAX  # noqa: E402
from xs.client import Client  # noqa: E402
from xs.errors import XsError  # noqa: E402
from xs.local import Local  # noqa: E402
from xs.reader import Reader  # noqa: E402
from xs.store import Store  # noqa: E402
from xs.transport import HttpTransport  # noqa: E402

SECTOR = 512  # bytes that a disk writes whole, or not at all
SECONDS = 20.0  # that anything recorded may take

# ---- What a process asked the kernel for -------------------------------------------------------

# Those that change a file or a name, and those that tell somebody. (`?`: not every machine has it.)
_TRACED = (
    "openat,?open,close,write,pwrite64,ftruncate,fsync,fdatasync,?rename,renameat,renameat2,"
    "?unlink,unlinkat,?mkdir,mkdirat,sendto,sendmsg"
)
_CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+)")
_STRING = re.compile(r'"([^"]*)"')


class Call(NamedTuple):
    """One system call that succeeded: its strings apart from its other arguments, and when."""

    name: str
    strings: list[bytes]
    arguments: str
    result: int
    entered: int  # a line's number in the trace; so is `left`
    left: int

    @property
    def fd(self) -> int:
        return int(self.arguments.partition(",")[0])


def traced(command: list[str], output: str) -> list[str]:
    """`command`, recorded to that file."""
    what = ["-f", "-qq", "-xx", "-s", "16777216", "-e", f"trace={_TRACED}", "-e", "signal=none"]
    return ["strace", *what, "-o", output, *command]


def calls(path: str, start: int = 0) -> list[Call]:
    """The calls of one process, by all of its threads, in the order in which they ended.

    `start` is the number of the first line: traces of several processes are one time.
    """
    found = []
    begun: dict[str, tuple[str, int]] = {}
    with open(path, encoding="ascii") as lines:
        for number, line in enumerate(lines, start):
            thread, _, text = line.strip().partition(" ")
            text, entered = text.strip(), number
            if text.endswith("<unfinished ...>"):
                begun[thread] = (text[: -len("<unfinished ...>")], number)
                continue
            if text.startswith("<..."):
                start, entered = begun.pop(thread)
                text = start + text.partition("resumed>")[2]
            parts = _CALL.match(text)
            if parts is None or int(parts[3]) < 0:
                continue  # it failed, or its process was ended amid it
            strings = [bytes.fromhex(each.replace("\\x", "")) for each in _STRING.findall(parts[2])]
            arguments = _STRING.sub("", parts[2])
            found.append(Call(parts[1], strings, arguments, int(parts[3]), entered, number))
    return found


def recorded(command: list[str], stdin: bytes, trace: str) -> tuple[bytes, list[Call]]:
    """Runs it; what it said, and its calls."""
    done = subprocess.run(
        traced(command, trace), input=stdin, stdout=subprocess.PIPE, env=_environment(), check=True
    )
    return done.stdout, calls(trace)


# ---- The disk ----------------------------------------------------------------------------------


class File:
    """What of a file is durable, and the writes after that: where and what, or a new length."""

    def __init__(self) -> None:
        self.durable = b""
        self.pending: list[tuple[int, Union[tuple[int, bytes], int]]] = []

    def sync(self, before: int) -> None:
        """What was written before that moment is durable."""
        data = bytearray(self.durable)
        for when, change in self.pending:
            if when < before:
                _change(data, change)
        self.durable = bytes(data)
        self.pending = [each for each in self.pending if each[0] >= before]

    def left(self, chance: Optional[random.Random]) -> bytes:
        """What may be left of it; without chance all that was not fsynced is lost."""
        data = bytearray(self.durable)
        pending = [change for _, change in self.pending] if chance else []
        if chance and chance.random() < 0.3:
            chance.shuffle(pending)
        for change in pending:
            assert chance is not None
            if chance.random() < 0.4:
                continue
            if not isinstance(change, int) and chance.random() < 0.3:
                at, block = change
                end = at + chance.randrange(len(block) + 1)
                change = (at, block[: max(0, end - end % SECTOR - at)])
            _change(data, change)
        return bytes(data)


def _change(data: bytearray, change: Union[tuple[int, bytes], int]) -> None:
    if isinstance(change, int):
        del data[change:]
        data.extend(bytes(change - len(data)))
        return
    at, block = change
    if block:
        data.extend(bytes(max(0, at - len(data))))
        data[at : at + len(block)] = block


Node = Optional[File]  # None: a folder
Names = dict[str, Union[File, bool, None]]  # False: the name is no more


class Disk:
    """The files below one folder, as far as calls have come."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.told: list[bytes] = []  # what went to terminals, pipes and sockets
        self._names: dict[str, Node] = {}
        self._durable: dict[str, Node] = {}
        self._pending: list[tuple[int, Names]] = []
        self._open: dict[int, tuple[str, Node]] = {}
        self._at: dict[int, int] = {}

    def start_process(self) -> None:
        self._open.clear()

    def do(self, call: Call) -> bool:
        """Takes note of one more call; whether it matters to what is left."""
        name, known = call.name, len(self._pending)
        if name in ("openat", "open"):
            self._opened(call)
        elif name == "close":
            self._open.pop(call.fd, None)
        elif name in ("write", "pwrite64", "ftruncate", "sendto", "sendmsg"):
            self._written(call)
        elif name in ("fsync", "fdatasync"):
            self._synced(call)
        elif name.startswith("mkdir"):
            self._named(call, {self._path(call.strings[0]): None})
        elif name.startswith("unlink"):
            self._named(call, {self._path(call.strings[0]): False})
        elif name.startswith("rename"):
            old, new = (self._path(each) for each in call.strings)
            if old in self._names:
                self._named(call, {new: self._names[old], old: False})
        return name not in ("openat", "open", "close") or len(self._pending) != known

    def _path(self, path: bytes) -> str:
        """Relative to the root; "../…" for what is elsewhere."""
        return os.path.relpath(os.fsdecode(path), self.root)

    def _named(self, call: Call, names: Names) -> None:
        if any(path.startswith("..") for path in names):
            return
        self._pending.append((call.left, names))
        _name(self._names, names)

    def _opened(self, call: Call) -> None:
        path = self._path(call.strings[0])
        if path.startswith("..") or path.endswith("-shm"):  # SQLite makes that anew
            self._open.pop(call.result, None)
            return
        if "O_CREAT" in call.arguments and path not in self._names:
            self._named(call, {path: File()})
        node = self._names.get(path)
        if node is not None and "O_TRUNC" in call.arguments:
            node.pending.append((call.left, 0))
        self._open[call.result] = (path, node)
        self._at[call.result] = 0

    def _written(self, call: Call) -> None:
        node = self._open.get(call.fd, ("", None))[1]
        if node is None:
            self.told.append(b"".join(call.strings))
        elif call.name == "ftruncate":
            node.pending.append((call.left, int(call.arguments.rpartition(",")[2])))
        else:
            data = call.strings[0][: call.result]
            at = self._at[call.fd]
            if call.name == "pwrite64":
                at = int(call.arguments.rpartition(",")[2])
            else:
                self._at[call.fd] = at + len(data)
            node.pending.append((call.left, (at, data)))

    def _synced(self, call: Call) -> None:
        path, node = self._open.get(call.fd, ("..", None))
        if node is not None:
            node.sync(call.entered)
        elif not path.startswith(".."):
            kept = []
            for when, names in self._pending:
                inside = {
                    name: node
                    for name, node in names.items()
                    if when < call.entered and (os.path.dirname(name) or ".") == path
                }
                _name(self._durable, inside)
                rest = {name: node for name, node in names.items() if name not in inside}
                if rest:
                    kept.append((when, rest))
            self._pending = kept

    def lose_power(self, folder: str, chance: Optional[random.Random]) -> None:
        """Writes to `folder` what may be left; without chance only what was fsynced is."""
        names = dict(self._durable)
        for _, change in self._pending:
            if chance and chance.random() < 0.5:
                _name(names, change)
        os.mkdir(folder)
        for path in sorted(names):  # a folder before what is in it
            node, where = names[path], os.path.join(folder, path)
            if not os.path.isdir(os.path.dirname(where)):
                continue  # the folder's own name is lost
            if node is None:
                os.mkdir(where)
            else:
                with open(where, "wb") as file:
                    file.write(node.left(chance))


def _name(names: dict[str, Node], changes: Names) -> None:
    for path, node in changes.items():
        if isinstance(node, bool):
            names.pop(path, None)
        else:
            names[path] = node


# ---- A run, and what it was to leave -----------------------------------------------------------

Frames = dict[str, Optional[bytes]]  # contents by id


class Promise(NamedTuple):
    """Once `told` was told, these frames are there."""

    told: bytes
    frames: Frames


class Run:
    """Processes that did something to a store, one after the other."""

    def __init__(self, folder: str) -> None:
        """`folder` is there, and empty."""
        self.root = os.path.realpath(folder)
        self.store_dir = os.path.join(self.root, "store")
        self.promises = [Promise(b"", {})]
        self.processes: list[list[Call]] = []
        self._traces = tempfile.mkdtemp()
        try:
            self._make()
        finally:
            shutil.rmtree(self._traces)

    def _make(self) -> None:
        large = [name * (INLINE_MAX + 100) for name in (b"a", b"b", b"c", b"d")]
        self._command(large[0])
        trace = os.path.join(self._traces, "serve")
        with served(self.store_dir, trace) as client:
            self._append(client, b"small")
            first = self._append(client, large[1])
            self._append(client, b"small too")
            self._append(client, large[2], topic="last", ttl="last:1")
            self._append_batch(client, [b"1", b"2", large[3], b"3"])
            self._remove(client, first)
            self._append(client, large[1])  # its file was just unlinked
            self._append(client, b"newer", topic="last", ttl="last:1", instead=large[2])
            client.cas_post(large[2])
        self._note(trace)
        self._command(b"on the files")
        self._command(large[2])
        self._program()  # which folds the log back while it runs, so that it begins anew

    def _promise(self, told: str, added: Frames, *, without: Optional[str] = None) -> None:
        frames = {**self.promises[-1].frames, **added}
        if without is not None:
            del frames[without]
        self.promises.append(Promise(told.encode(), frames))

    def _append(
        self,
        client: Client,
        data: bytes,
        topic: str = "notes",
        ttl: str = "forever",
        instead: Optional[bytes] = None,
    ) -> str:
        made = client.append(topic, data, ttl=ttl).id
        without = [id_ for id_, each in self.promises[-1].frames.items() if each == instead]
        old = without[-1] if instead is not None else None
        self._promise(f'"id":"{made}"', {made: data}, without=old)
        return made

    def _append_batch(self, client: Client, contents: list[bytes]) -> None:
        summary = client.append_many(
            [{"topic": "many", "content": each.decode()} for each in contents], atomic=True
        )
        made = [each.id for each in client.last("many", n=len(contents))]
        self._promise(f'"last":"{summary["last"]}"', dict(zip(made, contents)))

    def _remove(self, client: Client, id_text: str) -> None:
        assert client.remove(id_text)
        self._promise("HTTP/1.1 204 ", {}, without=id_text)

    def _command(self, data: bytes) -> None:
        command = [sys.executable, "-m", "xs", "append", self.store_dir, "notes"]
        done = self._run(command, data)
        made = frame.id_of(done)
        self._promise(f'"id":"{made}"', {made: data})

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

    def _run(self, command: list[str], data: bytes) -> bytes:
        trace = os.path.join(self._traces, "trace")
        told, _ = recorded(command, data, trace)
        self._note(trace)
        return told

    def _note(self, trace: str) -> None:
        """Adds what a process has done, when it has ended."""
        start = self.processes[-1][-1].left + 1 if self.processes else 0
        self.processes.append(calls(trace, start))

    def disks(self) -> Iterator[tuple[Disk, int]]:
        """The disk after each call that matters, and how many promises had been made by then.

        It is one and the same, which goes on: look at it before the next one is asked for.
        """
        disk, made = Disk(self.root), 0
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


@contextlib.contextmanager
def served(store_dir: str, trace: str) -> Iterator[Client]:
    """A client of a server that is recorded; at the end it has stopped in good order."""
    process = subprocess.Popen(
        traced([sys.executable, "-m", "xs", "serve", store_dir, "--no-scripts"], trace),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=_environment(),
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


def _environment() -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("XS_")}
    return {**kept, "PYTHONPATH": ROOT, "PYTHONDONTWRITEBYTECODE": "1"}


# ---- What is left ------------------------------------------------------------------------------


def wrong(folder: str, run: Run, made: int) -> Optional[str]:
    """What is wrong with the store in `folder`, after so many promises; None if nothing is.

    Each of them has to be kept; of what was under way when the power went all is there, or nothing.
    """
    store_dir = os.path.join(folder, "store")
    try:
        with Client(Local(store_dir, create=True)) as client:
            after = client.append("afterwards", b"x" * (INLINE_MAX + 1)).id
        store = Store(store_dir)
    except (OSError, XsError) as error:
        return f"it can't be opened and written to: {error}"
    try:
        problems = [each for each in store.check() if isinstance(each, str)]
        if problems:
            return "; ".join(problems)
        found: Frames = {}
        lines = b"".join(Reader(store, query.ReadOptions(with_content=True)).history())
        for line in lines.splitlines():
            each = frame.Frame.from_json(line)
            if not each.topic.startswith("xs.") and each.id != after:
                data = each.content
                found[each.id] = data.encode() if isinstance(data, str) else data
    finally:
        store.close()
    allowed = [promise.frames for promise in run.promises[made : made + 2]]
    if found not in allowed:
        lost = [id_text for id_text in allowed[0] if id_text not in found]
        return f"it is neither as before nor as after: {len(found)} frames, without {lost}"
    return None


def look(run: Run, seed: int, samples: Optional[int] = None) -> int:
    """Loses power at `samples` moments, or at all; how often it did. Raises `AssertionError`."""
    chance = random.Random(seed)
    count = sum(1 for _ in run.disks())
    moments = set(range(count)) if samples is None else set(chance.sample(range(count), samples))
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        for moment, (disk, made) in enumerate(run.disks()):
            if moment not in moments:
                continue
            for each in (None, chance):
                target = os.path.join(folder, "left")
                disk.lose_power(target, each)
                found = wrong(target, run, made)
                how = "with parts of what was not fsynced" if each else "with what was fsynced"
                assert found is None, f"seed {seed}, moment {moment} of {count}, {how}: {found}"
                shutil.rmtree(target)
                done += 1
    return done


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        print(f"{sum(1 for _ in run.disks())} moments, {len(run.promises) - 1} promises")
        for each in range(seed, seed + rounds):
            print(
                f"seed {each}: {look(run, each)} times without power, each store whole", flush=True
            )


if __name__ == "__main__":
    main()
