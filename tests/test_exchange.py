"""An HTTP exchange as frames: what a request's meta has, and what of an answer's is legal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xs import http1
from xs.exchange import NotHttp, framed, part_of, request_meta, response_of

NOON = 1_700_000_000.0
DATE = "Tue, 14 Nov 2023 22:13:20 GMT"


def head_of(data: bytes) -> http1.RequestHead:
    head = http1.read_request_head(bytearray(data))
    assert head is not None
    return head


def get(
    target: str = "/", *fields: str, method: str = "GET", version: str = "1.1"
) -> http1.RequestHead:
    lines = [f"{method} {target} HTTP/{version}", "Host: a.example", *fields, "", ""]
    return head_of("\r\n".join(lines).encode("utf-8"))


def meta_of(head: http1.RequestHead) -> dict[str, Any]:
    text = request_meta("r1", head, None)
    assert "\n" not in text
    found: dict[str, Any] = json.loads(text)
    return found


# Requests


def test_a_request_s_meta_has_these_keys_in_this_order() -> None:
    head = get("/a%20b/c?x=1&y=2", "Accept: */*", "Cookie: a=b")
    assert request_meta("r1", head, "192.0.2.1") == (
        '{"request_id":"r1","method":"GET","path":"/a%20b/c","query":{"x":"1","y":"2"},'
        '"headers":{"host":"a.example","accept":"*/*","cookie":"a=b"},'
        '"proto":"HTTP/1.1","remote_ip":"192.0.2.1"}'
    )


def test_what_comes_once_is_a_string_and_what_repeats_is_a_list_in_order() -> None:
    meta = meta_of(get("/?b=1&a=2&b=3&b=", "X-A: 1", "X-B: 2", "x-a: 3", "X-A:"))
    assert meta["query"] == {"b": ["1", "3", ""], "a": "2"}
    assert meta["headers"] == {"host": "a.example", "x-a": ["1", "3", ""], "x-b": "2"}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", {}),
        ("a", {"a": ""}),
        ("a=", {"a": ""}),
        ("=a", {"": "a"}),
        ("&&a=b&", {"a": "b"}),
        ("a=b=c", {"a": "b=c"}),
        ("a+b=c+d%2Be", {"a b": "c d+e"}),
        ("%C3%A9=%e2%82%ac", {"é": "€"}),
        ("a=%ff%41", {"a": "\ufffdA"}),
        ("a=%00%0a%22%5C", {"a": '\0\n"\\'}),
        ("a=%ED%A0%80", {"a": "\ufffd\ufffd\ufffd"}),
        ("a?b=/c?d", {"a?b": "/c?d"}),
    ],
)
def test_a_query_is_decoded_as_a_form_is(query: str, expected: dict[str, str]) -> None:
    assert meta_of(get(f"/?{query}"))["query"] == expected


def test_a_header_is_utf_8_or_else_latin_1() -> None:
    head = head_of(b"GET / HTTP/1.1\r\nHost: a\r\nU: caf\xc3\xa9\r\nL: caf\xe9\r\n\r\n")
    headers = meta_of(head)["headers"]
    assert (headers["u"], headers["l"]) == ("café", "café")


def test_of_a_target_in_absolute_form_the_host_counts() -> None:
    meta = meta_of(get("http://b.example:81/x?y=z"))
    assert (meta["path"], meta["query"], meta["headers"]["host"]) == (
        "/x",
        {"y": "z"},
        "b.example:81",
    )
    without = meta_of(head_of(b"GET http://b.example/x HTTP/1.0\r\nA: b\r\n\r\n"))
    assert without["headers"] == {"host": "b.example", "a": "b"}


def test_methods_targets_and_versions_stay_what_they_were() -> None:
    assert meta_of(get("*", method="OPTIONS"))["path"] == "*"
    assert meta_of(get("//a/../b%2Fc;d", method="FROB"))["path"] == "//a/../b%2Fc;d"
    meta = meta_of(head_of(b"get / HTTP/1.0\r\n\r\n"))
    assert (meta["method"], meta["proto"], meta["headers"]) == ("get", "HTTP/1.0", {})


# Answers that are legal


def lines_of(
    meta: dict[str, Any], size: int = 0, head: http1.RequestHead | None = None
) -> list[str]:
    """The lines of the head that an answer of that meta gets."""
    response = response_of(meta)
    more = part_of(meta, None).more
    found = framed(response, size, head or get(), NOON, more=more, keep=True)
    assert found.head.endswith(b"\r\n\r\n")
    return found.head.decode("utf-8").split("\r\n")[:-2]


def test_without_any_wish_an_answer_is_200_with_its_length() -> None:
    expected = ["HTTP/1.1 200 OK", f"date: {DATE}", "content-length: 5"]
    assert lines_of({}, 5) == expected
    assert lines_of({"status": None, "headers": None, "more": None, "hash": None}, 5) == expected


def test_headers_are_strings_or_lists_and_keep_their_order_and_case() -> None:
    headers = {"Set-Cookie": ["a=1", "b=2"], "x": "", "Y": "caf\u00e9 \u20ac", "none": []}
    assert lines_of({"status": 404, "headers": headers}) == [
        "HTTP/1.1 404 Not Found",
        "Set-Cookie: a=1",
        "Set-Cookie: b=2",
        "x: ",
        "Y: café €",
        f"date: {DATE}",
        "content-length: 0",
    ]


def test_a_status_without_a_name_is_sent_all_the_same() -> None:
    assert lines_of({"status": 299})[0] == "HTTP/1.1 299 "


def test_a_date_of_its_own_is_kept() -> None:
    assert lines_of({"headers": {"Date": "today"}}) == [
        "HTTP/1.1 200 OK",
        "Date: today",
        "content-length: 0",
    ]


def test_further_frames_make_it_chunked_and_for_http_1_0_the_end_of_the_connection() -> None:
    assert lines_of({"more": True}, 5)[1:] == [f"date: {DATE}", "transfer-encoding: chunked"]
    old = get(version="1.0")
    assert lines_of({"more": True}, 5, old)[1:] == [f"date: {DATE}", "connection: close"]
    response = response_of({})
    assert not framed(response, 5, old, NOON, more=True, keep=True).keep
    assert framed(response, 5, get(), NOON, more=True, keep=True).keep


def test_http_1_0_is_told_that_its_connection_is_kept() -> None:
    old = get(version="1.0")
    assert lines_of({}, 5, old)[-2:] == ["content-length: 5", "connection: keep-alive"]


@pytest.mark.parametrize("value", ["close", "Close", "keep-alive, CLOSE", ["keep-alive", "close"]])
def test_an_answer_may_ask_for_the_connection_s_end(value: object) -> None:
    meta = {"headers": {"Connection": value}}
    assert lines_of(meta)[-1] == "connection: close"
    assert [line.partition(":")[0].lower() for line in lines_of(meta)].count("connection") == 1
    assert not framed(response_of(meta), 0, get(), NOON, more=False, keep=True).keep


def test_keep_alive_is_not_repeated() -> None:
    assert lines_of({"headers": {"Connection": "Keep-Alive"}}) == lines_of({})


def test_its_length_is_told_once() -> None:
    assert lines_of({"headers": {"Content-Length": "5"}}, 5) == lines_of({}, 5)


def test_of_a_body_that_is_not_sent_the_length_may_be_told() -> None:
    head = get(method="HEAD")
    assert lines_of({}, 5, head)[-1] == "content-length: 5"
    assert lines_of({"headers": {"content-length": "7"}}, 0, head)[-1] == "content-length: 7"
    meta = {"status": 304, "headers": {"content-length": "7", "etag": '"x"'}}
    assert lines_of(meta)[1:] == ['etag: "x"', f"date: {DATE}", "content-length: 7"]
    assert not framed(response_of({}), 5, head, NOON, more=False, keep=True).has_body


@pytest.mark.parametrize(
    ("status", "expected"), [(204, []), (304, []), (205, ["content-length: 0"])]
)
def test_what_has_no_content_has_no_length_but_that_of_a_reset(
    status: int, expected: list[str]
) -> None:
    assert lines_of({"status": status})[2:] == expected


# Answers that are not

LONG = "sha256-uU0nuZNNPgilLlLX2n2r+sSE7+N6U4DukIj3rOLvzek="

ILLEGAL: list[tuple[str, dict[str, Any]]] = [
    *[
        (f"status {status!r}", {"status": status})
        for status in (99, 100, 101, 103, 199, 600, 999, 1000, 0, -200, 2000)
    ],
    *[
        (f"status {status!r}", {"status": status})
        for status in ("200", 200.0, True, [], [200], {}, "", "200 OK\r\nA: b", 10**400)
    ],
    *[(f"headers {headers!r}", {"headers": headers}) for headers in ("a: b", ["a"], 1, True, [[]])],
    *[
        (f"header {name!r}", {"headers": {name: "x"}})
        for name in (
            *("", " ", "a b", "a:", "a\r\nb", "a\r\n", "a\n", "\r\n", "a\0", "a\t", "a\x7f"),
            *("é", "€"),
            *("(a)", "a,b", '"a"', "a/b", "a@b", "[a]", "{a}", "\ud800"),
        )
    ],
    *[
        (f"value {value!r}", {"headers": {"x": value}})
        for value in (
            *("a\r\nSet-Cookie: b", "a\nb", "a\rb", "\r\n", "a\r\n\r\n<html>", "\0", "a\x1fb"),
            *("\x7f", "\x08", "\x0b", "\x0c", 5, 1.5, True, {"a": "b"}, None, ["a", 5], [["a"]]),
            *(["a", "b\r\nc: d"], "\ud800"),
        )
    ],
    *[
        (f"transfer-encoding as {name}", {"headers": {name: "chunked"}})
        for name in ("transfer-encoding", "Transfer-Encoding", "TRANSFER-ENCODING")
    ],
    ("transfer-encoding of nothing", {"headers": {"transfer-encoding": ""}}),
    *[
        (f"content-length {value!r}", {"headers": {"Content-Length": value}})
        for value in (
            *("4", "6", "-5", "+5", "5 ", " 5", "0x5", "5,5", "5\r\n", "", "٥", "5" * 19, "5.0"),
            ["5", "5"],
            ["5", "6"],
        )
    ],
    (
        "content-length twice by its case",
        {"headers": {"Content-Length": "5", "content-length": "5"}},
    ),
    *[
        (f"connection {value!r}", {"headers": {"connection": value}})
        for value in ("upgrade", "close, x", "", "close\r\na: b", "te")
    ],
    ("content-length of a run", {"headers": {"content-length": "5"}, "more": True}),
    *[(f"more {more!r}", {"more": more}) for more in ("true", 1, 0, "", [], {})],
    *[(f"hash {hash_!r}", {"hash": hash_}) for hash_ in ("", "x", LONG[:-1], 5, True, [LONG])],
    *[
        (f"content with {status}", {"status": status})
        for status in (204, 205, 304)
    ],
    *[
        (f"a run with {status}", {"status": status, "more": True})
        for status in (204, 205, 304)
    ],
]  # fmt: skip


@pytest.mark.parametrize("meta", [meta for _, meta in ILLEGAL], ids=[name for name, _ in ILLEGAL])
def test_what_is_not_legal_is_refused_in_one_harmless_line(meta: dict[str, Any]) -> None:
    with pytest.raises(NotHttp) as refused:
        lines_of(meta, 5)
    text = str(refused.value)
    assert text.isascii() or "…" in text
    assert text.isprintable() and len(text) < 400


def test_content_of_its_own_and_by_hash_is_one_too_many() -> None:
    assert part_of({"hash": LONG}, None).hash == LONG
    with pytest.raises(NotHttp):
        part_of({"hash": LONG}, LONG)


def test_http_1_0_is_never_sent_chunks() -> None:
    found = framed(response_of({}), 5, get(version="1.0"), NOON, more=True, keep=True)
    assert not found.is_chunked and b"chunked" not in found.head
