"""Sockets to listen on, and the kernel's own limit on a read. Knows no HTTP."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import struct
import time

from xs.errors import NoAddress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

BACKLOG = 1024  # who waits to be accepted on one socket
_ALONE_SECONDS = 1.0  # that a folder is waited for: nobody of ours has it for more than moments
_LOOK_SECONDS = 0.005  # between two looks: flock has no time limit of its own


def set_timeout(sock: socket.socket, seconds: float, of: int = socket.SO_RCVTIMEO) -> None:
    """A limit on each read (or, `of` SO_SNDTIMEO, write) that the kernel keeps: EAGAIN then."""
    whole = int(seconds)
    limit = struct.pack("ll", whole, int((seconds - whole) * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, of, limit)


def is_half_closed(sock: socket.socket) -> bool:
    """Whether a client that sends no more still reads: `printf … | nc -N -U` does.

    TCP can't tell: there who sends no more is taken for gone.
    """
    if sock.family != socket.AF_UNIX:
        return False
    poll = select.poll()
    poll.register(sock, 0)
    return not any(event & select.POLLHUP for _, event in poll.poll(0))


def is_gone(sock: socket.socket) -> bool:
    """Whether a client that waits for an answer has gone away, whatever it has sent before.

    On a Unix socket one that only sends no more (`nc -N -U`) is still there. Over TCP the two can't
    be told apart, and hardly anybody does that. Raises `ValueError` if it was closed here.
    """
    ended = getattr(select, "POLLRDHUP", None)
    if ended is None:
        return _has_read_the_end(sock)
    wanted = 0 if sock.family == socket.AF_UNIX else ended
    poll = select.poll()
    poll.register(sock, wanted)
    return any(event & (select.POLLHUP | select.POLLERR | wanted) for _, event in poll.poll(0))


def _has_read_the_end(sock: socket.socket) -> bool:
    """The same where poll(2) does not tell: not of one that has sent its next request already."""
    try:
        if sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            return False
    except BlockingIOError:
        return False
    except OSError:
        return True
    return not is_half_closed(sock)


def accept(listening: socket.socket) -> tuple[socket.socket, Any]:
    """As the socket's own `accept`, which leaves a connection open where memory is short.

    Between the descriptor and the object that closes it nobody else knows of it. Raises `OSError`.
    """
    number, address = listening._accept()  # type: ignore[attr-defined]
    try:
        sock = socket.socket(listening.family, listening.type, listening.proto, fileno=number)
    except BaseException:
        os.close(number)
        raise
    return sock, address


def peer_user(sock: socket.socket) -> int | None:
    """Whose process is at the other end of a Unix socket; None where the system does not tell."""
    option = getattr(socket, "SO_PEERCRED", None)  # unix(7); macOS has only its mode to go by
    if option is None or sock.family != socket.AF_UNIX:
        return None
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, option, 12))
    return int(user)


def listen_unix(path: str) -> socket.socket:
    """A socket at `path`, for the user alone; one that is left behind there is replaced.

    Raises `OSError`.
    """
    with _alone_beside(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return _listen_unix(path, 0o600)


def listen_unix_for_all(path: str) -> socket.socket:
    """A socket at `path`, for everybody who can reach its folder. Raises `NoAddress`.

    What is there already is replaced only if it is a socket on which nobody listens any more.
    """
    try:
        with _alone_beside(path):
            _remove_dead_socket(path)
            return _listen_unix(path, 0o666)
    except OSError as error:
        raise NoAddress(f"can't listen on {path}: {error.strerror or error}") from None


def remove_unix(path: str, file: tuple[int, int] | None) -> None:
    """Removes the socket that is that `file`; one that somebody else has put at its path stays.

    While ours is open no other has its number: so it is removed, then closed, or a lock held.
    """
    with contextlib.suppress(OSError), _alone_beside(path):  # somebody may have tidied up already
        if file_at(path) == file:
            os.unlink(path)


def file_at(path: str) -> tuple[int, int] | None:
    """Which file is at that path; None if there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _alone_beside(path: str) -> Iterator[None]:
    """No other thread or process makes or removes a socket in the folder of that one meanwhile.

    Between bind(2) and listen(2) a socket looks as one does whose server has died, and who removes
    a dead one must not meet the one that another has put in its place. A folder that can't be
    locked, or that somebody keeps (`flock DIR xs serve DIR`), is no reason not to serve.
    """
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        yield
        return
    try:
        deadline = time.monotonic() + _ALONE_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOOK_SECONDS)
            except OSError:
                break
        yield
    finally:
        os.close(folder)


def _listen_unix(path: str, mode: int) -> socket.socket:
    """Its mode is set before anybody can connect, which takes listen(2).

    A umask would be set for all threads, and what they make meanwhile.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _by_short_name(path, sock.bind)
        os.chmod(path, mode)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_dead_socket(path: str) -> None:
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise NoAddress(f"can't listen on {path}: a file is there already")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.setblocking(False)  # one whose queue is full lets who calls wait
        try:
            _by_short_name(path, caller.connect)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise NoAddress(f"can't listen on {path}: a server listens there already")


def _by_short_name(path: str, act: Callable[[str], None]) -> None:
    """Binds or connects also where a path is longer than a socket's address may be (unix(7))."""
    try:
        act(path)
        return
    except OSError as error:
        if "too long" not in str(error):
            raise
    # By a short name for its folder. Changing into that would change it for all threads.
    folder, name = os.path.split(os.path.abspath(path))
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        short = f"/proc/self/fd/{descriptor}"
        if os.path.isdir(short):  # Linux
            act(f"{short}/{name}")
            return
    finally:
        os.close(descriptor)
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        os.symlink(folder, os.path.join(place, "d"))
        act(os.path.join(place, "d", name))


def listen_tcp(host: str, port: int) -> socket.socket:
    """A socket that listens at a TCP address. Raises `NoAddress`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise NoAddress(f"no such host: {host}: {error.strerror}") from None
    except UnicodeError:  # the codec of host names has its own words for what can't be one
        raise NoAddress(f"no such host: {host}: not the name of one") from None
    family, _, _, _, address = found[0]
    try:
        with contextlib.ExitStack() as opened:
            sock = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)  # two may be bound to one address, but not listen
            opened.pop_all()
    except OSError as error:
        raise NoAddress(f"can't listen on {host}:{port}: {error.strerror}") from None
    return sock
