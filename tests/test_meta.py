"""Meta: any JSON, kept to the letter."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xs.errors import Invalid
from xs.meta import META_MAX, compact_meta, meta_in


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
_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_STRINGS = st.one_of(
    _TEXT.map(lambda text: json.dumps(text, ensure_ascii=False)),
    _TEXT.map(json.dumps),
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
    assert compact_meta(blanks(text, random.Random(seed))) == text


@given(_JSON, st.integers(), st.text(max_size=20))
@settings(max_examples=200)
def test_the_meta_of_a_line_is_found_to_the_letter(text: str, seed: int, content: str) -> None:
    content = content.encode("utf-8", "ignore").decode()
    before = f'{{"topic":"meta","content":{json.dumps(content)},'
    for name in ('"meta"', '"m\\u0065ta"'):
        line = blanks(f"{before}{name}:{text}}}", random.Random(seed))
        assert meta_in(line) == text


@pytest.mark.parametrize(
    "line",
    [
        '{"topic":"a","m\\u0065ta":{"meta":5},"x":"\\"meta\\""}',
        '{"m\\u0065ta":{"meta":5},"topic":"meta"}',
        '{"meta":1,"topic":"meta","meta":{"meta":5}}',
    ],
)
def test_the_meta_of_a_line_is_its_own_last_member_of_that_name(line: str) -> None:
    assert meta_in(line) == '{"meta":5}'


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
        compact_meta(text)
        taken = True
    except Invalid:
        taken = False
    assert taken == allowed


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "nul", "NaN", "[Infinity]", "-Infinity", "01", "1.", ".5", "+1", "'a'", "[1,]",
     '{"a":1,}', '{a:1}', '"\t"', '"\\x"', '"\\ud800"', '["\\udc00\\ud800"]', "\ufeff1", "1 2",
     "[" * 129 + "]" * 129, '{"a":' * 129 + "1" + "}" * 129, "[" * 100_000],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_what_is_no_meta_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        compact_meta(text)


def test_meta_has_its_bounds() -> None:
    assert compact_meta("[" * 128 + "]" * 128)
    deep = '"' + "[{" * 1000 + '"'
    assert compact_meta(deep) == deep
    assert compact_meta('"' + "x" * (META_MAX - 2) + '"')
    for text in ('"' + "x" * (META_MAX - 1) + '"', '"' + "é" * (META_MAX // 2) + '"'):
        with pytest.raises(Invalid, match="too large"):
            compact_meta(text)
