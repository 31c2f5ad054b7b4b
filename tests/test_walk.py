"""Pages one after the other: what is remembered between them is never more than a hint."""

from __future__ import annotations

import random

from stores import NOON, add, add_all, all_ids, import_all, imported, remove

from xs import frame, ids
from xs.commit import Append
from xs.schema import PAGE_ROWS
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


def test_a_topic_that_gets_thin_is_looked_for_in_its_index_from_the_next_page_on(
    store: Store,
) -> None:
    add_all(store, [Append("a")] * 2 * PAGE_ROWS)
    add_all(store, ([Append("b")] * 199 + [Append("a")]) * 40)
    walk, position, counts = store.index.walk(frozenset({"a"})), -1, [1]
    while counts[-1]:
        page, count = walk.page(position, None, 1 << 30, NOON)
        position = ids.parse(ids_of(page)[-1]) if count else position
        counts.append(count)
    assert sum(counts[1:]) == 2 * PAGE_ROWS + 40
    assert len(counts) <= 6, counts  # 1,000, 1,000, what the last page's stretch has, and the rest
