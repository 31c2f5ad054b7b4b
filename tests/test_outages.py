"""Scripts while what runs them is missing, or while the server has no time: they lose no place."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Server, nu_path, until
from handling import Stream, program
from stores import remove

import xs
from xs import ids, runner


@pytest.fixture
def stream(store_dir: str) -> Iterator[Stream]:
    running = Stream(store_dir)
    yield running
    running.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that can't be started are tried again at once."""
    monkeypatch.setattr(runner, "RESTART_SECONDS", 0.02)


COUNT = """
for given in frames():
    n = (given["state"] or 0) + 1
    answer({"state": n, "out": n})
"""


def counter(interpreter: Path) -> str:
    """A stateful program that is run by another interpreter."""
    return program(COUNT).replace(f"#!{sys.executable} -u", f"#!{interpreter}")


# ---- The server has no time --------------------------------------------------------------------


def test_answers_that_are_more_than_two_commits_go_on_beside_others(stream: Stream) -> None:
    """The commit that makes room may be led by another handler's thread, or by this one."""
    many = program("for given in frames(): answer({'out': list(range(9000))})")
    for name in "pqr":
        stream.register(name, many, topic="in")
    given = [stream.add("in") for _ in range(4)]
    for name in "pqr":
        stream.finish(name, given[-1])
        assert stream.causes(name) == [each for each in given for _ in range(9000)]


def test_an_answer_that_waits_for_its_server_is_in_time(server: Server, tmp_path: Path) -> None:
    """Longer than a pipe, it is not written while the server stands still for longer than that."""
    began, may_answer = tmp_path / "began", tmp_path / "may answer"
    text = program(f"""
    import pathlib, time
    for given in frames():
        pathlib.Path({str(began)!r}).touch()
        while not pathlib.Path({str(may_answer)!r}).exists():
            time.sleep(0.001)
        answer({{"out": "x" * 300_000}})
    """)
    with xs.open(server.directory) as client:
        client.append("long.register", text, meta={"topic": "in", "timeout": 2000})
        until(lambda: client.last("long.registered"), "it is in service")
        client.append("in")
        until(began.exists, "it has the frame")
        server.process.send_signal(signal.SIGSTOP)
        may_answer.touch()
        threading.Event().wait(2.1)  # its time, of which it took none
        server.process.send_signal(signal.SIGCONT)
        until(lambda: client.last("long,long.unregistered"), "an answer")
        assert client.last("long.unregistered") is None


# ---- What runs it is missing -------------------------------------------------------------------


def test_a_program_that_is_gone_when_the_server_starts_leaves_its_handler_where_it_was(
    stream: Stream, tmp_path: Path
) -> None:
    interpreter = tmp_path / "python"
    interpreter.symlink_to(sys.executable)
    stream.register("c", counter(interpreter), topic="in", stateful=True)
    for _ in range(3):
        last = stream.add("in")
    stream.finish("c", last)
    interpreter.rename(tmp_path / "away")
    stream.restart()
    told = stream.unregistered("c")
    assert "no such program" in told["error"]
    assert told["position"] == last
    (tmp_path / "away").rename(interpreter)
    stream.restart()
    stream.add("in")
    stream.wait_for("c", 4)
    assert stream.contents("c") == ["1", "2", "3", "4"]


def test_a_nushell_that_is_gone_when_the_server_starts_leaves_a_handler_where_it_was(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    closure = "{|frame, n| {state: ($n + 1), out: $n} }"
    stream.register("c", closure, topic="in", stateful=True, initial_state=0)
    for _ in range(3):
        last = stream.add("in")
    stream.finish("c", last)
    nu = nu_path()
    monkeypatch.setenv("XS_NU", "/nowhere/nu")
    stream.restart()
    assert stream.unregistered("c")["position"] == last
    monkeypatch.setenv("XS_NU", nu)
    stream.restart()
    stream.add("in")
    stream.wait_for("c", 4)
    assert stream.contents("c") == ["0", "1", "2", "3"]


def test_one_that_was_never_in_service_has_finished_nothing(stream: Stream) -> None:
    stream.refused("c", "#!/no/such/program\n", topic="in", run_from="start")
    assert stream.unregistered("c")["position"] == ids.text(0)


def test_a_program_that_can_not_be_run_for_a_while_comes_back(
    stream: Stream, impatient: None, tmp_path: Path
) -> None:
    """As its file can't that is just being replaced: what sh ends with then says so."""
    there = tmp_path / "there"
    interpreter = tmp_path / "interpreter"
    interpreter.write_text(f'#!/bin/sh\n[ -e {there} ] || exit 126\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    there.touch()
    stream.register("c", counter(interpreter), topic="in", stateful=True)
    stream.add("in")
    stream.wait_for("c", 1)
    there.unlink()
    stream.kill("c")
    stream.add("in")
    again = "ended with status 126"
    stream.wait(lambda: sum(again in line for line in stream.logged) > 5, "it is tried again")
    there.touch()
    stream.wait_for("c", 2)
    assert stream.contents("c") == ["1", "2"]
    assert stream.frames("c.unregistered") == []


def test_a_program_that_has_never_run_and_ends_like_that_has_failed(stream: Stream) -> None:
    stream.add("c.register", "#!/bin/sh\nexec /no/such/program\n")
    assert "ended with status 127" in stream.unregistered("c")["error"]


# ---- Orders to those that wait for it ------------------------------------------------------------


def test_who_is_taken_out_while_nushell_is_missing_stays_out_though_the_order_is_gone(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    nu = nu_path()
    monkeypatch.setenv("XS_NU", "/nowhere/nu")
    source = stream.add("h.register", "{|frame| 'back' }", {"run-from": "start"})
    for name in ("g", "k"):
        stream.add(f"{name}.spawn", "1..")
        stream.wait_for(f"{name}.spawn.error", 1)
    stream.unregistered("h")
    order = stream.add("h.unregister", ttl="ephemeral")
    stream.add("g.terminate", ttl="ephemeral")
    told = stream.unregistered("h", 2)
    assert told == {"handler_id": source, "frame_id": order, "position": ids.text(0)}
    monkeypatch.setenv("XS_NU", nu)
    stream.wait(lambda: not stream.scripts.status(), "all orders are obeyed")
    stream.restart()
    stream.wait_for("k.start", 1)
    assert [each["name"] for each in stream.scripts.status()] == ["k"]
    assert stream.frames("g.start,g.recv,h,h.registered") == []


def test_one_that_waits_for_nushell_is_replaced_for_good(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    nu = nu_path()
    monkeypatch.setenv("XS_NU", "/nowhere/nu")
    old = stream.add("h.register", "{|frame| 'old' }", {"topic": "in"})
    stream.unregistered("h")
    monkeypatch.setenv("XS_NU", nu)
    new = stream.register("h", "{|frame| 'new' }", topic="in")
    told = stream.unregistered("h", 2)
    assert (told["handler_id"], told["frame_id"]) == (old, new)
    remove(stream.store, new)
    stream.restart()
    stream.register("after", "{|frame| null }")
    assert [each["name"] for each in stream.scripts.status()] == ["after"]
