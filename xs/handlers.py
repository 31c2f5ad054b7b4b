"""Handlers: a closure, or a program, that is given each frame and answers with what it causes.

The way of a frame through a handler:

1. it is read from the stream behind the last one, and written to the process, which may be many
   frames behind: none waits for the answer to another;
2. the process answers each frame in turn, with what that is to cause (docs/scripts.md);
3. what has been answered meanwhile is committed together: output, what was appended, the new state,
   and the handler's position, the id of the last frame that was answered, in one transaction.

So after a kill at any moment the handler goes on with the first frame whose effects are not stored.
A frame that failed has none: what the frames before it caused is committed, then that the handler
is out of service.

A registration has the frames between itself and the frame that takes it out: the same order for
all, that of the stream. So the handler finds those orders in the stream itself too, and gives its
process nothing that lies behind one.
"""

from __future__ import annotations

import collections
import functools
import threading
import time
from itertools import islice

from xs import fault, frame, ids, nu, runner
from xs.commit import Append
from xs.effects import Answer, Answers, EffectsWork, Piece, discard, excerpt
from xs.errors import Damaged, Failed, Invalid, NoNushell, Unavailable, XsError
from xs.intake import INPUT_FRAMES, NEVER, CantBeGiven, Intake
from xs.log import WARNING
from xs.meta import as_meta
from xs.process import NOT_RUN, Command
from xs.reader import PULSE
from xs.records import NamedTuple
from xs.runner import Backoff, Context, Runner
from xs.schema import Script
from xs.work import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Optional, Union

AHEAD_FRAMES = 1000  # frames that a process may have been given and not have answered
REST_SECONDS = 0.001  # between two looks at what it has answered, while it has many frames …
FEW_ANSWERS = 100  # … and fewer answers than this come in that time
COMMIT_FRAMES = 1000  # answers in one transaction
COMMIT_APPENDS = 4000  # … and the frames in them, unless one answer has more
NOTE_SECONDS = 1.0  # after which a position is stored though nothing was caused
FINISH_SECONDS = 1.0  # for the frames before the one that takes a handler out of service
FULL_BYTES = 16_384  # at once from a process: it may have waited for room in its pipe
DEATHS_MAX = 5  # of the process by signals, all on one frame: then it has failed
ERROR_CHARACTERS = 8192  # of an error, in the frame that tells of it


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
            raise Invalid(f"{key} is true or false, not {runner.short(value)}")
    topic = meta.get("topic", "*")
    if not isinstance(topic, str):
        raise Invalid(f"topic is a pattern such as notes or chat.*, not {runner.short(topic)}")
    return Registration(
        flags["stateful"],
        as_meta(meta.get("initial_state")),
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
    raise Invalid(f"run-from is start, tail or the id to start after, not {runner.short(value)}")


def _seconds(meta: dict[str, Any], key: str, least: int) -> float | None:
    value = meta.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 10**12:
        raise Invalid(
            f"{key} is a number of milliseconds, at least {least}: not {runner.short(value)}"
        )
    return value / 1000


class Handler(Runner):
    """The handler of one topic."""

    kind = "handler"
    meta_keys = ("stateful", "content", "topic", "initial_state", "run-from", "pulse", "timeout")

    def __init__(self, context: Context, name: str) -> None:
        super().__init__(context, name)
        self._asked: Registration
        self._find_command: Callable[[], Command]
        self._reads: Answers
        self._is_program = False
        self._registered = False
        self._has_answered = False  # now, or before this server
        self._position = -1  # the last frame whose effects are stored
        self._state = "null"  # as stored
        self._intake = Intake(self.store, name, self.submit)
        self._until_at: float | None = None  # then it is carried out, whatever is not finished
        self._backoff = Backoff()
        self._deaths = 0
        self._died_at = ""
        self._suspects_until = ""  # answers up to that frame's are committed one by one
        self._answers: collections.deque[Answer] = collections.deque()  # not committed
        self._forget_process()
        self._watch = self.store.bus.watch(self._intake.wants, self.wake)

    def _forget_process(self) -> None:
        """Nothing is under way: what was given and is not stored is to be given again."""
        self._intake.go_back(self._position)
        self._ready = False
        self._has_begun = False  # the process has said something to us
        self._waiting: collections.deque[str] = collections.deque()  # ids given, not answered
        for answer in self._answers:
            discard(answer.effects)
        self._answers.clear()
        self._effects_waiting = 0  # in the answers
        self._has_effects = False  # … with something to be seen among them
        self._came = 0  # answers, when they were last taken
        self._latest_state = self._state
        self._committing: EffectsWork | None = None
        self._committed = threading.Event()  # no commit is under way
        self._committed.set()
        self._since = time.monotonic()  # the last answer, or what was given to an idle process
        self._noted = time.monotonic()  # the last commit
        self._restart_at = 0.0
        self._pulse_at = 0.0

    @classmethod
    def refusal(cls, name: str, source: int, reason: str) -> Append:
        told = {"handler_id": ids.text(source), "frame_id": ids.text(source), "error": reason}
        return Append(f"{name}.unregistered", meta=as_meta(told))

    # Orders

    def put(self, source: int) -> None:
        if source <= self._intake.heard:
            return  # it was found in the stream before
        self._intake.until = NEVER
        if self.is_stored(source):
            self._take_out(source)
            self._put(source)
        self._intake.heard = source

    def _put(self, source: int) -> None:
        kept = self.kept(source)
        if kept is not None and not kept.active:
            return  # it has failed, or was taken out: a new start of the server changes nothing
        self.source = source
        self.finished_frames = 0
        self._intake.note(source)
        self._intake.until = NEVER
        self._position, self._state = source, "null"
        if kept is not None:
            self._position, self._state = ids.parse(kept.position), kept.state or "null"
        self._has_answered = kept is not None
        self._registered = False
        self._backoff = Backoff()
        self._died_at = ""
        self._suspects_until = ""
        self._forget_process()
        try:
            found, text = self.read_source(source)
            self._asked = asked = parse_registration(source, found.meta)
            if kept is None:
                self._position, self._state = asked.start, asked.state
            self._is_program = text.startswith(b"#!")
            in_nushell = functools.partial(nu.handler, stateful=asked.stateful)
            self._find_command = functools.partial(runner.command_of, text, in_nushell)
        except Unavailable:
            self.source = None  # it says nothing about the script: the order is carried out later
            raise
        except XsError as error:
            self._fail(str(error))
            return
        try:
            self._find_command()
        except (Invalid, NoNushell) as error:
            # What ran it before, and is missing now, is no fault of the script, nor is a missing
            # Nushell: the next start tries again.
            self._fail(str(error), for_good=kept is None and not isinstance(error, NoNushell))
            return
        self._reads = Answers(self.store.cas, self.name, ids.text(source), stateful=asked.stateful)
        self._intake.begin(asked.patterns, content=asked.content)
        self._forget_process()

    def take_out(self, frame_id: int) -> None:
        if frame_id > self._intake.heard:
            self._take_out(frame_id)
            self._intake.heard = frame_id

    def _take_out(self, frame_id: int) -> None:
        if self.source is None:
            self._end_waiting(frame_id)
        if self.source is not None:
            self._finish_before(frame_id)
        if self.source is not None:
            self._flush()
        if self.source is not None:  # it has not failed just now
            self._leave_service(ids.text(frame_id))

    def _end_waiting(self, frame_id: int) -> None:
        """Takes out who is not in service, but was, or would be at the server's next start."""
        for script in self.store.index.scripts(self.kind, self.name):
            if script.active and ids.parse(script.source) < frame_id:
                told = self._unregistered(script, ids.text(frame_id), {})
                self.persist(EffectsWork([told], script._replace(active=False)))

    def _finish_before(self, frame_id: int) -> None:
        """Lets it finish the frames before the one that takes it out: if it runs, and is quick."""
        self._intake.end_before(frame_id)
        self._until_at = deadline = time.monotonic() + FINISH_SECONDS
        try:
            while (
                self.source is not None
                and self.pipes is not None
                and not self._has_finished
                and time.monotonic() < deadline
                and not self.is_stopping
            ):
                self.step()
        finally:
            self._until_at = None

    @property
    def _has_finished(self) -> bool:
        """Whether it has answered all frames before the one that takes it out."""
        if not self._ready or self._waiting:
            return False
        return self._intake.has_given(self._intake.until - 1)

    def _fail(self, error: str, *, cause: Optional[str] = None, for_good: bool = True) -> None:
        # It may be anything that a script says: text that JSON can't have, and of any length.
        error = error.encode("utf-8", "replace").decode()[:ERROR_CHARACTERS]
        self.last_error = error
        self.log(f"out of service: {error}", WARNING)
        assert self.source is not None
        if cause is None:
            cause = self._waiting[0] if self._waiting else ids.text(self.source)
        self._leave_service(cause, error, for_good=for_good)

    def _leave_service(
        self, cause: str, error: Optional[str] = None, *, for_good: bool = True
    ) -> None:
        more = {} if error is None else {"error": error}
        tail = self.end_process()
        if tail and tail != error:
            more["stderr"] = tail
        script = self._script(active=not for_good)
        unregistered = self._unregistered(script, cause, more)
        reason = f"its handler is out of service{'' if error is None else f': {error}'}"
        self.persist(EffectsWork([unregistered], script, reason=reason))
        self.source = None
        self._intake.end()

    def _unregistered(self, script: Script, cause: str, more: dict[str, str]) -> Append:
        told = {"handler_id": script.source, "frame_id": cause}
        told = {**told, "position": script.position, **more}
        return Append(f"{self.name}.unregistered", meta=as_meta(told))

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
            self._rest()
            self.select(self._timeout(now))
            self._take()
            self._check_time()
            if self._answers:
                self._give()  # so that the process goes on while those are committed
        except Failed as error:
            if self._flush():
                self._fail(str(error))
            return
        except (OSError, XsError) as error:  # the disk is full, or can't be read
            if self._settle():
                self._restart(str(error), self._backoff.after(well=False))
            return
        self._commit_answers()
        if self.pipes is not None and self.pipes.status is not None:
            self._on_end(self.pipes.status)

    def _start_process(self) -> None:
        if not self._settle():
            return
        self._forget_process()
        try:
            pipes = self.start_process(self._find_command())
        except Failed as error:  # for want of files, processes, room: it is no fault of the script
            self._restart(str(error), self._backoff.after(well=False))
            return
        except (Invalid, NoNushell) as error:
            self._on_missing(str(error))
            return
        if self._is_program:
            self._on_ready()
        elif self._asked.stateful:
            pipes.send(b'{"state":' + self._state.encode() + b"}\n")

    def _on_ready(self) -> None:
        assert self.source is not None
        self._ready = True
        self._since = time.monotonic()
        if not self._registered:
            source = ids.text(self.source)
            meta = as_meta({"handler_id": source, "frame_id": source})
            registered = Append(f"{self.name}.registered", meta=meta)
            self.persist(EffectsWork([registered], self._script()))
            self._registered = True

    def _on_end(self, status: int) -> None:
        """The process has ended, which it never should."""
        assert self.pipes is not None
        if not self._flush():
            return
        # A program that has never answered may well end like this by itself.
        may_be_missing = self._has_answered or not self._is_program
        if status in NOT_RUN and may_be_missing and not self._has_begun:
            self._on_missing(self.pipes.tail or f"its process ended with status {status}")
            return
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        given = self._waiting[0] if self._waiting else ""
        error = f"its process {how}" + (f" while it had frame {given}" if given else "")
        place = given or ("idle" if self._ready else "start")
        if place != self._died_at:
            self._died_at, self._deaths = place, 0
        self._deaths += 1
        if not self._ready and status >= 0:
            self._fail(self.pipes.tail or error)
        elif status >= 0 or (self._deaths >= DEATHS_MAX and place != "idle"):
            self._fail(error)
        else:
            # Who killed it may have meant it once: the first time it comes back at once.
            self._restart(error, 0.0 if self._deaths == 1 else self._backoff.after(well=False))

    def _on_missing(self, error: str) -> None:
        """What runs it is not there, or can't be run: it may be in the midst of an upgrade."""
        if self._registered:
            self._restart(error, self._backoff.after(well=False))
        else:  # its owner waits for a word; the server's next start tries again
            self._fail(error, for_good=False)

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
        if self._until_at is not None:
            # What is still to be given may be nothing, as it turned out just now: no wait for that.
            times.append(now if self._has_finished else self._until_at)
        return max(0.0, min(times) - now) if times else None

    def _rest(self) -> None:
        """Lets answers gather while the process has enough to do, if it is slower than we are.

        Woken for each of them, this thread took from the process what it needs itself.
        """
        if len(self._waiting) > AHEAD_FRAMES - INPUT_FRAMES and self._came < FEW_ANSWERS:
            time.sleep(REST_SECONDS)

    def _check_time(self) -> None:
        if not self._ready and time.monotonic() - self._since > runner.START_SECONDS:
            raise Failed(f"it did not start within {runner.START_SECONDS:.0f} s")
        if self._is_late:
            self.select(0.0)  # a server that stood still for so long has not looked
            self._take()
        if self._is_late:
            assert self.pipes is not None and self._asked.timeout is not None
            self.pipes.kill()
            most = f"{self._asked.timeout * 1000:.0f} ms"
            raise Failed(f"it took longer than its timeout of {most} for {self._waiting[0]}")

    @property
    def _is_late(self) -> bool:
        """Whether the frame that it has takes longer than it may."""
        timeout = self._asked.timeout
        if timeout is None or not (self._ready and self._waiting):
            return False
        return time.monotonic() - self._since > timeout

    # Frames in

    @property
    def _is_one_by_one(self) -> bool:
        """Whether the next frame has to wait for the last one's answer: the state goes with it."""
        return self._is_program and self._asked.stateful

    def _give(self) -> None:
        """Gives the process what comes next, as much as it may be ahead."""
        pipes = self.pipes
        assert pipes is not None
        # Many at a time: it is refilled when there is room for as many again.
        left = 0 if self._is_one_by_one else AHEAD_FRAMES - INPUT_FRAMES
        while self._ready and not pipes.has_unsent:
            if len(self._waiting) > left or len(self._answers) > COMMIT_FRAMES:
                return
            lines = self._next_lines()
            if lines is None:
                self._give_pulse()
                return
            if not lines:
                continue
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting.extend(map(frame.id_of, lines))
            pipes.send(self._input(lines))

    def _give_pulse(self) -> None:
        """A heartbeat, for a handler that asked for one and has nothing else to do."""
        now = time.monotonic()
        if self._asked.pulse is None or self._waiting or now < self._pulse_at:
            return
        if self._intake.until != NEVER:
            return
        first, self._pulse_at = self._pulse_at == 0, now + self._asked.pulse
        if first or self.pipes is None:
            return
        self._since = now
        position = ids.text(max(self._intake.position, 0))
        self._waiting.append(position)
        line = frame.encode(PULSE, position, None, "null", frame.EPHEMERAL)
        self.pipes.send(self._input([line.encode()]))

    def _input(self, lines: list[bytes]) -> bytes:
        state = b""
        if self._is_one_by_one:
            state = b',"state":' + self._latest_state.encode()
        return b"".join([b'{"frame":' + line + state + b"}\n" for line in lines])

    def _next_lines(self) -> list[bytes] | None:
        """As `Intake.next`; None, too, while what precedes a damaged frame is under way."""
        try:
            return self._intake.next_one() if self._is_one_by_one else self._intake.next()
        except CantBeGiven as error:
            if not self._waiting:
                self._waiting.append(error.id)
                raise
        except Damaged:
            if not (self._waiting or self._answers or self._committing is not None):
                raise
        return None

    # Answers out

    def _take(self) -> None:
        """Takes what the process has answered. Raises `Failed`."""
        pipes = self.pipes
        assert pipes is not None
        before = self.finished_frames
        for line in pipes.lines():
            said = pipes.ours(line)
            if said is None:
                continue
            self._has_begun = True
            if not self._ready:
                if not runner.is_start(said):
                    raise Failed(f"it said {excerpt(said)} before it began")
                self._on_ready()
                continue
            if not self._waiting:
                raise Failed(f"it wrote a line that no frame asked for: {excerpt(said)}")
            answer = self._reads.read(self._waiting[0], said)
            self._waiting.popleft()
            self._answers.append(answer)
            self._has_answered = True
            self._effects_waiting += len(answer.effects)
            if answer.effects or answer.state is not None:
                self._has_effects = True
                self._latest_state = answer.state or self._latest_state
            self._since = time.monotonic()
            self._died_at = ""
            self.finished_frames += 1
        self._came = self.finished_frames - before
        if pipes.received >= FULL_BYTES:
            self._since = time.monotonic()  # of a long answer: it waited for us
        self._hold_back()

    def _hold_back(self) -> None:
        """Leaves its output in its pipe while there is more of it than two commits take."""
        is_ahead = len(self._answers) > 2 * COMMIT_FRAMES
        is_ahead = is_ahead or self._effects_waiting > 2 * COMMIT_APPENDS
        if self.pipes is not None:
            if is_ahead or self.pipes.is_paused:
                self._since = time.monotonic()  # it waits for us, or has
            self.pipes.pause(is_ahead)

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
        answers: list[Answer] = []
        effects: list[Union[Append, Piece]] = []
        most = 1 if self._answers[0].id <= self._suspects_until else COMMIT_FRAMES
        for answer in islice(self._answers, most):
            if answers and len(effects) + len(answer.effects) > COMMIT_APPENDS:
                break
            answers.append(answer)
            effects += answer.effects
        state = self._state
        changed = next((a for a in reversed(answers) if a.state is not None), None)
        if changed is not None and changed.state is not None:
            state = changed.state
            effects.append(self._reads.of_state(changed.id, state))
        position = max(ids.text(max(self._position, 0)), answers[-1].id)
        work = EffectsWork(effects, self._script(position, state), len(answers))
        work.done = self._on_commit
        self._committing = work
        self._committed.clear()
        self._noted = time.monotonic()
        try:
            if self._is_one_by_one and self._waiting:
                self.store.start(work)  # led here, it would keep the process waiting
            else:
                self.store.submit(work)
        except XsError:  # it is closing: nobody will do it
            self._committing = None
            self._committed.set()
            raise

    def _on_commit(self, _: Work) -> None:
        """Called by whoever led the commit."""
        self._committed.set()
        self.wake()

    def _finish_commit(self) -> bool:
        """Looks whether the commit under way is through; False if it failed.

        Then nothing of it is stored, and the process starts anew with the first of its frames; or
        the handler has failed, for what it asks of the store is wrong.
        """
        work = self._committing
        if work is None or not work.finished:
            return True
        self._committing = None
        if isinstance(work.error, Invalid):
            self._on_refused(work.error, work.frames)
            return False
        if work.error is not None:
            self._restart(str(work.error), self._backoff.after(well=False))
            return False
        fault.at("handler.committed")
        self._position = ids.parse(work.script.position)
        self._state = work.script.state or "null"
        self._backoff = Backoff()
        for _ in range(work.frames):
            self._effects_waiting -= len(self._answers.popleft().effects)
        self._has_effects = any(a.effects or a.state is not None for a in self._answers)
        self._hold_back()  # here: whoever waits for room has it now, and nothing else wakes us
        return True

    def _on_refused(self, error: Invalid, frames: int) -> None:
        """The store refuses what one of the answers in a commit asks for: that one is wrong.

        Of many, it shows which one when each is committed by itself.
        """
        wrong = self._answers[frames - 1].id
        if frames > 1:
            self._suspects_until = wrong
            self._restart(str(error), 0.0)
            return
        self._fail(f"its answer to frame {wrong} is refused: {error}", cause=wrong)
        self._forget_process()

    def _settle(self) -> bool:
        """Waits for the commit under way, if there is one; False if it failed."""
        if self._committing is not None:
            self._committed.wait()
        return self._finish_commit()

    def _flush(self) -> bool:
        """Commits all that was answered, and waits for it; False if that failed."""
        while self._answers:
            if self._committing is None:
                self._submit()
            if not self._settle():
                return False
        return True

    def _script(
        self, position: Optional[str] = None, state: Optional[str] = None, *, active: bool = True
    ) -> Script:
        assert self.source is not None
        return Script(
            self.kind,
            self.name,
            ids.text(self.source),
            active,
            ids.text(max(self._position, 0)) if position is None else position,
            self._state if state is None else state,
        )
