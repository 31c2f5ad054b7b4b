"""Run the examples of a Markdown document, and compare what they print with what it says.

Three kinds of fenced blocks are examples, and all those of one document are one session, in order:

- ``console``: each line that begins with ``$ `` is given to a bash that lives as long as the
  document (``> `` begins a further line of the same command), and the lines below it are what it
  prints, both outputs together. Input is empty. `xs` and `tools/xs` are this checkout's.
- ``python``: with ``>>>``, an interpreter's session; without, a program, which must not fail. They
  share one interpreter, in the folder where the console is by then.
- ``nu``: each line that begins with ``> `` is given to Nushell in that folder (the lines indented
  below it belong to it), and what is below is what that prints. `xs.nu` can be used. What begins
  with ``use``, ``let``, ``def`` or ``$env.`` holds for all that follows.

The session's folder is temporary, and HOME. A command that ends with ``&`` goes on behind those
that follow until the document ends. The next one waits until it has printed what is expected of it,
or if nothing is, its first line; or if its output goes to a file (``> FILE &``), until that exists.
What it prints later is not looked at: let it write to a file.

What differs from run to run is written with the sign … as a person would abbreviate it:

- ``03gw3h…`` (a 0, and at least three more digits or lower-case letters) is an id. The same
  abbreviation is the same id in all of a document, two abbreviations are two ids, and in a command
  it stands for the whole id.
- ``sha256-LPJNul…`` is a hash that begins so; in a later command it stands for the whole hash.
- elsewhere in a line, … is anything; alone on a line, it is any number of lines.
"""

from __future__ import annotations

import doctest
import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Seconds. A command of a document is short; this much only on a machine that does much else.
DEADLINE = 60.0

RUN = ("console", "python", "nu")
# Languages of blocks that show a thing, not a use of it.
SHOWN = ("json", "text", "http", "sql", "toml", "ini", "mermaid")


class Mismatch(AssertionError):
    """An example does not do what the document says: where, what it says, and what was."""


# ---- The document ------------------------------------------------------------------------------


@dataclass
class Block:
    """One fenced block: its language, its text, and the number of its first line within."""

    language: str
    text: str
    line: int


@dataclass
class Command:
    """One command of a console block, and what the document says that it prints."""

    source: str
    expected: str
    line: int


def blocks(markdown: str) -> list[Block]:
    """The fenced code blocks (CommonMark 0.31 §4.5), without their indentation."""
    found: list[Block] = []
    lines = iter(enumerate(markdown.splitlines(), 1))
    for number, line in lines:
        opening = re.match(r"([ ]*)(`{3,}|~{3,})[ ]*([^`\s]*)[^`]*$", line)
        if opening is None:
            continue
        indent, fence, language = opening.groups()
        inside: list[str] = []
        for _, row in lines:
            closing = row.strip()
            if len(closing) >= len(fence) and set(closing) == {fence[0]}:
                break
            inside.append(row[len(indent) :] if row[: len(indent)].isspace() else row)
        found.append(Block(language, "\n".join(inside), number + 1))
    return found


def not_run(markdown: str) -> list[str]:
    """Blocks that look like examples and are not run, one sentence each."""
    wrong = []
    for block in blocks(markdown):
        if block.language not in RUN + SHOWN:
            wrong.append(
                f"line {block.line}: a block of {block.language or 'no language'!r} is not run: "
                f"write it as one of {', '.join(RUN)}, or if it is no example, {', '.join(SHOWN)}"
            )
        elif block.language in SHOWN and re.search(r"^(\$|>>>) ", block.text, re.MULTILINE):
            wrong.append(f"line {block.line}: commands in a block of {block.language} are not run")
        elif block.language == "nu" and not block.text.startswith("> "):
            wrong.append(f"line {block.line}: nothing is run in a block of nu: begin with `> `")
    return wrong


def nu_commands(block: Block) -> list[Command]:
    """The commands of a nu block."""
    found: list[Command] = []
    for number, line in enumerate(block.text.splitlines(), block.line):
        if line.startswith("> "):
            found.append(Command(line[2:], "", number))
        elif not found:
            raise Mismatch(f"line {number}: output before any command: {line}")
        elif line.startswith("  ") and not found[-1].expected:
            found[-1].source += "\n" + line
        else:
            found[-1].expected += line + "\n"
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a console block."""
    found: list[Command] = []
    continued = False
    for number, line in enumerate(block.text.splitlines(), block.line):
        if line.startswith("$ "):
            found.append(Command(line[2:], "", number))
            continued = True
        elif not found:
            raise Mismatch(f"line {number}: output before any command: {line}")
        elif continued and (line.startswith("> ") or line == ">"):
            found[-1].source += "\n" + line[2:]
        else:
            continued = False
            found[-1].expected += line + "\n"
    return found


# ---- Comparing ---------------------------------------------------------------------------------

_ABBREVIATION = re.compile(r"(?<![0-9A-Za-z])(0[0-9a-z]{3,23}|sha256-[0-9A-Za-z+/]*)…")
_ID = "[0-9a-z]{25}"
_HASH_REST = "[0-9A-Za-z+/]*=*"


@dataclass
class Names:
    """What the abbreviations of a document stand for, as its examples have told so far."""

    meanings: dict[str, str] = field(default_factory=dict)

    def spelled_out(self, source: str) -> str:
        """A command with its abbreviations replaced by what they stand for."""
        return _ABBREVIATION.sub(lambda found: self.meanings.get(found[1], found[0]), source)

    def match(self, expected: str, actual: str) -> bool:
        """Whether `actual` is what `expected` says. Learns new abbreviations when it is."""
        new: dict[str, str] = {}  # abbreviation: name of its group
        pattern = ""
        for line in _trimmed(expected).splitlines():
            pattern += "(?:.*\n)*" if line.strip() == "…" else self._line(line, new) + "\n"
        found = re.fullmatch(pattern, _trimmed(actual))
        if found is None:
            return False
        learned = {name: found[group] for name, group in new.items()}
        ids = [v for k, v in {**self.meanings, **learned}.items() if k.startswith("0")]
        if len(set(ids)) < len(ids):
            return False  # two abbreviations for one id: a reader would take it for two
        self.meanings.update(learned)
        return True

    def _line(self, line: str, new: dict[str, str]) -> str:
        pattern = ""
        end = 0
        for found in _ABBREVIATION.finditer(line):
            name = found[1]
            pattern += _anything(line[end : found.start()])
            end = found.end()
            if name in self.meanings:
                pattern += re.escape(self.meanings[name])
            elif name in new:
                pattern += f"(?P={new[name]})"
            else:
                new[name] = f"name{len(new)}"
                any_such = _ID if name.startswith("0") else re.escape(name) + _HASH_REST
                pattern += f"(?P<{new[name]}>{any_such})"
        return pattern + _anything(line[end:])


def _anything(text: str) -> str:
    return ".*".join(re.escape(part) for part in text.split("…"))


def _trimmed(text: str) -> str:
    """The text without blanks at the ends of lines, and with one newline after the last."""
    text = "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n")
    return text + "\n" if text else ""


def _difference(where: str, source: str, expected: str, actual: str) -> Mismatch:
    def shown(text: str) -> str:
        return "".join(f"    {line}\n" for line in text.splitlines()) or "    (nothing)\n"

    return Mismatch(
        f"{where}\n{shown(source)}should print\n{shown(expected)}and printed\n{shown(actual)}"
    )


# ---- Running -----------------------------------------------------------------------------------


def check_document(path: Path, folder: Path, *, deadline: float = DEADLINE) -> None:
    """Run the examples of the document at `path` in the empty `folder`.

    Raises `Mismatch` at the first that is not as it says. `deadline`: seconds for each command.
    """
    markdown = path.read_text(encoding="utf-8")
    names = Names()
    environ = _environment(folder, with_tools="tools/" in markdown)
    console = Console(folder, environ, deadline)
    python = Interpreter(environ, deadline)
    nushell = Nushell(environ, deadline)
    try:
        for block in blocks(markdown):
            if block.language == "console":
                for command in commands(block):
                    _check_command(console, command, names, f"{path.name}, line {command.line}")
            elif block.language == "nu":
                for command in nu_commands(block):
                    source = names.spelled_out(command.source)
                    actual = nushell.run(source, console.cwd)
                    if not names.match(command.expected, actual):
                        where = f"{path.name}, line {command.line}"
                        raise _difference(where, command.source, command.expected, actual)
            elif block.language == "python":
                said = python.run(block, path.name, str(console.cwd), names)
                if said:
                    raise Mismatch(said)
    finally:
        python.close()
        console.close()


def _environment(folder: Path, *, with_tools: bool) -> dict[str, str]:
    """The session's variables: this checkout's programs on PATH, nothing of the user's own."""
    programs = folder.parent / f"{folder.name}.programs"
    programs.mkdir()
    xs = programs / "xs"
    xs.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m xs "$@"\n')
    xs.chmod(0o755)
    if with_tools:
        (folder / "tools").symlink_to(ROOT / "tools")
        # Its first use makes an environment, and says so: that is not part of the document.
        subprocess.run([ROOT / "tools" / "xs", "--version"], capture_output=True, timeout=300)
    if nu := os.environ.get("XS_NU"):
        (programs / "nu").symlink_to(nu)
    elsewhere = ("XS_", "XDG_")  # the user's own settings, and where they are besides HOME
    environ = {k: v for k, v in os.environ.items() if not k.startswith(elsewhere)}
    environ.update(
        HOME=str(folder),
        PATH=f"{programs}{os.pathsep}{environ.get('PATH', os.defpath)}",
        PYTHONPATH=str(ROOT),
        LC_ALL="C.UTF-8",
        TZ="UTC",
    )
    return environ


def _check_command(console: Console, command: Command, names: Names, where: str) -> None:
    source = names.spelled_out(command.source)

    def is_expected(actual: str) -> bool:
        return names.match(command.expected, actual)

    try:
        if not _is_background(source):
            actual = console.run(source)
            right = is_expected(actual)
        elif command.expected:
            actual = console.start(source, until=is_expected)
            right = is_expected(actual)
        else:
            elsewhere = re.search(r">\s*([^\s&]+)\s*(2>&1)?\s*&\s*$", source)
            file = console.cwd / elsewhere[1] if elsewhere else None

            def has_begun(actual: str) -> bool:
                return file.exists() if file else "\n" in actual

            right = has_begun(console.start(source, until=has_begun))
            actual = ""
            if not right:
                command.expected = "…"
    except TimeoutError as error:
        raise Mismatch(f"{where}\n    {source}\n{error}") from None
    if not right:
        raise _difference(where, command.source, command.expected, actual)


def _is_background(source: str) -> bool:
    return re.search(r"(?<!&)&\s*$", source) is not None


class Console:
    """A bash that is given one command after the other."""

    _MARK = "==done=="

    def __init__(self, folder: Path, environ: dict[str, str], deadline: float) -> None:
        self.cwd = folder
        self._deadline = deadline
        self._is_busy = False
        self._logs = folder.parent / f"{folder.name}.background"
        self._logs.mkdir()
        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=folder,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all of it can be ended
        )
        self._output: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def run(self, source: str) -> str:
        """Run a command to its end, and return what it printed. Raises `TimeoutError`."""
        return self._send(f"eval {_quoted(source)} </dev/null")

    def start(self, source: str, until: Any) -> str:
        """Run a command in the background until `until(what it printed)`, or the deadline."""
        log = self._logs / str(len(list(self._logs.iterdir())))
        self._send(f"eval {_quoted(source)} </dev/null >{_quoted(str(log))} 2>&1")
        give_up = time.monotonic() + self._deadline
        while True:
            printed = log.read_text(encoding="utf-8", errors="replace")
            if until(printed) or time.monotonic() > give_up:
                return printed
            time.sleep(0.01)

    def close(self) -> None:
        """End bash and what it left in the background: in good order, unless it hangs."""
        with suppress(OSError, subprocess.TimeoutExpired):
            if not self._is_busy:
                self._write("kill $(jobs -p) 2>/dev/null; wait; exit\n")
                self._bash.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.wait()
        assert self._bash.stdin is not None
        with suppress(OSError):
            self._bash.stdin.close()

    def _send(self, line: str) -> str:
        self._is_busy = True
        self._write(f'{line}\nprintf "\\n%s %s\\n" {self._MARK} "$PWD"\n')
        printed = b""
        mark = f"\n{self._MARK} ".encode()
        give_up = time.monotonic() + self._deadline
        while not (mark in printed and printed.endswith(b"\n")):
            try:
                block = self._output.get(timeout=max(0.0, give_up - time.monotonic()))
            except queue.Empty:
                text = printed.decode(errors="replace")
                raise TimeoutError(f"had not ended after {self._deadline:g} s: {text}") from None
            if not block:
                return printed.decode(errors="replace")  # the command has ended bash itself
            printed += block
        self._is_busy = False
        before, _, after = printed.rpartition(mark)
        self.cwd = Path(os.fsdecode(after[:-1]))
        return before.decode(errors="replace")

    def _write(self, text: str) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.write(text.encode())
        self._bash.stdin.flush()

    def _read(self) -> None:
        assert self._bash.stdout is not None
        with self._bash.stdout as stdout:
            while block := os.read(stdout.fileno(), 65536):
                self._output.put(block)
        self._output.put(b"")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


class Nushell:
    """Nushell, started anew for each command: with what earlier ones have defined."""

    _HOLDS = re.compile(r"(use|let|def) |\$env\.")

    def __init__(self, environ: dict[str, str], deadline: float) -> None:
        self._environ = environ
        self._deadline = deadline
        self._before: list[str] = []

    def run(self, source: str, cwd: Path) -> str:
        """Run a command, and return what it printed, errors as well. Raises `Mismatch`."""
        script = "\n".join([*self._before, source])
        if self._HOLDS.match(source):
            self._before.append(source)
        words = ["nu", "-n", "--no-std-lib", "-I", str(ROOT / "xs"), "-c", script]
        try:
            done = subprocess.run(
                words,
                cwd=cwd,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=self._deadline,
            )
        except subprocess.TimeoutExpired:
            raise Mismatch(f"{source}\nhad not ended after {self._deadline:g} s") from None
        return done.stdout.decode(errors="replace")


class Interpreter:
    """A Python of its own, given one block after the other. Started by the first."""

    def __init__(self, environ: dict[str, str], deadline: float) -> None:
        self._environ = environ
        self._deadline = deadline
        self._process: subprocess.Popen[str] | None = None

    def run(self, block: Block, where: str, cwd: str, names: Names) -> str:
        """Run a block in `cwd`, and return what is wrong with it: nothing, if it is right."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env=self._environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        task = {
            "text": block.text,
            "where": where,
            "line": block.line,
            "cwd": cwd,
            "names": names.meanings,
        }
        watch = threading.Timer(self._deadline, process.kill)
        watch.start()
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        finally:
            watch.cancel()
        if not answer:
            took = f"had not finished after {self._deadline:g} s, or ended"
            return f"{where}, line {block.line}: Python {took}"
        result = json.loads(answer)
        names.meanings.update(result["names"])
        return str(result["said"])

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


class AbbreviatedOutput(doctest.OutputChecker):
    """Compares a doctest's output as a console's is compared."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return self._names.match(re.sub(r"(?m)^<BLANKLINE>$", "", want), got)


def check_session(
    text: str, namespace: dict[str, Any], where: str, first_line: int, names: Names
) -> str:
    """Run a ``python`` block in `namespace`, and return what is wrong with it."""
    if ">>> " not in text:
        try:
            exec(compile(text, where, "exec"), namespace)
        except BaseException:
            return f"{where}, line {first_line}: the program fails\n{traceback.format_exc()}"
        return ""
    test = doctest.DocTestParser().get_doctest(text, namespace, where, where, first_line - 1)
    runner = doctest.DocTestRunner(AbbreviatedOutput(names), verbose=False)
    said = io.StringIO()
    failed = runner.run(test, out=said.write, clear_globs=False).failed
    namespace.update(test.globs)  # a DocTest runs in a copy
    return said.getvalue() if failed else ""


def _serve_blocks() -> None:
    """What `Interpreter` starts: blocks as JSON lines in, what is wrong with each out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a program prints is no answer
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line in sys.stdin:
        task = json.loads(line)
        names = Names(task["names"])
        os.chdir(task["cwd"])
        text = names.spelled_out(task["text"])
        said = check_session(text, namespace, task["where"], task["line"], names)
        answers.write(json.dumps({"said": said, "names": names.meanings}) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve_blocks()
