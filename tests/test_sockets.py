"""Sockets to listen on: one address has one server, whoever comes at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path

import pytest
from stores import together

from xs import sockets
from xs.errors import NoAddress


def is_heard(listening: socket.socket, path: str) -> bool:
    """Whether who calls a path gets through to that very socket."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(path)
        listening.setblocking(False)
        try:
            listening.accept()[0].close()
        except BlockingIOError:
            return False
        return True


def test_a_socket_listens_when_it_is_there_so_nobody_takes_it_for_dead(tmp_path: Path) -> None:
    path = str(tmp_path / "web")
    for listen in (sockets.listen_unix_for_all, sockets.listen_unix):
        with listen(path) as sock:
            with pytest.raises(NoAddress, match="a server listens there already"):
                sockets.listen_unix_for_all(path)
            assert is_heard(sock, path)


def test_one_whose_queue_is_full_is_not_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "web")
    with contextlib.ExitStack() as opened:
        opened.enter_context(sockets.listen_unix_for_all(path)).listen(0)
        while True:
            caller = opened.enter_context(socket.socket(socket.AF_UNIX))
            caller.setblocking(False)
            try:
                caller.connect(path)
            except BlockingIOError:
                break
        with pytest.raises(NoAddress, match="a server listens there already"):
            sockets.listen_unix_for_all(path)


@pytest.mark.parametrize("parent", ["d", "d" * 100], ids=["short", "longer than an address"])
def test_of_many_that_find_a_dead_socket_one_takes_its_place(tmp_path: Path, parent: str) -> None:
    (tmp_path / parent).mkdir()
    path = str(tmp_path / parent / "web")
    folder = os.open(tmp_path / parent, os.O_RDONLY)
    for _ in range(50):
        sockets.listen_unix_for_all(path).close()  # as a server leaves it that was killed
        won: list[socket.socket] = []

        def listen(_: int, won: list[socket.socket] = won) -> None:
            with contextlib.suppress(NoAddress):
                won.append(sockets.listen_unix_for_all(path))

        together(4, listen)
        assert len(won) == 1
        with won[0]:
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
            assert is_heard(won[0], f"/proc/self/fd/{folder}/web")
        os.unlink(path)
    os.close(folder)


def test_a_folder_that_somebody_keeps_locked_is_no_reason_not_to_listen(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # flock DIR xs serve DIR
    with sockets.listen_unix_for_all(str(tmp_path / "web")) as sock:
        assert is_heard(sock, str(tmp_path / "web"))
    os.close(folder)


def test_two_can_not_have_one_tcp_address() -> None:
    taken = pytest.raises(NoAddress, match="Address already in use")
    with sockets.listen_tcp("127.0.0.1", 0) as sock, taken:
        sockets.listen_tcp("127.0.0.1", sock.getsockname()[1])
