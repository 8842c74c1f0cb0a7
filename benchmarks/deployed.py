"""What rounds over Flower cost while blocks travelled inside its messages: the record alone.

.venv/bin/python benchmarks/deployed.py flower --section-only
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from statistics import median
from typing import Any

import _record as kit
from _record import Bar, Found, Options, benchmarks, main, section, table, table_of

SITES, ROUNDS, REPEATS, MBPS, MEGABYTES, LARGE_MEGABYTES = 2, 6, 3, 200.0, 100.0, 400.0
OUTAGE_S, SLOW_MBPS, LAYER_MB, PATIENCE_S = 60.0, 4.0, 116.0, 3600.0
"""An outage, a slow link, a layer of Llama-3-8B in int4, and how long a run may take."""

WIRE_S = 2 * MEGABYTES * 8 / MBPS
"""The seconds that a block takes on the wire, up and down."""

DISTURBANCES = ("nothing", f"an outage of {OUTAGE_S:g} s", "an answer lost")
EQUAL, LONG, BALANCED, HOSPITAL = "wire = compute", "covered", "exchange = compute", "30 Mbit/s"
Row = Found


def flower(options: Options) -> None:
    """Show rounds over Flower as they were while blocks travelled inside its messages; nothing is measured anew."""
    del options
    sys.exit("blocks do not travel inside Flower's messages any more; the record is of the time when they did")


# -- what was found
def of(rows: list[Row], scenario: str, **wanted: Any) -> list[Row]:
    return [row for row in rows if row["scenario"] == scenario and all(row[k] == v for k, v in wanted.items())]


def round_s(rows: list[Row], scenario: str, **wanted: Any) -> float:
    """Return the median round, over the repeats of a scenario; a ValueError where it is not on record."""
    return median(seconds for row in of(rows, scenario, **wanted) for seconds in row["rounds"])


def bars_of(rows: list[Row]) -> list[Bar]:
    """Return the bars of what has been measured."""
    made = list[Bar]()

    def add(name: str, limit: float, value: Callable[[], float]) -> None:
        with suppress(ValueError):  # not all of it has been measured
            made.append(Bar(name, float(value()), limit))

    def at(scenario: str, delay: int, *supernodes: int) -> float:
        for many in supernodes or (2, 1):  # of one SuperNode where two are not on record
            with suppress(ValueError):
                return round_s(rows, scenario, delay=delay, secure=True, supernodes=many)
        raise ValueError(scenario)

    def faster(scenario: str, *supernodes: int) -> float:
        return at(scenario, 1, *supernodes) / at(scenario, 0, *supernodes)

    def balanced() -> float:
        compute_s = max(row["compute_s"] for row in of(rows, BALANCED))
        return at(BALANCED, 1) / max(compute_s, at(BALANCED, 0) - compute_s)

    warm, cold = (partial(round_s, rows, "empty", warm=is_warm) for is_warm in (True, False))
    add("seconds of an empty exchange", 5.0, warm)
    name = "an empty exchange: a forked ClientApp / one that starts from nothing"
    add(name, 0.85, lambda: warm() / cold())
    for many, which in ((2, "two SuperNodes a site"), (1, "one SuperNode a site")):
        add(f"wire = compute, {which}: delay 1 / delay 0", 0.65, partial(faster, EQUAL, many))
        name = f"an exchange / its time on the wire, {which}"
        add(name, 1.6, lambda many=many: (at(EQUAL, 0, many) - WIRE_S) / WIRE_S)
    add("covered: round / compute at delay 1", 1.06, lambda: at(LONG, 1) / (2.5 * WIRE_S))
    add("covered: delay 1 / delay 0", 0.60, partial(faster, LONG))
    add("exchange = compute: round at delay 1 / max(compute, exchange through Flower)", 1.05, balanced)
    add("exchange = compute: delay 1 / delay 0", 0.60, partial(faster, BALANCED))
    name = "30 Mbit/s, delay 1: a round with two SuperNodes a site / with one"
    add(name, 0.75, lambda: at(HOSPITAL, 1, 2) / at(HOSPITAL, 1, 1))
    add("TLS and node keys / insecure, in turn", 1.10, partial(tls, rows))
    for way in ("up", "down"):
        add(f"slow link, {way}: bytes sent again / a part", 1.0, partial(again, rows, way))
    for role, limit in (("ServerApp", 4.0), ("ClientApp", 3.0)):
        peaks = [row["peak_bytes"][role] / (row["megabytes"] * 1e6) for row in of(rows, "memory")]
        add(f"peak memory of the {role}, in blocks", limit, partial(max, peaks))
    return made


def tls(rows: list[Row]) -> float:
    """Return the median round with TLS and keys over that without, of the repeats that have both."""
    insecure = of(rows, EQUAL, delay=1, secure=False)
    beside = {(row["repeat"], row["supernodes"]) for row in insecure}
    secure = [r for r in of(rows, EQUAL, delay=1, secure=True) if (r["repeat"], r["supernodes"]) in beside]
    with_it, without = (median(s for row in found for s in row["rounds"]) for found in (secure, insecure))
    return with_it / without


def again(rows: list[Row], direction: str) -> float:
    """Return the most that a disturbance made be sent again, in parts."""
    found = {row["disturbance"]: row for row in of(rows, f"slow link, {direction}")}
    plain = found.pop(DISTURBANCES[0], None)
    if plain is None or not all(row["happened"] for row in found.values()):
        raise ValueError("there was nothing to send again")
    return max((row["wire_bytes"] - plain["wire_bytes"]) / row["part_bytes"] for row in found.values())


def flower_section(found: Found) -> Found:
    rows: list[Row] = found["results"]
    said, slow_rows, memories = (
        kit.ABOUT["flower"],
        [row for row in rows if row.get("disturbance")],
        of(rows, "memory"),
    )
    parts = [
        said["covered"],
        rounds_table([row for row in rows if row["scenario"] != "memory" and "rounds" in row]),
    ]
    if chains := [row for row in rows if row["scenario"] in ("empty", EQUAL) and row.get("chain")]:
        parts += ["Where each second of a round goes, at delay 0:", chain_table(chains)]
    if slow_rows:
        told = [row | {f"mega_{key}": row[key] / 1e6 for key in ("wire_bytes", "part_bytes")} for row in slow_rows]
        parts += [said["slow"].format(**slow_rows[0]), table_of(told, said["slow_columns"])]
    if memories:
        heads = [f"{row['sites']} sites, {row['megabytes']:g} MB: GB (blocks)" for row in memories]
        size, peaks_of_rows = memories[0]["megabytes"] * 1e6, [row["peak_bytes"] for row in memories]
        lines = [
            [role, *(f"{peaks[role] / 1e9:.2f} ({peaks[role] / size:.1f})" for peaks in peaks_of_rows)]
            for role in sorted(memories[0]["peak_bytes"])
        ]
        parts += ["Most memory of a process, by sites and size of a block:", table(["process", *heads], lines)]
    commits = ", ".join(dict.fromkeys(row["commit"][:10] for row in rows))
    return section("flower", found, *parts, f"The rows are of commit {commits}.")


def rounds_table(rows: list[Row]) -> Found:
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        way = f"{row['scenario']}: delay {row['delay']}{'' if row['secure'] else ', without TLS'}"
        way += (", one SuperNode" if row["supernodes"] == 1 else "") + ("" if row["warm"] else COLD)
        groups[way, row["megabytes"], row["compute_s"]] += row["rounds"]
    lines = [
        {"way": way, "mega": mega, "compute_s": compute_s, "rounds": len(found), "least": min(found)}
        | {"most": max(found), "median": median(found), "exchange_s": median(found) - compute_s}
        for (way, mega, compute_s), found in groups.items()
    ]
    return table_of(lines, kit.ABOUT["flower"]["columns"])


COLD = ", ClientApps from nothing"


def chain_table(rows: list[Row]) -> Found:
    groups: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for row in rows:
        which = ("one SuperNode" if row["supernodes"] == 1 else "two SuperNodes") + ("" if row["warm"] else COLD)
        groups[f"{row['scenario']}, {which}"].append(row["chain"])
    columns = [{name: median(chain[name] for chain in found) for name in found[0]} for found in groups.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    lines = [[name, *(f"{column[name]:.2f}" if name in column else "" for column in columns)] for name in names]
    return table(["", *groups], lines)


BENCHMARKS = benchmarks(globals())

if __name__ == "__main__":
    main(__doc__, BENCHMARKS)
