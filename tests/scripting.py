"""Scripts in tests: a store that runs them in the test's own process, and what becomes of them."""

from __future__ import annotations

import binascii
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
from conftest import nu_path, until
from stores import add, lines

from xs.scripts import Scripts
from xs.store import Store


class Frame(NamedTuple):
    """A frame with its content."""

    topic: str
    id: str
    meta: Any
    content: bytes
    has_content: bool


def as_frame(line: bytes) -> Frame:
    fields = json.loads(line)
    data = fields.get("content", "").encode()
    if "content_base64" in fields:
        data = binascii.a2b_base64(fields["content_base64"])
    return Frame(fields["topic"], fields["id"], fields["meta"], data, fields["hash"] is not None)


class Service:
    """A store whose scripts are kept running by this process; `start` again after `stop`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.start()

    def start(self, *, scripts: bool = True) -> None:
        self.store = Store(self.folder, exclusive=True, create=True)
        self.scripts: Optional[Scripts] = None
        if scripts:
            self.scripts = Scripts(self.store, self.said.append)
            self.scripts.start()

    def stop(self) -> None:
        if self.scripts is not None:
            self.scripts.stop()
        self.store.close()

    def append(
        self, topic: str, data: bytes | str = b"", /, ttl: str = "forever", **meta: Any
    ) -> str:
        """Appends a frame; its id."""
        data = data.encode() if isinstance(data, str) else data
        return add(self.store, topic, data, meta=json.dumps(meta or None), ttl=ttl)

    def frames(self, topic: str) -> list[Frame]:
        return [as_frame(line) for line in lines(self.store, topic=topic, with_content=True)]

    def wait(self, topic: str, count: int = 1) -> list[Frame]:
        """The frames of that topic, once there are so many."""
        until(lambda: len(lines(self.store, topic=topic)) >= count, f"{count} of {topic}")
        return self.frames(topic)

    def values(self, name: str, count: int) -> list[bytes]:
        """The first so many values of a generator."""
        return [each.content for each in self.wait(f"{name}.recv", count)[:count]]

    def topics(self, pattern: str) -> list[str]:
        """The topics of those frames, in order."""
        return [each.topic for each in self.frames(pattern)]

    def status(self, name: str) -> dict[str, Any]:
        """What `xs ps` shows of it; empty if it is not in service."""
        assert self.scripts is not None
        return next((each for each in self.scripts.status() if each["name"] == name), {})

    def pid(self, name: str) -> int:
        """The pid of its process, once there is one."""
        until(lambda: self.status(name).get("pid"), f"a process of {name}")
        return int(self.status(name)["pid"])

    def is_out(self, name: str) -> bool:
        return not self.status(name)


def is_gone(pid: int) -> bool:
    """Whether no such process runs: there is none, or what is left of it waits for its parent."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] in b"ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def processes_with(text: str) -> list[int]:
    """Pids of the processes that have `text` in their command line, but for this one."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if text.encode() in file.read():
                        found.append(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def movable_nu(folder: Path, monkeypatch: pytest.MonkeyPatch, *, is_always_found: bool) -> Path:
    """A Nushell of xs's that can be moved away; when it is gone it may still be found."""
    real = folder / "real"
    real.symlink_to(nu_path())
    path = real
    if is_always_found:  # and then it can't be run
        path = folder / "nu"
        path.write_text(f'#!/bin/sh\n[ -e {real} ] || exit 127\nexec {real} "$@"\n')
        path.chmod(0o755)
    monkeypatch.setenv("XS_NU", str(path))
    return real
