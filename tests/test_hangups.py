"""Which clients have gone: told at once, once, and of nobody else."""

from __future__ import annotations

import queue
import select
import socket
from collections.abc import Iterator

import pytest
from conftest import DEADLINE

from xs.hangups import Hangups


@pytest.fixture
def hangups() -> Iterator[Hangups]:
    found = Hangups()
    found.start()
    yield found
    found.stop()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


PAIRS = [pytest.param(tcp_pair, id="tcp"), pytest.param(socket.socketpair, id="unix")]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("sent_ahead", [b"", b"x", b"x" * 100_000])
def test_a_client_that_goes_is_told_of_whatever_it_has_sent_before(
    hangups: Hangups, pair: type, sent_ahead: bytes
) -> None:
    told: queue.Queue[str] = queue.Queue()
    client, sock = pair()
    other_client, other = pair()
    with client, sock, other_client, other:
        hangups.watch(sock, lambda: told.put("gone"))
        hangups.watch(other, lambda: told.put("the other"))
        client.send(sent_ahead)
        client.close()
        assert told.get(timeout=DEADLINE) == "gone"
        hangups.unwatch(sock)
        other_client.close()
        assert told.get(timeout=DEADLINE) == "the other"
        assert told.empty()
        hangups.unwatch(other)


@pytest.mark.parametrize("pair", PAIRS)
def test_one_that_had_gone_before_it_was_watched_is_told_of(hangups: Hangups, pair: type) -> None:
    told: queue.Queue[str] = queue.Queue()
    client, sock = pair()
    with sock:
        client.close()
        hangups.watch(sock, lambda: told.put("gone"))
        assert told.get(timeout=DEADLINE) == "gone"
        hangups.unwatch(sock)


def test_one_that_resets_its_connection_is_told_of(hangups: Hangups) -> None:
    told: queue.Queue[str] = queue.Queue()
    client, sock = tcp_pair()
    with sock:
        hangups.watch(sock, lambda: told.put("gone"))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        assert told.get(timeout=DEADLINE) == "gone"
        hangups.unwatch(sock)


def test_on_a_unix_socket_one_that_only_sends_no_more_is_told_of_when_it_goes(
    hangups: Hangups,
) -> None:
    told: queue.Queue[str] = queue.Queue()
    client, sock = socket.socketpair()
    last_client, last = socket.socketpair()
    with sock, last:
        hangups.watch(sock, lambda: told.put("gone"))
        client.shutdown(socket.SHUT_WR)
        hangups.watch(last, lambda: told.put("last"))
        last_client.close()
        assert told.get(timeout=DEADLINE) == "last", "what happened before it was passed over"
        client.close()
        assert told.get(timeout=DEADLINE) == "gone"
        hangups.unwatch(sock)
        hangups.unwatch(last)


def test_after_the_end_nothing_is_watched_and_that_is_no_error() -> None:
    hangups = Hangups()
    hangups.start()
    client, sock = socket.socketpair()
    with client, sock:
        hangups.watch(sock, lambda: None)
        hangups.stop()
        hangups.unwatch(sock)
        hangups.watch(sock, lambda: None)
        hangups.unwatch(sock)


def test_nothing_is_told_of_one_that_is_not_watched_any_more(hangups: Hangups) -> None:
    told: queue.Queue[str] = queue.Queue()
    for n in range(100):
        client, sock = tcp_pair()
        hangups.watch(sock, lambda n=n: told.put(f"{n}"))  # type: ignore[misc]
        hangups.unwatch(sock)
        client.close()
        select.select([sock], [], [], DEADLINE)  # its end has come
        sock.close()
    client, sock = tcp_pair()
    with sock:
        hangups.watch(sock, lambda: told.put("last"))
        client.close()
        assert told.get(timeout=DEADLINE) == "last"
        hangups.unwatch(sock)
