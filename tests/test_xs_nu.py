"""xs.nu: each of its commands in a real Nushell, on real servers."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import pytest
from conftest import DEADLINE, ROOT, XS, Peer, Server, environment, nu_path, start_server

import xs
from xs.client import Client

MODULE = ROOT / "xs" / "xs.nu"
COMMANDS = [
    *(".append", ".cas", ".cas-post", ".cat", ".content", ".eval", ".export", ".first", ".get"),
    *(".import", ".last", ".next", ".pipe", ".prev", ".ps", ".remove", ".step", ".version"),
]


class Place(NamedTuple):
    """A server, the ways to it, and its store as Python has it."""

    directory: str
    port: int
    token: str
    store: Client


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One server for the whole module: each test has topics of its own."""
    directory = str(tmp_path_factory.mktemp("s") / "store")
    server = start_server(directory, "--expose", "127.0.0.1:0")
    try:
        assert server.process.stdout is not None
        told = server.process.stdout.readline().decode()
        token = Path(directory, "token").read_text().strip()
        yield Place(directory, int(told.rpartition(":")[2]), token, xs.open(directory))
    finally:
        server.stop()


def command(code: str, *options: str) -> list[str]:
    """Nushell with the module used, as a command line."""
    return [nu_path(), "-n", "--no-std-lib", *options, "-c", f'use "{MODULE}" *\n{code}']


def run(
    code: str,
    addr: Optional[str] = None,
    stdin: bytes = b"",
    cwd: Optional[str] = None,
    **variables: str,
) -> subprocess.CompletedProcess[bytes]:
    given = {} if addr is None else {"XS_ADDR": addr}
    return subprocess.run(
        command(code, "--stdin") if stdin else command(code),
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env=environment(**given, **variables),
        timeout=DEADLINE * 3,
    )


def nu(code: str, addr: Union[Place, str, None] = None, **more: Any) -> bytes:
    """What it prints; it must go well."""
    done = run(code, addr.directory if isinstance(addr, Place) else addr, **more)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b"", done.stderr.decode()
    return done.stdout


def value(code: str, addr: Union[Place, str, None] = None, **more: Any) -> Any:
    """The value of its last pipeline, by way of JSON."""
    return json.loads(nu(f"{code} | to json --raw", addr, **more))


# What an error says, and the text that it points at.
CAUGHT = """catch {|error|
  let it = if $error.json? == null { $error.details } else { $error.json | from json }
  let at = $it.labels.0.span
  {said: $it.msg, label: $it.labels.0.text, at: (view span $at.start $at.end)}
}"""


def error(code: str, addr: Union[Place, str, None] = None, **more: Any) -> dict[str, str]:
    caught: dict[str, str] = value(f"try {{ {code}; null }} {CAUGHT}", addr, **more)
    assert caught is not None, "no error"
    return caught


def stored(place: Place, topic: str) -> list[bytes]:
    """The contents on a topic."""
    return [place.store.content(each.id) or b"" for each in place.store.cat(topic=topic)]


# The module


def test_it_has_each_command_with_help_for_it_and_for_all_it_takes() -> None:
    shown = value("scope commands | where name starts-with '.'")
    assert sorted(each["name"] for each in shown if each["type"] == "custom") == COMMANDS
    assert value("scope aliases | get name") == [".head", ".rm"]
    for each in shown:
        assert each["description"], each["name"]
        for signature in each["signatures"].values():
            for taken in signature:
                if taken["parameter_type"] not in ("input", "output"):
                    assert taken["description"], (each["name"], taken["parameter_name"])


def test_nothing_of_what_its_commands_share_is_seen_by_who_uses_it() -> None:
    assert value("scope commands | where type == custom | get name | where $it !~ '^[.]'") == []


def test_topics_and_ids_are_completed(place: Place, tmp_path: Path) -> None:
    id = place.store.append("completed").id
    for line, wanted in (
        (".last ", "completed"),
        (".get ", id),
        ('"x" | .append t --ttl ', "last:1"),
    ):
        script = tmp_path / "script.nu"
        script.write_text(f'use "{MODULE}" *\n{line}')
        at = str(len(script.read_bytes()))
        done = subprocess.run(
            [nu_path(), "-n", "--ide-complete", at, str(script)],
            capture_output=True,
            env=environment(XS_ADDR=place.directory),
            timeout=DEADLINE,
        )
        assert wanted in json.loads(done.stdout)["completions"]


# Appending

CONTENTS = {
    '"hällo\\n"': "hällo\n".encode(),
    '""': b"",
    "0x[00 ff 0a]": b"\x00\xff\n",
    "{b: 1, a: [true null]}": b'{"b":1,"a":[true,null]}',
    "[1 2.5 x]": b'[1,2.5,"x"]',
    "1.. | first 3": b"[1,2,3]",
    "5": b"5",
    "false": b"false",
    "null": b"",
    "[[a]; [1]]": b'[{"a":1}]',
    "{a: 1} | to json": b'{\n  "a": 1\n}',
    "'[1,   2]' | metadata set --content-type application/json": b"[1,   2]",
    "'x' | encode utf-8": b"x",
    "^printf 'from\\000outside'": b"from\x00outside",
    "[a b] | str join '-'": b"a-b",
}


@pytest.mark.parametrize("source", CONTENTS)
def test_text_and_bytes_are_stored_as_they_are_and_all_else_as_json(
    source: str, place: Place
) -> None:
    topic = "content." + hashlib.sha256(source.encode()).hexdigest()[:8]
    frame = value(f"{source} | .append {topic}", place)
    assert stored(place, topic) == [CONTENTS[source]]
    assert (frame["hash"] is None) == (CONTENTS[source] == b"")
    if source == "null":
        assert value(f".append {topic}", place)["hash"] is None


def test_the_frame_is_answered_as_a_record(place: Place) -> None:
    frame = value('"x" | .append record --meta {n: 1} --ttl last:3', place)
    assert list(frame) == ["topic", "id", "hash", "meta", "ttl"]
    (there,) = place.store.cat(topic="record")
    assert frame == {
        "topic": "record",
        "id": there.id,
        "hash": there.hash,
        "meta": {"n": 1},
        "ttl": "last:3",
    }


@pytest.mark.parametrize("what", ["a file", "standard input"])
def test_large_content_is_stored_whole(what: str, place: Place, tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "large").write_bytes(data)
    if what == "a file":
        frame = value("open --raw large | .append large.file", place, cwd=str(tmp_path))
    else:
        frame = json.loads(nu("$in | .append large.input | to json", place, stdin=data))
    assert place.store.content(frame["id"]) == data
    hash = value(f".content {frame['id']} --raw | hash sha256", place)
    assert hash == hashlib.sha256(data).hexdigest()


def test_content_goes_out_while_it_still_comes(scripted: Any, tmp_path: Path) -> None:
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    seen: list[bytes] = []
    first = threading.Event()

    def serve(peer: Peer) -> None:
        head = peer.head()
        assert b"transfer-encoding: chunked" in head.lower()
        while b"one" not in b"".join(seen):
            seen.append(peer.chunk())
        first.set()
        seen.extend(iter(peer.chunk, b""))
        peer.answer(b'{"id":"x"}', 200, "content-type: application/json")

    server = scripted(serve)
    process = subprocess.Popen(
        command(f"^cat '{pipe}' | .append slow | get id"),
        stdout=subprocess.PIPE,
        env=environment(XS_ADDR=server.path),
    )
    with open(pipe, "wb", buffering=0) as writer:
        writer.write(b"one")
        assert first.wait(DEADLINE), "the first bytes did not get there before the last"
        writer.write(b"two")
    assert process.communicate(timeout=DEADLINE)[0] == b"x\n"
    assert b"".join(seen) == b"onetwo"


METAS = [
    '{text: "ä€😀\\n\\t\\"\\\\", deep: {a: [1 -2.5 null true {}]}}',
    '"text"',
    "[1 [2]]",
    "7",
    "{a: b}",
    '{"a key": "1\\r\\n2"}',
    "{}",
]


@pytest.mark.parametrize("source", METAS)
def test_meta_comes_back_as_it_was_given(source: str, place: Place) -> None:
    meta = value(f"let given = {source}; let n = .append meta --meta $given | get id"
                 "; {same: ((.get $n).meta == $given), id: $n}", place)  # fmt: skip
    assert meta["same"]
    assert place.store.get(meta["id"]).meta == value(source)


def test_meta_may_be_large(place: Place) -> None:
    id = value(
        '.append meta.large --meta {t: ("ä" | fill --character "ö" --width 40000)} | get id', place
    )
    assert len(place.store.get(id).meta["t"]) == 40_000


def test_no_meta_is_null(place: Place) -> None:
    assert value(".append meta.none | get meta", place) is None
    assert value(".append meta.none --meta null | get meta", place) is None


TTLS = {"1day": "time:86400000", "5000": "time:5000", "last:2": "last:2", "forever": "forever"}
TTLS |= {"ephemeral": "ephemeral", "time:7000": "time:7000", "(2sec)": "time:2000"}


@pytest.mark.parametrize("given", TTLS)
def test_a_ttl_is_a_duration_or_what_the_store_takes(given: str, place: Place) -> None:
    assert value(f".append ttl --ttl {given} | get ttl", place) == TTLS[given]


def test_an_append_may_depend_on_the_newest_frame(place: Place) -> None:
    first = value(".append lock --if-last none | get id", place)
    assert value(f".append lock --if-last {first} | get topic", place) == "lock"
    newest = place.store.last("lock").id
    told = error(f".append lock --if-last {first}", place)
    assert told["said"] == f"the newest frame of lock is {newest}, not {first}"
    assert told["at"] == f"--if-last {first}"
    assert told["label"] == "the store answers 409"


@pytest.mark.parametrize("key", ["k1", "two words", "ключ"])
def test_the_same_key_appends_once(key: str, place: Place) -> None:
    once = f'"x" | .append keyed --key "{key}" | get id'
    assert value(once, place) == value(once, place)


def test_appends_at_the_same_time_keep_their_contents_apart(place: Place) -> None:
    code = (
        '1..20 | par-each {|n| if $n mod 2 == 0 { $n } else { $"t($n)" } | .append par } | length'
    )
    assert value(code, place) == 20
    expected = [f"t{n}" if n % 2 else str(n) for n in range(1, 21)]
    assert sorted(stored(place, "par")) == sorted(each.encode() for each in expected)


def test_a_job_in_the_background_can_append(place: Place) -> None:
    code = 'job spawn { "x" | .append job | get topic | job send 0 }; job recv'
    assert value(code, place) == "job"


def test_content_without_a_frame_is_stored_and_its_hash_told(place: Place) -> None:
    hash = value('"alone" | .cas-post', place)
    assert hash == "sha256-" + base64.b64encode(hashlib.sha256(b"alone").digest()).decode()
    assert place.store.cas(hash) == b"alone"
    assert value("{a: 1} | .cas-post | .cas $in", place) == '{"a":1}'


@pytest.mark.parametrize("name", [".remove", ".rm"])
def test_a_removed_frame_is_gone(name: str, place: Place) -> None:
    id = place.store.append("removed").id
    assert nu(f"{name} {id}", place) == b""
    told = error(f".get {id}", place)
    assert id in told["said"] and told["at"] == id
    assert error(f"{name} {id}", place)["label"] == "the store answers 404"


# Reading


@pytest.fixture(scope="module")
def frames(place: Place) -> list[str]:
    """The ids of six frames: read.a and read.b in turn, the last with bytes as content."""
    for n in range(5):
        place.store.append(f"read.{'ab'[n % 2]}", f"text {n}".encode(), meta={"n": n})
    place.store.append("read.b", b"\xff\x00", meta={"n": 5})
    return [frame.id for frame in place.store.cat(topic="read.*")]


READS = {
    "": [0, 1, 2, 3, 4, 5],
    "--limit 2": [0, 1],
    "--last 2": [4, 5],
    "--topic read.a": [0, 2, 4],
    "-T read.a,read.b --limit 3": [0, 1, 2],
    "--after {2}": [3, 4, 5],
    "-a {2}": [3, 4, 5],
    "--last-id {2}": [3, 4, 5],
    "-l {2}": [3, 4, 5],
    "--from {2}": [2, 3, 4, 5],
    "--until {2}": [0, 1, 2],
    "--from {1} --until {3}": [1, 2, 3],
    "--from 1hr": [0, 1, 2, 3, 4, 5],
    "--from 2h": [0, 1, 2, 3, 4, 5],
    "--until 1hr": [],
    "--until ((date now) - 1hr)": [],
    "--from ((date now) - 1hr)": [0, 1, 2, 3, 4, 5],
    "--from 2026-01-31T09:30:00+05:30 --limit 1": [0],
    "--after ((date now) + 1hr)": [],
}


@pytest.mark.parametrize("options", READS)
def test_cat_takes_what_the_api_takes(options: str, place: Place, frames: list[str]) -> None:
    topic = "" if "-T" in options or "--topic" in options else "--topic read.*"
    spelled = options.format(*frames)
    read = value(f".cat {topic} {spelled} | get --optional id", place)
    assert read == [frames[n] for n in READS[options]]


def test_frames_are_records_and_cat_is_a_list_of_them(place: Place, frames: list[str]) -> None:
    read = value(".cat --topic read.* --limit 1 | first", place)
    assert list(read) == ["topic", "id", "hash", "meta", "ttl"]
    assert value(".cat --topic read.* | describe --no-collect", place) == "stream"


def test_frames_come_with_their_time_and_content(place: Place, frames: list[str]) -> None:
    options = "--with-content --with-timestamp"
    read = value(f".cat --topic read.* --last 2 {options} | get content.0", place)
    assert read == "text 4"
    code = f".cat --topic read.* --last 1 {options} | first | [$in.content ($in | columns)]"
    assert nu(f"{code} | get 0 | encode hex", place) == b"FF00\n"
    names = ["topic", "id", "hash", "meta", "ttl", "timestamp", "content"]
    assert value(f"{code} | get 1", place) == names
    got = f".get {frames[5]} {options}"
    assert nu(f"{got} | get content | encode hex", place) == b"FF00\n"
    assert value(f"{got} | columns", place) == names
    assert value(f".get {frames[0]} --with-content | get content", place) == "text 0"
    assert "timestamp" not in value(f".get {frames[0]}", place)


def test_a_frame_and_its_neighbours(place: Place, frames: list[str]) -> None:
    assert value(f".get {frames[2].upper()} | get id", place) == frames[2]
    assert value(f".next {frames[2]} | get id", place) == frames[3]
    assert value(f".prev {frames[2]} | get id", place) == frames[1]
    assert value(f".next {frames[2]} --topic read.a | get id", place) == frames[4]
    assert value(f".prev {frames[2]} -T read.a | get id", place) == frames[0]


def test_the_oldest_and_the_newest(place: Place, frames: list[str]) -> None:
    assert value(".first read.* | get id", place) == frames[0]
    assert value(".last read.* | get id", place) == frames[5]
    assert value(".head read.a | get id", place) == frames[4]
    assert value(".first read.* 2 | get id", place) == frames[:2]
    assert value(".last read.* 2 | get id", place) == frames[4:]
    assert value(".last read.a 1 | get id", place) == [frames[4]], "a number makes a list"
    assert value(".first | get topic", place) == "xs.start"
    assert value(".first 1 | get topic", place) == ["xs.start"]
    assert value(".last 3 | length", place) == 3


def test_the_version(place: Place) -> None:
    assert value(".version", place) == {"version": xs.__version__}


class Following:
    """A Nushell that prints as it goes."""

    def __init__(self, code: str, addr: str) -> None:
        # Without a buffer, in which `select` would not see a second line that came with the first.
        self.process = subprocess.Popen(
            command(code), stdout=subprocess.PIPE, env=environment(XS_ADDR=addr), bufsize=0
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
        assert readable, "nothing came"
        return self.process.stdout.readline().decode().rstrip("\n")

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=DEADLINE)


FOLLOWS = {
    ".cat --follow --topic {}": ["1", "xs.threshold"],
    ".cat -f -T {} --with-content": ["1", "xs.threshold"],
    ".last {} --follow": ["1"],
    ".head {} -f": ["1"],
    ".last {} 5 --follow": ["1"],
}


@pytest.mark.parametrize("source", FOLLOWS)
def test_a_follower_gives_each_frame_as_it_comes(source: str, place: Place) -> None:
    topic = "follow." + hashlib.sha256(source.encode()).hexdigest()[:8]
    place.store.append(topic, meta=1)
    shown = "| each {|it| print (if $it.meta == null { $it.topic } else { $it.meta }) } | ignore"
    following = Following(f"{source.format(topic)} {shown}", place.directory)
    try:
        for expected in FOLLOWS[source]:
            assert following.line() == expected
        for n in ("2", "3"):  # each is appended only when the one before has been seen
            place.store.append(topic, meta=int(n))
            assert following.line() == n
    finally:
        following.end()


def test_a_follower_of_what_is_new_sees_pulses_and_no_history(place: Place) -> None:
    place.store.append("pulsed")
    for pulse in ("20ms", "20"):
        read = value(f".cat --new --pulse {pulse} -T pulsed | first 2 | get topic", place)
        assert read == ["xs.pulse", "xs.pulse"]
    read = value(".cat --tail --follow --pulse 20ms -T pulsed | first | get topic", place)
    assert read == "xs.pulse"


BREAKING = {
    ".cat | to json": "x-ndjson",
    ".cat --follow --with-content | each {|it| $it.a } | str join": "x-ndjson",
    ".content ID --raw | collect": "octet-stream",
    ".content ID": "octet-stream",
    ".eval x | collect": "octet-stream",
    ".eval x": "plain",
    ".version": "json",
}


@pytest.mark.parametrize("source", BREAKING)
def test_an_answer_that_breaks_off_is_an_error(source: str, scripted: Any) -> None:
    kind = f"application/{BREAKING[source]}"

    def serve(peer: Peer) -> None:
        peer.body(peer.head())
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n"
        peer.send(head.encode() + b'9\r\n{"a": 1}\n\r\n')

    done = run(source.replace("ID", "0" * 25), scripted(serve).path)
    assert done.returncode != 0, done
    assert b"Error" in done.stderr


# Content

TEXTS = [b"plain", "ä€😀\n".encode(), b"", b"\xff\xfe", b"\x00", b"half \xc3", b'{"a":1}']


@pytest.mark.parametrize("data", TEXTS)
def test_content_is_text_or_else_bytes(data: bytes, place: Place) -> None:
    frame = place.store.append("text", data)
    try:
        text: Optional[str] = data.decode() or None
        kind = "nothing" if text is None else "string"
    except UnicodeDecodeError:
        text, kind = None, "binary"
    ways = [f".content {frame.id}"]
    if data:
        ways.append(f'.cas "{frame.hash}"')
    for way in ways:
        assert value(f"{way} | describe", place) == kind
        if kind != "binary":
            assert value(way, place) == text
        shown = nu(f"{way} | default 0x[] | into binary | encode hex", place).decode().strip()
        assert bytes.fromhex(shown) == data
        raw = nu(f"{way} --raw | collect | encode hex", place).decode().strip()
        assert bytes.fromhex(raw) == data


def test_raw_content_comes_as_it_arrives(scripted: Any) -> None:
    seen = threading.Event()

    def serve(peer: Peer) -> None:
        peer.head()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n")
        peer.send(b"content-length: 8\r\n\r\none\n")
        assert seen.wait(DEADLINE)
        peer.send(b"two\n")

    following = Following(
        f".content {'0' * 25} --raw | lines | each {{|it| print $it }} | ignore",
        scripted(serve).path,
    )
    try:
        assert following.line() == "one"
        seen.set()
        assert following.line() == "two"
    finally:
        seen.set()
        following.end()


# Addresses

ADDRESSES = [
    "{directory}",
    "{directory}/",
    "{directory}/sock",
    "127.0.0.1:{port}",
    "localhost:{port}",
    ":{port}",
    "http://127.0.0.1:{port}",
    "http://127.0.0.1:{port}/",
    "{token}@:{port}",
    "{token}@127.0.0.1:{port}",
    "http://{token}@localhost:{port}",
]


@pytest.mark.parametrize("form", ADDRESSES)
def test_an_address_has_any_form_that_the_command_takes(form: str, place: Place) -> None:
    addr = form.format(**place._asdict())
    token = {} if "@" in form or "directory" in form else {"XS_TOKEN": place.token}
    code = '"über TCP" | .append address --meta {a: "ü"} | [(.cas $in.hash) (.last address).meta.a]'
    assert value(code, addr, **token) == ["über TCP", "ü"]
    assert value(f'.version --addr "{addr}"', **token) == {"version": xs.__version__}
    id = value(".append address.gone | get id", addr, **token)
    assert nu(f".rm {id}", addr, **token) == b""


def test_a_path_is_relative_to_the_folder_and_home_is_known(place: Place, tmp_path: Path) -> None:
    parent, name = os.path.split(place.directory)
    assert value(".version", name, cwd=parent)
    assert value(".version", f"./{name}/sock", cwd=parent)
    assert value(f'cd "{parent}"; .version', name, cwd=str(tmp_path))
    assert value(f".version --addr ~/{name}", cwd=str(tmp_path), HOME=parent)


def test_the_flag_goes_before_the_variable(place: Place, tmp_path: Path) -> None:
    assert value(f'.version --addr "{place.directory}"', str(tmp_path))


def test_without_an_address_it_is_said_how_to_give_one() -> None:
    for given in ({}, {"XS_ADDR": ""}):
        told = error(".version", **given)
        assert told["said"] == (
            "no address: give --addr, or set $env.XS_ADDR to a store's directory or HOST:PORT"
        )
        assert told["at"] == ".version"


def test_where_no_server_is_it_is_said_how_to_start_one(tmp_path: Path, store_dir: str) -> None:
    server = start_server(store_dir)
    server.process.kill()  # its socket stays
    server.stop()
    left = os.path.join(store_dir, "sock")
    for addr in (str(tmp_path), str(tmp_path / "none"), store_dir, left, ":1", "localhost:1"):
        for code in (".cat", '"x" | .append t', f".rm {'0' * 25}"):
            told = error(code, addr)
            assert told["said"] == (
                f"no server answers at {addr}: start one with `xs serve DIR` (TCP: --expose), or "
                "use the `xs` command, which works on a directory without one"
            )
            assert told["at"] in (".cat", "t", "0" * 25)


def test_where_no_tls_is_spoken_that_is_said(place: Place) -> None:
    for code in (".cat", '"x" | .append t'):
        told = error(code, f"https://localhost:{place.port}")
        assert told["said"].startswith(f"no TLS answers at https://localhost:{place.port}, or ")
        assert told["said"].endswith("is called by http:// in place of https://")
        assert told["at"] in (".cat", "t")


def test_a_wrong_token_is_refused_in_the_servers_words(place: Place) -> None:
    words = {f":{place.port}": "this address needs a token"}
    words[f"wrong@:{place.port}"] = "this token is not known here"
    for addr, said in words.items():
        told = error(".last", addr)
        assert told["said"].startswith(said) and told["label"] == "the store answers 401"


# Errors

REFUSED = {
    '"x" | .append "two words"': ("not a topic: 'two words'", '"two words"'),
    '"x" | .append xs.mine': ("topic 'xs.mine' belongs to the runtime", "xs.mine"),
    '"x" | .append ""': ("not a topic: ' '", '""'),
    '"x" | .append ..': ("not a topic: '.. '", ".."),
    '"x" | .append a/b': ("not a topic: 'a/b'", "a/b"),
    '"x" | .append t --ttl soon': ("not a ttl: 'soon'", "--ttl soon"),
    '"x" | .append t --if-last me': ("if-last='me'", "--if-last me"),
    '"x" | .append t --key ("k" | fill --character k --width 300)': (
        "the idempotency key has 1 to 255 bytes",
        '--key ("k" | fill --character k --width 300)',
    ),
    ".cas-post": ("the body is empty", ".cas-post"),
    ".cat --from yesterday": ("from='yesterday'", "--from yesterday"),
    ".cat --until soon": ("until='soon'", "--until soon"),
    ".cat --after x --from y": ("after=", "--after x"),
    ".cat --topic a/b": ("not a topic pattern: 'a/b'", "--topic a/b"),
    ".cat --pulse 9ms": ("follow=9: not a pulse: 9: it has 10 to ", "--pulse 9ms"),
    ".cat --pulse 0ms": ("follow=00: not a pulse: 00: it has 10 to ", "--pulse 0ms"),
    ".cat --pulse 1000us": ("follow=01: not a pulse: 01: it has 10 to ", "--pulse 1000us"),
    ".cat --new --last 2": ("new and last can't go together", ".cat"),
    ".cat --last 0": ("last='0'", ".cat"),
    ".get nothing": ("not an id: 'nothing'", "nothing"),
    ".get ../version": ("not an id: '../version'", "../version"),
    ".next 0000000000000000000000000 -T none": ("no frame after", "0000000000000000000000000"),
    ".last none": ("no frame of none", "none"),
    ".head none 3": ("no frame of none", "none"),
    ".cas sha256-x": ("not a hash: 'sha256-x'", "sha256-x"),
    ".content x": ("not an id: 'x'", "x"),
    ".rm x": ("not an id: 'x'", "x"),
    ".pipe 0000000000000000000000000 x": ("", "x"),
}  # fmt: skip


@pytest.mark.parametrize("code", REFUSED)
def test_an_error_is_the_stores_sentence_and_points_at_what_it_is_about(
    code: str, place: Place
) -> None:
    said, at = REFUSED[code]
    told = error(f"{code} | ignore", place)
    assert told["said"].startswith(said)
    assert told["at"] == at
    assert told["label"].startswith("the store answers 4")


def test_an_uncaught_error_shows_the_line_of_the_call(place: Place) -> None:
    done = run('let a = 1\n"x" | .append "two words"\n"on"', place.directory)
    assert done.returncode == 1 and done.stdout == b""
    shown = done.stderr.decode()
    assert '"x" | .append "two words"' in shown
    assert "the store answers 400" in shown
    assert "xs.nu" not in shown


def test_what_fails_before_it_is_sent_is_an_error_and_stores_nothing(place: Place) -> None:
    bad = '[1 2] | each {|n| if $n == 2 { error make {msg: "mine"} }; $n }'
    assert run(f"{bad} | .append failing", place.directory).returncode != 0
    assert run(f"{bad} | .import", place.directory).returncode != 0
    assert stored(place, "failing") == []
    told = error('"x" | .append failing --key "a\\nb"', place)
    assert told["said"].startswith("no answer")


# Scripts

YIELDS = {
    "'text'": "text",
    "5": "5",
    "{a: [1]}": {"a": [1]},
    "[1 a {b: 2}]": [1, "a", {"b": 2}],
    "1..3": [1, 2, 3],
    "null": None,
    ".version | get version": xs.__version__,
}


@pytest.mark.parametrize("script", YIELDS)
def test_what_a_script_yields_comes_back_by_its_type(script: str, place: Place) -> None:
    assert value(f'.eval "{script}"', place) == YIELDS[script]
    assert value(f".eval {{|| {script} }}", place) == YIELDS[script]


def test_bytes_that_a_script_yields_come_back_as_bytes(place: Place) -> None:
    assert nu(".eval {|| 0x[00 ff] } | collect | encode hex", place) == b"00FF\n"
    assert value(".eval {|| 0x[00 ff] } | describe", place).startswith("binary")


def test_a_long_text_comes_back_whole(place: Place) -> None:
    assert value(".eval {|| 'x' | fill -w 400000 -c ü }", place) == "x" + "ü" * 399_999


def test_a_frame_is_the_scripts_input(place: Place) -> None:
    frame = place.store.append("piped", b"content", meta={"n": 1})
    assert value(f".pipe {frame.id} '$in.meta.n + 1'", place) == "2"
    assert value(f".pipe {frame.id} {{|| .cas $in.hash }}", place) == "content"
    assert value(f".pipe {frame.id} {{ get topic }}", place) == "piped"


def test_a_script_may_have_many_lines_and_quotes(place: Place) -> None:
    code = """.eval {||
        let a = "it's" # a comment
        let b = 'é"' + "\\n"
        [$a $b]
    }"""
    assert value(code, place) == ["it's", 'é"\n']


def test_a_script_that_fails_is_told_in_nushells_words(place: Place) -> None:
    told = error('.eval "1 / 0"', place)
    assert "division_by_zero" in told["said"]
    assert told["at"] == '"1 / 0"'


def test_values_of_a_script_come_while_it_runs(place: Place) -> None:
    script = ".cat --follow --new --topic evaluated --limit 2 | each {|it| $it.meta }"
    following = Following(f".eval '{script}' | each {{|it| print $it }} | ignore", place.directory)
    stop = threading.Event()

    def append() -> None:  # the script sees only what comes once it follows: until then, again
        while not stop.wait(0.05):
            place.store.append("evaluated", meta=1, ttl="ephemeral")

    thread = threading.Thread(target=append)
    thread.start()
    try:
        assert following.line() == "1"
    finally:
        stop.set()
        thread.join()
        following.end()


def test_what_runs_is_listed(place: Place) -> None:
    place.store.append("listed.register", b"{|frame| null }", meta={"topic": "none"})
    deadline = time.monotonic() + DEADLINE
    while not (found := [each for each in value(".ps", place) if each["name"] == "listed"]):
        assert time.monotonic() < deadline
    assert found[0]["kind"] == "handler"
    place.store.append("listed.unregister")


# In a handler


def test_in_a_handler_append_leaves_its_frame_to_the_handler(place: Place) -> None:
    code = """
        $env.XS_GATHER = {job: 0}
        let back = [
          ("text" | .append left --meta {a: 1} --ttl 1sec)
          (0x[ff] | .append left)
          ({b: 2} | .append left --ttl last:2)
          (.append left)
        ]
        [$back (1..4 | each { job recv --tag 7 })]"""
    back, left = value(code, place)
    assert back == [None] * 4
    assert left == [
        {"topic": "left", "meta": {"a": 1}, "ttl": 1000, "content": "text"},
        {"topic": "left", "content_base64": "/w=="},
        {"topic": "left", "ttl": "last:2", "content": '{"b":2}'},
        {"topic": "left"},
    ]
    assert stored(place, "left") == []


@pytest.mark.parametrize("flag", ["--if-last none", "--key k", "--addr x"])
def test_in_a_handler_append_refuses_what_needs_an_answer(flag: str, place: Place) -> None:
    told = error(f'$env.XS_GATHER = {{job: 0}}; "x" | .append left {flag}', place)
    assert told["said"].startswith("no --if-last, --key or --addr in a handler")


def test_the_variable_of_another_process_takes_no_frame(place: Place) -> None:
    assert nu('"x" | .append kept | get topic', place, XS_GATHER="1") == b"kept\n"
    assert stored(place, "kept") == [b"x"]


def test_a_nushell_that_a_handler_starts_appends_to_the_store(place: Place) -> None:
    module = Path(xs.__file__).with_name("xs.nu")
    code = f'use {module} *; "x" | .append child.out | ignore'
    script = f"{{|frame| ^$nu.current-exe -n -c '{code}'; .append child.done }}"
    place.store.append("child.register", script, meta={"topic": "child.in"})
    next(iter(place.store.cat(topic="child.registered", follow=True, limit=1)))
    place.store.append("child.in")
    list(place.store.cat(topic="child.done", follow=True, limit=1))
    assert stored(place, "child.out") == [b"x"]
    place.store.append("child.unregister")


def test_a_handler_of_the_server_appends_with_it(place: Place) -> None:
    script = b'{|frame| "one" | .append handled.out --meta {n: 1}; 2 | .append handled.out; null }'
    place.store.append("handled.register", script, meta={"topic": "handled.in"})
    next(iter(place.store.cat(topic="handled.registered", follow=True, limit=1)))
    cause = place.store.append("handled.in")
    out = list(place.store.cat(topic="handled.out", follow=True, limit=2))
    found = [frame for frame in out if frame.topic == "handled.out"]
    assert [place.store.content(frame.id) for frame in found] == [b"one", b"2"]
    assert found[0].meta["n"] == 1
    assert found[0].meta["frame_id"] == cause.id
    place.store.append("handled.unregister")


def test_step_shows_what_a_handler_would_do_and_stores_nothing(place: Place) -> None:
    ids = [place.store.append("stepped", meta=n).id for n in range(3)]
    code = """.cat -T stepped | .step {|frame|
        if $frame.meta > 0 { $frame.meta | .append stepped.log; 0x[00] | .append stepped.log }
        $frame.meta * 10
    }"""
    steps = value(code, place)
    assert [each["frame_id"] for each in steps] == ids
    assert [each["out"] for each in steps] == [0, 10, 20]
    assert [each["state"] for each in steps] == [None] * 3
    assert steps[0]["append"] == []
    assert steps[2]["append"] == [
        {"topic": "stepped.log", "content": "2"},
        {"topic": "stepped.log", "content_base64": "AA=="},
    ]
    assert stored(place, "stepped.log") == []
    after = '.cat -T stepped | .step {|f| null }; "x" | .append stepped.on | .cas $in.hash'
    assert value(after, place) == "x", "an append afterwards is a real one"


def test_step_hands_state_on_by_way_of_json(place: Place) -> None:
    for _ in range(3):
        place.store.append("stepped.state")
    code = """.cat -T stepped.state --follow | .step --stateful --initial-state {n: 0} {
        |frame, state|
        if $state.n == 1 { return null }
        {state: {n: ($state.n + 1), at: 2026-01-31T09:30:00Z}, out: ($state.at? | describe)}
    } | first 3"""
    first, second, third = value(code, place)
    assert first["out"] == "nothing" and first["state"]["n"] == 1
    assert (second["out"], second["state"]["n"]) == (None, 1), "null leaves the state as it was"
    assert third["state"]["n"] == 1
    code = """.cat -T stepped.state | .step --stateful {|frame, n|
        let n = $n | default 0; {state: ($n + 1), out: ($n | describe)} } | get state"""
    assert value(code, place) == [1, 2, 3]
    code = """.last stepped.state | .step --stateful --initial-state 2026-01-31 {|frame, at|
        {out: ($at | describe)} } | get out"""
    assert value(code, place) == ["string"], "the state that it begins with, too"
    code = """.cat -T stepped.state | .step --stateful --initial-state 1 {|frame, n| {state: null} }
        | get state"""
    assert value(code, place) == [None] * 3


def test_step_takes_one_frame_and_frames_with_content(place: Place) -> None:
    place.store.append("stepped.one", b"text")
    assert value(".last stepped.one | .step {|it| $it.topic } | get out.0", place) == "stepped.one"
    code = ".cat -T stepped.one --with-content | .step {|it| $it.content } | get out.0"
    assert value(code, place) == "text"


def test_step_refuses_what_a_stateful_handler_may_not_return(place: Place) -> None:
    for wrong in ("5", "{other: 1}", "[1]"):
        told = error(f".last | .step --stateful {{|frame, state| {wrong} }} | collect", place)
        assert told["said"].startswith("a stateful handler returns {state?, out?} or nothing, not")
    assert error(".last | .step {|frame| 1 / 0 } | collect", place)["said"].startswith("Division")


def test_step_works_in_a_job_of_its_own(place: Place) -> None:
    place.store.append("stepped.job")
    step = '.last stepped.job | .step {|it| "x" | .append y } | get append.0.0.topic'
    assert value(f"job spawn {{ {step} | job send 0 }}; job recv", place) == "y"


# Whole stores


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Server]:
    """A server of a store that has all kinds of frames and contents."""
    server = start_server(str(tmp_path / "full"))
    store = xs.open(server.directory)
    store.append("a", b"text", meta={"float": 1.10, "content": 'x","content":"y"}'})
    store.append("a", b"text")
    store.append("b", b"\xff\x00")
    store.append("c", meta="no content")
    store.append("d", b'quoted \\" and ","content":"z"}')
    store.append("large", os.urandom(100_000), ttl="time:100000000")
    store.append("larger", b"x" * (9 << 20))  # above what comes within a frame's line
    store.append("meta", b"m", meta=12345678901234567890123)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Server]:
    server = start_server(str(tmp_path / "other"))
    try:
        yield server
    finally:
        server.stop()


def cli(*args: str) -> bytes:
    words = [*XS, *args]
    return subprocess.run(words, capture_output=True, check=True, env=environment()).stdout


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_export_is_what_the_command_exports(full: Server, tmp_path: Path) -> None:
    assert nu(".export ours", full.directory, cwd=str(tmp_path)) == b""
    cli("export", full.directory, str(tmp_path / "theirs"))
    ours, theirs = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    assert ours == theirs


def test_an_exported_folder_makes_the_same_store_again(
    full: Server, other: Server, tmp_path: Path
) -> None:
    nu(f'.export "{tmp_path}/out"', full.directory)
    lines = (tmp_path / "out" / "frames.jsonl").read_bytes()
    code = f'.import "{tmp_path}/out" --addr "{other.directory}"'
    for _ in range(2):  # the same again changes nothing
        told = value(code)
        assert (told["imported"], told["errors"]) == (lines.count(b"\n"), [])
    copied = cli("cat", other.directory)
    assert set(lines.splitlines()) <= set(copied.splitlines())
    for frame in xs.open(full.directory).cat():
        if frame.hash:
            assert xs.open(other.directory).cas(frame.hash) == xs.open(full.directory).cas(
                frame.hash
            )


def test_imported_content_goes_with_its_last_frame(
    full: Server, other: Server, tmp_path: Path
) -> None:
    nu(f'.export "{tmp_path}/out"', full.directory)
    to = f'--addr "{other.directory}"'
    value(f'.import "{tmp_path}/out" {to}')
    value(f".cat {to} | where hash != null | each {{|it| .remove $it.id {to} }} | length")
    assert json.loads(cli("gc", other.directory, "--age", "0s"))["removed"] == 0


def test_a_folder_without_contents_is_imported(other: Server, tmp_path: Path) -> None:
    frame = {"topic": "a", "id": "0" * 24 + "1"}
    (tmp_path / "frames.jsonl").write_text(json.dumps(frame) + "\n")
    assert value(f'.import "{tmp_path}" --addr "{other.directory}"')["imported"] == 1


@pytest.mark.parametrize("how", ["frames", "one frame", "text", "a file of lines"])
def test_frames_are_imported_from_what_is_piped_in(
    how: str, full: Server, other: Server, tmp_path: Path
) -> None:
    first = xs.open(full.directory).first("b").id
    select = f"--with-content --until {first}"
    to = f'.import --addr "{other.directory}"'
    (tmp_path / "lines").write_bytes(cli("cat", full.directory, *select.split()))
    code = {
        "frames": f".cat {select} | {to}",
        "one frame": f".get {first} --with-content | {to}",
        "text": f'open --raw "{tmp_path}/lines" | decode utf-8 | {to}',
        "a file of lines": f'open --raw "{tmp_path}/lines" | {to}',
    }[how]
    told = value(code, full.directory)
    assert told["imported"] == (1 if how == "one frame" else 4)
    assert xs.open(other.directory).content(first) == b"\xff\x00"


@pytest.mark.parametrize("folder", ["nothing", "cas-alone", "empty"])
def test_what_is_no_exported_folder_is_not_imported(
    folder: str, other: Server, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cas-alone" / "cas").mkdir(parents=True)
    told = error(f'.import "{tmp_path}/{folder}" | ignore', other.directory)
    assert told["said"].startswith("not an exported folder: ")
    assert told["at"] == f'"{tmp_path}/{folder}"'


def test_frames_that_are_refused_are_an_error(full: Server, other: Server) -> None:
    to = f'.import --addr "{other.directory}"'
    told = error(f"[{{topic: a}} (.first)] | {to}", full.directory)
    assert told["said"].startswith("1 imported, 1 refused; line 1: no frame")
    told = error(f".cat --with-content | {to}", full.directory)
    assert "1 refused" in told["said"], "the content above 8 MiB is not in its frame"


def test_an_export_goes_to_a_new_or_empty_folder_only(full: Server, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    told = error(f'.export "{tmp_path}/out"', full.directory)
    assert told["said"] == f"can't export to {tmp_path}/out: it is not empty"
    assert sorted(os.listdir(tmp_path / "out")) == ["mine"]


def test_a_folder_that_is_no_export_or_damaged_is_refused(
    full: Server, other: Server, tmp_path: Path
) -> None:
    assert run(f'.import "{tmp_path}/full"', other.directory).returncode == 1
    nu(f'.export "{tmp_path}/out"', full.directory)
    name = base64.b64encode(xs.open(full.directory).first("b").hash.encode()).decode()
    (tmp_path / "out" / "cas" / name).write_bytes(b"other")
    told = error(f'.import "{tmp_path}/out"', other.directory)
    assert "1 refused" in told["said"] and "is not here" in told["said"]


# xs nu


def test_xs_nu_prints_the_module() -> None:
    assert cli("nu") == MODULE.read_bytes()


def test_the_package_has_the_files_that_lie_beside_its_modules() -> None:
    assert (resources.files("xs") / "xs.nu").read_bytes() == MODULE.read_bytes()
    text = (ROOT / "pyproject.toml").read_text()
    assert '[tool.setuptools.package-data]\nxs = ["*.nu"]\n' in text
    suffixes = {path.suffix for path in (ROOT / "xs").iterdir() if path.is_file()}
    assert suffixes == {".py", ".nu"}


def install(home: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*XS, "nu", "--install"],
        capture_output=True,
        env=environment(**{"HOME": str(home), "XDG_CONFIG_HOME": "", **variables}),
        timeout=DEADLINE,
    )


def test_an_installed_module_is_there_in_each_nushell_and_for_scripts(
    place: Place, tmp_path: Path
) -> None:
    variables = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    for _ in range(2):
        told = install(tmp_path, XS_NU=nu_path(), XDG_CONFIG_HOME=variables["XDG_CONFIG_HOME"])
        path = Path(os.fsdecode(told.stdout).partition(": each new Nushell")[0])
        assert path.is_relative_to(tmp_path) and path.parent.name == "autoload", told
        assert os.listdir(path.parent) == ["xs.nu"]
    for name in ("config.nu", "env.nu"):  # else a first start asks whether to make them
        (path.parent.parent / name).touch()
    shown = "print (.version | get version) (scope commands | where name in [ask fail] | length)"
    environ = environment(XS_ADDR=place.directory, **variables)
    for words in (
        [nu_path(), "--no-std-lib", "-e", f"{shown}; exit"],
        [nu_path(), "-n", "-c", f'use "{path}" *; {shown}'],
    ):
        done = subprocess.run(
            words, capture_output=True, env=environ, stdin=subprocess.DEVNULL, timeout=DEADLINE
        )
        assert done.stdout.split() == [xs.__version__.encode(), b"0"], done


def test_without_nushell_the_module_goes_where_nushell_says_that_it_looks(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for config in ("", str(tmp_path / "config")):
        told = install(tmp_path, XS_NU="", PATH=str(tmp_path / "bin"), XDG_CONFIG_HOME=config)
        default = "Library/Application Support" if sys.platform == "darwin" else ".config"
        path = Path(config or tmp_path / default) / "nushell" / "autoload" / "xs.nu"
        assert told.stdout.startswith(os.fsencode(path) + b": "), told
        assert MODULE.read_bytes() in path.read_bytes()


def test_the_module_is_not_put_before_a_nushell_that_cannot_read_it(tmp_path: Path) -> None:
    old = tmp_path / "nu"
    old.write_text("#!/bin/sh\necho 0.108.0\n")
    old.chmod(0o755)
    told = install(tmp_path, XS_NU=str(old))
    assert told.returncode == 1 and b"0.108.0" in told.stderr and b"too old" in told.stderr
    assert os.listdir(tmp_path) == ["nu"]


def test_where_it_cannot_be_put_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / ".config").write_text("a file")
    told = install(tmp_path, XS_NU="", PATH=str(tmp_path))
    if sys.platform != "darwin":
        assert told.returncode == 1 and told.stderr.count(b"\n") == 1
        assert b"can't write" in told.stderr
