"""The sections of docs/results.md on time, bytes and memory, and what all sections are written with.

Used by docs/generate_results.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, median, stdev
from typing import Any

Record = dict[str, Any]


def slow_link(found: Record) -> str:
    """Write the section of `benchmarks/slow_link.py`."""
    rows = [
        [f"{row['format']}, {row['delay']}"]
        + [f"{row[key]:.1f}" for key in ("communication_s", "round_s")]
        + [f"{row['ratio']:.3f}"]
        for row in found["results"]["runs"]
    ]
    options = found["options"]
    text = (
        f"## A layer of Llama-3-8B at {options['mbps']:g} Mbit/s\n\nVirtual clock; a round computes for "
        f"{options['compute_s']:g} s, and moves a layer of {found['results']['layer_parameters']:,} parameters.\n"
    )
    return "\n".join(
        [text, *table(["format, delay", "up and down, s", "round, s", "round / computation"], rows), *foot(found)]
    )


def scale(found: Record) -> str:
    """Write the section of `benchmarks/scale.py`."""
    cohorts, bandwidths = found["results"]["cohorts"], found["results"]["bandwidths"]
    sizes = [[f"{row['model']}, {row['way']}", *(f"{v:,.1f}" for v in row["mbps"].values())] for row in bandwidths]
    rows = [
        [
            str(row["cohort"]),
            f"{row['simulated_s']:.0f}",
            f"{row['planned_s']:.0f}",
            f"{row['real_s_per_round']:.2f}",
            f"{row['grown_bytes'] / 1e9:.2f}",
        ]
        for row in cohorts
    ]
    head = ["cohort", "simulated, s", "planned, s", "real s a round", "GB"]
    return "\n".join(
        [
            "## What a link must carry\n",
            "Mbit/s each way at which a client computes for a part of the time: one layer a block, eight local",
            "steps on a GPU of ordinary speed.\n",
            *table(["model, method", *bandwidths[0]["mbps"]], sizes),
            f"\nBlocks of Llama-3-8B and {cohorts[0]['clients']:,} clients under the virtual clock, int4:\n",
            *table(head, rows),
            *foot(found),
        ]
    )


def peers(found: Record) -> str:
    """Write the section of `benchmarks/peers.py`."""
    rows, options = [], found["options"]
    for row in found["results"]:
        reached = row["to_loss"] or {}
        when = [f"{reached['seconds']:.1f}", f"{reached['bytes'] / 1e6:.1f}"] if reached else ["never", ""]
        last = row["points"][-1]
        memory = f"{row['memory_bytes'] / 1e6:.0f}"
        rows.append([row["peer"], *when, f"{last['loss']:.4f} ({last['round']})", memory])
    head = ["method", "seconds", "MB, all clients", "last loss (rounds)", "MB of memory"]
    text = (
        f"## To a loss of {options['loss']:g} at {options['mbps']:g} Mbit/s\n\nFour T0 clients. FedAvg is Flower's "
        "own strategy on the same simulated link, float32, sent whole.\n"
    )
    return "\n".join([text, *table(head, rows), *foot(found)])


def step(found: Record) -> str:
    """Write the section of `benchmarks/step.py`."""
    rows = []
    for row in found["results"]:
        for name, seconds in row["step_s"].items():
            ratio = f"{row['ratios'][name]:.3f}" if name in row["ratios"] else ""
            peak = f"{row['peak_bytes_beside_the_model'][name] / 1e6:.0f}"
            rows.append([f"{row['model']}, {name}", f"{1e3 * seconds:.1f}", ratio, peak])
    text = "## A local step\n\nOf a block, of the same loop written by hand, of all parameters, of LoRA (r = 16).\n"
    head = ["model", "ms", "block / this", "peak MB beside the model"]
    return "\n".join([text, *table(head, rows), *foot(found)])


def wire(found: Record) -> str:
    """Write the section of `benchmarks/wire.py`."""
    rows = [
        [f"{row['format']}, {row['rounding']}", f"{row['bytes_ratio']:.4f}", f"{row['megabytes_per_s']:,.0f}"]
        for row in found["results"]["formats"]
        if row["format"].startswith("int")
    ]
    text = "## The wire\n\nEncoding and decoding on one core, and the server's fold.\n"
    head = ["format", "bytes / float32", "MB/s of float32"]
    return "\n".join([text, *table(head, rows), *_folds(found["results"]["aggregation"]), *foot(found)])


def _folds(found: Record) -> list[str]:
    rows = [
        [
            row["what"],
            f"{row['gigabytes_per_s']:.2f}",
            f"{row['relative_throughput']:.3f}",
            f"{row['peak_blocks']:.2f}",
            f"{row['file_gigabytes']:.1f}",
            f"{row['disk_gigabytes_per_s']:.2f}" if row["file_gigabytes"] else "",
        ]
        for row in found["rows"]
    ]
    size = f"{found['updates']} updates of {found['parameters'] / 1e6:g} M parameters"
    text = (
        f"\n{size}, through the server's fold: what memory has no room for is in a file until the round is "
        "committed, because a client may still be taken out. Beside it a plain `add_` of the same vectors, and a "
        "plain write of the same bytes. The file is what costs the time, and with int4 the decoding.\n"
    )
    head = [
        "updates",
        "GB/s of float32",
        "/ plain `add_`",
        "peak memory, blocks",
        "GB in a file",
        "GB/s of the disk",
    ]
    return [text, *table(head, rows)]


COLD = ", ClientApps from nothing"


def flower(found: Record) -> str:
    """Write the section of `benchmarks/flower.py`."""
    rows = found["results"]
    text = (
        "## Over Flower\n\nReal SuperLink, SuperNodes and trainers on one machine, two sites behind shaped links "
        f"of {found['config']['mbps']:g} Mbit/s each way, TLS and node keys on where it does not say otherwise. "
        "Training is a sleep. An exchange is a round without its computation: the wire and all of Flower's chain. "
        "ClientApps are forked from a process that has loaded Flower, or start from nothing.\n\n"
        "Where the computation covers an exchange, delay 1 takes as long as the computation: of delay 0 that is "
        "computation / (computation + exchange) at least. So with 20 s of computation 0.6 asks for an exchange of "
        "13.3 s or more, and 1.6 times the wire is 12.8 s: both bars cannot be met at once. 0.6 is asked as well "
        "where the computation only just covers the exchange.\n"
    )
    parts = [text, *_flower_rounds(rows), *_flower_chain(rows), *_flower_slow_link(rows), *_flower_memory(rows)]
    commits = ", ".join(dict.fromkeys(row["commit"][:10] for row in rows))
    return "\n".join(
        [*parts, f"\nThe rows are of commit {commits}.", *foot(found | {"command": "python benchmarks/flower.py"})]
    )


def _flower_rounds(rows: Sequence[Record]) -> list[str]:
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if "round_s" in row and row["scenario"] != "memory":
            way = f"{row['scenario']}: delay {row['delay']}{'' if row['secure'] else ', without TLS'}"
            way += ", one SuperNode" if row.get("supernodes", 1) == 1 else ""
            way += "" if row.get("warm") else COLD
            groups.setdefault((way, row["megabytes"], row["compute_s"]), []).extend(row["rounds"])
    lines = []
    for (way, mega, compute_s), found in groups.items():
        middle, spread = median(found), f"{min(found):.1f} … {max(found):.1f} ({len(found)})"
        lines.append([way, f"{mega:g}", f"{compute_s:g}", f"{middle:.1f}", f"{middle - compute_s:.1f}", spread])
    head = ["scenario", "MB each way", "computation, s", "round, s (median)", "exchange, s", "from … to (rounds)"]
    return table(head, lines)


def _flower_chain(rows: Sequence[Record]) -> list[str]:
    groups: dict[str, list[Record]] = {}
    for row in rows:
        if row["scenario"] in ("empty", "wire = compute") and row.get("chain"):
            which = "one SuperNode" if row.get("supernodes", 1) == 1 else "two SuperNodes"
            which += "" if row.get("warm") else COLD
            groups.setdefault(f"{row['scenario']}, {which}", []).append(row["chain"])
    if not groups:
        return []
    columns = [{name: median(chain[name] for chain in found) for name in found[0]} for found in groups.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    lines = [[name, *(f"{column[name]:.2f}" if name in column else "" for column in columns)] for name in names]
    return ["\nWhere each second of a round goes, at delay 0:\n", *table(["", *groups], lines)]


def _flower_slow_link(rows: Sequence[Record]) -> list[str]:
    lines = []
    for row in rows:
        if "disturbance" in row:
            sizes = (f"{row[key] / 1e6:.1f}" for key in ("wire_bytes", "part_bytes"))
            lines.append([f"{row['direction']}, {row['disturbance']}", f"{row['seconds']:.0f}", *sizes])
    if not lines:
        return []
    some = next(row for row in rows if "disturbance" in row)
    text = (
        f"\nOne round of {some['megabytes']:g} MB, {some['mbps']:g} Mbit/s in one direction, on a busy machine:\n"
    )
    return [text, *table(["direction, disturbed by", "seconds", "MB on the wire", "MB of a part"], lines)]


def _flower_memory(rows: Sequence[Record]) -> list[str]:
    found = [row for row in rows if row["scenario"] == "memory"]
    head, columns = ["process"], list[list[str]]()
    for row in found:
        head.append(f"{row['sites']} sites, {row['megabytes']:g} MB: GB (blocks)")
        size, peaks = row["megabytes"] * 1e6, sorted(row["peak_bytes"].items())
        columns.append([f"{peak / 1e9:.2f} ({peak / size:.1f})" for _, peak in peaks])
    if not found:
        return []
    lines = zip(sorted(found[0]["peak_bytes"]), *columns, strict=True)
    return ["\nMost memory of a process, by sites and size of a block:\n", *table(head, lines)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Write a Markdown table."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def foot(found: Record) -> list[str]:
    """Say which bars are met, and what makes the table again."""
    bars = [
        f"- {bar['name']}: {bar['value']:.4g}, {'at most' if bar['at_most'] else 'at least'} {bar['limit']:g}: "
        f"{'met' if bar['is_met'] else '**missed**'}"
        for bar in found["bars"]
    ]
    machine, versions = found["machine"], found["versions"]
    where = f"{machine['processor']}, {machine['cores']} cores, torch {versions['torch']}"
    command = found["command"].partition(" --output")[0]
    return ["", *bars, *[""] * bool(bars), f"`{command}` ({where}; commit {found['commit'][:10]})", ""]


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Write a mean and, of several values, their standard deviation."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"
