"""Many stores in one process: added and removed by the root store's stream."""

from __future__ import annotations

import _thread
import base64
import contextlib
import fcntl
import json
import os
import random
import resource
import signal
import socket
import sqlite3
import stat
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from conftest import DEADLINE, XS, RunXs, Server, environment, start_server, until
from roots import (
    ANSWERS,
    ECHO,
    Root,
    append,
    follow,
    frames,
    is_free,
    script,
    topics,
    wait_frames,
    web_handler,
)
from stores import add, lines
from wire import Wire, request

import xs
from xs import stores
from xs.errors import NotFound
from xs.server import Running
from xs.store import Store

NDJSON = "application/x-ndjson"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    found = Root(str(tmp_path / "root"))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    found = Root(str(tmp_path_factory.mktemp("kept") / "root"))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def shared(kept: Root) -> Iterator[Root]:
    """One root, without further stores, for the tests that neither end it nor read all of it."""
    yield kept
    for each in kept.stores().values():
        kept.remove(each["path"])


@contextlib.contextmanager
def other_server(directory: Path) -> Iterator[Server]:
    server = start_server(str(directory))
    try:
        yield server
    finally:
        server.stop()


def lines_of(*objects: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in objects)


def ask_at_once(root: Root, *requests: tuple[str, dict[str, Any]]) -> list[str]:
    """Appends requests in one go; their ids."""
    body = lines_of(*({"topic": f"xs.store.{what}", "meta": meta} for what, meta in requests))
    with Wire(root.directory) as wire:
        answer = wire.ask("POST", "/append?each", body, content_type=NDJSON)
    return [json.loads(line)["id"] for line in answer.body.splitlines()]


def is_open(directory: Path) -> bool:
    """Whether a server answers on the store's own socket."""
    try:
        with Wire(str(directory)) as wire:
            return wire.ask("GET", "/version").status == 200
    except OSError:
        return False


# Adding


def test_a_store_that_is_added_is_served_in_its_own_directory(
    root: Root, tmp_path: Path, run_xs: RunXs
) -> None:
    path = tmp_path / "notes"
    told = root.add(path)
    assert told == {
        "source_id": told["source_id"],
        "name": "notes",
        "path": str(path),
        "http": None,
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / "sock").stat().st_mode) == 0o600
    assert (path / "lock").read_text() == f"{root.pid} serve\n"
    assert topics(str(path)) == ["xs.start"]
    done = run_xs(["append", str(path), "t"], stdin="by its own socket")
    assert done.returncode == 0
    assert frames(str(path), "t")[0]["content"] == "by its own socket"
    assert topics(root.directory) == ["xs.start", "xs.store.add", "xs.store.added"]


def test_a_store_that_is_there_already_is_served_as_it_is(
    root: Root, tmp_path: Path, run_xs: RunXs
) -> None:
    assert run_xs(["append", str(tmp_path / "old"), "t"], stdin="x").returncode == 0
    root.add(tmp_path / "old")
    assert topics(str(tmp_path / "old")) == ["t", "xs.start"]


def test_it_is_listed_with_its_name_path_and_time(shared: Root, tmp_path: Path) -> None:
    shared.add(tmp_path / "b")
    shared.add(tmp_path / "a", name="first")
    found = shared.stores()
    assert list(found) == ["b", "first"]
    since = found["first"].pop("since")
    assert since.startswith("20") and since.endswith("Z")
    assert found["first"] == {
        "name": "first",
        "path": str(tmp_path / "a"),
        "http": None,
        "error": None,
    }


@pytest.mark.parametrize(
    ("last", "name"),
    [
        ("notes", "notes"),
        ("my notes", "my-notes"),
        (".hidden", "hidden"),
        ("Notizbücher", "Notizb-cher"),
        ("-x-", "x-"),
        ("…", "store"),
        ("n" * 100, "n" * 64),
    ],
)
def test_without_a_name_it_is_called_like_its_directory(
    shared: Root, tmp_path: Path, last: str, name: str
) -> None:
    assert shared.add(tmp_path / last)["name"] == name
    with Wire(shared.directory) as wire:
        assert wire.ask("GET", f"/store/{name}/version").status == 200


def test_its_path_may_be_longer_than_an_address_of_a_socket(shared: Root, tmp_path: Path) -> None:
    here = os.readlink(f"/proc/{shared.pid}/cwd")
    paths = [tmp_path / ("d" * 100) / f"s{n}" / "store" for n in range(10)]
    sources = ask_at_once(
        shared, *(("add", {"path": str(p), "name": p.parent.name}) for p in paths)
    )
    assert [shared.reply_to(source).what for source in sources] == ["added"] * 10
    assert os.readlink(f"/proc/{shared.pid}/cwd") == here
    for path in paths:  # all of them were made at once, and each is itself
        assert append(f"/proc/self/fd/{os.open(path, os.O_RDONLY)}/sock", path.parent.name)
        assert topics(shared.directory, via=f"/store/{path.parent.name}") == [
            "xs.start",
            path.parent.name,
        ]


def test_links_and_dots_in_a_path_lead_where_they_lead(shared: Root, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert shared.add(f"{tmp_path}/link/../link/./")["path"] == str(tmp_path / "real")
    assert "served already" in shared.ask("add", {"path": f"{tmp_path}/real/"}).reason
    shared.remove(tmp_path / "link")
    assert not is_open(tmp_path / "real")


def test_a_path_that_leads_to_what_json_can_not_tell_is_an_error(
    shared: Root, tmp_path: Path
) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/real\xff")
    os.symlink(b"real\xff", os.fsencode(tmp_path) + b"/link")
    for what in ("add", "remove"):
        assert "which is not UTF-8" in shared.ask(what, {"path": f"{tmp_path}/link"}).reason
    shared.add(tmp_path / "next")
    assert list(shared.stores()) == ["next"]


@pytest.mark.parametrize("later", [False, True])
def test_a_request_may_have_an_integer_of_any_length_beside_it(
    root: Root, tmp_path: Path, later: bool
) -> None:
    if later:
        root.stop()
    digits = b"1" * 5000
    for name in (b"a", b"b"):
        path = os.path.join(os.fsencode(tmp_path), name)
        meta = b'{"path":"%b","n":%b}' % (path, digits)
        with xs.open(root.directory) as client:
            fields = [("xs-meta", meta.decode())]
            assert client._transport.request("POST", "/append/xs.store.add", fields).status == 200
    if later:
        root.start()
    root.wait_for("a", "b")
    root.stop()
    root.start()
    root.wait_for("a", "b")
    root.remove(tmp_path / "a")


def test_a_store_may_lie_in_the_directory_of_another(root: Root, tmp_path: Path) -> None:
    root.add(tmp_path / "root" / "stores" / "a")
    root.add(tmp_path / "root" / "stores" / "a" / "inner")
    append(str(tmp_path / "root" / "stores" / "a" / "inner"), "t")
    root.stop()
    root.start()
    root.wait_for("a", "inner")
    assert topics(str(tmp_path / "root" / "stores" / "a" / "inner"), "t") == ["t"]


# What it has of its own


def test_its_scripts_run_on_its_own_stream(root: Root, tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    root.add(a)
    root.add(b)
    for each in (a, b):
        append(each, "echo.register", ECHO, meta={"topic": "in"})
        append(each, "tick.spawn", script('echo "$XS_ADDR"', "exec sleep 100"))
        assert wait_frames(each, "tick.recv")[0]["content"] == each
    append(a, "in")
    assert wait_frames(a, "echo")[0]["content"] == "seen"
    assert topics(b, "echo") == []
    assert not {"tick.recv", "echo"} & set(topics(root.directory))
    with Wire(a) as wire:
        assert [json.loads(line)["name"] for line in wire.ask("GET", "/ps").body.splitlines()] == [
            "echo",
            "tick",
        ]
    with Wire(root.directory) as wire:
        assert wire.ask("GET", "/ps").body == b""


def test_without_scripts_no_store_runs_any(tmp_path: Path) -> None:
    root = Root(str(tmp_path / "root"), "--no-scripts")
    try:
        root.add(tmp_path / "a")
        append(str(tmp_path / "a"), "tick.spawn", script("echo x"))
        with Wire(str(tmp_path / "a")) as wire:
            assert wire.ask("POST", "/eval", b"#!/bin/echo").status == 403
            assert wire.ask("GET", "/ps").status == 403
        assert "run" not in os.listdir(tmp_path / "a")
    finally:
        root.close()


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return bytes(answer.read())


def test_its_gateway_answers_the_web_at_an_address_of_its_own(shared: Root, tmp_path: Path) -> None:
    urls = {}
    for name in ("a", "b"):
        urls[name] = shared.add(tmp_path / name, http=":0")["http"]
        append(
            str(tmp_path / name), "web.register", web_handler(name), meta={"topic": "http.request"}
        )
    assert urls["a"] != urls["b"]
    assert {name: each["http"] for name, each in shared.stores().items()} == urls
    assert [get(urls[name]) for name in ("a", "b", "a")] == [b"a", b"b", b"a"]
    assert len(frames(str(tmp_path / "a"), "http.request")) == 2
    assert frames(str(tmp_path / "a"), "xs.start")[0]["meta"]["http"] == [urls["a"]]
    assert frames(shared.directory, "http.*") == []


def test_its_gateway_may_be_a_unix_socket(shared: Root, tmp_path: Path) -> None:
    path = str(tmp_path / "web.sock")
    assert shared.add(tmp_path / "a", http=path)["http"] == path
    append(str(tmp_path / "a"), "w.register", web_handler("hi"), meta={"topic": "http.request"})
    with Wire(path) as wire:
        assert wire.ask("GET", "/").body == b"hi"
    shared.remove(tmp_path / "a")
    assert not os.path.exists(path)


# Removing


def test_a_store_that_is_removed_is_nobody_s(root: Root, tmp_path: Path) -> None:
    a = tmp_path / "a"
    source = root.add(a, http=":0", name="one")["source_id"]
    url = root.stores()["one"]["http"]
    append(str(a), "tick.spawn", script("echo $$", "exec sleep 1000"))
    pid = int(wait_frames(str(a), "tick.recv")[0]["content"])
    told = root.remove(a)
    assert (told["name"], told["path"], told["store_id"]) == ("one", str(a), source)
    assert root.stores() == {}
    assert not os.path.exists(a / "sock") and is_free(a)
    assert (a / "lock").read_text() == ""
    until(lambda: not os.path.exists(f"/proc/{pid}"))
    with pytest.raises(OSError):
        get(url)
    with other_server(a):
        seen = topics(str(a))
        while seen[-1] != "xs.start":  # the script may have spoken again since
            assert seen.pop().startswith("tick.")
        assert seen[-3:] == ["tick.stop", "xs.stop", "xs.start"]
        assert f"process {root.pid}" not in (a / "lock").read_text()
        with Wire(root.directory) as wire:
            assert wire.ask("GET", "/store/one/version").status == 404


def test_it_can_be_removed_by_its_name(shared: Root, tmp_path: Path) -> None:
    shared.add(tmp_path / "a", name="one")
    assert shared.ask("remove", {"name": "one"}).what == "removed"
    shared.add(tmp_path / "a", name="one")
    wrong = shared.ask("remove", {"name": "two", "path": str(tmp_path / "a")})
    assert wrong.reason == f"{tmp_path}/a is not served here as two"


def test_a_removed_store_leaves_nothing_of_itself_in_the_process(
    root: Root, tmp_path: Path
) -> None:
    def once() -> None:
        root.add(tmp_path / "a", http=":0")
        append(str(tmp_path / "a"), "e.register", ECHO, meta={"topic": "in"})
        append(str(tmp_path / "a"), "in", ttl="time:60000")
        wait_frames(str(tmp_path / "a"), "e")
        with Wire(root.directory) as wire:
            wire.send(follow("/store/a/?follow"))
            wire.head()
            root.remove(tmp_path / "a")
            wire.rest()

    once()
    until(lambda: root.number("Threads") <= 8)
    files, threads = root.descriptors(), root.number("Threads")
    for _ in range(5):
        once()
    until(lambda: root.descriptors() <= files and root.number("Threads") <= threads)


# Starting again


@pytest.mark.parametrize("end", [Root.stop, Root.kill], ids=["stopped", "killed"])
def test_stores_come_back(tmp_path: Path, end: Callable[[Root], object]) -> None:
    root = Root(str(tmp_path / "root"))
    try:
        for name in ("a", "b", "c"):
            root.add(tmp_path / name, name=f"my-{name}", http=str(tmp_path / f"{name}.web"))
        a = str(tmp_path / "a")
        append(a, "w.register", web_handler("back"), meta={"topic": "http.request"})
        append(a, "e.register", ECHO, meta={"topic": "in"})
        append(a, "in")
        wait_frames(a, "e")
        root.remove(tmp_path / "b")
        asked = topics(root.directory, "xs.store.*")
        end(root)
        root.start()
        root.wait_for("my-a", "my-c")
        assert list(root.stores()) == ["my-a", "my-c"]
        assert topics(root.directory, "xs.store.*") == asked  # nobody asks, nobody is answered
        append(a, "in")
        assert len(wait_frames(a, "e", 2)) == 2  # each once
        with Wire(str(tmp_path / "a.web")) as wire:
            assert wire.ask("GET", "/").body == b"back"
    finally:
        root.close()


def test_what_is_asked_while_no_server_runs_is_done_when_one_starts(
    root: Root, tmp_path: Path, run_xs: RunXs
) -> None:
    root.add(tmp_path / "a")
    root.stop()
    asked = [
        ("add", {"path": str(tmp_path / "b")}),
        ("remove", {"path": str(tmp_path / "a")}),
        ("remove", {"path": str(tmp_path / "nowhere")}),
        ("add", {"path": str(tmp_path / "c")}),
        ("remove", {"path": str(tmp_path / "c")}),
        ("add", {"path": str(tmp_path / "c"), "name": "c2"}),
    ]
    body = lines_of(*({"topic": f"xs.store.{what}", "meta": meta} for what, meta in asked))
    assert run_xs(["append", root.directory, "--json"], stdin=body).returncode == 0
    root.start()
    asked_frames = frames(root.directory, "xs.store.add,xs.store.remove")[1:]
    replies = [root.reply_to(frame["id"]).what for frame in asked_frames]
    assert replies == ["added", "removed", "error", "added", "removed", "added"]
    assert list(root.stores()) == ["b", "c2"]
    root.stop()
    root.start()
    root.wait_for("b", "c2")
    assert list(root.stores()) == ["b", "c2"]
    answers = frames(root.directory, "xs.store.added,xs.store.removed,xs.store.error")
    assert len(answers) == 1 + 6  # each once


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_requests_under_way_when_it_ends_are_carried_out_once(
    root: Root, tmp_path: Path, number: int
) -> None:
    paths = [tmp_path / f"s{n}" for n in range(40)]
    sources = ask_at_once(root, *(("add", {"path": str(path)}) for path in paths))
    root.server.process.send_signal(number)
    root.server.process.communicate(timeout=20)
    assert all(is_free(path) for path in paths if (path / "lock").exists())
    root.start()
    assert {root.reply_to(source).what for source in sources} == {"added"}
    assert all(is_open(path) for path in paths)
    told = [frame["meta"]["source_id"] for frame in frames(root.directory, "xs.store.added")]
    assert sorted(told) == sorted(sources)


def test_what_is_kept_does_not_hang_on_frames_that_expire_or_are_removed(
    root: Root, tmp_path: Path
) -> None:
    for n, ttl in enumerate(("ephemeral", "time:2000", "last:1", "last:1", "forever")):
        source = root.request("add", {"path": str(tmp_path / f"s{n}")}, ttl)
        assert root.reply_to(source).what == "added"
    root.remove(tmp_path / "s3")
    assert root.ask("add", {"path": str(tmp_path / "s0")}).what == "error"
    with Wire(root.directory) as wire:
        for frame in frames(root.directory, "xs.store.*"):
            assert wire.ask("DELETE", f"/{frame['id']}").status in (204, 404)
    root.stop()
    root.start()
    root.wait_for("s0", "s1", "s2", "s4")
    assert list(root.stores()) == ["s0", "s1", "s2", "s4"]
    assert topics(root.directory, "xs.store.*") == []


def test_an_ephemeral_request_that_comes_while_the_server_starts_is_heard(tmp_path: Path) -> None:
    def never(*_: Any) -> NoReturn:
        raise AssertionError

    root = Store(str(tmp_path / "root"), exclusive=True, create=True)
    asked = stores.Stores(root, never, never, lambda text: None)
    meta = json.dumps({"name": "none"})
    source = add(root, "xs.store.remove", meta=meta, ttl="ephemeral")  # a socket listens by now
    asked.start()
    until(lambda: bool(lines(root, topic="xs.store.error")), "it is answered")
    (line,) = lines(root, topic="xs.store.error")
    assert json.loads(line)["meta"]["source_id"] == source
    asked.stop()
    root.close()


def imported(root: Root, topic: str, meta: Any, number: int) -> None:
    value = f"03gw3h000000000000000{number:04d}"
    frame = {"topic": topic, "id": value, "hash": None, "meta": meta, "ttl": None}
    with Wire(root.directory) as wire:
        assert wire.ask("POST", "/import", json.dumps(frame).encode()).status == 200


def test_frames_that_look_like_answers_mean_nothing(
    root: Root, tmp_path: Path, run_xs: RunXs
) -> None:
    root.add(tmp_path / "kept")
    (tmp_path / "file").write_text("no store")
    refused = root.request("add", {"path": str(tmp_path / "file")})
    assert root.reply_to(refused).what == "error"
    kept = frames(root.directory, "xs.store.added")[0]["meta"]["source_id"]
    root.stop()
    assert (
        run_xs(
            ["append", root.directory, "xs.store.add"],
            env={},
        ).returncode
        == 0
    )  # with no meta: it is an error
    asked = json.loads(
        run_xs(
            [
                "append",
                root.directory,
                "xs.store.add",
                "--meta",
                json.dumps({"path": str(tmp_path / "new")}),
            ]
        ).stdout
    )["id"]
    root.start()
    root.wait_for("kept", "new")
    root.stop()
    root.start()
    (tmp_path / "file").unlink()
    forged: list[tuple[str, Any]] = [
        ("xs.store.added", {"source_id": refused, "path": str(tmp_path / "file")}),
        ("xs.store.removed", {"source_id": kept, "store_id": kept, "name": "kept"}),
        ("xs.store.removed", {"source_id": asked, "store_id": asked}),
        *(
            ("xs.store.added", meta)
            for meta in ([1], "x", None, {"source_id": 7}, {"source_id": "0"})
        ),
    ]
    for number, (topic, meta) in enumerate(forged):
        imported(root, topic, meta, number)
    root.stop()
    root.start()
    root.wait_for("kept", "new")
    assert list(root.stores()) == ["kept", "new"]
    assert not (tmp_path / "file").exists()


def test_the_imported_history_of_another_root_opens_nothing(
    root: Root, tmp_path: Path, run_xs: RunXs
) -> None:
    root.add(tmp_path / "a")
    root.add(tmp_path / "b")
    root.remove(tmp_path / "b")
    copy = str(tmp_path / "copy")
    exported = run_xs(["cat", root.directory, "--with-content"]).stdout
    assert run_xs(["import", copy], stdin=exported).returncode == 0
    other = Root(copy)
    try:
        other.add(tmp_path / "c")  # by now it has read all there was
        assert list(other.stores()) == ["c"]
        other.stop()
        other.start()
        other.wait_for("c")
        assert list(other.stores()) == ["c"]
    finally:
        other.close()
    assert is_open(tmp_path / "a") and not is_open(tmp_path / "b")


def test_a_store_that_is_gone_is_not_made_anew_and_the_others_come_back(
    root: Root, tmp_path: Path
) -> None:
    root.add(tmp_path / "a")
    root.add(tmp_path / "b")
    root.stop()
    (tmp_path / "a").rename(tmp_path / "unplugged")
    root.start()
    root.wait_for("a", "b")
    assert root.stores()["b"]["error"] is None
    assert root.stores()["a"]["error"].startswith(f"no store at: {tmp_path}/a")
    assert not (tmp_path / "a").exists()
    with Wire(root.directory) as wire:
        answer = wire.ask("GET", "/store/a/version")
        assert answer.status == 503 and b"no store at" in answer.body
        assert wire.ask("GET", "/store/b/version").status == 200
    assert "remove it first" in root.ask("add", {"path": str(tmp_path / "a")}).reason
    root.remove(tmp_path / "a")
    root.add(tmp_path / "a")
    assert root.stop().count("no store at") == 1


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A server in this process, for tests that set its limits."""
    found = Running(str(tmp_path / "root"), [], [])
    try:
        yield found
    finally:
        found.stop()


def started_without(root: str, store: Path, away: Path) -> Running:
    """A server that serves a store, started again while that is away."""
    first = Running(root, [], [])
    append(root, "xs.store.add", meta={"path": str(store)})
    wait_frames(root, "xs.store.added")
    first.stop()
    store.rename(away)
    return Running(root, [], [])


def test_what_could_not_be_opened_at_the_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.05)
    root, a = str(tmp_path / "root"), tmp_path / "a"
    second = started_without(root, a, tmp_path / "unplugged")
    try:
        until(lambda: second.stores.status() and second.stores.status()[0]["error"])
        (tmp_path / "unplugged").rename(a)
        until(lambda: second.stores.status()[0]["error"] is None)
        assert topics(str(a)) == ["xs.start", "xs.stop", "xs.start"]
    finally:
        second.stop()
    assert capfd.readouterr().err.count("no store at") == 1  # said once, however often it is tried


def refuse_a_thread(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From now on the next thread that isn't the main one's to start can't be; set when it was."""
    start_thread = _thread.start_new_thread
    refused = threading.Event()

    def refuse_one(act: Callable[..., object], args: tuple[object, ...]) -> int:
        if not refused.is_set() and threading.current_thread().name != "MainThread":
            refused.set()
            raise RuntimeError("can't start new thread")
        return start_thread(act, args)

    monkeypatch.setattr(_thread, "start_new_thread", refuse_one)
    return refused


def test_one_whose_retry_finds_no_thread_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.05)
    root, a = str(tmp_path / "root"), tmp_path / "a"
    second = started_without(root, a, tmp_path / "unplugged")
    try:
        until(lambda: second.stores.status() and second.stores.status()[0]["error"])
        refused = refuse_a_thread(monkeypatch)
        assert refused.wait(DEADLINE)
        (tmp_path / "unplugged").rename(a)
        until(lambda: second.stores.status()[0]["error"] is None)
        append(root, "xs.store.remove", meta={"path": str(a)})
        wait_frames(root, "xs.store.removed")
    finally:
        second.stop()


# Errors


def make_store(run_xs: RunXs, path: Path, count: int = 1) -> None:
    body = "".join(f"{n}\n" for n in range(count))
    done = run_xs(["append", str(path), "t", "--lines"], stdin=body)
    assert done.returncode == 0, done.stderr


def damage(path: Path) -> None:
    """Overwrites the index but for its first page."""
    size = (path / "xs.db").stat().st_size
    with open(path / "xs.db", "r+b") as file:
        file.seek(4096)
        file.write(random.Random(1).randbytes(size - 4096))


def make_wrong(kind: str, path: Path, run_xs: RunXs) -> None:
    if kind == "a file":
        path.write_text("text")
    elif kind == "below a file":
        path.parent.write_text("text")
    elif kind == "other files":
        path.mkdir()
        (path / "letter.txt").write_text("dear")
    elif kind == "another database":
        path.mkdir()
        with sqlite3.connect(path / "xs.db") as database:
            database.execute("CREATE TABLE mine (x)")
        database.close()
    elif kind == "no database":
        path.mkdir()
        (path / "xs.db").write_text("text that is no database at all, but long enough" * 99)
    elif kind == "a newer format":
        make_store(run_xs, path)
        with sqlite3.connect(path / "xs.db") as database:
            database.execute("PRAGMA user_version = 1000")
        database.close()
    elif kind == "damaged":
        make_store(run_xs, path, 3000)
        damage(path)
    else:
        make_store(run_xs, path)
        (path / "cas").rmdir()
        (path / "cas").write_text("no folder")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("a file", "is not a directory"),
        ("below a file", "can't"),
        ("other files", "has other files in it"),
        ("another database", "another program's database"),
        ("no database", "is not an SQLite database"),
        ("a newer format", "use a newer xs"),
        ("damaged", "damaged"),
        ("no cas", "can't"),
    ],
)
def test_what_can_not_be_opened_is_an_error_and_leaves_nothing_open(
    shared: Root, tmp_path: Path, run_xs: RunXs, kind: str, says: str
) -> None:
    path = tmp_path / "below" / "store" if kind == "below a file" else tmp_path / "store"
    make_wrong(kind, path, run_xs)
    shared.add(tmp_path / "good")
    shared.ask("add", {"path": str(path)})
    until(lambda: shared.number("Threads") <= 12)
    files = shared.descriptors()
    for _ in range(5):
        reply = shared.ask("add", {"path": str(path), "name": "bad"})
        assert says in reply.reason, reply.reason
        assert (reply.meta["name"], reply.meta["path"]) == ("bad", str(path))
    until(lambda: shared.descriptors() <= files and shared.number("Threads") <= 12)
    assert not os.path.exists(path / "sock")
    assert list(shared.stores()) == ["good"]
    assert is_open(tmp_path / "good")
    if path.is_dir():
        # When the cause is gone, it can be added.
        os.rename(path, tmp_path / "away")
        shared.add(path, name="bad")


def test_what_is_answered_with_an_error_is_listed_no_more(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is in the way of those behind it in the line until it is forgotten."""
    forget, may_forget = running.stores._forget, threading.Event()

    def forget_later(entry: Any) -> None:
        assert may_forget.wait(DEADLINE)
        forget(entry)

    monkeypatch.setattr(running.stores, "_forget", forget_later)
    (tmp_path / "a").write_text("a file")
    append(running.root.folder, "xs.store.add", meta={"path": str(tmp_path / "a")})
    wait_frames(running.root.folder, "xs.store.error")
    try:
        assert running.stores.status() == []
        with pytest.raises(NotFound):
            running.stores.find("a")
    finally:
        may_forget.set()


def test_a_store_can_be_added_once(shared: Root, tmp_path: Path) -> None:
    shared.add(tmp_path / "a", name="one")
    again = {"path": str(tmp_path / "a"), "name": "two"}
    assert shared.ask("add", again).reason == f"{tmp_path}/a is served already, as one"
    other = {"path": str(tmp_path / "b"), "name": "one"}
    expected = f"the name one is taken by {tmp_path}/a: give another name"
    assert shared.ask("add", other).reason == expected
    assert not (tmp_path / "b").exists()
    assert is_open(tmp_path / "a")


def test_the_root_is_neither_added_nor_removed(root: Root, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root.directory)
    for path in (root.directory, str(tmp_path / "link"), f"{tmp_path}/x/../root"):
        assert "is the root store" in root.ask("add", {"path": path}).reason
        assert "is the root store" in root.ask("remove", {"path": path}).reason
    assert is_open(Path(root.directory))


def test_a_store_that_another_process_has_is_left_to_it(shared: Root, tmp_path: Path) -> None:
    with other_server(tmp_path / "a") as server:
        reply = shared.ask("add", {"path": str(tmp_path / "a")})
        assert reply.reason == (
            f"store locked: {tmp_path}/a is served by process {server.process.pid}"
        )
        assert is_open(tmp_path / "a")
    shared.add(tmp_path / "a")


def test_what_is_not_served_can_not_be_removed(shared: Root, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    assert shared.ask("remove", {"path": path}).reason == f"{path} is not served here"
    assert shared.ask("remove", {"name": "a"}).reason == "a is not served here"
    shared.add(path)
    first, second = ask_at_once(shared, ("remove", {"path": path}), ("remove", {"path": path}))
    assert shared.reply_to(first).what == "removed"
    assert shared.reply_to(second).reason == f"{path} is not served here"
    assert not os.path.exists(tmp_path / "a" / "sock")


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        (None, "is a record with"),
        ("/a", "is a record with"),
        (["/a"], "is a record with"),
        ({}, "is a record with"),
        ({"path": None}, "is a record with"),
        ({"path": 7}, "is a record with"),
        ({"path": ""}, "is absolute"),
        ({"path": "relative/path"}, "is absolute"),
        ({"path": "~/store"}, "is absolute"),
        ({"path": "/nul\0/a"}, "NUL"),
        ({"path": "/" + "long/" * 1000}, "4096"),
        ({"path": "/" + "n" * 300}, "name too long"),
        ({"path": "HERE", "name": ""}, "a store's name has"),
        ({"path": "HERE", "name": 7}, "a store's name has"),
        ({"path": "HERE", "name": ["x"] * 1000}, "a store's name has"),
        ({"path": "HERE", "name": "a/b"}, "a store's name has"),
        ({"path": "HERE", "name": ".."}, "a store's name has"),
        ({"path": "HERE", "name": "x" * 65}, "a store's name has"),
        ({"path": "HERE", "name": "new\nline"}, "a store's name has"),
        ({"path": "HERE", "http": 80}, "http is the address"),
        ({"path": "HERE", "http": ""}, "http is the address"),
        ({"path": "HERE", "http": "./web.sock"}, "is absolute"),
        ({"path": "HERE", "http": "nonsense"}, "can't answer the web"),
        ({"path": "HERE", "http": "https://:0"}, "needs a certificate"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_a_request_that_makes_no_sense_is_an_error(
    shared: Root, tmp_path: Path, meta: Any, says: str
) -> None:
    if isinstance(meta, dict) and meta.get("path") == "HERE":
        meta = {**meta, "path": str(tmp_path / "here")}
    reply = shared.ask("add", meta)
    assert says.lower() in reply.reason.lower()
    assert len(reply.reason) < 600
    if not isinstance(meta, dict) or "name" not in meta:
        shared.ask("remove", meta).reason  # noqa: B018
    shared.add(tmp_path / "next")  # and what comes after it is heard
    assert list(shared.stores()) == ["next"]


@pytest.mark.parametrize("later", [False, True])
def test_a_request_in_chunks_is_one_request(
    root: Root, tmp_path: Path, run_xs: RunXs, later: bool
) -> None:
    if later:
        root.stop()
    meta = json.dumps({"path": str(tmp_path / "a")})
    words = ["append", root.directory, "xs.store.add", "--chunked", "--meta", meta]
    done = run_xs(words, stdin=b"x" * 40_000)
    assert done.returncode == 0, done.stderr
    if later:
        root.start()
    wait_frames(root.directory, "xs.store.added")
    root.remove(tmp_path / "a")  # whatever else was asked before is answered by now
    assert frames(root.directory, "xs.store.error") == []


def test_an_address_that_is_taken_is_an_error(shared: Root, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f":{taken.getsockname()[1]}"
        reply = shared.ask("add", {"path": str(tmp_path / "a"), "http": address})
        assert "can't listen on" in reply.reason
        assert not os.path.exists(tmp_path / "a"), "nothing has changed"
        (tmp_path / "b").mkdir()
        reply = shared.ask(
            "add", {"path": str(tmp_path / "b"), "http": str(tmp_path / "no" / "web")}
        )
        assert "can't listen on" in reply.reason and not os.listdir(tmp_path / "b")
    assert shared.add(tmp_path / "a", http=address)["http"].endswith(address)
    shared.ask("remove", {"path": str(tmp_path / "a")})
    with socket.socket() as taken:  # that a store which was there is not served either
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(address[1:])))
        taken.listen()
        reply = shared.ask("add", {"path": str(tmp_path / "a"), "http": address})
        assert "can't listen on" in reply.reason
        assert is_free(tmp_path / "a") and not os.path.exists(tmp_path / "a" / "sock")


def test_its_gateway_may_have_its_socket_in_the_store_that_is_yet_to_be_made(
    root: Root, tmp_path: Path
) -> None:
    path = str(tmp_path / "a" / "web")
    assert root.add(tmp_path / "a", http=path)["http"] == path
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    root.ask("remove", {"path": str(tmp_path / "a")})
    assert not os.path.exists(path)


@pytest.mark.parametrize("folder", ["cas", "run", "cas/ab", "run/x/y"])
def test_no_store_is_made_in_a_folder_that_another_one_clears(
    shared: Root, tmp_path: Path, folder: str
) -> None:
    shared.add(tmp_path / "a")
    for store in (shared.directory, tmp_path / "a"):
        path = f"{store}/{folder}"
        assert f"a folder of the store at {store}" in shared.ask("add", {"path": path}).reason
        assert not os.path.exists(f"{path}/xs.db")


@pytest.mark.parametrize("at_once", [False, True])
def test_no_store_is_made_around_one_that_it_would_clear_away(
    root: Root, tmp_path: Path, run_xs: RunXs, at_once: bool
) -> None:
    inner, outer = str(tmp_path / "q" / "cas" / "54"), str(tmp_path / "q")
    expected = f"{inner} lies in cas, a folder of the store at {outer}"
    asked = [("add", {"path": inner, "name": "inner"}), ("add", {"path": outer})]
    if at_once:
        first, second = (root.reply_to(source) for source in ask_at_once(root, *asked))
    else:
        first, second = (root.ask(what, meta) for what, meta in asked)
    assert (first.what, second.reason) == ("added", expected)
    # Nor by anybody else, whoever serves the inner one.
    root.remove(inner)
    said = f"can't make a store at {outer}: it would clear away the one at {inner}"
    assert said in root.ask("add", {"path": outer}).reason
    for command in (["append", outer, "t"], ["serve", outer]):
        done = run_xs(command)
        assert done.returncode != 0 and said in done.stderr.decode()
    assert sorted(os.listdir(outer)) == ["cas"]


def test_the_root_is_no_place_s_own_either(tmp_path: Path) -> None:
    root = Root(str(tmp_path / "q" / "run" / "root"))
    try:
        reason = root.ask("add", {"path": str(tmp_path / "q")}).reason
        assert reason == f"{root.directory} lies in run, a folder of the store at {tmp_path}/q"
    finally:
        root.close()


def test_one_that_has_come_to_lie_in_another_s_folder_is_listed_and_can_be_removed(
    root: Root, tmp_path: Path, run_xs: RunXs
) -> None:
    inner = tmp_path / "q" / "cas" / "54"
    root.add(inner, name="inner")
    root.add(tmp_path / "other")
    root.stop()
    make_store(run_xs, tmp_path / "made")
    (tmp_path / "made" / "xs.db").rename(tmp_path / "q" / "xs.db")  # as a backup is restored
    root.start()
    root.wait_for("inner", "other")
    expected = f"{inner} lies in cas, a folder of the store at {tmp_path}/q"
    assert root.stores()["inner"]["error"] == expected
    with Wire(root.directory) as wire:
        answer = wire.ask("GET", "/store/inner/version")
        assert answer.status == 503 and b"lies in cas" in answer.body
    root.remove(inner)
    assert list(root.stores()) == ["other"]


def test_a_root_that_has_come_to_lie_where_one_of_its_stores_was_lists_it_and_removes_it(
    root: Root, tmp_path: Path
) -> None:
    root.add(tmp_path / "a")
    root.stop()
    (tmp_path / "a").rename(tmp_path / "away")
    os.rename(root.directory, tmp_path / "a")
    moved = Root(str(tmp_path / "a"))
    try:
        moved.wait_for("a")
        assert moved.stores()["a"]["error"].endswith("/a is the root store: it is served already")
        moved.remove(tmp_path / "a")
        assert moved.stores() == {}
        assert "stop the server" in moved.ask("remove", {"path": moved.directory}).reason
    finally:
        moved.close()


def test_one_for_which_there_is_no_thread_at_the_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.05)
    root, a = str(tmp_path / "root"), tmp_path / "a"
    first = Running(root, [], [])
    append(root, "xs.store.add", meta={"path": str(a)})
    wait_frames(root, "xs.store.added")
    first.stop()
    refused = refuse_a_thread(monkeypatch)
    second = Running(root, [], [])
    try:
        assert refused.wait(DEADLINE)
        until(lambda: [each["error"] for each in second.stores.status()] == [None])
        until(lambda: is_open(a))
    finally:
        second.stop()


def test_there_is_a_limit(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "STORES_MAX", 2)
    for n in range(4):
        append(running.root.folder, "xs.store.add", meta={"path": str(tmp_path / f"s{n}")})
    refused = wait_frames(running.root.folder, "xs.store.error", 2)
    assert {frame["meta"]["reason"] for frame in refused} == {"2 stores are served already"}
    until(lambda: all(is_open(tmp_path / f"s{n}") for n in range(2)))


def test_only_requests_can_be_appended(shared: Root, tmp_path: Path) -> None:
    with Wire(shared.directory) as wire:
        for topic in ("xs.store.added", "xs.store.removed", "xs.store.error", "xs.store"):
            assert wire.ask("POST", f"/append/{topic}").status == 400


def test_what_is_asked_of_a_store_that_is_no_root_is_not_heard(root: Root, tmp_path: Path) -> None:
    root.add(tmp_path / "a")
    append(str(tmp_path / "a"), "xs.store.add", meta={"path": str(tmp_path / "b")})
    root.add(tmp_path / "c")
    assert list(root.stores()) == ["a", "c"]
    assert topics(str(tmp_path / "a")) == ["xs.start", "xs.store.add"]
    with Wire(str(tmp_path / "a")) as wire:
        assert wire.ask("GET", "/stores").status == 404
        assert wire.ask("GET", "/store/c/version").status == 404


# What one does to the others


def test_a_store_that_is_damaged_while_it_is_served_disturbs_no_other(
    root: Root, tmp_path: Path, run_xs: RunXs
) -> None:
    make_store(run_xs, tmp_path / "a", 30_000)
    root.add(tmp_path / "a")
    root.add(tmp_path / "b")
    damage(tmp_path / "a")
    for via in (str(tmp_path / "a"), root.directory):
        with Wire(via) as wire:
            prefix = "" if via != root.directory else "/store/a"
            wire.send(request("GET", f"{prefix}/"))
            try:
                assert wire.answer().status == 500
            except EOFError:
                pass  # the answer had begun, and broke off
    append(str(tmp_path / "b"), "t")
    append(root.directory, "t", via="/store/b")
    assert len(frames(str(tmp_path / "b"), "t")) == 2
    root.stop()
    root.start()
    root.wait_for("a", "b")
    assert "damaged" in root.stores()["a"]["error"]
    assert root.stores()["b"]["error"] is None


def test_a_store_that_is_full_disturbs_no_other(root: Root, tmp_path: Path) -> None:
    full, other = str(tmp_path / "full"), str(tmp_path / "other")
    root.add(full)
    root.add(other)
    # As if the disk of that one were full: none of its files may become larger than they are.
    resource.prlimit(root.pid, resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    with Wire(full) as wire:
        statuses = [
            wire.ask("POST", "/append/t", b"x" * 15_000, connection="keep-alive").status
            for _ in range(80)
        ]
    assert set(statuses) <= {200, 503, 507} and statuses[0] == 200 < statuses[-1]
    with Wire(root.directory) as wire:
        assert wire.ask("POST", "/store/full/append/t", b"x" * 15_000).status > 500
    for _ in range(10):
        append(other, "t", b"small")
        append(root.directory, "t", b"small", via="/store/other")
    root.remove(full)
    resource.prlimit(
        root.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    root.add(full)
    assert len(frames(full, "t")) == statuses.count(200)


def test_a_script_that_runs_wild_disturbs_no_other_store(root: Root, tmp_path: Path) -> None:
    wild, other = str(tmp_path / "wild"), str(tmp_path / "other")
    root.add(wild)
    root.add(other)
    append(other, "e.register", ECHO, meta={"topic": "in"})
    # One that never ends to say things, two that answer each other for ever, one that never does.
    append(wild, "loud.spawn", script(f"exec yes {'loud' * 50}"))
    for name, next_name in (("ping", "pong"), ("pong", "ping")):
        answer = json.dumps({"append": [{"topic": next_name}]})
        each = script(f"while read -r line; do echo '{answer}'; done")
        append(wild, f"to-{next_name}.register", each, meta={"topic": name})
    append(wild, "dead.register", script("while true; do :; done"))
    append(wild, "ping")
    with Wire(wild) as wire:
        for topic in ("pong", "loud.recv"):
            until(lambda: wire.ask("GET", f"/first/{topic}?first=9").body.count(b"\n") == 9)  # noqa: B023
    for n in range(1, 21):
        append(other, "in")
        append(root.directory, "in", via="/store/other")
        wait_frames(other, "e", 2 * n)
    root.add(tmp_path / "third")
    root.remove(wild)
    assert is_free(wild) and is_open(Path(other)) and is_open(tmp_path / "third")


def test_one_that_waits_for_its_lock_keeps_nobody_waiting(root: Root, tmp_path: Path) -> None:
    held = []
    for n in range(10):
        path = tmp_path / f"held{n}"
        path.mkdir()
        file = open(path / "lock", "w")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        held.append(file)
    sources = ask_at_once(root, *(("add", {"path": str(tmp_path / f"held{n}")}) for n in range(10)))
    root.add(tmp_path / "free")
    assert not any(each["since"] for name, each in root.stores().items() if name != "free")
    for file in held:
        file.close()
    assert {root.reply_to(source).what for source in sources} == {"added"}


# One after the other


def test_what_is_asked_at_once_is_done_in_its_order(root: Root, tmp_path: Path) -> None:
    path = {"path": str(tmp_path / "a")}
    sources = ask_at_once(root, *(("add", path), ("remove", path)) * 10, ("add", path))
    replies = [root.reply_to(source).what for source in sources]
    assert replies == ["added", "removed"] * 10 + ["added"]
    assert topics(str(tmp_path / "a")) == ["xs.start", "xs.stop"] * 10 + ["xs.start"]
    told = [
        frame["meta"]["source_id"]
        for frame in frames(root.directory, "xs.store.added,xs.store.removed")
    ]
    assert told == sources


def test_a_name_and_an_address_are_free_for_the_next_one(shared: Root, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f":{free.getsockname()[1]}"
    requests: list[tuple[str, dict[str, Any]]] = []
    for n in range(6):
        path = str(tmp_path / f"s{n}")
        requests.append(("add", {"path": path, "name": "it", "http": address}))
        requests.append(("remove", {"path": path}))
    sources = ask_at_once(shared, *requests)
    assert [shared.reply_to(source).what for source in sources] == ["added", "removed"] * 6


def test_what_fails_leaves_its_path_its_name_and_its_address_to_the_next(
    root: Root, tmp_path: Path
) -> None:
    web = str(tmp_path / "web")
    (tmp_path / "file").write_text("no store")
    a, file = str(tmp_path / "a"), str(tmp_path / "file")
    asked: list[tuple[str, dict[str, Any], str]] = [
        ("add", {"path": a, "http": ":99999"}, "can't answer the web"),
        ("add", {"path": a}, "added"),
        ("add", {"path": file, "name": "b", "http": web}, "is not a directory"),
        ("add", {"path": str(tmp_path / "b"), "http": web}, "added"),
        ("add", {"path": str(tmp_path / "c"), "name": "b"}, "the name b is taken by"),
        ("remove", {"name": "a"}, "removed"),
        ("add", {"path": str(tmp_path / "d"), "name": "a"}, "added"),
    ]
    # All that has to do with each other: by the names a and b, the path of a, the address.
    sources = ask_at_once(root, *((what, meta) for what, meta, _ in asked))
    for source, (_, _, says) in zip(sources, asked):
        reply = root.reply_to(source)
        assert says in reply.meta.get("reason", reply.what), reply
    told = [each["meta"]["source_id"] for each in frames(root.directory, ANSWERS)]
    for some in ((0, 1, 5, 6), (2, 3, 4)):
        order = [told.index(sources[n]) for n in some]
        assert order == sorted(order)
    assert list(root.stores()) == ["a", "b"]


def test_one_that_is_still_being_opened_is_waited_for_by_who_comes_after_it(
    root: Root, tmp_path: Path
) -> None:
    path = tmp_path / "held"
    path.mkdir()
    with open(path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        asked: list[tuple[str, dict[str, Any]]] = [
            ("add", {"path": str(path), "name": "a"}),
            ("add", {"path": str(path), "name": "b"}),
            ("remove", {"name": "a"}),
            ("add", {"path": str(path), "name": "c"}),
            ("remove", {"path": str(path)}),
            ("add", {"path": str(tmp_path / "d"), "name": "b"}),
        ]
        sources = ask_at_once(root, *asked)
        root.add(tmp_path / "free")  # nobody else waits
        assert len(frames(root.directory, ANSWERS)) == 1
    replies = [root.reply_to(source) for source in sources]
    assert [reply.what for reply in replies] == [
        "added",
        "error",
        "removed",
        "added",
        "removed",
        "added",
    ]
    assert replies[1].reason == f"{path} is served already, as a"
    told = [each["meta"]["source_id"] for each in frames(root.directory, ANSWERS)]
    last = told.index(sources.pop())  # it has only to do with the name b
    assert last > told.index(sources[1])
    assert [each for each in told if each in sources] == sources
    assert list(root.stores()) == ["b", "free"]


def test_of_two_that_are_added_at_one_address_the_first_one_has_it(
    root: Root, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    same = [(f"{tmp_path}/web", f"{tmp_path}/link/./web"), (f":{port}", f"http://127.0.0.1:{port}")]
    requests = [
        ("add", {"path": f"{tmp_path}/{kind}-{which}{n}", "http": http.replace("web", f"web{n}")})
        for n in range(20)
        for kind, addresses in zip(("unix", "tcp"), same)
        for which, http in zip(("first", "second"), addresses)
        if kind == "unix" or n == 0
    ]
    sources = ask_at_once(root, *requests)
    for source, (_, meta) in zip(sources, requests):
        reply = root.reply_to(source)
        if "first" in meta["path"]:
            assert reply.what == "added", reply
        else:
            before = meta["path"].replace("second", "first")
            expected = f"the address {meta['http']} is taken by the store at {before}"
            assert reply.reason == expected
    assert not any("second" in name for name in root.stores())


def test_one_that_can_not_be_opened_has_its_address_all_the_same(
    root: Root, tmp_path: Path, run_xs: RunXs
) -> None:
    web = str(tmp_path / "web")
    root.add(tmp_path / "first", http=web)
    root.stop()
    request = {"topic": "xs.store.add", "meta": {"path": str(tmp_path / "other"), "http": web}}
    done = run_xs(["append", root.directory, "--json"], stdin=json.dumps(request).encode())
    assert done.returncode == 0, done.stderr
    (tmp_path / "first").rename(tmp_path / "unplugged")
    root.start()
    source = frames(root.directory, "xs.store.add")[-1]["id"]
    expected = f"the address {web} is taken by the store at {tmp_path}/first"
    assert root.reply_to(source).reason == expected
    assert not (tmp_path / "other").exists()
    root.remove(tmp_path / "first")
    assert root.add(tmp_path / "other", http=web)["http"] == web


def test_removing_what_can_not_be_opened_is_an_error_of_its_own(
    shared: Root, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no store")
    path = {"path": str(tmp_path / "file")}
    sources = ask_at_once(shared, ("add", path), ("remove", path))
    assert "not a directory" in shared.reply_to(sources[0]).reason
    assert shared.reply_to(sources[1]).reason == f"{tmp_path}/file is not served here"


def test_many_come_and_go_at_once_and_what_is_left_is_what_was_asked(
    root: Root, tmp_path: Path
) -> None:
    chance = random.Random(5)
    served: set[str] = set()
    requests = []
    expected = []
    for _ in range(150):
        name = f"s{chance.randrange(12)}"
        what = chance.choice(["add", "add", "remove"])
        requests.append((what, {"path": str(tmp_path / name)}))
        if what == "add":
            expected.append("error" if name in served else "added")
            served.add(name)
        else:
            expected.append("removed" if name in served else "error")
            served.discard(name)
    sources = ask_at_once(root, *requests)
    assert [root.reply_to(source).what for source in sources] == expected
    assert set(root.stores()) == served
    assert all(is_open(tmp_path / f"s{n}") == (f"s{n}" in served) for n in range(12))
    root.kill()
    root.start()
    root.wait_for(*served)
    assert set(root.stores()) == served


def test_a_server_that_is_stopped_ends_all_its_stores_in_good_order(
    root: Root, tmp_path: Path, run_xs: RunXs
) -> None:
    for n in range(5):
        root.add(tmp_path / f"s{n}")
    assert root.stop() == ""
    for n in range(5):
        done = run_xs(["cat", str(tmp_path / f"s{n}")])
        assert [json.loads(line)["topic"] for line in done.stdout.splitlines()] == [
            "xs.start",
            "xs.stop",
        ]
        assert is_free(tmp_path / f"s{n}") and not os.path.exists(tmp_path / f"s{n}" / "sock")


# Through the root's addresses


@pytest.fixture(params=["socket", "tcp"])
def door(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Door]:
    """A root with the stores `a` and `b`, on its socket and on a TCP address."""
    root = Root(str(tmp_path / "root"), "--expose", ":0")
    try:
        root.add(tmp_path / "a")
        root.add(tmp_path / "b")
        yield Door(root, tcp=request.param == "tcp")
    finally:
        root.close()


class Door:
    def __init__(self, root: Root, *, tcp: bool) -> None:
        self.root = root
        self._fields = {}
        self._where: str | int = root.directory
        if tcp:
            (exposed,) = frames(root.directory, "xs.start")[0]["meta"]["expose"]
            self._where = int(exposed.rpartition(":")[2])
            token = Path(root.directory, "token").read_text().strip()
            self._fields = {"authorization": f"Bearer {token}"}

    def wire(self) -> Wire:
        return Wire(self._where)

    def request(self, method: str, target: str, body: bytes | None = None, **more: str) -> bytes:
        return request(method, target, body, **self._fields, **more)


def test_each_store_s_whole_api_is_below_its_name(door: Door, tmp_path: Path) -> None:
    with door.wire() as wire:

        def ask(method: str, target: str, body: bytes | None = None, **more: str) -> Any:
            wire.send(door.request(method, target, body, **more))
            return wire.answer(method)

        made = ask("POST", "/store/a/append/t?ttl=last:3", b"hello", xs_meta='{"n":1}')
        assert made.status == 200
        frame = json.loads(made.body)
        assert (frame["topic"], frame["meta"], frame["ttl"]) == ("t", {"n": 1}, "last:3")
        for target in (f"/{frame['id']}", "/last/t", "/head/t", "/first/t"):
            assert ask("GET", f"/store/a{target}").body == made.body
        assert ask("GET", f"/store/a/cas/{frame['hash']}").body == b"hello"
        assert ask("GET", f"/store/a/content/{frame['id']}").body == b"hello"
        assert ask("GET", "/store/a?topic=t").body == made.body
        assert ask("GET", "/store/a/?topic=t").body == made.body
        events = ask("GET", "/store/a/stream/t", accept="text/event-stream").body
        assert events == f"id: {frame['id']}\ndata: ".encode() + made.body + b"\n"
        assert ask("HEAD", "/store/a/last/t").fields["content-length"] == str(len(made.body))
        assert ask("POST", "/store/a/t", b"x").status == 200
        assert ask("POST", "/store/a/eval", script("echo $XS_ADDR")).body == (
            f"{tmp_path}/a\n".encode()
        )
        assert ask("POST", f"/store/a/pipe/{frame['id']}", script("cat")).body == made.body
        both = lines_of({"topic": "many"}, {"topic": "many"})
        batch = ask("POST", "/store/b/append", both, content_type=NDJSON)
        assert json.loads(batch.body)["appended"] == 2
        each = ask("POST", "/store/b/append?each", both, content_type=NDJSON)
        assert each.body.count(b'"topic":"many"') == 2
        put = ask("POST", "/store/b/import", made.body).status
        assert put == 400  # its content is not there
        assert ask("POST", "/store/b/cas", b"hello").body.decode() == frame["hash"]
        assert ask("POST", "/store/b/import", made.body).status == 200
        assert ask("DELETE", f"/store/b/{frame['id']}").status == 204
        assert ask("GET", f"/store/b/{frame['id']}").status == 404
        assert ask("GET", f"/store/a/{frame['id']}").status == 200
        assert json.loads(ask("POST", "/store/b/check").body.splitlines()[-1])["problems"] == 0
        assert ask("POST", "/store/b/gc").status == 200
        assert ask("GET", "/store/b/ps").body == b""
        assert ask("GET", "/store/b/version").body == ask("GET", "/version").body
        assert ask("PUT", "/store/a/version").status == 405
        assert ask("GET", "/store/a/?nonsense").status == 400
    assert topics(str(tmp_path / "a"), "t") == ["t", "t"]
    assert "t" not in topics(door.root.directory)


def test_what_is_not_there_is_404(door: Door) -> None:
    with door.wire() as wire:

        def ask(method: str, target: str, body: bytes | None = None) -> Any:
            wire.send(door.request(method, target, body))
            return wire.answer(method)

        for target in ("/store/c/version", "/store/c", "/store/../a/version", "/store//version"):
            answer = ask("GET", target)
            assert answer.status == 404 and answer.body.count(b"\n") == 1
        for target in ("/store/c/append/t", "/store/c/t", "/store/A/append/t"):
            assert ask("POST", target, b"a body that nobody wants").status == 404
        assert ask("GET", "/store").status == 404
        assert ask("POST", "/store").status == 404
        assert ask("POST", "/stores").status == 405
        assert ask("GET", "/stores?x=1").status == 400
        for target in ("/store/a/stores", "/store/a/store/b/version", "/store/a/nowhere/x"):
            assert ask("GET", target).status == 404
        assert ask("GET", "/store/%61/version").status == 200
        assert ask("GET", "/%73tore/a/version").status == 200
        assert b'"name":"a"' in ask("GET", "/stores").body


def test_without_the_token_nothing_of_any_store_is_given(door: Door) -> None:
    with Wire(door.root.directory) as wire:
        (exposed,) = json.loads(wire.ask("GET", "/last/xs.start").body)["meta"]["expose"]
    with Wire(int(exposed.rpartition(":")[2])) as wire:
        for target in ("/stores", "/store/a/", "/store/a/version", "/store/c/version"):
            assert wire.ask("GET", target).status == 401
        assert wire.ask("POST", "/store/a/append/t").status == 401
        assert wire.ask("POST", "/append/xs.store.add").status == 401


def test_answers_come_in_the_order_of_their_requests_whatever_stores_they_ask(door: Door) -> None:
    chance = random.Random(3)
    sent: list[tuple[int, str]] = []
    data_of_all = b""
    with door.wire() as wire:
        for n in range(400):
            prefix = chance.choice(["", "/store/a", "/store/b", "/store/c"])
            kind = chance.choice(["append", "append", "large", "version", "last"])
            if kind == "version":
                data = door.request("GET", f"{prefix}/version")
            elif kind == "last":
                data = door.request("GET", f"{prefix}/last/mine")
            else:
                size = 40_000 if kind == "large" else 10  # a file of its own: slower
                meta = json.dumps({"n": n, "via": prefix})
                data = door.request("POST", f"{prefix}/append/mine", b"x" * size, xs_meta=meta)
            sent.append((n, prefix if kind in ("append", "large") else f"{prefix} {kind}"))
            data_of_all += data
        sender = threading.Thread(target=wire.send, args=(data_of_all,))
        sender.start()
        newest: dict[str, int] = {}
        for n, what in sent:
            answer = wire.answer()
            prefix, _, kind = what.partition(" ")
            if prefix == "/store/c":
                assert answer.status == 404
            elif not kind:
                assert json.loads(answer.body)["meta"] == {"n": n, "via": prefix}
                newest[prefix] = n
            elif kind == "last" and prefix in newest:  # it reads what was appended before it
                assert json.loads(answer.body)["meta"]["n"] == newest[prefix]
            else:
                assert answer.status in (200, 404)
        sender.join()


def test_a_store_can_be_followed_through_the_root(door: Door, tmp_path: Path) -> None:
    with door.wire() as one, door.wire() as pulsed, Wire(door.root.directory) as writer:
        one.send(door.request("GET", "/store/a/?follow&new"))
        pulsed.send(door.request("GET", "/store/b/?follow=50&new"))
        one.head()
        pulsed.head()
        for n in range(20):
            writer.ask("POST", "/append/root")
            writer.ask("POST", "/store/b/append/b")
            made = writer.ask("POST", "/store/a/append/t", b"%d" % n).body
            assert one.chunk() == made
        seen = b""
        while seen.count(b"xs.pulse") < 3 or seen.count(b'"topic":"b"') < 20:
            seen += pulsed.chunk()
        assert seen.count(b'"topic":"b"') == 20 and b'"topic":"t"' not in seen


# A store that ends while something is under way


def test_who_follows_it_is_given_what_is_theirs_and_ended(door: Door, tmp_path: Path) -> None:
    with door.wire() as through, Wire(str(tmp_path / "a")) as direct, door.wire() as other:
        through.send(door.request("GET", "/store/a/?follow&new"))
        other.send(door.request("GET", "/store/b/?follow&new"))
        direct.send(follow("/?follow&new"))
        for wire in (through, direct, other):
            wire.head()
        made = append(str(tmp_path / "a"), "t")
        door.root.remove(tmp_path / "a")
        for wire in (through, direct):
            body = b"".join(iter(wire.chunk, b""))  # to the last chunk
            ids = [json.loads(line)["id"] for line in body.splitlines()]
            assert ids[0] == made and b'"topic":"xs.stop"' in body.splitlines()[-1]
            assert wire.is_ended()
        append(str(tmp_path / "b"), "t")
        assert b'"topic":"t"' in other.chunk()


def test_requests_under_way_are_answered(door: Door, tmp_path: Path) -> None:
    big = b"c" * 8_000_000
    with door.wire() as reader, door.wire() as batch, door.wire() as idle:
        reader.send(door.request("POST", "/store/a/cas", big))
        put = reader.answer().body.decode()
        reader.send(door.request("GET", f"/store/a/cas/{put}"))
        assert reader.head()[0] == 200
        batch.send(
            door.request("POST", "/store/a/append", content_type=NDJSON, content_length="999")
        )
        batch.send(b'{"topic":"kept"}\n' * 3 + b'{"topic":')
        idle.send(door.request("GET", "/store/a/version"))
        assert idle.answer().status == 200
        wait_frames(str(tmp_path / "a"), "kept", 3)
        source = door.root.request("remove", {"path": str(tmp_path / "a")})
        answer = batch.answer()
        assert answer.status in (400, 503)
        assert b"3 whole lines of it are kept" in answer.body
        assert reader.exactly(len(big)) == big
        assert door.root.reply_to(source).what == "removed"
        # Its connection is for other stores, too.
        idle.send(door.request("GET", "/store/b/version"))
        assert idle.answer().status == 200
        idle.send(door.request("GET", "/store/a/version"))
        assert idle.answer().status == 404
    door.root.add(tmp_path / "a")
    assert len(frames(str(tmp_path / "a"), "kept")) == 3


def test_every_append_that_was_answered_is_there(door: Door, tmp_path: Path) -> None:
    wires = [door.wire() for _ in range(4)]
    for wire in wires:
        for _ in range(20):
            wire.send(door.request("POST", "/store/a/append/t", b"x") * 10)
    source = door.root.request("remove", {"path": str(tmp_path / "a")})
    answered = set()
    for wire in wires:
        statuses = []
        for _ in range(200):
            try:
                answer = wire.answer()
            except (EOFError, ConnectionError):
                break
            statuses.append(answer.status)
            if answer.status == 200:
                answered.add(json.loads(answer.body)["id"])
        assert set(statuses) <= {200, 404, 503}
        wire.sock.close()
    assert door.root.reply_to(source).what == "removed"
    door.root.add(tmp_path / "a")
    assert answered <= {frame["id"] for frame in frames(str(tmp_path / "a"), "t")}


def test_a_request_from_the_web_that_waits_is_told(root: Root, tmp_path: Path) -> None:
    url = root.add(tmp_path / "a", http=":0")["http"]
    with Wire(int(url.rpartition(":")[2])) as wire:
        wire.send(request("GET", "/"))
        wait_frames(str(tmp_path / "a"), "http.request")
        root.remove(tmp_path / "a")
        answer = wire.answer()
        assert (answer.status, answer.body) == (503, b"the server is stopping\n")


def test_a_handler_that_never_ends_is_ended(root: Root, tmp_path: Path) -> None:
    a = str(tmp_path / "a")
    root.add(a)
    append(a, "h.register", script("trap '' TERM INT", "while true; do sleep 1; done"))
    append(a, "g.spawn", script("trap '' TERM", "echo $$", "while true; do sleep 1; done"))
    pid = int(wait_frames(a, "g.recv")[0]["content"])
    append(a, "t")
    root.remove(a)
    until(lambda: not os.path.exists(f"/proc/{pid}"))
    with other_server(Path(a)):  # which may have started g again by now
        assert "xs.stop xs.start" in " ".join(topics(a))


# The command line


def test_the_command_adds_lists_and_removes(root: Root, tmp_path: Path, run_xs: RunXs) -> None:
    done = run_xs(["store", "add", root.directory, str(tmp_path / "a"), "--http", ":0"])
    added = json.loads(done.stdout)
    assert (done.returncode, added["topic"]) == (0, "xs.store.added")
    assert done.stdout.count(b"\n") == 1 and added["meta"]["path"] == str(tmp_path / "a")
    env = {"XS_ADDR": root.directory}
    done = run_xs(["store", "add", str(tmp_path / "b"), "--name", "bee"], env=env)
    assert json.loads(done.stdout)["meta"]["name"] == "bee"
    listed = run_xs(["stores", root.directory])
    assert [json.loads(line)["name"] for line in listed.stdout.splitlines()] == ["a", "bee"]
    assert run_xs(["stores"], env=env).stdout == listed.stdout
    done = run_xs(["store", "remove", root.directory, str(tmp_path / "a")])
    assert json.loads(done.stdout)["topic"] == "xs.store.removed"
    assert run_xs(["stores", root.directory]).stdout.count(b"\n") == 1
    again = run_xs(["store", "remove", root.directory, str(tmp_path / "a")])
    assert (again.returncode, again.stdout) == (1, b"")
    assert again.stderr.decode() == f"xs: {tmp_path}/a is not served here\n"


def test_a_relative_path_is_meant_from_here(root: Root, tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "here").mkdir()
    command = [*XS, "store", "add", "../root", "new/../a"]
    done = subprocess.run(
        [*command, "--http", "./web"], cwd=tmp_path / "here", env=environment(), capture_output=True
    )
    told = json.loads(done.stdout)["meta"]
    assert told["path"] == str(tmp_path / "here" / "a")
    assert told["http"] == str(tmp_path / "here" / "web")


def test_without_a_server_the_request_waits_for_one(tmp_path: Path, run_xs: RunXs) -> None:
    root = str(tmp_path / "root")
    assert run_xs(["store", "add", root, str(tmp_path / "a")]).returncode == 1  # there is no store
    make_store(run_xs, Path(root))
    done = run_xs(["store", "add", root, str(tmp_path / "a")])
    assert (done.returncode, json.loads(done.stdout)["topic"]) == (0, "xs.store.add")
    listed = run_xs(["stores", root])
    assert listed.returncode == 1 and listed.stderr.count(b"\n") == 1
    server = Root(root)
    try:
        server.wait_for("a")
        assert is_open(tmp_path / "a")
        server.stop()
        done = run_xs(["store", "remove", root, str(tmp_path / "a")])
        assert json.loads(done.stdout)["topic"] == "xs.store.remove"
        server.start()
        until(lambda: "xs.store.removed" in topics(root))
        assert server.stores() == {}
    finally:
        server.close()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, ""),
        (["add"], 2, ""),
        (["add", "ROOT"], 2, "takes one PATH"),
        (["add", "ROOT", "a", "b"], 2, "too many arguments"),
        (["new", "ROOT", "a"], 2, "add or remove"),
        (["remove", "ROOT", "HERE/a", "--http", ":0"], 2, "--http goes with"),
        (["add", "ROOT", "~/a"], 2, "literal ~"),
        (["add", "ROOT", "not\udcffutf8"], 2, "UTF-8"),
        (["add", ":1", "relative"], 2, "the whole path"),
        (["add", ":1", "/whole/path"], 1, "nobody answers"),
        (["add", "ROOT", "HERE/a", "--name", "a b"], 1, "a store's name has"),
        (["add", "ROOT", "HERE/file"], 1, "is not a directory"),
        (["add", "ROOT", "ROOT"], 1, "is the root store"),
        (["add", "HERE/served", "HERE/b"], 1, "no root store"),
        (["remove", "ROOT", "HERE/a"], 1, "is not served here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_a_line(
    shared: Root, tmp_path: Path, run_xs: RunXs, arguments: list[str], status: int, says: str
) -> None:
    (tmp_path / "file").write_text("no store")
    shared.add(tmp_path / "served")
    words = [
        word.replace("ROOT", shared.directory).replace("HERE", str(tmp_path)) for word in arguments
    ]
    done = run_xs(["store", *words])
    assert (done.returncode, done.stdout) == (status, b"")
    text = done.stderr.decode()
    assert text.count("\n") == 1 and text.startswith("xs: ") and says in text, text
    assert list(shared.stores()) == ["served"]


def test_stores_takes_an_address(tmp_path: Path, run_xs: RunXs, shared: Root) -> None:
    shared.add(tmp_path / "a")
    done = run_xs(["stores", str(tmp_path / "a")])
    assert (done.returncode, done.stdout) == (1, b"") and b"root store" in done.stderr
    done = run_xs(["stores", str(tmp_path / "nowhere")])
    assert done.returncode == 1 and b"no store at" in done.stderr


def test_the_commands_work_over_tcp(tmp_path: Path, run_xs: RunXs) -> None:
    root = Root(str(tmp_path / "root"), "--expose", ":0")
    try:
        (exposed,) = frames(root.directory, "xs.start")[0]["meta"]["expose"]
        env = {"XS_TOKEN": Path(root.directory, "token").read_text().strip()}
        done = run_xs(["store", "add", exposed, str(tmp_path / "a")], env=env)
        assert done.returncode == 0, done.stderr
        assert run_xs(["stores", exposed], env=env).stdout.count(b"\n") == 1
        done = run_xs(["store", "remove", f"http://{exposed}", str(tmp_path / "a")], env=env)
        assert done.returncode == 0, done.stderr
        assert run_xs(["stores", exposed]).returncode == 1  # no token
    finally:
        root.close()


# What it costs (bench/stores.py has figures)


def test_a_hundred_stores_start_soon_and_cost_little(root: Root, tmp_path: Path) -> None:
    alone = root.number("VmRSS")
    names = [f"s{n}" for n in range(100)]
    sources = ask_at_once(root, *(("add", {"path": str(tmp_path / name)}) for name in names))
    assert {root.reply_to(source).what for source in sources} == {"added"}
    for end in (root.stop, root.kill):
        end()
        root.start()
        until(lambda: sum(bool(each["since"]) for each in root.stores().values()) == 100)
        assert (root.number("VmRSS") - alone) / 100 < 2 * 1000
        until(lambda: root.number("Threads") < 250)
        assert root.descriptors() < 1500
    for name in random.Random(1).sample(names, 10):
        append(str(tmp_path / name), "t", base64.b64encode(name.encode()))
        assert topics(root.directory, "t", via=f"/store/{name}") == ["t"]
