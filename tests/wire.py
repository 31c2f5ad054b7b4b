"""A connection as a test sees it: bytes out, answers in, by a small parser of its own.

It shares no code with xs.http1, so that a mistake there can't hide itself.
"""

from __future__ import annotations

import os
import socket
from types import TracebackType
from typing import NamedTuple, Optional, Union

from conftest import DEADLINE


class Answer(NamedTuple):
    status: int
    fields: dict[str, str]  # names lower case
    body: bytes


class Wire:
    """One connection. `where` is a Unix socket's path, a store's directory, or a TCP port."""

    def __init__(self, where: Union[str, int]) -> None:
        if isinstance(where, int):
            self.sock = socket.create_connection(("127.0.0.1", where), DEADLINE)
        else:
            path = os.path.join(where, "sock") if os.path.isdir(where) else where
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(path)  # without a timeout, which would make it fail in a crowd
            self.sock.settimeout(DEADLINE)
        self.buffer = b""
        self._chunked = False

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def ask(self, method: str, target: str, body: Optional[bytes] = None, **fields: str) -> Answer:
        """A request and its answer; `fields` with `_` for `-`."""
        self.send(request(method, target, body, **fields))
        return self.answer(method)

    def answer(self, method: str = "GET") -> Answer:
        """The next answer as a whole. Raises `EOFError` if it breaks off."""
        status, fields = self.head()
        if method == "HEAD" or status in (204, 304):
            return Answer(status, fields, b"")
        if fields.get("transfer-encoding") == "chunked":
            return Answer(status, fields, b"".join(iter(self.chunk, b"")))
        if "content-length" in fields:
            return Answer(status, fields, self.exactly(int(fields["content-length"])))
        return Answer(status, fields, self.rest())

    def head(self) -> tuple[int, dict[str, str]]:
        """The next answer's status and fields, an interim 100 included."""
        first, *lines = self.until(b"\r\n\r\n")[:-4].split(b"\r\n")
        version, status, _ = first.split(b" ", 2)
        assert version == b"HTTP/1.1"
        fields = {}
        for line in lines:
            name, _, value = line.decode("latin-1").partition(": ")
            assert name.lower() not in fields, f"{name} twice"
            fields[name.lower()] = value
        self._chunked = fields.get("transfer-encoding") == "chunked"
        return int(status), fields

    def chunk(self) -> bytes:
        """The next chunk's data; b"" for the last one."""
        data = self.exactly(int(self.until(b"\r\n"), 16))
        assert self.exactly(2) == b"\r\n"
        return data

    def block(self) -> bytes:
        """What comes next of a body that is followed; b"" at its end."""
        if self._chunked:
            return self.chunk()
        data, self.buffer = self.buffer or self.sock.recv(65536), b""
        return data

    def lines(self, count: int) -> list[bytes]:
        """The next lines of a body that is followed: whole frames, as they were sent."""
        found = b""
        while found.count(b"\n") < count:
            block = self.block()
            if not block:
                raise EOFError(f"the body ended after {found!r}")
            found += block
        assert found.count(b"\n") == count, found
        return found.splitlines()

    def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError(f"the connection ended after {self.buffer!r}")
            self.buffer += data
        found, mark, self.buffer = self.buffer.partition(mark)
        return found + mark

    def exactly(self, size: int) -> bytes:
        if len(self.buffer) >= size:
            found, self.buffer = self.buffer[:size], self.buffer[size:]
            return found
        pieces = [self.buffer]
        missing = size - len(self.buffer)
        self.buffer = b""
        while missing:
            data = self.sock.recv(min(missing, 1 << 20))
            if not data:
                raise EOFError(f"the connection ended {missing} bytes early")
            pieces.append(data)
            missing -= len(data)
        return b"".join(pieces)

    def rest(self) -> bytes:
        """All that comes until the other end closes."""
        pieces = [self.buffer]
        self.buffer = b""
        while data := self.sock.recv(1 << 20):
            pieces.append(data)
        return b"".join(pieces)

    def is_ended(self) -> bool:
        """Waits for the end of the connection; False if something comes before it."""
        try:
            return not self.buffer and self.sock.recv(1) == b""
        except ConnectionResetError:
            return True


def request(method: str, target: str, body: Optional[bytes] = None, **fields: str) -> bytes:
    """A request's bytes, with the length of its body."""
    fields = {"host": "localhost", **fields}
    if body is not None and "transfer_encoding" not in fields:
        fields.setdefault("content_length", str(len(body)))
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chunked(*blocks: bytes) -> bytes:
    """Blocks as a chunked body, with its end."""
    return b"".join(b"%x\r\n%b\r\n" % (len(block), block) for block in blocks) + b"0\r\n\r\n"
