"""Time to live, and content that leaves with its last frame, never before."""

from __future__ import annotations

import os
import threading
import time

import pytest
from conftest import DEADLINE, Server
from stores import (
    NOON,
    Clock,
    add,
    add_all,
    all_ids,
    content,
    import_all,
    imported,
    lines,
    problems,
    remove,
    taken,
)

import xs
from xs import frame, ids
from xs.commit import Append
from xs.content import INLINE_MAX, small
from xs.errors import NotFound
from xs.expiry import SweepWork
from xs.store import Store
from xs.work import PinWork

LARGE = b"large" * INLINE_MAX


def files(store: Store) -> list[bytes]:
    return list(store.cas.digests())


def pin(store: Store, data: bytes) -> str:
    made = taken(store, data)
    assert made is not None
    return str(store.run(PinWork(made)))


def test_no_read_gives_an_expired_frame_even_before_it_is_swept(store: Store, clock: Clock) -> None:
    kept = add(store, "a.b", b"kept")
    short = add(store, "a.b", b"short", ttl="time:100")
    assert all_ids(store) == [kept, short]
    clock.now += 99
    assert all_ids(store, topic="a.*") == [kept, short]
    clock.now += 1
    value = ids.parse(short)
    for pattern in (None, "a.b", "a.*", "a.b,a.*"):
        patterns = None if pattern is None else frame.parse_patterns(pattern)
        assert all_ids(store, topic=pattern) == [kept]
        assert all_ids(store, topic=pattern, last=1) == [kept]
        for line in (store.index.first(patterns, clock()), store.index.last(patterns, clock())):
            assert line is not None and frame.id_of(line) == kept
        assert store.index.next(ids.parse(kept), patterns, clock()) is None
        assert store.index.prev(value + 1, patterns, clock()) == store.get(ids.parse(kept))
    for act in (lambda: store.get(value), lambda: store.content_of(value),
                lambda: store.content(small(b"short").hash)):  # fmt: skip
        with pytest.raises(NotFound):
            act()
    assert add(store, "a.b", if_last=kept)


def test_a_time_counts_from_the_ids_milliseconds(store: Store, clock: Clock) -> None:
    old = ids.first_of(NOON - 1000)
    import_all(store, [imported(old, ttl="time:1001"), imported(old + 1, ttl="time:1000")])
    assert all_ids(store) == [ids.text(old)]


def test_what_has_expired_is_swept_with_its_content(store: Store, clock: Clock) -> None:
    add_all(store, [Append("a.b", small(b"x"), ttl="time:5")] * 2500)
    add(store, "a.b", LARGE, ttl="time:5")
    clock.now += 5
    assert len(files(store)) == 1
    while store.run(SweepWork()):
        pass
    assert store.index.next_expiry() is None
    assert files(store) == [] and problems(store) == []
    assert add(store)


def test_the_sweeper_removes_frames_when_their_time_comes(store_dir: str) -> None:
    store = Store(store_dir, exclusive=True, create=True)
    store.start_sweeping()
    kept = add(store, "a")
    add(store, "a", LARGE, ttl="time:30")
    add(store, "a", LARGE + b"2", ttl="time:60")
    deadline = time.monotonic() + DEADLINE
    wait = threading.Event()
    while files(store) and time.monotonic() < deadline:
        wait.wait(0.005)
    assert files(store) == [] and store.index.next_expiry() is None
    assert all_ids(store) == [kept]
    store.close()


def test_what_expired_while_no_server_ran_is_swept_when_one_does(store_dir: str) -> None:
    clock = Clock()
    first = Store(store_dir, exclusive=True, create=True, clock=clock)
    add(first, "a", LARGE, ttl="time:10")
    first.close()
    clock.now += 10
    again = Store(store_dir, exclusive=True, clock=clock)
    again.start_sweeping()
    deadline = time.monotonic() + DEADLINE
    while files(again) and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    assert files(again) == []
    again.close()


def test_direct_writers_sweep_as_they_write(store_dir: str) -> None:
    clock = Clock()
    store = Store(store_dir, create=True, clock=clock)
    add(store, "a", LARGE, ttl="time:10")
    clock.now += 10
    add(store, "b")
    assert files(store) == [] and len(all_ids(store)) == 1
    store.close()


@pytest.mark.parametrize("data", [b"small", LARGE], ids=["small", "large"])
def test_content_leaves_with_the_last_frame_that_names_it(store: Store, data: bytes) -> None:
    made = [add(store, f"t{n}", data) for n in range(3)]
    hash_ = small(data).hash
    for n, each in enumerate(made):
        assert b"".join(store.content(hash_)[1]) == data
        for left in made[n:]:
            assert content(store, left) == data
        remove(store, each)
    with pytest.raises(NotFound):
        store.content(hash_)
    assert files(store) == [] and problems(store) == []


def test_content_outlives_a_frame_that_expired_when_another_has_it(
    store: Store, clock: Clock
) -> None:
    kept = add(store, "a", LARGE)
    add(store, "b", LARGE, ttl="time:5")
    add(store, "c", LARGE, ttl="last:1")
    add(store, "c", b"x", ttl="last:1")
    clock.now += 5
    store.run(SweepWork())
    assert content(store, kept) == LARGE


def test_a_clock_that_steps_back_finds_the_content_of_frames_that_live_again(
    store: Store, clock: Clock
) -> None:
    first, second = add(store, "a", LARGE, ttl="time:5"), add(store, "b", LARGE)
    clock.now += 10
    remove(store, second)  # the other one has expired, and is not yet swept
    assert problems(store) == []
    clock.now -= 10
    for each in all_ids(store):
        assert content(store, each) == LARGE
    assert all_ids(store) == [first]


def test_a_last_n_takes_the_content_of_what_it_drops(store: Store) -> None:
    for n in range(5):
        add(store, "a", LARGE + b"%d" % n, ttl="last:2")
    assert len(files(store)) == 2
    add_all(store, [Append("a", taken(store, LARGE + b"x%d" % n), ttl="last:1") for n in range(4)])
    assert len(files(store)) == 1 and problems(store) == []


def test_last_n_does_not_count_expired_frames(store: Store, clock: Clock) -> None:
    first = add(store, "a", ttl="last:2")
    add(store, "a", ttl="time:5")
    clock.now += 5
    second = add(store, "a", ttl="last:2")
    assert all_ids(store) == [first, second]


@pytest.mark.parametrize("data", [b"small", LARGE], ids=["small", "large"])
def test_pinned_content_stays_until_gc_takes_it_by_age(
    store: Store, clock: Clock, data: bytes
) -> None:
    hash_ = pin(store, data)
    remove(store, add(store, "a", data))
    assert b"".join(store.content(hash_)[1]) == data
    clock.now += 1000
    assert store.gc(2) == (0, 0)
    assert b"".join(store.content(hash_)[1]) == data
    for path in [store.cas._path(digest) for digest in files(store)]:
        os.utime(path, (time.time() - 9999,) * 2)
    assert store.gc(1) == (1, len(data))
    with pytest.raises(NotFound):
        store.content(hash_)
    assert files(store) == [] and problems(store) == []


@pytest.mark.parametrize("data", [b"small", LARGE], ids=["small", "large"])
def test_gc_leaves_what_a_frame_names(store: Store, clock: Clock, data: bytes) -> None:
    pin(store, data)
    named = add(store, "a", data)
    clock.now += 5000
    store.gc(0)
    assert content(store, named) == data
    assert problems(store) == []


def test_gc_takes_files_that_nobody_ever_named(store: Store) -> None:
    left = taken(store, LARGE)
    assert left is not None
    store.cas.place(left)
    assert store.gc(3600) == (0, 0) and len(files(store)) == 1
    assert store.gc(0) == (1, len(LARGE))
    assert files(store) == []


def test_posting_the_same_content_again_keeps_it_longer(store: Store, clock: Clock) -> None:
    hash_ = pin(store, b"x")
    clock.now += 1000
    pin(store, b"x")
    assert store.gc(0.5) == (0, 0)
    assert b"".join(store.content(hash_)[1]) == b"x"


def test_a_frame_of_pinned_content_has_its_own(store: Store, clock: Clock) -> None:
    """A frame imported by hash alone must not lose its content with the pin."""
    for data in (b"small", LARGE):
        pin(store, data)
        (line,) = import_all(
            store,
            [imported(ids.first_of(NOON - len(data)), data=data)._replace(content=None)],
        )
        clock.now += 1000
        store.gc(0)
        assert content(store, frame.id_of(line)) == data
    assert len(lines(store)) == 2 and problems(store) == []


@pytest.mark.parametrize("data", [b"small", LARGE], ids=["small", "large"])
def test_a_pin_for_an_import_goes_with_the_first_frame_that_lasts(
    store: Store, data: bytes
) -> None:
    """One that has expired takes the content with it, and others that name it are still to come."""
    made = taken(store, data)
    assert made is not None
    store.run(PinWork(made, for_import=True))
    frames = [
        imported(ids.first_of(NOON - 9000 + n), data=data, ttl=ttl)._replace(content=None)
        for n, ttl in enumerate(["time:1", "forever"])
    ]
    (gone,) = import_all(store, frames[:1])
    remove(store, frame.id_of(gone))
    (line,) = import_all(store, frames[1:])
    assert content(store, frame.id_of(line)) == data
    remove(store, frame.id_of(line))
    with pytest.raises(NotFound):
        store.content(small(data).hash)
    assert files(store) == [] and problems(store) == []


@pytest.mark.parametrize("first", [True, False], ids=["import first", "import last"])
def test_who_wants_content_for_good_has_it_so_whatever_an_import_puts(
    store: Store, first: bool
) -> None:
    for for_import in (first, not first):
        store.run(PinWork(small(b"x"), for_import=for_import))
    (line,) = import_all(
        store, [imported(ids.first_of(NOON - 1), data=b"x")._replace(content=None)]
    )
    remove(store, frame.id_of(line))
    assert b"".join(store.content(small(b"x").hash)[1]) == b"x"


def test_ephemeral_frames_are_never_stored(store: Store) -> None:
    made = add(store, "a", b"passing", ttl="ephemeral")
    assert lines(store) == []
    assert store.get(ids.parse(made))
    assert content(store, made) == b"passing"
    assert b"".join(store.content(small(b"passing").hash)[1]) == b"passing"


def test_on_a_server_frames_leave_by_themselves(server: Server) -> None:
    with xs.open(server.directory) as client:
        made = client.append("a", LARGE, ttl="time:50")
        deadline = time.monotonic() + DEADLINE
        while client.get(made) is not None and time.monotonic() < deadline:
            pass
        assert client.get(made) is None
        folder = os.path.join(server.directory, "cas")
        while any(found for _, _, found in os.walk(folder)) and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert not any(found for _, _, found in os.walk(folder))
