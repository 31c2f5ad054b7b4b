"""Wrong words on the command line, each told in a line, and never taken for another request."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import DEADLINE, ROOT, XS, RunXs, environment, start_server

import xs
from xs import cli, errors
from xs.arguments import wants_help
from xs.cli import find_command
from xs.schema import add_sum_of, translated


@pytest.fixture
def made(store_dir: str) -> str:
    """A store with two frames."""
    with xs.open(store_dir) as client:
        client.append("notes", "first")
        client.append("other", "second")
    return store_dir


@pytest.mark.parametrize("word", ["", "last", "first", "version", "check", "?last=1", "0" * 24])
def test_what_is_no_id_asks_for_nothing_else(made: str, run_xs: RunXs, word: str) -> None:
    for command in ("get", "remove"):
        done = run_xs([command, made, word])
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(b"xs: not an id: "), done.stderr
    with xs.open(made) as client:
        for act in (client.get, client.remove):
            with pytest.raises(errors.Invalid, match="not an id"):
                act(word)


@pytest.mark.parametrize("command", ["first", "last", "head"])
def test_an_empty_topic_is_not_all_of_them(made: str, run_xs: RunXs, command: str) -> None:
    done = run_xs([command, made, ""])
    assert (done.returncode, done.stdout) == (2, b"") and b"TOPIC is empty" in done.stderr
    with xs.open(made) as client:
        answer = client._transport.request("GET", f"/{command}/")
        assert answer.status == 400 and b"a topic is missing" in answer.read()


@pytest.mark.parametrize("pulse", ["0", "1", "9", "9" * 20])
def test_a_pulse_is_never_taken_for_yes_or_no(made: str, run_xs: RunXs, pulse: str) -> None:
    done = run_xs(["cat", made, "--follow", "--pulse", pulse])
    assert done.returncode == 1 and b"not a pulse: " + pulse.encode() in done.stderr


@pytest.mark.parametrize("wrong", [["a b"], ["t", "--ttl", "frever"], ["t", "--meta", "hello"]])
def test_what_is_wrong_with_all_lines_is_told_before_the_first(store_dir: str, wrong: str) -> None:
    process = subprocess.Popen(
        [*XS, "append", store_dir, *wrong, "--lines"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert process.wait(DEADLINE) == 1  # though its input is still open
    said = process.communicate()[1]
    assert said.startswith(b"xs: ") and said.count(b"\n") == 1
    assert not os.path.exists(store_dir)


@pytest.mark.parametrize("lines", [[], ["--lines"]])
def test_bytes_that_are_no_utf8_are_told_as_that(
    store_dir: str, run_xs: RunXs, lines: list[str]
) -> None:
    meta = os.fsdecode(b'{"p":"/tmp/\xe9"}')
    done = run_xs(["append", store_dir, "n", "--meta", meta, *lines], stdin="x")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"xs: meta is not UTF-8, as JSON has to be\n"


def test_a_topic_that_is_no_utf8_is_shown_as_it_was_given(store_dir: str, run_xs: RunXs) -> None:
    done = run_xs(["append", store_dir, os.fsdecode(b"n\xff")], stdin="x")
    assert (done.returncode, done.stderr) == (1, b"xs: not UTF-8: 'n\\xff'\n")


def test_all_refused_lines_are_counted(store_dir: str, run_xs: RunXs) -> None:
    lines = "".join(json.dumps({"topic": ".."}) + "\n" for _ in range(3000))
    done = run_xs(["append", store_dir, "--json"], stdin=lines)
    assert done.returncode == 1 and done.stderr.startswith(b"xs: 3000 lines have errors; line 1: ")


def test_help_is_not_what_an_option_has_for_its_value(store_dir: str, run_xs: RunXs) -> None:
    done = run_xs(["append", store_dir, "t", "--key", "-h"], stdin="x")
    assert done.returncode == 0 and json.loads(done.stdout)["topic"] == "t"
    append = find_command("append")
    for words in (
        ["-h"],
        ["x", "--help"],
        ["--key", "k", "-h"],
        ["--lines", "-h"],
        ["--key=k", "-h"],
    ):
        assert wants_help(append, words)
    for words in ([], ["--key", "--help"], ["--meta", "-h"]):
        assert not wants_help(append, words)


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["--version", "more"], "xs --version"),
        (["help", "cat", "more"], "xs help [COMMAND]"),
        (["-h", "cat", "more"], "xs -h [COMMAND]"),
        (["version", "./none", "more"], "xs version [ADDR]"),
    ],
)
def test_a_word_too_many_is_refused(run_xs: RunXs, words: list[str], usage: str) -> None:
    done = run_xs(words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"xs: too many arguments, from 'more' on: {usage}\n"


@pytest.mark.parametrize("addr", ["ftp://x", "unix://s", "file:///tmp/s"])
def test_an_address_that_xs_does_not_speak_is_no_directory(addr: str, run_xs: RunXs) -> None:
    done = run_xs(["append", addr, "t"], stdin="x")
    assert done.returncode == 1 and b"xs speaks http:// and https://" in done.stderr
    assert not os.path.exists(addr.partition(":")[0] + ":")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_host_without_its_port_is_told_what_it_lacks(run_xs: RunXs, host: str) -> None:
    done = run_xs(["last", host])
    assert (done.returncode, done.stdout) == (1, b"")
    hint = f"a server of that host is called by its port, too: {host}:PORT"
    assert done.stderr.decode() == f"xs: no store at: {host}; {hint}\n"


@pytest.mark.parametrize("wrong", ["foo", "http://", "a/b", "s.sock:/"])
def test_what_can_not_be_exposed_is_named_once(run_xs: RunXs, store_dir: str, wrong: str) -> None:
    done = run_xs(["serve", store_dir, "--expose", wrong])
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == (
        f"xs: can't expose {wrong!r}: use HOST:PORT, or :PORT for this machine alone, with a port "
        "from 0 to 65535 ([ADDRESS]:PORT for IPv6)\n"
    )
    assert not os.path.exists(store_dir)


def test_a_path_is_told_in_one_line_and_by_its_bytes(tmp_path: Path, run_xs: RunXs) -> None:
    done = run_xs(["last", f"{tmp_path}/" + os.fsdecode(b"n\xff")])
    assert done.returncode == 1 and f"no store at: {tmp_path}/n\\xff; ".encode() in done.stderr
    folder = f"{tmp_path}/a\nb"
    server = start_server(folder)
    try:
        assert server.process.stdout is not None
        said = server.process.stdout.readline().decode()
    finally:
        server.stop()
    assert said == f"serving {tmp_path}/a\\nb at {tmp_path}/a\\nb/sock\n"


@pytest.mark.parametrize(
    "words",
    [["serve"], ["service", "install"], ["token", "list"], ["store", "add"], ["store", "remove"]],
    ids=lambda words: "-".join(words),
)
def test_an_address_is_no_directory_to_be_served(
    made: str, run_xs: RunXs, words: list[str]
) -> None:
    for wrong, says in (
        (":8080", "(one of that name is ./:8080)"),
        ("https://localhost:1", "(one of that name is ./https://localhost:1)"),
        ("", "the directory is empty"),
    ):
        root = [made] if words[0] == "store" else []
        if words == ["token", "list"] and wrong:  # as the sentence says
            done = run_xs([*words, f"./{wrong}"])
            assert done.returncode == 1 and b"no store at: ./" in done.stderr, done.stderr
        done = run_xs([*words, *root, wrong])
        assert done.returncode == 2 and says.encode() in done.stderr, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["append", "LINK", "t"],
        ["append", "LINK/", "t", "--lines"],
        ["cat", "LINK"],
        ["serve", "LINK"],
        ["token", "list", "LINK"],
        ["check", "LINK", "--repair"],
        ["backup", "LINK", "COPY"],
        ["backup", "STORE", "LINK"],
    ],
)
def test_a_link_that_leads_nowhere_is_told_and_nothing_is_made(
    made: str, tmp_path: Path, run_xs: RunXs, words: list[str]
) -> None:
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    before = sorted(os.listdir(tmp_path))
    paths = {"LINK": str(link), "LINK/": f"{link}/", "STORE": made, "COPY": str(tmp_path / "copy")}
    done = run_xs([paths.get(word, word) for word in words])
    assert (done.returncode, done.stdout) == (4 if words[0] == "serve" else 1, b"")
    text = done.stderr.decode()
    assert f": it is a symbolic link, and {tmp_path}/nowhere isn't there" in text
    assert text.count("\n") == 1 and sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "words",
    [
        ["append", "./store", "t"],
        ["append", ".", "t"],
        ["cat", "./store"],
        ["serve", "./store"],
        ["service", "install", "./store", "--print"],
        ["token", "list", "./store"],
        ["check", "./store", "--repair"],
        ["backup", "STORE", "./copy"],
    ],
)
def test_that_the_current_directory_was_removed_is_told(
    made: str, tmp_path: Path, words: list[str]
) -> None:
    # By -m: with -c the interpreter itself looks for modules in the directory that is gone.
    command = [sys.executable, "-m", "xs", *(made if word == "STORE" else word for word in words)]
    done = subprocess.run(
        ["sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh", *command],
        stdin=subprocess.DEVNULL, capture_output=True, cwd=tmp_path, env=environment(),
        timeout=DEADLINE,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"xs: ") and done.stderr.count(b"\n") == 1
    assert b"the current directory was removed: change to another one" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["import", "STORE", ""],
        ["export", "STORE", ""],
        ["backup", "STORE", ""],
        ["eval", "STORE", ""],
        ["serve", "STORE", "--log-file", ""],
    ],
    ids=lambda words: words[0],
)
def test_an_empty_path_is_called_empty(made: str, run_xs: RunXs, words: list[str]) -> None:
    done = run_xs([made if word == "STORE" else word for word in words])
    assert (done.returncode, done.stdout) == (2, b"") and b"a path is empty" in done.stderr


def test_a_limit_that_is_too_large_is_told_what_is_right(made: str, run_xs: RunXs) -> None:
    for limit in ("0", "9" * 20):
        done = run_xs(["cat", made, "--limit", limit])
        assert done.returncode == 1 and b"from 1 to 1000000000000000" in done.stderr


def test_a_scheme_may_be_in_capitals(run_xs: RunXs) -> None:
    done = run_xs(["append", "HTTP://localhost:1", "t"], stdin="x")
    assert done.returncode == 1 and b"nobody answers at localhost:1" in done.stderr


def test_a_store_may_be_named_by_a_path_object(tmp_path: Path) -> None:
    with xs.open(tmp_path / "store") as client:
        assert client.append("t", "x").topic == "t"


@pytest.mark.parametrize("age", ["99999999999w", "1d"])
def test_contents_of_any_age_can_be_asked_for(made: str, run_xs: RunXs, age: str) -> None:
    done = run_xs(["gc", made, "--age", age])
    assert (done.returncode, done.stdout) == (0, b'{"removed":0,"bytes":0}\n'), done.stderr


def test_a_folder_in_place_of_a_file_is_an_error_in_one_line(made: str, run_xs: RunXs) -> None:
    os.mkdir(os.path.join(made, "tokens"))
    for words in (["list", made], ["add", made, "a", "--read"]):
        done = run_xs(["token", *words])
        assert done.returncode == 1
        assert done.stderr == f"xs: {made}/tokens: Is a directory\n".encode()


@pytest.mark.parametrize(
    "words",
    [
        ["check", "STORE", "--repair"],
        ["token", "add", "STORE", "a", "--read"],
        ["token", "remove", "STORE", "a"],
        ["backup", "SOURCE", "STORE"],
    ],
)
def test_nothing_is_written_into_another_user_s_store(
    made: str,
    tmp_path: Path,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = str(tmp_path / "source")
    with xs.open(source) as client:
        client.append("t", "x")
    before = contents_of(made)
    somebody = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: somebody)  # as for root, who may write everywhere
    status = cli.run([{"STORE": made, "SOURCE": source}.get(word, word) for word in words])
    assert status == 1 and ": run it as " in capfd.readouterr().err
    assert contents_of(made) == before


def contents_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_wrong_token_is_told_from_none(made: str) -> None:
    server = start_server(made, "--expose", f"127.0.0.1:{(port := free_port())}")
    try:
        with pytest.raises(errors.Unauthorized, match="this address needs a token"):
            xs.open(f"127.0.0.1:{port}").last()
        with pytest.raises(errors.Unauthorized, match="this token is not known here"):
            xs.open(f"wrong@127.0.0.1:{port}").last()
    finally:
        server.stop()


def test_an_export_that_may_not_be_read_leaves_no_folder(
    made: str, run_xs: RunXs, tmp_path: Path
) -> None:
    server = start_server(made, "--expose", f"127.0.0.1:{(port := free_port())}")
    try:
        token = run_xs(["token", "add", made, "writer", "--append", "notes"]).stdout.decode()
        (tmp_path / "mine").mkdir()
        for out in ("new", "new/in/it", "mine"):
            words = ["export", f":{port}", str(tmp_path / out)]
            done = run_xs(words, env={"XS_TOKEN": token.strip()})
            assert done.returncode == 1 and b"this token may not read" in done.stderr
    finally:
        server.stop()
    assert sorted(set(os.listdir(tmp_path)) - {os.path.basename(made)}) == ["mine"]
    assert os.listdir(tmp_path / "mine") == []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number: int = sock.getsockname()[1]
        return number


def test_ctrl_c_before_a_command_has_begun_says_nothing(made: str) -> None:
    """Wherever it comes, from the first moment on."""
    said = b""
    for n in range(40):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(ROOT / "tools" / "start.py"), "last", made],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        threading.Event().wait(n / 2000)
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=DEADLINE)[1]
    assert str(ROOT / "xs").encode() not in said  # what Python says before that is its own


def test_ctrl_c_amid_what_sqlite_asks_of_us_is_no_error_of_the_index() -> None:
    connection = sqlite3.connect(":memory:")
    add_sum_of(connection)
    endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) "
    presses = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    presses.start()
    with pytest.raises(KeyboardInterrupt), translated():
        connection.execute(endless + "SELECT sum(sum_of(CAST(n AS BLOB))) FROM c").fetchone()
    connection.close()
