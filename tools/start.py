"""What tools/xs becomes: the command line, on an interpreter started without site.py.

It puts the clone and its environment's packages on the path, which is all of site.py that xs needs.
"""

import sys

# The path as the caller knows it: tools/xs gives this file's absolute path.
_ROOT = sys.argv[0][: -len("/tools/start.py")]
_PACKAGES = "{}/.venv/lib/python{}.{}/site-packages".format(_ROOT, *sys.version_info[:2])


def _make_again() -> None:
    """The system's Python has become another version below .venv: make .venv again, and go on."""
    from os import execv, unlink

    unlink(_ROOT + "/.venv/ready")
    execv(_ROOT + "/tools/xs", [_ROOT + "/tools/xs", *sys.argv[1:]])


try:
    from posix import stat  # built in, where `os` costs half a millisecond

    stat(_PACKAGES)
except FileNotFoundError:
    _make_again()

# First, not last: `xs` is found without a look into the standard library's folders (0.15 ms).
sys.path[:0] = [_ROOT]
sys.path.append(_PACKAGES)

try:
    from xs.cli import main

    sys.exit(main())
except KeyboardInterrupt:  # before the command has begun
    sys.exit(130)
