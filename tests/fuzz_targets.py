"""What is fuzzed: for each parser of what strangers send, a check that takes any bytes.

A check returns for what is right and what is refused alike, and raises for whatever breaks a
promise. `tools/fuzz` drives them by coverage (bench/_fuzz.py), test_fuzz.py by `mutated` alone.
This module imports nothing that the coverage is not wanted of before `xs`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import http1_corpus as corpus
from http1_judges import compare, one_by_one, read_all, read_response

from xs import frame, ids, meta, query
from xs.errors import Invalid

NOW_MS = 1_700_000_000_000
ID = "03hbg7yoysb3ybapr2b7lf4ms"
HASH = frame.integrity(bytes(range(32)))


class Target(NamedTuple):
    """One parser: what must hold of any bytes, and where to begin."""

    check: Callable[[bytes], None]
    seeds: list[bytes]
    tokens: list[bytes]


# HTTP


def check_request(data: bytes) -> None:
    """Only refused or read; the same however it is cut; what h11 refuses is refused."""
    whole = read_all([data])
    if len(data) <= 300:
        assert read_all(one_by_one(data)) == whole
    at = len(data) // 2
    assert read_all([data[:at], data[at:]]) == whole
    if data:  # for h11 nothing at all is the connection's end
        compare(data)


def check_response(data: bytes) -> None:
    whole = read_response([data])
    if len(data) <= 300:
        assert read_response(one_by_one(data)) == whole


# Frames


def refusal(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it gives, or None if it refuses; any other exception is a finding."""
    try:
        return function(*arguments)
    except Invalid as error:
        sentence = str(error)
        assert sentence and "\n" not in sentence and len(sentence) < 1500, sentence
        return None


def check_frame(data: bytes) -> None:
    """Topics, patterns, TTLs, hashes: refused, or of the one form that is promised."""
    text = data.decode("utf-8", "surrogateescape")
    topic = refusal(frame.check_topic, text)
    patterns = refusal(frame.parse_patterns, text)
    ttl = refusal(frame.parse_ttl, text)
    digest = refusal(frame.parse_integrity, text)
    refusal(frame.check_client_topic, text)
    if topic is not None:
        assert topic == text and topic.isascii() and len(topic) <= frame.TOPIC_MAX
        assert all(frame.matches(frozenset((each,)), topic) for each in frame.prefixes(topic))
    if patterns:
        assert len(patterns) <= frame.PATTERNS_MAX and all(map(str.isascii, patterns))
    if ttl is not None:
        assert frame.parse_ttl(ttl) == ttl and ttl.isascii()
        assert frame.expiry(ttl, 0) is None or frame.expiry(ttl, 0) < 1 << 62
    if digest is not None:
        assert frame.integrity(digest) == text and len(digest) == 32
    line = frame.encode(topic or "t", ID, HASH if digest else None, "null", ttl or "forever")
    encoded = line.encode()
    assert frame.topic_of(encoded) == (topic or "t") and frame.id_of(encoded) == ID
    assert frame.ttl_of(encoded) == (ttl or "forever")
    assert frame.hash_text(encoded) == (HASH if digest else None)
    assert list(json.loads(line)) == ["topic", "id", "hash", "meta", "ttl"]


def strictly(text: str) -> Any:
    """The value of JSON as RFC 8259 has it: no NaN; an integer of any size."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_int=float, parse_constant=refuse)


def check_meta(data: bytes) -> None:
    """Meta is refused, or is the same value in the same spelling, and stays as it is."""
    text = data.decode("utf-8", "replace")
    compact = refusal(meta.compact_meta, text)
    try:
        value = strictly(text)
    except (ValueError, RecursionError):
        assert compact is None, "what is not JSON was accepted"
        return
    assert repr(strictly(f'{{"meta":{text}}}')["meta"]) == repr(value)
    inner = refusal(meta.meta_in, f'{{"topic":"t","meta":{text},"ttl":null}}')
    assert inner == compact, "in a line it is another one"
    if compact is None:
        return
    assert repr(strictly(compact)) == repr(value) and meta.compact_meta(compact) == compact
    assert "\n" not in compact and len(compact.encode()) <= meta.META_MAX
    line = frame.encode("t", ID, None, compact, "forever").encode()
    assert b"\n" not in line and frame.hash_text(line) is None and frame.ttl_of(line) == "forever"
    frame.Frame.from_json(line)
    frame.begins_run(line)
    found = frame.continuation_in(compact)
    if found is not None:
        assert ids.is_id(found.first) and found.first == found.first.lower()


def check_query(data: bytes) -> None:
    """The parameters of a read: refused, or options within their bounds."""
    pairs = parse_qsl(data.decode("latin-1"), keep_blank_values=True)
    options = refusal(query.parse_read_options, pairs, NOW_MS)
    if options is None:
        return
    assert options.pulse is None or options.pulse >= query.PULSE_MIN
    for count in (options.last, options.limit):
        assert count is None or 1 <= count <= 10**15
    for position in (options.after, options.until):
        assert position is None or -1 <= position < 1 << 128
    assert options.patterns is None or len(options.patterns) <= frame.PATTERNS_MAX


def _texts(*texts: str) -> list[bytes]:
    return [text.encode() for text in texts]


# Bytes that mean something to each parser.
_HTTP = _texts(
    "\r\n", "\r\n\r\n", "\n", "\r", "\0", " ", "\t", ": ", "HTTP/1.1 ", "HTTP/1.0", "%41"
)
_HTTP += _texts("Host: a\r\n", "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n", "101 ")
_HTTP += _texts("0\r\n\r\n", "5\r\nhello\r\n", ";a=b", "Expect: 100-continue\r\n", "http://a/")
_HTTP += _texts("Connection: close\r\n", "ffffffffffffffff", "\x0b", "100 ", "204 ", "chunked")
_HTTP += [b"\xa0", b"\x85"]
_FRAME = _texts(".", "..", "*", ",", ".*", ":", "time:", "last:", "sha256-", "=", "xs.", "0", "-")
_FRAME += _texts("9" * 20, "\u0661", "\u00b2", "\n", "\0", "_")
_META = _texts("[", "]", "{", "}", '"', '\\"', "\\", "\\ud800", "\\udc00", "\\u0022", "NaN", "-")
_META += _texts("Infinity", ":", ",", '"meta":', '"\\u006deta":', " ", "\t", "\n", '"more":true')
_META += _texts('"chunk":', "\u2028", "\ufeff", "\x0c", "[" * 129, "1e5")


_REQUESTS = [
    data
    for data in (*corpus.ACCEPTED.values(), *(data for _, data in corpus.REFUSED.values()))
    if len(data) < 2000
]

TARGETS = {
    "request": Target(
        check_request,
        _REQUESTS,
        _HTTP,
    ),
    "response": Target(
        check_response,
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\na: b\r\n\r\n",
            b"HTTP/1.0 404 \r\nConnection: close\r\n\r\nno such frame\n",
        ],
        _HTTP,
    ),
    "frame": Target(
        check_frame,
        _texts("notes", "notes.add", "a.b.c", "a.*,b", "*", "xs.pulse", "time:1000", "last:1")
        + _texts("forever", "ephemeral", "1000", HASH, "_a-b.c_d", "a" * 255, ",".join("a" * 100)),
        _FRAME,
    ),
    "meta": Target(
        check_meta,
        _texts('{"a": [1, 2.50, {"b": null}]}', '"text"', "1e400", "-0", "123456789" * 50, "[]")
        + _texts('{"meta": {"meta": 1}}', '{"chunk":"' + ID + '","more":true}', '"\\ud83d\\ude00"')
        + _texts('{"more":true,"error":"x"}', "[" * 40 + "]" * 40, '{"a":1,"a":2}', ' "\\u0000" '),
        _META,
    ),
    "query": Target(
        check_query,
        _texts("follow=true&topic=a.*&limit=5", "last=3&with-content&no-chunks", "from=90s")
        + _texts(f"after={ID}&until=2026-01-31T09:30:00.123Z", "new&follow=500", "tail=1")
        + _texts("from=2026-01-31T09:30:60%2B23:59", "last-id=7d", "until=0001-01-01T00:00:00Z"),
        _texts("&", "=", "follow", "new", "after=", "from=", "until=", "topic=", "last=", "limit=")
        + _texts("with-timestamp", "%2B", "9999-12-31T23:59:59Z", "0000", "T", ":60", "Z", "99999")
        + _texts("s", "d", "h", "%D9%A1", "%C2%B2", "false", "no", "0", "1", "9" * 5000),
    ),
}


def mutated(target: Target, seed: int, count: int, most: int = 4000) -> Iterator[bytes]:
    """`count` inputs made of the seeds by chance: the same ones for the same `seed`."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(target.seeds))
        for _ in range(chance.choice((1, 1, 2, 3, 5, 8))):
            at = chance.randrange(len(data) + 1)
            end = min(len(data), at + chance.choice((0, 1, 1, 2, 4, 16)))
            kind = chance.randrange(6)
            if kind == 0:  # a byte that means something, or any
                data[at:end] = bytes([chance.randrange(256)])
            elif kind in (1, 2):
                data[at:end] = chance.choice(target.tokens)
            elif kind == 3:  # once more, elsewhere
                data[at:at] = data[chance.randrange(len(data) + 1) :][: chance.randrange(1, 40)]
            elif kind == 4:
                del data[at:end]
            else:  # the end of another
                other = chance.choice(target.seeds)
                data[at:] = other[chance.randrange(len(other) + 1) :]
        yield bytes(data[:most])
