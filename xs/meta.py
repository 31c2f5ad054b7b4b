"""Meta: JSON that is kept as its text was given. Pure.

Meta is validated, and insignificant white space is taken out; nothing is ever re-encoded, so key
order, `1.10`, integers of any size and escapes stay as they are (docs/protocol.md, Frame).
"""

from __future__ import annotations

import json
import re

from xs.errors import Invalid

META_MAX = 1 << 20  # bytes of JSON
META_DEPTH = 128  # nested arrays and objects


def compact_meta(text: str) -> str:
    """JSON text as it was given, less insignificant white space; validated, never re-encoded.

    Keeps key order, `1.10`, integers of any size and escapes as they are. Raises `Invalid` for what
    is not JSON, NaN and Infinity, a lone surrogate, nesting over META_DEPTH and text over META_MAX.
    """
    check_depth(text, META_DEPTH)
    try:
        value = _VALIDATOR.decode(text)
    except (ValueError, RecursionError) as error:
        detail = str(error).split(": line", 1)[0]
        raise Invalid(f'meta is not JSON: {detail[:120]} (a text has quotes: "hello")') from None
    return _compact(text, value)


def as_meta(value: object) -> str:
    """A value as meta. Raises `Invalid`."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        text.encode()
    except (TypeError, ValueError):  # an integer of thousands of digits, a lone surrogate
        raise Invalid("it has a value that JSON can't have here") from None
    return compact_meta(text)


def of_field(value: str) -> str:
    """Meta as a header gives it: JSON as it is, or base64 of JSON in UTF-8, tried in that order."""
    import binascii

    try:
        return compact_meta(value.encode("latin-1").decode())
    except UnicodeDecodeError:
        raise Invalid("xs-meta is not UTF-8: send base64 of the JSON instead") from None
    except Invalid as error:
        try:
            text = binascii.a2b_base64(value.encode("latin-1")).decode()
            if not text or binascii.b2a_base64(text.encode()).strip() != value.encode().strip():
                raise error
        except ValueError:
            raise error from None
        return compact_meta(text)


def _compact(text: str, value: object) -> str:
    if "\\u" in text:
        check_surrogates(value)
    if " " in text or "\n" in text or "\t" in text or "\r" in text:
        text = _INSIGNIFICANT.sub(_significant, text)
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:  # an argument with other bytes
        raise Invalid("meta is not UTF-8, as JSON has to be") from None
    if size > META_MAX:
        raise Invalid(f"meta is too large: at most {META_MAX} bytes of JSON")
    return text


def refuse_constant(name: str) -> None:
    """For `parse_constant` of JSON that is to be JSON: NaN and Infinity are not."""
    raise ValueError(f"{name} is not a JSON value")


# Numbers are only checked: as floats they never hit CPython's limit on the digits of an integer.
_VALIDATOR = json.JSONDecoder(parse_int=float, parse_constant=refuse_constant)
_INSIGNIFICANT = re.compile(r'("(?:[^"\\]|\\.)*")|[ \t\r\n]+')


def _significant(match: re.Match[str]) -> str:
    return match.group(1) or ""


def check_depth(text: str, most: int) -> None:
    """Raises `Invalid` if arrays and objects are nested deeper than `most` in JSON text.

    What is parsed in a thread needs this before: CPython 3.13 goes 10,000 levels deep, for which a
    thread's stack has no room.
    """
    if text.count("[") + text.count("{") <= most:
        return
    brackets = _NO_BRACKET.sub("", text)
    for _ in range(most):
        if not brackets:
            return
        brackets = brackets.replace("[]", "").replace("{}", "")
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text, re.DOTALL):
        mark = token.group()
        if mark in "[{":
            depth += 1
            if depth > most:
                raise Invalid(f"meta is nested too deep: at most {META_DEPTH} levels")
        elif mark in "]}":
            depth -= 1


_NO_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[^\[\]{}"]+|"', re.DOTALL)


def meta_in(text: str) -> str:
    """The meta, as `compact_meta` gives it, of a valid JSON object that has one.

    Raises `Invalid` for what JSON allows and meta does not.
    """
    if text.count('"meta"') == 1 and "\\u" not in text:
        # A quote inside a string is escaped, and so is no letter: this is the name itself.
        start = _skip_blanks(text, _skip_blanks(text, text.index('"meta"') + 6) + 1)
        value, end = _VALIDATOR.raw_decode(text, start)
        found = text[start:end]
    else:
        found = _member_text(text, "meta")
        value = _VALIDATOR.decode(found)
    check_depth(found, META_DEPTH)
    return _compact(found, value)


def _member_text(text: str, name: str) -> str:
    """The text of one member's value; of the last, if several have that name."""
    found = ""
    at = text.index("{") + 1
    while True:
        at = _skip_blanks(text, at)
        key, at = _VALIDATOR.raw_decode(text, at)
        at = _skip_blanks(text, at) + 1  # the colon
        start = _skip_blanks(text, at)
        _, at = _VALIDATOR.raw_decode(text, start)
        if key == name:
            found = text[start:at]
        at = _skip_blanks(text, at)
        if text[at] == "}":
            return found
        at += 1  # the comma


_BLANKS = re.compile(r"[ \t\r\n]*")


def _skip_blanks(text: str, at: int) -> int:
    if text[at] not in " \t\r\n":
        return at
    match = _BLANKS.match(text, at)
    return match.end() if match else at


def check_surrogates(value: object) -> None:
    """Raises `Invalid` if a decoded JSON value has an escape that is half a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Invalid(
            "half of a surrogate pair in a string: both halves make one character"
        ) from None
