"""Make an environment of this clone, or mend it, once: `environment.py FOLDER [EXTRA…]`.

FOLDER is below the clone. It gets what pyproject.toml names as needed at run time and for each
EXTRA, and `import xs` there is this clone. `FOLDER/ready` is written last and lists what was
installed, so what was broken off is seen and made again. Of several at once one works, while the
others wait for it. Words for a person go to standard error, and nothing goes to standard output.
"""

from __future__ import annotations

import ast
import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Settings of the user's pip and Python that would put packages elsewhere than into FOLDER.
LEADS_ASTRAY = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONHOME", "PYTHONPATH")


def requirements(pyproject: str, extras: list[str]) -> list[str]:
    """What pyproject.toml asks for at run time and for each of `extras`, as pip's arguments.

    TOML's lists of strings are read as Python's, since CPython 3.9 has no reader of TOML.
    """
    wanted = []
    for key in ["dependencies", *extras]:
        found = re.search(rf"^{re.escape(key)} = (\[.*?\])$", pyproject, re.MULTILINE | re.DOTALL)
        if found is None:
            raise SystemExit(f"xs: pyproject.toml has no list named {key!r}")
        wanted += ast.literal_eval(found[1])
    return wanted


def run(*command: str | Path) -> None:
    """Run it, silently if it works; if not, end with what it said."""
    environ = {k: v for k, v in os.environ.items() if k not in LEADS_ASTRAY}
    done = subprocess.run(
        [str(word) for word in command],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        sys.stderr.write(done.stdout.decode(errors="replace"))
        words = " ".join(str(word) for word in command[1:])
        raise SystemExit(f"xs: the environment could not be made: `python {words}` failed (above)")


def works(python: Path) -> bool:
    """Whether the environment's interpreter runs: the Python that it links to may have gone."""
    try:
        return subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 0
    except OSError:
        return False


def make(folder: Path, wanted: list[str]) -> None:
    """Bring `folder` to what is `wanted`. The caller holds its lock."""
    ready = folder / "ready"
    python = folder / "bin" / "python"
    text = "\n".join(wanted) + "\n"
    intact = ready.exists() and works(python)
    if intact and ready.read_text() == text:
        ready.touch()  # newer than pyproject.toml again
        return
    name = folder.relative_to(ROOT)
    version = sys.version.split()[0]
    doing = "bringing it up to date" if intact else f"making it with Python {version}, once"
    print(f"xs: environment {name}: {doing} …", file=sys.stderr, flush=True)
    # Not removed and made anew when it is intact: an `xs` that runs from it may yet import.
    ready.unlink(missing_ok=True)
    if not intact:
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", folder)
    run(python, "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check", *wanted)
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    # Relative (to site-packages), so that a clone that was moved still imports itself.
    up = os.path.relpath(ROOT, site_packages)
    (site_packages / "xs.pth").write_text(up + "\n")
    unfinished = folder / "ready.unfinished"
    unfinished.write_text(text)
    unfinished.rename(ready)


def main(name: str, *extras: str) -> None:
    wanted = requirements((ROOT / "pyproject.toml").read_text(encoding="utf-8"), list(extras))
    folder = ROOT / name
    try:
        lock_path = ROOT / ".cache" / f"{folder.name.lstrip('.')}.lock"
        lock_path.parent.mkdir(exist_ok=True)
        # A lock of the kernel's, not a file's existence: it ends with its holder in any case.
        with lock_path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"xs: waiting for another that makes {name} …", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            make(folder, wanted)
    except OSError as error:
        raise SystemExit(f"xs: the environment {name} could not be made: {error}") from None


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
