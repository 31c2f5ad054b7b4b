"""Power loss, simulated: what a run of xs told the kernel, and the disks that it may leave.

The system calls of real processes are recorded by strace, with their data. Replayed up to any
moment, they give a `Disk`: what was made durable, and what was only asked for. `Disk.lose_power`
writes into a folder what may be left: of all that was not fsynced any part, in any order, writes
cut off at a sector; a name is durable once its folder was fsynced, and not when its file was.
That is less than what any file system of today promises.

`losses` has the runs, and looks at what is left of them.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional, Union

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECTOR = 512  # bytes that a disk writes whole, or not at all

# ---- What a process asked the kernel for -------------------------------------------------------

# Those that change a file or a name, and those that tell somebody. (`?`: not every machine has it.)
_TRACED = (
    "openat,?open,close,write,pwrite64,ftruncate,fsync,fdatasync,sync,?rename,renameat,renameat2,"
    "?link,linkat,?unlink,unlinkat,?rmdir,?mkdir,mkdirat,sendto,sendmsg,clone,?clone3"
)
_CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+)")
_STRING = re.compile(r'"([^"]*)"')
_FOLDER = re.compile(r"(AT_FDCWD|\d+), (?=,|$)")  # an argument that a path comes after


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
    # With a filter in the kernel the calls that don't matter take no longer than they do.
    what = ["-e", f"trace={_TRACED}", "-e", "signal=none", "-xx", "-s", "16777216"]
    return ["strace", "--seccomp-bpf", "-f", "-qq", *what, "-o", output, *command]


def calls(path: str, start: int = 0) -> list[Call]:
    """The calls of one process, by all of its threads, in the order in which they ended.

    `start` is the number of the first line: traces of several processes are one time. What it
    starts, as a script's process, has its own files, and is left out.
    """
    found = []
    begun: dict[str, tuple[str, int]] = {}
    with open(path, encoding="ascii") as lines:
        threads = set(_threads(lines))
        lines.seek(0)
        for number, line in enumerate(lines, start):
            thread, _, text = line.strip().partition(" ")
            if thread not in threads:
                continue
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


def _threads(lines: Iterator[str]) -> Iterator[str]:
    """The threads of the process that the trace begins with; a thread may come before its name."""
    first = next(lines, "")
    yield first.partition(" ")[0]
    begun = set()
    for line in lines:
        thread, _, text = line.partition(" ")
        if "CLONE_THREAD" in text and "<unfinished" in text:
            begun.add(thread)
        elif "CLONE_THREAD" in text or (thread in begun and "resumed>" in text):
            begun.discard(thread)
            yield text.rpartition("= ")[2].strip()


def recorded(
    command: list[str], stdin: bytes, trace: str, *, dies_at: str = ""
) -> tuple[bytes, list[Call]]:
    """Runs it, to its end or to where it is to die; what it said, and its calls."""
    environment = {**plain_environment(), **({"XS_FAULT": dies_at} if dies_at else {})}
    done = subprocess.run(
        traced(command, trace), input=stdin, stdout=subprocess.PIPE, env=environment
    )
    assert done.returncode == (-signal.SIGKILL if dies_at else 0), done
    return done.stdout, calls(trace)


def plain_environment() -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("XS_")}
    return {**kept, "PYTHONPATH": ROOT, "PYTHONDONTWRITEBYTECODE": "1"}


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

    def all(self) -> bytes:
        """What a process reads in it, as long as the power is there."""
        data = bytearray(self.durable)
        for _, change in self.pending:
            _change(data, change)
        return bytes(data)

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

    def __init__(self, root: str, seen_as: Optional[str] = None) -> None:
        """What is in that folder now is durable. Processes may know it by a link to it as well."""
        self.root = root
        self.seen_as = seen_as or root
        self.told: list[bytes] = []  # what went to terminals, pipes and sockets
        self._names: dict[str, Node] = {}
        for folder, folders, files in os.walk(root):
            for name in folders:
                self._names[os.path.relpath(os.path.join(folder, name), root)] = None
            for name in files:
                path = os.path.join(folder, name)
                node = self._names[os.path.relpath(path, root)] = File()
                with contextlib.suppress(OSError), open(path, "rb") as file:  # if it is no socket
                    node.durable = file.read()
        self._durable = dict(self._names)
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
        elif name == "sync":
            self._all_synced(call)
        elif name.startswith("mkdir"):
            self._named(call, {self._paths(call)[0]: None})
        elif name.startswith(("unlink", "rmdir")):
            self._named(call, {self._paths(call)[0]: False})
        elif name.startswith("rename"):
            old, new = self._paths(call)
            if old in self._names:
                self._named(call, {new: self._names[old], old: False})
        elif name.startswith("link"):
            old, new = self._paths(call)
            self._named(call, {new: self._names[old]})
        return name not in ("openat", "open", "close") or len(self._pending) != known

    def _paths(self, call: Call) -> list[str]:
        """The paths that it names, relative to the root; "../…" for what is elsewhere."""
        folders = _FOLDER.findall(call.arguments) or ["AT_FDCWD"] * len(call.strings)
        found = []
        for folder, path in zip(folders, call.strings):
            name = os.fsdecode(path)
            if not os.path.isabs(name) and folder != "AT_FDCWD":
                found.append(os.path.join(self._open.get(int(folder), ("..", None))[0], name))
                continue
            path = os.path.relpath(name, self.root)  # as SQLite has it, which follows links
            found.append(os.path.relpath(name, self.seen_as) if path.startswith("..") else path)
        return found

    def _named(self, call: Call, names: Names) -> None:
        if any(path.startswith("..") for path in names):
            return
        self._pending.append((call.left, names))
        _name(self._names, names)

    def _opened(self, call: Call) -> None:
        path = self._paths(call)[0]
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

    def _all_synced(self, call: Call) -> None:
        """sync(2): on Linux it returns when all that was written and named before is durable."""
        for node in self._names.values():
            if node is not None:
                node.sync(call.entered)
        for when, names in self._pending:
            if when < call.entered:
                _name(self._durable, names)
        self._pending = [each for each in self._pending if each[0] >= call.entered]

    def lose_power(self, folder: str, chance: Optional[random.Random]) -> None:
        """Writes to `folder` what may be left; without chance only what was fsynced is."""
        names = dict(self._durable)
        for _, change in self._pending:
            if chance and chance.random() < 0.5:
                _name(names, change)
        _write(folder, names, lambda node: node.left(chance))

    def kill(self, folder: str) -> Disk:
        """Writes to `folder` what a process leaves that is killed now; and it goes on from there.

        Nothing is lost, and nothing more of it is durable.
        """
        _write(folder, self._names, File.all)
        disk = copy.deepcopy(self)
        disk.root = folder
        disk.told = []
        return disk


def _write(folder: str, names: dict[str, Node], data_of: Callable[[File], bytes]) -> None:
    os.mkdir(folder)
    for path in sorted(names):  # a folder before what is in it
        node, where = names[path], os.path.join(folder, path)
        if not os.path.isdir(os.path.dirname(where)):
            continue  # the folder's own name is lost
        if node is None:
            os.mkdir(where)
        else:
            with open(where, "wb") as file:
                file.write(data_of(node))


def _name(names: dict[str, Node], changes: Names) -> None:
    for path, node in changes.items():
        if isinstance(node, bool):
            names.pop(path, None)
        else:
            names[path] = node
