"""Frames stored as they are, with the ids that they had elsewhere: an import, in a transaction."""

from __future__ import annotations

from xs import fault, frame, ids, pieces
from xs.commit import CHUNK
from xs.content import Content, discard
from xs.errors import Conflict, Invalid, XsError
from xs.records import NamedTuple
from xs.schema import BROKEN, GOES_ON, WHOLE, is_of_sqlite
from xs.work import Work
from xs.writer import NewFrame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Union

    from xs.commit import Commit

IMPORT_AHEAD_MS = 86_400_000  # an imported id may be so far ahead of the clock


class Imported(NamedTuple):
    """One frame to be stored as it is. `content` is inline content that came with it, if any."""

    id: int
    topic: str
    hash: Optional[str]
    meta: str
    ttl: str
    content: Optional[Content] = None


class ImportWork(Work):
    """Stores frames as they are; the result is a list of lines and errors, one for each.

    They are stored in order of id, whatever order they come in: those of one millisecond then find
    room behind each other, and what continues a content comes behind that. Of two with the same id
    the first one counts.
    """

    __slots__ = ("frames",)

    def __init__(self, frames: list[Union[Imported, XsError]]) -> None:
        super().__init__()
        self.frames = frames

    def apply(self, commit: Commit) -> list[Union[bytes, XsError]]:
        found: list[Union[bytes, XsError]] = [
            each if isinstance(each, XsError) else b"" for each in self.frames
        ]
        to_store = [(n, each) for n, each in enumerate(self.frames) if isinstance(each, Imported)]
        for n, new in sorted(to_store, key=lambda each: each[1].id):
            try:
                found[n] = import_frame(commit, new)
                fault.at("import.frame-added")
            except XsError as error:
                if is_of_sqlite(error):
                    raise
                commit.give_up(new.content)
                found[n] = error
        return found

    def discard(self) -> None:
        for each in self.frames:
            if isinstance(each, Imported):
                discard(each.content)


def import_frame(commit: Commit, new: Imported) -> bytes:
    """Stores a frame as it is. Raises `Invalid` and `Conflict`."""
    commit.apply_trims()  # a last:n before it is not to take it
    json = frame.encode(new.topic, ids.text(new.id), new.hash, new.meta, new.ttl)
    line = json.encode()
    if commit.mark is None:
        commit.mark = commit.writer.mark()
    if new.id <= commit.mark:
        place = commit.writer.place_of(new.id)
        if place is not None and commit.writer.line_at(place) == line:
            if new.content is not None:
                _mend(commit, new, new.content, place)
            _unpin(commit, new)
            return line
        if place is not None:
            raise Conflict(f"another frame has the id {ids.text(new.id)}")
    if new.id >> 80 > commit.now + IMPORT_AHEAD_MS:
        raise Invalid(f"the id {ids.text(new.id)} is more than a day ahead of the clock")
    joined = _run_to_join(commit, new)
    digest, data = _content_of(commit, new)
    ahead = new.id > commit.mark
    # Above all others it may still need room: those of its millisecond may lie at its end.
    row = commit.writer.row_above(new.id) if ahead else None
    if row is None:
        row = commit.writer.row_among(new.id)
    if row is None:
        raise Invalid(f"the millisecond of the id {ids.text(new.id)} is full")
    # Nothing refuses it from here on: what is refused makes no run of the frame that it names.
    if joined is None:
        expires = frame.expiry(new.ttl, new.id >> 80)
        commit.writer.add(row, NewFrame(new.id, new.topic, json, line, expires, digest, data))
    else:
        run = joined.run or pieces.run_made_of(commit.writer, joined.first)
        expires = run.expires
        stored = NewFrame(new.id, new.topic, json, line, expires, digest, data)
        pieces.add_piece(commit.writer, row, stored, run, joined.ends)
        if joined.ends != GOES_ON or run.pieces is not None:
            pieces.count_pieces(commit.writer, run)
    if ahead:
        commit.mark = new.id
    # Also below the mark, which may have ids that are kept for ephemeral frames, and not given out.
    commit.ids.raise_to(new.id)
    commit.history_mark = max(new.id, commit.history_mark or 0)
    if expires is not None and (commit.earliest_expiry is None or expires < commit.earliest_expiry):
        commit.earliest_expiry = expires
    _unpin(commit, new)
    return line


def _mend(commit: Commit, new: Imported, content: Content, place: tuple[str, int]) -> None:
    """Content that came with a frame that is here takes the place of what is damaged of it."""
    if content.hash != new.hash:
        raise _not_its_content(new)
    if content.data is not None:
        commit.writer.mend(place, content.data)
    elif not commit.store.cas.is_whole(content.digest):
        commit.place(content)
    discard(content)


def _not_its_content(new: Imported) -> Invalid:
    return Invalid(f"the content of {ids.text(new.id)} does not match its hash")


def _unpin(commit: Commit, new: Imported) -> None:
    """Takes away the pin of content that was put for an import: its frame keeps it from now on.

    A frame whose time has passed is about to go, while others that name it may be still to come.
    """
    if new.hash is not None and new.content is None:
        expires = frame.expiry(new.ttl, new.id >> 80)
        if expires is None or expires > commit.now:
            commit.writer.unpin_imported(frame.parse_integrity(new.hash))


class _Joined(NamedTuple):
    """The run that an imported frame continues, by its first frame's id, and how it ends it.

    `run` is None while that frame is not known to begin one.
    """

    first: int
    run: Optional[pieces.Run]
    ends: int


def _run_to_join(commit: Commit, new: Imported) -> _Joined | None:
    """The run that an imported frame continues; None for other frames. Changes nothing.

    Its first frame has to be here, on the same topic, and nothing that ends the run before it.
    """
    found = frame.continuation_in(new.meta) if CHUNK in new.meta else None
    first = -1 if found is None else ids.parse(found.first)
    if found is None or first >= new.id:
        return None
    line = commit.writer.find(first)
    if line is None or not frame.begins_run(line) or frame.topic_of(line) != new.topic:
        return None
    run = pieces.find_run(commit.writer, first)
    if run is not None:
        if run.writer is not None:
            raise Conflict(f"the content {found.first} is being written here: import it later")
        end = pieces.end_of(commit.writer.connection, run.number)
        if end is not None and end < new.id:
            return None
    return _Joined(first, run, GOES_ON if found.more else BROKEN if found.has_error else WHOLE)


def _content_of(commit: Commit, new: Imported) -> tuple[bytes | None, bytes | None]:
    if new.hash is None:
        return None, None
    digest = frame.parse_integrity(new.hash)
    if new.content is not None:
        if new.content.digest != digest:
            raise _not_its_content(new)
        commit.place(new.content)
        return digest, new.content.data
    data = commit.writer.inline_content(digest, commit.now)
    if data is None and not commit.store.cas.has(digest):
        raise Invalid(
            f"the content {new.hash} of {ids.text(new.id)} is not here: give it in the line, as "
            "xs cat --with-content does, or put it there before (POST /cas?for=import)"
        )
    return digest, data
