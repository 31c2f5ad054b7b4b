"""What happens within one transaction: kinds of work, and the commit that does them.

A `Work` is something to be done and whom to tell. The store's leader gives it a `Commit`, which
knows the ids, the frames added so far, what `last:n` asks for, and what is to follow once the
transaction is durable: entries to publish, content files to unlink. Nothing here commits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import groupby

from xs import frame, ids
from xs.bus import Entry
from xs.cas import Cas, Content
from xs.errors import Conflict, Invalid, NotFound, Unavailable, XsError
from xs.records import NamedTuple
from xs.writer import SWEEP_FRAMES, NewFrame, Removed, Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional, Union

RUN_FRAMES = 4096  # frames that get consecutive ids in one go
_PLAIN = ("forever", None, None)  # the ttl, condition and key of a plain append
IMPORT_AHEAD_MS = 86_400_000  # an imported id may be so far ahead of the clock
_ALWAYS = -1  # a time before every expiry: an expired frame keeps its content until it is swept


class Append(NamedTuple):
    """One frame to be appended: checked, and its content taken in."""

    topic: str
    content: Optional[Content] = None
    meta: str = "null"  # JSON text
    ttl: str = frame.FOREVER
    if_last: Optional[str] = None  # an id, or "none"
    key: Optional[str] = None


class Imported(NamedTuple):
    """One frame to be stored as it is. `content` is inline content that came with it, if any."""

    id: int
    topic: str
    hash: Optional[str]
    meta: str
    ttl: str
    content: Optional[Content] = None


class Work:
    """Something to be done in a transaction, and what to do when it is durable.

    `apply` is called once by the leader; after the commit `result` or `error` is set and `done`,
    if there is one, is called, by the leader: it must not block.
    """

    __slots__ = ("done", "error", "finished", "result", "waiter")

    # Whether an error of `apply` undoes the transaction, because part of the work may be in it by
    # then; what shares the transaction is done again without it.
    is_whole = False

    def __init__(self, done: Callable[[Work], None] | None = None) -> None:
        self.done = done
        self.result: Any = None
        self.error: XsError | None = None
        self.finished = False
        self.waiter: threading.Lock | None = None

    def apply(self, commit: Commit) -> Any:
        raise NotImplementedError

    def discard(self) -> None:
        """Forgets what was taken in for this work: it has failed, or nothing needs it any more."""

    def finish(self) -> None:
        self.finished = True
        if self.done is not None:
            self.done(self)
        elif self.waiter is not None:
            self.waiter.release()


class AppendWork(Work):
    """Appends one frame; the result is its line."""

    __slots__ = ("append",)

    def __init__(self, append: Append, done: Callable[[Work], None] | None = None) -> None:
        super().__init__(done)
        self.append = append

    def apply(self, commit: Commit) -> bytes:
        return commit.append(self.append)

    def discard(self) -> None:
        _discard(self.append.content)


class BatchWork(Work):
    """Appends several frames; the result is a list of lines and errors, one for each.

    With `atomic` the first error undoes all of them, and is raised as it is.
    """

    __slots__ = ("appends", "atomic")

    def __init__(self, appends: list[Union[Append, XsError]], *, atomic: bool = False) -> None:
        super().__init__()
        self.appends = appends
        self.atomic = atomic

    def apply(self, commit: Commit) -> list[Union[bytes, XsError]]:
        results: list[Union[bytes, XsError]] = []
        if self.atomic:
            commit.start_part()
        for is_plain, run in groupby(self.appends, commit.is_plain):
            if is_plain:
                results += commit.append_run(list(run))  # type: ignore[arg-type]
                continue
            for append in run:
                try:
                    if isinstance(append, XsError):
                        raise append
                    results.append(commit.append(append))
                except XsError as error:
                    if self.atomic:
                        commit.undo_part([a.content for a in self.appends if isinstance(a, Append)])
                        raise
                    if isinstance(append, Append):
                        _discard(append.content)
                    results.append(error)
        if self.atomic:
            commit.end_part()
        return results

    def discard(self) -> None:
        for append in self.appends:
            if isinstance(append, Append):
                _discard(append.content)


class ImportWork(Work):
    """Stores frames as they are; the result is a list of lines and errors, one for each."""

    __slots__ = ("frames",)

    def __init__(self, frames: list[Union[Imported, XsError]]) -> None:
        super().__init__()
        self.frames = frames

    def apply(self, commit: Commit) -> list[Union[bytes, XsError]]:
        results: list[Union[bytes, XsError]] = []
        for each in self.frames:
            try:
                if isinstance(each, XsError):
                    raise each
                results.append(commit.import_frame(each))
            except XsError as error:
                if isinstance(each, Imported):
                    _discard(each.content)
                results.append(error)
        return results

    def discard(self) -> None:
        for each in self.frames:
            if isinstance(each, Imported):
                _discard(each.content)


class RemoveWork(Work):
    """Removes one frame; raises `NotFound` if there is none."""

    __slots__ = ("id",)

    def __init__(self, value: int) -> None:
        super().__init__()
        self.id = value

    def apply(self, commit: Commit) -> None:
        commit.remove(self.id)


class PinWork(Work):
    """Keeps content that no frame names (POST /cas); the result is its hash."""

    __slots__ = ("content",)

    def __init__(self, content: Content) -> None:
        super().__init__()
        self.content = content

    def apply(self, commit: Commit) -> str:
        return commit.pin(self.content)

    def discard(self) -> None:
        _discard(self.content)


class UnpinWork(Work):
    """Takes away pins made before a time; the result is how many, and the bytes they held."""

    __slots__ = ("before",)

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before = before

    def apply(self, commit: Commit) -> tuple[int, int]:
        return commit.unpin(self.before)


class SweepWork(Work):
    """Removes expired frames; the result is how many."""

    __slots__ = ()

    def apply(self, commit: Commit) -> int:
        return commit.sweep()


class RemoveOrphanWork(Work):
    """Removes a content file that no frame names; the result is its size in bytes."""

    __slots__ = ("digest",)

    def __init__(self, digest: bytes) -> None:
        super().__init__()
        self.digest = digest

    def apply(self, commit: Commit) -> int:
        return commit.remove_orphan(self.digest)


class Commit:
    """One batch's transaction, as works see it, and what is to happen once it is durable."""

    def __init__(
        self, writer: Writer, cas: Cas, sequence: ids.Sequence, now: int, *, delivers: bool
    ) -> None:
        """`delivers`: somebody may follow live in this process, so ephemeral frames make sense."""
        self.writer = writer
        self.now = now
        self.entries: list[Entry] = []
        self.gone: list[int] = []
        self.unnamed_files: list[bytes] = []
        self.newest_ephemeral = 0
        self.history_mark: int | None = None
        self.earliest_expiry: int | None = None
        self._cas = cas
        self._delivers = delivers
        self._ids = sequence
        self._mark: int | None = None
        self._trims: dict[str, str] = {}
        self._maybe_unnamed: set[bytes] = set()
        self._part: tuple[int, int, dict[str, str]] = (0, 0, {})

    def append(self, append: Append) -> bytes:
        """Adds a frame and answers its line, or that of the frame its key has made before.

        Raises `Conflict` when its condition does not hold.
        """
        topic, content, meta, ttl, if_last, key = append
        if ttl == frame.EPHEMERAL and not self._delivers:
            raise Invalid("an ephemeral frame needs a server: start one with xs serve")
        if self._trims.get(topic, ttl) != ttl:
            self._trim(topic, self._trims.pop(topic))
        if key is not None:
            answered = self.writer.answer_for(topic, key)
            if answered is not None:
                _discard(content)
                return answered
        if if_last is not None:
            self._check_last(topic, if_last)
        hash_ = data = digest = expires = None
        if content is not None:
            data, digest = content.data, content.digest
            hash_ = frame.integrity(digest)
            if data is None:
                self._place(content, ttl)
        while True:
            value = self._ids.next(self.now)
            json = frame.encode(topic, self._ids.text(value), hash_, meta, ttl)
            if ttl != frame.FOREVER:
                expires = frame.expiry(ttl, value >> 80)
            if ttl == frame.EPHEMERAL:
                self.newest_ephemeral = value
                break
            if self.writer.append(NewFrame(value, topic, json, expires, digest, data)):
                break
            self._ids.skip_millisecond()
        line = json.encode()
        if ttl != frame.EPHEMERAL:
            digest = data = None  # stored: the ring needs no content of it
        self.entries.append(Entry(value, topic, line, expires, digest, data))
        if expires is not None and (self.earliest_expiry is None or expires < self.earliest_expiry):
            self.earliest_expiry = expires
        if ttl.startswith("last:"):
            self._trims[topic] = ttl
        if key is not None:
            self.writer.keep_answer(topic, key, json)
        self._mark = None if self._mark is None else value
        return line

    def is_plain(self, append: Union[Append, XsError]) -> bool:
        """Whether `append_run` can take it: no condition, key or file, and kept for ever."""
        return (
            isinstance(append, Append)
            and append[3:] == _PLAIN
            and (append.content is None or append.content.data is not None)
            and append.topic not in self._trims
        )

    def append_run(self, appends: list[Append]) -> list[bytes]:
        """Adds plain frames, as `append` would one by one, and answers their lines.

        The way of long batches: what is the same for all is done once (bench/batch.py).
        """
        lines: list[bytes] = []
        for start in range(0, len(appends), RUN_FRAMES):
            part = appends[start : start + RUN_FRAMES]
            while True:
                values, texts = self._ids.run(len(part), self.now)
                row = self.writer.room(values[0] >> 80, len(part))
                if row is not None:
                    break
                self._ids.skip_millisecond()
            frames = []
            for value, id_text, (topic, content, meta, ttl, _, _) in zip(values, texts, part):
                hash_ = data = digest = None
                if content is not None:
                    digest, data = content.digest, content.data
                    hash_ = frame.integrity(digest)
                json = frame.encode(topic, id_text, hash_, meta, ttl)
                line = json.encode()
                lines.append(line)
                self.entries.append(Entry(value, topic, line))
                frames.append((value, topic, json, None, digest, data))
            self.writer.append_run(row, frames)
            self._mark = None if self._mark is None else values[-1]
        return lines

    def _check_last(self, topic: str, expected: str) -> None:
        newest = self.writer.last(topic, self.now)
        actual = "none" if newest is None else frame.id_of(newest)
        if actual != expected:
            raise Conflict(
                f"the newest frame of {topic} is {actual}, not {expected}", newest or b"null"
            )

    def _place(self, content: Content, ttl: str) -> None:
        if ttl == frame.EPHEMERAL:
            raise Invalid(
                "the content is too large for an ephemeral frame: give the frame another ttl"
            )
        self._place_file(content)

    def _place_file(self, content: Content) -> None:
        # It has no temporary file when its batch failed and is done again, work by work: what was
        # placed then, or left to a frame with the same key, may be gone by now.
        if content.data is None and content.path is None and not self._cas.has(content.digest):
            raise Unavailable("the content was lost when a commit failed: send it again")
        self._cas.place(content)

    def import_frame(self, new: Imported) -> bytes:
        """Stores a frame as it is. Raises `Invalid` and `Conflict`."""
        self.apply_trims()  # a last:n before it is not to take it
        json = frame.encode(new.topic, ids.text(new.id), new.hash, new.meta, new.ttl)
        line = json.encode()
        if self._mark is None:
            self._mark = self.writer.mark()
        if new.id <= self._mark:
            found = self.writer.find(new.id)
            if found == line:
                _discard(new.content)
                return line
            if found is not None:
                raise Conflict(f"another frame has the id {ids.text(new.id)}")
        if new.id >> 80 > self.now + IMPORT_AHEAD_MS:
            raise Invalid(f"the id {ids.text(new.id)} is more than a day ahead of the clock")
        digest, data = self._content_of(new)
        expires = frame.expiry(new.ttl, new.id >> 80)
        stored = NewFrame(new.id, new.topic, json, expires, digest, data)
        ahead = new.id > self._mark
        # Above all others it may still need room: those of its millisecond may lie at its end.
        if not ((ahead and self.writer.append(stored)) or self.writer.insert(stored)):
            raise Invalid(f"the millisecond of the id {ids.text(new.id)} is full")
        if ahead:
            self._mark = new.id
            self._ids.raise_to(new.id)
        self.history_mark = max(new.id, self.history_mark or 0)
        if expires is not None and (self.earliest_expiry is None or expires < self.earliest_expiry):
            self.earliest_expiry = expires
        return line

    def _content_of(self, new: Imported) -> tuple[bytes | None, bytes | None]:
        if new.hash is None:
            return None, None
        digest = frame.parse_integrity(new.hash)
        if new.content is not None:
            if new.content.digest != digest:
                raise Invalid(f"the content of {ids.text(new.id)} does not match its hash")
            self._place_file(new.content)
            return digest, new.content.data
        data = self.writer.inline_content(digest, self.now)
        if data is None and not self._cas.has(digest):
            raise Invalid(
                f"the content {new.hash} of {ids.text(new.id)} is not here: "
                "put it with POST /cas first, or give it in the line"
            )
        return digest, data

    def remove(self, value: int) -> None:
        """Removes a frame. Raises `NotFound`."""
        self.apply_trims()
        removed = self.writer.remove(value)
        if removed is None:
            raise NotFound(f"no frame {ids.text(value)}")
        self._note_removed([removed])

    def sweep(self) -> int:
        """Removes expired frames, some at a time; answers how many."""
        removed = self.writer.remove_expired(self.now)
        self._note_removed(removed)
        if len(removed) == SWEEP_FRAMES:
            self.earliest_expiry = self.now
        return len(removed)

    def pin(self, content: Content) -> str:
        """Keeps content, and answers its hash."""
        self._place_file(content)
        self.writer.pin(content.digest, content.data, self.now)
        return content.hash

    def unpin(self, before: int) -> tuple[int, int]:
        """Takes away pins made before a time; answers how many contents went, and their bytes."""
        files, count, size = self.writer.unpin(before)
        kept = 0
        for digest in files:
            if self.writer.names_file(digest, _ALWAYS):
                kept += 1
            else:
                size += self._cas.size(digest) if self._cas.has(digest) else 0
                self._maybe_unnamed.add(digest)
        return count - kept, size

    def remove_orphan(self, digest: bytes) -> int:
        if self.writer.names_file(digest, _ALWAYS) or not self._cas.has(digest):
            return 0
        self._maybe_unnamed.add(digest)
        return self._cas.size(digest)

    def apply_trims(self) -> None:
        """Does what `last:n` asks of the frames added so far."""
        while self._trims:
            topic, ttl = self._trims.popitem()
            self._trim(topic, ttl)

    def _trim(self, topic: str, ttl: str) -> None:
        self._note_removed(self.writer.remove_but(topic, frame.kept(ttl) or 1, self.now))

    def _note_removed(self, removed: list[Removed]) -> None:
        for each in removed:
            self.gone.append(ids.parse(frame.id_of(each.line)))
            if each.file_digest is not None:
                self._maybe_unnamed.add(each.file_digest)

    def look_for_unnamed_files(self) -> None:
        """Which of the content files that lost a frame in this transaction have lost their last."""
        for digest in self._maybe_unnamed:
            if not self.writer.names_file(digest, _ALWAYS):
                self.unnamed_files.append(digest)

    def durable_entries(self) -> list[Entry]:
        """What is to be delivered: not what this very transaction has removed again."""
        if not self.gone:
            return self.entries
        gone = set(self.gone)
        return [entry for entry in self.entries if entry.id not in gone]

    def start_part(self) -> None:
        """Starts a part of the transaction that can be undone by itself."""
        self.apply_trims()
        self.writer.savepoint()
        self._part = (len(self.entries), len(self.gone), dict(self._trims))

    def undo_part(self, contents: list[Optional[Content]]) -> None:
        """Undoes the part; what has got its name of `contents` goes, if nothing else names it."""
        self.writer.undo()
        entries, gone, trims = self._part
        del self.entries[entries:]
        del self.gone[gone:]
        self._trims = trims
        for content in contents:
            if content is not None and content.data is None and content.path is None:
                self._maybe_unnamed.add(content.digest)

    def end_part(self) -> None:
        self.apply_trims()
        self.writer.release()


def _discard(content: Content | None) -> None:
    if content is not None and content.path is not None:
        try:
            os.unlink(content.path)
        except FileNotFoundError:
            pass
        content.path = None
