"""Seconds and bytes to a loss on a slow link: ParaBlock, FL-BCD, and Flower's FedAvg of everything and of LoRA.

The same model, T0 clients, seed, local training and link for all. ParaBlock and FL-BCD run under the virtual clock,
which gives every client a machine and a link of its own; FedAvg is Flower's own strategy on the same simulated link
(see `_flower.py`): float32, sent whole, no overlap. A local step takes the same time in all of them, which favours
those that train everything. The loss is that of held-out rows; a method has reached it at the first evaluation that
is not above it. Memory is a client's, as `parablock plan` estimates it.

    .venv/bin/python benchmarks/peers.py
"""

from __future__ import annotations

import argparse
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from _flower import Point, run_fedavg
from _record import Bar, ended_with, generated, kept_run, make_console, make_parser, record, t0, table
from rich.console import Console

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.config.methods import METHODS
from parablock.plan.forecast import make_plan
from parablock.plan.memory import WAYS

FAMILIES = ("ag_news", "rotten_tomatoes", "dbpedia_14", "glue_qqp")
PEERS: dict[str, dict[str, Any]] = {
    "ParaBlock, int4": {"federation": {"method": "parablock", "delay": 1}, "wire": {"format": "int4"}},
    "ParaBlock, bf16": {"federation": {"method": "parablock", "delay": 1}, "wire": {"format": "bfloat16"}},
    "FL-BCD, bf16": {"federation": {"method": "fl_bcd", "delay": 0}, "wire": {"format": "bfloat16"}},
    "Flower's FedAvg": {"federation": {"method": "fedavg", "delay": 0}},
    "Flower's FedAvg of LoRA, r = 32": {
        "federation": {"method": "fedit", "delay": 0},
        "lora": {"rank": 32, "alpha": 64},
    },
}
OURS, STOCK = "ParaBlock, int4", "Flower's FedAvg"
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    console = make_console()
    found = [peer(name, options, console) for name in options.only]
    show(console, found, options)
    ours, stock = (next(row for row in found if row["peer"] == name)["to_loss"] for name in (OURS, STOCK))
    bars = []
    if ours and stock:
        bars.append(Bar("seconds to the loss, ParaBlock int4 / FedAvg", ours["seconds"] / stock["seconds"], 0.25))
        bars.append(Bar("bytes to the loss, ParaBlock int4 / FedAvg", ours["bytes"] / stock["bytes"], 0.25))
    example = make_config(OURS, options).model_dump(mode="json")
    record(options, found, bars, config=example, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("peers", "Seconds and bytes to a loss on a slow link.", "--loss 2.5 --mbps 30")
    parser.add_argument(
        "--only", nargs="+", choices=PEERS, default=list(PEERS), help="methods; ours and FedAvg at least"
    )
    parser.add_argument("--loss", type=float, default=3.0, help="held-out loss that is to be reached")
    parser.add_argument("--mbps", type=float, default=10.0, help="each way")
    parser.add_argument("--rounds", type=int, default=24, help="rounds of the block methods; at least 8")
    parser.add_argument("--full-rounds", type=int, default=8, help="rounds of the methods that train everything")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--step-time-s", type=float, default=0.1, help="simulated seconds of a local step")
    parser.add_argument("--batch-size", type=int, default=4, help="examples of a step")
    parser.add_argument("--max-length", type=int, default=96, help="tokens of an example")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--max-examples", type=int, default=96, help="held-out examples that the loss is of")
    parser.add_argument("--seed", type=int, default=0, help="seed")
    options = parser.parse_args()
    if options.smoke:
        options.only = [OURS, STOCK]
        options.rounds, options.full_rounds, options.steps, options.max_examples, options.loss = 8, 2, 1, 8, 8.0
    return options


def make_config(name: str, options: argparse.Namespace) -> RunConfig:
    folder = Path(options.work_dir) / "material"
    material = generated(folder, num_clients=2) if options.smoke else t0(*FAMILIES)
    settings = PEERS[name]
    by_block = METHODS[settings["federation"]["method"]].trains == "blocks"
    rounds = options.rounds if by_block else options.full_rounds
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {
                "train": material.train,
                "test": material.test,
                "max_length": options.max_length,
                "partition": {"scheme": "by_file"},
            },
            "train": {
                "num_local_steps": options.steps,
                "per_device_train_batch_size": options.batch_size,
                "learning_rate": options.learning_rate,
            },
            "link": {"upload_mbps": options.mbps, "download_mbps": options.mbps},
            "engine": {"clock": "virtual", "num_threads": 1, "step_time_s": options.step_time_s},
            "evaluation": {"every_rounds": 2 if by_block else 1, "max_examples": options.max_examples},
            "checkpoint": {"every_rounds": 0},
            "seed": options.seed,
        }
        | settings
        | {"federation": settings["federation"] | {"num_clients": len(material.train), "num_rounds": rounds}}
    )


def peer(name: str, options: argparse.Namespace, console: Console) -> Found:
    """Run one of them, and follow seconds, bytes and loss over its rounds."""
    config = make_config(name, options)
    if name.startswith("Flower"):
        before, points = run_fedavg(config)
        console.print(f"{name}: {before:.4f} → {points[-1]['loss']:.4f}")
    else:
        before, points = run_blocks(config, name, options, console)
    way = WAYS[config.federation.traits.trains]
    return {
        "peer": name,
        "initial_eval_loss": before,
        "to_loss": next((point for point in points if point["loss"] <= options.loss), None),
        "points": points,
        "memory_bytes": make_plan(make_config(OURS, options)).memory_bytes[way],
    }


def run_blocks(
    config: RunConfig, name: str, options: argparse.Namespace, console: Console
) -> tuple[float, list[Point]]:
    directory = kept_run(config, options.work_dir, _file_name(name))
    rows = [json.loads(line) for line in directory.metrics.read_text(encoding="utf-8").splitlines()]
    seconds = accumulate(row["round_s"] for row in rows)
    moved = accumulate(row["uplink_bytes"] + row["downlink_bytes"] for row in rows)
    points = [
        {"round": row["round_index"] + 1, "seconds": second, "bytes": num_bytes, "loss": row["eval_loss"]}
        for row, second, num_bytes in zip(rows, seconds, moved, strict=True)
        if row["eval_loss"] is not None
    ]
    return ended_with(directory, console)["initial_eval_loss"], points


def loss_at(row: Found, num_bytes: float) -> float:
    """Give the loss of the last evaluation before a method had moved more than so many bytes."""
    within = [point["loss"] for point in row["points"] if point["bytes"] <= num_bytes]
    return float(within[-1]) if within else float(row["initial_eval_loss"])


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def show(console: Console, found: list[Found], options: argparse.Namespace) -> None:
    budget = found[0]["points"][-1]["bytes"]
    columns = ("rounds", "seconds", "MB", f"loss after {budget / 1e6:.0f} MB", "last loss", "memory")
    made = table(f"To a held-out loss of {options.loss:g} at {options.mbps:g} Mbit/s", "method", *columns)
    for row in found:
        reached = row["to_loss"]
        cells = (
            (str(reached["round"]), f"{reached['seconds']:.1f}", f"{reached['bytes'] / 1e6:.1f}")
            if reached
            else ("never", "", "")
        )
        losses = (loss_at(row, budget), row["points"][-1]["loss"])
        made.add_row(
            row["peer"], *cells, *(f"{loss:.4f}" for loss in losses), f"{row['memory_bytes'] / 1e6:.0f} MB"
        )
    console.print(made)


if __name__ == "__main__":
    main()
