"""Ids: SCRU128's form, and a sequence that only goes up whatever the clock does."""

from __future__ import annotations

import random

import pytest
import scru128
from hypothesis import given
from hypothesis import strategies as st

from xs import ids
from xs.errors import Invalid

VALUES = st.integers(0, ids.MAX)
NOON = 1_700_000_000_000


@given(VALUES)
def test_text_is_what_the_scru128_library_writes_and_reads(value: int) -> None:
    text = ids.text(value)
    assert text == str(scru128.Scru128Id(value)).lower()
    assert ids.parse(text) == ids.parse(text.upper()) == value
    assert int(scru128.Scru128Id.from_str(text)) == value


@given(VALUES, VALUES)
def test_text_and_number_sort_alike(a: int, b: int) -> None:
    assert (ids.text(a) < ids.text(b)) == (a < b)


@given(VALUES)
def test_the_time_in_an_id_is_the_librarys(value: int) -> None:
    assert ids.milliseconds(value) == scru128.Scru128Id(value).timestamp
    ms = ids.milliseconds(value)
    assert ids.first_of(ms) <= value <= ids.last_of(ms) < ids.first_of(ms + 1)


@pytest.mark.parametrize(
    "text",
    ["", "0" * 24, "0" * 26, "z" * 25, "f5lxx1zz5pnorynqglhzmsp34", "0" * 24 + "-",
     "0" * 24 + "é", " " + "0" * 24, "0" * 24 + "\n", "٣" * 25],
)  # fmt: skip
def test_what_is_no_id_is_refused(text: str) -> None:
    assert not ids.is_id(text)
    with pytest.raises(Invalid):
        ids.parse(text)


def test_the_greatest_id_is_one() -> None:
    assert ids.parse(ids.text(ids.MAX)) == ids.MAX


def test_ids_of_the_library_are_read() -> None:
    for _ in range(100):
        made = scru128.new()
        assert ids.parse(str(made)) == int(made)


def rises(values: list[int]) -> bool:
    return all(a < b for a, b in zip(values, values[1:]))


@given(st.lists(st.integers(-(10**12), 10**12), max_size=60), st.integers(0, ids.MAX >> 1))
def test_a_sequence_rises_whatever_the_clock_does(steps: list[int], mark: int) -> None:
    sequence = ids.Sequence(mark)
    now, values = NOON, [mark]
    for step in steps:
        now = max(0, now + step)
        values.append(sequence.next(now))
        numbers, texts = sequence.run(1 + abs(step) % 50, now)
        assert [ids.text(each) for each in numbers] == texts
        values += numbers
    assert rises(values)


@pytest.mark.parametrize("count", [1, 2, 35, 36, 1295, 1296, 1297, 4096])
def test_a_run_is_of_one_millisecond_and_rises(count: int) -> None:
    sequence = ids.Sequence(0)
    before = sequence.next(NOON)
    for _ in range(5):
        numbers, texts = sequence.run(count, NOON)
        assert len(numbers) == len(texts) == count
        assert [ids.parse(each) for each in texts] == numbers
        assert rises([before, *numbers])
        assert {ids.milliseconds(each) for each in numbers} == {ids.milliseconds(numbers[0])}
        before = sequence.next(NOON)
        assert before > numbers[-1]


def test_a_run_near_the_end_of_a_millisecond_moves_to_the_next() -> None:
    for left in (0, 1, 10, 100_000, 10_000_000):
        mark = ids.last_of(NOON) - (left << 32)
        sequence = ids.Sequence(mark)
        numbers, _ = sequence.run(4096, NOON)
        assert numbers[0] > mark and rises(numbers)
        assert len({ids.milliseconds(each) for each in numbers}) == 1


def test_a_full_counter_moves_to_the_next_millisecond() -> None:
    sequence = ids.Sequence(ids.last_of(NOON))
    assert ids.milliseconds(sequence.next(NOON)) == NOON + 1
    sequence.skip_millisecond()
    assert ids.milliseconds(sequence.next(NOON)) == NOON + 2


def test_a_skipped_millisecond_leaves_room_in_the_next() -> None:
    for _ in range(300):
        sequence = ids.Sequence(0)
        sequence.next(NOON)
        sequence.skip_millisecond()
        values = [value for _ in range(8) for value in sequence.run(4096, NOON)[0][::4095]]
        assert {ids.milliseconds(value) for value in values} == {NOON + 1}


def test_an_id_carries_the_clocks_time_unless_the_clock_is_behind() -> None:
    sequence = ids.Sequence(0)
    assert ids.milliseconds(sequence.next(NOON)) == NOON
    assert ids.milliseconds(sequence.next(NOON + 5)) == NOON + 5
    assert ids.milliseconds(sequence.next(NOON - 10**9)) == NOON + 5


def test_raising_never_lowers() -> None:
    sequence = ids.Sequence(ids.first_of(NOON))
    sequence.raise_to(5)
    first = sequence.next(0)
    assert first > ids.first_of(NOON)
    sequence.raise_to(ids.last_of(NOON + 7))
    assert sequence.next(0) > ids.last_of(NOON + 7)


def test_text_of_a_sequence_is_text() -> None:
    sequence = ids.Sequence(0)
    for _ in range(2000):
        value = sequence.next(NOON + random.randrange(3))
        assert sequence.text(value) == ids.text(value)


def test_an_id_for_which_there_was_no_memory_leaves_the_next_ones_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sequence = ids.Sequence(0)
    sequence.text(sequence.next(NOON))
    value = sequence.next(NOON + 100_000)

    def fails(value: int) -> str:
        raise MemoryError

    with monkeypatch.context() as context:
        context.setattr(ids, "text", fails)
        with pytest.raises(MemoryError):
            sequence.text(value)
    assert sequence.text(value) == ids.text(value)
