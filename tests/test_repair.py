"""Damage of each kind is named, never served, and repaired as far as that can be."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Server
from stores import Clock, add, add_all, all_ids, content, import_all, imported, problems, taken
from stores import lines as lines_of

from xs import chunked, frame, ids, repair
from xs.client import Client
from xs.commit import Append
from xs.content import small
from xs.errors import BrokenBody, Damaged, Locked, NotAStore, XsError
from xs.local import Local
from xs.schema import Script
from xs.store import Store
from xs.work import PinWork

LARGE = b"large " * 10_000


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@contextlib.contextmanager
def opened(folder: str) -> Iterator[Store]:
    store = Store(folder, create=True)
    try:
        yield store
    finally:
        store.close()


def repaired(folder: str) -> tuple[list[str], dict[str, Any]]:
    """What was lost, and the summary."""
    *lines, last = map(json.loads, repair.run(folder))
    return [line["lost"] for line in lines if "lost" in line], last


def overwrite(path: str, old: bytes, new: bytes) -> None:
    """Other bytes for those that are there once."""
    assert len(old) == len(new)
    with open(path, "rb") as file:
        data = file.read()
    assert data.count(old) == 1
    with open(path, "r+b") as file:
        file.seek(data.index(old))
        file.write(new)


def database(folder: str) -> str:
    return os.path.join(folder, "xs.db")


def everything(store: Store) -> list[tuple[str, bytes]]:
    return [(each, content(store, each)) for each in all_ids(store)]


def aside(folder: str) -> str:
    (name,) = [name for name in os.listdir(folder) if name.startswith("aside-")]
    return os.path.join(folder, name)


def test_a_whole_store_is_left_as_it_is(folder: str) -> None:
    with opened(folder) as store:
        add(store, "a", LARGE)
    before = sorted(os.listdir(folder)), os.stat(database(folder)).st_mtime_ns
    assert repaired(folder) == ([], {"repaired": None, "lost": 0, "aside": None})
    assert (sorted(os.listdir(folder)), os.stat(database(folder)).st_mtime_ns) == before


def test_where_the_folder_of_contents_is_gone_frames_without_large_ones_are_kept(
    folder: str,
) -> None:
    with opened(folder) as store:
        kept, lost = add(store, "a", b"small"), add(store, "a", LARGE)
    shutil.rmtree(os.path.join(folder, "cas"))
    said, last = repaired(folder)
    assert any(lost in line for line in said) and last["repaired"] == {"frames": 1}
    with opened(folder) as store:
        assert problems(store) == [] and all_ids(store) == [kept]
        assert content(store, add(store, "a", LARGE)) == LARGE


def test_a_content_that_can_not_be_read_is_left_where_it_is_with_its_frames(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(folder) as store:
        other, kept = add(store, "a", b"1" + LARGE), add(store, "a", b"2" + LARGE)
        (path,) = [
            store.cas._path(digest)
            for digest in store.cas.digests()
            if next(store.cas.open(digest)[1]).startswith(b"2")
        ]
        gone = frame.hash_text(store.get(ids.parse(other))) or ""
        os.unlink(store.cas._path(frame.parse_integrity(gone)))
    open_file = os.open

    def refuse(name: str, *rest: int, **more: int) -> int:
        if str(name).endswith(path[-60:]):  # also by way of the folder of the new one
            raise OSError(5, "Input/output error", name)
        return open_file(name, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    said, last = repaired(folder)
    monkeypatch.undo()
    assert any(other in line for line in said) and not any(kept in line for line in said)
    assert last["repaired"] == {"frames": 1}
    with opened(folder) as store:
        assert problems(store) == [] and content(store, kept) == b"2" + LARGE


@pytest.mark.parametrize("damage", ["flipped", "missing", "a pipe"])
def test_a_frame_whose_content_file_is_lost_is_put_aside_with_it(folder: str, damage: str) -> None:
    with opened(folder) as store:
        kept = [add(store, "a.b", b"one", key="k"), add(store, "a.b", b"2" + LARGE)]
        lost = add(store, "a.b", b"3" + LARGE)
        before = everything(store)
        (path,) = [
            store.cas._path(digest)
            for digest in store.cas.digests()
            if next(store.cas.open(digest)[1]).startswith(b"3")
        ]
    if damage != "flipped":
        os.unlink(path)
    if damage == "a pipe":
        os.mkfifo(path)
    elif damage == "flipped":
        with open(path, "r+b") as file:
            file.seek(1000)
            file.write(b"X")
    with opened(folder) as store:
        assert len(problems(store)) == 1
    said, last = repaired(folder)
    assert any(lost in line and "is not there, or damaged" in line for line in said)
    assert last["repaired"] == {"frames": 2} and last["lost"] == len(said)
    with opened(folder) as store:
        assert problems(store) == []
        assert everything(store) == [each for each in before if each[0] in kept]
        assert add(store, "a.b", b"again", key="k") == kept[0]
    found = Path(aside(folder), "frames.jsonl").read_text()
    assert json.loads(found)["id"] == lost
    assert os.path.exists(os.path.join(aside(folder), "xs.db"))
    assert len(os.listdir(os.path.join(aside(folder), "cas"))) == (damage != "missing")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"small content", b"smalL content", "is damaged"),
        (b'{"topic":"x.y"', b'{"topic":"x.z"', "on x.y: it is not what was stored"),
        (b'"meta":{"n":1}', b'"meta":{"n":2}', "on x.y: it is not what was stored"),
        (b'"meta":{"n":1}', b'"meta":{"n":1{', "on x.y: it is not what was stored"),
        (b'"ttl":"last:9"', b'"ttl":"last:8"', "on x.y: it is not what was stored"),
    ],
)
def test_flipped_bytes_in_a_frame_are_named_and_cost_that_frame_alone(
    folder: str, old: bytes, new: bytes, said: str
) -> None:
    with opened(folder) as store:
        first = add(store, "a", b"first")
        lost = add(store, "x.y", b"small content", meta='{"n":1}', ttl="last:9")
        last = add(store, "a", b"last")
    overwrite(database(folder), old, new)
    with opened(folder) as store:
        assert problems(store)
        if b"content" in old:
            with pytest.raises(XsError):
                content(store, lost)
    (line,), _ = repaired(folder)
    assert re.search(said, line), line
    with opened(folder) as store:
        assert problems(store) == []
        assert all_ids(store) == [first, last]


def test_pages_that_can_not_be_read_cost_what_is_on_them(folder: str) -> None:
    with opened(folder) as store:
        add_all(store, [Append(f"t.{n % 7}", small(b"%d" % n * 50)) for n in range(3000)])
        pin = store.run(PinWork(small(b"pinned")))
        large = taken(store, LARGE)
        assert large is not None
        pinned = store.run(PinWork(large))
        run = json.loads(chunked.append(store, Append("run"), [b"one", b"two"]))["id"]
        script = Script("handler", "h", all_ids(store)[0], True, all_ids(store)[0], "{}")

        class Keep(PinWork):
            def apply(self, commit: Any) -> Any:
                commit.writer.keep_script(script)

        store.run(Keep(small(b"")))
        before = dict(everything(store))
    data = Path(database(folder)).read_bytes()
    pages = [at for at in range(0, len(data), 4096) if b'"topic":"t.' in data[at : at + 4096]]
    with open(database(folder), "r+b") as file:
        for at in (pages[50], pages[51], pages[90]):
            file.seek(at)
            file.write(b"\xff" * 4096)
    with opened(folder) as store:
        assert any("malformed" in each for each in problems(store))
    said, last = repaired(folder)
    assert said and last["lost"] == len(said)
    with opened(folder) as store:
        assert problems(store) == []
        after = dict(everything(store))
        assert len(after) == last["repaired"]["frames"] > 2800
        assert after.items() <= before.items()
        for hash_, data in ((pin, b"pinned"), (pinned, LARGE)):
            assert b"".join(store.content(hash_)[1]) == data
        assert run in after
        assert store.index.scripts("handler", "h") == [script]
        assert max(after) < add(store, "a")
    # Indexes, on other pages, have the place of each that is lost: 3 pages, some dozens of frames.
    named = [line for line in said if "on t." in line and "it can't be read" in line]
    assert len(named) == len(before) - len(after) > 10
    assert sum("it can't be told how many, if any" in line for line in said) == 2


def test_a_page_with_keys_or_pins_that_can_not_be_read_costs_what_is_on_it_and_that_is_said(
    folder: str,
) -> None:
    keys = [f"key{n:03}" * 40 for n in range(100)]
    pins = [b"pin%03d" % n * 40 for n in range(100)]
    with opened(folder) as store:
        add_all(store, [Append("t", key=key) for key in keys])
        for pin in pins:
            store.run(PinWork(small(pin)))
    data = Path(database(folder)).read_bytes()
    with open(database(folder), "r+b") as file:
        for amid in (keys[50].encode(), pins[50]):
            file.seek(data.index(amid) // 4096 * 4096)
            file.write(b"\xff" * 4096)
    said, last = repaired(folder)
    assert last["repaired"] == {"frames": 100}
    for name in ("answers to keys", "put there without a frame"):
        assert [each for each in said if each.startswith("some of") and name in each]
    after = counts(folder)
    assert 80 < after["answered"] < 100 and 80 < after["pin"] < 100
    with opened(folder) as store:
        assert problems(store) == []
        made = all_ids(store)
        for n in (0, 99):
            assert add(store, "t", key=keys[n]) == made[n]
            assert b"".join(store.content(small(pins[n]).hash)[1]) == pins[n]


def test_what_has_lost_its_last_page_is_repaired_as_far_as_it_is_there(folder: str) -> None:
    with opened(folder) as store:
        add_all(store, [Append(f"t.{n % 7}", small(b"%d" % n)) for n in range(100)])
        before = lines_of(store)
    pages = os.path.getsize(database(folder)) // 4096
    for left in (pages - 1, pages - 4):
        os.truncate(database(folder), left * 4096)
        repaired(folder)
        with opened(folder) as store:
            assert problems(store) == [] and set(lines_of(store)) <= set(before)
            assert len(lines_of(store)) > 50 or left < pages - 1


def test_a_run_of_which_there_is_but_the_first_frame_stays_one_without_an_end(folder: str) -> None:
    with opened(folder) as store:
        run = store.runs.begin(Append("begun", None))
        run.write(b"part")
        (first,) = all_ids(store)
        add(store, "by.hand", b"part", meta='{"more":true}')
        shutil.copytree(folder, f"{folder}-2")  # as it is when its writer is killed
    folder += "-2"
    with contextlib.closing(sqlite3.connect(database(folder))) as db, db:
        db.execute("INSERT INTO below VALUES (1, 1)")
    assert len(repaired(folder)[0]) == 1  # of the row that only an index has
    with opened(folder) as store:
        assert problems(store) == []
        with pytest.raises(BrokenBody, match="has no end"):
            read_in_pieces(store, first)
        (by_hand,) = all_ids(store, topic="by.hand")
        assert read_in_pieces(store, by_hand) == b"part"


def test_what_lies_around_a_page_that_can_not_be_read_is_found_at_once_however_old(
    folder: str,
) -> None:
    clock = Clock()
    store = Store(folder, exclusive=True, create=True, clock=clock)
    for n in range(100):
        add(store, "t", b"%d" % n * 500)
        clock.now += 86_400_000
    before = all_ids(store)
    store.close()
    data = Path(database(folder)).read_bytes()
    pages = [at for at in range(0, len(data), 4096) if b'"topic":"t"' in data[at : at + 4096]]
    with open(database(folder), "r+b") as file:
        file.seek(pages[20])
        file.write(b"\xff" * 4096)
    said, _ = repaired(folder)
    with opened(folder) as store:
        assert problems(store) == []
        after = all_ids(store)
    # Those of the page are named, and one line is about what is not known of.
    assert set(after) < set(before) and len(said) == len(before) - len(after) + 1 < 20


def test_tables_that_disagree_are_made_anew(folder: str) -> None:
    with opened(folder) as store:
        add(store, "a.b", b"x")
        before = everything(store)
    with contextlib.closing(sqlite3.connect(database(folder))) as db:
        db.execute("DELETE FROM below")
        db.commit()
    assert repaired(folder)[0] == []
    with opened(folder) as store:
        assert problems(store) == [] and everything(store) == before
        assert all_ids(store, topic="a.*") == [before[0][0]]


def in_pieces(store: Store) -> list[str]:
    """A content in a first frame and four pieces; the ids of all, and another one like it."""
    for _ in range(2):
        run = store.runs.begin(Append("a.b", None))  # not by time, as what gathers blocks does
        for n in range(4):
            run.write(b"%d" % n * 16384)
        run.end(b"4" * 16384)
    return all_ids(store)


def read_in_pieces(store: Store, first: str) -> bytes:
    return b"".join(chunked.content(store, ids.parse(first))[1])


def test_a_content_that_has_lost_a_piece_never_ends_well(folder: str) -> None:
    with opened(folder) as store:
        first, _, lost, *_, end, other = (made := in_pieces(store))[:6]
        lines = dict(zip(made, lines_of(store)))
        whole = read_in_pieces(store, first)
    with contextlib.closing(sqlite3.connect(database(folder))) as db:
        (row,) = db.execute("SELECT row FROM piece WHERE instr(json, ?)", (lost,)).fetchone()
        for table in ("piece", "listed"):
            db.execute(f"DELETE FROM {table} WHERE row = ?", (row,))
        db.commit()
    with opened(folder) as store:
        with pytest.raises(Damaged, match="not all of its pieces"):
            read_in_pieces(store, first)
        assert any("a run has lost pieces" in each for each in problems(store))
    assert repaired(folder)[0] == [f"{end} on a.b: the content that it ends has lost 1 pieces"]
    assert Path(aside(folder), "frames.jsonl").read_bytes() == lines[end] + b"\n"
    with opened(folder) as store:
        assert problems(store) == []
        with pytest.raises(BrokenBody, match="has no end"):
            read_in_pieces(store, first)
        assert read_in_pieces(store, other) == whole
    with Client(Local(folder)) as client:  # from a copy, in any order
        for each, data in ((end, b"4"), (lost, b"2")):
            content = {"content_base64": base64.b64encode(data * 16384).decode()}
            client.import_([{**json.loads(lines[each]), **content}])
    with opened(folder) as store:
        assert read_in_pieces(store, first) == whole and problems(store) == []


def test_a_content_whose_list_of_pieces_lacks_one_breaks_off_and_is_repaired(folder: str) -> None:
    with opened(folder) as store:
        first, _, lost, *_ = in_pieces(store)
        whole = read_in_pieces(store, first)
    with contextlib.closing(sqlite3.connect(database(folder))) as db:
        (row,) = db.execute("SELECT row FROM piece WHERE instr(json, ?)", (lost,)).fetchone()
        db.execute("DROP INDEX piece_run")
        declared = "CREATE INDEX piece_run ON piece (run)"
        db.execute(f"{declared} WHERE row != {row}")
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'piece_run'", (declared,))
        db.commit()
    with opened(folder) as store:
        with pytest.raises(Damaged, match="not all of its pieces"):
            read_in_pieces(store, first)
        assert problems(store)
    assert repaired(folder)[0] == []
    with opened(folder) as store:
        assert read_in_pieces(store, first) == whole and problems(store) == []


def test_a_repair_that_broke_off_is_finished_by_the_next(folder: str) -> None:
    with opened(folder) as store:
        add(store, "a", b"x")
        before = everything(store)
    os.rename(database(folder), database(folder) + ".new")  # between the last two steps
    with pytest.raises(XsError):
        Store(folder, exclusive=True, create=True)
    assert repaired(folder)[0] == []
    with opened(folder) as store:
        assert everything(store) == before


def test_a_store_that_is_served_is_not_repaired(server: Server) -> None:
    with pytest.raises(Locked, match=r"is served by process .*: stop that first"):
        repaired(server.directory)


def test_what_is_no_database_any_more_is_said_so_and_left(folder: str) -> None:
    with opened(folder) as store:
        add(store, "a")
    with open(database(folder), "r+b") as file:
        file.write(b"\0" * 100)
    with pytest.raises(NotAStore):
        repaired(folder)
    assert not [name for name in os.listdir(folder) if name.startswith("aside")]


def test_the_command_repairs_and_says_what_was_lost(folder: str, run_xs: Any) -> None:
    with opened(folder) as store:
        add(store, "a", LARGE)
        (digest,) = store.cas.digests()
        store.cas.remove(digest)
    assert run_xs(["check", folder]).returncode == 1
    done = run_xs(["check", "--repair", folder])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["lost"] == 1
    assert run_xs(["check", folder]).returncode == 0


@pytest.mark.parametrize("is_there", [True, False])
def test_a_new_database_that_is_not_whole_in_its_file_takes_no_place(
    folder: str, is_there: bool
) -> None:
    """While somebody reads it, a part of it stays in its log, which would not go with it.

    A repair that fails leaves nothing behind but contents that it has put aside.
    """
    with opened(folder) as store:
        add(store, "a", LARGE)
        add(store, "b", b"kept")
        (digest,) = store.cas.digests()
        if is_there:
            Path(store.cas._path(digest)).write_bytes(b"damaged")
        else:
            store.cas.remove(digest)
        before = all_ids(store)
    names = {*os.listdir(folder), "xs.db-wal", "xs.db-shm"}
    saying = repair.run(folder)
    for line in saying:
        if b"is not there" in line:
            break
    with contextlib.closing(sqlite3.connect(os.path.join(folder, "repair", "xs.db"))) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM frame").fetchone()
        with pytest.raises(
            Damaged, match="could not be closed in good order; nothing was"
        ) as error:
            list(saying)
    left = {Path(aside(folder)).name} if is_there else set()
    assert set(os.listdir(folder)) - names == left
    assert all(f"is in {name}" in str(error.value) for name in left)
    if is_there:
        shutil.rmtree(aside(folder))
    with opened(folder) as store:
        assert all_ids(store) == before
    said, _ = repaired(folder)
    assert len(said) == 1
    with opened(folder) as store:
        assert problems(store) == [] and all_ids(store) == before[1:]


def test_a_content_without_a_frame_that_is_damaged_is_named_not_spread_and_mended_when_put_again(
    folder: str,
) -> None:
    wanted = imported(ids.parse("03hagh" + "0" * 19), "a", b"pinned")
    hash_ = wanted.hash or ""
    with opened(folder) as store:
        store.run(PinWork(small(b"pinned")))
    overwrite(database(folder), b"pinned", b"pinneD")
    shutil.copytree(folder, f"{folder}-2")
    with opened(folder) as store:
        assert [each for each in problems(store) if hash_ in each]
        with pytest.raises(Damaged, match="its bytes don't match"):
            store.content(hash_)
        (error,) = import_all(store, [wanted._replace(content=None)])
        assert isinstance(error, Damaged) and all_ids(store) == []
        store.run(PinWork(small(b"pinned")))
        assert problems(store) == [] and b"".join(store.content(hash_)[1]) == b"pinned"
        (line,) = import_all(store, [wanted._replace(content=None)])
        assert content(store, frame.id_of(line)) == b"pinned"
    with opened(f"{folder}-2") as store:
        import_all(store, [wanted])
        assert b"".join(store.content(hash_)[1]) == b"pinned"  # of the frame
    (lost,), _ = repaired(f"{folder}-2")
    assert hash_ in lost


def test_content_that_comes_with_an_import_mends_what_is_damaged_of_its_frames(
    folder: str, run_xs: Any
) -> None:
    with opened(folder) as store:
        add(store, "a", b"small content")
        add(store, "a", LARGE)
        chunked.append(store, Append("run"), [b"first piece"])
        before = everything(store)
    copied = run_xs(["cat", folder, "--with-content"]).stdout
    assert run_xs(["export", folder, f"{folder}-export"]).returncode == 0
    overwrite(database(folder), b"small content", b"smalL content")
    overwrite(database(folder), b"first piece", b"firsT piece")
    with opened(folder) as store:
        (digest,) = store.cas.digests()
        Path(store.cas._path(digest)).write_bytes(b"damaged")
        assert len(problems(store)) == 3
    shutil.copytree(folder, f"{folder}-2")
    assert run_xs(["import", folder], stdin=copied).returncode == 0
    assert run_xs(["import", f"{folder}-2", f"{folder}-export"]).returncode == 0
    for mended in (folder, f"{folder}-2"):
        with opened(mended) as store:
            assert problems(store) == [] and everything(store) == before
    wrong = json.loads(copied.splitlines()[0])
    with Client(Local(folder)) as client:
        said = client.import_([{**wrong, "content": "another"}])
    assert "does not match its hash" in str(said)


def test_frames_whose_page_is_out_of_order_are_all_found(folder: str) -> None:
    """A search by their rows would miss some of them."""
    with opened(folder) as store:
        add_all(store, [Append("t", None, f'"{n}"') for n in range(9)])
        before = lines_of(store)
    with contextlib.closing(sqlite3.connect(database(folder))) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'frame'").fetchone()
    with open(database(folder), "r+b") as file:
        file.seek((page - 1) * 4096 + 8)  # behind the page's head: where each row is
        places = file.read(2 * 9)
        file.seek(-len(places), os.SEEK_CUR)
        file.write(places[-2:] + places[2:-2] + places[:2])
    assert repaired(folder)[0] == []
    with opened(folder) as store:
        assert problems(store) == [] and lines_of(store) == before


# ---- Any byte ----------------------------------------------------------------------------------


def with_all_kinds(folder: str) -> list[bytes]:
    """Makes a store that has something in every table; its frames."""
    with opened(folder) as store:
        for n in range(12):
            add(store, f"topic.{n % 3}", b"%d" % n, key=f"key {n}")
            store.run(PinWork(small(b"pin %d" % n)))
        add(store, "large", LARGE)
        chunked.append(store, Append("run.in.pieces"), [b"one ", b"two ", b"end"])
        made = all_ids(store)

        class Keep(PinWork):
            def apply(self, commit: Any) -> Any:
                for each in made[:4]:
                    commit.writer.keep_script(Script("handler", "h", each, True, each, "{}"))
                commit.writer.raise_mark(ids.parse(made[-1]) + 1)

        store.run(Keep(small(b"")))
        return lines_of(store)


def counts(folder: str) -> dict[str, int]:
    """How many rows there are of what is no frame."""
    with contextlib.closing(sqlite3.connect(database(folder))) as db:
        return {
            table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("answered", "pin", "script", "mark", "run")
        }


def repaired_with(folder: str, data: bytes, at: int, byte: int) -> tuple[list[bytes], list[str]]:
    """The frames of a store after its repair, when a byte of its database was another one.

    And what was said to be lost. It has to be whole then.
    """
    Path(database(folder)).write_bytes(data[:at] + bytes([byte]) + data[at + 1 :])
    before = []
    with contextlib.suppress(Damaged), opened(folder) as store:
        before = problems(store)
        if not before:
            return lines_of(store), []
    said, last = repaired(folder)
    assert last["lost"] == len(said), (at, byte)
    shutil.rmtree(last["aside"])
    with opened(folder) as store:
        assert problems(store) == [], (at, byte, before)
        return lines_of(store), said


def test_whatever_byte_is_another_one_of_what_is_no_frame_a_repair_keeps_all_frames(
    folder: str,
) -> None:
    frames = with_all_kinds(folder)
    before = counts(folder)
    data = Path(database(folder)).read_bytes()
    with contextlib.closing(sqlite3.connect(database(folder))) as db:
        roots = db.execute(
            "SELECT rootpage FROM sqlite_master WHERE tbl_name IN "
            "('answered', 'pin', 'script', 'mark', 'topic', 'run', 'listed', 'below', 'file')"
        ).fetchall()
    chance = random.Random(1)
    for (page,) in roots:
        start = (page - 1) * 4096
        used = [at for at in range(start, start + 4096) if data[at]]
        for at in chance.sample(used, 2):
            byte = data[at] ^ chance.randrange(1, 256)
            found, said = repaired_with(folder, data, at, byte)
            assert found == frames, (at, byte, said)
            assert said or counts(folder) == before, (at, byte)


def test_whatever_byte_is_another_one_a_repair_leaves_a_whole_store_and_tells_what_is_lost(
    folder: str,
) -> None:
    frames = with_all_kinds(folder)
    before = counts(folder)
    data = Path(database(folder)).read_bytes()
    chance = random.Random(2)
    used = [at for at, byte in enumerate(data) if byte and at >= 4096]
    for at in chance.sample(used, 15):
        byte = data[at] ^ chance.randrange(1, 256)
        found, said = repaired_with(folder, data, at, byte)
        assert set(found) <= set(frames), (at, byte)
        assert said or (found, counts(folder)) == (frames, before), (at, byte)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE answered SET key = CAST(key AS BLOB) WHERE key = 'key 3'", "key"),
        ("UPDATE answered SET json = CAST(json AS BLOB), sum = 'x' WHERE key = 'key 3'", "key 3"),
        ("UPDATE pin SET digest = 'text' WHERE rowid = 2", "put there"),
        ("UPDATE pin SET created = 'text' WHERE rowid = 2", "put there"),
        ("UPDATE pin SET content = 7 WHERE rowid = 2", "put there"),
        (
            "UPDATE script SET position = 7 WHERE source = (SELECT min(source) FROM script)",
            "script h",
        ),
    ],
)
def test_a_row_with_values_of_another_type_is_named_and_left_out_by_a_repair(
    folder: str, change: str, said: str
) -> None:
    frames = with_all_kinds(folder)
    before = counts(folder)
    with contextlib.closing(sqlite3.connect(database(folder))) as db, db:
        db.execute(change)
    with opened(folder) as store:
        assert problems(store) != []
    (line,), _ = repaired(folder)
    assert said in line
    with opened(folder) as store:
        assert problems(store) == [] and lines_of(store) == frames
    after = counts(folder)
    assert sum(before.values()) - sum(after.values()) == 1


def test_a_topic_with_another_byte_costs_neither_its_frames_nor_their_keys(folder: str) -> None:
    frames = with_all_kinds(folder)
    before = counts(folder)
    with contextlib.closing(sqlite3.connect(database(folder))) as db, db:
        db.execute("UPDATE topic SET name = 'topic.q' WHERE name = 'topic.1'")
    assert repaired(folder)[0] == []
    with opened(folder) as store:
        assert problems(store) == [] and lines_of(store) == frames
        assert add(store, "topic.1", key="key 1") in frames[1].decode()
    assert counts(folder) == before


@pytest.mark.parametrize("mark", ["!!", "z" * 25, b"\xff", 7])
def test_a_mark_that_is_no_id_is_named_hinders_no_reader_and_is_left_out_by_a_repair(
    folder: str, mark: Any
) -> None:
    with opened(folder) as store:
        kept = add(store, "a")
    with contextlib.closing(sqlite3.connect(os.path.join(folder, "xs.db"))) as db, db:
        db.execute("INSERT OR REPLACE INTO mark VALUES (1, ?)", (mark,))
    with opened(folder) as store:
        assert all_ids(store) == [kept]
        assert [each for each in problems(store) if "mark" in each]
        with pytest.raises(Damaged, match="mark"):
            add(store, "a")
    lost, _ = repaired(folder)
    assert [each for each in lost if "mark" in each]
    with opened(folder) as store:
        assert problems(store) == []
        more = add(store, "a")
        assert all_ids(store) == [kept, more]
