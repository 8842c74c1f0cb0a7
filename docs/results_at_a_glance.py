"""The first table of docs/results.md and the one of the README: what is claimed, and what was found.

Used by docs/generate_results.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from results_of_speed import Record, table

Claim = tuple[str, str, str]
"""What is claimed, the record that tells, and its bar there."""

CLAIMS: tuple[Claim, ...] = (
    (
        "final loss on T0, ParaBlock / FL-BCD, equal rounds",
        "quality_t0",
        "t0, shuffled: loss of ParaBlock / FL-BCD, means",
    ),
    (
        "seconds to FL-BCD's final loss on T0, a decaying rate, ParaBlock / FL-BCD",
        "quality_t0_cosine",
        "t0, shuffled: seconds to FL-BCD's last loss, mean ratio",
    ),
    (
        "seconds to FL-BCD's final loss on word problems, ParaBlock / FL-BCD",
        "words",
        "α 0.3: seconds to FL-BCD's last loss, mean ratio",
    ),
    ("the convergence rate: slopes of both, difference", "rate", "|slope of ParaBlock − slope of FL-BCD|"),
    (
        "final loss with int4 / with float32 on the wire",
        "formats",
        "final loss of int4 / float32, means of 3 seeds",
    ),
    ("bytes of int4 / float32", "wire", "int4 bytes / float32 bytes"),
    (
        "seconds to a loss at 10 Mbit/s, ParaBlock with int4 / Flower's FedAvg",
        "peers",
        "seconds to the loss, ParaBlock int4 / FedAvg",
    ),
    ("over real Flower, a round / its computation", "flower", "covered: round / compute at delay 1"),
    (
        "where an exchange takes as long as the computation, ParaBlock / FL-BCD",
        "flower",
        "exchange = compute: delay 1 / delay 0",
    ),
    (
        "an exchange through Flower / its time on the wire",
        "flower",
        "an exchange / its time on the wire, one SuperNode a site",
    ),
    ("a training step of a block / of the whole model", "step", "block / full step, tiny-base"),
    (
        "of 50 killed runs, those that end with the same model",
        "kill_resume",
        "killed runs that end with the undisturbed model",
    ),
    (
        "of 12 kills of a deployment's parts, likewise",
        "kill_sites",
        "of them in runs that end with the undisturbed model",
    ),
    ("sent again after a cut of 20 s, in chunks of 4 MiB", "cut_link", "bytes sent again down for a cut / chunk"),
    (
        "final loss where clients drop 30 % of rounds / undisturbed",
        "soak_drops",
        "final loss with 30 % dropping / undisturbed, means",
    ),
)


def glance(records: Mapping[str, Record], headings: Mapping[str, str], page: str = "") -> list[str]:
    """Write the table; the claims whose record is not there are left out.

    Args:
        records: By name.
        headings: Of the section of each record.
        page: Where the sections are, for links from another page.

    Raises:
        StopIteration: A record lacks the bar of a claim.
    """
    rows = []
    for claim, name, bar_name in CLAIMS:
        if name in records:
            bar = next(bar for bar in records[name]["bars"] if bar["name"] == bar_name)
            asked = f"{'≤' if bar['at_most'] else '≥'} {bar['limit']:g}"
            told = f"{bar['value']:.4g}" if bar["is_met"] else f"**{bar['value']:.4g}**, missed"
            rows.append([f"[{claim}]({page}#{anchor(headings[name])})", told, asked])
    return table(["", "found", "asked for"], rows)


def missed(records: Mapping[str, Record], headings: Mapping[str, str]) -> str:
    """Say how many bars there are, and where some are missed."""
    bars = [(name, bar) for name in headings for bar in records[name]["bars"]]
    places = dict.fromkeys(name for name, bar in bars if not bar["is_met"])
    links = ", ".join(f"[{headings[name]}](#{anchor(headings[name])})" for name in places)
    num_missed = sum(not bar["is_met"] for _, bar in bars)
    return f"On this page are {len(bars)} bars; {num_missed} of them are missed, under {links}."


def anchor(heading: str) -> str:
    """Give the name by which a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
