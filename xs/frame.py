"""What an event is: its fields and their rules, as text and as values. Pure: no files, no clock.

The rules are those of docs/protocol.md, Frame. A frame's JSON is written once, by `encode`, and is
handed on as those bytes ever after; `Frame` is for those who want its fields.
"""

from __future__ import annotations

import binascii
import json
import re
from typing import Any, NamedTuple, Optional

from xs import ids
from xs.errors import Invalid

TOPIC_MAX = 255  # bytes
META_MAX = 1 << 20  # bytes of JSON
META_DEPTH = 128  # nested arrays and objects
KEY_MAX = 255  # bytes of an idempotency key
PATTERNS_MAX = 100  # in one comma-separated list

RUNTIME_PREFIX = "xs."
APPENDABLE_RUNTIME_TOPICS = frozenset({"xs.store.add", "xs.store.remove"})

FOREVER = "forever"
EPHEMERAL = "ephemeral"

_TOPIC = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*")
_NUMBER_MAX = 10**15  # of milliseconds or frames in a TTL: far above use, far below 64 bits


class Frame(NamedTuple):
    """One event. `meta` is the decoded JSON value; `hash` an integrity string or None.

    An integer in meta with more digits than `sys.get_int_max_str_digits()` is a `decimal.Decimal`.

    `timestamp` and `content` are there only when a read asked for them: RFC 3339 text, and str
    (UTF-8 text) or bytes.
    """

    topic: str
    id: str
    hash: Optional[str]
    meta: Any
    ttl: Optional[str]
    timestamp: Optional[str] = None
    content: Any = None

    @classmethod
    def from_json(cls, line: bytes | str) -> Frame:
        """The frame in one line of the API's answers."""
        try:
            value = json.loads(line)
        except ValueError:  # an integer longer than CPython turns into an int
            value = json.loads(line, parse_int=_long_integer)
        content = value.get("content")
        if content is None and value.get("content_base64") is not None:
            content = binascii.a2b_base64(value["content_base64"])
        return cls(
            value["topic"],
            value["id"],
            value.get("hash"),
            value.get("meta"),
            value.get("ttl"),
            value.get("timestamp"),
            content,
        )


def _long_integer(digits: str) -> Any:
    try:
        return int(digits)
    except ValueError:
        from decimal import Decimal

        return Decimal(digits)


def encode(topic: str, id_text: str, hash_: str | None, meta: str, ttl: str) -> str:
    """A frame as the JSON that is stored and sent. `meta` is JSON text ("null" for none)."""
    integrity = f'"{hash_}"' if hash_ else "null"
    return f'{{"topic":"{topic}","id":"{id_text}","hash":{integrity},"meta":{meta},"ttl":"{ttl}"}}'


_ID_KEY = b'","id":"'
_HASH_KEY = b'","hash":"'


def id_of(line: bytes) -> str:
    """The id of a frame that `encode` made, without decoding it: no topic has a quote in it."""
    start = line.index(_ID_KEY) + len(_ID_KEY)
    return line[start : start + ids.LENGTH].decode("ascii")


def topic_of(line: bytes) -> str:
    """The topic of a frame that `encode` made, without decoding it."""
    return line[10 : line.index(b'"', 10)].decode("ascii")


def hash_text(line: bytes) -> str | None:
    """The hash of a frame that `encode` made, without decoding it."""
    start = line.index(_ID_KEY) + len(_ID_KEY) + ids.LENGTH
    if not line.startswith(_HASH_KEY, start):
        return None
    start += len(_HASH_KEY)
    return line[start : line.index(b'"', start)].decode("ascii")


# Topics and patterns


def check_topic(topic: str) -> str:
    """`topic`, if it may name a stored frame. Raises `Invalid` otherwise."""
    if not topic:
        raise Invalid("the topic is empty: give one such as notes or notes.add")
    if len(topic) > TOPIC_MAX:
        raise Invalid(f"the topic is too long: at most {TOPIC_MAX} bytes")
    if not _TOPIC.fullmatch(topic):
        raise Invalid(
            f"not a topic: {topic!r}: use a-z A-Z 0-9 _ - and single dots between words, "
            "and begin with a letter or _"
        )
    return topic


def check_client_topic(topic: str) -> str:
    """`check_topic`, and not one of the runtime's own names. Raises `Invalid` otherwise."""
    if topic.startswith(RUNTIME_PREFIX) and topic not in APPENDABLE_RUNTIME_TOPICS:
        raise Invalid(f"topic {topic!r} belongs to the runtime: choose one that isn't under xs.")
    return check_topic(topic)


def prefixes(topic: str) -> list[str]:
    """The wildcards that a topic falls under, `*` apart: `a.b.c` → `["a.*", "a.b.*"]`."""
    parts = topic.split(".")
    return [".".join(parts[:n]) + ".*" for n in range(1, len(parts))]


Patterns = Optional[frozenset[str]]  # exact topics and `prefix.*`; None: every topic


def parse_patterns(text: str) -> Patterns:
    """The patterns of a comma-separated list; None when one of them is `*`."""
    names = text.split(",")
    if len(names) > PATTERNS_MAX:
        raise Invalid(f"too many topic patterns: at most {PATTERNS_MAX}")
    for name in names:
        if name == "*":
            continue
        try:
            check_topic(name[:-2] if name.endswith(".*") else name)
        except Invalid:
            raise Invalid(
                f"not a topic pattern: {name!r}: use a topic, prefix.* or *, "
                "or several of them with commas between"
            ) from None
    return None if "*" in names else frozenset(names)


def matches(patterns: Patterns, topic: str) -> bool:
    """Whether a frame of `topic` is among those that `patterns` select."""
    if patterns is None or topic in patterns:
        return True
    return "." in topic and any(prefix in patterns for prefix in prefixes(topic))


# Time to live


def parse_ttl(value: object) -> str:
    """The one spelling of a TTL that a client gave as text, a number of milliseconds, or None."""
    if value is None or value == FOREVER:
        return FOREVER
    if value == EPHEMERAL:
        return EPHEMERAL
    if isinstance(value, int) and not isinstance(value, bool):
        kind, number = "time", str(value)
    elif isinstance(value, str):
        kind, _, number = value.rpartition(":")
        kind = kind or "time"
    else:
        kind, number = "", ""
    if kind in ("time", "last") and number.isascii() and number.isdigit():
        amount = int(number[:20])
        if 1 <= amount <= _NUMBER_MAX and len(number) <= 20:
            return f"{kind}:{amount}"
    raise Invalid(
        f"not a ttl: {str(value)[:64]!r}: use forever, ephemeral, "
        "time:<milliseconds> or last:<number of frames>"
    )


def expiry(ttl: str, id_ms: int) -> int | None:
    """When a frame with that TTL and id is gone: milliseconds since 1970, or None for never."""
    return id_ms + int(ttl[5:]) if ttl.startswith("time:") else None


def kept(ttl: str) -> int | None:
    """The n of `last:n`, else None."""
    return int(ttl[5:]) if ttl.startswith("last:") else None


# Integrity strings (W3C Subresource Integrity): sha256- and standard base64 of the digest


def integrity(digest: bytes) -> str:
    """The hash string of a sha256 digest."""
    return "sha256-" + binascii.b2a_base64(digest, newline=False).decode("ascii")


_INTEGRITY = re.compile(r"sha256-[A-Za-z0-9+/]{43}=")


def parse_integrity(text: str) -> bytes:
    """The digest in a hash string. Raises `Invalid` if it is none, or not the canonical one."""
    if _INTEGRITY.fullmatch(text):
        digest = binascii.a2b_base64(text[7:])
        if integrity(digest) == text:  # the last digit of base64 has two bits to spare
            return digest
    raise Invalid(f"not a hash: {text[:80]!r}: it is sha256- and the 44 characters of base64")


# Meta


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
        raise Invalid(f"meta is not JSON: {detail[:120]}") from None
    return _compact(text, value)


def _compact(text: str, value: object) -> str:
    if "\\u" in text:
        check_surrogates(value)
    if " " in text or "\n" in text or "\t" in text or "\r" in text:
        text = _INSIGNIFICANT.sub(_significant, text)
    if len(text) > META_MAX or (not text.isascii() and len(text.encode()) > META_MAX):
        raise Invalid(f"meta is too large: at most {META_MAX} bytes of JSON")
    return text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


# Numbers are only checked: as floats they never hit CPython's limit on the digits of an integer.
_VALIDATOR = json.JSONDecoder(parse_int=float, parse_constant=_refuse_constant)
_INSIGNIFICANT = re.compile(r'("(?:[^"\\]|\\.)*")|[ \t\r\n]+')


def _significant(match: re.Match[str]) -> str:
    return match.group(1) or ""


def check_depth(text: str, most: int) -> None:
    """Raises `Invalid` if arrays and objects are nested deeper than `most` in JSON text."""
    if text.count("[") + text.count("{") <= most:
        return
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text, re.DOTALL):
        mark = token.group()
        if mark in "[{":
            depth += 1
            if depth > most:
                raise Invalid(f"meta is nested too deep: at most {META_DEPTH} levels")
        elif mark in "]}":
            depth -= 1


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


# What to read


class ReadOptions(NamedTuple):
    """Which frames a read wants, and how (docs/protocol.md, Reading).

    `after` (exclusive) and `until` (inclusive) are ids as numbers; a time has become the first or
    last id of its millisecond. `pulse` is in milliseconds.
    """

    follow: bool = False
    pulse: Optional[int] = None
    new: bool = False
    after: int = -1
    until: Optional[int] = None
    patterns: Patterns = None
    last: Optional[int] = None
    limit: Optional[int] = None
    with_timestamp: bool = False
    with_content: bool = False


PULSE_MIN = 10  # milliseconds
_READ_PARAMETERS = (
    "here one can give: follow, new, after, from, until, topic, last, limit, with-timestamp, "
    "with-content"
)
_READ_NAMES = {"tail": "new", "last-id": "after"}  # the seed's names
_COUNT_MAX = 10**15


def parse_read_options(parameters: list[tuple[str, str]], now_ms: int) -> ReadOptions:
    """The options in a query's decoded names and values. Raises `Invalid`, naming the parameter."""
    given: dict[str, str] = {}
    for raw, value in parameters:
        name = _READ_NAMES.get(raw, raw)
        if name in given:
            raise Invalid(f"{raw} is given twice")
        given[name] = value
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name == "follow":
            options["follow"], options["pulse"] = _parse_follow(value)
        elif name == "new":
            options["new"] = parse_flag(name, value)
        elif name in ("with-timestamp", "with-content"):
            options[name.replace("-", "_")] = parse_flag(name, value)
        elif name == "topic":
            options["patterns"] = parse_patterns(value)
        elif name in ("last", "limit"):
            options[name] = parse_count(name, value)
        elif name == "after":
            options["after"] = _parse_position(name, value, now_ms, end=True)
        elif name == "from":
            start = _parse_position(name, value, now_ms, end=False) - 1
            options["after"] = max(start, options.get("after", -1))
        elif name == "until":
            options["until"] = _parse_position(name, value, now_ms, end=True)
        else:
            raise Invalid(f"unknown parameter: {name[:64]!r}; {_READ_PARAMETERS}")
    if "after" in given and "from" in given:
        raise Invalid("after and from can't go together: give one of them")
    if options.get("new"):
        for name in ("after", "from", "last"):
            if name in given:
                raise Invalid(f"new and {name} can't go together: new has no history")
    return ReadOptions(**options)


def parse_flag(name: str, value: str) -> bool:
    """True for empty, 1, true or yes; false for 0, false or no."""
    if value in ("", "1", "true", "yes"):
        return True
    if value in ("0", "false", "no"):
        return False
    raise Invalid(f"{name}={value[:64]!r}: use {name} or {name}=true, or {name}=false")


def parse_count(name: str, value: str) -> int:
    """A whole number, at least 1."""
    if value.isascii() and value.isdigit() and len(value) <= 16 and 1 <= int(value) <= _COUNT_MAX:
        return int(value)
    raise Invalid(f"{name}={value[:64]!r}: use a whole number, 1 or more")


def _parse_follow(value: str) -> tuple[bool, int | None]:
    if value.isascii() and value.isdigit() and value not in ("0", "1"):
        pulse = int(value[:12])
        if PULSE_MIN <= pulse <= 10**11:
            return True, pulse
        raise Invalid(f"follow={value[:64]}: a pulse is at least {PULSE_MIN} ms")
    try:
        return parse_flag("follow", value), None
    except Invalid:
        raise Invalid(
            f"follow={value[:64]!r}: use follow=true, or a number of milliseconds for a pulse"
        ) from None


_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_AGO = re.compile(r"([0-9]{1,12})(ms|s|m|h|d|w)")
_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:([Zz])|([+-])(\d\d):(\d\d))",
    re.ASCII,
)


def _parse_position(name: str, value: str, now_ms: int, *, end: bool) -> int:
    if ids.is_id(value):
        return ids.parse(value)
    ms = parse_time(value, now_ms)
    if ms is None:
        raise Invalid(
            f"{name}={value[:64]!r}: use an id, a time such as 2026-01-31T09:30:00Z, "
            "or how long ago: 90s, 15m, 2h, 7d"
        )
    ms = min(max(ms, 0), ids.MAX_MS)
    return ids.last_of(ms) if end else ids.first_of(ms)


def parse_time(value: str, now_ms: int) -> int | None:
    """Milliseconds since 1970 of an RFC 3339 time, or of `90s`, `2h`, `7d` ago; None if neither."""
    ago = _AGO.fullmatch(value)
    if ago:
        return now_ms - int(ago[1]) * _UNITS[ago[2]]
    parts = _RFC3339.fullmatch(value)
    if not parts:
        return None
    return _rfc3339_ms(parts)


def _rfc3339_ms(parts: re.Match[str]) -> int | None:
    from datetime import datetime, timedelta, timezone

    year, month, day, hour, minute, second = (int(parts[n]) for n in range(1, 7))
    leap = second == 60
    try:
        at = datetime(year, month, day, hour, minute, 59 if leap else second, tzinfo=timezone.utc)
    except ValueError:
        return None
    if parts[9]:
        if int(parts[10]) > 23 or int(parts[11]) > 59:
            return None
        offset = timedelta(hours=int(parts[10]), minutes=int(parts[11]))
        try:
            at += -offset if parts[9] == "+" else offset
        except OverflowError:
            return None
    seconds = (at - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(seconds=1)
    fraction = int(((parts[7] or "") + "000")[:3])
    return (seconds + leap) * 1000 + fraction


def timestamp(ms: int) -> str:
    """RFC 3339 with milliseconds, UTC: `2026-01-31T09:30:00.000Z`."""
    from time import gmtime, strftime

    return strftime("%Y-%m-%dT%H:%M:%S", gmtime(ms // 1000)) + f".{ms % 1000:03d}Z"
