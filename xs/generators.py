"""Generators: a script whose values become frames, one each, as they come.

What a process writes is taken as fast as it can be stored, and no faster: while a commit is under
way the rest waits in the process's pipe, and then the process waits.

A duplex generator reads the content of `.send` frames. Before it is given one, the index is told
so: each is given at most once, in order, also when the process or the server dies in between.
"""

from __future__ import annotations

import binascii
import functools
import json
import threading
import time

from xs import frame, ids, nu, runner
from xs.commit import Append, BatchWork, Commit, Work
from xs.errors import Failed, Invalid, XsError
from xs.log import WARNING
from xs.process import Command
from xs.records import NamedTuple
from xs.runner import Backoff, Context, Runner
from xs.schema import Script

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

COMMIT_VALUES = 1000  # values in one transaction
CHUNK_BYTES = 16 * 1024  # of a byte stream, in one value
SENDS = 100  # frames of input that are marked as given in one transaction
SEND_BYTES = 1 << 20

_BYTE_STREAM = b"byte stream"


class Spawn(NamedTuple):
    """What a spawn frame asks for."""

    name: str
    duplex: bool


def parse_spawn(topic: str, meta: Any) -> Spawn:
    """A spawn frame's topic and meta. Raises `Invalid`."""
    name = topic[: -len(".spawn")]
    if meta is None:
        return Spawn(name, False)
    if not isinstance(meta, dict):
        raise Invalid("the meta of a spawn is a record")
    given = meta.get("topic", name)
    if not isinstance(given, str):
        raise Invalid("topic is the generator's name, a text")
    duplex = meta.get("duplex", False)
    if not isinstance(duplex, bool):
        raise Invalid("duplex is true or false")
    return Spawn(frame.check_client_topic(given), duplex)


class PositionWork(Work):
    """Marks what a generator has been given."""

    __slots__ = ("script",)

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script

    def apply(self, commit: Commit) -> None:
        commit.writer.keep_script(self.script)


class Generator(Runner):
    """The generator of one name."""

    kind = "generator"

    def __init__(self, context: Context, name: str) -> None:
        super().__init__(context, name)
        self._command: Command
        self._duplex = False
        self._position = -1  # the last frame of input that it was given
        self._backoff = Backoff()
        self._reset()
        self._watch = self.store.bus.watch(self._wants, self.wake)

    def _reset(self) -> None:
        """Before a process is started."""
        self._started = False
        self._kind: bytes | None = None  # what a Nushell script yields
        self._values: list[Append] = []
        self._committing: BatchWork | None = None
        self._committed = threading.Event()  # no commit is under way
        self._committed.set()
        self._started_at = time.monotonic()
        self._restart_at = 0.0

    def _wants(self, topic: str) -> bool:
        return self._duplex and topic == f"{self.name}.send"

    # Orders

    def put(self, source: int) -> None:
        if self.source is not None:
            self._take_out("replaced")
        if not self.is_stored(source):
            return
        self.source = source
        self.finished_frames = 0
        self._backoff = Backoff()
        try:
            found, text = self.read_source(source)
            self._duplex = parse_spawn(found.topic, found.meta).duplex
            input_ = "bytes" if self._duplex else "none"
            self._command = runner.command_of(
                text, functools.partial(nu.script, input_=input_), has_input=self._duplex
            )
        except XsError as error:
            self._refuse(str(error))
            return
        kept = self.kept(source)
        self._position = source if kept is None else ids.parse(kept.position)
        self._reset()

    def take_out(self, frame_id: int) -> None:
        if self.source is not None and frame_id > self.source:
            self._take_out("terminated")

    def _take_out(self, reason: str) -> None:
        is_running = self.pipes is not None and self._started
        tail = self.end_process()
        self._flush()
        if is_running or reason == "terminated":
            self._append("stop", {"reason": reason}, tail)
        self.source = None
        self._duplex = False

    def _refuse(self, reason: str) -> None:
        """It can't be started, and is not tried again before the server's next start."""
        self.last_error = reason
        self.log(f"can't be started: {reason}", WARNING)
        self.close_process()
        self._append("spawn.error", {"reason": reason})
        self.source = None
        self._duplex = False

    def leave(self) -> None:
        self.store.bus.unwatch(self._watch)
        if self.source is not None:
            is_running = self.pipes is not None and self._started
            tail = self.end_process()
            self._flush()
            if is_running:
                self._append("stop", {"reason": "shutdown"}, tail)

    def _append(self, what: str, more: dict[str, Any], tail: str = "") -> None:
        assert self.source is not None
        told = {"source_id": ids.text(self.source), **more}
        if tail:
            told["stderr"] = tail
        meta = runner.json_text(told)
        self.persist(BatchWork([Append(f"{self.name}.{what}", meta=meta)]))

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
        except Failed as error:
            self._end(str(error))
            return
        self._commit_values()
        if self.pipes is not None and self.pipes.status is not None and self._is_drained:
            self._on_end(self.pipes.status)

    def _start_process(self) -> None:
        self._reset()
        try:
            self.start_process(self._command)
        except Failed as error:
            self._refuse(str(error))
            return
        if not self._command.mark:
            self._on_start()

    def _on_start(self) -> None:
        self._started = True
        self._append("start", {})

    @property
    def _is_drained(self) -> bool:
        return not self._values and self._committing is None

    def _on_end(self, status: int) -> None:
        assert self.pipes is not None
        if not self._started and status > 0:
            self._refuse(self.pipes.tail or f"it ended with status {status}")
            return
        self._end(None if status == 0 else f"it ended with status {status}", status)

    def _end(self, error: Optional[str], status: Optional[int] = None) -> None:
        """The process has ended, or has to: it is started again after a while."""
        tail = self.end_process()
        if self._flush():
            reason = {"reason": "finished"} if error is None else {"reason": error}
            self._append("stop", {**reason, **({} if status is None else {"status": status})}, tail)
        self.last_error = error or self.last_error
        well = error is None or time.monotonic() - self._started_at > runner.WELL_SECONDS
        self._restart_at = time.monotonic() + self._backoff.after(well=well)

    # Values out

    def _take(self) -> None:
        pipes = self.pipes
        assert pipes is not None
        if not self._started and time.monotonic() > self._started_at + runner.START_SECONDS:
            raise Failed(f"it did not start within {runner.START_SECONDS:.0f} s")
        if self._kind == _BYTE_STREAM:
            self._take_bytes(pipes.rest())
        else:
            for line in pipes.lines():
                if self._kind == _BYTE_STREAM:
                    self._take_bytes(line + b"\n")
                    continue
                said = pipes.ours(line)
                if said is not None:
                    self._take_line(said)
            if self._kind == _BYTE_STREAM or (not self._command.mark and pipes.status is not None):
                self._take_bytes(pipes.rest())
        pipes.pause(len(self._values) > COMMIT_VALUES)

    def _take_line(self, said: bytes) -> None:
        if not self._command.mark:
            self._add(said)
        elif not self._started:
            if not runner.is_start(said):
                raise Failed("it said something before it began")
            self._on_start()
        elif self._kind is None:
            self._kind = said
        elif said[:1] == b"B":
            self._add(binascii.a2b_base64(said[1:]))
        elif said[1:2] == b'"':
            self._add(json.loads(said[1:]).encode("utf-8", "replace"))
        else:
            self._add(said[1:])

    def _take_bytes(self, data: bytes) -> None:
        for start in range(0, len(data), CHUNK_BYTES):
            self._add(data[start : start + CHUNK_BYTES])

    def _add(self, value: bytes) -> None:
        assert self.source is not None
        content = self.store.cas.take([value]) if value else None
        meta = f'{{"source_id":"{ids.text(self.source)}"}}'
        self._values.append(Append(f"{self.name}.recv", content, meta))
        self.finished_frames += 1

    def _commit_values(self) -> None:
        """Commits what has come; more gathers while a commit is under way."""
        self._finish_commit()
        if self._committing is None and self._values:
            self._submit()
            self._finish_commit()

    def _submit(self) -> None:
        values, self._values = self._values[:COMMIT_VALUES], self._values[COMMIT_VALUES:]
        work = BatchWork([*values])
        work.done = self._on_commit
        self._committing = work
        self._committed.clear()
        self.store.submit(work)

    def _on_commit(self, _: Work) -> None:
        """Called by whoever led the commit."""
        self._committed.set()
        self.wake()

    def _finish_commit(self) -> bool:
        """Looks whether the commit under way is through; False if it failed."""
        work = self._committing
        if work is None or not work.finished:
            return True
        self._committing = None
        if work.error is None:
            return True
        lost = len(work.appends) + len(self._values)
        self._values = []
        self._end(f"{lost} values could not be stored: {work.error}")
        return False

    def _flush(self) -> bool:
        """Commits all values that have come, and waits for it; False if that failed."""
        while self._values or self._committing is not None:
            if self._committing is None:
                self._submit()
            self._committed.wait()
            if not self._finish_commit():
                return False
        return True

    # Input

    def _give(self) -> None:
        """Gives a duplex generator what was sent, once it has read what it was given before."""
        pipes = self.pipes
        assert pipes is not None
        if not self._duplex or not self._started or pipes.has_unsent:
            return
        lines = self._next_sends()
        if not lines:
            return
        data = bytearray()
        for line in lines:
            value = ids.parse(frame.id_of(line))
            if data and len(data) > SEND_BYTES:
                break
            try:
                for block in self.store.content_of(value)[1]:
                    data += block
            except XsError as error:
                self.log(f"left out {ids.text(value)}: {error}", WARNING)
            self._position = value
        assert self.source is not None
        position = ids.text(self._position)
        self.persist(
            PositionWork(Script(self.kind, self.name, ids.text(self.source), True, position))
        )
        pipes.send(bytes(data))

    def _next_sends(self) -> list[bytes]:
        topic, store = f"{self.name}.send", self.store
        entries = store.bus.after(self._position)
        now = store.clock()
        if entries is None:
            found = store.index.page(
                self._position, store.newest(), frozenset((topic,)), SENDS, now
            )[0]
            return found.split(b"\n")[:-1]
        return [e.line for e in entries if e.topic == topic and e.is_live(now)][:SENDS]
