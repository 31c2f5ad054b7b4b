"""The API on a store's files, in this process: what commands use when no server has the store.

A transport like `transport.HttpTransport`, over the same routes. Each batch of writes takes the
store's lock; reads take none. A server that appears or ends meanwhile is no harm: a follower moves
to its socket where it stands, and back to the files; a writer that finds the lock taken by it sends
there what it was about to commit.
"""

from __future__ import annotations

import time
from _thread import allocate_lock

from xs import api, errors, frame, ids, messages
from xs.request import ask, with_query
from xs.store import Store
from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from xs.lock import Served
    from xs.reader import Reader
    from xs.request import Response
    from xs.transport import HttpTransport
    from xs.work import Work

_SERVER_SECONDS = 15.0  # a server may take from its lock to its socket, or to give it back
_LOOK_SECONDS = 0.01
_SOCKET_SECONDS = 0.1  # at most between a follower's looks for a server, whatever it is given


class Local:
    """Requests to the files of the store in `folder`.

    With `create` a store is made where there is none, by the first request that comes to write: one
    that is wrong doesn't.
    """

    def __init__(self, folder: str, *, create: bool = False) -> None:
        self._folder = folder
        self._create = create
        self._opening = allocate_lock()  # guards the next one
        self._store: _Files | None = _Files(folder, create=create)

    def request(
        self,
        method: str,
        target: str,
        fields: Iterable[tuple[str, str]] = (),
        body: bytes | Iterable[bytes] | None = None,
    ) -> Response:
        """The answer that a server would give. Errors of the request are answers, as there."""
        store = self._used()
        try:
            return self._answered(store, method, target, fields, body)
        except BaseException:
            store.leave()
            raise

    def _used(self) -> _Files:
        """The store, which stays open until whoever asked has left it."""
        with self._opening:
            if self._store is None or self._store.is_parents:  # closed; or this process was forked
                self._store = _Files(self._folder, create=self._create)
            self._store.use()
            return self._store

    def _answered(
        self,
        store: _Files,
        method: str,
        target: str,
        fields: Iterable[tuple[str, str]],
        body: bytes | Iterable[bytes] | None,
    ) -> Response:
        if method != "POST":
            store.open()  # a reader makes no store
        path, _, query = target.partition("?")
        blocks: Iterable[bytes] = (
            () if body is None else [body] if isinstance(body, bytes) else body
        )
        lower = [(name.lower(), value) for name, value in fields]
        request = messages.Request(method, path, query, lower, blocks)
        found = api.run(store, api.answer(store, request))
        reader = found.reader
        if reader is None:
            blocks = iter((found.body,)) if found.blocks is None else found.blocks
            return _Answered(found, blocks, store)
        if reader.options.pulse is not None:
            pulse = errors.Invalid("a pulse needs a server: start one with xs serve")
            return _Answered(messages.error_answer(pulse), iter((f"{pulse}\n".encode(),)), store)
        return _Answered(found, _Following(store, reader).blocks(), store)

    def close(self) -> None:
        """Closes the store once no body is under way any more; the next request opens it anew."""
        with self._opening:
            store, self._store = self._store, None
        if store is not None:
            store.leave()


class _Answered:
    """An answer of this process, in the form of one that came over a socket.

    It leaves the store when its body was read, or is given up.
    """

    def __init__(self, found: messages.Answer, blocks: Iterator[bytes], store: _Files) -> None:
        self.status = found.status
        self.fields = found.fields
        self._blocks = blocks
        self._store: _Files | None = store

    def get(self, name: str, default: str | None = None) -> str | None:
        return dict(self.fields).get(name, default)

    def __iter__(self) -> Iterator[bytes]:
        try:
            for block in self._blocks:
                if block:  # an empty one says that nothing comes for a while
                    yield block
        except errors.BrokenBody:
            raise
        except errors.XsError as error:
            raise errors.BrokenBody(str(error)) from error
        finally:
            self.close()

    def read(self) -> bytes:
        return b"".join(self)

    def close(self) -> None:
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()
        store, self._store = self._store, None
        if store is not None:
            store.leave()

    __del__ = close  # of one that nobody has begun to read


class _Files(Store):
    """The store without a server; when one has come up, what can't be committed is sent there.

    With `create` a folder is enough at first: whatever first needs more makes the store. So a
    request that is refused before that leaves nothing behind.
    """

    is_open = False
    exclusive = False  # which is known before it is open

    def __init__(self, folder: str, *, create: bool = False) -> None:
        self.folder = folder
        self._opening = allocate_lock()
        # One for each who uses it, over that of its `Local`; whoever takes the last one closes it.
        # It is no lock and a count, as an answer may be collected, and leave, amid anything.
        self._uses = [True]
        if not create:
            self.open()

    def open(self, *, create: bool = False) -> None:
        """Opens the store, unless it is open. Raises `NoStore`, …, as `Store` does."""
        with self._opening:
            if not self.is_open:
                super().__init__(self.folder, create=create)
                self.is_open = True

    def use(self) -> None:
        """Keeps it open until `leave` is called once more."""
        self._uses.append(False)

    def leave(self) -> None:
        if self._uses.pop() and self.is_open:
            self.close()

    def opened(self) -> None:
        self.open(create=True)

    def __getattr__(self, name: str) -> Any:
        self.open(create=True)  # what is looked for in vain is what only an open store has
        return object.__getattribute__(self, name)

    def start(self, work: Work) -> Callable[[], Any]:
        refused = _refused(work)
        return super().start(work) if refused is None else lambda: refused

    def shut_out(self, batch: list[Work], error: errors.Locked) -> None:
        from xs.lock import Served

        if not isinstance(error, Served):
            super().shut_out(batch, error)
            return
        for work in batch:
            self._send_to_server(work, error)

    def _send_to_server(self, work: Work, served: Served) -> None:
        deadline = time.monotonic() + _SERVER_SECONDS
        while True:
            transport = _server(self.folder)
            if transport is not None:
                asked = time.monotonic()
                if self._is_forwarded(work, transport) or asked > deadline:
                    break
                deadline += time.monotonic() - asked  # it was not waited for, but worked
            elif not self._is_served():
                self.committer.commit([work])  # it has ended again
                return
            elif time.monotonic() > deadline:
                super().shut_out([work], served)
                return
            time.sleep(_LOOK_SECONDS)
        work.discard()
        work.finish()

    def _is_forwarded(self, work: Work, transport: HttpTransport) -> bool:
        """Sends work to the server; False if it is to be tried again."""
        from xs.forward import forward, is_to_be_repeated

        work.error = None
        try:
            work.result = forward(transport, work)
        except errors.XsError as error:
            work.error = error
            return not is_to_be_repeated(work, error)
        finally:
            transport.close()
        return True

    def _is_served(self) -> bool:
        """Whether a server has the lock still."""
        from xs.lock import WRITE, Served

        assert self._lock is not None
        try:
            self._lock.acquire(WRITE, wait=0)
        except Served:
            return True
        except errors.Locked:
            return False  # another command has it, for a moment
        self._lock.release()
        return False


def _refused(work: Work) -> list[Any] | None:
    """The errors of lines that are wrong one and all, so that there is nothing to commit."""
    from xs.bulk import BatchWork
    from xs.imports import ImportWork

    lines: list[Any] = []
    if isinstance(work, BatchWork):
        lines = [*work.appends]
    elif isinstance(work, ImportWork):
        lines = work.frames
    return lines if lines and all(isinstance(line, errors.XsError) for line in lines) else None


def _server(folder: str) -> HttpTransport | None:
    """A connection to the store's server, if there is one."""
    path = os.path.join(folder, "sock")
    if not os.path.exists(path):
        return None
    from xs.transport import HttpTransport

    try:
        return HttpTransport(("unix", path), None, None).open()
    except OSError:
        return None


# Following


class _Following:
    """A follower that looks for other processes' commits, and moves between files and server."""

    def __init__(self, store: Store, reader: Reader) -> None:
        self._store = store
        self._reader = reader

    def blocks(self) -> Iterator[bytes]:
        reader = self._reader
        looked = 0.0
        for block in reader.follow():
            if block:
                yield block
                # Not before the threshold, which is for who has given the history to give.
                if not reader.has_passed_history or reader.is_amid or reader.is_finished:
                    continue
                if time.monotonic() - looked < _SOCKET_SECONDS:
                    continue
            looked = time.monotonic()
            transport = _server(self._store.folder)
            if transport is not None:
                yield from self._from_server(transport)

    def _from_server(self, transport: HttpTransport) -> Iterator[bytes]:
        """What the server gives from here on; the reader's position goes along."""
        reader = self._reader
        fields = [("accept", messages.EVENTS)] if reader.form.sse else []
        end = b"\n\n" if reader.form.sse else b"\n"
        rest = b""
        awaits_threshold = True  # it was given already, or was never asked for
        try:
            for block in ask(transport, "GET", _target(reader), fields):
                *whole, rest = (rest + block).split(end)
                given = []
                for event in whole:
                    line = event[event.index(b'{"topic":') :]
                    if awaits_threshold and line.startswith(b'{"topic":"xs.threshold"'):
                        awaits_threshold = False
                        continue
                    reader.position = max(reader.position, ids.parse(frame.id_of(line)))
                    reader.left -= 1
                    given.append(event + end)
                if given:
                    yield b"".join(given)
        except (errors.BrokenBody, errors.Unavailable):
            pass  # it was killed, or ends just now: the files have all that it had answered
        finally:
            transport.close()


def _target(reader: Reader) -> str:
    """What asks a server to go on where that reader is, whatever it was asked for by."""
    options = reader.options
    flags = ("with-timestamp", "with-content", "no-chunks")
    asked = (options.with_timestamp, options.with_content, options.no_chunks)
    return with_query(
        "/",
        [
            ("follow", "true"),
            ("after", ids.text(max(reader.position, 0))),
            ("until", None if options.until is None else ids.text(options.until)),
            ("topic", None if options.patterns is None else ",".join(sorted(options.patterns))),
            ("limit", None if options.limit is None else reader.left),
            *((flag, "true") for flag, is_asked in zip(flags, asked) if is_asked),
        ],
    )
