"""`xs serve` from its start to its end: signals, locks, sockets, what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional

import pytest
from conftest import DEADLINE, XS, RunXs, Server, answers, environment, start_server
from wire import Wire, request

import xs
from xs.transport import HttpTransport
from xs.version import VERSION

NDJSON = "application/x-ndjson"


def end(server: Server, number: int = signal.SIGTERM) -> int:
    server.process.send_signal(number)
    server.process.communicate(timeout=DEADLINE)
    return server.process.returncode


def stream(run_xs: RunXs, folder: str) -> list[dict[str, object]]:
    done = run_xs(["cat", folder])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def refused(run_xs: RunXs, *arguments: str, **options: object) -> str:
    """The one line that `xs serve` says when it can't."""
    done = run_xs(["serve", *arguments], **options)
    assert done.returncode != 0 and done.stdout == b""
    text = done.stderr.decode()
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text


# Start


def test_a_server_says_where_it_serves(store_dir: str) -> None:
    process = subprocess.Popen([*XS, "serve", store_dir], stdout=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    assert process.stdout.readline().decode() == f"serving {store_dir} at {store_dir}/sock\n"
    process.terminate()
    assert process.wait(DEADLINE) == 0
    process.stdout.close()


def test_its_first_frame_says_what_it_is(server: Server) -> None:
    with Wire(server.directory) as wire:
        frame = json.loads(wire.ask("GET", "/").body)
    assert frame["topic"] == "xs.start"
    assert frame["meta"] == {"version": VERSION, "expose": []}
    assert (frame["hash"], frame["ttl"]) == (None, "forever")


def test_with_port_0_the_system_chooses_one_and_the_server_says_which(store_dir: str) -> None:
    process = subprocess.Popen(
        [*XS, "serve", store_dir, "--expose", ":0", "--expose", "[::1]:0"],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    said = re.fullmatch(
        r"serving .* at .*/sock, http://(127\.0\.0\.1:(\d+)), http://(\[::1\]:\d+)\n",
        process.stdout.readline().decode(),
    )
    assert said
    with Wire(store_dir) as wire:
        assert json.loads(wire.ask("GET", "/").body)["meta"]["expose"] == [said[1], said[3]]
    with Wire(int(said[2])) as wire:
        assert wire.ask("GET", "/").status == 401
    process.terminate()
    assert process.wait(DEADLINE) == 0
    process.stdout.close()


def test_the_store_is_its_owner_s_alone(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir(0o755)
    server = start_server(str(folder))
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "sock").stat().st_mode) == 0o600
    finally:
        server.stop()


def test_a_socket_s_path_may_be_longer_than_an_address(tmp_path: Path, run_xs: RunXs) -> None:
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.parent.mkdir()
    process = subprocess.Popen(
        [*XS, "serve", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"serving ")
    made = run_xs(["append", str(folder), "t"], stdin="x")
    assert made.returncode == 0, made.stderr
    assert stat.S_ISSOCK((folder / "sock").stat().st_mode)
    started = time.monotonic()
    process.terminate()
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert time.monotonic() - started < 1.5
    topics = [f["topic"] for f in stream(run_xs, str(folder))]
    assert topics == ["xs.start", "t", "xs.stop"]


def test_the_socket_of_a_killed_server_is_replaced(store_dir: str, run_xs: RunXs) -> None:
    first = start_server(store_dir)
    assert end(first, signal.SIGKILL) == -signal.SIGKILL
    assert os.path.exists(os.path.join(store_dir, "sock"))
    assert [f["topic"] for f in stream(run_xs, store_dir)] == ["xs.start"]
    second = start_server(store_dir)
    assert end(second) == 0
    assert [f["topic"] for f in stream(run_xs, store_dir)] == ["xs.start", "xs.start", "xs.stop"]


def test_a_server_that_stops_leaves_the_socket_of_one_that_has_come_in_its_place(
    server: Server,
) -> None:
    os.unlink(os.path.join(server.directory, "lock"))  # as somebody may who takes it for left over
    second = start_server(server.directory)
    assert second.process.stdout is not None
    assert second.process.stdout.readline()  # it serves, and the socket is its own
    assert end(server) == 0
    with xs.open(server.directory) as store:
        assert isinstance(store._transport, HttpTransport)
        made = store.append("a", "x")
        assert [each.id for each in store.cat(topic="a")] == [made.id]
    assert end(second) == 0
    assert not os.path.exists(os.path.join(server.directory, "sock"))


def test_a_second_server_says_who_has_the_store(server: Server, run_xs: RunXs) -> None:
    text = refused(run_xs, server.directory)
    expected = f"store locked: {server.directory} is served by process {server.process.pid}"
    assert expected in text
    with Wire(server.directory) as wire:  # and the first one goes on, on its socket
        assert wire.ask("POST", "/append/t").status == 200


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("a file", "not a directory"),
        ("a folder with files", "has other files in it"),
        ("a newer store", "newer"),
        ("a file of another kind", "xs.db"),
        ("below a file", ""),
    ],
)
def test_what_is_no_store_is_refused(tmp_path: Path, run_xs: RunXs, what: str, says: str) -> None:
    place = tmp_path / "place"
    if what == "a file":
        place.write_text("text")
    elif what == "below a file":
        place.write_text("text")
        place = place / "store"
    elif what == "a folder with files":
        place.mkdir()
        (place / "letter.txt").write_text("dear")
    elif what == "a newer store":
        assert run_xs(["append", str(place), "t"]).returncode == 0
        with sqlite3.connect(place / "xs.db") as database:
            database.execute("PRAGMA user_version = 1000")
        database.close()
    else:
        place.mkdir()
        (place / "xs.db").write_text(
            "this is not a database, and it is long enough to be seen" * 99
        )
    before = {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix
    }
    text = refused(run_xs, str(place))
    assert says in text
    assert not os.path.exists(place / "sock")
    for path, data in before.items():
        if path.name in ("letter.txt", "xs.db"):
            assert path.read_bytes() == data, path


def test_where_nobody_may_write_there_is_no_server(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    command = [*XS, "serve", str(closed / "store")]
    if os.getuid() == 0:  # who may write everywhere, by a capability that can be given up
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=DEADLINE)
    assert done.returncode == 4
    text = done.stderr.decode()
    assert text.count("\n") == 1 and "ermission denied" in text, text
    assert os.listdir(closed) == []


@pytest.mark.parametrize("address", [":99999", "nonsense", ":", "a/b", "http://x:1/y"])
def test_what_is_no_address_is_refused_before_a_store_is_made(
    store_dir: str, run_xs: RunXs, address: str
) -> None:
    refused(run_xs, store_dir, "--expose", address)
    assert not os.path.exists(store_dir)


@pytest.mark.parametrize("options", [["--http"], ["--insecure", "--expose"]], ids=lambda o: o[-1])
def test_a_name_that_no_host_can_have_is_no_host(
    store_dir: str, run_xs: RunXs, options: list[str]
) -> None:
    for name in ("a..b", "a" * 64):
        text = refused(run_xs, store_dir, *options, f"{name}:8080")
        assert f"no such host: {name}" in text
    assert not os.path.exists(store_dir)


def test_a_web_address_that_json_can_not_tell_is_refused(store_dir: str, run_xs: RunXs) -> None:
    path = os.fsdecode(os.path.dirname(store_dir).encode() + b"/\xff.sock")
    assert "it is not UTF-8" in refused(run_xs, store_dir, "--http", path)
    assert os.listdir(os.path.dirname(store_dir)) == []


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a..b", ".a", "a\n", "a:80", "[::1]", "*.a", "b\xfccher", "a" * 64],
)
def test_what_no_host_is_called_is_refused_before_a_store_is_made(
    store_dir: str, run_xs: RunXs, name: str
) -> None:
    done = run_xs(["serve", store_dir, "--expose", ":0", "--host", name])
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.startswith(b"xs: --host takes a name such as xs.example, not '")
    assert done.stderr.count(b"\n") == 1
    assert not os.path.exists(store_dir)


@pytest.mark.parametrize("port", ["0", "8080"])
def test_an_address_that_others_could_read_along_on_is_refused_with_one_that_is_private(
    store_dir: str, run_xs: RunXs, port: str
) -> None:
    text = refused(run_xs, store_dir, "--expose", f"0.0.0.0:{port}")
    assert f"Expose :{port} and lead to it" in text
    assert not os.path.exists(store_dir)


def test_no_store_is_made_where_the_socket_of_another_one_is_to_be(
    store_dir: str, run_xs: RunXs
) -> None:
    with xs.open(store_dir) as client:
        client.append("t", "x")
    text = refused(run_xs, os.path.join(store_dir, "sock"))
    assert text.startswith("xs: not a store: ") and "give the directory it is in" in text
    assert not os.path.lexists(os.path.join(store_dir, "sock"))


def test_an_address_in_use_is_refused_and_nothing_is_left(store_dir: str, run_xs: RunXs) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = refused(run_xs, store_dir, "--expose", f":{port}")
        assert re.search(f"can't listen on .*:{port}: ", text)
        assert not os.path.exists(store_dir)
        assert run_xs(["append", store_dir, "t"]).returncode == 0
        assert refused(run_xs, store_dir, "--expose", f":{port}") == text
    assert not os.path.exists(os.path.join(store_dir, "sock"))
    server = start_server(store_dir)  # the lock is free
    assert end(server) == 0


# Stop


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_a_signal_ends_it_in_good_order(
    store_dir: str, run_xs: RunXs, number: int, status: int
) -> None:
    server = start_server(store_dir)
    with Wire(store_dir) as wire:
        wire.ask("POST", "/append/t", b"x")
    server.process.send_signal(number)
    _, err = server.process.communicate(timeout=DEADLINE)
    assert (server.process.returncode, err) == (status, b"")
    assert not os.path.exists(os.path.join(store_dir, "sock"))
    frames = stream(run_xs, store_dir)
    assert [f["topic"] for f in frames] == ["xs.start", "t", "xs.stop"]
    # The lock is released: a command writes at once.
    assert run_xs(["append", store_dir, "after"]).returncode == 0
    assert Path(store_dir, "lock").read_text() == ""


def test_followers_are_given_what_is_theirs_and_ended(server: Server) -> None:
    wires = []
    for target in (
        "/?follow&new",
        "/?follow&topic=xs.*",
        "/last/xs.stop?follow",
        "/?follow=100000",
    ):
        wire = Wire(server.directory)
        wire.send(request("GET", target))
        wire.head()
        wires.append(wire)
    old = Wire(server.directory)
    old.send(b"GET /?follow&new HTTP/1.0\r\n\r\n")
    old.head()
    # A follower that does not read: what it is owed is more than its socket holds.
    stuck = Wire(server.directory)
    stuck.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stuck.send(request("GET", "/?follow&new"))
    stuck.head()
    with Wire(server.directory) as writer:
        large = '"' + "m" * 100_000 + '"'
        made = [writer.ask("POST", "/append/t", xs_meta=large).body for _ in range(20)]
    server.process.terminate()
    for wire in wires:
        body = b"".join(iter(wire.chunk, b""))  # to the last chunk
        assert json.loads(body.splitlines()[-1])["topic"] == "xs.stop"
        assert wire.is_ended()
        wire.sock.close()
    assert b'"xs.stop"' in old.rest()
    body = b"".join(iter(stuck.chunk, b""))
    assert body.startswith(b"".join(made)) and b'"xs.stop"' in body
    server.process.communicate(timeout=DEADLINE)
    assert server.process.returncode == 0
    for wire in (old, stuck):
        wire.sock.close()


def test_a_follower_that_never_reads_does_not_hold_the_stop_for_long(store_dir: str) -> None:
    server = start_server(store_dir, "--grace", "1")
    stuck = Wire(server.directory)
    stuck.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stuck.send(request("GET", "/?follow&new"))
    stuck.head()
    with Wire(server.directory) as writer:
        for _ in range(20):
            writer.ask("POST", "/append/t", xs_meta='"' + "m" * 100_000 + '"')
    started = time.monotonic()
    assert end(server) == 0
    assert 0.9 < time.monotonic() - started < 4
    stuck.sock.close()


def test_requests_under_way_are_answered_when_it_stops(server: Server, run_xs: RunXs) -> None:
    lines = b'{"topic":"kept"}\n' * 3 + b'{"topic":'
    batch = Wire(server.directory)
    batch.send(request("POST", "/append", content_type=NDJSON, content_length="999"))
    batch.send(lines)
    half = Wire(server.directory)
    half.send(request("POST", "/append/half", content_length="10") + b"12345")
    idle = Wire(server.directory)
    assert idle.ask("GET", "/version").status == 200
    reader = Wire(server.directory)
    put = reader.ask("POST", "/cas", b"c" * 8_000_000)
    reader.send(request("GET", f"/cas/{put.body.decode()}"))
    assert reader.head()[0] == 200
    with Wire(server.directory) as wire:  # the batch's lines are in
        deadline = time.monotonic() + DEADLINE
        while wire.ask("GET", "/last/kept?last=3").body.count(b"\n") < 3:
            assert time.monotonic() < deadline
    server.process.terminate()
    answer = batch.answer()
    assert answer.status in (400, 503)
    assert b"3 whole lines of it are kept" in answer.body
    assert half.answer().status in (400, 503)
    assert idle.is_ended()
    assert reader.exactly(8_000_000) == b"c" * 8_000_000
    server.process.communicate(timeout=DEADLINE)
    assert server.process.returncode == 0
    topics = [f["topic"] for f in stream(run_xs, server.directory)]
    assert topics == ["xs.start", "kept", "kept", "kept", "xs.stop"]
    for wire in (batch, half, idle, reader):
        wire.sock.close()


def test_every_append_that_was_answered_is_there_and_stop_is_the_last_frame(
    server: Server, run_xs: RunXs
) -> None:
    answered = set()
    wires = [Wire(server.directory) for _ in range(8)]
    for wire in wires:
        for _ in range(50):
            wire.send(request("POST", "/append/t", b"x") * 10)
    server.process.terminate()
    for wire in wires:
        try:
            while True:
                answer = wire.answer()
                if answer.status == 200:
                    answered.add(json.loads(answer.body)["id"])
                else:
                    assert answer.status == 503
        except (EOFError, OSError):
            wire.sock.close()
    server.process.communicate(timeout=DEADLINE)
    assert server.process.returncode == 0
    frames = stream(run_xs, server.directory)
    assert answered <= {f["id"] for f in frames}
    assert frames[-1]["topic"] == "xs.stop"


def test_a_socket_that_somebody_removed_does_not_hold_the_stop(server: Server) -> None:
    os.unlink(os.path.join(server.directory, "sock"))
    started = time.monotonic()
    assert end(server) == 0
    assert time.monotonic() - started < 1.5


def test_a_server_leaves_no_child_and_no_file_open_behind(server: Server, run_xs: RunXs) -> None:
    assert end(server) == 0
    left = set(os.listdir(server.directory))
    assert left <= {"xs.db", "xs.db-wal", "xs.db-shm", "lock", "cas", "run"}
    assert os.listdir(os.path.join(server.directory, "run")) == ["lock"]
    done = run_xs(["check", server.directory])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("levels", [129, 3000, 9000, 100_000])
def test_json_nested_however_deep_is_refused_and_the_server_goes_on(
    server: Server, levels: int
) -> None:
    # CPython 3.13 goes 10,000 levels deep before it refuses, and a thread's stack has less room.
    lists, records = "[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels
    for nested in (lists, records):
        with Wire(server.directory) as wire:
            assert wire.ask("POST", "/append/t", xs_meta=nested).status == 400
        for target in ("/append", "/import"):
            line = f'{{"topic":"t","id":"03hagod5dkqudtx1zjl3u3smr","meta":{nested}}}\n'.encode()
            with Wire(server.directory) as wire:
                answer = wire.ask("POST", target, line, content_type=NDJSON)
                assert b'"errors":[{"line":1,' in answer.body
    with Wire(server.directory) as wire:
        assert wire.ask("GET", "/version").status == 200


def test_a_script_s_json_nested_however_deep_is_refused_and_the_server_goes_on(
    server: Server,
) -> None:
    for n, nested in enumerate(('"[" * 9000 + "]" * 9000', "'{\"a\":' * 9000 + '1' + '}' * 9000")):
        said = f"print('{{\"out\":', {nested}, '}}', flush=True)"
        script = f"#!{sys.executable}\ninput()\n{said}\ninput()\n"
        with Wire(server.directory) as wire:
            wire.ask("POST", f"/append/h{n}.register", script.encode(), xs_meta='{"topic":"in"}')
            wire.send(request("GET", f"/last/h{n}.unregistered?follow"))
            wire.head()
            with Wire(server.directory) as other:
                other.ask("POST", "/append/in")
            assert b"nested deeper than 500 levels" in wire.lines(1)[0]


def holder(folder: str) -> Optional[str]:
    return Path(folder, "lock").read_text() or None


def test_the_lock_s_file_says_who_holds_it(server: Server) -> None:
    assert holder(server.directory) == f"{server.process.pid} serve\n"
    assert end(server) == 0
    assert holder(server.directory) is None


def test_a_server_whose_starter_has_gone_serves_all_the_same(store_dir: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        [*XS, "serve", store_dir],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    os.close(writing)
    deadline = time.monotonic() + DEADLINE
    while not answers(os.path.join(store_dir, "sock")):
        assert time.monotonic() < deadline and process.poll() is None
    process.terminate()
    assert process.communicate(timeout=DEADLINE) == (None, b"")
    assert process.returncode == 0
