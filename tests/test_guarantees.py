"""Each row of docs/guarantees.md names tests, and they exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

TESTS = Path(__file__).resolve().parent
TEXT = (TESTS.parent / "docs" / "guarantees.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| when ")
]


@functools.cache
def names_in(file: str) -> frozenset[str]:
    """The names of a file's test functions; none if there is no such file."""
    path = TESTS / file
    if not path.exists():
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def test_there_are_guarantees() -> None:
    assert len(ROWS) > 20
    assert {len(row) for row in ROWS} == {3}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: re.sub(r"\W+", "_", row[0])[:60])
def test_each_guarantee_names_tests_that_exist(row: list[str]) -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[2])
    assert named, f"no test is named for: {row[0]}"
    assert re.sub(r"`[^`]*`", "", row[2]).strip(" ,·") == "", "tests, and nothing else"
    for file, name in named:
        assert name in names_in(file), f"{file}::{name}"
