"""Write docs/results.md with its figures, and tables of README.md and docs/paper.md, from benchmarks/results alone.

.venv/bin/python docs/generate_results.py
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from parablock.report.curves import stroke, ticks

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "results.md"
README, PAPER = DOCS.parent / "README.md", DOCS / "paper.md"
MARKS = "<!-- docs/generate_results.py writes from here -->\n", "<!-- to here -->\n"
RESULTS = DOCS.parent / "benchmarks" / "results"

HEAD = """# Results

<!-- Written by docs/generate_results.py from benchmarks/results/*.json; a test fails when this page is stale. -->

Every table comes from a record in `benchmarks/results/`, and carries the command that makes it again. Losses, bytes
and seconds of the virtual clock are the same at every repetition on the same machine. ± is the standard deviation
over seeds, unless it says otherwise. A bar that is missed says so. What is measured on a toy says so in its first
line.
"""
WHAT = tomllib.loads((RESULTS.parent / "benchmarks.toml").read_text(encoding="utf-8"))["page"]
"""The records whose sections are on the page; the claims of its first table, by the three kinds of measures of
EdgeFlowerTune (arXiv 2605.08636), and those of the paper: record, bar there, words."""

Record = dict[str, Any]


def page(folder: Path = RESULTS) -> str:
    """Write the page from the records that are there."""
    found = records(folder)
    overview = ["## At a glance\n", *glance(found), "", missed(found), ""] if found else []
    return "\n".join([HEAD, *overview, *map(section, found.values())])


def readme(text: str, folder: Path = RESULTS) -> str:
    """Return the README with its table as the records have it."""
    found, page_of = records(folder), "docs/results.md"
    return between_marks(text, [*glance(found, page_of), "", missed(found, page_of)])


def paper(text: str, folder: Path = RESULTS) -> str:
    """Return the page on the paper, with what the records say of each of its claims."""
    found, rows = records(folder), []
    for made in WHAT["paper"]:
        figures = [
            f"{name}: {of_bar(found[record], bar)[0]} ([record](results.md#{anchor(found[record])}))"
            for name, record, bar in made["figures"]
            if record in found
        ]
        rows.append(
            [made["claim"], "<br>".join([*figures, *made.get("beside", [])]), made["setting"], made["unknown"]]
        )
    return between_marks(text, table(["the paper says", "we found", "our setting", "unknown in the paper"], rows))


def between_marks(text: str, lines: Sequence[str]) -> str:
    """Return a text with other lines between its marks."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return "".join([before, MARKS[0], *(f"{line}\n" for line in lines), MARKS[1], after])


def records(folder: Path) -> dict[str, Record]:
    """Read the records that are there, in the order of the page."""
    paths = {name: folder / f"{name}.json" for name in WHAT["order"]}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def section(found: Record) -> str:
    """Write the section that a record carries, which of its bars are met, and what makes it again."""
    made = found["section"]
    parts = [
        part
        if isinstance(part, str)
        else f"![{part['y']}]({part['figure']})"
        if "figure" in part
        else "\n".join(table(part["columns"], part["rows"]))
        for part in made["parts"]
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
    for measure, claims in WHAT["claims"].items():
        of_measure = [
            [
                f"[{made['claim']}]({page}#{anchor(found[made['record']])}){toy(found[made['record']])}",
                *of_bar(found[made["record"]], made["bar"]),
            ]
            for made in claims
            if made["record"] in found
        ]
        rows += [[f"**{measure}**", "", ""], *of_measure] if of_measure else []
    return table(["", "found", "asked for"], rows)


def toy(found: Record) -> str:
    """Return the mark of a claim whose record says that it was measured on a toy."""
    return ", a toy" * found["section"]["parts"][0].startswith(("A toy: ", "Toys: "))


def of_bar(found: Record, name: str) -> tuple[str, str]:
    """Return what was found for a bar of a record, and what is asked for."""
    bar = next(bar for bar in found["bars"] if bar["name"] == name)
    told = f"{bar['value']:.4g}" if bar["is_met"] else f"**{bar['value']:.4g}**, missed"
    return told, f"{'≤' if bar['at_most'] else '≥'} {bar['limit']:g}"


def missed(found: Mapping[str, Record], page: str = "") -> str:
    """Say how many bars there are on the page, and where some are missed."""
    bars = [(record, bar) for record in found.values() for bar in record["bars"]]
    num_missed = sum(not bar["is_met"] for _, bar in bars)
    links = dict.fromkeys(
        f"[{record['section']['title']}]({page}#{anchor(record)})" for record, bar in bars if not bar["is_met"]
    )
    where = f"In [{page}]({page})" if page else "On this page"
    return f"{where} are {len(bars)} bars; {num_missed} of them are missed, under {', '.join(links)}."


def anchor(found: Record) -> str:
    """Return the name by which the heading of a record's section is linked to."""
    return re.sub(r"[^\w\- ]", "", found["section"]["title"].lower()).replace(" ", "-")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Write a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def figures(folder: Path = RESULTS) -> dict[str, str]:
    """Draw the figures of the records: name of the file → SVG."""
    parts = [part for found in records(folder).values() for part in found["section"]["parts"]]
    return {part["figure"]: drawn(part) for part in parts if not isinstance(part, str) and "figure" in part}


def between(values: Iterable[float], *, is_linear: bool = True) -> tuple[Callable[[float], float], list[float]]:
    """Return where a value lies on an axis, from 0 to 1, and the round numbers to write at it.

    A linear axis begins at 0, unless all values are in the upper part of it; a logarithmic one has nothing at 0.
    """
    found = sorted(value for value in values if is_linear or value > 0)
    low, high = found[0], found[-1]
    if is_linear and low < high / 2:
        low = min(low, 0.0)
    if is_linear:
        low, high = (low - 0.05 * (high - low), high + 0.05 * (high - low)) if low > 0 else (low, high)
        low, high = (low, high) if high > low else (low - 1, high + 1)
        return lambda value: (value - low) / (high - low), ticks(low, high)
    low, high = low / 1.1, high * 1.1
    marks = [times * 10.0**power for power in range(floor(log10(low)), ceil(log10(high))) for times in (1, 2, 5)]
    whole = log10(high / low)
    return lambda value: log10(value / low) / whole, [mark for mark in marks if low <= mark <= high]


def drawn(made: Record) -> str:
    """Draw curves in panels, with their names below; places are logarithmic but where `linear` names the panel."""
    width, height, step = 430, 260, 500
    names = list(dict.fromkeys(name for curves in made["panels"].values() for name in curves))
    all_points = [point for curves in made["panels"].values() for curve in curves.values() for point in curve]
    up, heights = between(y for _, y in all_points)
    parts = [f'<text x="60" y="18">{escape(made["y"])}</text>']
    for number, (label, curves) in enumerate(made["panels"].items()):
        left, is_linear = 60 + number * step, label in made.get("linear", ())
        along, places = between((x for curve in curves.values() for x, _ in curve), is_linear=is_linear)
        parts.append(f'<rect x="{left}" y="30" width="{width}" height="{height}" fill="none" stroke="#aaa"/>')
        for place in places:
            x = left + width * along(place)
            parts.append(f'<text x="{x:.1f}" y="306" text-anchor="middle">{place:,g}</text>')
            parts.append(f'<line x1="{x:.1f}" y1="286" x2="{x:.1f}" y2="290" stroke="#aaa"/>')
        told = label if is_linear else f"{label} (logarithmic)"
        parts.append(f'<text x="{left + width / 2}" y="324" text-anchor="middle">{escape(told)}</text>')
        for at in heights:
            y = 30 + height * (1 - up(at))
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{at:,g}</text>')
        for name, curve in curves.items():
            spots = [
                f"{left + width * along(x):.1f},{30 + height * (1 - up(y)):.1f}"
                for x, y in curve
                if is_linear or x > 0
            ]
            line = stroke(names.index(name))
            parts.append(f'<polyline points="{" ".join(spots)}" fill="none" {line} stroke-width="2"/>')
    for number, name in enumerate(names):
        x, y = 60 + 240 * (number % 4), 350 + 20 * (number // 4)
        parts.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 18}" y2="{y - 4}" {stroke(number)} stroke-width="3"/>')
        parts.append(f'<text x="{x + 24}" y="{y}">{escape(name)}</text>')
    size = f"0 0 {60 + step * len(made['panels'])} {360 + 20 * ((len(names) - 1) // 4)}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif" font-size="12">'
    return f'{head}<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    for file, svg in figures().items():
        (DOCS / file).write_text(svg, encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    PAPER.write_text(paper(PAPER.read_text(encoding="utf-8")), encoding="utf-8")
