"""`xs.open` at a directory that holds no store yet."""

from __future__ import annotations

import os

import pytest

import xs
from xs.errors import NoStore


def test_a_directory_becomes_a_store_with_the_first_append(store_dir: str) -> None:
    with xs.open(store_dir) as store:
        frame = store.append("notes", "first")
        assert store.content(frame) == b"first"
    with xs.open(store_dir) as store:
        assert store.last("notes") == frame


def test_reading_makes_no_store(store_dir: str) -> None:
    with xs.open(store_dir) as store, pytest.raises(NoStore, match="no store at"):
        list(store.cat())
    assert not os.path.exists(store_dir)


def test_a_store_is_for_its_owner_alone_wherever_it_is_made(store_dir: str) -> None:
    os.mkdir(store_dir)
    os.chmod(store_dir, 0o755)
    with xs.open(store_dir) as store:
        store.append("notes", "private")
    assert os.stat(store_dir).st_mode & 0o777 == 0o700
