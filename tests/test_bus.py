"""The bus: a bounded ring, positions, and waking who waits."""

from __future__ import annotations

import threading

import pytest
from conftest import DEADLINE

from xs.bus import RING_BYTES, RING_FRAMES, Bus
from xs.frame import Entry


def entry(value: int, size: int = 50, **more: object) -> Entry:
    return Entry(value, "a", b"x" * size, **more)  # type: ignore[arg-type]


def ids_after(bus: Bus, position: int) -> list[int] | None:
    entries = bus.after(position)
    return None if entries is None else [each.id for each in entries]


def test_a_position_is_given_what_comes_after_it() -> None:
    bus = Bus(10)
    assert bus.newest == 10 and ids_after(bus, 10) == [] and ids_after(bus, 9) is None
    bus.publish([entry(12), entry(15)])
    assert ids_after(bus, 10) == ids_after(bus, 11) == [12, 15]
    assert ids_after(bus, 12) == ids_after(bus, 14) == [15]
    assert ids_after(bus, 15) == ids_after(bus, 99) == []
    bus.publish([])
    assert bus.newest == 15


def test_the_ring_is_bounded_in_frames_and_says_what_has_left_it() -> None:
    bus = Bus(0)
    for start in range(1, 5 * RING_FRAMES, 1000):
        bus.publish([entry(value) for value in range(start, start + 1000)])
    newest = bus.newest
    assert ids_after(bus, 1) is None
    assert len(bus._entries) <= RING_FRAMES + 2048
    kept = ids_after(bus, newest - RING_FRAMES + 1)
    assert kept == list(range(newest - RING_FRAMES + 2, newest + 1))


def test_the_ring_is_bounded_in_bytes_and_keeps_the_newest() -> None:
    bus = Bus(0)
    size = RING_BYTES // 10
    for value in range(1, 40):
        bus.publish([entry(value, size)])
    assert sum(each.size for each in bus._entries) <= RING_BYTES
    assert bus._bytes == sum(each.size for each in bus._entries)
    bus.publish([entry(40, 10, content=b"x" * (2 * RING_BYTES))])
    assert ids_after(bus, 39) == [40]


def test_removed_entries_are_passed_over_and_free_their_content() -> None:
    bus = Bus(0)
    bus.publish([entry(1), entry(2, digest=b"d", content=b"c" * 100), entry(3)])
    assert bus.content(b"d") == b"c" * 100
    bus.discard([2, 7])
    bus.discard([2])
    assert bus.content(b"d") is None and bus.find(2) is None
    assert [each.id for each in bus.after(0) or [] if each.is_live(0)] == [1, 3]
    assert bus._bytes == 100
    assert bus.find(3) is not None and bus.find(9) is None


def test_an_entry_is_live_until_it_expires() -> None:
    assert entry(1, expires=10).is_live(9) and not entry(1, expires=10).is_live(10)


def test_what_comes_with_history_is_not_seen_without_it() -> None:
    bus = Bus(0)
    seen: list[object] = []
    bus.watch(lambda topic: topic == "none", lambda: seen.append(bus.after(0)))
    bus.publish([entry(4), entry(8)], imported=6)
    assert seen == [None] and [each.id for each in bus.after(6) or []] == [8]
    bus.publish([], imported=12)
    assert seen == [None, None] and bus.after(8) is None and bus.newest == 12


@pytest.mark.parametrize("mark", [0, 3, 5, 9])
def test_history_up_to_a_mark_is_for_the_index(mark: int) -> None:
    bus = Bus(0)
    bus.publish([entry(value) for value in (2, 4, 6)])
    bus.skip_to(mark)
    assert bus.newest == max(6, mark)
    if mark:
        assert ids_after(bus, mark - 1) is None
    assert ids_after(bus, mark) == [value for value in (2, 4, 6) if value > mark]
    bus.publish([entry(10)])
    assert ids_after(bus, 9) == [10]


def test_the_newest_position_never_goes_back() -> None:
    bus = Bus(0)
    bus.skip_to(9)
    bus.publish([entry(5)])
    assert bus.newest == 9


@pytest.mark.parametrize("published", [1, 2, 3])
def test_what_could_not_be_published_is_for_the_index(published: int) -> None:
    bus = Bus(0)
    watch = bus.watch(lambda topic: True, (woken := threading.Event()).set)
    bus.publish([entry(value) for value in range(1, published)])
    woken.clear()
    bus.lose(2)
    assert woken.is_set() and bus.newest == 2 and bus.wait(1, 0)
    assert ids_after(bus, 1) is None and ids_after(bus, 2) == []
    bus.publish([entry(3)])
    assert ids_after(bus, 1) is None and ids_after(bus, 2) == [3]
    bus.unwatch(watch)


def test_who_waits_is_woken_by_what_is_above_its_position_or_by_the_end() -> None:
    bus = Bus(0)
    woken: list[tuple[int, bool]] = []
    threads = [
        threading.Thread(target=lambda p=p: woken.append((p, bus.wait(p, DEADLINE))))
        for p in (0, 1, 2, 5)
    ]
    for thread in threads:
        thread.start()
    bus.publish([entry(1)])
    bus.publish([entry(2)])
    threads[0].join(DEADLINE)
    threads[1].join(DEADLINE)
    assert sorted(woken) == [(0, True), (1, True)]
    bus.close()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(woken) == 4 and bus.closed
    assert not Bus(0).wait(0, 0.01)


def test_a_watch_is_woken_for_the_topics_that_it_wants_and_no_others() -> None:
    bus = Bus(0)
    woken: list[str] = []
    first = bus.watch(lambda topic: topic == "a", lambda: woken.append("first"))
    bus.watch(lambda topic: topic.startswith("b."), lambda: woken.append("second"))
    bus.publish([entry(1), entry(2)])
    assert woken == ["first"], "once for a batch"
    bus.publish([Entry(3, "b.c", b"x"), Entry(4, "c", b"x")])
    assert woken == ["first", "second"]
    bus.publish([Entry(5, "c", b"x"), Entry(6, "b", b"x")])
    assert woken == ["first", "second"]
    bus.unwatch(first)
    bus.publish([entry(7), Entry(8, "b.d", b"x")])
    assert woken == ["first", "second", "second"]
    bus.close()
    assert woken == ["first", "second", "second", "second"]


def test_a_watch_that_is_woken_finds_what_woke_it() -> None:
    bus = Bus(0)
    found: list[list[int] | None] = []
    bus.watch(lambda topic: True, lambda: found.append(ids_after(bus, bus.newest - 1)))
    bus.publish([entry(1)])
    bus.publish([entry(2)])
    assert found == [[1], [2]]


def test_from_the_floor_on_all_is_in_the_ring() -> None:
    bus = Bus(10)
    assert bus.floor == 10
    for start in range(11, 3 * RING_FRAMES, 1000):
        bus.publish([entry(value) for value in range(start, start + 1000)])
    assert bus.floor > 10
    assert ids_after(bus, bus.floor) and ids_after(bus, bus.floor - 1) is None


def test_who_waits_for_a_run_can_be_woken_with_nothing_of_it() -> None:
    bus = Bus(0)
    bus.publish([entry(1), entry(2, first=9)])
    found: list[bool] = []
    waits = threading.Thread(target=lambda: found.append(bus.wait_for_run(1, 2, DEADLINE)))
    waits.start()
    while waits.is_alive():
        bus.wake_run(1)
        bus.wake_run(9)
    assert found == [False] and not bus._run_changed
    assert bus.wait_for_run(9, 1, DEADLINE)
