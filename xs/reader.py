"""Reading the stream: a position, the history after it, and what comes live.

A reader holds the id of the last frame it has passed and nothing else. History comes in pages from
the index, up to what was there when the reading began; from then on frames come from the bus, or
from the index again when the position has left the bus's ring. The position decides, so no stored
frame is missed or given twice, however slow the reader is.

What is given is bytes, whole lines (or server-sent events), as they are to be sent.
"""

from __future__ import annotations

import codecs

from xs import frame, ids, times
from xs.errors import NotFound
from xs.records import NamedTuple
from xs.schema import PAGE_BYTES, Stored

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xs.frame import Entry
    from xs.query import ReadOptions
    from xs.store import Store

THRESHOLD = "xs.threshold"
PULSE = "xs.pulse"

CONTENT_INLINE_MAX = 8 * 1024 * 1024  # bytes: larger content is left to its hash by with-content
LIVE_BYTES = 256 * 1024  # of live frames that are made in one go; larger content comes in parts
COMMIT_MS = 1000  # how long a commit may take, for a reader that waits for the last of them
_PART_BYTES = 64 * 1024  # of a large content: six times as many as JSON, if each is escaped
_UNLIMITED = 1 << 62

# Pages come and go. glibc would give their memory back each time, to be faulted in anew (bench/
# replay.py: 0.05 µs a frame); it keeps twice as much as the largest block that was ever freed
# (mallopt(3), M_MMAP_THRESHOLD), so one is. Untouched, it costs no memory.
bytes(1 << 20)


class Form(NamedTuple):
    """How frames are written: as lines or server-sent events, and what is added to each."""

    sse: bool = False
    timestamp: bool = False
    content: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether stored lines are sent as they are."""
        return not (self.sse or self.timestamp or self.content)


class Reader:
    """One reading of the stream."""

    def __init__(
        self,
        store: Store,
        options: ReadOptions,
        *,
        sse: bool = False,
        threshold: bool = True,
    ) -> None:
        self.store = store
        self.options = options
        self.form = Form(sse, options.with_timestamp, options.with_content)
        self.patterns = options.patterns
        self.chunks = not options.no_chunks
        self._walk = store.index.walk(self.patterns, chunks=self.chunks)
        self.left = _UNLIMITED if options.limit is None else options.limit
        self.has_passed_history = False  # `follow` has given it, and the threshold
        self.is_amid = False  # a frame: what was given last is a part of it
        self._large: int | None = None  # up to there a frame has to be read from the index
        self.wants_threshold = threshold and options.follow and not options.new
        # What is stored up to here is history; what comes after it is live.
        self._now = store.newest()
        self.position = self._first_position()

    def _first_position(self) -> int:
        options = self.options
        if options.new:
            return self._now
        if options.last is None:
            return options.after
        start = self.store.index.start_of_last(
            self.patterns,
            options.last,
            options.after,
            self._bound(self._now),
            self.store.clock(),
            chunks=self.chunks,
        )
        return max(options.after, self._now) if start is None else start - 1

    def _bound(self, newest: int) -> int:
        until = self.options.until
        return newest if until is None else min(newest, until)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more can come: `limit` or `until` is reached."""
        until = self.options.until
        return self.left <= 0 or (until is not None and self.position >= until)

    @property
    def is_overdue(self) -> bool:
        """Whether all that comes up to `until` is stored by now: who then finds nothing has it all.

        A frame has its id before its commit is through: one of the last moment may still come.
        """
        until = self.options.until
        return until is not None and self.store.clock() - ids.milliseconds(until) > COMMIT_MS

    def history(self) -> Iterator[bytes]:
        """What was stored when the reading began: in blocks of whole frames, or parts of one."""
        yield from self._stored_up_to(self._now)

    def missed(self) -> Iterator[bytes] | None:
        """What is stored after the position, if the bus does not have all of it; else None."""
        large, self._large = self._large, None
        up_to = self.store.bus.floor if large is None else large
        if self.position >= up_to:
            return None
        # And no further: what follows is in the bus, with what is ephemeral.
        return self._stored_up_to(up_to)

    def _stored_up_to(self, newest: int) -> Iterator[bytes]:
        bound = self._bound(newest)
        while self.left > 0 and self.position < bound:
            block, count, last = self._page(bound)
            if not count:
                break
            self.left -= count
            if isinstance(block, bytes):
                self.position = last
                yield block
            else:
                self.is_amid = True
                yield from block
                self.is_amid = False
                self.position = last
            del block  # before the next one is made
        # Nothing selected is left up to `newest`, which is as good as having read it.
        if self.left > 0:
            self.position = max(self.position, bound)

    def _page(self, bound: int) -> tuple[bytes | Iterator[bytes], int, int]:
        """The next frames, how many, and the id of the last. One with large content comes alone."""
        walk, now = self._walk, self.store.clock()
        if not self.form.content:
            page, count = walk.page(self.position, bound, self.left, now)
            if not count:
                return b"", 0, self.position
            last = ids.parse(frame.id_of(page[page.rfind(b"\n", 0, -1) + 1 :]))
            if not self.form.is_plain:
                page = b"".join(
                    [write(self.form, self.store, line) for line in page.split(b"\n")[:-1]]
                )
            return page, count, last
        rows = walk.rows(self.position, bound, self.left, now)
        if not rows:
            return b"", 0, self.position
        blocks = []
        size = count = 0
        for stored in rows:
            block = write(self.form, self.store, stored.line, stored)
            if not block:
                if count:
                    break
                parts = write_parts(self.form, self.store, stored.line, stored)
                return parts, 1, ids.parse(frame.id_of(stored.line))
            blocks.append(block)
            size += len(block)
            count += 1
            if size > PAGE_BYTES:
                break
        return b"".join(blocks), count, ids.parse(frame.id_of(rows[count - 1].line))

    def coming(self) -> bytes | None:
        """What comes next from the bus, up to a bound; None when the reader has caught up.

        It may be nothing for this reader, or have left the bus just now, and is b"" then. Nothing
        of the bus is held on to: who is slow to send this holds no more than this.
        """
        entries = self.store.bus.after(self.position)
        if entries is None:
            return b""
        return self.live(entries) if entries else None

    def live(self, entries: list[Entry]) -> bytes:
        """What of these entries is for this reader, as bytes, up to a bound.

        The position passes all that these bytes are of. One with large content is left to `missed`.
        """
        entries = portion(entries)
        now = self.store.clock()
        until = self.options.until
        found: list[Entry] = []
        for entry in entries:
            if len(found) == self.left or (until is not None and entry.id > until):
                break
            if entry.first is not None and not self.chunks:
                continue
            if entry.is_live(now) and frame.matches(self.patterns, entry.topic):
                found.append(entry)
        block, count = write_entries(self.form, self.store, found)
        if found and not count:
            self._large = found[0].id
        self.left -= count
        passed = entries if count == len(found) else found[:count]
        if passed:
            self.position = max(self.position, passed[-1].id)
        return block

    def threshold(self) -> bytes:
        """The frame that says: from here on live."""
        return self._synthetic(THRESHOLD)

    def pulse(self) -> bytes:
        """The heartbeat."""
        return self._synthetic(PULSE)

    def _synthetic(self, topic: str) -> bytes:
        """A frame that is never stored. Its id is the position: resuming there is right."""
        id_text = ids.text(min(max(self.position, 0), ids.MAX))
        line = frame.encode(topic, id_text, None, "null", frame.EPHEMERAL)
        if self.form.timestamp:
            line = f'{line[:-1]},"timestamp":"{times.timestamp(self.store.clock())}"}}'
        data = line.encode()
        return b"data: " + data + b"\n\n" if self.form.sse else data + b"\n"

    def follow(self) -> Iterator[bytes]:
        """History, the threshold and all that comes, for who can wait in this thread.

        Ends with `limit`, `until`, or the store. An empty block is given whenever nothing came for
        a while, so that the caller can look around.
        """
        yield from self.history()
        if self.left <= 0:
            return
        if self.wants_threshold:
            yield self.threshold()
        self.has_passed_history = True
        while not self.is_finished:
            is_overdue = self.is_overdue  # first: what is there by then is still given
            missed = self.missed()
            if missed is not None:
                yield from missed
                continue
            is_closed = self.store.bus.closed  # as above
            block = self.coming()
            if block is not None:
                yield block
            elif is_closed:
                return
            elif not self.store.wait(self.position, 0.0 if is_overdue else None):
                if is_overdue:
                    return
                yield b""


def write(
    form: Form,
    store: Store,
    line: bytes,
    stored: Stored | None = None,
    content_max: int = LIVE_BYTES,
) -> bytes:
    """One frame's line as bytes to be sent, with what the form adds.

    b"" if it would be given a content of more than `content_max` bytes: that is for `write_parts`.
    """
    content: tuple[bytes, ...] = ()
    if form.content:
        found = _content_of(store, line, stored, content_max)
        if found is None:
            return b""
        content = found
    start, end = _around(form, line)
    return b"".join((start, *content, end))


def write_parts(
    form: Form, store: Store, line: bytes, stored: Stored | None = None
) -> Iterator[bytes]:
    """As `write`, of a frame with large content: in parts, of which memory holds one at a time.

    The content is read twice, as all of it has to be looked at to know whether it is text; so what
    is damaged is known before the first part. Raises `NotFound` if it is removed after that.
    """
    start, end = _around(form, line)
    try:
        is_text = _is_text(_blocks_of(store, line, stored))
    except NotFound:  # removed meanwhile
        yield start + end
        return
    yield start + (b',"content":"' if is_text else b',"content_base64":"')
    encode = _text_parts if is_text else _base64_parts
    yield from filter(None, encode(_blocks_of(store, line, stored)))
    yield b'"' + end


def _around(form: Form, line: bytes) -> tuple[bytes, bytes]:
    """What a frame's bytes begin with, up to where content goes, and what they end with."""
    start, end = line[:-1], b"}\n"
    if form.timestamp:
        stamp = times.timestamp(ids.milliseconds(ids.parse(frame.id_of(line))))
        end = f',"timestamp":"{stamp}"}}\n'.encode()
    if form.sse:
        return b"id: %b\ndata: %b" % (frame.id_of(line).encode(), start), end + b"\n"
    return start, end


def _blocks_of(store: Store, line: bytes, stored: Stored | None) -> Iterator[bytes]:
    """A large content in blocks whose JSON is bounded, whatever they have."""
    _, blocks = _open(store, line, stored)
    for block in blocks:
        for at in range(0, len(block), _PART_BYTES):
            yield block[at : at + _PART_BYTES]


def _open(store: Store, line: bytes, stored: Stored | None) -> tuple[int, Iterator[bytes]]:
    if stored is None:
        return store.content_of(ids.parse(frame.id_of(line)))
    return store.stored_content(stored)


def _is_text(blocks: Iterator[bytes]) -> bool:
    """Whether a content is UTF-8; it is read to its end in any case, and so verified."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_text = True
    for block in blocks:
        if is_text:
            try:
                decoder.decode(block)
            except UnicodeDecodeError:
                is_text = False
    return is_text and not decoder.getstate()[0]


def _text_parts(blocks: Iterator[bytes]) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in blocks:
        yield _quoted(decoder.decode(block))[1:-1].encode()


def _base64_parts(blocks: Iterator[bytes]) -> Iterator[bytes]:
    import binascii

    left = b""
    for block in blocks:
        data = left + block
        whole = len(data) - len(data) % 3
        left = data[whole:]
        yield binascii.b2a_base64(data[:whole], newline=False)
    yield binascii.b2a_base64(left, newline=False)


def portion(entries: list[Entry]) -> list[Entry]:
    """The first of these entries, up to one with which they have `LIVE_BYTES`."""
    if len(entries) < 2:
        return entries
    size = 0
    for count, entry in enumerate(entries, 1):
        size += len(entry.line)
        if size >= LIVE_BYTES:
            return entries[:count]
    return entries


def write_entries(form: Form, store: Store, entries: list[Entry]) -> tuple[bytes, int]:
    """Live frames, a portion of them, as bytes to be sent; of how many of them these bytes are.

    With content it ends when that has come to LIVE_BYTES, and before a frame whose content alone
    has more.
    """
    if form.is_plain:
        return b"".join([entry.line + b"\n" for entry in entries]), len(entries)
    blocks: list[bytes] = []
    size = 0
    for entry in entries:
        block = write(form, store, entry.line)
        if not block:
            break
        blocks.append(block)
        size += len(block)
        if form.content and size >= LIVE_BYTES:
            break
    return b"".join(blocks), len(blocks)


def _content_of(
    store: Store, line: bytes, stored: Stored | None, content_max: int
) -> tuple[bytes, ...] | None:
    """The member of a frame's JSON that has its content, in parts; None if that is too large."""
    hash_ = frame.hash_text(line)
    if hash_ is None:
        return ()
    if stored is not None and not stored.is_file:
        data = _checked(stored.content or b"", hash_)
    else:
        try:
            size, blocks = _open(store, line, stored)
        except NotFound:
            return ()  # removed meanwhile
        if size > CONTENT_INLINE_MAX:
            return ()
        if size > content_max:
            return None
        data = b"".join(blocks)
    try:
        return b',"content":', _quoted(data.decode()).encode()
    except UnicodeDecodeError:
        import binascii

        return b',"content_base64":"', binascii.b2a_base64(data, newline=False), b'"'


def _first_checked(data: bytes, hash_: str) -> bytes:
    """Loads what hashes, which a plain read does without."""
    global _checked
    from xs.content import checked

    _checked = checked
    return checked(data, hash_)


def _first_quoted(text: str) -> str:
    """Loads what quotes, likewise."""
    global _quoted
    from json.encoder import encode_basestring

    _quoted = encode_basestring
    return encode_basestring(text)


_checked: Callable[[bytes, str], bytes] = _first_checked
_quoted: Callable[[str], str] = _first_quoted
