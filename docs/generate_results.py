"""Write docs/results.md, and a table of README.md, from the records in benchmarks/results and from nothing else.

.venv/bin/python docs/generate_results.py
"""

from __future__ import annotations

import json
import re
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
ORDER = (
    *("rate", "quality_t0", "quality_t0_families", "quality_t0_long", "quality_t0_cosine", "quality_gsm8k"),
    *("words", "words_alpha01", "methods", "ablations", "model_ablations", "formats", "overlap", "robust"),
    *("secure_aggregation", "kill_resume", "kill_sites", "soak", "soak_drops", "cut_link", "fuzz", "fuzz_guided"),
    *("slow_link", "scale", "peers", "step", "wire", "flower"),
)
"""The records whose sections are on the page."""
T0_TIME, T0_LOSS = (
    "t0, shuffled: seconds to FL-BCD's last loss, mean ratio",
    "t0, shuffled: loss of ParaBlock / FL-BCD",
)
CLAIMS = (
    ("quality_t0", f"{T0_LOSS}, means", "final loss on T0, ParaBlock / FL-BCD, equal rounds"),
    ("quality_t0_cosine", T0_TIME, "seconds to FL-BCD's final loss on T0, a decaying rate, ParaBlock / FL-BCD"),
    (
        "words",
        "α 0.3: seconds to FL-BCD's last loss, mean ratio",
        "seconds to FL-BCD's final loss on word problems, ParaBlock / FL-BCD",
    ),
    ("rate", "|slope of ParaBlock − slope of FL-BCD|", "the convergence rate: slopes of both, difference"),
    (
        "formats",
        "final loss of int4 / float32, means of 3 seeds",
        "final loss with int4 / with float32 on the wire",
    ),
    ("wire", "int4 bytes / float32 bytes", "bytes of int4 / float32"),
    (
        "peers",
        "seconds to the loss, ParaBlock int4 / FedAvg",
        "seconds to a loss at 10 Mbit/s, ParaBlock with int4 / Flower's FedAvg",
    ),
    ("flower", "covered: round / compute at delay 1", "over real Flower, a round / its computation"),
    (
        "flower",
        "exchange = compute: delay 1 / delay 0",
        "where an exchange takes as long as the computation, ParaBlock / FL-BCD",
    ),
    (
        "flower",
        "an exchange / its time on the wire, one SuperNode a site",
        "an exchange through Flower / its time on the wire",
    ),
    ("step", "block / full step, tiny-base", "a training step of a block / of the whole model"),
    (
        "kill_resume",
        "killed runs that end with the undisturbed model",
        "of 50 killed runs, those that end with the same model",
    ),
    (
        "kill_sites",
        "of them in runs that end with the undisturbed model",
        "of 12 kills of a deployment's parts, likewise",
    ),
    (
        "cut_link",
        "bytes sent again down for a cut / chunk",
        "sent again after a cut of 20 s, in chunks of 4 MiB",
    ),
    (
        "soak_drops",
        "final loss with 30 % dropping / undisturbed, means",
        "final loss where clients drop 30 % of rounds / undisturbed",
    ),
)
"""The record of a claim of the first table, its bar there, and the claim."""

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
    paths = {name: folder / f"{name}.json" for name in ORDER}
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
    for name, bar_name, claim in CLAIMS:
        if name in found:
            bar = next(bar for bar in found[name]["bars"] if bar["name"] == bar_name)
            asked = f"{'≤' if bar['at_most'] else '≥'} {bar['limit']:g}"
            told = f"{bar['value']:.4g}" if bar["is_met"] else f"**{bar['value']:.4g}**, missed"
            rows.append([f"[{claim}]({page}#{anchor(found[name])})", told, asked])
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
