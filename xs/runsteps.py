"""Steps of a run, each a part of a transaction: it is begun, extended, ended.

A run is one content in several frames, of which only the first counts (`pieces`).
"""

from __future__ import annotations

from xs import fault, frame, ids, pieces
from xs.content import Content, discard
from xs.errors import Conflict, Invalid, NotFound
from xs.frame import Entry
from xs.records import NamedTuple
from xs.schema import BROKEN, GOES_ON, WHOLE
from xs.work import Work
from xs.writer import NewFrame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Optional

    from xs.commit import Append, Commit


class RunResult(NamedTuple):
    """The line of a run's first frame, if it was begun, its id, and that of the run's last frame.

    No ids, where the idempotency key had made a frame before: then the line is of that one.
    """

    line: bytes
    first: Optional[int]
    last: Optional[int]


class RunWork(Work):
    """Begins a run of frames that are one content, goes on with it, or ends it.

    Without `first` it begins one, with the first of `contents`; each further content is a frame.
    With `ended` the last frame says so: whole, or with `error_text` what it broke off for. The
    result is `RunResult`.

    Done again it does nothing: `writer` is of this run alone, and `last` is the id of the last
    frame that the writer knows of. So a step that a server has taken, and then died without an
    answer, can be repeated.
    """

    __slots__ = ("append", "contents", "ended", "error_text", "first", "last", "writer")

    def __init__(
        self,
        append: Append,
        writer: str,
        first: int | None,
        last: int | None,
        contents: list[Content],
        *,
        ended: bool = False,
        error_text: str | None = None,
    ) -> None:
        super().__init__()
        self.append = append
        self.writer = writer
        self.first = first
        self.last = last
        self.contents = contents
        self.ended = ended
        self.error_text = error_text

    def apply(self, commit: Commit) -> RunResult:
        ends = GOES_ON if not self.ended else WHOLE if self.error_text is None else BROKEN
        done = done_before(commit, self.writer, self.first, self.last, ends)
        if done is not None:
            return done
        contents = list(self.contents)
        first, line = self.first, b""
        if first is None:
            begun = self.append._replace(content=contents.pop(0) if contents else None)
            line, is_new = begin_run(commit, begun, self.writer)
            fault.at("run.begun")
            if not is_new:
                return RunResult(line, None, None)
            first = ids.parse(frame.id_of(line))
        is_whole = self.ended and self.error_text is None
        at_the_end = contents.pop() if is_whole and contents else None
        lines = [line]
        if contents:
            lines += extend_run(commit, first, self.writer, contents)
            fault.at("run.extended")
        if self.ended:
            lines.append(end_run(commit, first, self.writer, at_the_end, self.error_text))
        last = ids.parse(frame.id_of(lines[-1])) if lines[-1] else self.last
        return RunResult(line, first, last)

    def discard(self) -> None:
        for content in self.contents:
            discard(content)


class EndRunsWork(Work):
    """Ends as broken off the runs whose writers are gone; the result is who writes the others."""

    __slots__ = ("error_text", "is_gone")

    def __init__(self, is_gone: Callable[[str], bool], error_text: str) -> None:
        super().__init__()
        self.is_gone = is_gone
        self.error_text = error_text

    def apply(self, commit: Commit) -> set[str]:
        return end_runs(commit, self.is_gone, self.error_text)


def begin_run(commit: Commit, append: Append, writer: str) -> tuple[bytes, bool]:
    """Adds the first frame of a run, and answers its line. Its meta has `more` already.

    False beside it, if the idempotency key has made that frame before. Raises `Conflict` as
    `append` does, and when the content that the key makes is still being written.
    """
    if append.ttl == frame.EPHEMERAL:
        raise Invalid("a chunked content can't be ephemeral: give the frame another ttl")
    if not append.meta.endswith('"more":true}'):
        raise Invalid('the meta of the first frame of a chunked content ends with "more":true')
    answered = None
    if append.key is not None:
        answered = commit.writer.answer_for(append.topic, append.key)
    if answered is None:
        line = commit.append(append)
        pieces.make_run(commit.writer, commit.writer.newest_row, writer, append.key)
        commit.entries[-1] = commit.entries[-1]._replace(begins=True)
        return line, True
    run = None
    if frame.may_begin_run(answered):
        run = pieces.find_run(commit.writer, ids.parse(frame.id_of(answered)))
    if run is not None and run.writer is not None:
        raise Conflict(
            f"the content under that key is still being written: {frame.id_of(answered)}"
        )
    discard(append.content)
    return answered, False


def run_written_by(commit: Commit, writer: str) -> int | None:
    """The first frame's id of the run that `writer` goes on with, if there is one."""
    first = pieces.run_written_by(commit.writer, writer)
    run = None if first is None else pieces.find_run(commit.writer, first)
    if run is not None and run.expires is not None and run.expires <= commit.now:
        pieces.end_writing(commit.writer, run, BROKEN)  # nobody can read it any more
        return None
    return first


def extend_run(
    commit: Commit, first: int, writer: str, contents: list[Content], cause: str = ""
) -> list[bytes]:
    """Adds frames to a run that `writer` has begun, and answers their lines.

    `cause` is what their meta has besides, as JSON's members. Raises `NotFound` when the run
    was removed, or has expired; `Conflict` when it has ended, or is another's.
    """
    run = _run_of(commit, first, writer)
    return [_add_piece(commit, run, first, content, GOES_ON, cause=cause) for content in contents]


def end_run(
    commit: Commit,
    first: int,
    writer: str,
    content: Content | None = None,
    error_text: str | None = None,
    cause: str = "",
) -> bytes:
    """Adds the last frame of a run: the content is whole, or broke off for that reason."""
    run = _run_of(commit, first, writer)
    ends = WHOLE if error_text is None else BROKEN
    line = _add_piece(commit, run, first, content, ends, error_text, cause)
    fault.at("run.before-end")
    pieces.end_writing(commit.writer, run, ends)
    return line


def end_runs(commit: Commit, is_gone: Callable[[str], bool], error_text: str) -> set[str]:
    """Ends as broken off the runs whose writers are gone; answers who writes the others."""
    living = set()
    for first, writer in commit.writer.runs_being_written():
        if not is_gone(writer):
            living.add(writer)
        elif first is not None:
            try:
                end_run(commit, first, writer, None, error_text)
            except NotFound:
                pass  # it has expired: the sweep takes it
    return living


def done_before(
    commit: Commit, writer: str, first: int | None, last: int | None, ends: int
) -> RunResult | None:
    """What came of a step that was done before; None if it was not.

    The step begins a run, or goes on with `first` behind the frame `last`; `ends`: it ends it.
    """
    if first is None:
        begun = pieces.run_written_by(commit.writer, writer)
        if begun is None:
            return None
        line = commit.writer.find(begun) or b""
        return RunResult(line, begun, pieces.last_of_run(commit.writer, begun))
    newest = pieces.last_of_run(commit.writer, first)
    if newest is None or last is None or newest <= last:
        return None
    if pieces.how_it_ended(commit.writer, first) != ends:  # it was somebody else's step
        raise Conflict(f"the content {ids.text(first)} is not being written any more")
    return RunResult(b"", first, newest)


def _run_of(commit: Commit, first: int, writer: str) -> pieces.Run:
    run = pieces.find_run(commit.writer, first)
    if run is None or (run.expires is not None and run.expires <= commit.now):
        raise NotFound(
            f"the content {ids.text(first)} is gone: it was removed, or its time has passed"
        )
    if run.writer != writer:
        raise Conflict(f"the content {ids.text(first)} is not being written any more")
    return run


def _add_piece(
    commit: Commit,
    run: pieces.Run,
    first: int,
    content: Content | None,
    ends: int,
    error_text: str | None = None,
    cause: str = "",
) -> bytes:
    more = ends == GOES_ON
    meta = frame.piece_meta(ids.text(first), more=more, error=error_text, cause=cause)
    hash_ = data = digest = None
    if content is not None:
        digest, data = content.digest, content.data
        hash_ = frame.integrity(digest)
        if data is None:
            commit.place(content)
    while True:
        value = commit.ids.next(commit.now)
        json = frame.encode(run.topic, commit.ids.text(value), hash_, meta, run.ttl)
        line = json.encode()
        new = NewFrame(value, run.topic, json, line, run.expires, digest, data)
        row = commit.writer.row_above(value)
        if row is not None:
            pieces.add_piece(commit.writer, row, new, run, ends)
            break
        commit.ids.skip_millisecond()
    commit.entries.append(Entry(value, run.topic, line, run.expires, first=first))
    commit.mark = None if commit.mark is None else value
    return line
