"""The tools work from a fresh clone, as a newcomer has it, whatever its folder is called."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import DEADLINE, XS, environment

# One worker makes the clone's environment for all of them.
pytestmark = [pytest.mark.xdist_group("tools"), pytest.mark.once]

ROOT = Path(__file__).resolve().parent.parent
VERSION = ast.literal_eval(
    re.search(r"^VERSION = (.*)$", (ROOT / "xs/version.py").read_text(), re.MULTILINE)[1]
)

# A command that tells what reached it, put in the place of the real one: the tool is tested here.
TELLTALE = """
import json, os, sys

def main():
    import scru128
    print(json.dumps({
        "arguments": sys.argv[1:], "input": sys.stdin.read(), "cwd": os.getcwd(),
        "file": __file__, "scru128": scru128.__file__, "site": "site" in sys.modules,
    }))
    return 7
"""


class FirstUses(NamedTuple):
    clone: Path
    ended: list[tuple[int, str, str]]  # of each process: status, standard output, standard error


def copy_of_the_repository(folder: Path) -> Path:
    """What a fresh clone would have, and what is not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def environ(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XS_", "PYTHON"))}
    return {**kept, "XS_PYTHON": sys.executable, **more}


def run(
    *command: str | Path, cwd: Path | None = None, stdin: str = "", **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        env=environ(**more),
        timeout=100,
    )


@pytest.fixture(scope="module")
def first_uses(tmp_path_factory: pytest.TempPathFactory) -> FirstUses:
    """Two at the same moment, in a clone whose folder has an odd name."""
    clone = copy_of_the_repository(tmp_path_factory.mktemp("at") / "a clone & its (odd) 'name'")
    both = [
        subprocess.Popen(
            [clone / "tools/xs", "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ(),
        )
        for _ in range(2)
    ]
    ended = []
    for process in both:
        output, errors = process.communicate(timeout=100)
        ended.append((process.returncode, output, errors))
    return FirstUses(clone, ended)


@pytest.fixture
def clone(first_uses: FirstUses, tmp_path: Path) -> Path:
    """A clone that has its environment, in another folder than where that was made."""
    moved = tmp_path / "moved, and still its own"
    shutil.copytree(first_uses.clone, moved, symlinks=True)
    return moved


@pytest.fixture
def telltale(clone: Path) -> Path:
    """Such a clone, whose command tells what reached it."""
    (clone / "xs/cli.py").write_text(TELLTALE)
    return clone


# ---- tools/xs: its first use -------------------------------------------------------------------


def test_the_first_use_makes_an_environment_also_when_two_come_at_once(
    first_uses: FirstUses,
) -> None:
    for status, output, _ in first_uses.ended:
        assert (status, output) == (0, f"xs {VERSION}\n")
    said = [line for _, _, errors in first_uses.ended for line in errors.splitlines()]
    assert len([line for line in said if "making it with Python" in line]) == 1
    assert len(said) <= 2


def test_a_later_use_says_nothing_of_its_own(first_uses: FirstUses) -> None:
    again = run(first_uses.clone / "tools/xs", "--version")
    assert (again.returncode, again.stdout, again.stderr) == (0, f"xs {VERSION}\n", "")


def test_the_environment_imports_the_clone_itself(clone: Path) -> None:
    code = "import xs, scru128; print(xs.__file__)"
    shown = run(clone / ".venv/bin/python", "-c", code, cwd=clone.parent)
    assert shown.stdout == f"{clone / 'xs/__init__.py'}\n"


# ---- tools/xs: what reaches the command --------------------------------------------------------


def test_arguments_input_and_exit_status_pass_unchanged(telltale: Path) -> None:
    arguments = ["a b", "", "*", "$HOME", "'\"\\", "new\nline", "-c", "--", "…"]
    done = run(telltale / "tools/xs", *arguments, stdin="in\0put\n")
    told = json.loads(done.stdout)
    assert (told["arguments"], told["input"], done.returncode) == (arguments, "in\0put\n", 7)
    assert done.stderr == ""


def test_a_directory_as_standard_input_is_told_in_one_line(telltale: Path) -> None:
    done = run("sh", "-c", '"$0" append ./store t < /', str(telltale / "tools/xs"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "xs: standard input is a directory: give it a file or a pipe\n"


@pytest.mark.parametrize("way", ["link", "link to a link", "link to the folder", "sh", "./xs"])
def test_xs_works_from_anywhere_by_any_name(telltale: Path, tmp_path: Path, way: str) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "xs").symlink_to(Path("..") / telltale.name / "tools/xs")
    (elsewhere / "ex").symlink_to("xs")
    (elsewhere / "bin").symlink_to(telltale / "tools")
    (elsewhere / "tools").symlink_to(telltale / "tools")
    ways: dict[str, list[tuple[list[str], Path]]] = {
        "link": [([f"{elsewhere}/xs"], tmp_path), (["else where/xs"], tmp_path)],
        "link to a link": [(["./ex"], elsewhere)],
        "link to the folder": [(["bin/xs"], elsewhere), (["tools/xs"], elsewhere)],
        "sh": [(["sh", "tools/xs"], telltale), (["sh", "xs"], telltale / "tools")],
        "./xs": [(["./xs"], telltale / "tools"), (["../tools/./xs"], telltale / "docs")],
    }
    (telltale / "docs").mkdir(exist_ok=True)
    for command, cwd in ways[way]:
        done = run(*command, cwd=cwd)
        told = json.loads(done.stdout)
        assert Path(told["file"]).samefile(telltale / "xs/cli.py")
        assert Path(told["cwd"]).samefile(cwd)
        assert done.stderr == ""


def test_xs_is_found_on_path_through_a_link(telltale: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/xs").symlink_to(telltale / "tools/xs")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = run("sh", "-c", "xs hello", cwd=tmp_path, PATH=path)
    assert json.loads(done.stdout)["arguments"] == ["hello"]


def test_xs_runs_on_its_own_packages_and_starts_without_site(telltale: Path) -> None:
    done = run(telltale / "tools/xs", PYTHONPATH="/nonexistent", PYTHONHOME="/nonexistent")
    told = json.loads(done.stdout)
    assert Path(told["scru128"]).is_relative_to(telltale / ".venv")
    assert told["site"] is False


# ---- tools/xs: an environment that is no longer right ------------------------------------------


def test_an_environment_that_was_left_half_made_is_made_again(telltale: Path) -> None:
    (telltale / ".venv/ready").unlink()
    (packages,) = telltale.glob(".venv/lib/python3*/site-packages")
    shutil.rmtree(packages / "scru128")
    done = run(telltale / "tools/xs")
    assert done.returncode == 7, done.stderr
    assert "making it with Python" in done.stderr


def test_an_environment_whose_python_is_gone_is_made_again(telltale: Path) -> None:
    (telltale / ".venv/bin/python").unlink()
    (telltale / ".venv/bin/python").symlink_to("/nonexistent/python3")
    done = run(telltale / "tools/xs")
    assert done.returncode == 7, done.stderr
    assert "making it with Python" in done.stderr


def test_an_environment_whose_python_became_another_version_is_made_again(telltale: Path) -> None:
    (library,) = telltale.glob(".venv/lib/python3*")
    library.rename(library.with_name("python3.1"))
    done = run(telltale / "tools/xs", "a b", stdin="input")
    told = json.loads(done.stdout)
    assert (told["arguments"], told["input"]) == (["a b"], "input")


def test_what_pyproject_asks_for_anew_is_installed_into_the_environment(telltale: Path) -> None:
    pyproject = telltale / "pyproject.toml"
    text = pyproject.read_text()
    pyproject.write_text(text.replace("scru128>=3.0.2", "scru128>=3.0.1"))
    os.utime(pyproject)
    done = run(telltale / "tools/xs")
    assert (done.returncode, "bringing it up to date" in done.stderr) == (7, True)
    assert "scru128>=3.0.1" in (telltale / ".venv/ready").read_text()


def test_a_change_of_pyproject_that_asks_for_nothing_new_is_not_mentioned(telltale: Path) -> None:
    later = (telltale / ".venv/ready").stat().st_mtime + 1
    os.utime(telltale / "pyproject.toml", (later, later))
    done = run(telltale / "tools/xs")
    assert (done.returncode, done.stderr) == (7, "")


def test_a_package_that_cannot_be_had_is_told_and_the_next_use_tries_again(tmp_path: Path) -> None:
    clone = copy_of_the_repository(tmp_path)
    done = run(clone / "tools/xs", "--version", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert (done.returncode, done.stdout) == (1, "")
    assert "scru128" in done.stderr
    assert "could not be made" in done.stderr.splitlines()[-1]
    done = run(clone / "tools/xs", "--version")
    assert (done.returncode, done.stdout) == (0, f"xs {VERSION}\n")


# ---- tools/pythons -----------------------------------------------------------------------------


def fake_python(path: Path, before: str) -> Path:
    """A Python that differs from this one by what `before` does to it."""
    path.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -I -c "import sys; {before}; exec(sys.argv[1])" "$3"\n'
    )
    path.chmod(0o755)
    return path


def refusal(python: str, **more: str) -> str:
    done = run(ROOT / "tools/pythons", "first", XS_PYTHON=python, **more)
    assert (done.returncode, done.stdout) == (1, "")
    assert run(ROOT / "tools/pythons", XS_PYTHON=python, **more).stderr == done.stderr
    return done.stderr


def test_a_machine_without_python_is_told_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "sort").symlink_to(shutil.which("sort") or "")
    said = refusal("", PATH=str(tmp_path), HOME=str(tmp_path))
    assert said == (
        "xs: no CPython 3.9 or later found: install one, or name its path in XS_PYTHON\n"
    )


def test_a_python_without_ensurepip_is_told_what_to_install(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python 3", "sys.modules['ensurepip'] = None")
    assert "apt-get install python3-venv" in refusal(str(python))


@pytest.mark.parametrize("before", ["sys.version_info = (3, 8, 20, 'final', 0)", "sys.exit(0)"])
def test_what_is_no_fit_python_is_refused(tmp_path: Path, before: str) -> None:
    python = fake_python(tmp_path / "python3", before)
    assert refusal(str(python)) == f"xs: XS_PYTHON={python} is not a CPython 3.9 or later\n"


def test_the_first_python3_of_path_that_is_fit_is_taken(tmp_path: Path) -> None:
    fake_python(tmp_path / "python3", "sys.version_info = (3, 8, 20, 'final', 0)")
    (tmp_path / "python3.9").symlink_to(sys.executable)
    version = ".".join(map(str, sys.version_info[:3]))
    done = run(
        ROOT / "tools/pythons", "first", XS_PYTHON="", PATH=str(tmp_path), HOME=str(tmp_path)
    )
    assert re.fullmatch(re.escape(version) + r"\t/.*\n", done.stdout)


def test_all_pythons_are_listed_once_by_version() -> None:
    listed = run(ROOT / "tools/pythons", XS_PYTHON="").stdout.splitlines()
    versions = [[int(part) for part in line.split("\t")[0].split(".")][:2] for line in listed]
    assert versions == sorted(versions)
    assert len({tuple(version) for version in versions}) == len(versions) >= 1


# ---- tools/nushell -----------------------------------------------------------------------------

# An npm whose registry is the file $REGISTRY: a version of Nushell a line.
NPM = """#!/bin/sh
case $1 in
    view) tail -n 1 "$REGISTRY" ;;
    install)
        for word; do
            [ "$before" = --prefix ] && folder=$word
            before=$word
        done
        version=${word#nushell@}
        grep -qx "$version" "$REGISTRY" || exit 1
        mkdir -p "$folder/node_modules/@nushell/this-one/bin"
        printf '#!/bin/sh\\necho %s\\n' "$version" > "$folder/node_modules/@nushell/this-one/bin/nu"
        chmod +x "$folder/node_modules/@nushell/this-one/bin/nu" ;;
esac
"""


class Nushells(NamedTuple):
    """A clone with nothing but tools/nushell, and a registry."""

    clone: Path
    registry: Path

    def get(self, version: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.clone}{os.pathsep}{os.environ['PATH']}"
        return run(self.clone / "tools/nushell", version, REGISTRY=str(self.registry), PATH=path)

    def path(self, version: str) -> str:
        return f"{self.clone}/.cache/nu/{version}/node_modules/@nushell/this-one/bin/nu\n"


@pytest.fixture
def nushells(tmp_path: Path) -> Nushells:
    made = Nushells(tmp_path / "a clone", tmp_path / "registry")
    (made.clone / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools/nushell", made.clone / "tools/nushell")
    (made.clone / "npm").write_text(NPM)
    (made.clone / "npm").chmod(0o755)
    made.registry.write_text("0.99.1\n0.109.1\n0.115.1\n")
    return made


def test_a_nushell_is_installed_once_and_its_path_printed(nushells: Nushells) -> None:
    first = nushells.get("0.109.1")
    assert (first.returncode, first.stdout) == (0, nushells.path("0.109.1")), first.stderr
    assert first.stderr == "tools/nushell: installing Nushell 0.109.1\n"
    nushells.registry.unlink()
    again = nushells.get("0.109.1")
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")


def test_the_newest_nushell_is_asked_for_once_a_day(nushells: Nushells) -> None:
    assert nushells.get("newest").stdout == nushells.path("0.115.1")
    nushells.registry.write_text("0.115.1\n0.116.0\n")
    assert nushells.get("newest").stdout == nushells.path("0.115.1")
    os.utime(nushells.clone / ".cache/nu/newest", (0, 0))
    assert nushells.get("newest").stdout == nushells.path("0.116.0")


def test_without_a_network_the_newest_nushell_is_that_of_those_here(nushells: Nushells) -> None:
    for version in ("0.109.1", "0.99.1"):
        assert nushells.get(version).returncode == 0
    nushells.registry.unlink()
    newest = nushells.get("newest")
    assert (newest.returncode, newest.stdout, newest.stderr) == (0, nushells.path("0.109.1"), "")


def test_a_nushell_that_cannot_be_had_is_told(nushells: Nushells) -> None:
    none = nushells.get("0.1.0")
    assert (none.returncode, none.stdout) == (1, "")
    assert none.stderr.splitlines()[-1] == (
        "tools/nushell: npm could not install Nushell 0.1.0 (above)"
    )
    nushells.registry.unlink()
    newest = nushells.get("newest")
    assert (newest.returncode, newest.stdout) == (1, "")
    assert newest.stderr.startswith("tools/nushell: the newest Nushell can't be found out: ")
    assert not list((nushells.clone / ".cache/nu").glob("*.1.0*"))


# ---- The others --------------------------------------------------------------------------------


def test_pyprojects_requirements_are_read_as_toml_has_them() -> None:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    requirements = runpy.run_path(str(ROOT / "tools/environment.py"))["requirements"]
    for extra, wanted in project["optional-dependencies"].items():
        assert requirements(text, [extra]) == project["dependencies"] + wanted


def test_bench_runs_each_script_passes_options_on_and_sums_up(clone: Path) -> None:
    shutil.rmtree(clone / "bench", ignore_errors=True)
    (clone / "bench").mkdir()
    for name in ("one", "two"):
        (clone / f"bench/{name}.py").write_text(f"import sys, xs; print('{name}', sys.argv[1:])")
    (clone / "bench/_summary.py").write_text("import sys; print('all of', sys.argv[1:])")
    bench = clone / "tools/bench"
    (clone / "bench/out").mkdir()
    (clone / "bench/out/two.json").write_text("of an earlier run")
    whole = "== one\none []\n== two\ntwo []\nall of ['one', 'two']\n"
    assert run(bench).stdout == whole
    assert not (clone / "bench/out/two.json").exists()
    assert run(bench, "--short", "two").stdout == "== two\ntwo ['--short']\nall of ['two']\n"
    assert (clone / "bench/out").is_dir()


def test_bench_refuses_a_name_that_is_none(clone: Path) -> None:
    done = run(clone / "tools/bench", "nonsense")
    assert (done.returncode, done.stderr) == (2, "tools/bench: there is no bench/nonsense.py\n")


@pytest.mark.parametrize(
    "tool", ["xs", "pythons", "nushell", "test", "check", "bench", "../.ci/run"]
)
def test_a_tool_is_executable_and_its_shell_can_read_it(tool: str) -> None:
    path = ROOT / "tools" / tool
    assert os.access(path, os.X_OK)
    shell = path.read_text().splitlines()[0].split()[-1].split("/")[-1].lstrip("#!")
    assert run(shell, "-n", path).returncode == 0


@pytest.mark.parametrize("name", ["bench", "check", "fuzz", "powerloss", "profile", "soak"])
def test_a_tool_says_what_it_does_in_place_of_doing_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / name, tmp_path / "tools")  # alone: it has nothing to do it with
    for option in ("-h", "--help"):
        found = subprocess.run(
            [tmp_path / "tools" / name, option], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        lines = found.stdout.decode().splitlines()
        assert found.returncode == 0
        assert f"tools/{name}" in lines[0]
        assert not any(line.startswith(("#", "set ", "cd ", "folder=")) for line in lines)
    assert os.listdir(tmp_path) == ["tools"]


def test_what_is_no_option_of_the_bench_is_not_taken_for_one() -> None:
    found = subprocess.run([ROOT / "tools/bench", "--shrot", "append"], stderr=subprocess.PIPE)
    assert found.returncode == 2
    assert found.stderr == b"tools/bench: there is no --shrot: see tools/bench --help\n"


def test_the_bench_beside_peers_asks_xs_over_tcp(tmp_path: Path) -> None:
    """Whatever peers there are: it measures nothing where it can't do that."""
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("out"))
    (tmp_path / "bench/out").mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/xs").write_text(f'#!/bin/sh\nexec {shlex.join(XS)} "$@"\n')
    (tmp_path / "tools/xs").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "bench/peers.py", "--short"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        timeout=DEADLINE * 3,
    )
    assert (done.returncode, done.stderr) == (0, b""), done
    assert (tmp_path / "bench/out/peers.json").exists()
