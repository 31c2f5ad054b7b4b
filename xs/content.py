"""Content as it is taken in: hashed as it comes, and held in memory while it is small.

What is small lies in the index beside its frame, and this is all that it needs. What is large
becomes a file (`cas`).
"""

from __future__ import annotations

import sys

from xs import frame
from xs.errors import Damaged, TooLarge
from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

INLINE_MAX = 16 * 1024  # bytes; measured by bench/content.py: above it a file is cheaper
CONTENT_MAX = 64 << 30  # bytes: a body without end is ended before it has all of the disk


class Content:
    """Content that was taken in whole: in memory (`data`) or in a temporary file (`path`)."""

    __slots__ = ("data", "digest", "path", "size")

    def __init__(self, digest: bytes, size: int, data: bytes | None, path: str | None) -> None:
        self.digest = digest
        self.size = size
        self.data = data
        self.path = path

    @property
    def hash(self) -> str:
        return frame.integrity(self.digest)


def take(
    blocks: Iterable[bytes],
    expected: int,
    spill: Callable[[list[bytes], Iterator[bytes]], Content],
) -> Content | None:
    """All of `blocks`, hashed as they come; None if they are empty. `expected`: their bytes.

    What is above INLINE_MAX goes to `spill`: what has come so far, and what is still to come. So
    memory holds at most that and one block. If the blocks end in an exception, nothing is left
    behind and it goes on up. Raises `TooLarge` above CONTENT_MAX.
    """
    check_size(expected)
    source = iter(blocks)
    first = next(source, b"")
    second = next(source, None)
    if second is None and len(first) <= INLINE_MAX:
        return small(first) if first else None
    head: list[bytes] = []
    size = 0
    from itertools import chain  # here, as below: most contents are small

    source = chain((first, second or b""), source)
    for block in source:
        head.append(block)
        size += len(block)
        if size > INLINE_MAX:
            return spill(head, source)
    return small(b"".join(head)) if size else None


def check_size(size: int) -> None:
    """Raises `TooLarge` for a content of more bytes than one may have."""
    if size > CONTENT_MAX:
        raise TooLarge(f"the content is too large: at most {CONTENT_MAX} bytes")


def discard(content: Content | None) -> None:
    """Forgets content that was taken in and is not to be placed."""
    if content is not None and content.path is not None:
        try:
            os.unlink(content.path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        content.path = None


def checked(data: bytes, hash_: str) -> bytes:
    """The same content, if that is its hash. Raises `Damaged`."""
    if frame.integrity(_sha256(data).digest()) != hash_:
        raise Damaged(f"content {hash_} is damaged: its bytes don't match")
    return data


def small(data: bytes) -> Content:
    """Content of at most INLINE_MAX bytes, as it lies in memory."""
    return Content(_sha256(data).digest(), len(data), data, None)


def _first_sha256(data: bytes) -> Any:
    """The hash of the first content, by the interpreter's own SHA-256.

    It takes longer for each byte, but most commands hash once, and to load OpenSSL takes 2 ms.
    """
    global _sha256
    _sha256 = new_sha256
    if "hashlib" in sys.modules:  # as in a server
        return new_sha256(data)
    try:
        if sys.version_info >= (3, 12):
            from _sha2 import sha256  # type: ignore[import-not-found]
        else:
            from _sha256 import sha256  # type: ignore[import-not-found]
    except ImportError:  # it was built without
        return new_sha256(data)
    return sha256(data)


def new_sha256(data: bytes = b"") -> Any:
    """A hash that more can be added to. From here on all are `hashlib`'s."""
    global _sha256
    from hashlib import sha256

    _sha256 = sha256
    return sha256(data)


_sha256: Callable[[bytes], Any] = _first_sha256
