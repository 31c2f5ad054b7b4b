"""Attacks on a running server that take more than one message, beside those of test_httpd.py."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import subprocess
import zlib
from pathlib import Path

import pytest
from conftest import DEADLINE, Server, start_server, until
from test_httpd import high_water
from wire import Wire, request

from xs import content, frame
from xs.cas import Cas
from xs.errors import TooLarge

NDJSON = "application/x-ndjson"


def arriving(server: Server) -> list[str]:
    return [name for name in os.listdir(f"{server.directory}/cas") if name.startswith("new-")]


# Compressed bodies


@functools.lru_cache(None)
def bomb(size: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    return b"".join(packer.compress(zeros) for _ in range(size >> 20)) + packer.flush()


@pytest.mark.parametrize("coding", ["gzip", "br", "gzip, gzip"])
def test_a_body_is_kept_as_it_was_sent_whatever_it_says_of_its_coding(
    shared: Server, coding: str
) -> None:
    data = bomb(128 << 20)
    assert len(data) < 300_000 and gzip.decompress(bomb(1 << 20)) == bytes(1 << 20)
    before = high_water(shared)
    with Wire(shared.directory) as wire:
        made = json.loads(wire.ask("POST", "/append/bomb", data, content_encoding=coding).body)
        answer = wire.ask("GET", f"/cas/{made['hash']}")
        assert answer.body == data and "content-encoding" not in answer.fields
        # As lines it is refused for what it is; nobody unpacks it to look for some.
        answer = wire.ask("POST", "/append", data, content_type=NDJSON, content_encoding=coding)
        assert answer.status == 200 and json.loads(answer.body)["appended"] == 0
        assert wire.ask("GET", "/version").status == 200
    assert high_water(shared) - before < 100_000  # kB; unpacked it would be 131,072


@pytest.mark.parametrize("coding", ["gzip, chunked", "deflate, chunked", "x, chunked"])
def test_a_compressed_transfer_is_refused_before_its_body_comes(
    shared: Server, coding: str
) -> None:
    with Wire(shared.directory) as wire:
        wire.send(b"POST /append/t HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: " + coding.encode())
        wire.send(b"\r\n\r\n")
        assert wire.answer().status == 501
        assert wire.is_ended()


# Bodies without end


def test_a_content_has_a_largest_size_however_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "CONTENT_MAX", 100_000)
    store = Cas(str(tmp_path))
    with pytest.raises(TooLarge, match="at most 100000 bytes"):
        store.take(iter(lambda: b"x" * 1000, b""))  # it never ends
    with pytest.raises(TooLarge):
        content.take(iter(["not touched"]), 100_001, store.spill)
    assert os.listdir(tmp_path) == []
    taken = store.take([b"x" * 100_000])
    assert taken is not None and taken.size == 100_000


@pytest.mark.parametrize("path", ["/append/t", "/cas", "/t"])
def test_a_length_above_the_largest_is_refused_before_the_body_comes(
    shared: Server, path: str
) -> None:
    with Wire(shared.directory) as wire:
        length = content.CONTENT_MAX + 1
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n"
        wire.send(head.encode())
        answer = wire.answer()
        assert (answer.status, answer.body.count(b"\n")) == (413, 1)
    assert arriving(shared) == []


@pytest.mark.parametrize("path", ["/append/t", "/cas", "/eval", "/append"])
def test_a_body_without_end_takes_no_memory_and_leaves_nothing(shared: Server, path: str) -> None:
    before = high_water(shared)
    chunk = b"40000\r\n" + b"x" * 0x40000 + b"\r\n"
    with Wire(shared.directory) as wire:
        fields = f"Host: a\r\nContent-Type: {NDJSON}\r\nTransfer-Encoding: chunked\r\n"
        wire.send(f"POST {path} HTTP/1.1\r\n{fields}\r\n".encode())
        try:
            for _ in range(200):  # 52 MB; a line, and a script, are refused before
                wire.send(chunk)
        except OSError:
            assert path in ("/eval", "/append")
    assert high_water(shared) - before < 60_000  # kB: a line of 16 MiB, in pieces and in one
    until(lambda: arriving(shared) == [])
    with Wire(shared.directory) as wire:
        assert wire.ask("GET", "/last/t").status == 404


def test_a_chunk_without_end_is_not_waited_for_in_memory(shared: Server) -> None:
    before = high_water(shared)
    with Wire(shared.directory) as wire:
        wire.send(b"POST /cas HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        wire.send(b"f" * 15 + b"\r\n")
        for _ in range(40):
            wire.send(b"x" * (1 << 20))
    assert high_water(shared) - before < 20_000
    until(lambda: arriving(shared) == [])


# Much at once


def test_a_thousand_idle_connections_and_half_heads_hold_nobody_up(shared: Server) -> None:
    crowd = []
    try:
        for number in range(1000):
            crowd.append(Wire(shared.directory))
            half = request("POST", "/append/t", b"x" * 100)
            crowd[-1].send(half[: number % len(half)])
        with Wire(shared.directory) as wire:
            for _ in range(20):
                assert wire.ask("POST", "/append/crowd").status == 200
    finally:
        for wire in crowd:
            wire.sock.close()
    with Wire(shared.directory) as wire:
        assert wire.ask("GET", "/last/t").status == 404  # no half became a whole


def test_who_sends_no_more_amid_a_request_is_refused_and_nothing_is_stored(shared: Server) -> None:
    whole = request("POST", "/append/t", b"hello")
    for size in (1, 10, len(whole) - 6, len(whole) - 1):
        with Wire(shared.directory) as wire:
            wire.send(whole[:size])
            wire.half_close()
            rest = wire.rest()
            assert rest == b"" or rest.startswith(b"HTTP/1.1 400 "), rest
    with Wire(shared.directory) as wire:
        assert wire.ask("GET", "/last/t").status == 404


def test_a_request_is_done_once_though_it_is_said_to_have_come_early(shared: Server) -> None:
    """RFC 8470: `Early-Data: 1` comes from who has spoken TLS; a replay is for a key to tell."""
    with Wire(shared.directory) as wire:
        fields = {"early_data": "1", "idempotency_key": "k"}
        first = wire.ask("POST", "/append/early", b"x", **fields)
        assert wire.ask("POST", "/append/early", b"x", **fields).body == first.body
        lines = wire.ask("GET", "/?topic=early").body.splitlines()
    assert len(lines) == 1


def test_tls_takes_no_early_data(tmp_path: Path, store_dir: str) -> None:
    """Data of TLS 1.3 that comes before the handshake's end can be replayed by who has seen it."""
    pem, session, early = (tmp_path / name for name in ("pem", "session", "early"))
    subject = ["-subj", "/CN=localhost", "-days", "2", "-nodes", "-newkey", "rsa:2048", "-batch"]
    subprocess.run(
        ["openssl", "req", "-x509", *subject, "-keyout", pem, "-out", tmp_path / "cert"],
        check=True,
        capture_output=True,
    )
    pem.write_bytes(pem.read_bytes() + (tmp_path / "cert").read_bytes())
    early.write_bytes(b"POST /early HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx")
    server = start_server(store_dir, "--http", "127.0.0.1:0", "--tls-cert", str(pem))
    try:
        with Wire(store_dir) as wire:
            (address,) = json.loads(wire.ask("GET", "/").body)["meta"]["http"]
        connect = ["openssl", "s_client", "-connect", address.split("//")[-1], "-tls1_3"]
        for options in (["-sess_out", session], ["-sess_in", session, "-early_data", early]):
            done = subprocess.run(
                [*connect, "-ign_eof", *options],
                input=b"\0",  # is refused, and the connection closed
                capture_output=True,
                timeout=DEADLINE,
            )
            assert b"400 Bad Request" in done.stdout
        assert b"Reused, TLSv1.3" in done.stdout
        assert b"Early data was not sent" in done.stdout or b"was rejected" in done.stdout
        with Wire(store_dir) as wire:
            assert b"/early" not in wire.ask("GET", "/?topic=http.request").body
    finally:
        server.stop()


def test_the_hash_of_what_was_sent_is_the_hash_of_what_is_kept(shared: Server) -> None:
    data = bomb(8 << 20)
    with Wire(shared.directory) as wire:
        answer = wire.ask("POST", "/cas", data, content_encoding="gzip")
    assert hashlib.sha256(data).digest() == frame.parse_integrity(answer.body.decode().strip())
