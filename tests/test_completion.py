"""Completion scripts, run by the shells that are here."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from xs import cli, completion, errors

pytestmark = pytest.mark.once

COMMANDS = list(cli.COMMANDS.values())
SHELLS = ["bash", "zsh", "fish"]


def complete(*words: str) -> list[str]:
    """What bash offers for the last of these words."""
    script = completion.script("bash", COMMANDS)
    quoted = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _xs; printf '%s\\n' "
    done = subprocess.run(
        ["bash", "--norc", "-c", script + ask + '"${COMPREPLY[@]}"'],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_every_option_is_in_the_script(shell):
    script = completion.script(shell, COMMANDS)
    for command in COMMANDS:
        assert command.name in script
        for option in command.options:
            for flag in option.flags:
                assert (flag if shell != "fish" else flag.lstrip("-")) in script


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_takes_the_script(shell):
    assert shutil.which(shell), f"{shell} is needed: tools/test installs it"
    script = completion.script(shell, COMMANDS)
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes_commands_options_and_paths(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path)
    assert complete("xs", "ap") == ["append"]
    assert set(cli.COMMANDS) <= set(complete("xs", ""))
    assert complete("xs", "cat", "--fo") == ["--follow"]
    assert "--meta" in complete("xs", "append", "./store", "--")
    assert "--meta" not in complete("xs", "cat", "./store", "--")
    assert complete("xs", "cat", "./st") == ["./store"]
    assert complete("xs", "completion", "") == ["bash", "zsh", "fish"]
    assert complete("xs", "completion", "--") == ["--help"]
    assert complete("xs", "token", "l") == ["list"]
    assert set(complete("xs", "store", "")) >= {"add", "remove"}


def test_a_shell_that_is_not_known_is_wrong_usage():
    with pytest.raises(errors.Usage, match="bash, zsh or fish"):
        completion.script("tcsh", COMMANDS)
