"""`xs.open` at a directory that holds no store yet."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import RunXs, Server, start_server
from stores import together

import xs
from xs import backup, repair
from xs.content import INLINE_MAX
from xs.errors import Invalid, Locked, NoStore, NotAStore, XsError
from xs.local import Local
from xs.lock import SERVE, Lock
from xs.place import FOLDER_MAX

OLD = b"03gw3h0000000000000000000"  # an id


def test_a_directory_becomes_a_store_with_the_first_append(store_dir: str) -> None:
    with xs.open(store_dir) as store:
        frame = store.append("notes", "first")
        assert store.content(frame) == b"first"
    with xs.open(store_dir) as store:
        assert store.last("notes") == frame


def test_a_making_of_which_the_journal_alone_reached_the_disk_is_begun_anew(store_dir: str) -> None:
    os.mkdir(store_dir)
    with open(f"{store_dir}/xs.db-journal", "wb") as journal:
        journal.write(bytes(512))
    with xs.open(store_dir) as store:
        frame = store.append("notes", "first")
        assert list(store.cat()) == [frame]


def test_a_making_that_left_an_empty_index_is_gone_on_with_by_who_writes(
    store_dir: str, run_xs: RunXs
) -> None:
    os.makedirs(f"{store_dir}/cas")
    for name in ("lock", "xs.db"):
        open(f"{store_dir}/{name}", "x").close()
    for command in (["cat"], ["check"], ["gc"], ["backup", f"{store_dir}.copy"]):
        done = run_xs([command[0], store_dir, *command[1:]])
        assert done.returncode == 1 and b"no store at" in done.stderr, done
    assert os.stat(f"{store_dir}/xs.db").st_size == 0
    assert run_xs(["append", store_dir, "notes"], stdin="first").returncode == 0
    assert run_xs(["check", store_dir]).returncode == 0


def test_an_index_that_has_become_empty_is_no_new_store_where_it_had_contents(
    store_dir: str, run_xs: RunXs
) -> None:
    large = b"x" * (INLINE_MAX + 1)
    with xs.open(store_dir) as store:
        frame = store.append("notes", large)
    index = Path(store_dir, "xs.db")
    before = index.read_bytes()
    index.write_bytes(b"")
    commands = (
        ["cat"],
        ["last"],
        ["check"],
        ["check", "--repair"],
        ["gc", "--age", "0s"],
        ["append", "notes"],
        ["cas-post"],
        ["backup", f"{store_dir}.copy"],
        ["export", f"{store_dir}.out"],
        ["serve"],
    )
    for name, *rest in commands:
        done = run_xs([name, store_dir, *rest], stdin="more")
        text = done.stderr.decode()
        assert done.returncode == (4 if name == "serve" else 1), (name, text)
        assert f"the store at {store_dir} is damaged: its xs.db has become empty" in text, name
        assert text.count("\n") == 1 and done.stdout == b""
        assert index.read_bytes() == b"", name
    index.write_bytes(before)
    with xs.open(store_dir) as store:
        assert store.content(frame) == large


def test_an_index_that_is_gone_makes_no_new_store_of_its_contents(
    store_dir: str, tmp_path: Path, run_xs: RunXs
) -> None:
    with xs.open(store_dir) as store:
        frame = store.append("notes", b"x" * (INLINE_MAX + 1))
    aside = tmp_path / "aside"
    os.rename(f"{store_dir}/xs.db", aside)
    for open_it in (
        lambda: xs.open(store_dir).append("notes", "more"),
        lambda: list(xs.open(store_dir).cat()),
        lambda: backup.run(store_dir, f"{store_dir}.copy"),
        lambda: list(repair.run(store_dir)),
    ):
        with pytest.raises(XsError, match=r"is damaged: its xs\.db is gone, .* restore the store"):
            open_it()
    done = run_xs(["serve", store_dir])
    assert done.returncode == 4 and b"its xs.db is gone" in done.stderr
    assert not os.path.exists(f"{store_dir}/xs.db")
    os.rename(aside, f"{store_dir}/xs.db")
    with xs.open(store_dir) as store:
        assert store.content(frame) == b"x" * (INLINE_MAX + 1)


def test_an_index_that_has_become_empty_does_not_cost_its_log(
    server: Server, run_xs: RunXs
) -> None:
    with xs.open(server.directory) as store:
        frame = store.append("notes", "small")
    server.process.kill()
    server.process.communicate()
    index = Path(server.directory, "xs.db")
    before = index.read_bytes()
    index.write_bytes(b"")
    for command in ("cat", "append", "serve"):
        done = run_xs([command, server.directory, *(["notes"] if command == "append" else [])])
        assert b"its xs.db has become empty" in done.stderr
    index.write_bytes(before)
    with xs.open(server.directory) as store:
        assert store.last("notes") == frame


def test_a_store_whose_empty_folder_of_contents_is_lost_makes_it_anew(store_dir: str) -> None:
    with xs.open(store_dir) as store:
        store.append("notes", "small")
    os.rmdir(f"{store_dir}/cas")
    with xs.open(store_dir) as store:
        frame = store.append("notes", b"x" * (INLINE_MAX + 1))
        assert store.content(frame) == b"x" * (INLINE_MAX + 1)
    assert os.stat(f"{store_dir}/cas").st_mode & 0o777 == 0o700


@pytest.mark.parametrize("is_served", [False, True])
def test_a_relative_path_is_from_where_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_served: bool
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        with xs.open(f"{folder}/store") as store:
            store.append("notes", "first")
    server = start_server(f"{here}/store") if is_served else None
    monkeypatch.chdir(here)
    with xs.open("store") as store, xs.open("./new/../fresh") as fresh:
        monkeypatch.chdir(there)
        large = b"x" * (INLINE_MAX + 1)
        for content in (b"small", large):
            frame = store.append("notes", content)
            assert store.content(frame) == content
        store._transport.close()  # those to a server that were kept
        if is_served:
            assert len(list(store.cat(topic="notes"))) == 3
        fresh.append("notes", large)
    if server is not None:
        server.stop()
    assert os.listdir(there) == ["store"] and (here / "fresh" / "xs.db").exists()
    for folder, count in ((here, 3), (there, 1)):
        with xs.open(f"{folder}/store") as store:
            assert len(list(store.cat(topic="notes"))) == count
            problems = store._transport.request("POST", "/check").read()
            assert b'"problems":0' in problems


def test_reading_makes_no_store(store_dir: str) -> None:
    with xs.open(store_dir) as store, pytest.raises(NoStore, match="no store at"):
        list(store.cat())
    assert not os.path.exists(store_dir)


def test_a_store_is_for_its_owner_alone_wherever_it_is_made(store_dir: str) -> None:
    os.mkdir(store_dir)
    os.chmod(store_dir, 0o755)
    with xs.open(store_dir) as store:
        store.append("notes", "private")
    assert os.stat(store_dir).st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "wrong",
    [
        {"topic": "no topic"},
        {"ttl": "soon"},
        {"ttl": "ephemeral"},  # without a server
        {"key": "k" * 256},
        {"if_last": "no id"},
    ],
)
def test_an_append_that_is_wrong_makes_no_store(store_dir: str, wrong: dict[str, str]) -> None:
    with xs.open(store_dir) as store:
        with pytest.raises(Invalid):
            store.append(**{"topic": "notes", "content": "x", **wrong})
        assert not os.path.exists(store_dir)
        with pytest.raises(NoStore):
            store.last()
        assert not os.path.exists(store_dir)
        frame = store.append("notes", "right")
        assert store.last("notes") == frame


@pytest.mark.parametrize("meta", ["{", "NaN", '"\\ud800"'])
def test_a_command_with_wrong_meta_makes_no_store(store_dir: str, run_xs: RunXs, meta: str) -> None:
    done = run_xs(["append", store_dir, "notes", "--meta", meta], stdin="x")
    assert (done.returncode, done.stdout) == (1, b"")
    assert not os.path.exists(store_dir)


def test_lines_that_are_wrong_one_and_all_make_no_store(store_dir: str) -> None:
    with xs.open(store_dir) as store:
        for ask in (store.append_many, store.import_):
            summary = ask([{"topic": "no topic"}, "no json", {"topic": "a", "ttl": "ephemeral"}])
            assert [error["line"] for error in summary["errors"]] == [1, 2, 3]
        with pytest.raises(Invalid):
            store.append_many([{"topic": "notes"}, {"topic": "no topic"}], atomic=True)
        assert not os.path.exists(store_dir)
        assert store.append_many([{"topic": "no topic"}, {"topic": "notes"}])["appended"] == 1
        assert store.first().topic == "notes"


def test_a_new_store_may_be_made_by_many_threads_at_once(store_dir: str) -> None:
    with xs.open(store_dir) as store, ThreadPoolExecutor(8) as pool:
        frames = list(pool.map(lambda n: store.append("notes", str(n)), range(32)))
        assert sorted(frames) == sorted(store.cat())


def test_a_new_store_of_which_many_threads_make_the_first_append_is_opened_once(
    tmp_path: Path,
) -> None:
    folders = [str(tmp_path / str(n)) for n in range(20)]
    for folder in folders:
        with xs.open(folder) as store:
            together(4, lambda _, store=store: store.append("notes"))
    opened = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            opened.append(os.readlink(f"/proc/self/fd/{name}"))
    assert [path for path in opened if path.startswith(str(tmp_path))] == []


WRITES = {
    "append": ("POST", "/append/notes", b"first"),
    "cas": ("POST", "/cas", b"first"),
    "import": ("POST", "/import", b'{"topic":"a","id":"%b","hash":null,"meta":null}' % OLD),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_can_not_make_its_store_is_refused(
    tmp_path: Path, store_dir: str, write: str
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    os.mkdir(store_dir)
    transport = Local(store_dir, create=True)
    (Path(store_dir) / "letter.txt").write_text("another's")
    for where in (Local(str(file / "store"), create=True), transport):
        method, target, body = WRITES[write]
        answer = where.request(method, target, [], body)
        assert answer.status == NotAStore.status, answer.read()
        assert b"store" in answer.read()


def test_a_path_is_as_long_as_sqlite_takes_it(tmp_path: Path) -> None:
    longest = tmp_path
    while len(str(longest)) < FOLDER_MAX:
        longest /= "d" * min(200, FOLDER_MAX - len(str(longest)) - 1)
    assert len(str(longest)) == FOLDER_MAX
    with xs.open(str(longest)) as store:
        store.append("t", b"x")
    with pytest.raises(NotAStore, match="a store to be repaired at most 471"):
        list(repair.run(str(longest)))
    with pytest.raises(NotAStore, match="that of a copy at most 493"):
        backup.run(str(longest), str(longest.with_name("c" * len(longest.name))))
    longer = str(longest) + "d"
    link = tmp_path / "link"
    link.symlink_to(longer)
    os.mkdir(longer)
    told = f"has {FOLDER_MAX + 1} bytes, and that of a store at most {FOLDER_MAX}"
    for path in (longer, str(link)):
        with xs.open(path) as store, pytest.raises(XsError, match=told):
            store.append("t", b"x")
    assert os.listdir(longer) == []
    os.rename(longest / "xs.db", Path(longer) / "xs.db")
    with pytest.raises(XsError, match=told), xs.open(longer) as store:
        store.last()


@pytest.mark.parametrize("write", WRITES)
def test_a_write_whose_store_is_being_made_by_a_server_is_refused(
    store_dir: str, write: str
) -> None:
    os.mkdir(store_dir)
    lock = Lock(store_dir)
    lock.acquire(SERVE)
    method, target, body = WRITES[write]
    answer = Local(store_dir, create=True).request(method, target, [], body)
    assert answer.status == Locked.status
    assert f"served by process {os.getpid()}".encode() in answer.read()
    lock.close()


def test_a_write_to_a_store_that_was_closed_opens_it_anew(store_dir: str) -> None:
    store = xs.open(store_dir)
    store.append("notes", "first")
    store.close()
    store.append("notes", "second")
    store.close()
    hash_ = store.cas_post(b"third")
    store.close()
    with xs.open(store_dir) as again:
        assert len(list(again.cat())) == 2
        assert again.cas(hash_) == b"third"


def test_what_is_to_be_written_to_no_store_is_not_read_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(XsError, match="can't make a store"):
        xs.open(str(tmp_path / "file" / "store")).append("notes", iter(["not touched"]))
