"""xs.nu for people: what `xs nu` prints, and where `xs nu --install` puts it.

Nushell reads the files of its autoload folder into each session, private commands and all. So what
goes there is xs.nu as a module in a file, used at its end; a script can `use` the same file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

from xs import errors

_ASK_SECONDS = 20.0  # for Nushell to say where that folder is, on a machine that has a lot to do
_BEFORE = b"# Put here by `xs nu --install`, which brings it up to date, too.\n\nmodule xs {\n"
_AFTER = b"}\nexport use xs *\n"


def module() -> bytes:
    """The text of xs.nu."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "xs.nu")
    with open(path, "rb") as file:
        return file.read()


def install() -> str:
    """Puts xs.nu where Nushell loads it by itself; the file's path.

    Raises `NoNushell` for a Nushell that is too old, `XsError` where the file can't be written.
    """
    path = os.path.join(_folder(), "xs.nu")
    new = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(new, "wb") as file:
            file.write(_BEFORE + module() + _AFTER)
        os.replace(new, path)  # a Nushell that starts meanwhile reads the old one or the new one
    except OSError as error:
        raise errors.XsError(f"can't write {path}: {error.strerror}") from None
    return path


def _folder() -> str:
    """The folder of what a user's sessions load: as Nushell says, or else as it documents."""
    if not (os.environ.get("XS_NU") or shutil.which("nu")):
        return os.path.join(_config_folder(), "nushell", "autoload")
    from xs import nu

    words = [nu.find(), "-n", "--no-std-lib", "-c", "$nu.user-autoload-dirs | to json --raw"]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_SECONDS
        )
        return str(json.loads(done.stdout)[0])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError):
        raise errors.XsError(f"{words[0]} does not say where its autoload folder is") from None


def _config_folder() -> str:
    given = os.environ.get("XDG_CONFIG_HOME") or ""
    if os.path.isabs(given):
        return given
    home = os.path.expanduser("~")
    if sys.platform == "darwin":
        return os.path.join(home, "Library", "Application Support")
    return os.path.join(home, ".config")
