"""What Flower's chain costs, and how much of it ParaBlock hides: real SuperLink, SuperNodes and trainers.

Each site stands in a network namespace of its own, behind a link that `tc tbf` shapes in both directions; what
trains only takes time (a sleep), so that two cores can hold everything. "Exchange" is everything that is not
computation: Flower's polls, processes and copies, and the bytes. The wire alone is computed from the link.
Scenarios that are named with --only are measured anew; the rows of the others stay in the record.

Needs root, `ip` and `tc`, and the extra `flower`.

    .venv/bin/python benchmarks/flower.py
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from _flower_chain import chain_of
from _flower_deployment import Deployment, Wanted, python_path
from _record import REPOSITORY, Bar, commit, fresh_folder, make_console, make_parser, record, table
from rich.console import Console

EMPTY_MB = 0.004
SLOW_MBPS, LAYER_MB = 4.0, 116.0
"""A slow link, and a layer of Llama-3-8B in int4."""

HOSPITAL_MBPS, HOSPITAL_MB = 30.0, 40.0
OUTAGE_S = 60.0
DISTURBANCES = ("nothing", f"an outage of {OUTAGE_S:g} s", "an answer lost")
Row = dict[str, Any]
Scenario = Callable[[argparse.Namespace, Path, list[Row]], Iterator[Row]]


def main() -> None:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # take everything down
    os.environ["PYTHONPATH"] = python_path(REPOSITORY / "benchmarks", REPOSITORY / "src")  # Flower looks there
    console, folder = make_console(), fresh_folder(options)
    rows = [row for row in recorded(Path(options.output)) if row["scenario"] not in options.only]
    for scenario in options.only:
        for row in SCENARIOS[scenario](options, folder / scenario.replace(" ", "-"), rows):
            rows.append({"scenario": scenario, **row, "commit": commit()})
            console.print(f"{scenario}: {told(row)}")
            write(options, rows, Console(quiet=True))
    for shown in (rounds_table, chain_table, slow_table, memory_table):
        console.print(shown(rows))
    write(options, rows, console)


def recorded(path: Path) -> list[Row]:
    """Read the rows that are on record."""
    if not path.exists():
        return []
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return [{"supernodes": 1, "warm": False, **row} for row in rows]  # as it was before it was asked for


def write(options: argparse.Namespace, rows: list[Row], console: Console) -> None:
    config = {name: getattr(options, name) for name in ("mbps", "megabytes", "sites")}
    record(options, rows, bars(rows, options), config=config, console=console)


def told(row: Row) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, int | float))


# ── scenarios ───────────────────────────────────────────────────────────────────────────────────────


def empty(options: argparse.Namespace, folder: Path, rows: list[Row]) -> Iterator[Row]:
    """A block of a few bytes: what an exchange costs whatever it carries, also with ClientApps from nothing."""
    del rows
    wanted = replace(usual(options), megabytes=EMPTY_MB, rounds=3 if options.smoke else 10, supernodes=1)
    for warm in (True, False):
        yield timed(folder / ("warm" if warm else "cold"), replace(wanted, warm=warm))


def wire_is_compute(options: argparse.Namespace, folder: Path, rows: list[Row]) -> Iterator[Row]:
    """Computation as long as the bytes are on the wire: delay 0 and 1 in turn, with one SuperNode a site.

    In between delay 1 without TLS and keys, and once both delays with two SuperNodes.
    """
    del rows
    wanted = replace(usual(options), compute_s=wire_s(options), supernodes=1)
    overlapped = replace(wanted, delay=1, rounds=wanted.rounds + 1)
    for repeat in range(options.repeats):
        beside = [replace(overlapped, secure=False)] if repeat % 2 == 0 else []
        two = [replace(each, supernodes=2) for each in (wanted, overlapped)] if repeat == 0 else []
        for place, variant in enumerate([wanted, overlapped, *beside, *two]):
            yield {"repeat": repeat, **timed(folder / f"{repeat}-{place}", variant)}


def covered(options: argparse.Namespace, folder: Path, rows: list[Row]) -> Iterator[Row]:
    """Computation that is longer than an exchange through Flower."""
    del rows
    wanted = replace(usual(options), compute_s=2.5 * wire_s(options))
    for delay in (0, 1):
        yield timed(folder / f"{delay}", replace(wanted, delay=delay, rounds=wanted.rounds + delay))


def hospital(options: argparse.Namespace, folder: Path, rows: list[Row]) -> Iterator[Row]:
    """A link of 30 Mbit/s both ways: one SuperNode a site, and two."""
    del rows
    slower = {"megabytes": HOSPITAL_MB, "up_mbps": HOSPITAL_MBPS, "down_mbps": HOSPITAL_MBPS}
    wanted = replace(usual(options), **slower, compute_s=8.0, delay=1, rounds=options.rounds + 1)
    for supernodes in (1, 2):
        yield timed(folder / f"{supernodes}", replace(wanted, supernodes=supernodes))


def exchange_is_compute(options: argparse.Namespace, folder: Path, rows: list[Row]) -> Iterator[Row]:
    """Computation as long as an exchange through Flower was, where the wire took as long as the computation."""
    serial = round_s(rows, "wire = compute", delay=0, supernodes=options.supernodes)
    compute_s = serial - wire_s(options) if serial else 1.5 * wire_s(options)
    for delay in (0, 1):
        wanted = replace(usual(options), compute_s=round(compute_s, 1), delay=delay)
        yield timed(folder / f"{delay}", replace(wanted, rounds=wanted.rounds + delay))


def slow(direction: str) -> Scenario:
    """Make the scenario of a link that is slow in one direction, left alone and disturbed, side by side."""

    def measure(options: argparse.Namespace, folder: Path, rows: list[Row]) -> Iterator[Row]:
        del rows
        speed = {f"{direction}_mbps": SLOW_MBPS}
        wanted = Wanted(4.0 if options.smoke else LAYER_MB, rounds=1, sites=1, blocks=1, **speed)

        def run(lane: int) -> Row:
            variant = replace(
                wanted, lane=lane + (1 if direction == "up" else 4), swallows=DISTURBANCES[lane] == DISTURBANCES[2]
            )
            return disturbed(folder / f"{lane}", variant, direction, DISTURBANCES[lane])

        with ThreadPoolExecutor(len(DISTURBANCES)) as pool:
            yield from pool.map(run, range(len(DISTURBANCES)))

    return measure


def memory(options: argparse.Namespace, folder: Path, rows: list[Row]) -> Iterator[Row]:
    """Large blocks, on links as fast as this machine."""
    del rows
    mega = 8.0 if options.smoke else options.large_megabytes
    for sites in (2, 4):
        yield timed(folder / f"{sites}", Wanted(mega, rounds=2, sites=sites, blocks=1, up_mbps=0, down_mbps=0))


SCENARIOS: dict[str, Scenario] = {
    "empty": empty,
    "wire = compute": wire_is_compute,
    "covered": covered,
    "exchange = compute": exchange_is_compute,
    "30 Mbit/s": hospital,
    "slow link, up": slow("up"),
    "slow link, down": slow("down"),
    "memory": memory,
}


def usual(options: argparse.Namespace) -> Wanted:
    return Wanted(
        options.megabytes,
        rounds=options.rounds,
        sites=options.sites,
        chunk_mib=options.chunk_mib,
        up_mbps=options.mbps,
        down_mbps=options.mbps,
        supernodes=options.supernodes,
    )


def wire_s(options: argparse.Namespace) -> float:
    """Seconds that a block takes on the wire, up and down."""
    return float(2 * options.megabytes * 8 / options.mbps)


def timed(folder: Path, wanted: Wanted) -> Row:
    """Run the rounds; give how long each took, where each second went, and who used memory.

    Without the first two, in which the server learns how fast the link is and how large an update.
    """
    with ExitStack() as stack:
        deployment = Deployment(stack, folder, wanted)
        result = deployment.result()
    between = [after - before for before, after in pairwise(result["commits"])]
    steady = between[2 : len(between) - wanted.delay] or between  # at the end nothing is left to overlap with
    chain = {} if wanted.delay else chain_of(result)
    figures = {"round_s": statistics.median(steady) if steady else 0.0, "rounds": steady}
    return {**asdict(wanted), **figures, "chain": chain, "peak_bytes": deployment.peaks}


def disturbed(folder: Path, wanted: Wanted, direction: str, disturbance: str) -> Row:
    """Run one round and disturb it when half of the block has passed; give what the slow direction moved."""
    done = [disturbance == DISTURBANCES[0]]
    place = ("up", "down").index(direction)

    def disturb(deployment: Deployment) -> None:
        if done[0] or deployment.links[0].moved()[place] < wanted.megabytes * 5e5:
            return
        done[0] = True
        if deployment.swallower is not None:
            deployment.swallower.swallow_next(direction)
        else:
            deployment.links[0].cut(OUTAGE_S)

    with ExitStack() as stack:
        deployment = Deployment(stack, folder, wanted)
        result = deployment.result(disturb)
        moved = deployment.links[0].moved()[place]
        happened = done[0] and (deployment.swallower is None or deployment.swallower.swallowed == 1)
    activity = {"up": "uploading", "down": "downloading"}[direction]
    parts = [facts["payload_bytes"] for _, name, _, _, facts in result["spans"] if name == activity]
    begin, end = (pick(result["spans"], key=lambda s: s[2]) for pick in (min, max))
    return {
        "direction": direction,
        "disturbance": disturbance,
        "happened": happened,
        "megabytes": wanted.megabytes,
        "mbps": SLOW_MBPS,
        "seconds": end[2] + end[3] - begin[2],
        "wire_bytes": moved,
        "part_bytes": max(parts),
        "parts": len(parts),
    }


# ── what was found ──────────────────────────────────────────────────────────────────────────────────


def of(rows: Iterable[Row], scenario: str, **wanted: Any) -> list[Row]:
    return [row for row in rows if row["scenario"] == scenario and all(row[k] == v for k, v in wanted.items())]


def round_s(rows: Iterable[Row], scenario: str, **wanted: Any) -> float | None:
    """Give the median round, over the repeats of a scenario."""
    found = [seconds for row in of(rows, scenario, **wanted) for seconds in row["rounds"]]
    return statistics.median(found) if found else None


def bars(rows: list[Row], options: argparse.Namespace) -> list[Bar]:
    wire, made = wire_s(options), list[Bar]()

    def add(name: str, limit: float, value: Callable[[], float]) -> None:
        try:
            made.append(Bar(name, float(value()), limit))
        except (TypeError, ValueError):  # not all of it has been measured
            return

    def median(scenario: str, delay: int) -> Any:
        found = (round_s(rows, scenario, delay=delay, secure=True, supernodes=many) for many in (2, 1))
        return next((seconds for seconds in found if seconds), None)  # of one SuperNode where two are not on record

    equal, long, balanced = "wire = compute", "covered", "exchange = compute"
    warm, cold = (round_s(rows, "empty", warm=warm) for warm in (True, False))
    add("seconds of an empty exchange", 5.0, lambda: warm or cold)
    add("an empty exchange: a forked ClientApp / one that starts from nothing", 0.85, lambda: warm / cold)
    for many, which in ((2, "two SuperNodes"), (1, "one SuperNode")):
        at = {delay: round_s(rows, equal, delay=delay, secure=True, supernodes=many) for delay in (0, 1)}
        add(f"wire = compute, {which} a site: delay 1 / delay 0", 0.65, lambda at=at: at[1] / at[0])
        add(f"an exchange / its time on the wire, {which} a site", 1.6, lambda at=at: (at[0] - wire) / wire)
    add("covered: round / compute at delay 1", 1.06, lambda: median(long, 1) / (2.5 * wire))
    add("covered: delay 1 / delay 0", 0.60, lambda: median(long, 1) / median(long, 0))
    compute = max((row["compute_s"] for row in of(rows, balanced)), default=0.0)
    add(
        "exchange = compute: round at delay 1 / max(compute, exchange through Flower)",
        1.05,
        lambda: median(balanced, 1) / max(compute, median(balanced, 0) - compute),
    )
    add("exchange = compute: delay 1 / delay 0", 0.60, lambda: median(balanced, 1) / median(balanced, 0))
    one, two = (round_s(rows, "30 Mbit/s", supernodes=supernodes) for supernodes in (1, 2))
    if one and two:
        made.append(Bar("30 Mbit/s, delay 1: a round with two SuperNodes a site / with one", two / one, 0.75))
    add("TLS and node keys / insecure, in turn", 1.10, lambda: tls(rows))
    for direction in ("up", "down"):
        add(f"slow link, {direction}: bytes sent again / a part", 1.0, lambda d=direction: again(rows, d))
    for role, limit in (("ServerApp", 4.0), ("ClientApp", 3.0)):
        add(f"peak memory of the {role}, in blocks", limit, lambda r=role: blocks(of(rows, "memory"), r))
    return made


def tls(rows: list[Row]) -> float:
    """Give the median round with TLS and keys over that without, of the repeats that have both."""
    insecure = of(rows, "wire = compute", delay=1, secure=False)
    beside = {(row["repeat"], row["supernodes"]) for row in insecure}
    overlapped = of(rows, "wire = compute", delay=1, secure=True)
    secure = [row for row in overlapped if (row["repeat"], row["supernodes"]) in beside]
    with_it, without = ([s for row in found for s in row["rounds"]] for found in (secure, insecure))
    return statistics.median(with_it) / statistics.median(without)


def again(rows: list[Row], direction: str) -> float:
    """Give the most that a disturbance made be sent again, in parts."""
    found = {row["disturbance"]: row for row in of(rows, f"slow link, {direction}")}
    if not all(row["happened"] for row in found.values()):
        raise ValueError("there was nothing to send again")
    plain = found.pop(DISTURBANCES[0], {"wire_bytes": None})
    return max((row["wire_bytes"] - plain["wire_bytes"]) / row["part_bytes"] for row in found.values())


def blocks(rows: list[Row], role: str) -> float:
    return max(float(row["peak_bytes"][role] / (row["megabytes"] * 1e6)) for row in rows)


def rounds_table(rows: list[Row]) -> Any:
    shown = table(
        "rounds over Flower",
        *("scenario", "MB each way", "compute s", "delay", "SuperNodes", "TLS", "round s", "exchange s"),
    )
    for row in rows:
        if "round_s" in row and row["scenario"] != "memory":
            cells = [f"{row['megabytes']:g}", f"{row['compute_s']:g}", str(row["delay"])]
            cells += [str(row["supernodes"]), "yes" if row["secure"] else "no", f"{row['round_s']:.1f}"]
            shown.add_row(row["scenario"], *cells, f"{row['round_s'] - row['compute_s']:.1f}")
    return shown


def chain_table(rows: list[Row]) -> Any:
    kinds = [(scenario, many) for scenario in ("empty", "wire = compute") for many in (1, 2)]
    found = {f"{scenario}, {many} x SuperNode": chain(rows, scenario, many) for scenario, many in kinds}
    columns = [column for column in found.values() if column]
    head = [name for name, column in found.items() if column]
    shown = table("where each second of a round goes, delay 0", "", *head)
    for name in {name: None for column in columns for name in column}:
        shown.add_row(name, *(f"{column[name]:.2f}" if name in column else "" for column in columns))
    return shown


def chain(rows: list[Row], scenario: str, supernodes: int) -> Mapping[str, float]:
    """Give the median seconds of each stage, over repeats."""
    kept = of(rows, scenario, delay=0, supernodes=supernodes)
    found = [row["chain"] for row in of(kept, scenario, warm=True) or kept if row["chain"]]
    return {name: statistics.median(each[name] for each in found) for name in found[0]} if found else {}


def slow_table(rows: list[Row]) -> Any:
    title = f"{LAYER_MB:g} MB at {SLOW_MBPS:g} Mbit/s, in one direction"
    shown = table(
        title, "disturbed by", "direction", "completed", "seconds", "MB on the wire", "parts", "MB of a part"
    )
    for row in [row for row in rows if "disturbance" in row]:
        cells = [row["direction"], "yes" if row["happened"] else "UNDISTURBED", f"{row['seconds']:.0f}"]
        cells += [f"{row['wire_bytes'] / 1e6:.1f}", str(row["parts"]), f"{row['part_bytes'] / 1e6:.1f}"]
        shown.add_row(row["disturbance"], *cells)
    return shown


def memory_table(rows: list[Row]) -> Any:
    shown = table("peak memory", "sites", "MB of a block", "process", "GB", "blocks")
    for row in of(rows, "memory"):
        for role, peak in sorted(row["peak_bytes"].items()):
            cells = [str(row["sites"]), f"{row['megabytes']:g}", role, f"{peak / 1e9:.2f}"]
            shown.add_row(*cells, f"{peak / row['megabytes'] / 1e6:.1f}")
    return shown


def parse_options() -> argparse.Namespace:
    parser = make_parser("flower", "Rounds over real Flower processes and shaped links.", "--only empty")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6, help="at delay 0; one more at delay 1")
    parser.add_argument("--supernodes", type=int, default=2, help="of a site; 1: both directions take turns")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=100.0, help="of a block, each way")
    parser.add_argument(
        "--large-megabytes", type=float, default=400.0, help="of a block, where memory is looked at"
    )
    parser.add_argument("--mbps", type=float, default=200.0)
    parser.add_argument("--chunk-mib", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, help="these scenarios; the others stay on record")
    options = parser.parse_args()
    options.only = options.only or (["empty"] if options.smoke else list(SCENARIOS))
    if os.geteuid() != 0:
        sys.exit("network namespaces need root")
    return options


if __name__ == "__main__":
    main()
