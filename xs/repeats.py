"""The last request of a connection in its words, and what they meant: they mostly come again.

A client that keeps its connection mostly asks in the same words each time. Then its head is not
parsed again; if it appends, what it asks for is not judged anew, but for its content; and if it is
the only client, it may be given the short way of an append (bench/append.py).
"""

from __future__ import annotations

from typing import Optional

from xs import api
from xs.commit import Append, is_plain
from xs.http1 import RequestHead
from xs.messages import Answer

HEAD_BYTES = 2048  # of a head that is looked for again


class LastRequest:
    """The words of a head, and what they meant; none to begin with. A connection's thread alone."""

    def __init__(self) -> None:
        self.head: Optional[RequestHead] = None
        self._words = b""  # of that head, the empty line included
        self._append: Optional[Append] = None  # what they ask for, if they ask to append
        self._is_lone = False  # whether that may be committed by itself

    def take_head(self, buffer: bytearray) -> Optional[RequestHead]:
        """The head at the start of a buffer, if it is in these words: they go from the buffer."""
        if self.head is None or not buffer.startswith(self._words):
            return None
        del buffer[: len(self._words)]
        return self.head

    def remember(self, start: bytes, head: RequestHead) -> None:
        """A head that was parsed, and what it was parsed from, as far as `HEAD_BYTES`."""
        end = start.find(b"\r\n\r\n") + 4
        if end > 4 and start[0] not in b"\r\n":
            self.head, self._words = head, start[:end]
            self._append, self._is_lone = None, False

    def learn(self, head: RequestHead, answer: Answer) -> None:
        """What a request with this head was found to ask for."""
        if head is not self.head:
            return
        self._append = api.append_in(answer)
        self._is_lone = (
            self._append is not None
            and is_plain(self._append)
            and head.path.startswith("/append/")  # of the store that this address is of
            and head.minor == 1
            and head.keep_alive
            and head.length is not None
        )

    def append_of(self, head: RequestHead, buffer: bytearray) -> Optional[Append]:
        """What a request in these words appends, its content aside, which the buffer has."""
        if head is not self.head or head.length is None or head.length > len(buffer):
            return None
        return self._append  # the content has the length that was small then

    def lone_append(self, buffer: bytearray) -> Optional[Append]:
        """The same for a buffer that has one such request, and no more, if the short way may do."""
        head = self.head
        if (
            not self._is_lone
            or head is None
            or len(buffer) != len(self._words) + (head.length or 0)
            or not buffer.startswith(self._words)
        ):
            return None
        return self._append

    def body(self, buffer: bytearray) -> bytes:
        """What comes after these words in a buffer that begins with them."""
        return bytes(memoryview(buffer)[len(self._words) :])
