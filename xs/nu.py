"""Nushell: finding it, and the commands that run a script or keep a closure running.

What runs in Nushell itself is beside this module: `run_script.nu` and `run_handler.nu`, with the
commands of `xs.nu`. They are placed in a folder with the script, and mark their lines on standard
output, because a script's own `print` goes there too. Knows no topics.
"""

from __future__ import annotations

import binascii
import json
import os
import subprocess

from xs.errors import NoNushell
from xs.process import INPUT, Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

OLDEST = (0, 109, 1)  # its `http` commands know Unix sockets
_PIPEFAIL = (0, 115)  # from here on an external command that fails is an error wherever it stands
_VERSION_SECONDS = 20.0  # for `nu --version`, on a machine that has a lot to do
_HERE = os.path.dirname(os.path.abspath(__file__))

# Kinds of what a script yields (run_script.nu): of these the pieces make one value …
TEXT, BINARY = b"string (stream)", b"binary (stream)"
BYTE_STREAM = b"byte stream"  # … and this follows as it is

MARK = "XS_MARK"
_BOM = b"\xef\xbb\xbf"


def _runner(name: str) -> bytes:
    """What runs in Nushell, with the path of the module that it uses."""
    with open(os.path.join(_HERE, name), "rb") as file:
        text = file.read()
    module = os.path.join(_HERE, "xs.nu").replace("\\", "\\\\").replace('"', '\\"')
    return text.replace(b"use xs.nu *", f'use "{module}" *'.encode("utf-8", "surrogateescape"), 1)


_RUN_SCRIPT, _RUN_HANDLER = _runner("run_script.nu"), _runner("run_handler.nu")


def script(text: bytes, input_: str) -> Command:
    """Runs a script; `input_` is "none", "bytes" or "frame". Raises `NoNushell`."""
    input_at = None if input_ == "none" else INPUT
    return _command(_RUN_SCRIPT, input_, {"script.nu": _bare(text)}, input_at)


def handler(text: bytes, *, stateful: bool) -> Command:
    """Keeps a closure running. Raises `NoNushell`."""
    text = _bare(text)
    # A place for a closure and nothing else: what Nushell knows to be none is found before any of
    # it runs. What an external command yields, for one, it can't know.
    typed = b"def handler []: nothing -> closure {\n" + text + b"\n}\n"
    files = {"script.nu": text, "typed.nu": typed}
    kind = "stateful" if stateful else "stateless"
    return _command(_RUN_HANDLER, kind, files, INPUT)


def _bare(text: bytes) -> bytes:
    """Without a byte order mark, which Nushell takes for the beginning of a command's name."""
    return text[len(_BOM) :] if text.startswith(_BOM) else text


def content_of(said: bytes) -> bytes:
    """What a value is as content, by its line (run_script.nu): its bytes, its text, or JSON."""
    if said[:1] == b"B":
        return binascii.a2b_base64(said[1:])
    if said[:1] == b"J":
        return said[1:]
    if b"\\" not in said:  # nothing is escaped: what stands between the quotes
        return said[2:-1]
    return str(json.loads(said[1:])).encode("utf-8", "replace")


def _command(
    runner: bytes,
    argument: str,
    files: dict[str, bytes],
    input_at: Optional[int],
) -> Command:
    mark = os.urandom(16).hex()
    path, version = _find()
    pipefail = ["--experimental-options", "[pipefail]"] if version < _PIPEFAIL else []
    words = [path, "-n", *pipefail, "{folder}/main.nu", argument]
    # Beside the script, which it finds by the name alone: an include path can't have a colon, and
    # of a link Nushell takes the place that it leads to.
    files = {**files, "main.nu": runner}
    return Command(words, files, {MARK: mark}, input_at, mark.encode())


def find() -> str:
    """The path of `nu`: `XS_NU`, or what is on the PATH. Raises `NoNushell`."""
    return _find()[0]


_good: dict[tuple[str, int], tuple[int, ...]] = {}  # path, time of change → version, if usable


def _find() -> tuple[str, tuple[int, ...]]:
    path = os.environ.get("XS_NU")
    if not path:
        import shutil  # here: see `process._remove`

        path = shutil.which("nu")
    if path is None:
        raise NoNushell(
            "Nushell is not installed: get it from https://www.nushell.sh (the program nu, "
            f"{_text(OLDEST)} or newer), or begin the script with #! to run it by another program"
        )
    try:
        key = (path, os.stat(path).st_mtime_ns)
    except OSError as error:
        raise NoNushell(f"Nushell can't be run: {path}: {error.strerror}") from None
    if key not in _good:
        _good[key] = _usable_version(path)
    return path, _good[key]


def _usable_version(path: str) -> tuple[int, ...]:
    """Raises `NoNushell` unless that program is a Nushell that can be used."""
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_VERSION_SECONDS,
        )
        words = done.stdout.decode("ascii", "replace").split()[0].split("-")[0].split(".")
        version = tuple(int(word) for word in words)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        raise NoNushell(f"{path} is not Nushell, or can't be run") from None
    if version < OLDEST:
        raise NoNushell(
            f"Nushell {_text(version)} at {path} is too old: xs needs {_text(OLDEST)} or newer "
            "(its http commands know Unix sockets)"
        )
    return version


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
