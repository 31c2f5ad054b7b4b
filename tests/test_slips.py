"""What a user gets wrong: each slip has its sentence, and nothing is lost by it."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, XS, RunXs, Server, environment

import xs
from xs import errors, place
from xs.address import open_transport
from xs.cas import Cas
from xs.commit import Append
from xs.errors import NotAStore
from xs.store import Store


def lines(data: bytes) -> list[dict[str, object]]:
    return [json.loads(line) for line in data.splitlines()]


def refused(run_xs: RunXs, *arguments: str, stdin: bytes = b"x", status: int = 1) -> str:
    """The one sentence that a command ends with."""
    done = run_xs(list(arguments), stdin=stdin)
    said = done.stderr.decode()
    assert done.returncode == status, said
    assert done.stdout == b"" and said.count("\n") == 1 and "Error:" not in said, said
    return said


# Where nothing may be written

WRITES = [
    ["append", "STORE", "t"],
    ["cas-post", "STORE"],
    ["remove", "STORE", "ID"],
    ["gc", "STORE"],
    ["import", "STORE", "FRAMES"],
]


@pytest.fixture
def kept(store_dir: str, run_xs: RunXs) -> dict[str, object]:
    """The one frame of a store in `store_dir`, with content in a file."""
    done = run_xs(["append", store_dir, "t"], stdin=b"k" * 20_000)
    return dict(json.loads(done.stdout))


@contextlib.contextmanager
def only_to_be_read(folder: str) -> Iterator[list[str]]:
    """What stands before a command, so that it may only read in `folder`."""
    modes = {path: os.stat(path).st_mode for path in [folder, *map(str, Path(folder).rglob("*"))]}
    for path, mode in modes.items():
        os.chmod(path, mode & ~0o222)
    try:
        # root may write everywhere, by a capability that can be given up
        yield ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else []
    finally:
        for path, mode in modes.items():
            os.chmod(path, mode)


def test_a_store_that_may_not_be_written_can_be_read(
    store_dir: str, kept: dict[str, object]
) -> None:
    with only_to_be_read(store_dir) as before:
        for arguments in (["cat"], ["last"], ["get", kept["id"]], ["cas", kept["hash"]], ["check"]):
            command = [*XS, arguments[0], store_dir, *arguments[1:]]
            done = subprocess.run(
                [*before, *command], env=environment(), capture_output=True, timeout=DEADLINE
            )
            assert done.returncode == 0 and done.stderr == b"", done.stderr
            expected = b"k" * 20_000 if arguments[0] == "cas" else b'"'
            assert expected in done.stdout


@pytest.mark.parametrize("arguments", [*WRITES, ["serve", "STORE"]], ids=lambda a: a[0])
def test_a_write_where_nothing_may_be_written_is_one_sentence(
    store_dir: str, kept: dict[str, object], arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "frames").write_text(json.dumps({**kept, "id": "0" * 25}) + "\n")
    words = {"STORE": store_dir, "ID": kept["id"], "FRAMES": str(tmp_path / "frames")}
    with only_to_be_read(store_dir) as before:
        done = subprocess.run(
            [*before, *XS, *(str(words.get(a, a)) for a in arguments)],
            input=b"x",
            env=environment(),
            capture_output=True,
            timeout=DEADLINE,
        )
    assert done.returncode == (4 if arguments[0] == "serve" else 1)
    said = done.stderr.decode()
    assert f"can't write to the store at {store_dir}: Permission denied" in said
    assert said.count("\n") == 1 and "Error:" not in said, said
    assert [frame.id for frame in xs.open(store_dir).cat()] == [kept["id"]]


def as_user(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """A command by somebody whom the modes of files are for, as they aren't for root."""
    lost = "--bounding-set=-dac_override,-dac_read_search"
    before = ["setpriv", lost] if os.getuid() == 0 else []
    return subprocess.run(
        [*before, *XS, *command],
        input=b"x",
        env=environment(),
        capture_output=True,
        timeout=DEADLINE,
    )


def test_an_index_that_may_not_be_written_is_told_and_can_be_written_again(
    store_dir: str, kept: dict[str, object]
) -> None:
    index = os.path.join(store_dir, "xs.db")
    os.chmod(index, 0o400)
    for words, status in ((["append", store_dir, "t"], 1), (["serve", store_dir], 4)):
        done = as_user(words)
        assert done.returncode == status
        said = f"xs: can't write to the store at {store_dir}: its xs.db: Permission denied\n"
        assert done.stderr.decode() == said
    assert as_user(["cat", store_dir]).returncode == 0  # SQLite may leave files of that mode
    os.chmod(index, 0o600)
    done = as_user(["append", store_dir, "t"])
    assert (done.returncode, done.stderr) == (0, b"")
    for words, status in ((["cat", store_dir], 1), (["serve", store_dir], 4)):
        os.chmod(index, 0)
        done = as_user(words)
        assert done.returncode == status
        assert done.stderr.count(b"\n") == 1 and b"Permission denied" in done.stderr, done.stderr


def test_a_read_only_disk_is_named_as_such(store_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(store_dir, create=True).close()

    class Mounted:
        f_flag = os.ST_RDONLY

    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(os, "statvfs", lambda path: Mounted)
    assert place.why_not_written(store_dir) == (
        f"can't write to the store at {store_dir}: Read-only file system"
    )


# Two users


def test_another_user_s_store_is_not_written_to_and_keeps_its_owner(
    store_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(store_dir, create=True)
    store.append(Append("t"))
    store.close()
    os.unlink(os.path.join(store_dir, "lock"))  # one that root made would shut the owner out
    somebody = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: somebody)  # as for root, who may write everywhere
    for options in ({"create": True}, {"exclusive": True}):
        with pytest.raises(NotAStore, match=r"'s, and this runs as .*: run it as "):
            Store(store_dir, **options)
    reader = Store(store_dir)
    with pytest.raises(NotAStore, match=r"can't write to the store at .*: run it as "):
        reader.append(Append("t"))
    assert reader.index.first(None, 0)  # reading is for whoever the system lets read
    reader.close()
    assert "lock" not in os.listdir(store_dir)


@pytest.mark.parametrize("create", [False, True])
def test_a_store_that_is_another_user_s_alone_is_said(create: bool) -> None:
    user = os.geteuid()
    # pytest's own folder is its user's alone, and so is all in it
    with tempfile.TemporaryDirectory() as shared:
        os.chmod(shared, 0o755)
        folder = os.path.join(shared, "store")
        Store(folder, create=True).close()
        if user == 0:
            os.seteuid(65534)  # be somebody else meanwhile, who can't look into the store
        else:
            os.chmod(folder, 0)
        try:
            with pytest.raises(errors.NoStore, match="a store is for the user who made it, alone"):
                open_transport(folder, create=create)
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o700)


# A file system that other machines share


def mounted_as(kind: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the system's list of mounts says that `path` is on that kind of file system."""
    device = os.stat(path).st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 27 0:9999 / /proc rw,relatime - proc proc rw\n"
        f"41 27 {os.major(device)}:{os.minor(device)} /a /srv\\040b rw shared:1 master:2 - "
        f"{kind} server:/export rw,vers=4.2\n"
    )
    monkeypatch.setattr(place, "MOUNTS", str(mounts))


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "ceph", "afs"])
def test_on_a_network_file_system_no_store_is_made_or_written(
    kind: str, tmp_path: Path, store_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = str(tmp_path / "old")
    store = Store(old, create=True)
    store.append(Append("t"))
    store.close()
    mounted_as(kind, str(tmp_path), tmp_path, monkeypatch)
    for options in ({"create": True}, {"create": True, "exclusive": True}):
        with pytest.raises(NotAStore, match=rf"network file system \({kind}\), where a second"):
            Store(os.path.join(store_dir, "below"), **options)
    assert not os.path.exists(store_dir)
    with pytest.raises(NotAStore, match="network file system"):
        Store(old, exclusive=True)
    with pytest.raises(errors.XsError, match="network file system"):
        xs.open(old).append("t", "x")
    assert len(list(xs.open(old).cat())) == 1  # what is there can be read, and taken elsewhere


@pytest.mark.parametrize("kind", ["ext4", "btrfs", "tmpfs", "overlay", "9p", "fuseblk"])
def test_a_disk_of_this_machine_s_own_is_no_network_s(
    kind: str, tmp_path: Path, store_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted_as(kind, str(tmp_path), tmp_path, monkeypatch)
    assert place.kind_of_file_system(str(tmp_path)) == kind
    xs.open(store_dir).append("t", "x")


def test_the_kind_of_a_file_system_is_what_the_system_says(tmp_path: Path) -> None:
    kind = place.kind_of_file_system(str(tmp_path))
    if sys.platform == "linux":
        with open("/proc/filesystems", encoding="ascii") as known:
            assert kind is None or kind.partition(".")[0] in known.read().split()
        assert place.kind_of_file_system("/proc") == "proc"
    else:
        assert kind is None


def test_without_a_list_of_mounts_a_store_is_written_all_the_same(
    store_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "MOUNTS", os.path.join(store_dir, "none"))
    xs.open(store_dir).append("t", "x")


# A copy that was made with cp


def test_a_copy_of_a_store_that_nobody_writes_to_is_a_store_of_its_own(
    server: Server, tmp_path: Path, run_xs: RunXs
) -> None:
    for _ in range(3):
        assert run_xs(["append", server.directory, "t"], stdin=b"k" * 20_000).returncode == 0
    copy = str(tmp_path / "copy")
    subprocess.run(["cp", "-R", server.directory, copy], check=True)  # its socket, its lock too
    assert run_xs(["append", copy, "u"]).returncode == 0
    assert [f["topic"] for f in lines(run_xs(["cat", copy]).stdout)] == ["xs.start", *"tttu"]
    assert run_xs(["check", copy]).returncode == 0
    topics = [f["topic"] for f in lines(run_xs(["cat", server.directory]).stdout)]
    assert topics == ["xs.start", *"ttt"]


def test_a_copy_made_amid_writes_is_told_to_be_one(
    store_dir: str, tmp_path: Path, run_xs: RunXs
) -> None:
    """The database as it was before its log was folded back, with the log from after that."""
    store = Store(store_dir, exclusive=True, create=True)
    copy = tmp_path / "copy"
    copy.mkdir()

    def write() -> None:
        for number in range(150):
            store.append(Append(f"t{number % 50}.x", meta=json.dumps("m" * 1000)))

    write()
    shutil.copyfile(os.path.join(store_dir, "xs.db"), copy / "xs.db")
    write()
    store.database.writing().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    write()
    shutil.copyfile(os.path.join(store_dir, "xs.db-wal"), copy / "xs.db-wal")
    store.close()
    assert "a copy of a store that was in use may be so" in refused(run_xs, "cat", str(copy))
    checked = run_xs(["check", str(copy)])
    assert checked.returncode == 1
    assert any("may be so" in str(line) for line in lines(checked.stdout))
    assert run_xs(["check", store_dir]).returncode == 0


def test_a_copy_that_lacks_a_content_names_it(
    store_dir: str, kept: dict[str, object], tmp_path: Path, run_xs: RunXs
) -> None:
    copy = str(tmp_path / "copy")
    shutil.copytree(store_dir, copy, ignore=shutil.ignore_patterns("??"))
    checked = run_xs(["check", copy])
    assert checked.returncode == 1
    assert lines(checked.stdout)[0] == {"problem": f"no content {kept['hash']}"}
    assert str(kept["hash"]) in refused(run_xs, "cas", copy, str(kept["hash"]))


# Wrong addresses


class Site(http.server.BaseHTTPRequestHandler):
    status, kind = 200, "text/html; charset=utf-8"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Type", self.kind)
        self.send_header("Content-Length", "13")
        self.end_headers()
        self.wfile.write(b"<h1>Hello</h1>"[:13])

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("status", [200, 301, 404, 500])
def test_a_web_site_is_told_from_a_store(run_xs: RunXs, status: int) -> None:
    kind = type("Kind", (Site,), {"status": status})
    with http.server.HTTPServer(("127.0.0.1", 0), kind) as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.02,))
        thread.start()
        where = f"127.0.0.1:{site.server_port}"
        try:
            for arguments in (["cat", where], ["append", where, "t"], ["version", where]):
                said = refused(run_xs, *arguments)
                assert f"no xs server is at {where}: what answers there is a web site" in said
        finally:
            site.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [200, 204])
@pytest.mark.parametrize("kind", ["application/json", "application/x-ndjson", "text/plain"])
def test_another_program_that_says_yes_to_everything_is_told_from_a_store(
    run_xs: RunXs, status: int, kind: str
) -> None:
    other = type("Other", (Site,), {"status": status, "kind": kind})
    with http.server.HTTPServer(("127.0.0.1", 0), other) as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.02,))
        thread.start()
        where = f"127.0.0.1:{site.server_port}"
        try:
            for arguments in (["cat", where], ["append", where, "t"], ["last", where]):
                said = refused(run_xs, *arguments)
                assert f"no xs server is at {where}: what answers there is another program" in said
        finally:
            site.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "hello", [b"SSH-2.0-OpenSSH_9\r\n", b"\x15\x03\x01\x00\x02\x02\x16", b"+OK"]
)
def test_a_port_of_another_program_is_told_from_a_store(run_xs: RunXs, hello: bytes) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        where = f"127.0.0.1:{listener.getsockname()[1]}"

        greeted = []

        def greet() -> None:
            while True:
                try:
                    greeted.append(listener.accept()[0])
                except OSError:
                    return
                greeted[-1].sendall(hello)

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            said = refused(run_xs, "cat", where)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for peer in greeted:
                peer.close()
    assert f"no xs server is at {where}" in said


def test_the_parts_of_a_store_are_no_addresses(store_dir: str, run_xs: RunXs) -> None:
    assert run_xs(["append", store_dir, "t"]).returncode == 0
    said = refused(run_xs, "cat", f"{store_dir}/xs.db")
    assert "it is a file, and a store is a directory" in said
    said = refused(run_xs, "cat", f"{store_dir}/sock")  # no server made it
    assert f"no server listens on {store_dir}/sock" in said
    said = refused(run_xs, "cat", f"{store_dir}-2/sock")
    assert f"make one with `xs serve {store_dir}-2` or" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["append", "~/store", "t"],
        ["serve", "~/store"],
        ["serve", "~"],
        ["serve", "STORE", "--log-file", "~/log"],
        ["serve", "STORE", "--tls-cert", "~/pem"],
        ["export", "STORE", "~/out"],
        ["import", "STORE", "~out"],
        ["store", "add", "STORE", "~/other"],
    ],
    ids=" ".join,
)
def test_a_tilde_that_no_shell_has_expanded_becomes_no_name(
    store_dir: str, tmp_path: Path, arguments: list[str]
) -> None:
    Store(store_dir, create=True).close()
    before = sorted(map(str, tmp_path.rglob("*")))
    command = [store_dir if word == "STORE" else word for word in arguments]
    done = subprocess.run(
        [*XS, *command],
        cwd=tmp_path,
        input=b"x",
        env=environment(),
        capture_output=True,
        timeout=DEADLINE,
    )
    assert done.returncode in (1, 2)
    assert b"has a literal ~" in done.stderr and done.stderr.count(b"\n") == 1
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("form", ["directory", "socket"])
def test_a_path_longer_than_a_socket_s_may_be_is_served_and_reached(
    tmp_path: Path, run_xs: RunXs, form: str
) -> None:
    folder = tmp_path / ("d" * 120) / ("ö" * 100)
    folder.parent.mkdir()
    os.symlink(folder.parent, tmp_path / "short")  # by which the tests' own client reaches it
    process = subprocess.Popen(
        [*XS, "serve", str(folder)],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"serving ")
        address = str(folder if form == "directory" else folder / "sock")
        assert run_xs(["append", address, "t"], stdin=b"x").returncode == 0
        assert [f["topic"] for f in lines(run_xs(["cat", address]).stdout)] == ["xs.start", "t"]
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE)


# Very many contents

FILES = int(os.environ.get("XS_TEST_FILES", "4000"))  # 1,000,000 shows the same, in minutes

OPENED = """
import sys
from xs.commit import Append
from xs.store import Store

listed = []
sys.addaudithook(
    lambda event, args: listed.append(args[0]) if event in ("os.listdir", "os.scandir") else None
)
store = Store(sys.argv[1], exclusive=True)
store.append(Append("t"))
problems = [found for found in store.check() if isinstance(found, str)]
store.close()
assert not problems, problems
print("\\n".join(str(path) for path in listed))
"""


def fill(store_dir: str, count: int) -> None:
    """That many contents in `cas/` that no frame names, as a crash amid a long input leaves."""
    cas = os.path.join(store_dir, "cas")
    for number in range(count):
        name = f"{number % 256:02x}/{number:062x}"
        if number < 256:
            os.makedirs(os.path.join(cas, name[:2]), exist_ok=True)
        with open(os.path.join(cas, name), "xb"):
            pass


def test_a_start_and_a_check_list_no_contents(store_dir: str, kept: dict[str, object]) -> None:
    fill(store_dir, 512)
    done = subprocess.run(
        [sys.executable, "-c", OPENED, store_dir],
        env=environment(),
        capture_output=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    listed = [Path(line) for line in done.stdout.decode().splitlines()]
    cas = Path(store_dir) / "cas"
    assert cas in listed  # for what writers have left behind
    assert not [path for path in listed if cas in path.parents]


def test_a_gc_of_very_many_contents_holds_the_names_of_one_folder_at_most(store_dir: str) -> None:
    store = Store(store_dir, exclusive=True, create=True)
    fill(store_dir, FILES)
    one_folder = FILES // 256 * 200 + 100_000  # bytes: its names, and what a commit takes
    tracemalloc.start()
    try:
        digests = Cas(os.path.join(store_dir, "cas")).digests()
        assert sum(1 for _ in digests) == FILES
        assert tracemalloc.get_traced_memory()[1] < one_folder
    finally:
        tracemalloc.stop()
    tracemalloc.start()
    try:
        store.gc(age_seconds=1e9)  # none is so old
        assert tracemalloc.get_traced_memory()[1] < one_folder
    finally:
        tracemalloc.stop()
        store.close()
