"""Pages one after the other: what is remembered between them is never more than a hint."""

from __future__ import annotations

import json
import random

import pytest
from stores import NOON, Clock, add, add_all, all_ids, import_all, imported, remove, steps_of

from xs import frame, ids
from xs.commit import Append
from xs.schema import LARGE_JSON, PAGE_BYTES, PAGE_ROWS
from xs.store import Store
from xs.walk import Walk


def ids_of(page: bytes) -> list[str]:
    return [frame.id_of(line) for line in page.splitlines()]


def statements_of(store: Store, walk: Walk, after: int, until: int | None = None) -> int:
    """How many statements a page takes."""
    steps: list[str] = []
    connection = store.index._connections.take()
    connection.set_trace_callback(steps.append)
    store.index._connections.give_back(connection, usable=True)
    _, count = walk.page(after, until, 10, NOON)
    connection.set_trace_callback(None)
    assert count == 10 and "COMMIT" in steps
    return len(steps)


def test_a_page_begins_where_the_last_one_ended_without_a_search(store: Store) -> None:
    made = [ids.parse(frame.id_of(line)) for line in add_all(store, [Append("a")] * 3000)]
    for patterns in (None, frozenset({"a"})):
        walk = store.index.walk(patterns)
        _, count = walk.page(made[1000], made[2000], 10, NOON)
        assert count == 10
        known = statements_of(store, walk, made[1010], made[2000])
        sought = statements_of(store, store.index.walk(patterns), made[1010], made[2000])
        assert known < sought


def test_a_frame_in_the_row_of_one_that_was_the_last_of_a_page_is_given(store: Store) -> None:
    made = [add(store) for _ in range(6)]
    for patterns in (None, frozenset({"a"})):
        walk = store.index.walk(patterns)
        page, _ = walk.page(-1, None, len(made), NOON)
        assert ids_of(page) == made
        remove(store, made.pop())
        last = ids.parse(ids_of(page)[-1])
        made.append(add(store))  # of the same millisecond, so it takes the row that became free
        page, _ = walk.page(last, ids.parse(made[-1]), 1000, NOON)
        assert ids_of(page) == made[-1:]


def test_frames_that_an_import_moves_between_two_pages_are_given_once(store: Store) -> None:
    base = NOON << 80
    import_all(store, [imported(base + 4 * n) for n in range(40)])
    walk = store.index.walk(None)
    page, _ = walk.page(-1, base + 4 * 39, 20, NOON)
    seen = ids_of(page)
    import_all(store, [imported(base + 4 * n + 1) for n in range(20)])  # below, and one above
    rest, _ = walk.page(ids.parse(seen[-1]), base + 4 * 39, 1000, NOON)
    assert ids_of(rest) == [each for each in all_ids(store) if each > seen[-1]]
    assert len(ids_of(rest)) == 21


def test_a_topic_is_read_whole_across_pauses(store: Store) -> None:
    """A page of a dense topic goes as far as the one before: a pause is longer than that."""
    chance = random.Random(3)
    wanted = []
    for pause in (1, 10_000, 3, 86_400_000, 50, 1):
        for _ in range(5):
            topics = [chance.choice(["a", "b"]) for _ in range(700)]
            found = add_all(store, [Append(topic) for topic in topics])
            wanted += [frame.id_of(line) for line in found if frame.topic_of(line) == "a"]
            store.clock.now += pause
        for _ in range(300):
            add(store, "b")
        store.clock.now += pause
    assert len(wanted) > 6 * PAGE_ROWS
    assert all_ids(store, topic="a") == wanted


@pytest.mark.long
def test_a_topic_that_others_outgrow_is_looked_for_in_its_index_from_the_next_page_on(
    store: Store, clock: Clock
) -> None:
    """It goes on as evenly as before: only how many others there are tells."""
    ends = []
    for others in (0, 40):
        for _ in range(PAGE_ROWS):
            lines = add_all(store, [Append("a")] + [Append("b")] * others)
            clock.now += 1
        ends.append(ids.parse(frame.id_of(lines[0])))
    walk = store.index.walk(frozenset({"a"}))
    walk.page(-1, None, 1 << 30, clock.now)  # the first page is a short one

    def read(after: int) -> None:
        _, count = walk.page(after, None, 1 << 30, clock.now)
        assert count == PAGE_ROWS

    among_few = steps_of(store, lambda: read(-1))
    assert steps_of(store, lambda: read(ends[0])) < 3 * among_few


@pytest.mark.parametrize("patterns", [None, frozenset({"a"}), frozenset({"a.*"})])
def test_pages_of_frames_that_are_nearly_large_have_few(
    store: Store, patterns: frame.Patterns
) -> None:
    """Who is slow to read holds one of them."""
    meta = json.dumps("m" * (LARGE_JSON - 200))
    small = add_all(store, [Append("a.b")] * 3000 + [Append("a")] * 3000)
    nearly = add_all(store, [Append("a.b", None, meta), Append("a", None, meta)] * 1000)
    walk = store.index.walk(patterns)
    start = ids.parse(frame.id_of(small[-1]))
    found, after = 0, start
    while True:
        page, count = walk.page(after, None, 1 << 30, NOON)
        if not count:
            break
        assert len(page) <= PAGE_BYTES + LARGE_JSON
        found += count
        after = ids.parse(ids_of(page)[-1])
    assert found == len(nearly) // (1 if patterns is None else 2)


def test_a_topic_that_has_ended_is_not_looked_for_among_what_goes_on(
    store: Store, clock: Clock
) -> None:
    add_all(store, [Append("a")] * 20)
    clock.now += 3_600_000
    last = ids.parse(frame.id_of(add_all(store, [Append("a")] * (2 * PAGE_ROWS - 20))[-1]))
    walk = store.index.walk(frozenset({"a"}))

    def read() -> None:
        page, after = b"", -1
        while after < last:
            page, _ = walk.page(after, None, 1 << 30, clock.now)
            after = ids.parse(ids_of(page)[-1])

    alone = steps_of(store, read)
    add_all(store, [Append("b")] * 20_000)
    assert steps_of(store, lambda: walk.page(last, None, 1 << 30, clock.now)) < alone / 10
