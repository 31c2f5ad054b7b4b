"""Finding Nushell: where it is looked for, and what is said of one that can't be used."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from conftest import nu_path

from xs import nu
from xs.errors import NoNushell


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nu, "_good", {})


@pytest.fixture
def real() -> str:
    return nu_path()


@pytest.fixture
def path(real: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH; XS_NU is not set."""
    monkeypatch.delenv("XS_NU", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def make(folder: Path, script: str) -> str:
    """A `nu` in that folder, as a script of /bin/sh."""
    made = folder / "nu"
    made.write_text(f"#!/bin/sh\n{script}\n")
    made.chmod(0o755)
    return str(made)


def sentence() -> str:
    with pytest.raises(NoNushell) as found:
        nu.find()
    text = str(found.value)
    assert "\n" not in text
    return text


def test_it_is_found_on_the_path(path: Path, real: str) -> None:
    (path / "nu").symlink_to(real)
    assert nu.find() == str(path / "nu")


def test_xs_nu_comes_before_the_path(
    path: Path, real: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(path, "echo 0.1.0")
    monkeypatch.setenv("XS_NU", real)
    assert nu.find() == real


def test_an_empty_xs_nu_is_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XS_NU", "")
    where = make(path, "echo 0.109.1")
    assert nu.find() == where


def test_without_one_it_is_said_where_to_get_it_and_what_to_do_without(path: Path) -> None:
    text = sentence()
    assert text.startswith("Nushell is not installed: get it from https://www.nushell.sh")
    assert "0.109.1 or newer" in text and "#!" in text


def test_a_path_that_leads_nowhere_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XS_NU", "/no/such/nu")
    make(path, "echo 0.115.1")
    assert sentence() == "Nushell can't be run: /no/such/nu: No such file or directory"


@pytest.mark.parametrize("version", ["0.108.0", "0.109.0", "0.109", "0.9.9", "0.99.1"])
def test_one_that_is_too_old_is_refused(path: Path, version: str) -> None:
    where = make(path, f"echo {version}")
    assert sentence() == (
        f"Nushell {version} at {where} is too old: xs needs 0.109.1 or newer "
        "(its http commands know Unix sockets)"
    )


@pytest.mark.parametrize("version", ["0.109.1", "0.110.0", "0.115.1", "0.116.0-nightly.3", "1.0.0"])
def test_one_that_is_new_enough_is_taken(path: Path, version: str) -> None:
    where = make(path, f"echo {version}")
    assert nu.find() == where


@pytest.mark.parametrize(
    "script", ["echo nu shell", "", "exit 3", "echo '\\377'", "echo 1.x.3", "kill -9 $$"]
)
def test_what_is_not_nushell_is_refused(path: Path, script: str) -> None:
    where = make(path, script)
    assert sentence() == f"{where} is not Nushell, or can't be run"


def test_what_can_not_be_executed_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("no program")
    for place in (tmp_path / "text", tmp_path):
        monkeypatch.setenv("XS_NU", str(place))
        assert sentence() == f"{place} is not Nushell, or can't be run"


def test_one_that_never_answers_is_not_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nu, "_VERSION_SECONDS", 0.2)
    monkeypatch.setenv("PATH", f"{path}:{os.defpath}")
    where = make(path, "exec sleep 1000")
    assert sentence() == f"{where} is not Nushell, or can't be run"


def test_a_good_one_is_asked_once_and_anew_when_it_has_changed(path: Path) -> None:
    log = path / "asked"
    where = make(path, f"echo asked >>{log}; echo 0.115.1")
    threads = [threading.Thread(target=nu.find) for _ in range(3)]
    nu.find()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text().count("asked") == 1
    make(path, "echo 0.100.0")
    os.utime(where, ns=(1, 1))
    assert "too old" in sentence()


def test_a_problem_is_looked_at_again(path: Path) -> None:
    make(path, "echo oops")
    os.utime(path / "nu", ns=(1, 1))
    assert "not Nushell" in sentence()
    where = make(path, "echo 0.115.1")
    os.utime(where, ns=(1, 1))
    assert nu.find() == where


def test_each_script_has_a_mark_of_its_own() -> None:
    marks = {nu.script(b"1", "none").mark for _ in range(10)}
    marks |= {nu.handler(b"{|frame|}", stateful=False).mark for _ in range(10)}
    assert len(marks) == 20
    assert all(len(mark) == 32 for mark in marks)


def test_a_script_without_input_has_none() -> None:
    assert nu.script(b"1", "none").input_at is None
    assert nu.script(b"1", "bytes").input_at == nu.script(b"1", "frame").input_at == 3
