"""Many frames appended in one go: what is the same for all is done once (bench/batch.py)."""

from __future__ import annotations

from itertools import groupby

from xs import fault, frame
from xs.commit import CHUNK, Append
from xs.content import discard, small
from xs.errors import Lost, XsError
from xs.frame import Entry, entries_of
from xs.records import NamedTuple
from xs.schema import is_of_sqlite
from xs.work import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Union

    from xs.commit import Commit

ALIKE_MIN = 64  # frames: fewer are as quick one by one
RUN_FRAMES = 4096  # frames that get consecutive ids in one go
_PLAIN = ("forever", None, None)  # the ttl, condition and key of a plain append


class Alike(NamedTuple):
    """Frames to be appended one after the other that differ in their content alone.

    That is small and not empty; they are kept for ever, and no key or condition is given.
    """

    topic: str
    meta: str
    contents: list[bytes]
    digests: list[bytes]
    hashes: list[str]

    def each(self) -> list[Append]:
        """The same, one by one."""
        return [Append(self.topic, small(data), self.meta) for data in self.contents]


def is_plain(append: Append) -> bool:
    """Whether it has no condition, key or file, is kept for ever, and looks like no piece."""
    return (
        append[3:] == _PLAIN
        and CHUNK not in append.meta
        and (append.content is None or append.content.data is not None)
    )


def alike(append: Append, contents: list[bytes]) -> Alike:
    """As many frames as there are `contents`, each with one of them, and otherwise as `append`."""
    from hashlib import sha256  # here: one append is hashed by what loads faster

    digests = [sha256(data).digest() for data in contents]
    return Alike(append.topic, append.meta, contents, digests, [*map(frame.integrity, digests)])


def _as_alike(appends: list[Append]) -> Alike | None:
    """The same plain appends, if they are many and differ in their content alone."""
    topic, _, meta = appends[0][:3]
    contents: list[bytes] = []
    digests: list[bytes] = []
    if len(appends) < ALIKE_MIN:
        return None
    for append in appends:
        content = append.content
        if append.topic != topic or append.meta != meta or content is None or not content.data:
            return None
        contents.append(content.data)
        digests.append(content.digest)
    return Alike(topic, meta, contents, digests, [*map(frame.integrity, digests)])


class BatchWork(Work):
    """Appends several frames; the result is a list of lines and errors, one for each frame.

    With `atomic` the first error undoes all of them, and is raised as it is.

    A line among `appends` is of a frame that a server has appended before it ended (`forward`).
    """

    __slots__ = ("appends", "atomic")

    def __init__(
        self, appends: Sequence[Union[Append, Alike, bytes, XsError]], *, atomic: bool = False
    ) -> None:
        super().__init__()
        self.appends = appends
        self.atomic = atomic

    def apply(self, commit: Commit) -> list[Union[bytes, XsError]]:
        results: list[Union[bytes, XsError]] = []
        if self.atomic:
            commit.start_part()
            fault.at("batch.part-begun")
        for is_plain, run in groupby(self.appends, lambda append: _goes_along(commit, append)):
            if is_plain:
                results += append_run(commit, list(run))  # type: ignore[arg-type]
                fault.at("batch.run-added")
                continue
            for append in run:
                try:
                    if isinstance(append, XsError):
                        raise append
                    if isinstance(append, bytes):
                        results.append(append)
                        continue
                    if isinstance(append, Alike):
                        results += append_alike(commit, append)
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

    def each(self) -> list[Union[Append, bytes, XsError]]:
        """What is to be appended, one by one."""
        found: list[Union[Append, bytes, XsError]] = []
        for append in self.appends:
            found += append.each() if isinstance(append, Alike) else [append]
        return found

    def discard(self) -> None:
        for append in self.appends:
            if isinstance(append, Append):
                discard(append.content)

    def finish(self) -> None:
        error = self.error
        if error is not None and any(isinstance(each, (bytes, Lost)) for each in self.appends):
            # What a server has answered, or may have stored, stays so: the error is of the others.
            self.result = [error if isinstance(each, Append) else each for each in self.each()]
            self.error = None
        super().finish()


def _goes_along(commit: Commit, append: Union[Append, Alike, bytes, XsError]) -> bool:
    """Whether `append_run` can take it."""
    return isinstance(append, Append) and is_plain(append) and append.topic not in commit.trims


def append_run(commit: Commit, appends: list[Append]) -> list[bytes]:
    """Adds plain frames, as `append` would one by one, and answers their lines."""
    same = _as_alike(appends)
    if same is not None:
        return append_alike(commit, same)
    lines: list[bytes] = []
    for start in range(0, len(appends), RUN_FRAMES):
        part = appends[start : start + RUN_FRAMES]
        row, values, texts = _places(commit, len(part))
        frames = []
        for value, id_text, (topic, content, meta, ttl, _, _) in zip(values, texts, part):
            hash_ = data = digest = None
            if content is not None:
                digest, data = content.digest, content.data
                hash_ = frame.integrity(digest)
            json = frame.encode(topic, id_text, hash_, meta, ttl)
            line = json.encode()
            lines.append(line)
            commit.entries.append(Entry(value, topic, line))
            frames.append((value, topic, json, line, None, digest, data))
        commit.writer.append_run(row, frames)
        commit.mark = None if commit.mark is None else values[-1]
    return lines


def append_alike(commit: Commit, alike: Alike) -> list[bytes]:
    """Adds frames, as `append` would one by one, and answers their lines."""
    topic, meta, contents, digests, hashes = alike
    if topic in commit.trims:
        commit.trim(topic, commit.trims.pop(topic))
    lines: list[bytes] = []
    for start in range(0, len(contents), RUN_FRAMES):
        part = slice(start, start + RUN_FRAMES)
        row, values, texts = _places(commit, len(contents[part]))
        added = [json.encode() for json in frame.encode_alike(topic, texts, hashes[part], meta)]
        commit.writer.append_alike(row, topic, added, digests[part], contents[part])
        commit.entries += entries_of(topic, values, added)
        lines += added
        commit.mark = None if commit.mark is None else values[-1]
    return lines


def _places(commit: Commit, count: int) -> tuple[int, list[int], list[str]]:
    """The first row, and the ids, of so many frames that are appended together."""
    while True:
        values, texts = commit.ids.run(count, commit.now)
        row = commit.writer.room(values[0] >> 80, count)
        if row is not None:
            return row, values, texts
        commit.ids.skip_millisecond()
