"""Who may use a TCP address: the rules by themselves, and over real connections."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional, Union

import pytest
from conftest import DEADLINE, XS, RunXs, Server, environment, start_server, until
from scripting import is_gone
from wire import Wire, request

import xs
from xs import http1, tokens
from xs.access import Access, access, rights_of
from xs.errors import Forbidden, Misdirected, Unauthorized, XsError
from xs.rights import Rights

NDJSON = {"content_type": "application/x-ndjson"}
ASKED = Access("s3cret", frozenset(["localhost", "box"]), lambda _: None)


def head(host: str = "localhost", target: str = "/", minor: int = 1, **fields: str) -> bytes:
    """A request's head with the right token, unless `authorization` says otherwise ("": none)."""
    fields = {"authorization": "Bearer s3cret", **fields}
    lines = [f"GET {target} HTTP/1.{minor}"]
    lines += [f"host: {host}"] if host or minor else []
    lines += [f"{name}: {value}" for name, value in fields.items() if value]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def refused(data: bytes, asked: Optional[Access] = ASKED) -> Optional[type]:
    parsed = http1.read_request_head(bytearray(data))
    assert parsed is not None
    try:
        rights_of(parsed, asked)
    except XsError as error:
        return type(error)
    return None


# The rules


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:80",
        "localhost.",
        "box:8080",
        "BOX",
        "127.0.0.1",
        "127.0.0.1:1",
        "10.1.2.3",
        "[::1]",
        "[::1]:80",
        "[fe80::1]:80",
        "0.0.0.0",
    ],
)
def test_an_ip_address_and_a_name_of_this_host_are_served(host: str) -> None:
    assert refused(head(host)) is None


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "box.evil",
        "127.0.0.1.nip.io",
        "2130706433",
        "0x7f.1",
        "127.1",
        "xbox",
        "localhost%2eevil",
        "%6cocalhost",
        "..",
    ],
)
def test_a_foreign_host_is_refused(host: str) -> None:
    assert refused(head(host)) is Misdirected


def test_a_request_of_http_1_0_without_a_host_is_refused() -> None:
    assert refused(head("", minor=0)) is Misdirected


def test_the_target_s_host_counts_before_the_host_field() -> None:
    assert refused(head("localhost", "http://evil.example/")) is Misdirected
    assert refused(head("evil.example", "http://localhost/")) is None


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://evil.example",
        "https://evil.example:443",
        "http://localhost:81",
        "http://box",
        "http://localhost.evil.example",
        "file://",
        "localhost",
        "http://localhost@evil.example",
        "http://127.0.0.1:80",
        "chrome-extension://abc",
        "http://localhost:80, http://evil.example",
    ],
)
def test_a_foreign_origin_is_refused(origin: str) -> None:
    assert refused(head("localhost:80", origin=origin)) is Forbidden


def test_each_of_several_origins_counts() -> None:
    own, other = "http://localhost:80", "http://evil.example"
    for origins in ((own, other), (other, own)):
        assert refused(head("localhost:80", origin="\r\norigin: ".join(origins))) is Forbidden


@pytest.mark.parametrize("origin", ["http://localhost:80", "https://LOCALHOST:80"])
def test_the_server_s_own_origin_is_welcome(origin: str) -> None:
    assert refused(head("localhost:80", origin=origin)) is None


@pytest.mark.parametrize("value", ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret"])
def test_the_token_is_taken(value: str) -> None:
    assert refused(head(authorization=value)) is None


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer s3cre",
        "Bearer s3crets",
        "Bearer S3CRET",
        "s3cret",
        "Basic s3cret",
        "Bearer s3crét",
        "Basic OnMzY3JldA==",
        "Bearer s3cret s3cret",
        "Bearer  ",
        "Bearer\ts3cret",
        "Bearer \xa0s3cret",
        "Bearer s3cret\x85",
        "Bearer s3cret\r\nauthorization: Bearer s3cret",
        "Bearer s3cret\r\nauthorization: Bearer another",
    ],
)
def test_without_the_token_a_request_is_refused(value: str) -> None:
    assert refused(head(authorization=value)) is Unauthorized


def test_the_host_is_judged_first_then_the_origin_then_the_token() -> None:
    wrong = head("evil.example", origin="http://evil.example", authorization="")
    assert refused(wrong) is Misdirected
    assert refused(head(origin="http://evil.example", authorization="")) is Forbidden


def test_the_unix_socket_asks_for_nothing() -> None:
    assert refused(head("evil.example", origin="null", authorization=""), None) is None


def test_this_host_s_own_name_is_among_the_names() -> None:
    names = access("t", ["given"], lambda token: None).hosts
    assert names == {"localhost", socket.gethostname().lower(), "given"}


# Over connections


class Exposed(NamedTuple):
    server: Server
    port: int
    token: str

    def ask(
        self, method: str = "GET", target: str = "/version", **fields: str
    ) -> tuple[int, bytes]:
        """Status and body; with the token unless `authorization` is given ("": none)."""
        fields = {"authorization": f"Bearer {self.token}", **fields}
        fields = {name: value for name, value in fields.items() if value}
        with Wire(self.port) as wire:
            answer = wire.ask(method, target, b"x" if method == "POST" else None, **fields)
            return answer.status, answer.body


def port_of(server: Server) -> int:
    """The one that the system has chosen, as the server's first frame tells it."""
    with Wire(server.directory) as wire:
        (address,) = json.loads(wire.ask("GET", "/last/xs.start").body)["meta"]["expose"]
    return int(address.rpartition(":")[2])


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exposed]:
    folder = str(tmp_path_factory.mktemp("exposed") / "store")
    server = start_server(folder, "--expose", ":0", "--host", "My.Box.")
    try:
        yield Exposed(server, port_of(server), Path(folder, "token").read_text().strip())
    finally:
        server.stop()


def test_a_tcp_address_asks_for_the_owner_s_token(exposed: Exposed) -> None:
    assert exposed.ask()[0] == 200
    with Wire(exposed.port) as wire:
        answer = wire.ask("GET", "/version")
        assert answer.status == 401
        assert answer.fields["www-authenticate"] == 'Bearer realm="xs"'
        assert b"Authorization: Bearer TOKEN" in answer.body
        assert b"XS_TOKEN=$(cat DIR/token), or TOKEN@HOST:PORT" in answer.body
        assert exposed.token.encode() not in answer.body
        # The connection goes on: the client may know the token after all.
        assert wire.ask("GET", "/version", authorization=f"Bearer {exposed.token}").status == 200


def test_the_token_s_file_is_one_line_for_the_owner_alone(exposed: Exposed) -> None:
    path = os.path.join(exposed.server.directory, "token")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    text = Path(path).read_text()
    assert text.endswith("\n") and text.count("\n") == 1 and len(text) > 40


def test_without_the_token_nothing_is_done(exposed: Exposed) -> None:
    for method, target in [
        ("POST", "/append/t"),
        ("POST", "/cas"),
        ("POST", "/import"),
        ("POST", "/gc?age=0s"),
        ("GET", "/?follow"),
        ("DELETE", "/03d000000000000000000000a"),
        ("HEAD", "/"),
        ("OPTIONS", "/"),
        ("FROB", "/no/where"),
    ]:
        assert exposed.ask(method, target, authorization="")[0] == 401
        assert exposed.ask(method, target, authorization="Bearer x" + exposed.token)[0] == 401
    with Wire(exposed.server.directory) as wire:
        assert wire.ask("GET", "/last/t").status == 404


def test_names_are_served_and_foreign_ones_are_not(exposed: Exposed) -> None:
    port = exposed.port
    for host in ("localhost", f"127.0.0.1:{port}", "my.box", socket.gethostname(), "[::1]"):
        assert exposed.ask(host=host)[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", "box", "my.box.evil.example"):
        status, body = exposed.ask(host=host)
        assert status == 421
        assert b"--host" in body


def test_a_page_that_rebinds_its_name_to_this_machine_is_refused(exposed: Exposed) -> None:
    rebound = f"rebind.example:{exposed.port}"
    for authorization in ("", f"Bearer {exposed.token}"):
        status, _ = exposed.ask(
            host=rebound, origin=f"http://{rebound}", authorization=authorization
        )
        assert status == 421


def test_a_page_that_posts_across_sites_is_refused(exposed: Exposed) -> None:
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{exposed.port + 1}"):
        status, _ = exposed.ask("POST", "/append/csrf", origin=origin, host="127.0.0.1")
        assert status == 403
    own = f"127.0.0.1:{exposed.port}"
    assert exposed.ask("POST", "/append/own", origin=f"http://{own}", host=own)[0] == 200
    with Wire(exposed.server.directory) as wire:
        assert wire.ask("GET", "/last/csrf").status == 404


def test_a_head_before_its_token_gets_little_room(exposed: Exposed) -> None:
    large = "m" * 300_000
    with Wire(exposed.port) as wire:
        try:
            wire.send(request("POST", "/append/t", b"", xs_meta=f'"{large}"'))
        except OSError:
            pass  # it has refused already
        assert wire.answer().status == 431
    fields = {"authorization": f"Bearer {exposed.token}", "xs_meta": f'"{large}"'}
    assert exposed.ask("POST", "/append/t", **fields)[0] == 200


def test_who_is_refused_while_sending_can_read_why(exposed: Exposed) -> None:
    with Wire(exposed.port) as wire:
        wire.send(request("POST", "/cas", content_length="20000000"))
        try:
            for _ in range(20):
                wire.send(b"x" * 1_000_000)
        except OSError:
            pass  # it has had enough
        assert wire.answer().status == 401


def test_the_command_takes_the_token_from_the_address_or_the_environment(
    exposed: Exposed, run_xs: RunXs
) -> None:
    address = f"http://127.0.0.1:{exposed.port}"
    refused = run_xs(["append", address, "cli"], stdin="x")
    assert refused.returncode == 1
    assert refused.stderr.count(b"\n") == 1 and b"needs a token" in refused.stderr
    assert run_xs(["append", f":{exposed.port}", "cli"], env={"XS_TOKEN": "wrong"}).returncode == 1
    with_token = address.replace("://", f"://{exposed.token}@")
    made = run_xs(["append", with_token, "cli"], stdin="x")
    assert made.returncode == 0, made.stderr
    read = run_xs(["last", f":{exposed.port}", "cli"], env={"XS_TOKEN": exposed.token})
    assert read.stdout == made.stdout
    # What the address says counts before the environment.
    assert run_xs(["last", with_token], env={"XS_TOKEN": "wrong"}).returncode == 0


def test_a_token_that_is_there_is_kept(store_dir: str) -> None:
    os.makedirs(store_dir, 0o700)
    Path(store_dir, "token").write_text("mine\n")
    for _ in range(2):
        server = start_server(store_dir, "--expose", "127.0.0.1:0")
        try:
            assert Exposed(server, port_of(server), "mine").ask()[0] == 200
        finally:
            server.stop()
    assert Path(store_dir, "token").read_text() == "mine\n"


def test_without_a_tcp_address_there_is_no_token(server: Server) -> None:
    assert not os.path.exists(os.path.join(server.directory, "token"))
    with Wire(server.directory) as wire:
        assert wire.ask("GET", "/version", host="evil.example", origin="null").status == 200


# Tokens of others


class Granted(NamedTuple):
    """A server, and tokens that were added while it ran: by name, with what they are good for."""

    exposed: Exposed
    tokens: dict[str, str]

    def ask(
        self, name: str, method: str, target: str, body: Optional[bytes] = None, **fields: str
    ) -> tuple[int, bytes]:
        with Wire(self.exposed.port) as wire:
            fields = {"authorization": f"Bearer {self.tokens[name]}", **fields}
            answer = wire.ask(method, target, body, **fields)
            return answer.status, answer.body


GRANTS = {
    "reader": ["--read"],
    "writer": ["--append", "notes.*", "--append", "log"],
    "both": ["--read", "--append", "*"],
    "admin": ["--admin"],
}


@pytest.fixture(scope="module")
def granted(exposed: Exposed, tmp_path_factory: pytest.TempPathFactory) -> Granted:
    folder = exposed.server.directory
    tokens = {}
    for name, words in GRANTS.items():
        done = run_command("token", "add", folder, name, *words)
        assert (done.returncode, done.stderr) == (0, b"")
        tokens[name] = done.stdout.decode().strip()
    return Granted(exposed, tokens)


def run_command(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*XS, *words], capture_output=True, env=environment(), timeout=60)


READS = ["/", "/last", "/first/notes.a", "/stream/notes.a", "/ps", "/stores", "/head/notes.a"]
ADMIN = [
    ("POST", "/eval"), ("POST", "/gc"), ("POST", "/check"), ("POST", "/import"),
    ("DELETE", "/03gw3h0000000000000000000"), ("POST", "/pipe/03gw3h0000000000000000000"),
]  # fmt: skip
ORDERS = ["notes.spawn", "notes.a.register", "notes.a.unregister", "notes.a.terminate",
          "notes.a.send", "xs.store.add", "xs.store.remove"]  # fmt: skip


def test_who_may_read_reads_and_does_nothing_else(granted: Granted) -> None:
    assert granted.ask("both", "POST", "/append/notes.a", b"x")[0] == 200
    for target in READS:
        assert granted.ask("reader", "GET", target)[0] == 200, target
    for method, target in [("POST", "/append/notes.a"), ("POST", "/cas"), *ADMIN]:
        status, said = granted.ask("reader", method, target, b"x")
        assert (status, said.count(b"\n")) == (403, 1), target
        assert b"this token may not" in said


def test_who_may_append_on_some_topics_does_that_alone(granted: Granted) -> None:
    for topic in ("notes.a", "notes.b.c", "log"):
        for target in (f"/append/{topic}", f"/stream/{topic}", f"/{topic}"):
            assert granted.ask("writer", "POST", target, b"x")[0] == 200, target
    for topic in ("notes", "other", "log.more", "xnotes.a"):
        status, said = granted.ask("writer", "POST", f"/append/{topic}", b"x")
        assert (status, said.count(topic.encode())) == (403, 1)
    assert granted.ask("writer", "POST", "/append/other?chunked", b"x")[0] == 403
    for target in READS:
        assert granted.ask("writer", "GET", target)[0] == 403, target
    for method, target in ADMIN:
        assert granted.ask("writer", method, target, b"x")[0] == 403, target
    assert granted.ask("writer", "POST", "/cas", b"x")[0] == 200
    assert granted.ask("writer", "GET", "/version")[0] == 200


@pytest.mark.parametrize("topic", ORDERS)
def test_only_an_admin_appends_what_runs_programs(granted: Granted, topic: str) -> None:
    status, said = granted.ask("both", "POST", f"/append/{topic}", b"")
    assert (status, b"by which programs are run" in said) == (403, True)
    line = json.dumps({"topic": topic}).encode() + b"\n"
    summary = granted.ask("both", "POST", "/append", line, **NDJSON)[1]
    assert json.loads(summary)["appended"] == 0
    assert b"by which programs are run" in summary


def test_the_lines_of_a_batch_are_judged_one_by_one(granted: Granted) -> None:
    lines = [{"topic": "notes.x"}, {"topic": "other"}, {"topic": "log", "content": "c"}]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    summary = json.loads(granted.ask("writer", "POST", "/append", body, **NDJSON)[1])
    assert (summary["appended"], [each["line"] for each in summary["errors"]]) == (2, [2])
    each = granted.ask("writer", "POST", "/append?each", body, **NDJSON)[1].splitlines()
    assert [b'"error"' in line for line in each] == [False, True, False]
    status, said = granted.ask("writer", "POST", "/append?atomic", body, **NDJSON)
    assert (status, said[:7]) == (403, b"line 2:")


def test_only_an_admin_appends_what_removes_other_frames(granted: Granted) -> None:
    kept = [granted.ask("admin", "POST", "/append/notes.kept", b"x")[1] for _ in range(3)]
    line = b'{"topic":"notes.kept","content":"y","ttl":"last:1"}\n'
    for target in ("/append/notes.kept?ttl=last:1", "/append/notes.kept?chunked&ttl=last:1"):
        status, said = granted.ask("writer", "POST", target, b"y")
        assert (status, said.count(b"removes frames")) == (403, 1), target
    status, said = granted.ask("writer", "POST", "/append?atomic", line, **NDJSON)
    assert (status, b"removes frames" in said) == (403, True)
    for target in ("/append", "/append?each"):
        assert b"removes frames" in granted.ask("writer", "POST", target, line, **NDJSON)[1]
    assert granted.ask("reader", "GET", "/stream/notes.kept")[1] == b"".join(kept)
    assert granted.ask("admin", "POST", "/append/notes.kept?ttl=last:1", b"z")[0] == 200
    assert len(granted.ask("reader", "GET", "/stream/notes.kept")[1].splitlines()) == 1


def test_an_admin_does_everything(granted: Granted) -> None:
    made = json.loads(granted.ask("admin", "POST", "/append/notes.gone", b"x")[1])
    assert granted.ask("admin", "DELETE", f"/{made['id']}")[0] == 204
    assert granted.ask("admin", "POST", "/append/nobody.unregister", b"")[0] == 200
    assert granted.ask("admin", "POST", "/check")[0] == 200


def test_another_store_is_for_the_owner_and_admins(granted: Granted) -> None:
    assert granted.ask("both", "GET", "/store/other/last")[0] == 403
    assert granted.ask("admin", "GET", "/store/other/last")[0] == 404


def test_tokens_are_listed_without_themselves_and_kept_as_hashes(granted: Granted) -> None:
    folder = granted.exposed.server.directory
    listed = run_command("token", "list", folder).stdout
    assert [json.loads(line) for line in listed.splitlines()] == [
        {"name": "reader", "admin": False, "read": True, "append": None},
        {"name": "writer", "admin": False, "read": False, "append": "notes.*,log"},
        {"name": "both", "admin": False, "read": True, "append": "*"},
        {"name": "admin", "admin": True, "read": False, "append": None},
    ]
    path = Path(folder, "tokens")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for token in granted.tokens.values():
        assert token not in path.read_text() and len(token) >= 43


def test_a_token_that_is_removed_is_good_for_nothing_at_once(granted: Granted) -> None:
    folder = granted.exposed.server.directory
    token = run_command("token", "add", folder, "short-lived", "--read").stdout.decode().strip()
    with Wire(granted.exposed.port) as wire:
        for target in ("/version", "/last/xs.start", "/last/*"):
            assert wire.ask("GET", target, authorization=f"Bearer {token}").status == 200
        assert run_command("token", "remove", folder, "short-lived").returncode == 0
        assert wire.ask("GET", "/last/xs.start", authorization=f"Bearer {token}").status == 401


def add_token(folder: str, name: str, *words: str) -> str:
    done = run_command("token", "add", folder, name, *words)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode().strip()


def remove_token(folder: str, name: str) -> None:
    assert run_command("token", "remove", folder, name).returncode == 0


def begin_to_follow(wire: Wire, token: str, target: str = "/?follow&new", **fields: str) -> None:
    wire.send(request("GET", target, authorization=f"Bearer {token}", **fields))
    assert wire.head()[0] == 200


def breaks_off(wire: Wire) -> bool:
    """Whether the connection ends within a body; False if that comes to its end."""
    try:
        while wire.block():
            pass
    except (EOFError, ConnectionResetError):
        return True
    return False


def test_meta_of_any_size_goes_over_tcp(exposed: Exposed) -> None:
    with xs.open(f"{exposed.token}@127.0.0.1:{exposed.port}") as client:
        assert client.append("t", b"x", meta="m" * 900_000).meta == "m" * 900_000


def test_who_follows_with_a_token_that_is_removed_is_broken_off_and_nobody_else(
    exposed: Exposed,
) -> None:
    folder, port = exposed.server.directory, exposed.port
    tokens = {name: add_token(folder, name, "--read") for name in ("gone", "left")}
    with contextlib.ExitStack() as opened:
        gone, sends_no_more, events, left, owner, local = (
            opened.enter_context(Wire(where)) for where in (*[port] * 5, folder)
        )
        begin_to_follow(owner, exposed.token)
        begin_to_follow(left, tokens["left"])
        begin_to_follow(gone, tokens["gone"])
        begin_to_follow(sends_no_more, tokens["gone"], "/last?follow")
        sends_no_more.half_close()
        begin_to_follow(events, tokens["gone"], accept="text/event-stream")
        local.send(request("GET", "/?follow&new"))
        local.head()
        made = exposed.ask("POST", "/append/t")[1]
        for wire in (gone, left, owner, local):
            assert wire.block() == made
        # Another token comes: the file is a new one, and what it says of these is the same.
        add_token(folder, "other", "--read")
        remove_token(folder, "gone")
        for wire in (gone, sends_no_more, events):
            assert breaks_off(wire)
        made = exposed.ask("POST", "/append/t")[1]
        for wire in (left, owner, local):
            assert wire.block() == made
        remove_token(folder, "left")
        assert breaks_off(left)
        made = exposed.ask("POST", "/append/t")[1]
        assert (owner.block(), local.block()) == (made, made)
    remove_token(folder, "other")


def test_who_follows_with_a_token_that_may_read_no_more_is_broken_off(exposed: Exposed) -> None:
    path = Path(exposed.server.directory, "tokens")
    token = add_token(exposed.server.directory, "narrowed", "--read", "--append", "*")
    with Wire(exposed.port) as wire:
        begin_to_follow(wire, token)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        (mine,) = [line for line in lines if line["name"] == "narrowed"]
        mine["read"] = False
        Path(f"{path}.mine").write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(f"{path}.mine", path)
        assert breaks_off(wire)
    assert exposed.ask("POST", "/append/t", authorization=f"Bearer {token}")[0] == 200
    remove_token(exposed.server.directory, "narrowed")


def test_who_has_not_caught_up_is_broken_off_too(exposed: Exposed) -> None:
    folder, port = exposed.server.directory, exposed.port
    for _ in range(40):  # more than lies in the buffers of a client that does not read
        with Wire(folder) as wire:
            assert wire.ask("POST", "/append/large", b"x" * 1_000_000).status == 200
    token = add_token(folder, "slow", "--read")
    with Wire(port) as slow, Wire(port) as parked:
        begin_to_follow(slow, token, "/?follow&with-content&topic=large")
        begin_to_follow(parked, token)
        remove_token(folder, "slow")
        assert breaks_off(parked)
        read = b""
        with pytest.raises((EOFError, ConnectionResetError)):
            while b"xs.threshold" not in read:
                read = slow.block()


def test_who_follows_another_store_by_a_token_of_the_root_s_is_broken_off(
    exposed: Exposed, tmp_path: Path
) -> None:
    folder = exposed.server.directory
    meta = json.dumps({"path": str(tmp_path / "further"), "name": "further"})
    assert exposed.ask("POST", "/append/xs.store.add", xs_meta=meta)[0] == 200
    until(lambda: exposed.ask("GET", "/store/further/version")[0] == 200, "further")
    token = add_token(folder, "visitor", "--admin")
    with Wire(exposed.port) as visitor, Wire(exposed.port) as owner:
        begin_to_follow(visitor, token, "/store/further/?follow&new")
        begin_to_follow(owner, exposed.token, "/store/further/?follow&new")
        made = exposed.ask("POST", "/store/further/append/t")[1]
        assert (visitor.block(), owner.block()) == (made, made)
        remove_token(folder, "visitor")
        assert breaks_off(visitor)
        made = exposed.ask("POST", "/store/further/append/t")[1]
        assert owner.block() == made


@pytest.mark.parametrize("way", ["/eval", "/pipe"])
def test_a_script_that_is_run_for_a_token_that_is_removed_is_ended_and_not_answered(
    exposed: Exposed, tmp_path: Path, way: str
) -> None:
    folder = exposed.server.directory
    status, made = exposed.ask("POST", "/append/input")
    assert status == 200
    target = way if way == "/eval" else f"{way}/{json.loads(made)['id']}"
    script = (
        f"#!/bin/sh\necho $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 100\n"
    )
    token = add_token(folder, "runs", "--admin")
    with Wire(exposed.port) as wire:
        wire.send(request("POST", target, script.encode(), authorization=f"Bearer {token}"))
        until((tmp_path / "pid").exists, "the script has begun")
        pid = int((tmp_path / "pid").read_text())
        remove_token(folder, "runs")
        assert wire.is_ended()
        until(lambda: is_gone(pid), "the script has ended")


@pytest.mark.parametrize(
    ("target", "status"), [("/append/body?chunked", 401), ("/append/body", 401), ("/append", 400)]
)
def test_a_token_that_is_removed_while_a_body_comes_appends_no_more(
    exposed: Exposed, target: str, status: int
) -> None:
    folder = exposed.server.directory
    before = exposed.ask("GET", "/?topic=body")[1]
    token = add_token(folder, "sender", "--append", "*")
    first, second = (b'{"topic":"body","content":"%d"}\n' % n for n in (1, 2))
    fields = {"authorization": f"Bearer {token}", "transfer_encoding": "chunked", **NDJSON}
    with Wire(exposed.port) as wire:
        wire.send(request("POST", target, **fields) + b"%x\r\n%b\r\n" % (len(first), first))
        if target != "/append/body":  # that is stored when all of it has come
            until(lambda: exposed.ask("GET", "/?topic=body")[1] != before, "line 1")
        remove_token(folder, "sender")
        wire.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(second), second))
        answer = wire.answer()
        assert answer.status == status, answer
        assert wire.is_ended()
    kept = exposed.ask("GET", "/?topic=body&with-content")[1]
    contents = [json.loads(line).get("content") for line in kept.splitlines()]
    contents = contents[before.count(b"\n") :]
    if target == "/append/body":
        assert contents == []
    elif target == "/append":
        assert contents == ["1"] and b"1 whole lines of it are kept" in answer.body
    else:
        assert contents[0] == first.decode() and second.decode() not in contents
        assert b"has what came before" in answer.body


def test_a_batch_with_an_answer_for_each_line_breaks_off_with_its_token(exposed: Exposed) -> None:
    folder = exposed.server.directory
    token = add_token(folder, "batch", "--append", "*")
    line = b'{"topic":"each"}\n'
    fields = {"authorization": f"Bearer {token}", "transfer_encoding": "chunked", **NDJSON}
    with Wire(exposed.port) as wire:
        wire.send(request("POST", "/append?each", **fields) + b"%x\r\n%b\r\n" % (len(line), line))
        assert wire.head()[0] == 200
        assert b'"each"' in wire.block()
        remove_token(folder, "batch")
        assert breaks_off(wire)
    assert exposed.ask("GET", "/?topic=each")[1].count(b"\n") == 1


def test_the_command_that_follows_with_a_token_that_is_removed_says_so(exposed: Exposed) -> None:
    folder = exposed.server.directory
    token = add_token(folder, "command", "--read")
    process = subprocess.Popen(
        [*XS, "cat", "--follow", f":{exposed.port}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(XS_TOKEN=token),
    )
    try:
        assert process.stdout is not None
        assert any(b"xs.threshold" in line for line in iter(process.stdout.readline, b""))
        remove_token(folder, "command")
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err.count(b"\n")) == (1, b"", 1), (out, err)


@pytest.mark.parametrize(
    "damage",
    [
        {"admin": "false"},
        {"read": 1},
        {"append": 7},
        {"append": "A!"},
        {"hash": 5},
        {"hash": "\ud800"},
        {"name": None},
        {"more": True},
        "[" * 100_000,
        None,
    ],
)
def test_tokens_that_are_damaged_let_nobody_in_but_the_owner(
    store_dir: str, damage: Union[dict[str, object], str, None]
) -> None:
    server = start_server(store_dir, "--expose", ":0")
    try:
        exposed = Exposed(server, port_of(server), Path(store_dir, "token").read_text().strip())
        token = run_command("token", "add", store_dir, "x", "--read").stdout.decode().strip()
        assert exposed.ask(authorization=f"Bearer {token}")[0] == 200
        path = Path(store_dir, "tokens")
        whole = path.read_text()
        if isinstance(damage, dict):
            damage = json.dumps({**json.loads(whole), **damage})
        path.write_text(whole[:-5] if damage is None else damage)
        with Wire(exposed.port) as wire:
            for said in (token, "x"):
                assert wire.ask("GET", "/version", authorization=f"Bearer {said}").status == 401
        assert exposed.ask()[0] == 200
        done = run_command("token", "list", store_dir)
    finally:
        server.stop()
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"the tokens of the store are damaged" in done.stderr


def test_tokens_that_can_not_be_read_for_a_moment_are_good_again_after_it(tmp_path: Path) -> None:
    token = tokens.add(str(tmp_path), "x", read=True)
    find = tokens.Finder(str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))  # nothing can be opened
    try:
        assert find(token) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert find(token) == Rights(read=True)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["add", "STORE", "a b", "--read"], 1, "not a token's name"),
        (["add", "STORE", "x"], 1, "what may x do?"),
        (["add", "STORE", "x", "--append", "A!"], 1, "not a topic pattern"),
        (["add", "STORE", "reader", "--read"], 1, "there is a token reader already"),
        (["add", "STORE"], 2, "NAME is missing"),
        (["remove", "STORE", "nobody"], 1, "no token 'nobody'"),
        (["remove", "STORE", "reader", "--read"], 2, "takes no options"),
        (["list", "STORE", "reader"], 2, "a store's directory alone"),
        (["rename", "STORE", "x"], 2, "add, list or remove"),
        (["list", "STORE/nowhere"], 1, "no store at"),
        (["STORE", "list"], 2, "token takes add, list or remove, not '"),
        (["STORE/nowhere", "add", "x"], 2, "token takes add, list or remove, not '"),
        (["add", "STORE/nowhere"], 2, "NAME is missing"),
        (["list", "STORE/nowhere", "x"], 2, "a store's directory alone"),
    ],
)
def test_what_is_wrong_with_a_token_is_said_in_a_line(
    granted: Granted, words: list[str], status: int, says: str
) -> None:
    folder = granted.exposed.server.directory
    done = run_command("token", *[word.replace("STORE", folder) for word in words])
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (status, b"", 1)
    assert says in done.stderr.decode()


# Addresses


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:1", "box.example:80"])
def test_what_others_could_read_along_is_not_exposed_unless_told(
    store_dir: str, address: str
) -> None:
    done = run_command("serve", store_dir, "--expose", address)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"--insecure" in done.stderr
    assert not os.path.exists(store_dir)


def test_told_so_it_is_exposed_and_asks_for_the_token(store_dir: str) -> None:
    server = start_server(store_dir, "--expose", "0.0.0.0:0", "--insecure")
    try:
        with Wire(port_of(server)) as wire:
            assert wire.ask("GET", "/version").status == 401
    finally:
        server.stop()


def test_another_user_who_can_reach_the_socket_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        return  # only root can be somebody else
    folder = tempfile.mkdtemp(dir="/tmp")  # every folder of pytest's is the user's alone
    server = start_server(os.path.join(folder, "store"))
    try:
        os.chmod(folder, 0o755)
        os.chmod(server.directory, 0o755)
        path = os.path.join(server.directory, "sock")
        os.chmod(path, 0o666)
        script = (
            "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
            "s.connect(sys.argv[1]); s.sendall(b'GET /version HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); "
            "print(s.recv(12).decode())"
        )
        done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, timeout=60)
        assert done.stdout == b"HTTP/1.1 403\n", done
    finally:
        server.stop()
        shutil.rmtree(folder)
