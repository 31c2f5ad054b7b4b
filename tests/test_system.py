"""What stands in for `os` in a command: the same as `os`, in a process that has not loaded that."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, XS, environment

ROOT = Path(__file__).resolve().parent.parent

_BEGIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from xs.system import os
assert "os" not in sys.modules
"""

# Expressions over `os` alone, which are to have the same value there; those that need the real one
# for it come last.
_SAME = [
    "[os.O_RDWR, os.O_CREAT, os.O_NOFOLLOW, os.W_OK, os.R_OK, os.EX_OK]",
    "sorted(os.environ.items())",
    "[os.environ.get('ODD'), os.environ.get('XS_NO_SUCH'), 'ODD' in os.environ]",
    "[list(os.fsencode(t)) for t in ('', 'a', '\\xe9\\u20ac', '\\udcff')]",
    "[os.fsdecode(t) for t in (b'', b'a', b'\\xc3\\xa9', b'\\xff', 'text')]",
    "[os.path.exists(p) for p in ('.', 'none', 'file', 'file/x', 'dangling', 'a\\0b', '')]",
    "[os.stat(p).st_mode for p in ('.', 'file', 'folder')]",
    "len(os.urandom(12))",
    "[os.path.basename('a/b'), os.path.isdir('folder'), os.path.islink('dangling'), os.sep]",
    "os.path.realpath('dangling')",
]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    return tmp_path


def both(code: str, here: Path) -> tuple[Any, Any]:
    """What an expression over `os` is with the stand-in, and with `os` itself."""
    found = []
    for begin in (_BEGIN, "import os"):
        # `json` would bring `os`, so it comes last.
        program = f"{begin}\nfound = {code}\nimport json\nprint(json.dumps(found))"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program],
            cwd=here,
            env={**os.environ, "ODD": os.fsdecode(b"\xff \xc3\xa9")},
            capture_output=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    return found[0], found[1]


@pytest.mark.parametrize("code", _SAME)
def test_the_stand_in_gives_what_os_gives(code: str, here: Path) -> None:
    ours, theirs = both(code, here)
    assert ours == theirs


def test_paths_are_joined_and_made_absolute_as_os_does(here: Path) -> None:
    chosen = random.Random(5)
    parts = ["", "a", "b.c", ".", "..", "/", "//", "/a", "a/", "./", "é", "..."]
    paths = ["".join(chosen.choices([*parts, "/"], k=chosen.randrange(7))) for _ in range(500)]
    paths += ["//", "///", "//a/../..", "/..", "../../../../../../../../x", "./store"]
    pairs = [chosen.choices(paths, k=chosen.choice([1, 2, 3])) for _ in range(500)]
    code = f"[[os.path.abspath(p) for p in {paths!r}], [os.path.join(*p) for p in {pairs!r}]]"
    for place in (here, Path("/")):
        ours, theirs = both(code, place)
        assert ours == theirs


def test_a_store_may_be_named_from_the_root_of_all_folders(store_dir: str) -> None:
    """As services do, whose own folder that is; and two slashes make no host of what follows."""
    for path in (store_dir[1:], "/" + store_dir, f".//{store_dir[1:]}/."):
        for words in (["append", path, "t"], ["last", path]):
            done = subprocess.run(
                [*XS, *words], cwd="/", env=environment(), capture_output=True, timeout=DEADLINE
            )
            assert (done.returncode, done.stderr) == (0, b"")


def test_where_os_is_loaded_it_is_taken() -> None:
    from xs import system

    assert system.os is os
