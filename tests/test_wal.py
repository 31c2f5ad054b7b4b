"""A damaged write-ahead log is never taken for one that ends sooner, and saved by a repair.

A real server is killed amid its log. What a power failure leaves is the same without `xs.db-shm`,
which says how far the log was committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import DEADLINE, XS, RunXs, Server, environment, start_server
from stores import add, all_ids, content, problems
from test_disk_faults import failing

import xs
from xs import repair, wal
from xs.connections import Connections
from xs.errors import Damaged, Full, NotAStore, Unavailable
from xs.store import Store

FRAME = 24 + 4096
SHM = "xs.db-shm"


class Killed(NamedTuple):
    """A store whose server was killed: what had been answered, and how the log grew by it."""

    folder: str
    answered: dict[str, bytes]  # contents by id, in order
    ends: list[int]  # the number of the last frame of each transaction

    def copied(self, tmp_path: Path, *, shm: bool) -> str:
        """A copy of it, with or without the memory that its processes shared."""
        target = str(tmp_path / "copy")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.folder, target, ignore=shutil.ignore_patterns("sock", "run"))
        if not shm:
            os.unlink(os.path.join(target, SHM))
        return target

    def before(self, frame: int) -> list[str]:
        """What had been answered when the log had fewer frames than that."""
        count = sum(end < frame for end in self.ends) - self.first
        return list(self.answered)[: max(0, count)]

    @property
    def first(self) -> int:
        """How many transactions there were before the first append."""
        return len(self.ends) - len(self.answered)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = str(tmp_path_factory.mktemp("killed") / "store")
    server = start_server(folder)
    answered: dict[str, bytes] = {}
    with xs.open(folder) as client:
        for n in range(50):
            data = b"%d " % n * (500 if n % 20 == 10 else 5)
            answered[client.append(f"topic.{n % 7}", data, meta={"n": n}).id] = data
    server.process.kill()
    server.process.communicate()
    log = Path(log_of(folder)).read_bytes()
    salts = log[16:24]
    heads = [log[at : at + 24] for at in range(32, len(log) - FRAME + 1, FRAME)]
    ends = [n for n, head in enumerate(heads, 1) if head[8:16] == salts and any(head[4:8])]
    assert len(ends) > len(answered) and ends[-1] == len(heads)
    return Killed(folder, answered, ends)


def log_of(folder: str) -> str:
    return os.path.join(folder, "xs.db-wal")


def change(folder: str, at: int, data: bytes) -> None:
    with open(log_of(folder), "r+b") as file:
        file.seek(at)
        file.write(data)


def frame_of(at: int) -> int:
    """The number of the frame that a byte of the log is in; 0 for its header."""
    return 0 if at < 32 else (at - 32) // FRAME + 1


def found_in(folder: str) -> dict[str, bytes]:
    """All that is there: contents by id. Nothing is wrong with it."""
    store = Store(folder)
    try:
        assert problems(store) == []
        topics = [f"topic.{n}" for n in range(7)]
        return {
            each: content(store, each)
            for each in sorted(
                id_text for topic in topics for id_text in all_ids(store, topic=topic)
            )
        }
    finally:
        store.close()


def repaired(folder: str) -> tuple[list[str], dict[str, Any]]:
    """What was lost, and the summary."""
    *lines, last = map(json.loads, repair.run(folder))
    assert any("write-ahead log" in line["problem"] for line in lines if "problem" in line)
    return [line["lost"] for line in lines if "lost" in line], last


def check_damaged(folder: str, killed: Killed, frame: int) -> int:
    """It is refused as damaged, and a repair saves what it can; how many frames are lost."""
    before = Path(log_of(folder)).read_bytes()
    for _ in range(2):  # to be told of it heals nothing
        with pytest.raises(Damaged, match=r"write-ahead log is damaged: .* xs check --repair"):
            Store(folder)
    assert Path(log_of(folder)).read_bytes() == before
    said, last = repaired(folder)
    after = found_in(folder)
    assert after.items() <= killed.answered.items()
    assert set(killed.before(frame)) <= set(after)
    lost = len(killed.answered) - len(after)
    assert last["lost"] == len(said) and bool(said) >= bool(lost), said
    aside = os.path.join(folder, os.path.basename(last["aside"]))
    assert Path(log_of(aside)).read_bytes() == before
    return lost


@pytest.mark.long
@pytest.mark.parametrize("shm", [True, False])
def test_a_flipped_byte_anywhere_in_the_log_is_never_a_shorter_store(
    killed: Killed, tmp_path: Path, run_xs: RunXs, shm: bool
) -> None:
    seed = random.randrange(10**6)
    print("seed:", seed)
    chance = random.Random(seed)
    size = os.path.getsize(log_of(killed.folder))
    places = [chance.randrange(size) for _ in range(18)]
    heads = chance.sample(range(len(killed.ends) * 3), 8)
    places += [32 + n * FRAME + chance.randrange(24) for n in heads]
    places += [chance.randrange(32) for _ in range(4)]
    lost = damaged = 0
    for number, at in enumerate(places):
        folder = killed.copied(tmp_path, shm=shm)
        with open(log_of(folder), "rb") as file:
            file.seek(at)
            (old,) = file.read(1)
        change(folder, at, bytes([old ^ chance.randrange(1, 256)]))
        frame = frame_of(at)
        print(f"byte {at}, in frame {frame}")
        if not shm and frame > killed.ends[-2]:
            # What a power failure leaves of a last transaction looks the same.
            with contextlib.suppress(Damaged):
                assert set(killed.before(killed.ends[-1])) <= set(found_in(folder))
            continue
        if number % 8 == 0:
            done = run_xs(["check", folder])
            assert done.returncode == 1 and b"log is damaged" in done.stderr + done.stdout
        damaged += 1
        lost += check_damaged(folder, killed, frame)
    # Pages are written again and again, and most of what is left of a flip can be told by sums.
    assert damaged > 15 and lost < len(killed.answered)


@pytest.mark.long
@pytest.mark.parametrize("size", [8, 512, 4096, 3 * 4096])
def test_blocks_of_the_log_that_are_lost_are_never_a_shorter_store(
    killed: Killed, tmp_path: Path, size: int
) -> None:
    seed = random.randrange(10**6)
    print("seed:", seed)
    chance = random.Random(seed)
    for shm in (True, False) * 4:
        last = 32 + (killed.ends[-4] * FRAME) - size
        at = chance.randrange(0, last) // 512 * 512
        block = chance.choice([bytes(size), os.urandom(size)])
        folder = killed.copied(tmp_path, shm=shm)
        change(folder, at, block)
        print(f"bytes {at} to {at + size}, from frame {frame_of(at)}")
        if frame_of(at) == frame_of(at + size) and at > 32:
            change(folder, at, b"\xaa" + block[1:])  # it may have been zeroes before
        check_damaged(folder, killed, frame_of(at))


@pytest.mark.parametrize("size", [None, 0, 31, 32, 32 + FRAME - 1])
def test_a_log_that_lost_all_its_frames_is_never_a_shorter_store(
    killed: Killed, tmp_path: Path, size: int | None
) -> None:
    folder = killed.copied(tmp_path, shm=True)
    if size is None:
        os.unlink(log_of(folder))
    else:
        os.truncate(log_of(folder), size)
    for _ in range(2):
        with pytest.raises(Damaged, match=f"0 of {killed.ends[-1]} frames can be read"):
            Store(folder)
    assert "what was on them" in " ".join(repaired(folder)[0])
    assert found_in(folder) == {}


@pytest.mark.parametrize("shm", [True, False])
def test_a_log_that_begins_with_zeroes_is_never_a_shorter_store(
    killed: Killed, tmp_path: Path, shm: bool
) -> None:
    folder = killed.copied(tmp_path, shm=shm)
    change(folder, 0, bytes(32 + 5 * FRAME))
    check_damaged(folder, killed, 0)


def test_no_log_is_missed_where_it_is_not_certain_that_something_was_in_it(
    killed: Killed, tmp_path: Path
) -> None:
    folder = killed.copied(tmp_path, shm=True)
    shared = Path(folder, SHM)
    os.utime(shared, (0, 0))  # as it is after a power failure: an orderly close may have been lost
    os.truncate(log_of(folder), 32)
    assert wal.damage(folder) == (0, killed.ends[-1], 1), "it is this log's"
    for size in (0, None):
        if size is None:
            os.unlink(log_of(folder))
        else:
            os.truncate(log_of(folder), size)
        assert wal.damage(folder) is None
    memory = shared.read_bytes()
    shared.write_bytes(memory[:96] + struct.pack("=I", killed.ends[-1]) + memory[100:])
    assert wal.damage(folder) is None, "all of it was folded back"
    shared.write_bytes(memory)
    assert wal.damage(folder) == (0, killed.ends[-1], 1)


def test_every_command_says_that_the_log_is_damaged_and_what_to_do(
    killed: Killed, tmp_path: Path, run_xs: RunXs
) -> None:
    folder = killed.copied(tmp_path, shm=True)
    change(folder, 32 + killed.ends[3] * FRAME + 1000, b"\xaa" * 600)
    before = {name: Path(folder, name).read_bytes() for name in ("xs.db", "xs.db-wal", SHM)}
    for command in (["append", folder, "a"], ["cat", folder], ["serve", folder], ["check", folder]):
        done = run_xs(command, stdin=b"more")
        said = (done.stdout + done.stderr).decode()
        assert done.returncode == (4 if command[0] == "serve" else 1), said
        assert f"xs check --repair {folder}" in said, said
        assert f"{killed.ends[3]} of {killed.ends[-1]} frames can be read" in said, said
        lost = len(killed.ends) - 4
        assert f"{lost} committed transactions after them would be lost" in said, said
    done = run_xs(["backup", folder, str(tmp_path / "backup")])
    assert done.returncode == 1 and b"log is damaged" in done.stderr
    assert {name: Path(folder, name).read_bytes() for name in before} == before
    with pytest.raises(Damaged):
        Connections(folder, read_only=True)
    done = run_xs(["check", "--repair", folder])
    assert done.returncode == 0 and b"log is damaged" in done.stdout, done.stderr
    assert run_xs(["check", folder]).returncode == 0
    done = run_xs(["append", folder, "a"], stdin=b"more")
    assert done.returncode == 0, done.stderr


def test_a_server_that_is_told_of_a_store_with_a_damaged_log_serves_the_others(
    killed: Killed, tmp_path: Path, server: Server
) -> None:
    folder = killed.copied(tmp_path, shm=False)
    change(folder, 32 + killed.ends[3] * FRAME + 1000, b"\xaa" * 600)
    done = subprocess.run(
        [*XS, "store", "add", server.directory, folder],
        capture_output=True, env=environment(), timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode != 0 and b"log is damaged" in done.stderr
    xs.open(server.directory).append("a", b"goes on")


@pytest.mark.parametrize("shm", [True, False])
def test_a_page_that_was_damaged_for_the_last_time_costs_what_only_it_had(
    killed: Killed, tmp_path: Path, shm: bool
) -> None:
    """One page after the other, as the log has it last."""
    log = Path(log_of(killed.folder)).read_bytes()
    newest = {}
    for number in range(1, killed.ends[-3] + 1):
        at = 32 + (number - 1) * FRAME
        newest[struct.unpack(">I", log[at : at + 4])[0]] = number
    assert len(newest) > 10
    for page, number in newest.items():
        if log[32 + (killed.ends[-3] * FRAME) :].count(struct.pack(">I", page) + b"\0\0\0"):
            continue  # it may be written again, later
        folder = killed.copied(tmp_path, shm=shm)
        change(folder, 32 + (number - 1) * FRAME + 24, os.urandom(4096))
        lost = check_damaged(folder, killed, number)
        print(f"page {page} in frame {number}: {lost} frames lost")


@pytest.mark.parametrize("shm", [True, False])
def test_a_last_transaction_that_was_cut_off_or_half_written_is_no_damage(
    killed: Killed, tmp_path: Path, shm: bool
) -> None:
    """Power that goes amid its writing, with a log of older frames behind it, or of none."""
    seed = random.randrange(10**6)
    print("seed:", seed)
    chance = random.Random(seed)
    start, end = 32 + killed.ends[-2] * FRAME, 32 + killed.ends[-1] * FRAME
    log = Path(log_of(killed.folder)).read_bytes()
    for _ in range(20):
        torn = bytearray(log[start:end])
        for at in range(0, len(torn), 512):
            if chance.random() < 0.5:
                torn[at : at + 512] = chance.choice([bytes(512), log[at + 32 : at + 544]])
        folder = killed.copied(tmp_path, shm=False)
        if shm:  # as it was before that transaction
            old = Path(killed.folder, SHM).read_bytes()
            Path(folder, SHM).write_bytes(shortened(old, killed.ends[-2]))
        change(folder, start, bytes(torn))
        if chance.random() < 0.5:
            os.truncate(log_of(folder), chance.randrange(start, end))
        found = set(found_in(folder))
        assert found >= set(killed.before(killed.ends[-1]))


def shortened(shm: bytes, frame: int) -> bytes:
    """What it is with fewer frames committed, as far as xs reads it."""
    words = list(struct.unpack("=12I", shm[:48]))
    words[4] = frame
    one = two = 0
    for n in range(0, 10, 2):
        one = one + words[n] + two & 0xFFFFFFFF
        two = two + words[n + 1] + one & 0xFFFFFFFF
    return struct.pack("=12I", *words[:10], one, two) * 2 + shm[96:]


@pytest.mark.parametrize("shm", [True, False])
def test_what_commits_that_failed_have_left_in_the_log_is_no_damage(
    store_dir: str, tmp_path: Path, shm: bool
) -> None:
    server = start_server(store_dir)
    answered = {}
    with xs.open(store_dir) as client:
        for n in range(10):
            answered[client.append("topic.1", b"%d" % n).id] = b"%d" % n
        with failing(server, "fsync,fdatasync", "EIO"):
            for n in (900, 500, 200, 50, 10, 1):  # each shorter than what the one before has left
                lines = [{"topic": f"topic.{n % 7}", "content": str(n)} for n in range(n)]
                with pytest.raises((Unavailable, Full)):
                    client.append_many(lines, atomic=True)
        answered[client.append("topic.1", b"last").id] = b"last"
    server.process.kill()
    server.process.communicate()
    copy = Killed(store_dir, answered, []).copied(tmp_path, shm=shm)
    with wal._Log(log_of(copy)) as log:
        whole = log.frames_read_by_sqlite()
        heads = [log.head(n) for n in range(whole + 1, log.count + 1)]
    left = [head for head in heads if head[8:16] == log.salts and any(head[4:8])]
    assert len(left) >= 2, "there is something that looks like commits behind the end"
    assert found_in(copy) == answered


@pytest.mark.parametrize("shm", [True, False])
def test_a_log_that_has_begun_anew_over_an_older_one_is_no_damage(
    store_dir: str, tmp_path: Path, shm: bool
) -> None:
    program = (
        "import os, signal, sys\n"
        "from xs.content import small\n"
        "from xs.commit import Append\n"
        "from xs.store import Store\n"
        "store = Store(sys.argv[1], exclusive=True, create=True)\n"
        "for n in range(60):\n"
        "    print(store.append(Append('topic.1', small(b'%d' % n * 2000))).decode(), flush=True)\n"
        "    if n in (40, 50):\n"
        "        writing = store.database.writing()\n"
        "        writing.execute('PRAGMA wal_checkpoint(PASSIVE)').fetchall()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, store_dir],
        stdout=subprocess.PIPE, env=environment(), timeout=DEADLINE,
    )  # fmt: skip
    answered = [json.loads(line)["id"] for line in done.stdout.splitlines()]
    assert len(answered) == 60
    killed = Killed(store_dir, dict.fromkeys(answered, b""), [])
    assert list(found_in(killed.copied(tmp_path, shm=shm))) == answered


def test_python_and_sqlite_agree_where_a_log_ends(killed: Killed, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed:", seed)
    chance = random.Random(seed)
    for n in range(16):
        folder = killed.copied(tmp_path, shm=False)
        with open(log_of(folder), "r+b") as file:
            data = bytearray(file.read())
            at = chance.randrange(32, len(data) // (1 + n % 3) - 1)
            if n > 12:  # a checksum
                at = 32 + (at - 32) // FRAME * FRAME + chance.randrange(16, 24)
            if n:
                data[at] ^= chance.randrange(1, 256)
                data[at + 1] ^= chance.randrange(256) if n > 5 else 0
            file.seek(0)
            file.write(data)
        with wal._Log(log_of(folder)) as log:
            assert log.frames_read_by_sqlite() == log._committed_and_whole(), (n, at)


IS_OPEN = "import sys; from xs import wal; sys.exit(wal._is_open(sys.argv[1]))"


def is_open(folder: str) -> bool:
    """Whether another process finds that this one has it open."""
    done = subprocess.run(
        [sys.executable, "-c", IS_OPEN, folder], env=environment(), timeout=DEADLINE, check=False
    )
    return done.returncode == 1


def test_to_look_at_the_log_gives_no_lock_of_sqlite_s_away(store_dir: str) -> None:
    """Were it so, another process would begin the memory that they share anew, under this one."""
    one = Store(store_dir, create=True)
    add(one, "a", b"x")  # from here on there is a log
    two = Store(store_dir)
    assert is_open(store_dir)
    with contextlib.closing(Store(store_dir)) as three:
        assert len(all_ids(three)) == 1
    one.close()
    assert is_open(store_dir)
    assert two.wait(two.newest()) is False  # which takes a connection of its own
    add(two, "a", b"y")
    link = store_dir + "-link"
    os.symlink(store_dir, link)
    with contextlib.closing(Store(link)) as four:
        assert len(all_ids(four)) == 2
    assert is_open(store_dir)
    two.close()
    assert not is_open(store_dir)


def test_a_log_that_another_process_has_open_is_its_own_to_judge(
    killed: Killed, tmp_path: Path
) -> None:
    """SQLite won't read it anew then, and drop anything."""
    folder = killed.copied(tmp_path, shm=True)
    program = (
        "import sys\n"
        "from xs.store import Store\n"
        "store = Store(sys.argv[1])\n"
        "print(store.newest(), flush=True)\n"
        "sys.stdin.read()\n"
        "store.close()\n"
    )
    with opened_by_another(program, folder):
        change(folder, 32 + killed.ends[3] * FRAME + 1000, b"\xaa" * 600)
        assert wal.damage(folder) is None
        store = Store(folder)
        assert len(all_ids(store, topic="topic.*")) == len(killed.answered)
        store.close()


@contextlib.contextmanager
def opened_by_another(program: str, folder: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline().strip().isdigit()
        yield
    finally:
        process.communicate(timeout=DEADLINE)


def test_a_database_that_is_damaged_as_well_is_said_so(killed: Killed, tmp_path: Path) -> None:
    folder = killed.copied(tmp_path, shm=True)
    change(folder, 0, bytes(32 + FRAME))
    with open(os.path.join(folder, "xs.db"), "r+b") as file:
        file.write(b"\xff" * 100)
    with pytest.raises(Damaged):
        Store(folder)
    with contextlib.suppress(NotAStore):
        repaired(folder)
        assert found_in(folder).items() <= killed.answered.items()
