"""`POST /append?each`: one answer for each line, however the body is sent."""

from __future__ import annotations

import json
import os
import socket

import pytest
from conftest import DEADLINE, Server

LINES = b'{"topic":"a","content":"one"}\nnot JSON\n{"topic":"a","content":"two"}\n'


def ask(server: Server, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(os.path.join(server.directory, "sock"))
        sock.sendall(request)
        answer = b""
        while block := sock.recv(65536):
            answer += block
        return answer


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_each_line_of_a_body_is_answered_however_the_body_is_sent(
    server: Server, framing: str
) -> None:
    head = (
        b"POST /append?each HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/x-ndjson\r\n"
    )
    if framing == "length":
        request = head + b"Content-Length: %d\r\n\r\n" % len(LINES) + LINES
    else:
        request = head + b"Transfer-Encoding: chunked\r\n\r\n"
        request += b"%x\r\n%s\r\n0\r\n\r\n" % (len(LINES), LINES)
    answers = [json.loads(line) for line in ask(server, request).splitlines() if line[:1] == b"{"]
    assert [answer.get("topic") or answer["line"] for answer in answers] == ["a", 2, "a"]


def test_a_connection_goes_on_after_each_line_is_answered(server: Server) -> None:
    first = (
        b"POST /append?each HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n" % len(LINES) + LINES
    )
    second = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = ask(server, first + second)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert b'{"version":' in answer
