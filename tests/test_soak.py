"""A mixed load on many stores, for a short while: `tools/soak` does the same for ten minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 15
WITH_ALL_ELSE = 240  # seconds: before and after it stores are made, filled, checked and removed


@pytest.mark.timeout(WITH_ALL_ELSE + 20)
def test_under_a_mixed_load_on_twenty_stores_nothing_is_lost_and_nothing_grows() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "_soak.py"), str(SECONDS)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=WITH_ALL_ELSE,
    )
    said = done.stdout.decode()
    assert done.returncode == 0, said
    assert said.endswith("checked: each store is whole\n"), said
