"""Sockets that are handed down: the test listens, starts servers, and outlives them."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, RunXs, answers
from manager import end, ended, launch, serving
from wire import Wire, request

from xs.activation import Sockets, expects_web, handed_down
from xs.errors import Usage


@pytest.fixture
def opened() -> Iterator[list[socket.socket]]:
    """Sockets to be closed at the end."""
    sockets: list[socket.socket] = []
    yield sockets
    for sock in sockets:
        sock.close()


def unix(path: str, opened: list[socket.socket], kind: int = socket.SOCK_STREAM) -> socket.socket:
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX, kind)
    opened.append(sock)
    sock.bind(path)
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def tcp(opened: list[socket.socket], host: str = "127.0.0.1") -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, 0), family=family)
    opened.append(sock)
    return sock


def is_called(sock: socket.socket) -> bool:
    """Whether somebody waits to be accepted."""
    return bool(select.select([sock], [], [], 0)[0])


# The store's socket


def test_a_handed_socket_in_the_store_s_place_is_the_store_s(
    store_dir: str, opened: list[socket.socket], run_xs: RunXs
) -> None:
    path = os.path.join(store_dir, "sock")
    sock = unix(path, opened)
    with Wire(path) as early:  # before there is a server
        early.send(request("GET", "/version"))
        process = launch(["serve", store_dir], [sock])
        assert serving(process) == f"serving {store_dir} at {path}\n"
        assert early.answer().status == 200
    made = run_xs(["append", store_dir, "t"])
    assert made.returncode == 0
    assert end(process) == (0, "")
    # It is still there, nobody is in it whom the next server would be started for …
    assert os.path.exists(path)
    assert not is_called(sock)
    # … and who comes now waits for the next one.
    with Wire(path) as late:
        late.send(request("GET", "/last/t"))
        assert is_called(sock)
        process = launch(["serve", store_dir], [sock])
        assert late.answer().body == made.stdout
    assert end(process) == (0, "")


def test_while_servers_come_and_go_nobody_is_refused(
    store_dir: str, opened: list[socket.socket]
) -> None:
    path = os.path.join(store_dir, "sock")
    sock = unix(path, opened)
    stop = threading.Event()
    answered = [0] * 3
    refused: list[BaseException] = []

    def ask(worker: int) -> None:
        while not stop.is_set():
            try:
                with Wire(path) as wire:
                    wire.send(request("GET", "/version", connection="close"))
                    data = wire.rest()
            except OSError as error:
                refused.append(error)
                return
            # One that was accepted by a server on its way out may have no answer; it knows that
            # it has none, and comes again.
            answered[worker] += data.startswith(b"HTTP/1.1 200")

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(len(answered))]
    for thread in threads:
        thread.start()
    for _ in range(4):
        process = launch(["serve", store_dir], [sock])
        serving(process)
        with Wire(path) as wire:
            assert wire.ask("POST", "/append/t").status == 200
        assert end(process) == (0, "")
    stop.set()
    last = launch(["serve", store_dir], [sock])  # for those who still wait
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert end(last) == (0, "")
    assert refused == []
    assert all(answered)


def test_one_in_another_place_is_served_as_well(
    store_dir: str, tmp_path: Path, opened: list[socket.socket]
) -> None:
    path = str(tmp_path / "elsewhere" / "xs.sock")
    process = launch(["serve", store_dir], [unix(path, opened)])
    serving(process)
    assert answers(path) and answers(os.path.join(store_dir, "sock"))
    assert end(process) == (0, "")
    assert os.path.exists(path)
    assert not os.path.exists(os.path.join(store_dir, "sock"))


def test_one_whose_file_is_gone_is_replaced(store_dir: str, opened: list[socket.socket]) -> None:
    path = os.path.join(store_dir, "sock")
    sock = unix(path, opened)
    os.unlink(path)
    process = launch(["serve", store_dir], [sock])
    serving(process)
    assert answers(path)
    status, err = end(process)
    assert (status, err) == (0, f"xs: nobody can call {path} any more: it was removed\n")
    assert not os.path.exists(path)


def test_one_that_everybody_can_call_is_warned_of(
    store_dir: str, opened: list[socket.socket]
) -> None:
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    path = os.path.join(folder, "sock")
    try:
        sock = unix(path, opened)
        os.chmod(path, 0o666)
        process = launch(["serve", store_dir], [sock])
        serving(process)
        assert end(process) == (
            0,
            f"xs: everybody on this machine can call {path}, and do anything: set "
            "SocketMode=0600\n",
        )
        os.chmod(path, 0o600)
        process = launch(["serve", store_dir], [sock])
        serving(process)
        assert end(process) == (0, "")
    finally:
        shutil.rmtree(folder)


# TCP, and the web


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_tcp_socket_is_an_exposed_address(
    store_dir: str, opened: list[socket.socket], host: str
) -> None:
    sock = tcp(opened, host)
    port = sock.getsockname()[1]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    process = launch(["serve", store_dir], [sock], names="api")
    assert serving(process) == f"serving {store_dir} at {store_dir}/sock, http://{address}\n"
    with Wire(store_dir) as wire:
        started = json.loads(wire.ask("GET", "/last/xs.start").body)
    assert started["meta"]["expose"] == [address]
    token = Path(store_dir, "token").read_text().strip()
    for authorization, status in (("Bearer wrong", 401), (f"Bearer {token}", 200)):
        with socket.create_connection((host, port), DEADLINE) as caller:
            caller.sendall(request("GET", "/version", authorization=authorization))
            assert caller.recv(12) == b"HTTP/1.1 %d" % status
    assert end(process)[0] == 0
    assert not is_called(sock)
    with socket.create_connection((host, port), DEADLINE):  # somebody still listens: the test
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_tcp_socket_that_others_could_read_along_on_takes_insecure(
    store_dir: str, opened: list[socket.socket], host: str
) -> None:
    sock = tcp(opened, host)
    status, err = ended(launch(["serve", store_dir], [sock]))
    assert (status, err.count("\n")) == (2, 1) and "--insecure" in err
    assert not os.path.exists(store_dir)
    process = launch(["serve", store_dir, "--insecure"], [sock])
    assert serving(process).endswith(f":{sock.getsockname()[1]}\n")
    assert end(process)[0] == 0


def test_an_address_that_was_also_asked_for_is_served_once(
    store_dir: str, opened: list[socket.socket]
) -> None:
    sock = tcp(opened)
    address = f"127.0.0.1:{sock.getsockname()[1]}"
    process = launch(["serve", store_dir, "--expose", address], [sock])
    assert serving(process) == f"serving {store_dir} at {store_dir}/sock, http://{address}\n"
    assert end(process)[0] == 0


def test_sockets_named_http_are_for_the_web(
    store_dir: str, tmp_path: Path, opened: list[socket.socket]
) -> None:
    path = str(tmp_path / "web" / "sock")
    page, api = tcp(opened), tcp(opened)
    door, port = page.getsockname()[1], api.getsockname()[1]
    process = launch(
        ["serve", store_dir, "--http-timeout", "1"],
        [page, api, unix(path, opened)],
        names="http:other:http",
    )
    assert f"http://127.0.0.1:{port}" in serving(process)
    assert process.stdout is not None
    said = process.stdout.readline().decode()
    assert said == f"answering the web at http://127.0.0.1:{door}, {path}\n"
    for where in (door, path):
        with Wire(where) as wire:
            assert wire.ask("GET", "/").status == 504
    with Wire(port) as wire:
        assert wire.ask("GET", "/").status == 401
    assert end(process)[0] == 0
    assert os.path.exists(path)
    for sock in opened:
        assert not is_called(sock)


# What is refused, or not ours


def test_sockets_for_another_process_are_left_alone(
    store_dir: str, opened: list[socket.socket]
) -> None:
    sock = tcp(opened)
    process = launch(["serve", store_dir], [sock], pid="1")
    assert serving(process) == f"serving {store_dir} at {store_dir}/sock\n"
    assert end(process) == (0, "")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("datagram", "is none to accept connections on"),
        ("connected", "is none to accept connections on"),
        ("abstract", "a Unix socket has a path"),
        ("file", "is no socket"),
    ],
)
def test_what_can_not_be_listened_on_is_wrong_usage(
    store_dir: str, tmp_path: Path, opened: list[socket.socket], kind: str, says: str
) -> None:
    if kind == "datagram":
        sock = unix(str(tmp_path / "d"), opened, socket.SOCK_DGRAM)
    elif kind == "connected":
        sock, other = socket.socketpair()
        opened += [sock, other]
    elif kind == "abstract":
        sock = socket.socket(socket.AF_UNIX)
        opened.append(sock)
        sock.bind("\0" + str(tmp_path))
    else:
        sock = open(os.devnull)  # type: ignore[assignment]  # noqa: SIM115
        opened.append(sock)
    process = launch(["serve", store_dir], [sock])
    status, err = ended(process)
    assert status == 2
    assert err.startswith("xs: the socket that was handed down as file descriptor 3 ")
    assert says in err and err.count("\n") == 1
    assert not os.path.exists(store_dir)


def test_file_descriptors_that_are_not_there_are_wrong_usage() -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "two"}
    with pytest.raises(Usage, match="LISTEN_FDS is a number of sockets, not 'two'"):
        handed_down(environ)
    assert environ == {}
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "900000", "LISTEN_FDNAMES": "a:http"}
    assert expects_web(environ)
    with pytest.raises(Usage, match=r"LISTEN_FDS tells of file descriptor \d+, which is clos"):
        handed_down(environ)
    assert environ == {}
    assert not expects_web(environ)


def test_without_any_all_sockets_are_made_here(tmp_path: Path) -> None:
    sockets = Sockets(handed_down({}))
    assert (sockets.unix, sockets.exposed, sockets.web, sockets.warnings) == ([], [], [], [])
    path = str(tmp_path / "sock")
    with sockets.listen_unix(path) as sock, sockets.listen_tcp("127.0.0.1", 0) as other:
        assert sock.getsockname() == path
        assert other.getsockname()[0] == "127.0.0.1"
    assert not sockets.is_handed(path)
