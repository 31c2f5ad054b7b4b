"""All that has a goal, in one table: what tools/bench ends with.

Reads what the named scripts have just written to bench/out, prints the rows that have a goal and
what was noted, and writes bench/out/all.json. What was measured in full is drawn into docs/plots.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from _measure import OUT, ROOT, Goal, line, row, rule
from _plot import Plot, svg

PLOTS = ROOT / "docs" / "plots"


def read(names: list[str]) -> list[dict[str, Any]]:
    """What the scripts found. One that failed has left nothing (tools/bench removes what was)."""
    paths = [OUT / f"{name}.json" for name in names]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def show(found: list[dict[str, Any]]) -> None:
    met = short = 0
    print("== all that has a goal\n")
    line("script", *("what", "measured", "floor", "ratio", "goal", ""))
    rule("script")
    for report in found:
        for entry in report["rows"]:
            goals = [Goal(**goal) for goal in entry["goals"]]
            if goals:
                line(report["name"], *row(entry))
                met += sum(goal.is_met for goal in goals)
                short += sum(not goal.is_met for goal in goals)
    for report in found:
        for note in report["notes"]:
            print(f"\n{report['name']}: {note}", end="")
    took = sum(report["seconds"] for report in found)
    form = " (short runs: a look, no result)" if any(report["short"] for report in found) else ""
    print(f"\n{met} goals met, {short} short; {took:.0f} s{form}")


def draw(found: list[dict[str, Any]]) -> None:
    for report in found:
        for name, fields in report["plots"].items():
            if not report["short"]:
                PLOTS.mkdir(exist_ok=True)
                (PLOTS / f"{name}.svg").write_text(svg(Plot(**fields)), encoding="utf-8")


def main() -> None:
    names = sys.argv[1:]
    found = read(names)
    show(found)
    draw(found)
    text = json.dumps(found, ensure_ascii=False, indent=1)
    (OUT / "all.json").write_text(text + "\n", encoding="utf-8")
    missing = set(names) - {report["name"] for report in found}
    if missing:
        print(f"without a result: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
