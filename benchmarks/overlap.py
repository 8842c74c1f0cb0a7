"""How much of the communication ParaBlock hides, on the real clock, with threads that really run at once.

A calibration run without a link tells how long a round computes. The link is then set so that an exchange
(an update up, an aggregate down) takes nearly as long. FL-BCD (delay 0) and ParaBlock (delay 1) take turns,
so that a slow moment of the machine hits both; medians are compared. Both clients get rows of one pool, so
that they compute about equally long.

    .venv/bin/python benchmarks/overlap.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from _record import Bar, Material, fresh_folder, generated, make_parser, record, run_quietly, t0, table
from rich.console import Console

from parablock.config import RunConfig, parse_config
from parablock.report.records import RunDirectory
from parablock.trace import Span, read_chrome_trace

NUM_CLIENTS = 2
SHOWN = ("wall_time_s", "sequential_s", "compute_s", "communication_s", "overlap_fraction")
Summary = dict[str, Any]


def main() -> None:
    options = parse_options()
    console = Console()
    folder = fresh_folder(options)
    material = (
        generated(folder / "material", num_clients=NUM_CLIENTS) if options.smoke else t0("ag_news", "rotten_tomatoes")
    )
    console.print("calibrating: delay 0 without a link …")
    link = calibrate(material, options, folder)
    console.print(
        f"a round computes {link['compute_s']:.3f} s and moves {link['bytes']:,} bytes: "
        f"{link['upload_mbps']:.1f} Mbit/s up, {link['download_mbps']:.1f} Mbit/s down",
        highlight=False,
    )
    runs: dict[int, list[Summary]] = {0: [], 1: []}
    for repeat in range(options.repeats):
        for delay, done in runs.items():
            config = make_config(material, options, delay, link["upload_mbps"], link["download_mbps"])
            directory = folder / f"delay-{delay}-{repeat}"
            summary = run_quietly(config, directory)
            done.append(summary | exposed(directory))
            console.print(f"delay {delay}, repeat {repeat}: {summary['wall_time_s']:.2f} s", highlight=False)
    show(console, runs)
    record(
        options,
        {"calibration": link, "delay_0": runs[0], "delay_1": runs[1]},
        bars(runs, options),
        config=make_config(material, options, 1, link["upload_mbps"], link["download_mbps"]).model_dump(mode="json"),
        console=console,
    )


def parse_options() -> argparse.Namespace:
    parser = make_parser("overlap", "Wall time of delay 1 against delay 0 on a shaped link.", "--repeats 5")
    parser.add_argument("--rounds", type=int, default=16, help="rounds of a run")
    parser.add_argument("--steps", type=int, default=4, help="local steps of a round, K")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each delay")
    parser.add_argument("--load", type=float, default=0.95, help="time of an exchange / computation of a round")
    parser.add_argument("--upload-share", type=float, default=0.5, help="the upload's part of the exchange")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.steps, options.repeats = 8, 1, 1
    return options


def make_config(
    material: Material, options: argparse.Namespace, delay: int, upload_mbps: float | None, download_mbps: float | None
) -> RunConfig:
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {"train": material.train, "test": material.test, "max_length": 128},
            "federation": {"num_clients": NUM_CLIENTS, "num_rounds": options.rounds, "delay": delay},
            "train": {"num_local_steps": options.steps, "learning_rate": 1e-3},
            "link": {"upload_mbps": upload_mbps, "download_mbps": download_mbps},
            "engine": {"clock": "real", "num_threads": 1},
            "evaluation": {"every_rounds": 0, "max_examples": 16},
            "checkpoint": {"every_rounds": 0},
        }
    )


def calibrate(material: Material, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Choose the link from the median round of a run without one."""
    summary = run_quietly(make_config(material, options, 0, None, None), folder / "calibration")
    lines = RunDirectory(folder / "calibration").metrics.read_text(encoding="utf-8").splitlines()
    compute_s = statistics.median(json.loads(line)["compute_s"] for line in lines)
    one_way_bytes = summary["bytes_per_client_round"] / 2
    exchange_s = options.load * compute_s

    def mbps(share: float) -> float:
        return one_way_bytes * 8 / (share * exchange_s) / 1e6

    return {
        "compute_s": compute_s,
        "bytes": summary["bytes_per_client_round"],
        "upload_mbps": mbps(options.upload_share),
        "download_mbps": mbps(1 - options.upload_share),
    }


def exposed(directory: Path) -> dict[str, float]:
    """Tell where communication was not hidden: seconds on the links after the last computation, and before."""
    spans = read_chrome_trace(directory / "trace.json")
    last_s = max(_end(span) for span in spans if span.activity == "computing")
    moving = [span for span in spans if span.activity in ("uploading", "downloading")]
    after_s = sum(max(0.0, _end(span) - max(span.start_s, last_s)) for span in moving)
    return {"moving_s": sum(span.duration_s for span in moving), "moving_after_last_compute_s": after_s}


def _end(span: Span) -> float:
    return span.start_s + span.duration_s


def bars(runs: dict[int, list[Summary]], options: argparse.Namespace) -> list[Bar]:
    serial_s, overlapped_s = (median(runs[delay], "wall_time_s") for delay in (0, 1))
    return [
        Bar("wall time of delay 1 / delay 0", overlapped_s / serial_s, 0.60),
        Bar("overlap_fraction of delay 1", median(runs[1], "overlap_fraction"), 0.90, at_most=False),
    ]


def median(runs: list[Summary], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def show(console: Console, runs: dict[int, list[Summary]]) -> None:
    made = table("Medians", "", *SHOWN)
    for delay, done in runs.items():
        made.add_row(f"delay {delay}", *(f"{median(done, key):.3f}" for key in SHOWN))
    console.print(made)


if __name__ == "__main__":
    main()
