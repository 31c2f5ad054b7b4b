"""xs.http1: what is read, what is refused, and that neither depends on how the bytes arrive.

Bodies by themselves are in test_framing.py; here they are parts of whole messages.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import http1_corpus as corpus
import pytest
from http1_judges import compare, head_fields, one_by_one, read_all, read_response
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xs import framing, http1

# The examples are the same in every run; `XS_FUZZ=20000 pytest tests/test_http1.py` looks for a
# difference among others, and that much longer.
_FUZZ = os.environ.get("XS_FUZZ")
settings.register_profile(
    "xs", deadline=None, max_examples=int(_FUZZ or "300"), derandomize=_FUZZ is None
)
settings.load_profile("xs")

Message = tuple  # (head as a tuple, body)


def splits(data: bytes) -> list[tuple[bytes, bytes]]:
    """At every point; of a long message (a repetition) at its ends and at every 997th."""
    points = range(len(data) + 1)
    if len(data) > 1000:
        points = [*points[:200], *points[200:-200:997], *points[-200:]]
    return [(data[:i], data[i:]) for i in points]


def read(data: bytes, limit: int = http1.HEAD_LIMIT) -> http1.RequestHead:
    head = http1.read_request_head(bytearray(data), limit)
    assert head is not None
    return head


def status_of(data: bytes, limit: int = http1.HEAD_LIMIT) -> int:
    with pytest.raises(http1.Refusal) as refused:
        http1.read_request_head(bytearray(data), limit)
    return refused.value.status


# --- the corpus ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", corpus.ACCEPTED)
def test_a_request_is_read_the_same_however_it_arrives(name):
    data = corpus.ACCEPTED[name]
    whole = read_all([data])
    assert whole[0], whole
    assert whole[1] == ("waiting", b"", b"")
    assert read_all(one_by_one(data)) == whole
    for pieces in splits(data):
        assert read_all(pieces) == whole


@pytest.mark.parametrize("name", corpus.REFUSED)
def test_an_attack_is_refused_the_same_however_it_arrives(name):
    status, data = corpus.REFUSED[name]
    whole = read_all([data])
    assert whole[1][:2] == ("refused", status), whole
    for pieces in splits(data):
        assert read_all(pieces) == whole
    if len(data) < 20000:
        assert read_all(one_by_one(data)) == whole


@pytest.mark.parametrize("name", corpus.REFUSED)
def test_a_refusal_is_one_sentence(name):
    sentence = read_all([corpus.REFUSED[name][1]])[1][2]
    assert sentence.endswith(".")
    assert sentence[0].isupper()
    assert sentence.isascii()
    assert "\n" not in sentence


@pytest.mark.parametrize("name", corpus.ACCEPTED)
def test_a_request_that_breaks_off_is_waited_for(name):
    data = corpus.ACCEPTED[name]
    for size in range(len(data)):
        assert read_all([data[:size]])[1][0] == "waiting"


# --- heads --------------------------------------------------------------------------------------


def test_a_head_says_all_that_was_sent():
    buffer = bytearray(
        b"POST /append/notes?ttl=forever HTTP/1.1\r\nHost: localhost:80\r\nXS-Meta: \t{} \t\r\n"
        b"Accept: a\r\naccept: b\r\nContent-Length: 5\r\n\r\nhelloGET"
    )
    head = http1.read_request_head(buffer)
    assert head is not None
    assert head.method == "POST"
    assert head.target == "/append/notes?ttl=forever"
    assert (head.path, head.query) == ("/append/notes", "ttl=forever")
    assert (head.minor, head.authority, head.length) == (1, "localhost:80", 5)
    assert (head.keep_alive, head.expects_continue) == (True, False)
    assert head.fields[1] == ("xs-meta", "{}")
    assert head.get("accept") == "a"
    assert head.get_all("accept") == ["a", "b"]
    assert head.get("missing") is None
    assert head.get("missing", "x") == "x"
    assert head.get_all("missing") == []
    assert buffer == b"helloGET"


def test_absolute_form_is_reduced_and_overrides_host():
    head = read(b"GET http://b:81/a?c HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (head.authority, head.target) == ("b:81", "/a?c")
    assert head.get("host") == "a"
    assert read(b"GET http://b HTTP/1.1\r\nHost: a\r\n\r\n").target == "/"
    assert read(b"GET http://b?c HTTP/1.1\r\nHost: a\r\n\r\n").target == "/?c"
    assert read(b"GET http://b/%2f?http://c/ HTTP/1.0\r\n\r\n").authority == "b"
    assert read(b"OPTIONS http://b HTTP/1.1\r\nHost: a\r\n\r\n").target == "*"


FIELDS = b"Host: a\r\nContent-Length: 2\r\nConnection: close, keep-alive\r\n\r\n"


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1", b"GET / HTTP/1.0", b"GET http://b/ HTTP/1.1"])
@pytest.mark.parametrize(
    "second", [b"POST /c HTTP/1.1", b"POST /c HTTP/1.0", b"POST http://d/c HTTP/1.1"]
)
@pytest.mark.parametrize("fields", [FIELDS, FIELDS.replace(b"2", b"3"), b"Host: a\r\n\r\n"])
def test_the_same_fields_are_read_as_the_first_time(first: bytes, second: bytes, fields: bytes):
    before = read(first + b"\r\n" + FIELDS)
    data = second + b"\r\n" + fields
    head = http1.read_request_head(bytearray(data), like=before)
    assert head_fields(head) == head_fields(read(data))


def test_a_host_that_is_missing_is_none_and_one_that_is_empty_is_empty():
    assert read(b"GET / HTTP/1.0\r\n\r\n").authority is None
    assert read(b"GET / HTTP/1.1\r\nHost: \r\n\r\n").authority == ""


@pytest.mark.parametrize(
    ("minor", "connection", "keeps"),
    [
        (1, [], True),
        (1, ["close"], False),
        (1, ["Close"], False),
        (1, ["upgrade , CLOSE"], False),
        (1, ["keep-alive"], True),
        (1, ["keep-alive", "close"], False),
        (1, ["closed"], True),
        (1, [""], True),
        (0, [], False),
        (0, ["Keep-Alive"], True),
        (0, ["upgrade", "keep-alive"], True),
        (0, ["keep-alive, close"], False),
        (0, ["x"], False),
    ],
)
def test_keep_alive_follows_version_and_connection(minor, connection, keeps):
    fields = "".join(f"Connection: {value}\r\n" for value in connection)
    assert read(f"GET / HTTP/1.{minor}\r\nHost: a\r\n{fields}\r\n".encode()).keep_alive is keeps


def test_expect_continue_counts_only_in_http_1_1_and_before_a_body():
    fields = b"Host: a\r\nExpect: 100-Continue\r\n"
    sized, empty = b"Content-Length: 1\r\n\r\n", b"Content-Length: 0\r\n\r\n"
    assert read(b"POST / HTTP/1.1\r\n" + fields + sized).expects_continue
    chunked = b"Transfer-Encoding: chunked\r\n\r\n"
    assert read(b"POST / HTTP/1.1\r\n" + fields + chunked).expects_continue
    assert not read(b"POST / HTTP/1.1\r\n" + fields + empty).expects_continue
    assert not read(b"POST / HTTP/1.0\r\n" + fields + sized).expects_continue


def test_a_head_is_read_up_to_its_limit_to_the_byte():
    data = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    assert read(data, limit=len(data)).target == "/"
    assert status_of(data, limit=len(data) - 1) == 431
    assert http1.read_request_head(bytearray(data[:-1]), len(data)) is None
    assert status_of(data[:-1], limit=len(data) - 1) == 431  # nothing that may come could help


def test_a_target_is_read_up_to_its_limit_to_the_byte():
    most = http1.REQUEST_LINE_LIMIT - len(b"GET / HTTP/1.1")
    assert read(b"GET /" + b"a" * most + b" HTTP/1.1\r\nHost: a\r\n\r\n").path == "/" + "a" * most
    assert status_of(b"GET /" + b"a" * (most + 1) + b" HTTP/1.1\r\nHost: a\r\n\r\n") == 414
    assert status_of(b"A " * 10 + b"a" * (http1.REQUEST_LINE_LIMIT - 18)) == 414


def test_the_target_limit_is_never_above_the_limit_of_the_head():
    assert status_of(b"GET /" + b"a" * 200, limit=100) == 414
    assert status_of(b"GET /" + b"a" * 200 + b" HTTP/1.1\r\nHost: a\r\n\r\n", limit=100) == 414


def test_lines_that_end_with_a_bare_lf_are_told_how_lines_end():
    with pytest.raises(http1.Refusal, match="lines end with CR LF"):
        http1.read_request_head(bytearray(b"GET / HTTP/1.1\nHost: a\n\n"))


def test_bytes_that_cannot_begin_a_request_are_refused_at_once():
    for byte in range(256):
        data = bytes([byte])
        if not data.translate(None, http1.TCHAR) or data == b"\r":
            assert http1.read_request_head(bytearray(data)) is None
        else:
            assert status_of(data) == 400


def test_a_bad_request_line_is_refused_before_its_fields_come():
    assert status_of(b"GET / HTTP/2.0\r\n") == 505
    assert status_of(b"GET /a#b HTTP/1.1\r\n") == 400
    assert status_of(b"GET / HTTP/1.1\r\nHost: a\n") == 400


def test_data_that_is_not_enough_stays_in_the_buffer():
    for data in (b"", b"\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n"):
        buffer = bytearray(data)
        assert http1.read_request_head(buffer) is None
        assert buffer == data


# --- what is sent -------------------------------------------------------------------------------


def test_a_response_head_is_a_status_line_and_its_fields():
    assert http1.response_head(200, [("content-length", "5"), ("X", "a b")]) == (
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nX: a b\r\n\r\n"
    )
    assert http1.response_head(204, [], minor=0) == b"HTTP/1.1 204 No Content\r\n\r\n"
    assert http1.response_head(299, iter(())) == b"HTTP/1.1 299 \r\n\r\n"
    assert http1.response_head(200, [("a", "é")]) == b"HTTP/1.1 200 OK\r\na: \xe9\r\n\r\n"


BAD_FIELDS = [
    ("", "a"),
    ("a b", "c"),
    ("a:", "c"),
    ("a\r\nb", "c"),
    ("é", "c"),
    ("a", "b\r\nSet-Cookie: c"),
    ("a", "b\r\n\r\n<html>"),
    ("a", "b\rc"),
    ("a", "b\nc"),
    ("a", "\r"),
    ("a", "b\x00c"),
    ("a", "b\x1fc"),
    ("a", "b\x7fc"),
    ("a", "b\u2028c"),
    ("a", "b\u560ac"),  # its low byte is an LF: the attack on programs that cut characters
    ("\u0161", "c"),
]


@pytest.mark.parametrize("field", BAD_FIELDS, ids=repr)
def test_a_field_that_would_split_a_message_is_not_sent(field):
    with pytest.raises(ValueError):
        http1.response_head(200, [("x", "y"), field, ("x", "y")])
    with pytest.raises(ValueError):
        http1.request_head("GET", "/", "a", [("x", "y"), field])


@pytest.mark.parametrize("status", [0, 20, 99, 600, 1000, -200])
def test_what_is_no_status_is_not_sent(status):
    with pytest.raises(ValueError, match="status"):
        http1.response_head(status, [])


def test_http_1_0_is_sent_no_transfer_encoding():
    for name in ("Transfer-Encoding", "transfer-encoding"):
        with pytest.raises(ValueError, match="Transfer-Encoding"):
            http1.response_head(200, [("a", "b"), (name, "chunked")], minor=0)
        assert http1.response_head(200, [(name, "chunked")])


@given(st.lists(st.tuples(st.text(max_size=10), st.text(max_size=20)), max_size=5))
def test_no_field_from_outside_adds_a_line_or_a_field(fields):
    try:
        data = http1.response_head(200, fields)
    except ValueError:
        return
    head = http1.read_response_head(bytearray(data), "GET")
    assert head is not None
    assert head.fields == [(name.lower(), value.strip(" \t")) for name, value in fields]


def test_a_request_head_is_read_as_it_was_meant():
    data = http1.request_head("POST", "/a?b=%20", "[::1]:80", [("Content-Length", "0"), ("X", "y")])
    head = read(data)
    assert (head.method, head.target, head.authority) == ("POST", "/a?b=%20", "[::1]:80")
    assert head.fields == [("host", "[::1]:80"), ("content-length", "0"), ("x", "y")]
    assert read(http1.request_head("OPTIONS", "*", "a", [])).target == "*"


@pytest.mark.parametrize(
    ("method", "target", "authority"),
    [
        ("", "/", "a"),
        ("G T", "/", "a"),
        ("GET\r\n", "/", "a"),
        ("\r\nGET", "/", "a"),
        ("GET", "", "a"),
        ("GET", "a", "a"),
        ("GET", "/a b", "a"),
        ("GET", "/ HTTP/1.1\r\nX: y", "a"),
        ("GET", "/a\nb", "a"),
        ("GET", "/é", "a"),
        ("GET", "/\u560a", "a"),
        ("GET", "/%", "a"),
        ("GET", "/#a", "a"),
        ("GET", "/" + "a" * 20000, "a"),
        ("GET", "*", "a"),
        ("GET", "http://a/", "a"),
        ("CONNECT", "a:80", "a"),
        ("GET", "/", "a/b"),
        ("GET", "/", "a\r\nX: y"),
        ("GET", "/", "b@a"),
        ("GET", "/", "\u560a"),
    ],
)
def test_a_request_head_that_would_not_be_one_is_not_sent(method, target, authority):
    with pytest.raises(ValueError):
        http1.request_head(method, target, authority, [])


def test_a_request_head_has_one_host():
    with pytest.raises(ValueError, match="Host"):
        http1.request_head("GET", "/", "a", [("x", "y"), ("host", "b")])


# --- responses ----------------------------------------------------------------------------------


def response(data: bytes, method: str = "GET") -> tuple[http1.ResponseHead, bytearray]:
    buffer = bytearray(data)
    head = http1.read_response_head(buffer, method)
    assert head is not None
    return head, buffer


RESPONSES = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "no reason": b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nhello",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "until close": b"HTTP/1.0 200 OK\r\n\r\nhello",
    "after 1xx": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 \r\nA: b\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_is_read_the_same_however_it_arrives(name):
    data = RESPONSES[name]
    whole = read_response([data])
    assert whole[0] == 200
    assert whole[3:] == (b"hello", b"")
    assert read_response(one_by_one(data)) == whole
    for pieces in splits(data):
        assert read_response(pieces) == whole


def test_a_response_says_where_its_body_ends():
    head, _ = response(RESPONSES["length"])
    assert (head.length, head.chunked, head.until_close, head.keep_alive) == (5, False, False, True)
    head, _ = response(RESPONSES["chunked"])
    assert (head.length, head.chunked, head.until_close, head.keep_alive) == (
        None,
        True,
        False,
        True,
    )
    head, _ = response(b"HTTP/1.1 200 OK\r\n\r\n")
    assert (head.length, head.chunked, head.until_close, head.keep_alive) == (
        None,
        False,
        True,
        False,
    )
    head, _ = response(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\n")
    assert not head.keep_alive
    assert head.get("connection") == "close"


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_these_responses_have_no_body_whatever_their_fields(method, status):
    for field in (b"Content-Length: 5", b"Transfer-Encoding: chunked", b"A: b"):
        head, buffer = response(b"HTTP/1.1 %d X\r\n%b\r\n\r\nHTTP" % (status, field), method)
        assert head.length == 0
        assert framing.response_body_reader(head).done
        assert head.keep_alive
        assert buffer == b"HTTP"


@pytest.mark.parametrize("name", [name for name in RESPONSES if name != "until close"])
def test_a_body_that_breaks_off_is_never_taken_for_whole(name):
    data = RESPONSES[name]
    for size in range(len(data)):
        got = read_response([data[:size]])
        assert got == "no head" or got[0] == "broken off"
    assert issubclass(framing.BrokenOff, ValueError)


@pytest.mark.parametrize(
    "data",
    [
        b"\x15\x03\x01",
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.2 200 OK\r\n\r\n",
        b"http/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 +20 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 600 OK\r\n\r\n",
        b"HTTP/1.1 101 OK\r\n\r\n",
        b"HTTP/1.1 200 O\x00K\r\n\r\n",
        b"HTTP/1.1 200 OK\n\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\nA\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 65536,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhello",
    ],
    ids=repr,
)
def test_a_malformed_response_is_refused_however_it_arrives(data):
    whole = read_response([data])
    assert whole[0] == "refused"
    for pieces in splits(data):
        assert read_response(pieces) == whole


def test_bytes_that_cannot_begin_a_response_are_refused_at_once():
    for data in (b"\x15", b"\r", b"HTTP/2", b"HTTP/1X", b"SSH-2.0"):
        with pytest.raises(http1.Refusal, match="not a response"):
            http1.read_response_head(bytearray(data), "GET")
    assert http1.read_response_head(bytearray(b"HTTP/1"), "GET") is None


# --- against h11, and at random -----------------------------------------------------------------


@pytest.mark.parametrize("name", corpus.ACCEPTED)
def test_what_is_read_h11_reads_the_same(name):
    compare(corpus.ACCEPTED[name])


@pytest.mark.parametrize("name", corpus.REFUSED)
def test_what_h11_refuses_of_the_attacks_is_refused(name):
    compare(corpus.REFUSED[name][1])


tokens = st.sampled_from(["GET", "POST", "OPTIONS", "HEAD", "x-y", "A" * 33, "G(T", ""])
targets = st.sampled_from(
    ["/", "/a?b=c", "/%41", "/%4", "*", "http://b/c", "http://b", "a:80", "/a#b", "//", "", "/é"]
)
versions = st.sampled_from(["HTTP/1.1"] * 6 + ["HTTP/1.0"] * 2 + ["HTTP/2.0", "HTTP/1.2", "http"])
field_lines = st.sampled_from(
    [
        "Host: a",
        "Host: a",
        "host:b:80",
        "Host: a b",
        "Host: [::1]",
        "Content-Length: 5",
        "Content-Length: 5",
        "Content-Length: 0",
        "Content-Length: 5, 5",
        "Content-Length: 05",
        "Content-Length: +5",
        "Content-Length: " + "1" * 25,
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: CHUNKED ",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding:\x0bchunked",
        "Connection: close",
        "Connection: keep-alive",
        "Expect: 100-continue",
        "Expect: 200",
        "X:",
        "X: \t a \t b \t",
        "X: \xe9",
        "X: \x00",
        "X: \x7f",
        "X\x7f: a",
        "X : a",
        " X: a",
        "X",
        ": a",
        "",
    ]
)
ends = st.sampled_from(["\r\n"] * 12 + ["\n", "\r", "\r\n ", "\r\r\n"])
bodies = st.sampled_from(
    [
        "",
        "hello",
        "hello, world",
        "5\r\nhello\r\n0\r\n\r\n",
        "5;a=b\r\nhello\r\n0\r\nA: b\r\n\r\nGET / HTTP/1.1\r\n",
        "05\r\nhello\r\n00\r\n\r\n",
        "5 \r\nhello\r\n0\r\n\r\n",
        "5\nhello\n0\n\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhelloXX0\r\n\r\n",
        "0\r\nA : b\r\n\r\n",
        "0\r\nA: b\r\n c\r\n\r\n",
        "1" * 21 + "\r\n",
        "-1\r\n",
    ]
)


@st.composite
def messages(draw) -> bytes:
    """Requests put together from good parts and, more rarely, from bad ones."""
    line = " ".join((draw(tokens), draw(targets), draw(versions)))
    parts = [line, draw(ends)]
    for field in draw(st.lists(field_lines, max_size=5)):
        parts += [field, draw(ends)]
    return "".join((*parts, draw(ends), draw(bodies))).encode("latin-1")


interesting = st.one_of(
    st.sampled_from(
        [b"\r\n", b"\r", b"\n", b"\r\n ", b"\r\n\r\n", b"chunked", b"close", b"%4"]
        + [bytes([byte]) for byte in b"\x00\x0b\x7f\x80\xff \t:;,%#?/05"]
    ),
    st.binary(min_size=1, max_size=2),
)


@st.composite
def mutations(draw) -> bytes:
    """Valid requests with one to three edits."""
    data = bytearray(draw(st.sampled_from([d for d in corpus.ACCEPTED.values() if len(d) < 400])))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        gone = draw(st.sampled_from([0, 0, 1, 1, 2, 5]))
        data[at : at + gone] = draw(st.one_of(st.just(b""), interesting))
    return bytes(data)


@given(st.one_of(messages(), mutations()))
@example(b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n")
def test_what_h11_refuses_is_refused_and_the_rest_is_read_the_same(data):
    compare(data)


@given(st.one_of(messages(), mutations()), st.data())
def test_any_message_is_judged_the_same_however_it_arrives(data, draw):
    whole = read_all([data])
    assert read_all(one_by_one(data)) == whole
    cut = draw.draw(st.integers(0, len(data)))
    assert read_all([data[:cut], data[cut:]]) == whole


@given(
    st.sampled_from([b"", b"GET ", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n"])
    | st.just(corpus.chunked(b"")),
    st.lists(st.one_of(interesting, st.binary(max_size=40)), max_size=12),
)
def test_random_bytes_raise_nothing_but_refusals(start, pieces):
    whole = read_all([start, *pieces])  # read_all catches refusals only
    assert read_all(one_by_one(start + b"".join(pieces))) == whole


@given(
    st.sampled_from([b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\n", RESPONSES["chunked"][:-15]]),
    st.lists(st.one_of(interesting, st.binary(max_size=40)), max_size=12),
)
def test_random_bytes_of_a_server_raise_nothing_but_refusals(start, pieces):
    whole = read_response([start, *pieces])
    assert read_response(one_by_one(start + b"".join(pieces))) == whole


# --- the module ---------------------------------------------------------------------------------


def test_http1_imports_nothing():
    tree = ast.parse(Path(http1.__file__).read_text("utf-8"))
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [getattr(node, "module", None) for node in imports] == ["__future__"]
    for node in ast.walk(tree):  # the rest is for the type checker alone
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in imports:
            assert node.module == "collections.abc"
