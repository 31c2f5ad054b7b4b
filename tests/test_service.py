"""`xs service`: what it writes, read by parsers that know nothing of it; what it leaves alone."""

from __future__ import annotations

import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, ROOT, Server, environment

from xs import cli, service

# A path with all that could mean something to a shell, a unit, or XML; and a plain one.
ODD = "a --b %n $HOME ${x} \"q\" 'r' \\ ; # é <&> \t\n end"
NAMES = ["notes", ODD]


class Home:
    """A home of one's own, and `xs` in it. What managers there are is what `tools` says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "programs"
        self.programs.mkdir(parents=True)
        self.units = folder / ".config" / "systemd" / "user"
        self.agents = folder / "Library" / "LaunchAgents"
        for tool in ("sh", "env", "cat", "echo", "kill"):
            found = shutil.which(tool)
            assert found is not None
            (self.programs / tool).symlink_to(found)

    def xs(self, *words: str, status: int = 0) -> tuple[str, str]:
        """Runs `xs service WORDS`; what it says on each of its outputs."""
        environ = environment(HOME=str(self.folder), PATH=str(self.programs))
        environ.pop("XDG_CONFIG_HOME", None)
        done = subprocess.run(
            [sys.executable, "-m", "xs", "service", *words],
            env=environ,
            cwd=self.folder,
            capture_output=True,
            timeout=DEADLINE,
        )
        assert done.returncode == status, (done.stdout, done.stderr)
        return done.stdout.decode(), done.stderr.decode()

    def printed(self, *words: str) -> str:
        return self.xs("install", *words, "--print")[0]

    def play(self, tool: str, answer: str = "", status: int = 0) -> Path:
        """Puts a manager's tool there that notes what it is told; the file with its notes."""
        notes = self.folder / f"{tool}.notes"
        program = self.programs / tool
        program.write_text(
            f'#!/bin/sh\necho "$*" >> {notes}\ncat <<"END"\n{answer}\nEND\nexit {status}\n'
        )
        program.chmod(0o755)
        return notes


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    yield Home(tmp_path / "home")


# A unit, as systemd.syntax(7), systemd.service(5) and systemd.unit(5) have it


def sections(text: str) -> dict[str, list[tuple[str, str]]]:
    """A unit's sections: their names and values, in order. Strict: no line may be anything else."""
    found: dict[str, list[tuple[str, str]]] = {}
    assert text.endswith("\n") and "\r" not in text
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        assert not re.search(r"(?<!\\)(\\\\)*\\$", line), "a line that goes on in the next"
        if head := re.fullmatch(r"\[([A-Z][A-Za-z]*)\]", line):
            assert head[1] not in found
            here = found[head[1]] = []
        else:
            name, equals, value = line.partition("=")
            assert equals and re.fullmatch(r"[A-Z][A-Za-z]*", name) and value == value.strip()
            here.append((name, value))
    return found


def words_of(value: str, *, is_command: bool = True) -> list[str]:
    """The words of a value, unquoted; specifiers and variables are those of systemd."""
    words: list[bytes] = []
    rest = value
    while rest:
        if rest[0] == '"':
            quoted = re.match(r'"((?:[^"\\]|\\.)*)"(?: |$)', rest)
            assert quoted, rest
            text, rest = quoted[1], rest[quoted.end() :]
        else:
            text, _, rest = rest.partition(" ")
            assert not re.search(r"[\"'\\;]", text), text
        words.append(unescaped(text))
    texts = [word.decode() for word in words]
    for n, text in enumerate(texts):
        assert not re.search(r"%(?!%)", text.replace("%%", "")), text
        texts[n] = text.replace("%%", "%")
        if is_command and n > 0:
            assert "$" not in text.replace("$$", ""), text
            texts[n] = texts[n].replace("$$", "$")
    return texts


def unescaped(text: str) -> bytes:
    def byte(found: re.Match[bytes]) -> bytes:
        if found[1].startswith(b"x"):
            return bytes((int(found[1][1:], 16),))
        assert found[1] in b'\\"', found[1]
        return found[1]

    return re.sub(rb"\\(x[0-9a-f]{2}|.)", byte, text.encode())


def value_of(unit: dict[str, list[tuple[str, str]]], section: str, name: str) -> str:
    (value,) = [v for n, v in unit[section] if n == name]
    return value


def variables_of(unit: dict[str, list[tuple[str, str]]]) -> dict[str, str]:
    found = {}
    for name, value in unit["Service"]:
        if name == "Environment":
            (word,) = words_of(value, is_command=False)
            key, _, text = word.partition("=")
            found[key] = text
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_starts_the_very_words_that_were_given(home: Home, name: str) -> None:
    options = ["--expose", ":8080", "--host", "xs.example", "--no-scripts", "--grace", "7"]
    options += ["--log", "warning", "--log-file", f"logs/{name}", "--http", f"./{name}/web"]
    unit = sections(home.printed(name, *options))
    words = words_of(value_of(unit, "Service", "ExecStart"))
    assert words[0] == sys.executable
    folder = str(home.folder)
    assert words[1:] == [
        "-m", "xs", "serve", os.path.join(folder, name), "--expose=:8080", "--host=xs.example",
        "--no-scripts", f"--http={os.path.normpath(os.path.join(folder, name, 'web'))}",
        "--grace=7", "--log=warning", f"--log-file={os.path.join(folder, 'logs', name)}",
    ]  # fmt: skip
    assert value_of(unit, "Service", "TimeoutStopSec") == "17"


def test_a_unit_asks_for_all_that_a_server_can_tell(home: Home) -> None:
    unit = sections(home.printed("notes"))
    assert set(unit) == {"Unit", "Service", "Install"}
    expected = {
        "Type": "notify",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2 4",
        "KillMode": "mixed",
        "WatchdogSec": "60",
        "TimeoutStopSec": "20",
        "ExecReload": "/bin/kill -HUP $MAINPID",
    }
    for name, value in expected.items():
        assert value_of(unit, "Service", name) == value
    assert unit["Install"] == [("WantedBy", "default.target")]


@pytest.mark.parametrize("name", NAMES)
def test_systemd_finds_nothing_wrong_with_a_unit(home: Home, tmp_path: Path, name: str) -> None:
    text = home.printed(name, "--expose", ":8080", "--http", ":8081")
    sections(text)  # ours first, wherever there is no systemd
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return
    path = tmp_path / "xs-test.service"
    path.write_text(text)
    runtime = tmp_path / "run"
    runtime.mkdir(0o700)
    done = subprocess.run(
        [analyze, "--user", "verify", str(path)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime), "HOME": str(home.folder)},
        capture_output=True,
        text=True,
        timeout=DEADLINE * 3,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_words_of_a_unit_start_a_server(home: Home, store_dir: str) -> None:
    unit = sections(home.printed(store_dir, "--log-json"))
    process = subprocess.Popen(
        words_of(value_of(unit, "Service", "ExecStart")),
        env=variables_of(unit),
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline().decode() == f"serving {store_dir} at {store_dir}/sock\n"
    process.terminate()
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 0


def test_a_service_finds_the_programs_that_its_owner_finds(home: Home) -> None:
    unit = sections(home.printed("notes"))
    assert variables_of(unit)["PATH"] == str(home.programs)


def test_a_clone_and_an_installed_xs_are_each_called_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone" / "tools" / "start.py"
    monkeypatch.setattr(sys, "argv", [str(clone), "service"])
    assert service.planned("/s", "s", [], 0).words[0] == str(clone.with_name("xs"))
    program = tmp_path / "bin" / "xs"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "service"])
    plan = service.planned("/s", "s", ["--no-scripts"], 0)
    assert plan.words == [str(program), "serve", "/s", "--no-scripts"]
    assert "PYTHONPATH" not in plan.variables


# A property list, as plistlib has it


@pytest.mark.parametrize("name", ["notes", ODD.replace("\t", "").replace("\n", "")])
def test_a_property_list_starts_the_very_words_that_were_given(home: Home, name: str) -> None:
    text = home.printed(name, "--kind", "launchd", "--expose", ":8080", "--grace", "3")
    agent = plistlib.loads(text.encode())
    words = agent["ProgramArguments"]
    where = os.path.join(str(home.folder), name)
    assert words == [sys.executable, "-m", "xs", "serve", where, "--expose=:8080", "--grace=3"]
    assert agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ExitTimeOut"] == 13
    assert agent["EnvironmentVariables"]["PATH"] == str(home.programs)
    assert agent["StandardErrorPath"].startswith(f"{home.folder}/Library/Logs/xs.")
    home.xs("install", name, "--kind", "launchd")
    (path,) = home.agents.iterdir()
    assert path.name == f"{agent['Label']}.plist"
    said, _ = home.xs("status", name, "--kind", "launchd", status=3)  # so it knows it again
    assert str(path) in said


def test_launchctl_is_told_to_start_and_to_start_anew(home: Home) -> None:
    notes = home.play("launchctl", "state = running\n\tlast exit code = 3")
    said, _ = home.xs("install", "notes", "--kind", "launchd")
    path = home.agents / "xs.notes.plist"
    start = f"bootstrap gui/{os.getuid()} {path}"
    end = f"bootout gui/{os.getuid()}/xs.notes"
    assert f"    launchctl {start}\n" in said
    assert not notes.exists()
    home.xs("install", "notes", "--kind", "launchd", "--now")
    assert notes.read_text().splitlines()[:2] == [end, start]
    said, _ = home.xs("status", "notes", "--kind", "launchd", status=3)
    assert "launchd: running, last exit code 3\n" in said
    home.xs("remove", "notes", "--kind", "launchd")
    assert notes.read_text().splitlines()[-1] == end
    assert not path.exists()


def test_what_is_to_be_run_for_launchd_can_be_pasted(tmp_path: Path) -> None:
    home = Home(tmp_path / "a home's")
    said, _ = home.xs("install", "notes", "--kind", "launchd")
    command = said.splitlines()[2]
    path = f"{home.agents}/xs.notes.plist"
    assert shlex.split(command) == ["launchctl", "bootstrap", f"gui/{os.getuid()}", path]


# Installing, and what is left alone


def test_installing_writes_a_file_and_says_what_to_run(home: Home) -> None:
    home_files = set(home.folder.rglob("*"))
    printed = home.printed("notes")
    assert set(home.folder.rglob("*")) == home_files
    said, _ = home.xs("install", "notes")
    path = home.units / "xs-notes.service"
    assert path.read_text() == printed
    assert said.splitlines()[:4] == [
        f"wrote {path}",
        "to start it, now and at each login:",
        "    systemctl --user daemon-reload",
        "    systemctl --user enable --now xs-notes.service",
    ]
    assert [each.name for each in home.units.iterdir()] == ["xs-notes.service"]
    assert not (home.folder / "notes").exists()


def test_with_now_systemd_is_told(home: Home) -> None:
    notes = home.play(
        "systemctl",
        "ActiveState=active\nSubState=running\nUnitFileState=enabled\nStatusText=serving x",
    )
    said, _ = home.xs("install", "notes", "--now")
    assert "started notes: active (running), enabled: serving x" in said
    told = notes.read_text().splitlines()
    assert told[:2] == ["--user daemon-reload", "--user enable --now xs-notes.service"]
    notes.unlink()
    said, _ = home.xs("install", "notes", "--now", "--expose", ":8080")
    assert f"replaced {home.units}/xs-notes.service" in said.splitlines()
    told = notes.read_text().splitlines()
    assert told[:3] == [
        "--user daemon-reload",
        "--user enable xs-notes.service",
        "--user restart xs-notes.service",
    ]


def test_a_start_that_fails_is_said_so(home: Home) -> None:
    home.play("systemctl", "Failed to connect to bus", status=1)
    _, err = home.xs("install", "notes", "--now", status=1)
    where = f"{home.units}/xs-notes.service is there"
    assert err.startswith(f"xs: systemctl --user daemon-reload failed, with status 1; {where}, ")
    (home.programs / "systemctl").unlink()
    _, err = home.xs("install", "notes", "--now", status=1)
    assert err.startswith("xs: can't run systemctl: No such file")


def test_for_a_file_no_service_is_installed(home: Home) -> None:
    (home.folder / "notes").write_text("mine")
    for kind in ("systemd", "launchd"):
        out, err = home.xs("install", "notes", "--kind", kind, status=1)
        assert out == "" and "notes: it is a file, and a store is a directory" in err
    assert not home.units.exists()


def test_a_folder_that_can_not_be_made_is_told_with_the_files_path(home: Home) -> None:
    home.units.parent.mkdir(parents=True, exist_ok=True)
    home.units.write_text("no folder")
    _, err = home.xs("install", "notes", status=1)
    assert err == f"xs: can't write {home.units}/xs-notes.service: File exists\n"


def test_what_somebody_else_has_written_is_left_as_it_is(home: Home) -> None:
    home.units.mkdir(parents=True)
    path = home.units / "xs-notes.service"
    path.write_text("[Service]\nExecStart=/bin/true\n")
    for action in ("install", "remove"):
        _, err = home.xs(action, "notes", status=2)
        assert str(path) in err and err.count("\n") == 1
    home.xs("status", "notes", status=4)
    assert path.read_text() == "[Service]\nExecStart=/bin/true\n"
    home.xs("install", "notes", "--name", "other")
    assert (home.units / "xs-other.service").exists()


def test_a_store_of_the_same_name_elsewhere_gets_a_name_of_its_own(home: Home) -> None:
    home.xs("install", "one/notes")
    _, err = home.xs("install", "two/notes", status=2)
    assert f"for {home.folder}/one/notes: give another --name" in err
    home.xs("install", "two/notes", "--name", "more")
    for where, unit in (("one/notes", "xs-notes"), ("two/notes", "xs-more")):
        said, _ = home.xs("status", where, status=3)
        assert f"{unit}.service" in said
    # One store has one service: two would wait for its lock for ever.
    _, err = home.xs("install", "two/notes", "--name", "again", status=2)
    assert f"{home.folder}/two/notes has a service already, more" in err


def test_a_service_is_found_by_its_store_through_links(home: Home) -> None:
    (home.folder / "real").mkdir()
    (home.folder / "link").symlink_to("real")
    home.xs("install", "link", "--name", "x")
    said, _ = home.xs("install", "real")
    assert said.startswith(f"replaced {home.units}/xs-x.service")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["start", "notes"], "service takes install, status or remove, not 'start'"),
        (["install", "notes", "--kind", "cron"], "--kind takes systemd or launchd"),
        (["install", "notes", "--name", "a/b"], "--name takes letters, digits"),
        (["install", "notes", "--name", ".."], "--name takes letters, digits"),
        (["install", "~/notes"], "has a literal ~"),
        (["install", "notes", "--expose", "nonsense"], "can't expose 'nonsense'"),
        (["install", "notes", "--host", "a b"], "--host takes a name"),
        (["install", "notes", "--http-max", "5"], "--http-max goes with --http"),
        (["install", "notes", "--log", "loud"], "--log takes error"),
        (["status", "notes", "--expose", ":1"], "--expose goes with install"),
        (["remove", "notes", "--now"], "--now goes with install"),
        (["install"], "DIR is missing"),
    ],
)
def test_what_would_not_start_is_not_installed(home: Home, words: list[str], says: str) -> None:
    out, err = home.xs(*words, status=2)
    assert out == "" and says in err
    assert not home.units.exists()


@pytest.mark.parametrize("kind", ["systemd", "launchd"])
def test_a_name_that_a_file_can_not_have_is_refused(home: Home, kind: str) -> None:
    bad = b"caf\xe9" if kind == "systemd" else b"a\x01b"
    _, err = home.xs("install", os.fsdecode(bad), "--kind", kind, status=2)
    assert "not UTF-8" in err if kind == "systemd" else "control characters" in err


@pytest.mark.parametrize("directory", ["/", "notes/", "../x", "...", "ünï cöde", "a" * 250])
def test_each_directory_has_a_name_for_its_service(home: Home, directory: str) -> None:
    home.xs("install", directory)
    (path,) = home.units.iterdir()
    assert re.fullmatch(r"xs-[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.service", path.name)


# Status and removal


def test_status_tells_what_is_and_its_status_says_it(home: Home, server: Server) -> None:
    said, _ = home.xs("status", server.directory, status=4)
    assert said.splitlines()[1] == f"served by process {server.process.pid}"
    home.xs("install", server.directory)
    said, _ = home.xs("status", server.directory)
    assert said.splitlines() == [
        f"service: store, {home.units}/xs-store.service",
        "systemd: systemctl is not here",
        f"served by process {server.process.pid}",
    ]
    server.process.kill()
    server.process.wait()
    said, _ = home.xs("status", server.directory, status=3)
    assert said.splitlines()[2] == "not served"
    # Its number may be another process's by then, and what a lock's file says is no lock.
    Path(server.directory, "lock").write_text(f"{os.getpid()} serve\n")
    said, _ = home.xs("status", server.directory, status=3)
    assert said.splitlines()[2] == "not served"


@pytest.mark.parametrize(
    ("answer", "status", "shown"),
    [
        ("ActiveState=inactive\nSubState=dead\nStatusText=stopping", 0, "inactive (dead)"),
        (
            "ActiveState=failed\nSubState=failed\nUnitFileState=enabled\nExecMainStatus=4\n"
            "StatusText=not a store: x",
            0,
            "failed (failed), enabled, with status 4: not a store: x",
        ),
        ("Failed to connect to bus", 1, "systemctl knows nothing of it"),
    ],
)
def test_status_has_systemd_s_words(home: Home, answer: str, status: int, shown: str) -> None:
    home.xs("install", "notes")
    home.play("systemctl", answer, status)
    said, _ = home.xs("status", "notes", status=3)
    assert said.splitlines()[1] == f"systemd: {shown}"


def test_removing_ends_it_and_leaves_the_store(home: Home, server: Server) -> None:
    home.xs("install", server.directory)
    notes = home.play("systemctl")
    said, _ = home.xs("remove", server.directory)
    assert notes.read_text().splitlines() == [
        "--user disable --now xs-store.service",
        "--user daemon-reload",
    ]
    assert list(home.units.iterdir()) == []
    assert f"still served, by process {server.process.pid}" in said  # it is not the service's
    assert os.path.exists(os.path.join(server.directory, "xs.db"))
    _, err = home.xs("remove", server.directory, status=1)
    assert err.startswith("xs: no service: ")


@pytest.mark.parametrize("failing", [False, True])
def test_removing_works_where_there_is_no_systemd(home: Home, failing: bool) -> None:
    home.xs("install", "notes")
    if failing:
        home.play("systemctl", "Failed to connect to bus", status=1)
    said, _ = home.xs("remove", "notes")
    assert "removed" in said
    assert failing or "systemctl is not here: if the service runs, end it yourself" in said
    assert list(home.units.iterdir()) == []


# The table


def test_a_service_takes_all_that_serve_takes() -> None:
    def flags(name: str) -> set[str]:
        return {flag for option in cli.COMMANDS[name].options for flag in option.flags}

    assert flags("serve") <= flags("service")
    files = {option.name for option in cli.COMMANDS["serve"].options if option.value == "FILE"}
    assert files == {"tls-cert", "tls-key", "log-file"}


def test_the_unit_of_a_clone_finds_it_from_anywhere(home: Home) -> None:
    assert variables_of(sections(home.printed("notes")))["PYTHONPATH"] == str(ROOT)
