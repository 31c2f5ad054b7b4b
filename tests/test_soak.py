"""A mixed load on many stores, for a short while: `tools/soak` does the same for ten minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 6
DAY = ("1", "6")  # hours, and the seconds in which they pass
CROWD = ("5", "200", "10", "1500")  # seconds, followers, writers, connections
WITH_ALL_ELSE = 240  # seconds: before and after it stores are made, filled, checked and removed


pytestmark = [pytest.mark.timeout(WITH_ALL_ELSE + 20), pytest.mark.long]


def said(script: str, *words: str) -> str:
    """What a run says that goes well."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), *words],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=WITH_ALL_ELSE,
    )
    found = done.stdout.decode()
    assert done.returncode == 0, found
    return found


def test_under_a_mixed_load_on_twenty_stores_nothing_is_lost_and_nothing_grows() -> None:
    assert said("_soak.py", str(SECONDS)).endswith("checked: each store is whole\n")


def test_a_crowd_of_followers_some_of_them_stalled_is_given_all_in_order_and_once() -> None:
    found = said("_crowd.py", *CROWD)
    assert "1500 connections opened and dropped" in found
    assert found.endswith("checked: the store is whole\n"), found


def test_by_a_fast_clock_pulses_keep_their_times_and_frames_go_when_theirs_has_passed() -> None:
    found = said("_day.py", *DAY)
    assert "none drifts" in found
    assert found.endswith("checked: the store is whole\n"), found
