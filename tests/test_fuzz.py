"""The parsers of what strangers send, with bytes that nobody thought of.

`tools/fuzz` does it for long; what it has found stays here, with its bytes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment
from fuzz_targets import TARGETS, mutated

ROOT = Path(__file__).resolve().parent.parent
INPUTS = 4000  # for each target; about a second for the slowest

# Each broke a promise once.
FOUND = {
    "a pattern of any length was repeated whole": ("query", b"topic=a." + b"9" * 4000 + b"*"),
    "a topic was repeated with each byte written out": ("frame", b"\xd3" * 255),
    "a parameter given twice was repeated raw, with its line ends": (
        "query",
        b"lastJ\nJ=3&lastJ\nJ=3",
    ),
    "a parameter given twice was repeated whole": ("query", (b"x" * 3000 + b"=1&") * 2),
    "half an empty line before a request, which h11 refuses": ("request", b"\r"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name: str) -> None:
    target, data = FOUND[name]
    TARGETS[target].check(data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_keep_what_is_promised(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].check(seed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", TARGETS)
def test_bytes_by_chance_keep_what_is_promised(name: str, seed: int) -> None:
    for data in mutated(TARGETS[name], seed, INPUTS):
        try:
            TARGETS[name].check(data)
        except Exception as error:
            raise AssertionError(f"{name}: {data!r} (seed {seed})") from error


def test_the_same_seed_makes_the_same_bytes() -> None:
    target = TARGETS["request"]
    assert list(mutated(target, 7, 50)) == list(mutated(target, 7, 50))
    assert list(mutated(target, 7, 50)) != list(mutated(target, 8, 50))


def test_the_tool_runs_by_chance_where_there_is_no_atheris() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "_fuzz.py"), "0.2", "meta", "query"],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    said = done.stdout.decode()
    assert done.returncode == 0, said
    assert "by chance alone" in said and "meta: ok: " in said and "query: ok: " in said
