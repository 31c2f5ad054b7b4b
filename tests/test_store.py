"""The store: appends, batches, conditions, imports, removal, and what it promises of ids."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, ROOT, environment
from stores import (
    NOON,
    Clock,
    add,
    add_all,
    all_ids,
    content,
    import_all,
    imported,
    in_one_batch,
    lines,
    problems,
    remove,
    taken,
    together,
)

from xs import frame, ids, query
from xs.bulk import ALIKE_MIN, BatchWork, alike
from xs.commit import Append, Commit
from xs.content import INLINE_MAX, small
from xs.errors import (
    Conflict,
    Damaged,
    Invalid,
    NoStore,
    NotAStore,
    NotFound,
    Unavailable,
    XsError,
)
from xs.imports import Imported, ImportWork
from xs.lock import Served
from xs.reader import Reader
from xs.schema import LARGE_JSON
from xs.store import Store
from xs.work import AppendWork, PinWork, RemoveWork, Work
from xs.writer import NewFrame, Writer

LARGE = b"large" * INLINE_MAX


def temporary_files(store: Store) -> list[str]:
    return [n for n in os.listdir(os.path.join(store.folder, "cas")) if n.startswith("new-")]


# Appending


def test_an_append_answers_the_frame_that_is_read_back(store: Store) -> None:
    line = store.append(Append("notes.add", small(b"hi"), '{"n":1.10}', "time:5000"))
    assert line.startswith(b'{"topic":"notes.add","id":"')
    assert line.endswith(b',"meta":{"n":1.10},"ttl":"time:5000"}')
    assert lines(store) == [line]
    assert store.get(ids.parse(frame.id_of(line))) == line
    assert content(store, frame.id_of(line)) == b"hi"


@pytest.mark.parametrize("size", [1, INLINE_MAX, INLINE_MAX + 1, 3 * INLINE_MAX])
def test_content_of_every_size_comes_back_by_frame_and_by_hash(store: Store, size: int) -> None:
    data = os.urandom(size)
    id_text = add(store, "a", data)
    assert content(store, id_text) == data
    hash_ = frame.hash_text(store.get(ids.parse(id_text)))
    assert hash_ is not None
    assert b"".join(store.content(hash_)[1]) == data
    assert not temporary_files(store)


def test_ids_rise_while_the_clock_stands_still_and_steps_back(store_dir: str) -> None:
    clock = Clock()
    found = []
    for step in (0, 0, -3_600_000, -3_600_000, -10 * 31_536_000_000, 5, 0):
        clock.now += step
        opened = Store(store_dir, exclusive=True, create=True, clock=clock)
        found += [add(opened) for _ in range(50)]
        opened.close()
    assert found == sorted(set(found))


def test_an_id_is_not_given_again_after_the_newest_frame_was_removed(store_dir: str) -> None:
    clock = Clock()
    seen = []
    for _ in range(5):
        opened = Store(store_dir, exclusive=True, create=True, clock=clock)
        seen.append(add(opened))
        remove(opened, seen[-1])
        clock.now -= 1000
        opened.close()
    assert seen == sorted(set(seen))
    direct = Store(store_dir, clock=clock)
    seen.append(add(direct))
    assert seen == sorted(set(seen))
    direct.close()


def test_an_id_is_above_ephemeral_ones_after_a_crash(store_dir: str) -> None:
    clock = Clock()
    opened = Store(store_dir, exclusive=True, create=True, clock=clock)
    last = [add(opened, ttl="ephemeral") for _ in range(3)][-1]
    opened._lock.close()  # as when the process is killed: nothing is put in order
    again = Store(store_dir, exclusive=True, clock=clock)
    assert add(again) > last
    again.close()


def test_a_millisecond_can_hold_more_frames_than_it_has_rows(store: Store, clock: Clock) -> None:
    count = 70_000
    results = add_all(store, [Append("a.b")] * count)
    found = [frame.id_of(line) for line in results]
    assert found == sorted(set(found))
    assert all_ids(store) == found
    assert all_ids(store, topic="a.*") == found
    assert {ids.milliseconds(ids.parse(each)) for each in found} == {NOON, NOON + 1, NOON + 2}
    for place in (0, 32_767, 32_768, 32_769, 65_535, 65_536, count - 1):
        value = ids.parse(found[place])
        assert frame.id_of(store.get(value)) == found[place]
        assert all_ids(store, after=value, limit=2) == found[place + 1 : place + 3]


def test_many_threads_append_and_every_answer_is_stored_once(store: Store) -> None:
    answered: list[bytes] = []

    def act(n: int) -> None:
        answered.extend(store.append(Append(f"t.{n}", small(b"%d" % n))) for _ in range(50))

    together(20, act)
    assert sorted(answered) == sorted(lines(store))
    assert problems(store) == []


# Order: commit, then publish, then answer


def test_frames_are_durable_before_they_are_delivered_and_delivered_before_they_are_answered(
    store: Store,
) -> None:
    seen: list[str] = []
    gate = threading.Event()
    mark = store.newest()

    def follow() -> None:
        while not gate.is_set():
            if store.bus.wait(mark, 0.1):
                assert len(store.bus.after(mark) or []) == 1
                with sqlite3.connect(os.path.join(store.folder, "xs.db")) as other:
                    stored = other.execute("SELECT count(*) FROM frame").fetchone()[0]
                other.close()
                seen.append(f"delivered, {stored} stored")
                gate.set()

    thread = threading.Thread(target=follow)
    thread.start()

    def answered(work: Work) -> None:
        newest = store.bus.newest
        assert frame.id_of(work.result) == ids.text(newest)
        seen.append("answered")

    store.submit(AppendWork(Append("a"), answered))
    assert gate.wait(DEADLINE)
    thread.join(DEADLINE)
    assert sorted(seen) == ["answered", "delivered, 1 stored"]


# Batches


def test_an_error_in_a_batch_leaves_the_other_lines(store: Store) -> None:
    results = add_all(
        store,
        [Append("a"), Append("a", if_last="none"), Invalid("wrong"), Append("b", if_last="none")],
    )
    assert isinstance(results[1], Conflict) and isinstance(results[2], Invalid)
    assert lines(store) == [results[0], results[3]]


def test_each_line_of_a_batch_is_judged_after_those_before_it(store: Store) -> None:
    first, second, third = add_all(
        store,
        [Append("a", if_last="none"), Append("a", if_last="none"), Append("a", key="k")],
    )
    assert isinstance(second, Conflict) and second.frame == first
    (again,) = add_all(store, [Append("a", key="k")])
    assert again == third and len(lines(store)) == 2


def test_an_atomic_batch_that_fails_leaves_nothing_of_itself(store: Store) -> None:
    kept = add(store, "old", b"kept", ttl="last:1")
    mark = store.newest()
    batch: list = [
        Append("old", small(b"new"), ttl="last:1"),
        Append("deep.er.topic", taken(store, LARGE), key="k"),
        Append("x", meta='"' + "m" * 5000 + '"', ttl="time:1000"),
        Append("old", if_last="none"),
    ]
    with pytest.raises(Conflict):
        store.run(BatchWork(batch, atomic=True))
    assert all_ids(store) == [kept]
    assert store.newest() == mark
    assert lines(store, topic="deep.*") == []
    assert temporary_files(store) == []
    assert problems(store) == []
    fresh = store.append(Append("deep.er.topic", key="k"))
    assert lines(store)[1:] == [fresh]
    assert lines(store, topic="deep.er.*") == [fresh]


def test_a_failing_atomic_batch_does_not_touch_what_shares_its_commit(store: Store) -> None:
    found = in_one_batch(
        store,
        [
            AppendWork(Append("a.b")),
            BatchWork([Append("c.d"), Invalid("wrong")], atomic=True),
            AppendWork(Append("c.d")),
            BatchWork([Append("e.f", ttl="last:1"), Append("e.f", ttl="last:1")], atomic=True),
        ],
    )
    assert isinstance(found[1], Invalid)
    assert lines(store) == [found[0], found[2], found[3][1]]
    assert lines(store, topic="c.*,a.*") == [found[0], found[2]]
    assert problems(store) == []


def test_contents_of_refused_lines_leave_no_files(store: Store) -> None:
    add(store, "a")
    results = add_all(store, [Append("a", taken(store, LARGE), if_last="none")] * 1)
    assert isinstance(results[0], Conflict)
    add(store, "a", LARGE, key="k")
    add(store, "a", LARGE, key="k")
    with pytest.raises(Conflict):
        add(store, "a", LARGE, if_last="none")
    assert temporary_files(store) == []


class _Fails(Work):
    """Fails the transaction that it is part of, as a full disk does."""

    def apply(self, commit: Commit) -> None:
        raise OSError(28, "No space left on device")


def test_a_failing_commit_fails_only_those_to_blame(store: Store) -> None:
    found = in_one_batch(
        store,
        [
            AppendWork(Append("a", taken(store, LARGE))),
            _Fails(),
            AppendWork(Append("a", small(b"x"))),
        ],
    )
    assert isinstance(found[1], XsError) and found[1].status == 507
    assert lines(store) == [found[0], found[2]]
    assert content(store, frame.id_of(found[0])) == LARGE
    assert problems(store) == []


class _FailsOnce(Work):
    """Fails the first transaction that it is part of."""

    failed = False

    def apply(self, commit: Commit) -> None:
        if not self.failed:
            self.failed = True
            raise OSError(28, "No space left on device")


def test_no_frame_is_stored_without_its_content_when_a_commit_is_done_again(store: Store) -> None:
    old = add(store, "old", LARGE)
    found = in_one_batch(
        store,
        [
            RemoveWork(ids.parse(old)),  # the last frame of that content …
            AppendWork(Append("new", taken(store, LARGE))),  # … and one that names it again
            _FailsOnce(),
        ],
    )
    for line in lines(store):
        assert content(store, frame.id_of(line)) == LARGE
    assert isinstance(found[1], (bytes, XsError))
    assert problems(store) == []


def test_a_retry_whose_first_append_fails_has_its_content(store: Store) -> None:
    class FailsInFirst(AppendWork):
        times = 0

        def apply(self, commit: Commit) -> bytes:
            self.times += 1
            if self.times == 2:  # by itself: as if this one were what the disk has no room for
                raise OSError(28, "No space left on device")
            return super().apply(commit)

    first = FailsInFirst(Append("a", taken(store, LARGE), key="k"))
    second = AppendWork(Append("a", taken(store, LARGE), key="k"))
    in_one_batch(store, [first, second, _FailsOnce()])
    assert first.error is not None
    for line in lines(store):
        assert content(store, frame.id_of(line)) == LARGE
    assert problems(store) == []


# last:n


def test_last_n_keeps_the_newest_n_of_its_topic(store: Store) -> None:
    other = add(store, "b")
    found = [add(store, "a", ttl="last:3") for _ in range(10)]
    assert all_ids(store) == [other, *found[-3:]]
    one = add(store, "a", ttl="last:1")
    assert all_ids(store) == [other, one]
    plain = [add(store, "a") for _ in range(3)]
    assert all_ids(store) == [other, one, *plain]
    two = add(store, "a", ttl="last:2")
    assert all_ids(store) == [other, plain[-1], two]


def test_last_n_in_one_batch_is_as_one_by_one(store: Store) -> None:
    found = add_all(
        store,
        [
            *[Append("a", ttl="last:2")] * 3,
            Append("a"),
            Append("a", ttl="last:4"),
            Append("b", ttl="last:1"),
            Append("b"),
        ],
    )
    # One by one: 1 2 → 2 3 → 2 3 + 4 → 2 3 4 5.
    assert lines(store) == [*found[1:5], found[5], found[6]]


def test_an_import_is_not_taken_by_a_last_n_that_came_before_it(store: Store, clock: Clock) -> None:
    old = ids.first_of(NOON - 5000)
    found = in_one_batch(
        store,
        [AppendWork(Append("a", ttl="last:1")), ImportWork([imported(old), imported(old + 1)])],
    )
    assert lines(store) == [*found[1], found[0]]


# Imports


def test_imports_find_their_place_and_reads_give_them_in_order(store: Store) -> None:
    appended = [add(store, "a") for _ in range(3)]
    old = [ids.first_of(NOON - n * 1000) + n for n in range(1, 20)]
    results = import_all(store, [imported(value, "old.x", b"c%d" % value) for value in old])
    assert all(isinstance(each, bytes) for each in results)
    expected = [ids.text(value) for value in reversed(old)] + appended
    assert all_ids(store) == expected
    assert all_ids(store, topic="old.*") == expected[:19]
    assert content(store, expected[0]) == b"c%d" % old[-1]
    assert problems(store) == []


def test_the_same_import_again_changes_nothing_and_another_with_its_id_is_refused(
    store: Store,
) -> None:
    value = ids.first_of(NOON) + 7
    first, again, other = import_all(
        store, [imported(value, "a"), imported(value, "a"), imported(value, "b")]
    )
    assert first == again and isinstance(other, Conflict)
    assert lines(store) == [first]


def test_an_append_after_an_import_ahead_of_the_clock_is_above_it(store_dir: str) -> None:
    clock = Clock()
    opened = Store(store_dir, exclusive=True, create=True, clock=clock)
    ahead = ids.first_of(NOON + 80_000_000) + 5
    import_all(opened, [imported(ahead)])
    assert ids.parse(add(opened)) > ahead
    opened.close()
    again = Store(store_dir, exclusive=True, clock=clock)
    assert ids.parse(add(again)) > ahead
    too_far = ids.first_of(NOON + 86_400_001)
    (refused,) = import_all(again, [imported(too_far)])
    assert isinstance(refused, Invalid)
    again.close()


@pytest.mark.parametrize("in_one", [False, True])
def test_an_append_after_an_import_among_ids_that_are_kept_is_above_it(
    store: Store, in_one: bool
) -> None:
    """A second of them is kept for ephemeral frames: below the mark, and not yet given out."""
    add(store, ttl="ephemeral")
    follower = Reader(store, query.ReadOptions(new=True, follow=True, limit=4))
    ahead = ids.last_of(NOON + 400) - 5
    works = [ImportWork([imported(ahead)]), *[AppendWork(Append("n")) for _ in range(3)]]
    if in_one:
        in_one_batch(store, works)
    else:
        for work in works:
            store.run(work)
    found = all_ids(store)
    assert found[0] == ids.text(ahead)
    assert found == sorted(found) and len(found) == 4
    assert all_ids(store, topic="n") == found[1:]
    seen = b"".join(follower.follow()).splitlines()
    assert [frame.id_of(line) for line in seen] == found
    assert problems(store) == []


@pytest.mark.parametrize("behind", [0, 5])
def test_an_import_into_the_batch_of_newer_appends_finds_its_place(
    store: Store, behind: int
) -> None:
    add(store, "before")
    store.clock.now += 1000  # type: ignore[attr-defined]
    low = ids.first_of(NOON + 1000 - behind)
    found = in_one_batch(
        store,
        [
            ImportWork([imported(ids.first_of(NOON - 9))]),
            AppendWork(Append("now")),
            ImportWork([imported(low), imported(low + 1)]),
            AppendWork(Append("now")),
        ],
    )
    assert lines(store)[0] == found[0][0]
    assert lines(store)[2:] == [*found[2], found[1], found[3]]
    assert problems(store) == []


def test_an_import_whose_content_is_not_here_is_refused(store: Store) -> None:
    here = small(b"here")
    add(store, "a", b"here")
    add(store, "a", LARGE)
    missing = imported(ids.first_of(NOON - 1), data=b"x")._replace(content=None)
    by_hash = [
        missing._replace(id=ids.first_of(NOON - 1 - n), hash=hash_)
        for n, hash_ in enumerate([here.hash, small(LARGE).hash], 1)
    ]
    wrong = imported(ids.first_of(NOON - 9), data=b"x")._replace(content=small(b"y"))
    results = import_all(store, [missing, *by_hash, wrong])
    assert isinstance(results[0], Invalid) and isinstance(results[3], Invalid)
    assert content(store, frame.id_of(results[1])) == b"here"
    assert content(store, frame.id_of(results[2])) == LARGE
    assert problems(store) == []


@pytest.mark.parametrize("count", [1000, 20_000])
def test_imports_go_into_the_middle_of_a_crowded_millisecond(store: Store, count: int) -> None:
    """Above 16,384 frames there is not a gap between each two of them."""
    base = ids.first_of(NOON - 10)
    values = [base + (n << 32) for n in range(count)]
    import_all(store, [imported(value, "in.it") for value in values])
    middle = values[count // 2] + 1
    more = [middle, middle + 2, middle + 1, values[0] + 1, values[-2] + 3, values[-1] + 9]
    results = import_all(store, [imported(value, "in.it") for value in more])
    assert all(isinstance(each, bytes) for each in results), results[:3]
    expected = [ids.text(value) for value in sorted(values + more)]
    assert all_ids(store) == expected
    assert all_ids(store, topic="in.*") == expected
    place = expected.index(ids.text(middle))
    assert all_ids(store, after=middle - 1, limit=2) == expected[place : place + 2]
    assert problems(store) == []


def steps_of_writing(store: Store, act: Callable[[], Any]) -> int:
    """How much work SQLite has with what `act` writes, in hundreds of its instructions."""
    counted = [0]

    def count() -> None:
        counted[0] += 1

    import_all(store, [])
    writer = store.committer._writer
    assert writer is not None
    writer.connection.set_progress_handler(count, 100)
    try:
        act()
    finally:
        writer.connection.set_progress_handler(None, 0)  # type: ignore[arg-type]
    return counted[0]


@pytest.mark.parametrize("batch", [1, 1000])
@pytest.mark.parametrize("behind", [0, 1])
def test_a_millisecond_that_is_imported_backwards_costs_little_more_than_forwards(
    store: Store, batch: int, behind: int
) -> None:
    """Also where `behind` of its frames are there already, at its beginning."""

    def work_of(ms: int, *, backwards: bool) -> int:
        values = [ids.first_of(ms) + (n << 40) for n in range(1001)]
        import_all(store, [imported(value) for value in values[:behind]])
        rest = values[behind:]
        order = rest[::-1] if backwards else rest

        def act() -> None:
            for start in range(0, len(order), batch):
                results = import_all(
                    store, [imported(value) for value in order[start : start + batch]]
                )
                assert [frame.id_of(each) for each in results] == [
                    ids.text(value) for value in order[start : start + batch]
                ]

        steps = steps_of_writing(store, act)
        found = all_ids(store, after=ids.first_of(ms) - 1, until=ids.last_of(ms))
        assert found == [ids.text(value) for value in values]
        return steps

    add(store)  # so that both are below it
    forwards = work_of(NOON - 10, backwards=False)
    assert work_of(NOON - 20, backwards=True) < 4 * forwards + 1000
    assert problems(store) == []


def test_frames_of_the_first_millisecond_of_all_find_their_place(store: Store) -> None:
    for value in (1, 0, 7, 5, 3):
        (line,) = import_all(store, [imported(value, "a.b")])
        assert isinstance(line, bytes), line
    assert all_ids(store) == all_ids(store, topic="a.*") == [ids.text(n) for n in (0, 1, 3, 5, 7)]
    assert problems(store) == []


def test_lines_of_an_import_are_answered_in_their_order_whatever_their_ids_are(
    store: Store,
) -> None:
    base = ids.first_of(NOON - 10)
    refused = Invalid("no frame")
    first, again = imported(base + 5, "a"), imported(base + 5, "b")
    given = [imported(base + 9), refused, first, again, imported(base + 1), first]
    results = import_all(store, given)  # type: ignore[arg-type]
    assert results[1] is refused and isinstance(results[3], Conflict)
    assert [frame.id_of(results[n]) for n in (0, 2, 4, 5)] == [
        ids.text(base + n) for n in (9, 5, 1, 5)
    ]
    assert lines(store) == [results[4], results[2], results[0]]


@pytest.mark.long
def test_a_full_millisecond_refuses_imports_and_moves_appends_on(store: Store) -> None:
    base = ids.first_of(NOON)
    results = import_all(store, [imported(base + n) for n in range(33_000)])
    kept = [each for each in results if isinstance(each, bytes)]
    assert 32_767 <= len(kept) <= 32_768
    assert all(isinstance(each, Invalid) for each in results[len(kept) :])
    (into,) = import_all(store, [imported(base + (1 << 60))])
    assert isinstance(into, (bytes, Invalid))
    after = add(store)
    assert ids.milliseconds(ids.parse(after)) == NOON + 1
    assert len(lines(store)) == len(kept) + isinstance(into, bytes) + 1
    assert problems(store) == []


def test_a_refused_import_leaves_no_content_behind(store: Store) -> None:
    base = ids.first_of(NOON)
    import_all(store, [imported(base + (n << 40) + 1) for n in range(32_768)])
    first = taken(store, LARGE)
    assert first is not None
    full = Imported(base + 5, "a", first.hash, "null", "forever", first)
    (refused,) = import_all(store, [full])
    assert isinstance(refused, Invalid) and "is full" in str(refused)
    assert list(store.cas.digests()) == [] and temporary_files(store) == []
    # What another frame names stays, also one of the same commit.
    second = full._replace(content=taken(store, LARGE))
    refused, named = in_one_batch(
        store, [ImportWork([second]), AppendWork(Append("a", taken(store, LARGE)))]
    )
    assert isinstance(refused[0], Invalid)
    assert content(store, frame.id_of(named)) == LARGE


def test_a_reader_in_a_millisecond_that_is_renumbered_goes_on_where_it_was(store: Store) -> None:
    base = ids.first_of(NOON - 10)
    values = [base + (n << 32) for n in range(3000)]
    import_all(store, [imported(value) for value in values])
    reader = Reader(store, query.ReadOptions())
    blocks = reader.history()
    seen = next(blocks)
    import_all(store, [imported(values[n] + 1) for n in range(0, 3000, 7)])
    for block in blocks:
        seen += block
        import_all(store, [imported(values[0] + len(seen))])
    given = [ids.parse(frame.id_of(line)) for line in seen.splitlines()]
    assert given == sorted(set(given))
    assert set(values) <= set(given)


# Removing


def test_a_removed_frame_is_gone_everywhere(store: Store) -> None:
    kept, gone = add(store, "a.b", b"kept"), add(store, "a.b", b"gone")
    remove(store, gone)
    assert all_ids(store) == all_ids(store, topic="a.*") == all_ids(store, topic="a.b") == [kept]
    for what in (lambda: store.get(ids.parse(gone)), lambda: store.content(small(b"gone").hash)):
        with pytest.raises(NotFound):
            what()
    with pytest.raises(NotFound):
        remove(store, gone)
    assert frame.id_of(store.index.last(None, NOON) or b"") == kept
    assert problems(store) == []


def test_an_entry_superseded_in_its_own_commit_is_never_delivered(store: Store) -> None:
    """It was never on disk: only what is durable is delivered."""
    mark = store.newest()
    results = add_all(store, [Append("state", ttl="last:1")] * 5)
    entries = store.bus.after(mark)
    assert entries is not None
    assert [e.line for e in entries if e.is_live(NOON)] == results[-1:]


def test_import_ahead_and_append_in_one_batch_leave_followers_in_step(store: Store) -> None:
    mark = store.newest()
    ahead = ids.first_of(NOON + 5000)
    found = in_one_batch(store, [AppendWork(Append("a")), ImportWork([imported(ahead)])])
    assert store.newest() >= ahead
    after = store.bus.after(store.newest())
    assert after == []
    assert store.bus.after(mark) is None  # the index has both
    assert all_ids(store, after=mark) == [frame.id_of(found[0]), ids.text(ahead)]


# Two stores on one directory, as two processes have it


def test_a_follower_sees_what_two_processes_append_in_turn(store_dir: str) -> None:
    mine = Store(store_dir, create=True)
    other = Store(store_dir)
    reader = Reader(mine, query.ReadOptions(follow=True, limit=40))
    expected = []
    for _ in range(20):
        expected.append(add(other))
        expected.append(add(mine))
    seen = b"".join(reader.follow()).splitlines()
    given = [frame.id_of(line) for line in seen if b"xs.threshold" not in line]
    assert given == expected
    mine.close()
    other.close()


def test_a_reader_of_the_files_misses_nothing_while_a_server_reserves_ids(store_dir: str) -> None:
    clock = Clock()
    server = Store(store_dir, exclusive=True, create=True, clock=clock)
    reading = Store(store_dir, clock=clock)
    first = add(server)
    reader = Reader(reading, query.ReadOptions(follow=True, limit=3))
    blocks = reader.follow()
    seen = [next(blocks), next(blocks)]  # the frame, the threshold
    add(server, ttl="ephemeral")  # keeps a second of ids for such frames
    while next(blocks):  # looks, and finds nothing that is stored
        pass
    expected = [first, add(server), add(server)]
    seen += [block for block in blocks if block]
    given = [frame.id_of(line) for line in b"".join(seen).splitlines() if b"xs.thr" not in line]
    assert given == expected
    reading.close()
    server.close()


def test_content_is_not_removed_under_another_process_that_names_it(store_dir: str) -> None:
    """One writer takes away the last frame of a content while another appends it anew."""
    Store(store_dir, create=True).close()
    wrong: list[str] = []
    until = time.monotonic() + 1.5

    def act(n: int) -> None:
        opened = Store(store_dir)
        while time.monotonic() < until and not wrong:
            mine = add(opened, f"t{n}", LARGE)
            try:
                if content(opened, mine) != LARGE:
                    wrong.append(mine)
            except XsError as error:
                wrong.append(str(error))
            remove(opened, mine)
        opened.close()

    together(4, act)
    assert wrong == []


# Opening


def test_what_is_no_store_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NoStore):
        Store(str(tmp_path / "none"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotAStore):
        Store(str(tmp_path / "file"), create=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(NotAStore):
        Store(str(other), create=True)
    assert os.listdir(other) == ["thesis.txt"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with contextlib.closing(sqlite3.connect(foreign / "xs.db")) as db:
        db.execute("CREATE TABLE a (b)")
        db.commit()
    with pytest.raises(NotAStore):
        Store(str(foreign))
    text = tmp_path / "text"
    text.mkdir()
    (text / "xs.db").write_text("no database, but as long as the head of one would be" * 9)
    with pytest.raises(NotAStore):
        Store(str(text), create=True)


def test_a_second_server_is_refused_and_says_who_serves(store: Store) -> None:
    with pytest.raises(Served, match=f"is served by process {os.getpid()}"):
        Store(store.folder, exclusive=True)


def test_a_newer_format_is_refused(store_dir: str) -> None:
    Store(store_dir, create=True).close()
    with contextlib.closing(sqlite3.connect(os.path.join(store_dir, "xs.db"))) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(NotAStore, match="format 99"):
        Store(store_dir)


def test_a_store_made_by_many_at_once_has_all_their_frames(store_dir: str) -> None:
    def act(n: int) -> None:
        opened = Store(store_dir, create=True)
        add(opened, f"t{n}")
        opened.close()

    together(12, act)
    opened = Store(store_dir)
    assert len(lines(opened)) == 12
    assert problems(opened) == []
    opened.close()


def test_a_closed_store_refuses_and_answers_what_it_had_taken(store_dir: str) -> None:
    opened = Store(store_dir, exclusive=True, create=True)
    waits = [opened.start(AppendWork(Append("a"))) for _ in range(200)]
    opened.close()
    assert len({wait() for wait in waits}) == 200
    with pytest.raises(Unavailable):
        add(opened)


def test_a_store_that_was_only_read_refuses_after_its_end_and_opens_nothing(store_dir: str) -> None:
    Store(store_dir, create=True).close()
    opened = Store(store_dir)
    assert all_ids(opened) == []
    opened.close()
    opened.close()
    with pytest.raises(Unavailable):
        add(opened)
    assert opened._lock is None


def test_the_last_frame_of_a_closing_store_is_the_last(store_dir: str) -> None:
    opened = Store(store_dir, exclusive=True, create=True)
    stop = threading.Event()

    def write() -> None:
        with contextlib.suppress(Unavailable):
            while not stop.is_set():
                add(opened)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    opened.refuse_more(Append("xs.stop"))
    stop.set()
    for thread in threads:
        thread.join(DEADLINE)
    opened.close()
    again = Store(store_dir)
    assert b'"xs.stop"' in lines(again)[-1]
    again.close()


# Checking


def test_check_finds_a_flipped_byte_in_content_of_each_kind(store: Store) -> None:
    small_id, large_id, huge_id = (
        add(store, "a", data) for data in (b"small", LARGE, b"huge" * 500_000)
    )
    assert problems(store) == []
    for digest in store.cas.digests():
        path = store.cas._path(digest)
        with open(path, "r+b") as file:
            file.seek(os.path.getsize(path) // 2)
            file.write(b"\xff")
    with contextlib.closing(sqlite3.connect(os.path.join(store.folder, "xs.db"))) as db:
        db.execute("UPDATE frame SET content = ? WHERE content = ?", (b"smaIl", b"small"))
        db.commit()
    found = problems(store)
    assert len(found) == 3 and any(small_id in each for each in found)
    for id_text in (small_id, large_id, huge_id):
        with pytest.raises(XsError):
            content(store, id_text)


def test_check_finds_a_missing_file_and_a_frame_that_is_no_json(store: Store) -> None:
    add(store, "a", LARGE)
    bad, good = add(store, "b"), add(store, "c")
    (digest,) = store.cas.digests()
    store.cas.remove(digest)
    with contextlib.closing(sqlite3.connect(os.path.join(store.folder, "xs.db"))) as db:
        db.execute(
            "UPDATE frame SET json = replace(json, '\"id\"', '\"ib\"') "
            'WHERE json LIKE \'%"topic":"b"%\''
        )
        db.commit()
    found = problems(store)
    assert len(found) >= 2, found
    assert bad and good


def test_check_is_content_with_what_may_be_stored(store: Store) -> None:
    store.append(Append("big", meta="[" + "7" * 6000 + ",1e999,1.10]"))
    store.append(Append("deep", meta="[" * 128 + "]" * 128))
    store.append(Append("surrogates", meta='"\\ud83d\\ude00"'))
    add(store, "a", b"x", ttl="time:1")
    add(store, "a", LARGE, ttl="time:1")
    store.clock.now += 5  # type: ignore[attr-defined]  # expired, and not yet swept
    assert problems(store) == []


# A disk without room


_WRITER = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from xs.commit import Append
from xs.schema import LARGE_JSON
from xs.store import Store
from xs.errors import XsError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(sys.argv[2], exclusive=True, create=True)
answered, refused = [], 0
def write(n, size):
    global refused
    try:
        content = store.cas.take([bytes([n % 251]) * size])
        answered.append((store.append(Append("a.b", content)), bytes([n % 251]) * size))
    except (XsError, OSError):
        refused += 1
for n in range(20):
    write(n, 3000)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
for n in range(300):
    write(n, 12000)
for n in range(5):
    write(n, 1_000_000)
full = refused
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for n in range(20):
    write(n, 3000 if n % 2 else 300_000)
assert refused == full, "there is room again, and it is not used"
assert full > 5, full
from xs import frame, ids
for line, data in answered:
    value = ids.parse(frame.id_of(line))
    assert store.get(value) == line
    assert b"".join(store.content_of(value)[1]) == data
found = [each for each in store.check() if isinstance(each, str)]
assert not found, found
store.close()
print(len(answered), full)
"""


def test_a_full_disk_refuses_what_it_cannot_keep_and_keeps_what_was_answered(
    store_dir: str,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WRITER, str(ROOT), store_dir],
        capture_output=True,
        text=True,
        timeout=DEADLINE * 2,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    again = Store(store_dir)
    assert len(lines(again)) == int(done.stdout.split()[0])
    assert problems(again) == []
    again.close()


def test_the_writer_of_a_pin_can_be_any_size(store: Store) -> None:
    for data in (b"p", LARGE):
        pinned = taken(store, data)
        assert pinned is not None
        hash_ = store.run(PinWork(pinned))
        assert b"".join(store.content(hash_)[1]) == data


def test_who_is_shut_out_by_a_server_is_told_so_every_time(store_dir: str) -> None:
    server = Store(store_dir, exclusive=True, create=True)
    other = Store(store_dir)
    try:
        for _ in range(2):
            with pytest.raises(Served, match="is served by process"):
                other.append(Append("a"))
    finally:
        server.close()
    assert other.append(Append("a"))
    other.close()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DELETE FROM below", "not listed under the wildcards above its topic"),
        ("INSERT INTO below VALUES (1, 1)", "listed under a wildcard without being stored"),
        ("UPDATE frame SET digest = NULL", "neither beside it nor named as a file"),
        ("DELETE FROM topic", "has no topic"),
        ("INSERT INTO file VALUES (x'00', 1)", "named for a frame that is not stored"),
        ("INSERT INTO large SELECT row FROM frame", "does not follow from its JSON's size"),
    ],
)
def test_check_finds_tables_that_disagree(store_dir: str, damage: str, said: str) -> None:
    store = Store(store_dir, exclusive=True, create=True)
    store.append(Append("a.b", small(b"content")))
    assert not [each for each in store.check() if isinstance(each, str)]
    store.close()
    with contextlib.closing(sqlite3.connect(os.path.join(store_dir, "xs.db"))) as database:
        database.execute(damage)
        database.commit()
    store = Store(store_dir, exclusive=True)
    assert [each for each in store.check() if isinstance(each, str) and said in each]
    store.close()


def test_a_content_that_is_removed_while_a_check_looks_at_others_is_not_missed(
    store: Store,
) -> None:
    made = {add(store, data=b"%d" % n + LARGE) for n in range(2)}
    damaged = next(store.cas.digests()).hex()  # files are looked at in this order
    Path(store.folder, "cas", damaged[:2], damaged[2:]).write_bytes(b"damaged")
    found = store.check()
    assert "is damaged" in str(next(found))
    for each in made:
        with contextlib.suppress(Damaged):
            content(store, each)
            remove(store, each)
    assert [each for each in found if isinstance(each, str)] == []


def test_check_goes_on_past_pages_that_are_damaged(store_dir: str) -> None:
    store = Store(store_dir, exclusive=True, create=True)
    add_all(store, [Append("a.b", small(b"%d" % n * 50)) for n in range(2000)])
    store.run(PinWork(taken(store, LARGE)))
    store.close()
    path = os.path.join(store_dir, "xs.db")
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        file.write(b"\xff" * 40_000)
    store = Store(store_dir, exclusive=True)
    *found, (_, contents) = store.check()
    assert found and contents >= 1
    assert all(isinstance(each, str) for each in found)
    store.close()


def test_a_store_whose_making_was_broken_off_is_finished_by_whoever_opens_it(
    tmp_path: Path,
) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "xs.db")) as index:
        index.execute("PRAGMA journal_mode = WAL")  # all that was there when its maker was killed
    store = Store(str(tmp_path))
    assert store.append(Append("a"))
    assert problems(store) == []
    store.close()


def test_one_that_had_not_even_begun_with_its_index_is_finished_by_who_may_make_one(
    tmp_path: Path,
) -> None:
    open(tmp_path / "xs.db", "w").close()
    for exclusive in (False, True):
        with pytest.raises(NoStore):
            Store(str(tmp_path), exclusive=exclusive)
    store = Store(str(tmp_path), create=True)
    assert store.append(Append("a"))
    assert problems(store) == []
    store.close()


def test_what_sqlite_has_undone_by_itself_is_not_taken_for_committed(store: Store) -> None:
    kept = ids.parse(add(store, "a"))
    writer = Writer(store.database.writing())
    writer.begin()
    value = kept + (1 << 80)
    json_text = frame.encode("a", ids.text(value), None, '"m"', "forever")
    writer.append(NewFrame(value, "a", json_text, json_text.encode(), None, None, None))
    assert not writer.has_committed(value)
    store.database.writing().execute("ROLLBACK")  # as SQLite does where it has no memory
    assert not writer.has_committed(value)
    writer.rollback()
    assert all_ids(store) == [ids.text(kept)]


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("table", ["large", "file", "answered", "topic"])
def test_where_sqlite_fails_amid_a_frame_nothing_of_its_request_is_stored(
    store: Store, table: str, atomic: bool
) -> None:
    def deny(action: int, name: str | None, *_: object) -> int:
        is_denied = action == sqlite3.SQLITE_INSERT and name == table
        return sqlite3.SQLITE_DENY if is_denied else sqlite3.SQLITE_OK

    kept = add(store, "a")
    append = {
        "large": Append("a", meta=json.dumps("m" * LARGE_JSON)),
        "file": Append("a", store.cas.take([LARGE])),
        "answered": Append("a", key="k"),
        "topic": Append("a.new"),
    }[table]
    writing = store.database.writing()
    writing.set_authorizer(deny)
    with pytest.raises(XsError):
        store.run(BatchWork([Append("a"), append, Append("a")], atomic=atomic))
    with pytest.raises(XsError):
        store.run(AppendWork(append._replace(content=store.cas.take([LARGE]))))
    writing.set_authorizer(lambda *_: sqlite3.SQLITE_OK)
    assert all_ids(store) == [kept]
    assert problems(store) == []
    again = add_all(store, [Append("a"), append._replace(content=None), Append("a")], atomic=atomic)
    assert len(all_ids(store)) == 1 + len(again)
    assert problems(store) == []


def test_where_sqlite_fails_amid_frames_alike_none_of_them_is_stored(store: Store) -> None:
    def deny(action: int, name: str | None, *_: object) -> int:
        is_denied = action == sqlite3.SQLITE_INSERT and name == "large"
        return sqlite3.SQLITE_DENY if is_denied else sqlite3.SQLITE_OK

    large = Append("a", meta=json.dumps("m" * LARGE_JSON))
    store.database.writing().set_authorizer(deny)
    with pytest.raises(XsError):
        store.run(BatchWork([Append("b"), alike(large, [b"x"] * ALIKE_MIN)]))
    store.database.writing().set_authorizer(lambda *_: sqlite3.SQLITE_OK)
    assert all_ids(store) == []
    assert problems(store) == []


class Defect(Work):
    def apply(self, commit: Commit) -> None:
        raise TypeError("of ours")


def test_a_defect_in_a_commit_is_told_with_its_place(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    with pytest.raises(XsError, match="TypeError: of ours"):
        store.run(Defect())
    (found,) = told
    assert (found.exc_type, str(found.exc_value)) == (TypeError, "of ours")
    assert "apply" in [at.name for at in traceback.extract_tb(found.exc_traceback)]
    assert all_ids(store) == [] and add(store) in all_ids(store)
