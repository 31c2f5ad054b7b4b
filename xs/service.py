"""`xs service`: a store that the system's process manager serves, from login to login.

It writes a unit for the user's systemd, or a property list for launchd, by which `xs serve` is
started with the words that were given, and says what is to be done with that, or does it. In the
file's first lines stands which store it is for. A file without that is somebody else's, and is left
alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile

from xs import errors
from xs.lock import server_of
from xs.records import NamedTuple
from xs.terminal import harmless

_MARK = "xs service: "  # then the store, as JSON
_STOP_SECONDS = 10  # beyond the grace, before a manager ends what doesn't end
_KEPT = ("XS_NU",)  # variables that say how scripts are run
_PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"

# Exit statuses of `status`; those of LSB's init scripts.
NOT_RUNNING, NOT_INSTALLED = 3, 4


class Plan(NamedTuple):
    """What is to be run, and how."""

    name: str
    store: str  # its directory, absolute
    words: list[str]  # the command line
    variables: dict[str, str]
    grace: int  # seconds


class Manager:
    """A process manager of the user's. Its files are named by the service's name."""

    kind = ""
    tool = ""

    @property
    def folder(self) -> str:
        raise NotImplementedError

    def file_name(self, name: str) -> str:
        raise NotImplementedError

    def name_of(self, file_name: str) -> str | None:
        """The service's name, of a file that may be one of ours."""
        start, end = self.file_name("\0").split("\0")
        if not (file_name.startswith(start) and file_name.endswith(end)):
            return None
        return file_name[len(start) : len(file_name) - len(end)]

    def path(self, name: str) -> str:
        return os.path.join(self.folder, self.file_name(name))

    def text(self, plan: Plan) -> bytes:
        """What the service's file says. Raises `Usage` for what can't be said there."""
        raise NotImplementedError

    def start(self, name: str) -> list[list[str]]:
        """The commands that start it, now and at each login."""
        raise NotImplementedError

    def start_again(self, name: str) -> list[list[str]]:
        """The same for one that may run already, as it was."""
        raise NotImplementedError

    def stop(self, name: str) -> list[str]:
        """The command that ends it, for good."""
        raise NotImplementedError

    def forget(self) -> list[str] | None:
        """The command that makes the manager see that a file is gone, if it needs one."""
        return None

    def state(self, name: str) -> str:
        """In a line what the manager knows of it; "" if it says nothing."""
        raise NotImplementedError

    @property
    def hint(self) -> str:
        """What one may want to know besides; "" if there is nothing."""
        return ""


# systemd


class Systemd(Manager):
    kind = "systemd"
    tool = "systemctl"

    @property
    def folder(self) -> str:
        home = os.environ.get("XDG_CONFIG_HOME") or ""
        if not os.path.isabs(home):  # to be ignored: XDG Base Directory Specification
            home = os.path.expanduser("~/.config")
        return os.path.join(home, "systemd", "user")

    def file_name(self, name: str) -> str:
        return f"xs-{name}.service"

    def text(self, plan: Plan) -> bytes:
        program, *words = plan.words
        if any(c in "\"'\\" or not c.isprintable() for c in program):
            raise errors.Usage(f"systemd can't start a program with such a path: {program!r}")
        command = " ".join([_quoted(program), *(_quoted(w).replace("$", "$$") for w in words)])
        variables = [f"Environment={_quoted(f'{k}={v}')}" for k, v in plan.variables.items()]
        lines = [
            f"# {_marked(plan.store)}",
            "# Installing it again replaces it. Changes of your own last in a file beside it:",
            f"#     systemctl --user edit {self.file_name(plan.name)}",
            "",
            "[Unit]",
            f"Description=xs, serving {_in_one_line(plan.store)}",
            "",
            "[Service]",
            "Type=notify",
            f"ExecStart={command}",
            "ExecReload=/bin/kill -HUP $MAINPID",
            *variables,
            "# What is wrong with the command line or the store does not pass by itself.",
            "Restart=on-failure",
            "RestartSec=5",
            "RestartPreventExitStatus=2 4",
            "WatchdogSec=60",
            "# The server ends its scripts itself.",
            "KillMode=mixed",
            f"TimeoutStopSec={plan.grace + _STOP_SECONDS}",
            "",
            "[Install]",
            "WantedBy=default.target",
        ]
        return _encoded("".join(f"{line}\n" for line in lines))

    def start(self, name: str) -> list[list[str]]:
        return [self.forget(), self._command("enable", "--now", self.file_name(name))]

    def start_again(self, name: str) -> list[list[str]]:
        unit = self.file_name(name)
        return [self.forget(), self._command("enable", unit), self._command("restart", unit)]

    def stop(self, name: str) -> list[str]:
        return self._command("disable", "--now", self.file_name(name))

    def forget(self) -> list[str]:
        return self._command("daemon-reload")

    def state(self, name: str) -> str:
        wanted = ("ActiveState", "SubState", "UnitFileState", "StatusText", "ExecMainStatus")
        said = _asked(self._command("show", "-p", ",".join(wanted), self.file_name(name)))
        known = dict(line.partition("=")[::2] for line in said.splitlines())
        if not known.get("ActiveState"):
            return ""
        words = [f"{known['ActiveState']} ({known.get('SubState')})"]
        if known.get("UnitFileState"):
            words.append(known["UnitFileState"])
        if known["ActiveState"] == "failed":
            words.append(f"with status {known.get('ExecMainStatus')}")
        if known.get("StatusText") and known["ActiveState"] != "inactive":  # else its last words
            return f"{', '.join(words)}: {known['StatusText']}"
        return ", ".join(words)

    @property
    def hint(self) -> str:
        return "loginctl enable-linger    lets it run while you are not logged in"

    def _command(self, *words: str) -> list[str]:
        return ["systemctl", "--user", *words]


def _quoted(word: str) -> str:
    """A word of a unit's command line, or of Environment= (systemd.syntax(7), systemd.unit(5)).

    In a command line a `$` has to be doubled, too, but for the program's own path.
    """
    if word and all(c in _PLAIN + "/:=,+@" for c in word):
        return word
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return '"' + "".join(c if c.isprintable() else _escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte of a name that isn't UTF-8: see `_encoded`
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode())


def _in_one_line(text: str) -> str:
    return harmless(text).replace("\n", "\\n").replace("\\", "\\\\").replace("%", "%%")


# launchd


class Launchd(Manager):
    kind = "launchd"
    tool = "launchctl"

    @property
    def folder(self) -> str:
        return os.path.expanduser("~/Library/LaunchAgents")

    def file_name(self, name: str) -> str:
        return f"xs.{name}.plist"

    def text(self, plan: Plan) -> bytes:
        import plistlib

        log = os.path.expanduser(f"~/Library/Logs/xs.{plan.name}.log")
        agent = {
            "Label": self._label(plan.name),
            "ProgramArguments": plan.words,
            "EnvironmentVariables": plan.variables,
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ExitTimeOut": plan.grace + _STOP_SECONDS,
            "StandardOutPath": log,
            "StandardErrorPath": log,
        }
        _encoded(json.dumps(agent, ensure_ascii=False))
        try:
            head, mark, rest = plistlib.dumps(agent, sort_keys=False).partition(b"<plist ")
        except ValueError:
            raise errors.Usage("a property list has no control characters in it") from None
        # In a comment of XML two hyphens would be its end; in JSON they can be written otherwise.
        marked = _marked(plan.store).replace("-", "\\u002d")
        return head + f"<!-- {marked} -->\n".encode() + mark + rest

    def start(self, name: str) -> list[list[str]]:
        return [["launchctl", "bootstrap", self._domain, self.path(name)]]

    def start_again(self, name: str) -> list[list[str]]:
        return [self.stop(name), *self.start(name)]

    def stop(self, name: str) -> list[str]:
        return ["launchctl", "bootout", f"{self._domain}/{self._label(name)}"]

    def state(self, name: str) -> str:
        said = _asked(["launchctl", "print", f"{self._domain}/{self._label(name)}"])
        known = dict(line.strip().partition(" = ")[::2] for line in said.splitlines())
        if "state" not in known:
            return ""
        ended = known.get("last exit code", "")
        return known["state"] + (f", last exit code {ended}" if ended.isdigit() else "")

    def _label(self, name: str) -> str:
        return f"xs.{name}"

    @property
    def _domain(self) -> str:
        return f"gui/{os.getuid()}"


# What a person asks for

_MANAGERS = {each.kind: each for each in (Systemd, Launchd)}


def manager_of(kind: str | None) -> Manager:
    """The manager of that kind, or of this system. Raises `Usage`."""
    kind = kind or ("launchd" if sys.platform == "darwin" else "systemd")
    if kind not in _MANAGERS:
        raise errors.Usage(f"--kind takes {' or '.join(_MANAGERS)}, not {kind!r}")
    return _MANAGERS[kind]()


def install(
    manager: Manager, store: str, name: str | None, options: list[str], grace: int, *, now: bool
) -> list[str]:
    """Writes the service's file, and starts it if that is to be `now`; says what there is to say.

    `options` are for `xs serve`. Raises `Usage` where another's file, or another's store's, is.
    """
    found = _installed(manager, store)
    if name is not None and found and name not in found:
        raise errors.Usage(
            f"{store} has a service already, {found[0]}: remove that first, or install it anew"
        )
    plan = planned(store, _name(manager, store, name), options, grace)
    path = manager.path(plan.name)
    text = manager.text(plan)
    before = _read(path)
    if before is not None and not _is_same(_store_of(before), store):
        other = _store_of(before)
        whose = f"for {other}" if other is not None else "and was not written by xs"
        raise errors.Usage(f"{path} is there already, {whose}: give another --name")
    _write(path, text)
    said = [f"{'wrote' if before is None else 'replaced'} {path}"]
    commands = (manager.start if before is None else manager.start_again)(plan.name)
    if now:
        try:
            for command in commands:
                _run(command, may_fail=command == manager.stop(plan.name))  # it may not have run
        except errors.XsError as error:
            hint = f"{path} is there, and `xs service status {store}` says how it is"
            raise errors.XsError(f"{error}; {hint}") from None
        said.append(f"started {plan.name}: {manager.state(plan.name) or 'see its log'}")
    else:
        said.append("to start it, now and at each login:")
        said += [f"    {shlex.join(command)}" for command in commands]
    return [*said, manager.hint] if manager.hint else said


def printed(
    manager: Manager, store: str, name: str | None, options: list[str], grace: int
) -> bytes:
    """What `install` would write."""
    return manager.text(planned(store, _name(manager, store, name), options, grace))


def status(manager: Manager, store: str, name: str | None) -> tuple[list[str], int]:
    """What is to be said of a store's service, and an exit status."""
    name = _name(manager, store, name)
    path = manager.path(name)
    text = _read(path)
    server = server_of(store)
    served = f"served by process {server}" if server is not None else "not served"
    if text is None:
        return [f"no service: {path} is not there", served], NOT_INSTALLED
    if not _is_same(_store_of(text), store):
        return [f"no service: {path} is not for {store}", served], NOT_INSTALLED
    if shutil.which(manager.tool) is None:
        state = f"{manager.tool} is not here"
    else:
        state = manager.state(name) or f"{manager.tool} knows nothing of it"
    said = [f"service: {name}, {path}", f"{manager.kind}: {state}", served]
    return said, 0 if server is not None else NOT_RUNNING


def remove(manager: Manager, store: str, name: str | None) -> list[str]:
    """Ends the service, and removes its file. The store is left as it is."""
    name = _name(manager, store, name)
    path = manager.path(name)
    text = _read(path)
    if text is None:
        raise errors.XsError(f"no service: {path} is not there")
    if not _is_same(_store_of(text), store):
        raise errors.Usage(f"{path} is not for {store}: it is left as it is")
    has_tool = shutil.which(manager.tool) is not None
    if has_tool:
        _run(manager.stop(name), may_fail=True)  # it may have been ended by hand
    os.unlink(path)
    forget = manager.forget()
    if has_tool and forget is not None:
        _run(forget, may_fail=True)
    said = [f"removed {path}; the store is left as it is"]
    if not has_tool:
        said.append(f"{manager.tool} is not here: if the service runs, end it yourself")
    server = server_of(store)
    if server is not None:
        said.append(f"the store is still served, by process {server}")
    return said


def planned(store: str, name: str, options: list[str], grace: int) -> Plan:
    """What is to be run for that store."""
    words, variables = _program()
    # Scripts find what they find here: a manager's own PATH is short.
    path = [part for part in os.environ.get("PATH", "").split(os.pathsep) if os.path.isabs(part)]
    variables["PATH"] = os.pathsep.join(path) or os.defpath
    variables.update({key: os.environ[key] for key in _KEPT if os.environ.get(key)})
    return Plan(name, store, [*words, "serve", store, *options], variables, grace)


def _program() -> tuple[list[str], dict[str, str]]:
    """How this xs is called, from anywhere, and the variables that takes."""
    called = os.path.abspath(sys.argv[0])
    folder, base = os.path.split(called)
    if base == "start.py":  # a clone's (tools/xs)
        return [os.path.join(folder, "xs")], {}
    if base != "__main__.py" and os.access(called, os.X_OK) and os.path.isfile(called):
        return [called], {}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    is_installed = os.path.basename(root) in ("site-packages", "dist-packages")
    return [sys.executable, "-m", "xs"], {} if is_installed else {"PYTHONPATH": root}


# Names and files


def _name(manager: Manager, store: str, given: str | None) -> str:
    """The name that was given, or that of the store's service, or one like the directory's."""
    if given is not None:
        if not given.strip(".-") or not all(c in _PLAIN for c in given) or len(given) > 200:
            raise errors.Usage(f"--name takes letters, digits, and any of _ . -, not {given!r}")
        return given
    found = _installed(manager, store)
    if len(found) > 1:
        raise errors.Usage(f"{store} has several services, {', '.join(found)}: give a --name")
    if found:
        return found[0]
    made = "".join(c if c in _PLAIN else "-" for c in os.path.basename(store))
    return made.strip(".-")[:200] or "store"


def _installed(manager: Manager, store: str) -> list[str]:
    """The names of services that are for that store."""
    try:
        files = sorted(os.listdir(manager.folder))
    except OSError:
        return []
    names = [name for name in map(manager.name_of, files) if name]
    return [n for n in names if _is_same(_store_of(_read(manager.path(n)) or b""), store)]


def _marked(store: str) -> str:
    return _MARK + json.dumps({"store": store}, ensure_ascii=True)


def _store_of(text: bytes) -> str | None:
    """The store that a service's file is for; None if it was not written here."""
    for line in text.splitlines()[:4]:
        _, found, rest = line.partition(_MARK.encode())
        if found:
            try:
                store = json.loads(rest.rpartition(b"}")[0] + b"}")["store"]
            except (ValueError, KeyError, TypeError):
                return None
            return store if isinstance(store, str) else None
    return None


def _is_same(one: str | None, other: str) -> bool:
    return one is not None and os.path.realpath(one) == os.path.realpath(other)


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write(path: str, data: bytes) -> None:
    """Puts a file there, whole or not at all."""
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
        number, temporary = tempfile.mkstemp(dir=folder, prefix=".xs-")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), 0o644)
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise errors.XsError(f"can't write {path}: {error.strerror}") from None


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise errors.Usage("a name here is not UTF-8, as a service's file has to be") from None


# Other programs, and processes


def _run(command: list[str], *, may_fail: bool = False) -> None:
    """Runs a command; what it says is for the person who has asked. Raises `XsError`."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise errors.XsError(f"can't run {command[0]}: {error.strerror}") from None
    if done.returncode and not may_fail:
        raise errors.XsError(f"{' '.join(command)} failed, with status {done.returncode}")


def _asked(command: list[str]) -> str:
    """What a command says; "" if it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""
