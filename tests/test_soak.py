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


@pytest.mark.timeout(WITH_ALL_ELSE + 20)
def test_a_crowd_of_followers_some_of_them_stalled_is_given_all_in_order_and_once() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "_crowd.py"), *CROWD],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=WITH_ALL_ELSE,
    )
    said = done.stdout.decode()
    assert done.returncode == 0, said
    assert "1500 connections opened and dropped" in said
    assert said.endswith("checked: the store is whole\n"), said


@pytest.mark.timeout(WITH_ALL_ELSE + 20)
def test_by_a_fast_clock_pulses_keep_their_times_and_frames_go_when_theirs_has_passed() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "_day.py"), *DAY],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=WITH_ALL_ELSE,
    )
    said = done.stdout.decode()
    assert done.returncode == 0, said
    assert "none drifts" in said
    assert said.endswith("checked: the store is whole\n"), said
