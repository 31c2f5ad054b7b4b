"""Work: something to be done in a transaction, and whom to tell when it is durable.

The store's leader gives each the `Commit` of its batch, and calls it back when that is through. The
simple kinds are here; others are in `bulk`, `imports` and `runsteps`, and where they are needed.
"""

from __future__ import annotations

from xs.commit import Append, Commit
from xs.content import Content, discard
from xs.errors import XsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from typing import Any


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


class RemoveWork(Work):
    """Removes one frame; raises `NotFound` if there is none."""

    __slots__ = ("id",)

    def __init__(self, value: int) -> None:
        super().__init__()
        self.id = value

    def apply(self, commit: Commit) -> None:
        commit.remove(self.id)


class PinWork(Work):
    """Keeps content that no frame names (POST /cas); the result is its hash.

    `for_import`: only until a frame is imported that names it.
    """

    __slots__ = ("content", "for_import")

    def __init__(self, content: Content, *, for_import: bool = False) -> None:
        super().__init__()
        self.content = content
        self.for_import = for_import

    def apply(self, commit: Commit) -> str:
        return commit.pin(self.content, for_import=self.for_import)

    def discard(self) -> None:
        discard(self.content)
