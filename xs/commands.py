"""The commands: each a function, with its row of the table above it (`@command`).

A row says what a command takes, its options, examples; parsing, `--help` and the completion scripts
all read that one table, `COMMANDS`. Each command here is one request to the store and its answer;
what takes more is in modules of its own (`ndjson`, `transfer`, …), imported when they are called.
How a store is reached, or what its answers mean, no command knows.
"""

from __future__ import annotations

from xs import errors, stdio
from xs.arguments import Command, Option, plain_path
from xs.request import append_request, ask, path_of, quote, split_lines, with_query
from xs.stdio import show, show_bytes, show_text
from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xs.arguments import Arguments
    from xs.request import Fields, Response

    Run = Callable[[Arguments], int | None]

COMMANDS: dict[str, Command] = {}


def command(
    name: str,
    positionals: str,
    summary: str,
    *,
    options: Sequence[Option] = (),
    examples: Sequence[str] = (),
) -> Callable[[Run], Run]:
    """Enters a function into the table, under that name."""

    def enter(run: Run) -> Run:
        COMMANDS[name] = Command(name, positionals, summary, options, examples, run)
        return run

    return enter


# One request


def _show(
    arguments: Arguments,
    target: str,
    *,
    method: str = "GET",
    fields: Fields = (),
    by: Callable[[Response], None] = show_text,
) -> None:
    """Makes a request, and shows its answer."""
    transport = arguments.open()
    try:
        by(ask(transport, method, target, fields))
    finally:
        transport.close()


def _show_live(arguments: Arguments, target: str, fields: Fields = ()) -> None:
    """Makes a request whose answer has no end, and shows it as long as somebody reads it."""
    if arguments.is_program:
        stdio.leave_with_reader()
    _show(arguments, target, fields=fields, by=show)


def _post_input(
    arguments: Arguments, target: str, fields: Fields = (), *, as_it_comes: bool = False
) -> None:
    """Sends standard input to a store, which may be a new one, and shows the answer."""
    transport = arguments.open(create=True)
    try:
        body = stdio.blocks_of() if as_it_comes else stdio.content()
        if not body and target == "/cas":  # told here: a store would be made to refuse it
            raise errors.Invalid("no content came on standard input: xs cas-post ADDR < FILE")
        show_text(ask(transport, "POST", target, fields, body))
    finally:
        transport.close()


# Running a server


_SERVE = [
    Option("--expose --api", "a TCP address to serve on too (repeatable)", "ADDR",
           is_repeated=True),
    Option("--host", "a name that clients may call this host by (repeatable)", "NAME",
           is_repeated=True),
    Option("--insecure", "with --expose: on addresses of other machines too, without encryption"),
    Option("--no-scripts", "run no script: no generators, no handlers, no eval"),
    Option("--http", "an address for requests from the web, which become events (repeatable)",
           "ADDR", is_repeated=True),
    Option("--http-timeout", "how long one of them waits for its answer (30)", "SECONDS",
           is_number=True),
    Option("--http-max", "how many may wait at once (1024)", "N", is_number=True),
    Option("--http-body", "the largest body of one (1073741824)", "BYTES", is_number=True),
    Option("--http-ttl", "how long they are kept: forever, ephemeral, time:<ms> or <ms>, last:<n>",
           "TTL"),
    Option("--tls-cert", "a certificate, with which --http speaks TLS", "FILE"),
    Option("--tls-key", "its key, if it is in another file", "FILE"),
    Option("--grace", "how long what is under way may take when it is to stop (10)",
           "SECONDS", is_number=True),
    Option("--log", "what to log: error, warning, info (the default) or debug", "LEVEL"),
    Option("--log-json", "log as JSON, an object a line"),
    Option("--log-file", "log to this file, which SIGHUP opens anew", "FILE"),
]  # fmt: skip


@command(
    "serve",
    "DIR",
    "serve a store, on its socket and wherever else it is asked to",
    options=_SERVE,
    examples=[
        "xs serve ./store",
        "xs serve ./store --expose :8080",
        "xs serve ./store --http 0.0.0.0:443 --tls-cert site.pem --tls-key site.key",
    ],
)
def _serve(arguments: Arguments) -> int:
    from xs import serving

    return serving.run_serve(arguments)


@command(
    "service",
    "ACTION DIR",
    "have the system serve a store: install, status, or remove its service",
    options=[
        Option("--name", "what to call it; if not given, after the directory", "NAME"),
        Option("--kind", "systemd or launchd; if not given, what this system has", "KIND"),
        Option("--print", "print what install would write"),
        Option("--now", "with install: start it, too"),
        *_SERVE,
    ],
    examples=[
        "xs service install ./store --expose :8080",
        "xs service install ./store --now",
        "xs service status ./store",
    ],
)
def _service(arguments: Arguments) -> int:
    from xs import serving

    return serving.run_service(arguments, _SERVE)


# Writing


@command(
    "append",
    "ADDR [TOPIC]",
    "append an event, with standard input (if it is no terminal) as content, and print its frame",
    options=[
        Option("--meta", "meta data, any JSON value", "JSON"),
        Option(
            "--ttl", "how long it is kept: forever, ephemeral, time:<ms> or <ms>, last:<n>", "TTL"
        ),
        Option("--if-last", "only if the topic's newest frame is this one (or none)", "ID"),
        Option("--key", "the same key again on the topic appends nothing new", "KEY"),
        Option("--lines", "each line of standard input is an event, also at a terminal"),
        Option("--json", "each line is an event as JSON, with its own topic, meta, content, …"),
        Option("--chunked", "one event that can be read while its content is still arriving"),
    ],
    examples=[
        "echo hello | xs append ./store notes",
        'xs append ./store notes --meta \'{"tag":"a"}\' < photo.jpg',
        "tail -f app.log | xs append ./store app.log --lines",
        'echo \'{"topic":"a","content":"hi"}\' | xs append ./store --json',
        "ask-a-model | xs append ./store answers --chunked",
    ],
)
def _append(arguments: Arguments) -> None:
    topic = arguments.rest[0] if arguments.rest else None
    if arguments.has("lines") or arguments.has("json"):
        from xs import ndjson

        ndjson.append(arguments, topic)
        return
    if topic is None:
        raise errors.Usage(f"TOPIC is missing: {COMMANDS['append'].usage}")
    get = arguments.get
    target, fields = append_request(
        topic,
        meta=get("meta"),
        ttl=get("ttl"),
        if_last=get("if-last"),
        key=get("key"),
        chunked=arguments.has("chunked"),
    )
    _post_input(arguments, target, fields, as_it_comes=arguments.has("chunked"))


@command(
    "remove",
    "ADDR ID",
    "remove a frame, and its content if no other frame has it",
    examples=["xs remove ./store 03gw3h…"],
)
def _remove(arguments: Arguments) -> None:
    _show(arguments, path_of(arguments.rest[0]), method="DELETE")


@command(
    "cas-post",
    "ADDR",
    "store standard input as content without a frame, and print its hash",
    examples=["xs cas-post ./store < photo.jpg"],
)
def _cas_post(arguments: Arguments) -> None:
    _post_input(arguments, "/cas")


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
        Option("--no-chunks", "of a chunked content only its first frame"),
    ],
    examples=[
        "xs cat ./store",
        "xs cat ./store --follow --new --topic 'chat.*'",
        "xs cat ./store --from 2h --with-content | jq .content",
    ],
)
def _cat(arguments: Arguments) -> None:
    get, flag = arguments.get, arguments.flag
    follow = get("pulse")
    if follow is None:
        follow = flag("follow")
    else:
        from xs.query import parse_pulse

        parse_pulse(follow)  # as a value of `follow`, 0 and 1 would mean something else
    parameters = [
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
        ("no-chunks", flag("no-chunks")),
    ]
    target = with_query("/", parameters)
    fields = [("accept", "text/event-stream")] if arguments.has("sse") else []
    if follow is None:
        _show(arguments, target, fields=fields, by=show)
    else:
        _show_live(arguments, target, fields)


@command("get", "ADDR ID", "print a frame", examples=["xs get ./store 03gw3h…"])
def _get(arguments: Arguments) -> None:
    _show(arguments, path_of(arguments.rest[0]))


@command(
    "next",
    "ADDR ID",
    "print the frame after an id, which need not be stored",
    options=[_TOPIC],
    examples=["xs next ./store 03gw3h… --topic notes"],
)
def _next(arguments: Arguments) -> None:
    _beside(arguments, "/next/")


@command(
    "prev",
    "ADDR ID",
    "print the frame before an id, which need not be stored",
    options=[_TOPIC],
    examples=["xs prev ./store 03gw3h… --topic notes"],
)
def _prev(arguments: Arguments) -> None:
    _beside(arguments, "/prev/")


def _beside(arguments: Arguments, path: str) -> None:
    topic = ("topic", arguments.get("topic"))
    _show(arguments, with_query(path + quote(arguments.rest[0]), [topic]))


_FOLLOW = Option("-f --follow", "then each newer one, as it comes")


@command(
    "first",
    "ADDR [TOPIC] [N]",
    "print the oldest frame, or the oldest N, of a topic or of all",
    examples=["xs first ./store", "xs first ./store notes 10"],
)
def _first(arguments: Arguments) -> None:
    _end(arguments, "first")


@command(
    "last",
    "ADDR [TOPIC] [N]",
    "print the newest frame, or the newest N, of a topic or of all",
    options=[_FOLLOW],
    examples=["xs last ./store", "xs last ./store notes 10", "xs last ./store notes --follow"],
)
def _last(arguments: Arguments) -> None:
    _end(arguments, "last")


@command(
    "head",
    "ADDR [TOPIC] [N]",
    "the same as last",
    options=[_FOLLOW],
    examples=["xs head ./store notes"],
)
def _head(arguments: Arguments) -> None:
    _end(arguments, "last")


def _end(arguments: Arguments, which: str) -> None:
    words = list(arguments.rest)
    # No topic begins with a digit.
    number = words.pop() if words and words[-1].isascii() and words[-1].isdigit() else None
    if len(words) > 1:
        raise errors.Usage(f"N is a whole number, not {words[1]!r}")
    if "" in words:
        raise errors.Usage(f"TOPIC is empty: {COMMANDS[which].usage}")
    path = "/".join(["", which, *map(quote, words)])
    follow = arguments.flag("follow")
    target = with_query(path, [(which, number), ("follow", follow)])
    if follow:
        _show_live(arguments, target)
    else:
        _show(arguments, target)


@command(
    "content",
    "ADDR ID",
    "print a frame's content, and of a chunked one what is still to come",
    examples=["xs content ./store 03gw3h… > photo.jpg"],
)
def _content(arguments: Arguments) -> None:
    if arguments.is_program:
        stdio.leave_with_reader()  # it may be hours until there is more to be written
    _show(arguments, "/content/" + quote(arguments.rest[0]), by=show_bytes)


@command(
    "cas",
    "ADDR HASH",
    "print the content that has this hash",
    examples=["xs cas ./store sha256-uU0nuZNNPgilLlLX2n2r+sSE7+N6U4DukIj3rOLvzek="],
)
def _cas(arguments: Arguments) -> None:
    _show(arguments, "/cas/" + quote(arguments.rest[0]), by=show_bytes)


# Scripts

_SCRIPT = Option("-c --script", "the script itself, in place of a file or standard input", "SCRIPT")


@command(
    "eval",
    "ADDR [FILE]",
    "run a script in the server, from a file or standard input, and print what it yields",
    options=[_SCRIPT],
    examples=["xs eval ./store -c '.last notes | get meta'", "xs eval ./store report.nu"],
)
def _eval(arguments: Arguments) -> None:
    _run_script(arguments, "/eval", arguments.rest)


@command(
    "pipe",
    "ADDR ID [FILE]",
    "run a script in the server, with a frame as its input, and print what it yields",
    options=[_SCRIPT],
    examples=["xs pipe ./store 03gw3h… -c '.cas $in.hash | lines | length'"],
)
def _pipe(arguments: Arguments) -> None:
    _run_script(arguments, "/pipe/" + quote(arguments.rest[0]), arguments.rest[1:])


def _run_script(arguments: Arguments, target: str, files: list[str]) -> None:
    given = arguments.get("script")
    if given is not None and files:
        raise errors.Usage("a script is given by -c or by a file, not by both")
    if given is not None:
        script = given.encode("utf-8", "surrogateescape")
    elif files and files[0] != "-":
        script = _read_file(plain_path(files[0]))
    else:
        script = b"".join(stdio.blocks_of())
    if arguments.is_program:
        stdio.leave_with_reader()
    transport = arguments.open()
    try:
        response = ask(transport, "POST", target, (), script)
        kind = response.get("content-type") or ""
        by = show_bytes if kind.endswith("octet-stream") else show_text
        (show if kind.endswith("ndjson") else by)(response)
    except errors.Invalid as error:
        raise errors.Failed(str(error)) from None  # to be shown as Nushell has laid it out
    except errors.BrokenBody:
        raise errors.Failed("the script failed on its way: the server's log says how") from None
    finally:
        transport.close()


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise errors.XsError(f"can't read {path}: {error.strerror}") from None


@command(
    "ps",
    "ADDR",
    "print the generators and handlers that are in service, one a line",
    examples=["xs ps ./store", "xs ps ./store | jq -r .name"],
)
def _ps(arguments: Arguments) -> None:
    _show(arguments, "/ps", by=show)


# Who may use it over TCP


@command(
    "token",
    "ACTION DIR [NAME]",
    "add, list or remove the tokens of others, who may use a store's TCP addresses",
    options=[
        Option("--read", "with add: may read everything"),
        Option("--append", "with add: may append on these topics (repeatable)", "PATTERN",
               is_repeated=True),
        Option("--admin", "with add: may do everything, run programs too"),
    ],
    examples=[
        "xs token add ./store phone --append 'notes.*' --read",
        "xs token list ./store",
        "xs token remove ./store phone",
    ],
)  # fmt: skip
def _token(arguments: Arguments) -> None:
    from xs import issuing

    issuing.run(arguments)


# Many stores in one process


@command(
    "stores",
    "ADDR",
    "print the further stores that a server serves, one a line",
    examples=["xs stores ./root"],
)
def _stores(arguments: Arguments) -> None:
    _show(arguments, "/stores", by=show)


@command(
    "store",
    "ACTION [ADDR] PATH",
    "add: have a server serve another store too, which is made if there is none; remove: end that",
    options=[
        Option("--name", "what it is called there (default: the last part of PATH)", "NAME"),
        Option("--http", "an address where its own gateway answers the web", "ADDR"),
    ],
    examples=["xs store add ./root ./notes --http :8080", "xs store remove ./root ./notes"],
)
def _store(arguments: Arguments) -> int:
    from xs import storing

    return storing.run(arguments)


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
def _import(arguments: Arguments) -> None:
    source = plain_path(arguments.rest[0]) if arguments.rest else "-"
    if source != "-" and os.path.isdir(source):
        from xs import transfer

        transfer.import_folder(arguments, source)
    else:
        from xs import ndjson

        ndjson.import_frames(arguments, source)


@command(
    "export",
    "ADDR OUT",
    "write the whole store to a new folder: frames.jsonl, and cas/ with the contents",
    examples=["xs export ./store ./exported"],
)
def _export(arguments: Arguments) -> None:
    from xs import transfer

    transfer.export(arguments, plain_path(arguments.rest[0]))


@command(
    "backup",
    "ADDR DEST",
    "make a folder a copy of a store as it is now, or bring such a copy up to date",
    examples=["xs backup ./store ./copy"],
)
def _backup(arguments: Arguments) -> None:
    from xs import backup

    show_text([backup.run(arguments.addr, plain_path(arguments.rest[0]))])


# Care


@command(
    "check",
    "ADDR",
    "verify every frame and every content, and print what is wrong",
    options=[
        Option("--repair", "save what is whole, put the rest aside, and print what was lost"),
    ],
    examples=["xs check ./store", "xs check ./store --repair"],
)
def _check(arguments: Arguments) -> None:
    if arguments.has("repair"):
        from xs import repair

        show(repair.run(arguments.addr))
        return
    from xs.terminal import Notice

    last = b""

    def report(response: Response) -> Iterator[bytes]:
        nonlocal last
        for last in split_lines(response):
            notice.end()
            yield last + b"\n"

    with Notice(f"checking {arguments.addr} …") as notice:
        _show(arguments, "/check", method="POST", by=lambda response: show(report(response)))
    import json

    try:
        problems = json.loads(last)["problems"]
    except (ValueError, TypeError, KeyError):
        raise errors.BrokenBody("the check broke off before its end") from None
    if problems:
        raise errors.Damaged(f"{arguments.addr} has {problems} problem{'s' * (problems != 1)}")


@command(
    "gc",
    "ADDR",
    "remove content that no frame has (any more), once it is old enough",
    options=[Option("--age", "of at least this age: 90s, 2h, 7d (the default)", "AGE")],
    examples=["xs gc ./store", "xs gc ./store --age 0s"],
)
def _gc(arguments: Arguments) -> None:
    _show(arguments, with_query("/gc", [("age", arguments.get("age"))]), method="POST")


@command(
    "version",
    "[ADDR]",
    "print the version of the server at ADDR, or of this command",
    examples=["xs version", "xs version ./store"],
)
def _version(arguments: Arguments) -> None:
    if arguments.addr:
        _show(arguments, "/version")
    else:
        from xs.version import VERSION

        show_text([f'{{"version":"{VERSION}"}}'.encode()])


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
    from xs import idfields

    idfields.run(arguments.rest)


@command(
    "nu",
    "",
    "print xs.nu, the commands of xs for Nushell",
    options=[Option("--install", "put it where each Nushell loads it, and say where that is")],
    examples=["xs nu > xs.nu  # there: use xs.nu *", "xs nu --install"],
)
def _nu(arguments: Arguments) -> None:
    from xs import autoload

    if not arguments.has("install"):
        stdio.write(autoload.module())
        return
    path = autoload.install()
    show_text([f"{path}: each new Nushell has the commands; in a script: use {path} *".encode()])


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

    stdio.write(completion.script(arguments.rest[0], list(COMMANDS.values())).encode())
