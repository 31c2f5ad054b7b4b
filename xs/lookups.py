"""The plainest look-ups, answered from the bytes of their requests.

A client that keeps its connection mostly sends the same fields each time. Where only the target is
new, and is one of these, the way through `http1` and `api` takes longer than to find the frame
(bench/lookup.py). Whatever is not just so, or finds no frame, goes that way; and what is given here
is what it would have given (test_lookups.py).
"""

from __future__ import annotations

from xs import frame, ids
from xs.errors import XsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xs.http1 import RequestHead
    from xs.store import Store

# An id begins with a 0 until the year 2558.
_STARTS = (b"GET /last/", b"GET /head/", b"GET /first/", b"GET /next/", b"GET /prev/", b"GET /0")
_TARGET_MAX = 300  # bytes: a longer one is not looked at here


def path_in(buffer: bytearray, like: RequestHead) -> tuple[bytes, int] | None:
    """The path of the request at the start of a buffer, and its bytes; None if it is none of these.

    `like` is the head of an earlier request on its connection.
    """
    if not buffer.startswith(_STARTS):
        return None
    end = buffer.find(b" ", 5, 5 + _TARGET_MAX)
    block = like.block
    if end < 0 or block is None or like.minor != 1 or like.length != 0 or not like.keep_alive:
        return None
    rest = b" HTTP/1.1\r\n%b\r\n\r\n" % block
    if not buffer.startswith(rest, end):
        return None
    return bytes(buffer[5:end]), end + len(rest)


def line_of(store: Store, path: bytes) -> bytes | None:
    """The line of the frame that such a request asks for; None where the whole way has to tell."""
    word, slash, rest = path.decode("latin-1").partition("/")
    try:
        if not slash:
            return store.get(ids.parse(word))
        if word in ("last", "head"):
            # Not parsed if it is one word: what is no topic, or has a query, is that of no frame.
            several = "," in rest or "*" in rest
            patterns = frame.parse_patterns(rest) if several else frozenset((rest,))
            return store.index.last(patterns, store.clock())
        if word == "first":
            return store.index.first(frame.parse_patterns(rest), store.clock())
        if word == "next":
            return store.index.next(ids.parse(rest), None, store.clock())
        if word == "prev":
            return store.index.prev(ids.parse(rest), None, store.clock())
    except (XsError, MemoryError):  # the whole way meets it as well, and tells it
        pass
    return None
