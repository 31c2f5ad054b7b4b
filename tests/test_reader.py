"""Reading: a position, pages of history, what is live, and the forms in which frames are given."""

from __future__ import annotations

import base64
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE
from stores import (
    NOON,
    add,
    add_all,
    all_ids,
    import_all,
    imported,
    in_one_batch,
    lines,
    remove,
)

from xs import frame, ids
from xs.bus import RING_FRAMES
from xs.commit import Append
from xs.errors import Damaged
from xs.imports import ImportWork
from xs.query import ReadOptions
from xs.reader import COMMIT_MS, CONTENT_INLINE_MAX, LIVE_BYTES, Form, Reader, write_parts
from xs.schema import FIRST_ROWS, PAGE_ROWS
from xs.store import Store
from xs.work import AppendWork


def read(store: Store, *, sse: bool = False, **options: Any) -> bytes:
    return b"".join(Reader(store, ReadOptions(**options), sse=sse).history())


TWO_PAGES = FIRST_ROWS + PAGE_ROWS
SEAMS = [end + near for end in (FIRST_ROWS, TWO_PAGES) for near in (-1, 0, 1)]


@pytest.mark.parametrize("count", [0, 1, *SEAMS, TWO_PAGES + 2 * PAGE_ROWS])
def test_pages_have_no_seams(store: Store, count: int) -> None:
    expected = add_all(store, [Append("a")] * count) if count else []
    assert lines(store) == lines(store, topic="a") == expected
    assert lines(store, limit=max(1, count - 1)) == expected[: max(1, count - 1)]
    assert lines(store, last=PAGE_ROWS + 1) == expected[-PAGE_ROWS - 1 :]


def test_last_and_limit_select_one_after_the_other(store: Store) -> None:
    made = [add(store, "a.b") for _ in range(10)]
    value = ids.parse(made[3])
    assert all_ids(store, last=4, limit=2) == made[6:8]
    assert all_ids(store, last=2, until=value) == made[2:4]
    assert all_ids(store, last=100, after=value) == made[4:]
    assert all_ids(store, last=2, after=value, until=value) == []
    assert all_ids(store, topic="nothing", last=3) == []


def test_what_comes_after_a_reading_began_is_not_its_history(store: Store) -> None:
    before = add_all(store, [Append("a")] * (PAGE_ROWS + 5))
    reader = Reader(store, ReadOptions())
    blocks = reader.history()
    seen = next(blocks)
    add(store)
    seen += b"".join(blocks)
    assert seen.splitlines() == before


def test_an_import_below_a_readers_place_is_not_given_and_above_it_is(store: Store) -> None:
    base = ids.first_of(NOON - 1000)
    import_all(store, [imported(base + 2 * n) for n in range(2 * PAGE_ROWS)])
    blocks = Reader(store, ReadOptions()).history()
    first = next(blocks).splitlines()
    import_all(store, [imported(base + 1), imported(base + 4 * PAGE_ROWS - 3)])
    rest = b"".join(blocks).splitlines()
    seen = [ids.parse(frame.id_of(line)) for line in first + rest]
    assert base + 1 not in seen and base + 4 * PAGE_ROWS - 3 in seen
    assert len(seen) == 2 * PAGE_ROWS + 1 and seen == sorted(set(seen))


def test_a_reader_goes_on_where_its_frame_was_removed(store: Store) -> None:
    made = [frame.id_of(line) for line in add_all(store, [Append("a")] * (TWO_PAGES + 10))]
    blocks = Reader(store, ReadOptions()).history()
    next(blocks), next(blocks)
    for place in (TWO_PAGES - 1, TWO_PAGES, TWO_PAGES + 1):
        remove(store, made[place])
    rest = b"".join(blocks).splitlines()
    assert [frame.id_of(line) for line in rest] == made[TWO_PAGES + 2 :]


def test_events_have_ids_unless_they_are_synthetic(store: Store) -> None:
    made = add(store, "a", b"x")
    data = read(store, sse=True).decode()
    assert data == f"id: {made}\ndata: {lines(store)[0].decode()}\n\n"
    reader = Reader(store, ReadOptions(follow=True), sse=True)
    assert reader.threshold().startswith(b'data: {"topic":"xs.threshold"')


def test_a_timestamp_is_the_last_key(store: Store) -> None:
    add(store, "a", b"x")
    (line,) = read(store, with_timestamp=True, with_content=True).splitlines()
    assert list(json.loads(line)) == [
        "topic", "id", "hash", "meta", "ttl", "content", "timestamp",
    ]  # fmt: skip
    assert json.loads(line)["timestamp"] == "2023-11-14T22:13:20.000Z"
    assert read(store, with_timestamp=True) == lines(store)[0][:-1] + (
        b',"timestamp":"2023-11-14T22:13:20.000Z"}\n'
    )


def test_content_is_given_as_text_where_it_is_text(store: Store) -> None:
    datas = [
        b'text \xc3\xa9 "\\\n\0',
        b"\xff\xfe",
        b"\xed\xa0\x80",
        os.urandom(50_000),
        b"t" * 60_000,
    ]
    for data in datas:
        add(store, "a", data)
    add(store, "a")
    *found, none = [json.loads(line) for line in read(store, with_content=True).splitlines()]
    for value, data in zip(found, datas):
        if "content" in value:
            assert value["content"].encode() == data
        else:
            assert base64.b64decode(value["content_base64"]) == data
            with pytest.raises(UnicodeDecodeError):
                data.decode()
    assert "content" not in none and "content_base64" not in none


def test_content_that_is_too_long_is_left_to_its_hash(store: Store) -> None:
    add(store, "a", b"x" * (CONTENT_INLINE_MAX + 1))
    add(store, "a", b"y" * CONTENT_INLINE_MAX)
    first, second = read(store, with_content=True).splitlines()
    assert first == lines(store)[0] and len(second) > CONTENT_INLINE_MAX


@pytest.mark.parametrize("sse", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        b"x" * (LIVE_BYTES + 1),
        b'\1"\n\\' * 500_000,
        "äß€😀".encode() * 100_003,
        b"x" + "😀".encode() * 300_000,
        b"x" * LIVE_BYTES * 8 + "😀".encode()[:3],
        b"\xff\0\n" * 500_000,
        b"\xff" * (2 * LIVE_BYTES + 1),
        b"\xff" * (2 * LIVE_BYTES + 2),
    ],
    ids=lambda data: f"{data[:3]!r}",
)
def test_large_content_comes_in_parts_that_make_the_same_frame(
    store: Store, sse: bool, data: bytes
) -> None:
    add(store, "a", b"before")
    made = add(store, "a", data)
    add(store, "a", b"behind")
    options = ReadOptions(with_content=True, with_timestamp=True)
    blocks = list(Reader(store, options, sse=sse).history())
    assert max(map(len, blocks)) < 450_000 and b"" not in blocks
    events = b"".join(blocks).split(b"\n\n" if sse else b"\n")[:-1]
    assert len(events) == 3
    if sse:
        assert events[1].startswith(f"id: {made}\ndata: {{".encode())
    given = json.loads(events[1].partition(b"data: ")[2] if sse else events[1])
    try:
        assert given["content"].encode() == data
        assert "content_base64" not in given
    except KeyError:
        assert base64.b64decode(given["content_base64"]) == data
        with pytest.raises(UnicodeDecodeError):
            data.decode()
    assert list(given)[-1] == "timestamp" and given["id"] == made


def test_a_damaged_large_content_is_known_before_its_first_part(store: Store) -> None:
    made = add(store, "a", b"x" * 2_000_000)
    (path,) = [path for path in Path(store.folder, "cas").rglob("*") if path.is_file()]
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(1_999_999)
        file.write(b"y")
    with pytest.raises(Damaged):
        next(Reader(store, ReadOptions(with_content=True)).history())
    assert made in all_ids(store)


def test_a_large_content_that_is_removed_before_its_first_part_is_left_out(store: Store) -> None:
    made = add(store, "a", b"x" * (LIVE_BYTES + 1))
    parts = write_parts(Form(content=True), store, store.get(ids.parse(made)))
    (line,) = lines(store)
    remove(store, made)
    assert list(parts) == [line + b"\n"]


def test_until_ends_a_follower_when_its_time_has_passed(store: Store) -> None:
    made = add(store)
    until = ids.last_of(NOON)
    reader = Reader(store, ReadOptions(follow=True, until=until))
    blocks = reader.follow()
    assert made.encode() in next(blocks)
    assert b"xs.threshold" in next(blocks)
    also = add(store)
    assert also.encode() in next(blocks)
    store.clock.now += 1  # type: ignore[attr-defined]
    late = add(store)
    rest = b"".join(blocks)
    assert late.encode() not in rest


@pytest.mark.parametrize("late", [COMMIT_MS, COMMIT_MS + 1, 10**9])
def test_one_that_is_late_for_until_gets_all_that_came_before_it(store: Store, late: int) -> None:
    reader = Reader(store, ReadOptions(follow=True, until=ids.last_of(NOON + 500)))
    blocks = reader.follow()
    assert b"xs.threshold" in next(blocks)
    made = [frame.id_of(line) for line in add_all(store, [Append("a")] * (RING_FRAMES + 2000))]
    store.clock.now += 500  # type: ignore[attr-defined]
    made.append(add(store))
    store.clock.now += late  # type: ignore[attr-defined]
    add(store)
    assert [frame.id_of(line) for line in b"".join(blocks).splitlines()] == made


def test_one_that_looks_amid_a_commit_misses_nothing_that_it_imports(store: Store) -> None:
    """What is imported lies below what is appended in the same commit, and above all before."""
    add(store)
    reader = Reader(store, ReadOptions(follow=True, new=True))
    given: list[bytes] = []

    def look() -> None:
        while True:
            missed = reader.missed()
            block = reader.coming() if missed is None else b"".join(missed)
            if block is None:
                return
            given.append(block)

    watch = store.bus.watch(lambda topic: True, look)
    in_one_batch(store, [ImportWork([imported(NOON + 1000 << 80)]), AppendWork(Append("b", None))])
    store.bus.unwatch(watch)
    look()
    assert b"".join(given).splitlines() == lines(store)[1:]


def test_a_follower_ends_with_its_store(store_dir: str) -> None:
    opened = Store(store_dir, exclusive=True, create=True)
    reader = Reader(opened, ReadOptions(follow=True, new=True))
    seen: list[bytes] = []
    thread = threading.Thread(target=lambda: seen.extend(reader.follow()))
    thread.start()
    last = add(opened)
    opened.close()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert [frame.id_of(line) for line in b"".join(seen).splitlines()] in ([last], [])


def test_a_place_in_the_future_is_waited_for(store: Store) -> None:
    add(store)
    later = ids.last_of(NOON + 10)
    reader = Reader(store, ReadOptions(follow=True, after=later, limit=1))
    add(store)
    store.clock.now += 11  # type: ignore[attr-defined]
    wanted = add(store)
    blocks = [block for block in reader.follow() if b"xs.threshold" not in block]
    assert [frame.id_of(line) for line in b"".join(blocks).splitlines()] == [wanted]
