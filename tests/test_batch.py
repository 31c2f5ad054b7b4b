"""Many events in one body: lines, however they are cut into blocks, and each judged by itself."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from conftest import DEADLINE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import Clock, all_ids, content, lines, problems

from xs import alike, batch, frame, ids
from xs.bulk import BatchWork
from xs.commit import Append
from xs.content import INLINE_MAX
from xs.errors import BrokenBody, Conflict, Forbidden, Invalid, TooLarge, XsError
from xs.store import Store
from xs.work import RemoveWork
from xs.writer import BUCKET_FRAMES


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
        deadline = time.monotonic() + DEADLINE
        while len(all_ids(store)) < 2:
            assert time.monotonic() < deadline, "what has come was not stored"
            store.bus.wait(0, 0.1)
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


BEGINNINGS = [
    '{"topic":"a","content":"', '{"topic": "a.b", "content": "', '{"content":"',
    '{"meta":{"ü":[1]},"topic":"a","content":"', '{"topic":"a","content":5,"content":"',
    '{"topic":"a b","content":"', '{"topic":"xs.start","content":"', '["topic","content":"',
    '{"topic":"a","ttl":"last:3","content":"', '{"topic":"a","content_base64":"","content":"',
    '{"topic":"a","meta":"\\"content":"', '{"topic":"a","meta":"\\"content\\":\\"',
    '{"topic":"a","meta":{"content":"',
    '{"topic":"a","meta":{"chunk":"03a","more":true},"content":"',
]  # fmt: skip
ENDS = [
    '"}', '\\\\"}', '\\"\\u00e9\\n"}', 'é"}', '"} ', '"}\r', '" }', '","meta":5}',
    '","meta":{"a":[]}}', '","ttl":"last:1"}', '","ttl":"time:99999999"}', '","key":"k"}',
    '","topic":"other"}', '","content":"again"}', '","content":5}', '","unknown":1}', '"}}',
    '"},', '"', '\\"}', '\\', '\\x"}', '\t"}', '\\ud800"}', '\\ud83d\\ude00"}',
    '"} {"topic":"a","content":"x"}', '","if_last":"none"}',
]  # fmt: skip


@given(
    st.lists(
        st.tuples(st.sampled_from(BEGINNINGS), st.integers(1, 90), st.sampled_from(ENDS)),
        min_size=1,
        max_size=6,
    ),
    st.binary(max_size=3),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_that_begin_alike_mean_what_each_means_alone(
    store: Store, parts: list[tuple[str, int, str]], raw: bytes
) -> None:
    texts = [
        text.replace(b"\n", b"")
        for beginning, count, end in parts
        for text in (
            *[b'%b%d"}' % (beginning.encode(), n) for n in range(count)],
            beginning.encode() + raw + end.encode(),
        )
    ]
    together = batch.parse_appends(store, texts)
    alone = [each for text in texts for each in batch.parse_appends(store, [text])]
    assert [*map(meaning, BatchWork(together).each())] == [*map(meaning, BatchWork(alone).each())]


def meaning(found: Append | XsError) -> tuple[Any, ...]:
    if isinstance(found, XsError):
        return (str(found),)
    return (
        found.content and (found.content.data, found.content.digest),
        *found._replace(content=None),
    )


@pytest.mark.parametrize("cut_into", [1, 7])
def test_many_lines_that_differ_in_their_content_alone(store: Store, cut_into: int) -> None:
    count = 2 * BUCKET_FRAMES + 100
    contents = [f"é{n}" * (n % 50 + 1) for n in range(count)]
    large = {"x": "y" * 5000}
    events = [
        *({"topic": "a.b.c", "content": each} for each in contents),
        *({"topic": "a.b", "meta": large, "content": each} for each in contents[:200]),
        *({"topic": "plain", "content": each} for each in contents[:100]),
        *({"topic": "even", "content": f"{n:05d}"} for n in range(alike.ROWS + 100)),
    ]
    data = body(*events)
    size = len(data) // cut_into + 1
    blocks = [data[at : at + size] for at in range(0, len(data), size)]
    assert summary(store, blocks)["appended"] == len(events)
    found = [json.loads(each) for each in lines(store, with_content=True)]
    assert [
        {key: each[key] for key in ("topic", "meta", "content") if each[key] is not None}
        for each in found
    ] == events
    assert problems(store) == []
    assert len(all_ids(store, topic="a.*")) == count + 200
    assert len(all_ids(store, topic="a.b.*")) == count
    for n in (0, BUCKET_FRAMES, count - 1):
        assert b"".join(store.content(found[n]["hash"])[1]) == contents[n].encode()
    store.run(RemoveWork(ids.parse(found[5]["id"])))
    assert problems(store) == []


def test_lines_alike_are_appended_after_others_that_were_undone(store: Store) -> None:
    data = body(*({"topic": "a", "content": str(n)} for n in range(100)))
    undone = body({"topic": "b", "content": "x", "if_last": ids.text(1)})
    with pytest.raises(Conflict):
        batch.append_lines(store, [data + undone], atomic=True)
    assert lines(store) == []
    assert summary(store, [data])["appended"] == 100
    assert problems(store) == []
    assert [json.loads(each)["content"] for each in lines(store, with_content=True)] == [
        str(n) for n in range(100)
    ]


def test_what_a_line_asks_to_be_trimmed_is_trimmed_before_lines_alike(store: Store) -> None:
    data = body(
        *[{"topic": "a", "content": str(n), "ttl": "last:1"} for n in range(3)],
        *[{"topic": "a", "content": str(n)} for n in range(100)],
    )
    assert summary(store, [data])["appended"] == 103
    assert len(lines(store)) == 101


def test_lines_alike_are_refused_like_any_where_nothing_may_be_appended(store: Store) -> None:
    def may(topic: str, ttl: str) -> None:
        if topic != "mine":
            raise Forbidden(f"not {topic}")

    events = [{"topic": topic, "content": "x"} for topic in ("mine", "other") for _ in range(100)]
    found = json.loads(batch.append_lines(store, [body(*events)], may))
    assert found["appended"] == 100
    assert [each["line"] for each in found["errors"]] == [*range(101, 201)]


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
