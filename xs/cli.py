"""The command line: arguments in, one request to the store, its answer to standard output.

Each command is a function below with its table entry above it (`@command`): what it takes, its
options, examples. Parsing, `--help` and the completion scripts all read that one table, `COMMANDS`.

Standard output carries data only, as the API gives it. What goes wrong is one line on standard
error and the exit status: 1, 2 for wrong usage, 130 for Ctrl-C; a closed pipe is no error.

Starting is part of a command's speed: what only some commands need is imported by them. (argparse
alone would cost as much as the interpreter itself.)
"""

from __future__ import annotations

import os
import sys

from xs import __version__, address, client, errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, BinaryIO

    from xs.client import Body, Fields, Response, Transport
    from xs.terminal import Progress

_SMALL = 64 * 1024  # content up to this size goes out with its length, in one write
_INLINE = 4096  # bytes of content that an import of a folder sends within the frame's line
_GC_AGE = "7d"
_NDJSON = ("content-type", "application/x-ndjson")


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
    except _ClosedPipe:
        return 0  # `xs cat | head`: who reads has had enough
    except KeyboardInterrupt:
        return 130
    except errors.XsError as error:
        _complain(str(error))
        return error.exit
    except OSError as error:
        name = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        _complain(f"{name}{error.strerror or error}")
        return 1
    except Exception as error:
        if os.environ.get("XS_DEBUG"):
            raise
        _complain(f"internal error: {type(error).__name__}: {error} (XS_DEBUG=1 shows where)")
        return 1


def _run(argv: list[str], is_program: bool) -> int:
    name = argv[0] if argv else ""
    if name in ("--help", "-h", "help"):
        return _help(argv[1:])
    if name == "--version":
        write_out(f"xs {__version__}\n".encode())
        return 0
    command = find_command(name)
    if "--help" in argv or "-h" in argv:
        end = argv.index("--") if "--" in argv else len(argv)
        if "--help" in argv[:end] or "-h" in argv[:end]:
            write_out(command_help(command).encode())
            return 0
    arguments = parse(command, argv[1:])
    arguments.is_program = is_program
    return command.run(arguments) or 0


def _complain(sentence: str) -> None:
    """One line on standard error, whatever the sentence is made of."""
    line = " ".join(sentence.split())
    if not line.isprintable():
        from xs.terminal import harmless

        line = harmless(line)
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


# The table of commands


class Option:
    """`flags` are its spellings; `value` is the name of what it takes, "" for a flag."""

    __slots__ = ("flags", "help", "is_number", "is_repeated", "name", "value")

    def __init__(
        self,
        flags: str,
        help: str,
        value: str = "",
        *,
        is_number: bool = False,
        is_repeated: bool = False,
    ) -> None:
        self.flags = flags.split()
        self.name = next(flag for flag in self.flags if flag.startswith("--"))[2:]
        self.help = help
        self.value = value
        self.is_number = is_number
        self.is_repeated = is_repeated


class Command:
    """One command: `positionals` as in its usage line, `[OPTIONAL]` ones last."""

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
        self.is_program = False

    def get(self, name: str) -> str | None:
        """The value of an option, the last one if it was repeated."""
        values = self.options.get(name)
        return values[-1] if values else None

    def has(self, name: str) -> bool:
        return name in self.options

    def flag(self, name: str) -> str | None:
        """ "true" if that flag was given, else None: as a query's parameter."""
        return "true" if name in self.options else None

    def open(self, *, create: bool = False) -> Transport:
        return address.open_transport(self.addr, create=create)


COMMANDS: dict[str, Command] = {}


def command(
    name: str,
    positionals: str,
    summary: str,
    *,
    options: Sequence[Option] = (),
    examples: Sequence[str] = (),
) -> Callable[[Callable[[Arguments], int | None]], Callable[[Arguments], int | None]]:
    """Enters a function into the table, under that name."""

    def enter(run: Callable[[Arguments], int | None]) -> Callable[[Arguments], int | None]:
        COMMANDS[name] = Command(name, positionals, summary, options, examples, run)
        return run

    return enter


def find_command(name: str) -> Command:
    """The command of that name. Raises `Usage`, with the nearest name, if there is none."""
    found = COMMANDS.get(name)
    if found is not None:
        return found
    if not name:
        raise errors.Usage("a command is missing: `xs --help` lists them")
    raise errors.Usage(f"no command {name!r}{_nearest(name, COMMANDS)}: see `xs --help`")


def _nearest(word: str, known: Iterable[str]) -> str:
    import difflib

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


# Parsing


def parse(command: Command, argv: Sequence[str]) -> Arguments:
    """The arguments of a command. Raises `Usage` for what it doesn't take."""
    options, words = _options(command, argv)
    addr = ""
    names = list(command.positionals)
    if names and names[0] in ("ADDR", "[ADDR]"):
        addr, words = _address(command, names.pop(0), words)
    required = sum(not name.startswith("[") for name in names)
    if len(words) < required:
        raise errors.Usage(f"{names[len(words)]} is missing: {command.usage}")
    if len(words) > len(names):
        raise errors.Usage(f"too many arguments, from {words[len(names)]!r} on: {command.usage}")
    return Arguments(addr, words, options)


def _address(command: Command, name: str, words: list[str]) -> tuple[str, list[str]]:
    if name == "[ADDR]" and not words and not os.environ.get("XS_ADDR"):
        return "", words
    # What these take may look like an address itself: a hash has slashes, a path too.
    needed = 1 if command.name in ("cas", "export") else 0
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
            flag, equals, value = word.partition("=")
            option = _known(command, known, flag)
            if not option.value and equals:
                raise errors.Usage(f"{flag} takes no value: {command.usage}")
            _set(options, option, flag, [value, *left][:1] if equals else left[:1])
            if option.value and not equals:
                del left[:1]
        else:
            _short(command, known, options, word, left)
    return options, words


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
        if not option.value:
            _set(options, option, flag, [])
            continue
        attached = word[at + 1 :]
        _set(options, option, flag, [attached] if attached else left[:1])
        if not attached:
            del left[:1]
        return


def _known(command: Command, known: dict[str, Option], flag: str) -> Option:
    option = known.get(flag)
    if option is None:
        hint = _nearest(flag, [*known, "--help"])
        raise errors.Usage(f"xs {command.name} has no option {flag}{hint}")
    return option


def _set(options: dict[str, list[str]], option: Option, flag: str, value: list[str]) -> None:
    if not option.value:
        options[option.name] = []
        return
    if not value:
        raise errors.Usage(f"{flag} takes a value: {flag} {option.value}")
    if option.is_number and not (value[0].isascii() and value[0].isdigit()):
        raise errors.Usage(f"{flag} takes a whole number, not {value[0]!r}")
    options.setdefault(option.name, []).extend(value)


# Help


def _help(words: list[str]) -> int:
    text = command_help(find_command(words[0])) if words else general_help()
    write_out(text.encode())
    return 0


def general_help() -> str:
    """What `xs --help` prints."""
    lines = [
        "xs: an event stream store",
        "",
        "usage: xs COMMAND [ADDR] …",
        "",
        "commands:",
        *(f"  {c.name:<11}{c.summary}" for c in COMMANDS.values()),
        "",
        "ADDR is a store's directory, the path of its socket, HOST:PORT, :PORT (this machine),",
        "http://HOST:PORT or https://HOST:PORT. A directory works with and without a server.",
        "",
        "environment:",
        "  XS_ADDR    the ADDR when the first argument is none (no / or : in it, no . or ..)",
        "  XS_TOKEN   the token for TCP addresses, also given as TOKEN@HOST:PORT",
        "  XS_COLOR   always or never; NO_COLOR is honoured too",
        "",
        "`xs COMMAND --help` has the options of a command, and examples.",
    ]
    return "\n".join(lines) + "\n"


def command_help(command: Command) -> str:
    """What `xs COMMAND --help` prints."""
    lines = [f"usage: {command.usage}", "", command.summary]
    if command.options:
        lines += ["", "options:"]
        spelled = [", ".join(o.flags) + (f" {o.value}" if o.value else "") for o in command.options]
        width = max(map(len, spelled)) + 2
        for text, option in zip(spelled, command.options):
            lines.append(f"  {text:<{width}}{option.help}")
    if command.examples:
        lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    return "\n".join(lines) + "\n"


# Input and output


class _ClosedPipe(Exception):
    """Whoever read standard output reads no more."""


def write_out(data: bytes) -> None:
    """Writes all of `data` to standard output, unbuffered."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(1, view) :]
        except BlockingIOError:  # a descriptor that someone shares with us and made non-blocking
            _wait_for(1, writing=True)
        except BrokenPipeError:
            raise _ClosedPipe from None
        except OSError as error:
            raise errors.XsError(f"can't write to standard output: {error.strerror}") from None


def _read_in(size: int, descriptor: int = 0) -> bytes:
    """What is there to read, up to `size` bytes, as soon as there is something; b"" at the end."""
    while True:
        try:
            return os.read(descriptor, size)
        except BlockingIOError:
            _wait_for(descriptor, writing=False)
        except OSError as error:
            raise errors.XsError(f"can't read standard input: {error.strerror}") from None


def _wait_for(descriptor: int, *, writing: bool) -> None:
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLOUT if writing else select.POLLIN)
    poll.poll()


def _blocks_of(descriptor: int = 0) -> Iterator[bytes]:
    while block := _read_in(client.BLOCK, descriptor):
        yield block


def _content() -> Body:
    """Standard input: bytes if it is short, else blocks as they come; None from a terminal."""
    if os.isatty(0):
        return None
    data = b""
    while len(data) < _SMALL:
        block = _read_in(_SMALL)
        if not block:
            return data
        data += block
    return _after(data)


def _after(data: bytes) -> Iterator[bytes]:
    yield data
    yield from _blocks_of()


def _show(blocks: Iterable[bytes], *, is_json: bool = True) -> None:
    """Writes an answer's body as it comes: untouched, but for a person at a terminal."""
    if os.isatty(1) or os.environ.get("XS_COLOR") == "always":
        from xs import terminal

        colour = is_json and terminal.wants_colour(os.environ)
        blocks = terminal.shown(blocks, colour=colour)
    for block in blocks:
        write_out(block)


def _show_text(blocks: Iterable[bytes]) -> None:
    """The same for an answer that is text: it ends with a newline, so that answers don't run on."""
    _show(_with_newline(blocks))


def _with_newline(blocks: Iterable[bytes]) -> Iterator[bytes]:
    ended = True
    for block in blocks:
        ended = block.endswith(b"\n")
        yield block
    if not ended:
        yield b"\n"


def _ask(
    transport: Transport, method: str, target: str, fields: Fields = (), body: Body = None
) -> Response:
    response = transport.request(method, target, fields, body)
    if response.status >= 400:
        raise client.error_from(response)
    return response


def _get_text(arguments: Arguments, target: str) -> None:
    transport = arguments.open()
    try:
        _show_text(_ask(transport, "GET", target))
    finally:
        transport.close()


def _leave_with_reader() -> None:
    """From now on the process ends when nobody reads its output any more.

    A live read may have nothing to write for hours, and only a write would notice.
    """
    import _thread
    import select

    def watch() -> None:
        poll = select.poll()
        poll.register(1, 0)  # POLLERR and POLLHUP are told unasked
        poll.poll()
        os._exit(0)

    _thread.start_new_thread(watch, ())


# Running a server


@command(
    "serve",
    "DIR",
    "serve a store, on its socket and wherever else it is asked to",
    options=[
        Option("--expose --api", "a TCP address to serve on too (repeatable)", "ADDR",
               is_repeated=True),
        Option("--host", "a name that clients may call this host by (repeatable)", "NAME",
               is_repeated=True),
    ],
    examples=["xs serve ./store", "xs serve ./store --expose :8080"],
)  # fmt: skip
def _serve(arguments: Arguments) -> int | None:
    directory = arguments.rest[0]
    if directory.startswith("~"):
        raise errors.Usage(f"{directory} has a literal ~: the shell expands it when not quoted")
    from xs.server import serve

    return serve(
        directory,
        expose=arguments.options.get("expose", []),
        hosts=arguments.options.get("host", []),
    )


# Writing


@command(
    "append",
    "ADDR [TOPIC]",
    "append an event, with standard input as its content, and print its frame",
    options=[
        Option("--meta", "meta data, any JSON value", "JSON"),
        Option("--ttl", "how long it is kept: forever, ephemeral, time:<ms>, last:<n>", "TTL"),
        Option("--if-last", "only if the topic's newest frame is this one (or none)", "ID"),
        Option("--key", "the same key again on the topic appends nothing new", "KEY"),
        Option("--lines", "each line of standard input is an event"),
        Option("--json", "each line is an event as JSON, with its own topic, meta, content, …"),
    ],
    examples=[
        "echo hello | xs append ./store notes",
        'xs append ./store notes --meta \'{"tag":"a"}\' < photo.jpg',
        "tail -f app.log | xs append ./store app.log --lines",
        'echo \'{"topic":"a","content":"hi"}\' | xs append ./store --json',
    ],
)
def _append(arguments: Arguments) -> int | None:
    topic = arguments.rest[0] if arguments.rest else None
    if arguments.has("lines") or arguments.has("json"):
        return _append_many(arguments, topic)
    if topic is None:
        raise errors.Usage(f"TOPIC is missing: {COMMANDS['append'].usage}")
    fields = []
    meta, key = arguments.get("meta"), arguments.get("key")
    if meta is not None:
        fields.append(client.meta_field(meta))
    if key is not None:
        fields.append(client.key_field(key))
    if not topic:
        raise errors.Invalid("the topic is empty: give one such as notes or notes.add")
    target = client.with_query(
        "/append/" + client.quote(topic),
        [("ttl", arguments.get("ttl")), ("if-last", arguments.get("if-last"))],
    )
    transport = arguments.open(create=True)
    try:
        _show_text(_ask(transport, "POST", target, fields, _content()))
    finally:
        transport.close()
    return None


def _append_many(arguments: Arguments, topic: str | None) -> int:
    if arguments.has("lines") and arguments.has("json"):
        raise errors.Usage("--lines and --json can't go together: give one of them")
    how = "--lines" if arguments.has("lines") else "--json"
    for name in ("if-last", "key") if how == "--lines" else ("meta", "ttl", "if-last", "key"):
        if arguments.has(name):
            where = "one event alone" if how == "--lines" else "a line's own JSON"
            raise errors.Usage(f"--{name} can't go with {how}: it belongs to {where}")
    if how == "--lines" and topic is None:
        raise errors.Usage("TOPIC is missing: xs append ADDR TOPIC --lines")
    from xs.terminal import Progress

    with Progress("lines") as progress:
        if how == "--lines":
            frame = _event_frame(topic or "", arguments.get("meta"), arguments.get("ttl"))
            body = lines_as_events(_blocks_of(), *frame, progress)
        else:
            body = _counted(_with_topic(_blocks_of(), topic), progress)
        return _send_many(arguments, "/append", body, progress)


def _send_many(arguments: Arguments, target: str, body: Iterable[bytes], progress: Progress) -> int:
    """Sends NDJSON and prints the summary; 1 if lines were refused."""
    transport = arguments.open(create=True)
    try:
        summary = _ask(transport, "POST", target, [_NDJSON], body).read()
    finally:
        transport.close()
        progress.end()
    _show_text([summary])
    if b'"errors":[]' in summary:
        return 0
    import json

    refused = json.loads(summary).get("errors") or []
    if not refused:
        return 0
    first = refused[0]
    count = "1 line was refused" if len(refused) == 1 else f"{len(refused)} lines were refused"
    raise errors.Invalid(f"{count}; line {first.get('line')}: {first.get('error')}")


def _event_frame(topic: str, meta: str | None, ttl: str | None) -> tuple[str, str]:
    """What stands before and after the content in each event's line of JSON."""
    import json

    parts = ['{"topic":' + json.dumps(topic)]
    if meta is not None:
        try:
            json.loads(meta)
        except (ValueError, RecursionError) as error:
            raise errors.Invalid(f"meta is not JSON: {error}") from None
        # It is JSON, so its newlines are white space; in the line they would end it.
        parts.append('"meta":' + meta.replace("\n", " ").replace("\r", " "))
    if ttl is not None:
        parts.append('"ttl":' + json.dumps(ttl))
    return ",".join(parts) + ",", "}\n"


def lines_as_events(
    blocks: Iterable[bytes], before: str, after: str, progress: Progress | None = None
) -> Iterator[bytes]:
    """NDJSON of one event for each line in `blocks`, each block's as soon as it came.

    `before` and `after` stand around the content. A last line without newline counts. All lines
    of a block are encoded in a few calls: over a million a second, far more than a store takes.
    """
    unfinished: list[bytes] = []
    for block in blocks:
        end = block.rfind(b"\n")
        if end < 0:
            unfinished.append(block)
            continue
        lines = b"".join([*unfinished, block[:end]])
        unfinished = [block[end + 1 :]]
        yield _events(lines, before, after)
        if progress is not None:
            progress.add(block.count(b"\n"))
    last = b"".join(unfinished)
    if last:
        yield _events(last, before, after)


def _events(lines: bytes, before: str, after: str) -> bytes:
    try:
        text = lines.decode("utf-8")
    except UnicodeDecodeError:
        if b"\n" in lines:  # only those lines that aren't text need the other form
            return b"".join(_events(line, before, after) for line in lines.split(b"\n"))
        import binascii

        encoded = binascii.b2a_base64(lines, newline=False).decode("ascii")
        return f'{before}"content_base64":"{encoded}"{after}'.encode()
    before += '"content":'
    quoted = map(_encoder(), text.split("\n"))
    return (before + (after + before).join(quoted) + after).encode("utf-8")


def _encoder() -> Callable[[str], str]:
    """What makes a JSON string of a str."""
    try:
        from _json import encode_basestring  # in CPython, without the 7 ms of `json`
    except ImportError:
        from json.encoder import encode_basestring
    return encode_basestring


def _counted(blocks: Iterable[bytes], progress: Progress) -> Iterator[bytes]:
    for block in blocks:
        yield block
        progress.add(block.count(b"\n"))


def _with_topic(blocks: Iterable[bytes], topic: str | None) -> Iterable[bytes]:
    """Lines of JSON as they are; with a topic, those that name none get that one."""
    return blocks if topic is None else _given_topic(blocks, topic)


def _given_topic(blocks: Iterable[bytes], topic: str) -> Iterator[bytes]:
    import json

    unfinished: list[bytes] = []
    named = b'{"topic":' + json.dumps(topic).encode()
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if not end:
            unfinished.append(block)
            continue
        lines = b"".join([*unfinished, block[:end]])
        unfinished = [block[end:]]
        yield b"".join(_name_topic(line, named) for line in lines.splitlines(keepends=True))
    last = b"".join(unfinished)
    if last:
        yield _name_topic(last, named)


def _name_topic(line: bytes, named: bytes) -> bytes:
    import json

    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return line  # the store says what is wrong with it, and which line it is
    if not isinstance(event, dict) or "topic" in event:
        return line
    inner = line.lstrip()[1:]
    return named + (b"," if event else b"") + inner


@command(
    "remove",
    "ADDR ID",
    "remove a frame, and its content if no other frame has it",
    examples=["xs remove ./store 03gw3h…"],
)
def _remove(arguments: Arguments) -> None:
    transport = arguments.open()
    try:
        _ask(transport, "DELETE", "/" + client.quote(arguments.rest[0])).read()
    finally:
        transport.close()


@command(
    "cas-post",
    "ADDR",
    "store standard input as content without a frame, and print its hash",
    examples=["xs cas-post ./store < photo.jpg"],
)
def _cas_post(arguments: Arguments) -> None:
    transport = arguments.open(create=True)
    try:
        _show_text(_ask(transport, "POST", "/cas", (), _content()))
    finally:
        transport.close()


# Reading

_TOPIC = Option("-T --topic", "only this topic, prefix.*, or several with commas", "PATTERN")


@command(
    "cat",
    "ADDR",
    "print the stream, one frame a line",
    options=[
        Option("-f --follow", "go on with live frames, after one xs.threshold"),
        Option("-p --pulse", "follow, with an xs.pulse that often", "MS", is_number=True),
        Option("-n --new -t --tail", "only what comes from now on"),
        Option("-a --after -l --last-id", "start after this id or time", "ID"),
        Option("--from", "start with this id or time (RFC 3339, or ago: 90s, 2h, 7d)", "ID"),
        Option("--until", "end with this id or time", "ID"),
        Option("--limit", "end after so many frames", "N", is_number=True),
        Option("--last", "only the newest N of these, oldest first", "N", is_number=True),
        _TOPIC,
        Option("--sse", "as server-sent events"),
        Option("--with-timestamp", 'add "timestamp" to each frame'),
        Option("--with-content", 'add "content" (or "content_base64") to each frame'),
    ],
    examples=[
        "xs cat ./store",
        "xs cat ./store --follow --new --topic 'chat.*'",
        "xs cat ./store --from 2h --with-content | jq .content",
    ],
)
def _cat(arguments: Arguments) -> None:
    get, flag = arguments.get, arguments.flag
    follow = get("pulse") or flag("follow")
    target = client.with_query(
        "/",
        [
            ("follow", follow),
            ("new", flag("new")),
            ("after", get("after")),
            ("from", get("from")),
            ("until", get("until")),
            ("topic", get("topic")),
            ("last", get("last")),
            ("limit", get("limit")),
            ("with-timestamp", flag("with-timestamp")),
            ("with-content", flag("with-content")),
        ],
    )
    fields = [("accept", "text/event-stream")] if arguments.has("sse") else []
    _show_stream(arguments, target, fields, is_live=follow is not None)


def _show_stream(arguments: Arguments, target: str, fields: Fields, *, is_live: bool) -> None:
    if is_live and arguments.is_program:
        _leave_with_reader()
    transport = arguments.open()
    try:
        _show(_ask(transport, "GET", target, fields))
    finally:
        transport.close()


@command("get", "ADDR ID", "print a frame", examples=["xs get ./store 03gw3h…"])
def _get(arguments: Arguments) -> None:
    _get_text(arguments, "/" + client.quote(arguments.rest[0]))


@command(
    "next",
    "ADDR ID",
    "print the frame after an id, which need not be stored",
    options=[_TOPIC],
    examples=["xs next ./store 03gw3h… --topic notes"],
)
def _next(arguments: Arguments) -> None:
    path = "/next/" + client.quote(arguments.rest[0])
    _get_text(arguments, client.with_query(path, [("topic", arguments.get("topic"))]))


@command(
    "prev",
    "ADDR ID",
    "print the frame before an id, which need not be stored",
    options=[_TOPIC],
    examples=["xs prev ./store 03gw3h… --topic notes"],
)
def _prev(arguments: Arguments) -> None:
    path = "/prev/" + client.quote(arguments.rest[0])
    _get_text(arguments, client.with_query(path, [("topic", arguments.get("topic"))]))


_FOLLOW = Option("-f --follow", "then each newer one, as it comes")


@command(
    "first",
    "ADDR [TOPIC] [N]",
    "print the oldest frame, or the oldest N, of a topic or of all",
    examples=["xs first ./store", "xs first ./store notes 10"],
)
def _first(arguments: Arguments) -> None:
    _end(arguments, "first", "/first")


@command(
    "last",
    "ADDR [TOPIC] [N]",
    "print the newest frame, or the newest N, of a topic or of all",
    options=[_FOLLOW],
    examples=["xs last ./store", "xs last ./store notes 10", "xs last ./store notes --follow"],
)
def _last(arguments: Arguments) -> None:
    _end(arguments, "last", "/last")


@command(
    "head",
    "ADDR [TOPIC] [N]",
    "the same as last",
    options=[_FOLLOW],
    examples=["xs head ./store notes"],
)
def _head(arguments: Arguments) -> None:
    _end(arguments, "last", "/last")


def _end(arguments: Arguments, which: str, path: str) -> None:
    words = list(arguments.rest)
    # No topic begins with a digit.
    number = words.pop() if words and words[-1].isascii() and words[-1].isdigit() else None
    if len(words) > 1:
        raise errors.Usage(f"N is a whole number, not {words[1]!r}")
    if words:
        path = f"{path}/{client.quote(words[0])}"
    follow = arguments.flag("follow")
    target = client.with_query(path, [(which, number), ("follow", follow)])
    if follow:
        _show_stream(arguments, target, (), is_live=True)
    else:
        _get_text(arguments, target)


@command(
    "content",
    "ADDR ID",
    "print a frame's content",
    examples=["xs content ./store 03gw3h… > photo.jpg"],
)
def _content_of(arguments: Arguments) -> None:
    _show_content(arguments, "/content/" + client.quote(arguments.rest[0]))


@command(
    "cas",
    "ADDR HASH",
    "print the content that has this hash",
    examples=["xs cas ./store sha256-uU0nuZNNPgilLlLX2n2r+sSE7+N6U4DukIj3rOLvzek="],
)
def _cas(arguments: Arguments) -> None:
    _show_content(arguments, "/cas/" + client.quote(arguments.rest[0]))


def _show_content(arguments: Arguments, target: str) -> None:
    transport = arguments.open()
    try:
        _show(_ask(transport, "GET", target), is_json=False)
    finally:
        transport.close()


# Moving a store


@command(
    "import",
    "ADDR [SOURCE]",
    "store frames as they are: NDJSON (standard input, or a file), or an exported folder",
    examples=[
        "xs cat ./old --with-content | xs import ./new",
        "xs import ./new ./exported",
    ],
)
def _import(arguments: Arguments) -> int:
    source = arguments.rest[0] if arguments.rest else "-"
    from xs.terminal import Progress

    with Progress("frames") as progress:
        if source == "-":
            return _send_many(arguments, "/import", _counted(_blocks_of(), progress), progress)
        if os.path.isdir(source):
            return _import_folder(arguments, source, progress)
        descriptor = os.open(source, os.O_RDONLY)
        try:
            body = _counted(_blocks_of(descriptor), progress)
            return _send_many(arguments, "/import", body, progress)
        finally:
            os.close(descriptor)


def _import_folder(arguments: Arguments, folder: str, progress: Progress) -> int:
    path = os.path.join(folder, "frames.jsonl")
    cas = _open_regular(os.path.join(folder, "cas"), os.O_DIRECTORY)
    try:
        frames = _open_regular(path)
        if frames is None:
            raise errors.NotFound(f"not an exported folder: {folder} has no frames.jsonl")
        with open(frames, "rb") as file:
            if cas is not None:
                _post_contents(arguments, file, cas)
                file.seek(0)
            return _send_many(arguments, "/import", _import_lines(file, cas, progress), progress)
    finally:
        if cas is not None:
            os.close(cas)


def _open_regular(name: str, flags: int = 0, folder: int | None = None) -> int | None:
    """A descriptor of that file (or directory, by `flags`); None if there is none.

    A folder that was exported elsewhere is not to be trusted with links out of it, or with pipes.
    """
    import stat

    flags |= os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise errors.Invalid(f"can't import {name}: {error.strerror}") from None
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and flags & os.O_DIRECTORY)):
        os.close(descriptor)
        raise errors.Invalid(f"can't import {name}: it is not a regular file")
    return descriptor


def _post_contents(arguments: Arguments, frames: Iterable[bytes], cas: int) -> None:
    """Stores those contents that are too large to go with their frames."""
    posted = set()
    transport = arguments.open(create=True)
    try:
        for line in frames:
            integrity = _hash_in(line)
            if integrity is None or integrity in posted:
                continue
            descriptor = _open_regular(file_name(integrity), 0, cas)
            if descriptor is None:
                continue
            try:
                if os.fstat(descriptor).st_size > _INLINE:
                    posted.add(integrity)
                    body = _blocks_of(descriptor)
                    answer = _ask(transport, "POST", "/cas", (), body).read()
                    _check_hash(integrity, answer.decode("ascii", "replace").strip())
            finally:
                os.close(descriptor)
    finally:
        transport.close()


def _import_lines(frames: Iterable[bytes], cas: int | None, progress: Progress) -> Iterator[bytes]:
    """The frames' lines, with the content of those whose content is small; many in a block."""
    lines: list[bytes] = []
    size = 0
    for line in frames:
        integrity = _hash_in(line) if cas is not None else None
        if integrity is not None:
            line = _with_content(line, integrity, cas)
        lines.append(line)
        size += len(line)
        if size >= _SMALL:
            yield b"".join(lines)
            progress.add(len(lines))
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _with_content(line: bytes, integrity: str, cas: int | None) -> bytes:
    descriptor = _open_regular(file_name(integrity), 0, cas)
    if descriptor is None:
        return line  # the store may have it already; if not, it refuses the line
    try:
        if os.fstat(descriptor).st_size > _INLINE:
            return line
        content = b"".join(_blocks_of(descriptor))
    finally:
        os.close(descriptor)
    import binascii

    _check_hash(integrity, _integrity_of(content))
    encoded = binascii.b2a_base64(content, newline=False)
    return line.rstrip()[:-1] + b',"content_base64":"' + encoded + b'"}\n'


def _check_hash(expected: str, found: str) -> None:
    if found != expected:
        raise errors.Damaged(f"cas/{file_name(expected)} is damaged: its content is {found}")


def _integrity_of(content: bytes) -> str:
    import binascii
    from hashlib import sha256

    digest = sha256(content).digest()
    return "sha256-" + binascii.b2a_base64(digest, newline=False).decode("ascii")


def file_name(integrity: str) -> str:
    """The name of a content's file in `cas/`: base64 of its hash string.

    No letter of a hash string has bits that base64 writes as `/` or `+`, so it is a file's name.
    """
    import binascii

    return binascii.b2a_base64(integrity.encode("ascii"), newline=False).decode("ascii")


def _hash_in(line: bytes) -> str | None:
    """The hash in a frame's line of JSON; None without one, or if the line is no frame."""
    parts = line.split(b'"', 12)
    if len(parts) > 11 and parts[1] == b"topic" and parts[5] == b"id" and parts[9] == b"hash":
        value: Any = parts[11].decode("latin-1") if parts[10] == b":" else None
    else:
        import json  # written by another hand: spaces, another order

        try:
            value = json.loads(line)["hash"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
    if not isinstance(value, str) or len(value) != 51 or not value.startswith("sha256-"):
        return None
    return value if value[7:].replace("+", "a").replace("/", "a")[:-1].isalnum() else None


@command(
    "export",
    "ADDR OUT",
    "write the whole store to a new folder: frames.jsonl, and cas/ with the contents",
    examples=["xs export ./store ./exported"],
)
def _export(arguments: Arguments) -> None:
    out = arguments.rest[0]
    transport = arguments.open()
    try:
        _make_empty(out)
        cas = os.path.join(out, "cas")
        os.mkdir(cas, 0o700)
        # What is not whole yet has another name: a folder with a frames.jsonl is complete.
        part = os.path.join(out, "frames.jsonl.part")
        from xs.terminal import Progress

        with Progress("frames") as progress, open(part, "xb") as file:
            _export_frames(transport, file, cas, progress)
        with Progress("contents") as progress:
            gone = _export_contents(transport, part, cas, progress)
        if gone:
            _leave_out(part, gone)
        _sync(cas)
        _sync(part)
        os.rename(part, os.path.join(out, "frames.jsonl"))
        _sync(out)
    finally:
        transport.close()


def _make_empty(out: str) -> None:
    try:
        os.mkdir(out, 0o700)
    except FileExistsError:
        if not os.path.isdir(out):
            raise errors.Invalid(f"can't export to {out}: it is a file") from None
        if os.listdir(out):
            raise errors.Invalid(f"can't export to {out}: it is not empty") from None
    except OSError as error:
        raise errors.Invalid(f"can't export to {out}: {error.strerror}") from None


def _export_frames(transport: Transport, file: BinaryIO, cas: str, progress: Progress) -> None:
    """Writes all frames, and the contents that come with them: all but the very large ones.

    One stream with everything in it takes a tenth of the time of a request for each content.
    """
    for line in client.split_lines(_ask(transport, "GET", "/?with-content=true")):
        bare, content = _without_content(line)
        if content is not None:
            integrity = _integrity_of(content)
            if integrity != _hash_in(bare):
                raise errors.Damaged(f"the store gave content {integrity} for {bare.decode()}")
            try:
                with open(os.path.join(cas, file_name(integrity)), "xb") as new:
                    new.write(content)
                    _sync_unless_linux(new)
            except FileExistsError:
                pass  # another frame has it too
        file.write(bare + b"\n")
        progress.add(1)


def _without_content(line: bytes) -> tuple[bytes, bytes | None]:
    """A frame's line as it is stored, and the content that was added to it at its end, if any."""
    import binascii
    import json

    # In a string of JSON no quote stands behind a comma without a backslash: these are keys. What
    # follows the last one is the frame's own content only if it goes on to the end of the line.
    at = line.rfind(b',"content_base64":"')
    value = line[at + 19 : -2]
    if at > 0 and b'"' not in value:
        return line[:at] + b"}", binascii.a2b_base64(value)
    at = line.rfind(b',"content":"')
    if at > 0:
        try:
            text = json.loads(line[at + 11 : -1])
        except ValueError:
            return line, None  # it is within meta
        return line[:at] + b"}", text.encode("utf-8")
    return line, None


def _export_contents(transport: Transport, frames: str, cas: str, progress: Progress) -> set[bytes]:
    """Fetches the contents still missing; returns the lines of frames removed meanwhile."""
    gone = set()
    with open(frames, "rb") as file:
        for line in file:
            integrity = _hash_in(line)
            if integrity is None:
                continue
            path = os.path.join(cas, file_name(integrity))
            if os.path.exists(path):
                continue
            progress.add(1)
            try:
                _fetch(transport, integrity, path)
            except errors.NotFound:
                if _is_stored(transport, line):
                    raise errors.Damaged(
                        f"{integrity} is missing in the store: `xs check` says more"
                    ) from None
                gone.add(line)
    if sys.platform == "linux":
        os.sync()  # once for all of them, and on Linux it waits until they are written
    return gone


def _fetch(transport: Transport, integrity: str, path: str) -> None:
    import binascii
    from hashlib import sha256

    digest = sha256()
    response = _ask(transport, "GET", "/cas/" + client.quote(integrity))
    with open(path, "xb") as file:
        for block in response:
            digest.update(block)
            file.write(block)
        _sync_unless_linux(file)
    found = binascii.b2a_base64(digest.digest(), newline=False).decode("ascii")
    if "sha256-" + found != integrity:
        os.unlink(path)
        raise errors.Damaged(f"the store gave other content for {integrity}: sha256-{found}")


def _sync_unless_linux(file: BinaryIO) -> None:
    if sys.platform != "linux":  # there `os.sync` does it for all files at the end
        file.flush()
        os.fsync(file.fileno())


def _is_stored(transport: Transport, line: bytes) -> bool:
    import json

    try:
        _ask(transport, "GET", "/" + client.quote(json.loads(line)["id"])).read()
    except errors.NotFound:
        return False
    return True


def _leave_out(frames: str, gone: set[bytes]) -> None:
    rest = frames + ".rest"
    with open(frames, "rb") as old, open(rest, "xb") as new:
        new.writelines(line for line in old if line not in gone)
    os.rename(rest, frames)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Care


@command(
    "check",
    "ADDR",
    "verify every frame and every content, and print what is wrong",
    examples=["xs check ./store"],
)
def _check(arguments: Arguments) -> int:
    import json

    last = b""

    def lines() -> Iterator[bytes]:
        nonlocal last
        for line in client.split_lines(_ask(transport, "POST", "/check")):
            last = line
            yield line + b"\n"

    transport = arguments.open()
    try:
        _show(lines())
    finally:
        transport.close()
    try:
        problems = json.loads(last)["problems"]
    except (ValueError, TypeError, KeyError):
        raise errors.BrokenBody("the check broke off before its end") from None
    if problems:
        raise errors.Damaged(f"{arguments.addr} has {problems} problem{'s' * (problems != 1)}")
    return 0


@command(
    "gc",
    "ADDR",
    "remove content that no frame has (any more), once it is old enough",
    options=[Option("--age", f"of at least this age: 90s, 2h, 7d (default {_GC_AGE})", "AGE")],
    examples=["xs gc ./store", "xs gc ./store --age 0s"],
)
def _gc(arguments: Arguments) -> None:
    transport = arguments.open()
    try:
        target = client.with_query("/gc", [("age", arguments.get("age") or _GC_AGE)])
        _show_text(_ask(transport, "POST", target))
    finally:
        transport.close()


@command(
    "version",
    "[ADDR]",
    "print the version of the server at ADDR, or of this command",
    examples=["xs version", "xs version ./store"],
)
def _version(arguments: Arguments) -> None:
    if arguments.addr:
        _get_text(arguments, "/version")
    else:
        _show_text([f'{{"version":"{__version__}"}}'.encode()])


@command(
    "scru128",
    "[pack|unpack] [ID]",
    "print a new id, or take ids apart (unpack) and put them together (pack)",
    examples=[
        "xs scru128",
        "xs scru128 unpack 03gw3h…",
        "xs scru128 | xs scru128 unpack - | xs scru128 pack",
    ],
)
def _scru128(arguments: Arguments) -> None:
    action = arguments.rest[0] if arguments.rest else ""
    given = arguments.rest[1] if len(arguments.rest) > 1 else "-"
    if action not in ("", "pack", "unpack"):
        raise errors.Usage(f"scru128 takes pack or unpack, not {action!r}")
    if not action:
        import time

        from xs import ids

        new = ids.Sequence(0).next(time.time_ns() // 1_000_000)
        _show_text([ids.text(new).encode()])
        return
    lines = client.split_lines(_blocks_of()) if given == "-" else [os.fsencode(given)]
    convert = _unpacked if action == "unpack" else _packed
    for line in lines:
        if line.strip():
            _show_text([convert(line.decode("utf-8", "replace").strip()).encode()])


def _unpacked(text: str) -> str:
    from xs import ids

    value = ids.parse(text)
    return (
        f'{{"ts_ms":{value >> 80},"counter_hi":{value >> 56 & 0xFFFFFF},'
        f'"counter_lo":{value >> 32 & 0xFFFFFF},"node":"{value & 0xFFFFFFFF:08x}"}}'
    )


def _packed(text: str) -> str:
    import json

    from xs import ids

    wrong = errors.Invalid(
        'not an id\'s parts: give {"ts_ms", "counter_hi", "counter_lo", "node"}, '
        "the node as 8 hex digits"
    )
    value = 0
    try:
        parts = json.loads(text)
        for name, bits in (("ts_ms", 48), ("counter_hi", 24), ("counter_lo", 24), ("node", 32)):
            part = parts[name]
            if name == "node":
                if len(part) != 8:
                    raise wrong
                part = int.from_bytes(bytes.fromhex(part), "big")
            if type(part) is not int or not 0 <= part < 1 << bits:
                raise wrong
            value = value << bits | part
    except (ValueError, TypeError, KeyError, RecursionError):
        raise wrong from None
    return ids.text(value)


@command(
    "completion",
    "SHELL",
    "print a completion script for bash, zsh or fish",
    examples=[
        "source <(xs completion bash)  # in ~/.bashrc",
        "xs completion fish > ~/.config/fish/completions/xs.fish",
    ],
)
def _completion(arguments: Arguments) -> None:
    from xs import completion

    write_out(completion.script(arguments.rest[0], list(COMMANDS.values())).encode())
