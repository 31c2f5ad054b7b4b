"""Scripts that are run for a request: `POST /eval`, `POST /pipe/:id`, `xs eval`, `xs pipe`."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import DEADLINE, XS, RunXs, Server, environment, start_server, until

import xs
from xs import errors
from xs.process import SCRIPT_BYTES


def post(server: Server, target: str, script: str) -> tuple[int, str, bytes]:
    """Status, type and body, by curl."""
    done = subprocess.run(
        [
            *("curl", "-sS", "--unix-socket", f"{server.directory}/sock", "--data-binary", "@-"),
            *("-w", "\n%{http_code} %{content_type}", f"http://localhost{target}"),
        ],
        input=script.encode(),
        capture_output=True,
        timeout=DEADLINE,
    )
    body, _, last = done.stdout.rpartition(b"\n")
    status, _, kind = last.decode().partition(" ")
    return int(status), kind.partition(";")[0], body


def processes_of(server: Server) -> list[int]:
    """Pids of what runs from the server's folder of scripts."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"{server.directory}/run/".encode() in words:
                found.append(int(entry.name))
    return found


YIELDS = [
    ("null", 204, "", b""),
    ("let x = 3", 204, "", b""),
    ('"text"', 200, "text/plain", b"text"),
    ('"ünï"', 200, "text/plain", "ünï".encode()),
    ('""', 200, "text/plain", b""),
    ("5", 200, "text/plain", b"5"),
    ("1.5", 200, "text/plain", b"1.5"),
    ("true", 200, "text/plain", b"true"),
    ("{a: 1}", 200, "application/json", b'{"a":1}\n'),
    ("{}", 200, "application/json", b"{}\n"),
    ("[]", 200, "application/x-ndjson", b""),
    ("[1 null a]", 200, "application/x-ndjson", b'1\nnull\n"a"\n'),
    ("[[a b]; [1 2] [3 4]]", 200, "application/x-ndjson", b'{"a":1,"b":2}\n{"a":3,"b":4}\n'),
    ("1..3", 200, "application/x-ndjson", b"1\n2\n3\n"),
    ("seq 1 3 | each {|n| $n * 2}", 200, "application/x-ndjson", b"2\n4\n6\n"),
    ("[0x[01 02] 3]", 200, "application/x-ndjson", b'"AQI="\n3\n'),
    ("0x[00 ff 0a]", 200, "application/octet-stream", b"\0\xff\n"),
    (r"^printf 'a\000b'", 200, "application/octet-stream", b"a\0b"),
    ("def f [] { 7 }\nf", 200, "text/plain", b"7"),
    ("print noise; 5", 200, "text/plain", b"5"),
    ('print -n "noise"; [1]', 200, "application/x-ndjson", b"1\n"),
    ("^sh -c 'echo noise >&2; echo data'", 200, "application/octet-stream", b"data\n"),
    ("use std/math\n5", 200, "text/plain", b"5"),
    # Nushell has these in pieces.
    (
        '[1 2 3] | each {|x| $"line ($x)"} | str join "\\n"',
        200,
        "text/plain",
        b"line 1\nline 2\nline 3",
    ),
    ('"" | fill -w 20000 -c x', 200, "text/plain", b"x" * 20_000),
    ('"x" | fill -w 20001 -c ü', 200, "text/plain", b"x" + "ü".encode() * 20_000),
    ('"" | fill -w 300000 -c ü', 200, "text/plain", "ü".encode() * 300_000),
    ('"" | fill -w 20000 -c x | into binary', 200, "application/octet-stream", b"x" * 20_000),
    (
        "1..3000 | to json --raw",
        200,
        "text/plain",
        b"[%s]" % b",".join(b"%d" % n for n in range(1, 3001)),
    ),
    ("1..3 | wrap a | to csv", 200, "text/plain", b"a\n1\n2\n3\n"),
    ("1..3 | each {|n| print noise; $n} | str join", 200, "text/plain", b"123"),
    ("0x[]", 200, "application/octet-stream", b""),
    ("\ufeff5", 200, "text/plain", b"5"),
    ("^true", 204, "", b""),
]


@pytest.mark.parametrize(
    ("script", "status", "kind", "body"), YIELDS, ids=[script for script, *_ in YIELDS]
)
def test_the_answer_s_type_follows_what_the_script_yields(
    shared: Server, script: str, status: int, kind: str, body: bytes
) -> None:
    assert post(shared, "/eval", script) == (status, kind, body)


@pytest.mark.parametrize(
    "data", ["ünï\n".encode() * 10_000, bytes(range(256)) * 200], ids=["text", "bytes"]
)
def test_content_and_files_are_answered_whole(shared: Server, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with xs.open(shared.directory) as store:
        frame = store.append("notes", data)
    kind = "application/octet-stream" if b"\xff" in data else "text/plain"
    assert post(shared, "/eval", f".content {frame.id}") == (200, kind, data)
    assert post(shared, f"/pipe/{frame.id}", ".cas $in.hash") == (200, kind, data)
    for script in (f".content {frame.id} --raw", f"open --raw {tmp_path}/file"):
        assert post(shared, "/eval", script) == (200, "application/octet-stream", data)
    assert len(post(shared, "/eval", "random binary 20000")[2]) == 20_000


def test_a_text_that_fails_on_its_way_is_400_while_it_is_short(shared: Server) -> None:
    script = (
        "1..{} | each {|n| if $n == {} { error make {msg: late} }; $n | fill -w 1000 } | str join"
    )
    status, kind, body = post(shared, "/eval", script.replace("{}", "9"))
    assert (status, kind) == (400, "text/plain")
    assert b"late" in body
    with xs.open(shared.directory) as store, pytest.raises(errors.BrokenBody):
        store.eval(script.replace("{}", "900"))


def test_a_frame_is_the_input_of_pipe(shared: Server) -> None:
    with xs.open(shared.directory) as store:
        frame = store.append("notes", "some content", meta={"n": 1})
    status, _, body = post(shared, f"/pipe/{frame.id}", "$in | select topic id meta")
    assert status == 200
    assert json.loads(body) == {"topic": "notes", "id": frame.id, "meta": {"n": 1}}
    assert post(shared, f"/pipe/{frame.id}", "get meta.n")[2] == b"1"


def test_pipe_of_no_frame_is_404_and_of_no_id_400(shared: Server) -> None:
    assert post(shared, "/pipe/03gw3hq1m6s5z8xk0c7d2v9aj", "$in")[0] == 404
    assert post(shared, "/pipe/nothing", "$in")[0] == 400


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("1 / 0", "script.nu:1:3"),
        ("let a = 1\nfoo $a", "script.nu:2:1"),
        ("1 +", "script.nu:1:3"),
        ('error make {msg: "my own"}', "my own"),
        ("[1 2] | each {|n| error make {msg: inside}}", "inside"),
        ("^sh -c 'echo why >&2; exit 3'", "why"),
        ("^false", "status 1"),
        ("{|| 1}", ""),
    ],
)
def test_a_script_that_fails_is_400_with_its_own_message(
    shared: Server, script: str, said: str
) -> None:
    status, kind, body = post(shared, "/eval", script)
    assert (status, kind) == (400, "text/plain")
    assert said in body.decode()


def test_a_failure_on_the_way_breaks_the_body_off(shared: Server) -> None:
    with xs.open(shared.directory) as store:
        values = store.eval("seq 1 3 | each {|n| if $n == 3 { error make {msg: late} }; $n}")
        assert next(values) == 1
        assert next(values) == 2
        with pytest.raises(errors.BrokenBody):
            next(values)


def test_values_come_while_the_script_runs(shared: Server, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with xs.open(shared.directory) as store:
        values = store.eval(f"[1 2] | each {{|n| if $n == 2 {{ open --raw {gate} }}; $n}}")
        assert next(values) == 1  # while the script waits for the gate
        gate.write_bytes(b"")
        assert list(values) == [2]


def test_bytes_come_while_the_script_runs(shared: Server, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = f"^sh -c 'echo first; cat {gate}; echo last'"
    process = subprocess.Popen(
        [*XS, "eval", shared.directory, "-c", script],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    gate.write_bytes(b"")
    assert process.communicate(timeout=DEADLINE)[0] == b"last\n"


def begin(server: Server, script: str) -> socket.socket:
    """A connection on which that script is being run."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE)
    sock.connect(f"{server.directory}/sock")
    head = f"POST /eval HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(script)}\r\n\r\n"
    sock.sendall(head.encode() + script.encode())
    until(lambda: processes_of(server), "the script was not started")
    return sock


@pytest.mark.parametrize(
    "script",
    [
        "sleep 1hr",
        "1.. | each {|n| sleep 10ms; $n}",
        "^sh -c 'trap \"\" TERM; sleep 1000 & sleep 1000'",
        "loop { print -e x; sleep 10ms }",
        "loop { print x; sleep 10ms }",
        "#!/bin/sh\nwhile sleep 0.01; do echo x >&2; done\n",
    ],
    ids=["silent", "streaming", "stubborn", "complaining", "printing", "program"],
)
@pytest.mark.parametrize(
    "ahead", [b"", b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["", "asked"]
)
def test_a_client_that_goes_away_ends_the_script(shared: Server, script: str, ahead: bytes) -> None:
    with begin(shared, script) as sock:
        sock.sendall(ahead)
    until(lambda: not processes_of(shared), "the script goes on")


def test_a_client_that_only_sends_no_more_is_answered(server: Server) -> None:
    sock = begin(server, 'sleep 600ms; "still here"')
    sock.shutdown(socket.SHUT_WR)
    assert sock.makefile("rb").read().endswith(b"still here")


def test_the_server_s_end_ends_the_script(server: Server) -> None:
    sock = begin(server, "sleep 1hr")
    server.stop()
    assert not processes_of(server)
    sock.close()


def test_a_killed_server_s_script_is_gone_within_a_second(server: Server) -> None:
    sock = begin(server, "^sleep 1000")
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    killed = time.monotonic()
    until(lambda: not processes_of(server), "the script outlives its server")
    assert time.monotonic() - killed < 1.0
    sock.close()


@pytest.mark.parametrize(
    "script",
    ["^yes", 'let t = ("x" | fill -w 10000); 1.. | each { $t } | str join', "^yes | into binary"],
    ids=["command", "text", "bytes"],
)
def test_a_slow_reader_slows_the_script_down(server: Server, script: str) -> None:
    sock = begin(server, script)
    with open(f"/proc/{server.process.pid}/status") as file:
        before = int(next(line for line in file if line.startswith("VmRSS")).split()[1])
    # The pipe and the socket fill, and then nobody does anything any more.
    last = (0, -1)
    deadline = time.monotonic() + DEADLINE
    while last[0] != last[1]:
        assert time.monotonic() < deadline
        threading.Event().wait(0.1)
        last = (last[1], _written(processes_of(server)))
    with open(f"/proc/{server.process.pid}/status") as file:
        after = int(next(line for line in file if line.startswith("VmRSS")).split()[1])
    assert after - before < 20_000  # kB
    sock.close()


def _written(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            if line.startswith("wchar"):
                total += int(line.split()[1])
    return total


def test_standard_error_goes_to_the_log(store_dir: str) -> None:
    running = start_server(store_dir)
    post(running, "/eval", "print printed; print -e complained; 5")
    running.process.terminate()
    log = running.process.communicate(timeout=DEADLINE)[1].decode()
    assert "xs: eval: printed" in log
    assert "xs: eval: complained" in log


def test_an_empty_or_a_huge_script_is_refused(shared: Server) -> None:
    assert post(shared, "/eval", "")[0] == 400
    assert post(shared, "/eval", "#" * (SCRIPT_BYTES + 1))[0] == 413


def test_programs_of_any_language_are_run(shared: Server) -> None:
    script = "#!/usr/bin/env python3\nimport sys, json\nprint(json.load(sys.stdin)['topic'])\n"
    with xs.open(shared.directory) as store:
        frame = store.append("notes")
    assert post(shared, f"/pipe/{frame.id}", script) == (
        200,
        "application/octet-stream",
        b"notes\n",
    )
    assert post(shared, "/eval", "#!/bin/sh\ntrue\n")[0] == 204
    status, _, body = post(shared, "/eval", "#!/bin/sh\necho oh >&2; exit 1\n")
    assert (status, body) == (400, b"oh\n")
    status, _, body = post(shared, "/eval", "#!/no/such/program\n")
    assert status == 400
    assert b"no such program" in body


def test_scripts_know_their_store(shared: Server) -> None:
    assert post(shared, "/eval", "$env.XS_ADDR")[2].decode() == shared.directory


ODD = ["a:b", "a b", "[x]*?", "q\"'`", "{folder} $env (p)", "b\\n|;&#%20", "line\nline", "~", "ü"]


@pytest.mark.parametrize("name", [*ODD, "x" * 110], ids=[*map(repr, ODD), "long"])
def test_scripts_run_wherever_their_store_is(tmp_path: Path, name: str) -> None:
    running = start_server(str(tmp_path / name / "store"))
    try:
        with xs.open(running.directory) as store:
            assert store.eval('"x" | .append notes | get topic') == "notes"
            program = f'#!/bin/sh\n{sys.executable} -m xs last "$XS_ADDR" notes\n'
            assert b'"topic":"notes"' in store.eval(program)
            store.append(
                "h.register", "{|frame| $frame.topic | .append out }", meta={"topic": "in"}
            )
            list(store.cat(topic="h.registered", follow=True, limit=1))
            store.append("in")
            *_, out = store.cat(topic="out", follow=True, limit=1)
            assert store.content(out.id) == b"in"
    finally:
        running.stop()


def test_a_script_has_no_input_of_its_own(shared: Server) -> None:
    assert post(shared, "/eval", "^cat | str length")[2] == b"0"


def test_no_scripts_means_none(store_dir: str) -> None:
    running = start_server(store_dir, "--no-scripts")
    try:
        assert post(running, "/eval", "5")[0] == 403
        assert post(running, "/pipe/03gw3hq1m6s5z8xk0c7d2v9aj", "5")[0] in (403, 404)
        with xs.open(store_dir) as store:
            store.append("a.spawn", "#!/bin/sh\necho ran\n")
            store.append("b.register", "{|frame| 'ran'}")
            assert not list(store.cat(topic="a.*"))[1:]
        assert not processes_of(running)
    finally:
        running.stop()


def test_without_a_server_one_is_asked_for(store_dir: str, run_xs: RunXs) -> None:
    run_xs(["append", store_dir, "a"])
    done = run_xs(["eval", store_dir, "-c", "5"])
    assert done.returncode == 1
    assert b"xs serve" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_the_command_prints_what_the_script_yields(shared: Server, run_xs: RunXs) -> None:
    done = run_xs(["eval", shared.directory, "-c", '"text"'])
    assert (done.returncode, done.stdout, done.stderr) == (0, b"text\n", b"")
    done = run_xs(["eval", shared.directory], stdin="[1 2]")
    assert done.stdout == b"1\n2\n"
    done = run_xs(["eval", shared.directory, "-c", "0x[00 01]"])
    assert done.stdout == b"\0\1"  # nothing added


def test_the_command_takes_a_file(shared: Server, run_xs: RunXs, tmp_path: Path) -> None:
    file = tmp_path / "script.nu"
    file.write_text("$in.topic")
    with xs.open(shared.directory) as store:
        frame = store.append("notes")
    done = run_xs(["pipe", shared.directory, frame.id, str(file)])
    assert done.stdout == b"notes\n"
    done = run_xs(["eval", shared.directory, str(tmp_path / "none.nu")])
    assert done.returncode == 1
    assert b"can't read" in done.stderr
    done = run_xs(["eval", shared.directory, str(file), "-c", "5"])
    assert done.returncode == 2


def test_the_command_shows_a_failure_as_nushell_has_laid_it_out(
    shared: Server, run_xs: RunXs
) -> None:
    done = run_xs(["eval", shared.directory, "-c", "1 / 0"])
    assert done.returncode == 1
    assert done.stdout == b""
    assert " 1 | 1 / 0\n" in done.stderr.decode()
    done = run_xs(["eval", shared.directory, "-c", "[1 2] | each {|n| if $n == 2 { 1 / 0 }; $n}"])
    assert done.returncode == 1
    assert done.stdout == b"1\n"


def test_python_gets_values(shared: Server) -> None:
    with xs.open(shared.directory) as store:
        frame = store.append("notes", meta={"n": 1})
        assert store.eval("null") is None
        assert store.eval('"text"') == "text"
        assert store.eval("{a: [1 2]}") == {"a": [1, 2]}
        assert store.eval("0x[01]") == b"\1"
        assert list(store.eval("[1 {a: 2}]")) == [1, {"a": 2}]
        assert store.pipe(frame, "$in.meta") == {"n": 1}
        with pytest.raises(errors.Invalid, match="by zero"):
            store.eval("1 / 0")


def test_too_many_at_once_are_told_to_wait(server: Server) -> None:
    from xs.scripts import EVALUATIONS_MAX

    script = b"#!/bin/sh\nexec sleep 1000\n"
    head = f"POST /eval HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(script)}\r\n\r\n"
    socks = []
    for _ in range(EVALUATIONS_MAX + 1):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"{server.directory}/sock")
        sock.sendall(head.encode() + script)
        socks.append(sock)
    (refused,), _, _ = select.select(socks, [], [], DEADLINE)
    assert b" 503 " in refused.recv(1000)
    for sock in socks:
        sock.close()
    until(lambda: post(server, "/eval", "#!/bin/sh\ntrue\n")[0] == 204, "no room again")
