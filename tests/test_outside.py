"""Words from outside: none reaches a file's name, a header, a shell or a terminal unchecked.

Each hostile word goes through every door that there is, with a server behind it, and the folder
around the store is looked at before and after.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import DEADLINE, XS, RunXs, Server, environment, start_server
from wire import Wire

import xs
from xs.arguments import parse
from xs.cli import find_command
from xs.commit import Append
from xs.errors import XsError
from xs.store import Store

SECRET = b"the contents of a file beside the store"
HOSTILE = {
    "up": "../secret",
    "far up": "../" * 20 + "etc/passwd",
    "absolute": "/etc/passwd",
    "in the middle": "a/../../secret",
    "dots": "..",
    "dot": ".",
    "NUL": "secret\0",
    "line": "a\r\nSet-Cookie: b",
    "LF": "a\nb",
    "CR": "a\rb",
    "escape": "\x1b]0;owned\x07\x1b[2J",
    "C1": "\x9b2J",
    "direction": "\u202etxt.exe",
    "shell": "$(touch owned)`touch owned`;touch owned",
    "option": "--help",
    "dash": "-",
    "percent": "%2e%2e%2fsecret",
    "percent twice": "%252e%252e%252fsecret",
    "overlong": "%c0%ae%c0%ae%c0%afsecret",
    "glob": "*",
    "long": "a" * 5000,
    "empty": "",
    "SQL": "'; DROP TABLE frame; --",
    "surrogate": "\ud800",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_bytes(SECRET)
    server = start_server(str(folder / "store"))
    yield server
    server.stop()


def around(server: Server) -> list[str]:
    """All that lies beside the store and in it, but for the index's own files."""
    folder = Path(server.directory).parent
    return sorted(str(p) for p in folder.rglob("*") if not p.name.startswith("xs.db"))


def encoded(word: str) -> str:
    return quote(word.encode("utf-8", "surrogatepass"), safe="")


@pytest.mark.parametrize("word", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_word_in_a_path_or_a_query_is_refused_in_one_line(
    shared: Server, word: str
) -> None:
    before = around(shared)
    text = encoded(word)
    with Wire(shared.directory) as wire:
        for method, target in [
            ("GET", f"/cas/{text}"),
            ("GET", f"/cas/sha256-{text}"),
            ("GET", f"/content/{text}"),
            ("GET", f"/next/{text}"),
            ("POST", f"/append/{text}"),
            ("POST", f"/append/t?ttl={text}x"),
            ("POST", f"/append/t?if-last={text}x"),
            ("GET", f"/?topic={text}/"),
            ("GET", f"/?after={text}x"),
            ("GET", f"/?{text}x=1"),
            ("DELETE", f"/{text}"),
        ]:
            answer = wire.ask(method, target, b"x" if method == "POST" else None)
            assert 400 <= answer.status < 500, (method, target)
            assert SECRET not in answer.body
            known = {"date", "content-type", "content-length", "allow", "connection"}
            assert set(answer.fields) <= known
            said = answer.body.decode()
            assert said.endswith("\n") and said.count("\n") <= 2, said
    assert around(shared) == before


@pytest.mark.parametrize("word", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_word_in_meta_comes_back_as_it_was_and_does_nothing(
    shared: Server, word: str
) -> None:
    before = around(shared)
    meta = json.dumps({"name": word, "topic": word, "path": word, "frame_id": word})
    with Wire(shared.directory) as wire:
        body = json.dumps({"topic": "words", "meta": json.loads(meta), "key": word[:200]}).encode()
        answer = wire.ask("POST", "/append", body, content_type="application/x-ndjson")
        assert answer.status == 200 and answer.body.count(b"\n") == 1
        result = json.loads(answer.body)
        if word == "\ud800":  # no text that could be stored
            assert result["appended"] == 0
        elif result["appended"]:
            assert json.loads(wire.ask("GET", "/last/words").body)["meta"] == json.loads(meta)
        for target in (word, f"http://a/{word}"):
            line = json.dumps({"topic": target}).encode()
            answer = wire.ask("POST", "/append", line, content_type="application/x-ndjson")
            assert json.loads(answer.body)["appended"] == 0
    assert around(shared) == before


STEERING = {name: word for name, word in HOSTILE.items() if not word.isprintable()}


@pytest.mark.parametrize("word", STEERING.values(), ids=STEERING)
def test_a_hostile_word_never_steers_the_terminal_from_an_error(
    shared: Server, word: str, tmp_path: Path
) -> None:
    if "\0" in word or word == "\ud800":
        word = word.replace("\0", "").replace("\ud800", "\x1b")  # no argument can have it
    for command in (
        ["cat", shared.directory, "--topic", word + "/"],
        ["get", shared.directory, word + "/"],
        ["append", shared.directory, word + "/"],
        ["cas", shared.directory, word + "/"],
    ):
        done = subprocess.run(
            [*XS, *command],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            env=environment(),
            capture_output=True,
            timeout=DEADLINE,
        )
        said = done.stderr.decode()
        assert done.returncode in (1, 2) and done.stdout == b"", command
        assert said[:-1].isprintable() and said.count("\n") == 1, said
    assert os.listdir(tmp_path) == []


# A folder that was exported by somebody else


def integrity(content: bytes) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content).digest()).decode()


def exported(folder: Path, **changes: object) -> Path:
    """A folder as `xs export` writes it, of one frame, with `changes` to that."""
    hash_ = integrity(SECRET)
    frame = {"topic": "t", "id": "03hbg7yoysb3ybapr2b7lf4ms", "hash": hash_, "meta": None}
    (folder / "cas").mkdir(parents=True)
    name = base64.b64encode(hash_.encode()).decode()
    (folder / "cas" / name).write_bytes(SECRET)
    (folder / "frames.jsonl").write_text(
        json.dumps({**frame, "ttl": "forever", **changes}) + "\n", encoding="utf-8"
    )
    return folder


@pytest.mark.parametrize("key", ["topic", "hash"])
@pytest.mark.parametrize("word", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_word_in_an_exported_folder_names_no_file(
    tmp_path: Path, key: str, word: str
) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    folder = exported(tmp_path / "in" / "exported", **{key: word})
    client = xs.open(str(tmp_path / "in" / "store"))
    client.append("mine", "x")
    before = sorted(map(str, tmp_path.rglob("*")))
    command = find_command("import")
    with pytest.raises(XsError):
        command.run(parse(command, [str(tmp_path / "in" / "store"), str(folder)]))
    assert [frame.topic for frame in client.cat()] == ["mine"]
    client.close()
    assert {p for p in map(str, tmp_path.rglob("*")) if "xs.db" not in p} <= set(before)


@pytest.mark.parametrize("part", ["frames.jsonl", "cas", "content"])
@pytest.mark.parametrize("kind", ["link", "link to nothing", "link up", "pipe"])
def test_an_exported_folder_is_not_followed_out_of_itself(
    tmp_path: Path, run_xs: RunXs, part: str, kind: str
) -> None:
    folder = exported(tmp_path / "exported")
    place = {"content": next((folder / "cas").iterdir())}.get(part, folder / part)
    away = tmp_path / "away"
    if kind == "pipe":
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        os.mkfifo(place)
    else:
        place.rename(away)
        targets = {"link": away, "link to nothing": tmp_path / "none", "link up": "../.."}
        place.symlink_to(targets[kind])
    done = run_xs(["import", str(tmp_path / "store"), str(folder)])
    assert done.returncode == 1
    assert b"can't import" in done.stderr and done.stderr.count(b"\n") == 1, done.stderr
    assert not (tmp_path / "store" / "cas").exists() or not os.listdir(tmp_path / "store" / "cas")


# A store's directory that was made by somebody else


@pytest.mark.parametrize("words", [["serve"], ["append", "t"], ["cat"], ["check", "--repair"]])
def test_a_database_that_is_a_link_is_refused_and_left(
    store_dir: str, tmp_path: Path, words: list[str]
) -> None:
    """SQLite's log would lie beside what it leads to, where nobody looks whether it is whole."""
    store = Store(store_dir, create=True)
    store.append(Append("t"))
    store.close()
    elsewhere = tmp_path / "elsewhere.db"
    os.rename(f"{store_dir}/xs.db", elsewhere)
    os.symlink(elsewhere, f"{store_dir}/xs.db")
    before = elsewhere.read_bytes()
    done = subprocess.run(
        [*XS, words[0], store_dir, *words[1:]],
        input=b"x",
        env=environment(),
        capture_output=True,
        timeout=DEADLINE,
    )
    assert done.returncode in (1, 4) and b"xs.db is a link" in done.stderr
    assert elsewhere.read_bytes() == before and os.path.islink(f"{store_dir}/xs.db")
    assert not os.path.exists(f"{elsewhere}-wal")


@pytest.mark.parametrize("by", ["a command", "a server"])
def test_a_lock_that_is_a_link_empties_no_file(store_dir: str, tmp_path: Path, by: str) -> None:
    store = Store(store_dir, create=True)
    store.append(Append("t"))
    store.close()
    (tmp_path / "precious").write_text("precious")
    lock = Path(store_dir, "lock")
    lock.unlink()
    lock.symlink_to(tmp_path / "precious")
    command = ["append", store_dir, "t"] if by == "a command" else ["serve", store_dir]
    done = subprocess.run(
        [*XS, *command],
        input=b"x",
        env=environment(),
        capture_output=True,
        timeout=DEADLINE,
    )
    assert done.returncode in (1, 4) and b"can't write to the store" in done.stderr
    assert (tmp_path / "precious").read_text() == "precious"
    reader = Store(store_dir)
    assert sum(1 for found in reader.check() if isinstance(found, str)) == 0
    reader.close()


def test_a_folder_of_scripts_that_is_a_link_is_not_cleared(store_dir: str, tmp_path: Path) -> None:
    Store(store_dir, create=True).close()
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "thesis" / "chapter").write_text("precious")
    Path(store_dir, "run").symlink_to(home)
    done = subprocess.run(
        [*XS, "serve", store_dir],
        env=environment(),
        capture_output=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 4 and b"is a link" in done.stderr, done.stderr
    assert (home / "thesis" / "chapter").read_text() == "precious"
