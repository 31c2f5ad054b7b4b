"""What a command takes, and its arguments taken apart by that.

A `Command` is a row of the command line's table (`commands`): its positionals, its options, what it
says of itself. Parsing, `--help` and the completion scripts all go by it. What a command doesn't
take raises `Usage`, with what it does; what a command then does, this module doesn't know.

(argparse alone would cost as much as the interpreter's start.)
"""

from __future__ import annotations

from xs import address, errors
from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from xs.request import Transport


class Option:
    """One option, as it is spelled; `value` is the name of what it takes, "" for a flag.

    A command makes all that there are and looks at few, so its words are taken apart when they are
    asked for.
    """

    __slots__ = ("help", "is_number", "is_repeated", "spelled", "value")

    def __init__(
        self,
        spelled: str,
        help: str,
        value: str = "",
        *,
        is_number: bool = False,
        is_repeated: bool = False,
    ) -> None:
        self.spelled = spelled
        self.help = help
        self.value = value
        self.is_number = is_number
        self.is_repeated = is_repeated

    @property
    def flags(self) -> list[str]:
        return self.spelled.split()

    @property
    def name(self) -> str:
        """Its first long flag, without the dashes."""
        return next(flag for flag in self.flags if flag.startswith("--"))[2:]


class Command:
    """One command: `positionals` as in its usage line, `[OPTIONAL]` ones last.

    `run` returns an exit status, or None for 0.
    """

    __slots__ = ("examples", "name", "options", "positionals", "run", "summary")

    def __init__(
        self,
        name: str,
        positionals: str,
        summary: str,
        options: Sequence[Option],
        examples: Sequence[str],
        run: Callable[[Arguments], int | None],
    ) -> None:
        self.name = name
        self.positionals = positionals.split()
        self.summary = summary
        self.options = options
        self.examples = examples
        self.run = run

    @property
    def usage(self) -> str:
        words = ["xs", self.name, *self.positionals]
        return " ".join([*words, "[options]"] if self.options else words)


class Arguments:
    """What a command was given: `addr` ("" if it takes none), the other positionals, options."""

    __slots__ = ("addr", "is_program", "options", "rest")

    def __init__(self, addr: str, rest: list[str], options: dict[str, list[str]]) -> None:
        self.addr = addr
        self.rest = rest
        self.options = options
        self.is_program = False  # whether the process is the command's own, to end as it likes

    def get(self, name: str) -> str | None:
        """The value of an option that is given once."""
        values = self.options.get(name)
        return values[0] if values else None

    def has(self, name: str) -> bool:
        return name in self.options

    def flag(self, name: str) -> str | None:
        """ "true" if that flag was given, else None: as a query's parameter."""
        return "true" if name in self.options else None

    def open(self, *, create: bool = False) -> Transport:
        return address.open_transport(self.addr, create=create)


def parse(command: Command, argv: Sequence[str]) -> Arguments:
    """The arguments of a command. Raises `Usage` for what it doesn't take."""
    options, words = _options(command, argv)
    addr = ""
    names = list(command.positionals)
    if names and names[0] in ("ADDR", "[ADDR]"):
        addr, words = _address(command, names.pop(0), words)
    required = [name for name in names if not name.startswith("[")]
    if len(words) < len(required):
        raise errors.Usage(f"{required[len(words)]} is missing: {command.usage}")
    hint = command.usage
    if command.name == "append":
        hint = f"content comes on standard input, as in {command.examples[0]}"
    check_count(words, len(names), hint)
    return Arguments(addr, words, options)


def check_count(words: Sequence[str], most: int, usage: str) -> None:
    """Raises `Usage` for words that are more than that."""
    if len(words) > most:
        raise errors.Usage(f"too many arguments, from {words[most]!r} on: {usage}")


def wants_help(command: Command, argv: Sequence[str]) -> bool:
    """Whether `--help` or `-h` is among the arguments, and not as an option's value."""
    if "--help" not in argv and "-h" not in argv:
        return False
    valued = {flag for option in command.options if option.value for flag in option.flags}
    return any(
        word in ("--help", "-h") and before not in valued for before, word in zip(["", *argv], argv)
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at what may have been meant, to be put after what was said; or ""."""
    import difflib

    # Less their dashes: those are alike in all options.
    bare = {each.lstrip("-"): each for each in known}
    found = difflib.get_close_matches(word.lstrip("-").lower(), bare, n=1)
    return f" (did you mean {bare[found[0]]}?)" if found else ""


def _address(command: Command, name: str, words: list[str]) -> tuple[str, list[str]]:
    if name == "[ADDR]" and not words and not os.environ.get("XS_ADDR"):
        return "", words
    # What these take may look like an address itself: a hash has slashes, a path too.
    needed = 1 if command.name in ("cas", "export", "backup") else 0
    try:
        return address.split(words, os.environ, needed)
    except errors.Usage as error:
        raise errors.Usage(f"{error}: {command.usage}") from None


def _options(command: Command, argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    known = {flag: option for option in command.options for flag in option.flags}
    options: dict[str, list[str]] = {}
    words: list[str] = []
    left = list(argv)
    while left:
        word = left.pop(0)
        if word == "--":
            words += left
            break
        if word == "-" or not word.startswith("-"):
            words.append(word)
        elif word.startswith("--"):
            _long(command, known, options, word, left)
        else:
            _short(command, known, options, word, left)
    return options, words


def _long(
    command: Command,
    known: dict[str, Option],
    options: dict[str, list[str]],
    word: str,
    left: list[str],
) -> None:
    """`--follow`, `--pulse=100`, `--pulse 100`."""
    flag, equals, value = word.partition("=")
    option = _known(command, known, flag)
    if not option.value and equals:
        raise errors.Usage(f"{flag} takes no value: {command.usage}")
    _set(options, option, flag, [value] if equals else _taken(option, left))


def _short(
    command: Command,
    known: dict[str, Option],
    options: dict[str, list[str]],
    word: str,
    left: list[str],
) -> None:
    """`-f`, `-fn`, `-p100`, `-p 100`: flags in a group, the last of which may take a value."""
    for at in range(1, len(word)):
        flag = "-" + word[at]
        option = _known(command, known, flag)
        attached = word[at + 1 :] if option.value else ""
        _set(options, option, flag, [attached] if attached else _taken(option, left))
        if option.value:
            return


def _known(command: Command, known: dict[str, Option], flag: str) -> Option:
    option = known.get(flag)
    if option is None:
        hint = nearest(flag, [*known, "--help"])
        raise errors.Usage(f"xs {command.name} has no option {flag}{hint}")
    return option


def _taken(option: Option, left: list[str]) -> list[str]:
    """The next word, taken for the option's value; [] for a flag, or if there is none."""
    return [left.pop(0)] if option.value and left else []


def _set(options: dict[str, list[str]], option: Option, flag: str, value: list[str]) -> None:
    if not option.value:
        options[option.name] = []
        return
    if not value:
        raise errors.Usage(f"{flag} takes a value: {flag} {option.value}")
    if option.is_number and not (value[0].isascii() and value[0].isdigit()):
        raise errors.Usage(f"{flag} takes a whole number, not {value[0]!r}")
    if option.name in options and not option.is_repeated:
        hint = ": several go with commas between" if option.value == "PATTERN" else ""
        raise errors.Usage(f"--{option.name} is given twice{hint}")
    options.setdefault(option.name, []).extend(value)


def plain_path(path: str) -> str:
    """That path. Raises `Usage` for what was hardly meant to be the name of one."""
    if not path:
        raise errors.Usage("a path is empty: name a file or a folder, or . for this one")
    if path.startswith("~"):
        raise errors.Usage(f"{path} has a literal ~: the shell expands it when not quoted")
    return path


def plain_directory(path: str) -> str:
    """That path of a store's directory. Raises `Usage` for what was hardly meant to be one."""
    if not path:
        raise errors.Usage("the directory is empty: name one, or . for this one")
    if address.is_host(path):
        raise errors.Usage(
            f"{path} is an address, and this takes a directory (one of that name is ./{path})"
        )
    return plain_path(path)
