"""The command line: its table as plain calls, its ways as processes, its commands on stores."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import DEADLINE, ROOT, XS, environment

from xs import __version__, arguments, cli, errors, idfields, ids, ndjson, transfer
from xs import open as open_store
from xs.request import split_lines

FRAME = b'{"topic":"t","id":"03gw3h0000000000000000000","hash":null,"meta":null,"ttl":"forever"}'
CHUNKED = b"HTTP/1.1 200 OK\r\nxs-version: 1\r\nTransfer-Encoding: chunked\r\n\r\n"

ID = "0" * 25


def parse(*words):
    return arguments.parse(cli.find_command(words[0]), words[1:])


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("XS_ADDR", "XS_TOKEN", "XS_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


# Parsing


@pytest.mark.parametrize(
    "words",
    [
        ["-f", "-p", "100", "-T", "a.*"],
        ["-fp", "100", "-Ta.*"],
        ["-fp100", "--topic=a.*"],
        ["--follow", "--pulse=100", "--topic", "a.*"],
        ["--topic", "a.*", "--pulse", "100", "-f", "-f"],
    ],
)
def test_options_may_be_spelled_in_each_usual_way(words):
    for argv in ([*words, "./s"], ["./s", *words], [*words, "--", "./s"]):
        arguments = parse("cat", *argv)
        assert arguments.addr == "./s" and arguments.rest == []
        assert arguments.has("follow") and arguments.flag("follow") == "true"
        assert (arguments.get("pulse"), arguments.get("topic")) == ("100", "a.*")
        assert not arguments.has("new") and arguments.get("last") is None


def test_each_spelling_of_an_option_is_the_same_option():
    for flag in ("-n", "--new", "-t", "--tail"):
        assert parse("cat", "./s", flag).has("new")
    for flag in ("-a", "--after", "-l", "--last-id"):
        assert parse("cat", "./s", flag, "x").get("after") == "x"
    both = parse("serve", "s", "--expose", ":1", "--api", ":2", "--host=a", "--host", "b")
    assert both.options == {"expose": [":1", ":2"], "host": ["a", "b"]}


def test_a_value_may_begin_with_a_dash_and_after_two_dashes_all_is_positional():
    assert parse("append", "./s", "t", "--meta", "-1").get("meta") == "-1"
    assert parse("append", "./s", "t", "--meta=").get("meta") == ""
    assert parse("scru128", "unpack", "-").rest == ["unpack", "-"]
    assert parse("get", "./s", "--", "-f").rest == ["-f"]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["cat", "./s", "--folow"], "did you mean --follow"),
        (["cat", "./s", "--topics", "x"], "did you mean --topic"),
        (["cat", "./s", "-z"], "no option -z"),
        (["cat", "./s", "-fz"], "no option -z"),
        (["cat", "./s", "-hlep"], "no option -h"),
        (["cat", "./s", "--hlep"], "did you mean --help"),
        (["cat", "./s", "--follow=1"], "takes no value"),
        (["cat", "./s", "--topic"], "takes a value: --topic PATTERN"),
        (["cat", "./s", "-fT"], "takes a value: -T PATTERN"),
        (["cat", "./s", "--topic", "a", "--topic=b"], "--topic is given twice: several go with c"),
        (["cat", "./s", "-T", "a", "--topic", "b"], "--topic is given twice"),
        (["append", "./s", "t", "--meta=1", "--meta=2"], "--meta is given twice"),
        (["cat", "./s", "-p1", "-p1"], "--pulse is given twice"),
        (["cat", "./s", "--limit", "x"], "whole number"),
        (["cat", "./s", "--limit", "-1"], "whole number"),
        (["cat", "./s", "--last="], "whole number"),
        (["cat", "./s", "-p1e3"], "whole number"),
        (["cat", "./s", "extra"], "too many arguments, from 'extra' on"),
        (["cat"], "ADDR is missing"),
        (["get", "./s"], "ID is missing"),
        (["serve"], "DIR is missing"),
        (["store"], "ACTION is missing: xs store ACTION [ADDR] PATH"),
        (["store", "add"], "PATH is missing: xs store ACTION [ADDR] PATH"),
        (["append", "./s", "t", "hi"], "input, as in echo hello | xs append ./store notes"),
        (["export", "./s"], "OUT is missing"),
        (["catt"], "did you mean cat?"),
        (["CAT"], "did you mean cat?"),
        (["--hlep"], "did you mean --help?"),
        (["zzzzzz"], "no command 'zzzzzz'"),
        ([""], "a command is missing"),
    ],
)
def test_wrong_usage_is_told_with_what_would_be_right(words, hint):
    with pytest.raises(errors.Usage, match=re.escape(hint)):
        parse(*words)


@pytest.mark.parametrize(
    "words", [["cat", "./s", "-z"], ["last", "./s", "-1"], ["serve", "s", "--name"], ["unregister"]]
)
def test_no_hint_is_given_at_what_is_not_alike(words):
    with pytest.raises(errors.Usage) as caught:
        parse(*words)
    assert "did you mean" not in str(caught.value)


def test_xs_addr_stands_for_an_address_that_is_not_given(monkeypatch):
    monkeypatch.setenv("XS_ADDR", "/other")
    assert (parse("append", "notes").addr, parse("append", "notes").rest) == ("/other", ["notes"])
    assert parse("append", "./s", "notes").addr == "./s"
    assert parse("cat").addr == parse("version").addr == "/other"
    cas = parse("cas", "sha256-a/b=")
    assert (cas.addr, cas.rest) == ("/other", ["sha256-a/b="])
    export = parse("export", "./out")
    assert (export.addr, export.rest) == ("/other", ["./out"])
    monkeypatch.delenv("XS_ADDR")
    assert parse("append", "store", "notes").addr == "store"
    assert parse("version").addr == ""


# Help


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_help_of_a_command_has_its_options_and_examples(name, capfd):
    command = cli.COMMANDS[name]
    assert cli.run([name, "--help"]) == 0
    text = capfd.readouterr().out
    assert text.startswith(f"usage: xs {name}") and command.summary in text
    for option in command.options:
        assert ", ".join(option.flags) in text and option.help in text
    assert command.examples
    for example in command.examples:
        assert example in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert cli.run(["help", name]) == 0
    assert capfd.readouterr().out == text


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_examples_of_a_command_are_right(name):
    called = set()
    for example in cli.COMMANDS[name].examples:
        text = example.partition(" #")[0].replace("<(", "| ").replace(")", " ")
        lexer = shlex.shlex(text, posix=True, punctuation_chars="|<>")
        lexer.whitespace_split = True
        words = list(lexer)
        for at, word in enumerate(words):
            if word == "xs" and (at == 0 or words[at - 1] == "|"):
                rest = words[at + 1 :]
                end = next((n for n, w in enumerate(rest) if w in ("|", "<", ">")), len(rest))
                parse(*rest[:end])
                called.add(rest[0])
    assert name in called


def test_the_general_help_has_every_command(capfd):
    for argv in (["--help"], ["-h"], ["help"]):
        assert cli.run(argv) == 0
        text = capfd.readouterr().out
        assert all(f"  {c.name} " in text and c.summary in text for c in cli.COMMANDS.values())


def test_the_version_of_the_command_is_printed(capfd):
    assert cli.run(["--version"]) == 0
    assert capfd.readouterr().out == f"xs {__version__}\n"
    assert cli.run(["version"]) == 0
    assert json.loads(capfd.readouterr().out) == {"version": __version__}


# Lines as events


def events(data, size=1 << 20, before='{"topic":"t",', after="}\n"):
    blocks = (data[at : at + size] for at in range(0, len(data), size))
    return b"".join(ndjson.lines_as_events(blocks, before, after))


def test_each_line_is_an_event_however_the_input_is_cut():
    data = 'one\n\n "two"\\ \x00\x1b\u2028\r\nÜ\n'.encode() + b"\xff\xfe\nlast"
    whole = [json.loads(line) for line in events(data).splitlines()]
    assert whole == [
        {"topic": "t", "content": "one"},
        {"topic": "t", "content": ""},
        {"topic": "t", "content": ' "two"\\ \x00\x1b\u2028\r'},
        {"topic": "t", "content": "Ü"},
        {"topic": "t", "content_base64": base64.b64encode(b"\xff\xfe").decode()},
        {"topic": "t", "content": "last"},
    ]
    for size in range(1, len(data)):
        assert [json.loads(line) for line in events(data, size).splitlines()] == whole


def test_no_input_is_no_event_and_a_last_newline_makes_none():
    assert events(b"") == b""
    assert events(b"a\n").count(b"\n") == 1
    assert events(b"\n").count(b"\n") == 1


def test_a_line_goes_out_before_the_next_block_is_read():
    came = []

    def blocks():
        yield b"first\nsec"
        came.append("more")
        yield b"ond\n"

    lines = ndjson.lines_as_events(blocks(), "{", "}\n")
    assert next(lines) == b'{"content":"first"}\n' and not came
    assert next(lines) == b'{"content":"second"}\n'


def test_meta_and_ttl_of_lines_can_not_end_the_line_or_the_object():
    before, after = ndjson.event_frame("t", '{\n"a": [1.10,\r\n"x"]}', 'last:1","x":"')
    (line,) = events(b"x", before=before, after=after).splitlines()
    assert json.loads(line) == {
        "topic": "t",
        "meta": {"a": [1.1, "x"]},
        "ttl": 'last:1","x":"',
        "content": "x",
    }
    assert b"1.10" in line
    for wrong in ('1,"topic":"u"', "", "{", "[" * 100_000):
        with pytest.raises(errors.Invalid):
            ndjson.event_frame("t", wrong, None)


def test_a_topic_is_given_to_lines_of_json_that_name_none():
    data = b'{"content":"a"}\n {}\n{"topic":"u"}\nno json\n[1]\n{"meta":1}'
    for size in range(1, len(data) + 1):
        blocks = [data[at : at + size] for at in range(0, len(data), size)]
        assert b"".join(ndjson.with_topic(blocks, "t")) == (
            b'{"topic":"t","content":"a"}\n{"topic":"t"}\n{"topic":"u"}\nno json\n[1]\n'
            b'{"topic":"t","meta":1}'
        )


# Hashes in exported frames

HASH = "sha256-" + base64.b64encode(bytes(range(224, 256))).decode()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (FRAME.replace(b"null", b'"%b"' % HASH.encode(), 1), HASH),
        (FRAME, None),
        (b'{"hash": "%b", "topic": "t"}' % HASH.encode(), HASH),
        (b'{"topic": "t", "id": "x", "hash": "%b"}' % HASH.encode(), HASH),
        (b'{"topic":"t","id":"x","hash":"../../../etc/passwd"}', None),
        (b'{"topic":"t","id":"x","hash":"sha256-%b="}' % (b"." * 43), None),
        (b'{"topic":"t","id":"x","hash":7}', None),
        (b'{"topic":"hash","id":":","meta":{"hash":"%b"}}' % HASH.encode(), None),
        (b"[]", None),
        (b"no json", None),
        (b"", None),
    ],
)
def test_a_hash_is_found_in_a_frame_and_nothing_else_is_taken_for_one(line, found):
    assert transfer._hash_in(line) == found


@pytest.mark.parametrize(
    ("added", "content"),
    [
        (b',"content":"a\\",\\"content\\":\\"\\u00fc"}', 'a","content":"ü'.encode()),
        (b',"content_base64":"/w=="}', b"\xff"),
        (b',"content":",\\"content_base64\\":\\"eA=="}', b',"content_base64":"eA=='),
        (b"}", None),
    ],
)
@pytest.mark.parametrize(
    "meta",
    [
        b"null",
        b'{"content":"x"}',
        b'{"a":1,"content":"x"}',
        b'{"a":1,"content_base64":"eA=="}',
        b'[",\\"content\\":\\"x"]',
    ],
)
def test_the_content_at_the_end_of_a_frame_is_told_from_all_that_looks_like_it(
    meta, added, content
):
    bare = FRAME.replace(b'"meta":null', b'"meta":' + meta)
    assert transfer._without_content(bare[:-1] + added) == (bare, content)


def test_a_contents_file_is_named_by_base64_of_its_hash_which_has_no_slash():
    for n in range(256):
        digest = hashlib.sha256(bytes([n])).digest()
        name = transfer.file_name("sha256-" + base64.b64encode(digest).decode())
        assert base64.urlsafe_b64decode(name) == base64.standard_b64decode(name)
        assert not set(name) & set("/+=.")


# As a process: output, errors, signals


def start(*args, **options):
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*XS, *args], env=environment(), **{**streams, **options})


def answering(body, status=200, *fields):
    """A script that reads each request as a whole, and gives this answer."""

    def script(peer):
        while head := peer.head():
            peer.body(head)
            peer.answer(body, status, *fields)

    return script


def streaming(*chunks, then=b"0\r\n\r\n"):
    """A script that answers with these chunks; after them comes `then`, or nothing at all."""

    def script(peer):
        head = peer.head()
        peer.body(head)
        peer.send(CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + then)
        peer.head()

    return script


def test_what_the_api_gives_is_printed_untouched(scripted, run_xs):
    data = b'{"a":"\xc2\x9b"}\n\x1b[2J\x00\xff' + os.urandom(300_000)
    server = scripted(streaming(data[:7], data[7:]))
    for args in (["cat", server.path], ["content", server.path, "x"], ["cas", server.path, "x"]):
        done = run_xs(args)
        assert (done.returncode, done.stdout, done.stderr) == (0, data, b"")


def test_an_answer_of_text_ends_with_one_newline(scripted, run_xs):
    for body in (FRAME, FRAME + b"\n"):
        server = scripted(answering(body))
        for args in (["append", server.path, "t"], ["get", server.path, ID]):
            assert run_xs(args).stdout == FRAME + b"\n"


def test_frames_are_printed_as_they_arrive(scripted):
    server = scripted(streaming(FRAME + b"\n", then=b""))
    process = start("cat", server.path, "-f")
    assert process.stdout.readline() == FRAME + b"\n"
    process.kill()
    process.communicate()


def test_an_error_is_one_line_on_standard_error(scripted, run_xs):
    server = scripted(answering("schlimm:\r\n \x1b[31mü\u202e\n".encode(), 400))
    for args in (["cat", server.path], ["append", server.path, "t"], ["remove", server.path, ID]):
        done = run_xs(args)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr == "xs: schlimm: \\u001b[31mü\\u202e\n".encode()


@pytest.mark.parametrize(
    ("args", "status"),
    [
        ([], 2),
        (["nonsense"], 2),
        (["cat"], 2),
        (["cat", "./none", "--nonsense"], 2),
        (["append", "./none"], 2),
        (["append", "./none", "--lines"], 2),
        (["append", "./none", "t", "--lines", "--json"], 2),
        (["append", "./none", "t", "--lines", "--key", "k"], 2),
        (["append", "./none", "--json", "--meta", "1"], 2),
        (["last", "./none", "t", "x"], 2),
        (["first", "./none", "-f"], 2),
        (["scru128", "frobnicate"], 2),
        (["completion", "tcsh"], 2),
        (["serve", "~/store"], 2),
        (["cat", "./none"], 1),
        (["cat", "~/none"], 1),
        (["cat", "no-such-host.invalid:1"], 1),
        (["append", "./none", ""], 1),
        (["append", "./none", "t", "--key", ""], 1),
        (["cas-post", "./none"], 1),
        (["scru128", "unpack", "x"], 1),
        (["scru128", "pack", "{}"], 1),
        (["import", "./none", "./no-such-folder"], 1),
    ],
)
def test_wrong_usage_ends_with_2_and_what_can_not_be_done_with_1(
    run_xs, args, status, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = run_xs(args)
    assert (done.returncode, done.stdout) == (status, b"")
    assert done.stderr.startswith(b"xs: ") and done.stderr.count(b"\n") == 1
    assert os.listdir(tmp_path) == []


def test_no_store_is_told_with_how_to_make_one(run_xs, store_dir):
    for args in (["cat"], ["get", ID], ["last"], ["check"], ["export", "out"], ["remove", ID]):
        done = run_xs([args[0], store_dir, *args[1:]])
        assert done.returncode == 1
        assert done.stderr.decode() == (
            f"xs: no store at: {store_dir}; make one with `xs serve {store_dir}` "
            f"or `xs append {store_dir} TOPIC`\n"
        )


def test_ctrl_c_ends_with_130_and_says_nothing(scripted):
    server = scripted(streaming(b"x\n", then=b""))
    process = start("cat", server.path, "--follow")
    assert process.stdout.readline() == b"x\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_ctrl_c_ends_a_live_read_whichever_thread_hears_it(scripted):
    server = scripted(streaming(b"x\n", then=b""))
    process = start("cat", server.path, "--follow")
    assert process.stdout.readline() == b"x\n"
    (other,) = {int(name) for name in os.listdir(f"/proc/{process.pid}/task")} - {process.pid}
    ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_a_closed_pipe_ends_a_command_quietly(scripted):
    server = scripted(streaming(*[b"x" * 100_000 + b"\n"] * 50))
    process = start("cat", server.path)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(DEADLINE) == 0


def test_a_closed_pipe_ends_a_live_read_even_if_nothing_more_comes(scripted):
    server = scripted(streaming(b"x\n", then=b""))
    for args in (["cat", server.path, "-f"], ["last", server.path, "-f"]):
        process = start(*args)
        assert process.stdout.readline() == b"x\n"
        process.stdout.close()
        assert process.wait(DEADLINE) == 0
        assert process.stderr.read() == b""


def test_an_answer_that_breaks_off_is_an_error_after_what_came(scripted, run_xs):
    def script(peer):
        peer.head()
        peer.send(CHUNKED + b"5\r\nhello\r\n")

    done = run_xs(["cat", scripted(script).path])
    assert (done.returncode, done.stdout) == (1, b"hello")
    assert done.stderr.startswith(b"xs: ") and done.stderr.count(b"\n") == 1


def test_a_full_device_is_an_error(scripted):
    if sys.platform != "linux":
        return  # /dev/full is Linux's
    server = scripted(streaming(b"x\n"))
    with open("/dev/full", "wb") as full:
        process = start("cat", server.path, stdout=full)
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1 and b"No space left" in err


def test_closed_standard_streams_never_receive_what_is_meant_for_a_socket(scripted):
    got = []

    def script(peer):
        while head := peer.head():
            got.append(peer.body(head))
            peer.answer(FRAME)

    server = scripted(script)
    command = f"{shlex.quote(sys.executable)} -m xs append {server.path} t"
    done = subprocess.run(
        ["sh", "-c", f"{command} <&- >&-"],
        stderr=subprocess.PIPE,
        env=environment(),
        timeout=DEADLINE,
    )
    assert got == [b""]
    assert done.returncode == 1 and b"standard output" in done.stderr


def test_a_non_blocking_pipe_is_written_whole(scripted):
    data = os.urandom(1_000_000)
    server = scripted(streaming(data))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = start("cat", server.path, stdout=writing)
    os.close(writing)
    with open(reading, "rb") as file:
        assert file.read() == data
    assert process.wait(DEADLINE) == 0
    process.stderr.close()


# As a process: input


def echoing(requests):
    def script(peer):
        while head := peer.head():
            requests.append((head.decode("latin-1"), peer.body(head)))
            peer.answer(FRAME if b"/append/" in head else b'{"appended":1,"errors":[]}')

    return script


def test_standard_input_is_the_content_with_its_length_if_it_is_short(scripted, run_xs):
    requests = []
    server = scripted(echoing(requests))
    for data in (b"", b"hello\n", os.urandom(65535), os.urandom(65536), os.urandom(3_000_000)):
        assert run_xs(["append", server.path, "t"], stdin=data).returncode == 0
        head, body = requests.pop().__iter__()
        assert body == data
        assert ("content-length: " in head.lower()) == (len(data) < 65536)


def test_the_options_of_an_append_are_its_query_and_fields(scripted, run_xs):
    requests = []
    server = scripted(echoing(requests))
    options = ["--ttl", "time:5", "--if-last", "none", "--key", "ü", "--meta", '{"a": 1.10}']
    assert run_xs(["append", server.path, "a.b", *options]).returncode == 0
    assert run_xs(["append", server.path, "t", "--meta", '"ü"']).returncode == 0
    head = requests[0][0]
    assert head.startswith("POST /append/a.b?ttl=time%3A5&if-last=none HTTP/1.1\r\n")
    assert '\r\nxs-meta: {"a": 1.10}\r\n' in head
    assert "\r\nidempotency-key: Ã¼\r\n" in head
    assert "\r\nxs-meta: IsO8Ig==\r\n" in requests[1][0]


def test_from_a_terminal_nothing_is_read(scripted):
    requests = []
    server = scripted(echoing(requests))
    ours, theirs = pty.openpty()
    process = start("append", server.path, "t", stdin=theirs)
    os.close(theirs)
    out, err = process.communicate(timeout=DEADLINE)
    os.close(ours)
    assert (process.returncode, out, err) == (0, FRAME + b"\n", b"")
    assert requests[0][1] == b""


def test_lines_are_sent_while_standard_input_is_still_open(scripted):
    lines = []
    came = threading.Semaphore(0)

    def script(peer):
        peer.head()
        for data in iter(peer.chunk, b""):
            lines.append(data)
            came.release()
        peer.answer(b'{"appended":2,"first":"a","last":"b","errors":[]}')
        peer.head()

    process = start("append", scripted(script).path, "t", "--lines", stdin=subprocess.PIPE)
    for n in range(2):
        process.stdin.write(b"%d\n" % n)
        process.stdin.flush()
        assert came.acquire(timeout=DEADLINE)
        assert lines[-1] == b'{"topic":"t","content":"%d"}\n' % n
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert out == b'{"appended":2,"first":"a","last":"b","errors":[]}\n'


def test_json_lines_are_sent_as_they_are(scripted, run_xs):
    requests = []
    server = scripted(echoing(requests))
    data = b'{"topic": "a"}\r\n nonsense \n{"topic":"b","content":"\xc3\xbc"}'
    assert run_xs(["append", server.path, "--json"], stdin=data).returncode == 0
    assert requests[0][0].startswith("POST /append HTTP/1.1\r\n")
    assert "\r\ncontent-type: application/x-ndjson\r\n" in requests[0][0]
    assert requests[0][1] == data


def test_lines_that_were_refused_are_told_with_the_summary(scripted, run_xs):
    summary = b'{"appended":1,"errors":[{"line":2,"error":"not a topic"},{"line":9,"error":"x"}]}'
    server = scripted(answering(summary))
    done = run_xs(["append", server.path, "--json"], stdin=b"x")
    assert (done.returncode, done.stdout) == (1, summary + b"\n")
    assert done.stderr == b"xs: 2 lines have errors; line 2: not a topic\n"


@pytest.mark.parametrize(
    "answer", [b"nonsense", b"[]", b'{"errors":"abc"}', b'{"errors":[1]}', b"[" * 60_000]
)
def test_an_answer_that_is_no_summary_is_said_so(scripted, run_xs, answer):
    server = scripted(answering(answer))
    done = run_xs(["append", server.path, "--json"], stdin=b"x")
    assert done.returncode == 1
    assert done.stderr == b"xs: the answer is not a summary of lines as xs gives it\n"


def test_a_conflict_whose_frame_can_not_be_read_is_a_conflict(scripted, run_xs):
    server = scripted(answering(b"[" * 60_000, 409, "Content-Type: application/json"))
    done = run_xs(["append", server.path, "t"], stdin=b"x")
    assert done.returncode == 1
    assert done.stderr == b"xs: not appended: the topic's newest frame is another one\n"


def test_a_line_is_found_however_its_parts_come():
    whole = b"a" * 1000 + b"\n\n" + b"b" * 300 + b"\n" + b"c"
    for size in (1, 2, 7, 999, 1000, 1001, 5000):
        blocks = [whole[n : n + size] for n in range(0, len(whole), size)]
        assert list(split_lines(blocks)) == [b"a" * 1000, b"b" * 300, b"c"]


# At a terminal


def at_terminal(*args, **changes):
    """What `xs` writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*XS, *args],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment(TERM="xterm", **changes),
    )
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if select.select([ours], [], [], DEADLINE)[0]:
            try:
                data = os.read(ours, 65536)
            except OSError:  # EIO: the other side is closed, on Linux
                break
            if not data:
                break
            shown += data
    os.close(ours)
    assert process.wait(DEADLINE) == 0 and process.stderr.read() == b""
    process.stderr.close()
    return shown.replace(b"\r\n", b"\n")


def test_nothing_that_is_stored_can_steer_the_terminal(scripted):
    line = '{"meta":"\x9b31m\u202e\x7f"}\n'
    server = scripted(streaming(line.encode()))
    shown = at_terminal("cat", server.path, NO_COLOR="1").decode()
    assert shown == '{"meta":"\\u009b31m\\u202e\\u007f"}\n'
    assert json.loads(shown) == json.loads(line)
    assert "\x1b[36m" in at_terminal("cat", server.path).decode()
    content = scripted(streaming(b"\x1b[2J\x1b]0;x\x07"))
    shown = at_terminal("content", content.path, "x")
    assert b"\x1b" not in shown and b"\\u001b[2J" in shown


# Ids


def test_a_new_id_is_the_time_of_now_and_goes_apart_and_together(run_xs):
    import scru128

    before = time.time_ns() // 1_000_000
    new = run_xs(["scru128"]).stdout.decode()
    assert re.fullmatch(r"[0-9a-z]{25}\n", new)
    id = scru128.Scru128Id.from_str(new.strip())
    assert before <= id.timestamp <= time.time_ns() // 1_000_000
    parts = run_xs(["scru128", "unpack", new.strip().upper()]).stdout
    assert json.loads(parts) == {
        "ts_ms": id.timestamp,
        "counter_hi": id.counter_hi,
        "counter_lo": id.counter_lo,
        "node": f"{id.entropy:08x}",
    }
    assert run_xs(["scru128", "unpack", "-"], stdin=new * 2).stdout == parts * 2
    assert run_xs(["scru128", "pack"], stdin=parts * 2).stdout.decode() == new * 2
    assert run_xs(["scru128", "pack", parts.decode()]).stdout.decode() == new


def test_the_least_and_the_greatest_id_go_apart_and_together(run_xs):
    both = f"{ids.text(0)}\n{ids.text(ids.MAX)}\n"
    parts = run_xs(["scru128", "unpack", "-"], stdin=both).stdout
    assert run_xs(["scru128", "pack"], stdin=parts).stdout.decode() == both


@pytest.mark.parametrize(
    "change",
    [
        {"ts_ms": 1 << 48},
        {"ts_ms": -1},
        {"ts_ms": 1.0},
        {"ts_ms": True},
        {"counter_hi": 1 << 24},
        {"counter_lo": "1"},
        {"node": "123"},
        {"node": "0123456g"},
        {"node": "0x123456"},
        {"node": 1},
        {"node": None},
    ],
)
def test_parts_that_make_no_id_are_refused(change):
    parts = {"ts_ms": 1, "counter_hi": 2, "counter_lo": 3, "node": "0000ffff"}
    assert ids.parse(idfields.pack(json.dumps(parts))) == 1 << 80 | 2 << 56 | 3 << 32 | 0xFFFF
    with pytest.raises(errors.Invalid):
        idfields.pack(json.dumps({**parts, **change}))


# On stores


@pytest.fixture(params=["on its files", "through its server"])
def store(request, store_dir):
    """The address of a store, used with and without its server."""
    if request.param == "through its server":
        request.getfixturevalue("server")
    return store_dir


@pytest.fixture
def xs(run_xs):
    """Runs a command that must succeed, and gives its standard output."""

    def run(*args, stdin=None, **env):
        done = run_xs(list(args), stdin=stdin, env=env)
        assert (done.returncode, done.stderr) == (0, b""), done
        return done.stdout

    return run


def frames(output):
    lines = [json.loads(line) for line in output.splitlines()]
    return [frame for frame in lines if not frame["topic"].startswith("xs.")]


def test_what_is_appended_is_printed_and_read_back(store, xs):
    one = json.loads(xs("append", store, "notes", "--meta", '{"n": 1.10}', stdin="hello"))
    two = json.loads(xs("append", store, "other"))
    assert list(one) == ["topic", "id", "hash", "meta", "ttl"] and two["hash"] is None
    assert frames(xs("cat", store)) == [one, two]
    assert b'"meta":{"n":1.10}' in xs("get", store, one["id"])
    assert xs("content", store, one["id"]) == xs("cas", store, one["hash"]) == b"hello"
    assert json.loads(xs("next", store, one["id"])) == two
    assert json.loads(xs("prev", store, two["id"], "--topic", "notes")) == one
    assert json.loads(xs("first", store, "notes")) == one
    assert json.loads(xs("last", store)) == json.loads(xs("head", store, "other")) == two
    assert frames(xs("last", store, "notes", "3")) == [one]
    assert frames(xs("cat", store, XS_ADDR="/nowhere")) == [one, two]
    assert frames(xs("cat", XS_ADDR=store)) == [one, two]
    assert xs("remove", store, one["id"]) == b""
    assert frames(xs("cat", store)) == [two]


def test_the_options_of_cat_select(store, xs):
    made = [json.loads(xs("append", store, f"t.{n}", stdin=str(n))) for n in range(4)]
    id = [frame["id"] for frame in made]
    assert frames(xs("cat", store, "--after", id[1])) == made[2:]
    assert frames(xs("cat", store, "--from", id[1], "--until", id[2])) == made[1:3]
    assert frames(xs("cat", store, "-T", "t.*", "--last", "2")) == made[2:]
    assert frames(xs("cat", store, "-T", "t.0,t.3", "--limit", "1")) == made[:1]
    (frame,) = frames(xs("cat", store, "-T", "t.2", "--with-content", "--with-timestamp"))
    assert frame["content"] == "2" and frame["timestamp"].endswith("Z")
    assert f"id: {id[3]}\n".encode() in xs("cat", store, "--sse")


def test_what_is_not_there_ends_with_1_and_one_line(store, run_xs, xs):
    id = json.loads(xs("append", store, "t"))["id"]
    missing = "0" * 25
    for args in (["get", missing], ["next", id], ["remove", missing], ["last", "none"]):
        done = run_xs([args[0], store, *args[1:]])
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(b"xs: ") and done.stderr.count(b"\n") == 1


def test_a_condition_that_does_not_hold_ends_with_1(store, run_xs, xs):
    one = json.loads(xs("append", store, "t", "--if-last", "none", "--key", "k"))
    assert json.loads(xs("append", store, "t", "--key", "k")) == one
    done = run_xs(["append", store, "t", "--if-last", "none"])
    assert (done.returncode, done.stdout) == (1, b"") and one["id"].encode() in done.stderr


def test_a_file_of_lines_becomes_events_in_its_order(store, xs):
    lines = [f"line {n} ü" for n in range(20_000)]
    summary = json.loads(
        xs("append", store, "log", "--lines", "--meta", '{"a":1}', stdin="\n".join(lines))
    )
    assert summary["appended"] == len(lines) and summary["errors"] == []
    got = frames(xs("cat", store, "--with-content", "--topic", "log"))
    assert [frame["content"] for frame in got] == lines
    assert (got[0]["id"], got[-1]["id"]) == (summary["first"], summary["last"])
    assert all(frame["meta"] == {"a": 1} for frame in got)


def test_bytes_that_are_no_text_survive_as_lines(store, xs):
    xs("append", store, "bin", "--lines", stdin=b"\xff\x00\r\nok\n")
    got = frames(xs("cat", store))
    assert [xs("content", store, frame["id"]) for frame in got] == [b"\xff\x00\r", b"ok"]


def test_lines_from_a_slow_pipe_are_live(store, xs):
    xs("append", store, "other")
    writer = start("append", store, "log", "--lines", stdin=subprocess.PIPE)
    reader = start("cat", store, "--follow", "--with-content", "--topic", "log")
    assert json.loads(reader.stdout.readline())["topic"] == "xs.threshold"
    for n in range(3):
        writer.stdin.write(b"%d\n" % n)
        writer.stdin.flush()
        assert json.loads(reader.stdout.readline())["content"] == str(n)
    out, _ = writer.communicate(timeout=DEADLINE)
    assert json.loads(out)["appended"] == 3
    reader.send_signal(signal.SIGINT)
    reader.communicate(timeout=DEADLINE)
    assert reader.returncode == 130


def test_events_as_json_are_appended_and_the_wrong_ones_named(store, run_xs):
    lines = b'{"topic":"a","content":"x"}\nnonsense\n{"topic":"b","meta":[1]}\n'
    done = run_xs(["append", store, "--json"], stdin=lines)
    summary = json.loads(done.stdout)
    assert done.returncode == 1 and b"line 2" in done.stderr
    assert summary["appended"] == 2 and [e["line"] for e in summary["errors"]] == [2]


def test_content_can_be_stored_alone_and_is_collected_later(store, xs, run_xs):
    data = os.urandom(100_000)
    xs("append", store, "t")
    hash = xs("cas-post", store, stdin=data).decode().strip()
    assert hash == "sha256-" + base64.b64encode(hashlib.sha256(data).digest()).decode()
    assert xs("cas", store, hash) == data
    assert xs("cas", hash, XS_ADDR=store) == data
    assert json.loads(xs("gc", store))["removed"] == 0
    assert json.loads(xs("gc", store, "--age", "0s"))["removed"] == 1
    assert run_xs(["cas", store, hash]).returncode == 1


def test_content_alone_can_not_be_empty(store, run_xs):
    done = run_xs(["cas-post", store])
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"xs: no content came on standard input: xs cas-post ADDR < FILE\n"


def test_a_stream_without_its_contents_is_refused_with_how_they_come_along(
    store, xs, run_xs, tmp_path
):
    frame = xs("append", store, "t", stdin=b"content")
    done = run_xs(["import", str(tmp_path / "copy")], stdin=frame)
    assert (
        done.returncode == 1
        and b"is not here: give it in the line, as xs cat --with-content" in (done.stderr)
    )


def test_a_store_is_no_exported_folder_and_it_is_told_how_it_is_imported(
    store_dir, xs, run_xs, tmp_path
):
    xs("append", store_dir, "t", stdin=b"content")
    done = run_xs(["import", (copy := str(tmp_path / "copy")), store_dir])
    assert (done.returncode, done.stdout) == (1, b"")
    way = f"xs cat {store_dir} --with-content | xs import {copy}"
    assert done.stderr.decode() == f"xs: not an exported folder: it is a store: {way}\n"
    assert not os.path.exists(copy)


def a_full_store(store, xs):
    """Frames of each kind, and their contents by id."""
    contents = {}
    for n, data in enumerate([b"small", b"", os.urandom(5000), os.urandom(2_000_000), b"small"]):
        made = json.loads(xs("append", store, "t", "--meta", f'{{"n":{n}}}', stdin=data))
        if made["hash"]:
            contents[made["id"]] = data
    return contents


def test_an_exported_folder_makes_the_same_store_again(store, xs, tmp_path):
    contents = a_full_store(store, xs)
    out, copy = str(tmp_path / "out"), str(tmp_path / "copy")
    assert xs("export", store, out) == b""
    stream = xs("cat", store)
    with open(os.path.join(out, "frames.jsonl"), "rb") as file:
        assert file.read() == stream
    names = os.listdir(os.path.join(out, "cas"))
    for name in names:
        with open(os.path.join(out, "cas", name), "rb") as file:
            digest = hashlib.sha256(file.read()).digest()
        hash = base64.b64decode(name).decode()
        assert hash == "sha256-" + base64.b64encode(digest).decode()
    assert len(names) >= 3 and sorted(os.listdir(out)) == ["cas", "frames.jsonl"]

    for _ in range(2):  # the same again changes nothing
        xs("import", copy, out)
        assert xs("cat", copy) == stream
    for id, data in contents.items():
        assert xs("content", copy, id) == data
    assert json.loads(xs("check", copy).splitlines()[-1])["problems"] == 0


def test_imported_content_goes_with_its_last_frame_unless_it_was_put_there_by_itself(
    store, xs, run_xs, tmp_path
):
    contents = [os.urandom(size) for size in (5000, 40_000, 50_000)]
    for data in contents:
        xs("append", store, "t", stdin=data)
    out, copy = str(tmp_path / "out"), str(tmp_path / "copy")
    xs("export", store, out)
    kept = xs("cas-post", copy, stdin=contents[2]).decode().strip()
    for _ in range(2):  # also where the frames are there already
        assert json.loads(xs("import", copy, out))["errors"] == []
    for each in frames(xs("cat", copy, "--topic", "t")):
        xs("remove", copy, each["id"])
        left = run_xs(["cas", copy, each["hash"]])
        assert (left.stdout == contents[2]) if each["hash"] == kept else left.returncode == 1
    assert json.loads(xs("gc", copy, "--age", "0s")) == {"removed": 1, "bytes": 50_000}


def test_content_of_an_import_that_broke_off_is_left_to_gc(store, xs, run_xs, tmp_path):
    xs("append", store, "t", stdin=os.urandom(40_000))
    out, copy = str(tmp_path / "out"), str(tmp_path / "copy")
    xs("export", store, out)
    died = run_xs(["import", copy, out], env={"XS_FAULT": "import.contents-put"})
    assert died.returncode != 0
    assert json.loads(xs("gc", copy))["removed"] == 0
    assert json.loads(xs("gc", copy, "--age", "0s")) == {"removed": 1, "bytes": 40_000}


def test_a_stream_with_its_content_can_be_piped_into_another_store(store, xs, tmp_path):
    contents = a_full_store(store, xs)
    copy = str(tmp_path / "copy")
    stream = xs("cat", store, "--with-content")
    xs("import", copy, stdin=stream)
    assert xs("cat", copy) == xs("cat", store)
    for id, data in contents.items():
        assert xs("content", copy, id) == data
    (tmp_path / "stream.jsonl").write_bytes(stream)
    xs("import", str(tmp_path / "copy2"), str(tmp_path / "stream.jsonl"))
    assert xs("cat", str(tmp_path / "copy2")) == xs("cat", store)


def test_an_export_goes_to_a_new_or_empty_folder_only(store, xs, run_xs, tmp_path):
    xs("append", store, "t", stdin="x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    done = run_xs(["export", store, str(out)])
    assert done.returncode == 1 and b"not empty" in done.stderr
    assert os.listdir(out) == ["mine"]
    done = run_xs(["export", store, str(out / "mine")])
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    (out / "mine").unlink()
    xs("export", store, str(out))
    assert (out / "frames.jsonl").exists()


def test_an_export_goes_where_a_backup_does(store, xs, run_xs, tmp_path):
    xs("append", store, "t", stdin="x")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("nowhere")
    for command, verb in (("export", "export"), ("backup", "back up")):
        for dest, says in (
            (f"{store}/within", "one of them lies in the other"),
            (str(tmp_path), "one of them lies in the other"),
            (str(tmp_path / "file"), "it is a file"),
            (str(tmp_path / "file" / "below"), "Not a directory"),
            (str(tmp_path / "link"), f"it is a symbolic link, and {tmp_path}/nowhere isn't there"),
        ):
            done = run_xs([command, store, dest])
            assert done.returncode == 1 and done.stderr.startswith(f"xs: can't {verb} ".encode())
            assert done.stderr.endswith(f": {says}\n".encode())
        xs(command, store, str(tmp_path / command / "in" / "it"))
    assert not os.path.exists(f"{store}/within")
    assert (tmp_path / "export" / "in" / "it" / "frames.jsonl").exists()


def test_an_export_that_broke_off_is_told_as_such(store_dir, run_xs, tmp_path):
    from conftest import start_server

    server = start_server(store_dir)
    os.kill(server.process.pid, signal.SIGSTOP)
    out = tmp_path / "out"
    process = start("export", store_dir, str(out))
    deadline = time.monotonic() + DEADLINE
    while not (out / "frames.jsonl.part").exists() and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    process.kill()
    process.communicate()
    os.kill(server.process.pid, signal.SIGCONT)
    for words in (["export", store_dir, str(out)], ["import", str(tmp_path / "copy"), str(out)]):
        done = run_xs(words)
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1
        assert b"broke off, or is under way" in done.stderr and b"new folder" in done.stderr
    server.stop()


@pytest.fixture
def exported(tmp_path, xs):
    """An exported folder with one small and one large content: (folder, their files)."""
    source = str(tmp_path / "source")
    xs("append", source, "t", stdin="small")
    xs("append", source, "t", stdin=b"large" * 10_000)
    xs("export", source, str(tmp_path / "exported"))
    cas = tmp_path / "exported" / "cas"
    files = sorted(cas.iterdir(), key=lambda path: path.stat().st_size)
    return str(tmp_path / "exported"), files


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_folder_is_not_imported(exported, run_xs, xs, tmp_path, which):
    folder, files = exported
    data = bytearray(files[which].read_bytes())
    data[0] ^= 1
    files[which].write_bytes(data)
    done = run_xs(["import", str(tmp_path / "copy"), folder])
    assert done.returncode == 1 and b"damaged" in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("which", [0, 1])
def test_links_and_pipes_in_a_folder_are_not_followed(exported, run_xs, tmp_path, which):
    folder, files = exported
    secret = tmp_path / "secret"
    secret.write_bytes(files[which].read_bytes())
    for make in (lambda path: path.symlink_to(secret), os.mkfifo, os.mkdir):
        if files[which].is_dir() and not files[which].is_symlink():
            files[which].rmdir()
        else:
            files[which].unlink()
        make(files[which])
        done = run_xs(["import", str(tmp_path / "copy"), folder])
        assert done.returncode == 1 and b"can't import" in done.stderr


def test_a_folder_without_frames_is_no_export(run_xs, tmp_path, xs):
    folder = tmp_path / "folder"
    folder.mkdir()
    done = run_xs(["import", str(tmp_path / "copy"), str(folder)])
    assert done.returncode == 1 and b"no frames.jsonl" in done.stderr
    assert not (tmp_path / "copy").exists()


def test_no_counter_is_drawn_into_the_lines_that_one_types(store_dir):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*XS, "append", store_dir, "t", "--lines"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment(),
    )
    os.close(theirs)
    with open_store(store_dir) as client:
        begun, count = 0.0, 0
        while not begun or time.monotonic() - begun < 0.3:  # a counter comes after 0.1 s
            os.write(ours, b"typed\n")
            count += 1
            deadline = time.monotonic() + DEADLINE
            while not is_last(client, count):
                assert time.monotonic() < deadline
                threading.Event().wait(0.005)
            begun = begun or time.monotonic()
    os.write(ours, b"\x04")
    said = process.communicate(timeout=DEADLINE)[0]
    shown = os.read(ours, 65536)
    os.close(ours)
    assert process.returncode == 0 and json.loads(said)["appended"] == count
    assert shown.count(b"typed") == count and b"\x1b[K" not in shown, shown


def is_last(client, count):
    """Whether so many frames are stored."""
    try:
        return len(client.last("t", count)) == count
    except errors.NoStore:  # not made yet
        return False


def test_check_says_at_a_terminal_what_it_is_at_until_it_has_something_to_say(server):
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [*XS, "check", server.directory],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment(),
        timeout=DEADLINE,
    )
    shown = os.read(ours, 1000).decode()
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0 and done.stdout.startswith(b'{"checked":')
    assert shown == f"checking {server.directory} …\r\x1b[K"


def test_check_finds_nothing_in_a_good_store_and_ends_with_1_for_a_bad_one(store, xs, run_xs):
    xs("append", store, "t", stdin=os.urandom(100_000))
    assert json.loads(xs("check", store).splitlines()[-1])["problems"] == 0
    for folder, _, names in os.walk(os.path.join(store, "cas")):
        for name in names:
            path = os.path.join(folder, name)
            os.chmod(path, 0o600)
            with open(path, "r+b") as file:
                file.write(b"damage")
    done = run_xs(["check", store])
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert json.loads(done.stdout.splitlines()[-1])["problems"] == 1


def test_the_version_of_a_store_is_that_of_its_server(store, xs):
    xs("append", store, "t")
    assert json.loads(xs("version", store)) == {"version": __version__}


def test_a_server_on_a_port_asks_for_its_token(store_dir, run_xs, xs):
    import socket

    from conftest import start_server

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    server = start_server(store_dir, "--expose", f"127.0.0.1:{port}")
    try:
        with open(os.path.join(store_dir, "token")) as file:
            token = file.read().strip()
        made = xs("append", f":{port}", "t", stdin="x", XS_TOKEN=token)
        assert made in xs("cat", f"http://{token}@127.0.0.1:{port}")
        done = run_xs(["cat", f":{port}"])
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    finally:
        server.stop()


def test_ctrl_c_stops_a_server_in_good_order(server, xs):
    xs("append", server.directory, "t")
    server.process.send_signal(signal.SIGINT)
    server.process.communicate(timeout=DEADLINE)
    assert server.process.returncode in (0, 130)
    assert json.loads(xs("last", server.directory))["topic"] == "xs.stop"


# Starting


def test_the_hot_path_imports_nothing_slow():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules)\n"
        "import xs.cli; print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE,
    )
    found = {name.replace("xs.", "") for name in done.stdout.split()}
    allowed = {"__future__", "_socket", "gc", "xs", "address", "arguments", "cli", "commands"}
    assert found <= allowed | {"errors", "http1", "request", "stdio", "system", "transport"}
