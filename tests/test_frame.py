"""What an event is: its JSON, its topics and patterns, its meta to the letter, its options."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xs import frame, ids, meta, query, times
from xs.errors import Invalid
from xs.frame import Frame

NOW = 1_700_000_000_000


def blanks(text: str, chance: random.Random) -> str:
    """JSON text with white space put where it means nothing."""
    found, inside, escaped = [], False, False
    for letter in text:
        if not inside and letter in '{}[],:"' and chance.random() < 0.5:
            found.append(chance.choice([" ", "\n", "\t", "\r", "  \n"]))
        found.append(letter)
        if inside and not escaped and letter == '"':
            inside = False
        elif not inside and letter == '"':
            inside = True
            escaped = False
            continue
        escaped = inside and letter == "\\" and not escaped
    return "".join(found)


_NUMBERS = st.sampled_from(
    ["0", "-0", "1.10", "1e5", "1E+05", "-1.0e-10", "1e999", "9" * 5000, "-" + "8" * 30, "0.1000"]
)
_STRINGS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])).map(lambda s: json.dumps(s, ensure_ascii=False)),
    st.text(st.characters(exclude_categories=["Cs"])).map(json.dumps),
    st.sampled_from(['"\\u00e9\\/ \\"  \\\\"', '"\\ud83d\\ude00"', '"[{ }]"', '"\\\\\\" : , "']),
)
_JSON = st.recursive(
    st.one_of(_NUMBERS, _STRINGS, st.sampled_from(["true", "false", "null"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: "[" + ",".join(items) + "]"),
        st.lists(st.tuples(_STRINGS, inner), max_size=4).map(
            lambda items: "{" + ",".join(f"{name}:{value}" for name, value in items) + "}"
        ),
    ),
    max_leaves=12,
)


@given(_JSON, st.integers())
def test_meta_is_kept_to_the_letter_less_insignificant_blanks(text: str, seed: int) -> None:
    assert meta.compact_meta(blanks(text, random.Random(seed))) == text


@given(_JSON, st.integers(), st.text(max_size=20))
@settings(max_examples=200)
def test_the_meta_of_a_line_is_found_to_the_letter(text: str, seed: int, content: str) -> None:
    content = content.encode("utf-8", "ignore").decode()
    before = f'{{"topic":"meta","content":{json.dumps(content)},'
    for name in ('"meta"', '"m\\u0065ta"'):
        line = blanks(f"{before}{name}:{text}}}", random.Random(seed))
        assert meta.meta_in(line) == text


@pytest.mark.parametrize(
    "line",
    [
        '{"topic":"a","m\\u0065ta":{"meta":5},"x":"\\"meta\\""}',
        '{"m\\u0065ta":{"meta":5},"topic":"meta"}',
        '{"meta":1,"topic":"meta","meta":{"meta":5}}',
    ],
)
def test_the_meta_of_a_line_is_its_own_last_member_of_that_name(line: str) -> None:
    assert meta.meta_in(line) == '{"meta":5}'


@given(st.text(max_size=30))
def test_what_is_meta_is_what_json_allows(text: str) -> None:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text.lstrip("\ufeff") if text[:1] != "\ufeff" else "", parse_constant=refuse)
        allowed = True
    except ValueError:
        allowed = False
    try:
        meta.compact_meta(text)
        taken = True
    except Invalid:
        taken = False
    assert taken == allowed


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "nul", "NaN", "[Infinity]", "-Infinity", "01", "1.", ".5", "+1", "'a'", "[1,]",
     '{"a":1,}', '{a:1}', '"\t"', '"\\x"', '"\\ud800"', '["\\udc00\\ud800"]', "\ufeff1", "1 2",
     "[" * 129 + "]" * 129, '{"a":' * 129 + "1" + "}" * 129, "[" * 100_000],
)  # fmt: skip
def test_what_is_no_meta_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        meta.compact_meta(text)


def test_meta_has_its_bounds() -> None:
    assert meta.compact_meta("[" * 128 + "]" * 128)
    deep = '"' + "[{" * 1000 + '"'
    assert meta.compact_meta(deep) == deep
    assert meta.compact_meta('"' + "x" * (meta.META_MAX - 2) + '"')
    for text in ('"' + "x" * (meta.META_MAX - 1) + '"', '"' + "é" * (meta.META_MAX // 2) + '"'):
        with pytest.raises(Invalid, match="too large"):
            meta.compact_meta(text)


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
        assert Frame.from_json(line) == Frame("a.b", id_text, given_hash, json.loads(meta), "forever")


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


def test_a_hash_has_one_spelling() -> None:
    digest = bytes(range(32))
    text = frame.integrity(digest)
    assert frame.parse_integrity(text) == digest
    # The last digit's two spare bits, other algorithms, other alphabets.
    for wrong in (text[:-2] + "9=", text[7:], "sha512-" + text[7:], text + "=", text[:-1],
                  text.replace("+", "-").replace("/", "_") + " ", "sha256-" + "?" * 43 + "="):  # fmt: skip
        with pytest.raises(Invalid):
            frame.parse_integrity(wrong)


def options(text: str) -> query.ReadOptions:
    pairs = [tuple(part.partition("=")[::2]) for part in text.split("&") if part]
    return query.parse_read_options(pairs, NOW)  # type: ignore[arg-type]


ID = ids.text(ids.first_of(NOW) + 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("follow", {"follow": True}),
        ("follow=1", {"follow": True}),
        ("follow=true", {"follow": True}),
        ("follow=no", {}),
        ("follow=250", {"follow": True, "pulse": 250}),
        ("tail&follow", {"new": True, "follow": True}),
        (f"last-id={ID}", {"after": ids.parse(ID)}),
        (f"after={ID.upper()}", {"after": ids.parse(ID)}),
        (f"from={ID}&until={ID}", {"after": ids.parse(ID) - 1, "until": ids.parse(ID)}),
        ("from=2h", {"after": ids.first_of(NOW - 7_200_000) - 1}),
        ("after=90s", {"after": ids.last_of(NOW - 90_000)}),
        ("until=2023-11-14T22:13:20Z", {"until": ids.last_of(NOW)}),
        ("until=2023-11-15T00:13:20.0009+02:00", {"until": ids.last_of(NOW)}),
        ("topic=a,b.*", {"patterns": frozenset({"a", "b.*"})}),
        ("topic=a,*", {}),
        ("last=3&limit=2", {"last": 3, "limit": 2}),
        ("with-timestamp&with-content=1", {"with_timestamp": True, "with_content": True}),
    ],
)
def test_read_options_mean(text: str, expected: dict[str, Any]) -> None:
    assert options(text) == query.ReadOptions(**expected)


@pytest.mark.parametrize(
    "text",
    ["follow=9", "follow=maybe", "limit=0", "limit=-1", "limit=x", "last=", "last=1.0", "after=",
     "after=yesterday", "from=2023-13-01T00:00:00Z", "until=5", "new&after=1s", "new&from=1s",
     "new&last=1", f"after={ID}&from={ID}", "topic=", "unknown=1", "limit=1&limit=2",
     f"after={ID}&last-id={ID}", "new&tail", "after=" + "z" * 25, "with-content=perhaps"],
)  # fmt: skip
def test_wrong_read_options_are_refused(text: str) -> None:
    with pytest.raises(Invalid):
        options(text)


@given(st.integers(0, 253_402_300_799_999))
def test_a_timestamp_can_be_given_back_as_a_time(ms: int) -> None:
    assert times.parse_time(times.timestamp(ms), NOW) == ms
