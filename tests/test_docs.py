"""Every example in the documents and docstrings does what it says; and the runner that tells so."""

from __future__ import annotations

import doctest
import importlib
import re
import time
from pathlib import Path

import pytest
from doc_examples import (
    ROOT,
    AbbreviatedOutput,
    Mismatch,
    Names,
    blocks,
    check_document,
    not_run,
)

pytestmark = pytest.mark.once

DOCUMENTS = [
    path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))] if path.exists()
]
MODULES_WITH_EXAMPLES = [
    path.stem
    for path in sorted((ROOT / "xs").glob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_each_example_of_a_document_prints_what_the_document_says(
    document: Path, tmp_path: Path
) -> None:
    check_document(document, new_folder(tmp_path))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_no_document_has_an_example_that_is_not_run(document: Path) -> None:
    assert not_run(document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_each_link_to_a_file_of_the_repository_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for block in blocks(text):
        text = text.replace(block.text, "")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("module", MODULES_WITH_EXAMPLES)
def test_each_example_of_a_docstring_prints_what_it_says(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(AbbreviatedOutput(Names()), verbose=False)
    given = {"directory": str(tmp_path / "store")}  # the one name that an example need not make
    found = doctest.DocTestFinder().find(importlib.import_module(f"xs.{module}"), extraglobs=given)
    for test in found:
        runner.run(test)
    result = runner.summarize(verbose=False)
    assert result.attempted > 0
    assert result.failed == 0, capsys.readouterr().out


# ---- The runner, on documents made up for it -----------------------------------------------------

ID_1 = "03gw3hq1m6s5z8xk0c7d2v9aj"
ID_2 = "03gw3hq1n0000000000000000"
HASH = "sha256-LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="


def new_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "session"
    folder.mkdir()
    return folder


def check(markdown: str, tmp_path: Path, **options: float) -> None:
    document = tmp_path / "made-up.md"
    document.write_text(markdown, encoding="utf-8")
    check_document(document, new_folder(tmp_path), **options)


def console(*lines: str) -> str:
    return "\n".join(["Prose.", "```console", *lines, "```", ""])


def python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```", ""])


def nu(*lines: str) -> str:
    return "\n".join(["```nu", *lines, "```", ""])


RIGHT = {
    "output": console("$ echo one; echo two", "one", "two"),
    "no output": console("$ true", "$ cd ."),
    "output without a newline at its end": console("$ printf hello", "hello", "$ echo", "$ true"),
    "output to standard error": console("$ echo wrong >&2; false", "wrong"),
    "blank lines within": console(r"$ printf 'a\n\nb\n\n'", "a", "", "b"),
    "a command of several lines": console(
        "$ cat <<END", "> one", ">", "> two", "> END", "one", "", "two"
    ),
    "input is empty": console("$ cat", "$ echo on", "on"),
    "variables and folders last, from block to block": (
        console("$ mkdir a; cd a; name=x") + console("$ echo $name ${PWD##*/}", "x a")
    ),
    "a block in a list": "- item\n\n  ```console\n  $ echo hi\n  hi\n  ```\n",
    "any lines": console("$ seq 9", "1", "…", "9"),
    "any number of lines, none too": console("$ seq 2", "1", "…", "2"),
    "anything in a line": console("$ echo pid 123, port 4", "pid …, port …"),
    "regular expressions mean nothing": console("$ echo 'a.b* (c)'", "a.b* (c)"),
    "an id": console(f'$ echo \'{{"id":"{ID_1}"}}\'', '{"id":"03abc…"}'),
    "one id, twice": console(f"$ echo {ID_1} {ID_1}; echo {ID_1}", "03abc… 03abc…", "03abc…"),
    "two ids": console(f"$ echo {ID_1} {ID_2}", "03abc… 03abd…"),
    "an id in a command": console(f"$ echo {ID_1}", "03abc…", "$ echo is 03abc… | wc -c", "29"),
    "a hash": console(
        f"$ echo '\"{HASH}\"'", '"sha256-LPJNul…"', "$ expr sha256-LPJNul… : '.*'", "51"
    ),
    "in the background": console(
        "$ mkfifo pipe",
        "$ (echo ready; read -r line < pipe; echo $line > got) &",
        "ready",
        "$ echo hi > pipe; wait; cat got",
        "hi",
    ),
    "in the background, its first line unsaid": console(
        "$ (echo up > f; echo up; sleep 60) &", "$ cat f", "up"
    ),
    "in the background, with several lines": console(
        "$ for n in 1 2 3; do echo $n; sleep 0.05; done &", "1", "2", "3"
    ),
    "in the background, its output elsewhere": console("$ sleep 60 > log &", "$ cat log"),
    "python": python(">>> n = 6 * 7", ">>> n", "42") + python(">>> n + 1", "43"),
    "python: anything": python(">>> object()", "<object object at 0x…>"),
    "python: an error": python(
        ">>> int('x')", "Traceback (most recent call last):", "    …", "ValueError: invalid …: 'x'"
    ),
    "python: a program": python("n = 7", "print(n)") + python(">>> n", "7"),
    "python in the console's folder": (
        console("$ mkdir a; cd a; echo hi > f") + python(">>> open('f').read()", r"'hi\n'")
    ),
    "python's ids are the console's": (
        console(f"$ echo {ID_1}", "03abc…")
        + python(">>> len('03abc…')", "25", f">>> '{ID_2}'", "'03abd…'")
        + console(f"$ test 03abd… = {ID_2} && echo so", "so")
    ),
    "nu": nu("> 6 * 7", "42", "> [1 2]", "  | each { $in + 1 }", "  | to json --raw", "[2,3]"),
    "nu: what is defined holds": nu("> let n = 7", "> $n", "7") + nu("> $n + 1", "8"),
    "nu in the console's folder": console("$ mkdir a; cd a; echo hi > f") + nu("> open f", "hi"),
    "nu: an error": nu("> 1 / 0", "Error: nu::shell::division_by_zero", "…"),
    "nu: xs.nu": nu("> use xs.nu *", "> .version", "Error: nu::shell::error", "…"),
    "xs is this checkout": (
        console('$ xs --version 2>&1 | grep -c "No module named"', "0")
        + python(">>> import xs", ">>> xs.__file__", repr(str(ROOT / "xs" / "__init__.py")))
    ),
    "shown, not run": "```json\n{}\n```\n\n```text\nx\n```\n",
}


@pytest.mark.parametrize("case", RIGHT)
def test_the_runner_accepts_a_document_that_is_right(case: str, tmp_path: Path) -> None:
    check(RIGHT[case], tmp_path, deadline=20)


WRONG = {
    "another output": console("$ echo one", "two"),
    "an output not told": console("$ echo one"),
    "an output that does not come": console("$ true", "one"),
    "a line too many": console("$ seq 3", "1", "2"),
    "a line too few": console("$ seq 2", "1", "2", "3"),
    "part of a line": console("$ echo one two", "one"),
    "an error": console("$ no-such-command-here"),
    "only the last command": console("$ echo one", "one", "$ echo two", "one"),
    "only in a later block": console("$ true") + console("$ echo x", "y"),
    "the lines after any": console("$ seq 9", "1", "…", "8"),
    "the rest after anything": console("$ echo port 4!", "port …?"),
    "what is no id": console("$ echo 03gw3h", "03abc…"),
    "one abbreviation, two ids": console(f"$ echo {ID_1} {ID_2}", "03abc… 03abc…"),
    "one abbreviation, two ids, later": console(
        f"$ echo {ID_1}", "03abc…", f"$ echo {ID_2}", "03abc…"
    ),
    "two abbreviations, one id": console(f"$ echo {ID_1} {ID_1}", "03abc… 03abd…"),
    "a hash that begins otherwise": console(f"$ echo {HASH}", "sha256-AAAA…"),
    "in the background, another output": console("$ echo ready &", "up"),
    "in the background, never a word": console("$ sleep 60 &"),
    "a command that does not end": console("$ sleep 60"),
    "output before a command": console("one", "$ echo one"),
    "nu: another output": nu("> 6 * 7", "43"),
    "nu: no end": nu("> loop { }"),
    "python: another output": python(">>> 6 * 7", "43"),
    "python: an error": python(">>> 1 / 0", "1"),
    "python: a program that fails": python("n = 1 / 0"),
    "python: a program that exits": python("raise SystemExit(1)"),
    "python: an end": python(">>> import os", ">>> os._exit(0)"),
    "python: no end": python(">>> while True: pass"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_runner_refuses_a_document_that_is_wrong(case: str, tmp_path: Path) -> None:
    with pytest.raises(Mismatch):
        check(WRONG[case], tmp_path, deadline=1)


def test_a_mismatch_names_the_line_the_command_what_it_says_and_what_was(tmp_path: Path) -> None:
    with pytest.raises(Mismatch) as caught:
        check(console("$ true", "$ echo one", "two"), tmp_path)
    assert str(caught.value) == (
        "made-up.md, line 4\n    echo one\nshould print\n    two\nand printed\n    one\n"
    )


def test_a_mismatch_of_python_names_the_line_the_example_what_it_says_and_what_was(
    tmp_path: Path,
) -> None:
    with pytest.raises(Mismatch) as caught:
        check(python(">>> x = 2", ">>> x", "1"), tmp_path)
    assert 'made-up.md", line 3' in str(caught.value)
    assert "Failed example:\n    x\nExpected:\n    1\nGot:\n    2\n" in str(caught.value)


def test_what_a_document_leaves_in_the_background_ends_with_it(tmp_path: Path) -> None:
    left = "(trap 'echo ended > end; exit' TERM; echo up; while :; do read -rt 9; done)"
    check(console(f"$ {left} < <(sleep 60) &", "up"), tmp_path)
    deadline = time.monotonic() + 10
    while not (tmp_path / "session" / "end").exists():
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "markdown",
    [
        "```sh\nxs\n```\n",
        "```bash\nxs\n```\n",
        "```\nxs\n```\n",
        "```text\n$ xs\n```\n",
        "```nu\nxs\n```\n",
    ],
)
def test_a_block_that_looks_like_an_example_must_be_one(markdown: str) -> None:
    assert len(not_run(markdown)) == 1
