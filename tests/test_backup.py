"""`xs backup`: a copy of a live store that is whole at every moment, and cheap the second time."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, XS, Server, environment, start_server
from stores import add, add_all, all_ids, content, problems, remove, taken
from test_flips import to_format

import xs
from xs import backup, frame, ids, repair
from xs.cas import Cas
from xs.commit import Append
from xs.errors import Damaged, Invalid, Locked, NotAStore, XsError
from xs.lock import SERVE, Lock, Served
from xs.store import Store
from xs.work import PinWork

LARGE = b"large " * 10_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(str(tmp_path / "store"), create=True)
    yield found
    found.close()


def back_up(source: str, dest: str) -> dict[str, int]:
    return dict(json.loads(backup.run(source, dest)))


def tables(folder: str) -> dict[str, list[Any]]:
    """All rows of all tables, but for what a copy says of itself."""
    with contextlib.closing(sqlite3.connect(os.path.join(folder, "xs.db"))) as database:
        names = [
            n for (n,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
        return {
            name: sorted(
                (row for row in database.execute(f"SELECT * FROM {name}") if row[0] != "backup"),
                key=repr,
            )
            for name in names
        }


def whole(folder: str) -> list[bytes]:
    """The lines of a copy, in which nothing is wrong."""
    store = Store(folder)
    try:
        assert problems(store) == []
        return [store.get(ids.parse(each)) for each in all_ids(store)]
    finally:
        store.close()


def test_a_copy_has_all_that_the_store_has_and_the_second_time_only_what_changed(
    store: Store, tmp_path: Path
) -> None:
    dest = str(tmp_path / "copy")
    going = add(store, "a.b", b"1" + LARGE)
    add(store, "a.b", b"small", meta='{"n":1}')
    add(store, "c", b"kept", ttl="last:1", key="k")
    pinned = taken(store, b"2" + LARGE)
    assert pinned is not None
    store.run(PinWork(pinned))
    assert back_up(store.folder, dest)["copied"] == 2
    assert tables(dest) == tables(store.folder)
    remove(store, going)
    add(store, "a.b", b"3" + LARGE)
    add(store, "c", b"kept", ttl="last:1")
    add(store, "new.topic")
    found = back_up(store.folder, dest)
    assert (found["copied"], found["removed"]) == (1, 1)
    assert tables(dest) == tables(store.folder)
    assert whole(dest) == [store.get(ids.parse(each)) for each in all_ids(store)]
    assert back_up(store.folder, dest)["copied"] == 0
    assert sum(len(files) for _, _, files in os.walk(os.path.join(dest, "cas"))) == 2


def test_rows_that_an_import_moved_are_found_moved(store: Store, tmp_path: Path) -> None:
    from stores import NOON, import_all, imported

    dest = str(tmp_path / "copy")
    import_all(store, [imported(NOON << 80 | n << 40, data=b"%d" % n) for n in (1, 2, 3, 9)])
    back_up(store.folder, dest)
    import_all(store, [imported(NOON << 80 | n << 40, data=b"%d" % n) for n in (4, 5, 0)])
    back_up(store.folder, dest)
    assert tables(dest) == tables(store.folder)
    assert len(whole(dest)) == 7


def test_a_copy_on_another_file_system_is_made_of_verified_bytes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    id_text = add(store, "a", LARGE)
    assert back_up(store.folder, str(tmp_path / "copy"))["bytes"] == len(LARGE)
    (digest,) = store.cas.digests()
    with open(store.cas._path(digest), "r+b") as file:
        file.write(b"X")
    copy = Store(str(tmp_path / "copy"))
    assert content(copy, id_text) == LARGE
    copy.close()
    with pytest.raises(Damaged, match="there is no backup, as the store is damaged"):
        back_up(store.folder, str(tmp_path / "other"))


def test_what_is_not_whole_is_no_store(store: Store, tmp_path: Path, run_xs: Any) -> None:
    dest = str(tmp_path / "copy")
    add(store, "a", LARGE)
    store.cas.remove(next(iter(store.cas.digests())))
    with pytest.raises(Damaged, match="no content sha256"):
        back_up(store.folder, dest)
    for command in (["cat", dest], ["append", dest, "t"], ["serve", dest]):
        done = run_xs(command)
        assert done.returncode != 0, command
        assert b"no store at" in done.stderr or b"not a store" in done.stderr
    assert not os.path.exists(os.path.join(dest, "xs.db"))


def test_a_backup_that_is_killed_leaves_the_old_copy_or_the_new_one_or_none(
    store: Store, tmp_path: Path
) -> None:
    dest = str(tmp_path / "copy")
    rounds = random.Random(6)
    known: set[int] = set()
    for turn in range(8):
        for n in range(40):
            add(store, "a.b", b"%d %d" % (turn, n) + (LARGE if n % 4 == 0 else b""))
        known.add(len(all_ids(store)))
        process = subprocess.Popen(
            [*XS, "backup", store.folder, dest],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rounds.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE)
        if os.path.exists(os.path.join(dest, "xs.db")):
            assert len(whole(dest)) in known
    back_up(store.folder, dest)
    assert tables(dest) == tables(store.folder)


def test_no_content_vanishes_while_it_is_held_and_it_goes_afterwards(store: Store) -> None:
    one, other = add(store, "a", LARGE), add(store, "a", b"other" + LARGE)
    with store.cas.held():
        remove(store, one)
        assert len(list(store.cas.digests())) == 2
    remove(store, other)
    assert list(store.cas.digests()) == []


def test_a_gc_counts_what_it_has_removed_and_not_what_is_held(store: Store) -> None:
    pinned, left = taken(store, LARGE), taken(store, b"left" + LARGE)
    assert pinned is not None and left is not None
    store.run(PinWork(pinned))
    store.cas.place(left)
    with store.cas.held():
        assert store.gc(0) == (0, 0)
        assert len(list(store.cas.digests())) == 2
    with contextlib.closing(Store(store.folder)) as another:  # which has held nothing back
        assert another.gc(0) == (2, 2 * len(LARGE) + len(b"left"))
    assert list(store.cas.digests()) == []


def test_what_was_held_and_is_named_again_stays(store: Store) -> None:
    id_text = add(store, "a", LARGE)
    with store.cas.held():
        remove(store, id_text)
    again = add(store, "a", LARGE)
    add(store, "b")
    assert content(store, again) == LARGE


class Load:
    """Clients that append, remove and supersede at a server, until they are told to end."""

    def __init__(self, directory: str) -> None:
        self.ended = threading.Event()
        self.lasting: list[str] = []  # ids that were answered, and are never removed
        self.failures: list[BaseException] = []
        acts = (self._append, self._append_large, self._supersede, self._remove)
        self._threads = [threading.Thread(target=self._run, args=(act, directory)) for act in acts]
        for thread in self._threads:
            thread.start()

    def _run(self, act: Any, directory: str) -> None:
        try:
            client = xs.open(directory)
            n = 0
            while not self.ended.is_set():
                act(client, n)
                n += 1
        except BaseException as error:
            self.failures.append(error)

    def _append(self, client: Any, n: int) -> None:
        self.lasting.append(client.append("lasting.small", f"small {n}").id)

    def _append_large(self, client: Any, n: int) -> None:
        self.lasting.append(client.append("lasting.large", b"%d" % n + LARGE).id)

    def _supersede(self, client: Any, n: int) -> None:
        client.append("newest", b"s%d" % n + LARGE, ttl="last:1")

    def _remove(self, client: Any, n: int) -> None:
        client.remove(client.append("going", b"r%d" % n + LARGE).id)

    def end(self) -> None:
        self.ended.set()
        for thread in self._threads:
            thread.join(DEADLINE)
        assert self.failures == []


def test_under_load_each_copy_is_whole_and_has_all_that_was_answered_before(
    server: Server, tmp_path: Path
) -> None:
    dest = str(tmp_path / "copy")
    load = Load(server.directory)
    try:
        for _ in range(4):
            seen = len(load.lasting)
            deadline = time.monotonic() + DEADLINE
            while len(load.lasting) < seen + 40 and time.monotonic() < deadline:
                load.ended.wait(0.01)
            answered = list(load.lasting)
            back_up(server.directory, dest)
            lines = whole(dest)
            in_copy = {frame.id_of(line) for line in lines}
            assert in_copy.issuperset(answered)
            # One moment: of what is kept once, the newest is there, and no older one.
            assert sum(frame.topic_of(line) == "newest" for line in lines) == 1
    finally:
        load.end()
    server.stop()
    back_up(server.directory, dest)
    assert tables(dest) == tables(server.directory)


def test_a_copy_can_be_served_and_is_no_copy_from_then_on(store: Store, tmp_path: Path) -> None:
    dest = str(tmp_path / "copy")
    id_text = add(store, "a", LARGE)
    back_up(store.folder, dest)
    server = start_server(dest)
    try:
        client = xs.open(dest)
        assert client.content(id_text) == LARGE
        with pytest.raises(Served):
            back_up(store.folder, dest)
    finally:
        server.stop()
    with pytest.raises(Invalid, match="has got frames of its own since it was made"):
        back_up(store.folder, dest)


def test_a_copy_into_which_history_was_imported_is_no_copy_any_more(
    store: Store, tmp_path: Path
) -> None:
    dest = str(tmp_path / "copy")
    add(store, "a", b"x")
    back_up(store.folder, dest)
    with xs.open(dest) as copy:
        (known,) = copy.cat()
        copy.import_([{"topic": "old", "id": ids.text(int(known.id, 36) - 1)}])
    with pytest.raises(Invalid, match=r"imported into it, .* it has some that .* has not"):
        back_up(store.folder, dest)
    assert len(whole(dest)) == 2


def test_what_has_gone_from_a_copy_comes_back(store: Store, tmp_path: Path) -> None:
    dest = str(tmp_path / "copy")
    add(store, "a", b"expires", ttl="time:3600000")
    gone = [add(store, "a.b", b"%d" % n + LARGE) for n in range(3)]
    back_up(store.folder, dest)
    later = store.clock() + 7_200_000
    with contextlib.closing(Store(dest, clock=lambda: later)) as copy:
        copy.gc(0)  # which removes what has expired
        assert len(all_ids(copy)) == 3
    assert back_up(store.folder, dest)["frames"] == 4
    assert tables(dest) == tables(store.folder)
    with contextlib.closing(sqlite3.connect(f"{dest}/xs.db")) as database:
        database.execute("UPDATE frame SET sum = sum + 1 WHERE row = (SELECT max(row) FROM frame)")
        database.commit()
    assert json.loads(list(repair.run(dest))[-1])["lost"] == 1
    assert back_up(store.folder, dest)["frames"] == 4
    assert tables(dest) == tables(store.folder)
    with contextlib.closing(Store(dest)) as copy:
        remove(copy, gone[0])
    remove(store, gone[1])  # or was it imported into the copy? nobody can tell
    with pytest.raises(Invalid, match="imported into it, or removed from it"):
        back_up(store.folder, dest)


def test_a_store_that_came_in_the_place_of_another_takes_no_copy_of_that(tmp_path: Path) -> None:
    source, dest, aside = (str(tmp_path / name) for name in ("store", "copy", "aside"))
    with xs.open(source) as client:
        for n in range(3):
            client.append("a", b"%d" % n + LARGE)
    back_up(source, dest)
    before = whole(dest)
    os.rename(source, aside)
    with xs.open(source) as client:
        client.append("a", "another one")
    with pytest.raises(Invalid, match="it is another one than that which was copied"):
        back_up(source, dest)
    assert whole(dest) == before
    shutil.rmtree(source)
    shutil.copytree(aside, source)  # that one, restored
    with xs.open(source) as client:
        newest = client.append("a", "goes on").id
    assert back_up(source, dest)["frames"] == 4 and newest.encode() in whole(dest)[-1]


def test_a_store_of_which_every_frame_was_replaced_is_still_the_same(
    store: Store, tmp_path: Path
) -> None:
    dest = str(tmp_path / "copy")
    for n in range(3):
        add(store, "a", b"%d" % n, ttl="last:1")
        assert back_up(store.folder, dest)["frames"] == 1
        assert all_ids(store)[0].encode() in whole(dest)[0]


def test_content_that_is_damaged_does_not_replace_what_is_whole(
    store: Store, tmp_path: Path
) -> None:
    dest = str(tmp_path / "copy")
    id_text = add(store, "a", b"whole")
    back_up(store.folder, dest)
    with contextlib.closing(sqlite3.connect(os.path.join(store.folder, "xs.db"))) as database:
        database.execute("UPDATE frame SET content = ?", (b"spoil",))
        database.commit()
    with xs.open(store.folder) as client:  # which moves the frame to another row
        client.import_([{"topic": "old", "id": ids.text(int(id_text, 36) - 1)}])
    with pytest.raises(Damaged, match=r"the content of a frame of .* is not what was stored"):
        back_up(store.folder, dest)
    kept = Store(dest)
    assert content(kept, id_text) == b"whole"
    kept.close()


def halve(data: bytearray, at: int) -> None:
    """A page says that it has half of its cells: one byte, and the rest is not found any more."""
    data[at + 4] //= 2


def halve_last_leaf(data: bytearray, root: int) -> None:
    halve(data, (struct.unpack_from(">I", data, root + 8)[0] - 1) * 4096)


def rename(data: bytearray, at: int) -> None:
    data[data.index(b"t.3", at)] += 1


def swap_leaves(data: bytearray, root: int) -> None:
    one, two = struct.unpack_from(">2H", data, root + 12)
    data[root + one : root + one + 4], data[root + two : root + two + 4] = (
        data[root + two : root + two + 4],
        data[root + one : root + one + 4],
    )


@pytest.mark.parametrize(
    ("table", "damage"),
    [
        ("frame", halve),
        ("frame", halve_last_leaf),
        ("frame", swap_leaves),
        ("below", halve),
        ("below", halve_last_leaf),
        ("file", halve),
        ("topic", rename),
    ],
)
def test_damage_takes_nothing_from_a_copy(
    tmp_path: Path, table: str, damage: Callable[[bytearray, int], None]
) -> None:
    source, dest = str(tmp_path / "store"), str(tmp_path / "copy")
    store = Store(source, create=True)
    add_all(store, [Append(f"t.{n % 5}", taken(store, b"%d" % n * 20)) for n in range(700)])
    add(store, "large", LARGE)
    store.close()
    back_up(source, dest)
    before, files = tables(dest), list(Cas(f"{dest}/cas").digests())
    index = Path(source, "xs.db")
    whole_index = index.read_bytes()
    with contextlib.closing(sqlite3.connect(index)) as database:
        (page,) = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)
        ).fetchone()
    data = bytearray(whole_index)
    damage(data, (page - 1) * 4096)
    index.write_bytes(data)
    with pytest.raises(Damaged, match="there is no backup, as the store is damaged"):
        back_up(source, dest)
    assert (tables(dest), list(Cas(f"{dest}/cas").digests())) == (before, files)
    index.write_bytes(whole_index)
    with xs.open(source) as client:
        client.remove(client.head("large"))
    assert back_up(source, dest)["removed"] == 1


def test_a_content_that_is_named_for_another_frame_by_damage_takes_none_from_a_copy(
    store: Store, tmp_path: Path
) -> None:
    dest = str(tmp_path / "copy")
    add(store, "a", LARGE)
    back_up(store.folder, dest)
    before = tables(dest)
    with contextlib.closing(sqlite3.connect(f"{store.folder}/xs.db")) as database:
        database.execute("UPDATE file SET row = row + 1")
        database.commit()
    with pytest.raises(Damaged, match="there is no backup, as the store is damaged"):
        back_up(store.folder, dest)
    assert tables(dest) == before


def test_what_a_copy_has_stays_while_it_is_copied_itself(store: Store, tmp_path: Path) -> None:
    dest = str(tmp_path / "copy")
    going = add(store, "a", LARGE)
    back_up(store.folder, dest)
    remove(store, going)
    copied = Cas(os.path.join(dest, "cas"))
    with copied.held():
        assert back_up(store.folder, dest)["removed"] == 0
        assert len(list(copied.digests())) == 1
    assert back_up(store.folder, dest)["removed"] == 1


@pytest.mark.parametrize("damaged", ["shorter", "link"])
def test_a_content_file_that_is_another_one_by_damage_replaces_none(
    store: Store, tmp_path: Path, damaged: str
) -> None:
    dest = str(tmp_path / "copy")
    id_text = add(store, "a", LARGE)
    back_up(store.folder, dest)
    (digest,) = store.cas.digests()
    path = Path(store.cas._path(digest))
    path.unlink()
    if damaged == "shorter":
        path.write_bytes(LARGE[:50_000])
    else:
        (tmp_path / "outside").write_bytes(LARGE + b"more")
        path.symlink_to(tmp_path / "outside")
    with pytest.raises(Damaged, match=r"there is no backup, .* content sha256-.* is damaged"):
        back_up(store.folder, dest)
    with contextlib.closing(Store(dest)) as copy:
        assert content(copy, id_text) == LARGE
    path.unlink()
    path.write_bytes(LARGE)
    os.truncate(os.path.join(dest, "cas", digest.hex()[:2], digest.hex()[2:]), 10)
    assert back_up(store.folder, dest)["copied"] == 1  # and the copy's is replaced, if that is
    assert len(whole(dest)) == 1


def test_frames_that_are_lost_to_a_scan_are_missed_by_a_backup(tmp_path: Path) -> None:
    source, dest = str(tmp_path / "store"), str(tmp_path / "copy")
    store = Store(source, create=True)
    add_all(store, [Append("t", taken(store, b"%d" % n * 20)) for n in range(250)])
    store.close()
    index = Path(source, "xs.db")
    with contextlib.closing(sqlite3.connect(index)) as database:
        (page,) = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'frame'"
        ).fetchone()
    data = bytearray(index.read_bytes())
    halve_last_leaf(data, (page - 1) * 4096)
    index.write_bytes(data)
    with pytest.raises(Damaged, match=r"its index lists 250 frames, and has [12]"):
        back_up(source, dest)


def test_a_store_of_an_older_format_is_brought_up_and_copied(tmp_path: Path) -> None:
    source, dest = str(tmp_path / "store"), str(tmp_path / "copy")
    with xs.open(source) as client:
        client.append("a", LARGE)
    to_format(4, f"{source}/xs.db")
    lock = Lock(source)
    lock.acquire(SERVE)
    with pytest.raises(Locked, match="a server of an older xs has it: stop that first"):
        back_up(source, dest)
    lock.close()
    assert os.listdir(tmp_path) == ["store"]
    assert back_up(source, dest)["frames"] == len(whole(dest)) == 1
    with contextlib.closing(sqlite3.connect(f"{source}/xs.db")) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(NotAStore, match=r"has format 99, .* use a newer xs"):
        back_up(source, dest)


def test_a_backup_overwrites_nothing_else(store: Store, tmp_path: Path) -> None:
    add(store, "a")
    other = Store(str(tmp_path / "other"), create=True)
    other.append(Append("theirs"))
    other.close()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter").write_text("dear")
    back_up(other.folder, str(tmp_path / "copy"))
    for dest, sentence in (
        ("other", "it is a store, and no backup"),
        ("folder", "it has other files in it"),
        ("copy", "it is a backup of .*other"),
        ("store", "one of them lies in the other"),
        ("store/within", "one of them lies in the other"),
        (".", "one of them lies in the other"),
        ("folder/letter", "it is a file"),
        ("folder/letter/copy", "Not a directory"),
    ):
        with pytest.raises(Invalid, match=sentence):
            back_up(store.folder, str(tmp_path / dest))
    with pytest.raises(XsError, match="a backup reads a store's directory"):
        back_up("localhost:8080", str(tmp_path / "new"))
    assert len(whole(str(tmp_path / "other"))) == 1


@pytest.mark.parametrize(
    ("addr", "says"),
    [
        ("misspelt", "; make one with `xs serve"),
        ("file", ": it is a file, and a store is a directory"),
    ],
)
def test_where_no_store_is_there_is_no_backup_and_no_repair(
    tmp_path: Path, run_xs: Any, addr: str, says: str
) -> None:
    (tmp_path / "file").write_text("text")
    addr = str(tmp_path / addr)
    for words in (["backup", addr, str(tmp_path / "copy")], ["check", addr, "--repair"]):
        done = run_xs(words)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(f"xs: no store at: {addr}{says}".encode()), done.stderr
    assert os.listdir(tmp_path) == ["file"]


def test_the_command_sums_it_up(store: Store, tmp_path: Path, run_xs: Any) -> None:
    add(store, "a", LARGE)
    done = run_xs(["backup", store.folder, str(tmp_path / "copy")])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "frames": 1, "contents": 1, "copied": 1, "bytes": len(LARGE), "removed": 0,
    }  # fmt: skip


def test_a_store_and_its_copy_may_lie_where_the_path_is_not_utf_8(
    tmp_path: Path, run_xs: Any
) -> None:
    store, copy = (f"{tmp_path}/{os.fsdecode(name)}" for name in (b"a\xff", b"%b\xc3\xa9\xff?"))
    for n in range(2):
        with xs.open(store) as client:
            client.append("a", b"%d" % n * 50_000)
        done = run_xs(["backup", store, copy])
        assert (done.returncode, done.stderr) == (0, b"")
        assert json.loads(done.stdout)["frames"] == n + 1
    path = next(path for path in Path(copy, "cas").rglob("*") if path.is_file())
    path.write_bytes(b"!")
    done = run_xs(["check", "--repair", copy])
    assert os.path.isdir(json.loads(done.stdout.splitlines()[-1])["aside"])
