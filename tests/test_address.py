"""What an ADDR means, for each form of it and for each way to get it wrong."""

from __future__ import annotations

import doctest
import os
import socket
import threading

import pytest

from xs import address, errors
from xs.address import open_transport, parse_host, split


def echo_head(peer):
    while head := peer.head():
        peer.answer(head)


# Which argument is the address


@pytest.mark.parametrize("first", ["./store", "/s", "a/b", ":80", "host:80", ".", ".."])
@pytest.mark.parametrize("environ", [{}, {"XS_ADDR": "/other"}])
def test_the_first_argument_is_the_address_if_it_looks_like_one(first, environ):
    assert split([first, "notes"], environ) == (first, ["notes"])


@pytest.mark.parametrize("first", ["store", "notes", "03gw3h0000000000000000000", "...", "~"])
def test_else_xs_addr_is_the_address_when_it_is_set(first):
    assert split([first, "x"], {"XS_ADDR": "/other"}) == ("/other", [first, "x"])
    assert split([], {"XS_ADDR": "/other"}) == ("/other", [])


@pytest.mark.parametrize("environ", [{}, {"XS_ADDR": ""}])
def test_else_the_first_argument_is_a_path(environ):
    assert split(["store", "notes"], environ) == ("store", ["notes"])


def test_with_xs_addr_an_argument_that_is_needed_is_not_taken_for_the_address():
    environ = {"XS_ADDR": "/other"}
    assert split(["sha256-a/b="], environ, needed=1) == ("/other", ["sha256-a/b="])
    assert split(["./store", "sha256-a/b="], environ, needed=1) == ("./store", ["sha256-a/b="])
    assert split(["sha256-a/b="], {}, needed=1) == ("sha256-a/b=", [])


def test_no_address_at_all_is_wrong_usage():
    with pytest.raises(errors.Usage, match="ADDR is missing"):
        split([], {})


# Hosts


@pytest.mark.parametrize(
    ("addr", "connect", "token"),
    [
        (":8080", ("tcp", "localhost", 8080), None),
        ("example.org:1", ("tcp", "example.org", 1), None),
        ("127.0.0.1:65535", ("tcp", "127.0.0.1", 65535), None),
        ("[::1]:80", ("tcp", "::1", 80), None),
        ("t0k@host:80", ("tcp", "host", 80), "t0k"),
        ("http://host:80", ("tcp", "host", 80), None),
        ("http://host:80/", ("tcp", "host", 80), None),
        ("http://host", ("tcp", "host", 80), None),
        ("http://:8080", ("tcp", "localhost", 8080), None),
        ("https://host", ("tls", "host", 443), None),
        ("https://[::1]", ("tls", "::1", 443), None),
        ("https://a@b@host:1", ("tls", "host", 1), "a@b"),
    ],
)
def test_a_host_is_understood(addr, connect, token):
    assert parse_host(addr) == (connect, token)


@pytest.mark.parametrize(
    "addr",
    [
        ":",
        "host:",
        "host:abc",
        ":0",
        ":65536",
        ":99999999999999999999",
        ":８０",
        ":-1",
        ":+1",
        "a:b:80",
        "::1:80",
        "[::1",
        "[]:80",
        "[::1]x:80",
        "http://:",
        "http://host:80/path",
        "http://host:80?x",
        "@host:80",
        "ho st:80",
        "host\n:80",
        "to\nken@host:80",
    ],
)
def test_what_is_no_host_and_port_is_refused_in_one_line(addr):
    with pytest.raises(errors.Invalid) as caught:
        open_transport(addr)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("addr", ["https://", "HTTPS:///", "https://t0k@"])
def test_a_scheme_alone_is_told_by_its_name(addr):
    with pytest.raises(errors.Invalid, match=r"^https:// lacks its host: use https://HOST or "):
        open_transport(addr)


def test_no_error_repeats_the_token():
    for addr in ("s3cret@host:x", "http://s3cret@host:1/path", "http://s3cret@"):
        with pytest.raises(errors.Invalid) as caught:
            open_transport(addr)
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["last", "ftp://s3cret@x"], "ftp://x: xs speaks http:// and https://"),
        (["last", "s3cret@localhost:18080/"], "no store at: localhost:18080/: an address with a"),
        (["last", "http:/s3cret@host:1"], "no store at: host:1: an address with a token ends"),
        (["last", "s3cret@"], "no store at: @: an address with a token ends"),
        (["serve", "s", "--expose", "s3cret@:1"], "can't expose ':1' with a token"),
        (["serve", "s", "--expose", "http://s3cret@:x"], "can't expose 'http://:x': use HOST:PORT"),
        (
            ["service", "install", "./s", "--print", "--expose", "s3cret@:1"],
            "can't expose ':1' with",
        ),
        (["serve", "s", "--http", "https://s3cret@:1"], "can't answer the web at 'https://:1'"),
        (["serve", "s", "--http", "s3cret@x"], "can't answer the web at 'x': not an address"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_command_s_error_repeats_a_token(run_xs, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    done = run_xs(words)
    text = done.stderr.decode()
    assert done.returncode != 0 and says in text and text.count("\n") == 1, text
    assert "s3cret" not in text


def test_a_token_that_can_not_be_sent_is_told(scripted, monkeypatch):
    monkeypatch.setenv("XS_TOKEN", os.fsdecode(b"\xff"))
    transport = open_transport(f":{scripted(echo_head, tcp=True).port}", timeout=20)
    with pytest.raises(errors.Invalid, match="a token, or the name of a host, is plain ASCII"):
        transport.request("GET", "/")


def test_a_path_with_an_at_sign_is_named_as_it_is(run_xs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me@home").mkdir()
    for path in ("./you@home", "me@home", f"{tmp_path}/you@home"):
        assert f"no store at: {path}" in run_xs(["last", path]).stderr.decode()


@pytest.mark.parametrize("form", ["127.0.0.1:{}", ":{}", "http://localhost:{}", "localhost:{}/.."])
def test_a_server_on_tcp_is_reached_with_a_token_of_the_environment(scripted, monkeypatch, form):
    server = scripted(echo_head, tcp=True)
    monkeypatch.setenv("XS_TOKEN", "fromenv")
    if form.endswith("/.."):
        with pytest.raises(errors.NoStore):  # with a slash it is a path
            open_transport(form.format(server.port))
        return
    transport = open_transport(form.format(server.port), timeout=20)
    assert b"authorization: Bearer fromenv\r\n" in transport.request("GET", "/").read()
    transport.close()


def test_a_token_in_the_address_comes_before_the_one_of_the_environment(scripted, monkeypatch):
    server = scripted(echo_head, tcp=True)
    monkeypatch.setenv("XS_TOKEN", "fromenv")
    transport = open_transport(f"mine@127.0.0.1:{server.port}", timeout=20)
    assert b"authorization: Bearer mine\r\n" in transport.request("GET", "/").read()


def test_where_nobody_listens_that_is_said():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with pytest.raises(errors.Unavailable, match=f"nobody answers at localhost:{port}"):
        open_transport(f":{port}")


def test_a_name_that_is_no_hosts_is_said():
    with pytest.raises(errors.Unavailable, match=r"can't connect to no-such-host\.invalid:1"):
        open_transport("no-such-host.invalid:1")
    with pytest.raises(errors.Unavailable):
        open_transport("a" * 300 + ":1")


# Paths


def test_a_sockets_path_reaches_its_server_and_no_token_goes_there(scripted, monkeypatch):
    monkeypatch.setenv("XS_TOKEN", "fromenv")
    server = scripted(echo_head)
    got = open_transport(server.path, timeout=20).request("GET", "/").read()
    assert b"authorization" not in got.lower()


def test_a_directory_with_a_server_on_its_socket_is_reached_through_it(tmp_path):
    answered = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        transport = open_transport(str(tmp_path), timeout=20)
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"")
            answered.set()
        transport.close()
    assert answered.is_set()


def test_a_socket_that_no_server_listens_on_is_said(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
    with pytest.raises(errors.Unavailable, match="no server listens on"):
        open_transport(str(tmp_path / "sock"))


@pytest.mark.parametrize("create", [False, True])
def test_a_socket_that_a_store_s_server_has_taken_with_it_is_said(tmp_path, create):
    (tmp_path / "xs.db").touch()
    with pytest.raises(errors.Unavailable, match="no server listens on"):
        open_transport(str(tmp_path / "sock"), create=create)


@pytest.mark.parametrize("create", [False, True])
def test_a_socket_that_is_not_there_is_no_store(tmp_path, create):
    with pytest.raises(errors.NoStore, match="no store at: "):
        open_transport(str(tmp_path / "sock"), create=create)


def test_a_directory_that_is_no_store_is_said_with_how_to_make_one(tmp_path):
    for path in (str(tmp_path / "none"), str(tmp_path), str(tmp_path / "none" / "none")):
        with pytest.raises(errors.NoStore) as caught:
            open_transport(path)
        sentence = str(caught.value)
        assert sentence.startswith(f"no store at: {path}")
        assert f"xs serve {path}" in sentence and f"xs append {path}" in sentence
        assert not os.path.exists(os.path.join(path, "xs.db"))


def test_a_directory_with_other_files_does_not_become_a_store(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(errors.NoStore, match="other files"):
        open_transport(str(tmp_path), create=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_directory_of_other_things_is_no_place_for_a_store_but_below_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(errors.NoStore, match=f"xs serve {tmp_path}/store"):
        open_transport(str(tmp_path))


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("x")
    for create in (False, True):
        with pytest.raises(errors.NoStore, match="a store is a directory"):
            open_transport(str(tmp_path / "file"), create=create)


def test_a_directory_that_may_not_be_read_is_said(tmp_path):
    (tmp_path / "d").mkdir(mode=0)
    user = os.geteuid()
    if user == 0:  # root may read everything: be somebody else meanwhile
        os.seteuid(65534)
    try:
        with pytest.raises(errors.XsError, match=r"[Pp]ermission denied"):
            open_transport(str(tmp_path / "d"))
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("addr", ["~", "~/store", "~user/store"])
def test_a_tilde_that_the_shell_left_is_explained(addr):
    with pytest.raises(errors.Invalid, match="literal ~"):
        open_transport(addr)


def test_an_empty_address_and_one_with_a_nul_are_refused():
    for addr in ("", "a/\0b"):
        with pytest.raises(errors.Invalid):
            open_transport(addr)


def test_a_directory_without_a_server_is_opened_on_its_files(store_dir):
    transport = open_transport(store_dir, create=True)
    assert transport.request("POST", "/append/t", (), b"x").status == 200
    transport.close()
    transport = open_transport(store_dir)
    assert b'"topic":"t"' in transport.request("GET", "/").read()
    transport.close()


def test_a_store_is_made_by_the_first_append_and_by_nothing_before_it(store_dir):
    transport = open_transport(store_dir, create=True)
    for method, target in (("GET", "/"), ("DELETE", "/03gw3h0000000000000000000")):
        with pytest.raises(errors.NoStore):
            transport.request(method, target)
    assert not os.path.exists(store_dir)
    assert transport.request("POST", "/append/t", (), b"x").status == 200
    assert b'"topic":"t"' in transport.request("GET", "/").read()
    transport.close()


def test_a_store_that_another_has_made_meanwhile_is_read(store_dir):
    early = open_transport(store_dir, create=True)
    other = open_transport(store_dir, create=True)
    other.request("POST", "/append/t", (), b"x").read()
    assert b'"topic":"t"' in early.request("GET", "/").read()
    early.close()
    other.close()


def test_a_socket_left_by_a_server_that_died_is_passed_over(store_dir):
    transport = open_transport(store_dir, create=True)
    transport.request("POST", "/append/t", (), b"x").read()
    transport.close()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(store_dir, "sock"))
    transport = open_transport(store_dir)
    assert b'"topic":"t"' in transport.request("GET", "/").read()
    transport.close()


def test_a_directory_with_a_server_is_opened_through_it(server):
    from xs.transport import HttpTransport

    transport = open_transport(server.directory)
    assert isinstance(transport, HttpTransport)
    assert transport.request("GET", "/version").status == 200
    transport.close()


def test_a_directory_whose_server_has_ended_before_it_is_asked_is_its_files(server):
    transport = open_transport(server.directory)
    assert transport.request("POST", "/append/a", (), b"x").status == 200
    server.stop()
    for method, target in (("POST", "/append/a"), ("GET", "/last/a"), ("POST", "/append/b")):
        answer = transport.request(method, target, (), [b"y"] if method == "POST" else None)
        assert answer.status == 200 and answer.read()
    transport.close()
    again = open_transport(server.directory)
    assert again.request("GET", "/?topic=a,b").read().count(b"\n") == 3
    again.close()


def test_the_examples_in_the_documentation_are_true():
    assert doctest.testmod(address).failed == 0
