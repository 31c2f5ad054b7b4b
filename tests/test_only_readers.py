"""Who may read a store's files, and not write them, reads them while their owner goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

import pytest
from conftest import DEADLINE, RunXs, environment

import xs
from xs import ids
from xs.cas import Cas
from xs.schema import PAGE_ROWS

# Everything is loaded before, as nobody may not read where it lies.
_BEGIN = """
import errno, importlib, json, os, pkgutil, pwd, sys
import xs
for each in pkgutil.iter_modules(xs.__path__):
    if each.name != "__main__":
        importlib.import_module(f"xs.{each.name}")
from xs.errors import Unavailable
if sys.argv[2:]:
    os.setgid(65534)
    os.setuid(65534)
store = xs.open(sys.argv[1])
def tell(*what):
    print(*what, flush=True)
"""
_MOUNT = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
_READ_ONLY = ["unshare", "--mount", "--map-root-user", "sh", "-c", _MOUNT, "sh"]
NOON = 1_700_000_000_000


@pytest.fixture
def shared() -> Iterator[str]:
    """A store with a page and more of frames, which everybody may read; nobody has it open."""
    folder = tempfile.mkdtemp(dir="/tmp")  # every folder of pytest's is the user's alone
    os.chmod(folder, 0o755)
    made = os.path.join(folder, "store")
    with xs.open(made) as store:
        store.append("a", "first")
    os.chmod(made, 0o755)
    os.chmod(f"{made}/cas", 0o755)
    os.chmod(f"{made}/xs.db", 0o644)
    yield made
    shutil.rmtree(folder)


@contextlib.contextmanager
def nobody(script: str, folder: str) -> Iterator[subprocess.Popen[str]]:
    # Only root can be somebody else. For all others the folder is on a read-only mount.
    is_root = os.geteuid() == 0
    words = [sys.executable, "-c", _BEGIN + script, folder, *(["nobody"] if is_root else [])]
    process = subprocess.Popen(
        words if is_root else [*_READ_ONLY, folder, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(PYTHONDONTWRITEBYTECODE="1"),
    )
    watchdog = threading.Timer(DEADLINE, process.kill)
    watchdog.start()
    try:
        yield process
        process.communicate()
        assert process.returncode == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def left_by_a_kill(folder: str) -> None:
    """Kills a process that has appended, so that its log is left."""
    script = """
import os, signal, sys
import xs
xs.open(sys.argv[1]).append("a", "second")
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script, folder], env=environment(), check=False)
    assert os.stat(f"{folder}/xs.db-wal").st_size > 0


@contextlib.contextmanager
def amid_opening(folder: str) -> Iterator[None]:
    """In the block it is as while SQLite opens the database, before it has looked at the log."""
    with open(f"{folder}/xs.db-shm", "w+b") as shared_memory:
        fcntl.lockf(shared_memory, fcntl.LOCK_SH, 1, 128)  # SQLite's lock of who has it open
        shared_memory.truncate(3)
        yield


def import_many(folder: str, run_xs: RunXs, count: int, order: int) -> list[str]:
    """Stores so many frames, each of a time of its own, by a command; their ids."""
    made = [ids.text(ids.first_of(NOON + n * 10 + order) + 5) for n in range(count)]
    lines = [json.dumps({"topic": "a", "id": each, "meta": "x" * 100}) for each in made]
    done = run_xs(["import", folder, "-"], stdin="\n".join(lines))
    assert json.loads(done.stdout)["imported"] == count
    return made


def test_a_follower_sees_what_the_owner_appends_later(shared: str, run_xs: RunXs) -> None:
    script = """
for frame in store.cat(follow=True):
    tell(frame.id if frame.topic == "a" else frame.topic)
    if frame.meta == "last":
        break
"""
    with nobody(script, shared) as follower:
        heard(follower)
        assert heard(follower) == "xs.threshold"
        for meta in ('"one"', '"two"', '"last"'):
            out = run_xs(["append", shared, "a", "--meta", meta]).stdout
            assert heard(follower) == json.loads(out)["id"]
    with xs.open(shared) as store:
        assert len(list(store.cat())) == 4


@pytest.mark.parametrize(
    "read",
    [
        pytest.param("xs.open(sys.argv[1]).last('a').topic", id="it is opened"),
        pytest.param("store.last('a').topic", id="one is looked up"),
        pytest.param("next(store.cat(topic='a')).topic", id="some are read"),
        pytest.param("Snapshot(sys.argv[1], '/') and 'a'", id="it is backed up"),
    ],
)
def test_who_reads_while_its_owner_is_just_opening_it_waits(
    read: str, shared: str, run_xs: RunXs
) -> None:
    script = f"""
import time
from xs.snapshot import Snapshot
sleep = time.sleep
def told(seconds):
    time.sleep = sleep
    tell("waits")
    sleep(seconds)
tell(store.first().id)
sys.stdin.readline()
time.sleep = told
tell({read})
"""
    left_by_a_kill(shared)
    with nobody(script, shared) as reader:
        heard(reader)
        with amid_opening(shared):
            go_on(reader)
            assert heard(reader) == "waits"
            run_xs(["append", shared, "a"])
        assert heard(reader) == "a"


def test_a_log_that_goes_while_it_is_opened_is_waited_for(shared: str) -> None:
    script = """
store.close()
def hook(event, _):
    if event == "sqlite3.connect":
        tell("connects")
        sys.stdin.readline()
sys.addaudithook(hook)
tell(len(list(xs.open(sys.argv[1]).cat())))
"""
    with xs.open(shared) as owner:
        owner.append("a", "second")
        with nobody(script, shared) as reader:
            assert heard(reader) == "connects"
            owner.close()
            go_on(reader)
            assert heard(reader) == "connects"
            go_on(reader)
            assert heard(reader) == "2"


def test_frames_that_come_amid_a_read_neither_repeat_nor_hide_others(
    shared: str, run_xs: RunXs
) -> None:
    count = 3 * PAGE_ROWS
    old = import_many(shared, run_xs, count, order=0)
    script = """
frames = store.cat(topic="a")
tell(next(frames).id)
sys.stdin.readline()
for frame in frames:
    tell(frame.id)
"""
    with nobody(script, shared) as reader:
        seen = [heard(reader)]
        import_many(shared, run_xs, count, order=5)
        go_on(reader)
        assert reader.stdout is not None
        seen += reader.stdout.read().split()
    assert seen == sorted(set(seen))
    assert set(old) <= set(seen)


def test_what_was_read_while_the_file_changed_is_not_given(shared: str, run_xs: RunXs) -> None:
    import_many(shared, run_xs, 10, order=0)
    script = """
index = store._transport._store.index
try:
    with index.reading() as connection:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        tell("reading")
        sys.stdin.readline()
except Unavailable as error:
    assert "was written to while it was read" in str(error), error
    tell("refused")
tell(len(list(store.cat())))
"""
    with nobody(script, shared) as reader:
        assert heard(reader) == "reading"
        import_many(shared, run_xs, 1000, order=5)
        go_on(reader)
        assert heard(reader) == "refused"
        assert heard(reader) == "1011"


def test_a_store_is_read_while_its_owner_has_it_open(shared: str) -> None:
    with xs.open(shared) as owner:
        assert owner.first() is not None  # there is a log, with nothing in it
        with nobody("tell(len(list(store.cat())))", shared) as reader:
            assert heard(reader) == "1"
        owner.append("a", "second")
        with nobody("tell(len(list(store.cat())))", shared) as reader:
            assert heard(reader) == "2"


def test_contents_stay_while_somebody_holds_them_who_may_only_read(shared: str) -> None:
    script = """
from xs.cas import Cas
with Cas(f"{sys.argv[1]}/cas").held():
    tell("holds")
    sys.stdin.readline()
tell("holds no more")
"""
    contents = Cas(f"{shared}/cas")
    with xs.open(shared) as owner:
        one, other = (owner.append("a", letter * 100_000) for letter in "xy")
        with nobody(script, shared) as reader:
            assert heard(reader) == "holds"
            owner.remove(one.id)
            assert len(list(contents.digests())) == 2
            go_on(reader)
            assert heard(reader) == "holds no more"
        owner.remove(other.id)
    assert not list(contents.digests())


def test_what_is_written_to_amid_a_backup_without_locks_is_not_called_damaged(
    shared: str, run_xs: RunXs
) -> None:
    script = """
import tempfile
from xs import backup
def hook(event, found):
    if event == "os.listdir" and found[0].endswith("/copy/cas"):  # the contents are there
        tell("begun")
        sys.stdin.readline()
sys.addaudithook(hook)
store.close()
with tempfile.TemporaryDirectory() as folder:
    try:
        backup.run(sys.argv[1], folder + "/copy")
    except Exception as error:
        tell(type(error).__name__, error)
"""
    import_many(shared, run_xs, 3000, 0)
    with nobody(script, shared) as reader:
        assert heard(reader) == "begun"
        with xs.open(shared) as owner:
            for each in list(owner.cat())[::2]:
                owner.remove(each.id)
            owner.append_many({"topic": "a", "content": "x" * 9000} for _ in range(2000))
        go_on(reader)
        assert heard(reader) == f"Unavailable {shared} was written to meanwhile: back it up again"
