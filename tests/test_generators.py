"""Generators: values become frames as they come, and the process behind them is kept running."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, start_server, until
from scripting import Frame, Service, is_gone, movable_nu, processes_with
from stores import Gate, add, add_all, all_ids, remove

import xs
from xs import frame, generators, ids, runner, scripts, sqlite
from xs.bulk import BatchWork
from xs.client import Client
from xs.commit import Append
from xs.content import small
from xs.process import SCRIPT_BYTES
from xs.scripts import Scripts

SOON = 0.05  # seconds before a restart, for tests that wait for one


@pytest.fixture
def service(store_dir: str) -> Iterator[Service]:
    """A store whose scripts run in this process."""
    running = Service(store_dir)
    try:
        yield running
    finally:
        running.stop()
    assert os.listdir(os.path.join(store_dir, "run")) == ["lock"]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has ended is started again at once."""
    monkeypatch.setattr(runner, "RESTART_SECONDS", SOON)
    monkeypatch.setattr(runner, "RESTART_SECONDS_MAX", SOON)


def restart(service: Service) -> None:
    """As a server that stops in good order, and starts again."""
    service.stop()
    service.start()


def sh(script: str) -> str:
    return f"#!/bin/sh\n{script}"


def python(script: str) -> str:
    return f"#!{sys.executable}\n{script}"


FOREVER = sh("echo $$; exec sleep 1000")
DUPLEX = sh('while read -r line; do echo "<$line>"; done')


# Values


VALUES = [
    ('"text"', b"text"),
    ('"ünï\\n\\"quoted\\" \\\\ line"', 'ünï\n"quoted" \\ line'.encode()),
    ('""', b""),
    ('"5"', b"5"),
    ('"{}"', b"{}"),
    ("0x[00 ff 0a 0d]", b"\x00\xff\n\r"),
    ("0x[]", b""),
    ("5", b"5"),
    ("1.5", b"1.5"),
    ("true", b"true"),
    ("null", b"null"),
    ("{a: 1, b: [x null]}", b'{"a":1,"b":["x",null]}'),
    ("[1 2]", b"[1,2]"),
    ("[]", b"[]"),
    ("{}", b"{}"),
    ("5sec", b"5000000000"),
    ("1kb", b"1000"),
    ('("x" | fill --width 100000 --character x)', b"x" * 100_000),
]


def test_each_value_becomes_a_frame(service: Service) -> None:
    source = service.append("g.spawn", f"[{' '.join(text for text, _ in VALUES)}]")
    found = service.wait("g.recv", len(VALUES))[: len(VALUES)]
    assert [each.content for each in found] == [data for _, data in VALUES]
    assert [each.has_content for each in found] == [bool(data) for _, data in VALUES]
    assert all(each.meta == {"source_id": source} for each in found)


def test_what_json_has_no_type_for_is_json_too_and_no_text(service: Service) -> None:
    service.append("g.spawn", "[2024-05-06T07:08:09+00:00]")
    (value,) = service.values("g", 1)
    assert json.loads(value).startswith("2024-05-06")


@pytest.mark.parametrize(
    ("script", "values"),
    [
        ("5", [b"5"]),
        ('"text"', [b"text"]),
        ("0x[00 0a ff]", [b"\x00\n\xff"]),
        ("{a: 1}", [b'{"a":1}']),
        ("[[a b]; [1 2] [3 4]]", [b'{"a":1,"b":2}', b'{"a":3,"b":4}']),
        ("1..3", [b"1", b"2", b"3"]),
        ("def f [] { [a b] }\nf | each {|t| $t + $t}", [b"aa", b"bb"]),
        ('print "noise"; print -n "more"; 5', [b"5"]),
        ("use std/math\n$math.PI | into int", [b"3"]),
        ("'a\nb' | lines", [b"a", b"b"]),
        # Nushell has these in pieces.
        ('"" | fill -w 20000 -c ü', ["ü".encode() * 20_000]),
        ('[1 2 3] | each {|x| $"line ($x)"} | str join "\\n"', [b"line 1\nline 2\nline 3"]),
        ('"" | fill -w 20000 -c x | into binary', [b"x" * 20_000]),
        ("1..3000 | each { 0x[ff] } | bytes collect", [b"\xff" * 3000]),
    ],
    ids=range(14),
)
def test_what_a_pipeline_yields_is_its_values(
    service: Service, script: str, values: list[bytes]
) -> None:
    source = service.append("g.spawn", script)
    (stop,) = service.wait("g.stop")[:1]
    assert stop.meta == {"source_id": source, "reason": "finished", "status": 0}
    assert [each.content for each in service.frames("g.recv") if each.id < stop.id] == values
    assert service.topics("g.*")[:2] == ["g.spawn", "g.start"]


@pytest.mark.parametrize("script", ["null", "let x = 3", "ignore", "[]", "^true"])
def test_a_pipeline_without_values_yields_none(service: Service, script: str) -> None:
    service.append("g.spawn", script)
    service.wait("g.stop")
    assert service.topics("g.*")[:3] == ["g.spawn", "g.start", "g.stop"]


def test_bytes_from_another_program_are_values_as_they_come(service: Service) -> None:
    service.append("g.spawn", "^sh -c 'echo one; head -c 70000 /dev/zero; echo; sleep 1000'")
    found: list[Frame] = []

    def is_all_there() -> bool:
        found[:] = service.frames("g.recv")
        return sum(len(each.content) for each in found) >= 70_005

    until(is_all_there, "all bytes")
    assert b"".join(each.content for each in found) == b"one\n" + b"\0" * 70_000 + b"\n"
    assert max(len(each.content) for each in found) <= generators.CHUNK_BYTES


def test_a_file_is_values_as_a_byte_stream_is(service: Service, tmp_path: Path) -> None:
    data = bytes(range(256)) * 200
    (tmp_path / "file").write_bytes(data)
    service.append("g.spawn", f"open --raw {tmp_path}/file")
    (stop,) = service.wait("g.stop")[:1]
    assert stop.meta["reason"] == "finished"
    found = [each.content for each in service.frames("g.recv") if each.id < stop.id]
    assert b"".join(found) == data
    assert max(map(len, found)) <= generators.CHUNK_BYTES


def test_a_text_without_end_is_a_failure(
    service: Service, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xs.generators.VALUE_BYTES", 1 << 20)
    service.append("g.spawn", "let t = ('x' | fill -w 10000); 1.. | each { $t } | str join")
    (stop,) = service.wait("g.stop")[:1]
    assert "it yielded one value of more than 1048576 bytes: `lines`" in stop.meta["reason"]
    assert service.frames("g.recv") == []


def test_what_has_come_of_a_text_when_its_script_is_ended_is_stored(
    service: Service, tmp_path: Path
) -> None:
    """It is one value all the same."""
    seen = tmp_path / "seen"
    service.append(
        "g.spawn", f"1.. | each {{|n| if $n == 3 {{ touch {seen}; sleep 1hr }}; 'x' }} | str join"
    )
    until(seen.exists, "two pieces")
    service.append("g.terminate")
    service.wait("g.stop")
    assert [each.content for each in service.frames("g.recv")] == [b"xx"]


def test_a_text_without_a_character_is_a_value_and_nothing_is_none(service: Service) -> None:
    for name, script in (("empty", '""'), ("nothing", "null"), ("silent", "^true")):
        service.append(f"{name}.spawn", script)
        service.wait(f"{name}.stop")
        found = [each.content for each in service.frames(f"{name}.recv")]
        assert found == ([b""] if name == "empty" else [])


def test_a_line_without_its_end_is_stored_when_its_program_is_ended(service: Service) -> None:
    service.append("g.spawn", "#!/bin/sh\nprintf 'whole\nhalf'; exec sleep 100")
    service.wait("g.recv")
    service.append("g.terminate")
    service.wait("g.stop")
    assert [each.content for each in service.frames("g.recv")] == [b"whole", b"half"]


def test_values_come_before_the_script_ends(service: Service) -> None:
    service.append("g.spawn", "[1 2 3] | each {|n| if $n == 3 { sleep 1hr }; $n}")
    assert service.values("g", 2) == [b"1", b"2"]
    assert not is_gone(service.pid("g"))


def test_the_delay_of_a_value_is_short(service: Service) -> None:
    service.append(
        "g.spawn", "generate {|_ = 0| sleep 20ms; {out: (date now | into int), next: 0}}"
    )
    found = service.wait("g.recv", 20)
    delays = [(int(each.id, 36) >> 80) - int(each.content) / 1e6 for each in found]
    assert sorted(delays)[len(delays) // 2] < 100, delays  # ms


def test_a_slip_in_the_meta_of_a_spawn_is_named_in_the_log(service: Service) -> None:
    service.append("g.spawn", "[1]", duplx=True, source="mine")
    service.wait("g.stop")
    assert [line for line in service.said if "meta" in line] == [
        'g: its meta has "duplx": did you mean duplex?'
    ]


def test_what_a_script_prints_goes_to_the_log_with_its_name(service: Service) -> None:
    service.append("g.spawn", 'print "noise"; print --stderr "complaint"; [1]')
    service.wait("g.stop")
    assert {"g: noise", "g: complaint"} <= set(service.said)
    assert service.values("g", 1) == [b"1"]


def test_an_error_in_a_stream_ends_it_after_the_values_before(service: Service) -> None:
    script = "1..5 | each {|n| if $n == 3 { error make {msg: 'the third'} }; $n}"
    source = service.append("g.spawn", script)
    (stop,) = service.wait("g.stop")
    assert [each.content for each in service.frames("g.recv")] == [b"1", b"2"]
    assert stop.meta["source_id"] == source
    assert stop.meta["reason"] == "it ended with status 1" and stop.meta["status"] == 1
    assert "the third" in stop.meta["stderr"] and "script.nu:1:" in stop.meta["stderr"]
    assert service.status("g")["error"] == "it ended with status 1"


def test_an_external_command_that_fails_is_an_error(service: Service) -> None:
    service.append("g.spawn", "^sh -c 'echo one; echo why >&2; exit 3'")
    (stop,) = service.wait("g.stop")[:1]
    assert stop.meta["status"] == 3
    assert stop.meta["stderr"] == "why"
    assert service.values("g", 1) == [b"one\n"]


def test_an_error_of_the_script_is_told_with_its_line(service: Service) -> None:
    service.append("g.spawn", "let x = 1\nlet y = $x / 0\n$y")
    (stop,) = service.wait("g.stop")
    assert "division by zero" in stop.meta["stderr"].lower()
    assert "script.nu:2:" in stop.meta["stderr"]
    assert service.frames("g.recv") == []


# What starts, and what does not


def test_start_and_stop_name_their_spawn(service: Service) -> None:
    source = service.append("g.spawn", sh("echo said >&2; exit 3"))
    (start,) = service.wait("g.start")[:1]
    (stop,) = service.wait("g.stop")[:1]
    assert start.meta == {"source_id": source} and not start.has_content
    assert stop.meta == {
        "source_id": source,
        "reason": "it ended with status 3",
        "status": 3,
        "stderr": "said",
    }


def test_the_meta_names_the_generator(service: Service) -> None:
    source = service.append("anything.spawn", DUPLEX, topic="the.name", duplex=True)
    service.wait("the.name.start")
    service.append("the.name.send", "x\n")
    service.append("anything.send", "y\n")
    assert service.values("the.name", 1) == [b"<x>"]
    service.append("anything.terminate")
    again = service.append("other.spawn", FOREVER, topic="the.name")
    service.wait("the.name.start", 2)
    service.append("the.name.terminate")
    stops = service.wait("the.name.stop", 2)
    assert [each.meta["source_id"] for each in stops] == [source, again]
    assert [each.meta["reason"] for each in stops] == ["replaced", "terminated"]
    assert service.topics("anything.*") == ["anything.spawn", "anything.send", "anything.terminate"]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("ls | nosuch(", {}, "script.nu:1:1"),
    ("no-such-command-anywhere $in.x |", {}, "script.nu"),
    ("", {}, "the frame has no content: it is to be the script"),
    (" \n\t", {}, "the frame has no content: it is to be the script"),
    ("#!/no/such/program\n", {}, "no such program: '/no/such/program': #! is followed by"),
    ("5", {"duplex": "yes"}, "duplex is true or false"),
    ("5", {"topic": 5}, "topic is the generator's name, a text"),
    ("5", {"topic": "not a topic"}, "not a topic: 'not a topic': use a-z A-Z"),
    ("5", {"topic": "xs"}, "the name 'xs' belongs to the runtime"),
    ("5", {"topic": "xs.store.add"}, "the name 'xs.store.add' belongs to the runtime"),
    ("5" * (SCRIPT_BYTES + 1), {}, f"the script is too long: at most {SCRIPT_BYTES} bytes"),
]


@pytest.mark.parametrize(("script", "meta", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_can_not_start_is_told_why(
    service: Service, script: str, meta: dict[str, Any], says: str
) -> None:
    source = service.append("g.spawn", script, **meta)
    (error,) = service.wait("g.spawn.error")
    assert error.meta.keys() == {"source_id", "reason"} and error.meta["source_id"] == source
    assert says in error.meta["reason"].lower() or says in error.meta["reason"]
    until(lambda: service.is_out("g"), "it is out of service")
    assert service.topics("*") == ["g.spawn", "g.spawn.error"]


def test_meta_that_is_no_record_is_refused(service: Service) -> None:
    add(service.store, "g.spawn", b"5", meta='"text"')
    (error,) = service.wait("g.spawn.error")
    assert error.meta["reason"] == "the meta of a spawn is a record"


def test_an_error_is_told_under_the_name_that_was_meant(service: Service) -> None:
    service.append("g.spawn", FOREVER)
    service.wait("g.recv")
    service.append("g.spawn", "5", topic="other", duplex=7)
    service.wait("other.spawn.error")
    assert service.topics("g.*") == ["g.spawn", "g.start", "g.recv", "g.spawn"]
    assert service.status("g")["pid"]


def test_meta_may_have_any_json(service: Service) -> None:
    digits = "9" * 5000  # more than CPython makes an int of
    add(
        service.store, "g.spawn", sh("echo up").encode(), meta=f'{{"n":{digits},"ttl":"ephemeral"}}'
    )
    assert service.values("g", 1) == [b"up"]


def test_without_nushell_it_is_said_how_to_get_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XS_NU", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    service.append("g.spawn", "5")
    (error,) = service.wait("g.spawn.error")
    assert "get it from https://www.nushell.sh" in error.meta["reason"]
    service.append("h.spawn", sh("echo up"))  # which needs none
    assert service.values("h", 1) == [b"up"]


def test_an_ephemeral_spawn_is_refused_and_disturbs_nobody(service: Service) -> None:
    service.append("g.spawn", FOREVER)
    (pid,) = service.values("g", 1)
    source = service.append("g.spawn", FOREVER, ttl="ephemeral")
    (error,) = service.wait("g.spawn.error")
    assert error.meta["source_id"] == source
    assert "ephemeral" in error.meta["reason"]
    assert not is_gone(int(pid)) and service.status("g")["pid"] == int(pid)


def test_a_spawn_in_chunks_is_refused_once_and_no_part_of_it_runs(service: Service) -> None:
    service.append("g.spawn", FOREVER)
    service.wait("g.recv")
    run = service.store.runs.begin(Append("g.spawn", meta='{"n":1}'))
    run.write(b"#!/bin/sh\n")
    (error,) = service.wait("g.spawn.error")
    assert run.first is not None
    assert error.meta["source_id"] == ids.text(run.first)
    assert "a script is one frame" in error.meta["reason"]
    run.write(b"echo a part of it runs;")
    good = service.append("g.spawn", sh("echo up; exec sleep 1000"))
    run.write(b"sleep 1000")
    run.end()
    service.append("h.spawn", FOREVER)  # behind all of it: what comes of that has come
    service.wait("h.recv")
    assert service.values("g", 2)[1] == b"up"
    restart(service)
    assert service.values("g", 3)[2] == b"up"
    assert {each.meta["source_id"] for each in service.frames("g.start")[1:]} == {good}
    assert service.topics("g.spawn.error") == ["g.spawn.error"]


def test_a_long_spawn_that_a_command_cuts_into_chunks_is_refused_as_a_whole(
    store_dir: str,
) -> None:
    script = sh("echo up\n" + "# and so on\n" * 5000)
    server = start_server(store_dir)
    try:
        with xs.open(store_dir) as store:
            made = store.append("g.spawn", iter([script.encode()]), chunked=True)
            assert len(list(store.cat(topic="g.spawn"))) > 2
            store.append("g.terminate")
            store.append("h.spawn", sh("echo up; exec sleep 1000"))
            until(lambda: list(store.cat(topic="h.recv")), "h runs")
            until(lambda: list(store.cat(topic="g.spawn.error")), "g is refused")
            (error,) = store.cat(topic="g.spawn.error")
            assert error.meta["source_id"] == made.id
            assert not list(store.cat(topic="g.start,g.recv,g.stop"))
    finally:
        server.stop()


@pytest.mark.parametrize("meta", ['{"more":true}', '{"chunk":"%s","more":false}' % ("0" * 25)])
def test_what_says_that_it_is_a_part_of_a_script_is_refused(service: Service, meta: str) -> None:
    """Such as what came with an import, of a run that is not here, or is yet to come."""
    add(service.store, "g.spawn", b"5", meta=meta)
    (error,) = service.wait("g.spawn.error")
    assert "a script is one frame" in error.meta["reason"]


def test_after_an_error_the_name_can_be_used_again(service: Service) -> None:
    for n in range(3):
        service.append("g.spawn", "nonsense (")
        service.wait("g.spawn.error", n + 1)
        service.append("g.spawn", "[up]")
        service.wait("g.recv", n + 1)


def test_a_name_that_is_too_long_is_logged(service: Service) -> None:
    service.append("n" * (frame.TOPIC_MAX - 6) + ".spawn", FOREVER)
    until(lambda: service.said, "what the log says")
    assert "too long for the name of a generator" in service.said[0]
    service.append("g.spawn", FOREVER)
    service.wait("g.recv")


# Restarts


def test_what_ends_is_started_again_after_a_second(service: Service) -> None:
    service.append("g.spawn", sh("echo x"))
    service.wait("g.start", 3)
    starts, stops = service.frames("g.start"), service.frames("g.stop")
    waits = [(int(b.id, 36) >> 80) - (int(a.id, 36) >> 80) for a, b in zip(stops, starts[1:])]
    assert all(1000 <= wait < 2000 for wait in waits), waits


def test_who_keeps_failing_waits_twice_as_long_each_time() -> None:
    backoff = runner.Backoff()
    waits = [backoff.after(well=False) for _ in range(9)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert backoff.after(well=True) == 1
    assert [backoff.after(well=False) for _ in range(3)] == [1, 2, 4]


def waits_between(service: Service, name: str, count: int) -> list[float]:
    """Seconds from each stop to the next start."""
    starts = service.wait(f"{name}.start", count + 1)
    stops = service.frames(f"{name}.stop")
    at = [[(int(each.id, 36) >> 80) / 1000 for each in of] for of in (stops, starts)]
    return [start - stop for stop, start in zip(at[0], at[1][1:])][:count]


def test_a_generator_that_fails_is_started_later_and_later(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RESTART_SECONDS", 0.1)
    monkeypatch.setattr(runner, "RESTART_SECONDS_MAX", 0.4)
    service.append("g.spawn", sh("exit 3"))
    waits = waits_between(service, "g", 4)
    assert all(wait >= least for wait, least in zip(waits, [0.09, 0.19, 0.39, 0.39])), waits


def test_who_ran_well_is_started_again_soon(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RESTART_SECONDS", 0.2)
    monkeypatch.setattr(runner, "WELL_SECONDS", 2.0)
    count = Path(service.folder).parent / "count"
    script = f"echo x >>{count}; [ $(wc -l <{count}) = 4 ] && sleep 2.2; exit 3"
    service.append("g.spawn", sh(script))  # it fails, but runs well the fourth time
    waits = waits_between(service, "g", 5)
    assert waits[2] >= 0.79, waits
    assert waits[3] < 1.5 and waits[4] < 1.5, waits  # and not 1.6 and 3.2


def test_a_process_that_is_killed_is_started_again(service: Service, soon: None) -> None:
    service.append("g.spawn", "[up down] | each {|t| if $t == down { sleep 1hr }; $t}")
    for n in range(1, 4):
        service.wait("g.recv", n)
        os.kill(service.pid("g"), signal.SIGKILL)
        stop = service.wait("g.stop", n)[-1]
        assert (stop.meta["reason"], stop.meta["status"]) == ("signal 9 ended it", -9)


@pytest.mark.parametrize("how", ["not found", "not run"])
def test_one_that_is_to_be_started_again_while_nushell_is_missing_comes_back_with_it(
    service: Service, soon: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    real = movable_nu(tmp_path, monkeypatch, is_always_found=how == "not run")
    script = "generate {|n = 0| if $n > 0 { sleep 1hr }; {out: up, next: 1} }"
    source = service.append("g.spawn", script)
    service.wait("g.recv")
    real.rename(tmp_path / "away")
    os.kill(service.pid("g"), signal.SIGKILL)
    until(lambda: sum("it is started again" in line for line in service.said) > 3, "again")
    (tmp_path / "away").rename(real)
    assert service.values("g", 2) == [b"up", b"up"]
    assert [each.meta for each in service.frames("g.start")] == [{"source_id": source}] * 2
    assert service.topics("g.spawn.error") == []


def test_it_goes_on_when_the_runner_meets_something_unforeseen(
    service: Service, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.append("g.spawn", "print $env.XS_MARK; print $'($env.XS_MARK)B!!!'; [5]")
    service.wait("g.start", 2)
    service.append("g.spawn", "[6]")
    until(lambda: b"6" in [each.content for each in service.frames("g.recv")], "the next one")


def test_what_says_nothing_at_the_start_has_failed(
    service: Service, soon: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = tmp_path / "nu"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 0.115.1 || exec sleep 1000\n')
    slow.chmod(0o755)
    monkeypatch.setenv("XS_NU", str(slow))
    monkeypatch.setattr(runner, "START_SECONDS", 0.2)
    service.append("g.spawn", "5")
    (stop,) = service.wait("g.stop")[:1]
    assert stop.meta["reason"] == "it did not start within 0 s"
    service.append("g.terminate")
    until(lambda: not processes_with(str(tmp_path)), "it is gone")


# Replace, terminate, the server's own end


def test_a_new_spawn_replaces_the_one_that_runs(service: Service) -> None:
    sources = [service.append("g.spawn", FOREVER)]
    pids = [int(service.values("g", 1)[0])]
    for n in range(2, 4):
        sources.append(service.append("g.spawn", FOREVER))
        pids.append(int(service.values("g", n)[-1]))
    assert [is_gone(pid) for pid in pids] == [True, True, False]
    stops = service.frames("g.stop")
    assert [each.meta for each in stops] == [
        {"source_id": source, "reason": "replaced"} for source in sources[:2]
    ]
    assert [each.topic for each in service.frames("g.*") if each.topic != "g.spawn"] == [
        *("g.start", "g.recv", "g.stop") * 2,
        *("g.start", "g.recv"),
    ]
    assert service.status("g")["id"] == sources[-1]


def test_of_many_spawns_at_once_the_last_runs(service: Service) -> None:
    service.append("other.spawn", FOREVER)
    appends = [Append("g.spawn", service.store.cas.take([FOREVER.encode()])) for _ in range(20)]
    last = add_all(service.store, [*appends])[-1]
    until(
        lambda: service.status("g").get("id") == frame.id_of(last) and service.status("g")["pid"],
        "the last",
    )
    service.append("g.terminate")
    until(lambda: service.is_out("g"), "it is out of service")
    until(lambda: sessions_of(service) == {service.pid("other")}, "no other process is left")


def sessions_of(service: Service) -> set[int]:
    """The sessions of the processes that run scripts of a store."""
    found = set()
    for pid in processes_with(f"{service.folder}/run/"):
        with contextlib.suppress(ProcessLookupError):  # it has ended by now
            found.add(os.getsid(pid))
    return found


def test_terminate_ends_it_for_good(service: Service, soon: None) -> None:
    source = service.append("g.spawn", FOREVER)
    (pid,) = service.values("g", 1)
    service.append("g.terminate")
    (stop,) = service.wait("g.stop")
    assert is_gone(int(pid))
    assert stop.meta == {"source_id": source, "reason": "terminated"}
    until(lambda: service.is_out("g"), "it is out of service")
    restart(service)
    service.append("other.spawn", sh("echo up; sleep 1000"))
    service.wait("other.recv")
    assert service.topics("g.*") == ["g.spawn", "g.start", "g.recv", "g.terminate", "g.stop"]


def test_terminate_between_two_runs_ends_it_too(service: Service) -> None:
    service.append("g.spawn", sh("exit 3"))
    service.wait("g.stop")
    service.append("g.terminate")
    stops = service.wait("g.stop", 2)
    assert [each.meta["reason"] for each in stops] == ["it ended with status 3", "terminated"]
    until(lambda: service.is_out("g"), "it is out of service")


@pytest.mark.parametrize("how", ["ephemeral", "removed", "time:2000"])
def test_what_was_terminated_stays_so_though_the_frame_is_gone(service: Service, how: str) -> None:
    service.append("g.spawn", FOREVER)
    service.wait("g.recv")
    ttl = "forever" if how == "removed" else how
    made = service.append("g.terminate", ttl=ttl)
    service.wait("g.stop")
    if how == "removed":
        remove(service.store, made)
    until(lambda: service.topics("g.terminate") == [], "it is gone")
    restart(service)
    service.append("other.spawn", FOREVER)
    service.wait("other.recv")
    assert service.topics("g.start") == ["g.start"]
    service.append("g.spawn", FOREVER)
    service.wait("g.start", 2)


@pytest.mark.parametrize("how", ["while it runs", "while no server runs", "by a wrong one"])
def test_what_was_replaced_stays_so_though_the_frame_is_gone(service: Service, how: str) -> None:
    service.append("g.spawn", FOREVER)
    service.wait("g.recv")
    if how == "while no server runs":
        service.stop()
        with xs.open(service.folder) as store:
            newer = store.append("g.spawn", FOREVER).id
        service.start()
    else:
        newer = service.append("g.spawn", FOREVER if how == "while it runs" else b"")
    if how == "by a wrong one":
        service.wait("g.spawn.error")
    else:
        service.wait("g.start", 2)
    ended = service.append("g.terminate")
    until(lambda: service.is_out("g"), "it is out of service")
    starts = len(service.topics("g.start"))
    for gone in (newer, ended):
        remove(service.store, gone)
    for _ in range(2):
        restart(service)
        service.append("other.spawn", FOREVER)
        until(lambda: service.status("other").get("pid"), "what comes after it")
        assert service.is_out("g")
    assert len(service.topics("g.start")) == starts
    service.append("g.spawn", FOREVER)
    service.wait("g.start", starts + 1)


def test_what_was_terminated_while_no_server_ran_stays_so_though_the_frame_is_gone(
    service: Service,
) -> None:
    for name in "gh":
        service.append(f"{name}.spawn", FOREVER)
        service.wait(f"{name}.recv")
    service.stop()
    with xs.open(service.folder) as store:
        store.append("h.spawn", FOREVER)
        ended = [store.append(f"{name}.terminate").id for name in "gh"]
    service.start()
    service.append("other.spawn", FOREVER)
    service.wait("other.recv")
    for each in ended:
        remove(service.store, each)
    restart(service)
    service.wait("other.recv", 2)
    assert service.topics("g.start") == ["g.start"]
    assert service.topics("h.start") == ["h.start"]
    assert service.is_out("g") and service.is_out("h")


def test_an_ephemeral_order_that_comes_while_the_server_starts_is_obeyed(service: Service) -> None:
    service.append("g.spawn", FOREVER)
    service.wait("g.recv")
    service.stop()
    service.start(scripts=False)
    service.scripts = Scripts(service.store, service.said.append)
    service.append("g.terminate", ttl="ephemeral")  # a socket listens by now
    service.append("h.spawn", FOREVER)
    service.scripts.start()
    service.wait("h.recv")
    until(lambda: service.is_out("g"), "it is out of service")


def test_terminate_of_what_does_not_run_changes_nothing(service: Service) -> None:
    service.append("g.terminate")
    service.append("h.spawn", FOREVER)
    service.wait("h.recv")
    service.append("g.spawn", FOREVER)
    service.wait("g.recv")
    assert service.topics("g.*") == ["g.terminate", "g.spawn", "g.start", "g.recv"]


def test_what_it_has_yielded_when_it_ends_is_stored(service: Service) -> None:
    script = python(
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    print('last', flush=True)\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('first', flush=True)\n"
        "while True: time.sleep(1000)"
    )
    for name in ("a", "b"):
        service.append(f"{name}.spawn", script)
        service.wait(f"{name}.recv")
    service.append("a.terminate")
    service.append("b.spawn", FOREVER)
    for name in ("a", "b"):
        (stop,) = service.wait(f"{name}.stop")
        found = [each.content for each in service.frames(f"{name}.recv") if each.id < stop.id]
        assert found == [b"first", b"last"]


def test_a_server_that_stops_ends_it_and_starts_it_again(service: Service) -> None:
    source = service.append("g.spawn", FOREVER)
    pid = int(service.values("g", 1)[0])
    restart(service)
    assert is_gone(pid)
    (stop,) = service.frames("g.stop")
    assert stop.meta == {"source_id": source, "reason": "shutdown"}
    assert int(service.values("g", 2)[1]) != pid
    assert [each.meta for each in service.frames("g.start")] == [{"source_id": source}] * 2


def test_while_no_server_runs_orders_are_kept_for_it(service: Service) -> None:
    for name in ("a", "b", "c"):
        service.append(f"{name}.spawn", FOREVER)
        service.wait(f"{name}.recv")
    service.stop()
    with xs.open(service.folder) as store:  # a command that writes to the files
        store.append("a.terminate")
        newer = store.append("b.spawn", sh("echo newer; sleep 1000")).id
        store.append("d.spawn", sh("echo d; sleep 1000"))
        store.append("e.spawn", sh("echo e; sleep 1000"))
        store.append("e.terminate")
        store.append("f.terminate")
        store.append("f.spawn", sh("echo f; sleep 1000"))
        store.append("x.spawn", sh("echo named; sleep 1000"), meta={"topic": "b.c"})
    service.start()
    assert service.values("d", 1) == [b"d"]
    assert service.values("f", 1) == [b"f"]
    assert service.values("b.c", 1) == [b"named"]
    assert service.values("b", 2)[1] == b"newer"
    service.wait("c.recv", 2)
    assert service.status("b")["id"] == newer
    assert {"a", "e"}.isdisjoint(each["name"] for each in service.scripts.status())  # type: ignore[union-attr]
    assert service.topics("e.*") == ["e.spawn", "e.terminate"]
    assert service.topics("a.start") == ["a.start"]


def test_a_spawn_that_failed_is_tried_again_by_the_next_server(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    service.append("g.spawn", f"#!{program}\n")
    service.wait("g.spawn.error")
    program.symlink_to("/bin/cat")
    restart(service)
    assert service.values("g", 1) == [f"#!{program}".encode()]


def test_without_scripts_nothing_runs_until_a_server_has_them(service: Service) -> None:
    service.stop()
    service.start(scripts=False)
    service.append("g.spawn", FOREVER)
    service.stop()
    service.start()
    service.wait("g.recv")


def test_a_server_without_scripts_runs_none(store_dir: str) -> None:
    server = start_server(store_dir, "--no-scripts")
    with xs.open(store_dir) as store:
        store.append("g.spawn", FOREVER)
        assert [each.topic for each in store.cat()] == ["xs.start", "g.spawn"]
    server.stop()
    assert [each.topic for each in xs.open(store_dir).cat()] == ["xs.start", "g.spawn", "xs.stop"]
    assert not os.path.exists(f"{store_dir}/run")


# Frames that look like the runtime's own


def test_frames_that_look_like_the_runtime_s_own_change_nothing(service: Service) -> None:
    source = service.append("g.spawn", DUPLEX, duplex=True)
    service.wait("g.start")
    pid = service.pid("g")
    for what in ("start", "stop", "recv", "spawn.error", "terminated", "spawn.terminate", "state"):
        service.append(f"g.{what}", "x", source_id=source, reason="terminated")
    service.append("terminate")
    service.append("spawn", FOREVER)
    service.append("h.start", source_id=source)
    service.append("h.recv", FOREVER)
    service.append("g.send", "x\n")
    until(lambda: service.frames("g.recv")[-1].content == b"<x>", "it is there")
    assert service.pid("g") == pid
    restart(service)
    service.wait("g.start", 3)  # one of them is the client's
    service.append("g.send", "y\n")
    until(lambda: service.frames("g.recv")[-1].content == b"<y>", "it is there")
    assert [each["name"] for each in service.scripts.status()] == ["g"]  # type: ignore[union-attr]


# Programs


def test_each_line_of_a_program_is_a_value(service: Service) -> None:
    script = sh(
        "printf 'one\\n\\n three \\n'; printf '\\377\\000\\n{\"a\":1}\\r\\n'; printf 'no end'"
    )
    service.append("g.spawn", script)
    (stop,) = service.wait("g.stop")[:1]
    assert stop.meta["reason"] == "finished"
    found = [each for each in service.frames("g.recv") if each.id < stop.id]
    expected = [b"one", b"", b" three ", b"\xff\0", b'{"a":1}\r', b"no end"]
    assert [each.content for each in found] == expected


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_may_be_longer_than_a_pipe(service: Service, end: str) -> None:
    service.append("g.spawn", python(f"print('x' * 1_000_000, end={end!r})"))
    service.wait("g.stop")
    assert [each.content for each in service.frames("g.recv")] == [b"x" * 1_000_000]


def test_a_program_in_python(service: Service) -> None:
    service.append(
        "clock.spawn",
        "#!/usr/bin/env python3\nimport itertools, time\n"
        "for n in itertools.count():\n    print(n, flush=True)\n    time.sleep(0.01)\n",
    )
    assert service.values("clock", 5) == [b"0", b"1", b"2", b"3", b"4"]


def test_a_program_s_standard_error_is_in_the_log_and_the_stop(service: Service) -> None:
    source = service.append("g.spawn", python("import sys\nsys.exit('why it ended')"))
    (stop,) = service.wait("g.stop")[:1]
    assert stop.meta["stderr"] == "why it ended"
    assert stop.meta["source_id"] == source
    assert "g: why it ended" in service.said


def test_a_program_without_duplex_has_nothing_on_standard_input(service: Service) -> None:
    service.append("g.spawn", sh("cat; echo end"))
    service.append("g.send", "never\n")
    assert service.values("g", 1) == [b"end"]


def test_a_line_without_end_is_a_failure(
    service: Service, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xs.pipes.LINE_BYTES", 1 << 20)
    service.append("g.spawn", sh("echo first; tr '\\0' x </dev/zero"))
    (stop,) = service.wait("g.stop")[:1]
    assert stop.meta["reason"] == "it wrote a line of more than 1048576 bytes"
    assert service.values("g", 1) == [b"first"]


# Input


def test_a_duplex_generator_is_given_what_is_sent(service: Service) -> None:
    service.append("g.send", "before it was spawned\n")
    service.append("g.spawn", "lines | each {|line| $'<($line)>'}", duplex=True)
    service.append("g.send", "one\ntwo\n")
    service.append("other.send", "no\n")
    assert service.values("g", 2) == [b"<one>", b"<two>"]
    service.append("g.send", "thr")
    service.append("g.send")
    service.append("g.send", "ee\nfour\n")
    assert service.values("g", 4)[2:] == [b"<three>", b"<four>"]


def test_what_is_sent_is_given_as_it_is(service: Service) -> None:
    script = python(
        "import os, sys\nwhile data := os.read(0, 65536): print(data.hex(), flush=True)"
    )
    service.append("g.spawn", script, duplex=True)
    sent = [bytes(range(256)), b"\n", b"x" * 100_000, "ünï".encode()]
    for data in sent:
        service.append("g.send", data)
    expected = b"".join(sent)

    def received() -> bytes:
        return b"".join(bytes.fromhex(each.content.decode()) for each in service.frames("g.recv"))

    until(lambda: len(received()) >= len(expected), "all of it")
    assert received() == expected


def test_an_ephemeral_send_is_given_too(service: Service) -> None:
    service.append("g.spawn", DUPLEX, duplex=True)
    service.wait("g.start")
    service.append("g.send", "live\n", ttl="ephemeral")
    assert service.values("g", 1) == [b"<live>"]


def test_what_is_sent_while_it_restarts_is_kept_for_it(service: Service, soon: None) -> None:
    service.append("g.spawn", DUPLEX, duplex=True)
    for n in range(1, 6):
        service.wait("g.start", n)
        service.append("g.send", f"{n}a\n")
        service.wait("g.recv", 2 * n - 1)
        os.kill(service.pid("g"), signal.SIGKILL)
        service.wait("g.stop", n)
        service.append("g.send", f"{n}b\n")
        service.wait("g.recv", 2 * n)
    expected = [f"<{n}{part}>".encode() for n in range(1, 6) for part in "ab"]
    assert [each.content for each in service.frames("g.recv")] == expected


def test_what_was_given_before_the_server_stopped_is_not_given_again(service: Service) -> None:
    service.append("g.spawn", DUPLEX, duplex=True)
    for n in range(4):
        service.append("g.send", f"{n}\n")
        service.wait("g.recv", n + 1)
        service.stop()
        with xs.open(service.folder) as store:
            store.append("away.send", "x")
        service.start()
    service.append("g.send", "end\n")
    assert service.values("g", 5) == [b"<0>", b"<1>", b"<2>", b"<3>", b"<end>"]


def test_what_is_sent_while_no_server_runs_is_given_later(service: Service) -> None:
    service.append("g.spawn", DUPLEX, duplex=True)
    service.wait("g.start")
    service.stop()
    with xs.open(service.folder) as store:
        for n in range(250):
            store.append("g.send", f"{n}\n")
    service.start()
    assert service.values("g", 250) == [b"<%d>" % n for n in range(250)]


def test_a_new_spawn_gets_what_is_sent_from_then_on(service: Service) -> None:
    service.append("g.spawn", DUPLEX, duplex=True)
    service.append("g.send", "old\n")
    service.wait("g.recv")
    service.append("g.spawn", sh('while read -r line; do echo "($line)"; done'), duplex=True)
    service.append("g.send", "new\n")
    assert service.values("g", 2) == [b"<old>", b"(new)"]


def test_each_spawn_gets_what_is_sent_behind_it_however_soon(service: Service) -> None:
    for n in range(30):
        loop = f'while read -r line; do echo "{n} $line"; done'
        service.append("g.spawn", sh(loop), duplex=True)
        service.append("g.send", "sent\n")
        service.append("g.spawn", "of another", topic="other")  # no order for this one
        assert service.values("g", n + 1)[-1] == b"%d sent" % n


@pytest.mark.parametrize("others", [0, 12_000], ids=["in the ring", "in the index"])
@pytest.mark.parametrize("spawn", ["g.spawn", "any.spawn"])
def test_what_shares_a_commit_with_a_spawn_is_given_to_that_alone(
    service: Service, spawn: str, others: int
) -> None:
    for n in range(6):
        service.store.run(BatchWork([Append("other")] * others))
        loop = f'while read -r line; do echo "{n} $line"; done'
        works = [
            # The orders of nobody keep whoever hands on the spawn for a while.
            *[Append("nobody.terminate")] * 4000,
            Append(spawn, small(sh(loop).encode()), '{"topic":"g","duplex":true}'),
            Append("g.send", small(b"sent\n")),
        ]
        service.store.run(BatchWork(works))
        service.wait("g.recv", n + 1)
    assert service.values("g", 6) == [b"%d sent" % n for n in range(6)]


def test_input_of_any_size_is_given_as_it_is_read(service: Service) -> None:
    service.append("g.spawn", sh("head -c 1; echo; wc -c"), duplex=True)
    service.wait("g.start")
    before = rss_kb(os.getpid())
    for _ in range(3):
        service.append("g.send", b"x" * 60_000_000)
    service.append("g.send", b"tail")
    until(lambda: service.values("g", 1), "that it reads")
    assert rss_kb(os.getpid()) - before < 150_000  # content above 16 KiB is read in blocks
    os.kill(service.pid("g"), signal.SIGKILL)
    service.wait("g.stop")


def test_who_reads_nothing_holds_up_no_order(service: Service) -> None:
    service.append("g.spawn", sh("echo up; sleep 1000"), duplex=True)
    service.wait("g.recv")
    for _ in range(20):
        service.append("g.send", b"x" * 50_000)
    service.append("g.terminate")
    (stop,) = service.wait("g.stop")
    assert stop.meta["reason"] == "terminated"


def test_who_does_not_stop_being_sent_can_be_ended(service: Service) -> None:
    service.append("g.spawn", sh("cat >/dev/null"), duplex=True)
    service.wait("g.start")
    add_all(service.store, [Append("g.send", service.store.cas.take([b"x\n"]))] * 20_000)
    service.append("g.terminate")
    started = time.monotonic()
    service.wait("g.stop")
    assert time.monotonic() - started < 10


# A server that is killed


def test_what_is_sent_comes_at_most_once_and_in_order_though_the_server_is_killed(
    store_dir: str,
) -> None:
    chance = random.Random(7)
    with xs.open(store_dir) as store:
        store.append("g.spawn", sh('while read -r n; do echo "$n"; done'), meta={"duplex": True})
    sent = 0
    for _ in range(6):
        server = start_server(store_dir)
        with xs.open(store_dir) as store:
            end = time.monotonic() + chance.uniform(0.05, 0.5)
            while time.monotonic() < end:
                store.append("g.send", f"{sent}\n")
                sent += 1
        server.process.kill()
        server.stop()
        with xs.open(store_dir) as store:
            for _ in range(3):
                store.append("g.send", f"{sent}\n")
                sent += 1
    server = start_server(store_dir)
    with xs.open(store_dir) as store:
        store.append("g.send", f"{sent}\n")
        until(lambda: last_value(store, "g") == b"%d" % sent, "the last")
        found = [int(store.content(each)) for each in store.cat(topic="g.recv")]
    server.stop()
    assert found == sorted(set(found))  # in order, none twice
    # No server was killed that could have been given these: they were kept for the last one.
    assert found[-4:] == list(range(sent - 3, sent + 1))


def last_value(store: Client, name: str) -> bytes:
    # Not by `last`, which shows what is committed a moment before a read of the stream does.
    newest = list(store.cat(topic=f"{name}.recv", last=1))
    return store.content(newest[0]) if newest else b""


# Back-pressure


def rss_kb(pid: int, what: str = "VmRSS") -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition(f"{what}:")[2].split()[0])


@pytest.mark.long
def test_who_is_faster_than_the_disk_is_slowed_down(service: Service, tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    script = python(
        "import os, sys\n"
        f"file = os.open({str(progress)!r}, os.O_CREAT | os.O_WRONLY)\n"
        "for n in range(100_000):\n"
        "    sys.stdout.write(f'{n:09}\\n')\n"
        "    if n % 100 == 0:\n"
        "        sys.stdout.flush()\n"
        "        os.pwrite(file, b'%9d' % n, 0)\n"
        "sys.stdout.flush()\n"
    )
    service.append("g.spawn", script)
    service.wait("g.recv", 1)
    gate = Gate()
    opened = service.store.start(gate)  # the disk takes its time
    assert gate.entered.wait(DEADLINE)
    seen, since = b"", 0.0

    def stands_still() -> bool:
        nonlocal seen, since
        now = progress.read_bytes()
        if now != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > 0.3

    until(stands_still, "it waits")
    stored = len(all_ids(service.store, topic="g.recv"))
    assert int(seen) - stored < 30_000  # what is in memory, and in the pipe
    gate.opened.set()
    opened()
    until(lambda: service.status("g")["frames"] >= 100_000, "all values")
    found = service.wait("g.recv", 100_000)
    assert [int(each.content) for each in found[:100_000]] == [*range(100_000)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "count"),
    [
        (sh("seq -f '%080.0f' 1 300000; sleep 1000"), 300_000),
        ("1..30000 | each {|n| $n | fill --alignment r --width 80 --character '0'}", 30_000),
    ],
    ids=["sh", "nu"],
)
def test_the_server_s_memory_is_bounded_while_values_flow(
    store_dir: str, script: str, count: int
) -> None:
    server = start_server(store_dir)
    try:
        with xs.open(store_dir) as store:
            store.append("warm.spawn", sh("seq 1 20000; sleep 1000"))
            until(lambda: last_value(store, "warm") == b"20000", "it is warm")
            before = rss_kb(server.process.pid, "VmHWM")
            store.append("g.spawn", script)
            last = b"%080d" % count
            until(lambda: last_value(store, "g") == last, "all values", 120)
            grown = rss_kb(server.process.pid, "VmHWM") - before
            values = [int(store.content(each)) for each in store.cat(topic="g.recv", limit=2000)]
    finally:
        server.stop()
    assert grown < 64_000, grown  # kB; of 300,000 the values have 24 MB, their frames 60 MB more
    assert values == [*range(1, 2001)]


def test_when_values_can_not_be_stored_it_is_said_how_many(
    service: Service, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Large content goes to a folder that is none for a while.
    folder = Path(service.folder, "cas")
    folder.rename(folder.with_name("away"))
    folder.touch()
    service.append("g.spawn", python("print('small'); print('x' * 100_000)"))
    (stop,) = service.wait("g.stop")[:1]
    reason = "a value could not be stored: the store can't be written: Not a directory"
    assert stop.meta["reason"] == reason
    folder.unlink()
    folder.with_name("away").rename(folder)
    until(lambda: len(service.frames("g.recv")[-1].content) == 100_000, "the next run")


# Many


def test_many_names_run_beside_each_other(service: Service) -> None:
    names = [f"many.g{n}" for n in range(40)]
    for name in names:
        service.append(f"{name}.spawn", sh(f"echo {name}; exec sleep 1000"))
    for name in names:
        assert service.values(name, 1) == [name.encode()]
    pids = [service.pid(name) for name in names]
    started = time.monotonic()
    service.stop()
    assert time.monotonic() - started < 5
    assert all(map(is_gone, pids))
    service.start()
    for name in names:
        service.wait(f"{name}.recv", 2)


def test_above_the_bound_a_spawn_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "SCRIPTS_MAX", 2)
    for name in ("a", "b", "c"):
        service.append(f"{name}.spawn", FOREVER)
    (error,) = service.wait("c.spawn.error")
    assert error.meta["reason"] == "2 scripts are in service already"
    service.append("a.terminate")
    until(lambda: service.is_out("a"), "it is out of service")
    service.append("c.spawn", FOREVER)
    service.wait("c.recv")


def test_a_start_costs_what_the_scripts_cost_and_not_what_else_is_stored(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    connect = sqlite.connect

    def counting(*args: Any, **more: Any) -> sqlite3.Connection:
        connection = connect(*args, **more)
        connection.set_progress_handler(count, 10)
        return connection

    def steps_of_a_start() -> int:
        """SQLite's, in tens, until all of them run."""
        nonlocal steps
        service.stop()
        with monkeypatch.context() as patched:
            patched.setattr(sqlite, "connect", counting)
            steps = 0
            service.start()
            until(lambda: all(service.status(f"g{n}").get("pid") for n in range(10)), "all")
            return steps

    for n in range(10):
        service.append(f"g{n}.spawn", FOREVER)
        service.wait(f"g{n}.recv")
    few = steps_of_a_start()
    plain = Append("plain", service.store.cas.take([b"x"]))
    add_all(service.store, [plain] * 100_000)
    add_all(service.store, [Append(f"t{n}.spawned.not") for n in range(5000)])
    many = steps_of_a_start()
    assert many < 2 * few, (few, many)


def test_scripts_are_found_by_an_index(service: Service) -> None:
    names = ["a.spawn", "a.b.terminate", "h.register", "h.unregister"]
    for name in [*names, "a.spawned", "spawn", "a.spawn.error", "unregister", "x.registered"]:
        service.append(name, "x")
    service.stop()
    with sqlite3.connect(f"{service.folder}/xs.db") as database:
        from xs.schema import IS_SCRIPT_TOPIC

        query = f"SELECT name FROM topic INDEXED BY topic_script WHERE {IS_SCRIPT_TOPIC}"
        plan = database.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
    database.close()
    assert "USING COVERING INDEX topic_script" in plan[0][3]
    service.start(scripts=False)
    assert sorted(service.store.index.script_topics()) == sorted(names)


def test_what_runs_is_told(service: Service) -> None:
    source = service.append("g.spawn", sh("seq 1 100; exec sleep 1000"))
    service.wait("g.recv", 100)
    (found,) = service.scripts.status()  # type: ignore[union-attr]
    assert found.pop("since").endswith("Z")
    assert found == {
        "kind": "generator",
        "name": "g",
        "id": source,
        "pid": service.pid("g"),
        "frames": 100,
        "error": None,
    }
    assert json.dumps(found)
