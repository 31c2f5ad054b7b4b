"""The API on sockets: a real `xs serve`, met as its users and as an attacker meet it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path

import http1_corpus
import pytest
from conftest import DEADLINE, Server, environment, open_files, start_server, until
from stores import together
from wire import Wire, chunked, request

from xs import grants, tokens
from xs.httpd import Limits
from xs.server import Running

NDJSON = "application/x-ndjson"


def status_of(server: Server, name: str) -> int:
    """A number in /proc/PID/status, such as VmRSS in KiB."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(name + ":")).split()[1])


def high_water(server: Server) -> int:
    """The most memory that the server has had, in KiB."""
    return status_of(server, "VmHWM")


def descriptors(server: Server) -> int:
    return open_files(server.process.pid, server.directory)


def let_one_follow(server: Server) -> None:
    """Lets a first follower come and go: what delivery needs stays from then on."""
    before = descriptors(server)
    with Wire(server.directory) as wire:
        wire.send(request("GET", "/?follow=10&new"))
        wire.head()
        until(lambda: b"xs.pulse" in wire.chunk())  # which is sent to who has caught up
    until(lambda: descriptors(server) <= before + 4)


def frames(server: Server, topic: str = "*") -> list[dict[str, object]]:
    with Wire(server.directory) as wire:
        body = wire.ask("GET", f"/?topic={topic}").body
    return [json.loads(line) for line in body.splitlines()]


# One connection, many requests


def test_a_connection_is_kept_for_many_requests(shared: Server) -> None:
    with Wire(shared.directory) as wire:
        for n in range(50):
            made = wire.ask("POST", "/append/kept", b"%d" % n)
            assert made.status == 200 and "connection" not in made.fields
            assert wire.ask("GET", "/last/kept").body == made.body
            assert wire.ask("GET", "/nowhere/x").status == 404
            assert wire.ask("POST", "/append/0bad", b"a body that nobody wants").status == 400


def test_requests_in_the_same_words_are_each_judged_anew(shared: Server) -> None:
    with Wire(shared.directory) as wire:
        ids = []
        for body in (b"one", b"two", b"six"):
            made = wire.ask("POST", "/append/same.words", body, xs_meta='{"a":1}')
            ids.append(json.loads(made.body)["id"])
            assert wire.ask("GET", f"/content/{ids[-1]}").body == body
        # Directly one after the other, the last one in two pieces, and then others between them.
        words = request("POST", "/append/same.words", b"abc")[:-3]
        for body in (b"one", b"two"):
            wire.send(words + body)
            made = wire.answer()
            assert made.status == 200
            ids.append(json.loads(made.body)["id"])
        wire.send(words + b"s")
        wire.send(b"ix" + words + b"ten" + words + b"end")
        ids += [json.loads(wire.answer().body)["id"] for _ in range(3)]
        assert ids == sorted(ids)
        contents = [wire.ask("GET", f"/content/{each}").body for each in ids]
        assert contents == [b"one", b"two", b"six", b"one", b"two", b"six", b"ten", b"end"]
        found = frames(shared, "same.words")
        assert [each["meta"] for each in found] == [{"a": 1}] * 3 + [None] * 5
        for body in (b"", b"", b""):
            made = wire.ask("POST", "/append/same.empty", body)
            assert json.loads(made.body)["hash"] is None
        answers = [
            wire.ask("POST", "/append/same.first?if-last=none", body).status
            for body in (b"one", b"two", b"six")
        ]
        assert answers == [200, 409, 409]
        made_once = {
            wire.ask("POST", "/append/same.key", body, idempotency_key="k").body
            for body in (b"one", b"two", b"six")
        }
        assert len(made_once) == 1
        for body in (b"one", b"two", b"six"):
            wire.ask("POST", "/append/same.last?ttl=last:1", body)
        assert len(frames(shared, "same.last")) == 1
        for _ in range(2):
            assert wire.ask("POST", "/append/xs.words", b"one").status == 400


def test_chunked_bodies_in_the_same_words_are_each_taken_as_they_come(shared: Server) -> None:
    words = request("POST", "/append/same.chunked", transfer_encoding="chunked")
    large = b"x" * 200_000  # more than lies in the index: a file
    with Wire(shared.directory) as wire:
        for body in (b"small", large, b"small"):
            wire.send(words + chunked(body))
            made = wire.answer()
            assert made.status == 200
            assert wire.ask("GET", f"/content/{json.loads(made.body)['id']}").body == body
            wire.send(words + chunked(body))  # directly behind an append, too
            wire.send(words + chunked(body))
            assert [wire.answer().status for _ in range(2)] == [200, 200]
        wire.send(words + b"5\r\nsmall\r\nno size\r\n")
        assert wire.answer().status == 400
    digest = hashlib.sha256(large).hexdigest()
    files = [p for p in Path(shared.directory, "cas").rglob("*") if p.is_file()]
    assert [p.stat().st_size for p in files if digest[4:] in p.name] == [len(large)]


def test_connection_close_is_honoured_after_each_kind_of_answer(shared: Server) -> None:
    requests = [
        ("GET", "/version", None),
        ("GET", "/", None),
        ("POST", "/append/t", b"x"),
        ("POST", "/cas", b"x"),
        ("GET", "/nowhere/x", None),
        ("GET", "/?limit=0", None),
        ("HEAD", "/", None),
    ]
    for method, target, body in requests:
        with Wire(shared.directory) as wire:
            assert (
                wire.ask(method, target, body, connection="close").fields["connection"] == "close"
            )
            assert wire.is_ended()


def test_each_answer_but_an_interim_one_has_its_date(shared: Server) -> None:
    asked = [("GET", "/version"), ("POST", "/append/dated"), ("GET", "/last/dated"), ("GET", "/")]
    asked += [
        ("HEAD", "/"),
        ("GET", "/nowhere/x"),
        ("PUT", "/version"),
        ("GET", "/?follow&limit=1"),
    ]
    with Wire(shared.directory) as wire:
        for method, target in asked:
            before = int(time.time())
            answer = wire.ask(method, target, b"x" if method == "POST" else None)
            at = parsedate_to_datetime(answer.fields["date"])
            assert before <= at.timestamp() <= time.time(), target
            assert answer.fields["date"] == format_datetime(at, usegmt=True)
    with Wire(shared.directory) as wire:
        wire.send(b"NO\x00NSENSE\r\n\r\n")
        assert "date" in wire.answer().fields


def test_pipelined_requests_are_answered_in_their_order(shared: Server) -> None:
    def talk(topic: str) -> None:
        with Wire(shared.directory) as wire:
            sent = []
            for n in range(100):
                sent.append(request("POST", f"/append/{topic}", b"%d" % n))
                if n % 3 == 0:
                    sent.append(request("GET", f"/last/{topic}"))
                if n % 7 == 0:
                    sent.append(request("GET", "/no/where"))
            wire.send(b"".join(sent))
            newest = ""
            for n in range(100):
                made = wire.answer()
                assert made.status == 200
                frame = json.loads(made.body)
                assert frame["id"] > newest
                newest = frame["id"]
                if n % 3 == 0:
                    assert wire.answer().body == made.body
                if n % 7 == 0:
                    assert wire.answer().status == 404
        contents = frames(shared, topic)
        assert len(contents) == 100

    together(8, lambda n: talk(f"piped{n}"))


def test_a_request_may_come_byte_by_byte(shared: Server) -> None:
    with Wire(shared.directory) as wire:
        text = request("POST", "/append/t", b"slow") + request(
            "POST", "/append/t", chunked(b"sl", b"ow"), transfer_encoding="chunked"
        )
        for n in range(len(text)):
            wire.send(text[n : n + 1])
        first, second = wire.answer(), wire.answer()
        assert first.status == second.status == 200
        assert json.loads(first.body)["hash"] == json.loads(second.body)["hash"]


def test_bodies_go_chunked_both_ways(shared: Server) -> None:
    with Wire(shared.directory) as wire:
        blocks = [os.urandom(n) for n in (1, 10, 70_000, 16)]
        put = wire.ask("POST", "/cas", chunked(*blocks), transfer_encoding="chunked")
        assert put.status == 200
        got = wire.ask("GET", f"/cas/{put.body.decode()}")
        assert got.body == b"".join(blocks)
        assert got.fields["content-length"] == str(len(got.body))
        listing = wire.ask("GET", "/")
        assert listing.fields["transfer-encoding"] == "chunked"
        assert "content-length" not in listing.fields


def test_an_empty_chunked_body_is_no_content(shared: Server) -> None:
    with Wire(shared.directory) as wire:
        made = wire.ask("POST", "/append/t", chunked(), transfer_encoding="chunked")
        assert json.loads(made.body)["hash"] is None


# Expect: 100-continue (RFC 9110 §10.1.1)


def test_who_expects_it_is_told_to_continue(shared: Server) -> None:
    with Wire(shared.directory) as wire:
        for n in range(2):
            head = request("POST", "/append/t", expect="100-continue", content_length="5")
            wire.send((request("GET", "/version") + head) if n else head)
            if n:
                assert wire.answer().status == 200
            assert wire.head() == (100, {})
            wire.send(b"hello")
            assert wire.answer().status == 200


def test_who_is_refused_is_not_told_to_continue(shared: Server) -> None:
    with Wire(shared.directory) as wire:
        wire.send(request("POST", "/append/0", expect="100-continue", content_length="5"))
        answer = wire.answer()
        assert (answer.status, answer.fields["connection"]) == (400, "close")


def test_curl_appends_a_large_body_and_reads_it_back(shared: Server, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(3_000_000))
    curl = ["curl", "-sS", "--fail", "--unix-socket", os.path.join(shared.directory, "sock")]
    made = subprocess.run(
        [*curl, "--data-binary", f"@{tmp_path / 'large'}", "http://localhost/append/curl"],
        stdout=subprocess.PIPE,
        check=True,
    )
    frame = json.loads(made.stdout)
    got = subprocess.run(
        [*curl, f"http://localhost/cas/{frame['hash']}"], stdout=subprocess.PIPE, check=True
    )
    assert got.stdout == (tmp_path / "large").read_bytes()


# HTTP/1.0 and HEAD


def test_http_1_0_gets_a_body_that_the_connection_s_end_ends(shared: Server) -> None:
    with Wire(shared.directory) as wire:
        made = wire.ask("POST", "/append/old", b"x")
    with Wire(shared.directory) as wire:
        wire.send(b"GET /stream/old HTTP/1.0\r\n\r\n")
        status, fields = wire.head()
        assert (status, fields["connection"]) == (200, "close")
        assert "transfer-encoding" not in fields
        assert wire.rest() == made.body


def test_http_1_0_may_keep_its_connection(shared: Server) -> None:
    with Wire(shared.directory) as wire:
        for _ in range(2):
            wire.send(b"GET /version HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert wire.answer().fields["connection"] == "keep-alive"
        wire.send(b"GET /version HTTP/1.0\r\n\r\n")
        assert wire.answer().fields["connection"] == "close"
        assert wire.is_ended()


def test_http_1_0_hears_whether_its_connection_is_kept_whatever_is_answered(
    shared: Server,
) -> None:
    # Kept and not told so, a client waits for the connection's end; told of an end, for that.
    with Wire(shared.directory) as wire:
        whole = json.loads(wire.ask("POST", "/append/old", b"x" * 100_000).body)["id"]
        chunked = json.loads(wire.ask("POST", "/append/old?chunked", b"x").body)["id"]
    for method in ("GET", "HEAD"):
        with Wire(shared.directory) as wire:
            ask = f"{method} /content/%s HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
            for _ in range(2):
                wire.send((ask % whole).encode())
                answer = wire.answer(method)
                assert answer.fields["connection"] == "keep-alive"
                assert answer.fields["content-length"] == "100000"
            wire.send((ask % chunked).encode())
            assert wire.head()[1]["connection"] == "close"
            assert wire.rest() == (b"x" if method == "GET" else b"")


def test_head_is_get_without_its_body(shared: Server) -> None:
    with Wire(shared.directory) as wire:
        made = json.loads(wire.ask("POST", "/append/t", b"x" * 100_000).body)
        for target in (
            "/",
            "/version",
            f"/{made['id']}",
            "/last/t",
            f"/cas/{made['hash']}",
            f"/content/{made['id']}",
            "/nowhere/x",
            "/?limit=0",
        ):
            get = wire.ask("GET", target)
            head = wire.ask("HEAD", target)
            assert head.status == get.status, target
            assert {**head.fields, "date": ""} == {**get.fields, "date": ""}, target
        wire.send(request("HEAD", "/?follow"))
        assert wire.head()[0] == 200
        assert wire.is_ended()


# Bodies that break


BROKEN = {
    "short": request("POST", "/append/broken", content_length="9") + b"12345",
    "chunk cut": request("POST", "/append/broken", transfer_encoding="chunked") + b"5\r\n123",
    "no last chunk": request("POST", "/append/broken", transfer_encoding="chunked")
    + b"5\r\n12345\r\n",
    "no end of trailer": request("POST", "/append/broken", transfer_encoding="chunked")
    + b"5\r\n12345\r\n0\r\n",
    "bad size": request("POST", "/append/broken", transfer_encoding="chunked")
    + b"5\r\n12345\r\nx\r\n",
    "bad end": request("POST", "/append/broken", transfer_encoding="chunked") + b"5\r\n123456",
    "large and short": request("POST", "/append/broken", content_length="300000") + b"x" * 200000,
    "cas": request("POST", "/cas", content_length="9") + b"12345",
    "import": request("POST", "/import", content_length="99999")
    + b'{"topic":"broken","id":"03d000000000000000000000a"}',
    "atomic": request("POST", "/append?atomic", content_type=NDJSON, content_length="99999")
    + b'{"topic":"broken"}\n',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_body_that_breaks_off_is_refused_and_nothing_is_stored(shared: Server, name: str) -> None:
    with Wire(shared.directory) as wire:
        wire.send(BROKEN[name])
        wire.half_close()
        answer = wire.answer()
        assert (answer.status, answer.fields["connection"]) == (400, "close")
        assert answer.body.startswith((b"the body broke off", b"the body is broken: "))
        assert wire.is_ended()
    assert frames(shared, "broken") == []
    assert not [n for n in os.listdir(shared.directory + "/cas") if n.startswith("new-")]


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_of_a_batch_that_breaks_off_the_whole_lines_are_kept_and_the_client_is_told(
    server: Server, framing: str
) -> None:
    lines = b'{"topic":"a"}\n{"topic":"b"}\nnonsense\n{"topic":"c"}\n{"topic":'
    with Wire(server.directory) as wire:
        if framing == "length":
            body = lines
            wire.send(request("POST", "/append", content_type=NDJSON, content_length="9999"))
        else:
            body = chunked(lines)[:-5]
            wire.send(request("POST", "/append", content_type=NDJSON, transfer_encoding="chunked"))
        wire.send(body)
        wire.half_close()
        answer = wire.answer()
        assert answer.status == 400
        assert answer.body == b"the body broke off: 3 whole lines of it are kept\n"
        assert wire.is_ended()
    assert [f["topic"] for f in frames(server)] == ["xs.start", "a", "b", "c"]


def test_a_client_may_wait_for_each_line_s_answer_before_it_sends_the_next(
    server: Server,
) -> None:
    with Wire(server.directory) as wire:
        wire.send(request("POST", "/append?each", content_type=NDJSON, transfer_encoding="chunked"))
        for n in range(10):
            line = b'{"topic":"t","meta":%d}\n' % n
            wire.send(b"%x\r\n%b\r\n" % (len(line), line))
            if n == 0:
                assert wire.head()[0] == 200
            assert json.loads(wire.chunk())["meta"] == n
        wire.send(b"0\r\n\r\n")
        assert wire.chunk() == b""


def test_an_answer_to_each_line_breaks_off_with_its_body(server: Server) -> None:
    with Wire(server.directory) as wire:
        wire.send(request("POST", "/append?each", content_type=NDJSON, transfer_encoding="chunked"))
        for n in range(3):
            line = b'{"topic":"t","meta":%d}\n' % n
            wire.send(b"%x\r\n%b\r\n" % (len(line), line))
        assert wire.head()[0] == 200
        got = b""
        while got.count(b"\n") < 3:
            got += wire.chunk()
        assert [json.loads(line)["meta"] for line in got.splitlines()] == [0, 1, 2]
        wire.send(b"5\r\n{")
        wire.half_close()
        with pytest.raises(EOFError):
            wire.chunk()
    assert len(frames(server, "t")) == 3


# Attacks


@pytest.mark.parametrize("name", http1_corpus.REFUSED)
def test_an_attack_is_refused_with_its_status_and_the_server_lives(
    shared: Server, name: str
) -> None:
    status, data = http1_corpus.REFUSED[name]
    if name in ("one field too large", "endless fields"):
        data = data.replace(b"\r\nA: ", b"\r\nA: " + b"b" * Limits.head_bytes, 1)
    stored = len(frames(shared, "t"))
    earlier = int(name in ("second request bad", "bytes after a body"))
    with Wire(shared.directory) as wire:
        wire.send(data)
        wire.half_close()
        answers = []
        while True:
            try:
                answers.append(wire.answer())
            except EOFError:
                break
        assert [answer.status for answer in answers[:earlier]] == [200] * earlier
        assert [answer.status for answer in answers[earlier:]] == [status]
        assert answers[-1].fields["connection"] == "close"
        assert answers[-1].fields["content-type"].startswith("text/plain")
    assert len(frames(shared, "t")) == stored + (name == "bytes after a body")


@pytest.mark.parametrize("name", http1_corpus.ACCEPTED)
def test_what_is_unusual_but_right_is_answered(shared: Server, name: str) -> None:
    with Wire(shared.directory) as wire:
        wire.send(http1_corpus.ACCEPTED[name])
        wire.half_close()
        answers = []
        while True:
            try:
                answers.append(wire.answer())
            except EOFError:
                break
    assert answers and all(a.status in (100, 200, 404, 405, 400, 501) for a in answers)
    if "pipelined" in name:
        assert len(answers) == 3


def test_what_follows_a_refused_request_is_never_read_as_one(shared: Server) -> None:
    smuggled = request("POST", "/append/smuggled", b"x")
    attacks = [
        b"POST /append/t HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"
        b"\r\n\r\n0\r\n\r\n" + smuggled,
        request("POST", "/append/t", transfer_encoding="chunked") + b"x\r\n" + smuggled,
        request("POST", "/append/0bad", expect="100-continue", content_length="4") + smuggled,
        request("POST", "/append/0bad", content_length="10000000") + smuggled,
        request("GET", "/?follow") + smuggled,
        request("GET", "/version", connection="close") + smuggled,
        request("POST", "/append/0bad", transfer_encoding="chunked") + smuggled,
    ]
    for attack in attacks:
        with Wire(shared.directory) as wire:
            wire.send(attack)
            wire.half_close()
            if b"follow" not in attack:
                wire.rest()
            else:
                wire.head()
    assert frames(shared, "smuggled") == []


# Time limits


def test_a_head_that_is_not_whole_in_time_is_refused(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "head_seconds", 0.2)
    with Wire(running.root.folder) as wire:
        wire.send(b"GET / HTTP/1.1\r\n")
        answer = wire.answer()
        assert (answer.status, answer.fields["connection"]) == (408, "close")
        assert wire.is_ended()


def test_a_head_that_trickles_in_is_refused_all_the_same(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "head_seconds", 0.2)
    with Wire(running.root.folder) as wire:
        wire.send(b"GET / HTTP/1.1\r\nA: ")
        started = time.monotonic()
        while not select.select([wire.sock], [], [], 0.02)[0]:
            wire.send(b"b")
            assert time.monotonic() < started + DEADLINE
        assert wire.answer().status == 408


def test_a_pause_in_a_head_does_not_begin_its_time_anew(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "head_seconds", 2.0)
    with Wire(running.root.folder) as wire:
        started = time.monotonic()
        wire.send(b"G")
        assert not select.select([wire.sock], [], [], 1.8)[0]
        wire.send(b"E")
        assert wire.answer().status == 408
        assert time.monotonic() - started < 3.5  # and not 3.8 or more


def test_an_idle_connection_is_closed_without_a_word(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "idle_seconds", 0.2)
    with Wire(running.root.folder) as wire:
        assert wire.ask("GET", "/version").status == 200
        assert wire.is_ended()


def test_a_slow_head_on_a_kept_connection_does_not_shorten_its_idle_time(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "head_seconds", 0.1)
    with Wire(running.root.folder) as wire:
        wire.send(b"GET /version HTTP/1.1\r\nHost: a\r\n")
        wire.send(b"\r\n")
        assert wire.answer().status == 200
        assert not select.select([wire.sock], [], [], 0.25)[0]
        assert wire.ask("GET", "/version").status == 200


def test_a_slow_body_is_waited_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "head_seconds", 0.05)
    monkeypatch.setattr(Limits, "idle_seconds", 0.05)
    with Wire(running.root.folder) as wire:
        wire.send(request("POST", "/append/t", content_length="2") + b"a")
        assert not select.select([wire.sock], [], [], 0.2)[0]
        wire.send(b"b")
        assert wire.answer().status == 200


def test_who_is_refused_is_answered_though_the_body_does_not_come(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "linger_seconds", 0.1)
    with Wire(running.root.folder) as wire:
        wire.send(request("POST", "/append/0bad", content_length="1000"))
        answer = wire.answer()
        assert (answer.status, answer.fields["connection"]) == (400, "close")
        assert wire.is_ended()
    with Wire(running.root.folder) as wire:  # a body that trickles in does not hold it longer
        wire.send(request("POST", "/append/0bad", content_length="100000"))
        started = time.monotonic()
        while not select.select([wire.sock], [], [], 0.02)[0]:
            wire.send(b"b")
            assert time.monotonic() < started + 5
        assert wire.answer().status == 400


# Clients that don't behave


def test_who_is_refused_while_sending_can_read_the_answer(shared: Server) -> None:
    for target in ("/append/0bad", "/nowhere/x", "/append"):
        with Wire(shared.directory) as wire:
            wire.send(request("POST", target, content_length="60000000"))
            try:
                for _ in range(60):
                    wire.send(b"x" * 1_000_000)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has had enough
            answer = wire.answer()
            assert answer.status in (400, 404)
            assert answer.fields["connection"] == "close"


def test_a_client_that_never_reads_costs_a_bounded_amount_of_memory(server: Server) -> None:
    before = status_of(server, "VmRSS")
    with Wire(server.directory) as wire:
        wire.sock.settimeout(1.0)
        for piece in (request("POST", "/append/t", b"x" * 50) * 200, request("GET", "/") * 200):
            try:
                for _ in range(100):
                    wire.send(piece)
            except socket.timeout:
                pass  # the server reads no more: what is unread fills the sockets' own buffers
        with Wire(server.directory) as other:
            assert other.ask("POST", "/append/other", b"x").status == 200
        assert status_of(server, "VmRSS") - before < 32_000
    until(lambda: status_of(server, "Threads") <= 8)


def test_a_client_that_reads_late_gets_all_its_answers_in_order(server: Server) -> None:
    count = 4000
    with Wire(server.directory) as wire:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one = request("POST", "/append/t", b"x")

        def send() -> None:
            wire.send(one * count)
            wire.half_close()

        sender = threading.Thread(target=send)
        sender.start()
        sender.join(0.2)  # it can't finish before anything is read
        newest = ""
        for _ in range(count):
            answer = wire.answer()
            assert answer.status == 200
            frame_id = json.loads(answer.body)["id"]
            assert frame_id > newest
            newest = frame_id
        assert wire.is_ended()
        sender.join(DEADLINE)


def line_of(wire: Wire) -> bytes:
    """A frame, which may come in several chunks if its content is large."""
    data = b""
    while not data.endswith(b"\n"):
        data += wire.chunk()
    return data


@pytest.mark.parametrize("way", ["tcp, without a token", "unix"])
def test_who_takes_no_answers_is_left_and_who_reads_a_body_slowly_is_not(
    store_dir: str, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(Limits, "written_seconds", 0.2)
    running = Running(store_dir, [":0"], [])
    try:
        with Wire(store_dir) as content, Wire(store_dir) as stream, Wire(store_dir) as live:
            data = os.urandom(3_000_000)
            made = json.loads(live.ask("POST", "/append/t", data).body)
            live.send(request("GET", "/?follow&with-content&topic=t"))
            content.send(request("GET", f"/content/{made['id']}"))
            stream.send(request("GET", "/?with-content&topic=t"))
            assert [wire.head()[0] for wire in (live, content, stream)] == [200] * 3
            port = int(running.root.exposed[0].rpartition(":")[2])
            with Wire(store_dir if way == "unix" else port) as deaf, pytest.raises(ConnectionError):
                while True:
                    deaf.send(request("GET", "/last") * 100)
            # By now the three have taken nothing for longer than that.
            assert content.exactly(len(data)) == data
            whole = base64.b64encode(data).decode()
            assert json.loads(line_of(stream))["content_base64"] == whole
            assert json.loads(line_of(live))["content_base64"] == whole
            assert json.loads(live.chunk())["topic"] == "xs.threshold"
    finally:
        running.stop()


def test_half_closed_clients_get_every_answer(server: Server) -> None:
    """Also when another connection's thread leads their commit."""

    def talk(n: int) -> None:
        for k in range(20):
            with Wire(server.directory) as wire:
                wire.send(request("POST", f"/append/half{n}", b"%d" % k) * 3)
                wire.half_close()
                for _ in range(3):
                    assert wire.answer().status == 200
                assert wire.is_ended()

    together(16, talk)


def test_netcat_that_sends_no_more_gets_its_answers_and_follows(server: Server) -> None:
    path = os.path.join(server.directory, "sock")
    asked = request("POST", "/append/t", b"x") + request("GET", "/", connection="close")
    done = subprocess.run(
        ["nc", "-N", "-U", path], input=asked, stdout=subprocess.PIPE, timeout=DEADLINE, check=True
    )
    assert done.stdout.count(b"HTTP/1.1 200 OK") == 2
    follow = subprocess.Popen(
        ["nc", "-N", "-U", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert follow.stdin is not None and follow.stdout is not None
    follow.stdin.write(b"GET /?new&topic=live&follow HTTP/1.0\r\n\r\n")
    follow.stdin.close()
    for line in follow.stdout:
        if line == b"\r\n":
            break
    with Wire(server.directory) as wire:
        for _ in range(3):
            made = wire.ask("POST", "/append/live")
            assert follow.stdout.readline() == made.body
    follow.kill()
    follow.wait()
    follow.stdout.close()


def test_connections_that_come_and_go_leave_nothing_behind(server: Server) -> None:
    let_one_follow(server)
    until(lambda: status_of(server, "Threads") <= 8)
    threads, files = status_of(server, "Threads"), descriptors(server)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    count = min(2000, hard - 200)
    for half in (b"", b"GET / HTTP/1.1\r\n", request("GET", "/?follow&new")):
        wires = [Wire(server.directory) for _ in range(count)]
        for one in wires:
            if half:
                one.send(half)
        with Wire(server.directory) as wire:
            assert wire.ask("POST", "/append/t").status == 200
        for one in wires:
            one.sock.close()
        until(lambda: descriptors(server) <= files)
        until(lambda: status_of(server, "Threads") <= threads)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_above_the_limit_of_connections_a_client_is_asked_to_come_back(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "connections", 3)
    wires = [Wire(running.root.folder) for _ in range(3)]
    for wire in wires:
        assert wire.ask("GET", "/version").status == 200
    with Wire(running.root.folder) as late:
        answer = late.answer()
        assert (answer.status, answer.fields["retry-after"]) == (503, "1")
        assert answer.body == b"too many connections are open here: try again in a moment\n"
        assert late.is_ended()
    wires.pop().sock.close()

    def is_served() -> bool:
        with Wire(running.root.folder) as again:
            try:
                return again.ask("GET", "/version").status == 200
            except OSError:
                return False

    until(is_served)
    for wire in wires:
        assert wire.ask("GET", "/version").status == 200
        wire.sock.close()


def test_who_fills_a_tcp_address_does_not_lock_the_owner_out(
    store_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "connections", 20)
    running = Running(store_dir, [":0"], [])
    try:
        port = int(running.root.exposed[0].rpartition(":")[2])
        strangers = [Wire(port) for _ in range(20)]
        assert [wire.answer().status for wire in strangers[15:]] == [503] * 5
        owners = [Wire(store_dir) for _ in range(5)]
        for wire in owners:
            assert wire.ask("POST", "/append/t", b"x").status == 200
        with Wire(store_dir) as late:  # the whole is bounded as ever
            assert late.answer().status == 503
        for wire in strangers + owners:
            wire.sock.close()
    finally:
        running.stop()


def test_a_server_with_few_descriptors_refuses_and_goes_on(store_dir: str) -> None:
    process = subprocess.Popen(
        ["sh", "-c", f"ulimit -n 100; exec {sys.executable} -m xs serve {store_dir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.readline()
    server = Server(store_dir, process)
    try:
        with Wire(store_dir) as kept:
            assert kept.ask("POST", "/append/t", b"x" * 50_000).status == 200
            crowd = [Wire(store_dir) for _ in range(150)]
            # Who is in can work, and the listener does not spin on what it can't take.
            assert kept.ask("POST", "/append/t", b"y" * 50_000).status == 200
            used = cpu_seconds(server)
            assert not select.select([kept.sock], [], [], 0.25)[0]
            assert cpu_seconds(server) - used < 0.15
            for wire in crowd:
                wire.sock.close()
            assert kept.ask("POST", "/append/t", b"z" * 50_000).status == 200

        def is_served() -> bool:
            with Wire(store_dir) as again:
                try:
                    return again.ask("GET", "/version").status == 200
                except (OSError, EOFError):
                    return False

        until(is_served)
    finally:
        server.stop()


def cpu_seconds(server: Server) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Large things in little memory


def test_two_hundred_megabytes_go_in_and_out_in_little_memory(server: Server) -> None:
    block = os.urandom(1 << 20)
    count = 200
    with Wire(server.directory) as wire:
        wire.ask("POST", "/cas", block)
        before = high_water(server)
        wire.send(request("POST", "/cas", content_length=str(count << 20)))
        for _ in range(count):
            wire.send(block)
        put = wire.answer()
        assert put.status == 200
        wire.send(request("GET", f"/cas/{put.body.decode()}"))
        status, fields = wire.head()
        assert (status, fields["content-length"]) == (200, str(count << 20))
        for _ in range(count):
            assert wire.exactly(1 << 20) == block
        assert wire.ask("GET", "/version").status == 200
    assert high_water(server) - before < 16_000


def test_many_lines_go_in_and_out_in_little_memory(server: Server) -> None:
    line = b'{"topic":"t"}\n'
    block = line * 10_000
    with Wire(server.directory) as wire:
        wire.send(request("POST", "/append", block, content_type=NDJSON))
        assert json.loads(wire.answer().body)["appended"] == 10_000
        before = high_water(server)
        wire.send(
            request("POST", "/append", content_type=NDJSON, content_length=str(30 * len(block)))
        )
        for _ in range(30):
            wire.send(block)
        answer = json.loads(wire.answer().body)
        assert (answer["appended"], answer["errors"]) == (300_000, [])
        assert high_water(server) - before < 48_000
        # And out again, to one who reads nothing for a while.
        before = high_water(server)
        wire.send(request("GET", "/?follow&limit=300000"))
        assert wire.head()[0] == 200
        seen = 0
        while block := wire.chunk():
            seen += block.count(b"\n")
        assert seen == 300_000
    assert high_water(server) - before < 16_000


# Following


def test_a_follower_gets_its_head_at_once_then_the_threshold_then_what_comes(
    server: Server,
) -> None:
    with Wire(server.directory) as wire, Wire(server.directory) as writer:
        wire.send(request("GET", "/?follow&topic=a"))
        status, fields = wire.head()
        assert (status, fields["content-type"]) == (200, NDJSON)
        assert (fields["cache-control"], fields["connection"]) == ("no-store", "close")
        assert json.loads(wire.lines(1)[0])["topic"] == "xs.threshold"
        for _ in range(5):
            writer.ask("POST", "/append/b")
            made = writer.ask("POST", "/append/a", b"x")
            assert wire.chunk() == made.body


def test_events_are_followed_and_resumed(server: Server) -> None:
    with Wire(server.directory) as writer:
        made = [writer.ask("POST", "/append/a", b"%d" % n).body for n in range(3)]
        after = json.loads(made[0])["id"]
        with Wire(server.directory) as wire:
            wire.send(request("GET", "/?follow", accept="text/event-stream", last_event_id=after))
            assert wire.head()[1]["content-type"] == "text/event-stream"
            got = b"".join(line + b"\n" for line in wire.lines(6))
            for line in made[1:]:
                event = b"id: %s\ndata: %s\n" % (json.loads(line)["id"].encode(), line)
                assert event in got
            threshold = b"".join(wire.lines(2))
            assert threshold.startswith(b"data: {") and b"xs.threshold" in threshold
            live = writer.ask("POST", "/append/a").body
            assert wire.chunk() == b"id: %s\ndata: %s\n" % (json.loads(live)["id"].encode(), live)


def test_limit_ends_a_follow_in_history_and_live(server: Server) -> None:
    with Wire(server.directory) as writer:
        made = [writer.ask("POST", "/append/a").body for _ in range(2)]
        for limit, lines in ((1, made[:1]), (2, made)):
            with Wire(server.directory) as wire:
                answer = wire.ask("GET", f"/?follow&topic=a&limit={limit}")
                assert answer.body == b"".join(lines)
        with Wire(server.directory) as wire:
            wire.send(request("GET", "/?follow&topic=a&limit=3&new"))
            wire.head()
            more = [writer.ask("POST", "/append/a").body for _ in range(4)]
            assert b"".join(iter(wire.chunk, b"")) == b"".join(more[:3])
            assert wire.is_ended()


def test_a_pulse_comes_as_often_as_was_asked_for(server: Server) -> None:
    with Wire(server.directory) as wire:
        wire.send(request("GET", "/?follow=20&new&topic=none&with-timestamp"))
        wire.head()
        started = time.monotonic()
        pulses = [json.loads(wire.lines(1)[0]) for _ in range(20)]
        took = time.monotonic() - started
        assert {p["topic"] for p in pulses} == {"xs.pulse"}
        assert list(pulses[0])[-1] == "timestamp"
        assert 0.3 < took < 2


def test_last_with_follow_gives_what_is_last_and_each_newer_one(server: Server) -> None:
    with Wire(server.directory) as writer, Wire(server.directory) as wire:
        made = [writer.ask("POST", "/append/a").body for _ in range(2)]
        wire.send(request("GET", "/last/a?follow"))
        wire.head()
        assert wire.chunk() == made[1]
        for _ in range(3):
            writer.ask("POST", "/append/b")
            assert writer.ask("POST", "/append/a").body == wire.chunk()


def test_each_of_a_thousand_followers_gets_its_own_frames_alone(server: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    count = min(1000, hard - 200)
    wires = []
    for n in range(count):
        wire = Wire(server.directory)
        wire.send(request("GET", f"/?follow&new&topic=t.{n}"))
        wires.append(wire)
    for wire in wires:
        assert wire.head()[0] == 200
    lines = b"".join(b'{"topic":"t.%d","meta":%d}\n' % (n, k) for k in (0, 1) for n in range(count))
    with Wire(server.directory) as writer:
        answer = writer.ask("POST", "/append", lines, content_type=NDJSON)
        assert json.loads(answer.body)["appended"] == 2 * count
        for n, wire in enumerate(wires):
            got = b""
            while got.count(b"\n") < 2:
                got += wire.chunk()
            assert [(f["topic"], f["meta"]) for f in map(json.loads, got.splitlines())] == [
                (f"t.{n}", 0),
                (f"t.{n}", 1),
            ]
            assert not wire.buffer
        for wire in wires:
            wire.sock.close()
        until(lambda: descriptors(server) < 50)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_slow_follower_misses_and_repeats_nothing(server: Server) -> None:
    """However much is appended while it does not read, and wherever its answer was cut."""
    count, batches = 5000, 8
    with Wire(server.directory) as slow, Wire(server.directory) as writer:
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.send(request("GET", "/?follow&new"))
        slow.head()
        before = high_water(server)
        for batch in range(batches):
            body = b"".join(
                b'{"topic":"t","meta":%d}\n' % (batch * count + n) for n in range(count)
            )
            assert writer.ask("POST", "/append", body, content_type=NDJSON).status == 200
        seen = 0
        rest = b""
        while seen < count * batches:
            *lines, rest = (rest + slow.chunk()).split(b"\n")
            for line in lines:
                assert b'"meta":%d,' % seen in line
                seen += 1
        made = writer.ask("POST", "/append/t", b"caught up").body
        assert slow.chunk() == made
        assert high_water(server) - before < 64_000


def test_a_follower_with_content_that_stops_reading_costs_a_bounded_amount_of_memory(
    server: Server,
) -> None:
    """Control characters take six bytes each in JSON: a quarter of a gigabyte in all."""
    content, count = b"\1" * 2_000_000, 20
    with Wire(server.directory) as slow, Wire(server.directory) as writer:
        slow.send(request("GET", "/?follow&new&with-content"))
        slow.head()
        before = high_water(server)
        for _ in range(count):
            assert writer.ask("POST", "/append/t", content).status == 200
        for _ in range(count):
            assert json.loads(line_of(slow))["content"] == content.decode()
        assert high_water(server) - before < 100_000


def test_followers_that_keep_pace_badly_are_never_cut_off(server: Server) -> None:
    """Parking and coming back again and again, while frames arrive."""
    count = 3000
    wires = []
    for _ in range(8):
        wire = Wire(server.directory)
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        wire.send(request("GET", "/?follow&new&topic=t"))
        wire.head()
        wires.append(wire)

    def write() -> None:
        with Wire(server.directory) as writer:
            for n in range(count):
                writer.send(request("POST", "/append/t", b"x", xs_meta='"' + "m" * 1000 + '"'))
                if n % 50 == 49:
                    for _ in range(50):
                        assert writer.answer().status == 200

    def read(wire: Wire) -> None:
        newest, seen = "", 0
        while seen < count:
            for line in wire.chunk().splitlines():
                frame_id = json.loads(line)["id"]
                assert frame_id > newest
                newest = frame_id
                seen += 1

    together(1 + len(wires), lambda n: read(wires[n - 1]) if n else write())
    for wire in wires:
        wire.sock.close()


def test_a_reader_of_what_is_still_written_that_has_asked_for_more_may_go_away(
    server: Server,
) -> None:
    with Wire(server.directory) as writer:
        writer.send(request("POST", "/append/t?chunked", transfer_encoding="chunked"))
        writer.send(b"5\r\nhello\r\n")
        until(lambda: bool(frames(server, "t")))
        (first,) = frames(server, "t")
        before = status_of(server, "Threads")
        for _ in range(5):
            with Wire(server.directory) as reader:
                reader.send(request("GET", f"/content/{first['id']}"))
                assert reader.head()[0] == 200 and reader.chunk() == b"hello"
                reader.send(request("GET", "/version"))
        until(lambda: status_of(server, "Threads") <= before)


@pytest.mark.parametrize("half_closed", [False, True])
def test_a_follower_that_vanishes_is_noticed_without_an_append(
    server: Server, half_closed: bool
) -> None:
    let_one_follow(server)
    before = descriptors(server)
    wires = [Wire(server.directory) for _ in range(20)]
    for wire in wires:
        wire.send(request("GET", "/?follow&new"))
        if half_closed:
            wire.half_close()
        wire.head()
    assert descriptors(server) > 20
    for wire in wires:
        wire.sock.close()
    until(lambda: descriptors(server) <= before)


def test_a_follower_that_talks_is_not_listened_to(server: Server) -> None:
    with Wire(server.directory) as wire, Wire(server.directory) as writer:
        wire.send(request("GET", "/?follow&new"))
        wire.head()
        for _ in range(10):
            wire.send(request("POST", "/append/smuggled", b"x"))
            made = writer.ask("POST", "/append/t").body
            assert wire.chunk() == made
    assert frames(server, "smuggled") == []


def test_a_server_that_nobody_asks_anything_does_nothing(server: Server) -> None:
    with Wire(server.directory) as wire, Wire(server.directory) as idle:
        wire.send(request("GET", "/?follow"))
        wire.head()
        wire.lines(2)
        idle.ask("GET", "/version")
        assert_is_idle(server, wire, 1.0)


def test_tokens_are_looked_at_only_while_somebody_reads_with_one_that_can_be_removed(
    store_dir: str,
) -> None:
    seconds = 3.5 * grants.LOOK_SECONDS  # of three looks at least
    server = start_server(store_dir, "--expose", ":0")
    try:
        with Wire(store_dir) as local:
            (address,) = json.loads(local.ask("GET", "/last/xs.start").body)["meta"]["expose"]
        port = int(address.rpartition(":")[2])
        token = tokens.add(store_dir, "reader", read=True)
        with Wire(port) as owner, Wire(port) as reader:
            for wire, its in ((reader, token), (owner, tokens.owner_token(store_dir))):
                wire.send(request("GET", "/?follow&new", authorization=f"Bearer {its}"))
                assert wire.head()[0] == 200
            reader.sock.close()
            assert_is_idle(server, owner, seconds)
    finally:
        server.stop()


def assert_is_idle(server: Server, wire: Wire, seconds: float) -> None:
    """A server with that follower, as soon as it is quiet, does nothing for so long."""

    def is_quiet() -> bool:
        before = wakeups(server)
        assert not select.select([wire.sock], [], [], 0.1)[0]
        return wakeups(server) == before

    # Other work may take a processor from it, and give it back: that is not of its doing.
    for tries_left in (2, 1, 0):
        until(is_quiet)
        used, woken = cpu_seconds(server), wakeups(server)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert not select.select([wire.sock], [], [], deadline - time.monotonic())[0]
        woken, used = wakeups(server) - woken, cpu_seconds(server) - used
        if woken <= 2 and used <= 0.01:
            return
        assert tries_left, f"woken {woken} times, {used} s of a processor"


def wakeups(server: Server) -> int:
    """How often the threads of a server were given a processor so far."""
    total = 0
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        try:
            status = (task / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that has just ended
        for line in status.splitlines():
            if "ctxt_switches" in line:
                total += int(line.split()[1])
    return total
