"""Many events in one body: lines, however they are cut into blocks, and each judged by itself."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import Clock, all_ids, content, lines, problems

from xs import batch, frame, ids
from xs.cas import INLINE_MAX
from xs.errors import BrokenBody, Conflict, Invalid, TooLarge, XsError
from xs.store import Store


@pytest.fixture
def store(store_dir: str) -> Iterator[Store]:
    opened = Store(store_dir, exclusive=True, create=True, clock=Clock())
    yield opened
    opened.close()


def cut(data: bytes, seed: int) -> list[bytes]:
    chance = random.Random(seed)
    found = []
    while data:
        size = chance.choice([1, 2, 5, 50, 5000])
        found.append(data[:size])
        data = data[size:]
    return found


def body(*events: object) -> bytes:
    return b"".join([json.dumps(each).encode() + b"\n" for each in events])


def summary(store: Store, blocks: Iterable[bytes]) -> dict[str, Any]:
    return dict(json.loads(batch.append_lines(store, blocks)))


@given(st.lists(st.binary(max_size=20)), st.integers())
def test_lines_are_the_same_however_they_are_cut(parts: list[bytes], seed: int) -> None:
    data = b"\n".join(parts)
    expected = [(n, text) for n, text in enumerate(data.split(b"\n"), 1) if text and text != b"\r"]
    if expected and not expected[-1][1].strip() and not data.endswith(b"\n"):
        expected.pop()  # blanks after the last newline
    found = [line for lines in batch.line_batches(cut(data, seed)) for line in lines]
    assert found == expected


def test_what_has_arrived_is_not_held_back(store: Store) -> None:
    def blocks() -> Iterator[bytes]:
        yield body({"topic": "a"}, {"topic": "b"}) + b'{"topic":'
        yield b""
        yield b'"c"}\n'
        assert len(all_ids(store)) >= 2
        yield body({"topic": "d"})

    assert summary(store, blocks())["appended"] == 4


def test_each_line_that_is_wrong_is_said_with_its_number(store: Store) -> None:
    wrong = [
        b"{", b"[]", b"5", b"{}", b'{"topic":5}', b'{"topic":"xs.start"}', b'{"topic":"a b"}',
        b'{"topic":"a","meta":NaN}', b'{"topic":"a","unknown":1}', b'{"topic":"a","content":5}',
        b'{"topic":"a","content":"x","content_base64":"eA=="}', b'{"topic":"a"} x', b"\xff",
        b'{"topic":"a","content_base64":"eA"}', b'{"topic":"a","content_base64":"e A=="}',
        b'{"topic":"a","ttl":"never"}', b'{"topic":"a","if_last":"x"}', b'{"topic":"a","key":""}',
        b'{"topic":"a","content":"\\ud800"}', b'{"topic":"a","meta":' + b"[" * 200 + b"]" * 200
        + b"}", b'{"topic":"a","key":"' + b"k" * 256 + b'"}', b'{"topic":"a","meta":"\\udc00"}',
        b'{"topic":"a","meta":' + b"9" * 2_000_000 + b"}", b'{"topic":"a",}', b"\0", b"[" * 90000,
    ]  # fmt: skip
    good = b'{"topic":"good"}'
    data = b"\n".join([line for each in wrong for line in (each, good)])
    found = summary(store, cut(data, 3))
    assert found["appended"] == len(wrong) == len(lines(store))
    assert [each["line"] for each in found["errors"]] == list(range(1, 2 * len(wrong), 2))
    assert all(each["error"] for each in found["errors"])
    assert [found["first"], found["last"]] == [all_ids(store)[0], all_ids(store)[-1]]


def test_each_gives_one_line_for_each(store: Store) -> None:
    data = body({"topic": "a"}, {"topic": ".."}, {"topic": "b"})
    answers = b"".join(batch.append_lines_each(store, [data])).splitlines()
    assert [answers[0], answers[2]] == lines(store)
    assert json.loads(answers[1])["line"] == 2


def test_fields_mean_what_they_say(store: Store) -> None:
    data = (
        b'  {"content" : "h\\u00e9", "meta" : { "a" : 1.10, "b":[ ] } ,"ttl":"time:50", '
        b'"topic":"a"} \r\n'
        b'{"topic":"a","content_base64":"AP8=","meta":null,"ttl":null,"if_last":null,"key":null}\n'
        b'{"topic":"a","content":""}'
    )
    assert summary(store, [data])["appended"] == 3
    first, second, third = lines(store)
    assert b'"meta":{"a":1.10,"b":[]},"ttl":"time:50"}' in first
    assert content(store, frame.id_of(first)) == "hé".encode()
    assert content(store, frame.id_of(second)) == b"\0\xff"
    assert second.endswith(b'"meta":null,"ttl":"forever"}') and b'"hash":null' in third


def test_a_body_that_breaks_off_keeps_its_whole_lines_and_says_how_many(store: Store) -> None:
    def blocks() -> Iterator[bytes]:
        yield body({"topic": "a"}, {"topic": ".."}, {"topic": "b"})
        yield body({"topic": "c"}) + b'{"topic":"d"'
        raise BrokenBody("gone")

    with pytest.raises(BrokenBody, match="3 whole lines"):
        batch.append_lines(store, blocks())
    assert [frame.topic_of(line) for line in lines(store)] == ["a", "b", "c"]


def test_a_line_that_is_too_long_is_an_error_of_its_own(store: Store) -> None:
    def blocks() -> Iterator[bytes]:
        yield body({"topic": "a"}) + b'{"topic":"b","content":"'
        for _ in range(batch.EVERY_LINE // (1 << 20) + 2):
            yield b"x" * (1 << 20)
        yield b'"}\n' + body({"topic": "c"})

    found = summary(store, blocks())
    assert found["appended"] == 2 and [each["line"] for each in found["errors"]] == [2]


def test_a_batch_larger_than_one_commit_is_whole(store: Store) -> None:
    count = 3 * batch.BATCH_LINES + 7
    data = b"".join([b'{"topic":"a","content":"%d"}\n' % n for n in range(count)])
    assert summary(store, [data])["appended"] == count
    found = all_ids(store)
    assert len(found) == count
    for n in (0, batch.BATCH_LINES - 1, batch.BATCH_LINES, count - 1):
        assert content(store, found[n]) == b"%d" % n


def test_errors_beyond_those_listed_are_counted(store: Store) -> None:
    found = summary(store, [b"x\n" * (batch.ERRORS_LISTED + 5)])
    assert len(found["errors"]) == batch.ERRORS_LISTED and found["errors_unlisted"] == 5


def test_an_atomic_body_is_all_or_nothing(store: Store) -> None:
    good = [{"topic": "a", "content": f"{n}" * 20_000} for n in range(1, 4)]
    for wrong in ({"topic": ".."}, {"topic": "a", "if_last": ids.text(1)}):
        with pytest.raises((Invalid, Conflict)):
            batch.append_lines(store, [body(*good, wrong)], atomic=True)
        assert lines(store) == []
    with pytest.raises(BrokenBody):
        batch.append_lines(store, breaking(body(*good)), atomic=True)
    assert lines(store) == []
    found = json.loads(batch.append_lines(store, [body(*good)], atomic=True))
    assert found["appended"] == 3 and all_ids(store)[-1] == found["last"]
    left = [name for name in os.listdir(store.cas._folder) if name.startswith("new-")]
    assert left == [] and len(list(store.cas.digests())) == 3
    assert problems(store) == []


def breaking(data: bytes) -> Iterator[bytes]:
    yield data
    raise BrokenBody("gone")


def test_an_atomic_body_has_its_limits(store: Store) -> None:
    for data in (
        [b'{"topic":"a"}\n' * (batch.ATOMIC_LINES + 1)],
        [b'{"topic":"a","meta":"' + b"x" * 1_000_000 + b'"}\n'] * 70,
    ):
        with pytest.raises(TooLarge):
            batch.append_lines(store, data, atomic=True)
    assert lines(store) == []


def test_lines_that_are_refused_leave_no_files(store: Store) -> None:
    large = "x" * (INLINE_MAX + 1)
    events = [
        {"topic": "a", "content": large, "if_last": ids.text(5)},
        {"topic": "a", "content": large, "ttl": "never"},
        {"topic": "a", "content": large, "key": "k" * 999},
        {"topic": "a", "content": large, "key": "k"},
        {"topic": "a", "content": large, "key": "k"},
    ]
    assert summary(store, [body(*events)])["appended"] == 2
    frames = [
        {"topic": "a", "id": "no", "hash": None, "content": large},
        {"topic": "a", "id": ids.text(1), "hash": None, "content": large},
        {"topic": "a", "id": ids.text(1), "hash": "sha256-" + "A" * 43 + "=", "content": large},
    ]
    found = json.loads(batch.import_lines(store, [body(*frames)]))
    assert found["imported"] == 0 and len(found["errors"]) == 3
    left = [name for name in os.listdir(store.cas._folder) if name.startswith("new-")]
    assert left == [] and len(lines(store)) == 1


def test_what_a_read_gives_can_be_imported(store: Store, store_dir: str) -> None:
    for n, data in enumerate([b"text", b"\xff\0", b"y" * 40_000]):
        coded = {"content_base64": frame_base64(data)}
        summary(store, [body({"topic": f"a.{n}", "meta": {"n": n}, **coded})])
    exported = lines(store, with_content=True, with_timestamp=True)
    other = Store(store_dir + "2", exclusive=True, create=True, clock=Clock())
    for _ in range(2):  # the same again changes nothing
        found = json.loads(batch.import_lines(other, [b"\n".join(exported)]))
        assert found["imported"] == 3 and found["errors"] == []
    assert lines(other, with_content=True, with_timestamp=True) == exported
    assert problems(other) == []
    other.close()


def frame_base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "event",
    [{"topic": "a"}, {"id": ids.text(1)}, {"topic": "a", "id": "x"},
     {"topic": "xs.pulse", "id": ids.text(1)}, {"topic": "xs.threshold", "id": ids.text(1)},
     {"topic": "a", "id": ids.text(1), "ttl": "ephemeral"},
     {"topic": "a", "id": ids.text(1), "hash": 5}, {"topic": "a", "id": ids.text(1), "key": "k"},
     {"topic": "a", "id": ids.text(1), "content": "x"}],
)  # fmt: skip
def test_what_is_no_frame_is_not_imported(store: Store, event: dict[str, Any]) -> None:
    found = json.loads(batch.import_lines(store, [body(event)]))
    assert found["imported"] == 0 and len(found["errors"]) == 1
    assert isinstance(batch.parse_imported(store, body(event)), XsError)
