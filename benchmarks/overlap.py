"""How much of the communication ParaBlock hides, on the real clock, with threads that really run at once.

Each repeat has three runs. The first, without a link, tells how long a round computes; the link is then set
so that an exchange (an update up, an aggregate down) takes nearly as long; then FL-BCD (delay 0) and
ParaBlock (delay 1) run over it, one right after the other, so that a slow minute of the machine hits all.
Both clients draw from one pool and all examples are cut to one length: only the machine makes rounds uneven,
and how uneven it made them stands beside the result. Every client computes with one torch thread.

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

from parablock.config import RunConfig, parse_config
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
    repeats = []
    for repeat in range(options.repeats):
        repeats.append(compare(material, options, folder / f"repeat-{repeat}"))
        done = repeats[-1]
        console.print(
            f"repeat {repeat}: a round computes {done['link']['compute_s']:.2f} s and moves "
            f"{done['link']['bytes']:,} bytes at {done['link']['upload_mbps']:.1f} Mbit/s up, "
            f"{done['link']['download_mbps']:.1f} down",
        )
    show(console, repeats)
    config = make_config(material, options, 1, repeats[-1]["link"]).model_dump(mode="json")
    record(options, repeats, bars(repeats), config=config, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("overlap", "Wall time of delay 1 against delay 0 on a shaped link.", "--repeats 5")
    parser.add_argument("--rounds", type=int, default=16, help="rounds of a run")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--repeats", type=int, default=3, help="calibrations, each with a run of either delay")
    parser.add_argument("--load", type=float, default=0.95, help="time of an exchange / computation of a round")
    parser.add_argument("--upload-share", type=float, default=0.5, help="the upload's part of the exchange")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.steps, options.repeats = 8, 1, 1
    return options


def compare(material: Material, options: argparse.Namespace, folder: Path) -> Found:
    """Calibrate, then run both delays over the same link."""
    load_before = os.getloadavg()[0]
    calibration = measured(make_config(material, options, 0, {}), folder / "calibration")
    link = choose_link(calibration, options)
    found: Found = {"load_average_before": load_before, "link": link, "calibration": calibration}
    for delay in (0, 1):
        found[f"delay_{delay}"] = measured(make_config(material, options, delay, link), folder / f"delay-{delay}")
    found["ratio"] = found["delay_1"]["wall_time_s"] / found["delay_0"]["wall_time_s"]
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


def choose_link(calibration: Found, options: argparse.Namespace) -> Found:
    """Choose the bandwidths that make an exchange as long as `--load` says."""
    compute_s = statistics.median(calibration["round_compute_s"])
    one_way_bytes = calibration["bytes_per_client_round"] / 2
    exchange_s = options.load * compute_s

    def mbps(share: float) -> float:
        return one_way_bytes * 8 / (share * exchange_s) / 1e6

    return {
        "compute_s": compute_s,
        "bytes": calibration["bytes_per_client_round"],
        "upload_mbps": mbps(options.upload_share),
        "download_mbps": mbps(1 - options.upload_share),
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


def bars(repeats: list[Found]) -> list[Bar]:
    overlap = statistics.median(found["delay_1"]["overlap_fraction"] for found in repeats)
    return [
        Bar("wall time of delay 1 / delay 0, median", statistics.median(found["ratio"] for found in repeats), 0.60),
        Bar("overlap_fraction of delay 1, median", overlap, 0.90, at_most=False),
    ]


def show(console: Console, repeats: list[Found]) -> None:
    columns = ("wall 0", "wall 1", "ratio", "sequential 1", "overlap", "exposed at end", "uneven", "load before")
    made = table("Two clients, real clock: delay 0 and delay 1", "repeat", *columns)
    for repeat, found in enumerate(repeats):
        serial, overlapped = found["delay_0"], found["delay_1"]
        made.add_row(
            str(repeat),
            f"{serial['wall_time_s']:.1f} s",
            f"{overlapped['wall_time_s']:.1f} s",
            f"{found['ratio']:.3f}",
            f"{overlapped['sequential_s']:.1f} s",
            f"{overlapped['overlap_fraction']:.3f}",
            f"{overlapped['exposed_at_the_end']:.3f}",
            f"{overlapped['compute_spread']:.0%}",
            f"{found['load_average_before']:.1f}",
        )
    console.print(made)


if __name__ == "__main__":
    main()
