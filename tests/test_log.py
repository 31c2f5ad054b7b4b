"""The server's log: its forms, its levels, its file, and who may not be held up by it."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, XS, RunXs, Server, environment, start_server, until
from wire import Wire, request

from xs import log
from xs.errors import Usage
from xs.log import DEBUG, ERROR, INFO, WARNING, Log, Output

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def to_file(path: Path, **options: Any) -> Log:
    output = Output()
    output.open(log.Options(path=str(path), **options))
    return Log(output)


def ended(server: Server, number: int = signal.SIGTERM) -> str:
    """Ends a server; all that it has written to standard error."""
    server.process.send_signal(number)
    return server.process.communicate(timeout=DEADLINE)[1].decode()


def is_serving(server: Server) -> None:
    """Waits until the server has said so; its socket answers a little earlier."""
    assert server.process.stdout is not None
    assert server.process.stdout.readline().startswith(b"serving ")


def eval_(server: Server, script: str) -> None:
    with Wire(server.directory) as wire:
        assert wire.ask("POST", "/eval", script.encode()).status in (200, 204, 400)


COMPLAINS = "#!/bin/sh\necho one >&2; echo two >&2\n"


# Forms


def test_a_line_in_a_file_has_its_time_and_level(tmp_path: Path) -> None:
    said = to_file(tmp_path / "log")
    said("served")
    said("refused", WARNING)
    said.for_store("notes").for_script("shout")("hello")
    lines = (tmp_path / "log").read_text().splitlines()
    assert re.fullmatch(f"{TIME} info served", lines[0])
    assert re.fullmatch(f"{TIME} warning refused", lines[1])
    assert re.fullmatch(f"{TIME} info notes: shout: hello", lines[2])


def test_each_line_of_a_longer_message_begins_like_the_first(tmp_path: Path) -> None:
    to_file(tmp_path / "log").for_script("shout")("one\n\ntwo\n", ERROR)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [re.sub(TIME, "", line) for line in lines] == [
        " error shout: one",
        " error shout: two",
    ]


def test_an_event_is_one_object_in_json_whatever_its_lines(tmp_path: Path) -> None:
    said = to_file(tmp_path / "log", is_json=True)
    said("one\ntwo \u2028 \udc80 \x1b[2J ü", ERROR)
    said.for_store("/s").for_script("shout")("x")
    first, second = (tmp_path / "log").read_bytes().splitlines()
    event = json.loads(first)
    assert re.fullmatch(TIME, event.pop("time"))
    assert event == {"level": "error", "message": "one\ntwo \u2028 \udc80 \x1b[2J ü"}
    assert b"\x1b" not in first and "ü".encode() in first
    assert list(json.loads(second)) == ["time", "level", "store", "script", "message"]


def test_nothing_that_is_logged_can_steer_a_terminal(tmp_path: Path) -> None:
    to_file(tmp_path / "log")("a\x1b[2Jb\rc\u202ed")
    assert (tmp_path / "log").read_text().endswith(r"a\u001b[2Jb\u000dc\u202ed" + "\n")


@pytest.mark.parametrize("level", [ERROR, WARNING, INFO, DEBUG])
def test_what_is_below_the_level_is_left_out(tmp_path: Path, level: int) -> None:
    said = to_file(tmp_path / "log", level=level)
    for each in (ERROR, WARNING, INFO, DEBUG):
        said(f"at {each}", each)
    wanted = [f"at {each}" for each in range(level + 1)]
    assert re.findall("at .", (tmp_path / "log").read_text()) == wanted
    assert said.is_debug == (level == DEBUG)


def test_a_defect_tells_where_it_was(tmp_path: Path) -> None:
    said = to_file(tmp_path / "log", is_json=True)
    try:
        raise KeyError("where")
    except KeyError as error:
        said.defect("GET /", error)
    event = json.loads((tmp_path / "log").read_text())
    assert event["level"] == "error"
    assert event["message"].startswith("GET /: KeyError: 'where'\nTraceback ")
    assert Path(__file__).name in event["message"]


def test_a_thread_that_dies_is_logged_as_one_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    to_file(tmp_path / "log", is_json=True).catch_threads()
    thread = threading.Thread(target=lambda: [][1], name="xs-test")
    thread.start()
    thread.join()
    event = json.loads((tmp_path / "log").read_text())
    assert event["message"].startswith("xs-test: IndexError: ")


def test_a_plain_function_is_a_log_too() -> None:
    said: list[str] = []
    as_log = log.log_of(said.append)
    as_log("plain", ERROR)
    as_log.for_script("shout")("one\ntwo")
    assert said == ["plain", "shout: one", "shout: two"]
    assert log.log_of(as_log) is as_log


# What a server logs


def test_standard_error_has_the_words_of_scripts_and_nothing_of_the_usual(
    store_dir: str,
) -> None:
    server = start_server(store_dir)
    eval_(server, COMPLAINS)
    with Wire(store_dir) as wire:
        wire.ask("GET", "/nothing-here/at-all")
    assert ended(server) == "xs: eval: one\nxs: eval: two\n"


def test_levels_are_of_who_is_to_act(store_dir: str) -> None:
    server = start_server(store_dir, "--log", "warning", "--expose", ":0")
    eval_(server, COMPLAINS)
    with Wire(store_dir) as wire:
        started = json.loads(wire.ask("GET", "/last/xs.start").body)
    with Wire(int(started["meta"]["expose"][0].rpartition(":")[2])) as stranger:
        assert stranger.ask("POST", "/append/t", authorization="Bearer wrong").status == 401
    said = re.sub(r":\d+:", ":PORT:", ended(server))
    assert said.startswith("xs: 127.0.0.1:PORT: POST /append/t: this token is not known here")
    assert said.count("\n") == 1


def test_strangers_can_not_fill_the_log(store_dir: str) -> None:
    server = start_server(store_dir, "--expose", ":0")
    with Wire(store_dir) as wire:
        started = json.loads(wire.ask("GET", "/last/xs.start").body)
    with Wire(int(started["meta"]["expose"][0].rpartition(":")[2])) as stranger:
        for _ in range(50):
            assert stranger.ask("GET", "/" + "A" * 16_000).status == 401
            assert stranger.ask("GET", "/", host="elsewhere").status == 421
    said = ended(server)
    assert said.count("\n") <= 2 and len(said) < 1000


def test_what_anybody_can_cause_is_logged_now_and_then_with_how_often_it_was() -> None:
    said: list[str] = []
    warn = log.Seldom(log.log_of(said.append), 0.2)
    warn("one")
    count = 0
    while len(said) < 2:
        warn("two")
        count += 1
    assert said == ["one", f"two ({count - 1} more like that were left out before)"]


def test_debug_has_each_request_with_its_status(store_dir: str) -> None:
    server = start_server(store_dir, "--log", "debug")
    with Wire(store_dir) as wire:
        wire.ask("POST", "/append/t?ttl=last:1", b"x")
        wire.ask("GET", "/last/none")
        for _ in range(2):  # those in the same words as well
            wire.ask("GET", "/last/t")
            wire.ask("POST", "/append/t", b"y")
            wire.ask("POST", "/append/t", b"z")
        wire.send(b"NO\x00NSENSE\r\n\r\n")
        assert wire.answer().status == 400
    lines = ended(server).splitlines()
    assert "xs: socket: POST /append/t?ttl=last:1: 200" in lines
    assert "xs: socket: GET /last/none: 404" in lines
    assert lines.count("xs: socket: GET /last/t: 200") == 2
    assert lines.count("xs: socket: POST /append/t: 200") == 4
    assert any(line.startswith("xs: socket: no request: 400: ") for line in lines)


def test_json_on_standard_error_is_nothing_but_json(store_dir: str) -> None:
    server = start_server(store_dir, "--log-json")
    is_serving(server)
    eval_(server, COMPLAINS)
    events = [json.loads(line) for line in ended(server).splitlines()]
    for event in events:
        assert re.fullmatch(TIME, event.pop("time"))
    assert events == [
        {"level": "info", "message": f"serving {store_dir} at {store_dir}/sock"},
        {"level": "info", "script": "eval", "message": "one"},
        {"level": "info", "script": "eval", "message": "two"},
        {"level": "info", "message": "stopping, within 10 s: SIGTERM"},
        {"level": "info", "message": "stopped"},
    ]


def test_a_file_has_the_start_and_the_stop_and_is_its_owner_s_alone(
    store_dir: str, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    server = start_server(store_dir, "--log-file", str(path))
    is_serving(server)
    eval_(server, COMPLAINS)
    assert ended(server) == ""
    said = [re.sub(f"^{TIME} ", "", line) for line in path.read_text().splitlines()]
    assert said == [
        f"info serving {store_dir} at {store_dir}/sock",
        "info eval: one",
        "info eval: two",
        "info stopping, within 10 s: SIGTERM",
        "info stopped",
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_pipe_that_nobody_reads_is_not_waited_for(
    store_dir: str, run_xs: RunXs, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    os.mkfifo(path)
    done = run_xs(["serve", store_dir, "--log-file", str(path)])
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"xs: can't write the log {path}: ")
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK)):
        server = start_server(store_dir, "--log-file", str(path))
    server.process.send_signal(signal.SIGHUP)  # it opens its log anew, and goes on without
    assert ended(server) == ""


def test_a_start_that_fails_is_in_the_log_as_well(
    server: Server, run_xs: RunXs, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    locked = f"store locked: {server.directory} is served by process {server.process.pid}"
    done = run_xs(["serve", server.directory, "--log-file", str(path)])
    assert done.stderr.decode() == f"xs: {locked}\n"
    assert path.read_text().endswith(f" error can't start: {locked}\n")
    done = run_xs(["serve", server.directory, "--log-json"])
    (event,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert (event["level"], event["message"]) == ("error", f"can't start: {locked}")
    assert done.returncode == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--log", "loud"], "--log takes error, warning, info or debug, not 'loud'"),
        (["--log-file", "/no/such/folder/log"], "can't write the log /no/such/folder/log: "),
    ],
)
def test_a_log_that_can_not_be_is_wrong_usage_and_no_store_is_made(
    store_dir: str, run_xs: RunXs, options: list[str], says: str
) -> None:
    done = run_xs(["serve", store_dir, *options])
    assert done.returncode == 2
    assert says in done.stderr.decode()
    assert not os.path.exists(store_dir)


def test_an_output_refuses_a_file_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(Usage, match=r"can't write the log .*: Is a directory"):
        to_file(tmp_path)


def test_the_journal_is_told_the_level(store_dir: str) -> None:
    reading, writing = os.pipe()
    found = os.fstat(writing)
    process = subprocess.Popen(
        [*XS, "serve", store_dir, "--log", "debug"],
        stdout=subprocess.PIPE,
        stderr=writing,
        env=environment(JOURNAL_STREAM=f"{found.st_dev}:{found.st_ino}"),
    )
    os.close(writing)
    assert process.stdout is not None
    process.stdout.readline()
    with Wire(store_dir) as wire:
        wire.ask("POST", "/eval", COMPLAINS.encode())
    process.terminate()
    with process.stdout, os.fdopen(reading) as said:
        lines = said.read().splitlines()
    assert process.wait(DEADLINE) == 0
    assert lines == ["<6>xs: eval: one", "<6>xs: eval: two", "<7>xs: socket: POST /eval: 204"]


# Rotation


@pytest.fixture
def logging(store_dir: str, tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    """A server that logs its requests to a file, and that."""
    path = tmp_path / "logs" / "log"
    path.parent.mkdir()
    running = start_server(store_dir, "--log", "debug", "--log-file", str(path))
    try:
        yield running, path
    finally:
        running.stop()


def test_a_log_that_is_rotated_under_load_loses_and_cuts_nothing(
    logging: tuple[Server, Path],
) -> None:
    server, path = logging
    rounds, count = 5, 4
    stop = threading.Event()
    asked: list[set[str]] = [set() for _ in range(count)]

    def ask(worker: int) -> None:
        n = 0
        with Wire(server.directory) as wire:
            while not stop.is_set():
                # Longer than what a pipe takes at once: such a line is written in pieces.
                target = f"/last/t{worker}.{n}?limit={'1' * 5000 if n % 7 == 0 else '1'}"
                wire.ask("GET", target)
                asked[worker].add(target)
                n += 1

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(count)]
    for thread in threads:
        thread.start()
    for n in range(rounds):
        done = [len(each) for each in asked]
        until(lambda done=done: all(len(a) > b + 20 for a, b in zip(asked, done)))  # type: ignore[misc]
        path.rename(path.with_name(f"log.{n}"))
        server.process.send_signal(signal.SIGHUP)
        until(path.exists)
    stop.set()
    for thread in threads:
        thread.join(DEADLINE)
    server.stop()
    logged: list[str] = []
    for file in path.parent.iterdir():
        for line in file.read_text().splitlines():
            found = re.fullmatch(rf"{TIME} debug socket: GET (\S+): \d+", line)
            if found and found[1] != "/version":
                logged.append(found[1])
            else:
                assert re.match(f"{TIME} (info|debug) ", line), line
    assert sorted(logged) == sorted(set.union(*asked))
    assert len(list(path.parent.iterdir())) == rounds + 1


def test_a_log_that_can_not_be_opened_anew_goes_on_in_the_old_file(
    logging: tuple[Server, Path],
) -> None:
    server, path = logging
    moved = path.parent.rename(path.parent.with_name("moved")) / path.name
    server.process.send_signal(signal.SIGHUP)
    until(lambda: "can't open" in moved.read_text())
    assert re.search(f"error can't open {path} anew: No such file", moved.read_text())
    with Wire(server.directory) as wire:
        wire.ask("GET", "/last/still-here")
    until(lambda: "still-here" in moved.read_text())


def test_sighup_without_a_file_changes_nothing(server: Server) -> None:
    with Wire(server.directory) as wire:
        for _ in range(20):
            server.process.send_signal(signal.SIGHUP)
            assert wire.ask("POST", "/append/t").status == 200
    assert ended(server) == ""
    assert server.process.returncode == 0


# Who reads it


def test_a_log_that_nobody_reads_holds_nobody_up(store_dir: str) -> None:
    server = start_server(store_dir, "--log", "debug")
    target = f"/last/t?{'x' * 1000}"
    with Wire(store_dir) as wire:  # many times what a pipe holds
        for _ in range(1000):
            assert wire.ask("GET", target).status == 400
    # Somebody reads after all, and what comes then is logged, behind a word on what is missing.
    assert server.process.stderr is not None
    os.set_blocking(server.process.stderr.fileno(), False)
    said = server.process.stderr.read()
    with Wire(store_dir) as wire:
        wire.ask("GET", "/last/after")
    os.set_blocking(server.process.stderr.fileno(), True)
    lines = (said + ended(server).encode()).decode().splitlines()
    whole = lines.count(f"xs: socket: GET {target}: 400")
    (gap,) = [line for line in lines if "were lost here" in line]
    assert re.fullmatch(rf"xs: {1000 - whole} events were lost here", gap)
    assert lines.index(gap) < lines.index("xs: socket: GET /last/after: 404")


def test_a_log_whose_reader_is_gone_ends_nothing(store_dir: str) -> None:
    server = start_server(store_dir, "--log", "debug")
    assert server.process.stderr is not None
    server.process.stderr.close()
    with Wire(store_dir) as wire:
        for _ in range(10):
            assert wire.ask("POST", "/append/t").status == 200
    server.process.terminate()
    assert server.process.wait(DEADLINE) == 0
    assert server.process.stdout is not None
    server.process.stdout.close()


def test_requests_of_the_web_are_at_debug(store_dir: str, tmp_path: Path) -> None:
    web = str(tmp_path / "web")
    server = start_server(store_dir, "--log", "debug", "--http", web, "--http-timeout", "1")
    with Wire(web) as wire:
        assert wire.ask("GET", "/page?a=1").status == 504
        wire.send(request("GET", "/", content_length="x"))
        assert wire.answer().status == 400
    lines = ended(server).splitlines()
    assert "xs: gateway: socket: GET /page?a=1: 504: nobody answered within 1 s" in lines
    assert any(line.startswith("xs: gateway: socket: no request: 400: ") for line in lines)
