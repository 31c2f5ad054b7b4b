"""`xs check --repair`: what is whole of a damaged store is saved, what is not is put aside.

Nothing is deleted. A folder `aside-TIME` in the store gets the database as it was, content files
whose bytes are not what they should be, and `frames.jsonl`: the frames that have lost their
content, or don't read as they were written. Each of these is said in a line. What is whole goes, by
the way of an import, into a new database, which takes the place of the old one.

Of a write-ahead log that is damaged SQLite would read what is before the damage. So the database is
read from two other folders, with a log in each that SQLite reads to its end: in one the damaged
pages alone are missing; the other ends before them, and is asked for what was on these.

The order, each step needed by the next: the new database is made, and gets the name `xs.db.new` →
the old one goes aside → its log does, if somebody had it open → the new one takes its name. What
breaks off in between is finished, or done again, by the next repair; until then there is no store
to be mistaken for a whole one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator

from xs import fault, frame, ids, wal
from xs.address import is_host, no_store
from xs.batch import parse_imported
from xs.cas import Cas
from xs.commit import Commit
from xs.connections import has_index
from xs.content import INLINE_MAX, small
from xs.creation import check_folder
from xs.disk import sync, sync_folder
from xs.errors import Damaged, DiskError, Invalid, Locked, NotAStore, XsError
from xs.imports import Imported, ImportWork
from xs.lock import WRITE, Lock, Served
from xs.pieces import find_run, run_made_of
from xs.place import check_length, check_writable
from xs.rows import is_pin, is_script
from xs.salvage import Found, Layered, Salvage, redeclare
from xs.schema import (
    FILENAME,
    ORDER_BITS,
    REPAIRED_FILENAME,
    ROW_MAX,
    described,
    time_of,
)
from xs.store import Store
from xs.work import Work

_BUILT = "repair"  # the folder in which the new one is made
_READ = "repair-read"  # where the old one is read, if it can't be in its own place
_BATCH = 1000
_FAR = 1 << 47  # a clock for which no import is in the future


def run(folder: str) -> Iterator[bytes]:
    """Repairs the store in `folder`: JSON lines, `lost` or `problem`, and at the end a summary."""
    if is_host(folder):
        raise Invalid(f"a repair needs a store's directory, and {folder} is a server")
    if not os.path.isdir(folder):
        raise no_store(folder)
    check_writable(folder)
    check_length(folder, f"/{_READ}/newer-declared", "store to be repaired")
    lock = Lock(folder)
    try:
        try:
            lock.acquire(WRITE)
        except Served as error:
            raise Locked(f"{error}: stop that first") from None
        for line in _repair(folder):
            text = json.dumps(line, separators=(",", ":"), ensure_ascii=False)
            yield text.encode("utf-8", "backslashreplace") + b"\n"  # a path need not be UTF-8
    finally:
        lock.close()


def _repair(folder: str) -> Iterator[dict[str, object]]:
    # One that was killed may have put things aside, and a new database in place, just before that.
    # What has left the folder must not be gone from there before it has a name elsewhere.
    for name in _asides(folder):
        for path in (os.path.join(folder, name, "cas"), os.path.join(folder, name)):
            if os.path.isdir(path):
                sync_folder(path)
    sync_folder(folder)
    for left in (_BUILT, _READ):
        shutil.rmtree(os.path.join(folder, left), ignore_errors=True)  # of one that broke off
    if not os.path.exists(os.path.join(folder, FILENAME)):
        if not os.path.exists(os.path.join(folder, REPAIRED_FILENAME)):
            check_folder(folder, create=False)
        _take_its_place(folder, _newest_aside(folder))
    elif not has_index(folder):
        check_folder(folder, create=False)
    problems = _problems(folder)
    for problem in problems:
        yield {"problem": problem}
    if not problems:
        yield {"repaired": None, "lost": 0, "aside": None}
        return
    rescue = _Rescue(folder)
    try:
        yield from rescue.contents()
        yield from rescue.database()
    except BaseException as error:
        rescue.give_up()
        if isinstance(error, XsError) and os.path.exists(os.path.join(folder, rescue.name)):
            error.args = (f"{error}; what it has put aside until then is in {rescue.name}",)
        raise
    yield {
        "repaired": {"frames": rescue.saved},
        "lost": rescue.lost,
        "aside": os.path.join(folder, rescue.name),
    }


def _problems(folder: str) -> list[str]:
    try:
        store = Store(folder)
    except Damaged as error:
        return [str(error)]
    try:
        return [found for found in store.check() if isinstance(found, str)]
    finally:
        store.close()


class _Rescue:
    """One repair, and the folder to which it puts things aside."""

    def __init__(self, folder: str) -> None:
        self.name = _new_aside(folder)
        self.saved = 0
        self.lost = 0
        self._folder = folder
        self._aside = os.path.join(folder, self.name)
        self._cas = Cas(os.path.join(folder, "cas"))
        os.mkdir(os.path.join(self._aside, "cas"), 0o700)
        os.makedirs(os.path.join(folder, "cas"), 0o700, exist_ok=True)
        # What is put there must not be lost because the folder is.
        sync_folder(self._aside)
        sync_folder(folder)
        self._unreadable: set[str] = set()  # what was said of contents that can't be read now
        self._is_built = False
        fault.at("repair.begun")

    def give_up(self) -> None:
        """Clears away what was made, unless the database or contents have been put aside by now."""
        if self._is_built:
            return
        for left in (_BUILT, _READ):
            shutil.rmtree(os.path.join(self._folder, left), ignore_errors=True)
        with contextlib.suppress(OSError):  # it isn't empty
            os.rmdir(os.path.join(self._aside, "cas"))
            shutil.rmtree(self._aside)

    def contents(self) -> Iterator[dict[str, object]]:
        """Puts aside content files whose bytes are not what their names say.

        One that can't be read may be whole: it stays, and so do its frames.
        """
        for digest in list(self._cas.digests()):
            try:
                for _ in self._cas.open(digest)[1]:
                    pass
            except DiskError as error:
                self._unreadable.add(str(error))
                yield {"problem": str(error)}
            except Damaged as error:
                folder = os.path.join(self._aside, "cas")
                self._cas.move(digest, os.path.join(folder, digest.hex()))
                sync_folder(folder)
                fault.at("repair.content-aside")
                yield self._loss(str(error))

    def database(self) -> Iterator[dict[str, object]]:
        """Makes a new database of what is whole in the old one, and puts it in its place."""
        built, read = (os.path.join(self._folder, name) for name in (_BUILT, _READ))
        os.mkdir(built, 0o700)
        os.symlink(os.path.join("..", "cas"), os.path.join(built, "cas"))
        fault.at("repair.folder-made")
        damage = wal.damage(self._folder)
        if damage is None:
            old: Salvage | Layered = Salvage(_declared(self._folder, read))
        else:
            old, losses = self._old_with_log(damage)
            for loss in losses:
                yield self._loss(loss)
        try:
            new = Store(built, exclusive=True, create=True, clock=lambda: _FAR)
            try:
                runs = _Runs(old)
                yield from self._save_frames(old, new, runs)
                for start, end in old.gaps:
                    yield self._loss(
                        f"frames {_when(start, 'from the beginning')} {_when(end, 'to the end')}, "
                        "besides those that are named: it can't be told how many, if any"
                    )
                fault.at("repair.frames-saved")
                rest = _RestWork(old, runs.begun)
                new.run(rest)
                for what in rest.lost:
                    yield self._loss(what)
                problems = []
                for each in new.check():
                    if not isinstance(each, str):
                        self.saved = each[0]
                    elif each not in self._unreadable:
                        problems.append(each)
            finally:
                new.close()
        finally:
            old.close()
            shutil.rmtree(read, ignore_errors=True)
        if not problems and os.path.exists(os.path.join(built, FILENAME + "-wal")):
            problems = ["the new database could not be closed in good order"]
        if problems:
            raise Damaged(f"the repair came to nothing: {problems[0]}; nothing was changed")
        fault.at("repair.built")
        self._is_built = True
        self._put_in_place(built)

    def _old_with_log(self, damage: wal.Damage) -> tuple[Salvage | Layered, list[str]]:
        """The old database whose log is damaged, and what is lost of that."""
        database = os.path.join(self._folder, FILENAME)
        read = os.path.join(self._folder, _READ)
        newer, older = os.path.join(read, "newer"), os.path.join(read, "older")
        os.makedirs(newer, 0o700)
        try:
            os.link(database, os.path.join(newer, FILENAME))
        except OSError:  # not every file system can
            shutil.copyfile(database, os.path.join(newer, FILENAME))
        pages, unknown = wal.mend(self._folder, damage, newer)
        newer = _declared(newer, newer + "-declared")
        if not pages + unknown:
            return Salvage(newer), []
        # A file of its own: SQLite takes two names of one file for one database with one log.
        os.mkdir(older, 0o700)
        shutil.copyfile(database, os.path.join(older, FILENAME))
        wal.cut(self._folder, damage, older)
        older = _declared(older, older + "-declared")
        try:
            found: Salvage | Layered = Layered(
                Salvage(newer), Salvage(older), all_of_it=unknown > 0
            )
        except (NotAStore, Damaged):
            what = f"what {damage.commits} transactions did"
            return Salvage(older), [f"{what}, from frame {damage.whole + 1} of {FILENAME}-wal on"]
        what = f"{pages + unknown} of the index's pages, damaged in {FILENAME}-wal"
        return found, [f"{what}: what was on them, besides what is named here, can't be told"]

    def _save_frames(
        self, old: Salvage | Layered, new: Store, runs: _Runs
    ) -> Iterator[dict[str, object]]:
        wanting = os.path.join(self._aside, "frames.jsonl")
        batch: list[tuple[Found, Imported]] = []
        ends: list[tuple[Found, Imported]] = []
        with open(wanting, "ab") as aside:

            def give_up(found: Found, why: object) -> dict[str, object]:
                aside.write((found.line or b"").replace(b"\n", b" ") + b"\n" * bool(found.line))
                return self._loss(f"{_name_of(found)}: {why}")

            def save() -> Iterator[dict[str, object]]:
                results = new.run(ImportWork([each for _, each in batch]))
                for (found, _), result in zip(batch, results):
                    if result != found.line:
                        yield give_up(found, result)
                batch.clear()

            for found in old.frames():
                try:
                    whole = self._whole(new, found)
                except XsError as error:
                    yield give_up(found, error)
                    continue
                if runs.missing_before(whole):  # so far: what is found last may be older
                    ends.append((found, whole))
                    continue
                runs.take(found, whole)
                batch.append((found, whole))
                if len(batch) >= _BATCH:
                    yield from save()
            yield from save()
            for found, whole in ends:
                missing = runs.missing_before(whole)
                if missing:
                    yield give_up(found, f"the content that it ends has lost {missing} pieces")
                else:
                    batch.append((found, whole))
            yield from save()
            aside.flush()
            sync(aside.fileno())

    def _whole(self, new: Store, found: Found) -> Imported:
        """The frame in a row. Raises `XsError` unless all of it is there and right."""
        if found.line is None:
            raise Damaged("it can't be read")
        if not found.is_whole:
            raise Damaged("it is not what was stored: its JSON and its sum disagree")
        read = parse_imported(new, found.line)
        if isinstance(read, XsError):
            raise read
        # Its sum is right, whatever the row and the index say: without one they have to agree.
        is_listed_so = found.topic in (None, read.topic)
        if found.agrees is None and not (is_listed_so and read.id >> 80 == found.row >> ORDER_BITS):
            raise Damaged("it does not read as it was written")
        if read.hash is None:
            return read
        if found.content is None:
            if not self._cas.has(frame.parse_integrity(read.hash)):
                raise Damaged(f"its content {read.hash} is not there, or damaged")
            return read
        content = small(found.content)
        if content.hash != read.hash or content.size > INLINE_MAX:
            raise Damaged(f"its content {read.hash} is damaged")
        return read._replace(content=content)

    def _put_in_place(self, built: str) -> None:
        folder = self._folder
        new = os.path.join(folder, REPAIRED_FILENAME)
        os.rename(os.path.join(built, FILENAME), new)
        fault.at("repair.named")
        sync_folder(folder)
        sync_folder(self._aside)  # the list of frames has its name before there is no other
        os.rename(os.path.join(folder, FILENAME), os.path.join(self._aside, FILENAME))
        fault.at("repair.database-aside")
        # Before its log goes: without that it would be taken for a whole one.
        sync_folder(self._aside)
        sync_folder(folder)
        _take_its_place(folder, self._aside)

    def _loss(self, what: str) -> dict[str, object]:
        self.lost += 1
        return {"lost": what}


class _Runs:
    """How many pieces are missing in contents that came in pieces, as far as that can be read.

    A content that has lost some may not end well any more: the frame that ends it is put aside.
    """

    def __init__(self, old: Salvage | Layered) -> None:
        self._sizes = dict(old.runs())
        self._left: dict[str, int] = {}  # pieces that are still to come, by the first frame's id
        self.begun: list[int] = []  # the ids of first frames; not all have a piece that shows it

    def take(self, found: Found, whole: Imported) -> None:
        """Takes note of a frame that is saved."""
        if found.row in self._sizes and found.line and frame.begins_run(found.line):
            self.begun.append(whole.id)
            size = self._sizes[found.row]
            if type(size) is int:
                self._left[ids.text(whole.id)] = size
        piece = frame.continuation_in(whole.meta)
        if piece is not None and piece.first in self._left:
            self._left[piece.first] -= 1

    def missing_before(self, whole: Imported) -> int:
        """If it ends a content as whole: how many pieces of that are missing."""
        piece = frame.continuation_in(whole.meta)
        if piece is None or piece.more or piece.has_error:
            return 0
        return max(0, self._left.get(piece.first, 0) - 1)


class _RestWork(Work):
    """Takes over all that is no frame: pins, answers to keys, what is kept of scripts, the mark.

    And runs of which there is but the first frame: no piece has made one of that.
    """

    __slots__ = ("begun", "lost", "old")

    def __init__(self, old: Salvage | Layered, begun: list[int]) -> None:
        super().__init__()
        self.old = old
        self.begun = begun
        self.lost: list[str] = []

    def apply(self, commit: Commit) -> None:
        writer = commit.writer
        self.lost.clear()
        for first in self.begun:
            if writer.find(first) is not None and find_run(writer, first) is None:
                run_made_of(writer, first)
        self._keep_pins(commit)
        self._keep_answers(commit)
        for script in self.old.scripts():
            if is_script(script):
                writer.keep_script(script)
            else:
                self.lost.append(f"what is kept of the script {_text(script.name)}: it is damaged")
        for (id_text,) in self.old.marks():
            if isinstance(id_text, str) and ids.is_id(id_text):
                writer.raise_mark(ids.parse(id_text))
            else:
                self.lost.append("the mark, the last id that was given out: it is damaged")
        for table, why in self.old.doubts.items():
            self.lost.append(
                f"some of {_IN_TABLES[table]}, besides what is named: it can't be told what, if "
                f"any ({why})"
            )

    def _keep_pins(self, commit: Commit) -> None:
        for digest, created, content in self.old.pins():
            if not is_pin(digest, created, content):
                self.lost.append("a content that was put there without a frame: its row is damaged")
            elif commit.is_content(digest, content):
                commit.writer.pin(digest, content, created)
            else:
                self.lost.append(
                    f"content {frame.integrity(digest)}, which was put there without a frame: it "
                    "is not there, or damaged"
                )

    def _keep_answers(self, commit: Commit) -> None:
        kept: dict[tuple[str, str], bytes] = {}
        for _, key, line, is_whole in self.old.answered():
            count = len(kept)
            what = f"what was answered to the key {_text(key)}"
            try:
                if is_whole is False or type(key) is not str:
                    raise Damaged("it is damaged")
                topic = frame.check_topic(frame.topic_of(line))
                what = f"{what} on {topic}"
                text = line.decode()
                if kept.setdefault((topic, key), line) != line:
                    raise Damaged("there is another one")
                if len(kept) > count:
                    commit.writer.keep_answer(topic, key, text)
            except (XsError, ValueError) as error:
                self.lost.append(f"{what}: {error}")


# What the tables have that `Salvage.doubts` names.
_IN_TABLES = {
    "pin": "the contents that were put there without a frame",
    "answered": "the answers to keys",
    "script": "what is kept of scripts",
    "mark": "the mark, the last id that was given out",
}


def _declared(folder: str, copy: str) -> str:
    """Where a database can be read by the right declarations: as it is, or as a copy with them."""
    os.mkdir(copy, 0o700)
    return copy if redeclare(folder, copy) else folder


def _text(value: object) -> str:
    return value if isinstance(value, str) else "that can't be read"


def _new_aside(folder: str) -> str:
    """Makes a folder for what is put aside, of which the name is above all before it; its name."""
    name = first = time.strftime("aside-%Y%m%d-%H%M%S")
    count = 1
    while True:
        try:
            os.mkdir(os.path.join(folder, name), 0o700)
            return name
        except FileExistsError:  # of a repair that broke off in this very second
            count += 1
            name = f"{first}-{count:03}"


def _newest_aside(folder: str) -> str:
    """The folder to which the repair that broke off has put the old database."""
    names = _asides(folder)
    return os.path.join(folder, max(names) if names else _new_aside(folder))


def _asides(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith("aside-")]


def _take_its_place(folder: str, aside: str) -> None:
    """Gives the new database its name, when the old one is aside and the old log may not be.

    SQLite would take that log for the new one's.
    """
    for suffix in ("-wal", "-shm"):
        path = os.path.join(folder, FILENAME + suffix)
        if os.path.exists(path):
            os.rename(path, os.path.join(aside, FILENAME + suffix))
            fault.at("repair.log-aside")
    sync_folder(aside)
    sync_folder(folder)
    os.rename(os.path.join(folder, REPAIRED_FILENAME), os.path.join(folder, FILENAME))
    fault.at("repair.before-folder-fsync")
    sync_folder(folder)
    shutil.rmtree(os.path.join(folder, _BUILT), ignore_errors=True)  # a link is left in it
    fault.at("repair.done")


def _name_of(found: Found) -> str:
    if found.line is not None and found.is_whole:
        try:
            return f"{ids.text(ids.parse(frame.id_of(found.line)))} on {frame.topic_of(found.line)}"
        except (XsError, ValueError):
            pass
    return described(found.row, found.topic)


def _when(row: int, otherwise: str) -> str:
    if row in (-1, ROW_MAX):
        return otherwise
    return f"{otherwise.split()[0]} {time_of(row)}"
