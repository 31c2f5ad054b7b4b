"""Further stores in the same process, added and removed by what is on the root store's stream.

`xs.store.add` asks for one and `xs.store.remove` for its end; each is answered on the root stream:
`xs.store.added`, `xs.store.removed` or `xs.store.error`. What was added and not removed comes back
when the server starts again. One that can't be opened disturbs no other: each is opened, and
ended, in a thread of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from xs import frame, ids, times
from xs.commit import Append
from xs.errors import Invalid, XsError
from xs.httpd import Served
from xs.mount import Mount, as_meta
from xs.store import Store

STORES_MAX = 1000  # beside the root store, in one process; above it: xs.store.error
TOPICS = frozenset({"xs.store.add", "xs.store.remove"})
_ADD, _REMOVE = "xs.store.add", "xs.store.remove"
_ANSWERS = ("added", "removed", "error")
_AT_ONCE = 8  # stores that are opened at once
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class Asked(NamedTuple):
    """What the meta of a request says; `http` is the address of a gateway, None for none."""

    path: str
    name: str
    http: Optional[str]


def parse_asked(meta: Any) -> Asked:
    """The meta of `xs.store.add`. Raises `Invalid`."""
    if not isinstance(meta, dict) or not isinstance(meta.get("path"), str):
        raise Invalid('the meta of xs.store.add is a record with "path": the store\'s directory')
    path = meta["path"]
    if not os.path.isabs(path):
        raise Invalid(f"the path of a store is absolute, not {path[:80]!r}")
    name = meta.get("name")
    if name is None:
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", os.path.basename(path.rstrip("/"))) or "store"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Invalid(f"a store's name is made of letters, digits, _ - and ., not {name!r}"[:200])
    http = meta.get("http")
    if http is not None and not isinstance(http, str):
        raise Invalid("http is the address of a gateway, such as :8080")
    return Asked(os.path.realpath(path), name, http)


class _Entry:
    """A store that is to be served: from its opening until its end."""

    __slots__ = ("asked", "error", "id", "mount", "opened", "since")

    def __init__(self, value: int, asked: Asked) -> None:
        self.id = value  # of the frame that added it
        self.asked = asked
        self.mount: Mount | None = None
        self.error: str | None = None
        self.since: int | None = None
        self.opened = threading.Event()  # it is open, or can't be opened


class Stores:
    """The further stores of a root store."""

    def __init__(
        self,
        root: Store,
        mount: Callable[[Asked], Mount],
        unmount: Callable[[Mount], None],
        log: Callable[[str], None],
    ) -> None:
        """`mount` opens and starts a store; `unmount` ends it."""
        self._root = root
        self._mount = mount
        self._unmount = unmount
        self._log = log
        self._lock = threading.Lock()  # guards the next two; no other lock is taken under it
        self._entries: dict[str, _Entry] = {}  # by name
        self._threads: set[threading.Thread] = set()
        self._room = threading.Semaphore(_AT_ONCE)
        self._position = -1
        self._stopping = False
        self._due = threading.Event()
        self._watch = root.bus.watch(TOPICS.__contains__, self._due.set)
        self._thread = threading.Thread(target=self._main, name="xs-stores", daemon=True)

    # For requests

    def find(self, name: str) -> Served | None:
        """The store of that name, if it is served."""
        entry = self._entries.get(name)
        mount = None if entry is None else entry.mount
        return None if mount is None else mount.served

    def status(self) -> list[dict[str, Any]]:
        """What is served, in order of names (`GET /stores`)."""
        with self._lock:
            entries = [entry for _, entry in sorted(self._entries.items())]
        return [
            {
                "name": entry.asked.name,
                "path": entry.asked.path,
                "http": entry.asked.http,
                "since": None if entry.since is None else times.timestamp(entry.since),
                "error": entry.error,
            }
            for entry in entries
        ]

    # The stream

    def start(self) -> None:
        """Serves what was added before, and follows the stream."""
        self._thread.start()

    def stop(self) -> None:
        """Ends all stores."""
        self._stopping = True
        self._due.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._root.bus.unwatch(self._watch)
        self._join()
        for entry in list(self._entries.values()):
            if entry.mount is not None:
                self._begin(self._end, entry, None)
        self._join()

    def _main(self) -> None:
        try:
            self._fold()
            while not self._stopping:
                self._due.wait()
                self._due.clear()
                for line in self._new_lines():
                    if not self._stopping:
                        self._obey(line)
        except XsError as error:
            self._log(f"stores are no longer added and removed: {error}")

    def _fold(self) -> None:
        """Starts what was added and not removed; carries out what was not answered."""
        self._position = self._root.newest()
        topics = frozenset({*TOPICS, *(f"xs.store.{each}" for each in _ANSWERS)})
        waiting: dict[str, bytes] = {}
        added: dict[str, bytes] = {}
        asked: dict[str, bytes] = {}
        for line in self._lines(topics, -1, self._position):
            topic = frame.topic_of(line)
            if topic in TOPICS:
                asked[frame.id_of(line)] = waiting[frame.id_of(line)] = line
                continue
            told = json.loads(line)["meta"] or {}
            source = str(told.get("source_id"))
            waiting.pop(source, None)
            if topic == "xs.store.added" and source in asked:
                added[source] = asked[source]
            elif topic == "xs.store.removed":
                added.pop(str(told.get("store_id")), None)
        for source, line in added.items():
            with contextlib.suppress(Invalid):  # it was added once
                self._add(ids.parse(source), parse_asked(json.loads(line)["meta"]), again=True)
        for line in waiting.values():
            self._obey(line)

    def _new_lines(self) -> list[bytes]:
        entries = self._root.bus.after(self._position)
        if entries is None:
            newest = self._root.newest()
            lines = self._lines(TOPICS, self._position, newest)
            self._position = newest
            return lines
        if entries:
            self._position = entries[-1].id
        return [entry.line for entry in entries if entry.topic in TOPICS and entry.line]

    def _lines(self, topics: frozenset[str], after: int, until: int) -> list[bytes]:
        """Stored frames of these topics; there are few of them."""
        found: list[bytes] = []
        while True:
            page, count = self._root.index.page(after, until, topics, 1000, self._root.clock())
            if not count:
                return found
            found += page.split(b"\n")[:-1]
            after = ids.parse(frame.id_of(found[-1]))

    def _obey(self, line: bytes) -> None:
        value = ids.parse(frame.id_of(line))
        meta = json.loads(line)["meta"]
        try:
            if frame.topic_of(line) == _ADD:
                self._add(value, parse_asked(meta))
            else:
                self._remove(value, meta)
        except XsError as error:
            self._answer("error", value, reason=str(error))

    # Adding and removing

    def _add(self, value: int, asked: Asked, *, again: bool = False) -> None:
        """Has a store opened. Raises `Invalid`."""
        if asked.path == os.path.realpath(self._root.folder):
            raise Invalid(f"{asked.path} is the root store: it is served already")
        entry = _Entry(value, asked)
        with self._lock:
            for other in self._entries.values():
                if other.asked.path == asked.path:
                    raise Invalid(f"{asked.path} is served already, as {other.asked.name}")
            if asked.name in self._entries:
                path = self._entries[asked.name].asked.path
                raise Invalid(f"the name {asked.name} is taken by {path}: give another name")
            if len(self._entries) >= STORES_MAX:
                raise Invalid(f"{STORES_MAX} stores are served already")
            self._entries[asked.name] = entry
        self._begin(self._open, entry, again)

    def _open(self, entry: _Entry, again: Any) -> None:
        try:
            with self._room:
                if not self._stopping:
                    entry.mount = self._mount(entry.asked)
            entry.since = self._root.clock()
        except Exception as error:  # whatever it is: the other stores go on
            entry.error = str(error) or type(error).__name__
            if not isinstance(error, XsError):
                entry.error = f"{type(error).__name__}: {error}"
            self._log(f"{entry.asked.name}: {entry.error}")
            if not again:
                self._forget(entry)
            self._answer("error", entry.id, reason=entry.error, **self._named(entry))
        else:
            if not again and entry.mount is not None:
                self._answer("added", entry.id, **self._named(entry))
        finally:
            entry.opened.set()

    def _remove(self, value: int, meta: Any) -> None:
        """Has a store closed. Raises `Invalid`."""
        if not isinstance(meta, dict) or not isinstance(meta.get("path", meta.get("name")), str):
            raise Invalid('the meta of xs.store.remove is a record with "path", or "name"')
        path = meta.get("path")
        real = None if path is None else os.path.realpath(path)
        if real == os.path.realpath(self._root.folder):
            raise Invalid(f"{path} is the root store: stop the server to end it")
        with self._lock:
            found = [
                entry
                for entry in self._entries.values()
                if entry.asked.path == real or (path is None and entry.asked.name == meta["name"])
            ]
        if not found:
            raise Invalid(f"{path or meta['name']} is not served here")
        self._begin(self._end, found[0], value)

    def _end(self, entry: _Entry, value: Any) -> None:
        entry.opened.wait()
        mount, entry.mount = entry.mount, None
        if mount is not None:
            try:
                self._unmount(mount)
            except Exception as error:  # it is gone from here in any case
                self._log(f"{entry.asked.name}: {type(error).__name__}: {error}")
        if value is not None:
            self._forget(entry)
            self._answer("removed", value, store_id=ids.text(entry.id), **self._named(entry))

    def _forget(self, entry: _Entry) -> None:
        with self._lock:
            if self._entries.get(entry.asked.name) is entry:
                del self._entries[entry.asked.name]

    def _named(self, entry: _Entry) -> dict[str, Any]:
        named = {"name": entry.asked.name, "path": entry.asked.path}
        if entry.mount is not None and entry.mount.web:
            named["http"] = entry.mount.web[0]
        return named

    def _answer(self, what: str, source: int, **more: Any) -> None:
        told = as_meta({"source_id": ids.text(source), **more})
        with contextlib.suppress(XsError):  # the root store is closing, or can't be written
            self._root.append(Append(f"xs.store.{what}", meta=told))

    # Threads

    def _begin(self, act: Callable[[_Entry, Any], None], entry: _Entry, argument: Any) -> None:
        def run() -> None:
            try:
                act(entry, argument)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="xs-store", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _join(self) -> None:
        while True:
            with self._lock:
                threads = list(self._threads)
            if not threads:
                return
            for thread in threads:
                thread.join()
