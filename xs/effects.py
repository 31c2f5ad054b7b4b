"""What a handler's answers cause: read from their lines, and committed in one transaction.

An answer causes frames, pieces of chunked contents, and a new state; an `EffectsWork` stores what
some answers cause together with how far their handler is, all of it or nothing. docs/scripts.md has
the form of an answer. This module knows no processes, nor which frames a handler is given.

A chunked content that a handler writes is tied to its registration, not to a process: its writer
is a name (`_writer`) that `runs` takes for living as long as nobody ends it. So it goes on after a
kill where its last stored piece ends, exactly as the state does, and it is broken off when the
handler leaves service.
"""

from __future__ import annotations

import json
from itertools import groupby

from xs import fault, frame, ids, runner
from xs.bulk import BatchWork
from xs.commit import Append, Commit
from xs.content import INLINE_MAX, Content, small
from xs.errors import Failed, Full, Invalid, Unavailable, XsError
from xs.meta import as_meta, refuse_constant
from xs.records import NamedTuple
from xs.runs import SCRIPT_WRITER, first_of, pieces
from xs.runsteps import begin_run, end_run, end_runs, extend_run, run_written_by
from xs.schema import Script
from xs.work import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional, Union

    from xs.cas import Cas

ANSWER_LEVELS = 500  # to which arrays and objects may be nested in an answer

_FRAME_KEYS = frozenset({"topic", "meta", "ttl", "content", "content_base64"})
_OUTPUT_KEYS = _FRAME_KEYS | {"more"}
_ANSWER_KEYS = frozenset({"state", "out", "append", "error"})


class Piece(NamedTuple):
    """The next piece of the content that a handler writes on a topic; the last one without `more`.

    `begin` is the first frame, should this piece begin the content; `cause` what the others have in
    their meta.
    """

    begin: Append
    contents: list[Content]
    cause: str
    more: bool


class Answer(NamedTuple):
    """What one frame is to cause, and the new state as JSON (None: as it was).

    Ids of frames under way are text, as the frames have them: text sorts as numbers do, and making
    one of the other, twice a frame, was a sixth of what a handler costs (bench/scripts.py).
    """

    id: str
    effects: list[Union[Append, Piece]]
    state: Optional[str]


class EffectsWork(Work):
    """Commits what some frames have caused, and how far their handler is by that.

    If by that it is out of service, what it was still writing is broken off, for `reason`.
    """

    __slots__ = ("effects", "frames", "reason", "script")

    is_whole = True  # all of it with the position, or nothing: or it would be done twice

    def __init__(
        self,
        effects: list[Union[Append, Piece]],
        script: Script,
        frames: int = 0,
        reason: str = "its handler was taken out of service",
    ) -> None:
        super().__init__()
        self.effects = effects
        self.script = script
        self.frames = frames
        self.reason = reason

    def apply(self, commit: Commit) -> None:
        for kind, some in groupby(self.effects, type):
            if kind is Piece:
                for piece in some:
                    self._add(commit, piece)  # type: ignore[arg-type]
                continue
            for result in BatchWork([*some]).apply(commit):  # type: ignore[list-item]
                if isinstance(result, XsError):
                    raise result
        if not self.script.active:
            mine = _writer(self.script.source, "")
            end_runs(commit, lambda writer: writer.startswith(mine), self.reason)
        fault.at("handler.effects-added")
        commit.writer.keep_script(self.script)
        fault.at("handler.position-kept")

    def _add(self, commit: Commit, piece: Piece) -> None:
        writer = _writer(self.script.source, piece.begin.topic)
        contents = piece.contents
        first = run_written_by(commit, writer)
        if first is None:
            begin = piece.begin._replace(content=contents[0] if contents else None)
            line, _ = begin_run(commit, begin, writer)
            first, contents = ids.parse(frame.id_of(line)), contents[1:]
        if piece.more:
            extend_run(commit, first, writer, contents, piece.cause)
            return
        extend_run(commit, first, writer, contents[:-1], piece.cause)
        end_run(commit, first, writer, contents[-1] if contents else None, cause=piece.cause)

    def discard(self) -> None:
        discard(self.effects)


def discard(effects: list[Union[Append, Piece]]) -> None:
    """Forgets what was taken in for effects that will not be stored."""
    BatchWork([each for each in effects if isinstance(each, Append)]).discard()


def _writer(source: str, topic: str) -> str:
    return f"{SCRIPT_WRITER}{source}.{topic}"


class Answers:
    """Reads the answers to one registration, whose handler has the topic `name`."""

    def __init__(self, cas: Cas, name: str, source: str, *, stateful: bool) -> None:
        self._cas = cas
        self._name = name
        self._source = source
        self._stateful = stateful

    def read(self, frame_id: str, said: bytes) -> Answer:
        """What a frame is to cause, by its line. Raises `Failed`, `Full`, `Unavailable`."""
        if said.strip() == b"null":
            return Answer(frame_id, [], None)
        try:
            runner.check_levels(said, ANSWER_LEVELS)
            found = _DECODER.decode(said.decode())
            if not isinstance(found, dict) or not _ANSWER_KEYS.issuperset(found):
                raise Invalid(
                    'an answer is null or {"out": …, "state": …, "append": […]}, one line of JSON'
                )
            if found.get("error") is not None:
                raise Failed(str(found["error"]))
            if "state" in found and not self._stateful:
                raise Invalid("it answered with a state, and is not registered as stateful")
            state = _json(found["state"]) if "state" in found else None
            return Answer(frame_id, self._effects(frame_id, found), state)
        except (Failed, Full, Unavailable):  # of the last two the script knows nothing
            raise
        except (ValueError, RecursionError, XsError) as error:
            detail = f"{error}" if isinstance(error, XsError) else f"not JSON: {excerpt(said)}"
            raise Failed(f"its answer to frame {frame_id} is wrong: {detail}") from None

    def of_state(self, frame_id: str, state: str) -> Append:
        """The frame that tells of a new state."""
        content = self._cas.take_whole(state.encode())
        return Append(f"{self._name}.state", content, self._meta(frame_id, None), "last:1")

    def _effects(self, frame_id: str, found: dict[str, Any]) -> list[Union[Append, Piece]]:
        appended = found.get("append") or []
        out = found.get("out")
        if not isinstance(appended, list):
            raise Invalid("append is a list of records")
        effects: list[Union[Append, Piece]] = []
        try:
            for each in appended:
                if not isinstance(each, dict) or not {"topic"} <= set(each) <= _FRAME_KEYS:
                    raise Invalid("each of append is a record with topic, and meta, ttl, content")
                effects.append(self._directed(frame_id, each))
            for each in out if isinstance(out, list) else [out]:
                if each is None:
                    continue
                is_directed = (
                    isinstance(each, dict)
                    and ("content" in each or "content_base64" in each)
                    and _OUTPUT_KEYS.issuperset(each)
                )
                if is_directed:
                    effects.append(self._directed(frame_id, each))
                else:  # the most of what comes here needs no more
                    content = self._cas.take_whole(_bytes_of(each))
                    effects.append(Append(self._name, content, self._meta(frame_id, None)))
        except BaseException:
            discard(effects)
            raise
        return effects

    def _directed(self, frame_id: str, given: dict[str, Any]) -> Union[Append, Piece]:
        """What a record causes that says where it goes, and how. Raises `Invalid`."""
        topic = given.get("topic")
        if topic is None:
            topic = self._name
        if not isinstance(topic, str):
            raise Invalid(f"topic is text, not {runner.short(topic)}")
        if topic != self._name:
            frame.check_client_topic(topic)
        ttl = frame.parse_ttl(given.get("ttl"))
        meta = self._meta(frame_id, given.get("meta"))
        data = _content_of(given)
        more = given.get("more")
        if more is not None:
            if not isinstance(more, bool):
                raise Invalid(f"more is true or false, not {runner.short(more)}")
            begin = first_of(Append(topic, None, meta, ttl))
            return Piece(begin, [small(each) for each in pieces(data)], self._cause(frame_id), more)
        if len(data) > INLINE_MAX and ttl == frame.EPHEMERAL:
            raise Invalid("the content is too large for an ephemeral frame")
        # Last, and of what is right: large content is a file by then.
        return Append(topic, self._cas.take_whole(data), meta, ttl)

    def _cause(self, frame_id: str) -> str:
        return f'"handler_id":"{self._source}","frame_id":"{frame_id}"'

    def _meta(self, frame_id: str, given: Any) -> str:
        if not given:
            return f"{{{self._cause(frame_id)}}}"
        if not isinstance(given, dict):
            raise Invalid(f"the meta of a handler's frame is a record, not {runner.short(given)}")
        given = {k: v for k, v in given.items() if k not in ("handler_id", "frame_id")}
        comma = "," if given else ""
        return f"{as_meta(given)[:-1]}{comma}{self._cause(frame_id)}}}"


def excerpt(said: bytes) -> str:
    """The beginning of what a process said, for a sentence about it."""
    return repr(said[:80].decode("utf-8", "replace"))


_DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def _content_of(given: dict[str, Any]) -> bytes:
    encoded = given.get("content_base64")
    if encoded is not None:
        if given.get("content") is not None:
            raise Invalid("content_base64 goes without content")
        return frame.parse_base64(encoded)
    content = given.get("content")
    return b"" if content is None else _bytes_of(content)


def _bytes_of(value: Any) -> bytes:
    """What a value is as content: a text's bytes, or JSON. Raises `ValueError`."""
    # A lone surrogate is a ValueError: not JSON, to us.
    return value.encode() if isinstance(value, str) else _json(value).encode()


def _json(value: Any) -> str:
    """A value that came as JSON, as JSON. Raises `ValueError` for what only looks like it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text.encode()  # a lone surrogate is none
    return text
