"""Handlers: a closure, or a program, that is given each frame and answers with what it causes.

The way of a frame through a handler:

1. it is read from the stream behind the last one, and written to the process, which may be many
   frames behind: none waits for the answer to another;
2. the process answers each frame in turn, with what that is to cause (docs/scripts.md);
3. what has been answered meanwhile is committed together: output, what was appended, the new state,
   and the handler's position, the id of the last frame that was answered, in one transaction.

So after a kill at any moment the handler goes on with the first frame whose effects are not stored.
A frame that failed has none: the handler is out of service then, in one transaction with all that
the frames before it caused.
"""

from __future__ import annotations

import binascii
import collections
import functools
import json
import threading
import time
from itertools import islice

from xs import frame, ids, nu, runner
from xs.commit import Append, BatchWork, Commit, Work
from xs.errors import Failed, Invalid, NoNushell, XsError
from xs.log import WARNING
from xs.process import Command
from xs.reader import PULSE, Form, write
from xs.records import NamedTuple
from xs.runner import Backoff, Context, Runner
from xs.schema import Script, Stored

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

AHEAD_FRAMES = 1000  # frames that a process may have been given and not have answered
INPUT_FRAMES = 500  # in one line to Nushell
INPUT_BYTES = 1 << 20  # so much is written to a process before it is seen what it does
COMMIT_FRAMES = 1000  # answers in one transaction
NOTE_SECONDS = 1.0  # after which a position is stored though nothing was caused
DEATHS_MAX = 5  # of the process by signals, without one frame between: then it has failed

REGISTRATIONS_CACHED = 10_000  # ids of which a handler knows whether they are its registrations

_OUTPUT_KEYS = frozenset({"topic", "meta", "ttl", "content", "content_base64"})
_ANSWER_KEYS = frozenset({"state", "out", "append", "error"})


class Registration(NamedTuple):
    """What a register frame asks for. `start` is the id to go on after."""

    stateful: bool
    state: str  # to begin with, as JSON
    start: int
    patterns: frame.Patterns
    content: bool
    pulse: Optional[float]  # seconds
    timeout: Optional[float]  # seconds


def parse_registration(source: int, meta: Any) -> Registration:
    """The meta of a register frame. Raises `Invalid`."""
    if meta is None:
        meta = {}
    if not isinstance(meta, dict):
        raise Invalid("the meta of a registration is a record")
    flags = {key: meta.get(key) or False for key in ("stateful", "content")}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise Invalid(f"{key} is true or false, not {_short(value)}")
    topic = meta.get("topic", "*")
    if not isinstance(topic, str):
        raise Invalid(f"topic is a pattern such as notes or chat.*, not {_short(topic)}")
    return Registration(
        flags["stateful"],
        runner.json_text(meta.get("initial_state")),
        _start(source, meta.get("run-from", "tail")),
        frame.parse_patterns(topic),
        flags["content"],
        _seconds(meta, "pulse", 10),
        _seconds(meta, "timeout", 1),
    )


def _start(source: int, value: Any) -> int:
    if value == "start":
        return -1
    if value == "tail":
        return source  # not the time of the start: nothing between the two is left out
    if isinstance(value, str) and ids.is_id(value):
        return ids.parse(value)
    raise Invalid(f"run-from is start, tail or the id to start after, not {_short(value)}")


def _seconds(meta: dict[str, Any], key: str, least: int) -> float | None:
    value = meta.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 10**12:
        raise Invalid(f"{key} is a number of milliseconds, at least {least}: not {_short(value)}")
    return value / 1000


def _short(value: Any) -> str:
    return runner.json_text(value)[:64]


class Answer(NamedTuple):
    """What one frame is to cause: frames, and the new state as JSON (None: as it was)."""

    id: int
    appends: list[Append]
    state: Optional[str]


class EffectsWork(Work):
    """Commits what some frames have caused, and how far their handler is by that."""

    __slots__ = ("appends", "frames", "script")

    def __init__(self, appends: list[Append], script: Script, frames: int = 0) -> None:
        super().__init__()
        self.appends = appends
        self.script = script
        self.frames = frames

    def apply(self, commit: Commit) -> None:
        for result in BatchWork([*self.appends]).apply(commit):
            if isinstance(result, XsError):
                raise result
        commit.writer.keep_script(self.script)


class Handler(Runner):
    """The handler of one topic."""

    kind = "handler"

    def __init__(self, context: Context, name: str) -> None:
        super().__init__(context, name)
        self._asked: Registration
        self._command: Command
        self._is_program = False
        self._registered = False
        self._position = -1  # the last frame whose effects are stored
        self._state = "null"  # as stored
        self._patterns: frame.Patterns = frozenset()  # of frames that are given, and watched for
        self._backoff = Backoff()
        self._deaths = 0
        self._forget_process()
        # Ids of registrations: whether they are, or were, this handler's.
        kept = self.store.index.scripts(self.kind, name)
        self._registrations = {script.source: True for script in kept}
        self._watch = self.store.bus.watch(self._wants, self.wake)

    def _forget_process(self) -> None:
        """Nothing is under way: what was given and is not stored is to be given again."""
        self._given = self._position  # frames up to here were given, or are none of ours
        self._ready = False
        self._waiting: collections.deque[int] = collections.deque()  # ids given, not answered
        self._answers: collections.deque[Answer] = collections.deque()  # not committed
        self._has_effects = False  # … with something to be seen among them
        self._latest_state = self._state
        self._committing: EffectsWork | None = None
        self._committed = threading.Event()  # no commit is under way
        self._committed.set()
        self._since = time.monotonic()  # the last answer, or what was given to an idle process
        self._noted = time.monotonic()  # the last commit
        self._restart_at = 0.0
        self._pulse_at = 0.0

    def _wants(self, topic: str) -> bool:
        return frame.matches(self._patterns, topic)

    # Orders

    def put(self, source: int) -> None:
        self._take_out(source)
        if not self.is_stored(source):
            return
        kept = self.kept(source)
        if kept is not None and not kept.active:
            return  # it has failed, or was taken out: a new start of the server changes nothing
        self.source = source
        self.finished_frames = 0
        self._registrations[ids.text(source)] = True
        self._position, self._state = source, "null"
        try:
            found, text = self.read_source(source)
            self._asked = asked = parse_registration(source, found.meta)
            self._is_program = text.startswith(b"#!")
            self._command = runner.command_of(
                text, functools.partial(nu.handler, stateful=asked.stateful)
            )
        except XsError as error:
            # A Nushell that is missing is no fault of the script: the next start tries again.
            self._fail(str(error), for_good=not isinstance(error, NoNushell))
            return
        self._position = asked.start if kept is None else ids.parse(kept.position)
        self._state = asked.state if kept is None else kept.state or "null"
        self._patterns = asked.patterns
        self._registered = False
        self._backoff = Backoff()
        self._deaths = 0
        self._forget_process()

    def take_out(self, frame_id: int) -> None:
        if self.source is None or frame_id > self.source:
            self._take_out(frame_id)

    def _take_out(self, frame_id: int) -> None:
        if self.source is not None:
            self._flush()
            self._leave_service({"frame_id": ids.text(frame_id)})

    def _fail(self, error: str, *, for_good: bool = True) -> None:
        self.last_error = error
        self.log(f"out of service: {error}", WARNING)
        self._leave_service({"error": error}, for_good=for_good)

    def _leave_service(self, told: dict[str, str], *, for_good: bool = True) -> None:
        assert self.source is not None
        tail = self.end_process()
        if tail and tail != told.get("error"):
            told = {**told, "stderr": tail}
        told = {"handler_id": ids.text(self.source), **told}
        unregistered = Append(f"{self.name}.unregistered", meta=runner.json_text(told))
        work: Work
        if for_good:
            work = EffectsWork([unregistered], self._script(active=False))
        else:
            work = BatchWork([unregistered])
        self.persist(work)
        self.source = None
        self._patterns = frozenset()

    def leave(self) -> None:
        self.store.bus.unwatch(self._watch)
        self.end_process()
        if self.source is not None:
            self._flush()

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
            self.select(self._timeout(now))
            self._take()
            self._check_time()
        except Failed as error:
            if self._flush():
                self._fail(str(error))
            return
        self._commit_answers()
        if self.pipes is not None and self.pipes.status is not None:
            self._on_end(self.pipes.status)

    def _start_process(self) -> None:
        self._forget_process()
        try:
            pipes = self.start_process(self._command)
        except Failed as error:
            self._fail(str(error))
            return
        if self._is_program:
            self._on_ready()
        elif self._asked.stateful:
            pipes.send(b'[{"state":' + self._state.encode() + b"}]\n")

    def _on_ready(self) -> None:
        assert self.source is not None
        self._ready = True
        self._since = time.monotonic()
        if not self._registered:
            meta = runner.json_text({"handler_id": ids.text(self.source)})
            registered = Append(f"{self.name}.registered", meta=meta)
            self.persist(EffectsWork([registered], self._script()))
            self._registered = True

    def _on_end(self, status: int) -> None:
        """The process has ended, which it never should."""
        assert self.pipes is not None
        if self._answers or self._committing is not None:
            self._deaths = 0
        if not self._flush():
            return
        self._deaths += 1
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        where = f" while it had frame {ids.text(self._waiting[0])}" if self._waiting else ""
        error = f"its process {how}{where}"
        if not self._ready and status >= 0:
            self._fail(self.pipes.tail or error)
        elif status >= 0 or self._deaths > DEATHS_MAX:
            self._fail(error)
        else:
            # Who killed it may have meant it once: the first time it comes back at once.
            self._restart(error, 0.0 if self._deaths == 1 else self._backoff.after(well=False))

    def _restart(self, error: str, seconds: float) -> None:
        self.last_error = error
        self.log(f"{error}: it is started again", WARNING)
        self.close_process()
        self._forget_process()
        self._restart_at = time.monotonic() + seconds

    def _timeout(self, now: float) -> float | None:
        """Seconds until something is to be done though nothing happens."""
        times = []
        if not self._ready:
            times.append(self._since + runner.START_SECONDS)
        elif self._waiting and self._asked.timeout is not None:
            times.append(self._since + self._asked.timeout)
        if self._answers and self._committing is None:
            times.append(self._noted + NOTE_SECONDS)
        if self._ready and self._asked.pulse is not None and not self._waiting:
            times.append(self._pulse_at)
        return max(0.0, min(times) - now) if times else None

    def _check_time(self) -> None:
        late = time.monotonic() - self._since
        if not self._ready and late > runner.START_SECONDS:
            raise Failed(f"it did not start within {runner.START_SECONDS:.0f} s")
        timeout = self._asked.timeout
        if self._ready and self._waiting and timeout is not None and late > timeout:
            assert self.pipes is not None
            self.pipes.kill()
            given = ids.text(self._waiting[0])
            raise Failed(f"it took longer than its timeout of {timeout * 1000:.0f} ms for {given}")

    # Frames in

    def _give(self) -> None:
        """Gives the process what comes next, as much as it may be ahead."""
        pipes = self.pipes
        assert pipes is not None
        one_by_one = self._is_program and self._asked.stateful
        while self._ready and not pipes.has_unsent:
            room = (1 if one_by_one else AHEAD_FRAMES) - len(self._waiting)
            if room <= 0 or len(self._answers) > COMMIT_FRAMES:
                return
            before = self._given
            lines = self._next_lines(min(room, INPUT_FRAMES))
            if not lines:
                if self._given == before:
                    self._give_pulse()
                    return
                continue
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting.extend(ids.parse(frame.id_of(line)) for line in lines)
            pipes.send(self._input(lines))

    def _give_pulse(self) -> None:
        """A heartbeat, for a handler that asked for one and has nothing else to do."""
        if self._asked.pulse is None or self._waiting or time.monotonic() < self._pulse_at:
            return
        now = time.monotonic()
        first, self._pulse_at = self._pulse_at == 0, now + self._asked.pulse
        if first or self.pipes is None:
            return
        self._since = now
        self._waiting.append(self._given)
        line = frame.encode(PULSE, ids.text(max(self._given, 0)), None, "null", frame.EPHEMERAL)
        self.pipes.send(self._input([line.encode()]))

    def _input(self, lines: list[bytes]) -> bytes:
        if not self._is_program:
            return b'[{"frame":' + b'},{"frame":'.join(lines) + b"}]\n"
        state = b',"state":' + self._latest_state.encode() if self._asked.stateful else b""
        return b"".join([b'{"frame":' + line + state + b"}\n" for line in lines])

    def _next_lines(self, most: int) -> list[bytes]:
        """The next frames for this handler, at most so many; `_given` passes them."""
        store, now = self.store, self.store.clock()
        entries = store.bus.after(self._given)
        if entries is None:
            return self._stored_lines(most, now)
        lines: list[bytes] = []
        size = 0
        for entry in entries:
            if len(lines) >= most or size > INPUT_BYTES:
                break
            self._given = entry.id
            if (
                entry.is_live(now)
                and frame.matches(self._patterns, entry.topic)
                and not self._is_own(entry.line)
            ):
                line = self._dressed(entry.line, None)
                lines.append(line)
                size += len(line)
        return lines

    def _stored_lines(self, most: int, now: int) -> list[bytes]:
        store, bound = self.store, self.store.newest()
        lines: list[bytes] = []
        size = 0
        if self._asked.content:
            rows = store.index.rows(self._given, bound, self._patterns, most, now)
        else:
            page, _ = store.index.page(self._given, bound, self._patterns, most, now)
            rows = [Stored(line, None, False) for line in page.split(b"\n")[:-1]]
        for stored in rows:
            if size > INPUT_BYTES:
                break
            self._given = ids.parse(frame.id_of(stored.line))
            if not self._is_own(stored.line):
                line = self._dressed(stored.line, stored)
                lines.append(line)
                size += len(line)
        if not rows:
            self._given = bound
        return lines

    def _dressed(self, line: bytes, stored: Optional[Stored]) -> bytes:
        if not self._asked.content:
            return line
        return write(_WITH_CONTENT, self.store, line, stored)[:-1]

    def _is_own(self, line: bytes) -> bool:
        """Whether a frame was caused by a registration on this handler's own topic."""
        if b'"handler_id"' not in line:
            return False
        cause = json.loads(line)["meta"]
        if not isinstance(cause, dict):
            return False
        found = cause.get("handler_id")
        return isinstance(found, str) and self._is_own_registration(found)

    def _is_own_registration(self, id_text: str) -> bool:
        found = self._registrations.get(id_text)
        if found is None:
            # One that came with an import is in no table.
            line = None
            if ids.is_id(id_text):
                line = self.store.index.get(ids.parse(id_text), self.store.clock())
            found = line is not None and frame.topic_of(line) == f"{self.name}.register"
            if len(self._registrations) < REGISTRATIONS_CACHED:
                self._registrations[id_text] = found
        return found

    # Answers out

    def _take(self) -> None:
        """Takes what the process has answered. Raises `Failed`."""
        pipes = self.pipes
        assert pipes is not None
        for line in pipes.lines():
            said = pipes.ours(line)
            if said is None:
                continue
            if not self._ready:
                if not runner.is_start(said):
                    raise Failed(f"it said {_text(said)} before it began")
                self._on_ready()
                continue
            if not self._waiting:
                raise Failed(f"it wrote a line that no frame asked for: {_text(said)}")
            value = self._waiting[0]
            answer = self._answer(value, said)
            self._waiting.popleft()
            self._answers.append(answer)
            if answer.appends or answer.state is not None:
                self._has_effects = True
                self._latest_state = answer.state or self._latest_state
            self._since = time.monotonic()
            self.finished_frames += 1
        pipes.pause(len(self._answers) > 2 * COMMIT_FRAMES)

    def _answer(self, value: int, said: bytes) -> Answer:
        if said.strip() == b"null":
            return _NOTHING._replace(id=value)
        try:
            found = json.loads(said, parse_constant=_refuse)
            if not isinstance(found, dict) or not _ANSWER_KEYS.issuperset(found):
                raise Invalid(
                    'an answer is null or {"out": …, "state": …, "append": […]}, one line of JSON'
                )
            if found.get("error") is not None:
                raise Failed(str(found["error"]))
            if "state" in found and not self._asked.stateful:
                raise Invalid("it answered with a state, and is not registered as stateful")
            return Answer(value, self._appends(value, found), self._state_of(found))
        except Failed:
            raise
        except (ValueError, RecursionError, XsError) as error:
            detail = f"{error}" if isinstance(error, XsError) else f"not JSON: {_text(said)}"
            raise Failed(f"its answer to frame {ids.text(value)} is wrong: {detail}") from None

    def _state_of(self, found: dict[str, Any]) -> str | None:
        if "state" not in found:
            return None
        return json.dumps(found["state"], ensure_ascii=False, separators=(",", ":"))

    def _appends(self, value: int, found: dict[str, Any]) -> list[Append]:
        appended = found.get("append") or []
        out = found.get("out")
        if not isinstance(appended, list):
            raise Invalid("append is a list of records")
        appends = []
        for each in appended:
            if not isinstance(each, dict) or "topic" not in each or not set(each) <= _OUTPUT_KEYS:
                raise Invalid("each of append is a record with topic, and meta, ttl, content")
            appends.append(self._append_of(value, each))
        for each in out if isinstance(out, list) else [out]:
            if each is None:
                continue
            is_directed = (
                isinstance(each, dict)
                and ("content" in each or "content_base64" in each)
                and _OUTPUT_KEYS.issuperset(each)
            )
            appends.append(self._append_of(value, each if is_directed else {"content": each}))
        return appends

    def _append_of(self, value: int, given: dict[str, Any]) -> Append:
        """One frame that a frame causes. Raises `Invalid`."""
        topic = given.get("topic")
        if topic is None:
            topic = self.name
        if not isinstance(topic, str):
            raise Invalid(f"topic is text, not {_short(topic)}")
        if topic != self.name:
            frame.check_client_topic(topic)
        ttl = frame.parse_ttl(given.get("ttl"))
        data = _content_of(given)
        content = self.store.cas.take([data]) if data else None
        if content is not None and content.data is None and ttl == frame.EPHEMERAL:
            raise Invalid("the content is too large for an ephemeral frame")
        return Append(topic, content, self._meta(value, given.get("meta")), ttl)

    def _meta(self, value: int, given: Any) -> str:
        assert self.source is not None
        cause = f'"handler_id":"{ids.text(self.source)}","frame_id":"{ids.text(max(value, 0))}"}}'
        if not given:
            return "{" + cause
        if not isinstance(given, dict):
            raise Invalid(f"the meta of a handler's frame is a record, not {_short(given)}")
        given = {k: v for k, v in given.items() if k not in ("handler_id", "frame_id")}
        return f"{runner.json_text(given)[:-1]}{',' if given else ''}{cause}"

    # Commits

    def _commit_answers(self) -> None:
        """Commits what there is, if it is time; more gathers while a commit is under way."""
        if not self._finish_commit() or self._committing is not None or not self._answers:
            return
        if (
            self._has_effects
            or len(self._answers) >= COMMIT_FRAMES
            or time.monotonic() > self._noted + NOTE_SECONDS
        ):
            self._submit()
            self._finish_commit()

    def _submit(self) -> None:
        """Hands what was answered to the store."""
        count = min(COMMIT_FRAMES, len(self._answers))
        answers = list(islice(self._answers, count))
        appends = [append for answer in answers for append in answer.appends]
        state = self._state
        changed = next((a for a in reversed(answers) if a.state is not None), None)
        if changed is not None and changed.state is not None:
            state = changed.state
            content = self.store.cas.take([state.encode()])
            meta = self._meta(changed.id, None)
            appends.append(Append(f"{self.name}.state", content, meta, "last:1"))
        position = max(self._position, answers[-1].id)
        work = EffectsWork(appends, self._script(position, state), count)
        work.done = self._on_commit
        self._committing = work
        self._committed.clear()
        self._noted = time.monotonic()
        self.store.submit(work)

    def _on_commit(self, _: Work) -> None:
        """Called by whoever led the commit."""
        self._committed.set()
        self.wake()

    def _finish_commit(self) -> bool:
        """Looks whether the commit under way is through; False if it failed.

        Then nothing of it is stored, and the process starts anew with the first of its frames.
        """
        work = self._committing
        if work is None or not work.finished:
            return True
        self._committing = None
        if work.error is not None:
            self._restart(str(work.error), self._backoff.after(well=False))
            return False
        self._position = ids.parse(work.script.position)
        self._state = work.script.state or "null"
        for _ in range(work.frames):
            self._answers.popleft()
        self._has_effects = any(a.appends or a.state is not None for a in self._answers)
        return True

    def _flush(self) -> bool:
        """Commits all that was answered, and waits for it; False if that failed."""
        while self._answers:
            if self._committing is None:
                self._submit()
            self._committed.wait()
            if not self._finish_commit():
                return False
        return True

    def _script(
        self, position: Optional[int] = None, state: Optional[str] = None, *, active: bool = True
    ) -> Script:
        assert self.source is not None
        return Script(
            self.kind,
            self.name,
            ids.text(self.source),
            active,
            ids.text(max(self._position if position is None else position, 0)),
            self._state if state is None else state,
        )


_NOTHING = Answer(0, [], None)
_WITH_CONTENT = Form(content=True)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _content_of(given: dict[str, Any]) -> bytes:
    encoded = given.get("content_base64")
    if encoded is not None:
        if not isinstance(encoded, str) or given.get("content") is not None:
            raise Invalid("content_base64 is text in base64, and goes without content")
        try:
            return binascii.a2b_base64(encoded)
        except ValueError:
            raise Invalid("content_base64 is not base64") from None
    content = given.get("content")
    if content is None:
        return b""
    if isinstance(content, str):
        return content.encode()  # a lone surrogate is a ValueError: not JSON, to us
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _text(said: bytes) -> str:
    return repr(said[:80].decode("utf-8", "replace"))
