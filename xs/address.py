"""What an ADDR means (docs/protocol.md, Addresses): from text to something that takes requests.

A directory is a store: its server's socket when there is one, else its files, in this process. The
other forms name a server. What is typed wrongly, or leads nowhere, is answered with one sentence.
"""

from __future__ import annotations

from _thread import allocate_lock

from xs import errors
from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from xs.request import Body, Fields, Response, Transport
    from xs.transport import Address

_TYPE_BITS = 0o170000  # S_IFMT, S_IFSOCK, S_IFDIR; `stat` is not needed for the rest of its names
_SOCKET = 0o140000
_DIRECTORY = 0o040000
_PORTS = {"http": 80, "https": 443}


def is_address(text: str) -> bool:
    """Whether an argument is an ADDR by its looks, wherever XS_ADDR points."""
    return "/" in text or ":" in text or text in (".", "..")


def split(
    args: Sequence[str], environ: Mapping[str, str], needed: int = 0
) -> tuple[str, list[str]]:
    """(ADDR, the other arguments): the first argument if it looks like one, else XS_ADDR.

    With neither, the first argument is a path after all. `needed` arguments must be left besides
    ADDR: with XS_ADDR set and just those given, the first is no ADDR whatever it looks like (a hash
    may have a `/`). Raises `Usage` when there is no ADDR.
    """
    rest = list(args)
    named = environ.get("XS_ADDR") or ""
    if named and (not rest or len(rest) == needed or not is_address(rest[0])):
        return named, rest
    if not rest:
        raise errors.Usage("an ADDR is missing: a store's directory, or set XS_ADDR")
    return rest[0], rest[1:]


def absolute(addr: str) -> str:
    """The same address; if it is a path, it stays the same wherever the process goes.

    What is opened by it is opened bit by bit: files when they are needed, sockets again.
    """
    if not addr or addr.startswith("~") or "\0" in addr or is_host(addr):
        return addr
    try:
        return os.path.abspath(addr)
    except FileNotFoundError:  # the directory that the process is in was removed
        return addr


def is_host(addr: str) -> bool:
    """Whether an ADDR names a server by its host; else it is a path."""
    scheme, mark, _ = addr.partition("://")
    return bool(mark and scheme.isalpha()) or ("/" not in addr and ":" in addr)


def folder_of(addr: str) -> str:
    """The directory of the store at an ADDR that is a path: that, or the one of its socket."""
    if os.path.basename(addr) == "sock" and not os.path.isdir(addr):
        return os.path.dirname(addr) or "."
    return addr


def is_socket_path(addr: str) -> bool:
    """Whether what is to be listened on is a path, as a gateway's address may be, and no host."""
    return "/" in addr and "://" not in addr


def without_token(addr: str) -> str:
    """An address as errors show it: they are seen by others, and kept in logs.

    >>> without_token("http://secret@xs.example:8443")
    'http://xs.example:8443'
    """
    scheme, mark, rest = addr.partition("://")
    return scheme + mark + rest.rpartition("@")[2] if mark else addr.rpartition("@")[2]


def open_transport(addr: str, *, timeout: float | None = None, create: bool = False) -> Transport:
    """Something that takes requests for the store at `addr`.

    With `create`, a directory that isn't there yet, or is empty, becomes a store with the first
    append. `timeout` is in seconds, for each wait on a server. Raises `NoStore` where there is
    none, `Invalid` for what is no address, `Unavailable` when nobody answers there.
    """
    if not addr:
        raise errors.Invalid("the address is empty: give a store's directory, or HOST:PORT")
    if addr.startswith("~"):
        raise errors.Invalid(
            f"{addr} has a literal ~, which the shell expands only when it is not quoted: "
            f"write $HOME{addr[1:]}"
            if addr == "~" or addr.startswith("~/")
            else f"{addr} has a literal ~: write the directory's whole path, or ./{addr}"
        )
    if "\0" in addr:
        raise errors.Invalid("an address has no NUL character in it")
    if is_host(addr):
        connect, token = parse_host(addr)
        return _open_host(connect, token or os.environ.get("XS_TOKEN") or None, timeout)
    return _open_path(addr, timeout, create)


def parse_host(addr: str) -> tuple[Address, str | None]:
    """(("tcp" or "tls", host, port), token or None) of an address that is not a path.

    >>> parse_host(":8080")
    (('tcp', 'localhost', 8080), None)
    >>> parse_host("https://secret@xs.example:8443/")
    (('tls', 'xs.example', 8443), 'secret')
    """
    scheme, mark, rest = addr.partition("://")
    if not mark:
        scheme, rest = "", addr
    scheme = scheme.lower()
    if mark and scheme not in _PORTS:
        raise errors.Invalid(
            f"{without_token(addr)}: xs speaks http:// and https://; a directory of that name is "
            f"./{without_token(addr)}"
        )
    rest = rest[:-1] if mark and rest.endswith("/") else rest
    token, at, host_port = rest.rpartition("@")
    if at and not token:
        raise errors.Invalid("no token stands before the @ of the address")
    if mark and not host_port:
        raise errors.Invalid(
            f"{scheme}:// lacks its host: use {scheme}://HOST or {scheme}://HOST:PORT"
        )
    if "/" in host_port or "?" in host_port or "#" in host_port:
        raise errors.Invalid(f"an address ends with its port: not a path, as in {host_port!r}")
    if host_port.startswith("["):  # RFC 3986 §3.2.2: an IPv6 address
        host, bracket, port = host_port[1:].partition("]")
        wrong = not bracket or not host or port[:1] not in ("", ":")
        port = port[1:]
    else:
        host, _, port = host_port.rpartition(":") if ":" in host_port else (host_port, "", "")
        wrong = ":" in host or (bool(mark) and not host and not port)
    if not wrong and not port and scheme:
        port = str(_PORTS[scheme])
    if wrong or not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise errors.Invalid(
            f"not an address: {host_port!r}: use HOST:PORT or :PORT, with a port from 1 to 65535 "
            "([ADDRESS]:PORT for IPv6), or a path with a /"
        )
    if any(c.isspace() or not c.isprintable() for c in rest):
        raise errors.Invalid("an address has no blanks or control characters in it")
    kind = "tls" if scheme == "https" else "tcp"
    return (kind, host or "localhost", int(port)), token or None


def _open_host(connect: Address, token: str | None, timeout: float | None) -> Transport:
    from xs.transport import HttpTransport

    transport = HttpTransport(connect, token, timeout)
    try:
        return transport.open()
    except ConnectionRefusedError:
        raise errors.Unavailable(
            f"nobody answers at {transport.who}: is a server running with --expose {transport.who}?"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise errors.Unavailable(f"can't connect to {transport.who}: {reason}") from None


def _open_path(addr: str, timeout: float | None, create: bool) -> Transport:
    try:
        kind = os.stat(addr).st_mode & _TYPE_BITS
    except (FileNotFoundError, NotADirectoryError):
        if create and os.path.basename(addr) != "sock" and not _dead_end(addr):
            return _NotYet(addr, timeout)
        folder, name = os.path.split(addr)
        if name != "sock":
            raise no_store(addr) from None
        if os.path.exists(os.path.join(folder, "xs.db")):  # a server takes its socket with it
            raise _no_server(addr) from None
        raise no_store(addr, folder or ".") from None
    except OSError as error:
        raise errors.NoStore(f"can't open {addr}: {error.strerror}") from None
    if kind == _SOCKET:
        return _open_socket(addr, timeout)
    if kind != _DIRECTORY:
        raise no_store(addr)
    return _open_directory(addr, timeout, create)


def _open_socket(path: str, timeout: float | None) -> Transport:
    from xs.transport import HttpTransport

    try:
        return HttpTransport(("unix", path), None, timeout).open()
    except ConnectionRefusedError:
        raise _no_server(path) from None
    except OSError as error:
        raise errors.Unavailable(f"can't connect to {path}: {error.strerror or error}") from None


def _no_server(path: str) -> errors.Unavailable:
    return errors.Unavailable(
        f"no server listens on {path}: start one with `xs serve`, or give the store's directory"
    )


def _open_directory(addr: str, timeout: float | None, create: bool) -> Transport:
    path = os.path.join(addr, "sock")
    try:
        os.stat(path)  # without one, what speaks to it is not loaded
        from xs.transport import HttpTransport

        # It may end before it is asked; then its files are there for whoever comes.
        transport = HttpTransport(
            ("unix", path), None, timeout, instead=lambda: _open_files(addr, create=False)
        )
        return transport.open()
    except (FileNotFoundError, ConnectionRefusedError):
        pass  # no server, or one that has died and left its socket behind
    except PermissionError:
        raise errors.NoStore(
            f"can't open {addr}: Permission denied: a store is for the user who made it, alone"
        ) from None
    except OSError as error:
        raise errors.Unavailable(
            f"can't connect to the server of {addr}: {error.strerror or error}"
        ) from None
    try:
        names = os.listdir(addr)
    except OSError as error:
        raise errors.NoStore(f"can't open {addr}: {error.strerror}") from None
    if "xs.db" not in names:
        if "xs.db.new" in names:
            raise errors.half_repaired(addr)
        if "cas" in names:
            try:
                return _open_files(addr, create=False)  # which tells of contents that are left
            except errors.NoStore:
                pass  # there are none
        if not create or _dead_end(addr):
            # Other files there: a store can't be made in their midst, but beside them.
            raise no_store(addr, addr if not names else os.path.join(addr, "store"))
        # What another process has just begun to make may lie there already, but nothing else.
        if not _STORE_FILES.issuperset(names):
            raise errors.NoStore(
                f"no store at: {addr}: it has other files in it, and a new store starts in an "
                "empty directory"
            )
        return _NotYet(addr, timeout)
    # An empty one is what a making has left that was killed: then the first write goes on with it.
    return _open_files(addr, create=create and _is_empty(os.path.join(addr, "xs.db")))


def _is_empty(path: str) -> bool:
    try:
        return not os.stat(path).st_size
    except OSError:
        return False


_INDEX_FILES = ("xs.db", "xs.db-journal", "xs.db-wal", "xs.db-shm")
_STORE_FILES = frozenset((*_INDEX_FILES, "cas", "sock", "lock", "token", "run"))


class _NotYet:
    """A store that the first write will make; until then there is none to read."""

    __slots__ = ("_addr", "_opening", "_timeout", "_transport")

    def __init__(self, addr: str, timeout: float | None) -> None:
        self._addr = addr
        self._timeout = timeout
        self._opening = allocate_lock()  # held while it is opened, by the first of several threads
        self._transport: Transport | None = None

    def request(self, method: str, target: str, fields: Fields = (), body: Body = None) -> Response:
        with self._opening:
            if self._transport is None:
                self._transport = self._open(method)
        return self._transport.request(method, target, fields, body)

    def _open(self, method: str) -> Transport:
        try:
            return open_transport(self._addr, timeout=self._timeout)  # made by another meanwhile
        except errors.NoStore:
            if method != "POST":
                raise
            return _open_files(self._addr, create=True)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _open_files(directory: str, *, create: bool) -> Transport:
    from xs.local import Local

    return Local(directory, create=create)


def no_store(addr: str, place: str | None = None) -> errors.NoStore:
    """The error for an address where no store is; `place` is where one can be made."""
    place = place or addr
    if "@" in addr and not addr.startswith(("/", ".")) and not os.path.lexists(addr):
        return errors.NoStore(
            f"no store at: {without_token(addr) or '@'}: an address with a token ends with its "
            "port, as in TOKEN@HOST:PORT; the path of a directory with an @ begins with ./"
        )
    hint = f"make one with `xs serve {place}` or `xs append {place} TOPIC`"
    if addr == "localhost" or (addr.count(".") == 3 and addr.replace(".", "").isdigit()):
        hint = f"a server of that host is called by its port, too: {addr}:PORT"
    return _dead_end(addr) or errors.NoStore(f"no store at: {addr}; {hint}")


def _dead_end(addr: str) -> errors.NoStore | None:
    """The error for a path at which no store can be made, either."""
    if not os.path.isabs(addr) and here_is_gone():
        return errors.NoStore(f"no store at: {addr}: {errors.HERE_IS_GONE}")
    if os.path.isdir(addr):
        return None
    if os.path.exists(addr):
        return errors.NoStore(f"no store at: {addr}: it is a file, and a store is a directory")
    is_link = os.path.islink(addr.rstrip("/"))
    return errors.dangling(addr, os.path.realpath(addr)) if is_link else None


def here_is_gone() -> bool:
    """Whether the directory that this process is in was removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False
