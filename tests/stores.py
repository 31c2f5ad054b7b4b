"""Stores in the test's own process, and the plain words in which tests speak of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, Union

from conftest import DEADLINE

from xs import frame, ids, query
from xs.bulk import BatchWork
from xs.commit import Append, Commit
from xs.content import Content, small
from xs.errors import XsError
from xs.imports import Imported, ImportWork
from xs.reader import Reader
from xs.store import Store
from xs.work import RemoveWork, Work

NOON = 1_700_000_000_000  # a clock's milliseconds, for tests that need no real one


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now: int = NOON) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


class Gate(Work):
    """Holds the commit that it is part of, so that what comes meanwhile shares the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.opened = threading.Event()

    def apply(self, commit: Commit) -> None:
        self.entered.set()
        assert self.opened.wait(DEADLINE)


def in_one_batch(store: Store, works: Iterable[Work]) -> list[Any]:
    """Does all of them in one commit, in this order; the result or the error of each."""
    gate = Gate()
    held = threading.Thread(target=store.run, args=(gate,))
    held.start()
    assert gate.entered.wait(DEADLINE)
    works = list(works)
    waits = [store.start(work) for work in works]
    gate.opened.set()
    held.join(DEADLINE)
    found: list[Any] = []
    for wait in waits:
        try:
            found.append(wait())
        except XsError as error:
            found.append(error)
    return found


def taken(store: Store, data: bytes) -> Union[Content, None]:
    """Content as the API takes it in: in memory when small, else in a temporary file."""
    return store.cas.take([data])


def add(store: Store, topic: str = "a", data: bytes = b"", **more: Any) -> str:
    """Appends a frame; its id."""
    return frame.id_of(store.append(Append(topic, taken(store, data) if data else None, **more)))


def add_all(store: Store, appends: list[Append], *, atomic: bool = False) -> list[Any]:
    return list(store.run(BatchWork(list(appends), atomic=atomic)))


def imported(
    value: int,
    topic: str = "a",
    data: Union[bytes, None] = None,
    ttl: str = "forever",
    meta: str = "null",
) -> Imported:
    content = None if data is None else small(data)
    return Imported(value, topic, content.hash if content else None, meta, ttl, content)


def import_all(store: Store, frames: list[Imported]) -> list[Any]:
    return list(store.run(ImportWork(list(frames))))


def remove(store: Store, id_text: str) -> None:
    store.run(RemoveWork(ids.parse(id_text)))


def lines(store: Store, **options: Any) -> list[bytes]:
    """The lines of a read that does not follow. `topic` is a pattern as in a query."""
    topic = options.pop("topic", None)
    if topic is not None:
        options["patterns"] = frame.parse_patterns(topic)
    reader = Reader(store, query.ReadOptions(**options))
    return b"".join(reader.history()).splitlines()


def all_ids(store: Store, **options: Any) -> list[str]:
    return [frame.id_of(line) for line in lines(store, **options)]


def problems(store: Store) -> list[str]:
    return [found for found in store.check() if isinstance(found, str)]


def content(store: Store, id_text: str) -> bytes:
    return b"".join(store.content_of(ids.parse(id_text))[1])


def together(count: int, act: Callable[[int], None]) -> None:
    """Runs `act(n)` in that many threads at once; the first exception of one is raised."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(n: int) -> None:
        try:
            barrier.wait(DEADLINE)
            act(n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE * 3)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


def steps_of(store: Store, act: Callable[[], Any]) -> int:
    """How much work SQLite has with it, in hundreds of its instructions."""
    counted = [0]

    def count() -> None:
        counted[0] += 1

    with store.index.reading() as reader:
        pass
    reader.set_progress_handler(count, 100)
    try:
        act()
    finally:
        reader.set_progress_handler(None, 0)  # type: ignore[arg-type]
    return counted[0]
