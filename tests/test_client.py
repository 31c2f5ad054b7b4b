"""The client, held against scripted peers on real sockets, and against stores."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import socket
import ssl
import subprocess
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import start_server

import xs
from xs import errors, request
from xs.address import open_transport
from xs.client import Client
from xs.transport import HttpTransport

CHUNKED = b"HTTP/1.1 200 OK\r\nxs-version: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
FRAME = b'{"topic":"t","id":"03gw3h0000000000000000000","hash":null,"meta":null,"ttl":"forever"}'


def to(server, **options):
    return HttpTransport(("unix", server.path), **{"timeout": 20, **options})


def echo(peer):
    """Answers each request with its head and body."""
    while head := peer.head():
        peer.answer(head + peer.body(head))


# What is sent


def test_a_body_of_bytes_is_sent_with_its_length(scripted):
    got = to(scripted(echo)).request("POST", "/cas", (), b"hello").read().lower()
    assert got.startswith(b"post /cas http/1.1\r\nhost: localhost\r\n")
    assert b"\r\ncontent-length: 5\r\n" in got and got.endswith(b"\r\n\r\nhello")
    assert b"transfer-encoding" not in got


def test_a_post_without_a_body_says_so(scripted):
    got = to(scripted(echo)).request("POST", "/append/t").read().lower()
    assert b"\r\ncontent-length: 0\r\n" in got


def test_a_body_that_is_an_iterable_is_sent_chunked_and_empty_blocks_do_not_end_it(scripted):
    got = to(scripted(echo)).request("POST", "/cas", (), iter([b"a", b"", b"bc"])).read()
    assert b"\r\ntransfer-encoding: chunked\r\n" in got.lower() and got.endswith(b"\r\n\r\nabc")


def test_an_empty_iterable_is_an_empty_body(scripted):
    assert to(scripted(echo)).request("POST", "/cas", (), iter([])).read().endswith(b"\r\n\r\n")


def test_blocks_of_a_body_are_sent_as_they_come(scripted):
    arrived = threading.Event()

    def script(peer):
        head = peer.head()
        assert peer.chunk() == b"first"
        arrived.set()
        assert peer.body(head) == b"second"
        peer.answer()

    def blocks():
        yield b"first"
        assert arrived.wait(20)
        yield b"second"

    assert to(scripted(script)).request("POST", "/x", (), blocks()).read() == b""


def test_a_body_that_raises_is_broken_off_without_its_last_chunk(scripted):
    broke_off = threading.Event()

    def script(peer):
        head = peer.head()
        with pytest.raises(EOFError):
            peer.body(head)
        broke_off.set()

    def blocks():
        yield b"x"
        raise KeyError("from the caller")

    with pytest.raises(KeyError, match="from the caller"):
        to(scripted(script)).request("POST", "/x", (), blocks())
    assert broke_off.wait(20)


@pytest.mark.parametrize("size", [65536, 65537, 5_000_000])
def test_a_large_body_of_bytes_arrives_whole(scripted, size):
    data = os.urandom(size)

    def script(peer):
        head = peer.head()
        peer.answer(b"same" if peer.body(head) == data else b"other")

    assert to(scripted(script)).request("POST", "/cas", (), data).read() == b"same"


def test_the_token_goes_with_every_request_to_a_tcp_address(scripted):
    server = scripted(echo, tcp=True)
    transport = HttpTransport(("tcp", "localhost", server.port), "s3cret", 20)
    for _ in range(2):
        got = transport.request("GET", "/").read()
        assert b"\r\nauthorization: Bearer s3cret\r\n" in got
        assert f"\r\nHost: localhost:{server.port}\r\n".encode() in got
    assert server.connections == 1


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("/a b", ()),
        ("/a\r\nX: y", ()),
        ("a", ()),
        ("/", [("x-a", "b\r\nc: d")]),
        ("/", [("x-a", "€")]),
        ("/", [("x a", "b")]),
    ],
)
def test_what_could_split_a_request_is_refused(scripted, target, fields):
    server = scripted(echo)
    with pytest.raises(errors.Invalid):
        to(server).request("GET", target, fields)
    assert server.connections == 0


# What is read


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nxs-version: 1\r\nContent-Length: 11\r\nX-A: b\r\n\r\nhello world",
        CHUNKED[:-2] + b"X-A: b\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nxs-version: 1\r\nX-A: b\r\n\r\nhello world",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nxs-version: 1\r\nX-A: b\r\n"
        b"Content-Length: 11\r\n\r\n"
        b"hello world",
    ],
    ids=["length", "chunked", "until close", "interim"],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_an_answer_is_the_same_however_it_is_cut(scripted, answer, at_once):
    def script(peer):
        peer.head()
        for piece in [answer] if at_once else [bytes([b]) for b in answer]:
            peer.send(piece)

    response = to(scripted(script)).request("GET", "/")
    assert (response.status, response.get("x-a")) == (200, "b")
    assert response.get("x-b") is None and response.get("x-b", "c") == "c"
    assert response.read() == b"hello world"


def test_blocks_of_an_answer_are_delivered_as_they_arrive(scripted):
    seen = threading.Event()

    def script(peer):
        peer.head()
        peer.send(CHUNKED)
        peer.send(b"5\r\nfirst\r\n")
        assert seen.wait(20)
        peer.send(b"6\r\nsecond\r\n0\r\n\r\n")

    blocks = iter(to(scripted(script)).request("GET", "/?follow=true"))
    assert next(blocks) == b"first"
    seen.set()
    assert list(blocks) == [b"second"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nxs-version: 1\r\nContent-Length: 11\r\n\r\nhello",
        CHUNKED + b"5\r\nhello\r\n",
        CHUNKED + b"5\r\nhello\r\nxyz\r\n",
    ],
    ids=["length", "chunked", "no chunk"],
)
def test_a_body_that_breaks_off_is_an_error_after_what_came(scripted, answer):
    def script(peer):
        peer.head()
        peer.send(answer)

    got = b""
    with pytest.raises(errors.BrokenBody):
        for block in to(scripted(script)).request("GET", "/"):
            got += block
    assert b"hello".startswith(got)


def test_a_head_that_breaks_off_is_an_error(scripted):
    def script(peer):
        peer.head()
        peer.send(b"HTTP/1.1 200 OK\r\nxs-version: 1\r\nConte")

    with pytest.raises(errors.BrokenBody):
        to(scripted(script)).request("GET", "/")


def test_what_is_no_http_is_said_to_be_no_server(scripted):
    def script(peer):
        peer.head()
        peer.send(b"SSH-2.0-OpenSSH_9.6\r\n")

    with pytest.raises(errors.Unavailable, match="no xs server"):
        to(scripted(script)).request("GET", "/")


def test_a_server_that_goes_away_unasked_is_unavailable(scripted):
    with pytest.raises(errors.Unavailable, match="before it answered"):
        to(scripted(lambda peer: peer.head())).request("GET", "/")


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_the_timeout(scripted):
    def script(peer):
        peer.read_until(b"never")

    server = scripted(script)
    with pytest.raises(errors.Unavailable, match=r"within 0\.05 s"):
        to(server, timeout=0.05).request("GET", "/")
    with pytest.raises(errors.Unavailable, match=r"within 0\.05 s"):
        to(server, timeout=0.05).request("POST", "/", (), iter([b"x"]))


# Both at once


def test_a_refusal_is_heard_while_the_body_is_still_being_sent(scripted):
    def script(peer):
        peer.head()
        peer.answer(b"too much", 413)

    sent = 0

    def endless():
        nonlocal sent
        while True:
            sent += 65536
            yield bytes(65536)

    response = to(scripted(script)).request("POST", "/cas", (), endless())
    assert (response.status, response.read()) == (413, b"too much")
    assert sent < 50_000_000


def test_a_refusal_is_heard_from_a_server_that_neither_reads_nor_closes(scripted):
    done = threading.Event()

    def script(peer):
        peer.head()
        peer.answer(b"no", 400)
        done.wait(20)

    response = to(scripted(script)).request("POST", "/cas", (), b"x" * 20_000_000)
    assert (response.status, response.read()) == (400, b"no")
    done.set()


def test_a_server_that_answers_while_it_reads_can_not_be_deadlocked(scripted):
    def script(peer):
        peer.head()
        peer.send(CHUNKED)
        for data in iter(peer.chunk, b""):
            peer.send(b"%x\r\n%b\r\n" % (len(data), data))
        peer.send(b"0\r\n\r\n")

    blocks = [os.urandom(100_000) for _ in range(200)]
    transport = to(scripted(script))
    assert transport.request("POST", "/append?each", (), iter(blocks)).read() == b"".join(blocks)


def test_a_body_that_is_sent_once_the_server_asks_for_it_is_not_begun_before(scripted):
    begun = threading.Event()

    def body():
        begun.set()
        yield b"one"

    def goes_on(peer):
        assert b"\r\nexpect: 100-continue\r\n" in peer.head()
        assert not begun.is_set()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert peer.chunk() + peer.chunk() == b"one"
        peer.answer(b"thanks")

    def refuses(peer):
        peer.head()
        peer.answer(b"closing", 503)

    response = to(scripted(goes_on)).request("POST", "/append/a", [request.EXPECT], body())
    assert (response.status, response.read()) == (200, b"thanks")
    begun.clear()
    response = to(scripted(refuses)).request("POST", "/append/a", [request.EXPECT], body())
    assert (response.status, response.read()) == (503, b"closing")
    with pytest.raises(errors.Unreached):  # it ends: what was not begun was not done
        to(scripted(lambda peer: peer.head())).request(
            "POST", "/append/a", [request.EXPECT], body()
        )
    assert not begun.is_set()


def test_an_answer_that_ends_before_the_body_does_not_leave_a_usable_connection(scripted):
    release = threading.Event()

    def script(peer):
        peer.head()
        peer.answer(b"enough")
        release.wait(20)

    server = scripted(script)
    transport = to(server)

    def body():
        while True:
            yield bytes(65536)

    assert transport.request("POST", "/x", (), body()).read() == b"enough"
    release.set()
    assert transport.request("POST", "/x", (), b"").read() == b"enough"
    assert server.connections == 2


# Connections


def test_a_connection_is_used_again_once_its_answer_was_read(scripted):
    server = scripted(echo)
    transport = to(server)
    for n in range(5):
        transport.request("POST", f"/{n}", (), iter([b"x"])).read()
        transport.request("GET", f"/{n}").read()
    assert server.connections == 1


def test_a_connection_with_an_unread_answer_is_not_used_again(scripted):
    server = scripted(echo)
    transport = to(server)
    first = transport.request("POST", "/1", (), b"one")
    second = transport.request("POST", "/2", (), b"two")
    assert first.read().endswith(b"one") and second.read().endswith(b"two")
    assert server.connections == 2
    transport.request("GET", "/").close()
    assert transport.request("POST", "/3", (), b"three").read().endswith(b"three")


def test_a_response_that_is_given_up_half_way_closes_its_connection(scripted):
    closed = threading.Event()

    def script(peer):
        peer.head()
        peer.send(CHUNKED + b"5\r\nhello\r\n")
        assert peer.head() == b""
        closed.set()

    for block in to(scripted(script)).request("GET", "/?follow=true"):
        assert block == b"hello"
        break
    assert closed.wait(20)


def test_connection_close_is_honoured(scripted):
    def script(peer):
        head = peer.head()
        if head:
            peer.answer(b"ok", 200, "Connection: close")

    server = scripted(script)
    transport = to(server)
    assert [transport.request("GET", "/").read() for _ in range(3)] == [b"ok"] * 3
    assert server.connections == 3


@pytest.mark.parametrize("unasked", [b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
def test_a_kept_connection_that_was_closed_is_replaced_before_anything_is_sent(scripted, unasked):
    closed = threading.Event()

    def script(peer):
        peer.head()
        peer.answer(b"ok")
        if unasked:
            peer.send(unasked)
        peer.sock.shutdown(socket.SHUT_RDWR)
        closed.set()

    server = scripted(script)
    transport = to(server)
    for _ in range(2):
        closed.clear()
        response = transport.request("POST", "/append/t", (), b"x")
        assert closed.wait(20)
        assert response.read() == b"ok"
    assert server.connections == 2


def dies_on_the_second(peer):
    """Answers a connection's first request, and closes it on its second."""
    head = peer.head()
    if head:
        peer.body(head)
        peer.answer(b"ok")
        peer.head()


def test_a_request_that_may_be_repeated_survives_a_kept_connection_that_dies(scripted):
    server = scripted(dies_on_the_second)
    transport = to(server)
    for _ in range(3):
        assert transport.request("GET", "/").read() == b"ok"
    key = [("idempotency-key", "k")]
    assert transport.request("POST", "/append/t", key, b"x").read() == b"ok"


def test_an_append_is_never_sent_twice_unless_it_has_a_key(scripted):
    server = scripted(dies_on_the_second)
    transport = to(server)
    assert transport.request("POST", "/append/t", (), b"x").read() == b"ok"
    with pytest.raises(errors.Unavailable):
        transport.request("POST", "/append/t", (), b"x")
    assert server.connections == 1


def test_a_transport_can_be_used_by_threads(scripted):
    transport = to(scripted(echo))
    wrong = []

    def ask(n):
        for k in range(50):
            body = f"{n} {k}".encode()
            if not transport.request("POST", "/x", (), body).read().endswith(b"\r\n\r\n" + body):
                wrong.append(body)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not wrong


def test_a_socket_with_a_path_too_long_for_the_system_is_reached(tmp_path, monkeypatch):
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("sock")
        listener.listen()
        monkeypatch.chdir("/")
        transport = HttpTransport(("unix", str(folder / "sock")), timeout=20).open()
        with listener.accept()[0] as accepted:
            accepted.settimeout(20)
            transport.close()
            assert accepted.recv(1) == b""
    with pytest.raises(OSError):
        HttpTransport(("unix", str(folder / "none")), timeout=20).open()
    assert os.getcwd() == "/"


def test_a_port_where_nobody_listens_is_unavailable():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with pytest.raises(errors.Unavailable, match="can't connect"):
        HttpTransport(("tcp", "localhost", port)).request("GET", "/")


def test_where_no_tls_is_spoken_that_is_said(server):
    exposed = start_server(server.directory + "2", "--expose", ":0")
    try:
        with xs.open(exposed.directory) as store:
            address = store.last("xs.start").meta["expose"][0]
        with pytest.raises(errors.Unavailable, match="speaks no TLS: use http:// in place of http"):
            xs.open(f"https://{address}")
    finally:
        exposed.stop()


def test_https_is_spoken_and_the_certificate_is_checked(scripted, tmp_path, monkeypatch):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", key, "-out", certificate, "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def script(peer):
        with context.wrap_socket(peer.sock, server_side=True) as peer.sock:
            echo(peer)

    server = scripted(script, tcp=True)
    address = ("tls", "localhost", server.port)
    with pytest.raises(errors.Unavailable, match="certificate"):
        HttpTransport(address, timeout=20).request("GET", "/")

    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    transport = HttpTransport(address, timeout=20)
    data = os.urandom(3_000_000)
    for body in (b"small", data, iter([data, b"more"])):
        got = transport.request("POST", "/x", (), body).read()
        assert got.endswith(body if isinstance(body, bytes) else data + b"more")
    assert server.connections == 2  # the refused one, and one for the rest


# Errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.Invalid),
        (401, errors.Unauthorized),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (405, errors.MethodNotAllowed),
        (409, errors.Conflict),
        (413, errors.TooLarge),
        (418, errors.Invalid),
        (421, errors.Misdirected),
        (500, errors.XsError),
        (503, errors.Unavailable),
        (507, errors.Full),
        (599, errors.XsError),
    ],
)
def test_an_error_comes_back_as_its_type_with_its_sentence(scripted, status, kind):
    def script(peer):
        peer.head()
        peer.answer("schlecht: ü\n".encode(), status, "Allow: GET", "Content-Type: text/plain")

    with pytest.raises(errors.XsError) as caught:
        Client(to(scripted(script))).version()
    assert type(caught.value) is kind and str(caught.value) == "schlecht: ü"
    if status == 405:
        assert caught.value.allow == "GET"


def test_an_error_without_a_sentence_tells_its_status(scripted):
    def script(peer):
        peer.head()
        peer.answer(b"", 502)

    with pytest.raises(errors.XsError, match="502"):
        Client(to(scripted(script))).version()


def test_a_condition_that_failed_brings_the_newest_frame(scripted):
    frames = [FRAME, b"null"]

    def script(peer):
        while head := peer.head():
            peer.body(head)
            peer.answer(frames.pop(0), 409, "Content-Type: application/json")

    store = Client(to(scripted(script)))
    with pytest.raises(errors.Conflict, match="03gw3h0000000000000000000") as caught:
        store.append("t", "x", if_last="none")
    assert caught.value.frame == FRAME
    with pytest.raises(errors.Conflict, match="has no frame") as caught:
        store.append("t", "x", if_last="03gw3h0000000000000000000")
    assert caught.value.frame == b"null"


# Targets and fields


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("notes.add", "notes.add"),
        ("a/b?c&d=e#f %", "a%2Fb%3Fc%26d%3De%23f%20%25"),
        ("é", "%C3%A9"),
        ("\udcff", "%FF"),
        ("", ""),
    ],
)
def test_text_is_percent_encoded_for_a_target(text, quoted):
    assert request.quote(text) == quoted


def test_parameters_that_are_none_are_left_out():
    assert request.with_query("/", [("a", None), ("b", 3), ("c", "x y")]) == "/?b=3&c=x%20y"
    assert request.with_query("/", [("a", None)]) == "/"


@pytest.mark.parametrize("text", ['{"a": [1.10, "b"]}', "null", '"x"', " 1 "])
def test_meta_in_printable_ascii_goes_as_it_is(text):
    assert request.meta_field(text) == ("xs-meta", text)


@pytest.mark.parametrize("text", ['{"a":"ü"}', '{\n"a":1}', '"\x7f"'])
def test_other_meta_goes_in_base64(text):
    import base64

    name, value = request.meta_field(text)
    assert name == "xs-meta" and base64.b64decode(value) == os.fsencode(text)


@pytest.mark.parametrize("key", ["", " a", "a\nb", "a\r\nX: y", "a\x00"])
def test_a_key_that_a_field_can_not_hold_is_refused(key):
    with pytest.raises(errors.Invalid):
        request.key_field(key)


def test_a_key_goes_as_its_utf8_bytes():
    assert request.key_field("ü") == ("idempotency-key", "ü".encode().decode("latin-1"))


def test_lines_are_found_however_the_blocks_are_cut():
    text = b"one\ntwo\n\nthree"
    for size in range(1, len(text) + 1):
        blocks = [text[at : at + size] for at in range(0, len(text), size)]
        assert list(request.split_lines(blocks)) == [b"one", b"two", b"three"]


# The store's words, on the wire


def asked(scripted, answer=FRAME, status=200):
    """A client, and the list of requests (head, body) that it makes."""
    requests = []

    def script(peer):
        while head := peer.head():
            requests.append((head.decode("latin-1"), peer.body(head)))
            peer.answer(answer, status)

    return Client(to(scripted(script))), requests


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        (None, b""),
        ("ü", "ü".encode()),
        (b"bytes", b"bytes"),
        (bytearray(b"array"), b"array"),
        (memoryview(b"view"), b"view"),
        (io.BytesIO(b"f" * 600_000), b"f" * 600_000),
        ([b"a", b"b"], b"ab"),
    ],
    ids=["none", "str", "bytes", "bytearray", "memoryview", "file", "iterable"],
)
def test_content_may_be_text_bytes_a_file_or_blocks(scripted, content, sent):
    store, requests = asked(scripted)
    frame = store.append("t", content)
    assert frame == xs.Frame("t", "03gw3h0000000000000000000", None, None, "forever")
    assert requests[0][1] == sent


@pytest.mark.parametrize("content", [["text"], io.StringIO("text"), [1], "\ud800"])
def test_content_that_is_not_bytes_is_refused(scripted, content):
    store, _ = asked(scripted)
    with pytest.raises(errors.Invalid):
        store.append("t", content)


def test_the_options_of_an_append_are_its_query_and_fields(scripted):
    store, requests = asked(scripted)
    store.append("a.b", meta={"k": "ü"}, ttl="last:3", if_last="none", key="k1")
    head = requests[0][0]
    assert head.startswith("POST /append/a.b?ttl=last%3A3&if-last=none HTTP/1.1\r\n")
    assert "\r\nxs-meta: eyJrIjoiw7wifQ==\r\n" in head
    assert "\r\nidempotency-key: k1\r\n" in head


@pytest.mark.parametrize("meta", [float("nan"), {1, 2}, object()])
def test_meta_that_is_no_json_is_refused(scripted, meta):
    store, requests = asked(scripted)
    with pytest.raises(errors.Invalid):
        store.append("t", meta=meta)
    assert not requests


def test_an_append_without_a_topic_is_refused(scripted):
    store, requests = asked(scripted)
    with pytest.raises(errors.Invalid):
        store.append("", "x")
    assert not requests


def test_the_options_of_cat_are_its_query(scripted):
    store, requests = asked(scripted, FRAME + b"\n" + FRAME)
    frame = next(store.cat())
    assert len(list(store.cat(after=frame, until="2h", topic="a.*", last=5, limit=3))) == 2
    list(store.cat(follow=True, new=True))
    list(store.cat(follow=100, from_=frame, with_content=True, with_timestamp=True))
    assert [head.split(" ")[1] for head, _ in requests] == [
        "/",
        f"/?after={frame.id}&until=2h&topic=a.%2A&last=5&limit=3",
        "/?follow=true&new=true",
        f"/?follow=100&from={frame.id}&with-timestamp=true&with-content=true",
    ]


def test_a_batch_is_sent_as_lines_of_json(scripted):
    store, requests = asked(scripted, b'{"appended":4,"first":"a","last":"b","errors":[]}')
    summary = store.append_many(
        [
            {"topic": "t", "content": "ü\n"},
            {"topic": "t", "content": b"\xff", "meta": {"a": None}},
            b'{"topic":"t"}\r\n',
            '{"topic":"u"}',
        ]
    )
    assert summary["appended"] == 4
    head, body = requests[0]
    assert "content-type: application/x-ndjson" in head
    assert body.endswith(b"\n") and [json.loads(line) for line in body.splitlines()] == [
        {"topic": "t", "content": "ü\n"},
        {"topic": "t", "content_base64": "/w==", "meta": {"a": None}},
        {"topic": "t"},
        {"topic": "u"},
    ]


def test_frames_that_were_read_can_be_imported(scripted):
    store, requests = asked(scripted, b'{"imported":1,"errors":[]}')
    frame = xs.Frame("t", "03gw3h0000000000000000000", None, {"a": 1}, "forever", None, b"\x00x")
    store.import_([frame])
    assert json.loads(requests[0][1]) == {
        "topic": "t",
        "id": frame.id,
        "hash": None,
        "meta": {"a": 1},
        "ttl": "forever",
        "content_base64": "AHg=",
    }


def test_none_is_what_is_not_there(scripted):
    store, _ = asked(scripted, b"no such frame", 404)
    assert store.get(FRAME[:0].decode() or "03gw3h0000000000000000000") is None
    assert store.first() is None and store.last("t") is None and store.head("t") is None
    assert store.first(n=3) == [] and store.last("t", 3) == []
    assert store.next("03gw3h0000000000000000000") is None
    assert store.remove("03gw3h0000000000000000000") is False
    with pytest.raises(errors.NotFound):
        store.cas("sha256-" + "A" * 43 + "=")


# The store's words, on stores


STORES = ["on its files", "through its server"]


@contextlib.contextmanager
def opened(kind, store_dir):
    if kind == "through its server":
        running = start_server(store_dir)
        try:
            with xs.open(store_dir) as found:
                yield found
        finally:
            running.stop()
    else:
        with Client(open_transport(store_dir, create=True)) as found:
            yield found


@pytest.fixture(params=STORES)
def store(request, store_dir):
    with opened(request.param, store_dir) as found:
        yield found


@pytest.fixture(scope="module", params=STORES)
def shared(request, tmp_path_factory):
    """One store of each kind, for the tests that need none of their own."""
    with opened(request.param, str(tmp_path_factory.mktemp("shared") / "store")) as found:
        yield found


def user_frames(store):
    return [frame for frame in store.cat() if not frame.topic.startswith("xs.")]


def test_what_was_appended_is_read_back(store):
    one = store.append("notes", "hello", meta={"a": [1, None]}, ttl="last:5")
    two = store.append("notes.sub", b"\x00\xff")
    three = store.append("notes")
    assert [one.topic, one.meta, one.ttl] == ["notes", {"a": [1, None]}, "last:5"]
    assert three.hash is None and three.ttl == "forever"
    assert user_frames(store) == [one, two, three]
    assert store.get(one.id) == one and store.get(one.id.upper()) == one
    assert store.next(one) == two and store.prev(three) == two
    assert store.next(one, "notes") == three and store.next(three) is None
    assert store.first("notes") == one and store.last() == three
    assert store.first("notes", 2) == [one, three] == store.last("notes", 2)
    assert store.last("notes", n=1) == [three] and store.last("none", n=1) == []
    assert store.head("notes") == three and store.head("none") is None
    assert store.content(one) == b"hello" and store.cas(two.hash) == b"\x00\xff"
    assert b"".join(store.content_blocks(two.id)) == b"\x00\xff"
    assert list(store.cat(topic="notes.*")) == [two]
    assert [f.content for f in store.cat(topic="notes", with_content=True)] == [
        "hello",
        None,
    ]
    assert store.remove(two) is True and store.remove(two) is False and store.get(two.id) is None


def test_a_large_content_makes_the_round_trip(store):
    data = os.urandom(3_000_000)
    frame = store.append("large", io.BytesIO(data))
    assert store.content(frame) == data
    assert store.cas_post(data) == frame.hash


def test_two_writers_can_not_both_win(store):
    first = store.append("t", "1", if_last="none")
    with pytest.raises(errors.Conflict) as caught:
        store.append("t", "2", if_last="none")
    assert xs.Frame.from_json(caught.value.frame) == first
    assert store.append("t", "2", if_last=first).id > first.id


def test_a_retry_with_the_same_key_does_not_double(store):
    assert store.append("t", "1", key="k") == store.append("t", "1", key="k")
    assert len(user_frames(store)) == 1


def test_a_batch_is_appended_and_its_wrong_lines_are_named(store):
    summary = store.append_many(
        [{"topic": "t", "content": b"\xff"}, {"topic": "no topic"}, {"topic": "t", "meta": 1}]
    )
    assert summary["appended"] == 2 and [e["line"] for e in summary["errors"]] == [2]
    first, last = user_frames(store)
    assert (summary["first"], summary["last"]) == (first.id, last.id)
    with pytest.raises(errors.Invalid):
        store.append_many([{"topic": "t"}, {"topic": "no topic"}], atomic=True)
    assert len(user_frames(store)) == 2


def test_a_follower_gets_history_a_threshold_and_what_comes(store):
    one = store.append("t", "1")
    frames = store.cat(follow=True, topic="t")
    assert next(frames) == one
    assert next(frames).topic == "xs.threshold"
    two = store.append("t", "2")
    assert next(frames) == two
    frames.close()


def test_a_stream_is_imported_as_it_was(store, tmp_path):
    store.append("a", "text", meta={"x": 1})
    store.append("b", b"\xff\x00")
    frames = user_frames(store)
    from xs.address import open_transport

    with Client(open_transport(str(tmp_path / "copy"), create=True)) as copy:
        lines = [f for f in store.cat(with_content=True) if not f.topic.startswith("xs.")]
        copy.import_(lines)
        assert list(copy.cat()) == frames
        assert [copy.content(f) for f in frames] == [b"text", b"\xff\x00"]


def test_a_wrong_argument_raises_at_the_call(store):
    store.append("t")
    with pytest.raises(errors.Invalid):
        store.cat(topic="not a topic")
    with pytest.raises(errors.Invalid):
        store.append("not a topic", "x")
    with pytest.raises(errors.Invalid):
        store.get("not an id")
    with pytest.raises(errors.Invalid):
        store.append("t", ttl="soon")


ZONELESS = datetime(2026, 1, 31)
WRONG = {
    "content(None)": (lambda s: s.content(None), "a frame or its id, not None: was nothing found?"),
    "get(None)": (lambda s: s.get(None), "was nothing found"),
    "remove(5)": (lambda s: s.remove(5), "a frame or its id, not 5"),
    "next([])": (lambda s: s.next([]), r"a frame or its id, not \[\]"),
    "after=5": (lambda s: s.cat(after=5), "a frame, an id or a time, not 5"),
    "from_=datetime": (lambda s: s.cat(from_=ZONELESS), r"datetime\.now\(timezone\.utc\)"),
    "until=date": (lambda s: s.cat(until=ZONELESS.date()), "2026-01-31T09:30:00Z"),
    "if_last=5": (lambda s: s.append("t", if_last=5), 'a frame, its id, or "none", not 5'),
    "key=5": (lambda s: s.append("t", key=5), "the key is text, not 5"),
    "meta=half": (lambda s: s.append("t", meta="\ud800"), "meta has text that is not UTF-8"),
    "meta=path": (lambda s: s.append("t", meta=[os.fsdecode(b"\xff")]), r"os\.fsdecode makes"),
    "meta=set": (lambda s: s.append("t", meta={1}), "meta can't be written as JSON"),
    "append(5)": (lambda s: s.append(5), "the topic is text, not 5"),
    "append(half)": (lambda s: s.append("\ud800"), "half of a surrogate pair"),
    "append(t, 5)": (lambda s: s.append("t", 5), r"not 5: give json\.dumps of a value, or put it"),
    "append(t, {})": (lambda s: s.append("t", {}), r"not {}: give json\.dumps"),
    "append(t, {...})": (lambda s: s.append("t", {"x": 1}), r"not {'x': 1}: give json\.dumps"),
    "append(t, [1])": (lambda s: s.append("t", [1]), r"not 1: give json\.dumps"),
    "append(t, [...])": (lambda s: s.append("t", [{"x": 1}]), r"not {'x': 1}: give json\.dumps"),
    "append(t, chunked)": (lambda s: s.append("t", {"x": 1}, chunked=True), r"json\.dumps"),
    "append(t, file)": (lambda s: s.append("t", io.StringIO("a")), "open a file in binary mode"),
    "cas_post({})": (lambda s: s.cas_post({}), r"json\.dumps"),
    "cas(5)": (lambda s: s.cas(5), "the hash is text, not 5"),
    "last(2)": (lambda s: s.last(2), r"last\(n=2\) is of all topics"),
    "first(b)": (lambda s: s.first(b"t"), "the topic is text, not b't'"),
    "head(5)": (lambda s: s.head(5), "the topic is text, not 5"),
    "topic=[...]": (lambda s: s.cat(topic=["a", "b"]), "several go with commas between"),
    "append_many(tuple)": (lambda s: s.append_many([("a", "b")]), "number 1 is neither a mapping"),
    "append_many(5)": (lambda s: s.append_many([5]), "number 1 is neither a mapping"),
    "append_many(one)": (lambda s: s.append_many({"topic": "t"}), "give many"),
    "append_many(set)": (
        lambda s: s.append_many([{"topic": "t", "meta": {1}}]), "number 1 can't be written as JSON"
    ),
    "import_(path)": (lambda s: s.import_("dump.jsonl"), r"not 'dump\.jsonl'.*open\(path"),
    "import_(Path)": (lambda s: s.import_(Path("dump.jsonl")), r'open\(path, "rb"\)'),
    "import_(frame)": (lambda s: s.import_(s.last()), "give many"),
    "eval(5)": (lambda s: s.eval(5), "a script is text or bytes, not 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_argument_is_told_with_what_would_be_right(shared, name):
    shared.append("t", "one")
    before = [frame for frame in shared.cat() if frame.topic == "t"]
    act, says = WRONG[name]
    with pytest.raises(errors.Invalid, match=says) as caught:
        act(shared)
    assert "\n" not in str(caught.value)
    assert [frame for frame in shared.cat() if frame.topic == "t"] == before


@pytest.mark.parametrize("chunked", [False, True])
def test_content_may_be_whatever_can_be_read(store, chunked):
    class OnlyRead:
        def __init__(self) -> None:
            self.read = io.BytesIO(b"abc").read

    for content in (OnlyRead(), io.BytesIO(b"abc"), [b"a", b"bc"]):
        assert store.content(store.append("t", content, chunked=chunked)) == b"abc"


def test_text_that_is_no_utf8_is_refused_by_itself_amid_many(store):
    half = os.fsdecode(b"caf\xe9")
    summary = store.append_many(
        [{"topic": "t", "meta": half}, {"topic": "t", "content": half}, {"topic": "t"}]
    )
    assert summary["appended"] == 1 and [each["line"] for each in summary["errors"]] == [1, 2]
    assert all("half of a surrogate pair" in each["error"] for each in summary["errors"])


def test_a_time_may_be_a_datetime_with_its_zone(store):
    frame = store.append("t")
    zone = timezone(timedelta(hours=5, minutes=30))
    before, after = (datetime.now(zone) + timedelta(hours=n) for n in (-1, 1))
    assert list(store.cat(topic="t", from_=before, until=after)) == [frame]
    assert list(store.cat(topic="t", after=after)) == list(store.cat(topic="t", until=before)) == []


def test_the_version_is_that_of_the_package(store):
    store.append("t")
    assert store.version() == xs.__version__


def test_the_documentation_of_the_client_is_true(tmp_path: Path):
    found = doctest.DocTestFinder().find(Client, "Client", globs={"directory": str(tmp_path / "s")})
    runner = doctest.DocTestRunner()
    for test in found:
        runner.run(test)
    assert runner.tries and not runner.failures
