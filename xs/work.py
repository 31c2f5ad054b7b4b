"""Kinds of work: something to be done in a transaction, and whom to tell when it is durable.

The store's leader gives each the `Commit` of its batch, and calls it back when that is through.
"""

from __future__ import annotations

from xs import fault, frame, ids
from xs.commit import Alike, Append, Commit, Imported, RunResult
from xs.content import Content, discard
from xs.errors import XsError
from xs.schema import BROKEN, GOES_ON, WHOLE, is_of_sqlite

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from typing import Any, Union


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

    def fail(self, error: XsError) -> None:
        """Tells whoever waits for it that it was not done."""
        self.error = error
        self.discard()
        self.finish()

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
        discard(self.append.content)


class BatchWork(Work):
    """Appends several frames; the result is a list of lines and errors, one for each frame.

    With `atomic` the first error undoes all of them, and is raised as it is.
    """

    __slots__ = ("appends", "atomic")

    def __init__(
        self, appends: list[Union[Append, Alike, XsError]], *, atomic: bool = False
    ) -> None:
        super().__init__()
        self.appends = appends
        self.atomic = atomic

    def apply(self, commit: Commit) -> list[Union[bytes, XsError]]:
        from itertools import groupby

        results: list[Union[bytes, XsError]] = []
        if self.atomic:
            commit.start_part()
            fault.at("batch.part-begun")
        for is_plain, run in groupby(self.appends, commit.is_plain):
            if is_plain:
                results += commit.append_run(list(run))  # type: ignore[arg-type]
                fault.at("batch.run-added")
                continue
            for append in run:
                try:
                    if isinstance(append, XsError):
                        raise append
                    if isinstance(append, Alike):
                        results += commit.append_alike(append)
                        fault.at("batch.alike-added")
                        continue
                    results.append(commit.append(append))
                    fault.at("batch.frame-added")
                except XsError as error:
                    if is_of_sqlite(error):
                        raise
                    if self.atomic:
                        commit.undo_part([a.content for a in self.appends if isinstance(a, Append)])
                        fault.at("batch.part-undone")
                        raise
                    if isinstance(append, Append):
                        discard(append.content)
                    results.append(error)
        if self.atomic:
            commit.end_part()
            fault.at("batch.part-done")
        return results

    def each(self) -> list[Union[Append, XsError]]:
        """What is to be appended, one by one."""
        found: list[Union[Append, XsError]] = []
        for append in self.appends:
            found += append.each() if isinstance(append, Alike) else [append]
        return found

    def discard(self) -> None:
        for append in self.appends:
            if isinstance(append, Append):
                discard(append.content)


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
                fault.at("import.frame-added")
            except XsError as error:
                if is_of_sqlite(error):
                    raise
                if isinstance(each, Imported):
                    discard(each.content)
                results.append(error)
        return results

    def discard(self) -> None:
        for each in self.frames:
            if isinstance(each, Imported):
                discard(each.content)


class RemoveWork(Work):
    """Removes one frame; raises `NotFound` if there is none."""

    __slots__ = ("id",)

    def __init__(self, value: int) -> None:
        super().__init__()
        self.id = value

    def apply(self, commit: Commit) -> None:
        commit.remove(self.id)


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
        done = commit.done_before(self.writer, self.first, self.last, ends)
        if done is not None:
            return done
        contents = list(self.contents)
        first, line = self.first, b""
        if first is None:
            begun = self.append._replace(content=contents.pop(0) if contents else None)
            line, is_new = commit.begin_run(begun, self.writer)
            fault.at("run.begun")
            if not is_new:
                return RunResult(line, None, None)
            first = ids.parse(frame.id_of(line))
        is_whole = self.ended and self.error_text is None
        at_the_end = contents.pop() if is_whole and contents else None
        lines = [line]
        if contents:
            lines += commit.extend_run(first, self.writer, contents)
            fault.at("run.extended")
        if self.ended:
            lines.append(commit.end_run(first, self.writer, at_the_end, self.error_text))
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
        return commit.end_runs(self.is_gone, self.error_text)


class PinWork(Work):
    """Keeps content that no frame names (POST /cas); the result is its hash."""

    __slots__ = ("content",)

    def __init__(self, content: Content) -> None:
        super().__init__()
        self.content = content

    def apply(self, commit: Commit) -> str:
        return commit.pin(self.content)

    def discard(self) -> None:
        discard(self.content)
