"""One transaction, as the works that share it see it (`work`).

A `Commit` knows the ids, the frames added so far, what `last:n` asks for, and what is to follow
once the transaction is durable: entries to publish, content files to unlink. Nothing here commits.
"""

from __future__ import annotations

from xs import fault, frame, ids
from xs.content import Content, discard, small
from xs.errors import Conflict, Invalid, NotFound, Unavailable
from xs.frame import Entry
from xs.records import NamedTuple
from xs.writer import SWEEP_FRAMES, NewFrame, Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from xs.removal import Removed
    from xs.store import Store

CHUNK = '"chunk"'  # in the meta of a frame that continues a run, or looks like it
_ALWAYS = -1  # a time before every expiry: an expired frame keeps its content until it is swept


class Append(NamedTuple):
    """One frame to be appended: checked, and its content taken in."""

    topic: str
    content: Optional[Content] = None
    meta: str = "null"  # JSON text
    ttl: str = frame.FOREVER
    if_last: Optional[str] = None  # an id, or "none"
    key: Optional[str] = None


def is_plain(append: Append) -> bool:
    """Whether it asks for nothing but a frame that stays."""
    _, _, meta, ttl, if_last, key = append
    return ttl == frame.FOREVER and if_last is None and key is None and CHUNK not in meta


class Commit:
    """One batch's transaction, as works see it, and what is to happen once it is durable."""

    def __init__(self, writer: Writer, store: Store, sequence: ids.Sequence, now: int) -> None:
        self.writer = writer
        self.now = now
        self.entries: list[Entry] = []
        self.gone: list[int] = []
        self.gone_runs: set[int] = set()
        self.unnamed_files: list[bytes] = []
        self.newest_ephemeral = 0
        self.history_mark: int | None = None
        self.unseen_mark: int | None = None  # up to it another process has appended
        self.earliest_expiry: int | None = None
        self.store = store
        self.ids = sequence
        self.mark: int | None = None  # no id above it is given out; known once it was asked for
        self.trims: dict[str, str] = {}  # topics whose last:n is yet to be done, and that
        self._maybe_unnamed: set[bytes] = set()
        self._part: tuple[int, int, set[int], dict[str, str]] = (0, 0, set(), {})

    def append(self, append: Append) -> bytes:
        """Adds a frame and answers its line, or that of the frame its key has made before.

        Raises `Conflict` when its condition does not hold.
        """
        topic, content, meta, ttl, if_last, key = append
        if ttl == frame.EPHEMERAL:
            self.store.check_ttl(ttl)
        if self.trims.get(topic, ttl) != ttl:
            self.trim(topic, self.trims.pop(topic))
        if key is not None:
            answered = self.writer.answer_for(topic, key)
            if answered is not None:
                discard(content)
                return answered
        if if_last is not None:
            self._check_last(topic, if_last)
        if CHUNK in meta:
            self._check_is_no_piece(topic, meta)
        hash_ = data = digest = expires = None
        if content is not None:
            data, digest = content.data, content.digest
            hash_ = frame.integrity(digest)
            if data is None:
                self._place_of(content, ttl)
        while True:
            value = self.ids.next(self.now)
            json = frame.encode(topic, self.ids.text(value), hash_, meta, ttl)
            line = json.encode()
            if ttl != frame.FOREVER:
                expires = frame.expiry(ttl, value >> 80)
            if ttl == frame.EPHEMERAL:
                self.newest_ephemeral = value
                break
            if self.writer.append(NewFrame(value, topic, json, line, expires, digest, data)):
                break
            self.ids.skip_millisecond()
        if ttl != frame.EPHEMERAL:
            digest = data = None  # stored: the ring needs no content of it
        self.entries.append(Entry(value, topic, line, expires, digest, data))
        if expires is not None and (self.earliest_expiry is None or expires < self.earliest_expiry):
            self.earliest_expiry = expires
        if ttl.startswith("last:"):
            self.trims[topic] = ttl
        if key is not None:
            self.writer.keep_answer(topic, key, json)
        self.mark = None if self.mark is None else value
        return line

    def _check_is_no_piece(self, topic: str, meta: str) -> None:
        """Refuses what would be taken for a piece of a run when it is copied.

        An import knows pieces by their meta, their topic and their place: after the first frame,
        which it knows by its meta, too, and up to the one that ends the run.
        """
        found = frame.continuation_in(meta)
        if found is None:
            return
        from xs.pieces import end_of, find_run  # here: few meet them

        first = ids.parse(found.first)
        line = self.writer.find(first)
        if line is None or not frame.begins_run(line) or frame.topic_of(line) != topic:
            return
        run = find_run(self.writer, first)
        if run is None or end_of(self.writer.connection, run.number) is None:
            raise Invalid(
                f"the content {found.first} is not whole yet, and its frames are made by who "
                "writes it: leave chunk out of meta"
            )

    def _check_last(self, topic: str, expected: str) -> None:
        newest = self.writer.last(topic, self.now)
        actual = "none" if newest is None else frame.id_of(newest)
        if actual != expected:
            raise Conflict(
                f"the newest frame of {topic} is {actual}, not {expected}", newest or b"null"
            )

    def _place_of(self, content: Content, ttl: str) -> None:
        if ttl == frame.EPHEMERAL:
            raise Invalid(
                "the content is too large for an ephemeral frame: give the frame another ttl"
            )
        self.place(content)

    def place(self, content: Content) -> None:
        """Gives content its name, if it is a file that has none yet. Raises `Unavailable`."""
        if content.data is not None:
            return
        # It has no temporary file when its batch failed and is done again, work by work: what was
        # placed then, or left to a frame with the same key, may be gone by now.
        cas = self.store.cas
        if content.path is None and not cas.has(content.digest):
            raise Unavailable("the content was lost when a commit failed: send it again")
        cas.place(content)

    def give_up(self, content: Content | None) -> None:
        """Forgets content of a frame that was refused, also if it has got its name by then."""
        self._leave(content)
        discard(content)

    def _leave(self, content: Content | None) -> None:
        """What has got its name goes, if nothing else names it when all is done."""
        if content is not None and content.data is None and content.path is None:
            self._maybe_unnamed.add(content.digest)

    def remove(self, value: int) -> None:
        """Removes a frame. Raises `NotFound`."""
        self.apply_trims()
        from xs import removal

        removed = removal.remove(self.writer, value)
        if removed is None:
            from xs.pieces import run_of_piece

            first = run_of_piece(self.writer.connection, value)
            if first is None:
                raise NotFound(f"no frame {ids.text(value)}")
            raise Invalid(
                f"{ids.text(value)} is a part of the content that begins with {ids.text(first)}: "
                "remove that one, and all of it goes"
            )
        self._note_removed([removed])
        fault.at("removal.done")

    def sweep(self) -> int:
        """Removes expired frames, some at a time; answers how many."""
        rows = self.writer.expired(self.now)
        if not rows:
            return 0
        from xs import removal

        removed = removal.remove_whole(self.writer, rows)
        self._note_removed(removed)
        if removed:
            fault.at("expiry.removed")
        if len(removed) == SWEEP_FRAMES:
            self.earliest_expiry = self.now
        return len(removed)

    def pin(self, content: Content, *, for_import: bool = False) -> str:
        """Keeps content, for good or for the import of its frame, and answers its hash."""
        self.place(content)
        fault.at("content.before-pin")
        self.writer.pin(content.digest, content.data, -self.now if for_import else self.now)
        return content.hash

    def is_content(self, digest: bytes, data: bytes | None) -> bool:
        """Whether that is the content with this digest; as a file (None) it only has to be here."""
        return self.store.cas.has(digest) if data is None else small(data).digest == digest

    def unpin(self, before: int) -> tuple[int, int, list[tuple[bytes, int]]]:
        """Takes away pins made before a time.

        Answers how many contents went with theirs, their bytes, and the digests and bytes of files
        that are named no more.
        """
        files, count, size = self.writer.unpin(before)
        fault.at("gc.pins-taken")
        unnamed = []
        for digest in files:
            if not self.writer.names_file(digest, _ALWAYS):
                size_of_file = self.store.cas.size(digest) if self.store.cas.has(digest) else 0
                unnamed.append((digest, size_of_file))
                self._maybe_unnamed.add(digest)
        return count - len(files), size, unnamed

    def remove_orphan(self, digest: bytes) -> int:
        if self.writer.names_file(digest, _ALWAYS) or not self.store.cas.has(digest):
            return 0
        self._maybe_unnamed.add(digest)
        fault.at("gc.orphan-found")
        return self.store.cas.size(digest)

    def apply_trims(self) -> None:
        """Does what `last:n` asks of the frames added so far."""
        while self.trims:
            topic, ttl = self.trims.popitem()
            self.trim(topic, ttl)

    def trim(self, topic: str, ttl: str) -> None:
        """Removes what a topic has more than `ttl` (last:n) keeps."""
        from xs import removal

        kept = frame.kept(ttl) or 1
        self._note_removed(removal.remove_but(self.writer, topic, kept, self.now))
        fault.at("expiry.trimmed")

    def _note_removed(self, removed: list[Removed]) -> None:
        for each in removed:
            value = ids.parse(frame.id_of(each.line))
            self.gone.append(value)
            if each.file_digest is not None:
                self._maybe_unnamed.add(each.file_digest)
            if each.pieces is not None:
                self.gone_runs.add(value)
                self._maybe_unnamed.update(each.pieces)

    def look_again(self, digests: set[bytes]) -> None:
        """Content files that were not removed when they lost their last frame: they may go now."""
        self._maybe_unnamed |= digests

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
        runs = self.gone_runs
        return [e for e in self.entries if e.id not in gone and e.first not in runs]

    def newest(self) -> int:
        """The id up to which this transaction has added frames, as far as anybody follows them."""
        last = self.entries[-1].id if self.entries else -1
        return max(last, self.history_mark or -1, self.unseen_mark or -1)

    def stored_ids(self) -> list[int]:
        """Of the frames that this transaction has added to the index."""
        return [e.id for e in self.entries if frame.ttl_of(e.line) != frame.EPHEMERAL]

    def start_part(self) -> None:
        """Starts a part of the transaction that can be undone by itself."""
        self.apply_trims()
        self.writer.savepoint()
        gone_runs = set(self.gone_runs)
        self._part = (len(self.entries), len(self.gone), gone_runs, dict(self.trims))

    def undo_part(self, contents: list[Optional[Content]]) -> None:
        """Undoes the part; what has got its name of `contents` goes, if nothing else names it."""
        self.writer.undo()
        entries, gone, self.gone_runs, trims = self._part
        del self.entries[entries:]
        del self.gone[gone:]
        self.trims = trims
        for content in contents:
            self._leave(content)

    def end_part(self) -> None:
        self.apply_trims()
        self.writer.release()
