"""Generators: a script whose values become frames, one each, as they come.

What a process writes is taken as fast as it can be stored, and no faster: while a commit is under
way the rest waits in the process's pipe, and then the process waits.

A duplex generator reads the content of `.send` frames. Before it is given one, the index is told
so: each is given at most once, in order, also when the process or the server dies in between.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time

from xs import frame, ids, nu, runner
from xs.bulk import BatchWork
from xs.commit import Append, Commit
from xs.errors import Failed, Full, Invalid, NoNushell, NotFound, Unavailable, XsError
from xs.log import WARNING
from xs.meta import as_meta
from xs.process import NOT_RUN, Command
from xs.records import NamedTuple
from xs.runner import Backoff, Context, Runner
from xs.schema import Script
from xs.work import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Optional


COMMIT_VALUES = 1000  # values in one transaction
CHUNK_BYTES = 16 * 1024  # of a byte stream, in one value
VALUE_BYTES = 16 << 20  # of a text, or of bytes, that come in pieces and are one value
SENDS = 100  # frames of input that are marked as given in one transaction …
SEND_BYTES = 64 * 1024  # … and their bytes, about: as many as are lost when their process dies

_SPAWN, _TERMINATE = ".spawn", ".terminate"
_LINES = b"lines"  # what a process yields that is not Nushell


class Spawn(NamedTuple):
    """What a spawn frame asks for."""

    name: str
    duplex: bool


def parse_spawn(topic: str, meta: Any) -> Spawn:
    """A spawn frame's topic and meta. Raises `Invalid`."""
    name = name_of(topic, meta)
    if meta is None:
        return Spawn(name, False)
    if not isinstance(meta, dict):
        raise Invalid("the meta of a spawn is a record")
    given = meta.get("topic", name)
    if given != name:  # what `name_of` can't take
        if not isinstance(given, str):
            raise Invalid("topic is the generator's name, a text")
        frame.check_topic(given)
        raise Invalid(f"the name {given!r} belongs to the runtime: choose one not under xs.")
    duplex = meta.get("duplex", False)
    if not isinstance(duplex, bool):
        raise Invalid("duplex is true or false")
    return Spawn(name, duplex)


def name_of(topic: str, meta: Any) -> str:
    """The name of the generator that a spawn frame is about."""
    given = meta.get("topic") if isinstance(meta, dict) else None
    if isinstance(given, str) and not f"{given}.".startswith(frame.RUNTIME_PREFIX):
        try:
            return frame.check_topic(given)
        except Invalid:
            pass  # who has the topic's name is told
    return topic[: -len(_SPAWN)]


class KeepWork(Work):
    """Keeps how far scripts are, with a frame that tells of it, if there is one."""

    __slots__ = ("scripts", "told")

    is_whole = True  # the frame with what it tells of, or neither

    def __init__(self, scripts: list[Script], told: Optional[Append] = None) -> None:
        super().__init__()
        self.scripts = scripts
        self.told = told

    def apply(self, commit: Commit) -> None:
        if self.told is not None:
            commit.append(self.told)
        for script in self.scripts:
            commit.writer.keep_script(script)


def terminated(script: Script, newest: int) -> KeepWork:
    """Keeps that a generator is out for good, and the newest spawn of its name, if that is another.

    So it stays out though the frame that says so may go.
    """
    spawn = ids.text(newest)
    out = Script(script.kind, script.name, spawn, False, spawn)
    return KeepWork([script._replace(active=False), out])


class Generator(Runner):
    """The generator of one name."""

    kind = "generator"
    meta_keys = ("topic", "duplex")

    def __init__(self, context: Context, name: str) -> None:
        super().__init__(context, name)
        self._find_command: Callable[[], Command]
        self._has_run = False  # its process has started once
        self._meta = ""  # of what it yields
        self._duplex = False
        self._position = -1  # the last frame of input that it was given, or that is none of its own
        self._backoff = Backoff()
        self._reset()
        self._watch = self.store.bus.watch(self._wants, self.wake)

    def _reset(self) -> None:
        """Before a process is started."""
        self._started = False
        self._kind: bytes | None = None  # what it yields
        self._values: list[Append] = []
        self._is_one = False  # it yields one value, which is not whole yet …
        self._held = bytearray()  # … and of which this has come
        self._committing: BatchWork | None = None
        self._committed = threading.Event()  # no commit is under way
        self._committed.set()
        self._input = _NO_INPUT
        self._started_at = time.monotonic()
        self._restart_at = 0.0

    def _wants(self, topic: str) -> bool:
        return self._duplex and topic == f"{self.name}.send"

    # Orders

    def put(self, source: int) -> None:
        try:
            self.store.get(source)
        except NotFound:
            return  # it was removed meanwhile: nobody wants it any more
        kept = self.kept(source)
        if kept is not None and not kept.active:
            return  # terminated, or replaced, though the frame that said so is gone
        if not self.is_stored(source):
            # After a restart it would be gone, and the one before it would be back.
            self._tell_error(source, "a spawn must be stored: give it another ttl than ephemeral")
            return
        if self.source is not None:
            self._take_out("replaced")
        self._keep_newest(source)
        try:
            found, text = self.read_source(source)
            duplex = parse_spawn(found.topic, found.meta).duplex
            in_nushell = functools.partial(nu.script, input_="bytes" if duplex else "none")
            self._find_command = functools.partial(
                runner.command_of, text, in_nushell, has_input=duplex
            )
            self._find_command()
        except Unavailable:
            raise  # it says nothing about the script: the order is carried out later
        except XsError as error:
            self._tell_error(source, str(error))
            return
        self.source = source
        self.finished_frames = 0
        self._duplex = duplex
        self._position = source if kept is None else ids.parse(kept.position)
        self._backoff = Backoff()
        self._has_run = False
        self._meta = f'{{"source_id":"{ids.text(source)}"}}'
        self._reset()

    def _keep_newest(self, source: int) -> None:
        """From now on those before it stay out, whatever becomes of the frames that say so."""
        mine = ids.text(source)
        known = self.store.index.scripts(self.kind, self.name)
        older = [each for each in known if each.active and each.source != mine]
        changed = [each._replace(active=False) for each in older]
        if all(each.source != mine for each in known):
            changed.append(Script(self.kind, self.name, mine, True, mine))
        if changed:
            self.persist(KeepWork(changed))

    def take_out(self, frame_id: int) -> None:
        if self.source is None:  # it is not in service, but would be at the server's next start
            waiting = [
                script._replace(active=False)
                for script in self.store.index.scripts(self.kind, self.name)
                if script.active and ids.parse(script.source) < frame_id
            ]
            if waiting:
                self.persist(KeepWork(waiting))
        elif frame_id > self.source:
            self._take_out("terminated")

    def _take_out(self, reason: str) -> None:
        if reason == "terminated" or self._is_running:
            self._stop({"reason": reason}, for_good=reason == "terminated")
        self._forget()

    def _refuse(self, reason: str) -> None:
        """It can't be started, and is not tried again before the server's next start."""
        assert self.source is not None
        self._tell_error(self.source, reason)
        self._forget()

    def _forget(self) -> None:
        self.close_process()
        self.source = None
        self._duplex = False

    def _tell_error(self, source: int, reason: str) -> None:
        self.last_error = reason
        self.log(f"can't be started: {reason.splitlines()[0]}", WARNING)
        self.persist(BatchWork([self.refusal(self.name, source, reason)]))

    @classmethod
    def refusal(cls, name: str, source: int, reason: str) -> Append:
        meta = as_meta({"source_id": ids.text(source), "reason": reason})
        return Append(f"{name}.spawn.error", meta=meta)

    def leave(self) -> None:
        self.store.bus.unwatch(self._watch)
        if self._is_running:
            self._stop({"reason": "shutdown"})

    @property
    def _is_running(self) -> bool:
        return self.source is not None and self.pipes is not None and self._started

    def _stop(self, told: dict[str, Any], *, for_good: bool = False) -> None:
        """Ends the process, keeps what it has yielded, and says why it ended."""
        assert self.source is not None
        tail = self._finish_process()
        try:
            self._flush()
        except Failed as error:
            self.last_error = told["error"] = str(error)
        told = {"source_id": ids.text(self.source), **told}
        if tail:
            told["stderr"] = tail
        stop = Append(f"{self.name}.stop", meta=as_meta(told))
        out = [self._script(active=False)]
        self.persist(KeepWork(out, stop) if for_good else BatchWork([stop]))

    def _finish_process(self) -> str:
        """As `end_process`, and takes what it has yielded by then."""
        if self.pipes is not None and self._started:
            self.pipes.end()
            try:
                self._take_values()
            except Failed as error:
                self.last_error = str(error)
        return self.end_process()

    # What happens

    def step(self) -> None:
        now = time.monotonic()
        if self.pipes is None:
            if now < self._restart_at:
                self.select(self._restart_at - now)
            else:
                self._start_process()
            return
        try:
            self._give()
            self.select(None if self._started else self._started_at + runner.START_SECONDS - now)
            self._take()
            self._commit_values()
        except Failed as error:
            self._end(str(error))
            return
        if self.pipes.status is not None and not self._values and self._committing is None:
            self._on_end(self.pipes.status)

    def _start_process(self) -> None:
        self._reset()
        try:
            command = self._find_command()
            self.start_process(command)
        except (Failed, Invalid, NoNushell) as error:
            self._on_missing(str(error))
            return
        if not command.mark:
            self._on_start()
            self._kind = _LINES

    def _on_missing(self, reason: str) -> None:
        """What runs it is not there, or has no room: for a while, if it has run before."""
        if not self._has_run:
            self._refuse(reason)
            return
        self.last_error = reason
        self.log(f"{reason}: it is started again", WARNING)
        self.close_process()
        self._restart_at = time.monotonic() + self._backoff.after(well=False)

    def _on_start(self) -> None:
        self._started = self._has_run = True
        self.persist(BatchWork([Append(f"{self.name}.start", meta=self._meta)]))

    def _on_end(self, status: int) -> None:
        assert self.pipes is not None
        how = f"it ended with status {status}" if status >= 0 else f"signal {-status} ended it"
        if not self._started and status in NOT_RUN:
            self._on_missing(self.pipes.tail or how)
            return
        if not self._started and status > 0:
            self._refuse(self.pipes.tail or how)
            return
        self._end(None if status == 0 else how, status)

    def _end(self, error: Optional[str], status: Optional[int] = None) -> None:
        """The process has ended, or has to: it is started again after a while."""
        reason = {"reason": error or "finished"}
        self._stop(reason if status is None else {**reason, "status": status})
        self.last_error = error or self.last_error
        well = error is None or time.monotonic() - self._started_at > runner.WELL_SECONDS
        self._restart_at = time.monotonic() + self._backoff.after(well=well)

    # Values out

    def _take(self) -> None:
        """Takes what has come. Raises `Failed`."""
        pipes = self.pipes
        assert pipes is not None
        if not self._started and time.monotonic() > self._started_at + runner.START_SECONDS:
            raise Failed(f"it did not start within {runner.START_SECONDS:.0f} s")
        self._take_values()
        pipes.pause(len(self._values) > COMMIT_VALUES)

    def _take_values(self) -> None:
        pipes = self.pipes
        assert pipes is not None
        while self._kind is None:
            line = pipes.line()
            if line is None:
                return
            said = pipes.ours(line)
            if said is None:
                continue
            if self._started:
                self._kind = said
                self._is_one = said in (nu.TEXT, nu.BINARY)
            elif runner.is_start(said):
                self._on_start()
            else:
                raise Failed("it said something before it began")
        if self._kind == nu.BYTE_STREAM:
            data = pipes.rest()
            for start in range(0, len(data), CHUNK_BYTES):
                self._add(data[start : start + CHUNK_BYTES])
            return
        for line in pipes.lines():
            said = pipes.ours(line)
            if said is None:
                continue
            if self._is_one:
                self._held += nu.content_of(said)
            else:
                self._add(said if self._kind == _LINES else nu.content_of(said))
        if len(self._held) > VALUE_BYTES:
            raise Failed(
                f"it yielded one value of more than {VALUE_BYTES} bytes: `lines` makes many of a "
                "text, `chunks` of bytes"
            )
        if self._is_one and pipes.status is not None:
            self._is_one = False
            if self._held or pipes.status == 0:  # of what was ended, what had come
                self._add(bytes(self._held))
        if self._kind == _LINES and pipes.status is not None:
            last = pipes.rest()  # whose line has no end
            if last:
                self._add(last)

    def _add(self, value: bytes) -> None:
        try:
            content = self.store.cas.take_whole(value)
        except (Full, Unavailable) as error:
            raise Failed(f"a value could not be stored: {error}") from None
        self._values.append(Append(f"{self.name}.recv", content, self._meta))
        self.finished_frames += 1

    def _commit_values(self) -> None:
        """Commits what has come; more gathers while a commit is under way. Raises `Failed`."""
        self._finish_commit()
        if self._committing is None and self._values:
            self._submit()
            self._finish_commit()

    def _submit(self) -> None:
        values, self._values = self._values[:COMMIT_VALUES], self._values[COMMIT_VALUES:]
        work = BatchWork([*values], atomic=True)
        work.done = self._on_commit
        self._committing = work
        self._committed.clear()
        self.store.submit(work)

    def _on_commit(self, _: Work) -> None:
        """Called by whoever led the commit."""
        self._committed.set()
        self.wake()

    def _finish_commit(self) -> None:
        """Looks whether the commit under way is through. Raises `Failed` if it failed."""
        work = self._committing
        if work is None or not work.finished:
            return
        self._committing = None
        if work.error is not None:
            lost = len(work.appends) + len(self._values)
            BatchWork([*self._values]).discard()
            self._values = []
            raise Failed(f"{lost} values could not be stored: {work.error}")

    def _flush(self) -> None:
        """Commits all values that have come, and waits for it. Raises `Failed`."""
        while self._values or self._committing is not None:
            if self._committing is None:
                self._submit()
            self._committed.wait()
            self._finish_commit()

    # Input

    def _give(self) -> None:
        """Gives a duplex generator what was sent, as fast as it reads."""
        pipes = self.pipes
        assert pipes is not None
        if not self._duplex or not self._started or pipes.has_unsent:
            return
        while not (pipes.has_unsent or self.has_orders or self.is_stopping):
            try:
                block = next(self._input, None)
            except XsError as error:
                self.log(f"left out the rest of {ids.text(self._position)}: {error}", WARNING)
                continue
            if block is not None:
                pipes.send(block)
                continue
            self._input = self._next_input()
            if self._input is _NO_INPUT:
                return

    def _next_input(self) -> Iterator[bytes]:
        """What was sent next, in blocks. From now on it counts as given."""
        contents = []
        size = 0
        for line in self._next_sends():
            self._position = ids.parse(frame.id_of(line))
            try:
                found, blocks = self.store.content_of(self._position)
            except XsError as error:
                self.log(f"left out {ids.text(self._position)}: {error}", WARNING)
                continue
            contents.append(blocks)
            size += found
            if size > SEND_BYTES:
                break
        if not contents:
            return _NO_INPUT
        self.persist(KeepWork([self._script()]))
        return itertools.chain.from_iterable(contents)

    def _next_sends(self) -> list[bytes]:
        store, topic, now = self.store, f"{self.name}.send", self.store.clock()
        newest = store.newest()
        entries = store.bus.after(self._position)
        if entries is None:
            walk = store.index.walk(frozenset((topic,)))
            page, _ = walk.page(self._position, newest, SENDS, now)
            lines = page.split(b"\n")[:-1]
            order = self._next_order(frame.id_of(lines[-1])) if lines else None
            if order is not None:
                return [line for line in lines if frame.id_of(line) < order]
        else:
            lines = []
            for each in entries:
                if each.first is None and each.line and self._is_new_order(each.topic, each.line):
                    return lines[:SENDS]  # it is on its way: what follows is for the next
                if each.topic == topic and each.is_live(now):
                    lines.append(each.line)
        if not lines:
            self._position = max(self._position, newest)
        return lines[:SENDS]

    def _next_order(self, until: str) -> Optional[str]:
        """The id of the first stored order that is on its way, if there is one up to `until`."""
        index, now = self.store.index, self.store.clock()
        found = [until]
        for topic in filter(_is_of_orders, index.script_topics()):
            walk = index.walk(frozenset((topic,)), chunks=False)
            after, count = self._position, 1
            while count:
                page, count = walk.page(after, ids.parse(found[-1]), SENDS, now)
                lines = page.split(b"\n")[:-1]
                orders = [frame.id_of(line) for line in lines if self._is_new_order(topic, line)]
                if orders:
                    found.append(orders[0])
                    break
                after = ids.parse(frame.id_of(lines[-1])) if lines else after
        return found[-1] if len(found) > 1 else None

    def _is_new_order(self, topic: str, line: bytes) -> bool:
        """Whether a frame is one to this generator, and none that it has obeyed."""
        if not _is_of_orders(topic) or ids.parse(frame.id_of(line)) <= self.obeyed:
            return False
        if topic.endswith(_SPAWN):  # of any name: its meta may have this one
            return name_of(topic, frame.Frame.from_json(line).meta) == self.name
        return topic == f"{self.name}{_TERMINATE}"

    def _script(self, *, active: bool = True) -> Script:
        assert self.source is not None
        position = ids.text(self._position)
        return Script(self.kind, self.name, ids.text(self.source), active, position)


def _is_of_orders(topic: str) -> bool:
    return topic.endswith((_SPAWN, _TERMINATE))


_NO_INPUT: Iterator[bytes] = iter(())
