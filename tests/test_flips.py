"""A byte of the database is another one: no reader is ever given what was not stored.

A small store has something in every table. Bytes of its file are changed, one at a time, and it is
read in every way there is: without a server, and through one that has the frames in no cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

import pytest
from conftest import DEADLINE, Server, start_server
from handling import Stream, program
from stores import NOON, Clock, add, add_all, all_ids, problems, remove

from xs import chunked, frame, repair, schema, sums
from xs.commit import Append
from xs.content import small
from xs.errors import BrokenBody, Damaged, XsError
from xs.expiry import SweepWork
from xs.local import Local
from xs.salvage import Salvage
from xs.store import Store
from xs.transport import HttpTransport
from xs.work import PinWork

LARGE = b"large " * 5000
FROM_START = {"run-from": "start"}


class Answer(NamedTuple):
    """What came of a request: its status, its body as far as it came, and if that was all of it."""

    status: int
    body: bytes
    is_whole: bool

    @property
    def lines(self) -> list[bytes]:
        return self.body.splitlines()


class Flipped(NamedTuple):
    """A store, its database as it was made, and the right answer to everything."""

    folder: str
    data: bytes
    answers: dict[str, Answer]
    ids: list[str]

    @property
    def path(self) -> str:
        return os.path.join(self.folder, "xs.db")

    def flip(self, at: int, bits: int) -> None:
        data = bytearray(self.data)
        data[at] ^= bits
        Path(self.path).write_bytes(data)

    def read_all(self) -> Union[dict[str, Answer], XsError]:
        """The answer to each request, or why the store can't be opened."""
        try:
            store = Local(self.folder)
        except XsError as error:
            return error
        try:
            return {target: asked(store.request("GET", target)) for target in self.answers}
        finally:
            store.close()

    def problems(self) -> list[str]:
        try:
            store = Store(self.folder)
        except XsError as error:
            return [str(error)]
        try:
            return problems(store)
        except XsError as error:
            return [str(error)]
        finally:
            store.close()


def asked(response: Any) -> Answer:
    body = []
    try:
        for block in response:
            body.append(block)
    except BrokenBody:
        return Answer(response.status, b"".join(body), False)
    return Answer(response.status, b"".join(body), True)


def fill(store: Store) -> None:
    # Many in one millisecond, where a look-up has to search.
    add_all(store, [Append(f"many.t{n % 3}", small(b"%d" % n)) for n in range(40)])
    add(store, "a", b"first", meta='{"n":1}', key="one")
    add(store, "a.b", b"in the middle " * 20, ttl="last:5")
    add(store, "a.b.c", LARGE)
    add(store, "a.b.c", b"kept for long", ttl="time:999999999999")
    add(store, "large", b"x", meta=json.dumps("m" * 6000))
    chunked.append(store, Append("run.in.pieces"), [b"one ", b"two ", LARGE, b"end"])
    add(store, "plain")
    store.run(PinWork(small(b"pinned")))


def requests(found: list[str]) -> list[str]:
    """Requests that read a store with those ids."""
    wanted = [
        "/", "/?with-content=true", "/?with-timestamp=true", "/?no-chunks=true", "/?limit=3",
        "/?last=7", "/?last=100", f"/?after={found[17]}", f"/?after={found[17]}&until={found[44]}",
        "/?topic=a", "/?topic=a.*", "/?topic=many.t1", "/?topic=many.*&with-content=true",
        "/?topic=a,many.t2,run.*", "/?topic=run.in.*", "/?topic=run.in.pieces", "/?topic=large",
        "/?topic=a.b.c&last=1", "/first", "/last", "/last/a", "/last/a.*", "/last/many.*?last=3",
        "/last/a.b.c", "/last/run.in.pieces", "/first/many.t2", "/last/plain",
    ]  # fmt: skip
    for each in [*found[:40:13], *found[40:]]:
        wanted += [f"/{each}", f"/content/{each}", f"/next/{each}", f"/prev/{each}"]
    return [*wanted, f"/next/{found[20]}?topic=a", f"/prev/{found[44]}?topic=many.t0"]


@pytest.fixture
def flipped(store_dir: str) -> Iterator[Flipped]:
    store = Store(store_dir, create=True)
    fill(store)
    found = all_ids(store)
    store.close()
    unread = Flipped(store_dir, Path(store_dir, "xs.db").read_bytes(), {}, found)
    unread.answers.update(dict.fromkeys(requests(found), Answer(0, b"", True)))
    answers = unread.read_all()
    assert isinstance(answers, dict)
    yield unread._replace(answers=answers)


def is_cut(target: str, answer: Answer, whole: Answer) -> bool:
    """Whether an answer is the right one, or that up to the end of some line, and then an error."""
    if answer == whole or answer.status >= 400:
        return True
    ends_well = answer.body == b"" or answer.body.endswith(b"\n") or "/content/" in target
    return ends_well and whole.body.startswith(answer.body) and not answer.is_whole


def is_stored(target: str, answer: Answer, flipped: Flipped) -> bool:
    """Whether an answer has nothing in it but what is stored, as it was stored."""
    whole = flipped.answers[target]
    if answer == whole or answer.status >= 400:
        return True
    if "/content/" in target:
        return not answer.is_whole and whole.body.startswith(answer.body)
    return {line for each in flipped.answers.values() for line in each.lines}.issuperset(
        answer.lines
    )


def place(data: bytes, line: bytes) -> tuple[int, int]:
    """Where in the file a line is that lies there in one piece."""
    assert data.count(line) == 1
    return data.index(line), data.index(line) + len(line)


@pytest.mark.parametrize("number", [20, 41, 46])  # amid a millisecond, with a ttl, a piece
def test_a_frame_with_another_byte_is_never_served_and_costs_no_other(
    flipped: Flipped, number: int
) -> None:
    bits = random.Random(number)
    lines = flipped.answers["/"].lines
    own = flipped.ids[number]
    start, end = place(flipped.data, lines[number])
    for at in range(start, end, 2):
        flipped.flip(at, 1 << bits.randrange(8))
        answers = flipped.read_all()
        assert isinstance(answers, dict), at
        for target, answer in answers.items():
            assert is_cut(target, answer, flipped.answers[target]), (at, target, answer)
            if target[1:] in flipped.ids and target[1:] != own:
                assert answer == flipped.answers[target], (at, target, answer)
        # All that precedes it is given, and then it is said that it is damaged.
        assert answers["/"].lines == lines[:number] and not answers["/"].is_whole
        assert flipped.problems(), at


def test_a_lone_frame_whose_columns_are_others_is_never_served(store_dir: str) -> None:
    """The bytes before its JSON say where each column lies, and of which type it is."""
    store = Store(store_dir, create=True)
    (line,) = add_all(store, [Append("a", small(b"content"))])
    store.close()
    data = Path(store_dir, "xs.db").read_bytes()
    alone = Flipped(store_dir, data, {"/": Answer(200, line + b"\n", True)}, [])
    start = place(data, line)[0]
    for at in range(start - 24, start):
        for bits in {data[at], 1, 2, 0x80, 0xFF} - {0}:
            alone.flip(at, bits)
            answers = alone.read_all()
            if isinstance(answers, dict):
                assert is_stored("/", answers["/"], alone), (at, bits, answers)
            if answers != alone.answers:
                assert alone.problems(), (at, bits)


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_byte_of_the_database_is_another_one_only_what_was_stored_is_served(
    flipped: Flipped, seed: int
) -> None:
    random_bits = random.Random(seed)
    used = [at for at, byte in enumerate(flipped.data) if byte]
    for _ in range(100):
        at, bits = random_bits.choice(used), random_bits.randrange(1, 256)
        flipped.flip(at, bits)
        answers = flipped.read_all()
        if isinstance(answers, dict):
            for target, answer in answers.items():
                assert is_stored(target, answer, flipped), (at, bits, target, answer)
        if answers != flipped.answers:
            assert flipped.problems(), (at, bits)


@pytest.mark.parametrize(
    "table",
    [
        "below",
        "listed",
        "run",
        "sqlite_autoindex_run_1",
        "file",
        "piece",
        "piece_run",
        "topic",
        "mark",
    ],
)
def test_tables_with_another_byte_give_no_other_frames_and_are_named(
    flipped: Flipped, table: str
) -> None:
    random_bits = random.Random(table)
    with contextlib.closing(sqlite3.connect(flipped.path)) as db:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        (page,) = db.execute(query, (table,)).fetchone()
    used = [at for at in range((page - 1) * 4096, page * 4096) if flipped.data[at]]
    for at in random_bits.sample(used, min(len(used), 40)):
        bits = random_bits.randrange(1, 256)
        flipped.flip(at, bits)
        answers = flipped.read_all()
        if isinstance(answers, dict):
            for target, answer in answers.items():
                assert is_stored(target, answer, flipped), (at, bits, target, answer)
        if answers != flipped.answers:
            assert flipped.problems(), (at, bits)


@pytest.mark.parametrize("number", [20, 41, 46])
def test_a_repair_puts_a_frame_with_another_byte_aside_and_names_it(
    flipped: Flipped, number: int
) -> None:
    lines = flipped.answers["/"].lines
    flipped.flip(place(flipped.data, lines[number])[1] - 4, 1)  # in its ttl, which it changes
    *said, last = map(json.loads, repair.run(flipped.folder))
    lost = [each["lost"] for each in said if "lost" in each]
    if number < 46:
        assert len(lost) == 1 and f"on {frame.topic_of(lines[number])}: it is not what" in lost[0]
    assert last["repaired"]["frames"] == len(lines) - len(lost)
    assert flipped.problems() == []
    (aside,) = Path(flipped.folder).glob("aside-*/frames.jsonl")
    assert len(aside.read_bytes().splitlines()) == len(lost)


# ---- Through a server --------------------------------------------------------------------------


@pytest.fixture
def served(flipped: Flipped) -> Iterator[tuple[Flipped, Server, int]]:
    """A server of a store in which a frame was damaged while it ran; that frame's number."""
    number = 20
    running = start_server(flipped.folder)
    answers = flipped.read_all()  # by this process: the server has read its newest frame alone
    assert isinstance(answers, dict)
    flipped = flipped._replace(answers=answers)
    end = place(flipped.data, flipped.answers["/"].lines[number])[1]
    with open(flipped.path, "r+b") as file:
        file.seek(end - 60)
        byte = file.read(1)[0]
        file.seek(end - 60)
        file.write(bytes([byte ^ 1]))
    yield flipped, running, number
    running.stop()


def test_a_byte_that_changes_beneath_a_server_never_comes_out(
    served: tuple[Flipped, Server, int], run_xs: Any
) -> None:
    flipped, running, number = served
    lines = flipped.answers["/"].lines
    transport = HttpTransport(("unix", f"{running.directory}/sock"), timeout=DEADLINE)
    for target, whole in flipped.answers.items():
        answer = asked(transport.request("GET", target))
        assert is_cut(target, answer, whole), (target, answer)
    own = asked(transport.request("GET", f"/{flipped.ids[number]}"))
    assert own.status == 500 and b"on many.t2 is damaged" in own.body
    before = b"".join(line + b"\n" for line in lines[:number])
    assert asked(transport.request("GET", "/?follow=true")) == Answer(200, before, False)
    events = asked(transport.request("GET", "/?follow=true", [("accept", "text/event-stream")]))
    told = [line[6:] for line in events.lines if line.startswith(b"data: ")]
    assert told == lines[:number] and not events.is_whole
    after = flipped.ids[number - 1]
    broken = asked(transport.request("GET", f"/?follow=true&after={after}"))
    assert (broken.body, broken.is_whole) == (b"", False)
    transport.close()
    out = f"{running.directory}-out"
    exported = run_xs(["export", running.directory, out])
    assert exported.returncode == 1 and b"not whole" in exported.stderr
    assert not os.path.exists(os.path.join(out, "frames.jsonl"))
    checked = run_xs(["check", running.directory])
    assert checked.returncode == 1 and flipped.ids[number].encode() in checked.stdout
    copied = run_xs(["backup", running.directory, f"{running.directory}-copy"])
    assert copied.returncode == 1 and b"is not what was stored" in copied.stderr


@pytest.mark.parametrize("content", [False, True])
def test_a_handler_is_given_what_precedes_a_damaged_frame_and_goes_on_when_that_is_mended(
    store_dir: str, content: bool
) -> None:
    stream = Stream(store_dir)
    values = stream.add_all([("in", b"x", {"name": name}) for name in ("one", "two", "three")])
    stream.stop()
    path = Path(store_dir, "xs.db")
    data = path.read_bytes()
    assert data.count(b'"name": "two"') == 1
    path.write_bytes(data.replace(b'"name": "two"', b'"name": "twa"'))
    stream.start()
    text = "for given in frames(): answer({'out': given['frame']['meta']['name']})"
    stream.add("seen.register", program(text), {"topic": "in", "content": content, **FROM_START})
    damaged = "on in is damaged"
    stream.wait(lambda: any(damaged in line for line in stream.logged), "it says what is damaged")
    stream.wait(lambda: stream.contents("seen") == ["one"], "what precedes it is answered")
    stream.stop()
    data = path.read_bytes()
    assert data.count(b'"name": "twa"') == 1
    path.write_bytes(data.replace(b'"name": "twa"', b'"name": "two"'))
    stream.start()
    stream.wait_for("seen", 3)
    assert stream.contents("seen") == ["one", "two", "three"]
    assert stream.causes("seen") == values
    stream.close()


# ---- What is removed, and what is copied -------------------------------------------------------


def test_a_frame_that_seems_to_have_expired_by_damage_is_not_removed(store_dir: str) -> None:
    clock = Clock()
    store = Store(store_dir, exclusive=True, create=True, clock=clock)
    kept, gone = add(store, "a"), add(store, "a", ttl="time:1000")
    last = add(store, "a")
    store.close()
    with contextlib.closing(sqlite3.connect(f"{store_dir}/xs.db")) as db:
        db.execute("UPDATE frame SET expires = 0 WHERE instr(json, ?)", (kept,))
        db.commit()
    clock.now += 5000
    store = Store(store_dir, exclusive=True, clock=clock)
    assert store.run(SweepWork()) == 1
    assert len(problems(store)) == 1 and kept in problems(store)[0]
    store.close()
    *_, summary = map(json.loads, repair.run(store_dir))
    assert (summary["repaired"], summary["lost"]) == ({"frames": 2}, 0)
    store = Store(store_dir)
    assert all_ids(store) == [kept, last] and gone not in all_ids(store)
    store.close()


def test_a_damaged_frame_is_not_removed_nor_does_it_hinder_what_is_appended(store_dir: str) -> None:
    store = Store(store_dir, create=True)
    first = add(store, "a", meta='"first"')
    store.close()
    with contextlib.closing(sqlite3.connect(f"{store_dir}/xs.db")) as db:
        db.execute("UPDATE frame SET json = replace(json, 'first', 'worst')")
        db.commit()
    store = Store(store_dir)
    with pytest.raises(Damaged, match="on a is damaged"):
        remove(store, first)
    made = [add(store, "a", ttl="last:1") for _ in range(3)]
    assert made == sorted(made) and made[0] > first
    with pytest.raises(Damaged):
        all_ids(store)
    assert frame.id_of(store.index.last(None, NOON) or b"") == made[-1]
    with pytest.raises(Damaged):
        store.index.first(None, NOON)
    store.close()


def leave_run(store_dir: str, *, ended: bool, **more: Any) -> list[str]:
    """Makes a store with a run of three frames; their ids. `ended`, or its writer was killed."""
    store = Store(store_dir, create=True, clock=Clock())
    add(store, "before")
    run = store.runs.begin(Append("run.r", **more))
    for n in range(3):
        run.write(b"%d" % n)
    if ended:
        run.end(b"end")
    found = all_ids(store, topic="run.r")
    store.close()
    return found


def damage_frame(store_dir: str, id_text: str) -> None:
    with contextlib.closing(sqlite3.connect(f"{store_dir}/xs.db")) as db:
        for table in schema.TABLES_OF_FRAMES:
            where = f'instr(json, \'"id":"{id_text}\') > 0'
            db.execute(f"UPDATE {table} SET json = replace(json, 'run.r', 'run.q') WHERE {where}")
        assert db.total_changes == 1
        db.commit()


def rows_of_frames(store_dir: str) -> list[Any]:
    """What the tables have of frames and runs."""
    with contextlib.closing(sqlite3.connect(f"{store_dir}/xs.db")) as db:
        return [
            sorted(db.execute(f"SELECT * FROM {table}").fetchall(), key=repr)
            for table in (*schema.TABLES_WITH_ROWS, "answered")
        ]


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_damaged_frame_of_a_run_that_nobody_goes_on_with_hinders_no_append(
    store_dir: str, which: int
) -> None:
    run = leave_run(store_dir, ended=False)
    damage_frame(store_dir, run[which])
    store = Store(store_dir, clock=Clock())
    made = [add(store, "other") for _ in range(2)]
    store.close()
    server = Store(store_dir, exclusive=True, clock=Clock())
    server.runs.end_abandoned()  # as a server does before it serves
    made.append(add(server, "other"))
    assert all_ids(server, topic="other") == made
    server.refuse_more(Append("last"))
    server.close()
    *_, summary = map(json.loads, repair.run(store_dir))
    assert "lost" in summary
    store = Store(store_dir, clock=Clock())
    made.append(add(store, "other"))
    assert all_ids(store, topic="other") == made
    assert problems(store) == []
    store.close()


@pytest.mark.parametrize("way", ["removed", "expired", "superseded"])
@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_run_of_which_a_frame_is_damaged_stays_as_a_whole(
    store_dir: str, way: str, which: int
) -> None:
    run = leave_run(store_dir, ended=True, ttl="time:1000" if way == "expired" else "last:1")
    damage_frame(store_dir, run[which])
    before = rows_of_frames(store_dir)
    clock = Clock()
    store = Store(store_dir, exclusive=True, clock=clock)
    if way == "removed":
        with pytest.raises(Damaged, match=r"on run\.r is damaged"):
            remove(store, run[0])
    elif way == "expired":
        clock.now += 5000
        assert store.run(SweepWork()) == 0
    else:
        remove(store, add(store, "run.r", ttl="last:1"))
    assert rows_of_frames(store_dir) == before
    found = problems(store)
    assert found and not any("no first frame" in each for each in found)
    store.close()
    clock.now = NOON
    list(repair.run(store_dir))
    store = Store(store_dir, clock=clock)
    left = [each for each in run if each != run[which]]
    if which == 1:
        left.pop()  # the end: without that piece it is not whole
    assert [each for each in all_ids(store) if each in run] == left
    assert problems(store) == []
    store.close()


def test_a_frame_that_is_listed_under_a_foreign_run_is_not_removed_with_it(store_dir: str) -> None:
    run = leave_run(store_dir, ended=True)
    store = Store(store_dir, clock=Clock())
    chunked.append(store, Append("other"), [b"1", b"2"])
    store.close()
    with contextlib.closing(sqlite3.connect(f"{store_dir}/xs.db")) as db:
        db.execute("UPDATE piece SET run = 1 WHERE run = 2")
        db.commit()
    before = rows_of_frames(store_dir)
    store = Store(store_dir, clock=Clock())
    with pytest.raises(Damaged):
        remove(store, run[0])
    store.close()
    assert rows_of_frames(store_dir) == before


def test_a_copy_that_is_whole_is_not_replaced_by_what_is_damaged(
    store_dir: str, run_xs: Any
) -> None:
    store = Store(store_dir, create=True)
    add(store, "a", meta='"first"')
    store.close()
    copy = f"{store_dir}-copy"
    assert run_xs(["backup", store_dir, copy]).returncode == 0
    with contextlib.closing(sqlite3.connect(f"{store_dir}/xs.db")) as db:
        db.execute("UPDATE frame SET json = replace(json, 'first', 'worst')")
        db.commit()
    refused = run_xs(["backup", store_dir, copy])
    assert refused.returncode == 1 and b"is not what was stored" in refused.stderr
    assert b'"first"' in run_xs(["cat", copy]).stdout


def test_an_answer_to_a_key_that_is_damaged_is_not_given(store_dir: str) -> None:
    store = Store(store_dir, create=True)
    add(store, "a", key="k", meta='"first"')
    store.close()
    with contextlib.closing(sqlite3.connect(f"{store_dir}/xs.db")) as db:
        db.execute("UPDATE answered SET json = replace(json, 'first', 'worst')")
        db.commit()
    store = Store(store_dir)
    with pytest.raises(Damaged, match="to the key k on a is damaged"):
        add(store, "a", key="k")
    assert any("key k" in each for each in problems(store))
    store.close()
    assert any("key k" in each.get("lost", "") for each in map(json.loads, repair.run(store_dir)))


@pytest.mark.parametrize(
    "other", [b"CREATE TABLE frame (\n    row INTEGER QRI", b"CREATE TABLE gra"]
)
def test_a_declaration_with_another_byte_is_not_taken_at_its_word_and_is_mended_by_a_repair(
    store_dir: str, other: bytes
) -> None:
    """As a column that is no key, `row` is empty in each row: the store would look empty."""
    store = Store(store_dir, create=True)
    made = add(store, "a", b"content")
    store.close()
    path = Path(store_dir, "xs.db")
    declared = b"CREATE TABLE frame (\n    row INTEGER PRIMARY"[: len(other)]
    assert path.read_bytes().count(declared) == 1
    path.write_bytes(path.read_bytes().replace(declared, other))
    with pytest.raises(Damaged, match=r"frame is not declared as it should be|malformed"):
        Store(store_dir)
    *_, last = map(json.loads, repair.run(store_dir))
    assert (last["repaired"], last["lost"]) == ({"frames": 1}, 0)
    store = Store(store_dir)
    assert problems(store) == [] and all_ids(store) == [made]
    store.close()


@pytest.mark.parametrize("log", [False, True])
def test_what_a_wrong_declaration_hides_ends_and_is_found(store_dir: str, log: bool) -> None:
    store = Store(store_dir, create=True)
    for n in range(3):
        add(store, "a", b"%d" % n)
    made = all_ids(store)
    store.close()
    path = os.path.join(store_dir, "xs.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as index:
        index.execute("PRAGMA writable_schema = ON")
        index.execute("UPDATE sqlite_master SET sql = replace(sql, 'json', 'jsom')")
    with contextlib.closing(Salvage(store_dir)) as old:
        assert [found.line for found in old.frames()] == [None] * 3
    if log:  # and what it has is damaged
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as index:
            for n in range(3):
                index.execute("INSERT INTO pin VALUES (?, 0, ?)", (bytes([n]) * 32, b""))
            shutil.copytree(store_dir, store_dir + ".killed")
        store_dir += ".killed"
        with open(os.path.join(store_dir, "xs.db-wal"), "r+b") as file:
            file.seek(4200)
            file.write(b"!" * 50)
    *_, last = map(json.loads, repair.run(store_dir))
    assert last["repaired"] == {"frames": 3}
    store = Store(store_dir)
    assert all_ids(store) == made
    store.close()


# ---- Sums, and stores that had none ------------------------------------------------------------


def test_the_first_sums_of_a_process_are_those_of_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "of", sums._of_first)
    monkeypatch.setattr(sums, "_left", 2048)
    chance = random.Random(1)
    for size in [0, 1, 2, 250, 300, *range(1200, 1500, 50)]:
        data = chance.randbytes(size)
        assert sums.of(data) == zlib.adler32(data)
    assert sums.of is zlib.adler32
    monkeypatch.setattr(sums, "of", sums._of_first)
    monkeypatch.setattr(sums, "_left", 100_000)
    assert sums.of(b"\xff" * 99_000) == zlib.adler32(b"\xff" * 99_000)


def test_a_page_with_any_other_byte_does_not_agree_with_its_lines_sums() -> None:
    lines = [b'{"topic":"a","id":"%d"}' % n for n in range(3)] + [b"\xff" * 70_000, b""]
    page = b"".join(line + b"\n" for line in lines)
    total = sum(zlib.adler32(line) & 0xFFFF for line in lines)
    assert sums.agree(page, total, len(lines))
    for at in [*range(70), *range(70, len(page), 9973)]:
        for bits in range(1, 256):
            other = page[:at] + bytes([page[at] ^ bits]) + page[at + 1 :]
            assert not sums.agree(other, total, len(lines)), (at, bits)
    assert not sums.agree(page[:-1], total, len(lines))
    assert not sums.agree(page, total, len(lines) - 1)


def to_format(version: int, path: str) -> None:
    """Makes a database what it was in format 3, before frames had sums, or later."""
    os.rename(path, f"{path}.new")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        schema.add_sum_of(db)
        for script in schema._MIGRATIONS[:version]:
            for statement in script.split(";\n"):
                db.execute(statement)
        db.execute("ATTACH ? AS made", (f"{path}.new",))
        tables = db.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'").fetchall()
        for (table,) in tables:
            found = db.execute(f"PRAGMA main.table_info({table})").fetchall()
            columns = ", ".join(name for _, name, *_ in found)
            db.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM made.{table}")
        db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {version}")
    os.unlink(f"{path}.new")


def test_a_store_without_sums_gets_them_and_keeps_everything(flipped: Flipped) -> None:
    to_format(3, flipped.path)
    assert flipped.read_all() == flipped.answers
    assert flipped.problems() == []
    with contextlib.closing(sqlite3.connect(flipped.path)) as db:
        for table in ("frame", "piece"):
            for total, line in db.execute(f"SELECT sum, CAST(json AS BLOB) FROM {table}"):
                assert total == zlib.adler32(line)
    store = Store(flipped.folder)
    before = all_ids(store)
    assert add(store, "a", key="one") in before  # what its key has made
    assert add(store, "a") > before[-1]
    assert problems(store) == []
    store.close()


def test_a_store_whose_runs_are_not_counted_gets_that_and_keeps_everything(
    flipped: Flipped,
) -> None:
    to_format(4, flipped.path)
    assert flipped.read_all() == flipped.answers
    assert flipped.problems() == []
    with contextlib.closing(sqlite3.connect(flipped.path)) as db:
        pieces = db.execute("SELECT count(*) FROM piece").fetchone()
        assert db.execute("SELECT pieces FROM run").fetchall() == [pieces]


def test_a_damaged_store_without_sums_is_repaired_as_far_as_it_can_be(flipped: Flipped) -> None:
    to_format(3, flipped.path)
    data = bytearray(Path(flipped.path).read_bytes())
    start, _ = place(data, flipped.answers["/"].lines[20])
    page = start // 4096 * 4096
    data[page : page + 4096] = b"\xff" * 4096
    Path(flipped.path).write_bytes(data)
    with pytest.raises(Damaged):
        Store(flipped.folder)
    *_, last = map(json.loads, repair.run(flipped.folder))
    assert 0 < last["repaired"]["frames"] < len(flipped.ids)
    assert flipped.problems() == []


def test_a_large_frame_is_known_by_its_bytes(store_dir: str) -> None:
    store = Store(store_dir, create=True)
    made = add(store, "a", meta=json.dumps("\u00e9" * 3000, ensure_ascii=False))
    assert problems(store) == []
    remove(store, made)
    assert problems(store) == []
    store.close()
