"""The index: places of ids, pages, patterns, and SQLite's own ways."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys

import pytest
from conftest import DEADLINE, ROOT, environment
from stores import (
    NOON,
    Clock,
    add,
    add_all,
    all_ids,
    import_all,
    imported,
    lines,
    problems,
    remove,
    steps_of,
)

from xs import frame, ids, meta
from xs.bulk import BatchWork
from xs.commit import Append
from xs.content import small
from xs.rows import floor, id_at
from xs.schema import LARGE_JSON, ORDER_BITS, PAGE_ROWS
from xs.store import Store


def random_ids(chance: random.Random, count: int) -> list[int]:
    """Ids crowded into few milliseconds: counting up one by one, in bursts, and at random."""
    found: set[int] = set()
    while len(found) < count:
        value = ids.first_of(NOON - chance.choice([0, 0, 1, 2, 900]))
        kind = chance.random()
        if kind < 0.3:
            value |= chance.getrandbits(80)
        elif kind < 0.6:
            value |= chance.getrandbits(6) << 32 | chance.getrandbits(2)
        else:
            start = value | chance.getrandbits(70)
            found.update(start + (n << 32) for n in range(chance.randrange(1, 12)))
            continue
        found.add(value)
    return sorted(found)


def test_places_of_ids_are_those_of_a_naive_scan(store_dir: str) -> None:
    seed = random.randrange(10**6)
    print("seed:", seed)
    chance = random.Random(seed)
    for turn in range(12):
        store = Store(f"{store_dir}{turn}", exclusive=True, create=True, clock=Clock())
        stored = random_ids(chance, 60)
        order = stored[:]
        if turn % 2:
            chance.shuffle(order)
        ttls = ("forever", "time:1000")
        results = import_all(store, [imported(each, ttl=chance.choice(ttls)) for each in order])
        assert all(isinstance(each, bytes) for each in results)
        for value in chance.sample(stored, 20):  # holes
            remove(store, ids.text(value))
            stored.remove(value)
        asked = {0, 1, ids.MAX, ids.first_of(NOON + 1), ids.first_of(NOON) - 1}
        for value in stored:
            asked |= {value, value - 1, value + 1, value + (1 << 32), value - (1 << 32)}
            asked |= {ids.first_of(value >> 80), ids.last_of(value >> 80)}
        with store.index.reading() as reader:
            rows = {
                int(text, 36): row
                for row, text in reader.execute(
                    'SELECT row, substr(json, instr(json, \'"id":"\') + 6, 25) FROM frame'
                )
            }
            assert sorted(rows) == stored
            assert [row for _, row in sorted(rows.items())] == sorted(rows.values())
            for value in asked:
                found = floor(reader, value)
                assert all((row <= found) == (each <= value) for each, row in rows.items()), value
        for value in asked:
            below = [each for each in stored if each < value]
            above = [each for each in stored if each > value]
            following = store.index.next(value, None, NOON)
            preceding = store.index.prev(value, None, NOON) if value else None
            assert (following and ids.parse(frame.id_of(following))) == (above or [None])[0]
            assert (preceding and ids.parse(frame.id_of(preceding))) == (below or [None])[-1]
            line = store.index.get(value, NOON)
            assert (None if line is None else ids.parse(frame.id_of(line))) == (
                value if value in rows else None
            )
            for now in (NOON, NOON + 500, NOON + 1000):
                whole = store.index.stored(value, now)
                assert store.index.get(value, now) == (None if whole is None else whole.line)
        assert problems(store) == []
        store.close()


def test_a_frame_among_thousands_of_one_batch_is_found_in_few_steps(store: Store) -> None:
    found = store.run(BatchWork([Append("a", None) for _ in range(4000)]))
    values = [ids.parse(frame.id_of(line)) for line in found]
    assert values[0] >> 80 == values[-1] >> 80
    with store.index.reading() as reader:
        for value in values[1::97]:
            steps: list[str] = []
            reader.set_trace_callback(steps.append)
            row = floor(reader, value)
            reader.set_trace_callback(None)
            assert id_at(reader, row) == value
            assert len(steps) <= 4, steps  # halving takes 12


def test_a_row_says_the_milliseconds_of_its_id(store: Store) -> None:
    add(store)
    with store.index.reading() as reader:
        (row,) = reader.execute("SELECT row FROM frame").fetchone()
    assert row >> ORDER_BITS == NOON


def test_pages_hold_large_frames_among_small_ones_once_in_order(store: Store) -> None:
    chance = random.Random(5)
    appends = []
    for _ in range(600):
        size = chance.choice([0, 0, 10, LARGE_JSON - 130, LARGE_JSON, 50_000, 200_000])
        topic = chance.choice(["a", "a.b", "a.b.c", "z"])
        appends.append(Append(topic, meta=json.dumps("m" * size)))
    appends.insert(300, Append("a.b", meta=json.dumps("m" * (meta.META_MAX - 2))))
    expected = add_all(store, appends)
    for pattern in (None, "a", "a.*", "a.b.*", "z,a.b.c", "a.*,a.b.*,a"):
        patterns = None if pattern is None else frame.parse_patterns(pattern)
        wanted = [each for each in expected if frame.matches(patterns, frame.topic_of(each))]
        assert lines(store, topic=pattern) == wanted
        assert lines(store, topic=pattern, limit=7) == wanted[:7]
        assert lines(store, topic=pattern, last=7) == wanted[-7:]
        position, sizes = -1, []
        while True:
            page, count = store.index.walk(patterns).page(position, None, 10**9, NOON)
            if not count:
                break
            sizes.append(len(page))
            position = ids.parse(frame.id_of(page.splitlines()[-1]))
        assert max(sizes) <= (1 << 20) + meta.META_MAX + 4096 * 1000 // 2
    assert problems(store) == []


def test_a_topic_is_read_whole_where_it_is_dense_and_where_it_is_thin(store: Store) -> None:
    chance = random.Random(8)
    appends = []
    for share in (1.0, 0.5, 0.02, 0.5, 0.0, 0.3, 0.5):
        for _ in range(900):
            topic = "a" if chance.random() < share else chance.choice(["b", "a.b"])
            ttl = "time:1000" if share == 0.5 and chance.random() < 0.5 else "forever"
            size = LARGE_JSON if chance.random() < 0.002 else 0
            appends.append(Append(topic, meta=json.dumps("m" * size), ttl=ttl))
    every = []
    for start in range(0, len(appends), 100):
        every += add_all(store, appends[start : start + 100])
        store.clock.now += 1
    wanted = [line for line in every if frame.topic_of(line) == "a"]
    assert lines(store, topic="a") == wanted
    assert lines(store, topic="a", limit=777) == wanted[:777]
    store.clock.now += 1000  # some have expired, and lie there until they are swept
    left = [line for line in wanted if frame.ttl_of(line) == "forever"]
    assert 100 < len(left) < len(wanted)
    with store.index.reading() as reader:
        page = [*reader.execute("SELECT json FROM frame WHERE expires IS NOT NULL LIMIT 1")]
    assert page
    assert lines(store, topic="a") == left
    after = ids.parse(frame.id_of(left[50]))
    assert lines(store, topic="a", after=after) == left[51:]


def test_a_topic_that_gets_thin_is_not_looked_for_among_all_frames(store: Store) -> None:
    def read() -> None:
        _, frames = store.index.walk(frozenset({"a"})).page(-1, None, 1000, NOON)
        assert 50 <= frames <= 100

    add_all(store, [Append("a")] * 100)
    store.clock.now += 1
    alone = steps_of(store, read)
    add_all(store, [Append("b")] * 20_000)
    assert steps_of(store, read) < 2 * alone


def test_a_read_of_many_large_frames_takes_little_memory(store: Store) -> None:
    add_all(store, [Append("a.b", meta=json.dumps("m" * 500_000))] * 150)
    program = (
        "import sys, resource; sys.path.insert(0, sys.argv[1])\n"
        "from xs.store import Store; from xs.reader import Reader; from xs import frame\n"
        "from xs.query import ReadOptions\n"
        "store = Store(sys.argv[2])\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used()\n"
        "for pattern in (None, 'a.*', 'a.b'):\n"
        "    patterns = pattern and frame.parse_patterns(pattern)\n"
        "    reader = Reader(store, ReadOptions(patterns=patterns))\n"
        "    assert sum(map(len, reader.history())) > 75_000_000\n"
        "print(used() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), store.folder],
        capture_output=True,
        timeout=DEADLINE,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) < 24_000, f"{int(done.stdout)} KiB for pages of 1 MiB"


def test_overlapping_patterns_give_each_frame_once(store: Store) -> None:
    names = ["a", "a.b", "a.b.c", "a.b.c.d", "a.x", "ab", "b"]
    expected = add_all(store, [Append(name) for name in names for _ in range(3)])
    for pattern in ("a.*,a.b.*,a.b.c", "a.b.c,a.b.*,a.*,a", "a.*,b,a.b.c.d", "a.b.c.*,a.b.*"):
        patterns = frame.parse_patterns(pattern)
        wanted = [each for each in expected if frame.matches(patterns, frame.topic_of(each))]
        assert lines(store, topic=pattern) == wanted
        assert lines(store, topic=pattern, last=4) == wanted[-4:]
        assert store.index.first(patterns, NOON) == wanted[0]
        assert store.index.last(patterns, NOON) == wanted[-1]


def test_wildcards_forget_what_was_removed(store: Store) -> None:
    made = [add(store, "a.b.c") for _ in range(5)]
    for each in made[::2]:
        remove(store, each)
    for pattern in ("a.*", "a.b.*", "a.b.c"):
        assert all_ids(store, topic=pattern) == made[1::2]
    for each in made[1::2]:
        remove(store, each)
    assert lines(store, topic="a.*") == []
    again = add(store, "a.b.c")
    assert all_ids(store, topic="a.b.*") == [again]
    assert problems(store) == []


def test_topics_beyond_those_remembered_are_found(store: Store) -> None:
    from xs import writer

    count = writer.TOPICS_CACHED + 500
    expected = add_all(store, [Append(f"t{n}.x") for n in range(count)])
    again = add_all(store, [Append("t0.x"), Append(f"t{count - 1}.x")])
    assert lines(store, topic="t0.*") == [expected[0], again[0]]
    assert lines(store, topic=f"t{count - 1}.x") == [expected[-1], again[1]]
    assert lines(store, topic=f"t{count // 2}.*") == [expected[count // 2]]


@pytest.mark.parametrize("count", [1, 511, 512, 513, 1025])
def test_every_size_of_batch_is_written_whole(store: Store, count: int) -> None:
    expected = add_all(store, [Append("a.b", small(b"%d" % n)) for n in range(count)])
    assert lines(store) == lines(store, topic="a.*") == expected


def test_buckets_stay_about_as_large_however_often_a_store_is_opened(store_dir: str) -> None:
    from xs.writer import BUCKET_FRAMES

    step = 500
    for start in range(0, 3 * BUCKET_FRAMES, step):
        opened = Store(store_dir, create=True)
        contents = (small(b"%d" % n) for n in range(start, start + step))
        opened.run(BatchWork([Append("a", content) for content in contents]))
        opened.close()
    with contextlib.closing(sqlite3.connect(os.path.join(store_dir, "xs.db"))) as db:
        found = db.execute("SELECT count(*) FROM frame GROUP BY digest >> 32").fetchall()
    *full, _ = [count for (count,) in found]
    assert len(full) in (2, 3)
    assert all(0.7 * BUCKET_FRAMES < count < 1.4 * BUCKET_FRAMES for count in full), full


def test_contents_are_found_in_every_bucket(store: Store) -> None:
    from xs.writer import BUCKET_FRAMES

    count = 2 * BUCKET_FRAMES + 100
    add_all(store, [Append("a", small(b"%d" % n)) for n in range(count)])
    for n in (0, 1, BUCKET_FRAMES - 1, BUCKET_FRAMES, 2 * BUCKET_FRAMES, count - 1):
        assert b"".join(store.content(small(b"%d" % n).hash)[1]) == b"%d" % n


def test_a_limit_holds_where_the_index_of_topics_lacks_some_of_its_rows(store_dir: str) -> None:
    with contextlib.closing(Store(store_dir, exclusive=True, create=True, clock=Clock())) as opened:
        every = add_all(opened, [Append("a") for _ in range(1900)])
    with contextlib.closing(sqlite3.connect(f"{store_dir}/xs.db")) as db:
        (declared,) = db.execute("SELECT sql FROM sqlite_master WHERE name = 'frame_topic'")
        db.executescript(
            "DROP INDEX frame_topic;"
            "CREATE INDEX frame_topic ON frame (topic) WHERE row % 4 > 0;"
            "PRAGMA writable_schema = ON;"
        )
        update = "UPDATE sqlite_master SET sql = ? WHERE name = 'frame_topic'"
        db.execute(update, declared)
        db.commit()
    with contextlib.closing(Store(store_dir, exclusive=True, clock=Clock())) as opened:
        above_listed = 1450
        assert 1900 * 3 // 4 < above_listed < PAGE_ROWS < 1900
        for limit in (100, 400, above_listed):
            found = lines(opened, topic="a", limit=limit)
            assert len(found) == limit
            assert found == sorted(set(found), key=every.index)
        assert problems(opened)


@pytest.mark.parametrize("count", [1, 1000])
def test_rows_that_are_listed_and_not_there_hide_no_frame(store: Store, count: int) -> None:
    wanted = add_all(store, [Append("a.x") for _ in range(3)])
    with contextlib.closing(sqlite3.connect(f"{store.folder}/xs.db")) as db:
        number = "(SELECT number FROM topic WHERE name = 'a.*')"
        for n in range(1, count + 1):
            db.execute(f"INSERT INTO below SELECT {number}, min(row) - ? FROM frame", (n,))
        db.commit()
    assert lines(store, topic="a.*") == wanted
    assert lines(store, topic="a.*", limit=2) == wanted[:2]
    assert problems(store)


def test_sqlite_joins_a_page_in_the_order_of_its_rows(store: Store) -> None:
    """What SQLite promises only with ORDER BY in the call, from 3.44 on."""
    chance = random.Random(9)
    topics = [f"t.{n}" for n in range(30)] + [f"u.{n}.v" for n in range(30)]
    add_all(store, [Append(chance.choice(topics)) for _ in range(20_000)])
    for value in chance.sample(all_ids(store), 300):
        remove(store, value)
    everything = all_ids(store)
    assert everything == sorted(everything) and len(everything) == 19_700
    for pattern in ("t.*", "u.*", "t.*,u.3.*,u.4.v", ",".join(topics)):
        found = all_ids(store, topic=pattern)
        assert found == sorted(found) and found
    assert sqlite3.sqlite_version


def test_a_reader_while_the_store_closes_is_told_so(store_dir: str) -> None:
    from xs.errors import Unavailable

    opened = Store(store_dir, exclusive=True, create=True)
    add(opened)
    opened.close()
    with pytest.raises(Unavailable):
        opened.index.first(None, NOON)


def test_the_write_ahead_log_does_not_grow_without_end(store: Store) -> None:
    for _ in range(60):
        add_all(store, [Append("a", small(os.urandom(1000)))] * 500)
    size = os.path.getsize(os.path.join(store.folder, "xs.db-wal"))
    assert size < 24 << 20, size
