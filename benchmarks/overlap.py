"""How much of the communication ParaBlock hides, on the real clock, with threads that really run at once.

A run without a link tells how long a round computes, on average; the link is then set so that an exchange (an
update up, an aggregate down) takes `--loads` of that. FL-BCD (delay 0) and ParaBlock (delay 1) run over it, one
right after the other, so that a slow minute of the machine hits both; all of it is repeated, medians count.

Both clients draw from one pool and all examples are cut to one length. Rounds are uneven all the same, because
backpropagation stops at the active block: the first block computes longest and the last one shortest. A load
near 1 is more than the short rounds can hide. The exchange of the last round has nothing to hide under.

    .venv/bin/python benchmarks/overlap.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from _record import (
    Bar,
    Material,
    fresh_folder,
    generated,
    make_console,
    make_parser,
    record,
    run_quietly,
    t0,
    table,
)
from rich.console import Console

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.trace import Span, read_chrome_trace

NUM_CLIENTS = 2
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    console = make_console()
    folder = fresh_folder(options)
    material = (
        generated(folder / "material", num_clients=NUM_CLIENTS)
        if options.smoke
        else t0("ag_news", "rotten_tomatoes")
    )
    found = []
    for repeat in range(options.repeats):
        found += compare(material, options, folder / f"repeat-{repeat}")
        link = found[-1]["link"]
        console.print(
            f"repeat {repeat}: a round computes {link['compute_s']:.2f} s and moves {link['bytes']:,} bytes; load "
            f"{found[-1]['load']:g} is {link['upload_mbps']:.1f} Mbit/s up, {link['download_mbps']:.1f} down"
        )
    show(console, found)
    config = make_config(material, options, 1, link).model_dump(mode="json")
    record(options, found, bars(found, options), config=config, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("overlap", "Wall time of delay 1 against delay 0 on a shaped link.", "--repeats 5")
    parser.add_argument("--rounds", type=int, default=16, help="rounds of a run")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--repeats", type=int, default=3, help="calibrations, each with a run of either delay")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.77, 0.95], help="time of an exchange / computation of a round"
    )
    parser.add_argument("--upload-share", type=float, default=0.5, help="the upload's part of the exchange")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.steps, options.repeats, options.loads = 8, 1, 1, [0.85]
    return options


def compare(material: Material, options: argparse.Namespace, folder: Path) -> list[Found]:
    """Calibrate, then for each load run both delays over the same link."""
    calibration = measured(make_config(material, options, 0, {}), folder / "calibration")
    found = []
    for load in options.loads:
        busy = os.getloadavg()[0]
        link = choose_link(calibration, load, options.upload_share)
        zero, one = (
            measured(make_config(material, options, delay, link), folder / f"load-{load:g}-delay-{delay}")
            for delay in (0, 1)
        )
        ratio = one["wall_time_s"] / zero["wall_time_s"]
        found.append(
            {"load": load, "ratio": ratio, "link": link, "delay_0": zero, "delay_1": one}
            | {"calibration": calibration, "processes_before": busy}
        )
    return found


def make_config(material: Material, options: argparse.Namespace, delay: int, link: Found) -> RunConfig:
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {"train": material.train, "test": material.test, "max_length": 64},
            "federation": {"num_clients": NUM_CLIENTS, "num_rounds": options.rounds, "delay": delay},
            "train": {"num_local_steps": options.steps, "learning_rate": 1e-3, "completion_only_loss": False},
            "link": {key: link.get(key) for key in ("upload_mbps", "download_mbps")},
            "engine": {"clock": "real", "num_threads": 1},
            "evaluation": {"every_rounds": 0, "max_examples": 16},
            "checkpoint": {"every_rounds": 0},
        }
    )


def choose_link(calibration: Found, load: float, upload_share: float) -> Found:
    """Choose the bandwidths that make an exchange take `load` of a round's mean computation."""
    compute_s = statistics.fmean(calibration["round_compute_s"])
    one_way_bytes = calibration["bytes_per_client_round"] / 2

    def mbps(share: float) -> float:
        return one_way_bytes * 8 / (share * load * compute_s) / 1e6

    return {
        "compute_s": compute_s,
        "bytes": calibration["bytes_per_client_round"],
        "upload_mbps": mbps(upload_share),
        "download_mbps": mbps(1 - upload_share),
    }


def measured(config: RunConfig, directory: Path) -> Found:
    """Run, and add to the summary what its files say about uneven rounds and about the end."""
    summary = run_quietly(config, directory)
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    compute_s = [json.loads(line)["compute_s"] for line in lines]
    return summary | {
        "round_compute_s": compute_s,
        "compute_spread": statistics.pstdev(compute_s) / statistics.fmean(compute_s),
        "exposed_at_the_end": exposed_at_the_end(read_chrome_trace(directory / "trace.json")),
    }


def exposed_at_the_end(spans: list[Span]) -> float:
    """Give the part of all communication that came after a client's last computation: none can hide it."""
    last_s = {span.client_id: _end(span) for span in spans if span.activity == "computing"}
    moving = [span for span in spans if span.activity in ("uploading", "downloading")]
    after_s = sum(max(0.0, _end(span) - max(span.start_s, last_s[span.client_id])) for span in moving)
    return after_s / (sum(span.duration_s for span in moving) or 1.0)


def _end(span: Span) -> float:
    return span.start_s + span.duration_s


def bars(found: list[Found], options: argparse.Namespace) -> list[Bar]:
    made = []
    for load in options.loads:
        same = [row for row in found if row["load"] == load]
        overlap = statistics.median(row["delay_1"]["overlap_fraction"] for row in same)
        ratio = statistics.median(row["ratio"] for row in same)
        made.append(Bar(f"load {load:g}: wall time of delay 1 / delay 0, median", ratio, 0.60))
        made.append(Bar(f"load {load:g}: overlap_fraction of delay 1, median", overlap, 0.90, at_most=False))
    return made


def show(console: Console, found: list[Found]) -> None:
    columns = (
        "wall 0",
        "wall 1",
        "ratio",
        "sequential 1",
        "overlap",
        "exposed at end",
        "uneven",
        "processes before",
    )
    made = table("Two clients, real clock: delay 0 and delay 1", "load", *columns)
    for row in sorted(found, key=lambda row: row["load"]):
        serial, overlapped = row["delay_0"], row["delay_1"]
        made.add_row(
            f"{row['load']:g}",
            f"{serial['wall_time_s']:.1f} s",
            f"{overlapped['wall_time_s']:.1f} s",
            f"{row['ratio']:.3f}",
            f"{overlapped['sequential_s']:.1f} s",
            f"{overlapped['overlap_fraction']:.3f}",
            f"{overlapped['exposed_at_the_end']:.3f}",
            f"{overlapped['compute_spread']:.0%}",
            f"{row['processes_before']:.1f}",
        )
    console.print(made)


if __name__ == "__main__":
    main()
