"""Kinds of work: something to be done in a transaction, and whom to tell when it is durable.

The store's leader gives each the `Commit` of its batch, and calls it back when that is through.
"""

from __future__ import annotations

from xs import fault
from xs.commit import Alike, Append, Commit
from xs.content import Content, discard
from xs.errors import XsError
from xs.schema import is_of_sqlite

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
        discard(self.content)
