"""The program `xs`: finds the command, parses its arguments, runs it, and says how it ended.

Standard output carries data only, as the API gives it. What goes wrong is one line on standard
error and the exit status: 1, 2 for wrong usage, 130 for Ctrl-C; a closed pipe is no error. Which
commands there are and what they do is `commands`' to know.

Starting is part of a command's speed: on the way to the usual commands (append, cat, last, …)
nothing is imported that they don't need (tests/test_layering.py), by this module or any other.
"""

from __future__ import annotations

import gc
import sys

# Importing makes many objects and no garbage: looking for it takes 0.7 ms (bench/start.py).
gc.set_threshold(50_000)  # objects made, less those that went, between two looks

from xs import errors, stdio  # noqa: E402
from xs.address import here_is_gone  # noqa: E402
from xs.arguments import check_count, nearest, parse, wants_help  # noqa: E402
from xs.commands import COMMANDS  # noqa: E402
from xs.system import os  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from xs.arguments import Command


def main() -> int:
    """The program `xs`. Ends the process itself, with the command's exit status."""
    _reserve_standard_descriptors()
    status = run(sys.argv[1:], is_program=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            status = status or 1
    # Nothing is left to be done, and the interpreter would take 2 to 3 ms to take itself apart.
    os._exit(status)


def run(argv: Sequence[str], *, is_program: bool = False) -> int:
    """Runs one command and returns its exit status. Writes to file descriptors 1 and 2."""
    try:
        return _run(list(argv), is_program)
    except stdio.ClosedPipe:
        return 0  # `xs cat | head`: who reads has had enough
    except KeyboardInterrupt:
        return 130
    except errors.Failed as error:
        _complain(str(error), in_one_line=False)
        return error.exit
    except errors.XsError as error:
        _complain(str(error))
        return error.exit
    except OSError as error:
        has_name = isinstance(error.filename, (str, bytes))  # it may be a descriptor, too
        name = f"{os.fsdecode(error.filename)}: " if has_name else ""
        # Whoever makes a path absolute asks for the directory that it begins in, which has no name.
        is_gone = not has_name and isinstance(error, FileNotFoundError) and here_is_gone()
        _complain(errors.HERE_IS_GONE if is_gone else f"{name}{error.strerror or error}")
        return 1
    except MemoryError:
        _complain(str(errors.NoMemory()))
        return 1
    except Exception as error:
        if os.environ.get("XS_DEBUG"):
            raise
        from xs.threads import is_shortage

        if is_shortage(error):
            _complain(str(errors.NoMemory()))
            return 1
        _complain(f"internal error: {type(error).__name__}: {error} (XS_DEBUG=1 shows where)")
        return 1


def _run(argv: list[str], is_program: bool) -> int:
    name = argv[0] if argv else ""
    if name in ("--help", "-h", "help"):
        check_count(argv[1:], 1, f"xs {name} [COMMAND]")
        return _help(argv[1:])
    if name == "--version":
        check_count(argv[1:], 0, "xs --version")
        from xs.version import VERSION

        stdio.write(f"xs {VERSION}\n".encode())
        return 0
    command = find_command(name)
    end = argv.index("--") if "--" in argv else len(argv)
    if wants_help(command, argv[1:end]):
        return _help([name])
    arguments = parse(command, argv[1:])
    arguments.is_program = is_program
    return command.run(arguments) or 0


def find_command(name: str) -> Command:
    """The command of that name. Raises `Usage`, with the nearest name, if there is none."""
    found = COMMANDS.get(name)
    if found is not None:
        return found
    if not name:
        raise errors.Usage("a command is missing: `xs --help` lists them")
    hint = nearest(name, [*COMMANDS, "--help", "--version"])
    raise errors.Usage(f"no command {name!r}{hint}: see `xs --help`")


def _help(names: list[str]) -> int:
    from xs import help

    text = help.of(find_command(names[0])) if names else help.general(COMMANDS.values())
    stdio.write(text.encode())
    return 0


def _complain(sentence: str, *, in_one_line: bool = True) -> None:
    """One line on standard error, whatever the sentence is made of.

    The words of a script that failed are left as they are: they point at a place in it.
    """
    line = " ".join(sentence.split()) if in_one_line else sentence.rstrip()
    if not line.isprintable():
        from xs.terminal import harmless_name

        line = harmless_name(line)
    try:
        os.write(2, f"xs: {line}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        return  # there is nobody to tell


def _reserve_standard_descriptors() -> None:
    """Puts /dev/null where 0, 1 or 2 is closed: a socket must not become standard output."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # takes the lowest free number: this one
