"""The architecture, as a table that is held to be true: arrows point one way.

The modules are read, not imported: a lazy import, and one that only a type checker sees, is an
arrow like any other.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent

# Each module of xs/, from the ground up, and the modules of xs that it may import: those before the
# bar when it is imported itself, those after it only once they are needed (inside a function), and
# those in parentheses for their types alone.
ARCHITECTURE = {
    # what everybody may know
    "version":     "",
    "system":      "",
    "errors":      "",
    "records":     "",
    "fault":       "system",
    "threads":     "",
    "ids":         "errors system",
    "frame":       "errors ids records",
    "sums":        "",
    "meta":        "errors",
    "times":       "",
    "query":       "errors ids frame records | times",
    "http1":       "",
    "framing":     "http1",
    "terminal":    "",
    # what lies on the disk, and what is live
    "lock":        "errors system",
    "place":       "errors system",
    "disk":        "errors",
    "content":     "errors frame system",
    "cas":         "errors fault frame content disk",
    "sqlite":      "",
    "schema":      "errors records sums sqlite system | fault",
    "rows":        "errors ids frame sums schema | content",
    "scan":        "frame records sqlite schema rows",
    "walk":        "errors frame records sums sqlite schema rows scan (connections)",
    "pieces":      "errors ids frame records schema rows (writer)",
    "alike":       "sums schema",
    "writer":      "errors fault ids frame records sums sqlite schema rows | scan alike (content)",
    "removal":     "errors ids frame records schema rows | pieces (writer)",
    "wal":         "errors records disk schema",
    "still":       "errors",
    "connections": "errors sqlite schema system | place still wal",
    "places":      "schema rows",
    "index":       "errors frame schema rows scan connections | pieces places walk",
    "check":       "errors ids frame content schema rows pieces index (cas)",
    "bus":         "records (frame)",
    "snapshot":    "errors fault ids frame content schema still connections index check",
    "salvage":     "records sums schema still",
    "commit":      "errors fault ids frame records content writer | pieces removal (store)",
    "work":        "errors content commit",
    "bulk":        "errors fault frame records content schema commit work",
    "imports":     "errors fault ids frame records content schema pieces writer commit work",
    "runsteps":    "errors fault ids frame records content schema pieces writer work (commit)",
    "claim":       "fault",
    "runs":        "errors threads fault frame content commit work runsteps | meta claim",
    "committer":   "errors fault ids frame lock schema writer commit | threads disk creation runs "
                   "runsteps (content work store)",
    "group":       "errors | threads (content work commit committer)",
    "expiry":      "errors threads work (commit store)",
    "garbage":     "fault claim work (commit store)",
    "creation":    "errors fault lock place cas disk schema connections",
    "store":       "errors ids frame place connections system | index lock content cas bus work "
                   "disk runs runsteps check committer group expiry garbage creation "
                   "(schema commit)",
    # the store as a service: functions, then sockets
    "reader":      "errors ids frame records times schema | content (query store)",
    "batch":       "errors ids frame meta content commit work bulk imports store",
    "chunked":     "errors threads ids frame records content schema pieces commit runsteps runs "
                   "store",
    # the log, which all that serves may write to
    "log":         "errors threads records terminal times",
    # scripts: processes, what comes out of them, what that means on the stream
    "process":     "errors threads records",
    "pipes":       "errors process terminal",
    "nu":          "errors process",
    "evaluation":  "errors nu pipes process",
    "runner":      "errors threads ids frame meta records log schema commit work store process "
                   "pipes",
    "generators":  "errors ids frame meta records log schema commit work bulk process runner nu",
    "effects":     "errors fault ids frame meta records content schema commit work bulk runsteps "
                   "runs runner (cas)",
    "intake":      "errors ids frame schema store reader runner",
    "handlers":    "errors fault ids frame meta records log schema commit work bulk reader "
                   "process runner effects intake nu",
    "scripts":     "errors threads ids frame times log store process runner generators handlers "
                   "evaluation (bus)",
    # requests, and what answers them
    "rights":      "errors frame records",
    "tokens":      "errors fault frame place disk rights",
    "messages":    "errors ids frame (work reader scripts rights)",
    "operations":  "errors ids messages | times imports batch garbage process chunked "
                   "(commit work store scripts)",
    "api":         "errors ids frame store messages | meta alike content query commit work removal "
                   "reader version batch check chunked garbage places process walk operations "
                   "(rights)",
    "sockets":     "errors",
    "access":      "errors http1 rights",
    "delivery":    "errors threads frame framing sockets store reader (bus)",
    "crowd":       "errors threads http1 content work store",
    "outbox":      "threads work",
    "body":        "errors framing http1 sockets",
    "grants":      "access",
    "activation":  "errors records sockets",
    "listener":    "threads http1 log sockets",
    "following":   "errors threads framing store reader delivery outbox",
    "responses":   "times http1 version messages",
    "lookups":     "errors ids frame (http1 store)",
    "repeats":     "http1 commit messages api",
    "httpd":       "errors framing http1 log content commit work store reader scripts messages "
                   "api sockets rights access grants body crowd delivery outbox following "
                   "responses lookups repeats listener",
    "hangups":     "threads sockets",
    "exchange":    "errors frame records times http1",
    "answers":     "errors threads ids frame schema commit work store exchange (bus)",
    "door":        "errors ids times framing http1 log content commit sockets listener exchange "
                   "answers (gateway)",
    "certificate": "errors",
    "gateway":     "errors frame http1 log content commit work store chunked activation address "
                   "tokens access listener hangups exchange answers door | certificate",
    "mount":       "disk errors log meta connections commit store scripts sockets activation "
                   "access address tokens crowd delivery listener httpd version | gateway",
    "asked":       "errors schema activation address",
    "stores":      "errors threads ids frame meta times log schema commit store asked generators "
                   "httpd mount",
    "notify":      "threads log",
    "signals":     "threads",
    "liveness":    "errors commit work store transport",
    "server":      "errors log connections sockets activation asked listener httpd mount stores "
                   "notify signals liveness | address gateway",
    # the other end: an address is a transport, over a socket or right on the files
    "request":     "errors system | ids",
    "transport":   "errors framing http1 request system",
    "forward":     "errors ids frame cas content batch commit imports runsteps work bulk "
                   "request transport",
    "local":       "errors ids frame store messages api request system | lock bulk imports "
                   "runsteps transport forward (reader work)",
    "address":     "errors system | transport local (request)",
    "client":      "errors request | frame",
    # what a person or a program starts
    "stdio":       "errors request system | terminal",
    "arguments":   "errors address system (request)",
    "help":        "(arguments)",
    "completion":  "errors (arguments)",
    "idfields":    "errors ids request stdio",
    "service":     "errors records lock terminal",
    "serving":     "errors log address service stdio arguments | activation gateway mount server",
    "ndjson":      "errors frame request stdio terminal | meta (arguments)",
    "transfer":    "errors fault frame place content disk address request stdio terminal ndjson "
                   "(arguments)",
    "backup":      "errors fault lock place cas disk schema connections index snapshot creation "
                   "address terminal",
    "repair":      "errors fault ids frame cas content disk schema rows pieces connections commit "
                   "work imports lock place creation store batch salvage wal address",
    "storing":     "errors address request transport stdio arguments",
    "issuing":     "errors address stdio tokens arguments",
    "autoload":    "errors | nu",
    "commands":    "errors request stdio arguments system | query serving issuing version "
                   "idfields ndjson transfer backup repair storing autoload completion terminal",
    "cli":         "errors address stdio arguments commands system | version help terminal threads",
    "__init__":    "| version errors frame address client",
    "__main__":    "cli",
}  # fmt: skip

# Starting is part of the command line's speed: what it takes to say "append" to a server imports at
# module level these of the standard library, and nothing else. (_socket is what `socket` wraps.)
HOT_PATH = ("__init__", "cli", "commands", "arguments", "stdio", "address", "request", "transport")
HOT_PATH += ("http1", "framing", "errors", "system")
CHEAP = ("sys", "gc", "_socket", "_thread")
# … nor do those bring in, by any detour, one of these (each 1.5 to 20 ms; bench: start-up).
DEAR = ("argparse", "asyncio", "collections", "dataclasses", "enum", "functools", "json", "logging")
DEAR += (
    "os",
    "pathlib",
    "re",
    "scru128",
    "socket",
    "sqlite3",
    "threading",
    "typing",
    "urllib.parse",
)

# The store and what is below it: no word of HTTP in its names or strings.
BELOW_HTTP = ("ids", "frame", "disk", "content", "cas", "rows", "scan", "walk", "pieces", "alike")
BELOW_HTTP += ("writer", "removal", "connections", "index", "check", "bus", "commit", "work")
BELOW_HTTP += ("bulk", "runsteps", "imports", "claim", "runs", "committer", "group", "expiry")
BELOW_HTTP += ("garbage", "creation", "store")
THE_ONES_WITH_SQL = ("sqlite", "schema", "rows", "scan", "walk", "pieces", "alike", "writer")
THE_ONES_WITH_SQL += ("removal", "wal", "connections", "places", "index", "check", "snapshot")
THE_ONES_WITH_SQL += ("salvage",)


# What of it xs uses; a new name here is a decision.
STANDARD_LIBRARY = frozenset(
    """
    __future__ _collections _functools _json _sha2 _sha256 _signal _socket _sqlite3 _thread
    _weakref atexit binascii bisect codecs collections contextlib datetime decimal difflib errno
    faulthandler fcntl functools gc hashlib heapq hmac ipaddress itertools json mmap operator os
    plistlib posix pwd re resource secrets select selectors shlex shutil signal socket socketserver
    sqlite3 ssl stat struct subprocess sys tempfile threading time traceback types typing zlib
    """.split()  # noqa: SIM905
)


class Import(NamedTuple):
    """One imported module, and when: "start" (with its importer), "later", or never ("types")."""

    module: str
    when: str
    line: int


MODULES = sorted(path.stem for path in (ROOT / "xs").glob("*.py"))


@functools.cache
def tree(module: str) -> ast.Module:
    path = ROOT / "xs" / f"{module}.py"
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(node: ast.AST, when: str = "start") -> Iterator[Import]:
    """What `node` imports, with modules of xs as `xs.NAME` (the package itself: `xs.__init__`)."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.body:
            yield from imports(child, "types")
        for child in node.orelse:
            yield from imports(child, when)
        return
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        when = "later"
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = "xs" if node.level else ""
        base += f".{node.module}" if base and node.module else node.module or ""
        names = [f"xs.{alias.name}" for alias in node.names] if base == "xs" else [base]
    else:
        names = []
        for child in ast.iter_child_nodes(node):
            yield from imports(child, when)
    for name in names:
        if name == "xs" or (name.startswith("xs.") and name.split(".")[1] not in ARCHITECTURE):
            name = "xs.__init__"  # what the package offers to its users
        yield Import(name, when, getattr(node, "lineno", 0))


def allowed(module: str, when: str) -> set[str]:
    """What `module` may import of xs by then: "start", "later" or "types"."""
    row = ARCHITECTURE[module]
    if when == "start":
        row = row.partition("|")[0]
    if when != "types":
        row = re.sub(r"\(.*?\)", "", row)
    return set(re.findall(r"\w+", row))


def strings_and_names(module: str) -> Iterator[tuple[int, str]]:
    """Each name and string of a module with its line; docstrings are prose, and left out."""
    nodes = list(ast.walk(tree(module)))
    prose = {
        id(node.value)
        for node in nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in nodes:
        if isinstance(node, ast.Constant) and id(node) not in prose:
            if isinstance(node.value, (str, bytes)):
                text = node.value
                yield node.lineno, text if isinstance(text, str) else text.decode("latin-1")
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def test_each_module_has_its_place_in_the_architecture() -> None:
    assert sorted(ARCHITECTURE) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_architecture_lets_it(module: str) -> None:
    for found in imports(tree(module)):
        package, _, name = found.module.partition(".")
        if package == "xs":
            may = allowed(module, found.when)
            assert name in may, f"xs/{module}.py, line {found.line}, imports xs.{name}"


def test_no_arrow_leads_back() -> None:
    arrows = {module: allowed(module, "later") for module in ARCHITECTURE}
    while arrows:
        grounded = [module for module, targets in arrows.items() if not targets & set(arrows)]
        assert grounded, f"a circle among {sorted(arrows)}"
        for module in grounded:
            del arrows[module]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_needs_the_standard_library_and_scru128_alone(module: str) -> None:
    for found in imports(tree(module)):
        package = found.module.partition(".")[0]
        known = {*STANDARD_LIBRARY, "xs", "scru128"}
        assert package in known, f"xs/{module}.py, line {found.line}: {found.module}"


@pytest.mark.parametrize("module", [m for m in MODULES if m in HOT_PATH])
def test_the_hot_path_imports_only_what_is_cheap(module: str) -> None:
    for found in imports(tree(module)):
        if found.when == "start" and found.module != "__future__":
            cheap = {*CHEAP, *(f"xs.{other}" for other in HOT_PATH)}
            assert found.module in cheap, f"xs/{module}.py, line {found.line}: {found.module}"


def test_the_hot_path_brings_in_nothing_dear_by_any_detour() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import xs.cli; print(*sys.modules)"
    bare = [sys.executable, "-I", "-S", "-c"]
    loaded = subprocess.run([*bare, code, str(ROOT)], capture_output=True, text=True, check=True)
    before = subprocess.run(
        [*bare, "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    brought = set(loaded.stdout.split()) - set(before.stdout.split())
    assert brought & set(DEAR) == set()


@pytest.mark.parametrize("module", [m for m in MODULES if m in BELOW_HTTP])
def test_the_store_and_what_is_below_knows_no_http(module: str) -> None:
    for line, text in strings_and_names(module):
        assert "http" not in text.lower(), f"xs/{module}.py, line {line}: {text}"


@pytest.mark.parametrize("module", [m for m in MODULES if m not in THE_ONES_WITH_SQL])
def test_only_the_index_knows_sql(module: str) -> None:
    for found in imports(tree(module)):
        way = found.module in ("sqlite3", "_sqlite3", "xs.sqlite")
        assert not way, f"xs/{module}.py, line {found.line}, imports {found.module}"
    statement = re.compile(
        r"\b(SELECT\b.*\bFROM|INSERT\s+(OR\s+\w+\s+)?INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM|"
        r"(CREATE|DROP|ALTER)\s+(TABLE|INDEX)|PRAGMA\s|BEGIN\s+(IMMEDIATE|EXCLUSIVE))",
        re.DOTALL,
    )
    for line, text in strings_and_names(module):
        assert not statement.search(text), f"xs/{module}.py, line {line}: {text}"


# ---- The repository ----------------------------------------------------------------------------


def files_of_the_repository() -> list[Path]:
    """What git tracks, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_folder_of_one_machine_or_a_registrys_host() -> None:
    # Each is broken by a bracket, so that this file is not the one that names it.
    unwanted = re.compile(
        r"(?<![\w.~})…*-])/(work|root|home|Users)/|pypi[.]org|pythonhosted[.]|npmjs[.]|crates[.]io"
        r"|proxy[.]golang|maven[.](org|apache)|debian[.]org"
    )
    wrong = []
    for path in files_of_the_repository():
        text = path.read_bytes().decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if found := unwanted.search(line):
                wrong.append(f"{path.relative_to(ROOT)}, line {number}: {found[0]}")
    assert wrong == []
