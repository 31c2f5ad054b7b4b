"""The documents leave nothing out: commands, options, routes, limits, modules, tables."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from xs import api, cli, door, httpd, query, schema

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def section(title: str, document: str = PROTOCOL) -> str:
    """What stands under a heading of the second level."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", document, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found[1]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's tables, without heads."""
    lines = [line for line in section(title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_and_each_of_its_options_is_in_the_protocol(name: str) -> None:
    command = cli.COMMANDS[name]
    mine = [row for row in rows("Command line") if re.search(rf"`xs {name}\b(?!-)", row[0])]
    assert len(mine) == 1, name
    for option in command.options:
        for flag in option.flags:
            assert re.search(rf"`{flag}[ `]", mine[0][1]), f"xs {name} {flag}"
        if option.value:
            assert f" {option.value}`" in mine[0][1], f"xs {name} {flag} {option.value}"


def test_no_command_or_option_in_the_protocol_is_unknown() -> None:
    known = {flag for command in cli.COMMANDS.values() for o in command.options for flag in o.flags}
    for row in rows("Command line")[1:]:
        for name in re.findall(r"`xs ([a-z0-9-]+)", row[0]):
            assert name in cli.COMMANDS
        for flag in re.findall(r"`(--?[a-zA-Z-]+)", " ".join(row)):
            assert flag in known, flag


ROUTES = [
    f"{method} /{word}{rest}"
    for word, (alone, behind) in {**api._ROUTES, ":id": api._BY_ID_OR_TOPIC}.items()
    for handlers, rest in ((alone, ""), (behind, "/…"))
    for method in handlers
]


@pytest.mark.parametrize("route", ROUTES)
def test_each_route_is_in_the_protocol(route: str) -> None:
    # A part that varies is written `:id`, `:hash`, `:topic`.
    pattern = route.replace("/:id/…", "/:[a-z]+").replace("/…", "/:[a-z]+")
    documented = "\n".join(row[0] for row in rows("HTTP API"))
    assert re.search(f"`{pattern}`", documented), route


def test_no_route_in_the_protocol_is_unknown() -> None:
    for row in rows("HTTP API")[1:]:
        for method, path in re.findall(r"`([A-Z]+) (/[^`]*)`", row[0]):
            word, slash, _ = path[1:].partition("/")
            known = api._BY_ID_OR_TOPIC if word.startswith(":") else api._ROUTES[word]
            assert method in known[bool(slash) or word.startswith(":")], path


def test_each_parameter_of_a_read_is_in_the_protocol() -> None:
    documented = section("Query")
    for name in (*query.ReadOptions._fields, "from", "tail", "last-id"):
        if name in ("pulse", "patterns"):  # follow=<ms>, topic=
            continue
        assert re.search(rf"`{name.replace('_', '-')}[=`]", documented), name


UNITS = {
    "": 1, "bytes": 1, "KiB": 1024, "MiB": 1024 * 1024, "GiB": 1 << 30, "levels": 1,
    "characters": 1, "ms": 1, "s": 1, "days": 86_400,
}  # fmt: skip
LIMITS = rows("Limits")[1:]


@pytest.mark.parametrize("row", LIMITS, ids=lambda row: row[2].strip("`"))
def test_each_limit_in_the_protocol_is_in_the_code_with_that_value(row: list[str]) -> None:
    _, value, name, *_ = row
    module, *path = name.strip("`").split(".")
    found = importlib.import_module(f"xs.{module}")
    for part in path:
        found = getattr(found, part)
    number, _, unit = value.partition(" ")
    assert float(number.replace(",", "")) * UNITS[unit] == found


@pytest.mark.parametrize("module", [httpd, door], ids=lambda module: module.__name__)
def test_each_limit_of_a_server_is_in_the_protocol(module: ModuleType) -> None:
    documented = {row[2].strip("`") for row in LIMITS}
    for name in vars(module.Limits):
        if not name.startswith("_"):
            assert f"{module.__name__[3:]}.Limits.{name}" in documented


# Numbers that are named like limits and are none of a client's: of formats, and of waiting.
NO_LIMITS = {"ids.MAX_MS", "schema.ROW_MAX", "http1.HEAD_LIMIT", "runner.SELECT_SECONDS_MAX"}


def test_each_limit_in_the_code_is_in_the_protocol() -> None:
    documented = {row[2].strip("`") for row in LIMITS}
    for path in (ROOT / "xs").glob("*.py"):
        names = re.findall(r"^([A-Z_]+_(?:MAX|LIMIT)) = ", path.read_text("utf-8"), re.MULTILINE)
        for name in names:
            if not name.startswith("_") and f"{path.stem}.{name}" not in NO_LIMITS:
                assert f"{path.stem}.{name}" in documented


# What a client can make a server spend, and the limits of each.
SPENT = {
    "connections": "httpd.Limits.connections door.Limits.connections",
    "the size of a head": "httpd.Limits.head_bytes httpd.Limits.head_bytes_tcp "
    "door.Limits.head_bytes http1.FIELD_LIMIT http1.REQUEST_LINE_LIMIT framing.TRAILER_LIMIT",
    "the size of a body": "content.CONTENT_MAX door.Limits.body_bytes process.SCRIPT_BYTES",
    "the rate of a body": "door.Limits.body_seconds door.Limits.body_rate",
    "the time of a head": "httpd.Limits.head_seconds httpd.Limits.idle_seconds "
    "door.Limits.head_seconds door.Limits.idle_seconds door.Limits.handshake_seconds",
    "meta": "meta.META_MAX meta.META_DEPTH frame.KEY_MAX frame.TOPIC_MAX",
    "lines": "batch.EVERY_LINE batch.BATCH_LINES batch.BATCHES_AHEAD batch.ATOMIC_LINES "
    "batch.ATOMIC_BYTES",
    "patterns": "frame.PATTERNS_MAX query.PULSE_MIN",
    "what followers are behind": "bus.RING_FRAMES bus.RING_BYTES schema.FIRST_ROWS "
    "schema.PAGE_ROWS schema.PAGE_BYTES",
    "requests from the web that wait": "door.Limits.waiting door.Limits.answer_seconds",
    "answers that are not read": "httpd.Limits.answers_waiting door.Limits.written_bytes "
    "door.Limits.written_seconds answers.KEPT_FRAMES answers.KEPT_BYTES",
    "the output of scripts": "pipes.LINE_BYTES pipes.TAIL_BYTES generators.VALUE_BYTES "
    "handlers.AHEAD_FRAMES handlers.ERROR_CHARACTERS handlers.COMMIT_FRAMES",
    "processes": "scripts.EVALUATIONS_MAX scripts.SCRIPTS_MAX runner.START_SECONDS "
    "runner.RESTART_SECONDS handlers.DEATHS_MAX",
    "stores": "stores.STORES_MAX",
}


@pytest.mark.parametrize("resource", SPENT)
def test_what_a_client_can_make_a_server_spend_has_its_limits(resource: str) -> None:
    documented = {row[2].strip("`") for row in LIMITS}
    assert set(SPENT[resource].split()) <= documented


def test_each_module_is_in_the_architecture() -> None:
    documented = section("The modules", ARCHITECTURE)
    for path in (ROOT / "xs").glob("*.py"):
        if not path.stem.startswith("__"):
            assert f"| `{path.stem}` |" in documented, path.stem
    for name in re.findall(r"^\| `([a-z0-9]+)` \|", documented, re.MULTILINE):
        assert (ROOT / "xs" / f"{name}.py").exists(), name


def test_the_schema_in_the_architecture_is_the_one_of_the_code() -> None:
    (shown,) = re.findall(r"```sql\n(.*?)```", ARCHITECTURE, re.DOTALL)

    def tables(text: str) -> dict[str, str]:
        """Of a table that a later format makes anew, how that has it."""
        bare = " ".join(re.sub(r"--.*", "", text).split())
        statements = [each.strip() for each in bare.split(";")]
        return {each.split()[2]: each for each in statements if each.startswith("CREATE TABLE")}

    assert tables(shown) == tables(";\n".join(schema._MIGRATIONS))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_guide_says_how_to_get_completion(shell: str) -> None:
    assert f"xs completion {shell}" in section("Completion", GUIDE)


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_each_link_to_a_heading_leads_somewhere(path: Path) -> None:
    def anchors(document: Path) -> set[str]:
        heads = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^a-z0-9 _-]", "", head.lower()).replace(" ", "-") for head in heads}

    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text("utf-8")):
        if "://" not in target:
            document = path.parent / target if target else path
            assert anchor in anchors(document), f"{target}#{anchor}"


def test_each_message_in_the_guide_s_troubleshooting_is_one_of_the_program() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "xs").glob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", source)  # a sentence may be written in two strings
    messages = [
        line for line in section("Troubleshooting", GUIDE).splitlines() if line[:3] == "| `"
    ]
    assert len(messages) > 10
    for line in messages:
        for message in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
            for part in re.split(r"…|\bN\b|HOST:PORT|\b\d+\b|/sock", message):
                assert part.strip() in said, f"{message}: {part}"
