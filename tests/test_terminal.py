"""What a terminal is shown."""

from __future__ import annotations

import doctest
import json
import os
import pty

import pytest

from xs import terminal

ANY_UNSAFE = "".join(map(chr, terminal._UNSAFE))


def through(blocks, **options):
    return b"".join(terminal.shown(blocks, **options)).decode()


def test_nothing_that_could_steer_a_terminal_gets_through():
    for text in (ANY_UNSAFE, "\x1b[2J", "\x9b31m", "a\rb", "\u202eevil", "\x07", "\x7f"):
        shown = through([text.encode()])
        assert not set(shown) & set(ANY_UNSAFE)
        assert json.loads(f'"{shown}"') == text  # in a string of JSON it is the same string still


def test_other_text_is_shown_as_it_is():
    text = 'Grüße\t{"a": 1}\n日本 🎉 é\n'
    assert through([text.encode()]) == text


def test_text_is_the_same_however_its_blocks_are_cut():
    data = '{"topic":"ü🎉","meta":{"a\\"b":"\\u001b"}}\nx\n'.encode() + b"\xff\x9b"
    for colour in (False, True):
        whole = through([data], colour=colour)
        for size in (1, 2, 3, 7):
            cut = [data[at : at + size] for at in range(0, len(data), size)]
            assert through(cut, colour=colour) == whole


def test_bytes_that_are_no_text_are_written_out():
    assert through([b"a\xff\xfeb"]) == "a\\xff\\xfeb"
    assert through([b"\xe2\x82"]) == "\\xe2\\x82"


def test_a_line_is_shown_as_soon_as_it_is_there():
    came = []

    def blocks():
        yield b'{"a":1}\n{"b"'
        came.append("more")
        yield b":2}\n"

    shown = terminal.shown(blocks(), colour=True)
    assert next(shown).endswith(b"1}\n") and not came


def test_keys_are_coloured_and_nothing_else_is_changed():
    line = '{"topic":"a","meta":{"k\\":":"v:\\"w\\":"},"n":[1,"x"]}'
    coloured = terminal.coloured(line)
    assert "\x1b[36m" in coloured
    assert coloured.replace("\x1b[36m", "").replace("\x1b[0m", "") == line
    assert coloured.count("\x1b[36m") == 4
    assert terminal.coloured('say "hi": no') == 'say "hi": no'


@pytest.mark.parametrize(
    ("environ", "wants"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
        ({"XS_COLOR": "never"}, False),
        ({"XS_COLOR": "always", "NO_COLOR": "1"}, True),
        ({"XS_COLOR": "auto", "NO_COLOR": "1"}, False),
    ],
)
def test_colour_is_a_matter_of_the_environment(environ, wants):
    assert terminal.wants_colour(environ) is wants


def progress_on(descriptor):
    """Runs a progress with `descriptor` as standard error, as long as it takes to be shown."""
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        with terminal.Progress("lines") as progress:
            progress._next = 0
            progress.add(1234)
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_progress_is_one_line_on_a_terminal_that_goes_away():
    ours, theirs = pty.openpty()
    try:
        progress_on(theirs)
        shown = b""
        while shown.count(b"\r\x1b[K") < 2:  # a terminal may give it in pieces
            shown += os.read(ours, 1000)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"1,234 lines" in shown and b"\n" not in shown and shown.endswith(b"\r\x1b[K")


def test_one_is_one_line_and_who_types_the_lines_has_them_to_himself(capfd):
    ours, theirs = pty.openpty()
    kept = os.dup(2)
    os.dup2(theirs, 2)
    try:
        for source in (theirs, -1):
            with terminal.Progress("lines", source=source) as progress:
                progress._next = 0
                progress.add(1)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        shown = os.read(ours, 1000)
        os.close(ours)
        os.close(theirs)
    assert shown.startswith(b"\r\x1b[K1 line, ") and shown.count(b"line") == 1


def test_bytes_of_a_name_that_is_no_utf8_are_shown_as_bytes():
    assert terminal.harmless_name(os.fsdecode(b"n\xff")) == "n\\xff"


def test_progress_is_not_written_to_a_pipe():
    reading, writing = os.pipe()
    try:
        progress_on(writing)
    finally:
        os.close(writing)
    assert os.read(reading, 1000) == b""
    os.close(reading)


def test_a_descriptor_that_is_closed_is_no_terminal():
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    assert not terminal.is_terminal(reading)


def test_the_examples_in_the_documentation_are_true():
    assert doctest.testmod(terminal).failed == 0


def test_a_line_without_an_end_is_not_kept_in_memory():
    blocks = [b'{"a":"' + b"x" * 300_000] * 8
    parts = list(terminal.shown(blocks, colour=True))
    assert len(parts) > 1 and max(map(len, parts)) < 1_700_000
    assert b"".join(parts).replace(b"\x1b[36m", b"").replace(b"\x1b[0m", b"") == b"".join(blocks)
