"""How a server ends: what it lets end within --grace, what a second signal does, its status."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import termios
import threading
import time
from pathlib import Path

import pytest
from conftest import DEADLINE, XS, RunXs, Server, answers, environment, start_server, until
from wire import Wire, request

LARGE = '"' + "m" * 100_000 + '"'


def ended(server: Server) -> int:
    server.process.communicate(timeout=DEADLINE)
    return server.process.returncode


def follower(server: Server, *, owed: int) -> tuple[Wire, bytes]:
    """One that has not read what it is owed, some of which no buffer holds; and all of that."""
    wire = Wire(server.directory)
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.send(request("GET", "/?follow&new"))
    wire.head()
    with Wire(server.directory) as writer:
        made = [writer.ask("POST", "/append/t", xs_meta=LARGE).body for _ in range(owed)]
    return wire, b"".join(made)


def stops(server: Server) -> None:
    """Waits until the server has begun to stop: it accepts nobody any more."""
    until(lambda: not answers(os.path.join(server.directory, "sock")))


# Within its grace


def test_a_slow_client_is_given_all_of_its_own_within_the_grace(store_dir: str) -> None:
    server = start_server(store_dir, "--grace", "15")
    slow, owed = follower(server, owed=30)
    server.process.terminate()
    stops(server)
    body = b""
    started = time.monotonic()
    while block := slow.chunk():  # some 3 MB in two seconds
        body += block
        threading.Event().wait(0.002 * len(block) / 4096)
    assert body.startswith(owed) and b'"xs.stop"' in body
    assert ended(server) == 0
    assert time.monotonic() - started < 15
    slow.sock.close()


@pytest.mark.parametrize("grace", [0, 1, 2])
def test_who_is_slower_than_the_grace_is_cut_off_when_it_is_over(
    store_dir: str, grace: int
) -> None:
    server = start_server(store_dir, "--grace", str(grace))
    slow, _ = follower(server, owed=20)
    web = Wire(server.directory)
    web.send(request("POST", "/eval", b"#!/bin/sh\ntrap '' TERM; while :; do sleep 1; done\n"))
    until(lambda: b"trap" in scripts_of(server))
    started = time.monotonic()
    server.process.terminate()
    assert ended(server) == 0
    # A script that does not want to end is given a second, whatever the grace.
    assert grace - 0.1 < time.monotonic() - started < grace + 3
    assert scripts_of(server) == b""
    for wire in (slow, web):
        wire.sock.close()


def scripts_of(server: Server) -> bytes:
    """The command lines of processes that the server has started."""
    found = b""
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if f"XS_ADDR={server.directory}\0".encode() in (each / "environ").read_bytes():
                found += (each / "cmdline").read_bytes() + b"".join(
                    path.read_bytes() for path in Path(server.directory, "run").glob("*/script")
                )
        except OSError:
            continue  # it has ended, or is not ours
    return found


def test_the_web_is_given_half_of_the_grace(store_dir: str, tmp_path: Path) -> None:
    web = str(tmp_path / "web")
    server = start_server(store_dir, "--http", web, "--grace", "2")
    slow, _ = follower(server, owed=20)
    with Wire(web) as waiting:
        waiting.send(request("GET", "/"))
        with Wire(store_dir) as wire:
            until(lambda: wire.ask("GET", "/last/http.request").status == 200)
        started = time.monotonic()
        server.process.terminate()
        assert waiting.answer().status == 503
        assert 0.9 < time.monotonic() - started < 1.9
        assert ended(server) == 0
        assert time.monotonic() - started < 4
    slow.sock.close()


def test_an_answer_for_the_web_that_comes_within_the_grace_is_given(
    store_dir: str, tmp_path: Path
) -> None:
    web = str(tmp_path / "web")
    server = start_server(store_dir, "--http", web, "--grace", "10")
    with Wire(web) as waiting, Wire(store_dir) as handler:
        waiting.send(request("GET", "/"))
        until(lambda: handler.ask("GET", "/last/http.request").status == 200)
        asked = json.loads(handler.ask("GET", "/last/http.request").body)
        server.process.terminate()
        until(lambda: not answers_at_all(web))
        meta = json.dumps({"request_id": asked["meta"]["request_id"], "status": 418})
        assert handler.ask("POST", "/append/http.response", xs_meta=meta).status == 200
        assert waiting.answer().status == 418
    assert ended(server) == 0


BATCH = b'{"topic":"a"}\n{"topic":'


@pytest.mark.parametrize(
    ("asks", "told"),
    [
        (request("POST", "/append/a", content_length="9") + b"half", b""),
        (request("POST", "/cas", content_length="99999") + b"half" * 9999, b""),
        (request("POST", "/append/a?chunked", content_length="9") + b"half", b"; "),
        (
            request("POST", "/append", content_type="application/x-ndjson", content_length="99")
            + BATCH,
            b": 1 whole lines of it are kept\n",
        ),
        (b"GET /ver", b""),
    ],
    ids=["an append", "content", "a chunked content", "a batch", "a head"],
)
def test_who_is_still_sending_when_it_stops_may_come_again(
    server: Server, asks: bytes, told: bytes
) -> None:
    # That it broke off would be for good, and is not so.
    with Wire(server.directory) as wire:
        assert wire.ask("GET", "/version").status == 200
        wire.send(asks)
        if told:  # something of it is kept
            with Wire(server.directory) as reader:
                until(lambda: reader.ask("GET", "/last/a").status == 200)
        server.process.terminate()
        answer = wire.answer()
        assert (answer.status, answer.fields["connection"]) == (503, "close")
        assert answer.body.startswith(b"the store is closing" + (told or b"\n"))
    assert ended(server) == 0


def test_lines_without_an_answer_when_it_stops_are_not_stored_as_the_answer_ends_in_order(
    server: Server,
) -> None:
    kind = "application/x-ndjson"
    with Wire(server.directory) as wire:
        wire.send(request("POST", "/append?each", content_type=kind, transfer_encoding="chunked"))
        line = b'{"topic":"a"}\n'
        wire.send(b"%x\r\n%b\r\n" % (len(line), line))
        assert wire.head()[0] == 200
        assert json.loads(wire.chunk())["topic"] == "a"
        wire.send(b"99\r\n" + BATCH[-9:])
        server.process.terminate()
        told = {"error": "the store is closing: 1 whole lines of it are kept"}
        assert json.loads(wire.chunk()) == told
        assert wire.chunk() == b"" and wire.is_ended()
    assert ended(server) == 0


def test_who_is_still_sending_to_the_web_when_it_stops_may_come_again(
    store_dir: str, tmp_path: Path
) -> None:
    web = str(tmp_path / "web")
    server = start_server(store_dir, "--http", web)
    with Wire(web) as wire:
        wire.send(request("POST", "/", expect="100-continue", content_length="9"))
        assert wire.head()[0] == 100
        wire.send(b"half")
        server.process.terminate()
        answer = wire.answer()
        assert (answer.status, answer.body) == (503, b"the server is stopping\n")
        assert answer.fields["retry-after"] == "1"
    assert ended(server) == 0


def test_whose_script_is_ended_because_it_stops_may_come_again(
    server: Server, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    with Wire(server.directory) as wire:
        wire.send(request("POST", "/eval", f"#!/bin/sh\n: > {begun}\nsleep 60\n".encode()))
        until(begun.exists)
        server.process.terminate()
        answer = wire.answer()
        assert (answer.status, answer.body) == (503, b"the store is closing\n")
    assert ended(server) == 0


def answers_at_all(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except OSError:
            return False
    return True


# A second signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(store_dir: str, run_xs: RunXs, number: int) -> None:
    server = start_server(store_dir, "--grace", "60")
    slow, owed = follower(server, owed=20)
    with Wire(store_dir) as wire:
        wire.send(request("POST", "/eval", b"#!/bin/sh\necho begun; sleep 1000\n"))
        until(lambda: b"sleep" in scripts_of(server))
        server.process.terminate()
        stops(server)
        threading.Event().wait(0.25)  # a signal within less is taken for the same
        assert server.process.poll() is None
        started = time.monotonic()
        server.process.send_signal(number)
        assert ended(server) == 128 + number
        assert time.monotonic() - started < 1
    until(lambda: scripts_of(server) == b"")
    # What was answered is there, and the store can be had at once.
    done = run_xs(["cat", store_dir, "--topic", "t"])
    assert done.stdout == owed
    assert run_xs(["append", store_dir, "after"]).returncode == 0
    slow.sock.close()


def test_a_signal_that_comes_twice_at_the_same_time_is_one(store_dir: str) -> None:
    server = start_server(store_dir, "--grace", "1")
    slow, _ = follower(server, owed=20)
    for _ in range(3):
        server.process.send_signal(signal.SIGINT)
    assert ended(server) == 130
    with pytest.raises(FileNotFoundError):  # in good order
        os.stat(os.path.join(store_dir, "sock"))
    slow.sock.close()


def test_two_signals_end_a_server_that_is_still_starting(store_dir: str, run_xs: RunXs) -> None:
    assert run_xs(["append", store_dir, "t"]).returncode == 0
    with open(os.path.join(store_dir, "lock"), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a writer has it
        file.write(f"{os.getpid()} append\n")
        file.flush()
        process = subprocess.Popen([*XS, "serve", store_dir], env=environment())
        until(lambda: heeds_signals(process.pid))
        process.terminate()
        threading.Event().wait(0.25)
        assert process.poll() is None
        # Two that it hears at the same time are one: on a slow machine there is a third.
        until(lambda: process.terminate() or threading.Event().wait(0.25) or process.poll())
        assert process.wait(DEADLINE) == 143


def heeds_signals(pid: int) -> bool:
    """Whether a process has taken it upon itself what SIGHUP does, and has threads."""
    try:
        with open(f"/proc/{pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:
        return False
    caught = int(fields["SigCgt"], 16) >> signal.SIGHUP - 1 & 1
    return bool(caught) and int(fields["Threads"]) > 1


# Hanging up


def on_a_terminal(*command: str) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a command as the only one of a terminal; the terminal's other end."""
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(),
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    return process, ours


def test_a_terminal_that_is_closed_ends_its_server_in_good_order(
    store_dir: str, run_xs: RunXs
) -> None:
    process, terminal = on_a_terminal(*XS, "serve", store_dir)
    until(lambda: answers(os.path.join(store_dir, "sock")))
    os.close(terminal)
    assert process.wait(DEADLINE) == 129
    frames = run_xs(["cat", store_dir]).stdout.splitlines()
    assert [json.loads(line)["topic"] for line in frames] == ["xs.start", "xs.stop"]


def test_sighup_from_a_terminal_that_is_there_is_for_the_log(store_dir: str) -> None:
    process, terminal = on_a_terminal(*XS, "serve", store_dir)
    until(lambda: answers(os.path.join(store_dir, "sock")))
    process.send_signal(signal.SIGHUP)
    with Wire(store_dir) as wire:
        assert wire.ask("POST", "/append/t").status == 200
    process.terminate()
    assert process.wait(DEADLINE) == 0
    os.close(terminal)


def test_nohup_keeps_a_server_beyond_its_terminal(store_dir: str) -> None:
    process, terminal = on_a_terminal(
        "sh", "-c", 'trap "" HUP; exec "$@"', "sh", *XS, "serve", store_dir
    )
    until(lambda: answers(os.path.join(store_dir, "sock")))
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    with Wire(store_dir) as wire:
        assert wire.ask("POST", "/append/t").status == 200
    process.terminate()
    assert process.wait(DEADLINE) == 0


# Statuses


def test_the_status_of_a_start_that_fails_says_why(
    tmp_path: Path, server: Server, run_xs: RunXs
) -> None:
    letter = tmp_path / "letters" / "letter"
    letter.parent.mkdir()
    letter.write_text("dear")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        expected = {
            ("--grace", "soon", str(tmp_path / "new")): 2,
            ("--log", "loud", str(tmp_path / "new")): 2,
            ("--expose", "nonsense", str(tmp_path / "new")): 2,
            (server.directory,): 3,
            (str(letter.parent),): 4,
            (str(letter),): 4,
            ("--expose", f":{port}", str(tmp_path / "new")): 5,
            ("--http", f":{port}", str(tmp_path / "new")): 5,
            ("--http", str(letter), str(tmp_path / "new")): 5,
        }
        found = {words: run_xs(["serve", *words]).returncode for words in expected}
    assert found == expected
