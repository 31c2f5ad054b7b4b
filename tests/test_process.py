"""Processes of scripts: ended whole, never left behind, and unable to hold up who reads them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import DEADLINE, start_server, until
from scripting import is_gone, processes_with

import xs
from xs import pipes
from xs.client import Client
from xs.errors import Failed, Invalid
from xs.pipes import LINE_BYTES, TAIL_LINES, Pipes
from xs.process import INPUT, Command, Processes, command_of

# Ignores what asks it to end, as does its child; tells the pids of both.
STUBBORN = b"""#!/bin/sh
trap '' TERM INT HUP
(trap '' TERM INT HUP; while :; do sleep 1000; done) &
echo $$ $!
while :; do sleep 1000; done
"""

# Says a last word when asked to end. A shell's trap would not do: a signal that comes after the
# shell has looked for one, and before it waits, is heard when the wait is over.
LAST_WORD = b"""#!/usr/bin/env python3
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("first", flush=True)
signal.sigwait([signal.SIGTERM])
print("last", flush=True)
print("words", file=sys.stderr)
sys.exit(7)
"""


class Talk:
    """A process, and what it says; runs its pipes as a runner would."""

    def __init__(self, processes: Processes, command: Command) -> None:
        self.woken = threading.Event()
        self.process = processes.start(command, self.woken.set)
        self.selector = selectors.DefaultSelector()
        self.logged: list[str] = []
        self.pipes = Pipes(self.process, command.mark, self.selector, self.logged.append)
        self.found: list[bytes] = []

    def turn(self) -> None:
        self.pipes.handle({key.fd for key, _ in self.selector.select(0.02)})
        self.found += self.pipes.lines()

    def until(self, is_true: Callable[[], object], what: str) -> None:
        """Takes a turn each few milliseconds, until it is so."""
        deadline = time.monotonic() + DEADLINE
        while not is_true():
            assert time.monotonic() < deadline, what
            self.turn()
            threading.Event().wait(0.005)

    def lines(self, count: int) -> list[bytes]:
        """The first so many lines of its output."""
        self.until(lambda: len(self.found) >= count, f"{count} lines")
        return self.found[:count]

    def end(self) -> int:
        """Its exit status, once it has ended and all is read."""
        self.until(lambda: self.pipes.status is not None, "its end")
        assert self.pipes.status is not None
        return self.pipes.status

    def close(self) -> None:
        self.pipes.close()
        self.selector.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    made = Processes(str(tmp_path / "run"), variables)
    assert made.acquire(lambda: False)
    yield made
    made.close()
    assert os.listdir(tmp_path / "run") == ["lock"]


@pytest.fixture
def talks(processes: Processes) -> Iterator[Talks]:
    made = Talks(processes)
    yield made
    for each in made.made:
        each.close()


class Talks:
    """`talks(script)` starts one."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.made: list[Talk] = []

    def __call__(self, script: bytes, *, has_input: bool = True) -> Talk:
        command = command_of(script)
        if not has_input:
            command = command._replace(input_at=None)
        self.made.append(Talk(self._processes, command))
        return self.made[-1]


def numbers(line: bytes) -> list[int]:
    return [int(word) for word in line.split()]


# Groups


def test_a_script_has_a_group_and_a_session_of_its_own(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\necho $$; sleep 1000")
    (pid,) = numbers(talk.lines(1)[0])
    assert pid == talk.process.pid
    assert os.getpgid(pid) == os.getsid(pid) == pid != os.getsid(0)


def test_who_is_asked_to_end_can_say_a_last_word(talks: Talks) -> None:
    talk = talks(LAST_WORD)
    talk.lines(1)
    talk.process.end(DEADLINE)  # it may be slow to have its turn
    talk.pipes.end()
    assert [*talk.pipes.lines()] == [b"last"]
    assert talk.pipes.status == 7
    assert talk.pipes.tail == "words"


def test_what_ignores_it_is_killed_with_its_children(talks: Talks) -> None:
    talk = talks(STUBBORN)
    pids = numbers(talk.lines(1)[0])
    started = time.monotonic()
    talk.process.end(0.2)
    assert 0.2 <= time.monotonic() - started < 5
    assert talk.process.status == -signal.SIGKILL
    until(lambda: all(map(is_gone, pids)), "they are gone")


@pytest.mark.parametrize("way", ["kill", "end", "its own end"])
def test_what_a_script_leaves_behind_ends_with_it(talks: Talks, way: str) -> None:
    talk = talks(
        b"#!/bin/bash\nset -m\n"  # so that what is in the background has groups of its own
        b"sleep 1000 & one=$!\n(sleep 1000; :) & two=$!\nset +m\nsleep 1000 &\n"
        b"echo $one $two $!\nread -r _ || exit 0"
    )
    pids = numbers(talk.lines(1)[0])
    assert os.getpgid(pids[0]) == pids[0] != talk.process.pid
    assert os.getpgid(pids[1]) == pids[1]
    if way == "its own end":
        talk.pipes.send_all(b"")
        assert talk.end() == 0
    else:
        {"kill": talk.process.kill, "end": talk.process.end}[way]()
    until(lambda: all(map(is_gone, pids)), "they are gone")
    until(lambda: not processes_with(talk.process._folder), "nothing of it is left")


def test_a_watcher_is_not_ended_by_what_is_asked_of_its_group(tmp_path: Path) -> None:
    for _ in range(20):  # from the first moment on
        processes = Processes(str(tmp_path / "run"), {"PATH": os.environ["PATH"]})
        process = processes.start(command_of(STUBBORN), lambda: None)
        # So early that even the shell has not come to its traps, it ends all: then nobody is left.
        with contextlib.suppress(ProcessLookupError):
            for _ in range(10):
                os.killpg(process.pid, signal.SIGTERM)
        processes.close()  # as when the server dies
        process._reaper.join(DEADLINE)
        assert process.status in (-signal.SIGTERM, -signal.SIGKILL)
        process.close()


def test_who_is_stopped_can_be_ended(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\nkill -STOP $$; sleep 1000")
    until(lambda: state_of(talk.process.pid) == "T", "it is stopped")
    talk.process.end(0.1)
    assert talk.process.status == -signal.SIGKILL


# The lock


def test_the_lock_is_handed_on_when_the_last_process_is_gone(tmp_path: Path) -> None:
    first = Processes(str(tmp_path / "run"), {"PATH": os.environ["PATH"]})
    assert first.acquire(lambda: False)
    process = first.start(command_of(STUBBORN), lambda: None)
    second = Processes(str(tmp_path / "run"), {})
    looks = iter([False, False, True])
    assert not second.acquire(lambda: next(looks))
    first.close()  # as when its server dies: the processes are left to their watchers
    assert second.acquire(lambda: False)
    until(lambda: is_gone(process.pid), "it is gone")
    assert os.listdir(tmp_path / "run") == ["lock"]
    process.close()
    second.close()


def test_what_runs_before_the_lock_is_had_keeps_its_files(processes: Processes) -> None:
    left = Path(processes.folder, "left-1")
    left.mkdir()
    process = processes.start(command_of(b'#!/bin/sh\nread _; . "$0"x'), lambda: None)
    second = Processes(processes.folder, {})
    assert not second.acquire(lambda: True)
    assert processes.acquire(lambda: False)
    assert os.path.exists(f"{process._folder}/script")
    assert not left.exists()
    process.close()
    second.close()


def test_nothing_starts_when_they_are_closed(tmp_path: Path) -> None:
    made = Processes(str(tmp_path / "run"), {})
    made.close()
    with pytest.raises(OSError):
        made.start(command_of(b"#!/bin/sh\n"), lambda: None)
    assert os.listdir(tmp_path / "run") == ["lock"]


# A server that is killed


SCRIPTS = {
    "stubborn.spawn": STUBBORN,
    "silent.spawn": b"#!/bin/sh\nexec >&- 2>&-\nsleep 1000",
    "busy.spawn": b"#!/bin/sh\necho up; while :; do :; done",
    "nu.spawn": b"job spawn { ^sleep 1000 }; job spawn { ^sh -c 'sleep 1000; :' }; [up 1000] | "
    b"each {|n| if $n == 1000 { ^sh -c 'trap \"\" TERM; sleep 1000; :' }; $n}",
    "handler.register": b"{|frame| if $frame.topic == 'go' { ^sleep 1000 }}",
}
TELL = ["stubborn.recv", "silent.start", "busy.recv", "nu.recv", "handler.registered"]


def test_when_a_server_is_killed_its_scripts_are_gone_within_a_second(store_dir: str) -> None:
    server = start_server(store_dir)
    try:
        with xs.open(store_dir) as store:
            for topic, script in SCRIPTS.items():
                store.append(topic, script)
            wait_for_frames(store, TELL, 1)
        until(lambda: len(descendants(server.process.pid)) >= 19, "all are there")
        pids = descendants(server.process.pid)
        names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
        os.kill(server.process.pid, signal.SIGKILL)
        until(lambda: all(map(is_gone, pids)), "they are gone", 1.0)
    finally:
        server.stop()
    assert not [name for pid, name in names.items() if not is_gone(pid)]


def wait_for_frames(store: Client, topics: Sequence[str], count: int) -> None:
    """Waits until there are so many frames on each of these topics."""

    def are_there() -> bool:
        return all(len(list(store.cat(topic=topic))) >= count for topic in topics)

    until(are_there, f"{count} on each of {topics}")


def descendants(pid: int) -> list[int]:
    """Pids of all that it has started, and that they have."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(") ")[2].split()
                if fields[0] != "Z":
                    parents[int(name)] = int(fields[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


ONE_AT_A_TIME = """#!{python}
import fcntl, os, sys, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
file = open({path!r}, "a+")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    open({path!r} + ".twice", "w")
if os.fork() == 0:  # who holds it too
    time.sleep(1000)
print(os.getpid(), flush=True)
time.sleep(1000)
"""


def test_a_new_server_starts_scripts_when_those_of_a_killed_one_are_gone(
    store_dir: str, tmp_path: Path
) -> None:
    script = ONE_AT_A_TIME.format(python=sys.executable, path=str(tmp_path / "held"))
    with xs.open(store_dir) as store:
        for n in range(3):
            store.append(f"one{n}.spawn", script.replace("held", f"held{n}"))
    for turn in range(1, 4):
        server = start_server(store_dir)
        try:
            with xs.open(store_dir) as store:
                wait_for_frames(store, [f"one{n}.recv" for n in range(3)], turn)
        finally:
            server.process.kill()
            server.stop()
    assert not list(tmp_path.glob("*.twice"))
    until(lambda: not processes_with(f"{store_dir}/run/"), "nothing is left")


def test_a_server_that_stops_leaves_no_process_and_no_file(store_dir: str) -> None:
    server = start_server(store_dir)
    try:
        with xs.open(store_dir) as store:
            for topic, script in SCRIPTS.items():
                store.append(topic, script)
            wait_for_frames(store, TELL, 1)
        pids = descendants(server.process.pid)
    finally:
        server.stop()
    assert all(map(is_gone, pids))
    assert os.listdir(f"{store_dir}/run") == ["lock"]


# What it costs


def test_nothing_leaks_over_many_starts(processes: Processes) -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def start_and_end(n: int) -> None:
        script = [b"#!/bin/sh\nread x", b"#!/bin/sh\nexit 3", b"#!/bin/sh\nsleep 1000 &"][n % 3]
        process = processes.start(command_of(script), lambda: None)
        process.close()

    start_and_end(0)
    before = files(), threading.active_count()
    for n in range(200):
        start_and_end(n)
    assert (files(), threading.active_count()) == before
    assert "Z" not in map(state_of, children())
    assert os.listdir(processes.folder) == ["lock"]


def children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        found += numbers((task / "children").read_bytes())
    return found


def state_of(pid: int) -> str:
    """R, S, T (stopped), Z (a zombie), …; "" if there is no such process."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    return ""


def test_a_start_that_fails_leaves_nothing(processes: Processes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    bad = Command(["/bin/sh", "{folder}/x"], {"x": b""}, {"BAD\0NAME": "x"}, 0)
    for _ in range(20):
        with pytest.raises((OSError, ValueError)):
            processes.start(bad, lambda: None)
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.listdir(processes.folder) == ["lock"]


PR_SET_CHILD_SUBREAPER = 36


def test_the_first_process_of_a_container_is_left_no_zombies(processes: Processes) -> None:
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0  # orphans become this process's children
    try:
        for _ in range(5):
            script = b"#!/bin/bash\nset -m; sleep 1000 & set +m; sleep 1000 & echo up; read _"
            talk = Talk(processes, command_of(script))
            talk.lines(1)
            talk.close()
        assert children() == []
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


# The first line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("#!/bin/sh", ["/bin/sh"]),
        ("#! /bin/sh", ["/bin/sh"]),
        ("#!/bin/sh -e", ["/bin/sh", "-e"]),
        ("#!/usr/bin/env sh", ["/usr/bin/env", "sh"]),
        ("#!/usr/bin/env -S sh -e -u", ["/usr/bin/env", "-S sh -e -u"]),
        ("#!/bin/sh \t two words \t", ["/bin/sh", "two words"]),
        ("#!/bin/sh\r", ["/bin/sh"]),
        ("#!/bin/sh -ü", ["/bin/sh", "-ü"]),
    ],
)
def test_the_first_line_names_a_program_and_one_argument(line: str, words: list[str]) -> None:
    script = f"{line}\nexit 0\n".encode()
    assert command_of(script) == Command([*words, "{folder}/script"], {"script": script}, {}, 0)
    assert command_of(line.encode()).words[:-1] == words


@pytest.mark.parametrize(
    "line",
    [
        "#!",
        "#!  ",
        "#!sh",
        "#!./sh",
        "#!/no/such/program -x",
        "#!/bin",
        "#!/etc/passwd",
        "#!/bin/sh \0",
    ],
)
def test_what_names_no_program_is_refused(line: str) -> None:
    with pytest.raises(Invalid, match=r"^no such program: '.*': #! is followed by the path of a"):
        command_of(f"{line}\nx\n".encode())


def test_a_script_needs_no_permission_to_be_executed(talks: Talks) -> None:
    talk = talks(b'#!/bin/sh -e\nls -l "$0" | cut -c 1-10; echo $# $-; false; echo never')
    assert talk.end() == 1
    mode, arguments = talk.found
    assert mode == b"-rw-------" or mode == b"-rw-r--r--"
    assert arguments.startswith(b"0 ") and b"e" in arguments


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (b"#!/usr/bin/env python3\nprint('py')", [b"py"]),
        (b"#!/usr/bin/env -S sh -e -u\necho $-", [b"eu", b"ue"]),
        (b"#!/bin/cat\nx", [b"#!/bin/cat"]),
    ],
)
def test_any_program_can_be_named(talks: Talks, script: bytes, said: list[bytes]) -> None:
    talk = talks(script)
    assert talk.end() == 0
    assert talk.found[0] in said


# What a script finds


def test_a_script_finds_three_files_open_and_no_others(tmp_path: Path) -> None:
    given = os.open("/dev/zero", os.O_RDONLY)  # as whoever started the server may have left it
    os.set_inheritable(given, True)
    processes = Processes(str(tmp_path / "run"), {"PATH": os.environ["PATH"]})
    script = b"#!/bin/sh\nreadlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2; ls /proc/$$/fd"
    talk = Talk(processes, command_of(script)._replace(input_at=None))
    assert talk.end() == 0
    talk.close()
    processes.close()
    os.close(given)
    nothing, out, err, *files = talk.found
    assert nothing == b"/dev/null"
    assert out.startswith(b"pipe:") and err.startswith(b"pipe:") and out != err
    assert files in ([b"0", b"1", b"2"], [b"0", b"1", b"10", b"2"])  # 10: dash reads its script


def test_a_script_without_input_finds_the_end_at_once(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\ncat\necho done", has_input=False)
    assert talk.end() == 0
    assert talk.found == [b"done"]


def test_input_may_come_beside_standard_input(processes: Processes) -> None:
    script = b"#!/bin/sh\ncat; cat <&3; echo"
    talk = Talk(processes, command_of(script)._replace(input_at=INPUT))
    talk.pipes.send_all(b"on three")
    assert talk.end() == 0
    assert talk.found == [b"on three"]
    talk.close()


def test_no_signal_is_ignored_or_blocked(talks: Talks) -> None:
    # As a shell does with what it runs in the background.
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGQUIT)}
    try:
        talk = talks(
            b"#!/bin/sh\ngrep -E 'Sig(Ign|Blk)' /proc/self/status; yes | head -n 1; echo up"
        )
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert talk.end() == 0
    blocked, ignored, *rest = talk.found
    assert int(blocked.split()[1], 16) == 0
    assert int(ignored.split()[1], 16) & 0x7FFFFFFF == 0  # above are those of libc itself
    assert rest == [b"y", b"up"]
    assert talk.logged == []


def test_a_script_has_the_environment_it_is_given(processes: Processes) -> None:
    command = command_of(b"#!/bin/sh\necho $HOME $ONE")._replace(variables={"ONE": "1"})
    talk = Talk(processes, command)
    assert talk.end() == 0
    assert talk.found == [os.fsencode(processes._variables["HOME"]) + b" 1"]
    talk.close()


# Pipes


def test_who_does_not_read_holds_up_nobody(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\necho up; sleep 1000")
    talk.lines(1)
    started = time.monotonic()
    for _ in range(100):
        talk.pipes.send(b"x" * 100_000)
    talk.turn()
    assert talk.pipes.has_unsent
    talk.pipes.end()
    assert time.monotonic() - started < 3


def test_who_reads_later_gets_all_of_it(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\nread x; wc -c")
    talk.pipes.send(b"go\n")
    talk.pipes.send(b"x" * 5_000_000)
    talk.pipes.send_all(b"y")
    assert talk.end() == 0
    assert int(talk.found[0]) == 5_000_001


def test_who_closes_its_input_goes_on(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\nexec <&-; echo closed; kill -STOP $$; echo on")
    talk.lines(1)
    talk.pipes.send(b"x" * 1_000_000)
    talk.until(lambda: not talk.pipes.has_unsent, "that nobody reads is noticed")
    talk.pipes.send(b"x" * 1_000_000)
    assert not talk.pipes.has_unsent
    talk.pipes.send_all(b"")
    until(lambda: state_of(talk.process.pid) == "T", "it is stopped")
    os.kill(talk.process.pid, signal.SIGCONT)
    assert talk.end() == 0
    assert talk.found == [b"closed", b"on"]


def test_who_closes_its_output_goes_on(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\necho one; exec >&-; read x; echo err >&2; exit 4")
    talk.lines(1)
    for _ in range(10):
        talk.turn()
    assert talk.pipes.status is None and talk.process.status is None
    started = time.process_time()
    talk.turn()
    assert time.process_time() - started < 0.02  # the end is no event that comes again and again
    talk.pipes.send_all(b"go\n")
    assert talk.end() == 4
    assert talk.logged == ["err"]


def test_a_line_without_an_end_is_a_failure_and_takes_no_more_memory_than_that(
    talks: Talks,
) -> None:
    talk = talks(b"#!/bin/sh\necho first; yes | tr -d '\\n'")
    most = 0
    with pytest.raises(Failed, match=f"a line of more than {LINE_BYTES} bytes"):
        while True:
            talk.turn()
            most = max(most, len(talk.pipes._output))
    assert talk.found == [b"first"]
    assert most < LINE_BYTES + (1 << 20)


def test_a_line_may_be_long(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\nhead -c 10000000 /dev/zero | tr '\\0' x; echo; echo end")
    assert talk.end() == 0
    assert talk.found == [b"x" * 10_000_000, b"end"]


def test_what_is_paused_waits_and_loses_nothing(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\nseq 1 200000; echo end >&2")
    talk.lines(1)
    talk.pipes.pause(True)
    for _ in range(20):
        talk.turn()
    assert talk.process.status is None  # it has to wait
    talk.pipes.pause(False)
    assert talk.end() == 0
    assert talk.found == [b"%d" % n for n in range(1, 200_001)]


def test_who_ends_while_it_is_paused_loses_nothing(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\necho one; read x; echo two; echo err >&2")
    talk.lines(1)
    talk.pipes.pause(True)
    talk.pipes.send_all(b"go\n")
    talk.until(lambda: talk.process.status is not None, "its end")
    assert talk.pipes.status is None
    talk.pipes.pause(False)
    assert talk.end() == 0
    assert talk.found == [b"one", b"two"]
    assert talk.pipes.tail == "err"


def test_a_flood_of_standard_error_holds_up_nobody(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\necho up\nyes 'all is lost' >&2 &\nyes 'all is lost' >&2")
    talk.lines(1)
    talk.until(lambda: talk.logged, "what it says")
    for _ in range(10):
        started = time.monotonic()
        talk.turn()
        assert time.monotonic() - started < 1
    started = time.monotonic()
    talk.pipes.end()
    assert time.monotonic() - started < 3
    assert talk.pipes.tail.splitlines()[-2] == "all is lost"
    assert len(talk.pipes.tail.splitlines()) == TAIL_LINES


def test_the_tail_has_the_last_lines_with_or_without_an_end(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\nseq 1 100 >&2; printf '\\033[2Jlast' >&2")
    assert talk.end() == 0
    expected = [*(str(n) for n in range(101 - TAIL_LINES + 1, 101)), r"\u001b[2Jlast"]
    assert talk.pipes.tail.splitlines() == expected
    assert talk.logged[0] == "1" and talk.logged[-1] == expected[-1]


def test_standard_error_without_lines_takes_no_memory(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\nhead -c 5000000 /dev/zero | tr '\\0' x >&2; exit 3")
    assert talk.end() == 3
    assert len(talk.pipes._errors) <= pipes.TAIL_BYTES
    # It is cut where reads end, and those are for the system to choose.
    assert len(talk.pipes.tail) == pipes.TAIL_BYTES and set(talk.pipes.tail) <= {"x", "\n"}
    assert sum(map(len, talk.logged)) == 5_000_000


def test_a_daemon_that_goes_on_writing_does_not_keep_its_script_from_ending(talks: Talks) -> None:
    talk = talks(b"#!/bin/sh\nsetsid sh -c 'echo $$; exec yes' &\nread _; exit 5")
    (daemon,) = numbers(talk.lines(1)[0])
    try:
        talk.pipes.send_all(b"go\n")
        assert talk.end() == 5
    finally:
        os.kill(daemon, signal.SIGKILL)


def test_only_marked_lines_of_a_marked_script_are_ours(processes: Processes) -> None:
    script = b"#!/bin/sh\necho noise; echo MARKone; printf noise2; echo MARKtwo; echo; echo MARK"
    talk = Talk(processes, command_of(script)._replace(mark=b"MARK"))
    assert talk.end() == 0
    ours = [talk.pipes.ours(line) for line in talk.found]
    assert [each for each in ours if each is not None] == [b"one", b"two", b""]
    assert talk.logged == ["noise", "noise2"]
    talk.close()
