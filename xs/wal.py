"""Damage in the write-ahead log, which SQLite does not tell of.

When nobody has a database open, the next one to open it reads the log up to the first frame whose
checksum is wrong, and takes that for its end: right after a kill or a power failure, which leave
a last transaction half written. But a byte that flipped before that end has the same effect, and
then answered transactions vanish without a word. So before SQLite opens a log that was left behind,
this asks: has something been committed beyond the place up to which SQLite would read?

Two things show it. A transaction begins only when the one before it is durable: a whole frame that
follows a commit beyond that place proves that commit. (Beyond it there may also be what earlier
attempts left whose fsync failed; of these none follows another.) And `xs.db-shm`, as far as it
survived, says how far the log was read and written; SQLite puts that there once it is durable.

Of a log that has no frame at all, or is gone, only the latter can tell. It may be older than that,
where the power went after an orderly close: nothing makes it durable that either file is unlinked.
So it is asked for what is neither in the log nor folded back, and counts if it belongs to the log's
header, or if somebody has opened the database since the system started. Who does so first makes it
anew, and from then on both files are what was last done to them.

The format is that of SQLite's documentation: a header of 32 bytes, then frames, each a header of
24 bytes and a page. Checksums go on from frame to frame. Frames whose salts are not those of the
header are older than it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator

from xs import disk
from xs.errors import Damaged, DiskError
from xs.records import NamedTuple
from xs.schema import FILENAME, uri

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    Sum = tuple[int, int]

HEADER, HEAD = 32, 24  # bytes
_MAGIC, _VERSION = 0x377F0682, 3007000  # the magic's last bit: checksums are of big-endian words
_PAGE = 4096  # bytes; what SQLite takes by itself
_MASK = 0xFFFFFFFF
_OPEN_LOCK = 128  # the byte of xs.db-shm that is locked by all who have the database open
_TRIES = 5
_BLOCK = 1 << 20


class Damage(NamedTuple):
    """Frames of a log are counted from 1: up to `whole` SQLite reads it, `last` was committed."""

    whole: int
    last: int
    commits: int  # transactions after `whole`, as far as they can be told


class _Frame(NamedTuple):
    number: int
    page: int
    size: int  # of the database in pages, in the last frame of a transaction; else 0
    is_ours: bool  # the salts are those of the log
    data: Optional[bytes]  # the page's; None: its bytes are not those that were written


def check(folder: str) -> None:
    """Raises `Damaged` if SQLite would drop from the log in `folder` what has been committed.

    Nobody in this process may have its database open, nor open it meanwhile: closing a file of
    SQLite's gives back all locks that the process has on it.
    """
    found = damage(folder)
    if found is not None:
        what = f"{found.commits} committed transaction" + "s" * (found.commits != 1)
        raise Damaged(
            f"the store's write-ahead log is damaged: of {os.path.join(folder, FILENAME)}-wal "
            f"{found.whole} of {found.last} frames can be read, and {what} after them would be "
            f"lost: xs check --repair {folder} saves what is whole"
        )


def make_durable(folder: str) -> None:
    """Makes durable what is in the log in `folder`, before anybody reads it. As `check`.

    Who wrote the last of it may have been killed before that. Then it would be read, and be gone
    after a power failure; and what is appended behind it would prove it to be damaged.
    """
    try:
        file = os.open(os.path.join(folder, FILENAME + "-wal"), os.O_RDONLY)
    except OSError:
        return  # SQLite can't read it either, and says so
    try:
        disk.sync(file)
    except OSError as error:
        raise DiskError(f"the store's log can't be made durable: {error.strerror}") from None
    finally:
        os.close(file)


def damage(folder: str) -> Damage | None:
    """What is damaged in the log in `folder`; None if nothing is, or somebody has it open.

    Whoever has it open has read it already, and SQLite won't read it anew.
    """
    path = os.path.join(folder, FILENAME + "-wal")
    for _ in range(_TRIES):
        before = _stamps(folder)
        if not any(before) or _is_open(folder):
            return None
        found = _damage(path, _known(folder))
        # Unless others have come meanwhile, and gone again.
        if found is None or (_stamps(folder) == before and not _is_open(folder)):
            return found
    return None


def mend(folder: str, found: Damage, target: str) -> tuple[int, int]:
    """Makes in the folder `target` a log of what that in `folder` was to leave in the database.

    Most of the time that is all of it: pages are written again and again, and what counts is the
    last time. A page that was damaged then is made one that can't be read; how many there are of
    those, and of frames that don't say any more what page they are, is the answer.
    """
    pages: dict[int, bytes | None] = {}
    unknown = size = 0
    with _Log(os.path.join(folder, FILENAME + "-wal")) as log:
        for each in log.frames(0, min(found.last, log.count)):
            if each.data is not None:
                pages[each.page] = each.data
                size = each.size or size
            elif each.is_ours and each.page:
                pages[each.page] = None
            else:
                unknown += 1
        # What lies beyond the end would be a page that no transaction wrote.
        kept = sorted(page for page in pages if page <= size)
        with open(os.path.join(target, FILENAME + "-wal"), "wb") as file:
            start = struct.pack(">4I", _MAGIC | (log.order == ">"), _VERSION, log.page_size, 0)
            start += log.salts
            total = log.sum((0, 0), start)
            file.write(start + struct.pack(">2I", *total))
            for page in kept:
                head = struct.pack(">2I", page, size if page == kept[-1] else 0)
                data = pages[page] or b"\xff" * log.page_size
                total = log.sum(total, head + data)
                file.write(head + log.salts + struct.pack(">2I", *total) + data)
    return sum(pages[page] is None for page in kept), unknown + max(0, found.last - log.count)


def cut(folder: str, found: Damage, target: str) -> None:
    """Makes in the folder `target` a log of what SQLite would read of that in `folder`."""
    with _Log(os.path.join(folder, FILENAME + "-wal")) as log:
        end = log.end_of(found.whole) if found.whole else 0
        log.copy(os.path.join(target, FILENAME + "-wal"), end)


def _stamps(folder: str) -> tuple[object, object]:
    """What tells that the log, or the memory beside it, is another one, or was written to."""
    log, shared = (_stamp(os.path.join(folder, FILENAME + suffix)) for suffix in ("-wal", "-shm"))
    return log, shared


def _stamp(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _damage(path: str, known: _Known) -> Damage | None:
    try:
        log = _Log(path)
    except OSError:
        return None
    with log:
        if not log.count:
            is_its_own = log.has_header and known.salts == log.salts
            is_lost = known.last > known.folded_back and (is_its_own or known.is_of_this_boot)
            return Damage(0, known.last, 1) if is_lost else None
        whole = log.frames_read_by_sqlite() if log.has_header else 0
        ours = [n for n in range(whole + 1, log.count + 1) if log.head(n)[8:16] == log.salts]
        last = known.last if known.salts == log.salts else 0
        if not ours and last <= whole:
            return None
        frames = list(log.frames(whole, min(log.count, max([last, *ours]) + 1)))
        last = max(last, _last_proven(frames))
        commits = [each.number for each in frames if each.size and each.is_ours]
        if not log.has_header and commits:  # it was durable before they were written
            last = max(last, commits[0])
        if last <= whole:
            return None
        return Damage(whole, last, max(1, sum(number <= last for number in commits)))


def _last_proven(frames: list[_Frame]) -> int:
    """The last of these frames that certainly is one of a committed transaction, and ends it."""
    last, is_proven = 0, False
    for before, each in zip(frames, frames[1:]):
        if each.data is None:
            is_proven = False
        elif before.size and (before.is_ours or each.is_ours):
            is_proven = True
            last = max(last, before.number)
        if is_proven and each.size:
            last = each.number
    return last


class _Log:
    """An open log. `count` frames are in the file, whatever they are worth."""

    def __init__(self, path: str) -> None:
        try:
            self._file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            self._file = os.open(os.devnull, os.O_RDONLY)  # one that is gone has nothing in it
        header = os.pread(self._file, HEADER, 0).ljust(HEADER, b"\0")
        magic, version, size = struct.unpack(">3I", header[:12])
        self.order = ">" if magic & 1 else "<"
        self.start: Sum = struct.unpack(">2I", header[24:])
        self.has_header = (
            magic & ~1 == _MAGIC
            and version == _VERSION
            and self.sum((0, 0), header[:24]) == self.start
        )
        if not self.has_header:
            self.order, size = (">" if sys.byteorder == "big" else "<"), _PAGE
        self.page_size: int = size
        self._size = os.fstat(self._file).st_size
        self.count = max(0, (self._size - HEADER) // (HEAD + size))
        self.salts = header[16:24]
        if not self.has_header:
            first = [self.head(number)[8:16] for number in range(1, 5)]
            if not any(self.salts) or first.count(self.salts) < 2:
                self.salts = self._salts_in_a_row() or max(first, key=first.count)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def _salts_in_a_row(self) -> bytes:
        """The salts that two frames have, one after the other: the first ones, and no zeroes."""
        before = b""
        for number in range(1, self.count + 1):
            found = self.head(number)[8:16]
            if found == before and any(found):
                return found
            before = found
        return b""

    def head(self, number: int) -> bytes:
        return os.pread(self._file, HEAD, self.end_of(number - 1))

    def end_of(self, number: int) -> int:
        """Where that frame ends in the file, and the next one begins."""
        return HEADER + number * (HEAD + self.page_size)

    def _read(self, number: int) -> tuple[bytes, bytes]:
        """A frame's header, and what its checksum is of."""
        data = os.pread(self._file, HEAD + self.page_size, self.end_of(number - 1))
        return data[:HEAD], data[:8] + data[HEAD:]

    def copy(self, path: str, size: int) -> None:
        """Writes the first `size` bytes of the log to another file."""
        with open(path, "wb") as file:
            for at in range(0, size, _BLOCK):
                file.write(os.pread(self._file, min(_BLOCK, size - at), at))

    def sum(self, before: Sum, data: bytes) -> Sum:
        """The checksum that goes on from the one before."""
        one, two = before
        words = iter(struct.unpack(f"{self.order}{len(data) // 4}I", data))
        for word, following in zip(words, words):
            one = one + word + two & _MASK
            two = two + following + one & _MASK
        return one, two

    def frames(self, after: int, last: int) -> Iterator[_Frame]:
        """The frames above `after`, up to which all are whole, or the log's beginning.

        One that is not whole is followed by others that are, as far as its own checksum is.
        """
        total = self.start
        if after:
            total = struct.unpack(">2I", self.head(after)[16:])
        before_is_whole = True
        for number in range(after + 1, last + 1):
            head, data = self._read(number)
            stored: Sum = struct.unpack(">2I", head[16:])
            found = self.sum(total, data)
            total = stored
            whole: bytes | None = data
            if found != stored:
                if number < self.count and self._follows(number + 1, found):
                    total = found  # all of it is right but its checksum
                else:
                    whole = self._corrected(data, found, stored)
            page, size = struct.unpack(">2I", (whole or data)[:8])
            is_ours = head[8:16] == self.salts
            if not page or not (is_ours or before_is_whole):
                whole = None  # zeroes follow zeroes, and older frames older ones
            before_is_whole = whole is not None
            yield _Frame(number, page, size, is_ours, None if whole is None else whole[8:])

    def _follows(self, number: int, before: Sum) -> bool:
        head, data = self._read(number)
        return self.sum(before, data) == struct.unpack(">2I", head[16:])

    def _corrected(self, data: bytes, found: Sum, stored: Sum) -> bytes | None:
        """The data that has the stored checksum and differs in one byte; None unless that is one.

        A word that is off by some number shifts the checksum by that times what the word's place
        has as its weight, which is a pair of Fibonacci numbers.
        """
        shift = stored[0] - found[0] & _MASK, stored[1] - found[1] & _MASK
        if not all(shift):
            return None  # it may be the checksum itself
        right = None
        words = list(struct.unpack(f"{self.order}{len(data) // 4}I", data))
        one, two = 0, 1  # the weight of the last word
        for place in range(len(words) - 1, -1, -1):
            odd = one & 1
            off = (shift[0] if odd else shift[1]) * pow(one if odd else two, -1, _MASK + 1) & _MASK
            if (off * one & _MASK, off * two & _MASK) == shift:
                changed = words[place] ^ (words[place] + off & _MASK)
                if any(changed & 0xFF << bits == changed for bits in (0, 8, 16, 24)):
                    if right is not None:
                        return None
                    right = place, words[place] + off & _MASK
            one, two = two, one + two & _MASK
        if right is None:
            return None
        words[right[0]] = right[1]
        return struct.pack(f"{self.order}{len(words)}I", *words)

    def frames_read_by_sqlite(self) -> int:
        """Up to which frame SQLite would read it.

        SQLite itself says it, of a copy, in a hundredth of the time that it would take here.
        """
        import tempfile  # here: mostly somebody has the log open, and it need not be asked for

        try:
            with tempfile.TemporaryDirectory(prefix="xs-") as folder:
                return self._ask_sqlite(os.path.join(folder, FILENAME))
        except (OSError, sqlite3.Error):
            return self._committed_and_whole()

    def _ask_sqlite(self, path: str) -> int:
        self.copy(path + "-wal", self._size)
        with open(path, "wb") as file:
            file.write(_empty_database(self.page_size))
        connection = sqlite3.connect(uri(path, "ro"), uri=True)
        try:
            connection.execute("PRAGMA schema_version").fetchone()
            return _known(os.path.dirname(path)).last
        finally:
            connection.close()

    def _committed_and_whole(self) -> int:
        """As SQLite finds it: what `frames` would set right is not whole to that."""
        found, total = 0, self.start
        for number in range(1, self.count + 1):
            head, data = self._read(number)
            total = self.sum(total, data)
            page, size = struct.unpack(">2I", data[:8])
            if not page or head[8:16] != self.salts or struct.unpack(">2I", head[16:]) != total:
                break
            if size:
                found = number
        return found


def _empty_database(page_size: int) -> bytes:
    """A database of one page whose journal is a write-ahead log."""
    page = bytearray(page_size)
    page[:16] = b"SQLite format 3\0"
    struct.pack_into(">H6B", page, 16, page_size & 0xFFFF or 1, 2, 2, 0, 64, 32, 32)
    struct.pack_into(">2I", page, 24, 1, 1)  # changes, pages
    struct.pack_into(">4I", page, 44, 4, 0, 0, 1)  # the schema's format; the encoding
    struct.pack_into(">I", page, 92, 1)  # changes
    struct.pack_into(">B2HH", page, 100, 13, 0, 0, page_size & 0xFFFF)  # an empty table
    return bytes(page)


# The shared memory beside it


class _Known(NamedTuple):
    """What `xs.db-shm` has of a log: its salts, up to which frame it was committed, and kept."""

    salts: bytes = b""
    last: int = 0
    folded_back: int = 0  # frames up to this one are durable in the database
    is_of_this_boot: bool = False


def _known(folder: str) -> _Known:
    try:
        with open(os.path.join(folder, FILENAME + "-shm"), "rb") as file:
            data = file.read(100)
            written = os.fstat(file.fileno()).st_mtime
    except OSError:
        return _Known()
    if len(data) < 100 or data[:48] != data[48:96]:
        return _Known()
    words = struct.unpack("=12I", data[:48])
    one = two = 0
    for word, following in zip(words[:10:2], words[1:10:2]):
        one = one + word + two & _MASK
        two = two + following + one & _MASK
    if (one, two) != words[10:]:
        return _Known()
    (folded_back,) = struct.unpack("=I", data[96:])
    # A clock that also counts while the system sleeps; macOS has but one.
    up = time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
    return _Known(data[32:40], words[4], folded_back, written > time.time() - up)


def _is_open(folder: str) -> bool:
    """Whether another process has the database open."""
    # As C has it (struct flock), where it is known; elsewhere it is asked of SQLite's log itself.
    is_linux = sys.platform == "linux"
    form, kind = ("hhqqi4x", 0) if is_linux else ("qqihh", 3)
    values = [fcntl.F_WRLCK, os.SEEK_SET, _OPEN_LOCK, 1, 0]
    if not is_linux:
        values = [_OPEN_LOCK, 1, 0, fcntl.F_WRLCK, os.SEEK_SET]
    with contextlib.suppress(OSError), open(os.path.join(folder, FILENAME + "-shm"), "rb") as file:
        asked = fcntl.fcntl(file.fileno(), fcntl.F_GETLK, struct.pack(form, *values))
        return bool(struct.unpack(form, asked)[kind] != fcntl.F_UNLCK)
    return False
