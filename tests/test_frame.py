"""What an event is: its JSON, its topics and patterns, its time to live, its hash."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xs import frame, ids
from xs.errors import Invalid
from xs.frame import Frame


def test_a_line_gives_its_fields_without_being_decoded() -> None:
    id_text = ids.text(12345)
    hash_ = frame.integrity(b"x" * 32)
    for given_hash in (None, hash_):
        meta = '{"id":"no","hash":"no","topic":"no"}'
        line = frame.encode("a.b", id_text, given_hash, meta, "forever").encode()
        assert list(json.loads(line)) == ["topic", "id", "hash", "meta", "ttl"]
        assert frame.id_of(line) == id_text
        assert frame.topic_of(line) == "a.b"
        assert frame.hash_text(line) == given_hash
        expected = Frame("a.b", id_text, given_hash, json.loads(meta), "forever")
        assert Frame.from_json(line) == expected


def test_an_integer_of_any_size_is_read_by_the_api() -> None:
    line = frame.encode("a", ids.text(1), None, "[" + "7" * 10_000 + ",5]", "forever")
    (large, small) = Frame.from_json(line).meta
    assert small == 5 and f"{large:f}" == "7" * 10_000


@pytest.mark.parametrize(
    "topic", ["a", "_", "A9", "a-b", "a.b", "a.9", "_.-", "xs", "a" * 255, "a._-.b"]
)
def test_a_topic_is_taken(topic: str) -> None:
    assert frame.check_topic(topic) == topic


@pytest.mark.parametrize(
    "topic",
    ["", "9a", "-a", ".a", "a.", "a..b", "a b", "a/b", "é", "a\n", "a" * 256, "*", "a.*", "a,b",
     "a\0", "ａ"],
)  # fmt: skip
def test_what_is_no_topic_is_refused(topic: str) -> None:
    with pytest.raises(Invalid):
        frame.check_topic(topic)


def test_the_runtimes_topics_are_its_own() -> None:
    for topic in ("xs.start", "xs.pulse", "xs.threshold", "xs.store", "xs.store.add.x", "xs.a"):
        with pytest.raises(Invalid):
            frame.check_client_topic(topic)
    for topic in ("xs.store.add", "xs.store.remove", "xs", "xsa.b"):
        assert frame.check_client_topic(topic) == topic


_WORD = st.sampled_from(["a", "b", "c9"])
_TOPICS = st.lists(_WORD, min_size=1, max_size=4).map(".".join)
_PATTERNS = st.one_of(_TOPICS, _TOPICS.map(lambda t: t + ".*"), st.just("*"))


@given(st.lists(_PATTERNS, min_size=1, max_size=3), _TOPICS)
def test_patterns_select_what_they_say(patterns: list[str], topic: str) -> None:
    def naive(pattern: str) -> bool:
        return pattern in ("*", topic) or (
            pattern.endswith(".*") and topic.startswith(pattern[:-1])
        )

    parsed = frame.parse_patterns(",".join(patterns))
    assert frame.matches(parsed, topic) == any(map(naive, patterns))


@pytest.mark.parametrize("text", ["", "a,", ",", "*.a", "a.*.b", "a*", "**", "a.**", ".*", "a, b"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        frame.parse_patterns(text)


@pytest.mark.parametrize(
    ("value", "ttl"),
    [(None, "forever"), ("forever", "forever"), ("ephemeral", "ephemeral"), (5, "time:5"),
     ("5", "time:5"), ("time:0005", "time:5"), ("last:1", "last:1"), ("last:007", "last:7")],
)  # fmt: skip
def test_a_ttl_has_one_spelling(value: object, ttl: str) -> None:
    assert frame.parse_ttl(value) == ttl


@pytest.mark.parametrize(
    "value",
    ["", "0", 0, -1, "-1", "time:", "time:0", "last:0", "last:", "last:-1", "time:1.5", 1.5, True,
     "forever ", "Forever", "time:1e3", "last:" + "9" * 30, 10**30, "time:٣", [], "x:1", ":5:5"],
)  # fmt: skip
def test_what_is_no_ttl_is_refused(value: object) -> None:
    with pytest.raises(Invalid):
        frame.parse_ttl(value)


@given(st.binary(min_size=32, max_size=32))
def test_the_first_hash_of_a_process_is_written_as_all_others(digest: bytes) -> None:
    frame._base64 = frame._first_base64
    first, second, third = (frame.integrity(digest) for _ in range(3))
    assert first == second == third == "sha256-" + base64.b64encode(digest).decode()


def test_a_hash_has_one_spelling() -> None:
    digest = bytes(range(32))
    text = frame.integrity(digest)
    assert frame.parse_integrity(text) == digest
    # The last digit's two spare bits, other algorithms, other alphabets.
    wrong_ones = [text[:-2] + "9=", text[7:], "sha512-" + text[7:], text + "=", text[:-1]]
    for wrong in [*wrong_ones, text + " ", "sha256-" + "?" * 43 + "=", "sha256-" + "_" * 43 + "="]:
        with pytest.raises(Invalid):
            frame.parse_integrity(wrong)
