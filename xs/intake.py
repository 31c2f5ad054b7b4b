"""What a handler is given: the frames that are for it, in the stream's order, many at a time.

It reads behind a position, from the bus or, where that has no more of it, from the index. Orders to
the handler itself lie among the frames: nothing behind one is given, and whoever reads here is told
of it. What the handler has caused itself is no frame for it. This module knows no processes.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

from xs import frame, ids
from xs.errors import Damaged, Failed
from xs.reader import CONTENT_INLINE_MAX, Form, write
from xs.runner import Order
from xs.schema import Stored
from xs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

INPUT_FRAMES = 500  # that are read at a time
AHEAD_SECONDS = 0.05  # after which frames that are taken one by one are read again
INPUT_BYTES = 1 << 20  # … unless they are longer than that together
REGISTRATIONS_CACHED = 10_000  # ids of which a handler knows whether they are its registrations
NEVER = 1 << 128  # above every id
_WITH_CONTENT = Form(content=True)


class CantBeGiven(Failed):
    """The next frame's content is damaged. `id` is the frame's, as text."""

    def __init__(self, id_text: str, why: Damaged) -> None:
        super().__init__(f"frame {id_text} can't be given: {why}")
        self.id = id_text


class Intake:
    """The frames for the handler of one topic. `wants` may be asked by any thread."""

    def __init__(self, store: Store, name: str, on_order: Callable[[Order], None]) -> None:
        """`on_order`: is told of an order that was found, maybe not as the first to find it."""
        self._store = store
        self._on_order = on_order
        self._register = f"{name}.register"
        self._orders = frozenset((self._register, f"{name}.unregister"))
        self._order_starts = tuple(f'{{"topic":"{each}"'.encode() for each in self._orders)
        # Ids of registrations: whether they are, or were, this handler's.
        kept = store.index.scripts("handler", name)  # what `handlers` persists
        self._registrations = {script.source: True for script in kept}
        self._wanted: frame.Patterns = frozenset()
        self._content = False
        self._patterns: frame.Patterns = frozenset()  # of frames that are looked at
        # What is taken one by one: what was read and is not taken, until when that is good, how
        # many are read next, and the last id that was taken.
        self._ahead: collections.deque[bytes] = collections.deque()
        self._stale_at = 0.0
        self._most = 1
        self._taken = -1
        self.heard = -1  # orders up to here are known
        self.until = NEVER  # the order that takes it out: nothing from there on is given
        self.position = -1  # frames up to here were read, or are not for it

    def note(self, source: int) -> None:
        """That is a registration of this handler's, whatever comes of it."""
        self._registrations[ids.text(source)] = True

    def begin(self, patterns: frame.Patterns, *, content: bool) -> None:
        """A registration is in service, and wants these frames, with their content or without."""
        self._wanted, self._content = patterns, content
        self._patterns = None if patterns is None else patterns | self._orders

    def end(self) -> None:
        """None is in service: nothing is wanted."""
        self._patterns = frozenset()
        self._ahead.clear()

    def wants(self, topic: str) -> bool:
        """Whether frames on that topic are to be looked at."""
        return frame.matches(self._patterns, topic)

    def go_back(self, position: int) -> None:
        """What lies behind that id is to be given, again if it was before."""
        self.position = self._taken = position
        self._ahead.clear()

    def end_before(self, order: int) -> None:
        """Nothing from that frame on is to be given."""
        self.until = order
        while self._ahead and frame.id_of(self._ahead[-1]) >= ids.text(order):
            self._ahead.pop()

    def has_given(self, value: int) -> bool:
        """Whether all frames up to that id were taken that are for it."""
        return not self._ahead and self.position >= value

    def next(self, most: int = INPUT_FRAMES) -> list[bytes] | None:
        """The next frames, a line each, at most so many; an empty list where others lie.

        None: there is nothing to be read now. Raises `Damaged` before a frame that can't be read,
        `CantBeGiven`.
        """
        before = self.position
        lines = self._read(most)
        return lines if lines or self.position > before else None

    def next_one(self) -> list[bytes] | None:
        """As `next`, one at most.

        For a handler that is quick many are read at a time. Not for one that is slow: frames may
        be removed, expire, and be imported, before it comes to them.
        """
        if self._ahead and time.monotonic() > self._stale_at:
            self.go_back(self._taken)
            self._most = 1
        if not self._ahead:
            lines = self.next(self._most)
            if not lines:
                return lines
            self._ahead.extend(lines)
            self._most = min(2 * self._most, INPUT_FRAMES)
            self._stale_at = time.monotonic() + AHEAD_SECONDS
        line = self._ahead.popleft()
        self._taken = ids.parse(frame.id_of(line))
        return [line]

    def _read(self, most: int) -> list[bytes]:
        store, now = self._store, self._store.clock()
        entries = store.bus.after(self.position)
        if entries is None:
            return self._read_stored(most, now)
        lines: list[bytes] = []
        size = 0
        for entry in entries:
            if len(lines) >= most or size > INPUT_BYTES:
                return lines
            if entry.id >= self.until:
                break
            if entry.is_live(now):
                if (
                    entry.topic in self._orders
                    and entry.first is None
                    and self._hears(entry.id, entry.topic)
                ):
                    break
                if frame.matches(self._wanted, entry.topic) and not self._is_own(entry.line):
                    if not self._add(entry.id, entry.line, None, lines):
                        return lines
                    size += len(lines[-1])
            self.position = entry.id
        else:
            return lines
        self.position = max(self.position, self.until - 1)
        return lines

    def _read_stored(self, most: int, now: int) -> list[bytes]:
        store = self._store
        bound = min(store.newest(), self.until - 1)
        if self._content:
            rows = store.index.walk(self._patterns).rows(self.position, bound, most, now)
        else:
            page, _ = store.index.walk(self._patterns).page(self.position, bound, most, now)
            found = page.split(b"\n")[:-1]
            if found and self._is_all_to_be_given(page):
                self.position = ids.parse(frame.id_of(found[-1]))
                return found
            rows = [Stored(line, None, False) for line in found]
        lines: list[bytes] = []
        size = 0
        for stored in rows:
            line = stored.line
            if size > INPUT_BYTES:
                return lines
            value = ids.parse(frame.id_of(line))
            is_wanted = True
            if line.startswith(self._order_starts):
                topic = frame.topic_of(line)
                if not self._continues_run(value, line) and self._hears(value, topic):
                    self.position = value - 1
                    return lines
                is_wanted = frame.matches(self._wanted, topic)
            if is_wanted and not self._is_own(line):
                if not self._add(value, line, stored, lines):
                    return lines
                size += len(lines[-1])
            self.position = value
        if not rows:
            self.position = max(self.position, bound)
        return lines

    def _is_all_to_be_given(self, page: bytes) -> bool:
        """Whether no frame of a page needs to be looked at: as good as all history is such."""
        return (
            len(page) <= INPUT_BYTES
            and b'"handler_id"' not in page
            and not any(start in page for start in self._order_starts)
        )

    def _continues_run(self, value: int, line: bytes) -> bool:
        """Whether a stored frame is a further one of a chunked content: it orders nothing."""
        return b'"chunk"' in line and self._store.index.continues_run(value)

    def _hears(self, value: int, topic: str) -> bool:
        """Whether a frame puts another registration in this one's place, or takes it out.

        The server's own order may be on its way, or may have come.
        """
        if value <= self.heard:
            return False
        self.until = value
        self._on_order(Order(topic.endswith(".register"), value))
        return True

    def _add(self, value: int, line: bytes, stored: Optional[Stored], lines: list[bytes]) -> bool:
        """Adds a frame to the lines; False if it can't be given, and is not the first to be."""
        if self._content:
            try:
                line = write(_WITH_CONTENT, self._store, line, stored, CONTENT_INLINE_MAX)[:-1]
            except Damaged as error:
                if lines:
                    return False
                raise CantBeGiven(ids.text(value), error) from None
        lines.append(line)
        return True

    def _is_own(self, line: bytes) -> bool:
        """Whether a frame was caused by a registration on this handler's own topic."""
        if b'"handler_id"' not in line:
            return False
        cause = frame.Frame.from_json(line).meta
        if not isinstance(cause, dict):
            return False
        found = cause.get("handler_id")
        return isinstance(found, str) and self._is_own_registration(found)

    def _is_own_registration(self, id_text: str) -> bool:
        found = self._registrations.get(id_text)
        if found is None:
            # One that came with an import is in no table.
            line = None
            if ids.is_id(id_text):
                line = self._store.index.get(ids.parse(id_text), self._store.clock())
            found = line is not None and frame.topic_of(line) == self._register
            if len(self._registrations) < REGISTRATIONS_CACHED:
                self._registrations[id_text] = found
        return found
