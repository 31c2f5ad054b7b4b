"""Completion scripts for shells, made from the command line's own table: `xs completion SHELL`."""

from __future__ import annotations

from xs import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from xs.arguments import Command

_BASH = """\
# bash completion for xs: source <(xs completion bash)
_xs() {
    local current="${COMP_WORDS[COMP_CWORD]}" words="" actions=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="@COMMANDS@ --help --version"
    else
        case "${COMP_WORDS[1]}" in
@CASES@
        esac
        case "$current" in
            -*) ;;
            *) words=""; if [ "$COMP_CWORD" -eq 2 ]; then words="$actions"; fi ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [ "${#COMPREPLY[@]}" -eq 0 ]; then COMPREPLY=($(compgen -f -- "$current")); fi
}
complete -o filenames -F _xs xs
"""

_ZSH = """\
#compdef xs
# zsh completion for xs: source <(xs completion zsh)
_xs() {
    if (( CURRENT == 2 )); then
        local -a commands=(
@COMMANDS@
        )
        _describe command commands
        return
    fi
    local name="${words[2]}"
    shift words
    (( CURRENT-- ))
    case "$name" in
@CASES@
    esac
}
if [ "${funcstack[1]}" = _xs ]; then _xs "$@"; else compdef _xs xs; fi
"""


def script(shell: str, commands: Sequence[Command]) -> str:
    """The script for `shell`. Raises `Usage` for one that isn't known."""
    if shell == "bash":
        return _bash(commands)
    if shell == "zsh":
        return _zsh(commands)
    if shell == "fish":
        return _fish(commands)
    raise errors.Usage(f"no completion for {shell!r}: use bash, zsh or fish")


def _flags(command: Command) -> list[str]:
    return [*(flag for option in command.options for flag in option.flags), "--help"]


_ACTIONS = {  # what may follow a command at once, besides paths and ids
    "completion": ("bash", "zsh", "fish"),
    "scru128": ("pack", "unpack"),
    "service": ("install", "status", "remove"),
    "store": ("add", "remove"),
    "token": ("add", "list", "remove"),
}


def _bash(commands: Sequence[Command]) -> str:
    cases = [
        f'            {c.name}) words="{" ".join(_flags(c))}" '
        f'actions="{" ".join(_ACTIONS.get(c.name, ()))}" ;;'
        for c in commands
    ]
    text = _BASH.replace("@COMMANDS@", " ".join(c.name for c in commands))
    return text.replace("@CASES@", "\n".join(cases))


def _zsh(commands: Sequence[Command]) -> str:
    names = [f"            {_zsh_quoted(c.name + ':' + c.summary)}" for c in commands]
    cases = []
    for command in commands:
        specs = ["'*:file:_files'", "'--help[show help]'"]
        if command.name in _ACTIONS:
            specs.append(f"'1:word:({' '.join(_ACTIONS[command.name])})'")
        for option in command.options:
            for flag in option.flags:
                many = "*" if option.is_repeated else ""
                text = option.help.replace("[", "(").replace("]", ")").replace(":", "\\:")
                value = f":{option.value}:" if option.value else ""
                specs.append(_zsh_quoted(f"{many}{flag}[{text}]{value}"))
        joined = " \\\n                ".join(specs)
        cases.append(f"        {command.name}) _arguments \\\n                {joined} ;;")
    text = _ZSH.replace("@COMMANDS@", "\n".join(names))
    return text.replace("@CASES@", "\n".join(cases))


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish(commands: Sequence[Command]) -> str:
    lines = [
        "# fish completion for xs: xs completion fish > ~/.config/fish/completions/xs.fish",
        "complete -c xs -n __fish_use_subcommand -l version -d 'print the version'",
    ]
    for command in commands:
        lines.append(
            f"complete -c xs -f -n __fish_use_subcommand -a {command.name} "
            f"-d {_fish_quoted(command.summary)}"
        )
        here = f"complete -c xs -n '__fish_seen_subcommand_from {command.name}'"
        if command.name in _ACTIONS:
            lines.append(f"{here} -f -a '{' '.join(_ACTIONS[command.name])}'")
        for option in command.options:
            spelled = " ".join(
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                for flag in option.flags
            )
            takes = " -r" if option.value else ""
            lines.append(f"{here} {spelled}{takes} -d {_fish_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
