"""Write docs/results.md, and a table of README.md, from the records in benchmarks/results and from nothing else.

.venv/bin/python docs/generate_results.py
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "results.md"
README = DOCS.parent / "README.md"
MARKS = "<!-- docs/generate_results.py writes from here -->\n", "<!-- to here -->\n"
RESULTS = DOCS.parent / "benchmarks" / "results"

HEAD = """# Results

<!-- Written by docs/generate_results.py from benchmarks/results/*.json; a test fails when this page is stale. -->

Every table comes from a record in `benchmarks/results/`, and carries the command that makes it again. Losses, bytes
and seconds of the virtual clock are the same at every repetition on the same machine. ± is the standard deviation
over seeds, unless it says otherwise. A bar that is missed says so.
"""
WHAT = tomllib.loads((RESULTS.parent / "benchmarks.toml").read_text(encoding="utf-8"))["page"]
"""The records whose sections are on the page, and the claims of its first table: record, bar there, words."""

Record = dict[str, Any]


def page(folder: Path = RESULTS) -> str:
    """Write the page from the records that are there."""
    found = records(folder)
    overview = ["## At a glance\n", *glance(found), "", missed(found), ""] if found else []
    return "\n".join([HEAD, *overview, *map(section, found.values())])


def readme(text: str, folder: Path = RESULTS) -> str:
    """Return the README with its table as the records have it."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    made = "\n".join([*glance(records(folder), "docs/results.md"), ""])
    return f"{before}{MARKS[0]}{made}{MARKS[1]}{after}"


def records(folder: Path) -> dict[str, Record]:
    """Read the records that are there, in the order of the page."""
    paths = {name: folder / f"{name}.json" for name in WHAT["order"]}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def section(found: Record) -> str:
    """Write the section that a record carries, which of its bars are met, and what makes it again."""
    made = found["section"]
    parts = [
        part if isinstance(part, str) else "\n".join(table(part["columns"], part["rows"])) for part in made["parts"]
    ]
    bars = [
        f"- {bar['name']}: {bar['value']:.4g}, {'at most' if bar['at_most'] else 'at least'} {bar['limit']:g}: "
        f"{'met' if bar['is_met'] else '**missed**'}"
        for bar in found["bars"]
    ]
    machine, command = found["machine"], found["command"].partition(" --output")[0]
    where = f"{machine['processor']}, {machine['cores']} cores, torch {found['versions']['torch']}"
    foot = f"`{command}` ({where}; commit {found['commit'][:10]})\n"
    return "\n\n".join([f"## {made['title']}", *parts, *(["\n".join(bars)] if bars else []), foot])


def glance(found: Mapping[str, Record], page: str = "") -> list[str]:
    """Write the first table, of the claims whose records are there, with links to the sections of a page."""
    rows = []
    for made in WHAT["claims"]:
        if (name := made["record"]) in found:
            bar = next(bar for bar in found[name]["bars"] if bar["name"] == made["bar"])
            asked = f"{'≤' if bar['at_most'] else '≥'} {bar['limit']:g}"
            told = f"{bar['value']:.4g}" if bar["is_met"] else f"**{bar['value']:.4g}**, missed"
            rows.append([f"[{made['claim']}]({page}#{anchor(found[name])})", told, asked])
    return table(["", "found", "asked for"], rows)


def missed(found: Mapping[str, Record]) -> str:
    """Say how many bars there are, and where some are missed."""
    bars = [(record, bar) for record in found.values() for bar in record["bars"]]
    num_missed = sum(not bar["is_met"] for _, bar in bars)
    links = dict.fromkeys(
        f"[{record['section']['title']}](#{anchor(record)})" for record, bar in bars if not bar["is_met"]
    )
    return f"On this page are {len(bars)} bars; {num_missed} of them are missed, under {', '.join(links)}."


def anchor(found: Record) -> str:
    """Return the name by which the heading of a record's section is linked to."""
    return re.sub(r"[^\w\- ]", "", found["section"]["title"].lower()).replace(" ", "-")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Write a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
