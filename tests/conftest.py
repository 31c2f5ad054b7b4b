"""What the tests share: a place for a store, a server process, `xs` itself, a scripted peer."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # the tests are of this checkout, whatever is installed
    sys.path.insert(0, str(ROOT))

from xs.server import Running  # noqa: E402  # of this checkout
from xs.store import Store  # noqa: E402
from xs.transport import connect_unix  # noqa: E402

if TYPE_CHECKING:
    from stores import Clock

# Under nohup, and in the background of a script, they are ignored, and so they would be in every
# process that is started here.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

DEADLINE = 20.0  # seconds that anything in a test may take

# As tools/xs begins: without site.py, and so without `os`, for which `xs.system` stands in then.
_PACKAGES = sysconfig.get_path("purelib")
_START = f"import sys; sys.path.append({_PACKAGES!r}); from xs.cli import main; main()"
XS = [sys.executable, "-S", "-c", _START]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-in", type=int, default=1, metavar="N", help="of each test's cases, run one in N"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out cases (`--one-in`), and sorts.

    What one process runs by itself begins first, lest the others wait for its end, and then what is
    long.
    """
    cases: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        is_kept = cases[test] % config.getoption("--one-in") == 0
        (kept if is_kept else left_out).append(item)
        cases[test] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
    for marker in ("long", "xdist_group"):
        items.sort(key=lambda item: item.get_closest_marker(marker) is None)


def until(
    is_true: Callable[[], Any],
    what: Union[str, Callable[[], str]] = "what was waited for did not come",
    seconds: float = DEADLINE,
) -> Any:
    """Waits until `is_true` gives something that is, and gives that; fails after so many seconds.

    Each look takes time of a processor, of which others are in need. What comes soon is seen at
    once, and what is long in coming is looked for less and less often: up to a quarter late.
    """
    begun = time.monotonic()
    while True:
        found = is_true()
        if found:
            return found
        waited = time.monotonic() - begun
        if waited > seconds:
            raise AssertionError(what if isinstance(what, str) else what())
        threading.Event().wait(min(max(0.005, waited / 4), 0.1))


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for `xs`, without the user's own settings of it, but for `nu`."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if (not k.startswith("XS_") and k != "NO_COLOR") or k == "XS_NU"
    }
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def nu_path() -> str:
    """The Nushell that tests run: `XS_NU`, or that of the PATH."""
    path = os.environ.get("XS_NU") or shutil.which("nu")
    if not path:
        pytest.fail("this needs Nushell: tools/test installs it, or name one in XS_NU")
    return path


class Server(NamedTuple):
    """A running `xs serve`."""

    directory: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise


def start_server(directory: str, *options: str, **changes: str) -> Server:
    """Starts `xs serve` and returns once its socket answers; `changes` are of its environment."""
    process = subprocess.Popen(
        [*XS, "serve", directory, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(**changes),
    )
    server = Server(directory, process)
    deadline = time.monotonic() + DEADLINE
    while not answers(os.path.join(directory, "sock")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"xs serve didn't come up: {out.decode()}{err.decode()}")
        threading.Event().wait(0.01)
    return server


def answers(path: str) -> bool:
    """Whether a server answers `GET /version` on that socket."""
    try:
        with contextlib.closing(connect_unix(path, DEADLINE)) as sock:
            sock.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return sock.recv(12) == b"HTTP/1.1 200"
    except OSError:
        return False


def open_files(pid: int, directory: str) -> int:
    """A process's open files, but for those of the index in `directory`.

    Of an index's readers as many stay as were ever needed at once, up to a bound of theirs.
    """
    found = 0
    index = os.path.join(os.path.realpath(directory), "xs.db")
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += not os.readlink(f"/proc/{pid}/fd/{name}").startswith(index)
    return found


@pytest.fixture
def store_dir(tmp_path: Path) -> str:
    """Where a store may be made; nothing is there yet."""
    return str(tmp_path / "store")


@pytest.fixture
def clock() -> Clock:
    from stores import Clock  # here: it is built on this module

    return Clock()


@pytest.fixture
def store(store_dir: str, clock: Clock) -> Iterator[Store]:
    """A store that this process has for itself, as a server does; its clock stands still."""
    opened = Store(store_dir, exclusive=True, create=True, clock=clock)
    yield opened
    opened.close()


@pytest.fixture
def server(store_dir: str) -> Iterator[Server]:
    """A server of a new store in `store_dir`."""
    running = start_server(store_dir)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for a module's tests that need no store of their own, nor its start or its end."""
    running = start_server(str(tmp_path_factory.mktemp("shared") / "store"))
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def running(store_dir: str) -> Iterator[Running]:
    """The same in this process, for tests that set its limits or look into it."""
    found = Running(store_dir, [], [])
    try:
        yield found
    finally:
        found.stop()


RunXs = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def run_xs() -> RunXs:
    """`run_xs(["cat", addr], stdin=b"…", env={…})`: the command as a process of its own."""

    def run(
        args: Sequence[str],
        stdin: Union[bytes, str, None] = None,
        env: Union[dict[str, str], None] = None,
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*XS, *args],
            input=stdin.encode() if isinstance(stdin, str) else stdin or b"",
            capture_output=True,
            env=environment(**(env or {})),
            timeout=DEADLINE * 3,
        )

    return run


class Peer:
    """One connection of a `Scripted` server, for its script to read from and write to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = b""

    def read_until(self, mark: bytes) -> bytes:
        """What comes up to and with `mark`; all that came if the other end closes before it."""
        while mark not in self._rest:
            data = self.sock.recv(65536)
            if not data:
                found, self._rest = self._rest, b""
                return found
            self._rest += data
        found, mark, self._rest = self._rest.partition(mark)
        return found + mark

    def read_exactly(self, size: int) -> bytes:
        while len(self._rest) < size:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError(f"{len(self._rest)} of {size} bytes")
            self._rest += data
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    def head(self) -> bytes:
        """A request's head; b"" when the client is done."""
        return self.read_until(b"\r\n\r\n")

    def chunk(self) -> bytes:
        """The data of the next chunk; b"" for the last one. Raises `EOFError` if it breaks off."""
        line = self.read_until(b"\r\n")
        if not line:
            raise EOFError("no chunk")
        data = self.read_exactly(int(line, 16))
        self.read_exactly(2)
        return data

    def body(self, head: bytes) -> bytes:
        """The body that belongs to that head."""
        lower = head.lower()
        if b"\r\ntransfer-encoding: chunked\r\n" in lower:
            return b"".join(iter(self.chunk, b""))
        if b"\r\ncontent-length: " in lower:
            return self.read_exactly(int(lower.split(b"\r\ncontent-length: ")[1].split(b"\r")[0]))
        return b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self, body: bytes = b"", status: int = 200, *fields: str) -> None:
        """A whole answer with its length."""
        lines = [f"HTTP/1.1 {status} X", "xs-version: 1", f"Content-Length: {len(body)}", *fields]
        self.send("\r\n".join([*lines, "", ""]).encode() + body)


class Scripted:
    """A server whose connections each run a script, in threads; it counts the connections.

    `path` or `port` is where it listens. A script's exception fails the test, at `close`.
    """

    def __init__(
        self, script: Callable[[Peer], None], listener: socket.socket, address: object
    ) -> None:
        self.path = address if isinstance(address, str) else ""
        self.port = address if isinstance(address, int) else 0
        self.connections = 0
        self.failures: list[BaseException] = []
        self._script = script
        self._listener = listener
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(DEADLINE)
            self.connections += 1
            self._socks.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                self._script(Peer(sock))
        except (ConnectionError, EOFError, ssl_error()):
            pass  # the client has gone; what it was to do before, its own test says
        except BaseException as error:
            self.failures.append(error)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(DEADLINE)  # before its connections are counted up
        self._listener.close()
        for sock in self._socks:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join(DEADLINE)


def ssl_error() -> type[OSError]:
    import ssl

    return ssl.SSLError


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., Scripted]]:
    """`scripted(script)`: a `Scripted` on a Unix socket; with `tcp=True` on a port of its own."""
    servers: list[Scripted] = []

    def start(script: Callable[[Peer], None], *, tcp: bool = False) -> Scripted:
        listener = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        path = str(tmp_path / f"s{len(servers)}")
        listener.bind(("127.0.0.1", 0) if tcp else path)
        listener.listen(16)
        servers.append(Scripted(script, listener, listener.getsockname()[1] if tcp else path))
        return servers[-1]

    yield start
    for one in servers:
        one.close()
    for one in servers:
        assert not one.failures, one.failures
