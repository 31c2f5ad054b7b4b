"""Where a message's body ends: by its length, its chunks, or its connection (RFC 9112 §6 and §7).

Pure functions over bytes, as in `http1`, whose strategy they share: a reader takes a bytearray,
consumes the part of the body that is at its front, and returns it; or raises `Refusal`, or returns
None for "more data".
"""

from __future__ import annotations

from xs.http1 import FIELD_VCHAR, FRAMING, HEXDIG, Refusal, fields_of, take_field_block

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xs.http1 import RequestHead, ResponseHead

CHUNK_LINE_LIMIT = 256  # bytes, a chunk's size with its extensions (RFC 9112 §7.1.1)
CHUNK_SIZE_DIGITS = 16  # hexadecimal (RFC 9112 §7.1: anticipate large numbers)
TRAILER_LIMIT = 8192  # bytes, with its empty line

LAST_CHUNK = b"0\r\n\r\n"  # RFC 9112 §7.1, with an empty trailer section


class BrokenOff(ValueError):
    """The connection was closed before the body's end."""


def body_reader(head: RequestHead) -> LengthBody | ChunkedBody:
    """What reads the body of a request; an empty one is `done` from the start."""
    return ChunkedBody() if head.length is None else LengthBody(head.length)


def response_body_reader(head: ResponseHead) -> LengthBody | ChunkedBody | UntilCloseBody:
    """What reads the body of a response; tell its `eof` when the connection is closed."""
    if head.chunked:
        return ChunkedBody()
    return UntilCloseBody() if head.length is None else LengthBody(head.length)


class LengthBody:
    """A body of `length` bytes (RFC 9112 §6.2); 0 for no body."""

    __slots__ = ("_left",)

    def __init__(self, length: int) -> None:
        self._left = length

    @property
    def done(self) -> bool:
        return self._left == 0

    def read(self, buffer: bytearray) -> bytes | None:
        """What is there of the body; b"" only at its end; None for "more data"."""
        size = min(self._left, len(buffer))
        self._left -= size
        if not size:
            return b"" if self.done else None
        data = _copy(buffer, 0, size)
        del buffer[:size]  # CPython moves the front of a bytearray, not its bytes
        return data

    def eof(self) -> None:
        """The connection was closed: raises `BrokenOff` unless the body was complete."""
        if self._left:
            raise BrokenOff(f"The body broke off, {self._left} bytes before its end.")


class ChunkedBody:
    """A body in chunks (RFC 9112 §7.1). Extensions are ignored, trailer fields checked and dropped.

    Of its framing nothing is kept but what is still incomplete, and that is bounded.
    """

    __slots__ = ("_expect", "_left", "done")

    def __init__(self) -> None:
        self.done = False
        self._left = 0  # bytes of the current chunk that are still to come
        self._expect = "size"  # then "data", "end" and again; after a size of 0 "trailer"

    def read(self, buffer: bytearray) -> bytes | None:
        """What is there of the body; b"" only at its end; None for "more data"."""
        pieces: list[bytes] = []
        at = 0  # read up to here; one deletion at the end, not three for each small chunk
        while not self.done:
            if self._expect == "size":
                end = _chunk_line_end(buffer, at)
                if end < 0:
                    break
                self._left = _chunk_size(bytes(buffer[at:end]))
                self._expect = "data" if self._left else "trailer"
                at = end + 2
            elif self._expect == "data":
                piece = _copy(buffer, at, self._left)
                if not piece:
                    break
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._expect = "end"
            elif self._expect == "end":
                if not buffer.startswith(b"\r\n", at):
                    if b"\r\n".startswith(bytes(buffer[at : at + 2])):
                        break
                    raise Refusal(400, "A chunk's data has more bytes than its size says.")
                self._expect = "size"
                at += 2
            else:
                del buffer[:at]
                at = 0
                self.done = _take_trailer(buffer)
                break
        del buffer[:at]
        return b"".join(pieces) if pieces or self.done else None

    def eof(self) -> None:
        """The connection was closed: raises `BrokenOff` unless the body was complete."""
        if not self.done:
            raise BrokenOff("The body broke off before its last chunk.")


class UntilCloseBody:
    """A response's body that the end of the connection ends (RFC 9112 §6.3, 8)."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = False

    def read(self, buffer: bytearray) -> bytes | None:
        """What is there of the body; b"" only at its end; None for "more data"."""
        data = bytes(buffer)
        del buffer[:]
        return data if data or self.done else None

    def eof(self) -> None:
        """The connection was closed, and all before it was read: that is the body's end."""
        self.done = True


def _chunk_line_end(buffer: bytearray, at: int) -> int:
    """Where the line at `at` ends; -1 for "more data", unless it can't become a chunk's line."""
    end = buffer.find(b"\r\n", at, at + CHUNK_LINE_LIMIT + 2)
    if end >= 0:
        return end
    line = bytes(buffer[at : at + CHUNK_LINE_LIMIT + 2])
    if line not in (b"", b"\r"):
        _chunk_size(line[:-1] if line.endswith(b"\r") else line)
    if len(line) == CHUNK_LINE_LIMIT + 2:
        raise Refusal(400, f"A chunk's line has more than {CHUNK_LINE_LIMIT} bytes.")
    return -1


def _chunk_size(line: bytes) -> int:
    """chunk-size [ chunk-ext ] (RFC 9112 §7.1), or the beginning of such a line.

    No white space goes before the ";": §7.1.1 would have it removed, but nobody sends it, and
    parsers that do and that don't have been played against each other.
    """
    digits, _, extension = line.partition(b";")
    # Not left to int(), which takes signs, 0x and _ as well.
    if not digits or digits[: CHUNK_SIZE_DIGITS + 1].translate(None, HEXDIG):
        raise Refusal(400, "A chunk's size is not a hexadecimal number.")
    if len(digits) > CHUNK_SIZE_DIGITS:
        raise Refusal(400, f"A chunk's size has more than {CHUNK_SIZE_DIGITS} digits.")
    if extension.translate(None, FIELD_VCHAR):  # RFC 9112 §2.2: a bare CR or LF, too
        raise Refusal(400, "A chunk's extension has a control character.")
    return int(digits, 16)


def _take_trailer(buffer: bytearray) -> bool:
    """Consumes the trailer section when it is there as a whole (RFC 9112 §7.1.2).

    A field that frames or routes has no place there (RFC 9110 §6.5.1): it comes too late to count.
    """
    if buffer.startswith(b"\r\n"):
        del buffer[:2]
        return True
    if b"\r\n".startswith(bytes(buffer[:2])):
        return False
    block = take_field_block(buffer, 0, TRAILER_LIMIT)
    if block is not None:
        for name, _ in fields_of(block):
            if name in FRAMING:
                raise Refusal(400, f"The field {name} has no place in a trailer section.")
    return block is not None


def _copy(buffer: bytearray, at: int, size: int) -> bytes:
    """Up to `size` bytes from `at` on, copied once: bytes(buffer[…]) would copy them twice."""
    with memoryview(buffer) as whole, whole[at : at + size] as part:
        return part.tobytes()


def chunk(data: bytes) -> bytes:
    """`data` as one chunk (RFC 9112 §7.1). ValueError for b"": that would end the body."""
    return b"".join(chunk_parts(data))


def chunk_parts(data: bytes) -> tuple[bytes, bytes, bytes]:
    """As `chunk`, in parts to be sent one after the other: nothing of `data` is copied."""
    if not data:
        raise ValueError("an empty chunk is the last one: send LAST_CHUNK")
    return b"%x\r\n" % len(data), data, b"\r\n"
