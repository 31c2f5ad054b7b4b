"""Of a store that is replaced, moved or removed while it is open nothing is answered as stored."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator

import pytest
from conftest import DEADLINE, XS, RunXs, Server, environment, start_server, until

import xs
from xs.errors import NoStore, Unavailable, XsError

REPLACED = "was replaced or removed while it was open: open it again"
LARGE = b"large " * 10_000


def damage(folder: str) -> None:
    """The oldest frame becomes one that is not what was stored."""
    with contextlib.closing(sqlite3.connect(os.path.join(folder, "xs.db"))) as database:
        database.execute(
            "UPDATE frame SET json = replace(json, '\"a\"', '\"b\"') "
            "WHERE row = (SELECT min(row) FROM frame)"
        )
        database.commit()


def repair(folder: str, run_xs: RunXs) -> None:
    damage(folder)
    done = run_xs(["check", folder, "--repair"])
    assert b'"lost":1' in done.stdout, done


def restore(folder: str, run_xs: RunXs) -> None:
    """As people do: a copy of the database, in place of it and its log."""
    copy = f"{folder}.copy"
    assert run_xs(["backup", folder, copy]).returncode == 0
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{folder}/xs.db{suffix}")
    shutil.copy(f"{copy}/xs.db", f"{folder}/xs.db")


def move(folder: str, _: RunXs) -> None:
    os.rename(folder, f"{folder}.moved")


def begin_another(folder: str, run_xs: RunXs) -> None:
    move(folder, run_xs)
    assert run_xs(["append", folder, "other"]).returncode == 0


def remove(folder: str, _: RunXs) -> None:
    shutil.rmtree(folder)


Replace = Callable[[str, RunXs], None]
WAYS = [repair, restore, move, begin_another, remove]


def named(way: Replace) -> str:
    return way.__name__


def ids_in(folder: str) -> list[str]:
    with xs.open(folder) as store:
        return [each.id for each in store.cat()]


def are_stored(folder: str, count: int) -> bool:
    """Whether there are so many frames by now; of a store that is being made there are none."""
    try:
        return len(ids_in(folder)) >= count
    except NoStore:
        return False


@contextlib.contextmanager
def command(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*XS, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("replace", WAYS, ids=named)
def test_a_client_of_the_files_is_refused_once_they_are_replaced(
    store_dir: str, run_xs: RunXs, replace: Replace
) -> None:
    with xs.open(store_dir) as client:
        for n in range(5):
            client.append("a", f"{n}")
        live = client.cat(follow=True)
        while next(live).topic != "xs.threshold":
            pass
        replace(store_dir, run_xs)
        for ask in (
            lambda: client.append("a", "x"),
            lambda: client.cas_post(LARGE),
            lambda: client.append("a", LARGE),
            lambda: list(client.cat()),
            lambda: client.last("a"),
            lambda: next(live),
        ):
            with pytest.raises(XsError) as found:
                ask()
            is_gone = replace in (move, remove)  # then large content has no folder to go to
            assert REPLACED in str(found.value) or (is_gone and "No such file" in str(found.value))
    if replace in (move, remove):
        return
    assert not os.listdir(f"{store_dir}/cas")
    with xs.open(store_dir) as client:
        made = client.append("a", "stored")
    assert ids_in(store_dir)[-1] == made.id


def test_a_command_that_stays_open_across_a_repair_says_what_was_not_stored(
    store_dir: str, run_xs: RunXs
) -> None:
    with command("append", store_dir, "a", "--lines") as pipe:
        assert pipe.stdin is not None
        pipe.stdin.write(b"before\n" * 4)
        pipe.stdin.flush()
        until(lambda: are_stored(store_dir, 4))
        repair(store_dir, run_xs)
        out, err = pipe.communicate(b"after\n" * 4, timeout=DEADLINE)
    summary = json.loads(out)
    assert summary["appended"] == 4
    assert [each["line"] for each in summary["errors"]] == [5, 6, 7, 8]
    assert pipe.returncode == 1 and REPLACED in err.decode()
    assert len(ids_in(store_dir)) == 3  # one was damaged, and the other lines were refused


def test_a_follower_of_files_that_are_repaired_is_told(store_dir: str, run_xs: RunXs) -> None:
    with xs.open(store_dir) as client:
        client.append_many([{"topic": "a"}, {"topic": "a"}])
    with command("cat", store_dir, "--follow") as follower:
        assert follower.stdout is not None
        while b"xs.threshold" not in follower.stdout.readline():
            pass
        repair(store_dir, run_xs)
        _, err = follower.communicate(timeout=DEADLINE)
    assert follower.returncode == 1 and REPLACED in err.decode()


@pytest.mark.parametrize("replace", WAYS[1:], ids=named)
def test_a_server_whose_store_is_replaced_answers_no_append_as_stored(
    server: Server, run_xs: RunXs, replace: Replace
) -> None:
    folder = server.directory
    with xs.open(folder) as client:
        made = [client.append("a", f"{n}").id for n in range(3)]
        replace(folder, run_xs)
        for content in (b"small", LARGE):
            with pytest.raises(Unavailable, match=f"{REPLACED}|No such file"):
                client.append("a", content)
        summary = client.append_many([{"topic": "a"}, {"topic": "b"}])
        assert summary["appended"] == 0 and len(summary["errors"]) == 2
        with pytest.raises(Unavailable, match=REPLACED):
            client.remove(made[0])
        answer = client._transport.request("POST", "/gc?age=0s")
        assert answer.status == 503 and REPLACED in answer.read().decode()
    server.stop()
    assert server.process.returncode == 0
    if replace is begin_another:  # nothing of the old one has come into the new one
        assert os.listdir(f"{folder}/cas") == []
        (only,) = ids_in(folder)
        assert only not in made


def test_a_server_that_is_started_again_after_a_restore_serves_what_was_restored(
    store_dir: str, run_xs: RunXs
) -> None:
    server = start_server(store_dir)
    with xs.open(store_dir) as client:
        made = client.append("a", "1")
    restore(store_dir, run_xs)
    server.stop()
    server = start_server(store_dir)
    with xs.open(store_dir) as client:
        after = client.append("a", "2")
        assert [each.id for each in client.cat(topic="a")] == [made.id, after.id]
    server.stop()
    assert ids_in(store_dir)[-2] == after.id  # and then xs.stop
