"""Further stores in the same process, added and removed by what is on the root store's stream.

`xs.store.add` asks for one and `xs.store.remove` for its end; each is answered on the root stream:
`xs.store.added`, `xs.store.removed` or `xs.store.error`. What was added and not removed comes back
when the server starts again; what was asked while none ran is carried out then.

What is served, and which requests are answered, the root store keeps in its table `script`, in the
transaction of each answer. Frames that look like answers mean nothing.

One that can't be opened disturbs no other: each is opened, and ended, in a thread of its own. What
the stream asks is done all the same as if it were done one thing after the other: a request about
a path, a name or an address with which something else is just being done, or is yet to be, waits in
line for that, and is judged then.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional, Union

from xs import frame, ids, threads, times
from xs.asked import (
    NAME_MAX,
    Asked,
    Claims,
    Named,
    check_apart,
    check_place,
    is_same_address,
    parse_add,
    parse_remove,
)
from xs.commit import Append
from xs.errors import Full, Invalid, NotFound, Unavailable, XsError
from xs.generators import KeepWork
from xs.httpd import Served
from xs.log import ERROR, WARNING, log_of
from xs.meta import as_meta
from xs.mount import Mount
from xs.schema import Script
from xs.store import Store

STORES_MAX = 1000  # beside the root store, in one process; above it: xs.store.error
RETRY_SECONDS = 60.0  # before one that could not be opened at the start is tried again

TOPICS = frozenset({"xs.store.add", "xs.store.remove"})
_ANSWERS = frozenset({"xs.store.added", "xs.store.removed", "xs.store.error"})
_KIND, _MARK = "store", "stores"  # rows of `script`: one for each store; how far requests are done

_AT_ONCE = 8  # stores that are opened at once …
_TURN_SECONDS = 2.0  # … unless those take longer: they may be waiting for a lock, or a dead disk
_ANSWER_SECONDS = 1.0  # before an answer that could not be appended is tried again
_STOP_SECONDS = 30.0  # for all to end: only what hangs takes so long


class _Entry:
    """A store that is to be served: from the request for it until its end."""

    __slots__ = ("asked", "claims", "error", "id", "is_kept", "mount", "opened", "since")

    def __init__(self, value: int, asked: Asked, *, is_kept: bool) -> None:
        self.id = value  # of the frame that added it
        self.asked = asked
        self.claims = Claims(asked)
        self.is_kept = is_kept  # by the root store: it comes back
        self.mount: Mount | None = None
        self.error: str | None = None
        self.since: int | None = None
        self.opened = threading.Event()  # it is open, or can't be opened

    @property
    def is_refused(self) -> bool:
        """Whether it is there only until its error is answered, for those behind it in the line."""
        return self.error is not None and not self.is_kept

    @property
    def script(self) -> Script:
        """What the root store keeps of it."""
        source = ids.text(self.id)
        state = json.dumps(self.asked._asdict(), ensure_ascii=False)
        return Script(_KIND, self.asked.name, source, True, source, state)


class _Request(NamedTuple):
    """What a frame asks for, until it is done."""

    id: int
    wanted: Union[Asked, Named]
    claims: Claims


class Stores:
    """The further stores of a root store."""

    def __init__(
        self,
        root: Store,
        mount: Callable[[Asked, bool], Mount],
        unmount: Callable[[Mount], None],
        log: Callable[[str], None],
    ) -> None:
        """`mount` opens and starts a store, and makes it if told so; `unmount` ends it."""
        self._root = root
        self._mount = mount
        self._unmount = unmount
        self._log = log_of(log)
        self._lock = threading.Lock()  # guards the next five, and `_position`; taken last
        self._entries: dict[str, _Entry] = {}  # by name
        self._ending: set[_Entry] = set()  # not among those any more
        self._threads: set[threads.Thread] = set()
        self._line: dict[int, _Request] = {}  # what is not begun; for the one thread that begins it
        self._pending: set[int] = set()  # requests that are not answered
        self._done: set[int] = set()  # that are, above the first of those
        self._answering = threading.Lock()  # one answer at a time: each keeps how far all are
        self._turns = threading.Semaphore(_AT_ONCE)
        # Requests up to here were read, or will be when it starts. Later ones are heard: from here
        # on, and not from `start` on, since an ephemeral one may come in between.
        self._position = root.newest()
        self._try_at = 0.0  # when what could not be opened is tried again
        self._has_begun = False
        self._stopping = threading.Event()
        self._due = threading.Event()
        self._watch = root.bus.watch(TOPICS.__contains__, self._due.set)
        self._thread = threads.Thread(self._main, "xs-stores")

    # For requests

    def find(self, name: str) -> Served:
        """The store of that name. Raises `NotFound`, `Unavailable`."""
        entry = self._entries.get(name)
        if entry is None or entry.is_refused:
            raise NotFound(f"no such store: {name[:NAME_MAX]!r}: see /stores for those there are")
        mount = entry.mount
        if mount is None:
            raise Unavailable(f"the store {name} is not open: {entry.error or 'it is not yet'}")
        return mount.served

    def status(self) -> list[dict[str, Any]]:
        """What is served, in order of names (`GET /stores`)."""
        with self._lock:
            entries = [entry for _, entry in sorted(self._entries.items())]
        return [
            {
                **_named(entry, entry.mount),
                "since": None if entry.since is None else times.timestamp(entry.since),
                "error": entry.error,
            }
            for entry in entries
            if not entry.is_refused
        ]

    # The stream

    def start(self) -> None:
        """Serves what was added before, and follows the stream."""
        self._thread.start()

    def stop(self) -> None:
        """Ends all stores."""
        deadline = time.monotonic() + _STOP_SECONDS
        self._stopping.set()
        self._due.set()
        self._root.bus.unwatch(self._watch)
        self._thread.join(_STOP_SECONDS)
        self._join(deadline)
        with self._lock:
            entries = list(self._entries.values())
        for entry in entries:
            try:
                self._begin(self._end, entry, None)
            except Unavailable:
                self._end(entry, None)
        self._join(deadline)

    def _main(self) -> None:
        while not self._stopping.is_set():
            try:
                if not self._has_begun:
                    self._fold()
                    self._has_begun = True
                left = max(0.0, self._try_at - time.monotonic())
                self._due.wait(left if self._failed() else None)
                self._due.clear()
                self._hear(self._new_lines())
                self._try_again()
            except Exception as error:  # of ours, or of the root store, which goes on serving
                if not self._stopping.is_set():
                    what = "what is asked about stores is not heard now"
                    if isinstance(error, (XsError, OSError)):
                        self._log(f"{what}: {_sentence(error)}", ERROR)
                    else:
                        self._log.defect(what, error)
                    self._stopping.wait(RETRY_SECONDS)

    def _fold(self) -> None:
        """Starts what is kept, and carries out what was asked since."""
        kept = [script for script in self._root.index.active_scripts(_KIND) if script.state]
        marks = self._root.index.scripts(_MARK, "")
        newest = self._position
        position, done = -1, set()
        for mark in marks:
            position = ids.parse(mark.position)
            done = set(map(ids.parse, json.loads(mark.state or "[]")))
        lines = list(self._root.lines(TOPICS, position, newest))
        if not marks:
            # No request has been answered here: answers, if there are any, were imported with
            # what they answer, and all of that is the history of another store.
            done = self._answered(newest)
        lines = [line for line in lines if ids.parse(frame.id_of(line)) not in done]
        self._take(lines, newest)
        self._done = done
        for script in kept:
            self._keep(ids.parse(script.source), Asked(**json.loads(script.state or "")))
        self._hear(lines)

    def _answered(self, until: int) -> set[int]:
        """The requests that frames on the stream say are answered."""
        found = set()
        for line in self._root.lines(_ANSWERS, -1, until):
            told = frame.Frame.from_json(line).meta
            source = told.get("source_id") if isinstance(told, dict) else None
            if isinstance(source, str) and ids.is_id(source):
                found.add(ids.parse(source))
        return found

    def _new_lines(self) -> list[bytes]:
        entries = self._root.bus.after(self._position)
        if entries is None:
            newest = self._root.newest()
            lines = list(self._root.lines(TOPICS, self._position, newest))
        else:
            newest = entries[-1].id if entries else self._position
            lines = [entry.line for entry in entries if _is_request(entry)]
        self._take(lines, newest)
        return lines

    def _take(self, lines: list[bytes], position: int) -> None:
        """Requests up to a position were read: these."""
        with self._lock:
            self._pending.update(ids.parse(frame.id_of(line)) for line in lines)
            self._position = position

    def _hear(self, lines: list[bytes]) -> None:
        """Takes requests in, and begins what waits for nothing, in their order."""
        for line in lines:
            value = ids.parse(frame.id_of(line))
            meta = frame.Frame.from_json(line).meta
            parse = parse_add if frame.topic_of(line) == "xs.store.add" else parse_remove
            try:
                wanted = parse(meta)
                self._line[value] = _Request(value, wanted, Claims(wanted))
            except Exception as error:
                self._answer("error", value, reason=_sentence(error))
        if not self._line:
            return
        busy = Claims()  # with what something is being done, or is yet to be
        with self._lock:
            for each in (*self._ending, *filter(_is_unsettled, self._entries.values())):
                busy.add(each.claims)
        waiting = 0
        for request in list(self._line.values()):
            if self._stopping.is_set():
                return  # they are carried out when the server starts again
            with self._lock:
                claims = self._claims(request)
                has_to_wait = busy.meet(claims) or self._waits_for_room(request, waiting)
            if has_to_wait:
                waiting += 1
                busy.add(claims)
                continue
            del self._line[request.id]
            entry = self._obey(request)
            if entry is not None:
                busy.add(entry.claims)

    def _claims(self, request: _Request) -> Claims:
        """A removal is about all that its store has, by whatever it names it. `_lock` is held."""
        if isinstance(request.wanted, Asked):
            return request.claims
        claims = Claims()
        claims.add(request.claims)
        for entry in self._entries.values():
            if request.wanted.means(entry.asked):
                claims.add(entry.claims)
        return claims

    def _waits_for_room(self, request: _Request, waiting: int) -> bool:
        """Whether it is one store too many, unless others can't be opened. `_lock` is held."""
        if isinstance(request.wanted, Named) or len(self._entries) + waiting < STORES_MAX:
            return False
        return waiting > 0 or any(map(_is_unsettled, self._entries.values()))

    def _obey(self, request: _Request) -> _Entry | None:
        """The store that is opened, or ended, from now on; None if it is an error."""
        try:
            if isinstance(request.wanted, Asked):
                return self._add(request.id, request.wanted)
            return self._remove(request.id, request.wanted)
        except Exception as error:
            self._answer("error", request.id, reason=_sentence(error))
            return None

    # Adding

    def _add(self, value: int, asked: Asked) -> _Entry:
        """Has a store opened. Raises `Invalid`, `Unavailable`."""
        self._check_place(asked.path)
        entry = _Entry(value, asked, is_kept=False)
        with self._lock:
            self._check_free(entry)
            self._entries[asked.name] = entry
        try:
            self._begin(self._open, entry, False)
        except BaseException:
            self._forget(entry)
            raise
        return entry

    def _keep(self, value: int, asked: Asked) -> None:
        """Has a store opened again. One for which that can't be is tried again, like all others."""
        entry = _Entry(value, asked, is_kept=True)
        with self._lock:
            if asked.name in self._entries:
                return  # it failed to begin with all of them, and begins again
            self._entries[asked.name] = entry
        try:
            self._begin(self._open, entry, True)
        except XsError as error:
            self._fail(entry, str(error), True)
            entry.opened.set()
        except BaseException:
            self._forget(entry)
            raise

    def _check_place(self, path: str) -> None:
        root = os.path.realpath(self._root.folder)
        if path == root:
            raise Invalid(f"{path} is the root store: it is served already")
        check_apart(path, root)
        check_place(path)

    def _check_free(self, entry: _Entry) -> None:
        """Raises `Invalid` for what another store has already. `_lock` is held."""
        path, name, http = entry.asked
        others = [each for each in self._entries.values() if each.claims.meet(entry.claims)]
        for other in others:
            if other.asked.path == path:
                if other.mount is not None:
                    raise Invalid(f"{path} is served already, as {other.asked.name}")
                why = other.error and ", and can't be opened: remove it first to add it anew"
                raise Invalid(f"{path} is added already, as {other.asked.name}{why or ''}")
        for other in others:
            if other.asked.name == name:
                raise Invalid(f"the name {name} is taken by {other.asked.path}: give another name")
            check_apart(path, other.asked.path)
            if is_same_address(http, other.asked.http):
                raise Invalid(f"the address {http} is taken by the store at {other.asked.path}")
        if len(self._entries) >= STORES_MAX:
            raise Invalid(f"{STORES_MAX} stores are served already")

    def _open(self, entry: _Entry, again: bool) -> None:
        try:
            if again:  # the root, or another, has come to lie where it is, perhaps
                self._check_place(entry.asked.path)
            with self._turn():
                if self._stopping.is_set():
                    return
                # One that comes back is not made anew: its disk may not be there yet.
                mount = self._mount(entry.asked, not again)
        except Exception as error:  # whatever it is: the other stores go on
            self._fail(entry, _sentence(error), again)
        else:
            entry.mount, entry.error, entry.since = mount, None, self._root.clock()
            if not again:
                keep = [entry.script]
                entry.is_kept = self._answer("added", entry.id, keep, **_named(entry, mount))
        finally:
            entry.opened.set()
            self._due.set()  # for who waits for it, and to try it again

    def _fail(self, entry: _Entry, reason: str, again: bool) -> None:
        if reason != entry.error:
            self._log.for_store(entry.asked.name)(reason, WARNING)
        entry.error = reason
        if not again:
            try:
                self._answer("error", entry.id, reason=reason, **_named(entry, None))
            finally:
                self._forget(entry)

    def _failed(self) -> list[_Entry]:
        with self._lock:
            entries = list(self._entries.values())
        return [each for each in entries if each.error is not None and each.opened.is_set()]

    def _try_again(self) -> None:
        now = time.monotonic()
        if now < self._try_at:
            return
        self._try_at = now + RETRY_SECONDS
        for entry in self._failed():
            entry.opened.clear()
            try:
                self._begin(self._open, entry, True)
            except BaseException:
                entry.opened.set()  # as it was: to be tried again, or ended
                raise

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        has_turn = self._turns.acquire(timeout=_TURN_SECONDS)
        try:
            yield
        finally:
            if has_turn:
                self._turns.release()

    # Removing

    def _remove(self, value: int, named: Named) -> _Entry:
        """Has a store closed. Raises `Invalid`, `Unavailable`."""
        with self._lock:
            found = [each for each in self._entries.values() if named.means(each.asked)]
            if not found:
                if named.path == os.path.realpath(self._root.folder):
                    raise Invalid(f"{named.path} is the root store: stop the server to end it")
                raise Invalid(_not_served(named.path, named.name))
            (entry,) = found
            del self._entries[entry.asked.name]
            self._ending.add(entry)
        try:
            self._begin(self._end, entry, value)
        except BaseException:
            with self._lock:
                self._ending.discard(entry)
                self._entries[entry.asked.name] = entry
            raise
        return entry

    def _end(self, entry: _Entry, value: int | None) -> None:
        """Ends a store; `value` is the frame that asks for it, None when the server stops."""
        try:
            entry.opened.wait()
            mount, entry.mount = entry.mount, None
            if mount is not None:
                try:
                    self._unmount(mount)
                except Exception as error:  # it is gone from here in any case
                    self._log.for_store(entry.asked.name)(_sentence(error), WARNING)
            if value is None:
                return
            gone = entry.script._replace(active=False)
            source = ids.text(entry.id)
            self._answer("removed", value, [gone], store_id=source, **_named(entry, None))
        finally:
            with self._lock:
                self._ending.discard(entry)
            self._due.set()  # for who waits for it

    def _forget(self, entry: _Entry) -> None:
        with self._lock:
            if self._entries.get(entry.asked.name) is entry:
                del self._entries[entry.asked.name]

    # Answers

    def _answer(
        self, what: str, source: int, keep: list[Script] | None = None, **more: Any
    ) -> bool:
        """Answers a request, again and again while the disk is full or the like; whether it could.

        If it can't, because the server stops, the request is carried out by the next one.
        """
        told = as_meta({"source_id": ids.text(source), **more})
        append = Append(f"xs.store.{what}", meta=told)
        logged = False
        while True:
            try:
                with self._answering:
                    self._root.run(KeepWork([*(keep or []), self._mark(source)], append))
                    with self._lock:
                        self._pending.discard(source)
                        self._done.add(source)
                return True
            except XsError as error:
                lasts = not isinstance(error, (Full, Unavailable))
                if not logged:
                    self._log(f"{append.topic} can't be appended: {error}", WARNING)
                logged = True
                if lasts or self._stopping.wait(_ANSWER_SECONDS):
                    return False

    def _mark(self, answered: int) -> Script:
        """How far requests are done, once this one is."""
        with self._lock:
            pending = self._pending - {answered}
            mark = min(pending) - 1 if pending else self._position
            self._done = {value for value in self._done if value > mark}
            done = [ids.text(value) for value in sorted({*self._done, answered}) if value > mark]
        return Script(_MARK, "", "", True, ids.text(mark), json.dumps(done))

    # Threads

    def _begin(self, act: Callable[[_Entry, Any], None], entry: _Entry, argument: Any) -> None:
        """Does it in a thread of its own. Raises `Unavailable`."""

        def run() -> None:
            try:
                act(entry, argument)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threads.Thread(run, "xs-store")
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._threads.discard(thread)
            raise Unavailable("the system has no more threads just now: try again") from None

    def _join(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            with self._lock:
                threads = list(self._threads)
            if not threads:
                return
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))


def _named(entry: _Entry, mount: Mount | None) -> dict[str, Any]:
    """Name, path and gateway of a store, as frames and `GET /stores` tell of them."""
    http = mount.web[0] if mount is not None and mount.web else entry.asked.http
    return {"name": entry.asked.name, "path": entry.asked.path, "http": http}


def _is_unsettled(entry: _Entry) -> bool:
    """Whether it may turn out not to be there; one that is kept is, opened or not."""
    return not (entry.is_kept or entry.opened.is_set())


def _not_served(path: Optional[str], name: Optional[str]) -> str:
    return f"{path or name} is not served here" + (f" as {name}" if path and name else "")


def _sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, XsError) and text:
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"it can't be served: {error.strerror}"
    return f"{type(error).__name__}: {text}"


def _is_request(entry: frame.Entry) -> bool:
    """Whether a frame is one, and was not removed. What continues a content is part of another."""
    return entry.topic in TOPICS and entry.first is None and bool(entry.line)
